"""Each kernel is compared with its own PyTorch reference in fp64.

The allowed error is twice the error of the reference in fp32, or follows from the stated errors of a GPU's
instructions; it is never a number found by trying. Upstream gradients are random, because the gradient of a
plain sum through rows that sum to 1 is 0, in a right kernel and in a wrong one.

The tests of Triton run here in a second process, under TRITON_INTERPRET=1, because Triton reads this variable
where a kernel is defined. With `pytest -m gpu` they run on the GPU.
"""
import itertools
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import kernels
from conftest import ROOT
from kernels import (ACTIVATIONS, activate, c_library, gated, launches, path_for, sinkhorn,
                     sinkhorn_reference, use_kernel)
from model import GPT, GPTConfig

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NAMES = tuple(ACTIVATIONS)
COUNTS = (1, 5, 63, 100, 1000)
# Triton compiles exp to ex2.approx.ftz.f32 and / to div.full.f32, each within 2 units in the last place (PTX
# ISA, "Floating Point Instructions"), so that x (1 / s) is within 2 1/2. Torch's division is within 1/2, its
# exp within 1: no operation of Triton's is more than 5 times as far off. The interpreter computes like torch.
APPROXIMATE = 2 if INTERPRETED or not torch.cuda.is_available() else 5
needs_c = pytest.mark.skipif(c_library(0) is None, reason="no C compiler")
# Each number of streams is a compilation of its own.
STREAMS = [4, *(pytest.param(n, marks=pytest.mark.deep) for n in (2, 8))]
interpreted = pytest.mark.skipif(not INTERPRETED,
                                 reason="run by test_triton_interpreted in a process with TRITON_INTERPRET=1")


@pytest.fixture(autouse=True)
def clean():
    use_kernel("auto")
    launches.clear()
    yield
    use_kernel("auto")


def gradients(f, tensors, dtype, g):
    """f's output, and its gradients for upstream g, computed in dtype."""
    inputs = []
    for t in tensors:
        keeps_its_dtype = t.dim() == 0 and dtype != torch.float64 # a single number, such as eps
        inputs.append(t.detach().to(t.dtype if keeps_its_dtype else dtype).requires_grad_())
    y = f(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, g.to(y.dtype))]


def no_worse(ours, torchs, exact, what, factor=2):
    """The largest error of ours is at most twice (factor times) the largest error of torch's.

    ours may hold only the first few of the numbers in torchs and exact, because torch's error of a single
    number can be 0 by luck. Triton's interpreter truncates fp32 to bf16, where torch and a GPU round: there,
    each error is at most one unit in the last place of bf16.
    """
    for i, (a, b, c) in enumerate(zip(ours, torchs, exact, strict=True)):
        allowed = factor * (b.double() - c).abs().max() + 1e-9 * c.abs().max()
        if INTERPRETED and a.dtype == torch.bfloat16:
            allowed = 2**-7 * c[:len(a)].abs() + 2**-20 * c.abs().max()
        b, c = b[:len(a)], c[:len(a)]
        assert a.shape == b.shape and a.dtype == b.dtype
        error = (a.double() - c).abs() # NaN compares false: one fails
        assert (error <= allowed).all(), (
            f"{what}, result {i}: off by {error.max():.2e}, {allowed.max():.2e} allowed")


# --- which path ---


def test_paths():
    x = torch.randn(4, 4)
    assert path_for(x.double()) == path_for(x.bfloat16()) == "torch"
    assert path_for(x.t()) == "torch" # not contiguous
    if c_library(0) is not None:
        assert path_for(x, in_c=0) == "c" and path_for(x) == "torch" # few operations are in C
    use_kernel("torch")
    assert path_for(x) == "torch"
    sinkhorn(x), activate(x, "silu"), gated(x, x, "telu")
    assert launches == {("sinkhorn", "torch"): 1, ("silu", "torch"): 1, ("gated telu", "torch"): 1}


def test_refusals(monkeypatch):
    x = torch.randn(3, 4)
    for call, words in (
        (lambda: use_kernel("cuda"), "auto, triton, torch"),
        (lambda: activate(x, "relu"), "gelu, relu2"),
        (lambda: activate(x, "crrelu"), "needs its eps"),
        (lambda: activate(x, "silu", torch.tensor(0.1)), "no eps"),
        (lambda: activate(x, "crrelu", torch.tensor([0.1, 0.2])), "one number"),
        (lambda: gated(x, x[:2], "silu"), "differ"),
        (lambda: gated(x, x.double(), "silu"), "differ"),
        (lambda: kernels.gated_pair(x[:, :3], "silu"), "halves"),
        (lambda: sinkhorn(x), "square"),
        (lambda: sinkhorn(x[0]), "square"),
        (lambda: sinkhorn(torch.randn(2, 2), 0), "iters >= 1"),
        (lambda: kernels.mhc_coefficients(x[0], *coefficient_inputs(2, 5)[1:]), "takes h"),
        (lambda: kernels.mhc_coefficients(torch.randn(3, 2, 4), *coefficient_inputs(2, 5)[1:]),
         r"\(3, 2, 4\), \(8, 10\)"),
        (lambda: kernels.mhc_coefficients(*coefficient_inputs(2, 5)[:2], torch.ones(()), torch.ones(8)),
         "alpha"),
        (lambda: kernels.mhc_coefficients(*coefficient_inputs(2, 5)[:3], torch.ones(9)), "N\\^2"),
        (lambda: kernels.mhc_coefficients(*coefficient_inputs(2, 5), iters=0), "iters >= 1"),
        (lambda: kernels.read_streams(torch.randn(3, 5, 4, 8), torch.randn(5, 4)),
         r"read_streams takes .*\(5, 4\)"),
        (lambda: kernels.read_streams(torch.randn(4), torch.randn(())), "read_streams takes"),
        *((lambda shapes=shapes: kernels.write_streams(*map(torch.randn, shapes)), "write_streams takes")
          for shapes in (((5, 4, 8), (5, 7), (5, 4), (5, 4, 4)),
                         ((5, 4, 8), (8,), (5, 4), (5, 4, 4)),
                         ((5, 4, 8), (5, 8), (5, 2), (5, 4, 4)),
                         ((5, 4, 8), (5, 8), (5, 4), (4, 4)))),
        (lambda: kernels.linear_cross_entropy(x, torch.randn(9, 4), torch.zeros(3, dtype=torch.int32)),
         "targets.long()"),
        (lambda: kernels.linear_cross_entropy(x, torch.randn(9, 4, device="meta"), torch.zeros(3).long()),
         "bring them together"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    monkeypatch.setattr(kernels, "triton", None)
    with pytest.raises(ValueError, match="not installed"):
        use_kernel("triton")
    assert kernels.KERNEL == "auto" # a refusal leaves the setting alone


@pytest.mark.skipif(INTERPRETED, reason="with the interpreter it can run")
def test_triton_asked_for_on_a_cpu_is_refused(monkeypatch):
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a CUDA GPU|not installed"):
            use_kernel("triton")
    monkeypatch.setattr(kernels, "KERNEL", "triton")
    with pytest.raises(RuntimeError, match="cannot run on a tensor on cpu"):
        sinkhorn(torch.randn(2, 2))
    with pytest.raises(RuntimeError, match="float64"):
        activate(torch.randn(2).double(), "gelu")


@needs_c
def test_a_source_that_fails_raises(monkeypatch, tmp_path):
    """A learner's slip in kernels.c must not end in a silent fallback to PyTorch."""
    (tmp_path / "kernels.c").write_text("this is no C")
    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "kernels.py"))
    with pytest.raises(RuntimeError, match="refuses kernels.c(.|\n)*error"):
        kernels.c_library.__wrapped__(0) # not what it remembers


def test_c_gets_no_address_that_it_would_misread(monkeypatch):
    """C takes type, order and place of what lies at an address for granted."""
    monkeypatch.setattr(kernels, "CROSS_ENTROPY_SMALL", 0)
    model = GPT(GPTConfig(vocab_size=90, block_size=8, n_layer=1, n_head=2, n_embd=16))
    idx = torch.randint(90, (4, 8))
    with pytest.raises(ValueError, match="targets.long()"):
        model(idx, idx.int(), with_logits=False)
    x = torch.ones(4)
    for bad in (torch.ones(4, 4).t(), x.double(), x.int(), torch.ones(4, device="meta")):
        with pytest.raises(TypeError, match="C takes contiguous torch.float32 on the CPU"):
            kernels.address(bad)
        with pytest.raises(TypeError, match="C takes contiguous"):
            kernels.pointers([bad])
    source = (ROOT / "kernels.py").read_text(encoding="utf-8")
    assert "data_ptr" not in source.replace("return tensor.data_ptr()", "")
    lines = (ROOT / "optim.py").read_text(encoding="utf-8").splitlines()
    assert not any("data_ptr()" in line and "storage" not in line for line in lines)


