"""sample.py and bench.py through their command lines, on a run of a few steps."""
import contextlib
import io
import json
import os
import pty
import re
import runpy
import shutil
import signal
import sys
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import bench
from configurator import UserError
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint
from processes import ROOT, run, start
from sample import capture
import sample as sample_module
from sample import stream


deep = pytest.mark.deep


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with runs of a few steps, "char" and "byte", after their tokenizers. char has both heads."""
    d = tmp_path_factory.mktemp("sample")
    (d / "play.txt").write_text("to be or not to be, that is the question\n" * 60, encoding="utf-8")
    flags = ("--dataset=play.txt --n_layer=1 --n_head=2 --n_embd=32 --block_size=16 --attention=diff_mla "
             "--n_ahead=2 --max_iters=30 --learning_rate=1e-2 --warmup_iters=5").split()
    for name, more in (("char", ["--uncertainty"]), ("byte", [])):
        own = [f"--tokenizer={name}", f"--out_dir={name}", f"--data_dir=data/{name}", *more]
        done = run([ROOT / "train.py", *flags, *own], cwd=d)
        assert done.returncode == 0, done.stderr
    return d


def sample(folder, *flags, out="char", code=0, **how):
    done = run([ROOT / "sample.py", f"--out_dir={folder / out}", *flags], cwd=folder, timeout=60, **how)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return done


def char_to_id(folder):
    return load_checkpoint(folder / "char/best.pt")["tokenizer"]["char_to_id"]


@pytest.fixture
def inside(trained, tmp_path, monkeypatch, capsys):
    """sample.py in this process, without starting one: its stdout, or the UserError that would end it."""
    def call(*flags, input=None, closed=False):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "excepthook", sys.excepthook) # configure sets another
        monkeypatch.setattr(sys, "argv", ["sample.py", f"--out_dir={trained / 'char'}", *flags])
        ours, theirs = os.dup(0), os.open(os.devnull, os.O_RDONLY)
        if input is not None:
            (tmp_path / "stdin").write_text(input, encoding="utf-8")
            theirs = os.open(tmp_path / "stdin", os.O_RDONLY)
        os.dup2(theirs, 0)
        try:
            with open(0, encoding="utf-8", closefd=False) as stdin:
                monkeypatch.setattr(sys, "stdin", None if closed else stdin)
                runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
        finally:
            os.dup2(ours, 0)
        return capsys.readouterr().out
    return call


def test_the_text_is_the_models(trained):
    """Greedy text is the argmax of the full forward, token after token."""
    out = sample(trained, "--start=to be", "--max_new_tokens=40", "--temperature=0").stdout.rstrip("\n")
    state = load_checkpoint(trained / "char/best.pt")
    stoi = state["tokenizer"]["char_to_id"]
    model, ids = GPT.from_checkpoint(trained / "char/best.pt"), [stoi[c] for c in "to be"]
    with torch.no_grad():
        for _ in range(40):
            start = 0 if len(ids) <= 16 else -(-(len(ids) - 16) // 8) * 8
            ids.append(model(torch.tensor([ids[start:]]))[0][0, -1].argmax().item())
    itos = {i: c for c, i in stoi.items()}
    assert out == "".join(itos[i] for i in ids).rstrip("\n")


def test_the_seed_decides(trained):
    a, b, c = (sample(trained, "--max_new_tokens=60", f"--seed={s}").stdout for s in (1, 1, 2))
    assert a == b != c


@pytest.mark.parametrize("flags", [
    ["--interactive"], pytest.param([], marks=pytest.mark.deep),
    pytest.param(["--num_samples=3"], marks=pytest.mark.deep)], ids=str)
def test_steps_of_fixed_shape_write_the_seeds_text(trained, flags):
    """Through window moves, in several rows, and in a conversation that reuses one Decoder."""
    said = "to be\nthat\ntemperature=0.5\nto be\n" if "--interactive" in flags else None
    eager, graph = (sample(trained, "--start=to be", "--max_new_tokens=40", f"--decode={name}", *flags,
                           input=said).stdout for name in ("eager", "graph"))
    assert eager == graph and "to be" in graph


def test_what_steps_of_fixed_shape_do_not_do_is_said():
    for change, words in ((dict(depths=(1, 2)), "depths"), (dict(memory_slots=2), "memory")):
        model = GPT(GPTConfig(vocab_size=9, block_size=8, n_layer=2, n_head=2, n_embd=16, **change))
        with contextlib.redirect_stderr(io.StringIO()) as err:
            assert len([*stream(model, torch.zeros(1, 1, dtype=torch.long), 3, graph=True)]) == 3
        assert words in err.getvalue() and err.getvalue().count("\n") == 1


def settings(monkeypatch, **values):
    """sample.py's settings and what its last lines make of them, in the imported module."""
    usual = dict(lines="", stops=[], generator=torch.Generator(), device="cpu", about="it")
    for name, value in (usual | values).items():
        monkeypatch.setattr(sample_module, name, value, raising=False)
    sample_module.writer_of.cache_clear()


