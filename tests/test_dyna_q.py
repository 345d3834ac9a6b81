"""Dyna-Q's mathematics against slow and obvious references, and that it learns."""

import json
import random
from collections import deque

import gymnasium as gym
import helpers
import house
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

dyna_q = helpers.module("dyna_q")
STATES, ACTIONS = 6, 3
transition = st.tuples(
    st.integers(0, STATES - 1), st.integers(0, ACTIONS - 1), st.integers(-3, 3).map(float), st.integers(0, STATES)
)
experience = st.lists(transition, min_size=1, max_size=60)


def remembered(kind, transitions, try_untried=False):
    model = dyna_q.Model(STATES, ACTIONS, kind, try_untried)
    for now, (s, a, r, s2) in enumerate(transitions, 1):
        model.learn(s, a, r, s2, now)
    return model


def random_table(seed):
    rng = random.Random(seed)
    return [[rng.uniform(-1, 1) for _ in range(ACTIONS)] for _ in range(STATES)] + [[0.0] * ACTIONS]


# ── The model ─────────────────────────────────────────────────────────────────────────────────────────────────────


@given(experience)
def test_deterministic_model_holds_the_last_outcome(transitions):
    model = remembered("deterministic", transitions)
    for (s, a), (r, s2) in {(s, a): (r, s2) for s, a, r, s2 in transitions}.items():
        assert model.outcomes[s][a] == [(1.0, r, s2)]


@given(experience)
def test_counted_model_holds_the_frequencies(transitions):
    model = remembered("expectation", transitions)
    for s in range(STATES):
        for a in range(ACTIONS):
            after = [s2 for *pair, _, s2 in transitions if pair == [s, a]]
            if after:
                assert {s2: p for p, _, s2 in model.outcomes[s][a]} == pytest.approx(
                    {s2: after.count(s2) / len(after) for s2 in after}
                )
            for _, mean, s2 in model.outcomes[s][a] if after else []:
                assert mean == pytest.approx(np.mean([x[2] for x in transitions if (x[0], x[1], x[3]) == (s, a, s2)]))


@given(experience, st.sampled_from(["deterministic", "sample"]))
def test_predecessors_are_the_pairs_predicted_to_lead_there(transitions, kind):
    model = remembered(kind, transitions)
    for s2 in range(STATES + 1):
        lead = {(s, a) for s in model.states for a in model.actions[s] if s2 in [x[2] for x in model.outcomes[s][a]]}
        assert set(model.predecessors[s2]) == lead


@given(experience)
def test_planning_may_choose_what_was_tried_and_with_a_bonus_the_rest(transitions):
    tried = {(s, a) for s, a, *_ in transitions}
    model = remembered("deterministic", transitions)
    assert {(s, a) for s in model.states for a in model.actions[s]} == tried
    assert sorted(model.states) == sorted({s for s, _ in tried})
    plus = remembered("deterministic", transitions, try_untried=True)
    assert {(s, a) for s in plus.states for a in plus.actions[s]} == {(s, a) for s, _ in tried for a in range(ACTIONS)}
    for s in plus.states:
        for a in set(range(ACTIONS)) - {a for x, a in tried if x == s}:
            assert plus.outcomes[s][a] == [(1.0, 0.0, s)]  # back to the same state, with reward 0
            assert plus.tried_at[s][a] == 0


def test_draws_are_as_frequent_as_what_was_seen():
    model = remembered("sample", [(0, 0, 0.0, 1)] * 5 + [(0, 0, 1.0, 2)] * 3 + [(0, 0, 0.0, 3)] * 2)
    random.seed(1)
    draws = [model.draw(0, 0)[1:] for _ in range(20_000)]
    counts = [draws.count(x) for x in [(0.0, 1), (1.0, 2), (0.0, 3)]]
    assert sum(counts) == 20_000
    assert sum((n - e) ** 2 / e for n, e in zip(counts, [10_000, 6_000, 4_000], strict=True)) < 14  # χ², p < 1e-3
    assert model.most_likely(0, 0) == (0.5, 0.0, 1)


