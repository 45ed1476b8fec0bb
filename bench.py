"""
Every speed and size that the README reports, as named suites.

  python bench.py                       all suites: a few minutes on 2 cores
  python bench.py train --rounds=21     one of them

  train      forward, backward and optimizer step of each attention choice, against mha of the same widths
  decode     tokens/s of one sequence at full context: with the cache, against reading the context again for every token
  kv_cache   bytes of the cache per token, as the tensors report them
  optimizers bytes of parameters, gradients and states as their storages report them, peak memory of a process that trains, time of
             the update against torch's fused AdamW, loss after equal steps; --large times the update at 97.5M parameters too
  sinkhorn   32,768 matrices of 4 x 4, 20 iterations, forward and backward: kernel, PyTorch's loop, torch.compile of it
  mhc        coefficients of 1,024 and 4,096 tokens, 4 streams of 384, forward and backward: kernel, PyTorch, torch.compile of it
  activations  forward, and forward and backward, of each name, plain and gated: kernel, eager PyTorch, torch.compile; GB/s beside a copy's
  residual   forward and backward of plain, hyper and mhc at width 384, 6 layers, what the graph keeps, peak memory of training
  cross_entropy  of a linear head, forward and backward, at V = 50,304 and 65: in chunks, against F.cross_entropy(F.linear); the memory
             that each adds to the peak of a process beyond the two gradients
  rope       rotation of 12 x 256 tokens with 12 heads of 64 and of 8 x 128 with 8 of 16, as attention gives them: eager, torch.compile
  depth      a step and a token of the run of --out_dir (train_shakespeare_depths.py) against all of its layers, on its own validation
             text: the time saved beside the operations that the tokens' mean depth saves
  extras     a training step and decoding with thought tokens, memory, future peek, drafts and uncertainty, each against without
  memory     what the run of --out_dir (train_recall.py) recalls from further back than attention sees, with its memory and without
  speculative  tokens/s of drafting and judging against plain cached decoding, on the trained model of --out_dir
  uncertainty  how well the largest probability (max p) and the head of --uncertainty know where the likeliest token is right, as they are
             and with the model's logits divided by a temperature T: calibration error, Brier, AUROC and a reliability table over the
             validation split of the trained model of --out_dir, less every tenth batch, on which T is fitted
  nanogpt    our step and our decoding against nanoGPT's own code: --nanogpt=path/to/nanoGPT, a clone of karpathy/nanoGPT

Without a name, all but those that need a run or a clone (depth, memory, speculative, uncertainty, nanogpt). Rules: same seed,
widths and data for all arms; every arm warmed up; the arms take turns, one
call each per round; the figure is the median over the rounds, the ratio the median of the ratios within a round (a busy
machine slows both sides).
The last line printed is JSON; bench_results/<device>.json keeps all figures with versions, shapes and commit.
"""
from configurator import UserError, configure, git_commit, user_errors # first: see stop_at_once there

import glob
import importlib.util
import json
import multiprocessing
import os
import platform
import runpy
import statistics
import sys
import time
from dataclasses import asdict
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

import data
import kernels
from kernels import choose_device
from model import GPT, GPTConfig, Linear, forward_flops, load_checkpoint
from optim import build_optimizer
from sample import Speculation, stream

rounds = 11 # turns of each arm
batch_size = 8 # sequences per step (train, uncertainty); half as many (residual); 64 times as many rows (cross_entropy)
block_size = 128 # tokens per sequence (train)
device = "auto" # auto | cpu | cuda
out_dir = "" # depth, memory, speculative, uncertainty: folder of a run of train.py; empty: where the suite's own config puts it
nanogpt = "" # folder of a clone of karpathy/nanoGPT, for the suite of that name
steps = 40 # optimizers: training steps before the loss is taken
compiled = True # sinkhorn, mhc, activations, rope: time torch.compile of the formulas too
large = False # optimizers: also at 97.5M parameters; takes 4 GB
save = True # write bench_results/<device>.json

ARMS = {"mha": {}, "mla": {"attention": "mla"}, "diff v1": {"attention": "diff", "diff_form": "v1"}, "diff v2": {"attention": "diff"},
        "diff_mla v1": {"attention": "diff_mla", "diff_form": "v1"}, "diff_mla v2": {"attention": "diff_mla"}}
SMALL = dict(vocab_size=65, n_layer=4, n_head=4, n_embd=128, qk_norm=True) # train_shakespeare_*
CHAR = dict(vocab_size=65, n_layer=6, n_head=6, n_embd=384, block_size=256) # nanoGPT's 10.65M character model

LLAMA = dict(vocab_size=4096, n_layer=6, n_head=8, n_kv_head=4, n_embd=384, block_size=256, activation="silu", glu=True,
             tie_embeddings=False)
LARGE = dict(vocab_size=16384, n_layer=12, n_head=12, n_embd=768, block_size=256) # 97.5M
RATES = {"adamw": (1e-3, 0.1), "fadam": (1e-3, 0.001), "adam_mini": (1e-3, 0.1), "muon": (4e-3, 0.1)} # tuned: README, Results

