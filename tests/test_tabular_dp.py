"""The mathematics of tabular_dp.py against enumeration, closed forms and the book's figures."""

import itertools
import re
import sys
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from helpers import module
from PIL import Image

dp = module("tabular_dp")
ARGS = dp.Args()


def random_task(seed, ends=True):
    """P, r and settings of a random MDP with 2 to 8 states; in half of them episodes may end."""
    rng = np.random.default_rng(seed)
    states, actions = rng.integers(2, 9), rng.integers(2, 5)
    P, r = rng.dirichlet(np.full(states, 0.5), (states, actions)), rng.normal(size=(states, actions))
    if ends and seed % 2:
        P *= rng.random((states, actions, 1))
    gamma = 0.999 if seed % 50 == 0 else float(rng.choice([0.3, 0.9, 0.97]))
    return P, r, replace(ARGS, gamma=gamma, evaluation_sweeps=seed % 7 + 1)


def best(P, r, args, method=dp.policy_iteration):
    *_, V = method(P, r, args)
    return V


def of_preset(preset):
    args = dp.PRESETS[preset][1]
    env = dp.make_env(args)
    return env, *dp.model_of(env), args


@pytest.mark.parametrize("task", [*dp.PRESETS, *range(200)])
def test_all_methods_agree(task):
    P, r, args = of_preset(task)[1:] if task in dp.PRESETS else random_task(task)
    V = best(P, r, args)
    for method in dp.METHODS.values():
        assert abs(best(P, r, args, method) - V).max() < 1e-8
    # V* solves the optimality equation, and is the value of its greedy policy.
    assert abs(dp.backup(P, r, V, args.gamma).max(1) - V).max() < 1e-8
    assert abs(dp.evaluate(P, r, dp.greedy(dp.backup(P, r, V, args.gamma)), args.gamma) - V).max() < 1e-8


@pytest.mark.parametrize("seed", range(20))
def test_the_best_values_are_the_largest_of_all_policies(seed):
    rng = np.random.default_rng(seed)
    P, r, gamma = rng.dirichlet(np.ones(3), (3, 3)) * rng.random((3, 3, 1)), rng.normal(size=(3, 3)), 0.9
    values = []
    for policy in itertools.product(range(3), repeat=3):
        V = np.zeros(3)
        for _ in range(400):  # Eq. 4.5, state by state
            V = np.array([r[s, a] + gamma * sum(P[s, a, x] * V[x] for x in range(3)) for s, a in enumerate(policy)])
        assert dp.evaluate(P, r, np.array(policy), gamma) == pytest.approx(V, abs=1e-9)
        values.append(V)
    assert best(P, r, replace(ARGS, gamma=gamma)) == pytest.approx(np.max(values, 0), abs=1e-9)
    policy = rng.dirichlet(np.ones(3), 3)
    P_pi = sum(policy[:, a, None] * P[:, a] for a in range(3))
    r_pi = sum(policy[:, a] * r[:, a] for a in range(3))
    assert [*dp.evaluation_sweeps(P_pi, r_pi, gamma, 1e-12)][-1] == pytest.approx(dp.evaluate(P, r, policy, gamma))


@pytest.mark.parametrize(
    ("env_id", "gamma", "sweeps", "start"),
    [
        ("FrozenLake-v1", 0.99, 724, 0.542026), ("FrozenLake8x8-v1", 0.99, 830, 0.414640),
        ("FrozenLake-v1", 1.0, None, 14 / 17), ("FrozenLake8x8-v1", 1.0, None, 1.0),
        ("CliffWalking-v1", 0.99, 15, -(1 - 0.99**13) / 0.01), ("Taxi-v4", 0.99, 19, None),
    ],
)  # fmt: skip
def test_known_values(env_id, gamma, sweeps, start):
    args = replace(ARGS, env_id=env_id, gamma=gamma)
    env = dp.make_env(args)
    P, r = dp.model_of(env)
    *before, V = dp.value_iteration(P, r, args)
    assert sweeps in (None, len(before) + 1)
    if start is not None:
        assert env.unwrapped.initial_state_distrib @ V == pytest.approx(start, abs=1e-6)


