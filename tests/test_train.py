"""train.py through its command line: what it writes, exact resume, damage, signals, numbers that are no
numbers.
"""
import ast
import hashlib
import itertools
import json
import math
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import time
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.torch_version import TorchVersion

from configurator import UserError
from data import load, prepare, verify
from kernels import c_library
from model import GPT, GPTConfig, PRESETS, load_checkpoint, save_checkpoint, saved_fields
from optim import OPTIMIZERS
from processes import ROOT, run, start

TINY = ("--n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --attention=diff_mla --dropout=0.1 "
        "--batch_size=4 --learning_rate=1e-2 --warmup_iters=5 --log_interval=5 --eval_interval=10 "
        "--sample_tokens=8").split()
TIMES = ("time_s", "tokens_per_s")


def command(corpus, out, *flags):
    return [ROOT / "train.py", "--dataset=play", f"--data_dir={corpus / 'data'}", f"--out_dir={out}", *TINY,
            *flags]


def train(corpus, out, *flags, code=0, **how):
    return ended(run(command(corpus, out, *flags), **how), code)


def ended(done, code=0):
    assert done.returncode == code, done.stdout + done.stderr
    return done


def side_by_side(corpus, folder, **runs):
    """Trains {out_dir below folder: flags}, two runs at a time."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda out: train(corpus, folder / out, *runs[out]), runs))


def unsettled(said):
    """Lines of stderr without the list of settings."""
    return [line for line in said.strip().splitlines() if not line.startswith(("settings:", " " * 10))]


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def timeless(out):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in metrics(out)]


def same(a, b):
    """Bit for bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


WHERE = "out_dir", "resume", "keep_checkpoints" # settings that change no number


def state(out):
    """All of a checkpoint but what says when and where it was written."""
    s = load_checkpoint(out / "ckpt.pt")
    for key in ("run_id", "time_s", "metrics_bytes"):
        s.pop(key)
    s["config"]["train"] = {k: v for k, v in s["config"]["train"].items() if k not in WHERE}
    return s


@pytest.fixture(scope="session")
def whole(corpus, tmp_path_factory):
    """A run of 60 steps that nobody disturbs, in an interpreter of its own."""
    out = tmp_path_factory.mktemp("whole")
    log = train(corpus, out, "--max_iters=60", fresh=True, env={"HF_TOKEN": CANARY, "WANDB_API_KEY": CANARY})
    return out, log.stdout + log.stderr


CANARY = "hf_nobodymayseethis"


def test_what_a_run_leaves_behind(whole, corpus):
    out, log = whole
    about = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert ("kernels c (auto)" in log) == (c_library(0) is not None)
    assert {"run_id", "git_commit", "config_hash", "hook_list", "command", "config", "versions", "device",
            "dataset", "data_sha256",
            "seed", "n_params"} <= set(about)
    lines = metrics(out)
    training, evaluations = [x for x in lines if "train_loss" in x], [x for x in lines if "val_loss" in x]
    assert [x["step"] for x in training] == list(range(5, 61, 5))
    assert [x["step"] for x in evaluations] == list(range(0, 61, 10))
    assert all({"step", "tokens", "time_s", "train_loss", "lr", "grad_norm", "tokens_per_s"} == set(x)
               for x in training)
    assert all({"step", "tokens", "time_s", "val_loss", "val_bits_per_byte", "sample_text"} == set(x)
               for x in evaluations)
    assert all(a["time_s"] <= b["time_s"] for a, b in zip(lines, lines[1:])) and lines[0]["tokens"] == 0
    assert lines[-1]["tokens"] == 60 * 4 * 32
    assert evaluations[-1]["val_loss"] < evaluations[0]["val_loss"] - 0.5 # it learns
    for file, step in (("ckpt.pt", 60), ("ckpt.prev.pt", 50), ("best.pt", None)):
        s = load_checkpoint(out / file)
        assert step in (None, s["step"])
        assert {"model", "optimizer", "config", "tokenizer", "step", "random"} <= set(s)
        assert torch.load(out / file, weights_only=True).keys() == s.keys() # an ordinary .pt file
    assert GPT.from_checkpoint(out / "ckpt.pt").num_params() == about["n_params"]
    assert not [file for file in out.iterdir() if CANARY.encode() in file.read_bytes()] and CANARY not in log
    assert "device cpu" in log and "dtype float32" in log and "compile off" in log and "MFU" not in log


def test_what_a_run_says(whole):
    """A line for each evaluation, the sample in lines of its own, again at the end, and what comes next."""
    out, log = whole
    values = [line for line in metrics(out) if "val_loss" in line]
    lines = re.findall(r"^step (\d+): val loss ([\d.]+)(?: \(([+-][\d.]+)\))?, ([\d.]+) bits/byte, (.*)$",
                       log, re.M)
    assert [(int(step), float(loss)) for step, loss, *_ in lines] == [
        (line["step"], round(line["val_loss"], 4)) for line in values]
    best, best_step = math.inf, 0
    for (_, _, change, bits, words), before, line in zip(lines, [None, *values], values):
        loss = line["val_loss"]
        assert bits == f"{line['val_bits_per_byte']:.2f}"
        assert change == (f"{loss - before['val_loss']:+.4f}" if before else "")
        assert words == ("best" if loss < best else f"best {best:.4f} at step {best_step}")
        best, best_step = min((loss, line["step"]), (best, best_step))
    tail = log[log.index("\na sample:"):log.index("\nnext: python sample.py") + 1].strip().splitlines()
    shown = [f"    {line}" for line in values[-1]["sample_text"].strip("\n").split("\n")]
    assert tail[1:1 + len(shown)] == shown and log.count("\n    ") >= len(values)
    last = f"{values[-1]['val_loss']:.4f}"
    assert tail[-2] == f"step 60, best val loss {best:.4f} at step {best_step}, last {last}"
    times, _, place = tail[-1].partition("; ")
    assert re.fullmatch(r"[\d.]+ s of training, [\d.]+ s in all", times)
    assert place == f"saved in {out}: metrics.jsonl, ckpt.pt, best.pt"
    assert f"\nnext: python sample.py --out_dir={out}\n" in log


def test_validation_loss_is_the_whole_split(whole, corpus):
    """Recomputed token by token from the shard's bytes."""
    out, _ = whole
    model = GPT.from_checkpoint(out / "ckpt.pt")
    ids = torch.frombuffer(bytearray((corpus / "data/play/val_000000.bin").read_bytes()[1024:]),
                           dtype=torch.uint16).long()
    total = 0.0
    for i in range(0, len(ids) - 1, 32):
        x, y = ids[i : i + 32][: len(ids) - 1 - i], ids[i + 1 : i + 33]
        total += torch.nn.functional.cross_entropy(model(x[None], y[None])[0][0], y, reduction="sum").item()
    last = metrics(out)[-1]
    assert last["val_loss"] == pytest.approx(total / (len(ids) - 1), rel=1e-5)
    assert last["val_bits_per_byte"] == pytest.approx(last["val_loss"] / math.log(2)) # a character is a byte


def test_learning_rate(corpus, tmp_path):
    flags = ("--max_iters=25 --log_interval=1 --min_lr=1e-3 --eval_interval=99 --sample_tokens=0 "
             "--eval_iters=1").split()
    schedules = {"cosine": lambda f: 1e-3 + (1e-2 - 1e-3) * 0.5 * (1 + math.cos(math.pi * f)),
                 "linear": lambda f: 1e-2 + f * (1e-3 - 1e-2), "constant": lambda f: 1e-2,
                 "wsd": lambda f: 1e-2 if f < 0.8 else 1e-3 + (1 - f) / 0.2 * (1e-2 - 1e-3)}
    side_by_side(corpus, tmp_path, **{name: [*flags, f"--schedule={name}"] for name in schedules})
    for name, expected in schedules.items():
        lines = [line for line in metrics(tmp_path / name) if "lr" in line]
        assert len(lines) == 25
        for line in lines:
            update = line["step"] - 1 # counted from 0
            want = 1e-2 * (update + 1) / 6 if update < 5 else expected((update - 5) / 20)
            assert line["lr"] == pytest.approx(want), (name, line)


def test_accumulated_gradients_are_the_big_batch(corpus, tmp_path):
    flags = ["--max_iters=10", "--dropout=0.0", "--eval_iters=2"]
    side_by_side(corpus, tmp_path, a=[*flags, "--batch_size=4"],
                 b=[*flags, "--batch_size=2", "--gradient_accumulation_steps=2"])
    a, b = (load_checkpoint(tmp_path / o / "ckpt.pt")["model"] for o in "ab")
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)
    data, model = load("play", corpus / "data"), GPT.from_checkpoint(tmp_path / "a/ckpt.pt")
    with torch.no_grad(): # eval_iters batches of the validation split, always the same ones
        losses = [model(*data.val.batch(i, 4, 32, 1337))[1]["ce"].item() for i in range(2)]
    assert metrics(tmp_path / "a")[-1]["val_loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    one, two = ([(x["train_loss"], x["grad_norm"]) for x in metrics(tmp_path / o) if "lr" in x] for o in "ab")
    # clipping and Adam would hide a gradient of another size
    assert one == [pytest.approx(x, rel=1e-3) for x in two]


def test_every_loss_counts_once_whatever_the_number_of_parts():
    """train.py's own gradient, by itself: half of each part's losses, those beside the text's as well."""
    tree = ast.parse((ROOT / "train.py").read_text(encoding="utf-8"))
    body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "gradient"]
    model = GPT(GPTConfig(vocab_size=17, block_size=8, n_layer=2, n_head=2, n_embd=16, future_peek=3,
                          depths=(1, 2), n_ahead=2, uncertainty=True))
    names = {"autocast": nullcontext(), "scaler": torch.amp.GradScaler("cpu", enabled=False),
             "step_model": model, "gradient_accumulation_steps": 2}
    exec(compile(ast.Module(body, []), "train.py", "exec"), names)
    parts = [torch.randint(17, (2, 3, 8)).unbind() for _ in range(2)]
    means = names["gradient"](parts)
    losses, params = [model(x, y)[1] for x, y in parts], [*model.parameters()]
    assert len(means) == 5
    for name, mean in means.items():
        assert mean.item() == pytest.approx(sum(each[name].item() for each in losses) / 2, rel=1e-5)
    wanted = torch.autograd.grad(sum(sum(each.values()) for each in losses) / 2, params)
    for p, g in zip(params, wanted, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6)