SHAPES = {"train model": SMALL, "decode, kv_cache and optimizers model": CHAR, "optimizers, Llama-shaped": LLAMA,
          "optimizers, large": LARGE}


def hardware():
    """(file name, description) of the device the figures come from, read from it."""
    if device == "cuda":
        return torch.cuda.get_device_name().replace(" ", "_"), torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            name = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), name)
    return f"{name}_{torch.get_num_threads()}_threads".replace(" ", "_"), f"{name}, {torch.get_num_threads()} threads"


def timed(f):
    """Seconds of one call, the device's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    f()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def in_turn(arms, warm=2):
    """{name: function} -> {name: (median seconds, median ratio to the first arm, lowest and highest ratio)}."""
    for f in arms.values():
        for _ in range(warm):
            f()
    times = {name: [] for name in arms}
    for _ in range(rounds):
        for name, f in arms.items():
            times[name].append(timed(f))
    base = next(iter(times.values()))
    ratios = {name: [t / b for t, b in zip(ts, base)] for name, ts in times.items()}
    return {name: (statistics.median(times[name]), statistics.median(r), min(r), max(r)) for name, r in ratios.items()}


def row(name, value, unit, baseline=None, ratio=None, low=None, high=None, digits=2):
    spread = f"   ({low:.2f} to {high:.2f})" if low is not None else ""
    print(f"  {name:<34}{value:>12,.{digits}f} {unit:<14}" + (f"{ratio:>8.2f} x {baseline}{spread}" if baseline else ""))
    return {"name": name, "value": value, "unit": unit, "baseline": baseline, "ratio": ratio}


def build(**config):
    torch.manual_seed(0)
    return GPT(GPTConfig(**config)).to(device)


def train():
    """Forward, backward and update timed apart, each in turn over the arms."""
    idx = torch.randint(65, (batch_size, block_size), device=device)
    print(f"train: 4 layers of 128, 4 heads, batch {batch_size} x {block_size}, fp32, eager")
    parts = {"forward": {}, "backward": {}, "update": {}, "step": {}}
    for name, choice in ARMS.items():
        model = build(**SMALL, block_size=block_size, **choice)
        opt = build_optimizer(model, "adamw", 1e-3, 0.1, (0.9, 0.99))

        def update(model=model, opt=opt):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()

        def step(model=model, opt=opt, update=update):
            model(idx, idx)[1]["ce"].backward()
            update()
            opt.zero_grad()

        graph = model(idx, idx)[1]["ce"] # backward is timed on one graph that is kept
        parts["forward"][name] = lambda model=model: model(idx, idx)
        parts["backward"][name] = lambda graph=graph: graph.backward(retain_graph=True)
        parts["update"][name] = update
        parts["step"][name] = step
    return [row(f"{name} {part}", 1e3 * median, "ms", "mha", ratio, low, high)
            for part, arms in parts.items() for name, (median, ratio, low, high) in in_turn(arms).items()]


def decode():
    """Greedy tokens after 200 tokens of context. Both sides bare: a forward and an argmax for each token."""
    print("decode: 6 layers of 384, 6 heads, context 200 to 216 of 256, batch 1, fp32, eager; baseline: mha without a cache")
    idx, new = torch.randint(65, (1, 200), device=device), 16
    arms = {"mha, no cache": rereading(build(**CHAR).eval(), idx, new)}
    plain = build(**CHAR).eval()
    for m in plain.modules():
        if isinstance(m, Linear):
            m.forward = partial(F.linear, weight=m.weight)
    arms["mha, F.linear for few_rows"] = continuing(plain, idx, new)
    for name, choice in ARMS.items():
        latent = dict(kv_rank=96, rope_dim=32) if "mla" in name else {}
        arms[name] = continuing(build(**CHAR, **choice, **latent).eval(), idx, new)
    return [row(name, new / median, "tokens/s", "mha, no cache", 1 / ratio, 1 / high, 1 / low)
            for name, (median, ratio, low, high) in in_turn(arms).items()]


def rereading(model, idx, new):
    @torch.no_grad()
    def write(tokens=idx):
        for _ in range(new):
            tokens = torch.cat([tokens, model(tokens)[0].argmax(-1)], dim=1)

    return write


def continuing(model, idx, new):
    """A function that writes `new` greedy tokens after a prompt that has been read: what tokens cost, without the prompt."""
    cache = model.new_cache(1)

    @torch.no_grad()
    def write():
        cache.truncate(min(cache.length, idx.size(1) - 1))
        token = idx[:, cache.length :] # the whole prompt the first time, its last token from then on
        for _ in range(new):
            token = model(token, cache=cache)[0][:, -1:].argmax(-1)

    return write


def against_nanogpt():
    """One training step at nanoGPT's CPU recipe, with its weights copied into ours; decoding at its 10.65M shape, context 240 to 256."""
    path = os.path.join(nanogpt, "model.py")
    if not nanogpt or not os.path.exists(path):
        raise UserError(f"nanogpt={nanogpt!r} holds no model.py\nclone github.com/karpathy/nanoGPT and give its folder: --nanogpt=path")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    theirs_module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = theirs_module
    spec.loader.exec_module(theirs_module)
    gpt2 = dict(norm="layernorm", position="learned", activation="gelu")
    recipe = dict(vocab_size=65, n_layer=4, n_head=4, n_embd=128, block_size=64)
    theirs, ours = theirs_module.GPT(theirs_module.GPTConfig(**recipe, dropout=0.0, bias=False)).to(device), build(**recipe, **gpt2)
    for p, q in zip(theirs.parameters(), ours.parameters()): # both declare them in the same order
        q.data.copy_(p)
    idx = torch.randint(65, (12, 64), device=device)
    print(f"nanogpt: largest difference of logits {(theirs(idx, idx)[0] - ours(idx, idx)[0]).abs().max().item():.1e}")
    optimizers = theirs.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device), build_optimizer(ours, "adamw", 1e-3, 0.1, (0.9, 0.99))

    def step(model, opt, loss):
        def run():
            loss(model(idx, idx)[1]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            opt.zero_grad(set_to_none=True)
        return run

    steps = in_turn({"nanoGPT step": step(theirs, optimizers[0], lambda x: x), "our step": step(ours, optimizers[1], lambda x: x["ce"])})
    big = theirs_module.GPT(theirs_module.GPTConfig(**CHAR, dropout=0.0, bias=False)).to(device).eval()
    context = torch.randint(65, (1, 240), device=device)
    arms = {"nanoGPT generate": lambda: big.generate(context, 16), "our generate": continuing(build(**CHAR, **gpt2).eval(), context, 16)}
    results = [row(name, 1e3 * median, "ms", "nanoGPT step", ratio, low, high) for name, (median, ratio, low, high) in steps.items()]
    return results + [row(name, 16 / median, "tokens/s", "nanoGPT generate", 1 / ratio, 1 / high, 1 / low)
                      for name, (median, ratio, low, high) in in_turn(arms).items()]


def optimizers():
    results = []
    for shape, config in (("ours", CHAR), ("Llama-shaped", LLAMA)):
        print(f"optimizers: {shape}, {build(**config).num_params():,} parameters")
        for name in RATES:
            for what, size in storages(*training(config, name)).items():
                results.append(row(f"{name} {what}", size / 1e6, "MB"))
            results.append(row(f"{name} peak", in_new_process(peak_memory, config, name) / 1e6, "MB"))
            results.append(row(f"{name} loss", loss_after(config, name), f"nats/byte, held out, after {steps} steps of 256"))
        results += update_times(shape, config)
    return results + (update_times("97.5M", LARGE, with_muon=False) if large else []) # Muon's takes 9 s there


def training(config, name):
    """A model and its optimizer after one step, with the gradients still there."""
    model = build(**config)
    opt = build_optimizer(model, name, *RATES[name], (0.9, 0.95))
    idx = torch.randint(65, (1, 64), device=device)
    model(idx, idx)[1]["ce"].backward()
    opt.step()
    return model, opt


def storages(model, opt):
    """Bytes of the storages behind each kind of tensor."""
    found = {"parameters": list(model.parameters()), "gradients": [p.grad for p in model.parameters()]}
    for state in opt.state.values():
        for key, value in state.items():
            if torch.is_tensor(value) and key != "step":
                found.setdefault(f"state {key}", []).append(value)
    return {k: sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in ts}.values()) for k, ts in found.items()}


