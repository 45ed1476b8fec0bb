"""
Speculative decoding changes no probability: by exact enumeration of the rule, by greedy text that is the same
token for token, and by a test of sampled text that also has to reject four faults which are easy to make.
"""
import itertools
import math
from collections import Counter

import pytest
import torch

import model as M
import sample as S
from model import GPT, GPTConfig
from sample import DraftingDecoder, Speculation, judge

ATTENTION = [dict(attention="mha"), dict(attention="mha", n_kv_head=1), dict(attention="mla"),
             dict(attention="diff", diff_form="v1"), dict(attention="diff"),
             dict(attention="diff_mla", diff_form="v1"), dict(attention="diff_mla")]
SMALL = dict(vocab_size=17, block_size=16, n_layer=2, n_head=4, n_embd=32, n_ahead=3)
deep = pytest.mark.deep


def build(scale=0.3, **change):
    """Weights so large that every part counts. The cell's too, so that it guesses badly in a definite way."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(**{**SMALL, **change})).double().eval()
    for name, p in model.named_parameters():
        p.data.normal_(std=scale).add_(1 if "residual" in name and p.dim() == 1 else 0)
    return model


# --- 1: the rule, enumerated ---


def test_the_naive_rule_is_the_rule_and_leaves_p():
    """For one draft the outcomes of judge; over all drafts and random numbers the model's distribution."""
    p, q = (torch.tensor(t).double() for t in ([0.5, 0.3, 0.2, 0.0], [0.1, 0.6, 0.1, 0.2]))
    total = torch.zeros(4, dtype=torch.float64)
    for draft in range(4):
        keep, rest = (t[0] for t in judge(torch.stack([p, p])[None], q[None, None], torch.tensor([[draft]])))
        edge = keep[0].clamp(max=1).item()
        redrawn = S.naive_judge(p, q, draft, 1.0, lambda rest: rest)
        if edge < 1:
            torch.testing.assert_close(redrawn, rest[0])
        assert not edge or S.naive_judge(p, q, draft, 0.999 * edge, None) == draft
        total[draft] += q[draft] * edge
        total += q[draft] * (1 - edge) * rest[0] / rest[0].sum()
    torch.testing.assert_close(total, p)


def law(p_of, q_of, n, V):
    """
    Probability of each sequence of n + 1 tokens that one round of drafting and judging, then plain sampling,
    writes. p_of and q_of: prefix -> distribution (V,). Random numbers are replaced by all their outcomes.
    """
    total = torch.zeros([V] * (n + 1), dtype=torch.float64)

    def complete(prefix, weight):
        if len(prefix) == n + 1:
            total[tuple(prefix)] += weight
            return
        for token, share in enumerate(p_of(prefix)):
            if share > 0:
                complete([*prefix, token], weight * share)

    for drafts in itertools.product(range(V), repeat=n):
        q = torch.stack([q_of(drafts[:i]) for i in range(n)])
        weight = math.prod(q[i, token].item() for i, token in enumerate(drafts))
        if weight == 0:
            continue
        p = torch.stack([p_of(drafts[:i]) for i in range(n + 1)])
        keep, after = (t[0] for t in judge(p[None], q[None], torch.tensor([drafts])))
        for kept in range(n + 1):
            stops = 1 - keep[kept].clamp(max=1) if kept < n else 1.0
            for token, share in enumerate(after[kept] / after[kept].sum()):
                if share > 0 and stops > 0:
                    complete([*drafts[:kept], token], weight * stops * share)
            if kept < n:
                weight = weight * keep[kept].clamp(max=1)
    return total


def tables(V, seed, zeros):
    """prefix -> distribution, drawn once for each prefix; `zeros` of its entries are 0."""
    generator, known = torch.Generator().manual_seed(seed), {}

    def of(prefix):
        if tuple(prefix) not in known:
            weights = torch.rand(V, generator=generator, dtype=torch.float64) ** 3
            weights[torch.randperm(V, generator=generator)[:zeros]] = 0
            known[tuple(prefix)] = weights / weights.sum()
        return known[tuple(prefix)]

    return of