def test_why_no_graph_is_taken_is_said_once(monkeypatch, capsys):
    """Not by each of the writers of an answer, nor for each answer of a conversation."""
    knobs = dict(vocab_size=9, block_size=8, n_layer=2, n_head=2, n_embd=16, memory_slots=2, n_ahead=2)
    settings(monkeypatch, model=GPT(GPTConfig(**knobs)), decode="graph")
    for speculative in (True, False) * 2:
        writer = sample_module.writer_of(1, True, speculative, 1.0, 0, 1.0, 0.0)
        assert type(writer) is (sample_module.Speculation if speculative else sample_module.Text)
    assert capsys.readouterr().err.count("memory") == 1


def test_speed_is_of_steps_without_captures(monkeypatch):
    """All graphs of the timed text have been captured by the text before it; of plain decoding as well."""
    counts, clock = [], [0.0]

    class Writer(SimpleNamespace):
        def steps(self, rows, count):
            counts.append((self.took, count))
            for _ in range(count):
                clock[0] += self.took + 100 * (len(counts) % 2) # the first time of each takes long
                yield [[0]]

    monkeypatch.setattr(sample_module.time, "perf_counter", lambda: clock[0])
    assert sample_module.speed_up([[0]], 50, Writer(took=1), Writer(took=3)) == pytest.approx(3)
    assert counts == [(1, 50)] * 2 + [(3, 50)] * 2


def test_a_text_too_short_to_be_timed_has_no_speed(trained):
    assert "times as fast" not in sample(trained, "--speculative", "--max_new_tokens=1").stderr


def test_several_samples(trained):
    done = sample(trained, "--num_samples=3", "--max_new_tokens=20", "--start=to")
    parts = done.stdout.split("---------------")
    assert len(parts) == 4 and parts[3].strip() == "" and len(set(parts[:3])) > 1


def test_a_prompt_from_a_file_and_longer_than_the_context(trained):
    (trained / "prompt.txt").write_text("to be or not to be, that is", encoding="utf-8")
    done = sample(trained, "--start=FILE:prompt.txt", "--max_new_tokens=5")
    assert done.stdout.startswith("to be or not to be, that is")
    assert "27 tokens, the model reads at most the last 16" in done.stderr


def test_conversation(trained):
    """A line goes on behind all text before it; the sum of the answers is one greedy text, until /reset."""
    lines = ("temperature=0\nto be\nnot\nmax_new_tokens=24\n/reset\nto be\nhelp\ntop_p=3\nto be\ntop_p=0.9\n"
             "top_k=abc\nЖ\n\ntemperature=nan\nmax_new_tokens=0\nnot\nmax_new_tokens=3\nnot\n/quit\nnever\n")
    done = sample(trained, "--interactive", "--max_new_tokens=12", "--json", input=lines)
    out = [json.loads(line) for line in done.stdout.splitlines()]
    assert [said["prompt"] for said in out] == ["to be", "not", "to be", "not"]
    assert [len(said["tokens"]) for said in out] == [12, 12, 24, 3] and "> " not in done.stderr
    model, stoi = GPT.from_checkpoint(trained / "char/best.pt"), char_to_id(trained)
    ids = torch.tensor([[stoi[c] for c in "to be" + out[0]["text"] + "not"]])
    ids = model.generate(ids, 12, temperature=0)[0, ids.size(1) :]
    assert ids.tolist() == [token["id"] for token in out[1]["tokens"]]
    assert out[2]["text"].startswith(out[0]["text"])
    for words in ("temperature = 0.0", "error: top_p=3.0 must be in (0, 1]", "top_p = 0.9",
                  "error: top_k = 'abc'", "characters that the model does not know: 'Ж'", "/reset forgets",
                  "error: temperature = 'nan'", "max_new_tokens must be at least 1"):
        assert words in done.stderr, words


