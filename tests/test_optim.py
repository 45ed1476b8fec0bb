"""Each optimizer against torch's own, a reference of a few lines, two steps by hand, or an identity."""
import copy
import itertools
import math
import os
import subprocess
import sys

import pytest
import torch

import optim
from conftest import ROOT
from model import GPT, GPTConfig
from kernels import INTERPRETED, c_library, tl, triton
from optim import (NEWTON_SCHULZ, POLAR_EXPRESS, AdamMini, FAdam, Muon, build_optimizer, declarations,
                   find_hooks, orthogonalise, partition, run_update_hooks, step_where_finite, watch)

NAMES = ("adamw", "fadam", "adam_mini", "muon")
ATTENTION = [("mha", {}), ("mha", {"n_kv_head": 2}), ("mla", {"q_rank": 8}), ("diff", {"diff_form": "v1"}),
             ("diff", {}), ("diff_mla", {"diff_form": "v1"}), ("diff_mla", {})]


def model_of(attention="mha", **knobs):
    torch.manual_seed(3)
    shape = dict(vocab_size=17, block_size=8, n_layer=2, n_head=4, n_embd=32)
    return GPT(GPTConfig(**shape, attention=attention, qk_norm=True, bias=True, **knobs))


def run(model, opt, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        idx = torch.randint(17, (4, 9), generator=generator)
        opt.zero_grad()
        model(idx[:, :-1], idx[:, 1:])[1]["ce"].backward()
        opt.step()


# --- all of them ---


@pytest.mark.parametrize("name, lr", [("adamw", 0.05), ("fadam", 0.05), ("adam_mini", 0.05), ("muon", 0.2)])
def test_minimises_a_quadratic(name, lr):
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 5, bias=False)
    model.role, target = "matrix", torch.randn(5, 6)
    opt = build_optimizer(model, name, lr, 0.0, (0.9, 0.95))

    def closure():
        opt.zero_grad()
        loss = (model.weight - target).square().sum()
        loss.backward()
        return loss

    first = opt.step(closure).item()
    for i in range(200):
        for group in opt.param_groups:
            group["lr"] = lr * (1 - i / 200) # the schedule is a group's lr
        last = opt.step(closure).item()
    assert last < 0.02 * first


@pytest.mark.parametrize("name", NAMES)
def test_interrupted_is_uninterrupted(name):
    """state_dict to a file and back after 5 of 10 steps: the same bits."""
    straight, broken = model_of("diff_mla"), model_of("diff_mla")
    opt = build_optimizer(straight, name, 1e-2, 0.1, (0.9, 0.95))
    run(straight, opt, 5)
    broken.load_state_dict(straight.state_dict())
    saved = copy.deepcopy(opt.state_dict())
    run(straight, opt, 5, seed=1)
    resumed = build_optimizer(broken, name, 1e-2, 0.1, (0.9, 0.95))
    resumed.load_state_dict(saved)
    run(broken, resumed, 5, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), broken.parameters()))


@pytest.mark.parametrize("name", NAMES)
def test_a_zero_gradient_is_harmless(name):
    model = model_of()
    opt = build_optimizer(model, name, 1e-2, 0.0, (0.9, 0.95))
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


@pytest.mark.parametrize("attention, knobs", ATTENTION, ids=str)
def test_every_parameter_is_declared_once(attention, knobs):
    model = model_of(attention, **knobs)
    found = declarations(model)
    assert set(found) == set(model.parameters())
    for p, d in found.items():
        assert d.blocks is None or d.blocks == () or sum(d.blocks) == len(p)
        assert d.role != "matrix" or sum(d.fused) == len(p)
    assert found[model.embed.weight].role == "embedding" # also as a tied head
    assert all(d.role == "vector" for p, d in found.items() if p.dim() < 2)
    model.stray = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match="Linear \\(stray\\) owns parameters but declares no role"):
        build_optimizer(model, "adam_mini", 1e-3, 0.0, (0.9, 0.95))


def both(cls, form, shape, grads, knobs):
    """The same parameter after the same gradients, by the loop and by another form."""
    ends = []
    for f in ("loop", form):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(shape))
        opt = cls([p], lr=1e-2, weight_decay=0.1, form=f, **knobs)
        for g in grads:
            p.grad = g.clone() if g.is_contiguous() else g
            opt.step()
        ends.append([p.detach(), *(v for v in opt.state[p].values() if torch.is_tensor(v))])
    return ends


