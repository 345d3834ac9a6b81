"""The mathematics of dreamer_v2.py against slow and obvious references."""

import math
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import module
from torch.distributions import Normal, OneHotCategoricalStraightThrough
from torch.nn import functional as F

dreamer = module("dreamer_v2")
ARGS = dreamer.Args(obs="vector", horizon=4, deter_size=5, stoch_size=3, classes=4, units=7, dense_units=6, depth=2,
                    device="cpu")  # fmt: skip


class Env(gym.Env):
    observation_space, action_space = gym.spaces.Box(-9, 9, (4,)), gym.spaces.Box(-1, 1, (2,))


class DiscreteEnv(Env):
    action_space = gym.spaces.Discrete(3)


def agent_of(env=Env, noise=0.3, **changes):
    torch.manual_seed(0)
    args = replace(ARGS, **changes)
    agent = dreamer.Agent(env(), args)
    for p in (*agent.parameters(), *agent.slow_value.parameters()):
        p.data += noise * torch.randn_like(p)
    agent.world.set_normaliser(torch.randn(50, 4) * 3 + 1)
    return agent, args


def batch(agent, rows=(3, 6)):
    mask, action = torch.ones(rows), torch.rand(*rows, agent.actions) * 2 - 1
    mask[0, 4:] = 0
    return dreamer.Sequences(torch.randn(*rows, 4), action, torch.randn(rows), (torch.rand(rows) < 0.2).float(), mask)


@pytest.fixture
def record(monkeypatch):
    """All samples of z and of Discrete actions, and the parameters of their distributions."""
    samples, sample, normal = [], OneHotCategoricalStraightThrough.rsample, Normal.rsample
    keep = lambda one: lambda self, *x: samples.append(one(self, *x)) or samples[-1]  # noqa: E731
    monkeypatch.setattr(OneHotCategoricalStraightThrough, "rsample", keep(sample))
    monkeypatch.setattr(Normal, "rsample", keep(normal))
    return samples


def slow_step(rssm, h, z, a, embedded=None):
    """One state: the GRU with layer norm written out, then the parameters of the posterior or the prior."""
    x = rssm.gates(torch.cat([F.elu(rssm.gru_in(torch.cat([z, a]))), h]))
    x = (x - x.mean()) / (x.var(correction=0) + 1e-3).sqrt() * rssm.gates_norm.weight + rssm.gates_norm.bias
    reset, new, update = x.sigmoid()[:5], x[5:10], (x[10:] - 1).sigmoid()
    h = update * torch.tanh(reset * new) + (1 - update) * h
    return h, rssm.prior_net(h) if embedded is None else rssm.posterior_net(torch.cat([h, embedded]))


def slow_kl(q, p, latent):
    if latent == "gaussian":
        (m, s), (n, t) = ((x[:3], torch.log1p(x[3:].exp()) + 0.1) for x in (q, p))
        return ((t / s).log() + (s**2 + (m - n) ** 2) / (2 * t**2) - 0.5).sum()
    q, p = q.view(3, 4).softmax(1), p.view(3, 4).softmax(1)
    return sum(q[g, c] * (q[g, c] / p[g, c]).log() for g in range(3) for c in range(4))


@pytest.mark.parametrize(("latent", "ends", "balance"), [("categorical", True, 0.8), ("gaussian", False, 0.3)])
@torch.no_grad()
def test_the_world_models_loss_row_by_row(latent, ends, balance, record):
    agent, args = agent_of(latent=latent, ends=ends, kl_balance=balance, kl_scale=0.7, decoder_std=0.5, gamma=0.9)
    world, data = agent.world, batch(agent)
    loss, states, metrics = dreamer.world_model_loss(world, data, args)
    losses = {name: [] for name in ("losses/observation", "losses/reward", "losses/discount", "model/kl")}
    for b in range(3):
        h, z = torch.zeros(5), torch.zeros(12 if latent == "categorical" else 3)
        for t in range(6):
            x = (data.obs[b, t] - world.mean) / world.std
            h, q = slow_step(world.rssm, h, z, data.action[b, t], world.encoder(x[None])[0])
            z = record[t][b].flatten()
            assert torch.allclose(states.h[b, t], h, atol=1e-5) and torch.equal(states.z[b, t], z)
            assert torch.allclose(states.parameters[b, t].flatten(), q, atol=1e-5)
            if data.mask[b, t]:
                s = torch.cat([z, h])[None]
                losses["losses/observation"].append((((x - world.decoder(s)[0]) / 0.5) ** 2).sum() / 2)
                losses["losses/reward"].append((data.reward[b, t] - world.reward_head(s)[0, 0]) ** 2 / 2)
                losses["model/kl"].append(slow_kl(q, world.rssm.prior_net(h), latent))
                if ends:
                    p, target = world.discount_head(s)[0, 0].sigmoid(), 0.9 * (1 - data.terminated[b, t])
                    losses["losses/discount"].append(-target * p.log() - (1 - target) * (1 - p).log())
    means = {name: torch.stack(values).mean().item() for name, values in losses.items() if values}
    assert {name: metrics[name].item() for name in means} == pytest.approx(means, rel=1e-4)
    expected = means["losses/observation"] + means["losses/reward"] + 0.7 * means["model/kl"]
    assert loss.item() == pytest.approx(expected + 5 * means.get("losses/discount", 0), rel=1e-4)