# ── Updates ───────────────────────────────────────────────────────────────────────────────────────────────────────


@given(experience, st.integers(0, 99), st.floats(0, 1))
def test_expected_target_is_the_sum_over_outcomes(transitions, seed, gamma):
    model, Q = remembered("expectation", transitions), random_table(seed)
    for s in model.states:
        for a in model.actions[s]:
            seen = [r + gamma * max(Q[s2]) for x, y, r, s2 in transitions if (x, y) == (s, a)]
            assert dyna_q.expected_target(Q, model.outcomes[s][a], gamma) == pytest.approx(np.mean(seen), abs=1e-9)


def test_td_error_by_hand():
    Q = [[0.5, 0.25], [1.0, 2.0], [0.0, 0.0]]
    assert dyna_q.td_error(Q, 0, 1, 3.0, 1, 0.9) == pytest.approx(3 + 0.9 * 2.0 - 0.25)
    assert dyna_q.td_error(Q, 0, 1, 3.0, 2, 0.9) == pytest.approx(3 - 0.25)  # 2 is the end: no value beyond


@settings(deadline=None)
@given(experience, st.integers(0, 99), st.sampled_from([0.0, 0.1]))
def test_plan_is_the_box_with_a_dictionary(transitions, seed, bonus):
    """The same dice, another program: steps (f) of the box, one update after the other."""
    now, n, alpha, gamma = len(transitions) + 5, 40, 0.3, 0.9
    model, Q = remembered("deterministic", transitions, try_untried=bonus > 0), random_table(seed)
    table = {(s, a): value for s, row in enumerate(Q) for a, value in enumerate(row)}
    memory, last, order, actions = {}, {}, [], {}
    for time, (s, a, r, s2) in enumerate(transitions, 1):
        memory[s, a], last[s, a] = (r, s2), time
        if s not in order:
            order.append(s)
            actions[s] = list(range(ACTIONS)) if bonus else []
        if a not in actions[s]:
            actions[s].append(a)

    random.seed(seed)
    visited = [order[int(random.random() * len(order))] for _ in range(n)]
    for s in visited:
        a = actions[s][int(random.random() * len(actions[s]))]
        r, s2 = memory.get((s, a), (0.0, s))
        r += bonus * (now - last.get((s, a), 0)) ** 0.5
        table[s, a] += alpha * (r + gamma * max(table[s2, b] for b in range(ACTIONS)) - table[s, a])

    random.seed(seed)
    dyna_q.plan(Q, model, n, alpha, gamma, bonus, now)
    assert np.array(Q).flatten() == pytest.approx([table[key] for key in sorted(table)])
    assert Q[STATES] == [0.0] * ACTIONS


def test_planning_chooses_states_alike_and_then_their_actions():
    """Not uniform over the pairs: state 0 has one tried action, state 1 three."""
    model = remembered("deterministic", [(0, 0, 1.0, STATES)] + [(1, a, 1.0, STATES) for a in range(3)])
    random.seed(1)
    counts = np.zeros((2, 3))
    for _ in range(30_000):
        Q = [[0.0] * ACTIONS for _ in range(STATES + 1)]
        dyna_q.plan(Q, model, 1, 1.0, 0.9, 0.0, 10)
        counts += np.array(Q[:2])
    assert counts[0] / 30_000 == pytest.approx([0.5, 0, 0], abs=0.015)
    assert counts[1] / 30_000 == pytest.approx([1 / 6] * 3, abs=0.015)


