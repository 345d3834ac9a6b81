# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "numpy>=2.0,<3", "gymnasium>=1.3,<2", "ale-py>=0.11.1,<1", "tyro>=1.0.16,<2",
#     "tensorboard>=2.18,<3", "tqdm>=4.66,<5", "pillow>=11,<14", "matplotlib>=3.9,<4", "pygame-ce>=2.5,<3",
# ]
# ///
"""DreamerV2: a world model with discrete latent variables, and a policy that learns inside it.

DreamerV2 changes Dreamer (dreamer_v1.py, in the same order) so that it can play games. The stochastic part of the state
is a vector of categorical variables instead of a Gaussian, so it can represent branching futures. The KL divergence is
balanced: the prior is trained faster towards the posterior than the posterior towards the prior. A policy over discrete
actions learns by REINFORCE on imagined steps, with a baseline and an entropy bonus.

Paper: Hafner, Lillicrap, Norouzi, Ba, "Mastering Atari with Discrete World Models", ICLR 2021, arXiv 2010.02193.
Official code: github.com/danijar/dreamerv2.

The algorithm:
    (1) sample B sequences of L steps, infer their states, and train the world model to predict the rows (Eq. 2)
    (2) from each of these states imagine H steps with the policy, and compute λ-returns of a slow value (Eq. 4)
    (3) train the policy by REINFORCE or the gradient of these returns (Eq. 6), and the value to predict them (Eq. 5)
    (4) infer the state of the current episode from the observation, sample an action, and store the step

          a_{t−1}           a_t             Row t of an episode holds o_t, the action a_{t−1} that led to s_t, and the
    s_{t−1} ────▶ s_t ────▶ s_{t+1}         reward r_t received on arrival. In its first row a = 0 and r = 0.
                  │  │                      V(s_t) = E[r_t + γ r_{t+1} + …] includes the reward of s_t itself.
                 o_t r_t

Symbols: x_t → obs; (h_t, z_t) → State; q(z_t|h_t, x_t) → RSSM.posterior, p(ẑ_t|h_t) → RSSM.prior; p_ψ(â|ẑ) → Actor;
    v_ξ → value, its copy → slow_value; V^λ → lambda_return; β → kl_scale, α → kl_balance, ρ → reinforce_share,
    η → entropy_scale.

Usage (return: mean and 95 % interval over seeds; docs/dreamer_v2.md has the curves):
    python algos/dreamer_v2.py                                # return 1.000 [1.000, 1.000]
    python algos/dreamer_v2.py --latent gaussian              # the paper's ablation
    python algos/dreamer_v2.py freeway --device cuda          # Atari at the code's settings
    uv run --with dm_control --with "mujoco<4" algos/dreamer_v2.py walker --device cuda
    python algos/dreamer_v2.py --evaluate runs/NAME --episodes 10 --capture-video

Differences from the paper and its code: settings are the code's where it differs from the paper's table. Episodes
shorter than L are padded and masked; the code drops them. The slow value is also the baseline, as in the code.
Continuous actions have the exact gradient of a truncated Gaussian; the code's gradient ignores the bounds and is 4 to
14 times larger at first. The small preset has smaller networks and images, a smaller --decoder-std, more updates per
step, a horizon of the game's length, and a larger entropy bonus.
"""

import argparse
import copy
import io
import itertools
import math
import os
import shlex
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, Optional

import ale_py
import gymnasium as gym
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.distributions import Independent, Normal, OneHotCategoricalStraightThrough, kl_divergence
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

ALGORITHM = "dreamer_v2"


@dataclass
class Args:  # tyro turns each field into a flag and each comment into its help
    env_id: str = "Catch-v0"  # any environment with Box or Discrete actions; for Atari start from preset freeway
    obs: Literal["pixels", "vector"] = "pixels"  # the environment's images, or its rendering if it has none; or vectors
    image_size: Literal[32, 64] = 32  # images are resized to this many pixels per side
    action_repeat: int = 1  # each action is repeated this many times; all settings in steps count the repeats
    tanh_rewards: bool = False  # train on tanh(r); reported returns are not transformed
    total_timesteps: int = 10_000  # environment steps
    random_steps: int = 2_000  # initial steps with random actions, rounded up to whole episodes
    train_every: int = 2  # environment steps between updates
    pretrain: int = 500  # updates in the first round
    batch_size: int = 16  # B: sequences per update
    batch_length: int = 8  # L: rows per sequence
    balance_ends: bool = False  # sample the ends of episodes more often
    replay_size: int = 1_000_000  # rows that are kept; the oldest episodes are dropped first
    horizon: int = 8  # H: imagined steps
    gamma: float = 0.99  # γ: discount factor
    return_lambda: float = 0.95  # λ of the returns
    ends: bool = True  # learn the discount, which is 0 at terminal states; otherwise it is γ everywhere
    ends_scale: float = 5.0  # weight of the discount's loss
    kl_scale: float = 1.0  # β: weight of the KL divergence
    kl_balance: float = 0.8  # α: share of the KL that trains the prior; 0.5: no balancing, both get the full KL
    free_nats: float = 0.0  # a mean KL below this is not reduced further
    decoder_std: float = 0.3  # std of the observation's Gaussian, 1 in the paper; if smaller, observations count more
    reward_scale: float = 1.0  # rewards are multiplied by this
    latent: Literal["categorical", "gaussian"] = "categorical"  # the distribution of z
    deter_size: int = 64  # size of h
    stoch_size: int = 32  # categorical variables in z, or size of a Gaussian z
    classes: int = 8  # classes of each categorical variable
    units: int = 64  # units of the layers in the RSSM
    depth: int = 8  # channels of the first convolution; each of the next has twice as many
    dense_units: int = 64  # units per layer of the heads, value and policy, and of the encoder of vectors
    dense_layers: int = 2  # hidden layers of reward, discount, value and policy
    reinforce_share: float = 1.0  # ρ: share of REINFORCE in the policy's gradient; the rest is the returns' gradient
    entropy_scale: float = 0.3  # η: weight of the policy's entropy
    slow_every: int = 100  # updates between copies of the value to the slow value
    world_learning_rate: float = 3e-3  # Adam's step size for the world model
    actor_learning_rate: float = 3e-4  # Adam's step size for the policy
    value_learning_rate: float = 1e-3  # Adam's step size for the value
    weight_decay: float = 1e-6  # each update removes this share of every weight
    seed: int = 1  # on one CPU, two runs with the same seed are identical
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu, cuda or mps
    compile: bool = False  # torch.compile a step of the RSSM
    bf16: bool = False  # compute the losses in bfloat16
    eval_every: int = 1_000  # steps between evaluations (at the end of an episode, as pictures and checkpoints)
    picture_every: int = 1_000  # steps between pictures of open-loop predictions
    checkpoint_every: int = 5_000  # steps between checkpoints; one is also written about every minute
    episodes: int = 50  # episodes per evaluation
    capture_video: bool = False  # save the first episode of each evaluation as a GIF
    run_dir: Optional[str] = None  # output folder; runs/<env>__<algorithm>__<seed>__<time> by default
    resume: Optional[str] = None  # continue the run in this folder with its own settings
    evaluate: Optional[str] = None  # do not train: play with the agent of this run folder

    def __post_init__(self):
        """tyro reports a ValueError raised here as one sentence and exits with code 2."""
        may_be_zero = ("seed", "random_steps", "return_lambda", "ends_scale", "kl_scale", "free_nats", "kl_balance",
                       "reinforce_share", "entropy_scale", "weight_decay")  # fmt: skip
        for name, value in vars(self).items():
            if type(value) in (int, float) and not (0 < value < math.inf or (value == 0 and name in may_be_zero)):
                raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be a positive number")
        for name in ("gamma", "return_lambda", "kl_balance", "reinforce_share"):
            if getattr(self, name) > 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}: it must not exceed 1")
        if self.batch_length < 2 or self.horizon < 2:
            raise ValueError("--batch-length and --horizon must be at least 2")


