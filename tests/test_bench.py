"""bench.py's ablate, compare and table. Most runs are of a stand-in for train.py, which only writes files."""
import json
import math
import os
import re
import signal
import threading
import time
import xml.etree.ElementTree as ET
from functools import partial
from pathlib import Path

import pytest
import torch

import bench
import configurator
import data
from model import GPT, GPTConfig, without_orphans
from processes import ROOT, run, start

# A run has two evaluations. loss: gain, and a share of each seed that every arm has.
STAND_IN = '''
seed = 1337
out_dir = "out"
resume = False
device = "auto"
sample_tokens = 100
max_iters = 4
gain = 0.0
crash = -1
stop = -1
sparse = ""
import json, os, signal, sys, time
given = dict(word[2:].split("=") for word in sys.argv[2:] if "=" in word)
seed, folder = int(given["seed"]), given["out_dir"]
assert os.environ["OMP_NUM_THREADS"] == "1" and given["sample_tokens"] == "0"
if "bad" in given.get("sparse", ""):
    print("error: sparse=bad is not known\\nchoose another")
    sys.exit(2)
json.dump({"n_params": 100}, open(folder + "/run.json", "w"))
def evaluate(step):
    loss = 2 + seed % 10 / 10 - float(given.get("gain", 0)) * (1 + seed % 3 / 10) - step / 100
    loss -= 0.5 * (step == 2) # the best evaluation is not the last, which counts
    line = {"step": step, "tokens": 8 * step, "time_s": 0.1 * step, "val_loss": loss}
    open(folder + "/metrics.jsonl", "a").write(json.dumps(line) + "\\n")
if "--resume" not in sys.argv:
    evaluate(0)
if int(given.get("stop", -1)) == seed and "--resume" not in sys.argv: # until a signal comes
    signal.signal(signal.SIGTERM, lambda *_: (open(folder + "/saved", "w"), sys.exit(143)))
    open(folder + "/waits", "w")
    time.sleep(60)
if int(given.get("crash", -1)) == seed:
    print("out of luck")
    sys.exit(3)
evaluate(2)
evaluate(4)
'''


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """ablate(arms, ...) in an empty folder with the stand-in: the kept table."""
    (tmp_path / "train.py").write_text(STAND_IN, encoding="utf-8")
    (tmp_path / "small.py").write_text("max_iters = 4\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    changed = {"HERE": str(tmp_path), "device": "cpu", "costs": False, "jobs": 2, "save": True}
    for name, value in changed.items():
        monkeypatch.setattr(bench, name, value)

    def ablate(arms, seeds=3, results="kept.json"):
        for name, value in {"arms": arms, "seeds": seeds, "results": results}.items():
            monkeypatch.setattr(bench, name, value)
        list(bench.ablate("small.py"))
        return json.loads((tmp_path / results).read_text(encoding="utf-8"))[f"small.py {arms}"]

    yield ablate
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_the_interval_is_students():
    """Quantiles by numeric integration of the density; intervals by hand from a printed t table."""
    for df, t in enumerate(bench.T95, start=1):
        scale = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi)
        n = 20000
        density = [(1 + (t * (i + 0.5) / n) ** 2 / df) ** (-(df + 1) / 2) for i in range(n)]
        assert abs(0.5 + scale * sum(density) * t / n - 0.975) < 5e-5
    theirs = dict(zip(range(5), (1.70, 1.60, 1.65, 1.72, 1.68)))
    ours = {seed: loss + d for (seed, loss), d in zip(theirs.items(), (-0.01, -0.02, -0.03, -0.02, -0.02))}
    five = bench.paired(ours, theirs) # deviation 0.0070711, half an interval 2.776 x 0.0070711 / 2.2360680
    assert five["verdict"] == "win" and five["pairs"] == 5 and math.isclose(five["difference"], -0.02)
    assert abs(five["low"] + 0.0287788) < 1e-6 and abs(five["high"] + 0.0112212) < 1e-6
    # 4.303 x 0.01 / 1.7320508; seed 7 has no pair
    three = bench.paired({0: 1.69, 1: 1.58, 2: 1.62, 7: 1.0}, theirs)
    assert three["verdict"] == "tie" and three["pairs"] == 3
    assert abs(three["low"] + 0.0448434) < 1e-6 and abs(three["high"] - 0.0048434) < 1e-6
    assert bench.paired(theirs, ours)["verdict"] == "lose"
    one = bench.paired({3: 1.70}, theirs)
    assert one["verdict"] == "one seed" and "low" not in one and math.isclose(one["difference"], -0.02)
    assert bench.paired({9: 1.0}, theirs) == {}
    assert bench.paired(ours, ours)["verdict"] == "tie" # equal to the bit: the interval is the point 0