# --- resume ---


KILLS = 15 # of the deep test; 200 take 13 times as long


@pytest.mark.parametrize("wanted, steps", [(3, 60), pytest.param(KILLS, 300, marks=pytest.mark.deep)])
def test_resume_after_any_kill_is_bit_exact(wanted, steps, corpus, tmp_path):
    """kill -9 at random moments, start-up, saving and evaluating included: weights, moments, random states
    and metrics end as if nothing had happened. A run that ends before the last kill is compared, and another
    one is begun.
    """
    flags = [f"--max_iters={steps}", "--checkpoint_interval=3", "--keep_checkpoints=2"]
    rng = random.Random(7)
    kills = runs = resumed = 0
    began = time.monotonic()
    train(corpus, tmp_path / "calm", *flags)
    whole_run = time.monotonic() - began
    while kills < wanted or process.returncode:
        out = tmp_path / f"killed_{runs}"
        with open(tmp_path / "log", "w", encoding="utf-8") as log:
            more = ["--resume"] * out.exists()
            process = start(command(corpus, out, *flags, *more), stdout=log, stderr=log)
        try:
            process.wait(timeout=rng.uniform(0.2, 0.7) * whole_run if kills < wanted else 120)
        except subprocess.TimeoutExpired:
            process.kill()
        kills += process.wait() == -signal.SIGKILL
        text = (tmp_path / "log").read_text(encoding="utf-8")
        assert process.returncode in (0, -signal.SIGKILL), text
        resumed += "RESUMING from" in text
        if process.returncode == 0:
            assert same(state(tmp_path / "calm"), state(out)) and timeless(tmp_path / "calm") == timeless(out)
            runs += 1
    assert resumed >= max(1, wanted // 4)


MORTAL = """
import builtins, io, itertools, json, os, random, shutil, signal, sys
from pathlib import Path
import torch
from model import load_checkpoint

CHANGES = "write truncate flush close".split()
left = [0] # changes of the file system until death


def mortal(change):
    def counted(*args, **named):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return change(*args, **named)
    return counted


class Mortal: # an open file
    def __init__(self, file): self.file = file
    def __enter__(self): return self
    def __exit__(self, *error): self.close()
    def __getattr__(self, name):
        found = getattr(self.file, name)
        return mortal(found) if name in CHANGES else found


def seen(folder): # what a resumed run could tell apart
    found = {}
    for file in folder.rglob("*"):
        name = str(file.relative_to(folder))
        found[name] = load_checkpoint(file)["step"] if file.suffix == ".pt" else ""
        if file.name == "metrics.jsonl":
            found[name] = file.read_bytes().count(b"\\n"), file.read_bytes()[-1:]
    return str(sorted(found.items()))


def copied(folder, to): # hard links stay hard links
    to.mkdir()
    copies = {}
    for file in folder.iterdir():
        copy, inode = to / file.name, file.stat().st_ino
        os.link(copies[inode], copy) if inode in copies else shutil.copyfile(file, copy)
        copies.setdefault(inode, copy)


def die_everywhere(step, params):
    if step != 6 or "MORTAL" not in os.environ:
        return
    run = next(f.f_globals for f in map(sys._getframe, itertools.count()) if "keep_newest" in f.f_globals)
    outcomes, folder, dice = {}, run["folder"], random.getstate()
    for at in itertools.count(1):
        to = Path(f"{folder}_{at}")
        copied(folder, to)
        child = os.fork()
        if not child:
            random.setstate(dice) # a fork is given another one
            left[0], run["folder"] = at, to
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            real = builtins.open
            builtins.open = io.open = lambda *args, **named: Mortal(mortal(real)(*args, **named))
            for name in "fsync replace rename link unlink remove mkdir".split():
                setattr(os, name, mortal(getattr(os, name)))
            if run["source"]:
                run["source"], run["origin"] = to / run["source"].name, to
                run["corpus"].train.batch = lambda *args, **named: os._exit(0) # training begins
            else:
                run["metrics"] = open(to / "metrics.jsonl", "ab", buffering=0)
            return # to go on, in a folder of its own
        if not os.waitpid(child, 0)[1]:
            break # it came to its end
        if outcomes.setdefault(seen(to), str(to)) != str(to):
            shutil.rmtree(to)
    Path(os.environ["MORTAL"]).write_text(json.dumps([at - 1, [*outcomes.values()]]))
"""


@pytest.mark.deep
def test_death_at_every_change_of_the_file_system(corpus, tmp_path):
    """From the 7th of 9 steps on, kill -9 before each open, write, fsync, rename, link and unlink, in a fork
    of the training process. No name of a checkpoint ever holds less than a whole one, and of all the folders
    that a resumed run could tell apart each one is resumed, and ends in the same bits.

    The folder's name is not ASCII, because torch then writes through a Python file, so that each of its
    writes counts. What lies between two changes leaves the same files as the second one's beginning.
    """
    (tmp_path / "mortal.py").write_text(MORTAL, encoding="utf-8")
    flags = [f"--update_hooks={tmp_path / 'mortal.py'}:die_everywhere", "--n_layer=1", "--n_embd=16",
             "--attention=mha", "--max_iters=9", "--checkpoint_interval=2", "--eval_interval=4",
             "--eval_iters=1", "--log_interval=1", "--sample_tokens=0", "--keep_checkpoints=2"]
    train(corpus, tmp_path / "ö", *flags, env={"MORTAL": str(tmp_path / "outcomes")}, timeout=600)
    points, outcomes = json.loads((tmp_path / "outcomes").read_text(encoding="utf-8"))
    assert points > 500 and len(outcomes) > 15
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda out: train(corpus, out, *flags, "--resume"), outcomes))
    for out in map(Path, outcomes):
        assert same(state(tmp_path / "ö"), state(out)) and timeless(tmp_path / "ö") == timeless(out)
        assert [f.name for f in sorted(out.glob("step_*.pt"))] == ["step_000008.pt", "step_000009.pt"]
        assert not list(out.glob("*.part"))


@pytest.mark.deep
def test_death_at_every_change_while_a_chosen_checkpoint_becomes_the_newest(corpus, tmp_path):
    """The same between the start of `--resume=FILE.pt` and its first step. Afterwards that command, and
    `--resume` alone, end in the bits of a run that nobody killed, and the command has lost no checkpoint.
    """
    flags = ["--n_layer=1", "--n_embd=16", "--max_iters=9", "--checkpoint_interval=2", "--eval_interval=4",
             "--eval_iters=1", "--log_interval=1", "--sample_tokens=0", "--keep_checkpoints=9"]
    out, whole = tmp_path / "o", tmp_path / "whole"
    train(corpus, whole, *flags)
    shutil.copytree(whole, out)
    before = MORTAL + "\nimport configurator\n" \
        "configurator.git_commit = lambda: die_everywhere(6, None) or 'unknown'\n"
    ended(run(spoiling(before, corpus, out, *flags, f"--resume={out / 'step_000006.pt'}"), timeout=600,
              env={"MORTAL": str(tmp_path / "outcomes")}))
    points, outcomes = json.loads((tmp_path / "outcomes").read_text(encoding="utf-8"))
    assert points > 40 and len(outcomes) > 10
    jobs = [(out, "--resume")]
    for folder in outcomes:
        shutil.copytree(folder, f"{folder}b")
        jobs += (Path(folder), f"--resume={folder}/step_000006.pt"), (Path(f"{folder}b"), "--resume")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: train(corpus, job[0], *flags, job[1]), jobs))
    contents = {f.read_bytes() for f in whole.glob("*.pt") if load_checkpoint(f)["step"] != 6}
    for folder, resume in jobs:
        assert same(state(whole), state(folder)) and timeless(whole) == timeless(folder)
        assert resume == "--resume" or contents <= {file.read_bytes() for file in folder.rglob("*.pt")}


def test_killed_before_the_first_checkpoint(whole, tmp_path):
    """`--resume --out_dir=...` alone: the settings are those of run.json, not the defaults."""
    out = tmp_path / "o"
    shutil.copytree(whole[0], out)
    for name in ("ckpt.pt", "ckpt.prev.pt", "best.pt"):
        (out / name).unlink()
    assert "NOTHING TO RESUME" in ended(run([ROOT / "train.py", f"--out_dir={out}", "--resume"])).stdout
    assert same(state(whole[0]), state(out)) and timeless(whole[0]) == timeless(out)
    assert len(json.loads((out / "run.json").read_text(encoding="utf-8"))["resumed"]) == 1
    assert (out / "previous_1/metrics.jsonl").exists() # what it had measured is kept


