"""The mathematics of planet.py against slow and obvious references."""

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import checkpoint, module
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

planet = module("planet")
ARGS = planet.Args(deter_size=5, stoch_size=3, units=6, depth=2, horizon=4, candidates=20, elites=5,
                   iterations=2, device="cpu")  # fmt: skip


class Env(gym.Env):
    def __init__(self, *shape):
        self.observation_space, self.action_space = gym.spaces.Box(-9, 9, shape or (4,)), gym.spaces.Box(-1, 1, (2,))


def agent_of(env=None, noise=0.3, **changes):
    torch.manual_seed(0)
    args = replace(ARGS, **changes)
    agent = planet.Agent(env or Env(), args)
    for p in agent.parameters():
        p.data += noise * torch.randn_like(p)
    if args.obs == "vector":
        agent.world.set_normaliser(torch.randn(50, 4) * 3 + 1)
    return agent, args


def batch(rows=(3, 6)):
    mask, action = torch.ones(rows), torch.rand(*rows, 2) * 2 - 1
    mask[0, 4:] = 0
    return planet.Sequences(torch.randn(*rows, 4), action, torch.randn(rows) * 5, mask)


@pytest.fixture
def record(monkeypatch):
    """The noise of all sampled states, in order."""
    noise, randn_like = [], torch.randn_like
    monkeypatch.setattr(torch, "randn_like", lambda x: noise.append(randn_like(x)) or noise[-1])
    return noise


def slow_step(rssm, h, z, a, noise, embedded=None):
    """One state: the GRU written out, then the Gaussian of the posterior or the prior, and a sample of it."""
    if rssm.transitions == "stochastic":
        h = torch.zeros_like(h)
    x, gru = F.relu(rssm.gru_in(torch.cat([z, a]))), rssm.gru
    (r, u, n), (hr, hu, hn) = (y.chunk(3) for y in (gru.weight_ih @ x + gru.bias_ih, gru.weight_hh @ h + gru.bias_hh))
    update = torch.sigmoid(u + hu)
    h = (1 - update) * torch.tanh(n + torch.sigmoid(r + hr) * hn) + update * h
    out = rssm.prior_net(h) if embedded is None else rssm.posterior_net(torch.cat([h, embedded]))
    mean, std = out[:3], torch.log1p(out[3:].exp()) + 0.1
    return h, mean if rssm.transitions == "deterministic" else mean + std * noise, mean, std


@pytest.mark.parametrize("transitions", ["both", "deterministic", "stochastic"])
@torch.no_grad()
def test_the_world_models_loss_row_by_row(transitions, record):
    agent, args = agent_of(transitions=transitions, decoder_std=0.5, reward_weight=3.0, free_nats=0.9)
    world, data = agent.world, batch()
    record.clear()
    loss, metrics = planet.world_model_loss(world, data, args)
    rows = []
    for b in range(3):
        h, z = torch.zeros(5), torch.zeros(3)
        for t in range(6):
            x = (data.obs[b, t] - world.mean) / world.std
            noise = record[t][b] if record else None
            h, z, mean, std = slow_step(world.rssm, h, z, data.action[b, t], noise, world.encoder(x[None])[0])
            if not data.mask[b, t]:
                continue
            s = torch.cat([z, torch.zeros(5) if transitions == "stochastic" else h])[None]
            prior = world.rssm.prior_net(h)
            m, v = prior[:3], torch.log1p(prior[3:].exp()) + 0.1
            kl = ((v / std).log() + (std**2 + (mean - m) ** 2) / (2 * v**2) - 0.5).sum()
            obs_loss = ((world.decoder(s)[0] - x) ** 2).sum() / (2 * 0.5**2)
            reward_loss = (world.reward_head(s)[0, 0] - 0.1 * data.reward[b, t]) ** 2 / 2
            rows.append(torch.stack([obs_loss, reward_loss, kl, kl.clamp(min=0.9), v.mean()]))
    means = torch.stack(rows).mean(0)
    assert (torch.stack(rows)[:, 2] < 0.9).any() and (torch.stack(rows)[:, 2] > 0.9).any()  # free nats are per row
    assert loss.item() == pytest.approx((means[0] + 3 * means[1] + means[3]).item(), rel=1e-4)
    for name, value in zip(("losses/observation", "losses/reward", "model/kl"), means, strict=False):
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-4)
    assert metrics["model/prior_std"].item() == pytest.approx(means[4].item(), rel=1e-4)