CONTROL = Args(
    "ControlSuite/walker-walk", image_size=64, action_repeat=2, total_timesteps=1_000_000, random_steps=2_000,
    train_every=10, batch_length=50, pretrain=101, replay_size=2_000_000, horizon=15, ends=False, free_nats=1.0,
    decoder_std=1.0, deter_size=200, classes=32, units=200, depth=48, dense_units=400, dense_layers=4,
    reinforce_share=0.0, entropy_scale=1e-4, world_learning_rate=3e-4, actor_learning_rate=8e-5,
    value_learning_rate=8e-5, eval_every=10_000, episodes=5, picture_every=50_000, checkpoint_every=50_000,
)  # fmt: skip
ATARI = replace(
    CONTROL, env_id="ALE/Freeway-v5", action_repeat=4, tanh_rewards=True, total_timesteps=200_000_000,
    random_steps=200_000, train_every=64, pretrain=2, balance_ends=True, gamma=0.999, ends=True, kl_scale=0.1,
    free_nats=0.0, deter_size=600, units=600, reinforce_share=1.0, entropy_scale=1e-3, world_learning_rate=2e-4,
    actor_learning_rate=4e-5, value_learning_rate=1e-4, eval_every=1_000_000, picture_every=10_000_000,
    checkpoint_every=500_000,
)  # fmt: skip
PRESETS = {
    "catch": ("a game in this file, 32 × 32 pixels: catch a ball that jumps left or right; minutes", Args()),
    "freeway": ("Atari at the code's settings: for a GPU", ATARI),
    "walker": ("DeepMind control from pixels at the code's settings: for a GPU", CONTROL),
}  # fmt: skip


# ── The algorithm: the world model ────────────────────────────────────────────────────────────────────────────────


def dense(inputs: int, width: int, layers: int, outputs: int) -> nn.Sequential:
    sizes = [inputs, *[width] * layers]
    hidden = [part for m, n in itertools.pairwise(sizes) for part in (nn.Linear(m, n), nn.ELU())]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], outputs))


def image_encoder(channels: int, size: int, depth: int) -> nn.Sequential:
    """[N, C, S, S] → [N, E]: convolutions until 2 × 2 pixels are left."""
    sizes = [channels, *(depth * 2**i for i in range({32: 3, 64: 4}[size]))]
    layers = [part for m, n in itertools.pairwise(sizes) for part in (nn.Conv2d(m, n, 4, stride=2), nn.ELU())]
    return nn.Sequential(*layers, nn.Flatten())


class FromOnePixel(nn.ConvTranspose2d):
    """A transposed convolution of a single pixel, [N, M] → [N, C, k, k]: a matrix product, and faster as one."""

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.flatten(1)).unflatten(1, self.weight.shape[1:]) + self.bias[:, None, None]


def image_decoder(inputs: int, channels: int, size: int, depth: int) -> nn.Sequential:
    """[N, F] → [N, C, S, S]: transposed convolutions, the first from a single pixel."""
    kernels = {32: (5, 6, 6), 64: (5, 5, 6, 6)}[size]
    sizes = [4 * depth * 2 ** (len(kernels) - 1), *(depth * 2**i for i in reversed(range(len(kernels) - 1))), channels]
    layers = [nn.Linear(inputs, sizes[0]), FromOnePixel(sizes[0], sizes[1], kernels[0])]
    for m, n, kernel in zip(sizes[1:], sizes[2:], kernels[1:], strict=False):
        layers += [nn.ELU(), nn.ConvTranspose2d(m, n, kernel, stride=2)]
    return nn.Sequential(*layers)


def keras_init(module: nn.Module) -> None:
    """As in the official code: Glorot's uniform weights and zero biases."""
    if not isinstance(module, nn.LayerNorm):
        for name, parameter in module.named_parameters(recurse=False):
            (nn.init.zeros_ if name == "bias" else nn.init.xavier_uniform_)(parameter)


def latent_size(args: Args) -> int:
    return args.stoch_size * (args.classes if args.latent == "categorical" else 1)


class State(NamedTuple):
    """s = (h, z), [..., D] and [..., Z], and the parameters of the distribution that z was sampled from: the logits
    [..., G, C] of G variables with C classes, Z = G · C, or mean and std [..., 2, Z]."""

    h: Tensor
    z: Tensor
    parameters: Tensor

    def features(self) -> Tensor:
        return torch.cat([self.z, self.h], -1)


class RSSM(nn.Module):
    """The recurrent state-space model: h is deterministic and remembers, z is sampled."""

    def __init__(self, embedding: int, actions: int, args: Args):
        super().__init__()
        self.categorical, self.sizes = args.latent == "categorical", (args.deter_size, latent_size(args))
        self.shape = (args.stoch_size, args.classes) if self.categorical else (2, args.stoch_size)
        self.gru_in = nn.Linear(latent_size(args) + actions, args.units)
        self.gates = nn.Linear(args.units + args.deter_size, 3 * args.deter_size)
        self.gates_norm = nn.LayerNorm(3 * args.deter_size, eps=1e-3)
        self.prior_net = dense(args.deter_size, args.units, 1, math.prod(self.shape))
        self.posterior_net = dense(args.deter_size + embedding, args.units, 1, math.prod(self.shape))
        if args.compile:
            self.step = torch.compile(self.step)

    def start(self, n: int) -> tuple[Tensor, Tensor]:
        """h and z before the first observation."""
        return tuple(self.gru_in.weight.new_zeros(n, size) for size in self.sizes)

    def gru(self, x: Tensor, h: Tensor) -> Tensor:
        """A GRU with one layer norm for its three gates. The −1 biases the update gate towards keeping h."""
        reset, new, update = self.gates_norm(self.gates(torch.cat([x, h], -1)).float()).chunk(3, -1)
        update = (update - 1).sigmoid()
        return update * torch.tanh(reset.sigmoid() * new) + (1 - update) * h

    def distribution(self, parameters: Tensor) -> Independent:
        if self.categorical:
            # Algorithm 1: a one-hot sample in the forward pass, the gradient of the probabilities in the backward pass
            return Independent(OneHotCategoricalStraightThrough(logits=parameters, validate_args=False), 1)
        mean, std = parameters.unbind(-2)
        return Independent(Normal(mean, F.softplus(std) + 0.1, validate_args=False), 1)

    def prior(self, h: Tensor) -> Tensor:
        """p(ẑ_t|h_t): the parameters of the distribution of z_t"""
        return self.prior_net(h).float().unflatten(-1, self.shape)

    def posterior(self, h: Tensor, embedded: Tensor) -> Tensor:
        """q(z_t|h_t, x_t): the parameters of the distribution of z_t, given the encoded x_t"""
        return self.posterior_net(torch.cat([h, embedded], -1)).float().unflatten(-1, self.shape)

    def step(self, h: Tensor, z: Tensor, action: Tensor, embedded: Optional[Tensor] = None) -> State:
        """s_t after s_{t−1} and a_{t−1}: from the posterior if x_t has been observed, otherwise from the prior."""
        h = self.gru(F.elu(self.gru_in(torch.cat([z, action], -1))), h)
        parameters = self.prior(h) if embedded is None else self.posterior(h, embedded)
        return State(h, self.distribution(parameters).rsample().flatten(1), parameters)

    def unroll(self, h: Tensor, z: Tensor, actions: Tensor, embedded: Optional[Tensor] = None) -> State:
        """States [B, T, ...] along actions [B, T, A]; action t leads to observation t, encoded as [B, T, E]."""
        states = []
        for t in range(actions.shape[1]):
            states.append(self.step(h, z, actions[:, t], None if embedded is None else embedded[:, t]))
            h, z = states[-1].h, states[-1].z
        return State(*(torch.stack(part, 1) for part in zip(*states, strict=True)))


