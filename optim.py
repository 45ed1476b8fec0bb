"""Optimizers, sparse training and hooks: what happens to gradients and weights in a step.

Each module of model.py declares a role for its parameters; build_optimizer goes by roles, never by names.
python optim.py config/train_shakespeare_diffmla.py --vocab_size=65 prints what each parameter is to each.

  role        parameters                               weight decay   with Muon
  matrix      Linear weights inside the blocks         yes            orthogonalised momentum
  embedding   Embedding rows, also of a tied head      yes            AdamW
  head        the untied head                          yes            AdamW
  gate        a few rows that make coefficients        yes            AdamW
  vector      norm gains, biases, lambdas              no             AdamW

AdamW is torch's. The others are ordinary torch.optim.Optimizers whose step() does not wait for a GPU. Read
the `loop` of each first: plain PyTorch, which defines what C and Triton must compute.
"""
import configurator # first: see stop_at_once there

import contextlib
import functools
import inspect
import itertools
import math
import os
import runpy
from collections import Counter
from typing import Callable, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.adamw import adamw

from kernels import INTERPRETED, c_library, floats, integers, jit, pointers, threads, tl, triton

OPTIMIZERS = ("adamw", "fadam", "adam_mini", "muon")
FUSED = ("cuda", "cpu") # devices for which torch has AdamW as one kernel: 5 times as fast on a CPU
LATE = ("cuda",) # devices that decide themselves whether to skip a batch, see step_where_finite
IN_TRITON = {getattr(torch, t): getattr(tl, t) for t in ("float32", "bfloat16", "float16") if triton}
CHUNK = 16384 # numbers that a program of fadam_kernel has
BLOCK = 1024 # numbers that a program of either kernel handles at a time


class Declared(NamedTuple):
    """What a parameter is. model.py explains the words above its leaf classes."""

    role: str # matrix | embedding | head | gate | vector
    fused: tuple # rows of each matrix stacked in it; Muon orthogonalises each by itself
    blocks: tuple | None # Adam-mini's blocks. None: each row; (): the whole tensor; else the rows of each
    detached: bool # learns beside the model from detached numbers, and must not affect the model


def declarations(model: nn.Module) -> dict[nn.Parameter, Declared]:
    """What each trained parameter is; a shared one counts once. TypeError if a module declares no role."""
    found = {}
    beside = {p for m in model.modules() if getattr(m, "detached", False) for p in m.parameters()}
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            if not hasattr(module, "role"):
                raise TypeError(f"{type(module).__name__} ({name}) owns parameters but declares no role; "
                                "add `role = ...` to the class")
            what = module.role, getattr(module, "fused", (len(p),)), getattr(module, "blocks", None)
            if p.dim() < 2 or module.role == "vector": # the bias of a Linear is a vector, its weight is not
                what = "vector", (), ()
            found.setdefault(p, Declared(*what, p in beside)) # a tied head comes after the embedding
    return {p: declared for p, declared in found.items() if p.requires_grad}


def build_optimizer(model: nn.Module, name: str, learning_rate: float, weight_decay: float,
                    betas: tuple[float, float], bf16: bool = False) -> torch.optim.Optimizer:
    """An optimizer of all trained parameters. bf16: Muon multiplies in it. ValueError for an unknown name."""
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer={name!r} is not known; choose one of: {', '.join(OPTIMIZERS)}")
    groups = {} # options -> the parameters that have them
    for p, d in declarations(model).items():
        own = {"adam_mini": {"blocks": d.blocks}, "muon": {"fused": d.fused if d.role == "matrix" else ()}}
        options = {"weight_decay": 0.0 if d.role == "vector" else weight_decay, **own.get(name, {})}
        groups.setdefault(tuple(options.items()), []).append(p)
    groups = [{"params": params, **dict(options)} for options, params in groups.items()]
    fused_adamw = functools.partial(torch.optim.AdamW, fused=next(model.parameters()).device.type in FUSED)
    muon = functools.partial(Muon, bf16=bf16)
    classes = {"adamw": fused_adamw, "fadam": FAdam, "adam_mini": AdamMini, "muon": muon}
    return classes[name](groups, lr=learning_rate, betas=betas)


