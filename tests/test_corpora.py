"""data.py: texts of any size and form, and known corpora, in little memory and from a hub that misbehaves."""
import contextlib
import gzip
import hashlib
import http.server
import io
import json
import os
import random
import runpy
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
from types import SimpleNamespace

import numpy as np
import pytest
from torch.distributed import TCPStore

import data
from data import load, make_tokenizer, prepare
from model import load_checkpoint
from processes import ROOT, run, start
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


def test_no_cut_where_a_token_holds_the_end_of_a_word_and_the_space(tmp_path):
    package = pytest.importorskip("tokenizers")
    merged = package.models.BPE({"a": 0, "b": 1, " ": 2, "a ": 3}, [("a", " ")])
    package.Tokenizer(merged).save(str(tmp_path / "merged.json"))
    codec = make_tokenizer(str(tmp_path / "merged.json"), "", tmp_path)
    assert codec.cut("ba " * 200) == 0
    at = codec.cut("ba " * 200 + "b a " + "ba " * 40)
    assert at == 601 # between "b" and the space behind it


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
    assert " tokens, " in said and " a second, " in said and "%, " in said and "minutes left" in said


# --- stopped and started again ---


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def table(texts):
    """The bytes of a .parquet file with a column of texts."""
    import pyarrow
    from pyarrow import parquet
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": texts}), file)
    return file.getvalue()


def sources(tmp_path, hub):
    """{kind: (source, settings of prepare)}, each of several shards where a shard has 700 tokens."""
    lines = "\n".join(json.dumps({"text": text}) for text in ["", *NASTY, VERSE[:2500], PROSE[:2500]])
    write(tmp_path / "x.jsonl", lines)
    for name, text in ("a.txt", ""), ("b.txt", VERSE), ("c.txt", ""), ("d.md", PROSE[:3000]):
        write(tmp_path / "folder" / name, text)
    (tmp_path / "rows").mkdir()
    np.save(tmp_path / "rows/shard_0.npy", np.arange(8000).reshape(800, 10))
    ids = np.random.default_rng(0).integers(0, 50257, 5000).astype("<u2")
    for name, part in ("train_000001", ids[:2000]), ("train_000002", ids[2000:]), ("val_000000", ids[:1500]):
        head = np.array([20240520, 1, len(part), *[0] * 253], "<i4").tobytes()
        hub.files[f"fineweb_{name}.bin"] = head + part.tobytes()
    with contextlib.suppress(ImportError): # those who ask for wikitext skip where pyarrow is missing
        wikitext = [f" = {i} = \n" if i % 7 == 0 else VERSE[i:i + 50] for i in range(150)]
        hub.files["wikitext-2-raw-v1/train-00000-of-00001.parquet"] = table(wikitext)
        hub.files["wikitext-2-raw-v1/validation-00000-of-00001.parquet"] = table([" = One = \n", VERSE])
    return {"txt": (write(tmp_path / "x.txt", VERSE), {}), "jsonl": (tmp_path / "x.jsonl", {}),
            "folder": (tmp_path / "folder", {"val_fraction": 0.4}), "rows": (tmp_path / "rows", {}),
            "c4": ("c4", {"max_tokens": 30_000}), "wikitext": ("wikitext", {}),
            "fineweb": ("fineweb", {"tokenizer": "gpt2", "max_tokens": 4900, "val_fraction": 0.3})}


def stopping(monkeypatch, moment):
    """The file number `moment` of a dataset that is written is cut off, as by Ctrl-C."""
    calls, real = [], data.write_synced
    def stops(path, *args):
        calls.extend([path] if path.suffix == ".bin" or path.name == "meta.json" else [])
        if len(calls) > moment:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        return real(path, *args)
    monkeypatch.setattr(data, "write_synced", stops)
    return lambda: monkeypatch.setattr(data, "write_synced", real)


@pytest.mark.parametrize("kind", ["c4", "folder", *(pytest.param(kind, marks=pytest.mark.deep) for kind in
                                                    ("txt", "jsonl", "rows", "wikitext", "fineweb"))])
