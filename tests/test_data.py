"""data.py: nothing is lost on the way from text to batches, and every kind of damage is named before it is
trained on.
"""
import errno
import gzip
import hashlib
import http.server
import json
import multiprocessing
import os
import pickle
import random
import shutil
import socket
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
from configurator import UserError
from data import DownloadError, Tokens, load, make_tokenizer, prepare, tokenizer_from_dict, verify
from processes import ROOT, run

posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="no locks on Windows")
VERSE = "".join(f"line {i}: to be, or not to be?\n" for i in range(100))


def wild(seed):
    """Random characters from all of Unicode but the surrogates, with many of the troublesome ones."""
    rng = random.Random(seed)
    points = [rng.choice([rng.randrange(128), rng.randrange(0x110000), 0xFEFF, 0x2028, 13, 10, 0])
              for _ in range(300)]
    return "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)


NASTY = ["", "a", "\r\n\r", "\ufeffmark", "e\u0301 o\u0308",
         "\u05e2\u05d1\u05e8\u05d9\u05ea \u0645\u0631\u062d\u0628\u0627",
         "\0\x01\x1b[2J", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0010ffff\ufffd\ufffe",
         "\u2028\u2029\x85",
         "<|endoftext|> <PAD>", "  \t\n ", "z" * 1000, *map(wild, range(30))]