KINDS = [(FAdam, {}), (FAdam, {"clip": 0.5}), (AdamMini, {}), (AdamMini, {"blocks": ()}),
         (AdamMini, {"blocks": "uneven"})]


@pytest.mark.parametrize("shape", [(63, 100), (5, 1), (7,), (300, 33)])
@pytest.mark.parametrize("cls, knobs", KINDS, ids=str)
def test_c_is_the_loop(cls, knobs, shape):
    """Odd shapes; gradients of every size: both branches of the adaptive epsilon and of the clipping run."""
    if c_library(0) is None:
        pytest.skip("no C compiler")
    if knobs.get("blocks") == "uneven":
        knobs = {"blocks": (2, 2, 1, *[1] * (shape[0] - 5))}
    # Epsilon counts where gradients are about 1e-9.
    for sizes in ((1.0, 1e-3, 0.0, 30.0), (1e-9, 3e-9, 1e-8)):
        grads = [size * torch.randn(shape) for size in sizes]
        loop, other = both(cls, "c", shape, grads, knobs)
        for a, b in zip(loop, other):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("cls", [FAdam, AdamMini])
def test_the_c_form_is_what_runs_on_a_cpu(cls):
    if c_library(0) is None:
        pytest.skip("no C compiler")
    p = torch.nn.Parameter(torch.randn(6, 8))
    assert cls([p]).form_of([p]) == "c" and cls([p], form="loop").form_of([p]) == "loop"
    half = torch.nn.Parameter(torch.randn(6, 8).bfloat16())
    assert cls([half]).form_of([half]) == "loop" # C knows fp32 alone
    half.grad = torch.randn_like(half)
    with pytest.raises(RuntimeError, match="contiguous fp32"):
        cls([half], form="c").step()
    with pytest.raises(RuntimeError, match="one dtype"): # without a GPU
        cls([half.double()] if INTERPRETED else [p], form="triton").form_of([half.double()])
    with pytest.raises(ValueError, match="not one of: auto, loop, c, triton"):
        cls([p], form="fast")


@pytest.mark.parametrize("form", ["c", "triton"])
def test_a_form_that_was_asked_for_is_never_replaced_in_silence(form):
    """C and Triton know FAdam's square root alone."""
    p = torch.nn.Parameter(torch.randn(6, 8))
    p.grad = torch.randn_like(p)
    FAdam([p], p=0.25).step() # auto takes the loop
    with pytest.raises(RuntimeError, match="p=0.5"):
        FAdam([p], p=0.25, form=form).step()


def test_loads_of_16_bytes_come_back_with_aligned_gradients():
    """One gradient that begins elsewhere, such as a view, must not slow down all later steps."""
    opt, p = FAdam([torch.nn.Parameter(torch.zeros(32))]), torch.zeros(32)
    found = [opt.on_device(([p], [g]), lambda: [(0, 0, 32)])[2] for g in (p, torch.zeros(33)[1:], p)]
    assert found == [16, 1, 16]


def test_the_count_of_steps_is_fp32_whatever_torchs_default():
    """Kernels read it as fp32."""
    torch.set_default_dtype(torch.float64)
    try:
        p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float32))
        assert AdamMini([p]).state_of(p, True, {"m": (3,)})["step"].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("cls", [FAdam, AdamMini])
def test_c_reads_a_transposed_gradient_and_passes_on_a_nan(cls):
    if c_library(0) is None:
        pytest.skip("no C compiler")
    loop, c = both(cls, "c", (12, 9), [torch.randn(9, 12).t()], {})
    torch.testing.assert_close(loop[0], c[0])
    loop, c = both(cls, "c", (12, 9), [torch.full((12, 9), math.nan)], {}) # it ends, with NaN as in the loop
    assert loop[0].isnan().all() and c[0].isnan().all()


@pytest.mark.parametrize("cls", [FAdam, AdamMini])
def test_state_of_bf16_parameters_stays_fp32_when_loaded(cls):
    p = torch.nn.Parameter(torch.randn(6, 8).bfloat16())
    opt, again = cls([p], betas=(0.9, 0.97)), cls([p], betas=(0.9, 0.97))
    p.grad = torch.randn_like(p)
    opt.step()
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for key, value in opt.state[p].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(again.state[p][key])), key
        assert not torch.is_tensor(value) or value.dtype == again.state[p][key].dtype


