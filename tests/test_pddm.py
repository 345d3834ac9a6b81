"""The mathematics of pddm.py against slow and obvious references."""

import math
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import checkpoint, module, scalars
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

pddm = module("pddm")
ARGS = pddm.Args(candidates=40, hidden=8, horizon=4, random_steps=30)


class Box(gym.Env):
    observation_space, action_space = gym.spaces.Box(-9, 9, (3,)), gym.spaces.Box(-1, 1, (2,))


class Toy(gym.Env):
    observation_space, action_space = gym.spaces.Box(-9, 9, (1,)), gym.spaces.Box(np.float32([-2]), np.float32([1]))


def ensemble(learn_reward=False, seed=0, **changes):
    torch.manual_seed(seed)
    net = pddm.Ensemble(3, 2, learn_reward, replace(ARGS, **changes))
    for p in net.parameters():
        p.data += 0.3 * torch.randn_like(p)
    for name, buffer in net.named_buffers():
        torch.nn.init.uniform_(buffer, 0.5, 2) if "std" in name else torch.nn.init.normal_(buffer)
    return net


def transitions(n=6, seed=0):
    torch.manual_seed(seed)
    s, a, r, s2 = (torch.randn(n, size) for size in (3, 2, 1, 3))
    return pddm.Transitions(s, a, r, s2, (torch.rand(n, 1) < 0.4).float(), torch.zeros(n, 1))


def planner(monkeypatch, reward=lambda s, a, s2: s2[..., 0], **changes):
    monkeypatch.setitem(pddm.REWARDS, "Toy-v0", reward)
    return pddm.Agent(Toy(), replace(ARGS, env_id="Toy-v0", **changes))


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("learn_reward", [False, True])
def test_the_batched_ensemble_is_its_members_one_by_one(layers, learn_reward):
    net, inputs = ensemble(learn_reward, layers=layers), torch.randn(3, 7, 5)
    output, logit = net(before := inputs.clone())
    assert torch.equal(inputs, before) and len(net.weights) == layers + 1
    for b in range(3):
        x = inputs[b]
        for i, (w, bias) in enumerate(zip(net.weights, net.biases, strict=True)):
            x = (np.maximum(x, 0) if i else x) @ w[b].detach() + bias[b].detach()
        assert x.shape[1] == 3 + 2 * learn_reward
        assert torch.allclose(output[b], x[:, : 3 + learn_reward], atol=1e-5)
        assert not learn_reward or torch.allclose(logit[b], x[:, -1], atol=1e-5)


def test_fresh_networks_follow_xaviers_initialisation_and_differ():
    torch.manual_seed(0)
    net = pddm.Ensemble(3, 2, False, replace(ARGS, hidden=400))
    for w, widths in zip(net.weights, ((5, 400), (400, 400), (400, 3)), strict=True):
        assert w.std().item() == pytest.approx(math.sqrt(2 / sum(widths)), rel=0.05)
        assert not torch.equal(w[0], w[1])
    assert all((bias == 0).all() for bias in net.biases)