@pytest.mark.parametrize("kind", ["expectation", "sample"])
def test_planning_converges_to_value_iteration_on_the_counted_model(kind):
    rng = np.random.default_rng(0)
    transitions = [
        (s, a, float(rng.integers(-2, 3)), int(rng.integers(STATES + 1)))
        for s in range(STATES) for a in range(ACTIONS) for _ in range(4)
    ]  # fmt: skip
    model = remembered(kind, transitions)
    move, reward = np.zeros((STATES, ACTIONS, STATES + 1)), np.zeros((STATES, ACTIONS))
    for s, a, r, s2 in transitions:
        move[s, a, s2] += 0.25
        reward[s, a] += 0.25 * r
    exact = np.zeros((STATES, ACTIONS))
    for _ in range(500):
        exact = reward + 0.8 * move @ np.append(exact.max(1), 0.0)
    Q = [[0.0] * ACTIONS for _ in range(STATES + 1)]
    random.seed(0)
    for alpha in (0.5, 0.1, 0.02, 0.005, 0.001):
        dyna_q.plan(Q, model, round(100 * 18 / alpha**0.8), alpha, 0.8, 0.0, 0)
    assert np.abs(np.array(Q[:-1]) - exact).max() < (1e-6 if kind == "expectation" else 0.1)


def test_epsilon_greedy_breaks_ties_at_random_and_explores():
    random.seed(1)
    counts = np.bincount([dyna_q.epsilon_greedy([1.0, 0.0, 1.0, 0.5], 0.2) for _ in range(20_000)], minlength=4)
    assert counts / 20_000 == pytest.approx([0.45, 0.05, 0.45, 0.05], abs=0.02)
    assert dyna_q.greedy([0.0, 1.0, 1.0]) == 1


# ── Prioritised sweeping ──────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.tuples(st.floats(0.01, 10), st.integers(0, 4), st.integers(0, 2)), max_size=40))
def test_queue_gives_each_pair_once_by_its_largest_priority(pushes):
    queue, largest = dyna_q.PriorityQueue(), {}
    for p, s, a in pushes:
        queue.push(p, s, a)
        largest[s, a] = max(p, largest.get((s, a), 0.0))
    popped = [queue.pop() for _ in range(len(queue))]
    assert len(queue) == 0
    assert sorted(popped) == sorted(largest)
    assert [largest[pair] for pair in popped] == sorted(largest.values(), reverse=True)


@settings(deadline=None)
@given(experience, st.integers(0, 20), st.sampled_from(["deterministic", "expectation"]))
def test_sweeping_is_the_box_with_lists(transitions, n, kind):
    """The box of section 8.4 with a plain list for a queue, and the predecessors found by looking through all pairs."""
    gamma, alpha, theta = 0.9, 0.7, 0.05
    Q, queue = [[0.0] * ACTIONS for _ in range(STATES + 1)], dyna_q.PriorityQueue()
    table, waiting, seen = [[0.0] * ACTIONS for _ in range(STATES + 1)], {}, {}
    model = dyna_q.Model(STATES, ACTIONS, kind, False)

    def target(s, a):  # tested above; rounded otherwise, two equal priorities would change places
        return dyna_q.expected_target(table, model.outcomes[s][a], gamma)

    def leads_to(s, a, goal):
        outcomes = seen[s, a][-1:] if kind == "deterministic" else seen[s, a]
        return goal in [s2 for _, s2 in outcomes]

    for now, (s, a, r, s2) in enumerate(transitions):
        model.learn(s, a, r, s2, now)
        made = dyna_q.prioritized_sweeping(Q, model, queue, s, a, n, alpha, gamma, theta)
        seen.setdefault((s, a), []).append((r, s2))
        updates, pushed = 0, [(s, a)]
        while True:
            for pair in pushed:
                p = abs(target(*pair) - table[pair[0]][pair[1]])
                if p > theta:
                    waiting[pair] = max(p, waiting.get(pair, 0.0))
            if updates == n or not waiting:
                break
            best = max(waiting.values())
            s, a = min(pair for pair, p in waiting.items() if p == best)
            del waiting[s, a]
            table[s][a] += (alpha if kind == "deterministic" else 1.0) * (target(s, a) - table[s][a])
            pushed = [pair for pair in seen if leads_to(*pair, s)]
            updates += 1
        assert made == updates
        assert queue.priority == waiting
    assert table == Q