class WorldModel(nn.Module):
    """Encoder, RSSM, and the heads for observation, reward and discount."""

    def __init__(self, env: gym.Env, actions: int, args: Args):
        super().__init__()
        self.args, self.images, shape = args, args.obs == "pixels", env.observation_space.shape
        features = args.deter_size + latent_size(args)
        if self.images:
            self.encoder = image_encoder(shape[0], args.image_size, args.depth)
            self.decoder = image_decoder(features, shape[0], args.image_size, args.depth)
        else:
            self.encoder = nn.Sequential(dense(*shape, args.dense_units, 1, args.dense_units), nn.ELU())
            self.decoder = dense(features, args.dense_units, 2, *shape)
            self.register_buffer("mean", torch.zeros(shape))
            self.register_buffer("std", torch.ones(shape))
        self.reward_head = dense(features, args.dense_units, args.dense_layers, 1)
        self.discount_head = dense(features, args.dense_units, args.dense_layers, 1) if args.ends else None
        embedding = 4 * args.depth * args.image_size // 8 if self.images else args.dense_units
        self.rssm = RSSM(embedding, actions, args)
        self.apply(keras_init).to(memory_format=torch.channels_last)  # faster convolutions

    def normalise(self, obs: Tensor) -> Tensor:
        """What the networks see, in training and when acting."""
        return obs / 255 - 0.5 if self.images else (obs.float() - self.mean) / self.std

    def set_normaliser(self, obs: Tensor) -> None:
        std = obs.std(0, correction=0)
        self.mean.copy_(obs.mean(0))
        self.std.copy_(torch.where(std > 1e-6, std, 1.0))

    def encode(self, x: Tensor) -> Tensor:
        """[B, T, ...] → [B, T, E]"""
        return self.encoder(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def decode(self, features: Tensor) -> Tensor:
        return self.decoder(features.flatten(0, 1)).unflatten(0, features.shape[:2]).float()

    def reward(self, features: Tensor) -> Tensor:
        return self.reward_head(features)[..., 0].float()

    def discount(self, features: Tensor) -> Tensor:
        if self.discount_head is None:
            return torch.full(features.shape[:-1], self.args.gamma, device=features.device)
        return self.discount_head(features)[..., 0].float().sigmoid()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of x [B, T] over the rows whose mask is 1."""
    return (x * mask).sum() / mask.sum()


def balanced_kl(rssm: RSSM, posterior: Tensor, prior: Tensor, mask: Tensor, args: Args) -> Tensor:
    """The KL, with more gradient for the prior: a posterior that is pulled towards a bad prior ignores the images."""

    def kl(q: Tensor, p: Tensor) -> Tensor:
        return kl_divergence(rssm.distribution(q), rssm.distribution(p))

    if args.kl_balance == 0.5:  # no balancing, as in the code: its free nats are then those of each state
        return masked_mean(kl(posterior, prior).clamp(min=args.free_nats), mask)
    # Algorithm 2: α KL(sg(q) ‖ p) + (1 − α) KL(q ‖ sg(p))
    to_prior = masked_mean(kl(posterior.detach(), prior), mask).clamp(min=args.free_nats)
    to_posterior = masked_mean(kl(posterior, prior.detach()), mask).clamp(min=args.free_nats)
    return args.kl_balance * to_prior + (1 - args.kl_balance) * to_posterior


def world_model_loss(world: WorldModel, batch: "Sequences", args: Args) -> tuple[Tensor, State, dict[str, Tensor]]:
    """Step (1): the loss, the inferred states, and metrics."""
    x, mask = world.normalise(batch.obs), batch.mask
    states = world.rssm.unroll(*world.rssm.start(len(x)), batch.action, world.encode(x))
    features, prior = states.features(), world.rssm.prior(states.h)
    # Eq. 2: L = E[Σ −ln p(x_t|h_t, z_t) − ln p(r_t|h_t, z_t) − ln p(γ_t|h_t, z_t) + β KL(q(z_t|h_t, x_t) ‖ p(z_t|h_t))]
    # The sum over pixels matters: with their mean the KL would dominate. Constants of the Gaussians are left out.
    obs_loss = 0.5 * ((world.decode(features) - x) / args.decoder_std).square().flatten(2).sum(-1)
    reward_loss = 0.5 * (world.reward(features) - args.reward_scale * batch.reward).square()
    metrics = {"losses/observation": masked_mean(obs_loss, mask), "losses/reward": masked_mean(reward_loss, mask)}
    loss = metrics["losses/observation"] + metrics["losses/reward"]
    loss = loss + args.kl_scale * balanced_kl(world.rssm, states.parameters, prior, mask, args)
    if world.discount_head is not None:  # a soft target: the predicted probability is the discount itself
        target, logits = args.gamma * (1 - batch.terminated), world.discount_head(features)[..., 0].float()
        discount_loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        metrics["losses/discount"] = masked_mean(discount_loss, mask)
        loss = loss + args.ends_scale * metrics["losses/discount"]
    q, p = world.rssm.distribution(states.parameters), world.rssm.distribution(prior)
    metrics |= {"losses/world": loss, "model/kl": masked_mean(kl_divergence(q, p), mask)}
    metrics |= {"model/prior_entropy": masked_mean(p.entropy(), mask)}
    return loss, states, metrics


# ── The algorithm: policy and value, trained on imagined steps ────────────────────────────────────────────────────


class TruncatedNormal(NamedTuple):
    """A Gaussian truncated to [−1, 1] in each of the last axis's numbers."""

    mean: Tensor
    std: Tensor

    def bounds(self) -> tuple[Tensor, Tensor, Tensor]:
        """−1 and 1 in stds from the mean, and the probability between them."""
        low, high = (-1 - self.mean) / self.std, (1 - self.mean) / self.std
        return low, high, torch.special.ndtr(high) - torch.special.ndtr(low)

    def rsample(self) -> Tensor:
        """Reparameterised by the inverse of the cumulative distribution function."""
        low, _, inside = self.bounds()
        u = torch.special.ndtr(low) + torch.rand_like(self.mean) * inside
        x = self.mean + self.std * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))
        return x + (x.clamp(-1 + 1e-6, 1 - 1e-6) - x).detach()  # rounding can move x outside the bounds

    def log_prob(self, x: Tensor) -> Tensor:
        normal = -0.5 * ((x - self.mean) / self.std).square() - self.std.log() - 0.5 * math.log(2 * math.pi)
        return (normal - self.bounds()[2].log()).sum(-1)

    def entropy(self) -> Tensor:
        # ln(√(2πe) σ Z) + (a φ(a) − b φ(b)) / 2Z, where a and b are the bounds and Z is the probability between them
        low, high, inside = self.bounds()
        edges = [x * torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi) for x in (low, high)]
        whole = 0.5 * math.log(2 * math.pi * math.e) + self.std.log()
        return (whole + inside.log() + (edges[0] - edges[1]) / (2 * inside)).sum(-1)

    @property
    def mode(self) -> Tensor:
        return self.mean


