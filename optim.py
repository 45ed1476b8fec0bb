"""
Optimizers: AdamW (torch's fused one), FAdam, Adam-mini and Muon, and how a model's parameters are dealt out to them.

Each module of model.py declares what its parameters are; build_optimizer never looks at a name.

  python optim.py config/train_shakespeare_diffmla.py --vocab_size=65      prints what each parameter is to each optimizer

  role        who                                 weight decay   with Muon
  matrix      Linear weights inside the blocks    yes            orthogonalised momentum
  embedding   Embedding rows (and a tied head)    yes            AdamW
  head        an untied head                      yes            AdamW
  gate        a few rows that make coefficients   yes            AdamW
  vector      norm gains, biases, lambdas         no             AdamW

All four are ordinary torch.optim.Optimizers: parameter groups, closures, state_dict. None of them reads a value from the
device in step(). FAdam and Adam-mini stand here twice: as a loop of plain PyTorch, and as C for the CPU.
"""
import configurator # first: see stop_at_once there

import functools
import inspect
import itertools
import os
import runpy
from collections import Counter
from typing import NamedTuple

import torch
from torch.optim.adamw import adamw

from kernels import c_library, floats, integers, pointers, threads

OPTIMIZERS = ("adamw", "fadam", "adam_mini", "muon")


class Declared(NamedTuple):
    """What a parameter is; model.py explains the words."""

    role: str
    fused: tuple # rows of the matrices stacked in it
    blocks: object # None: each row a block; (): one block; else the rows of each block
    detached: bool # it learns beside the model, from detached numbers, and must leave the model alone


def declarations(model):
    """{parameter: Declared} for every trained parameter, a shared one once. TypeError if a module declares no role."""
    apart = {p for module in model.modules() if getattr(module, "detached", False) for p in module.parameters()}
    found = {}
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            if not hasattr(module, "role"):
                raise TypeError(f"{type(module).__name__} ({name}) owns parameters but declares no role; add `role = ...` to the class")
            if p.dim() < 2 or module.role == "vector": # a bias is a vector whatever its matrix is
                found.setdefault(p, Declared("vector", (), (), p in apart))
            else:
                fused, blocks = getattr(module, "fused", (len(p),)), getattr(module, "blocks", None)
                found.setdefault(p, Declared(module.role, fused, blocks, p in apart))
    return {p: d for p, d in found.items() if p.requires_grad}