def test_best_alone_is_gone_on_from(whole, corpus, tmp_path):
    """It holds all that a checkpoint does. To begin anew would empty metrics.jsonl and overwrite a better
    best.pt.
    """
    out = tmp_path / "o"
    shutil.copytree(whole[0], out)
    (out / "ckpt.pt").unlink(), (out / "ckpt.prev.pt").unlink()
    kept = (out / "best.pt").read_bytes()
    done = train(corpus, out, "--max_iters=60", "--resume")
    assert f"RESUMING from {out / 'best.pt'}, step {load_checkpoint(out / 'best.pt')['step']}" in done.stdout
    assert same(state(whole[0]), state(out)) and timeless(whole[0]) == timeless(out)
    assert (out / "best.pt").read_bytes() == kept


@pytest.mark.parametrize("branch", [False, pytest.param(True, marks=pytest.mark.deep)], ids=["here", "other"])
def test_a_chosen_checkpoint_is_gone_on_from(branch, whole, tmp_path):
    """In its own folder, where the newer files move aside whole, or in another: then all stay."""
    out, folder = tmp_path / "o", tmp_path / ("branch" if branch else "o")
    shutil.copytree(whole[0], out)
    (out / "ckpt.prev.pt").rename(out / "chosen.pt")
    before = {file.name: file.read_bytes() for file in out.iterdir() if file.name != "lock"}
    flags = ["--keep_checkpoints=2", *[f"--out_dir={folder}"] * branch]
    done = ended(run([ROOT / "train.py", f"--resume={out / 'chosen.pt'}", *flags]))
    assert f"RESUMING from {out / 'chosen.pt'}, step 50" in done.stdout
    assert (f"what is newer than step 50 was moved to {out / 'previous_1'}" in done.stdout) != branch
    for name, content in before.items():
        there = out if branch or name == "chosen.pt" else out / "previous_1"
        assert (there / name).read_bytes() == content
    assert same(state(whole[0]), state(folder)) and timeless(whole[0]) == timeless(folder)
    steps = {f.name: load_checkpoint(f)["step"] for f in folder.glob("*.pt") if f.name != "chosen.pt"}
    assert steps == {"ckpt.pt": 60, "ckpt.prev.pt": 50, "step_000050.pt": 50, "step_000060.pt": 60,
                     "best.pt": load_checkpoint(whole[0] / "best.pt")["step"]}
    assert load_checkpoint(folder / "ckpt.pt")["config"]["train"]["resume"] is True # no path in it


NO_LINKS = "import os\ndef link(*paths): raise OSError('no hard links here')\nos.link = link"


@pytest.mark.deep
@pytest.mark.parametrize("before", ["", NO_LINKS], ids=["link", "copy"])
def test_the_newest_checkpoints_stay_under_their_own_names(before, corpus, tmp_path):
    """Without hard links they are copies. They move aside with their run; a damaged one is passed over."""
    out, flags = tmp_path / "o", ["--keep_checkpoints=2", "--checkpoint_interval=2", "--eval_iters=1"]
    (tmp_path / "o").mkdir()
    (out / "step_by_step.pt").write_text("of somebody else")

    def steps(folder):
        return {file.name: load_checkpoint(file)["step"] for file in folder.glob("step_0*.pt")}

    ended(spoiled(before, corpus, out, *flags, "--max_iters=9"))
    assert steps(out) == {"step_000008.pt": 8, "step_000009.pt": 9}
    assert os.path.samefile(out / "ckpt.pt", out / "step_000009.pt") != bool(before)
    if not before:
        return
    train(corpus, tmp_path / "branch", f"--resume={out / 'ckpt.pt'}", "--max_iters=9", *flags)
    assert (tmp_path / "branch/best.pt").read_bytes() == (out / "best.pt").read_bytes() # of no later step
    for name in ("ckpt.pt", "ckpt.prev.pt"):
        (out / name).unlink()
    (out / "step_000009.pt").write_bytes(b"damaged")
    done = train(corpus, out, "--resume", "--max_iters=10", *flags)
    assert "step_000008.pt, step 8" in done.stdout and (out / "step_000009.pt.damaged").exists()
    assert steps(out) == {"step_000008.pt": 8, "step_000010.pt": 10}
    assert "moved to" in train(corpus, out, *flags[1:], "--max_iters=2").stdout # it keeps none
    assert not steps(out) and set(steps(out / "previous_1")) == {"step_000008.pt", "step_000010.pt"}
    assert (out / "step_by_step.pt").exists()


def test_resumed_past_its_end_and_without_its_metrics(corpus, tmp_path):
    out = tmp_path / "o"
    train(corpus, out, "--max_iters=10")
    (out / "metrics.jsonl").write_text("", encoding="utf-8")
    done = train(corpus, out, "--max_iters=5", "--resume")
    assert "is shorter than when the checkpoint was saved" in done.stdout
    assert load_checkpoint(out / "ckpt.pt")["step"] == 10
    assert "NOTHING TO TRAIN: the run is at step 10 and max_iters=5" in done.stdout
    assert b"\0" not in (out / "metrics.jsonl").read_bytes()


def test_resume_with_more_steps_and_without_repeating_the_settings(corpus, tmp_path):
    side_by_side(corpus, tmp_path, a=["--max_iters=40"], b=["--max_iters=20", "--lr_decay_iters=40"])
    saved = load_checkpoint(tmp_path / "b/ckpt.pt")
    save_checkpoint(tmp_path / "b/ckpt.pt", {**saved, "time_s": 1000.0}) # as if it had trained for so long
    flags = [f"--out_dir={tmp_path / 'b'}", "--resume", "--max_iters=40", f"--data_dir={corpus / 'data'}"]
    assert "max_iters was 20 before this resume" in ended(run([ROOT / "train.py", *flags])).stdout
    a, b = state(tmp_path / "a"), state(tmp_path / "b")
    assert same(a["model"], b["model"]) and same(a["optimizer"], b["optimizer"])
    assert timeless(tmp_path / "a") == timeless(tmp_path / "b")
    assert all((line["time_s"] > 1000) == (line["step"] > 20) for line in metrics(tmp_path / "b"))
    assert load_checkpoint(tmp_path / "b/ckpt.pt")["time_s"] > 1000


SPARSE = ("--sparse=skeleton_flesh --sparse_density=0.4 --sparse_interval=5 --schedule=wsd "
          "--sparse_boost=2.0 --sparse_boost_steps=4").split()
DICE = """
import random, numpy
def dice(step, params): return {"python": random.random(), "numpy": numpy.random.rand()}
"""
CHANGES = {"fadam": ["--optimizer=fadam"], "adam_mini": ["--optimizer=adam_mini"], "sparse": SPARSE,
           "sparse muon": ["--optimizer=muon", *SPARSE], "bf16": ["--dtype=bfloat16"],
           "epochs": ["--sampling=epochs"],
           "hooks": ["--update_hooks=gradient_noise,clip_by_layer=0.1,dice.py:dice"]}
# all that can be changed but FAdam, in two runs
SHORT = [("sparse muon, bf16", 25), ("adam_mini, epochs, hooks", 22)]
LONG = [(name, stop) for name in CHANGES for stop in (22, 25) if (name, stop) not in SHORT]


@pytest.mark.parametrize("names, stop",
                         [*SHORT, *(pytest.param(*case, marks=pytest.mark.deep) for case in LONG)])
def test_every_optimizer_and_every_rule_resumes_to_the_bit(names, stop, corpus, tmp_path):
    """Stopped in the middle of a sparse window (22), and right before weights are chosen (25). What a hook
    draws from Python's and numpy's generators goes on as well.
    """
    (tmp_path / "dice.py").write_text(DICE, encoding="utf-8")
    flags = [flag for name in names.split(", ") for flag in CHANGES[name]]
    flags = [flag.replace("dice.py", str(tmp_path / "dice.py")) for flag in flags]
    side_by_side(corpus, tmp_path, a=["--max_iters=45", *flags],
                 b=[f"--max_iters={stop}", "--lr_decay_iters=45", *flags])
    assert (tmp_path / "b/best.pt").exists() != ("sparse" in names) # a denser model is never the best
    code = [flag for flag in flags if "dice.py" in flag] # what runs a file's code is named again
    train(corpus, tmp_path / "b", "--max_iters=45", "--resume", *code)
    a, b = state(tmp_path / "a"), state(tmp_path / "b")
    assert all(same(a[k], b[k]) for k in ("model", "optimizer", "sparse", "random"))
    lines = [[x for x in timeless(tmp_path / o) if "train_loss" in x and x["step"] > 25] for o in "ab"]
    assert lines[0] == lines[1] and len(lines[0]) == 4


