"""The mathematics of dreamer_v3.py against slow and obvious references."""

import math
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import checkpoint, module
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import OneHotCategoricalStraightThrough
from torch.nn import functional as F

dreamer = module("dreamer_v3")
SIZE = dreamer.Size(deter=16, units=8, stoch=3, classes=4, depth=2)
dreamer.SIZES["test"] = SIZE
ARGS = dreamer.Args(obs="vector", horizon=4, size="test", device="cpu", image_size=32)


class Env(gym.Env):
    observation_space, action_space = gym.spaces.Box(-9, 9, (4,)), gym.spaces.Box(-1, 1, (2,))


class DiscreteEnv(Env):
    action_space = gym.spaces.Discrete(3)


def agent_of(env=Env, noise=0.3, **changes):
    torch.manual_seed(0)
    args = replace(ARGS, **changes)
    agent = dreamer.Agent(env(), args)
    for p in agent.parameters():
        p.data += noise * torch.randn_like(p)
    return agent, args


def batch(agent, rows=(3, 6)):
    """The second sequence begins a new episode in row 3, after a terminal state, and the third in row 4, after none."""
    first, terminated = torch.zeros(rows), torch.zeros(rows)
    first[1, 3], first[2, 4], terminated[1, 2] = 1, 1, 1
    action = (torch.randn(*rows, agent.actions) * 2) * (1 - first[..., None])
    h, z = torch.rand(rows[0], 16) - 0.5, torch.rand(rows[0], 12)
    return dreamer.Sequences(torch.randn(*rows, 4) * 5, action, torch.randn(rows) * 3, terminated, first, h, z)


@pytest.fixture
def record(monkeypatch):
    """All samples of z and of Discrete actions, in order."""
    samples, sample = [], OneHotCategoricalStraightThrough.sample
    keep = lambda self, *x: samples.append(sample(self, *x)) or samples[-1]  # noqa: E731
    monkeypatch.setattr(OneHotCategoricalStraightThrough, "sample", keep)
    return samples


# ── Numbers of any size ───────────────────────────────────────────────────────────────────────────────────────────


def two_hot(y):
    return torch.zeros(*y.shape, 255).scatter(-1, *dreamer.two_hot(y))


@given(st.floats(-1e6, 1e6))
def test_symlog_and_two_hot(x):
    y = torch.tensor(x, dtype=torch.float64)
    assert dreamer.symlog(y).item() == pytest.approx(math.copysign(math.log(1 + abs(x)), x), abs=1e-12)
    assert dreamer.symexp(dreamer.symlog(y)).item() == pytest.approx(x, rel=1e-9, abs=1e-9)
    weights, B = two_hot(y.float()).double(), dreamer.bins(y.device).double()
    (k,) = weights.nonzero().T
    assert len(k) <= 2 and k.max() - k.min() <= 1 and weights.sum().item() == pytest.approx(1)
    assert (weights @ B).item() == pytest.approx(x, rel=1e-4, abs=1e-5)


def test_the_bins_and_the_mean_of_their_distribution():
    B = dreamer.bins(torch.device("cpu"))
    assert len(B) == 255 and torch.equal(B, -B.flip(0)) and B[127] == 0
    assert B[254].item() == pytest.approx(math.expm1(20))
    assert torch.allclose(dreamer.symlog(B), torch.linspace(-20, 20, 255), atol=1e-4)
    logits = torch.zeros(5, 255)
    assert not dreamer.two_hot_mean(logits).any() and (logits.softmax(-1) * B).sum(-1).any()  # which rounds
    logits = torch.randn(7, 255) * 3
    expected = (logits.double().softmax(-1) * B.double()).sum(-1).float()
    assert torch.allclose(dreamer.two_hot_mean(logits), expected, rtol=1e-4)
    assert two_hot(torch.tensor([1e12, -1e12])).argmax(-1).tolist() == [254, 0]
    logits.requires_grad_()
    y = torch.randn(7) * 100
    dreamer.two_hot_loss(logits, y).sum().backward()
    assert torch.allclose(logits.grad, logits.softmax(-1) - two_hot(y), atol=1e-6)
    expected = -(two_hot(y) * logits.log_softmax(-1)).sum(-1)
    assert torch.allclose(dreamer.two_hot_loss(logits, y), expected)


