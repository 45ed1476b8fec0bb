"""sample.py and bench.py through their command lines, on a run of a few steps."""
import contextlib
import io
import json
import os
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


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with two runs of a few steps: "char" and "byte", after their tokenizers."""
    d = tmp_path_factory.mktemp("sample")
    (d / "play.txt").write_text("to be or not to be, that is the question\n" * 60, encoding="utf-8")
    flags = ("--dataset=play.txt --n_layer=1 --n_head=2 --n_embd=32 --block_size=16 --attention=diff_mla "
             "--n_ahead=2 --max_iters=30 --learning_rate=1e-2 --warmup_iters=5").split()
    for name in ("char", "byte"):
        own = [f"--tokenizer={name}", f"--out_dir={name}", f"--data_dir=data/{name}"]
        done = run([ROOT / "train.py", *flags, *own], cwd=d)
        assert done.returncode == 0, done.stderr
    return d


def sample(folder, *flags, out="char", code=0, **how):
    done = run([ROOT / "sample.py", f"--out_dir={folder / out}", *flags], cwd=folder, timeout=60, **how)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return done


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


def test_why_no_graph_is_taken_is_said_once(monkeypatch, capsys):
    """Not by each of the writers of an answer, nor for each answer of a conversation."""
    knobs = dict(vocab_size=9, block_size=8, n_layer=2, n_head=2, n_embd=16, memory_slots=2, n_ahead=2)
    model = GPT(GPTConfig(**knobs))
    for name, value in dict(model=model, decode="graph", generator=None).items():
        monkeypatch.setattr(sample_module, name, value, raising=False)
    idx = torch.zeros(1, 1, dtype=torch.long)
    for _ in range(2):
        assert isinstance(sample_module.speculation(idx), sample_module.Speculation)
        assert len([*sample_module.plain_tokens(idx, 3)]) == 3
    assert capsys.readouterr().err.count("memory") == 1


def test_speed_is_of_steps_without_captures(monkeypatch):
    """All graphs of the timed text have been captured by the text before it."""
    counts, generator = [], torch.Generator()
    for name, value in dict(generator=generator, graphs_wanted=lambda: True,
                            plain_tokens=lambda ids, count: counts.append(count) or []).items():
        monkeypatch.setattr(sample_module, name, value, raising=False)
    sample_module.speed_up(SimpleNamespace(timed=50, seconds=1.0), None)
    assert counts == [50, 50]


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
    lines = ("to be\ntemperature=0\nto be\nto be\ntop_p=3\nto be\ntop_p=0.9\ntop_k=abc\nЖ\n\n"
             "temperature=nan\nnot\nquit\nnever read\n")
    out = sample(trained, "--interactive", "--max_new_tokens=12", input=lines).stdout.split("> ")
    assert "temperature = 0.0" in out[2] and out[3].strip() == out[4].strip() # greedy now: twice the same
    assert "error: top_p=3.0 must be in (0, 1]" in out[6] and "top_p = 0.9" in out[7]
    assert "error: top_k = 'abc'" in out[8]
    assert "error: the prompt has characters that the model does not know: 'Ж'" in out[9]
    assert "error: temperature = 'nan'" in out[11] # it would end the conversation with the next draw
    assert out[12].startswith("not") and len(out) == 14 # and after quit nothing


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


@pytest.mark.parametrize("flag, words", [
    ("--start=FILE:latin.txt", "latin.txt is not UTF-8"), ("--seed=-1", "in [0, 2**64)"),
    (f"--seed={2**64}", "in [0, 2**64)"), ("--max_new_tokens=0", "at least 1"), ("--top_k=1.5", "an int"),
    ("--temperature=nan", "not nan"), ("--cache_dtype=int2", "'int2' is none of auto, int8, int4")])
def test_what_cannot_be_sampled(trained, flag, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook) # configure sets another
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    monkeypatch.setattr(sys, "argv", ["sample.py", f"--out_dir={trained / 'char'}", flag])
    with pytest.raises(UserError, match=re.escape(words)):
        runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")


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


@pytest.mark.parametrize("draft", ["ahead", "ngram"])
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
    assert sample_module.load(path, "cpu")[3].startswith(f"{path}: diff_mla")


def test_drafts_of_a_cell_that_is_not_there(trained, tmp_path):
    state = load_checkpoint(trained / "char/best.pt")
    state["model"] = {k: v for k, v in state["model"].items() if not k.startswith("extras")}
    state["config"]["model"]["n_ahead"] = 0
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
