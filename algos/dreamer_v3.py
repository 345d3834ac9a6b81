# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "numpy>=2.0,<3", "gymnasium>=1.3,<2", "ale-py>=0.11.1,<1", "tyro>=1.0.16,<2",
#     "tensorboard>=2.18,<3", "tqdm>=4.66,<5", "pillow>=11,<14", "matplotlib>=3.9,<4", "pygame-ce>=2.5,<3",
# ]
# ///
"""DreamerV3: a world model and a policy inside it, with the same settings for all tasks.

DreamerV3 changes DreamerV2 (dreamer_v2.py, in the same order) so that its settings need not be tuned. Signals of
unknown size are squashed: observations by symlog, rewards and values by a distribution over 255 exponentially spaced
bins. Returns are divided by the range of their percentiles, so that one entropy bonus fits all tasks. Free bits, 1 % of
uniform probability in every categorical variable, and a clipped and normalised gradient keep the training stable.

Paper: Hafner, Pasukonis, Ba, Lillicrap, "Mastering diverse control tasks through world models", Nature 640, 2025, and
arXiv 2301.04104 v2. Official code: github.com/danijar/dreamerv3.

The algorithm:
    (1) sample B sequences of L rows, infer their states from the stored state before them, and predict the rows
    (2) from each of these states imagine H steps with the policy, and compute λ-returns
    (3) train the policy by REINFORCE with normalised returns, and the critic on the imagined and the sampled rows
    (4) one step of one optimiser for the sum of all losses; store the inferred states
    (5) infer the state of the current episode from the observation, sample an action, and store the step

          a_{t−1}           a_t             Row t of an episode holds x_t, the action a_{t−1} that led to s_t, and the
    s_{t−1} ────▶ s_t ────▶ s_{t+1}         reward r_t received on arrival. In its first row a = 0 and r = 0.
                  │  │                      V(s_t) = E[r_{t+1} + γ r_{t+2} + …] does not include the reward of s_t.
                 x_t r_t

Symbols: x_t → obs; (h_t, z_t) → State; q(z_t|h_t, x_t) → RSSM.posterior, p(ẑ_t|h_t) → RSSM.prior; c_t → continues;
    π_θ(a|s) → Actor; v_ψ → critic, its moving average → slow_critic; R^λ → lambda_return; S → Agent.return_scale.

Usage (return: mean and 95 % interval over seeds; docs/dreamer_v3.md has the curves):
    python algos/dreamer_v3.py                                # CartPole-v1
    python algos/dreamer_v3.py catch                          # from images
    python algos/dreamer_v3.py atari100k --device cuda        # at the paper's settings
    uv run --with dm_control --with "mujoco<4" algos/dreamer_v3.py dmc --device cuda
    python algos/dreamer_v3.py --evaluate runs/NAME --episodes 10 --capture-video

Differences from the paper and its code: sequences are sampled uniformly from complete episodes, without the code's
queue of the newest rows, so that the newest episode measures the model on data it has not seen. The small presets have
a smaller network than the paper's smallest, with a larger step size and a shorter warm-up.
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
from functools import cache, partial
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

ALGORITHM = "dreamer_v3"


class Size(NamedTuple):
    """Of the networks."""

    deter: int  # size of h
    units: int  # units of every hidden layer
    stoch: int  # categorical variables in z
    classes: int  # classes of each
    depth: int  # channels of the convolutions, times 2 to 4


SIZES = {  # all but "tiny" are the paper's
    "tiny": Size(128, 64, 8, 8, 8), "1m": Size(512, 64, 32, 4, 4), "12m": Size(2048, 256, 32, 16, 16),
    "25m": Size(3072, 384, 32, 24, 24), "50m": Size(4096, 512, 32, 32, 32), "100m": Size(6144, 768, 32, 48, 48),
    "200m": Size(8192, 1024, 32, 64, 64),
}  # fmt: skip


@dataclass
class Args:  # tyro turns each field into a flag and each comment into its help
    env_id: str = "CartPole-v1"  # any environment with Box or Discrete actions; for Atari start from preset atari100k
    obs: Literal["pixels", "vector"] = "vector"  # the environment's images, or its rendering if it has none; or vectors
    image_size: Literal[32, 64] = 64  # images are resized to this many pixels per side
    action_repeat: int = 1  # each action is repeated this many times; all settings in steps count the repeats
    total_timesteps: int = 10_000  # environment steps
    learning_starts: int = 500  # rows that are collected by the untrained policy first
    train_ratio: float = 128.0  # trained rows per collected row: B · L · updates per action
    batch_size: int = 16  # B: sequences per update
    batch_length: int = 16  # L: rows per sequence
    replay_size: int = 1_000_000  # rows that are kept; the oldest are dropped first
    size: Literal["tiny", "1m", "12m", "25m", "50m", "100m", "200m"] = "tiny"  # size of all networks
    horizon: int = 15  # H: imagined steps
    gamma: float = 1 - 1 / 333  # γ: discount factor; the continue head predicts γ, or 0 at terminal states
    return_lambda: float = 0.95  # λ of the returns
    dynamics_scale: float = 1.0  # β_dyn: weight of the KL that trains the prior
    representation_scale: float = 0.1  # β_rep: weight of the KL that trains the posterior
    free_nats: float = 1.0  # a KL below this is not reduced further
    unimix: float = 0.01  # share of the uniform distribution in every categorical one
    entropy_scale: float = 3e-4  # η: weight of the policy's entropy
    replay_value_scale: float = 0.3  # weight of the critic's loss on the sampled rows
    slow_rate: float = 0.02  # the slow critic moves by this share towards the critic in each update
    return_rate: float = 0.01  # the percentiles of the returns move by this share in each update
    learning_rate: float = 2e-4  # of LaProp, for all networks; 4e-5 in the paper, for larger ones
    warmup: int = 100  # updates in which the step size grows linearly; 1,000 in the paper's code
    gradient_clip: float = 0.3  # a parameter's gradient is clipped to this share of its norm
    seed: int = 1  # on one CPU, two runs with the same seed are identical
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu, cuda or mps
    compile: bool = False  # torch.compile a step of the RSSM
    bf16: bool = False  # compute the losses in bfloat16
    eval_every: int = 1_000  # steps between evaluations (at the end of an episode, as pictures and checkpoints)
    picture_every: int = 1_000  # steps between pictures of open-loop predictions
    checkpoint_every: int = 5_000  # steps between checkpoints; one is also written about every minute
    episodes: int = 20  # episodes per evaluation
    capture_video: bool = False  # save the first episode of each evaluation as a GIF
    run_dir: Optional[str] = None  # output folder; runs/<env>__<algorithm>__<seed>__<time> by default
    resume: Optional[str] = None  # continue the run in this folder with its own settings
    evaluate: Optional[str] = None  # do not train: play with the agent of this run folder

    def __post_init__(self):
        """tyro reports a ValueError raised here as one sentence and exits with code 2."""
        may_be_zero = ("seed", "learning_starts", "return_lambda", "dynamics_scale", "representation_scale",
                       "free_nats", "unimix", "entropy_scale", "replay_value_scale")  # fmt: skip
        for name, value in vars(self).items():
            if type(value) in (int, float) and not (0 < value < math.inf or (value == 0 and name in may_be_zero)):
                raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be a positive number")
        for name in ("gamma", "return_lambda", "unimix", "slow_rate", "return_rate"):
            if getattr(self, name) > 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}: it must not exceed 1")
        if self.batch_length < 2 or self.horizon < 2:
            raise ValueError("--batch-length and --horizon must be at least 2")


PAPER = Args(
    batch_length=64, learning_starts=1_024, learning_rate=4e-5, warmup=1_000, replay_size=5_000_000,
    eval_every=10_000, episodes=10, picture_every=10_000, checkpoint_every=50_000,
)  # fmt: skip
PRESETS = {
    "cartpole": ("CartPole-v1 from vectors, with a tiny network; minutes", Args()),
    "pendulum": ("Pendulum-v1, continuous actions", Args("Pendulum-v1", total_timesteps=12_000)),
    "catch": ("a game in this file, 32 × 32 pixels: catch a ball that jumps left or right", Args(
        "Catch-v0", "pixels", 32, episodes=50)),
    "dmc": ("DeepMind control from vectors at the code's settings; --obs pixels --size 12m for images", replace(
        PAPER, env_id="ControlSuite/walker-walk", size="1m", total_timesteps=500_000, train_ratio=1_024.0)),
    "atari100k": ("100,000 steps of an Atari game at the code's settings: for a GPU", replace(
        PAPER, env_id="ALE/MsPacman-v5", obs="pixels", size="200m", action_repeat=4, total_timesteps=400_000,
        train_ratio=256.0)),
}  # fmt: skip


# ── The algorithm: numbers of any size ────────────────────────────────────────────────────────────────────────────


def symlog(x: Tensor) -> Tensor:
    # symlog(x) = sign(x) ln(|x| + 1)
    return x.sign() * x.abs().log1p()


def symexp(x: Tensor) -> Tensor:
    # symexp(x) = sign(x) (exp(|x|) − 1)
    return x.sign() * x.abs().expm1()


@cache
def bins(device: torch.device) -> Tensor:
    # B = symexp([−20 … +20]), 255 values; exactly antisymmetric
    positive = symexp(torch.linspace(0, 20, 128))
    return torch.cat([-positive[1:].flip(0), positive]).to(device)


def two_hot(y: Tensor) -> tuple[Tensor, Tensor]:
    """The two bins around y [..., 2], and their weights [..., 2], so that the weighted mean is y."""
    B = bins(y.device)
    y = y.clamp(B[0], B[-1])
    k = torch.searchsorted(B, y.contiguous(), right=True).clamp(1, len(B) - 1) - 1  # B_k ≤ y ≤ B_{k+1}
    upper = (y - B[k]) / (B[k + 1] - B[k])
    return torch.stack([k, k + 1], -1), torch.stack([1 - upper, upper], -1)


def two_hot_mean(logits: Tensor) -> Tensor:
    """Σ_i p_i B_i [...]. Pairs of bins are added first: if the probabilities are symmetric, the sum is exactly 0."""
    p, half = logits.softmax(-1), logits.shape[-1] // 2
    return ((p[..., half + 1 :] - p[..., :half].flip(-1)) * bins(logits.device)[half + 1 :]).sum(-1)


def two_hot_loss(logits: Tensor, y: Tensor) -> Tensor:
    # −Σ_i twohot(y)_i ln softmax(f(x))_i
    index, weights = two_hot(y)
    return -(weights * logits.log_softmax(-1).gather(-1, index)).sum(-1)


# ── The algorithm: the world model ────────────────────────────────────────────────────────────────────────────────


class ChannelNorm(nn.RMSNorm):
    """RMSNorm over the channels of images [N, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class BlockLinear(nn.Module):
    """A linear layer with a block-diagonal matrix: [N, blocks · inputs] → [N, blocks · outputs]. All blocks also see
    `shared` [N, shared]."""

    def __init__(self, blocks: int, inputs: int, outputs: int, shared: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, inputs, outputs))
        self.shared_weight = nn.Parameter(torch.empty(blocks * outputs, shared)) if shared else None
        self.bias = nn.Parameter(torch.empty(blocks * outputs))
        self.all_inputs = blocks * (inputs + shared)

    def forward(self, x: Tensor, shared: Optional[Tensor] = None) -> Tensor:
        x = torch.bmm(x.unflatten(1, (len(self.weight), -1)).transpose(0, 1), self.weight).transpose(0, 1).flatten(1)
        return x + (self.bias if shared is None else F.linear(shared, self.shared_weight, self.bias))