@pytest.mark.parametrize("learn_reward", [False, True])
@torch.no_grad()
def test_the_loss_is_the_members_squared_error_written_out(learn_reward):
    net, data, expected = ensemble(learn_reward), transitions(), 0.0
    x, y = net.normalised(data)
    for n in range(6):
        inputs = (torch.cat([data.s[n], data.a[n]]) - net.input_mean) / net.input_std
        output, logit = net(inputs.expand(3, 1, -1))
        targets = [*(data.s2[n] - data.s[n]), *data.r[n]][: 3 + learn_reward]
        for b in range(3):
            for target, m, d, f in zip(targets, net.target_mean, net.target_std, output[b, 0], strict=True):
                expected += ((target - m) / d - f) ** 2 / 6 / len(targets)
            if learn_reward:
                expected -= torch.distributions.Bernoulli(logits=logit[b, 0]).log_prob(data.terminated[n, 0]) / 6
    loss = pddm.ensemble_loss(net, *(v.expand(3, -1, -1) for v in (x, y, data.terminated)))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_members_see_all_rows_in_orders_of_their_own(monkeypatch):
    net, seen, loss, data = ensemble(), [], pddm.ensemble_loss, transitions(60)
    data.s2[:, 2] = data.s[:, 2] + 1  # a counter: its change is constant
    monkeypatch.setattr(pddm, "ensemble_loss", lambda m, x, y, e: seen.append((x, y, e)) or loss(m, x, y, e))
    args = replace(ARGS, epochs=2, batch_size=25)
    mean_loss = pddm.fit(net, torch.optim.Adam(net.parameters(), 1e-30), data, args)
    for name, column in (("input", torch.cat([data.s, data.a], 1)), ("target", data.s2 - data.s)):
        mean, std = (getattr(net, f"{name}_{moment}").tolist() for moment in ("mean", "std"))
        assert mean == pytest.approx(column.mean(0).tolist(), abs=1e-5)
        assert std == pytest.approx(column.std(0, correction=0).tolist(), abs=1e-5)
    assert [len(x[0]) for x, _, _ in seen] == [25, 25, 10] * 2
    rows = torch.cat([*net.normalised(data), data.terminated], 1)
    epochs = [torch.cat([torch.cat(batch, -1) for batch in epoch], 1) for epoch in (seen[:3], seen[3:])]
    orders = [torch.cdist(member, rows).argmin(1) for member in torch.cat(epochs)]
    assert torch.allclose(torch.cat(epochs), rows[torch.stack(orders)]) and all(len(o.unique()) == 60 for o in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 6
    assert mean_loss == pytest.approx(np.mean([loss(net, *batch).item() / 3 for batch in seen]), rel=1e-4)


def test_training_fits_a_linear_system_and_leaves_constants_alone():
    data, args = transitions(200), replace(ARGS, hidden=32, epochs=20)
    data.s[:, 2] = 1.0
    data.s2[:] = data.s + F.pad(0.5 * data.a, (0, 1))
    agent = pddm.Agent(Box(), args)
    optimizer = torch.optim.Adam(agent.model.parameters(), 3e-3)
    losses = [pddm.fit(agent.model, optimizer, data, args) for _ in range(2)]
    states, _ = agent.imagine(data.s, data.a[:, None])
    assert 0 < losses[1] < losses[0] < 3 and agent.model.input_std[2] == 1
    assert (states[:, :, 0] - data.s2).square().mean().sqrt() < 0.1
    assert (states[:, :, 0, 2] == data.s[:, 2]).all()  # exactly: no error of a network moves it


@given(st.floats(0.05, 1), st.integers(1, 8), st.integers(0, 99))
def test_filtered_noise_is_an_exponential_average(beta, horizon, seed):
    """n_t = Σ_{i ≤ t} β (1 − β)^{t−i} u_i."""
    u = torch.randn(3, horizon, 2, generator=torch.Generator().manual_seed(seed))
    n = pddm.filtered_noise(u, beta)
    for t in range(horizon):
        expected = sum(beta * (1 - beta) ** (t - i) * u[:, i] for i in range(t + 1))
        assert torch.allclose(n[:, t], expected, atol=1e-5)


def test_each_member_follows_its_own_predictions_up_to_the_end(monkeypatch):
    agent, gains = planner(monkeypatch), torch.tensor([1.0, 2.0, -1.0])[:, None]
    agent.predict = lambda s, a: (s + gains[..., None] * a, s[..., 0] + 10 * a[..., 0], s[..., 0] >= 2)
    states, returns = agent.imagine(torch.zeros(2, 1), torch.tensor([[[1.0], [1.0], [0.5]], [[0.0], [-1.0], [1.0]]]))
    assert states[..., 0].tolist() == [[[1, 2, 2.5], [0, -1, 0]], [[2, 4, 5], [0, -2, 0]], [[-1, -2, -2.5], [0, 1, 0]]]
    # the second member's first state is terminal, so that it earns two rewards
    assert returns.tolist() == [[10 + 11 + 7, 0 - 10 + 9], [10 + 12, -10 + 8], [10 + 9 + 3, -10 + 11]]


def test_predictions_are_in_the_units_of_the_state(monkeypatch):
    agent = planner(monkeypatch, reward=lambda s, a, s2: 100 * s[..., 0] + 10 * a[..., 0] + s2[..., 0])
    net = agent.model
    net.input_mean[:], net.input_std[:] = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0])
    net.target_mean[0], net.target_std[0] = 0.25, 0.5
    net.forward = lambda x: (3 * x[..., :1] + x[..., 1:], x[..., 0])
    s2, r, terminated = agent.predict(torch.tensor([[[2.0]]]), torch.tensor([[[-1.0]]]))
    expected = 2 + (3 * (2 - 1) / 2 + (-1 - 2) / 4) * 0.5 + 0.25
    assert (s2.item(), r.item(), terminated.item()) == pytest.approx((expected, 200 - 10 + expected, False))