def build_optimizer(model, name, learning_rate, weight_decay, betas):
    """
    A torch.optim.Optimizer over all parameters of the model. name: adamw | fadam | adam_mini | muon. betas: (beta1, beta2);
    Muon takes beta1 as its AdamW's and keeps its own momentum of 0.95. ValueError for an unknown name.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer={name!r} is not known; choose one of: {', '.join(OPTIMIZERS)}")
    groups = {} # parameters that are treated alike
    for p, d in declarations(model).items():
        kind = {"weight_decay": 0.0 if d.role == "vector" else weight_decay}
        if name == "adam_mini":
            kind["blocks"] = d.blocks
        if name == "muon":
            kind["fused"] = d.fused if d.role == "matrix" else ()
        groups.setdefault(tuple(kind.items()), []).append(p)
    groups = [{"params": params, **dict(kind)} for kind, params in groups.items()]
    if name != "adamw":
        return {"fadam": FAdam, "adam_mini": AdamMini, "muon": Muon}[name](groups, lr=learning_rate, betas=betas)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=has_fused(next(model.parameters())))


def partition(model):
    """Prints what each parameter is to each optimizer: the declarations, and the blocks that Adam-mini makes of them."""
    names, total = {p: n for n, p in model.named_parameters()}, 0

    def sums(counts):
        return " + ".join(f"{n:,} x {what}" for what, n in counts.items())

    print(f"{'parameter':<42}{'shape':<15}{'role':<11}{'decay':<7}{'Muon, matrices':<34}Adam-mini, blocks x weights")
    for p, d in declarations(model).items():
        layout = runs(d.blocks, len(p), p[:1].numel())
        total += sum(count for _, _, count, _ in layout)
        if names[p].startswith("blocks.") and not names[p].startswith("blocks.0."):
            continue # the other blocks are like the first
        matrices, blocks = Counter((n, p.size(1)) for n in d.fused) if d.role == "matrix" else {}, Counter()
        for _, _, count, size in layout:
            blocks[f"{size:,}"] += count
        print(f"{names[p]:<42}{str(tuple(p.shape)):<15}{d.role:<11}{'no' if d.role == 'vector' else 'yes':<7}"
              f"{sums(matrices) or 'AdamW':<34}{sums(blocks)}")
    count = sum(p.numel() for p in names)
    print(f"\n{count:,} parameters, {total:,} blocks: Adam-mini's second moments are {total / count:.2%} of AdamW's")


def has_fused(p):
    """Whether torch has AdamW as one kernel there: 5x the unfused loop on a CPU."""
    return p.device.type in ("cuda", "cpu")


class Base(torch.optim.Optimizer):
    """
    What the three share: the closure, the loading of state, and the form of the update.

    form="loop" is one tensor after the other in plain PyTorch: it says what the others compute. "c" walks through memory once
    or twice, in C, for contiguous fp32 parameters on a CPU. "compile" is torch.compile of the loop. "auto" takes "c" or
    "compile" (on CUDA) where it can; a form that was named and cannot be had is an error.
    """

    FP32 = set() # state that is fp32 whatever the parameter is

    def __init__(self, params, defaults, form):
        if form not in ("auto", "loop", "c", "compile"):
            raise ValueError(f"form={form!r} is not one of: auto, loop, c, compile")
        super().__init__(params, defaults)
        self.form, self.faster = form, None

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self.update(params, [p.grad for p in params], group)
        return loss

    def form_of(self, params):
        if self.form in ("loop", "compile"):
            return self.form
        plain = all(p.dtype == torch.float32 and p.is_cpu and p.is_contiguous() for p in params)
        if plain and c_library() is not None:
            return "c"
        if self.form == "c":
            raise RuntimeError("form='c' needs contiguous fp32 parameters on a CPU, and a C compiler; use form='auto'")
        return "compile" if params[0].is_cuda else "loop"

    def call(self, form, tensors, scalars, **constants):
        """The loop, or its compiled form, for which what changes at each step must be a tensor: numbers are compiled in."""
        if form == "compile":
            self.faster = self.faster or torch.compile(self.loop, dynamic=False)
            return self.faster(*tensors, torch.tensor(scalars, device=tensors[0][0].device), **constants)
        return self.loop(*tensors, scalars, **constants)

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"]): # torch casts all of it to the parameter's dtype
            for p, i in zip(group["params"], saved["params"]):
                for key in self.FP32 & state_dict["state"].get(i, {}).keys():
                    self.state[p][key] = state_dict["state"][i][key].to(p.device, torch.float32, copy=True)


def check_sizes(p, *numbers):
    """C would write past the end of a state that was loaded from another model's."""
    if any(n != p.numel() for n in numbers):
        raise ValueError(f"the state of a parameter of shape {tuple(p.shape)} is that of another; load the state_dict of the same model")


def rms(x):
    return x.square().mean().sqrt()


