"""The uncertainty head, the figures that judge it, and the command lines that show both."""
import json
import math
import os
import pty

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench import auroc, calibration_error, fit_temperature, reliability
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint
from processes import ROOT, run, start

SMALL = dict(vocab_size=29, block_size=16, n_layer=2, n_head=4, n_embd=32, uncertainty=True)


def build(scale=0.3, **change):
    """In fp64, with weights so large that every part has a say."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(**{**SMALL, **change})).double()
    for p in model.parameters():
        p.data.normal_(std=scale)
    return model


def tokens(batch, length):
    return torch.randint(29, (batch, length))


# --- the figures ---


def calibrated(n, seed=0):
    """p (n,), and right with exactly that probability."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(n, generator=generator, dtype=torch.float64)
    return p, torch.rand(n, generator=generator, dtype=torch.float64) < p


def ece_loop(p, right, bins, equal_mass):
    """The definition in numpy, a bin at a time."""
    p, right, total = p.numpy(), right.numpy(), 0.0
    order = np.argsort(p, kind="stable")
    for i in range(bins):
        inside = np.isin(np.arange(len(p)),
                np.array_split(order, bins)[i]) if equal_mass else np.floor(p * bins).clip(max=bins - 1) == i
        if inside.any():
            total += inside.sum() / len(p) * abs(right[inside].mean() - p[inside].mean())
    return total


@pytest.mark.parametrize("equal_mass", (False, True))
@pytest.mark.parametrize("n, bins", [(1, 15), (7, 15), (1000, 15), (1000, 4)])
def test_calibration_error_is_its_definition(n, bins, equal_mass):
    p, right = calibrated(n)
    p = p**2 # over-confident below, and bins of very different size
    assert calibration_error(p, right, equal_mass,
                             bins) == pytest.approx(ece_loop(p, right, bins, equal_mass), abs=1e-12)
    table = reliability(p, right, equal_mass, bins)
    means = [mean for _, mean, _ in table]
    assert sum(count for count, *_ in table) == n and means == sorted(means)


def test_certainty_falls_into_the_last_bin():
    assert reliability(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([False, True, False])) == [(1, 0.0, 0.0),
                                                                                              (2, 1.0, 0.5)]


@pytest.mark.parametrize("equal_mass", (False, True))
def test_calibrated_guesses_have_a_small_error_and_not_none(equal_mass):
    """|share right - mean p| of a bin of n_b is about sqrt(2 p (1 - p) / (pi n_b)), which over the bins adds
    up to 0.31 sqrt(bins / n).
    """
    for n in (2_000, 50_000):
        errors = [calibration_error(*calibrated(n, seed), equal_mass) for seed in range(20)]
        expected = 0.8 * (15 / n) ** 0.5 * 0.39 # sqrt(2 / pi), and the mean of sqrt(p (1 - p)) over uniform p
        # 300 bins with a spread of 0.75: 4% is one deviation of their mean
        assert sum(errors) / 20 == pytest.approx(expected, rel=0.15)
    p, right = calibrated(50_000)
    # over-confident by (1 - p) / 2
    assert calibration_error((p + 1) / 2, right, equal_mass) == pytest.approx(0.25, abs=0.01)


def test_auroc_counts_pairs():
    torch.manual_seed(2)
    for levels in (3, 10, 10**6): # with few levels most pairs are ties
        p, right = torch.randint(levels, (200,)).double() / levels, torch.rand(200) < 0.3
        pairs = [(a > b) + 0.5 * (a == b) for a in p[right].tolist() for b in p[~right].tolist()]
        assert auroc(p, right) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    two = torch.tensor([0.1, 0.9])
    assert auroc(two, torch.tensor([False, True])) == 1 and np.isnan(auroc(two, torch.tensor([True, True])))


def drawn(n=40_000, V=5):
    """Logits (n, V) and targets drawn from their softmax."""
    logits = 2 * torch.randn(n, V, dtype=torch.float64)
    return logits, torch.multinomial(logits.softmax(-1), 1).squeeze(1)