class Actor(nn.Module):
    """p_ψ(a|s): a truncated Gaussian, or a categorical distribution of Discrete actions. [..., F] → [..., A]"""

    def __init__(self, features: int, actions: int, discrete: bool, args: Args):
        super().__init__()
        self.discrete = discrete
        self.net = dense(features, args.dense_units, args.dense_layers, actions if discrete else 2 * actions)

    def forward(self, features: Tensor) -> OneHotCategoricalStraightThrough | TruncatedNormal:
        out = self.net(features).float()
        if self.discrete:
            return OneHotCategoricalStraightThrough(logits=out, validate_args=False)
        mean, std = out.chunk(2, -1)
        return TruncatedNormal(torch.tanh(mean), 2 * torch.sigmoid(std / 2) + 0.1)


def imagine(world: WorldModel, actor: Actor, h: Tensor, z: Tensor, horizon: int) -> tuple[Tensor, Tensor]:
    """Step (2): the features [N, H + 1, F] of N states and the H that follow each, and the actions [N, H, A]; action t
    was chosen in state t."""
    features, actions = [torch.cat([z, h], -1)], []
    for _ in range(horizon):
        # The policy's gradient flows through its actions, not through the states that it sees.
        actions.append(actor(features[-1].detach()).rsample())
        state = world.rssm.step(h, z, actions[-1])
        features.append(state.features())
        h, z = state.h, state.z
    return torch.stack(features, 1), torch.stack(actions, 1)


def lambda_return(reward: Tensor, value: Tensor, discount: Tensor, lambda_: float) -> Tensor:
    """V^λ of all states but the last, [N, H + 1] → [N, H]."""
    returns, following = [], value[:, -1]
    for t in reversed(range(value.shape[1] - 1)):
        # Eq. 4: V^λ_t = r̂_t + γ̂_t [(1 − λ) v_ξ(ẑ_{t+1}) + λ V^λ_{t+1}]
        following = reward[:, t] + discount[:, t] * ((1 - lambda_) * value[:, t + 1] + lambda_ * following)
        returns.append(following)
    return torch.stack(returns[::-1], 1)


def discount_weights(discount: Tensor) -> Tensor:
    """The product of the discounts before each state but the last, [N, H + 1] → [N, H]: 1, γ_0, γ_0 γ_1, …"""
    return torch.cat([torch.ones_like(discount[:, :1]), discount[:, :-2]], 1).cumprod(1).detach()


def behaviour_losses(agent: "Agent", states: State, batch: "Sequences", args: Args) -> tuple[Tensor, Tensor, dict]:
    """Steps (2) and (3): the losses of policy and value, and metrics."""
    world, mask, ended = agent.world, batch.mask.flatten()[:, None], batch.terminated.flatten()[:, None]
    # With REINFORCE alone no gradient flows through the imagined steps.
    with torch.set_grad_enabled(args.reinforce_share < 1):
        h, z = (x.detach().flatten(0, 1) for x in (states.h, states.z))
        features, actions = imagine(world, agent.actor, h, z, args.horizon)
        reward, discount = world.reward(features), world.discount(features)
        if world.discount_head is not None:  # the first discount is known
            discount = torch.cat([args.gamma * (1 - ended), discount[:, 1:]], 1)
        slow = agent.slow_value(features)[..., 0].float()
        returns = lambda_return(reward, slow, discount, args.return_lambda)  # of states 0 to H − 1
    weights = discount_weights(discount)
    # Eq. 6: max_ψ E[Σ ρ ln p_ψ(a_t|z_t) sg(V^λ_{t+1} − v(z_t)) + (1 − ρ) V^λ_{t+1} + η H(a_t|z_t)], with the code's
    # indices: an action in state t is judged by the return of state t + 1, the first that it can change, and t ends at
    # H − 2. The baseline includes the reward of state t and the return does not, which adds variance but no bias.
    policy = agent.actor(features[:, :-2].detach())
    entropy = policy.entropy()
    objective = args.entropy_scale * entropy
    if args.reinforce_share > 0:
        advantage = (returns[:, 1:] - slow[:, :-2]).detach()
        objective = objective + args.reinforce_share * policy.log_prob(actions[:, :-1].detach()) * advantage
    if args.reinforce_share < 1:
        objective = objective + (1 - args.reinforce_share) * returns[:, 1:]
    actor_loss = -masked_mean(weights[:, :-1] * objective, mask.expand_as(objective))
    # Eq. 5: min_ξ E[Σ ½ (v_ξ(z_t) − sg(V^λ_t))²]
    value = agent.value(features[:, :-1].detach())[..., 0].float()
    value_loss = masked_mean(weights * 0.5 * (value - returns.detach()).square(), mask.expand_as(value))
    metrics = {"losses/actor": actor_loss, "losses/value": value_loss}
    metrics["model/policy_entropy"] = masked_mean(entropy, mask.expand_as(entropy))
    for name, x in (("reward", reward), ("return", returns), ("value", slow)):
        metrics[f"model/imagined_{name}"] = masked_mean(x, mask.expand_as(x))
    return actor_loss, value_loss, metrics


class Agent(nn.Module):
    """World model, policy, value and its slow copy, and the state of the current episode."""

    player = "greedy policy"

    def __init__(self, env: gym.Env, args: Args):
        super().__init__()
        self.args, self.discrete = args, isinstance(env.action_space, gym.spaces.Discrete)
        self.actions = int(env.action_space.n) if self.discrete else env.action_space.shape[0]
        features = args.deter_size + latent_size(args)
        self.world = WorldModel(env, self.actions, args)
        self.actor = Actor(features, self.actions, self.discrete, args).apply(keras_init)
        self.value = dense(features, args.dense_units, args.dense_layers, 1).apply(keras_init)
        self.slow_value = copy.deepcopy(self.value).requires_grad_(False)
        self.register_buffer("updates", torch.tensor(0))
        self.to(args.device)
        self.reset()

    def reset(self) -> None:
        """An episode begins."""
        (self.h, self.z), self.action = self.world.rssm.start(1), torch.zeros(1, self.actions, device=self.args.device)

    @torch.inference_mode()
    def act(self, obs: np.ndarray, mode: bool = False) -> Tensor:
        """Step (4): infer s_t, then choose a_t [A]."""
        x = self.world.normalise(torch.as_tensor(obs, device=self.args.device)[None, None])
        state = self.world.rssm.step(self.h, self.z, self.action, self.world.encode(x)[:, 0])
        policy = self.actor(state.features())
        action = policy.mode if mode else policy.rsample()
        self.h, self.z, self.action = state.h, state.z, action
        return action[0]

    def to_env(self, action: Tensor) -> int | np.ndarray:
        return int(action.argmax()) if self.discrete else action.cpu().numpy()

    def forward(self, obs: np.ndarray) -> int | np.ndarray:
        return self.to_env(self.act(obs, mode=True))