@pytest.mark.parametrize("cls", [FAdam, AdamMini])
def test_the_number_of_threads_changes_no_bit(cls):
    if c_library(0) is None:
        pytest.skip("no C compiler")
    ends, before, grads = [], torch.get_num_threads(), [*torch.randn(3, 301, 173)]
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            ends.append(both(cls, "c", (301, 173), grads, {})[1])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in ends[1:] for a, b in zip(ends[0], other))


@pytest.mark.parametrize("cls", [FAdam, AdamMini])
def test_the_state_of_another_model_is_refused(cls):
    """In C it would be written past its end."""
    small, large = torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(6, 4))
    opt, other = cls([small]), cls([large])
    small.grad, large.grad = torch.randn(3, 4), torch.randn(6, 4)
    opt.step()
    other.load_state_dict(opt.state_dict())
    with pytest.raises(ValueError, match="of the same model"):
        other.step()


def test_adam_minis_state_with_other_blocks_is_refused():
    a, b = torch.nn.Parameter(torch.randn(4, 4)), torch.nn.Parameter(torch.randn(4, 4))
    a.grad, b.grad = torch.randn(4, 4), torch.randn(4, 4)
    opt, other = AdamMini([{"params": [a], "blocks": (2, 2)}]), AdamMini([{"params": [b], "blocks": None}])
    opt.step()
    state = opt.state_dict()
    state["param_groups"][0]["blocks"] = None
    other.load_state_dict(state)
    with pytest.raises(ValueError, match="of the same model"):
        other.step()


def test_without_a_compiler_the_loop_runs_and_says_so(monkeypatch, capsys):
    for cc in ("no-such-compiler", "false"):
        monkeypatch.setenv("CC", cc)
        c_library.cache_clear()
        p = torch.nn.Parameter(torch.randn(3, 4))
        assert AdamMini([p]).form_of([p]) == "loop"
        assert f"NO WORKING C COMPILER ({cc}: " in capsys.readouterr().out
    c_library.cache_clear() # what it remembers is of a broken compiler


# --- steps that are left out, and steps that go on after a save ---


FLAGS = [(1, 1), (0, 0), (1, 0), (0, 0), (0, 1), (0, 0)] # for each step: is it bad for each layer?


def flagged_steps(name, form, device, seen, saved_after=()):
    """All weights and state after FLAGS. seen: bad gradients are NaN and flagged; else there are none."""
    generator = torch.Generator().manual_seed(1)
    layers = [torch.nn.Linear(6, 5), torch.nn.Linear(5, 3)]
    for layer in layers:
        layer.role = "matrix"
        for p in layer.parameters():
            p.data = torch.randn(p.shape, generator=generator)
    model = torch.nn.Sequential(*layers).to(device)

    def optimizer():
        opt = build_optimizer(model, name, 1e-2, 0.1, (0.9, 0.95))
        opt.form = form
        return opt

    opt = optimizer()
    for step, flags in enumerate(FLAGS):
        for layer, flag in zip(model, flags):
            for p in layer.parameters():
                g = torch.randn(p.shape, generator=generator).to(device)
                p.grad = g if not flag else g * math.nan if seen else None
        bad = torch.tensor(flags if seen else [0, 0], dtype=torch.float32, device=device)
        step_where_finite(opt, [([*layer.parameters()], b) for layer, b in zip(model, bad)], late=True)
        if step in saved_after:
            state = opt.state_dict() # as from a file: on the CPU
            for one in state["state"].values():
                one.update({k: v.cpu() for k, v in one.items() if torch.is_tensor(v)})
            opt = optimizer()
            opt.load_state_dict(state)
    return [torch.as_tensor(x) for p in model.parameters() for x in (p.detach(), *opt.state[p].values())]


def check_flagged_steps(name, form, device):
    """A bad step might never have been, to the bit, whether the run was stopped and resumed or not."""
    without = flagged_steps(name, form, device, seen=False)
    for saved_after in ((), (0, 2, 4)):
        with_ = flagged_steps(name, form, device, True, saved_after)
        assert all(x.isfinite().all() and torch.equal(x, y) for x, y in zip(with_, without, strict=True))


@pytest.mark.parametrize("name, form", [("adamw", "auto"), ("muon", "auto"), ("fadam", "auto"),
                                        ("adam_mini", "auto"), ("fadam", "loop"), ("adam_mini", "loop")])