def refused(call, *words, kind=UserError):
    """call must raise for a person: at most three lines, with all the words in them."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) <= 3 and all(str(word) in message for word in words), message
    return message


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def made(tmp_path, content=VERSE, name="verse.txt", **kwargs):
    """Prepares content as a file and loads it."""
    return load(prepare(write(tmp_path / name, content), data_dir=tmp_path / "data", **kwargs).name,
                tmp_path / "data")


def tokens(*lengths, vocab_size=1_000_000):
    """Shard k holds 10,000 k, 10,000 k + 1, ...: every id tells where it lay."""
    return Tokens([np.arange(10_000 * k, 10_000 * k + n, dtype=np.uint32) for k, n in enumerate(lengths)],
                  vocab_size, "val split of it")


def whole(split):
    return np.concatenate(split.shards)


# --- tokenizers ---


@pytest.mark.parametrize("name", ["char", "byte"])
def test_decode_of_encode_is_the_text(name):
    for text in NASTY:
        made = make_tokenizer(name, set(text + "a"))
        again = tokenizer_from_dict(json.loads(json.dumps(made.to_dict())))
        ids = made.encode(text)
        assert made.decode(ids) == again.decode(ids.tolist()) == text
        assert again.decode(torch.tensor(ids.astype(np.int64))) == text
        assert (ids == again.encode(text)).all() and (ids < made.vocab_size).all()
        assert made.unknown(text) == [] and again.vocab_size == made.vocab_size
        assert made.count_bytes(ids) == len(text.encode("utf-8"))


def test_lone_surrogates():
    text = "a\ud800b\udfff\ud83d\ude00" # the last two are not the emoji that they would spell in UTF-16
    char = make_tokenizer("char", text)
    again = tokenizer_from_dict(json.loads(json.dumps(char.to_dict())))
    assert char.decode(char.encode(text)) == again.decode(again.encode(text)) == text
    byte = make_tokenizer("byte", "")
    assert byte.decode(byte.encode("a\ud800b")) == "a\ufffd\ufffd\ufffdb"


def test_char_ids_are_the_sorted_characters():
    text = "hello, w\u00f6rld \U0001f600"
    char = make_tokenizer("char", text)
    assert char.encode(text).tolist() == [sorted(set(text)).index(c) for c in text]
    assert char.vocab_size == len(set(text)) and char.eot is None


def test_char_names_what_it_lacks():
    char = make_tokenizer("char", "abc")
    assert char.unknown("a\n\U0010ffffc\n") == ["\n", "\U0010ffff"]
    refused(lambda: char.encode("a\nb\u00e9"), repr("\n"), repr("\u00e9"), "--tokenizer=byte")
    assert "'A'" not in refused(lambda: char.encode("0123456789ABCDE"), repr("9"), "and 5 more")


def test_ascii_table():
    t = make_tokenizer("ascii", "anything")
    assert t.vocab_size == 99 and t.encode("Hello").tolist() == [42, 71, 78, 78, 81]
    assert t.encode(" ~\n\t").tolist() == [2, 96, 97, 98]
    assert t.encode("\u00e9\r\0\U0001f600").tolist() == [1] * 4
    assert t.unknown("a\u00e9\ra") == ["\r", "\u00e9"]
    assert t.decode([0, 42, 0, 1, 97]) == "H\ufffd\n"
    printable = "".join(map(chr, range(32, 127))) + "\n\t"
    assert t.decode(t.encode(printable)) == printable


def test_ascii_as_json_with_and_without_a_name(tmp_path):
    t = make_tokenizer("ascii", "")
    saved = t.to_dict()
    assert saved["char_to_id"]["\t"] == 98 and saved["id_to_char"]["98"] == "\t"
    assert len(saved["char_to_id"]) == len(saved["id_to_char"]) == 99
    # how another program saves it
    other = {"char_to_id": {**saved["char_to_id"], "\0": 1}, "id_to_char": saved["id_to_char"]}
    for i, d in enumerate([saved, other]):
        back = make_tokenizer(str(write(tmp_path / f"{i}.json", json.dumps(d))), "")
        assert back.name == "ascii" and back.vocab_size == 99
        assert back.encode("Hi\u00e9").tolist() == t.encode("Hi\u00e9").tolist()


@pytest.mark.parametrize("bad", [
    {}, [], 7, "char", {"name": "nope"}, {"name": ["char"]}, {"name": "char"}, {"char_to_id": ["a"]},
    {"char_to_id": {"a": 0, "b": 2}}, {"char_to_id": {"a": 0, "b": 0}}, {"char_to_id": {"a": -1}},
    {"char_to_id": {"a": 10 ** 12}}, {"char_to_id": {"ab": 0}}, {"char_to_id": {"a": True, "b": 0}},
    {"name": "ascii", "char_to_id": {"a": 0}}])
def test_no_tokenizer_in_it(bad, tmp_path):
    refused(lambda: tokenizer_from_dict(bad), "char_to_id")
    refused(lambda: make_tokenizer(str(write(tmp_path / "t.json", json.dumps(bad))), "a"), "t.json",
            "char_to_id")


def test_tokenizer_names(tmp_path):
    for name in ("nope", "missing.json", str(write(tmp_path / "t.txt", "{}"))):
        refused(lambda: make_tokenizer(name, "a"), name, "char, ascii, gpt2, byte", "FILE.json")
    refused(lambda: make_tokenizer(str(write(tmp_path / "t.json", "{")), "a"), "t.json")


@pytest.mark.parametrize("name", ["char", "ascii", "byte"])
def test_ids_outside_the_vocabulary_are_not_decoded(name):
    t = make_tokenizer(name, "abc")
    for bad in (-1, t.vocab_size, 2 ** 40):
        refused(lambda: t.decode([0, bad]), bad)


@pytest.fixture
def offline(monkeypatch):
    """Every connection fails, as without a network."""
    def fail(*args):
        raise OSError(errno.ENETUNREACH, "Network is unreachable")
    monkeypatch.setattr(socket.socket, "connect", fail)


def test_gpt2_is_tiktokens_own(mirror, tmp_path, monkeypatch, offline):
    import tiktoken
    t = make_tokenizer("gpt2", "", tmp_path / "data")
    ours = [t.encode(text) for text in NASTY + ["a\ud800b", VERSE]]
    cache = tmp_path / "cache" # filled as tiktoken's own download would fill it
    cache.mkdir()
    for name in t.files:
        shutil.copy(mirror / name, cache / hashlib.sha1((t.address + name).encode()).hexdigest())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    theirs = tiktoken.get_encoding("gpt2")
    for text, ids in zip(NASTY + ["a\ud800b", VERSE], ours):
        assert ids.tolist() == theirs.encode_ordinary(text)
        assert t.decode(ids) == text.replace("\ud800", "\ufffd")
    assert t.eot == theirs.eot_token == 50256 and t.vocab_size == theirs.n_vocab
    assert 50256 not in t.encode("<|endoftext|>") and t.decode([50256]) == "<|endoftext|>"
    refused(lambda: t.decode([50257]), 50257)


def test_gpt2_uses_no_damaged_file(mirror, tmp_path, monkeypatch):
    """tiktoken would delete it, and download it without a timeout."""
    text = make_tokenizer("gpt2", "", tmp_path).encode("a b").tolist()
    assert sorted(os.listdir(tmp_path)) == ["encoder.json", "vocab.bpe"]
    monkeypatch.delenv("DATA_MIRROR") # they lie in data_dir by now
    assert make_tokenizer("gpt2", "", tmp_path).encode("a b").tolist() == text
    write(tmp_path / "vocab.bpe", b"damaged")
    refused(lambda: make_tokenizer("gpt2", "", tmp_path).encode("a"), "vocab.bpe", "delete it")


def test_gpt2_offline_without_its_files(tmp_path, monkeypatch, offline):
    monkeypatch.delenv("DATA_MIRROR", raising=False)
    refused(lambda: make_tokenizer("gpt2", "", tmp_path).encode("a"), "vocab.bpe", "DATA_MIRROR",
            kind=DownloadError)


# --- known datasets ---


def test_shakespeare_is_nanogpts(mirror, tmp_path):
    found = load(prepare("shakespeare", data_dir=tmp_path).name, tmp_path)
    text = (mirror / "tinyshakespeare.txt").read_text(encoding="utf-8")
    symbols = sorted(set(text))
    ids = np.array([symbols.index(c) for c in text[:5000]])
    assert (len(found.train), len(found.val), found.vocab_size) == (1_003_854, 111_540, 65)
    assert (whole(found.train)[:5000] == ids).all()
    assert found.tokenizer.decode(whole(found.val)) == text[1_003_854:]
    assert found.meta["source"]["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert "char-rnn" in found.meta["source"]["from"]


def test_shakespeare_gpt2_counts_are_nanogpts(mirror, tmp_path):
    found = load(prepare("shakespeare", "gpt2", tmp_path).name, tmp_path)
    assert (len(found.train), len(found.val), found.vocab_size) == (301_966, 36_059, 50257)


def test_pystdlib_needs_no_network(tmp_path, monkeypatch, offline):
    monkeypatch.delenv("DATA_MIRROR", raising=False)
    found = load(prepare("pystdlib", data_dir=tmp_path).name, tmp_path)
    assert (len(found.train), len(found.val)) == (1_003_854, 111_540)
    assert max(found.tokenizer.char_to_id) <= "\x7f"
    first = (Path(os.__file__).parent / "__future__.py").read_text()[:500]
    assert found.tokenizer.decode(whole(found.train)).startswith(first)


@pytest.mark.parametrize("name, length", [
    (name, n) if n == 256 else pytest.param(name, n, marks=pytest.mark.deep) for name, n in data.NEEDLES.items()])
def test_needles_ask_only_what_was_told(name, length):
    _, lines = data.DATASETS[name](None)
    assert len("\n".join(lines)) + 1 == 1_310_720 and {*map(len, lines)} == {length - 1}
    sizes = set()
    for line in lines[:50]:
        triples, told = [line[i : i + 3] for i in range(0, len(line.rstrip(".")), 3)], {}
        for i, (*key, digit) in enumerate(triples):
            assert told.setdefault("".join(key), digit) == digit # a key keeps its digit
            assert len(told) == i + 1 or i >= len(told) # all keys are told before any is asked
        sizes.add(len(told))
    assert sizes == {2**i for i in range(2, 9) if 6 * 2**i < length}


# --- what lies on disk ---


def test_shards_read_back_by_hand(tmp_path):
    found = made(tmp_path, VERSE * 3, val_fraction=0.25)
    cut = int(len(VERSE * 3) * 0.75)
    for file, text in (("train_000000.bin", (VERSE * 3)[:cut]), ("val_000000.bin", (VERSE * 3)[cut:])):
        path = found.folder / file
        header, ids = np.fromfile(path, "<i4", 256), np.fromfile(path, "<u2", offset=1024)
        assert header[:3].tolist() == [20240520, 1, len(text)] and not header[3:].any()
        assert path.stat().st_size == 1024 + 2 * len(text)
        assert ids.tolist() == [sorted(set(VERSE)).index(c) for c in text]
        assert found.meta["shards"][file] == {"tokens": len(text),
                                              "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert sorted(p.name for p in found.folder.iterdir()) == ["meta.json", "train_000000.bin",
                                                              "val_000000.bin"]
    assert found.meta["split"] == {"val_fraction": 0.25, "train": cut, "val": len(VERSE * 3) - cut}


@pytest.mark.deep
def test_more_than_65536_ids_are_uint32(tmp_path):
    text = "".join(map(chr, [*range(0x20, 0xD800), *range(0x10000, 0x13000)])) * 2
    found = made(tmp_path, text)
    path = found.folder / "train_000000.bin"
    header, ids = np.fromfile(path, "<i4", 256), np.fromfile(path, "<u4", offset=1024)
    assert header[:3].tolist() == [20240801, 7, len(ids)]
    assert found.vocab_size == len(set(text)) > 65536 and ids.max() == found.vocab_size - 1
    assert found.tokenizer.decode(np.concatenate([ids, whole(found.val)])) == text
    assert found.train.batch(0, 2, 8, 0)[0].dtype == torch.int64
    assert len(verify("verse", tmp_path / "data")) == 2


def test_many_shards(tmp_path, monkeypatch):
    one = made(tmp_path / "one")
    monkeypatch.setattr(data, "_SHARD", 1000)
    many = made(tmp_path / "many")
    assert [len(s) for s in many.train.shards] == [1000] * (len(one.train) // 1000) + [len(one.train) % 1000]
    assert (whole(many.train) == whole(one.train)).all() and (whole(many.val) == whole(one.val)).all()
    assert one.sha256 != many.sha256
    monkeypatch.setattr(data, "_SHARD", len(one.train)) # exactly full: no empty shard behind it
    assert [len(s) for s in made(tmp_path / "full").train.shards] == [len(one.train)]


def test_sha256_identifies_the_data(tmp_path):
    first = made(tmp_path / "a")
    assert first.sha256 == made(tmp_path / "b", name="other.txt").sha256
    others = [made(tmp_path / "c", VERSE + "!"), made(tmp_path / "d", tokenizer="ascii"),
              made(tmp_path / "e", val_fraction=0.2),
              made(tmp_path / "f", VERSE.replace("t", "s"))] # the last gives the same ids for other letters
    assert others[-1].meta["shards"] == first.meta["shards"]
    assert len({first.sha256, *(other.sha256 for other in others)}) == 5


# --- sources ---


def test_empty_and_tiny_texts(tmp_path):
    refused(lambda: made(tmp_path, ""), "verse.txt", "empty")
    refused(lambda: made(tmp_path, "\ufeff"), "empty")
    refused(lambda: made(tmp_path, "a"), "verse.txt", "0 training tokens", "longer text")
    assert os.listdir(tmp_path / "data") == []
    found = made(tmp_path, "abc", val_fraction=0.0)
    assert (len(found.train), len(found.val)) == (3, 0) and len(verify("verse", tmp_path / "data")) == 2
    refused(lambda: found.val.batch(0, 1, 8, 0),
            "val split of verse has 0 tokens, block_size is 8: raise --val_fraction")


def test_bytes_that_are_not_utf8(tmp_path):
    refused(lambda: made(tmp_path, b"caf\xe9 au lait"), "verse.txt", "0xe9", "offset 3", "iconv")
    refused(lambda: made(tmp_path, b"\xef\xbb\xbfcaf\xe9"), "offset 6") # counted in the file, mark and all


def test_byte_order_mark_goes_and_line_ends_stay(tmp_path):
    found = made(tmp_path, b"\xef\xbb\xbfone\r\ntwo\n\rthree", val_fraction=0.0)
    assert found.tokenizer.decode(whole(found.train)) == "one\r\ntwo\n\rthree"


PROSE = "He said \u201cno\u201d \u2014 caf\u00e9. " * 20


@pytest.mark.parametrize("content, way_out", [
    (gzip.compress(VERSE.encode()), "gunzip"), (b"%PDF-1.7\n" + VERSE.encode(), "pdftotext"),
    (b"PK\3\4 docx", "zip archive"), (b"\x93NUMPY\1\0", "shard_0.npy"),
    (VERSE.encode("utf-16")[:-1], "damaged: byte"), (b"\xff\xfe\0\xd8a\0" * 9, "damaged: byte"),
    (VERSE.encode("utf-32"), "is no text"),
    (VERSE.encode("utf-16-le"), "iconv -f utf-16le"), (VERSE.encode("utf-16-be"), "iconv -f utf-16be"),
    (PROSE.encode("cp1252"), "if it is windows-1252: iconv -f windows-1252 -t"),
    ("\u0416\u0446".encode("cp1251") * 9 + b"\x81", "if it is windows-1252: iconv -f windows-1252 -t"),
    ("caf\u00e9 ".encode("latin1") * 9, "iconv -f latin1"),
    (bytes(range(256)) * 9, "is no text"), (VERSE.encode() + b"\0" * 99, "is no text"),
    (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is no text"),
    (gzip.compress(bytes(range(256)) * 9).decode("latin1").encode(), "is no text"), # as iconv would make it
    ((np.arange(999, dtype="<u2") % 65).tobytes(), "is no text")], ids=range(17))
def test_what_is_no_text_is_named(content, way_out, tmp_path):
    refused(lambda: made(tmp_path, content), "verse.txt", way_out)


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
def test_utf16_with_its_mark_is_decoded(name, tmp_path, capsys, monkeypatch):
    """Pieces end inside a character, and inside a pair of surrogates."""
    text = "".join(map(wild, range(9))).replace("\0", "") + PROSE * 9
    for k, (piece, kind) in enumerate([(2**16, "utf-16-le"), (3, "utf-16-le"), (5, "utf-16-be")]):
        monkeypatch.setattr(data, "_PIECE", piece)
        content = ("\ufeff" + (json.dumps({"text": text}, ensure_ascii=False) if "json" in name else text))
        found = made(tmp_path / str(k), content.encode(kind), name, val_fraction=0.0)
        assert found.tokenizer.decode(whole(found.train)) == text
        assert capsys.readouterr().out.count("is UTF-16 and is decoded") == 1


def test_a_log_is_text(tmp_path):
    text = "\x1b[1mbold\x1b[0m\tone\fpage\r\n" * 20 + "\0"
    assert made(tmp_path, text, val_fraction=0.0).tokenizer.encode(text).shape == (len(text),)


def test_only_what_can_be_a_dataset_is_suggested(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (".tinystorys", "_tinystories", "tinystories.png", "tinystories.py"):
        write(tmp_path / name, "x")
    made(tmp_path, name="tinystory.txt")
    message = refused(lambda: prepare("tinystoris"), "nearest: ", "tinystories, ", "tinystories.py")
    assert not any(name in message for name in ("tinystorys", "_tiny", "png"))


def test_missing_source_names_its_neighbours(tmp_path):
    write(tmp_path / "hamlet.txt", VERSE)
    refused(lambda: prepare(tmp_path / "hamelt.txt", data_dir=tmp_path), "hamlet.txt")
    refused(lambda: prepare("shakespere", data_dir=tmp_path), "shakespeare")
    refused(lambda: prepare("", data_dir=tmp_path), "shakespeare")
    refused(lambda: prepare(tmp_path / "no" / "such.txt", data_dir=tmp_path), "such.txt")


def test_folder(tmp_path, capsys):
    for name, content in (("b.txt", "second "), ("a/z.md", "first "),
                          ("c.jsonl", '{"text": "third "}\n\n{"text": "fourth"}'),
                          (".git/config", "no"), ("d.bin", b"\x01\0\x02\0"), ("e.png", b"\x89PNG\xff")):
        write(tmp_path / "my texts" / name, content)
    found = load(prepare(tmp_path / "my texts", "byte", tmp_path / "data", 0.0).name, tmp_path / "data")
    assert found.name == "my_texts"
    assert found.tokenizer.decode(whole(found.train)) == "first \nsecond \nthird \nfourth"
    assert found.meta["source"]["documents"] == 4 and "d.bin, e.png" in capsys.readouterr().out
    write(tmp_path / "my texts" / "f.txt", b"caf\xe9") # meant as text, so a person must know
    assert load(prepare(tmp_path / "my texts", "byte", tmp_path / "data", 0.0)).sha256 == found.sha256
    said = capsys.readouterr().out
    assert "1 OF 4 TEXTS LEFT OUT" in said and "f.txt is not UTF-8: byte 0xe9 at offset 3" in said
    for name in ("b.txt", "a/z.md", "c.jsonl"):
        (tmp_path / "my texts" / name).unlink()
    refused(lambda: prepare(tmp_path / "my texts", data_dir=tmp_path / "data"), "f.txt", "offset 3")


def test_folder_without_text(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(lambda: prepare(tmp_path / "empty", data_dir=tmp_path), "empty", "no text files", ".txt")


def test_jsonl(tmp_path):
    found = made(tmp_path, '{"text": "a\u2028b", "id": 1}\r\n{"text": "\\ud83d\\ude00"}\n{"text": ""}\n',
                 "x.jsonl", val_fraction=0.0)
    assert found.tokenizer.decode(whole(found.train)) == "a\u2028b\n\U0001f600"
    for line, words in (("{", "not JSON"), ("[" * 10 ** 5, "not JSON"), ('{"id": 1}', "no text"),
                        ('{"text": 5}', "no text"),
                        ("[1]", "no text"), ("7", "no text")):
        refused(lambda: made(tmp_path, '{"text": "a"}\n\n' + line, "y.jsonl"), "y.jsonl", "line 3", words)


def test_documents_of_gpt2_are_kept_apart_by_its_end_of_text(mirror, tmp_path):
    found = made(tmp_path, '{"text": "one<|endoftext|>"}\n{"text": "two"}', "x.jsonl", tokenizer="gpt2",
                 val_fraction=0.0)
    ids = whole(found.train).tolist()
    assert ids.count(50256) == 1 and ids[-2] == 50256
    assert found.tokenizer.decode(ids[:-2]) == "one<|endoftext|>"
    assert found.tokenizer.decode(ids[-1:]) == "two"


def test_split_counts_characters_of_all_documents():
    stream = ["abc", None, "defgh", None, "", None, "ij", None]
    for n in range(11):
        train, val = data.split_at(iter(stream), n)
        train = [text for text in train if text] # read before val, as the two share a stream
        assert "".join(train) == "abcdefghij"[:n]
        assert "".join(text for text in val if text) == "abcdefghij"[n:]
    train, val = data.split_at(iter(stream), 5)
    assert [*train] == ["abc", None, "de"] and [*val] == ["fgh", None, "", None, "ij", None]
    asked = iter(stream) # a piece that ends at the cut is the last that train asks for
    assert [*data.split_at(asked, 3)[0]] == ["abc"] and next(asked) is None


@pytest.mark.parametrize("value", [-0.1, 1.0, 90, float("nan")])
def test_val_fraction_out_of_range(value, tmp_path):
    refused(lambda: made(tmp_path, val_fraction=value), "val_fraction", "0.1")


def test_names_cannot_lead_elsewhere(tmp_path):
    for stem in ("..", "../up", "a/b", "a\\b", "C:x", "", " ", "-x", ".hidden", "a\0b", "x" * 300, "a\nb"):
        name = data.dataset_name(stem)
        assert (tmp_path / name).resolve().parent == tmp_path and name[0] not in "-." and len(name) <= 100
        assert name == data.dataset_name(name)
        if stem != name:
            refused(lambda: load(stem, tmp_path))
    assert data.dataset_name("Война и мир") == "Война_и_мир"


def test_ascii_says_what_it_loses(tmp_path, capsys):
    made(tmp_path, VERSE + "\u00e9", tokenizer="ascii")
    assert repr("\u00e9") in capsys.readouterr().out


def test_tokenizer_of_another_dataset(tmp_path):
    first = made(tmp_path, VERSE)
    second = made(tmp_path, VERSE[:50], "second.txt", tokenizer=str(first.folder / "meta.json"))
    assert second.tokenizer.to_dict() == first.tokenizer.to_dict() and second.vocab_size == first.vocab_size
    refused(lambda: made(tmp_path, "\u00e9\u00e8", "third.txt", tokenizer=str(first.folder / "meta.json")),
            repr("\u00e8"), repr("\u00e9"))


# --- prepare again, interrupted, on a bad disk ---


def test_prepare_again_does_nothing(tmp_path, capsys):
    first = made(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in first.folder.iterdir()}
    capsys.readouterr()
    made(tmp_path)
    assert "nothing to do" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in first.folder.iterdir()}


@pytest.mark.parametrize("change", ["text", "tokenizer", "val_fraction", "damage"])
def test_prepare_again_when_something_changed(change, tmp_path, capsys):
    first = made(tmp_path)
    if change == "damage":
        content = bytearray((first.folder / "val_000000.bin").read_bytes())
        content[1500] ^= 1
        write(first.folder / "val_000000.bin", bytes(content))
    capsys.readouterr()
    other = {"tokenizer": {"tokenizer": "byte"}, "val_fraction": {"val_fraction": 0.2}}.get(change, {})
    again = made(tmp_path, VERSE + "be" * (change == "text"), **other)
    assert "is replaced" in capsys.readouterr().out and os.listdir(tmp_path / "data") == ["verse"]
    assert len(verify("verse", tmp_path / "data")) == 2
    assert (again.sha256 == first.sha256) == (change == "damage")


def test_documents_cut_elsewhere_are_another_text(tmp_path, capsys):
    made(tmp_path, '{"text": "ab"}\n{"text": "c"}', "x.jsonl")
    made(tmp_path, '{"text": "a"}\n{"text": "bc"}', "x.jsonl")
    assert "is replaced" in capsys.readouterr().out


def test_prepare_does_not_delete_what_it_did_not_write(tmp_path):
    """nanoGPT's habit is to keep the text in the very folder that would be replaced."""
    source = write(tmp_path / "mine" / "input.txt", VERSE)
    refused(lambda: prepare(tmp_path / "mine", data_dir=tmp_path), "input.txt", "--data_dir")
    refused(lambda: prepare(write(tmp_path / "up" / "verse.txt", VERSE),
                            data_dir=write(tmp_path / "f" / "verse", "").parent), "verse")
    assert source.read_text(encoding="utf-8") == VERSE and os.listdir(tmp_path / "mine") == ["input.txt"]


