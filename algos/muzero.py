# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "numpy>=2.0,<3",
#     "gymnasium>=1.3,<2",
#     "ale-py>=0.11,<1",
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
"""MuZero: plan by tree search in a model that was learned for nothing but planning.

Chess programs search with the rules of chess. MuZero has no rules: it learns a function that turns what is seen into
a hidden state, one that takes an action and gives the next hidden state and the reward, and one that says how good a
hidden state is and what to try there. Hidden states need not look like anything; all that is asked of them is that
policy, value and reward come out right some steps on. A tree search over them improves on the policy, and the policy
learns what the search found.

Paper: J. Schrittwieser et al., "Mastering Atari, Go, Chess and Shogi by Planning with a Learned Model", Nature 2020,
arXiv 1911.08265. With --search gumbel: I. Danihelka et al., "Policy improvement by planning with Gumbel", ICLR 2022.
Reanalyze: J. Schrittwieser et al., "Online and Offline Reinforcement Learning by Planning with a Learned Model", 2021,
arXiv 2104.06294. DeepMind published pseudocode with the paper, and no code.

The algorithm (section 3 and appendices B, D, G of the paper):
    (1) search from the present observation of every game, S simulations in all trees at once
    (2) draw actions from the visit counts, and play them
    (3) keep observation, action, reward, and the search's policy π and value ν
    (4) draw positions t from what was kept; their targets z_t are n-step returns, π_t and u_t
    (5) unroll the model K steps along the actions that were played; learn policy, value and reward at each
    (6) the network that searches, and values n-step returns, follows the one that learns

Symbols (paper → this file):
    h, g, f → representation, dynamics, prediction      s → hidden          p, v, r → policy, value, reward
    N(s,a), Q(s,a), P(s,a), R(s,a) → visits, q, prior, reward of Tree       c₁, c₂ → c1, c2
    π, ν → Found.policy, Found.value       z, u → n_step or vtrace, reward  K → unroll       n → steps       γ → gamma
    h(x) of Appendix F → squash            φ(x) → two_hot                   α, β → priority_alpha, priority_beta
    ρ, μ of V-trace → ratio, the column "chance" of Histories

Two players are one with γ = −1: each reward and value is told from the side of who is to move, and what is good for the
next mover is bad for this one. The search, the store and the losses never ask whose move it is.

Run (docs/muzero.md has what was measured):
    python algos/muzero.py                                    # CartPole-v1, 10 minutes: 500 of 500
    python algos/muzero.py tictactoe                          # 34 minutes: no loss in 400 games against perfect play
    python algos/muzero.py connect4
    python algos/muzero.py mspacman                           # from pixels, an hour: 764 in self-play, random 244
    python algos/muzero.py --search puct                      # the paper's search
    python algos/muzero.py --play RUN_DIR                     # a board game against you

Deviations from the paper and its pseudocode:
  - A node counts itself as a visit, the root too: N(s) = 1 + Σ N(s,a). With the sum alone, as at the root in the first
    pseudocode, the first simulation would not see the prior; the pseudocode of 2021 has it as here. The reward of an
    edge is part of what its Q is updated with; Equation 4 leaves it out by mistake.
  - Where all Q of a tree are the same so far, the normalised one is 0, as for an action that was never tried. Gumbel's
    v_mix is cut to the extremes of the tree.
  - The weights that search are a moving average of those that learn; the paper hands over new ones now and then. With
    them n-step returns are valued anew (--no-fresh-values: as the last search did; the paper: as the search did when
    it was played).
  - The reward is read from the state that it led to. Numbers that are seen are normalised by their mean and spread.
  - CartPole's unrolled hidden states are drawn to those of what was then seen (--consistency; after W. Ye et al.,
    "Mastering Atari Games with Limited Data", 2021, who compare by cosine, and by way of one more network).
  - An episode that is cut by a time limit goes on in its targets: the value of its last observation stands for the
    rest. After a true end the model is shown an absorbing state: reward 0, value 0, no policy.
  - Boards have a reward as any other task: 1 for the move that wins. In the paper they have none, and a value that goes
    on after the end. Their values are chances of −1, 0 and 1; the paper's boards have one number, and its square.
  - --reanalyze searches old positions anew, in the same batch as the games', and writes what it found into the store.
    The paper's revisits so many that 80 % of the updates have fresh policies (Appendix H); the pseudocode of 2021
    searches whole old games, and stores them once more.
  - CartPole, Ms. Pac-Man (0.1) and the boards (0.3) are searched as Danihelka et al. do, with this c_scale, and Q
    normalised over the tree. Their ν is Σ π' Q at the root, whose visits are spread evenly whatever Q says.
  - Boards' games of self-play begin after a few random moves (--openings), for Gumbel's search soon plays the same
    lines.
  - CartPole's n-step returns are corrected for what followed having been played by an older, worse policy (--vtrace;
    after L. Espeholt et al., "IMPALA", 2018). The paper learns from what is younger, on thousands of processors.
  - Priorities are the last errors of the network's value, |v⁰ − z|; the paper's are of the searched one at first.
  - Small networks, Adam with the gradient cut at length 5, one process in place of SGD on many TPUs. Games see the last
    4 frames in colour (the paper: 32, and the actions between them), and networks have group norm in place of batch
    norm, so that nothing depends on what else is in the batch.
"""

import functools
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

import ale_py
import gymnasium as gym
import numpy as np
import torch
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

ALGORITHM = "muzero"


@dataclass
class Args:
    env_id: str = "CartPole-v1"
    """This file's TicTacToe-v0 and ConnectFour-v0, or any Gymnasium environment with Discrete actions whose
    observations are numbers or an image. `module:Env-v0` imports the module first. The other settings stay
    CartPole's, or the preset's: with rewards that can't be seen in what follows, --consistency 0 at least."""
    network: Literal["auto", "mlp", "conv"] = "auto"
    """Dense layers, or convolutions with residual blocks; auto: by the shape of the observation."""
    total_timesteps: int = 15_000
    """Moves of all games together, rounded up to whole rounds."""
    envs: int = 16
    """Games at a time."""
    episode_limit: int = 0
    """Cut an episode after so many steps, if it is not over before; 0: where the environment does."""
    search: Literal["puct", "gumbel"] = "puct"
    """The paper's search, or the one of Danihelka et al. (2022), which learns from few simulations too."""
    simulations: int = 25
    """S: simulations of each search."""
    c1: float = 1.25
    """c₁: how much the prior counts."""
    c2: float = 19_652.0
    """c₂: how slowly it comes to count more."""
    least_range: float = 0.0
    """Q in a tree is scaled by its range, but by this at least (as EfficientZero does): where all is equally good
    the range is that of the network's mistakes."""
    noise_alpha: float = 0.25
    """puct: Dirichlet noise at the root: its α ..."""
    noise_share: float = 0.25
    """... and its share in the prior. Evaluations have none."""
    considered: int = 16
    """Gumbel: actions that are tried at the root."""
    gumbel_visits: float = 50.0
    """Gumbel: c_visit of σ(q) = (c_visit + max N) c_scale q."""
    gumbel_scale: float = 0.1
    """Gumbel: c_scale."""
    temperature: float = 1.0
    """puct: T: actions are drawn by N^(1/T). Gumbel's search has its dice at the root."""
    temperature_steps: int = 15_000
    """puct: T is halved at half, and again at three quarters of these steps; 0: it stays."""
    temperature_moves: int = 0
    """puct: after so many moves of a game the most visited action is taken; 0: never."""
    openings: int = 0
    """Boards: a game of self-play begins after 0 to so many random moves, which are not kept."""
    gamma: float = 0.997
    """γ: discount. For a game of two players its sign is turned."""
    steps: int = 10
    """n of the n-step returns; at least the length of a game: its outcome alone."""
    vtrace: bool = False
    """Returns of old positions are corrected: what was played then counts as far as the last search of the position
    would play it. Needs --reanalyze."""
    unroll: int = 5
    """K: steps that the model is unrolled in learning."""
    fresh_values: bool = True
    """n-step returns end with the value that the network which searches gives now; else with the stored one."""
    averaging: float = 0.01
    """τ: with each update the network that searches goes so far towards the one that learns; 1: they are the same."""
    reanalyze: float = 1.0
    """So many old positions are searched anew for each move that is played."""
    replay_size: int = 100_000
    """Moves that are kept."""
    learning_starts: int = 1_000
    """Moves before the first update."""
    train_every: int = 2
    """One update for so many moves."""
    batch_size: int = 128
    """Positions in a batch."""
    prioritized: bool = False
    """Draw positions by how wrong their values were."""
    priority_alpha: float = 1.0
    """α: P(i) ∝ p_i^α, with p = |v⁰ − z| when it was drawn last, 0.001 at least; what was never drawn has the
    largest so far."""
    priority_beta: float = 1.0
    """β: each counts (1 / (N P(i)))^β."""
    learning_rate: float = 2e-3
    """Adam's step size ..."""
    decay_steps: int = 15_000
    """... which falls to a tenth over so many steps, and stays there; 0: it does not fall."""
    weight_decay: float = 1e-4
    """c: L2 regularisation."""
    value_weight: float = 1.0
    """Weight of the value's loss."""
    consistency: float = 0.0
    """Weight of ‖s_k − h(o_{t+k})‖²: unrolled hidden states are drawn to those of what was seen. For tasks whose
    rewards can be told from the next observation: hidden states forget what can't be seen in it."""
    gradient_clip: float = 5.0
    """The gradient is not longer than this."""
    squash: bool = True
    """Values and rewards are learned as h(x) = sign(x) (√(|x| + 1) − 1) + 0.001 x."""
    support: int = 20
    """They are learned as chances of the whole numbers from −support to support; what is larger is cut."""
    latent: int = 64
    """Numbers in a hidden state (mlp)."""
    hidden: int = 128
    """Width of the layers between (mlp), and of the heads."""
    channels: int = 32
    """Channels of the convolutions (conv)."""
    blocks: int = 2
    """Residual blocks (conv)."""
    frames: int = 4
    """Frames of an ALE game that are seen at a time."""
    opponent: Literal["random", "one-ply", "perfect", "minimax"] = "random"
    """Who plays against the agent in evaluations of a board game; perfect: tic-tac-toe alone."""
    opponent_depth: int = 2
    """Moves that minimax looks ahead."""
    play: Optional[str] = None
    """Play the board game of this run folder in the terminal, against what it learned."""
    seed: int = 1
    """Fixes Python, NumPy, torch and the environments: the same seed on one CPU gives the same run."""
    device: str = "auto"
    """auto, cpu or cuda[:index]."""
    compile: bool = False
    """torch.compile for the loss: speed may change, results only by rounding."""
    log_every: int = 1_000
    """Write losses and timings every this many steps."""
    eval_every: int = 2_500
    """Let the search play without noise every this many steps; 0: only at the end."""
    eval_episodes: int = 20
    """Episodes of an evaluation."""
    eval_max_steps: int = 10_000
    """Cut an evaluation episode here."""
    picture_every: int = 5_000
    """Draw a search tree and an episode every this many steps, 20 times at most; 0: never."""
    capture_video: bool = False
    """Record the first episode of each evaluation as a GIF in the run folder."""
    run_dir: Optional[str] = None
    """Where to write; by default runs/<env>__<algorithm>__<seed>__<time>."""
    checkpoint_every: int = 5_000
    """Save a checkpoint every this many steps; 0: only at the end of the run, and when it is stopped. A run that goes
    on keeps it: room was made for the pictures between two of them."""
    resume: Optional[str] = None
    """Go on with the run in this folder, with its settings; --total-timesteps may be raised."""
    evaluate: Optional[str] = None
    """Do not train: let the agent saved in this run folder play."""
    episodes: int = 10
    """Episodes to play with --evaluate."""
    progress: bool = True
    """Show a progress bar (never when the output is no terminal)."""