def test_settings_are_not_in_the_story(trained):
    """`sample.py ... > story.txt`: stdout is the text alone."""
    done = sample(trained, "--start=to be", "--max_new_tokens=5")
    assert done.stdout.startswith("to be") and " start='to be' max" in done.stderr


@pytest.mark.parametrize("sign", ["torch", "to be"])
def test_ctrl_c_ends_in_one_line(trained, sign):
    """While torch is imported (importtime writes a line after each module), and in the midst of a text."""
    more = {"PYTHONPROFILEIMPORTTIME": "1"} if sign == "torch" else {}
    endless = [f"--out_dir={trained / 'char'}", "--start=to be", "--max_new_tokens=100000"]
    process = start([ROOT / "sample.py", *endless], env=more)
    while sign not in (line := (process.stderr if sign == "torch" else process.stdout).readline()):
        assert line
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    said = [s for s in err.splitlines() if not s.startswith(("import time:", "settings:", " " * 10))]
    assert process.returncode == 130 and said == ["stopped"]


@pytest.mark.deep
@pytest.mark.parametrize("flags", [[], ["--speculative"], ["--decode=graph"]], ids=str)
def test_ctrl_c_stops_the_writing_alone(flags, trained):
    """At a terminal: what was written until then is the context of the next answer. Ctrl-D ends."""
    ours, theirs = pty.openpty()
    endless = ["--interactive", "--max_new_tokens=1000000", "--temperature=0", *flags]
    process = start([ROOT / "sample.py", f"--out_dir={trained / 'char'}", *endless], stdin=theirs)
    os.close(theirs)
    os.write(ours, b"to be\n")
    begun = process.stdout.read(60)
    process.send_signal(signal.SIGINT)
    os.write(ours, b"max_new_tokens=5\nnot\n\x04")
    out, err = process.communicate(timeout=60)
    os.close(ours)
    counts = [int(count) for count in re.findall(r"^(?:> )?(\d+) tokens, ", err, re.M)]
    assert process.returncode == 0 and err.count("> ") == 4 and counts[0] > 50 and counts[1] == 5, err
    model, stoi = GPT.from_checkpoint(trained / "char/best.pt"), char_to_id(trained)
    itos, ids, want = {i: c for c, i in stoi.items()}, [], ""
    for said, count in zip(("to be", "not"), counts):
        ids += [stoi[c] for c in said]
        new = model.generate(torch.tensor([ids]), count, temperature=0)[0, len(ids) :].tolist()
        ids, want = ids + new, want + said + "".join(itos[i] for i in new) + "\n"
    assert begun + out == want


@pytest.mark.deep
def test_ctrl_c_at_the_worst_moment_counts_what_was_written(trained, tmp_path):
    """It comes when a token is in one list of the text and not yet in the other."""
    source, taken = (ROOT / "sample.py").read_text(encoding="utf-8"), "self.tokens.append(token)"
    assert source.count(taken) == 1
    broken = source.replace(taken, taken + "\n        if len(self.tokens) == 20: raise KeyboardInterrupt")
    (tmp_path / "sample.py").write_text(broken, encoding="utf-8")
    done = run([tmp_path / "sample.py", f"--out_dir={trained / 'char'}", "--interactive", "--start=to be",
                "--temperature=0"], env={"PYTHONPATH": str(ROOT)}, input="")
    assert done.returncode == 0 and done.stderr.count("\n19 tokens, ") == 1, done.stderr
    assert len(done.stdout) == len("to be") + 19 + 1


@pytest.mark.parametrize("flag, words", [
    ("--start=FILE:latin.txt", "latin.txt is not UTF-8"), ("--seed=-1", "in [0, 2**64)"),
    (f"--seed={2**64}", "in [0, 2**64)"), ("--max_new_tokens=0", "at least 1"), ("--top_k=1.5", "an int"),
    ("--temperature=nan", "not nan"), ("--cache_dtype=int2", "'int2' is none of auto, int8, int4"),
    ("--start=LINES:empty.txt", "at least 1"), ("--start=- --interactive", "drop one"),
    ("--start=LINES:empty.txt --interactive", "drop one"),
    ("--speculative --draft=none", "'none' is none of auto, ahead, ngram")])