@pytest.mark.deep
@pytest.mark.parametrize("knob, name", [("--n_ahead=2", "ahead"), ("--uncertainty", "uncertainty")])
def test_what_learns_beside_the_model_leaves_it_as_it_is(knob, name, corpus, tmp_path):
    """With and without the knob the trunk ends in the same bits, dropout and clipping included; its cell or
    head learns.
    """
    flags = ["--max_iters=30", "--grad_clip=0.5"]
    side_by_side(corpus, tmp_path, own=[*flags, knob], without=flags)
    with_, without = state(tmp_path / "own")["model"], state(tmp_path / "without")["model"]
    assert same({k: v for k, v in with_.items() if not k.startswith("extras")}, without)
    lines = [[line for line in metrics(tmp_path / out) if "train_loss" in line] for out in ("own", "without")]
    assert [line["grad_norm"] for line in lines[0]] == [line["grad_norm"] for line in lines[1]]
    assert name in lines[0][0] and name not in lines[1][0]
    assert with_[f"extras.{name}.down.weight"].abs().mean() > 1e-3 # which starts at 0: it learns


def test_resume_refuses_a_field_that_the_checkpoint_did_not_know(corpus, tmp_path):
    train(corpus, tmp_path / "old", "--max_iters=2")
    for name in ("ckpt.pt", "best.pt"):
        saved = load_checkpoint(tmp_path / "old" / name)
        del saved["config"]["model"]["n_ahead"]
        save_checkpoint(str(tmp_path / "old" / name), saved, keep_previous=False)
    done = train(corpus, tmp_path / "old", "--resume", "--max_iters=4", "--n_ahead=2", code=2)
    assert "cannot resume with another n_ahead was 0, now 2" in done.stderr


def test_a_sparse_run_says_its_density(corpus, tmp_path):
    done = train(corpus, tmp_path / "o", "--max_iters=45", *SPARSE)
    lines = metrics(tmp_path / "o")
    assert lines[0]["density"] == 1.0 and all("density" in x for x in lines)
    s = load_checkpoint(tmp_path / "o" / "ckpt.pt")
    total, active = (sum(f(m) for m in s["sparse"]["masks"]) for f in (torch.Tensor.numel, torch.Tensor.sum))
    assert active == round(0.4 * total)
    assert lines[-1]["density"] == pytest.approx(active.item() / total, abs=1e-6)
    zeros = sum(int((w == 0).sum()) for k, w in s["model"].items() if k.startswith("blocks") and w.dim() == 2)
    assert zeros == total - active and f"of {total:,} weights kept" in done.stdout
    best = load_checkpoint(tmp_path / "o" / "best.pt")
    # a denser model of lower loss is not the best
    assert sum(m.sum() for m in best["sparse"]["masks"]) == active


# --- hooks ---


def test_hooks_watch_without_a_trace_and_change_what_they_say(corpus, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def halve(step, params, by=2.0):\n    for p in params.values(): p.grad /= by\n"
        "    return {'step': step, 'by': by}\n"
        "def spoil(model):\n    return {model.blocks[0]: lambda i, o: {'max': o.mul_(0).max()}}\n",
        encoding="utf-8")
    # dropout is on: a trace in the random states would show
    flags = ["--max_iters=10", "--log_interval=1", "--grad_clip=0.0", "--optimizer=muon"]
    watching = f"--forward_hooks=activation_stats,{tmp_path / 'mine.py'}:spoil"
    halving = f"{tmp_path / 'mine.py'}:halve=4"
    side_by_side(corpus, tmp_path, plain=flags, watched=[*flags, watching],
                 same=[*flags, "--update_hooks=identity", "--sample_tokens=0"],
                 halved=[*flags, f"--update_hooks={halving}"])
    plain = state(tmp_path / "plain")["model"]
    assert same(plain, state(tmp_path / "watched")["model"])
    assert same(plain, state(tmp_path / "same")["model"])
    line = metrics(tmp_path / "watched")[-2]
    assert set(line["hooks"]) == {"activation_stats", f"{tmp_path / 'mine.py'}:spoil"}
    stats = {f"blocks.{i}{k}" for i in (0, 1) for k in (".mean", ".std", ".mlp.down.dead")}
    assert set(line["hooks"]["activation_stats"]) == stats
    about = json.loads((tmp_path / "watched" / "run.json").read_text(encoding="utf-8"))
    assert about["hook_list"] == {"forward": ["activation_stats", f"{tmp_path / 'mine.py'}:spoil"],
                                  "update": []}
    plain, halved = metrics(tmp_path / "plain"), metrics(tmp_path / "halved")
    assert halved[5]["hooks"] == {halving: {"step": 4, "by": 4.0}}
    assert halved[1]["grad_norm"] == pytest.approx(plain[1]["grad_norm"] / 4) # of the first step
    assert halved[5]["grad_norm"] != plain[5]["grad_norm"]


@pytest.mark.parametrize("damage", ("flip", "cut", "empty"))
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(damage, whole, corpus, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    raw = bytearray((out / "ckpt.pt").read_bytes())
    if damage == "flip":
        raw[len(raw) // 2] ^= 1
    (out / "ckpt.pt").write_bytes({"flip": raw, "cut": raw[:-100], "empty": b""}[damage])
    done = train(corpus, out, "--max_iters=60", "--resume")
    assert f"WARNING: {out / 'ckpt.pt'} is" in done.stdout and "RESUMING from" in done.stdout
    assert "ckpt.prev.pt, step 50" in done.stdout
    assert same(state(whole[0]), state(out)) and timeless(whole[0]) == timeless(out)
    # no save puts the damaged file in the place of the whole one
    assert load_checkpoint(out / "ckpt.prev.pt")["step"] == 50
    assert (out / "ckpt.pt.damaged").exists()


@pytest.mark.parametrize("every", [29, pytest.param(1, marks=pytest.mark.deep)])
def test_every_flipped_byte_and_every_cut_is_noticed(every, tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda *a: done.append("on the disk") or fsync(*a))
    monkeypatch.setattr(os, "replace", lambda *a: done.append("renamed") or replace(*a))
    save_checkpoint(tmp_path / "c.pt", {"model": {"w": torch.arange(40.0)}, "step": 3})
    raw = (tmp_path / "c.pt").read_bytes()
    assert load_checkpoint(tmp_path / "c.pt")["step"] == 3
    assert done[0] == "on the disk" and done[-1] == "renamed"
    for i in range(0, len(raw), every):
        damaged = bytearray(raw)
        damaged[i] ^= 1 << (i % 8)
        (tmp_path / "d.pt").write_bytes(damaged)
        with pytest.raises(ValueError, match="d.pt is"):
            load_checkpoint(tmp_path / "d.pt")
    for n in range(0, len(raw), 13 * every):
        (tmp_path / "d.pt").write_bytes(raw[:n])
        with pytest.raises(ValueError, match="d.pt is"):
            load_checkpoint(tmp_path / "d.pt")


@pytest.mark.deep
def test_a_thousand_flips_and_a_hundred_cuts_of_a_run(whole, corpus, tmp_path):
    """Of its checkpoints, run.json, shards and meta.json every one is noticed, or changes no value at all:
    white space of JSON, and a letter in the name of run.json's own sha256.
    """
    out, rng = tmp_path / "o", random.Random(0)
    shutil.copytree(whole[0], out)
    shutil.copytree(corpus / "data", tmp_path / "data")
    tree = ast.parse((ROOT / "train.py").read_text(encoding="utf-8"))
    names = {node.targets[0].id: ast.literal_eval(node.value) for node in tree.body[:100]
             if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)}
    wanted = "check_saved", "read_run", "checksum"
    body = [node for node in tree.body if getattr(node, "name", "") in wanted]
    names.update(DEFAULTS=names.copy(), origin=out, json=json, hashlib=hashlib, Path=Path,
                 UserError=UserError, saved_fields=saved_fields)
    exec(compile(ast.Module(body, []), "train.py", "exec"), names)

    def run_json():
        found = names["read_run"]()
        found.pop("sha257", None)
        if not found:
            raise ValueError

    play = tmp_path / "data/play"
    checks = {out / "ckpt.pt": lambda: load_checkpoint(out / "ckpt.pt"), out / "run.json": run_json,
              out / "best.pt": lambda: load_checkpoint(out / "best.pt"),
              **{file: lambda: verify("play", tmp_path / "data") for file in play.iterdir()}}
    assert len(checks) == 6
    for check in checks.values():
        check()
    for i, (file, check) in enumerate(itertools.islice(itertools.cycle(checks.items()), 1100)):
        good = file.read_bytes()
        at = rng.randrange(len(good))
        bad = good[:at] if i < 100 else good[:at] + bytes([good[at] ^ 1 << rng.randrange(8)]) + good[at + 1:]
        file.write_bytes(bad)
        try:
            check()
            noticed = False
        except ValueError:
            noticed = True
        file.write_bytes(good)
        assert noticed or harmless(good, bad), (file, at)


def harmless(good, bad):
    was, is_ = (list(json.loads(text).items()) for text in (good, bad))
    return was == is_ or was[:-1] == is_[:-1] and was[-1][0] == "sha256" != is_[-1][0]


def test_a_pickle_that_runs_code_is_not_run(tmp_path, monkeypatch):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    # with a good seal: what a malicious author would send
    save_checkpoint(tmp_path / "bomb.pt", {"model": Bomb()})
    with pytest.raises(ValueError, match="bomb.pt holds more than weights"):
        load_checkpoint(tmp_path / "bomb.pt")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="is a folder; give a file in it"):
        load_checkpoint(tmp_path)
    save_checkpoint(tmp_path / "none.pt", {"model": {}})
    with pytest.raises(ValueError, match="holds no model"):
        GPT.from_checkpoint(tmp_path / "none.pt")
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.9.1"))
    with pytest.raises(ValueError, match="torch 2.9.1 may run code of a file"):
        load_checkpoint(tmp_path / "none.pt")


