"""The mathematics of icm.py against slow and obvious references."""

import math
from dataclasses import replace
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import module
from hypothesis import given, settings
from hypothesis import strategies as st

icm = module("icm")
ARGS = icm.Args(envs=3, horizon=5, hidden=8, model_hidden=16, feature_size=6, device="cpu")
gym.register("Maze7-v0", entry_point=partial(icm.Maze, size=7), max_episode_steps=12)


class Env(gym.Env):
    observation_space, action_space = gym.spaces.Box(-9, 9, (3,)), gym.spaces.Discrete(4)


def modules(env=None, noise=0.3, **changes):
    torch.manual_seed(0)
    args, env = replace(ARGS, **changes), env or Env()
    agent, model = icm.Agent(env, args), icm.ICM(env, args)
    for p in (*agent.parameters(), *model.parameters()):
        p.data += noise * torch.randn_like(p)
    return agent, model, args


def batch(n=20):
    s, s2 = torch.randn(2, n, 3)
    a, value, r, ends = torch.randint(4, (n,)), torch.randn(n), torch.randn(n), torch.zeros(n, dtype=torch.bool)
    return icm.Rollout(s, a, -torch.rand(n) - 1, value, s2, r, ends, ends)


@pytest.mark.parametrize("features", ["inverse", "random", "pixels"])
@torch.no_grad()
def test_equations_2_to_6_row_by_row(features):
    _, model, _ = modules(features=features)
    data, inverse_losses, errors = batch(), [], []
    for s, a, s2 in zip(data.s, data.a, data.s2, strict=True):
        phi, phi2 = s, s2
        if features != "pixels":
            (_, one, _, two, _) = model.encoder
            phi, phi2 = (torch.tanh(two.weight @ torch.tanh(one.weight @ x + one.bias) + two.bias) for x in (s, s2))
            phi, phi2 = ((x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() for x in (phi, phi2))
        (g1, _, g2), (f1, _, f2) = model.inverse, model.forward_model
        logits = g2.weight @ (g1.weight @ torch.cat([phi, phi2]) + g1.bias).clamp(min=0) + g2.bias
        inverse_losses.append(logits.logsumexp(0) - logits[a])
        hidden = (f1.weight @ torch.cat([phi, torch.eye(4)[a]]) + f1.bias).clamp(min=0)
        errors.append(0.5 * (phi + f2.weight @ hidden + f2.bias - phi2).square().sum())
    errors, expected = torch.stack(errors), torch.stack(inverse_losses).mean()
    assert torch.allclose(model.intrinsic_reward(data.s, data.a, data.s2), errors, atol=1e-4)
    inverse_loss, forward_loss = model.losses(data.s, data.a, data.s2)
    assert torch.allclose(inverse_loss, expected, atol=1e-5) and torch.allclose(forward_loss, errors.mean(), atol=1e-4)


@pytest.mark.parametrize(("changes", "by"), [({}, (1, 0)), ({"joint": True}, (1, 1)), ({"features": "random"}, (0, 0))])
def test_which_loss_trains_the_encoder(changes, by):
    (_, model, _), data = modules(**changes), batch()
    for loss, expected in zip(model.losses(data.s, data.a, data.s2), by, strict=True):
        model.zero_grad()
        loss.backward(retain_graph=True)
        assert all((p.grad is not None and bool(p.grad.any())) == expected for p in model.encoder.parameters())


def test_networks_begin_as_cleanrls_and_images_get_the_papers_convolutions():
    agent, model, _ = modules(noise=0, hidden=32, feature_size=32)
    layers = agent.actor[0][1], agent.actor[1], agent.critic[1], model.inverse[2]
    for layer, gain in zip(layers, (2**0.5, 0.01, 1, 0.01), strict=True):
        wide = min(layer.weight, layer.weight.T, key=len)
        product = wide @ wide.T
        assert torch.allclose(product, gain**2 * torch.eye(len(product)), atol=1e-5) and (layer.bias == 0).all()
    network, size = icm.make_encoder((4, 42, 42), 8, 8)
    assert size == 288 and network(torch.zeros(2, 4, 42, 42)).shape == (2, 288)
    assert [type(part).__name__ for part in network] == ["Conv2d", "ELU"] * 4 + ["Flatten"]
    assert icm.make_encoder((3, 5, 5), 8, 7)[0](torch.zeros(2, 3, 5, 5)).shape == (2, 7)
    game = gym.make("Stacked/Breakout-v5")
    assert game.observation_space.contains(np.array(game.reset(seed=0)[0]))
    agent, _, _ = modules(game)
    frames = np.random.default_rng(0).integers(0, 255, (50, 4, 42, 42)).astype(np.uint8)
    agent.moments.update(torch.from_numpy(frames).float())
    assert agent.normalise(frames).std().item() == pytest.approx(1, abs=0.01)


def test_what_the_agent_sees_has_unit_size_and_its_best_action_is_played():
    agent, _, _ = modules()
    rows = np.random.default_rng(0).normal([5, -2, 0], [3, 0.1, 1], (100, 3))
    for part in np.split(rows, [7, 8, 60]):
        agent.moments.update(torch.from_numpy(part).float())
    assert agent.moments.var.numpy() == pytest.approx(rows.var(0), rel=1e-4) and agent.moments.count == 100
    x = agent.normalise(rows)
    assert torch.allclose(x.mean(0), torch.zeros(3), atol=1e-4) and torch.allclose(x.std(0), torch.ones(3), atol=0.02)
    assert agent.normalise(np.full((1, 3), 1e9)).max() == 10 and agent.normalise(np.full((1, 3), -1e9)).min() == -10
    assert [agent(row) for row in rows[:20]] == agent.actor(x[:20]).argmax(1).tolist()
    agent.moments.mean[2] = agent.moments.var[2] = 0
    assert agent.normalise(np.full((1, 3), 3e-4))[0, 2].item() == pytest.approx(3, rel=1e-2)


def test_rewards_are_divided_by_the_std_of_their_discounted_sums():
    scale, rng, sums, seen = icm.RewardScale(replace(ARGS, gamma=0.9)), np.random.default_rng(0), [0.0] * 3, []
    for _ in range(4):
        r, over = rng.normal(1, 2, (5, 3)), rng.random((5, 3)) < 0.3
        for t in range(5):
            for i in range(3):
                sums[i] = 0.9 * sums[i] + r[t, i]
                seen.append(sums[i])
                sums[i] = 0.0 if over[t, i] else sums[i]
        found = scale(torch.from_numpy(r).float(), torch.from_numpy(over))
        assert found.numpy() == pytest.approx(r / np.std(seen), rel=1e-3)
    assert scale(torch.full((5, 3), 1e9), torch.zeros(5, 3, dtype=torch.bool)).max() <= 10
    tiny = torch.tensor([[1e-9, -1e-9, 0]])
    assert icm.RewardScale(ARGS)(tiny, tiny > 1)[0].tolist() == pytest.approx([1e-5, -1e-5, 0], rel=1e-2)


@settings(max_examples=30)
@given(st.integers(1, 8), st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
def test_advantages_are_the_sums_of_their_definition(steps, gamma, lam, seed):
    rng = np.random.default_rng(seed)
    r, value, next_value = (torch.from_numpy(rng.normal(size=(steps, 2))) for _ in range(3))
    over = torch.from_numpy(rng.random((steps, 2)) < 0.3)
    terminated = over & torch.from_numpy(rng.random((steps, 2)) < 0.5)
    found = icm.gae(r, value, next_value, terminated, over, replace(ARGS, gamma=max(gamma, 1e-6), gae_lambda=lam))
    for i in range(2):
        for t in range(steps):
            expected, weight = 0.0, 1.0
            for k in range(t, steps):
                after = 0.0 if terminated[k, i] else gamma * next_value[k, i]
                expected += weight * (r[k, i] + after - value[k, i])
                weight *= gamma * lam
                if over[k, i]:
                    break
            assert found[t, i].item() == pytest.approx(float(expected), abs=1e-4)


def test_ppos_loss_row_by_row():
    agent, _, args = modules(clip=0.1, value_weight=0.7, entropy_weight=0.2)
    data, advantage, target = batch(), torch.randn(20), torch.randn(20)
    with torch.no_grad():
        logits, value = agent.actor(data.s).log_softmax(1), agent.critic(data.s)[:, 0]
    old = logits[range(20), data.a] + 0.3 * torch.randn(20)
    loss, metrics = icm.ppo_loss(agent, data.s, data.a, old, advantage, target, args)
    policy, scaled = 0.0, (advantage - advantage.mean()) / advantage.std()
    for i in range(20):
        ratio, gain = math.exp(logits[i, data.a[i]] - old[i]), scaled[i].item()
        policy -= min(ratio * gain, min(max(ratio, 0.9), 1.1) * gain) / 20
    entropy = -(logits.exp() * logits).sum(1).mean().item()
    parts = policy, (value - target).square().mean().item(), entropy
    assert [x.item() for x in metrics.values()] == pytest.approx(parts, rel=1e-4)
    assert loss.item() == pytest.approx(parts[0] + 0.7 * parts[1] - 0.2 * parts[2], rel=1e-4)


@pytest.mark.parametrize("reward", ["both", "extrinsic"])
def test_an_update_follows_the_gradients_of_both_losses(reward):
    """With plain gradient descent in place of Adam; only the gradient of policy and value is clipped."""
    (agent, model, args), data = modules(reward=reward, beta=0.3, gradient_clip=0.01), batch()
    advantage, target = torch.randn(20), torch.randn(20)
    expected = [p.detach().clone() for p in (*agent.parameters(), *model.parameters())]
    loss, _ = icm.ppo_loss(agent, data.s, data.a, data.log_prob, advantage, target, args)
    gradients = [*torch.autograd.grad(loss, [*agent.parameters()])]
    norm = sum(g.square().sum() for g in gradients).sqrt()
    gradients = [g * 0.01 / norm for g in gradients]
    if reward == "both":
        inverse, forward = model.losses(data.s, data.a, data.s2)
        gradients += torch.autograd.grad(0.7 * inverse + 0.3 * forward, [*model.parameters()])
    optimizer = torch.optim.SGD([*agent.parameters(), *model.parameters()], 0.1)
    metrics = icm.update(agent, model, optimizer, data, advantage, target, args)
    assert not any(value.requires_grad for value in metrics.values())
    for i, p in enumerate((*agent.parameters(), *model.parameters())):
        step = 0.1 * gradients[i] if i < len(gradients) else 0
        assert torch.allclose(p, expected[i] - step, atol=1e-5)
    assert ("losses/inverse" in metrics) == ("losses/forward" in metrics) == (reward == "both")


@pytest.mark.parametrize("env_id", ["Maze7-v0", "CartPole-v1"])
def test_steps_are_those_of_single_environments(env_id):
    torch.manual_seed(0)
    args = replace(ARGS, env_id=env_id)
    envs, copies = icm.Environments(args), [icm.make_env(args) for _ in range(3)]
    obs, finished = [env.reset(seed=seed)[0] for env, seed in zip(copies, envs.seeds, strict=True)], []
    for _ in range(60):
        assert np.array_equal(envs.obs, obs)
        actions = torch.randint(2, (3,)).tolist()
        next_obs, r, terminated, over = envs.step(actions)
        for i, env in enumerate(copies):
            obs[i], *expected, truncated, info = env.step(actions[i])
            assert np.array_equal(next_obs[i], obs[i]) and [r[i], terminated[i]] == expected
            assert over[i] == (terminated[i] or truncated)
            if over[i]:
                finished.append(info["episode"])
                obs[i] = env.reset(seed=envs.seeds[i])[0]
    assert len(finished) > 3 and len({*envs.seeds}) == 3 and max(envs.seeds) < 2**31
    mean = envs.statistics()["episode"]
    assert [mean["r"], mean["l"]] == pytest.approx([np.mean([x[key] for x in finished]) for key in "rl"])
    other = icm.Environments(args)
    other.load_state_dict(envs.state_dict())
    assert envs.statistics() == {} and np.array_equal(other.obs, envs.obs) and other.actions == envs.actions


def test_a_rollout_holds_what_policy_and_value_said():
    envs = icm.Environments(replace(ARGS, env_id="Maze7-v0"))
    agent, _, _ = modules(envs.envs[0], noise=0)
    before = torch.from_numpy(envs.obs.copy())
    rollout, seen = icm.act(agent, envs, 40)
    assert rollout.s.shape == (40, 3, 3, 5, 5) and torch.equal(seen[:3], before) and len(seen) == 120
    s, a = rollout.s.flatten(0, 1), rollout.a.flatten()
    logits = agent.actor(s).log_softmax(1)
    assert torch.allclose(rollout.log_prob.flatten(), logits[range(120), a], atol=1e-5)
    assert torch.allclose(rollout.value.flatten(), agent.critic(s)[:, 0], atol=1e-5)
    assert torch.allclose(agent.normalise(seen.numpy()), s) and len(a.unique()) == 4
    going = ~rollout.over[:-1]
    assert torch.equal(rollout.s2[:-1][going], rollout.s[1:][going])
    assert not torch.equal(rollout.s2[:-1][~going], rollout.s[1:][~going])  # the end of an episode, not the next start


@pytest.mark.parametrize("size", [5, 13, 21])
def test_one_path_connects_any_two_tiles_and_the_goal_is_the_farthest(size):
    maze = icm.Maze(size=size)
    free = {(int(i), int(j)) for i, j in np.argwhere(~maze.walls)}
    edges = sum(((i + 1, j) in free) + ((i, j + 1) in free) for i, j in free)
    assert edges == len(free) - 1 and {*maze.distance} == free  # connected, without a cycle
    assert len(free) == 2 * ((size - 1) // 2) ** 2 - 1
    for tile, distance in maze.distance.items():
        around = [maze.distance[i] for i in {maze.moved(tile, a) for a in range(4)} - {tile}]
        assert all(abs(distance - other) == 1 for other in around) and (distance == 0 or distance - 1 in around)
    assert maze.distance[maze.goal] == max(maze.distance.values())
    assert len({*map(bytes, maze.views.values())}) == len(free)


def test_the_mazes_rewards_windows_and_noise():
    maze, noisy, rng = icm.Maze(), icm.Maze(noisy=True), np.random.default_rng(0)
    assert maze.distance[maze.goal] == 62
    image = np.pad(maze.image, ((0, 0), (1, 1), (1, 1)))
    assert image[:, 1:-1, 1:-1][:, maze.walls].max() < 64 < 128 <= image[:, 1:-1, 1:-1][:, ~maze.walls].min()
    for start in maze.distance:
        maze.reset(seed=0)
        maze.tile, a = start, int(rng.integers(4))
        i, j = start[0] + (0, 1, 0, -1)[a], start[1] + (1, 0, -1, 0)[a]
        end = start if maze.walls[i, j] else (i, j)
        obs, r, terminated, truncated, info = maze.step(a)
        assert info["tile"] == end and r == terminated == (end == maze.goal) and not truncated
        assert np.array_equal(obs, image[:, end[0] - 1 : end[0] + 4, end[1] - 1 : end[1] + 4])
    assert noisy.reset(seed=1)[0].shape == (3, 5, 5) and sum(x.sum() for x in noisy.screen.values()) == 48
    for tile, screen in noisy.screen.items():
        first, second, walls = noisy.window(tile), noisy.window(tile), maze.views[tile].max(0) < 64
        assert np.array_equal(first, second) != screen.any() and not (screen & ~walls).any()
        assert np.array_equal(np.where(screen, 0, first), np.where(screen, 0, maze.views[tile]))


@pytest.mark.parametrize("reward", ["both", "intrinsic"])
def test_a_run_counts_scales_and_updates_as_it_should(reward, tmp_path, monkeypatch):
    calls, logged, update, scaled, sums, gae = [], {}, icm.update, [], [], icm.gae
    forward, weights = icm.RewardScale.forward, " --extrinsic-weight 2 --intrinsic-weight 3"
    monkeypatch.setattr(icm.RewardScale, "forward", lambda *x: scaled.append(forward(*x)) or scaled[-1])
    monkeypatch.setattr(icm, "gae", lambda *x: sums.append(x[0]) or gae(*x))
    monkeypatch.setattr(icm, "update", lambda *x: calls.append((x[2].param_groups[0]["lr"], len(x[4]))) or update(*x))
    monkeypatch.setattr(icm.Run, "log", lambda run, tag, x: logged.setdefault(tag, {}).setdefault(run.step, float(x)))
    flags = "--env-id Maze7-v0 --envs 4 --horizon 25 --total-timesteps 300 --epochs 2 --minibatches 5 --hidden 8"
    icm.main([*(flags + weights).split(), "--reward", reward, "--episodes", "1", "--run-dir", str(tmp_path / "run")])
    for r, outer, inner in zip(sums, scaled[::2], scaled[1::2], strict=True):
        assert torch.allclose(r, 2 * outer * (reward == "both") + 3 * inner) and inner.any()
    assert [size for _, size in calls] == [20] * (3 * 2 * 5)
    assert [rate for rate, _ in calls[::10]] == pytest.approx([5e-4, 5e-4 * 2 / 3, 5e-4 / 3])
    assert [*logged["losses/value"]] == [*logged["model/intrinsic_reward"]] == [100, 200, 300]
    assert [*logged["eval/episodic_return"]] == [300] and np.isfinite([*logged["losses/value"].values()]).all()
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert [state[part]["moments.count"] for part in ("agent", "intrinsic", "extrinsic")] == [300] * 3
    assert state["envs"]["visits"].sum() == 300 and logged["charts/tiles_visited"][300] > 3
