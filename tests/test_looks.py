"""What train.py shows while it trains, and what it gives to TensorBoard and Weights & Biases."""
import ast
import io
import json
import math
import os
import re
import shutil
from datetime import timedelta
from pathlib import Path

import pytest

from model import load_checkpoint, save_checkpoint
from processes import ROOT, run, start
from test_train import command, ended, metrics, same, spoiled, state, train, unsettled, whole # noqa: F401


def parts(*wanted, **names):
    """Functions of train.py by themselves, in a namespace of `names`."""
    tree = ast.parse((ROOT / "train.py").read_text(encoding="utf-8"))
    body = [node for node in tree.body if getattr(node, "name", "") in wanted]
    assert len(body) == len(wanted)
    names.update(math=math, timedelta=timedelta, shutil=shutil, Path=Path, Callable=object)
    exec(compile(ast.Module(body, []), "train.py", "exec"), names)
    return names


def screen(written):
    """The rows that a terminal shows: a return goes back to the first column and erases nothing."""
    rows = []
    for line in written.split("\n"):
        row = ""
        for words in line.split("\r"):
            row = words + row[len(words):]
        rows.append(row.rstrip())
    return rows


@pytest.mark.parametrize("on_terminal", [True, False])
def test_a_passing_line_is_replaced_and_others_stay(on_terminal, monkeypatch):
    """On a terminal of 20 columns; each call writes once. A file gets every line whole."""
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((20, 5)))
    file = io.StringIO()
    names = parts("say", on_terminal=on_terminal, shown=0)
    names["print"] = lambda *words, **how: print(*words, **{**how, "file": file})
    said = [("first", False), ("step 1" + 30 * ".", True), ("step 2", True), ("found\nit\n  all", False),
            ("a", True), ("longer", True), ("", False), ("end", False)]
    lengths = []
    for words, passing in said:
        names["say"](words, passing)
        lengths.append(max(map(len, screen(file.getvalue())[-2:])))
    if on_terminal:
        assert screen(file.getvalue()) == ["first", "found", "it", "  all", "", "end", ""]
        assert lengths[1] == 19 and "step 2" in file.getvalue() # cut, so that the terminal adds no row
    else:
        assert file.getvalue() == "".join(f"{words}\n" for words, _ in said)


def test_time_left_counts_every_evaluation_that_will_come():
    """Against a loop as train.py's own, for all ends, intervals and steps. A step takes 2 s."""
    names = parts("time_left", eval_s=5.0)
    for max_iters in (1, 6, 7):
        for interval in (1, 2, 3, 10):
            for step in range(1, max_iters + 1):
                due = sum(s % interval == 0 or s == max_iters for s in range(step, max_iters + 1))
                names.update(max_iters=max_iters, eval_interval=interval, run={"step": step})
                seconds = (max_iters - step) * 2 + due * 5
                assert names["time_left"](0.5) == timedelta(seconds=seconds), (max_iters, interval, step)


def test_the_line_of_an_evaluation():
    names = parts("verdict", run={"step": 250, "best": 1.9434, "best_step": 0}, last_loss=1.9433)
    line = names["verdict"](True, 1.7123, 2.4703)
    assert line == "step 250: val loss 1.7123 (-0.2310), 2.47 bits/byte, best"
    assert names["verdict"](False, 2.0) == "step 250: val loss 2.0000 (+0.0567), best 1.9434 at step 0"
    names.update(last_loss=None)
    names["run"].update(best=math.inf)
    assert names["verdict"](False, math.nan) == "step 250: val loss nan"


@pytest.mark.deep
def test_a_terminal_shows_one_line_that_moves(corpus, tmp_path):
    """The rows that stay are the lines of evaluations, samples and the end. The other bytes are the steps."""
    ours, theirs = os.openpty()
    process = start(command(corpus, tmp_path / "o", "--max_iters=20", "--log_interval=1"), stdout=theirs)
    os.close(theirs)
    written = b""
    while chunk := readable(ours):
        written += chunk
    assert process.wait(60) == 0
    written = written.decode().replace("\r\n", "\n")
    rows = screen(written)
    assert len(re.findall(r"\rstep +\d+/20  loss [\d.]+  [\d,]+ tokens/s  0:00:\d\d left", written)) >= 17
    assert not [row for row in rows if "/20" in row] and sum("val loss" in row for row in rows) == 4
    assert max(map(len, written.replace("\n", "\r").split("\r"))) < 200 and rows[-2].startswith("next: ")


