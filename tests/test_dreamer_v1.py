"""The mathematics of dreamer_v1.py against slow and obvious references."""

import math
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import module, scalars
from torch.distributions import Bernoulli, Normal
from torch.nn import functional as F

dreamer = module("dreamer_v1")
ARGS = dreamer.Args(obs="vector", horizon=4, deter_size=5, stoch_size=3, units=7, dense_units=6, depth=2, device="cpu")


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
    if args.obs == "vector":
        agent.world.set_normaliser(torch.randn(50, 4) * 3 + 1)
    return agent, args


def batch(args, rows=(3, 6)):
    pixels = torch.randint(0, 256, (*rows, 3, 32, 32), dtype=torch.uint8)
    obs = pixels if args.obs == "pixels" else torch.randn(*rows, 4)
    mask = torch.ones(rows)
    mask[0, rows[1] - 2 :] = 0
    terminated = (torch.rand(rows) < 0.2).float()
    return dreamer.Sequences(obs, torch.rand(*rows, 2) * 2 - 1, torch.randn(rows), terminated, mask)


def fixed_noise(monkeypatch, noise):
    """torch.randn_like returns these tensors, one after the other."""
    noise = iter(noise)
    monkeypatch.setattr(torch, "randn_like", lambda x: next(noise))


def slow_step(rssm, h, z, a, embedded=None):
    """One state: a GRU cell written out, then mean and std of the posterior or the prior."""
    x, cell = F.elu(rssm.gru_in(torch.cat([z, a]))), rssm.gru
    reset, update, new = (cell.weight_ih @ x + cell.bias_ih).chunk(3)
    more_reset, more_update, old = (cell.weight_hh @ h + cell.bias_hh).chunk(3)
    new = torch.tanh(new + torch.sigmoid(reset + more_reset) * old)
    h = h + (1 - torch.sigmoid(update + more_update)) * (new - h)
    out = rssm.prior_net(h) if embedded is None else rssm.posterior_net(torch.cat([h, embedded]))
    return h, out[:3], torch.log1p(out[3:].exp()) + 0.1


@pytest.mark.parametrize(("obs", "ends"), [("vector", True), ("vector", False), ("pixels", True)])
@torch.no_grad()
def test_the_world_models_loss_row_by_row(obs, ends, monkeypatch):
    agent, args = agent_of(obs=obs, ends=ends, kl_scale=0.7, ends_scale=3.0, decoder_std=0.5, free_nats=0.1)
    world, data, noise = agent.world, batch(args), torch.randn(6, 3, 3)
    fixed_noise(monkeypatch, noise)
    loss, states, metrics = dreamer.world_model_loss(world, data, args)
    losses = {name: [] for name in ("losses/observation", "losses/reward", "losses/discount", "model/kl")}
    for b in range(3):
        h, z = torch.zeros(5), torch.zeros(3)
        for t in range(6):
            x = data.obs[b, t] / 255 - 0.5 if obs == "pixels" else (data.obs[b, t] - world.mean) / world.std
            h, mean, std = slow_step(world.rssm, h, z, data.action[b, t], world.encoder(x[None])[0])
            _, prior_mean, prior_std = h, *world.rssm.gaussian(world.rssm.prior_net(h))
            z = mean + std * noise[t, b]
            assert torch.allclose(states.h[b, t], h, atol=1e-5) and torch.allclose(states.z[b, t], z, atol=1e-5)
            if data.mask[b, t]:
                s, constant = torch.cat([z, h])[None], math.log(2 * math.pi) / 2
                nll = -Normal(world.decoder(s)[0], 0.5).log_prob(x) - constant - math.log(0.5)
                losses["losses/observation"].append(nll.sum())
                nll = -Normal(world.reward_head(s)[0, 0], 1).log_prob(0.1 * data.reward[b, t]) - constant
                losses["losses/reward"].append(nll)
                if ends:
                    p = Bernoulli(logits=world.discount_head(s)[0, 0]).probs
                    target = 0.99 * (1 - data.terminated[b, t])
                    losses["losses/discount"].append(-target * p.log() - (1 - target) * (1 - p).log())
                ratio, shift = std / prior_std, (mean - prior_mean) / prior_std
                losses["model/kl"].append((0.5 * (ratio**2 + shift**2 - 1) - ratio.log()).sum())
    means = {name: torch.stack(values).mean().item() for name, values in losses.items() if values}
    assert {name: metrics[name].item() for name in means} == pytest.approx(means, rel=1e-4)
    expected = means["losses/observation"] + means["losses/reward"] + 0.7 * means["model/kl"]
    assert loss.item() == pytest.approx(expected + 3 * means.get("losses/discount", 0), rel=1e-4)