def test_a_bad_step_leaves_no_trace(name, form):
    check_flagged_steps(name, form, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_a_bad_step_leaves_no_trace_on_a_gpu(name):
    check_flagged_steps(name, "auto", "cuda")


@pytest.mark.parametrize("name", NAMES)
def test_loaded_state_is_where_the_weights_are(name):
    """torch moves `step` for groups that it knows as fused. The meta device stands in for a GPU."""
    model = model_of()
    opt = build_optimizer(model, name, 1e-2, 0.1, (0.9, 0.95))
    run(model, opt, 1)
    saved = opt.state_dict()
    for one in saved["state"].values():
        one.update({k: torch.as_tensor(float(v)) for k, v in one.items() if k == "step"}) # as Triton counts
    with torch.device("meta"):
        again = build_optimizer(model_of(), name, 1e-2, 0.1, (0.9, 0.95))
    again.load_state_dict(saved)
    assert all(x.is_meta for one in again.state.values() for x in one.values())


# --- Triton ---


interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_triton_interpreted of test_kernels.py")
TRITON = [*KINDS[:4], (AdamMini, {"blocks": (2, 2, 1)}), (AdamMini, {"betas": (0.0, 0.5)}),
          (FAdam, {"betas": (0.0, 0.5)})]


@pytest.mark.deep
def test_triton_interpreted_all():
    """Triton reads TRITON_INTERPRET where a kernel is defined, so these tests run in another process. The
    short ones, few_by_interpreter, run with those of test_kernels.py.
    """
    if INTERPRETED or triton is None:
        pytest.skip("inside, or no triton")
    command = [sys.executable, "-m", "pytest", "-q", "-k", "by_interpreter", __file__]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                          env=dict(os.environ, TRITON_INTERPRET="1"))
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
    assert " skipped" not in done.stdout, done.stdout[-4000:]


def check_triton(cls, knobs, device, shapes, sizes, dtype=torch.float32):
    """Against the loop in fp64, in two groups. After two steps the loop goes on where Triton was."""
    torch.manual_seed(0)
    shapes = [(5, *shape[1:]) for shape in shapes] if isinstance(knobs.get("blocks"), tuple) else shapes
    starts, grads = ([torch.randn(shape).to(dtype) for shape in shapes] for _ in range(2))
    ends = []
    for form, kind in (("loop", torch.float64), ("loop", dtype), ("triton", dtype)):
        params = [torch.nn.Parameter(x.to(device, kind, copy=True)) for x in starts]
        groups = [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "weight_decay": 0.0}]
        opt = cls(groups, lr=1e-2, form=form, **knobs)
        for i, size in enumerate(sizes):
            if i == 2 and form == "triton":
                opt.form = "loop"
            for p, g in zip(params, grads):
                p.grad = (size * g).roll(i, 0).to(device, kind)
            opt.step()
        moments = [opt.state[p][k] for p in params for k in ("m", "f" if cls is FAdam else "v")]
        ends.append([*(p.detach() for p in params), *moments])
    for exact, loop, ours in zip(*ends, strict=True):
        # 2^-20: of Triton's roots, quotients and powers each is off by up to 2 units in the last place
        rounding = 2**-20 if dtype == torch.float32 else 2**-6
        allowed = 2 * (loop - exact).abs().max() + rounding * exact.abs().max()
        assert (ours - exact).abs().max() <= allowed, (cls, knobs, shapes, sizes)


SIZES = [(1.0, 1e-3, 0.0, 30.0), (1e-9, 3e-9, 1e-8)] # of gradients: both branches of epsilon and clipping


@interpreted
@pytest.mark.parametrize("cls", (FAdam, AdamMini))
def test_triton_few_by_interpreter(cls, monkeypatch, poisoned):
    monkeypatch.setattr(optim, "CHUNK", 1024)
    check_triton(cls, {}, "cpu", [(23, 50), (5, 1), (7,)], SIZES[0][:3])


@interpreted
@pytest.mark.parametrize("cls, knobs", TRITON, ids=str)
def test_triton_by_interpreter(cls, knobs, monkeypatch, poisoned):
    monkeypatch.setattr(optim, "CHUNK", 1024) # several programs for a tensor
    for sizes in SIZES:
        check_triton(cls, knobs, "cpu", [(23, 100), (5, 1), (7,), (1,)], sizes)
    check_triton(cls, knobs, "cpu", [(16, 32), (5, 48), (5, 16)], (1.0, 0.1, 1.0), torch.bfloat16)