# ── What the model predicts ───────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def open_loop(world: WorldModel, batch: "Sequences", context: int = 5) -> tuple[Tensor, Tensor]:
    """Predicted observations [B, T, ...] and rewards [B, T]. The model sees `context` rows, then only the actions."""
    x = world.normalise(batch.obs[:, :context])
    seen = world.rssm.unroll(*world.rssm.start(len(x)), batch.action[:, :context], world.encode(x))
    ahead = world.rssm.unroll(seen.h[:, -1], seen.z[:, -1], batch.action[:, context:])
    features = torch.cat([seen.features(), ahead.features()], 1)
    return world.decode(features), world.reward(features) / world.args.reward_scale


@torch.no_grad()
def heldout_metrics(world: WorldModel, replay: "SequenceReplay", args: Args) -> dict[str, Tensor]:
    """The loss and ½ of the mean squared h-step errors on the latest episode, which has not been trained on."""
    metrics = {"model/heldout_loss": world_model_loss(world, replay.latest(args.batch_length, 8), args)[0]}
    batch = replay.latest(50, 8)
    if batch.obs.shape[1] > 5:
        obs, reward = open_loop(world, batch)
        obs_error = 0.5 * (obs - world.normalise(batch.obs)).square().flatten(2).mean((0, 2))
        reward_error = 0.5 * (reward - batch.reward).square().mean(0)
        for h in (1, 5, 15, 45):
            if 4 + h < len(obs_error):
                metrics[f"model/open_loop_error_{h}"] = obs_error[4 + h]
                metrics[f"model/reward_error_{h}"] = reward_error[4 + h]
    return metrics


def draw_open_loop(world: WorldModel, replay: "SequenceReplay", step: int) -> Figure:
    """The latest episode and its open-loop prediction: images or the first numbers of the observation, and rewards."""
    batch = replay.latest(50)
    context = min(5, max(batch.obs.shape[1] // 3, 1))
    obs, reward = open_loop(world, batch, context)
    truth, model = (x[0].cpu() for x in (world.normalise(batch.obs), obs))
    panels = 1 if world.images else min(truth.shape[1], 4)
    figure = Figure(figsize=(9, 4 if world.images else 1.3 * (panels + 1)), dpi=80, layout="constrained")
    figure.suptitle(f"step {step:,}: the model sees the grey steps and predicts the others from the actions")
    *axes, last = figure.subplots(panels + 1, 1, height_ratios=[*[2.5 if world.images else 1] * panels, 1])
    if world.images:
        columns = torch.linspace(0, len(truth) - 1, 12).round().long().unique()
        rows = [(x[columns] + 0.5).clamp(0, 1) for x in (truth, model, (model - truth).abs() - 0.5)]
        tiles = torch.stack([F.pad(x.expand(-1, 3, -1, -1), (1, 1, 1, 1), value=1.0) for x in rows])  # [3, 12, 3, S, S]
        axes[0].imshow(tiles.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1), aspect="auto")
        side = tiles.shape[-1]
        axes[0].set_xticks((np.arange(len(columns)) + 0.5) * side, columns.tolist())
        axes[0].set_yticks((np.arange(3) + 0.5) * side, ["truth", "model", "error"])
    curves = [] if world.images else [(axis, f"o[{i}]", truth[:, i], model[:, i]) for i, axis in enumerate(axes)]
    for axis, label, real, predicted in [*curves, (last, "reward", batch.reward[0].cpu(), reward[0].cpu())]:
        axis.plot(real, color="black", label="truth")
        axis.plot(predicted, color="tab:orange", label="model")
        axis.axvspan(0, context - 1, color="grey", alpha=0.25, linewidth=0)
        axis.set_ylabel(label)
    last.legend(fontsize=7)
    return figure


# ── Training ──────────────────────────────────────────────────────────────────────────────────────────────────────


def train(args: Args) -> None:
    torch.manual_seed(args.seed)
    env, test_env = make_env(args), make_env(args)
    agent = Agent(env, args)
    replay = SequenceReplay(env, agent.actions, args)
    networks = {"world": agent.world, "actor": agent.actor, "value": agent.value}
    rates = args.world_learning_rate, args.actor_learning_rate, args.value_learning_rate
    optimizers = {}
    for (name, net), rate in zip(networks.items(), rates, strict=True):
        decay = args.weight_decay / rate  # AdamW multiplies it by the step size, the official code does not
        optimizers[name] = torch.optim.AdamW(net.parameters(), rate, eps=1e-5, weight_decay=decay, fused=True)
    run = Run(args, agent=agent, replay=replay, **{f"{name}_optimizer": x for name, x in optimizers.items()})
    replay.open(run.dir)
    autocast = partial(torch.autocast, torch.device(args.device).type, torch.bfloat16, enabled=args.bf16)

    def backward(name: str, loss: Tensor) -> None:
        """Gradients for one network only; with ρ < 1 the policy's loss also backpropagates through the others."""
        parameters = [*networks[name].parameters()]
        optimizers[name].zero_grad()
        loss.backward(inputs=parameters)
        nn.utils.clip_grad_norm_(parameters, 100)

    while run.unfinished():
        obs, _ = env.reset(seed=run.begin_episode())
        agent.reset()
        replay.begin(obs)
        training, over, metrics = run.step >= args.random_steps and len(replay.starts) > 1, False, []
        while not over and run.step < args.total_timesteps:
            updates = int(training and run.step % args.train_every < args.action_repeat)
            if training and agent.updates == 0:
                if args.obs == "vector":
                    agent.world.set_normaliser(replay.obs[: replay.size])
                updates = args.pretrain
            for _ in tqdm(range(updates), "updates", leave=False, disable=None if updates >= 100 else True):
                # (1) sample sequences, infer their states, and train the world model
                batch = replay.sample(args.batch_size, args.batch_length, args.balance_ends)
                with autocast():
                    loss, states, world_metrics = world_model_loss(agent.world, batch, args)
                backward("world", loss)
                optimizers["world"].step()  # the states come from the old model; imagination uses the new one
                # (2) imagine steps from these states, and compute λ-returns
                with autocast():
                    actor_loss, value_loss, behaviour_metrics = behaviour_losses(agent, states, batch, args)
                # (3) train the policy to increase these returns, and the value to predict them
                backward("value", value_loss)
                backward("actor", actor_loss)
                for name in ("actor", "value"):
                    optimizers[name].step()
                if agent.updates % args.slow_every == 0:  # also after the first update
                    agent.slow_value.load_state_dict(agent.value.state_dict())
                metrics.append({name: x.detach() for name, x in (world_metrics | behaviour_metrics).items()})
                agent.updates += 1
            # (4) infer the current state, sample an action, and store the step
            if training:
                action = agent.act(obs)
            elif agent.discrete:
                action = F.one_hot(torch.randint(agent.actions, ()), agent.actions).float()
            else:
                action = 2 * torch.rand(agent.actions) - 1
            obs, reward, terminated, truncated, info = env.step(agent.to_env(action))
            replay.add(obs, action, math.tanh(reward) if args.tanh_rewards else reward, terminated)
            over = terminated or truncated
            run.count_steps(args.action_repeat)
        for tag in metrics[0] if metrics else ():
            run.log(tag, torch.stack([m[tag] for m in metrics]).mean())
        run.end_episode(info)
        with torch.random.fork_rng():
            if training and over and run.due(args.eval_every):
                for tag, value in heldout_metrics(agent.world, replay, args).items():
                    run.log(tag, value)
            if training and over and run.due(args.picture_every):
                run.picture(draw_open_loop(agent.world, replay, run.step))
        if run.due(args.eval_every):
            run.evaluate(agent, test_env)
    run.close()


# ── The task: a game, Atari as in the paper, and the DeepMind control suite ───────────────────────────────────────


class Catch(gym.Env):
    """A ball falls through 8 × 8 tiles, and a paddle at the bottom moves left, stays, or moves right. The reward at the
    end is 1 if the paddle catches the ball, otherwise −1. Four moves before the end the ball jumps two tiles to the
    left or to the right, with equal probability."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}
    observation_space, action_space = gym.spaces.Box(0, 255, (32, 32, 1), np.uint8), gym.spaces.Discrete(3)

    def __init__(self, render_mode: Optional[str] = None):
        self.render_mode = render_mode

    def reset(self, *, seed: Optional[int] = None, options: Optional[dict] = None):
        super().reset(seed=seed)
        self.row, self.paddle = 0, int(self.np_random.integers(8))
        self.ball = int(self.np_random.integers(2, 6))  # both jumps stay inside
        return self.picture(), {}

    def step(self, action: int):
        self.paddle = min(max(self.paddle + int(action) - 1, 0), 7)
        self.row += 1
        if self.row == 3:
            self.ball += 2 * int(self.np_random.choice([-1, 1]))
        reward = (1.0 if self.ball == self.paddle else -1.0) if self.row == 7 else 0.0
        return self.picture(), reward, self.row == 7, False, {}

    def picture(self) -> np.ndarray:
        tiles = np.zeros((8, 8, 1), np.uint8)
        tiles[-1, self.paddle] = 128
        tiles[self.row, self.ball] = 255
        return tiles.repeat(4, 0).repeat(4, 1)

    def render(self) -> np.ndarray:
        return self.picture().repeat(8, 0).repeat(8, 1).repeat(3, 2)


class NoOps(gym.Wrapper):
    """An Atari episode begins with 1 to 30 no-op frames."""

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        for _ in range(self.np_random.integers(1, 31)):
            obs, _, terminated, truncated, info = self.env.step(0)
            if terminated or truncated:
                obs, info = self.env.reset()
        return obs, info


def is_image(space: gym.Space) -> bool:
    return isinstance(space, gym.spaces.Box) and space.dtype == np.uint8 and space.shape[2:] in ((1,), (3,))


def resize(image: np.ndarray, size: int, channels: int = 3) -> np.ndarray:
    """[H, W, 1 or 3] or grey [H, W] → [C, S, S]"""
    image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("RGB" if channels == 3 else "L")
    image = np.array(image.resize((size, size), Image.Resampling.BOX)).reshape(size, size, channels)
    return image.transpose(2, 0, 1).copy()


class ControlSuite(gym.Env):
    """A task of the DeepMind control suite: `ControlSuite/walker-walk`."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 25}

    def __init__(self, name: str, size: int, render_mode: Optional[str] = None):
        try:
            from dm_control import suite
        except (ImportError, AttributeError) as error:
            raise UserError(f'pip install dm_control "mujoco<4" for the DeepMind control suite: {error}') from None
        self.name, self.size, self.render_mode = name, size, render_mode
        try:
            self.task = suite.load(*name.split("-", 1))
        except (ValueError, TypeError) as error:
            raise UserError(f"--env-id ControlSuite/{name}: {error}") from None
        quality = self.task.physics.model.vis.quality
        quality.offsamples, quality.shadowsize = 0, 0  # without antialiasing and shadows it renders ten times faster
        actions, size = self.task.action_spec(), sum(math.prod(x.shape) for x in self.task.observation_spec().values())
        self.action_space = gym.spaces.Box(actions.minimum.astype(np.float32), actions.maximum.astype(np.float32))
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)

    def reset(self, *, seed: Optional[int] = None, options: Optional[dict] = None):
        super().reset(seed=seed)
        self.task.task._random = np.random.RandomState(self.np_random.integers(2**31))
        return self.numbers(self.task.reset()), {}

    def step(self, action: np.ndarray):
        step = self.task.step(action)
        terminated = step.last() and step.discount == 0
        return self.numbers(step), step.reward or 0.0, terminated, step.last() and not terminated, {}

    def numbers(self, step) -> np.ndarray:
        return np.concatenate([np.ravel(x) for x in step.observation.values()]).astype(np.float32)

    def render(self) -> np.ndarray:
        camera = 2 if self.name.startswith("quadruped") else 0
        return self.task.physics.render(self.size, self.size, camera_id=camera)