def test_a_folder_that_runs_nothing_and_a_broken_cc_are_said(monkeypatch, capsys):
    """A temporary folder mounted noexec lets the compiler write a library that cannot be loaded."""
    def noexec(path):
        raise OSError("failed to map segment from shared object")

    with monkeypatch.context() as m:
        m.setattr(kernels.ctypes, "CDLL", noexec)
        assert c_library.__wrapped__(0) is None and "failed to map segment" in capsys.readouterr().out
    with monkeypatch.context() as m:
        m.setenv("CC", '"')
        assert c_library.__wrapped__(0) is None and "No closing quotation" in capsys.readouterr().out
    with monkeypatch.context() as m:
        m.setattr(kernels.tempfile, "tempdir", "/no/such/folder")
        assert c_library.__wrapped__(0) is None and "/no/such/folder" in capsys.readouterr().out


def test_an_activation_that_no_kernel_knows_runs_as_its_formula(monkeypatch, capsys):
    """What a person who adds a row gets: their formula, said aloud, plain and gated, with its gradient."""
    monkeypatch.setitem(ACTIVATIONS, "mish", lambda x, eps: x * torch.nn.functional.softplus(x).tanh())
    x = torch.randn(5, 6, requires_grad=True)
    for path in ("torch", "triton") if INTERPRETED else ("torch",):
        use_kernel("triton" if path == "triton" else "auto")
        y, z = activate(x, "mish"), kernels.gated_pair(x, "mish")
        want = torch.nn.functional.mish(x)
        torch.testing.assert_close(y, want)
        torch.testing.assert_close(z, torch.nn.functional.mish(x[:, :3]) * x[:, 3:])
        got, expected = (torch.autograd.grad(t.sum(), x)[0] for t in (y, want))
        torch.testing.assert_close(got, expected)
    assert capsys.readouterr().out.count("activation=mish is in ACTIVATIONS but in no kernel") == INTERPRETED
    kernels.known_to_triton.cache_clear()


# --- Sinkhorn: the reference ---


def test_sinkhorn_reference_gradient():
    for n, iters in itertools.product((2, 3, 4), (1, 3)):
        x = (2 * torch.randn(3, n, n, dtype=torch.float64)).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: sinkhorn(x, iters), x)
    assert launches["sinkhorn", "torch"] > 0


@pytest.mark.deep
@pytest.mark.parametrize("iters", [1, 2, 20])
def test_sinkhorn_is_deepseek_s(iters):
    """transformers' hyper-connection, for a matrix that is not symmetric: its comb is our H transposed."""
    v4 = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    config = SimpleNamespace(hc_mult=4, hc_sinkhorn_iters=iters, hc_eps=1e-6, rms_norm_eps=1e-6,
                             hidden_size=8)
    theirs = v4.DeepseekV4HyperConnection(config)
    with torch.no_grad():
        theirs.fn.zero_(), theirs.scale.fill_(1), theirs.base.copy_(torch.randn(24))
        _, comb, _ = theirs(torch.randn(1, 1, 4, 8))
        logits = theirs.base[8:].view(4, 4).t().contiguous()
        torch.testing.assert_close(sinkhorn(logits, iters), comb[0, 0].t(), rtol=0, atol=3e-7)
        torch.testing.assert_close(sinkhorn_reference(logits, iters), comb[0, 0].t(), rtol=0, atol=3e-7)


@pytest.mark.parametrize("n", [3, 4, *(pytest.param(n, marks=pytest.mark.deep) for n in (2, 8))])
def test_sinkhorn_properties(n):
    x = torch.randn(50, n, n)
    y = sinkhorn(x, 100)
    assert ((y.sum(-1) - 1).abs() < 1e-5).all() and ((y.sum(-2) - 1).abs() < 1e-4).all()
    y = sinkhorn(3 * x, 1)
    # one iteration normalises the rows, not yet the columns; eps takes more from the sum of a smaller row
    sums = (3 * x).softmax(-2).sum(-1) + n * 1e-6
    torch.testing.assert_close(y.sum(-1), sums / (sums + 1e-6), rtol=0, atol=1e-6)
    assert (y.sum(-2) - 1).abs().max() > 0.1
    # a constant along `out`, the first softmax's axis, changes nothing
    torch.testing.assert_close(sinkhorn(x + 5 * torch.randn(50, 1, n), 2), sinkhorn(x, 2), rtol=0, atol=2e-6)
    # permuted streams give a permuted matrix
    p, q = torch.randperm(n), torch.randperm(n)
    permuted = sinkhorn(x[:, p][:, :, q].contiguous(), 3)
    torch.testing.assert_close(permuted, sinkhorn(x, 3)[:, p][:, :, q], rtol=0, atol=1e-6)
    # mixes of permutations are doubly stochastic already, so nearly (eps) fixed points
    some = torch.stack([torch.eye(n)[torch.randperm(n)] for _ in range(30)])
    mixes = torch.einsum("bp,pij->bij", torch.randn(50, 30).softmax(-1), some)
    torch.testing.assert_close(sinkhorn(mixes.clamp(min=1e-12).log(), 20), mixes, rtol=0, atol=5e-5)


# --- Sinkhorn: the kernels ---


def check_sinkhorn(path, device, n, counts, iterations, stds, dtype=torch.float32):
    for iters, std in itertools.product(iterations, stds):
        x, g = (std * torch.randn(1000, n, n)).to(device, dtype), torch.randn(1000, n, n).to(device, dtype)
        torchs = gradients(lambda x: sinkhorn_reference(x, iters), [x], dtype, g)
        exact = gradients(lambda x: sinkhorn_reference(x, iters), [x], torch.float64, g)
        for count in counts:
            launches.clear()
            ours = gradients(lambda x: sinkhorn(x, iters), [x[:count]], dtype, g[:count])
            assert launches == {("sinkhorn", path): 1, ("sinkhorn backward", path): 1}
            what = f"{count} matrices of {n}, {iters} iterations, std {std}"
            no_worse(ours, torchs, exact, what, APPROXIMATE)


@needs_c
@pytest.mark.parametrize("n", STREAMS)
def test_sinkhorn_c(n, poisoned):
    """Few iterations and large logits are where a backward that assumes convergence is wrong."""
    check_sinkhorn("c", "cpu", n, COUNTS, (1, 3, 20), (1, 3, 8))
    # leading axes, and an upstream gradient that is expanded
    x = torch.randn(2, 1, 3, n, n).requires_grad_()
    a, b = (torch.autograd.grad(f(x)[..., 0, :].sum(), x)[0] for f in (sinkhorn, sinkhorn_reference))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@needs_c
def test_threads_change_no_bit(monkeypatch):
    # in fp64, because BLAS may add up fp32 in another order with more threads
    monkeypatch.setattr(kernels, "product", lambda a, b: (a.double() @ b.double()).to(a.dtype))
    logits, x, w = torch.randn(1000, 4, 4), torch.randn(301, 333), torch.randn(333)
    inputs = coefficient_inputs(4, 40)
    g_c = [torch.randn_like(t) for t in kernels.mhc_coefficients(*inputs)]
    g_l, g_x = torch.randn(1000, 4, 4), torch.randn(301, 333)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(all_gradients(kernels.mhc_coefficients, inputs, g_c)
                           + gradients(sinkhorn, [logits], torch.float32, g_l)
                           + gradients(kernels.rmsnorm, [x, w], torch.float32, g_x))
    finally:
        torch.set_num_threads(before)
    for more in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], more))


# --- mHC's coefficients ---


def coefficient_inputs(N, C, tokens=1000, std=1):
    """h, phi, alpha, b with logits of this std."""
    columns, alpha = 2 * N + N * N, std / 2**0.5 * torch.tensor([1.0, -1.0, 1.0])
    h, phi = torch.randn(tokens, N, C), torch.randn(columns, N * C) / (N * C)**0.5
    return h, phi, alpha, alpha[0] * torch.randn(columns)


def all_gradients(f, inputs, g):
    inputs = [t.detach().requires_grad_() for t in inputs]
    outputs = f(*inputs)
    upstream = [g.to(t.dtype) for g, t in zip(g, outputs)]
    return [*(t.detach() for t in outputs), *torch.autograd.grad(outputs, inputs, upstream)]


