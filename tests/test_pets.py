"""The mathematics of algos/pets.py against slow and obvious references."""

import itertools
import math
import shutil

import gymnasium as gym
import helpers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

pets = helpers.module("pets")
Args = pets.Args
BOX = gym.spaces.Box(np.array([-2.0, 0.5], np.float32), np.array([1.0, 3.0], np.float32))
CPU = torch.device("cpu")


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ensemble(members=3, state=3, action=2, layers=2, hidden=8, unread=0, seconds=1.0, probabilistic=True, heads=False):
    torch.manual_seed(0)
    model = pets.Ensemble(members, state, action, layers, hidden, unread, seconds, probabilistic, heads, heads)
    with torch.no_grad():
        for bias in model.biases:  # else a wrong one would not show
            bias.normal_()
    model.target_scale.copy_(model.target_unit)  # as if all had been seen to move
    return model


def transitions(n, state=3, action=2, seed=0, capacity=None):
    rng = np.random.default_rng(seed)
    boxes = gym.spaces.Box(-9, 9, (state,)), gym.spaces.Box(-1, 1, (action,))
    buffer = pets.ReplayBuffer(capacity or n + 1, *boxes)
    for i in range(n):
        s, a = rng.normal(2, 3, state), rng.uniform(-1, 1, action)
        buffer.add(s, a, rng.normal(), s + 0.1 * a.sum() + 0.01 * rng.normal(size=state), i % 14 == 13, i % 7 == 6)
    return buffer


# ── The ensemble ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("probabilistic", "heads"), itertools.product([True, False], [True, False]))
def test_the_ensemble_is_its_members_one_by_one(probabilistic, heads):
    model = ensemble(probabilistic=probabilistic, heads=heads)
    model.input_mean.normal_()
    model.input_std.uniform_(0.5, 2.0)
    x, size = numbers(3, 7, 5), 3 + heads
    if probabilistic:
        with torch.no_grad():
            model.max_logvar.uniform_(-1, 1)
            model.min_logvar.uniform_(-6, -4)
    for mode in (torch.enable_grad, torch.inference_mode):
        with mode():
            kept = x.clone()
            mean, logvar, logit = model(x)
            assert torch.equal(x, kept)
            for b in range(3):
                y = (x[b] - model.input_mean) / model.input_std
                for i in range(3):
                    y = F.linear(y, model.weights[i][b].T, model.biases[i][b, 0])
                    y = y * torch.sigmoid(y) if i < 2 else y
                assert torch.allclose(mean[b], y[:, :size], atol=1e-5)
                if heads:
                    assert torch.allclose(logit[b], y[:, -1], atol=1e-5)
                if not probabilistic:
                    assert logvar is None and y.shape[1] == size + heads
                    continue
                assert y.shape[1] == 2 * size + heads
                for n, d in itertools.product(range(7), range(size)):
                    high, low, v = (t.item() for t in (model.max_logvar[d], model.min_logvar[d], y[n, size + d]))
                    v = high - math.log1p(math.exp(high - v))
                    v = low + math.log1p(math.exp(v - low))
                    assert logvar[b, n, d].item() == pytest.approx(v, abs=1e-4)


@given(st.floats(-200, 200))
def test_the_variance_stays_between_its_bounds(raw):
    model = ensemble(members=1, state=1, action=1, layers=1)
    with torch.no_grad():
        model.weights[-1].zero_()
        model.biases[-1].fill_(raw)
        logvar = model(torch.zeros(1, 1, 2))[1].item()
    assert -10 - 1e-4 <= logvar <= 0.5 + 1e-4
    if abs(raw) < 200 and -6 < raw < -4:
        assert logvar == pytest.approx(raw, abs=0.03)


def test_weights_start_as_truncated_normals():
    model = pets.Ensemble(4, 30, 10, 2, 300, 0, 1.0, True, False, False)
    assert [tuple(w.shape) for w in model.weights] == [(4, 40, 300), (4, 300, 300), (4, 300, 60)]
    for w, b in zip(model.weights, model.biases, strict=True):
        std = 1 / (2 * math.sqrt(w.shape[1]))
        assert w.abs().max() <= 2 * std
        # what is left of a unit normal within ±2 has the deviation 0.8796
        assert w.std().item() == pytest.approx(0.8796 * std, rel=0.02)
        assert b.abs().max() == 0
        assert (w[0] - w[1]).abs().mean() > std / 2  # no two members alike
    assert model.max_logvar.tolist() == [0.5] * 30 and model.min_logvar.tolist() == [-10.0] * 30


@pytest.mark.parametrize(("probabilistic", "heads"), itertools.product([True, False], [True, False]))
def test_the_loss_is_the_sum_written_out(probabilistic, heads):
    model = ensemble(probabilistic=probabilistic, heads=heads)
    x, y, ended = numbers(3, 6, 5), numbers(3, 6, 3 + heads, seed=1), (numbers(3, 6, seed=2) > 0).float()
    loss = pets.ensemble_loss(model, x, y, ended)
    mean, logvar, logit = model(x)
    expected = 0.0
    for b, n in itertools.product(range(3), range(6)):
        for d in range(3 + heads):
            error = (mean[b, n, d] - y[b, n, d]).item()
            if probabilistic:
                v = math.exp(logvar[b, n, d].item())
                expected += (error**2 / v + math.log(v)) / 6 / (3 + heads)
            else:
                expected += 0.5 * error**2 / 6 / (3 + heads)
        if heads:
            p = 1 / (1 + math.exp(-logit[b, n].item()))
            expected -= math.log(p if ended[b, n] else 1 - p) / 6
    if probabilistic:  # both bounds have a coordinate each
        expected += 0.01 * (3 + heads) * 0.5 + 0.01 * (3 + heads) * 10
    assert loss.item() == pytest.approx(expected, abs=1e-4)