def test_the_balance_divides_the_gradient_of_the_kl_and_free_nats_take_it():
    agent, args = agent_of()
    posterior, prior = torch.randn(2, 5, 6, 3, 4).requires_grad_().unbind(0)
    mask = torch.ones(5, 6)
    kl = dreamer.kl_divergence(*(agent.world.rssm.distribution(x) for x in (posterior, prior)))

    def gradients(**changes):
        value = dreamer.balanced_kl(agent.world.rssm, posterior, prior, mask, replace(args, **changes))
        return value.item(), torch.autograd.grad(value, [posterior, prior], retain_graph=True)

    whole = torch.autograd.grad(kl.mean(), [posterior, prior], retain_graph=True)
    free = {"free_nats": kl.mean().item() + 0.01}
    for changes, shares in (({"kl_balance": 0.8}, (0.2, 0.8)), ({"kl_balance": 0.5}, (1, 1)), (free, (0, 0))):
        value, found = gradients(**changes)
        assert value == pytest.approx(max(kl.mean().item(), changes.get("free_nats", 0)), rel=1e-5)
        assert all(torch.allclose(g, share * h, atol=1e-6) for g, share, h in zip(found, shares, whole, strict=True))
    each, median = gradients(kl_balance=0.5, free_nats=kl.median().item())[0], kl.median().item()
    assert each == pytest.approx(np.mean([max(x, median) for x in kl.flatten().tolist()]), rel=1e-5)


def test_fresh_networks_follow_the_official_code():
    agent, _ = agent_of(noise=0, units=200, deter_size=200, dense_units=400, latent="gaussian")
    for layer in (agent.world.rssm.gates, agent.world.rssm.prior_net[0], agent.actor.net[0], agent.value[2]):
        edge = math.sqrt(6 / sum(layer.weight.shape))
        assert 0.98 * edge < layer.weight.abs().max() <= edge and (layer.bias == 0).all()
    assert all(torch.equal(p, q) for p, q in zip(agent.value.parameters(), agent.slow_value.parameters(), strict=True))
    encoder, decoder = dreamer.image_encoder(1, 64, 48), dreamer.image_decoder(7, 1, 64, 48)
    assert encoder(torch.zeros(2, 1, 64, 64)).shape == (2, 1536) and decoder(torch.zeros(2, 7)).shape == (2, 1, 64, 64)
    assert [type(layer).__name__ for layer in encoder] == ["Conv2d", "ELU"] * 4 + ["Flatten"]
    assert [layer.kernel_size[0] for layer in decoder[1::2]] == [5, 5, 6, 6]


