"""Every command of README.md runs as it stands, made small; every config trains two steps. In a copy, without a network."""
import os
import re
import runpy
import shlex
import shutil

import pytest

import processes
from conftest import ROOT
from model import PRESETS

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.S) for line in block.strip().splitlines()]
SMALLER = {"train.py": "--max_iters=2 --batch_size=2 --eval_iters=1 --sample_tokens=4", "bench.py": "--rounds=1 --batch_size=1 --steps=1 --compiled=false --save=false",
           "sample.py": "--max_new_tokens=8"}
ROOM_FOR_CHOICES = ["--sparse_interval=1", "--warmup_iters=1", "--max_iters=16"]
CONFIGS = sorted(p.name for p in (ROOT / "config").glob("*.py"))


def offline(**more):
    blocked = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
    return {**{k: v for k, v in os.environ.items() if k != "DATA_MIRROR"}, **blocked, **more}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """What a fresh clone has: no data, no runs."""
    target = tmp_path_factory.mktemp("clone") / "nanoslm"
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(".git", "data", "out*", "__pycache__", "tests", ".pytest_cache", ".venv", "venv"))
    return target


def run(argv, cwd, env):
    gone = {name: None for name in os.environ.keys() - env.keys()}
    return processes.run(argv, cwd=cwd, env={**gone, **env}, timeout=300)


def test_readme_commands(copy):
    """In the order of the text, because a later one uses what an earlier one left behind."""
    said = []
    for line in COMMANDS:
        words = shlex.split(line.split("&&")[-1].strip())
        assert words[0] == "python", line
        if words[1:3] == ["-m", "pytest"]:
            continue # this run is that command
        more = SMALLER.get(words[1], "").split()
        if "config/skeleton_flesh.py" in words: # ten choices before the learning rate falls
            more += ROOM_FOR_CHOICES
        if "--resume" in words: # two steps more than the run it goes on from, and its batch size must stay
            more = ["--max_iters=4"]
        done = run([*words[1:], *more], copy, offline())
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        said.append(done.stdout)
    assert "SHAKESPEARE CANNOT BE DOWNLOADED: TRAINING ON PYSTDLIB INSTEAD" in said[0]
    assert "ROMEO:" in said[1] and any("RESUMING from" in s for s in said)
    assert {"train.py", "sample.py", "model.py", "data.py", "bench.py"} <= {shlex.split(c.split("&&")[-1])[1] for c in COMMANDS}


def test_readmes_own_hook_runs(copy):
    (copy / "mine.py").write_text(re.search(r"```python\n(def shrink.*?)```", TEXT, re.S).group(1), encoding="utf-8")
    flag = re.search(r"--update_hooks=mine.py:shrink=4", TEXT).group(0)
    small = "--dataset=pystdlib --n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --warmup_iters=1 --log_interval=1"
    done = run(["train.py", *small.split(), *SMALLER["train.py"].split(), flag, "--out_dir=out/mine"], copy, offline())
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"mine.py:shrink=4": {"by": 4.0}' in (copy / "out/mine/metrics.jsonl").read_text(encoding="utf-8")


def test_readme_names_what_exists():
    for link in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert link.startswith("http") or (ROOT / link).exists(), link
    assert "pip install -r requirements.txt && python -m pytest" in COMMANDS
    assert "python -m pytest" in (ROOT / ".ci/run").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_trains(name, copy):
    text = (copy / "config" / name).read_text(encoding="utf-8")
    config = {k: v for k, v in runpy.run_path(str(copy / "config" / name)).items() if not k.startswith("_")}
    assert len(text.splitlines()) <= 30 and text.startswith("# ") and f"python train.py config/{name}" in text
    if config.get("tokenizer") == "gpt2" and not os.environ.get("DATA_MIRROR"):
        pytest.skip("the gpt2 tokenizer needs vocab.bpe and encoder.json: set DATA_MIRROR")
    flags = f"config/{name} --n_layer=1 --n_embd={8 * (config.get('n_head') or PRESETS[config['model_size']]['n_head'])} --block_size=16 --max_iters=2 --warmup_iters=1 --batch_size=2 --eval_iters=1"
    flags += " --rope_dim=4" if config.get("attention", "mha") in ("mla", "diff_mla") else ""
    flags += " --mlp_hidden=32" if "mlp_hidden" in config else ""
    flags += " --n_layer=2 --depths=1,2 --mean_depth=0" if "depths" in config else ""
    flags += " --memory_segment=0" if "memory_segment" in config else ""
    env = offline(DATA_MIRROR=os.environ["DATA_MIRROR"]) if os.environ.get("DATA_MIRROR") else offline()
    more = ROOM_FOR_CHOICES if "sparse" in config else []
    done = run(["train.py", *flags.split(), *more, "--sample_tokens=4", f"--out_dir=out/small_{name}"], copy, env)
    assert done.returncode == 0, done.stdout + done.stderr
