"""Operations written close to the machine, each beside its formula and its PyTorch reference.

Read rmsnorm first, the worked example: formula, reference, a Triton kernel for the forward, one for the
backward, and the autograd.Function that ties them together. The other sections have the same parts:
short convolution (without Triton), rotary embedding, activations, the loss of a linear head, residual
streams, Sinkhorn, mHC's coefficients, and last what C does for a CPU (kernels.c).

Which code runs: on a CUDA tensor Triton, on a CPU C where kernels.c has the operation, else plain PyTorch.
Most Functions save their inputs alone and compute the rest again in backward: memory traffic costs more.

i_ index   p_ pointer   g_ gradient of the loss with respect to the name that follows   eps a small number
"""
import collections
import ctypes
import functools
import os
import re
import shlex
import subprocess
import tempfile
import types

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError: # macOS and Windows have none; CUDA tensors then take plain PyTorch
    triton, jit = None, lambda function: function

    class tl: # stands in for the names that the definitions of kernels mention
        constexpr = None

# Triton reads this variable where a kernel is defined: set it before the import.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNEL = "auto" # set by use_kernel
launches = collections.Counter() # (operation, path) -> calls in eager mode: tests see which path ran


# --- which code runs where ----------------------------------------------------------------------------------


def choose_device(name: str) -> tuple[str, str]:
    """(device, the reason) for auto | cpu | cuda | cuda:1 | mps. ValueError if it cannot be used here."""
    if name != "auto":
        try:
            torch.empty(1, device=name)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device={name!r} cannot be used: {str(error).splitlines()[0]}\n"
                             "use --device=auto, or cpu") from None
        return name, "as asked"
    if torch.cuda.is_available():
        return "cuda", "auto: a CUDA GPU is there"
    if torch.backends.mps.is_available():
        return "mps", "auto: no CUDA, but Apple's GPU"
    return "cpu", "auto: no CUDA, no MPS"


def use_kernel(name: str) -> None:
    """auto: Triton on CUDA, C on a CPU, else PyTorch. triton: an error where a device or dtype has none."""
    global KERNEL
    if name not in ("auto", "triton", "torch"):
        raise ValueError(f"kernel={name!r} is none of auto, triton, torch")
    if name == "triton" and triton is None:
        raise ValueError("kernel=triton, but triton is not installed; install it or use kernel=auto")
    if name == "triton" and not (torch.cuda.is_available() or INTERPRETED):
        raise ValueError("kernel=triton needs a CUDA GPU (or TRITON_INTERPRET=1 from the start, slow); "
                         "use kernel=auto")
    KERNEL = name


def path_for(tensor: torch.Tensor, in_c: int | None = None) -> str:
    """The code that an operation on this tensor runs: "triton", "torch" or "c". What fails later raises.

    in_c: None if the operation has no C, else the n_stream of the c_library that holds it.
    """
    fits_triton = tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if KERNEL == "triton":
        if not fits_triton:
            raise RuntimeError(f"kernel=triton computes in fp32, which {tensor.dtype} does not fit; "
                               "use kernel=auto")
        if not (tensor.is_cuda or INTERPRETED):
            raise RuntimeError(f"kernel=triton cannot run on a tensor on {tensor.device}; use kernel=auto")
        return "triton"
    if KERNEL == "torch":
        return "torch"
    if tensor.is_cuda:
        return "triton" if triton is not None and fits_triton else "torch"
    fits_c = tensor.is_cpu and tensor.dtype == torch.float32 and tensor.is_contiguous()
    return "c" if in_c is not None and fits_c and has_c(in_c) else "torch"


@torch.compiler.assume_constant_result # torch.compile calls it, and does not trace how C is compiled
def has_c(n_stream):
    return c_library(n_stream) is not None


def compiler_takes() -> bool:
    """torch.compile fuses a formula with what is around it, so it gets the formula and not the kernel."""
    return KERNEL == "auto" and torch.compiler.is_compiling()


def tally(operation: str, path: str) -> None:
    if not torch.compiler.is_compiling(): # a counter would make it compile again for each new value
        launches[operation, path] += 1


def run(function, *args):
    """A Function's result. Without autograd a stand-in for ctx keeps nothing: apply alone takes 5 us."""
    if torch.is_grad_enabled():
        return function.apply(*args)
    return function.forward(types.SimpleNamespace(save_for_backward=lambda *tensors: None), *args)


def launch(kernel, grid, *args, **options):
    """Launches a Triton kernel on the GPU of its first argument, which need not be the current GPU."""
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **options)


def empty_as(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which x is multiplied by a matrix: autocast's, where that is on."""
    if x.dtype == torch.float64 or x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def cpu_has_bf16() -> bool:
    """Whether the CPU has instructions that multiply bf16. Without them bf16 takes longer than fp32."""
    known = getattr(torch.cpu, "get_capabilities", dict)() # an older torch does not tell
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) # the last: ARM


def widen(x: torch.Tensor) -> torch.Tensor:
    """At least fp32. fp64 stays fp64."""
    return x if x.dtype == torch.float64 else x.float()


# --- RMSNorm, the worked example ----------------------------------------------------------------------------


def rmsnorm(x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6) -> torch.Tensor:
    """y = x r w with r = 1 / sqrt(mean(x^2) + eps), the mean over the last axis. (..., C), (C,) -> (..., C).

    Zhang & Sennrich 2019, arXiv:1910.07467. weight None counts as 1. With g the gradient of y:
        g_x = r (w g - x r^2 mean(w g x))        g_w = sum over rows of g x r
    """
    if x.is_cpu and not compiler_takes(): # one copy of scattered heads costs less than PyTorch's own walks
        x = x.contiguous()
    path = path_for(x, in_c=0) if x.numel() and not compiler_takes() else "torch"
    fits = weight is None or (weight.shape == x.shape[-1:] and weight.dtype == x.dtype
                              and weight.device == x.device and weight.is_contiguous())
    if path == "torch" or not fits: # PyTorch says what is wrong with a shape
        tally("rmsnorm", "torch")
        return rmsnorm_reference(x, weight, eps)
    return run(RMSNormFunction, x, weight, eps, path)


def rmsnorm_reference(x, weight=None, eps=1e-6):
    return F.rms_norm(x, x.shape[-1:], None if weight is None else weight.type_as(x), eps)


# The GPU runs many programs of this kernel at once. `tl.program_id(0)` says which one this is: it handles a
# tile of ROWS rows. BLOCK is the row's C rounded up to a power of two, as Triton wants it. The mask `inside`
# keeps the places beyond C, and those beyond the last row, from being read and written.
@jit
def rmsnorm_forward_kernel(p_x, p_w, p_y, rows, C, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS) # 64 bits: row * C may pass 2^31
    i_c = tl.arange(0, BLOCK)
    at = row[:, None] * C + i_c[None, :] # (ROWS, BLOCK)
    inside = (row < rows)[:, None] & (i_c < C)[None, :]
    x = tl.load(p_x + at, mask=inside, other=0.0).to(tl.float32) # places beyond C add 0 to the sum
    r = tl.rsqrt(tl.sum(x * x, axis=1) / C + eps) # (ROWS,)
    y = x * r[:, None]
    if p_w is not None: # Triton compiles None as a constant: without weights this branch is not there
        y = y * tl.load(p_w + i_c, mask=i_c < C, other=0.0).to(tl.float32)[None, :]
    tl.store(p_y + at, y.to(p_y.dtype.element_ty), mask=inside)