@given(st.integers(2, 8), st.floats(0, 1), st.integers(0, 99))
def test_lambda_returns_are_the_mixture_of_all_n_step_returns(n, lambda_, seed):
    reward, value, c = torch.randn(3, 1, n, generator=torch.Generator().manual_seed(seed)).double()
    found = dreamer.lambda_return(reward, value, c, lambda_)[0]
    assert len(found) == n - 1
    for t in range(n - 1):
        total, expected, product = 0.0, 0.0, 1.0
        for k in range(1, n - t):
            total += product * reward[0, t + k].item()
            product *= c[0, t + k].item()
            weight = lambda_ ** (k - 1) * (1.0 if k == n - 1 - t else 1 - lambda_)
            expected += weight * (total + product * value[0, t + k].item())
        assert found[t].item() == pytest.approx(expected, abs=1e-9)


# ── The world model ───────────────────────────────────────────────────────────────────────────────────────────────


def rms(x, norm):
    return x / (x.square().mean(-1, keepdim=True) + 1e-4).sqrt() * norm.weight


def slow_layers(net, x):
    for linear, norm in zip(net[0::3], net[1::3], strict=False):
        x = F.silu(rms(linear(x), norm))
    return net[-1](x) if isinstance(net[-1], torch.nn.Linear) else x


def slow_step(rssm, h, z, a, embedded=None):
    """One state: the block GRU with dense, block-diagonal matrices; then the logits of the posterior or the prior."""
    inputs = ((rssm.h_in, h), (rssm.z_in, z), (rssm.a_in, a / a.abs().clamp(min=1)))
    x = torch.cat([slow_layers(net, y) for net, y in inputs])
    hidden = h @ torch.block_diag(*rssm.hidden.weight) + rssm.hidden.shared_weight @ x + rssm.hidden.bias
    hidden = F.silu(rms(hidden, rssm.norm))
    gates = (hidden @ torch.block_diag(*rssm.gates.weight) + rssm.gates.bias).view(8, 3, 2)
    reset, new, update = (gates[:, i].flatten() for i in range(3))
    update = (update - 1).sigmoid()
    h = update * torch.tanh(reset.sigmoid() * new) + (1 - update) * h
    net, x = (rssm.prior_net, h) if embedded is None else (rssm.posterior_net, torch.cat([h, embedded]))
    logits = slow_layers(net, x)
    return h, logits.view(3, 4)


def mixed(logits):
    return 0.99 * logits.softmax(-1) + 0.01 / 4


def slow_kl(q, p):
    q, p = mixed(q), mixed(p)
    return sum(q[g, c] * (q[g, c] / p[g, c]).log() for g in range(3) for c in range(4))


@torch.no_grad()
def test_the_world_models_loss_row_by_row(record):
    agent, args = agent_of(free_nats=1.0, dynamics_scale=0.7, representation_scale=0.3, gamma=0.9)
    world, data = agent.world, batch(agent)
    loss, states, metrics = dreamer.world_model_loss(world, data, args)
    total, kls = 0.0, []
    for b in range(3):
        h, z = data.h[b], data.z[b]
        for t in range(6):
            if data.first[b, t]:
                h, z = torch.zeros(16), torch.zeros(12)
            x = data.obs[b, t].sign() * data.obs[b, t].abs().log1p()
            h, q = slow_step(world.rssm, h, z, data.action[b, t], slow_layers(world.encoder, x))
            z = record[t][b].flatten()
            assert torch.allclose(states.h[b, t], h, atol=1e-5) and torch.equal(states.z[b, t], z)
            assert torch.allclose(states.logits[b, t], q, atol=1e-5)
            s, kl = torch.cat([z, h]), slow_kl(q, slow_layers(world.rssm.prior_net, h).view(3, 4))
            p, target = slow_layers(world.continue_head, s)[0].sigmoid(), 0.9 * (1 - data.terminated[b, t])
            total += (slow_layers(world.decoder, s) - x).square().sum()
            total += dreamer.two_hot_loss(slow_layers(world.reward_head, s), data.reward[b, t])
            total += -target * p.log() - (1 - target) * (1 - p).log() + max(kl, 1.0)
            kls.append(kl.item())
    assert loss.item() == pytest.approx(total.item() / 18, rel=1e-4) and min(kls) < 1 < max(kls)
    assert metrics["model/kl"].item() == pytest.approx(np.mean(kls), rel=1e-4)
    assert metrics["losses/world"] is loss