def test_eq_1_is_the_gaussian_likelihood():
    """Up to a factor of 2 and a constant."""
    model = ensemble(members=1)
    x, y = numbers(1, 50, 5), numbers(1, 50, 3, seed=1)
    mean, logvar, _ = model(x)
    nll = -torch.distributions.Normal(mean, (0.5 * logvar).exp()).log_prob(y).mean()
    bounds = 0.01 * (model.max_logvar - model.min_logvar).sum()
    loss = pets.ensemble_loss(model, x, y, torch.zeros(1, 50)) - bounds
    assert loss.item() == pytest.approx(2 * nll.item() - math.log(2 * math.pi), abs=1e-4)


@pytest.mark.parametrize("decays", [(0.3, 0.2, 0.1), (0.25,)])
def test_weight_decay_is_the_papers_l2(decays):
    """Three steps of Adam with parameter groups are three steps on the loss plus ½ λ ‖w‖², biases left alone."""
    args = Args()
    x, y, ended = numbers(3, 6, 5), numbers(3, 6, 3, seed=1), torch.zeros(3, 6)
    ours, theirs = ensemble(), ensemble()
    optimizer = pets.make_optimizer(ours, decays, args.learning_rate)
    plain = torch.optim.Adam(theirs.parameters(), args.learning_rate)
    for _ in range(3):
        optimizer.zero_grad()
        pets.ensemble_loss(ours, x, y, ended).backward()
        optimizer.step()
        plain.zero_grad()
        loss = pets.ensemble_loss(theirs, x, y, ended)
        for w, decay in zip(theirs.weights, decays * (3 if len(decays) == 1 else 1), strict=True):
            loss = loss + 0.5 * decay * w.square().sum()
        loss.backward()
        plain.step()
    for name, value in theirs.named_parameters():
        assert torch.allclose(ours.get_parameter(name), value, atol=1e-6), name
    assert not torch.allclose(ours.weights[0], ensemble().weights[0], atol=1e-4)


class Silent:
    def mean(self, *_):
        pass


def test_bootstraps_are_fixed_through_a_training_and_new_in_the_next(monkeypatch):
    buffer, seen = transitions(100), []
    for i in range(100):
        buffer.data.obs[i, 0] = i  # the row's number
    loss = pets.ensemble_loss

    def spy(model, x, y, ended):
        seen.append(x[..., 0].round().long())
        return loss(model, x, y, ended)

    monkeypatch.setattr(pets, "ensemble_loss", spy)
    args, model, trainings = Args(epochs=3, batch_size=32, layers=2, weight_decay=(0.0,)), ensemble(), []
    np.random.seed(0)
    for _ in range(2):
        optimizer = pets.make_optimizer(model, args.weight_decay, args.learning_rate)
        pets.fit_ensemble(model, optimizer, buffer, args, Silent(), lambda: False)
        assert [batch.shape for batch in seen] == [(3, n) for n in (32, 32, 32, 4)] * 3  # the rest is learned from too
        epochs = [torch.cat(seen[i : i + 4], 1) for i in (0, 4, 8)]
        in_order = [epoch.sort(1).values for epoch in epochs]
        assert torch.equal(in_order[0], in_order[1]) and torch.equal(in_order[0], in_order[2])
        assert not torch.equal(epochs[0], epochs[1])  # shuffled all the same
        assert not torch.equal(in_order[0][0], in_order[0][1])
        trainings.append(in_order[0])
        seen.clear()
    assert not torch.equal(*trainings)
    for member in torch.cat(trainings):
        assert 50 <= len(member.unique()) <= 76  # of 100 rows drawn 100 times: 63 on average


def test_a_signal_cuts_a_training_short():
    args, model = Args(epochs=3, layers=2), ensemble()
    before = [w.clone() for w in model.weights]
    optimizer = pets.make_optimizer(model, (0.0,), 1e-3)
    assert not pets.fit_ensemble(model, optimizer, transitions(50), args, Silent(), lambda: True)
    assert all(torch.equal(w, v) for w, v in zip(model.weights, before, strict=True))


@pytest.mark.parametrize("heads", [False, True])
def test_inputs_are_normalised_and_targets_are_not(heads):
    buffer, model = transitions(500), ensemble(unread=1, seconds=0.05, heads=heads)
    buffer.data.obs[:, 2] = 4.0  # a coordinate that never moves
    buffer.data.next_obs[:, 2] = 4.0
    data = buffer.rows(np.arange(500))
    model.set_normalizer(data)
    x = np.concatenate([data.obs[:, 1:], data.action], 1).astype(np.float64)
    assert model.input_mean.numpy() == pytest.approx(x.mean(0), abs=1e-5)
    assert model.input_std.numpy() == pytest.approx(np.where(x.std(0) < 1e-6, 1, x.std(0)), rel=1e-4)
    change = (data.next_obs - data.obs).numpy()
    change[:, 0] /= 0.05  # a position that is not read: its speed
    y = np.concatenate([change, data.reward[:, None]], 1) if heads else change
    assert model.targets(data).numpy() == pytest.approx(y, abs=1e-5)
    assert model.target_scale.tolist() == pytest.approx([0.05, 1, 0, 1][: 3 + heads])
    buffer.data.next_obs[:, 2] = 4.02  # a clock: what changes always alike is predicted
    buffer.data.reward[:] = 1.0
    model.set_normalizer(buffer.rows(np.arange(300)))
    assert model.target_scale.tolist() == pytest.approx([0.05, 1, 1, 1][: 3 + heads])
    assert model.input_mean[0] != pytest.approx(x[:, 0].mean())  # of the new data