def test_example_4_1_and_the_gambler():
    _, P, r, _ = of_preset("gridworld")
    history = [*dp.evaluation_sweeps(P.mean(1), r.mean(1), 1.0, 1e-4)]
    rows = {1: [0, -1, -1, -1], 2: [0, -1.75, -2, -2], 3: [0, -2.4375, -2.9375, -3], 10: [0, -6.138, -8.352, -8.967]}
    assert all(history[k - 1][:4] == pytest.approx(row, abs=1e-3) for k, row in rows.items()) and len(history) == 173
    V = dp.evaluate(P, r, np.full((16, 4), 0.25), 1.0).reshape(4, 4)
    exact = [[0, -14, -20, -22], [-14, -18, -20, -20], [-20, -20, -18, -14], [-22, -20, -14, 0]]
    assert abs(V - exact).max() < 1e-9
    _, P, r, args = of_preset("gambler")
    assert best(P, r, args)[[25, 50, 75]] == pytest.approx([0.16, 0.4, 0.64], abs=1e-9)


@pytest.mark.parametrize("seed", range(30))
def test_contraction_and_the_stopping_rule(seed):
    P, r, args = random_task(seed)
    args = replace(args, gamma=min(args.gamma, 0.99), tolerance=0.01)
    V, gamma = best(P, r, args), args.gamma
    for method in (dp.value_iteration, dp.value_iteration_in_place):
        history = [np.zeros(len(V)), *method(P, r, args)]
        for k in range(1, len(history)):
            before, change = abs(history[k - 1] - V).max(), abs(history[k] - history[k - 1]).max()
            assert abs(history[k] - V).max() <= gamma * before + 1e-9
            assert abs(history[k] - V).max() <= gamma / (1 - gamma) * change + 1e-9
        changes = [abs(b - a).max() for a, b in itertools.pairwise(history)]
        limit = 0.01 * (1 - gamma) / (2 * gamma)
        assert changes[-1] < limit and all(change >= limit for change in changes[:-1])
        policy = dp.greedy(dp.backup(P, r, history[-1], gamma))
        assert (V - dp.evaluate(P, r, policy, gamma)).max() <= 0.01
    rounds = [*dp.policy_iteration(P, r, args)]
    assert all((after >= before - 1e-9).all() for before, after in itertools.pairwise(rounds))
    assert np.array_equal(rounds[-1], rounds[-2])  # the last round only shows that nothing changes


def test_one_sweep_of_each_method():
    P, r, args = random_task(4)
    args = replace(args, evaluation_sweeps=3)
    V = np.zeros(len(r))
    first = next(dp.value_iteration(P, r, args))
    assert np.array_equal(first, r.max(1))
    in_place = next(dp.value_iteration_in_place(P, r, args))
    for s in range(len(r)):
        V[s] = max(r[s, a] + args.gamma * P[s, a] @ V for a in range(r.shape[1]))
        assert in_place[s] == pytest.approx(V[s])
    modified, V = next(dp.modified_policy_iteration(P, r, args)), r.max(1)
    for _ in range(2):  # of the policy that is greedy for V = 0
        V = np.array([r[s].max() + args.gamma * P[s, r[s].argmax()] @ V for s in range(len(r))])
    assert modified == pytest.approx(V)
    one = [*dp.modified_policy_iteration(P, r, replace(args, evaluation_sweeps=1))]
    assert all(map(np.allclose, one, dp.value_iteration(P, r, args)))


def test_equal_actions_keep_the_old_one():
    Q = np.array([[1.0, 1.0 + 1e-14, 0.0], [0.0, 2.0, 2.0 - 1e-6]])
    assert dp.greedy(Q, np.array([0, 2])).tolist() == [0, 1] and dp.greedy(Q).tolist() == [1, 1]
    large = np.array([[1e6, 1e6 + 1e-7], [1e6, 1e6 + 1e-5], [0, 0]])  # rounding grows with the values
    assert dp.greedy(large, np.array([0, 0, 1])).tolist() == [0, 1, 1]
    P, r, args = random_task(6)
    P, r = np.concatenate([P, P], 1), np.concatenate([r, r], 1)
    assert len([*dp.policy_iteration(P, r, args)]) < 20
    flips = lambda V: np.array([0, 1e6 + 1.2e-10 * (V[1] <= 1e6)])  # noqa: E731, by the last bit of the largest value
    assert len([*dp.sweeps_of(flips, 2, 1e-30)]) == 2