def test_sweeping_to_the_end_leaves_no_error_above_theta():
    transitions = [(s, a, float(s == 4 and a == 2), min(s + a, STATES)) for s in range(STATES) for a in range(ACTIONS)]
    model, queue = remembered("deterministic", transitions), dyna_q.PriorityQueue()
    Q = [[0.0] * ACTIONS for _ in range(STATES + 1)]
    for s, a, *_ in transitions:
        made = dyna_q.prioritized_sweeping(Q, model, queue, s, a, 10_000, 1.0, 0.9, 1e-6)
        assert made < 10_000
    errors = [dyna_q.expected_target(Q, model.outcomes[s][a], 0.9) - Q[s][a] for s, a, *_ in transitions]
    assert np.abs(errors).max() <= 1e-6
    assert Q[4][2] == 1.0 and Q[0][2] == pytest.approx(0.81)


# ── Whole runs ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_planning_is_plain_q_learning_to_the_bit(tmp_path):
    run_dir = helpers.run("dyna_q", "maze --planning-steps 0 --total-timesteps 3000 --picture-every 0", tmp_path / "r")
    env, Q = gym.make("DynaMaze-v0"), np.zeros((55, 4))
    random.seed(1)
    s, _ = env.reset(seed=1)
    for _ in range(3000):
        if random.random() < 0.1:
            a = random.randrange(4)
        else:
            a = random.choice([b for b in range(4) if Q[s, b] == Q[s].max()])
        s2, r, end, *_ = env.step(a)
        Q[s, a] += 0.1 * (r + 0.95 * (0.0 if end else Q[s2].max()) - Q[s, a])
        s = env.reset()[0] if end else s2
    assert np.array_equal(helpers.checkpoint(run_dir)["learned"]["Q"].numpy(), Q)
    assert Q.max() > 0


def test_a_time_limit_is_bootstrapped(tmp_path):
    """Q of a run, against Q-learning by hand: where the limit cuts, the target is R + γ max Q(S'), not R."""

    class Corridor(gym.Env):
        observation_space, action_space = gym.spaces.Discrete(4), gym.spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.s = 0
            return 0, {}

        def step(self, action):
            self.s = min(self.s + 1, 3) if action else max(self.s - 1, 0)
            return self.s, 1.0, False, False, {}

    gym.register("TimedCorridor-v0", entry_point=Corridor, max_episode_steps=4)
    flags = "--env-id TimedCorridor-v0 --planning-steps 0 --total-timesteps 3000 --alpha 0.5 --gamma 0.5 --epsilon 1"
    run_dir = helpers.run("dyna_q", f"{flags} --replay-size 3000 --picture-every 0", tmp_path / "r")
    Q = helpers.checkpoint(run_dir)["learned"]["Q"]
    # One reward a step and no real end: every action tried often is worth 1 / (1 − γ) = 2; with the limit as an end,
    # the last actions of an episode would be worth 1.
    replay = helpers.checkpoint(run_dir)["replay"]["columns"]
    assert replay[5].sum() == 750 and not replay[4].any()
    tried = np.zeros((4, 2))
    np.add.at(tried, (replay[0].numpy(), replay[1].numpy()), 1)
    assert (tried > 30).sum() >= 5
    assert Q[:4].numpy()[tried > 30] == pytest.approx(2.0, abs=0.05)


def test_initial_value_is_not_the_value_of_the_end(tmp_path):
    """With Q₀ = 5 the goal's own row stays 0: Q of the last step tends to the reward 1, not to 1 + γ 5."""
    flags = "maze --initial-value 5 --alpha 1 --total-timesteps 3000 --picture-every 0"
    Q = helpers.checkpoint(helpers.run("dyna_q", flags, tmp_path / "r"))["learned"]["Q"]
    assert Q[-1].tolist() == [0.0] * 4
    assert Q[17][0] == 1.0  # the cell below the goal, up