def test_what_cannot_be_sampled(flag, words, inside, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    (tmp_path / "empty.txt").write_text("\n \n", encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(words)):
        inside(*flag.split())


@pytest.mark.parametrize("flag", ["--interactive", "--start=-", "--start=LINES:-"])
def test_a_closed_standard_input_is_said(flag, inside):
    """Python has None in its place."""
    with pytest.raises(UserError, match="standard input is closed"):
        inside(flag, closed=True)


def test_json_stays_json_without_a_compiler(trained):
    done = sample(trained, "--json", "--max_new_tokens=3", env={"CC": "/nowhere"})
    assert "NO WORKING C COMPILER" in done.stderr and len(json.loads(done.stdout)["tokens"]) == 3


@deep
def test_a_pipe_in_which_nothing_happens_is_said(trained):
    """The prompt that comes too late would be ignored in silence."""
    process = start([ROOT / "sample.py", f"--out_dir={trained / 'char'}", "--max_new_tokens=3"])
    assert "nothing came through standard input in a second" in "".join(iter(process.stderr.readline, ""))
    assert process.communicate(timeout=60) and process.returncode == 0


def test_a_text_is_decoded_once(monkeypatch):
    """Not anew for each token; with its spaces, of a tokenizer that drops the space in front of a text."""
    words, decoded = ["to", "be", "or", "", "not"], []

    def readable(ids):
        decoded.extend(ids)
        return " ".join(words[i] for i in ids)

    codec = SimpleNamespace(eot=None, readable=readable)
    settings(monkeypatch, tokenizer=codec, uncertainty=False, max_new_tokens=10**6)
    ids = torch.randint(5, (400,), generator=torch.Generator().manual_seed(1)).tolist()
    text = sample_module.Continuation("to be", [0, 1])
    for n, token in enumerate(ids, start=1):
        text.take({"id": token}, 1.0)
        assert text.text == "".join(" " + words[i] for i in ids[:n])
    assert text.ids == [0, 1, *ids] and text.printing == "to be" + text.text and len(decoded) < 4 * len(ids)


def cut_at_stops(text, stops):
    """The shortest beginning of text that ends where a stop string begins, or all of it."""
    return min((text.partition(string)[0] for string in stops), key=len, default=text)


@pytest.mark.parametrize("stops", [[], ["b"], ["ab", "ba"], ["aab", "aaab"], ["a\u20ac"],
                                   ["\u20ac\u20ac", "bbb"]], ids=repr)
def test_a_stop_string_is_never_shown(stops, monkeypatch):
    """Of random texts in tokens of one to three bytes, which may end inside a character: at every token what
    is shown is a beginning of the right text, and nothing longer than needed is held back.
    """
    generator, pieces = torch.Generator().manual_seed(1), []

    def readable(ids):
        return b"".join(pieces[i] for i in ids).decode("utf-8", "replace")

    codec = SimpleNamespace(eot=None, readable=readable)
    settings(monkeypatch, tokenizer=codec, stops=stops, uncertainty=False, max_new_tokens=10**6)
    for _ in range(40):
        raw = "".join("ab\u20ac"[i] for i in torch.randint(3, (12,), generator=generator)).encode()
        sizes = torch.randint(1, 4, (40,), generator=generator).cumsum(0).tolist()
        pieces[:] = [raw[a:b] for a, b in zip([0, *sizes], sizes) if a < len(raw)]
        text = sample_module.Continuation("", [])
        for n in range(1, len(pieces) + 1):
            text.take({"id": n - 1}, 1.0)
            so_far = b"".join(pieces[:n]).decode("utf-8", "ignore") # without half a character
            right, shown = cut_at_stops(so_far, stops), text.printing
            assert right.startswith(shown)
            assert bool(text.finish) == any(string in so_far for string in stops)
            held = right[len(shown) :]
            assert not held if text.finish else held == "" or any(s.startswith(held) for s in stops)
            if text.finish:
                break
        assert text.text.startswith(shown) and (not text.finish or text.text == shown == right)


@pytest.mark.parametrize("more", [pytest.param([], marks=deep), pytest.param(["--temperature=0"], marks=deep),
                                  ["--speculative"]], ids=str)
def test_prompts_in_a_file_and_what_json_says_of_each(more, inside, trained, tmp_path):
    """Rows end by themselves; each number is that of a full forward. Drafts change no greedy text."""
    (tmp_path / "prompts.txt").write_text("to be\n\nthat is the question\nnot\n", encoding="utf-8")
    flags = ["--json", "--max_new_tokens=30", "--start=LINES:prompts.txt", "--stop=t t||\\n||, "]
    model, stoi = GPT.from_checkpoint(trained / "char/best.pt"), char_to_id(trained)
    found = [json.loads(line) for line in inside(*flags, *more).splitlines()]
    assert [said["prompt"] for said in found] == ["to be", "that is the question", "not"]
    for said in found:
        text, ids = "".join(token["text"] for token in said["tokens"]), [stoi[c] for c in said["prompt"]]
        assert said["text"] == cut_at_stops(text, ["t t", "\n", ", "])
        assert said["finish_reason"] == ("length" if said["text"] == text else "stop")
        assert len(said["tokens"]) == 30 or said["finish_reason"] == "stop"
        assert 0 < said["seconds_to_first_token"] and 0 < said["tokens_per_second"]
        for token in said["tokens"]:
            h = model.trunk(torch.tensor([ids[stream_start(len(ids)) :]]))[:, -1]
            logp = model.logits(h).log_softmax(-1)[0, token["id"]].item()
            assert token["model_logprob"] == pytest.approx(logp, abs=1e-4)
            assert token["uncertainty"] == pytest.approx(model.uncertainty(h).item(), abs=1e-4)
            ids.append(token["id"])
    if "--temperature=0" in more:
        drafted = [json.loads(line) for line in inside(*flags, *more, "--speculative").splitlines()]
        assert [said["text"] for said in drafted] == [said["text"] for said in found]


def stream_start(n):
    return 0 if n <= 16 else -(-(n - 16) // 8) * 8


def test_standard_input_is_a_prompt(inside):
    """With --start=-, or piped in; echo's line end is dropped; nothing piped in is no prompt."""
    flags = "--max_new_tokens=9", "--temperature=0"
    plain = inside(*flags, "--start=to be")
    assert inside(*flags, "--start=-", input="to be\n") == inside(*flags, input="to be\n") == plain
    assert inside(*flags, input="") == inside(*flags) == inside(*flags, "--start=\n")
    assert inside(*flags, "--start=that", input="to be") == inside(*flags, "--start=that")
    two = inside(*flags, "--start=LINES:-", input="to be\nthat\n")
    assert two.startswith(plain + "---------------\nthat")


def test_half_characters_wait(trained):
    """Of text written byte by byte only whole characters are shown, and nothing steers the terminal."""
    # UTF-8, or run would fail
    wild = sample(trained, "--max_new_tokens=200", "--temperature=3", out="byte").stdout
    assert len(wild) > 100
    assert not any(ord(c) < 32 and c not in "\n\t" or 127 <= ord(c) < 160 for c in wild)


def test_a_character_of_three_tokens(trained, tmp_path):
    """A model that can only write the bytes of the euro sign: shown whole, never in parts."""
    state = load_checkpoint(trained / "byte/best.pt")
    config = GPTConfig(**state["config"]["model"])
    model = GPT(config)
    model.load_state_dict(state["model"])
    block, (a, b, c) = model.blocks[0], "\u20ac".encode()
    # the head looks up the embedding of the token just read, in one block that does nothing
    with torch.no_grad():
        for p in (block.attention.out.weight, block.mlp.down.weight, model.embed.weight, model.head.weight):
            p.zero_()
        # apart from the embedding
        model.head.weight = torch.nn.Parameter(torch.zeros_like(model.embed.weight))
        for axis, (now, after) in enumerate([(10, a), (a, b), (b, c), (c, a)]):
            model.embed.weight[now, axis] = 1
            model.head.weight[after, axis] = 9
    state["model"] = model.state_dict()
    state["config"]["model"]["tie_embeddings"] = False
    (tmp_path / "o").mkdir()
    save_checkpoint(tmp_path / "o/ckpt.pt", state)
    assert sample(tmp_path, "--max_new_tokens=9", "--temperature=0", out="o").stdout.strip() == "\u20ac" * 3


def test_a_damaged_best_is_said_and_the_newest_is_used(trained, tmp_path):
    shutil.copytree(trained / "char", tmp_path / "char")
    (tmp_path / "char/best.pt").write_bytes((tmp_path / "char/best.pt").read_bytes()[:-9])
    done = sample(tmp_path, "--max_new_tokens=3")
    assert "WARNING" in done.stderr and "ckpt.pt: diff_mla" in done.stderr


@pytest.mark.parametrize("how", ["", "--speculative", "--speculative --draft=ngram", "--decode=graph"])
def test_a_cache_of_few_bits(trained, how, monkeypatch):
    """--cache_dtype reaches every cache that a way of decoding makes."""
    made, new_cache = [], GPT.new_cache
    monkeypatch.setattr(GPT, "new_cache", lambda *a, **k: made.append(new_cache(*a, **k)) or made[-1])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook) # configure sets another
    argv = ["sample.py", f"--out_dir={trained / 'char'}", "--max_new_tokens=3", "--cache_dtype=int4"]
    monkeypatch.setattr(sys, "argv", argv + how.split())
    runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
    assert made and all(cache.bits == [4] for cache in made)


@pytest.mark.parametrize("draft", ["ahead", pytest.param("ngram", marks=pytest.mark.deep)])
def test_speculative_text_is_the_same(trained, draft):
    flags = ["--start=to be", "--max_new_tokens=60", "--temperature=0"]
    plain = sample(trained, *flags).stdout
    for decode in ("eager", "graph"):
        ours = sample(trained, *flags, "--speculative", f"--draft={draft}", f"--decode={decode}")
        assert ours.stdout == plain and plain.startswith("to be")
        for words in ("tokens per forward", "drafts kept", "times as fast as plain cached decoding"):
            assert words in ours.stderr


def test_speculative_samples_of_several_rows(trained):
    done = sample(trained, "--num_samples=3", "--max_new_tokens=20", "--start=to", "--speculative")
    parts = done.stdout.split("---------------")
    assert len(parts) == 4 and len(set(parts[:3])) > 1


def test_the_newest_run_is_taken_and_none_is_said(trained, tmp_path):
    done = run([ROOT / "sample.py"], cwd=tmp_path)
    assert done.returncode == 2 and "no run below out yet" in done.stderr and "Traceback" not in done.stderr
    (tmp_path / "out").mkdir()
    for name, age in (("older", 2000), ("newer", 1000)):
        shutil.copytree(trained / "char", tmp_path / "out" / name)
        for f in (tmp_path / "out" / name).glob("*.pt"):
            os.utime(f, (10**9 - age, 10**9 - age))
    done = run([ROOT / "sample.py", "--max_new_tokens=3"], cwd=tmp_path)
    assert done.returncode == 0 and "out/newer/best.pt" in done.stderr


def test_one_checkpoint_of_a_run(trained):
    path = str(trained / "char/ckpt.pt")
    assert sample_module.load(path)[2].startswith(f"{path}: diff_mla")


def test_drafts_of_a_cell_that_is_not_there(trained, tmp_path):
    state = load_checkpoint(trained / "char/best.pt")
    state["model"] = {k: v for k, v in state["model"].items() if not k.startswith("extras")}
    state["config"]["model"].update(n_ahead=0, uncertainty=False)
    (tmp_path / "o").mkdir()
    save_checkpoint(tmp_path / "o/ckpt.pt", state)
    assert "--n_ahead=7" in sample(tmp_path, "--speculative", "--draft=ahead", out="o", code=2).stderr
    assert "tokens per forward" in sample(tmp_path, "--speculative", "--max_new_tokens=9", out="o").stderr


def test_a_checkpoint_of_another_version_is_named(trained, tmp_path):
    """A weight that this model.py does not have, or a setting: one clear line from sample.py and from
    from_checkpoint.
    """
    for change, words in ((lambda s: s["model"].update(old=torch.zeros(1)), "another version"),
                          (lambda s: s["config"]["model"].update(old_knob=1), "old_knob")):
        state = load_checkpoint(trained / "char/best.pt")
        change(state)
        save_checkpoint(tmp_path / "best.pt", state)
        with pytest.raises(ValueError, match=words):
            GPT.from_checkpoint(tmp_path / "best.pt")
        said = sample(tmp_path, out="", code=2).stderr
        assert words in said and "train again" in said


@pytest.mark.deep
def test_bench_ends_with_json():
    done = run(["bench.py", "kv_cache", "--save=false", "--rounds=1"], fresh=True)
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.strip().splitlines()[-1])
    assert last["suite"] == "kv_cache"
    assert {"name", "value", "unit", "baseline", "ratio"} == set(last["results"][0])
    by_name = {r["name"]: r["value"] for r in last["results"]}
    assert by_name["mha"] == 6 * 768 * 4 and by_name["mha"] / by_name["diff_mla v2"] == 6.0