@interpreted
@pytest.mark.parametrize("name", ("fadam", "adam_mini"))
def test_a_bad_step_leaves_no_trace_by_interpreter(name):
    check_flagged_steps(name, "triton", "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("cls, knobs", TRITON, ids=str)
def test_triton_on_a_gpu(cls, knobs):
    for sizes, dtype in itertools.product(SIZES, (torch.float32, torch.bfloat16)):
        check_triton(cls, knobs, "cuda", [(300, 333), (5, 1), (7,), (1,)], sizes, dtype)
        check_triton(cls, knobs, "cuda", [(304, 336), (5, 48), (5, 16)], sizes, dtype)


@pytest.mark.deep
@pytest.mark.skipif(INTERPRETED or triton is None, reason="needs triton's compiler")
def test_the_kernels_compile_for_an_h100(monkeypatch, tmp_path):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def assembly(kernel, *args): # "*fp32" and "fp32" are types, all else constants
        names = kernel.arg_names
        known = ("*i64", "*fp32", "fp32")
        types = {k: v if v in known else "constexpr" for k, v in zip(names, args, strict=True)}
        constants = {(i,): v for i, v in enumerate(args) if types[names[i]] == "constexpr"}
        source = ASTSource(fn=kernel, signature=types, constexprs=constants)
        return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]

    for bad, dtype, align in itertools.product((None, "*fp32"), (tl.float32, tl.bfloat16), (1, 16)):
        constants = dtype, align, optim.CHUNK, optim.BLOCK
        made = [assembly(optim.fadam_kernel, "*i64", "*i64", "*fp32", bad, *["fp32"] * 8, stage, *constants)
                for stage in range(3)]
        made.append(assembly(optim.adam_mini_kernel, "*i64", "*i64", bad, *["fp32"] * 7, dtype, align,
                             optim.BLOCK))
        assert all(("ld.global.v4" in ptx) == (align == 16) for ptx in made) # 16 bytes at a time


# --- FAdam ---


def test_fadam_two_steps_by_hand():
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    opt = FAdam([p], lr=0.1, betas=(0.9, 0.99), weight_decay=0.01)
    theta, m, f = [1.0, -2.0], [0.0, 0.0], None
    for t, g in ((1, [0.5, -0.25]), (2, [0.1, 0.3])):
        p.grad = torch.tensor(g, dtype=torch.float64)
        opt.step()
        b2 = 0.99 * (1 - 0.99 ** (t - 1)) / (1 - 0.99**t)
        f = [(1 - b2) * x * x + (b2 * y if t > 1 else 0) for x, y in zip(g, f or [0, 0])]
        root = [math.sqrt(x) + 1e-8 for x in f] # epsilon is at its cap here

        def clipped(v):
            size = math.sqrt(sum(x * x for x in v) / 2)
            return [x / max(1, size) for x in v]

        natural, decay = (clipped([x / r for x, r in zip(v, root)]) for v in (g, theta))
        m = [0.9 * a + 0.1 * b for a, b in zip(m, natural)]
        theta = [x - 0.1 * (a + 0.01 * d) for x, a, d in zip(theta, m, decay)]
    want = torch.tensor(theta, dtype=torch.float64)
    torch.testing.assert_close(p.detach(), want, atol=1e-6, rtol=1e-6) # the state is fp32


def test_fadam_fisher_is_adams_bias_corrected_moment():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(7, 5))
    opt, v = FAdam([p], betas=(0.9, 0.97)), 0
    for t in range(1, 6):
        p.grad = torch.randn(7, 5)
        v = 0.97 * v + 0.03 * p.grad.square()
        opt.step()
        torch.testing.assert_close(opt.state[p]["f"], v / (1 - 0.97**t))


def test_fadam_first_step_is_a_tenth_of_the_sign():
    p = torch.nn.Parameter(torch.zeros(50))
    opt = FAdam([p], lr=1e-2)
    p.grad = torch.randn(50)
    opt.step()
    torch.testing.assert_close(p.detach(), -1e-3 * p.grad.sign(), atol=1e-7, rtol=1e-4)


def test_fadam_does_not_see_the_scale_of_the_loss():
    ends = []
    for scale in (1.0, 1e4):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.ones(20))
        opt = FAdam([p], lr=1e-2, eps=0.0)
        for _ in range(5):
            p.grad = scale * torch.randn(20)
            opt.step()
        ends.append(p.detach())
    torch.testing.assert_close(*ends)


def test_fadam_against_pytorch_optimizer():
    theirs = pytest.importorskip("pytorch_optimizer", reason="no pytorch-optimizer; only tests use it")
    torch.manual_seed(0)
    a = torch.nn.Parameter(torch.randn(6, 4))
    b = torch.nn.Parameter(a.detach().clone())
    knobs = dict(lr=1e-2, weight_decay=0.1)
    other = theirs.FAdam([b], **knobs, betas=(0.9, 0.999), clip=1.0, p=0.5, eps=1e-8)
    ours = FAdam([a], **knobs)
    for _ in range(6):
        a.grad = torch.randn(6, 4)
        b.grad = a.grad.clone()
        ours.step()
        other.step()
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