def update_times(shape, config, with_muon=True):
    """Each against torch's fused AdamW, two models at a time, and FAdam against an eager one by other hands."""
    results = []
    for name, form in (("fadam", "auto"), ("fadam", "loop"), ("adam_mini", "auto"), ("adam_mini", "loop"), ("muon", None))[: 4 + with_muon]:
        (_, base), (_, opt) = training(config, "adamw"), training(config, name)
        opt.form = form
        label = f"{name}, {opt.form_of(opt.param_groups[0]['params'])}" if form else name
        median, ratio, low, high = in_turn({"adamw, fused": base.step, label: opt.step})[label]
        results.append(row(f"{shape}: {label} update", 1e3 * median, "ms", "adamw, fused", ratio, low, high))
    if importlib.util.find_spec("pytorch_optimizer") is None:
        print("  (with pytorch-optimizer installed, its FAdam would stand here too)")
        return results
    from pytorch_optimizer import FAdam
    (_, ours), (model, _) = training(config, "fadam"), training(config, "fadam")
    theirs = FAdam(model.parameters(), lr=1e-3, weight_decay=0.001, betas=(0.9, 0.95))
    median, ratio, low, high = in_turn({"fadam": ours.step, "pytorch-optimizer": theirs.step})["pytorch-optimizer"]
    return results + [row(f"{shape}: pytorch-optimizer's FAdam", 1e3 * median, "ms", "fadam here", ratio, low, high)]


