"""The mathematics of algos/mbpo.py against slow and obvious references."""

import copy
import itertools
import math
import shutil
import types

import gymnasium as gym
import helpers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributions

mbpo = helpers.module("mbpo")
Args = mbpo.Args
CPU = torch.device("cpu")


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ensemble(members=4, state=3, action=2, ends=False, std=0.0):
    """Random biases, so that no two members agree; a constant deviation."""
    torch.manual_seed(0)
    model = mbpo.Ensemble(members, state, action, 2, 16, 0, 1.0, True, True, ends)
    logvar = 2 * math.log(std) if std else -60.0
    with torch.no_grad():
        for bias in model.biases:
            bias.normal_()
        model.biases[-1][..., state + 1 : 2 * state + 2] = 1e3  # far above the upper bound
        model.max_logvar.fill_(logvar)
        model.min_logvar.fill_(logvar - 100)
    model.target_scale.fill_(1.0)
    return model


def transitions(n, state=3, action=2, seed=0):
    rng = np.random.default_rng(seed)
    boxes = gym.spaces.Box(-9, 9, (state,)), gym.spaces.Box(-1, 1, (action,))
    buffer = mbpo.ReplayBuffer(n + 1, *boxes)
    for i in range(n):
        s, a = rng.normal(2, 3, state), rng.uniform(-1, 1, action)
        s2, r = s + a.sum() + 0.1 * rng.normal(size=state), s[0] + 0.1 * rng.normal()
        buffer.add(s, a, r, s2, i % 14 == 13, i % 7 == 6)
    return buffer


class NoLog:
    def __init__(self):
        self.means = {}

    def mean(self, tag, value):
        self.means.setdefault(tag, []).append(torch.as_tensor(value).detach().item())


# ── (1) The model, trained until held-out rows get no better ──────────────────────────────────────────────────────


@pytest.mark.parametrize(("rows", "held_out"), [(400, 80), (60, 12), (30_000, 5_000)])
def test_held_out_rows_are_not_trained_on_and_bootstraps_stay(monkeypatch, rows, held_out):
    buffer, args = transitions(rows), Args(members=2, elites=1, patience=1, model_batch_size=rows // 5)
    model = mbpo.Ensemble(2, 3, 2, 1, 4, 0, 1.0, True, True, False)
    optimizer, batches = mbpo.make_optimizer(model, (0.0,), 1e-9), []

    def loss(model, x, y, ended):
        assert x.shape[:2] == y.shape[:2] == ended.shape == (2, x.shape[1])
        batches.append(y[..., 0].double() + 1e-3 * y[..., 1].double())  # a number that no two rows share
        return sum((p**2).sum() for p in model.parameters()) * 1e-9

    monkeypatch.setattr(mbpo, "ensemble_loss", loss)
    np.random.seed(5)
    unseen = np.random.permutation(rows)[:held_out]
    np.random.seed(5)
    mbpo.fit_to_holdout(model, optimizer, buffer, args, NoLog(), lambda: False)
    change = (buffer.data.next_obs - buffer.data.obs)[:rows].astype(np.float64)
    target = change[:, 0] + 1e-3 * change[:, 1]
    assert len(set(target.tolist())) == rows
    data = torch.cat(batches, 1)
    assert data.shape[1] == 3 * (rows - held_out)  # the first pass is the best one, and two more bring nothing
    first, second, third = data.chunk(3, 1)
    assert not set(data.flatten().tolist()) & set(target[unseen].tolist())
    for b in range(2):
        passes = [sorted(x[b].tolist()) for x in (first, second, third)]
        assert passes[0] == passes[1] == passes[2]  # the same bootstrap
        assert first[b].tolist() != second[b].tolist()  # in another order
        # a bootstrap of n rows holds a share 1 − 1/e of them, each row of D about once
        assert len(set(passes[0])) == pytest.approx(0.632 * (rows - held_out), rel=0.25)
    assert sorted(first[0].tolist()) != sorted(first[1].tolist())


@pytest.mark.parametrize("patience", [0, 2, 5])
def test_each_member_keeps_its_best_pass(patience):
    rows, held_out = 300, 60
    buffer = transitions(rows)
    args = Args(members=4, elites=2, patience=patience, model_batch_size=64, holdout=held_out / rows)
    torch.manual_seed(1)
    model = mbpo.Ensemble(4, 3, 2, 2, 16, 0, 1.0, True, True, False)
    optimizer, log = mbpo.make_optimizer(model, (1e-4,), 1e-2), NoLog()
    np.random.seed(7)
    order = np.random.permutation(rows)
    unseen = buffer.rows(order[:held_out])
    np.random.seed(7)
    history = []

    def watch():  # called before each pass: what the one before has left
        with torch.no_grad():
            mean = model(model.inputs(unseen.obs, unseen.action).expand(4, -1, -1))[0]
            history.append(((mean - model.targets(unseen)) ** 2).mean((1, 2)).tolist())
            states.append(copy.deepcopy([[p[b].clone() for p in (*model.weights, *model.biases)] for b in range(4)]))
        return False

    states = []
    elites = mbpo.fit_to_holdout(model, optimizer, buffer, args, log, watch)
    best, kept, last = [1e10] * 4, [None] * 4, 0
    for number, errors in enumerate(history[1:], 1):  # the official code's rule: (best − now) / best > 0.01
        for b, now in enumerate(errors):
            if (best[b] - now) / best[b] > 0.01:
                best[b], kept[b], last = now, states[number][b], number
    assert log.means["model/passes"] == [last + patience + 1] and len(history) == last + patience + 1
    for b in range(4):
        for p, expected in zip((*model.weights, *model.biases), kept[b], strict=True):
            assert torch.equal(p[b], expected)
    assert elites == sorted(range(4), key=lambda b: best[b])[:2]
    assert log.means["model/elite_mse"] == [pytest.approx(sum(sorted(best)[:2]) / 2, rel=1e-5)]
    assert (model.input_mean - model.inputs(*buffer.rows(order[held_out:])[:2]).mean(0)).abs().max() < 1e-5


@pytest.mark.parametrize("passes", [0, 1, 3])
def test_a_training_that_is_cut_leaves_all_as_it_was(passes):
    model = ensemble()
    optimizer = mbpo.make_optimizer(model, (0.0,), 1e-3)
    assert mbpo.fit_to_holdout(model, optimizer, transitions(50), Args(members=4), NoLog(), lambda: False)
    before = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    asked = iter([False] * passes + [True])
    cut = mbpo.fit_to_holdout(model, optimizer, transitions(90, seed=1), Args(members=4), NoLog(), lambda: next(asked))
    assert cut is None
    assert not helpers.differences(before, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})


