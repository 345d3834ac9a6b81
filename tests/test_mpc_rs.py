"""The mathematics of algos/mpc_rs.py against slow and obvious references."""

import functools
import itertools
import math
import shutil

import gymnasium as gym
import helpers
import mujoco
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

mpc_rs = helpers.module("mpc_rs")
Args = mpc_rs.Args
BOX = gym.spaces.Box(np.array([-2.0, 0.5], np.float32), np.array([1.0, 3.0], np.float32))


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def transitions(n, state=3, action=2, seed=0):
    """n rows of a made-up world, in one episode each of 7 steps."""
    rng = np.random.default_rng(seed)
    buffer = mpc_rs.ReplayBuffer(n + 1, gym.spaces.Box(-9, 9, (state,)), gym.spaces.Box(-1, 1, (action,)))
    for i in range(n):
        s, a = rng.normal(2, 3, state), rng.uniform(-1, 1, action)
        buffer.add(s, a, rng.normal(), s + 0.1 * a.sum() + 0.01 * rng.normal(size=state), False, i % 7 == 6)
    return buffer


# ── The planner ───────────────────────────────────────────────────────────────────────────────────────────────────


def point_mass(s, a):
    """A world with an end: s = (position, speed); beyond 1 the episode is over."""
    s2 = torch.stack([s[..., 0] + s[..., 1], s[..., 1] + a[..., 0]], -1)
    return s2, -(s2[..., 0] - 0.7).square() - 0.1 * a[..., 0].square() + a[..., 1], s2[..., 0] > 1.0


def return_by_hand(s, actions):
    s, total = s.clone(), 0.0
    for a in actions:
        s, r, ended = point_mass(s, a)
        total += float(r)
        if ended:
            break
    return total


def test_imagined_returns_are_those_of_a_loop():
    s, actions = numbers(40, 2), numbers(40, 6, 2, seed=1)
    states, returns = mpc_rs.imagine(point_mass, s, actions)
    assert states.shape == (40, 6, 2)
    by_hand = [return_by_hand(x, sequence) for x, sequence in zip(s, actions, strict=True)]
    assert returns.tolist() == pytest.approx(by_hand, abs=1e-4)
    whole = [sum(float(point_mass(state, a)[1]) for state, a in zip([x, *xs[:-1]], sequence, strict=True))
             for x, xs, sequence in zip(s, states, actions, strict=True)]  # fmt: skip
    assert whole != pytest.approx(by_hand, abs=1e-2)  # some of these do end early, so the test can tell
    x = s[3]
    for t in range(6):
        x = point_mass(x, actions[3, t])[0]
        assert torch.allclose(states[3, t], x)


def test_random_shooting_finds_what_brute_force_finds(monkeypatch):
    """All sequences of a discretised action set on a tiny horizon are the candidates: the best one must win."""
    grid = torch.tensor(list(itertools.product((-1.0, 0.0, 0.5, 1.0), (0.5, 1.5))))
    sequences = torch.stack([torch.stack(choice) for choice in itertools.product(grid, repeat=3)])
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(mpc_rs, "uniform_sequences", lambda *_: sequences[order])
    policy = mpc_rs.MPC(point_mass, BOX, Args(candidates=len(sequences), horizon=3), torch.device("cpu"))
    for start in numbers(10, 2, seed=3):
        best = max(sequences, key=lambda sequence: return_by_hand(start, sequence))
        plan, value = policy.plan(start.numpy())
        assert return_by_hand(start, plan) == pytest.approx(return_by_hand(start, best), abs=1e-5)
        assert value.item() == pytest.approx(return_by_hand(start, best), abs=1e-4)
        assert policy(start.numpy()).tolist() == plan[0].tolist()
        assert plan.untyped_storage().nbytes() == plan.nbytes  # no view of all candidates, which would stay in memory


def test_more_candidates_come_nearer_to_brute_force():
    torch.manual_seed(0)
    start = torch.tensor([-1.0, 0.2])

    def found(planner, candidates):
        args = Args(planner=planner, candidates=candidates, horizon=4)
        policy = mpc_rs.MPC(point_mass, BOX, args, torch.device("cpu"))
        return return_by_hand(start, policy.plan(start.numpy())[0])

    few, many = (np.mean([found("random", n) for _ in range(20)]) for n in (5, 2_000))
    fine = torch.tensor(list(itertools.product(np.linspace(-2, 1, 10), [3.0])), dtype=torch.float32)
    best = max(return_by_hand(start, torch.stack(choice)) for choice in itertools.product(fine, repeat=4))
    assert few < many < best + 0.1
    assert many > best - 0.25 * (best - few)


def test_uniform_sequences_fill_the_box_evenly():
    torch.manual_seed(0)
    low, high = torch.tensor(BOX.low), torch.tensor(BOX.high)
    actions = mpc_rs.uniform_sequences(low, high, 2_000, 10)
    assert actions.shape == (2_000, 10, 2)
    for i in range(2):
        share = ((actions[..., i] - low[i]) / (high[i] - low[i])).flatten()
        counts = torch.histc(share, 20, 0, 1)
        assert share.min() >= 0 and share.max() <= 1
        assert ((counts - 1_000).square() / 1_000).sum() < 60  # χ² with 19 degrees of freedom: p < 1e-5
    centred = actions - actions.mean((0, 1))
    assert (centred[:, :-1] * centred[:, 1:]).mean().abs() < 0.02  # white in time