def parity(V, odd):
    """Uniform over the even tokens, or the odd ones."""
    p = torch.tensor([float(token % 2 == odd) for token in range(V)], dtype=torch.float64)
    return lambda prefix: p / p.sum()


@pytest.mark.parametrize("n", [1, 2, pytest.param(3, marks=deep)])
@pytest.mark.parametrize("case", ["full", "zeros in both", "equal", "disjoint", "a certain draft"])
def test_the_law_of_the_text_is_the_models(n, case):
    V = 4 if n < 3 else 3
    zeros = min(2, V - 1) if case == "zeros in both" else 0
    p, q = tables(V, 1, zeros), tables(V, 2, V - 1 if case == "a certain draft" else zeros)
    if case == "disjoint":
        p, q = parity(V, 0), parity(V, 1)
    if case == "equal":
        q = p
    plain = torch.zeros([V] * (n + 1), dtype=torch.float64)
    for tokens in itertools.product(range(V), repeat=n + 1):
        plain[tokens] = math.prod(p(tokens[:i])[token].item() for i, token in enumerate(tokens))
    assert (law(p, q, n, V) - plain).abs().max() < 1e-12
    assert plain.sum().item() == pytest.approx(1)


# --- 2: greedy text is the same ---


@pytest.mark.parametrize("choice", ATTENTION, ids=lambda c: "-".join(map(str, c.values())))
@pytest.mark.parametrize("draft", ["ahead", "ngram"])
@pytest.mark.parametrize("rows, length", [(8, 24), pytest.param(25, 200, marks=deep)])
def test_greedy_text_is_the_same(choice, draft, rows, length):
    """Rows at their own pace, through several windows; deep, 10,000 tokens of each attention choice."""
    model = build(**choice)
    idx = torch.randint(17, (rows, 5))
    plain = model.generate(idx, length, temperature=0)
    writer = Speculation(model, idx, temperature=0, draft=draft)
    assert torch.equal(writer.generate(length), plain)
    assert writer.kept > 0 and writer.kept < writer.drafted


OTHER = [dict(memory_slots=2, depths=(1, 2), future_peek=2, uncertainty=True), dict(residual="mhc"),
         dict(block_size=2, n_ahead=1), dict(thought_tokens=2, position="learned", logit_softcap=5.0),
         dict(conv=4)]
ALONE = [dict(residual="hyper"), dict(position="learned"), dict(position="none"),
         dict(norm="layernorm", bias=True), dict(logit_softcap=5.0), dict(tie_embeddings=False),
         dict(block_size=4), dict(thought_tokens=2)]


@pytest.mark.parametrize("change", [*OTHER, *(pytest.param(change, marks=deep) for change in ALONE)], ids=str)
def test_greedy_text_is_the_same_with_the_other_choices(change):
    model = build(**change)
    idx = torch.randint(17, (5, 3))
    plain = model.generate(idx, 60, temperature=0)
    assert torch.equal(model.generate(idx, 60, temperature=0, speculative=True), plain)


def test_rows_write_what_they_would_write_alone():
    model = build()
    idx = torch.randint(17, (4, 5))
    together = model.generate(idx, 50, temperature=0, speculative=True)
    for row, alone in zip(together, idx):
        assert torch.equal(row, model.generate(alone[None], 50, temperature=0, speculative=True)[0])


def test_the_cache_after_each_step_is_that_of_a_full_forward(poisoned):
    model = build(attention="diff_mla")
    writer = Speculation(model, torch.randint(17, (4, 5)))
    paces = set()
    for _ in range(30):
        writer.step()
        for b, (row, start) in enumerate(zip(writer.rows, writer.starts)):
            full = model.trunk(torch.tensor([row[start:-1]]))[0, -1]
            torch.testing.assert_close(writer.h[b], full, atol=1e-9, rtol=1e-9)
        paces.add(len({len(row) for row in writer.rows}))
    assert max(paces) > 1 # rows were apart