def test_two_sources_never_share_a_name_in_silence(tmp_path, monkeypatch):
    first, path = made(tmp_path / "a", name="play.txt"), write(tmp_path / "b/play.txt", VERSE[::-1])
    def again(path, **kwargs):
        return load(prepare(path, data_dir=tmp_path / "a/data", **kwargs).name, tmp_path / "a/data")
    lines = write(tmp_path / "c/play.jsonl", json.dumps({"text": VERSE[::-1]}))
    folder, rows = write(tmp_path / "play/x.txt", "ab").parent, shards(tmp_path / "d/play", numbered(20, 9))
    for other in (path, lines, folder, rows):
        refused(lambda: again(other), "prepared from", tmp_path / "a/play.txt", other, "another --name")
    assert again(tmp_path / "a/play.txt").sha256 == first.sha256
    monkeypatch.chdir(tmp_path / "a")
    write(tmp_path / "a/play.txt", VERSE + "edited")
    assert again("play.txt", tokenizer="byte").vocab_size == 256 # the same path, typed in another way
    write(path, VERSE + "edited")
    assert again(path).vocab_size < 256 # the same text, moved
    write(tmp_path / "a/data/play/val_000000.bin", "damaged")
    refused(lambda: again(lines), "was prepared from")
    write(tmp_path / "a/data/play/meta.json", "damaged")
    assert again(lines).meta["source"]["from"] == str(lines)


@pytest.mark.parametrize("name", ["shakespeare.txt", "pystdlib/x.txt", "recall/shard_0.npy"])
def test_a_known_name_is_not_taken(name, tmp_path):
    path = write(tmp_path / name, VERSE)
    source = path if path.suffix == ".txt" and name.count("/") == 0 else path.parent
    refused(lambda: prepare(source, data_dir=tmp_path / "data"),
            source, "known dataset", f"--name=my_{source.stem}")
    assert not (tmp_path / "data").exists()


def at_once(call, count=4):
    """The exit codes of processes that run call at the same moment."""
    fork = multiprocessing.get_context("fork") # Python and torch are there already
    barrier = fork.Barrier(count)
    processes = [fork.Process(target=lambda: (barrier.wait(), call())) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


@posix
def test_prepare_at_the_same_moment(tmp_path, monkeypatch):
    """Fetching, preparing and replacing: all succeed, and what they leave is whole."""
    monkeypatch.setenv("DATA_MIRROR", str(write(tmp_path / "mirror/file.txt", VERSE * 300).parent))
    sha256 = hashlib.sha256((VERSE * 300).encode()).hexdigest()
    for round in range(3):
        target = tmp_path / f"data/{round}"
        write(target / ".file.lock", "") # as a killed run leaves it
        fetch = lambda: data.fetch("", "file.txt", sha256, target)
        assert at_once(lambda: prepare(fetch(), "char", target)) == [0] * 4
        assert at_once(lambda: prepare(fetch(), random.choice(["byte", "char"]), target)) == [0] * 4
        assert sorted(os.listdir(target)) == ["file", "file.txt"] and len(verify("file", target)) == 2


@posix
def test_one_at_a_time(tmp_path):
    """Also between a thread that waits for a lock whose file is gone and one that makes a new file."""
    inside, together = [], []
    def call():
        for _ in range(40):
            with data.alone(tmp_path / "it"):
                inside.append(1)
                time.sleep(0.0005)
                together.append(len(inside))
                inside.pop()
    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == [1] * 160 and os.listdir(tmp_path) == []


@pytest.mark.parametrize("moment", range(5)) # two shards, each with a record of progress, and meta.json
@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError])
def test_interrupted_prepare_leaves_what_was_there(kind, moment, tmp_path, monkeypatch):
    calls, real = [], data.write_synced
    def fails(path, pieces, *more):
        calls.append(path)
        if len(calls) == moment + 1:
            write(path, b"".join(pieces)[:100])
            raise kind(errno.ENOSPC, "No space left on device")
        return real(path, pieces, *more)
    monkeypatch.setattr(data, "write_synced", fails)
    with pytest.raises(KeyboardInterrupt if kind is KeyboardInterrupt else UserError) as caught:
        made(tmp_path)
    left = os.listdir(tmp_path / "data")
    assert len(calls) == moment + 1 and data.prepared(tmp_path / "data") == [] and len(left) == (moment > 1)
    said = str(caught.value)
    assert kind is KeyboardInterrupt or "No space left" in said and "--data_dir" in said
    monkeypatch.setattr(data, "write_synced", real)
    before = made(tmp_path).sha256
    calls.clear()
    monkeypatch.setattr(data, "write_synced", fails)
    with pytest.raises((KeyboardInterrupt, UserError)):
        made(tmp_path, VERSE + "more")
    assert data.prepared(tmp_path / "data") == ["verse"] and load("verse", tmp_path / "data").sha256 == before


def test_failing_rename_brings_the_old_dataset_back(tmp_path, monkeypatch):
    before, real = made(tmp_path).sha256, os.rename
    def fails(a, b):
        if str(a).endswith(".new"):
            raise OSError(errno.EIO, "Input/output error")
        real(a, b)
    monkeypatch.setattr(os, "rename", fails)
    refused(lambda: made(tmp_path, VERSE + "more"), "Input/output error")
    assert data.prepared(tmp_path / "data") == ["verse"] and load("verse", tmp_path / "data").sha256 == before


