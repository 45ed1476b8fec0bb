"""data.py: texts of any size and form, and known corpora, in little memory and from a hub that misbehaves."""
import gzip
import io
import json
import random
import sys

import pytest

import data
from data import load, make_tokenizer, prepare
from processes import ROOT, run
from test_data import NASTY, VERSE, hf, refused, whole, write

PROSE = "".join(random.Random(0).choices(["word", "don't", " ", "  ", "\n", "\n\n", "12", "?!", "\u4e2d",
                                          "e\u0301", "\t", "\u3000", "\r\n", "x'll", "\U0001f600"], k=3000))


def made(tmp_path, content=VERSE, name="verse.txt", **kwargs):
    return load(prepare(write(tmp_path / name, content), data_dir=tmp_path / "data", **kwargs))


# --- memory stays flat ---


@pytest.mark.parametrize("name", ["char", "byte", "gpt2", "FILE.json"])
def test_pieces_and_threads_change_no_id(name, tmp_path, monkeypatch, request):
    """Documents longer and shorter than a piece, on one thread and on four: the ids of whole documents."""
    if name == "gpt2":
        request.getfixturevalue("mirror")
    name = hf(tmp_path)[1] if name == "FILE.json" else name
    documents = [PROSE, "", "a", *NASTY, VERSE * 3, PROSE[::-1]]
    path = write(tmp_path / "x.jsonl", "\n".join(json.dumps({"text": text}) for text in documents))
    found = [load(prepare(path, name, tmp_path / "whole", 0.3))]
    monkeypatch.setattr(data, "_PIECE", 150)
    for threads in (1, 4):
        monkeypatch.setattr(data, "_THREADS", threads)
        found.append(load(prepare(path, name, tmp_path / str(threads), 0.3)))
    assert found[0].sha256 == found[1].sha256 == found[2].sha256
    codec, text = found[0].tokenizer, "".join(documents)
    separator = codec.encode("\n").tolist() if codec.eot is None else [codec.eot]
    left, ids = int(len(text) * 0.7), []
    for document in filter(None, documents):
        ids += (separator if ids and left > 0 else []) + codec.encode(document[:max(left, 0)]).tolist()
        left -= len(document)
    assert whole(found[0].train).tolist() == ids


@pytest.mark.parametrize("name", ["gpt2", "FILE.json"])
def test_a_cut_changes_no_id(name, tmp_path, request):
    """Where cut divides a text, the parts give the ids of the whole, and there are places enough."""
    if name == "gpt2":
        request.getfixturevalue("mirror")
    codec = make_tokenizer(hf(tmp_path)[1] if name == "FILE.json" else name, "", tmp_path)
    for text in [*NASTY, *(PROSE[k:k + 300] for k in range(0, 3000, 100))]:
        at = codec.cut(text)
        assert [*codec.encode(text[:at]), *codec.encode(text[at:])] == codec.encode(text).tolist()
    assert codec.cut(VERSE) > len(VERSE) - 150 and codec.cut("x" * 500) == 0


def test_a_stretch_without_a_place_to_divide(mirror, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_PIECE", 1000)
    monkeypatch.setattr(data, "_LONGEST", 3000)
    refused(lambda: made(tmp_path, "z" * 9000, tokenizer="gpt2"), "gpt2", "--tokenizer=byte")
    assert len(made(tmp_path, "z" * 9000, tokenizer="byte").train) == 8100


def test_a_line_that_would_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_PIECE", 1000)
    monkeypatch.setattr(data, "_LONGEST", 3000)
    lines = '{"text": "short"}\n{"text": "' + "z" * 9000 + '"}'
    refused(lambda: made(tmp_path, lines, "x.jsonl"), "x.jsonl line 2", "3,000 characters")


def test_a_text_that_changes_while_it_is_read(tmp_path, monkeypatch):
    path, real = write(tmp_path / "x.txt", VERSE), data.make_tokenizer
    def grows(*args):
        write(path, VERSE.replace("2", "3"))
        return real(*args)
    monkeypatch.setattr(data, "make_tokenizer", grows)
    refused(lambda: prepare(path, "byte", tmp_path / "data"), "changed while it was read")
    assert not (tmp_path / "data/x").exists()


def test_progress_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "_PIECE", 100)
    clock = iter(range(0, 10**6, 45))
    monkeypatch.setattr(data.time, "monotonic", lambda: next(clock))
    made(tmp_path, VERSE)
    said = capsys.readouterr().err
    assert "% of the text" in said and "tokens a second" in said and "minutes left" in said