def readable(fd):
    try:
        return os.read(fd, 65536)
    except OSError: # the other end is closed
        return b""


@pytest.mark.deep
def test_a_long_run_says_how_long_it_will_take(corpus, tmp_path):
    """By a clock that runs 100,000 times as fast, after a few steps. A short run says nothing."""
    fast = "import time\nnow = time.monotonic\ntime.monotonic = lambda: 1e5 * now()"
    done = ended(spoiled(fast, corpus, tmp_path / "o", "--max_iters=30", "--eval_iters=1"))
    assert len(re.findall(r"^this run takes about .*\d:\d\d:\d\d hours, evaluations", done.stdout, re.M)) == 1
    assert done.stdout.index("this run takes") < done.stdout.index("step      5/30")
    left = [float(words.replace(",", "")) for words in re.findall(r"([\d,]+) s left$", done.stdout, re.M)]
    assert left[-1] > 0 # the last evaluation is still to come
    assert "this run takes" not in train(corpus, tmp_path / "p", "--max_iters=30", "--eval_iters=1").stdout


@pytest.mark.deep
def test_eval_only_prints_the_loss_and_changes_nothing(whole, corpus, tmp_path):
    """Not even where the checkpoint is not the newest: a resume would move what is newer aside."""
    out = tmp_path / "o"
    shutil.copytree(whole[0], out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    losses = {line["step"]: line["val_loss"] for line in metrics(out) if "val_loss" in line}
    for name, step in (("ckpt.pt", 60), ("ckpt.prev.pt", 50)):
        done = train(corpus, out, f"--resume={out / name}", "--eval_only")
        assert f"step {step}: val loss {losses[step]:.4f}, " in done.stdout.splitlines()[-1]
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    for flags in ([], ["--resume"]): # in the second case there is a folder, but no checkpoint
        refused = train(corpus, tmp_path / "new", *flags, "--eval_only", code=2)
        assert "add --resume" in refused.stderr and not list(tmp_path.glob("new/*"))
        (tmp_path / "new").mkdir(exist_ok=True)


@pytest.mark.deep
def test_eval_only_needs_neither_the_lock_nor_the_memory_of_a_run(whole, corpus, tmp_path):
    """Of a damaged checkpoint it takes the one before, and leaves both in place. Two processes take weights
    without a run.
    """
    fcntl, out = pytest.importorskip("fcntl"), tmp_path / "o"
    shutil.copytree(whole[0], out)
    (out / "ckpt.pt").write_bytes(b"cut")
    older = load_checkpoint(out / "ckpt.prev.pt")
    del older["best_step"]
    save_checkpoint(out / "ckpt.prev.pt", older)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    loss = next(line["val_loss"] for line in metrics(out) if "val_loss" in line and line["step"] == 50)
    with open(out / "lock") as lock: # as a run holds it
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = train(corpus, out, "--resume", "--eval_only", "--max_iters=90000").stdout
    assert "WARNING" in said and "memory: " not in said
    assert f"\nstep 50: val loss {loss:.4f}, " in said and said.endswith(" at step unknown\n")
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    words = [*command(corpus, tmp_path / "new"), f"--init_from={out / 'ckpt.prev.pt'}", "--eval_only"]
    words = [word for word in words if "--n_" not in str(word) and "attention" not in str(word)]
    for more in ([], ["--fsdp"]):
        done = ended(run(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *words, *more],
                         fresh=True))
        assert f"step 0: val loss {loss:.4f}, " in done.stdout.splitlines()[-1]
    assert not (tmp_path / "new").exists()


# --- TensorBoard, Weights & Biases ---

FAKE = '''import json, os, random
def note(call, /, *a, **k):
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps([call, a, k], default=str) + "\\n")
    random.random()
    if os.environ.get("FAILS") == call: raise RuntimeError("no network\\nat all")
class Run:
    def define_metric(self, *a, **k): note("define_metric", *a, **k)
    def log(self, *a, **k): note("log", *a, **k)
def init(**k):
    note("init", **k)
    return Run()
'''


