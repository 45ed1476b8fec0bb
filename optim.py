"""
Optimizers: AdamW (torch's fused one), FAdam, Adam-mini and Muon, and how a model's parameters are dealt out to them.

Each module of model.py declares what its parameters are; build_optimizer never looks at a name.

  role        who                                 weight decay   with Muon
  matrix      Linear weights inside the blocks    yes            orthogonalised momentum
  embedding   Embedding rows (and a tied head)    yes            AdamW
  head        an untied head                      yes            AdamW
  gate        a few rows that make coefficients   yes            AdamW
  vector      norm gains, biases, lambdas         no             AdamW

All four are ordinary torch.optim.Optimizers: parameter groups, closures, state_dict. None of them reads a value from the
device in step(). FAdam, Adam-mini and Muon are plain loops over tensors: right, not yet fast.
"""
from typing import NamedTuple

import torch

OPTIMIZERS = ("adamw", "fadam", "adam_mini", "muon")


class Declared(NamedTuple):
    """What a parameter is; model.py explains the words."""

    role: str
    fused: tuple # rows of the matrices stacked in it
    blocks: object # None: each row a block; (): one block; else the rows of each block


def declarations(model):
    """{parameter: Declared} for every trained parameter, a shared one once. TypeError if a module declares no role."""
    found = {}
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            if not hasattr(module, "role"):
                raise TypeError(f"{type(module).__name__} ({name}) owns parameters but declares no role; add `role = ...` to the class")
            if p.dim() < 2 or module.role == "vector": # a bias is a vector whatever its matrix is
                found.setdefault(p, Declared("vector", (), ()))
            else:
                found.setdefault(p, Declared(module.role, getattr(module, "fused", (len(p),)), getattr(module, "blocks", None)))
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
    # one fused kernel per group where there is one: 5x the unfused loop on a CPU
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=next(model.parameters()).device.type in ("cuda", "cpu"))


class Base(torch.optim.Optimizer):
    """What the three share: the closure, and one update per parameter that has a gradient."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                self.state[p].setdefault("step", torch.tensor(0.0)) # a CPU tensor, as torch's own optimizers keep it
                self.state[p]["step"] += 1
            self.update(params, group)
        return loss


def rms(x):
    return x.square().mean().sqrt()


class FAdam(Base):
    """
    Hwang 2024, arXiv:2405.12807, algorithm 1: Adam as natural gradient with a diagonal Fisher matrix. The comments carry
    the algorithm's steps. Unlike Adam the momentum is of the natural gradient, and weight decay is preconditioned too: it
    is lr * weight_decay per weight of typical size whatever the weights' own scale, so 0.001 is much. fp32 state.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0, eps=1e-8, eps2=0.01, p=0.5, clip=1.0):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay, eps=eps, eps2=eps2, p=p, clip=clip))

    def update(self, params, group):
        (beta1, beta2), power, clip = group["betas"], group["p"], group["clip"]
        for p in params:
            state, g = self.state[p], p.grad.float()
            if "m" not in state:
                state["m"], state["f"] = torch.zeros_like(g), torch.ones_like(g)
            t, m, f = state["step"].item(), state["m"], state["f"] # a CPU number: nothing waits for the device
            beta2_t = beta2 * (1 - beta2 ** (t - 1)) / (1 - beta2**t) # 0 at t = 1, so f's start does not matter
            f.mul_(beta2_t).addcmul_(g, g, value=1 - beta2_t) # Fisher information
            size = group["eps2"] * rms(g)
            eps = torch.where(size > 0, size.clamp(max=group["eps"]), group["eps"]) # adaptive epsilon; a zero gradient must not give 0/0
            root = f.pow(power).add_(eps ** (2 * power))
            natural = g / root # natural gradient
            natural /= (rms(natural) / clip).clamp(min=1) # clipped to an RMS of `clip`
            m.lerp_(natural, 1 - beta1) # momentum
            step = m
            if group["weight_decay"]:
                decay = p.float() / root # weight decay, natural and clipped alike
                decay /= (rms(decay) / clip).clamp(min=1)
                step = m + group["weight_decay"] * decay
            p.add_(step.to(p.dtype), alpha=-group["lr"])