@given(st.lists(st.sampled_from([1.0, -3.0, math.nan, math.inf, -math.inf, 1e35, -1e35]), min_size=1, max_size=8))
def test_no_candidate_without_a_number_is_chosen(returns):
    """For both planners, as long as there is another; and where there is none, the action is a real one still."""
    returns, n = torch.tensor(returns), len(returns)
    actions = torch.arange(n, dtype=torch.float32)[:, None, None].expand(n, 3, 1)
    chosen = mpc_rs.trusted(returns).argmax().item()
    mean = mpc_rs.reward_weighted_mean(actions, mpc_rs.trusted(returns), 10.0)
    assert mean.isfinite().all() and mean.min() >= 0 and mean.max() <= n - 1
    finite = returns.isfinite() & (returns.abs() < 1e30)
    if finite.any():
        assert returns[chosen] == returns[returns.isfinite()].max()


def broken(s, a):
    """A model that loses its way wherever the first action is above 0.2."""
    lost = torch.where(a[..., 0] > 0.2, math.nan, 0.0)
    return s + lost[..., None], a[..., 0] + lost, torch.zeros(len(s), dtype=torch.bool)


@pytest.mark.parametrize("planner", ["random", "mppi"])
def test_the_planner_keeps_away_from_where_the_model_is_no_number(planner):
    torch.manual_seed(0)
    args = Args(planner=planner, candidates=200, horizon=3, kappa=10.0, sigma=1.0)
    policy = mpc_rs.MPC(broken, BOX, args, torch.device("cpu"))
    for _ in range(5):
        plan, value = policy.plan(np.zeros(2))
        assert plan.isfinite().all() and (plan[:, 0] <= 0.2).all()
        assert -10 < value <= 0.6


def test_filtered_noise_is_the_papers_recursion():
    u = numbers(3, 5, 2)
    n = mpc_rs.filtered_noise(u, 0.3)
    for k, i in itertools.product(range(3), range(2)):
        last = 0.0
        for t in range(5):
            last = 0.3 * u[k, t, i].item() + 0.7 * last
            assert n[k, t, i].item() == pytest.approx(last, abs=1e-6)
    assert torch.equal(mpc_rs.filtered_noise(u, 1.0), u)


@given(st.floats(0, 50), st.integers(0, 99))
def test_reward_weighted_mean_is_the_sum_written_out(kappa, seed):
    actions, returns = numbers(7, 4, 2, seed=seed).double(), 3 * numbers(7, seed=seed + 1).double()
    weights = [math.exp(kappa * (r - max(returns.tolist()))) for r in returns.tolist()]
    expected = sum(w * a for w, a in zip(weights, actions, strict=True)) / sum(weights)
    assert torch.allclose(mpc_rs.reward_weighted_mean(actions, returns, kappa), expected)


def test_mppi_goes_on_with_its_plan_and_a_new_episode_does_not():
    args = Args(planner="mppi", candidates=50, horizon=4, sigma=0.3)
    torch.manual_seed(0)
    policy = mpc_rs.MPC(point_mass, BOX, args, torch.device("cpu"))
    assert torch.allclose(policy.mean, torch.tensor([-0.5, 1.75]).repeat(4, 1))  # the middle of the box
    plan, _ = policy.plan(np.zeros(2))
    assert torch.equal(policy.mean, torch.stack([plan[1], plan[2], plan[3], plan[3]]))
    args.sigma = 0.0  # no noise: the plan is what is remembered
    assert torch.allclose(policy.plan(np.zeros(2))[0], torch.stack([plan[1], plan[2], plan[3], plan[3]]))
    assert torch.allclose(mpc_rs.MPC(point_mass, BOX, args, torch.device("cpu")).mean[0], torch.tensor([-0.5, 1.75]))


def test_mppi_candidates_stay_in_the_box(monkeypatch):
    seen = []
    monkeypatch.setattr(mpc_rs, "reward_weighted_mean", lambda actions, *_: seen.append(actions) or actions[0])
    args = Args(planner="mppi", candidates=500, horizon=4, sigma=2.0)
    mpc_rs.MPC(point_mass, BOX, args, torch.device("cpu")).plan(np.zeros(2))
    low, high = torch.tensor(BOX.low), torch.tensor(BOX.high)
    assert (seen[0] >= low).all() and (seen[0] <= high).all()
    assert (seen[0] == low).any() and (seen[0] == high).any()


def test_what_lies_beyond_the_end_does_not_count():
    """A candidate that has ended keeps its return, though the model overflows afterwards."""

    def predict(s, a):
        s2 = s + 1
        return s2, torch.where(s2[..., 0] > 2, math.inf, 1.0) * a[..., 0], s2[..., 0] >= 2

    actions = torch.tensor([1.0, 2.0, 0.0])[:, None, None].expand(3, 5, 1)
    _, returns = mpc_rs.imagine(predict, torch.zeros(3, 1), actions)
    assert returns.tolist() == [2.0, 4.0, 0.0]


def test_the_mean_of_plans_stays_in_the_box():
    torch.manual_seed(0)
    space = gym.spaces.Box(-1, 1, (2,), np.float32)
    args = Args(planner="mppi", candidates=300, horizon=3, sigma=2.0, kappa=0.01)

    def push(s, a):  # the best is at the bound
        return s, a.sum(-1), torch.zeros(len(s), dtype=torch.bool)

    policy = mpc_rs.MPC(push, space, args, torch.device("cpu"))
    policy.mean += 50.0
    assert all(space.contains(policy(np.zeros(2))) for _ in range(100))