# The gradient of w is a sum over all rows. Each program walks through many tiles, adds up its part of the sum
# and stores it once; PyTorch then adds the parts. Atomic additions would give other bits in every run.
@jit
def rmsnorm_backward_kernel(p_x, p_w, p_g, p_gx, p_sums, rows, C, eps, ROWS: tl.constexpr,
                            BLOCK: tl.constexpr):
    i_c = tl.arange(0, BLOCK)
    sums, w = tl.zeros((ROWS, BLOCK), tl.float32), 1.0 # sums: this program's part of g_w
    if p_w is not None:
        w = tl.load(p_w + i_c, mask=i_c < C, other=0.0).to(tl.float32)[None, :]
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        at = row[:, None] * C + i_c[None, :] # (ROWS, BLOCK)
        inside = (row < rows)[:, None] & (i_c < C)[None, :]
        x = tl.load(p_x + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(p_g + at, mask=inside, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(x * x, axis=1) / C + eps)[:, None] # (ROWS, 1)
        sums += g * (x * r)
        g = g * w
        g_x = r * (g - x * (r * r * (tl.sum(g * x, axis=1)[:, None] / C)))
        tl.store(p_gx + at, g_x.to(p_gx.dtype.element_ty), mask=inside)
    if p_w is not None:
        tl.store(p_sums + tl.program_id(0) * C + i_c, tl.sum(sums, axis=0), mask=i_c < C)


def rmsnorm_tile(C, numbers):
    """A tile of that many numbers, at least one row. Each thread holds numbers / 128 of them."""
    BLOCK = triton.next_power_of_2(C)
    return {"ROWS": max(1, numbers // BLOCK), "BLOCK": BLOCK,
            "num_warps": min(32, max(4, 4 * BLOCK // numbers))}


ROWS = 16 # rows whose part of g_w is summed together in C
PROGRAMS = 1024 # parts of g_w in Triton. All run at once: 132 multiprocessors of an H100 hold 8 each


class RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, path):
        tally("rmsnorm", path)
        x, ctx.eps, ctx.path = x.contiguous(), eps, path
        ctx.save_for_backward(x, weight)
        y, C = empty_as(x), x.size(-1) # (..., C)
        rows = x.numel() // C
        if path == "c":
            c_library(0).rmsnorm_forward(threads(x.numel()), rows, C, eps, *addresses(x, weight, y))
        else:
            tile = rmsnorm_tile(C, 4096)
            programs = triton.cdiv(rows, tile["ROWS"])
            launch(rmsnorm_forward_kernel, (programs,), x, weight, y, rows, C, eps, **tile)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        tally("rmsnorm backward", ctx.path)
        (x, weight), g, in_c = ctx.saved_tensors, g.contiguous(), ctx.path == "c"
        C, g_x, sums = x.size(-1), empty_as(x), None
        rows, tile = x.numel() // C, None if in_c else rmsnorm_tile(C, 1024)
        parts = -(-rows // ROWS) if in_c else min(PROGRAMS, triton.cdiv(rows, tile["ROWS"])) # of the sum g_w
        if weight is not None:
            sums = torch.empty(parts, C, dtype=torch.float32, device=x.device)
        if in_c:
            sizes = threads(x.numel()), rows, C, ctx.eps
            c_library(0).rmsnorm_backward(*sizes, *addresses(x, weight, g, g_x, sums))
        else:
            launch(rmsnorm_backward_kernel, (parts,), x, weight, g, g_x, sums, rows, C, ctx.eps, **tile)
        return g_x, None if sums is None else sums.sum(0).to(weight.dtype), None, None


# --- short convolution --------------------------------------------------------------------------------------


def short_conv(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """y_t = x_t + sum_i w_i x_(t-i), each channel by itself; before the first place x is 0.

    x (B, T, C) and weight (K, C), of one dtype -> (B, T, C). With g the gradient of y:
        g_x_t = g_t + sum_i w_i g_(t+i)        g_w_i = sum over B and t of g_t x_(t-i)
    """
    if compiler_takes() or KERNEL == "torch":
        tally("short_conv", "torch")
        return short_conv_reference(x, weight)
    return run(ShortConvFunction, x, weight)


def short_conv_reference(x, weight):
    K, T = len(weight), x.size(1)
    past = F.pad(x, (0, 0, K - 1, 0)) # (B, K - 1 + T, C)
    return x + sum(w * past[:, K - 1 - i : K - 1 - i + T] for i, w in enumerate(weight))


class ShortConvFunction(torch.autograd.Function):
    """For K = 4 and (8, 128, 128) on a CPU, forward and backward take autograd 790 us, slices 440, C 240."""

    @staticmethod
    def forward(ctx, x, weight):
        x, weight = x.contiguous(), weight.contiguous()
        ctx.path = "c" if x.numel() and path_for(x, in_c=0) == path_for(weight, in_c=0) == "c" else "torch"
        tally("short_conv", ctx.path)
        ctx.save_for_backward(x, weight)
        if ctx.path == "c":
            (B, T, C), y = x.shape, empty_as(x)
            sizes = threads(x.numel()), B * T, T, C, len(weight)
            c_library(0).short_conv_forward(*sizes, *addresses(x, weight, y))
            return y
        y = torch.addcmul(x, x, weight[0])
        for i in range(1, len(weight)): # slices of the result: nothing is padded
            y[:, i:].addcmul_(x[:, :-i], weight[i])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        tally("short_conv backward", ctx.path)
        (x, weight), g = ctx.saved_tensors, g.contiguous()
        (B, T, C), K = x.shape, len(weight)
        if ctx.path == "c":
            g_x, sums = empty_as(x), torch.empty(-(-B * T // ROWS), K, C)
            sizes = threads(x.numel()), B * T, T, C, K
            c_library(0).short_conv_backward(*sizes, *addresses(x, weight, g, g_x, sums))
            return g_x, sums.sum(0)
        g_x, g_w = torch.addcmul(g, g, weight[0]), [(g * x).sum((0, 1))]
        for i in range(1, K):
            g_x[:, :-i].addcmul_(g[:, i:], weight[i])
            g_w.append((g[:, i:] * x[:, :-i]).sum((0, 1)))
        return g_x, torch.stack(g_w)


# --- rotary embedding ---------------------------------------------------------------------------------------


def rope(x: torch.Tensor, positions: torch.Tensor, base: float = 10000.0) -> torch.Tensor:
    """Rotates pair i, (x_2i, x_2i+1), of the token at position m by the angle m base^(-2i/P).

    x (..., T, P), positions (T,) -> (..., T, P). Su et al. 2021, arXiv:2104.09864.
    """
    positions = positions.double() if x.dtype == torch.float64 else positions
    return rotate(x, rope_table(positions, x.size(-1), base))


def rope_table(positions: torch.Tensor, width: int, base: float = 10000.0) -> torch.Tensor:
    """cos and sin for each position and pair: (..., T) -> (..., T, width/2, 2). ValueError for an odd width.

    fp32, because bf16 would confuse positions above 256. fp64 positions give an fp64 table.
    """
    if width % 2:
        raise ValueError(f"a rotary width of {width} leaves a number without its pair; make it even")
    m = widen(positions) # (..., T)
    frequency = base ** (-torch.arange(0, width, 2, device=m.device, dtype=m.dtype) / width) # (width/2,)
    angle = m.unsqueeze(-1) * frequency # (..., T, width/2)
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """x (..., T, P), table (T, P/2, 2) or with axes in front that broadcast -> (..., T, P). Else ValueError.

    There is no C for this: PyTorch's complex product reads and writes each number once already.
    """
    if x.dim() < 2 or table.shape[-3:] != (x.size(-2), x.size(-1) // 2, 2) or x.size(-1) % 2:
        raise ValueError(f"x {tuple(x.shape)} and table {tuple(table.shape)} must be (..., T, P) and "
                         "(..., T, P/2, 2)")
    # The cheap questions come first: decoding a token counts microseconds.
    asked = KERNEL == "triton" or x.is_cuda and not torch.compiler.is_compiling()
    if not asked or not x.numel() or table.dim() > 3 or path_for(x) != "triton":
        tally("rotate", "torch")
        return rotate_reference(x, table)
    return run(Rotate, x, table)


def rotate_reference(x, table):
    wide = x.to(table.dtype)
    if torch.compiler.is_compiling(): # the compiler fuses real numbers, and has no code for complex ones
        (a, b), (cos, sin) = wide.unflatten(-1, (-1, 2)).unbind(-1), table.unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)
    # view_as_complex wants the numbers of a pair side by side, and every other stride and the offset even.
    apart = wide.stride(-1) != 1 or any(n % 2 for n in wide.stride()[:-1])
    if wide.storage_offset() % 2 or not wide.is_contiguous() and apart:
        wide = wide.clone(memory_format=torch.contiguous_format)
    turned = torch.view_as_complex(wide.unflatten(-1, (-1, 2))) * torch.view_as_complex(table)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


# x (A, B, T, P) is read where it lies, with the strides a, b and t. A program rotates HEADS tiles of ROWS
# tokens, each tile at another place of axis B, by one load of the table. It loads pairs side by side, as
# they lie, and splits them in registers. A rotation's transpose is its inverse, so the gradient of x is g
# rotated by minus the angle: sign -1.
@jit
def rotate_kernel(p_x, p_table, p_y, B, T, a, b, t, sign, P: tl.constexpr, HEADS: tl.constexpr,
                  ROWS: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.cdiv(T, ROWS)
    i_a, i_t = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    i_a, i_t, i_p = i_a.to(tl.int64), i_t.to(tl.int64), tl.arange(0, BLOCK)
    inside = (i_t < T)[:, None] & (i_p < P)[None, :] # (ROWS, BLOCK)
    table = tl.load(p_table + i_t[:, None] * P + i_p[None, :], mask=inside, other=0.0)
    cos, sin = tl.split(tl.reshape(table, (ROWS, BLOCK // 2, 2))) # (ROWS, BLOCK/2)
    sin = sign * sin
    for k in tl.static_range(HEADS):
        i_b = tl.program_id(1).to(tl.int64) * HEADS + k
        p_from = p_x + i_a * a + i_b * b + i_t[:, None] * t + i_p[None, :]
        x = tl.load(p_from, mask=inside & (i_b < B), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(x, (ROWS, BLOCK // 2, 2)))
        y = tl.join(first * cos - second * sin, first * sin + second * cos) # (ROWS, BLOCK/2, 2)
        p_to = p_y + ((i_a * B + i_b) * T + i_t[:, None]) * P + i_p[None, :]
        tl.store(p_to, tl.reshape(y, (ROWS, BLOCK)).to(p_y.dtype.element_ty), mask=inside & (i_b < B))


def rotate_triton(x, table, sign):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) # contiguous, however x lies
    x = x if x.dim() == 4 else x.reshape(-1, 1, *x.shape[-2:]) # (A, B, T, P)
    x = x if x.stride(-1) == 1 else x.contiguous() # pairs lie in order
    (A, B, T, P), strides = x.shape, x.stride()[:3]
    BLOCK = triton.next_power_of_2(P)
    ROWS, HEADS = max(1, 2048 // BLOCK), min(4, triton.next_power_of_2(B)) # a tile of 2,048 numbers
    grid = A * triton.cdiv(T, ROWS), triton.cdiv(B, HEADS)
    launch(rotate_kernel, grid, x, table, y, B, T, *strides, sign, P, HEADS, ROWS, BLOCK)
    return y


class Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, table):
        tally("rotate", "triton")
        table = table.contiguous()
        ctx.save_for_backward(table)
        return rotate_triton(x, table, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        tally("rotate backward", "triton")
        return rotate_triton(g, *ctx.saved_tensors, -1.0), None


# --- activations --------------------------------------------------------------------------------------------
# A new one is a row of ACTIVATIONS; it then runs as that formula everywhere. Once `act` knows
# its derivative too, a GPU runs it as one fused kernel forward and one backward.


class ReLU2(torch.autograd.Function):
    """relu(x)^2 with its gradient 2 relu(x) g in one pass. Autograd takes three: 7% of the main job."""

    @staticmethod
    def forward(ctx, x):
        r = x.relu()
        ctx.save_for_backward(r)
        return r * r

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (r,) = ctx.saved_tensors
        return torch.addcmul(g.new_zeros(()), g, r, value=2)


def relu2(x, eps):
    return x.relu().square() if torch.compiler.is_compiling() else run(ReLU2, x)


def telu(x, eps):
    # From x = 88.8 on the textbook's derivative is inf * 0. Beyond these bounds nothing changes, because tanh
    # is 1 from 10 on and e^x is 0 below -700, in fp64 too. clamp passes no gradient there.
    return x * x.clamp(-700, 10).exp().tanh()


def crrelu(x, eps):
    c = x.clamp(-40, 40) # beyond, e^(-x^2 / 2) is 0 in fp64 too, and x^2 could be inf
    return x.relu() + eps * c * (-c.square() / 2).exp()


ACTIVATIONS = {
    "gelu_tanh": lambda x, eps: F.gelu(x, approximate="tanh"), # as GPT-2 has it; up to 5e-4 from gelu
    "gelu": lambda x, eps: F.gelu(x), # Hendrycks & Gimpel 2016, arXiv:1606.08415, with erf
    "relu2": relu2, # So et al. 2021, arXiv:2109.08668
    "silu": lambda x, eps: F.silu(x), # Elfwing et al. 2017, arXiv:1702.03118
    "telu": telu, # x tanh(e^x). Fernandez & Mali 2024, arXiv:2412.20269
    "crrelu": crrelu, # relu(x) + eps x e^(-x^2 / 2), eps learned. Sun et al. 2024, arXiv:2405.12954
}
IN_TRITON = ("gelu", "gelu_tanh", "relu2", "silu", "telu", "crrelu") # the names that `act` knows


def activate(x: torch.Tensor, name: str, eps: torch.Tensor | None = None) -> torch.Tensor:
    """act(x), of any shape. name: a row of ACTIVATIONS. eps: one number as a tensor (), for crrelu alone.

    fp32 inside, fp64 for fp64, the result in x's dtype. ValueError for an unknown name or a wrong eps.
    """
    return activation(x, None, name, eps, paired=False)


def gated(gate: torch.Tensor, up: torch.Tensor, name: str, eps: torch.Tensor | None = None) -> torch.Tensor:
    """act(gate) * up, of equal shape, dtype and device; else ValueError. Shazeer 2020, arXiv:2002.05202."""
    if (gate.shape, gate.dtype, gate.device) != (up.shape, up.dtype, up.device):
        raise ValueError(f"gate and up differ: {tuple(gate.shape)} {gate.dtype} on {gate.device}, "
                         f"{tuple(up.shape)} {up.dtype} on {up.device}")
    return activation(gate, up, name, eps, paired=False)


def gated_pair(x: torch.Tensor, name: str, eps: torch.Tensor | None = None) -> torch.Tensor:
    """act(gate) * up of both side by side, (..., 2 F) -> (..., F): one matrix makes both."""
    if x.size(-1) % 2:
        raise ValueError(f"x {tuple(x.shape)} must have two halves, gate and up")
    return activation(x, None, name, eps, paired=True)


def activation(x, up, name, eps, paired):
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r} is none of {', '.join(ACTIVATIONS)}")
    if (name == "crrelu") != (eps is not None):
        needs = "needs its eps, a tensor ()" if eps is None else "has no eps; only crrelu does"
        raise ValueError(f"activation={name} {needs}")
    if eps is not None and (eps.dim() != 0 or eps.device != x.device):
        raise ValueError(f"crrelu's eps is one number on {x.device}: a tensor (), "
                         f"not {tuple(eps.shape)} on {eps.device}")
    path = "torch" if not x.numel() or compiler_takes() else path_for(x)
    label = "gated " + name if paired or up is not None else name
    if path == "torch" or not known_to_triton(name):
        tally(label, "torch")
        return activation_reference(*(x.chunk(2, dim=-1) if paired else (x, up)), name, eps)
    return run(Activation, x, up, eps, name, paired, label)


def activation_reference(x, up, name, eps):
    y = ACTIVATIONS[name](widen(x), eps)
    return (y if up is None else y * widen(up)).to(x.dtype)


@functools.cache # once for each name
def known_to_triton(name):
    if name not in IN_TRITON:
        print(f"activation={name} is in ACTIVATIONS but in no kernel: it runs as plain PyTorch")
    return name in IN_TRITON


# The guards keep every finite x from giving NaN: whatever could be infinite meets 1 / or a factor of 0.
@jit
def act(x, eps, NAME: tl.constexpr):
    """act(x), act'(x), and the derivative by eps."""
    bump = x * 0.0
    if NAME == "gelu":
        phi = 0.5 * (1 + tl.erf(x * 0.7071067811865476)) # the normal distribution function
        y, slope = x * phi, phi + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif NAME == "gelu_tanh": # (1 + tanh(z / 2)) / 2 = sigmoid(z), without its cancellation
        c = tl.where(x > 20, 20.0, tl.where(x < -20, -20.0, x)) # beyond, s is 1 or 0 and x^3 may be inf
        z = 1.5957691216057308 * (c + 0.044715 * c * c * c)
        s, rest = 1 / (1 + tl.exp(-z)), 1 / (1 + tl.exp(z)) # rest: 1 - s
        y, slope = x * s, s + s * rest * c * (1.5957691216057308 + 0.21406445 * c * c)
    elif NAME == "relu2":
        r = tl.where(x < 0, 0.0, x) # NaN stays NaN
        y, slope = r * r, 2 * r
    elif NAME == "silu":
        s = 1 / (1 + tl.exp(-x)) # sigmoid
        y, slope = x * s, s + s * (1 - s) * x
    elif NAME == "telu":
        # With u = e^x and q = e^-2u neither tanh(u) = (1 - q) / (1 + q) nor its slope overflows. A polynomial
        # takes over where 1 - q would cancel. From x = 3.7 on tanh(u) is 1 to fp32, so x is held there.
        c = tl.where(x > 3.7, 3.7, x)
        u = tl.exp(c)
        q, z = tl.exp(-2 * u), tl.where(u < 0.625, u * u, 0.0)
        p = -0.33333269 + z * (0.13331091 + z * (-0.053709645 + z * (0.020538783 - z * 0.005590975)))
        t = tl.where(u < 0.625, u + u * (z * p), (1 - q) / (1 + q))
        y, slope = x * t, t + u * (4 * q / ((1 + q) * (1 + q))) * c
    else:
        tl.static_assert(NAME == "crrelu", "an activation without a formula here")
        c = tl.where(x > 20, 20.0, tl.where(x < -20, -20.0, x)) # beyond, e is 0 and x^2 may be inf
        e = tl.exp(-0.5 * c * c)
        bump = c * e # d/d eps, for eps's own gradient
        y = tl.where(x < 0, 0.0, x) + eps * bump
        slope = tl.where(x > 0, 1.0, 0.0) + eps * (1 - c * c) * e
    return y, slope, bump


# gate and up are two tensors, and F is 0; or they are the halves, F wide, of each row of one tensor. p_up is
# None without a gate. Element i of the result has its gate j places behind p_gate and its up j behind p_up.
# p_g None: forward. Else p_g is the gradient of the result, and the kernel stores those of gate, up and eps.
@jit
def activation_kernel(p_gate, p_up, p_eps, p_y, p_g, p_ggate, p_gup, p_sums, n, F: tl.constexpr,
                      NAME: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK) # (BLOCK,) elements of the result
    j = i + i // F * F if F > 0 else i
    inside, eps = i < n, 0.0
    if p_eps is not None:
        eps = tl.load(p_eps).to(tl.float32)
    y, slope, bump = act(tl.load(p_gate + j, mask=inside, other=0.0).to(tl.float32), eps, NAME) # (BLOCK,)
    if p_g is None:
        if p_up is not None:
            y = y * tl.load(p_up + j, mask=inside, other=0.0).to(tl.float32)
        tl.store(p_y + i, y.to(p_y.dtype.element_ty), mask=inside)
    else:
        g = tl.load(p_g + i, mask=inside, other=0.0).to(tl.float32)
        if p_up is not None:
            tl.store(p_gup + j, (g * y).to(p_gup.dtype.element_ty), mask=inside) # g_up = g act(gate)
            g = g * tl.load(p_up + j, mask=inside, other=0.0).to(tl.float32)
        tl.store(p_ggate + j, (g * slope).to(p_ggate.dtype.element_ty), mask=inside)
        if p_eps is not None: # a sum for each program, added up in one order afterwards
            tl.store(p_sums + tl.program_id(0), tl.sum(g * bump, axis=0))


class Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, up, eps, name, paired, label):
        tally(label, "triton")
        x, up = x.contiguous(), None if up is None else up.contiguous()
        ctx.name, ctx.label, ctx.F = name, label, x.size(-1) // 2 if paired else 0
        ctx.save_for_backward(x, up, eps)
        y = torch.empty((*x.shape[:-1], ctx.F) if paired else x.shape, dtype=x.dtype, device=x.device)
        up = x[..., ctx.F:] if paired else up
        launch(activation_kernel, (triton.cdiv(y.numel(), 1024),), x, up, eps, y, None, None, None, None,
               y.numel(), ctx.F, name, 1024)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        tally(ctx.label + " backward", "triton")
        (x, up, eps), g = ctx.saved_tensors, g.contiguous()
        programs = triton.cdiv(g.numel(), 1024)
        g_x, g_up = empty_as(x), None if up is None else empty_as(up)
        sums = None if eps is None else torch.empty(programs, dtype=torch.float32, device=x.device)
        halves = (x[..., ctx.F:], g_x[..., ctx.F:]) if ctx.F else (up, g_up)
        launch(activation_kernel, (programs,), x, halves[0], eps, None, g, g_x, halves[1], sums, g.numel(),
               ctx.F, ctx.name, 1024)
        return g_x, g_up, None if eps is None else sums.double().sum().to(eps.dtype), None, None, None


# --- the loss of a linear head, without all its logits in memory --------------------------------------------


def linear_cross_entropy(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
                         cap: float = 0.0) -> torch.Tensor:
    """The mean of -log softmax(z)[target] with z = x W^T, or z = cap tanh(x W^T / cap).

    x (..., C), weight (V, C), targets (...) int64, where -1 is ignored -> () in nats, fp32 (fp64 for fp64),
    nan if all are ignored. It equals F.cross_entropy of F.linear, autocast included, but holds the logits of
    a few rows at a time. The gradient of z, (softmax - onehot) / count, needs nothing that comes later. So
    the forward makes both gradients and the backward scales them in place; a second backward of one graph is
    refused. The idea is Liger Kernel's (Hsu et al. 2024, arXiv:2410.10989). ValueError for what does not fit;
    a target outside [-1, V) is an error in PyTorch and makes Triton's loss nan.

    torch 2.13's chunked F.linear_cross_entropy takes as long for as much memory, but knows no cap, and rounds
    the loss of bf16 inputs to bf16: off by 0.003 nats.
    """
    if x.shape[:-1] != targets.shape or weight.dim() != 2 or x.size(-1) != weight.size(1):
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, weight, targets))
        raise ValueError(f"x, weight and targets {shapes} must be (..., C), (V, C) and (...)")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets are {targets.dtype}, and must be int64: give targets.long()")
    if not x.device == weight.device == targets.device:
        raise ValueError(f"x, weight and targets lie on {x.device}, {weight.device} and {targets.device}; "
                         "bring them together")
    # A few MB of logits are no burden, and PyTorch's two calls are then up to 1.2 times as fast.
    if not targets.numel() or KERNEL == "auto" and targets.numel() * weight.size(0) <= CROSS_ENTROPY_SMALL:
        tally("linear_cross_entropy", "torch, whole")
        return linear_cross_entropy_reference(x, weight, targets, cap)
    return cross_entropy_in_chunks(x, weight, targets, cap)


CROSS_ENTROPY_SMALL = 2**20 # logits
CROSS_ENTROPY_CHUNK = 12 * 2**20 # logits at a time, 48 MB: with 16 MB matrix products take 1.2 times as long
# On CUDA: 0.5 GB in bf16. 16,384 x 768 x 50,304 then take an H100 8.0 ms, and 22.4 ms with the CPU's chunks.
CROSS_ENTROPY_CHUNK_CUDA = 2**28
CROSS_ENTROPY_PADDED = 1024 # smallest vocabulary that is padded: up to 127 columns more work


def linear_cross_entropy_reference(x, weight, targets, cap=0.0):
    z = widen(F.linear(x, weight))
    z = cap * torch.tanh(z / cap) if cap else z
    return F.cross_entropy(z.flatten(0, -2), targets.flatten(), ignore_index=-1)


@torch._disable_dynamo # torch.compile stops here: unrolled it would be a graph of hundreds of chunks
def cross_entropy_in_chunks(x, weight, targets, cap):
    V = weight.size(0)
    if x.is_cpu and not -1 <= targets.min() <= targets.max() < V:
        raise ValueError(f"targets {targets.min()} to {targets.max()} are not all in [-1, {V}); "
                         "-1 is ignored")
    if product_dtype(weight) != product_dtype(x):
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}; give both one dtype, or use autocast")
    needs = [torch.is_grad_enabled() and t.requires_grad for t in (x, weight)] # which gradients to make
    return LinearCrossEntropy.apply(x, weight, targets, cap, needs)


def cross_entropy_torch(z, targets, losses, gradient):
    """z (rows, V) -> losses (rows,). `gradient`: z becomes softmax(z) - onehot, 0 for an ignored target."""
    kept, at = (targets >= 0).unsqueeze(1), targets.clamp(min=0).unsqueeze(1) # (rows, 1)
    torch.log_softmax(z, dim=1, out=z)
    losses.copy_(torch.where(kept, -z.gather(1, at), 0.0).squeeze(1)) # 0 where ignored
    if gradient:
        z.exp_().scatter_add_(1, at, -torch.ones_like(z[:, :1]))
        if not z.is_cpu or not kept.all(): # only a CPU can ask without waiting
            z.mul_(kept)


# A program handles one row: it walks through the V logits once for their sum, keeping in each lane the sum
# relative to the largest logit so far, and once more for the gradient. A row takes up `width` places; those
# from V on are padding. Masks compare with the width, not with V: Triton loads several numbers at once only
# where it knows that their masks are equal, which follows from a width divisible by 16.
@jit
def cross_entropy_kernel(p_z, p_target, p_loss, V, width, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    row, i_v = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    target = tl.load(p_target + row) # one number
    p_z += row * width
    most, sums = -float("inf"), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        z = tl.load(p_z + start + i_v, mask=start + i_v < width, other=-float("inf")).to(tl.float32)
        z = tl.where(start + i_v < V, z, -float("inf"))
        higher = tl.maximum(most, tl.max(z, axis=0)) # one number, for all lanes
        sums = sums * tl.exp(most - higher) + tl.exp(z - higher) # rescaled to the new largest
        most = higher
    total = tl.sum(sums, axis=0) # sum of e^(z - most) over the row
    # A target outside the vocabulary gives nan instead of whatever lies at that address.
    z_target = tl.load(p_z + target, mask=(target >= 0) & (target < V), other=float("nan")).to(tl.float32)
    tl.store(p_loss + row, tl.where(target == -1, 0.0, tl.log(total) + most - z_target))
    if GRADIENT:
        tl.debug_barrier() # all threads have read the target's logit
        for start in range(0, width, BLOCK):
            inside = start + i_v < width
            z = tl.load(p_z + start + i_v, mask=inside, other=0.0).to(tl.float32)
            g = tl.exp(z - most) / total - tl.where(start + i_v == target, 1.0, 0.0)
            g = tl.where((target == -1) | (start + i_v >= V), 0.0, g)
            tl.store(p_z + start + i_v, g.to(p_z.dtype.element_ty), mask=inside)


def pad_vocabulary(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """weight (V, C) in dtype, for a GPU: with rows of zeros up to a multiple of 128, unless V is small or a
    multiple of 16. Each row of logits then begins at a multiple of 16 bytes, as tensor cores and vector loads
    want it. Without padding the loss of V = 50,257 took an H100 34.6 ms, that of 50,304 took 8.0.
    """
    V, C = weight.shape
    if V % 16 == 0 or V < CROSS_ENTROPY_PADDED:
        return weight.to(dtype)
    w = torch.zeros(round_up(V, 128), C, dtype=dtype, device=weight.device)
    w[:V].copy_(weight)
    return w


def logits_to_gradient(z, V, targets, losses, cap, path, gradient):
    """z (rows, width), overwritten -> its gradient, in its dtype, 0 from column V on."""
    # Triton widens each number by itself, PyTorch a whole copy.
    wide = z if path == "triton" and not cap else z.to(losses.dtype)
    if cap:
        t = wide.div_(cap).tanh_()
        wide = cap * t
    if path == "triton":
        rows, width = wide.shape
        block = min(4096, triton.next_power_of_2(width))
        launch(cross_entropy_kernel, (rows,), wide, targets, losses, V, width, gradient, block)
    else:
        cross_entropy_torch(wide, targets, losses, gradient)
    if cap and gradient:
        wide.mul_(t.square_().neg_().add_(1)) # through cap tanh: 1 - tanh^2
    return wide.to(z.dtype)


def add_product(total, a, b):
    """total += a b. The sum is in fp32; a CPU rounds each product to a's dtype first."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda: # the product goes into the sum without a place in memory of its own
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(a @ b)


def rows_of_a_chunk(rows, width, cuda):
    limit, multiple = (CROSS_ENTROPY_CHUNK_CUDA, 256) if cuda else (CROSS_ENTROPY_CHUNK, 1)
    chunks = max(1, -(-rows * width // limit)) # rounded up
    return min(rows, round_up(-(-rows // chunks), multiple))


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, cap, needs):
        dtype, path = product_dtype(x), path_for(weight)
        tally("linear_cross_entropy", path)
        rows, (V, C), device = targets.numel(), weight.shape, x.device
        wide, targets = torch.promote_types(dtype, torch.float32), targets.reshape(-1).contiguous() # (rows,)
        x_ = x.reshape(rows, C).to(dtype)
        w = pad_vocabulary(weight, dtype) if path == "triton" else weight.to(dtype) # (width, C)
        width, each = len(w), rows_of_a_chunk(rows, len(w), x.is_cuda)
        logits = torch.empty(each, width, dtype=dtype, device=device)
        losses = torch.empty(rows, dtype=wide, device=device)
        g_x = empty_as(x_) if needs[0] else None
        g_w = torch.zeros(width, C, dtype=wide, device=device) if needs[1] else None
        for part in (slice(i, i + each) for i in range(0, rows, each)):
            z = torch.mm(x_[part], w.t(), out=logits[: len(x_[part])]) # (rows of the chunk, width)
            z = logits_to_gradient(z, V, targets[part], losses[part], cap, path, any(needs))
            if needs[0]:
                torch.mm(z, w, out=g_x[part])
            if needs[1]:
                add_product(g_w, z.t(), x_[part])
        g_w = g_w[:V] if needs[1] else None
        count = (targets != -1).sum() # targets that are not ignored
        ctx.save_for_backward(g_x, g_w, count)
        ctx.like, ctx.used = (x.shape, x.dtype, weight.dtype), False
        return losses.sum() / count # nan where all targets are ignored

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        if ctx.used:
            raise RuntimeError("linear_cross_entropy has given its gradients away; for a second backward run "
                               "the forward again")
        ctx.used = True
        g_x, g_w, count = ctx.saved_tensors
        shape, *dtypes = ctx.like
        scale = g / count.clamp(min=1) # here and not in the forward, where fp16 would underflow at 1 / count
        g_x, g_w = (None if t is None else t.mul_(scale).to(d) for t, d in zip((g_x, g_w), dtypes))
        return None if g_x is None else g_x.view(shape), g_w, None, None, None


# --- residual streams: reading a sublayer's input from N of them, and writing its output back ---------------


def read_streams(x: torch.Tensor, pre: torch.Tensor) -> torch.Tensor:
    """u = sum_i pre_i x_i: x (..., N, C), pre (..., N) -> (..., C). ValueError for other shapes.

    Zhu et al. 2024, arXiv:2409.19606; mHC: Xie et al. 2025, arXiv:2512.24880.
    """
    if x.dim() < 2 or pre.shape != x.shape[:-1]:
        raise ValueError(f"read_streams takes x (..., N, C) and pre (..., N), "
                         f"not {tuple(x.shape)} and {tuple(pre.shape)}")
    return operate("read_streams", streams_path(x, pre), x, pre)


def read_streams_reference(x, pre):
    return (pre.type_as(x).unsqueeze(-2) @ x).squeeze(-2)


def write_streams(x: torch.Tensor, y: torch.Tensor, post: torch.Tensor, res: torch.Tensor) -> torch.Tensor:
    """x'_o = sum_i res_oi x_i + post_o y. ValueError for shapes that do not fit.

    x (..., N, C), y (..., C), post (..., N), res (..., N, N) [out, in] -> (..., N, C).
    """
    shapes = [tuple(t.shape) for t in (x, y, post, res)]
    *front, N, C = shapes[0] if x.dim() > 1 else (0, 0)
    if shapes != [(*front, N, C), (*front, C), (*front, N), (*front, N, N)]:
        raise ValueError("write_streams takes x (..., N, C), y (..., C), post (..., N) and res (..., N, N), "
                         f"not {', '.join(map(str, shapes))}")
    return operate("write_streams", streams_path(x, y, post, res), x, y, post, res)


def write_streams_reference(x, y, post, res):
    return res.type_as(x) @ x + post.type_as(x).unsqueeze(-1) * y.unsqueeze(-2)


def streams_path(x, *others):
    """The path for x (..., N, C). The other tensors are small or fresh: a copy puts them in order."""
    if any(t.device != x.device for t in others): # a kernel would read addresses of another GPU
        raise ValueError(f"tensors on {', '.join(str(t.device) for t in (x, *others))}: bring them together")
    path = path_of_width(x, x.size(-2))
    return path if path != "c" or all(t.dtype == torch.float32 for t in others) else "torch"


def path_of_width(x, width):
    for n in (2, 4, 8): # n is a number even where torch.compile knows the width by a symbol alone
        if n == width and x.numel():
            return path_for(x, in_c=n)
    return "torch"


# A program is one warp. It handles one token and walks through its channels in blocks, 32 numbers of x for
# each thread at a time. Sums over streams stay within a thread and sums over channels within the warp, so no
# thread waits at a barrier. p_g None: forward, else the kernel makes the gradients of its inputs.
@jit
def read_kernel(p_x, p_pre, p_u, p_g, p_gx, p_gpre, C, N: tl.constexpr, BLOCK: tl.constexpr):
    t, i_n = tl.program_id(0).to(tl.int64), tl.arange(0, N) # the token; its streams (N,)
    pre = tl.load(p_pre + t * N + i_n).to(tl.float32)
    g_pre = tl.zeros((N,), tl.float32) # summed over the channels
    for start in range(0, C, BLOCK):
        i_c = start + tl.arange(0, BLOCK)
        at, inside = t * N * C + i_n[:, None] * C + i_c[None, :], (i_c < C)[None, :]
        x = tl.load(p_x + at, mask=inside, other=0.0).to(tl.float32) # (N, BLOCK)
        if p_g is None:
            u = tl.sum(pre[:, None] * x, axis=0) # (BLOCK,)
            tl.store(p_u + t * C + i_c, u.to(p_u.dtype.element_ty), mask=i_c < C)
        else:
            g = tl.load(p_g + t * C + i_c, mask=i_c < C, other=0.0).to(tl.float32)
            g_pre += tl.sum(x * g[None, :], axis=1)
            tl.store(p_gx + at, (pre[:, None] * g[None, :]).to(p_gx.dtype.element_ty), mask=inside)
    if p_g is not None:
        tl.store(p_gpre + t * N + i_n, g_pre.to(p_gpre.dtype.element_ty))


# Tiles are (out, in, channel) here; an operand without one of these axes has a 1 in its place. All operands
# then share one layout of registers, and no product moves numbers between threads.
@jit
def write_kernel(p_x, p_y, p_post, p_res, p_out, p_g, p_gx, p_gy, p_gpost, p_gres, C, N: tl.constexpr,
                 BLOCK: tl.constexpr):
    t, i_n = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    i_out, i_in = i_n[:, None, None], i_n[None, :, None]
    post = tl.load(p_post + t * N + i_out).to(tl.float32) # (N, 1, 1)
    res = tl.load(p_res + t * N * N + i_out * N + i_in).to(tl.float32) # (N, N, 1)
    g_post, g_res = tl.zeros((N, 1, 1), tl.float32), tl.zeros((N, N, 1), tl.float32)
    for start in range(0, C, BLOCK):
        i_c = start + tl.arange(0, BLOCK)[None, None, :]
        x = tl.load(p_x + t * N * C + i_in * C + i_c, mask=i_c < C, other=0.0).to(tl.float32) # (1, N, BLOCK)
        if p_g is None:
            y = tl.load(p_y + t * C + i_c, mask=i_c < C, other=0.0).to(tl.float32) # (1, 1, BLOCK)
            out = tl.sum(res * x, axis=1, keep_dims=True) + post * y # (N, 1, BLOCK)
            tl.store(p_out + t * N * C + i_out * C + i_c, out.to(p_out.dtype.element_ty), mask=i_c < C)
        else:
            g = tl.load(p_g + t * N * C + i_out * C + i_c, mask=i_c < C, other=0.0).to(tl.float32)
            y = tl.load(p_y + t * C + i_c, mask=i_c < C, other=0.0).to(tl.float32) # (1, 1, BLOCK)
            g_x = tl.sum(res * g, axis=0, keep_dims=True) # (1, N, BLOCK): res^T g
            tl.store(p_gx + t * N * C + i_in * C + i_c, g_x.to(p_gx.dtype.element_ty), mask=i_c < C)
            g_y = tl.sum(post * g, axis=0, keep_dims=True) # (1, 1, BLOCK)
            tl.store(p_gy + t * C + i_c, g_y.to(p_gy.dtype.element_ty), mask=i_c < C)
            g_res += tl.sum(g * x, axis=2, keep_dims=True)
            g_post += tl.sum(g * y, axis=2, keep_dims=True)
    if p_g is not None:
        tl.store(p_gpost + t * N + i_out, g_post.to(p_gpost.dtype.element_ty))
        tl.store(p_gres + t * N * N + i_out * N + i_in, g_res.to(p_gres.dtype.element_ty))


def streams(path, tensors, out, g=None):
    """Reads (x, pre) or writes (x, y, post, res) into `out`; or of its gradient g the tensors' gradients."""
    x, reading = tensors[0], len(tensors) == 2
    N, C = x.shape[-2:]
    tokens = x.numel() // (N * C) # programs of the grid
    gradients = [None if g is None else empty_as(t) for t in tensors]
    if path == "c":
        name = ("read" if reading else "write") + ("_forward" if g is None else "_backward")
        others = (out,) if g is None else (g, *gradients)
        getattr(c_library(N), name)(threads(x.numel()), tokens, C, *addresses(*tensors, *others))
    else:
        # Channels of a tile. Each of the 32 threads has at least 4, so that it loads 8 bytes at a time.
        kernel, block = (read_kernel, max(128, 512 // N)) if reading else (write_kernel, 1024 // N)
        launch(kernel, (tokens,), *tensors, out, g, *gradients, C, N, block, num_warps=1)
    return gradients


def streams_forward(path, iters, eps, tensors):
    x = tensors[0]
    shape = (*x.shape[:-2], x.size(-1)) if len(tensors) == 2 else x.shape
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    streams(path, tensors, out)
    return (out,), ()


def streams_backward(path, iters, eps, tensors, saved, g):
    return streams(path, tensors, None, *g)


# --- Sinkhorn: logits -> a doubly stochastic matrix, the mixing of mHC's streams ----------------------------

SINKHORN_EPS = 1e-6 # DeepSeek's: it keeps every entry above 0 and every division finite


def sinkhorn(logits: torch.Tensor, iters: int = 20) -> torch.Tensor:
    """logits (..., n, n) -> H (..., n, n) [out, in], nearly doubly stochastic. ValueError for other shapes.

        M = softmax(logits over out) + eps;  M /= sum over in + eps
        then iters - 1 times:  M /= sum over out + eps;  M /= sum over in + eps

    Rows are normalised last, so each output is a convex mix whatever iters is. Columns sum to 1 only when it
    has converged, which large logits never do in 20 iterations. Sinkhorn & Knopp 1967; Xie et al. 2025; order
    and eps are those of DeepSeek-V4, whose comb is H^T. The gradient is that of the iterations done, not of
    the limit. fp32 inside, fp64 for fp64. Kernels exist for n = 2, 4 and 8.
    """
    if logits.dim() < 2 or logits.shape[-1] != logits.shape[-2]:
        raise ValueError(f"sinkhorn takes square matrices (..., n, n), not {tuple(logits.shape)}")
    if iters < 1:
        raise ValueError(f"sinkhorn needs iters >= 1, not {iters}")
    return operate("sinkhorn", path_of_width(logits, logits.size(-1)), logits, iters=iters)


def sinkhorn_reference(logits, iters=20):
    m = widen(logits).softmax(-2) + SINKHORN_EPS # (..., out, in)
    m = m / (m.sum(-1, keepdim=True) + SINKHORN_EPS)
    for _ in range(iters - 1):
        m = m / (m.sum(-2, keepdim=True) + SINKHORN_EPS)
        m = m / (m.sum(-1, keepdim=True) + SINKHORN_EPS)
    return m.to(logits.dtype)


# A program is one warp, 32 threads. It handles BLOCK matrices side by side, as a tile (N, BLOCK, N) of [out,
# matrix, in]. Triton deals a tile out to the threads from its last axis on. With the matrices in the middle a
# thread holds whole matrices (half a matrix at N = 8), so sums of rows and columns need no other thread.
@jit
def matrices(i_matrix, count, apart, N: tl.constexpr):
    """Places and mask of a tile (N, BLOCK, N). The first numbers of two matrices lie `apart` in memory."""
    i_n = tl.arange(0, N)
    at = i_n[:, None, None] * N + i_matrix[None, :, None] * apart + i_n[None, None, :]
    return at, (i_matrix < count)[None, :, None]


@jit
def softmax_out(x):
    e = tl.exp(x - tl.max(x, axis=0)[None, :, :]) # no overflow: the largest is 1
    return e / tl.sum(e, axis=0)[None, :, :]


@jit
def iterate(x, iters, EPS: tl.constexpr):
    m = softmax_out(x) + EPS # (N, BLOCK, N) [out, matrix, in]
    m = m * (1 / (tl.sum(m, axis=2) + EPS))[:, :, None] # rows sum to 1; one division a row
    for _ in range(1, iters):
        m = m * (1 / (tl.sum(m, axis=0) + EPS))[None, :, :] # columns, then rows again
        m = m * (1 / (tl.sum(m, axis=2) + EPS))[:, :, None]
    return m


@jit
def iterate_back(x, g, p_scratch, iters, EPS: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    """The logits x and the gradient g of H -> the gradient of the logits.

    A division y = x / s with s = sum(x) + EPS has the gradient g_x = (g_y - sum(g_y y)) / s. Backward needs y
    and s of every division, the last one first. A loop cannot keep them all in registers: one loop runs the
    iterations again and stores each s in memory, a second loop loads it and finds the earlier x = y s.
    """
    p = softmax_out(x)
    # Memory of this program, for each iteration: sums of columns (BLOCK, N), then sums of rows (N, BLOCK)
    p_scratch += tl.program_id(0).to(tl.int64) * (2 * iters * BLOCK * N)
    i_n, i_matrix = tl.arange(0, N), tl.arange(0, BLOCK)
    p_columns = p_scratch + i_matrix[:, None] * N + i_n[None, :]
    p_rows = p_scratch + BLOCK * N + i_n[:, None] * BLOCK + i_matrix[None, :]
    y = p + EPS # (N, BLOCK, N)
    for i in range(iters):
        if i > 0:
            columns = tl.sum(y, axis=0) + EPS # (BLOCK, N)
            tl.store(p_columns + 2 * i * (BLOCK * N), columns)
            y = y * (1 / columns)[None, :, :]
        rows = tl.sum(y, axis=2) + EPS # (N, BLOCK)
        tl.store(p_rows + 2 * i * (BLOCK * N), rows)
        y = y * (1 / rows)[:, :, None]
    tl.debug_barrier() # a thread may load what another one stored
    for j in range(iters):
        i = iters - 1 - j
        rows = tl.load(p_rows + 2 * i * (BLOCK * N))
        g = (g - tl.sum(g * y, axis=2)[:, :, None]) * (1 / rows)[:, :, None]
        y = y * rows[:, :, None] # the iterate before this division
        if i > 0:
            columns = tl.load(p_columns + 2 * i * (BLOCK * N))
            g = (g - tl.sum(g * y, axis=0)[None, :, :]) * (1 / columns)[None, :, :]
            y = y * columns[None, :, :]
    return p * (g - tl.sum(g * p, axis=0)[None, :, :]) # back through the softmax


@jit
def sinkhorn_kernel(p_x, p_g, p_out, p_scratch, count, iters, EPS: tl.constexpr, N: tl.constexpr,
                    BLOCK: tl.constexpr):
    """The logits -> H, or where its gradient is given, the logits' gradient."""
    i_matrix = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK) # (BLOCK,)
    at, inside = matrices(i_matrix, count, N * N, N)
    x = tl.load(p_x + at, mask=inside, other=0.0).to(tl.float32)
    if p_g is None:
        out = iterate(x, iters, EPS)
    else:
        g = tl.load(p_g + at, mask=inside, other=0.0).to(tl.float32)
        out = iterate_back(x, g, p_scratch, iters, EPS, N, BLOCK)
    tl.store(p_out + at, out.to(p_out.dtype.element_ty), mask=inside)


def tiles(count, n):
    """(number of programs, BLOCK): a warp handles 32 matrices, or 16 of 8 x 8."""
    block = 32 if n < 8 else 16
    return -(-count // block), block


def scratch_c(n, iters):
    """Memory of iterate_back in kernels.c: the iterates and divisors of LANES matrices, for each thread."""
    numbers = torch.get_num_threads() * (2 * iters - 1) * (n * n + n) * LANES
    return torch.empty(numbers, dtype=torch.float32, device="cpu")


def sinkhorn_forward(path, iters, eps, tensors):
    (x,), n = tensors, tensors[0].size(-1)
    y, count = empty_as(x), x.numel() // n**2
    if path == "c":
        c_library(n).sinkhorn_forward(threads(), count, iters, *addresses(x, y))
    else:
        programs, block = tiles(count, n)
        launch(sinkhorn_kernel, (programs,), x, None, y, None, count, iters, SINKHORN_EPS, n, block,
               num_warps=1)
    return (y,), ()


def sinkhorn_backward(path, iters, eps, tensors, saved, g):
    (x,), (g,), n = tensors, g, tensors[0].size(-1)
    g_x, count = empty_as(x), x.numel() // n**2
    if path == "c":
        scratch = scratch_c(n, iters)
        c_library(n).sinkhorn_backward(threads(), count, iters, *addresses(x, g, g_x, scratch))
    else:
        programs, block = tiles(count, n)
        scratch = torch.empty(programs * 2 * iters * block * n, dtype=torch.float32, device=x.device)
        launch(sinkhorn_kernel, (programs,), x, g, g_x, scratch, count, iters, SINKHORN_EPS, n, block,
               num_warps=1)
    return [g_x]


# --- mHC's coefficients -------------------------------------------------------------------------------------


def mhc_coefficients(h: torch.Tensor, phi: torch.Tensor, alpha: torch.Tensor, b: torch.Tensor,
                     iters: int = 20, eps: float = 1e-6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The weights with which mHC reads, writes and mixes each token's N streams h (..., N, C).

    With x = flat h, of N C numbers:
        z = (x phi^T) r, r = 1 / sqrt(mean(x^2) + eps);  [pre | post | logits] = alpha_k z + b
        -> sigmoid(pre) (..., N), 2 sigmoid(post) (..., N), sinkhorn(logits, iters) (..., N, N) [out, in]
    The three parts k of the columns of z are N, N and N^2 wide. phi (2 N + N^2, N C), alpha (3,),
    b (2 N + N^2,). Xie et al. 2025, arXiv:2512.24880, section 4. fp32 inside, fp64 for fp64, results in h's
    dtype. Kernels exist for N = 2, 4 and 8. ValueError for other shapes.
    """
    N, width = (h.shape[-2], h.shape[-2] * h.shape[-1]) if h.dim() > 1 else (0, 0)
    columns = 2 * N + N * N
    if not N or phi.shape != (columns, width) or alpha.shape != (3,) or b.shape != (columns,):
        shapes = ", ".join(str(tuple(t.shape)) for t in (h, phi, alpha, b))
        raise ValueError("mhc_coefficients takes h (..., N, C) with phi (2 N + N^2, N C), alpha (3,) and "
                         f"b (2 N + N^2,), not {shapes}")
    if iters < 1:
        raise ValueError(f"mhc_coefficients needs iters >= 1, not {iters}")
    path = streams_path(h, phi, alpha, b)
    return operate("mhc_coefficients", path, h, phi, alpha, b, iters=iters, eps=eps)


def mhc_coefficients_reference(h, phi, alpha, b, iters=20, eps=1e-6):
    pre, post, logits = mhc_gates(h, phi, alpha, b, eps)
    res = sinkhorn_reference(logits.unflatten(-1, (h.size(-2), h.size(-2))), iters) # (..., N, N)
    return pre.type_as(h), post.type_as(h), res.type_as(h)


def mhc_gates(h: torch.Tensor, phi: torch.Tensor, alpha: torch.Tensor, b: torch.Tensor, eps: float = 1e-6):
    """pre, post (..., N), and logits (..., L) of any mixing, in PyTorch. phi (2 N + L, N C), b (2 N + L,)."""
    N, x = h.size(-2), widen(h).flatten(-2) # (..., N C)
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.size(-1) # mean(x^2)
    z = F.linear(x, phi.type_as(x)) * torch.rsqrt(square + eps) # the norm is one number per token
    widths = [N, N, len(b) - 2 * N]
    parts = zip(alpha.type_as(x), z.split(widths, dim=-1), b.type_as(x).split(widths))
    pre, post, logits = (a * z_k + b_k for a, z_k, b_k in parts)
    return pre.sigmoid(), 2 * post.sigmoid(), logits


# Four kernels make the coefficients. mhc_product makes z and mean(x^2), for many tokens at a time on tensor
# cores; mhc_forward makes pre, post and res of them. mhc_backward turns the gradients of those three into
# that of z; mhc_product_backward turns it into those of x and phi. z and its gradient are (tokens, COLUMNS).
#
# Tensor cores multiply numbers of 8 bits (bf16) or 11 (TF32) and add in fp32. A number of 24 bits is split
# into a sum of parts, and the products of the parts are added: three bf16 parts of b if a is bf16 (their
# products are exact), else three products of TF32 parts. Tensor cores also cut off what they should round,
# which adds up over long sums. So callers multiply 64 terms at a time and add the result to a sum of their
# own. Simulated at 3,072 terms, the rms error relative to that of z is 2.6e-7 for TF32 parts and 1.5e-7 for
# bf16 parts; 2.6e-7 for fp32 BLAS, 9.5e-6 for TF32 parts in one sum, 3e-4 for plain TF32.
@jit
def product_fp32(a, b):
    """a b^T in fp32. a (M, K) of any dtype, b (N, K) fp32 -> (M, N)."""
    if a.dtype == tl.bfloat16:
        high = b.to(tl.bfloat16) # b = high + middle + low
        rest = b - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        product = tl.dot(a, tl.trans(middle), tl.dot(a, tl.trans(low))) # small numbers first
        product = tl.dot(a, tl.trans(high), product)
    else:
        product = tl.dot(a.to(tl.float32), tl.trans(b), input_precision="tf32x3")
    return product


@jit
def mhc_product_kernel(p_x, p_phi, p_z, p_square, tokens, width, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
                       BLOCK_C: tl.constexpr, PADDED: tl.constexpr):
    """z = x phi^T and mean(x^2) of BLOCK tokens in one walk over the channels."""
    i_t, i_k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PADDED)
    z, square = tl.zeros((BLOCK, PADDED), tl.float32), tl.zeros((BLOCK, BLOCK_C), tl.float32)
    for start in range(0, width, BLOCK_C):
        i_c = start + tl.arange(0, BLOCK_C)
        of_x = (i_t < tokens)[:, None] & (i_c < width)[None, :]
        of_phi = (i_k < COLUMNS)[:, None] & (i_c < width)[None, :]
        x = tl.load(p_x + i_t[:, None] * width + i_c[None, :], mask=of_x, other=0.0)
        phi = tl.load(p_phi + i_k[:, None] * width + i_c[None, :], mask=of_phi, other=0.0).to(tl.float32)
        z += product_fp32(x, phi)
        square += x.to(tl.float32) * x.to(tl.float32)
    of_z = (i_t < tokens)[:, None] & (i_k < COLUMNS)[None, :]
    tl.store(p_z + i_t[:, None] * COLUMNS + i_k[None, :], z, mask=of_z)
    tl.store(p_square + i_t, tl.sum(square, axis=1) / width, mask=i_t < tokens)


@jit
def mhc_forward_kernel(p_z, p_square, p_alpha, p_b, p_pre, p_post, p_res, tokens, iters, eps,
                       EPS: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    COLUMNS: tl.constexpr = 2 * N + N * N
    i_t, i_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, N)
    inside = (i_t < tokens)[:, None] # (BLOCK, 1)
    r = 1 / tl.sqrt(tl.load(p_square + i_t, mask=i_t < tokens, other=1.0) + eps) # (BLOCK,)
    for k in tl.static_range(2): # pre, then post: (BLOCK, N)
        z = tl.load(p_z + i_t[:, None] * COLUMNS + k * N + i_n[None, :], mask=inside, other=0.0) * r[:, None]
        x = tl.load(p_alpha + k).to(tl.float32) * z + tl.load(p_b + k * N + i_n).to(tl.float32)[None, :]
        y, p_to = (1 + k) / (1 + tl.exp(-x)), p_pre if k == 0 else p_post
        tl.store(p_to + i_t[:, None] * N + i_n[None, :], y.to(p_to.dtype.element_ty), mask=inside)
    at, inside = matrices(i_t, tokens, COLUMNS, N) # (N, BLOCK, N)
    z = tl.load(p_z + 2 * N + at, mask=inside, other=0.0) * r[None, :, None]
    b = tl.load(p_b + 2 * N + i_n[:, None] * N + i_n[None, :]).to(tl.float32)
    m = iterate(tl.load(p_alpha + 2).to(tl.float32) * z + b[:, None, :], iters, EPS)
    at, inside = matrices(i_t, tokens, N * N, N)
    tl.store(p_res + at, m.to(p_res.dtype.element_ty), mask=inside)


# With y = alpha z r + b and g its gradient, the gradient of b is g, that of alpha g z r, that of z alpha g r.
# r depends on x too: as in rmsnorm, what comes back through r is x times one number for each token, `factor`.
@jit
def mhc_backward_kernel(p_z, p_square, p_alpha, p_b, p_gpre, p_gpost, p_gres, p_gz, p_factor, p_sums,
                        p_scratch, tokens, width, iters, eps, EPS: tl.constexpr, N: tl.constexpr,
                        BLOCK: tl.constexpr):
    COLUMNS: tl.constexpr = 2 * N + N * N
    i_t, i_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, N)
    inside = (i_t < tokens)[:, None] # (BLOCK, 1)
    r = 1 / tl.sqrt(tl.load(p_square + i_t, mask=i_t < tokens, other=1.0) + eps) # (BLOCK,)
    back = tl.zeros((BLOCK,), tl.float32) # sum of alpha g z r over the columns
    p_sums += tl.program_id(0) * (3 + COLUMNS) # [g_alpha | g_b] of this program's tokens
    for k in tl.static_range(2): # pre, then post: (BLOCK, N)
        z = tl.load(p_z + i_t[:, None] * COLUMNS + k * N + i_n[None, :], mask=inside, other=0.0) * r[:, None]
        a = tl.load(p_alpha + k).to(tl.float32)
        p = 1 / (1 + tl.exp(-a * z - tl.load(p_b + k * N + i_n).to(tl.float32)[None, :])) # sigmoid
        p_g = p_gpre if k == 0 else p_gpost
        g = tl.load(p_g + i_t[:, None] * N + i_n[None, :], mask=inside, other=0.0).to(tl.float32)
        g = (1 + k) * p * (1 - p) * g # through the sigmoid
        back += a * tl.sum(g * z, axis=1)
        tl.store(p_sums + k, tl.sum(tl.sum(g * z, axis=1), axis=0))
        tl.store(p_sums + 3 + k * N + i_n, tl.sum(g, axis=0))
        tl.store(p_gz + i_t[:, None] * COLUMNS + k * N + i_n[None, :], a * g * r[:, None], mask=inside)
    at, inside = matrices(i_t, tokens, N * N, N) # (N, BLOCK, N)
    g = tl.load(p_gres + at, mask=inside, other=0.0).to(tl.float32)
    at, inside = matrices(i_t, tokens, COLUMNS, N)
    z = tl.load(p_z + 2 * N + at, mask=inside, other=0.0) * r[None, :, None]
    a, i_nn = tl.load(p_alpha + 2).to(tl.float32), i_n[:, None] * N + i_n[None, :]
    x = a * z + tl.load(p_b + 2 * N + i_nn).to(tl.float32)[:, None, :]
    g = iterate_back(x, g, p_scratch, iters, EPS, N, BLOCK)
    dots = tl.sum(tl.sum(g * z, axis=2), axis=0) # (BLOCK,)
    tl.store(p_sums + 2, tl.sum(dots, axis=0))
    tl.store(p_sums + 3 + 2 * N + i_nn, tl.sum(g, axis=1))
    tl.store(p_gz + 2 * N + at, a * g * r[None, :, None], mask=inside)
    tl.store(p_factor + i_t, -(back + a * dots) * r * r / width, mask=i_t < tokens)


@jit
def mhc_product_backward_kernel(p_x, p_phi, p_gz, p_factor, p_gx, p_gphi, tokens, width,
                                COLUMNS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
                                PADDED: tl.constexpr):
    """g_x = g_z phi + factor x, and parts of g_phi = g_z^T x. Programs on axis 1 share the tokens."""
    i_c, i_k = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, PADDED)
    of_phi = (i_c < width)[:, None] & (i_k < COLUMNS)[None, :]
    at_phi = i_k[None, :] * width + i_c[:, None]
    phi = tl.load(p_phi + at_phi, mask=of_phi, other=0.0).to(tl.float32) # (BLOCK_C, PADDED)
    g_phi = tl.zeros((BLOCK_C, PADDED), tl.float32)
    for start in range(tl.program_id(1) * BLOCK, tokens, tl.num_programs(1) * BLOCK):
        i_t = start + tl.arange(0, BLOCK).to(tl.int64)
        of_z = (i_t < tokens)[:, None] & (i_k < COLUMNS)[None, :]
        of_x = (i_t < tokens)[:, None] & (i_c < width)[None, :]
        g_z = tl.load(p_gz + i_t[:, None] * COLUMNS + i_k[None, :], mask=of_z, other=0.0) # (BLOCK, PADDED)
        factor = tl.load(p_factor + i_t, mask=i_t < tokens, other=0.0) # (BLOCK,)
        x = tl.load(p_x + i_t[:, None] * width + i_c[None, :], mask=of_x, other=0.0) # (BLOCK, BLOCK_C)
        g_phi += product_fp32(tl.trans(x), tl.trans(g_z))
        g_x = product_fp32(g_z, phi) + factor[:, None] * x.to(tl.float32)
        tl.store(p_gx + i_t[:, None] * width + i_c[None, :], g_x.to(p_gx.dtype.element_ty), mask=of_x)
    tl.store(p_gphi + tl.program_id(1) * COLUMNS * width + at_phi, g_phi, mask=of_phi)


def product(a, b):
    """a b in a's dtype: autocast, which would round it, leaves alone what is written into a given tensor."""
    return torch.mm(a, b, out=torch.empty(a.size(0), b.size(1), dtype=a.dtype, device=a.device))


def product_backward(x, phi, g_z, factor, path):
    """The gradients of x (tokens, N C) and phi (2 N + N^2, N C)."""
    (tokens, width), columns = x.shape, phi.size(0)
    if path == "c" or columns > 32: # for Triton, the parts of 80 columns take more registers than there are
        wide = x.float()
        g_x = product(g_z, phi.float()).addcmul_(factor.unsqueeze(1), wide).to(x.dtype)
        return g_x, product(g_z.t(), wide).to(phi.dtype)
    parts, padded = min(16, triton.cdiv(tokens, 32)), triton.next_power_of_2(columns) # parts of the sum g_phi
    g_x, g_phi = empty_as(x), torch.empty(parts, *phi.shape, dtype=torch.float32, device=x.device)
    stages = 3 if x.dtype == torch.float32 else 1 # bf16 takes an H100 166 us with one, 237 us with three
    launch(mhc_product_backward_kernel, (triton.cdiv(width, 64), parts), x, phi, g_z, factor, g_x, g_phi,
           tokens, width, columns, 32, 64, max(16, padded), num_stages=stages) # tl.dot takes 16 or more
    return g_x, g_phi.sum(0).to(phi.dtype)


def coefficients_forward(path, iters, eps, tensors):
    """Backward needs z and mean(x^2) too, 25 numbers per token at N = 4. C leaves products to BLAS."""
    h, phi, alpha, b = tensors
    N, width = h.size(-2), h.size(-2) * h.size(-1)
    x = h.view(-1, width) # (tokens, N C)
    tokens = len(x)
    outputs = [torch.empty((*h.shape[:-2], *shape), dtype=h.dtype, device=h.device)
               for shape in ((N,), (N,), (N, N))] # pre, post, res
    square = torch.empty(tokens, dtype=torch.float32, device=h.device)
    if path == "c":
        z = product(x, phi.t())
        c_library(N).mhc_forward(threads(), tokens, width, iters, eps,
                                 *addresses(x, z, alpha, b, square, *outputs))
    else:
        z = torch.empty(tokens, len(b), dtype=torch.float32, device=h.device)
        programs, block = tiles(tokens, N)
        # 128 tokens share a tile of phi. 80 columns leave registers for half as many of each.
        block_t, channels = (128, 64) if N < 8 else (64, 32)
        launch(mhc_product_kernel, (triton.cdiv(tokens, block_t),), x, phi, z, square, tokens, width, len(b),
               block_t, channels, max(16, triton.next_power_of_2(len(b))), num_warps=8)
        launch(mhc_forward_kernel, (programs,), z, square, alpha, b, *outputs, tokens, iters, eps,
               SINKHORN_EPS, N, block, num_warps=1)
    return tuple(outputs), (z, square)


def coefficients_backward(path, iters, eps, tensors, saved, g):
    (h, phi, alpha, b), (z, square) = tensors, saved
    N, width = h.size(-2), h.size(-2) * h.size(-1)
    x, inputs = h.view(-1, width), (z, square, alpha, b, *g) # g of pre, post and res
    tokens, g_z, factor = len(x), empty_as(z), empty_as(square)
    programs, block = (-(-tokens // LANES), None) if path == "c" else tiles(tokens, N)
    sums = torch.empty(programs, 3 + len(b), dtype=torch.float32, device=h.device) # [g_alpha | g_b]
    if path == "c":
        scratch = scratch_c(N, iters)
        c_library(N).mhc_backward(threads(), tokens, width, iters, eps,
                                  *addresses(*inputs, g_z, factor, sums, scratch))
    else:
        scratch = torch.empty(programs * 2 * iters * block * N, dtype=torch.float32, device=h.device)
        launch(mhc_backward_kernel, (programs,), *inputs, g_z, factor, sums, scratch, tokens, width, iters,
               eps, SINKHORN_EPS, N, block, num_warps=1)
    g_x, g_phi = product_backward(x, phi, g_z, factor, path)
    g_alpha, g_b = sums.sum(0, dtype=torch.float64).split([3, len(b)])
    return [g_x.view(h.shape), g_phi, g_alpha.to(alpha.dtype), g_b.to(b.dtype)]


# --- operations on streams, in eager mode and under torch.compile -------------------------------------------
# Each is a row of OPERATIONS: what it runs forward and backward, on contiguous tensors, and its formula.
#
# torch.compile cannot look into C or into a launch of Triton, and breaks the graph there. It must not get the
# formulas instead: from those of hyper-connections, Inductor 2.13 on a CPU makes gradients off by up to 60%,
# and Sinkhorn's would be 80 reductions. So an operation is one node of the graph, which the compiler calls
# and does not look into, and its backward is another. Both run what eager mode runs, on the path chosen when
# the graph was made.

OPERATIONS = { # name: (forward, backward, formula). The formula takes tensors, then iters and eps if given
    "read_streams": (streams_forward, streams_backward, read_streams_reference),
    "write_streams": (streams_forward, streams_backward, write_streams_reference),
    "sinkhorn": (sinkhorn_forward, sinkhorn_backward, sinkhorn_reference),
    "mhc_coefficients": (coefficients_forward, coefficients_backward, mhc_coefficients_reference),
}


def operate(name, path, *tensors, iters=None, eps=None):
    if torch.compiler.is_compiling():
        outputs, _ = torch.ops.nanoslm.forward(name, path, iters, eps, [t.contiguous() for t in tensors])
    elif path == "torch":
        tally(name, path)
        outputs = by_formula(name, iters, eps, tensors)
    else:
        outputs = run(Operation, name, path, iters, eps, *tensors)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def by_formula(name, iters, eps, tensors):
    outputs = OPERATIONS[name][2](*tensors, *(c for c in (iters, eps) if c is not None))
    return outputs if isinstance(outputs, tuple) else (outputs,)


class Operation(torch.autograd.Function):
    """An operation in eager mode, in C or in Triton."""

    @staticmethod
    def forward(ctx, name, path, iters, eps, *tensors):
        tensors = [t.contiguous() for t in tensors]
        outputs, saved = node_forward(name, path, iters, eps, tensors)
        keep(ctx, (name, path, iters, eps, tensors), (outputs, saved))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *g):
        return None, None, None, None, *node_backward(*ctx.constants, *kept(ctx), g)


def keep(ctx, inputs, output):
    *ctx.constants, tensors = inputs
    ctx.count = len(tensors)
    ctx.save_for_backward(*tensors, *output[1])


def kept(ctx):
    tensors = ctx.saved_tensors # asked for once: gradient checkpointing computes them at that moment
    return tensors[:ctx.count], tensors[ctx.count:]


def node_forward(name, path, iters, eps, tensors):
    """(outputs, what backward needs besides the tensors), all contiguous."""
    tally(name, path)
    if path != "torch":
        return OPERATIONS[name][0](path, iters, eps, tensors)
    return [t.contiguous() for t in by_formula(name, iters, eps, tensors)], []


def node_shapes(name, path, iters, eps, tensors):
    """node_forward for tensors that have a shape and no numbers: the compiler asks before anything runs."""
    outputs, saved = by_formula(name, iters and 1, eps, tensors), [] # one iteration has the shapes of many
    if name == "mhc_coefficients" and path != "torch": # z and mean(x^2)
        tokens, columns = outputs[0].shape[:-1].numel(), len(tensors[1])
        saved = [outputs[0].new_empty(shape, dtype=torch.float32) for shape in ((tokens, columns), (tokens,))]
    return [empty_as(t) for t in outputs], saved


def node_backward(name, path, iters, eps, tensors, saved, g):
    """The gradients of the tensors, contiguous. g: those of the outputs."""
    if path != "torch":
        tally(name + " backward", path)
        return OPERATIONS[name][1](path, iters, eps, tensors, saved, [t.contiguous() for t in g])
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in tensors]
        outputs = by_formula(name, iters, eps, inputs)
    return [t.contiguous() for t in torch.autograd.grad(outputs, inputs, g)]


def node_differentiates(ctx, g, _):
    return None, None, None, None, torch.ops.nanoslm.backward(*ctx.constants, *kept(ctx), g)


NODES, HOW = torch.library.Library("nanoslm", "DEF"), "str name, str path, int? iters, float? eps"
NODES.define(f"forward({HOW}, Tensor[] tensors) -> (Tensor[], Tensor[])")
NODES.define(f"backward({HOW}, Tensor[] tensors, Tensor[] saved, Tensor[] g) -> Tensor[]")
NODES.impl("forward", node_forward, "CompositeExplicitAutograd")
NODES.impl("backward", node_backward, "CompositeExplicitAutograd")
torch.library.register_fake("nanoslm::forward", node_shapes, lib=NODES)
torch.library.register_fake("nanoslm::backward", lambda *args: [*map(empty_as, args[4])], lib=NODES)
torch.library.register_autograd("nanoslm::forward", node_differentiates, setup_context=keep, lib=NODES)


# --- products with a matrix of weights ----------------------------------------------------------------------


def project(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T (+ b), as F.linear. On a CPU in x's dtype: autocast rounds what is multiplied, and nothing else.

    A CPU multiplies matrices in bf16 up to 2.3 times as fast as in fp32, but does all else in it more slowly.
    """
    y = F.linear(x, weight, bias) if torch.is_grad_enabled() else few_rows(x, weight, bias)
    return y.to(x.dtype) if x.is_cpu else y


def few_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T (+ b) for inference. (..., n_in), (n_out, n_in), (n_out,) -> (..., n_out).

    Decoding a token, or judging a few drafts, is bound by reading W, at which the BLAS of F.linear is slow on
    a CPU: all matrices of a 10.65M model take it 2.2 ms for one row and 4.2 for five, this 0.9 and 1.9
    (AMD EPYC, 2 threads). Small matrices, which stay in the cache, and many rows are left to BLAS.
    """
    # These questions come first, because what is left counts microseconds.
    if weight.numel() <= 2**17 or x.numel() > 16 * x.size(-1) or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    fits = x.size(-1) == weight.size(1) and x.dtype == weight.dtype and x.device == weight.device
    if not fits or path_for(weight, in_c=0) != "c" or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias) # it says what is wrong with a shape
    tally("few_rows", "c")
    x, y = x.contiguous(), torch.empty((*x.shape[:-1], weight.size(0)), dtype=x.dtype, device=x.device)
    c_library(0).few_rows(threads(), x.numel() // x.size(-1), *weight.shape, *addresses(weight, x, y))
    return y if bias is None else y + bias


# --- calling kernels.c --------------------------------------------------------------------------------------

LANES = 16 # matrices or tokens that C handles side by side: the width of an AVX-512 register in fp32


@functools.cache
def c_library(n_stream: int) -> ctypes.CDLL | None:
    """kernels.c as a ctypes library, compiled at first use, in 1 to 3 s. None, said once, without a compiler.

    n_stream 0 compiles the first half of the file; 2, 4 or 8 all of it, for that many residual streams. The
    compiler is CC, else cc. RuntimeError if a compiler works but refuses kernels.c.
    """
    compiler = os.environ.get("CC", "cc")
    source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "kernels.c")
    constants = {"LANES": LANES, "ROWS": ROWS, "EPS": f"{SINKHORN_EPS}f"}
    if n_stream:
        constants["N"] = n_stream
    try:
        with tempfile.TemporaryDirectory() as folder: # Unix keeps a loaded library when its file goes
            library = os.path.join(folder, "kernels.so")
            # math-errno and trapping-math would keep the compiler from vectorising square roots and sums.
            fixed = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-o", library]
            flags = [*fixed, *(f"-D{name}={value}" for name, value in constants.items())]
            # Apple's clang lacks OpenMP, and some compilers lack native.
            for more in (["-march=native", "-fopenmp"], ["-fopenmp"], ["-march=native"], []):
                command = [*shlex.split(compiler), *more, *flags, source, "-lm"]
                done = subprocess.run(command, capture_output=True) # its words are shown only if it fails
                if done.returncode == 0:
                    return declared(ctypes.CDLL(library), source)
            trivial = [*shlex.split(compiler), *fixed, "-x", "c", "-"] # reads stdin
            if subprocess.run(trivial, input=b"int x;\n", capture_output=True).returncode == 0:
                raise RuntimeError(f"{compiler} refuses kernels.c; kernel=torch does without it\n"
                                   + done.stderr.decode(errors="replace")[:2000])
            problem = "it fails"
    except (OSError, ValueError) as error: # no compiler, an open quote in CC, no temporary folder, noexec
        problem = str(error)
    print(f"NO WORKING C COMPILER ({compiler}: {problem}; CC names another, TMPDIR another folder): "
          "what would be C runs as plain PyTorch, several times slower")
    return None


def declared(library, source):
    """The library, whose functions know their arguments' types: a call then takes 1 us instead of 10."""
    with open(source, encoding="utf-8") as f:
        found = re.findall(r"^void (\w+)\(([^)]*)\)", f.read(), re.MULTILINE)
    kinds = {"int": ctypes.c_int, "int64_t": ctypes.c_int64, "float": ctypes.c_float}
    for name, arguments in found:
        if hasattr(library, name): # the second half may not be compiled
            function, arguments = getattr(library, name), arguments.split(",")
            function.argtypes = [ctypes.c_void_p if "*" in a else kinds[a.split()[-2]] for a in arguments]
            function.restype = None
    return library


def threads(numel: int = 2**62) -> int:
    """Threads for work on so many numbers. To wake a second one takes longer than a few thousand of them."""
    return torch.get_num_threads() if numel > 16384 else 1


def address(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor's first number lies; None for None. TypeError for what C would misread."""
    if tensor is None:
        return None
    if tensor.dtype != torch.float32 or not tensor.is_cpu or not tensor.is_contiguous():
        raise TypeError(f"C takes contiguous {torch.float32} on the CPU, "
                        f"not {tensor.dtype} on {tensor.device} with strides {tensor.stride()}")
    return tensor.data_ptr()


def addresses(*tensors):
    """The caller must hold the tensors in variables until C returns, else their memory may be freed."""
    return map(address, tensors)


def pointers(tensors, offsets=None):
    """A C array of the addresses of fp32 tensors, each moved on by a number of elements."""
    offsets = offsets or [0] * len(tensors)
    return (ctypes.c_void_p * len(tensors))(*(address(t) + 4 * n for t, n in zip(tensors, offsets)))


def integers(values):
    return (ctypes.c_int64 * len(values))(*values)


def floats(values):
    return (ctypes.c_float * len(values))(*values)