@pytest.mark.deep
def test_the_temperature_is_found():
    logits, targets = drawn()
    T = fit_temperature(logits, targets)
    # The curvature of the loss in 1/T is the variance of z under softmax(z), above 1 here: T is sure to
    # 1 / sqrt(n) = 0.005.
    assert T == pytest.approx(1, abs=0.02)
    for k in (0.1, 3.0, 20.0):
        assert fit_temperature(k * logits, targets) == pytest.approx(k * T, rel=1e-9)

    def nll(T):
        return F.cross_entropy(logits / T, targets).item()

    # T = 1 was right already
    assert nll(T) <= min(nll(1.0), nll(0.99 * T), nll(1.01 * T)) and nll(1.0) - nll(T) < 1e-4


# --- the head ---


def test_it_starts_as_one_minus_the_largest_probability():
    torch.manual_seed(1)
    model, idx = GPT(GPTConfig(**SMALL)).double().eval(), tokens(3, 16)
    h, (logits, _) = model.trunk(idx), model(idx, idx)
    torch.testing.assert_close(model.uncertainty(h), 1 - logits.softmax(-1).amax(-1), atol=1e-12, rtol=1e-9)
    assert torch.equal(model.uncertainty(h), model.uncertainty(h, logits))
    sure = torch.zeros(1, 29)
    sure[0, 3] = 1e4 # a certain model: near 0 and still a number, in fp32 as well
    assert 0 < model.float().uncertainty(torch.zeros(1, 32), sure) < 1e-5


@pytest.mark.parametrize("rows", (1, 3, 4, 8, 11))
def test_the_loss_is_the_cross_entropy_of_being_wrong(rows):
    """By hand over the first quarter of the rows, of all where there are fewer than four; ignored targets
    count nowhere.
    """
    model, idx, targets = build(), tokens(rows, 9), tokens(rows, 9)
    targets[0, 2:5] = -1
    logits, losses = model(idx, targets)
    few = rows // 4 if rows >= 4 else rows
    score, terms = model.uncertainty(model.trunk(idx)), []
    # what the head adds to the odds of 1 - p
    correction = score.logit() - (1 - logits.softmax(-1).amax(-1)).logit()
    for b in range(few):
        for t in range(9):
            if targets[b, t] >= 0:
                wrong = logits[b, t].argmax() != targets[b, t]
                terms.append(-(score[b, t] if wrong else 1 - score[b, t]).log().item() + 0.1 * correction[b,
                        t].item() ** 2)
    assert losses["uncertainty"].item() == pytest.approx(sum(terms) / len(terms), rel=1e-7)
    assert list(model.eval()(idx, targets)[1]) == ["ce"]


def test_without_a_target_the_loss_is_0():
    model, idx = build(), tokens(4, 9)
    loss = model(idx, torch.full_like(idx, -1))[1]["uncertainty"]
    loss.backward()
    assert loss == 0 and all(p.grad.eq(0).all() for p in model.extras.parameters())