def test_the_presets_are_the_official_settings():
    official = {  # steps of an epoch, G, H̄, random steps, first and last epoch of the schedule, k from and to
        "invertedpendulum": (250, 10, -0.05, 500, 1, 1),
        "hopper": (1_000, 20, -1, 5_000, 1, 15),
        "walker2d": (1_000, 20, -3, 5_000, 1, 1),
        "halfcheetah": (1_000, 40, -3, 5_000, 1, 1),
        "ant": (1_000, 20, -4, 5_000, 1, 25),
        "humanoid": (1_000, 20, -2, 5_000, 1, 25),
    }
    last = {"hopper": (20, 150), "ant": (20, 100), "humanoid": (20, 300)}
    for name, row in official.items():
        args = mbpo.parse_args([name])
        sac = mbpo.SAC(3, 2, args, CPU)
        schedule = args.rollout_schedule
        assert row == (args.epoch_steps, args.updates, sac.target_entropy, args.random_steps, *schedule[2:])
        assert name not in last or schedule[:2] == last[name]
        assert args.rollouts == 100_000 and args.model_every == (1_000 if name == "humanoid" else 250)
        assert args.retain_epochs == (5 if name == "humanoid" else 1)
        assert args.model_hidden == (400 if name == "humanoid" else 200)
        assert (args.members, args.elites, args.model_layers, args.real_ratio) == (7, 5, 4, 0.05)


def test_evaluations_and_pictures_leave_the_dice_alone(tmp_path):
    quick = "pendulum --total-timesteps 700 --updates 1 --batch-size 8 --hidden 8 --model-hidden 8 --rollouts 50"
    made = []
    for number, flags in enumerate(("--eval-every 0 --picture-every 0", "--eval-every 50 --picture-every 50")):
        folder = tmp_path / str(number)
        helpers.run("mbpo", f"{quick} --patience 0 --eval-episodes 2 --eval-max-steps 9 {flags}", folder)
        made.append({x: helpers.checkpoint(folder)[x] for x in ("learned", "imagined", "replay", "random")})
    assert not helpers.differences(*made)


def test_branches_start_from_real_states_and_follow_the_random_policy(tmp_path, monkeypatch):
    """As `train` asks for them: uniformly from all of D_env, and M of them each time."""
    starts, branch = [], mbpo.branch

    def watch(predict, policy, s, length):
        starts.append(s)
        assert type(policy) is mbpo.Policy and length == 2
        return branch(predict, policy, s, length)

    monkeypatch.setattr(mbpo, "branch", watch)
    flags = "pendulum --total-timesteps 900 --updates 1 --batch-size 8 --hidden 8 --model-hidden 8 --rollouts 3000"
    helpers.run("mbpo", f"{flags} --patience 0 --elites 1 --rollout-length 2 --eval-episodes 1", tmp_path / "run")
    stored = helpers.checkpoint(tmp_path / "run")
    columns = stored["replay"]["columns"][0]
    assert [len(s) for s in starts] == [3_000] * 3  # at 400, 600 and 800 steps
    for size, s in zip((400, 600, 800), starts, strict=True):
        rows = {tuple(row): i for i, row in enumerate(columns[:size].tolist())}
        index = torch.tensor([rows[tuple(row)] for row in s.tolist()])
        counts = index.bincount(minlength=size).float()
        assert (counts > 0).float().mean() == pytest.approx(1 - math.exp(-3_000 / size), abs=0.03)
        assert counts.max() < 5 * 3_000 / size
    assert stored["imagined"]["lengths"] == [6_000]  # an epoch of 200 steps: the last time alone