@pytest.mark.deep
@pytest.mark.parametrize("suite", bench.FOR_GPU)
def test_the_suites_for_a_gpu_run_dry(suite):
    """Every line of them, at tiny sizes and on the CPU: a GPU's time is too dear to find a slip."""
    done = run(["bench.py", suite, "--dry", "--compiled=false"])
    assert done.returncode == 0, done.stdout + done.stderr
    last = json.loads(done.stdout.strip().splitlines()[-1])
    assert last["suite"] == suite and all(r["value"] >= 0 for r in last["results"])
    # a share of a measured bound, which kernels have on a GPU only and the loss has nowhere
    assert any("share" in r for r in last["results"]) or suite in ("kernels", "cross_entropy")


def test_bench_measures_the_gpu_that_was_asked_for(monkeypatch):
    asked = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            asked.append("event")

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 3.0 # ms

    monkeypatch.setattr(bench, "device", "cuda:1")
    monkeypatch.setattr(bench, "larger_than_cache", lambda: torch.empty(1))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name, value in {"get_device_name": "GPU 1", "max_memory_allocated": 5e6, "reset_peak_memory_stats": 0,
                        "synchronize": 0}.items():
        monkeypatch.setattr(torch.cuda, name, lambda d, value=value: asked.append(str(d)) or value)
    assert bench.hardware() == "GPU 1" and bench.peak() == 5.0
    assert bench.added_to_peak(lambda: 7) == (0.0, 7)
    assert bench.seconds(lambda: None) == 0.003 and asked.count("event") == 2
    assert {*asked} == {"cuda:1", "event"}