def test_arms_are_paired_by_seed(bare, capsys, monkeypatch):
    """Seeds differ by 0.6, arms by 0.02: only pairs show it. Arms of equal settings share runs."""
    monkeypatch.setattr(bench, "jobs", 1)
    table = bare("a: --gain=0.02; same: --gain=0.02; worse: --gain=-0.02")
    assert [*table["arms"]] == ["base", "a", "same", "worse"] and table["seeds"] == [1337, 1, 2]
    a, worse = table["arms"]["a"], table["arms"]["worse"]
    assert a["losses"] == {str(s): pytest.approx(1.96 + s % 10 / 10 - 0.02 * (1 + s % 3 / 10))
                           for s in (1337, 1, 2)}
    assert a["mean"] == pytest.approx(sum(a["losses"].values()) / 3)
    gains = [0.02 * (1 + s % 3 / 10) for s in (1337, 1, 2)]
    assert a["difference"] == pytest.approx(-sum(gains) / 3) and a["verdict"] == "win" and a["high"] < 0
    assert worse["verdict"] == "lose" and "verdict" not in table["arms"]["base"]
    assert a["curve"]["steps"] == [0, 2, 4] and a["curve"]["tokens"] == [0, 16, 32]
    assert a["curve"]["losses"][2] == pytest.approx(a["mean"], abs=1e-5)
    assert table["arms"]["same"] == a and not Path("out/ablate/small/same").exists()
    said = capsys.readouterr().out
    assert "base/1337: 2.6600\n" in said # 2 + 0.7 - 0.04
    assert "9 runs, 0 of them finished before" in said and re.search(r"\n  a +2\.\S+  -0\.023 \(-0", said)
    order = [line.split()[1] for line in said.splitlines() if re.match(r"  \d/9", line)]
    assert [Path(name.strip(":")).name for name in order] == 3 * ["1337"] + 3 * ["1"] + 3 * ["2"]


def test_only_what_is_missing_is_trained(bare, capsys):
    """More seeds and arms add runs. Another recipe trains anew, and the old runs are kept."""
    bare("a: --gain=0.02", seeds=1)
    bare("a: --gain=0.02", seeds=2)
    assert "4 runs, 2 of them finished before" in capsys.readouterr().out
    Path("small.py").write_text("max_iters = 4\ngain = 0.5\n", encoding="utf-8")
    table = bare("a: --gain=0.02", seeds=2) # its settings are as before; those of base are not
    assert "4 runs, 2 of them finished before" in capsys.readouterr().out
    assert table["arms"]["base"]["losses"]["1"] == pytest.approx(1.96 + 0.1) # the stand-in reads no files
    assert Path("out/ablate/small/base/1_before_1/metrics.jsonl").exists()


