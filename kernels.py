"""
Operations written close to the machine, each tested against the plain PyTorch that says what it computes.

For the CPU they are C, compiled at first use by the system's compiler (CC, else cc; half a second) and called through
ctypes. C because each is one walk through memory: the loops that torch.compile makes of the same formulas read the gradient
twice, recompute square roots, and take 15 to 35 s to compile for a model's list of tensors. For CUDA they are Triton.

Read sinkhorn or activate: the formula, then X_reference (PyTorch), X_SOURCE (C), the Triton kernels, and the Function that
ties a forward to its backward. Both save their inputs only; the backward computes the rest again.
i_ index  p_ pointer  g_ gradient of the loss by what follows  eps a small number: in sinkhorn a constant, in crrelu learned
"""
import collections
import ctypes
import functools
import os
import re
import shlex
import subprocess
import tempfile

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError: # macOS and Windows have none; CUDA tensors then take plain PyTorch
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" # Triton reads it where kernels are defined: set it before the import
KERNEL = "auto" # see use_kernel
launches = collections.Counter() # (operation, path) -> calls in eager mode: the proof of which path ran


def tally(operation, path):
    if not torch.compiler.is_compiling(): # which would compile again for each new value of the counter
        launches[operation, path] += 1


def choose_device(name):
    """(device, the reason) for auto | cpu | cuda | cuda:1 | mps. ValueError if it cannot be used here."""
    if name != "auto":
        try:
            torch.empty(1, device=name)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device={name!r} cannot be used: {str(error).splitlines()[0]}\nuse --device=auto, or cpu") from None
        return name, "as asked"
    if torch.cuda.is_available():
        return "cuda", "auto: a CUDA GPU is there"
    if torch.backends.mps.is_available():
        return "mps", "auto: no CUDA, but Apple's GPU"
    return "cpu", "auto: no CUDA, no MPS"


def use_kernel(name):
    """auto: Triton for CUDA tensors, C for what it takes on a CPU, else PyTorch. torch, triton: that, or an error."""
    global KERNEL
    if name not in ("auto", "triton", "torch"):
        raise ValueError(f"kernel={name!r} is none of auto, triton, torch")
    if name == "triton" and triton is None:
        raise ValueError("kernel=triton, but triton is not installed; install it or use kernel=auto")
    if name == "triton" and not (torch.cuda.is_available() or INTERPRETED):
        raise ValueError("kernel=triton needs a CUDA GPU (or TRITON_INTERPRET=1 from the start, slow); use kernel=auto")
    KERNEL = name


def path_for(tensor):
    """Which code an operation on this tensor runs: "triton", "c" or "torch". Chosen beforehand: what then fails raises."""
    if KERNEL == "triton":
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise RuntimeError(f"kernel=triton computes in fp32, which {tensor.dtype} does not fit; use kernel=auto")
        if not (tensor.is_cuda or INTERPRETED):
            raise RuntimeError(f"kernel=triton cannot run on a tensor on {tensor.device}; use kernel=auto")
        return "triton"
    if KERNEL == "torch":
        return "torch"
    if tensor.is_cuda:
        return "triton" if triton is not None and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16) else "torch"
    in_c = tensor.is_cpu and tensor.dtype == torch.float32 and tensor.is_contiguous()
    return "c" if in_c and c_library(C_MATH) is not None else "torch"


@functools.cache
def c_library(source):
    """The C source as a ctypes library; None, said once, where it cannot be built. With OpenMP where the compiler has it."""
    compiler = os.environ.get("CC", "cc")
    try:
        with tempfile.TemporaryDirectory() as folder: # Unix keeps a loaded library when its file goes
            text, library = os.path.join(folder, "kernels.c"), os.path.join(folder, "kernels.so")
            with open(text, "w", encoding="utf-8") as f:
                f.write(source)
            # errno and traps would keep sqrt and sums from being vectorised; the arithmetic stays IEEE's
            flags = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", text, "-o", library, "-lm"]
            # Apple's clang has no OpenMP, some compilers have no native
            for more in (["-march=native", "-fopenmp"], ["-fopenmp"], ["-march=native"], []):
                done = subprocess.run([*shlex.split(compiler), *more, *flags], capture_output=True)
                if done.returncode == 0:
                    return declared(ctypes.CDLL(library), source)
            problem = "it fails"
    except (OSError, ValueError) as error: # no compiler, CC with an open quote, no temporary folder, or one mounted noexec
        problem = str(error)
    print(f"NO WORKING C COMPILER ({compiler}: {problem}; CC names another, TMPDIR another folder): "
          "what would be C runs as plain PyTorch, several times slower")
    return None


def declared(library, source):
    """Its functions with the types of their arguments, read off the C: a call with plain numbers and addresses then takes 1 us, not 10."""
    kinds = {"int": ctypes.c_int, "int64_t": ctypes.c_int64, "float": ctypes.c_float}
    for name, arguments in re.findall(r"^ {4}void (\w+)\(([^)]*)\)", source, re.MULTILINE):
        function, arguments = getattr(library, name), arguments.split(",")
        function.argtypes = [ctypes.c_void_p if "*" in a or "[" in a else kinds[a.split()[-2]] for a in arguments]
        function.restype = None
    return library


def needed(source):
    """The library of a path that is already chosen: no compiler was worth a word, a source that fails is an error."""
    library = c_library(source)
    if library is None:
        raise RuntimeError("the C compiler refused a kernel of kernels.py; kernel=torch does without")
    return library


def c_array(kind, values):
    return (kind * len(values))(*values)


def pointers(tensors, offsets=None):
    """Addresses of fp32 tensors, each moved on by a number of elements."""
    offsets = offsets or [0] * len(tensors)
    return c_array(ctypes.c_void_p, [address(t) + 4 * n for t, n in zip(tensors, offsets)])


def integers(values):
    return c_array(ctypes.c_int64, values)


def floats(values):
    return c_array(ctypes.c_float, values)


def threads(numel=2**62):
    """To work on so many numbers; waking a second thread takes longer than a few thousand."""
    return torch.get_num_threads() if numel > 16384 else 1


def address(tensor, dtype=torch.float32):
    """
    Of a tensor's first number, for C, which takes the type, the order and the place of what lies there for granted. None for None.
    Shapes are checked by the operation that knows them.
    """
    if tensor is None:
        return None
    if tensor.dtype != dtype or not tensor.is_cpu or not tensor.is_contiguous():
        raise TypeError(f"C takes contiguous {dtype} on the CPU, not {tensor.dtype} on {tensor.device} with strides {tensor.stride()}")
    return tensor.data_ptr()


class Inference:
    """In place of autograd's ctx where nothing will be differentiated: Function.apply alone takes 5 us."""

    def save_for_backward(self, *tensors):
        pass


def run(function, *args):
    return function.apply(*args) if torch.is_grad_enabled() else function.forward(Inference(), *args)


def like(tensor):
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


# e^x as 2^k e^r with |r| < ln(2) / 2: IEEE operations only, so that the compiler can do many at once, which it cannot with
# libm's. Adding 1.5 * 2^23 rounds to an integer k and leaves it in the low bits. 2^k in two factors: it under- and overflows
# as it should. The polynomials of this file are minimax fits to its fp64 formulas.
C_MATH = """
    #include <math.h>
    #include <stdint.h>

    static inline float exponential(float x) { /* within 1.1 units of the last place; NaN stays NaN */
        union { float f; uint32_t i; } t, low, high;
        x = x < -105 ? -105 : x;
        x = x > 89 ? 89 : x;
        t.f = x * 1.44269504f + 12582912.0f;
        float k = t.f - 12582912.0f, r = x - k * 0.693359375f + k * 2.12194440e-4f; /* ln 2 in two parts, the first short: exact */
        float p = 0.0013814222f;
        p = p * r + 0.0083688991f, p = p * r + 0.041668404f, p = p * r + 0.1666652f, p = p * r + 0.49999994f;
        p = p * (r * r) + r + 1;
        int32_t n = (int32_t)(t.i - 0x4B400000u), half = n >> 1;
        low.i = (uint32_t)(half + 127) << 23, high.i = (uint32_t)(n - half + 127) << 23;
        return p * low.f * high.f;
    }
"""


# --- Sinkhorn ---

SINKHORN_EPS = 1e-6 # DeepSeek's: keeps every entry above 0 and every division finite


@torch._disable_dynamo # torch.compile stops here and goes on after: unrolled it would be 80 reductions. This spelling loads nothing
def sinkhorn(logits, iters=20):
    """
    logits (..., n, n) -> H (..., n, n), nearly doubly stochastic: the mixing of mHC's n streams, H[out, in].
        M = softmax(logits over out) + eps;  M /= sum over in + eps;  then iters - 1 times:  M /= sum over out + eps, M /= sum over in + eps
    Rows are normalised last, so each output is a convex mix at any iters; columns only when it has converged, which large
    logits never do in 20. Sinkhorn & Knopp 1967; Xie et al. 2025, arXiv:2512.24880; order and eps are DeepSeek-V4's, with comb
    = H^T. The gradient is that of the iterations done, not of the limit. fp32 inside, fp64 for fp64; n = 2, 4, 8 are fast.
    """
    if logits.dim() < 2 or logits.shape[-1] != logits.shape[-2]:
        raise ValueError(f"sinkhorn takes square matrices (..., n, n), not {tuple(logits.shape)}")
    if iters < 1:
        raise ValueError(f"sinkhorn needs iters >= 1, not {iters}")
    path = path_for(logits) if logits.shape[-1] in (2, 4, 8) and logits.numel() else "torch"
    if path == "torch":
        tally("sinkhorn", path)
        return sinkhorn_reference(logits, iters)
    return run(Sinkhorn, logits, iters, path)


def sinkhorn_reference(logits, iters=20):
    x = logits if logits.dtype == torch.float64 else logits.float()
    m = x.softmax(-2) + SINKHORN_EPS # (..., out, in)
    m = m / (m.sum(-1, keepdim=True) + SINKHORN_EPS)
    for _ in range(iters - 1):
        m = m / (m.sum(-2, keepdim=True) + SINKHORN_EPS)
        m = m / (m.sum(-1, keepdim=True) + SINKHORN_EPS)
    return m.to(logits.dtype)