CRAFTED = { # what a checkpoint has in place of a setting -> what is said
    "a global": ({"math": 5}, "settings that this train.py does not know: math"),
    "another type": ({"learning_rate": "1e-3"}, "settings that this train.py does not know: learning_rate"),
    "code": ({"update_hooks": "{d}/mine.py:f"}, "if you trust it, name it again: --update_hooks="),
    "code that watches": ({"forward_hooks": "{d}/mine.py:f"},
                          "if you trust it, name it again: --forward_hooks="),
}


@pytest.mark.parametrize("change, said", CRAFTED.values(), ids=CRAFTED)
def test_a_crafted_checkpoint_changes_settings_only(change, said, whole, corpus, tmp_path):
    out = tmp_path / "o"
    shutil.copytree(whole[0], out)
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef f(*a): pass")
    saved = load_checkpoint(out / "ckpt.pt")
    saved["config"]["train"].update({k: v.format(d=tmp_path) if isinstance(v, str) else v
                                     for k, v in change.items()})
    save_checkpoint(str(out / "ckpt.pt"), saved)
    done = train(corpus, out, "--max_iters=62", "--resume", code=2)
    assert said in done.stderr and not (tmp_path / "ran").exists() and len(unsettled(done.stderr)) <= 3
    if "update_hooks" in change:
        train(corpus, out, "--max_iters=62", "--resume", f"--update_hooks={tmp_path / 'mine.py'}:f")
        assert (tmp_path / "ran").exists()


def test_a_sealed_file_that_is_no_checkpoint_and_a_strange_run_json(whole, corpus, tmp_path):
    """The one before is used, as with a damaged one."""
    out = tmp_path / "o"
    shutil.copytree(whole[0], out)
    (out / "run.json").write_text('["of", "another", "shape"]')
    blob = (out / "ckpt.pt").read_bytes()
    (out / "ckpt.pt").write_bytes(resealed(blob, b"collections", b"collectionz"))
    done = train(corpus, out, "--max_iters=60", "--resume")
    assert "holds more than weights" in done.stdout and "ckpt.prev.pt, step 50" in done.stdout
    assert "WARNING" in done.stdout and "run.json is left aside" in done.stdout
    assert same(state(whole[0])["model"], state(out)["model"])


def resealed(blob, old, new):
    """A checkpoint with other bytes and a good seal: what a damaged pickle in a whole file looks like."""
    assert old in blob and len(old) == len(new)
    body = blob[:-64 - 7].replace(old, new) + b"sha256:"
    return body + hashlib.sha256(body[:-7]).hexdigest().encode()


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"step": 1})

    def full(state, part):
        with open(part, "wb") as f:
            f.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError):
        save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path)["step"] == 1 and os.listdir(tmp_path) == ["c.pt"]


def test_a_best_model_that_was_not_written_is_not_the_best(corpus, tmp_path):
    """Else a later model that is better than what best.pt holds would not be kept. Where the last checkpoint
    is lost as well, the exit code says so. By its clock an evaluation takes 1000 s: no time of training.
    """
    done = spoiled("""
import model, time
write = model.save_checkpoint
def save(path, state, *rest, **named):
    if state["step"]: raise OSError(28, "full", str(state["best"]))
    write(path, state, *rest, **named)
model.save_checkpoint = save
now, late, write_text = time.monotonic, [0], model.GPT.generate
time.monotonic = lambda: now() + 1000 * len(late)
model.GPT.generate = lambda *a, **k: late.append(0) or write_text(*a, **k)
""", corpus, tmp_path / "o", "--max_iters=10")
    first, last = (x["val_loss"] for x in metrics(tmp_path / "o") if "val_loss" in x)
    assert done.returncode == 1 and "NOT SAVED in" in done.stdout, done.stdout + done.stderr
    for name, best in (("best", last), ("ckpt", first)):
        assert last < first and f"{name}.pt WAS NOT WRITTEN ([Errno 28] full: '{best}')" in done.stdout
    assert all(line["time_s"] < 500 and line.get("tokens_per_s", 9) > 1 for line in metrics(tmp_path / "o"))
    assert load_checkpoint(tmp_path / "o/best.pt")["best"] == first


def test_a_second_run_in_the_folder_keeps_the_first(corpus, tmp_path):
    out = tmp_path / "o"
    train(corpus, out, "--max_iters=5")
    first = (out / "ckpt.pt").read_bytes()
    assert "moved to" in train(corpus, out, "--max_iters=5").stdout
    assert (out / "previous_1/ckpt.pt").read_bytes() == first
    kept = (out / "ckpt.pt").read_bytes()
    train(corpus, out, "--max_iters=5", "--dataset=nowhere", code=2) # a slip moves nothing
    assert (out / "ckpt.pt").read_bytes() == kept


# --- signals, and numbers that are no numbers ---


@pytest.mark.parametrize("number, code", [
    (signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.deep)])
def test_a_signal_saves_and_resume_goes_on(number, code, whole, corpus, tmp_path):
    out = tmp_path / "o"
    process = started(corpus, out, "step     15/", "--max_iters=60")
    process.send_signal(number)
    log, _ = process.communicate(timeout=60)
    assert process.returncode == code and "finishing this step, then saving" in log
    assert 15 <= load_checkpoint(out / "ckpt.pt")["step"] < 60
    train(corpus, out, "--max_iters=60", "--resume")
    assert same(state(whole[0]), state(out)) and timeless(whole[0]) == timeless(out)


def started(corpus, out, line, *flags):
    """A running train.py that has printed `line`."""
    process = start(command(corpus, out, *flags))
    wait_for(process, line)
    return process


def wait_for(process, *lines):
    for line in lines:
        while line not in (said := process.stdout.readline()):
            assert said, f"ended before it printed {line}"


def test_nobody_listens(whole, corpus, tmp_path):
    """The pipe behind stdout closes, as when `| tee log` ends first at Ctrl-C: a signal still saves, and
    without one the run goes on.
    """
    process = started(corpus, tmp_path / "stopped", "step     15/", "--max_iters=100000")
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and load_checkpoint(tmp_path / "stopped/ckpt.pt")["step"] >= 15
    process = started(corpus, tmp_path / "on", "step     15/", "--max_iters=60")
    process.stdout.close()
    assert process.wait(60) == 0 and same(state(whole[0]), state(tmp_path / "on"))
    assert timeless(whole[0]) == timeless(tmp_path / "on")
    assert "the run goes on" in process.stderr.read()


def test_a_closed_terminal_saves(corpus, tmp_path):
    process = started(corpus, tmp_path / "o", "step     15/", "--max_iters=100000")
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGHUP and load_checkpoint(tmp_path / "o/ckpt.pt")["step"] >= 15


def test_a_full_disk_costs_no_line_and_no_run(corpus, tmp_path):
    """No file may grow for a while, then they may again: the log has every step."""
    out = tmp_path / "o"
    process = started(corpus, out, "step     10/", "--max_iters=100000", "--log_interval=1")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE,
                     (os.path.getsize(out / "metrics.jsonl") + 100, resource.RLIM_INFINITY))
    wait_for(process, "metrics.jsonl CANNOT BE WRITTEN", "ckpt.pt WAS NOT WRITTEN", "step ")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    last = load_checkpoint(out / "ckpt.pt")
    assert process.returncode == 143 and not last["unwritten"]
    assert last["metrics_bytes"] == os.path.getsize(out / "metrics.jsonl")
    assert [line["step"] for line in metrics(out) if "train_loss" in line] == list(range(1, last["step"] + 1))


@pytest.mark.deep
def test_clocks_that_jump(whole, corpus, tmp_path):
    """The wall clock goes back an hour each time it is read; the computer sleeps a day between two steps. No
    weight changes, times only grow, and no line promises an end in the past.
    """
    done = spoiled("""
import time, optim
wall, now, slept, real = time.time, time.monotonic, [0, 0], optim.run_update_hooks
def backwards():
    slept[0] += 3600
    return wall() - slept[0]
def hooks(run, step, params):
    slept[1] += 86400 * (step == 32)
    return real(run, step, params)
time.time, time.monotonic, optim.run_update_hooks = backwards, lambda: now() + slept[1], hooks
""", corpus, tmp_path / "o", "--max_iters=60")
    assert same(state(whole[0]), state(tmp_path / "o")) and timeless(whole[0]) == timeless(tmp_path / "o")
    left = [float(words.replace(",", "")) for words in re.findall(r"(\S+) s left", ended(done).stdout)]
    times = [line["time_s"] for line in metrics(tmp_path / "o")]
    assert len(left) == 12 and min(left) >= 0 and max(left[:6]) < 1000 and max(left[7:]) < 1000 < left[6]
    assert times == sorted(times) and times[0] >= 0


STEPS = 2000 # of the long run; 20,000 take ten times as long


