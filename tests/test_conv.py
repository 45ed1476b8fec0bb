"""The short convolution: its formula and gradient, and decoding with a state whose size does not grow."""
import pytest
import torch

import kernels
import model as M
from model import GPT, GPTConfig, naive_short_conv
from optim import declarations
from sample import Decoder, DraftingDecoder, Speculation, stream

SMALL = dict(vocab_size=17, block_size=32, n_layer=2, n_head=4, n_embd=32, conv=4)
deep = pytest.mark.deep


def build(**change):
    torch.manual_seed(1)
    model = GPT(GPTConfig(**{**SMALL, **change}))
    for p in model.parameters():
        p.data.normal_(std=0.3)
    return model.double().eval()


@pytest.fixture
def short_ring(monkeypatch):
    """A ring of few tokens, which a window of 32 passes several times."""
    monkeypatch.setattr(M.Cache, "ROLLBACK", 5)


# --- the operation ---


SHAPES = [((2, 9, 5), 4), ((1, 1, 3), 4), ((3, 2, 4), 4), ((2, 3, 4), 3), ((2, 40, 19), 4), ((2, 5, 3), 1),
          ((0, 4, 3), 4), ((3, 7, 16), 7)] # of x, and K


@pytest.mark.parametrize("path", ["c", "torch", "formula"])
@pytest.mark.parametrize("shape, K", SHAPES, ids=str)
def test_it_is_the_naive_formula(shape, K, path, poisoned, monkeypatch):
    """Forward and backward; in fp32, where C runs, to a few roundings of sums of at most B T terms."""
    if path == "c" and kernels.c_library(0) is None:
        pytest.skip("no C compiler")
    monkeypatch.setattr(kernels, "KERNEL", "torch" if path == "formula" else "auto")
    dtype = torch.float32 if path == "c" else torch.float64
    x, w = torch.randn(shape, dtype=torch.float64), torch.randn(K, shape[2], dtype=torch.float64)
    g = torch.randn(shape, dtype=torch.float64)

    def all_of(f, dtype):
        inputs = [t.to(dtype).requires_grad_() for t in (x, w)]
        y = f(*inputs)
        return [y, *torch.autograd.grad(y, inputs, g.to(dtype))]

    def naive(x, w):
        return torch.stack([naive_short_conv(text, w) for text in x]) if len(x) else x * w[0]

    kernels.launches.clear()
    got, want = all_of(kernels.short_conv, dtype), all_of(naive, torch.float64)
    ran = "c" if path == "c" and len(x) else "torch"
    assert {where for _, where in kernels.launches} == {ran}
    slack = dict(atol=1e-4, rtol=1e-5) if path == "c" else dict(atol=1e-12, rtol=1e-12)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, **slack)
    with torch.no_grad(): # without autograd, and of a tensor that is not contiguous
        scattered = x.to(dtype).transpose(0, 1).contiguous().transpose(0, 1)
        torch.testing.assert_close(kernels.short_conv(scattered, w.to(dtype)).double(), want[0], **slack)


@pytest.mark.parametrize("T", (2, 6))
def test_gradcheck(T):
    x, w = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, T, 3), (4, 3)))
    assert torch.autograd.gradcheck(kernels.short_conv, (x, w))


def test_half_precision_is_near():
    x, w, g = torch.randn(4, 32, 24), torch.randn(4, 24), torch.randn(4, 32, 24)
    for half in (torch.bfloat16, torch.float16):
        found = []
        for dtype in (half, torch.float64):
            inputs = [t.to(half).to(dtype).requires_grad_() for t in (x, w)]
            y = kernels.short_conv(*inputs)
            found.append([y, *torch.autograd.grad(y, inputs, g.to(half).to(dtype))])
        for near, exact in zip(*found, strict=True):
            assert near.dtype == half and (near - exact).norm() < 4 * torch.finfo(half).eps * exact.norm()


