"""Every command of README.md runs, made small; every config trains two steps. In a copy, without network."""
import ast
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from functools import partial

import pytest

import bench
import processes
from conftest import ROOT
from model import PRESETS
from processes import two_at_a_time

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "bench_results/README.md").read_text(encoding="utf-8")


def blocks(kind, text=TEXT):
    return re.findall(rf"```{kind}\n(.*?)```", text, re.S)


COMMANDS = [line for block in blocks("sh") for line in block.strip().splitlines()]
SMALLER = {"train.py": "--max_iters=2 --batch_size=2 --eval_iters=1 --sample_tokens=4",
           "bench.py": "--rounds=1 --batch_size=1 --compiled=false --save=false",
           "sample.py": "--max_new_tokens=8"}
ROOM_FOR_CHOICES = ["--sparse_interval=1", "--warmup_iters=1", "--max_iters=16"]
CONFIGS = sorted(p.name for p in (ROOT / "config").glob("*.py")
                 if p.name not in ("ideas.py", "finetune_shakespeare.py")) # arms; tests/test_weights.py


def offline(**more):
    blocked = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
    return {**{k: v for k, v in os.environ.items() if k != "DATA_MIRROR"}, **blocked, **more}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """What a fresh clone has: no data, no runs."""
    target = tmp_path_factory.mktemp("clone") / "nanoslm"
    left_out = shutil.ignore_patterns(".git", "data", "out*", "__pycache__", "tests", ".pytest_cache",
                                      ".venv", "venv")
    shutil.copytree(ROOT, target, ignore=left_out)
    return target


def run(argv, cwd, env):
    gone = {name: None for name in os.environ.keys() - env.keys()}
    return processes.run(argv, cwd=cwd, env={**gone, **env}, timeout=300)


def run_all(commands, copy):
    """In the order of the text, because a later one uses what an earlier one left behind."""
    said = []
    for line in commands:
        words = shlex.split(line.split("&&")[-1].strip())
        assert words[0] == "python", line
        if words[1:3] == ["-m", "pytest"]:
            continue # this run is that command
        more = SMALLER.get(words[1], "").split()
        if "config/skeleton_flesh.py" in words: # ten choices before the learning rate falls
            more += ROOM_FOR_CHOICES
        if words[1:3] == ["bench.py", "eval"]: # in single rows the validation split takes long
            more = ["--batch_size=64", "--stride=0", "--save=false"]
        if "--resume" in words: # two steps more than the run it goes on from, and its batch size must stay
            more = ["--max_iters=4"]
        done = run([*words[1:], *more], copy, offline())
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        said.append(done.stdout)
    return said


def test_readme_commands(copy):
    said = run_all(COMMANDS, copy)
    assert "SHAKESPEARE CANNOT BE DOWNLOADED: TRAINING ON PYSTDLIB INSTEAD" in said[0]
    assert "ROMEO:" in said[1] and any("RESUMING from" in s for s in said)
    scripts = {shlex.split(c.split("&&")[-1])[1] for c in COMMANDS}
    assert {"train.py", "sample.py", "model.py", "data.py", "bench.py"} <= scripts
    # the Python example reads the checkpoint of the first command
    (copy / "use.py").write_text(blocks("python")[0], encoding="utf-8")
    done = run(["use.py"], copy, offline())
    assert done.returncode == 0 and "To be" in done.stdout, done.stdout + done.stderr


@pytest.mark.deep
def test_commands_of_the_results(copy):
    run_all([line for block in blocks("sh", RESULTS) for line in block.strip().splitlines()], copy)


def test_figures_stand_in_the_results():
    """Each number with two decimals or more. The tables of ideas are what their command makes of its results."""
    kept, rest = json.loads((ROOT / "bench_results/ideas.json").read_text(encoding="utf-8")), []
    for written, (begin, every) in zip((RESULTS, TEXT), bench.PLACES.items(), strict=True):
        head, _, after = written.partition(begin)
        table, end, tail = after.partition(bench.END)
        assert end and table == bench.ideas(kept, every)
        rest = head, tail
    head, tail = rest # of README
    text = re.sub(r"```.*?```", "", head + tail, flags=re.S)
    numbers = set(re.findall(r"(?<![\w.+-])\d+\.\d{2,}(?![\d.])", text))
    arxiv = {n for n in numbers if re.fullmatch(r"\d{4}\.\d{5}", n)}
    assert numbers - {"3.10"} - arxiv - set(re.findall(r"\d+\.\d+", RESULTS)) == set()


