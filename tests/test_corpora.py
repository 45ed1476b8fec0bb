"""data.py: texts of any size and form, and known corpora, in little memory and from a hub that misbehaves."""
import json
import random

import pytest

import data
from data import load, make_tokenizer, prepare
from processes import ROOT, run
from test_data import NASTY, VERSE, hf, made, refused, whole, write

PROSE = "".join(random.Random(0).choices(["word", "don't", " ", "  ", "\n", "\n\n", "12", "?!", "\u4e2d",
                                          "e\u0301", "\t", "\u3000", "\r\n", "x'll", "\U0001f600"], k=3000))


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