def test_the_model_at_first_is_the_one_without():
    """Equal logits, because w = 0, from equal weights; the new ones are vectors without weight decay."""
    models = []
    for conv in (0, 4):
        torch.manual_seed(1)
        models.append(GPT(GPTConfig(**{**SMALL, "conv": conv})))
    without, with_ = models
    idx = torch.randint(17, (2, 32))
    assert torch.equal(without(idx, idx)[0], with_(idx, idx)[0])
    new = dict(with_.named_parameters()).keys() - dict(without.named_parameters()).keys()
    assert new == {f"blocks.{i}.conv{j}.weight" for i in range(2) for j in (1, 2)}
    assert all(declarations(with_)[with_.get_parameter(name)].role == "vector" for name in new)
    assert with_.num_params() - without.num_params() == 4 * 4 * 32
    assert with_.flops_per_token(16) - without.flops_per_token(16) == 3 * 4 * 2 * 4 * 32


def test_a_checkpoint_from_before_the_knob_loads():
    model = build(conv=0)
    chosen = {name: value for name, value in vars(model.config).items() if name != "conv"}
    old = GPT.from_state({"config": {"model": chosen}, "model": model.state_dict()}, "old.pt")
    idx = torch.randint(17, (2, 8))
    assert old.config.conv == 0 and torch.equal(old.double()(idx)[0], model(idx)[0])


# --- the cache ---


CHANGES = [{}, dict(thought_tokens=1), dict(thought_tokens=3), dict(thought_tokens=9), dict(conv=1),
           dict(conv=40, thought_tokens=2), dict(memory_slots=2, thought_tokens=2, attention="diff_mla")]


@pytest.mark.deep
@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("rows_differ", (False, True), ids=("one length", "tensor"))
def test_chunks_and_rollbacks_past_the_ring(change, rows_differ, short_ring):
    """Chunks of random sizes, also longer than the ring; up to ROLLBACK tokens that are thrown away."""
    model, generator = build(**change), torch.Generator().manual_seed(3)
    if rows_differ and model.memory is not None:
        pytest.skip("covered by rows of different lengths")
    idx = torch.randint(17, (3, 32))

    def random(most):
        return int(torch.randint(1, most + 1, (), generator=generator))

    with torch.no_grad():
        full = model(idx, idx)[0]
        for most in (1, 3, 32):
            cache, n = model.new_cache(3), 0
            while n < 32:
                draft = min(random(cache.ROLLBACK), 32 - n)
                model(idx[:, n : n + draft].flip(1), cache=cache)
                cache.truncate(torch.full((3,), n) if rows_differ else n)
                T = min(random(most), 32 - n)
                got = model(idx[:, n : n + T], cache=cache)[0]
                torch.testing.assert_close(got, full[:, n : n + T], atol=1e-9, rtol=1e-9)
                n += T
            back = 32 if cache.ring == 32 else cache.ring + 1 - cache.taps
            cache.truncate(32 - back)
            torch.testing.assert_close(model(idx[:, 32 - back :], cache=cache)[0], full[:, 32 - back :],
                                       atol=1e-9, rtol=1e-9)
            cache.truncate(0)
            torch.testing.assert_close(model(idx, cache=cache)[0], full, atol=1e-9, rtol=1e-9)


def test_what_is_forgotten_is_refused(short_ring):
    model, idx = build(), torch.randint(17, (2, 32))
    cache = model.new_cache(2)
    model(idx[:, :20], cache=cache)
    cache.truncate(17)
    model(idx[:, :1], cache=cache)
    for lost in (14, 1, torch.tensor([18, 14])): # the ring was last written for 20 tokens
        with pytest.raises(ValueError, match="truncate"):
            cache.truncate(lost)
    cache.truncate(torch.tensor([15, 0]))
    cache.truncate(0)
    model(idx[:, :9], cache=cache) # a new text: the old one's length is forgotten
    cache.truncate(4)
    cache = build(conv=0).new_cache(2)
    cache.length = 32
    cache.truncate(1)


def test_rows_of_different_lengths(short_ring):
    model, idx, lengths = build(thought_tokens=2), torch.randint(17, (4, 32)), torch.tensor([15, 20, 18, 0])
    cache = model.new_cache(4)
    with torch.no_grad():
        model(idx[:, :20], cache=cache)
        cache.truncate(lengths)
        pieces = [model(piece, cache=cache)[0] for piece in idx[:, 20:].split([1, 2, 9], dim=1)]
        for b, n in enumerate(lengths.tolist()):
            alone = torch.cat([idx[b, :n], idx[b, 20:]])[None]
            got, want = torch.cat(pieces, 1)[b], model(alone, alone)[0][0, n:]
            torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)


