"""The mathematics of pddm.py against slow and obvious references."""

import math
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import module

pddm = module("pddm")
ARGS = pddm.Args(candidates=50, horizon=4, hidden=8, members=2)


class Env(gym.Env):
    def __init__(self, size, low, high):
        self.observation_space = gym.spaces.Box(-9, 9, (size,))
        self.action_space = gym.spaces.Box(np.float32(low), np.float32(high))


BOX, TOY = Env(3, [-1, -1], [1, 1]), Env(1, [-2], [1])


def ensemble(learn_reward=False, **changes):
    torch.manual_seed(0)
    net = pddm.Ensemble(3, 2, learn_reward, replace(ARGS, **changes))
    for p in net.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return net


@pytest.mark.parametrize("learn_reward", [False, True])
def test_the_batched_ensemble_and_its_loss_are_those_of_the_members(learn_reward):
    net, size, expected = ensemble(learn_reward), 3 + learn_reward, 0.0
    x, y, terminated = torch.randn(2, 7, 5), torch.randn(2, 7, size), (torch.rand(2, 7, 1) < 0.4).float()
    output, logit = net(x)
    for b in range(2):
        h = x[b]
        for i, (w, bias) in enumerate(zip(net.weights, net.biases, strict=True)):
            h = (h.clamp(min=0) if i else h) @ w[b] + bias[b]
        assert torch.allclose(output[b], h[:, :size], atol=1e-5)
        expected += np.mean((y[b] - h[:, :size]).detach().numpy() ** 2)
        if learn_reward:
            assert torch.allclose(logit[b], h[:, -1], atol=1e-5)
            p = h[:, -1:].sigmoid()
            expected -= torch.where(terminated[b] > 0, p, 1 - p).log().mean().item()
    assert pddm.ensemble_loss(net, x, y, terminated).item() == pytest.approx(float(expected), rel=1e-4)


def test_fresh_members_differ_and_follow_xavier():
    net = pddm.Ensemble(3, 2, False, replace(ARGS, hidden=300))
    for w, (fan_in, fan_out) in zip(net.weights, ((5, 300), (300, 300), (300, 3)), strict=True):
        assert w.std().item() == pytest.approx(math.sqrt(2 / (fan_in + fan_out)), rel=0.1)
        assert not torch.equal(w[0], w[1])
    assert all((bias == 0).all() for bias in net.biases)


def filled(n=60, length=7):
    """The third coordinate of a state counts the steps, the last action is constant."""
    replay, rng = pddm.Replay(n, BOX, "cpu"), np.random.default_rng(0)
    for i in range(n):
        s = rng.normal(2, 3, 3)
        replay.add(np.append(s[:2], i), [rng.uniform(-1, 1), 0.5], i, np.append(s[1:], i + 1), False, i - i % length)
    return replay


