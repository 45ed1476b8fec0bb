"""Every attention choice against its definition in loops; the identities that tie the choices together."""
import math

import pytest
import torch

import model as M
from model import GPTConfig

CASES = [("mha", "v2", {}), ("mha", "v2", {"n_kv_head": 2}), ("mha", "v2", {"n_kv_head": 1}),
         ("diff", "v1", {}), ("diff", "v1", {"n_kv_head": 2}),
         ("diff", "v2", {}), ("diff", "v2", {"n_kv_head": 2}),
         ("mla", "v2", {}), ("mla", "v2", {"q_rank": 10}),
         ("diff_mla", "v1", {}), ("diff_mla", "v2", {}), ("diff_mla", "v2", {"q_rank": 10})]
cases = pytest.mark.parametrize("attention, form, knobs", CASES, ids=str)


def make(attention, form, layer=3, scale=0.4, **knobs):
    if "mla" in attention and knobs.get("position") != "none":
        knobs = {"kv_rank": 6, "rope_dim": 4, **knobs}
    shape = dict(vocab_size=11, block_size=32, n_head=4, n_embd=32)
    form = form if "diff" in attention else "v2"
    config = GPTConfig(**{**shape, "attention": attention, "diff_form": form, **knobs})
    heads, maps = M.ATTENTION[attention]
    module = heads(config, layer, maps(config, layer)).double()
    for p in module.parameters():
        p.data.normal_(std=scale)
    return config, module


def run(config, module, x, start=0, cache=None):
    _, table = M.POSITION[config.position](config)(x, start)
    return module(x, M.Pass(x[..., 0], start, table=table, cache=cache))


# --- the definition, one number at a time ---


def rms(v, weight=None, eps=1e-6):
    out = [a / math.sqrt(sum(b * b for b in v) / len(v) + eps) for a in v]
    return out if weight is None else [a * w for a, w in zip(out, weight.tolist())]


def turned(v, m, base=10000.0):
    out = []
    for i in range(0, len(v), 2):
        angle = m * base ** (-i / len(v))
        cos, sin = math.cos(angle), math.sin(angle)
        out += [v[i] * cos - v[i + 1] * sin, v[i] * sin + v[i + 1] * cos]
    return out


def softmax_mix(q, keys, values):
    """One query over a list of keys; a list of values -> one value."""
    scores = [sum(a * b for a, b in zip(q, k)) / math.sqrt(len(q)) for k in keys]
    weights = [math.exp(s - max(scores)) for s in scores]
    return [sum(w * v[i] for w, v in zip(weights, values)) / sum(weights) for i in range(len(values[0]))]


def rows(x, weight, width):
    """x (T, n) -> [t][head][width] of x W^T."""
    return (x @ weight.T).unflatten(-1, (-1, width)).tolist()


def heads_by_loop(c, a, x):
    """Queries, keys and values as nested lists [head][t][D], positions applied, for one sequence x (T, C)."""
    D, T = c.head_width, x.size(0)
    if "mla" not in c.attention:
        q, k, v = a.qkv.weight.split([a.Q * D, a.K * D, a.K * D])
        q, k, v = (rows(x, w, D) for w in (q, k, v))
        q, k = ([[turned(h, t) for h in heads] for t, heads in enumerate(z)] for z in (q, k))
    else:
        low = x
        if c.q_rank:
            low = [rms(r, a.q_latent_norm.weight) for r in (x @ a.q_down.weight.T).tolist()]
            low = torch.tensor(low, dtype=x.dtype)
        N, P, R = a.U, a.P, a.R
        q = [[h[:N] + turned(h[N:], t) for h in heads] for t, heads in enumerate(rows(low, a.q_up.weight, D))]
        down = (x @ a.kv_down.weight.T).tolist()
        latent = torch.tensor([rms(r[:R], a.kv_norm.weight) for r in down], dtype=x.dtype)
        shared = [turned(r[R:], t) for t, r in enumerate(down)]
        kv = rows(latent, a.kv_up.weight, N + D)
        k = [[h[:N] + shared[t] for h in heads] for t, heads in enumerate(kv)]
        v = [[h[N:] for h in heads] for heads in kv]
    return ([[z[t][h] for t in range(T)] for h in range(len(z[0]))] for z in (q, k, v))