def test_gaussian_speaks_in_the_states_units():
    model = ensemble(unread=1, seconds=0.05)
    model.target_scale.copy_(torch.tensor([0.05, 1.0, 0.0]))
    s, a = numbers(3, 4, 3), numbers(3, 4, 2, seed=1)
    mean, logvar, _ = model(torch.cat([s[..., 1:], a], -1))
    m, std, _ = model.gaussian(s, a)
    unit = torch.tensor([0.05, 1.0, 0.0])
    assert torch.allclose(m, mean * unit) and torch.allclose(std, (0.5 * logvar).exp() * unit)
    s[..., 0] += 50  # where the body stands
    assert torch.equal(model.gaussian(s, a)[0], m)
    deterministic = ensemble(probabilistic=False)
    assert deterministic.gaussian(s, a)[1].abs().max() == 0


# ── Propagation ───────────────────────────────────────────────────────────────────────────────────────────────────


class LinearEnsemble:
    """Member b: s' ~ N(A_b s + a + c_b, σ²), what the closed forms below are for."""

    rewards, ends, unread, probabilistic = False, False, 0, True

    def __init__(self, matrices, shifts, noise):
        self.matrices, self.shifts, self.noise, self.members = matrices, shifts, noise, len(shifts)

    def gaussian(self, s, a):
        mean = torch.einsum("bij,bnj->bni", self.matrices, s) + a + self.shifts[:, None] - s
        return mean, torch.full_like(mean, self.noise), torch.zeros(s.shape[:-1])


def imagined(model, propagation, particles, actions, s, monkeypatch):
    """Particles [P, K, T, D] of the candidates' actions [K, T, A], all from one state."""
    monkeypatch.setitem(pets.TASKS, "Linear-v0", pets.Task(lambda s, a, s2: s2[..., 0]))
    args = Args(env_id="Linear-v0", propagation=propagation)
    predict = pets.propagator(args, model, particles)
    rows = actions.repeat(particles, 1, 1)
    states, _ = pets.imagine(predict, s.expand(len(rows), -1), rows)
    return states.unflatten(0, (particles, -1))


METHODS = ("TSinf", "TS1", "DS", "MM")


@pytest.mark.parametrize("propagation", METHODS)
def test_means_and_spreads_of_a_linear_world(propagation, monkeypatch):
    """All members share A, and differ in their shift: all methods have the mean A^t s + Σ A^i (a + c̄)."""
    torch.manual_seed(0)
    matrix = torch.tensor([[0.9, 0.3], [-0.2, 0.8]])
    shifts = torch.tensor([[0.3, 0.0], [0.1, -0.2], [-0.4, 0.2], [0.2, 0.1]])
    model = LinearEnsemble(matrix.repeat(4, 1, 1), shifts, 0.2)
    s, actions = torch.tensor([1.0, -1.0]), numbers(3, 6, 2, seed=1)
    states = imagined(model, propagation, 20_000, actions, s, monkeypatch)
    expected = s.expand(3, -1)
    for t in range(6):
        expected = expected @ matrix.T + actions[:, t] + shifts.mean(0)
        assert torch.allclose(states[:, :, t].mean(0), expected, atol=0.03)
    # The spread, with Var c the members' disagreement: TS∞ keeps its member, so that shifts add up; TS1, DS draw anew.
    c, persistent = torch.cov(shifts.T, correction=0), torch.zeros(2, 2)
    independent, power, total = torch.zeros(2, 2), torch.eye(2), torch.zeros(2, 2)
    for t in range(6):
        total = total + power
        noise = 0.04 * sum((torch.matrix_power(matrix, i) @ torch.matrix_power(matrix, i).T for i in range(t + 1)),
                           torch.zeros(2, 2))  # fmt: skip
        persistent = total @ c @ total.T + noise
        mixed = torch.diag(torch.diag(c)) if propagation in ("DS", "MM") else c
        step = mixed + 0.04 * torch.eye(2)
        if propagation == "MM":  # a Gaussian with independent coordinates, each step
            independent = torch.diag(torch.diag(matrix @ independent @ matrix.T + step))
        else:
            independent = matrix @ independent @ matrix.T + step
        power = matrix @ power
        spread = torch.cov(states[:, 0, t].T)
        assert torch.allclose(spread, persistent if propagation == "TSinf" else independent, atol=0.05, rtol=0.05)