def test_each_member_sees_all_data_in_its_own_order(monkeypatch):
    net, seen, loss = ensemble(), [], pddm.ensemble_loss
    monkeypatch.setattr(pddm, "ensemble_loss", lambda m, *data: seen.append(data) or loss(m, *data))
    args, data = replace(ARGS, epochs=2, batch_size=25), filled().rows()
    optimizer, before = torch.optim.Adam(net.parameters(), 1e-2), [p.clone() for p in net.parameters()]
    mean_loss = pddm.fit(net, optimizer, data, args)
    assert [batch[0].shape for batch in seen] == [(2, 25, 5), (2, 25, 5), (2, 10, 5)] * 2
    first, second = (torch.cat([batch[0][..., 2] for batch in seen[i : i + 3]], 1) for i in (0, 3))
    assert torch.allclose(first.sort(1).values, second.sort(1).values) and not torch.equal(first, second)
    assert torch.equal(first[0].sort().values, first[1].sort().values) and not torch.equal(first[0], first[1])
    assert all(not torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    inputs, change = torch.cat([data.s, data.a], 1), data.s2 - data.s
    assert torch.allclose(net.input_mean, inputs.mean(0)) and net.input_std[4] == 1
    assert torch.allclose(net.input_std[:4], inputs.std(0, correction=0)[:4])
    assert torch.allclose(net.target_mean, change.mean(0))
    assert torch.allclose(net.target_std, change.std(0, correction=0), atol=1e-6) and net.target_std[2] == 0
    x, y = net.normalised(data)
    assert x[:, :4].std(0, correction=0).tolist() == pytest.approx([1] * 4)
    assert y[:, :2].std(0, correction=0).tolist() == pytest.approx([1] * 2) and (y[:, 2] == 0).all()
    values = [loss(net, *batch).item() for batch in seen]
    assert 0 < mean_loss < 10 * np.mean(values)


def test_training_lowers_the_error_of_a_linear_system():
    torch.manual_seed(0)
    replay, rng = pddm.Replay(200, BOX, "cpu"), np.random.default_rng(0)
    for _ in range(200):
        s, a = rng.normal(size=3), rng.uniform(-1, 1, 2)
        replay.add(s, a, 0.0, s + np.append(0.5 * a, 0.0), False, 0)
    args = replace(ARGS, hidden=32, epochs=40)
    agent = pddm.Agent(BOX, replace(args, env_id="Pendulum-v1"))
    pddm.fit(agent.model, torch.optim.Adam(agent.model.parameters(), 1e-2), replay.rows(), args)
    data = replay.rows()
    with torch.no_grad():
        s2, *_ = agent.predict(data.s.expand(2, -1, -1), data.a.expand(2, -1, -1))
    assert (s2 - data.s2).square().mean().sqrt() < 0.05 and torch.equal(s2[0, :, 2], data.s[:, 2])


@pytest.mark.parametrize("beta", [0.3, 0.9, 1.0])
def test_filtered_noise_is_equation_4(beta):
    u = torch.randn(5, 6, 2)
    n = pddm.filtered_noise(u, beta)
    for k in range(5):
        last = np.zeros(2)
        for t in range(6):
            last = beta * u[k, t].numpy() + (1 - beta) * last
            assert n[k, t].numpy() == pytest.approx(last, abs=1e-6)


def planner(monkeypatch, env=TOY, **changes):
    monkeypatch.setitem(pddm.REWARDS, "Toy-v0", lambda s, a, s2: s2[..., 0])
    return pddm.Agent(env, replace(ARGS, env_id="Toy-v0", **changes))


def linear(agent):
    """Member b: s' = g_b s + a with g = 0.5 and 1.5."""
    gains = torch.tensor([0.5, 1.5]).view(2, 1, 1)
    agent.predict = lambda s, a: (gains * s + a, (gains * s + a)[..., 0], torch.zeros(s.shape[:-1], dtype=torch.bool))


def test_each_member_imagines_on_its_own(monkeypatch):
    agent = planner(monkeypatch)
    linear(agent)
    states, returns = agent.imagine(torch.ones(3, 1), torch.zeros(3, 3, 1))
    assert states[:, 0, :, 0].tolist() == [[0.5, 0.25, 0.125], [1.5, 2.25, 3.375]]
    assert returns[:, 2].tolist() == [0.875, 7.125]
    agent.predict = lambda s, a: (s + 1, s[..., 0] + 1, s[..., 0] + 1 >= 2)
    assert agent.imagine(torch.zeros(3, 1), torch.zeros(3, 5, 1))[1].tolist() == [[3.0] * 3] * 2  # 1 + 2, then the end


@pytest.mark.parametrize("gamma", [0.5, 20.0])
def test_the_mean_is_the_reward_weighted_mean_of_equation_2(gamma, monkeypatch):
    torch.manual_seed(0)
    agent = planner(monkeypatch, gamma=gamma, sigma=0.4, beta=0.6)
    linear(agent)
    agent.mean = torch.tensor([0.3, -0.2, 0.1, 0.0])[:, None]
    before, s = agent.mean.clone(), torch.tensor([0.7])
    actions, weights = agent.refine(s)
    returns = []
    for sequence in actions:
        total = 0.0
        for g in (0.5, 1.5):
            state = 0.7
            for a in sequence:
                state = g * state + a.item()
                total += state / 2
        returns.append(total)
    expected = np.exp(gamma * (np.array(returns) - max(returns)))
    expected /= expected.sum()
    assert weights.numpy() == pytest.approx(expected, abs=1e-4)
    assert agent.mean[:, 0].numpy() == pytest.approx(expected @ actions[..., 0].numpy(), abs=1e-4)
    assert ((actions >= -2) & (actions <= 1)).all()
    many = planner(monkeypatch, candidates=20_000, sigma=0.1, beta=0.6)
    linear(many)
    many.mean = before
    actions, _ = many.refine(s)
    noise = actions - before
    stds = [0.15 * 0.6 * math.sqrt(sum(0.4 ** (2 * i) for i in range(t + 1))) for t in range(4)]  # half the box is 1.5
    assert noise.std(0)[:, 0].tolist() == pytest.approx(stds, rel=0.05) and noise.mean().abs() < 0.01


def test_the_planner_shifts_its_mean_and_survives_nan(monkeypatch):
    agent = planner(monkeypatch)
    assert agent.mean.flatten().tolist() == [-0.5] * 4  # the centre of the box
    plan = torch.tensor([0.1, 0.2, 0.3, 0.4])[:, None]
    with monkeypatch.context() as patch:
        patch.setattr(agent, "refine", lambda s: setattr(agent, "mean", plan))
        assert agent(np.zeros(1)) == pytest.approx(0.1)
    assert agent.mean.flatten().tolist() == pytest.approx([0.2, 0.3, 0.4, 0.4])

    def overflow(s, a):
        good = torch.arange(s.shape[1]) == 3
        return s, torch.where(good, a[..., 0], math.nan), torch.zeros(s.shape[:-1], dtype=torch.bool)

    agent.predict = overflow
    _, weights = agent.refine(torch.zeros(1))
    assert weights[3] == 1 and agent.mean.isfinite().all()
    agent.reset()
    assert agent.mean.flatten().tolist() == [-0.5] * 4


def test_reward_and_end_are_learned_where_the_task_is_unknown():
    agent = pddm.Agent(TOY, replace(ARGS, env_id="Unknown-v0"))
    agent.model.forward = lambda x: (torch.cat([x[..., 1:], 7 * x[..., :1]], -1), x[..., 0] - 1)
    s2, r, terminated = agent.predict(torch.tensor([[[0.5], [2.0]]]), torch.ones(1, 2, 1))
    assert s2.flatten().tolist() == [1.5, 3.0] and r.flatten().tolist() == [3.5, 14.0]
    assert terminated.flatten().tolist() == [False, True]


@pytest.mark.parametrize("env_id", pddm.REWARDS)
def test_rewards_are_the_environments_own(env_id):
    env = pddm.make_env(replace(ARGS, env_id=env_id))
    env.action_space.seed(0)
    s, _ = env.reset(seed=0)
    for _ in range(40):
        a = env.action_space.sample()
        s2, r, *_ = env.step(a)
        row = (torch.as_tensor(x, dtype=torch.float64) for x in (s, a, s2))
        assert pddm.REWARDS[env_id](*row).item() == pytest.approx(r, abs=1e-4)
        s = s2


def test_heldout_metrics_on_known_models():
    """A model that counts steps errs only across episodes; members that differ by 1 have the std 0.5."""
    replay = filled()
    replay.data[:, :2] = replay.data[:, 6:8] = 0.0
    replay.data[:, 2] += 100 * replay.data[:, -1]
    replay.data[:, 8] = replay.data[:, 2] + 1
    agent = pddm.Agent(BOX, replace(ARGS, env_id="Pendulum-v1"))
    steps = torch.tensor([[0.0, 0.0, 0.5], [0.0, 0.0, 1.5]])[:, None]
    agent.predict = lambda s, a: (s + steps, s[..., 0], torch.zeros(s.shape[:-1], dtype=torch.bool))
    metrics, scale = pddm.heldout_metrics(agent, replay, 20), replay.rows().s[:, 2].std().item()
    assert metrics["model/open_loop_error_1"] == metrics["model/open_loop_error_5"] == pytest.approx(0, abs=1e-5)
    assert metrics["model/disagreement"] == pytest.approx(0.5 / scale / 3) and "model/open_loop_error_20" not in metrics
    data = replay.rows(slice(20, None))
    batch = [x.expand(2, *x.shape) for x in (*agent.model.normalised(data), data.terminated)]
    assert metrics["model/heldout_loss"] == pytest.approx(pddm.ensemble_loss(agent.model, *batch).item() / 2)


def test_the_model_is_trained_regularly(monkeypatch, tmp_path):
    sizes, fit = [], pddm.fit
    monkeypatch.setattr(pddm, "fit", lambda *args: sizes.append(len(args[2].s)) or fit(*args))
    flags = "--total-timesteps 400 --random-steps 150 --refit-every 100 --epochs 1 --candidates 9 --episodes 1"
    pddm.main(["pendulum", *flags.split(), "--run-dir", str(tmp_path / "run")])
    assert sizes == [150, 250, 350]