def check_coefficients(path, device, N, counts, iterations, stds, dtype=torch.float32, C=7):
    """The bounds of alpha and b come from torch's error of one token, that of phi from its error of all.

    The gradients of alpha and b are sums over tokens. They have few numbers, alpha's only 3, so torch's
    errors may all be small by luck. With an alpha and a b for each token, the reference returns the terms of
    the sums, and so torch's error of a term. Errors of tokens are independent: the error of a sum over n
    tokens is sqrt(n) times the error of a term, plus the rounding of the sum. phi's error grows with the
    number of tokens, so torch's error over all tokens bounds it.
    """
    for iters, std in itertools.product(iterations, stds):
        h, *parameters = (t.to(device) for t in coefficient_inputs(N, C, 1000, std))
        inputs = [h.to(dtype), *parameters]
        g = [torch.randn(1000, *s, device=device).to(dtype) for s in ((N,), (N,), (N, N))]

        def function(*t):
            return kernels.mhc_coefficients(*t, iters)

        def reference(*t):
            return kernels.mhc_coefficients_reference(*t, iters)

        doubles = [t.double() for t in inputs]
        torchs, exact = all_gradients(reference, inputs, g), all_gradients(reference, doubles, g)
        per_token, terms = torch.vmap(reference, (0, None, 0, 0)), []
        for x, phi, alpha, b in (inputs, doubles):
            expanded = [x, phi, alpha.expand(1000, -1), b.expand(1000, -1)]
            terms.append(all_gradients(per_token, expanded, g)[5:])
        of_one = [(b.double() - c).abs().max() for b, c in zip(*terms)]
        of_phi = (torchs[4].double() - exact[4]).abs().max()
        for count in counts:
            g_some = [t[:count] for t in g]
            launches.clear()
            ours = all_gradients(function, [inputs[0][:count], *parameters], g_some)
            assert launches == {("mhc_coefficients", path): 1, ("mhc_coefficients backward", path): 1}
            what = f"{count} tokens of {N} streams, {iters} iterations, std {std}, {dtype}"
            no_worse(ours[:4], torchs[:4], exact[:4], what, APPROXIMATE)
            sums = all_gradients(reference, [doubles[0][:count], *doubles[1:]], g_some)[4:]
            bounds = APPROXIMATE * of_phi, *(APPROXIMATE * count**0.5 * error for error in of_one)
            for name, a, c, bound in zip(("phi", "alpha", "b"), ours[4:], sums, bounds, strict=True):
                error, allowed = (a.double() - c).abs(), bound + torch.finfo(a.dtype).eps * c.abs().max()
                assert a.shape == c.shape and a.dtype == torch.float32
                assert (error <= allowed).all(), (
                    f"{what}: {name} is off by {error.max():.2e}, {allowed:.2e} allowed")


def test_coefficients_reference_gradient():
    for N, iters in itertools.product((2, 3, 4), (1, 3)):
        inputs = [t.double().requires_grad_() for t in coefficient_inputs(N, 3, 2)]
        assert torch.autograd.gradcheck(lambda *t: kernels.mhc_coefficients(*t, iters), inputs)
    assert launches.keys() == {("mhc_coefficients", "torch")}


@needs_c
@pytest.mark.parametrize("N", STREAMS)
def test_coefficients_c(N, poisoned):
    check_coefficients("c", "cpu", N, COUNTS, (1, 3, 20), (1, 3, 8))
    h, *parameters = coefficient_inputs(N, 3, 6)
    assert [t.shape for t in kernels.mhc_coefficients(h[0], *parameters)] == [(N,), (N,), (N, N)] # one token
    pre, post, res = kernels.mhc_coefficients(h.view(2, 3, N, 3), *parameters)
    assert pre.shape == post.shape == (2, 3, N) and res.shape == (2, 3, N, N)
    assert [t.shape for t in kernels.mhc_coefficients(h[:0], *parameters)] == [(0, N), (0, N), (0, N, N)]
    launches.clear()
    with torch.no_grad(): # few numbers, but PyTorch would make a hundred calls of them
        one = kernels.mhc_coefficients(h[:1], *parameters)
    assert launches == {("mhc_coefficients", "c"): 1}
    with torch.autocast("cpu", dtype=torch.bfloat16): # which rounds products
        assert all(torch.equal(a, b) for a, b in zip(one, kernels.mhc_coefficients(h[:1], *parameters)))


# --- residual streams ---


def check_streams(path, device, N, sizes, dtype=torch.float32):
    for tokens, C in sizes:
        x, y, pre, post, res = (torch.randn(500, *s, device=device).to(dtype)
                                for s in ((N, C), (C,), (N,), (N,), (N, N)))
        for name, inputs, g in (("read_streams", [x, pre], torch.randn_like(y)),
                                ("write_streams", [x, y, post, res], torch.randn_like(x))):
            reference = getattr(kernels, name + "_reference")
            torchs, exact = (gradients(reference, inputs, d, g) for d in (dtype, torch.float64))
            launches.clear()
            ours = gradients(getattr(kernels, name), [t[:tokens] for t in inputs], dtype, g[:tokens])
            assert launches == {(name, path): 1, (name + " backward", path): 1}
            no_worse(ours, torchs, exact, f"{name}, {tokens} tokens, {C} channels")


@needs_c
@pytest.mark.parametrize("N", STREAMS)
def test_streams_c(N, poisoned):
    check_streams("c", "cpu", N, ((1, 1), (5, 63), (63, 100), (3, 1000)))


def test_streams_references_against_einsum():
    x, y, pre, post, res = (torch.randn(3, 5, *s, dtype=torch.float64)
                            for s in ((4, 7), (7,), (4,), (4,), (4, 4)))
    torch.testing.assert_close(kernels.read_streams(x, pre), torch.einsum("btn,btnc->btc", pre, x))
    written = torch.einsum("btoi,btic->btoc", res, x) + torch.einsum("bto,btc->btoc", post, y)
    torch.testing.assert_close(kernels.write_streams(x, y, post, res), written)


# --- RMSNorm ---


def check_rmsnorm(path, device, shapes, dtype=torch.float32):
    """Over many draws at once: the largest error of a few sums is luck, in torch's results and in ours."""
    for shape, weighted in itertools.product(shapes, (False, True)):
        count = 20 if path == "c" and len(shape) == 2 else 5
        draws = [[torch.randn(s, device=device).to(dtype) for s in (shape, shape[-1:], shape)]
                 for _ in range(count)]

        def of_all(f, d):
            results = (gradients(f, [x, w] if weighted else [x], d, g) for x, w, g in draws)
            return [torch.stack(t) for t in zip(*results)]

        torchs, exact = (of_all(kernels.rmsnorm_reference, d) for d in (dtype, torch.float64))
        launches.clear()
        ours = of_all(kernels.rmsnorm, dtype)
        assert launches == {("rmsnorm", path): count, ("rmsnorm backward", path): count}
        no_worse(ours, torchs, exact, f"rmsnorm of {shape}, {'' if weighted else 'not '}weighted")


SHAPES = ((100, 5), (50, 63), (3, 100, 100), (129, 1000))


@needs_c
def test_rmsnorm_c(poisoned):
    check_rmsnorm("c", "cpu", SHAPES)


# --- cross-entropy of a linear head ---


def check_cross_entropy(path, device, monkeypatch, shapes, dtypes=(torch.float32,)):
    """Several chunks and one; gradients of 2, 1 and 0 inputs; ignored targets; a softcap; large logits."""
    for (rows, V, C), chunk, cap, dtype in itertools.product(shapes, (300, 10**6), (0.0, 5.0), dtypes):
        monkeypatch.setattr(kernels, "CROSS_ENTROPY_CHUNK", chunk)
        monkeypatch.setattr(kernels, "CROSS_ENTROPY_CHUNK_CUDA", chunk)
        monkeypatch.setattr(kernels, "CROSS_ENTROPY_SMALL", 0)
        x, w = (torch.randn(n, C, device=device).to(dtype) for n in (rows, V))
        g, targets = torch.randn((), device=device), torch.randint(V, (rows,), device=device)
        targets[1::3] = -1

        def reference(x, w):
            return kernels.linear_cross_entropy_reference(x, w, targets, cap)

        torchs, exact = (gradients(reference, [x, w], d, g) for d in (dtype, torch.float64))
        launches.clear()
        ours = gradients(lambda x, w: kernels.linear_cross_entropy(x, w, targets, cap), [x, w], dtype, g)
        assert launches == {("linear_cross_entropy", path): 1}
        # The results are sums of C products, of V exponentials and of rows. Torch may be lucky in short sums,
        # and each chunk rounds once more: hence the 8 units of rounding.
        what = (rows, V, C, chunk, cap, dtype)
        for a, b, c in zip(ours, torchs, exact, strict=True):
            slack = 2 * (b.double() - c).abs().max() + 8 * torch.finfo(dtype).eps * c.abs().max()
            assert a.shape == b.shape and a.dtype == b.dtype, what
            assert ((a.double() - c).abs() <= slack).all(), what
        for wanted in ((True, False), (False, True), (False, False)):
            inputs = [t.detach().requires_grad_(need) for t, need in zip((x, w), wanted)]
            loss = kernels.linear_cross_entropy(*inputs, targets, cap)
            torch.testing.assert_close(loss.detach(), ours[0], rtol=2e-6, atol=0)
            if any(wanted):
                (got,) = torch.autograd.grad(loss, [t for t in inputs if t.requires_grad], g)
                assert torch.equal(got, ours[1 if wanted[0] else 2])