def test_ts1_and_tsinf_differ_where_members_disagree_about_the_motion(monkeypatch):
    """With A_b = g_b: TS∞ ends at the mean of g_b^T s, TS1 at (mean g_b)^T s."""
    torch.manual_seed(0)
    gains = torch.tensor([0.5, 1.5])
    model = LinearEnsemble(gains[:, None, None], torch.zeros(2, 1), 0.0)
    ends = {m: imagined(model, m, 4_000, torch.zeros(1, 6, 1), torch.ones(1), monkeypatch)[:, 0, -1]
            for m in (*METHODS, "E")}  # fmt: skip
    assert ends["TSinf"].mean().item() == pytest.approx((0.5**6 + 1.5**6) / 2, abs=1e-4)
    assert sorted(ends["TSinf"].unique().tolist()) == pytest.approx([0.5**6, 1.5**6])
    for method in ("TS1", "DS", "MM"):
        assert ends[method].mean().item() == pytest.approx(1.0, abs=0.15), method
    assert len(ends["TS1"].unique()) == 7  # so many steps with the one, so many with the other
    assert ends["E"].unique().tolist() == [1.0]


def test_every_member_has_its_share_of_each_candidates_particles(monkeypatch):
    """TS1: of 6 particles of each candidate 2 meet each of 3 members, in every step others. TS∞: always the same."""
    model = LinearEnsemble(torch.zeros(3, 1, 1), torch.tensor([[1.0], [10.0], [100.0]]), 0.0)
    for method in ("TS1", "TSinf"):
        torch.manual_seed(0)
        states = imagined(model, method, 6, torch.zeros(50, 8, 1), torch.zeros(1), monkeypatch)[..., 0]
        assert (states.sort(0).values == torch.tensor([1, 1, 10, 10, 100, 100.0])[:, None, None]).all()
        same = (states == states[:, :1, :1]).float().mean().item()
        assert same == 1.0 if method == "TSinf" else same == pytest.approx(1 / 3, abs=0.1)


def test_ts1_gives_each_particle_its_own_next_state(monkeypatch):
    """Particles that changed places for the network come back to their own past."""
    model = LinearEnsemble(torch.ones(2, 1, 1), torch.zeros(2, 1), 0.0)
    monkeypatch.setitem(pets.TASKS, "Linear-v0", pets.Task(lambda s, a, s2: s2[..., 0]))
    predict = pets.propagator(Args(env_id="Linear-v0", propagation="TS1"), model, 4)
    s, a = torch.arange(12.0)[:, None], (torch.arange(3.0) / 10).repeat(4)[:, None]
    assert torch.allclose(predict(s, a)[0], s + a)


def test_the_mixture_has_the_moments_of_all_members():
    torch.manual_seed(0)
    model = LinearEnsemble(torch.eye(2).repeat(3, 1, 1), numbers(3, 2), 0.3)
    mean, std, _ = pets.all_members(model, torch.zeros(1, 2), torch.zeros(1, 2))
    drawn = model.shifts[torch.randint(3, (200_000,))] + 0.3 * torch.randn(200_000, 2)
    assert torch.allclose(mean[0], drawn.mean(0), atol=0.02) and torch.allclose(std[0], drawn.std(0), atol=0.02)


@pytest.mark.parametrize("propagation", [*METHODS, "E"])
def test_learned_reward_and_end_go_with_the_particle(propagation):
    model = ensemble(members=2, state=2, action=1, heads=True)
    predict = pets.propagator(Args(env_id="Unknown-v0", propagation=propagation), model, 4)
    with torch.no_grad():
        model.weights[-1].zero_()
        model.biases[-1].zero_()
        model.biases[-1][:, 0, :3] = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 5.0]])  # change of both, reward
        model.biases[-1][:, 0, 3:6] = -30.0  # hardly any noise
        model.biases[-1][:, 0, -1] = torch.tensor([1.0, -5.0])
        s2, r, ended = predict(torch.zeros(12, 2), torch.zeros(12, 1))
    assert s2.shape == (12, 2) and torch.allclose(s2.mean(0), torch.tensor([1.0, 2.0]), atol=0.05)
    if propagation == "TSinf":
        assert torch.allclose(r, torch.tensor([3.0] * 6 + [5.0] * 6), atol=0.05)
        assert ended.tolist() == [True] * 6 + [False] * 6
    elif propagation == "TS1":
        assert sorted(r.round().tolist()) == [3.0] * 6 + [5.0] * 6
        assert torch.equal(ended, r < 4)
    else:  # the mixture's reward, 4 ± 1, and the mean of the log-odds
        assert not ended.any()
        assert r.mean().item() == pytest.approx(4.0, abs=0.01 if propagation == "E" else 0.9)


# ── The planner ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_truncated_normal_is_a_normal_within_two_deviations():
    torch.manual_seed(0)
    z = pets.truncated_normal(100_000, device=CPU)
    assert z.abs().max() <= 2.0
    edges = torch.linspace(-2, 2, 21).tolist()
    cdf = [0.5 + 0.5 * math.erf(x / math.sqrt(2)) for x in edges]
    expected = torch.tensor([100_000 * (b - a) / (cdf[-1] - cdf[0]) for a, b in itertools.pairwise(cdf)])
    chi2 = ((torch.histc(z, 20, -2, 2) - expected).square() / expected).sum()
    assert chi2 < 60  # 19 degrees of freedom: p < 1e-5


