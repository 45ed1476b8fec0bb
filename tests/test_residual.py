"""Residual streams: they start as the plain network, come apart, and mix as the papers say."""
import pytest
import torch

from kernels import c_library, sinkhorn
from model import GPT, BySinkhorn, GPTConfig, Manifold, Streams, naive_streams
from optim import find_hooks, watch

SMALL = dict(vocab_size=29, block_size=16, n_layer=3, n_head=4, n_embd=32, tie_embeddings=False)
FORMS = [dict(residual="hyper"), dict(residual="mhc"), dict(residual="mhc", h_res="permutations"),
         dict(residual="mhc", n_stream=2), dict(residual="hyper", n_stream=3),
         dict(residual="mhc", sinkhorn_iters=1)]


def model_of(**knobs):
    torch.manual_seed(0)
    return GPT(GPTConfig(**SMALL, **knobs))


def streams_of(model, idx):
    """X after each block, (B, T, N, C)."""
    seen = []
    handles = [b.register_forward_hook(lambda m, i, o: seen.append(o.detach())) for b in model.blocks]
    model(idx)
    for handle in handles:
        handle.remove()
    return seen


def train(model, steps, lr=3e-3):
    opt = torch.optim.Adam(model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        idx = torch.randint(29, (4, 16), generator=generator).sort().values # something to learn
        opt.zero_grad()
        model(idx[:, :-1], idx[:, 1:])[1]["ce"].backward()
        opt.step()


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_start_is_the_plain_network(form, norm):
    plain, model = model_of(norm=norm), model_of(norm=norm, **form)
    model.load_state_dict({**model.state_dict(), **plain.state_dict()})
    idx = torch.randint(29, (2, 16))
    torch.testing.assert_close(plain(idx, idx)[0], model(idx, idx)[0], atol=1e-5, rtol=1e-4)
    shared = {n: p for n, p in plain.named_parameters()}
    assert all(torch.equal(p, shared[n]) for n, p in model_of(norm=norm).named_parameters())


@pytest.mark.deep
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_streams_come_apart_and_every_coefficient_learns(form):
    model = model_of(**form)
    idx = torch.randint(29, (2, 16))
    assert all((x.std(2) < 1e-6).all() for x in streams_of(model, idx)) # copies, before the first step
    start = {n: p.detach().clone() for n, p in model.named_parameters() if "residual" in n}
    train(model, 30)
    apart = [(x - x.mean(2, keepdim=True)).norm() / x.norm() for x in streams_of(model, idx)]
    assert all(a > 1e-3 for a in apart), apart
    moved = {n: (p - start[n]).abs().max() for n, p in model.named_parameters() if n in start}
    assert all(x > 0 for n, x in moved.items()), moved
    for m in model.modules():
        if isinstance(m, Manifold): # each part of the packed projection and bias
            for part in m.b.detach().split(m.widths):
                assert part.numel() and (part - part.round()).abs().max() > 0
            assert all(part.abs().max() > 0 for part in m.phi.weight.detach().split(m.widths))


def coefficients(model, form):
    """Trained and enlarged, so that the token's own part counts: post, res of each sublayer for some X."""
    train(model, 10)
    X = torch.randn(2, 5, model.n_stream, 32)
    for m in model.modules():
        if isinstance(m, Streams):
            for p in m.parameters():
                p.data += 0.5 * torch.randn_like(p)
            yield X, m, m.coefficients(X)


@pytest.mark.parametrize("form", [f for f in FORMS if f["residual"] == "mhc"], ids=str)
def test_manifold_keeps_its_bounds(form):
    for X, m, (pre, post, res) in coefficients(model_of(**form), form):
        assert (0 < pre).all() and (pre < 1).all()
        assert (0 < post).all() and (post < 2).all() and (res >= 0).all()
        # Rows are exact but for epsilon over a sum, which may be small after one iteration.
        slack = 5e-3 if form.get("sinkhorn_iters") == 1 else 1e-5
        torch.testing.assert_close(res.sum(-1), torch.ones(res.shape[:-1]), atol=slack, rtol=0)
        if form.get("h_res"):
            torch.testing.assert_close(res.sum(-2), torch.ones(res.shape[:-1]), atol=1e-5, rtol=0)
        assert res.std((0, 1)).max() > 1e-3 # of the token's own


def test_a_product_of_many_mixings_does_not_grow():
    """The largest row and column sum of a product of doubly stochastic matrices is 1, whatever the depth."""
    torch.manual_seed(0)
    product = torch.eye(4)
    for _ in range(60):
        product = sinkhorn(torch.randn(4, 4), 20) @ product
    assert product.sum(-1).max() < 1.001 and product.sum(-2).max() < 1.03


@pytest.mark.parametrize("form", FORMS[:2], ids=str)
def test_read_and_write_against_loops(form):
    for X, m, (pre, post, res) in coefficients(model_of(**form), form):
        y = torch.randn(2, 5, 32)
        x, mix = m.read(X)
        out = m.write(X, y, mix)
        for b in range(2):
            for t in range(5):
                seen = []

                def sublayer(x):
                    seen.append(x)
                    return y[b, t]

                want = naive_streams(X[b, t], sublayer, pre[b, t], post[b, t], res[b, t])
                torch.testing.assert_close(x[b, t], seen[0])
                torch.testing.assert_close(out[b, t], want)


def test_hyper_connections_against_the_papers_formula():
    """Equations 10 to 14: B = s_b tanh(H W_b) + B0, of normed streams; A_m, A_r alike; H' = B y + A_r^T H."""
    model = model_of(residual="hyper")
    for X, m, (pre, post, res) in coefficients(model, {}):
        W = m.dynamic.weight
        for b in range(2):
            for t in range(5):
                H = torch.nn.functional.rms_norm(X[b, t], (32,), eps=1e-6) * m.norm.weight # (N, C)
                A_m, B = m.pre + m.scale[0] * (H @ W[0]).tanh(), m.post + m.scale[1] * (H @ W[1]).tanh()
                A_r = m.res.T + m.scale[2] * (H @ W[2:].T).tanh()
                torch.testing.assert_close(pre[b, t], A_m, atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(post[b, t], B, atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(res[b, t], A_r.T, atol=1e-5, rtol=1e-4)


def test_against_deepseeks_hyper_connection():
    """transformers' module with our weights, forward and backward; its mixing matrix is not symmetric."""
    pytest.importorskip("transformers", reason="transformers is not installed; it is only an oracle here")
    deepseek = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    from types import SimpleNamespace

    N, C = 4, 32
    config = SimpleNamespace(hc_mult=N, hidden_size=C, rms_norm_eps=1e-6, hc_sinkhorn_iters=20, hc_eps=1e-6)
    theirs = deepseek.DeepseekV4HyperConnection(config)
    ours = Manifold(GPTConfig(**SMALL, residual="mhc"), 1)
    for p in ours.parameters():
        p.data = torch.randn_like(p) * (0.1 if p.dim() == 2 else 1)
    with torch.no_grad(): # their mixing matrix is indexed [in, out]: rows of the projection are reordered
        turned = torch.arange(N * N).view(N, N).T.flatten() + 2 * N
        order = torch.cat([torch.arange(2 * N), turned])
        theirs.fn.copy_(ours.phi.weight[order])
        theirs.base.copy_(ours.b[order])
        theirs.scale.copy_(ours.alpha)
    X = torch.randn(2, 5, N, C)
    a, b = X.clone().requires_grad_(), X.clone().requires_grad_()
    x, (post, res) = ours.read(a)
    post_t, comb, x_t = theirs(b)
    assert (res - res.mT).abs().max() > 0.1
    for got, want in ((x, x_t), (post, post_t), (res, comb.mT)):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    up = [torch.randn_like(v) for v in (x, post, res)]
    sum((u * v).sum() for u, v in zip(up, (x, post, res))).backward()
    sum((u * v).sum() for u, v in zip(up, (x_t, post_t, comb.mT))).backward()
    torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(ours.phi.weight.grad[order], theirs.fn.grad, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(ours.b.grad[order], theirs.base.grad, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(ours.alpha.grad, theirs.scale.grad, atol=1e-3, rtol=1e-3)


def test_stream_stats_are_what_they_say():
    model = model_of(residual="mhc", sinkhorn_iters=2)
    train(model, 10)
    for n, p in model.named_parameters():
        if "residual" in n:
            p.data += torch.randn_like(p)
    idx = torch.randint(29, (2, 16))
    seen = watch(model, find_hooks("forward", "stream_stats"), idx, idx)["stream_stats"]
    mixed, X = [], streams_of(model, idx)
    for m in model.modules():
        if isinstance(m, BySinkhorn):
            m.register_forward_hook(lambda m, i, o: mixed.append(o[2].detach()))
    model(idx)
    assert len(mixed) == 6
    product = torch.eye(4)
    for i, res in enumerate(mixed):
        product = res @ product
        gain = max(product.sum(-1).max(), product.sum(-2).max())
        name = f"blocks.{i // 2}.residual{i % 2 + 1}.mixing"
        assert float(seen[f"{name}.gain"]) == pytest.approx(gain.item(), rel=1e-5)
        column_error = (res.sum(-2) - 1).abs().max().item()
        assert float(seen[f"{name}.column_error"]) == pytest.approx(column_error, rel=1e-3)
        start = sinkhorn(3.0 * torch.eye(4), 2) # before any training
        assert float(seen[f"{name}.moved"]) == pytest.approx((res - start).abs().mean().item(), rel=1e-4)
        assert float(seen[f"{name}.row_error"]) < 1e-3 < float(seen[f"{name}.column_error"])
    for i, x in enumerate(X):
        apart = (x - x.mean(2, keepdim=True)).norm() / x.norm()
        assert float(seen[f"blocks.{i}.apart"]) == pytest.approx(apart.item(), rel=1e-5)


def test_stream_stats_of_depths_begin_anew_where_other_tokens_come():
    """In each stage the composite gain is that of its own mixing matrices, of the tokens that came there."""
    model = GPT(GPTConfig(**{**SMALL, "n_layer": 3}, residual="mhc", sinkhorn_iters=2, depths=(1, 3)))
    for n, p in model.named_parameters():
        p.data += torch.randn_like(p) if "residual" in n else 0
    model.routers[0].gate.weight.data.normal_()
    idx = torch.randint(29, (2, 16))
    mixed = {}
    for name, m in model.named_modules():
        if isinstance(m, BySinkhorn):
            m.register_forward_hook(lambda m, i, o, name=name: mixed.update({name: o[2].detach()}))
    seen = watch(model, find_hooks("forward", "stream_stats"), idx, idx)["stream_stats"]
    shapes = [mixed[f"blocks.{i}.residual1.mixing"].shape[1] for i in range(3)]
    assert shapes[0] == 16 > shapes[1] == shapes[2] > 0
    product = torch.eye(4)
    for name in ("blocks.1.residual1", "blocks.1.residual2", "blocks.2.residual1", "blocks.2.residual2"):
        product = mixed[f"{name}.mixing"] @ product
        gain = max(product.sum(-1).max(), product.sum(-2).max()).item()
        assert float(seen[f"{name}.mixing.gain"]) == pytest.approx(gain, rel=1e-5)


@pytest.mark.skipif(c_library(0) is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.deep
@pytest.mark.parametrize("knobs", [
    dict(residual="hyper"), dict(residual="hyper", n_stream=3, gradient_checkpointing=True),
    dict(residual="mhc", activation="crrelu", glu=True), dict(residual="mhc", h_res="permutations"),
    dict(residual="plain")], ids=str)
def test_compiled_gradients_are_the_eager_ones(knobs):
    """The compiler, given the formulas of hyper-connections, makes others."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, "n_layer": 2}, qk_norm=True, **knobs))
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    idx, found = torch.randint(29, (2, 16)), []
    torch._dynamo.reset()
    for forward in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        forward(idx, idx)[1]["ce"].backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for n, g in found[0].items():
        torch.testing.assert_close(found[1][n], g, atol=1e-4, rtol=1e-2, msg=n)


def test_one_stream_is_a_gated_residual():
    """N = 1: H_res = 1, so X' = X + 2 sigmoid(b) y."""
    m = Manifold(GPTConfig(**SMALL, residual="mhc", n_stream=1), 0)
    m.b.data[1] = 0.7
    X, y = torch.randn(2, 5, 1, 32), torch.randn(2, 5, 32)
    _, mix = m.read(X)
    want = X + 2 * torch.tensor(0.7).sigmoid() * y.unsqueeze(2)
    torch.testing.assert_close(m.write(X, y, mix), want, atol=1e-5, rtol=1e-5)