# ── The model ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("heads", [False, True])
def test_normaliser_statistics(heads):
    buffer, model = transitions(500), mpc_rs.DynamicsModel(3, 2, 1, 8, unread=1, heads=heads)
    buffer.data.obs[:, 2] = 4.0  # a coordinate that never moves
    buffer.data.next_obs[:, 2] = 4.0
    data = buffer.rows(np.arange(500))
    model.set_normalizer(data)
    obs, action, reward, next_obs = (x.numpy().astype(np.float64) for x in data[:4])
    x = np.concatenate([obs[:, 1:], action], 1)
    y = np.concatenate([next_obs - obs, reward[:, None]], 1) if heads else next_obs - obs
    for name, values in (("input", x), ("target", y)):
        std = values.std(0)
        assert getattr(model, f"{name}_mean").numpy() == pytest.approx(values.mean(0), abs=1e-5)
        assert getattr(model, f"{name}_std").numpy() == pytest.approx(np.where(std < 1e-6, 1, std), rel=1e-4)
    assert model.input_std[1] == 1 and model.target_std[2] == 1
    s2, *_ = model.predict(data.obs, data.action)
    assert torch.equal(s2[:, 2], data.obs[:, 2])  # whatever the network says, what never moved stays where it is
    assert not torch.isclose(s2[:, :2], data.obs[:, :2]).all()


def test_prediction_undoes_the_normalisation():
    """A network that answers 0 predicts the mean change; one that answers 1 a deviation more; x is not read."""
    buffer, model = transitions(500), mpc_rs.DynamicsModel(3, 2, 2, 8, unread=1, heads=True)
    data = buffer.rows(np.arange(500))
    model.set_normalizer(data)
    change = (data.next_obs - data.obs).double()
    for answer in (0.0, 1.0):
        torch.nn.init.zeros_(model.net[-1].weight)
        torch.nn.init.constant_(model.net[-1].bias, answer)
        s2, r, ended = model.predict(data.obs, data.action)
        expected = data.obs + (change.mean(0) + answer * change.std(0, correction=0)).float()
        assert torch.allclose(s2, expected, atol=1e-4)
        reward = data.reward.double()
        assert r[0].item() == pytest.approx((reward.mean() + answer * reward.std(correction=0)).item(), abs=1e-4)
        assert ended.tolist() == [answer > 0] * 500
    torch.nn.init.normal_(model.net[-1].weight)
    moved = data.obs + torch.tensor([5.0, 0.0, 0.0])
    before, after = model.predict(data.obs, data.action)[0], model.predict(moved, data.action)[0]
    assert torch.allclose(after - before, torch.tensor([5.0, 0.0, 0.0]).expand(500, 3), atol=1e-4)


@pytest.mark.parametrize("heads", [False, True])
def test_loss_is_equation_2(heads):
    model = mpc_rs.DynamicsModel(3, 2, 1, 8, unread=0, heads=heads)
    x, y, ended = numbers(6, 5), numbers(6, 3 + heads, seed=1), torch.tensor([0.0, 1, 0, 0, 1, 1])
    output = model(x).tolist()
    expected = 0.0
    for row in range(6):
        expected += sum(0.5 * (y[row, i].item() - output[row][i]) ** 2 for i in range(3 + heads)) / 6
        if heads:
            p = 1 / (1 + math.exp(-output[row][-1]))
            expected -= math.log(p if ended[row] else 1 - p) / 6
    assert mpc_rs.model_loss(model, x, y, ended).item() == pytest.approx(expected, rel=1e-5)


def test_minibatches_hold_the_papers_mix():
    """9 of 10 rows from D_RL, with replacement; an epoch walks once over D_RAND."""
    np.random.seed(0)
    batches = list(mpc_rs.minibatches(random_rows=60, rows=100, batch_size=40, new_fraction=0.9))
    assert [len(rows) for rows in batches] == [40] * 15
    old = np.concatenate([rows[rows < 60] for rows in batches])
    new = np.concatenate([rows[rows >= 60] for rows in batches])
    assert all((rows < 60).sum() == 4 for rows in batches)
    assert sorted(old) == list(range(60)) and list(old) != list(range(60))
    assert len(new) == 540 and set(new) == set(range(60, 100))
    counts = np.bincount(new, minlength=100)[60:]
    assert ((counts - 13.5) ** 2 / 13.5).sum() < 85  # χ² with 39 degrees of freedom: p < 1e-4


def test_minibatches_before_there_is_any_d_rl_and_with_little_d_rand():
    assert sorted(np.concatenate(list(mpc_rs.minibatches(60, 60, 20, 0.9)))) == list(range(60))
    assert [len(rows) for rows in mpc_rs.minibatches(5, 5, 20, 0.9)] == [5]  # less than one minibatch of D_RAND
    assert [len(rows) for rows in mpc_rs.minibatches(61, 61, 20, 0.9)] == [20] * 3  # the last, partial one is dropped
    assert [len(rows) for rows in mpc_rs.minibatches(1, 9, 20, 0.9)] == [9]
    assert [(rows == 60).sum() for rows in mpc_rs.minibatches(60, 61, 20, 0.9)] == [1] * 3  # one new row counts once


def test_a_reward_that_has_not_changed_yet_may():
    """Learned, of data in which it was the same all along: it is predicted, and not held for a constant of the world;
    a coordinate of the state that stood still is."""
    torch.manual_seed(0)
    model, rows = mpc_rs.DynamicsModel(3, 1, layers=1, hidden=8, unread=0, heads=True), 20
    obs, step = torch.randn(rows, 3), torch.randn(rows, 3) * torch.tensor([1.0, 1.0, 0.0])
    none = torch.zeros(rows, dtype=torch.bool)
    model.set_normalizer(mpc_rs.Transitions(obs, torch.randn(rows, 1), torch.ones(rows), obs + step, none, none))
    s2, r, _ = model.predict(obs, torch.randn(rows, 1))
    assert (s2[:, 2] == obs[:, 2]).all() and (s2[:, :2] != obs[:, :2]).all()
    assert len(r.unique()) == rows