def cem_by_hand(judge, mean, low, high, noises, elites, alpha, epsilon):
    """In plain numbers, one coordinate after the other."""
    steps, size = mean.shape
    mean = [[float(mean[t, i]) for i in range(size)] for t in range(steps)]
    var = [[((float(high[i]) - float(low[i])) ** 2) / 16 for i in range(size)] for t in range(steps)]
    rounds = 0
    for noise in noises:
        if rounds and max(max(row) for row in var) < epsilon:
            break
        rounds += 1
        samples = []
        for k in range(len(noise)):
            sample = torch.zeros(steps, size)
            for t, i in itertools.product(range(steps), range(size)):
                m = mean[t][i]
                constrained = min(((m - float(low[i])) / 2) ** 2, ((float(high[i]) - m) / 2) ** 2, var[t][i])
                sample[t, i] = m + math.sqrt(constrained) * float(noise[k, t, i])
            samples.append(sample)
        ranked = sorted(samples, key=lambda sample: -float(judge(sample[None])[0]))[:elites]
        for t, i in itertools.product(range(steps), range(size)):
            values = [float(sample[t, i]) for sample in ranked]
            centre = sum(values) / elites
            spread = sum((v - centre) ** 2 for v in values) / elites
            mean[t][i] = alpha * mean[t][i] + (1 - alpha) * centre
            var[t][i] = alpha * var[t][i] + (1 - alpha) * spread
    return torch.tensor(mean), rounds


@pytest.mark.parametrize(("alpha", "epsilon"), [(0.1, 0.0), (0.4, 0.0), (0.0, 0.15)])
def test_cem_is_the_officials_algorithm(alpha, epsilon, monkeypatch):
    low, high = torch.tensor(BOX.low), torch.tensor(BOX.high)
    target, asked = torch.tensor([0.6, 2.9]), []
    torch.manual_seed(0)
    noises = [pets.truncated_normal(40, 3, 2, device=CPU) for _ in range(5)]
    monkeypatch.setattr(pets, "truncated_normal", lambda *shape, device: noises[len(asked)])

    def judge(actions):
        return -(actions - target).square().sum((1, 2))

    def count(actions):
        asked.append(actions)
        return judge(actions)

    args = Args(candidates=40, elites=6, iterations=5, alpha=alpha, epsilon=epsilon)
    start = torch.tensor([[-1.5, 1.0], [0.9, 2.0], [-0.5, 1.75]])
    mean, best = pets.cem(count, start, low, high, args)
    expected, rounds = cem_by_hand(judge, start, low, high, noises, 6, alpha, epsilon)
    assert torch.allclose(mean, expected, atol=1e-4)
    assert len(asked) == rounds and (rounds < 5) == (epsilon > 0)
    assert best.item() == pytest.approx(judge(asked[-1]).max().item())
    for actions in asked:
        assert (actions >= low).all() and (actions <= high).all()


def test_cem_finds_the_best_of_a_smooth_world():
    torch.manual_seed(0)
    low, high = torch.tensor(BOX.low), torch.tensor(BOX.high)
    target = torch.tensor([[0.6, 2.9], [-1.9, 0.6], [0.0, 1.0]])
    args = Args(candidates=400, elites=40, iterations=10, epsilon=0.0)
    middle = ((low + high) / 2).repeat(3, 1)
    mean, best = pets.cem(lambda x: -(x - target).square().sum((1, 2)), middle, low, high, args)
    assert torch.allclose(mean, target, atol=0.1) and -0.05 < best <= 0


def point_mass(s, a):
    """A world with an end: s = (position, speed); beyond 1 the episode is over."""
    s2 = torch.stack([s[..., 0] + s[..., 1], s[..., 1] + a[..., 0]], -1)
    return s2, -(s2[..., 0] - 0.7).square() - 0.1 * a[..., 0].square() + a[..., 1], s2[..., 0] > 1.0


def test_the_planner_goes_on_with_its_plan_and_a_new_episode_does_not():
    args = Args(candidates=50, elites=5, horizon=4, epsilon=0.0)
    torch.manual_seed(0)
    planner = pets.Planner(point_mass, 1, BOX, args, CPU)
    assert torch.allclose(planner.mean, torch.tensor([-0.5, 1.75]).repeat(4, 1))  # the middle of the box
    plan, _ = planner.plan(np.zeros(2))
    # shifted by one, and the official code's 0 at the end: clipped where the box has none
    assert torch.equal(planner.mean, torch.stack([plan[1], plan[2], plan[3], torch.tensor([0.0, 0.5])]))
    assert torch.allclose(pets.Planner(point_mass, 1, BOX, args, CPU).mean[0], torch.tensor([-0.5, 1.75]))
    torch.manual_seed(1)
    again, _ = planner.plan(np.zeros(2))
    torch.manual_seed(1)
    planner.mean = torch.stack([plan[1], plan[2], plan[3], torch.tensor([0.0, 0.5])])
    assert planner(np.zeros(2)).tolist() == again[0].tolist()  # the mean's first action is executed


def test_a_candidates_worth_is_the_mean_over_its_particles(monkeypatch):
    """The planner's order of rows: particles outside, candidates inside."""

    def predict(s, a):  # the first 4 rows are the first particles of the four candidates
        luck = torch.arange(len(s)) // 4
        return s, a[..., 0] * (1 + luck), torch.zeros(len(s), dtype=torch.bool)

    judged = []
    monkeypatch.setattr(pets, "cem", lambda judge, mean, low, high, args: judged.append(judge) or (mean, mean[0, 0]))
    planner = pets.Planner(predict, 3, BOX, Args(candidates=4, horizon=2), CPU)
    planner.plan(np.zeros(2))
    actions = numbers(4, 2, 2)
    expected = [sum(float(a[t, 0]) for t in range(2)) * (1 + 2 + 3) / 3 for a in actions]
    assert judged[0](actions).tolist() == pytest.approx(expected, abs=1e-5)


