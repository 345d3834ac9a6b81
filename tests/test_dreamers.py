"""What dreamer_v1.py and dreamer_v2.py have in common: λ-returns, replay, open-loop errors and tasks."""

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import module
from hypothesis import given, settings
from hypothesis import strategies as st

BOTH = {name: module(name) for name in ("dreamer_v1", "dreamer_v2")}
both = pytest.mark.parametrize("name", BOTH)
either = pytest.mark.parametrize("obs", ["vector", "pixels"])


class Env(gym.Env):
    def __init__(self, *shape):
        self.observation_space, self.action_space = gym.spaces.Box(-9, 9, shape), gym.spaces.Box(-1, 1, (2,))


@settings(max_examples=40)
@given(st.sampled_from([*BOTH]), st.integers(2, 8), st.floats(0, 1), st.integers(0, 99))
def test_lambda_returns_are_the_mixture_of_all_n_step_returns(name, n, lambda_, seed):
    """V_N^k, k discounted rewards and then the value, has the weight (1 − λ) λ^{k−1}, the longest λ^{k−1}."""
    reward, value, discount = torch.randn(3, 1, n, generator=torch.Generator().manual_seed(seed)).double()
    found = BOTH[name].lambda_return(reward, value, discount, lambda_)
    assert found.shape == (1, n - 1)
    for t in range(n - 1):
        total, expected, product = 0.0, 0.0, 1.0
        for k in range(1, n - t):
            total += product * reward[0, t + k - 1].item()
            product *= discount[0, t + k - 1].item()
            weight = lambda_ ** (k - 1) * (1.0 if k == n - 1 - t else 1 - lambda_)
            expected += weight * (total + product * value[0, t + k].item())
        assert found[0, t].item() == pytest.approx(expected, abs=1e-9)
    weights = BOTH[name].discount_weights(discount)[0]
    assert weights.tolist() == pytest.approx([discount[0, :t].prod().item() for t in range(n - 1)])


def replay_of(name, lengths, obs="vector", folder=None, **changes):
    """Row i holds the number i as observation, action and reward; a terminal state ends each second episode."""
    env = Env(3, 32, 32) if obs == "pixels" else Env(4)
    args = replace(BOTH[name].Args(obs=obs, total_timesteps=400, action_repeat=1, device="cpu"), **changes)
    replay, i = BOTH[name].SequenceReplay(env, 2, args), 0
    if folder:
        replay.open(folder)
    for episode, length in enumerate(lengths):
        for row in range(length):
            x, last = np.full(env.observation_space.shape, i % 256, np.float32), row == length - 1
            if row == 0:
                replay.begin(x)
            else:
                replay.add(x, torch.full((2,), float(i)), float(i), last and episode % 2 == 1)
            i += 1
    return replay


@both
@pytest.mark.parametrize("balance", [False, True])
def test_sequences_are_uniform_over_complete_episodes_and_their_starts(name, balance):
    torch.manual_seed(0)
    replay, options = replay_of(name, [5, 12, 3, 4]), () if name == "dreamer_v1" else (balance,)
    data = replay.sample(6_000, 5, *options)
    for obs, action, reward, terminated, mask in zip(*(x[:300] for x in data), strict=True):
        n, start = int(mask.sum()), int(obs[0, 0])
        index = torch.arange(start, start + n)
        assert torch.equal(obs[:n, 0], index.float()) and (mask[n:] == 0).all() and n == (3 if start == 17 else 5)
        assert torch.equal(reward[:n], index * (~torch.isin(index, torch.tensor([0, 5, 17]))).float())
        known = slice(0 if name == "dreamer_v1" else 1, n)  # V2 hides the action before a sequence
        assert torch.equal(action[known, 1], reward[known]) and torch.equal(terminated[:n], (index == 16).float())
        assert name == "dreamer_v1" or not action[0].any()
    counts = torch.bincount(data.obs[:, 0, 0].long(), minlength=24) / 6_000
    expected = torch.zeros(24).index_fill_(0, torch.arange(5, 13), 1 / 24)
    if balance and name == "dreamer_v2":  # uniform over 13 values, clipped to 12 − 5
        expected[5:12], expected[12] = 1 / 39, 6 / 39
    expected[[0, 17]] = 1 / 3  # not from the episode under way
    assert (counts - expected).abs().max() < 0.02
    latest = replay.latest(3, 8)
    assert latest.obs[..., 0].tolist() == [[20, 21, 22], [21, 22, 23]] and replay.latest(9).mask.shape == (1, 4)


