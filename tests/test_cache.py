"""
A cache of 8 or 4 bits decodes like a full forward whose keys, values and latents are rounded by the formula
that `rounded` below states once more; what it stores takes the bytes that are counted by hand.
"""
import itertools
from unittest import mock

import pytest
import torch

import sample as S
from model import GPT, GPTConfig, Pass, dequantize, quantize

SMALL = dict(vocab_size=29, block_size=16, n_layer=2, n_head=4, n_embd=32)
CHOICES = [dict(attention="mha"), dict(attention="mla"), dict(attention="diff", thought_tokens=2),
           dict(attention="diff_mla", qk_norm=True, conv=4)]
deep = pytest.mark.deep


def build(scale=0.3, **change):
    """Weights so large that every part counts, in fp64, where another order of sums rounds nothing anew."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(**{**SMALL, **change})).double().eval()
    for name, p in model.named_parameters():
        p.data.normal_(std=scale).add_(1 if "norm" in name else 0)
    return model


def rounded(bits):
    """Pass.remember of a forward without a cache: 2^bits - 1 steps from -max to max of each vector."""
    def remember(pass_, layer, *parts):
        steps = [(part.abs().amax(-1, keepdim=True) / (127 if bits == 8 else 7)).bfloat16() for part in parts]
        return tuple((part / step).round() * step for part, step in zip(parts, steps))
    return mock.patch.object(Pass, "remember", remember)


@torch.no_grad()
def in_full(model, idx, bits):
    with rounded(bits):
        return model(idx, idx)[0]


def close(got, want):
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("choice", CHOICES, ids=str)
@torch.no_grad()
def test_decoding_is_the_full_forward_of_rounded_numbers(choice, bits, poisoned):
    model, idx = build(**choice), torch.randint(29, (3, 16))
    want = in_full(model, idx, bits)
    assert 1e-4 < (want - model(idx, idx)[0]).norm() / want.norm() < (0.05 if bits == 8 else 0.5)
    cache = model.new_cache(3, f"int{bits}")
    close(torch.cat([model(piece, cache=cache)[0] for piece in idx.split([7, 1, 1, 4, 3], 1)], 1), want)
    model.cache_dtype = f"int{bits}" # what new_cache takes by itself
    assert model.new_cache(3).nbytes() == cache.nbytes()


@pytest.mark.parametrize("choice", CHOICES[::3], ids=str)
@torch.no_grad()
def test_rows_of_different_lengths_and_rollback(choice):
    model, idx, lengths = build(**choice), torch.randint(29, (3, 12)), torch.tensor([2, 8, 5])
    cache = model.new_cache(3, "int4")
    model(idx[:, :8], cache=cache.rows(slice(0, 3))) # a view stores into the cache
    cache.length = 8
    model((idx[:, 8:] + 1) % 29, cache=cache) # drafts that are thrown away
    cache.truncate(lengths)
    got = model(idx[:, 8:], cache=cache)[0]
    for b, n in enumerate(lengths.tolist()):
        close(got[b], in_full(model, torch.cat([idx[b, :n], idx[b, 8:]])[None], 4)[0, n:])


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_every_way_of_decoding_writes_the_text_of_rounded_numbers(dtype, monkeypatch):
    """Plain, in steps of fixed shape, and with drafts, in a window that moves."""
    monkeypatch.setattr(S.Decoder, "SHORTEST", 4)
    model, idx = build(0.15, attention="diff_mla", n_ahead=3), torch.randint(29, (2, 5))
    exact = model.generate(idx, 24, temperature=0)
    model.cache_dtype = dtype
    want = idx
    for n in range(5, 16): # within the first window there is a full forward to compare with
        want = torch.cat([want, in_full(model, want, int(dtype[3:]))[:, -1:].argmax(-1)], dim=1)
    plain = model.generate(idx, 24, temperature=0)
    assert torch.equal(plain[:, :16], want) and (dtype == "int8" or not torch.equal(plain, exact))
    steps = torch.cat([*S.stream(model, idx, 24, temperature=0, graph=True)], dim=1)
    drafted = model.generate(idx, 24, temperature=0, speculative=True)
    assert torch.equal(plain[:, 5:], steps) and torch.equal(plain, drafted)
    alone = S.DraftingDecoder(model, 1, 0.0).stream(idx[:1], 24)
    assert torch.equal(plain[:1, 5:], torch.cat([*alone], dim=1))


@deep
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_a_step_of_fixed_shape_compiles_without_a_break(choice, monkeypatch):
    monkeypatch.setattr(S.Decoder, "SHORTEST", 8)
    model, idx = build(0.15, **choice), torch.randint(29, (2, 1))
    model.cache_dtype = "int4"
    decoder = S.Decoder(model, 2, temperature=0)
    decoder.run = torch.compile(decoder.step, backend="aot_eager", dynamic=False, fullgraph=True)
    got = torch.cat([*decoder.stream(idx, 20)], dim=1)
    assert torch.equal(got, model.generate(idx, 20, temperature=0)[:, 1:])


@pytest.mark.parametrize("choice", [dict(depths=(1, 2)), dict(memory_slots=3), dict(residual="mhc"),
                                    dict(n_kv_head=1, position="none", head_dim=7)], ids=str)
@torch.no_grad()
def test_extras_read_what_a_cache_of_few_bits_holds(choice):
    """Chunks give what one token at a time gives, and nearly what an exact cache does."""
    model, idx = build(**choice), torch.randint(29, (2, 16))
    caches = [model.new_cache(2, dtype) for dtype in ("int8", "int8", "auto")]
    ways = [16 * [1], [7, 1, 5, 3], [16]]
    ones, chunks, exact = (torch.cat([model(piece, cache=cache)[0] for piece in idx.split(way, 1)], 1)
                           for cache, way in zip(caches, ways))
    close(ones, chunks)
    assert 0 < (ones - exact).norm() < 0.05 * exact.norm()


def test_all_bytes_of_four_bits_come_back():
    """Each byte holds two of 16 codes. quantize stores all but code 0, which would be below -max."""
    step = torch.tensor([0.5]).bfloat16().view(torch.uint8)
    every = torch.arange(256, dtype=torch.uint8)
    numbers = dequantize(torch.cat([every, step]), 4, 512) # 256 low halves, then 256 high ones
    low, high = numbers.view(2, 256) * 2 + 8
    assert torch.equal(low + 16 * high, every.float())
    pairs = torch.tensor([*itertools.product(range(-7, 8), range(-7, 8)), (7, 7), (-7, 7), (7, -7)]).T
    stored = quantize(pairs.flatten().float() / 2, 4) # (456,): two halves of 228, each with a 7
    assert stored.dtype == torch.uint8 and stored.shape == (228 + 2,)
    assert torch.equal(stored[:228], (pairs[0] + 8 + 16 * (pairs[1] + 8)).to(torch.uint8))
    assert torch.equal(dequantize(stored, 4, 456), pairs.flatten().float() / 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits, levels", [(8, 127), (4, 7)])
def test_errors_are_at_most_half_a_step(bits, levels, dtype):
    """For vectors of nearly every size that the type has, of any width, and transposed ones."""
    for width in (1, 2, 3, 5, 28, 64):
        x = torch.randn(width, 3, 200).permute(1, 2, 0).to(dtype)
        sizes = torch.logspace(-40, 36, 200) if dtype != torch.float16 else torch.logspace(-7, 4, 200)
        x = (x.double() * sizes[:, None].double()).clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
        x = x.to(dtype)
        x[0, :3] = 0
        stored = quantize(x, bits)
        assert stored.shape[-1] == 2 * -(-width * bits // 16) + 2 # whole pairs of bytes, and the scale
        got = dequantize(stored, bits, width).double()
        assert got.isfinite().all() and (got[0, :3] == 0).all() and got.shape == x.shape
        step = x.double().abs().amax(-1, keepdim=True) / levels
        # bf16 rounds the scale by up to 1/256, and the smallest scale is 1e-30
        assert ((got - x.double()).abs() <= (step * (1 + 1 / 256)).clamp(min=1.01e-30) * 0.5001).all()
    zeros = quantize(torch.zeros(2, 4, dtype=dtype), bits) # their scale is not 0, by which they are divided
    assert (zeros[:, :-2] == {8: 128, 4: 0x88}[bits]).all()
    broken = torch.tensor([1.0, float("inf")]), torch.tensor([1.0, float("nan")])
    assert not any(dequantize(quantize(x.to(dtype), bits), bits, 2).isfinite().all() for x in broken)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_models_in_half_precision_and_vectors_of_zeros(half):
    """Weights of 0 give keys and values of 0. With depths, places that hold nothing are masked."""
    for choice in (dict(), dict(attention="diff_mla", depths=(1, 2))):
        model, idx = build(**choice).to(half), torch.randint(29, (2, 9))
        for weights in (model.blocks[0].attention.parameters(), ()):
            for p in weights:
                p.zero_()
            cache = model.new_cache(2, "int4")
            logits = torch.cat([model(piece, cache=cache)[0] for piece in idx.split([6, 1, 2], dim=1)], 1)
            assert logits.isfinite().all() and cache.dtype == half


def test_bytes_of_a_cache_of_few_bits():
    """By hand: 2 layers x 3 rows x 18 places, 2 of them thoughts. 8 numbers are 8 or 4 bytes and a scale."""
    places = 2 * 3 * (16 + 2)
    mha, diff_mla = (build(attention=name, thought_tokens=2, **knobs) for name, knobs in
                     (("mha", {}), ("diff_mla", dict(kv_rank=20, head_dim=16, rope_dim=8))))
    assert mha.new_cache(3, "int8").nbytes() == places * 2 * 4 * (8 + 2) # keys and values of 4 heads of 8
    assert mha.new_cache(3, "int4").nbytes() == places * 2 * 4 * (4 + 2)
    assert diff_mla.new_cache(3, "int8").nbytes() == places * (28 + 2)
    assert diff_mla.new_cache(3, "int4").nbytes() == places * 16
    conv = build(conv=4) # four convolutions keep 4 and the last 16 inputs in fp64
    assert conv.new_cache(3, "int4").nbytes() == 2 * 3 * 16 * 2 * 4 * (4 + 2) + 4 * 3 * (4 + 16) * 32 * 8
    memory = build(memory_slots=3) # keys, values, document starts, and slots at 5 segments stay in fp64
    own = 3 * 16 * (2 * 32 + 1) * 8 + 3 * 4 * 5 * 3 * 16 * 8
    assert memory.new_cache(3, "int8").nbytes() == 2 * 3 * 16 * 2 * 4 * (8 + 2) + own
    for wrong in ("int2", "fp16", 8):
        with pytest.raises(ValueError, match="is none of auto, int8, int4"):
            mha.new_cache(1, wrong)