def shortest(env):
    """Breadth first."""
    maze = env.unwrapped
    distance, todo = {maze.start: 0}, deque([maze.start])
    while todo:
        s = todo.popleft()
        for s2 in maze.next_states[maze.layout][s]:
            if s2 not in distance:
                distance[s2] = distance[s] + 1
                todo.append(s2)
    return min(distance[int(goal)] for goal in maze.goal if goal in distance)


@pytest.mark.parametrize(
    ("name", "change_at", "before", "after"),
    [("DynaMaze-v0", 0, 14, 14), ("BlockingMaze-v0", 1_000, 10, 16), ("ShortcutMaze-v0", 3_000, 16, 10)],
)
def test_mazes_are_the_books(name, change_at, before, after):
    env = gym.make(name)
    check_env(env.unwrapped, skip_render_check=True)
    env = gym.make(name)
    env.reset(seed=0)
    assert shortest(env) == before
    for _ in range(change_at - 1):
        env.step(0)
    assert shortest(env) == before
    env.step(0)
    assert shortest(env) == after
    env.reset(seed=0)
    assert shortest(env) == after  # the change outlasts the episode


def test_first_episode_is_a_random_walk_of_869_steps():
    """h(s) = 1 + Σ_a ¼ h(s'), h(goal) = 0: exact, against episodes of the real environment."""
    maze = gym.make("DynaMaze-v0").unwrapped
    cells = [s for s in range(54) if not maze.grids[0].flat[s] and s not in maze.goal]
    system = np.eye(len(cells))
    for i, s in enumerate(cells):
        for s2 in maze.next_states[0][s]:
            if s2 in cells:
                system[i, cells.index(s2)] -= 0.25
    expected = np.linalg.solve(system, np.ones(len(cells)))[cells.index(maze.start)]
    assert expected == pytest.approx(868.7, abs=0.1)
    lengths = random_episodes("DynaMaze-v0", 600, 20_000)[1]
    assert abs(np.mean(lengths) - expected) < 4 * np.std(lengths) / 600**0.5


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_a_finer_maze_is_as_much_longer(scale):
    assert shortest(gym.make("DynaMaze-v0", scale=scale)) == 13 * scale + 1  # the goal is any part of its cell


def test_the_world_changes_after_so_many_steps_and_not_during_the_last():
    env = gym.make("ShortcutMaze-v0").unwrapped
    for clock, opened in ((2_999, False), (3_000, True)):  # the 3,000th step, the 3,001st
        env.reset()
        env.load_state_dict({"clock": clock})
        env.state = 4 * 9 + 8  # below the new door
        assert (env.step(0)[0] == 3 * 9 + 8) == opened


@pytest.mark.parametrize(("clock", "changed"), [(999, False), (1_000, True)])
def test_evaluations_are_of_the_maze_as_it_is(clock, changed):
    """However many steps they take. The maze of the training ages."""
    args = dyna_q.Args(env_id="BlockingMaze-v0")
    env = dyna_q.make_task(args)
    checkpoint = {"learned": {"Q": np.zeros((54, 4))}, "env": {**dyna_q.env_state(env), "own": {"clock": clock}}}
    dyna_q.set_env_state(env, checkpoint["env"])
    new_policy = dyna_q.load_policy(args, env, checkpoint)
    assert dyna_q.evaluate(new_policy, env, 3, 1, 50)[1] == [50] * 3
    assert env.unwrapped.layout == changed and env.unwrapped.clock == clock
    training = dyna_q.make_task(args)
    training.reset(seed=1)
    training.step(0)
    assert training.unwrapped.clock == 1


def test_a_second_copy_of_the_file_holds_the_mazes_of_the_first_still():
    """A process that imports the file twice has the mazes that the first copy registered."""
    copy = house.load(helpers.ROOT / "tests" / ".." / "algos" / "dyna_q.py")
    env = copy.make_task(copy.Args(env_id="BlockingMaze-v0"))
    assert copy.Maze is not dyna_q.Maze and not isinstance(env.unwrapped, copy.Maze)
    copy.hold_still(env)
    env.reset(seed=1)
    env.step(0)
    assert env.unwrapped.clock == 0