CE_SHAPES = ((2, 1, 1), (5, 63, 7), (63, 100, 33), (100, 1000, 5), (3, 5000, 8))


def test_cross_entropy_torch(poisoned, monkeypatch):
    use_kernel("torch")
    check_cross_entropy("torch", "cpu", monkeypatch, CE_SHAPES, (torch.float32, torch.bfloat16))
    use_kernel("auto")
    check_cross_entropy("torch", "cpu", monkeypatch, ((5, 63, 7),), (torch.float64,))


def test_cross_entropy_chunks_and_padding():
    """GPT-2's vocabulary on a GPU: four chunks of 4,096 rows, each row at a multiple of 256 bytes."""
    assert kernels.rows_of_a_chunk(16384, 50304, cuda=True) == 4096
    assert kernels.rows_of_a_chunk(6000, 50304, cuda=True) == 3072
    assert kernels.rows_of_a_chunk(16384, 50304, cuda=False) == 249
    assert kernels.rows_of_a_chunk(9, 65, cuda=True) == 9
    for V, width in ((50257, 50304), (50304, 50304), (1025, 1152), (1040, 1040), (65, 65)):
        assert kernels.pad_vocabulary(torch.empty(V, 2, device="meta"), torch.half).shape == (width, 2)
    w = kernels.pad_vocabulary(torch.ones(1025, 2), torch.bfloat16)
    assert w.dtype == torch.bfloat16 and (w[:1025] == 1).all() and (w[1025:] == 0).all()


def test_cross_entropy_edges(monkeypatch):
    x, w = torch.randn(2, 3, 4).requires_grad_(), torch.randn(9, 4).requires_grad_()
    targets = torch.randint(9, (2, 3))
    whole = kernels.linear_cross_entropy(x, w, targets)
    assert launches == {("linear_cross_entropy", "torch, whole"): 1}
    monkeypatch.setattr(kernels, "CROSS_ENTROPY_SMALL", 0)
    # neither x nor targets is contiguous
    loss = kernels.linear_cross_entropy(x.mT.contiguous().mT, w, targets.t().contiguous().t())
    torch.testing.assert_close(loss, whole)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="given its gradients away"):
        loss.backward()
    none = kernels.linear_cross_entropy(x, w, torch.full_like(targets, -1))
    assert none.isnan() and all((g == 0).all() for g in torch.autograd.grad(none, (x, w)))
    assert kernels.linear_cross_entropy(x[:0], w, targets[:0]).isnan()
    with torch.no_grad():
        far = 1e4 * torch.randn(5, 4) # no overflow
        torch.testing.assert_close(kernels.linear_cross_entropy(far, w, targets[0, :1].expand(5)),
                                   kernels.linear_cross_entropy_reference(far, w, targets[0, :1].expand(5)))
    for bad, words in ((lambda: kernels.linear_cross_entropy(x, w, targets[0]), "must be"),
                       (lambda: kernels.linear_cross_entropy(x, w.double(), targets), "one dtype"),
                       (lambda: kernels.linear_cross_entropy(x, w, targets + 9), "not all in"),
                       (lambda: kernels.linear_cross_entropy(x, w, targets - 11), "not all in")):
        with pytest.raises(ValueError, match=words):
            bad()


@pytest.mark.parametrize("cap", [0.0, 3.0])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.deep)])
def test_a_model_without_logits(cap, tie, half, compiled, monkeypatch):
    """Loss and gradients are at most twice as far from fp64 as those of a model that returns its logits."""
    monkeypatch.setattr(kernels, "CROSS_ENTROPY_SMALL", 0)
    monkeypatch.setattr(kernels, "CROSS_ENTROPY_CHUNK", 500)
    config = GPTConfig(vocab_size=61, n_layer=1, n_embd=32, n_head=2, block_size=16, init_std=0.3,
                       logit_softcap=cap, tie_embeddings=tie)
    model = GPT(config).train()
    idx, targets = torch.randint(61, (3, 16)), torch.randint(61, (3, 16))
    targets[0, 3:9] = -1

    def results(model, call, **options):
        loss = call(idx, targets, **options)[1]["ce"]
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        call = torch.compile(model, backend="aot_eager") if compiled else model
        ours, whole = results(model, call, with_logits=False), results(model, model)
    assert sum(n for (name, path), n in launches.items()
               if name == "linear_cross_entropy" and path != "torch, whole") == 1
    exact = results(model.double(), model)
    for a, b, c in zip(ours, whole, exact, strict=True):
        # norms, because rounding spreads over all weights; 16 units, because a dozen operations round in turn
        slack = 2 * (b.double() - c).norm() + 16 * torch.finfo(torch.float32).eps * c.norm()
        assert a.dtype == b.dtype and (a.double() - c).norm() <= slack
    with pytest.raises(ValueError, match="give targets"):
        model(idx, with_logits=False)


# --- rotary embedding ---


def rope_by_matrices(x, positions, base):
    """Each pair by its own 2 x 2 matrix, in fp64."""
    out = []
    for i in range(x.size(-1) // 2):
        angle = positions.double() * base ** (-2 * i / x.size(-1))
        cos, sin = angle.cos(), angle.sin()
        matrix = torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2)) # (T, 2, 2)
        out.append((matrix @ x[..., 2 * i : 2 * i + 2].double().unsqueeze(-1)).squeeze(-1))
    return torch.cat(out, dim=-1)


ROPE_SHAPES = ((1, 2), (2, 5, 6), (3, 1, 63, 4), (2, 3, 100, 16), (1000, 2), (2, 1, 2, 5, 8))


def check_rope(path, device, shapes, dtype):
    for shape, base in itertools.product(shapes, (10000.0, 100.0)):
        positions = torch.arange(7, 7 + shape[-2], device=device)
        views = [torch.randn(shape, device=device).to(dtype)]
        if len(shape) == 4: # as attention gives it: heads and tokens exchanged, a part of each head
            B, heads, T, P = shape
            views.append(torch.randn(B, T, heads, P + 3, device=device).to(dtype).transpose(1, 2)[..., 3:])
        for x in views:
            # the upstream gradient is not contiguous either
            g = torch.randn(shape[:-1] + (2 * shape[-1],), device=device).to(dtype)[..., ::2]
            launches.clear()
            ours = gradients(lambda x: kernels.rope(x, positions, base), [x], dtype, g)
            backward = {("rotate backward", path): 1} if path == "triton" else {}
            assert launches == {("rotate", path): 1, **backward}
            exact = gradients(lambda x: rope_by_matrices(x, positions, base), [x], torch.float64, g)
            for a, c, source in zip(ours, exact, (x, g), strict=True):
                # frequency, product and argument each shift the angle by one rounding unit times the position
                wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
                pair = source.double().unflatten(-1, (-1, 2)).norm(dim=-1).repeat_interleave(2, dim=-1)
                of_angle = pair * (3 * positions[:, None] * wide + 4 * wide)
                of_result = 2 * torch.finfo(dtype).eps * (dtype.itemsize < 4) * c.abs()
                assert a.shape == c.shape and a.dtype == dtype, (shape, base, dtype)
                assert ((a.double() - c).abs() <= of_angle + of_result).all(), (shape, base, dtype)


def test_rope_torch():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        check_rope("torch", "cpu", ROPE_SHAPES, dtype)
    x, table = torch.randn(2, 3, 9, 8), kernels.rope_table(torch.arange(9), 8)
    compiled = torch.compile(kernels.rotate, backend="aot_eager") # real numbers there
    torch.testing.assert_close(compiled(x, table), kernels.rotate(x, table), rtol=0, atol=2e-6)
    for bad, words in ((lambda: kernels.rope(torch.randn(4, 3), torch.arange(4)), "even"),
                       (lambda: kernels.rotate(x, table[:8]), "must be"),
                       (lambda: kernels.rotate(x[..., :6], table), "must be")):
        with pytest.raises(ValueError, match=words):
            bad()