# --- 3: sampled text has the model's distribution ---


SAMPLING = dict(temperature=0.8, top_p=0.95)


def exact_law(model, prompt, length):
    """Probability of each continuation, by full forwards."""
    V, total = model.config.vocab_size, {}

    def walk(tokens, weight):
        if len(tokens) == length:
            total[tuple(tokens)] = weight
            return
        p = S.distribution(model(torch.tensor([prompt + tokens]))[0][0, -1], **SAMPLING)
        for token in range(V):
            if p[token] > 0:
                walk([*tokens, token], weight * p[token].item())

    with torch.no_grad():
        walk([], 1.0)
    return total


def p_value(model, count, draft="ahead", length=4):
    """G-test of sampled continuations against the exact law; outcomes expected less than 5 times are one."""
    prompt = [0, 1, 2, 0, 1]
    want = exact_law(model, prompt, length)
    writer = Speculation(model, torch.tensor([prompt] * count), SAMPLING["temperature"], 0, SAMPLING["top_p"],
                         generator=torch.Generator().manual_seed(3), draft=draft)
    seen = Counter(tuple(row) for row in writer.generate(length)[:, len(prompt):].tolist())
    if any(row not in want for row in seen): # a token of probability 0
        return 0.0
    often = [k for k, p in want.items() if p * count >= 5]
    pairs = [(seen[k], want[k] * count) for k in often]
    rest = count - sum(a for a, _ in pairs), count - sum(b for _, b in pairs)
    pairs += [rest] if rest[1] > 1 else []
    G = 2 * sum(a * math.log(a / b) for a, b in pairs if a)
    assert writer.kept > count / 10 and writer.kept < writer.drafted
    return torch.special.gammaincc(torch.tensor((len(pairs) - 1) / 2), torch.tensor(max(G, 0) / 2)).item()


def small(**change):
    return build(scale=0.15, vocab_size=4, block_size=32, n_ahead=2, **change)


@pytest.mark.parametrize("draft", ["ahead", "ngram"])
@pytest.mark.parametrize("count", [1500, pytest.param(20_000, marks=deep)])
def test_sampled_text_has_the_models_distribution(draft, count):
    assert p_value(small(), count, draft) > 0.01


@pytest.mark.deep
@pytest.mark.parametrize("draft", ["ahead", "ngram"])
def test_sampled_text_has_it_with_short_convolutions(draft):
    assert p_value(small(conv=4), 10_000, draft) > 0.01


@pytest.mark.parametrize("fault, count", [
    ("resample from p", 3000), *(pytest.param(*how, marks=deep) for how in (
        ("forgotten division by q", 3000), ("wrong temperature in q", 3000),
        ("bonus off by one", 50_000)))]) # this one shows in many rows only
def test_the_same_test_rejects(fault, count, monkeypatch):
    right, ahead = S.judge, Speculation.ahead

    def wrong(p, q, drafts):
        keep, after = right(p, q, drafts)
        if fault == "resample from p":
            after = p
        if fault == "forgotten division by q":
            keep = p[:, :-1].gather(2, drafts.unsqueeze(-1)).squeeze(2)
        if fault == "bonus off by one" and drafts.size(1):
            after = torch.cat([after[:, :-1], p[:, -2:-1]], dim=1)
        return keep, after

    def flat(self, limits):
        drafts, q, limits = ahead(self, limits)
        flatter = q.sqrt() / q.sqrt().sum(-1, keepdim=True)
        return drafts, flatter if fault == "wrong temperature in q" else q, limits

    monkeypatch.setattr(S, "judge", wrong)
    monkeypatch.setattr(Speculation, "ahead", flat)
    assert p_value(small(), count) < 1e-4