class Base(torch.optim.Optimizer):
    """What FAdam, AdamMini and Muon share: the closure, the state, the choice between forms of an update.

    form="loop" is plain PyTorch, tensor by tensor. "c" is kernels.c, for contiguous fp32 parameters on a CPU.
    "triton" is one kernel for all tensors of a group, on CUDA. "auto" is triton or c where it can run, else
    loop.
    """

    OPTIONS = {} # name: default; groups of parameters may have other values
    FP32 = {"step"} # names of state that is fp32 whatever its parameter is
    found_inf = None # fp32 (): 1 if this step is to be left out. Set by step_where_finite

    def __init__(self, params, *, form: str = "auto", **options):
        if form not in ("auto", "loop", "c", "triton"):
            raise ValueError(f"form={form!r} is not one of: auto, loop, c, triton")
        if unknown := options.keys() - self.OPTIONS.keys():
            raise TypeError(f"{type(self).__name__} has no {min(unknown)}; it has {', '.join(self.OPTIONS)}")
        super().__init__(params, {**self.OPTIONS, **options})
        self.form, self.sent = form, {} # sent: see on_device

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params: # with depths a whole group may have no gradient
                self.update(params, [p.grad for p in params], group)
        return loss

    def form_of(self, params: list, able: bool = True) -> str:
        """loop, c or triton. RuntimeError if the form that was asked for cannot run, as where able=False."""
        form, kind, dtype = self.form, params[0].device.type, params[0].dtype
        able = able and all(p.device == params[0].device and p.dtype == dtype and p.is_contiguous()
                            and not hasattr(p, "full_tensor") for p in params)
        on_gpu = kind == "cuda" or INTERPRETED and form == "triton"
        if able and form in ("auto", "triton") and on_gpu and dtype in IN_TRITON:
            return "triton"
        if able and form in ("auto", "c") and (kind, dtype) == ("cpu", torch.float32) and c_library(0):
            return "c"
        if form in ("c", "triton"):
            raise RuntimeError(f"form={form!r} cannot run here; use form='auto'\nc needs contiguous fp32 "
                               "parameters on a CPU and a compiler; triton contiguous ones of one dtype, at "
                               "most fp32, on CUDA; FAdam needs p=0.5 for both")
        return "loop"

    def run(self, form: str, params: list, grads: list, group: dict, shapes: list) -> None:
        """The update in one of its forms. shapes: for each parameter {name of a moment: its shape}."""
        if form != "triton" and self.found_inf: # loop and C count steps on the host, so they ask
            return
        states = [self.state_of(p, form == "triton", shape) for p, shape in zip(params, shapes)]
        if form == "triton":
            new = 1 if self.found_inf is None else 1 - self.found_inf
            torch._foreach_add_([s["step"] for s in states], new)
        else:
            for s in states:
                s["step"] += 1
        lists = ([s[key] for s in states] for key in (*shapes[0], "step"))
        how = {"loop": self.loop, "c": self.in_c, "triton": self.in_triton}[form]
        with torch.cuda.device_of(params[0]): # where Triton launches
            how(params, [g.contiguous() for g in grads], *lists, group)

    def state_of(self, p: nn.Parameter, counts_there: bool, shapes: dict) -> dict:
        """The state of p; before its first step, zeros of these shapes.

        counts_there: a kernel counts the steps, in a tensor beside p; else Python, in an int. A resumed run
        may do it in the other way.
        """
        state = self.state[p]
        if "m" not in state:
            state["step"] = 0
            for key, shape in shapes.items():
                state[key] = p.new_zeros(shape, dtype=torch.float32 if key in self.FP32 else p.dtype)
        if any(state[key].shape != shape for key, shape in shapes.items()): # C would write past the end
            raise ValueError(f"the state of a parameter of shape {tuple(p.shape)} is that of another; "
                             "load the state_dict of the same model")
        if torch.is_tensor(state["step"]) != counts_there:
            step = int(state["step"])
            state["step"] = p.new_full((), step, dtype=torch.float32) if counts_there else step
        return state

    def on_device(self, lists: tuple, plan: Callable) -> tuple:
        """(addresses, plan, alignment) for a kernel that one launch runs over many tensors.

        addresses (tensors, lists) are sent again when a tensor has moved, as gradients do. plan() is sent
        once for each list of parameters. A row of it is the work of one program: the index of its tensor, its
        first element, the end, and more. Alignment is 16 if all of them allow loads of 16 bytes, else 1.
        """
        sent, device = self.sent.setdefault(tuple(lists[0]), {}), lists[0][0].device
        if not sent:
            rows = plan()
            sent.update(rows=upload(rows, device), even=not any(n % 16 for row in rows for n in row[1:3]))
        addresses = list(map(torch.Tensor.data_ptr, itertools.chain(*zip(*lists))))
        if addresses != sent.get("addresses"):
            align = 16 if sent["even"] and not any(n % 16 for n in addresses) else 1
            sent.update(addresses=addresses, table=upload(addresses, device), align=align)
        return sent["table"], sent["rows"], sent["align"]

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        # torch has cast all state to its parameter's dtype and left `step` where it was, so both are copied
        # from state_dict again.
        for group, saved in zip(self.param_groups, state_dict["param_groups"]):
            for p, i in zip(group["params"], saved["params"]):
                for key, value in state_dict["state"].get(i, {}).items():
                    if key in self.FP32 and torch.is_tensor(value): # Python's number of steps needs no place
                        self.state[p][key] = value.to(p.device, torch.float32, copy=True)