def loss_after(config, name):
    """Loss on bytes that were not trained on; the text is this project's own Python files."""
    text = b"".join(open(f, "rb").read() for f in sorted(glob.glob(os.path.join(os.path.dirname(os.path.abspath(__file__)), "*.py"))))
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().to(device)
    split, generator = int(0.9 * len(ids)), torch.Generator().manual_seed(0)
    model = build(**{**config, "vocab_size": 256})
    opt = build_optimizer(model, name, *RATES[name], (0.9, 0.95))

    def batch(low, high, rows):
        starts = torch.randint(low, high - 65, (rows,), generator=generator).tolist()
        windows = torch.stack([ids[i : i + 65] for i in starts])
        return model(windows[:, :-1], windows[:, 1:])[1]["ce"]

    for step in range(steps):
        for group in opt.param_groups:
            group["lr"] = RATES[name][0] * min(1, (step + 1) / 10)
        opt.zero_grad()
        batch(0, split, 4).backward()
        opt.step()
    with torch.no_grad():
        return batch(split, len(ids), 64).item()


def peak_memory(config, name):
    """Bytes that three training steps add to the peak of a process with torch in it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = peak_of_process()
    model = build(**config)
    opt = build_optimizer(model, name, *RATES[name], (0.9, 0.95))
    idx = torch.randint(65, (8, 128), device=device)
    for _ in range(3):
        opt.zero_grad()
        model(idx, idx)[1]["ce"].backward()
        opt.step()
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return peak_of_process() - before


def peak_of_process():
    """Most bytes that lay in memory so far."""
    if os.path.exists("/proc/self/status"): # getrusage would count the process that started this one
        with open("/proc/self/status", encoding="utf-8") as f:
            return 1024 * next(int(line.split()[1]) for line in f if line.startswith("VmHWM"))
    import resource # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_new_process(f, *args):
    with multiprocessing.get_context("spawn").Pool(1, initializer=set_device, initargs=(device,)) as pool:
        return pool.apply(f, args)


def set_device(name):
    global device
    device = name


def upstream(f, *inputs):
    """A function that runs f forward and backward with a gradient drawn once; without it, in torch.compile, sums would be fused away."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = f(*inputs)
    g = [torch.randn_like(t) for t in ([y] if torch.is_tensor(y) else y)]
    return lambda: torch.autograd.grad(f(*inputs), inputs, g)


def three(eager, kernel, *inputs):
    """name -> function: eager PyTorch, torch.compile of it, and the kernel."""
    functions = {"eager": eager}
    if compiled:
        try:
            functions["torch.compile"] = torch.compile(eager)
            upstream(functions["torch.compile"], *inputs)()
        except Exception as error: # whatever a compiler that is not there raises
            print(f"  (torch.compile fails here: {str(error).splitlines()[0][:100]})")
            del functions["torch.compile"]
    return {**functions, kernels.path_for(inputs[0]): kernel}


def both_ways(functions, *inputs):
    return in_turn({name: upstream(f, *inputs) for name, f in functions.items()})


def sinkhorn():
    print("sinkhorn: 32,768 matrices of 4 x 4, 20 iterations, forward and backward, fp32")
    logits = torch.randn(32768, 4, 4, device=device)
    return [row(f"sinkhorn, {name}", 1e3 * median, "ms", "eager", ratio, low, high)
            for name, (median, ratio, low, high) in both_ways(three(kernels.sinkhorn_reference, kernels.sinkhorn, logits), logits).items()]


def mhc():
    print("mhc: the coefficients of 4 streams of 384, 20 iterations, forward and backward, fp32")
    phi, alpha, b = 0.02 * torch.randn(24, 1536, device=device), torch.ones(3, device=device), torch.randn(24, device=device)
    results = []
    for tokens in (1024, 4096):
        inputs = torch.randn(tokens, 4, 384, device=device), phi, alpha, b
        arms = both_ways(three(kernels.mhc_coefficients_reference, kernels.mhc_coefficients, *inputs), *inputs)
        results += [row(f"mhc of {tokens:,} tokens, {name}", 1e3 * median, "ms", "eager", ratio, low, high)
                    for name, (median, ratio, low, high) in arms.items()]
    return results


def activations():
    """Bytes: what has to be read and written once: 2 tensors forward (x, y) and 3 backward (x, g, g_x), of a gated one 3 and 5."""
    n = 2048 * 1536
    x, eps, results = torch.randn(2048, 1536, device=device), torch.tensor(0.01, device=device), []
    y = torch.empty_like(x)
    speed = 8 * n / in_turn({"copy": lambda: y.copy_(x)})["copy"][0] / 1e9
    print(f"activations: {n:,} numbers, fp32, forward, and forward and backward (both); a copy of as many moves {speed:.0f} GB/s")
    for name in kernels.ACTIVATIONS:
        more = [eps] * (name == "crrelu")
        for gating in (False, True):
            reference = (lambda x, *e: kernels.activation_reference(*x.chunk(2, dim=-1), name, *e or [None])) if gating else (
                lambda x, *e: kernels.activation_reference(x, None, name, *e or [None]))
            kernel = (lambda x, *e: kernels.gated_pair(x, name, *e)) if gating else (lambda x, *e: kernels.activate(x, name, *e))
            data = torch.cat([x, x.flip(0)], dim=-1) if gating else x
            functions, inputs = three(reference, kernel, data, *more), [t.detach().requires_grad_() for t in (data, *more)]
            forward = in_turn({path: partial(f, *inputs) for path, f in functions.items()})
            for part, tensors, times in (("forward", 2 + gating, forward), ("both", 8 if gating else 5, both_ways(functions, data, *more))):
                for path, (median, ratio, low, high) in times.items():
                    label = f"{'gated ' * gating}{name} {part}, {path}, {4 * n * tensors / median / 1e9:.0f} GB/s"
                    results.append(row(label, 1e3 * median, "ms", "eager", ratio, low, high))
    return results


