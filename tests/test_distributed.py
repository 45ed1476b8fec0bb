"""train.py on several processes, joined by gloo on this CPU: they take the steps of one, and end together."""
import json
import math
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.distributed import TCPStore

from data import load, prepare
from model import load_checkpoint
from optim import OPTIMIZERS
from processes import ROOT, run, start

TINY = ("--n_layer=3 --n_head=2 --n_embd=32 --block_size=32 --attention=diff_mla --batch_size=4 "
        "--gradient_accumulation_steps=2 --learning_rate=1e-3 --warmup_iters=5 --log_interval=1 "
        "--eval_interval=10 --sample_tokens=8").split()


def command(corpus, out, *flags, code=""):
    """train.py; with code, after that has replaced a part of it."""
    script = [ROOT / "train.py"]
    if code:
        script = ["-c", f"import os, runpy, sys\nsys.argv = sys.argv[1:]\nsys.path.insert(0, {str(ROOT)!r})\n"
                  f"{code}\nrunpy.run_path(sys.argv[0], run_name='__main__')", *script]
    return [*script, "--dataset=play", f"--data_dir={corpus / 'data'}", f"--out_dir={out}", *TINY, *flags]


def started(count, *args, **how):
    """The processes that torchrun would start. Without it a test sees how each of them ends by itself."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) # torchrun holds one too
    STORES.append(store)
    env = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    return [start(command(*args, **how), env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(count)]


STORES = [] # they live as long as the tests


@pytest.fixture(autouse=True)
def store_of_torchrun(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")


def ended(processes, *codes):
    """[(stdout, stderr without the list of settings)]; each process must end with one of the codes."""
    with ThreadPoolExecutor(len(processes)) as pool:
        said = list(pool.map(lambda process: process.communicate(timeout=120), processes))
    said = [(out, "\n".join(line for line in err.splitlines()
                            if not line.startswith(("settings:", " " * 10)))) for out, err in said]
    assert all(process.returncode in (codes or (0,)) for process in processes), said
    return said


def train(count, *args, **how):
    """What the first process printed; the others print nothing."""
    (out, _), *others = ended(started(count, *args, **how))
    assert not any(map("".join, others)), others
    return out


def wait_for(process, line):
    while line not in (said := process.stdout.readline()):
        assert said, f"ended before it printed {line}"


def metrics(out, *names):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line[name] for line in lines for name in names if name in line]


def assert_alike(out, other, losses=1e-5, weights=1e-4):
    """Training and validation losses, weights and moments of two runs."""
    for name in ("train_loss", "val_loss"):
        assert metrics(out, name) == pytest.approx(metrics(other, name), abs=losses), name
    a, b = (load_checkpoint(folder / "ckpt.pt") for folder in (out, other))
    assert a["step"] == b["step"] and a["optimizer"]["state"].keys() == b["optimizer"]["state"].keys()
    for name, weight in a["model"].items():
        torch.testing.assert_close(weight, b["model"][name], atol=weights, rtol=0, msg=name)


def test_two_processes_take_the_steps_of_one(corpus, tmp_path):
    flags = "--max_iters=2", "--optimizer=muon", "--eval_interval=2", "--eval_iters=4", "--sample_tokens=0"
    ended(sum((started(count, corpus, tmp_path / f"{count}", *flags) for count in (1, 2)), []))
    assert_alike(tmp_path / "1", tmp_path / "2")


@pytest.mark.deep
def test_bits_per_byte_are_of_the_text_whoever_evaluates_it(tmp_path):
    """Characters of 1, 2 and 3 bytes, evaluated by 1, 2 and 3 processes, after a resume, and in part."""
    text = "über den Wäldern – 12 €\n" * 150
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    prepare(tmp_path / "text.txt", data_dir=tmp_path / "data")
    held = text[-len(load("text", tmp_path / "data").val):]
    for count in (1, 2, 3):
        flags = [f"--dataset={tmp_path / 'text.txt'}", "--batch_size=6", "--eval_interval=2"]
        for more in (["--max_iters=2"], ["--max_iters=4", "--resume"]):
            train(count, tmp_path, tmp_path / f"{count}", *flags, *more)
        losses, bits = metrics(tmp_path / f"{count}", "val_loss"), metrics(tmp_path / f"{count}", BITS)
        assert len(bits) == 3 and bits == pytest.approx(
            [loss * (len(held) - 1) / math.log(2) / len(held[1:].encode("utf-8")) for loss in losses])
    train(2, tmp_path, tmp_path / "part", *flags, "--max_iters=0", "--eval_iters=3")
    targets = torch.cat([load("text", tmp_path / "data").val.batch(i, 6, 32, 1337)[1] for i in range(3)])
    size = len("".join(sorted(set(text))[i] for i in targets.flatten().tolist()).encode("utf-8"))
    (loss,), (bit,) = metrics(tmp_path / "part", "val_loss"), metrics(tmp_path / "part", BITS)
    assert bit == pytest.approx(loss * targets.numel() / math.log(2) / size)


BITS = "val_bits_per_byte"


@pytest.mark.deep
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_number_of_processes_takes_the_same_steps(name, corpus, tmp_path):
    """With 2 processes each has a micro-batch of 4 rows, with 4 one of 2 rows. Neither the batches of the
    evaluation nor Muon's 3 matrices of a shape can be shared out equally.
    """
    for count in (1, 2, 4):
        train(count, corpus, tmp_path / f"{count}", "--max_iters=50", f"--optimizer={name}")
    for count in (2, 4):
        assert_alike(tmp_path / "1", tmp_path / f"{count}")


@pytest.mark.deep
@pytest.mark.parametrize("flags", [
    ("--depths=(1,3)", "--residual=mhc", "--n_stream=2"), ("--n_ahead=2", "--uncertainty"),
    ("--sparse=skeleton_flesh", "--schedule=wsd", "--sparse_interval=3", "--sparse_density=0.5"),
    ("--memory_slots=4", "--windows=2", "--sampling=epochs")], ids=lambda flags: flags[0])
def test_extras_take_the_same_steps(flags, corpus, tmp_path):
    """Layers that some tokens pass over, parts that learn beside the model, masks, and long sequences."""
    for count in (1, 2):
        train(count, corpus, tmp_path / f"{count}", "--max_iters=30", *flags)
    assert_alike(tmp_path / "1", tmp_path / "2")


@pytest.mark.deep
@pytest.mark.parametrize("name", ["adamw", "fadam", "muon"])
def test_sharing_out_the_model_changes_no_step(name, corpus, tmp_path):
    """fsdp against whole models. Dropout differs between processes, a cell learns beside the model, and the
    three batches of an evaluation cannot be shared out equally. Then 2, 1, 2 processes.
    """
    flags = (f"--optimizer={name}", "--eval_iters=3", "--n_ahead=2", "--residual=mhc", "--n_stream=2",
             "--glu", "--conv=4", "--lr_decay_iters=50")
    count = 4 if name == "muon" else 2
    train(count, corpus, tmp_path / "whole", *flags, "--max_iters=50", "--dropout=0.1")
    train(count, corpus, tmp_path / "shared", *flags, "--max_iters=50", "--dropout=0.1", "--fsdp")
    assert_alike(tmp_path / "whole", tmp_path / "shared")
    moments = [load_checkpoint(tmp_path / out / "ckpt.pt")["optimizer"]["state"]
               for out in ("whole", "shared")]
    for a, b in zip(*map(dict.values, moments)):
        for key in a:
            x, y = (torch.as_tensor(moment[key]).double() for moment in (a, b))
            assert (x - y).norm() <= 0.01 * x.norm() # FAdam divides rounding by small moments too

    train(2, corpus, tmp_path / "straight", *flags, "--max_iters=30")
    for processes, until, more in (2, 10, ["--fsdp"]), (1, 20, []), (2, 30, ["--fsdp"]):
        again = flags if until == 10 else ["--resume"]
        train(processes, corpus, tmp_path / "turns", *again, f"--max_iters={until}", *more)
    assert_alike(tmp_path / "straight", tmp_path / "turns")


@pytest.mark.deep
def test_each_process_holds_its_share_alone(corpus, tmp_path):
    """Weights and moments: half of them in each of two processes, to within a row of each tensor."""
    code = f"""import optim
