# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "numpy>=2.0,<3", "gymnasium>=1.3,<2", "tyro>=1.0.16,<2", "tensorboard>=2.18,<3", "tqdm>=4.66,<5",
#     "pillow>=11,<14", "matplotlib>=3.9,<4", "pygame-ce>=2.5,<3",
# ]
# ///
"""PlaNet: learn a world model from images, and plan in its latent space at every step.

A recurrent state-space model (RSSM) turns images and actions into a small latent state and predicts the next states,
rewards and images. There is no policy and no value: the cross-entropy method (CEM) searches for the sequence of actions
with the largest sum of predicted rewards, the first action is executed, and the search begins again. Dreamer
(dreamer_v1.py, in the same order) replaces this search by a policy.

Paper: Hafner, Lillicrap, Fischer, Villegas, Ha, Lee, Davidson, "Learning Latent Dynamics for Planning from Pixels",
ICML 2019, arXiv 1811.04551. Official code: github.com/google-research/planet.

The algorithm (Algorithm 1 of the paper; Algorithm 2 is the planner):
    (1) C times: sample B sequences of L rows, infer their states, and train the world model to predict the rows (Eq. 3)
    (2) infer the state of the current episode from the observation
    (3) search for a sequence of H actions by CEM in the latent space (Algorithm 2)
    (4) execute its first action with exploration noise, and store the step; repeat (2) to (4) for one episode

          a_{t−1}           a_t             Row t of an episode holds o_t, the action a_{t−1} that led to s_t, and the
    s_{t−1} ────▶ s_t ────▶ s_{t+1}         reward r_t received on arrival. In its first row a = 0 and r = 0.
                  │  │
                 o_t r_t

Symbols: h_t, s_t → State.h, State.z; f(h_{t−1}, s_{t−1}, a_{t−1}) → RSSM.recurrent; p(s_t|h_t) → RSSM.prior;
    q(s_t|h_t, o_t) → RSSM.posterior; p(o_t|h_t, s_t) → WorldModel.decode, p(r_t|h_t, s_t) → WorldModel.reward;
    J, K, I → candidates, elites, iterations.

Usage (return: mean and 95 % interval over seeds; docs/planet.md has the curves):
    python algos/planet.py                                    # return −179 [−194, −165]
    python algos/planet.py pendulum-pixels                    # from images, not measured yet
    uv run --with dm_control --with "mujoco<4" algos/planet.py cartpole-swingup --device cuda
    python algos/planet.py --evaluate runs/NAME --episodes 10 --capture-video

Differences from the code: PyTorch's GRU applies the reset gate after the matrix product; sequences are sampled
uniformly from all episodes, without preferring recent ones. The small presets have smaller networks, images and
searches, plan along means instead of samples, and have --decoder-std and --reward-scale, which weigh observations and
rewards against the KL. Tasks must not end early: there is no continuation head, so the planner expects rewards after a
terminal state too.
"""

import argparse
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

import gymnasium as gym
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

ALGORITHM = "planet"