# --- Adam-mini ---


def test_adam_mini_with_blocks_of_one_number_is_adamw():
    torch.manual_seed(0)
    a = torch.nn.Parameter(torch.randn(40, 1))
    b = torch.nn.Parameter(a.detach().clone())
    mini, adamw = AdamMini([a], lr=1e-2, weight_decay=0.1), torch.optim.AdamW([b], lr=1e-2, weight_decay=0.1)
    for _ in range(10):
        a.grad = torch.randn(40, 1)
        b.grad = a.grad.clone()
        mini.step()
        adamw.step()
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def reference_blocks(model):
    """{parameter name: row slices} from the layout of each attention, not from what modules declare."""
    c, out = model.config, {}
    for name, p in model.named_parameters():
        rows = [slice(i, i + 1) for i in range(len(p))]
        D, H = c.head_width, c.n_head
        Q = 2 * H if "diff" in c.attention and c.diff_form == "v2" else H

        def heads(start, n, width):
            return [slice(start + i * width, start + (i + 1) * width) for i in range(n)]

        if p.dim() < 2 or name.endswith(("norm.weight", "vectors")):
            rows = [slice(None)]
        elif name.endswith("qkv.weight"):
            rows = heads(0, Q + c.kv_heads, D) + rows[(Q + c.kv_heads) * D :]
        elif name.endswith("q_up.weight"):
            rows = heads(0, Q, D)
        elif name.endswith("kv_up.weight"):
            N = D - c.rotary_width
            starts = range(0, H * (N + D), N + D)
            rows = [s for i in starts for s in [slice(i, i + N), *rows[i + N : i + N + D]]]
        out[name] = rows
    return out


@pytest.mark.parametrize("attention, knobs", ATTENTION, ids=str)
def test_adam_mini_against_a_reference_per_block(attention, knobs):
    ours, theirs = model_of(attention, **knobs), model_of(attention, **knobs)
    opt, blocks = build_optimizer(ours, "adam_mini", 1e-2, 0.1, (0.9, 0.95)), reference_blocks(theirs)
    m, v = {}, {}
    for t in range(1, 5):
        run(ours, opt, 1, seed=t)
        theirs.zero_grad()
        idx = torch.randint(17, (4, 9), generator=torch.Generator().manual_seed(t))
        theirs(idx[:, :-1], idx[:, 1:])[1]["ce"].backward()
        for name, p in theirs.named_parameters():
            decay = 0.1 if p.dim() > 1 and not name.endswith(("norm.weight", "vectors")) else 0.0
            for i, rows in enumerate(blocks[name]):
                g, key = p.grad[rows], (name, i)
                m[key] = 0.9 * m.get(key, 0) + 0.1 * g
                v[key] = 0.95 * v.get(key, 0) + 0.05 * g.square().mean()
                root = (v[key] / (1 - 0.95**t)).sqrt() + 1e-8
                p.data[rows] = p.data[rows] * (1 - 1e-2 * decay) - 1e-2 * (m[key] / (1 - 0.9**t)) / root
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("attention, knobs", ATTENTION, ids=str)
def test_the_printed_partition_is_the_one_in_use(attention, knobs, capsys):
    model = model_of(attention, **knobs)
    opt = build_optimizer(model, "adam_mini", 1e-2, 0.1, (0.9, 0.95))
    run(model, opt, 1)
    partition(model)
    said = capsys.readouterr().out
    blocks = {n: opt.state[p]["v"].numel() for n, p in model.named_parameters()}
    for line in said.splitlines()[1:-2]:
        name, rest = line.split()[0], line.split("AdamW" if "AdamW" in line else ")")[-1] # the last column
        counts = [int(piece.split(" x ")[0].replace(",", "")) for piece in rest.split(" + ")]
        assert sum(counts) == blocks[name], line
    assert f"{sum(blocks.values()):,} blocks" in said


