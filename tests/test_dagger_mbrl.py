"""The mathematics of dagger_mbrl.py against exact outcomes, loops, finite differences and random MDPs."""

import itertools
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from helpers import module

dagger = module("dagger_mbrl")
ARGS = dagger.Args()
STORIES = {  # values in the world, iteration by iteration, and the three terms of the last one
    "expert": ([-10.10, -10.10, -10.10, -10.10], (0, -0.10, 19.75)),
    "learner": ([-10.10, 0.55, 0.55, 0.55], (12.55, -3.55, 0)),
    "both": ([-10.10, 9.55, 9.55, 9.55], (0, 0, 0)),
}


@pytest.mark.parametrize("order", ["URDL", "LDRU", "RULD"])
@pytest.mark.parametrize("data", STORIES)
def test_the_three_stories_of_the_grid(data, order, monkeypatch):
    moves = {"U": (-1, 0), "R": (0, 1), "D": (1, 0), "L": (0, -1)}
    monkeypatch.setattr(dagger, "MOVES", np.array([moves[letter] for letter in order]))
    grid = dagger.Grid()
    history = dagger.learn(grid, data, ARGS)
    assert [row.value for row in history] == pytest.approx(STORIES[data][0])
    assert history[-1][2:5] == pytest.approx(STORIES[data][1])
    for row in history:
        assert sum(row[2:5]) == pytest.approx(9.55 - row.value) and grid.value(grid.expert) == pytest.approx(9.55)
        # Each term is a difference of two values.
        inside = grid.value(grid.expert, row.model), grid.value(row.policy, row.model)
        assert row[2:5] == pytest.approx((9.55 - inside[0], inside[0] - inside[1], inside[1] - row.value))
    # The control: with the true map as the first model, all stories end at once.
    grid.nominal = grid.world
    assert dagger.learn(grid, data, ARGS)[0].value == pytest.approx(9.55)


def test_on_random_maps_both_is_as_good_as_the_expert():
    args = replace(ARGS, iterations=8)
    found = {data: [] for data in STORIES}
    for seed in range(12):
        grid = dagger.random_grid(seed)
        letters = "".join(grid.desc.ravel())
        assert [letters.count(x) for x in "STPD"] == [1, 1, 4, 6] and grid.desc.shape == (9, 11)
        best = grid.value(grid.expert)
        for data, values in found.items():
            values.append(max(row.value for row in dagger.learn(grid, data, args)) > best - 1e-9)
        assert best > 9
    assert all(found["both"]) and not all(found["expert"]) and not all(found["learner"])


def random_tables(rng):
    """A world, a model of it, two policies, a start, a horizon, a discount."""
    S, A = rng.integers(2, 9), rng.integers(2, 5)
    P, other = rng.dirichlet(np.full(S, 0.5), (2, S, A))
    r, mix = rng.normal(size=(S, A)), rng.random()
    policies = rng.integers(0, A, (2, S))
    gamma, horizon = rng.choice([0.5, 0.9, 1.0]), int(rng.integers(1, 12))
    world, model = dagger.Table(P, r), dagger.Table(mix * P + (1 - mix) * other, r)
    return world, model, *policies, rng.dirichlet(np.ones(S)), horizon, float(gamma)


def l1_bound(world, model, V, d, policy, gamma):
    """Σ_t γ^{t+1} ½ span(V_{t+1}) E_{d_t} ‖P − P̂‖₁, where d holds γ^t."""
    rows = np.arange(len(policy))
    l1 = abs(world.P - model.P)[rows, policy].sum(-1)
    return sum(gamma * np.ptp(V[t + 1]) / 2 * (d[t] @ l1) for t in range(len(d)))


def test_the_lemmas_on_2000_random_mdps():
    rng, wrong, ratios = np.random.default_rng(0), 0, []
    for _ in range(2_000):
        world, model, expert, learner, start, horizon, gamma = random_tables(rng)
        J = lambda table, policy: dagger.values(table, policy, horizon, gamma)[0] @ start  # noqa: B023, E731
        gaps = {}
        for name, policy in (("expert", expert), ("learner", learner)):
            gap = dagger.simulation_gap(world, model, policy, start, horizon, gamma)
            assert gap == pytest.approx(J(world, policy) - J(model, policy), abs=1e-9)
            # With both swapped it holds too: the model's occupancy and the world's values.
            swapped = dagger.simulation_gap(model, world, policy, start, horizon, gamma)
            assert swapped == pytest.approx(-gap, abs=1e-9)
            V, d = (
                dagger.values(model, policy, horizon, gamma),
                dagger.occupancies(world, policy, start, horizon, gamma),
            )
            bound = l1_bound(world, model, V, d, policy, gamma)
            assert abs(gap) <= bound + 1e-9
            ratios.append(abs(gap) / max(bound, 1e-12))
            d = dagger.occupancies(model, policy, start, horizon, gamma)  # the wrong occupancy
            rows = np.arange(len(policy))
            mixed = sum(d[t] @ (gamma * (world.P - model.P)[rows, policy] @ V[t + 1]) for t in range(horizon))
            wrong += abs(mixed - gap) > 1e-6
            gaps[name] = gap
        planning = J(model, expert) - J(model, learner)
        assert J(world, expert) - J(world, learner) == pytest.approx(
            gaps["expert"] + planning - gaps["learner"], abs=1e-9
        )
    assert wrong > 2_500 and max(ratios) > 0.9