@pytest.mark.deep
def test_drafts_are_kept_as_often_as_theory_says(monkeypatch):
    """The mean of sum_x min(p, q) over the drafts that were looked at."""
    model, want, right = build(vocab_size=8, n_ahead=1), [], S.judge

    def watching(p, q, drafts):
        if drafts.size(1):
            want.append(torch.minimum(p[:, :1], q).sum(-1).mean().item())
        return right(p, q, drafts)

    monkeypatch.setattr(S, "judge", watching)
    writer = Speculation(model, torch.randint(8, (200, 3)), generator=torch.Generator().manual_seed(1))
    writer.COST = 0 # never pause
    for _ in range(60):
        writer.step()
    assert writer.kept / writer.drafted == pytest.approx(sum(want) / len(want), abs=0.02)


# --- in steps of fixed shape ---


@pytest.mark.parametrize("change", [
    *(pytest.param(change, marks=() if change["attention"] == "diff_mla" else pytest.mark.deep)
      for change in ATTENTION),
    *(pytest.param(change, marks=pytest.mark.deep)
      for change in (dict(residual="mhc"), dict(block_size=2, n_ahead=1))),
    dict(conv=4), dict(thought_tokens=2, position="learned", logit_softcap=5.0)], ids=str)
def test_steps_of_fixed_shape_write_the_same_greedy_text(change, monkeypatch):
    """Through all S, window moves, and the plain steps at a window's end."""
    monkeypatch.setattr(S.Decoder, "SHORTEST", 4)
    model = build(**{"vocab_size": 4, "block_size": 32, **change})
    for T in (1, 40):
        idx = torch.randint(4, (1, T))
        writer = DraftingDecoder(model, 1, 0.0)
        text = torch.cat([idx, *writer.stream(idx, 90)], dim=1)
        assert torch.equal(text, model.generate(idx, 90, temperature=0)) and (T > 1 or writer.forwards)


def test_a_step_of_fixed_shape_follows_the_naive_rule():
    """Its drafts and the tokens that it keeps are those of naive_judge for the random numbers it drew."""
    model, n, lengths = build(scale=0.15, vocab_size=6, n_ahead=3), 3, Counter()
    how = 3.0, 0, 0.9 # temperature, top_k, top_p
    idx = torch.randint(6, (1, 5))
    for seed in range(30):
        writer = DraftingDecoder(model, 1, *how, generator=torch.Generator().manual_seed(seed))
        writer.STEPS = 1
        next(writer.stream(idx, 8)) # one step
        wrote = writer.ids[0, 5 : 5 + writer.tokens].tolist()
        with torch.no_grad():
            s, x, drafts, q = model.trunk(idx[:, :-1])[:, -1], idx[:, -1], [], []
            for race in writer.races[:n]:
                s = model.extras["ahead"](s, model.embed(x))
                q.append(S.distribution(model.logits(s), *how)[0])
                x = (q[-1] / race).argmax()[None]
                drafts.append(x.item())
            h = model.trunk(torch.tensor([idx[0].tolist() + drafts]))[0, 4:]
            # the next step drafts from the trunk's output at the last token that was kept
            last = writer.h[0, writer.position]
            torch.testing.assert_close(last, h[writer.tokens - 1], atol=1e-5, rtol=1e-5)
            p = S.distribution(model.logits(h), *how) # (n + 1, V)
        want = []
        for i in range(n):
            want.append(S.naive_judge(p[i], q[i], drafts[i], writer.u[0, i],
                                      lambda rest: (rest / writer.races[n]).argmax().item()))
            if want[-1] != drafts[i]:
                break
        else:
            want.append((p[n] / writer.races[n]).argmax().item())
        assert wrote == want
        lengths[len(want)] += 1
    assert len(lengths) == n + 1 # every number of kept drafts occurred


def test_the_figures_of_a_text_are_its_own():
    """A conversation reuses the decoder, and its graphs."""
    writer, idx, seen = DraftingDecoder(build(), 1, 0.0), torch.randint(17, (1, 3)), []
    for _ in range(2):
        assert len([*writer.stream(idx, 12)]) == 12
        seen.append((writer.forwards, writer.tokens))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("part", ["blocks.1.mlp.down", "head"])