class NoLog:
    def __init__(self):
        self.values = []

    def mean(self, tag, value):
        self.values.append(value.item())


def fitted(args, buffer, heads=False, cut=lambda: False):
    torch.manual_seed(0)
    model, log = mpc_rs.DynamicsModel(3, 2, 2, 64, unread=0, heads=heads), NoLog()
    optimizer = torch.optim.Adam(model.parameters(), args.learning_rate)
    whole = mpc_rs.fit(model, optimizer, buffer, args, log, cut)
    return model, optimizer, log, whole


@pytest.mark.parametrize("heads", [False, True])
def test_the_model_can_learn_one_batch_by_heart(heads):
    buffer = transitions(32)
    buffer.data.terminated[:32] = buffer.data.obs[:32, 0] > 2
    args = Args(random_steps=32, epochs=2_000, batch_size=32, data_noise=0.0)
    model, _, log, whole = fitted(args, buffer, heads)
    assert whole and log.values[-1] < 1e-3 < 0.5 < log.values[0]
    data = buffer.rows(np.arange(32))
    s2, r, ended = model.predict(data.obs, data.action)
    assert (s2 - data.next_obs).abs().max() < 0.05
    if heads:
        assert (r - data.reward).abs().max() < 0.1
        assert torch.equal(ended, data.terminated)


def test_fit_takes_d_rands_statistics_once_where_asked():
    args = Args(random_steps=50, epochs=1, batch_size=10, refit_normalizer=False)
    buffer = transitions(50)
    model, optimizer, _, _ = fitted(args, buffer)
    first = model.input_mean.clone()
    larger = transitions(90, seed=4)
    for column, old in zip(larger.data, buffer.data, strict=True):
        column[:50] = old[:50]
    mpc_rs.fit(model, optimizer, larger, args, NoLog(), lambda: False)
    assert torch.equal(model.input_mean, first)
    args.refit_normalizer = True
    mpc_rs.fit(model, optimizer, larger, args, NoLog(), lambda: False)
    assert torch.allclose(model.input_mean[:3], torch.from_numpy(larger.data.obs[:90].mean(0)), atol=1e-5)


def test_a_fit_can_be_cut_short():
    answers = iter([False, False, True])
    args = Args(random_steps=50, epochs=9, batch_size=10)
    _, _, log, whole = fitted(args, transitions(50), cut=lambda: next(answers))
    assert not whole and len(log.values) == 10


def test_data_noise_has_its_size(monkeypatch):
    seen = []
    monkeypatch.setattr(mpc_rs, "model_loss", lambda model, x, y, ended: seen.append((x, y)) or model(x).mean())
    buffer = transitions(4_000)
    fitted(Args(random_steps=4_000, epochs=1, batch_size=4_000, data_noise=0.5), buffer)
    x, y = seen[0]
    assert x.std(0).numpy() == pytest.approx(math.sqrt(1.25), abs=0.04)
    assert y.std(0).numpy() == pytest.approx(math.sqrt(1.25), abs=0.04)


# ── What is measured ──────────────────────────────────────────────────────────────────────────────────────────────


def test_windows_stay_in_their_episode_and_in_the_new_rows():
    buffer = transitions(40)  # episodes of 7
    buffer.data.reward[:40] = np.arange(40)
    found = mpc_rs.windows(buffer, 12, 4).reward.numpy()
    ends = {i for i in range(40) if i % 7 == 6}
    expected = [list(range(i, i + 4)) for i in range(12, 37) if not ends & set(range(i, i + 3))]
    assert found.astype(int).tolist() == expected
    assert mpc_rs.windows(buffer, 12, 8) is None
    assert mpc_rs.windows(buffer, 38, 4) is None
    assert len(mpc_rs.windows(buffer, 0, 1, at_most=10).reward) == 10


def test_open_loop_errors_are_equation_3():
    """A model that is wrong by 0.1 a step in x alone: after h steps by 0.1 h."""

    def predict(s, a):
        s2 = s + a.sum(-1, keepdim=True) + torch.tensor([0.1, 0.0, 0.0])
        return s2, s2[..., 0], torch.zeros(len(s), dtype=torch.bool)

    buffer = mpc_rs.ReplayBuffer(30, gym.spaces.Box(-9, 9, (3,)), gym.spaces.Box(-1, 1, (2,)))
    s, rng = np.zeros(3), np.random.default_rng(0)
    for _ in range(20):
        a = rng.uniform(-1, 1, 2)
        buffer.add(s, a, 0.0, s + a.sum(), False, False)
        s = s + a.sum()
    scale = torch.tensor([0.5, 1.0, 1.0])
    errors = mpc_rs.open_loop_errors(predict, mpc_rs.windows(buffer, 0, 10), scale)
    assert errors.tolist() == pytest.approx([0.5 * (0.1 * h / 0.5) ** 2 for h in range(1, 11)], rel=1e-3)