def test_the_bound_is_tight_and_learned_rewards_count():
    P = np.zeros((3, 1, 3))
    P[[0, 1, 2], 0, [1, 1, 2]] = 1
    other = P.copy()
    other[0, 0] = [0, 0, 1]  # the model leads to the other end
    world, model = (dagger.Table(p, np.array([[0.0], [1], [-1]])) for p in (P, other))
    policy, start = np.zeros(3, int), np.eye(3)[0]
    gap = dagger.simulation_gap(world, model, policy, start, 10, 0.9)
    V, d = dagger.values(model, policy, 10, 0.9), dagger.occupancies(world, policy, start, 10, 0.9)
    assert gap == pytest.approx(2 * sum(0.9**t for t in range(1, 10)))
    assert gap == pytest.approx(l1_bound(world, model, V, d, policy, 0.9))
    model = dagger.Table(P, world.r + 0.5)
    assert dagger.simulation_gap(world, model, policy, start, 10, 0.9) == pytest.approx(
        -0.5 * sum(0.9 ** np.arange(10))
    )


def some_steps(n, seed):
    rng = np.random.default_rng(seed)
    return dagger.Data(rng.normal(size=(n, 6)), rng.normal(size=(n, 2)), np.zeros(n), rng.normal(size=(n, 6)))


def test_each_part_has_its_share_whatever_its_size():
    task = dagger.Helicopter()
    expert, learner = some_steps(50, 0), some_steps(20, 1)
    ten_times = dagger.Data(*(np.repeat(column, 10, 0) for column in learner))
    for share in (1.0, 0.5, 0.0):
        data, weights = dagger.weigh(expert, learner, share)
        assert weights[:50].sum() == pytest.approx(share) and weights[50:].sum() == pytest.approx(1 - share)
        assert np.array_equal(data.s[50:], learner.s) and len(data.a) == len(weights)
        model = task.fit(data, weights)
        assert task.fit(*dagger.weigh(expert, ten_times, share)) == pytest.approx(model, abs=1e-9)
        # Ridge regression as ordinary least squares with nine more rows.
        x, root = np.hstack([data.s, data.a, np.ones((70, 1))]), np.sqrt(weights)[:, None]
        rest = data.s2 - x @ task.nominal.T
        rows = np.vstack([root * x, 1e-3 * np.eye(9)]), np.vstack([root * rest, np.zeros((9, 6))])
        assert model == pytest.approx(task.nominal + np.linalg.lstsq(*rows, rcond=None)[0].T, abs=1e-6)
    nothing = dagger.Data(*(column[:0] for column in learner))
    assert [dagger.weigh(expert, nothing, share)[1].sum() for share in (1.0, 0.5, 0.0)] == pytest.approx([1, 1, 0])
    assert task.fit(*dagger.weigh(expert, nothing, 0.0)) == pytest.approx(task.nominal)


def test_a_model_of_the_grid_is_what_was_seen():
    grid = dagger.Grid()
    data = dagger.Data(np.array([5, 5, 5]), np.array([2, 2, 2]), np.array([0.0, 1, 5]), np.array([7, 7, 63]))
    P, r = grid.fit(data, np.array([0.1, 0.2, 0.1]))
    assert P[5, 2, [7, 63]] == pytest.approx([0.75, 0.25]) and r[5, 2] == pytest.approx(0.7 / 0.4)
    others = np.ones(r.shape, bool)
    others[5, 2] = False
    assert np.array_equal(P[others], grid.nominal.P[others]) and np.array_equal(r[others], grid.nominal.r[others])
    assert (grid.world.P.sum(-1) == 1).all() and (grid.nominal.P.sum(-1) == 1).all()
    steps = grid.execute(grid.expert, 2, np.random.default_rng(0))
    assert len(steps.s) == 18 and steps.r.sum() == pytest.approx(2 * 9.55) and steps.s2[[8, 17]].tolist() == [63, 63]
    stuck = grid.execute(np.full(64, 3), 1, np.random.default_rng(0))
    assert len(stuck.s) == 60 and (stuck.s == stuck.s2).all()