def test_killed_prepare_is_invisible_and_cleared_later(tmp_path):
    left = write(tmp_path / "data" / ".verse.123.new" / "train_000000.bin", b"half").parent
    assert data.prepared(tmp_path / "data") == []
    made(tmp_path)
    assert left.exists() # it might belong to a process that is still at work
    for folder in (left, left.with_suffix(".old"), tmp_path / "data/.verse.two.123.new"):
        write(folder / "val_000000.bin", b"half")
        os.utime(folder, (0, 0))
    made(tmp_path, VERSE + "more")
    assert sorted(os.listdir(tmp_path / "data")) == [".verse.two.123.new", "verse"] # another dataset's stays


def test_data_dir_that_cannot_be_written(tmp_path):
    blocked = write(tmp_path / "file", "")
    refused(lambda: prepare(write(tmp_path / "verse.txt", VERSE), data_dir=blocked / "data"), "cannot write",
            "--data_dir")


# --- token shards and tokenizers of other programs ---


def shards(folder, *arrays):
    folder.mkdir(parents=True, exist_ok=True)
    for i, rows in enumerate(arrays):
        np.save(folder / f"shard_{i}.npy", rows)
    return folder


def numbered(rows, length, kind="<u2", first=0):
    """Every id tells its row and its place in it."""
    return (first + np.arange(rows * length).reshape(rows, length)).astype(kind)


@pytest.mark.parametrize("kinds", [("uint16", "int32", "int64"), (">u2", ">i4", "uint64")])
def test_npy_shards(kinds, tmp_path):
    """Odd lengths, several types, one array laid out by columns: the rows come back, the last ones as
    validation.
    """
    arrays = [numbered(7, 33, kinds[0]), np.asfortranarray(numbered(5, 17, kinds[1], 1000)),
              numbered(8, 9, kinds[2], 2000)]
    found = load(prepare(shards(tmp_path / "rows", *arrays), data_dir=tmp_path / "data",
                         val_fraction=0.2).name, tmp_path / "data")
    assert whole(found.train).tolist() == [i for a in (arrays[0], arrays[1], arrays[2][:4])
                                           for i in a.reshape(-1).tolist()]
    assert whole(found.val).tolist() == arrays[2][4:].reshape(-1).tolist() # int(20 rows * 0.8) = 16
    assert found.vocab_size == 2072 and found.tokenizer is None and found.meta["source"]["documents"] == 20
    assert found.train.rows.tolist() == [33, 17, 9] and len(verify("rows", tmp_path / "data")) == 4


def test_no_window_joins_two_rows():
    """Every legal start is drawn equally often, none reaches into another row; every target comes once."""
    lengths, T = (5, 3, 7), 3
    flat = [numbered(4, n, first=100 * k) for k, n in enumerate(lengths)]
    split = Tokens([a.reshape(-1) for a in flat], 1000, "train split of it", lengths)
    legal = {tuple(row[i:i + T + 1]) for a in flat for row in a.tolist() for i in range(len(row) - T)}
    draws = 300 * len(legal)
    x, y = split.batch(0, draws, T, 1)
    drawn = [(*a, b[-1]) for a, b in zip(x.tolist(), y.tolist())]
    assert set(drawn) == legal and (x[:, 1:] == y[:, :-1]).all() # 4 * (2 + 0 + 4) starts
    counts = np.array([drawn.count(start) for start in legal])
    # chi-square: mean and 5 standard deviations
    assert ((counts - 300) ** 2 / 300).sum() < len(legal) + 5 * (2 * len(legal)) ** 0.5
    for batch_size in (1, 3, 100):
        pairs = [pair for x, y in split.windows(T, batch_size)
                 for pair in zip(x.reshape(-1).tolist(), y.reshape(-1).tolist())]
        assert all(len(x) <= batch_size and x.shape[1] <= T for x, _ in split.windows(T, batch_size))
        assert sorted(pairs) == sorted((row[i], row[i + 1]) for a in flat for row in a.tolist()
                                       for i in range(len(row) - 1))
    refused(lambda: split.batch(0, 1, 7, 0), "rows of 7 tokens", "--block_size to 6")


def test_npy_in_the_order_of_their_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_SHARD", 20) # a shard holds whole rows: two of 9
    source = shards(tmp_path / "rows", *(numbered(3, 9, first=100 * k) for k in range(11)))
    found = load(prepare(source, data_dir=tmp_path / "data", val_fraction=0.0).name, tmp_path / "data")
    assert whole(found.train)[::27].tolist() == [100 * k for k in range(11)] # shard_10 after shard_9
    assert [len(shard) for shard in found.train.shards] == [18, 9] * 11
    assert set(found.train.rows.tolist()) == {9}
    refused(lambda: prepare(shards(tmp_path / "one", numbered(1, 9)), data_dir=tmp_path / "data"), "1 row",
            "--val_fraction=0")


def test_npy_prepared_again(tmp_path, capsys):
    source = shards(tmp_path / "rows", numbered(20, 9))
    prepare(source, data_dir=tmp_path / "data")
    assert "no tokenizer" in capsys.readouterr().out
    prepare(source, data_dir=tmp_path / "data")
    assert "nothing to do" in capsys.readouterr().out
    shards(source, numbered(20, 9, first=1))
    prepare(source, data_dir=tmp_path / "data")
    assert "is replaced" in capsys.readouterr().out
    assert load("rows", tmp_path / "data").train.shards[0][0] == 1


BAD_NPY = {"floats": np.ones((4, 4)), "a stream": np.arange(9), "three dimensions": np.ones((2, 2, 2), int),
           "no row": np.ones((0, 4), int),
           "rows of one": np.ones((4, 1), int), "truth values": np.ones((4, 4), bool),
           "negative": np.array([[1, -100], [2, 3]]),
           "beyond": np.array([[1, 256], [2, 3]])}


@pytest.mark.parametrize("name", BAD_NPY)
def test_npy_that_holds_no_ids(name, tmp_path):
    source = shards(tmp_path / "rows", numbered(20, 9), BAD_NPY[name])
    what = {"negative": "id -100", "beyond": "vocab_size=256"}.get(name, "expected rows of ids")
    refused(lambda: prepare(source, "byte", tmp_path / "data"), "shard_1.npy", what)
    assert not (tmp_path / "data/rows").exists()


def test_damaged_npy(tmp_path):
    """Every cut, every flipped bit of the header and every pickle is a sentence, or the flip was harmless;
    nothing in a pickle runs.
    """
    source = shards(tmp_path / "rows", numbered(20, 9), numbered(20, 9))
    path, good = source / "shard_1.npy", (source / "shard_1.npy").read_bytes()
    for end in [0, 1, 6, 8, 10, 50, 127, 128, 129, len(good) - 1]:
        path.write_bytes(good[:end])
        refused(lambda: prepare(source, data_dir=tmp_path / "data"), "shard_1.npy", "damaged")
    outcomes = []
    for at, bit in [(at, 1 << (at * 5 + k) % 8) for at in range(128) for k in range(2)]:
        path.write_bytes(good[:at] + bytes([good[at] ^ bit]) + good[at + 1:])
        try:
            outcomes.append(data.open_npy(path).shape)
        except UserError as error:
            outcomes.append("refused")
            assert "shard_1.npy" in str(error) and len(str(error).splitlines()) <= 3
    assert outcomes.count("refused") > 100
    trap = [Trap(tmp_path)]
    for content in (pickle.dumps(trap), b"PK\3\4" + good):
        path.write_bytes(content)
        refused(lambda: prepare(source, data_dir=tmp_path / "data"), "shard_1.npy", "damaged")
    np.save(path, np.array(trap, dtype=object), allow_pickle=True)
    refused(lambda: prepare(source, data_dir=tmp_path / "data"), "shard_1.npy", "damaged")
    np.savez(source / "other.npz", a=good)
    shutil.move(source / "other.npz", path)
    refused(lambda: prepare(source, data_dir=tmp_path / "data"), "shard_1.npy", "damaged")
    assert not (tmp_path / "marker").exists() and not (tmp_path / "data/rows").exists()


class Trap:
    """A pickle of it would leave a file behind."""
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return Path.touch, (self.folder / "marker",)


def hf(tmp_path, kind="BPE", **kwargs):
    """A tokenizer of the package, trained here on VERSE, as FILE.json; BPE is byte-level, the others split at
    spaces.
    """
    package = pytest.importorskip("tokenizers")
    codec = package.Tokenizer(getattr(package.models, kind)(**kwargs))
    byte_level = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    codec.pre_tokenizer = byte_level if kind == "BPE" else package.pre_tokenizers.Whitespace()
    codec.decoder = package.decoders.ByteLevel() if kind == "BPE" else package.decoders.WordPiece(prefix="")
    more = {"initial_alphabet": byte_level.alphabet()} if kind == "BPE" else {}
    trainer = getattr(package.trainers, f"{kind.replace('BPE', 'Bpe')}Trainer")(
        special_tokens=["<|endoftext|>", "<|pad|>", "<|unk|>"], vocab_size=320, show_progress=False, **more)
    codec.train_from_iterator([VERSE], trainer)
    codec.save(str(tmp_path / f"{kind}.json"))
    return codec, str(tmp_path / f"{kind}.json")


def test_hugging_face_tokenizer(tmp_path):
    """As the package encodes and decodes, byte for byte, special tokens of the text apart: those are text
    here. JSON carries all of it.
    """
    codec, path = hf(tmp_path)
    ours = make_tokenizer(path, "")
    n = codec.get_vocab_size()
    assert ours.vocab_size == n > 259 # 256 bytes, 3 special tokens, and merges
    ours = tokenizer_from_dict(json.loads(json.dumps(ours.to_dict())))
    for text in NASTY:
        ids = ours.encode(text)
        assert ours.decode(ids) == text and ids.dtype == "<u2" and not ours.unknown(text)
        assert 0 not in ids and ("<|" in text or ids.tolist() == codec.encode(text).ids)
    assert ours.eot == 0 and ours.decode([0, 5]) == codec.decode([0, 5], skip_special_tokens=False)
    assert ours.readable([n]) == "\ufffd"
    assert ours.count_bytes([0, *ours.encode(VERSE), 0]) == len(VERSE) + 2 # a separator is a byte
    assert ours.decode(ours.encode("a\ud800b")) == "a\ufffdb"
    refused(lambda: ours.decode([n]), n)


@pytest.mark.parametrize("name", ["byte", "gpt2", "FILE.json"])
def test_bytes_are_counted_where_ids_end_inside_a_character(name, tmp_path, request):
    if name == "gpt2":
        request.getfixturevalue("mirror")
    codec = make_tokenizer(hf(tmp_path)[1] if name == "FILE.json" else name, "", tmp_path)
    for text in NASTY:
        ids = codec.encode(text)
        assert sum(codec.count_bytes(ids[i:i + 1]) for i in range(len(ids))) == len(text.encode())


