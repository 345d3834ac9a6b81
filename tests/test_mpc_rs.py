"""The mathematics of mpc_rs.py against slow and obvious references."""

import math
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import checkpoint, module, scalars
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

mpc_rs = module("mpc_rs")
ARGS = mpc_rs.Args(candidates=40, hidden=8, horizon=4, layers=2, random_steps=30)


class Box(gym.Env):
    observation_space, action_space = gym.spaces.Box(-9, 9, (3,)), gym.spaces.Box(-1, 1, (2,))


class Toy(gym.Env):
    observation_space, action_space = gym.spaces.Box(-9, 9, (1,)), gym.spaces.Box(np.float32([-2]), np.float32([1]))


def network(learn_reward=False, seed=0, **changes):
    torch.manual_seed(seed)
    net = mpc_rs.Network(3, 2, learn_reward, replace(ARGS, **changes))
    for p in net.parameters():
        p.data += 0.3 * torch.randn_like(p)
    for name, buffer in net.named_buffers():
        torch.nn.init.uniform_(buffer, 0.5, 2) if "std" in name else torch.nn.init.normal_(buffer)
    return net


def transitions(n=6, seed=0):
    torch.manual_seed(seed)
    s, a, r, s2 = (torch.randn(n, size) for size in (3, 2, 1, 3))
    return mpc_rs.Transitions(s, a, r, s2, (torch.rand(n, 1) < 0.4).float(), torch.zeros(n, 1))


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("learn_reward", [False, True])
def test_the_network_is_a_relu_network_layer_by_layer(layers, learn_reward):
    net, inputs = network(learn_reward, layers=layers), torch.randn(7, 5)
    x = inputs.clone()
    output, logit = net(inputs)
    assert torch.equal(inputs, x)  # ReLU works in place, but not on the caller's tensor
    for i, layer in enumerate(net.layers):
        x = (np.maximum(x, 0) if i else x) @ layer.weight.detach().T + layer.bias.detach()
    assert len(net.layers) == layers + 1 and x.shape[1] == 3 + 2 * learn_reward
    assert torch.allclose(output, x[:, : 3 + learn_reward], atol=1e-5)
    assert not learn_reward or torch.allclose(logit, x[:, -1], atol=1e-5)


def test_a_fresh_network_follows_xaviers_initialisation():
    torch.manual_seed(0)
    net = mpc_rs.Network(3, 2, False, replace(ARGS, hidden=400))
    for layer, widths in zip(net.layers, ((5, 400), (400, 400), (400, 3)), strict=True):
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / sum(widths)), rel=0.08)
        assert (layer.bias == 0).all()


@pytest.mark.parametrize("learn_reward", [False, True])
@torch.no_grad()
def test_the_loss_is_equation_2_written_out(learn_reward):
    net, data, expected = network(learn_reward), transitions(), 0.0
    x, y = net.normalised(data)
    for n in range(6):
        inputs = (torch.cat([data.s[n], data.a[n]]) - net.input_mean) / net.input_std
        output, logit = net(inputs[None])
        for i, target in enumerate([*(data.s2[n] - data.s[n]), *data.r[n]][: 3 + learn_reward]):
            expected += 0.5 * ((target - net.target_mean[i]) / net.target_std[i] - output[0, i]) ** 2 / 6
        if learn_reward:
            expected -= torch.distributions.Bernoulli(logits=logit[0]).log_prob(data.terminated[n, 0]) / 6
    assert mpc_rs.network_loss(net, x, y, data.terminated).item() == pytest.approx(expected.item(), rel=1e-4)


@given(st.integers(1, 50), st.integers(0, 80), st.integers(2, 40), st.floats(0, 0.95))
@example(30, 1, 100, 0.9)
@settings(max_examples=60)
def test_an_epoch_passes_once_over_d_rand_and_mixes_in_d_rl(random_steps, new_rows, batch_size, new_fraction):
    if round(batch_size * new_fraction) == batch_size:
        with pytest.raises(ValueError, match="--new-fraction"):
            replace(ARGS, batch_size=batch_size, new_fraction=new_fraction)
        return
    args = replace(ARGS, random_steps=random_steps, batch_size=batch_size, new_fraction=new_fraction)
    batches = list(mpc_rs.minibatches(random_steps + new_rows, args))
    new = min(round(batch_size * new_fraction), new_rows)
    old = [batch[batch < random_steps] for batch in batches]
    assert {len(batch) for batch in batches} == {min(batch_size, random_steps + new)}
    assert {len(chunk) for chunk in old} == {min(batch_size - new, random_steps)}
    assert len(torch.cat(old).unique()) == len(torch.cat(old)) > random_steps - len(old[0])
    assert all(batch.max() < random_steps + new_rows for batch in batches)


def test_rows_of_d_rl_are_sampled_uniformly_and_d_rand_is_shuffled():
    torch.manual_seed(0)
    args = replace(ARGS, random_steps=30, batch_size=10, new_fraction=0.5)
    epochs = [torch.cat(list(mpc_rs.minibatches(50, args))) for _ in range(300)]
    counts = torch.bincount(torch.cat(epochs)).tolist()
    assert counts[:30] == [300] * 30 and counts[30:] == pytest.approx([450] * 20, rel=0.2)  # 30 rows over 20 places
    assert not torch.equal(epochs[0][:5], epochs[1][:5])