def test_random_shooting_takes_the_best_of_as_many_candidates(monkeypatch):
    sizes, draw = [], pets.uniform_sequences

    def spy(*args):
        sizes.append(args[2:])
        return draw(*args)

    monkeypatch.setattr(pets, "uniform_sequences", spy)
    torch.manual_seed(0)
    args = Args(optimizer="random", candidates=40, iterations=5, horizon=3)
    planner = pets.Planner(point_mass, 2, BOX, args, CPU)
    plan, best = planner.plan(np.zeros(2))
    assert sizes == [(200, 3)]  # the budget of CEM: 40 candidates in 5 rounds
    torch.manual_seed(0)
    actions = draw(torch.tensor(BOX.low), torch.tensor(BOX.high), 200, 3)
    _, returns = pets.imagine(point_mass, torch.zeros(200, 2), actions)
    assert torch.equal(plan, actions[returns.argmax()]) and best == returns.max()


def broken(s, a):
    """A model that loses its way wherever the first action is above 0.2."""
    lost = torch.where(a[..., 0] > 0.2, math.nan, 0.0)
    return s + lost[..., None], a[..., 0] + lost, torch.zeros(len(s), dtype=torch.bool)


@pytest.mark.parametrize("optimizer", ["cem", "random"])
def test_the_planner_keeps_away_from_where_the_model_is_no_number(optimizer):
    torch.manual_seed(0)
    args = Args(optimizer=optimizer, candidates=200, elites=20, horizon=3)
    planner = pets.Planner(broken, 2, BOX, args, CPU)
    for _ in range(5):
        plan, value = planner.plan(np.zeros(2))
        assert plan.isfinite().all() and (plan[:, 0] <= 0.2).all()
        assert -10 < value <= 0.6


def test_bfloat16_plans_like_float32():
    args, returns = Args(candidates=50, horizon=5, hidden=32, propagation="E"), {}
    env = pets.make_task(args)
    torch.manual_seed(0)
    model = pets.make_ensemble(args, env)
    model.target_scale.fill_(1.0)
    s, actions = torch.as_tensor(env.reset(seed=0)[0], dtype=torch.float32).expand(50, -1), 3 * numbers(50, 5, 1).tanh()
    for args.bf16 in (False, True):
        states, returns[args.bf16] = pets.imagine(pets.propagator(args, model, 1), s, actions)
        assert states.dtype == returns[args.bf16].dtype == torch.float32
    assert not torch.equal(*returns.values())
    assert torch.allclose(*returns.values(), atol=0.05)
    assert model.weights[0].dtype == torch.float32


# ── What the model believes ───────────────────────────────────────────────────────────────────────────────────────


def test_open_loop_errors_and_spread_in_closed_form(monkeypatch):
    """A world that moves by 1 a step, a model that says 1.1 ± 0.2 and whose two members say ± 0.3."""
    torch.manual_seed(0)
    monkeypatch.setitem(pets.TASKS, "Linear-v0", pets.Task(lambda s, a, s2: s2[..., 0]))
    model = LinearEnsemble(torch.ones(2, 1, 1), torch.tensor([[1.4], [0.8]]), 0.2)
    predict = pets.propagator(Args(env_id="Linear-v0"), model, 10_000)
    start = torch.tensor([[5.0], [7.0]])
    real = start[:, None] + torch.arange(1.0, 5.0)[None, :, None]
    zeros = torch.zeros(2, 4)
    sequences = pets.Transitions(
        torch.cat([start[:, None], real[:, :-1]], 1), torch.zeros(2, 4, 1), zeros, real, *[None] * 2
    )
    errors, spread = pets.open_loop(predict, sequences, torch.tensor([0.5]), 10_000)
    for h in range(1, 5):
        assert errors[h - 1].item() == pytest.approx(0.5 * (0.1 * h) ** 2 / 0.25, abs=0.02)
        assert spread[h - 1].item() == pytest.approx(0.5 * ((0.3 * h) ** 2 + 0.04 * h) / 0.25, rel=0.05)


def toy(n, seed=0):
    """s → s + sin 2s with noise of 0.05 + 0.2 σ(3 s), for s in [−2, 2]: little on the left, much on the right."""
    rng = np.random.default_rng(seed)
    box = gym.spaces.Box(-9, 9, (1,))
    buffer = pets.ReplayBuffer(n + 1, box, gym.spaces.Box(-1, 1, (1,)))
    for s in rng.uniform(-2, 2, n):
        buffer.add(
            np.array([s]), np.zeros(1), 0.0, np.array([s + math.sin(2 * s) + noise(s) * rng.normal()]), False, False
        )
    return buffer


def noise(s):
    return 0.05 + 0.2 / (1 + np.exp(-3 * s))