def test_hugging_face_cuts_and_pads_nothing(tmp_path):
    """What the file says of batches, truncation, padding, a first token, has no place in training data."""
    codec, path = hf(tmp_path)
    plain = codec.encode(VERSE).ids
    codec.enable_truncation(8)
    codec.enable_padding(length=16)
    processors = pytest.importorskip("tokenizers").processors
    codec.post_processor = processors.TemplateProcessing("<|pad|> $A", special_tokens=[("<|pad|>", 1)])
    codec.save(path)
    assert make_tokenizer(path, "").encode(VERSE).tolist() == plain != codec.encode(VERSE).ids


def test_hugging_face_words_that_are_unknown(tmp_path):
    codec, path = hf(tmp_path, "WordLevel", unk_token="<|unk|>")
    ours = make_tokenizer(path, "")
    assert ours.unk == 2 and ours.unknown("7,\u00e9\n?") == ["\u00e9"] # "\n" becomes nothing, as every space
    _, path = hf(tmp_path, "Unigram")
    assert make_tokenizer(path, "").unknown("line:\n") == []


def test_hugging_face_ids_with_holes(tmp_path):
    """The vocabulary ends with the highest id: an added token may lie beyond the count."""
    _, path = hf(tmp_path)
    saved = json.loads(Path(path).read_text(encoding="utf-8"))
    saved["added_tokens"].append({**saved["added_tokens"][0], "content": "<|far|>", "id": 70_000})
    Path(path).write_text(json.dumps(saved), encoding="utf-8")
    ours = make_tokenizer(path, "")
    assert ours.vocab_size == 70_001 and ours.encode("line").dtype == "<u4"


@pytest.mark.parametrize("content", [
    '{"model": {}}', '{"model": {"vocab": {}}}', '{"model": {"vocab": [1]}}', '{"model": 3}',
    '{"model": {"vocab": {"a": "b"}}}', '{"model": {"vocab": {"a": 0}}, "added_tokens": [1]}',
    '{"tokenizer": {"name": "hf"}}'])
def test_no_hugging_face_tokenizer_in_it(content, tmp_path):
    write(tmp_path / "t.json", content)
    refused(lambda: make_tokenizer(str(tmp_path / "t.json"), ""), "t.json", "not a saved tokenizer")


def test_hugging_face_package_missing_or_too_old(tmp_path, monkeypatch):
    """Shards are loaded and cut without it; text says what to install, or that the package cannot read the
    file.
    """
    codec, path = hf(tmp_path)
    found = made(tmp_path, VERSE, tokenizer=path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    again = load("verse", tmp_path / "data")
    assert again.vocab_size == found.vocab_size == codec.get_vocab_size()
    assert again.train.batch(0, 2, 8, 0)[0].shape == (2, 8)
    refused(lambda: again.tokenizer.encode("a"), "pip install tokenizers")
    monkeypatch.undo()
    write(tmp_path / "t.json", '{"model": {"type": "New", "vocab": {"a": 0}}}')
    refused(lambda: make_tokenizer(str(tmp_path / "t.json"), "").encode("a"), "cannot read")


def trained(texts, vocab_size):
    """The package's own byte-level pairs, from whole documents."""
    package = pytest.importorskip("tokenizers")
    codec = package.Tokenizer(package.models.BPE())
    codec.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    codec.train_from_iterator(texts, package.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], show_progress=False, min_frequency=2,
        initial_alphabet=package.pre_tokenizers.ByteLevel.alphabet()))
    return json.loads(codec.to_str())["model"]


def test_a_tokenizer_is_trained_on_the_training_part(tmp_path, monkeypatch, command, capsys):
    """As the package trains it, whatever the pieces; prepare takes it; any text comes back."""
    monkeypatch.setattr(data, "_PIECE", 100)
    documents = [VERSE, "", *NASTY, VERSE.upper(), "the validation part " * 60]
    write(tmp_path / "x.jsonl", "\n".join(json.dumps({"body": text}) for text in documents))
    write(tmp_path / "verse.txt.gz", gzip.compress(VERSE.encode()))
    whole_text, share = "".join(documents), 1200 / len("".join(documents))
    command(f"tokenizer x.jsonl --vocab_size=500 --field=body --val_fraction={share} --name=mine")
    said = capsys.readouterr().out
    assert said.startswith("data/mine-500.json: 500 ids. ")
    ours = make_tokenizer("data/mine-500.json", "")
    assert json.loads(ours.text)["model"] == trained(documents[:-1], 500) != trained(documents, 500)
    assert (ours.vocab_size, ours.eot) == (500, 0)
    for text in [*NASTY, whole_text]:
        ids = ours.encode(text)
        assert ours.decode(ids) == text and 0 not in ids and ours.unknown(text) == []
    command(said.splitlines()[1].split("data.py ")[1]) # the command that it prints
    found = load("x")
    assert found.tokenizer.to_dict() == ours.to_dict()
    assert whole(found.train).tolist().count(0) == len([text for text in documents if text]) - 2
    command("tokenizer verse.txt.gz --vocab_size=300 --max_tokens=200")
    theirs = trained([VERSE[:800]], 300) # a token counts as four characters
    assert json.loads(make_tokenizer("data/verse-300.json", "").text)["model"] == theirs


def test_a_tokenizer_that_is_not_trained(tmp_path, monkeypatch, command):
    for size in (0, 256):
        refused(lambda: command(f"tokenizer verse.txt --vocab_size={size}"), size, "at least 257")
    write(tmp_path / "verse.txt", VERSE), write(tmp_path / "bad.jsonl", '{"text": "a"}\n' * 9 + "{")
    write(tmp_path / "data/verse-300.json", "mine")
    refused(lambda: command("tokenizer verse.txt --vocab_size=300"), "verse-300.json is there", "--name")
    assert (tmp_path / "data/verse-300.json").read_text() == "mine"
    refused(lambda: command("tokenizer bad.jsonl"), "line 10 is not JSON")
    refused(lambda: command("tokenizer fineweb"), "not text")
    refused(lambda: command("tokenizer nowhere.txt"), "no text file")
    refused(lambda: command("tokenizer verse.txt --val_fraction=1.0"), "val_fraction=1.0")
    refused(lambda: command("tokenizer verse.txt --val_fraction=0.9999"), "no training text")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    refused(lambda: command("tokenizer verse.txt"), "pip install tokenizers")
    assert sorted(os.listdir(tmp_path / "data")) == ["verse-300.json"]


def test_documents_of_hugging_face_are_kept_apart_by_its_end_of_text(tmp_path):
    codec, path = hf(tmp_path)
    lines = "\n".join(json.dumps({"text": text}) for text in ("line 1 <|endoftext|>", "line 2"))
    ids = whole(made(tmp_path, lines, "two.jsonl", tokenizer=path, val_fraction=0.0).train).tolist()
    assert ids.count(0) == 1 and ids[ids.index(0) + 1:] == codec.encode("line 2").ids


def test_rows_for_validation_are_not_taken_for_training(tmp_path):
    source = shards(tmp_path / "rows", numbered(20, 9))
    shutil.copy(source / "shard_0.npy", source / "shard_val_0.npy")
    refused(lambda: prepare(source, data_dir=tmp_path / "data"), "not shard_val_0.npy", "rename it")


# --- a prepared folder is a dataset, not text ---


def test_a_prepared_folder_by_its_path(tmp_path, monkeypatch, command, capsys):
    first = made(tmp_path)
    before = {path: path.read_bytes() for path in first.folder.iterdir()}
    for path in ("data/verse", "data/verse/", "./data/verse", str(first.folder), "data/../data/verse"):
        for data_dir in ("data", "elsewhere"):
            found = load(path, data_dir)
            assert (found.name, found.sha256, found.folder.resolve()) == ("verse", first.sha256, first.folder)
        assert load(path).folder == Path("data/verse") # as by its name
        refused(lambda: prepare(path), path, "is a prepared dataset", "--dataset=")
    command("verify data/verse/ --data_dir=elsewhere")
    assert capsys.readouterr().out.count("OK ") == 2
    for line in ("prepare verse", "tokenizer verse", "tokenizer data/verse"):
        refused(lambda: command(line), line.split()[1], "is a prepared dataset")
    for file in before:
        refused(lambda: prepare(file), file, "name its folder")
    monkeypatch.chdir(first.folder)
    assert load(".").sha256 == load("../verse").sha256 == first.sha256
    refused(lambda: prepare("."), "is a prepared dataset")
    assert before == {path: path.read_bytes() for path in first.folder.iterdir()}
    assert os.listdir(tmp_path / "data") == ["verse"]


def test_nanogpts_folder_by_its_path(tmp_path):
    folder = write(tmp_path / "data/my chars/train.bin", np.arange(99, dtype="<u2").tobytes()).parent
    write(folder / "input.txt", VERSE)
    assert load(str(folder)).name == "my chars" and len(load("my chars", tmp_path / "data").train) == 99
    refused(lambda: prepare(folder), "is a prepared dataset")


def test_a_bare_name_is_prepared_where_it_belongs(tmp_path, monkeypatch, capsys):
    """The folder of that name in the working directory, a dataset too, is not what was asked for."""
    made(tmp_path)
    monkeypatch.chdir(tmp_path / "data")
    prepare("../verse.txt")
    assert "nothing to do" not in capsys.readouterr().out and load("verse").folder == Path("data/verse")


def test_shards_and_meta_json_are_never_text(tmp_path, capsys):
    folder = made(tmp_path).folder
    for name in ("train_000000.bin", "meta.json"):
        target = write(tmp_path / "texts/deep" / name, (folder / name).read_bytes())
    write(tmp_path / "texts/deep/tokens.txt.bin", (folder / "train_000000.bin").read_bytes())
    write(tmp_path / "texts/deep/train.bin", b"looks like text")
    shutil.copy(shards(tmp_path / "rows", numbered(2, 9)) / "shard_0.npy", tmp_path / "texts/shard_0.npy.bak")
    write(tmp_path / "texts/meta.json", '{"title": "a file of the person\'s own"}')
    write(tmp_path / "texts/a.txt", VERSE)
    found = load(prepare(tmp_path / "texts", "byte", tmp_path / "data", 0.0).name, tmp_path / "data")
    assert found.tokenizer.decode(whole(found.train)) == VERSE + '\n{"title": "a file of the person\'s own"}'
    said = capsys.readouterr().out
    parts = ("train_000000.bin", "meta.json", "tokens.txt.bin", "train.bin", "shard_0.npy.bak")
    assert all(name in said for name in parts)
    refused(lambda: prepare(target), "part of a dataset")
    refused(lambda: prepare(tmp_path / "texts/deep/tokens.txt.bin"), "a shard of tokens")


