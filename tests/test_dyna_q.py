"""The mathematics of dyna_q.py against slow and obvious references."""

import itertools
import math
import os
import signal

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import differences, module, scalars
from hypothesis import given
from hypothesis import strategies as st

dyna_q = module("dyna_q")
STATES, ACTIONS = 6, 3
STEP = st.integers(0, STATES - 1), st.integers(0, ACTIONS - 1), st.integers(-3, 3).map(float), st.integers(0, STATES)
experience = st.lists(st.tuples(*STEP), min_size=1, max_size=60)


def remembered(steps, kind="deterministic", bonus=0.0):
    model = dyna_q.Model(STATES, ACTIONS, dyna_q.Args(model=kind, bonus=bonus))
    for now, step in enumerate(steps, 1):
        model.learn(*step, now)
    return model


def train(flags, run_dir):
    dyna_q.main([*flags.split(), "--run-dir", str(run_dir)])
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


@given(experience, st.sampled_from(["deterministic", "sample", "expectation"]), st.sampled_from([0.0, 0.1]))
def test_the_model_is_what_a_list_of_all_steps_says(steps, kind, bonus):
    model = remembered(steps, kind, bonus)
    assert model.states == list(dict.fromkeys(s for s, *_ in steps))
    for s in range(STATES):
        tried = list(dict.fromkeys(a for x, a, *_ in steps if x == s))
        assert model.actions[s] == ([0, 1, 2] if bonus and tried else tried)
        for a in range(ACTIONS):
            after = [(r, s2, now) for now, (x, y, r, s2) in enumerate(steps, 1) if (x, y) == (s, a)]
            after = after[-1:] if kind == "deterministic" else after
            assert model.tried_at[s][a] == (after[-1][2] if after else 0)
            expected = {s2: (np.mean([y == s2 for _, y, _ in after]), np.mean([r for r, y, _ in after if y == s2]))
                        for _, s2, _ in after} or {s: (1, 0)}  # fmt: skip
            found = {s2: (p, r) for p, r, s2 in model.outcomes[s][a]}
            assert found == {s2: pytest.approx(pair) for s2, pair in expected.items()}
            assert model.most_likely(s, a) == max(expected, key=lambda x: (round(expected[x][0], 9), expected[x][1], x))
            leads = {s2 for s2 in range(STATES + 1) if (s, a) in model.predecessors[s2]}
            assert leads == ({*expected} if after else set())


@given(experience, st.integers(0, 99), st.sampled_from([0.0, 0.1]), st.sampled_from(["deterministic", "expectation"]))
def test_plan_is_the_box_with_dictionaries(steps, seed, bonus, kind):
    """The same random numbers, another program: one update after the other."""
    now, n, alpha = len(steps) + 5, 40, 0.3 if kind == "deterministic" else 1.0
    args = dyna_q.Args(planning_steps=n, alpha=0.3, gamma=0.9, bonus=bonus, model=kind)
    torch.manual_seed(seed)
    model, Q = remembered(steps, kind, bonus), [*torch.rand(STATES, ACTIONS).tolist(), [0.0] * ACTIONS]
    table = {(s, a): value for s, row in enumerate(Q) for a, value in enumerate(row)}
    memory, last, tried = {}, {}, {}
    for time, (s, a, r, s2) in enumerate(steps, 1):
        memory.setdefault((s, a), []).append((r, s2))
        last[s, a], actions = time, tried.setdefault(s, [0, 1, 2] if bonus else [])
        actions += [a] * (a not in actions)
    torch.manual_seed(seed)
    for i, j in torch.randint(2**30, (n, 2), dtype=torch.int32).tolist():
        s = list(tried)[i % len(tried)]
        a = tried[s][j % len(tried[s])]
        outcomes = memory.get((s, a), [(0.0, s)])
        targets = [r + 0.9 * max(table[s2, b] for b in range(ACTIONS)) for r, s2 in outcomes]
        target = targets[-1] if kind == "deterministic" else sum(targets) / len(targets)
        target += bonus * (now - last.get((s, a), 0)) ** 0.5
        table[s, a] += alpha * (target - table[s, a])
    torch.manual_seed(seed)
    assert dyna_q.plan(Q, model, args, now) == n
    assert np.array(Q).flatten() == pytest.approx([table[pair] for pair in sorted(table)])
    assert Q[STATES] == [0.0] * ACTIONS