@pytest.mark.parametrize("kind", [S.Decoder, DraftingDecoder])
def test_steps_of_fixed_shape_refuse_a_damaged_model(kind, part):
    """As stream and Speculation do: the likeliest of NaNs would be token 0, again and again."""
    model = build()
    model.get_submodule(part).weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        list(kind(model, 1, 1.0).stream(torch.ones(1, 3, dtype=torch.long), 5))


@pytest.mark.deep
def test_a_drafting_step_compiles_without_a_break():
    model, graphs = build(attention="diff_mla"), []
    torch._dynamo.reset()

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    idx = torch.randint(17, (1, 3))
    texts = []
    for compiled in (False, True):
        writer = DraftingDecoder(model, 1, 1.0, generator=torch.Generator().manual_seed(1))
        if compiled:
            writer.run_drafts = torch.compile(writer.draft_and_judge, backend=keep, dynamic=False)
        texts.append(torch.cat([*writer.stream(idx, 12)], dim=1))
    assert torch.equal(*texts) and len(graphs) == 1
    assert not any(node.target == "item" for node in graphs[0].graph.nodes)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", (False, True))
def test_drafts_in_a_graph_on_a_gpu_write_the_same_greedy_text(compile, monkeypatch):
    monkeypatch.setattr(S.Decoder, "SHORTEST", 8)
    monkeypatch.setattr(S.Decoder, "OPTIONS", {})
    torch._dynamo.reset()
    model = build(attention="diff_mla", vocab_size=4, block_size=32).float().cuda()
    idx = torch.randint(4, (1, 5), device="cuda")
    writer = DraftingDecoder(model, 1, 0.0, compile=compile)
    text = torch.cat([*writer.stream(idx, 90)], dim=1)
    assert torch.equal(text, model.generate(idx, 90, temperature=0)[:, 5:].cpu()) and writer.forwards


# --- a text that goes on ---


def written(writer, rows, count):
    """`count` tokens or more of each row behind `rows`."""
    if isinstance(writer, S.Decoder):
        return torch.cat([*writer.stream(torch.tensor(rows), count)], dim=1).tolist()
    writer.go_on(rows)
    wrote = [[] for _ in rows]
    while min(map(len, wrote)) < count:
        wrote = [old + new for old, new in zip(wrote, writer.step())]
    return [row[:count] for row in wrote]


def writers(model, temperature, rows=1):
    """Of each kind one that writes from the seed 7."""
    for kind, how in ((S.Text, {}), (Speculation, {}), (Speculation, dict(draft="ngram"))):
        yield lambda kind=kind, how=how: kind(model, [[0]] * rows, temperature, **how,
                                              generator=torch.Generator().manual_seed(7))
    if not model.memory and not len(model.routers):
        for kind in (S.Decoder, DraftingDecoder)[: 2 if rows == 1 else 1]:
            yield lambda kind=kind: kind(model, rows, temperature, generator=torch.Generator().manual_seed(7))


def talk(model, make, turns, rows=1):
    """Turns with one writer, after each of which the last tokens may be dropped. A new writer that is given
    the joined text and the same random numbers has to write the same.
    """
    generator, ids = torch.Generator().manual_seed(3), [[] for _ in range(rows)]
    writer = make()
    for said, count, dropped in turns:
        new = torch.randint(17, (rows, said), generator=generator).tolist()
        ids = [row + more for row, more in zip(ids, new)]
        other = make()
        other.generator.set_state(writer.generator.get_state())
        wrote = written(writer, ids, count)
        assert wrote == written(other, ids, count)
        torch.testing.assert_close(writer.seen, other.seen, atol=1e-9, rtol=1e-9)
        ids = [row + more[: count - dropped] for row, more in zip(ids, wrote)]