@needs_c
def test_what_does_not_fit_is_not_given_to_c():
    """C reads where it is told to: strided tensors go to PyTorch, and wrong shapes are refused by PyTorch."""
    x, strided = torch.randn(4, 32), torch.randn(64)[::2]
    torch.testing.assert_close(kernels.rmsnorm(x, strided), kernels.rmsnorm_reference(x, strided))
    with torch.no_grad():
        for call in (lambda: kernels.rmsnorm(x, torch.ones(4)),
                     lambda: kernels.few_rows(torch.randn(2, 256), torch.randn(600, 512))):
            with pytest.raises(RuntimeError):
                call()
    inputs = [torch.randn(s) for s in ((5, 4, 8), (24, 32), (3,), (24,))]
    with torch.device("meta"): # buffers follow the tensors, not the default device
        assert kernels.mhc_coefficients(*inputs)[2].device.type == "cpu"
    for i in range(1, 4): # another device, for instance another GPU
        with pytest.raises(ValueError, match="cpu.* meta.* bring them together"):
            kernels.mhc_coefficients(*(t.to("meta") if j == i else t for j, t in enumerate(inputs)))


# --- how tensors lie in memory ---


def backwards(t):
    return t.permute([*range(t.dim())][::-1])


LAYOUTS = { # axes in another order; every other place of a larger tensor; one number for a whole axis
    "transposed": lambda t: backwards(backwards(t).contiguous()),
    "strided": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2] if t.dim() else t,
    "expanded": lambda t: t[:1].expand(t.shape) if t.dim() else t,
}
TARGETS = torch.tensor([[0, 1, 6, 1, 2, 1], [3, 1, -1, 1, 5, 1]])[:, ::2]
OPERATIONS = { # name -> (shapes of the inputs, the operation)
    "sinkhorn": ([(2, 3, 4, 4)], lambda x: sinkhorn(x, 3)),
    "mhc_coefficients": ([(2, 3, 4, 6), (24, 24), (3,), (24,)], lambda *t: kernels.mhc_coefficients(*t, 3)),
    "silu": ([(2, 3, 4)], lambda x: activate(x, "silu")),
    "crrelu": ([(2, 3, 4), ()], lambda x, eps: activate(x, "crrelu", eps)),
    "gated crrelu": ([(2, 3, 4), (2, 3, 4), ()], lambda gate, up, eps: gated(gate, up, "crrelu", eps)),
    "gated silu": ([(2, 3, 8)], lambda x: kernels.gated_pair(x, "silu")),
    "read_streams": ([(2, 3, 4, 6), (2, 3, 4)], kernels.read_streams),
    "write_streams": ([(2, 3, 4, 6), (2, 3, 6), (2, 3, 4), (2, 3, 4, 4)], kernels.write_streams),
    "rmsnorm": ([(2, 3, 6), (6,)], kernels.rmsnorm),
    "linear_cross_entropy": ([(2, 3, 6), (7, 6)],
                             lambda x, w: kernels.linear_cross_entropy(x, w, TARGETS.to(x.device))),
    "rotate": ([(2, 3, 5, 6)], lambda x: kernels.rope(x, torch.arange(5, device=x.device))),
}


def check_layouts(path, device, layouts=tuple(LAYOUTS)):
    """
    The first input, then the others, then the upstream gradients lie in memory in a way that a kernel which
    only counts places would misread. Inputs may send an operation to PyTorch, upstream gradients never do.
    """
    for (name, (shapes, f)), layout in itertools.product(OPERATIONS.items(), layouts):
        n = len(shapes)

        def results(tensors):
            inputs = [t.detach().requires_grad_() for t in tensors[:n]]
            y = f(*inputs)
            y = y if isinstance(y, tuple) else (y,)
            return [*y, *torch.autograd.grad(y, inputs, tensors[n:] or [torch.randn_like(t) for t in y])]

        inputs = [torch.randn(s, device=device) for s in shapes]
        tensors = inputs + [torch.randn_like(y) for y in results(inputs)[:-n]]
        for changed in (slice(0, 1), slice(1, n), slice(n, None)):
            tensors_, changed = list(tensors), range(len(tensors))[changed]
            for i in changed:
                tensors_[i] = LAYOUTS[layout](tensors[i])
            launches.clear()
            got, paths = results(tensors_), {ran for _, ran in launches}
            assert n not in changed or paths == {path}, (name, paths)
            for a, b in zip(got, results([t.contiguous() for t in tensors_]), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5,
                                           msg=lambda m: f"{name}, {layout}, tensors {changed}: {m}")


@needs_c
def test_layouts_c(monkeypatch):
    for name in list(OPERATIONS):
        if name not in ("sinkhorn", "mhc_coefficients", "read_streams", "write_streams", "rmsnorm"):
            monkeypatch.delitem(OPERATIONS, name)
    check_layouts("c", "cpu")


def test_layouts_torch(monkeypatch):
    monkeypatch.setattr(kernels, "CROSS_ENTROPY_SMALL", 0)
    use_kernel("torch")
    check_layouts("torch", "cpu")


# --- torch.compile sees an operation on streams as one node ---


def check_nodes(path, device, dtype=torch.float32, layouts=(lambda t: t,)):
    """The numbers, dtypes and gradients are those of eager mode, on the path that eager mode takes. The first
    input is in fp32, the others in dtype, as autocast mixes them.
    """
    for name, layout in itertools.product(("sinkhorn", "mhc_coefficients", "read_streams", "write_streams"),
                                          layouts):
        shapes, f = OPERATIONS[name]
        first, *others = (layout(torch.randn(s, device=device)) for s in shapes)
        inputs, found, paths = [first, *(t.to(dtype) for t in others)], [], []
        torch._dynamo.reset() # it compiles one function 8 times at most
        for call in (f, torch.compile(f, backend="aot_eager", fullgraph=True)):
            launches.clear()
            leaves = [t.detach().requires_grad_() for t in inputs]
            y = call(*leaves)
            y = y if isinstance(y, tuple) else (y,)
            torch.manual_seed(1)
            grads = torch.autograd.grad(y, leaves, [torch.randn_like(t) for t in y])
            found.append([*y, *grads])
            paths.append(dict(launches))
        assert paths[0] == paths[1], (name, paths)
        assert path is None or {ran for _, ran in launches} == {path}, (name, paths)
        for a, b in zip(*found, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, msg=lambda m: f"{name}: {m}")


@needs_c
def test_nodes_c():
    check_nodes("c", "cpu")


def test_nodes_of_dtypes():
    check_nodes(None, "cpu", torch.bfloat16, (LAYOUTS["transposed"],)) # C takes fp32 alone
    use_kernel("torch")
    check_nodes("torch", "cpu")


@pytest.mark.deep
def test_nodes_of_layouts():
    check_nodes(None, "cpu", layouts=LAYOUTS.values())


def test_nodes_of_any_size():
    """Where every size is a symbol, the operations are nodes of one graph still."""
    torch._dynamo.reset()
    shapes, f = OPERATIONS["mhc_coefficients"]
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=True)
    h, *parameters = (torch.randn(s) for s in shapes)
    for x in (h, torch.cat([h, h], 1)):
        torch.testing.assert_close(compiled(x, *parameters), f(x, *parameters))


def test_a_node_of_which_one_output_is_used():
    h, *parameters = (t.requires_grad_() for t in coefficient_inputs(4, 6, 5))
    torch._dynamo.reset()

    def post(*inputs):
        return kernels.mhc_coefficients(*inputs, 3)[1]

    calls = post, torch.compile(post, backend="aot_eager", fullgraph=True)
    want, got = (torch.autograd.grad(f(h, *parameters).square().sum(), (h, *parameters)) for f in calls)
    torch.testing.assert_close(got, want)


# --- activations: the references ---


@pytest.mark.parametrize("name", NAMES)
def test_activation_reference_gradient(name):
    points = [-120, -88.8, -20, -5, -1, -0.3, 1e-3, 0.3, 1, 5, 20, 88.8, 120]
    x = torch.tensor(points, dtype=torch.float64).requires_grad_()
    up = torch.randn_like(x).requires_grad_()
    eps = [torch.tensor(0.3, dtype=torch.float64).requires_grad_()] * (name == "crrelu")
    assert torch.autograd.gradcheck(lambda x, *e: activate(x, name, *e), (x, *eps))
    assert torch.autograd.gradcheck(lambda x, up, *e: gated(x, up, name, *e), (x, up, *eps))