# ── (2) Branches ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("n", [1, 3, 10, 64, 101])
def test_each_row_goes_through_one_elite(n):
    model, elites = ensemble(), [3, 0, 1]
    s, a = numbers(n, 3), numbers(n, 2, seed=1)
    predict = mbpo.elite_sampler(Args(), model, elites)
    with torch.no_grad():
        mean, std, _ = model.gaussian(s.expand(4, -1, -1), a.expand(4, -1, -1))
        assert std.max() < 1e-9
        seen = torch.zeros(n, 4)
        for _ in range(300):
            s2, r, ended = predict(s, a)
            distance = (torch.cat([s2 - s, r[:, None]], 1) - mean).abs().amax(-1)  # [B, n]
            assert (distance.amin(0) < 1e-5).all()
            member = distance.argmin(0)
            seen[torch.arange(n), member] += 1
            counts = member.bincount(minlength=4)
            assert counts[2] == 0 and counts.max() <= -(-n // 3)
            assert ended.dtype == torch.bool and ended.shape == (n,)
        # each row through each elite in a third of the steps: 100 ± 8
        assert (seen[:, elites] - 100).abs().max() < 45


def test_the_elites_are_a_copy():
    model = ensemble()
    predict = mbpo.elite_sampler(Args(), model, [2])
    s, a = numbers(5, 3), numbers(5, 2, seed=1)
    with torch.no_grad():
        before = predict(s, a)[0]
        for p in model.parameters():
            p.mul_(2.0)
        assert torch.allclose(predict(s, a)[0], before)


def test_a_step_has_the_members_noise():
    model = ensemble(members=2, std=0.3)
    predict = mbpo.elite_sampler(Args(), model, [0, 1])
    s, a = numbers(1, 3).expand(40_000, -1), numbers(1, 2, seed=1).expand(40_000, -1)
    with torch.no_grad():
        mean = model.gaussian(s[:1].expand(2, 1, -1), a[:1].expand(2, 1, -1))[0][:, 0]
        s2, r, _ = predict(s, a)
    y = torch.cat([s2 - s, r[:, None]], 1)
    assert torch.allclose(y.mean(0), mean.mean(0), atol=0.02)
    assert torch.allclose(y.var(0), 0.3**2 + mean.var(0, correction=0), rtol=0.03)


def test_the_end_is_known_or_learned():
    s, a = numbers(40, 4), numbers(40, 1, seed=1)
    known = mbpo.elite_sampler(Args(), ensemble(state=4, action=1), [0, 1])
    with torch.no_grad():
        s2, _, ended = known(s, a)
        assert torch.equal(ended, s2[:, 1].abs() > 0.2) and ended.any()
        model = ensemble(state=4, action=1, ends=True)
        pairs = s.expand(4, -1, -1), a.expand(4, -1, -1)
        model.weights[-1][2, :, -1] *= 20
        model.biases[-1][2, 0, -1] -= model.gaussian(*pairs)[2][2].median()
        learned = mbpo.elite_sampler(Args(), model, [2])
        chance = model.gaussian(*pairs)[2][2].sigmoid()
        drawn = torch.stack([learned(s, a)[2] for _ in range(2_000)])
        assert drawn.dtype == torch.bool
        assert torch.allclose(drawn.float().mean(0), chance, atol=0.05) and chance.std() > 0.05


def test_the_length_grows_as_scheduled():
    hopper = [mbpo.scheduled_length((20, 150, 1, 15), epoch) for epoch in range(400)]
    assert hopper[0] == hopper[20] == hopper[29] == 1
    assert hopper[30] == 2 and hopper[85] == 8 and hopper[149] == 14  # 1 + 14 (e − 20) / 130, rounded down
    assert hopper[150] == hopper[399] == 15
    assert all(b - a in (0, 1) for a, b in itertools.pairwise(hopper))
    assert {mbpo.scheduled_length((20, 150, 1, 1), epoch) for epoch in range(400)} == {1}
    args = Args(random_steps=500, epoch_steps=100, rollout_schedule=(2, 4, 1, 3))
    assert [mbpo.rollout_length(args, 500 + 100 * i) for i in range(6)] == [1, 1, 1, 2, 3, 3]
    assert mbpo.rollout_length(Args(rollout_length=0), 9_000) == 0
    assert mbpo.rollout_length(Args(rollout_length=4), 600) == 4


@given(st.integers(1, 4), st.lists(st.integers(0, 6), min_size=1, max_size=9))
def test_imagined_rows_of_the_last_sweeps_are_kept(sweeps, lengths):
    imagined, made = mbpo.ImaginedReplay(2, 1, sweeps, CPU), []
    for number, length in enumerate(lengths):
        rows = torch.arange(length * 7.0).view(length, 7) + 1_000 * number
        imagined.add(rows)
        made.append(rows)
        assert torch.equal(imagined.rows, torch.cat(made[-sweeps:]))
    other = mbpo.ImaginedReplay(2, 1, sweeps, CPU)
    other.load_state_dict(imagined.state_dict())
    for buffer in (imagined, other):
        buffer.add(made[0])
        assert torch.equal(buffer.rows, torch.cat([*made, made[0]][-sweeps:]))
    if len(imagined.rows):
        s, a, r, s2, ended = imagined.sample(50)
        assert s.shape == s2.shape == (50, 2) and a.shape == (50, 1) and r.shape == ended.shape == (50,)
        drawn = torch.cat([s, a, r[:, None], s2, ended[:, None]], 1)
        assert {tuple(row) for row in drawn.tolist()} <= {tuple(row) for row in imagined.rows.tolist()}


def test_branches_go_on_from_where_they_are_and_end_at_the_end():
    def predict(s, a):  # one number counts up by the action, 1; ends at 3; from 10 on it overflows
        s2 = s + a
        return torch.where(s2 > 10, torch.inf, s2), s[:, 0] * 10, s2[:, 0] == 3

    rows = mbpo.branch(predict, lambda s: (torch.ones_like(s), None), torch.tensor([[0.0], [2.0], [8.0]]), 4)
    found = sorted(map(tuple, rows.tolist()))  # s, a, r, s', ended
    assert found == [
        (0, 1, 0, 1, 0), (1, 1, 10, 2, 0), (2, 1, 20, 3, 1), (2, 1, 20, 3, 1),
        (8, 1, 80, 9, 0), (9, 1, 90, 10, 0),
    ]  # fmt: skip
    assert len(mbpo.branch(predict, lambda s: (torch.ones_like(s), None), torch.zeros(5, 1), 1)) == 5


def test_a_batch_holds_the_share_of_real_rows():
    buffer, imagined = transitions(40), mbpo.ImaginedReplay(3, 2, 1, CPU)
    imagined.add(torch.full((7, 10), 77.0))
    for ratio, real in ((0.05, 12), (0.5, 128), (0.0, 0), (1.0, 256)):
        got = list(mbpo.batches(buffer, imagined, Args(real_ratio=ratio, updates=6)))
        assert len(got) == 6
        for s, a, r, s2, ended in got:
            assert s.shape == s2.shape == (256, 3) and a.shape == (256, 2) and r.shape == ended.shape == (256,)
            assert (r == 77).sum() == 256 - real
            assert ((s2 == 77).all(1) == (r == 77)).all() and ((a == 77).all(1) == (r == 77)).all()
    alone = list(mbpo.batches(buffer, mbpo.ImaginedReplay(3, 2, 1, CPU), Args(rollout_length=0)))
    assert len(alone) == 10 and all(len(s) == 256 for s, *_ in alone)
    s, a, r, s2, ended = alone[0]
    stored = {tuple(row): i for i, row in enumerate(buffer.data.obs[:40].tolist())}
    for i in range(256):  # a row stays a row
        row = stored[tuple(s[i].tolist())]
        assert r[i] == buffer.data.reward[row] and ended[i] == buffer.data.terminated[row]
        assert s2[i].tolist() == buffer.data.next_obs[row].tolist()
        assert a[i].tolist() == buffer.data.action[row].tolist()


# ── (4) Soft actor-critic ─────────────────────────────────────────────────────────────────────────────────────────


def test_the_policy_is_a_squashed_gaussian():
    torch.manual_seed(0)
    policy = mbpo.Policy(3, 2, 32).double()
    s = numbers(50, 3).double()
    with torch.no_grad():
        a, log_prob = policy(s)
        mean, log_std = policy.net(s).chunk(2, -1)
        squashed = distributions.TransformedDistribution(
            distributions.Normal(mean, log_std.exp()), distributions.TanhTransform()
        )
        assert torch.allclose(log_prob, squashed.log_prob(a).sum(-1), atol=1e-6)
        assert torch.allclose(policy.act(s), torch.tanh(mean))
        many = torch.stack([policy(s)[0] for _ in range(4_000)])
        assert torch.allclose(torch.atanh(many).mean(0), mean, atol=0.15)
        assert torch.allclose(torch.atanh(many).std(0), log_std.exp(), rtol=0.08)


def test_the_density_integrates_to_one():
    policy = mbpo.Policy(1, 1, 8).double()
    with torch.no_grad():
        for p in policy.parameters():
            p.zero_()
        policy.net[-1].bias.copy_(torch.tensor([0.4, -0.3]))
        torch.manual_seed(0)
        a, log_prob = policy(torch.zeros(200_000, 1).double())
    # E[1 / π(a)] over a ~ π is the length of (−1, 1); the tails are thin, so only the middle is counted
    middle = a[:, 0].abs() < 0.9
    assert ((-log_prob).exp() * middle).mean().item() == pytest.approx(1.8, rel=0.02)


def test_extreme_deviations_stay_finite():
    policy = mbpo.Policy(1, 1, 8)
    with torch.no_grad():
        for p in policy.parameters():
            p.zero_()
        for bias in ((0.0, -1e4), (0.0, 1e4), (300.0, 0.0), (-300.0, 0.0)):
            policy.net[-1].bias.copy_(torch.tensor(bias))
            a, log_prob = policy(torch.zeros(100, 1))
            assert a.abs().max() <= 1 and log_prob.isfinite().all()


def both(nets):
    return lambda s, a: torch.stack([net(torch.cat([s, a], 1))[:, 0] for net in nets])


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_multi_step_target_is_the_recursion(steps):
    alpha, gamma = 0.3, 0.9

    def predict(s, a):
        return 0.5 * s + a, (s * a).sum(-1), s[:, 0] > 0.8

    def policy(s):
        return 0.2 * s - 0.1, -s.sum(-1)

    torch.manual_seed(0)
    targets = [torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)]
    sac = types.SimpleNamespace(policy=policy, targets=both(targets), log_alpha=torch.tensor(math.log(alpha)))
    s = numbers(30, 2)

    def value(s, left):  # of one state [1, D]
        a, log_prob = policy(s)
        if left == 0:
            q = min(net(torch.cat([s, a], 1)).item() for net in targets)
            return q - alpha * log_prob.item()
        s2, r, ended = predict(s, a)
        return r.item() - alpha * log_prob.item() + gamma * (0.0 if ended.item() else value(s2, left - 1))

    with torch.no_grad():
        got = mbpo.soft_value(sac, s, gamma, steps, predict)
        assert got.tolist() == pytest.approx([value(row[None], steps) for row in s], abs=1e-5)
    assert 0 < (s[:, 0] > 0.8).sum() < 30