def test_heldout_metrics_look_at_new_rows_alone():
    torch.manual_seed(0)
    args, buffer = Args(random_steps=60, epochs=200, batch_size=60), transitions(60)
    model, *_ = fitted(args, buffer)
    rng = np.random.default_rng(9)

    def predict(s, a):
        return model.predict(s, a)[0], s[..., 0], torch.zeros(len(s), dtype=torch.bool)

    larger = transitions(120)
    for column, old in zip(larger.data, buffer.data, strict=True):
        column[:60] = old[:60]
    before = mpc_rs.heldout_metrics(predict, model, larger, 60)
    larger.data.next_obs[:60] += rng.normal(size=(60, 3))  # what is old does not count
    assert mpc_rs.heldout_metrics(predict, model, larger, 60)["model/heldout_loss"] == before["model/heldout_loss"]
    larger.data.next_obs[60:] += 1.0
    after = mpc_rs.heldout_metrics(predict, model, larger, 60)
    assert after["model/heldout_loss"] > 2 * before["model/heldout_loss"]
    assert after["model/open_loop_error_1"] > 2 * before["model/open_loop_error_1"]
    assert set(before) == {"model/heldout_loss", "model/open_loop_error_1", "model/open_loop_error_5"}


# ── The tasks ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("env_id", list(mpc_rs.TASKS))
def test_the_table_gives_the_environments_own_rewards_and_ends(env_id):
    env, task = mpc_rs.make_task(Args(env_id=env_id)), mpc_rs.TASKS[env_id]
    env.action_space.seed(0)
    obs, _ = env.reset(seed=0)
    rows, ends = [], 0
    for _ in range(600):
        a = env.action_space.sample()
        next_obs, reward, terminated, truncated, _ = env.step(a)
        rows.append((obs, a, next_obs, reward, terminated))
        ends += terminated
        obs = env.reset()[0] if terminated or truncated else next_obs
    s, a, s2, reward, ended = (torch.as_tensor(np.array(x), dtype=torch.float64) for x in zip(*rows, strict=True))
    assert task.reward(s, a, s2).numpy() == pytest.approx(reward.numpy(), abs=1e-5)
    assert torch.equal(task.ended(s2), ended.bool())
    assert task.reward(s, a, s2).std() > 0
    assert (ends > 3) == (env_id in ("InvertedPendulum-v5", "Hopper-v5", "Walker2d-v5"))
    if task.dynamics:
        assert task.dynamics(s, a).numpy() == pytest.approx(s2.numpy(), abs=1e-5)


def test_unread_coordinates_do_not_matter_to_the_motion():
    """What the network does not read is where the body stands: MuJoCo moves on from x + 50 as from x."""
    for env_id in ("HalfCheetah-v5", "Swimmer-v5", "Hopper-v5", "Walker2d-v5"):
        env, unread = mpc_rs.make_task(Args(env_id=env_id)), mpc_rs.TASKS[env_id].unread
        body, after = env.unwrapped, []
        env.reset(seed=0)
        position, speed = body.data.qpos.copy(), body.data.qvel.copy()
        for shift in (0.0, 50.0):
            env.reset(seed=0)
            moved = position.copy()
            moved[:unread] += shift
            body.set_state(moved, speed)
            after.append(env.step(np.full(env.action_space.shape, 0.3, np.float32))[0])
        assert after[1] - after[0] == pytest.approx([50.0] * unread + [0.0] * (len(after[0]) - unread), abs=1e-6)


def energy(s):
    """Of cart and pole, with θ = 0 hanging: kinetic, of the pole's middle and about it, and height."""
    _, v, angle, w = s
    m, M, length = mpc_rs.POLE, mpc_rs.CART, mpc_rs.LENGTH
    across, up = v + length / 2 * w * math.cos(angle), length / 2 * w * math.sin(angle)
    kinetic = M * v**2 / 2 + m * (across**2 + up**2) / 2 + mpc_rs.INERTIA * w**2 / 2
    return kinetic - m * mpc_rs.GRAVITY * length / 2 * math.cos(angle)


@given(*[st.floats(-3, 3)] * 4, st.floats(-300, 300))
def test_the_cart_pole_keeps_its_books(x, v, angle, w, force):
    """The energy changes by force and friction and by nothing else: d/dt E = (u − b v) v − b w²."""
    s, small = torch.tensor([x, v, angle, w], dtype=torch.float64), 1e-5
    derivative = mpc_rs.cart_pole_derivative(s, torch.tensor(force, dtype=torch.float64))
    before, after = (energy((s + sign * small * derivative).tolist()) for sign in (-1, 1))
    power = (force - mpc_rs.FRICTION * v) * v - mpc_rs.FRICTION * w**2
    assert (after - before) / (2 * small) == pytest.approx(power, abs=1e-3)


PETS_CART_POLE = """<mujoco>
  <option gravity="0 0 -9.81" integrator="RK4" timestep="0.02"/>
  <default><joint damping="1"/><geom contype="0" conaffinity="0"/></default>
  <worldbody>
    <body>
      <joint name="slide" type="slide" axis="1 0 0"/><geom type="capsule" size="0.1 0.1" quat="0.707 0 0.707 0"/>
      <body><joint type="hinge" axis="0 -1 0"/><geom type="capsule" fromto="0 0 0 0 0 -0.6" size="0.049"/></body>
    </body>
  </worldbody>
  <actuator><motor joint="slide" gear="100"/></actuator>
</mujoco>"""