def test_effects_are_of_five_seeds_and_follow_from_the_losses():
    """Each verdict, from the losses of the runs, by the interval's formula written out once more."""
    kept = json.loads((ROOT / "bench_results/ideas.json").read_text(encoding="utf-8"))
    for table in kept.values():
        arms = table["arms"]
        for name, arm in arms.items():
            if arm["against"] == name:
                continue
            theirs = arms[arm["against"]]["losses"]
            gaps = [loss - theirs[seed] for seed, loss in arm["losses"].items()]
            mean = sum(gaps) / 5
            error = (sum((gap - mean) ** 2 for gap in gaps) / 4 / 5) ** 0.5
            low, high = mean - 2.776 * error, mean + 2.776 * error # Student's t of 4 degrees, 95 %
            assert len(gaps) == 5 and abs(arm["difference"] - mean) < 1e-6, name
            assert abs(arm["low"] - low) + abs(arm["high"] - high) < 1e-4, name
            assert arm["verdict"] == ("win" if high < 0 else "lose" if low > 0 else "tie"), name
            if "holds" in arm and "loss" in arm["claim"] and arm["claim"].startswith("of a lower"):
                assert arm["holds"] == (arm["verdict"] == "win"), name


RULES = """
import sys
import torch
from model import GPT, GPTConfig

torch.manual_seed(0)
small = dict(vocab_size=29, block_size=16, n_layer=2, n_head=4, n_embd=32)
model = GPT(GPTConfig(**small, **eval(sys.argv[1]))).double().eval()
for p in model.parameters():
    p.data.normal_(std=0.3)
idx = torch.randint(29, (2, 16))
other = idx.clone()
other[:, 9:] = (other[:, 9:] + 1) % 29
full, changed = model(idx, idx)[0], model(other, idx)[0]
assert torch.equal(full[:, :9], changed[:, :9]) and not torch.allclose(full[:, 9:], changed[:, 9:])
cache = model.new_cache(2)
pieces = [model(piece, cache=cache)[0] for piece in idx.split([7, 1, 8], dim=1)]
torch.testing.assert_close(torch.cat(pieces, 1), full, atol=1e-9, rtol=1e-9)
"""


@pytest.fixture(scope="module")
def variant(tmp_path_factory):
    """A copy of the repository with README's diff applied, and the choice that it adds: {name: value}."""
    target = tmp_path_factory.mktemp("variant") / "nanoslm"
    left_out = shutil.ignore_patterns(".git", "data", "out*", "__pycache__", ".pytest_cache", ".venv", "venv")
    shutil.copytree(ROOT, target, ignore=left_out)
    # without the ceiling, git looks for a repository above
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(target.parent)}
    argv = ["git", "apply", "-"]
    done = subprocess.run(argv, input=blocks("diff")[0], cwd=target, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    words = re.search(r"`python train.py (--\S+=.*?)` then trains it", TEXT).group(1).split()
    pairs = (word.removeprefix("--").split("=") for word in words)
    return target, {name: ast.literal_eval(value) if value.isdigit() else value for name, value in pairs}


def test_readmes_variant_trains_and_is_causal_with_and_without_a_cache(variant):
    folder, choice = variant
    assert len(blocks("diff")[0].splitlines()) <= 30
    (folder / "rules.py").write_text(RULES, encoding="utf-8")
    done = run(["rules.py", repr(choice)], folder, offline())
    assert done.returncode == 0, done.stderr
    small = "--dataset=pystdlib --n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --warmup_iters=1"
    flags = [*small.split(), *SMALLER["train.py"].split(), *(f"--{k}={v}" for k, v in choice.items())]
    done = run(["train.py", *flags, "--out_dir=out/variant"], folder, offline())
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.deep
def test_readmes_variant_obeys_all_rules(variant):
    folder, choice = variant
    value = next(iter(choice.values()))
    argv = [sys.executable, "-m", "pytest", "-q", "tests/test_model.py", "-k", value]
    done = subprocess.run(argv, cwd=folder, env=offline(), capture_output=True, text=True)
    assert done.returncode == 0 and re.search(r"\d\d passed", done.stdout), done.stdout[-3000:]


HOOK = """
def shrink(step, params, by=2.0):
    for p in params.values():
        p.grad /= by
    return {"by": by}
"""


def test_readmes_own_hook_runs(copy):
    (copy / "mine.py").write_text(HOOK, encoding="utf-8")
    flag = re.search(r"--update_hooks=mine.py:shrink=4", TEXT).group(0)
    small = "--dataset=pystdlib --n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --warmup_iters=1"
    flags = [*small.split(), *SMALLER["train.py"].split(), flag, "--log_interval=1"]
    done = run(["train.py", *flags, "--out_dir=out/mine"], copy, offline())
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"mine.py:shrink=4": {"by": 4.0}' in (copy / "out/mine/metrics.jsonl").read_text(encoding="utf-8")


def test_readme_names_what_exists():
    assert len(TEXT.splitlines()) <= 220
    for folder, text in ((ROOT, TEXT), (ROOT / "bench_results", RESULTS)):
        for link in re.findall(r"\]\(([^)]+)\)", text):
            path, _, anchor = link.partition("#")
            there = path.startswith("http") or not path or (folder / path).exists()
            pointed_at = (folder / path).read_text(encoding="utf-8") if anchor and path else text
            assert there and (not anchor or anchor in anchors_of(pointed_at)), link


def anchors_of(text):
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-")
            for title in re.findall(r"^#+ (.*)", text, re.M)}