# 16 matrices at a time, turned so that entry k of all 16 lies together: every operation is then 16 wide whatever n is, and
# sums need no shuffles. One division per row, not per entry. The backward keeps all iterates of its 16 (40 kB at n = 4 and 20
# iterations: they stay in cache) and reverses y = x / s by g_x = (g_y - sum(g_y * y)) / s. Matrices do not meet: threads
# change no bit. 32,768 matrices, n = 4, 20 iterations, forward and backward: 3.4 ms on one thread; the reference takes 165.
LANES = 16
SINKHORN_SOURCE = C_MATH + """
    typedef float block[N * N][LANES];

    /* rows of `width` numbers, `apart` from each other; the last block may be short: zeros, never stored */
    static void load(const float *x, int64_t apart, int64_t count, int width, float (*m)[LANES]) {
        for (int k = 0; k < width; k++)
            for (int l = 0; l < LANES; l++) m[k][l] = l < count ? x[l * apart + k] : 0;
    }

    static void store(float *x, int64_t apart, int64_t count, int width, float (*m)[LANES]) {
        for (int l = 0; l < count; l++)
            for (int k = 0; k < width; k++) x[l * apart + k] = m[k][l];
    }

    static void softmax(float (*m)[LANES]) { /* over rows, for each column j */
        for (int j = 0; j < N; j++) {
            _Pragma("omp simd")
            for (int l = 0; l < LANES; l++) {
                float most = m[j][l], sum = 0;
                _Pragma("GCC unroll 8")
                for (int i = 1; i < N; i++) most = m[i * N + j][l] > most ? m[i * N + j][l] : most;
                _Pragma("GCC unroll 8")
                for (int i = 0; i < N; i++) sum += m[i * N + j][l] = exponential(m[i * N + j][l] - most);
                float inverse = 1 / sum;
                _Pragma("GCC unroll 8")
                for (int i = 0; i < N; i++) m[i * N + j][l] *= inverse;
            }
        }
    }

    /* y = x / (sum of x + eps) over N entries, `step` apart, of each of N groups, `group` apart; inverse keeps the divisors */
    static inline void normalise(float (*x)[LANES], float (*y)[LANES], float (*inverse)[LANES], int group, int step) {
        _Pragma("GCC unroll 8")
        for (int a = 0; a < N; a++) {
            _Pragma("omp simd")
            for (int l = 0; l < LANES; l++) {
                float sum = 0;
                _Pragma("GCC unroll 8")
                for (int b = 0; b < N; b++) sum += x[a * group + b * step][l];
                float by = inverse[a][l] = 1 / (sum + EPS);
                _Pragma("GCC unroll 8")
                for (int b = 0; b < N; b++) y[a * group + b * step][l] = x[a * group + b * step][l] * by;
            }
        }
    }

    static inline void reverse(float (*g)[LANES], float (*y)[LANES], float (*inverse)[LANES], int group, int step) {
        _Pragma("GCC unroll 8")
        for (int a = 0; a < N; a++) {
            _Pragma("omp simd")
            for (int l = 0; l < LANES; l++) {
                float dot = 0;
                _Pragma("GCC unroll 8")
                for (int b = 0; b < N; b++) dot += g[a * group + b * step][l] * y[a * group + b * step][l];
                _Pragma("GCC unroll 8")
                for (int b = 0; b < N; b++) g[a * group + b * step][l] = (g[a * group + b * step][l] - dot) * inverse[a][l];
            }
        }
    }

    static void iterate(float (*m)[LANES], int64_t iters) { /* logits -> H, in place */
        float inverse[N][LANES];
        softmax(m);
        for (int k = 0; k < N * N; k++)
            for (int l = 0; l < LANES; l++) m[k][l] += EPS;
        normalise(m, m, inverse, N, 1);
        for (int64_t i = 1; i < iters; i++) normalise(m, m, inverse, 1, N), normalise(m, m, inverse, N, 1);
    }

    static void iterate_back(float (*p)[LANES], float (*g)[LANES], int64_t iters, float *scratch) { /* p: logits; g of H -> g of p */
        int64_t steps = 2 * iters - 1; /* even steps normalise rows, odd ones columns */
        block *ys = (block *)scratch, m;
        float(*inverse)[N][LANES] = (float(*)[N][LANES])(ys + steps);
        softmax(p);
        for (int k = 0; k < N * N; k++)
            for (int l = 0; l < LANES; l++) m[k][l] = p[k][l] + EPS;
        normalise(m, ys[0], inverse[0], N, 1);
        for (int64_t i = 1; i < steps; i += 2) {
            normalise(ys[i - 1], ys[i], inverse[i], 1, N);
            normalise(ys[i], ys[i + 1], inverse[i + 1], N, 1);
        }
        for (int64_t i = steps - 1; i > 0; i -= 2) {
            reverse(g, ys[i], inverse[i], N, 1);
            reverse(g, ys[i - 1], inverse[i - 1], 1, N);
        }
        reverse(g, ys[0], inverse[0], N, 1);
        for (int j = 0; j < N; j++) { /* softmax: g_x = p (g_p - sum(g_p * p)) */
            for (int l = 0; l < LANES; l++) {
                float dot = 0;
                for (int i = 0; i < N; i++) dot += g[i * N + j][l] * p[i * N + j][l];
                for (int i = 0; i < N; i++) g[i * N + j][l] = (g[i * N + j][l] - dot) * p[i * N + j][l];
            }
        }
    }

    #define SCRATCH(iters) ((2 * (iters) - 1) * (N * N + N) * LANES) /* floats per thread: iterates and divisors */
    #define EACH_BLOCK(t) for (int64_t i_b = blocks * (t) / threads; i_b < blocks * ((t) + 1) / threads; i_b++)

    void forward(int threads, int64_t count, int64_t iters, const float *x, float *y) {
        int64_t blocks = (count + LANES - 1) / LANES;
        #pragma omp parallel for num_threads(threads) schedule(static) if (blocks > 8)
        for (int64_t b = 0; b < blocks; b++) {
            block m;
            int64_t first = b * LANES * N * N, here = count - b * LANES < LANES ? count - b * LANES : LANES;
            load(x + first, N * N, here, N * N, m);
            iterate(m, iters);
            store(y + first, N * N, here, N * N, m);
        }
    }

    void backward(int threads, int64_t count, int64_t iters, const float *x, const float *g_y, float *g_x, float *scratch) {
        int64_t blocks = (count + LANES - 1) / LANES;
        #pragma omp parallel for num_threads(threads) schedule(static, 1) if (blocks > 8)
        for (int t = 0; t < threads; t++) {
            EACH_BLOCK(t) {
                block p, g;
                int64_t first = i_b * LANES * N * N, here = count - i_b * LANES < LANES ? count - i_b * LANES : LANES;
                load(x + first, N * N, here, N * N, p);
                load(g_y + first, N * N, here, N * N, g);
                iterate_back(p, g, iters, scratch + t * SCRATCH(iters));
                store(g_x + first, N * N, here, N * N, g);
            }
        }
    }
"""


@functools.cache
def sinkhorn_library(n, source=SINKHORN_SOURCE):
    return needed(f"#define N {n}\n#define LANES {LANES}\n#define EPS {SINKHORN_EPS}f\n" + source)


def sinkhorn_scratch(n, iters):
    return torch.empty(torch.get_num_threads() * (2 * iters - 1) * (n * n + n) * LANES, dtype=torch.float32, device="cpu")