@pytest.mark.deep
def test_wandb_gets_the_numbers_of_the_log_and_may_fail(whole, corpus, tmp_path):
    """By a package that writes down its calls. What it draws from Python's random numbers changes no bit."""
    (tmp_path / "wandb.py").write_text(FAKE, encoding="utf-8")
    out, env = tmp_path / "mine", {"PYTHONPATH": str(tmp_path), "CALLS": str(tmp_path / "calls")}
    for more in (["--max_iters=30"], ["--max_iters=60", "--resume"]):
        train(corpus, out, "--wandb", "--wandb_project=p", "--lr_decay_iters=60", *more, env=env)
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    begun = [named for name, _, named in calls if name == "init"]
    assert len(begun) == 2 and begun[0]["id"] == begun[1]["id"] and begun[0]["resume"] == "allow"
    assert (begun[0]["name"], begun[0]["project"], begun[0]["dir"]) == ("mine", "p", str(out))
    assert begun[0]["config"]["n_embd"] == 32 and begun[0]["config"]["max_iters"] == 30
    logged = [a[0] for name, a, _ in calls if name == "log" and len(a[0]) > 1]
    lines = [{k: v for k, v in line.items() if k != "sample_text"} for line in metrics(out)]
    assert [line for line in lines if line["step"] != 30] == [line for line in logged if line["step"] != 30]
    assert all(line in logged for line in lines)
    assert same({k: v for k, v in state(whole[0]).items() if k != "config"},
                {k: v for k, v in state(out).items() if k != "config"})
    for fails in ("init", "log"):
        done = train(corpus, tmp_path / fails, "--wandb", "--max_iters=10", env={**env, "FAILS": fails})
        assert done.stdout.count("WARNING: wandb FAILED (RuntimeError: no network") == 1
        assert len(metrics(tmp_path / fails)) == 4


@pytest.mark.deep
@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_before_anything_happens(name, corpus, tmp_path):
    done = spoiled(f"sys.modules[{name!r}] = None", corpus, tmp_path / "o", f"--{name}")
    assert done.returncode == 2 and f"pip install {name}" in unsettled(done.stderr)[0]
    assert not (tmp_path / "o/run.json").exists()


@pytest.mark.deep
def test_tensorboard_shows_the_log(corpus, tmp_path):
    """After a resume at an earlier step, each step once."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    out = tmp_path / "o"
    train(corpus, out, "--max_iters=20", "--tensorboard")
    train(corpus, out, f"--resume={out / 'ckpt.prev.pt'}", "--max_iters=20", "--tensorboard")
    found = EventAccumulator(str(out / "tensorboard"))
    found.Reload()
    for name in ("val_loss", "train_loss", "val_bits_per_byte", "lr", "grad_norm"):
        wanted = {line["step"]: pytest.approx(line[name], rel=1e-6) for line in metrics(out) if name in line}
        assert [(event.step, event.value) for event in found.Scalars(name)] == [*wanted.items()], name
    train(corpus, out, "--max_iters=1", "--tensorboard")
    assert (out / "previous_2/tensorboard").is_dir() # with the run that it is of


@pytest.mark.deep
def test_wandb_itself_takes_the_log_without_a_network(corpus, tmp_path):
    """Read from its file: blocks of 32 kB, each with records behind 7 bytes (sum, length, kind)."""
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record
    train(corpus, tmp_path / "o", "--max_iters=10", "--wandb", env={"WANDB_MODE": "offline"})
    (file,) = (tmp_path / "o/wandb").glob("offline-run-*/run-*.wandb")
    raw, at, whole_record, rows = file.read_bytes(), 7, b"", [] # the file has 7 bytes of its own
    while at + 7 < len(raw):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
        length, kind = int.from_bytes(raw[at + 4:at + 6], "little"), raw[at + 6]
        whole_record, at = whole_record + raw[at + 7:at + 7 + length], at + 7 + length
        if kind in (1, 4): # whole, or the last part of one
            record, whole_record = Record.FromString(whole_record), b""
            rows += [{item.key or item.nested_key[0]: json.loads(item.value_json)
                      for item in record.history.item}]
    seen = [{k: v for k, v in row.items() if k[0] != "_"} for row in rows]
    lines = [{k: v for k, v in line.items() if k != "sample_text"} for line in metrics(tmp_path / "o")]
    assert [row for row in seen if len(row) > 1] == lines, wandb.__version__