def test_ctrl_c_saves_and_the_rest_follows(bare, capsys):
    """Runs that go on get a signal and save. The next call resumes them and trains what is left."""
    def interrupt():
        while not Path("out/ablate/small/a/1/waits").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        bare("a: --gain=0.1 --stop=1")
    said = capsys.readouterr().out
    assert Path("out/ablate/small/a/1/saved").exists() and re.search(r"\n  a +2\..* one seed", said)
    kept = json.loads(Path("kept.json").read_text(encoding="utf-8"))
    assert [*next(iter(kept.values()))["arms"]["a"]["losses"]] == ["1337"]
    table = bare("a: --gain=0.1 --stop=1")
    assert table["arms"]["a"]["pairs"] == 3 and table["arms"]["a"]["verdict"] == "win"
    steps = [point["step"] for point in bench.evaluations("out/ablate/small/a/1")]
    assert steps == [0, 2, 4] # resumed: the first evaluation was not made again


def test_a_failed_run_does_not_stop_the_others(bare, capsys):
    with pytest.raises(SystemExit, match="1 of 6 runs failed"): # a text: exit code 1
        bare("a: --gain=0.1 --crash=1")
    said = capsys.readouterr().out
    assert "out/ablate/small/a/1: FAILED, exit code 3\n    out of luck" in said
    (table,) = json.loads(Path("kept.json").read_text(encoding="utf-8")).values()
    assert table["arms"]["a"]["verdict"] == "failed" and table["arms"]["a"]["pairs"] == 2
    assert len(table["arms"]["base"]["losses"]) == 3


def test_what_train_refuses_ends_the_ablation(bare):
    with pytest.raises(configurator.UserError, match="sparse=bad is not known\nchoose another"):
        bare("a: --sparse=bad")


def test_costs_stay_with_equal_flags(bare):
    """Other runs, or a call with costs=False, do not lose what was measured before."""
    table = bare("a: --gain=0.1", seeds=1)
    table["arms"]["a"] |= {"step": [1.5, 1.4, 1.6], "peak_mb": 12.0}
    Path("kept.json").write_text(json.dumps({"small.py a: --gain=0.1": table, "other": {"arms": {}}}))
    arm = bare("a: --gain=0.1", seeds=2)["arms"]["a"]
    assert "other" in json.loads(Path("kept.json").read_text(encoding="utf-8"))
    assert bench.cells(arm, {"n_params": 50}) == (
        "-0.115 (-0.179 to -0.051; 2 seeds)", "step 1.50 (1.40 to 1.60); +100 % parameters; peak 12 MB")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_cost_is_that_of_the_dtype_that_ran(tmp_path, monkeypatch, dtype):
    train = dict(optimizer="muon", learning_rate=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.9, dtype=dtype,
                 gradient_accumulation_steps=1, batch_size=1, windows=1)
    model = dict(vocab_size=5, block_size=4, n_layer=1, n_head=1, n_embd=8)
    (tmp_path / "run.json").write_text(json.dumps({"config": {"train": train, "model": model}}))
    seen = []
    monkeypatch.setattr(bench, "device", "cpu")
    monkeypatch.setattr(bench, "update", lambda model, opt: seen.append(opt.bf16))
    loss_of = bench.loss_of
    monkeypatch.setattr(bench, "loss_of", lambda *args: (
        seen.append(torch.is_autocast_enabled("cpu")), loss_of(*args))[1])
    bench.step_of(bench.Run(tmp_path, [], ""))()
    assert seen == [dtype == "bfloat16"] * 2


KEPT = {"c arms": {"arms": {
    "base": {"flags": "", "against": "base", "losses": {"1": 1.5}, "n_params": 100, "peak_mb": 400.0},
    "mla": {"flags": "--n_ahead=0 --attention=mla", "flag": "--attention=mla", "against": "base",
            "idea": "attention: latent", "difference": 0.0304, "low": 0.0201, "high": 0.0407, "pairs": 5,
            "verdict": "lose", "n_params": 92, "step": [0.98, 0.88, 1.06], "peak_mb": 390.4,
            "claim": "of no loss", "holds": False},
    "diff": {"flags": "--attention=diff", "against": "mla", "idea": "attention: differential",
             "difference": -0.02, "pairs": 1, "verdict": "one seed", "n_params": 92}}}}
