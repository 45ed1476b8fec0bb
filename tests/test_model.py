"""
The rules that every variant obeys, over a cover of all pairs of choices; refusals, costs, sampling, presets.

A new variant's values go to CHOICES; where it has complaints, a config that hears each goes to REFUSED.
"""
import ast
import inspect
import itertools
import math
import random
import re
import subprocess
import sys
import time
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
import model as M
from conftest import ROOT
from model import GPT, GPTConfig
from sample import Decoder, distribution, stream, window_start
from optim import build_optimizer, declarations

SMALL = dict(vocab_size=29, block_size=16, n_layer=2, n_head=4, n_embd=32)
deep = pytest.mark.deep


# --- the cover: rows of choices in which every legal pair of values occurs ---

# Append new values and new knobs at the end of their line or of the table: all rows that were there stay as
# they are. The first value of a knob is the one that counts where its owner is off.
CHOICES = {
    "norm": ("rmsnorm", "layernorm"),
    "position": ("rope", "learned", "none"),
    "attention": ("mha", "diff_mla", "mla", "diff"),
    "diff_form": ("v2", "v1"),
    "n_kv_head": (0, 2),
    "q_rank": (0, 12),
    "rope_dim": (0, 2),
    "qk_norm": (False, True),
    "activation": ("relu2", "gelu", "gelu_tanh", "silu", "telu", "crrelu"),
    "glu": (False, True),
    "residual": ("plain", "mhc", "hyper"),
    "n_stream": (0, 2),
    "h_res": ("sinkhorn", "permutations"),
    "sinkhorn_iters": (20, 3),
    "zero_init": (False, True),
    "dropout": (0.0, 0.1),
    "bias": (False, True),
    "tie_embeddings": (True, False),
    "logit_softcap": (0.0, 15.0),
    "gradient_checkpointing": (False, True),
    "thought_tokens": (0, 2),
    "memory_slots": (0, 3),
    "memory_segment": (0, 2),
    "document_token": (-1, 7),
    "future_peek": (0, 3),
    "depths": ((), (1, 2)),
    "mean_depth": (0.0, 1.2),
    "n_ahead": (0, 3),
    "uncertainty": (False, True),
    "conv": (0, 4),
    "norm_eps": (0.0, 1e-3),
}
DANGEROUS = [ # what has gone wrong together
    dict(depths=(1, 2), memory_slots=3, document_token=7, thought_tokens=2),
    dict(depths=(1, 2), residual="mhc", gradient_checkpointing=True),
    dict(attention="diff", diff_form="v1", n_kv_head=2),
    dict(future_peek=3, n_ahead=3, uncertainty=True, logit_softcap=15.0),
]


OWNED = set(M.OWNERS) # knobs that count only where some choice is made


def draw(number, choices, wanted):
    """A legal row with the wanted values, or None. The slot, number and wanted decide each other value."""
    luck = {slot: random.Random(f"{number} {wanted} {slot}").random() for slot in choices}
    row = {slot: values[luck[slot] < 0.6] for slot, values in choices.items()} | wanted
    c = object.__new__(GPTConfig) # not checked yet
    c.__dict__.update({f.name: f.default for f in fields(GPTConfig)} | SMALL | row)
    while True: # take back knobs of what the row does not use
        idle = OWNED.difference(*map(M.knobs_of, M.chosen_by(c))) & row.keys()
        if all(row[knob] == choices[knob][0] for knob in idle):
            break
        row |= {knob: choices[knob][0] for knob in idle}
        c.__dict__.update(row)
    legal = wanted.items() <= row.items() and not any(M.complaints(c))
    return row if legal else None


def pairs(row, slot):
    """What a row combines with its value of a slot: the values of the slots before it."""
    return {(row[slot], other, row[other]) for other in itertools.takewhile(slot.__ne__, row)}


def value(row, slot):
    return {row[slot]}


def grow(rows, pool, parts):
    """
    Rows of the pool that have together all parts(row, slot) of the pool which `rows` lack. Greedy, one slot
    after the other: a slot appended to CHOICES adds rows and replaces none.
    """
    new = []
    for slot in pool[0] if pool else ():
        found = [parts(row, slot) for row in pool]
        todo = set().union(*found).difference(*(parts(row, slot) for row in rows + new))
        while todo:
            best = max(range(len(pool)), key=lambda i: len(found[i] & todo))
            new.append(pool[best])
            todo -= found[best]
    return new


def cover(choices):
    """
    -> all rows, and a few of them with each value and each dangerous combination. A pair that no draw shows
    is refused by a rule. The first two values of all slots are combined first. Each further value has rows of
    its own, made from those first two, and one row for each further value of another slot: so it changes no
    other row.
    """
    def pool(count, wanted):
        drawn = (draw(number, choices, wanted) for number in range(count))
        return [row for row in drawn if row]

    first = pool(200, {})
    core, few_core = grow([], first, pairs), grow([], first, value)
    rows, few = core[:], few_core[:]
    further = [(slot, value) for slot, values in choices.items() for value in values[2:]]
    for slot, chosen in further:
        own = pool(50, {slot: chosen})
        rows += grow(core, own, pairs)
        few += grow(few_core, own, value)
    for (slot, chosen), (other, also) in itertools.combinations(further, 2):
        if slot != other:
            rows += pool(20, {slot: chosen, other: also})[:1]
    for wanted in DANGEROUS:
        if not any(wanted.items() <= row.items() for row in few):
            few += pool(50, wanted)[:1]
    return rows + [row for row in few if row not in rows], few


ROWS, FEW = cover(CHOICES)


def label(row):
    """A row's values other than the first of their slot."""
    changed = {slot: chosen for slot, chosen in row.items() if chosen != CHOICES[slot][0]}
    return "-".join(f"{slot}={chosen}" for slot, chosen in changed.items())


every_row = pytest.mark.parametrize("row", [
    pytest.param(row, id=label(row), marks=() if row in FEW else deep) for row in ROWS])