def test_prepare_goes_on_where_it_was_stopped(kind, hub, tmp_path, monkeypatch, capsys):
    """After each shard in turn: the same bytes, and what lies in finished shards is not encoded again."""
    for name, value in (("_SHARD", 700), ("_PIECE", 400), ("_THREADS", 1)):
        monkeypatch.setattr(data, name, value)
    monkeypatch.setattr(os, "fsync", lambda file: None)
    if kind == "wikitext":
        pytest.importorskip("pyarrow")
    source, how = sources(tmp_path, hub)[kind]
    how = {"tokenizer": "byte" if kind != "rows" else "char", "data_dir": tmp_path / "data", **how}
    encoded, encode = [], data.ByteTokenizer.encode
    counting = lambda codec, text: encoded.append(len(text)) or encode(codec, text)
    monkeypatch.setattr(data.ByteTokenizer, "encode", counting)
    right = contents(prepare(source, **{**how, "data_dir": tmp_path / "whole"}))
    tokens = [entry["tokens"] for entry in json.loads(right["meta.json"])["shards"].values()]
    most = sum(encoded)
    for moment in range(1, len(tokens) + 1, 1 + len(tokens) // 6):
        again = stopping(monkeypatch, moment)
        with pytest.raises(KeyboardInterrupt):
            prepare(source, **how)
        again()
        encoded.clear()
        capsys.readouterr()
        assert contents(prepare(source, **how)) == right
        assert f"resuming: {moment} shards, {sum(tokens[:moment]):,} tokens" in capsys.readouterr().out
        # 8,000: what is read ahead, and the pieces that shards end in
        assert sum(encoded) <= most * sum(tokens[moment:]) / sum(tokens) + 8000
        shutil.rmtree(tmp_path / "data" / data.own_name(source))
    assert len(tokens) > 3 and len(os.listdir(tmp_path / "data")) == len(os.listdir(tmp_path / "whole")) - 1


@pytest.mark.parametrize("change, kept", [
    ("nothing", 3), ("second shard", 1), ("record", 0), ("text", 0), ("tokenizer", 0), ("fraction", 0)])
def test_what_was_stopped_is_checked(change, kept, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "_SHARD", 500)
    again, how = stopping(monkeypatch, 3), {"tokenizer": "byte"}
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, **how)
    again()
    left = next((tmp_path / "data").glob(".verse.*.new"))
    path = left / ("train_000001.bin" if change == "second shard" else "progress.json")
    content = bytearray(path.read_bytes())
    content[content.index(b"[0, ") + 4 if change == "record" else -1] ^= change in ("second shard", "record")
    path.write_bytes(bytes(content))
    how = {"tokenizer": "ascii" if change == "tokenizer" else "byte",
           "val_fraction": 0.2 if change == "fraction" else 0.1}
    text = VERSE + "more" * (change == "text")
    found = made(tmp_path, text, **how)
    assert (f"resuming: {kept} shards" in capsys.readouterr().out) == (kept > 0)
    assert found.sha256 == made(tmp_path / "other", text, **how).sha256


@pytest.mark.deep
def test_prepare_killed_at_random_moments(tmp_path):
    """kill -9 again and again: the bytes of a run that nobody killed."""
    write(tmp_path / "x.txt", VERSE * 2000)
    code = ("import data; data._SHARD = 200_000; data._PIECE = 10_000\n"
            f"data.prepare('{tmp_path}/x.txt', 'byte', '{tmp_path}/' + {{!r}})")
    begin, rng, kills, resumed = time.monotonic(), random.Random(0), 0, 0
    assert start(["-c", code.format("whole")]).wait() == 0
    longest = time.monotonic() - begin
    while kills < 10:
        process = start(["-c", code.format("data")])
        try:
            process.wait(rng.uniform(0.1, 1) * longest)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        else:
            resumed += "resuming" in process.stdout.read()
            assert contents(tmp_path / "data/x") == contents(tmp_path / "whole/x")
            shutil.rmtree(tmp_path / "data")
    assert resumed > 0


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
    """32 MB of spaces in 32 KB: no more of it is unpacked than the limit."""
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb") as file:
        for _ in range(32):
            file.write(b" " * 2**20)
    monkeypatch.setattr(data, "_LONGEST", 2**21)
    path, seen = write(tmp_path / "x.txt.gz", packed.getvalue()), 0
    with pytest.raises(data.UserError, match="unpacks to more than 200 times"):
        for raw in data.blocks(path):
            seen += len(raw)
    assert seen <= 2**24


def test_zstd(tmp_path, monkeypatch):
    name = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    monkeypatch.setitem(sys.modules, name, None)
    refused(lambda: made(tmp_path, b"x", "x.txt.zst"), "a .zst file", f"pip install {name}")
    monkeypatch.undo()
    pack = pytest.importorskip(name).compress
    packed = pack(VERSE.encode()) + pack(b"second frame")
    assert texts(made(tmp_path, packed, "x.txt.zst", val_fraction=0.0)) == VERSE + "second frame"
    for bad, words in ((packed[:-5], "ended before"), (packed[:50] + b"damaged" + packed[57:], "x.txt.zst"),
                       (pack(bytes(2**26).replace(b"\0", b"a")), "200 times")):
        refused(lambda: made(tmp_path, bad, "x.txt.zst"), words)