def test_free_bits_stop_both_gradients_and_each_kl_trains_its_side():
    agent, args = agent_of()
    world, data = agent.world, batch(agent)
    data = dreamer.Sequences(*(x[:, :1] for x in data[:5]), data.h, data.z)  # in longer ones, h leads to earlier z
    sides = [[*net.parameters()] for net in (world.rssm.prior_net, world.rssm.posterior_net)]

    def gradients(dynamics, representation, free_nats):
        torch.manual_seed(1)
        changes = {"dynamics_scale": dynamics, "representation_scale": representation, "free_nats": free_nats}
        loss = dreamer.world_model_loss(world, data, replace(args, **changes))[0]
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        return [torch.cat([g.flatten() for g in torch.autograd.grad(loss, side, **options)]) for side in sides]

    none, dynamics, representation = gradients(0, 0, 0), gradients(1, 0, 0), gradients(0, 1, 0)
    assert not none[0].any() and dynamics[0].any() and not representation[0].any()
    assert torch.equal(dynamics[1], none[1]) and not torch.allclose(representation[1], none[1])
    free = gradients(1, 1, 1e3)
    assert not free[0].any() and torch.equal(free[1], none[1])


def test_the_uniform_share_bounds_the_kl():
    rssm = agent_of()[0].world.rssm
    q, p = 1e3 * F.one_hot(torch.tensor([0, 1, 2]), 4).float(), 1e3 * F.one_hot(torch.tensor([1, 2, 3]), 4).float()
    kl = dreamer.kl_divergence(rssm.distribution(q), rssm.distribution(p)).item()
    assert kl == pytest.approx(slow_kl(q, p).item(), rel=1e-4) and kl < 3 * math.log(400)
    sample = rssm.distribution(torch.zeros(20_000, 3, 4) + torch.tensor([9.0, 0, 0, 0])).sample().mean((0, 1))
    assert torch.allclose(sample, mixed(torch.tensor([9.0, 0, 0, 0])), atol=2e-3)


def test_fresh_networks_follow_the_paper():
    agent, _ = agent_of(noise=0, size="1m")
    for net in (agent.world.reward_head, agent.critic, agent.slow_critic):
        assert not net[-1].weight.any()
    for layer in (agent.world.encoder[3], agent.world.rssm.prior_net[3]):  # truncated normal of variance 1 / inputs
        std = layer.weight.shape[1] ** -0.5
        assert layer.weight.std().item() == pytest.approx(std, rel=0.05) and not layer.bias.any()
        assert 1.9 * 1.1368 * std < layer.weight.abs().max() < 2.01 * 1.1368 * std
    hidden, gates = agent.world.rssm.hidden, agent.world.rssm.gates
    assert hidden.weight.shape == (8, 64, 64) and hidden.shared_weight.shape == (512, 3 * 64)
    for weight, inputs in ((hidden.weight, 8 * 256), (hidden.shared_weight, 8 * 256), (gates.weight, 512)):
        assert weight.std().item() == pytest.approx(inputs**-0.5, rel=0.05)  # blocks count the inputs of all
    assert agent.actor.net[-1].weight.abs().max() < 0.01 * 0.3 and agent.world.rssm.start(2)[1].shape == (2, 128)
    for side in (32, 64):
        encoder, decoder = dreamer.image_encoder(3, side, 4), dreamer.ImageDecoder(3, side, SIZE)
        images = torch.rand(2, 3, side, side)
        assert encoder(images).shape == (2, 256) and decoder(torch.randn(2, 28)).shape == images.shape
    norm = dreamer.ChannelNorm(3, 1e-4)
    assert torch.allclose(norm(images + 1).square().mean(1), torch.ones(2, side, side), atol=0.1)
    tiny, small = (dreamer.Agent(Env(), replace(ARGS, size=name)) for name in ("tiny", "1m"))
    assert sum(p.numel() for p in tiny.parameters()) < 3e5 < 5e5 < sum(p.numel() for p in small.parameters()) < 8e5