def test_a_model_that_overflows_spoils_no_target():
    """Rows whose next state is no number, after the end or before it: the rest of the batch is as without them."""

    def predict(s, a):
        wild = s[:, :1] > 1
        return torch.where(wild, torch.nan, s + 0.1), torch.where(wild[:, 0], torch.inf, s[:, 1]), s[:, 1] > 1

    def policy(s):
        return s.tanh(), s.sum(-1)

    torch.manual_seed(0)
    targets = [torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)]
    sac, s = types.SimpleNamespace(policy=policy, targets=both(targets), log_alpha=torch.tensor(0.0)), numbers(200, 2)
    with torch.no_grad():
        got = mbpo.soft_value(sac, s, 0.9, 4, predict)
        assert got.isfinite().all()
        wild = s[:, 0] > 1  # at once: the critics are asked where the model fails
        assert torch.allclose(got[wild], mbpo.soft_value(sac, s[wild], 0.9, 0, None), atol=1e-6)
        alone = torch.cat([mbpo.soft_value(sac, row[None], 0.9, 4, predict) for row in s])
        assert torch.allclose(got, alone, atol=1e-5)
    assert 10 < wild.sum() < 100


def test_an_update_is_the_papers_written_out():
    """Against plain autograd with torch's distributions, each of the three losses by itself."""
    args = Args(hidden=16, learning_rate=1e-2, tau=0.1, gamma=0.9, target_entropy=-0.7)
    torch.manual_seed(0)
    sac = mbpo.SAC(3, 2, args, CPU)
    with torch.no_grad():
        for p in sac.targets.parameters():
            p.add_(0.1 * torch.randn_like(p))
        sac.log_alpha.fill_(-0.5)
    policy, critics, targets = (copy.deepcopy(x) for x in (sac.policy, sac.critics, sac.targets))
    log_alpha = sac.log_alpha.detach().clone().requires_grad_()
    optimizers = [torch.optim.Adam(group, 1e-2) for group in (critics.parameters(), policy.parameters(), [log_alpha])]

    def q(nets, i, s, a):
        x = torch.cat([s, a], 1)
        for layer, (w, b) in enumerate(zip(nets.weights, nets.biases, strict=True)):
            x = (x.clamp(min=0) if layer else x) @ w[i] + b[i]
        return x[:, 0]

    for number in range(3):
        s, a, s2 = numbers(20, 3, seed=number), numbers(20, 2, seed=9).tanh(), numbers(20, 3, seed=number + 50)
        r, ended = numbers(20, seed=number + 70), (numbers(20, seed=8) > 0.5).float()
        torch.manual_seed(number)
        metrics = sac.update(s, a, r, s2, ended, None)

        def draw(state):
            mean, log_std = policy.net(state).chunk(2, -1)
            u = mean + log_std.exp() * torch.randn_like(mean)
            log_prob = distributions.Normal(mean, log_std.exp()).log_prob(u) - torch.log(1 - torch.tanh(u) ** 2)
            return torch.tanh(u), log_prob.sum(-1)

        torch.manual_seed(number)
        alpha = log_alpha.exp().item()
        with torch.no_grad():
            a2, log_prob2 = draw(s2)
            y = r + 0.9 * (1 - ended) * (torch.minimum(*(q(targets, i, s2, a2) for i in (0, 1))) - alpha * log_prob2)
        loss_q = sum((0.5 * (q(critics, i, s, a) - y) ** 2).mean() for i in (0, 1))
        optimizers[0].zero_grad()
        loss_q.backward()
        optimizers[0].step()
        b, log_prob = draw(s)
        loss_pi = (alpha * log_prob - torch.minimum(*(q(critics, i, s, b) for i in (0, 1)))).mean()
        optimizers[1].zero_grad()
        loss_pi.backward()
        optimizers[1].step()
        loss_alpha = (-log_alpha * (log_prob.detach() - 0.7)).mean()
        optimizers[2].zero_grad()
        loss_alpha.backward()
        optimizers[2].step()
        with torch.no_grad():
            for target, p in zip(targets.parameters(), critics.parameters(), strict=True):
                target.mul_(0.9).add_(0.1 * p)
        for tag, loss in (("critic", loss_q), ("policy", loss_pi), ("alpha", loss_alpha)):
            assert metrics[f"losses/{tag}"].item() == pytest.approx(loss.item(), abs=1e-4)
        assert metrics["charts/entropy"].item() == pytest.approx(-log_prob.mean().item(), abs=1e-4)
    for mine, expected in ((sac.policy, policy), (sac.critics, critics), (sac.targets, targets)):
        for p, q in zip(mine.parameters(), expected.parameters(), strict=True):
            assert torch.allclose(p, q, atol=2e-4)
    assert sac.log_alpha.item() == pytest.approx(log_alpha.item(), abs=1e-5)