def test_the_cart_pole_is_that_of_pets():
    """MuJoCo, with the bodies of the official code's task, moves as the equations of the file do; and the reward."""
    model = mujoco.MjModel.from_xml_string(PETS_CART_POLE)
    data, rng = mujoco.MjData(model), np.random.default_rng(0)

    def state():
        (x, angle), (v, w) = data.qpos, data.qvel
        return torch.tensor([x, v, math.cos(angle), math.sin(angle), w])

    for _ in range(100):
        data.qpos[:] = rng.uniform(-2, 2), rng.uniform(-4, 4)
        data.qvel[:] = rng.uniform(-5, 5), rng.uniform(-8, 8)
        s, a = state(), torch.tensor([rng.uniform(-3, 3)])
        data.ctrl[:] = a
        mujoco.mj_step(model, data, 2)
        s2 = mpc_rs.cart_pole_dynamics(s, a)
        if s2[0].abs() < mpc_rs.RAIL:
            assert s2.numpy() == pytest.approx(state().numpy(), abs=5e-3)
        tip = s2[0] + 0.6 * s2[3], -0.6 * s2[2]
        reward = math.exp(-(tip[0] ** 2 + (tip[1] - 0.6) ** 2) / 0.36) - 0.01 * a.item() ** 2
        assert mpc_rs.cart_pole_reward(s, a, s2).item() == pytest.approx(reward, abs=1e-5)


def test_the_rail_ends():
    """The cart stops there and the pole swings on: the blow, a force on the hinge, does not change its turning."""
    s = torch.tensor([2.49, 4.0, math.cos(2.5), math.sin(2.5), 1.0], dtype=torch.float64)
    push = torch.tensor([0.0], dtype=torch.float64)
    x, v, cos, sin, w = mpc_rs.cart_pole_dynamics(s, push).tolist()
    free = mpc_rs.cart_pole_dynamics(s - torch.tensor([2.0, 0, 0, 0, 0]), push).tolist()
    assert x == 2.5 and v == 0.0 and [cos, sin] == free[2:4]
    lever, moment = mpc_rs.POLE * 0.3, mpc_rs.INERTIA + mpc_rs.POLE * 0.09
    # about the hinge, L = (I + m l²) θ' + m l cos θ x': the same before and after
    assert moment * w == pytest.approx(moment * free[4] + lever * cos * free[1])
    assert mpc_rs.cart_pole_dynamics(-s * torch.tensor([1, 1, -1, 1, 1]), push)[0] == -2.5


def test_the_cart_poles_step_is_fine_enough():
    """One step of 0.04 s is that of 400 small ones."""
    s = torch.tensor([0.2, -0.5, math.cos(2.0), math.sin(2.0), 3.0], dtype=torch.float64)
    a, y = torch.tensor([0.7], dtype=torch.float64), torch.tensor([0.2, -0.5, 2.0, 3.0], dtype=torch.float64)
    for _ in range(40_000):
        y = y + 1e-6 * mpc_rs.cart_pole_derivative(y, mpc_rs.FORCE * a[0])
    x, v, angle, w = y.tolist()
    expected = [x, v, math.cos(angle), math.sin(angle), w]
    assert mpc_rs.cart_pole_dynamics(s, a).tolist() == pytest.approx(expected, abs=2e-4)


# ── Whole runs ────────────────────────────────────────────────────────────────────────────────────────────────────

SHORT = "--candidates 20 --horizon 5 --hidden 16 --eval-episodes 1 --eval-max-steps 50"


def test_d_rand_is_random_and_d_rl_is_planned(tmp_path):
    run_dir = helpers.run("mpc_rs", f"{SHORT} --total-timesteps 600 --random-steps 400", tmp_path / "r")
    columns = helpers.checkpoint(run_dir)["replay"]["columns"]
    obs, action, reward, next_obs, terminated, truncated = columns
    assert len(obs) == 600
    # Each stored row is the environment's own step, and none crosses an episode's end.
    task = mpc_rs.TASKS["Pendulum-v1"]
    assert torch.allclose(task.dynamics(obs, action), next_obs, atol=1e-4)
    assert torch.allclose(task.reward(obs, action, next_obs), reward, atol=1e-4)
    assert torch.nonzero(truncated).flatten().tolist() == [199, 399, 599] and not terminated.any()
    inner = ~truncated[:-1]
    assert torch.equal(obs[1:][inner], next_obs[:-1][inner])
    assert action[:400].abs().mean().item() == pytest.approx(1.0, abs=0.1)  # uniform on [−2, 2]
    planned = helpers.scalars(run_dir)["model/planned_return"]
    assert min(planned) > 400  # nothing was planned before


def test_the_picture_shows_what_was_planned_and_what_the_model_had_not_seen(tmp_path, monkeypatch):
    """D_RAND ends inside an episode, and so does the second fit: each plan is as it was believed when it was made."""
    drawn, fits, measured = [], [], []
    draw, fit, errors = mpc_rs.draw_plans, mpc_rs.fit, mpc_rs.open_loop_errors

    def fit_and_remember(model, optimizer, replay, *rest, **more):
        whole = fit(model, optimizer, replay, *rest, **more)
        fits.append((replay.size, {key: value.clone() for key, value in model.state_dict().items()}))
        return whole

    monkeypatch.setattr(mpc_rs, "fit", fit_and_remember)
    monkeypatch.setattr(mpc_rs, "draw_plans", lambda *args: drawn.append(args) or draw(*args))
    measure = lambda *args: measured.append((len(fits), args[1])) or errors(*args)  # noqa: E731
    monkeypatch.setattr(mpc_rs, "open_loop_errors", measure)
    flags = f"{SHORT} --total-timesteps 200 --random-steps 50 --refit-every 75 --epochs 1 --picture-every 200"
    run_dir = helpers.run("mpc_rs", flags, tmp_path / "r")
    obs, action, *_ = helpers.checkpoint(run_dir)["replay"]["columns"]
    assert [size for size, _ in fits] == [50, 125, 200]
    ((states, begin, plans, *_),) = drawn
    assert begin == 50 and list(plans) == list(range(50, 200, 5))
    assert np.array_equal(states, obs[50:])
    args = mpc_rs.parse_args(["--evaluate", str(run_dir)])
    model = mpc_rs.make_model(args, mpc_rs.make_task(args))
    for t, planned in plans.items():
        assert np.array_equal(planned[0], obs[t]) and planned.shape == (6, 3)
        model.load_state_dict(fits[0 if t < 125 else 1][1])  # the executed action is the plan's first
        step = model.predict(obs[t : t + 1], action[t : t + 1])[0][0].detach().numpy()
        assert np.allclose(step, planned[1], atol=1e-4)
    before = obs[125:200]
    for fitted, sequences in measured:
        if fitted == 2:  # the last picture's errors, and the last held-out ones: rows since the second fit
            assert all((row == before).all(-1).any() for row in sequences.obs[:, 0])
    assert sum(fitted == 2 for fitted, _ in measured) >= 2 and not any(fitted > 2 for fitted, _ in measured)