def test_free_nats_are_those_of_the_mean_and_take_its_gradient():
    agent, args = agent_of()
    data = batch(args)
    _, _, metrics = dreamer.world_model_loss(agent.world, data, args)
    for free, expected in ((metrics["model/kl"].item() * 0.99, True), (metrics["model/kl"].item() * 1.2, False)):
        torch.manual_seed(1)
        agent.zero_grad()
        dreamer.world_model_loss(agent.world, data, replace(args, free_nats=free))[0].backward()
        assert bool(agent.world.rssm.prior_net[0].weight.grad.any()) == expected


@pytest.mark.parametrize(("size", "depth", "embedding"), [(32, 2, 32), (64, 32, 1024)])
def test_images_are_encoded_and_decoded_as_in_the_official_code(size, depth, embedding):
    torch.manual_seed(0)
    encoder, decoder = dreamer.image_encoder(size, depth), dreamer.image_decoder(7, size, depth)
    assert encoder(torch.zeros(2, 3, size, size)).shape == (2, embedding)
    x = f = torch.randn(2, 7)
    for layer in decoder:
        x = layer(x) if not isinstance(layer, dreamer.FromOnePixel) else x
        if isinstance(layer, dreamer.FromOnePixel):
            x = F.conv_transpose2d(x[..., None, None], layer.weight, layer.bias, stride=2)
    assert x.shape == (2, 3, size, size) and torch.allclose(decoder(f), x, atol=1e-5)
    convolutions = [m for m in (*encoder, *decoder) if isinstance(m, torch.nn.Conv2d | torch.nn.ConvTranspose2d)]
    kernels = [m.kernel_size[0] for m in convolutions]
    assert kernels == {32: [4, 4, 4, 5, 6, 6], 64: [4, 4, 4, 4, 5, 5, 6, 6]}[size]
    assert all(m.stride == (2, 2) for m in convolutions if type(m) is not dreamer.FromOnePixel)
    assert type(decoder[-1]) is torch.nn.ConvTranspose2d
    widths = [layer.in_channels // depth for layer in decoder if isinstance(layer, torch.nn.ConvTranspose2d)]
    assert widths == {32: [16, 2, 1], 64: [32, 4, 2, 1]}[size]


def test_fresh_weights_are_those_of_keras():
    agent, _ = agent_of(noise=0, units=200, deter_size=200, dense_units=400)
    for layer in (agent.world.rssm.prior_net[0], agent.actor.net[0], agent.value[2]):
        edge = math.sqrt(6 / sum(layer.weight.shape))
        assert 0.98 * edge < layer.weight.abs().max() <= edge and (layer.bias == 0).all()
    cell = agent.world.rssm.gru
    assert torch.allclose(cell.weight_hh.T @ cell.weight_hh, torch.eye(200), atol=1e-4)
    assert (cell.bias_ih == 0).all() and (cell.bias_hh == 0).all()
    assert agent.actor.gaussian(torch.zeros(203))[1].tolist() == pytest.approx([5.0, 5.0], abs=1e-2)


@torch.no_grad()
def test_the_policy_is_a_squashed_gaussian_and_its_mode_the_tanh_of_the_mean(monkeypatch):
    agent, _ = agent_of()
    features, noise = torch.randn(9, 8) * 20, torch.randn(9, 2)
    fixed_noise(monkeypatch, [noise])
    for f, e, a, mode in zip(features, noise, agent.actor(features), agent.actor.mode(features), strict=True):
        mean, raw = agent.actor.net(f).chunk(2)
        mean, std = 5 * torch.tanh(mean / 5), torch.log1p((raw + math.log(math.exp(5) - 1)).exp()) + 1e-4
        assert torch.allclose(a, torch.tanh(mean + std * e), atol=1e-5) and torch.allclose(mode, torch.tanh(mean))


def test_discrete_actions_are_straight_through_samples():
    agent, _ = agent_of(DiscreteEnv)
    features, weight = torch.randn(8).expand(4_000, 8), torch.randn(3)
    actions, probs = agent.actor(features), agent.actor.net(features[0]).softmax(-1)
    assert torch.allclose(actions.sum(1), torch.ones(4_000)) and ((actions - 0.5).abs() > 0.49).all()
    assert actions.mean(0).tolist() == pytest.approx(probs.tolist(), abs=0.03)
    parameters = [*agent.actor.parameters()]
    gradients = [torch.autograd.grad(x @ weight, parameters, retain_graph=True) for x in (actions[0], probs)]
    assert all(torch.allclose(g, h, atol=1e-5) for g, h in zip(*gradients, strict=True))
    assert agent.actor.mode(features[:1]).tolist() == F.one_hot(probs.argmax(), 3)[None].tolist()


def test_behaviour_is_learned_from_imagined_states_weighted_by_discounts(monkeypatch):
    agent, args = agent_of(ends=True)
    world, data = agent.world, batch(args, (2, 2))._replace(mask=torch.tensor([[1.0, 0], [1, 1]]))
    data, alive = data._replace(terminated=torch.tensor([[0.0, 0], [0, 1]])), torch.tensor([[1.0, 0], [1, 0]])
    states = dreamer.State(torch.randn(2, 2, 5), torch.randn(2, 2, 3), None, None)
    noise = [torch.randn(4, size) for _ in range(4) for size in (2, 3)]
    fixed_noise(monkeypatch, noise)
    losses = dreamer.behaviour_losses(agent, states, data, args)
    actor_loss = value_loss = 0.0
    for i, (b, t) in enumerate(np.ndindex(2, 2)):
        h, z, features = states.h[b, t], states.z[b, t], []
        for k in range(4):
            mean, std = agent.actor.gaussian(torch.cat([z, h]).detach())
            h, mean, std = slow_step(world.rssm, h, z, torch.tanh(mean + std * noise[2 * k][i]))
            z = mean + std * noise[2 * k + 1][i]
            features.append(torch.cat([z, h]))
        r, v = (torch.stack([net(f)[0] for f in features]) for net in (world.reward_head, agent.value))
        g, weight = torch.stack([torch.sigmoid(world.discount_head(f)[0]) for f in features]), 1.0
        returns = dreamer.lambda_return(r[None], v[None], g[None], 0.95)[0]
        for k in range(3):
            actor_loss -= alive[b, t] * weight * returns[k] / 6
            value_loss += alive[b, t] * weight * 0.5 * (v[k] - returns[k].detach()) ** 2 / 6
            weight *= g[k].item()
    for found, expected, net in zip(losses, (actor_loss, value_loss), (agent.actor, agent.value), strict=False):
        assert found.item() == pytest.approx(expected.item(), rel=1e-4)
        gradients = [torch.autograd.grad(x, [*net.parameters()], retain_graph=True) for x in (found, expected)]
        assert all(torch.allclose(g, h, atol=1e-5) and h.any() for g, h in zip(*gradients, strict=True))


def test_acting_infers_the_states_that_training_infers(monkeypatch):
    for env in (Env, DiscreteEnv):
        agent, _ = agent_of(env)
        obs, actions, states = torch.randn(8, 4), [torch.zeros(agent.actions)], []
        for x in obs:
            torch.manual_seed(len(states))
            actions.append(agent.act(x.numpy(), mode=True))
            states.append(torch.cat([agent.z, agent.h], 1))
            assert torch.equal(actions[-1], agent.actor.mode(states[-1])[0])
        noise = [torch.manual_seed(t) and torch.randn(1, 3) for t in range(8)]
        with monkeypatch.context() as patch:
            fixed_noise(patch, noise)
            embedded, rssm = agent.world.encode(agent.world.normalise(obs[None])), agent.world.rssm
            found = rssm.unroll(*rssm.start(1), torch.stack(actions[:-1])[None], embedded)
        assert torch.allclose(found.features()[0], torch.cat(states), atol=1e-5)
        agent.reset()
        assert not agent.h.any() and not agent.z.any() and not agent.action.any()


@torch.no_grad()
def test_exploration_is_noise_or_a_share_of_random_actions():
    agent, _ = agent_of(noise=0)
    agent.actor.forward = lambda features: torch.tensor([[0.5, -0.5]])
    actions = torch.stack([agent.act(np.zeros(4, np.float32), 0.3) for _ in range(2_000)])
    actions[:, 1] *= -1
    assert (actions.amax(0) == 1).all() and actions.median().item() == pytest.approx(0.5, abs=0.03)
    assert (actions < 0.2).float().mean().item() == pytest.approx(0.159, abs=0.03)  # one std below
    agent, _ = agent_of(DiscreteEnv)
    agent.actor.forward = lambda features: torch.tensor([[1.0, 0, 0]])
    actions = torch.stack([agent.act(np.zeros(4, np.float32), 0.3) for _ in range(2_000)])
    assert actions.mean(0).tolist() == pytest.approx([0.8, 0.1, 0.1], abs=0.03)


class Counter(gym.Env):
    """Five steps, the last of which is terminal; the observation counts them."""

    observation_space, action_space = gym.spaces.Box(-9, 9, (1,)), gym.spaces.Box(-2, 4, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.full(1, self.t, np.float32), float(action[0]), self.t == 5, False, {}


gym.register("FiveSteps-v0", Counter, max_episode_steps=50)


def test_a_run_stores_trains_and_updates_as_it_should(tmp_path, monkeypatch):
    calls, sample = [], dreamer.SequenceReplay.sample
    monkeypatch.setattr(dreamer, "draw_open_loop", lambda *_: dreamer.Figure())
    monkeypatch.setattr(dreamer.SequenceReplay, "sample", lambda *x: calls.append(len(x[0].starts)) or sample(*x))
    flags = "--env-id FiveSteps-v0 --obs vector --action-repeat 1 --total-timesteps 40 --random-steps 12 "
    flags += "--train-every 4 --updates 2 --pretrain 3 --batch-size 4 --batch-length 6 --horizon 3 --episodes 1"
    dreamer.main([*flags.split(), "--run-dir", str(tmp_path / "run")])
    # Training begins with the fourth episode, at step 15; the next rounds come at steps 16, 20, 24, ...
    assert calls == [4] * 3 + [n for n in (4, 5, 5, 6, 7, 8) for _ in range(2)]
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["agent"]["updates"] == len(calls)
    rows = state["replay"]["rows"]
    assert rows["obs"][:12, 0].tolist() == [0, 1, 2, 3, 4, 5] * 2
    assert rows["terminated"][:12].tolist() == [0, 0, 0, 0, 0, 1] * 2
    assert torch.allclose(rows["reward"][1:6], 1 + 3 * rows["action"][1:6, 0], atol=1e-5)  # (−1, 1) → (−2, 4)
    assert state["agent"]["world.mean"].item() == pytest.approx(rows["obs"][:19].mean().item(), abs=0.1)
    assert scalars(tmp_path / "run")["charts/episodic_length"][5] == 5