def layers(inputs: int, width: int, number: int) -> nn.Sequential:
    """Hidden layers: linear, RMSNorm, SiLU."""
    sizes = [inputs, *[width] * number]
    return nn.Sequential(*(
        part for m, n in itertools.pairwise(sizes) for part in (nn.Linear(m, n), nn.RMSNorm(n, 1e-4), nn.SiLU())
    ))  # fmt: skip


def dense(inputs: int, width: int, number: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(*layers(inputs, width, number), nn.Linear(width, outputs))


def channels(image_size: int, depth: int) -> list[int]:
    return [depth * factor for factor in ((2, 3, 4, 4) if image_size == 64 else (2, 3, 4))]


def image_encoder(image_channels: int, image_size: int, depth: int) -> nn.Sequential:
    """[N, C, S, S] → [N, E]: convolutions until 4 × 4 pixels are left."""
    sizes = [image_channels, *channels(image_size, depth)]
    blocks = [
        part for m, n in itertools.pairwise(sizes)
        for part in (nn.Conv2d(m, n, 5, padding=2), nn.MaxPool2d(2), ChannelNorm(n, 1e-4), nn.SiLU())
    ]  # fmt: skip
    return nn.Sequential(*blocks, nn.Flatten())


class ImageDecoder(nn.Module):
    """[N, Z + D] → [N, C, S, S]: 4 × 4 pixels from h and z, then convolutions of images of twice the size."""

    def __init__(self, image_channels: int, image_size: int, size: Size):
        super().__init__()
        first, *rest = reversed(channels(image_size, size.depth))
        self.z_size, self.first = size.stoch * size.classes, first
        self.from_h = BlockLinear(8, size.deter // 8, first * 16 // 8)
        self.from_z = dense(self.z_size, 2 * size.units, 1, first * 16)
        self.norm = ChannelNorm(first, 1e-4)
        blocks = []
        for m, n in itertools.pairwise([first, *rest]):
            blocks += [nn.Upsample(scale_factor=2), nn.Conv2d(m, n, 5, padding=2), ChannelNorm(n, 1e-4), nn.SiLU()]
        last = rest[-1]
        self.blocks = nn.Sequential(*blocks, nn.Upsample(scale_factor=2), nn.Conv2d(last, image_channels, 5, padding=2))

    def forward(self, features: Tensor) -> Tensor:
        z, h = features[:, : self.z_size], features[:, self.z_size :]
        x = self.from_h(h) + self.from_z(z)
        return self.blocks(F.silu(self.norm(x.unflatten(-1, (self.first, 4, 4))))).sigmoid()


def paper_init(module: nn.Module) -> None:
    """Truncated normal weights with variance 1 / inputs, and zero biases; block-linear layers count all inputs."""
    if isinstance(module, nn.Linear | nn.Conv2d | BlockLinear):
        inputs = module.all_inputs if isinstance(module, BlockLinear) else module.weight[0].numel()
        std = 1.1368 / math.sqrt(inputs)  # the truncation at two stds makes it 1 / √inputs
        for p in module.parameters(recurse=False):
            nn.init.zeros_(p) if p is module.bias else nn.init.trunc_normal_(p, std=std, a=-2 * std, b=2 * std)


class State(NamedTuple):
    """s = (h, z), [..., D] and [..., Z], and the logits [..., G, C] of the G variables of z with C classes."""

    h: Tensor
    z: Tensor
    logits: Tensor

    def features(self) -> Tensor:
        return torch.cat([self.z, self.h], -1)


def categorical(logits: Tensor, unimix: float) -> OneHotCategoricalStraightThrough:
    """With a share of the uniform distribution: one-hot in the forward pass, probabilities in the backward pass."""
    probs = (1 - unimix) * logits.softmax(-1) + unimix / logits.shape[-1]
    return OneHotCategoricalStraightThrough(probs=probs, validate_args=False)


class RSSM(nn.Module):
    """The recurrent state-space model: h is deterministic and remembers, z is sampled."""

    BLOCKS = 8

    def __init__(self, embedding: int, actions: int, args: Args):
        super().__init__()
        size, self.unimix = SIZES[args.size], args.unimix
        self.shape, self.sizes = (size.stoch, size.classes), (size.deter, size.stoch * size.classes)
        self.h_in, self.z_in, self.a_in = (layers(n, size.units, 1) for n in (*self.sizes, actions))
        self.hidden = BlockLinear(self.BLOCKS, size.deter // self.BLOCKS, size.deter // self.BLOCKS, 3 * size.units)
        self.norm = nn.RMSNorm(size.deter, 1e-4)
        self.gates = BlockLinear(self.BLOCKS, size.deter // self.BLOCKS, 3 * size.deter // self.BLOCKS)
        self.prior_net = dense(size.deter, size.units, 2, self.sizes[1])
        self.posterior_net = dense(size.deter + embedding, size.units, 1, self.sizes[1])
        if args.compile:
            self.step = torch.compile(self.step)

    def start(self, n: int) -> tuple[Tensor, Tensor]:
        """h and z before the first observation."""
        return tuple(self.norm.weight.new_zeros(n, size) for size in self.sizes)

    def gru(self, h: Tensor, z: Tensor, action: Tensor) -> Tensor:
        """A GRU whose blocks see their own part of h, and everything else. The −1 biases the gate towards keeping h."""
        x = torch.cat([self.h_in(h), self.z_in(z), self.a_in(action / action.abs().clamp(min=1))], -1)
        gates = self.gates(F.silu(self.norm(self.hidden(h, x)))).float().unflatten(1, (self.BLOCKS, 3, -1))
        reset, new, update = (gate.flatten(1) for gate in gates.unbind(2))
        update = (update - 1).sigmoid()
        return update * torch.tanh(reset.sigmoid() * new) + (1 - update) * h

    def distribution(self, logits: Tensor) -> Independent:
        return Independent(categorical(logits, self.unimix), 1)

    def prior(self, h: Tensor) -> Tensor:
        """p(ẑ_t|h_t): the logits of z_t"""
        return self.prior_net(h).float().unflatten(-1, self.shape)

    def posterior(self, h: Tensor, embedded: Tensor) -> Tensor:
        """q(z_t|h_t, x_t): the logits of z_t, given the encoded x_t"""
        return self.posterior_net(torch.cat([h, embedded], -1)).float().unflatten(-1, self.shape)

    def step(self, h: Tensor, z: Tensor, action: Tensor, embedded: Optional[Tensor] = None) -> State:
        """s_t after s_{t−1} and a_{t−1}: from the posterior if x_t has been observed, otherwise from the prior."""
        h = self.gru(h, z, action)
        logits = self.prior(h) if embedded is None else self.posterior(h, embedded)
        return State(h, self.distribution(logits).rsample().flatten(1), logits)

    def unroll(self, h: Tensor, z: Tensor, actions: Tensor, embedded: Optional[Tensor] = None,
               first: Optional[Tensor] = None) -> State:  # fmt: skip
        """States [B, T, ...] along actions [B, T, A]; action t leads to observation t, encoded as [B, T, E]. Where
        first [B, T] is 1 an episode begins, and the state before it is 0, as its action is."""
        states = []
        for t in range(actions.shape[1]):
            if first is not None:
                h, z = (x * (1 - first[:, t, None]) for x in (h, z))
            states.append(self.step(h, z, actions[:, t], None if embedded is None else embedded[:, t]))
            h, z = states[-1].h, states[-1].z
        return State(*(torch.stack(part, 1) for part in zip(*states, strict=True)))


class WorldModel(nn.Module):
    """Encoder, RSSM, and the heads for observation, reward and continuation."""

    def __init__(self, env: gym.Env, actions: int, args: Args):
        super().__init__()
        self.images, shape, size = args.obs == "pixels", env.observation_space.shape, SIZES[args.size]
        features = size.deter + size.stoch * size.classes
        if self.images:
            self.encoder = image_encoder(shape[0], args.image_size, size.depth)
            self.decoder = ImageDecoder(shape[0], args.image_size, size)
        else:
            self.encoder = layers(*shape, size.units, 3)
            self.decoder = dense(features, size.units, 3, *shape)
        self.reward_head = dense(features, size.units, 1, 255)
        self.continue_head = dense(features, size.units, 1, 1)
        embedding = 16 * channels(args.image_size, size.depth)[-1] if self.images else size.units
        self.rssm = RSSM(embedding, actions, args)
        self.apply(paper_init).to(memory_format=torch.channels_last)  # faster convolutions
        nn.init.zeros_(self.reward_head[-1].weight)

    def squash(self, obs: Tensor) -> Tensor:
        """What the decoder predicts: symlog of vectors, or images in [0, 1]."""
        return obs / 255 if self.images else symlog(obs.float())

    def encode(self, obs: Tensor) -> Tensor:
        """[B, T, ...] → [B, T, E]"""
        x = self.squash(obs).flatten(0, 1)
        return self.encoder(x - 0.5 if self.images else x).unflatten(0, obs.shape[:2])

    def decode(self, features: Tensor) -> Tensor:
        return self.decoder(features.flatten(0, 1)).unflatten(0, features.shape[:2]).float()

    def reward(self, features: Tensor) -> Tensor:
        return two_hot_mean(self.reward_head(features).float())

    def continues(self, features: Tensor) -> Tensor:
        """ĉ_t: γ times the probability that the episode goes on."""
        return self.continue_head(features)[..., 0].float().sigmoid()


def world_model_loss(world: WorldModel, batch: "Sequences", args: Args) -> tuple[Tensor, State, dict[str, Tensor]]:
    """Step (1): the loss, the inferred states, and metrics."""
    states = world.rssm.unroll(batch.h, batch.z, batch.action, world.encode(batch.obs), batch.first)
    features, prior = states.features(), world.rssm.prior(states.h)
    # L_pred = −ln p(x_t|h_t, z_t) − ln p(r_t|h_t, z_t) − ln p(c_t|h_t, z_t); of observations the squared error, summed
    obs_loss = (world.decode(features) - world.squash(batch.obs)).square().flatten(2).sum(-1)
    reward_loss = two_hot_loss(world.reward_head(features).float(), batch.reward)
    continues, logits = args.gamma * (1 - batch.terminated), world.continue_head(features)[..., 0].float()
    continue_loss = F.binary_cross_entropy_with_logits(logits, continues, reduction="none")

    def kl(q: Tensor, p: Tensor) -> Tensor:
        return kl_divergence(world.rssm.distribution(q), world.rssm.distribution(p))

    # L_dyn = max(1, KL[sg(q(z_t|h_t, x_t)) ‖ p(z_t|h_t)]), L_rep = max(1, KL[q(z_t|h_t, x_t) ‖ sg(p(z_t|h_t))])
    dynamics_kl, representation_kl = kl(states.logits.detach(), prior), kl(states.logits, prior.detach())
    dynamics_loss, representation_loss = (x.clamp(min=args.free_nats) for x in (dynamics_kl, representation_kl))
    # L(φ) = E[Σ_t β_pred L_pred + β_dyn L_dyn + β_rep L_rep]
    loss = obs_loss + reward_loss + continue_loss
    loss = (loss + args.dynamics_scale * dynamics_loss + args.representation_scale * representation_loss).mean()
    metrics = {"losses/observation": obs_loss.mean(), "losses/reward": reward_loss.mean(), "losses/world": loss}
    metrics["losses/continue"] = continue_loss.mean()
    metrics["model/kl"] = dynamics_kl.mean()
    metrics["model/prior_entropy"] = world.rssm.distribution(prior).entropy().mean()
    return loss, states, metrics


# ── The algorithm: policy and critic, trained on imagined steps ───────────────────────────────────────────────────


class Actor(nn.Module):
    """π_θ(a|s): a Gaussian whose samples are clipped to [−1, 1] by the environment, or a categorical distribution of
    Discrete actions. [..., F] → [..., A]"""

    def __init__(self, features: int, actions: int, discrete: bool, args: Args):
        super().__init__()
        self.discrete, self.unimix = discrete, args.unimix
        self.net = dense(features, SIZES[args.size].units, 3, actions if discrete else 2 * actions).apply(paper_init)
        self.net[-1].weight.data *= 0.01

    def forward(self, features: Tensor) -> OneHotCategoricalStraightThrough | Independent:
        out = self.net(features).float()
        if self.discrete:
            return categorical(out, self.unimix)
        mean, std = out.chunk(2, -1)
        return Independent(Normal(torch.tanh(mean), 0.1 + 0.9 * torch.sigmoid(std + 2), validate_args=False), 1)


def make_critic(features: int, args: Args) -> nn.Sequential:
    """v_ψ: the logits of the return's distribution over the bins. All values are 0 at the start."""
    net = dense(features, SIZES[args.size].units, 3, 255).apply(paper_init)
    nn.init.zeros_(net[-1].weight)
    return net


@torch.no_grad()
def imagine(world: WorldModel, actor: Actor, h: Tensor, z: Tensor, horizon: int) -> tuple[Tensor, Tensor]:
    """Step (2): the features [N, H + 1, F] of N states and the H that follow each, and the actions [N, H, A]; action t
    was chosen in state t."""
    features, actions = [torch.cat([z, h], -1)], []
    for _ in range(horizon):
        actions.append(actor(features[-1]).sample())
        state = world.rssm.step(h, z, actions[-1])
        features.append(state.features())
        h, z = state.h, state.z
    return torch.stack(features, 1), torch.stack(actions, 1)


def lambda_return(reward: Tensor, value: Tensor, continues: Tensor, lambda_: float | Tensor) -> Tensor:
    """R^λ of all states but the last, [N, H + 1] → [N, H]."""
    returns, following, lambdas = [], value[:, -1], lambda_ * torch.ones_like(value)
    for t in reversed(range(value.shape[1] - 1)):
        # R^λ_t = r_{t+1} + c_{t+1} [(1 − λ) v(s_{t+1}) + λ R^λ_{t+1}]
        mixed = (1 - lambdas[:, t + 1]) * value[:, t + 1] + lambdas[:, t + 1] * following
        following = reward[:, t + 1] + continues[:, t + 1] * mixed
        returns.append(following)
    return torch.stack(returns[::-1], 1)


def critic_loss(agent: "Agent", features: Tensor, logits: Tensor, returns: Tensor) -> Tensor:
    """Of the critic's logits in all states but the last: towards the returns, and towards the slow critic's values."""
    with torch.no_grad():
        slow = two_hot_mean(agent.slow_critic(features[:, :-1]).float())
    # L(ψ) = −ln p_ψ(R^λ_t|s_t) − ln p_ψ(v_slow(s_t)|s_t)
    return two_hot_loss(logits[:, :-1], returns) + two_hot_loss(logits[:, :-1], slow)


def behaviour_losses(agent: "Agent", states: State, batch: "Sequences", args: Args) -> tuple[Tensor, dict]:
    """Steps (2) and (3): the loss of policy and critic, and metrics."""
    world = agent.world
    features, actions = imagine(world, agent.actor, *(x.flatten(0, 1) for x in (states.h, states.z)), args.horizon)
    logits = agent.critic(features).float()
    with torch.no_grad():
        reward, continues, value = world.reward(features), world.continues(features), two_hot_mean(logits)
        returns = lambda_return(reward, value, continues, args.return_lambda)
        weights = continues[:, :-1].cumprod(1)  # the probability that an imagined state is reached
        scale = agent.return_scale(returns)
    # L(θ) = −Σ_t sg((R^λ_t − v(s_t)) / max(1, S)) ln π_θ(a_t|s_t) + η H[π_θ(a_t|s_t)]
    policy = agent.actor(features[:, :-1])
    entropy, advantage = policy.entropy(), (returns - value[:, :-1]) / scale
    actor_loss = -(weights * (policy.log_prob(actions) * advantage + args.entropy_scale * entropy)).mean()
    value_loss = (weights * critic_loss(agent, features, logits, returns)).mean()
    # The sampled rows train the critic and, by its gradient, the world model. Their values are the imagined returns.
    imagined = returns[:, 0].unflatten(0, batch.reward.shape)
    last = torch.cat([batch.first[:, 1:], torch.zeros_like(batch.first[:, :1])], 1)  # a new episode follows
    replayed = lambda_return(
        batch.reward, imagined, args.gamma * (1 - batch.terminated), args.return_lambda * (1 - last)
    )
    seen = states.features()
    replay_loss = ((1 - last[:, :-1]) * critic_loss(agent, seen, agent.critic(seen).float(), replayed)).mean()
    metrics = {"losses/actor": actor_loss, "losses/value": value_loss, "losses/replay_value": replay_loss}
    metrics |= {"model/policy_entropy": entropy.mean(), "model/return_scale": scale}
    for name, x in (("reward", reward), ("return", returns), ("value", value)):
        metrics[f"model/imagined_{name}"] = x.mean()
    return actor_loss + value_loss + args.replay_value_scale * replay_loss, metrics


class LaProp(torch.optim.Optimizer):
    """RMSProp's normalised gradient, averaged; gradients are clipped by the norm of their parameters (AGC) before."""

    def __init__(self, parameters, lr: float, warmup: int, clip: float):
        super().__init__(parameters, {"lr": lr, "warmup": warmup, "clip": clip, "betas": (0.9, 0.999), "eps": 1e-20})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {"step": 0, "mean": torch.zeros_like(p), "square": torch.zeros_like(p)}
                state["step"] += 1
                n, mean, square = state["step"], state["mean"], state["square"]
                # g ← g min(1, 0.3 max(10⁻³, ‖p‖) / ‖g‖)
                g = p.grad * (group["clip"] * p.norm().clamp(min=1e-3) / p.grad.norm().clamp(min=1e-30)).clamp(max=1)
                # ν ← β₂ ν + (1 − β₂) g², μ ← β₁ μ + (1 − β₁) g / (√ν̂ + ε), p ← p − lr μ̂; hats correct the bias
                square.lerp_(g.square(), 1 - beta2)
                mean.lerp_(g / ((square / (1 - beta2**n)).sqrt() + group["eps"]), 1 - beta1)
                p -= group["lr"] * min(1, n / group["warmup"]) / (1 - beta1**n) * mean


class Agent(nn.Module):
    """World model, policy, critic and its slow copy, and the state of the current episode."""

    player = "sampling policy"

    def __init__(self, env: gym.Env, args: Args):
        super().__init__()
        self.args, self.discrete = args, isinstance(env.action_space, gym.spaces.Discrete)
        self.actions = int(env.action_space.n) if self.discrete else env.action_space.shape[0]
        self.world = WorldModel(env, self.actions, args)
        features = sum(self.world.rssm.sizes)
        self.actor, self.critic = Actor(features, self.actions, self.discrete, args), make_critic(features, args)
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("updates", torch.tensor(0))
        self.register_buffer("percentiles", torch.zeros(2))
        self.to(args.device)
        self.reset()

    def return_scale(self, returns: Tensor) -> Tensor:
        """Moves the percentiles towards those of these returns, and gives max(1, S)."""
        # S = EMA(Per(R^λ, 95) − Per(R^λ, 5), 0.99)
        found = torch.quantile(returns.flatten(), torch.tensor([0.05, 0.95], device=returns.device))
        self.percentiles.lerp_(found, self.args.return_rate)
        return (self.percentiles[1] - self.percentiles[0]).clamp(min=1)

    @torch.no_grad()
    def after_update(self) -> None:
        for slow, fast in zip(self.slow_critic.parameters(), self.critic.parameters(), strict=True):
            slow.lerp_(fast, self.args.slow_rate)
        self.updates += 1

    def reset(self) -> None:
        """An episode begins."""
        (self.h, self.z), self.action = self.world.rssm.start(1), torch.zeros(1, self.actions, device=self.args.device)

    @torch.inference_mode()
    def act(self, obs: np.ndarray, mode: bool = False) -> Tensor:
        """Step (5): infer s_t, then choose a_t [A]."""
        embedded = self.world.encode(torch.as_tensor(obs, device=self.args.device)[None, None])
        state = self.world.rssm.step(self.h, self.z, self.action, embedded[:, 0])
        policy = self.actor(state.features())
        action = policy.mode if mode else policy.sample()
        self.h, self.z, self.action = state.h, state.z, action
        return action[0]

    def to_env(self, action: Tensor) -> int | np.ndarray:
        return int(action.argmax()) if self.discrete else action.clamp(-1, 1).cpu().numpy()

    def forward(self, obs: np.ndarray) -> int | np.ndarray:
        return self.to_env(self.act(obs))


# ── What the model predicts ───────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def open_loop(world: WorldModel, batch: "Sequences", context: int = 5) -> tuple[Tensor, Tensor]:
    """Predicted observations [B, T, ...] and rewards [B, T]. The model sees `context` rows, then only the actions."""
    seen = world.rssm.unroll(
        batch.h, batch.z, batch.action[:, :context], world.encode(batch.obs[:, :context]), batch.first[:, :context]
    )
    ahead = world.rssm.unroll(seen.h[:, -1], seen.z[:, -1], batch.action[:, context:])
    features = torch.cat([seen.features(), ahead.features()], 1)
    return world.decode(features), world.reward(features)


@torch.no_grad()
def heldout_metrics(world: WorldModel, replay: "SequenceReplay", args: Args) -> dict[str, Tensor]:
    """The loss and ½ of the mean squared h-step errors on the latest episode, which has not been trained on."""
    metrics = {"model/heldout_loss": world_model_loss(world, replay.latest(args.batch_length, 8), args)[0]}
    batch = replay.latest(50, 8)
    if batch.obs.shape[1] > 5:
        obs, reward = open_loop(world, batch)
        obs_error = 0.5 * (obs - world.squash(batch.obs)).square().flatten(2).mean((0, 2))
        reward_error = 0.5 * (reward - batch.reward).square().mean(0)
        for h in (1, 5, 15, 45):
            if 4 + h < len(obs_error):
                metrics[f"model/open_loop_error_{h}"] = obs_error[4 + h]
                metrics[f"model/reward_error_{h}"] = reward_error[4 + h]
    return metrics


@torch.no_grad()
def draw_open_loop(agent: Agent, replay: "SequenceReplay", step: int) -> Figure:
    """The latest episode and its open-loop prediction: images or the first numbers of the observation, and rewards.
    Below, the critic's distribution in the states that it saw, and the return that came."""
    world, batch = agent.world, replay.latest(50)
    context = min(5, max(batch.obs.shape[1] // 3, 1))
    obs, reward = open_loop(world, batch, context)
    truth, model = (x[0].cpu() for x in (world.squash(batch.obs), obs))
    panels = 1 if world.images else min(truth.shape[1], 4)
    figure = Figure(figsize=(9, 6 if world.images else 1.3 * (panels + 3)), dpi=80, layout="constrained")
    figure.suptitle(f"step {step:,}: the model sees the grey steps and predicts the others from the actions")
    heights = [*[2.5 if world.images else 1] * panels, 1, 2]
    *axes, last, values = figure.subplots(panels + 2, 1, height_ratios=heights)
    if world.images:
        columns = torch.linspace(0, len(truth) - 1, 12).round().long().unique()
        rows = [x[columns].clamp(0, 1) for x in (truth, model, (model - truth).abs())]
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
    states = world.rssm.unroll(batch.h, batch.z, batch.action, world.encode(batch.obs), batch.first)
    logits = agent.critic(states.features()).float()
    value = two_hot_mean(logits)
    came = lambda_return(batch.reward, value, agent.args.gamma * (1 - batch.terminated), 1.0)[0].cpu()
    values.imshow(
        logits[0].softmax(-1).T.cpu(), aspect="auto", origin="lower", extent=(-0.5, len(truth) - 0.5, -20, 20)
    )
    values.plot(symlog(came), color="white", linewidth=1, label="return that came")
    shown = symlog(torch.cat([came, value[0].cpu()]))
    values.set(ylim=(float(shown.min()) - 1, float(shown.max()) + 1), ylabel="symlog of v")
    values.legend(fontsize=7)
    return figure


# ── Training ──────────────────────────────────────────────────────────────────────────────────────────────────────


def train(args: Args) -> None:
    torch.manual_seed(args.seed)
    env, test_env = make_env(args), make_env(args)
    agent = Agent(env, args)
    replay = SequenceReplay(env, agent, args)
    parameters = [p for p in agent.parameters() if p.requires_grad]
    optimizer = LaProp(parameters, args.learning_rate, args.warmup, args.gradient_clip)
    run = Run(args, agent=agent, replay=replay, optimizer=optimizer)
    replay.open(run.dir)
    autocast = partial(torch.autocast, torch.device(args.device).type, torch.bfloat16, enabled=args.bf16)
    updates, per_step = int(agent.updates), args.train_ratio / (args.batch_size * args.batch_length)

    while run.unfinished():
        obs, _ = env.reset(seed=run.begin_episode())
        agent.reset()
        replay.begin(obs)
        training, over, metrics = replay.start > max(args.learning_starts, args.batch_length), False, []
        while not over and run.step < args.total_timesteps:
            due = (run.step // args.action_repeat - args.learning_starts) * per_step
            while training and updates < due:
                # (1) sample sequences, infer their states, and predict their rows
                batch, index = replay.sample(args.batch_size, args.batch_length)
                with autocast():
                    world_loss, states, world_metrics = world_model_loss(agent.world, batch, args)
                    # (2) imagine steps from these states; (3) train the policy and the critic
                    behaviour_loss, behaviour_metrics = behaviour_losses(agent, states, batch, args)
                # (4) one step for all losses, and the inferred states go back to the replay
                optimizer.zero_grad()
                (world_loss + behaviour_loss).backward()
                optimizer.step()
                agent.after_update()
                replay.remember(index, states.h, states.z)
                metrics.append({name: x.detach() for name, x in (world_metrics | behaviour_metrics).items()})
                updates += 1
            # (5) infer the current state, sample an action, and store the step
            action = agent.act(obs)
            replay.remember(torch.tensor(replay.size - 1), agent.h[0], agent.z[0])
            obs, reward, terminated, truncated, info = env.step(agent.to_env(action))
            replay.add(obs, action, reward, terminated)
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
                run.picture(draw_open_loop(agent, replay, run.step))
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
            raise UserError(f"{args.env_id} needs --obs pixels and --action-repeat 2 or more: use the preset atari100k")
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
    """Rows [B, T, ...] as in the docstring's diagram, which may belong to several episodes."""

    obs: Tensor
    action: Tensor
    reward: Tensor
    terminated: Tensor  # 1 if the state is terminal
    first: Tensor  # 1 in the first row of an episode
    h: Tensor  # [B, D] and [B, Z]: the state before the first row, as it was inferred last
    z: Tensor


class SequenceReplay:
    """The rows of all episodes, in a ring, with their inferred states. Images are a memory-mapped file."""

    def __init__(self, env: gym.Env, agent: Agent, args: Args):
        # One row per step and reset. The spare quarter keeps a run from overwriting images that its checkpoint needs.
        rows = min(args.replay_size * 5 // 4, 2 * (args.total_timesteps // args.action_repeat + 1))
        self.size, self.start, self.keep, self.device = 0, 0, args.replay_size, args.device
        self.shape, self.images = (rows, *env.observation_space.shape), None
        zeros = partial(torch.zeros, rows)
        self.columns = {"action": zeros(agent.actions)} | {x: zeros() for x in ("reward", "terminated", "first")}
        self.columns |= {x: zeros(n, dtype=torch.float16) for x, n in zip("hz", agent.world.rssm.sizes, strict=True)}
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
        self.start = self.size
        self.add(obs, torch.tensor(0.0), 0.0, False, True)

    def add(self, obs: np.ndarray, action: Tensor, reward: float, terminated: bool, first: bool = False) -> None:
        if not (math.isfinite(reward) and np.isfinite(obs).all()):
            raise UserError("the environment returned NaN or infinity as an observation or reward")
        if self.size - self.start >= self.keep:
            raise UserError("--replay-size is too small for episodes of this length")
        row = self.size % len(self.obs)
        self.obs[row] = torch.from_numpy(obs)
        values = action, float(reward), float(terminated), float(first), 0.0, 0.0
        for column, value in zip(self.columns.values(), values, strict=True):
            column[row] = value
        self.size += 1

    def remember(self, index: Tensor, h: Tensor, z: Tensor) -> None:
        """The inferred states of rows."""
        for name, x in (("h", h), ("z", z)):
            self.columns[name][index % len(self.obs)] = x.detach().to("cpu", torch.float16)

    def rows(self, index: Tensor) -> Sequences:
        index, before = index % len(self.obs), (index[:, 0] - 1) % len(self.obs)
        columns = [self.obs[index], *(column[index] for column in [*self.columns.values()][:4])]
        columns += [self.columns[name][before].float() for name in "hz"]
        return Sequences(*(column.to(self.device) for column in columns))

    def sample(self, batch_size: int, length: int) -> tuple[Sequences, Tensor]:
        """Step (1): sequences from any row on, across the ends of episodes, and the numbers of their rows. The current
        episode is left out: it measures the model."""
        oldest = max(self.size - self.keep, 0)
        start = torch.randint(oldest, self.start - length + 1, (batch_size, 1))
        index = start + torch.arange(length)
        return self.rows(index), index

    def latest(self, length: int, windows: int = 1) -> Sequences:
        """Evenly spaced windows of the latest episode, which sample() excludes until the next one begins."""
        rows = self.size - self.start
        length = min(length, rows)
        offset = torch.linspace(0, rows - length, windows).round().long().unique()[:, None] + torch.arange(length)
        return self.rows(self.start + offset)

    def state_dict(self) -> dict:
        if self.images is not None:
            self.images.flush()
        columns = self.columns | ({} if self.images is not None else {"obs": self.obs})
        rows = {name: column[: self.size].clone() for name, column in columns.items()}
        return {"size": self.size, "start": self.start, "rows": rows}

    def load_state_dict(self, state: dict) -> None:
        self.size, self.start = state["size"], state["start"]
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