def test_the_target_entropy_is_the_users_or_the_tasks_or_minus_the_actions():
    rows = [("Hopper-v5", None, -1), ("Hopper-v5", 0.0, 0), ("Pendulum-v1", None, -2), ("My-v0", None, -2)]
    for env_id, wanted, expected in [*rows, ("My-v0", -7, -7)]:
        assert mbpo.SAC(3, 2, Args(env_id=env_id, target_entropy=wanted), CPU).target_entropy == expected


@pytest.mark.learning  # it trains
def test_values_of_a_fixed_policy_are_right():
    """A chain of three states whose action changes nothing, α held at 0: Q is the discounted sum of what comes."""
    args = Args(hidden=64, learning_rate=3e-3, tau=0.05, gamma=0.8)
    torch.manual_seed(0)
    sac, states = mbpo.SAC(3, 1, args, CPU), torch.eye(3)
    sac.log_alpha.data.fill_(-100.0)  # it moves by 0.003 a step
    reward, after, ended = torch.tensor([1.0, 2.0, -3.0]), torch.tensor([1, 2, 0]), torch.tensor([0.0, 0, 1])
    for _ in range(1_500):
        i = torch.randint(3, (64,))
        sac.update(states[i], torch.rand(64, 1) * 2 - 1, reward[i], states[after[i]], ended[i], None)
    with torch.no_grad():
        values = sac.critics(states, torch.zeros(3, 1)).mean(0)
    assert values.tolist() == pytest.approx([1 + 0.8 * (2 - 0.8 * 3), 2 - 0.8 * 3, -3], abs=0.1)


