"""train.py and memory: the line it ends with, smaller micro-batches with --auto_batch, the forecast."""
import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from model import load_checkpoint
from optim import OPTIMIZERS
from test_distributed import assert_alike, started, store_of_torchrun # noqa: F401  a fixture
from test_distributed import ended as all_ended
from test_train import ended, metrics, same, spoiled, train, unsettled

# Memory runs out in forwards of more than `rows` sequences, from call number `first` on, after random numbers
# were drawn. kind: the error.
FAILS = """
import model, torch
real, calls = model.GPT.forward, [0]
def forward(self, idx, *a, **k):
    calls[0] += self.training
    out = real(self, idx, *a, **k)
    if len(idx) > {rows} and calls[0] >= {first}:
        {kind}
    return out
model.GPT.forward = forward
"""
KINDS = {"cpu": "torch.empty(2**50)", "cuda": "raise torch.OutOfMemoryError('CUDA out of memory. Tried')",
         "python": "raise MemoryError", "c++": "raise RuntimeError('std::bad_alloc')"}


def failing(rows, first=0, kind="cuda"):
    return FAILS.format(rows=rows, first=first, kind=KINDS[kind])


# --- the line ---


@pytest.mark.parametrize("kind", ["cpu", *(pytest.param(k, marks=pytest.mark.deep) for k in list(KINDS)[1:])])
def test_out_of_memory_ends_with_the_settings_that_need_less(kind, corpus, tmp_path):
    flags = "--max_iters=9", "--checkpoint_interval=3", "--sample_tokens=0"
    done = spoiled(failing(1, 5, kind), corpus, tmp_path / "o", *flags)
    lines = unsettled(done.stderr)
    assert done.returncode == 2 and len(lines) == 2, done.stderr
    assert lines[0].startswith("error: out of memory at step 4") and "of 32 tokens" in lines[0]
    assert "--batch_size=2 --gradient_accumulation_steps=2" in lines[1] and "--block_size" in lines[1]
    assert load_checkpoint(tmp_path / "o/ckpt.pt")["step"] == 3


@pytest.mark.deep
def test_several_processes_end_with_one_line(corpus, tmp_path):
    alone = "\nif os.environ['RANK'] == '1':" + failing(1, 5).replace("\n", "\n    ")
    ends = all_ended(started(2, corpus, tmp_path / "o", "--max_iters=9", code=alone), 2)
    assert sum("out of memory at step 4" in err for _, err in ends) == 1, ends
    assert sum(len(err.splitlines()) for _, err in ends) == 2, ends


# --- auto_batch ---

FLAGS = ["--batch_size=6", "--optimizer=muon", "--eval_interval=4", "--eval_iters=2", "--sample_tokens=0"]


def numbers(out):
    return [(x["step"], x.get("train_loss"), x.get("val_loss")) for x in metrics(out)]


def assert_same_run(a, b):
    a, b = load_checkpoint(a / "ckpt.pt"), load_checkpoint(b / "ckpt.pt")
    assert a["step"] == b["step"] and all(same(a[k], b[k]) for k in ("model", "optimizer", "random"))


def side_by_side(*jobs):
    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(*job) for job in jobs]]


@pytest.mark.parametrize("rows, by_hand, first", [(3, 3, 1), pytest.param(2, 1, 0, marks=pytest.mark.deep)])
def test_auto_batch_is_the_smaller_batch_by_hand(rows, by_hand, first, corpus, tmp_path):
    """To the bit, with dropout: what was drawn before memory ran out does not count. The resumed run begins
    with the smaller micro-batch. 6 rows that do not fit become 3, and 3 become 1. first=0: memory runs out
    in the evaluation before the first step.
    """
    auto, hand = tmp_path / "auto", tmp_path / "hand"
    limited = failing(rows, first), corpus
    said, _ = side_by_side(
        (spoiled, *limited, auto, *FLAGS, "--max_iters=4", "--lr_decay_iters=8", "--auto_batch"),
        (train, corpus, hand, *FLAGS, "--max_iters=8", f"--batch_size={by_hand}",
         f"--gradient_accumulation_steps={6 // by_hand}", "--eval_iters=0"))
    words = "OUT OF MEMORY with 6 sequences in a forward: from here on 3, and 2 forwards for the same step"
    assert words in ended(said).stdout and said.stdout.count("OUT OF MEMORY") == (2 if by_hand == 1 else 1)
    again = ended(spoiled(*limited, auto, *FLAGS, "--resume", "--max_iters=8"))
    assert "OUT OF MEMORY" not in again.stdout
    assert_same_run(auto, hand)