class FAdam(Base):
    """
    Hwang 2024, arXiv:2405.12807, algorithm 1: Adam as natural gradient with a diagonal Fisher matrix. The numbers are the
    algorithm's lines. Unlike Adam the momentum is of the natural gradient, and weight decay is preconditioned too: it is
    lr * weight_decay per weight of typical size whatever the weights' own scale, so 0.001 is much. fp32 state.
    """

    FP32 = {"m", "f"}

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0, eps=1e-8, eps2=0.01, p=0.5, clip=1.0, form="auto"):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay, eps=eps, eps2=eps2, p=p, clip=clip), form)

    def update(self, params, grads, group):
        (beta1, beta2), states = group["betas"], [self.state[p] for p in params]
        for p, s in zip(params, states):
            if "m" not in s:
                s["step"], s["m"], s["f"] = 0, torch.zeros_like(p, dtype=torch.float32), torch.zeros_like(p, dtype=torch.float32)
            check_sizes(p, s["m"].numel(), s["f"].numel())
            s["step"] += 1 # on the host: nothing waits for the device
        ms, fs, grads = [s["m"] for s in states], [s["f"] for s in states], [g.contiguous() for g in grads]
        beta2s = [beta2 * (1 - beta2 ** (s["step"] - 1)) / (1 - beta2 ** s["step"]) for s in states] # 6: 0 at first, whatever f was
        scalars = [group["lr"], group["weight_decay"], *beta2s]
        form = self.form_of(params) if group["p"] == 0.5 else "loop"
        if form != "c":
            return self.call(form, (params, grads, ms, fs), scalars, beta1=beta1, **{k: group[k] for k in ("eps", "eps2", "p", "clip")})
        c_library().fadam(
            threads(), len(params), pointers(params), pointers(grads), pointers(ms), pointers(fs),
            integers([p.numel() for p in params]), floats([1 - b for b in beta2s]),
            floats([1 - beta1, group["lr"], group["weight_decay"], group["eps"], group["eps2"], group["clip"]]))

    @staticmethod
    def loop(params, grads, ms, fs, scalars, beta1, eps, eps2, p, clip):
        lr, weight_decay, *beta2s = scalars
        for theta, g, m, f, beta2 in zip(params, grads, ms, fs, beta2s):
            g = g.float()
            f.lerp_(g.square(), 1 - beta2) # 7: Fisher information
            size = eps2 * rms(g)
            eps_t = torch.where(size > 0, size.clamp(max=eps), eps) # 8: adaptive epsilon; a zero gradient must not give 0/0
            root = f**p + eps_t ** (2 * p)
            natural = g / root # 9: natural gradient
            natural = natural / (rms(natural) / clip).clamp(min=1) # 10: clipped to an RMS of `clip`
            m.lerp_(natural, 1 - beta1) # 11: momentum, not corrected for its start
            decay = theta.float() / root # 12: weight decay, natural
            decay = decay / (rms(decay) / clip).clamp(min=1) # 13: and clipped
            theta.sub_((lr * (m + weight_decay * decay)).to(theta.dtype)) # 14


@functools.cache
def runs(blocks, rows, width):
    """
    What Adam-mini's blocks are, as runs of equal ones: ((first row, first block, number of blocks, weights in each), ...) for
    a parameter of that many rows of that width. blocks: None, (), or the rows of each block, as in Declared.
    """
    if blocks == ():
        return ((0, 0, 1, rows * width),)
    if blocks is None:
        return ((0, 0, rows, width),)
    if sum(blocks) != rows:
        raise ValueError(f"blocks of {sum(blocks)} rows do not cover a parameter of {rows} rows")
    found, row, block = [], 0, 0
    for height, same in itertools.groupby(blocks):
        count = len(list(same))
        found.append((row, block, count, height * width))
        row, block = row + count * height, block + count
    return tuple(found)


class AdamMini(Base):
    """
    Zhang et al. 2024, arXiv:2406.16793: AdamW with one second moment per block of weights whose curvature is alike: a head
    of queries or keys, a row of anything else. Groups carry `blocks` (None: rows; (): the tensor; or the rows of each
    block). m in the parameter's dtype, v in fp32. Parameters must be contiguous.
    """

    FP32 = {"v"}

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0, eps=1e-8, blocks=None, form="auto"):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay, eps=eps, blocks=blocks), form)

    def update(self, params, grads, group):
        (beta1, beta2), tensors, pieces, per_piece = group["betas"], [], [], []
        for p, g in zip(params, grads):
            state, width = self.state[p], p[:1].numel()
            layout = runs(group["blocks"], len(p), width)
            if "m" not in state:
                state["step"], state["m"], state["v"] = 0, torch.zeros_like(p), torch.zeros(sum(r[2] for r in layout), device=p.device)
            check_sizes(p, state["m"].numel(), p.numel() + len(state["v"]) - layout[-1][1] - layout[-1][2])
            t = state["step"] = state["step"] + 1
            for row, block, count, size in layout:
                tensors.append((p, g.contiguous(), state["m"], state["v"]))
                pieces.append((row * width, block, count, size))
                per_piece += group["lr"] / (1 - beta1**t), 1 - beta2**t # size of the step, correction of v
        keep, form = 1 - group["lr"] * group["weight_decay"], self.form_of(params)
        starts, blocks, counts, sizes = zip(*pieces)
        if form != "c":
            views = [[(x.view(-1)[a : a + n * w].view(n, w) if x is not v else v[b : b + n]) for x in (p, g, m, v)]
                     for (p, g, m, v), (a, b, n, w) in zip(tensors, pieces)]
            return self.call(form, tuple(map(list, zip(*views))), [keep, *per_piece], beta1=beta1, beta2=beta2, eps=group["eps"])
        ps, gs, ms, vs = zip(*tensors)
        c_library().adam_mini(
            threads(), len(pieces), pointers(ps, starts), pointers(gs, starts), pointers(ms, starts), pointers(vs, blocks),
            integers(counts), integers(sizes), floats(per_piece), floats([1 - beta1, 1 - beta2, group["eps"], keep]))

    @staticmethod
    def loop(params, grads, ms, vs, scalars, beta1, beta2, eps):
        """params, grads, ms: (blocks, weights in each); vs: (blocks,)."""
        keep, *scalars = scalars
        for p, g, m, v, lr, correction in zip(params, grads, ms, vs, scalars[::2], scalars[1::2]):
            v.lerp_(g.float().square().mean(1), 1 - beta2)
            m.lerp_(g, 1 - beta1)
            scale = lr / ((v / correction).sqrt() + eps)
            p.mul_(keep).sub_(scale.to(p.dtype)[:, None] * m)


