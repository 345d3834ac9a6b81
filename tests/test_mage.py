"""The mathematics of mage.py against slow and obvious references."""

import math
from collections import defaultdict
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import module, tags
from torch.distributions import Bernoulli, Normal

mage = module("mage")
ARGS = mage.Args(env_id="Toy-v0", members=4, batch_size=8, hidden=16, model_hidden=16)
both_rewards = pytest.mark.parametrize("env_id", ["Toy-v0", "Unknown-v0"])  # known and learned


class Toy(gym.Env):
    observation_space = gym.spaces.Box(-99, 99, (3,))
    action_space = gym.spaces.Box(np.float32([-1, 0]), np.float32([3, 2]))


def toy_reward(s, a, s2):
    return s[..., 0] * a[..., 0] / 3 + (s2[..., 1] - s[..., 1]).sin(), s2[..., 2] > 4


def data(*shape):
    s, a, r, noise = (torch.randn(*shape, size) for size in (3, 2, 1, 3))
    s, a, terminated = 2 + 3 * s, a.tanh(), (torch.rand(*shape, 1) < 0.4).float()
    return mage.Transitions(s, a, r, s + 0.5 + a.sum(-1, keepdim=True) + noise, terminated, 0 * r)


def make_agent(double=False, **changes):
    """No two networks agree, and no statistic is 0 or 1."""
    torch.manual_seed(0)
    mage.REWARDS["Toy-v0"] = toy_reward
    agent, d = mage.Agent(Toy(), replace(ARGS, **changes)), data(50)
    for p in agent.parameters():
        p.data += 0.1 * torch.randn_like(p)
    agent.states.fit(d.s)
    agent.model.inputs.fit(torch.cat([d.s, d.a], -1))
    agent.model.changes.fit(d.s2 - d.s)
    agent.model.rewards.fit(2 + 3 * d.r)
    if double:
        agent.double()
        agent.low, agent.high = agent.low.double(), agent.high.double()
    return agent


def run_network(net, k, x):
    for i, (w, b) in enumerate(zip(net.weights, net.biases, strict=True)):
        x = (x / (1 + torch.exp(-x)) if i else x) @ w[k] + b[k]
    return x


def test_standardizers_have_the_statistics_of_the_data():
    x, standard = torch.cat([5 + 3 * torch.randn(40, 2), torch.full((40, 1), 4.0)], 1), mage.Standardizer(3)
    assert torch.equal(standard(x), x) and torch.equal(standard.inverse(x), x)
    standard.fit(x)
    assert torch.allclose(standard(x)[:, :2], ((x - x.mean(0)) / x.std(0, correction=0))[:, :2], atol=1e-4)
    assert torch.allclose(standard.inverse(standard(x)), x, atol=1e-5)
    assert standard(torch.tensor([0.0, 0.0, 4.5]))[2] == 0.5 and standard.inverse(torch.randn(3))[2] == 4  # constant


def test_networks_side_by_side():
    net, x = mage.MLP(3, 5, 7, 2), torch.randn(3, 4, 5)
    assert all((b == 0).all() for b in net.biases) and (net.weights[0][0] != net.weights[0][1]).all()
    for b in net.biases:
        b.data.normal_()
    for k in range(3):
        assert torch.allclose(net(x)[k], run_network(net, k, x[k]), atol=1e-5)
        assert torch.allclose(net(x[0])[k], run_network(net, k, x[0]), atol=1e-5)


@both_rewards
def test_the_models_loss_is_the_likelihood(env_id):
    model, d = make_agent(env_id=env_id, model_layers=3).model, data(4, 6)
    x = (torch.cat([d.s, d.a], -1) - model.inputs.mean) / model.inputs.std
    y = (d.s2 - d.s - model.changes.mean) / model.changes.std
    raw = torch.stack([run_network(model.networks, k, x[k]) for k in range(4)])
    std = torch.exp((-5 + 4 / (1 + torch.exp(-raw[..., 3:6]))) / 2)
    assert len(model.networks.weights) == 4 and raw.shape[-1] == 6 + (env_id == "Unknown-v0")
    expected = -2 * Normal(raw[..., :3], std).log_prob(y).mean() - math.log(2 * math.pi)
    if env_id == "Unknown-v0":
        assert [w.shape[-1] for w in model.reward_network.weights] == [256, 256, 256, 1]
        r = run_network(model.reward_network, 0, torch.cat([x, y], -1))
        expected += (r - (d.r - model.rewards.mean) / model.rewards.std).square().mean()
        expected -= Bernoulli(logits=raw[..., 6:]).log_prob(d.terminated).mean()
    assert mage.model_loss(model, *d[:5]).item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_step_clips_gradients_and_touches_only_its_own_parameters():
    p, other = (torch.nn.Parameter(x) for x in (torch.zeros(3), torch.ones(())))
    for _ in range(2):
        mage.descend(torch.optim.SGD([p], 1.0), other * (p * torch.tensor([100.0, -7.0, 0.5])).sum(), 5.0)
    assert p.tolist() == [-10.0, 10.0, -1.0] and other.grad is None