def test_the_helicopter_and_its_linearisation():
    task, rng = dagger.Helicopter(), np.random.default_rng(0)
    for s, u in zip(rng.normal(size=(20, 6)), rng.normal(size=(20, 2)), strict=True):
        lift = 9.81 + u[0]
        speed = [-lift * np.sin(s[2]) - 0.1 * s[3] * abs(s[3]), lift * np.cos(s[2]) - 9.81 - 0.1 * s[4] * abs(s[4])]
        rates = np.array([*s[3:], *speed, u[1] - 0.5 * s[5]])
        assert task.dynamics(s[None], u[None], None, np.zeros((1, 3)))[0] == pytest.approx(s + 0.05 * rates)
        cost = (s[:3] ** 2).sum() + 0.1 * (s[3:] ** 2).sum() + 0.05 * (u**2).sum()
        assert task.cost(s[None], u[None])[0] == pytest.approx(cost) and task.cost(9 * s[None], u[None])[0] <= 50
    noise = task.dynamics(np.zeros((1, 6)), np.zeros((1, 2)), None, np.ones((1, 3)))[0]
    assert noise == pytest.approx([0, 0, 0, 0.0125, 0.0125, 0.0125])
    x, W = 1e-5 * np.eye(8), np.zeros((6, 9))
    for sign in (1, -1):
        W[:, :8] += sign * task.dynamics(sign * x[:, :6], sign * x[:, 6:], None, np.zeros((8, 3))).T / 2e-5
    assert task.plan(W) == pytest.approx(task.expert, abs=1e-3)
    far = np.array([[8.1, 0, 0, 0, 0, 0], [0, -8.1, 0, 0, 0, 0], [0, 0, 1.3, 0, 0, 0], [7.9, -7.9, -1.1, 99, 99, 99]])
    assert task.crashed(far).tolist() == [True, True, True, False]
    # The expert's own data leave two of nine directions open: u is a linear function of s.
    data = task.execute(task.expert, 5, rng)
    assert np.linalg.matrix_rank(np.hstack([data.s, data.a, np.ones((len(data.s), 1))]), tol=1e-8) == 7


def test_plans_are_the_best_affine_policies():
    task, rng = dagger.Helicopter(), np.random.default_rng(0)

    def costs(K, model, s):
        total = []
        for _ in range(400):
            u = K @ np.append(s, 1)
            total.append(s @ task.Q @ s + u @ task.R @ u)
            s = model @ np.concatenate([s, u, [1]])
        return np.array(total)

    centred, s = task.nominal * ([1] * 8 + [0]), rng.normal(size=6)
    K = task.plan(centred)
    assert abs(K[:, 6]).max() < 1e-9
    for change in rng.normal(size=(30, *K.shape)) * ([1] * 6 + [0]):
        assert costs(K + 0.01 * change, centred, s).sum() > costs(K, centred, s).sum()
    K = task.plan(task.nominal)  # with an offset, what counts is the cost of holding against it
    for shift in rng.normal(size=(30, 2, 1)) * ([0] * 6 + [0.1]):
        assert costs(K + shift, task.nominal, s)[-1] > costs(K, task.nominal, s)[-1]


@pytest.mark.parametrize("angle", [0.1, 1.15])
def test_flights_are_episodes_of_the_environment(angle):
    """Also after a crash, for which the environment takes all missing steps at once."""
    task = dagger.Helicopter()
    policy = task.expert if angle < 1 else -task.expert
    env = gym.wrappers.TimeLimit(task, 120)
    env.reset(seed=0)
    start = np.array([[1.0, 1, angle, 0, 0, 0]])
    noise = np.zeros((120, 1, 3))
    states, _, costs, alive = task.fly(policy, start, noise)
    task.s, total, over, t = start, 0.0, False, 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "pad", lambda x, *rest, pad=np.pad: pad(0 * x, *rest))  # no noise
        while not over:
            obs, reward, terminated, truncated, _ = env.step(dagger.as_function(policy)(task.s[0]))
            total, over, t = total + reward, terminated or truncated, t + 1
            assert obs == pytest.approx(states[t, 0], abs=1e-4)
    assert -total == pytest.approx(costs.sum()) and terminated == (angle > 1) and alive.sum() == t


def test_the_best_policy_is_returned_not_the_last(tmp_path, monkeypatch):
    rows = [
        dagger.Iteration(k, value, 0, 0, 0, np.full(64, k), dagger.Grid().nominal) for k, value in enumerate((1, 3, 2))
    ]
    monkeypatch.setattr(dagger, "learn", lambda *_: rows)
    dagger.main(["--data", "both", "--iterations", "3", "--run-dir", str(tmp_path / "run")])
    assert dagger.load_policy(str(tmp_path / "run"))(5) == 1
    lines = (tmp_path / "run" / "log.csv").read_text().splitlines()
    assert lines[0] == "data,iteration,value,expert_term,planning_term,learner_term" and lines[2] == "both,1,3,0,0,0"


def test_own_tasks_have_the_same_methods():
    with pytest.raises(dagger.UserError, match="Grid and Helicopter"):
        dagger.make_env(replace(ARGS, env_id="CartPole-v1"))
    right, wrong = (dagger.make_env(replace(ARGS, env_id="Helicopter-v0", model_error=x)).unwrapped for x in (0.0, 0.5))
    changed = abs(right.nominal - wrong.nominal) > 1e-9
    assert changed[3:, :6].all() and changed[4, 6] and changed[5, 7] and not changed[:3, :8].any()
    pairs = itertools.pairwise(
        dagger.make_env(replace(ARGS, env_id="RandomDoors-v0", seed=x)).unwrapped for x in (3, 3, 4)
    )
    assert [np.array_equal(a.desc, b.desc) for a, b in pairs] == [True, False]