def test_planning_chooses_states_alike_then_their_actions_then_outcomes():
    """Not uniform over the pairs: state 0 has one tried action, state 1 three; two outcomes of one pair, 3 to 1."""
    steps = [(0, 0, r, STATES - (r < 0)) for r in (1.0, 1.0, -1.0, 1.0)] + [(1, a, 1.0, STATES) for a in range(3)]
    model, counts = remembered(steps, "sample"), np.zeros((STATES + 1, ACTIONS))
    torch.manual_seed(0)
    for _ in range(20_000):
        Q = [[0.0] * ACTIONS for _ in range(STATES + 1)]
        dyna_q.plan(Q, model, dyna_q.Args(planning_steps=1, alpha=1.0, model="sample"), 10)
        counts += np.array(Q) / 20_000
    assert counts[0] == pytest.approx([0.5 * 0.5, 0, 0], abs=0.02)  # ¾ · 1 − ¼ · 1
    assert counts[1] == pytest.approx([1 / 6] * 3, abs=0.015)
    assert [model.sample(0, 0, u)[1] for u in (0, 0.749, 0.75, 1)] == [1, 1, -1, -1]


def test_epsilon_greedy_breaks_ties_at_random_and_explores():
    torch.manual_seed(0)
    chosen = [dyna_q.epsilon_greedy([1.0, 0.0, 1.0, 0.5], 0.2) for _ in range(20_000)]
    assert np.bincount(chosen) / 20_000 == pytest.approx([0.45, 0.05, 0.45, 0.05], abs=0.015)


@given(experience, st.integers(1, 20), st.sampled_from(["deterministic", "expectation"]))
def test_sweeping_is_the_box_and_finds_the_predecessors_among_all_pairs(steps, n, kind):
    args = dyna_q.Args(planner="prioritized", planning_steps=n, alpha=0.7, gamma=0.9, theta=0.05, model=kind)
    Q, table = ([[0.0] * ACTIONS for _ in range(STATES + 1)] for _ in range(2))
    model, waiting, seen = dyna_q.Model(STATES, ACTIONS, args), {}, {}

    def error(s, a):
        return dyna_q.expected_target(table, model.outcomes[s][a], 0.9) - table[s][a]

    for now, (s, a, r, s2) in enumerate(steps):
        model.learn(s, a, r, s2, now)
        made = dyna_q.prioritized_sweeping(Q, model, s, a, args)
        seen[s, a] = [*seen.get((s, a), []), s2][-1 if kind == "deterministic" else 0 :]
        changed, updates = [(s, a)], 0
        while True:
            found = {pair: abs(error(*pair)) for pair in changed}
            waiting |= {pair: max(x, waiting.get(pair, 0.0)) for pair, x in found.items() if x > 0.05}
            if updates == n or not waiting:
                break
            s, a = max(waiting, key=waiting.get)
            del waiting[s, a]
            table[s][a] += error(s, a) * (0.7 if kind == "deterministic" else 1)
            changed, updates = list(model.predecessors[s]), updates + 1
            assert {*changed} == {pair for pair in seen if s in seen[pair]}
        assert (made, model.queue, Q) == (updates, waiting, table)


def test_no_planning_is_plain_q_learning_to_the_bit(tmp_path):
    state = train("maze --planning-steps 0 --total-timesteps 2500 --initial-value 0.1", tmp_path / "r")
    curves, env = scalars(tmp_path / "r"), gym.make("DynaMaze-v0")
    torch.manual_seed(1)
    Q, seen, now = np.vstack([np.full((54, 4), 0.1), np.zeros(4)]), {}, 0
    while now < 2500:
        (s, _), end, errors, surprises = env.reset(seed=int(torch.randint(2**31, ()))), False, [], 0
        while not end and now < 2500:
            explore, u = torch.rand(2).tolist()
            actions = range(4) if explore < 0.1 else np.flatnonzero(Q[s] == Q[s].max())
            a, now = int(actions[int(u * len(actions))]), now + 1
            s2, r, end, *_ = env.step(a)
            s2 = 54 if end else s2
            errors.append(r + 0.95 * Q[s2].max() - Q[s, a])
            Q[s, a] += 0.1 * errors[-1]
            surprises += s2 != seen.get((s, a), s)
            seen[s, a], s = s2, s2
        assert curves["losses/td_error"][now] == pytest.approx(np.abs(errors).mean())
        assert curves["model/heldout_error"][now] == pytest.approx(surprises / len(errors))
        assert curves["model/tried_pairs"][now] == len(seen) and curves["charts/planning_updates"][now] == 0
    assert np.array_equal(state["agent"]["Q"].numpy(), Q) and Q[17, 0] > 0.1


class Endless(gym.Env):
    """Four states in random order and a reward of 1 for each step, for ever."""

    observation_space, action_space, reward = gym.spaces.Discrete(4), gym.spaces.Discrete(2), 1.0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return 0, {}

    def step(self, action):
        return int(self.np_random.integers(4)), self.reward, False, False, {}


gym.register("Timed-v0", Endless, max_episode_steps=4)
gym.register("Broken-v0", type("Broken", (Endless,), {"reward": math.nan}))
gym.register("Shifted-v0", type("Shifted", (Endless,), {"action_space": gym.spaces.Discrete(2, start=1)}))


