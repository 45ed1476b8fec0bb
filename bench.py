"""Every figure of speed, size and memory in bench_results/README.md, as named suites.

  python bench.py                       all but those that need a run: 5 minutes on 2 cores;
                                        with a CUDA GPU the suites for one, in bf16 and fp32
  python bench.py train --rounds=21     one suite
  python bench.py eval out/a [TEXT...]  loss, perplexity and bits per byte of a run on its validation split or
                                        on texts; multiple choice in a .jsonl; recall: needles, recall.
                                        Also of gpt2, or of a folder of transformers
  python bench.py compare out/a out/b   table and curves of finished runs
  python bench.py ablate config/train_shakespeare_diffmla.py --seeds=5    every arm of --arms at every seed
  python bench.py --help                what each suite measures, and all settings

Arms of a comparison have one seed, one set of widths and one set of data, and are warmed up. They take turns,
one call each per round. A time is the median over the rounds. A ratio is the median of the ratios within a
round, because a busy machine slows both sides of a round. Bytes are measured, not computed.
The last line printed is JSON. bench_results/<device>.json keeps all figures with versions, shapes and commit.

Read row, in_turn and compare first. A suite is a generator of rows; its docstring is its text in --help.
B batch  T time  C channels  H heads  V vocabulary  L block size
"""
import configurator # first: see stop_at_once there

import functools
import html
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import re
import runpy
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import kernels
from configurator import UserError, configure, git_commit, user_errors
from model import GPT, GPT2, GPTConfig, Pass, forward_flops, load_run
from optim import build_optimizer
from sample import Decoder, Speculation, capture, stream

rounds = 11 # turns of each arm
batch_size = 8 # sequences per step; half (residual), 8 (protocol), 64 times (cross_entropy). GPU: 16
block_size = 128 # tokens per sequence (train, kernels). GPU: 1024
n_embd = 384 # width (kernels). GPU: 768, in all suites
n_layer = 12 # of the suites for a GPU
dtype = "float32" # of the kernels, or several with commas between. GPU: bfloat16,float32
dry = False # the suites for a GPU at tiny sizes, on any device, without keeping their figures
device = "auto" # auto | cpu | cuda | cuda:1
out_dir = "" # folder of the run that a suite reads; empty: that of the suite's config
x = "seconds" # compare: what the curves run over: seconds | steps | tokens
stride = -1 # eval: tokens from a window to the next; -1: half the context; 0: the context, as train.py has it
field = "" # eval: column of a .csv, or key of a .jsonl or .parquet, that holds the text; empty: text
picture = "" # compare: path of the curves; empty: bench_results/curves.svg, or out/compare.svg for named runs
arms = "config/ideas.py" # ablate: a file with ARMS, or "mha: --attention=mha; mla: --attention=mla"
seeds = 5 # ablate: seeds of each arm, at most 31: 1337, 1, 2, 3 and so on
jobs = 0 # ablate: runs at a time, with one thread each; 0: as many as there are cores
costs = True # ablate: measure time and memory of each arm when all runs are done
results = "bench_results/ideas.json" # ablate, table: where the table is kept
compiled = True # kernels, step: time torch.compile too
only = "" # kernels, step, decode: those whose name contains this
save = True # write bench_results/<device>.json, the picture of compare and the table of ablate

HERE = os.path.dirname(os.path.abspath(__file__))
SMALL = dict(vocab_size=65, n_layer=4, n_head=4, n_embd=128, qk_norm=True) # widths of train_shakespeare_*
CHAR = dict(vocab_size=65, n_layer=6, n_head=6, n_embd=384, block_size=256) # nanoGPT's 10.65M character model
LLAMA = dict(vocab_size=4096, n_layer=6, n_head=8, n_kv_head=4, n_embd=384, block_size=256, activation="silu",
             glu=True, tie_embeddings=False)
SHAPES = {"train model": SMALL, "decode, kv_cache and optimizers model": CHAR,
          "optimizers, Llama-shaped": LLAMA}
ARMS = {"mha": {}, "mla": {"attention": "mla"},
        "diff v1": {"attention": "diff", "diff_form": "v1"}, "diff v2": {"attention": "diff"},
        "diff_mla v1": {"attention": "diff_mla", "diff_form": "v1"}, "diff_mla v2": {"attention": "diff_mla"}}
CHAR_ARMS = {name: {**CHAR, **choice, **(dict(kv_rank=96, rope_dim=32) if "mla" in name else {})}
             for name, choice in ARMS.items()}
# Learning rate and weight decay of each optimizer, tuned: bench_results/README.md.
RATES = {"adamw": (1e-3, 0.1), "fadam": (1e-3, 0.001), "adam_mini": (1e-3, 0.1), "muon": (4e-3, 0.1)}
LABELS = {"out/shakespeare_nanogpt": "nanoGPT's recipe", "out/shakespeare_mha": "mha",
          "out/shakespeare_diffmla": "diff_mla"} # compare: README's runs; others are named by their folder


VERSIONS = {"python": platform.python_version(), "torch": torch.__version__}


# --- how figures are taken ---


def row(name, value, unit, baseline=None, ratio=None, low=None, high=None, digits=2, bound=None) -> dict:
    """Prints one figure with the range of its ratio, and returns it for the JSON. digits=None: silent.
    bound: the most that this machine can do, in the same unit; the figure's share of it is printed too.
    """
    spread = "" if low is None else f"   ({low:.2f} to {high:.2f})"
    share = {} if bound is None else {"share": value / bound}
    if digits is not None:
        against = f"{ratio:>8.2f} x {baseline}{spread}" if baseline else ""
        of_bound = f"{share['share']:>6.0%}" if share else ""
        print(f"  {name:<42}{value:>12,.{digits}f} {unit:<14}{of_bound}{against}", flush=True)
    return {"name": name, "value": value, "unit": unit, "baseline": baseline, "ratio": ratio, **share}


def first(path: str, key: str) -> str:
    """What follows the colon in the first line of a file of /proc that begins with `key`."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith(key)), "")


def hardware() -> str:
    """The device's name as the device itself reports it, and the number of threads of a CPU."""
    if "cuda" in device:
        return torch.cuda.get_device_name(device)
    name = first("/proc/cpuinfo", "model name") if os.path.exists("/proc/cpuinfo") else platform.processor()
    return f"{name or platform.machine()}, {torch.get_num_threads()} threads"


def seconds(f: Callable) -> float:
    """The time of one call. On CUDA it begins after a write that empties the cache, which also hides that the
    host launches slower than the device works; between events, so that it is the device's time.
    """
    if "cuda" not in device:
        began = time.perf_counter()
        f()
        if device != "cpu": # Apple's GPU works on after a call has returned
            torch.accelerator.synchronize(device)
        return time.perf_counter() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    larger_than_cache().zero_()
    begin.record()
    f()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@functools.cache
def larger_than_cache() -> torch.Tensor:
    return torch.empty(2**26, device=device) # 256 MB


def captured(f: Callable) -> Callable:
    """f as one CUDA graph, so that the host's launches cost nothing; f itself where there is no CUDA."""
    return capture(f).replay if "cuda" in device else f


def in_turn(arms: dict[str, Callable], warm: int = 2, turns: int = 0) -> dict[str, tuple]:
    """{name: function} -> {name: (median seconds, median, lowest and highest ratio to the first arm)}.
    turns: of each arm; 0: --rounds.
    """
    times = {name: [] for name in arms}
    for _ in range(warm + (turns or rounds)):
        for name, f in arms.items(): # in turn: what slows the machine slows every arm
            times[name].append(seconds(f))
    times = {name: of_arm[warm:] for name, of_arm in times.items()}
    base = next(iter(times.values())) # the first arm
    ratios = {name: [t / b for t, b in zip(ts, base)] for name, ts in times.items()} # within a round
    return {k: (statistics.median(times[k]), statistics.median(r), min(r), max(r)) for k, r in ratios.items()}


def compare(arms: dict[str, Callable], label="{}", amount=0.0, unit="ms", warm=2,
            bound=None) -> Iterator[dict]:
    """Rows of the arms' times against the first arm; or of amounts of work per second, at `amount` a call."""
    baseline = next(iter(arms))
    for name, (median, ratio, low, high) in in_turn(arms, warm).items():
        if amount: # more is better, so the ratio of the times is turned over
            rate = amount / median
            yield row(label.format(name), rate, unit, baseline, 1 / ratio, 1 / high, 1 / low, bound=bound)
        else:
            yield row(label.format(name), 1e3 * median, unit, baseline, ratio, low, high)


def sizes(found: dict[str, float], label="{}", unit="MB") -> Iterator[dict]:
    """Rows of {name: size}, against the first."""
    baseline = next(iter(found))
    for name, size in found.items():
        yield row(label.format(name), size, unit, baseline, size / found[baseline])


def peak() -> float:
    """The most MB that this process has held so far: on the GPU if one is used, else in main memory."""
    if "cuda" in device:
        return torch.cuda.max_memory_allocated(device) / 1e6
    if os.path.exists("/proc/self/status"): # getrusage would count the process that started this one
        return 1024e-6 * int(first("/proc/self/status", "VmHWM").split()[0])
    import resource # Windows has none
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1e-6 if sys.platform == "darwin" else 1024e-6) # bytes on macOS, else kB


def added_to_peak(f: Callable) -> tuple[float, object]:
    """(MB that f() adds to the peak, what f returns)."""
    if "cuda" in device:
        torch.cuda.reset_peak_memory_stats(device) # main memory has no such reset
    before = peak()
    result = f()
    return peak() - before, result


def in_new_process(f: Callable, *args) -> float:
    """f(*args) in a process of its own, because the peak of a process never falls."""
    if "cuda" in device: # whose peak can be reset
        return f(*args)
    with multiprocessing.get_context("spawn").Pool(1, initializer=set_device, initargs=(device,)) as pool:
        return pool.apply(f, args)


def set_device(name: str) -> None:
    global device
    device = name