def test_memory_that_runs_out_in_the_middle(corpus, tmp_path):
    """In the second forward of step 2, after the first has left gradients."""
    flags = *FLAGS, "--gradient_accumulation_steps=2", "--max_iters=4", "--log_interval=1", "--dropout=0.0"
    said, _ = side_by_side((spoiled, failing(3, 6), corpus, tmp_path / "auto", *flags, "--auto_batch"),
                           (train, corpus, tmp_path / "whole", *flags))
    assert "step 2: OUT OF MEMORY" in ended(said).stdout and said.stdout.count("OUT OF MEMORY") == 1
    auto, whole = numbers(tmp_path / "auto"), numbers(tmp_path / "whole")
    assert auto[:3] == whole[:3] # two steps, of the usual size
    for mine, theirs in zip(auto, whole, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)


@pytest.mark.deep
def test_a_sequence_that_does_not_fit_ends_with_the_line(corpus, tmp_path):
    done = spoiled(failing(0), corpus, tmp_path / "o", "--max_iters=4", "--auto_batch")
    assert done.returncode == 2 and done.stdout.count("OUT OF MEMORY") == 2 # 4 became 2 and 1
    line = unsettled(done.stderr)[-1]
    assert line == "train anew with a smaller --block_size or model", done.stderr


@pytest.mark.deep
def test_one_process_of_two_runs_out_of_memory(corpus, tmp_path):
    """It alone takes smaller micro-batches in that step; then both do, and so does a resumed run."""
    alone = "\nif os.environ['RANK'] == '1':" + failing(2, 4).replace("\n", "\n    ")
    flags = "--max_iters=8", "--lr_decay_iters=8", "--auto_batch", "--eval_interval=4"
    for out, *more in ("auto", *flags), ("whole", *flags), ("parted", *flags, "--max_iters=4"):
        code = "" if out == "whole" else alone
        (said, _), _ = all_ended(started(2, corpus, tmp_path / out, *more, code=code))
        assert ("another process ran out of memory: 2 sequences" in said) == (out != "whole")
    assert_alike(tmp_path / "auto", tmp_path / "whole", losses=1e-5)
    assert "OUT OF MEMORY" not in all_ended(started(2, corpus, tmp_path / "parted", *flags, "--resume"))[0][0]
    assert_same_run(tmp_path / "auto", tmp_path / "parted")