def test_the_state_does_not_grow_with_the_text():
    sizes = {L: [build(conv=K, block_size=L).new_cache(2) for K in (4, 0)] for L in (256, 512)}
    for with_, without in sizes.values():
        # convolutions, rows, slots, C, fp64
        assert with_.nbytes() - without.nbytes() == 4 * 2 * (4 + 3 + 16) * 32 * 8
    view = with_.rows(slice(1, 2))
    view.recent.fill_(1)
    assert (with_.recent[:, 1] == 1).all() and (with_.recent[:, 0] == 0).all()


# --- all ways to write a text ---


@pytest.mark.parametrize("change", [
    dict(thought_tokens=2), pytest.param(dict(attention="diff_mla"), marks=deep)], ids=str)
def test_every_way_writes_the_same_text(change, short_ring, monkeypatch):
    """Past the window, with a ring of 10; greedy, and drawn from one seed where that is defined."""
    monkeypatch.setattr(Decoder, "SHORTEST", 4)
    model = build(n_ahead=2, block_size=16, **change)
    for T, temperature in ((1, 0), (20, 1.0)):
        idx, texts = torch.randint(17, (2, T)), []
        for how in (dict(use_cache=False), {}, dict(graph=True)):
            generator = torch.Generator().manual_seed(1)
            texts.append(torch.cat([*stream(model, idx, 30, temperature, generator=generator, **how)], 1))
        assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])
        if temperature == 0:
            for draft in ("ahead", "ngram"):
                writer = Speculation(model, idx, 0, draft=draft)
                assert torch.equal(writer.generate(30)[:, T:], texts[0]) and writer.drafted
            drafting = torch.cat([*DraftingDecoder(model, 1, 0.0).stream(idx[:1], 30)], 1)
            assert torch.equal(drafting, texts[0][:1])


def test_the_state_after_each_step_of_speculation(short_ring, poisoned):
    """Rows at their own paces: the trunk's output is that of a full forward."""
    model = build(n_ahead=3, thought_tokens=1)
    writer, paces = Speculation(model, torch.randint(17, (4, 5))), set()
    for _ in range(40):
        writer.step()
        for b, (row, start) in enumerate(zip(writer.rows, writer.starts)):
            full = model.trunk(torch.tensor([row[start:-1]]))[0, -1]
            torch.testing.assert_close(writer.h[b], full, atol=1e-9, rtol=1e-9)
        paces.add(len({len(row) for row in writer.rows}))
    assert max(paces) > 1


@deep
def test_training_and_a_step_of_fixed_shape_compile_without_a_break(monkeypatch, short_ring):
    """Nothing asks the device for a number, and S alone decides how many graphs there are."""
    monkeypatch.setattr(Decoder, "SHORTEST", 8)
    model, graphs = build(thought_tokens=2, block_size=16), []
    idx = torch.randint(17, (2, 16))

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    ours = torch.compile(model, backend=keep, fullgraph=True)(idx, idx)[0]
    torch.testing.assert_close(ours, model(idx, idx)[0], atol=1e-9, rtol=1e-9)
    assert len(graphs) == 1
    graphs.clear()
    decoder = Decoder(model, 2, temperature=0)
    decoder.AHEAD, decoder.run = 2, torch.compile(decoder.step, backend=keep, dynamic=False)
    text = torch.cat([*stream(model, idx[:, :1], 30, 0)], dim=1)
    assert torch.equal(torch.cat([*decoder.stream(idx[:, :1], 30)], 1), text)
    assert len(graphs) == 3 # S = 8, 16, and all 18
    assert not any(node.target == "item" for graph in graphs for node in graph.graph.nodes)


@pytest.mark.gpu
def test_a_graph_on_a_gpu_writes_the_same_text(monkeypatch, short_ring):
    monkeypatch.setattr(Decoder, "SHORTEST", 8)
    model, idx = build(thought_tokens=2, n_ahead=2).float().cuda(), torch.randint(17, (1, 5)).cuda()
    plain = torch.cat([*stream(model, idx, 60, 0)], 1).cpu()
    assert torch.equal(plain, torch.cat([*stream(model, idx, 60, 0, graph=True)], 1))
    assert torch.equal(plain, torch.cat([*DraftingDecoder(model, 1, 0.0).stream(idx, 60)], 1))