def test_the_reading_path_names_what_exists():
    stops = re.findall(r"^\| \[(\w+\.py)\]\(\S+\) \| (`.*?`) \|", TEXT, re.M)
    assert len(stops) == 5
    for file, symbols in stops:
        source = (ROOT / file).read_text(encoding="utf-8")
        for symbol in re.findall(r"`(?:\w+\.)?(\w+)`", symbols):
            assert re.search(rf"^\s*(def|class) {symbol}\b", source, re.M), (file, symbol)


def test_readme_names_how_the_tests_are_run():
    assert "pip install -r requirements.txt && python -m pytest" in COMMANDS
    assert "python -m pytest" in (ROOT / ".ci/run").read_text(encoding="utf-8")


def settings_of(name):
    return runpy.run_path(str(ROOT / "config" / name))


def two_steps(name, copy):
    """Trains two steps of a config, made small."""
    config = settings_of(name)
    heads = config.get("n_head") or PRESETS[config["model_size"]]["n_head"]
    flags = f"config/{name} --n_layer=1 --n_embd={8 * heads} --block_size=16"
    flags += " --max_iters=2 --warmup_iters=1 --batch_size=2 --eval_iters=1 --sample_tokens=4"
    flags += " --gradient_accumulation_steps=2" if "gradient_accumulation_steps" in config else ""
    flags += " --rope_dim=4" if config.get("attention", "mha") in ("mla", "diff_mla") else ""
    flags += " --mlp_hidden=32" if "mlp_hidden" in config else ""
    flags += " --n_layer=2 --depths=1,2 --mean_depth=0" if "depths" in config else ""
    flags += " --memory_segment=0" if "memory_segment" in config else ""
    env = offline(DATA_MIRROR=os.environ["DATA_MIRROR"]) if os.environ.get("DATA_MIRROR") else offline()
    more = ROOM_FOR_CHOICES if "sparse" in config else []
    return run(["train.py", *flags.split(), *more, f"--out_dir=out/small_{name}"], copy, env)


@pytest.fixture(scope="module")
def trained(request, copy):
    return two_at_a_time(request, {name: partial(two_steps, name, copy) for name in CONFIGS})


SLOW = {"train_c4_kepler.py", "gpt2_124m_fineweb.py", "train_wikipedia_optimus.py", # GPT-2's vocabulary
        "train_wikitext_llama.py", "lepton_tiny.py"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.deep) if name in SLOW else name
                                  for name in CONFIGS], ids=CONFIGS)
def test_every_config_trains(name, trained):
    text = (ROOT / "config" / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 30 and text.startswith("# ") and f"python train.py config/{name}" in text
    done = trained[name].result()
    if settings_of(name).get("tokenizer") == "gpt2" and not os.environ.get("DATA_MIRROR"):
        pytest.skip("the gpt2 tokenizer needs vocab.bpe and encoder.json: set DATA_MIRROR")
    assert done.returncode == 0, done.stdout + done.stderr