def test_held_out_errors_come_before_the_fit_that_ends_it(tmp_path, monkeypatch):
    order, fit, heldout = [], mpc_rs.fit, mpc_rs.heldout_metrics

    def spy_fit(model, optimizer, replay, *rest, **more):
        order.append(("fit", replay.size))
        return fit(model, optimizer, replay, *rest, **more)

    def spy_heldout(predict, model, replay, first):
        order.append(("held out", first, replay.size))
        return heldout(predict, model, replay, first)

    monkeypatch.setattr(mpc_rs, "fit", spy_fit)
    monkeypatch.setattr(mpc_rs, "heldout_metrics", spy_heldout)
    flags = f"{SHORT} --total-timesteps 500 --random-steps 150 --refit-every 120 --epochs 1 --picture-every 0"
    helpers.run("mpc_rs", flags, tmp_path / "r")
    assert order == [("fit", 150), ("held out", 150, 270), ("fit", 270), ("held out", 270, 390), ("fit", 390)]


def test_true_dynamics_learn_nothing_and_plan_from_the_first_step(tmp_path):
    run_dir = helpers.run("mpc_rs", f"{SHORT} --total-timesteps 400 --dynamics true", tmp_path / "r")
    curves = helpers.scalars(run_dir)
    assert min(curves["model/planned_return"]) == 100
    assert not any(tag.startswith("losses/") for tag in curves)
    assert helpers.checkpoint(run_dir)["learned"] == {}
    assert (run_dir / "picture.png").stat().st_size > 1_000
    total = float(np.mean(list(curves["charts/episodic_return"].values())))
    helpers.run("mpc_rs", f"--resume {run_dir} --total-timesteps 600")
    assert math.isfinite(total) and helpers.checkpoint(run_dir)["step"] == 600


@pytest.mark.learning  # it trains
def test_the_learned_reward_is_the_real_one(tmp_path):
    flags = f"{SHORT} --learn-reward --total-timesteps 1000 --random-steps 1000 --epochs 150 --hidden 64"
    run_dir = helpers.run("mpc_rs", flags, tmp_path / "r")
    args = mpc_rs.parse_args(["--evaluate", str(run_dir)])
    env = mpc_rs.make_task(args)
    model = mpc_rs.make_model(args, env)
    model.load_state_dict(helpers.checkpoint(run_dir)["learned"])
    env.action_space.seed(5)
    obs, _ = env.reset(seed=5)
    errors, rewards = [], []
    for _ in range(200):
        a = env.action_space.sample()
        next_obs, reward, *_ = env.step(a)
        _, r, ended = model.predict(torch.as_tensor(obs)[None], torch.as_tensor(a)[None])
        errors.append(r.item() - reward)
        rewards.append(reward)
        assert not ended
        obs = next_obs
    assert np.std(errors) < 0.2 * np.std(rewards)


def test_a_learned_end_is_seen_coming(tmp_path):
    """InvertedPendulum ends where the pole leans too far: the head learns that from the data alone."""
    flags = (
        f"--env-id InvertedPendulum-v5 --learn-reward --total-timesteps 1500 --random-steps 1500 --epochs 100 "
        f"--picture-every 0 {SHORT} --hidden 64"
    )
    run_dir = helpers.run("mpc_rs", flags, tmp_path / "r")
    args = mpc_rs.parse_args(["--evaluate", str(run_dir)])
    env = mpc_rs.make_task(args)
    model = mpc_rs.make_model(args, env)
    model.load_state_dict(helpers.checkpoint(run_dir)["learned"])
    s = torch.zeros(41, 4)
    s[:, 1] = torch.linspace(-0.4, 0.4, 41)
    *_, ended = model.predict(s, torch.zeros(41, 1))
    assert ended[0] and ended[-1] and not ended[15:26].any()


@pytest.mark.learning  # for its minute of compiling
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_compiled_plans_are_those_of_eager_mode():
    args, plans = Args(candidates=50, horizon=4, hidden=16), []
    env = mpc_rs.make_task(args)
    torch.manual_seed(0)
    model = mpc_rs.make_model(args, env)
    for args.compile in (False, True):
        torch.manual_seed(1)
        new_policy = mpc_rs.planner_maker(args, env, mpc_rs.predictor(args, model), torch.device("cpu"))
        plans.append([new_policy().plan(np.array([0.5, 0.5, 1.0]))[0] for _ in range(2)])
        assert hasattr(new_policy.args[0], "_torchdynamo_orig_callable") == args.compile
    for eager, compiled in zip(*plans, strict=True):
        assert torch.allclose(eager, compiled, atol=1e-4)