def whole(x: object) -> object:
    """The whole of a tensor that FSDP has shared out, in all processes: all must ask. Else x itself."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def share_of(x: torch.Tensor, like: object) -> torch.Tensor:
    """x, which all processes have whole, shared out as `like` is; x itself if `like` is not."""
    if not hasattr(like, "full_tensor"):
        return x
    from torch.distributed.tensor import distribute_tensor # takes 1 s to import
    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def upload(numbers: list, device: torch.device) -> torch.Tensor:
    made = torch.tensor(numbers) # int64
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made


def step_where_finite(opt: torch.optim.Optimizer, parts: list[tuple[list, torch.Tensor]],
                      late: bool) -> None:
    """opt.step() for all parts (parameters, bad). Where bad, fp32 (), is 1, weights and state stay.

    late: the host does not wait for `bad`. The optimizer reads it on the device as found_inf, the name that
    torch's fused AdamW has for it. Each part then needs a call of its own. Gradients may be gone afterwards.
    """
    if not late:
        for p in itertools.chain(*(params for params, bad in parts if bad)):
            p.grad = None # an optimizer passes over what has no gradient
        opt.step()
        return
    grads = {p: p.grad for params, _ in parts for p in params}
    for params, opt.found_inf in parts:
        for p in grads:
            p.grad = None
        for p in params:
            p.grad = grads[p]
        if params:
            opt.step()
    opt.found_inf = None


@jit
def pointer(p_table, TYPE: tl.constexpr, ALIGN: tl.constexpr):
    return tl.multiple_of(tl.load(p_table).to(tl.pointer_type(TYPE)), ALIGN)


@jit
def correction(log_beta, step): # 1 - beta^step, for a small step without the error of a difference
    x = step * log_beta
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
    return tl.where(x > -0.5, -series, 1 - tl.exp(x))


def log(beta):
    return math.log(beta or 1e-300)


class FAdam(Base):
    """Hwang 2024, arXiv:2405.12807, algorithm 1: Adam as natural gradient with a diagonal Fisher matrix.

    Numbers in comments are the algorithm's lines. Unlike Adam's, the momentum is of the natural gradient, and
    weight decay is preconditioned too: in a step it takes lr * weight_decay from a weight of typical size, on
    whatever scale the weights are, so 0.001 is much. State is fp32.
    """

    OPTIONS = dict(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0, eps=1e-8, eps2=0.01, p=0.5, clip=1.0)
    FP32 = {"step", "m", "f"}

    def update(self, params, grads, group):
        form = self.form_of(params, able=group["p"] == 0.5) # C and Triton have the square root alone
        self.run(form, params, grads, group, [{"m": p.shape, "f": p.shape} for p in params])

    def loop(self, params, grads, ms, fs, steps, group):
        lr, beta1, weight_decay = group["lr"], group["betas"][0], group["weight_decay"]
        eps, eps2, power, clip = (group[key] for key in ("eps", "eps2", "p", "clip"))
        for theta, g, m, f, beta2 in zip(params, grads, ms, fs, self.beta2s(steps, group)):
            g = g.float()
            f.lerp_(g.square(), 1 - beta2) # 7: Fisher information
            size = eps2 * rms(g)
            eps_t = torch.where(size > 0, size.clamp(max=eps), eps) # 8: adaptive, but never 0
            root = f**power + eps_t ** (2 * power)
            natural = g / root # 9: natural gradient
            natural = natural / (rms(natural) / clip).clamp(min=1) # 10: clipped to an RMS of clip
            m.lerp_(natural, 1 - beta1) # 11: momentum, not corrected for its start
            decay = theta.float() / root # 12: natural weight decay
            decay = decay / (rms(decay) / clip).clamp(min=1) # 13: clipped to an RMS of clip
            theta.sub_((lr * (m + weight_decay * decay)).to(theta.dtype)) # 14

    @staticmethod
    def beta2s(steps, group): # 6: beta2, corrected for the start. At step 1 it is 0, and f becomes g^2.
        beta2 = group["betas"][1]
        return [beta2 * (1 - beta2 ** (step - 1)) / (1 - beta2**step) for step in steps]

    def in_c(self, params, grads, ms, fs, steps, group):
        news = floats([1 - beta2 for beta2 in self.beta2s(steps, group)]) # kernels.c says why 1 - beta
        knobs = (group[key] for key in ("lr", "weight_decay", "eps", "eps2", "clip"))
        c_library(0).fadam(
            threads(), len(params), pointers(params), pointers(grads), pointers(ms), pointers(fs),
            integers([theta.numel() for theta in params]), news, floats([1 - group["betas"][0], *knobs]))

    def in_triton(self, params, grads, ms, fs, steps, group):
        def plan():
            rows = []
            for i, theta in enumerate(params):
                first, count = len(rows), -(-theta.numel() // CHUNK)
                rows += [(i, k * CHUNK, theta.numel(), first, first + count) for k in range(count)]
            return rows

        table, rows, align = self.on_device((params, grads, ms, fs, steps), plan)
        sums = torch.empty(len(rows), 3, device=params[0].device) # of squares
        (beta1, beta2), *knobs = (group[k] for k in ("betas", "lr", "weight_decay", "eps", "eps2", "clip"))
        for stage in range(3):
            fadam_kernel[(len(rows),)](
                table, rows, sums, self.found_inf, log(beta2), 1 - beta1, 1 - beta2, *knobs, stage,
                IN_TRITON[params[0].dtype], align, CHUNK, BLOCK)


# A program has CHUNK numbers of one tensor. It is launched three times. Stage 0 adds up the squares of g, of
# g / root and of theta / root, with the largest epsilon. Stage 1 adds the last two up again where a tensor's
# epsilon (8) is smaller. Stage 2 updates: 40 bytes read or written for a weight in all.
@jit
def fadam_kernel(p_table, p_plan, p_sums, p_bad, log_beta2, new1, new2, lr, weight_decay, eps, eps2, clip,
                 STAGE: tl.constexpr, TYPE: tl.constexpr, ALIGN: tl.constexpr, CHUNK: tl.constexpr,
                 BLOCK: tl.constexpr):
    program = tl.program_id(0)
    p_plan += program * 5
    start, size = tl.multiple_of(tl.load(p_plan + 1), ALIGN), tl.multiple_of(tl.load(p_plan + 2), ALIGN)
    first, last = tl.load(p_plan + 3), tl.load(p_plan + 4) # programs of this tensor
    p_table += tl.load(p_plan) * 5
    p_theta, p_g = pointer(p_table, TYPE, ALIGN), pointer(p_table + 1, TYPE, ALIGN)
    p_m, p_f = pointer(p_table + 2, tl.float32, ALIGN), pointer(p_table + 3, tl.float32, ALIGN)
    new2 /= correction(log_beta2, tl.load(pointer(p_table + 4, tl.float32, 4))) # 6: 1 - beta2
    end = tl.minimum(start + CHUNK, size)
    if p_bad is not None: # then no element is left to be read or written
        end = tl.where(tl.load(p_bad) == 0, end, start)
    if STAGE > 0:
        adaptive = eps2 * tl.sqrt(total(p_sums, first, last, BLOCK) / size)
        smaller = (adaptive > 0) & (adaptive < eps)
        eps = tl.where(smaller, adaptive, eps) # 8
    if STAGE == 1:
        end = tl.where(smaller, end, start)
    if STAGE == 2:
        fresh = new1 / tl.maximum(tl.sqrt(total(p_sums + 1, first, last, BLOCK) / size) / clip, 1.0) # 10
        weight_decay /= tl.maximum(tl.sqrt(total(p_sums + 2, first, last, BLOCK) / size) / clip, 1.0) # 13
    gg = tl.zeros((BLOCK,), tl.float32)
    nn, ww = gg, gg
    for k in range(start, end, BLOCK):
        i = k + tl.arange(0, BLOCK)
        inside = i < tl.multiple_of(end, ALIGN)
        theta = tl.load(p_theta + i, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(p_g + i, mask=inside, other=0.0).to(tl.float32)
        f = tl.load(p_f + i, mask=inside, other=0.0)
        f += new2 * (g * g - f) # 7
        inverse = tl.where(inside, 1 / (tl.sqrt(f) + eps), 0.0)
        if STAGE == 2:
            m = tl.load(p_m + i, mask=inside, other=0.0)
            m += fresh * (g * inverse) - new1 * m # 9, 11
            theta -= lr * (m + weight_decay * (theta * inverse)) # 12, 14
            tl.store(p_f + i, f, mask=inside)
            tl.store(p_m + i, m, mask=inside)
            tl.store(p_theta + i, theta.to(TYPE), mask=inside)
        else:
            gg += g * g
            nn += (g * inverse) * (g * inverse)
            ww += (theta * inverse) * (theta * inverse)
    if STAGE < 2:
        if STAGE == 0:
            smaller = size > 0 # always
            tl.store(p_sums + 3 * program, tl.sum(gg, axis=0))
        tl.store(p_sums + 3 * program + 1, tl.sum(nn, axis=0), mask=smaller)
        tl.store(p_sums + 3 * program + 2, tl.sum(ww, axis=0), mask=smaller)


@jit
def total(p_sums, first, last, BLOCK: tl.constexpr): # of a column of sums, over the programs of a tensor
    sums = tl.zeros((BLOCK,), tl.float32)
    for k in range(first, last, BLOCK):
        i = k + tl.arange(0, BLOCK)
        sums += tl.load(p_sums + 3 * i, mask=i < last, other=0.0)
    return tl.sum(sums, axis=0)


def rms(x):
    return x.square().mean().sqrt()


@functools.cache
def runs(blocks: tuple | None, rows: int, width: int) -> tuple:
    """Runs of equal blocks in (rows, width): ((first weight, first block, blocks, weights in each), ...)."""
    heights = (rows,) if blocks == () else blocks or (1,) * rows # rows of each block
    if sum(heights) != rows:
        raise ValueError(f"blocks of {sum(heights)} rows do not cover a parameter of {rows} rows")
    found, start, first = [], 0, 0
    for height, equal in itertools.groupby(heights):
        count, size = len(list(equal)), height * width
        found.append((start, first, count, size))
        start, first = start + count * size, first + count
    return tuple(found)


class AdamMini(Base):
    """Zhang et al. 2024, arXiv:2406.16793, algorithm 1: AdamW with one second moment for a block of weights.

    Curvature is alike inside a block: a head of queries or keys, a row of any other matrix. Groups carry
    `blocks`, as in Declared. m has the parameter's dtype, v is fp32. Parameters must be contiguous.
    """

    OPTIONS = dict(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0, eps=1e-8, blocks=None)
    FP32 = {"step", "v"}

    def update(self, params, grads, group):
        shapes = [{"m": p.shape, "v": (sum(count for _, _, count, _ in layout),)}
                  for p, layout in zip(params, self.layouts(params, group))]
        self.run(self.form_of(params), params, grads, group, shapes)

    @staticmethod
    def layouts(params, group):
        return [runs(group["blocks"], len(p), p.numel() // len(p)) for p in params]

    def each_run(self, params, grads, ms, vs, steps, group):
        """Yields (p, g, m, v, run of blocks, step size, correction of v); the step size corrects m."""
        beta1, beta2 = group["betas"]
        for p, g, m, v, step, layout in zip(params, grads, ms, vs, steps, self.layouts(params, group)):
            for place in layout:
                yield p, g, m, v, place, group["lr"] / (1 - beta1**step), 1 - beta2**step

    def loop(self, *lists):
        group, keep = lists[-1], 1 - lists[-1]["lr"] * lists[-1]["weight_decay"]
        beta1, beta2 = group["betas"]
        for p, g, m, v, (start, first, count, size), lr, correction in self.each_run(*lists):
            p, g, m = (x.view(-1)[start : start + count * size].view(count, size) for x in (p, g, m))
            v = v[first : first + count]
            v.lerp_(g.float().square().mean(1), 1 - beta2) # AdamW has no mean here; all else is AdamW's
            m.lerp_(g, 1 - beta1)
            scale = lr / ((v / correction).sqrt() + group["eps"])
            p.mul_(keep).sub_(scale.to(p.dtype)[:, None] * m)

    def in_c(self, *lists):
        params, grads, ms, vs, places, *rates = zip(*self.each_run(*lists))
        starts, firsts, counts, sizes = zip(*places) # offsets, because a view for each run would cost more
        group = lists[-1]
        (beta1, beta2), keep = group["betas"], 1 - group["lr"] * group["weight_decay"]
        c_library(0).adam_mini(
            threads(), len(places), *(pointers(x, starts) for x in (params, grads, ms)), pointers(vs, firsts),
            integers(counts), integers(sizes), floats([*itertools.chain(*zip(*rates))]),
            floats([1 - beta1, 1 - beta2, group["eps"], keep]))

    def in_triton(self, params, grads, ms, vs, steps, group):
        def plan():
            return [(i, start + k * size, start + (k + 1) * size, first + k)
                    for i, layout in enumerate(self.layouts(params, group))
                    for start, first, count, size in layout for k in range(count)]

        table, rows, align = self.on_device((params, grads, ms, vs, steps), plan)
        (beta1, beta2), lr, eps, weight_decay = (group[k] for k in ("betas", "lr", "eps", "weight_decay"))
        adam_mini_kernel[(len(rows),)](
            table, rows, self.found_inf, log(beta1), log(beta2), 1 - beta1, 1 - beta2, lr, eps,
            1 - lr * weight_decay, IN_TRITON[params[0].dtype], align, BLOCK)


# A program has one block of weights. It reads the gradient twice; the second time it is still in the cache.
@jit
def adam_mini_kernel(p_table, p_plan, p_bad, log_beta1, log_beta2, new1, new2, lr, eps, keep,
                     TYPE: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    p_plan += tl.program_id(0) * 4
    start, end = tl.multiple_of(tl.load(p_plan + 1), ALIGN), tl.multiple_of(tl.load(p_plan + 2), ALIGN)
    p_table += tl.load(p_plan) * 5
    p_p, p_g = pointer(p_table, TYPE, ALIGN), pointer(p_table + 1, TYPE, ALIGN)
    p_m, p_v = pointer(p_table + 2, TYPE, ALIGN), pointer(p_table + 3, tl.float32, 4) + tl.load(p_plan + 3)
    step, size = tl.load(pointer(p_table + 4, tl.float32, 4)), end - start
    if p_bad is not None: # then no element is left to be read or written
        end = tl.where(tl.load(p_bad) == 0, end, start)
    # All threads read v, and one writes it. Between the two all wait for each other, in tl.sum.
    v, squares = tl.load(p_v), tl.zeros((BLOCK,), tl.float32)
    for k in range(start, end, BLOCK):
        i = k + tl.arange(0, BLOCK)
        g = tl.load(p_g + i, mask=i < tl.multiple_of(end, ALIGN), other=0.0).to(tl.float32)
        squares += g * g
    v += new2 * (tl.sum(squares, axis=0) / size - v)
    tl.store(p_v, v, mask=start < end)
    scale = lr / correction(log_beta1, step) / (tl.sqrt(v / correction(log_beta2, step)) + eps)
    for k in range(start, end, BLOCK):
        i = k + tl.arange(0, BLOCK)
        inside = i < tl.multiple_of(end, ALIGN)
        p = tl.load(p_p + i, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(p_g + i, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(p_m + i, mask=inside, other=0.0).to(tl.float32)
        m += new1 * (g - m)
        tl.store(p_m + i, m.to(TYPE), mask=inside)
        tl.store(p_p + i, (keep * p - scale * m).to(TYPE), mask=inside)


# Newton-Schulz steps x <- a x + (b x x^T + c (x x^T)^2) x move all singular values towards 1. A row (a, b, c)
# is one step. By Keller Jordan (2024), and by Amsel et al. (2025, arXiv:2505.16932): these come closer to 1.
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551569301323),
)


def orthogonalise(matrices: torch.Tensor, steps: tuple = POLAR_EXPRESS, bf16: bool = False) -> torch.Tensor:
    """(B, n, m) -> about U V^T of each matrix's singular value decomposition U S V^T."""
    x = matrices.bfloat16() if bf16 or matrices.is_cuda else matrices.float() # Jordan: bf16
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x # x x^T is then the smaller square
    # No singular value may exceed 1.02. None exceeds the norm, which bf16 may make 2% too small.
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for a, b, c in steps:
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).type_as(matrices)