def test_training_normalises_and_adds_noise(monkeypatch):
    net, seen, loss, data = network(), [], mpc_rs.network_loss, transitions(60)
    data.s2[:, 2] = data.s[:, 2] + 1  # a counter: its change is constant
    monkeypatch.setattr(mpc_rs, "network_loss", lambda m, x, y, e: seen.append((x, y)) or loss(m, x, y, e))
    args = replace(ARGS, random_steps=60, batch_size=60, epochs=100, data_noise=0.5)
    mpc_rs.fit(net, torch.optim.Adam(net.parameters()), data, args)
    for name, column in (("input", torch.cat([data.s, data.a], 1)), ("target", data.s2 - data.s)):
        mean, std = (getattr(net, f"{name}_{moment}").tolist() for moment in ("mean", "std"))
        assert mean == pytest.approx(column.mean(0).tolist(), abs=1e-5)
        assert std == pytest.approx(column.std(0, correction=0).tolist(), abs=1e-5)
    x, y = (torch.cat(columns) for columns in zip(*seen, strict=True))
    assert torch.cat([x, y], 1).mean(0).tolist() == pytest.approx([0] * 8, abs=0.03)
    assert torch.cat([x, y], 1).std(0).tolist() == pytest.approx([math.sqrt(1 + 0.5**2)] * 7 + [0.5], rel=0.02)


def test_training_fits_a_linear_system_and_leaves_constants_alone():
    data, args = transitions(200), replace(ARGS, env_id="Pendulum-v1", hidden=32, epochs=15, random_steps=100)
    data.s[:, 2] = 1.0
    data.s2[:] = data.s + F.pad(0.5 * data.a, (0, 1))
    agent = mpc_rs.Agent(Box(), args)
    optimizer = torch.optim.Adam(agent.model.parameters(), 3e-3)
    losses = [mpc_rs.fit(agent.model, optimizer, data, args) for _ in range(2)]
    states, _ = agent.imagine(data.s, data.a[:, None])
    assert 0 < losses[1] < losses[0] < 3 and agent.model.input_std[2] == 1
    assert (states[:, 0] - data.s2).square().mean().sqrt() < 0.1
    assert torch.equal(states[:, 0, 2], data.s[:, 2])  # exactly: no error of the network moves it


def planner(monkeypatch, reward=lambda s, a, s2: s2[..., 0], **changes):
    monkeypatch.setitem(mpc_rs.REWARDS, "Toy-v0", reward)
    return mpc_rs.Agent(Toy(), replace(ARGS, env_id="Toy-v0", **changes))


def test_predictions_are_in_the_units_of_the_state(monkeypatch):
    agent = planner(monkeypatch, reward=lambda s, a, s2: 100 * s[..., 0] + 10 * a[..., 0] + s2[..., 0])
    net = agent.model
    net.input_mean[:], net.input_std[:] = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0])
    net.target_mean[0], net.target_std[0] = 0.25, 0.5
    net.forward = lambda x: (3 * x[:, :1] + x[:, 1:], x[:, 0])
    s2, r, terminated = agent.predict(torch.tensor([[2.0]]), torch.tensor([[-1.0]]))
    expected = 2 + (3 * (2 - 1) / 2 + (-1 - 2) / 4) * 0.5 + 0.25
    assert (s2.item(), r.item(), terminated.item()) == pytest.approx((expected, 200 - 10 + expected, False))


def test_reward_and_end_are_learned_where_the_task_is_unknown():
    agent = mpc_rs.Agent(Toy(), replace(ARGS, env_id="Unknown-v0"))
    agent.model.target_std.copy_(torch.tensor([1.0, 2.0]))
    agent.model.forward = lambda x: (torch.stack([x[:, 1], 7 * x[:, 0]], -1), x[:, 0] - 1)
    s2, r, terminated = agent.predict(torch.tensor([[0.5], [1.0], [2.0]]), torch.ones(3, 1))
    assert s2[:, 0].tolist() == [1.5, 2, 3] and r.tolist() == [7, 14, 28] and terminated.tolist() == [0, 0, 1]


def test_imagined_returns_are_sums_up_to_the_end(monkeypatch):
    agent = planner(monkeypatch)
    agent.predict = lambda s, a: (s + a, 10 * s[:, 0] + a[:, 0], s[:, 0] + a[:, 0] >= 3)
    actions = torch.tensor([[[1.0], [1.0], [1.0], [5.0]], [[0.0], [1.0], [-1.0], [2.0]]])
    states, returns = agent.imagine(torch.zeros(2, 1), actions)
    assert states[..., 0].tolist() == [[1, 2, 3, 8], [0, 1, 0, 2]]
    assert returns.tolist() == [1 + 11 + 21, 0 + 1 + 9 + 2]