def test_the_truncated_gaussian_is_one():
    """Against numerical integration, the rejection of samples, and finite differences of the sample."""
    grid = torch.linspace(-1, 1, 200_001).double()
    for mean, std in ((0.0, 1.1), (0.9, 0.1), (-0.99, 0.6)):
        policy = dreamer.TruncatedNormal(*(torch.tensor([x]).double() for x in (mean, std)))
        density = (-0.5 * ((grid - mean) / std) ** 2).softmax(0) * 1e5
        assert torch.allclose(policy.log_prob(grid[:, None]).exp(), density, rtol=1e-3)
        assert policy.entropy().item() == pytest.approx(-(density * density.log()).mean().item() * 2, abs=2e-3)
        torch.manual_seed(0)
        many = dreamer.TruncatedNormal(*(torch.full((200_000, 1), x).double() for x in (mean, std))).rsample()[:, 0]
        kept = mean + std * torch.randn(1_000_000)
        quantiles = torch.tensor([0.01, 0.25, 0.5, 0.75, 0.99]).double()
        assert torch.allclose(many.quantile(quantiles), kept[kept.abs() <= 1].double().quantile(quantiles), atol=0.015)
        assert many.abs().max() <= 1 and policy.mode is policy.mean

        def sample(m, s):
            torch.manual_seed(3)
            return dreamer.TruncatedNormal(m, s).rsample()

        inputs = [torch.tensor([x]).double().requires_grad_() for x in (mean, std)]
        assert torch.autograd.gradcheck(sample, inputs, eps=1e-6, atol=1e-4)
    at_the_bounds = dreamer.TruncatedNormal(torch.tensor([-1.0, 1.0]).double(), torch.tensor(1e-9).double()).rsample()
    assert at_the_bounds.tolist() == pytest.approx([-1 + 1e-6, 1 - 1e-6], abs=1e-8)


def test_the_policy_is_a_truncated_gaussian_or_a_categorical():
    agent, _ = agent_of()
    features = torch.randn(9, 17)
    out, policy = agent.actor.net(features), agent.actor(features)
    assert torch.allclose(policy.mean, torch.tanh(out[:, :2])) and policy.rsample().shape == (9, 2)
    assert torch.allclose(policy.std, 2 / (1 + (-out[:, 2:] / 2).exp()) + 0.1)
    agent, _ = agent_of(DiscreteEnv)
    logits, policy = agent.actor.net(features), agent.actor(features)
    assert torch.allclose(policy.probs, logits.softmax(1))
    assert torch.equal(policy.mode, F.one_hot(logits.argmax(1), 3).float())
    agent.act(np.zeros(4, np.float32))
    agent.reset()
    assert not agent.action.any() and not agent.h.any() and not agent.z.any()  # as before an episode


@pytest.mark.parametrize(("env", "share"), [(DiscreteEnv, 1.0), (DiscreteEnv, 0.6), (Env, 0.0), (Env, 0.9)])
def test_behaviour_is_learned_from_imagined_states(env, share, record, monkeypatch):
    agent, args = agent_of(env, reinforce_share=share, entropy_scale=0.2, gamma=0.9)
    world, data, actions = agent.world, batch(agent, (2, 5)), []
    rsample = dreamer.TruncatedNormal.rsample
    monkeypatch.setattr(dreamer.TruncatedNormal, "rsample", lambda self: actions.append(rsample(self)) or actions[-1])
    states = dreamer.State(torch.randn(2, 5, 5), torch.randn(2, 5, 12), None)
    torch.manual_seed(1)
    losses = dreamer.behaviour_losses(agent, states, data, args)
    actions, latents = actions or record[0::2], [x for x in record if x.ndim == 3]
    actor_loss, value_loss, (h, z) = 0.0, 0.0, (x.flatten(0, 1) for x in (states.h, states.z))
    features, seen = [torch.cat([z, h], 1)], []
    for k in range(4):  # again with the same samples, which carry their gradient
        a = actions[k]
        if env is DiscreteEnv:
            probs = agent.actor(features[-1].detach()).probs
            a = a.detach() + probs - probs.detach()
        h, out = zip(*(slow_step(world.rssm, *row) for row in zip(h, z, a, strict=True)), strict=True)
        h, probs = torch.stack(h), torch.stack(out).view(10, 3, 4).softmax(-1)
        z = (latents[k].detach() + probs - probs.detach()).flatten(1)
        features.append(torch.cat([z, h], 1))
        seen.append(a)
    features = torch.stack(features, 1)
    r, slow, g = (net(features)[..., 0] for net in (world.reward_head, agent.slow_value, world.discount_head))
    g = torch.cat([0.9 * (1 - data.terminated.view(10, 1)), g[:, 1:].sigmoid()], 1)
    for i in range(10):
        mask, weight = data.mask.flatten()[i], 1.0
        returns = dreamer.lambda_return(r[i][None], slow[i][None], g[i][None], 0.95)[0]
        for t in range(4):
            value_loss += mask * weight * 0.5 * (agent.value(features[i, t].detach())[0] - returns[t].detach()) ** 2
            if t < 3:
                policy = agent.actor(features[i, t].detach())
                gain = share * policy.log_prob(seen[t][i].detach()) * (returns[t + 1] - slow[i, t]).detach()
                actor_loss -= mask * weight * (gain + (1 - share) * returns[t + 1] + 0.2 * policy.entropy())
            weight *= g[i, t].item()
    wanted = actor_loss / (3 * data.mask.sum()), value_loss / (4 * data.mask.sum())
    for found, expected, net in zip(losses, wanted, (agent.actor, agent.value), strict=False):
        assert found.item() == pytest.approx(expected.item(), rel=1e-4)
        gradients = [torch.autograd.grad(x, [*net.parameters()], retain_graph=True) for x in (found, expected)]
        assert all(torch.allclose(g, h, atol=1e-5) and h.any() for g, h in zip(*gradients, strict=True))