@pytest.mark.parametrize("kind", ["rows", "dataset", "nanogpt"])
def test_data_dir_that_is_a_dataset(kind, tmp_path):
    folder = shards(tmp_path / "it", numbered(20, 9)) if kind == "rows" else made(tmp_path).folder
    if kind == "nanogpt":
        folder = write(tmp_path / "it/train.bin", np.arange(99, dtype="<u2").tobytes()).parent
    before = sorted(os.listdir(folder))
    message = refused(lambda: prepare("recall", data_dir=folder), f"did you mean --dataset={folder}?")
    assert len(message.splitlines()) == 1
    assert sorted(os.listdir(folder)) == before


def test_settings_that_the_data_does_not_have(tmp_path):
    """The advice fits where the setting came from: a config file's cannot be dropped."""
    found = made(tmp_path)
    asked = {"tokenizer": "byte", "val_fraction": 0.1, "seed": 5}
    found.check({**asked, "tokenizer": "char"}, set())
    found.check({"tokenizer": ""}, set())
    found.check({"tokenizer": str(found.folder / "meta.json")}, set())
    again = f"python data.py prepare {tmp_path}/verse.txt --tokenizer=byte --data_dir={tmp_path}/data"
    refused(lambda: found.check(asked, {"tokenizer"}), f"not --tokenizer=byte\ndrop that, or run: {again}")
    message = refused(lambda: found.check(asked, {"seed"}),
                      f"add --tokenizer=char, or prepare it apart: {again}2\n")
    assert "drop" not in message and message.endswith(f"add --data_dir={tmp_path}/data2")
    refused(lambda: found.check({"val_fraction": 0.5}, set()), "add --val_fraction=0.1")
    refused(lambda: found.check(asked, {"tokenizer"}, resuming=True), "drop that, or train anew in another")


# --- load: what must be refused ---


def test_load_of_nothing_says_how_to_make_it(tmp_path):
    made(tmp_path)
    refused(lambda: load("nope", tmp_path / "data"), "'nope'", "verse", "prepare")
    refused(lambda: load("shakespeare", tmp_path / "data"), "python data.py prepare shakespeare")
    refused(lambda: load("verse", tmp_path / "nowhere"), "none")
    (tmp_path / "data" / "bare").mkdir()
    refused(lambda: load("bare", tmp_path / "data"), "neither meta.json nor train.bin")


@pytest.mark.parametrize("file", ["train_000000.bin", "val_000000.bin"])
def test_load_names_file_expected_and_actual(file, tmp_path):
    path = made(tmp_path).folder / file
    good = path.read_bytes()
    n = (len(good) - 1024) // 2
    for bad, words in ((b"\1" + good[1:], (20240520,)),
                       (good[:4] + b"\2" + good[5:], ("20240520, 2", "20240520, 1")),
                       (good[:-1], (len(good) - 1, len(good))), (good + b"\0\0", (len(good) + 2, len(good))),
                       (good[:500], (500, len(good))), (good[:8] + b"\1\0\0\0" + good[12:], (1, n)),
                       (good[:8] + b"\xff" * 4 + good[12:], (-1, n)),
                       (b"", ("starts with 0, 0",)), (None, ("missing", n))):
        path.unlink() if bad is None else write(path, bad)
        refused(lambda: load("verse", tmp_path / "data"), file, "prepare", *words)


def test_meta_json_that_cannot_be_trusted(tmp_path):
    path = made(tmp_path).folder / "meta.json"
    good = json.loads(path.read_text(encoding="utf-8"))
    def resigned(**changes):
        meta = {key: value for key, value in {**good, **changes}.items() if key != "sha256"}
        return json.dumps({**meta, "sha256": data.hash_of_json(meta)})
    for bad, words in (("", "read"), ("[]", "read"), ("[" * 10 ** 5, "read"), (b"\xff", "read"),
                       ("{}", "format None"),
                       (resigned(format=2), "format 2"), (json.dumps({**good, "vocab_size": 3}), "sha256"),
                       (resigned(shards={"../x.bin": {"tokens": 1, "sha256": ""}}), "../x.bin")):
        write(path, bad)
        refused(lambda: load("verse", tmp_path / "data"), "meta.json", words)
    write(path, resigned(vocab_size=3)) # a vocabulary that is too small: only the ids themselves can tell
    refused(lambda: verify("verse", tmp_path / "data"), "train_000000.bin", "vocab_size=3")
    refused(lambda: load("verse", tmp_path / "data").train.batch(0, 8, 32, 0), "train split of verse",
            "vocab_size=3")
    refused(lambda: list(load("verse", tmp_path / "data").val.windows(32, 8)), "val split of verse",
            "vocab_size=3")


@pytest.mark.parametrize("tries", [45, pytest.param(240, marks=pytest.mark.deep)])
def test_verify_sees_every_flipped_byte_and_every_cut(tries, tmp_path):
    folder, rng = made(tmp_path).folder, random.Random(0)
    assert [line[:2] for line in verify("verse", tmp_path / "data")] == ["OK", "OK"]
    for i in range(tries):
        path = folder / ("train_000000.bin", "val_000000.bin", "meta.json")[i % 3]
        good = path.read_bytes()
        at = rng.randrange(len(good))
        flipped = bytes([good[at] ^ rng.randrange(1, 256)])
        bad = good[:at] if i % 5 == 0 else good[:at] + flipped + good[at + 1:]
        write(path, bad)
        try:
            # white space, for instance
            same = path.name == "meta.json" and json.loads(bad) == json.loads(good)
        except ValueError:
            same = False
        if same:
            verify("verse", tmp_path / "data")
        else:
            refused(lambda: verify("verse", tmp_path / "data"), path.name)
        write(path, good)
    assert len(verify("verse", tmp_path / "data")) == 2