# ── The theory ────────────────────────────────────────────────────────────────────────────────────────────────────


def tabular(rng, states=4, actions=3):
    return rng.dirichlet(np.full(states, 0.5), (states, actions)), rng.dirichlet(np.full(actions, 0.5), states)


def returns(p, policy, reward, start, gamma):
    """η[π] = Σ_t γ^t E[r]: the linear equations solved."""
    step, gain = np.einsum("sa,sat->st", policy, p), (policy * reward).sum(1)
    return start @ np.linalg.solve(np.eye(len(p)) - gamma * step, gain)


def errors_of(p, model, old, new, start, horizon=400):
    """ε_m = max_t E_{s, a ~ π_D, t}[TV(p, p_θ)] and ε_π = max_s TV(π_D, π)."""
    gap, largest, d = 0.5 * np.abs(p - model).sum(-1), 0.0, start
    for _ in range(horizon):
        largest = max(largest, (d[:, None] * old * gap).sum())
        d = np.einsum("s,sa,sat->t", d, old, p)
    return largest, 0.5 * np.abs(old - new).sum(1).max()


@settings(max_examples=200)
@given(st.integers(0, 10**6), st.floats(0.0, 0.95), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_the_bound_holds_on_tabular_worlds(seed, gamma, mix_p, mix_pi):
    rng = np.random.default_rng(seed)
    (p, old), (other, new) = tabular(rng), tabular(rng)
    model, new = (1 - mix_p) * p + mix_p * other, (1 - mix_pi) * old + mix_pi * new
    reward, start = rng.uniform(-1, 1, (4, 3)), rng.dirichlet(np.ones(4))
    model_error, shift = errors_of(p, model, old, new, start)
    bound = mbpo.return_bound(model_error, shift, gamma, np.abs(reward).max())
    real, imagined = (returns(x, new, reward, start, gamma) for x in (p, model))
    assert real >= imagined - bound - 1e-9


@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.99])
def test_the_bound_is_not_idle(gamma):
    """A world that leaks, by a small ε each step, from where all is well to where all is ill, and a model that does
    not see it: the gap comes near to the bound, so that a smaller constant would be wrong."""
    leak = 1e-4 * (1 - gamma)
    p = np.array([[[1 - leak, leak]], [[0.0, 1.0]]])
    model, policy = np.array([[[1.0, 0.0]], [[0.0, 1.0]]]), np.ones((2, 1))
    reward, start = np.array([[1.0], [-1.0]]), np.array([1.0, 0.0])
    error, shift = errors_of(p, model, policy, policy, start)
    assert (error, shift) == (pytest.approx(leak), 0)
    gap = returns(model, policy, reward, start, gamma) - returns(p, policy, reward, start, gamma)
    assert 0.99 < gap / mbpo.return_bound(error, 0.0, gamma, 1.0) <= 1