@dataclass
class Args:  # tyro turns each field into a flag and each comment into its help
    env_id: str = "Pendulum-v1"  # any environment with Box actions that does not end early; or ControlSuite/walker-walk
    obs: Literal["pixels", "vector"] = "vector"  # the environment's images, or its rendering if it has none; or vectors
    image_size: Literal[32, 64] = 32  # images are resized to this many pixels per side
    action_repeat: int = 2  # each action is repeated this many times; all settings in steps count the repeats
    total_timesteps: int = 5_000  # environment steps
    random_steps: int = 1_000  # initial steps with random actions, rounded up to whole episodes
    updates: int = 200  # C: updates before each episode
    batch_size: int = 16  # B: sequences per update
    batch_length: int = 32  # L: rows per sequence
    replay_size: int = 1_000_000  # rows that are kept; the oldest episodes are dropped first
    transitions: Literal["both", "deterministic", "stochastic"] = "both"  # the RSSM, or one of the paper's ablations
    free_nats: float = 1.0  # a KL below this is not reduced further
    overshooting: int = 1  # D: latent overshooting predicts up to this many steps ahead; 1 for none, as in the code
    decoder_std: float = 0.3  # std of the observation's Gaussian, 1 in the paper; if smaller, observations count more
    reward_scale: float = 0.1  # rewards are multiplied by this
    reward_weight: float = 10.0  # weight of the reward's loss, as in the code
    deter_size: int = 64  # size of h
    stoch_size: int = 16  # size of s
    units: int = 64  # units of all layers but the convolutions
    depth: int = 8  # channels of the first convolution; each of the next has twice as many
    learning_rate: float = 1e-3  # Adam's step size
    planner: Literal["cem", "shooting"] = "cem"  # shooting: the best of as many random sequences, an ablation
    horizon: int = 10  # H: length of a plan in actions
    candidates: int = 200  # J: sequences per round of the search
    elites: int = 20  # K: sequences that the next round's distribution is fitted to
    iterations: int = 5  # I: rounds
    sampled_plans: bool = False  # predict along samples of s, as the paper's larger search does; else along its means
    exploration: float = 0.3  # std of the noise added to actions
    random_data: bool = False  # act at random in training, an ablation
    seed: int = 1  # on one CPU, two runs with the same seed are identical
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu, cuda or mps
    compile: bool = False  # torch.compile a step of the RSSM
    eval_every: int = 1_000  # steps between evaluations (at the end of an episode, as pictures and checkpoints)
    picture_every: int = 1_000  # steps between pictures of a plan
    checkpoint_every: int = 5_000  # steps between checkpoints; one is also written about every minute
    episodes: int = 5  # episodes per evaluation
    capture_video: bool = False  # save the first episode of each evaluation as a GIF
    run_dir: Optional[str] = None  # output folder; runs/<env>__<algorithm>__<seed>__<time> by default
    resume: Optional[str] = None  # continue the run in this folder with its own settings
    evaluate: Optional[str] = None  # do not train: play with the agent of this run folder

    def __post_init__(self):
        """tyro reports a ValueError raised here as one sentence and exits with code 2."""
        may_be_zero = ("seed", "random_steps", "free_nats", "exploration")
        for name, value in vars(self).items():
            if type(value) in (int, float) and not (0 < value < math.inf or (value == 0 and name in may_be_zero)):
                raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be a positive number")
        if self.batch_length <= self.overshooting:
            raise ValueError("--batch-length must be larger than --overshooting")
        if not 2 <= self.elites <= self.candidates:
            raise ValueError(f"--elites is {self.elites}: it must be between 2 and --candidates ({self.candidates})")


CONTROL = Args(
    "ControlSuite/cartpole-swingup", "pixels", image_size=64, action_repeat=8, total_timesteps=1_000_000,
    random_steps=5_000, updates=100, batch_size=50, batch_length=50, free_nats=3.0, decoder_std=1.0, reward_scale=1.0,
    deter_size=200, stoch_size=30, units=200, depth=32, horizon=12, candidates=1_000,
    elites=100, iterations=10, sampled_plans=True, eval_every=25_000, picture_every=25_000, checkpoint_every=25_000,
)  # fmt: skip
PRESETS = {
    "pendulum": ("Pendulum-v1 from its state vector: minutes", Args()),
    "pendulum-pixels": ("Pendulum-v1 from images of 32 × 32", Args(
        obs="pixels", total_timesteps=10_000, eval_every=2_000, picture_every=2_000)),
    "cartpole-swingup": ("DeepMind control from pixels at the paper's settings: for a GPU", CONTROL),
    "cheetah-run": ("the same for cheetah-run", replace(CONTROL, env_id="ControlSuite/cheetah-run", action_repeat=4)),
}  # fmt: skip


# ── The algorithm: the world model ────────────────────────────────────────────────────────────────────────────────


def dense(inputs: int, width: int, layers: int, outputs: int) -> nn.Sequential:
    sizes = [inputs, *[width] * layers]
    hidden = [part for m, n in itertools.pairwise(sizes) for part in (nn.Linear(m, n), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], outputs))