# --- shards of other programs ---


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_nanogpt_characters(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ids = np.arange(3000, dtype=np.uint16) % 65
    write(tmp_path / "old" / "train.bin", ids[:2700].tobytes())
    write(tmp_path / "old" / "val.bin", ids[2700:].tobytes())
    write(tmp_path / "old" / "meta.pkl", pickle.dumps(Bomb()))
    found = load("old", tmp_path)
    assert found.vocab_size == 65 and found.tokenizer is None
    assert (whole(found.train) == ids[:2700]).all() and (whole(found.val) == ids[2700:]).all()
    said = capsys.readouterr().out
    assert "vocab_size=65" in said and "meta.pkl is a pickle" in said and "prepare" in said
    assert not (tmp_path / "exploded").exists()
    assert len(verify("old", tmp_path)) == 2 and data.prepared(tmp_path) == ["old"]
    before = found.sha256
    write(tmp_path / "old" / "val.bin", ids[2701:].tobytes())
    assert load("old", tmp_path).sha256 != before == found.sha256


def test_nanogpt_bpe_and_llm_c(tmp_path, capsys):
    ids = np.array([5, 300, 7, 50256] * 50, np.uint16)
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(ids)
    for name, content in (("nano/train.bin", ids.tobytes()), ("nano/val.bin", ids[:10].tobytes()),
                          ("llmc/fineweb_train_000001.bin", header.tobytes() + ids.tobytes()),
                          ("llmc/fineweb_val_000000.bin", header.tobytes() + ids.tobytes())):
        write(tmp_path / name, content)
    for name in ("nano", "llmc"):
        found = load(name, tmp_path)
        assert found.vocab_size == 50257 and found.tokenizer.name == "gpt2"
        assert "gpt2" in capsys.readouterr().out
        assert (whole(found.train) == ids).all() and found.val.shards[0][1] == 300
    write(tmp_path / "llmc" / "fineweb_val_000000.bin", header.tobytes() + ids.tobytes()[2:])
    refused(lambda: load("llmc", tmp_path), "fineweb_val_000000.bin", 1024 + 2 * len(ids),
            1022 + 2 * len(ids))
    header[2] = -1
    write(tmp_path / "llmc" / "fineweb_val_000000.bin", header.tobytes()[:1022]) # 1024 + 2 * -1
    refused(lambda: load("llmc", tmp_path), "fineweb_val_000000.bin", "-1 tokens")
    for top, vocab_size in ((255, 256), (256, 50257)): # bytes and characters below, GPT-2 above
        write(tmp_path / "edge" / "train.bin", np.array([1, top], "<u2").tobytes())
        assert load("edge", tmp_path).vocab_size == vocab_size
    assert data.highest(np.append(np.zeros(2 ** 24, np.uint8), np.uint8(9))) == 9 and data.highest([]) == -1
    for bad in (b"\1\0\2", b""):
        write(tmp_path / "nano" / "val.bin", bad)
        refused(lambda: load("nano", tmp_path), "val.bin", f"{len(bad)} bytes")


@pytest.mark.parametrize("name, split", [
    ("interval_train_2.bin", "train"), ("fineweb_train_1.bin", "train"), ("train.bin", "train"),
    ("training.bin", "train"), ("shakespeare_val.bin", "val"), ("val.bin", "val"), ("edu-VAL-0.bin", "val"),
    ("validation1.bin", "val"), ("train_val.bin", None), ("strain_2.bin", None), ("oval.bin", None),
    ("value.bin", None), ("tokens.bin", None)])
def test_the_split_of_a_shard_is_a_word_of_its_name(name, split, tmp_path, capsys):
    write(tmp_path / "a/train_9.bin", np.full(90, 1, "<u2").tobytes())
    write(tmp_path / "a" / name, np.full(7, 2, "<u2").tobytes())
    found = load("a", tmp_path)
    assert [2 in whole(found.train), len(found.val) == 7] == [split == "train", split == "val"]
    assert (f"left out {name}" in capsys.readouterr().out) == (split is None)
    assert len(verify("a", tmp_path)) == 1 + bool(split)
    (tmp_path / "a/train_9.bin").unlink()
    assert data.prepared(tmp_path) == ["a"] * (split == "train")


# --- batches ---


def test_batch_is_shifted_by_one():
    split = tokens(300, 200)
    for step in range(20):
        x, y = split.batch(step, 5, 16, seed=1)
        assert x.shape == y.shape == (5, 16) and x.dtype == y.dtype == torch.int64 and x.is_contiguous()
        assert y.is_contiguous()
        # consecutive, so inside one shard
        assert torch.equal(y, x + 1) and torch.equal(x, x[:, :1] + torch.arange(16))


def test_batch_depends_on_seed_and_step_alone(tmp_path):
    first, second = made(tmp_path / "a").train, made(tmp_path / "b").train
    forward = [first.batch(step, 4, 32, 7) for step in range(10)]
    np.random.seed(3), torch.manual_seed(3) # no hidden state anywhere
    for step in reversed(range(10)):
        assert all(torch.equal(a, b) for a, b in zip(second.batch(step, 4, 32, 7), forward[step]))
        # the first rows of a larger batch
        assert torch.equal(second.batch(step, 9, 32, 7)[0][:4], forward[step][0])
    split = tokens(100_000)
    assert len({tuple(split.batch(step, 4, 8, seed)[0][:, 0].tolist()) for step in range(10)
                for seed in range(10)}) == 100


def test_every_legal_start_is_equally_likely():
    """Shards of 20, 9, 8 and 12 with T = 8 have 12 + 1 + 0 + 4 starts."""
    split = tokens(20, 9, 8, 12)
    counts = {}
    for start in split.batch(0, 17_000, 8, seed=0)[0][:, 0].tolist():
        counts[start] = counts.get(start, 0) + 1
    assert sorted(counts) == [*range(12), 10_000, *range(30_000, 30_004)]
    assert all(850 < n < 1150 for n in counts.values()), counts # 1,000 each with a standard deviation of 31


def test_an_epoch_takes_every_window_once():
    """Shards of 35, 20, 9 and 8 with T = 8 have (35 - 8) // 8 = 3, 1, 1 and 0 windows. tokens numbers each
    shard from a multiple of 10,000 on."""
    def starts(batch_size, count):
        split = tokens(35, 20, 9, 8)
        return [x for step in range(count // batch_size)
                for x in split.batch(step, batch_size, 8, 3, epochs=True)[0][:, 0].tolist()]

    epochs = [starts(5, 200)[i:i + 5] for i in range(0, 200, 5)]
    for epoch in epochs:
        first, offset = sorted(epoch), min(epoch)
        assert first == [offset, offset + 8, offset + 16, 10_000 + offset, 20_000] and offset < 8
    assert len({min(epoch) for epoch in epochs}) == 8 # each offset of a window comes
    assert len({tuple(np.argsort(epoch)) for epoch in epochs}) > 20 # in another order
    assert starts(4, 40) == starts(8, 40) == starts(40, 40) # the batch size does not matter, nor state
    split = tokens(35, 20, 9, 8)
    later = split.batch(7, 5, 8, 3, epochs=True)[0]
    split.batch(0, 5, 8, 4, epochs=True), split.batch(0, 5, 7, 3, epochs=True)
    assert torch.equal(later, split.batch(7, 5, 8, 3, epochs=True)[0])
    assert later[:, 0].tolist() == epochs[7]
    rows = data.Tokens([np.arange(60, dtype=np.uint16)], 100, "train split of it", rows=[20]) # 3 rows of 20
    assert sorted(x // 20 for x in rows.batch(0, 6, 5, 0, epochs=True)[0][:, 0].tolist()) != [0] * 6
    for x in rows.batch(0, 60, 5, 0, epochs=True)[0]:
        assert x[0] // 20 == (x[-1] + 1) // 20 # no window crosses the end of a row
    refused(lambda: tokens(8).batch(0, 1, 8, 0, epochs=True))


@pytest.mark.parametrize("n", [0, 1, 2, 255, 256, 257, 258])
def test_shortest_text(n):
    split = tokens(n)
    if n >= 257:
        assert split.batch(0, 3, 256, 0)[0].shape == (3, 256)
        return
    message = refused(lambda: split.batch(0, 3, 256, 0), f"val split of it has {n} tokens, block_size is 256",
                      "raise --val_fraction")
    assert (f"lower --block_size to {n - 1} " in message) == (n > 1)
    if n > 1: # the advice is good
        split.batch(0, 3, n - 1, 0)


def test_batch_refuses_nonsense():
    split = tokens(100)
    for batch_size, block_size, seed, step in ((0, 8, 0, 0), (1, 0, 0, 0), (1, 8, -1, 0), (1, 8, 0, -1)):
        refused(lambda: split.batch(step, batch_size, block_size, seed))
    refused(lambda: list(split.windows(0, 1)))
    refused(lambda: list(split.windows(1, 0)))
    refused(lambda: tokens(100, vocab_size=99).batch(0, 64, 50, 0), "val split of it", "id 99",
            "vocab_size=99")
    tokens(100, vocab_size=100).batch(0, 64, 50, 0)


@pytest.mark.parametrize("lengths", [[2], [16], [17], [18], [33], [1000], [1000, 1, 2, 16, 17, 0, 500]])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_windows_hold_every_target_once(lengths, batch_size):
    split, seen = tokens(*lengths), []
    for x, y in split.windows(16, batch_size):
        assert x.shape == y.shape and x.dtype == y.dtype == torch.int64 and x.shape[0] <= batch_size
        assert torch.equal(y, x + 1)
        assert x.shape[1] == 16 or x.shape[0] == 1 and x.shape[1] < 16
        seen += y.flatten().tolist()
    assert seen == [i for shard in split.shards for i in shard[1:].tolist()]
    assert len(seen) == sum(max(n - 1, 0) for n in lengths)
    # full batches, and a tail per shard
    yields = sum(-(-((n - 1) // 16) // batch_size) + bool((n - 1) % 16) for n in lengths if n)
    assert sum(1 for _ in split.windows(16, batch_size)) == yields


@pytest.mark.parametrize("lengths", [[], [0], [1], [1, 1]])
def test_windows_without_a_target(lengths):
    refused(lambda: list(tokens(*lengths).windows(16, 4)), "raise --val_fraction")


def test_prepared_data_needs_no_network(tmp_path, offline):
    found = made(tmp_path)
    assert found.tokenizer.decode(found.train.batch(0, 1, 20, 0)[0]) in VERSE


# --- downloads, from a server on this machine that misbehaves on demand ---

BODY = np.random.default_rng(1).bytes(50_000)
SHA = hashlib.sha256(BODY).hexdigest()


class Server(http.server.BaseHTTPRequestHandler):
    """Answers the n-th request by plan[n] (the last entry goes on for ever) and notes the Range it was asked
    for.
    """
    def log_message(self, *args):
        return

    def reply(self, status, body=b"", length=None, **headers):
        self.send_response(status)
        for key, value in {"Content-Length": len(body) if length is None else length, **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        plan, asked = self.server.plan, self.headers.get("Range")
        act = plan[min(len(self.server.asked), len(plan) - 1)]
        self.server.asked.append(asked)
        first, end = int(asked[6:-1]) if asked else 0, f"{len(BODY) - 1}/{len(BODY)}"
        if act == "ok" and first >= len(BODY): self.reply(416)
        elif act == "ok" and asked: self.reply(206, BODY[first:], Content_Range=f"bytes {first}-{end}")
        elif act in ("ok", "no range"): self.reply(200, BODY)
        elif act == "cut": self.reply(200, BODY[:20_000], length=len(BODY))
        elif act == "more than there is": self.reply(200, BODY, length=len(BODY) + 999)
        elif act == "less than there is": self.reply(200, BODY, length=30_000)
        elif act == "wrong": self.reply(200, BODY[::-1])
        elif act == "other range": self.reply(206, BODY[5:], Content_Range=f"bytes 5-{end}")
        elif act == "redirect": self.reply(302, Location="/elsewhere")
        elif act == "stall": self.reply(200, BODY[:100], length=len(BODY)), self.server.over.wait(20)
        elif act == "trickle": self.reply(200, length=len(BODY)), self.trickle()
        elif act.startswith("429"): self.reply(429, Retry_After=act[4:])
        else: self.reply(int(act))

    def trickle(self):
        while not self.server.over.wait(0.05):
            self.wfile.write(b"x")


@pytest.fixture
def serve(monkeypatch):
    """serve("cut", "ok") -> the address of a server with that plan; its .asked are the Range headers, .slept
    the pauses of the client.
    """
    servers, slept = [], []
    # a sandbox without any network may lack even 127.0.0.1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        if probe.connect_ex(("127.0.0.1", 9)):
            pytest.skip("the loopback interface is down: no server can be reached here")
    monkeypatch.delenv("DATA_MIRROR", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(data.time, "sleep", slept.append)
    def start(*plan):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
        server.plan, server.asked, server.slept, server.over = plan, [], slept, threading.Event()
        server.handle_error = lambda *args: None
        server.url = f"http://127.0.0.1:{server.server_port}/file"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return server
    yield start
    for server in servers:
        server.over.set()
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("plan, asked", [
    (["ok"], [None]),
    (["cut", "ok"], [None, "bytes=20000-"]),
    (["cut", "no range"], [None, "bytes=20000-"]),
    (["cut", "other range", "ok"], [None, "bytes=20000-", None]),
    (["more than there is"], [None]),
    (["less than there is", "ok"], [None, None]),
    (["wrong", "ok"], [None, None]),
    (["500", "ok"], [None, None]),
    (["503", "429 2", "ok"], [None, None, None]),
    (["redirect", "ok"], [None, None]),
    (["stall", "ok"], [None, "bytes=100-"]),
])
def test_download_survives(plan, asked, serve, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "_TIMEOUT", (5, 0.3))
    server = serve(*plan)
    start = time.monotonic()
    path = data.fetch(server.url, "file.txt", SHA, tmp_path)
    assert path.read_bytes() == BODY and server.asked == asked and os.listdir(tmp_path) == ["file.txt"]
    assert time.monotonic() - start < 10
    assert "file.txt: 50,000 bytes" in capsys.readouterr().err
    server.shutdown() # from now on nobody answers, and nobody is asked
    assert data.fetch(server.url, "file.txt", SHA, tmp_path) == path


@pytest.mark.parametrize("plan, requests, reason", [
    (["404"], 1, "404"), (["500"], 3, "500"), (["429 301"], 1, "429"), (["429 7"], 3, "429"),
    (["wrong"], 3, SHA[:12]),
    (["trickle"], 1, "seconds"), (["less than there is"], 3, "30,000 bytes"),
])
def test_download_gives_up(plan, requests, reason, serve, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_DEADLINE", 0.5 if plan == ["trickle"] else 600)
    server = serve(*plan)
    refused(lambda: data.fetch(server.url, "file.txt", SHA, tmp_path), server.url, reason, "put file.txt",
            "MIRROR", kind=DownloadError)
    assert len(server.asked) == requests and not (tmp_path / "file.txt").exists()
    assert len(server.slept) == requests - 1
    assert plan != ["429 7"] or server.slept == [7, 7]
    assert plan != ["500"] or 0.5 <= server.slept[0] < 1 <= server.slept[1] < 2


def test_download_goes_on_where_an_earlier_run_stopped(serve, tmp_path):
    server = serve("cut", "500", "404", "ok")
    refused(lambda: data.fetch(server.url, "file.txt", SHA, tmp_path), "404", kind=DownloadError)
    assert os.listdir(tmp_path) == ["file.txt.part"]
    assert data.fetch(server.url, "file.txt", SHA, tmp_path).read_bytes() == BODY
    assert server.asked[-1] == "bytes=20000-"


def test_stale_part_files(serve, tmp_path):
    """Longer than the file, of another file, and complete: the last needs no server at all."""
    for i, (stale, asked) in enumerate(((BODY + b"x", [f"bytes={len(BODY) + 1}-", None]),
                                        (b"other", ["bytes=5-", None]), (BODY, []))):
        server = serve("ok")
        write(tmp_path / str(i) / "file.txt.part", stale)
        assert data.fetch(server.url, "file.txt", SHA, tmp_path / str(i)).read_bytes() == BODY
        assert server.asked == asked
        assert os.listdir(tmp_path / str(i)) == ["file.txt"]


def test_file_of_the_same_name_is_not_overwritten(serve, tmp_path):
    mine, server = write(tmp_path / "file.txt", b"my own"), serve("ok")
    refused(lambda: data.fetch(server.url, "file.txt", SHA, tmp_path), "file.txt",
            hashlib.sha256(b"my own").hexdigest(), SHA, "delete")
    assert mine.read_bytes() == b"my own" and server.asked == []


def test_link_to_the_right_file(tmp_path, serve):
    write(tmp_path / "elsewhere/file", BODY)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/file.txt").symlink_to(tmp_path / "elsewhere/file")
    assert data.fetch("", "file.txt", SHA, tmp_path / "data").read_bytes() == BODY
    write(tmp_path / "elsewhere/file", b"other")
    refused(lambda: data.fetch(serve("ok").url, "file.txt", SHA, tmp_path / "data"))
    assert (tmp_path / "elsewhere/file").read_bytes() == b"other"


@posix
def test_downloads_at_once_are_one(serve, tmp_path):
    server, found, barrier = serve("ok"), [], threading.Barrier(3)
    def call():
        barrier.wait()
        found.append(data.fetch(server.url, "file.txt", SHA, tmp_path))
    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and server.asked == [None] and os.listdir(tmp_path) == ["file.txt"]
    assert found[0].read_bytes() == BODY


def test_mirror_is_asked_before_the_network(serve, tmp_path, monkeypatch, capsys):
    server = serve("ok")
    monkeypatch.setenv("DATA_MIRROR", str(tmp_path / "mirror"))
    write(tmp_path / "mirror" / "file.txt", BODY)
    assert data.fetch(server.url, "file.txt", SHA, tmp_path / "a").read_bytes() == BODY
    assert server.asked == [] and os.listdir(tmp_path / "a") == ["file.txt"]
    write(tmp_path / "mirror" / "file.txt", b"damaged")
    assert data.fetch(server.url, "file.txt", SHA, tmp_path / "b").read_bytes() == BODY
    assert len(server.asked) == 1
    assert "is not used" in capsys.readouterr().err


@pytest.mark.parametrize("name",
    ["../x", "/x", "a/b", "a\\b", "..", ".", "", "x\0", "C:x", ".hidden", "x" * 300, "x\n", "\u00e9", "link"])
def test_file_names_stay_in_the_folder(name, serve, tmp_path):
    server, folder = serve("ok"), tmp_path / "data"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "target")
    refused(lambda: data.fetch(server.url, name, SHA, folder))
    assert server.asked == [] and sorted(os.listdir(tmp_path)) == ["data"] and os.listdir(folder) == ["link"]


# asking again does not make a name known
@pytest.mark.parametrize("host, pauses", [("127.0.0.1:9", 2), ("nosuchhost.invalid", 0)])
def test_without_a_network_it_fails_soon(host, pauses, tmp_path, monkeypatch):
    monkeypatch.delenv("DATA_MIRROR", raising=False)
    slept = []
    monkeypatch.setattr(data.time, "sleep", slept.append)
    start, url = time.monotonic(), f"http://{host}/input.txt"
    remedy = f"put file.txt into {tmp_path}/ or set DATA_MIRROR"
    refused(lambda: data.fetch(url, "file.txt", SHA, tmp_path), url, remedy, kind=DownloadError)
    assert time.monotonic() - start + sum(slept) < 5 and len(slept) == pauses and os.listdir(tmp_path) == []


# --- command line ---


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs a command line inside this process, in tmp_path, and undoes what it set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    def run(line):
        for name, value in (("tokenizer", "char"), ("val_fraction", 0.1), ("data_dir", "data"), ("name", ""),
                            ("field", ""), ("max_tokens", 0), ("vocab_size", 4096)):
            monkeypatch.setattr(data, name, value)
        data.main(line.split())
    return run


def test_commands(tmp_path, command, capsys):
    write(tmp_path / "verse.txt", VERSE)
    command("prepare verse.txt")
    command("prepare verse.txt --data_dir=new --tokenizer byte --val_fraction=0.5")
    assert f"train {len(VERSE) // 2:,} tokens" in capsys.readouterr().out
    assert load("verse", tmp_path / "new").vocab_size == 256
    command("verify verse")
    assert capsys.readouterr().out.count("OK data/verse/") == 2
    command("list")
    said = capsys.readouterr().out
    assert all(word in said for word in ("shakespeare", "pystdlib",
                                         f"verse            tokenizer char, vocab_size {len(set(VERSE))}"))
    (tmp_path / "data" / "verse" / "val_000000.bin").unlink()
    refused(lambda: command("verify verse"), "val_000000.bin")
    command("list --data_dir=data")
    assert "val_000000.bin: missing" in capsys.readouterr().out


@pytest.mark.parametrize("line, words", [
    ("", "usage"), ("prepare", "usage"), ("prepare a b", "usage"), ("list x", "usage"),
    ("--data_dir=x list", "usage"), ("zzz", "usage"),
    ("prepre verse.txt", "nearest: prepare"), ("prepare verse.txt --tokeniser=byte", "tokenizer"),
    ("prepare missing.txt", "missing.txt"),
    ("verify missing", "prepare"), ("list --val_fraction=much", "val_fraction")])
def test_wrong_commands(line, words, command):
    refused(lambda: command(line), words)


@pytest.mark.deep
def test_exit_codes(tmp_path):
    """In processes of their own, the first of them in an interpreter of its own."""
    write(tmp_path / "verse.txt", VERSE)
    prepared = run([ROOT / "data.py", "prepare", "verse.txt"], cwd=tmp_path, fresh=True)
    assert (prepared.returncode, prepared.stderr) == (0, "") and "val 299 tokens" in prepared.stdout
    shown = run([ROOT / "data.py", "--help"], cwd=tmp_path)
    assert shown.returncode == 0 and "--val_fraction" in shown.stdout
    refused = run([ROOT / "data.py", "verify", "nope"], cwd=tmp_path)
    assert refused.returncode == 2 and refused.stderr.startswith("error: no dataset 'nope'")
    assert len(refused.stderr.splitlines()) <= 3


def test_a_padded_vocabulary_is_shown_not_refused():
    """vocab_size=50304 over GPT-2's 50257: an untrained model writes ids that mean nothing."""
    codec = make_tokenizer("byte", "")
    assert codec.readable([104, 105, 300, 33, 999, 999]) == "hi\ufffd!\ufffd\ufffd"
    assert codec.readable([]) == ""


# --- a part of a split, for evaluations that would take long ---


@pytest.mark.parametrize("lengths, rows",
                         [([1000], ()), ([97, 40, 301], ()), ([120, 66], (12, 33)), ([60], (6,))])
@pytest.mark.parametrize("limit", [1, 50, 300, 10**6])
def test_a_bounded_evaluation_takes_windows_spread_over_the_split(lengths, rows, limit):
    ids = np.split(np.arange(sum(lengths), dtype="<u2"), np.cumsum(lengths)[:-1])
    split = data.Tokens(ids, 2000, "val split", rows)
    whole = [y.flatten().tolist() for _, y in split.windows(8, 1)]
    taken = [y.flatten().tolist() for _, y in split.windows(8, 1, limit)]
    assert sum(map(len, taken)) == split.targets(8, limit) and sum(map(len, whole)) == split.targets(8)
    assert all(y in whole for y in taken)
    if limit == 10**6:
        assert taken == whole
    if limit == 300 and len(lengths) == 1 and not rows: # every 4th window of 8
        assert [y[0] for y in taken[:-1]] == list(range(1, 993, 32))
    if limit == 50:
        # both ends
        assert sum(map(len, taken)) < 130
        assert {int(i >= sum(lengths) // 2) for y in taken for i in y} == {0, 1}


def test_who_stops_waiting_leaves_the_lock_of_another(tmp_path, monkeypatch):
    """Ctrl-C while another process makes the file: a third one would else work beside it."""
    lock = tmp_path / ".made.lock"
    lock.touch()

    def flock(file, how):
        raise BlockingIOError if how & data.fcntl.LOCK_NB else KeyboardInterrupt

    monkeypatch.setattr(data.fcntl, "flock", flock)
    with pytest.raises(KeyboardInterrupt), data.alone(tmp_path / "made"):
        pass
    assert lock.exists()


def test_a_cut_after_a_megabyte_is_no_failed_attempt(tmp_path, monkeypatch):
    body, asked = BODY * 100, [] # 5 MB, of which a request brings 1.25
    def ask(method, url, **headers):
        asked.append(headers)
        first = int(headers.get("Range", "bytes=0-")[6:-1])
        blocks = iter([body[first:first + 1_250_000]])
        def read1(*args, **kwargs):
            for block in blocks:
                return block
            raise data.urllib3.exceptions.ProtocolError("cut")
        raw = SimpleNamespace(read1=read1)
        return nullcontext(SimpleNamespace(status_code=206 if first else 200, raw=raw))
    monkeypatch.setattr(data, "ask", ask)
    monkeypatch.setattr(data.time, "sleep", lambda pause: 1 / 0)
    assert data.fetch("", "x", hashlib.sha256(body).hexdigest(), tmp_path).read_bytes() == body
    assert asked == [{}, *({"Range": f"bytes={n * 1_250_000}-"} for n in (1, 2, 3))] # and no request for nothing


def test_a_416_without_a_part_is_no_crash(tmp_path, monkeypatch):
    asked, answer = [], data.requests.Response()
    answer.status_code, answer.raw = 416, data.urllib3.HTTPResponse(b"")
    monkeypatch.delenv("DATA_MIRROR", raising=False)
    monkeypatch.setattr(data.requests, "request", lambda *args, **kwargs: asked.append(args) or answer)
    monkeypatch.setattr(data.time, "sleep", lambda pause: None)
    refused(lambda: data.fetch("http://nowhere/x", "x", SHA, tmp_path), "0 bytes", kind=DownloadError)
    assert len(asked) == 3 # asked again, and no FileNotFoundError