# ── Policy and critic ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_policy_is_a_gaussian_or_a_mixed_categorical():
    agent, _ = agent_of()
    features = torch.randn(9, 28)
    mean, std = agent.actor.net(features).chunk(2, -1)
    policy = agent.actor(features)
    assert torch.allclose(policy.base_dist.loc, mean.tanh())
    assert torch.allclose(policy.base_dist.scale, 0.1 + 0.9 / (1 + (-std - 2).exp())) and policy.entropy().shape == (9,)
    assert agent.to_env(torch.tensor([3.0, -0.5])).tolist() == [1.0, -0.5]  # the environment gets a clipped action
    agent, _ = agent_of(DiscreteEnv)
    probs = agent.actor.net(features).softmax(-1)
    assert torch.allclose(agent.actor(features).probs, 0.99 * probs + 0.01 / 3)


@pytest.mark.parametrize("env", [DiscreteEnv, Env])
def test_behaviour_is_learned_from_imagined_and_sampled_rows(env, record, monkeypatch):
    agent, args = agent_of(env, entropy_scale=0.2, gamma=0.9, replay_value_scale=0.7)
    agent.percentiles[:] = torch.tensor([-300.0, 500.0])
    world, data, normal, actions = agent.world, batch(agent), torch.distributions.Normal.sample, []
    monkeypatch.setattr(
        torch.distributions.Normal, "sample", lambda self, *x: actions.append(normal(self, *x)) or actions[-1]
    )
    h, z = torch.randn(3, 6, 16, requires_grad=True), torch.rand(3, 6, 12, requires_grad=True)
    loss, metrics = dreamer.behaviour_losses(agent, dreamer.State(h, z, None), data, args)
    actions = actions or record[0::2]
    latents = [x for x in record if x.ndim == 3]
    value = lambda net, s: dreamer.two_hot_mean(slow_layers(net, s))  # noqa: E731

    def critic_loss(s, target):
        logits = slow_layers(agent.critic, s)
        return dreamer.two_hot_loss(logits, target) + dreamer.two_hot_loss(logits, value(agent.slow_critic, s).detach())

    actor_loss, value_loss, replay_loss, returns, rows = 0.0, 0.0, 0.0, [], []
    for i in range(18):
        hi, states = h.flatten(0, 1)[i].detach(), [torch.cat([z.flatten(0, 1)[i], h.flatten(0, 1)[i]]).detach()]
        zi = z.flatten(0, 1)[i].detach()
        for k in range(4):
            hi, _ = slow_step(world.rssm, hi, zi, actions[k][i])
            zi = latents[k][i].flatten()
            states.append(torch.cat([zi, hi]).detach())
        s = torch.stack(states)
        r, v = (dreamer.two_hot_mean(slow_layers(net, s)).detach() for net in (world.reward_head, agent.critic))
        c = slow_layers(world.continue_head, s)[:, 0].sigmoid().detach()
        returns.append(dreamer.lambda_return(r[None], v[None], c[None], 0.95)[0])
        rows.append((s, v, c))
    found = torch.quantile(torch.stack(returns), torch.tensor([0.05, 0.95]))
    scale = max(1.0, (0.99 * 800 + 0.01 * (found[1] - found[0])).item())
    for i, (s, v, c) in enumerate(rows):
        weight = 1.0
        for t in range(4):
            weight = weight * c[t]
            policy = agent.actor(s[t])
            gain = policy.log_prob(actions[t][i]) * (returns[i][t] - v[t]) / scale + 0.2 * policy.entropy()
            actor_loss -= weight * gain / 72
            value_loss += weight * critic_loss(s[t], returns[i][t]) / 72
    first = torch.stack(returns)[:, 0].view(3, 6)
    for b in range(3):
        target = first[b, 5]
        for t in reversed(range(5)):
            over = t < 4 and data.first[b, t + 2]  # row t + 1 is the last of its episode
            following = first[b, t + 1] if over else 0.05 * first[b, t + 1] + 0.95 * target
            target = data.reward[b, t + 1] + 0.9 * (1 - data.terminated[b, t + 1]) * following
            if not data.first[b, t + 1]:
                replay_loss += critic_loss(torch.cat([z[b, t], h[b, t]]), target) / 15
    expected = actor_loss + value_loss + 0.7 * replay_loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert metrics["model/return_scale"].item() == pytest.approx(scale, rel=1e-4)
    assert metrics["losses/replay_value"].item() == pytest.approx(replay_loss.item(), rel=1e-4)
    wanted = [*agent.actor.parameters(), *agent.critic.parameters(), h, z]
    pairs = zip(*(torch.autograd.grad(x, wanted) for x in (loss, expected)), strict=True)
    assert all(torch.allclose(g, e, atol=1e-4) and g.any() for g, e in pairs)  # the sampled rows train the states too
    loss, _ = dreamer.behaviour_losses(agent, dreamer.State(h.detach(), z.detach(), None), data, args)
    loss.backward()
    assert all(p.grad is None for p in (*world.parameters(), *agent.slow_critic.parameters()))