# Newton-Schulz steps x <- a x + (b x x^T + c (x x^T)^2) x, one row (a, b, c) for each step. They drive all singular values
# towards 1. The first set is Keller Jordan's (2024); Polar Express (Amsel et al. 2025, arXiv:2505.16932) gets closer.
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551569301323),
)


def orthogonalise(matrices, steps=POLAR_EXPRESS):
    """(..., n, m) -> about U V^T of each matrix's singular value decomposition U S V^T. bf16 on a GPU, fp32 on a CPU."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x # the smaller square
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7) # both sets of steps bear a norm that is 2% too small
    for a, b, c in steps:
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).type_as(matrices)


class Muon(Base):
    """
    Jordan 2024: momentum, orthogonalised, for the matrices inside the blocks; AdamW for everything else. Groups carry
    `fused`, the rows of the matrices stacked in each parameter, or () for AdamW. The update of a matrix (n, m) is scaled by
    0.2 sqrt(max(n, m)), which gives it the RMS of AdamW's (Liu et al. 2025, arXiv:2502.16982): one learning rate serves both.
    Matrices of one shape share their matrix products; AdamW is torch's, fused where torch has that.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, eps=1e-8, momentum=0.95, steps=POLAR_EXPRESS, fused=()):
        adam = dict(lr=lr, betas=betas, weight_decay=weight_decay, eps=eps)
        super().__init__(params, dict(**adam, momentum=momentum, steps=steps, fused=fused), "loop")

    def update(self, params, grads, group):
        (self.loop if group["fused"] else self.adamw)(params, grads, group)

    def loop(self, params, grads, group):
        momentum, fused, updates = group["momentum"], group["fused"], []
        for p, g in zip(params, grads):
            state = self.state[p]
            if "m" not in state:
                state["m"] = torch.zeros_like(p)
            state["m"].lerp_(g, 1 - momentum)
            updates.append(g.lerp(state["m"], momentum)) # Nesterov
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        alike = {} # parts of one shape, from all parameters, in one batched iteration
        for p, u in zip(params, updates):
            for part, piece in zip(p.split(fused), u.split(fused)):
                alike.setdefault(part.shape, []).append((part, piece))
        for (n, m), pairs in alike.items():
            parts, pieces = zip(*pairs)
            ortho = orthogonalise(torch.stack(pieces), group["steps"])
            torch._foreach_add_(parts, ortho.unbind(), alpha=-group["lr"] * 0.2 * max(n, m) ** 0.5)

    def adamw(self, params, grads, group):
        states, (beta1, beta2) = [self.state[p] for p in params], group["betas"]
        for p, s in zip(params, states):
            if "m" not in s:
                s["step"], s["m"], s["v"] = torch.zeros((), device=p.device), torch.zeros_like(p), torch.zeros_like(p)
        adamw(params, grads, *([s[k] for s in states] for k in "mv"), [], [s["step"] for s in states], amsgrad=False, maximize=False,
              fused=has_fused(params[0]), beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"])


class Sparse:
    """
    Training with ever more of the weights at zero: those of the matrices and of an untied head, counted and chosen over all of
    them together. Every `interval` steps of the learning rate's constant phase (`phase`: first step, last step) the weights
    are chosen anew, until the share of `density` is left; from then on only which ones they are changes.

    skeleton_flesh (The Kepler Architecture, Skeleton & Flesh): of the active weights the share `prune_rate` with the lowest
    signal to noise goes, |mean| / std over the steps since the last choice. Half as many of all inactive ones grow back from
    zero, where the gradient of the next batch is largest, and for boost_steps what the optimizer does to those is multiplied
    by `boost`. magnitude, the baseline: the smallest go, none grows back, as many are left each time.

    A call of choose(step) before the gradient, mask_gradients() after it, finish(step) after the optimizer's step. Gradients
    and moments of inactive weights are zero, so a weight that grows back starts with none.
    """

    METHODS = ("skeleton_flesh", "magnitude")

    def __init__(self, model, optimizer, method, density, interval, phase, prune_rate=0.3, boost=1.0, boost_steps=0):
        for bad, sentence in [
            (method not in self.METHODS, f"sparse={method!r} is not one of: {', '.join(self.METHODS)}"),
            (not 0 < density <= 1, f"sparse_density={density} must be above 0 and at most 1"),
            (not 0 < prune_rate < 1, f"sparse_prune_rate={prune_rate} must be between 0 and 1"),
            (interval < 1 or boost_steps < 0, "sparse_interval must be at least 1 and sparse_boost_steps not negative"),
            (boost < 0, f"sparse_boost={boost} must not be negative"),
        ]:
            if bad:
                raise ValueError(sentence)
        self.params = [p for p, d in declarations(model).items() if d.role in ("matrix", "head") and not d.detached]
        self.optimizer, self.method, self.interval, self.phase, self.prune_rate = optimizer, method, interval, phase, prune_rate
        self.boost, self.boost_steps = boost, boost_steps
        self.total = sum(p.numel() for p in self.params)
        self.target = round(density * self.total)
        self.masks = [torch.ones_like(p, dtype=torch.bool) for p in self.params]
        self.to_grow, self.flesh, self.grown_at = 0, [], 0 # flesh: flat indices of the young weights, per parameter
        self.steps = 0 # since the last choice, and over them:
        self.means, self.squares = ([torch.zeros_like(p) for p in self.params] if method == "skeleton_flesh" else [] for _ in "ms")
        self.before = [] # values of the flesh before the optimizer's step
        active, needed = self.total, 0
        while active > self.target:
            active, needed = self.next_count(active), needed + 1
        room = max(0, phase[1] - phase[0] - 1) # steps at which a choice can be due
        if needed > room // interval:
            raise ValueError(f"sparse_density={density} takes {needed} choices; steps {phase[0]} to {phase[1]}, where the learning rate is "
                             f"constant, have room for {room // interval}\nuse a longer run"
                             + f", or --sparse_interval={room // needed} or less" * (room >= needed))

    def next_count(self, active):
        """Weights left by a choice: prune_rate go, half of them grow back, or more where that would end below the target."""
        pruned = max(1, round(self.prune_rate * active))
        return active - pruned + max(self.target - (active - pruned), pruned // 2)

    def active(self):
        return sum(int(m.sum()) for m in self.masks) # int64: in bf16 the sum would be off by 0.3%

    def density(self):
        return self.active() / self.total

    @property
    def reached(self):
        return self.active() == self.target

    @torch.no_grad()
    def choose(self, step):
        """True if weights were pruned at this step. Growing waits for the gradient."""
        first, last = self.phase
        if not first < step < last or (step - first) % self.interval or self.target == self.total: # density 1: dense training
            return False
        active, left = self.active(), self.next_count(self.active())
        if self.method == "skeleton_flesh":
            pruned = max(1, round(self.prune_rate * active))
            noise = [(s / max(1, self.steps)).add_(1e-8).sqrt_() for s in self.squares]
            scores = [m.abs() / n for m, n in zip(self.means, noise)]
        else:
            pruned, scores = active - left, [p.abs() for p in self.params]
        self.set(self.lowest([s.masked_fill(~m, torch.inf) for s, m in zip(scores, self.masks)], pruned), False)
        self.to_grow, self.steps = left - (active - pruned), 0
        for x in (*self.means, *self.squares):
            x.zero_()
        for p, m in zip(self.params, self.masks):
            p.mul_(m)
            for value in self.optimizer.state[p].values(): # the moments; a second moment that a block shares stays
                if torch.is_tensor(value) and value.shape == p.shape:
                    value.mul_(m)
        return True

    def lowest(self, scores, k):
        """Flat indices per parameter of the k lowest over all: exactly k, also where scores are equal."""
        where = torch.cat([s.flatten() for s in scores]).topk(k, largest=False, sorted=False).indices.sort().values
        ends = torch.tensor([s.numel() for s in scores]).cumsum(0)
        parts = torch.searchsorted(where, ends.to(where.device)).tolist()
        return [where[a:b] - (end - s.numel()) for a, b, end, s in zip([0, *parts], parts, ends.tolist(), scores)]

    def set(self, indices, value):
        for m, i in zip(self.masks, indices):
            m.view(-1)[i] = value

    @torch.no_grad()
    def mask_gradients(self, step):
        # a weight has no gradient where no token of the batch came to its layer
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        if self.to_grow and all(g.isfinite().all() for g in grads): # else the next batch decides
            self.flesh = self.lowest([(-g.abs()).masked_fill(m, torch.inf) for g, m in zip(grads, self.masks)], self.to_grow)
            self.set(self.flesh, True)
            self.to_grow, self.grown_at = 0, step
        for g, m in zip(grads, self.masks):
            g.mul_(m)
        young = self.boost != 1 and self.flesh and step < self.grown_at + self.boost_steps
        self.before = [p.view(-1)[i] for p, i in zip(self.params, self.flesh)] if young else []

    @torch.no_grad()
    def finish(self, step):
        for p, i, old in zip(self.params, self.flesh, self.before): # after preconditioning: Adam would divide a larger gradient away
            p.view(-1)[i] = old + self.boost * (p.view(-1)[i] - old)
        for p, m in zip(self.params, self.masks):
            p.mul_(m)
        if self.means and self.phase[0] <= step < self.phase[1]: # Welford: mean and sum of squared deviations, in one pass
            self.steps += 1
            for p, mean, square in zip(self.params, self.means, self.squares):
                delta = p - mean
                mean.add_(delta / self.steps)
                square.addcmul_(delta, p - mean)

    SAVED = ("masks", "to_grow", "flesh", "grown_at", "steps", "means", "squares")

    def state_dict(self):
        return {k: getattr(self, k) for k in self.SAVED}

    def load_state_dict(self, state):
        for k in self.SAVED:
            v = state[k]
            setattr(self, k, [x.to(p.device) for x, p in zip(v, self.params)] if isinstance(v, list) else v)


# Hooks: what an experiment watches or changes without a change of this code. Settings of train.py name them, in their order:
# a row of HOOKS or path/to/file.py:function, and after `=` a number that the hook takes as its last argument. They return
# {label: number} or None; the numbers go to metrics.jsonl with the lines of the log.
#
#   update    f(step, params[, number]), at each step before clipping; params is {name: parameter} of those that have a gradient,
#             .grad may be changed in place
#   forward   f(model[, number]) -> {module: g}, once; g(inputs, output) for these modules, for each line of the log, in a
#             forward of its own under no_grad: what it sees is what training would compute, what it does reaches no weight


def identity(step, params):
    """Changes nothing."""


def clip_by_layer(step, params, largest=1.0):
    """Each parameter's gradient scaled down to a norm of `largest`. Logs the share of parameters that were."""
    grads = [p.grad for p in params.values()]
    norms = torch.stack([g.norm() for g in grads])
    for g, scale in zip(grads, (largest / norms.clamp(min=1e-12)).clamp(max=1).unbind()):
        g.mul_(scale)
    return {"clipped": (norms > largest).float().mean()}


def gradient_noise(step, params, eta=0.01):
    """Gaussian noise of variance eta / (1 + step)^0.55 (Neelakantan et al. 2015, arXiv:1511.06807, section 3)."""
    std = (eta / (1 + step) ** 0.55) ** 0.5
    for p in params.values():
        p.grad.add_(torch.randn_like(p.grad), alpha=std)
    return {"std": std}


def activation_stats(model):
    """Mean and deviation of each block's output; of its MLP the share of units that no token of the batch switches on, and eps."""
    found = {}
    for block in model.blocks:
        found[block] = lambda inputs, output: {"mean": output.float().mean(), "std": output.float().std()}
        eps = {} if block.mlp.activation.eps is None else {"eps": block.mlp.activation.eps}
        found[block.mlp.down] = lambda inputs, output, eps=eps: {
            "dead": (inputs[0].flatten(0, -2).abs().amax(0) < 1e-6).float().mean(), **eps}
    return found


def stream_stats(model):
    """
    Of residual=hyper or mhc: how far each block's streams are apart, against their size; of mhc, for each mixing matrix, how
    far its entries have moved from their start on average, the largest error of its row and column sums, and the composite gain
    ("Amax"): the largest row or column sum of the product of all mixing matrices so far. arXiv:2512.24880, section 5. With depths
    the product begins anew in each stage of layers, because other tokens come there.
    """
    found, products = {}, {}
    stage_of = {block: i for i, stage in enumerate(model.stages) for block in stage}

    def mixing(starts, stage, inputs, coefficients): # res (B, T, N, N), sublayer after sublayer
        res = coefficients[2]
        product = products[stage] = res @ products[stage] if stage in products else res
        return {"moved": (res - starts).abs().mean(),
                "row_error": (res.sum(-1) - 1).abs().max(), "column_error": (res.sum(-2) - 1).abs().max(),
                "gain": torch.maximum(product.abs().sum(-1).max(), product.abs().sum(-2).max())}

    for block in model.blocks:
        found[block] = lambda inputs, x: {"apart": (x - x.mean(-2, keepdim=True)).norm() / x.norm()} if x.dim() == 4 else {}
        for residual in (block.residual1, block.residual2):
            if hasattr(residual, "mixing"):
                h, phi, alpha, b = (torch.zeros_like(t) for t in (residual.phi.weight[:1], residual.phi.weight, residual.alpha, residual.b))
                b[2 * residual.N :] = residual.mixing.start
                with torch.no_grad():
                    starts = residual.mixing(h.view(1, residual.N, -1), phi, alpha, b)[2]
                found[residual.mixing] = functools.partial(mixing, starts, stage_of[block])
    return found


HOOKS = {"update": {"identity": identity, "clip_by_layer": clip_by_layer, "gradient_noise": gradient_noise},
         "forward": {"activation_stats": activation_stats, "stream_stats": stream_stats}}


def find_hooks(kind, text):
    """[(name, function)] from names with commas between them; ValueError for one that is not there."""
    found = []
    for word in filter(None, (w.strip() for w in text.split(","))):
        name, _, number = word.partition("=")
        path, _, function = name.rpartition(":")
        if path:
            if not os.path.isfile(path):
                raise ValueError(f"there is no file {path!r} for the {kind} hook {word!r}")
            there = runpy.run_path(path)
        else:
            there = HOOKS[kind]
        if not callable(there.get(function)):
            known = ", ".join(k for k, v in there.items() if callable(v) and not k.startswith("_"))
            raise ValueError(f"no {kind} hook {function!r}{' in ' + path if path else ''}; there is: {known}, or path/to/file.py:function")
        try:
            last = {list(inspect.signature(there[function]).parameters)[-1]: float(number)} if number else {}
        except ValueError:
            raise ValueError(f"{kind} hook {word!r}: what follows = must be a number") from None
        found.append((word, functools.partial(there[function], **last)))
    return found


def run_update_hooks(hooks, step, params):
    """{hook: {label: number}}, in their order. A hook sees the parameters that have a gradient: with depths a layer may get none."""
    params = {name: p for name, p in params.items() if p.grad is not None}
    with torch.no_grad():
        return {name: result for name, hook in hooks if (result := hook(step, params))}


def watch(model, hooks, idx, targets):
    """{hook: {module.label: number}} from one forward that leaves neither a gradient nor a trace in the random states."""
    names, seen, handles = {m: n for n, m in model.named_modules()}, {}, []
    for name, hook in hooks:
        for module, f in hook(model).items():
            def call(module, inputs, output, f=f, into=seen.setdefault(name, {})): # returns None: the output stays
                into.update({f"{names[module]}.{k}": v for k, v in (f(inputs, output) or {}).items()})
            handles.append(module.register_forward_hook(call))
    try:
        with torch.no_grad(), torch.random.fork_rng([idx.device] if idx.is_cuda else []):
            model(idx, targets)
    finally:
        for handle in handles:
            handle.remove()
    return seen


if __name__ == "__main__":
    from configurator import configure, user_errors
    from model import GPT, GPTConfig, preset, without_orphans

    model_size = "" # as train.py's
    out_dir = "" # as model.py's: folder of a run, whose model is taken
    given = configure(globals(), GPTConfig, guest_of=os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py"))
    with user_errors(), torch.device("meta"):
        sizes = preset(given.pop("model_size", ""))
        partition(GPT(GPTConfig(**{**sizes, **without_orphans(given, given.typed)})))