def test_overshooting_predicts_d_steps_from_each_row(record):
    agent, args = agent_of(overshooting=4, free_nats=0.2)
    rssm, data = agent.world.rssm, batch()
    states = rssm.unroll(*rssm.start(3), data.action, torch.randn(3, 6, 6))
    record.clear()
    loss = planet.overshooting_loss(agent.world, states, data.action, data.mask, args)
    expected = 0.0
    for d in (2, 3, 4):
        rows = []
        for b in range(3):
            for t in range(6 - d):
                h, z = states.h[b, t], states.z[b, t]
                for k in range(1, d + 1):
                    noise = record[k - 1].view(3, 6 - k, 3)[b, t]
                    h, z, mean, std = slow_step(rssm, h, z, data.action[b, t + k], noise)
                if data.mask[b, t + d]:
                    q = Normal(states.mean[b, t + d].detach(), states.std[b, t + d].detach())
                    rows.append(kl_divergence(q, Normal(mean, std)).sum().clamp(min=0.2))
        expected += torch.stack(rows).mean() / 4
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    parameters = [*rssm.prior_net.parameters(), *rssm.posterior_net.parameters()]
    for g, e in zip(*(torch.autograd.grad(x, parameters, retain_graph=True) for x in (loss, expected)), strict=True):
        assert torch.allclose(g, e, atol=1e-5)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        with_it = planet.world_model_loss(agent.world, data, args)
        torch.manual_seed(1)
        without = planet.world_model_loss(agent.world, data, replace(args, overshooting=1))
    difference = with_it[0] - without[0]
    assert difference.item() == pytest.approx(with_it[1]["losses/overshooting"].item(), rel=1e-4)


def test_fresh_networks_follow_the_official_code():
    agent, _ = agent_of(noise=0, units=200, deter_size=200)
    rssm = agent.world.rssm
    for weight in (rssm.gru.weight_hh, rssm.gru_in.weight, rssm.prior_net[0].weight, agent.world.reward_head[2].weight):
        edge = (6 / sum(weight.shape)) ** 0.5
        assert 0.98 * edge < weight.abs().max() <= edge
    assert not any(p.any() for name, p in agent.named_parameters() if "bias" in name)
    assert rssm.gaussian(torch.zeros(6))[1].tolist() == pytest.approx([np.log(2) + 0.1] * 3)
    for size, embedded in ((32, 512), (64, 1024)):
        encoder, decoder = planet.image_encoder(size, 32), planet.image_decoder(7, size, 32)
        assert encoder(torch.zeros(2, 3, size, size)).shape == (2, embedded)
        assert decoder(torch.zeros(2, 7)).shape == (2, 3, size, size)