def test_reward_and_end_are_learned_where_the_task_is_unknown():
    agent = pddm.Agent(Toy(), replace(ARGS, env_id="Unknown-v0"))
    agent.model.target_std.copy_(torch.tensor([1.0, 2.0]))
    agent.model.forward = lambda x: (torch.stack([x[..., 1], 7 * x[..., 0]], -1), x[..., 0] - 1)
    s2, r, terminated = agent.predict(torch.tensor([[[0.5], [1.0], [2.0]]]), torch.ones(1, 3, 1))
    assert s2.flatten().tolist() == [1.5, 2, 3] and r.tolist() == [[7, 14, 28]] and terminated.tolist() == [[0, 0, 1]]


def test_the_mean_is_weighted_by_the_members_mean_returns(monkeypatch):
    agent = planner(monkeypatch, candidates=5, gamma=2.0)
    returns = torch.tensor([[0.0, 1.0, 900.0, math.nan, 2.0], [0.4, 0.0, -900.0, 3.0, 2.0], [0.2, 0.5, 0.0, 3.0, -4.0]])
    agent.imagine = lambda s, actions: (None, returns) if (s == 0.75).all() and len(s) == 5 else None
    torch.manual_seed(0)
    actions, weights = agent.refine(torch.tensor([0.75]))
    expected = [math.exp(2 * r) for r in (0.2, 0.5, 0.0, -math.inf, 0.0)]  # a return that is no number is the worst
    expected = [w / sum(expected) for w in expected]
    mean = sum(w * a for w, a in zip(expected, actions, strict=True)).flatten().tolist()
    assert weights.tolist() == pytest.approx(expected, rel=1e-5)
    assert agent.mean.flatten().tolist() == pytest.approx(mean)
    torch.manual_seed(0)
    agent.reset()
    assert agent(np.array([0.75])).tolist() == pytest.approx(mean[:1])  # the first action, then the shift
    assert agent.mean.flatten().tolist() == pytest.approx([*mean[1:], mean[-1]])


def test_candidates_are_the_clipped_mean_plus_filtered_noise(monkeypatch):
    agent = planner(monkeypatch, candidates=4_000, sigma=0.1, beta=0.6)
    agent.imagine = lambda s, actions: (None, torch.zeros(3, len(s)))
    assert agent.mean.flatten().tolist() == [-0.5] * 4  # the centre of the box
    agent.mean = torch.tensor([[-0.5], [0.0], [0.3], [0.9]])
    torch.manual_seed(0)
    actions = agent.refine(torch.zeros(1))[0][..., 0]
    stds = [0.1 * 1.5 * 0.6 * math.sqrt(sum(0.4 ** (2 * i) for i in range(t + 1))) for t in range(3)]
    assert actions[:, :3].mean(0).tolist() == pytest.approx([-0.5, 0.0, 0.3], abs=0.01)
    assert actions[:, :3].std(0).tolist() == pytest.approx(stds, rel=0.05)
    assert np.corrcoef(actions[:, :2].T)[0, 1] == pytest.approx(0.4 * stds[0] / stds[1], abs=0.05)
    assert actions.min() >= -2 and (actions == 1).sum() > 100 and actions.max() == 1
    agent.imagine = lambda s, actions: (None, torch.randn(3, len(s)))
    for _ in range(9):
        agent.mean = torch.full((4, 1), 9.0)
        agent.refine(torch.zeros(1))
        assert agent.mean.max() <= 1  # the rounded sum of the weights may exceed 1