def sinkhorn_forward_c(x, iters):
    y, n = like(x), x.shape[-1]
    sinkhorn_library(n).forward(threads(), x.numel() // n**2, iters, address(x), address(y))
    return y


def sinkhorn_backward_c(x, g_y, iters):
    g_x, n = like(x), x.shape[-1]
    tensors, sizes = (x, g_y, g_x, sinkhorn_scratch(n, iters)), (x.numel() // n**2, iters)
    sinkhorn_library(n).backward(threads(), *sizes, *map(address, tensors))
    return g_x


# BLOCK matrices per program in a tile (BLOCK, N, N) without padding. The backward keeps the divisors only, and walks back
# through the iterates by x = y * s: registers cannot be indexed by a loop, and iterates would be N times the memory traffic.
if triton is not None:
    @triton.jit
    def matrices(i_matrix, count, apart, N: tl.constexpr):
        """Offsets and mask of a tile (BLOCK, N, N), whose matrices begin `apart` from each other."""
        i_n = tl.arange(0, N)
        offsets = i_matrix[:, None, None] * apart + i_n[None, :, None] * N + i_n[None, None, :]
        return offsets, (i_matrix < count)[:, None, None] & (i_n >= 0)[None, :, None] & (i_n >= 0)[None, None, :]

    @triton.jit
    def softmax_out(x):
        e = tl.exp(x - tl.max(x, axis=1)[:, None, :])
        return e / tl.sum(e, axis=1)[:, None, :]

    @triton.jit
    def iterate(x, iters, EPS: tl.constexpr):
        m = softmax_out(x) + EPS
        m = m / (tl.sum(m, axis=2)[:, :, None] + EPS)
        for _ in range(1, iters):
            m = m / (tl.sum(m, axis=1)[:, None, :] + EPS)
            m = m / (tl.sum(m, axis=2)[:, :, None] + EPS)
        return m

    @triton.jit
    def iterate_back(x, g, p_scratch, iters, EPS: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
        """From the logits and the gradient of H, the gradient of the logits."""
        p = softmax_out(x)
        # divisors (2 iters, BLOCK, N) of this program: of columns at 2 i, of rows at 2 i + 1
        p_sums = p_scratch + tl.program_id(0).to(tl.int64) * (2 * iters * BLOCK * N)
        p_sums += tl.arange(0, BLOCK)[:, None] * N + tl.arange(0, N)[None, :]
        y = p + EPS
        for i in range(iters):
            if i > 0:
                columns = tl.sum(y, axis=1) + EPS
                tl.store(p_sums + 2 * i * (BLOCK * N), columns)
                y = y / columns[:, None, :]
            rows = tl.sum(y, axis=2) + EPS
            tl.store(p_sums + (2 * i + 1) * (BLOCK * N), rows)
            y = y / rows[:, :, None]
        tl.debug_barrier() # what one thread stored another may load
        for j in range(iters):
            i = iters - 1 - j
            rows = tl.load(p_sums + (2 * i + 1) * (BLOCK * N))
            g = (g - tl.sum(g * y, axis=2)[:, :, None]) / rows[:, :, None]
            y = y * rows[:, :, None]
            if i > 0:
                columns = tl.load(p_sums + 2 * i * (BLOCK * N))
                g = (g - tl.sum(g * y, axis=1)[:, None, :]) / columns[:, None, :]
                y = y * columns[:, None, :]
        return p * (g - tl.sum(g * p, axis=1)[:, None, :])

    @triton.jit
    def sinkhorn_forward_kernel(p_x, p_y, count, iters, EPS: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
        i_matrix = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        at, inside = matrices(i_matrix, count, N * N, N)
        x = tl.load(p_x + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(p_y + at, iterate(x, iters, EPS).to(p_y.dtype.element_ty), mask=inside)

    @triton.jit
    def sinkhorn_backward_kernel(p_x, p_gy, p_gx, p_scratch, count, iters, EPS: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
        i_matrix = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        at, inside = matrices(i_matrix, count, N * N, N)
        x = tl.load(p_x + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(p_gy + at, mask=inside, other=0.0).to(tl.float32)
        g = iterate_back(x, g, p_scratch, iters, EPS, N, BLOCK)
        tl.store(p_gx + at, g.to(p_gx.dtype.element_ty), mask=inside)


def sinkhorn_forward_triton(x, iters):
    y, n = like(x), x.shape[-1]
    count, block = x.numel() // n**2, 1024 // n**2
    with torch.cuda.device_of(x):
        sinkhorn_forward_kernel[(triton.cdiv(count, block),)](x, y, count, iters, SINKHORN_EPS, n, block)
    return y


def sinkhorn_backward_triton(x, g_y, iters):
    g_x, n = like(x), x.shape[-1]
    count, block = x.numel() // n**2, 1024 // n**2
    programs = triton.cdiv(count, block)
    scratch = torch.empty(programs * 2 * iters * block * n, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        sinkhorn_backward_kernel[(programs,)](x, g_y, g_x, scratch, count, iters, SINKHORN_EPS, n, block)
    return g_x


SINKHORN = {"c": (sinkhorn_forward_c, sinkhorn_backward_c), "triton": (sinkhorn_forward_triton, sinkhorn_backward_triton)}


class Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, iters, path):
        tally("sinkhorn", path)
        x = logits.contiguous()
        ctx.save_for_backward(x)
        ctx.iters, ctx.path = iters, path
        return SINKHORN[path][0](x, iters)

    @staticmethod
    @once_differentiable
    def backward(ctx, g_y):
        tally("sinkhorn backward", ctx.path)
        (x,) = ctx.saved_tensors
        return SINKHORN[ctx.path][1](x, g_y.contiguous(), ctx.iters), None, None


# --- mHC's coefficients ---


@torch._disable_dynamo # as at sinkhorn
def mhc_coefficients(h, phi, alpha, b, iters=20, eps=1e-6):
    """
    What mHC reads, writes and mixes its streams with, of each token's N streams h (..., N, C). With x = flat h, of N C numbers:
        z = (x phi^T) r, r = 1 / sqrt(mean(x^2) + eps);  [pre | post | logits] = alpha_k z + b, a part k has N, N and N^2 columns
        -> sigmoid(pre) (..., N), 2 sigmoid(post) (..., N), sinkhorn(logits (..., N, N), iters): H[out, in]
    phi (2 N + N^2, N C), alpha (3,), b (2 N + N^2,), gradients to all. Xie et al. 2025, arXiv:2512.24880, section 4. fp32 inside,
    fp64 for fp64, results in h's dtype; N = 2, 4, 8 are fast. ValueError for other shapes.
    """
    N, width = (h.shape[-2], h.shape[-2] * h.shape[-1]) if h.dim() > 1 else (0, 0)
    columns = 2 * N + N * N
    if not N or phi.shape != (columns, width) or alpha.shape != (3,) or b.shape != (columns,):
        raise ValueError(f"mhc_coefficients takes h (..., N, C) with phi (2 N + N^2, N C), alpha (3,) and b (2 N + N^2,), not "
                         f"{', '.join(str(tuple(t.shape)) for t in (h, phi, alpha, b))}")
    if iters < 1:
        raise ValueError(f"mhc_coefficients needs iters >= 1, not {iters}")
    path = streams_path(h, phi, alpha, b)
    if path == "torch":
        tally("mhc_coefficients", path)
        return mhc_coefficients_reference(h, phi, alpha, b, iters, eps)
    return run(Coefficients, h, phi, alpha, b, iters, eps, path)


def mhc_coefficients_reference(h, phi, alpha, b, iters=20, eps=1e-6):
    pre, post, logits = mhc_gates(h, phi, alpha, b, eps)
    res = sinkhorn_reference(logits.unflatten(-1, (h.size(-2), h.size(-2))), iters)
    return pre.type_as(h), post.type_as(h), res.type_as(h)


def mhc_gates(h, phi, alpha, b, eps=1e-6):
    """pre, post and the logits (..., L) of a mixing of any kind, in plain PyTorch, fp32 or fp64: phi (2 N + L, N C), b (2 N + L,)."""
    N, x = h.size(-2), (h if h.dtype == torch.float64 else h.float()).flatten(-2) # (..., N C)
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.size(-1)
    z = F.linear(x, phi.type_as(x)) * torch.rsqrt(square + eps) # the norm after the product: it is one number per token
    widths = [N, N, len(b) - 2 * N]
    pre, post, logits = (a * t + c for a, t, c in zip(alpha.type_as(x), z.split(widths, dim=-1), b.type_as(x).split(widths)))
    return pre.sigmoid(), 2 * post.sigmoid(), logits


# The products stay BLAS's, near its peak. Around them 16 tokens at a time, in Sinkhorn's lanes. r's gradient comes back to x
# as one number per token times x. The gradients of alpha and b are sums over all tokens: over 16 here, those in fp64 outside.
# 1,024 tokens of 4 x 384, forward and backward, one thread: 4.7 ms, four fifths of it products; torch.compile of the reference 6.4.
MHC_SOURCE = SINKHORN_SOURCE + """
    #define COLUMNS (2 * N + N * N)
    #define PART(k) ((k >= N) + (k >= 2 * N))
    typedef float row_block[COLUMNS][LANES];

    /* z r, r and the logits, of the `here` tokens from `first` on */
    static void logits(int64_t first, int64_t here, float eps, const float *z, const float *square, const float *alpha, const float *b,
                       float (*normed)[LANES], float *r, float (*x)[LANES]) {
        load(z + first * COLUMNS, COLUMNS, here, COLUMNS, normed);
        for (int l = 0; l < LANES; l++) r[l] = 1 / sqrtf((l < here ? square[first + l] : 0) + eps);
        for (int k = 0; k < COLUMNS; k++) {
            float a = alpha[PART(k)], c = b[k];
            for (int l = 0; l < LANES; l++) normed[k][l] *= r[l], x[k][l] = a * normed[k][l] + c;
        }
    }

    static void sigmoid(float (*x)[LANES]) { /* of the two gates */
        for (int k = 0; k < 2 * N; k++)
            for (int l = 0; l < LANES; l++) x[k][l] = 1 / (1 + exponential(-x[k][l]));
    }

    void mhc_forward(int threads, int64_t tokens, int64_t width, int64_t iters, float eps, const float *H, const float *z,
                     const float *alpha, const float *b, float *square, float *pre, float *post, float *res) {
        #pragma omp parallel for num_threads(threads) schedule(static) if (tokens > LANES)
        for (int64_t first = 0; first < tokens; first += LANES) {
            int64_t here = tokens - first < LANES ? tokens - first : LANES;
            float r[LANES];
            row_block normed, x;
            for (int64_t t = first; t < first + here; t++) {
                const float *h = H + t * width;
                float sum = 0;
                #pragma omp simd reduction(+ : sum)
                for (int64_t c = 0; c < width; c++) sum += h[c] * h[c];
                square[t] = sum / width;
            }
            logits(first, here, eps, z, square, alpha, b, normed, r, x);
            sigmoid(x);
            for (int k = N; k < 2 * N; k++)
                for (int l = 0; l < LANES; l++) x[k][l] *= 2;
            iterate(x + 2 * N, iters);
            store(pre + first * N, N, here, N, x);
            store(post + first * N, N, here, N, x + N);
            store(res + first * N * N, N * N, here, N * N, x + 2 * N);
        }
    }

    /* g_z, the factor of x in its gradient, and for each 16 tokens [g_alpha | g_b] */
    void mhc_backward(int threads, int64_t tokens, int64_t width, int64_t iters, float eps, const float *z, const float *square,
                      const float *alpha, const float *b, const float *g_pre, const float *g_post, const float *g_res,
                      float *g_z, float *factor, float *sums, float *scratch) {
        int64_t blocks = (tokens + LANES - 1) / LANES;
        #pragma omp parallel for num_threads(threads) schedule(static, 1) if (blocks > 1)
        for (int t = 0; t < threads; t++) {
            EACH_BLOCK(t) {
                int64_t first = i_b * LANES, here = tokens - first < LANES ? tokens - first : LANES;
                float r[LANES], back[LANES] = {0}, *to = sums + i_b * (3 + COLUMNS);
                row_block normed, x, g;
                logits(first, here, eps, z, square, alpha, b, normed, r, x);
                load(g_pre + first * N, N, here, N, g);
                load(g_post + first * N, N, here, N, g + N);
                load(g_res + first * N * N, N * N, here, N * N, g + 2 * N);
                sigmoid(x);
                for (int k = 0; k < 2 * N; k++)
                    for (int l = 0; l < LANES; l++) g[k][l] *= (1 + PART(k)) * x[k][l] * (1 - x[k][l]);
                iterate_back(x + 2 * N, g + 2 * N, iters, scratch + t * SCRATCH(iters));
                to[0] = to[1] = to[2] = 0;
                for (int k = 0; k < COLUMNS; k++) {
                    float a = alpha[PART(k)], sum = 0, dot = 0;
                    _Pragma("omp simd reduction(+ : sum, dot)")
                    for (int l = 0; l < LANES; l++) {
                        sum += g[k][l], dot += g[k][l] * normed[k][l];
                        back[l] += a * g[k][l] * normed[k][l], g[k][l] *= a * r[l];
                    }
                    to[3 + k] = sum, to[PART(k)] += dot;
                }
                store(g_z + first * COLUMNS, COLUMNS, here, COLUMNS, g);
                for (int l = 0; l < here; l++) factor[first + l] = -back[l] * r[l] * r[l] / width;
            }
        }
    }
"""


def mhc_forward_c(x, phi, alpha, b, N, iters, eps):
    z, square = product(x, phi.t()), x.new_empty(len(x))
    pre, post, res = (x.new_empty(len(x), k) for k in (N, N, N * N))
    sizes = len(x), x.size(1), iters, eps
    sinkhorn_library(N, MHC_SOURCE).mhc_forward(threads(), *sizes, *map(address, (x, z, alpha, b, square, pre, post, res)))
    return z, square, pre, post, res


def mhc_backward_c(width, z, square, alpha, b, g_pre, g_post, g_res, N, iters, eps):
    g_z, factor, sums = like(z), like(square), z.new_empty(-(-len(z) // LANES), 3 + len(b))
    tensors = z, square, alpha, b, g_pre, g_post, g_res, g_z, factor, sums, sinkhorn_scratch(N, iters)
    sizes = len(z), width, iters, eps
    sinkhorn_library(N, MHC_SOURCE).mhc_backward(threads(), *sizes, *map(address, tensors))
    return g_z, factor, sums


def product(a, b):
    """a b in a's dtype: autocast, which would round it, leaves alone what has a place to go to."""
    return torch.mm(a, b, out=torch.empty(a.size(0), b.size(1), dtype=a.dtype, device=a.device))


if triton is not None:
    @triton.jit
    def mhc_product_kernel(p_x, p_phi, p_z, p_square, tokens, width, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
                           PADDED: tl.constexpr):
        """z = x phi^T and mean(x^2) of BLOCK tokens in one walk. fp32 whatever comes in: TF32 would keep 10 bits."""
        i_t, i_k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PADDED)
        z, square = tl.zeros((BLOCK, PADDED), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for start in range(0, width, BLOCK_C):
            i_c = start + tl.arange(0, BLOCK_C)
            x = tl.load(p_x + i_t[:, None] * width + i_c[None, :], mask=(i_t < tokens)[:, None] & (i_c < width)[None, :], other=0.0)
            phi = tl.load(p_phi + i_k[None, :] * width + i_c[:, None], mask=(i_k < COLUMNS)[None, :] & (i_c < width)[:, None], other=0.0)
            x = x.to(tl.float32)
            z = tl.dot(x, phi.to(tl.float32), z, input_precision="ieee")
            square += tl.sum(x * x, axis=1)
        tl.store(p_z + i_t[:, None] * COLUMNS + i_k[None, :], z, mask=(i_t < tokens)[:, None] & (i_k < COLUMNS)[None, :])
        tl.store(p_square + i_t, square / width, mask=i_t < tokens)

    @triton.jit
    def mhc_forward_kernel(p_z, p_square, p_alpha, p_b, p_pre, p_post, p_res, tokens, iters, eps, EPS: tl.constexpr, N: tl.constexpr,
                           BLOCK: tl.constexpr):
        COLUMNS: tl.constexpr = 2 * N + N * N
        i_t, i_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, N)
        r = 1 / tl.sqrt(tl.load(p_square + i_t, mask=i_t < tokens, other=1.0) + eps)
        gate = (i_t < tokens)[:, None] & (i_n >= 0)[None, :]
        for k in tl.static_range(2):
            z = tl.load(p_z + i_t[:, None] * COLUMNS + k * N + i_n[None, :], mask=gate, other=0.0) * r[:, None]
            x = tl.load(p_alpha + k).to(tl.float32) * z + tl.load(p_b + k * N + i_n).to(tl.float32)[None, :]
            p_to = p_pre if k == 0 else p_post
            tl.store(p_to + i_t[:, None] * N + i_n[None, :], ((1 + k) / (1 + tl.exp(-x))).to(p_to.dtype.element_ty), mask=gate)
        at, inside = matrices(i_t, tokens, COLUMNS, N)
        z = tl.load(p_z + 2 * N + at, mask=inside, other=0.0) * r[:, None, None]
        b = tl.load(p_b + 2 * N + i_n[:, None] * N + i_n[None, :]).to(tl.float32)
        m = iterate(tl.load(p_alpha + 2).to(tl.float32) * z + b[None, :, :], iters, EPS)
        at, inside = matrices(i_t, tokens, N * N, N)
        tl.store(p_res + at, m.to(p_res.dtype.element_ty), mask=inside)

    @triton.jit
    def mhc_backward_kernel(p_z, p_square, p_alpha, p_b, p_gpre, p_gpost, p_gres, p_gz, p_factor, p_sums, p_scratch, tokens, width, iters,
                            eps, EPS: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
        COLUMNS: tl.constexpr = 2 * N + N * N
        i_t, i_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, N)
        r = 1 / tl.sqrt(tl.load(p_square + i_t, mask=i_t < tokens, other=1.0) + eps)
        gate = (i_t < tokens)[:, None] & (i_n >= 0)[None, :]
        back = tl.zeros((BLOCK,), tl.float32)
        p_sums += tl.program_id(0) * (3 + COLUMNS) # [g_alpha | g_b] of this program's tokens
        for k in tl.static_range(2):
            z = tl.load(p_z + i_t[:, None] * COLUMNS + k * N + i_n[None, :], mask=gate, other=0.0) * r[:, None]
            a = tl.load(p_alpha + k).to(tl.float32)
            p = 1 / (1 + tl.exp(-a * z - tl.load(p_b + k * N + i_n).to(tl.float32)[None, :]))
            p_g = p_gpre if k == 0 else p_gpost
            g = (1 + k) * p * (1 - p) * tl.load(p_g + i_t[:, None] * N + i_n[None, :], mask=gate, other=0.0).to(tl.float32)
            back += a * tl.sum(g * z, axis=1)
            tl.store(p_sums + k, tl.sum(tl.sum(g * z, axis=1), axis=0))
            tl.store(p_sums + 3 + k * N + i_n, tl.sum(g, axis=0))
            tl.store(p_gz + i_t[:, None] * COLUMNS + k * N + i_n[None, :], a * g * r[:, None], mask=gate)
        at, inside = matrices(i_t, tokens, N * N, N)
        g = tl.load(p_gres + at, mask=inside, other=0.0).to(tl.float32)
        at, inside = matrices(i_t, tokens, COLUMNS, N)
        z = tl.load(p_z + 2 * N + at, mask=inside, other=0.0) * r[:, None, None]
        a, i_nn = tl.load(p_alpha + 2).to(tl.float32), i_n[:, None] * N + i_n[None, :]
        x = a * z + tl.load(p_b + 2 * N + i_nn).to(tl.float32)[None, :, :]
        g = iterate_back(x, g, p_scratch, iters, EPS, N, BLOCK)
        dots = tl.sum(tl.sum(g * z, axis=2), axis=1)
        tl.store(p_sums + 2, tl.sum(dots, axis=0))
        tl.store(p_sums + 3 + 2 * N + i_nn, tl.sum(g, axis=0))
        tl.store(p_gz + 2 * N + at, a * g * r[:, None, None], mask=inside)
        tl.store(p_factor + i_t, -(back + a * dots) * r * r / width, mask=i_t < tokens)


def mhc_forward_triton(x, phi, alpha, b, N, iters, eps):
    z, square = (torch.empty(*s, dtype=torch.float32, device=x.device) for s in ((len(x), len(b)), (len(x),)))
    pre, post, res = (torch.empty(len(x), k, dtype=x.dtype, device=x.device) for k in (N, N, N * N))
    padded, block = max(16, triton.next_power_of_2(len(b))), 1024 // N**2 # tl.dot takes 16 or more
    with torch.cuda.device_of(x):
        mhc_product_kernel[(triton.cdiv(len(x), 32),)](x, phi, z, square, len(x), x.size(1), len(b), 32, 64, padded)
        mhc_forward_kernel[(triton.cdiv(len(x), block),)](z, square, alpha, b, pre, post, res, len(x), iters, eps, SINKHORN_EPS, N, block)
    return z, square, pre, post, res


def mhc_backward_triton(width, z, square, alpha, b, g_pre, g_post, g_res, N, iters, eps):
    block = 1024 // N**2
    programs = triton.cdiv(len(z), block)
    g_z, factor = like(z), like(square)
    sums, scratch = (torch.empty(programs, k, dtype=torch.float32, device=z.device) for k in (3 + len(b), 2 * iters * block * N))
    with torch.cuda.device_of(z):
        mhc_backward_kernel[(programs,)](z, square, alpha, b, g_pre, g_post, g_res, g_z, factor, sums, scratch, len(z), width, iters, eps,
                                         SINKHORN_EPS, N, block)
    return g_z, factor, sums


COEFFICIENTS = {"c": (mhc_forward_c, mhc_backward_c), "triton": (mhc_forward_triton, mhc_backward_triton)}


class Coefficients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, phi, alpha, b, iters, eps, path):
        tally("mhc_coefficients", path)
        N, x, phi, alpha, b = h.size(-2), h.contiguous().view(-1, h.size(-2) * h.size(-1)), *(t.contiguous() for t in (phi, alpha, b))
        z, square, pre, post, res = COEFFICIENTS[path][0](x, phi, alpha, b, N, iters, eps)
        ctx.save_for_backward(x, phi, alpha, b, z, square)
        ctx.shape, ctx.rest, ctx.path = h.shape, (N, iters, eps), path
        return tuple(t.view(*h.shape[:-2], *s) for t, s in ((pre, (N,)), (post, (N,)), (res, (N, N))))

    @staticmethod
    @once_differentiable
    def backward(ctx, *g):
        tally("mhc_coefficients backward", ctx.path)
        x, phi, alpha, b, z, square = ctx.saved_tensors
        g_z, factor, sums = COEFFICIENTS[ctx.path][1](x.size(1), z, square, alpha, b, *(t.contiguous() for t in g), *ctx.rest)
        wide = x.float()
        g_x = product(g_z, phi.float()).addcmul_(factor.unsqueeze(1), wide)
        g_alpha, g_b = sums.sum(0, dtype=torch.float64).split([3, len(b)])
        return (g_x.to(x.dtype).view(ctx.shape), product(g_z.t(), wide).to(phi.dtype), g_alpha.to(alpha.dtype), g_b.to(b.dtype),
                None, None, None)


# --- activations ---


def activate(x, name, eps=None):
    """
    act(x), elementwise; any shape. Sources and formulas, with their derivatives, E = exp(-x^2 / 2):
        gelu    x Phi(x)                  Phi + x E / sqrt(2 pi)         Hendrycks & Gimpel 2016, arXiv:1606.08415; exact, not tanh
        relu2   max(0, x)^2               2 max(0, x)                    So et al. 2021, arXiv:2109.08668
        silu    x s(x)                    s + x s (1 - s)                Elfwing et al. 2017, arXiv:1702.03118
        telu    x tanh(e^x)               t + x e^x (1 - t^2)            Fernandez & Mali 2024, arXiv:2412.20269
        crrelu  max(0, x) + eps x E       [x > 0] + eps (1 - x^2) E      Sun et al. 2024, arXiv:2405.12954; eps () is learned
    """
    return activation(x, None, name, eps)


def gated(gate, up, name, eps=None):
    """act(gate) * up in one pass, both of one shape and dtype. Shazeer 2020, arXiv:2002.05202."""
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device:
        raise ValueError(f"gate {tuple(gate.shape)} {gate.dtype} {gate.device} and up {tuple(up.shape)} {up.dtype} {up.device} differ")
    return activation(gate, up, name, eps)


def gated_pair(x, name, eps=None):
    """The same for gate and up side by side, as one matrix makes them: (..., 2 F) -> (..., F), and one gradient (..., 2 F)."""
    if x.size(-1) % 2:
        raise ValueError(f"gate and up are the halves of the last axis, which is {x.size(-1)} wide")
    return activation(x, PAIR, name, eps)


PAIR = object() # in place of up: x holds both


@functools.cache # once for each name
def known_to_kernels(name):
    """Whether C and Triton have the formula. A row that was added to ACTIVATIONS alone runs as it stands there, and that is said."""
    if name not in ACTIVATION_SOURCES:
        print(f"activation={name} is in ACTIVATIONS but in no kernel: it runs as plain PyTorch")
    return name in ACTIVATION_SOURCES


def activation(x, up, name, eps):
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r} is none of {', '.join(ACTIVATIONS)}")
    if (name == "crrelu") != (eps is not None):
        raise ValueError(f"activation={name} " + ("needs its eps, a tensor ()" if eps is None else "has no eps; only crrelu does"))
    if eps is not None and (eps.dim() != 0 or eps.device != x.device):
        raise ValueError(f"crrelu's eps is one number on {x.device}: a tensor (), not {tuple(eps.shape)} on {eps.device}")
    if not x.numel() or (KERNEL == "auto" and torch.compiler.is_compiling()): # the compiler fuses formulas with what is around them
        paths = {"torch"}
    else:
        paths = {path_for(t) for t in (x, up) if torch.is_tensor(t)}
    path = paths.pop() if len(paths) == 1 else "torch"
    if path == "torch" or not known_to_kernels(name):
        tally(operation(name, up is not None), "torch")
        return activation_reference(*(x.chunk(2, dim=-1) if up is PAIR else (x, up)), name, eps)
    return run(Activation, x, None if up is PAIR else up, eps, name, path, up is PAIR)


def operation(name, gating):
    return "gated " + name if gating else name


def telu_reference(x, eps):
    # The textbook's derivative is inf * 0 from x = 88.8 on. Beyond the bounds nothing changes: tanh is 1 from 10 on in fp64
    # too, and below -700 e^x is 0. clamp gives those x no gradient through it, whatever overflowed there.
    return x * x.clamp(-700, 10).exp().tanh()


def crrelu_reference(x, eps):
    c = x.clamp(-40, 40) # beyond, E is 0 in fp64 too, and x^2 could be inf
    return x.relu() + eps * c * (-c.square() / 2).exp()


# torch's own gelu and silu, each one pass too, are no faster than the C: forward and backward of 3.1M numbers on one thread
# take 3.5 and 1.9 ms, the C 2.6 and 1.6; relu2, telu and crrelu, of several passes in torch, are 3 to 10 times faster in C.
ACTIVATIONS = {
    "gelu": lambda x, eps: F.gelu(x),
    "relu2": lambda x, eps: x.relu().square(),
    "silu": lambda x, eps: F.silu(x),
    "telu": telu_reference,
    "crrelu": crrelu_reference,
}


def activation_reference(x, up, name, eps):
    wide = (lambda t: t) if x.dtype == torch.float64 else (lambda t: t.float())
    y = ACTIVATIONS[name](wide(x), eps)
    return (y if up is None else y * wide(up)).to(x.dtype)


# Each gives act(x), act'(x) and the derivative by eps; what a loop does not use the compiler drops. Written without branches
# (?: selects). No finite x gives NaN: infinities are met by 1 / or by a factor e^-105 = 0, never by a 0 of another origin.
ACTIVATION_SOURCES = {
    # 1 - Phi(|x|) = E t P(t), t = 1 / (1 + 0.4 |x|): relative error 1.5e-8, so the tail has no cancellation, unlike 1 + erf
    "gelu": """
        float t = 1 / (1 + 0.4f * fabsf(x)), e = exponential(-0.5f * x * x), p = 0.03209848f;
        p = p * t - 0.17617935f, p = p * t + 0.38079596f, p = p * t - 0.37198773f, p = p * t + 0.11775891f, p = p * t - 0.02589792f;
        p = p * t + 0.09100629f, p = p * t + 0.13320985f, p = p * t + 0.15961923f, p = p * t + 0.1595763f;
        float tail = e * (p * t), phi = x < 0 ? tail : 1 - tail;
        *y = x * phi, *slope = phi + x * e * 0.39894228f;""",
    "relu2": """
        float r = x < 0 ? 0 : x; /* NaN stays NaN */
        *y = r * r, *slope = 2 * r;""",
    "silu": """
        float s = 1 / (1 + exponential(-x));
        *y = x * s, *slope = s + s * (1 - s) * x;""",
    # u = e^x. By q = e^-2u tanh and 1 - tanh^2 have no overflow; a polynomial where 1 - q would cancel. From x = 3.7 on tanh is
    # 1 and the rest of the slope below 1e-31: held there, nothing overflows, and q does not become denormal, which is slow.
    "telu": """
        float c = x > 3.7f ? 3.7f : x, u = exponential(c), q = exponential(-2 * u), z = u * u, p = -0.005590975f;
        p = p * z + 0.020538783f, p = p * z - 0.053709645f, p = p * z + 0.13331091f, p = p * z - 0.3333327f;
        float t = u < 0.625f ? u + u * (z * p) : (1 - q) / (1 + q);
        *y = x * t, *slope = t + u * (4 * q / ((1 + q) * (1 + q))) * c;""",
    "crrelu": """
        float c = x > 20 ? 20 : x, positive = x > 0 ? 1 : 0;
        c = c < -20 ? -20 : c; /* beyond, e is 0 and x^2 may be inf */
        float e = exponential(-0.5f * c * c);
        *bump = c * e, *y = (x < 0 ? 0 : x) + eps * *bump, *slope = positive + eps * (1 - c * c) * e;""",
}

ACTIVATION_LOOPS = """
    #define CHUNK 1024 /* elements; sums within are fp32, the chunks' are added in their order: threads change no bit */
    /* rows of `width` results; x, up and their gradients have a row every `step` numbers, so that both may lie in one tensor */
    #define EACH_CHUNK(...) { \\
        int64_t each = (width + CHUNK - 1) / CHUNK; \\
        _Pragma("omp parallel for num_threads(threads) schedule(static) if (rows * width > 32 * CHUNK)") \\
        for (int64_t c = 0; c < rows * each; c++) { \\
            int64_t row = c / each, start = c % each * CHUNK, end = start + CHUNK < width ? start + CHUNK : width; \\
            int64_t a = row * step, b = row * width; \\
            float sum = 0; \\
            _Pragma("omp simd reduction(+ : sum)") \\
            for (int64_t j = start; j < end; j++) { \\
                float v, slope, bump = 0; \\
                act(x[a + j], eps, &v, &slope, &bump); \\
                __VA_ARGS__ \\
            } \\
            if (sums) sums[c] = sum; \\
        } \\
    }

    void forward(int threads, int64_t rows, int64_t width, int64_t step, float eps, const float *x, const float *up, float *y) {
        float *sums = 0;
        if (up) EACH_CHUNK(y[b + j] = v * up[a + j];)
        else EACH_CHUNK(y[b + j] = v;)
    }

    void backward(int threads, int64_t rows, int64_t width, int64_t step, float eps, const float *x, const float *up, const float *g,
                  float *g_x, float *g_up, float *sums) {
        if (up) EACH_CHUNK(float g_v = g[b + j] * up[a + j]; g_x[a + j] = g_v * slope; g_up[a + j] = g[b + j] * v; sum += g_v * bump;)
        else EACH_CHUNK(g_x[a + j] = g[b + j] * slope; sum += g[b + j] * bump;)
    }
"""


@functools.cache
def activation_library(name):
    act = "static inline void act(float x, float eps, float *y, float *slope, float *bump) {" + ACTIVATION_SOURCES[name] + "}"
    return needed(C_MATH + act + ACTIVATION_LOOPS)


def rows_of(x, paired):
    """(rows, width, step): of a pair the rows are those of the tensor, else all of it is one."""
    return (x.numel() // x.size(-1), x.size(-1) // 2, x.size(-1)) if paired else (1, x.numel(), x.numel())


def activation_forward_c(x, up, y, eps, name, paired):
    shape, number = rows_of(x, paired), 0 if eps is None else eps.item()
    up = second_half(x) if paired else address(up)
    activation_library(name).forward(threads(), *shape, number, address(x), up, address(y))


def activation_backward_c(x, up, g, g_x, g_up, eps, name, paired):
    rows, width, step = rows_of(x, paired)
    up, g_up = (second_half(x), second_half(g_x)) if paired else (address(up), address(g_up))
    sums = None if eps is None else torch.empty(rows * -(-width // 1024), dtype=torch.float32, device="cpu")
    shape, number = (rows, width, step), 0 if eps is None else eps.item()
    activation_library(name).backward(
        threads(), *shape, number, address(x), up, address(g), address(g_x), g_up, address(sums))
    return sums


def second_half(x):
    """Address of the second half of the first row."""
    return address(x) + x.element_size() * (x.size(-1) // 2)


if triton is not None:
    @triton.jit
    def act(x, eps, NAME: tl.constexpr):
        """act(x), act'(x), and the derivative by eps; the formulas and guards of the C above."""
        bump = x * 0.0
        if NAME == "gelu":
            phi = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
            y, slope = x * phi, phi + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
        elif NAME == "relu2":
            r = tl.where(x < 0, 0.0, x)
            y, slope = r * r, 2 * r
        elif NAME == "silu":
            s = 1 / (1 + tl.exp(-x))
            y, slope = x * s, s + s * (1 - s) * x
        elif NAME == "telu":
            c = tl.where(x > 3.7, 3.7, x)
            u = tl.exp(c)
            q, z = tl.exp(-2 * u), tl.where(u < 0.625, u * u, 0.0)
            p = -0.33333269 + z * (0.13331091 + z * (-0.053709645 + z * (0.020538783 - z * 0.005590975)))
            t = tl.where(u < 0.625, u + u * (z * p), (1 - q) / (1 + q))
            y, slope = x * t, t + u * (4 * q / ((1 + q) * (1 + q))) * c
        else:
            tl.static_assert(NAME == "crrelu", "an activation without a formula here")
            c = tl.where(x > 20, 20.0, tl.where(x < -20, -20.0, x))
            e = tl.exp(-0.5 * c * c)
            bump = c * e
            y, slope = tl.where(x < 0, 0.0, x) + eps * bump, tl.where(x > 0, 1.0, 0.0) + eps * (1 - c * c) * e
        return y, slope, bump

    # up and eps may be None, which Triton compiles as a constant: their branches are then not there. F > 0: gate and up are the
    # halves, F wide, of the rows of x; element i of the result has its gate at j and its up at j + F.
    @triton.jit
    def activation_forward_kernel(p_x, p_up, p_eps, p_y, n, F: tl.constexpr, NAME: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        j = i + i // F * F if F > 0 else i
        inside, eps = i < n, 0.0
        if p_eps is not None:
            eps = tl.load(p_eps).to(tl.float32)
        y, _, _ = act(tl.load(p_x + j, mask=inside, other=0.0).to(tl.float32), eps, NAME)
        if F > 0:
            y = y * tl.load(p_x + F + j, mask=inside, other=0.0).to(tl.float32)
        elif p_up is not None:
            y = y * tl.load(p_up + i, mask=inside, other=0.0).to(tl.float32)
        tl.store(p_y + i, y.to(p_y.dtype.element_ty), mask=inside)

    @triton.jit
    def activation_backward_kernel(p_x, p_up, p_eps, p_g, p_gx, p_gup, p_sums, n, F: tl.constexpr, NAME: tl.constexpr,
                                   BLOCK: tl.constexpr):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        j = i + i // F * F if F > 0 else i
        inside, eps = i < n, 0.0
        if p_eps is not None:
            eps = tl.load(p_eps).to(tl.float32)
        y, slope, bump = act(tl.load(p_x + j, mask=inside, other=0.0).to(tl.float32), eps, NAME)
        g = tl.load(p_g + i, mask=inside, other=0.0).to(tl.float32)
        if F > 0:
            tl.store(p_gx + F + j, (g * y).to(p_gx.dtype.element_ty), mask=inside)
            g = g * tl.load(p_x + F + j, mask=inside, other=0.0).to(tl.float32)
        elif p_up is not None:
            tl.store(p_gup + i, (g * y).to(p_gup.dtype.element_ty), mask=inside)
            g = g * tl.load(p_up + i, mask=inside, other=0.0).to(tl.float32)
        tl.store(p_gx + j, (g * slope).to(p_gx.dtype.element_ty), mask=inside)
        if p_eps is not None: # each program its own sum, added up in one order: atomics would differ from run to run
            tl.store(p_sums + tl.program_id(0), tl.sum(g * bump, axis=0))


def activation_forward_triton(x, up, y, eps, name, paired):
    n, F = y.numel(), x.size(-1) // 2 if paired else 0
    with torch.cuda.device_of(x):
        activation_forward_kernel[(triton.cdiv(n, 1024),)](x, up, eps, y, n, F, name, 1024)


def activation_backward_triton(x, up, g, g_x, g_up, eps, name, paired):
    n, F = g.numel(), x.size(-1) // 2 if paired else 0
    programs = triton.cdiv(n, 1024)
    sums = None if eps is None else torch.empty(programs, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        activation_backward_kernel[(programs,)](x, up, eps, g, g_x, g_up, sums, n, F, name, 1024)
    return sums


ACTIVATION = {"c": (activation_forward_c, activation_backward_c), "triton": (activation_forward_triton, activation_backward_triton)}


class Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, up, eps, name, path, paired):
        ctx.name, ctx.path, ctx.paired, ctx.operation = name, path, paired, operation(name, paired or up is not None)
        tally(ctx.operation, path)
        x, up = x.contiguous(), None if up is None else up.contiguous()
        ctx.save_for_backward(x, up, eps)
        y = torch.empty((*x.shape[:-1], x.size(-1) // 2) if paired else x.shape, dtype=x.dtype, device=x.device)
        ACTIVATION[path][0](x, up, y, eps, name, paired)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, up, eps = ctx.saved_tensors
        tally(ctx.operation + " backward", ctx.path)
        g_x, g_up = like(x), None if up is None else like(up)
        sums = ACTIVATION[ctx.path][1](x, up, g.contiguous(), g_x, g_up, eps, ctx.name, ctx.paired)
        return g_x, g_up, None if sums is None else sums.double().sum().to(eps.dtype), None, None, None


# --- residual streams: reading a sublayer's input from N of them, and writing its output back ---


# Inductor 2.13 on a CPU, given the formulas of hyper-connections, makes gradients that are wrong (by 60% for an embedding; eager
# and aot_eager agree with fp64). torch.compile therefore stops at these two, as at sinkhorn, and the kernels run as they are.
@torch._disable_dynamo
def read_streams(x, pre):
    """u = sum_i pre_i x_i. x (..., N, C), pre (..., N) -> (..., C). Zhu et al. 2024, arXiv:2409.19606; mHC, arXiv:2512.24880."""
    if x.dim() < 2 or pre.shape != x.shape[:-1]:
        raise ValueError(f"read_streams takes x (..., N, C) and pre (..., N), not {tuple(x.shape)} and {tuple(pre.shape)}")
    path = streams_path(x, pre)
    if path == "torch":
        tally("read_streams", path)
        return read_streams_reference(x, pre)
    return run(ReadStreams, x, pre, path)


def read_streams_reference(x, pre):
    return (pre.type_as(x).unsqueeze(-2) @ x).squeeze(-2)


@torch._disable_dynamo
def write_streams(x, y, post, res):
    """x'_o = sum_i res_oi x_i + post_o y. x (..., N, C), y (..., C), post (..., N), res (..., N, N) [out, in] -> (..., N, C)."""
    fits = x.dim() > 1 and (y.shape, post.shape, res.shape) == (x[..., 0, :].shape, x.shape[:-1], (*x.shape[:-1], x.size(-2)))
    if not fits:
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, y, post, res))
        raise ValueError(f"write_streams takes x (..., N, C), y (..., C), post (..., N) and res (..., N, N), not {shapes}")
    path = streams_path(x, y, post, res)
    if path == "torch":
        tally("write_streams", path)
        return write_streams_reference(x, y, post, res)
    return run(WriteStreams, x, y, post, res, path)


def write_streams_reference(x, y, post, res):
    return res.type_as(x) @ x + post.type_as(x).unsqueeze(-1) * y.unsqueeze(-2)


def streams_path(x, *others):
    """The tensors after x may lie in memory as they like, they are small or fresh; all have to be of one kind."""
    if x.size(-2) not in (2, 4, 8) or not x.numel():
        return "torch"
    path = path_for(x)
    return path if path != "c" or all(t.dtype == torch.float32 for t in others) else "torch"


# One token at a time: its N C numbers stay in the first cache while each is used N times. The dot products of the backward
# are taken one after the other over those; that is N^2 walks through the first cache instead of one through memory each.
STREAMS_SOURCE = """
    #include <stdint.h>
    #define EACH_TOKEN _Pragma("omp parallel for num_threads(threads) schedule(static)") for (int64_t t = 0; t < tokens; t++)
    #define EACH_CHANNEL _Pragma("omp simd") for (int64_t c = 0; c < C; c++)

    static inline float dot(int64_t C, const float *restrict a, const float *restrict b) {
        float total = 0;
        for (int64_t start = 0; start < C; start += 128) { /* short chains of additions round less */
            int64_t end = start + 128 < C ? start + 128 : C;
            float sum = 0;
            _Pragma("omp simd reduction(+ : sum)")
            for (int64_t c = start; c < end; c++) sum += a[c] * b[c];
            total += sum;
        }
        return total;
    }

    void read_forward(int threads, int64_t tokens, int64_t C, const float *X, const float *pre, float *u) {
        EACH_TOKEN {
            const float *x = X + t * N * C, *p = pre + t * N;
            float *restrict out = u + t * C;
            EACH_CHANNEL {
                float sum = 0;
                _Pragma("GCC unroll 8")
                for (int i = 0; i < N; i++) sum += p[i] * x[i * C + c];
                out[c] = sum;
            }
        }
    }

    void read_backward(int threads, int64_t tokens, int64_t C, const float *X, const float *pre, const float *G, float *g_x, float *g_pre) {
        EACH_TOKEN {
            const float *x = X + t * N * C, *g = G + t * C;
            for (int i = 0; i < N; i++) {
                float p = pre[t * N + i], *restrict to = g_x + (t * N + i) * C;
                EACH_CHANNEL to[c] = p * g[c];
                g_pre[t * N + i] = dot(C, g, x + i * C);
            }
        }
    }

    void write_forward(int threads, int64_t tokens, int64_t C, const float *X, const float *Y, const float *post, const float *res,
                       float *out) {
        EACH_TOKEN {
            const float *x = X + t * N * C, *y = Y + t * C;
            for (int o = 0; o < N; o++) {
                const float *r = res + (t * N + o) * N;
                float p = post[t * N + o], *restrict to = out + (t * N + o) * C;
                EACH_CHANNEL {
                    float sum = p * y[c];
                    _Pragma("GCC unroll 8")
                    for (int i = 0; i < N; i++) sum += r[i] * x[i * C + c];
                    to[c] = sum;
                }
            }
        }
    }

    void write_backward(int threads, int64_t tokens, int64_t C, const float *X, const float *Y, const float *post, const float *res,
                        const float *G, float *g_x, float *g_y, float *g_post, float *g_res) {
        EACH_TOKEN {
            const float *x = X + t * N * C, *y = Y + t * C, *g = G + t * N * C, *r = res + t * N * N, *p = post + t * N;
            float *restrict to_y = g_y + t * C;
            for (int i = 0; i < N; i++) {
                float *restrict to = g_x + (t * N + i) * C;
                EACH_CHANNEL {
                    float sum = 0;
                    _Pragma("GCC unroll 8")
                    for (int o = 0; o < N; o++) sum += r[o * N + i] * g[o * C + c];
                    to[c] = sum;
                }
            }
            EACH_CHANNEL {
                float sum = 0;
                _Pragma("GCC unroll 8")
                for (int o = 0; o < N; o++) sum += p[o] * g[o * C + c];
                to_y[c] = sum;
            }
            for (int o = 0; o < N; o++) {
                g_post[t * N + o] = dot(C, g + o * C, y);
                for (int i = 0; i < N; i++) g_res[(t * N + o) * N + i] = dot(C, g + o * C, x + i * C);
            }
        }
    }
"""


@functools.cache
def streams_library(N):
    return needed(f"#define N {N}\n" + STREAMS_SOURCE)


def streams_c(function, x, *tensors):
    N, C = x.shape[-2:]
    getattr(streams_library(N), function)(threads(x.numel()), x.numel() // (N * C), C, *map(address, (x, *tensors)))


if triton is not None:
    # A program per token, which walks through the channels in blocks; the sums over them stay in registers.
    @triton.jit
    def read_forward_kernel(p_x, p_pre, p_u, C, N: tl.constexpr, BLOCK: tl.constexpr):
        t, i_n = tl.program_id(0).to(tl.int64), tl.arange(0, N)
        pre = tl.load(p_pre + t * N + i_n).to(tl.float32)
        for start in range(0, C, BLOCK):
            i_c = start + tl.arange(0, BLOCK)
            x = tl.load(p_x + t * N * C + i_n[:, None] * C + i_c[None, :], mask=(i_n >= 0)[:, None] & (i_c < C)[None, :], other=0.0)
            u = tl.sum(pre[:, None] * x.to(tl.float32), axis=0)
            tl.store(p_u + t * C + i_c, u.to(p_u.dtype.element_ty), mask=i_c < C)

    @triton.jit
    def read_backward_kernel(p_x, p_pre, p_g, p_gx, p_gpre, C, N: tl.constexpr, BLOCK: tl.constexpr):
        t, i_n = tl.program_id(0).to(tl.int64), tl.arange(0, N)
        pre = tl.load(p_pre + t * N + i_n).to(tl.float32)
        g_pre = tl.zeros((N,), tl.float32)
        for start in range(0, C, BLOCK):
            i_c = start + tl.arange(0, BLOCK)
            at, inside = t * N * C + i_n[:, None] * C + i_c[None, :], (i_n >= 0)[:, None] & (i_c < C)[None, :]
            x = tl.load(p_x + at, mask=inside, other=0.0).to(tl.float32)
            g = tl.load(p_g + t * C + i_c, mask=i_c < C, other=0.0).to(tl.float32)
            g_pre += tl.sum(x * g[None, :], axis=1)
            tl.store(p_gx + at, (pre[:, None] * g[None, :]).to(p_gx.dtype.element_ty), mask=inside)
        tl.store(p_gpre + t * N + i_n, g_pre.to(p_gpre.dtype.element_ty))

    @triton.jit
    def write_forward_kernel(p_x, p_y, p_post, p_res, p_out, C, N: tl.constexpr, BLOCK: tl.constexpr):
        t, i_n = tl.program_id(0).to(tl.int64), tl.arange(0, N)
        post = tl.load(p_post + t * N + i_n).to(tl.float32)
        for start in range(0, C, BLOCK):
            i_c = start + tl.arange(0, BLOCK)
            y = tl.load(p_y + t * C + i_c, mask=i_c < C, other=0.0).to(tl.float32)
            out = post[:, None] * y[None, :]
            for i in range(N): # column i of res times stream i
                column = tl.load(p_res + t * N * N + i_n * N + i).to(tl.float32)
                x = tl.load(p_x + t * N * C + i * C + i_c, mask=i_c < C, other=0.0).to(tl.float32)
                out += column[:, None] * x[None, :]
            at, inside = t * N * C + i_n[:, None] * C + i_c[None, :], (i_n >= 0)[:, None] & (i_c < C)[None, :]
            tl.store(p_out + at, out.to(p_out.dtype.element_ty), mask=inside)

    @triton.jit
    def write_backward_kernel(p_x, p_y, p_post, p_res, p_g, p_gx, p_gy, p_gpost, p_gres, C, N: tl.constexpr, BLOCK: tl.constexpr):
        t, i_n = tl.program_id(0).to(tl.int64), tl.arange(0, N)
        post = tl.load(p_post + t * N + i_n).to(tl.float32)
        res = tl.load(p_res + t * N * N + i_n[:, None] * N + i_n[None, :]).to(tl.float32) # [out, in]
        g_post, g_res = tl.zeros((N,), tl.float32), tl.zeros((N, N), tl.float32)
        for start in range(0, C, BLOCK):
            i_c = start + tl.arange(0, BLOCK)
            at, inside = t * N * C + i_n[:, None] * C + i_c[None, :], (i_n >= 0)[:, None] & (i_c < C)[None, :]
            g = tl.load(p_g + at, mask=inside, other=0.0).to(tl.float32)
            x = tl.load(p_x + at, mask=inside, other=0.0).to(tl.float32)
            y = tl.load(p_y + t * C + i_c, mask=i_c < C, other=0.0).to(tl.float32)
            g_post += tl.sum(g * y[None, :], axis=1)
            g_res += tl.sum(g[:, None, :] * x[None, :, :], axis=2)
            g_x = tl.sum(res[:, :, None] * g[:, None, :], axis=0)
            tl.store(p_gx + at, g_x.to(p_gx.dtype.element_ty), mask=inside)
            tl.store(p_gy + t * C + i_c, tl.sum(post[:, None] * g, axis=0).to(p_gy.dtype.element_ty), mask=i_c < C)
        tl.store(p_gpost + t * N + i_n, g_post.to(p_gpost.dtype.element_ty))
        tl.store(p_gres + t * N * N + i_n[:, None] * N + i_n[None, :], g_res.to(p_gres.dtype.element_ty))

    STREAMS_KERNELS = {"read_forward": read_forward_kernel, "read_backward": read_backward_kernel,
                       "write_forward": write_forward_kernel, "write_backward": write_backward_kernel}


def streams_triton(function, x, *tensors):
    N, C = x.shape[-2:]
    with torch.cuda.device_of(x):
        STREAMS_KERNELS[function][(x.numel() // (N * C),)](x, *tensors, C, N, min(512, triton.next_power_of_2(C)))


STREAMS = {"c": streams_c, "triton": streams_triton}


class ReadStreams(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, pre, path):
        tally("read_streams", path)
        x, pre, ctx.path = x.contiguous(), pre.contiguous(), path
        ctx.save_for_backward(x, pre)
        u = torch.empty((*x.shape[:-2], x.shape[-1]), dtype=x.dtype, device=x.device)
        STREAMS[path]("read_forward", x, pre, u)
        return u

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        tally("read_streams backward", ctx.path)
        x, pre = ctx.saved_tensors
        g_x, g_pre = like(x), like(pre)
        STREAMS[ctx.path]("read_backward", x, pre, g.contiguous(), g_x, g_pre)
        return g_x, g_pre, None


class WriteStreams(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, post, res, path):
        tally("write_streams", path)
        inputs, ctx.path = [t.contiguous() for t in (x, y, post, res)], path
        ctx.save_for_backward(*inputs)
        out = like(inputs[0])
        STREAMS[path]("write_forward", *inputs, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        tally("write_streams backward", ctx.path)
        inputs = ctx.saved_tensors
        gradients = [like(t) for t in inputs]
        STREAMS[ctx.path]("write_backward", *inputs, g.contiguous(), *gradients)
        return *gradients, None


# --- RMSNorm ---


def rmsnorm(x, weight=None, eps=1e-6):
    """
    y = x r w with r = 1 / sqrt(mean(x^2) + eps) over the last axis; weight (width,) or None for 1. Zhang & Sennrich 2019,
    arXiv:1910.07467. g_x = r (w g - x r^2 mean(w g x)); g_w = sum over rows of g x r.
    """
    compiling = KERNEL == "auto" and torch.compiler.is_compiling()
    if x.is_cpu and not compiling: # heads and parts of a latent lie apart: a copy is one walk more, PyTorch's own way several
        x = x.contiguous()
    path = path_for(x) if x.numel() and not compiling else "torch"
    fits = weight is None or (
        weight.shape == x.shape[-1:] and weight.dtype == x.dtype and weight.device == x.device and weight.is_contiguous())
    if path == "torch" or not fits: # which says what is wrong with a shape
        tally("rmsnorm", "torch")
        return rmsnorm_reference(x, weight, eps)
    return run(RMSNormFunction, x, weight, eps, path)


def rmsnorm_reference(x, weight=None, eps=1e-6):
    return F.rms_norm(x, x.shape[-1:], None if weight is None else weight.type_as(x), eps)


# One walk forward, one backward; r is computed again, from numbers that are in the cache anyway. g_w is summed over ROWS rows
# at a time, and those sums in their order: threads change no bit.
RMSNORM_SOURCE = """
    #include <math.h>
    #include <stdint.h>
    #define EACH_CHANNEL _Pragma("omp simd") for (int64_t c = 0; c < C; c++)

    void forward(int threads, int64_t rows, int64_t C, float eps, const float *X, const float *w, float *Y) {
        #pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t i = 0; i < rows; i++) {
            const float *x = X + i * C;
            float *restrict y = Y + i * C, square = 0;
            #pragma omp simd reduction(+ : square)
            for (int64_t c = 0; c < C; c++) square += x[c] * x[c];
            float r = 1 / sqrtf(square / C + eps);
            if (w) EACH_CHANNEL y[c] = x[c] * r * w[c];
            else EACH_CHANNEL y[c] = x[c] * r;
        }
    }

    void backward(int threads, int64_t rows, int64_t C, float eps, const float *X, const float *w, const float *G, float *g_x, float *g_w) {
        #pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t block = 0; block < (rows + ROWS - 1) / ROWS; block++) {
            float *restrict sums = g_w + block * C;
            if (w) EACH_CHANNEL sums[c] = 0;
            for (int64_t i = block * ROWS; i < (block + 1) * ROWS && i < rows; i++) {
                const float *x = X + i * C, *g = G + i * C;
                float *restrict to = g_x + i * C, square = 0, dot = 0;
                if (w) {
                    #pragma omp simd reduction(+ : square, dot)
                    for (int64_t c = 0; c < C; c++) square += x[c] * x[c], dot += w[c] * g[c] * x[c];
                } else {
                    #pragma omp simd reduction(+ : square, dot)
                    for (int64_t c = 0; c < C; c++) square += x[c] * x[c], dot += g[c] * x[c];
                }
                float r = 1 / sqrtf(square / C + eps), back = dot / C * r * r;
                if (w) EACH_CHANNEL to[c] = r * (w[c] * g[c] - x[c] * back), sums[c] += g[c] * x[c] * r;
                else EACH_CHANNEL to[c] = r * (g[c] - x[c] * back);
            }
        }
    }
"""
ROWS = 16


@functools.cache
def rmsnorm_library():
    return needed(f"#define ROWS {ROWS}\n" + RMSNORM_SOURCE)


def rmsnorm_c(function, x, weight, eps, *tensors):
    rows, C = x.numel() // x.size(-1), x.size(-1)
    getattr(rmsnorm_library(), function)(threads(x.numel()), rows, C, eps, *map(address, (x, weight, *tensors)))


if triton is not None:
    @triton.jit
    def rmsnorm_forward_kernel(p_x, p_w, p_y, C, eps, BLOCK: tl.constexpr):
        i, i_c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        x = tl.load(p_x + i * C + i_c, mask=i_c < C, other=0.0).to(tl.float32)
        y = x / tl.sqrt(tl.sum(x * x, axis=0) / C + eps)
        if p_w is not None:
            y = y * tl.load(p_w + i_c, mask=i_c < C, other=0.0).to(tl.float32)
        tl.store(p_y + i * C + i_c, y.to(p_y.dtype.element_ty), mask=i_c < C)

    @triton.jit
    def rmsnorm_backward_kernel(p_x, p_w, p_g, p_gx, p_sums, rows, C, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        block, i_c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        inside = i_c < C
        sums = tl.zeros((BLOCK,), tl.float32)
        for k in range(ROWS):
            i = block * ROWS + k
            x = tl.load(p_x + i * C + i_c, mask=inside & (i < rows), other=0.0).to(tl.float32)
            g = tl.load(p_g + i * C + i_c, mask=inside & (i < rows), other=0.0).to(tl.float32)
            r = 1 / tl.sqrt(tl.sum(x * x, axis=0) / C + eps)
            sums += g * x * r
            if p_w is not None:
                g = g * tl.load(p_w + i_c, mask=inside, other=0.0).to(tl.float32)
            g_x = r * (g - x * (r * r * tl.sum(g * x, axis=0) / C))
            tl.store(p_gx + i * C + i_c, g_x.to(p_gx.dtype.element_ty), mask=inside & (i < rows))
        if p_w is not None:
            tl.store(p_sums + block * C + i_c, sums, mask=inside)


def rmsnorm_triton(function, x, weight, eps, *tensors):
    C = x.size(-1)
    rows, block = x.numel() // C, triton.next_power_of_2(C)
    with torch.cuda.device_of(x):
        if function == "forward":
            rmsnorm_forward_kernel[(rows,)](x, weight, *tensors, C, eps, block)
        else:
            rmsnorm_backward_kernel[(triton.cdiv(rows, ROWS),)](x, weight, *tensors, rows, C, eps, ROWS, block)


RMSNORM = {"c": rmsnorm_c, "triton": rmsnorm_triton}


class RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, path):
        tally("rmsnorm", path)
        x, ctx.eps, ctx.path = x.contiguous(), eps, path
        ctx.save_for_backward(x, weight)
        y = like(x)
        RMSNORM[path]("forward", x, weight, eps, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        tally("rmsnorm backward", ctx.path)
        x, weight = ctx.saved_tensors
        rows, C = x.numel() // x.size(-1), x.size(-1)
        g_x, sums = like(x), None if weight is None else torch.empty(-(-rows // ROWS), C, dtype=torch.float32, device=x.device)
        RMSNORM[ctx.path]("backward", x, weight, ctx.eps, g.contiguous(), g_x, sums)
        return g_x, None if sums is None else sums.sum(0).to(weight.dtype), None, None


# --- a few rows times a large matrix: decoding ---


def few_rows(x, weight, bias=None):
    """
    x W^T (+ b), (..., n_in), (n_out, n_in), (n_out,) -> (..., n_out), for inference. Decoding a token, or judging a few drafts, is bound by
    reading W, at which the BLAS behind F.linear is slow: all matrices of a model of 10.65M take it 2.2 ms for one row and 4.2
    for five, this 0.9 and 1.9 (AMD EPYC, 2 threads). Small matrices, which lie in the cache, and many rows are BLAS's.
    """
    if weight.numel() <= 2**17 or x.numel() > 16 * x.size(-1) or torch.compiler.is_compiling(): # first: what is left counts microseconds
        return F.linear(x, weight, bias)
    fits = x.size(-1) == weight.size(1) and x.dtype == weight.dtype and x.device == weight.device # else F.linear says what is wrong
    if not fits or path_for(weight) != "c" or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    tally("few_rows", "c")
    x, y = x.contiguous(), torch.empty((*x.shape[:-1], weight.size(0)), dtype=x.dtype, device=x.device)
    needed(FEW_ROWS_SOURCE).few_rows(threads(), x.numel() // x.size(-1), *weight.shape, address(weight), address(x), address(y))
    return y if bias is None else y + bias


# Four outputs for up to four rows of x at a time: 16 sums in registers, each number of W loaded once for all four rows.
FEW_ROWS_SOURCE = """
    #include <stdint.h>
    #include <string.h>
    #define LANES 16
    #define INLINE static inline __attribute__((always_inline))
    typedef float lanes __attribute__((vector_size(4 * LANES)));

    INLINE lanes load(const float *p) { /* from any address */
        lanes v;
        memcpy(&v, p, sizeof v);
        return v;
    }

    INLINE void tile(int outs, int rows, int64_t n_out, int64_t n_in, const float *W, const float *X, float *Y) {
        lanes sums[4][4] = {0};
        int64_t i = 0;
        for (; i + LANES <= n_in; i += LANES) {
            lanes x[4];
            _Pragma("GCC unroll 4")
            for (int r = 0; r < rows; r++) x[r] = load(X + r * n_in + i);
            _Pragma("GCC unroll 4")
            for (int o = 0; o < outs; o++) {
                lanes w = load(W + o * n_in + i);
                _Pragma("GCC unroll 4")
                for (int r = 0; r < rows; r++) sums[o][r] += w * x[r];
            }
        }
        _Pragma("GCC unroll 4")
        for (int o = 0; o < outs; o++) {
            _Pragma("GCC unroll 4")
            for (int r = 0; r < rows; r++) {
                float sum = 0;
                for (int l = 0; l < LANES; l++) sum += sums[o][r][l];
                for (int64_t j = i; j < n_in; j++) sum += W[o * n_in + j] * X[r * n_in + j];
                Y[r * n_out + o] = sum;
            }
        }
    }

    INLINE void tiles(int outs, int64_t rows, int64_t n_out, int64_t n_in, const float *W, const float *X, float *Y) {
        for (; rows >= 4; rows -= 4, X += 4 * n_in, Y += 4 * n_out) tile(outs, 4, n_out, n_in, W, X, Y);
        if (rows == 3) tile(outs, 3, n_out, n_in, W, X, Y);
        if (rows == 2) tile(outs, 2, n_out, n_in, W, X, Y);
        if (rows == 1) tile(outs, 1, n_out, n_in, W, X, Y);
    }

    void few_rows(int threads, int64_t rows, int64_t n_out, int64_t n_in, const float *W, const float *X, float *Y) {
        #pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t o = 0; o < n_out / 4 * 4; o += 4) tiles(4, rows, n_out, n_in, W + o * n_in, X, Y + o);
        for (int64_t o = n_out / 4 * 4; o < n_out; o++) tiles(1, rows, n_out, n_in, W + o * n_in, X, Y + o);
    }
"""


# --- the cross-entropy of a linear head, without its logits in memory ---


def linear_cross_entropy(x, weight, targets, cap=0.0):
    """
    The mean of -log softmax(z)[target], z = x W^T, or cap tanh(z / cap): x (..., C), weight (V, C), targets (...) int64, of which
    -1 is ignored -> () in nats, fp32 (fp64 for fp64); nan if all are ignored. As F.cross_entropy of F.linear, autocast
    included, but with the logits of a few rows at a time: g_z = (softmax - onehot) / count needs nothing that comes later, so
    the forward makes both gradients and the backward scales them, once: a graph that is kept for a second one is refused.
    The idea is Liger Kernel's (Hsu et al. 2024, arXiv:2410.10989). ValueError for shapes that do not fit; a target outside
    [-1, V) is an error on a CPU, elsewhere the loss is then nan.
    """
    if x.shape[:-1] != targets.shape or weight.dim() != 2 or x.size(-1) != weight.size(1):
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, weight, targets))
        raise ValueError(f"x, weight and targets {shapes} must be (..., C), (V, C) and (...)")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets are {targets.dtype}, and must be int64: give targets.long()")
    if not x.device == weight.device == targets.device:
        raise ValueError(f"x, weight and targets lie on {x.device}, {weight.device} and {targets.device}; bring them together")
    # a few MB of logits are no burden, and PyTorch's two calls are then up to 1.2 times as fast
    if not targets.numel() or KERNEL == "auto" and targets.numel() * weight.size(0) <= CROSS_ENTROPY_SMALL:
        tally("linear_cross_entropy", "torch, whole")
        return linear_cross_entropy_reference(x, weight, targets, cap)
    return cross_entropy_in_chunks(x, weight, targets, cap)


CROSS_ENTROPY_SMALL = 2**20 # logits
CROSS_ENTROPY_CHUNK = 12 * 2**20 # logits at a time, 48 MB: with 16 MB the products of so few rows take 1.2 times as long


def linear_cross_entropy_reference(x, weight, targets, cap=0.0):
    z = F.linear(x, weight)
    z = z if z.dtype == torch.float64 else z.float()
    z = cap * torch.tanh(z / cap) if cap else z
    return F.cross_entropy(z.flatten(0, -2), targets.flatten(), ignore_index=-1)


@torch._disable_dynamo # torch.compile stops here: this is the end of a forward, and unrolled it would be a graph of hundreds of chunks
def cross_entropy_in_chunks(x, weight, targets, cap):
    if x.is_cpu and not -1 <= targets.min() <= targets.max() < weight.size(0):
        raise ValueError(f"targets {targets.min()} to {targets.max()} are not all in [-1, {weight.size(0)}); -1 is ignored")
    autocast = x.dtype != torch.float64 and not x.is_meta and torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    if not autocast and weight.dtype != dtype:
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}; give both one dtype, or use autocast")
    needs = [torch.is_grad_enabled() and t.requires_grad for t in (x, weight)]
    return LinearCrossEntropy.apply(x, weight, targets, cap, dtype, path_for(weight), needs)


# Each row's loss, and where a gradient is wanted the row in place: softmax - onehot; 0 where the target is ignored. A row of
# 50,304 lies in the second cache, so three walks through it cost as one. Sums of 4096 in fp32, those in fp64.
CROSS_ENTROPY_SOURCE = C_MATH + """
    void cross_entropy(int threads, int64_t rows, int64_t V, int gradient, const int64_t *targets, float *Z, float *losses) {
        #pragma omp parallel for num_threads(threads) schedule(static) if (rows * V > 1 << 17)
        for (int64_t i = 0; i < rows; i++) {
            float *restrict z = Z + i * V, most = z[0];
            losses[i] = 0;
            if (targets[i] < 0) {
                if (gradient) for (int64_t c = 0; c < V; c++) z[c] = 0;
                continue;
            }
            #pragma omp simd reduction(max : most)
            for (int64_t c = 0; c < V; c++) most = z[c] > most ? z[c] : most;
            double sum = 0, target = z[targets[i]];
            for (int64_t start = 0; start < V; start += 4096) {
                int64_t end = start + 4096 < V ? start + 4096 : V;
                float part = 0;
                if (gradient) {
                    #pragma omp simd reduction(+ : part)
                    for (int64_t c = start; c < end; c++) part += z[c] = exponential(z[c] - most);
                } else {
                    #pragma omp simd reduction(+ : part)
                    for (int64_t c = start; c < end; c++) part += exponential(z[c] - most);
                }
                sum += part;
            }
            losses[i] = log(sum) + most - target;
            if (!gradient) continue;
            float inverse = 1 / sum;
            #pragma omp simd
            for (int64_t c = 0; c < V; c++) z[c] *= inverse;
            z[targets[i]] -= 1;
        }
    }
"""


def cross_entropy_c(z, targets, losses, gradient):
    needed(CROSS_ENTROPY_SOURCE).cross_entropy(
        threads(), *z.shape, gradient, address(targets, torch.int64), address(z), address(losses))


def cross_entropy_torch(z, targets, losses, gradient):
    kept, at = (targets >= 0).unsqueeze(1), targets.clamp(min=0).unsqueeze(1) # (rows, 1)
    total = z.logsumexp(1, keepdim=True)
    losses.copy_(torch.where(kept, total - z.gather(1, at), 0.0).squeeze(1))
    if gradient:
        z.sub_(total).exp_().scatter_add_(1, at, -torch.ones_like(total)).mul_(kept)


if triton is not None:
    @triton.jit
    def cross_entropy_kernel(p_z, p_target, p_loss, V, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
        i, i_v = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        target = tl.load(p_target + i)
        p_z += i * V
        most, sums = -float("inf"), tl.zeros((BLOCK,), tl.float32) # of each lane, relative to the largest so far
        for start in range(0, V, BLOCK):
            z = tl.load(p_z + start + i_v, mask=start + i_v < V, other=-float("inf")).to(tl.float32)
            higher = tl.maximum(most, tl.max(z, axis=0))
            sums = sums * tl.exp(most - higher) + tl.exp(z - higher)
            most = higher
        total = tl.sum(sums, axis=0)
        # outside the vocabulary: nan, aloud, where reading would go anywhere
        z_target = tl.load(p_z + target, mask=(target >= 0) & (target < V), other=float("nan")).to(tl.float32)
        tl.store(p_loss + i, tl.where(target == -1, 0.0, tl.log(total) + most - z_target))
        if GRADIENT:
            tl.debug_barrier() # the target's logit has been read by all
            for start in range(0, V, BLOCK):
                z = tl.load(p_z + start + i_v, mask=start + i_v < V, other=0.0).to(tl.float32)
                g = tl.exp(z - most) / total - tl.where(start + i_v == target, 1.0, 0.0)
                tl.store(p_z + start + i_v, tl.where(target == -1, 0.0, g).to(p_z.dtype.element_ty), mask=start + i_v < V)


def cross_entropy_triton(z, targets, losses, gradient):
    with torch.cuda.device_of(z):
        cross_entropy_kernel[(z.size(0),)](z, targets, losses, z.size(1), gradient, min(4096, triton.next_power_of_2(z.size(1))))


CROSS_ENTROPY = {"c": cross_entropy_c, "triton": cross_entropy_triton, "torch": cross_entropy_torch}


def logits_to_gradient(z, targets, losses, cap, path, gradient):
    """z (rows, V) is used up; what it is turned into has its dtype. Triton widens each number by itself, the others a whole copy."""
    wide = z if path == "triton" and not cap else z.to(losses.dtype)
    if cap:
        t = wide.div_(cap).tanh_()
        wide = cap * t
    CROSS_ENTROPY[path](wide, targets, losses, gradient)
    if cap and gradient:
        wide.mul_(t.square_().neg_().add_(1))
    return wide.to(z.dtype)


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, cap, dtype, path, needs):
        tally("linear_cross_entropy", path)
        rows, V = targets.numel(), weight.size(0)
        wide, targets = torch.promote_types(dtype, torch.float32), targets.reshape(-1).contiguous()
        x_, w = x.reshape(rows, x.size(-1)).to(dtype), weight.to(dtype)
        many = max(1, -(-rows * V // CROSS_ENTROPY_CHUNK)) # chunks of equal size
        each = -(-rows // many)
        logits, losses = torch.empty(each, V, dtype=dtype, device=x.device), torch.empty(rows, dtype=wide, device=x.device)
        g_x, g_w = like(x_) if needs[0] else None, torch.empty(V, x.size(-1), dtype=wide, device=x.device) if needs[1] else None
        for here in (slice(i, i + each) for i in range(0, rows, each)):
            z = torch.mm(x_[here], w.t(), out=logits[: len(x_[here])])
            z = logits_to_gradient(z, targets[here], losses[here], cap, path, any(needs))
            if needs[0]:
                torch.mm(z, w, out=g_x[here])
            if needs[1]: # half precision: each chunk's sum is rounded once, the sum of chunks is not
                first = here.start == 0 # then beta = 0: what g_w holds is not looked at
                g_w.addmm_(z.t(), x_[here], beta=1 - first) if dtype == wide else (g_w.copy_ if first else g_w.add_)(z.t() @ x_[here])
        count = (targets != -1).sum()
        ctx.save_for_backward(g_x, g_w, count)
        ctx.like, ctx.used = (x.shape, x.dtype, weight.dtype), False
        return losses.sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        if ctx.used:
            raise RuntimeError("linear_cross_entropy has given its gradients away; for a second backward run the forward again")
        ctx.used = True # they are as large as the weight: scaled in place. Not in the forward: fp16 would underflow at 1 / count
        g_x, g_w, count = ctx.saved_tensors
        shape, *dtypes = ctx.like
        scale = g / count.clamp(min=1)
        g_x, g_w = (None if t is None else t.mul_(scale).to(d) for t, d in zip((g_x, g_w), dtypes))
        return None if g_x is None else g_x.view(shape), g_w, None, None, None, None, None


# --- rotary embedding ---


def rope(x, positions, base=10000.0):
    """
    Pair i = (x_2i, x_2i+1) of the token at position m turns by the angle m base^(-2i/P). x (..., T, P), positions (T,) -> (..., T, P).
    Su et al. 2021, arXiv:2104.09864. A model makes the table once for all its layers: rotate(x, rope_table(positions, P, base)).
    """
    return rotate(x, rope_table(positions.double() if x.dtype == torch.float64 else positions, x.size(-1), base))


def rope_table(positions, width, base=10000.0):
    """cos and sin of each position and pair, (..., T) -> (..., T, width/2, 2), in fp32 (bf16 would lose positions above 256) or fp64."""
    if width % 2:
        raise ValueError(f"a rotary width of {width} leaves a number without its pair; make it even")
    m = positions if positions.dtype == torch.float64 else positions.float()
    frequency = base ** (-torch.arange(0, width, 2, device=m.device, dtype=m.dtype) / width)
    angle = m.unsqueeze(-1) * frequency
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def rotate(x, table):
    """
    x (..., T, P), of which only the last axis has to lie in order, table (T, P/2, 2), or with axes in front that broadcast
    against those of x -> (..., T, P). ValueError if they do not fit.
    """
    if x.dim() < 2 or table.shape[-3:] != (x.size(-2), x.size(-1) // 2, 2) or x.size(-1) % 2:
        raise ValueError(f"x {tuple(x.shape)} and table {tuple(table.shape)} must be (..., T, P) and (..., T, P/2, 2)")
    asked = KERNEL == "triton" or x.is_cuda and not torch.compiler.is_compiling() # in this order: decoding a token counts microseconds
    if not asked or not x.numel() or table.dim() > 3 or path_for(x) != "triton":
        tally("rotate", "torch")
        return rotate_reference(x, table)
    return run(Rotate, x, table)


def rotate_reference(x, table):
    wide = x.to(table.dtype)
    if torch.compiler.is_compiling(): # the compiler fuses real numbers, and has no code for complex ones
        (a, b), (cos, sin) = wide.unflatten(-1, (-1, 2)).unbind(-1), table.unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)
    if wide.storage_offset() % 2 or not wide.is_contiguous() and (wide.stride(-1) != 1 or any(n % 2 for n in wide.stride()[:-1])):
        wide = wide.clone(memory_format=torch.contiguous_format) # no pair may lie across two complex numbers
    turned = torch.view_as_complex(wide.unflatten(-1, (-1, 2))) * torch.view_as_complex(table)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


# There is no C: PyTorch's complex product reads and writes each number once. A loop in C took 0.8 (12 x 256 tokens, heads and tokens
# exchanged) to 1.8 times as long (8 x 128 tokens, 8 heads of 16), torch.compile of the real formula 2 to 3 times, on one thread.
# Half precision has no complex product of its own, so that PyTorch copies it to fp32 and back; Triton does not.
if triton is not None:
    @triton.jit
    def rotate_kernel(p_x, p_table, p_y, n, B, T, a, b, t, sign, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK) # pairs of y
        row, j = i // PAIRS, 2 * (i % PAIRS)
        p_x += row // (B * T) * a + row // T % B * b + row % T * t + j
        p_table += row % T * (2 * PAIRS) + j
        first = tl.load(p_x, mask=i < n, other=0.0).to(tl.float32)
        second = tl.load(p_x + 1, mask=i < n, other=0.0).to(tl.float32)
        cos, sin = tl.load(p_table, mask=i < n, other=0.0), sign * tl.load(p_table + 1, mask=i < n, other=0.0)
        tl.store(p_y + 2 * i, (first * cos - second * sin).to(p_y.dtype.element_ty), mask=i < n)
        tl.store(p_y + 2 * i + 1, (first * sin + second * cos).to(p_y.dtype.element_ty), mask=i < n)


def rotate_triton(x, table, sign):
    """x as it lies, up to four axes of which the last is in order; what is made is contiguous. sign -1: by the opposite angle."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x = x if x.dim() == 4 else x.reshape(-1, 1, *x.shape[-2:])
    x, pairs = x if x.stride(-1) == 1 else x.contiguous(), x.numel() // 2
    with torch.cuda.device_of(x):
        rotate_kernel[(triton.cdiv(pairs, 512),)](x, table, y, pairs, *x.shape[1:3], *x.stride()[:3], sign, x.size(-1) // 2, 512)
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