def test_formulas():
    """The references against the formulas as the papers print them."""
    x, eps = torch.linspace(-6, 6, 1001, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64)
    bump = x * torch.exp(-x**2 / 2)
    for name, want in (("gelu", x * (1 + torch.erf(x / 2**0.5)) / 2),
                       ("gelu_tanh", x / 2 * (1 + torch.tanh((2 / math.pi)**0.5 * (x + 0.044715 * x**3)))),
                       ("relu2", torch.where(x > 0, x**2, 0 * x)),
                       ("silu", x / (1 + torch.exp(-x))),
                       ("telu", x * torch.tanh(torch.exp(x))),
                       ("crrelu", x.clamp(min=0) + eps * bump)):
        got = activate(x, name, eps if name == "crrelu" else None)
        torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


# --- activations: the kernels ---


def check_activation(path, device, name, counts, dtype=torch.float32):
    most = max(counts)
    for gating, std in itertools.product((False, True), (1, 4)):
        x, up, g = ((scale * torch.randn(most)).to(device, dtype) for scale in (std, 1, 1))
        eps, what = [torch.tensor(0.3, device=device)] * (name == "crrelu"), "gated " * gating + name

        def ours_of(x, *rest):
            return gated(x, rest[0], name, *rest[1:]) if gating else activate(x, name, *rest)

        def reference(x, *rest):
            return kernels.activation_reference(x, rest[0] if gating else None, name,
                                                rest[-1] if eps else None)

        inputs = [x] + [up] * gating + eps
        torchs, exact = (gradients(reference, inputs, d, g) for d in (dtype, torch.float64))
        # eps has one gradient, a sum of these terms. In units of 2^-24 a term is off by 4 for ex2.approx, by
        # 3 x^2 / 2 for three roundings of its argument, by 3 for the products, by 1 for the rounding of the
        # result, and by 1 for each of the log2(count) additions of a tree.
        terms = g.double() * (up.double() if gating else 1) * x.double() * (-x.double().square() / 2).exp()
        for count in counts:
            launches.clear()
            ours = gradients(ours_of, [x[:count]] + [up[:count]] * gating + eps, dtype, g[:count])
            assert launches == {(what, path): 1, (what + " backward", path): 1}
            if eps:
                units = 8 + 1.5 * x[:count].double().square() + math.log2(count)
                assert abs(ours.pop() - terms[:count].sum()) <= 2**-24 * (units * terms[:count].abs()).sum()
            k, label = len(ours), f"{count} of {what}, std {std}, {dtype}"
            no_worse(ours, torchs[:k], exact[:k], label, APPROXIMATE)
        if gating: # side by side in one tensor: the same numbers
            F = max(k for k in (1, 7, 100) if k <= most)
            rows = most // F
            gate, value, h = (t[: rows * F].view(rows, F) for t in (x, up, g))
            launches.clear()
            both = torch.cat([gate, value], dim=1)
            pair = gradients(lambda x, *e: kernels.gated_pair(x, name, *e), [both] + eps, dtype, h)
            assert launches == {(what, path): 1, (what + " backward", path): 1}
            apart = gradients(ours_of, [gate, value] + eps, dtype, h)
            assert torch.equal(pair[0], apart[0]) and torch.equal(pair[1], torch.cat(apart[1:3], dim=1))
            if eps:
                torch.testing.assert_close(pair[2], apart[3], rtol=1e-4, atol=1e-5)
        if eps: # the formula of `terms` is autograd's
            torch.testing.assert_close(terms.sum(), exact[-1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_activation_shapes_and_pairs(name):
    """Common to all paths, tested on PyTorch's: shapes, dtypes, gate and up side by side in one tensor."""
    eps = [torch.tensor(0.3)] * (name == "crrelu")
    assert activate(torch.randn(2, 3, 4), name, *eps).shape == (2, 3, 4)
    assert activate(torch.randn(0, 4), name, *eps).shape == (0, 4)
    gate, up, g = torch.randn(7, 5), torch.randn(7, 5), torch.randn(7, 5)
    both = torch.cat([gate, up], dim=1)
    pair = gradients(lambda x: kernels.gated_pair(x, name, *eps), [both], torch.float32, g)
    apart = gradients(lambda gate, up: gated(gate, up, name, *eps), [gate, up], torch.float32, g)
    torch.testing.assert_close(pair[0], apart[0])
    torch.testing.assert_close(pair[1], torch.cat(apart[1:], dim=1))
    half = torch.randn(5, 6).bfloat16().requires_grad_() # fp32 inside
    y = activate(half, name, *eps)
    assert y.dtype == torch.bfloat16 and torch.autograd.grad(y.sum(), half)[0].dtype == torch.bfloat16
    torch.testing.assert_close(y, activate(half.double(), name, *eps).bfloat16(), rtol=2**-8, atol=1e-6)


def test_relu2_has_one_gradient_only():
    """Its hand-written backward is no graph: a second derivative is refused instead of being wrong."""
    x = torch.randn(5, requires_grad=True)
    loss = activate(x, "relu2").square().sum() # its gradient depends on x by two ways, of which one is cut
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.testing.assert_close(g, 4 * x.relu() ** 3)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def check_finite(path, device, dtype, names=("gelu", "silu", "telu", "crrelu")):
    """Finite results for all finite bf16 values, as dtype. relu2 is left out: the square itself overflows.

    With an upstream gradient of 3, a gradient whose limit is 0 must not overflow in an intermediate product.
    """
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()].to(device, dtype)
    for name in names:
        eps = [torch.tensor(0.3, device=device)] * (name == "crrelu")
        a = x.clone().requires_grad_()
        y = activate(a, name, *eps)
        (g_x,) = torch.autograd.grad(y, a, torch.full_like(y, 3))
        assert launches[name, path] == 1 and y.isfinite().all() and g_x.isfinite().all(), name
        assert torch.equal(y[x > 30], x[x > 30]) and (g_x[x > 30] == 3).all() # the identity there
        assert (y[x < -150] == 0).all() and (g_x[x < -150] == 0).all()
        launches.clear()


def test_finite_everywhere_torch():
    use_kernel("torch")
    check_finite("torch", "cpu", torch.float32, ("silu", "telu", "crrelu")) # torch's gelu is inf at 3e38
    check_finite("torch", "cpu", torch.bfloat16, ("telu", "crrelu"))


@pytest.mark.deep
@needs_c
def test_nan_stays_nan():
    x = torch.tensor([1.0, float("nan"), -1.0])
    for name in NAMES:
        eps = [torch.tensor(0.3)] * (name == "crrelu")
        assert activate(x, name, *eps).isnan().tolist() == [False, True, False], name
    logits = torch.zeros(3, 2, 2)
    logits[1] = float("nan")
    # a NaN does not spread to the neighbours
    assert sinkhorn(logits).isnan().flatten(1).any(1).tolist() == [False, True, False]
    h, *parameters = coefficient_inputs(4, 5, 3)
    h[1, 2, 3] = float("nan")
    for t in kernels.mhc_coefficients(h, *parameters):
        nan = t.isnan().flatten(1)
        assert nan.all(1).tolist() == nan.any(1).tolist() == [False, True, False]


# --- Triton ---


def in_the_interpreter(which, *files):
    """Runs the tests marked `interpreted` that match `which`, in a process that interprets kernels."""
    if INTERPRETED or kernels.triton is None:
        pytest.skip("inside, or no triton")
    command = [sys.executable, "-m", "pytest", "-q", "-k", which, __file__, *files]
    env = dict(os.environ, TRITON_INTERPRET="1")
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-4000:] + run.stderr[-2000:]
    assert " skipped" not in run.stdout, run.stdout[-4000:]


def test_triton_interpreted():
    """A few kernels and optim.py's, all in one process: it takes 4 s to start."""
    in_the_interpreter("few_by_interpreter", str(ROOT / "tests/test_optim.py"))


@pytest.mark.deep
def test_triton_interpreted_all():
    lines = (ROOT / "tests/test_kernels.py").read_text(encoding="utf-8").splitlines()
    names = [line for line in lines if line.startswith("def test_") and "_by_interpreter(" in line]
    assert len(names) == lines.count("@interpreted") # what the name lacks would never run
    in_the_interpreter("by_interpreter")