def test_a_run_updates_as_it_should(tmp_path, monkeypatch):
    """The world model steps before imagination; weights decay by a fixed share; the slow value is copied in time."""
    order, slow, rows, step, losses = [], [], [], torch.optim.AdamW.step, dreamer.behaviour_losses
    sample = dreamer.SequenceReplay.sample
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: order.append(self.defaults) or step(self))

    def watched(agent, *rest):
        order.append("imagine")
        slow.append(all(map(torch.equal, agent.slow_value.parameters(), agent.value.parameters())))
        return losses(agent, *rest)

    monkeypatch.setattr(dreamer, "behaviour_losses", watched)
    monkeypatch.setattr(dreamer.SequenceReplay, "sample", lambda self, *x: rows.append(self.size) or sample(self, *x))
    flags = "--total-timesteps 60 --random-steps 20 --pretrain 7 --train-every 10 --slow-every 5 "
    flags += "--episodes 1 --weight-decay 1e-4 --horizon 3 --device cpu"
    dreamer.main([*flags.split(), "--run-dir", str(tmp_path / "run")])
    rates = [x if x == "imagine" else (x["lr"], pytest.approx(1e-4 / x["weight_decay"]), x["eps"]) for x in order[:4]]
    assert rates == [(3e-3, 3e-3, 1e-5), "imagine", (3e-4, 3e-4, 1e-5), (1e-3, 1e-3, 1e-5)]
    # Copies come after updates 1, 6, 11, ...: the value is the slow value before the first and after these.
    assert slow == [n == 0 or n % 5 == 1 for n in range(len(slow))] and rows == [25] * 7 + [35, 46, 58]
    assert (tmp_path / "run" / "replay.dat").stat().st_size == 2 * (60 + 1) * 3 * 32 * 32  # steps and resets
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["replay"]["rows"]
    assert {*state["reward"].tolist()} == {-1, 0, 1} and (state["terminated"] == state["reward"].abs()).all()


def test_catch_and_atari():
    env, jumps = dreamer.Catch(), []
    for seed in range(200):
        env.reset(seed=seed)
        before, over = env.ball, False
        while not over:
            obs, reward, over, *_ = env.step(int(np.sign(env.ball - env.paddle)) + 1)
            assert obs[env.row * 4, env.ball * 4, 0] == 255 or env.ball == env.paddle
        jumps.append(env.ball - before)
        assert env.row == 7 and reward == (1 if env.ball == env.paddle else -1)
    assert {*jumps} == {-2, 2} and abs(np.mean(jumps)) < 0.5
    for changes in ({"obs": "vector", "action_repeat": 4}, {}):
        with pytest.raises(dreamer.UserError, match="freeway"):
            dreamer.make_env(dreamer.Args("ALE/Freeway-v5", **changes))
    args = dreamer.Args("ALE/Freeway-v5", image_size=64, action_repeat=4, tanh_rewards=True)
    games = [dreamer.make_env(args) for _ in range(2)]
    (one, _), (two, _) = (game.reset(seed=5) for game in games)
    assert one.shape == (1, 64, 64) and np.array_equal(one, two) and games[0].action_space.n == 3 and one.std() > 5
    ale, start = games[0].unwrapped.ale, games[0].unwrapped.ale.getEpisodeFrameNumber()
    games[0].step(1)
    assert ale.getEpisodeFrameNumber() == start + 4 and ale.getFloat("repeat_action_probability") == 0.25
    starts = [games[0].reset(seed=seed) and ale.getEpisodeFrameNumber() for seed in range(20)]
    assert 1 <= min(starts) < max(starts) <= 30 and len({*starts}) > 8