def build(row, scale=0.0, **extra):
    """The model of a row; scale > 0 makes its weights large, so that every part has a say in the result."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(**{**SMALL, **row, **extra}))
    if scale:
        for name, p in model.named_parameters():
            old = p.data.clone() if "residual" in name else 0 # coefficients near 0 would silence the streams
            p.data.normal_(std=scale).add_(old)
    return model


def tokens(model, batch, length):
    return torch.randint(model.config.vocab_size, (batch, length))


def test_the_cover_holds_every_choice():
    for slot, values in CHOICES.items():
        assert {row[slot] for row in FEW} == {row[slot] for row in ROWS} == {*values}
    assert all(any(wanted.items() <= row.items() for row in FEW) for wanted in DANGEROUS)


@pytest.mark.parametrize("slot, new", [
    ("attention", "new"), ("mlp_hidden", 8),
    pytest.param("activation", "new", marks=deep), pytest.param("dropout", 0.2, marks=deep)])
def test_a_new_value_adds_rows_and_changes_none(slot, new, monkeypatch):
    first = GPTConfig.__dataclass_fields__[slot].default
    if slot in M.SLOTS:
        monkeypatch.setitem(M.SLOTS[slot], new, M.SLOTS[slot][first])
    more, more_few = cover({**CHOICES, slot: (*CHOICES.get(slot, (first,)), new)})
    for rows, old in ((more, ROWS), (more_few, FEW)):
        assert any(row[slot] == new for row in rows)
        if slot in CHOICES:
            assert [row for row in rows if row[slot] != new] == old
        else: # a new knob: the old rows, with a value for it
            rest = [{**row} for row in rows]
            assert all(row.pop(slot) in (first, new) for row in rest) and all(row in rest for row in old)


# --- rule 1: causal ---


def gone_on(model):
    """How many tokens each router of a forward let through: a list that a further forward makes longer."""
    counts, deeper = [], M.Pass.deeper

    def watch(router, args):
        pass_ = args[1]

        def noting(order=None, real=None):
            counts.append("all" if order is None else order.size(1))
            return deeper(pass_, order, real)

        pass_.deeper = noting

    for router in model.routers:
        router.register_forward_pre_hook(watch)
    return counts


@every_row
@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
def test_the_future_changes_nothing(row, training):
    """
    Not a bit of it. With depths, the future decides how many tokens are gathered, and a product of another
    shape may round otherwise: equal bits where as many go on, and nearly equal fp64 numbers where not.
    """
    model = build(row, 0.3).train(training)
    model = model.double() if row["depths"] else model
    idx, counts = tokens(model, 2, 16), gone_on(model)

    def run(x):
        del counts[:]
        torch.manual_seed(5) # the same dropout
        return model(x, idx)[0], list(counts)

    (before, went), alike = run(idx), 0
    for shift in range(1, 29):
        other, now = idx.clone(), 9 + (shift - 1) % 7
        other[:, now:] = (other[:, now:] + shift) % model.config.vocab_size
        after, gone = run(other)
        assert not torch.allclose(before[:, now:], after[:, now:])
        if gone == went:
            assert torch.equal(before[:, :now], after[:, :now])
            alike += 1
        elif row["dropout"] == 0 or not training: # else dropout's numbers fall on other tokens
            torch.testing.assert_close(before[:, :now], after[:, :now], atol=1e-11, rtol=1e-11)
        if alike and (not row["depths"] or shift > 8):
            break
    assert alike


@every_row
def test_no_gradient_from_the_future(row):
    model = build(row, 0.3, dropout=0.0)
    seen = []
    model.embed.register_forward_hook(lambda m, i, o: seen.append(o) or o.retain_grad())
    logits, _ = model(tokens(model, 1, 12), torch.zeros(1, 12, dtype=torch.long))
    logits[0, 5].square().sum().backward()
    grad = seen[0].grad[0].abs().sum(-1)
    sees_all = row["attention"] in ("mha", "mla", "diff", "diff_mla") # others may see the nearest tokens only
    assert (grad[6:] == 0).all() and (grad[0 if sees_all else 3 : 6] > 0).all()


# --- rule 2: cached decoding is the full forward ---


CHUNKS = [[7, 1, 1, 4, 3], *(pytest.param(chunks, marks=deep) for chunks in (
    [1] * 16, [3, 3, 3, 3, 3, 1], [16], [7, 1, 8]))]


@every_row
@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
def test_chunks_equal_the_full_forward(row, chunks, poisoned):
    model = build(row, 0.3).double().eval()
    idx = tokens(model, 3, 16)
    full, _ = model(idx, idx)
    cache, out = model.new_cache(3), []
    for piece in idx.split(chunks, dim=1):
        out.append(model(piece, cache=cache)[0])
    assert cache.length == 16
    torch.testing.assert_close(torch.cat(out, 1), full, atol=1e-9, rtol=1e-9)


@every_row
def test_rollback(row):
    model = build(row, 0.3).double().eval()
    idx = tokens(model, 2, 12)
    cache = model.new_cache(2)
    model(idx[:, :8], cache=cache)
    model((idx[:, 8:] + 1) % 29, cache=cache) # a draft that is thrown away
    cache.truncate(8)
    got, want = model(idx[:, 8:], cache=cache)[0], model(idx, idx)[0][:, 8:]
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)
    with pytest.raises(ValueError, match="cannot keep 13 of 12"):
        cache.truncate(13)


@every_row
def test_cache_or_not_the_same_text_past_block_size(row):
    model = build(row, 0.15).double()
    idx = tokens(model, 2, 5)
    cached, plain = (model.generate(idx, 36, temperature=0, use_cache=c) for c in (True, False))
    assert torch.equal(cached, plain) and cached.shape == (2, 41)
    drawn = [model.generate(idx, 5, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*drawn)


def text(model, idx, length, temperature, **how):
    """What stream writes from one seed, (B, length)."""
    generator = torch.Generator(idx.device).manual_seed(1)
    return torch.cat([*stream(model, idx, length, temperature, generator=generator, **how)], dim=1)


@every_row
def test_steps_of_fixed_shape_write_the_same_text(row, monkeypatch):
    """Greedy, and drawn from one seed; S grows, the window moves, a prompt is longer than block_size."""
    monkeypatch.setattr(Decoder, "SHORTEST", 4)
    model = build(row, 0.15).double()
    for temperature, T, length in ((0, 1, 24), (1.0, 20, 12)):
        idx = tokens(model, 2, T)
        how = dict(temperature=temperature, top_k=20, top_p=0.9)
        plain, fixed = (text(model, idx, length, **how, graph=on) for on in (False, True))
        assert torch.equal(plain, fixed) and fixed.shape == (2, length)


def test_steps_of_fixed_shape_read_all_places_they_write_to(monkeypatch):
    """S is a power of two, the smallest that holds the last place, or all places there are."""
    monkeypatch.setattr(Decoder, "SHORTEST", 2)
    decoder = Decoder(build(dict(thought_tokens=2), 0.3).eval(), 1, temperature=0)
    most = decoder.cache.front + decoder.cache.capacity
    for position, count, width in itertools.product(range(decoder.cache.capacity - 6), (1, 2, 3), (1, 2)):
        decoder.launch(lambda: None, position, count, width)
        S, last = decoder.cache.bucket, decoder.cache.front + position + count * width - 1
        assert last < S <= most and (S == most or S & (S - 1) == 0 and S // 2 <= last)


@deep
@pytest.mark.parametrize("attention", CHOICES["attention"])
def test_a_step_of_fixed_shape_compiles_without_a_break(attention, monkeypatch):
    """One graph for each S, in which nothing asks the device for a number."""
    monkeypatch.setattr(Decoder, "SHORTEST", 8)
    model = build({"attention": attention, "qk_norm": True, "thought_tokens": 2}, 0.3).double().eval()
    idx, graphs = tokens(model, 2, 1), []
    torch._dynamo.reset()

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    decoder = Decoder(model, 2, temperature=0)
    decoder.AHEAD, decoder.run = 2, torch.compile(decoder.step, backend=keep, dynamic=False)
    assert torch.equal(torch.cat([*decoder.stream(idx, 30)], 1), text(model, idx, 30, 0))
    assert len(graphs) == 3 # S = 8, 16, and all 18
    assert not any(node.target == "item" for graph in graphs for node in graph.graph.nodes)


@pytest.mark.gpu
@pytest.mark.parametrize("attention, temperature, compile", [
    *itertools.product(CHOICES["attention"], (0, 1.0), (False,)), ("diff_mla", 1.0, True)])
def test_a_graph_on_a_gpu_writes_the_same_text(attention, temperature, compile, monkeypatch):
    """In fp32 the ordinary path's tokens; in bf16 those of the captured steps launched one by one."""
    monkeypatch.setattr(Decoder, "SHORTEST", 8)
    monkeypatch.setattr(Decoder, "OPTIONS", {}) # tuning takes a minute
    torch._dynamo.reset()
    model = build({"attention": attention, "qk_norm": True}, 0.15).cuda()
    idx = tokens(model, 3, 5).cuda()
    plain = text(model, idx, 40, temperature).cpu()
    assert torch.equal(plain, text(model, idx, 40, temperature, graph=True, compile=compile))
    texts, model = [], model.bfloat16()
    for captures in (True, False):
        generator = torch.Generator("cuda").manual_seed(1)
        decoder = Decoder(model, 3, temperature, generator=generator, compile=compile)
        decoder.captures = captures
        texts.append(torch.cat([*decoder.stream(idx, 40)], dim=1))
    assert torch.equal(*texts)


