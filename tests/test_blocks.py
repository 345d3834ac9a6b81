"""The blocks that every script carries a copy of, tested once: tests/house.py keeps the copies equal."""

import random

import gymnasium as gym
import helpers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

block = helpers.module("muzero")


def test_random_states_come_back():
    def dice():
        return random.random(), np.random.rand(), torch.rand(1).item()

    block.seed_everything(3)
    first = dice()
    states = block.random_states()
    second = dice()
    block.set_random_states(states)
    assert dice() == second != first
    block.seed_everything(3)
    assert dice() == first


def test_checkpoint_is_replaced_whole(tmp_path, monkeypatch):
    block.save_checkpoint(tmp_path, step=1)

    def fail_half_way(state, file):
        file.write(b"half a checkpo")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(block.torch, "save", fail_half_way)
        with pytest.raises(KeyboardInterrupt):
            block.save_checkpoint(tmp_path, step=2)
    assert block.load_checkpoint(tmp_path)["step"] == 1
    block.save_checkpoint(tmp_path, step=3)
    assert block.load_checkpoint(tmp_path)["step"] == 3


def test_environment_state_comes_back():
    env = gym.make("FrozenLake-v1")
    env.reset(seed=1)
    env.action_space.seed(1)

    def play():
        env.reset()
        return [env.step(env.action_space.sample())[0] for _ in range(3)]

    state = block.env_state(env)
    first, second = play(), play()
    block.set_env_state(env, state)
    assert (play(), play()) == (first, second)


def test_evaluation_is_repeatable_and_leaves_the_dice_alone():
    env = gym.make("FrozenLake-v1")

    def new_policy():
        return lambda s: random.randrange(4)

    before = block.random_states()
    scores = [block.evaluate(new_policy, env, 20, seed=1, max_steps=50) for _ in range(2)]
    assert scores[0] == scores[1]
    assert len(set(scores[0][1])) > 1
    assert helpers.differences(block.random_states(), before) == []
    assert scores[0] != block.evaluate(new_policy, env, 20, seed=2, max_steps=50)
    assert block.evaluate(lambda: lambda s: 0, gym.make("CliffWalking-v1"), 2, 1, max_steps=7)[1] == [7, 7]


def test_each_evaluation_episode_has_a_policy_of_its_own():
    """A policy may remember: its memory must not reach the next episode."""

    def new_policy():
        seen = []

        def policy(obs):
            seen.append(obs)
            return 3 if len(seen) == 1 else 0  # right once, then up

        return policy

    env, firsts = gym.make("CliffWalking-v1"), []
    env.step = lambda action, step=env.step: firsts.append(action) or step(action)
    block.evaluate(new_policy, env, 3, 1, max_steps=4)
    assert firsts == [3, 0, 0, 0] * 3


def test_environment_state_with_arrays_can_be_read_back(tmp_path):
    class Remembers(gym.Env):
        observation_space, action_space = gym.spaces.Discrete(2), gym.spaces.Discrete(2)
        memory = np.arange(3.0)

        def state_dict(self):
            return {"memory": self.memory, "list": [np.ones(2), np.float64(1.5), (np.int64(3), None)]}

        def load_state_dict(self, state):
            self.memory = np.asarray(state["memory"])

    env = Remembers()
    env.unwrapped.np_random = np.random.Generator(np.random.MT19937(3))  # its state holds an array
    block.save_checkpoint(tmp_path, env=block.env_state(env))
    first = env.np_random.random()
    env.memory = np.zeros(3)
    block.set_env_state(env, block.load_checkpoint(tmp_path)["env"])
    assert env.np_random.random() == first
    assert env.memory.tolist() == [0, 1, 2]
    _, number, pair = block.load_checkpoint(tmp_path)["env"]["own"]["list"]
    assert (number, pair) == (1.5, (3, None))