@pytest.mark.deep
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the memory as Linux shows it")
def test_memory_that_really_runs_out(corpus, tmp_path):
    """When training begins the system allows 150 MB more, and a forward of 16 sequences takes 400 MB."""
    limit = FAILS.split("    out =")[0] + """
    if calls[0] == 1:
        import re, resource
        held = 1024 * int(re.search(r"VmData:\\s*(\\d+)", open("/proc/self/status").read())[1])
        resource.setrlimit(resource.RLIMIT_DATA, (held + 150 * 2**20,) * 2)
    return real(self, idx, *a, **k)
model.GPT.forward = forward
"""
    flags = ("--batch_size=16 --n_embd=128 --n_head=4 --n_layer=4 --block_size=256 --dropout=0.0 "
             "--max_iters=4 --log_interval=1 --eval_iters=1 --sample_tokens=0 --learning_rate=1e-3").split()
    train(corpus, tmp_path / "whole", *flags)
    done = ended(spoiled(limit, corpus, tmp_path / "o", *flags, "--auto_batch"))
    assert "step 0: OUT OF MEMORY with 16 sequences" in done.stdout
    for mine, theirs in zip(numbers(tmp_path / "o"), numbers(tmp_path / "whole"), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    done = spoiled(limit, corpus, tmp_path / "line", *flags)
    assert done.returncode == 2 and unsettled(done.stderr)[0].startswith("error: out of memory at step 0")


# --- the forecast ---


@pytest.mark.parametrize("flags", [
    ["--n_ahead=2", "--uncertainty", "--memory_slots=4", "--depths=(1,2)"],
    *(pytest.param(flags, marks=pytest.mark.deep) for flags in (
        ["--optimizer=muon"], ["--optimizer=fadam"], ["--optimizer=adam_mini"], ["--future_peek=3"],
        ["--gradient_accumulation_steps=2", "--residual=mhc", "--n_stream=2"],
        ["--gradient_checkpointing", "--dtype=bfloat16"]))], ids=" ".join)
def test_a_forecast_changes_no_bit_of_the_run(flags, corpus, tmp_path):
    """The long run, which alone has a forecast, ends after 2 steps, because memory runs out then."""
    parts = 1 + ("--gradient_accumulation_steps=2" in flags)
    flags = *flags, "--schedule=constant", "--checkpoint_interval=2", "--eval_iters=1"
    ends = failing(0, 3 + 2 * parts + 1)
    long, short = side_by_side(
        (spoiled, ends, corpus, tmp_path / "long", *flags, "--max_iters=900"),
        (spoiled, failing(9), corpus, tmp_path / "short", *flags, "--max_iters=2"))
    assert "at step 2," in long.stderr and "memory: " not in ended(short).stdout
    assert re.search(r"\nmemory: 0 MB parameters, 0 gradients, 0 optimizer, \d+ activations of 4 sequences: "
                     r"at most \d+ MB at a time\n", long.stdout), long.stdout
    assert_same_run(tmp_path / "long", tmp_path / "short")


# The growth of the memory from before the model is built to the second step. What torch loads and keeps at
# its first use is there before. mallopt gives each tensor a mapping of its own, so that no freed one is kept.
MEASURED = """
import ctypes, os, re, torch._dynamo, model, optim
ctypes.CDLL(None).mallopt(-3, 65536)
def held(key): return 1024 * int(re.search(key + r":\\s*(\\d+)", open("/proc/self/status").read())[1])
tiny = model.GPT(model.GPTConfig(vocab_size=64, n_layer=1, n_head=2, n_embd=64))
idx = torch.zeros(8, 64).long()
tiny(idx, idx, with_logits=False)[1]["ce"].backward()
optim.build_optimizer(tiny, "muon", 1e-3, 0.1, (0.9, 0.9)).step()
build, clip, seen = model.GPT.__init__, torch.nn.utils.clip_grad_norm_, []
def init(*a, **k):
    seen.append(held("VmRSS"))
    build(*a, **k)
def clipped(*a, **k):
    seen.append(0)
    if len(seen) > 2:
        print("measured", held("VmHWM") - seen[0], flush=True)
        os._exit(0)
    return clip(*a, **k)
model.GPT.__init__, torch.nn.utils.clip_grad_norm_ = init, clipped
"""
LONG = "--n_layer=6 --n_embd=96 --n_head=4 --block_size=256 --dropout=0.0" # much to keep for the backward
WIDE = "--n_layer=4 --n_embd=384 --n_head=6 --block_size=64 --vocab_size=50304 --batch_size=2" # many weights


@pytest.mark.deep
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the memory as Linux shows it")
@pytest.mark.parametrize("flags", [
    f"{LONG} --attention=mha --batch_size=24", f"{LONG} --batch_size=20 --glu --activation=silu --conv=4",
    f"{LONG} --residual=mhc --batch_size=12 --attention=mha", f"{LONG} --dropout=0.1 --batch_size=20",
    f"{WIDE} --batch_size=8 --gradient_accumulation_steps=3",
    *(f"{WIDE} --optimizer={name}" for name in OPTIMIZERS)])
def test_the_forecast_is_within_15_percent_of_the_peak(flags, corpus, tmp_path):
    done = spoiled(MEASURED, corpus, tmp_path / "o", *flags.split(), "--max_iters=2000", "--eval_iters=1",
                   "--compile=false", "--sample_tokens=0")
    said = int(re.search(r"at most ([\d,]+) MB", ended(done).stdout)[1].replace(",", ""))
    measured = int(re.search(r"measured (\d+)", done.stdout)[1]) / 1e6
    print(f"{said} MB foretold, {measured:.0f} MB measured: {flags}")
    assert measured > 200 and said == pytest.approx(measured, rel=0.15)


@pytest.mark.deep
def test_two_processes_have_a_forecast_and_keep_their_bits(corpus, tmp_path):
    """With Muon, whose step in the forecast sends messages as its others do."""
    flags = "--schedule=constant", "--checkpoint_interval=2", "--optimizer=muon", "--dropout=0.1"
    ends = all_ended(started(2, corpus, tmp_path / "long", *flags, "--max_iters=900", code=failing(0, 6)), 2)
    all_ended(started(2, corpus, tmp_path / "short", *flags, "--max_iters=2"))
    assert "\nmemory: 0 MB parameters" in ends[0][0] and "at step 2," in ends[0][1] + ends[1][1]
    assert_same_run(tmp_path / "long", tmp_path / "short")


@pytest.mark.deep
def test_fsdp_trains_without_a_forecast_and_ends_with_a_line(corpus, tmp_path):
    flags = "--fsdp", "--checkpoint_interval=2", "--max_iters=900"
    said = all_ended(started(2, corpus, tmp_path / "o", *flags, code=failing(0, 4)), 2)
    errors = "".join(err for _, err in said)
    assert "memory: " not in said[0][0] and "out of memory at step 3," in errors, said
    assert "\ntrain anew with --batch_size=2 --gradient_accumulation_steps=4 (the same" in errors, errors
    assert load_checkpoint(tmp_path / "o/ckpt.pt")["step"] == 2