def test_the_bound_grows_with_a_policy_that_moves():
    # 2 γ r (ε_m + 2 ε_π) / (1 − γ)² + 4 r ε_π / (1 − γ), by hand
    assert mbpo.return_bound(0.1, 0.0, 0.5, 1.0) == pytest.approx(2 * 0.5 * 0.1 / 0.25)
    assert mbpo.return_bound(0.0, 0.1, 0.5, 3.0) == pytest.approx(3 * (2 * 0.5 * 0.2 / 0.25 + 4 * 0.1 / 0.5))


@settings(max_examples=100)
@given(st.integers(0, 10**6))
def test_chains_part_no_faster_than_their_total_variation(seed):
    """Lemma B.2 with total variation for δ: TV(p₁ᵗ, p₂ᵗ) ≤ t δ."""
    rng = np.random.default_rng(seed)
    one = rng.dirichlet(np.full(4, 0.5), 4)
    share = rng.uniform(0, 0.3)
    two = (1 - share) * one + share * rng.dirichlet(np.full(4, 0.5), 4)
    d1 = d2 = rng.dirichlet(np.ones(4))
    step = 0.5 * np.abs(one - two).sum(1)
    delta = 0.0
    for t in range(1, 30):
        delta = max(delta, d1 @ step)
        d1, d2 = d1 @ one, d2 @ two
        assert 0.5 * np.abs(d1 - d2).sum() <= t * delta + 1e-12


def test_with_the_kl_divergence_in_its_place_the_lemma_is_false():
    """As printed in the paper's appendix δ bounds the expected KL divergence. A coin and one a little off: after one
    step TV is 0.1, and KL is 0.02."""
    fair, off = np.array([0.5, 0.5]), np.array([0.6, 0.4])
    kl, tv = (fair * np.log(fair / off)).sum(), 0.5 * np.abs(fair - off).sum()
    assert tv == pytest.approx(0.1) and kl == pytest.approx(0.0204, abs=1e-4)
    assert tv > 1 * kl  # TV(p₁ᵗ, p₂ᵗ) ≤ t δ fails at t = 1 with δ = KL


# ── What is measured ──────────────────────────────────────────────────────────────────────────────────────────────


def test_the_imagined_return_is_the_models():
    buffer = mbpo.ReplayBuffer(20, gym.spaces.Box(-9, 9, (1,)), gym.spaces.Box(-1, 1, (1,)))
    for i, (s, over) in enumerate([(1.0, False), (2.0, True), (4.0, False), (5.0, False), (6.0, True), (7.0, False)]):
        buffer.add([s], [0.0], 0.0, [s + 1], over and i == 1, over and i != 1)
    policy = types.SimpleNamespace(act=lambda s: torch.ones_like(s))

    def predict(s, a):
        return s + a, s[:, 0], s[:, 0] + a[:, 0] > 8

    # first states 1, 4, 7; from each s + (s + 1) + ... for 3 steps, and none after 8
    assert mbpo.imagined_return(predict, policy, buffer, 3) == pytest.approx((6 + 15 + 15) / 3)
    assert mbpo.imagined_return(predict, policy, buffer, 1) == pytest.approx(4)