@pytest.mark.parametrize("change", [dict(conv=4), *(pytest.param(change, marks=deep) for change in (
    dict(memory_slots=2, depths=(1, 2)),
    dict(attention="diff_mla", thought_tokens=2, position="learned")))], ids=str)
@pytest.mark.parametrize("temperature, rows, turns", [
    (1.0, 1, [(2, 8, 3), (5, 8, 0), (4, 9, 0)]),
    *(pytest.param(temperature, rows, turns, marks=deep) for turns in ([(2, 25, 22), (6, 8, 3), (5, 30, 8)],
                   [(5, 9, 4), (50, 5, 3), (6, 8, 3), (9, 3, 1), (1, 2, 0)], [(5, 30, 26), (3, 5, 0)])
      for temperature in (0, 1.0) for rows in (1, 2))])
def test_a_conversation_writes_what_one_call_on_its_text_writes(temperature, rows, turns, change):
    """Turns of (tokens said, tokens written, of these dropped): the window moves, a prompt is longer, or the
    text is cut before the window, as by /reset and the first line again.
    """
    model = build(**{"block_size": 32, **change})
    for make in writers(model, temperature, rows):
        talk(model, make, turns, rows)


def watched_trunk(monkeypatch, after):
    """after(number of tokens) is called behind each forward of a trunk."""
    trunk = GPT.trunk

    def watching(self, idx, *how):
        h = trunk(self, idx, *how)
        after(idx.size(1))
        return h

    monkeypatch.setattr(GPT, "trunk", watching)


def test_a_conversation_reads_no_token_twice(monkeypatch):
    """The first forward of a turn reads what is new, and the last token of the turn before."""
    model, lengths = build(block_size=64), []
    watched_trunk(monkeypatch, lengths.append)
    for make in writers(model, 0):
        ids, writer = [], make()
        for said in (7, 4, 9):
            newest, first = bool(ids), len(lengths)
            ids += range(said)
            ids += written(writer, [ids], 6)[0]
            read = lengths[first] + isinstance(writer, S.Decoder) # which leaves the newest to its first step
            assert said <= read <= newest + said and max(lengths[first + 1 :]) <= 4
            if not getattr(writer, "n", 0): # drafts beyond the six may have been read
                assert read == newest + said
        lengths.clear()


@deep
def test_ctrl_c_leaves_a_text_that_goes_on(monkeypatch):
    """Where it comes in a forward, as one moves the window, nobody knows what the cache holds."""
    left = [math.inf]

    def stop(_):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    watched_trunk(monkeypatch, stop)
    monkeypatch.setattr(S.Decoder, "AHEAD", 8)
    for change, forwards in ((dict(memory_slots=2, depths=(1, 2)), (1, 4, 11, 12, 13)),
                             (dict(conv=4), (1, 4, 11, 12, 13)), (dict(conv=4, block_size=64), (25,))):
        model = build(**change)
        for make in writers(model, 1.0):
            for left[0] in forwards:
                writer = make()
                with pytest.raises(KeyboardInterrupt):
                    written(writer, [[1, 2, 3, 4, 5, 6]], 99)
                ids, other = [1, 2, 3, 4, 5, 6, 7], make()
                other.generator.set_state(writer.generator.get_state())
                assert written(writer, [ids], 20) == written(other, [ids], 20)


@pytest.mark.parametrize("change", [
    dict(), *(pytest.param(choice, marks=deep) for choice in (
        *ATTENTION, dict(conv=4, thought_tokens=1), dict(memory_slots=2, depths=(1, 2))))], ids=str)
@pytest.mark.parametrize("kind", [S.Text, pytest.param(Speculation, marks=deep)])
def test_prompts_of_different_lengths_write_what_each_writes_alone(change, kind):
    model, rows = build(**change), [[1], [*range(12)], [5, 6, 7], [3] * 40]
    together = written(kind(model, rows, 0), rows, 40)
    for row, wrote in zip(rows, together):
        assert model.generate(torch.tensor([row]), 40, temperature=0)[0, len(row) :].tolist() == wrote