def test_maze_map_and_moves():
    env = gym.make("DynaMaze-v0", render_mode="rgb_array")
    grid = env.unwrapped.desc
    assert grid.shape == (6, 9)
    walls = {(1, 2), (2, 2), (3, 2), (0, 7), (1, 7), (2, 7), (4, 5)}
    assert {(int(i), int(j)) for i, j in np.argwhere(grid == "#")} == walls
    assert grid[2, 0] == "S" and grid[0, 8] == "G"
    assert env.reset()[0] == 18
    assert [env.step(a)[0] for a in (0, 1, 3, 3, 2, 2, 2)] == [9, 18, 19, 19, 18, 18, 18]  # (2, 2) is a wall
    assert env.render().shape == (144, 216, 3)


def test_a_changed_maze_is_evaluated_as_it_is_now(tmp_path):
    flags = "blocking --total-timesteps 3000 --eval-every 250 --picture-every 0"
    run_dir = helpers.run("dyna_q", flags, tmp_path / "r")
    lengths = helpers.scalars(run_dir)["eval/episodic_length"]
    assert lengths[750] == 10
    assert lengths[1_000] == 1_000  # the door has just closed, and the greedy policy does not know
    assert lengths[3_000] == 16  # before the change 10 was the shortest
    again = dyna_q.play(dyna_q.parse_args(["--evaluate", str(run_dir)]))
    assert again[1] == [16] * 10


def test_spaces_that_do_not_start_at_zero(tmp_path):
    class Shifted(gym.Env):
        observation_space, action_space = gym.spaces.Discrete(5, start=10), gym.spaces.Discrete(2, start=3)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.s = 0
            return 10, {}

        def step(self, action):
            assert action in (3, 4)
            self.s = max(self.s + (1 if action == 4 else -1), 0)
            return 10 + self.s, float(self.s == 4), self.s == 4, False, {}

    gym.register("Shifted-v0", entry_point=Shifted)
    flags = "--env-id Shifted-v0 --total-timesteps 500 --picture-every 0"
    run_dir = helpers.run("dyna_q", flags, tmp_path / "r")
    final = helpers.scalars(run_dir)["eval/episodic_length"]
    assert final[max(final)] == 4


def test_a_reward_that_is_no_number_stops_the_run(tmp_path, capsys):
    class Broken(gym.Env):
        observation_space, action_space = gym.spaces.Discrete(2), gym.spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return 0, {}

        def step(self, action):
            return 1, float("nan"), False, False, {}

    gym.register("Broken-v0", entry_point=Broken)
    with pytest.raises(SystemExit) as exit:
        helpers.run("dyna_q", "--env-id Broken-v0 --picture-every 0", tmp_path / "r")
    assert exit.value.code == 2
    assert "nan" in capsys.readouterr().err