def test_random_shooting_returns_the_first_action_of_the_best_candidate(monkeypatch):
    agent, seen = planner(monkeypatch, candidates=2_000), []

    def imagine(s, actions):
        seen.append(actions)
        assert s.shape == (2_000, 1) and (s == 0.75).all()
        return None, -(actions - 0.4).square().sum((1, 2))

    agent.imagine = imagine
    a = agent(np.array([0.75]))
    best = min(seen[0], key=lambda x: (x - 0.4).square().sum().item())
    assert seen[0].shape == (2_000, 4, 1) and a.tolist() == best[0].tolist()
    assert -2 <= seen[0].min() < -1.99 and 0.99 < seen[0].max() <= 1  # uniform in the box [−2, 1]
    assert seen[0].std().item() == pytest.approx(3 / math.sqrt(12), rel=0.05)


def test_a_candidate_that_overflows_is_the_worst(monkeypatch):
    agent, seen = planner(monkeypatch), []
    returns = torch.full((40,), -1e9)
    returns[:3], returns[7] = torch.tensor([math.nan, math.inf, -math.inf]), -5.0
    agent.imagine = lambda s, actions: seen.append(actions) or (None, returns)
    assert agent(np.zeros(1)).tolist() == seen[0][7, 0].tolist()


def test_the_pendulums_reward_is_the_environments_own():
    env = mpc_rs.make_env(ARGS)
    env.action_space.seed(0)
    s2, _ = env.reset(seed=0)
    for _ in range(50):
        s, a = s2, env.action_space.sample()
        s2, r, *_ = env.step(a)
        row = (torch.as_tensor(x, dtype=torch.float64) for x in (s, a, s2))
        assert mpc_rs.pendulum_reward(*row).item() == pytest.approx(r, abs=1e-4)


class Counter(Toy):
    """The state counts the steps; every episode ends after 30 of them."""

    def reset(self, *, seed=None, options=None):
        self.s = np.zeros(1, np.float32)
        return self.s, {}

    def step(self, a):
        self.s = self.s + 1
        return self.s, float(a[0]), self.s[0] == 30, False, {}


gym.register("Counter-v0", Counter, max_episode_steps=100)


def test_training_follows_algorithm_1(monkeypatch, tmp_path):
    sizes, planned, fit = [], [], mpc_rs.fit
    monkeypatch.setattr(mpc_rs, "fit", lambda *args: sizes.append(len(args[2].s)) or fit(*args))
    monkeypatch.setattr(mpc_rs, "heldout_metrics", lambda agent, replay, first: {"model/first_new_row": first})
    monkeypatch.setattr(mpc_rs.Agent, "forward", lambda agent, obs: planned.append(obs[0]) or np.ones(1, np.float32))
    monkeypatch.setattr(mpc_rs.Run, "evaluate", lambda *_: None)
    flags = "--env-id Counter-v0 --total-timesteps 100 --random-steps 25 --refit-every 20 --epochs 1"
    mpc_rs.main([*flags.split(), "--run-dir", str(tmp_path / "run")])
    s, a, r, s2, terminated, episode = checkpoint(tmp_path / "run")["replay"]["rows"].T
    curves, steps = scalars(tmp_path / "run"), torch.arange(100)
    assert sizes == list(curves["losses/model"]) == [25, 45, 65, 85]
    assert curves["model/first_new_row"] == {45: 25, 65: 45, 85: 65}
    assert planned == s[25:].tolist() == (steps % 30)[25:].tolist()
    assert torch.equal(s2, steps % 30 + 1.0) and torch.equal(r, a) and torch.equal(episode, steps // 30 * 30.0)
    assert torch.equal(terminated, (steps % 30 == 29).float())
    assert len(a[:25].unique()) == 25 and a[25:].unique() == 1 and -2 <= a.min() < -1 and 0 < a[:25].max() <= 1


def test_heldout_errors_are_equation_3_within_episodes():
    """A counter that is predicted to advance by 1.5 is wrong by 0.5 h after h steps."""
    replay = mpc_rs.Replay(60, Box(), "cpu")
    for i in range(60):
        s = np.array([0.0, 0.0, i + 100 * (i // 7)])
        replay.add(s, np.zeros(2), 0.0, np.append(s[:2], s[2] + 1), False, i - i % 7)
    agent = mpc_rs.Agent(Box(), replace(ARGS, env_id="Pendulum-v1"))
    agent.model.target_mean.copy_(torch.tensor([0.0, 0.0, 1.5]))
    agent.model.forward = lambda x: (torch.zeros(len(x), 3), x[:, 0])
    metrics, scale = mpc_rs.heldout_metrics(agent, replay, 20), replay.rows().s[:, 2].std().item()
    for h in (1, 5):
        errors = [0.5 * (0.5 * k / scale) ** 2 for k in range(1, h + 1)]
        assert metrics[f"model/open_loop_error_{h}"] == pytest.approx(np.mean(errors), rel=1e-3)
    assert "model/open_loop_error_20" not in metrics
    assert metrics["model/heldout_loss"] == pytest.approx(0.5 * 0.5**2, rel=1e-4)