@pytest.mark.parametrize("change", [
    dict(conv=4, thought_tokens=2), pytest.param(dict(), marks=deep)], ids=str)
def test_each_token_was_drawn_from_what_is_seen(change):
    """The trunk's output in a full forward of the window before the token: for each kind of writer."""
    model = build(**change)
    for make in writers(model, 1.0):
        writer, ids, seen = make(), [1, 2, 3], []
        if isinstance(writer, S.Decoder):
            for token in writer.stream(torch.tensor([ids]), 30):
                ids, seen = [*ids, token.item()], [*seen, writer.seen[0, 0].clone()]
        else:
            writer.go_on([ids])
            while len(ids) < 33:
                new = writer.step()[0]
                ids, seen = ids + new, [*seen, *writer.seen[0, : len(new)]]
        for n, h in enumerate(seen, start=3):
            full = model.trunk(torch.tensor([ids[S.window_start(n, 16) : n]]))[0, -1]
            torch.testing.assert_close(h, full, atol=1e-9, rtol=1e-9)


# --- what it does beside ---


def test_the_same_seed_writes_the_same_text():
    model, idx = build(), torch.randint(17, (3, 5))
    generators = (torch.Generator().manual_seed(seed) for seed in (1, 1, 2))
    a, b, c = (model.generate(idx, 50, speculative=True, generator=generator) for generator in generators)
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("length", [500, pytest.param(1500, marks=deep)])
def test_drafting_stops_where_it_cannot_pay_and_is_tried_again(length):
    model = build() # its cell knows nothing
    writer = Speculation(model, torch.randint(17, (1, 5)))
    writer.generate(length)
    assert writer.drafted < 0.3 * length * model.config.n_ahead
    keen = Speculation(model, torch.randint(17, (1, 5)))
    keen.COST = 0
    keen.generate(length)
    assert keen.drafted > 2 * writer.drafted


@pytest.mark.parametrize("rows", [1, 3])
def test_a_pause_is_as_long_for_each_of_many_rows(rows):
    """After a trial that kept no draft each row writes PAUSE tokens without one; after a good trial none."""
    writer = Speculation(build(), torch.randint(17, (rows, 5)))
    for kept, forwards in ((0, writer.PAUSE), (3, 0)):
        writer.decide_pause(0, 0, rows) # a forward without room for drafts is no part of a trial
        for _ in range(writer.TRIAL):
            assert not writer.pause
            writer.decide_pause(3 * rows, kept * rows, (kept + 1) * rows)
        for _ in range(forwards):
            assert writer.pause
            writer.decide_pause(0, 0, rows) # each row writes a token
        assert not writer.pause


def test_ngram_drafts_what_followed_before():
    text = torch.tensor([[1, 2, 3, 4, 5, 1, 2, 3], [9, 8, 7, 6, 5, 4, 3, 2]])
    writer = Speculation(build(n_ahead=0), text)
    writer.step()
    for row in writer.rows:
        row.pop()
    drafts, q, limits = writer.ngram([3, 3])
    assert drafts[0].tolist() == [4, 5, 1] and limits == [3, 0] and (q[0].argmax(-1) == drafts[0]).all()
    assert writer.ngram([7, 0])[0][0].tolist() == [4, 5, 1, 2, 3, 4, 5] # past the text's end the loop goes on


def test_loops_are_drafted_from_the_text_and_the_rest_by_the_cell():
    model = build(n_ahead=3)
    loop, new = [1, 2, 3, 4, 5, 6, 7] * 2, list(range(14))
    for rows, source in [([loop, loop], "ngram"), ([loop, new], "ahead"), ([new, new], "ahead")]:
        writer = Speculation(model, torch.tensor(rows), temperature=0)
        writer.step()
        writer.rows = [list(row) for row in rows]
        drafts, q, limits = writer.source([3, 2])
        assert limits == [3, 2] and drafts.shape == (2, 3) and q.shape == (2, 3, 17)
        for row in drafts[:, :2].tolist():
            assert (row == [1, 2]) == (source == "ngram")