def test_parquet(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"n": [1, 2], "body": ["one", "two"]}), tmp_path / "x.parquet")
    content = (tmp_path / "x.parquet").read_bytes()
    assert texts(made(tmp_path, content, "x.parquet", field="body", val_fraction=0.0)) == "one\ntwo"
    refused(lambda: made(tmp_path, content, "x.parquet"), "no text", "only n, body: choose one with --field")
    refused(lambda: made(tmp_path, table(["a"] * 69 + [None]), "y.parquet"), "y.parquet line 70 has no text")
    refused(lambda: made(tmp_path, content[:-30], "x.parquet"), "no .parquet file")


def test_a_name_of_ones_own(tmp_path, monkeypatch):
    for name in ("one", "two"): # two sources of the same name side by side
        path = write(tmp_path / name / "verse.txt", VERSE + name)
        assert prepare(path, data_dir=tmp_path / "data", name=name) == tmp_path / "data" / name
    monkeypatch.setitem(data.DATASETS, "recall", lambda data_dir: ("made", ["d2e5"] * 9))
    assert texts(load(prepare("recall", data_dir=tmp_path, name="mine"))).split("\n")[0] == "d2e5"
    refused(lambda: prepare(path, data_dir=tmp_path, name="../up"), "--name=../up", "as up can")
    for source, name in ((path, "recall"), ("recall", "shakespeare")):
        refused(lambda: prepare(source, data_dir=tmp_path, name=name), "known dataset", f"my_{name}")


# --- corpora from a server that plays the hub, and one that plays the host it redirects to ---