def residual():
    print(f"residual: 6 layers of 384, 4 streams, batch {batch_size // 2} x 256, forward and backward, fp32, eager")
    idx, arms, kept, peaks = torch.randint(65, (max(1, batch_size // 2), 256), device=device), {}, {}, {}
    for name, choice in {"plain": {}, "hyper": {"residual": "hyper"}, "mhc": {"residual": "mhc"},
                         "mhc, permutations": {"residual": "mhc", "h_res": "permutations"}}.items():
        model, seen = build(**CHAR, **choice), {}

        def note(t, seen=seen):
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            graph = model(idx, idx)[1]["ce"] # alive until measured, or storages would be counted at one address
        kept[name] = sum(seen.values()) - sum(p.nbytes for p in model.parameters())
        peaks[name] = in_new_process(peak_memory, {**CHAR, **choice}, "adamw")
        del graph

        def step(model=model):
            model.zero_grad()
            model(idx, idx)[1]["ce"].backward()

        arms[name] = step
    results = [row(f"{name} step", 1e3 * median, "ms", "plain", ratio, low, high)
               for name, (median, ratio, low, high) in in_turn(arms).items()]
    results += [row(f"{name} kept for backward", size / 1e6, "MB", "plain", size / kept["plain"]) for name, size in kept.items()]
    return results + [row(f"{name} peak of a process", size / 1e6, "MB", "plain", size / peaks["plain"]) for name, size in peaks.items()]


def head_and_loss(name, rows, V, C):
    """A function that computes the loss and both gradients by the function of kernels.py that is named."""
    torch.manual_seed(0)
    x, w = torch.randn(rows, C, device=device).requires_grad_(), (0.05 * torch.randn(V, C, device=device)).requires_grad_()
    targets, f = torch.randint(V, (rows,), device=device), getattr(kernels, name)
    return lambda: torch.autograd.grad(f(x, w, targets), (x, w))


def peak_of_loss(name, rows, V, C):
    """Bytes that loss and gradients add to the peak, less the gradients, which both ways have to return."""
    warm = head_and_loss(name, 64, 512, C)
    warm() # threads, and what the libraries set up once
    f = head_and_loss(name, rows, V, C)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device == "cuda" else peak_of_process()
    gradients = f()
    after = torch.cuda.max_memory_allocated() if device == "cuda" else peak_of_process()
    return after - before - sum(g.nbytes for g in gradients)


def cross_entropy():
    print(f"cross_entropy: x W^T and its loss, {64 * batch_size} rows of 384 and 1,024 of 128, forward and backward, fp32, eager")
    results, names = [], {"F.cross_entropy(F.linear)": "linear_cross_entropy_reference", "linear_cross_entropy": "linear_cross_entropy"}
    large = 64 * batch_size, 50304, 384 # rows, vocabulary, channels
    for size, shape in (("V=50304", large), ("V=65", (1024, 65, 128))):
        arms = {f"{size}, {label}": head_and_loss(name, *shape) for label, name in names.items()}
        results += [row(label, 1e3 * median, "ms", "F.linear", ratio, low, high)
                    for label, (median, ratio, low, high) in in_turn(arms, warm=1).items()]
    peaks = {label: in_new_process(peak_of_loss, name, *large) for label, name in names.items()}
    base = next(iter(peaks.values()))
    return results + [row(f"V=50304, {label}, memory", peak / 1e6, "MB", "F.linear", peak / base) for label, peak in peaks.items()]


def rope():
    print("rope: rotation of a view with heads and tokens exchanged, forward and backward, fp32")
    results = []
    for B, T, heads, P in ((12, 256, 12, 64), (8, 128, 8, 16)):
        table, g = kernels.rope_table(torch.arange(T, device=device), P), torch.randn(B, heads, T, P, device=device)
        x = torch.randn(B, T, heads, P, device=device).transpose(1, 2).requires_grad_()
        arms = {"eager": kernels.rotate_reference} | ({"torch.compile": torch.compile(kernels.rotate_reference)} if compiled else {})
        arms |= {"triton": kernels.rotate} if device == "cuda" else {} # a CPU has no kernel of its own here
        arms = {name: (lambda f=f: torch.autograd.grad(f(x, table), x, g)) for name, f in arms.items()}
        results += [row(f"{B} x {T}, {heads} heads of {P}, {name}", 1e3 * median, "ms", "eager", ratio, low, high)
                    for name, (median, ratio, low, high) in in_turn(arms).items()]
    return results


def trained(command):
    """(path, model) of the run in out_dir, or of the one that `command` leaves behind. UserError with the command if there is none."""
    config = runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), command.split()[0]))
    path = os.path.join(out_dir or config["out_dir"], "best.pt")
    if not os.path.exists(path):
        raise UserError(f"there is no {path}\ntrain one first: python train.py {command}, or name the folder of a run: --out_dir=...")
    with user_errors():
        return path, GPT.from_checkpoint(path, device)