ROWS = """| idea | flag | effect on val loss | cost | verdict |
|---|---|---|---|---|
| attention: latent | `--attention=mla` | +0.030 (+0.020 to +0.041; 5 seeds) | step 0.98 (0.88 to 1.06); \
-8 % parameters; peak 390 MB | lose; the claim of no loss does not hold |
| attention: differential | `--attention=diff` | -0.020 (one seed), against mla |  | one seed |
"""


def test_the_table_of_ideas(bare, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "results", "kept.json")
    Path("kept.json").write_text(json.dumps(KEPT), encoding="utf-8")
    list(bench.table())
    assert capsys.readouterr().out == ROWS
    for begin in bench.PLACES:
        Path("README.md").write_text(f"above\n{begin}an old table\n{bench.END}\nbelow\n", encoding="utf-8")
        for _ in range(2): # the second time it changes nothing
            list(bench.table("README.md"))
            written = Path("README.md").read_text(encoding="utf-8")
            assert written == f"above\n{begin}{ROWS}{bench.END}\nbelow\n"
    tie = {"a text": {"arms": {"base": {"against": "base"}, "a": {
        "against": "base", "idea": "none", "flags": "", "verdict": "tie"}}}}
    assert "| none |" in bench.ideas(tie) and "| none |" not in bench.ideas(tie, every=False)
    tie["a text"]["arms"]["a"] |= {"claim": "of less", "holds": False} # what was claimed is told
    assert "of less does not hold" in bench.ideas(tie, every=False)
    with pytest.raises(configurator.UserError, match=re.escape(bench.END)):
        list(bench.table("small.py"))


def test_every_arm_of_the_ideas_is_a_model(monkeypatch):
    monkeypatch.chdir(ROOT)
    config, arms = "config/train_shakespeare_diffmla.py", bench.read_arms("config/ideas.py")
    usual = {name: field.default for name, field in GPTConfig.__dataclass_fields__.items()}
    known = configurator.top_level("train.py") | usual
    for arm in arms.values():
        given = configurator.parse([config, *arm["flags"].split()], known)
        fields = {k: v for k, v in given.items() if k in usual}
        GPT(GPTConfig(vocab_size=65, **without_orphans(fields, given.typed)))
    shared = [bench.run_of(config, arms[name]["flags"], 1, Path(name)).asked for name in ("base", "qk_norm")]
    assert shared[0] == shared[1] # the recipe makes this choice: no run is made twice


class Copier(torch.nn.Module):
    """Knows a digit only if its key was told before in the text: what the suite must find to be right."""
    block_size = 64

    def __init__(self, finds):
        super().__init__()
        self.finds = finds # whether it sees the digit at place s of a line

    def forward(self, idx, targets):
        guess = idx.clone()
        for b, line in enumerate(idx.tolist()):
            for t in range(1, len(line)):
                found = [s for s in range(2, t) if line[s - 2 : s] == line[t - 1 : t + 1]]
                guess[b, t] = next((line[s] for s in found if self.finds(line, s)), line[t])
        return torch.nn.functional.one_hot(guess, 37).float(), {}


def test_needles_counts_answers(monkeypatch):
    monkeypatch.setattr(bench, "device", "cpu")
    codec, rows = data.make_tokenizer("char", "".join(data.needles("", 256)[1])), []

    def figures(finds):
        rows.extend(list(bench.needles("a path", Copier(finds), codec, {})))
        return [figure["value"] for figure in rows[-4:-2]]

    assert figures(lambda line, s: True) == [100.0, 0.0]
    counts = [re.fullmatch(r"(1 to 32|33 to 64) back, (\S+) answers", row["name"]) for row in rows[-2:]]
    assert sum(int(count[2].replace(",", "")) for count in counts) == 5 * 64 * 8 # orders, lines, keys
    # How many digits are larger than the one before depends on the order of a line.
    answers, margin = figures(lambda line, s: line[s] > line[s - 3])
    assert 30 < answers < 60 and 10 < margin < 60
    # How many are even does not, though lines differ.
    answers, margin = figures(lambda line, s: line[s] % 2 == 0)
    assert 30 < answers < 70 and margin == 0


