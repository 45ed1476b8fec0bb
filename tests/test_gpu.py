"""Whole commands on a GPU: `python -m pytest -m gpu`. Those of kernels and optimizers stand elsewhere.

Without a GPU the same marks run them on the CPU, which shows that the tests themselves work.
"""
import json

import pytest
import torch

import bench
from model import GPT
from processes import ROOT, run
from sample import Speculation

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = ("--dataset=play.txt --tokenizer=char --n_layer=2 --n_head=2 --n_embd=64 --block_size=32 "
         "--batch_size=8 --max_iters=50 --eval_interval=50 --log_interval=1 --warmup_iters=5 "
         f"--sample_tokens=0 --device={DEVICE}").split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    d = tmp_path_factory.mktemp("gpu")
    (d / "play.txt").write_text("to be or not to be, that is the question\n" * 60, encoding="utf-8")
    return d


def train(folder, name, *flags, code=0):
    """(what it said, the losses of its steps)."""
    done = run([ROOT / "train.py", *SMALL, f"--out_dir={name}", *flags], cwd=folder, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return done.stdout, [line["train_loss"] for line in lines if line.get("train_loss")]


def apart(a, b):
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", ["bfloat16", *["float16"] * (DEVICE == "cuda")])
def test_half_precision_trains_as_fp32(folder, dtype):
    _, wide = train(folder, "wide", "--dtype=float32")
    said, half = train(folder, dtype, f"--dtype={dtype}")
    assert f"dtype {dtype}" in said and half[-1] < half[0] / 2
    # fp16's loss scale begins so high that the first steps may be skipped: its losses come a little later
    assert apart(wide[-5:], half[-5:]) < 0.15


@pytest.mark.parametrize("choice", [
    "--residual=plain", "--residual=mhc", "--attention=diff_mla --residual=hyper"])
def test_compiled_steps_are_the_eager_ones(folder, choice):
    said, compiled = train(folder, "compiled", "--compile=true", "--dtype=float32", *choice.split())
    assert "torch.compile FAILED" not in said and "compile on" in said
    _, eager = train(folder, "eager", "--compile=false", "--dtype=float32", *choice.split())
    assert apart(eager, compiled) < 0.05


@pytest.mark.parametrize("choice", [
    "--qk_norm --activation=crrelu --glu", "--attention=diff_mla --residual=mhc --activation=silu --glu",
    "--attention=diff --residual=hyper --activation=telu --logit_softcap=20"])
def test_fifty_steps_by_triton_are_those_by_pytorch(folder, choice):
    if DEVICE == "cpu":
        pytest.skip("the interpreter of Triton would take minutes")
    flags = ["--dtype=float32", "--compile=false", *choice.split()]
    _, ours = train(folder, "triton", "--kernel=triton", *flags)
    _, torchs = train(folder, "torch", "--kernel=torch", *flags)
    assert len(ours) == 50 and apart(ours, torchs) < 0.02


def test_another_gpu_is_the_one_that_is_asked_for(folder):
    last = f"cuda:{torch.cuda.device_count() - 1}" if DEVICE == "cuda" else "cpu"
    said, losses = train(folder, "last", f"--device={last}", "--residual=mhc", "--attention=diff_mla")
    assert f"device {last} (as asked)" in said and losses[-1] < losses[0] / 2


def test_speculation_writes_the_greedy_text(folder):
    train(folder, "drafts", "--n_ahead=3", "--attention=diff_mla", "--dtype=float32")
    model = GPT.from_checkpoint(folder / "drafts/best.pt", DEVICE)
    prompt = torch.zeros(2, 1, dtype=torch.long, device=DEVICE)
    want = model.generate(prompt, 60, temperature=0)
    writer = Speculation(model, prompt, temperature=0)
    assert torch.equal(writer.generate(60), want) and writer.kept > 0


@pytest.mark.parametrize("suite", bench.FOR_GPU)
def test_the_suites_of_bench_run(suite):
    done = run([ROOT / "bench.py", suite, "--dry", f"--device={DEVICE}", "--compiled=false"], timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.strip().splitlines()[-1])["suite"] == suite
