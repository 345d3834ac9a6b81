# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "numpy>=2.0,<3",
#     "gymnasium>=1.3,<2",
#     "mujoco>=3.3,<5",
#     "imageio>=2.34,<3",
#     "tyro>=1.0,<2",
#     "tensorboard>=2.18,<3",
#     "tqdm>=4.66,<5",
#     "pillow>=11,<14",
#     "matplotlib>=3.9,<4",
#     "pygame-ce>=2.5,<3",
# ]
# ///
"""Dreamer: learn a model of the world from images, and a policy inside it, by gradients through what it imagines.

A recurrent state-space model condenses what was seen and done into a small state, from which the next one, the reward
and the picture can be foreseen. From states of real episodes a policy dreams on, without pictures, thousands of short
dreams at once. Rewards within the dream and a value at its end say how good it is; and since all of it is a
differentiable function of the actions, the policy simply follows the gradient.

Paper: D. Hafner, T. Lillicrap, J. Ba, M. Norouzi, "Dream to Control: Learning Behaviors by Latent Imagination", ICLR
2020, arXiv 1912.01603. Official code: github.com/danijar/dreamer, and github.com/google-research/dreamer of the paper's
own runs. The model (RSSM): D. Hafner et al., "Learning Latent Dynamics for Planning from Pixels", 2019,
arXiv 1811.04551.

The algorithm (Algorithm 1 of the paper):
    (1) draw B sequences of L steps; infer their states; the world model learns to reconstruct them and to foresee them
    (2) from each of these states dream H steps with the policy; the λ-returns say what each dreamed state is worth
    (3) the policy climbs the gradient of these returns through the dream; the value learns to foresee them
    (4) play: infer the state from what is seen, act with some noise, keep what happens

Time is counted one way throughout:

          a_{t−1}           a_t             row t of an episode holds a_{t−1}, o_t, r_t and whether s_t ended it:
    s_{t−1} ────▶ s_t ────▶ s_{t+1}         the action that led to s_t, and what was found on arriving there.
                  │  │                      Its first row is what the reset showed, with a = 0 and r = 0.
                 o_t r_t                    V(s_t) = E[r_t + γ r_{t+1} + ...] holds the reward of s_t itself.

Symbols (paper → this file):
    s_t → (h, z), h the recurrent part, z the random one           p(s_t|s_{t−1}, a_{t−1}, o_t) → RSSM.posterior
    q(s_t|s_{t−1}, a_{t−1}) → RSSM.prior                           q(o_t|s_t), q(r_t|s_t) → decoder, reward_head
    q_φ(a|s) → ActionModel       v_ψ → value       V_λ → lambda_return       H → horizon       β → kl_scale
    B, L → batch_size, batch_length                 C updates → updates, every train_every steps

Run (measured on 2 CPU cores; docs/dreamer_v1.md has the curves):
    python algos/dreamer_v1.py                                # 16 minutes: −169, 3 seeds (−96, −149, −262)
    python algos/dreamer_v1.py pendulum                       # 9 minutes, from numbers: −124, 3 seeds
    python algos/dreamer_v1.py walker --device cuda           # DeepMind control, needs the package dm_control
    python algos/dreamer_v1.py cartpole-pixels                # an episode's end is foreseen too

Deviations from the paper and the official code:
  - The last row of an episode is drawn too (the code's random start leaves it out), and no dream begins in a terminal
    state (where ends are foreseen the code leaves out the last row of each sequence). Episodes shorter than L are
    filled up, and what fills them counts nowhere; the code skips them.
  - As in the code, and not in the paper's Equations 7 and 8, dreamed states are weighted by the discounts before them,
    and the state that a dream begins in is not among them. Sizes of the networks are the code's too.
  - The random steps end with an episode, and are counted in steps, as in the code; in the paper they are 5 episodes.
    Computing is in float32, or with --bf16 in bfloat16; the code's is float16 with a scaled loss.
  - MuJoCo draws without smoothed edges and shadows: much faster, and not the pixels of the paper.
  - The deterministic policy is tanh of the mean; the code takes the likeliest of a hundred samples.
  - The constant of the normal's log-likelihood is left out of the losses; gradients are the same.
  - Discrete actions explore with a constant share of random ones; the code's falls from 0.4 to 0.1, and with its games
    come other settings (β = 0.1, H = 10, tanh of rewards), which no preset here has. The gradient passes straight
    through them, as in the paper; the paper's own code has a score function there.
  - The small presets have smaller networks, larger step sizes, images of 32 × 32, more updates for each step, rewards
    times --reward-scale, and one free nat: with three there is room to read an angle anew from each picture, and little
    need of its speed. Fewer pixels, or a few numbers, would hardly be worth their KL: --decoder-std makes up for
    that. A vector is read and decoded by dense layers, with mean 0 and deviation 1 in the random steps.
"""

import itertools
import json
import math
import os
import random
import shlex
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional

import gymnasium as gym
import numpy as np
import torch
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

ALGORITHM = "dreamer_v1"


@dataclass
class Args:
    env_id: str = "Pendulum-v1"
    """Any Gymnasium environment with a bounded box of actions or Discrete ones; `module:Env-v0` imports the module
    first. ControlSuite/walker-walk and its like are DeepMind control's tasks, by the package dm_control."""
    obs: Literal["pixels", "vector"] = "pixels"
    """What is seen: pictures of the environment (or its observations, where they are images), or its numbers."""
    image_size: int = 32
    """Pictures are scaled to so many pixels a side: 32 or 64."""
    action_repeat: int = 2
    """Each action is taken so many times, and the rewards are added up. Steps are the environment's."""
    total_timesteps: int = 10_000
    """Environment steps in all, those of random actions included."""
    random_steps: int = 1_000
    """So many of them take uniformly random actions first."""
    train_every: int = 2
    """Learn every this many environment steps, once an action at most."""
    updates: int = 1
    """Updates each time."""
    pretrain: int = 100
    """Updates when learning begins."""
    batch_size: int = 8
    """B: sequences in a batch."""
    batch_length: int = 32
    """L: rows in a sequence."""
    balance_ends: bool = False
    """Sequences begin anywhere in an episode and are moved back until they fit: its end is drawn more often."""
    horizon: int = 10
    """H: steps of a dream."""
    gamma: float = 0.99
    """γ: discount."""
    return_lambda: float = 0.95
    """λ of the returns."""
    ends: bool = False
    """Learn where episodes end: a head foresees the discount, γ or 0. Else it is γ everywhere."""
    ends_scale: float = 10.0
    """Weight of that head's loss."""
    kl_scale: float = 1.0
    """β: weight of the KL divergence between posterior and prior."""
    free_nats: float = 1.0
    """A KL below this costs nothing."""
    free_each: bool = False
    """Compare each state's KL with the free nats, as the paper's own code does; else the mean over the batch."""
    decoder_std: float = 0.3
    """Deviation of the normal around what is decoded, the paper's 1; smaller: observations count more."""
    reward_scale: float = 0.1
    """Rewards are learned times this."""
    deter_size: int = 64
    """Numbers in h."""
    stoch_size: int = 16
    """Numbers in z."""
    units: int = 64
    """Width of the layers inside the RSSM."""
    depth: int = 8
    """Channels of the first convolution; the next ones have 2, 4 and 8 times as many."""
    dense_units: int = 64
    """Width of the layers of reward, value and policy."""
    reward_layers: int = 2
    """Hidden layers of the reward (3 for ends)."""
    value_layers: int = 2
    """Hidden layers of the value."""
    actor_layers: int = 2
    """Hidden layers of the policy."""
    initial_std: float = 5.0
    """The policy begins with this deviation, before tanh."""
    world_learning_rate: float = 3e-3
    """Adam's step size for the world model."""
    actor_learning_rate: float = 3e-4
    """For the policy."""
    value_learning_rate: float = 3e-4
    """For the value."""
    adam_epsilon: float = 1e-7
    """Adam's ε."""
    gradient_clip: float = 100.0
    """No gradient (world model, policy, value) is longer than this."""
    exploration: float = 0.3
    """Deviation of the noise that is added to actions while training; Discrete ones: share of random ones."""
    seed: int = 1
    """Fixes Python, NumPy, torch and the environment: the same seed on one CPU gives the same run."""
    device: str = "auto"
    """auto, cpu or cuda[:index]."""
    compile: bool = False
    """torch.compile for the steps of the RSSM, the hot loop: speed may change, results only by rounding."""
    bf16: bool = False
    """Networks compute in bfloat16 while learning, where it is safe."""
    log_every: int = 500
    """Write losses and timings every this many steps (returns are written at each episode's end)."""
    eval_every: int = 1_000
    """Let the deterministic policy play in an environment of its own every this many steps; 0: only at the end."""
    eval_episodes: int = 5
    """Episodes for each of those evaluations."""
    eval_max_steps: int = 1_000
    """Cut an evaluation episode after so many actions."""
    picture_every: int = 1_000
    """Draw a dream of the episode that just ended, and write its film, every this many steps, 20 times at most; 0: no
    picture."""
    capture_video: bool = False
    """Record the first episode of each evaluation as a GIF in the run folder."""
    run_dir: Optional[str] = None
    """Where to write; by default runs/<env>__<algorithm>__<seed>__<time>."""
    checkpoint_every: int = 5_000
    """Save a checkpoint every this many steps, at the end of the episode (or once it is as late again); 0: only at
    the end of the run, and when it is stopped."""
    resume: Optional[str] = None
    """Go on with the run in this folder, with its settings. --total-timesteps may be raised: the episode that the
    first end cut is then left, and a new one begun."""
    evaluate: Optional[str] = None
    """Do not train: let the policy saved in this run folder play."""
    episodes: int = 10
    """Episodes to play with --evaluate."""
    progress: bool = True
    """Show a progress bar (never when the output is no terminal)."""