@pytest.mark.learning  # it trains
def test_the_ensemble_knows_noise_from_ignorance():
    """Aleatoric: the predicted deviation is right within 10 %. Epistemic: the members part where there are no data."""
    torch.manual_seed(0)
    np.random.seed(0)
    args = Args(epochs=40, batch_size=64, layers=2, hidden=64, weight_decay=(1e-4,))
    model = pets.Ensemble(5, 1, 1, 2, 64, 0, 1.0, True, False, False)
    optimizer, buffer = pets.make_optimizer(model, args.weight_decay, args.learning_rate), toy(4_000)
    for group in optimizer.param_groups:
        group["lr"] = 3e-3
    for _ in range(2):
        pets.fit_ensemble(model, optimizer, buffer, args, Silent(), lambda: False)
        for group in optimizer.param_groups:
            group["lr"] /= 10
    s = torch.linspace(-1.8, 1.8, 37)[:, None]
    with torch.no_grad():
        mean, std, _ = model.gaussian(s.expand(5, -1, -1), torch.zeros(5, 37, 1))
        far = torch.tensor([[-6.0], [6.0]])
        lost, _, _ = model.gaussian(far.expand(5, -1, -1), torch.zeros(5, 2, 1))
    truth = torch.as_tensor(noise(s.numpy()))
    aleatoric = std.square().mean(0).sqrt()
    assert (aleatoric / truth).mean().item() == pytest.approx(1.0, abs=0.1)
    assert ((aleatoric / truth) - 1).abs().mean() < 0.1
    assert ((mean.mean(0) - torch.sin(2 * s)).abs() < 0.1).all()
    assert (lost.std(0) > 5 * mean.std(0).mean()).all()