def test_images_have_five_bits_and_noise_below_them():
    world = agent_of(Env(3, 32, 32), obs="pixels")[0].world
    obs = torch.arange(256, dtype=torch.uint8).repeat(12).view(1, 1, 3, 32, 32)
    x, again = world.normalise(obs), world.normalise(obs)
    levels = ((x + 0.5) * 32).floor()
    assert torch.equal(levels, (obs // 8).float()) and levels.unique().numel() == 32
    below = (x + 0.5) * 32 - levels
    assert not torch.equal(x, again) and abs(below.mean() - 0.5) < 0.02 and below.max() > 0.95 and below.min() < 0.05


class Known:
    """A latent model that is known: s is a number that the action moves, and the reward is −(s − goal)²."""

    def __init__(self, goal, noise=0.0):
        self.goal, self.noise, self.rssm, self.seen = goal, noise, self, []

    def unroll(self, h, z, actions, sample):
        self.seen.append(actions)
        self.sampled = sample
        z = z[:, None] + actions.cumsum(1)
        return planet.State(h[:, None].expand(-1, z.shape[1], -1), z, z, z)

    def features(self, states):
        return states.z

    def reward(self, features):
        reward = -(features[..., 0] - self.goal).square()
        return reward + self.noise * torch.randn_like(reward) if self.noise else reward


def test_the_planner_finds_the_optimum_of_a_known_model():
    """From s = 0 the goal is 2.5: two full steps, a half, and then none."""
    torch.manual_seed(0)
    args = replace(ARGS, candidates=500, elites=50, iterations=10)
    found = planet.plan(Known(2.5), torch.zeros(1, 5), torch.zeros(1, 1), 1, args)
    assert found[:, 0].tolist() == pytest.approx([1, 1, 0.5, 0], abs=0.08) and found[:2].max() <= 1
    # What counts is the state that an action leads to: with one step left, the best action goes as far as it can.
    assert planet.plan(Known(9), torch.zeros(1, 5), torch.zeros(1, 1), 1, replace(args, horizon=1)).item() > 0.99
    # All sequences are elites: the mean does not move.
    flat = replace(args, candidates=4_000, elites=4_000, iterations=1)
    assert planet.plan(Known(2.5), torch.zeros(1, 5), torch.zeros(1, 1), 1, flat).abs().max() < 0.06


def test_one_round_of_the_search_against_a_loop():
    world, args = Known(1.0), replace(ARGS, candidates=30, elites=4, iterations=3, horizon=3)
    torch.manual_seed(0)
    found = planet.plan(world, torch.zeros(1, 5), torch.zeros(1, 1), 1, args)
    torch.manual_seed(0)
    mean, std = np.zeros((3, 1)), np.ones((3, 1))
    for round in range(3):
        sequences = np.clip(mean + std * torch.randn(30, 3, 1).numpy(), -1, 1)
        assert world.seen[round].numpy() == pytest.approx(sequences, abs=1e-5)
        returns = [-sum((sum(x[: t + 1, 0]) - 1) ** 2 for t in range(3)) for x in sequences]
        best = sequences[np.argsort(returns)[-4:]]
        mean, std = best.mean(0), np.sqrt(best.var(0) + 1e-6)
    assert found.numpy() == pytest.approx(mean, abs=1e-5)  # the mean, not the best sequence
    assert not world.sampled
    planet.plan(world, torch.zeros(1, 5), torch.zeros(1, 1), 1, replace(args, sampled_plans=True))
    assert world.sampled
    rssm = agent_of()[0].world.rssm
    ahead = rssm.unroll(*rssm.start(2), torch.rand(2, 3, 2), sample=False)
    assert torch.equal(ahead.z, ahead.mean)


def test_shooting_takes_the_best_of_as_many_sequences():
    world, args = Known(1.0), replace(ARGS, planner="shooting", candidates=30, iterations=3)
    found = planet.plan(world, torch.zeros(1, 5), torch.zeros(1, 1), 1, args)
    (sequences,) = world.seen
    returns = world.reward(world.unroll(torch.zeros(90, 5), torch.zeros(90, 1), sequences, True).z).sum(1)
    assert len(sequences) == 90 and torch.equal(found, sequences[returns.argmax()])


def test_the_mean_of_the_elites_resists_lucky_samples():
    """If rewards are noisy, the best sample is often only lucky, and the mean of the best is better in truth."""
    torch.manual_seed(0)
    values = {"cem": [], "shooting": []}
    args = replace(ARGS, candidates=100, elites=10, iterations=5)
    for _ in range(20):
        for planner, found in values.items():
            a = planet.plan(Known(2.5, 1.0), torch.zeros(1, 5), torch.zeros(1, 1), 1, replace(args, planner=planner))
            found.append(-(a.cumsum(0) - 2.5).square().sum().item())
    assert np.mean(values["cem"]) > np.mean(values["shooting"]) + 0.1


@torch.no_grad()
def test_acting_infers_as_training_does(record):
    agent, _ = agent_of()
    obs, states = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32), []
    agent.reset()
    actions = [torch.zeros(2)]
    for x in obs:
        record.clear()
        actions.append(agent.act(x, explore=2.0))
        states.append((agent.h[0].clone(), agent.z[0].clone(), record[0][0]))
    h, z = torch.zeros(5), torch.zeros(3)
    for t in range(6):
        x = (torch.from_numpy(obs[t]) - agent.world.mean) / agent.world.std
        h, z, *_ = slow_step(agent.world.rssm, h, z, actions[t], states[t][2], agent.world.encoder(x[None])[0])
        assert torch.allclose(h, states[t][0], atol=1e-5) and torch.allclose(z, states[t][1], atol=1e-5)
    assert torch.stack(actions).abs().max() == 1  # noise is clipped
    agent.reset()
    torch.manual_seed(1)
    quiet = agent.act(obs[0])
    agent.reset()
    torch.manual_seed(1)
    assert torch.equal(quiet, agent.act(obs[0], 0.0)) and not torch.equal(quiet, agent.act(obs[0], 0.1))


def test_a_run_updates_c_times_before_each_episode(tmp_path, monkeypatch):
    seen, loss = [], planet.world_model_loss

    def watched(world, batch, args):
        if torch.is_grad_enabled():
            seen.append((batch.obs.shape, world.std.clone()))
        return loss(world, batch, args)

    monkeypatch.setattr(planet, "world_model_loss", watched)
    flags = "--total-timesteps 1200 --random-steps 300 --updates 3 --batch-size 4 --batch-length 8 --episodes 1 "
    flags += "--candidates 4 --elites 2 --iterations 1 --horizon 2 --device cpu --eval-every 2000 --random-data"
    planet.main([*flags.split(), "--run-dir", str(tmp_path / "run")])
    # Episodes have 200 steps; the first two are random, because 300 steps end within the second.
    assert len(seen) == 3 * 4 and seen[0][0] == (4, 8, 3)
    state = checkpoint(tmp_path / "run")
    rows = state["replay"]["rows"]["obs"]
    assert len(rows) == 6 * 101 and torch.allclose(seen[0][1], rows[: 2 * 101 + 1].std(0, correction=0), atol=1e-4)
    assert state["agent"]["updates"] == 12 and rows[:, 2].abs().max() > 1
    actions = state["replay"]["rows"]["action"]
    assert actions[::101].abs().max() == 0 and 0.5 < actions.std() < 0.65  # uniform in training, with --random-data