RELEASED = Args(  # the released code's
    image_size=64, total_timesteps=5_000_000, random_steps=5_000, train_every=1_000, updates=100,
    batch_size=50, batch_length=50, horizon=15, deter_size=200, stoch_size=30, units=200, depth=32, dense_units=400,
    value_layers=3, actor_layers=4, free_nats=3.0, decoder_std=1.0, reward_scale=1.0, world_learning_rate=6e-4,
    actor_learning_rate=8e-5, value_learning_rate=8e-5, log_every=5_000, eval_every=10_000,
    picture_every=250_000, checkpoint_every=50_000,
)  # fmt: skip
PRESETS = {
    "pendulum-pixels": (
        "Pendulum-v1 from pictures of 32 × 32: swing up what moves between two pictures",
        Args(),
    ),
    "pendulum": (
        "Pendulum-v1 from its three numbers",
        Args(obs="vector", decoder_std=0.1, total_timesteps=12_000),
    ),
    "cartpole-pixels": (
        "CartPole-v1 from pictures: two actions, and an end to be foreseen",
        Args(
            env_id="CartPole-v1", action_repeat=1, ends=True, balance_ends=True, reward_scale=1.0, exploration=0.1,
        ),
    ),
    "walker": (
        "DeepMind control's walker-walk from pixels at the released code's settings",
        replace(RELEASED, env_id="ControlSuite/walker-walk"),
    ),
    "cheetah": (
        "DeepMind control's cheetah-run from pixels at the released code's settings",
        replace(RELEASED, env_id="ControlSuite/cheetah-run"),
    ),
    "cartpole-swingup": (
        "DeepMind control's cartpole-swingup from pixels at the released code's settings",
        replace(RELEASED, env_id="ControlSuite/cartpole-swingup"),
    ),
    "halfcheetah": (
        "Gymnasium's HalfCheetah-v5 from pixels at the released code's settings",
        replace(RELEASED, env_id="HalfCheetah-v5"),
    ),
}  # fmt: skip


# ── The world model ───────────────────────────────────────────────────────────────────────────────────────────────


def dense(inputs: int, width: int, layers: int, outputs: int) -> nn.Sequential:
    sizes, net = [inputs, *[width] * layers], []
    for i in range(layers):
        net += [nn.Linear(sizes[i], sizes[i + 1]), nn.ELU()]
    return nn.Sequential(*net, nn.Linear(sizes[-1], outputs))