class Recorder:
    """Stands in for a kernel and remembers its launches as what Triton would compile them for."""

    def __init__(self, kernel, found):
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **options):
        names = self.kernel.arg_names
        values = dict(zip(names, args), **{k: options.pop(k) for k in names if k in options})
        types, constants, divisible = {}, {}, {}
        for i, param in enumerate(self.kernel.params):
            value = values[param.name]
            if isinstance(value, torch.Tensor):
                types[param.name] = NAMES_IN_TRITON[value.dtype]
            elif param.is_constexpr or value is None or value == 1 and isinstance(value, int):
                types[param.name], constants[(i,)] = "constexpr", value
            else:
                types[param.name] = "i32" if isinstance(value, int) else "fp32"
            if types[param.name][0] == "*" or types[param.name] == "i32" and value % 16 == 0:
                divisible[(i,)] = [["tt.divisibility", 16]] # as at a launch: the compiler may load vectors
        key = self.kernel.__name__, str(types), str(constants), str(divisible), str(options)
        self.found[key] = self.kernel, types, constants, divisible, options


NAMES_IN_TRITON = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
                   torch.int64: "*i64"}


def all_launches(monkeypatch):
    """Each operation forward and backward on a few tokens, of the widths of real models and an odd one."""
    found = {}
    monkeypatch.setattr(kernels, "path_for", lambda *args, **kwargs: "triton")
    monkeypatch.setattr(kernels, "KERNEL", "triton")
    monkeypatch.setattr(kernels, "CROSS_ENTROPY_SMALL", 0)
    for name, kernel in list(vars(kernels).items()):
        if isinstance(kernel, kernels.triton.JITFunction) and kernel.arg_names[0].startswith("p_"):
            monkeypatch.setattr(kernels, name, Recorder(kernel, found))

    def run(f, *tensors):
        y = f(*(t.requires_grad_() for t in tensors))
        torch.autograd.backward(y, [torch.empty_like(t) for t in (y if isinstance(y, tuple) else (y,))])

    for dtype in (torch.bfloat16, torch.float32):
        def like(*shape, dtype=dtype):
            return torch.randn(shape, dtype=dtype)

        for C in (64, 100, 768, 2048, 8192):
            run(kernels.rmsnorm, like(32, C), like(C))
        run(kernels.rmsnorm, like(32, 768))
        for heads, P in ((12, 64), (1, 32), (2, 6)):
            run(lambda x: kernels.rope(x, torch.arange(32)), like(16, heads, 32, P))
        for name, C in itertools.product(NAMES, (768, 96)):
            eps = [torch.tensor(0.3)] * (name == "crrelu")
            run(lambda x, *e: activate(x, name, *e), like(32, C), *eps)
            run(lambda x, up, *e: gated(x, up, name, *e), like(32, C), like(32, C), *eps)
            run(lambda x, *e: kernels.gated_pair(x, name, *e), like(32, 2 * C), *eps)
        for V in (1000, 50304):
            run(lambda x, w: kernels.linear_cross_entropy(x, w, torch.arange(32)), like(32, 16), like(V, 16))
        for N, C in itertools.product((2, 4, 8), (768, 100)):
            run(sinkhorn, like(256, N, N))
            run(kernels.read_streams, like(32, N, C), like(32, N))
            run(kernels.write_streams, like(32, N, C), like(32, C), like(32, N), like(32, N, N))
            columns = 2 * N + N * N
            parameters = [like(*s, dtype=torch.float32) for s in ((columns, N * C), (3,), (columns,))]
            run(kernels.mhc_coefficients, like(32, N, C), *parameters)
    return list(found.values())