def text_of(path):
    """The dataset that the run of this checkpoint was trained on."""
    settings = load_checkpoint(path)["config"]["train"]
    return data.load(settings["dataset"], settings["data_dir"])


def depth():
    path, model = trained("config/train_shakespeare_depths.py")
    c = model.config
    if not c.depths:
        raise UserError(f"{path} has no depths\ntrain one that has: python train.py config/train_shakespeare_depths.py")
    with user_errors():
        x, y = (t.to(device) for t in text_of(path).val.batch(0, batch_size, c.block_size, 0))
    dense = {f"{n} layers": build(**{**asdict(c), "depths": (), "mean_depth": 0.0, "n_layer": n})
             for n in (c.n_layer, round(c.target_depth))}
    models, first, results = {**dense, "depths": model}, f"{c.n_layer} layers", []
    print(f"depth: {path}, {c.n_layer} layers of {c.n_embd}, depths={c.depths}; batch {batch_size} x {c.block_size}, "
          "tokens from half of that on; fp32, eager")

    def layers_taken(run, tokens):
        """The share of so many tokens that each layer computes in run(): padding left out."""
        counts = [0] * c.n_layer

        def count(m, args, i):
            real = args[1].real # (B, T'), None: all
            counts[i] += args[0].size(0) * args[0].size(1) if real is None else int(real.sum())

        hooks = [block.register_forward_pre_hook(partial(count, i=i)) for i, block in enumerate(model.blocks)]
        with torch.no_grad():
            run()
        for hook in hooks:
            hook.remove()
        return [n / tokens for n in counts]

    def report(what, arms, shares, S):
        for name, (median, ratio, low, high) in in_turn(arms).items():
            results.append(row(f"{name}, {what}", 1e3 * median, "ms", first, ratio, low, high))
            if name == "depths": # of the multiplications: those of a layer fall with its tokens, in attention with their square
                fixed, per_place = forward_flops(model.blocks, 0) / c.n_layer, forward_flops(model.blocks, S) / c.n_layer
                layers = sum(f * (fixed + f * (per_place - fixed)) for f in shares)
                saved = 100 * (1 - (layers + 2 * c.n_embd * c.vocab_size) / (c.n_layer * per_place + 2 * c.n_embd * c.vocab_size))
                results.extend([row("mean depth of these tokens", sum(shares), "layers"), row("operations saved", saved, "%"),
                                row("time saved", 100 * (1 - ratio), "%")])
                if saved > 0: # else every token took all layers
                    results.append(row("time saved / operations saved", 10000 * (1 - ratio) / saved, "%"))

    def step(m):
        return lambda: sum(m.train()(x, y)[1].values()).backward()

    half, new = c.block_size // 2, min(32, c.block_size // 2)

    def decoding(m):
        cache = m.new_cache(1)

        @torch.no_grad()
        def write(): # the text itself, token by token
            m.eval()
            if cache.length:
                cache.truncate(half)
            else:
                m.trunk(x[:1, :half], cache)
            for t in range(half, half + new):
                m.logits(m.trunk(x[:1, t : t + 1], cache))

        return write

    report("forward + backward", {name: step(m) for name, m in models.items()}, layers_taken(lambda: model(x), x.numel()), c.block_size)
    arms = {name: decoding(m) for name, m in models.items()}
    with torch.no_grad():
        arms["depths"]() # reads the first half
    report(f"{new} tokens", arms, layers_taken(arms["depths"], new), half + new // 2)
    return results


def memory():
    path, model = trained("config/train_recall.py")
    if model.memory is None:
        raise UserError(f"{path} has no memory\ntrain one that has: python train.py config/train_recall.py")
    with user_errors():
        corpus, L = text_of(path), model.block_size
    if corpus.name != "recall":
        raise UserError(f"{path} was trained on {corpus.name}, which asks nothing\ntrain on recall: python train.py config/train_recall.py")
    lines = torch.from_numpy(np.array(corpus.val.shards[0]).astype(np.int64))
    ends = (lines == corpus.tokenizer.encode("\n")[0]).nonzero()[:, 0]
    lines = torch.stack([lines[e + 1 : e + 1024] for e in ends[:-1]]) # (lines, 1023): pairs, then a full stop
    print(f"memory: {path}, windows of {L}, {len(lines)} lines of the validation split, each read as one text of {-(-1022 // L)} windows")
    asked = torch.zeros(len(lines), 1022, dtype=torch.bool) # where a letter's digit is to be said, last mentioned more than L tokens ago
    for b, line in enumerate(lines.tolist()):
        last = {}
        for t in range(0, 1022, 2):
            asked[b, t] = t - last.get(line[t], t) > L
            last[line[t]] = t
    whole = -(-1022 // L) * L
    idx = F.pad(lines, (0, whole - 1023)).to(device)

    @torch.no_grad()
    def recalled(ids):
        guess = torch.cat([model(some, some)[0].argmax(-1) for some in ids.split(16 * whole // ids.size(1))]).view(len(lines), whole).cpu()
        return (guess[:, :1022] == lines[:, 1:])[asked].double().mean().item()

    return [row(f"recall of {int(asked.sum()):,}, with memory", 100 * recalled(idx), "%"),
            row("each window by itself", 100 * recalled(idx.reshape(-1, L)), "%")]


def extras():
    knobs = [{}, {"thought_tokens": 4}, {"memory_slots": 16}, {"future_peek": 8}, {"n_ahead": 7}, {"uncertainty": True}]
    print(f"extras: 4 layers of 128, diff_mla, batch {batch_size} x {block_size}, fp32, eager; decoding at context {block_size // 2}")
    models = {", ".join(f"{k}={v}" for k, v in knob.items()) or "none": build(**SMALL, attention="diff_mla", block_size=block_size, **knob)
              for knob in knobs}
    idx = torch.randint(65, (batch_size, block_size), device=device)

    def step(model):
        opt = build_optimizer(model, "adamw", 1e-3, 0.1, (0.9, 0.99))

        def run():
            sum(model.train()(idx, idx, with_logits=False)[1].values()).backward()
            opt.step()
            opt.zero_grad()

        return run

    steps = in_turn({name: step(m) for name, m in models.items()})
    results = [row(f"{name}, step", 1e3 * s, "ms", "none", *ratios) for name, (s, *ratios) in steps.items()]
    writers = {name: continuing(m.eval(), idx[:1, : block_size // 2], 16) for name, m in models.items()}
    return results + [row(f"{name}, decoding", 16 / s, "tokens/s", "none", 1 / ratio, 1 / high, 1 / low)
                      for name, (s, ratio, low, high) in in_turn(writers).items()]


def speculative():
    path, model = trained("config/train_shakespeare_diffmla.py")
    prompt, results = torch.zeros(1, 1, dtype=torch.long, device=device), []
    print(f"speculative: {path}, 256 tokens after a prompt of one, batch 1, fp32, eager")
    for temperature in (1.0, 0.8, 0.0):
        writers = {name: [] for name in ["auto", *["ahead"] * ("ahead" in model.extras), "ngram"]}

        def plain():
            for _ in stream(model, prompt, 256, temperature, generator=torch.Generator(device).manual_seed(len(writers["auto"]))):
                pass

        def drafting(name):
            seed = torch.Generator(device).manual_seed(len(writers[name]))
            writers[name].append(Speculation(model, prompt, temperature, generator=seed, draft=name))
            writers[name][-1].generate(256)

        arms = {"plain": plain, **{name: partial(drafting, name) for name in writers}}
        for name, (median, ratio, low, high) in in_turn(arms).items():
            results.append(row(f"{name}, temperature {temperature}", 256 / median, "tokens/s", "plain", 1 / ratio, 1 / high, 1 / low))
        for name, done in writers.items():
            if done:
                tokens, forwards, kept, drafted = (sum(getattr(w, k) for w in done) for k in ("tokens", "forwards", "kept", "drafted"))
                results.append(row(f"{name}, {kept / max(1, drafted):.0%} of drafts kept", tokens / forwards, "tokens/forward"))
    return results


def fit_temperature(logits, targets):
    """
    The T in [0.001, 1000] at which softmax(logits / T) has the lowest mean cross-entropy: logits (n, V), targets (n,). Guo et al.
    2017, arXiv:1706.04599. That loss is convex in 1/T, with slope E[z] - z_target, so halving the range of log T finds it.
    """
    z, low, high = logits.double(), 1e-3, 1e3
    of_target = z.gather(1, targets[:, None]).mean()
    for _ in range(50):
        T = (low * high) ** 0.5
        too_sure = ((z / T).softmax(-1) * z).sum(-1).mean() > of_target
        low, high = (T, high) if too_sure else (low, T)
    return T


def reliability(p, right, equal_mass=False, bins=15):
    """[(n, mean p, share right)] of the bins that hold any: of equal width, or of equally many. p, right (n,); right is bool."""
    order, counts = p.argsort(stable=True), torch.bincount((p * bins).long().clamp(max=bins - 1), minlength=bins)
    parts = order.tensor_split(bins) if equal_mass else order.split(counts.tolist())
    return [(len(part), p[part].mean().item(), right[part].double().mean().item()) for part in parts if len(part)]


def calibration_error(p, right, equal_mass=False, bins=15):
    """ECE: the mean over all n of |share right - mean p| of the bin that each is in. Naeini et al. 2015; Guo et al. 2017."""
    return sum(n * abs(share - mean) for n, mean, share in reliability(p, right, equal_mass, bins)) / len(p)


def auroc(p, right):
    """The probability that one that is right has a larger p than one that is not, ties counted half. nan if all are alike."""
    _, which, counts = p.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[which] # of equal p, their mean
    n = right.sum().double()
    return ((ranks[right].sum() - n * (n + 1) / 2) / (n * (len(p) - n))).item()


@torch.no_grad()
def read(model, split):
    """Yields (h (n, C), logits (n, V), targets (n,)) of the whole split in batches, on the CPU."""
    for x, y in split.windows(model.block_size, batch_size):
        h = model.trunk(x.to(device))
        yield h.flatten(0, 1).cpu(), model.logits(h).flatten(0, 1).cpu(), y.flatten()


def uncertainty():
    path, model = trained("config/train_shakespeare_diffmla.py --uncertainty")
    with user_errors():
        model.uncertainty(model.embed.weight[:1]) # refuses where there is no head
        corpus = text_of(path)
        batches = list(read(model, corpus.val))
    # every tenth batch: a tenth of the text at its front is easier than the rest, and has another temperature
    held, rest = batches[::10], [batch for i, batch in enumerate(batches) if i % 10]
    if not rest:
        raise UserError(f"{corpus.name} has too little validation text to fit a temperature on a part of it\nlower --batch_size")
    (_, logits, targets), (h, others, wanted) = (map(torch.cat, zip(*part)) for part in (held, rest))
    T, right, others, score = fit_temperature(logits, targets), others.argmax(-1) == wanted, others.double(), model.cpu().uncertainty
    print(f"uncertainty: {path}, {len(right):,} targets of the validation split; the temperature T from the other {len(targets):,}")
    show = partial(row, digits=4)
    results = [show("accuracy", right.double().mean().item(), "right"), show("T", T, "")]
    for name, p in {"max p": others.softmax(-1).amax(-1), "max p at T": (others / T).softmax(-1).amax(-1),
                    "head": 1 - score(h, others), "head at T": 1 - score(h, others / T)}.items(): # of being right
        results += [show(f"{name}, ECE", calibration_error(p, right), "15 bins of equal width"),
                    show(f"{name}, ECE, equal mass", calibration_error(p, right, equal_mass=True), "15 bins of equal mass"),
                    show(f"{name}, Brier", (p - right.double()).square().mean().item(), ""), show(f"{name}, AUROC", auroc(p, right), "")]
        results += [show(f"{name}, {n:,} said {mean:.3f}", share, "right") for n, mean, share in reliability(p, right)]
    return results


def kv_cache():
    print("kv_cache: 6 layers, 6 heads of 64, latent 96 with a rotary key of 32, fp32")
    results = []
    for name, choice in ARMS.items():
        cache = build(**CHAR, **choice, **(dict(kv_rank=96, rope_dim=32) if "mla" in name else {})).new_cache(1)
        per_token = cache.nbytes() / cache.capacity
        base = results[0]["value"] if results else per_token
        results.append(row(name, per_token, "bytes/token", "mha", per_token / base))
    return results


SUITES = {"train": train, "decode": decode, "kv_cache": kv_cache, "optimizers": optimizers, "sinkhorn": sinkhorn, "mhc": mhc,
          "activations": activations, "residual": residual, "cross_entropy": cross_entropy, "rope": rope, "extras": extras, "depth": depth,
          "memory": memory,
          "speculative": speculative, "uncertainty": uncertainty, "nanogpt": against_nanogpt}
NEED_MORE = {"depth", "memory", "speculative", "uncertainty", "nanogpt"} # than this repository holds


def keep(file, name, description, commit, results):
    """Figures of this suite into the device's file; those of other suites stay."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "bench_results", f"{file}.json")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    kept = json.load(open(path, encoding="utf-8")) if os.path.exists(path) else {}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    kept[name] = {"device": description, "commit": commit, "versions": versions,
                  "rounds": rounds, "shapes": {"train": [batch_size, block_size], **SHAPES}, "results": results}
    with open(path, "w", encoding="utf-8") as f:
        json.dump(kept, f, indent=1)


if __name__ == "__main__":
    # suites, then options; private names, because a public number would be a setting
    _first = next((i for i, a in enumerate(sys.argv) if a.startswith("-")), len(sys.argv))
    words = sys.argv[1:_first] + [a for a in sys.argv[_first:] if a in SUITES]
    if {"--help", "-h"} & {*sys.argv}:
        print(__doc__)
    configure(globals(), argv=[a for a in sys.argv[_first:] if a not in SUITES])
    if unknown := [w for w in words if w not in SUITES]:
        raise UserError(f"no suite {unknown[0]!r}; there is: {', '.join(SUITES)}")
    with user_errors():
        device, _ = choose_device(device)
    if min(rounds, batch_size, block_size, steps) < 1:
        raise UserError("rounds, batch_size, block_size and steps must be at least 1")
    (file, description), commit = hardware(), git_commit() # now: the results themselves will make the checkout dirty
    print(f"{description}, torch {torch.__version__}, {rounds} rounds")
    for name in words or [name for name in SUITES if name not in NEED_MORE]:
        results = SUITES[name]()
        if save:
            keep(file, name, description, commit, results)
        print(json.dumps({"suite": name, "device": description, "results": results}))