@pytest.mark.parametrize("env_id", pddm.REWARDS)
def test_rewards_are_the_environments_own(env_id):
    env = pddm.make_env(replace(ARGS, env_id=env_id))
    env.action_space.seed(0)
    s2, _ = env.reset(seed=0)
    for _ in range(40):
        s, a = s2, env.action_space.sample()
        s2, r, *_ = env.step(a)
        row = (torch.as_tensor(x, dtype=torch.float64) for x in (s, a, s2))
        assert pddm.REWARDS[env_id](*row).item() == pytest.approx(r, abs=1e-4)


class Counter(Toy):
    """The state counts the steps; every episode ends after 30 of them."""

    def reset(self, *, seed=None, options=None):
        self.s = np.zeros(1, np.float32)
        return self.s, {}

    def step(self, a):
        self.s = self.s + 1
        return self.s, float(a[0]), self.s[0] == 30, False, {}


gym.register("Counter-v1", Counter, max_episode_steps=100)


def test_training_follows_algorithm_1(monkeypatch, tmp_path):
    sizes, planned, fit = [], [], pddm.fit
    monkeypatch.setattr(pddm, "fit", lambda *args: sizes.append(len(args[2].s)) or fit(*args))
    monkeypatch.setattr(pddm, "heldout_metrics", lambda agent, replay, first: {"model/first_new_row": first})
    monkeypatch.setattr(pddm.Agent, "forward", lambda agent, obs: planned.append(obs[0]) or np.ones(1, np.float32))
    monkeypatch.setattr(pddm.Run, "evaluate", lambda *_: None)
    flags = "--env-id Counter-v1 --total-timesteps 100 --random-steps 25 --refit-every 20 --epochs 1"
    pddm.main([*flags.split(), "--picture-every", "1000", "--run-dir", str(tmp_path / "run")])
    s, a, r, s2, terminated, episode = checkpoint(tmp_path / "run")["replay"]["rows"].T
    curves, steps = scalars(tmp_path / "run"), torch.arange(100)
    assert sizes == list(curves["losses/model"]) == [25, 45, 65, 85]
    assert curves["model/first_new_row"] == {45: 25, 65: 45, 85: 65}
    assert planned[:75] == s[25:].tolist() == (steps % 30)[25:].tolist()
    assert torch.equal(s2, steps % 30 + 1.0) and torch.equal(r, a) and torch.equal(episode, steps // 30 * 30.0)
    assert torch.equal(terminated, (steps % 30 == 29).float())
    assert len(a[:25].unique()) == 25 and a[25:].unique() == 1 and -2 <= a.min() < -1 and 0 < a[:25].max() <= 1


def test_heldout_metrics_on_known_models():
    """A counter that the members advance by 1, 1.5 and 2 is off by 0.5 h after h steps."""
    replay = pddm.Replay(60, Box(), "cpu")
    for i in range(60):
        s = np.array([0.0, 0.0, i + 100 * (i // 7)])
        replay.add(s, np.zeros(2), 0.0, np.append(s[:2], s[2] + 1), False, i - i % 7)
    agent = pddm.Agent(Box(), ARGS)
    advance = torch.tensor([1, 1.5, 2]).view(3, 1, 1) * torch.eye(3)[2]
    agent.model.forward = lambda x: (advance.expand(-1, x.shape[1], -1), x[..., 0])
    metrics, scale = pddm.heldout_metrics(agent, replay, 20), replay.rows().s[:, 2].std().item()
    for h in (1, 5):
        assert metrics[f"model/open_loop_error_{h}"] == pytest.approx(0.5 * h / scale / 3, rel=1e-3)
    assert "model/open_loop_error_20" not in metrics
    assert metrics["model/disagreement"] == pytest.approx(math.sqrt(1 / 6) / 3, rel=1e-3)
    assert metrics["model/heldout_loss"] == pytest.approx((0.5**2 + 1) / 9, rel=1e-4)