class Hub(http.server.BaseHTTPRequestHandler):
    """The n-th request for a file's bytes is answered by plan[n], "ok" after the last."""
    def log_message(self, *args):
        return

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body if self.command == "GET" else b"")

    def do_GET(self):
        hub, path = self.server.hub, urllib.parse.urlsplit(self.path)
        hub.asked.append((self.server is hub.cdn, self.command, self.path, self.headers.get("Authorization")))
        body = hub.files.get(path.path.split("/resolve/")[-1].split("/", 1)[1])
        if body is None:
            self.reply(404)
        elif self.server is not hub.cdn:
            self.reply(302, **{"Location": f"{hub.cdn_url}/resolve/{path.path.split('/resolve/')[1]}",
                               "X_Linked_Size": len(body), "X_Linked_ETag": hashlib.sha256(body).hexdigest(),
                               **hub.more})
        else:
            self.blob(body, hub.plan.pop(0) if hub.plan else "ok")

    do_HEAD = do_GET

    def blob(self, body, act):
        first = int(self.headers.get("Range", "bytes=0-")[6:-1])
        if act == "ok" and first >= len(body) > 0: self.reply(416)
        elif act == "ok": self.reply(206 if first else 200, body[first:])
        elif act == "cut": self.reply(206 if first else 200, body[first:first + 1 + len(body) // 3],
                                      Content_Length=len(body) - first)
        elif act == "wrong": self.reply(200, body[::-1])
        elif act == "long": self.reply(200, body + bytes(len(body)))
        elif act == "stall":
            self.reply(200, body[:10], Content_Length=len(body))
            self.server.hub.over.wait(5)
        elif act.startswith("429"): self.reply(429, Retry_After=act[4:])
        elif act.startswith("limit"): self.reply(429, RateLimit=f'"resolvers";r=0;t={act[6:]}')
        else: self.reply(int(act))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """files {path: bytes}, plan: see Hub, asked: requests, slept: pauses of the client."""
    class State:
        files, plan, asked, slept, more, over = {}, [], [], [], {}, threading.Event()
    hub, servers = State, []
    for _ in range(2):
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub))
        servers[-1].hub, servers[-1].handle_error = hub, lambda *args: None
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
    hub.cdn, hub.cdn_url = servers[1], f"http://127.0.0.1:{servers[1].server_port}"
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{servers[0].server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(data.time, "sleep", hub.slept.append)
    words = "once upon a time there was a little cat who saw the big dog".split()
    def story(seed):
        return " ".join(random.Random(seed).choices(words, k=300)) + "."
    stories = [story(i) for i in range(60)]
    hub.stories = stories
    hub.files["TinyStoriesV2-GPT4-train.txt"] = "\n<|endoftext|>\n".join(stories[:50]).encode()
    hub.files["TinyStoriesV2-GPT4-valid.txt"] = "\n<|endoftext|>\n".join(stories[50:]).encode()
    for name, some in (("train.00000-of-01024", stories[:20]), ("train.00001-of-01024", stories[20:50]),
                       ("validation.00000-of-00008", stories[50:])):
        lines = "\n".join(json.dumps({"text": text, "url": "x"}) for text in some)
        hub.files[f"en/c4-{name}.json.gz"] = gzip.compress(lines.encode())
    yield hub
    hub.over.set()
    for server in servers:
        server.shutdown()
        server.server_close()


def corpus(tmp_path, source, **kwargs):
    return load(prepare(source, **{"tokenizer": "byte", "data_dir": tmp_path / "data", **kwargs}))


def decoded(split, codec):
    return codec.decode(whole(split))


def test_tinystories(hub, tmp_path, capsys):
    found = corpus(tmp_path, "tinystories")
    assert decoded(found.train, found.tokenizer) == "\n".join(hub.stories[:50])
    assert decoded(found.val, found.tokenizer) == "\n".join(hub.stories[50:])
    assert found.meta["source"]["from"] == "roneneldan/TinyStories@f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"
    asked = len(hub.asked)
    assert corpus(tmp_path, "tinystories").sha256 == found.sha256 and len(hub.asked) == asked
    assert "nothing to do" in capsys.readouterr().out
    char = corpus(tmp_path, "tinystories", tokenizer="char") # from the files that are there
    assert len(hub.asked) == asked and decoded(char.val, char.tokenizer) == "\n".join(hub.stories[50:])


def test_gpt2_is_the_tokenizer_of_corpora(hub, mirror, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data.main(["prepare", "tinystories", "--data_dir=data", "--max_tokens=5000"])
    monkeypatch.setattr(data, "data_dir", "data")
    monkeypatch.setattr(data, "max_tokens", 0)
    found = load("tinystories")
    assert found.tokenizer.name == "gpt2" and (len(found.train), len(found.val)) == (5000, 500)
    documents = decoded(found.train, found.tokenizer).split("<|endoftext|>")
    assert documents[:-1] == hub.stories[:len(documents) - 1] and len(documents) > 10


def test_max_tokens_takes_no_more_files_than_it_needs(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "_THREADS", 1)
    monkeypatch.setattr(data, "_PIECE", 500)
    found = corpus(tmp_path, "c4", max_tokens=10_000)
    assert decoded(found.train, found.tokenizer) == "\n".join(hub.stories)[:10_000]
    assert decoded(found.val, found.tokenizer) == "\n".join(hub.stories[50:])[:1000]
    assert not any("train.00001" in path for _, _, path, _ in hub.asked)
    assert found.meta["split"]["max_tokens"] == 10_000
    more = corpus(tmp_path, "c4", max_tokens=40_000)
    assert "is replaced" in capsys.readouterr().out and len(more.train) == 40_000
    assert decoded(more.train, more.tokenizer) == "\n".join(hub.stories)[:40_000]
    assert sum("train.00000" in path for _, _, path, _ in hub.asked) == 3 # HEAD, and GET with its redirect
    char = corpus(tmp_path, "c4", max_tokens=10_000, tokenizer="char", name="small")
    assert decoded(char.train, char.tokenizer) == "\n".join(hub.stories)[:10_000] and char.name == "small"
    refused(lambda: corpus(tmp_path, "c4", max_tokens=-1), "max_tokens")
    local = load(prepare(write(tmp_path / "verse.txt", VERSE), data_dir=tmp_path / "data", max_tokens=100))
    assert decoded(local.train, local.tokenizer) == VERSE[:100]
    assert decoded(local.val, local.tokenizer) == VERSE[int(len(VERSE) * 0.9):][:10]


def test_fineweb(hub, mirror, tmp_path, monkeypatch):
    def shard(ids):
        return np.array([20240520, 1, len(ids), *[0] * 253], "<i4").tobytes() + np.array(ids, "<u2").tobytes()
    ids = np.random.default_rng(0).integers(0, 50257, 3000)
    hub.files["fineweb_val_000000.bin"] = shard(ids[2000:])
    for k in (1, 2):
        hub.files[f"fineweb_train_{k:06d}.bin"] = shard(ids[1000 * k - 1000:1000 * k])
    monkeypatch.setattr(data, "_SHARD", 1000)
    found = corpus(tmp_path, "fineweb", tokenizer="", max_tokens=1500)
    assert whole(found.train).tolist() == ids[:1500].tolist() and found.tokenizer.name == "gpt2"
    assert whole(found.val).tolist() == ids[2000:2150].tolist()
    same = (found.folder / "train_000000.bin").read_bytes() == hub.files["fineweb_train_000001.bin"]
    assert same and "fineweb" in data.prepared(tmp_path / "data")
    refused(lambda: corpus(tmp_path, "fineweb", tokenizer="byte"), "--tokenizer=gpt2")
    hub.files["fineweb_train_000001.bin"] = shard([1, 50257])
    refused(lambda: corpus(tmp_path / "bad", "fineweb", tokenizer="", max_tokens=99), "id 50257")


def test_wikipedia_and_wikitext(hub, tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(data, "_THREADS", 1) # so that no third file is asked for
    monkeypatch.setattr(data, "_PIECE", 500)
    wikipedia = "20231101.en/train-{:05d}-of-00041.parquet"
    for number in (0, 1, 40):
        hub.files[wikipedia.format(number)] = table([f"article {number}.{i}" for i in range(700)])
    found = corpus(tmp_path, "wikipedia", max_tokens=8000)
    expected = "\n".join(f"article {number}.{i}" for number in (0, 1) for i in range(700))
    assert decoded(found.train, found.tokenizer) == expected[:8000]
    assert decoded(found.val, found.tokenizer) == "\n".join(f"article 40.{i}" for i in range(700))[:800]
    lines = [" = One = \n", "", " first . \n", " = = Part = = \n", " more \n", " = Two = \n", " second \n"]
    for part, some in ("train", lines), ("validation", lines[:5]):
        hub.files[f"wikitext-2-raw-v1/{part}-00000-of-00001.parquet"] = table(some)
    for part, some in ("train-00000-of-00002", lines[:3]), ("train-00001-of-00002", lines[3:]), (
            "validation-00000-of-00001", lines[:5]):
        hub.files[f"wikitext-103-raw-v1/{part}.parquet"] = table(some)
    for name in ("wikitext", "wikitext103"): # the second has an article that goes on in the next file
        found = corpus(tmp_path, name, tokenizer="char")
        assert decoded(found.train, found.tokenizer) == "".join(lines[:5]) + "\n" + "".join(lines[5:])
        assert decoded(found.val, found.tokenizer) == "".join(lines[:5])


@pytest.mark.parametrize("name", ["wikipedia", "wikitext"])
def test_a_table_without_pyarrow(name, hub, tmp_path, monkeypatch):
    """The package is named, and nothing is downloaded for it."""
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    refused(lambda: corpus(tmp_path, name), name, "pip install pyarrow", kind=data.DownloadError)
    assert hub.asked == []


@pytest.mark.parametrize("plan, slept", [
    (["cut", "cut", "ok"], 2), (["429 7", "limit 280", "ok"], 2), (["500", "503", "ok"], 2),
    (["wrong", "ok"], 1), (["cut", "wrong", "ok"], 2)])
def test_a_hub_that_stumbles(plan, slept, hub, tmp_path, capsys):
    hub.plan[:] = plan
    found = corpus(tmp_path, "tinystories")
    assert decoded(found.train, found.tokenizer) == "\n".join(hub.stories[:50])
    assert len(hub.slept) == slept and (slept != 2 or plan[0] != "429 7" or hub.slept == [7, 280])
    assert ("waiting 280 seconds" in capsys.readouterr().err) == (plan[0] == "429 7")


@pytest.mark.parametrize("plan, words", [
    (["wrong"] * 3, "sha256"), (["long"] * 3, "more than the expected"), (["404"], "404"), (["403"], "403"),
    (["429 301"], "429"), (["500"] * 3, "500")])
def test_a_hub_that_gives_no_file(plan, words, hub, tmp_path):
    hub.plan[:] = plan
    refused(lambda: corpus(tmp_path, "tinystories"), "could not download", words, kind=data.DownloadError)
    assert not (tmp_path / "data/tinystories").exists() and not hub.plan[:max(0, len(plan) - 3)]
    hub.plan.clear()
    assert len(corpus(tmp_path, "tinystories").val) > 0 # the next call


def test_a_hub_without_hashes_is_not_believed(hub, tmp_path):
    hub.more = {"X_Linked_ETag": '"1234"'}
    refused(lambda: corpus(tmp_path, "tinystories"), "sha256 and size", kind=data.DownloadError)


def test_what_the_hub_may_send(hub, tmp_path, monkeypatch):
    """The hash is right, and yet: a bomb, a line that fills the memory, a line that is no JSON."""
    monkeypatch.setattr(data, "_LONGEST", 2**17)
    name = "en/c4-train.00000-of-01024.json.gz"
    for k, (content, words) in enumerate([(b"\n" * 2**21, "200 times"), (b"{", "not JSON"),
                                          (os.urandom(2**17).hex().encode(), "line 1 has more")]):
        hub.files[name] = gzip.compress(content)
        refused(lambda: corpus(tmp_path / str(k), "c4"), "c4-en-c4-train.00000-of-01024.jsonl.gz", words)


def test_the_token_goes_to_the_hub_alone(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    hub.plan[:] = ["cut", "500", "ok", "404"]
    refused(lambda: corpus(tmp_path, "tinystories"), "404", kind=data.DownloadError)
    seen = {(cdn, token) for cdn, _, _, token in hub.asked}
    assert seen == {(False, "Bearer hf_canary"), (True, None)}
    said = "".join(capsys.readouterr())
    corpus(tmp_path, "tinystories")
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert "canary" not in said and b"canary" not in written
    monkeypatch.setenv("HF_TOKEN", "hf_can\nary") # requests would show it
    message = refused(lambda: corpus(tmp_path, "c4"), "HF_TOKEN has", kind=data.DownloadError)
    assert "hf_can" not in message


@pytest.mark.parametrize("url, sent", [
    ("https://huggingface.co/datasets/x", True), ("https://raw.githubusercontent.com/x", False),
    ("https://datasets-server.huggingface.co/rows", False), ("https://huggingface.co.evil.org/x", False)])
def test_no_other_server_is_sent_the_token(url, sent, monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    request = lambda method, url, headers, **how: SimpleNamespace(status_code=200, headers=headers)
    monkeypatch.setattr(data.requests, "request", request)
    headers = data.ask("GET", url).headers
    assert (headers.get("Authorization") == "Bearer hf_secret") == sent == ("hf_secret" in str(headers))


def test_the_hub_is_not_asked_offline(hub, tmp_path, monkeypatch):
    corpus(tmp_path, "tinystories")
    asked = len(hub.asked)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    corpus(tmp_path, "tinystories", tokenizer="ascii")
    refused(lambda: corpus(tmp_path, "c4"), "HF_HUB_OFFLINE", kind=data.DownloadError)
    assert len(hub.asked) == asked


# --- streams ---


def in_order(ids, T, seed, count, chunk):
    """The first `count` windows of a stream, from all of its ids, by its rule."""
    found, k = [], 0
    while len(found) < count:
        for first in range(0, len(ids), chunk // T * T):
            some = ids[first:first + chunk // T * T + 1]
            if n := (len(some) - 1) // T:
                found += [some[i * T:i * T + T + 1] for i in np.random.default_rng([seed, k]).permutation(n)]
                k += 1
    return np.array(found[:count]).astype(np.int64)


@pytest.fixture
def small(hub, monkeypatch):
    """Small chunks, and corpora that end with the files that the hub has."""
    for name, value in (("_CHUNK", 1000), ("_PIECE", 400), ("_VALIDATION", 1000)):
        monkeypatch.setattr(data, name, value)
    def those(repo, revision, data_dir, read, path, numbers=(0,), first=0):
        there = [number for number in numbers if path.format(number) in hub.files]
        return real(repo, revision, data_dir, read, path, there, first)
    real = data.hub_files
    monkeypatch.setattr(data, "hub_files", those)


@pytest.mark.parametrize("kind, tokenizer", [
    ("c4", "byte"), ("folder", "byte"), pytest.param("c4", "gpt2", marks=pytest.mark.deep),
    *(pytest.param(kind, "byte", marks=pytest.mark.deep) for kind in ("txt", "jsonl", "wikitext")),
    pytest.param("fineweb", "gpt2", marks=pytest.mark.deep)])
def test_a_stream_gives_the_windows_of_the_whole_text(kind, tokenizer, hub, small, tmp_path, capsys, request):
    """Two epochs, as computed from all ids; and the same steps from the place of any of them."""
    data.say_once.cache_clear()
    if tokenizer == "gpt2":
        request.getfixturevalue("mirror")
    if kind == "wikitext":
        pytest.importorskip("pyarrow")
    source = str(sources(tmp_path, hub)[kind][0])
    how = {"tokenizer": tokenizer, "data_dir": tmp_path / "data"}
    own = source in data.CORPORA
    ids = whole(load(prepare(source, **how, val_fraction=0.1 if own else 0.0)).train)
    found, T, B, seed = data.stream(source, **how, val_fraction=0.1), 37, 5, 7
    val = whole(found.val)
    if not own: # the start of the text, which is not trained on
        assert len(val) > 50 and (ids[:len(val)] == val).all()
        ids = ids[len(val):]
    steps = 2 * len(ids) // (T * B)
    expected = in_order(ids, T, seed, steps * B, 1000).reshape(steps, B, T + 1)
    places = []
    for step in range(steps):
        places.append(json.loads(json.dumps(found.train.place(step * B))))
        x, y = found.train.batch(step, B, T, seed)
        assert (x.numpy() == expected[step, :, :-1]).all() and (y.numpy() == expected[step, :, 1:]).all()
    assert capsys.readouterr().out.count("begins again") == 1 and len({*map(tuple, places)}) > 3
    for step in range(0, steps, 1 + steps // 9):
        again = data.stream(source, **how, val_fraction=0.1, place=places[step])
        assert again.sha256 == found.sha256
        for later in range(step, min(step + 2, steps)):
            assert (again.train.batch(later, B, T, seed)[1].numpy() == expected[later, :, 1:]).all()
    assert (again.train.batch(0, B, T, seed)[1].numpy() == expected[0, :, 1:]).all() # back at the start


def test_a_stream_goes_on_without_what_came_before(hub, small, tmp_path, monkeypatch):
    """Neither the files before its place are asked for, nor are their texts encoded."""
    monkeypatch.setattr(data, "_THREADS", 1)
    found = data.stream("c4", "byte", tmp_path / "data")
    for step in range(20):
        found.train.batch(step, 10, 200, 0)
    place = found.train.place(200)
    assert place[2] == 1 and "\n".join(hub.stories[50:])[:1000] == found.tokenizer.decode(whole(found.val))
    expected = found.train.batch(20, 10, 200, 0)[0]
    hub.asked.clear()
    encoded, encode = [], data.ByteTokenizer.encode
    counting = lambda codec, text: encoded.append(len(text)) or encode(codec, text)
    monkeypatch.setattr(data.ByteTokenizer, "encode", counting)
    again = data.stream("c4", "byte", tmp_path / "other", place=place)
    validated = sum(encoded)
    assert (again.train.batch(20, 10, 200, 0)[0] == expected).all()
    assert not any("train.00000" in path for _, _, path, _ in hub.asked)
    assert sum(encoded) - validated < 9000 # two chunks, and what is read ahead


def test_what_a_stream_refuses(hub, small, tmp_path):
    path, place = str(write(tmp_path / "x.txt", VERSE)), tmp_path / "data"
    prepare(path, data_dir=place)
    for source, tokenizer, words in (
            (path, "char", "--tokenizer=gpt2, byte or ascii"), ("shakespeare", "", "drop --stream"),
            ("fineweb", "byte", "--tokenizer=gpt2"), (str(place / "x"), "byte", "prepared already: drop"),
            ("x", "byte", "prepared already: drop --stream"), ("nowhere", "byte", "no text file")):
        refused(lambda: data.stream(source, tokenizer, place), words)
    refused(lambda: data.stream(path, "byte", place, 1.5), "val_fraction")
    short = data.stream(path, "byte", place)
    refused(lambda: short.train.batch(0, 1, 5000, 0), "x.txt has no 5001 tokens", "lower --block_size")
    hub.files["en/c4-train.00001-of-01024.json.gz"] = gzip.compress(b"{") # met in the second chunks' thread
    found = data.stream("c4", "byte", place)
    refused(lambda: [found.train.batch(step, 10, 200, 0) for step in range(99)], "00001", "not JSON")


FLAGS = ("--dataset=c4 --stream --tokenizer=byte --n_layer=1 --n_head=2 --n_embd=32 --block_size=32 "
         "--dropout=0.1 --batch_size=4 --warmup_iters=2 --log_interval=1 --eval_interval=10 "
         "--checkpoint_interval=3 --sample_tokens=4 --schedule=constant").split()


def training(tmp_path, name, *flags, **env):
    """train.py on the stream of c4, with chunks of 15 windows: a step in four takes windows of two chunks."""
    code = (f"import runpy, sys\nsys.argv, sys.path[:0] = sys.argv[1:], [{str(ROOT)!r}]\nimport data\n"
            "data._CHUNK, data._PIECE, data._VALIDATION = 500, 400, 1000\n"
            "runpy.run_path(sys.argv[0], run_name='__main__')")
    return start(["-c", code, ROOT / "train.py", f"--data_dir={tmp_path / 'data'}",
                  f"--out_dir={tmp_path / name}", *FLAGS, *flags], env=env)


def trained(process, code=0):
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, out + err
    return out + err


def weights(folder):
    return load_checkpoint(folder / "ckpt.pt")["model"]


@pytest.mark.deep
def test_train_on_a_stream(hub, tmp_path):
    said = trained(training(tmp_path, "o", "--max_iters=3"))
    assert "data c4: streamed training and 1,000 validation tokens, vocabulary 256" in said
    assert load_checkpoint(tmp_path / "o/ckpt.pt")["stream"][:2] == [0, 0]
    assert not (tmp_path / "data/c4").exists()


@pytest.mark.deep
def test_a_killed_run_on_a_stream_ends_in_the_same_bits(hub, tmp_path):
    """kill -9 at random steps. The second time, the first file is gone: the run has passed it."""
    trained(training(tmp_path, "calm", "--max_iters=300"))
    wanted, rng = weights(tmp_path / "calm"), random.Random(3)
    for step in (30, 225): # in the first file, and in the second
        process = training(tmp_path, f"killed_{step}", "--max_iters=300")
        log, begin = tmp_path / f"killed_{step}/metrics.jsonl", time.monotonic()
        step += rng.randrange(20)
        while not log.exists() or log.read_bytes().count(b"train_loss") < step:
            threading.Event().wait(0.005) # the hub has replaced time.sleep
            assert time.monotonic() < begin + 100
        process.kill()
        assert process.wait() == -9
        if step >= 225:
            (tmp_path / "data/c4-en-c4-train.00000-of-01024.jsonl.gz").unlink()
            del hub.files["en/c4-train.00000-of-01024.json.gz"]
        assert "RESUMING from" in trained(training(tmp_path, log.parent.name, "--resume"))
        found = weights(log.parent)
        assert all((found[name] == wanted[name]).all() for name in wanted)
    said = trained(training(tmp_path, "killed_30", "--resume", "--tokenizer=ascii"), 2)
    assert "not the data this run was trained on" in said


@pytest.mark.deep
def test_two_processes_take_the_batches_of_one(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    flags = ("--max_iters=40", "--dropout=0")
    trained(training(tmp_path, "one", *flags))
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) # torchrun holds one too
    pair = [training(tmp_path, "two", *flags, WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank),
                     MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port)) for rank in range(2)]
    for process in pair:
        trained(process)
    one, two = ([json.loads(line)["train_loss"] for line in (tmp_path / name / "metrics.jsonl").open()
                 if "train_loss" in line] for name in ("one", "two"))
    np.testing.assert_allclose(one, two, rtol=1e-4)


@pytest.mark.deep
def test_a_hostile_hub_200_times(hub, tmp_path, monkeypatch):
    """Whatever comes in whatever order: the right bytes or a refusal, soon."""
    monkeypatch.setattr(data, "_TIMEOUT", (5, 0.1))
    monkeypatch.setattr(data, "_THREADS", 1)
    monkeypatch.setattr(data, "_PIECE", 500) # reads little ahead: there are two files
    acts = ["ok", "cut", "wrong", "long", "stall", "429 1", "429 999", "limit 3", "404", "500", "503"]
    right, outcomes = None, []
    for run_number in range(200):
        rng = random.Random(run_number)
        hub.plan[:] = [rng.choice(acts) for _ in range(rng.randrange(1, 9))]
        begin = data.time.monotonic()
        try:
            sha256 = corpus(tmp_path / str(run_number // 2), "c4", max_tokens=40_000).sha256
            outcomes.append("done")
            right = right or sha256
            assert sha256 == right
        except data.DownloadError:
            outcomes.append("refused")
        assert data.time.monotonic() - begin < 30
    assert min(outcomes.count("done"), outcomes.count("refused")) > 20


# --- the configs that train on corpora ---


SMALL = ("--n_layer=2 --n_head=2 --n_embd=32 --mlp_hidden=64 --block_size=32 --batch_size=2 --max_iters=200 "
         "--gradient_accumulation_steps=1 --eval_interval=100 --sample_tokens=5 --warmup_iters=10").split()


@pytest.mark.deep
@pytest.mark.parametrize("config, corpus_name, flags", [
    ("train_tinystories_sota", "tinystories", ()),
    ("train_c4_kepler", "c4", ("--sparse_interval=10", "--sparse_boost_steps=5")),
    ("train_wikipedia_optimus", "wikipedia", ("--q_rank=16", "--kv_rank=16", "--rope_dim=8")),
    ("train_wikitext_llama", "wikitext", ()), ("gpt2_124m_fineweb", "fineweb", ())])
def test_a_config_trains_on_its_corpus(config, corpus_name, flags, hub, mirror, tmp_path, monkeypatch):
    """200 steps of a small model on what the hub serves; the loss falls. The config's own corpus is taken."""
    chosen = runpy.run_path(str(ROOT / f"config/{config}.py"))
    assert chosen["dataset"] == corpus_name and chosen["offline_dataset"]
    if corpus_name in ("wikipedia", "wikitext"):
        pytest.importorskip("pyarrow")
        for number in (0, 40):
            hub.files[f"20231101.en/train-{number:05d}-of-00041.parquet"] = table(hub.stories)
        for part in ("train", "validation"):
            hub.files[f"wikitext-2-raw-v1/{part}-00000-of-00001.parquet"] = table(hub.stories)
    ids = make_tokenizer("gpt2", "", tmp_path).encode(" ".join(hub.stories))
    for name in ("val_000000", "train_000001"):
        header = np.array([20240520, 1, len(ids), *[0] * 253], "<i4").tobytes()
        hub.files[f"fineweb_{name}.bin"] = header + ids.astype("<u2").tobytes()
    monkeypatch.setattr(data, "_THREADS", 1) # so that no more is read than is needed
    monkeypatch.setattr(data, "_PIECE", 500)
    kind = chosen["tokenizer"] if corpus_name != "fineweb" else ""
    prepare(corpus_name, kind, tmp_path / "data", max_tokens=5_000)
    out = tmp_path / "out"
    result = run([ROOT / "train.py", ROOT / f"config/{config}.py", f"--data_dir={tmp_path / 'data'}",
                  f"--out_dir={out}", *SMALL, *flags], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    assert len(losses) == 3 and losses[-1] < losses[0] - 0.5, losses