@pytest.mark.deep
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="measures as Linux does")
def test_a_long_run_leaks_nothing(corpus, tmp_path):
    """With evaluations, samples and checkpoints. Memory grows by less than 1 MB in 1,000 steps after the
    first 1,000, the number of open files not at all. It ends in the bits of its twin, which stopped half-way.
    """
    (tmp_path / "size.py").write_text("""import os
def of_process(step, params):
    if step % 500 == 499:
        pages = int(open("/proc/self/statm").read().split()[1])
        return {"MB": pages * os.sysconf("SC_PAGE_SIZE") / 2**20, "files": len(os.listdir("/proc/self/fd"))}
""", encoding="utf-8")
    flags = [f"--update_hooks={tmp_path / 'size.py'}:of_process", "--n_layer=1", "--n_head=1", "--n_embd=8",
             "--block_size=8", "--batch_size=1", "--attention=mha", "--eval_iters=2", "--eval_interval=100",
             "--sample_tokens=2", "--keep_checkpoints=2", "--log_interval=500", f"--lr_decay_iters={STEPS}"]
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(train, corpus, tmp_path / name, *flags, f"--max_iters={steps}", timeout=900)
                for name, steps in (("long", STEPS), ("twin", STEPS // 2))]
    [job.result() for job in jobs]
    train(corpus, tmp_path / "twin", *flags, f"--max_iters={STEPS}", "--resume", timeout=900)
    sizes = [list(line["hooks"].values())[0] for line in metrics(tmp_path / "long") if "hooks" in line]
    grown = (sizes[-1]["MB"] - sizes[1]["MB"]) / (STEPS - 1000) * 1000
    print(f"{grown:.3f} MB in 1,000 steps, {sizes[-1]}")
    assert len(sizes) == STEPS // 500 and grown < 1
    assert sizes[-1]["files"] == sizes[0]["files"]
    assert same(state(tmp_path / "long"), state(tmp_path / "twin"))
    lines = [[{**line, "hooks": 0} for line in timeless(tmp_path / name)] for name in ("long", "twin")]
    assert lines[0] == lines[1]


PHASES = { # where a run is -> what stops it there for a moment, and how it ends at SIGTERM
    "downloading": ("import data\nreal = data.prepare\ndata.prepare = lambda *a: pause() or real(*a)", -15),
    "preparing": ("import data\nreal = data.write_synced\ndata.write_synced = lambda *a: pause() or real(*a)",
                  -15),
    "compiling": ("import torch\ntorch.compile = lambda model: pause() or model", 143),
    "saving": ("import torch\nreal = torch.save\ntorch.save = lambda *a: pause() or real(*a)", 143)}


@pytest.mark.deep
@pytest.mark.parametrize("phase", PHASES)
def test_sigterm_in_every_phase(phase, corpus, tmp_path):
    """Evaluating and training have tests of their own. A run that has trained saves; one that has not ends at
    once. In both cases the same command with --resume ends as a run that nobody stopped.
    """
    code, end = PHASES[phase]
    shutil.copy(corpus / "play.txt", tmp_path)
    pause = "import time\ndef pause(): print('asleep', flush=True), time.sleep(1)\n"
    flags = [f"--dataset={tmp_path / 'play.txt'}", f"--data_dir={tmp_path / 'data'}", "--max_iters=20",
             "--compile=true" if phase == "compiling" else "--compile=false"]
    process = start(spoiling(pause + code, corpus, tmp_path / "o", *flags))
    wait_for(process, "asleep")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == end
    assert not list((tmp_path / "data").glob("play*")) or end == 143
    code = "import torch\ntorch.compile = lambda model: model"
    ended(run(spoiling(code, corpus, tmp_path / "o", *flags, "--resume")))
    ended(run(spoiling(code, corpus, tmp_path / "whole", *flags)))
    assert same(state(tmp_path / "o"), state(tmp_path / "whole"))
    assert timeless(tmp_path / "o") == timeless(tmp_path / "whole")


@pytest.mark.deep
@pytest.mark.parametrize("limit, code, words", [(500, 2, "File too large"), (5000, 2, "File too large"),
                                                (20_000, 1, "MB are free. The one before is kept")])
def test_no_file_may_grow(limit, code, words, corpus, tmp_path):
    """A full disk while run.json is written, while the text is prepared and while a checkpoint is saved."""
    before = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    flags = [f"--dataset={corpus / 'play.txt'}", f"--data_dir={tmp_path / 'data'}"] * (limit == 5000)
    done = ended(spoiled(before, corpus, tmp_path / "o", "--max_iters=3", "--kernel=torch", *flags), code)
    assert words in done.stdout + done.stderr and len(unsettled(done.stderr)) <= 3
    assert ("ckpt.pt WAS NOT WRITTEN" in done.stdout) == ("NOT SAVED in" in done.stdout) == (code == 1)
    assert not list(tmp_path.glob("*/*.pt*")) and not list(tmp_path.glob("data/*/*"))


@pytest.mark.deep
def test_bare_surroundings(corpus, tmp_path):
    """No home, no temporary folder, a locale of ASCII, no package but the required ones: it trains all the
    same. Into a folder that nobody may write it does not, and says so.
    """
    without = """import sys, tempfile
def full(*a, **k): raise OSError(28, "No space left on device")
tempfile.mkdtemp = full
sys.modules.update(dict.fromkeys(("triton", "tiktoken", "tokenizers", "pyarrow", "zstandard", "safetensors",
                                  "tensorboard", "matplotlib", "wandb", "transformers"), None))"""
    env = {"HOME": None, "USER": None, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = ended(run(spoiling(without, corpus, tmp_path / "ö", "--max_iters=3"), env=env))
    assert "NO WORKING C COMPILER" in done.stdout and load_checkpoint(tmp_path / "ö/ckpt.pt")["step"] == 3
    if os.path.isdir("/proc/self"): # where root may not write either
        refused = train(corpus, "/proc/out", code=2)
        assert unsettled(refused.stderr) == ["error: cannot open /proc/out: No such file or directory"]


def test_a_folder_that_is_gone_ends_the_run_in_a_line(corpus, tmp_path):
    process = started(corpus, tmp_path / "o", "step     10/", "--max_iters=100000")
    shutil.rmtree(tmp_path / "o")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and f"the folder {tmp_path / 'o'} is gone" in said
    assert len(unsettled(said)) == 1


@pytest.mark.deep
def test_evaluation_is_bounded_shows_where_it_is_and_ends_at_a_signal(corpus, tmp_path):
    long = tmp_path / "long.txt"
    long.write_text("to be or not to be, that is the question\n" * 80_000)
    flags = [f"--dataset={long}", f"--data_dir={tmp_path / 'data'}", "--val_fraction=0.9", "--max_iters=1",
             "--batch_size=1"]
    process = started(corpus, tmp_path / "o", "evaluating: ", *flags, "--eval_iters=-1")
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode == 143 and time.monotonic() - began < 5
    assert load_checkpoint(tmp_path / "o/ckpt.pt")["evaluated"] == -1
    said = train(corpus, tmp_path / "p", *flags, "--batch_size=64").stdout
    taken, there = re.search(r"each evaluation takes ([\d,]+) of ([\d,]+) validation tokens", said).groups()
    assert there == "2,952,000" and 100_000 < int(taken.replace(",", "")) < 140_000


def test_a_second_signal_ends_the_run_at_once(corpus, tmp_path):
    slow = "import time\ndef slow(step, params): print('asleep', flush=True), time.sleep(60)\n"
    (tmp_path / "slow.py").write_text(slow, encoding="utf-8")
    process = started(corpus, tmp_path / "o", "asleep", "--eval_iters=1",
                      f"--update_hooks={tmp_path / 'slow.py'}:slow")
    process.send_signal(signal.SIGINT)
    wait_for(process, "SIGINT: finishing this step")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == -signal.SIGINT and not (tmp_path / "o/ckpt.pt").exists()


def spoiled(code, corpus, out, *flags):
    """train.py run to its end after `code` has replaced a part of torch or of the project."""
    return run(spoiling(code, corpus, out, *flags))


def spoiling(code, corpus, out, *flags):
    before = f"import sys\nsys.argv = sys.argv[1:]\nsys.path.insert(0, {str(ROOT)!r})\n"
    after = "\nimport runpy\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    return ["-c", before + code + after, *command(corpus, out, *flags)]


LATE = "import optim\noptim.LATE = ('cpu',)\n" # what a GPU does: decide on the device, read a step later


def poisoned_batches(corpus, out, bad, steps, *flags, before=""):
    return spoiled(before + f"""
import model, torch, torch.nn.functional as F
real, calls = F.cross_entropy, [0]
def cross_entropy(*a, **k):
    calls[0] += torch.is_grad_enabled()
    loss = real(*a, **k)
    return loss * float("{bad}") if torch.is_grad_enabled() and calls[0] in {steps} else loss
F.cross_entropy = cross_entropy
""", corpus, out, *flags)


@pytest.mark.parametrize("bad, before, optimizer", [
    ("nan", "", "adamw"), ("inf", LATE, "fadam"),
    *(pytest.param(*case, marks=pytest.mark.deep)
      for case in (("inf", "", "adamw"), *(("nan", LATE, name) for name in ("adamw", "adam_mini", "muon"))))])
def test_a_non_finite_batch_is_skipped(bad, before, optimizer, corpus, tmp_path):
    """The 4th batch is poison: weights, moments and steps after 4 batches are those after 3. A run that is
    resumed from there goes on as one that was not stopped.
    """
    out, flags = tmp_path / "o", ("--checkpoint_interval=3", "--log_interval=1", f"--optimizer={optimizer}")
    short = "--max_iters=4", "--lr_decay_iters=9", *flags
    done = poisoned_batches(corpus, out, bad, {4}, *short, before=before)
    losses = [line["train_loss"] for line in metrics(out) if "lr" in line]
    assert [loss is None for loss in losses] == [False, False, False, True] # JSON has no NaN
    assert done.returncode == 0 and "step 3: loss" in done.stdout, done.stdout + done.stderr
    assert "BATCH SKIPPED (1 so far)" in done.stdout
    last, after = load_checkpoint(out / "ckpt.prev.pt"), load_checkpoint(out / "ckpt.pt")
    assert (last["step"], after["step"], after["skipped"]) == (3, 4, 1)
    assert same(last["model"], after["model"])
    assert same(last["optimizer"]["state"], after["optimizer"]["state"])
    if before:
        whole = *flags, "--max_iters=9", "--log_interval=100" # a line of the log reads what is late
        ended(poisoned_batches(corpus, tmp_path / "whole", bad, {4}, *whole, before=before))
        ended(poisoned_batches(corpus, out, bad, {}, *whole, "--resume", before=before))
        ends = [{**state(o), "config": None} for o in (out, tmp_path / "whole")]
        assert same(*ends)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ("adamw", "fadam", "adam_mini", "muon"))
def test_a_gpu_skips_a_batch_and_resumes(optimizer, corpus, tmp_path, device="cuda"):
    """Here a hook is the poison: on a GPU the loss is computed elsewhere."""
    code = "def nan(step, params):\n    for p in params.values(): p.grad *= float('nan') if step == 3 else 1"
    (tmp_path / "h.py").write_text(code, encoding="utf-8")
    flags = (f"--optimizer={optimizer}", f"--update_hooks={tmp_path / 'h.py'}:nan", f"--device={device}",
             "--checkpoint_interval=3", "--log_interval=100")
    assert "BATCH SKIPPED (1 so far)" in train(corpus, tmp_path / "o", "--max_iters=4", *flags).stdout
    last, after = load_checkpoint(tmp_path / "o/ckpt.prev.pt"), load_checkpoint(tmp_path / "o/ckpt.pt")
    assert (last["step"], after["step"], after["skipped"]) == (3, 4, 1)
    assert same(last["model"], after["model"])
    assert same(last["optimizer"]["state"], after["optimizer"]["state"])
    train(corpus, tmp_path / "o", "--max_iters=8", "--resume", *flags)
    after = load_checkpoint(tmp_path / "o/ckpt.pt")
    assert (after["step"], after["skipped"]) == (8, 1)
    assert all(int(one["step"]) == 7 for one in after["optimizer"]["state"].values() if "step" in one)


@pytest.mark.deep
@pytest.mark.parametrize("before", ("", LATE), ids=("at once", "late"))
def test_a_non_finite_batch_of_the_drafting_cell_costs_the_model_nothing(before, corpus, tmp_path):
    done = spoiled(before + """
import model
real, calls = model.Ahead.loss, []
model.Ahead.loss = lambda *a: real(*a) * (float("nan") if calls.append(1) or len(calls) == 4 else 1)
""", corpus, tmp_path / "with", "--max_iters=10", "--n_ahead=2")
    assert "step 3: what learns beside the model has a gradient of norm nan" in ended(done).stdout
    train(corpus, tmp_path / "without", "--max_iters=10")
    a, b = state(tmp_path / "with")["model"], state(tmp_path / "without")["model"]
    assert all(torch.equal(a[k], b[k]) for k in b) and all(v.isfinite().all() for v in a.values())


@pytest.mark.deep
@pytest.mark.parametrize("before", ("", LATE), ids=("at once", "late"))
def test_a_spike_is_skipped(before, corpus, tmp_path):
    """The loss of the 141st batch is multiplied by 1e4: weights and moments stay those of 140 batches, and
    the end is within the noise of a run without a spike. Resumed from there, the window is what it was.
    """
    flags = "--grad_clip=0", "--eval_interval=70", "--skip_spikes=8", "--lr_decay_iters=170", "--min_lr=1e-3"
    out, whole, calm = (tmp_path / name for name in ("o", "whole", "calm"))
    done = poisoned_batches(corpus, out, 1e4, {141}, *flags, "--max_iters=141", before=before)
    assert "step 140: loss" in done.stdout and "BATCH SKIPPED (1 so far)" in done.stdout, done.stderr
    last, after = load_checkpoint(out / "ckpt.prev.pt"), load_checkpoint(out / "ckpt.pt")
    assert (last["step"], after["step"], last["skipped"], after["skipped"]) == (140, 141, 0, 1)
    assert same(last["model"], after["model"])
    assert same(last["optimizer"]["state"], after["optimizer"]["state"])
    ended(poisoned_batches(corpus, out, 1, {}, *flags, "--max_iters=170", "--resume", before=before))
    ended(poisoned_batches(corpus, whole, 1e4, {141}, *flags, "--max_iters=170", before=before))
    assert same(*(state(o)[k] for o in (out, whole) for k in ("model",)))
    assert same(state(out)["recent"], state(whole)["recent"]) and "skipped" not in metrics(whole)[0]
    assert metrics(out)[-1]["skipped"] == metrics(whole)[-1]["skipped"] == 1
    train(corpus, calm, *flags, "--max_iters=170")
    assert metrics(whole)[-1]["val_loss"] == pytest.approx(metrics(calm)[-1]["val_loss"], abs=0.05)
    assert load_checkpoint(calm / "ckpt.pt")["skipped"] == 0


@pytest.mark.parametrize("before", ("", LATE), ids=("at once", "late"))
def test_many_non_finite_batches_stop_the_run(before, corpus, tmp_path):
    bad = {1, 3, 5, *range(7, 99)} # the first three are not in a row
    done = poisoned_batches(corpus, tmp_path / "o", "nan", bad, "--max_iters=60", "--checkpoint_interval=3",
                            before=before)
    assert done.returncode == 1 and "6 non-finite batches in a row" in done.stderr
    assert "SKIPPED (9 so far)" in done.stdout and "SKIPPED (10" not in done.stdout
    assert load_checkpoint(tmp_path / "o/ckpt.pt")["step"] <= 11 # and what was saved is finite
    assert all(v.isfinite().all() for v in load_checkpoint(tmp_path / "o/ckpt.pt")["model"].values())


def test_a_late_run_is_the_run(whole, corpus, tmp_path):
    """Reading losses a step later changes no weight, no line of the log and nothing in a checkpoint."""
    ended(spoiled(LATE, corpus, tmp_path / "o", "--max_iters=60"))
    assert same(state(whole[0]), state(tmp_path / "o")) and timeless(whole[0]) == timeless(tmp_path / "o")


def test_the_numbers_of_a_step_are_awaited_on_the_gpu_that_trains():
    """With --device=cuda:1 an event in the stream of cuda:0 would say at once that they have arrived."""
    seen = []

    class Stream:
        def __init__(self, device="cuda:0"):
            self.device = device

        def record_event(self, event=None):
            seen.append(self.device)
            return event

    class Event:
        def record(self, stream=None):
            (stream or Stream()).record_event(self)

    cuda = types.SimpleNamespace(current_stream=Stream, Event=Event)
    fake = types.SimpleNamespace(cuda=cuda, stack=torch.stack, Tensor=torch.Tensor)
    names = {"torch": fake, "launched": [], "kind": "cuda", "late": True, "device": "cuda:1"}
    tree = ast.parse((ROOT / "train.py").read_text(encoding="utf-8"))
    body = [node for node in tree.body if getattr(node, "name", "") == "send"]
    exec(compile(ast.Module(body, []), "train.py", "exec"), names)
    names["send"](3, bad=torch.zeros(()), ce=torch.ones(()))
    assert seen == ["cuda:1"] and names["launched"][0][2].tolist() == [0, 1]


def test_auto_compiles_where_it_pays():
    """train.py's own estimate for the model of config/train_shakespeare_diffmla_gpu.py on a GPU."""
    tree = ast.parse((ROOT / "train.py").read_text(encoding="utf-8"))
    body = [node for node in tree.body if getattr(node, "name", "") == "compiling_pays"]
    config = runpy.run_path(str(ROOT / "config/train_shakespeare_diffmla_gpu.py"))
    names = {"config": GPTConfig(vocab_size=65, n_layer=config["n_layer"]), "flops_per_step": 1e12,
             "accumulate": 1, "kind": "cuda"}
    exec(compile(ast.Module(body, []), "train.py", "exec"), names)
    for steps, pays in ((5000, True), (200, False)):
        names["max_iters"] = steps
        gain, cost = names["compiling_pays"]()
        assert (gain > 2 * cost) == pays and 20 <= cost <= 60


def test_a_failing_compiler_is_said_aloud(corpus, tmp_path):
    broken = "import torch\ndef broken(model): raise RuntimeError('no compiler here')\ntorch.compile = broken"
    done = ended(spoiled(broken, corpus, tmp_path / "o", "--max_iters=3", "--compile=true"))
    assert "torch.compile FAILED, TRAINING IN EAGER MODE: RuntimeError: no compiler here" in done.stdout


# --- sizes ---


def test_model_size_is_below_everything_given(corpus, tmp_path):
    """The data's vocabulary and every given field win; the rest is the preset's. A resumed run has its
    checkpoint's fields.
    """
    (tmp_path / "c.py").write_text("n_layer = 1\nmodel_size = 'tiny'")
    folders = [f"--out_dir={tmp_path / 'o'}", f"--data_dir={corpus / 'data'}"]
    first = ("--dataset=play --batch_size=2 --n_embd=64 --n_head=2 --eval_iters=1 --sample_tokens=4 "
             "--warmup_iters=1 --model_size=nano --block_size=32 --max_iters=2").split()
    ended(run([ROOT / "train.py", tmp_path / "c.py", *folders, *first]))
    config = load_checkpoint(tmp_path / "o/ckpt.pt")["config"]
    given = {"n_layer": 1, "n_embd": 64, "n_head": 2, "block_size": 32,
             "vocab_size": load("play", corpus / "data").vocab_size}
    assert config["model"] == asdict(GPTConfig(**{**PRESETS["nano"], **given}))
    assert config["train"]["model_size"] == "nano"
    ended(run([ROOT / "train.py", *folders, "--resume", "--max_iters=4"]))
    last = load_checkpoint(tmp_path / "o/ckpt.pt")
    assert last["step"] == 4 and last["config"]["model"] == config["model"]
    assert last["config"]["train"]["model_size"] == "nano"


def test_what_a_file_gave_goes_when_the_command_line_has_no_use_for_it(corpus, tmp_path):
    (tmp_path / "c.py").write_text("kv_rank, rope_dim, attention = 8, 4, 'diff_mla'\nmin_lr = 1e-3\n"
                                   "sparse_density, windows, memory_slots = 0.3, 2, 4")
    said = train(corpus, tmp_path / "o", str(tmp_path / "c.py"), "--attention=mha", "--memory_slots=0",
                 "--learning_rate=3e-5", "--max_iters=2").stdout
    for words in ("kv_rank=8 of the config file is dropped", "rope_dim=4 of", "sparse_density=0.3 of",
                  "windows=2 of", "lowered to 3e-06"):
        assert words in said, said
    last = load_checkpoint(tmp_path / "o/ckpt.pt")["config"]
    assert (last["model"]["kv_rank"], last["train"]["windows"]) == (0, 1)
    assert last["train"]["min_lr"] == pytest.approx(3e-6)
    again = train(corpus, tmp_path / "o", str(tmp_path / "c.py"), "--attention=mha", "--memory_slots=0",
                  "--learning_rate=3e-5", "--max_iters=3", "--resume") # the file still has what was dropped
    assert "RESUMING" in again.stdout and load_checkpoint(tmp_path / "o/ckpt.pt")["step"] == 3
    (tmp_path / "d.py").write_text("learning_rate = 3e-5") # min_lr's default was nobody's wish
    assert "lowered to" in train(corpus, tmp_path / "p", "--max_iters=0", str(tmp_path / "d.py")).stdout
    train(corpus, tmp_path / "q", "--max_iters=0", "--learning_rate=3e-5", "--min_lr=1e-4", code=2)


@pytest.mark.parametrize("flags, want", [
    ([], "False False"), (["--dtype=bfloat16", "--sampling=epochs"], "True True")])
def test_dtype_reaches_muon_and_sampling_the_data(corpus, tmp_path, flags, want):
    spy = """
import data, optim
batch, orthogonalise, asked = data.Tokens.batch, optim.orthogonalise, []
def spied_batch(self, *args, epochs=False):
    asked.append(epochs)
    return batch(self, *args, epochs=epochs)
def spied_orthogonalise(matrices, steps, bf16):
    print("ASKED", bf16, asked[-1])
    return orthogonalise(matrices, steps, bf16)
data.Tokens.batch, optim.orthogonalise = spied_batch, spied_orthogonalise
"""
    out = tmp_path / "o"
    done = spoiled(spy, corpus, out, "--optimizer=muon", "--max_iters=1", *flags)
    assert f"ASKED {want}" in ended(done).stdout
    if flags: # another order of the data would be another run
        refused = train(corpus, out, "--resume", "--max_iters=2", "--sampling=random", code=2)
        assert "sampling was 'epochs', now 'random'" in refused.stdout + refused.stderr


def test_bf16_of_a_file_is_left_where_the_cpu_has_none(corpus, tmp_path):
    old_cpu = "import kernels\nkernels.cpu_has_bf16 = lambda: False"
    (tmp_path / "c.py").write_text("dtype = 'bfloat16'")
    for more in ([], ["--resume"]): # which keeps what ran
        flags = "--max_iters=0", tmp_path / "c.py", *more
        said = ended(spoiled(old_cpu, corpus, tmp_path / "o", *flags)).stdout
        assert "dtype float32" in said and ("float32 is taken instead" in said) == (not more)
    assert load_checkpoint(tmp_path / "o/ckpt.pt")["config"]["train"]["dtype"] == "float32"
    typed = spoiled(old_cpu, corpus, tmp_path / "p", "--max_iters=0", "--dtype=bfloat16") # obeyed
    assert "dtype bfloat16" in ended(typed).stdout


@pytest.mark.deep
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bf16_on_a_cpu_is_near_fp32(optimizer, corpus, tmp_path):
    """Losses of training and of evaluation; weights and moments stay fp32."""
    flags = ["--max_iters=30", f"--optimizer={optimizer}", "--dropout=0.0"]
    side_by_side(corpus, tmp_path, half=[*flags, "--dtype=bfloat16"], full=flags)
    half, full = ([line.get("train_loss") or line["val_loss"] for line in metrics(tmp_path / out)]
                  for out in ("half", "full"))
    assert half != full and half == pytest.approx(full, rel=0.03)
    saved = load_checkpoint(tmp_path / "half/ckpt.pt")
    moments = [v for s in saved["optimizer"]["state"].values() for v in s.values() if torch.is_tensor(v)]
    assert {t.dtype for t in [*saved["model"].values(), *moments]} == {torch.float32}


def test_several_processes_without_torchrun_are_refused(corpus, tmp_path):
    refused = train(corpus, tmp_path / "o", code=2, env={"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": None})
    assert "start them with torchrun" in refused.stderr


# --- shards and tokenizers of other programs ---


@pytest.mark.deep
def test_shards_and_tokenizer_of_hugging_face(tmp_path):
    """prepare, two steps, sample.py, all from files that other programs wrote and that are gone when the
    model writes.
    """
    tokenizers = pytest.importorskip("tokenizers")
    codec = bpe(tokenizers)
    codec.save(str(tmp_path / "bpe.json"))
    ids = np.array(codec.encode(SPEECH).ids[:1980])
    (tmp_path / "shards").mkdir()
    for i, part in enumerate(np.split(ids.reshape(-1, 33), 3)):
        np.save(tmp_path / f"shards/shard_{i}.npy", part.astype(("uint16", "int32", "int64")[i]))

    def call(script, *flags, code=0):
        return ended(run([ROOT / script, *flags], cwd=tmp_path), code)

    small = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=32", "--batch_size=2", "--max_iters=2",
             "--warmup_iters=1"]
    call("train.py", "--dataset=shards", "--tokenizer=bpe.json", "--out_dir=o", "--model_size=micro", *small)
    prepare(tmp_path / "shards", data_dir=tmp_path / "other")
    refused = call("train.py", "--dataset=shards", "--tokenizer=bpe.json", "--data_dir=other", "--out_dir=p",
                   *small, code=2)
    assert "tokenizer=none" in refused.stderr and "shards --tokenizer=bpe.json" in refused.stderr
    (tmp_path / "speech.txt").write_text(SPEECH, encoding="utf-8")
    prepare(tmp_path / "speech.txt", str(tmp_path / "bpe.json"), tmp_path / "data")
    (tmp_path / "speech.txt").write_text(SPEECH + " once more", encoding="utf-8")
    (tmp_path / "bpe.json").unlink()
    # the path again: prepared with the vocabulary that it had
    call("train.py", "--dataset=speech.txt", "--out_dir=q", "--memory_slots=2", *small)
    made = load_checkpoint(tmp_path / "q/ckpt.pt")["config"]["model"]
    assert made["document_token"] == codec.token_to_id("<|endoftext|>") # what ends a document
    assert load("speech", tmp_path / "data").tokenizer.name == "hf"
    for gone in ("shards", "data"):
        shutil.rmtree(tmp_path / gone)
    assert load_checkpoint(tmp_path / "o/ckpt.pt")["config"]["model"]["vocab_size"] == codec.get_vocab_size()
    said = call("sample.py", "--out_dir=o", "--start=thou art: ", "--max_new_tokens=12",
                "--temperature=0").stdout
    model, prompt = GPT.from_checkpoint(tmp_path / "o/best.pt"), codec.encode("thou art: ").ids
    wanted = model.generate(torch.tensor([prompt]), 12, temperature=0)[0].tolist()
    shown = codec.decode(wanted, skip_special_tokens=False)
    assert "".join(c for c in shown if c.isprintable()) in "".join(c for c in said if c.isprintable())


SPEECH = "to be, or not to be: that is the question. thou art more lovely and more temperate\n" * 150


def bpe(tokenizers):
    """A byte-level BPE as LEPTON's, trained here, with end of text 0 and padding 1."""
    codec = tokenizers.Tokenizer(tokenizers.models.BPE())
    codec.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    codec.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>", "<|pad|>"],
                                             show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    codec.train_from_iterator([SPEECH.replace("question", str(i)) for i in range(5)], trainer)
    return codec