@pytest.mark.learning  # it trains
def test_any_environment_with_vectors_works(tmp_path):
    flags = f"--env-id MountainCarContinuous-v0 --total-timesteps 1100 {SHORT} --picture-every 500 --eval-every 0"
    run_dir = helpers.run("mpc_rs", flags, tmp_path / "r")
    assert helpers.checkpoint(run_dir)["learned"]["net.2.weight"].shape == (2 + 2, 16)  # change, reward, log-odds


@pytest.mark.learning
@pytest.mark.parametrize("planner", ["random --candidates 1000", "mppi --candidates 100 --kappa 10"])
def test_it_learns_the_pendulum(planner, tmp_path):
    """800 real steps, 400 of them before the second fit. A random agent is measured in the same evaluation."""
    flags = f"pendulum --planner {planner} --total-timesteps 800 --eval-every 0 --eval-episodes 5 --picture-every 0"
    run_dir = helpers.run("mpc_rs", flags, tmp_path / "r")
    learned = helpers.scalars(run_dir)["eval/episodic_return"][800]
    env = gym.make("Pendulum-v1")
    returns, _ = mpc_rs.evaluate(lambda: lambda obs: env.action_space.sample(), env, 20, 1, 200)
    untrained = Args(planner=planner.split()[0], candidates=100, horizon=15, layers=1)
    model = mpc_rs.make_model(untrained, env)
    new_policy = functools.partial(mpc_rs.MPC, mpc_rs.predictor(untrained, model), env.action_space, untrained, "cpu")
    blind, _ = mpc_rs.evaluate(new_policy, env, 5, 1, 200)
    assert max(np.mean(returns), np.mean(blind)) < -600
    assert learned > -300


@pytest.mark.learning
def test_it_plans_with_the_true_dynamics(tmp_path):
    flags = "pendulum --dynamics true --total-timesteps 200 --eval-episodes 10 --picture-every 0"
    run_dir = helpers.run("mpc_rs", flags, tmp_path / "r")
    assert helpers.scalars(run_dir)["eval/episodic_return"][200] > -180


@pytest.mark.learning
def test_it_swings_the_pole_up(tmp_path):
    """A pole that is never swung up earns less than 20 of 200."""
    flags = "cartpole --total-timesteps 2000 --eval-every 0 --eval-episodes 2 --picture-every 0"
    run_dir = helpers.run("mpc_rs", flags, tmp_path / "r")
    env = gym.make("CartPoleSwingUp-v0")
    returns, _ = mpc_rs.evaluate(lambda: lambda obs: env.action_space.sample(), env, 10, 1, 200)
    assert np.mean(returns) < 20
    assert helpers.scalars(run_dir)["eval/episodic_return"][2000] > 100


# ── A user's mistakes, with environments that Gymnasium does not have ─────────────────────────────────────────────


class Odd(gym.Env):
    def __init__(self, actions, observations=None, render_mode=None):
        self.action_space = actions
        self.observation_space = observations or gym.spaces.Box(-1, 1, (2,))


@pytest.mark.parametrize(
    ("spaces", "word"),
    [
        ({"actions": gym.spaces.Box(-np.inf, np.inf, (1,))}, "no bounds"),
        ({"actions": gym.spaces.Box(0, np.inf, (1,))}, "no bounds"),
        ({"actions": gym.spaces.Discrete(3)}, "dyna_q.py"),
        ({"actions": gym.spaces.MultiDiscrete([2, 2])}, "actions"),
        ({"actions": gym.spaces.Box(-1, 1, (2, 2))}, "actions"),
        ({"actions": gym.spaces.Box(-2, 2, (2,), np.int64)}, "whole numbers"),
        ({"actions": BOX, "observations": gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)}, "observations"),
        ({"actions": BOX, "observations": gym.spaces.Discrete(4)}, "observations"),
    ],
)
def test_spaces_that_do_not_fit_are_refused(spaces, word, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(gym.registry, "Odd-v0", gym.envs.registration.EnvSpec("Odd-v0", Odd, kwargs=spaces))
    with pytest.raises(SystemExit) as exit:
        helpers.run("mpc_rs", "--env-id Odd-v0", tmp_path / "r")
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert word in err and err.count("\n") == 1
    assert not (tmp_path / "r").exists()


class InPlace(gym.Env):
    """Returns its own array of whole numbers, changes it in place, and the action too."""

    observation_space, action_space = gym.spaces.Box(-99, 99, (2,), np.int64), gym.spaces.Box(-1, 1, (1,))

    def __init__(self, render_mode=None):
        self.state = np.zeros(2, np.int64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state[:] = 0
        return self.state, {}

    def step(self, action):
        self.state += np.array([1, -2])
        action *= 0
        return self.state, 1.0, bool(self.state[0] >= 40), False, {}


def test_an_environment_that_reuses_its_arrays_is_learned_all_the_same(monkeypatch, tmp_path):
    monkeypatch.setitem(gym.registry, "InPlace-v0", gym.envs.registration.EnvSpec("InPlace-v0", InPlace))
    flags = f"--env-id InPlace-v0 --total-timesteps 120 --random-steps 60 --refit-every 30 --epochs 1 {SHORT}"
    run_dir = helpers.run("mpc_rs", flags, tmp_path / "r")
    obs, action, _, next_obs, *_ = helpers.checkpoint(run_dir)["replay"]["columns"]
    assert torch.equal(next_obs - obs, torch.tensor([1.0, -2.0]).expand(120, 2))
    assert (action != 0).all()


def test_a_run_that_will_learn_nothing_says_so(tmp_path, capsys):
    helpers.run("mpc_rs", f"--total-timesteps 20 --random-steps 50 {SHORT}", tmp_path / "r")
    assert "nothing will be learned" in capsys.readouterr().out