build = optim.build_optimizer
def noting(model, *args):
    def count(opt, *_):
        held = [p.to_local().numel() for p in model.parameters()]
        held += [x.to_local().numel() for s in opt.state.values() for x in s.values() if x.dim()]
        rows = sum(p.numel() // len(p) for p in model.parameters())
        total = sum(p.numel() for p in model.parameters())
        print(sum(held), 3 * total, 3 * rows, file=open(f"{tmp_path}/{{os.environ['RANK']}}", "w"))
    opt = build(model, *args)
    opt.register_step_post_hook(count)
    return opt
optim.build_optimizer = noting"""
    train(2, corpus, tmp_path / "o", "--max_iters=1", "--fsdp", code=code)
    for rank in "01":
        held, total, rows = map(int, (tmp_path / rank).read_text().split())
        assert abs(held - total / 2) <= rows


@pytest.mark.deep
def test_what_does_not_go_with_sharing_out_is_refused(corpus, tmp_path):
    for count, flag, word in ((1, "--seed=1", "torchrun"), (2, "--depths=(1,3)", "depths"),
                              (2, "--optimizer=adam_mini", "adam_mini"), (2, "--compile=true", "compile"),
                              (2, "--update_hooks=identity", "update_hooks")):
        said = ended(started(count, corpus, tmp_path / "o", "--fsdp", flag), 2)
        assert word in said[0][1] and not (tmp_path / "o" / "run.json").exists()
        assert len("".join(err for _, err in said).splitlines()) <= 3


@pytest.mark.deep
def test_hooks_draw_alike_and_dropout_does_not(corpus, tmp_path):
    """Each process writes down the seed of its forwards, and in a hook a random number and its weights."""
    place = f"{tmp_path}/{{os.environ['RANK']}}"
    (tmp_path / "hook.py").write_text(f"""import os, torch
def draw(step, params):
    with open(f"{place}", "a") as file:
        print(torch.rand(()).item(), sum(p.sum().item() for p in params.values()), file=file)
""", encoding="utf-8")
    code = f"""import model, torch
forward = model.GPT.forward
def noting(self, *args, **options):
    if self.training:
        print(torch.initial_seed(), file=open(f"{place}forward", "a"))
    return forward(self, *args, **options)
model.GPT.forward = noting"""
    flags = "--max_iters=5", "--dropout=0.5", f"--update_hooks={tmp_path}/hook.py:draw"
    train(2, corpus, tmp_path / "o", *flags, code=code)
    read = lambda name: (tmp_path / name).read_text(encoding="utf-8").split() # noqa: E731
    assert read("0") == read("1") and len({*read("0")}) == 10
    assert len({*read("0forward"), *read("1forward")}) == 10


@pytest.mark.deep
def test_layers_without_a_gradient_in_some_or_all_processes(corpus, tmp_path):
    """A row's first token decides whether the row goes on to the upper layers. Where no row of a step does,
    AdamW leaves their weights and moments alone, which zero gradients would not.
    """
    code = """import model
forward, score = model.Router.forward, model.Router.score
def noticing(self, h, pass_, stage):
    self.goes_on = int(pass_.idx[0, 0]) % 2
    return forward(self, h, pass_, stage)
model.Router.forward = noticing
model.Router.score = lambda self, x: (score(self, x).abs() + 1) * (1 if self.goes_on else -1)"""
    for count in (1, 2):
        flags = "--depths=(1,3)", "--batch_size=1", "--max_iters=20"
        train(count, corpus, tmp_path / f"{count}", *flags, code=code)
    assert_alike(tmp_path / "1", tmp_path / "2")
    steps = {float(s["step"]) for s in load_checkpoint(tmp_path / "2/ckpt.pt")["optimizer"]["state"].values()}
    assert max(steps) == 20 and 10 < min(steps) < 19


@pytest.mark.deep
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_dies(victim, corpus, tmp_path):
    """The other ends within seconds and says why. Resumed, the run ends in the bits of one that nobody
    killed, dropout included.
    """
    code = "import time\ndef slow(step, params): time.sleep(0.1)"
    (tmp_path / "slow.py").write_text(code, encoding="utf-8")
    flags = ("--max_iters=30", "--dropout=0.1", "--checkpoint_interval=5",
             f"--update_hooks={tmp_path / 'slow.py'}:slow")
    train(2, corpus, tmp_path / "whole", *flags)
    processes = started(2, corpus, tmp_path / "o", *flags)
    wait_for(processes[0], "step     12/")
    processes[victim].kill()
    began = time.monotonic()
    said = ended(processes, 1, -signal.SIGKILL)
    assert time.monotonic() - began < 20 and processes[1 - victim].returncode == 1
    words = said[1 - victim][1].splitlines()
    assert "another process of this run has died" in words[0] and "--resume" in words[1], said
    assert len(words) < 4
    train(2, corpus, tmp_path / "o", "--resume", *flags)
    a, b = (load_checkpoint(tmp_path / out / "ckpt.pt")["model"] for out in ("whole", "o"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.deep
@pytest.mark.parametrize("receiver", [0, 1])
def test_a_signal_to_one_process_saves_and_stops_all(receiver, corpus, tmp_path):
    processes = started(2, corpus, tmp_path / "o", "--max_iters=100000")
    wait_for(processes[0], "step     15/")
    refused = started(2, corpus, tmp_path / "o", "--max_iters=1") # the folder is in use
    assert "another train.py writes" in "".join(map("".join, ended(refused, 1, 2)))
    processes[receiver].send_signal(signal.SIGTERM)
    said = ended(processes, 128 + signal.SIGTERM)[0][0]
    assert ("another process caught SIGTERM" if receiver else "SIGTERM: finishing this step") in said
    step = load_checkpoint(tmp_path / "o/ckpt.pt")["step"]
    assert step >= 15 and metrics(tmp_path / "o", "step")[-1] == step
    train(2, corpus, tmp_path / "o", f"--max_iters={step + 2}", "--resume")


@pytest.mark.deep
@pytest.mark.parametrize("fsdp", [[], ["--fsdp"]], ids=["whole", "fsdp"])
def test_a_chosen_checkpoint_of_all(fsdp, corpus, tmp_path):
    """Both go on from it, and agree on which model is the best: the better one of its future moves aside."""
    out, flags = tmp_path / "o", ["--max_iters=20", "--keep_checkpoints=9", "--checkpoint_interval=5", *fsdp]
    train(2, corpus, out, *flags)
    losses, weights = metrics(out, "val_loss"), load_checkpoint(out / "ckpt.pt")["model"]
    said = train(2, corpus, out, f"--resume={out / 'step_000015.pt'}", *fsdp)
    assert "RESUMING from" in said and "what is newer than step 15 was moved to" in said
    assert metrics(out, "val_loss") == pytest.approx(losses, abs=1e-5)
    again = load_checkpoint(out / "ckpt.pt")["model"]
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    assert (out / "best.pt").exists() and (out / "previous_1/best.pt").exists()


@pytest.mark.deep
def test_torchrun_starts_signals_and_ends_them(corpus, tmp_path):
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = start([*words, *command(corpus, tmp_path / "o", "--max_iters=100000")], fresh=True)
    wait_for(process, "step     15/")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert said.count("saved in") == 1 and load_checkpoint(tmp_path / "o/ckpt.pt")["step"] >= 15
    done = run([*words, *command(corpus, tmp_path / "o", "--max_iters=2", "--learning_rate=-1")], fresh=True)
    assert done.returncode and done.stderr.count("error: learning_rate=-1.0 must be above 0") == 1


@pytest.mark.deep
@pytest.mark.parametrize("steps", ["== 4", ">= 4"])
def test_a_nan_in_one_process_is_skipped_by_all(steps, corpus, tmp_path):
    code = f"""import model, torch
real, calls = model.GPT.forward, []
def forward(self, *args, **options):
    logits, losses = real(self, *args, **options)
    calls.extend([1] * torch.is_grad_enabled())
    bad = torch.is_grad_enabled() and len(calls) {steps} and os.environ["RANK"] == "1"
    return logits, {{name: loss * float("nan") if bad else loss for name, loss in losses.items()}}
model.GPT.forward = forward"""
    processes = started(2, corpus, tmp_path / "o", "--max_iters=20", "--checkpoint_interval=2", code=code)
    said = ended(processes, 0 if steps == "== 4" else 1)
    assert "step 3: loss nan" in said[0][0] and "BATCH SKIPPED (1 so far)" in said[0][0]
    assert not "".join(said[1])
    assert ("non-finite batches in a row" in said[0][1]) == (steps == ">= 4")
    assert all(w.isfinite().all() for w in load_checkpoint(tmp_path / "o/ckpt.pt")["model"].values())


MISTAKES = {"unknown setting": ["--learning_rat=1"], "must be above 0": ["--learning_rate=-1"],
            "use --batch_size=6": ["--batch_size=5", "--gradient_accumulation_steps=1"],
            "nowhere": ["--dataset=nowhere"], "lower --block_size": ["--block_size=100000"]}


@pytest.mark.deep
@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_told_once(words, corpus, tmp_path):
    """Both find it, or the first alone while the other waits."""
    processes = started(2, corpus, tmp_path / "o", *MISTAKES[words])
    said = "".join(err for _, err in ended(processes, 2))
    assert said.count("error: ") == 1 and words in said and "Traceback" not in said