def test_an_environment_of_the_users_own(tmp_path):
    """In a module in the folder where the user stands; its episodes have no end of their own."""
    (tmp_path / "corridor.py").write_text(
        "import gymnasium as gym\n"
        "class Corridor(gym.Env):\n"
        "    observation_space, action_space = gym.spaces.Discrete(9), gym.spaces.Discrete(2)\n"
        "    def reset(self, *, seed=None, options=None):\n"
        "        super().reset(seed=seed)\n"
        "        self.s = 0\n"
        "        return 0, {}\n"
        "    def step(self, action):\n"
        "        self.s = min(max(self.s + 2 * action - 1, 0), 8)\n"
        "        return self.s, float(self.s == 8), False, False, {}\n"
        "gym.register('Corridor-v0', entry_point=Corridor)\n"
    )
    flags = "--env-id corridor:Corridor-v0 --total-timesteps 1500 --eval-max-steps 20 --checkpoint-every 100"
    process = helpers.command("dyna_q", *flags.split(), "--run-dir", "run", cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "return 13.00" in out  # 7 steps to the end, and there for the 13 that are left
    assert sorted(helpers.checkpoint(tmp_path / "run")["log"]["last"]["checkpoint"]) == [7, 1400]


def test_open_loop_error_counts_wrong_ends():
    model = remembered("deterministic", [(0, 0, 0.0, 1), (1, 0, 0.0, 2), (2, 0, 1.0, STATES)])
    replay = dyna_q.ReplayBuffer(10, gym.spaces.Discrete(STATES), gym.spaces.Discrete(ACTIONS))
    for s in range(3):
        replay.add(s, 0, 0.0, s + 1, s == 2, False)
    for length in (1, 2, 3):
        assert dyna_q.open_loop_error(model, replay.sample(50, length=length)) == 0.0
    model.learn(1, 0, 0.0, 4, 9)  # now it believes 1 → 4
    sequences = replay.sample(200, length=1)
    assert dyna_q.open_loop_error(model, sequences) == pytest.approx((sequences.obs == 1).float().mean().item())
    assert dyna_q.open_loop_error(model, replay.sample(50, length=3)) == 1.0


def test_heldout_error_falls_and_jumps_when_the_world_changes(tmp_path):
    flags = "blocking --total-timesteps 1400 --eval-every 0 --picture-every 0 --log-every 100"
    errors = helpers.scalars(helpers.run("dyna_q", flags, tmp_path / "r"))["model/heldout_error"]
    assert errors[100] > 0.5  # all is new
    assert errors[1_000] < 0.1
    assert errors[1_100] > 0  # the closed door was expected to be open
    assert errors[1_100] > errors[1_000] or errors[1_200] > errors[1_000]


def test_picture_shows_the_path_and_the_values():
    Q = [[0.0] * 4 for _ in range(55)]
    env, model = gym.make("DynaMaze-v0"), dyna_q.Model(54, 4, "deterministic", False)
    moves = env.unwrapped.next_states[0]
    for s in range(54):
        for a in range(4):
            s2 = moves[s][a]
            model.learn(s, a, float(s2 == 8), 54 if s2 == 8 else s2, 1)
    dyna_q.plan(Q, model, 200_000, 1.0, 0.95, 0.0, 1)
    path = dyna_q.imagined_path(Q, model, 18)
    assert len(path) == 15 and path[0] == 18 and path[-1] == 54
    directions = dyna_q.action_directions(model, 9)
    assert directions.tolist() == [[0, -1], [0, 1], [-1, 0], [1, 0]]  # up, down, left, right
    grid, nothing = dyna_q.grid_of(env), dyna_q.Model(54, 4, "sample", False)
    image = dyna_q.draw_values(Q, model, grid, 18, "a title")
    blank = dyna_q.draw_values([[0.0] * 4] * 55, nothing, grid, 18, "a title")
    assert image.shape == blank.shape and image.dtype == np.uint8
    assert (image != blank).mean() > 0.2
    assert dyna_q.grid_of(gym.make("Taxi-v4")) is None
    assert "".join(dyna_q.grid_of(gym.make("FrozenLake-v1"))[0]) == "SFFF"
    cliff = dyna_q.grid_of(gym.make("CliffWalking-v1"))
    assert "".join(cliff[-1]) == "SHHHHHHHHHHG"


# ── Learning ──────────────────────────────────────────────────────────────────────────────────────────────────────


def random_episodes(env_id, episodes, max_steps):
    env = gym.make(env_id)
    return dyna_q.evaluate(lambda: lambda s: random.randrange(env.action_space.n), env, episodes, 1, max_steps)


def last(run_dir, tag):
    curve = helpers.scalars(run_dir)[tag]
    return curve[max(curve)]


@pytest.mark.learning
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_learns_the_maze_in_a_few_episodes(tmp_path, seed):
    run_dir = helpers.run("dyna_q", f"maze --picture-every 0 --seed {seed}", tmp_path / "r")
    lengths = list(helpers.scalars(run_dir)["charts/episodic_length"].values())
    assert np.mean(lengths[3:23]) < 25
    assert last(run_dir, "eval/episodic_length") <= 16
    assert min(random_episodes("DynaMaze-v0", 100, 5_000)[1]) > 16
    assert np.mean(random_episodes("DynaMaze-v0", 100, 5_000)[1]) > 300


@pytest.mark.learning
def test_planning_saves_real_steps(tmp_path):
    """Episodes 2 to 10: n = 50 against n = 0, the same seeds."""
    lengths = {}
    for n in (0, 50):
        flags = f"maze --planning-steps {n} --total-timesteps 15000 --eval-every 0 --picture-every 0 --seed"
        runs = [helpers.run("dyna_q", f"{flags} {seed}", tmp_path / f"{n}_{seed}") for seed in range(1, 6)]
        lengths[n] = [list(helpers.scalars(r)["charts/episodic_length"].values())[1:10] for r in runs]
    assert np.mean(lengths[50]) * 5 < np.mean(lengths[0])


@pytest.mark.learning
@pytest.mark.parametrize(("preset", "margin"), [("blocking", 40), ("shortcut", 30)])
def test_dyna_q_plus_adapts(tmp_path, preset, margin):
    totals = {}
    for bonus in ("", "--bonus 0"):
        flags = f"{preset} {bonus} --eval-every 0 --picture-every 0 --seed"
        runs = [helpers.run("dyna_q", f"{flags} {seed}", tmp_path / f"{bonus}{seed}") for seed in range(1, 6)]
        totals[bonus] = np.mean([len(helpers.scalars(r).get("charts/episodic_return", [])) for r in runs])
    assert totals[""] > totals["--bonus 0"] + margin


@pytest.mark.learning
def test_prioritised_sweeping_needs_fewer_updates(tmp_path):
    updates = {}
    for planner in ("dyna", "prioritized"):
        flags = f"maze --planner {planner} --planning-steps 5 --alpha 1 --total-timesteps 6000 --picture-every 0"
        often = "--eval-every 50 --log-every 50 --eval-max-steps 20"
        run_dir = helpers.run("dyna_q", f"{flags} {often}", tmp_path / planner)
        lengths, made = (helpers.scalars(run_dir)[x] for x in ("eval/episodic_length", "charts/planning_updates"))
        updates[planner] = next(made[step] for step, length in lengths.items() if length <= 16)
    assert updates["prioritized"] * 3 < updates["dyna"]


@pytest.mark.learning
def test_frozenlake_policy_is_close_to_the_exact_optimum(tmp_path):
    run_dir = helpers.run("dyna_q", "frozenlake --picture-every 0", tmp_path / "r")
    P = gym.make("FrozenLake8x8-v1").unwrapped.P
    gamma = json.loads((run_dir / "args.json").read_text())["gamma"]

    def value(choose):
        v = np.zeros(64)
        for _ in range(3_000):
            q = np.array([[sum(p * (r + gamma * v[s2] * (not end)) for p, s2, r, end in P[s][a]) for a in range(4)]
                          for s in range(64)])  # fmt: skip
            v = choose(q)
        return v[0]

    greedy = np.array([dyna_q.greedy(row) for row in helpers.checkpoint(run_dir)["learned"]["Q"].tolist()[:-1]])
    best = value(lambda q: q.max(1))
    assert value(lambda q: q[np.arange(64), greedy]) > 0.95 * best
    assert value(lambda q: q.mean(1)) < 0.05 * best  # the random agent


@pytest.mark.learning
@pytest.mark.parametrize(("preset", "threshold"), [("taxi", 7.0), ("cliff", -13.0)])
def test_learns_the_other_tasks(tmp_path, preset, threshold):
    run_dir = helpers.run("dyna_q", f"{preset} --picture-every 0", tmp_path / "r")
    assert last(run_dir, "eval/episodic_return") >= threshold
    env_id = dyna_q.PRESETS[preset][1].env_id
    assert max(random_episodes(env_id, 50, 200)[0]) < threshold - 20