def make_task(args: Args, **kwargs) -> gym.Env:
    if args.env_id.startswith("ALE/"):  # grey frames, the maximum of the last two, and sticky actions
        if args.obs == "vector" or args.action_repeat < 2:
            raise UserError(f"{args.env_id} needs --obs pixels and --action-repeat 2 or more: use the preset freeway")
        env = gym.make(args.env_id, obs_type="grayscale", frameskip=1, max_episode_steps=108_000, **kwargs)
        env = gym.wrappers.MaxAndSkipObservation(NoOps(env), args.action_repeat)
        space = gym.spaces.Box(0, 255, (1, args.image_size, args.image_size), np.uint8)
        return gym.wrappers.TransformObservation(env, partial(resize, size=args.image_size, channels=1), space)
    if args.env_id.startswith("ControlSuite/"):
        make = partial(ControlSuite, args.env_id.partition("/")[2])
        if args.env_id not in gym.registry:
            gym.register(args.env_id, make, max_episode_steps=1_000)
        kwargs["size"] = args.image_size if args.obs == "pixels" else 240
    env = gym.make(args.env_id, **kwargs)
    if args.obs == "pixels" and not is_image(env.observation_space):
        if "rgb_array" not in env.metadata.get("render_modes", ()):
            raise UserError(f"{args.env_id} does not render images: use --obs vector")
        env = gym.make(args.env_id, **kwargs | {"render_mode": "rgb_array"})
    if isinstance(env.action_space, gym.spaces.Box):
        if len(env.action_space.shape) != 1 or not env.action_space.is_bounded():
            raise UserError(f"the actions of {args.env_id} are {env.action_space}, and a bounded vector is needed")
        env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    elif not (isinstance(env.action_space, gym.spaces.Discrete) and env.action_space.start == 0):
        raise UserError(f"the actions of {args.env_id} are {env.action_space}, and Box or Discrete(n) is needed")
    if args.action_repeat > 1:
        env = gym.wrappers.RepeatAction(env, args.action_repeat)
    if args.obs == "pixels":
        if not is_image(env.observation_space):
            env = gym.wrappers.AddRenderObservation(env)
        space = gym.spaces.Box(0, 255, (3, args.image_size, args.image_size), np.uint8)
        return gym.wrappers.TransformObservation(env, partial(resize, size=args.image_size), space)
    if not (isinstance(env.observation_space, gym.spaces.Box) and len(env.observation_space.shape) == 1):
        hint = "use --obs pixels, or gymnasium.wrappers.FlattenObservation"
        raise UserError(f"the observations of {args.env_id} are {env.observation_space}, not a vector: {hint}")
    return gym.wrappers.DtypeObservation(env, np.float32)