BOARD = Args(  # outcomes are −1, 0 or 1, and known at the end alone
    search="gumbel", gumbel_scale=0.3, envs=64, gamma=1.0, squash=False, support=1, noise_alpha=0.5, reanalyze=0.0,
    temperature_steps=0, batch_size=256, train_every=16, eval_episodes=100, log_every=5_000,
)  # fmt: skip
GAME = Args(  # the paper's Atari settings where they fit one GPU
    simulations=50, support=300, envs=32, steps=10, eval_episodes=5, channels=64, blocks=2, hidden=256,
    noise_alpha=0.25, batch_size=256, replay_size=125_000, learning_starts=2_000, train_every=10, prioritized=True,
    reanalyze=0.0, value_weight=0.25, learning_rate=1e-3, decay_steps=1_000_000, total_timesteps=1_000_000,
    temperature_steps=1_000_000, log_every=5_000, eval_every=50_000, eval_max_steps=5_000,
    picture_every=50_000, checkpoint_every=50_000, episode_limit=27_000,
)  # fmt: skip
PRESETS = {
    "cartpole": (
        "CartPole-v1",
        Args(
            search="gumbel", vtrace=True, averaging=0.02, consistency=1.0, gamma=0.98, total_timesteps=30_000,
            temperature_steps=30_000, decay_steps=30_000,
        ),
    ),
    "tictactoe": (
        "tic-tac-toe, by playing against itself",
        replace(
            BOARD, env_id="TicTacToe-v0", channels=32, blocks=1, hidden=256, total_timesteps=200_000, steps=9,
            decay_steps=200_000, eval_every=20_000, picture_every=40_000, checkpoint_every=50_000, opponent="perfect",
            openings=4,
        ),
    ),
    "connect4": (
        "Connect Four, by playing against itself",
        replace(
            BOARD, env_id="ConnectFour-v0", channels=32, blocks=2, hidden=256, total_timesteps=300_000, steps=42,
            train_every=32, decay_steps=300_000, eval_every=20_000, picture_every=40_000, checkpoint_every=50_000,
            opponent="minimax", openings=6,
        ),
    ),
    "lunarlander": (
        "LunarLander-v3, needs box2d",
        Args(
            env_id="LunarLander-v3", simulations=50, total_timesteps=500_000, temperature_steps=500_000,
            train_every=4, decay_steps=500_000, hidden=256, latent=128, eval_every=25_000, picture_every=50_000,
            log_every=5_000, checkpoint_every=50_000, replay_size=200_000,
        ),
    ),
    "mspacman": (
        "Ms. Pac-Man from pixels, small enough for one processor core",
        replace(
            GAME, env_id="ALE/MsPacman-v5", search="gumbel", simulations=16, support=60, envs=16, channels=16, blocks=1,
            hidden=128, batch_size=64, learning_starts=1_000, train_every=8, reanalyze=4.0, fresh_values=False,
            prioritized=False, gamma=0.99, replay_size=100_000, total_timesteps=100_000, temperature_steps=100_000,
            decay_steps=100_000, log_every=2_000, eval_every=20_000, eval_episodes=10, eval_max_steps=2_000,
            picture_every=50_000, checkpoint_every=25_000,
        ),
    ),
    "breakout": ("Breakout from pixels, on a GPU", replace(GAME, env_id="ALE/Breakout-v5")),
    "pong": ("Pong from pixels, on a GPU", replace(GAME, env_id="ALE/Pong-v5")),
}  # fmt: skip


# ── The network ───────────────────────────────────────────────────────────────────────────────────────────────────


def squash(x: torch.Tensor) -> torch.Tensor:
    """Appendix F: h(x) = sign(x) (√(|x| + 1) − 1) + εx, ε = 0.001."""
    return x.sign() * ((x.abs() + 1).sqrt() - 1) + 1e-3 * x


def unsquash(y: torch.Tensor) -> torch.Tensor:
    """h⁻¹(y) = sign(y) (((√(1 + 4ε (|y| + 1 + ε)) − 1) / 2ε)² − 1)."""
    c = y.abs() + 1 + 1e-3
    root = 2 * c / ((1 + 4e-3 * c).sqrt() + 1)  # the same quotient, without a difference of nearly equal numbers
    return y.sign() * (root.square() - 1)


def two_hot(x: torch.Tensor, support: int) -> torch.Tensor:
    """[...] → [..., 2 · support + 1]: φ(x), chances of the two whole numbers around x, whose mean is x."""
    x = x.clamp(-support, support)
    low = x.floor().clamp(max=support - 1)
    chances = torch.zeros(*x.shape, 2 * support + 1, device=x.device)
    index = (low + support).long()[..., None]
    chances.scatter_(-1, index, (low + 1 - x)[..., None])
    return chances.scatter_(-1, index + 1, (x - low)[..., None])


def from_logits(logits: torch.Tensor, squashed: bool) -> torch.Tensor:
    """[..., 2 · support + 1] → the number that is meant; exactly 0 where all chances are the same."""
    support, chances = logits.shape[-1] // 2, logits.softmax(-1)
    numbers = torch.arange(1, support + 1, dtype=logits.dtype, device=logits.device)
    # x and −x cancel before they are added up: Eq. 5 would make whole numbers of what rounding leaves
    mean = (chances[..., support + 1 :] - chances[..., :support].flip(-1)) @ numbers
    return unsquash(mean) if squashed else mean


def to_unit(s: torch.Tensor) -> torch.Tensor:
    """Appendix G: (s − min) / (max − min), so that each hidden state lies in [0, 1], as the actions beside it do."""
    flat = s.flatten(1)
    low, high = flat.aminmax(dim=1, keepdim=True)
    return ((flat - low) / (high - low).clamp_min(1e-5)).view_as(s)


def perceptron(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.ELU(), nn.Linear(width, outputs))


class Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.GroupNorm(1, channels), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.GroupNorm(1, channels),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.layers(x)).relu()


def convolution(inputs: int, channels: int, stride: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, channels, 3, stride, padding=1, bias=False)
    return nn.Sequential(layer, nn.GroupNorm(1, channels), nn.ReLU())