def keras_weights(module: nn.Module) -> None:
    """As in the official code: weights by Glorot's rule, biases 0."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class ImageEncoder(nn.Sequential):
    """Convolutions, width 4, stride 2, until 2 × 2 are left: three for 32 pixels, four for 64. [N, C, S, S] → [N, E]"""

    def __init__(self, channels: int, size: int, depth: int):
        count = {32: 3, 64: 4}[size]
        sizes = [channels, *(depth * 2**i for i in range(count))]
        convolutions = [nn.Conv2d(m, n, 4, stride=2) for m, n in itertools.pairwise(sizes)]
        super().__init__(*(layer for conv in convolutions for layer in (conv, nn.ReLU())), nn.Flatten())
        self.size = 4 * sizes[-1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.contiguous(memory_format=torch.channels_last))  # the order that is faster


class ImageDecoder(nn.Module):
    """The way back, from one pixel of many channels. [N, F] → [N, C, S, S]"""

    def __init__(self, inputs: int, channels: int, size: int, depth: int):
        super().__init__()
        kernels = {32: (5, 6, 6), 64: (5, 5, 6, 6)}[size]
        self.width = depth * 4 * 2 ** (len(kernels) - 1)
        self.first = nn.Linear(inputs, self.width)
        sizes = [self.width, *(depth * 2**i for i in reversed(range(len(kernels) - 1))), channels]
        pairs = itertools.pairwise(sizes)
        layers = [nn.ConvTranspose2d(m, n, k, stride=2) for (m, n), k in zip(pairs, kernels, strict=True)]
        self.layers = nn.Sequential(*(x for layer in layers for x in (layer, nn.ReLU())))[:-1]

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        spread = self.layers[0]  # of one pixel it is a plain product, and faster as one
        x = (self.first(features) @ spread.weight.flatten(1)).unflatten(1, spread.weight.shape[1:])
        return self.layers[1:]((x + spread.bias[:, None, None]).contiguous(memory_format=torch.channels_last))


class State(NamedTuple):
    """s: what is believed of the world, [..., D] and [..., Z]; and the normal that z was drawn from."""

    h: torch.Tensor
    z: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor

    def features(self) -> torch.Tensor:
        return torch.cat([self.z, self.h], -1)


class RSSM(nn.Module):
    """The recurrent state-space model. h remembers; z is what h can't foretell."""

    def __init__(self, embedded: int, actions: int, args: Args):
        super().__init__()
        self.split, self.deter, self.stoch = [args.stoch_size, actions], args.deter_size, args.stoch_size
        self.gru_in = nn.Linear(args.stoch_size + actions, args.units)
        self.gates_x = nn.Linear(args.units, 3 * args.deter_size)
        self.gates_h = nn.Linear(args.deter_size, 3 * args.deter_size)
        self.prior_net = dense(args.deter_size, args.units, 1, 2 * args.stoch_size)
        self.posterior_in = nn.Linear(args.deter_size + embedded, args.units)
        self.posterior_out = nn.Linear(args.units, 2 * args.stoch_size)
        self.apply(keras_weights)
        nn.init.orthogonal_(self.gates_h.weight)  # the three gates together
        self.filter_step, self.dream_step = self._filter_step, self._dream_step
        if args.compile:
            self.filter_step, self.dream_step = torch.compile(self._filter_step), torch.compile(self._dream_step)

    def start(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """h and z before anything was seen."""
        weight = self.gru_in.weight
        return weight.new_zeros(n, self.deter), weight.new_zeros(n, self.stoch)

    def gru(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        reset_x, update_x, new_x = self.gates_x(x).chunk(3, -1)
        reset_h, update_h, new_h = self.gates_h(h).chunk(3, -1)
        update = (update_x + update_h).sigmoid()
        new = torch.tanh(new_x + (reset_x + reset_h).sigmoid() * new_h)
        return (1 - update) * new + update * h

    def normal(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = x.float().chunk(2, -1)
        return mean, F.softplus(std) + 0.1

    def prior(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """q(s_t|s_{t−1}, a_{t−1}), where h has seen both: mean and deviation of z."""
        return self.normal(self.prior_net(h))

    def posterior(
        self, h: torch.Tensor, pictured: torch.Tensor, w_h: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """p(s_t|s_{t−1}, a_{t−1}, o_t); `pictured` is what was seen, after its part of the first layer."""
        return self.normal(self.posterior_out(F.elu(F.linear(h, w_h) + pictured)))

    def _filter_step(self, h, z, acted, pictured, noise, w_z, w_h):
        """h_t, and z_t with its mean and deviation, by looking."""
        h = self.gru(F.elu(F.linear(z, w_z) + acted), h).float()
        mean, std = self.posterior(h, pictured, w_h)
        return h, mean + std * noise, mean, std

    def _dream_step(self, h, z, action, noise):
        """The same without looking."""
        h = self.gru(F.elu(self.gru_in(torch.cat([z, action], -1))), h).float()
        mean, std = self.prior(h)
        return h, mean + std * noise, mean, std

    def observe(
        self, embedded: torch.Tensor, actions: torch.Tensor, start: Optional[tuple[torch.Tensor, torch.Tensor]] = None
    ) -> State:
        """The states [B, T, ...] along what was seen [B, T, E], and done before it [B, T, A]."""
        h, z = start or self.start(len(embedded))
        # A layer's product with [z, a] is the sum of its products with z and with a. What does not hang on the state
        # goes through its part for all times at once.
        w_z, w_a = self.gru_in.weight.split(self.split, 1)
        w_h, w_e = self.posterior_in.weight.split([self.deter, embedded.shape[-1]], 1)
        acted = F.linear(actions, w_a, self.gru_in.bias)  # [B, T, U]
        pictured = F.linear(embedded, w_e, self.posterior_in.bias)
        noise, states = torch.randn(*embedded.shape[:2], self.stoch, device=embedded.device), []
        step = self.filter_step if torch.is_grad_enabled() else self._filter_step  # compiled for learning alone
        for x in zip(acted.unbind(1), pictured.unbind(1), noise.unbind(1), strict=True):
            h, z, mean, std = step(h, z, *x, w_z, w_h)
            states.append((h, z, mean, std))
        return State(*(torch.stack(column, 1) for column in zip(*states, strict=True)))

    def foresee(self, h: torch.Tensor, z: torch.Tensor, actions: torch.Tensor) -> State:
        """The states [B, T, ...] that these actions [B, T, A] lead to, seeing nothing."""
        states = []
        for action in actions.unbind(1):
            states.append(self._dream_step(h, z, action, torch.randn_like(z)))
            h, z = states[-1][:2]
        return State(*(torch.stack(column, 1) for column in zip(*states, strict=True)))


class WorldModel(nn.Module):
    """Encoder, RSSM, decoder, reward, and with --ends the discount."""

    def __init__(self, shape: tuple[int, ...], actions: int, args: Args):
        super().__init__()
        self.args, self.images = args, len(shape) == 3
        width = args.deter_size + args.stoch_size
        if self.images:
            self.encoder = ImageEncoder(shape[0], shape[1], args.depth)
            self.decoder = ImageDecoder(width, shape[0], shape[1], args.depth)
            embedded = self.encoder.size
        else:
            self.encoder = nn.Sequential(dense(shape[0], args.dense_units, 1, args.dense_units), nn.ELU())
            self.decoder = dense(width, args.dense_units, 2, shape[0])
            self.register_buffer("mean", torch.zeros(shape))
            self.register_buffer("std", torch.ones(shape))
            embedded = args.dense_units
        self.reward_head = dense(width, args.dense_units, args.reward_layers, 1)
        self.discount_head = dense(width, args.dense_units, 3, 1) if args.ends else None
        self.apply(keras_weights)
        self.rssm = RSSM(embedded, actions, args)

    def see(self, obs: torch.Tensor) -> torch.Tensor:
        """What the networks are given for an observation, in learning and in acting."""
        return obs / 255 - 0.5 if self.images else (obs.float() - self.mean) / self.std

    def set_normalizer(self, obs: np.ndarray) -> None:
        if not self.images:
            std = torch.from_numpy(obs.std(0))
            self.mean.copy_(torch.from_numpy(obs.mean(0)))
            self.std.copy_(torch.where(std > 1e-6, std, 1.0))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, ...] → [B, T, E]: all pictures at once."""
        return self.encoder(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        return self.decoder(features.flatten(0, 1)).unflatten(0, features.shape[:2]).float()

    def rewards(self, features: torch.Tensor) -> torch.Tensor:
        return self.reward_head(features)[..., 0].float()

    def discounts(self, features: torch.Tensor) -> torch.Tensor:
        """γ, and less where an end is foreseen: the mean of a Bernoulli."""
        if self.discount_head is None:
            return torch.full(features.shape[:-1], self.args.gamma, device=features.device)
        return self.discount_head(features)[..., 0].float().sigmoid()


def gaussian_kl(p: tuple[torch.Tensor, torch.Tensor], q: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """KL(p ‖ q) of diagonal normals (mean, std), p the posterior and q the prior, summed over the last axis."""
    # KL = Σ log σ_q/σ_p + (σ_p² + (μ_p − μ_q)²) / 2σ_q² − ½
    (mean_p, std_p), (mean_q, std_q) = p, q
    return ((std_q / std_p).log() + (std_p.square() + (mean_p - mean_q).square()) / (2 * std_q.square()) - 0.5).sum(-1)


def free_kl(kl: torch.Tensor, mask: torch.Tensor, free_nats: float, each: bool) -> torch.Tensor:
    """The KL's mean over the rows that count [B, T]. Below the free nats it costs nothing, and has no gradient: the
    prior learns nothing then either."""
    if each:
        return masked_mean(kl.clamp(min=free_nats), mask)
    return masked_mean(kl, mask).clamp(min=free_nats)


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (x * mask).sum() / mask.sum()


def world_model_loss(
    world: WorldModel, batch: "Sequences", args: Args
) -> tuple[torch.Tensor, State, dict[str, torch.Tensor]]:
    """Step (1): the loss, the states that were inferred, and the loss's parts."""
    x, mask = world.see(batch.obs), batch.mask
    states = world.rssm.observe(world.encode(x), batch.action)
    features = states.features()
    # Eq. 10: J_REC = E[Σ ln q(o_t|s_t) + ln q(r_t|s_t) − β KL(p(s_t|s_{t−1}, a_{t−1}, o_t) ‖ q(s_t|s_{t−1}, a_{t−1}))]
    # A sum over pixels: their mean would make a picture worth less than the KL
    image = 0.5 * ((world.decode(features) - x) / args.decoder_std).square().flatten(2).sum(-1)
    reward = 0.5 * (world.rewards(features) - args.reward_scale * batch.reward).square()
    prior = world.rssm.prior(states.h)
    kl = gaussian_kl((states.mean, states.std), prior)
    parts = {"losses/image": masked_mean(image, mask), "losses/reward": masked_mean(reward, mask)}
    loss = parts["losses/image"] + parts["losses/reward"]
    loss = loss + args.kl_scale * free_kl(kl, mask, args.free_nats, args.free_each)
    if world.discount_head is not None:
        # A soft target: the head's mean is then the discount itself
        logits, target = world.discount_head(features)[..., 0].float(), args.gamma * (1 - batch.terminated.float())
        ends = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        parts["losses/ends"] = masked_mean(ends, mask)
        loss = loss + args.ends_scale * parts["losses/ends"]
    parts |= {
        "losses/world": loss, "model/kl": masked_mean(kl, mask),
        "model/prior_std": masked_mean(prior[1].mean(-1), mask),
        "model/posterior_std": masked_mean(states.std.mean(-1), mask),
    }  # fmt: skip
    return loss, states, parts


# ── Behaviour, learned in dreams ──────────────────────────────────────────────────────────────────────────────────


class ActionModel(nn.Module):
    """q_φ(a|s): a normal that tanh brings into (−1, 1), or a choice among Discrete actions. [..., F] → [..., A]"""

    def __init__(self, inputs: int, actions: int, discrete: bool, args: Args):
        super().__init__()
        self.discrete = discrete
        self.net = dense(inputs, args.dense_units, args.actor_layers, actions * (1 if discrete else 2))
        self.apply(keras_weights)
        self.raw_std = math.log(math.expm1(args.initial_std))  # softplus of it is the initial deviation

    def normal(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = self.net(features).float().chunk(2, -1)
        return 5 * torch.tanh(mean / 5), F.softplus(std + self.raw_std) + 1e-4

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """An action that gradients pass through."""
        if self.discrete:  # straight through: forward the choice, backward its chances
            chances = self.net(features).float().softmax(-1)
            choice = torch.multinomial(chances.flatten(0, -2), 1).view(chances.shape[:-1])
            return F.one_hot(choice, chances.shape[-1]) + chances - chances.detach()
        # Eq. 3: a = tanh(μ_φ(s) + σ_φ(s) ε), ε ~ N(0, 1)
        mean, std = self.normal(features)
        return torch.tanh(mean + std * torch.randn_like(mean))

    def best(self, features: torch.Tensor) -> torch.Tensor:
        """The deterministic policy."""
        if self.discrete:
            logits = self.net(features)
            return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
        return torch.tanh(self.normal(features)[0])


def dream(world: WorldModel, actor: ActionModel, h: torch.Tensor, z: torch.Tensor, horizon: int) -> torch.Tensor:
    """Step (2): from the states [N, ·] on, the features [N, H, F] of H states that follow; the first one is not
    among them."""
    features = []
    for _ in range(horizon):
        # The policy looks at the state and does not bend it: its gradient goes by its actions alone
        action = actor(torch.cat([z, h], -1).detach())
        h, z, _, _ = world.rssm.dream_step(h, z, action, torch.randn_like(z))
        features.append(torch.cat([z, h], -1))
    return torch.stack(features, 1)


def lambda_return(reward: torch.Tensor, value: torch.Tensor, discount: torch.Tensor, lambda_: float) -> torch.Tensor:
    """V_λ [N, H − 1] of all dreamed states [N, H] but the last, whose value stands for what comes after."""
    last, returns = value[:, -1], []
    for t in reversed(range(value.shape[1] - 1)):
        # Eq. 6: V_λ(s_t) = r_t + γ_t [(1 − λ) v(s_{t+1}) + λ V_λ(s_{t+1})]
        last = reward[:, t] + discount[:, t] * ((1 - lambda_) * value[:, t + 1] + lambda_ * last)
        returns.append(last)
    return torch.stack(returns[::-1], 1)


def dream_weights(discount: torch.Tensor) -> torch.Tensor:
    """[N, H] → [N, H − 1]: what the discounts before it leave of each dreamed state: 1, γ_1, γ_1 γ_2, ..."""
    return torch.cat([torch.ones_like(discount[:, :1]), discount[:, :-2]], 1).cumprod(1).detach()


def behaviour_losses(
    world: WorldModel, actor: ActionModel, value: nn.Module, states: State, alive: torch.Tensor, args: Args
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Steps (2) and (3): the losses of policy and value. `alive` [B, T] is 0 where no dream may begin."""
    h, z = states.h.detach().flatten(0, 1), states.z.detach().flatten(0, 1)  # [N, D], [N, Z], N = B · T
    alive = alive.flatten()[:, None]  # [N, 1]
    features = dream(world, actor, h, z, args.horizon)
    rewards, discounts = world.rewards(features), world.discounts(features)
    values = value(features)[..., 0].float()
    returns = lambda_return(rewards, values, discounts, args.return_lambda)
    weights = alive * dream_weights(discounts)
    count = alive.sum() * returns.shape[1]  # a mean over dreams and their states
    # Eq. 7: max_φ E[Σ_τ V_λ(s_τ)], each state weighted by the discounts before it, as in the released code
    actor_loss = -(weights * returns).sum() / count
    # Eq. 8: min_ψ E[Σ_τ ½ ‖v_ψ(s_τ) − V_λ(s_τ)‖²]
    value_loss = (weights * 0.5 * (values[:, :-1] - returns.detach()).square()).sum() / count
    parts = {"losses/actor": actor_loss, "losses/value": value_loss}
    for name, x in {"reward": rewards, "return": returns, "value": values}.items():
        parts[f"model/dreamed_{name}"] = (alive * x).sum() / (alive.sum() * x.shape[1])
    return actor_loss, value_loss, parts


class Dreamer:
    """World model, policy and value, with their optimisers."""

    def __init__(self, args: Args, env: gym.Env, device: torch.device):
        self.args, self.device = args, device
        self.discrete = isinstance(env.action_space, gym.spaces.Discrete)
        self.actions = int(env.action_space.n) if self.discrete else env.action_space.shape[0]
        width = args.deter_size + args.stoch_size
        self.world = WorldModel(env.observation_space.shape, self.actions, args).to(device)
        self.actor = ActionModel(width, self.actions, self.discrete, args).to(device)
        self.value = dense(width, args.dense_units, args.value_layers, 1).apply(keras_weights).to(device)
        rates = (args.world_learning_rate, args.actor_learning_rate, args.value_learning_rate)
        self.optimizers = {
            name: torch.optim.Adam(net.parameters(), rate, eps=args.adam_epsilon, fused=True)
            for (name, net), rate in zip(self.networks().items(), rates, strict=True)
        }

    def networks(self) -> dict[str, nn.Module]:
        return {"world": self.world, "actor": self.actor, "value": self.value}

    def gradient(self, name: str, loss: torch.Tensor, keep: bool = False) -> torch.Tensor:
        """Of this network's parameters alone: the policy's loss passes through the model and leaves it as it is."""
        parameters = list(self.networks()[name].parameters())
        self.optimizers[name].zero_grad()
        loss.backward(inputs=parameters, retain_graph=keep)
        return nn.utils.clip_grad_norm_(parameters, self.args.gradient_clip)

    def precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16)

    def step(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.step()

    def player(self, explore: float = 0.0, best: bool = False) -> Callable[[Any], Any]:
        """The policy for one episode: it remembers what it has seen and done."""
        (h, z), action = self.world.rssm.start(1), torch.zeros(1, self.actions, device=self.device)

        @torch.no_grad()
        def act(obs: np.ndarray) -> Any:
            nonlocal h, z, action
            x = self.world.see(torch.as_tensor(obs, device=self.device)[None, None])
            state = self.world.rssm.observe(self.world.encode(x), action[:, None], (h, z))
            h, z, features = state.h[:, 0], state.z[:, 0], state.features()[:, 0]
            action = self.actor.best(features) if best else self.actor(features)
            if explore and not self.discrete:
                action = (action + explore * torch.randn_like(action)).clamp(-1, 1)
            elif explore and np.random.rand() < explore:
                action = F.one_hot(torch.randint(self.actions, (1,), device=self.device), self.actions).float()
            return int(action.argmax()) if self.discrete else action[0].cpu().numpy()

        return act

    def as_numbers(self, action: Any) -> np.ndarray:
        """An action of the environment as the model reads it."""
        return np.eye(self.actions, dtype=np.float32)[action] if self.discrete else np.asarray(action, np.float32)

    def learned(self) -> dict:
        return {name: net.state_dict() for name, net in self.networks().items()}

    def load(self, learned: dict, optimizers: Optional[dict] = None) -> None:
        for name, net in self.networks().items():
            net.load_state_dict(learned[name])
            if optimizers:
                self.optimizers[name].load_state_dict(optimizers[name])


# ── What the model believes: measured, and drawn ──────────────────────────────────────────────────────────────────


@torch.no_grad()
def seen_then_foreseen(world: WorldModel, batch: "Sequences", context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Observations [B, T, ...] and rewards [B, T] as the model has them: of the first `context` rows it sees what was
    seen, then no more, and takes the same actions."""
    embedded = world.encode(world.see(batch.obs[:, :context]))
    states = world.rssm.observe(embedded, batch.action[:, :context])
    ahead = world.rssm.foresee(states.h[:, -1], states.z[:, -1], batch.action[:, context:])
    features = torch.cat([states.features(), ahead.features()], 1)
    return world.decode(features), world.rewards(features) / world.args.reward_scale


@torch.no_grad()
def unseen_metrics(world: WorldModel, replay: "SequenceReplay", args: Args) -> dict[str, float]:
    """On the latest episode, before anything was learned from it."""
    start, length = replay.last_episode()
    whole = replay.cut(start, length, min(length, args.batch_length), 8)
    metrics = {"model/heldout_loss": world_model_loss(world, whole, args)[0].item()}
    context = 5
    for horizon in (1, 5, 15, 45):
        if length >= context + horizon:
            batch = replay.cut(start, length, context + horizon, 8)
            obs, reward = seen_then_foreseen(world, batch, context)
            # ½ of the mean square, after so many steps without looking
            error = 0.5 * (obs[:, -1] - world.see(batch.obs[:, -1])).square().mean()
            metrics[f"model/open_loop_error_{horizon}"] = error.item()
            error = 0.5 * (reward[:, -1] - batch.reward[:, -1]).square().mean()
            metrics[f"model/reward_error_{horizon}"] = error.item()
    return metrics


def draw_dream(
    truth: np.ndarray, believed: np.ndarray, reward: np.ndarray, expected: np.ndarray, context: int, title: str
) -> np.ndarray:
    """The picture: one sequence as it was and as the model has it, which sees `context` rows and then dreams. Pictures
    [T, S, S, C] from 0 to 1 as a strip, numbers [T, D] as curves; and the rewards [T]."""
    pictures, steps = truth.ndim == 4, np.arange(len(truth))
    panels = 1 if pictures else min(truth.shape[1], 5)
    figure = Figure(figsize=(9, 3.9 if pictures else 1.3 * (panels + 1)), dpi=80)
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(panels + 1, 1, height_ratios=[*[2.2 if pictures else 1] * panels, 1])
    if pictures:
        chosen = np.unique(np.linspace(0, len(truth) - 1, 12).round().astype(int))
        error = np.abs(believed - truth)
        rows = [np.concatenate(list(np.pad(x[chosen], ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1)), 1)
                for x in (truth, believed, error)]  # fmt: skip
        strip = np.concatenate(rows)
        axes[0].imshow(strip if strip.shape[-1] == 3 else strip[..., 0], cmap="gray", vmin=0, vmax=1, aspect="auto")
        side = truth.shape[1] + 2
        axes[0].set_xticks((np.arange(len(chosen)) + 0.5) * side, [str(x) for x in chosen], fontsize=7)
        axes[0].set_yticks((np.arange(3) + 0.5) * side, ["truth", "model", "error"], fontsize=8)
    for axis, name, real, model in zip(
        axes[1:] if pictures else axes,
        ["reward"] if pictures else [*(f"o[{i}]" for i in range(panels)), "reward"],
        [reward] if pictures else [*truth.T[:panels], reward],
        [expected] if pictures else [*believed.T[:panels], expected],
        strict=True,
    ):
        axis.plot(steps, real, color="black", linewidth=1, label="truth")
        axis.plot(steps, model, color="tab:orange", linewidth=1, label="model")
        axis.axvspan(0, context - 1, color="gray", alpha=0.25, linewidth=0)
        axis.set_ylabel(name, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.margins(x=0)
    axes[-1].legend(fontsize=7, loc="lower right")
    axes[-1].set_xlabel("step; grey: what the model sees, then it dreams", fontsize=8)
    figure.tight_layout(pad=0.4)
    return figure_to_array(figure)


def dream_film(truth: np.ndarray, believed: np.ndarray) -> list[np.ndarray]:
    """Truth, model and error one above the other, sequences [B, T, S, S, C] side by side: a frame for each step."""
    rows = np.concatenate([np.concatenate(list(x), 2) for x in (truth, believed, np.abs(believed - truth))], 1)
    frames = (255 * rows).astype(np.uint8).repeat(3, 1).repeat(3, 2)
    return list(frames if frames.shape[-1] == 3 else frames.repeat(3, -1))


# ── Training ──────────────────────────────────────────────────────────────────────────────────────────────────────


def check_settings(args: Args) -> None:
    """Every wrong setting that can be seen before training starts, as one sentence."""
    check_run_settings(args)
    for least, names in (
        (1, ("random_steps", "train_every", "updates", "batch_size", "action_repeat", "deter_size", "stoch_size")),
        (1, ("units", "depth", "dense_units", "reward_layers", "value_layers", "actor_layers")),
        (2, ("batch_length", "horizon")),  # the last dreamed state has no return of its own
        (0, ("pretrain",)),
    ):
        for name in names:
            if getattr(args, name) < least:
                stop(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least {least}")
    if args.image_size not in (32, 64):
        stop(f"--image-size is {args.image_size}: the convolutions are made for 32 or 64")
    if not 0 <= args.gamma < 1 or not 0 <= args.return_lambda <= 1:
        stop("--gamma must lie in [0, 1), --return-lambda in [0, 1]")
    for name in ("world_learning_rate", "actor_learning_rate", "value_learning_rate", "gradient_clip", "decoder_std",
                 "reward_scale", "initial_std", "adam_epsilon"):  # fmt: skip
        if getattr(args, name) <= 0:
            stop(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be above 0")
    for name in ("kl_scale", "free_nats", "ends_scale", "exploration"):
        if getattr(args, name) < 0:
            stop(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least 0")


def load_policy(args: Args, env: gym.Env, checkpoint: dict) -> Callable[[], Callable[[Any], Any]]:
    """For --evaluate: what makes the policy of a checkpoint, for each episode anew."""
    dreamer = Dreamer(args, env, pick_device(args.device))
    dreamer.load(checkpoint["learned"])
    return lambda: dreamer.player(best=True)


def train(args: Args) -> Path:
    device = pick_device(args.device)
    print(f"device: {device}")
    seed_everything(args.seed)
    env, eval_env = make_task(args), make_task(args, render=args.capture_video)
    env.action_space.seed(args.seed)
    run_dir, checkpoint = open_run(args)

    dreamer = Dreamer(args, env, device)
    # Room for every step, and for a reset's row with each: nothing is forgotten. A file takes no room that is not used.
    capacity = 2 * (args.total_timesteps // args.action_repeat + 1)
    pictures = run_dir / "replay.dat" if args.obs == "pixels" else None
    if checkpoint and pictures:
        needed = checkpoint["replay"]["size"] * math.prod(env.observation_space.shape)
        if not pictures.is_file() or pictures.stat().st_size < needed:
            stop(f"{run_dir} holds no whole replay.dat, the pictures that were seen: the run can't go on")
    replay = SequenceReplay(capacity, env.observation_space, dreamer.actions, pictures, device)
    step, learning = 0, False
    if checkpoint:
        step, learning = checkpoint["step"], checkpoint["learning"]
        dreamer.load(checkpoint["learned"], checkpoint["optimisers"])
        replay.load_state_dict(checkpoint["replay"])
        set_env_state(env, checkpoint["env"])
        set_random_states(checkpoint["random"])
    if args.total_timesteps <= args.random_steps:
        print(f"nothing will be learned: the first {args.random_steps:,} steps are random (--random-steps)")
    log = RunLog(args, run_dir, checkpoint)
    for film in run_dir.glob("dreams/step_*"):
        if int(film.stem.removeprefix("step_")) > step:  # of steps that are taken again
            film.unlink()

    # These three look at the variables of the loop as they are when they are called, and leave the dice alone.
    def save() -> None:
        optimizers = {name: optimizer.state_dict() for name, optimizer in dreamer.optimizers.items()}
        save_checkpoint(
            run_dir, step=step, learning=learning, learned=dreamer.learned(), optimisers=optimizers,
            replay=replay.state_dict(), env=env_state(env), log=log.state_dict(),
        )  # fmt: skip
        log.lap("log")

    def measure() -> None:
        before = random_states()
        set_env_state(eval_env, env_state(env), generators=False)
        log.evaluation(step, lambda: dreamer.player(best=True), eval_env)
        set_random_states(before)

    def draw() -> None:
        before, context = random_states(), 5
        start, length = replay.last_episode()
        context = min(context, length - 1)
        batch = replay.cut(start, length, min(length, 50), 3)
        believed, expected = seen_then_foreseen(dreamer.world, batch, context)
        truth, believed = dreamer.world.see(batch.obs).cpu().numpy(), believed.cpu().numpy()
        if dreamer.world.images:
            truth, believed = ((x + 0.5).clip(0, 1).transpose(0, 1, 3, 4, 2) for x in (truth, believed))
            save_gif(dream_film(truth, believed), run_dir / "dreams" / f"step_{step:08d}.gif")
        rewards = (x[0].cpu().numpy() for x in (batch.reward, expected))
        log.picture(step, draw_dream(truth[0], believed[0], *rewards, context, f"{args.env_id}: step {step:,}"))
        set_random_states(before)

    obs, _ = env.reset(seed=None if checkpoint else args.seed)
    replay.begin(obs)
    player, episode_return, episode_length = dreamer.player(args.exploration), 0.0, 0
    with StopSignal() as stop_signal:
        while step < args.total_timesteps:
            count = args.updates if learning and log.due("train", args.train_every, step) else 0
            if not learning and step >= args.random_steps and episode_length == 0 and replay.starts:
                learning, count = True, args.pretrain
                log.due("train", args.train_every, step)  # these stand for that round
                dreamer.world.set_normalizer(replay.obs[: replay.size])
                log.start_clock(step)
            for _ in range(count):
                if stop_signal.to_stop(False):
                    break
                # (1) the world model learns to reconstruct and to foresee sequences
                batch = replay.sample(args.batch_size, args.batch_length, args.balance_ends)
                with dreamer.precision():
                    loss, states, parts = world_model_loss(dreamer.world, batch, args)
                norms = {"world": dreamer.gradient("world", loss)}
                log.lap("model")
                # (2) from their states dream H steps with the policy; the λ-returns
                with dreamer.precision():
                    networks = dreamer.world, dreamer.actor, dreamer.value
                    actor_loss, value_loss, more = behaviour_losses(*networks, states, batch.alive(), args)
                # (3) the policy climbs the returns' gradient through the dream; the value learns to foresee them
                norms["value"] = dreamer.gradient("value", value_loss, keep=True)
                norms["actor"] = dreamer.gradient("actor", actor_loss)
                dreamer.step()  # all gradients are taken before any weight moves, as in the released code
                for tag, value in {**parts, **more, **{f"losses/norm_{k}": v for k, v in norms.items()}}.items():
                    log.mean(tag, value)
                log.lap("behaviour")

            # (4) infer the state from what is seen, act with some noise, keep what happens
            action = player(obs) if learning else env.action_space.sample()
            log.lap("policy")
            obs, reward, terminated, truncated, _ = env.step(action)
            reward, over = float(reward), bool(terminated or truncated)
            step += args.action_repeat
            if not math.isfinite(reward) or not np.isfinite(obs).all():
                stop(f"{args.env_id} gave the reward {reward} and {obs} at step {step:,}: nothing to learn from")
            replay.add(obs, dreamer.as_numbers(action), reward, terminated, over)
            episode_return, episode_length = episode_return + reward, episode_length + 1
            log.lap("env")

            log.bar.update(args.action_repeat)
            if over:
                log.episode(step, episode_return, episode_length)
                if learning and log.due("heldout", args.log_every, step):
                    before = random_states()
                    log.scalars(step, unseen_metrics(dreamer.world, replay, args))
                    set_random_states(before)
            if log.due("log", args.log_every, step):
                log.flush(step)
            if log.due("eval", args.eval_every, step) and step < args.total_timesteps:
                measure()
            if log.due("picture", args.picture_every, step, at_most=20, wait_for=over) and step < args.total_timesteps:
                draw()
            if over and step < args.total_timesteps:
                if log.due("checkpoint", args.checkpoint_every, step, wait_for=True):
                    save()
                if stop_signal.to_stop(True):
                    break
                obs, _ = env.reset()
                replay.begin(obs)
                player, episode_return, episode_length = dreamer.player(args.exploration), 0.0, 0
                log.lap("env")
            elif log.due("checkpoint", args.checkpoint_every, step, wait_for=False):
                save()
            if stop_signal.to_stop(False):
                break
        save()
    if stop_signal.number and step < args.total_timesteps:
        log.stopped(step, stop_signal.number)
    if step >= args.total_timesteps > args.random_steps and not learning:
        print(f"nothing was learned: no episode ended between the {args.random_steps:,} random steps and the last one")
    measure()
    if args.picture_every:
        draw()
    log.finish(step)
    env.close()
    eval_env.close()
    return run_dir


# ── The tasks ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Repeat(gym.Wrapper):
    """Each action is taken several times."""

    def __init__(self, env: gym.Env, times: int):
        super().__init__(env)
        self.times = times

    def step(self, action: Any) -> tuple:
        total = 0.0
        for _ in range(self.times):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, info


def is_image(space: gym.Space) -> bool:
    """[H, W, 1 or 3] uint8"""
    return isinstance(space, gym.spaces.Box) and space.dtype == np.uint8 and space.shape[2:] in ((1,), (3,))


class Pictures(gym.Wrapper):
    """What a camera sees, or an observation that is an image: [3, S, S] uint8."""

    def __init__(self, env: gym.Env, size: int):
        super().__init__(env)
        self.size = size
        self.own = is_image(env.observation_space)
        self.observation_space = gym.spaces.Box(0, 255, (3, size, size), np.uint8)
        self.renderer = getattr(env.unwrapped, "mujoco_renderer", None)

    def close(self) -> None:
        self.use_context()  # else MuJoCo frees what is another environment's
        super().close()

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        obs, info = self.env.reset(**kwargs)
        return self.picture(obs), info

    def step(self, action: Any) -> tuple:
        obs, *rest = self.env.step(action)
        return self.picture(obs), *rest

    def use_context(self) -> None:
        """Of several environments in a process MuJoCo gives each one its own."""
        if self.renderer and self.renderer.viewer:
            self.renderer.viewer.make_context_current()

    def picture(self, obs: Any) -> np.ndarray:
        if not self.own:
            self.use_context()
        frame = np.asarray(obs if self.own else self.env.render())
        frame = frame[..., 0] if frame.shape[-1] == 1 else frame
        image = Image.fromarray(frame).convert("RGB").resize((self.size, self.size), Image.Resampling.BOX)
        return np.array(image).transpose(2, 0, 1).copy()


def cheap_pictures(model: Any, size: int) -> None:
    """Without smoothed edges and shadows MuJoCo draws small pictures ten times as fast."""
    model.vis.quality.offsamples, model.vis.quality.shadowsize = 0, 0
    model.vis.global_.offwidth, model.vis.global_.offheight = size, size


class ControlSuite(gym.Env):
    """A task of the DeepMind control suite, `ControlSuite/walker-walk`. Its end is a time limit, except where its
    discount says otherwise."""

    metadata = {"render_modes": ["rgb_array"]}
    INSTALL = 'pip install dm_control "mujoco<4"'

    def __init__(self, name: str, size: int):
        try:
            from dm_control import suite
        except ModuleNotFoundError:
            raise gym.error.DependencyNotInstalled(self.INSTALL) from None
        self.domain, self.task = name.split("-", 1)
        self.render_mode, self.size = "rgb_array", size
        try:
            self.control = suite.load(self.domain, self.task, task_kwargs={"random": 0})
        except AttributeError as error:  # dm_control 1.0 reads names that MuJoCo 4 has no more
            raise gym.error.DependencyNotInstalled(f"{self.INSTALL}, for {error}") from None
        cheap_pictures(self.control.physics.model, size)
        spec = self.control.action_spec()
        self.action_space = gym.spaces.Box(spec.minimum.astype(np.float32), spec.maximum.astype(np.float32))
        count = sum(math.prod(x.shape) for x in self.control.observation_spec().values())
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (count,), np.float32)

    def reset(self, *, seed: Optional[int] = None, options: Optional[dict] = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        # The task draws its own numbers: from a seed that this environment's generator gives, which checkpoints hold
        self.control.task._random = np.random.RandomState(self.np_random.integers(2**31))
        return self.numbers(self.control.reset()), {}

    def step(self, action: np.ndarray) -> tuple:
        time_step = self.control.step(action)
        ended = time_step.last() and time_step.discount == 0
        return self.numbers(time_step), time_step.reward or 0.0, ended, time_step.last() and not ended, {}

    def numbers(self, time_step: Any) -> np.ndarray:
        return np.concatenate([np.ravel(x) for x in time_step.observation.values()]).astype(np.float32)

    def render(self) -> np.ndarray:
        camera = 2 if self.domain == "quadruped" else 0
        return self.control.physics.render(self.size, self.size, camera_id=camera)


def make_task(args: Args, render: bool = False) -> gym.Env:
    """The environment as the agent meets it: pictures or numbers, actions in [−1, 1] or Discrete."""
    pixels, name = args.obs == "pixels", args.env_id.removeprefix("ControlSuite/")
    draws = render or (pixels and (name != args.env_id or not is_image(make_env(args.env_id).observation_space)))
    if draws and sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        os.environ.setdefault("MUJOCO_GL", "egl")
    size = args.image_size if pixels else 240
    if name != args.env_id:
        if args.env_id not in gym.registry and name.count("-") == 1:
            gym.register(args.env_id, lambda **kwargs: ControlSuite(name, **kwargs), max_episode_steps=1000)
        env = make_env(args.env_id, size=size)
    else:
        settings = {"render_mode": "rgb_array"} if draws else {}
        env = make_env(args.env_id, **settings)
        if draws and hasattr(env.unwrapped, "mujoco_renderer"):
            model, renderer = env.unwrapped.model, env.unwrapped.mujoco_renderer
            cheap_pictures(model, size)
            renderer.width = renderer.height = size
            cameras = [model.camera(i).name for i in range(model.ncam)]
            if pixels and "track" in cameras:  # the default one stands still, and the robot runs out of its picture
                renderer.camera_id = cameras.index("track")
    if isinstance(env.action_space, gym.spaces.Box):
        actions = env.action_space
        if len(actions.shape) != 1 or not np.isfinite([actions.low, actions.high]).all():
            stop(f"the actions of {args.env_id} are {actions}: the policy gives one bounded vector of numbers")
        env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    elif not isinstance(env.action_space, gym.spaces.Discrete) or env.action_space.start != 0:
        stop(f"the actions of {args.env_id} are {env.action_space}: the policy gives a vector, or a choice from 0 on")
    if args.action_repeat > 1:
        env = Repeat(env, args.action_repeat)
    if pixels:
        env = Pictures(env, args.image_size)
    else:
        observations = env.observation_space
        if not isinstance(observations, gym.spaces.Box) or len(observations.shape) != 1:
            stop(f"the observations of {args.env_id} are {observations}, no vector of numbers: use --obs pixels")
        if observations.dtype != np.float32:
            env = gym.wrappers.DtypeObservation(env, np.float32)
    if draws:  # what can't be drawn shows here, not after an hour of training
        try:
            env.reset()
            drawn = env.render()
        except Exception as error:  # whatever the environment's own code may raise
            stop(f"{args.env_id} can't be drawn: {type(error).__name__}: {error}".replace("\n", " "))
        if not isinstance(drawn, np.ndarray):
            stop(f"{args.env_id} draws no pictures: use --obs vector, without --capture-video")
    return env


class Sequences(NamedTuple):
    """Rows [B, T, ...]; `mask` is 0 where an episode was too short and is filled up."""

    obs: torch.Tensor
    action: torch.Tensor
    reward: torch.Tensor
    terminated: torch.Tensor
    mask: torch.Tensor

    def alive(self) -> torch.Tensor:
        """[B, T], 0 where no dream may begin: after an end nothing comes."""
        return self.mask * ~self.terminated


class SequenceReplay:
    """All episodes, row after row, in the docstring's count of time; pictures in a memory-mapped file. What is drawn
    lies inside one episode, and is drawn when that is over."""

    def __init__(
        self, capacity: int, observations: gym.spaces.Box, actions: int, path: Optional[Path], device: torch.device
    ):
        shape, dtype = (capacity, *observations.shape), observations.dtype
        if path:
            self.obs = np.memmap(path, dtype, mode="r+" if path.exists() else "w+", shape=shape)
        else:
            self.obs = np.zeros(shape, dtype)
        self.in_file, self.device, self.size = path is not None, device, 0
        self.columns = {
            "action": np.zeros((capacity, actions), np.float32), "reward": np.zeros(capacity, np.float32),
            "terminated": np.zeros(capacity, bool), "last": np.zeros(capacity, bool),
        }  # fmt: skip
        self.starts, self.lengths, self.open_from = [], [], 0  # of the episodes that are over; where the present began

    def begin(self, obs: np.ndarray) -> None:
        """What a reset showed."""
        self.open_from = self.size
        self.add(obs, 0.0, 0.0, False, False)

    def add(self, obs: np.ndarray, action: Any, reward: float, terminated: bool, last: bool) -> None:
        self.obs[self.size] = obs
        for column, value in zip(self.columns.values(), (action, reward, terminated, last), strict=True):
            column[self.size] = value
        self.size += 1
        if last:
            self.close()

    def close(self) -> None:
        self.starts.append(self.open_from)
        self.lengths.append(self.size - self.open_from)
        self.open_from = self.size

    def rows(self, index: np.ndarray, mask: np.ndarray) -> Sequences:
        columns = [self.columns[name][index] for name in ("action", "reward", "terminated")]
        arrays = (np.asarray(self.obs[index]), *columns, mask.astype(np.float32))
        return Sequences(*(torch.from_numpy(x).to(self.device) for x in arrays))

    def sample(self, batch_size: int, length: int, balance_ends: bool = False) -> Sequences:
        """An episode at random, and from a row at random that leaves room for `length`."""
        chosen = np.random.randint(len(self.starts), size=batch_size)
        starts, lengths = np.array(self.starts)[chosen], np.array(self.lengths)[chosen]
        room = np.maximum(lengths - length, 0)
        # randint leaves out its upper end; without the 1 no last row would ever be seen
        offset = np.minimum(np.random.randint(lengths), room) if balance_ends else np.random.randint(room + 1)
        within = offset[:, None] + np.arange(length)
        return self.rows(starts[:, None] + np.minimum(within, lengths[:, None] - 1), within < lengths[:, None])

    def cut(self, start: int, rows: int, length: int, pieces: int) -> Sequences:
        """Up to so many pieces of one episode, evenly spread, the first from its beginning."""
        offsets = np.unique(np.linspace(0, rows - length, pieces).round().astype(int))
        index = start + offsets[:, None] + np.arange(length)
        return self.rows(index, np.ones(index.shape))

    def last_episode(self) -> tuple[int, int]:
        """First row and number of rows; the present one where none is over."""
        if not self.starts:
            return self.open_from, self.size - self.open_from
        return self.starts[-1], self.lengths[-1]

    def state_dict(self) -> dict:
        if self.in_file:
            self.obs.flush()
        columns = {name: torch.from_numpy(column[: self.size]) for name, column in self.columns.items()}
        if not self.in_file:
            columns["obs"] = torch.from_numpy(self.obs[: self.size])
        return {"columns": columns, "size": self.size, "starts": self.starts, "lengths": self.lengths,
                "open_from": self.open_from}  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        columns = dict(state["columns"])
        self.size, self.starts, self.lengths = state["size"], list(state["starts"]), list(state["lengths"])
        self.open_from = state["open_from"]
        if not self.in_file:
            self.obs[: self.size] = columns.pop("obs").numpy()
        for name, saved in columns.items():
            self.columns[name][: self.size] = saved.numpy()
        if self.open_from < self.size:  # a run cut inside an episode begins a new one: an end, no terminal one
            self.columns["last"][self.size - 1] = True
            self.close()


# ── Plumbing: nothing below is particular to the algorithm ────────────────────────────────────────────────────────


def make_env(env_id: str, render: bool = False, **kwargs: Any) -> gym.Env:
    if "" not in sys.path:
        sys.path.append("")  # for module:Env-v0, a module in the folder where the user stands
    if render:
        kwargs["render_mode"] = "rgb_array"
        if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            os.environ.setdefault("MUJOCO_GL", "egl")  # without a screen MuJoCo would else end the process
    try:
        env = gym.make(env_id, disable_env_checker=True, **kwargs)
        if render:  # what can't be drawn shows here, not after an hour of training
            env.reset()
            if not isinstance(env.render(), np.ndarray):
                stop(f"{env_id} draws no rgb_array: leave out --capture-video")
    except (gym.error.DependencyNotInstalled, ModuleNotFoundError) as error:
        stop(f"{env_id} needs a package that is not installed: {error}")
    except Exception as error:  # whatever the environment's own code may raise
        stop(f"{env_id!r} can't be made: {type(error).__name__}: {error}".replace("\n", " "))
    return env


def env_state(env: gym.Env) -> dict:
    """What an environment carries from one episode to the next: its generators, and what it says itself."""
    own = env.unwrapped.state_dict() if hasattr(env.unwrapped, "state_dict") else None
    generators = [x.np_random.bit_generator.state for x in (env.unwrapped, env.action_space)]
    return {"generators": generators, "own": own}


def set_env_state(env: gym.Env, state: dict, generators: bool = True) -> None:
    if generators:
        for x, saved in zip((env.unwrapped, env.action_space), state["generators"], strict=True):
            x.np_random.bit_generator.state = saved
    if state["own"] is not None:
        env.unwrapped.load_state_dict(state["own"])


def arrays_to_tensors(tree: Any) -> Any:
    """A checkpoint is read back as tensors and plain values only, so that no foreign code can hide in it."""
    if isinstance(tree, dict):
        return {key: arrays_to_tensors(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [arrays_to_tensors(value) for value in tree]
    if isinstance(tree, tuple):
        return tuple(arrays_to_tensors(value) for value in tree)
    if isinstance(tree, np.generic):
        return tree.item()
    return torch.from_numpy(tree.copy()) if isinstance(tree, np.ndarray) else tree


def evaluate(
    new_policy: Callable[[], Callable[[Any], Any]],
    env: gym.Env,
    episodes: int,
    seed: int,
    max_steps: int,
    frames: Optional[list] = None,
) -> tuple[list[float], list[int]]:
    """Returns and lengths of episodes, cut at `max_steps`, each with a policy made anew (some remember). The same seed
    gives the same episodes, and training's dice stay as they were. `frames` collects the first episode's pictures."""
    before = random_states()
    seed_everything(seed + 10_000)
    returns, lengths = [], []
    for episode in range(episodes):
        policy = new_policy()
        obs, _ = env.reset(seed=seed + 10_000 + episode)
        episode_return, length, over = 0.0, 0, False
        while not over and length < max_steps:
            if frames is not None and episode == 0:
                frames.append(thumbnail(env.render()))
            obs, reward, terminated, truncated, _ = env.step(policy(obs))
            episode_return, length = episode_return + float(reward), length + 1
            over = terminated or truncated
        if frames is not None and episode == 0:
            frames.append(thumbnail(env.render()))
        returns.append(episode_return)
        lengths.append(length)
    set_random_states(before)
    return returns, lengths


def play(args: Any) -> tuple[list[float], list[int]]:
    """--evaluate: load a checkpoint, play, print the scores."""
    seed_everything(args.seed)
    run_dir, checkpoint = Path(args.evaluate), load_checkpoint(Path(args.evaluate))
    env = make_task(args, render=args.capture_video)
    set_env_state(env, checkpoint["env"], generators=False)
    frames = [] if args.capture_video else None
    new_policy = load_policy(args, env, checkpoint)
    returns, lengths = evaluate(new_policy, env, args.episodes, args.seed, args.eval_max_steps, frames)
    print(f"{ALGORITHM} on {args.env_id}, trained for {checkpoint['step']:,} steps: {score_line(returns, lengths)}")
    if frames:
        save_gif(frames, run_dir / "videos" / "evaluation.gif")
        print(f"video:   {run_dir / 'videos' / 'evaluation.gif'}")
    return returns, lengths


def score_line(returns: list[float], lengths: list[int]) -> str:
    return (
        f"return {np.mean(returns):.2f} (min {min(returns):.2f}, max {max(returns):.2f}), "
        f"length {np.mean(lengths):.1f}, over {len(returns)} episodes of the deterministic policy"
    )


def figure_to_array(figure: Figure) -> np.ndarray:
    """[H, W, 3] uint8"""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def thumbnail(frame: np.ndarray, size: int = 320) -> np.ndarray:
    image = Image.fromarray(frame)
    image.thumbnail((size, size))
    return np.asarray(image)


def save_gif(frames: list[np.ndarray], path: Path, fps: float = 10, at_most: int = 300) -> None:
    # Pillow, for torch's add_video writes nothing, silently, where moviepy 2 is installed.
    every = -(-len(frames) // at_most)  # of a long film every second, third, ... frame
    images = [Image.fromarray(frame) for frame in frames[::every]]
    path.parent.mkdir(exist_ok=True)
    images[0].save(path, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)


class RunLog:
    """One run's TensorBoard events, pictures and progress bar."""

    def __init__(self, args: Any, run_dir: Path, checkpoint: Optional[dict]):
        self.args, self.run_dir = args, run_dir
        step = checkpoint["step"] if checkpoint else 0
        # TensorBoard takes a run's files in the order of their names, and those begin with the second.
        while any(run_dir.glob(f"events.out.tfevents.{int(time.time())}.*")):
            time.sleep(0.05)
        # A run killed after its last checkpoint takes those steps again: purge_step hides the first taking.
        self.writer = SummaryWriter(str(run_dir), purge_step=step + 1 if checkpoint else None)
        self.sums, self.numbers, self.last = {}, {}, {}
        if checkpoint:
            vars(self).update(checkpoint["log"])
            for path in [*run_dir.glob("frames/step_*"), *run_dir.glob("videos/step_*")]:
                if int(path.stem.removeprefix("step_")) > step:
                    path.unlink()
        else:
            rows = "".join(f"\n|{name}|{value}|" for name, value in asdict(args).items())
            self.writer.add_text("hyperparameters", f"|setting|value|\n|-|-|{rows}")
        hidden = None if args.progress else True  # None: hidden where the output is no terminal
        self.bar = tqdm(total=args.total_timesteps, initial=step, disable=hidden, unit=" steps", dynamic_ncols=True)
        self.start_clock(step)

    def state_dict(self) -> dict:
        return {"sums": {k: float(v) for k, v in self.sums.items()}, "numbers": self.numbers, "last": self.last}

    def start_clock(self, step: int) -> None:
        """Speed and shares of the time count from here: call it again at the end of a warm-up."""
        self.first_step, self.spent = step, defaultdict(float)
        self.began = self.last_lap = time.perf_counter()

    def lap(self, name: str) -> None:
        """The time since the last lap went into `name`."""
        now = time.perf_counter()
        self.spent[name] += now - self.last_lap
        self.last_lap = now

    def due(self, what: str, every: int, step: int, at_most: float = math.inf, wait_for: bool = True) -> bool:
        """Once in every `every` steps, never where that is 0; while `wait_for` is false later, by as much at most."""
        times, last = self.last.get(what, (0, 0))
        if every == 0 or step // every == last // every or times >= at_most:
            return False
        if not wait_for and step - last < 2 * every:
            return False
        self.last[what] = (times + 1, step)
        return True

    def mean(self, tag: str, value: Any) -> None:
        """Collect until the flush writes the mean; a tensor stays on its device until then."""
        value = value.detach() if isinstance(value, torch.Tensor) else value
        self.sums[tag] = self.sums.get(tag, 0.0) + value
        self.numbers[tag] = self.numbers.get(tag, 0) + 1

    def flush(self, step: int) -> None:
        seconds = time.perf_counter() - self.began
        shares = {f"time/{name}": spent / seconds for name, spent in self.spent.items()}
        means = {tag: float(total) / self.numbers[tag] for tag, total in self.sums.items()}
        self.sums, self.numbers = {}, {}
        self.scalars(step, {**means, **shares, "charts/SPS": (step - self.first_step) / seconds})

    def scalars(self, step: int, values: dict) -> None:
        for tag, value in values.items():
            self.writer.add_scalar(tag, float(value), step)
        self.lap("log")

    def episode(self, step: int, episode_return: float, length: int) -> None:
        self.scalars(step, {"charts/episodic_return": episode_return, "charts/episodic_length": length})
        self.bar.set_postfix_str(f"return {episode_return:.4g}", refresh=False)

    def evaluation(self, step: int, new_policy: Callable[[], Callable[[Any], Any]], env: gym.Env) -> None:
        args, frames = self.args, [] if self.args.capture_video else None
        self.scores = evaluate(new_policy, env, args.eval_episodes, args.seed, args.eval_max_steps, frames)
        returns, lengths = self.scores
        self.scalars(step, {"eval/episodic_return": np.mean(returns), "eval/episodic_length": np.mean(lengths)})
        if frames:
            save_gif(frames, self.run_dir / "videos" / f"step_{step:08d}.gif")
            self.lap("log")

    def picture(self, step: int, image: np.ndarray) -> None:
        """To TensorBoard, to the frames of picture.gif, and as the latest picture.png."""
        self.writer.add_image("model/picture", image, step, dataformats="HWC")
        for path in (self.run_dir / "frames" / f"step_{step:08d}.png", self.run_dir / "picture.png"):
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(image).save(path)
        self.lap("log")

    def finish(self, step: int) -> None:
        if self.sums:
            self.flush(step)
        self.bar.close()
        self.writer.close()
        print(f"{ALGORITHM} on {self.args.env_id}, {step:,} steps: {score_line(*self.scores)}")
        if frames := sorted((self.run_dir / "frames").glob("*.png")):
            save_gif([np.asarray(Image.open(frame)) for frame in frames], self.run_dir / "picture.gif", fps=4)
            print(f"picture: {self.run_dir / 'picture.png'}, and picture.gif beside it")
        if self.args.capture_video:
            print(f"videos:  {self.run_dir / 'videos'}")
        print(f"curves:  tensorboard --logdir {self.run_dir}")

    def stopped(self, step: int, number: int) -> None:
        self.bar.close()
        self.writer.close()
        print(f"stopped at step {step:,}; to go on: python {sys.argv[0]} --resume {shlex.quote(str(self.run_dir))}")
        raise SystemExit(128 + number)


class StopSignal:
    """Ctrl-C and SIGTERM end the run at the end of the episode, so that it can go on to the same bit; an episode that
    outlasts 30 or 5 seconds is cut. A second signal ends the program at once: the last checkpoint stays whole."""

    PATIENCE = {signal.SIGINT: 30.0, signal.SIGTERM: 5.0}

    def __init__(self):
        self.number, self.deadline, self.handlers = 0, math.inf, {}

    def __enter__(self) -> "StopSignal":
        for number in self.PATIENCE:
            self.handlers[number] = signal.signal(number, self.on_signal)
        return self

    def on_signal(self, number: int, frame: Any) -> None:
        self.number, self.deadline = number, time.monotonic() + self.PATIENCE[number]
        self.__exit__()
        os.write(2, b"\nstopping at the end of this episode; a second signal stops at once\n")  # print may be under way

    def to_stop(self, episode_over: bool) -> bool:
        return self.number != 0 and (episode_over or time.monotonic() > self.deadline)

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def open_run(args: Any) -> tuple[Path, Optional[dict]]:
    """The run folder, and with --resume its checkpoint. Nothing that is there already is overwritten."""
    checkpoint = load_checkpoint(Path(args.resume)) if args.resume is not None else None
    if checkpoint and checkpoint["step"] >= args.total_timesteps:
        stop(f"{args.resume} has taken {checkpoint['step']:,} steps already: raise --total-timesteps to go on")
    env_name = args.env_id.replace("/", "-").replace(":", "-")
    name = f"{env_name}__{ALGORITHM}__{args.seed}__{int(time.time())}"
    run_dir = Path(args.resume or args.run_dir or Path("runs") / name)
    try:
        while args.resume is None:
            try:
                run_dir.mkdir(parents=True)
                break
            except FileExistsError:
                if args.run_dir is None:  # another run of the same second
                    run_dir = run_dir.with_name(run_dir.name + "x")
                elif run_dir.is_dir() and not any(run_dir.iterdir()):
                    break
                else:
                    stop(f"{run_dir} is there and not empty: name another --run-dir, or go on with --resume {run_dir}")
        settings = json.dumps({"algorithm": ALGORITHM, **asdict(args)}, indent=2)
        (run_dir / "args.tmp").write_text(settings + "\n")
        os.replace(run_dir / "args.tmp", run_dir / "args.json")
    except OSError as error:
        stop(f"{run_dir} can't be written: {error.strerror}")
    return run_dir, checkpoint


def save_checkpoint(run_dir: Path, **state: Any) -> None:
    """Written beside the old one, then renamed: a kill at any moment leaves a whole checkpoint."""
    path = run_dir / "checkpoint.pt"
    with open(path.with_suffix(".tmp"), "wb") as file:
        torch.save(arrays_to_tensors({"algorithm": ALGORITHM, "random": random_states(), **state}), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path.with_suffix(".tmp"), path)


def load_checkpoint(run_dir: Path) -> dict:
    path = run_dir / "checkpoint.pt"
    if not path.is_file():
        stop(f"{run_dir} holds no checkpoint.pt: it is no run folder, or its run ended before the first checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # tensors and numbers, no foreign code
    except Exception:  # damage shows in many ways
        stop(f"{path} is damaged or cut short: it can't be read")
    if not isinstance(checkpoint, dict) or checkpoint.get("algorithm") != ALGORITHM:
        stop(f"{path} is no checkpoint of {ALGORITHM}")
    return checkpoint


def random_states() -> dict:
    """Of all generators a script may use: none keeps one of its own."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_states(states: dict) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    for index, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, index)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # CUDA too


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] in ("cpu", "cuda"):
        try:
            return torch.zeros(1, device=name).device
        except (RuntimeError, AssertionError):
            pass
    stop(f"--device {name} is not to be had here: use auto, cpu or cuda[:index]")


def stop(message: str) -> None:
    """A user's mistake: one sentence, exit code 2, no traceback."""
    print(f"{ALGORITHM}: {message}", file=sys.stderr)
    raise SystemExit(2)


def check_run_settings(args: Any) -> None:
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            stop(f"--{name.replace('_', '-')} is {value}: it must be a finite number")
    for least, names in (
        (1, ("total_timesteps", "eval_episodes", "eval_max_steps", "episodes", "log_every")),
        (0, ("eval_every", "checkpoint_every", "picture_every", "seed")),
    ):
        for name in names:
            if getattr(args, name) < least:
                stop(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least {least}")
    if args.seed >= 2**31:
        stop(f"--seed is {args.seed}: it must be below 2^31")


def read_settings(run_dir: Path) -> Any:
    """The settings a run was started with."""
    try:
        settings = dict(json.loads((run_dir / "args.json").read_text()))
    except (OSError, ValueError, TypeError):
        stop(f"{run_dir} is no run folder: it holds no args.json that can be read")
    if settings.pop("algorithm", None) != ALGORITHM:
        stop(f"{run_dir} is a run of another algorithm, not of {ALGORITHM}")
    if unknown := set(settings) ^ {field.name for field in fields(Args)}:
        stop(f"{run_dir} was written by another version of this file: {', '.join(sorted(unknown))} differ")
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    return Args(**{**settings, "resume": None, "evaluate": None})


def command_line(argv: Optional[list[str]], presets: dict) -> Any:
    """The preset is a subcommand, and the first one the default; flags after it override its settings."""
    if argv and argv[0].startswith("--no-") and not set(argv) & set(presets):
        argv = [next(iter(presets)), *argv]  # tyro finds the default preset behind any other flag
    descriptions = {name: description for name, (description, _) in presets.items()}
    defaults = {name: settings for name, (_, settings) in presets.items()}
    return tyro.cli(
        tyro.extras.subcommand_type_from_defaults(defaults, descriptions, prefix_names=False, sort_subcommands=False),
        default=next(iter(defaults.values())),
        args=argv,
        description=(__doc__ or "").split("\n\n")[0],
        config=(tyro.conf.CascadeSubcommandArgs,),
    )


MAY_CHANGE = {  # when a run goes on: nothing that the learning depends on
    "resume", "evaluate", "episodes", "total_timesteps", "device", "compile", "progress", "capture_video",
    "log_every", "eval_every", "eval_episodes", "eval_max_steps", "picture_every", "checkpoint_every",
}  # fmt: skip


def parse_args(argv: Optional[list[str]] = None) -> Any:
    words = sys.argv[1:] if argv is None else argv
    args = command_line(words, PRESETS)
    if args.resume is None and args.evaluate is None:
        return args
    if args.resume is not None and args.evaluate is not None:
        stop("--resume trains and --evaluate plays: give one of them")
    folder = args.evaluate if args.resume is None else args.resume
    if preset := [word for word in words if word in PRESETS and word != folder]:
        stop(f"the run's own settings are used: leave out the preset {preset[0]}")
    # Go on with the run's own settings: they become the defaults, and what the user typed stands above them.
    saved = read_settings(Path(folder))
    args = command_line(words, {name: (text, saved) for name, (text, _) in PRESETS.items()})
    for name, value in asdict(saved).items():
        free = name in MAY_CHANGE or (name == "seed" and args.evaluate)  # a new seed to evaluate: other episodes
        if getattr(args, name) != value and not free:
            stop(f"{folder} has its own settings: --{name.replace('_', '-')} is {value} there and can't change now")
    return args


def main(argv: Optional[list[str]] = None) -> None:
    args = parse_args(argv)
    check_settings(args)
    if args.evaluate is not None:
        play(args)
    else:
        train(args)


if __name__ == "__main__":
    main()