@pytest.mark.parametrize("env_id", [x for x in mbpo.TASKS if mbpo.TASKS[x].ended is not mbpo.never])
def test_the_known_ends_are_the_simulators(env_id):
    env = mbpo.make_task(Args(env_id=env_id))
    env.reset(seed=0)
    env.action_space.seed(0)
    size, ends = env.observation_space.shape[0], 0
    assert size == {"Ant-v5": 27, "Humanoid-v5": 45}.get(env_id, size)
    states, truth = [], []
    while ends < 15:
        obs, _, terminated, truncated, _ = env.step(env.action_space.sample())
        states.append(obs)
        truth.append(terminated)
        ends += terminated
        if terminated or truncated or (env_id == "Ant-v5" and len(states) % 50 == 0):
            env.reset()
        if env_id == "Ant-v5" and len(states) > 2_000:  # it seldom falls by chance
            break
    states = torch.as_tensor(np.array(states), dtype=torch.float32)
    assert mbpo.TASKS[env_id].ended(states).tolist() == truth
    broken = states[~torch.tensor(truth)][:1].clone()
    assert not mbpo.TASKS[env_id].ended(broken).any()
    broken[0, :2] = float("nan")
    assert mbpo.TASKS[env_id].ended(broken).all()


def test_a_hopper_falls_apart_in_both_directions():
    """abs(x < 100), as much code has it, lets a large negative speed pass."""
    s = torch.zeros(3, 11)
    s[:, 0] = 1.2
    s[1, 7], s[2, 7] = 150.0, -150.0
    assert mbpo.TASKS["Hopper-v5"].ended(s).tolist() == [False, True, True]


def test_height_ends():
    s = torch.zeros(4, 27)
    s[:, 0] = torch.tensor([0.1, 0.2, 1.0, 1.1])
    assert mbpo.TASKS["Ant-v5"].ended(s).tolist() == [True, False, False, True]
    s[:, 0] = torch.tensor([0.9, 1.1, 1.9, 2.1])
    assert mbpo.TASKS["Humanoid-v5"].ended(s).tolist() == [True, False, False, True]


def test_actions_are_brought_into_the_policys_box():
    env, plain = mbpo.make_task(Args(env_id="InvertedPendulum-v5")), gym.make("InvertedPendulum-v5")
    assert env.action_space.low.tolist() == [-1] and env.action_space.high.tolist() == [1]
    for a in (-1.0, 0.3, 1.0):
        env.reset(seed=3)
        plain.reset(seed=3)
        mine, other = env.step(np.array([a], np.float32))[0], plain.step(np.array([3 * a], np.float32))[0]
        assert mine.tolist() == pytest.approx(other.tolist(), abs=1e-6)


# ── Learning ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.learning  # for its minute of compiling
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_compiled_updates_are_those_of_eager_mode():
    s, a, s2 = numbers(20, 3), numbers(20, 2, seed=9).tanh(), numbers(20, 3, seed=5)
    r, ended, made = numbers(20, seed=7), (numbers(20, seed=8) > 0.5).float(), []
    for compiled in (False, True):
        torch.manual_seed(0)
        sac = mbpo.SAC(3, 2, Args(hidden=16, learning_rate=1e-2, compile=compiled), CPU)
        assert hasattr(sac.policy_loss, "_torchdynamo_orig_callable") == compiled
        for _ in range(4):
            sac.update(s, a, r, s2, ended, None)
        made.append([*sac.policy.parameters(), *sac.critics.parameters(), *sac.targets.parameters(), sac.log_alpha])
    torch.manual_seed(0)
    start = mbpo.SAC(3, 2, Args(hidden=16), CPU)
    for p, q, r in zip(*made, [*start.policy.parameters(), *start.critics.parameters()], strict=False):
        assert torch.allclose(p, q, atol=2e-3) and (p - r).abs().max() > 0.01
    for p, q in zip(*made, strict=True):
        assert torch.allclose(p, q, atol=2e-3)


@pytest.mark.learning
@pytest.mark.parametrize("variant", ["", "--value-expansion 1"])
def test_it_keeps_the_pole_up(variant, tmp_path):
    """1,500 steps, small networks. A random agent and an untrained policy are measured too."""
    small = "--hidden 64 --model-layers 2 --model-hidden 64 --rollouts 10000 --weight-decay 5e-5 --picture-every 0"
    flags = f"{variant} {small} --total-timesteps 1500 --eval-every 0 --eval-max-steps 300"
    run_dir = helpers.run("mbpo", flags, tmp_path / "r")
    env = mbpo.make_task(Args())
    env.action_space.seed(0)
    by_chance, _ = mbpo.evaluate(lambda: lambda obs: env.action_space.sample(), env, 20, 1, 300)
    torch.manual_seed(1)
    policy = mbpo.Policy(4, 1, 64)
    untrained, _ = mbpo.evaluate(lambda: mbpo.deterministic(policy, CPU), env, 20, 1, 300)
    assert max(np.mean(by_chance), np.mean(untrained)) < 35
    assert helpers.scalars(run_dir)["eval/episodic_return"][1500] > 45