gym.register_envs(ale_py)
if "Catch-v0" not in gym.registry:
    gym.register("Catch-v0", entry_point=Catch, max_episode_steps=100)


class Sequences(NamedTuple):
    """Rows [B, T, ...] of episodes, as in the docstring's diagram."""

    obs: Tensor
    action: Tensor
    reward: Tensor
    terminated: Tensor  # 1 if the state is terminal
    mask: Tensor  # 0 in padding, if the episode is shorter than T


class SequenceReplay:
    """The rows of all episodes, in a ring. Images are a memory-mapped file in the run folder."""

    def __init__(self, env: gym.Env, actions: int, args: Args):
        # One row per step and reset. The spare quarter keeps a run from overwriting images that its checkpoint needs.
        rows = min(args.replay_size * 5 // 4, 2 * (args.total_timesteps // args.action_repeat + 1))
        self.size, self.starts, self.keep, self.device = 0, [], args.replay_size, args.device
        self.shape, self.images = (rows, *env.observation_space.shape), None
        self.columns = {"action": torch.zeros(rows, actions)} | {x: torch.zeros(rows) for x in ("reward", "terminated")}
        self.obs = torch.zeros(self.shape if args.obs == "vector" else 0)

    def open(self, folder: Path) -> None:
        """The file of the images. Its space is reserved: a full disk is reported now and not during training."""
        path = folder / "replay.dat"
        if len(self.obs):
            return
        if self.size and not path.is_file():
            raise UserError(f"{path}, which holds the images of the run, is missing: it cannot continue")
        with open(path, "ab") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, math.prod(self.shape))
        self.images = np.memmap(path, np.uint8, "r+", shape=self.shape)
        self.obs = torch.from_numpy(self.images)

    def begin(self, obs: np.ndarray) -> None:
        """The first row of an episode."""
        self.starts.append(self.size)
        while len(self.starts) > 2 and self.starts[0] < self.size - self.keep:
            self.starts.pop(0)
        self.add(obs, torch.tensor(0.0), 0.0, False)

    def add(self, obs: np.ndarray, action: Tensor, reward: float, terminated: bool) -> None:
        if not (math.isfinite(reward) and np.isfinite(obs).all()):
            raise UserError("the environment returned NaN or infinity as an observation or reward")
        if self.size - self.starts[0] >= len(self.obs):
            raise UserError("--replay-size is too small for episodes of this length")
        row = self.size % len(self.obs)
        self.obs[row] = torch.from_numpy(obs)
        for column, value in zip(self.columns.values(), (action, float(reward), float(terminated)), strict=True):
            column[row] = value
        self.size += 1

    def rows(self, index: Tensor, mask: Optional[Tensor] = None) -> Sequences:
        index, mask = index % len(self.obs), torch.ones(index.shape) if mask is None else mask.float()
        columns = self.obs[index], *(column[index] for column in self.columns.values()), mask
        batch = Sequences(*(column.to(self.device) for column in columns))
        batch.action[:, 0] = 0  # zero, like the state before a sequence
        return batch

    def sample(self, batch_size: int, length: int, balance_ends: bool) -> Sequences:
        """Step (1): each sequence starts at a random row of a random complete episode, so that it fits. To balance,
        any row is chosen, and then clipped to the last one that fits."""
        starts = torch.tensor(self.starts)
        chosen = torch.randint(len(starts) - 1, (batch_size,))
        start, rows = starts[chosen, None], (starts[chosen + 1] - starts[chosen])[:, None]
        last = (rows - length).clamp(min=0)
        offset = (torch.rand(batch_size, 1) * (rows + 1 if balance_ends else last + 1)).long()
        offset = torch.minimum(offset, last) + torch.arange(length)
        return self.rows(start + torch.minimum(offset, rows - 1), offset < rows)

    def latest(self, length: int, windows: int = 1) -> Sequences:
        """Evenly spaced windows of the latest episode, which sample() excludes until the next one begins."""
        rows = self.size - self.starts[-1]
        length = min(length, rows)
        offset = torch.linspace(0, rows - length, windows).round().long().unique()[:, None] + torch.arange(length)
        return self.rows(self.starts[-1] + offset)

    def state_dict(self) -> dict:
        if self.images is not None:
            self.images.flush()
        columns = self.columns | ({} if self.images is not None else {"obs": self.obs})
        rows = {name: column[: self.size].clone() for name, column in columns.items()}
        return {"size": self.size, "starts": self.starts, "rows": rows}

    def load_state_dict(self, state: dict) -> None:
        self.size, self.starts = state["size"], state["starts"]
        for name, rows in state["rows"].items():
            (self.obs if name == "obs" else self.columns[name])[: len(rows)] = rows


# ── Plumbing: the same in every file, nothing below is specific to the algorithm ──────────────────────────────────


class UserError(Exception):
    """A wrong setting, environment or folder: main() prints one sentence and exits with code 2."""


def make_env(args: Args) -> gym.Env:
    sys.path.append("")  # module:Env-v0 finds a module in the current folder
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo renders without a screen
    try:
        env = make_task(args, **({"render_mode": "rgb_array"} if args.capture_video else {}))
    except (gym.error.Error, ImportError) as error:  # Gymnasium names the package to install
        raise UserError(f"--env-id {args.env_id}: {error}") from None
    if env.spec.max_episode_steps is None:
        gym.logger.warn(f"{args.env_id} has no time limit: episodes are truncated after 1,000 steps")
        env = gym.wrappers.TimeLimit(env, 1_000)
    return gym.wrappers.RecordEpisodeStatistics(env)