@both
@either
def test_the_oldest_episodes_are_dropped_and_a_resumed_run_finds_all_others(name, obs, tmp_path):
    replay = replay_of(name, [40] * 7, obs, tmp_path, replay_size=100)
    assert replay.size == 280 and replay.starts == [160, 200, 240] and len(replay.obs) == 125
    longer, lost = (replay_of(name, [], obs, total_timesteps=900, replay_size=100) for _ in range(2))
    longer.load_state_dict(replay.state_dict())
    longer.open(tmp_path)
    kept = torch.arange(160, 280)[None]
    assert all(map(torch.equal, replay.rows(kept), longer.rows(kept)))
    if obs == "pixels":
        assert (tmp_path / "replay.dat").stat().st_size == 125 * 3 * 32 * 32
        (tmp_path / "replay.dat").unlink()
        lost.load_state_dict(replay.state_dict())
        with pytest.raises(BOTH[name].UserError, match="missing"):
            lost.open(tmp_path)


@both
def test_open_loop_errors_compare_what_follows_the_context(name, monkeypatch):
    """A model that repeats the action of the row as its observation and reward, and beyond the context errs by 1."""
    dreamer, replay = BOTH[name], replay_of(name, [70])
    args = dreamer.Args(obs="vector", reward_scale=0.5, device="cpu")
    world = dreamer.Agent(Env(4), args).world

    def unroll(h, z, actions, embedded=None):
        rest = [None] * (len(dreamer.State._fields) - 2)
        return dreamer.State(actions[..., :1], actions[..., :1] + (embedded is None), *rest)

    monkeypatch.setattr(world.rssm, "unroll", unroll)
    monkeypatch.setattr(dreamer.State, "features", lambda state: state.z)
    monkeypatch.setattr(world, "decode", lambda f: f.expand(-1, -1, 4))
    monkeypatch.setattr(world, "reward", lambda f: 0.5 * (f[..., 0] + 2))
    monkeypatch.setattr(dreamer, "world_model_loss", lambda world, batch, args: (torch.tensor(batch.mask.shape[1]),))
    found = {tag: value.item() for tag, value in dreamer.heldout_metrics(world, replay, args).items()}
    expected = {"model/heldout_loss": args.batch_length}
    for h in (1, 5, 15, 45):
        expected |= {f"model/open_loop_error_{h}": 0.5, f"model/reward_error_{h}": 4.5}
    assert found == pytest.approx(expected, rel=1e-3)


@both
def test_tasks_are_images_or_vectors_with_repeated_actions_within_one(name):
    dreamer = BOTH[name]
    args = dreamer.Args("Pendulum-v1", obs="pixels", action_repeat=1)
    env = dreamer.make_env(args)
    obs, _ = env.reset(seed=0)
    assert obs.shape == (3, 32, 32) and obs.dtype == np.uint8 and env.action_space == gym.spaces.Box(-1, 1, (1,))
    small = env.render()[:480, :480].mean(2).reshape(32, 15, 32, 15).mean((1, 3))
    assert np.corrcoef(obs.mean(0).ravel(), small.ravel())[0, 1] > 0.3
    plain, repeated = (dreamer.make_env(replace(args, obs="vector", action_repeat=n)) for n in (1, 3))
    plain.reset(seed=0)
    repeated.reset(seed=0)
    steps = [plain.step(np.float32([0.5])) for _ in range(3)]
    obs, reward, *_ = repeated.step(np.float32([0.5]))
    assert np.allclose(obs, steps[-1][0]) and reward == pytest.approx(sum(step[1] for step in steps))
    with pytest.raises(dreamer.UserError, match="--obs pixels"):
        dreamer.make_env(dreamer.Args("FrozenLake-v1", obs="vector"))
    for env_id, word in (("Endless-v0", "bounded"), ("Blind-v0", "--obs vector")):
        with pytest.raises(dreamer.UserError, match=word):
            dreamer.make_env(dreamer.Args(env_id))


endless, image = gym.spaces.Box(-np.inf, 1, (1,)), gym.spaces.Box(0, 255, (9, 9, 3), np.uint8)
gym.register("Endless-v0", type("Endless", (gym.Env,), {"observation_space": image, "action_space": endless}))
gym.register("Blind-v0", type("Blind", (gym.Env,), {"observation_space": endless, "action_space": endless}))


@both
@either
def test_the_control_suite(name, obs, monkeypatch):
    pytest.importorskip("dm_control.suite")
    monkeypatch.setattr(gym.envs.registration, "registry", {})  # which the other file has filled
    args = BOTH[name].Args("ControlSuite/walker-walk", obs=obs, image_size=64, action_repeat=2)
    env, again = BOTH[name].make_env(args), BOTH[name].make_env(args)
    (one, _), (two, _) = env.reset(seed=3), again.reset(seed=3)
    assert np.array_equal(one, two) and one.shape == ((3, 64, 64) if obs == "pixels" else (24,))
    assert not np.array_equal(one, env.reset(seed=4)[0]) and (obs == "vector" or one.std() > 10)
    over, steps = False, 0
    while not over:
        _, reward, terminated, over, info = env.step(np.zeros(6, np.float32))
        steps += 1
        assert 0 <= reward <= 2 and not terminated
    assert steps == info["episode"]["l"] == 500
    with pytest.raises(BOTH[name].UserError, match="no-such"):
        BOTH[name].make_env(replace(args, env_id="ControlSuite/no-such"))