def test_steps_taken_twice_are_shown_once(tmp_path):
    """A run writes to step 100, is killed, and goes on from its checkpoint at step 50."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args, image = block.Args(progress=False), np.zeros((4, 4, 3), np.uint8)
    log = block.RunLog(args, tmp_path, None)
    for step in range(10, 101, 10):
        log.scalars(step, {"losses/x": 1.0})
        log.picture(step, image)
    log.writer.close()
    (events,) = tmp_path.glob("events.*")  # another process of that second may have had a name that comes later
    events.rename(events.with_name(f"{'.'.join(events.name.split('.')[:4])}.~"))
    log = block.RunLog(args, tmp_path, {"step": 50, "log": {}})
    assert len(list((tmp_path / "frames").iterdir())) == 5
    for step in (60, 70):
        log.scalars(step, {"losses/x": 2.0})
    log.writer.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "tensors": 0, "images": 0}).Reload()
    shown = events.Scalars("losses/x") if "losses/x" in events.Tags()["scalars"] else events.Tensors("losses/x")
    assert [event.step for event in shown] == [10, 20, 30, 40, 50, 60, 70]
    assert [event.step for event in events.Images("model/picture")] == [10, 20, 30, 40, 50]


def test_two_runs_of_one_second_get_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(block.time, "time", lambda: 1.0)
    first, second = (block.open_run(block.Args())[0] for _ in range(2))
    assert first != second
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_speed_counts_from_the_end_of_the_warm_up(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(block.time, "perf_counter", lambda: now[0])
    log = block.RunLog(block.Args(progress=False), tmp_path, None)
    now[0] = 100.0
    log.lap("env")
    log.start_clock(step=1_000)
    now[0] = 102.0
    log.lap("model")
    now[0] = 104.0
    log.lap("env")
    log.flush(step=1_020)
    log.writer.close()
    written = helpers.scalars(tmp_path, clock=True)
    assert written["charts/SPS"][1_020] == 5.0
    assert written["time/model"][1_020] == written["time/env"][1_020] == 0.5


def test_long_films_are_thinned_and_large_ones_shrunk(tmp_path):
    frames = [np.full((4, 4, 3), i % 256, np.uint8) for i in range(700)]
    block.save_gif(frames, tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as film:
        assert 200 < film.n_frames <= 300
    assert block.thumbnail(np.zeros((480, 960, 3), np.uint8)).shape == (160, 320, 3)
    assert block.thumbnail(np.zeros((100, 200, 3), np.uint8)).shape == (100, 200, 3)


@settings(deadline=None, max_examples=20)
@given(count=st.integers(1, 6))
def test_gif_holds_the_frames(count, tmp_path_factory):
    path = tmp_path_factory.mktemp("gif") / "videos" / "film.gif"
    frames = [np.full((8, 8, 3), 40 * i, np.uint8) for i in range(count)]
    block.save_gif(frames, path, fps=5)
    with Image.open(path) as film:
        assert film.n_frames == count
        film.seek(count - 1)
        assert np.abs(np.asarray(film.convert("RGB")).astype(int) - 40 * (count - 1)).max() < 8
        assert film.info["duration"] == 200


def test_log_means_shares_and_due(tmp_path):
    args = block.Args(progress=False)
    log = block.RunLog(args, tmp_path, None)
    log.mean("losses/x", 1.0)
    log.mean("losses/x", torch.tensor(4.0))
    log.lap("env")
    log.flush(10)
    log.mean("losses/x", 7.0)
    log.flush(20)
    log.writer.close()
    assert helpers.scalars(tmp_path)["losses/x"] == {10: 2.5, 20: 7.0}
    assert [step for step in range(0, 100, 7) if log.due("a", 20, step)] == [21, 42, 63, 84]
    assert [step for step in range(100) if log.due("d", 20, step)] == [20, 40, 60, 80]
    assert [step for step in range(100) if log.due("e", 20, step, wait_for=step % 15 == 0)] == [30, 45, 60, 90]
    assert [step for step in range(100) if log.due("f", 20, step, wait_for=False)] == [40, 80]
    weight = torch.ones(1, requires_grad=True)
    log.mean("losses/y", (weight * 2).sum())
    assert not log.sums["losses/y"].requires_grad  # else a whole window's graphs stay in memory
    assert not any(log.due("b", 0, step) for step in range(100))
    assert sum(log.due("c", 1, step, at_most=3) for step in range(100)) == 3


def test_missing_drawing_package_is_named(monkeypatch, capsys):
    def no_pygame(*_, **__):
        raise gym.error.DependencyNotInstalled('pygame is not installed, run `pip install "gymnasium[toy-text]"`')

    monkeypatch.setattr(gym, "make", no_pygame)
    with pytest.raises(SystemExit) as exit:
        block.make_env("Taxi-v4", render=True)
    assert exit.value.code == 2
    assert "pip install" in capsys.readouterr().err


def test_second_signal_is_the_old_handlers():
    import signal

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests' own runner may ignore it
    with block.StopSignal() as asked:
        assert not asked.to_stop(True)
        signal.raise_signal(signal.SIGINT)
        assert asked.to_stop(True) and not asked.to_stop(False)  # the episode may end, for a while
        asked.deadline = 0.0
        assert asked.to_stop(False)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