def build(**config) -> GPT:
    torch.manual_seed(0) # one start for all arms
    return GPT(GPTConfig(**config)).to(device)


def optimizer_of(model: GPT, name: str = "adamw") -> torch.optim.Optimizer:
    return build_optimizer(model, name, *RATES[name], (0.9, 0.95))


def loss_of(model: GPT, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
    """The sum of all losses, computed as train.py does: without logits to return. Targets y, or x itself."""
    return sum(model(x, x if y is None else y, with_logits=False)[1].values())


def update(model: torch.nn.Module, opt: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) # train.py's default grad_clip
    opt.step()


def stepping(model: torch.nn.Module, x: torch.Tensor, opt=None, loss: Callable = loss_of) -> Callable:
    """A function that computes a loss and its gradients and, with an optimizer, updates as train.py does."""
    def step():
        model.zero_grad() # else each call would add to the gradients of the last
        loss(model, x).backward()
        if opt:
            update(model, opt)
    return step


def writing(model: GPT, idx: torch.Tensor, new: int, cached: bool = True) -> Callable:
    """A function that writes `new` greedy tokens after idx (1, T), with a cache or without."""
    cache = model.new_cache(1) if cached else None

    @torch.no_grad()
    def generate():
        tokens = idx # the prompt (1, T); with a cache, only the first call reads all of it
        if cached:
            cache.truncate(min(cache.length, idx.size(1) - 1)) # the last token is read again, for its logits
        for _ in range(new):
            logits, _ = model(tokens[:, cache.length :] if cached else tokens, cache=cache) # (1, T', V)
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1) # (1, T + 1), then one more each
    return generate


# --- suites ---


def train() -> Iterator[dict]:
    """Forward, backward, update and whole step of each attention choice, against mha of the same widths."""
    print(f"train: 4 layers of 128, 4 heads, batch {batch_size} x {block_size}, fp32, eager")
    idx = torch.randint(65, (batch_size, block_size), device=device)
    parts = {"forward": {}, "backward": {}, "update": {}, "step": {}}
    for name, choice in ARMS.items():
        model = build(**SMALL, block_size=block_size, **choice)
        opt = optimizer_of(model)
        parts["forward"][name] = partial(loss_of, model, idx)
        parts["backward"][name] = partial(loss_of(model, idx).backward, retain_graph=True) # one graph, kept
        parts["update"][name] = partial(update, model, opt) # of the gradients that backward left
        parts["step"][name] = stepping(model, idx, opt)
    for part, arms in parts.items():
        yield from compare(arms, "{} " + part)


def decode() -> Iterator[dict]:
    """Tokens/s of one sequence with the cache, against reading the whole context again for every token."""
    print("decode: 6 layers of 384, 6 heads, context 200 to 216 of 256, batch 1, greedy, fp32, eager")
    idx, new = torch.randint(65, (1, 200), device=device), 16
    arms = {"mha, no cache": writing(build(**CHAR).eval(), idx, new, cached=False)}
    arms |= {name: writing(build(**choice).eval(), idx, new) for name, choice in CHAR_ARMS.items()}
    yield from compare(arms, amount=new, unit="tokens/s")


def kv_cache() -> Iterator[dict]:
    """Bytes of the cache per token, as the tensors report them."""
    print("kv_cache: 6 layers, 6 heads of 64, latent 96 with a rotary key of 32, fp32")
    caches = {name: build(**choice).new_cache(1) for name, choice in CHAR_ARMS.items()}
    yield from sizes({name: c.nbytes() / c.capacity for name, c in caches.items()}, unit="bytes/token")


def optimizers() -> Iterator[dict]:
    """Bytes of the state, peak memory of training, time of an update against torch's fused AdamW."""
    copy, shapes = None, {"ours": CHAR, "Llama-shaped": LLAMA}
    if dry or "cuda" in device:
        (copy, _), shapes = ceilings(), dict([gpt2()])
    # fp32 numbers to move per weight: gradient, weight and moments read; weight and moments written
    moved = {"adamw": 7, "fadam": 7, "adam_mini": 5, "muon": 0} # Muon is bound by its products of matrices
    for shape, config in shapes.items():
        config = dict(vocab_size=65, n_layer=1, n_head=1, n_embd=64) if dry else config
        weights = build(**config).num_params()
        print(f"optimizers: {shape}, {weights:,} parameters, fp32")
        for name in RATES:
            for what, size in states(after_one_step(config, name)).items():
                yield row(f"{name} {what}", size, "MB")
            yield row(f"{name} peak", in_new_process(peak_memory, plain_step, config, name), "MB")
        for name, form in (("fadam", "auto"), ("fadam", "loop"), ("adam_mini", "auto"), ("adam_mini", "loop"),
                           ("muon", None)): # two models at a time
            base, opt = after_one_step(config, "adamw"), after_one_step(config, name)
            opt.form = form # loop: the update as plain PyTorch says it
            label = f"{name}, {opt.form_of(opt.param_groups[0]['params'])}" if form else name
            arms = {"adamw, fused": base.step, label: opt.step}
            for which, figure in zip(("adamw", name), compare(arms, shape + ": {} update")):
                yield figure
                if copy and moved[which]:
                    rate = 4e-6 * moved[which] * weights / figure["value"]
                    yield row(f"{figure['name']}, memory traffic", rate, "GB/s", bound=copy)


def after_one_step(config: dict, name: str) -> torch.optim.Optimizer:
    """The optimizer of a model after one step, with the gradients still there."""
    model = build(**config)
    opt = optimizer_of(model, name)
    stepping(model, torch.randint(65, (1, 64), device=device), opt)()
    return opt


def states(opt: torch.optim.Optimizer) -> dict[str, float]:
    """MB of the storages behind each kind of state. A storage that two tensors share counts once."""
    found = {} # {kind: {address: bytes}}
    for state in opt.state.values():
        for key, value in state.items():
            if torch.is_tensor(value) and key != "step": # AdamW keeps its step count as a tensor
                storage = value.untyped_storage()
                found.setdefault(f"state {key}", {})[storage.data_ptr()] = storage.nbytes()
    return {kind: sum(at.values()) / 1e6 for kind, at in found.items()}


def plain_step(config: dict, name: str) -> Callable:
    model = build(**config)
    return stepping(model, torch.randint(65, (8, 128), device=device), optimizer_of(model, name))


def peak_memory(make: Callable, *args) -> float:
    """MB that make(*args) and three calls of what it returns add to the peak of a process with torch."""
    def three_steps():
        step = make(*args)
        for _ in range(3):
            step()
    return added_to_peak(three_steps)[0]