class MuZero(nn.Module):
    """h, g and f. What they say of values and rewards are logits of chances."""

    def __init__(self, shape: tuple[int, ...], actions: int, planes: Optional[np.ndarray], byte: bool, args: Args):
        super().__init__()
        self.conv = args.network == "conv" or (args.network == "auto" and len(shape) == 3)
        self.unit, self.squashed, numbers = 255.0 if byte else 1.0, args.squash, 2 * args.support + 1
        self.normalized = not (self.conv or byte or planes is not None)
        if self.conv:
            layers, inputs, sides = [], shape[0], np.array(shape[1:])
            while sides.max() > 8:  # 96 × 96 pixels become 6 × 6
                layers += [convolution(inputs, args.channels, 2), Residual(args.channels)]
                inputs, sides = args.channels, -(-sides // 2)
            layers += [] if layers else [convolution(inputs, args.channels)]
            layers += [Residual(args.channels) for _ in range(args.blocks)]
            self.eyes, width = nn.Sequential(*layers), args.channels * int(sides.prod())
            # An action is a plane: on a board where the stone goes, else one of as many planes as there are actions
            if planes is None:
                planes = np.eye(actions)[:, :, None, None] * np.ones((1, 1, *sides))
            self.register_buffer("codes", torch.as_tensor(planes, dtype=torch.float32), persistent=False)
            step = [convolution(args.channels + self.codes.shape[1], args.channels)]
            self.step = nn.Sequential(*step, *[Residual(args.channels) for _ in range(args.blocks)])
        else:
            self.eyes, width = perceptron(math.prod(shape), args.hidden, args.latent), args.latent
            self.register_buffer("codes", torch.eye(actions), persistent=False)
            if self.normalized:
                self.register_buffer("input_mean", torch.zeros(shape))
                self.register_buffer("input_std", torch.ones(shape))
            self.step = perceptron(args.latent + actions, args.hidden, args.latent)
        self.outputs = [actions, numbers, numbers]
        self.heads = perceptron(width, args.hidden, sum(self.outputs))
        for p in self.heads[-1].parameters():  # the first searches follow no accident of the weights
            nn.init.zeros_(p)

    def set_normalizer(self, mean: np.ndarray, std: np.ndarray) -> None:
        """Of the numbers that are seen."""
        self.input_mean.copy_(torch.from_numpy(mean))
        self.input_std.copy_(torch.from_numpy(np.where(std > 1e-6, std, 1.0)))

    def representation(self, obs: torch.Tensor) -> torch.Tensor:
        """h: observations [B, ...] → hidden states."""
        obs = (obs.float() - self.input_mean) / self.input_std if self.normalized else obs.float() / self.unit
        return to_unit(self.eyes(obs if self.conv else obs.flatten(1)))

    def dynamics(self, s: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """g: hidden states, actions [B] → the next hidden states."""
        x = self.step(torch.cat([s, self.codes[a]], 1))
        return to_unit(x if self.conv else s + x)

    def prediction(self, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """f: hidden states → logits of the policy [B, A], the value, and the reward on the step that led there."""
        return self.heads(s.flatten(1)).split(self.outputs, -1)

    def value(self, obs: torch.Tensor) -> torch.Tensor:
        return from_logits(self.prediction(self.representation(obs))[1], self.squashed)


# ── The search ────────────────────────────────────────────────────────────────────────────────────────────────────

NEVER = -1e9  # a Q below all others: that of an action that was not tried


def softmax(logits: np.ndarray, axis: int = -1) -> np.ndarray:
    x = np.exp(logits - logits.max(axis, keepdims=True))
    return x / x.sum(axis, keepdims=True)


class Tree:
    """B trees of S simulations each. Row b (S + 1) + i of an array stands for node i of tree b; its columns are the
    actions there. Each simulation adds one node to every tree, so that node i is the i-th in all of them."""

    def __init__(self, legal: np.ndarray, simulations: int, bounds: Optional[tuple[float, float]], least_range: float):
        (roots, actions), self.least_range = legal.shape, least_range
        self.size, shape = simulations + 1, (roots * (simulations + 1), actions)
        self.visits = np.zeros(shape, np.int64)  # N(s, a)
        self.total = np.zeros(shape)  # sum of r + γ G over these visits
        self.q = np.full(shape, NEVER)  # Q(s, a)
        self.prior = np.zeros(shape)  # P(s, a)
        self.logits = np.zeros(shape)
        self.reward = np.zeros(shape)  # R(s, a)
        self.child = np.full(shape, -1)  # S(s, a): a row
        self.choice = np.zeros(shape[0], np.int64)  # the action that a simulation takes here
        self.count = np.zeros(shape[0], np.int64)  # N(s) = 1 + Σ_a N(s, a)
        self.value = np.zeros(shape[0])  # v(s), the network's
        low, high = bounds or (-NEVER, NEVER)  # the smallest and largest Q of each tree
        self.low, self.high = np.full(roots, low), np.full(roots, high)
        self.first = np.arange(roots) * self.size  # the roots' rows
        self.legal = np.ones(shape, bool)  # the model has to know what is not, but for the roots'
        self.legal[self.first] = legal

    def expand(self, rows: np.ndarray, logits: np.ndarray, value: np.ndarray) -> None:
        """New nodes, with what the network says of them."""
        self.logits[rows], self.prior[rows], self.value[rows], self.count[rows] = logits, softmax(logits), value, 1

    def at(self, rows: np.ndarray, *columns: np.ndarray) -> list[np.ndarray]:
        """The columns at some nodes, as [A, rows]: NumPy adds up few actions of many nodes far faster this way."""
        return [np.ascontiguousarray(column.take(rows, 0).T) for column in columns]

    def scaled(self, rows: np.ndarray, q: np.ndarray) -> np.ndarray:
        """Eq. 5: (Q − min) / (max − min) over the tree; 0 where they are the same. q [A, rows]."""
        width, trees = self.high - self.low, rows // self.size
        scale = np.where(width > 0, 1 / np.maximum(width, max(self.least_range, 1e-12)), 0.0)
        return (q - self.low.take(trees)) * scale.take(trees)

    def descend(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """From the roots to an edge that leads nowhere yet. A list over depths of (trees, rows, actions): those trees
        that got so deep."""
        trees, rows, path = np.arange(len(self.first)), self.first, []
        while len(rows):
            actions = self.choice[rows]
            path.append((trees, rows, actions))
            rows = self.child[rows, actions]
            if not (going := rows >= 0).all():
                trees, rows = trees[going], rows[going]
        return path

    def backup(
        self, path: list[tuple[np.ndarray, np.ndarray, np.ndarray]], value: np.ndarray, gamma: float
    ) -> np.ndarray:
        """From the leaf, whose value is [B], to the root. Gives back the rows where the choice has to be made anew."""
        G, sums = value.copy(), []
        for trees, rows, actions in reversed(path):
            # Eq. 3: G^{k−1} = r_k + γ G^k
            G[trees] = self.reward[rows, actions] + gamma * G[trees]
            sums.append(G[trees])
        trees, rows, actions = (np.concatenate(x) for x in zip(*reversed(path), strict=True))  # no edge is there twice
        # Eq. 4: Q = (N Q + G) / (N + 1), N = N + 1
        self.total[rows, actions] += np.concatenate(sums)
        self.visits[rows, actions] += 1
        self.count[rows] += 1
        self.q[rows, actions] = q = self.total[rows, actions] / self.visits[rows, actions]
        low, high = self.low.copy(), self.high.copy()
        np.minimum.at(self.low, trees, q)
        np.maximum.at(self.high, trees, q)
        # The choice may be another on the path, at the new node, and everywhere where Eq. 5 has other bounds now
        moved, nodes = (self.low < low) | (self.high > high), self.count[self.first[0]]
        everywhere = (self.first[moved, None] + np.arange(nodes)).ravel()
        return np.concatenate([rows[~moved[trees]], self.first[~moved] + nodes - 1, everywhere])


def puct(c1: float, c2: float, simulations: int) -> Callable:
    """The paper's choice, at every node: argmax Q̄ + P √N(s) / (1 + N(s, a)) (c₁ + log((N(s) + c₂ + 1) / c₂))."""
    n = np.arange(simulations + 2)
    weight = np.sqrt(n) * (c1 + np.log((n + c2 + 1) / c2))

    def choose(tree: Tree, rows: np.ndarray) -> np.ndarray:
        q, prior, visits, legal = tree.at(rows, tree.q, tree.prior, tree.visits, tree.legal)
        # Eq. 2; Q̄ of what was never tried is 0
        score = np.maximum(tree.scaled(rows, q), 0.0) + prior * (weight[tree.count.take(rows)] / (1 + visits))
        return np.where(legal, score, -np.inf).argmax(0)  # of equal ones the first

    return choose


def improved(
    tree: Tree, rows: np.ndarray, c_visit: float, c_scale: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Danihelka et al.: completed Q of nodes, σ(completed Q), and π' = softmax(logits + σ(completed Q)), [A, rows]."""
    q, prior, visits, logits = tree.at(rows, tree.q, tree.prior, tree.visits, tree.logits)
    seen, total = visits > 0, visits.sum(0)
    # Eq. 33: v_mix = (v̂ + Σ_b N(b) / Σ_{N(b)>0} π(b) · Σ_{N(a)>0} π(a) q(a)) / (1 + Σ_b N(b))
    known = prior * seen
    mean = (known * q).sum(0) / np.maximum(known.sum(0), 1e-30)
    mixed = (tree.value.take(rows) + total * mean) / (1 + total)
    # Eq. 10: the Q of what was never tried is completed by it
    completed = np.where(seen, q, mixed)
    # Eq. 8: σ(q) = (c_visit + max_b N(b)) c_scale q
    sigma = (c_visit + visits.max(0)) * c_scale * np.clip(tree.scaled(rows, completed), 0, 1)
    return completed, sigma, softmax(logits + sigma, 0)  # Eq. 11


def halving(candidates: int, simulations: int) -> np.ndarray:
    """Sequential halving: for each simulation, how many visits the root's action that it takes must have had. The
    candidates are visited equally often, then the better half of them, and so on until two are left."""
    if candidates <= 1:
        return np.arange(simulations)
    rounds, left, done, order = math.ceil(math.log2(candidates)), candidates, 0, []
    while len(order) < simulations:
        times = max(1, simulations // (rounds * left))
        for _ in range(times):
            order += [done] * left
            done += 1
        left = max(2, left // 2)
    return np.array(order[:simulations])


def gumbel(root_scores: np.ndarray, wanted: np.ndarray, c_visit: float, c_scale: float) -> Callable:
    """Danihelka et al.'s choice. root_scores [B, A]: g + logits of the candidates, −∞ for others; wanted [B, S]."""

    def choose(tree: Tree, rows: np.ndarray) -> np.ndarray:
        _, sigma, policy = improved(tree, rows, c_visit, c_scale)
        (visits,) = tree.at(rows, tree.visits)
        # Eq. 14: argmax π'(a) − N(a) / (1 + Σ_b N(b)), so that visits come near π'
        choice = (policy - visits / tree.count.take(rows)).argmax(0)
        top = np.flatnonzero(rows % tree.size == 0)
        trees = rows[top] // tree.size
        due = visits[:, top] == wanted[trees, tree.count[tree.first[0]] - 1]
        choice[top] = np.where(due, root_scores[trees].T + sigma[:, top], -np.inf).argmax(0)
        return choice

    return choose


class Found(NamedTuple):
    """What a search found at B roots."""

    visits: np.ndarray  # [B, A]
    policy: np.ndarray  # [B, A]: what the policy should have said
    value: np.ndarray  # [B]: ν, the mean of all that was backed up to the root; Gumbel: Σ π' Q
    best: np.ndarray  # [B]: the action to take where no dice are thrown
    prior: np.ndarray  # [B, A]: what the policy said
    guess: np.ndarray  # [B]: what the value was before
    tree: Tree


def tree_search(
    dynamics: Callable, hidden: torch.Tensor, logits: np.ndarray, value: np.ndarray, legal: np.ndarray, gamma: float,
    args: Args, bounds: Optional[tuple[float, float]] = None, noise: bool = False,
) -> Found:  # fmt: skip
    """Step (1), Appendix B. `hidden`, logits [B, A] and value [B] are the roots'; legal [B, A] masks them, and them
    alone: inside the tree the model has to know. dynamics(hidden, actions) → hidden, reward, logits, value."""
    roots, simulations = len(logits), args.simulations
    tree = Tree(legal, simulations, bounds, args.least_range)
    root, every = tree.first, np.arange(roots)
    tree.expand(root, np.where(legal, logits, NEVER), value)
    prior = tree.prior[root].copy()
    if args.search == "puct":
        if noise:  # P = (1 − ε) p + ε η, η ~ Dirichlet(α) over the legal actions
            eta = np.random.gamma(args.noise_alpha, size=prior.shape) * legal + 1e-12 * legal
            tree.prior[root] += args.noise_share * (eta / eta.sum(1, keepdims=True) - prior)
        choose = puct(args.c1, args.c2, simulations)
    else:
        g = np.random.gumbel(size=prior.shape) if noise else 0.0
        scores = np.where(legal, logits + g, -np.inf)
        # Gumbel top-k: a draw of k actions without replacement
        count = np.minimum(legal.sum(1), min(args.considered, simulations))
        rank = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1, kind="stable")
        scores = np.where(rank < count[:, None], scores, -np.inf)
        orders = {n: halving(n, simulations) for n in set(count.tolist())}
        choose = gumbel(scores, np.stack([orders[n] for n in count.tolist()]), args.gumbel_visits, args.gumbel_scale)
    # Node i of all trees lies in memory[i]
    memory = hidden.new_empty((simulations + 1, *hidden.shape))
    memory[0], changed = hidden, root
    for i in range(1, simulations + 1):
        tree.choice[changed] = choose(tree, changed)
        path = tree.descend()
        rows, taken = np.empty(roots, np.int64), np.empty(roots, np.int64)
        for trees, at, chosen in path:  # what is written last stands: the deepest
            rows[trees], taken[trees] = at, chosen
        parents = memory.flatten(0, 1)[torch.from_numpy((rows - root) * roots + every).to(memory.device)]
        memory[i], reward, logits, value = dynamics(parents, torch.from_numpy(taken))
        tree.reward[rows, taken], tree.child[rows, taken] = reward, root + i
        tree.expand(root + i, logits, value)
        changed = tree.backup(path, value, gamma)
    visits = tree.visits[root]
    if args.search == "puct":
        found = (tree.value[root] + tree.total[root].sum(1)) / tree.count[root]
        return Found(visits, visits / simulations, found, visits.argmax(1), prior, tree.value[root], tree)
    q, sigma, policy = (x.T for x in improved(tree, root, args.gumbel_visits, args.gumbel_scale))
    found = (policy * np.where(legal, q, 0.0)).sum(1)  # the root's visits are spread evenly, whatever Q says
    most = visits == visits.max(1, keepdims=True)
    best = np.where(most, scores + sigma, -np.inf).argmax(1)
    return Found(visits, policy, found, best, prior, tree.value[root], tree)


class Setting(NamedTuple):
    """What the search and the store must know of a task."""

    shape: tuple[int, ...]
    dtype: np.dtype
    actions: int
    rules: Optional["Rules"]  # of a board
    gamma: float  # below 0 for two players
    bounds: Optional[tuple[float, float]]  # of Q, where they are known
    stack: int  # frames in an observation


def setting_of(args: Args, env: gym.Env) -> Setting:
    rules, game = BOARDS.get(args.env_id), args.env_id.startswith("ALE/")
    space = env.observation_space
    return Setting(
        space.shape, space.dtype, int(env.action_space.n), rules, -args.gamma if rules else args.gamma,
        (-1.0, 1.0) if rules else None, args.frames if game else 1,
    )  # fmt: skip


class TreePlanner:
    """The network and the search with it."""

    def __init__(self, network: MuZero, setting: Setting, args: Args, device: torch.device):
        self.network, self.setting, self.args, self.device = network, setting, args, device

    def legal(self, obs: np.ndarray) -> np.ndarray:
        """[B, A] bool"""
        if self.setting.rules is None:
            return np.ones((len(obs), self.setting.actions), bool)
        return self.setting.rules.legal(obs[:, 0].astype(np.int8) - obs[:, 1].astype(np.int8))

    def numbers(self, hidden: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Policy logits [B, A], value [B] and reward [B], in one copy from the device."""
        logits, value, reward = self.network.prediction(hidden)
        numbers = from_logits(torch.stack([value, reward]), self.network.squashed)
        numbers = torch.cat([numbers.T, logits], 1).cpu().numpy().astype(np.float64)
        return numbers[:, 2:], numbers[:, 0], numbers[:, 1]

    def dynamics(self, hidden: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, np.ndarray, ...]:
        hidden = self.network.dynamics(hidden, a.to(self.device))
        logits, value, reward = self.numbers(hidden)
        return hidden, reward, logits, value

    @torch.inference_mode()
    def search(self, obs: np.ndarray, noise: bool = False) -> Found:
        hidden = self.network.representation(torch.from_numpy(obs).to(self.device))
        logits, value, _ = self.numbers(hidden)
        setting = self.setting
        return tree_search(
            self.dynamics, hidden, logits, value, self.legal(obs), setting.gamma, self.args, setting.bounds, noise
        )

    @torch.inference_mode()
    def values(self, obs: np.ndarray) -> np.ndarray:
        return self.network.value(torch.from_numpy(obs).to(self.device)).cpu().numpy()

    def act(self, obs: Any) -> int:
        """Without dice: for evaluations."""
        return int(self.search(np.asarray(obs)[None]).best[0])

    def play_together(
        self, envs: list[gym.Env], seed: int, max_steps: int, frames: Optional[list] = None
    ) -> tuple[list[float], list[int]]:
        """The episodes that `evaluate` plays one after the other, all at once: the trees share the network's calls."""
        obs = [np.asarray(env.reset(seed=seed + 10_000 + i)[0]) for i, env in enumerate(envs)]
        returns, lengths, going = [0.0] * len(envs), [0] * len(envs), list(range(len(envs)))
        while going:
            if frames is not None and 0 in going:
                frames.append(thumbnail(envs[0].render()))
            best = self.search(np.stack([obs[i] for i in going])).best.tolist()
            still = []
            for i, action in zip(going, best, strict=True):
                seen, reward, terminated, truncated, _ = envs[i].step(action)
                obs[i], returns[i], lengths[i] = np.asarray(seen), returns[i] + float(reward), lengths[i] + 1
                if not (terminated or truncated or lengths[i] >= max_steps):
                    still.append(i)
            if frames is not None and 0 in going and 0 not in still:
                frames.append(thumbnail(envs[0].render()))
            going = still
        return returns, lengths


def draw_actions(found: Found, temperature: np.ndarray, args: Args) -> tuple[np.ndarray, np.ndarray]:
    """Step (2): p(a) ∝ N(a)^(1/T), T [B]; 0: the most visited. The Gumbel search has its dice at the root already:
    where it considers every action what it takes is near to a draw from π'. Actions, and how likely each was."""
    every = np.arange(len(found.visits))
    if args.search == "gumbel":
        return found.best, found.policy[every, found.best]
    T = temperature[:, None]
    logs = np.where(found.visits > 0, np.log(np.maximum(found.visits, 1)), -np.inf)
    # Gumbel's way to draw: argmax of log p + g
    action = (logs + T * np.random.gumbel(size=logs.shape)).argmax(1)
    return action, np.where(temperature > 0, softmax(logs / np.where(T > 0, T, 1.0))[every, action], 1.0)


def temperature(args: Args, step: int, moves: np.ndarray) -> np.ndarray:
    """T of each game, which has seen so many moves."""
    done = step / args.temperature_steps if args.temperature_steps else 0.0
    now = args.temperature * (1.0 if done < 0.5 else 0.5 if done < 0.75 else 0.25)
    return np.where((moves >= args.temperature_moves) & (args.temperature_moves > 0), 0.0, now)


# ── Learning ──────────────────────────────────────────────────────────────────────────────────────────────────────

MOVE, END, CUT = 0, 1, 2  # kinds of rows: a move; the move that ended the game; no move, the last observation of a cut


class Histories:
    """What was played. Each game has a ring of rows of its own, in which its episodes follow one another; row numbers
    count on for ever, and number t lies in slot t % rows. Of stacked frames each row has the newest alone."""

    def __init__(
        self, games: int, keep: int, look: int, setting: Setting, folder: Optional[Path] = None, spare: int = 0
    ):
        """`look` rows after one are needed to learn from it, or its episode's end. Images lie in a file in `folder`;
        with `spare` rows more than are kept a run that was killed finds all that its checkpoint knows of."""
        self.games, self.keep, self.look, self.stack = games, keep, look, setting.stack
        channels = (setting.shape[0] // setting.stack, *setting.shape[1:]) if setting.stack > 1 else setting.shape
        in_file = folder and math.prod(setting.shape) > 2_000
        self.rows = rows = keep + (spare if in_file else 0)
        if in_file:
            path = folder / "replay.dat"
            mode = "r+" if path.exists() else "w+"
            obs = np.memmap(path, setting.dtype, mode, shape=(games, rows, *channels))
        else:
            obs = np.zeros((games, rows, *channels), setting.dtype)
        self.columns = {
            "obs": obs, "action": np.zeros((games, rows), np.int64), "reward": np.zeros((games, rows), np.float32),
            "policy": np.zeros((games, rows, setting.actions), np.float32),
            "chance": np.ones((games, rows), np.float32),  # of the action, when it was played
            "value": np.zeros((games, rows), np.float32), "kind": np.zeros((games, rows), np.uint8),
            "age": np.zeros((games, rows), np.int32),  # moves since the episode began
        }  # fmt: skip
        self.priority = np.zeros((games, rows))  # 0 for rows that can't be drawn
        self.largest = 1.0
        self.made, self.ready = np.zeros(games, np.int64), np.zeros(games, np.int64)  # rows so far; can be drawn

    def add(self, games: np.ndarray, obs: np.ndarray, **columns: np.ndarray) -> None:
        """A row for each of these games."""
        slots = self.made[games] % self.rows
        self.columns["obs"][games, slots] = obs[:, -(obs.shape[1] // self.stack) :] if self.stack > 1 else obs
        for name, column in columns.items():
            self.columns[name][games, slots] = column
        self.priority[games, slots] = 0.0
        for ahead in range(self.stack):  # what has lost a frame of its own goes too
            self.priority[games, (slots - self.keep + ahead) % self.rows] = 0.0
        self.made[games] += 1
        over = columns["kind"] != MOVE
        ready = np.where(over, self.made[games], np.maximum(self.ready[games], self.made[games] - self.look))
        for game, old, new in zip(games, self.ready[games], ready, strict=True):
            fresh = np.arange(old, new) % self.rows
            self.priority[game, fresh] = np.where(self.columns["kind"][game, fresh] == CUT, 0.0, self.largest)
        self.ready[games] = ready

    def oldest(self) -> np.ndarray:
        return np.where(self.made > self.keep, self.made - self.keep + self.stack - 1, 0)

    def spread(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each number of the observations."""
        obs = self.columns["obs"][np.arange(self.rows) < self.made[:, None]]
        return obs.mean(0), obs.std(0)

    def positions(self) -> int:
        return int(np.maximum(self.ready - self.oldest(), 0).sum())

    def draw(self, count: int, prioritized: bool, alpha: float, beta: float) -> tuple[np.ndarray, np.ndarray, ...]:
        """Step (4): games, row numbers, and what each draw counts."""
        oldest = self.oldest()
        if not prioritized:
            ends = np.maximum(self.ready - oldest, 0).cumsum()
            chosen = np.random.randint(ends[-1], size=count)
            games = np.searchsorted(ends, chosen, side="right")
            return games, oldest[games] + chosen - np.concatenate([[0], ends])[games], np.ones(count, np.float32)
        ends = (self.priority**alpha * (self.priority > 0)).ravel().cumsum()
        chosen = np.searchsorted(ends, np.random.random_sample(count) * ends[-1], side="right")
        games, slots = np.divmod(np.minimum(chosen, len(ends) - 1), self.rows)
        # P(i) = p_i^α / Σ_k p_k^α, w_i = (1 / (N P(i)))^β: with β = 1 their mean is that of a uniform draw
        chance = self.priority[games, slots] ** alpha / ends[-1]
        weight = ((self.priority > 0).sum() * chance) ** -beta
        numbers = self.ready[games] - 1 - (self.ready[games] - 1 - slots) % self.rows
        return games, numbers, weight.astype(np.float32)

    def take(self, name: str, games: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """A column at row numbers of any shape; `games` has one more entry or as many."""
        slots = numbers % self.rows
        if name != "obs" or self.stack == 1:
            return self.columns[name][games, slots]
        age = self.columns["age"][games, slots]
        frames = [self.columns[name][games, (numbers - np.minimum(j, age)) % self.rows] for j in range(self.stack)]
        return np.concatenate(frames[::-1], numbers.ndim)

    def renew(self, games: np.ndarray, numbers: np.ndarray, policy: np.ndarray, value: np.ndarray) -> None:
        """Reanalyze: what a new search found."""
        slots = numbers % self.rows
        self.columns["policy"][games, slots], self.columns["value"][games, slots] = policy, value

    def reprioritize(self, games: np.ndarray, numbers: np.ndarray, priority: np.ndarray) -> None:
        slots = numbers % self.rows
        drawable = self.priority[games, slots] > 0
        self.priority[games, slots] = np.where(drawable, np.maximum(priority, 1e-3), 0.0)
        self.largest = max(self.largest, float(priority.max()))

    def state_dict(self) -> dict:
        columns = {name: None if isinstance(x, np.memmap) else x for name, x in self.columns.items()}
        if isinstance(self.columns["obs"], np.memmap):
            self.columns["obs"].flush()
        names = ("priority", "largest", "made", "ready")
        return {"columns": columns, **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, state: dict) -> None:
        for name, column in state["columns"].items():
            if column is not None:
                self.columns[name][:] = column.numpy()
        self.largest = state["largest"]
        for name in ("priority", "made", "ready"):
            getattr(self, name)[:] = state[name].numpy()


def n_step(
    reward: np.ndarray, inside: np.ndarray, cut: np.ndarray, steps: int, unroll: int, gamma: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Step (4): z_t = u_{t+1} + γ u_{t+2} + ... + γ^{n−1} u_{t+n} + γ^n ν_{t+n} for t, ..., t + K.

    Of windows of K + n + 1 rows [B, W], in which u_{t+1} stands beside a_t; `inside` their episode, `cut` from the row
    on in which it was cut. The sums of rewards [B, K+1], the place in the window of the row whose value follows, and by
    what it is multiplied. 0: the episode ended before."""
    k = np.arange(unroll + 1)
    powers = float(gamma) ** np.arange(steps)
    sums = np.stack([(reward[:, i : i + steps] * powers).sum(1) for i in k], 1)
    # A time limit is no end: the value of the last observation stands for what would have come
    row = np.minimum(k + steps, (~cut).sum(1)[:, None])
    factor = np.where(np.take_along_axis(inside, row, 1) & (row >= k), float(gamma) ** np.maximum(row - k, 0), 0.0)
    return sums, row, factor


def vtrace(
    reward: np.ndarray, value: np.ndarray, ratio: np.ndarray, steps: int, unroll: int, gamma: float
) -> np.ndarray:
    """Espeholt et al., Eq. 1: z_t = ν_t + Σ_{i<n} γ^i c_t ... c_{t+i−1} ρ_{t+i} (u_{t+i+1} + γ ν_{t+i+1} − ν_{t+i}) for
    t, ..., t + K. `ratio` is ρ = c = min(1, π(a) / μ(a)), μ the policy that played, π the last one that was searched
    for; all 1: n_step. Windows as there, with 0 for what is not of the episode."""
    surprise, width = reward[:, :-1] + gamma * value[:, 1:] - value[:, :-1], unroll + 1
    target, weight = value[:, :width].copy(), np.ones((len(value), width))
    for i in range(steps):
        weight = weight * ratio[:, i : i + width]
        target += gamma**i * weight * surprise[:, i : i + width]
    return target


class Unrolled(NamedTuple):
    """Positions and what the model should say along the K steps after them."""

    obs: torch.Tensor  # [B, ...]
    action: torch.Tensor  # [B, K]
    value: torch.Tensor  # [B, K+1]: z
    reward: torch.Tensor  # [B, K]: u
    policy: torch.Tensor  # [B, K+1, A]: π
    known: torch.Tensor  # [B, K+1]: 0 where an episode was cut, and nobody knows
    moved: torch.Tensor  # [B, K+1]: 1 where there was a move to choose
    weight: torch.Tensor  # [B]
    later: Optional[torch.Tensor] = None  # [K, B, ...]: observations, where hidden states are compared with them


def make_batch(
    store: Histories, games: np.ndarray, numbers: np.ndarray, weight: np.ndarray, value_of: Optional[Callable],
    gamma: float, args: Args, device: torch.device,
) -> Unrolled:  # fmt: skip
    """Step (4): the targets of drawn positions. value_of values observations, if stored values are too old."""
    column, window, K = games[:, None], numbers[:, None] + np.arange(args.unroll + args.steps + 1), args.unroll
    kind, action, policy = (store.take(name, column, window) for name in ("kind", "action", "policy"))
    over = np.cumsum(kind != MOVE, 1)
    inside = np.concatenate([np.ones((len(kind), 1), bool), over[:, :-1] == 0], 1)  # a row of this episode
    moved, cut = inside & (kind != CUT), np.cumsum(inside & (kind == CUT), 1) > 0
    reward = store.take("reward", column, window) * moved

    def value_at(rows: np.ndarray, needed: np.ndarray) -> np.ndarray:
        if not value_of:
            return store.take("value", column, rows) * needed
        values = np.zeros(rows.shape)
        if needed.any():
            values[needed] = value_of(store.take("obs", np.broadcast_to(column, rows.shape)[needed], rows[needed]))
        return values

    if args.vtrace:
        now = np.take_along_axis(policy, action[:, :, None], 2)[:, :, 0]  # since a last search, if there was one
        ratio = np.minimum(now / np.maximum(store.take("chance", column, window), 1e-6), 1.0) * moved
        target = vtrace(reward, value_at(window, inside), ratio, args.steps, K, gamma)
    else:
        sums, row, factor = n_step(reward, inside, cut, args.steps, K, gamma)
        target = sums + factor * value_at(numbers[:, None] + row, factor != 0)
    # In the absorbing state any action may be taken, and nothing follows
    anything = np.random.randint(policy.shape[2], size=(len(games), K))
    action = np.where(moved[:, :K], action[:, :K], anything)
    later = [store.take("obs", games, window[:, 1 : K + 1].T)] if args.consistency else []
    return Unrolled(
        *(
            torch.from_numpy(np.ascontiguousarray(x)).to(device)
            for x in (
                store.take("obs", games, numbers), action, target.astype(np.float32), reward[:, :K],
                policy[:, : K + 1], (~cut[:, : K + 1]).astype(np.float32), moved[:, : K + 1].astype(np.float32),
                weight, *later,
            )
        )
    )  # fmt: skip


def cross_entropy(logits: torch.Tensor, chances: torch.Tensor) -> torch.Tensor:
    return -(chances * logits.log_softmax(-1)).sum(-1)


def half_gradient(s: torch.Tensor) -> torch.Tensor:
    """Appendix G: the gradient into the dynamics' input is halved, whatever the unroll's length."""
    return 0.5 * s + 0.5 * s.detach()


def muzero_loss(network: MuZero, batch: Unrolled, args: Args) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Step (5). Eq. 1: l_t = Σ_k l^p(π_{t+k}, p^k) + l^v(z_{t+k}, v^k) + l^r(u_{t+k}, r^k), each unrolled step's
    divided by K, the reward's from k = 1 on. The losses of policy, value and reward, and the values at k = 0."""
    code = squash if args.squash else lambda x: x
    states = [network.representation(batch.obs)]
    for k in range(args.unroll):
        states.append(network.dynamics(half_gradient(states[k]), batch.action[:, k]))
    policy, value, reward = (x.unflatten(0, (args.unroll + 1, -1)) for x in network.prediction(torch.cat(states)))
    apart = torch.zeros_like(batch.reward.T)
    if args.consistency:
        with torch.no_grad():
            seen = network.representation(batch.later.flatten(0, 1))
        apart = (torch.cat(states[1:]) - seen).square().flatten(1).sum(1).view_as(apart)
    share = torch.full((args.unroll + 1, 1), 1 / args.unroll, device=value.device)
    share[0] = 1.0
    share = share * batch.weight / len(batch.obs)  # [K+1, B]
    z, u = two_hot(code(batch.value.T), args.support), two_hot(code(batch.reward.T), args.support)
    losses = torch.stack([
        (share * batch.moved.T * cross_entropy(policy, batch.policy.transpose(0, 1))).sum(),
        (share * batch.known.T * cross_entropy(value, z)).sum(),
        (share[1:] * batch.known.T[:-1] * cross_entropy(reward[1:], u)).sum(),
        (share[1:] * batch.moved.T[1:] * apart).sum(),  # not in the paper: ‖s_k − h(o_{t+k})‖²
    ])  # fmt: skip
    loss = losses @ losses.new_tensor([1.0, args.value_weight, 1.0, args.consistency])
    return losses, loss, from_logits(value[0].detach(), args.squash)


@torch.no_grad()
def fresh_metrics(network: MuZero, batch: Unrolled, later: dict[int, tuple], args: Args) -> dict[str, torch.Tensor]:
    """On positions that were not learned from yet: the loss, and how far the value that is unrolled k steps is from
    the value of what was then seen. later: k → actions [B, k], observations, rows that have them."""
    metrics = {"model/heldout_loss": muzero_loss(network, batch, args)[1]}
    for k, (actions, obs, there) in later.items():
        s = network.representation(batch.obs)
        for j in range(k):
            s = network.dynamics(s, actions[:, j])
        unrolled = from_logits(network.prediction(s)[1], args.squash)
        error = (unrolled - network.value(obs)).abs()
        metrics[f"model/value_drift_{k}"] = (error * there).sum() / there.sum().clamp_min(1.0)
    return metrics


def rows_ahead(store: Histories, games: np.ndarray, numbers: np.ndarray, k: int, device: torch.device) -> tuple:
    """For fresh_metrics: what was played in the next k rows, and seen after them."""
    window = np.minimum(numbers[:, None] + np.arange(k + 1), store.made[games][:, None] - 1)
    there = (store.take("kind", games[:, None], window)[:, :k] == MOVE).all(1) & (window[:, -1] == numbers + k)
    found = (
        store.take("action", games[:, None], window[:, :k]),
        store.take("obs", games, window[:, -1]),
        there.astype(np.float32),
    )
    return tuple(torch.from_numpy(np.ascontiguousarray(x)).to(device) for x in found)


# ── What it searched: drawn ───────────────────────────────────────────────────────────────────────────────────────


class Seen(NamedTuple):
    """An episode of the search without dice."""

    obs: list[np.ndarray]
    found: list[Found]
    action: list[int]


def watch_search(env: gym.Env, planner: TreePlanner, seed: int, most: int = 200) -> Seen:
    """In a time of its own: the dice of training stay as they were."""
    before = random_states()
    seed_everything(seed)
    obs, _ = env.reset(seed=seed)
    seen, over = Seen([], [], []), False
    while not over and len(seen.obs) < most:
        found = planner.search(np.asarray(obs)[None])
        seen.obs.append(np.asarray(obs))
        seen.found.append(found)
        seen.action.append(int(found.best[0]))
        obs, _, terminated, truncated, _ = env.step(seen.action[-1])
        over = terminated or truncated
    set_random_states(before)
    return seen


def tree_layout(tree: Tree) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int, int]]]:
    """Places of the first tree's nodes: x [S+1], depth [S+1]; edges (node, child, action). Leaves stand side by side,
    other nodes above the middle of their children."""
    x, depth, edges, free = np.zeros(tree.size), np.zeros(tree.size, int), [], 0
    stack = [(0, False)]
    while stack:
        node, done = stack.pop()
        ways = [(int(child), a) for a, child in enumerate(tree.child[node]) if child >= 0]
        if done:
            x[node] = np.mean([x[child] for child, _ in ways])
        elif not ways:
            x[node], free = free, free + 1
        else:
            stack.append((node, True))
            for child, a in reversed(ways):
                depth[child] = depth[node] + 1
                edges.append((node, child, a))
                stack.append((child, False))
    return x, depth, edges


def draw_search(seen: Seen, rules: Optional["Rules"], title: str) -> np.ndarray:
    """The picture: the tree of one move, what the policy said before and after it, the values along the episode before
    and after the search, and of a board the position with the visits."""
    change = [np.abs(found.policy - found.prior).sum() for found in seen.found]
    at = int(np.argmax(change))  # where the search changed the policy most
    found = seen.found[at]
    figure = Figure(figsize=(10.5 if rules else 9, 3.4), dpi=80)
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(1, 4 if rules else 3, width_ratios=[4, 2, 3, 2.4] if rules else [4, 2, 3])
    x, depth, edges = tree_layout(found.tree)
    best = found.tree.visits.max()
    for node, child, a in edges:
        n, q = found.tree.visits[node, a], found.tree.q[node, a]
        low, high = found.tree.low[0], found.tree.high[0]
        colour = (q - low) / (high - low) if high > low else 0.5
        line, width = ([x[node], x[child]], [-depth[node], -depth[child]]), 0.5 + 4.5 * n / best
        axes[0].plot(*line, color=(1 - colour, 0.45, colour), linewidth=width, solid_capstyle="round")
        if node == 0 and n > best / 4:  # others would hide each other
            axes[0].annotate(f"{a}: {n}", (x[child], -1), fontsize=7, ha="center", va="bottom")
    axes[0].plot(x[0], 0, "ko", markersize=4)
    axes[0].set_axis_off()
    axes[0].set_title(f"the tree of move {at + 1}: {found.tree.size - 1} simulations", fontsize=8)
    actions = np.arange(found.policy.shape[1])
    axes[1].bar(actions - 0.2, found.prior[0], 0.4, label="before", color="silver")
    axes[1].bar(actions + 0.2, found.policy[0], 0.4, label="after", color="tab:blue")
    axes[1].set_xticks(actions[:: len(actions) // 10 + 1])
    axes[1].set_title("policy", fontsize=8)
    axes[2].plot([f.guess[0] for f in seen.found], color="silver", label="before")
    axes[2].plot([f.value[0] for f in seen.found], color="tab:blue", label="after the search")
    axes[2].axvline(at, color="black", linewidth=0.5)
    axes[2].set_title("value, along an episode", fontsize=8)
    for axis in axes[1:3]:
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=7)
    if rules:
        draw_board(axes[3], rules, seen.obs[at], found.visits[0])
    figure.subplots_adjust(0.01, 0.09, 0.99, 0.83, wspace=0.22)
    return figure_to_array(figure)


def draw_board(axis: Any, rules: "Rules", obs: np.ndarray, visits: np.ndarray) -> None:
    """The mover's stones are ×; on each cell the visits of the move that goes there."""
    shade = np.tensordot(visits, rules.planes[:, 0], 1) * (obs.sum(0) == 0)
    axis.imshow(shade, cmap="Blues", vmin=0, vmax=2 * max(visits.max(), 1))
    for row, column in np.ndindex(rules.rows, rules.columns):
        text = "×" if obs[0, row, column] else "○" if obs[1, row, column] else ""
        axis.text(column, row, text, ha="center", va="center", fontsize=14)
    for a, n in enumerate(visits.tolist()):
        row, column = (0, a) if rules.drop else divmod(a, rules.columns)
        if n:
            axis.text(column + 0.45, row - 0.35, str(n), ha="right", va="center", fontsize=7, color="navy")
    axis.set(xticks=[], yticks=[])
    axis.set_title("the board, and visits", fontsize=8)


# ── Training ──────────────────────────────────────────────────────────────────────────────────────────────────────


def check_settings(args: Args) -> None:
    """Every wrong setting that can be seen before training starts, as one sentence."""
    check_run_settings(args)
    for least, names in (
        (1, ("envs", "simulations", "considered", "steps", "unroll", "replay_size", "learning_starts")),
        (1, ("train_every", "batch_size", "support", "latent", "hidden", "channels", "frames", "opponent_depth")),
        (0, ("blocks", "episode_limit", "temperature", "temperature_steps", "temperature_moves", "reanalyze")),
        (0, ("decay_steps", "weight_decay", "priority_alpha", "priority_beta", "gumbel_visits", "consistency")),
        (0, ("openings", "least_range")),
    ):
        for name in names:
            if getattr(args, name) < least:
                stop(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least {least}")
    for name in ("learning_rate", "gradient_clip", "value_weight", "noise_alpha", "c1", "c2", "gumbel_scale"):
        if getattr(args, name) <= 0:
            stop(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be above 0")
    if not 0 < args.averaging <= 1:
        stop(f"--averaging is {args.averaging}: it must lie in (0, 1]")
    for name in ("gamma", "noise_share"):
        if not 0 <= getattr(args, name) <= 1:
            stop(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must lie in [0, 1]")
    if args.replay_size // args.envs < 2 * (args.unroll + args.steps + args.frames):
        stop(f"--replay-size {args.replay_size} is too small for {args.envs} games that look {args.steps} steps ahead")
    if (rules := BOARDS.get(args.env_id)) and args.openings > 2 * rules.line - 2:
        stop(f"--openings is {args.openings}: {args.env_id} could be won by then, {2 * rules.line - 2} is the most")
    if args.vtrace and not args.reanalyze:
        stop("--vtrace goes by what old positions are searched to be: give it some --reanalyze, or --no-vtrace")
    known = args.replay_size - args.envs * (args.unroll + args.steps + args.frames)
    if args.batch_size > known:
        stop(f"--batch-size {args.batch_size} is more than the {known} rows of --replay-size that can be drawn")
    if args.opponent == "perfect" and args.env_id == "ConnectFour-v0":
        stop("--opponent perfect plays tic-tac-toe alone: take minimax")


def make_tree_planner(args: Args, env: gym.Env, device: torch.device) -> TreePlanner:
    setting = setting_of(args, env)
    planes = setting.rules.planes if setting.rules else None
    byte = setting.dtype == np.uint8 and setting.rules is None
    network = MuZero(setting.shape, setting.actions, planes, byte, args).to(device)
    return TreePlanner(network, setting, args, device)


def load_policy(args: Args, env: gym.Env, checkpoint: dict) -> Callable[[], Callable[[Any], Any]]:
    """For --evaluate: what makes the policy of a checkpoint, for each episode the same."""
    planner = make_tree_planner(args, env, pick_device(args.device))
    planner.network.load_state_dict(checkpoint["learned"]["average"])
    return lambda: planner.act


def train(args: Args) -> Path:
    if args.play is not None:
        return play_against_a_person(args)
    seed_everything(args.seed)
    eval_envs = [make_task(args, render=args.capture_video and i == 0) for i in range(args.eval_episodes)]
    eval_env = eval_envs[0]
    if args.learning_starts >= args.total_timesteps:
        print(f"nothing will be learned: the first {args.learning_starts:,} steps are kept alone (--learning-starts)")
    device = pick_device(args.device)
    print(f"device: {device}")
    run_dir, checkpoint = open_run(args)

    planner = make_tree_planner(args, eval_env, device)
    setting, average = planner.setting, planner.network
    network = make_tree_planner(args, eval_env, device).network
    network.load_state_dict(average.state_dict())
    optimizer = torch.optim.Adam(network.parameters(), args.learning_rate, weight_decay=args.weight_decay, fused=True)
    spare = 2 * (args.checkpoint_every // args.envs + 2)  # as many rows a game may have between two checkpoints
    store = Histories(args.envs, args.replay_size // args.envs, args.unroll + args.steps, setting, run_dir, spare)
    games = SelfPlay(setting.rules, args.envs, args.openings) if setting.rules else Copies(args)
    step = updates = 0
    returns, every = np.zeros(args.envs), np.arange(args.envs)
    eval_env.reset(seed=args.seed)
    eval_env.action_space.seed(args.seed)
    at_first = env_state(eval_env)
    if checkpoint:
        step, updates, returns = checkpoint["step"], checkpoint["updates"], checkpoint["returns"].numpy()
        network.load_state_dict(checkpoint["learned"]["network"])
        average.load_state_dict(checkpoint["learned"]["average"])
        optimizer.load_state_dict(checkpoint["optimisers"]["all"])
        store.load_state_dict(checkpoint["store"])
        games.load_state_dict(checkpoint["games"])
        set_random_states(checkpoint["random"])
    log = RunLog(args, run_dir, checkpoint)
    loss_of = torch.compile(muzero_loss) if args.compile else muzero_loss

    # These look at the variables of the loop as they are when they are called, and leave the dice alone.
    def save() -> None:
        save_checkpoint(
            run_dir, step=step, updates=updates, returns=returns,
            learned={"network": network.state_dict(), "average": average.state_dict()},
            optimisers={"all": optimizer.state_dict()}, store=store.state_dict(), games=games.state_dict(),
            env=at_first, log=log.state_dict(),
        )  # fmt: skip
        log.lap("log")

    def measure() -> None:
        frames = [] if args.capture_video else None
        log.scores = planner.play_together(eval_envs, args.seed, args.eval_max_steps, frames)
        returns, lengths = log.scores
        log.scalars(step, {"eval/episodic_return": np.mean(returns), "eval/episodic_length": np.mean(lengths)})
        if setting.rules:
            won, lost = np.mean(np.array(returns) > 0), np.mean(np.array(returns) < 0)
            log.scalars(step, {"eval/wins": won, "eval/losses": lost})
        if frames:
            save_gif(frames, run_dir / "videos" / f"step_{step:08d}.gif")
            log.lap("log")

    def draw() -> None:
        seen = watch_search(eval_env, planner, args.seed)
        log.picture(step, draw_search(seen, setting.rules, f"{args.env_id}: step {step:,}"))

    def batch_at(chosen: np.ndarray, numbers: np.ndarray, weight: np.ndarray) -> Unrolled:
        value_of = planner.values if args.fresh_values else None
        return make_batch(store, chosen, numbers, weight, value_of, setting.gamma, args, device)

    def look_at_unseen(ready: np.ndarray) -> None:
        """On positions that can be drawn for the first time now."""
        fresh = np.concatenate([np.arange(old, new) for old, new in zip(ready, store.ready, strict=True)])
        chosen = np.repeat(every, store.ready - ready)
        fresh, chosen = fresh[-args.batch_size :], chosen[-args.batch_size :]
        before = random_states()  # absorbing states have random actions
        batch = batch_at(chosen, fresh, np.ones(len(fresh), np.float32))
        set_random_states(before)
        later = {k: rows_ahead(store, chosen, fresh, k, device) for k in (1, 5)}
        for tag, value in fresh_metrics(network, batch, later, args).items():
            log.mean(tag, value)

    with StopSignal() as stop_signal:
        while step < args.total_timesteps:
            # (1) search from the present observation of every game, and from old ones that are looked at anew
            obs, moves, ready = games.obs, games.moves.copy(), store.ready.copy()
            old_ones = int((step + args.envs) * args.reanalyze) - int(step * args.reanalyze)
            old = store.draw(old_ones, False, 0.0, 0.0)[:2] if old_ones and store.positions() else None
            roots = np.concatenate([obs, store.take("obs", *old)]) if old else obs
            found = planner.search(roots, noise=True)
            log.lap("search")
            if old:
                store.renew(*old, found.policy[args.envs :], found.value[args.envs :])
                found = Found(*(x[: args.envs] for x in found[:-1]), found.tree)

            # (2) draw actions from the visit counts, and play them
            action, chance = draw_actions(found, temperature(args, step, moves), args)
            reward, terminated, truncated, last_obs = games.step(action)
            log.lap("env")

            # (3) keep what was seen, done, found and searched; where an episode was cut, what was seen last too
            store.add(
                every, obs, action=action, chance=chance, reward=reward, policy=found.policy, value=found.value,
                kind=np.where(terminated, END, MOVE), age=moves,
            )  # fmt: skip
            if len(cut := np.flatnonzero(truncated & ~terminated)):
                store.add(
                    cut, last_obs[cut], value=planner.values(last_obs[cut]), kind=np.full(len(cut), CUT),
                    age=moves[cut] + 1,
                )  # fmt: skip
            step += args.envs
            # Of two players the return is the first one's
            returns += np.where((setting.gamma < 0) & (moves % 2 == 1), -1, 1) * reward
            over = terminated | truncated
            for i in np.flatnonzero(over):
                log.episode(step, returns[i], int(moves[i]) + 1)
            returns[over] = 0.0
            log.mean("model/value", found.value.mean())
            log.mean("model/policy_entropy", -(found.policy * np.log(found.policy + 1e-12)).sum(1).mean())
            log.mean("model/search_change", 0.5 * np.abs(found.policy - found.prior).sum(1).mean())
            log.lap("log")

            due = log.due("log", args.log_every, step, wait_for=bool((store.ready > ready).any()))
            if due and updates and (store.ready > ready).any():
                look_at_unseen(ready)
                log.lap("log")
            began = step >= args.learning_starts and store.positions() >= args.batch_size
            wanted = (step - args.learning_starts) // args.train_every if began else 0
            if began and args.decay_steps:
                for group in optimizer.param_groups:
                    group["lr"] = args.learning_rate * 0.1 ** min(step / args.decay_steps, 1.0)
            for _ in range(max(wanted - updates, 0)):
                if network.normalized and updates % 100 == 0:
                    for net in (network, average):
                        net.set_normalizer(*store.spread())
                # (4) draw positions, and make their targets
                chosen, numbers, weight = store.draw(
                    args.batch_size, args.prioritized, args.priority_alpha, args.priority_beta
                )
                batch = batch_at(chosen, numbers, weight)
                log.lap("replay")
                # (5) unroll the model along what was played; learn policy, value and reward
                losses, loss, values = loss_of(network, batch, args)
                optimizer.zero_grad()
                loss.backward()
                norm = nn.utils.clip_grad_norm_(network.parameters(), args.gradient_clip)
                optimizer.step()
                updates += 1
                # (6) the network that searches follows the one that learns: θ⁻ ← θ⁻ + τ (θ − θ⁻)
                with torch.no_grad():
                    for slow, fast in zip(average.parameters(), network.parameters(), strict=True):
                        slow.lerp_(fast, args.averaging)
                if args.prioritized:
                    error = (values - batch.value[:, 0]).abs() * batch.known[:, 0]
                    store.reprioritize(chosen, numbers, error.cpu().numpy().astype(np.float64))
                for tag, value in zip(("policy", "value", "reward", "consistency"), losses.detach(), strict=True):
                    log.mean(f"losses/{tag}", value)
                log.mean("losses/norm", norm)
                log.lap("model")
            if began and not torch.stack([p.detach().sum() for p in network.parameters()]).isfinite().all():
                stop(f"the network's numbers have run away at step {step:,}: take a smaller --learning-rate")

            log.bar.update(args.envs)
            if due:
                log.flush(step)
            if log.due("eval", args.eval_every, step) and step < args.total_timesteps:
                measure()
            if log.due("picture", args.picture_every, step, at_most=20) and step < args.total_timesteps:
                draw()
            if log.due("checkpoint", args.checkpoint_every, step):
                save()
            if stop_signal.to_stop(True):  # games that are under way are kept as they are
                break
        save()
    if stop_signal.number and step < args.total_timesteps:
        log.stopped(step, stop_signal.number)
    measure()
    if args.picture_every:
        draw()
    log.finish(step)
    return run_dir


# ── Boards ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Rules:
    """Two players set stones in turn; who first has `line` in a row wins. Boards are [N, rows, columns], 1 for stones
    of the player to move, −1 for the other's. With `drop` a move names a column, and the stone falls."""

    def __init__(self, rows: int, columns: int, line: int, drop: bool):
        self.rows, self.columns, self.line, self.drop = rows, columns, line, drop
        self.actions = columns if drop else rows * columns
        lines = []
        for row, column in np.ndindex(rows, columns):
            for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
                cells = [(row + i * down, column + i * right) for i in range(line)]
                if all(0 <= i < rows and 0 <= j < columns for i, j in cells):
                    lines.append([i * columns + j for i, j in cells])
        self.lines = np.array(lines)
        self.planes = np.zeros((self.actions, 1, rows, columns), np.float32)  # how a network is told of an action
        for a in range(self.actions):
            self.planes[(a, 0, slice(None), a) if drop else (a, 0, *divmod(a, columns))] = 1

    def legal(self, boards: np.ndarray) -> np.ndarray:
        """[N, A] bool"""
        return boards[:, 0] == 0 if self.drop else boards.reshape(len(boards), -1) == 0

    def move(self, boards: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Legal moves → boards as the other player sees them; won [N]; over [N]."""
        boards, every = boards.copy(), np.arange(len(boards))
        if self.drop:
            row, column = (boards[every, :, actions] == 0).sum(1) - 1, actions
        else:
            row, column = np.divmod(actions, self.columns)
        boards[every, row, column] = 1
        flat = boards.reshape(len(boards), -1)
        won = (flat[:, self.lines] == 1).all(2).any(1)
        return -boards, won, won | (flat != 0).all(1)


BOARDS = {"TicTacToe-v0": Rules(3, 3, 3, drop=False), "ConnectFour-v0": Rules(6, 7, 4, drop=True)}


def planes_of(boards: np.ndarray) -> np.ndarray:
    """What is seen of boards [N, 2, rows, columns]: the mover's stones, and the other's."""
    return np.stack([boards == 1, boards == -1], 1).astype(np.uint8)


class SelfPlay:
    """Many boards at once, with the same player on both sides. A game begins after 0 to `openings` random moves."""

    def __init__(self, rules: Rules, count: int, openings: int = 0):
        self.rules, self.openings = rules, openings
        self.boards = np.zeros((count, rules.rows, rules.columns), np.int8)
        self.moves = np.zeros(count, np.int64)
        self.begin(np.ones(count, bool))

    def begin(self, new: np.ndarray) -> None:
        """Where `new` [N] says so."""
        self.boards[new] = 0
        self.moves[new] = np.random.randint(self.openings + 1, size=new.sum())
        for k in range(self.openings):
            if not len(going := np.flatnonzero(new & (self.moves > k))):
                break
            dice = np.random.random_sample((len(going), self.rules.actions)) * self.rules.legal(self.boards[going])
            self.boards[going] = self.rules.move(self.boards[going], dice.argmax(1))[0]
        self.obs = planes_of(self.boards)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Rewards of those who moved, ended, cut, what was seen then; where a game is over the next one has begun."""
        self.boards, won, over = self.rules.move(self.boards, actions)
        last, self.moves = planes_of(self.boards), self.moves + 1
        self.begin(over)
        return won.astype(np.float64), over, np.zeros_like(over), last

    def state_dict(self) -> dict:
        return {"boards": self.boards, "moves": self.moves}

    def load_state_dict(self, state: dict) -> None:
        self.boards, self.moves = state["boards"].numpy().copy(), state["moves"].numpy().copy()
        self.obs = planes_of(self.boards)


@functools.lru_cache(maxsize=500_000)
def minimax(env_id: str, board: bytes, depth: int) -> float:
    """What a position is worth to its mover, so many moves ahead: 1, 0 or −1; later ones count a little less."""
    rules = BOARDS[env_id]
    boards = np.frombuffer(board, np.int8).reshape(1, rules.rows, rules.columns)
    return max(minimax_moves(env_id, boards, depth).values())


def minimax_moves(env_id: str, boards: np.ndarray, depth: int) -> dict[int, float]:
    """The same of each legal move; `boards` holds one."""
    actions, rules = np.flatnonzero(BOARDS[env_id].legal(boards)[0]), BOARDS[env_id]
    after, won, over = rules.move(np.repeat(boards, len(actions), 0), actions)
    values = {}
    for i, a in enumerate(actions.tolist()):
        further = depth > 1 and not over[i]
        values[a] = -0.99 * minimax(env_id, after[i].tobytes(), depth - 1) if further else float(won[i])
    return values


DEPTH = {"random": 0, "one-ply": 1, "perfect": 9}  # moves that an opponent looks ahead


def opponent_move(env_id: str, board: np.ndarray, depth: int, rng: np.random.Generator) -> int:
    """One of the best moves, at random. One move ahead: it wins if it can; two: and sees what it must hinder."""
    values = minimax_moves(env_id, board[None], max(depth, 1))
    best = max(values.values())
    return int(rng.choice([a for a, value in values.items() if depth == 0 or value > best - 1e-9]))


class BoardGame(gym.Env):
    """One side of a board game, the other one is played by an opponent; who begins is drawn. The reward is 1, 0 or −1
    at the end. Who makes a move that is against the rules has lost."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 2}

    def __init__(self, env_id: str, opponent: str = "random", depth: int = 2, render_mode: Optional[str] = None):
        self.env_id, self.rules, self.depth = env_id, BOARDS[env_id], DEPTH.get(opponent, depth)
        self.render_mode = render_mode
        self.observation_space = gym.spaces.Box(0, 1, (2, self.rules.rows, self.rules.columns), np.uint8)
        self.action_space = gym.spaces.Discrete(self.rules.actions)

    def reset(self, *, seed: Optional[int] = None, options: Optional[dict] = None):
        super().reset(seed=seed)
        self.board = np.zeros((self.rules.rows, self.rules.columns), np.int8)
        if self.np_random.random() < 0.5:
            self._move(opponent_move(self.env_id, self.board, self.depth, self.np_random))
        return self._seen()

    def _move(self, action: int) -> tuple[bool, bool]:
        boards, won, over = self.rules.move(self.board[None], np.array([action]))
        self.board = boards[0]
        return bool(won[0]), bool(over[0])

    def _seen(self) -> tuple[np.ndarray, dict]:
        return planes_of(self.board[None])[0], {"action_mask": self.rules.legal(self.board[None])[0]}

    def step(self, action: int):
        if not self.rules.legal(self.board[None])[0, action]:
            return self._seen()[0], -1.0, True, False, self._seen()[1]
        won, over = self._move(int(action))
        reward = float(won)
        if over:
            self.board = -self.board  # seen from the agent's side to the end
        else:
            won, over = self._move(opponent_move(self.env_id, self.board, self.depth, self.np_random))
            reward = -float(won)
        obs, info = self._seen()
        return obs, reward, over, False, info

    def render(self) -> np.ndarray:
        size = 40
        picture = np.full((self.rules.rows * size, self.rules.columns * size, 3), 255, np.uint8)
        inside = np.hypot(*(np.mgrid[:size, :size] - (size - 1) / 2)) < size * 0.38
        for (row, column), stone in np.ndenumerate(self.board):
            cell = picture[row * size : (row + 1) * size, column * size : (column + 1) * size]
            cell[[0, -1]], cell[:, [0, -1]] = 150, 150
            cell[inside] = {1: (200, 40, 40), -1: (40, 80, 200), 0: (235, 235, 235)}[int(stone)]
        return picture


for name in BOARDS:
    if name not in gym.registry:
        gym.register(name, entry_point=BoardGame, kwargs={"env_id": name})
gym.register_envs(ale_py)


def board_text(rules: Rules, board: np.ndarray, visits: Optional[np.ndarray] = None) -> str:
    """`board` from the person's side. Below columns, or in empty cells, the number to type; then the visits."""
    signs, rows = {1: "X", -1: "O", 0: "."}, []
    for row in range(rules.rows):
        cells = [(int(board[row, column]), row * rules.columns + column) for column in range(rules.columns)]
        rows.append(" ".join(f"{signs[x] if x or rules.drop else n:>3}" for x, n in cells))
    if rules.drop:
        rows.append(" ".join(f"{n:>3}" for n in range(rules.columns)))
    if visits is not None:
        rows.append("its visits: " + ", ".join(f"{a}: {n}" for a, n in enumerate(visits.tolist()) if n))
    return "\n".join(rows)


def play_against_a_person(args: Args) -> Path:
    """--play: in the terminal, move by move; the person begins in every second game."""
    run_dir = Path(args.play)
    saved = replace(read_settings(run_dir), device=args.device)
    if saved.env_id not in BOARDS:
        stop(f"{run_dir} has learned {saved.env_id}, which is no board game")
    checkpoint, rules = load_checkpoint(run_dir), BOARDS[saved.env_id]
    act = make_tree_planner(saved, make_task(saved), pick_device(args.device))
    act.network.load_state_dict(checkpoint["learned"]["average"])
    print(f"{saved.env_id}: you are X. Type the number of your move, or q to leave.")
    for game in range(1_000_000):
        board, person, won, over = np.zeros((1, rules.rows, rules.columns), np.int8), game % 2 == 0, False, False
        visits = None
        while not over:
            if person:
                print(board_text(rules, board[0], visits))
                legal, word = rules.legal(board)[0], ""
                while not (word.isdecimal() and int(word) < rules.actions and legal[int(word)]):
                    try:
                        word = input("your move: ").strip()
                    except EOFError:
                        word = "q"
                    if word == "q":
                        return run_dir
                move = int(word)
            else:
                found = act.search(planes_of(board))
                move, visits = int(found.best[0]), found.visits[0]
                print(f"it plays {move}, and thinks that it is worth {found.value[0]:+.2f}")
            board, won, over = rules.move(board, np.array([move]))
            person = not person
        print(board_text(rules, board[0] if person else -board[0]))
        print("nobody has won" if not won else "it has won" if person else "you have won")
    return run_dir


# ── Other tasks ───────────────────────────────────────────────────────────────────────────────────────────────────


class Copies:
    """Many copies of one environment, one after the other. Each episode has a seed of its own, so that a run that goes
    on can bring a copy to where it was: by the same seed and the same actions."""

    def __init__(self, args: Args):
        self.args, self.envs = args, [make_task(args) for _ in range(args.envs)]
        self.episode, self.actions = np.zeros(args.envs, np.int64), [[] for _ in self.envs]
        self.moves = np.zeros(args.envs, np.int64)
        self.obs = np.stack([self.begin(i) for i in range(args.envs)])

    def begin(self, i: int) -> np.ndarray:
        seed = random.Random(f"{self.args.seed}, {i}, {self.episode[i]}").getrandbits(30)
        return np.asarray(self.envs[i].reset(seed=seed)[0])

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Rewards, terminated, truncated, what was seen then; where an episode is over the next one has begun."""
        rows = []
        for env, a, past in zip(self.envs, actions.tolist(), self.actions, strict=True):
            past.append(a)
            obs, reward, terminated, truncated, _ = env.step(a)
            rows.append((float(reward), terminated, truncated, np.asarray(obs)))
        reward, terminated, truncated, last = (np.stack(column) for column in zip(*rows, strict=True))
        self.obs, self.moves = last.copy(), self.moves + 1
        for i in np.flatnonzero(terminated | truncated):
            self.episode[i], self.actions[i], self.moves[i] = self.episode[i] + 1, [], 0
            self.obs[i] = self.begin(i)
        return reward, terminated, truncated, last

    def state_dict(self) -> dict:
        return {"episode": self.episode, "actions": [np.array(past, np.int64) for past in self.actions]}

    def load_state_dict(self, state: dict) -> None:
        self.episode = state["episode"].numpy().copy()
        self.actions = [past.tolist() for past in state["actions"]]
        self.moves = np.array([len(past) for past in self.actions])
        for i, past in enumerate(self.actions):
            obs = self.begin(i)
            for a in past:
                obs = self.envs[i].step(a)[0]
            self.obs[i] = np.asarray(obs)


class FourFrames(gym.Wrapper):
    """An action lasts for four frames of a game. Of the last two that were seen each pixel's brighter one is shown, for
    some games draw things in every second frame alone."""

    def step(self, action: int):
        frames, total, over = [], 0.0, False
        while not over and len(frames) < 4:
            frame, reward, terminated, truncated, info = self.env.step(action)
            frames, total, over = [*frames, frame], total + float(reward), terminated or truncated
        return np.max(frames[-2:], axis=0), total, terminated, truncated, info


def shrink_colours(frame: np.ndarray) -> np.ndarray:
    """A game's picture → [3, 96, 96]"""
    return np.asarray(Image.fromarray(frame).resize((96, 96), Image.Resampling.BOX)).transpose(2, 0, 1)


def make_task(args: Args, render: bool = False) -> gym.Env:
    """One environment, checked, with observations and actions as the network wants them."""
    board, game = args.env_id in BOARDS, args.env_id.startswith("ALE/")
    kwargs = {"opponent": args.opponent, "depth": args.opponent_depth} if board else {"frameskip": 1} if game else {}
    env = make_env(args.env_id, render, **kwargs)
    if game:
        env = gym.wrappers.TransformObservation(
            FourFrames(env), shrink_colours, gym.spaces.Box(0, 255, (3, 96, 96), np.uint8)
        )
        env = gym.wrappers.FrameStackObservation(env, args.frames)
        space = gym.spaces.Box(0, 255, (3 * args.frames, 96, 96), np.uint8)
        env = gym.wrappers.TransformObservation(env, lambda obs: obs.reshape(-1, 96, 96), space)
    if args.episode_limit and not board:
        env = gym.wrappers.TimeLimit(env, args.episode_limit)
    space, actions = env.observation_space, env.action_space
    if not isinstance(space, gym.spaces.Box) or len(space.shape) not in (1, 3):
        stop(f"the observations must be a row of numbers or an image, and those of {args.env_id} are {space}")
    if args.network == "conv" and len(space.shape) == 1:
        stop(f"--network conv reads images, and the observations of {args.env_id} are {space}")
    if len(space.shape) == 3 and space.shape[-1] < space.shape[0]:  # the channels come first
        low, high = np.moveaxis(space.low, -1, 0), np.moveaxis(space.high, -1, 0)
        first = gym.spaces.Box(low, high, dtype=space.dtype.type)
        env = gym.wrappers.TransformObservation(env, lambda obs: np.ascontiguousarray(np.moveaxis(obs, -1, 0)), first)
    if not isinstance(actions, gym.spaces.Discrete):
        stop(f"the actions must be Discrete, and those of {args.env_id} are {actions}: see mpc_rs.py or mbpo.py")
    if lowest := int(actions.start):
        env = gym.wrappers.TransformAction(env, lambda a: a + lowest, gym.spaces.Discrete(int(actions.n)))
    return env


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
    "log_every", "eval_every", "eval_episodes", "eval_max_steps", "picture_every", "opponent", "opponent_depth", "play",
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