@pytest.mark.deep
@pytest.mark.skipif(INTERPRETED or kernels.triton is None, reason="needs triton's compiler")
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_triton_compiles(arch, monkeypatch, tmp_path):
    """For A100, H100 and B200, without a GPU: nothing spills from registers, and bf16 moves in vectors.

    The interpreter runs code that the compiler refuses, for instance a variable that changes its shape. The
    table of registers that -s shows is in bench_results/README.md.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tool = os.path.join(os.path.dirname(kernels.triton.__file__), "backends/nvidia/bin/cuobjdump")
    names, spilled = set(), []
    for kernel, types, constants, divisible, options in all_launches(monkeypatch):
        source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=divisible)
        built = kernels.triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        (tmp_path / "cubin").write_bytes(built.asm["cubin"])
        command = [tool, "--dump-resource-usage", str(tmp_path / "cubin")]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack = (int(re.search(word + r":(\d+)", usage).group(1)) for word in ("REG", "STACK"))
        what = f"{kernel.__name__} {types.get('p_x', '')} {[*constants.values()]} {options}"
        print(f"sm_{arch} {registers:3} registers, {stack} bytes spilled: {what}")
        names.add(kernel.__name__)
        # Two numbers are allowed: RMSNorm's backward in fp32 on an A100 has them, and under triton 3.6
        # mhc_product in fp32 at N = 2 and C = 100 on an H100.
        spilled += [f"{stack} bytes: {what}"] * (stack > 8)
        family = kernel.__name__.split("_")[0]
        even = family == "rotate" and constants[(9,)] >= 32 or family in ("rmsnorm", "read", "write") and any(
            kernel.arg_names[i] == "C" for (i,) in divisible)
        if even and types["p_x"] == "*bf16":
            for access in ("ld", "st"):
                assert re.search(access + r"\.global\.v[248]\.b32", built.asm["ptx"]), what
    assert len(names) == (ROOT / "kernels.py").read_text(encoding="utf-8").count("_kernel(p_")
    assert not spilled, "\n".join(spilled)


@interpreted
def test_sinkhorn_by_interpreter(poisoned):
    use_kernel("triton")
    for n in (2, 4, 8):
        check_sinkhorn("triton", "cpu", n, (1, 5, 63, 100), (1, 3), (1, 8))
        check_sinkhorn("triton", "cpu", n, (100,), (20,), (1, 3, 8))
    check_sinkhorn("triton", "cpu", 4, (1000,), (3,), (3,))
    check_sinkhorn("triton", "cpu", 4, (100,), (3,), (1,), torch.bfloat16)


@interpreted
@pytest.mark.parametrize("name", NAMES)
def test_activation_by_interpreter(name, poisoned):
    use_kernel("triton")
    check_activation("triton", "cpu", name, (*COUNTS, 3001))
    check_activation("triton", "cpu", name, (63, 1000), torch.bfloat16)
    check_activation("triton", "cpu", name, (63, 1000), torch.float16)


@interpreted
def test_finite_everywhere_by_interpreter():
    use_kernel("triton")
    check_finite("triton", "cpu", torch.float32)
    check_finite("triton", "cpu", torch.bfloat16)


@interpreted
@pytest.mark.parametrize("N", [2, 4, 8])
def test_coefficients_by_interpreter(N, poisoned, monkeypatch):
    use_kernel("triton")
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    dot = InterpreterBuilder.create_dot

    def widened(t): # the interpreter would multiply the bits of bf16 as integers
        if t.dtype.scalar != kernels.tl.bfloat16:
            return t
        return TensorHandle((t.data.astype("uint32") << 16).view("float32"), kernels.tl.float32)

    monkeypatch.setattr(InterpreterBuilder, "create_dot",
                        lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest))
    check_coefficients("triton", "cpu", N, (1, 5, 63, 100), (1, 3), (1, 8))
    check_coefficients("triton", "cpu", N, (100,), (20,), (3,))
    check_coefficients("triton", "cpu", N, (1000,), (3,), (3,))
    check_coefficients("triton", "cpu", N, (100,), (1,), (1,), C=48) # several blocks of channels
    for dtype in (torch.float16, torch.bfloat16):
        check_coefficients("triton", "cpu", N, (63,), (3,), (1,), dtype)


@interpreted
@pytest.mark.parametrize("N", [2, 4, 8])
def test_streams_by_interpreter(N, poisoned):
    use_kernel("triton")
    check_streams("triton", "cpu", N, ((1, 1), (5, 63), (3, 1000)))
    for dtype in (torch.float16, torch.bfloat16):
        check_streams("triton", "cpu", N, ((5, 63),), dtype)


@interpreted
def test_rmsnorm_few_by_interpreter(poisoned):
    use_kernel("triton")
    check_rmsnorm("triton", "cpu", ((40, 63),)) # two programs of the backward, the second not full


@interpreted
def test_rmsnorm_by_interpreter(poisoned, monkeypatch):
    use_kernel("triton")
    check_rmsnorm("triton", "cpu", ((100, 5), (50, 63), (3, 3000)))
    monkeypatch.setattr(kernels, "PROGRAMS", 2) # each walks through several tiles
    check_rmsnorm("triton", "cpu", ((100, 63), (70, 100)))
    for dtype in (torch.float16, torch.bfloat16):
        check_rmsnorm("triton", "cpu", ((70, 63),), dtype)


@interpreted
def test_layouts_by_interpreter():
    use_kernel("triton")
    check_layouts("triton", "cpu", ("strided",))


@interpreted
def test_nodes_by_interpreter(poisoned):
    use_kernel("triton")
    check_nodes("triton", "cpu")
    check_nodes("triton", "cpu", torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nodes_gpu(dtype):
    check_nodes("triton", "cuda", dtype)


@pytest.mark.gpu
def test_layouts_gpu(monkeypatch):
    monkeypatch.setattr(kernels, "CROSS_ENTROPY_SMALL", 0)
    check_layouts("triton", "cuda")


@interpreted
def test_rope_by_interpreter(poisoned):
    use_kernel("triton")
    for dtype in (torch.float32, torch.float16):
        check_rope("triton", "cpu", ROPE_SHAPES, dtype)


@pytest.mark.gpu
def test_rope_gpu(poisoned):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_rope("triton", "cuda", (*ROPE_SHAPES, (3, 12, 100, 64)), dtype)


@interpreted
def test_cross_entropy_by_interpreter(poisoned, monkeypatch):
    use_kernel("triton")
    check_cross_entropy("triton", "cpu", monkeypatch, CE_SHAPES)
    check_cross_entropy("triton", "cpu", monkeypatch, CE_SHAPES[1:3], (torch.float16,))


def check_padded(monkeypatch, rows, V, C, cap, device="cpu", below=0):
    """Autocast and a vocabulary that is padded: as near to fp64 as F.cross_entropy of F.linear."""
    monkeypatch.setattr(kernels, "CROSS_ENTROPY_PADDED", 0)
    monkeypatch.setattr(kernels, "CROSS_ENTROPY_SMALL", 0)
    monkeypatch.setattr(kernels, "CROSS_ENTROPY_CHUNK", 2 * 128)
    x, w = torch.randn(rows, C, device=device), torch.randn(V, C, device=device)
    if below: # logits so far below 0, those of the padding, that e^(0 - largest) would be infinite
        x, w = x.abs() + 1, w - below
    g = torch.tensor(1.7, device=device)
    assert len(kernels.pad_vocabulary(w, torch.float32)) == 128
    targets = torch.randint(V, (rows,), device=device)
    targets[1::3] = -1

    def results(f, dtype):
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.float32):
            return gradients(lambda x, w: f(x, w, targets, cap), [x, w], dtype, g)

    exact = results(kernels.linear_cross_entropy_reference, torch.float64)
    torchs = results(kernels.linear_cross_entropy_reference, torch.float32)
    ours = results(kernels.linear_cross_entropy, torch.float32)
    for a, b, c in zip(ours, torchs, exact, strict=True):
        slack = 2 * (b.double() - c).abs().max() + 2 * torch.finfo(torch.bfloat16).eps * c.abs().max()
        assert a.shape == b.shape and a.dtype == b.dtype and ((a.double() - c).abs() <= slack).all()


@interpreted
def test_padded_few_by_interpreter(poisoned, monkeypatch):
    use_kernel("triton")
    check_padded(monkeypatch, 5, 63, 7, 0.0)
    check_padded(monkeypatch, 5, 127, 7, 5.0)
    check_padded(monkeypatch, 5, 63, 7, 0.0, below=40)


@interpreted
def test_padded_cross_entropy_by_interpreter(poisoned, monkeypatch):
    use_kernel("triton")
    monkeypatch.setattr(kernels, "CROSS_ENTROPY_PADDED", 0)
    check_cross_entropy("triton", "cpu", monkeypatch, CE_SHAPES[:4])


@pytest.mark.gpu
def test_cross_entropy_gpu(poisoned, monkeypatch):
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    shapes = (*CE_SHAPES, (600, 100, 5), (300, 1031, 7)) # chunks of 256 rows, and a vocabulary that is padded
    check_cross_entropy("triton", "cuda", monkeypatch, shapes, dtypes)
    check_padded(monkeypatch, 600, 63, 7, 5.0, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["auto", "torch"])
def test_cross_entropy_never_waits_for_the_gpu(kernel):
    use_kernel(kernel)
    x, w = (torch.randn(n, 64, device="cuda", requires_grad=True) for n in (5000, 5003))
    targets = torch.randint(5003, (5000,), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.linear_cross_entropy(x, w, targets).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rmsnorm_gpu(dtype, poisoned):
    check_rmsnorm("triton", "cuda", (*SHAPES, (20_000, 64), (100, 768), (5, 8192)), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("N", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_streams_gpu(N, dtype, poisoned):
    check_streams("triton", "cuda", N, ((1, 1), (5, 63), (63, 100), (3, 1000), (500, 768)), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("N", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_coefficients_gpu(N, dtype, poisoned):
    check_coefficients("triton", "cuda", N, COUNTS, (1, 3, 20), (1, 3, 8), dtype)
    check_coefficients("triton", "cuda", N, (1000,), (3,), (1,), dtype, C=768) # vector loads


@pytest.mark.gpu
@pytest.mark.parametrize("n", [2, 4, 8])
def test_sinkhorn_gpu(n, poisoned):
    check_sinkhorn("triton", "cuda", n, COUNTS, (1, 3, 20), (1, 3, 8))
    check_sinkhorn("triton", "cuda", n, (1000,), (20,), (1,), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_activation_gpu(name, dtype, poisoned):
    check_activation("triton", "cuda", name, (*COUNTS, 100_001), dtype)
    if dtype != torch.float16: # which has no place for bf16's largest
        check_finite("triton", "cuda", dtype)


@pytest.mark.gpu
def test_gpu_sums_are_the_same_every_time():
    x, g = torch.randn(1_000_001, device="cuda"), torch.randn(1_000_001, device="cuda")
    eps = torch.tensor(0.3, device="cuda")
    runs = [gradients(lambda x, eps: activate(x, "crrelu", eps), [x, eps], torch.float32, g)[2]
            for _ in range(5)]
    assert all(torch.equal(runs[0], r) for r in runs)


# --- products with a matrix of weights ---


@pytest.mark.parametrize("bias", (True, False))
def test_project_under_autocast(bias):
    """On a CPU: in fp32 what F.linear makes of inputs and gradient rounded to bf16, rounded once more."""
    inputs = [torch.randn(shape, requires_grad=True) for shape in ((3, 17, 40), (23, 40), (23,))[: 2 + bias]]
    g, linear = torch.randn(3, 17, 23), torch.nn.functional.linear
    with torch.autocast("cpu", torch.bfloat16):
        y = kernels.project(*inputs)
        assert kernels.project(*(t.double() for t in inputs)).dtype == torch.float64
    ours, rounded = [y, *torch.autograd.grad(y, inputs, g)], [t.bfloat16() for t in (*inputs, g)]
    for count, given in ((1, rounded), (3, [*inputs, g])): # roundings, each of at most 2^-9
        *exact, upstream = (t.detach().double().requires_grad_() for t in given)
        want = linear(*exact)
        for a, b in zip(ours, [want, *torch.autograd.grad(want, exact, upstream)], strict=True):
            assert a.dtype == torch.float32 and (a - b).norm() < 1.01 * count * 2**-9 * b.norm()



@needs_c
def test_few_rows(poisoned):
    with torch.no_grad():
        sizes = ((512, 384), (513, 391), (1023, 130), (131, 1023))
        for rows, (n_out, n_in) in itertools.product((1, 2, 3, 4, 5, 7, 16), sizes):
            x, w = torch.randn(1, rows, n_in), torch.randn(n_out, n_in)
            launches.clear()
            ours = kernels.few_rows(x, w)
            assert launches == {("few_rows", "c"): 1} and ours.shape == (1, rows, n_out)
            torchs, exact = torch.nn.functional.linear(x, w), x.double() @ w.double().t()
            no_worse([ours[0]], [torchs[0]], [exact[0]], f"{rows} rows of {n_in} x {n_out}")
        launches.clear()
        large = torch.randn(512, 384)
        for x, w in ((torch.randn(17, 384), large), (torch.randn(1, 384), large[:300]),
                     (torch.randn(1, 384).double(), large.double())):
            assert torch.equal(kernels.few_rows(x, w), torch.nn.functional.linear(x, w))
        with torch.autocast("cpu", torch.bfloat16):
            assert kernels.few_rows(torch.randn(1, 384), large).dtype == torch.bfloat16
        assert not launches # many rows, a small matrix, fp64, autocast: BLAS
        columns = torch.randn(384, 3).t()
        want = columns @ large.t()
        torch.testing.assert_close(kernels.few_rows(columns, large), want, atol=1e-4, rtol=1e-4)