@pytest.mark.deep
@pytest.mark.parametrize("name", ["char", "byte", "gpt2"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_memory_stays_flat(name, kind, tmp_path, mirror):
    """30 MB: the whole text, or all of its ids, would show in the peak."""
    rng = random.Random(1)
    text = "".join(chr(rng.randrange(0x4e00, 0x5200)) for _ in range(10_000))
    pieces = [text[k:k + rng.randrange(10, 200)] + rng.choice("\n ") for k in range(0, 9000, 9)]
    line = json.dumps({"text": "".join(pieces)}, ensure_ascii=False) if kind == "jsonl" else "".join(pieces)
    write(tmp_path / f"x.{kind}", (line + "\n") * (30_000_000 // len(line.encode())))
    code = ("import resource, data; peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            f"data.make_tokenizer({name!r}, 'a').encode('a'); before = peak()\n"
            f"data.prepare('x.{kind}', {name!r}); print(peak() - before)")
    done = run(["-c", code], cwd=tmp_path, fresh=True, timeout=600, env={"PYTHONPATH": str(ROOT)})
    grown = int(done.stdout.splitlines()[-1]) / 1024
    assert grown < 40, done.stdout + done.stderr


# --- sources ---

TABLE = 'id,body\r\n1,"two\nlines, one field"\r\n2,\r\n3,plain\r\n'


def texts(found):
    return found.tokenizer.decode(whole(found.train))


@pytest.mark.parametrize("name, content, field, text", [
    ("x.txt.gz", gzip.compress(VERSE.encode()), "", VERSE),
    ("x.txt.gz", gzip.compress(VERSE[:999].encode()) + gzip.compress(VERSE[999:].encode()), "", VERSE),
    ("x.jsonl.gz", gzip.compress(b'{"text": "one"}\n{"text": "two"}'), "", "one\ntwo"),
    ("x.jsonl", '{"text": "no", "body": "yes"}', "body", "yes"),
    ("x.csv", TABLE, "body", "two\nlines, one field\nplain"),
    ("x.csv", TABLE, "", TABLE), # as ever: without --field a .csv is a text
    ("x.csv.gz", gzip.compress(TABLE.encode()), "id", "1\n2\n3")])
def test_sources(name, content, field, text, tmp_path):
    assert texts(made(tmp_path, content, name, field=field, val_fraction=0.0)) == text


@pytest.mark.parametrize("name, content, field, words", [
    ("x.csv", TABLE, "text", ["line 3", "id, body", "--field"]),
    ("x.jsonl", '{"a": 1, "b": 2}', "", ["line 1", '"text"', "a, b", "--field"]),
    ("x.csv", 'id,body\n1,"never closed\n', "body", ["x.csv line", "not CSV"]),
    ("x.csv", b"id,body\n1,caf\xe9\n", "body", ["not UTF-8", "iconv"]),
    ("x.txt", VERSE, "body", ["drop --field"]),
    ("x.txt.gz", VERSE, "", ["x.txt.gz", "ot a gzip"]),
    ("x.txt.gz", gzip.compress(VERSE.encode())[:-20], "", ["x.txt.gz", "ended before"]),
    ("x.txt.gz", gzip.compress(bytes(10**6)), "", ["no text"])])
def test_sources_that_are_refused(name, content, field, words, tmp_path):
    refused(lambda: made(tmp_path, content, name, field=field), *words)


def test_a_bomb_stops_early(tmp_path, monkeypatch):
    """1 GB of spaces in 1 MB of .gz: no more of it is unpacked than the limit."""
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb") as file:
        for _ in range(64):
            file.write(b" " * 2**20)
    monkeypatch.setattr(data, "_LONGEST", 2**21)
    path, seen = write(tmp_path / "x.txt.gz", packed.getvalue()), 0
    with pytest.raises(data.UserError, match="unpacks to more than 200 times"):
        for raw in data.blocks(path):
            seen += len(raw)
    assert seen <= 2**24


def test_zstd(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    refused(lambda: made(tmp_path, b"x", "x.txt.zst"), "a .zst file", "pip install zstandard")
    monkeypatch.undo()
    pack = pytest.importorskip("zstandard").ZstdCompressor().compress
    packed = pack(VERSE.encode()) + pack(b"second frame")
    assert texts(made(tmp_path, packed, "x.txt.zst", val_fraction=0.0)) == VERSE + "second frame"
    for bad, words in ((packed[:-5], "cut off"), (packed[:50] + b"damaged" + packed[57:], "x.txt.zst"),
                       (pack(bytes(2**26).replace(b"\0", b"a")), "200 times")):
        refused(lambda: made(tmp_path, bad, "x.txt.zst"), words)


def test_parquet(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"n": [1, 2], "body": ["one", "two"]}), tmp_path / "x.parquet")
    content = (tmp_path / "x.parquet").read_bytes()
    assert texts(made(tmp_path, content, "x.parquet", field="body", val_fraction=0.0)) == "one\ntwo"
    refused(lambda: made(tmp_path, content, "x.parquet"), "no text", "--field")
    refused(lambda: made(tmp_path, content[:-30], "x.parquet"), "no .parquet file")


def test_a_name_of_ones_own(tmp_path):
    for name in ("one", "two"): # two sources of the same name side by side
        path = write(tmp_path / name / "verse.txt", VERSE + name)
        assert prepare(path, data_dir=tmp_path / "data", name=name) == tmp_path / "data" / name
    assert texts(load(prepare("recall", data_dir=tmp_path, name="mine"))).startswith("d2e5")
    refused(lambda: prepare(path, data_dir=tmp_path, name="../up"), "--name=../up", "as up can")
    for source, name in ((path, "recall"), ("recall", "shakespeare")):
        refused(lambda: prepare(source, data_dir=tmp_path, name=name), "known dataset", f"my_{name}")