@pytest.mark.parametrize(("count", "size", "batches"), [(100, 30, 7), (20, 30, 4), (210, 30, 5), (90, 30, 3)])
def test_a_training_makes_whole_passes_each_member_in_its_own_order(count, size, batches, monkeypatch):
    model, d, seen = mage.Ensemble(3, 2, False, ARGS), data(count)._replace(r=torch.arange(float(count))[:, None]), []
    loss = lambda model, s, a, r, *_: seen.append(r[..., 0]) or len(seen) + 0 * model.networks.biases[0].sum()  # noqa: E731
    monkeypatch.setattr(mage, "model_loss", loss)
    args = replace(ARGS, model_batch_size=size, model_batches=batches)
    mean = mage.fit(model, torch.optim.SGD(model.networks.parameters(), 0.1), d, args)
    per_pass = max(count // size, 1)
    assert len(seen) == -(-batches // per_pass) * per_pass and mean == pytest.approx((1 + len(seen)) / 2)
    for i in range(0, len(seen), per_pass):
        order = torch.cat(seen[i : i + per_pass], 1)
        assert order.shape == (4, per_pass * min(size, count)) and all(len(row.unique()) == len(row) for row in order)
        assert (order[0] != order[1]).any()
    means = torch.cat([model.inputs.mean, model.changes.mean, model.rewards.mean])
    assert torch.allclose(means, torch.cat([d.s, d.a, d.s2 - d.s, d.r], 1).mean(0), atol=1e-4)


def test_the_policy_acts_in_the_tasks_box():
    agent, s = make_agent(), np.float32([1, 2, 3])
    a = torch.tanh(run_network(agent.policy, 0, (torch.tensor(s) - agent.states.mean) / agent.states.std))[0]
    assert agent(s) == pytest.approx([-1 + 2 * (a[0].item() + 1), a[1].item() + 1], abs=1e-5)
    noise = torch.stack([agent.act(s, 0.3) - a for _ in range(1_000)])[:, a.abs().argmin()]
    assert noise.std().item() == pytest.approx(0.3, abs=0.03) and noise.mean().abs() < 0.04
    assert max(agent.act(s, 9.0).abs().max() for _ in range(9)) == 1


@both_rewards
def test_each_member_imagines_its_share_of_the_rows(env_id):
    agent, d, n = make_agent(env_id=env_id), data(1), 40_000
    s2, r, terminated = agent.imagine(d.s.repeat(n, 1), d.a.repeat(n, 1))
    mean, logvar, logit = (x[:, 0] for x in agent.model(d.s.expand(4, 1, 3), d.a.expand(4, 1, 2)))
    for k, rows in enumerate(torch.arange(n).split(n // 4)):
        change = (s2[rows] - d.s - agent.model.changes.mean) / agent.model.changes.std
        assert torch.allclose(change.mean(0), mean[k], atol=0.02)
        assert torch.allclose(change.std(0), (logvar[k] / 2).exp(), rtol=0.05)
        if env_id == "Unknown-v0":
            assert terminated[rows].float().mean().item() == pytest.approx(logit[k, 0].sigmoid().item(), abs=0.02)
    expected, ends = toy_reward(d.s, torch.stack([-1 + 2 * (d.a[:, 0] + 1), d.a[:, 1] + 1], 1), s2)
    if env_id == "Unknown-v0":
        r = (r - agent.model.rewards.mean) / agent.model.rewards.std
        expected, ends = agent.model.reward(d.s.expand(n, 3), d.a.expand(n, 2), s2)[:, 0], terminated
    assert torch.allclose(r, expected, atol=1e-4) and torch.equal(terminated, ends)


def test_the_target_is_td3s():
    agent, d, asked = make_agent(target_noise=0.4, noise_clip=0.5, gamma=0.9), data(3_000), []
    agent.target_critics.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0][:, 3:]))
    agent.target_policy.weights[-1].mul_(5)  # actions near both bounds
    y = agent.target(d.s2, d.r[:, 0], d.terminated[:, 0] > 0)
    x, (a2,) = agent.states(d.s2), asked
    q = torch.stack([run_network(agent.target_critics, k, torch.cat([x, a2], 1))[:, 0] for k in range(2)]).min(0).values
    assert torch.allclose(y, torch.where(d.terminated[:, 0] > 0, d.r[:, 0], d.r[:, 0] + 0.9 * q), atol=1e-4)
    clean = torch.tanh(run_network(agent.target_policy, 0, x))
    noise, beyond = (a2 - clean)[clean.abs() < 0.5], Normal(0, 0.4).cdf(torch.tensor(-0.5)).item()
    assert noise.abs().max().item() == pytest.approx(0.5) and noise.mean().abs() < 0.03
    assert (noise < -0.499).float().mean().item() == pytest.approx(beyond, abs=0.02) and a2.aminmax() == (-1, 1)


@both_rewards
def test_the_slope_is_the_derivative_of_the_whole_target(env_id):
    """∇_a y by finite differences with the same noise; without the path through ŝ it is another one."""
    agent, d = make_agent(double=True, env_id=env_id), data(12)
    target = lambda a: torch.manual_seed(5) and agent.imagined_target(d.s.double(), a)  # noqa: E731
    (y, slope), a = target(d.a.double()), d.a.double()
    assert not y.requires_grad and not slope.requires_grad
    for j, step in enumerate(1e-6 * torch.eye(2).double()):
        assert torch.allclose(slope[:, j], (target(a + step)[0] - target(a - step)[0]) / 2e-6, atol=1e-6)
    agent.model.changes.inverse = lambda x, inverse=agent.model.changes.inverse: inverse(x.detach())
    assert (target(a)[1] - slope).abs().mean() > 1e-3


def test_one_pass_through_the_model_gives_the_losses_and_gradients_of_the_double_backward_pass():
    """The plain form: δ̂ with the graph of everything, ∇_a δ̂ with create_graph, Huber losses written out."""
    agent, s = make_agent(double=True), data(12).s.double()
    huber = lambda x: (0.5 * x * x if abs(x) < 1 else abs(x) - 0.5) / 24  # noqa: E731
    torch.manual_seed(5)
    losses = mage.critic_losses(agent, s, (a := agent.pi(agent.policy, s)), *agent.imagined_target(s, a))
    torch.manual_seed(5)
    y, values, slopes = agent.target(*agent.imagine(s, a)), [], []
    for q in agent.q(agent.critics, s, a):
        (slope,) = torch.autograd.grad((y - q).sum(), a, create_graph=True)
        values += [huber(x) for x in y - q]
        slopes += [huber(x.square().sum().sqrt()) for x in slope]
    assert min(values) < 0.5 / 24 < max(values) and min(slopes) < 0.5 / 24 < max(slopes)  # both branches
    plain, parameters = (sum(values), sum(slopes)), list(agent.critics.parameters())
    assert torch.allclose(torch.stack(losses), torch.stack(plain), atol=1e-12)
    ours, theirs = (torch.autograd.grad(x[0] + 5 * x[1], parameters) for x in (losses, plain))
    assert all(torch.allclose(x, y, atol=1e-12) and x.abs().max() > 1e-6 for x, y in zip(ours, theirs, strict=True))
    assert torch.allclose(sum(mage.critic_losses(agent, s, a, y.detach(), None)), plain[0])


def test_the_policys_loss_and_following_targets():
    agent, s = make_agent(), data(9).s
    expected = [min(q) for q in agent.q(agent.critics, s, agent.pi(agent.policy, s)).T.tolist()]
    assert mage.policy_loss(agent, s).item() == pytest.approx(-np.mean(expected), rel=1e-5)
    before = [p.clone() for p in agent.target_policy.parameters()]
    mage.follow(agent.target_policy, agent.policy, 0.25)
    for old, new, p in zip(before, agent.target_policy.parameters(), agent.policy.parameters(), strict=True):
        assert torch.allclose(new, 0.75 * old + 0.25 * p) and not torch.equal(new, old)


def test_heldout_metrics_on_a_known_model():
    """The third coordinate counts steps: a model that adds 1.5 is wrong by 0.5 per step; episodes are not crossed."""
    agent, replay = make_agent(), mage.Replay(60, Toy(), "cpu")
    for i in range(60):
        replay.add([0, 0, i + 100 * (i // 7)], [0.1, 0.2], 0.0, [0, 0, i + 100 * (i // 7) + 1], False, i - i % 7)
    agent.imagine = lambda s, a: (s + torch.tensor([0.0, 0.0, 1.5]), None, None)
    metrics, scale = mage.heldout_metrics(agent, replay, 20), replay.rows().s[:, 2].std().item()
    loss = mage.model_loss(agent.model, *(x.expand(4, -1, -1) for x in replay.rows(slice(20, 60))[:5])).item()
    expected = {"model/open_loop_error_1": 0.5 / scale / 3, "model/open_loop_error_5": 2.5 / scale / 3}
    assert metrics == pytest.approx({"model/heldout_loss": loss, **expected}, rel=1e-4)


@pytest.mark.parametrize("imagine", [True, False])
def test_the_training_loop_keeps_its_schedule(imagine, tmp_path, monkeypatch):
    calls, real = defaultdict(list), dict(vars(mage))
    real["critic_losses"] = lambda agent, *_: [x + 0 * agent.critics.biases[0].sum() for x in (2, 7)]
    for name in ("fit", "heldout_metrics", "critic_losses", "policy_loss", "descend", "follow", "play"):
        monkeypatch.setattr(mage, name, lambda *args, name=name: calls[name].append(args) or real[name](*args))
    mage.train(replace(
        ARGS, env_id="Pendulum-v1", total_timesteps=240, random_steps=216, updates=3, policy_every=4, model_every=30,
        model_batches=2, imagine=imagine, gradient_weight=3.0 * imagine, tau=0.3, gradient_clip=2.0, eval_every=1_000,
        picture_every=1_000, episodes=1, run_dir=str(tmp_path / "run")))  # fmt: skip
    ends = list(range(30, 241, 30)) if imagine else []
    assert [len(args[2].s) for args in calls["fit"]] == ends and len(calls["play"]) == 1
    assert [first for *_, first in calls["heldout_metrics"]] == [end - 30 for end in ends]
    assert len(calls["critic_losses"]) == 75 and len(calls["policy_loss"]) == 19  # after steps 216, ..., 240
    assert [args[2] for args in calls["follow"]] == [0.3] * 94 and {args[2] for args in calls["descend"]} == {2.0}
    assert sum(loss == (23 if imagine else 2) for _, loss, _ in calls["descend"]) == 75
    assert {"losses/critic", "losses/action_gradient", "losses/policy"} <= tags(tmp_path / "run")
    rows = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["replay"]["rows"]
    assert rows[:, -1].tolist() == [0] * 200 + [200] * 40  # where the episodes began
    assert -1 <= rows[:216, 3].min() < -0.9 and 0.9 < rows[:216, 3].max() <= 1
    for _, s, a, _, slope in calls["critic_losses"]:  # states of the replay; the actions there only in TD3
        found = (s[:, None] == rows[:, :3]).all(-1)
        stored = rows[found.int().argmax(1), 3] == a[:, 0]
        assert len(s) == 8 and found.any(1).all() and stored.all() != imagine == (slope is not None)


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "InvertedPendulum-v5"])
def test_rewards_and_ends_are_the_environments_own(env_id):
    env, ends = gym.make(env_id), 0
    env.action_space.seed(0)
    s, _ = env.reset(seed=0)
    for _ in range(100):
        a = env.action_space.sample()
        s2, r, terminated, *_ = env.step(a)
        reward, end = mage.REWARDS[env_id](*(torch.as_tensor(x, dtype=torch.float64) for x in (s, a, s2)))
        assert reward.item() == pytest.approx(r, abs=1e-4) and end.item() == terminated
        s, ends = env.reset()[0] if terminated else s2, ends + terminated
    assert (ends > 3) == (env_id == "InvertedPendulum-v5")
