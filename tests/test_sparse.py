"""Sparse training: which weights go and grow back, against brute force; counts are exact, zeros stay zero."""
import numpy as np
import pytest
import torch

from model import GPT, GPTConfig
from optim import OPTIMIZERS, Sparse, build_optimizer, run_update_hooks

PHASE = (2, 100)
SMALL = dict(vocab_size=17, block_size=8, n_layer=2, n_head=2, n_embd=16)


def start(method="skeleton_flesh", name="adamw", lr=1e-2, **knobs):
    torch.manual_seed(3)
    model = GPT(GPTConfig(**SMALL, tie_embeddings=False))
    opt = build_optimizer(model, name, lr, 0.1, (0.9, 0.95))
    settings = {"density": 0.3, "interval": 5, "phase": PHASE, **knobs}
    return model, opt, Sparse(model, opt, method, **settings)


def gradient(model, seed):
    idx = torch.randint(17, (4, 9), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    model(idx[:, :-1], idx[:, 1:])[1]["ce"].backward()


def steps(model, opt, sparse, first, last):
    for step in range(first, last):
        sparse.choose(step)
        gradient(model, step)
        sparse.mask_gradients(step)
        opt.step()
        sparse.finish(step)


def flat(tensors):
    return np.concatenate([t.detach().numpy().ravel() for t in tensors])


@pytest.mark.parametrize("method, name", [ # by default each method and each optimizer once
    pytest.param(method, name, marks=() if (method == "magnitude") == (name != "adamw") else pytest.mark.deep)
    for method in Sparse.METHODS for name in OPTIMIZERS])
def test_density_falls_to_its_target_in_whole_numbers_and_zeros_stay(method, name):
    model, opt, sparse = start(method, name)
    active, counts = sparse.total, []
    for step in range(60):
        before = sparse.active()
        chosen = sparse.choose(step)
        assert chosen == (2 < step and (step - 2) % 5 == 0)
        gradient(model, step)
        sparse.mask_gradients(step)
        opt.step()
        sparse.finish(step)
        if chosen:
            pruned = round(0.3 * active)
            active += max(sparse.target - (active - pruned), pruned // 2) - pruned
            counts.append(sparse.active())
            assert counts[-1] == active <= before
        masks, weights = flat(sparse.masks), flat(sparse.params)
        assert masks.sum() == sparse.active() and (weights[~masks] == 0).all()
        for p, m in zip(sparse.params, sparse.masks): # a weight that is off has no moment in the optimizer
            for value in opt.state[p].values():
                assert not torch.is_tensor(value) or value.shape != p.shape or (value[~m] == 0).all()
    assert counts[-1] == sparse.target == round(0.3 * sparse.total)
    assert sparse.reached and sparse.density() == counts[-1] / sparse.total
    assert np.isfinite(flat(model.parameters())).all() and len(set(counts)) > 5
    pruned = {*sparse.params}
    assert model.embed.weight not in pruned and model.head.weight in pruned


def test_signal_to_noise_against_numpy():
    """What the tracker holds after a window is the mean and the deviation of the weights that were seen."""
    model, opt, sparse = start()
    seen = []
    for step in range(7):
        steps(model, opt, sparse, step, step + 1)
        if step >= 2:
            seen.append(flat(sparse.params).astype(np.float64))
    scores = np.abs(np.mean(seen, 0)) / np.sqrt(np.var(seen, 0) + 1e-8)
    before = flat(sparse.masks)
    assert sparse.choose(7) and before.all()
    gone = ~flat(sparse.masks)
    k = round(0.3 * sparse.total)
    assert gone.sum() == k and scores[gone].max() <= scores[~gone].min() * (1 + 1e-4)
    assert (flat(sparse.means) == 0).all() and sparse.steps == 0 # the next window starts anew


def test_magnitude_takes_the_smallest():
    model, opt, sparse = start("magnitude")
    steps(model, opt, sparse, 0, 7)
    size = np.abs(flat(sparse.params))
    sparse.choose(7)
    gone = ~flat(sparse.masks)
    assert size[gone].max() <= size[~gone].min() and sparse.to_grow == 0
    assert gone.sum() == sparse.total - start()[2].next_count(sparse.total)


def test_growth_follows_the_dense_gradient_and_starts_from_nothing():
    model, opt, sparse = start()
    steps(model, opt, sparse, 0, 12)
    sparse.choose(12)
    off, to_grow = ~flat(sparse.masks), sparse.to_grow
    gradient(model, 12)
    size = np.abs(flat(p.grad for p in sparse.params))
    sparse.mask_gradients(12)
    grown = flat(sparse.masks) & off
    assert grown.sum() == to_grow > 0 and size[grown].min() >= size[off & ~grown].max()
    assert (flat(sparse.params)[grown] == 0).all()
    for p, m, i in zip(sparse.params, sparse.masks, sparse.flesh):
        assert all((opt.state[p][moment].view(-1)[i] == 0).all() for moment in ("exp_avg", "exp_avg_sq"))
        assert (p.grad[~m] == 0).all()


def test_the_boost_multiplies_what_the_optimizer_did():
    """Adam would divide a factor on the gradient away; this one stays, and touches the flesh alone."""
    ends = []
    for boost in (1.0, 4.0):
        model, opt, sparse = start(boost=boost, boost_steps=3)
        steps(model, opt, sparse, 0, 8) # the choice at 7
        ends.append((flat(sparse.params), [i.clone() for i in sparse.flesh], sparse))
    (plain, flesh, sparse), (boosted, same, _) = ends
    young = np.zeros_like(plain, dtype=bool)
    offset = 0
    for i, p in zip(flesh, sparse.params):
        young[offset + i.numpy()] = True
        offset += p.numel()
    assert all(torch.equal(a, b) for a, b in zip(flesh, same))
    assert young.any() and np.abs(plain[young]).min() > 0
    np.testing.assert_allclose(boosted[young], 4 * plain[young], rtol=1e-5) # they start at 0
    assert (boosted[~young] == plain[~young]).all()
    model, opt, sparse = start(boost=4.0, boost_steps=3)
    steps(model, opt, sparse, 0, 10)
    sparse.mask_gradients(10)
    assert sparse.before == [] # three steps and no more


def test_a_gradient_that_is_not_finite_chooses_nothing():
    model, opt, sparse = start()
    steps(model, opt, sparse, 0, 7)
    sparse.choose(7)
    gradient(model, 7)
    sparse.params[1].grad[0, 0] = float("nan")
    left, due = sparse.active(), sparse.to_grow
    sparse.mask_gradients(7)
    assert sparse.active() == left and sparse.to_grow == due > 0
    gradient(model, 8) # the step was skipped; the next batch decides
    sparse.mask_gradients(8)
    assert sparse.active() == left + due and sparse.to_grow == 0


def test_density_one_is_dense_training():
    model, opt, sparse = start(density=1.0)
    steps(model, opt, sparse, 0, 30)
    plain, adam = start()[:2]
    for step in range(30):
        gradient(plain, step)
        adam.step()
    assert sparse.active() == sparse.total
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters()))