def shared(f: Callable, x: torch.Tensor) -> torch.Tensor:
    """f(x) for an f that treats each row of x alone. Each process computes an equal share of the rows."""
    if not dist.is_initialized():
        return f(x)
    rank, world = dist.get_rank(), dist.get_world_size()
    each = -(-len(x) // world) # rows of a process; the last processes may find fewer, and send zeros too
    part = x[rank * each : (rank + 1) * each]
    mine, result = x.new_zeros(each, *x.shape[1:]), x.new_empty(world * each, *x.shape[1:])
    if len(part):
        mine[: len(part)] = f(part)
    dist.all_gather([*result.chunk(world)], mine)
    return result[: len(x)]


class Muon(Base):
    """Momentum, orthogonalised, for the matrices inside the blocks; AdamW for all else.

    Jordan 2024, "Muon: An optimizer for hidden layers in neural networks"; numbers are its algorithm's lines.
    Groups carry `fused`, as in Declared; () is AdamW. A matrix (n, m) has its update multiplied by
    0.2 sqrt(max(n, m)), so that one learning rate serves both (Liu et al. 2025, arXiv:2502.16982). The
    processes of torch.distributed share out the matrices; all need the same gradients.
    """

    OPTIONS = dict(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, eps=1e-8, # betas and eps: of AdamW
                   momentum=0.95, steps=POLAR_EXPRESS, fused=())

    def __init__(self, params, *, bf16: bool = False, **rest):
        super().__init__(params, **rest)
        self.bf16 = bf16

    def update(self, params, grads, group):
        (self.loop if group["fused"] else self.adamw)(params, grads, group)

    def loop(self, params, grads, group):
        momentum, bad, ok = group["momentum"], self.found_inf, 1
        for p in params:
            if "m" not in self.state[p]:
                self.state[p]["m"] = torch.zeros_like(p)
        ms = [self.state[p]["m"] for p in params]
        if bad is not None:
            ok, is_bad = 1 - bad, bad > 0
            grads = [torch.where(is_bad, m, g) for m, g in zip(ms, grads)] # the mean of m and m is m
        torch._foreach_lerp_(ms, grads, 1 - momentum) # 4: a mean for Jordan's sum; 5 takes the scale out
        updates = torch._foreach_lerp(grads, ms, momentum) # Nesterov's
        torch._foreach_mul_(params, 1 - ok * (group["lr"] * group["weight_decay"]))
        updates = [*map(whole, updates)] # where FSDP has shared out p, a step goes into zeros first
        goals = [torch.zeros_like(u) if hasattr(p, "full_tensor") else p for p, u in zip(params, updates)]
        alike = {} # shape -> matrices of all parameters and their updates, for one batched iteration
        for goal, update in zip(goals, updates):
            for matrix, part in zip(goal.split(group["fused"]), update.split(group["fused"])):
                alike.setdefault(matrix.shape, []).append((matrix, part))
        for (n, m), pairs in alike.items():
            matrices, parts = zip(*pairs)
            ortho = shared(lambda x: orthogonalise(x, group["steps"], self.bf16), torch.stack(parts)) # 5
            ortho = ortho if bad is None else ok * ortho
            torch._foreach_add_(matrices, ortho.unbind(), alpha=-group["lr"] * 0.2 * max(n, m) ** 0.5) # 6
        for p, step in zip(params, goals):
            if p is not step:
                p.add_(share_of(step, p))

    def adamw(self, params, grads, group):
        states = [self.state_of(p, True, {"m": p.shape, "v": p.shape}) for p in params]
        ms, vs, steps = ([s[key] for s in states] for key in ("m", "v", "step"))
        beta1, beta2 = group["betas"]
        adamw(params, grads, ms, vs, [], steps, fused=params[0].device.type in FUSED, amsgrad=False,
              maximize=False, found_inf=self.found_inf, beta1=beta1, beta2=beta2, lr=group["lr"],
              weight_decay=group["weight_decay"], eps=group["eps"])


class Sparse:
    """Training in which ever more weights are held at zero: Skeleton & Flesh, or magnitude pruning.

    It compares the weights of all matrices and of an untied head. From step phase[0] to phase[1], where the
    learning rate is constant, it chooses the active weights every `interval` steps: fewer each time until the
    share `density` is active, then always that share.

    skeleton_flesh (The Kepler Architecture, Skeleton & Flesh): a choice prunes the share prune_rate of active
    weights, those of the lowest signal to noise, |mean| / std over the steps since the last choice. Half as
    many inactive weights grow back, from zero, where the next gradient is largest. For boost_steps steps the
    optimizer's changes of these young weights, the flesh, are multiplied by `boost`.
    magnitude, the baseline: a choice prunes the smallest weights, down to the same number. None grows back.

    Call choose(step) before the gradient, mask_gradients(step) after it, finish(step) after the optimizer.
    Inactive weights have zero gradients and moments, so a weight that grows back begins without any.
    """

    METHODS = ("skeleton_flesh", "magnitude")
    SAVED = ("masks", "to_grow", "flesh", "grown_at", "steps", "means", "squares")

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, method: str, density: float,
                 interval: int, phase: tuple, prune_rate=0.3, boost=1.0, boost_steps=0):
        for wrong, sentence in [
            (method not in self.METHODS, f"sparse={method!r} is not one of: {', '.join(self.METHODS)}"),
            (not 0 < density <= 1, f"sparse_density={density} must be above 0 and at most 1"),
            (not 0 < prune_rate < 1, f"sparse_prune_rate={prune_rate} must be between 0 and 1"),
            (interval < 1 or boost_steps < 0,
             "sparse_interval must be at least 1 and sparse_boost_steps not negative"),
            (boost < 0, f"sparse_boost={boost} must not be negative"),
        ]:
            if wrong:
                raise ValueError(sentence)
        self.optimizer, self.method, self.interval, self.phase = optimizer, method, interval, phase
        self.prune_rate, self.boost, self.boost_steps = prune_rate, boost, boost_steps
        self.params = [p for p, declared in declarations(model).items()
                       if declared.role in ("matrix", "head") and not declared.detached]
        self.total = sum(p.numel() for p in self.params)
        self.target = round(density * self.total) # active weights at the end
        self.masks = [torch.ones_like(p, dtype=torch.bool) for p in self.params] # True: active
        self.to_grow = 0 # weights that the next gradient will grow
        self.flesh, self.grown_at = [], 0 # flat indices of the young weights in each parameter; first step
        self.before = [] # the young weights before the optimizer's step
        # Since the last choice: number of steps, and each weight's mean and sum of squared deviations.
        tracked = self.params if method == "skeleton_flesh" else []
        self.steps, self.means, self.squares = 0, *([torch.zeros_like(p) for p in tracked] for _ in range(2))
        # Does the phase have room for all choices until the target is reached?
        (first, last), active, needed = phase, self.total, 0
        while active > self.target:
            active, needed = self.next_count(active), needed + 1
        room = max(0, last - first - 1) # steps at which a choice can be due
        if needed > room // interval:
            shorter = f", or --sparse_interval={room // needed} or less" if room >= needed else ""
            raise ValueError(f"sparse_density={density} takes {needed} choices; steps {first} to {last}, "
                             f"where the learning rate is constant, have room for {room // interval}\n"
                             f"use a longer run{shorter}")

    def next_count(self, active: int) -> int:
        """Active weights after a choice: half of the pruned grow back, or more, not to miss the target."""
        pruned = max(1, round(self.prune_rate * active))
        return active - pruned + max(self.target - (active - pruned), pruned // 2)

    def active(self) -> int:
        return sum(int(m.sum()) for m in self.masks) # integers: a sum in bf16 would be off by 0.3%

    def density(self) -> float:
        return self.active() / self.total

    @property
    def reached(self) -> bool:
        return self.active() == self.target

    @torch.no_grad()
    def choose(self, step: int) -> bool:
        """Prunes if a choice is due at this step, and says whether. Growing waits for the gradient."""
        first, last = self.phase
        due = first < step < last and (step - first) % self.interval == 0
        if not due or self.target == self.total: # density=1 is dense training
            return False
        active = self.active()
        left = self.next_count(active)
        if self.method == "magnitude":
            pruned, scores = active - left, [p.abs() for p in self.params]
        else:
            pruned = max(1, round(self.prune_rate * active))
            # 1e-8 is for weights that stand still, such as those of a layer without gradients.
            noise = [(s / max(1, self.steps)).add_(1e-8).sqrt_() for s in self.squares]
            scores = [mean.abs() / std for mean, std in zip(self.means, noise)]
        self.to_grow, self.steps = left - (active - pruned), 0
        for x in (*self.means, *self.squares): # the statistics begin anew
            x.zero_()
        scores = [s.masked_fill(~m, torch.inf) for s, m in zip(scores, self.masks)] # inactive ones stay
        for p, m, gone in zip(self.params, self.masks, self.lowest(scores, pruned)):
            m.view(-1)[gone] = False
            p.mul_(m)
            # Moments have the weight's shape. A second moment that a block shares stays.
            for value in self.optimizer.state[p].values():
                if torch.is_tensor(value) and value.shape == p.shape:
                    value.mul_(m)
        return True

    @staticmethod
    def lowest(scores: list, k: int) -> list:
        """Flat indices in each tensor of the k lowest scores of all: exactly k, also if scores are equal."""
        flat = torch.cat([s.flatten() for s in scores]) # one threshold for all tensors
        chosen = torch.zeros_like(flat, dtype=torch.bool)
        chosen[flat.topk(k, largest=False, sorted=False).indices] = True # k, whatever ties
        return [part.nonzero().view(-1) for part in chosen.split([s.numel() for s in scores])]

    @torch.no_grad()
    def mask_gradients(self, step: int) -> None:
        """Grows what choose() left to this gradient; zeroes the gradients of inactive weights."""
        # A parameter has no gradient if no token of the batch came to its layer.
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        if self.to_grow and all(g.isfinite().all() for g in grads): # else the next batch decides
            # The lowest -|g| is the largest gradient; inf keeps active weights out.
            scores = [(-g.abs()).masked_fill(m, torch.inf) for g, m in zip(grads, self.masks)]
            self.flesh = self.lowest(scores, self.to_grow)
            for m, i in zip(self.masks, self.flesh):
                m.view(-1)[i] = True
            self.to_grow, self.grown_at = 0, step
        for g, m in zip(grads, self.masks):
            g.mul_(m)
        young = self.boost != 1 and self.flesh and step < self.grown_at + self.boost_steps
        self.before = [p.view(-1)[i] for p, i in zip(self.params, self.flesh)] if young else []

    @torch.no_grad()
    def finish(self, step: int) -> None:
        """Boosts young weights, zeroes inactive ones, updates each weight's mean and deviation."""
        # The boost multiplies the optimizer's change: Adam would divide a factor on the gradient away.
        for p, i, old in zip(self.params, self.flesh, self.before):
            p.view(-1)[i] = old + self.boost * (p.view(-1)[i] - old)
        for p, m in zip(self.params, self.masks):
            p.mul_(m)
        if self.means and self.phase[0] <= step < self.phase[1]: # Welford's algorithm, in one pass
            self.steps += 1
            for p, mean, square in zip(self.params, self.means, self.squares):
                delta = p - mean
                mean.add_(delta / self.steps)
                square.addcmul_(delta, p - mean)

    def state_dict(self) -> dict:
        return {key: getattr(self, key) for key in self.SAVED}

    def load_state_dict(self, state: dict) -> None:
        for key in self.SAVED:
            value = state[key] # a number, or a list of one tensor for each parameter
            moved = [x.to(p.device) for x, p in zip(value, self.params)] if isinstance(value, list) else value
            setattr(self, key, moved)


# Hooks: what an experiment watches or changes without a change of this code. Settings of train.py list them
# in order: names in HOOKS or path/to/file.py:function. =NUMBER after one sets its last argument. They return
# {label: number}, which goes to metrics.jsonl with the lines of the log, or None.
#
#   update    f(step, params[, number]), in each step before clipping. params: {name: parameter} of those that
#             have a gradient; .grad may be changed in place.
#   forward   f(model[, number]) -> {module: g}, for each line of the log. g(inputs, output) sees a module in
#             an extra forward without gradients, which computes what training would.


def identity(step, params):
    """Changes nothing."""


def clip_by_layer(step, params, largest=1.0):
    """Scales each parameter's gradient down to a norm of `largest`. Logs the share of parameters scaled."""
    norms = torch.stack([p.grad.norm() for p in params.values()])
    scales = (largest / norms.clamp(min=1e-12)).clamp(max=1)
    for p, scale in zip(params.values(), scales):
        p.grad.mul_(scale)
    return {"clipped": (norms > largest).float().mean()}


def gradient_noise(step, params, eta=0.01):
    """Gaussian noise, variance eta / (1 + step)^0.55. Neelakantan et al. 2015, arXiv:1511.06807, sec. 3."""
    std = (eta / (1 + step) ** 0.55) ** 0.5
    for p in params.values():
        p.grad.add_(torch.randn_like(p.grad), alpha=std)
    return {"std": std}


def activation_stats(model):
    """Mean and std of each block's output. Of its MLP: eps, and the share of units off for every token."""
    found = {}
    for block in model.blocks:
        found[block] = lambda inputs, output: {"mean": output.float().mean(), "std": output.float().std()}
        found[block.mlp.down] = functools.partial(mlp_stats, block.mlp.activation.eps)
    return found


def mlp_stats(eps, inputs, output): # of the down projection, which reads the units
    dead = inputs[0].flatten(0, -2).abs().amax(0) < 1e-6 # (..., hidden) -> (hidden,)
    return {"dead": dead.float().mean(), **({} if eps is None else {"eps": eps})}


def stream_stats(model):
    """For residual=hyper or mhc, how far apart a block's streams are. For mhc, of each mixing matrix:

    moved                     mean distance of its entries from their values before training
    row_error, column_error   largest error of a row's and a column's sum, which should be 1
    gain                      largest row or column sum of the product of all mixing matrices up to this one
                              ("Amax", arXiv:2512.24880, section 5)
    """
    # With depths fewer tokens come to each next stage of layers, so each stage has a product of its own.
    stage_of = {block: stage for stage, blocks in enumerate(model.stages) for block in blocks}
    found, products = {}, {} # products: stage -> product of its mixing matrices so far

    def mixing(stage, start, inputs, coefficients):
        res = coefficients[2] # (B, T, N, N)
        products[stage] = res @ products[stage] if stage in products else res
        size = products[stage].abs()
        return {"moved": (res - start).abs().mean(),
                "row_error": (res.sum(-1) - 1).abs().max(), "column_error": (res.sum(-2) - 1).abs().max(),
                "gain": torch.maximum(size.sum(-1).max(), size.sum(-2).max())}

    def apart(inputs, x): # x (B, T, N, C); without streams (B, T, C)
        return {"apart": (x - x.mean(-2, keepdim=True)).norm() / x.norm()} if x.dim() == 4 else {}

    for block in model.blocks:
        found[block] = apart
        for residual in (block.residual1, block.residual2):
            if hasattr(residual, "mixing"):
                found[residual.mixing] = functools.partial(mixing, stage_of[block], mixing_at_start(residual))
    return found


def mixing_at_start(residual):
    """The mixing matrix (1, N, N) before training. Any h gives it, because phi is zero then."""
    phi, b = residual.phi.weight, residual.b
    b = torch.cat([b.new_zeros(2 * residual.N), residual.mixing.start.to(b)])
    h = phi.new_zeros(1, residual.N, residual.C)
    return residual.mixing(h, torch.zeros_like(phi), torch.zeros_like(residual.alpha), b)[2]


HOOKS = {"update": {"identity": identity, "clip_by_layer": clip_by_layer, "gradient_noise": gradient_noise},
         "forward": {"activation_stats": activation_stats, "stream_stats": stream_stats}}


def find_hooks(kind: str, text: str) -> list[tuple[str, Callable]]:
    """[(word, hook)] for the words of a setting. kind: update | forward. ValueError for an unknown hook."""
    return [(word, find_hook(kind, word)) for word in map(str.strip, text.split(",")) if word]


def find_hook(kind, word):
    name, _, number = word.partition("=")
    path, _, function = name.rpartition(":")
    if path and not os.path.isfile(path):
        raise ValueError(f"there is no file {path!r} for the {kind} hook {word!r}")
    known = runpy.run_path(path) if path else HOOKS[kind] # name -> function
    hook = known.get(function)
    if not callable(hook):
        names = ", ".join(k for k, v in known.items() if callable(v) and not k.startswith("_"))
        raise ValueError(f"no {kind} hook {function!r}{' in ' + path if path else ''}; there is: {names}, "
                         "or path/to/file.py:function")
    try:
        last = {list(inspect.signature(hook).parameters)[-1]: float(number)} if number else {}
    except ValueError:
        raise ValueError(f"{kind} hook {word!r}: what follows = must be a number") from None
    return functools.partial(hook, **last)


def run_update_hooks(hooks: list, step: int, params: dict[str, nn.Parameter]) -> dict[str, dict]:
    """{word: {label: number}} of the hooks that return something."""
    params = {name: p for name, p in params.items() if p.grad is not None} # with depths a layer may have none
    with torch.no_grad():
        return {word: result for word, hook in hooks if (result := hook(step, params))}


def watch(model: nn.Module, hooks: list, idx: torch.Tensor, targets: torch.Tensor) -> dict[str, dict]:
    """{word: {module.label: number}} from one forward that leaves gradients and random states as they are."""
    seen, names = {}, {module: name for name, module in model.named_modules()}

    def note(f, into, module, inputs, output): # returns None: the output stays
        into.update({f"{names[module]}.{label}": x for label, x in (f(inputs, output) or {}).items()})

    with contextlib.ExitStack() as handles, torch.no_grad(): # handles are removed also after an error
        for word, hook in hooks:
            for module, f in hook(model).items():
                call = functools.partial(note, f, seen.setdefault(word, {}))
                handles.enter_context(module.register_forward_hook(call))
        with torch.random.fork_rng([idx.device] if idx.is_cuda else []): # dropout draws numbers
            model(idx, targets)
    return seen


def partition(model: nn.Module) -> None:
    """Prints what each parameter is to each optimizer, and the blocks that Adam-mini makes of it."""
    names, total = {p: name for name, p in model.named_parameters()}, 0
    later = {*model.blocks[1:].parameters()} # like those of the first block
    row = "{:<42}{:<15}{:<11}{:<7}{:<34}{}".format
    print(row("parameter", "shape", "role", "decay", "Muon, matrices", "Adam-mini, blocks x weights"))
    for p, d in declarations(model).items():
        blocks = Counter()
        for _, _, count, size in runs(d.blocks, len(p), p[:1].numel()):
            blocks[size] += count
        total += blocks.total() # also of layers that are not printed
        if p in later:
            continue
        matrices = Counter(d.fused if d.role == "matrix" else ())
        muon = " + ".join(f"{n:,} x {(rows, p.size(1))}" for rows, n in matrices.items()) or "AdamW"
        mini = " + ".join(f"{n:,} x {size:,}" for size, n in blocks.items())
        print(row(names[p], str(tuple(p.shape)), d.role, "no" if d.role == "vector" else "yes", muon, mini))
    n = sum(p.numel() for p in names)
    print(f"\n{n:,} parameters, {total:,} blocks: Adam-mini's second moments are {total / n:.2%} of AdamW's")


if __name__ == "__main__":
    from configurator import configure, user_errors
    from model import GPT, GPTConfig, preset, without_orphans

    model_size = "" # a name in PRESETS of model.py; empty: the defaults of GPTConfig
    out_dir = "" # folder of a run, whose model is taken; in a config file it has no effect
    given = configure(globals(), GPTConfig, guest_of=os.path.join(os.path.dirname(__file__), "train.py"))
    with user_errors(), torch.device("meta"):
        sizes = preset(given.pop("model_size", ""))
        partition(GPT(GPTConfig(**{**sizes, **without_orphans(given, given.typed)})))