def test_a_capture_leaves_what_a_step_carries(monkeypatch):
    """A stand-in for CUDA counts: three calls that do not count on another stream, then the recorded one."""
    where, position = [], torch.zeros(())

    class StandIn:
        def wait_stream(self, other):
            where.append("wait")

    @contextmanager
    def inside(what):
        where.append(type(what).__name__)
        yield
        where.append("out")

    for name, value in {"Stream": type("Side", (StandIn,), {}), "CUDAGraph": type("Graph", (), {}),
                        "current_stream": StandIn, "stream": inside, "graph": inside}.items():
        monkeypatch.setattr(torch.cuda, name, value)

    def step():
        where.append(position.item())
        position.add_(1)

    graph = capture(step, [position])
    assert where == ["wait", "Side", 0, 0, 0, "out", "wait", "Graph", 0, "out"]
    assert type(graph).__name__ == "Graph"


def test_bench_names_the_model_that_it_measures(monkeypatch):
    for name, value in {"n_layer": 12, "n_embd": 768}.items():
        monkeypatch.setattr(bench, name, value)
    assert bench.gpt2()[0] == "124M"
    monkeypatch.setattr(bench, "n_layer", 6)
    assert bench.gpt2()[0] == "6 layers of 768" and bench.gpt2()[1]["n_layer"] == 6


def test_bench_never_times_eager_code_as_compiled(monkeypatch):
    """torch.compile gives up in silence after eight sets of constants for one piece of code; here are ten."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr(bench, "device", "cpu")
    for factor in range(10):
        arms = bench.paths(lambda x, factor=factor: x * factor, None, torch.ones(2))
        assert set(arms) == {"eager", "torch.compile"} and len(compiled) == factor + 1


@pytest.mark.gpu
def test_a_gpu_agrees_with_the_cpu(trained):
    model, idx = GPT.from_checkpoint(trained / "char/best.pt"), torch.randint(10, (2, 16))
    want = model(idx, idx)[1]["ce"]
    assert (model.cuda()(idx.cuda(), idx.cuda())[1]["ce"].cpu() - want).abs() < 1e-3