def test_a_cache_of_few_bits(monkeypatch):
    """The loss is that of decoding: of one token at a time, each from the cache."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=11)).eval()
    idx = torch.randint(11, (8, 17))
    val = type("", (), {"windows": lambda self, T, B: [(idx[:, :-1], idx[:, 1:])]})()
    corpus = type("", (), {"val": val})
    monkeypatch.setattr(bench, "trained", lambda command, file: ("a path", model, corpus))
    monkeypatch.setattr(bench, "device", "cpu")
    monkeypatch.setattr(bench, "rounds", 1)
    figures = [figure["value"] for figure in bench.cache()]
    assert figures[3:6] == [2 * 2 * 16 * 2, 2 * 2 * (16 + 2), 2 * 2 * (8 + 2)] # keys and values of 2 heads
    with torch.no_grad():
        exact = model(idx[:, :-1], idx[:, 1:])[1]["ce"].item()
        for dtype, loss in zip((torch.float16, "int8", "int4"), figures):
            cache = model.new_cache(8, dtype)
            logits = torch.cat([model(token, cache=cache)[0] for token in idx[:, :-1].split(1, dim=1)], dim=1)
            want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten()).item()
            assert abs(loss - want) < 1e-5
    errors = [abs(loss - exact) for loss in figures[:3]]
    assert errors[0] < 1e-5 and errors[0] < errors[1] < errors[2] < 0.1 and min(figures[6:9]) > 0


def curves(n=3):
    return {f"run <{i}>": [(10.0 * s, 1.5 + i / 100 + 2.5 * math.exp(-s)) for s in range(9)]
            for i in range(n)}


def test_a_picture_is_the_same_bytes_and_shows_every_run(monkeypatch):
    monkeypatch.setattr(bench, "x", "steps")
    picture = bench.drawn(curves())
    assert picture == bench.drawn(curves()) and picture != bench.drawn(curves(2))
    root = ET.fromstring(picture)
    words = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"run <0>, 1.501", "run <1>, 1.511", "run <2>, 1.521", "steps", "2.0", "80"} <= {*words}
    assert not [e for e in root if e.tag.endswith("rect")] # no ground: it stands on white and on black
    lines = [e for e in root if e.get("clip-path")]
    assert len(lines) == 3 and len({e.get("stroke") for e in lines}) == 3
    ends = [tuple(map(float, e.get("points").split()[-1].split(","))) for e in lines]
    assert ends[0][1] > ends[1][1] > ends[2][1] and all(56 <= a <= 706 and 12 <= b <= 372 for a, b in ends)


@pytest.mark.parametrize("low, high, want", [
    (0, 120, ["0", "20", "40", "60", "80", "100", "120"]),
    (1.6, 2.6, ["1.6", "1.8", "2.0", "2.2", "2.4", "2.6"]),
    (0, 1.5e6, ["0", "500,000", "1,000,000", "1,500,000"]), (0, 7, list("01234567")),
    (1.4961, 1.5122, ["1.498", "1.500", "1.502", "1.504", "1.506", "1.508", "1.510", "1.512"])])
def test_ticks_are_round(low, high, want):
    found = bench.ticks(low, high)
    assert [text for _, text in found] == want or len(found) in range(3, 9)
    assert all(low - 1e-9 <= value <= high + 1e-9 for value, _ in found)


SMALL = """dataset = "text.txt"
n_layer = 1
n_head = 2
n_embd = 16
block_size = 16
batch_size = 2
max_iters = 12
eval_interval = 4
eval_iters = 1
warmup_iters = 1
"""


@pytest.fixture
def small(tmp_path):
    (tmp_path / "small.py").write_text(SMALL, encoding="utf-8")
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question\n" * 60, encoding="utf-8")
    command = [ROOT / "bench.py", "ablate", "small.py", "--arms=glu: --glu"]
    command.append(f"--results={tmp_path / 'kept.json'}")
    return partial(run, cwd=tmp_path), partial(start, cwd=tmp_path), command


@pytest.mark.deep
def test_one_command_trains_pairs_and_compares(small, tmp_path, monkeypatch):
    """With train.py itself; then a table and a picture of its runs, and steps of their models."""
    run, _, command = small
    done = run([*command, "--seeds=1", "--costs=false"])
    assert done.returncode == 0, done.stdout + done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["suite"] == "ablate" and [r["name"] for r in last["results"]] == ["base", "glu"]
    (table,) = json.loads((tmp_path / "kept.json").read_text(encoding="utf-8")).values()
    arm, folders = table["arms"]["glu"], [f"out/ablate/small/{arm}/1337" for arm in ("base", "glu")]
    assert arm["verdict"] == "one seed" and arm["curve"]["steps"] == [0, 4, 8, 12]
    assert arm["n_params"] > table["arms"]["base"]["n_params"]
    done = run([ROOT / "bench.py", "compare", "--x=tokens", *folders])
    assert done.returncode == 0 and "drawn to out/compare.svg" in done.stdout, done.stdout + done.stderr
    last = {r["name"]: r["value"] for r in json.loads(done.stdout.splitlines()[-1])["results"]}
    assert last[f"{folders[1]}, final loss"] == arm["losses"]["1337"] and last[f"{folders[0]}, tokens"] == 384
    assert "tokens read" in (tmp_path / "out/compare.svg").read_text(encoding="utf-8")
    monkeypatch.setattr(bench, "device", "cpu")
    model = GPT(GPTConfig(**json.loads((tmp_path / folders[1] / "run.json").read_text())["config"]["model"]))
    monkeypatch.setattr(bench, "build", lambda **config: model)
    before = model.embed.weight.detach().clone()
    bench.step_of(bench.Run(tmp_path / folders[1], [], ""))()
    assert model.config.glu and not before.equal(model.embed.weight)


@pytest.mark.deep
def test_an_ablation_that_was_cut_ends_in_the_same_losses(small, tmp_path):
    """SIGTERM while runs go on, then the same command again: as if nothing had happened. Costs come last."""
    run, start, command = small
    longer = SMALL.replace("= 12", "= 1500").replace("= 4\n", "= 500\n")
    (tmp_path / "small.py").write_text(longer, encoding="utf-8")
    command += ["--seeds=2", "--rounds=2"]
    process = start(command)
    metrics = tmp_path / "out/ablate/small/base/1337/metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text(encoding="utf-8").splitlines()) < 20:
        assert process.returncode is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "arm  " in out, out + err
    assert (tmp_path / "out/ablate/small/base/1337/ckpt.pt").exists()
    done = run(command)
    assert done.returncode == 0 and "cost" in done.stdout, done.stdout + done.stderr
    assert "RESUMING" in (tmp_path / "out/ablate/small/base/1337/log.txt").read_text(encoding="utf-8")
    (table,) = json.loads((tmp_path / "kept.json").read_text(encoding="utf-8")).values()
    assert len(table["arms"]["glu"]["step"]) == 3 and table["arms"]["glu"]["peak_mb"] > 0
    flags = ["small.py", "--seed=1337", "--sample_tokens=0", "--out_dir=out/whole"]
    assert run([ROOT / "train.py", *flags], env={"OMP_NUM_THREADS": "1"}).returncode == 0
    last = bench.evaluations(tmp_path / "out/whole")[-1]
    assert last["val_loss"] == table["arms"]["base"]["losses"]["1337"]
