"""Each file learns a small task within a fixed budget; an agent that was hardly trained does not solve it."""

import gymnasium as gym
import numpy as np
import pytest
from helpers import LEAN, module, scalars


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
BUDGET = {
    "pets": PLANNER,
    "mpc_rs": PLANNER,
    "pddm": PLANNER,
    "mbpo": "--total-timesteps 700 --random-steps 200 --epoch-steps 100 --model-every 100 --rollouts 5000 --updates 5",
    "mage": "--total-timesteps 900 --random-steps 200 --updates 5",
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


def test_every_file_has_a_budget():
    assert {*BUDGET, "vin"} == {*LEAN}