def paths(eager: Callable, kernel: Callable | None, *inputs: torch.Tensor, compiles: bool = True,
          liger: Callable | None = None) -> dict[str, Callable]:
    """Forward and backward of plain PyTorch, torch.compile of it, Liger's function and the kernel, if any."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = eager(*inputs) # one tensor or several
    # A random gradient, because torch.compile would fuse a constant one away.
    g = [torch.randn_like(t) for t in ([y] if torch.is_tensor(y) else y)]

    def both(f):
        return torch.autograd.grad(f(*inputs), inputs, g)

    torch._dynamo.reset() # it compiles one piece of code for at most 8 sets of constants
    others = {"torch.compile": torch.compile(eager) if compiled and compiles else None, "Liger": liger}
    arms = {"eager": partial(both, eager)}
    for name, f in ((name, f) for name, f in others.items() if f):
        try:
            both(f) # compiles here, outside the timing
            arms[name] = partial(both, f)
        except Exception as error: # where no compiler is, several libraries raise errors of their own
            print(f"  ({name} fails here: {str(error).splitlines()[0][:100]})")
    return {**arms, "kernel": partial(both, kernel)} if kernel else arms


@functools.cache
def ceilings() -> tuple[float, float]:
    """(GB/s of a copy, bf16 TFLOP/s of a product of matrices), measured and printed."""
    n, m = (2**12, 64) if dry else (2**28, 8192)
    a = torch.randn(n, device=device)
    copy = 8e-9 * n / in_turn({"copy": partial(torch.empty_like(a).copy_, a)})["copy"][0]
    a = torch.randn(m, m, device=device) # random: a GPU multiplies zeros faster
    arms = {str(t): partial(torch.mm, a.to(t), a.to(t)) for t in (torch.bfloat16, torch.float32)}
    bf16, tf32 = (2e-12 * m**3 / median for median, *_ in in_turn(arms).values())
    print(f"copy {copy:,.0f} GB/s   products of matrices {bf16:,.2f} TFLOP/s in bf16, {tf32:,.2f} in "
          + ("TF32" if "cuda" in device else "fp32"))
    return copy, bf16


def liger(name: str) -> Callable | None:
    """A function of liger_kernel.transformers.functional, where that package is installed."""
    if "cuda" not in device or not importlib.util.find_spec("liger_kernel"):
        return None
    return getattr(importlib.import_module("liger_kernel.transformers.functional"), name)


def kernel_cases(t: torch.dtype) -> Iterator[tuple]:
    """(label, formula, kernel or None, Liger's or None, inputs, numbers to move forward, and both ways)."""
    R, C, N, big = batch_size * block_size, n_embd, 4, "cuda" in device # rows, channels, streams
    randn = partial(torch.randn, device=device, dtype=t)
    rms = liger("liger_rms_norm")
    for rows, width in [(R, C), *[(R, 2048)] * big, (R * C // 64, 64)]: # the last are the norms of heads
        moved = rows * width
        yield (f"rmsnorm, C={width}", kernels.rmsnorm_reference, kernels.rmsnorm,
               rms and (lambda x, w: rms(x, w, 1e-6, in_place=False)),
               [randn(rows, width), 1 + 0.1 * randn(width)], 2 * moved, 5 * moved)
    table = kernels.rope_table(torch.arange(block_size, device=device), 64)
    heads = randn(batch_size, block_size, C // 64, 64).transpose(1, 2) # a view, as attention has it
    yield ("rotate", lambda x: kernels.rotate_reference(x, table),
           (lambda x: kernels.rotate(x, table)) if big else None, None, [heads], 2 * R * C, 4 * R * C)
    x, pre, res = randn(R, N, C), randn(R, N).sigmoid(), randn(R, N, N).softmax(-1)
    yield ("read_streams", kernels.read_streams_reference, kernels.read_streams, liger("liger_mhc_pre"),
           [x, pre], (N + 1) * R * C, (3 * N + 2) * R * C)
    yield ("write_streams", kernels.write_streams_reference, kernels.write_streams,
           liger("liger_mhc_post_res"), [x, randn(R, C), pre, res], (2 * N + 1) * R * C, (5 * N + 3) * R * C)
    phi, alpha, b = 0.02 * randn(2 * N + N * N, N * C), 1 + 0 * randn(3), randn(2 * N + N * N)
    yield ("mhc_coefficients", kernels.mhc_coefficients_reference, kernels.mhc_coefficients, None,
           [x, phi, alpha, b], N * R * C, 3 * N * R * C)
    if t == torch.float32:
        matrices = randn(2**20 if big else 2**15, N, N)
        yield ("sinkhorn", kernels.sinkhorn_reference, kernels.sinkhorn, None, [matrices],
               2 * matrices.numel(), 5 * matrices.numel())
    x, up = (randn(2**25 if big else 3 * 2**20) for _ in range(2))
    eps = torch.tensor(0.01, device=device) # crrelu's, the only number that an activation learns
    for name in kernels.ACTIVATIONS:
        def formula(x, up=None, eps=None, name=name):
            return kernels.activation_reference(x, up, name, eps)

        def kernel(x, up=None, eps=None, name=name):
            return kernels.activate(x, name, eps) if up is None else kernels.gated(x, up, name, eps)

        of_crrelu, swiglu = [eps] * (name == "crrelu"), liger("liger_swiglu") if name == "silu" else None
        plain = (lambda f: lambda x, *eps: f(x, None, *eps))
        yield (name, plain(formula), plain(kernel) if big else None, None, [x, *of_crrelu],
               2 * len(x), 5 * len(x))
        yield (f"gated {name}", formula, kernel if big else None, swiglu, [x, up, *of_crrelu],
               3 * len(x), 8 * len(x))


def kernel_times() -> Iterator[dict]:
    """Each kernel, forward and both ways, against PyTorch, torch.compile and Liger: GB/s, share of a copy."""
    # A CPU's caches hold all of this, so a copy of much more is no bound there.
    bound = ceilings()[0] if "cuda" in device else None
    for t in (getattr(torch, name) for name in dtype.split(",")):
        print(f"kernels: {str(t).removeprefix('torch.')}, {batch_size} x {block_size} tokens of {n_embd}")
        for label, formula, kernel, other, inputs, forward, both in kernel_cases(t):
            if only not in label:
                continue
            give = partial(compare, unit="GB/s", bound=bound)
            arms = {"eager": formula, **({"kernel": kernel} if kernel else {})}
            with torch.no_grad():
                arms = {name: captured(partial(f, *inputs)) for name, f in arms.items()}
                yield from give(arms, f"{label} forward, {{}}", 1e-9 * forward * t.itemsize)
            compiles = dtype.startswith(str(t).removeprefix("torch.")) # it takes seconds for each case
            arms = paths(formula, kernel, *inputs, compiles=compiles, liger=other)
            arms = {name: captured(f) for name, f in arms.items()}
            yield from give(arms, f"{label} both ways, {{}}", 1e-9 * both * t.itemsize)


def residual() -> Iterator[dict]:
    """Forward and backward of plain, hyper and mhc, what their graphs keep, peak memory of training."""
    B, arms, kept, peaks = max(1, batch_size // 2), {}, {}, {}
    print(f"residual: 6 layers of 384, 4 streams, batch {B} x 256, forward and backward, fp32, eager")
    idx = torch.randint(65, (B, 256), device=device)
    for name, choice in {"plain": {}, "hyper": {"residual": "hyper"}, "mhc": {"residual": "mhc"},
                         "mhc, permutations": {"residual": "mhc", "h_res": "permutations"}}.items():
        model, seen = build(**CHAR, **choice), {} # seen: {address: bytes} of what the graph keeps

        def note(t, seen=seen): # views of one storage count once
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            graph = loss_of(model, idx) # named, so that it lives on: a freed address would be taken again
        kept[name] = (sum(seen.values()) - sum(p.nbytes for p in model.parameters())) / 1e6
        del graph
        peaks[name] = in_new_process(peak_memory, plain_step, {**CHAR, **choice}, "adamw")
        arms[name] = stepping(model, idx)
    yield from compare(arms, "{} step")
    yield from sizes(kept, "{} kept for backward")
    yield from sizes(peaks, "{} peak of a process")


def losses() -> dict[str, Callable]:
    """The ways to a head's loss: plain PyTorch, ours, and on a GPU torch 2.13's in chunks and Liger's."""
    ways = {"F.cross_entropy(F.linear)": kernels.linear_cross_entropy_reference,
            "linear_cross_entropy": kernels.linear_cross_entropy}
    others = {"F.linear_cross_entropy": getattr(F, "linear_cross_entropy", None),
              "Liger": liger("liger_fused_linear_cross_entropy")} if "cuda" in device else {}
    return {**ways, **{name: f for name, f in others.items() if f}}


def head_and_loss(name: str, rows: int, V: int, C: int) -> Callable:
    """A function that computes a loss and both its gradients; in fp32, on a GPU in bf16."""
    torch.manual_seed(0)
    like = dict(device=device, dtype=torch.bfloat16 if "cuda" in device else torch.float32)
    x = torch.randn(rows, C, **like).requires_grad_()
    w = torch.randn(V, C, **like).mul_(0.05).requires_grad_() # in place: a copy would raise the peak
    targets, f = torch.randint(V, (rows,), device=device), losses()[name]
    return lambda: torch.autograd.grad(f(x, w, targets), (x, w))


def peak_of_loss(name: str, *shape: int) -> float:
    """MB that loss and gradients add to the peak, less the gradients, which any way has to return."""
    head_and_loss(name, 64, 512, 384)() # starts the threads and what else the libraries set up once
    added, gradients = added_to_peak(head_and_loss(name, *shape))
    return added - sum(g.nbytes for g in gradients) / 1e6


def cross_entropy() -> Iterator[dict]:
    """A linear head and its loss, both ways: time and memory at V = 50,304, on a GPU also at 50,257."""
    shapes = {"V=50304": (64 * batch_size, 50304, 384)} # rows, V, C
    if "cuda" in device:
        shapes = {f"V={V}": (batch_size * block_size, V, n_embd) for V in (50304, 50257)}
    print(f"cross_entropy: x W^T and its loss, (rows, V, C) = {', '.join(map(str, shapes.values()))}, eager")
    for size, shape in shapes.items():
        yield from compare({name: head_and_loss(name, *shape) for name in losses()}, f"{size}, {{}}", warm=1)
        peaks = {name: in_new_process(peak_of_loss, name, *shape) for name in losses()}
        yield from sizes(peaks, f"{size}, {{}}, memory")


# --- suites for a GPU: bf16 under autocast, times of the device, each share of a bound that was measured ---


def half(f: Callable) -> Callable:
    """f under bf16 autocast. Its casts are made anew in each call: a captured graph must hold them."""
    def call(*args):
        with torch.autocast(torch.device(device).type, torch.bfloat16, cache_enabled=False):
            return f(*args)
    return call


def gpt2() -> tuple[str, dict]:
    """A name and the shape of GPT-2 with the width and depth that were asked for; by default its 124M."""
    name = "124M" if (n_layer, n_embd) == (12, 768) else f"{n_layer} layers of {n_embd}"
    return name, dict(vocab_size=50304, n_layer=n_layer, n_head=n_embd // 64, n_embd=n_embd)


def gpu_attention() -> Iterator[dict]:
    """Each attention choice with its projections, both ways, against mha and SDPA alone; heads of 64, 128."""
    _, tensor_cores = ceilings()
    print(f"attention: {batch_size} x {block_size} tokens, {n_embd} channels, bf16, forward and backward")
    for D in (64, 128):
        arms, flops = {}, {}
        for name, choice in ARMS.items():
            model = build(vocab_size=64, n_layer=1, n_head=n_embd // D, n_embd=n_embd, head_dim=D,
                          block_size=block_size, qk_norm=True, **choice)
            attention, idx = model.blocks[0].attention, torch.zeros(batch_size, block_size, dtype=torch.long)
            x = torch.randn(*idx.shape, n_embd, device=device, requires_grad=True)
            pass_ = Pass(idx, table=model.position(x, 0, 0)[1])
            inputs, g = [x, *attention.parameters()], torch.randn_like(x).bfloat16()

            def both(attention=attention, x=x, pass_=pass_, inputs=inputs, g=g):
                torch.autograd.grad(half(attention)(x, pass_), inputs, g)

            arms[name], flops[name] = both, 3e-12 * forward_flops(attention, block_size) * idx.numel()
        for name, f in arms.items():
            signs = {"cudnn_generated": "cuDNN", "flash": "flash", "fmha": "memory-efficient"}
            kernels_run = " ".join(launched(f))
            ran = "; ".join(backend for sign, backend in signs.items() if sign in kernels_run)
            print(f"  heads of {D}, {name}: attention by {ran or 'no fused kernel'}")
        found = in_turn({name: captured(f) for name, f in arms.items()})
        for name, (median, ratio, low, high) in found.items():
            yield row(f"heads of {D}, {name}", flops[name] / median, "TFLOP/s", bound=tensor_cores)
            yield row(f"heads of {D}, {name}, time", 1e3 * median, "ms", "mha", ratio, low, high)
        q, k, v = (torch.randn(batch_size, n_embd // D, block_size, D, device=device, dtype=torch.bfloat16,
                               requires_grad=True) for _ in range(3))
        bare = partial(lambda q, k, v: torch.autograd.grad(
            F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), q.detach()), q, k, v)
        (median, *_), = in_turn({"SDPA": captured(bare)}).values()
        work = 12e-12 * batch_size * block_size**2 * n_embd # both products, both ways; the mask saves half
        yield row(f"heads of {D}, SDPA alone", work / median, "TFLOP/s", bound=tensor_cores)


def launched(f: Callable) -> list[str]:
    """Names of the kernels that f() launches on the GPU; none on a CPU."""
    if "cuda" not in device:
        return []
    f() # compiles
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        f()
        torch.cuda.synchronize()
    return [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]


def gpu_step() -> Iterator[dict]:
    """Steps of 124M and 10.4M, eager and compiled: tokens/s, share of the matrix products' rate, memory."""
    _, tensor_cores = ceilings()
    gpt, shape = gpt2()
    large = dict(shape, block_size=block_size, qk_norm=True)
    char = dict(CHAR, qk_norm=True, dropout=0.2)
    latent = dict(attention="diff_mla")
    everything = {**latent, "residual": "mhc", "activation": "silu", "glu": True}
    shapes = [(gpt, large, "plain", {}), (gpt, large, "all ideas", everything),
              ("10.4M", char, "diff_mla", latent)]
    for size, config, name, choice in shapes:
        label, B = f"{size}, {name}", batch_size * (1 if config is large else 4)
        if only not in label:
            continue
        if dry:
            config = dict(config, vocab_size=65, n_layer=1, n_head=2, n_embd=64, block_size=32)
        model, L = build(**config, **choice), config["block_size"]
        idx = torch.randint(config["vocab_size"], (B, L), device=device)
        work, opt = 1e-12 * model.flops_per_token(L) * B * L, optimizer_of(model)
        print(f"step: {label}, {model.num_params():,} parameters, {B} x {L} tokens, bf16")
        arms = {"eager": stepping(model, idx, opt, half(loss_of))}
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        if compiled:
            fused, began = torch.compile(model), time.perf_counter()
            arms["compiled"] = stepping(fused, idx, opt, half(loss_of))
            arms["compiled"]()
            yield row(f"{label}, first compiled step", time.perf_counter() - began, "s")
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            yield row(f"{label}, graphs", graphs, "graphs", digits=0)
        for way, f in arms.items():
            yield row(f"{label}, {way}, launches", len(launched(f)), "kernels", digits=0)
            if "cuda" in device:
                torch.cuda.reset_peak_memory_stats(device)
            f()
            yield row(f"{label}, {way}, peak memory", peak(), "MB", digits=0)
        found = in_turn(arms)
        for way, (median, ratio, low, high) in found.items():
            yield row(f"{label}, {way}", B * L / median, "tokens/s", "eager", 1 / ratio, 1 / high, 1 / low,
                      digits=0)
            yield row(f"{label}, {way}, work", work / median, "TFLOP/s", bound=tensor_cores)


def gpu_decode() -> Iterator[dict]:
    """Tokens/s in bf16, plain and by a CUDA graph, batch 1, 8, 64, context 128 and 1,024, of the bound."""
    copy, _ = ceilings()
    size, shape = gpt2()
    new, turns = Decoder.AHEAD, 3 # tokens of a turn: a whole launch of the graph
    for attention in ("mha", "diff_mla"):
        if only not in f"{size}, {attention}":
            continue
        config = dict(vocab_size=65, n_layer=1, n_head=2, n_embd=64) if dry else shape
        model = build(**config, block_size=2048, attention=attention)
        model = model.to(torch.bfloat16).eval()
        weights = sum(p.nbytes for p in model.parameters()) # the embedding once: the head reads all of it
        for B, context in itertools.product((1, 8, 64), (16,) if dry else (128, 1024)):
            cache = model.new_cache(B)
            read = weights + cache.nbytes() * context / cache.capacity # bytes that a token of each row needs
            del cache
            idx = torch.randint(model.config.vocab_size, (B, context), device=device)
            label = f"{size}, {attention}, batch {B}, context {context}"
            arms, ways = {}, {"graph": {"graph": True}}
            if B == 1 and context < 1024: # plain decoding takes seconds for each figure
                ways = {"plain": {}, **ways}
            for way, how in ways.items():
                text = stream(model, idx, new * (turns + 3), **how)
                next(text) # reads the prompt, captures
                arms[way] = partial(lambda text: list(itertools.islice(text, new)), text)
            first = next(iter(arms))
            for way, (median, ratio, low, high) in in_turn(arms, 1, turns).items():
                yield row(f"{label}, {way}", B * new / median, "tokens/s", first, 1 / ratio, 1 / high,
                          1 / low, digits=0, bound=B * 1e9 * copy / read)


# --- suites that read finished runs ---


def opened(path: str, command: str = "config/train_shakespeare_diffmla.py") -> tuple:
    """(path, model, tokenizer or None, settings) of a run: its folder or a checkpoint. Of weights of other
    programs, for which see GPT.from_pretrained, the settings are {}.
    """
    settings = {}
    with user_errors():
        if path in GPT2 or os.path.exists(os.path.join(path, "config.json")):
            model = GPT.from_pretrained(path, device=device)
        elif os.path.exists(path):
            state, path = load_run(path)
            model, settings = GPT.from_state(state, path).to(device).eval(), state["config"]["train"]
        else:
            raise UserError(f"there is no {path}\ntrain one first: python train.py {command}, "
                            "or name the folder of another run")
    return path, model, model.tokenizer, settings


def trained(command: str, file: str = "best.pt") -> tuple:
    """(path, model, dataset) of the run in --out_dir, or of that which `command` makes; or a UserError."""
    config = runpy.run_path(os.path.join(HERE, command.split()[0]))
    path, model, _, settings = opened(os.path.join(out_dir or config["out_dir"], file), command)
    with user_errors():
        return path, model, data.load(settings["dataset"], settings["data_dir"])


def evaluations(folder: str | Path) -> list[dict]:
    """The lines of a run's metrics.jsonl that have a validation loss; [] if there is no such file."""
    path = Path(folder, "metrics.jsonl")
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
    lines = map(json.loads, lines[:-1]) # the last one may be cut off, or is empty
    return [line for line in lines if line.get("val_loss")] # others hold the training loss


def compare_runs(*folders: str) -> Iterator[dict]:
    """Table and curves, as SVG, of finished runs by their folders, or of the three of README's picture."""
    axes = {"seconds": "time_s", "steps": "step", "tokens": "tokens"}
    if x not in axes:
        raise UserError(f"x={x!r} is none of {', '.join(axes)}")
    curves = {}
    print("compare: validation loss of finished runs; seconds of training, without evaluations")
    for path in map(os.path.normpath, folders or LABELS):
        name, points = LABELS.get(path, path), evaluations(path)
        if not points:
            command = f"config/train_{path[4:]}.py" if path in LABELS else f"--out_dir={path}"
            raise UserError(f"{path} holds no metrics.jsonl with a validation loss\n"
                            f"train that run first: python train.py {command}")
        with user_errors():
            size = json.loads(Path(path, "run.json").read_text(encoding="utf-8"))["n_params"]
        steps, tokens, time_s, final = (points[-1][k] for k in ("step", "tokens", "time_s", "val_loss"))
        found = {"steps": steps, "tokens": tokens, "seconds": time_s, "parameters": size, "final loss": final,
                 "best loss": min(p["val_loss"] for p in points), "tokens/s": tokens / max(time_s, 1e-3)}
        if not curves:
            print(f"  {'run':<30}" + "".join(f"{what:>12}" for what in found))
        digits = {"seconds": 1, "final loss": 4, "best loss": 4}
        print(f"  {name:<30}" + "".join(f"{v:>12,.{digits.get(k, 0)}f}" for k, v in found.items()))
        for what, value in found.items(): # silent: the table has it
            yield row(f"{name}, {what}", value, "nats/token" if "loss" in what else what, digits=None)
        curves[name] = [(point[axes[x]], point["val_loss"]) for point in points]
    if save:
        path = Path(picture or ("out/compare.svg" if folders else Path(HERE, "bench_results", "curves.svg")))
        with user_errors():
            path.write_text(drawn(curves), encoding="utf-8")
        print(f"  drawn to {path}")


def ticks(low: float, high: float) -> list[tuple]:
    """[(value, its text)] of at most 8 round numbers between low and high."""
    digits = math.ceil(-math.log10((high - low) / 7)) # 10^-digits is a seventh of the range, or less
    step = next(s * 10.0**-digits for s in (1, 2, 5, 10) if 7.001 * s * 10.0**-digits >= high - low)
    numbers = (i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1))
    return [(number, f"{number:,.{max(0, digits)}f}") for number in numbers]


def drawn(curves: dict[str, list]) -> str:
    """{name: [(x, loss)]} as an SVG without background; equal curves give equal bytes."""
    # Each has a contrast of at least 3 to white and to black.
    grey, colours = "#808080", ("#d9662b", "#2f81f7", "#1f9d55", "#b45fd6", "#b08800", "#d6456b")
    ends = [points[-1] for points in curves.values()]
    far, losses = 1.08 * max(1e-3, *(end for end, _ in ends)), [loss for _, loss in ends]
    low, high = min(losses) - 0.05, max(2.6, max(losses) + 0.1) # the interesting range
    left, right, top, bottom = 56, 706, 12, 372

    def place(a, loss):
        return left + (right - left) * a / far, bottom - (bottom - top) * (loss - low) / (high - low)

    def text(a, b, words, colour=grey, anchor="middle", more=""):
        return f'<text x="{a:.1f}" y="{b:.1f}" fill="{colour}" text-anchor="{anchor}"{more}>{words}</text>'

    def line(points, colour, style=' stroke-opacity="0.25"'):
        pairs = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        return f'<polyline points="{pairs}" fill="none" stroke="{colour}"{style}/>'

    label = {"seconds": "seconds of training", "steps": "steps", "tokens": "tokens read"}[x]
    parts = [line([(left, top), (left, bottom), (right, bottom)], grey, ""), text(381, 412, label),
             text(14, 192, "validation loss, nats per token", more=' transform="rotate(-90 14 192)"')]
    for number, words in ticks(0, far):
        a, _ = place(number, low)
        parts += [line([(a, top), (a, bottom)], grey), text(a, 390, words)]
    for number, words in ticks(low, high):
        _, b = place(0, number)
        parts += [line([(left, b), (right, b)], grey), text(49, b + 4, words, anchor="end")]
    for i, (name, points) in enumerate(curves.items()):
        y, thick, colour = top + 14 + 18 * i, ' stroke-width="2"', colours[i % len(colours)]
        (a, b), loss = place(*points[-1]), points[-1][1]
        parts += [line(itertools.starmap(place, points), colour, f'{thick} clip-path="url(#in)"'),
                  f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>',
                  line([(right - 24, y - 4), (right, y - 4)], colour, thick), # the legend
                  text(right - 30, y, f"{html.escape(name)}, {loss:.3f}", colour, "end")]
    box = f'<rect x="{left}" y="{top}" width="{right - left}" height="{bottom - top}"/>'
    head = ('<svg xmlns="http://www.w3.org/2000/svg" width="720" height="420" viewBox="0 0 720 420" '
            'font-family="sans-serif" font-size="13">')
    return "\n".join([head, f'<clipPath id="in">{box}</clipPath>', *parts, "</svg>", ""])


@torch.no_grad()
def cache() -> Iterator[dict]:
    """A run's bytes, loss and tokens/s with a cache of fp16 numbers, or of integers of 8 and 4 bits."""
    path, model, corpus = trained("config/train_shakespeare_diffmla.py", file="ckpt.pt")
    L, new = model.block_size, min(16, model.block_size // 2)
    print(f"cache: {path}, the whole validation split read through the cache, and {new} tokens written after "
          f"{L - new}; batch 1, fp32, eager")
    prompt = next(iter(corpus.val.windows(L, 64)))[0][:1, : L - new].to(device) # (1, L - new)
    held, arms = {}, {}
    for name, kind in {"fp16": torch.float16, "int8": "int8", "int4": "int4"}.items():
        model.cache_dtype, arms[name] = kind, writing(model, prompt, new)
        cache = model.new_cache(1)
        held[name] = sum(store.nbytes for store in cache.layers[0]) / cache.layers[0][0].size(2)

        def through(x, y, **how):
            return model(x, y, model.new_cache(len(x)), **how)
        yield row(name, loss_on(through, corpus.val.windows(L, 64)), "nats/token", digits=4)
    yield from sizes(held, unit="bytes/token/layer")
    yield from compare(arms, amount=new, unit="tokens/s")


def speculative() -> Iterator[dict]:
    """Tokens/s of drafting and judging against plain cached decoding, on the trained model of --out_dir."""
    path, model, _ = trained("config/train_shakespeare_diffmla.py")
    prompt = torch.zeros(1, 1, dtype=torch.long, device=device)
    print(f"speculative: {path}, 256 tokens after a prompt of one, batch 1, fp32, eager")
    for temperature in (1.0, 0.8, 0.0):
        # Finished Speculations by drafter; a model without the cell `ahead` has no such drafts.
        writers = {name: [] for name in ["auto", *["ahead"] * ("ahead" in model.extras), "ngram"]}

        def generator(name):
            return torch.Generator(device).manual_seed(len(writers[name])) # another text in each round

        def plain():
            for _ in stream(model, prompt, 256, temperature, generator=generator("auto")):
                pass

        def drafting(name):
            writer = Speculation(model, prompt, temperature, generator=generator(name), draft=name)
            writers[name].append(writer)
            writer.generate(256)

        arms = {"plain": plain, **{name: partial(drafting, name) for name in writers}}
        yield from compare(arms, f"{{}}, temperature {temperature}", amount=256, unit="tokens/s")
        for name, done in writers.items():
            kept, drafted, tokens, forwards = (sum(getattr(writer, count) for writer in done)
                                               for count in ("kept", "drafted", "tokens", "forwards"))
            kept = f"{kept / max(1, drafted):.0%} of drafts kept"
            yield row(f"{name}, {kept}", tokens / forwards, "tokens/forward")


@torch.no_grad()
def protocol() -> Iterator[dict]:
    """A run's last loss as nanoGPT estimates it, from random batches of the validation split."""
    path, model, corpus = trained("config/record_shakespeare_cpu.py", "ckpt.pt") # of the last step
    B, T = 8 * batch_size, model.block_size # 64, as in nanoGPT's config for these characters
    print(f"protocol: {path}, context {T}, fp32")
    for seed in range(min(3, rounds)):
        name = f"200 random batches of {B} x {T}, seed {seed}" # nanoGPT's eval_iters
        loss = loss_on(model, (corpus.val.batch(i, B, T, seed) for i in range(200)))
        yield row(name, loss, "nats/token", digits=4)


# --- eval: the loss of a run on any text, multiple choice as lm-evaluation-harness scores it, recall ---


def strided(texts: Iterable[np.ndarray], context: int, step: int) -> Iterator[tuple]:
    """Batches (x, y), both (B, T <= context), that hold every target of the texts (N,) once.

    A window begins `step` tokens after the one before. Targets that both have are -1 in the second, so that
    the loss leaves them out: the others see context - step tokens or more. The first token of a text is no
    target, because nothing stands before it. step = context: the windows of train.py's evaluation.
    """
    def windows():
        for ids in texts:
            rest = max(len(ids) - 1 - context, 0) # targets after the first window
            for begin in range(0, rest + step if len(ids) > 1 else 0, step):
                yield ids[begin : begin + context + 1], context - step if begin else 0

    for (_, shared), alike in itertools.groupby(windows(), key=lambda window: (len(window[0]), window[1])):
        while some := [ids for ids, _ in itertools.islice(alike, batch_size)]:
            ids = torch.from_numpy(np.stack(some).astype(np.int64)).to(device) # (B, T + 1)
            x, y = ids[:, :-1], ids[:, 1:].clone()
            y[:, :shared] = -1
            yield x, y


def loss_on(model: GPT, batches) -> float:
    """The mean over the targets of batches (x, y); -1 is no target."""
    total = count = 0
    for x, y in batches:
        ce, n = model(x.to(device), y.to(device), with_logits=False)[1]["ce"].item(), int((y >= 0).sum())
        total, count = total + ce * n, count + n
    return total / count


def texts_of(source: str, codec: data.Tokenizer, settings: dict) -> list[np.ndarray]:
    """The ids of a text, with separators as data.py prepare has them; of "": the run's validation split."""
    if not source and not settings:
        raise UserError("these weights have no validation split: name a text after them")
    name, folder = settings.get("dataset"), settings.get("data_dir", "data")
    if source:
        if not os.path.exists(source): # else the name of a dataset would mean the text that was trained on
            raise UserError(f"there is no text {source!r}\n"
                            f"name a file or a folder, or ask {', '.join(QUIZZES)}")
        _, files, *_ = data.read_source(source, folder, field)
        ids = data.Ids(files, codec)
        return [np.concatenate([ids.ids, *ids.take(2**62)])]
    with user_errors():
        if settings.get("stream") and not data.find(name, folder):
            val = data.stream(name, settings["tokenizer"], folder, settings["val_fraction"]).val
        else:
            val = data.load(name, folder).val
    return [ids for shard, n in zip(val.shards, val.rows) if n
            for ids in np.split(shard, range(n, len(shard), n))]


@torch.no_grad()
def evaluate(run: str = "", *sources: str) -> Iterator[dict]:
    """A run's loss and bits per byte on texts, its accuracy in multiple choice, its recall by distance."""
    if not run:
        raise UserError("eval takes a run, then texts, or else its validation split:\n"
                        "python bench.py eval out/shakespeare_diffmla book.txt")
    path, model, codec, settings = opened(run)
    if not codec:
        raise UserError(f"{path} was trained on tokens without a tokenizer\nprepare the data with data.py")
    context = settings.get("windows", 1) * model.block_size
    step = max(1, context // 2) if stride < 0 else stride or context
    if step > context:
        raise UserError(f"stride={stride} leaves out tokens: it must be at most {context}, the run's context")
    if "cuda" in device: # as sample.py does
        model.to(getattr(torch, settings.get("dtype", "bfloat16")))
    print(f"eval: {path}, context {context}, a window every {step} tokens, {model.embed.weight.dtype}")
    for source in sources or [""]:
        name = os.path.basename(os.path.normpath(source or f"{settings.get('dataset')}, validation"))
        if source in QUIZZES and not os.path.exists(source):
            yield from QUIZZES[source](path, model, codec, settings)
        elif found := [] if field else questions(source): # --field asks for the text of that key
            yield from multiple_choice(name, found, model, codec, context)
        else:
            yield from losses_of(name, texts_of(source, codec, settings), model, codec, context, step)


def losses_of(name: str, texts: list, model: GPT, codec, context: int, step: int) -> Iterator[dict]:
    """Rows of the loss on texts. Tokens and bytes are those that were predicted."""
    tokens = sum(len(ids) - 1 for ids in texts if len(ids))
    if not tokens:
        raise UserError(f"{name} has no token that another one precedes\nname a longer text")
    size = sum(codec.count_bytes(ids[1:]) for ids in texts)
    loss = loss_on(model, strided(texts, context, step))
    yield row(f"{name}, loss", loss, "nats/token", digits=4)
    yield row(f"{name}, perplexity", math.exp(loss), "", digits=4)
    yield row(f"{name}, bits per byte", loss * tokens / math.log(2) / size, "bits/byte", digits=4)
    yield row(f"{name}, predicted", tokens, "tokens", digits=0)
    yield row(f"{name}, predicted", size, "bytes", digits=0)


def questions(path: str) -> list[tuple]:
    """[(context, endings, number of the right one)] of a .jsonl of multiple choice; [] of any other text."""
    found = []
    for number, line in data.json_rows(path, "") if re.search(r"\.jsonl(\.gz|\.zst)?$", path) else ():
        if not found and not (isinstance(line, dict) and {"endings", "choices"} & line.keys()):
            return [] # documents
        try:
            found.append(question(line))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} line {number} is no question, which has this form:\n"
                            '{"ctx": "...", "endings": ["...", "..."], "label": 0}') from error
    return found


def question(line: dict) -> tuple[str, list, int]:
    """(context, endings, number of the right one) of {query, choices, gold} or of HellaSwag's form."""
    names = ("query", "choices", "gold") if "choices" in line else ("ctx", "endings", "label")
    context, endings, right = (line[name] for name in names)
    if "activity_label" in line: # HellaSwag's own file; its brackets are left from the making of it
        context = f"{line['activity_label']}: {line['ctx_a']} {line['ctx_b'].capitalize()}"
        context, *endings = (re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
                             for text in (context, *endings))
    if not (0 <= int(right) < len(endings) and all(endings)):
        raise ValueError
    return context + "", [ending + "" for ending in endings], int(right)


def ending_ids(codec: data.Tokenizer, context: str, ending: str) -> tuple[np.ndarray, int]:
    """(ids of context and ending, how many are the ending's).

    Both are one text to the tokenizer. What exceeds the number of ids that the context has by itself, without
    its last spaces, is the ending's. Before an empty context stands what separates documents.
    """
    ids, before = codec.encode(f"{context} {ending}"), context.rstrip()
    if before and len(ids) > 1:
        return ids, len(ids) - len(codec.encode(before))
    return np.append(codec.encode("\n") if codec.eot is None else codec.eot, ids), len(ids)


def log_likelihoods(model: GPT, texts: list[tuple], context: int) -> np.ndarray:
    """(ids, n) of each text -> (texts,): the log-probability of its last n ids after the others."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i][0])) # a batch is of equal lengths
    windows = strided([texts[i][0][-context - 1 :] for i in order], context, context) # one for each text
    losses = [F.cross_entropy(model(x, y)[0].mT, y, reduction="none") for x, y in windows] # (B, T) each
    found = np.zeros(len(texts))
    for i, loss in zip(order, itertools.chain.from_iterable(losses), strict=True): # (T,)
        found[i] = -loss.double().flip(0)[: texts[i][1]].sum()
    return found


def multiple_choice(name: str, found: list[tuple], model: GPT, codec, context: int) -> Iterator[dict]:
    """Rows of the share of right answers: by log-probability, and by log-probability a character."""
    sums = iter(log_likelihoods(model, [ending_ids(codec, before, ending) for before, endings, _ in found
                                        for ending in endings], context))
    hits = {"accuracy": [], "accuracy, normalised": []}
    for _, endings, right in found:
        scores = np.array([next(sums) for _ in endings])
        for hit, values in zip(hits.values(), (scores, scores / [*map(len, endings)])):
            hit.append(100.0 * (values.argmax() == right))
    for what, hit in hits.items():
        yield row(f"{name}, {what}", statistics.mean(hit), "%")
        yield row("standard error", np.std(hit, ddof=min(1, len(hit) - 1)) / len(hit)**0.5, "%")
    yield row(f"{name}, answered", len(found), "questions", digits=0)


def asked(name: str, path: str, codec: data.Tokenizer, lines: list[str]) -> torch.Tensor:
    """Lines of equal length -> (lines, T). UserError where a tokenizer has not one token a character."""
    text = "".join(lines)
    if codec.unknown(text) or len(ids := codec.encode(text)) != len(text):
        raise UserError(f"{path} has no token for each character of {name}\n"
                        f"train on {name}: python train.py config/train_{name}.py")
    return torch.from_numpy(ids.astype(np.int64)).view(len(lines), -1)


def since_told(keys: torch.Tensor) -> torch.Tensor:
    """(B, U) -> (B, U): how many places ago each key stood last; 0: never before."""
    place = torch.arange(keys.size(1))
    before = (keys[:, :, None] == keys[:, None]).tril(-1) # (B, U, U): equal keys
    last = torch.where(before, place, -1).amax(-1)
    return torch.where(last < 0, 0, place - last)


def by_distance(right: torch.Tensor, back: torch.Tensor) -> Iterator[dict]:
    """Rows of the share of right answers (n,), by how many characters back (n,) they stand; 0: nowhere."""
    low, high = 0, 32
    while (back > low).any():
        here = (back > low) & (back <= high)
        if here.any():
            yield row(f"{low + 1} to {high} back, {int(here.sum()):,} answers", share(right[here]), "% right")
        low, high = high, 2 * high


def share(right: torch.Tensor) -> float:
    return 100 * right.double().mean().item()


def recall(path: str, model: GPT, codec: data.Tokenizer, settings: dict) -> Iterator[dict]:
    """Recall of pairs such as a3, told again and again in lines that are longer than most contexts."""
    lines = [line.rstrip(".") for line in data.recall("")[1]]
    lines = lines[int(len(lines) * (1 - settings.get("val_fraction", 0))) + 1 :] # those not trained on
    lines, L = asked("recall", path, codec, lines), model.block_size # (lines, 1022): 511 pairs
    back = 2 * since_told(lines[:, ::2]) # (lines, 511)

    def answers(context, step): # (lines, 511): whether each digit is right
        batches = strided(lines.numpy(), context, step)
        right = torch.cat([(model(x, y)[0].argmax(-1) == y)[y >= 0] for x, y in batches])
        return right.view(len(lines), -1)[:, ::2].cpu()

    right = answers(lines.size(1), lines.size(1)) if model.memory else answers(L, max(1, L // 2))
    print(f"recall: {len(lines)} validation lines of {lines.size(1):,} characters")
    yield from by_distance(right, back)
    if model.memory: # alone knows what was told before the window
        yield row(f"recall of {int((back > L).sum()):,}, with memory", share(right[back > L]), "%")
        yield row("each window by itself", share(answers(L, L)[back > L]), "%")


def needles(path: str, model: GPT, codec: data.Tokenizer, settings: dict) -> Iterator[dict]:
    """Recall of needles in new lines as long as the context, and in how far their order matters."""
    n, count, rng = 2 ** int(math.log2(model.block_size / 6)), 64, random.Random(1) # keys of a line; lines
    lines = [data.needle_line(rng, n, 6 * n) for _ in range(count)] # all are told, then each is asked
    lines = asked("needles", path, codec, lines).view(count, 2 * n, 3)
    print(f"needles: {count} lines of {n} keys told and then asked, each in 5 orders")
    right, back = [], [] # (B, n) answers, (lines, n) distances
    for order in range(5):
        told = lines[:, torch.randperm(n, generator=torch.Generator().manual_seed(order))] # (lines, n, 3)
        x = torch.cat([told, lines[:, n:]], dim=1) # (lines, 2 n, 3)
        back.append(3 * since_told(x[..., 0] * 1000 + x[..., 1])[:, n:]) # one number for a key's two letters
        for part in x.split(8): # (B, 2 n, 3)
            idx = part.flatten(1).to(device) # (B, 6 n)
            guess = model(idx, idx)[0].argmax(-1).view(part.shape).cpu()
            right.append(guess[:, n:, 1] == part[:, n:, 2])
    right, back = torch.cat(right), torch.cat(back) # (5 lines, n) each
    by_order = right.double().mean(1).view(5, -1) # (orders, lines)
    yield row("answers that are right", share(right), "%")
    yield row("best less worst order", 100 * (by_order.amax(0) - by_order.amin(0)).mean().item(), "%")
    yield from by_distance(right, back)


QUIZZES = {"recall": recall, **dict.fromkeys(data.NEEDLES, needles)} # eval: asked where a text may stand


# --- uncertainty: does a model know where it is right? p (n,) is a claimed probability, right (n,) a bool ---


def fit_temperature(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """The T in [0.001, 1000] at which softmax(logits / T) has the lowest mean cross-entropy. logits (n, V),
    targets (n,). Guo et al. 2017, arXiv:1706.04599. Convex in 1/T with slope E[z] - z_target: bisection.
    """
    z, low, high = logits.double(), 1e-3, 1e3
    of_target = z.gather(1, targets[:, None]).mean()
    for _ in range(50):
        T = (low * high) ** 0.5
        too_sure = ((z / T).softmax(-1) * z).sum(-1).mean() > of_target # the slope is above 0
        low, high = (T, high) if too_sure else (low, T)
    return T


def reliability(p: torch.Tensor, right: torch.Tensor, equal_mass=False, bins=15) -> list[tuple]:
    """[(n, mean p, share right)] of bins of equal width or, equal_mass, of equal counts; no empty ones."""
    order = p.argsort(stable=True)
    counts = torch.bincount((p * bins).long().clamp(max=bins - 1), minlength=bins) # p = 1: the last bin
    parts = order.tensor_split(bins) if equal_mass else order.split(counts.tolist())
    return [(len(i), p[i].mean().item(), right[i].double().mean().item()) for i in parts if len(i)]


def calibration_error(p: torch.Tensor, right: torch.Tensor, equal_mass=False, bins=15) -> float:
    """ECE: |share right - mean p| of each bin, weighted by its count. Naeini et al. 2015; Guo et al. 2017."""
    return sum(n * abs(share - mean) for n, mean, share in reliability(p, right, equal_mass, bins)) / len(p)


def auroc(p: torch.Tensor, right: torch.Tensor) -> float:
    """The probability that a right one has a larger p than a wrong one; ties count half, nan without both."""
    _, which, counts = p.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[which] # equal p share the mean of their ranks
    n = right.sum().double() # below: Mann and Whitney's U over the number of pairs
    return ((ranks[right].sum() - n * (n + 1) / 2) / (n * (len(p) - n))).item()


@torch.no_grad()
def uncertainty() -> Iterator[dict]:
    """How well max p and the head of --uncertainty know where the likeliest token is right."""
    path, model, corpus = trained("config/train_shakespeare_diffmla.py --uncertainty")
    with user_errors():
        model.uncertainty(model.embed.weight[:1]) # raises if the model has no head
        batches = [] # (h (n, C), logits (n, V), targets (n,)) of each, on the CPU
        for x, y in corpus.val.windows(model.block_size, batch_size):
            h = model.trunk(x.to(device)) # (B, T, C)
            batches.append((h.flatten(0, 1).cpu(), model.logits(h).flatten(0, 1).cpu(), y.flatten()))
    # Every tenth batch, not the first tenth: that part of the text is easier and has another temperature.
    held, rest = batches[::10], [batch for i, batch in enumerate(batches) if i % 10]
    if not rest:
        raise UserError(f"{corpus.name} has too little validation text for two parts\nlower --batch_size")
    (_, logits, targets), (h, others, wanted) = (map(torch.cat, zip(*part)) for part in (held, rest))
    T, right, others = fit_temperature(logits, targets), others.argmax(-1) == wanted, others.double()
    print(f"uncertainty: {path}, {len(right):,} targets; the temperature T from the other {len(targets):,}")
    # The largest probability (max p) and the head, as they are and with the logits divided by T.
    show, score = partial(row, digits=4), model.cpu().uncertainty # score: the probability of being wrong
    yield show("accuracy", right.double().mean().item(), "right")
    yield show("T", T, "")
    for name, p in {"max p": others.softmax(-1).amax(-1), "max p at T": (others / T).softmax(-1).amax(-1),
                    "head": 1 - score(h, others), "head at T": 1 - score(h, others / T)}.items():
        yield show(f"{name}, ECE", calibration_error(p, right), "15 bins of equal width")
        yield show(f"{name}, ECE, equal mass", calibration_error(p, right, True), "15 bins of equal mass")
        yield show(f"{name}, Brier", (p - right.double()).square().mean().item(), "")
        yield show(f"{name}, AUROC", auroc(p, right), "")
        for n, mean, part in reliability(p, right):
            yield show(f"{name}, {n:,} said {mean:.3f}", part, "right")


# --- ablations: arms of one recipe, each paired by seed with the arm that it is against ---

SEEDS = (1337, *range(1, 31))
# Student's t: the 97.5 % quantiles for 1 to 30 degrees of freedom, which make intervals of 95 %.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
       2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048,
       2.045, 2.042)


def read_arms(text: str) -> dict[str, dict]:
    """{name: arm} of --arms. An arm has flags for train.py, and `against`: the arm it is compared with."""
    if text.endswith(".py"):
        if not os.path.isfile(text):
            raise configurator.missing(text)
        found = runpy.run_path(text).get("ARMS", {})
    else:
        pairs = [part.partition(":") for part in text.split(";")]
        found = {name.strip(): {"flags": flags.strip()} for name, colon, flags in pairs if colon}
        if found and "base" not in found and all(arm["flags"] for arm in found.values()):
            found = {"base": {"flags": ""}, **found}
    if not found or not all("flags" in arm for arm in found.values()):
        raise UserError(f"there are no arms in {text!r}\nwrite --arms=\"mla: --attention=mla\", or in a file "
                        "ARMS = {\"mla\": {\"flags\": \"--attention=mla\"}}")
    found = {name: {"against": next(iter(found)), **arm} for name, arm in found.items()}
    if strange := [name for name, arm in found.items() if arm["against"] not in found]:
        raise UserError(f"arm {strange[0]!r} is against {found[strange[0]]['against']!r}, which is no arm\n"
                        f"there is: {', '.join(found)}")
    return found


@dataclass
class Run:
    """A run of train.py by the words argv. asked: all settings, as JSON; where they are equal, runs are."""
    folder: Path
    argv: list
    asked: str

    def begun(self) -> bool:
        note = self.folder / "asked.json"
        return note.exists() and note.read_text(encoding="utf-8") == self.asked

    def points(self) -> list[dict]:
        """The evaluations, if the run has reached max_iters; else none."""
        found = evaluations(self.folder) if self.begun() else []
        return found if found and found[-1]["step"] == json.loads(self.asked)["max_iters"] else []

    def begin(self) -> subprocess.Popen:
        if self.folder.exists() and not self.begun(): # a run with other settings is kept, under another name
            names = (self.folder.with_name(f"{self.folder.name}_before_{n}") for n in itertools.count(1))
            self.folder.rename(next(name for name in names if not name.exists()))
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "asked.json").write_text(self.asked, encoding="utf-8")
        argv = [*self.argv, *["--resume"] * (self.folder / "run.json").exists()]
        with open(self.folder / "log.txt", "w", encoding="utf-8") as log:
            return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                    env={**os.environ, "OMP_NUM_THREADS": "1"})


def run_of(config: str, flags: str, seed: int, folder: Path) -> Run:
    script, words = os.path.join(HERE, "train.py"), [config, *shlex.split(flags), f"--seed={seed}"]
    known = configurator.top_level(script) | {f.name: f.default for f in fields(GPTConfig)}
    asked = {k: v for k, v in (known | configurator.parse(words, known)).items()
             if k not in ("out_dir", "resume", "device")}
    more = [f"--out_dir={folder}", f"--device={device}", "--sample_tokens=0"]
    return Run(folder, [sys.executable, script, *words, *more], json.dumps(asked))


def train_all(runs: list[Run], failed: list[Run], note: Callable) -> None:
    """Trains what is not finished, and calls note() after each run. UserError if train.py refuses one.
    However this function ends, it ends the runs that are going on, and they save their state.
    """
    todo, going = [run for run in runs if not run.points()], [] # going: [(run, its process)]
    count = len(todo)
    print(f"{len(runs)} runs, {len(runs) - count} of them finished before", flush=True)
    try:
        while todo or going:
            while todo and len(going) < (jobs or os.cpu_count()):
                run = todo.pop(0)
                going.append((run, run.begin()))
            time.sleep(0.05)
            for run, process in [pair for pair in going if pair[1].poll() is not None]:
                going.remove((run, process))
                code, points = process.returncode, run.points()
                said = (run.folder / "log.txt").read_text(encoding="utf-8", errors="replace")
                if code == 2: # what is refused for one seed is refused for all
                    raise UserError(said.rpartition("error: ")[2])
                failed += [run] * bool(code or not points)
                result = [f"FAILED, exit code {code}", *said.splitlines()[-5:]]
                result = result if run in failed else [f"{points[-1]['val_loss']:.4f}"]
                ended = count - len(todo) - len(going)
                print(f"  {ended}/{count}  {run.folder}:", "\n    ".join(result), flush=True)
                note()
    finally:
        for _, process in going:
            process.terminate()
        for _, process in going:
            process.wait()


def paired(ours: dict, theirs: dict) -> dict:
    """The mean difference of two {seed: loss} over the seeds of both, its 95 % interval, the verdict."""
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    n = len(differences)
    if n < 2:
        return {"difference": differences[0], "pairs": 1, "verdict": "one seed"} if n else {}
    mean, half = statistics.mean(differences), T95[n - 2] * statistics.stdev(differences) / n**0.5
    verdict = "win" if mean + half < 0 else "lose" if mean - half > 0 else "tie"
    return {"difference": mean, "low": mean - half, "high": mean + half, "pairs": n, "verdict": verdict}


def summary(found: dict, runs: dict, failed: list, measured: dict) -> dict[str, dict]:
    """{name: arm with the losses of its finished runs, its verdict, curve and measured costs}."""
    done = {name: {seed: points for seed, run in of_arm.items() if (points := run.points())}
            for name, of_arm in runs.items()}
    losses = {name: {seed: p[-1]["val_loss"] for seed, p in of_arm.items()} for name, of_arm in done.items()}
    table = {name: {**arm, "losses": losses[name]} for name, arm in found.items()}
    for name, arm in table.items():
        if arm["against"] != name:
            arm |= paired(losses[name], losses[arm["against"]])
        if any(run in failed for run in runs[name].values()):
            arm["verdict"] = "failed"
        for seed, points in list(done[name].items())[:1]:
            curves = [[point["val_loss"] for point in of_seed] for of_seed in done[name].values()]
            arm["curve"] = {"steps": [p["step"] for p in points], "tokens": [p["tokens"] for p in points],
                            "losses": [round(statistics.mean(at), 5) for at in zip(*curves)]}
            about = json.loads((runs[name][seed].folder / "run.json").read_text(encoding="utf-8"))
            arm |= {"mean": statistics.mean(losses[name].values()), "n_params": about["n_params"]}
        if measured.get(name, {}).get("flags") == arm["flags"]:
            arm |= measured[name]
    return table


def step_of(run: Run) -> Callable:
    """A whole training step of a run: the gradients of its batch and the update of its optimizer."""
    config = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))["config"]
    t, model = config["train"], build(**config["model"])
    bf16 = t["dtype"] == "bfloat16"
    opt = build_optimizer(model, *(t[k] for k in ("optimizer", "learning_rate", "weight_decay")),
                          (t["beta1"], t["beta2"]), bf16)
    shape = t["gradient_accumulation_steps"], t["batch_size"], t["windows"] * model.block_size
    idx = torch.randint(model.config.vocab_size, shape, device=device)

    def step():
        model.zero_grad()
        for part in idx:
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
                loss = loss_of(model, part)
            (loss / len(idx)).backward()
        update(model, opt)
    return step


def cells(arm: dict, against: dict) -> tuple[str, str]:
    """The effect and the cost of an arm, for a table."""
    effect, cost, more = "", [], arm.get("n_params", 0) / against.get("n_params", 1) - 1
    if "difference" in arm:
        effect = f"{arm['difference']:+.3f} (one seed)"
    if "low" in arm:
        effect = f"{arm['difference']:+.3f} ({arm['low']:+.3f} to {arm['high']:+.3f}; {arm['pairs']} seeds)"
    if "step" in arm:
        cost = ["step {:.2f} ({:.2f} to {:.2f})".format(*arm["step"])]
    if effect and abs(more) >= 0.005:
        cost.append(f"{100 * more:+.0f} % parameters")
    if "peak_mb" in arm:
        cost.append(f"peak {arm['peak_mb']:,.0f} MB")
    return effect, "; ".join(cost)


def ablate(config: str = "", *more: str) -> Iterator[dict]:
    """Trains each arm of --arms on a config, at --seeds seeds: loss, paired difference, interval, cost."""
    if more or not config:
        raise UserError("ablate takes one config: python bench.py ablate config/train_shakespeare_diffmla.py")
    if not os.path.isfile(config):
        raise configurator.missing(config)
    if not 1 <= seeds <= len(SEEDS) or jobs < 0:
        raise UserError(f"seeds={seeds} must be 1 to {len(SEEDS)}, and jobs={jobs} at least 0")
    found, by_settings = read_arms(arms), {}
    homes = {name: Path("out/ablate", Path(config).stem, re.sub(r"\W+", "_", name)) for name in found}
    if len({*homes.values()}) < len(homes):
        raise UserError(f"two arms would share a folder: give them other names than {', '.join(found)}")
    runs = {name: {} for name in found} # {arm: {seed: run}}
    for seed, (name, arm) in itertools.product(SEEDS[:seeds], found.items()):
        run = run_of(config, arm["flags"], seed, homes[name] / str(seed))
        runs[name][seed] = by_settings.setdefault(run.asked, run)
    path, key, failed = Path(HERE, results), f"{config} {arms}", []
    about = {"config": config, "command": shlex.join(["python", *sys.argv]), "commit": git_commit(),
             "machine": hardware(), "versions": VERSIONS, "seeds": SEEDS[:seeds]}
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    measured = {name: {k: arm[k] for k in ("flags", "step", "peak_mb") if k in arm}
                for name, arm in kept.get(key, {}).get("arms", {}).items()}

    def note() -> dict:
        table = summary(found, runs, failed, measured)
        if save: # under another name first, so that the file is whole whenever this process dies
            part = path.with_suffix(".part")
            part.write_text(json.dumps({**kept, key: {**about, "arms": table}}, indent=1), encoding="utf-8")
            part.replace(path)
        return table

    for number in (signal.SIGINT, signal.SIGTERM): # so that the runs end too, from a script as well
        signal.signal(number, signal.default_int_handler)
    try:
        train_all(list(by_settings.values()), failed, note)
        for name, arm in found.items() if costs else ():
            ours, theirs = (next((run for run in runs[n].values() if run.points()), None)
                            for n in (name, arm["against"]))
            if not ours or not theirs or any(json.loads(run.asked)["sparse"] for run in (ours, theirs)):
                continue # this step would not choose weights, as a sparse run does
            measured[name] = {"flags": arm["flags"], "peak_mb": in_new_process(peak_memory, step_of, ours)}
            if ours != theirs:
                measured[name]["step"] = in_turn({"": step_of(theirs), name: step_of(ours)})[name][1:]
            note()
    finally: # after Ctrl-C too
        print(f"  {'arm':<22}{'loss':>8}  {'difference, 95 % interval':<40}{'verdict':<10}cost")
        for name, arm in (table := note()).items():
            effect, cost = cells(arm, table[arm["against"]])
            mean, verdict = arm.get("mean", math.nan), arm.get("verdict", "")
            print(f"  {name:<22}{mean:>8.4f}  {effect:<40}{verdict:<10}{cost}")
    for name, arm in table.items():
        if "mean" in arm:
            yield row(name, arm["mean"], "nats/token", digits=None)
    if failed:
        sys.exit(f"{len(failed)} of {len(by_settings)} runs failed; log.txt in their folders says why")


END = "<!-- end -->"
PLACES = {"<!-- ideas: python bench.py table -->\n": True, # the line before a table: whether it has all ideas
          "<!-- ideas that decide: python bench.py table -->\n": False} # or no tie without a claim


def ideas(kept: dict, every: bool = True) -> str:
    """The tables that ablate kept as one in Markdown, with a row for each arm that has an idea."""
    lines = ["| idea | flag | effect on val loss | cost | verdict |", "|---|---|---|---|---|"]
    for arms in (table["arms"] for table in kept.values()):
        for arm in (arm for arm in arms.values() if arm.get("idea")):
            effect, cost = cells(arm, arms[arm["against"]])
            effect += f", against {arm['against']}" * (arm["against"] != next(iter(arms)))
            flag, verdict = arm.get("flag", arm["flags"]), arm.get("verdict", "")
            if "holds" in arm:
                verdict += f"; the claim {arm['claim']} {'holds' if arm['holds'] else 'does not hold'}"
            if every or verdict != "tie":
                lines.append(f"| {arm['idea']} | `{flag}` | {effect} | {cost} | {verdict} |")
    return "\n".join(lines) + "\n"


def table(*files: str) -> Iterator[dict]:
    """Prints the ideas that ablate has measured as a table, or puts them between two comments in files."""
    if not Path(HERE, results).exists():
        raise UserError(f"there is no {results}\n"
                        "make it first: python bench.py ablate config/train_shakespeare_diffmla.py")
    with user_errors():
        kept = json.loads(Path(HERE, results).read_text(encoding="utf-8"))
        for path in map(Path, files):
            text = path.read_text(encoding="utf-8")
            head, begin, rest = text.partition(next((line for line in PLACES if line in text), "\0"))
            _, end, tail = rest.partition(END)
            if not end:
                raise UserError(f"{path} has no place for the table\n"
                                f"write two lines into it: {[*PLACES][0].strip()} and {END}")
            path.write_text(head + begin + ideas(kept, PLACES[begin]) + end + tail, encoding="utf-8")
    print("" if files else ideas(kept), end="")
    yield from ()


# --- the command line ---

SUITES = {"train": train, "decode": decode, "kv_cache": kv_cache, "optimizers": optimizers,
          "kernels": kernel_times, "residual": residual, "cross_entropy": cross_entropy}
BY_NAME = {"cache": cache, "speculative": speculative, "protocol": protocol, "uncertainty": uncertainty}
TAKE_WORDS = {"eval": evaluate, "compare": compare_runs, "ablate": ablate, "table": table}
# On a GPU these run, and take the place of those with the same name. Sizes: GPT-2's, or tiny ones (--dry).
FOR_GPU = {"kernels": kernel_times, "attention": gpu_attention, "cross_entropy": cross_entropy,
           "step": gpu_step, "decode": gpu_decode, "optimizers": optimizers}
GPU_SIZES = dict(batch_size=16, block_size=1024, n_embd=768, dtype="bfloat16,float32", rounds=50)
DRY_SIZES = dict(batch_size=1, block_size=64, n_embd=256, n_layer=1, rounds=1, save=False)


def keep(name: str, description: str, commit: str, results: list[dict]) -> None:
    """Puts the figures of a suite into bench_results/<device>.json; those of other suites stay."""
    path = Path(HERE, "bench_results", description.replace(",", "").replace(" ", "_") + ".json")
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept[name] = {"device": description, "commit": commit, "versions": VERSIONS, "rounds": rounds,
                  "shapes": {"train": [batch_size, block_size], "on a GPU": [n_layer, n_embd], **SHAPES},
                  "results": results}
    path.write_text(json.dumps(kept, indent=1), encoding="utf-8")


if __name__ == "__main__":
    known, words, flags = {**SUITES, **BY_NAME, **TAKE_WORDS, **FOR_GPU}, [], []
    for _before, _word in zip(sys.argv, sys.argv[1:]): # private names: a public text would be a setting
        _setting = globals().get(_before[2:].replace("-", "_")) if _before.startswith("--") else None
        _is_value = type(_setting) in (int, str) # of the setting before it, as in --rounds 3
        (flags if _is_value or _word.startswith("-") else words).append(_word)
    words, operands = (words[:1], words[1:]) if {*words[:1]} & {*TAKE_WORDS} else (words, [])
    if {"--help", "-h"} & {*sys.argv}:
        print(__doc__)
        for _when, _some in (("run without a name", SUITES), ("by name; they need runs", BY_NAME),
                             ("with words after it", TAKE_WORDS), ("on a GPU, or with --dry", FOR_GPU)):
            print(f"Suites, {_when}:")
            print("\n".join(f"  {k:<10} {f.__doc__[0].lower()}{f.__doc__[1:]}" for k, f in _some.items()))
    given = configure(globals(), argv=flags)
    with user_errors():
        device, _ = kernels.choose_device(device)
    on_gpu = "cuda" in device
    sizes_of = DRY_SIZES if dry else GPU_SIZES if on_gpu else {}
    globals().update({k: v for k, v in sizes_of.items() if k not in given})
    suites = known if on_gpu or dry else {**SUITES, **BY_NAME, **TAKE_WORDS}
    if unknown := [w for w in words if w not in suites]:
        needs = "needs a GPU, or --dry" if unknown[0] in known else "is not known"
        raise UserError(f"the suite {unknown[0]!r} {needs}; there is: {', '.join(suites)}")
    if min(rounds, batch_size, block_size, n_embd, n_layer) < 1:
        raise UserError("rounds, batch_size, block_size, n_embd and n_layer must be at least 1")
    if n_embd % (256 if on_gpu or dry else 64): # diff_form=v1 wants an even number of heads, of up to 128
        raise UserError(f"n_embd={n_embd} must be a multiple of 256, and on a CPU of 64")
    if strange := {*dtype.split(",")} - {"bfloat16", "float32"}:
        raise UserError(f"dtype={strange.pop()!r} is none of bfloat16, float32")
    torch._dynamo.config.fail_on_recompile_limit_hit = True # or eager code would be timed as compiled
    if on_gpu:
        torch.cuda.set_device(torch.device(device).index or 0) # events and graphs are of the current device
        torch.set_float32_matmul_precision("high") # TF32, as train.py has it
    description, commit = hardware(), git_commit() # now: the results themselves will change the checkout
    print(f"{description}, torch {torch.__version__}, {rounds} rounds")
    for name in words or (FOR_GPU if on_gpu or dry else SUITES):
        figures = []
        try:
            for figure in suites[name](*operands):
                figures.append(figure)
        finally: # what was measured before Ctrl-C or an error stays measured
            if save and figures and not operands:
                keep(f"{name}, {only}" if only else name, description, commit, figures)
        print(json.dumps({"suite": name, "device": description, "results": figures}))
