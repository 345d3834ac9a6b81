"""The Dreamers against rlax (λ-returns), scipy (the truncated Gaussian) and torch.distributions (the heads' losses)."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import module
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence

V1, V2, V3 = (module(f"dreamer_v{n}") for n in (1, 2, 3))


class Env(gym.Env):
    observation_space, action_space = gym.spaces.Box(-9, 9, (4,)), gym.spaces.Box(-1, 1, (2,))


@pytest.mark.parametrize("dreamer", [V1, V2, V3], ids=["v1", "v2", "v3"])
@pytest.mark.parametrize("lambda_", [0.0, 0.4, 0.95, 1.0])
def test_lambda_returns(dreamer, lambda_):
    rlax = pytest.importorskip("rlax")
    rng = np.random.default_rng(0)
    reward, value, discount = rng.normal(size=(3, 6, 9)).astype(np.float32)
    discount = 1 / (1 + np.exp(-discount))
    ours = dreamer.lambda_return(*map(torch.from_numpy, (reward, value, discount)), lambda_)
    arriving = 1 if dreamer is V3 else 0  # V3's values do not include the reward of their state
    theirs = [
        rlax.lambda_returns(r[arriving : 8 + arriving], g[arriving : 8 + arriving], v[1:], lambda_)
        for r, v, g in zip(reward, value, discount, strict=True)
    ]
    assert ours.numpy() == pytest.approx(np.stack(theirs), abs=1e-5)


def test_the_truncated_gaussian():
    stats = pytest.importorskip("scipy.stats")
    torch.manual_seed(0)
    mean, std = 2 * torch.rand(500, 1).double() - 1, 0.1 + 2 * torch.rand(500, 1).double()
    x = 2 * torch.rand(500, 1).double() - 1
    policy = V2.TruncatedNormal(mean, std)
    theirs = stats.truncnorm((-1 - mean) / std, (1 - mean) / std, mean, std)
    assert policy.log_prob(x).numpy() == pytest.approx(theirs.logpdf(x)[:, 0], abs=1e-9)
    assert policy.entropy().numpy() == pytest.approx(theirs.entropy()[:, 0], abs=1e-9)
    samples = V2.TruncatedNormal(mean[:5].expand(5, 40_000), std[:5].expand(5, 40_000)).rsample()
    for row, m, s in zip(samples, mean[:5, 0], std[:5, 0], strict=True):
        assert stats.kstest(row, stats.truncnorm((-1 - m) / s, (1 - m) / s, m, s).cdf).pvalue > 1e-3


@pytest.mark.parametrize("dreamer", [V1, V2], ids=["v1", "v2"])
@torch.no_grad()
def test_the_world_models_loss_is_a_negative_log_likelihood_and_a_kl(dreamer):
    """Up to the constants of Gaussians, which the files leave out."""
    torch.manual_seed(0)
    args = dreamer.Args(
        obs="vector", deter_size=5, stoch_size=3, units=7, dense_units=6, decoder_std=0.7, reward_scale=1.0,
        free_nats=0.0, kl_scale=0.3, ends=True, ends_scale=2.0, gamma=0.9, device="cpu",
    )  # fmt: skip
    agent = dreamer.Agent(Env(), args)
    world, rows = agent.world, (8, 5)
    data = dreamer.Sequences(torch.randn(*rows, 4), torch.rand(*rows, 2), torch.randn(rows),
                             (torch.rand(rows) < 0.3).float(), torch.ones(rows))  # fmt: skip
    loss, states, _ = dreamer.world_model_loss(world, data, args)
    features, constant = states.features(), 0.5 * math.log(2 * math.pi)
    observation = Independent(Normal(world.decode(features), 0.7), 1).log_prob(data.obs) + 4 * (
        constant + math.log(0.7)
    )
    reward = Normal(world.reward(features), 1.0).log_prob(data.reward) + constant
    end = Bernoulli(probs=world.discount(features), validate_args=False).log_prob(0.9 * (1 - data.terminated))
    if dreamer is V1:
        posterior, prior = (Independent(Normal(*x), 1) for x in ((states.mean, states.std), world.rssm.prior(states.h)))
    else:
        posterior, prior = map(world.rssm.distribution, (states.parameters, world.rssm.prior(states.h)))
    expected = (0.3 * kl_divergence(posterior, prior) - observation - reward - 2 * end).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