def test_returns_are_divided_by_the_range_of_their_percentiles():
    agent, _ = agent_of()
    agent.percentiles.zero_()
    assert agent.return_scale(torch.full((5, 7), 100.0)) == 1
    agent.percentiles.zero_()
    for _ in range(30):
        scale = agent.return_scale(torch.linspace(0, 1_000, 1_001))
    assert scale.item() == pytest.approx(900 * (1 - 0.99**30), rel=1e-4)
    before = [p.clone() for p in agent.slow_critic.parameters()]
    agent.after_update()
    for old, slow, fast in zip(before, agent.slow_critic.parameters(), agent.critic.parameters(), strict=True):
        assert torch.allclose(slow, 0.98 * old + 0.02 * fast, atol=1e-6)


def test_laprop_normalises_first_and_averages_then():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(4, 3) * 0.1)
    zero, slow = torch.nn.Parameter(torch.zeros(5)), p.detach().clone()
    optimizer, m, v = dreamer.LaProp([p, zero], lr=0.1, warmup=4, clip=0.3), torch.zeros(4, 3), torch.zeros(4, 3)
    for n in range(1, 8):
        p.grad, zero.grad = torch.randn(4, 3) * 10**n, torch.ones(5)
        g = p.grad * min(1, 0.3 * slow.norm() / p.grad.norm())
        v = 0.999 * v + 0.001 * g**2
        m = 0.9 * m + 0.1 * g / (v / (1 - 0.999**n)).sqrt()
        slow -= 0.1 * min(1, n / 4) * m / (1 - 0.9**n)
        optimizer.step()
        assert torch.allclose(p, slow, atol=1e-5)
    square = optimizer.state[zero]["square"]
    assert square[0].item() < 1e-2 and zero.grad.norm() > 1 and optimizer.state[p]["step"] == 7


# ── Replay and acting ─────────────────────────────────────────────────────────────────────────────────────────────


def replay_of(agent, args, lengths):
    """Row i holds the number i; a terminal state ends each second episode."""
    replay, i = dreamer.SequenceReplay(Env(), agent, args), 0
    for episode, length in enumerate(lengths):
        for row in range(length):
            x = np.full(4, i, np.float32)
            if row == 0:
                replay.begin(x)
            else:
                replay.add(x, torch.full((2,), float(i)), float(i), row == length - 1 and episode % 2 == 1)
            replay.remember(torch.tensor(i), torch.full((16,), i / 64), torch.full((12,), i % 2))
            i += 1
    return replay