@pytest.mark.parametrize("tie", (False, True))
def test_its_gradient_stays_in_the_head(tie):
    model, idx = build(tie_embeddings=tie, thought_tokens=2), tokens(4, 9)
    model(idx, tokens(4, 9))[1]["uncertainty"].backward()
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("extras"))
    assert all(p.grad.abs().sum() > 0 for p in model.extras.parameters())
    h = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(3, 29, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(sum(model.extras["uncertainty"](h, logits)).sum(), (h, logits),
                               allow_unused=True) == (None, None)


@pytest.mark.deep
def test_it_learns_where_the_model_is_wrong():
    """A model that always says 0 at 0.9 and is wrong after half of the tokens: the score of each token is
    what the loss asks for.
    """
    model = GPT(GPTConfig(**SMALL))
    with torch.no_grad(): # h is the embedding alone
        for block in model.blocks:
            block.attention.out.weight.zero_(), block.mlp.down.weight.zero_()
    p = math.exp(5.5) / (math.exp(5.5) + 28)
    model.logits = lambda h: F.pad(torch.full((*h.shape[:-1], 1), 5.5), (0, 28))
    head, idx = model.extras["uncertainty"], tokens(64, 16)
    opt = torch.optim.Adam(head.parameters(), 1e-2)
    for _ in range(300):
        opt.zero_grad()
        head.loss(model, model.trunk(idx), idx, (idx >= 14).long(), {}).backward()
        opt.step()
    score = model.uncertainty(model.trunk(torch.arange(29)[:, None])).squeeze(1)

    # of one place: where the slope sigmoid(z) - wrong + 2 * 0.1 k of the loss is 0, by halving
    def best(wrong):
        low, high = -20.0, 20.0
        for _ in range(60):
            k = (low + high) / 2
            said = 1 / (1 + math.exp(math.log(p / (1 - p)) - k))
            low, high = (low, k) if said - wrong + 0.2 * k > 0 else (k, high)
        return said

    assert best(1) > 5 * (1 - p) > best(0) * 5
    # as far as 300 steps get
    torch.testing.assert_close(score, torch.tensor([best(0)] * 14 + [best(1)] * 15), atol=0.03, rtol=0)


# --- writing ---


@pytest.mark.parametrize("stop", ((), (3, 4)))
@pytest.mark.parametrize("sampling",
        [dict(), dict(temperature=0), dict(temperature=0.7, top_k=9, top_p=0.9, min_p=0.01)], ids=str)
def test_the_text_is_generates_and_the_scores_are_the_heads(sampling, stop):
    """Past block_size, three rows; each score from a full forward over the window that the token was drawn
    from.
    """
    model, idx = build(attention="diff_mla"), tokens(3, 5)
    ids, scores = model.generate_with_uncertainty(idx, 40, **sampling,
                                                  generator=torch.Generator().manual_seed(7), stop=iter(stop))
    assert torch.equal(ids,
            model.generate(idx, 40, **sampling, generator=torch.Generator().manual_seed(7), stop=stop))
    assert scores.shape == (3, ids.size(1) - 5) and ids.size(1) > 20 - 10 * bool(stop) and model.training
    model.eval()
    for b, row in enumerate(ids):
        for i, score in enumerate(scores[b]):
            n = 5 + i
            ended = any(token in stop for token in row[5:n].tolist())
            start = 0 if n <= 16 else -(-(n - 16) // 8) * 8
            want = 0.0 if ended else model.uncertainty(model.trunk(row[None, start:n]))[0, -1].item()
            assert score.item() == pytest.approx(want, abs=1e-9), (b, i)
    assert 0 < scores.max() - scores[scores > 0].min() and scores.min() >= 0 and scores.max() <= 1


def test_no_tokens_and_no_head():
    model, idx = build(), tokens(2, 5)
    ids, scores = model.generate_with_uncertainty(idx, 0)
    assert torch.equal(ids, idx) and scores.shape == (2, 0)
    plain = GPT(GPTConfig(**{**SMALL, "uncertainty": False}))
    for call in (lambda: plain.generate_with_uncertainty(idx, 3),
                 lambda: plain.uncertainty(torch.zeros(1, 32))):
        with pytest.raises(ValueError, match="train one with --uncertainty"):
            call()
    with pytest.raises(ValueError, match="drop use_cache=False and watch"):
        model.generate(idx, 3, speculative=True, watch=print)


# --- the command lines ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run of a few steps, "o"."""
    d = tmp_path_factory.mktemp("unsure")
    (d / "play.txt").write_text("to be or not to be, that is the question\n" * 60, encoding="utf-8")
    flags = ("--dataset=play.txt --tokenizer=byte --uncertainty --out_dir=o --n_layer=1 --n_head=2 "
             "--n_embd=32 --block_size=16 --max_iters=30 --learning_rate=1e-2 --warmup_iters=5").split()
    done = run([ROOT / "train.py", *flags], cwd=d)
    assert done.returncode == 0, done.stderr
    return d


def sample(folder, *flags, code=0):
    done = run([ROOT / "sample.py", f"--out_dir={folder / 'o'}", *flags])
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return done


def test_sample_prints_a_line_a_token(trained):
    """The same text as without; each number the score of a full forward, also of a token that was drafted."""
    flags = "--start=to be", "--max_new_tokens=30", "--temperature=0.5"
    plain, ours, drafted = (sample(trained, *flags, *more).stdout for more in
                            ([], ["--uncertainty"], ["--uncertainty", "--speculative"]))
    model = GPT.from_checkpoint(trained / "o/best.pt")
    for out in (ours, drafted):
        rows = [line.split("  ", 1) for line in out.split("\n") if line[:2] in ("0.", "1.")]
        text = "".join(eval(shown) for _, shown in rows)
        assert "to be\n0." in out and "\033" not in out and len(text) == 30
        assert out == drafted or plain.endswith("to be" + text + "\n")
        ids = list(b"to be" + text.encode())
        for i, (number, shown) in enumerate(rows[:11]):
            assert len(eval(shown)) == 1 # bytes of English: each is a character
            score = model.uncertainty(model.trunk(torch.tensor([ids[: 5 + i]])))[0, -1].item()
            assert float(number) == pytest.approx(score, abs=0.0051) # two digits


def test_sample_prints_several_rows(trained):
    out = sample(trained, "--start=to be", "--max_new_tokens=9", "--uncertainty", "--num_samples=2").stdout
    parts = out[out.index("to be\n0.") :].split("---------------\n")
    assert len(parts) == 3 and parts[2] == ""
    assert all(part.startswith("to be\n") and part.count("\n") == 10 for part in parts[:2])


def on_a_terminal(folder, *flags, no_color=None):
    """stdout of sample.py where it is a terminal."""
    ours, theirs = pty.openpty()
    process = start([ROOT / "sample.py", f"--out_dir={folder / 'o'}", *flags], stdout=theirs,
                    env={"NO_COLOR": no_color})
    os.close(theirs)
    out = b""
    try:
        while chunk := os.read(ours, 4096):
            out += chunk
    except OSError: # how Linux says that the other side has closed
        pass
    os.close(ours)
    assert process.wait(60) == 0
    return out.decode().replace("\r\n", "\n")


def test_sample_colours_a_terminal(trained):
    """Each token has the shade of its score; below 0.2, and at a line end, none."""
    flags = "--start=to be", "--max_new_tokens=30", "--temperature=1.5", "--uncertainty"
    numbers, colours = sample(trained, *flags).stdout, on_a_terminal(trained, *flags)
    want = "to be"
    for line in numbers[numbers.index("to be\n0.") + 6 :].splitlines():
        score, text = float(line[:4]), eval(line[6:])
        shade = [0, 230, 222, 215, 203][sum(score >= edge for edge in (0.2, 0.4, 0.6, 0.8))]
        want += f"\033[30;48;5;{shade}m{text}\033[0m" if shade and text not in ("", "\n") else text
    assert colours == want + "\n" and "\033[30;48" in want
    assert "\033" not in on_a_terminal(trained, *flags, no_color="1")


def test_a_character_of_three_tokens_has_one_score(trained, tmp_path):
    """The bytes of the euro sign, one after the other: a line a character, not a line a byte."""
    state = load_checkpoint(trained / "o/best.pt")
    model = GPT(GPTConfig(**{**state["config"]["model"], "tie_embeddings": False}))
    model.load_state_dict({**state["model"], "head.weight": state["model"]["embed.weight"].clone()})
    a, b, c = "\u20ac".encode()
    # the head looks up the embedding of the token just read, in one block that does nothing
    with torch.no_grad():
        for p in (model.blocks[0].attention.out.weight, model.blocks[0].mlp.down.weight, model.embed.weight,
                  model.head.weight):
            p.zero_()
        # of the second least
        for axis, (now, after, sure) in enumerate([(10, a, 0.9), (a, b, 0.6), (b, c, 0.8), (c, a, 0.9)]):
            model.embed.weight[now, axis], model.head.weight[after, axis] = 1, sure
    state["model"], state["config"]["model"]["tie_embeddings"] = model.state_dict(), False
    (tmp_path / "o").mkdir()
    save_checkpoint(tmp_path / "o/ckpt.pt", state)
    out = sample(tmp_path, "--max_new_tokens=9", "--temperature=0", "--uncertainty").stdout
    lines = [line for line in out.splitlines() if line.endswith("'\u20ac'")]
    ids = [10, a, b, c]
    scores = model.eval().uncertainty(model.trunk(torch.tensor([ids])))[0]
    assert scores[:3].argmax() == 1 and len(lines) == 3 and lines[0].startswith(f"{scores[:3].max():.2f}  ")


def test_commands_without_the_head(trained, tmp_path):
    state = load_checkpoint(trained / "o/best.pt")
    state["model"] = {k: v for k, v in state["model"].items() if not k.startswith("extras")}
    state["config"]["model"]["uncertainty"] = False
    (tmp_path / "o").mkdir()
    save_checkpoint(tmp_path / "o/best.pt", state)
    assert "train one with --uncertainty" in sample(tmp_path, "--uncertainty", code=2).stderr
    for folder, words in (("o", "train one with --uncertainty"), ("none", "--uncertainty")):
        flags = ["--save=false", f"--out_dir={tmp_path / folder}"]
        done = run([ROOT / "bench.py", "uncertainty", *flags], cwd=trained) # beside the run's data
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_bench_reports_all_of_the_split_but_the_slice(trained):
    """Each figure again from full forwards over the windows, without bench's loop."""
    flags = [f"--out_dir={trained / 'o'}", "--save=false", "--batch_size=2"]
    done = run([ROOT / "bench.py", "uncertainty", *flags], cwd=trained)
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.strip().splitlines()[-1])
    by_name = {r["name"]: r["value"] for r in last["results"]}
    model = GPT.from_checkpoint(trained / "o/best.pt")
    # the last tenth
    ids = torch.tensor(list(("to be or not to be, that is the question\n" * 60).encode()))[-246:]
    windows = [ids[i : i + 17] for i in range(0, 245, 16)] # the last one is shorter
    p, score, right, at_T, score_at_T, T = [], [], [], [], [], by_name["T"]
    with torch.no_grad():
        # batches of two, the last window alone in its own
        for window in (w for i, w in enumerate(windows) if i // 2 % 10):
            logits, _ = model(window[None, :-1], window[None, 1:])
            p.append(logits[0].double().softmax(-1).amax(-1))
            score.append(1 - model.uncertainty(model.trunk(window[None, :-1]))[0].double())
            at_T.append((logits[0].double() / T).softmax(-1).amax(-1))
            odds = score[-1].logit() + at_T[-1].logit() - p[-1].logit() # what the head adds stays
            score_at_T.append(odds.sigmoid())
            right.append(logits[0].argmax(-1) == window[1:])
    p, score, right, at_T, score_at_T = map(torch.cat, (p, score, right, at_T, score_at_T))
    assert len(right) == 213 and "213 targets" in done.stdout and "from the other 32" in done.stdout
    assert by_name["accuracy"] == pytest.approx(right.double().mean().item(), abs=1e-9)
    for name, confidence in (("max p", p), ("max p at T", at_T), ("head", score), ("head at T", score_at_T)):
        assert by_name[f"{name}, ECE"] == pytest.approx(ece_loop(confidence, right, 15, False), abs=1e-6)
        assert by_name[f"{name}, ECE, equal mass"] == pytest.approx(ece_loop(confidence, right, 15, True),
                                                                    abs=1e-6)
        brier = (confidence - right.double()).square().mean().item()
        assert by_name[f"{name}, Brier"] == pytest.approx(brier, abs=1e-6)
        assert by_name[f"{name}, AUROC"] == pytest.approx(auroc(confidence, right), abs=1e-4)
        # "head, 1,234 said 0.567"
        table = [n.split(" ")[-3] for n in by_name if n.startswith(f"{name}, ") and " said " in n]
        assert sum(int(count.replace(",", "")) for count in table) == 213
    assert by_name["T"] != 1 and by_name["head, Brier"] != by_name["max p, Brier"]