def image_encoder(size: int, depth: int) -> nn.Sequential:
    """[N, 3, S, S] → [N, E]: convolutions until 2 × 2 pixels are left."""
    sizes = [3, *(depth * 2**i for i in range({32: 3, 64: 4}[size]))]
    layers = [part for m, n in itertools.pairwise(sizes) for part in (nn.Conv2d(m, n, 4, stride=2), nn.ReLU())]
    return nn.Sequential(*layers, nn.Flatten())


class FromOnePixel(nn.ConvTranspose2d):
    """A transposed convolution of a single pixel, [N, M] → [N, C, k, k]: a matrix product, and faster as one."""

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.flatten(1)).unflatten(1, self.weight.shape[1:]) + self.bias[:, None, None]


def image_decoder(inputs: int, size: int, depth: int) -> nn.Sequential:
    """[N, F] → [N, 3, S, S]: transposed convolutions, the first from a single pixel."""
    kernels = {32: (5, 6, 6), 64: (5, 5, 6, 6)}[size]
    sizes = [4 * depth * 2 ** (len(kernels) - 1), *(depth * 2**i for i in reversed(range(len(kernels) - 1))), 3]
    layers = [nn.Linear(inputs, sizes[0]), FromOnePixel(sizes[0], sizes[1], kernels[0])]
    for m, n, kernel in zip(sizes[1:], sizes[2:], kernels[1:], strict=False):
        layers += [nn.ReLU(), nn.ConvTranspose2d(m, n, kernel, stride=2)]
    return nn.Sequential(*layers)


def glorot_init(module: nn.Module) -> None:
    """As in the official code: Glorot's uniform weights and zero biases."""
    for name, parameter in module.named_parameters(recurse=False):
        nn.init.zeros_(parameter) if "bias" in name else nn.init.xavier_uniform_(parameter)


class State(NamedTuple):
    """h and s (here z), [..., D] and [..., Z], and the Gaussian that s was sampled from."""

    h: Tensor
    z: Tensor
    mean: Tensor
    std: Tensor