def test_window_moves_by_halves():
    starts = [window_start(n, 16) for n in range(1, 80)]
    assert starts[:16] == [0] * 16 and starts[16] == 8
    lengths = [n - s for n, s in zip(range(1, 80), starts)]
    assert max(lengths) == 16 and min(lengths[16:]) == 9
    assert window_start(1, 1) == 0 and window_start(5, 1) == 4 # block_size 1 sees the last token alone


# --- rule 3: rows are independent, a forward changes nothing ---


@every_row
def test_rows_are_independent_and_nothing_is_written(row):
    model = build(row, 0.3, dropout=0.0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    idx = tokens(model, 3, 10)
    alone, together = model(idx[1:2], idx[1:2])[0], model(idx, idx)[0][1:2]
    torch.testing.assert_close(alone, together, atol=1e-4, rtol=1e-4)
    other = idx.clone()
    other[0] = 0
    slack = 1e-11 if row["depths"] else 0 # the other row decides how many are gathered: roundings differ
    model = model.double() if row["depths"] else model
    torch.testing.assert_close(model(other, idx)[0][1:], model(idx, idx)[0][1:], atol=slack, rtol=0)
    model.generate(idx, 3)
    assert model.training # generate puts the mode back
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# --- rule 4: a sound start ---


@every_row
def test_start(row):
    model = build(row, block_size=64, vocab_size=101)
    idx, targets = tokens(model, 8, 64), torch.randint(101, (8, 64))
    assert abs(model(idx, targets)[1]["ce"].item() - math.log(101)) < 0.1
    first, second = (dict(block.named_parameters()) for block in model.blocks)
    declared = declarations(model)
    for name, p in first.items():
        assert declared[p].role == "vector" or (p == 0).all() or not torch.equal(p, second[name]), name
    opt = build_optimizer(model, "adamw", 1e-2, 0.1, (0.9, 0.95))
    # With zero_init nothing is written to the streams at first: they come apart, and alpha gets a gradient, a
    # step later. With depths one step at this rate may stop all tokens at the first of two.
    steps = 4 if row["depths"] else 3 if row["zero_init"] and row["residual"] != "plain" else 2
    reached = set()
    for _ in range(steps):
        opt.zero_grad()
        sum(model(idx, targets)[1].values()).backward()
        trained = ((name, p) for name, p in model.named_parameters() if p.grad is not None)
        reached.update(name for name, p in trained if p.grad.abs().sum() > 0)
        opt.step()
    assert reached == {name for name, p in model.named_parameters()}


STARTS = [ # of 64 channels, 3 layers: how a name ends; values or their deviation, for n inputs and sublayer i
    (r"embed.weight|table.weight|thoughts.vectors|head.weight", lambda n, i: 0.25 / 64**0.5),
    (r"attention.out.weight|mlp.down.weight|between.\d.body.out.weight", lambda n, i: 1 / (n * 2 * 3) ** 0.5),
    (r"phi.weight|dynamic.weight|(ahead|uncertainty).down.weight|nothing|conv\d.weight|bias",
     lambda n, i: torch.zeros(())),
    (r"norm\w*.weight|post", lambda n, i: torch.ones(())),
    (r"(qkv|up|down|gate)\.weight", lambda n, i: 1 / n**0.5),
    (r"alpha|scale|eps", lambda n, i: torch.tensor(0.01)), # of mhc, hyper and crrelu
    (r"residual\d?.b", lambda n, i: torch.cat([(0.1 + 0.6 * torch.eye(4)[i % 4]).logit(), torch.zeros(4),
                                               3 * torch.eye(4).flatten()])),
    (r"pre", lambda n, i: torch.eye(4)[i % 4]),
    (r"res", lambda n, i: torch.eye(4)),
    (r"maps.vectors", lambda n, i: 0.1),
    (r"slots", lambda n, i: 3.0),
    (r"keep", lambda n, i: math.log(4) + torch.linspace(-1, 4, 16)), # segments have 4 tokens
]


@pytest.mark.parametrize("change", [
    dict(attention="diff_mla", diff_form="v1", q_rank=16, qk_norm=True, activation="crrelu", residual="mhc",
         tie_embeddings=False, thought_tokens=9, memory_slots=16, future_peek=3, depths=(1, 3), n_ahead=3,
         uncertainty=True),
    dict(attention="diff", residual="hyper", glu=True, bias=True, position="learned", conv=4)], ids=str)
def test_first_values_are_those_that_the_docstrings_state(change):
    """Of k numbers the deviation is measured to 1 / sqrt(2 k) of itself, the mean to deviation / sqrt(k)."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(vocab_size=99, block_size=16, n_layer=3, n_head=4, n_embd=64, **change))
    for name, p in model.named_parameters():
        start = next(start for end, start in STARTS if re.search(rf"(^|[._])({end})$", name))
        block, sublayer = re.search(r"(\d)\.", name), re.search(r"residual(\d)", name)
        i = 0 if not block else 2 * int(block[1]) + int(sublayer[1]) - 1 if sublayer else 6 + int(block[1])
        want, k = start(p.size(-1), i), p.numel()
        if torch.is_tensor(want):
            torch.testing.assert_close(p.detach(), want.expand_as(p), msg=name)
        else:
            assert p.std().item() == pytest.approx(want, rel=5 / (2 * k) ** 0.5), name
            assert abs(p.mean().item()) < 5 * want / k**0.5, name


@pytest.mark.parametrize("change", [
    {}, dict(zero_init=True, tie_embeddings=False), pytest.param(dict(attention="diff_mla"), marks=deep),
    pytest.param(dict(norm="layernorm", position="learned"), marks=deep)], ids=str)
def test_start_of_a_wide_model(change):
    torch.manual_seed(1)
    model = GPT(GPTConfig(vocab_size=101, block_size=64, n_layer=8, n_head=8, n_embd=512, **change))
    idx = torch.randint(101, (8, 65))
    with torch.no_grad():
        assert abs(model(idx[:, :-1], idx[:, 1:])[1]["ce"].item() - math.log(101)) < 0.1


@every_row
def test_overfits_one_batch(row):
    model = build(row, dropout=0.0)
    idx = tokens(model, 4, 17)
    opt = build_optimizer(model, "adamw", 1e-2, 0.0, (0.9, 0.95))
    for _ in range(60):
        loss = model(idx[:, :-1], idx[:, 1:])[1]["ce"]
        opt.zero_grad()
        loss.backward()
        opt.step()
        if loss < 0.5 * math.log(29):
            break
    assert loss < 0.5 * math.log(29)


# --- rule 5: the loss ---


def test_loss_is_next_token_cross_entropy_in_nats():
    model = build({}, 0.3)
    idx, targets = tokens(model, 2, 9), tokens(model, 2, 9)
    targets[0, 3:5] = -1
    logits, losses = model(idx, targets)
    p = logits.double().log_softmax(-1)
    places = itertools.product(range(2), range(9))
    by_hand = [-p[b, t, targets[b, t]].item() for b, t in places if targets[b, t] >= 0]
    assert list(losses) == ["ce"]
    assert losses["ce"].item() == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)


def test_the_loss_of_a_cell_without_targets_is_zero():
    model = build({"n_ahead": 2}, 0.3)
    idx, targets = tokens(model, 2, 9), tokens(model, 2, 9)
    targets[:, 1:] = -1 # nothing for the cell to learn from: 0, and no NaN in anybody's gradient
    losses = model(idx, targets)[1]
    sum(losses.values()).backward()
    assert losses["ahead"] == 0
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert list(model.eval()(idx, targets)[1]) == ["ce"] # the rest is for training


def test_a_cell_casts_the_head_once(monkeypatch):
    """However many pieces its loss has, and although the backward of each makes its logits again."""
    casts = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            casts.extend([args[0].shape] if func == torch.ops.aten._to_copy.default else [])
            return func(*args, **(kwargs or {}))

    model = build({"n_ahead": 3}, 0.3)
    idx, cell = tokens(model, 8, 9), model.extras["ahead"]
    monkeypatch.setattr(M, "_AHEAD_LOGITS", cell.depth * 29 * 4) # 4 of the 18 rows in a piece
    h = model.trunk(idx).detach()
    with torch.autocast("cpu", torch.bfloat16):
        with Casts():
            cell.loss(model, h, idx, idx, {}).backward()
    assert casts.count(model.head.weight.shape) == 1


def test_shapes_and_dtypes():
    model = build({})
    idx = tokens(model, 2, 9)
    assert model(idx)[0].shape == (2, 1, 29) and model(idx)[1] == {}
    torch.testing.assert_close(model(idx)[0][:, 0], model(idx, idx)[0][:, -1])
    assert model(idx, idx)[0].dtype == torch.float32
    assert build({}).double()(idx, idx)[0].dtype == torch.float64
    assert build({}).bfloat16()(idx, idx)[0].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert model(idx, idx)[0].dtype == torch.float32
        assert model.new_cache(1).layers[0][0].dtype == torch.float32 # as attention on a CPU reads it
    with pytest.raises(ValueError, match="17 tokens do not fit into block_size=16"):
        model(tokens(model, 1, 17))
    for wrong in (idx[:, :0], idx[0]):
        with pytest.raises(ValueError, match="at least one token"):
            model(wrong)


@every_row
def test_bf16_autocast_is_near(row):
    model = build(row, 0.15, dropout=0.0, gradient_checkpointing=False)
    for router in model.routers: # all tokens go on: a rounding must not decide it
        router.gate.weight.data.zero_()
        router.gate.bias.data.fill_(1.0)
    idx = tokens(model, 2, 16)
    exact = model(idx, idx)[0]
    with torch.autocast("cpu", torch.bfloat16):
        near, losses = model(idx, idx)
    losses["ce"].backward()
    with torch.no_grad(): # what the tolerance must be able to see: tokens that know nothing of each other
        for name, p in model.named_parameters():
            if re.search(r"(attention|body)\.out\.weight|conv\d", name):
                p.zero_()
        apart = model(idx, idx)[0]
    off, blind = ((other - exact).norm() / exact.norm() for other in (near, apart))
    assert off < 0.04 < blind # bf16 keeps 8 bits: 0.4% at each of a dozen roundings


@pytest.mark.parametrize("half", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("norm", ("rmsnorm", "layernorm"))
@pytest.mark.parametrize("change", [
    dict(memory_slots=2, future_peek=3, thought_tokens=2, n_ahead=2, uncertainty=True),
    pytest.param({}, marks=deep), pytest.param(dict(depths=(1, 2)), marks=deep)],
    ids=("extras", "plain", "depths"))
def test_hyper_connections_in_half_precision(change, norm, half):
    """Weights, gradients and cache in half precision; logits in fp32 and near those of fp32 weights."""
    model = build(dict(residual="hyper", norm=norm, **change), 0.15)
    idx = tokens(model, 2, 12)
    exact = model.eval()(idx, idx)[0]
    near, losses = model.to(half).train()(idx, idx)
    sum(losses.values()).backward()
    limit = 1 if change.get("depths") else 0.05 # another token may go on
    assert near.dtype == torch.float32 and (near - exact).norm() / exact.norm() < limit
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    model.generate(idx, 3, generator=torch.Generator().manual_seed(0))


FORMS = [{}, dict(attention="mla"), dict(attention="diff"), dict(attention="diff", diff_form="v1"),
         dict(n_kv_head=2, qk_norm=True), dict(attention="mla", q_rank=12, qk_norm=True),
         dict(attention="diff_mla"), dict(attention="diff_mla", diff_form="v1")]
STREAMS = [{}, dict(residual="mhc"), dict(residual="mhc", n_stream=2),
           dict(residual="mhc", h_res="permutations")]
MLPS = itertools.product(CHOICES["activation"], (False, True))
HALF = [{**form, **streams, "activation": activation, "glu": glu} # each of them at least once
        for (activation, glu), form, streams in zip(MLPS, itertools.cycle(FORMS), itertools.cycle(STREAMS))]
HALF += [dict(thought_tokens=2, memory_slots=3, future_peek=3, n_ahead=3, uncertainty=True, document_token=7),
         dict(residual="hyper")]


@pytest.mark.parametrize("whole", (False, True), ids=("autocast", "weights"))
@pytest.mark.parametrize("change", HALF, ids=str)
def test_half_precision_is_near_and_finite(change, whole):
    """Logits, losses and gradients, under autocast or with bf16 weights, against the same weights in fp32."""
    model = build(change, 0.15).bfloat16().float()
    idx, found = tokens(model, 2, 16), []
    for half in (False, True):
        model = model.bfloat16() if half and whole else model
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half and not whole):
            logits, losses = model(idx, idx)
        sum(losses.values()).backward()
        grads = torch.cat([p.grad.flatten().float() for p in model.parameters()])
        found.append((logits, torch.stack([*losses.values()]), grads))
    for exact, near, roundings in zip(*found, (4, 4, 8), strict=True): # of 2^-8, one after the other
        assert near.isfinite().all() and (near - exact).norm() < roundings * 2**-8 * exact.norm()


RESIDUALS = (dict(residual="plain"), dict(residual="hyper"), dict(residual="mhc"),
             dict(residual="mhc", h_res="permutations"), dict(residual="hyper", n_stream=3))


@pytest.mark.parametrize("residual", [pytest.param(change, marks=() if i == 2 else deep)
                                      for i, change in enumerate(RESIDUALS)], ids=str)
@pytest.mark.parametrize("attention", [
    pytest.param(name, marks=() if name == "diff_mla" else deep) for name in CHOICES["attention"]])
def test_the_model_compiles_without_a_break(attention, residual):
    """The graph that torch.compile sees, real rotations included, computes what the eager model does."""
    model = build({"attention": attention, "qk_norm": True, **residual}, 0.3)
    idx = tokens(model, 2, 16)
    torch._dynamo.reset() # it compiles a forward 8 times at most, and other files' tests have
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=keep, fullgraph=True)
    for _ in range(10): # more than torch.compile would compile again before it gives up
        (ours, loss), (logits, exact) = compiled(idx, idx), model(idx, idx)
        torch.testing.assert_close(ours, logits, atol=1e-4, rtol=1e-4)
    assert len(graphs) == 1
    parameters = list(model.parameters())
    grads = (torch.autograd.grad(found["ce"], parameters) for found in (loss, exact))
    for (name, _), a, b in zip(model.named_parameters(), *grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("attention", CHOICES["attention"])
def test_cached_decoding_under_autocast(attention):
    """On a CPU all but products is fp32, the cache too: no kernel meets two dtypes."""
    model = build({"attention": attention, "qk_norm": True}, 0.15).eval()
    idx = tokens(model, 2, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache, out = model.new_cache(2), []
        for piece in idx.split([5, 3, 1, 7], dim=1):
            out.append(model(piece, cache=cache)[0])
        assert all(store.dtype == torch.float32 for layer in cache.layers for store in layer)
        full = model(idx, idx)[0]
        assert (torch.cat(out, 1) - full).norm() / full.norm() < 0.04


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ("mha", "mla", "diff", "diff_mla"))
def test_training_on_a_gpu_runs_on_a_fused_kernel(attention):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    shape = dict(vocab_size=65, block_size=128, n_layer=2, n_head=4, n_embd=256)
    model = GPT(GPTConfig(**shape, attention=attention, qk_norm=True)).cuda()
    idx = torch.randint(65, (2, 128), device="cuda")
    want = model(idx, idx)[1]["ce"]
    fused = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION])
    with torch.autocast("cuda", torch.bfloat16), fused:
        got = model(idx, idx)[1]["ce"] # raises if neither kernel takes these shapes
    got.backward()
    assert abs(got - want) < 0.02


def test_autocast_gives_one_dtype_with_and_without_gradients():
    linear = M.Linear(8, 6, True, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        kept = linear(torch.randn(2, 8)).dtype
        with torch.no_grad():
            assert linear(torch.randn(2, 8)).dtype == kept == torch.float32 # a GPU keeps bf16


@pytest.mark.parametrize("choice", [
    dict(bias=True), dict(attention="diff_mla"), dict(attention="diff", thought_tokens=2)], ids=str)
def test_rows_of_different_lengths_in_one_cache(choice):
    """Each row equals itself alone, in fp64; and under autocast, where the cache is bf16."""
    model = build(choice, 0.3).double().eval()
    idx, lengths = tokens(model, 3, 12), torch.tensor([2, 8, 5])
    cache = model.new_cache(3)
    with torch.no_grad():
        model(idx[:, :8], cache=cache)
        cache.truncate(lengths)
        got = model(idx[:, 8:], cache=cache)[0]
        for b, n in enumerate(lengths.tolist()):
            alone = torch.cat([idx[b, :n], idx[b, 8:]])[None]
            torch.testing.assert_close(got[b], model(alone, alone)[0][0, n:], atol=1e-9, rtol=1e-9)
        assert cache.length.tolist() == [6, 12, 9]
        with torch.autocast("cpu", torch.bfloat16):
            cache = (model := model.float()).new_cache(3, torch.bfloat16)
            model(idx[:, :8], cache=cache)
            cache.truncate(lengths)
            assert model(idx[:, 8:], cache=cache)[0].isfinite().all()
    with pytest.raises(ValueError, match="cannot keep"):
        cache.truncate(torch.tensor([1, 99, 1]))


def test_gradient_checkpointing_changes_memory_not_numbers():
    found = []
    for on in (False, True):
        model = build({"attention": "diff_mla", "dropout": 0.1}, gradient_checkpointing=on)
        torch.manual_seed(3)
        idx = torch.arange(32).view(2, 16) % 29
        kept, (_, losses) = numbers_kept(model, idx)
        losses["ce"].backward()
        found.append((kept, [losses["ce"].detach(), *(p.grad for p in model.parameters())]))
    (without, plain), (with_, checkpointed) = found
    assert with_ < 0.5 * without
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed))


# --- rule 6: every knob has an effect, or is refused ---

OTHER = dict( # values that differ in their effect from the default: knobs that CHOICES lacks, or has none for
    block_size=8, vocab_size=31, n_layer=3, n_embd=64, rope_base=100.0, n_head=2, head_dim=4, kv_rank=4,
    mlp_hidden=8, init_std=0.1, document_token=2)


def other(knob):
    return OTHER[knob] if knob in OTHER else CHOICES[knob][1]


def numbers_kept(model, idx):
    """How many numbers a forward keeps for backward; what it returns."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        result = model(idx, idx)
    return sum(saved), result


@pytest.mark.parametrize("knob", [f.name for f in fields(GPTConfig)])
def test_every_knob_has_an_effect(knob):
    owner, last = {}, knob
    while last in M.OWNERS: # sinkhorn_iters belongs to h_res=sinkhorn, and h_res to residual=mhc
        last, names = M.OWNERS[last]
        owner[last] = names[0] if names else other(last)
    base = GPTConfig(**{**SMALL, "tie_embeddings": knob != "zero_init", **owner})
    changed = replace(base, **{knob: other(knob)})

    def fingerprint(config):
        torch.manual_seed(2)
        model = GPT(config)
        for name, p in model.named_parameters():
            if name.endswith("bias"): # they start at 0
                p.data.fill_(0.1)
            if "residual" in name or "conv" in name: # equal streams, weights of 0: no difference yet
                p.data.normal_()
        kept, (logits, losses) = numbers_kept(model, torch.arange(8).view(1, 8))
        if knob == "block_size": # only how far back generation looks
            return [model.new_cache(1).capacity]
        found = [logits.sum().item(), logits.square().sum().item(), sum(losses.values()).item()]
        return [*found, kept if knob == "gradient_checkpointing" else 0]

    assert fingerprint(base) == fingerprint(replace(base))
    assert fingerprint(base) != fingerprint(changed)


REFUSED = [ # a config, and a part of what it hears
    (dict(attention="flash"), "attention='flash' is not known; choose one of: mha, mla"),
    (dict(activation="swish"), "relu2, silu, telu, crrelu (swish is silu)"),
    (dict(n_ahead=16), "n_ahead=16 must be below block_size=16"),
    (dict(memory_slots=2, memory_segment=3), "memory_segment=3 must divide half of block_size=16"),
    (dict(memory_segment=4), "memory_segment=4 needs memory_slots"),
    (dict(document_token=4), "document_token=4 needs memory_slots"),
    (dict(memory_slots=-1), "memory_slots=-1 must not be negative"),
    (dict(future_peek=16), "future_peek=16 must be below block_size=16"),
    (dict(depths=(1.5, 2)), "depths=(1.5, 2) must be whole numbers"),
    (dict(memory_slots=2, document_token=29), "document_token=29 must be below vocab_size=29"),
    (dict(depths=(1, 3)), "depths=(1, 3) must rise from at least 1 to n_layer=2"),
    (dict(depths=(2,)), "depths=(2,) must rise"),
    (dict(depths=(0, 2)), "depths=(0, 2) must rise"),
    (dict(depths=(1, 2), mean_depth=2.5), "mean_depth=2.5 must lie between 1 and 2"),
    (dict(mean_depth=1.5), "mean_depth=1.5 needs depths"),
    (dict(conv=4, depths=(1, 2)), "conv=4 reads tokens that depths=(1, 2) stops; set conv=0 or depths=()"),
    (dict(residual="mhc", sinkhorn_iters=0), "sinkhorn_iters=0 must be at least 1"),
    (dict(residual="mhc", h_res="permutations", n_stream=5), "use at most 4"),
    (dict(residual="mhc", h_res="permutations", sinkhorn_iters=3), "sinkhorn_iters=3 needs h_res=sinkhorn"),
    (dict(n_stream=2), "n_stream=2 needs residual=hyper or mhc"),
    (dict(residual="hyper", h_res="permutations"), "h_res=permutations needs residual=mhc"),
    (dict(residual="hyper", sinkhorn_iters=3), "sinkhorn_iters=3 needs residual=mhc"),
    (dict(residual="mhc", n_stream=-1), "n_stream=-1 must not be negative"),
    (dict(vocab_size=0), "vocab_size=0 must be at least 1"),
    (dict(block_size=0), "block_size=0 must be at least 1"),
    (dict(n_layer=0), "n_layer=0 must be at least 1"),
    (dict(n_embd=0), "n_embd=0 must be at least 1"),
    (dict(n_head=0), "n_head=0 must be at least 1"),
    (dict(n_kv_head=-1), "n_kv_head=-1 must not be negative"),
    (dict(logit_softcap=-1.0), "logit_softcap=-1.0 must not be negative"),
    (dict(init_std=-0.1), "init_std=-0.1 must not be negative"),
    (dict(norm_eps=-1e-6), "norm_eps=-1e-06 must not be negative"),
    (dict(dropout=1.0), "dropout=1.0 must be in [0, 1)"),
    (dict(rope_base=1.0), "rope_base=1.0 must be above 1"),
    (dict(n_embd=33), "n_embd=33 is not divisible by n_head=4"),
    (dict(n_kv_head=3), "n_head=4 is not divisible by n_kv_head=3"),
    (dict(attention="mla", n_kv_head=2), "n_kv_head=2 needs attention=mha or diff"),
    (dict(attention="diff", diff_form="v1", n_head=1), "must be even"),
    (dict(attention="diff", diff_form="v1", n_kv_head=1), "must be even"),
    (dict(zero_init=True), "set tie_embeddings=False"),
    (dict(head_dim=7), "rotary width 7 must be even"),
    (dict(attention="mla", rope_dim=3), "rotary width 3 must be even"),
    (dict(attention="mla", rope_dim=8), "rope_dim=8 must leave at least 2"),
    (dict(attention="mla", kv_rank=7), "kv_rank=7"),
    (dict(attention="mla", position="none", n_embd=2, n_head=1), "n_embd=2 leaves no latent of n_embd // 4"),
    (dict(kv_rank=8), "kv_rank=8 needs attention=mla or diff_mla"),
    (dict(q_rank=8), "q_rank=8 needs attention=mla"),
    (dict(rope_dim=8), "rope_dim=8 needs attention=mla"),
    (dict(diff_form="v1"), "diff_form=v1 needs attention=diff"),
    (dict(position="none", rope_base=500.0), "rope_base=500.0 needs position=rope; drop it or change that"),
    (dict(attention="mla", position="learned", rope_dim=4), "rope_dim=4 needs position=rope"),
]
REFUSED += [({slot: "unheard of"}, f"choose one of: {', '.join(map(str, table))}")
            for slot, table in M.SLOTS.items()]


@pytest.mark.parametrize("change, message", REFUSED, ids=str)
def test_refusals_name_the_way_out(change, message):
    with pytest.raises(ValueError) as caught:
        GPTConfig(**{**SMALL, **change})
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("file, typed, dropped", [
    (dict(attention="diff_mla", kv_rank=8, rope_dim=4, diff_form="v1"), dict(attention="mha"),
     {"kv_rank", "rope_dim", "diff_form"}),
    (dict(attention="diff_mla", kv_rank=8, diff_form="v1"), dict(attention="mla"), {"diff_form"}),
    (dict(attention="mha", n_kv_head=2), dict(attention="mla"), {"n_kv_head"}),
    (dict(residual="mhc", sinkhorn_iters=3, n_stream=2), dict(residual="plain"),
     {"sinkhorn_iters", "n_stream"}),
    (dict(residual="mhc", sinkhorn_iters=3, n_stream=2), dict(h_res="permutations"), {"sinkhorn_iters"}),
    (dict(memory_slots=2, memory_segment=4), dict(memory_slots=0), {"memory_segment"}),
    (dict(depths=(1, 2), mean_depth=1.2), dict(depths=()), {"mean_depth"}),
    (dict(rope_base=500.0), dict(position="none"), {"rope_base"}),
], ids=str)
def test_a_files_knobs_go_with_their_owner_aloud(file, typed, dropped, capsys):
    chosen = {**SMALL, **file, **typed}
    left = M.without_orphans(chosen, set(typed))
    GPTConfig(**left)
    said = capsys.readouterr().out
    assert chosen.keys() - left == dropped and all(f"{knob}=" in said for knob in dropped)
    for names in ({*typed, *dropped}, set()): # typed too, or nothing typed: refused as ever
        assert M.without_orphans(chosen, names) == chosen
    assert not capsys.readouterr().out


def test_every_rule_has_a_refusal():
    """Each `yield` of a function called complaints is the first sentence that a config in REFUSED hears."""
    heard = set()
    for change, _ in REFUSED:
        c = object.__new__(GPTConfig)
        c.__dict__.update({f.name: {**SMALL, **change}.get(f.name, f.default) for f in fields(GPTConfig)})
        words = M.complaints(c)
        next(words)
        while words.gi_yieldfrom is not None: # the complaints of one class
            outer, words = words, words.gi_yieldfrom # outer is kept: it would close the inner one
        heard.add(words.gi_frame.f_lineno)
    source = inspect.getsource(M)
    functions = [f for f in ast.walk(ast.parse(source)) if getattr(f, "name", "") == "complaints"]
    yields = {node.lineno for f in functions for node in ast.walk(f) if isinstance(node, ast.Yield)}
    lack_a_row = [source.splitlines()[line - 1].strip() for line in yields - heard]
    assert not lack_a_row


# --- what it costs ---


def test_parameter_counts():
    config = GPTConfig(vocab_size=2048, n_layer=6, n_head=8, n_embd=512, mlp_hidden=1536, activation="silu",
                       glu=True, tie_embeddings=False, block_size=128)
    assert GPT(config).num_params() == 22_551_040
    model = build({"tie_embeddings": True})
    names = [name for name, _ in model.named_parameters()]
    assert len(model.state_dict()) == len(names) + 1 # the tied head, and no module twice


@pytest.fixture
def flops_of(monkeypatch):
    """FLOPs of a call by torch's own counter, which sees plain matrix products alone."""
    from torch.utils.flop_counter import FlopCounterMode
    monkeypatch.setattr(kernels, "KERNEL", "torch")

    def count(call):
        math_only = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with FlopCounterMode(display=False) as counter, math_only:
            call()
        return counter.get_total_flops()

    return count


@pytest.mark.parametrize("change", [
    {}, dict(attention="mla"), dict(attention="diff"), dict(attention="diff_mla"), dict(residual="hyper"),
    dict(residual="mhc"), dict(residual="mhc", h_res="permutations", n_stream=3)], ids=str)
def test_flops_are_the_matrix_multiplications(change, flops_of):
    model = build(change)
    idx = tokens(model, 1, 16)
    assert model.flops_per_token(16) == 3 * flops_of(lambda: model(idx, idx)) / 16


def test_flops_of_depths_are_those_of_the_mean_depth(flops_of):
    model = build({"thought_tokens": 3, "depths": (1, 2)}).eval()
    idx, seen = tokens(model, 1, 16), []
    for bias in (-99, 99): # a mean depth of 1.5: half of the tokens stop, half go on
        model.routers[0].gate.bias.data.fill_(bias)
        seen.append(flops_of(lambda: model(idx, idx)) / 16)
    assert seen[1] > 1.5 * seen[0]
    assert model.flops_per_token(16) == pytest.approx(3 * sum(seen) / 2, rel=0.005)


def test_flops_of_what_learns_beside_the_trunk(flops_of):
    model = build({"n_ahead": 2}, block_size=64) # its i-th guess has i tokens less to be made for
    idx = tokens(model, 4, 64)
    assert model.flops_per_token(64) == pytest.approx(3 * flops_of(lambda: model(idx, idx)) / 256, rel=0.01)
    model = build({"uncertainty": True}, block_size=64, vocab_size=400)
    # its backward leaves the model's head out
    seen = flops_of(lambda: sum(model(idx, idx)[1].values()).backward())
    assert model.flops_per_token(64) == pytest.approx(seen / 256, rel=0.002)


def test_thoughts_are_seen_and_never_counted():
    model = build({"thought_tokens": 3, "attention": "mla"}, 0.3).double()
    idx = tokens(model, 2, 16)
    logits, losses = model(idx, idx)
    assert logits.shape == (2, 16, 29) # a full window of text beside them
    assert losses["ce"].item() == pytest.approx(F.cross_entropy(logits.flatten(0, 1), idx.flatten()).item())
    cache = model.new_cache(2)
    assert cache.nbytes() == 2 * 2 * (16 + 3) * (8 + 4) * 8 # layers, rows, places, latent + rotary key, fp64

    def thoughts():
        return torch.cat([store[:, :, :3].flatten() for layer in cache.layers for store in layer])

    with torch.no_grad():
        model(idx[:, :5], cache=cache)
        held = thoughts()
        model(idx[:, 5:], cache=cache)
    assert torch.equal(held, thoughts())
    model.thoughts.vectors.data += 1
    assert ((model(idx, idx)[0] - logits).abs().amax((0, 2)) > 1e-6).all() # every position sees them


@pytest.mark.parametrize("choice", CHOICES["position"])
def test_a_tokens_place_does_not_depend_on_thoughts(choice):
    position = build({"thought_tokens": 3, "position": choice}).double().position
    q, h = torch.randn(1, 4, 19, 8, dtype=torch.float64), torch.randn(1, 16, 32, dtype=torch.float64)
    (with_, table), (without, plain) = position(h, 0, 3), position(h, 0)
    assert torch.equal(with_, without) and (table is None) == (plain is None)
    if table is not None:
        got, want = M.rotate(q, table)[:, :, 3:], M.rotate(q[:, :, 3:], plain)
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_a_cache_of_another_dtype():
    """A cache in half precision for a model in fp32: half the bytes, nearly the same logits."""
    model = build(dict(thought_tokens=2, memory_slots=3), 0.3).eval()
    pieces = tokens(model, 2, 16).split(4, dim=1)
    caches = [model.new_cache(2, dtype) for dtype in (None, torch.bfloat16)]
    with torch.no_grad():
        exact, near = (torch.cat([model(piece, cache=cache)[0] for piece in pieces], 1) for cache in caches)
    assert caches[1].nbytes() < 0.7 * caches[0].nbytes() and 0 < (near - exact).norm() < 0.02 * exact.norm()


def test_cache_bytes():
    """Numbers per token and layer: 768 for 6 heads of 64, 128 for a latent of 96 with a rotary key of 32."""
    shape = dict(n_layer=2, n_embd=384, n_head=6, head_dim=64, vocab_size=65, block_size=32)
    latent, bytes_of = dict(kv_rank=96, rope_dim=32), {}
    for attention, knobs in dict(mha={}, diff={}, mla=latent, diff_mla=latent).items():
        model = GPT(GPTConfig(**shape, attention=attention, **knobs))
        bytes_of[attention] = model.new_cache(3).nbytes()
    assert bytes_of["mha"] == bytes_of["diff"] == 2 * 3 * 32 * 768 * 4
    assert bytes_of["mha"] / bytes_of["mla"] == bytes_of["mha"] / bytes_of["diff_mla"] == 6.0


@pytest.mark.parametrize("change", [
    {}, dict(n_kv_head=2), dict(attention="mla"),
    dict(attention="diff_mla"), dict(attention="diff_mla", diff_form="v1"),
    *(dict(attention="diff", diff_form=form, n_kv_head=n) for form in ("v1", "v2") for n in (0, 2))], ids=str)
def test_training_runs_on_the_flash_kernel_without_a_mask(change):
    model = build(change)
    idx = tokens(model, 2, 16)
    with torch.profiler.profile() as prof:
        model(idx, idx)[1]["ce"].backward()
    ops = {e.name for e in prof.events()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in ops
    assert not ops & {"aten::_scaled_dot_product_attention_math", "aten::tril", "aten::triu"}


# --- sampling ---


def test_distribution_against_a_loop():
    """Each filter recomputed the slow way, token by token, in Python."""
    random.seed(0)
    for _ in range(50):
        logits = 3 * torch.randn(1, 12, dtype=torch.float64)
        t, k = random.choice([0.5, 1.0, 2.0]), random.choice([0, 1, 5, 12, 99])
        top_p, min_p = random.choice([1.0, 0.9, 0.3]), random.choice([0, 0.1])
        p = [math.exp(z / t) for z in logits[0].tolist()]
        order = sorted(range(12), key=lambda i: -p[i])[: k or 12]
        total, kept, mass = sum(p[i] for i in order), [], 0.0
        for i in order:
            if mass / total >= top_p:
                break
            kept.append(i)
            mass += p[i]
        kept = [i for i in kept if p[i] >= min_p * p[order[0]]]
        want = torch.zeros(1, 12, dtype=torch.float64)
        for i in kept:
            want[0, i] = p[i] / sum(p[j] for j in kept)
        torch.testing.assert_close(distribution(logits, t, k, top_p, min_p), want)
    assert distribution(logits, 0).argmax() == logits.argmax()


@pytest.mark.parametrize("n", [2000, pytest.param(20_000, marks=deep)])
def test_sampling_follows_the_distribution(n):
    model = build({"attention": "diff_mla"}, 0.3)
    idx = tokens(model, 1, 6)
    p = distribution(model.eval()(idx)[0][:, -1], 1.3, top_p=0.9)[0]
    drawn = model.generate(idx.expand(n, -1), 1, temperature=1.3, top_p=0.9)[:, -1]
    share = torch.bincount(drawn, minlength=29) / n
    assert (share[p == 0] == 0).all()
    assert ((share - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-9).all() # five standard errors
    drawn = next(Decoder(model, n, 1.3, top_p=0.9).stream(idx.expand(n, -1), 1))[:, 0]
    share = torch.bincount(drawn, minlength=29) / n
    assert (share[p == 0] == 0).all() and ((share - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-9).all()


def test_stop_tokens():
    model = build({}, 0.3)
    idx = tokens(model, 4, 3)
    plain = model.generate(idx, 12, temperature=0)
    stop = plain[0, 5].item() # row 0 stops at its third new token at the latest
    out = model.generate(idx, 12, temperature=0, stop=(stop,))
    for row, full in zip(out[:, 3:].tolist(), plain[:, 3:].tolist()):
        end = full.index(stop) if stop in full else len(full)
        assert row[:end] == full[:end][: len(row)] and set(row[end:]) <= {stop}
    assert model.generate(idx[:1], 12, temperature=0, stop=(stop,)).size(1) <= 6


@pytest.mark.parametrize("change", [{}, dict(n_ahead=2), dict(depths=(1, 2))], ids=str)
def test_no_rows_write_nothing(change):
    model, none = build(change), torch.zeros(0, 4, dtype=torch.long)
    assert all(model.generate(none, 3, speculative=fast).shape == (0, 4) for fast in (False, True))
    for T in (1, 4): # a single token is attended to in another way
        assert model(none[:, :T], none[:, :T])[0].shape == (0, T, 29)
        assert model(none[:, :T], cache=model.new_cache(0))[0].shape == (0, T, 29)


@pytest.mark.parametrize("bad", [
    dict(temperature=1e-40), dict(temperature=float("nan")), dict(temperature=-1.0), dict(top_k=-1),
    dict(top_p=0.0), dict(top_p=1.5), dict(min_p=1.0)], ids=str)
def test_bad_sampling_values_are_refused(bad):
    model = build({})
    with pytest.raises(ValueError, match=next(iter(bad))):
        model.generate(tokens(model, 1, 3), 1, **bad)


def test_an_empty_prompt_is_refused():
    for fast in (False, True):
        with pytest.raises(ValueError, match="prompt is empty"):
            build({}).generate(torch.zeros(1, 0, dtype=torch.long), 1, speculative=fast)


def test_softcap():
    z = torch.linspace(-500, 500, 1001, dtype=torch.float64, requires_grad=True)
    y = M.softcap(15.0, z)
    assert (y.abs() <= 15).all() and (y.diff() >= 0).all()
    assert torch.autograd.grad(y.sum(), z)[0][500].item() == 1 # slope 1 at 0
    assert F.mse_loss(M.softcap(15.0, z[495:506] / 100), z[495:506] / 100) < 1e-8


# --- presets ---


PARAMETERS = {"nano": 10e6, "micro": 25e6, "tiny": 112e6, "small": 160e6, "medium": 350e6, "large": 760e6,
              "xl": 1.5e9, "xxl": 3e9}


def by_hand(n_layer, n_head, n_embd, vocab_size, **_):
    """A Llama block with as many key as query heads, two gains a block and one at the end; a tied head."""
    hidden = 32 * -(-8 * n_embd // 96) # 8/3 C, up to a multiple of 32
    return vocab_size * n_embd + n_layer * (4 * n_embd**2 + 3 * n_embd * hidden + 2 * n_embd) + n_embd


@pytest.mark.parametrize("name", M.PRESETS)
def test_preset_has_its_size(name):
    """On the meta device, so quickly and without memory; block by block, so a preset is what it says."""
    began = time.monotonic()
    with torch.device("meta"):
        model = GPT(GPTConfig(**M.PRESETS[name]))
    assert time.monotonic() - began < 5
    assert model.num_params() == by_hand(**M.PRESETS[name]) == pytest.approx(PARAMETERS[name], rel=0.05)
    c = model.config
    assert c.head_width % 8 == 0 and c.vocab_size == math.ceil(50000 / 64) * 64 and c.block_size == 512


def test_presets_grow():
    """A larger name is in nothing smaller, and no preset is changed by a model made of it."""
    assert list(M.PRESETS) == list(PARAMETERS)
    sizes = [tuple(p[k] for k in ("n_layer", "n_embd")) for p in M.PRESETS.values()]
    assert all(a <= b and c < d for (a, c), (b, d) in zip(sizes, sizes[1:]))


def test_the_table_of_presets(capsys):
    M.show_presets()
    words = (line.split() for line in capsys.readouterr().out.splitlines())
    rows = {name: rest for name, *rest in words if name in M.PRESETS}
    knobs = "n_layer", "n_head", "n_embd", "block_size"
    want = {name: [*(str(p[knob]) for knob in knobs), f"{by_hand(**p):,}"] for name, p in M.PRESETS.items()}
    assert rows == want


@pytest.mark.parametrize("wrong, near", [("medum", "medium"), ("XXL", "xxl")])
def test_an_unknown_preset_names_the_nearest(wrong, near):
    with pytest.raises(ValueError) as caught:
        M.preset(wrong)
    first, second = str(caught.value).splitlines()
    assert first == f"unknown model_size {wrong!r}"
    assert second.startswith(f"Nearest: {near}") and "nano, micro" in second


def door(*argv, code=0):
    """What `python model.py` with these arguments prints."""
    command = [sys.executable, ROOT / "model.py", *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@deep
def test_the_door_describes_what_is_given(tmp_path):
    """Given fields win over the preset, a file's as well as the line's, wherever model_size stands."""
    (tmp_path / "c.py").write_text("n_layer = 3\nmodel_size = 'nano'\nbatch_size = 4")
    said = door("--vocab_size=640", str(tmp_path / "c.py"), "--n_embd=80", "--model_size=micro")
    shape = {**M.PRESETS["micro"], "n_layer": 3, "n_embd": 80, "vocab_size": 640}
    assert f"{by_hand(**shape):,} parameters" in said
    assert "--model_size" not in said # the table is for those who asked for nothing


@deep
def test_the_door_by_itself_with_a_preset_and_with_a_wrong_one():
    assert "--model_size" in door()
    assert f"{by_hand(**M.PRESETS['xxl']):,} parameters" in door("--model_size=xxl")
    _, first, second = door("--model_size=medum", code=2).splitlines() # after the setting
    assert first == "error: unknown model_size 'medum'" and second.startswith("Nearest: medium")


def test_describe_prints_every_part(capsys):
    for residual in ("hyper", "mhc"):
        M.describe(GPTConfig(**SMALL, residual=residual), 16)
    capsys.readouterr()
    config = GPTConfig(**SMALL, attention="diff_mla", n_ahead=2, thought_tokens=1)
    M.describe(config, 16)
    text = capsys.readouterr().out
    parts = "attention.kv_down", "attention.kv_up", "maps.gate", "mlp.up", "head"
    assert all(part in text for part in (*parts, "(1, 16, 29)", "bytes per token"))
    assert f"{GPT(config).num_params():,} parameters" in text