def test_ties_do_not_grow_the_count():
    _, _, sparse = start()
    found = sparse.lowest([torch.zeros(5, 3), torch.zeros(4), torch.ones(2)], 7)
    assert sum(len(i) for i in found) == 7 and [len(i) for i in found][2] == 0
    found = sparse.lowest([torch.tensor([5.0, 1.0]), torch.tensor([[0.0], [7.0], [2.0]])], 3)
    assert [i.tolist() for i in found] == [[1], [0, 2]]


@pytest.mark.parametrize("knobs, said", [
    ({"density": 0.0}, "must be above 0"), ({"density": 1.5}, "must be above 0"),
    ({"prune_rate": 1.0}, "between 0 and 1"), ({"interval": 0}, "at least 1"),
    ({"boost": -1.0}, "not be negative"),
    ({"density": 0.01, "interval": 5}, "sparse_interval=3 or less"),
    ({"method": "random"}, "not one of: skeleton_flesh, magnitude")], ids=str)
def test_refusals(knobs, said):
    with pytest.raises(ValueError, match=said):
        start(**knobs)


@pytest.mark.parametrize("method", Sparse.METHODS)
def test_layers_that_no_token_reached_have_no_gradient(method):
    """With depths, in a batch where no token goes on. Their weights count and are chosen like all others."""
    torch.manual_seed(3)
    model = GPT(GPTConfig(**SMALL, depths=(1, 2)))
    model.routers[0].gate.bias.data.fill_(-100.0)
    opt = build_optimizer(model, "adamw", 1e-2, 0.1, (0.9, 0.95))
    sparse = Sparse(model, opt, method, density=0.3, interval=5, phase=PHASE)
    steps(model, opt, sparse, 0, 60)
    assert model.blocks[1].mlp.up.weight.grad is None and sparse.reached
    assert all((p[~m] == 0).all() for p, m in zip(sparse.params, sparse.masks))

    def shrink(step, params): # README's, which does not ask whether there is a gradient
        for p in params.values():
            p.grad.mul_(0.5)
        return {"by": 2}

    assert run_update_hooks([("shrink", shrink)], 0, dict(model.named_parameters())) == {"shrink": {"by": 2}}


@pytest.mark.parametrize("knobs, name", [
    pytest.param(knobs, name, marks=() if (name == "adamw") == (i == 0) else pytest.mark.deep)
    for i, knobs in enumerate([{"n_ahead": 3}, {"uncertainty": True}]) for name in OPTIMIZERS], ids=str)
def test_what_learns_beside_the_model_is_not_in_its_budget(knobs, name):
    """With and without it, training chooses equal weights and ends in equal bits, dropout included."""
    ends = []
    for more in ({}, knobs):
        torch.manual_seed(3)
        model = GPT(GPTConfig(**SMALL, mlp_hidden=64, dropout=0.1, **more))
        opt = build_optimizer(model, name, 1e-2, 0.1, (0.9, 0.95))
        sparse = Sparse(model, opt, "magnitude", density=0.5, interval=5, phase=PHASE)
        for step in range(30):
            sparse.choose(step)
            idx = torch.randint(17, (4, 9), generator=torch.Generator().manual_seed(step))
            model.zero_grad()
            sum(model(idx[:, :-1], idx[:, 1:])[1].values()).backward()
            sparse.mask_gradients(step)
            opt.step()
            sparse.finish(step)
        state = model.state_dict()
        ends.append({k: v for k, v in state.items() if not k.startswith("extras.")})
        assert sparse.reached and (len(ends[-1]) < len(state)) == bool(more)
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])