def test_the_model_of_an_environment():
    """Next states that are listed twice are added, and nothing follows the end of an episode."""
    P = {0: {0: [(0.25, 1, 4.0, False), (0.5, 1, 8.0, False), (0.25, 0, -8.0, True)]}, 1: {0: [(1.0, 0, 1.0, False)]}}
    env = dp.TableEnv(P, np.array([0.0, 1.0]))
    model, r = dp.model_of(env)
    assert model.tolist() == [[[0, 0.75]], [[1, 0]]] and r.tolist() == [[3], [1]]
    seen = []
    for seed in range(4_000):
        assert env.reset(seed=seed)[0] == 1 and env.step(0) == (0, 1.0, False, False, {})
        seen.append(env.step(0)[:3])
    share = {outcome: seen.count(outcome) / 4_000 for outcome in {*seen}}
    assert share == pytest.approx({(1, 4.0, False): 0.25, (1, 8.0, False): 0.5, (0, -8.0, True): 0.25}, abs=0.03)


def test_counted_models():
    P = random_task(5)[0]
    few, many = (dp.count_model(P, n, np.random.default_rng(0)) for n in (7, 1_000_000))
    assert (few * 7 == (few * 7).round()).all() and (few.sum(-1) <= 1).all() and (few.sum(-1) < 1).any()
    assert abs(many - P).max() < 0.003 and not np.array_equal(few, P)


def test_the_error_of_planning_with_counted_models():
    """Q's error falls as 1/√N, the policy's faster; the model's own value of its policy is too high."""
    _, P, r, args = of_preset("random")
    rng, samples = np.random.default_rng(7), 4 ** np.arange(1, 6)
    tasks = [dp.model_of(dp.random_mdp(seed)) for seed in range(100, 110)]
    rows = np.array([[dp.plug_in(*task, n, args, rng) for n in samples] for task in tasks])
    assert (rows[..., 2] <= rows[..., 1]).all() and (rows[..., 3] > -1e-9).all()
    errors, gaps, believed, earned = rows.mean(0).T[2:]
    slope = lambda y: np.polyfit(np.log(samples), np.log(y), 1)[0]  # noqa: E731
    assert abs(slope(errors) + 0.5) < 0.05 and slope(gaps) < -0.8
    assert believed[:2].mean() > earned[:2].mean()
    exact = dp.plug_in(P, r, 10**9, args, rng)
    assert exact.suboptimality == pytest.approx(0, abs=1e-9) and exact.q_error < 1e-3


def test_own_tasks_and_settings(monkeypatch):
    one, two, other = (dp.make_env(replace(dp.PRESETS["random"][1], seed=seed)) for seed in (3, 3, 4))
    assert one.unwrapped.P == two.unwrapped.P != other.unwrapped.P
    assert dp.make_env(replace(ARGS, time_limit=7)).spec.max_episode_steps == 7
    for changes in ({"gamma": 1.1}, {"tolerance": 0}, {"episodes": -1}):
        with pytest.raises(ValueError, match=f"--{next(iter(changes))}"):
            replace(ARGS, **changes)
    with pytest.raises(dp.UserError, match="do not converge"):  # no episode ends
        dp.evaluate(np.ones((1, 1, 1)), np.ones((1, 1)), np.array([0]), 1.0)
    large = dp.TableEnv({s: dict.fromkeys(range(20)) for s in range(5_000)}, np.full(5_000, 1 / 5_000))
    monkeypatch.setattr(dp.gym, "make", lambda *_, **__: large)
    with pytest.raises(dp.UserError, match="does not fit in memory"):
        dp.make_env(ARGS)
    monkeypatch.undo()
    with pytest.raises(dp.UserError, match="has no table"):
        dp.make_env(replace(ARGS, env_id="CartPole-v1"))
    assert isinstance(dp.make_env(ARGS), gym.wrappers.RecordEpisodeStatistics)