def test_sequences_cross_episodes_and_start_from_the_stored_state():
    agent, args = agent_of(total_timesteps=200)
    replay = replay_of(agent, args, [5, 12, 3, 4])
    data, index = replay.sample(4_000, 5)
    starts = torch.bincount(index[:, 0], minlength=17) / 4_000
    assert index.max() == 19 and (starts[:16] - 1 / 16).abs().max() < 0.02 and not starts[16:].any()
    firsts = torch.isin(index, torch.tensor([0, 5, 17]))
    assert torch.equal(data.obs[..., 0], index.float()) and torch.equal(data.first, firsts.float())
    assert torch.equal(data.reward, index * ~firsts) and torch.equal(data.terminated, (index == 16).float())
    known = index[:, 0] > 0
    assert torch.equal(data.h[known, 0], (index[known, 0] - 1) / 64) and torch.equal(
        data.z[known, 0], (index[known, 0] - 1) % 2.0
    )
    replay.remember(index[:2], torch.full((2, 5, 16), 9.0), torch.full((2, 5, 12), 8.0))
    again = replay.rows(index[:2] + 1)
    assert (again.h == 9).all() and (again.z == 8).all()
    latest = replay.latest(3, 8)
    assert latest.obs[..., 0].tolist() == [[20, 21, 22], [21, 22, 23]] and latest.h[0, 0] == 19 / 64
    old = replay_of(agent, replace(args, replay_size=40), [20] * 7)
    _, index = old.sample(2_000, 5)
    assert (
        len(old.obs) == 50 and index.min() == 100 and index.max() == 119 and old.rows(index).obs[0, 0, 0] == index[0, 0]
    )
    other = dreamer.SequenceReplay(Env(), agent, replace(args, replay_size=40))
    other.load_state_dict(old.state_dict())
    assert all(map(torch.equal, other.rows(index), old.rows(index))) and other.start == 120


def test_acting_infers_as_training_does():
    """With the same samples of z; the action of the last step is clipped inside the model, not in the replay."""
    agent, _ = agent_of()
    obs, states = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32), []
    agent.reset()
    torch.manual_seed(3)
    actions = [torch.zeros(2)]
    for x in obs:
        actions.append(agent.act(x))
        states.append((agent.h[0].clone(), agent.z[0].clone()))
    h, z = torch.zeros(16), torch.zeros(12)
    for t in range(20):
        embedded = slow_layers(agent.world.encoder, dreamer.symlog(torch.from_numpy(obs[t])))
        h, _ = slow_step(agent.world.rssm, h, z, actions[t], embedded)
        assert torch.allclose(h, states[t][0], atol=1e-5)
        z = states[t][1]
    assert torch.stack(actions).abs().max() > 1
    agent.reset()
    assert not agent.h.any() and not agent.z.any() and not agent.action.any()


def test_a_run_updates_as_often_as_the_ratio_says(tmp_path, monkeypatch):
    seen, loss = [], dreamer.world_model_loss
    monkeypatch.setattr(
        dreamer, "world_model_loss", lambda world, batch, args: seen.append(batch) or loss(world, batch, args)
    )
    flags = (
        "--env-id Pendulum-v1 --total-timesteps 600 --learning-starts 100 --train-ratio 2 --batch-size 4 --horizon 2 "
    )
    flags += "--batch-length 4 --episodes 1 --eval-every 5000 --picture-every 5000 --size tiny --device cpu"
    dreamer.main([*flags.split(), "--run-dir", str(tmp_path / "run")])
    trained = [x for x in seen if x.obs.shape[:2] == (4, 4)]
    state = checkpoint(tmp_path / "run")
    assert len(trained) == state["agent"]["updates"] == 63  # an eighth of an update for each step from 100 to 599
    assert state["optimizer"]["param_groups"][0]["lr"] == 2e-4 and state["replay"]["size"] == 603
    rows = state["replay"]["rows"]
    assert rows["first"].nonzero().flatten().tolist() == [0, 201, 402] and not rows["terminated"].any()
    assert rows["h"][:200].any(1).all() and rows["h"].dtype == torch.float16