class AdamMini(Base):
    """
    Zhang et al. 2024, arXiv:2406.16793: AdamW with one second moment per block of weights whose curvature is alike: a head
    of queries or keys, a row of anything else. Groups carry `blocks` (None: rows; (): the tensor; or the rows of each
    block). m in the parameter's dtype, v in fp32.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0, eps=1e-8, blocks=None):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay, eps=eps, blocks=blocks))
        self.owner = {} # parameter -> block of each row; made anew after loading, so no part of the state

    def update(self, params, group):
        (beta1, beta2), blocks = group["betas"], group["blocks"]
        for p in params:
            state, t = self.state[p], None
            mean = self.block_means(p, blocks) # of g^2: (blocks,)
            if "m" not in state:
                state["m"], state["v"] = torch.zeros_like(p), torch.zeros_like(mean)
            t, m, v = state["step"].item(), state["m"], state["v"]
            m.lerp_(p.grad, 1 - beta1)
            v.lerp_(mean, 1 - beta2)
            root = (v / (1 - beta2**t)).sqrt_().add_(group["eps"])
            if blocks != ():
                root = (root if blocks is None else root[self.owner[p]]).view(-1, *[1] * (p.dim() - 1)) # (rows, 1)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.addcdiv_(m, root.to(m.dtype), value=-group["lr"] / (1 - beta1**t))

    def block_means(self, p, blocks):
        squares = p.grad.float().square()
        if blocks == ():
            return squares.mean().view(1)
        rows = squares.flatten(1).mean(1) if p.dim() > 1 else squares
        if blocks is None:
            return rows
        if p not in self.owner:
            if sum(blocks) != len(p):
                raise ValueError(f"blocks of {sum(blocks)} rows do not cover a parameter of {len(p)} rows")
            self.owner[p] = torch.arange(len(blocks)).repeat_interleave(torch.tensor(blocks)).to(p.device)
        sums = torch.zeros(len(blocks), device=p.device).index_add_(0, self.owner[p], rows)
        return sums / torch.tensor(blocks, device=p.device)


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
    x = x / (1.02 * x.norm(dim=(-2, -1), keepdim=True)).clamp(min=1e-7) # 1.02: a norm rounded below the truth would diverge
    for a, b, c in steps:
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).type_as(matrices)


class Muon(Base):
    """
    Jordan 2024: momentum, orthogonalised, for the matrices inside the blocks; AdamW for everything else. Groups carry
    `fused`, the rows of the matrices stacked in each parameter, or () for AdamW. The update of a matrix (n, m) is scaled by
    0.2 sqrt(max(n, m)), which gives it the RMS of AdamW's (Liu et al. 2025, arXiv:2502.16982): one learning rate serves both.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, eps=1e-8, momentum=0.95, steps=POLAR_EXPRESS, fused=()):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay, eps=eps, momentum=momentum, steps=steps, fused=fused))

    def update(self, params, group):
        (self.orthogonal if group["fused"] else self.adamw)(params, group)

    def orthogonal(self, params, group):
        momentum, fused, updates = group["momentum"], group["fused"], []
        for p in params:
            state = self.state[p]
            if "m" not in state:
                state["m"] = torch.zeros_like(p)
            state["m"].lerp_(p.grad, 1 - momentum)
            updates.append(p.grad.lerp(state["m"], momentum)) # Nesterov
        for p in params:
            p.mul_(1 - group["lr"] * group["weight_decay"])
        alike = {} # parts of one shape, from all parameters, in one batched iteration
        for p, u in zip(params, updates):
            for part, piece in zip(p.split(fused), u.split(fused)):
                alike.setdefault(part.shape, []).append((part, piece))
        for (n, m), pairs in alike.items():
            for (part, _), u in zip(pairs, orthogonalise(torch.stack([piece for _, piece in pairs]), group["steps"])):
                part.add_(u, alpha=-group["lr"] * 0.2 * max(n, m) ** 0.5)

    def adamw(self, params, group):
        for p in params:
            state, (beta1, beta2) = self.state[p], group["betas"]
            if "m" not in state:
                state["m"], state["v"] = torch.zeros_like(p), torch.zeros_like(p)
            t, m, v = state["step"].item(), state["m"], state["v"]
            m.lerp_(p.grad, 1 - beta1)
            v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.addcdiv_(m, (v / (1 - beta2**t)).sqrt_().add_(group["eps"]), value=-group["lr"] / (1 - beta1**t))