class Run:
    """The folder of a run: curves and checkpoints. `parts` are what a checkpoint holds and --resume restores."""

    def __init__(self, args: Args, **parts):
        checkpoint = load_checkpoint(args.resume) if args.resume else None
        self.args, self.parts, self.signal, self.step = args, parts, 0, checkpoint["step"] if checkpoint else 0
        name = f"{args.env_id.replace('/', '-').replace(':', '-')}__{ALGORITHM}__{args.seed}__{int(time.time())}"
        self.dir = Path(args.resume or args.run_dir or f"runs/{name}")
        if self.step >= args.total_timesteps:
            raise UserError(f"{self.dir} has taken {self.step:,} steps already: raise --total-timesteps to continue")
        self.dir.mkdir(parents=True, exist_ok=True)
        if not checkpoint and any(self.dir.iterdir()):
            raise UserError(f"{self.dir} is not empty: choose another --run-dir, or continue with --resume {self.dir}")
        if checkpoint:
            for part in parts:
                parts[part].load_state_dict(checkpoint[part])
            torch.set_rng_state(checkpoint["generator"])
            for number, state in enumerate(checkpoint["cuda_generators"][: torch.cuda.device_count()]):
                torch.cuda.set_rng_state(state, number)
        while any(self.dir.glob(f"events.out.tfevents.{int(time.time())}.*")):
            time.sleep(0.05)  # TensorBoard reads the files in the order of their names, which hold the second
        # After a kill the steps since the last checkpoint are taken again: TensorBoard hides the first attempt.
        self.writer = SummaryWriter(str(self.dir), purge_step=self.step + 1 if checkpoint else None)
        table = "\n".join(f"|{name}|{value}|" for name, value in vars(args).items())
        self.writer.add_text("hyperparameters", f"|setting|value|\n|-|-|\n{table}", self.step)
        print(f"run folder: {self.dir}\ncurves: tensorboard --logdir {shlex.quote(str(self.dir))}", flush=True)
        self.bar = tqdm(total=args.total_timesteps, initial=self.step, unit=" steps", disable=None)
        self.first_step, self.began, self.saved = self.step, time.perf_counter(), time.perf_counter()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)

    def on_signal(self, number: int, _) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)
        os.write(2, b"\nstopping at the end of this episode; the same signal again stops immediately\n")

    def unfinished(self) -> bool:
        return self.step < self.args.total_timesteps and not self.signal

    def begin_episode(self) -> int:
        """The episode's seed comes from torch's generator, the only one that a script uses."""
        self.episode_start = self.step
        return int(torch.randint(2**31, ()))

    def count_steps(self, n: int = 1) -> None:
        self.step += n
        self.bar.update(n)

    def due(self, every: int) -> bool:
        """Whether the last episode contains a multiple of `every` or ends the run."""
        return self.step // every > self.episode_start // every or self.step >= self.args.total_timesteps

    def log(self, tag: str, value: float) -> None:
        self.writer.add_scalar(tag, value, self.step)

    def end_episode(self, info: dict) -> None:
        if "episode" in info:  # it was not interrupted by the end of the run
            self.log("charts/episodic_return", info["episode"]["r"])
            self.log("charts/episodic_length", info["episode"]["l"])
            self.bar.set_postfix_str(f"return {info['episode']['r']:.4g}")
        self.log("charts/SPS", (self.step - self.first_step) / (time.perf_counter() - self.began))
        if self.due(self.args.checkpoint_every) or time.perf_counter() - self.saved > 60 or self.signal:
            self.save()

    def save(self) -> None:
        """Write next to the old checkpoint and rename: a kill at any moment leaves a complete one."""
        machine = ("resume", "evaluate", "run_dir", "device")  # these belong to the command, not to the run
        state = {
            "algorithm": ALGORITHM,
            "args": {name: value for name, value in asdict(self.args).items() if name not in machine},
            "step": self.step,
            "generator": torch.get_rng_state(),
            "cuda_generators": torch.cuda.get_rng_state_all(),
        }
        buffer, temporary = io.BytesIO(), self.dir / "checkpoint.tmp"
        torch.save(state | {name: part.state_dict() for name, part in self.parts.items()}, buffer)
        try:
            temporary.write_bytes(buffer.getbuffer())
            os.replace(temporary, self.dir / "checkpoint.pt")
        finally:  # a full disk leaves the old checkpoint
            temporary.unlink(missing_ok=True)
        self.saved = time.perf_counter()

    def picture(self, figure: Figure) -> None:
        figure.savefig(self.dir / "picture.png")
        self.writer.add_figure("model/picture", figure, self.step)

    def evaluate(self, agent: "Agent", env: gym.Env) -> None:
        video = self.dir / f"video_{self.step:08d}.gif"
        self.log("eval/episodic_return", play(agent, env, self.args, f"step {self.step:,}", video))

    def close(self) -> None:
        for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            signal.signal(number, handler)
        self.bar.close()
        self.writer.close()
        script, folder = f"python {sys.argv[0]}", shlex.quote(str(self.dir))
        if self.step < self.args.total_timesteps:
            self.save()
            print(f"stopped at step {self.step:,}; to continue: {script} --resume {folder}")
            sys.exit(128 + self.signal)
        print(f"picture: {self.dir / 'picture.png'}\nto watch it: {script} --evaluate {folder} --capture-video")


def play(agent: "Agent", env: gym.Env, args: Args, title: str, video: Path) -> float:
    """The mean return of evaluation episodes. They are always the same ones and leave the generator as it was."""
    returns, frames = [], []
    with torch.random.fork_rng():
        torch.manual_seed(args.seed + 10_000)
        for episode in range(args.episodes):
            obs, info = env.reset(seed=int(torch.randint(2**31, ())))
            agent.reset()
            while "episode" not in info:
                obs, _, _, _, info = env.step(agent(obs))
                if args.capture_video and episode == 0 and len(frames) < 500:
                    frames.append(Image.fromarray(env.render()).reduce(2))
            returns.append(float(info["episode"]["r"]))
    if frames:
        frames[0].save(video, save_all=True, append_images=frames[1:], duration=40, loop=0)
    mean, low, high = np.mean(returns), min(returns), max(returns)
    tqdm.write(f"{title}: the {agent.player}'s mean return is {mean:.2f}, from {low:.2f} to {high:.2f}")
    sys.stdout.flush()  # the log of a batch job shows it at once
    return mean


def load_checkpoint(run_dir: str) -> dict:
    path = Path(run_dir) / "checkpoint.pt"
    if not path.is_file():
        raise UserError(f"{run_dir} holds no checkpoint.pt: not a run folder, or stopped before its first checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        raise UserError(f"{path} is damaged: it cannot be read") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("algorithm") != ALGORITHM:
        raise UserError(f"{path} is not a checkpoint of {ALGORITHM}")
    names = {field.name for field in fields(Args)}  # a setting added to Args since then takes its default
    checkpoint["args"] = Args(**{name: value for name, value in checkpoint["args"].items() if name in names})
    return checkpoint


def load_policy(run_dir: str, args: Optional[Args] = None) -> "Agent":
    """policy = load_policy("runs/NAME"), then action = policy(obs); call policy.reset() before each episode."""
    checkpoint = load_checkpoint(run_dir)
    args = args or checkpoint["args"]
    agent = Agent(make_env(args), args)
    agent.load_state_dict(checkpoint["agent"])
    return agent


def parse_args(words: list[str]) -> Args:
    """A preset, by default the first one, and flags that override it; or the settings of an earlier run."""
    folders = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    folders.add_argument("--resume")
    folders.add_argument("--evaluate")
    found, _ = folders.parse_known_args(words)
    if found.resume and found.evaluate:
        raise UserError("--resume trains and --evaluate plays: choose one")
    if run_dir := found.resume or found.evaluate:
        saved = load_checkpoint(run_dir)["args"]
        args = tyro.cli(Args, default=saved, args=words)
        changed = {name for name, value in vars(saved).items() if getattr(args, name) != value}
        if changed := changed - {"resume", "evaluate", *MAY_CHANGE.split()}:
            raise UserError(f"{run_dir} keeps its own settings: {', '.join(sorted(changed))} cannot be changed")
    else:
        preset = [] if {*words} & {*PRESETS, "-h", "--help"} else [next(iter(PRESETS))]
        args = tyro.extras.overridable_config_cli(PRESETS, args=preset + words, description=__doc__.split("\n\n")[0])
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {args.device} is not available on this machine") from None
    return args


MAY_CHANGE = "total_timesteps device compile seed eval_every picture_every checkpoint_every episodes capture_video"


def main(words: Optional[list[str]] = None) -> None:
    try:
        args = parse_args(sys.argv[1:] if words is None else words)
        if args.evaluate:
            play(load_policy(args.evaluate, args), make_env(args), args, args.env_id, Path(args.evaluate) / "play.gif")
        else:
            train(args)
    except (UserError, OSError) as error:  # an OSError is most often a full disk
        print(f"{ALGORITHM}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
