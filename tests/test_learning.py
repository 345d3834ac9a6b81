"""Each file learns a small task within a fixed budget; an agent that was hardly trained does not solve it."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import module, scalars


class Point(gym.Env):
    """Move a point in the plane to the origin; the return is minus the sum of its distances over 25 steps."""

    observation_space, action_space = gym.spaces.Box(-2, 2, (2,)), gym.spaces.Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        angle = self.np_random.uniform(0, 2 * np.pi)
        self.s = np.array([np.cos(angle), np.sin(angle)], np.float32)
        return self.s, {}

    def step(self, a):
        self.s = np.clip(self.s + 0.2 * np.clip(a, -1, 1), -2, 2).astype(np.float32)
        return self.s, -float(np.linalg.norm(self.s)), False, False, {}


gym.register("Point-v0", Point, max_episode_steps=25)
PLANNER = "--total-timesteps 400 --random-steps 100 --refit-every 100 --horizon 6"
DREAMER = "--obs vector --total-timesteps 1200 --random-steps 500 --batch-length 10 --horizon 6 --decoder-std 0.1 "
DREAMER += "--pretrain 100 --gamma 0.9 --world-learning-rate 1e-3 --actor-learning-rate 1e-3"
BUDGET = {
    "pets": PLANNER,
    "mpc_rs": PLANNER,
    "pddm": PLANNER,
    "mbpo": "--total-timesteps 700 --random-steps 200 --epoch-steps 100 --model-every 100 --rollouts 5000 --updates 5",
    "mage": "--total-timesteps 900 --random-steps 200 --updates 5",
    "planet": "--action-repeat 1 --total-timesteps 500 --random-steps 300 --updates 40 --batch-length 10 --horizon 5 "
    "--decoder-std 0.1 --reward-scale 1 --learning-rate 3e-3",
    "dreamer_v1": f"{DREAMER} --action-repeat 1 --batch-size 16 --reward-scale 1 --value-learning-rate 1e-3",
    "dreamer_v2": f"{DREAMER} --reinforce-share 0 --entropy-scale 0.001 --no-ends",
    "dreamer_v3": "--total-timesteps 2000 --learning-rate 4e-4 --gamma 0.9 --horizon 6 --batch-length 8",
}


@pytest.mark.learning
@pytest.mark.parametrize("name", BUDGET)
def test_learns_to_move_a_point_to_the_origin(name, tmp_path):
    """Five steps reach the origin from a distance of 1: the best return is about −2."""
    scores = []
    for run_dir, flags in ((tmp_path / "untrained", "--total-timesteps 25"), (tmp_path / "trained", "")):
        words = f"--env-id Point-v0 {BUDGET[name]} --eval-every 100000 --episodes 20 {flags}"
        module(name).main([*words.split(), "--run-dir", str(run_dir)])
        (score,) = scalars(run_dir)["eval/episodic_return"].values()
        scores.append(score)
    untrained, trained = scores
    assert trained > -6 and untrained < -12, scores


@pytest.mark.learning
def test_vin_learns_to_plan_in_unseen_mazes(tmp_path):
    """By 500 updates; the walks of a hardly trained network arrive from next to the goal at best."""
    scores = []
    for run_dir, steps in ((tmp_path / "untrained", 1), (tmp_path / "trained", 500)):
        words = f"--total-timesteps {steps} --mazes 2000 --test-mazes 300 --eval-every 100000 --episodes 1"
        module("vin").main([*words.split(), "--run-dir", str(run_dir)])
        (score,) = scalars(run_dir)["eval/success_rate"].values()
        scores.append(score)
    untrained, trained = scores
    assert trained > 0.85 and untrained < 0.4, scores


@pytest.mark.learning
@pytest.mark.parametrize("name", ["muzero", "gumbel_muzero"])
def test_a_search_in_a_learned_model_balances_a_pole(name, tmp_path):
    """The best return is 500. The first run ends before the first update."""
    scores = []
    for run_dir, steps in ((tmp_path / "untrained", 800), (tmp_path / "trained", 4_000)):
        words = f"cartpole --total-timesteps {steps} --gamma 0.98 --simulations 25 --eval-every 100000 --episodes 10"
        module(name).main([*words.split(), "--run-dir", str(run_dir)])
        (score,) = scalars(run_dir)["eval/episodic_return"].values()
        scores.append(score)
    untrained, trained = scores
    assert trained > 120 and untrained < 40, scores


@pytest.mark.learning
@pytest.mark.parametrize(("flags", "budget", "shortest"), [("", 3_000, 14), ("--planner prioritized", 2_000, 14)])
def test_dyna_q_finds_the_shortest_path_and_the_same_steps_without_planning_do_not(flags, budget, shortest, tmp_path):
    lengths = {}
    for n in (0, 50):
        words = f"maze --planning-steps {n} --total-timesteps {budget} --seed 2 {flags if n else ''}"
        module("dyna_q").main([*words.split(), "--run-dir", str(tmp_path / str(n))])
        lengths[n] = list(scalars(tmp_path / str(n))["eval/episodic_length"].values())[-1]
    assert lengths[50] <= shortest + 2 and lengths[0] > 100, lengths


@pytest.mark.learning
def test_dyna_q_plus_finds_the_shortcut_and_dyna_q_does_not(tmp_path):
    """The shortest path is 16 before the change and 10 after it."""
    found = {}
    for bonus in ("", "--bonus 0"):
        for seed in (1, 2, 3):
            run_dir = tmp_path / f"{bonus}{seed}"
            module("dyna_q").main([*f"shortcut {bonus} --seed {seed} --run-dir".split(), str(run_dir)])
            lengths = list(scalars(run_dir)["charts/episodic_length"].values())
            found.setdefault(bonus, []).append(np.median(lengths[-20:]))
    assert np.mean(found[""]) < 14 and np.mean(found["--bonus 0"]) > 15, found


@pytest.mark.learning
def test_dyna_q_is_close_to_the_exact_optimum_of_a_slippery_lake(tmp_path):
    """On the mean of three seeds."""
    P = gym.make("FrozenLake8x8-v1").unwrapped.P

    def value(choose):
        v = np.zeros(64)
        for _ in range(2_000):
            q = np.array([[sum(p * (r + 0.99 * v[s2] * (not end)) for p, s2, r, end in P[s][a]) for a in range(4)]
                          for s in range(64)])  # fmt: skip
            v = choose(q)
        return v[0]

    best, found = value(lambda q: q.max(1)), []
    for seed in ("1", "2", "3"):
        words = ["frozenlake", "--seed", seed, "--eval-every", "60000", "--run-dir", str(tmp_path / seed)]
        module("dyna_q").main(words)
        policy = module("dyna_q").load_policy(str(tmp_path / seed))
        greedy = np.array([policy(s) for s in range(64)])
        found.append(value(lambda q, greedy=greedy: q[np.arange(64), greedy]) / best)
    assert np.mean(found) > 0.95, found
    assert value(lambda q: q.mean(1)) < 0.05 * best  # the random agent


@pytest.mark.learning
def test_curiosity_reaches_the_end_of_a_maze_and_ppo_alone_and_random_moves_rarely_do(tmp_path):
    """Three seeds each, with the same budget. PPO alone may be lucky once; which seed is, depends on the CPU."""
    icm, found = module("icm"), {}
    gym.register("LearnMaze-v0", lambda **kwargs: icm.Maze(size=9, **kwargs), max_episode_steps=50)
    flags = "--envs 16 --horizon 32 --total-timesteps 112000 --learning-rate 1e-3 --epochs 3 --model-hidden 128 "
    flags += "--eval-every 1000000 --picture-every 1000000 --episodes 1"
    for reward in ("both", "extrinsic"):
        for seed in range(1, 4):
            words = f"--env-id LearnMaze-v0 --reward {reward} --seed {seed} {flags} --run-dir".split()
            icm.main([*words, str(tmp_path / f"{reward}{seed}")])
            found.setdefault(reward, []).append(*scalars(tmp_path / f"{reward}{seed}")["eval/episodic_return"].values())
    envs = icm.Environments(icm.Args("LearnMaze-v0", envs=16))
    random_rewards = sum(envs.step(torch.randint(4, (16,)).tolist())[1].sum() for _ in range(112_000 // 16))
    assert sum(found["both"]) >= 2 and sum(found["extrinsic"]) <= 1 and random_rewards < 4, found


@pytest.mark.learning
def test_tabular_dp_walks_over_the_ice(tmp_path):
    """With patience, 14 of 17 episodes of FrozenLake reach the goal."""
    dp = module("tabular_dp")
    args = dp.Args(gamma=0.9999, time_limit=100_000, episodes=10_000, run_dir=str(tmp_path / "run"))
    dp.train(args)
    env, fixed = dp.make_env(args), np.random.default_rng(0).integers(0, 4, 16)
    success = dp.play(dp.load_policy(str(tmp_path / "run")), env, args, tmp_path / "play.gif")
    at_random = dp.play(dp.as_function(fixed), env, args, tmp_path / "play.gif")
    assert abs(success - 14 / 17) < 0.012 and at_random < 0.2, (success, at_random)


@pytest.mark.learning
def test_dagger_needs_the_expert_and_the_learner():
    """On maps both data together always reach the expert's value, and each alone does not; the helicopter hovers."""
    dagger, found = module("dagger_mbrl"), {}
    for data in dagger.EXPERT_SHARE:
        won = []
        for seed in range(1_000, 1_060):
            grid = dagger.random_grid(seed)
            history = dagger.learn(grid, data, dagger.Args(iterations=8))
            won.append(max(row.value for row in history) > grid.value(grid.expert) - 1e-9)
        ratios = []
        for seed in range(1_000, 1_010):
            args = dagger.Args("Helicopter-v0", iterations=15, rollouts=2, seed=seed)
            task = dagger.make_env(args).unwrapped
            ratios.append(dagger.learn(task, data, args)[-1].value / task.value(task.expert))
        found[data] = np.mean(won), np.mean(ratios), (np.array(ratios) < 1.1).sum()
    assert found["both"][0] == 1 and found["expert"][0] < 0.95 and found["learner"][0] < 0.85, found
    assert found["both"][2] >= 9 and found["expert"][1] > 2, found