def test_metrics_are_of_new_rows_and_of_the_ensemble():
    model, buffer = ensemble(), transitions(60)
    model.set_normalizer(buffer.rows(np.arange(40)))
    predict = pets.propagator(Args(env_id="Pendulum-v1"), model, 6)
    torch.manual_seed(0)
    metrics = pets.ensemble_metrics(predict, model, buffer, 40, 6)
    data = buffer.rows(np.arange(40, 60))
    x, y = model.inputs(data.obs, data.action), model.targets(data)
    with torch.no_grad():
        outputs = [model(x.expand(3, -1, -1))[i] for i in range(2)]
        loss = pets.ensemble_loss(model, x.expand(3, -1, -1), y.expand(3, -1, -1), torch.zeros(3, 20)) / 3
    std = model.targets(buffer.rows(np.arange(60))).std(0, correction=0)
    assert metrics["model/heldout_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["model/heldout_mse"] == pytest.approx(((outputs[0] - y) / std).square().mean().item(), rel=1e-5)
    assert metrics["model/disagreement"] == pytest.approx(
        ((outputs[0] - outputs[0].mean(0)).square().mean(0).sqrt() / std).mean().item(), rel=1e-4)  # fmt: skip
    assert metrics["model/noise"] == pytest.approx((outputs[1].exp().sqrt() / std).mean().item(), rel=1e-4)
    assert "model/open_loop_error_5" in metrics and "model/open_loop_error_10" not in metrics  # episodes of 7
    torch.manual_seed(0)
    sequences = pets.windows(buffer, 40, 1)
    assert len(sequences.obs) == 20  # the new rows alone
    errors, spread = pets.open_loop(predict, sequences, pets.state_scale(buffer), 6)
    assert metrics["model/open_loop_error_1"] == pytest.approx(errors[0].item(), rel=1e-5)
    assert metrics["model/open_loop_spread_1"] == pytest.approx(spread[0].item(), rel=1e-5)
    torch.manual_seed(0)
    pets.open_loop(predict, sequences, pets.state_scale(buffer), 6)  # the same dice
    errors, spread = pets.open_loop(predict, pets.windows(buffer, 40, 5), pets.state_scale(buffer), 6)
    assert metrics["model/open_loop_error_5"] == pytest.approx(errors.mean().item(), rel=1e-5)
    assert metrics["model/open_loop_spread_5"] == pytest.approx(spread.mean().item(), rel=1e-5)


def test_what_is_constant_has_no_part_in_the_metrics():
    model, buffer = ensemble(), transitions(60)
    predict = pets.propagator(Args(env_id="Pendulum-v1"), model, 6)
    buffer.data.next_obs[:, 1] = buffer.data.obs[:, 1]
    model.set_normalizer(buffer.rows(np.arange(40)))
    assert all(value < 1e3 for value in pets.ensemble_metrics(predict, model, buffer, 40, 6).values())


# ── Whole runs ────────────────────────────────────────────────────────────────────────────────────────────────────

SHORT = (
    "--candidates 20 --elites 4 --iterations 2 --horizon 5 --hidden 16 --particles 5 --epochs 1 --eval-episodes 1 "
    "--eval-max-steps 20 --eval-every 0"
)


def test_the_first_trial_is_random_and_the_others_are_planned(tmp_path):
    flags = f"{SHORT} --total-timesteps 450 --random-steps 200 --refit-every 200 --picture-every 200"
    run_dir = helpers.run("pets", flags, tmp_path / "r")
    obs, action, reward, next_obs, terminated, truncated = helpers.checkpoint(run_dir)["replay"]["columns"]
    task = pets.TASKS["CartPoleSwingUp-v0"]
    assert len(obs) == 450 and torch.nonzero(truncated).flatten().tolist() == [199, 399] and not terminated.any()
    assert torch.allclose(task.dynamics(obs, action), next_obs, atol=1e-3)
    assert torch.allclose(task.reward(obs, action, next_obs), reward, atol=1e-4)
    assert action[:200].abs().mean().item() == pytest.approx(1.5, abs=0.2)  # uniform on [−3, 3]
    curves = helpers.scalars(run_dir)
    assert min(curves["model/planned_return"]) == 300 and list(curves["model/heldout_loss"]) == [400]
    assert set(curves["losses/model"]) == {200, 400}
    assert (run_dir / "picture.png").stat().st_size > 1_000


def test_the_picture_shows_the_particles_of_the_plan(tmp_path, monkeypatch):
    drawn, draw, measured, errors_of = [], pets.draw_particles, [], pets.open_loop
    monkeypatch.setattr(pets, "open_loop", lambda *args: measured.append(args[1]) or errors_of(*args))
    monkeypatch.setattr(pets, "draw_particles", lambda *args: drawn.append(args) or draw(*args))
    flags = f"{SHORT} --total-timesteps 200 --random-steps 50 --refit-every 75 --picture-every 200"
    run_dir = helpers.run("pets", flags, tmp_path / "r")
    obs = helpers.checkpoint(run_dir)["replay"]["columns"][0]
    ((states, begin, plans, errors, *_),) = drawn
    assert begin == 50 and list(plans) == list(range(50, 200, 5)) and np.array_equal(states, obs[50:])
    assert errors.shape == (2, 50)
    for t, planned in plans.items():
        assert planned.shape == (5, 6, 5)  # particles, T + 1, coordinates
        assert (planned[:, 0] == obs[t].numpy()).all() and len(np.unique(planned[:, 1, 0])) == 5
    new = obs[125:200]  # the rows since the second training
    assert all((row == new).all(-1).any() for sequences in measured[-4:] for row in sequences.obs[:, 0])


@pytest.mark.parametrize(("model", "members"), [("PE", 5), ("DE", 5), ("P", 1), ("D", 1)])
def test_the_four_models_of_the_paper(model, members):
    env = gym.make("Pendulum-v1")
    built = pets.make_ensemble(Args(env_id="Pendulum-v1", model=model), env)
    outputs = 6 if model in ("PE", "P") else 3
    assert built.members == members and built.weights[-1].shape == (members, Args().hidden, outputs)


def test_deterministic_and_single_particles_are_not_repeated():
    assert pets.particle_count(Args(propagation="E")) == 1
    assert pets.particle_count(Args(dynamics="true")) == 1
    assert pets.particle_count(Args(model="D")) == pets.particle_count(Args(model="DE", members=1)) == 1
    assert pets.particle_count(Args(propagation="DS", particles=7)) == 7


def test_true_dynamics_learn_nothing_and_plan_from_the_first_step(tmp_path):
    run_dir = helpers.run("pets", f"{SHORT} --total-timesteps 300 --dynamics true", tmp_path / "r")
    curves = helpers.scalars(run_dir)
    assert min(curves["model/planned_return"]) == 100
    assert not any(tag.startswith("losses/") for tag in curves) and helpers.checkpoint(run_dir)["learned"] == {}


@pytest.mark.learning  # for its minute of compiling
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_compiled_plans_are_those_of_eager_mode():
    args, plans = Args(candidates=50, elites=5, iterations=2, horizon=4, hidden=16), []
    env = pets.make_task(args)
    torch.manual_seed(0)
    model = pets.make_ensemble(args, env)
    model.target_scale.fill_(1.0)
    for args.compile in (False, True):
        torch.manual_seed(1)
        new_policy = pets.planners(args, env, pets.propagator(args, model, 5), CPU)
        plans.append([new_policy().plan(np.array([0.5, 0.5, 1.0, 0.0, 0.1]))[0] for _ in range(2)])
        assert hasattr(new_policy.args[0], "_torchdynamo_orig_callable") == args.compile
    for eager, compiled in zip(*plans, strict=True):
        assert torch.allclose(eager, compiled, atol=1e-3)


@pytest.mark.learning
def test_it_swings_the_pole_up(tmp_path):
    """Six trials, the first of them random. A random agent and an untrained ensemble are measured too."""
    flags = "cartpole --total-timesteps 1200 --eval-episodes 2 --picture-every 0"
    run_dir = helpers.run("pets", flags, tmp_path / "r")
    env = gym.make("CartPoleSwingUp-v0")
    returns, _ = pets.evaluate(lambda: lambda obs: env.action_space.sample(), env, 10, 1, 200)
    args = Args()
    torch.manual_seed(0)
    model = pets.make_ensemble(args, env)
    model.target_scale.fill_(1.0)
    blind = pets.planners(args, env, pets.propagator(args, model, args.particles), CPU)
    untrained, _ = pets.evaluate(blind, env, 1, 1, 200)
    assert max(np.mean(returns), np.mean(untrained)) < 30
    assert helpers.scalars(run_dir)["eval/episodic_return"][1200] > 100


@pytest.mark.learning
@pytest.mark.parametrize("variant", ["--propagation TS1 --learn-reward", "--model DE --propagation E"])
def test_it_learns_the_pendulum(variant, tmp_path):
    flags = f"pendulum {variant} --total-timesteps 800 --eval-episodes 2 --picture-every 0"
    run_dir = helpers.run("pets", flags, tmp_path / "r")
    env = gym.make("Pendulum-v1")
    returns, _ = pets.evaluate(lambda: lambda obs: env.action_space.sample(), env, 20, 1, 200)
    assert np.mean(returns) < -600
    assert helpers.scalars(run_dir)["eval/episodic_return"][800] > -350