class RSSM(nn.Module):
    """The recurrent state-space model: h is deterministic and remembers, s is sampled."""

    def __init__(self, embedding: int, actions: int, args: Args):
        super().__init__()
        self.transitions, self.sizes = args.transitions, (args.deter_size, args.stoch_size)
        self.gru_in = nn.Linear(args.stoch_size + actions, args.units)
        self.gru = nn.GRUCell(args.units, args.deter_size)
        self.prior_net = dense(args.deter_size, args.units, 1, 2 * args.stoch_size)
        self.posterior_net = dense(args.deter_size + embedding, args.units, 1, 2 * args.stoch_size)
        if args.compile:
            self.step = torch.compile(self.step)

    def start(self, n: int) -> tuple[Tensor, Tensor]:
        """h and s before the first observation."""
        return tuple(self.gru_in.weight.new_zeros(n, size) for size in self.sizes)

    def recurrent(self, h: Tensor, z: Tensor, action: Tensor) -> Tensor:
        # Eq. 4: h_t = f(h_{t−1}, s_{t−1}, a_{t−1}). Without memory, h_t depends on s_{t−1} and a_{t−1} alone.
        h = torch.zeros_like(h) if self.transitions == "stochastic" else h
        return self.gru(F.relu(self.gru_in(torch.cat([z, action], -1))), h)

    def gaussian(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = x.chunk(2, -1)
        return mean, F.softplus(std) + 0.1

    def prior(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """p(s_t|h_t): mean and std"""
        return self.gaussian(self.prior_net(h))

    def posterior(self, h: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """q(s_t|h_t, o_t): mean and std, given the encoded o_t"""
        return self.gaussian(self.posterior_net(torch.cat([h, embedded], -1)))

    def step(self, h: Tensor, z: Tensor, action: Tensor, embedded: Optional[Tensor] = None, sample=True) -> State:
        """h_t and s_t after a_{t−1}: from the posterior if o_t has been observed, otherwise from the prior."""
        h = self.recurrent(h, z, action)
        mean, std = self.prior(h) if embedded is None else self.posterior(h, embedded)
        sample = sample and self.transitions != "deterministic"
        return State(h, mean + std * torch.randn_like(std) if sample else mean, mean, std)

    def unroll(self, h: Tensor, z: Tensor, actions: Tensor, embedded: Optional[Tensor] = None, sample=True) -> State:
        """States [B, T, ...] along actions [B, T, A]; action t leads to observation t, encoded as [B, T, E]."""
        states = []
        for t in range(actions.shape[1]):
            states.append(self.step(h, z, actions[:, t], None if embedded is None else embedded[:, t], sample))
            h, z = states[-1].h, states[-1].z
        return State(*(torch.stack(part, 1) for part in zip(*states, strict=True)))

    def features(self, states: State) -> Tensor:
        """What observation and reward are predicted from, [..., F]. Without memory, h is no part of the state."""
        return torch.cat([states.z, torch.zeros_like(states.h) if self.transitions == "stochastic" else states.h], -1)


class WorldModel(nn.Module):
    """Encoder, RSSM, and the heads for observation and reward."""

    def __init__(self, env: gym.Env, actions: int, args: Args):
        super().__init__()
        self.args, self.images, shape = args, args.obs == "pixels", env.observation_space.shape
        features = args.deter_size + args.stoch_size
        if self.images:
            self.encoder = image_encoder(args.image_size, args.depth)
            self.decoder = image_decoder(features, args.image_size, args.depth)
        else:
            self.encoder = nn.Sequential(dense(*shape, args.units, 1, args.units), nn.ReLU())
            self.decoder = dense(features, args.units, 2, *shape)
            self.register_buffer("mean", torch.zeros(shape))
            self.register_buffer("std", torch.ones(shape))
        self.reward_head = dense(features, args.units, 3, 1)
        embedding = 4 * args.depth * args.image_size // 8 if self.images else args.units
        self.rssm = RSSM(embedding, actions, args)
        self.apply(glorot_init).to(memory_format=torch.channels_last)  # faster convolutions

    def normalise(self, obs: Tensor) -> Tensor:
        """What the networks see, in training and when acting. Of images the upper 5 bits, with noise below them."""
        if self.images:
            return ((obs // 8) + torch.rand(obs.shape, device=obs.device)) / 32 - 0.5
        return (obs.float() - self.mean) / self.std

    def set_normaliser(self, obs: Tensor) -> None:
        std = obs.std(0, correction=0)
        self.mean.copy_(obs.mean(0))
        self.std.copy_(torch.where(std > 1e-6, std, 1.0))

    def encode(self, x: Tensor) -> Tensor:
        """[B, T, ...] → [B, T, E]"""
        return self.encoder(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def decode(self, features: Tensor) -> Tensor:
        return self.decoder(features.flatten(0, 1)).unflatten(0, features.shape[:2])

    def reward(self, features: Tensor) -> Tensor:
        return self.reward_head(features)[..., 0]


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of x [B, T] over the rows whose mask is 1."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def world_model_loss(world: WorldModel, batch: "Sequences", args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """Step (1): the loss and metrics."""
    x, mask = world.normalise(batch.obs), batch.mask
    states = world.rssm.unroll(*world.rssm.start(len(x)), batch.action, world.encode(x))
    features = world.rssm.features(states)
    # Eq. 3: Σ_t E[ln p(o_t|s_t)] − E[KL(q(s_t|o_≤t, a_<t) ‖ p(s_t|s_{t−1}, a_{t−1}))], and ln p(r_t|s_t) as o_t.
    # The sum over pixels matters: with their mean the KL would dominate. Constants of the Gaussians are left out.
    obs_loss = masked_mean(0.5 * ((world.decode(features) - x) / args.decoder_std).square().flatten(2).sum(-1), mask)
    reward_loss = masked_mean(0.5 * (world.reward(features) - args.reward_scale * batch.reward).square(), mask)
    posterior, prior = Normal(states.mean, states.std, False), Normal(*world.rssm.prior(states.h), False)
    kl = kl_divergence(posterior, prior).sum(-1)
    loss = obs_loss + args.reward_weight * reward_loss + masked_mean(kl.clamp(min=args.free_nats), mask)
    metrics = {"losses/observation": obs_loss, "losses/reward": reward_loss, "model/kl": masked_mean(kl, mask)}
    if args.overshooting > 1:
        metrics["losses/overshooting"] = overshooting_loss(world, states, batch.action, mask, args)
        loss = loss + metrics["losses/overshooting"]
    return loss, metrics | {"losses/world": loss, "model/prior_std": masked_mean(prior.stddev.mean(-1), mask)}


def overshooting_loss(world: WorldModel, states: State, actions: Tensor, mask: Tensor, args: Args) -> Tensor:
    """Trains the priors that are predicted 2 to D steps ahead of each row towards the posteriors of their rows."""
    h, z, losses = states.h, states.z, []
    for d in range(1, args.overshooting + 1):  # row t of (h, z) moves on to t + d
        ahead = world.rssm.step(*(x.flatten(0, 1) for x in (h[:, :-1], z[:, :-1], actions[:, d:])))
        h, z, mean, std = (x.unflatten(0, (len(actions), -1)) for x in ahead)
        if d > 1:
            # Eq. 7: 1/D Σ_d β_d E[KL(q(s_t|o_≤t, a_<t) ‖ p(s_t|s_{t−d}, a_{t−d…t−1}))], with a stop-gradient on q
            posterior = Normal(states.mean[:, d:].detach(), states.std[:, d:].detach(), False)
            kl = kl_divergence(posterior, Normal(mean, std, False)).sum(-1)
            losses.append(masked_mean(kl.clamp(min=args.free_nats), mask[:, d:]))
    return sum(losses) / args.overshooting


# ── The algorithm: planning in the latent space ───────────────────────────────────────────────────────────────────


@torch.inference_mode()
def plan(world: WorldModel, h: Tensor, z: Tensor, actions: int, args: Args) -> Tensor:
    """Step (3): actions [H, A] with a large sum of predicted rewards after the state h [1, D], z [1, Z]."""
    mean, std = (x.expand(args.horizon, actions) for x in (h.new_zeros(1), h.new_ones(1)))
    shooting = args.planner == "shooting"
    n, rounds = (args.candidates * args.iterations, 1) if shooting else (args.candidates, args.iterations)
    for _ in range(rounds):
        # Algorithm 2: J sequences a ~ N(μ, σ²); R = Σ_t E[p(r_t|s_t)] along one prediction of each
        sequences = (mean + std * torch.randn(n, *mean.shape, device=h.device)).clamp(-1, 1)
        states = world.rssm.unroll(h.expand(n, -1), z.expand(n, -1), sequences, sample=args.sampled_plans)
        returns = world.reward(world.rssm.features(states)).sum(1)
        elites = sequences[returns.topk(1 if shooting else args.elites).indices]
        # the next μ and σ are those of the K best
        mean, std = elites.mean(0), (elites.var(0, correction=0) + 1e-6).sqrt()
    return mean


class Agent(nn.Module):
    """World model and planner, and the state of the current episode."""

    player = "planner"

    def __init__(self, env: gym.Env, args: Args):
        super().__init__()
        self.args, self.actions = args, env.action_space.shape[0]
        self.world = WorldModel(env, self.actions, args)
        self.register_buffer("updates", torch.tensor(0))
        self.to(args.device)
        self.reset()

    def reset(self) -> None:
        """An episode begins."""
        (self.h, self.z), self.action = self.world.rssm.start(1), torch.zeros(1, self.actions, device=self.args.device)

    @torch.inference_mode()
    def act(self, obs: np.ndarray, explore: float = 0.0) -> Tensor:
        """Steps (2) to (4): infer the state, then plan an action [A]."""
        x = self.world.normalise(torch.as_tensor(obs, device=self.args.device)[None, None])
        state = self.world.rssm.step(self.h, self.z, self.action, self.world.encode(x)[:, 0])
        self.h, self.z = state.h, state.z
        action = plan(self.world, self.h, self.z, self.actions, self.args)[:1]
        self.action = (action + explore * torch.randn_like(action)).clamp(-1, 1) if explore else action
        return self.action[0]

    def forward(self, obs: np.ndarray) -> np.ndarray:
        return self.act(obs).cpu().numpy()


# ── What the model predicts ───────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def open_loop(world: WorldModel, batch: "Sequences", context: int = 5) -> tuple[Tensor, Tensor]:
    """Predicted observations [B, T, ...] and rewards [B, T]. The model sees `context` rows, then only the actions."""
    x = world.normalise(batch.obs[:, :context])
    seen = world.rssm.unroll(*world.rssm.start(len(x)), batch.action[:, :context], world.encode(x))
    ahead = world.rssm.unroll(seen.h[:, -1], seen.z[:, -1], batch.action[:, context:])
    features = torch.cat([world.rssm.features(seen), world.rssm.features(ahead)], 1)
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


@torch.no_grad()
def draw_plan(agent: Agent, replay: "SequenceReplay", step: int) -> Figure:
    """A plan that is made early in the latest episode, what the model expects of it, and what then happened."""
    world, batch = agent.world, replay.latest(50)
    seen = min(5, max(batch.obs.shape[1] // 3, 1))
    x = world.normalise(batch.obs)
    states = world.rssm.unroll(*world.rssm.start(1), batch.action[:, :seen], world.encode(x[:, :seen]))
    actions = plan(world, states.h[:, -1], states.z[:, -1], agent.actions, agent.args)[None].clone()
    ahead = world.rssm.features(world.rssm.unroll(states.h[:, -1], states.z[:, -1], actions, sample=False))
    rows = slice(seen, seen + actions.shape[1])
    truth, model = x[0, rows].cpu(), world.decode(ahead)[0].cpu()
    pairs = [("reward", batch.reward[0, rows].cpu(), world.reward(ahead)[0].cpu() / agent.args.reward_scale)]
    pairs += [(f"a[{i}]", batch.action[0, rows, i].cpu(), actions[0, :, i].cpu()) for i in range(min(agent.actions, 2))]
    if not world.images:
        pairs = [(f"o[{i}]", truth[:, i], model[:, i]) for i in range(min(truth.shape[1], 4))] + pairs
    figure = Figure(figsize=(9, 1.3 * len(pairs) + 3 * world.images), dpi=80, layout="constrained")
    figure.suptitle(f"step {step:,}: a plan, and what happened while the planner planned again at each step")
    axes = [*figure.subplots(len(pairs) + world.images, 1, height_ratios=[3] * world.images + [1] * len(pairs))]
    if world.images:
        columns = torch.linspace(0, min(len(truth), len(model)) - 1, 12).round().long().unique()
        tiles = torch.stack([F.pad((x[columns] + 0.5).clamp(0, 1), (1, 1, 1, 1), value=1.0) for x in (truth, model)])
        top, side = axes.pop(0), tiles.shape[-1]
        top.imshow(tiles.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1), aspect="auto")
        top.set_xticks((np.arange(len(columns)) + 0.5) * side, (columns + 1).tolist())
        top.set_yticks((np.arange(2) + 0.5) * side, ["truth", "plan"])
    for axis, (label, real, planned) in zip(axes, pairs, strict=True):
        axis.plot(range(1, len(real) + 1), real, color="black", label="truth")
        axis.plot(range(1, len(planned) + 1), planned, color="tab:orange", label="plan")
        axis.set_ylabel(label)
    axes[-1].legend(fontsize=7)
    axes[-1].set_xlabel("actions ahead")
    return figure


# ── Training ──────────────────────────────────────────────────────────────────────────────────────────────────────


def train(args: Args) -> None:
    torch.manual_seed(args.seed)
    env, test_env = make_env(args), make_env(args)
    agent = Agent(env, args)
    replay = SequenceReplay(env, agent.actions, args)
    parameters = [*agent.world.parameters()]
    optimizer = torch.optim.Adam(parameters, args.learning_rate, eps=1e-4, fused=True)
    run = Run(args, agent=agent, replay=replay, optimizer=optimizer)
    replay.open(run.dir)

    while run.unfinished():
        obs, _ = env.reset(seed=run.begin_episode())
        agent.reset()
        replay.begin(obs)
        training, over, metrics = run.step >= args.random_steps and len(replay.starts) > 1, False, []
        if training and agent.updates == 0 and args.obs == "vector":
            agent.world.set_normaliser(replay.obs[: replay.size])
        for _ in tqdm(range(args.updates if training else 0), "updates", leave=False, disable=None):
            # (1) sample sequences, infer their states, and train the world model
            batch = replay.sample(args.batch_size, args.batch_length)
            loss, update_metrics = world_model_loss(agent.world, batch, args)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1_000)
            optimizer.step()
            metrics.append({name: x.detach() for name, x in update_metrics.items()})
            agent.updates += 1
        while not over and run.step < args.total_timesteps:
            # (2) infer the current state, (3) plan, (4) execute the first action with exploration noise, and store it
            random = not training or args.random_data
            action = 2 * torch.rand(agent.actions) - 1 if random else agent.act(obs, args.exploration)
            obs, reward, terminated, truncated, info = env.step(action.cpu().numpy())
            replay.add(obs, action, reward)
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
                run.picture(draw_plan(agent, replay, run.step))
        if run.due(args.eval_every):
            run.evaluate(agent, test_env)
    run.close()


# ── The task: pixels or vectors, repeated actions in [−1, 1], and the DeepMind control suite ──────────────────────


def is_image(space: gym.Space) -> bool:
    return isinstance(space, gym.spaces.Box) and space.dtype == np.uint8 and space.shape[2:] in ((1,), (3,))


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """[H, W, 1 or 3] → [3, S, S]"""
    image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("RGB")
    return np.array(image.resize((size, size), Image.Resampling.BOX)).transpose(2, 0, 1).copy()


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
    box = isinstance(env.action_space, gym.spaces.Box) and len(env.action_space.shape) == 1
    if not (box and env.action_space.is_bounded()):
        raise UserError(f"the actions of {args.env_id} are {env.action_space}, and a bounded vector is needed")
    env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
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


class Sequences(NamedTuple):
    """Rows [B, T, ...] of episodes, as in the docstring's diagram."""

    obs: Tensor
    action: Tensor
    reward: Tensor
    mask: Tensor  # 0 in padding, if the episode is shorter than T


class SequenceReplay:
    """The rows of all episodes, in a ring. Images are a memory-mapped file in the run folder."""

    def __init__(self, env: gym.Env, actions: int, args: Args):
        # One row per step and reset. The spare quarter keeps a run from overwriting images that its checkpoint needs.
        rows = min(args.replay_size * 5 // 4, 2 * (args.total_timesteps // args.action_repeat + 1))
        self.size, self.starts, self.keep, self.device = 0, [], args.replay_size, args.device
        self.shape, self.images = (rows, *env.observation_space.shape), None
        self.columns = {"action": torch.zeros(rows, actions), "reward": torch.zeros(rows)}
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
        self.add(obs, torch.tensor(0.0), 0.0)

    def add(self, obs: np.ndarray, action: Tensor, reward: float) -> None:
        if not (math.isfinite(reward) and np.isfinite(obs).all()):
            raise UserError("the environment returned NaN or infinity as an observation or reward")
        if self.size - self.starts[0] >= len(self.obs):
            raise UserError("--replay-size is too small for episodes of this length")
        row = self.size % len(self.obs)
        self.obs[row] = torch.from_numpy(obs)
        self.columns["action"][row], self.columns["reward"][row] = action, float(reward)
        self.size += 1

    def rows(self, index: Tensor, mask: Optional[Tensor] = None) -> Sequences:
        index, mask = index % len(self.obs), torch.ones(index.shape) if mask is None else mask.float()
        columns = self.obs[index], *(column[index] for column in self.columns.values()), mask
        return Sequences(*(column.to(self.device) for column in columns))

    def sample(self, batch_size: int, length: int) -> Sequences:
        """Step (1): each sequence starts at a random row of a random complete episode, so that it fits."""
        starts = torch.tensor(self.starts)
        chosen = torch.randint(len(starts) - 1, (batch_size,))
        start, rows = starts[chosen, None], (starts[chosen + 1] - starts[chosen])[:, None]
        offset = (torch.rand(batch_size, 1) * (rows - length + 1).clamp(min=1)).long() + torch.arange(length)
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