def test_a_time_limit_is_bootstrapped(tmp_path):
    flags = "--env-id Timed-v0 --planning-steps 0 --total-timesteps 1000 --alpha 0.5 --gamma 0.5 --epsilon 1"
    learned = train(flags, tmp_path / "r")["agent"]["Q"][:4].numpy()
    assert learned == pytest.approx(2, abs=0.05)  # 1 / (1 − γ), also for the last action of an episode


def shortest(env):
    """Breadth first, by the environment's own steps."""
    env.reset()
    clock, reached = env.clock, {env.s}
    for length in range(1, 54):
        for s, a in list(itertools.product(reached, range(4))):
            env.s, env.clock = s, clock
            s2, _, won, *_ = env.step(a)
            if won:
                return length
            reached.add(s2)


def test_the_mazes_are_the_books_and_change_at_their_step():
    mazes = ("DynaMaze-v0", 0, 14, 14), ("BlockingMaze-v0", 1_000, 10, 16), ("ShortcutMaze-v0", 3_000, 16, 10)
    for env_id, change_at, before, after in mazes:
        env, now = gym.make(env_id).unwrapped, change_at
        assert shortest(env) == after  # --evaluate
        for clock, length in ((0, before), (now - 1, before), (now, after), (now + 1, after)):
            env.reset(options={"step": clock})
            assert shortest(env) == length  # which resets once more: the step stays set
        env.reset(options={"step": change_at - 2})
        env.s, _, walls = 0, env.step(0), env.desc.copy()
        assert (env.step(0)[0], (env.desc != walls).any()) == (0, change_at > 0)  # it changes within an episode


def test_the_moves_of_the_dyna_maze():
    env = gym.make("DynaMaze-v0", render_mode="rgb_array")
    assert env.reset()[0] == 18 and env.unwrapped.desc[0, 8] == "G" and env.render().shape == (288, 432, 3)
    walls = [(0, 7), (1, 2), (1, 7), (2, 2), (2, 7), (3, 2), (4, 5)]
    assert np.argwhere(env.unwrapped.desc == "#").tolist() == [[*wall] for wall in walls]
    assert [env.step(a)[0] for a in (0, 1, 3, 3, 2, 2, 0, 0, 0)] == [9, 18, 19, 19, 18, 18, 9, 0, 0]
    env.unwrapped.s = 9 + 8
    assert env.step(3)[:3] == (17, 0.0, False) and env.step(0)[:3] == (8, 1.0, True)


def test_a_changing_maze_resumes_at_its_step_and_is_evaluated_as_it_is(tmp_path, monkeypatch):
    flags = "blocking --bonus 0 --alpha 0.5 --total-timesteps 1300 --eval-every 950"
    count_steps, whole, curves = dyna_q.Run.count_steps, train(flags, tmp_path / "whole"), scalars(tmp_path / "whole")
    first, second = curves["eval/episodic_length"].items()
    assert second[1] == 10_000 and first[1] == 10 and 950 <= first[0] < 1_000  # later the path is closed
    assert {*curves["charts/planning_updates"].values()} == {50}
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop = lambda run: count_steps(run) or (run.step == 900 and os.kill(os.getpid(), signal.SIGTERM))  # noqa: E731
        patch.setattr(dyna_q.Run, "count_steps", stop)
        train(flags, tmp_path / "run")
    dyna_q.main(["--resume", str(tmp_path / "run")])
    assert differences(torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True), whole) == []


def test_the_predicted_path_is_greedy_and_ends():
    env, args = gym.make("DynaMaze-v0").unwrapped, dyna_q.Args(alpha=1.0, planning_steps=100_000)
    agent, model = dyna_q.Agent(env, args), dyna_q.Model(54, 4, args)
    assert dyna_q.predicted_path(agent, model, 18) == [18, 18]  # nothing is known: it stays where it is
    for s in np.flatnonzero(env.desc != "#").tolist():
        for a in range(4):
            env.s = s
            s2, r, won, *_ = env.step(a)
            model.learn(s, a, r, 54 if won else s2, 1)
    dyna_q.plan(agent.Q, model, args, 1)
    path = dyna_q.predicted_path(agent, model, 18)
    assert len(path) == 15 and path[0] == 18 and path[-2:] == [17, 54]
    assert agent.Q[18] == pytest.approx([0.95**15, 0.95**13, 0.95**14, 0.95**13]) and agent(np.int64(17)) == 0


WRONG = {"--alpha 1.1": "--alpha", "--gamma 1.1": "--gamma", "--planner prioritized --bonus 1": "--planner"}
WRONG |= {"--env-id Broken-v0": "NaN", "--env-id Shifted-v0": "actions", "--env-id Pong-v0": "Pong"}


@pytest.mark.parametrize("flags", WRONG)
def test_a_wrong_setting_or_environment_is_named(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        train(f"maze {flags}", tmp_path / "r")
    assert exit.value.code == 2 and WRONG[flags] in capsys.readouterr().err