def test_adam_mini_keeps_half_the_state():
    sizes = {}
    for name in ("adamw", "adam_mini"):
        shape = dict(vocab_size=256, block_size=8, n_layer=2, n_head=4, n_embd=256)
        model = GPT(GPTConfig(**shape, attention="diff_mla"))
        opt = build_optimizer(model, name, 1e-3, 0.1, (0.9, 0.95))
        idx = torch.zeros(1, 8, dtype=torch.long)
        model(idx, idx)[1]["ce"].backward()
        opt.step()
        sizes[name] = [
            sum(s[k].untyped_storage().nbytes() for s in opt.state.values() for k in keys if k in s)
            for keys in (("exp_avg", "m"), ("exp_avg_sq", "v"))]
    assert sizes["adam_mini"][0] == sizes["adamw"][0]
    assert sizes["adam_mini"][1] < 0.01 * sizes["adamw"][1]


# --- Muon ---


@pytest.mark.parametrize("steps, cosine, low, high", [
    (NEWTON_SCHULZ, 0.97, 0.2, 1.25), (POLAR_EXPRESS, 0.985, 0.5, 1.2)])
@pytest.mark.parametrize("shape", [(64, 64), (128, 32), (32, 128)])
@pytest.mark.parametrize("bf16", (False, True))
def test_orthogonalise_against_svd(steps, cosine, low, high, shape, bf16):
    torch.manual_seed(0)
    g = torch.randn(3, *shape)
    o = orthogonalise(g, steps, bf16)
    assert o.dtype == torch.float32 and torch.equal(o, o.bfloat16().float()) == bf16
    u, _, vt = torch.linalg.svd(g, full_matrices=False)
    assert torch.cosine_similarity(o.flatten(1), (u @ vt).flatten(1)).min() > cosine
    s = torch.linalg.svdvals(o)
    assert s.max() < high and s.median() > 0.7 and s.quantile(0.05) > low


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)])
def test_muon_against_torch(shape):
    torch.manual_seed(0)
    a = torch.nn.Parameter(torch.randn(shape))
    b = torch.nn.Parameter(a.detach().clone())
    ours = Muon([{"params": [a], "fused": (shape[0],)}], lr=1e-2, weight_decay=0.1, steps=NEWTON_SCHULZ)
    theirs = torch.optim.Muon([b], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    start = a.detach().clone()
    for _ in range(5):
        a.grad = torch.randn(shape)
        b.grad = a.grad.clone()
        ours.step()
        theirs.step()
    # theirs iterates in bf16 on a matrix not divided by 1.02; what both moved must agree to that
    assert ((a - b).norm() / (b - start).norm()) < 0.05


def test_muon_splits_what_is_fused():
    """A fused matrix is updated as its parts would be, each with its own scale, be one huge and one small."""
    torch.manual_seed(0)
    g = torch.cat([1000 * torch.randn(8, 16), torch.randn(24, 16)])
    whole = torch.nn.Parameter(torch.zeros(32, 16))
    whole.grad = g
    Muon([{"params": [whole], "fused": (8, 24)}], lr=1.0, weight_decay=0.0).step()
    for part, piece in zip(whole.detach().split((8, 24)), g.split((8, 24))):
        alone = torch.nn.Parameter(torch.zeros_like(piece))
        alone.grad = piece.clone()
        Muon([{"params": [alone], "fused": (len(piece),)}], lr=1.0, weight_decay=0.0).step()
        torch.testing.assert_close(part, alone.detach(), atol=1e-5, rtol=1e-4)


def test_muons_other_half_is_adamw():
    torch.manual_seed(0)
    a = torch.nn.Parameter(torch.randn(5, 3))
    b = torch.nn.Parameter(a.detach().clone())
    ours = Muon([{"params": [a], "fused": ()}], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    theirs = torch.optim.AdamW([b], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    for _ in range(5):
        a.grad = torch.randn(5, 3)
        b.grad = a.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("attention, knobs", ATTENTION, ids=str)
def test_muon_takes_the_matrices_and_nothing_else(attention, knobs):
    model = model_of(attention, **knobs)
    opt = build_optimizer(model, "muon", 1e-2, 0.1, (0.9, 0.95))
    taken = {p for g in opt.param_groups if g["fused"] for p in g["params"]}
    names = {n for n, p in model.named_parameters() if p in taken}
    in_blocks = {n for n, p in model.named_parameters() if n.startswith("blocks") and p.dim() == 2}
    assert names == {n for n in in_blocks if "maps" not in n and "norm" not in n}


# --- hooks ---


def gradients(model):
    idx = torch.randint(17, (4, 9), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    model(idx[:, :-1], idx[:, 1:])[1]["ce"].backward()
    return dict(model.named_parameters())


def test_update_hooks_run_in_their_order(tmp_path):
    code = "def ten(step, params):\n    for p in params.values(): p.grad.fill_(10)\n"
    (tmp_path / "h.py").write_text(code, encoding="utf-8")
    ten = f"{tmp_path / 'h.py'}:ten"
    for text, norm in ((f"{ten},clip_by_layer=0.5", 0.5), (f"clip_by_layer=0.5, {ten}", None)):
        params = gradients(model_of())
        noted = run_update_hooks(find_hooks("update", text), 0, params)
        for p in params.values():
            assert p.grad.norm().item() == pytest.approx(norm or 10 * p.numel() ** 0.5, rel=1e-4)
        assert set(noted) == {"clip_by_layer=0.5"}


def test_clip_by_layer_leaves_small_gradients_alone():
    params = gradients(model_of())
    before = {n: p.grad.clone() for n, p in params.items()}
    norms = sorted(g.norm().item() for g in before.values())
    middle = norms[len(norms) // 2]
    noted = run_update_hooks(find_hooks("update", f"clip_by_layer={middle}"), 0, params)
    for n, p in params.items():
        expected = before[n] * min(1, middle / before[n].norm().item())
        torch.testing.assert_close(p.grad, expected)
    share = sum(norm > middle for norm in norms) / len(norms)
    clipped = float(noted[f"clip_by_layer={middle}"]["clipped"])
    assert clipped == pytest.approx(share, abs=1 / len(norms) + 1e-6)


@pytest.mark.parametrize("step, eta", [(0, 0.01), (99, 0.3)])
def test_gradient_noise_has_the_papers_variance(step, eta):
    p = torch.nn.Parameter(torch.zeros(300, 300))
    p.grad = torch.ones(300, 300)
    noted = run_update_hooks(find_hooks("update", f"gradient_noise={eta}"), step, {"p": p})
    std = (eta / (1 + step) ** 0.55) ** 0.5
    assert noted[f"gradient_noise={eta}"]["std"] == pytest.approx(std)
    assert p.grad.std().item() == pytest.approx(std, rel=0.02)
    assert p.grad.mean().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("knobs", [{"activation": "relu2"}, {"activation": "silu", "glu": True}])
def test_activation_stats_are_those_of_the_blocks(knobs):
    model = model_of(**knobs).train()
    idx = torch.randint(17, (2, 8))
    with torch.no_grad():
        mlp = model.blocks[0].mlp
        (mlp.gate_up if model.config.glu else mlp.up).bias[:5] = -1e9 # five units that no token switches on
    kept, units = {}, {}
    handles = []
    for n, block in enumerate(model.blocks):
        handles.append(block.register_forward_hook(lambda m, i, o, n=n: kept.update({n: o})))
        handles.append(block.mlp.down.register_forward_pre_hook(lambda m, i, n=n: units.update({n: i[0]})))
    logits = model(idx, idx)[0]
    for handle in handles:
        handle.remove()
    seen = watch(model, find_hooks("forward", "activation_stats"), idx, idx)["activation_stats"]
    for n, out in kept.items():
        assert float(seen[f"blocks.{n}.mean"]) == pytest.approx(out.mean().item(), abs=1e-6)
        assert float(seen[f"blocks.{n}.std"]) == pytest.approx(out.std().item(), rel=1e-5)
        dead = [all(abs(x) < 1e-6 for x in unit) for unit in units[n].flatten(0, 1).T.tolist()]
        assert float(seen[f"blocks.{n}.mlp.down.dead"]) == pytest.approx(sum(dead) / len(dead))
    assert float(seen["blocks.0.mlp.down.dead"]) > 4.5 / model.config.hidden
    assert torch.equal(logits, model(idx, idx)[0]) and not model.blocks[0]._forward_hooks # nothing stays


@pytest.mark.parametrize("kind, text, said", [
    ("update", "clip", "no update hook 'clip'; there is: identity, clip_by_layer, gradient_noise"),
    ("update", "clip_by_layer=x", "must be a number"),
    ("forward", "identity", "no forward hook 'identity'; there is: activation_stats, stream_stats"),
    ("update", "no/file.py:f", "there is no file 'no/file.py'"),
    ("update", "{d}/h.py:missing", "there is: present")])
def test_a_hook_that_is_not_there_is_refused(kind, text, said, tmp_path):
    (tmp_path / "h.py").write_text("def present(step, params): pass\n", encoding="utf-8")
    with pytest.raises(ValueError, match=said.replace(".", "\\.")):
        find_hooks(kind, text.format(d=tmp_path))
