"""Memory, future peek and depth routing, each against the slow way to say the same thing."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import model as M
from model import GPT, GPTConfig
from optim import build_optimizer

SMALL = dict(vocab_size=29, block_size=16, n_layer=4, n_head=2, n_embd=16)
deep = pytest.mark.deep
KNOBS = dict(thought_tokens=2, memory_slots=3, future_peek=4, depths=(1, 2, 4), n_ahead=2, uncertainty=True)


def build(scale=0.3, **change):
    torch.manual_seed(1)
    model = GPT(GPTConfig(**{**SMALL, **change})).double()
    for name, p in model.named_parameters():
        p.data.normal_(std=scale)
    return model


def tokens(batch, length, vocab=29):
    return torch.randint(vocab, (batch, length))


# --- memory ---


def memory_by_loop(memory, x, idx):
    """One row x (T, C): slot by slot, token by token."""
    H, D, S = memory.H, memory.D, memory.G
    q, k, v = (t.view(len(x), H, D) for t in memory.qkv(x).chunk(3, dim=-1))
    keys, values = torch.zeros(2, H, memory.M, D, dtype=x.dtype)
    out, unit = [], lambda a: F.rms_norm(a, (D,), eps=1e-6)
    for t in range(len(x)):
        here = range(t // S * S, t + 1)
        y = []
        for h in range(H):
            scores = [memory.nothing[h, 0] @ q[t, h] / math.sqrt(D)]
            if not any(idx[i] == memory.document for i in here): # else the memory is of another document
                scores += [unit(keys[h, m]) @ q[t, h] / math.sqrt(D) for m in range(memory.M)]
            w = torch.stack(scores).softmax(0)
            y.append(sum((w[1 + m] * unit(values[h, m]) for m in range(len(w) - 1)), 0 * q[t, h]))
        out.append(torch.cat(y))
        if (t + 1) % S:
            continue
        # Only what belongs to the last document is written.
        last = max((i for i in here if idx[i] == memory.document), default=None)
        new_keys, new_values = torch.zeros_like(keys), torch.zeros_like(values)
        for h in range(H):
            for m in range(memory.M):
                taken = [i for i in here if last is None or i >= last]
                scores = [memory.slots[h, m] @ k[i, h] / math.sqrt(D) for i in taken]
                w = torch.stack([memory.keep[h, m]] * (last is None) + scores).softmax(0)
                old = w[0] if last is None else 0.0
                w = w[1:] if last is None else w
                new_keys[h, m] = old * keys[h, m] + sum(a * k[i, h] for a, i in zip(w, taken))
                new_values[h, m] = old * values[h, m] + sum(a * v[i, h] for a, i in zip(w, taken))
        keys, values = new_keys, new_values
    return memory.out(torch.stack(out))


def test_memory_against_a_loop():
    memory = build(memory_slots=3, memory_segment=4, document_token=5).memory
    x, idx = torch.randn(2, 32, 16, dtype=torch.float64), tokens(2, 32)
    idx[0][idx[0] == 5] = 6 # one document
    idx[1, [3, 9, 10, 16, 23]] = 5
    folded = x.reshape(4, 16, 16) # two windows of each row
    with torch.no_grad():
        got = memory(folded, M.Pass(idx, windows=2)).reshape(2, 32, 16)
        for b in range(2):
            torch.testing.assert_close(got[b], memory_by_loop(memory, x[b], idx[b]), atol=1e-11, rtol=1e-11)
    assert (got[:, :4] == 0).all() # the first segment has nothing to read


def test_a_segment_is_the_naive_formula():
    memory = build(memory_slots=3, memory_segment=4).memory
    k, v, idx = torch.randn(1, 2, 12, 8).double(), torch.randn(1, 2, 12, 8).double(), tokens(1, 12)
    with torch.no_grad():
        _, held = memory.fill(k, v, torch.zeros(1, 12).double(), M.Pass(idx))
        for h in range(2):
            want = torch.zeros(3, 16, dtype=torch.float64)
            for n in range(3):
                part = slice(4 * n, 4 * n + 4)
                want = M.naive_memory(memory.slots[h], memory.keep[h], k[0, h, part], v[0, h, part], want)
                torch.testing.assert_close(held[0, h, n + 1], want)


@pytest.mark.parametrize("change", [
    {}, dict(attention="diff_mla", residual="mhc", thought_tokens=2, depths=(2, 4))], ids=str)
def test_windows_at_once_are_windows_one_by_one(change):
    model = build(memory_slots=3, document_token=5, **change).eval()
    idx = tokens(2, 41)
    full, losses = model(idx, idx)
    want = F.cross_entropy(full.flatten(0, 1), idx.flatten()).item()
    assert full.shape == (2, 41, 29) and losses["ce"].item() == pytest.approx(want)
    cache, out = model.new_cache(2), []
    with torch.no_grad():
        for window in idx.split(16, dim=1):
            pieces = window.split([1, 5, 10] if window.size(1) == 16 else 9, dim=1)
            out += [model(piece, cache=cache)[0] for piece in pieces]
            cache.slide(window.size(1) // 4 * 4)
    torch.testing.assert_close(torch.cat(out, 1), full, atol=1e-9, rtol=1e-9)


def test_memory_reaches_back_over_windows_and_not_over_documents():
    model = build(memory_slots=3, document_token=28, future_peek=3)
    idx = tokens(1, 64, vocab=28)
    seen = []
    model.embed.register_forward_hook(lambda m, i, o: seen.append(o) or o.retain_grad())
    for document in (False, True):
        if document:
            idx[0, 35] = 28 # in the third window, the first token of its first segment but three
        seen.clear()
        model(idx, idx)[0][0, 50].square().sum().backward()
        grad = seen[0].grad.flatten(0, 1)[:64].abs().sum(-1)
        assert (grad[51:] == 0).all() and (grad[48:51] > 0).all() # its own window
        assert (grad[35:48] > 0).all() # what memory brings, from three windows back
        assert (grad[:32] > 0).all().item() is not document
    for at in (3, 20, 37, 63): # one token later in the text changes nothing before it, windows or not
        other = idx.clone()
        other[0, at] = (other[0, at] + 1) % 28
        a, b = model(idx, idx)[0], model(other, idx)[0]
        assert torch.equal(a[:, :at], b[:, :at]) and not torch.equal(a[:, at:], b[:, at:])
    grads = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert not {name for name in grads if "between.0" in name}


@pytest.mark.parametrize("change", [
    dict(document_token=5), pytest.param({}, marks=deep),
    pytest.param(dict(thought_tokens=2, depths=(1, 2, 4), residual="hyper"), marks=deep)], ids=str)
@pytest.mark.parametrize("prompt, length", [
    (50, 24), pytest.param(5, 60, marks=deep), pytest.param(50, 60, marks=deep)])
def test_memory_is_carried_on_in_generation(change, prompt, length):
    """Past block_size, rows at their own pace: all ways write one text, and memory changes it."""
    model = build(memory_slots=3, **change)
    idx = tokens(3, prompt)
    cached = model.generate(idx, length, temperature=0)
    assert torch.equal(cached, model.generate(idx, length, temperature=0, use_cache=False))
    assert torch.equal(cached, model.generate(idx, length, temperature=0, speculative=True))
    model.memory.out.weight.data.zero_()
    assert not torch.equal(cached, model.generate(idx, length, temperature=0))


def test_slots_differ_and_stay_so():
    model = GPT(GPTConfig(**SMALL, memory_slots=4))
    opt = build_optimizer(model, "adamw", 1e-2, 0.1, (0.9, 0.95))
    for _ in range(20):
        idx = tokens(4, 33)
        opt.zero_grad()
        model(idx[:, :-1], idx[:, 1:])[1]["ce"].backward()
        opt.step()
    cache = model.new_cache(1)
    with torch.no_grad():
        model(tokens(1, 16), cache=cache)
    slots = F.normalize(cache.memory[0, :, 4], dim=-1) # (H, M, 2 D) after four segments
    assert (slots @ slots.mT).mean() < 0.9 # two may hold the same, all of them never do


# --- future peek ---


def test_peek_predicts_the_mean_of_what_comes():
    model = build(future_peek=3)
    model.between[0].body.down.weight.data *= 10 # as large as what it predicts: else the loss is always 1
    idx, targets = tokens(2, 12), tokens(2, 12)
    targets[0, 7:10] = -1
    notes = {}
    model.trunk(idx, notes=notes)
    off = size = 0.0
    for b in range(2):
        for t in range(12):
            coming = [i for i in targets[b, t : t + 3].tolist() if i >= 0]
            if coming:
                mean = F.rms_norm(model.embed.weight[coming], (16,)).mean(0)
                off += (notes["peek"][b, t] - mean).square().sum().item()
                size += mean.square().sum().item()
    loss = model(idx, targets)[1]["peek"]
    assert loss.item() == pytest.approx(off / size, rel=1e-9) and 0.1 < abs(loss.item() - 1)
    loss.backward()
    assert model.head.weight.grad is None or model.config.tie_embeddings
    peek = model.between[0].body
    # Its own loss trains the prediction and not its use; the text's loss the use and not the prediction.
    assert peek.down.weight.grad.abs().sum() > 0 and peek.out.weight.grad is None
    model.zero_grad()
    model(idx, targets)[1]["ce"].backward()
    assert peek.out.weight.grad.abs().sum() > 0 and peek.down.weight.grad is None


def test_what_really_came_gets_no_gradient():
    model = build(future_peek=3, tie_embeddings=False)
    idx, targets = torch.full((1, 8), 3), torch.full((1, 8), 4)
    model(idx, targets)[1]["peek"].backward()
    grad = model.embed.weight.grad.abs().sum(-1)
    assert grad[3] > 0 and grad[4] == 0


# --- depths ---


def densely(model, idx):
    """All layers for all tokens; a mask hides those that stopped -> (B, T, C), layers a token (B, T)."""
    (B, T), depth = idx.shape, torch.zeros(idx.shape)
    h, table = model.position(model.embed(idx), 0)

    def through(h, stage, there): # there (B, T): who is in this stage
        pass_ = M.Pass(idx, table=table)
        causal, own = torch.ones(T, T).tril().bool(), torch.eye(T, dtype=torch.bool)
        pass_.mask = (there[:, None] & causal | own)[:, None]
        for layer in model.stages[stage]:
            depth.add_(there if isinstance(layer, M.Block) else 0)
            h = layer(h, pass_)
        if stage == len(model.routers):
            return h
        router = model.routers[stage]
        score = router.gate(router.norm(router.reduce(h))).squeeze(-1)
        on = there & (score > 0)
        share = torch.where(on, score.sigmoid(), 0).view(B, T, *[1] * (h.dim() - 2))
        return h + share * (through(h, stage + 1, on) - h)

    h = through(model.streams.expand(h, model.n_stream), 0, torch.ones(B, T, dtype=torch.bool))
    return model.norm(model.streams.reduce(h)), depth


@pytest.mark.parametrize("change", [
    {}, dict(attention="diff_mla", residual="mhc"),
    dict(position="learned", memory_slots=2, attention="diff")], ids=str)
@pytest.mark.parametrize("depths", ((2, 4), (1, 2, 4)), ids=str)
def test_gathered_tokens_equal_a_mask(change, depths):
    """Also what is not computed: a layer sees as many places as the row with the most tokens has."""
    model, idx, notes, seen = build(depths=depths, **change).eval(), tokens(3, 16), {}, {}

    def shift(gate, args, score): # about half go on: weights this large would send all tokens one way
        gate.bias.data -= score.quantile(0.4)

    for router in model.routers:
        router.gate.bias.data.zero_()
        handle = router.gate.register_forward_hook(shift)
        model.trunk(idx)
        handle.remove()
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda m, args, i=i: seen.__setitem__(i, args[0].size(1)))
    with torch.no_grad():
        h = model.trunk(idx, notes=notes)
        widths = dict(seen)
        want, depth = densely(model, idx)
    torch.testing.assert_close(h, want, atol=1e-9, rtol=1e-9)
    assert notes["depth"].item() == pytest.approx(depth.mean().item())
    assert 1 < len(set(depth.flatten().tolist())) # some went on, some did not
    ends = [next(d for d in depths if i < d) for i in range(4)]
    assert all(widths[i] == max((row >= ends[i]).sum().item() for row in depth) for i in widths)


def test_cache_holds_only_those_that_went_on():
    """Each at the place of its position; no other place counts. Other tokens may come after a rollback."""
    model = build(depths=(1, 2, 4), thought_tokens=2).eval()
    idx, other = tokens(3, 16), tokens(3, 4)
    cache, notes = model.new_cache(3), {}
    with torch.no_grad():
        for piece in idx[:, :12].split([5, 1, 6], dim=1):
            model.trunk(piece, cache)
        text = cache.alive[:, :, 2:14]
        assert cache.alive[:, :, :2].all() and not cache.alive[:, :, 14:].any() # thoughts come to all stages
        assert not (text[1] & ~text[0]).any() and 0 < text.sum() < text.numel()
        assert (cache.layers[1][0][:, :, 2:14].abs().sum((1, 3))[text[0]] > 0).all()
        model.trunk(idx[:, :12], notes=notes)
        shares = text.double().mean((1, 2))
        assert notes["depth"].item() == pytest.approx(1 + shares[0].item() + 2 * shares[1].item())
        ends = [model.trunk(idx[:, 12:], cache)]
        cache.truncate(12)
        model.trunk(other, cache) # others go on than did before
        cache.truncate(torch.tensor([12, 12, 12]))
        ends += [model.trunk(idx[:, 12:14], cache), model.trunk(idx[:, 14:], cache)]
    torch.testing.assert_close(torch.cat(ends[1:], 1), ends[0], atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("seeds", [range(2), pytest.param(range(2, 10), marks=deep)], ids=str)
@pytest.mark.parametrize("chunks", ([6, 4, 6], [1] * 16, [15, 1]), ids=str)
def test_many_stages_of_a_single_row(chunks, seeds):
    """Some chunks go on as a whole, which takes a way of its own."""
    for seed in seeds:
        torch.manual_seed(seed)
        model = GPT(GPTConfig(**SMALL, depths=(1, 2, 3, 4))).double().eval()
        for router in model.routers:
            router.gate.weight.data.normal_()
        idx, cache = tokens(1, 16), model.new_cache(1)
        with torch.no_grad():
            got = torch.cat([model.trunk(piece, cache) for piece in idx.split(chunks, dim=1)], dim=1)
            torch.testing.assert_close(got, model.trunk(idx), atol=1e-9, rtol=1e-9)
        plain, fast = (model.generate(idx, 30, temperature=0, speculative=fast) for fast in (False, True))
        assert torch.equal(plain, fast)


def test_nothing_kept_of_some_rows_is_nothing_read():
    model = build(thought_tokens=2).eval()
    idx, cache = tokens(2, 6), None
    with torch.no_grad():
        cache = model.new_cache(2)
        model.trunk(idx, cache)
        cache.truncate(torch.tensor([0, 0]))
        torch.testing.assert_close(model.trunk(idx, cache), model.trunk(idx), atol=1e-9, rtol=1e-9)
        cache = model.new_cache(2) # of nothing at all: the thoughts are not there yet
        cache.truncate(torch.tensor([0, 0]))
        torch.testing.assert_close(model.trunk(idx, cache), model.trunk(idx), atol=1e-9, rtol=1e-9)


def test_documents_are_counted_exactly_in_half_precision():
    config = GPTConfig(**{**SMALL, "block_size": 1024}, memory_slots=2, memory_segment=8, document_token=0)
    model = GPT(config).bfloat16()
    x, seen = torch.randint(1, 29, (1, 1024)), []
    x[:, 0:900:2] = 0
    sdpa = F.scaled_dot_product_attention

    def watching(*args, attn_mask=None):
        seen.append(attn_mask)
        return sdpa(*args, attn_mask=attn_mask)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", watching)
        model.memory(torch.randn(1, 1024, 16, dtype=torch.bfloat16), M.Pass(x))
    assert not seen[0][0, 0, 801, 1:].any() and seen[0][0, 0, 1000, 1:].any()


@pytest.mark.deep
def test_budget_moves_the_mean_depth():
    """From either side the loss pulls towards what was asked for; alone, it gets there."""
    for target in (1.3, 3.4):
        model = GPT(GPTConfig(**SMALL, depths=(1, 4), mean_depth=target))
        opt, notes = build_optimizer(model, "adamw", 1e-2, 0.0, (0.9, 0.95)), {}
        for step in range(100):
            idx = tokens(8, 17)
            opt.zero_grad()
            sum(model(idx[:, :-1], idx[:, 1:])[1].values()).backward()
            opt.step()
        model.trunk(tokens(64, 16), notes=notes)
        assert abs(notes["depth"].item() - target) < 0.4, target


def test_the_budget_moves_the_routers_alone():
    model = build(depths=(1, 2, 4))
    idx = tokens(3, 16)
    model(idx, idx)[1]["depth"].backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert {name.split(".")[0] for name, grad in grads.items() if grad.abs().sum() > 0} == {"routers"}


def test_a_row_that_stops_costs_nothing():
    """One token of one row: blocks above its depth are not called."""
    model = build(depths=(2, 4)).eval()
    called = []
    model.blocks[3].register_forward_hook(lambda *a: called.append(1))
    cache = model.new_cache(1)
    with torch.no_grad():
        for t in range(16):
            model(tokens(1, 1), cache=cache)
            assert cache.alive.sum() == len(called)
    assert 0 < len(called) < 16


# --- all of them: a batch in parts ---


@pytest.mark.parametrize("knobs", [{}, *({k: v} for k, v in KNOBS.items()), KNOBS], ids="-".join)
def test_parts_of_a_batch_add_up_to_it(knobs):
    """
    Gradient accumulation: the text's loss, the mean depth and the gradients of both are the mean of those of
    two halves of a batch. The losses beside them are not: the mean depth is squared after its mean, peek
    divides by the mean square of its batch, ahead and uncertainty take a quarter of the rows.
    """
    model = build(**knobs)
    x = tokens(8, 33 if "memory_slots" in knobs else 17)

    def results(x):
        losses, notes = model(x[:, :-1], x[:, 1:])[1], {}
        model.trunk(x[:, :-1], notes=notes)
        depth = notes.get("depth", torch.zeros(()))
        grads = torch.autograd.grad(losses["ce"] + depth, [*model.parameters()], allow_unused=True)
        return losses, depth, grads

    (whole, depth, grads), *halves = (results(rows) for rows in (x, *x.split(4)))
    mean = {name: sum(losses[name] for losses, _, _ in halves) / 2 for name in whole}
    assert mean.pop("ce").item() == pytest.approx(whole["ce"].item(), rel=1e-12)
    for g, *parts in zip(grads, *(part for _, _, part in halves), strict=True):
        assert (g is None) == all(p is None for p in parts)
        if g is not None:
            torch.testing.assert_close(sum(p for p in parts if p is not None) / 2, g, rtol=1e-9, atol=1e-12)
    if "depth" in mean: # larger, by the variance of the depths
        apart = (halves[0][1] - halves[1][1]) / 2
        assert mean["depth"].item() == pytest.approx((whole["depth"] + apart.square()).item(), rel=1e-9)
    for name in {"ahead", "uncertainty"} & mean.keys(): # rows 0 and 1 of eight; 0 and 4 of two halves
        for loss, rows in ((whole[name], (0, 1)), (mean[name], (0, 4))):
            alone = sum(results(x[row : row + 1])[0][name] for row in rows) / 2
            assert loss.item() == pytest.approx(alone.item(), rel=1e-9)
    if "peek" in mean:
        lowest, highest = sorted(losses["peek"].item() for losses, _, _ in halves)
        assert lowest <= whole["peek"].item() <= highest


# --- all of them: nothing can be learned from the future ---


TWO = [{a: KNOBS[a], b: KNOBS[b]} for a, b in itertools.combinations(KNOBS, 2)]


@pytest.mark.parametrize("knobs", [KNOBS, *(pytest.param(two, marks=deep) for two in TWO)], ids="-".join)
def test_random_tokens_stay_random(knobs):
    """Trained on uniform tokens, fresh ones each step: only the future could bring a loss below ln(V)."""
    model = GPT(GPTConfig(**{**SMALL, "vocab_size": 8}, **knobs))
    opt, losses = build_optimizer(model, "adamw", 1e-2, 0.1, (0.9, 0.95)), []
    for _ in range(80):
        x = tokens(16, 33 if "memory_slots" in knobs else 17, vocab=8)
        parts = model(x[:, :-1], x[:, 1:])[1]
        opt.zero_grad()
        sum(parts.values()).backward()
        opt.step()
        losses.append(parts["ce"].item())
    last = torch.tensor(losses[-40:])
    assert last.mean() > math.log(8) - 4 * last.std() / math.sqrt(40)


def told_and_asked(rows, windows, letters):
    """
    (rows, 16 windows + 1): facts, each a token for a letter with its digit, said twice; and questions, each a
    letter and then its digit. Also where a digit is to be said whose fact was last mentioned in an earlier
    window of 16.
    """
    digit, n = torch.randint(10, (rows, letters)), 8 * windows
    asks, who = torch.rand(rows, n + 1) < 0.5, torch.randint(letters, (rows, n + 1))
    digit = digit.gather(1, who)
    fact = 10 + letters + 10 * who + digit
    x = torch.stack([torch.where(asks, 10 + who, fact), torch.where(asks, digit, fact)], dim=2)
    asked = torch.zeros(rows, 2 * n, dtype=torch.bool)
    for b in range(rows):
        last = {}
        for i, letter in enumerate(who[b, :n].tolist()):
            asked[b, 2 * i] = asks[b, i].item() and last.get(letter, i) // 8 < i // 8
            last[letter] = i
    return x.flatten(1)[:, : 2 * n + 1], asked


@pytest.mark.parametrize("letters, rows, windows, steps, lr", [
    (1, 16, 2, 100, 1e-2), pytest.param(4, 32, 4, 1500, 5e-3, marks=deep)]) # 20 and 400 steps are needed
def test_memory_recalls_what_attention_cannot(letters, rows, windows, steps, lr):
    """With memory 95% of what lies before the window; the same weights, each window alone, chance."""
    shape = dict(block_size=16, n_layer=2, n_head=2, n_embd=32, memory_slots=8)
    model = GPT(GPTConfig(vocab_size=10 + 11 * letters, **shape))
    opt = build_optimizer(model, "adamw", lr, 0.1, (0.9, 0.99))

    def recall(guess, x, asked):
        return (guess.argmax(-1).view(len(x), -1) == x[:, 1:])[asked].double().mean().item()

    for step in range(steps):
        for group in opt.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 50)
        x, asked = told_and_asked(rows, windows, letters)
        opt.zero_grad()
        logits, losses = model(x[:, :-1], x[:, 1:])
        losses["ce"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        if step % 25 == 0 and recall(logits, x, asked) > 0.985:
            break
    x, asked = told_and_asked(64, 2 * windows, letters) # twice as many windows as it was trained with
    with torch.no_grad():
        assert recall(model(x[:, :-1], x[:, 1:])[0], x, asked) >= 0.95
        alone = x[:, :-1].reshape(-1, 16)
        assert recall(model(alone, alone)[0], x, asked) < 0.25 # 0.1 is chance