def by_loop(c, a, x):
    """The attention of one sequence, from the formulas alone: x (T, C) -> (T, C)."""
    (q, k, v), H, out = heads_by_loop(c, a, x), c.n_head, []
    for t in range(x.size(0)):
        def mix(query, key, value):
            return softmax_mix(q[query][t], k[key][: t + 1], value[: t + 1])

        heads, K = [], len(k)
        if "diff" not in c.attention:
            heads = [mix(h, h * K // H, v[h * K // H]) for h in range(H)]
        elif c.diff_form == "v2":
            lam = (x[t] @ a.maps.gate.weight.T).sigmoid().tolist()
            for h in range(H):
                g = h * K // H
                heads.append([i - lam[h] * j for i, j in zip(mix(2 * h, g, v[g]), mix(2 * h + 1, g, v[g]))])
        else:
            init = 0.8 - 0.6 * math.exp(-0.3 * 3) # layer 3
            q1, k1, q2, k2 = a.maps.vectors.detach()
            lam = math.exp(q1 @ k1) - math.exp(q2 @ k2) + init
            for h in range(H // 2):
                g = h * K // H
                value = [left + right for left, right in zip(v[g], v[g + K // 2])]
                diff = [i - lam * j for i, j in zip(mix(h, g, value), mix(h + H // 2, g + K // 2, value))]
                heads.append([(1 - init) * z for z in rms(diff, eps=1e-5)])
        out.append(sum(heads, []))
    return torch.tensor(out, dtype=x.dtype) @ a.out.weight.T


@cases
def test_forward_is_the_formula(attention, form, knobs):
    c, a = make(attention, form, **knobs)
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    want = torch.stack([by_loop(c, a, row) for row in x])
    torch.testing.assert_close(run(c, a, x), want, atol=1e-10, rtol=1e-8)


@cases
def test_forward_is_the_naive_forms(attention, form, knobs):
    """Those that stand beside the classes in model.py, given the module's own queries, keys and values."""
    c, a = make(attention, form, **knobs)
    x, D = torch.randn(2, 7, 32, dtype=torch.float64), c.head_width
    turn = M.Pass(x[..., 0], table=M.Rope(c)(x, 0)[1]).rotate
    if "mla" in attention:
        q = a.q_up(a.q_latent_norm(a.q_down(x))).unflatten(-1, (-1, D)).transpose(1, 2)
        q = torch.cat([q[..., : a.U], turn(q[..., a.U :])], dim=-1)
        down, w = a.kv_down(x), a.kv_up.weight.unflatten(0, (c.n_head, -1))
        r = turn(down[:, None, :, a.R :])[:, 0]
        k, v = M.naive_latent_keys(a.kv_norm(down[..., : a.R]), r, w[:, : a.U], w[:, a.U :])
    else:
        heads = a.qkv(x).unflatten(-1, (-1, D)).transpose(1, 2)
        q, k, v = heads.split([a.Q, a.K, a.K], dim=1)
        q, k = turn(q), turn(k)
    if "diff" not in attention:
        o = M.naive_attention(q, k, v)
    elif form == "v1":
        q1, k1, q2, k2 = a.maps.vectors
        lam = (q1 @ k1).exp() - (q2 @ k2).exp() + a.maps.lambda_init
        o = M.naive_diff_v1(q, k, v, lam, a.maps.lambda_init)
    else:
        o = M.naive_diff_v2(q, k, v, a.maps.gate(x).sigmoid().transpose(1, 2).unsqueeze(-1))
    torch.testing.assert_close(run(c, a, x), a.out(o.transpose(1, 2).flatten(2)), atol=1e-10, rtol=1e-8)


@cases
def test_gradients(attention, form, knobs):
    c, a = make(attention, form, **knobs)
    x = torch.randn(1, 5, 32, dtype=torch.float64, requires_grad=True)
    names, params = zip(*a.named_parameters())

    def f(x, *params):
        _, table = M.Rope(c)(x, 0)
        return torch.func.functional_call(a, dict(zip(names, params)), (x, M.Pass(x[..., 0], table=table)))

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert torch.autograd.gradcheck(f, (x, *params), fast_mode=True)
    flash = torch.autograd.grad(run(c, a, x).cos().sum(), [x, *params])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        math_ = torch.autograd.grad(run(c, a, x).cos().sum(), [x, *params])
    for got, want in zip(flash, math_):
        torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-7)


# --- the two forms of latent attention ---


@pytest.mark.parametrize("attention, form, knobs", [c for c in CASES if "mla" in c[0]], ids=str)
@pytest.mark.parametrize("chunks", ([1] * 8, [3, 3, 2], [8], [5, 1, 2]), ids=str)
def test_absorbed_is_expanded(attention, form, knobs, chunks, monkeypatch):
    c, a = make(attention, form, **knobs)
    x, results = torch.randn(2, 8, 32, dtype=torch.float64), []
    full = run(c, a, x)
    for absorb in (True, False):
        calls = []
        a.absorbing_pays = lambda T, S: absorb
        for name in ("absorbed", "expanded"):
            form = getattr(a, name)
            monkeypatch.setattr(a, name, lambda *args, n=name, form=form: calls.append(n) or form(*args))
        cache, out = M.Cache([()] * 3 + [a.cache_layout], 2, 8, torch.float64, "cpu"), []
        for piece in x.split(chunks, dim=1):
            out.append(run(c, a, piece, cache.length, cache))
            cache.length += piece.size(1)
        assert set(calls) == {"absorbed" if absorb else "expanded"}
        results.append(torch.cat(out, 1))
    torch.testing.assert_close(results[0], results[1], atol=1e-8, rtol=0)
    torch.testing.assert_close(results[0], full, atol=1e-8, rtol=0)


def test_the_cheaper_form_is_taken():
    _, a = make("diff_mla", "v2", n_embd=384, n_head=6, head_dim=64, kv_rank=96, rope_dim=32)
    assert a.absorbing_pays(1, 256) and a.absorbing_pays(4, 256) # decoding, and judging a short draft
    assert not a.absorbing_pays(256, 256) # training
    assert not a.absorbing_pays(200, 256) # a long prompt behind a short cache


# --- identities (algorithms of sections 1 to 3) ---


def test_v1_without_its_second_map_is_the_first_map():
    c, a = make("diff", "v1")
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    a.maps.finish = lambda o: o
    with torch.no_grad(): # exp(0) - exp(20) + init would be large: make lambda exactly 0 instead
        a.maps.vectors.zero_()
        a.maps.vectors[2:] = math.sqrt(math.log(1 + a.maps.lambda_init) / 8)
    q, k, v = (a.qkv(x).unflatten(-1, (-1, 8)).transpose(1, 2)).split([4, 4, 4], 1)
    turn = M.Pass(x[..., 0], table=M.Rope(c)(x, 0)[1]).rotate
    value = torch.cat(v.chunk(2, 1), -1) # (B, 2, T, 16)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        o = M.attend(turn(q)[:, :2], turn(k)[:, :2], value)
    torch.testing.assert_close(run(c, a, x), a.out(o.transpose(1, 2).flatten(2)), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("form", ("v1", "v2"))
def test_equal_maps_leave_one_minus_lambda(form):
    c, a = make("diff", form)
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    a.maps.finish = lambda o: o
    w = a.qkv.weight.data.unflatten(0, (-1, 8)) # a view: heads of 8 rows
    if form == "v1":
        w[2:4], w[6:8] = w[:2], w[4:6] # second queries and keys
        q1, k1, q2, k2 = a.maps.vectors.detach()
        lam = (q1 @ k1).exp() - (q2 @ k2).exp() + a.maps.lambda_init
        lam = lam.expand(1, 1, 2)
    else:
        w[1:8:2] = w[0:8:2]
        lam = a.maps.gate(x).sigmoid()
    full = run(c, a, x)
    a.maps.combine = lambda o, x: o.chunk(2, 1)[0] if form == "v1" else o[:, ::2]

    def scaled(out, args):
        heads = args[0].unflatten(-1, (lam.size(-1), -1)) # (B, T, output heads, E)
        return ((1 - lam).unsqueeze(-1) * heads).flatten(2)

    a.out.register_forward_pre_hook(scaled)
    torch.testing.assert_close(full, run(c, a, x), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("attention", ("diff", "diff_mla"))
def test_v2_with_lambda_0_is_the_even_heads(attention):
    c, a = make(attention, "v2")
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    plain_c, plain = make("mha" if attention == "diff" else "mla", "v2")
    state = {k: v for k, v in a.state_dict().items() if "maps" not in k}
    name, D = ("qkv.weight", 8) if attention == "diff" else ("q_up.weight", 8)
    w = state[name].unflatten(0, (-1, D))
    state[name] = torch.cat([w[0:8:2], w[8:]]).flatten(0, 1)
    plain.load_state_dict(state)
    a.maps.gate.weight.data.zero_()
    a.maps.gate.register_forward_hook(lambda m, i, o: o - 1e9)
    torch.testing.assert_close(run(c, a, x), run(plain_c, plain, x), atol=1e-12, rtol=1e-9)


def test_v2_pairs_share_a_key_head():
    """Perturbing the key head of one group leaves the output heads of the other alone."""
    c, a = make("diff", "v2", n_kv_head=2)
    x = torch.randn(1, 6, 32, dtype=torch.float64)
    heads = []
    a.out.register_forward_pre_hook(lambda m, i: heads.append(i[0].unflatten(-1, (4, 8))))
    run(c, a, x)
    a.qkv.weight.data[8 * 8 + 8 : 8 * 8 + 16] += 1 # key head 1, behind 8 query heads
    run(c, a, x)
    changed = (heads[0] - heads[1]).abs().amax(dim=(0, 1, 3)) > 1e-9
    assert changed.tolist() == [False, False, True, True]


@pytest.mark.parametrize("latent, dense, form", [
    ("mla", "mha", "v2"), ("diff_mla", "diff", "v1"), ("diff_mla", "diff", "v2")])
def test_full_rank_latent_without_rotation_is_dense(latent, dense, form):
    """R = C, W_down the identity, no norm, no rotary part: keys and values are W_up x, as in DenseHeads."""
    c, a = make(latent, form, position="none", kv_rank=32)
    dense_c, b = make(dense, form, position="none")
    a.kv_norm = torch.nn.Identity()
    a.kv_down.weight.data.copy_(torch.eye(32))
    k, v = a.kv_up.weight.unflatten(0, (4, 16)).split([8, 8], dim=1)
    state = {key: value for key, value in a.state_dict().items() if key.startswith(("maps", "out"))}
    b.load_state_dict({**state, "qkv.weight": torch.cat([a.q_up.weight, k.flatten(0, 1), v.flatten(0, 1)])})
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    torch.testing.assert_close(run(c, a, x), run(dense_c, b, x), atol=1e-12, rtol=1e-9)


@cases
def test_shifting_all_positions_changes_nothing(attention, form, knobs):
    c, a = make(attention, form, **knobs)
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    torch.testing.assert_close(run(c, a, x, start=0), run(c, a, x, start=1000), atol=1e-9, rtol=1e-9)
    hot = make(attention, form, scale=1.0, **knobs)[1] # and order does matter, once scores are large
    assert not torch.allclose(run(c, hot, x).flip(1)[:, 0], run(c, hot, x.flip(1))[:, 0])


def test_rope_keeps_norms():
    c, _ = make("mha", "v2")
    q = torch.randn(1, 2, 9, 8, dtype=torch.float64)
    turn = M.Pass(torch.zeros(1, 9), table=M.Rope(c)(torch.zeros(1, 9, 32, dtype=torch.float64), 3)[1]).rotate
    torch.testing.assert_close(turn(q).norm(dim=-1), q.norm(dim=-1))
    assert turn(q.bfloat16()).dtype == torch.bfloat16


def test_lambda_init_by_depth():
    got = [make("diff", "v1", layer=i)[1].maps.lambda_init for i in range(4)]
    assert got == pytest.approx([0.2, 0.3555, 0.4707, 0.5561], abs=1e-4)


@pytest.mark.parametrize("T, S, K", [(5, 5, 4), (3, 7, 4), (3, 7, 2), (6, 6, 1), (1, 9, 2), (1, 1, 4)])
def test_attend_on_a_cpu_is_the_same_under_autocast(T, S, K):
    """To the bit, with all gradients: bf16 would take longer."""
    inputs = [torch.randn(2, heads, n, 8, requires_grad=True) for heads, n in ((4, T), (K, S), (K, S))]
    want, g = M.attend(*inputs), torch.randn(2, 4, T, 8)
    with torch.autocast("cpu", torch.bfloat16):
        got = M.attend(*inputs)
    assert torch.equal(got, want)
    assert all(map(torch.equal, *(torch.autograd.grad(o, inputs, g) for o in (got, want))))


@pytest.mark.parametrize("T, S, K", [(5, 5, 4), (3, 7, 4), (3, 7, 2), (6, 6, 1), (1, 9, 2), (1, 1, 4)])
def test_attend_is_the_naive_formula(T, S, K):
    """Also query by query: the T queries are the last of the S positions."""
    q, (k, v) = torch.randn(2, 4, T, 8).double(), torch.randn(2, 2, K, S, 8).double()
    got = M.attend(q, k, v)
    torch.testing.assert_close(got, M.naive_attention(q, k, v), atol=1e-12, rtol=1e-9)
    for h in range(4):
        for t in range(T):
            seen = slice(S - T + t + 1)
            p = (q[0, h, t] @ k[0, h * K // 4, seen].T / math.sqrt(8)).softmax(-1)
            torch.testing.assert_close(got[0, h, t], p @ v[0, h * K // 4, seen])