@pytest.mark.parametrize("T", [2, 3, 9])
def test_the_cell_learns_what_the_model_would_say(T, monkeypatch):
    """Its loss is the cross-entropy with the model's own distribution there, by hand; also row by row."""
    model = build(n_ahead=6, logit_softcap=5.0).train()
    cell = model.extras["ahead"]
    idx = torch.randint(17, (8, T))
    targets = torch.where(torch.rand(8, T) < 0.2, -1, idx)
    h, terms = model.trunk(idx[:2]), []
    for b, t in itertools.product(range(2), range(T)):
        s = h[b, t]
        for j in range(t + 1, min(t + 3, T - 1) + 1): # half of n_ahead deep
            x = torch.cat([v / (v.square().mean() + 1e-6).sqrt() for v in (s, model.embed.weight[idx[b, j]])])
            s = s + cell.down.weight @ (cell.up.weight @ x).clamp(min=0) ** 2
            if targets[b, j] >= 0:
                terms.append(-(model.logits(h[b, j]).softmax(-1) * model.logits(s).log_softmax(-1)).sum())
    whole = cell.loss(model, model.trunk(idx), idx, targets, {})
    assert whole.item() == pytest.approx(torch.stack(terms).mean().item(), abs=1e-12)
    grads = torch.autograd.grad(whole, list(cell.parameters()))
    monkeypatch.setattr(M, "_AHEAD_LOGITS", 3 * 17) # one row at a time
    parts = cell.loss(model, model.trunk(idx), idx, targets, {})
    torch.testing.assert_close(parts, whole)
    for a, b in zip(torch.autograd.grad(parts, list(model.parameters()), allow_unused=True)[-2:], grads):
        torch.testing.assert_close(a, b)
    cell.loss(model, model.trunk(idx), idx, targets, {}).backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert trained == ["extras.ahead.up.weight", "extras.ahead.down.weight"]


def test_stop_tokens_and_lengths():
    model = build()
    idx = torch.randint(17, (4, 5))
    plain = model.generate(idx, 60, temperature=0, stop=(3, 4))
    for stop in ((3, 4), torch.tensor([3, 4]), iter([3, 4])):
        assert torch.equal(model.generate(idx, 60, temperature=0, stop=stop, speculative=True), plain)
    assert torch.equal(model.generate(idx, 0, speculative=True), idx)
    assert model.generate(idx, 7, speculative=True).shape == (4, 12) and model.training is False
    assert model.train().generate(idx, 7, speculative=True).shape == (4, 12) and model.training


def test_under_autocast():
    model = build(attention="diff_mla").float()
    idx = torch.randint(17, (3, 5))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.generate(idx, 40, speculative=True).shape == (3, 45)
    writer, seen = Speculation(model.train(), idx), []
    model.blocks[0].register_forward_hook(lambda m, i, o: seen.append(m.training))
    writer.step(), writer.step()
    assert not any(seen) and model.training


ONE = torch.zeros(1, 1, dtype=torch.long)


@pytest.mark.parametrize("call, words", [
    (lambda m: Speculation(m, ONE, draft="ahead"), "n_ahead"),
    (lambda m: Speculation(m, ONE, draft="oracle"), "auto, ahead, ngram"),
    (lambda m: m.generate(ONE, 3, temperature=-1, speculative=True), "temperature"),
    (lambda m: m.generate(ONE, -1, speculative=True), "max_new_tokens=-1"),
    (lambda m: m.generate(ONE, -1), "max_new_tokens=-1"),
    (lambda m: m.generate(ONE, 3, speculative=True, use_cache=False), "use_cache"),
    (lambda m: [m.embed.weight.data.fill_(math.nan), m.generate(ONE, 3, speculative=True)], "not finite"),
])
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call(build(n_ahead=0))