def test_what_a_run_prints_and_writes(tmp_path, capsys, monkeypatch):
    shown, draw = [], dp.draw_values
    monkeypatch.setattr(dp, "draw_values", lambda *x: shown.append(x[3]) or draw(*x))
    flags = "--env-id RandomMDP-v0 --gamma 0.9 --tolerance 0.1 --samples 64 --episodes 3 --capture-video --run-dir"
    dp.main([*flags.split(), str(tmp_path / "run")])
    out, (P, r) = " ".join(capsys.readouterr().out.split()), dp.model_of(dp.random_mdp(1))
    *_, V = dp.sweeps_of(lambda V: np.mean([r[:, a] + 0.9 * P[:, a] @ V for a in range(4)], 0), 20, 1e-9)
    assert f"acting at random V(start) = {V.mean():.6f}" in out and f"python {sys.argv[0]} --evaluate" in out
    assert re.findall(r"samples (\d+), bound", out) == ["4", "16", "64"]
    assert all(0 <= float(seconds) < 60 for seconds in re.findall(r"rounds, (\S+) s,", out))
    rows = [line.split(",") for line in (tmp_path / "run" / "rounds.csv").read_text().splitlines()[1:]]
    V, args = best(P, r, replace(ARGS, gamma=0.9)), replace(ARGS, gamma=0.9, tolerance=0.1)
    for name, method in dp.METHODS.items():
        history = [*method(P, r, args)]
        wanted = [(k + 1, x.mean(), abs(x - V).max()) for k, x in enumerate(history)]
        found = [[float(x) for x in row[1:]] for row in rows if row[0] == name]
        assert np.array(found) == pytest.approx(np.array(wanted), rel=1e-3, abs=1e-9)
        assert f"{name} {len(history)} rounds" in out and f"V(start) = {history[-1].mean():.6f}" in out
    sweeps = [*dp.value_iteration(P, r, args)]  # the picture, then the first and other sweeps
    assert [shown[k] for k in (0, 1, -1)] == [pytest.approx(r + 0.9 * (P @ x)) for x in (V, sweeps[0], sweeps[-1])]
    with Image.open(tmp_path / "run" / "sweeps.gif") as film, Image.open(tmp_path / "run" / "video.gif") as video:
        assert film.size == (320, 320) and film.info["duration"] == 400 and film.n_frames == len(shown) - 1
        assert video.info["duration"] == 250 and video.size == (320, 16)


def test_the_tasks_in_the_file():
    grid, gambler = dp.gridworld(), dp.gambler()
    assert {s2 for row in grid.P.values() for moves in row.values() for _, s2, _, end in moves if end} == {0, 15}
    assert grid.P[15][0] == [(1.0, 15, 0.0, True)] and grid.P[14][3] == [(1.0, 15, -1.0, True)]
    assert grid.initial_state_distrib.tolist() == [0, *[1 / 14] * 14, 0] and gambler.initial_state_distrib[50] == 1
    assert [task.observation_space.n for task in (grid, gambler)] == [16, 101]
    assert [task.action_space.n for task in (grid, gambler)] == [4, 50]
    for s, a in ((30, 9), (30, 40), (80, 49), (50, 49)):  # state, action: the stake is what is there or missing at most
        stake = min(a + 1, s, 100 - s)
        (p, up, won, end), (q, down, lost, broke) = gambler.P[s][a]
        assert (p, up, down, won, end) == (0.4, s + stake, s - stake, float(up == 100), up == 100)
        assert (q, lost, broke) == (0.6, 0, down == 0)
    rows = np.concatenate([dp.model_of(dp.random_mdp(seed))[0].reshape(-1, 20) for seed in range(20)])
    assert (rows**2).sum(1).mean() == pytest.approx(1.3 / 7, rel=0.05)  # of Dirichlet(0.3): (0.3 + 1) / (20 · 0.3 + 1)
