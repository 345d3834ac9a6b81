# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "numpy>=2.0,<3",
#     "gymnasium>=1.1,<2",
#     "tyro>=1.0,<2",
#     "tensorboard>=2.18,<3",
#     "tqdm>=4.66,<5",
#     "pillow>=11,<14",
#     "matplotlib>=3.9,<4",
#     "pygame-ce>=2.5,<3",
# ]
# ///
"""VIN: value iteration as a part of a network, so that the network learns to plan.

A reactive policy sees the map and names a move. This one has a planner inside: from the image it makes a map of
rewards, and on it runs value iteration, which on a grid is a convolution and a maximum over its channels, K times
over. All of it is differentiable, so that what the rewards are, and where the moves lead, is learned from examples of
good moves alone. On mazes that it has never seen it still plans, where a reactive network has to guess.

Paper: A. Tamar, Y. Wu, G. Thomas, S. Levine, P. Abbeel, "Value Iteration Networks", NeurIPS 2016, arXiv 1602.02867.
Official code: github.com/avivt/VIN.

The algorithm (section 3 of the paper, for its grid worlds):
    (1) draw random mazes, and the shortest paths from random cells of theirs to the goal
    (2) take some mazes, and some cells of each with the move that the path makes there
    (3) plan: a reward map R̄ = f_R(image); K times Q̄ = W_R ∗ R̄ + W_V ∗ V̄, V̄ = max_ā Q̄; and Q̄ once more
    (4) attend: Q̄ at the agent's own cell; a linear layer makes of it the chances of the eight moves
    (5) learn all weights at once, by the cross-entropy of the paths' moves
With `--train rl` there are no paths: step (2) plays one episode in each of some mazes, step (5) is a policy gradient.

Symbols (paper → this file):
    R̄ → reward                      Q̄, V̄ → q, value                 K → iterations
    W_R, W_V (W) → reward_kernel, value_kernel                       ā → the channels of q, q_channels
    φ(s), s → images, (row, col)    ψ(s) → attend                    π_re → out

Run (measured on 2 CPU cores; docs/vin.md has the curves):
    python algos/vin.py                         # 99.9 % of walks in unseen 8 × 8 mazes arrive; 3 minutes
    python algos/vin.py maze16                  # 99.3 % in 16 × 16; 34 minutes
    python algos/vin.py maze28                  # 94.5 % in 28 × 28; 53 minutes
    python algos/vin.py maze16 --model cnn      # a network that does not plan
    python algos/vin.py --train rl --total-timesteps 1000000  # no expert: 99.1 % in 8 × 8; 4 minutes
    python algos/vin.py --data gridworld_8x8.npz  # 99.6 % in the public mazes; 3 minutes

Deviations from the paper and the official code:
  - The paper's first convolution has 150 channels and the second one; nothing stands between them, so that both are one
    convolution with a 3×3 kernel. They are multiplied before they meet the image: the same function, the same weights
    to learn. The gradient of a sweep is written out (class Sweep). Both are for speed.
  - The step size falls steadily, tenfold in --decay-steps; in the code it falls in four stages, tenfold in all, and
    RMSProp forgets its averages at each. Fewer moves are shown. Reactive networks get the same.
  - The first convolution begins with the cell itself, its other eight weights with 0.
  - An epoch shows so many cells of each maze, drawn with replacement; the code goes through all cells of all paths.
  - Test mazes are drawn with training's, and one that is in training too is drawn again.
  - Paths are measured in lengths (1 and √2 a move), where the code counts cells, for the limit of a walk too: it is cut
    once it is twice as long as the shortest path.
  - What the paper did for reinforcement learning (TRPO, with a curriculum) is here a plain policy gradient with a
    learned baseline, whose error trains the planner too.
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
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional

import gymnasium as gym
import matplotlib
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

ALGORITHM = "vin"


@dataclass
class Args:
    env_id: str = "RandomMaze-v0"
    """This file's mazes; or, with --train rl, any Gymnasium environment with Discrete actions whose observations are
    {"image": [C, n, n], "position": (row, column)}, the image the same all through an episode. `module:Env-v0` imports
    the module first."""
    train: Literal["imitation", "rl"] = "imitation"
    """imitation: learn from the moves of shortest paths; rl: from rewards, by a policy gradient."""
    model: Literal["vin", "cnn", "fcn"] = "vin"
    """vin, or one of the paper's two reactive networks."""
    data: Optional[str] = None
    """An .npz in the layout of the public gridworld data: train on its training mazes and test on its test mazes."""
    total_timesteps: int = 4_000_000
    """The expert's moves that are shown, a move shown twice counted twice; with --train rl the agent's own moves."""
    size: int = 8
    """n: the mazes have n × n cells, the walls around them included."""
    obstacles: int = 30
    """Between one and this many are drawn for a maze; what would bury the goal is left out."""
    obstacle_size: int = 0
    """Half are discs with radii from 1 to this, half rectangles with such sides; 0: discs of one cell, and nothing."""
    mazes: int = 5_000
    """To train on."""
    test_mazes: int = 1_000
    """To test on, none of them in training."""
    paths: int = 7
    """Shortest paths in each maze, from different cells."""
    iterations: int = 10
    """K: sweeps of value iteration. What is more than K + 2 cells away can't be seen."""
    reward_channels: int = 150
    """Channels between the image and the reward map."""
    q_channels: int = 10
    """Channels of Q̄: the moves that the planner can think of (and the fcn's last layer)."""
    batch_mazes: int = 32
    """Mazes in a minibatch; with --train rl episodes that are played for an update."""
    batch_cells: int = 10
    """Cells of each maze in a minibatch."""
    learning_rate: float = 0.01
    """RMSProp's step size at the start."""
    hold_steps: int = 0
    """It stays there for so many steps."""
    decay_steps: int = 2_000_000
    """Then it falls to a tenth in this many steps, again and again."""
    gamma: float = 0.99
    """γ: discount, with --train rl."""
    entropy: float = 0.01
    """Weight of the policy's entropy, with --train rl."""
    value_weight: float = 0.5
    """Weight of the baseline's error, with --train rl."""
    transfer_size: Literal[0, 8, 16, 28] = 16
    """A vin is tested on the paper's mazes of this size too; 0: not."""
    transfer_iterations: int = 20
    """K for these."""
    seed: int = 1
    """Fixes Python, NumPy, torch and the mazes: the same seed on one CPU gives the same run."""
    device: str = "auto"
    """auto, cpu or cuda[:index]."""
    compile: bool = False
    """torch.compile for the network: speed may change, results only by rounding."""
    log_every: int = 20_000
    """Write losses and timings every this many steps."""
    eval_every: int = 400_000
    """Let the network find its way through all test mazes every this many steps; 0: only at the end."""
    eval_episodes: int = 100
    """Of these walks so many are also played in the environment, for the returns."""
    eval_max_steps: int = 1_000
    """Cut an evaluation episode here."""
    picture_every: int = 800_000
    """Draw rewards, values and paths every this many steps, 20 times at most; 0: never."""
    capture_video: bool = False
    """Record the first episode of each evaluation as a GIF in the run folder."""
    run_dir: Optional[str] = None
    """Where to write; by default runs/<env>__<algorithm>__<seed>__<time>."""
    checkpoint_every: int = 1_000_000
    """Save a checkpoint every this many steps; 0: only at the end of the run, and when it is stopped."""
    resume: Optional[str] = None
    """Go on with the run in this folder, with its settings; --total-timesteps may be raised."""
    evaluate: Optional[str] = None
    """Do not train: let the network saved in this run folder walk."""
    episodes: int = 10
    """Episodes to play with --evaluate."""
    progress: bool = True
    """Show a progress bar (never when the output is no terminal)."""


PRESETS = {
    "maze8": ("mazes of 8 × 8 cells, K = 10", Args()),
    "maze16": (
        "mazes of 16 × 16 cells, K = 20",
        Args(
            size=16, obstacles=40, obstacle_size=1, iterations=20, transfer_size=28, transfer_iterations=36,
            total_timesteps=12_000_000, hold_steps=6_000_000, decay_steps=6_000_000, batch_mazes=12,
        ),
    ),
    "maze28": (
        "mazes of 28 × 28 cells, K = 36",
        Args(
            size=28, obstacles=50, obstacle_size=2, iterations=36, transfer_size=0, total_timesteps=6_000_000,
            hold_steps=3_000_000, decay_steps=3_000_000, batch_mazes=12,
        ),
    ),
}


# ── The algorithm: mazes and their shortest paths ─────────────────────────────────────────────────────────────────

MOVES = ((-1, 0), (1, 0), (0, 1), (0, -1), (-1, 1), (-1, -1), (1, 1), (1, -1))  # N S E W NE NW SE SW: row, column
COSTS = tuple(math.hypot(*move) for move in MOVES)
GOAL = 10.0  # what the goal's channel says at the goal, in the paper's data


class Mazes(NamedTuple):
    walls: torch.Tensor  # [M, n, n] bool
    goals: torch.Tensor  # [M, 2]: row, column
    distance: torch.Tensor  # [M, n, n]: of the shortest path to the goal, ∞ in walls and where there is none

    def take(self, rows: Any) -> "Mazes":
        return Mazes(*(column[rows] for column in self))

    @staticmethod
    def together(parts: list["Mazes"]) -> "Mazes":
        return Mazes(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


class Lessons(NamedTuple):
    """What the expert does, maze after maze."""

    row: torch.Tensor  # [N]
    col: torch.Tensor
    action: torch.Tensor
    first: torch.Tensor  # [M + 1]: the rows of maze m begin at first[m] and end before first[m + 1]


def images(mazes: Mazes) -> torch.Tensor:
    """φ(s), [M, 2, n, n]: walls, and the goal."""
    x = torch.zeros(len(mazes.walls), 2, *mazes.walls.shape[1:])
    x[:, 0] = mazes.walls
    x[torch.arange(len(x)), 1, mazes.goals[:, 0], mazes.goals[:, 1]] = GOAL
    return x


def after_moves(x: torch.Tensor) -> torch.Tensor:
    """[8, M, n, n]: of [M, n, n] what each move leads to; ∞ beyond the edge."""
    n, padded = x.shape[-1], F.pad(x, (1, 1, 1, 1), value=math.inf)
    return torch.stack([padded[:, 1 + i : 1 + i + n, 1 + j : 1 + j + n] for i, j in MOVES])


def shortest(walls: torch.Tensor, goals: torch.Tensor) -> torch.Tensor:
    """Bellman's equation for all cells of all mazes at once, until nothing changes any more."""
    costs = torch.tensor(COSTS)[:, None, None, None]
    distance = torch.full(walls.shape, math.inf)
    distance[torch.arange(len(walls)), goals[:, 0], goals[:, 1]] = 0.0
    changing = torch.arange(len(walls))
    while len(changing):
        old = distance[changing]
        # d(s) = min_a [c(a) + d(s')], and 0 at the goal
        new = torch.minimum(old, (after_moves(old) + costs).amin(0)).masked_fill(walls[changing], math.inf)
        distance[changing] = new
        changing = changing[(new < old).flatten(1).any(1)]
    return distance


def random_mazes(count: int, n: int, obstacles: int, obstacle_size: int, rng: np.random.Generator) -> Mazes:
    """The official code's: a goal anywhere but in the outer wall; then discs and rectangles anywhere, half of each,
    but those that would bury the goal."""
    found = []
    while (missing := count - sum(len(mazes.walls) for mazes in found)) > 0:
        cells, number = np.arange(n), rng.integers(1, obstacles + 1, missing)
        goals = rng.integers(1, n - 1, (missing, 2))
        walls = np.zeros((missing, n, n), bool)
        walls[:, [0, -1], :] = walls[:, :, [0, -1]] = True
        for k in range(obstacles):
            corner = rng.integers(0, n, (2, missing, 1))
            away = cells - corner  # [2, M, n]: rows, columns
            side = rng.integers(1, max(obstacle_size, 1) + 1, (2, missing, 1)) * (obstacle_size > 0)
            rows, cols = (away >= 0) & (away < side)
            rectangle = rows[:, :, None] & cols[:, None, :]
            radius = side[0, :, :, None]  # of one cell where there is no size
            disc = away[0][:, :, None] ** 2 + away[1][:, None, :] ** 2 <= (radius + 0.25) ** 2
            shape = np.where(rng.random((missing, 1, 1)) < 0.5, disc, rectangle) & (k < number)[:, None, None]
            buries = shape[np.arange(missing), goals[:, 0], goals[:, 1]]
            walls |= shape & ~buries[:, None, None]
        walls, goals = torch.from_numpy(walls), torch.from_numpy(goals)
        mazes = Mazes(walls, goals, shortest(walls, goals))
        found.append(mazes.take(starts(mazes).flatten(1).any(1)))  # some have no way to the goal at all
    return Mazes.together(found)


def starts(mazes: Mazes) -> torch.Tensor:
    """[M, n, n]: cells from which there is a way to the goal."""
    return mazes.distance.isfinite() & (mazes.distance > 0)


def best_moves(mazes: Mazes) -> torch.Tensor:
    """[8, M, n, n]: the moves with which a shortest path may go on."""
    after = after_moves(mazes.distance) + torch.tensor(COSTS)[:, None, None, None]
    return after <= mazes.distance + 1e-4  # sums of √2 and 1, rounded


def expert_moves(mazes: Mazes) -> torch.Tensor:
    """[M, n, n]: of several best moves the last of MOVES, mostly as in the public data."""
    return len(MOVES) - 1 - best_moves(mazes).flip(0).int().argmax(0)


def random_starts(mazes: Mazes, count: int, rng: np.random.Generator) -> torch.Tensor:
    """[3, S]: maze, row, column, `count` different cells of each maze, or all where it has fewer."""
    free = starts(mazes).flatten(1).numpy()
    order = np.argsort(np.where(free, rng.random(free.shape), 2.0), 1)[:, :count]
    maze, cell = np.repeat(np.arange(len(free)), order.shape[1]), order.reshape(-1)
    there = free[maze, cell]
    return torch.from_numpy(np.stack([maze[there], *np.divmod(cell[there], mazes.walls.shape[-1])]))


def walk(
    choose: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor], mazes: Mazes, start: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """All walks [3, S] at once, until each is at the goal, in a wall, or cut, for it is twice as long as the shortest
    path: whether it arrived [S], how long it is [S], its cells [T, 2, S], and its moves [T − 1, S], −1 when it is over.
    """
    moves, costs = torch.tensor(MOVES).T, torch.tensor(COSTS)
    maze, row, col = start
    limit, length = 2 * mazes.distance[maze, row, col], torch.zeros(start.shape[1])
    going, cells, actions = torch.ones(start.shape[1], dtype=torch.bool), [torch.stack([row, col])], []
    on = starts(mazes)
    while going.any():
        action = torch.full_like(row, -1)
        action[going] = choose(maze[going], row[going], col[going]).cpu()
        ahead = torch.stack([row, col]) + moves[:, action]
        length = length + going * costs[action]
        row, col = torch.where(going, ahead, torch.stack([row, col]))
        going = going & on[maze, row, col] & (length < limit - 1e-4)
        cells.append(torch.stack([row, col]))
        actions.append(action)
    return mazes.distance[maze, row, col] == 0, length, torch.stack(cells), torch.stack(actions)


def lessons(mazes: Mazes, paths: int, rng: np.random.Generator) -> Lessons:
    """Step (1): the moves of shortest paths."""
    best, start = expert_moves(mazes), random_starts(mazes, paths, rng)
    _, _, cells, actions = walk(lambda *where: best[where], mazes, start)
    made = actions.T >= 0  # [S, T]
    maze = start[0][:, None].expand_as(made)[made]  # walks come maze by maze
    row, col = (x.T[made] for x in cells[:-1].unbind(1))
    return Lessons(row, col, actions.T[made], torch.searchsorted(maze.contiguous(), torch.arange(len(best) + 1)))


# ── The algorithm: networks that plan, and two that do not ────────────────────────────────────────────────────────


def neighbours(x: torch.Tensor) -> torch.Tensor:
    """[9, n·n·B]: of [n, n, B] what stands in the 3×3 cells around each cell, 0 beyond the edge. A convolution is a
    product with it. The mazes come last, so that what is copied lies together."""
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    row, col, _ = padded.stride()
    return padded.as_strided((3, 3, *x.shape), (row, col, row, col, 1)).reshape(9, -1)


def gathered(lent: torch.Tensor) -> torch.Tensor:
    """The transpose of `neighbours`: what each cell lent to those around it, [3, 3, n, n, B], comes back [n, n, B]."""
    padded = F.pad(lent, (0, 0, 1, 1, 1, 1))
    i, j, row, col, _ = padded.stride()
    # Element [i, j] of cell (r, c) is of the cell (r + i − 1, c + j − 1)
    return padded.as_strided(lent.shape, (i - row, j - col, row, col, 1), 2 * row + 2 * col).sum(0).sum(0)


class Sweep(torch.autograd.Function):
    """One iteration for all cells of all mazes: V̄' = max_ā Q̄(ā), Q̄ = W_R ∗ R̄ + W_V ∗ V̄.

    Its gradient is simple, and faster written out: of each cell the best move alone is changed.
    """

    @staticmethod
    def forward(ctx: Any, rewards: torch.Tensor, kernel: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """rewards = W_R ∗ R̄ [A, n·n·B], kernel = W_V [A, 9], value [n, n, B]"""
        # Q̄(ā, i, j) = Σ_{i', j'} [W_R(ā, i', j') R̄(i + i', j + j') + W_V(ā, i', j') V̄(i + i', j + j')]
        q = torch.addmm(rewards, kernel, neighbours(value))
        best = q.amax(0)  # V̄(i, j) = max_ā Q̄(ā, i, j)
        ctx.save_for_backward(kernel, value, q, best)
        return best.view_as(value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        kernel, value, q, best = ctx.saved_tensors
        chosen = (q - best).sign_().add_(1)  # 1 for the best move and 0 for others; faster than a comparison
        to_q = chosen.mul_(grad.reshape(-1))
        to_value = gathered((kernel.T @ to_q).view(3, 3, *value.shape))
        return to_q, to_q @ neighbours(value).T, to_value


def small(*shape: int) -> nn.Parameter:
    return nn.Parameter(0.01 * torch.randn(shape))


class VIN(nn.Module):
    """The VI module, between a reward map and a reactive policy."""

    def __init__(self, channels: int, n: int, actions: int, args: Args):
        super().__init__()
        self.iterations, self.width = args.iterations, args.q_channels
        self.h_kernel, self.h_bias = small(args.reward_channels, channels, 3, 3), small(args.reward_channels)
        self.r_kernel = small(args.reward_channels)
        # R̄ begins with the cell itself. With nine at random the walls may come to stand beside where they are, and
        # once the planner fits that, it is hard to leave
        self.h_kernel.data *= F.pad(torch.ones(1, 1), (1, 1, 1, 1))
        self.reward_kernel, self.value_kernel = small(args.q_channels, 9), small(args.q_channels, 9)
        self.out = nn.Linear(args.q_channels, actions, bias=False)
        nn.init.normal_(self.out.weight, std=0.01)

    def reward(self, images: torch.Tensor) -> torch.Tensor:
        """R̄ = f_R(φ(s)) [B, n, n]: two convolutions in a row, the second 1×1, are one."""
        kernel = torch.tensordot(self.r_kernel, self.h_kernel, 1)[None]
        return F.conv2d(images, kernel, (self.r_kernel @ self.h_bias)[None], padding=1)[:, 0]

    def plan(self, images: torch.Tensor, trace: Optional[list] = None) -> torch.Tensor:
        """Step (3): Q̄ [B, A, n, n] after K sweeps; `trace` collects V̄ [B, n, n] after each."""
        reward = self.reward(images).permute(1, 2, 0).contiguous()
        rewards, value = self.reward_kernel @ neighbours(reward), torch.zeros_like(reward)  # W_R ∗ R̄, once for all
        for _ in range(self.iterations):
            value = Sweep.apply(rewards, self.value_kernel, value)
            if trace is not None:
                trace.append(value.permute(2, 0, 1))
        q = torch.addmm(rewards, self.value_kernel, neighbours(value))
        return q.view(-1, *reward.shape).permute(3, 0, 1, 2)

    def attend(self, q: torch.Tensor, maze: torch.Tensor, row: torch.Tensor, col: torch.Tensor) -> torch.Tensor:
        """Step (4), ψ(s) [N, A]: of all that was planned what concerns the agent's own cell."""
        return q[maze, :, row, col]


class FCN(nn.Module):
    """One convolution that sees the whole maze from each cell, and two of 1×1. Only the agent's cell is computed."""

    def __init__(self, channels: int, n: int, actions: int, args: Args):
        super().__init__()
        self.n, self.width = n, args.q_channels
        self.layers = nn.Sequential(
            nn.Linear(channels * (2 * n - 1) ** 2, 150), nn.ReLU(), nn.Linear(150, 150), nn.ReLU(),
            nn.Linear(150, self.width), nn.ReLU(),
        )  # fmt: skip
        self.out = nn.Linear(self.width, actions, bias=False)

    def plan(self, images: torch.Tensor) -> torch.Tensor:
        """No plan: the image, and room around it."""
        return F.pad(images, [self.n - 1] * 4)

    def attend(self, padded: torch.Tensor, maze: torch.Tensor, row: torch.Tensor, col: torch.Tensor) -> torch.Tensor:
        window = torch.arange(2 * self.n - 1, device=padded.device)
        seen = padded[maze[:, None, None], :, (row[:, None] + window)[:, :, None], (col[:, None] + window)[:, None, :]]
        return self.layers(seen.flatten(1))


class CNN(nn.Module):
    """Five convolutions and two poolings; the agent's cell is a channel of the image."""

    def __init__(self, channels: int, n: int, actions: int, args: Args):
        super().__init__()
        sizes = [channels + 1, 50, 50, 100, 100, 100]
        layers = []
        for i in range(5):
            layers += [nn.Conv2d(sizes[i], sizes[i + 1], 3, padding=1), nn.ReLU()]
            if i in (0, 2):
                layers.append(nn.MaxPool2d(2))
        self.layers, self.width = nn.Sequential(*layers), 100 * (n // 4) ** 2
        self.out = nn.Linear(self.width, actions, bias=False)

    def plan(self, images: torch.Tensor) -> torch.Tensor:
        """No plan: the image."""
        return images

    def attend(self, images: torch.Tensor, maze: torch.Tensor, row: torch.Tensor, col: torch.Tensor) -> torch.Tensor:
        here = torch.zeros_like(images[maze, :1])
        here[torch.arange(len(maze), device=maze.device), 0, row, col] = 1.0
        return self.layers(torch.cat([images[maze], here], 1)).flatten(1)


class Batch(NamedTuple):
    images: torch.Tensor  # [B, C, n, n]
    maze: torch.Tensor  # [N]: which of them
    row: torch.Tensor  # [N]
    col: torch.Tensor
    action: torch.Tensor
    returns: torch.Tensor  # [N]: discounted, with --train rl


def draw_batch(mazes: torch.Tensor, x: torch.Tensor, lessons: Lessons, cells: int, at_most: int) -> Batch:
    """Step (2): of these mazes so many cells each, at random."""
    first, last = lessons.first[mazes], lessons.first[mazes + 1]
    chance = torch.from_numpy(np.random.random((len(mazes), cells)))
    rows = (first[:, None] + chance * (last - first)[:, None]).long().flatten()[:at_most]
    maze = torch.arange(len(mazes)).repeat_interleave(cells)[:at_most]
    found = (x[mazes], maze, lessons.row[rows], lessons.col[rows], lessons.action[rows], torch.zeros(len(rows)))
    return Batch(*(column.to(x.device) for column in found))


def imitation_loss(logits: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """Step (5): the mean of −log π(a|s), a the expert's move."""
    return F.cross_entropy(logits, action)


@torch.no_grad()
def play_round(
    net: nn.Module, baseline: nn.Module, envs: list[gym.Env], args: Args, device: torch.device, at_most: int
) -> tuple[Batch, float, float]:
    """Step (2) without an expert: an episode with each environment, its moves drawn by their chances. Also the mean
    return and length. Not more than `at_most` moves in all, at the end of a run."""
    seen = [env.reset()[0] for env in envs]
    x = torch.as_tensor(np.stack([obs["image"] for obs in seen]), dtype=torch.float32, device=device)
    position = np.stack([np.asarray(obs["position"], np.int64) for obs in seen])
    if position.min() < 0 or position.max() >= x.shape[-1]:
        stop(f"a position of {args.env_id} lies outside of its image")
    plan, going, terminal = net.plan(x), np.arange(len(envs)), np.zeros(len(envs), bool)
    steps, rewards, alive, taken = [], [], [], 0
    while len(going) and taken < at_most:
        going = going[: at_most - taken]
        here = [torch.from_numpy(column).to(device) for column in (going, *position[going].T)]
        chances = net.out(net.attend(plan, *here)).softmax(-1)
        if not chances.isfinite().all():
            stop("the network's numbers have run away: take a smaller --learning-rate")
        action = torch.multinomial(chances, 1)[:, 0]
        steps.append((*here, action))
        rewards.append(np.zeros(len(envs)))
        alive.append(np.isin(np.arange(len(envs)), going))
        over = np.zeros(len(envs), bool)
        for i, a in zip(going, action.tolist(), strict=True):
            obs, rewards[-1][i], terminal[i], truncated, _ = envs[i].step(a)
            if not np.array_equal(obs["image"], seen[i]["image"]):
                stop(f"the image of {args.env_id} changes within an episode, and this script plans once in each")
            position[i], over[i] = obs["position"], terminal[i] or truncated
            if position[i].min() < 0 or position[i].max() >= x.shape[-1]:
                stop(f"a position of {args.env_id} lies outside of its image")
        taken, going = taken + len(going), going[~over[going]]
    # G_t = r_t + γ G_{t+1}; after the last step 0 in a terminal state and else what the baseline expects
    there = [torch.from_numpy(column).to(device) for column in (np.arange(len(envs)), *position.T)]
    G = np.where(terminal, 0.0, baseline(net.attend(plan, *there))[:, 0].cpu().numpy())
    returns = []
    for r, on in zip(reversed(rewards), reversed(alive), strict=True):
        G = np.where(on, r + args.gamma * G, G)
        returns.insert(0, G[on])
    returns = torch.as_tensor(np.concatenate(returns), dtype=torch.float32, device=device)
    columns = [torch.cat(column) for column in zip(*steps, strict=True)]
    return Batch(x, *columns, returns), float(np.sum(rewards) / len(envs)), taken / len(envs)


def policy_gradient_losses(
    logits: torch.Tensor, value: torch.Tensor, action: torch.Tensor, returns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Step (5) without an expert: the policy's loss, the baseline's, and the policy's entropy."""
    log_chances = logits.log_softmax(-1)
    taken = log_chances.gather(-1, action[:, None])[:, 0]
    # ∇J = E[Σ_t ∇ log π(a_t|s_t) (G_t − b(s_t))]: here b is a number, and learns from its own error
    advantage = returns - value.detach()
    entropy = -(log_chances.exp() * log_chances).sum(-1).mean()
    return -(taken * advantage).mean(), (returns - value).square().mean(), entropy


# ── What the network believes: measured, and drawn ────────────────────────────────────────────────────────────────


def reader(net: nn.Module, mazes: Mazes, device: torch.device) -> Callable:
    """The policy in these mazes, each planned once: maze, row, column [N] → logits [N, 8]."""
    plan = torch.cat([net.plan(x.to(device)) for x in images(mazes).split(100)])

    def logits(*where: torch.Tensor) -> torch.Tensor:
        parts = zip(*(column.to(device).split(2_000) for column in where), strict=True)
        return torch.cat([net.out(net.attend(plan, *part)) for part in parts]).cpu()

    return logits


def chooser(net: nn.Module, mazes: Mazes, device: torch.device) -> Callable:
    """The likeliest moves: maze, row, column [N] → moves [N]."""
    logits = reader(net, mazes, device)
    return lambda *where: logits(*where).argmax(-1)


@torch.inference_mode()
def walk_metrics(net: nn.Module, mazes: Mazes, start: torch.Tensor, device: torch.device) -> dict[str, float]:
    """The paper's success rate, and trajectory difference: how much longer the walks are that arrive."""
    arrived, length, _, _ = walk(chooser(net, mazes, device), mazes, start)
    maze, row, col = start
    metrics = {"success_rate": arrived.float().mean().item()}
    if arrived.any():
        metrics["trajectory_difference"] = (length - mazes.distance[maze, row, col])[arrived].mean().item()
    return metrics


@torch.inference_mode()
def training_score(net: nn.Module, world: "World", device: torch.device) -> tuple[float, float]:
    """Mean return and length of walks in some of training's mazes, by the task's rewards."""
    few = world.training.take(slice(len(world.training_starts[0])))
    arrived, _, cells, actions = walk(chooser(net, few, device), few, world.training_starts)
    length = (actions >= 0).sum(0)
    crashed = few.walls[world.training_starts[0], cells[-1, 0], cells[-1, 1]]
    return (STEP * length + ARRIVED * arrived + CRASHED * crashed).mean().item(), length.float().mean().item()


@torch.inference_mode()
def prediction_metrics(net: nn.Module, mazes: Mazes, lessons: Lessons, device: torch.device) -> dict[str, float]:
    """Of the expert's moves in mazes never seen: cross-entropy, and how many are other ones, or not among the best."""
    maze = torch.searchsorted(lessons.first, torch.arange(len(lessons.row)), right=True) - 1
    logits = reader(net, mazes, device)(maze, lessons.row, lessons.col)
    choice = logits.argmax(-1)
    best = best_moves(mazes)[choice, maze, lessons.row, lessons.col]
    return {
        "prediction_loss": imitation_loss(logits, lessons.action).item(),
        "prediction_error": (choice != lessons.action).float().mean().item(),
        "wrong_moves": (~best).float().mean().item(),
    }


@torch.inference_mode()
def value_metrics(net: VIN, mazes: Mazes, device: torch.device) -> dict[str, float]:
    """Correlation of V̄ after K sweeps and minus the way that is left, over the cells of a maze; the mazes' mean."""
    trace: list = []
    net.plan(images(mazes).to(device), trace)
    found = []
    for value, distance in zip(trace[-1].cpu(), mazes.distance, strict=True):
        on = distance.isfinite()
        if on.sum() > 2:
            found.append(torch.corrcoef(torch.stack([value[on], -distance[on]]))[0, 1])
    mean = torch.stack(found).nanmean().item() if found else math.nan
    return {"model/value_correlation": mean} if math.isfinite(mean) else {}


class Walks(NamedTuple):
    """Some walks to draw, each in a maze of its own."""

    mazes: Mazes
    taken: list  # [T, 2] each: the cells of the network's way, and of a shortest one
    best: list
    arrived: torch.Tensor


@torch.inference_mode()
def telling_walks(net: nn.Module, mazes: Mazes, start: torch.Tensor, device: torch.device, most: int = 3) -> Walks:
    """The longest way that was found, and ways that were not."""
    expert = expert_moves(mazes)
    arrived, length, cells, actions = walk(chooser(net, mazes, device), mazes, start)
    found = torch.where(arrived, length, -1.0).argsort(descending=True, stable=True)[: int(arrived.sum())]
    lost = torch.nonzero(~arrived)[:, 0]
    lost = lost[: max(most - 1, most - len(found))]
    pick = torch.cat([found[: most - len(lost)], lost])
    _, _, path, moves = walk(lambda *where: expert[where], mazes, start[:, pick])

    def cut(cells: torch.Tensor, actions: torch.Tensor) -> list:
        return [c[: 1 + int((a >= 0).sum())] for c, a in zip(cells.permute(2, 0, 1), actions.T, strict=True)]

    taken = cut(cells[:, :, pick], actions[:, pick])
    return Walks(mazes.take(start[0, pick]), taken, cut(path, moves), arrived[pick])


@torch.inference_mode()
def draw_maps(net: nn.Module, x: torch.Tensor, walks: Optional[Walks], title: str) -> np.ndarray:
    """The picture: each image [S, C, n, n], with the walk and a shortest path; of a VIN R̄, and V̄ after some sweeps."""
    shown = []
    if isinstance(net, VIN):
        trace: list = []
        net.plan(x, trace)
        sweeps = sorted({1, -(-net.iterations // 4), -(-net.iterations // 2), net.iterations})
        shown = [("reward R̄", net.reward(x)), *((f"value V̄, k = {k}", trace[k - 1]) for k in sweeps)]
    figure = Figure(figsize=(1.9 * (1 + len(shown)), 1.9 * len(x) + 0.4), dpi=80)
    figure.suptitle(title, fontsize=10)
    low, high = x[:, 0].min().item(), x[:, 0].max().item()
    axes = figure.subplots(len(x), 1 + len(shown), squeeze=False)
    for i in range(len(x)):
        axes[i, 0].imshow(x[i, 0].cpu(), cmap="Greys", vmin=low, vmax=high + 0.4 * (high - low))
        for j, (name, value) in enumerate(shown, 1):
            axes[i, j].imshow(value[i].cpu(), cmap="viridis")
            axes[0, j].set_title(name, fontsize=8)
        if walks:
            for cells, style in (
                (walks.best[i], {"color": "tab:green", "linewidth": 5, "alpha": 0.4}),
                (walks.taken[i], {"color": "tab:red", "linewidth": 1.5}),
            ):
                axes[i, 0].plot(cells[:, 1], cells[:, 0], **style)
            row, col = walks.mazes.goals[i].tolist()
            axes[i, 0].plot(col, row, "*", color="gold", markersize=9, markeredgecolor="black")
            axes[i, 0].set_ylabel("arrived" if walks.arrived[i] else "lost", fontsize=9)
            axes[0, 0].set_title("red: its way, green: a shortest", fontsize=7)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.tight_layout(pad=0.4)
    return figure_to_array(figure)


@torch.inference_mode()
def film_sweeps(net: VIN, x: torch.Tensor, width: int = 200) -> list[np.ndarray]:
    """V̄ after 0, 1, ... K sweeps, the images side by side."""
    trace: list = []
    net.plan(x, trace)
    values = torch.stack([torch.zeros_like(trace[0]), *trace])  # [K + 1, S, n, n]
    low, high = values.amin((0, 2, 3), keepdim=True), values.amax((0, 2, 3), keepdim=True)
    pictures = matplotlib.colormaps["viridis"](((values - low) / (high - low).clamp_min(1e-12)).cpu().numpy())[..., :3]
    cell = max(width // x.shape[-1], 1)
    pictures = (255 * pictures).astype(np.uint8).repeat(cell, 2).repeat(cell, 3)
    pictures = np.pad(pictures, ((0, 0), (0, 0), (0, 0), (0, 6), (0, 0)), constant_values=255)
    return [np.concatenate(list(frame), 1) for frame in pictures]


# ── Training ──────────────────────────────────────────────────────────────────────────────────────────────────────


def check_settings(args: Args) -> None:
    """Every wrong setting that can be seen before training starts, as one sentence."""
    check_run_settings(args)
    for least, names in (
        (1, ("obstacles", "mazes", "test_mazes", "paths", "iterations", "transfer_iterations", "decay_steps")),
        (1, ("reward_channels", "q_channels", "batch_mazes", "batch_cells")),
        (0, ("obstacle_size", "entropy", "value_weight", "hold_steps")),
        (5, ("size",)),
    ):
        for name in names:
            if getattr(args, name) < least:
                stop(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least {least}")
    if not 0 <= args.gamma <= 1:
        stop(f"--gamma is {args.gamma}: it must lie in [0, 1]")
    if args.learning_rate <= 0:
        stop(f"--learning-rate is {args.learning_rate}: it must be above 0")
    if args.env_id != "RandomMaze-v0" and args.data is not None:
        stop("--data holds mazes for RandomMaze-v0: leave out --env-id")


def make_network(args: Args, env: gym.Env) -> nn.Module:
    channels, n, _ = env.observation_space["image"].shape
    return {"vin": VIN, "cnn": CNN, "fcn": FCN}[args.model](channels, n, int(env.action_space.n), args)


def walker(net: nn.Module, device: torch.device) -> Callable[[Any], int]:
    """The deterministic policy as a function of one observation; it plans anew where the image is another."""
    seen, plan = None, None

    @torch.inference_mode()
    def act(obs: dict) -> int:
        nonlocal seen, plan
        if seen is None or not np.array_equal(seen, obs["image"]):
            seen = np.array(obs["image"])
            plan = net.plan(torch.as_tensor(seen, dtype=torch.float32, device=device)[None])
        where = [torch.tensor([int(x)], device=device) for x in (0, *obs["position"])]
        return int(net.out(net.attend(plan, *where)).argmax())

    return act


def load_policy(args: Args, env: gym.Env, checkpoint: dict) -> Callable[[], Callable[[Any], Any]]:
    """For --evaluate: what makes the policy of a checkpoint, for each episode anew."""
    device = pick_device(args.device)
    net = make_network(args, env).to(device)
    net.load_state_dict(checkpoint["learned"]["network"])
    return lambda: walker(net, device)


def train(args: Args) -> Path:
    device = pick_device(args.device)
    print(f"device: {device}")
    seed_everything(args.seed)
    # (1) draw random mazes, and the shortest paths from random cells of theirs to the goal
    eval_env = make_task(args, render=args.capture_video)
    world = make_arena(args) if args.env_id == "RandomMaze-v0" else None
    envs = [make_task(args, split="training") for _ in range(args.batch_mazes)] if args.train == "rl" else []
    run_dir, checkpoint = open_run(args)

    net = make_network(args, eval_env).to(device)
    learned: dict[str, nn.Module] = {"network": net}
    if args.train == "rl":
        learned["baseline"] = nn.Linear(net.width, 1).to(device)
    if args.compile:
        net.plan = torch.compile(net.plan)
    parameters = [p for part in learned.values() for p in part.parameters()]
    # The official code's RMSProp has 10⁻⁶ under the root
    optimizer = torch.optim.RMSprop(parameters, args.learning_rate, alpha=0.9, eps=1e-3)
    step, todo = 0, []
    for i, env in enumerate([eval_env, *envs]):
        env.reset(seed=1_000 * args.seed + i)
        env.action_space.seed(1_000 * args.seed + i)
    at_first = env_state(eval_env)
    if checkpoint:
        step, todo = checkpoint["step"], checkpoint["todo"]
        for name, part in learned.items():
            part.load_state_dict(checkpoint["learned"][name])
        optimizer.load_state_dict(checkpoint["optimisers"]["all"])
        for env, state in zip(envs, checkpoint["envs"], strict=True):
            set_env_state(env, state)
        set_random_states(checkpoint["random"])
    log = RunLog(args, run_dir, checkpoint)
    x = images(world.training).to(device) if args.train == "imitation" else None

    # These three look at the variables of the loop as they are when they are called, and leave the dice alone.
    def save() -> None:
        save_checkpoint(
            run_dir, step=step, todo=todo, learned={name: part.state_dict() for name, part in learned.items()},
            optimisers={"all": optimizer.state_dict()}, env=env_state(envs[0]) if envs else at_first,
            envs=[env_state(env) for env in envs], log=log.state_dict(),
        )  # fmt: skip
        log.lap("log")

    def measure() -> None:
        set_env_state(eval_env, env_state(envs[0]) if envs else at_first, generators=False)
        log.evaluation(step, lambda: walker(net, device), eval_env)
        if world:
            metrics = walk_metrics(net, world.test, world.test_starts, device)
            metrics |= prediction_metrics(net, world.test, world.test_lessons, device)
            log.scalars(step, {f"eval/{name}": value for name, value in metrics.items()})
            if args.model == "vin":
                log.scalars(step, value_metrics(net, world.test.take(slice(100)), device))
            if world.transfer:
                net.iterations = args.transfer_iterations
                metrics = walk_metrics(net, world.transfer, world.transfer_starts, device)
                log.scalars(step, {f"eval/transfer_{name}": value for name, value in metrics.items()})
                net.iterations = args.iterations

    def draw() -> None:
        if world:
            walks = telling_walks(net, world.test, world.test_starts, device)
            x = images(walks.mazes).to(device)
        else:
            seen = [eval_env.reset(seed=args.seed + i)[0]["image"] for i in range(3)]
            walks, x = None, torch.as_tensor(np.stack(seen), dtype=torch.float32, device=device)
        log.picture(step, draw_maps(net, x, walks, f"{args.env_id}, not trained on: step {step:,}"))
        if args.model == "vin":
            save_gif(film_sweeps(net, x), run_dir / "sweeps.gif", fps=4)

    with StopSignal() as stop_signal:
        while step < args.total_timesteps:
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * 0.1 ** (max(step - args.hold_steps, 0) / args.decay_steps)
            # (2) take some mazes, and some cells of each; or play an episode in each
            left = args.total_timesteps - step
            if args.train == "imitation":
                if not todo:
                    todo = list(torch.from_numpy(np.random.permutation(len(x))).split(args.batch_mazes))
                batch, over = draw_batch(todo.pop(), x, world.lessons, args.batch_cells, left), not todo
            else:
                batch, mean_return, mean_length = play_round(net, learned["baseline"], envs, args, device, left)
                over = True
            log.lap("env")

            # (3) plan: a reward map, and K sweeps of value iteration
            plan = net.plan(batch.images)
            # (4) attend to the agent's own cell
            features = net.attend(plan, batch.maze, batch.row, batch.col)
            logits = net.out(features)
            # (5) learn all weights at once
            if args.train == "imitation":
                loss = imitation_loss(logits, batch.action)
                log.mean("losses/imitation", loss)
            else:
                value = learned["baseline"](features)[:, 0]
                policy, error, entropy = policy_gradient_losses(logits, value, batch.action, batch.returns)
                loss = policy + args.value_weight * error - args.entropy * entropy
                for tag, term in (("losses/policy", policy), ("losses/baseline", error), ("charts/entropy", entropy)):
                    log.mean(tag, term)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            count = len(batch.row)
            step += count
            log.lap("policy")

            log.bar.update(count)
            if over:
                if args.train == "imitation":
                    mean_return, mean_length = training_score(net, world, device)
                log.episode(step, mean_return, mean_length)
            if log.due("log", args.log_every, step):
                if not math.isfinite(loss.item()):
                    stop(f"the loss is {float(loss)} at step {step:,}: take a smaller --learning-rate")
                log.flush(step)
            if log.due("eval", args.eval_every, step) and step < args.total_timesteps:
                measure()
            if log.due("picture", args.picture_every, step, at_most=20) and step < args.total_timesteps:
                draw()
            if log.due("checkpoint", args.checkpoint_every, step):
                save()
            if stop_signal.to_stop(True):  # no update is cut, and no episode
                break
        save()
    if stop_signal.number and step < args.total_timesteps:
        log.stopped(step, stop_signal.number)
    measure()
    if args.picture_every:
        draw()
    log.finish(step)
    return run_dir


# ── The mazes as a task, and the paper's data ─────────────────────────────────────────────────────────────────────

STEP, ARRIVED, CRASHED = -0.01, 1.0, -1.0  # rewards
OFFICIAL = {8: (30, 0), 16: (40, 1), 28: (50, 2)}  # obstacles and their size in the paper's data


def unseen(mazes: Mazes, others: Mazes) -> torch.Tensor:
    """[M]: which of these are none of the others."""
    keys, known = ([(w.tobytes(), *g) for w, g in zip(x.walls.numpy(), x.goals.tolist(), strict=True)]
                   for x in (mazes, others))  # fmt: skip
    known = set(known)
    return torch.tensor([key not in known for key in keys])


def read_mazes(path: str) -> tuple[Mazes, Lessons, Mazes, Lessons]:
    """The public layout: images [N, 2, n, n] (walls, goal), rows, columns, moves; and the same four for the test."""
    try:
        with np.load(path) as file:
            arrays = [file[f"arr_{i}"] > 0 if i % 4 == 0 else file[f"arr_{i}"].astype(np.int64) for i in range(8)]
    except Exception as error:  # damage shows in many ways
        stop(f"--data {path} can't be read as an .npz with arr_0 to arr_7: {error}".replace("\n", " "))
    parts = []
    for name, (x, *states) in (("training", arrays[:4]), ("test", arrays[4:])):
        if x.ndim != 4 or x.shape[1] != 2 or x.shape[2] != x.shape[3] or len(x) == 0:
            stop(f"--data {path}: {name} images have the shape {x.shape}, not [N, 2, n, n]")
        row, col, action = (column.reshape(-1) for column in states)
        n, walls, goal = x.shape[2], x[:, 0], x[:, 1].reshape(len(x), -1)
        if not len(x) == len(row) == len(col) == len(action):
            stop(f"--data {path}: {len(x)} {name} images, and states of other numbers")
        if min(row.min(), col.min(), action.min()) < 0 or max(row.max(), col.max()) >= n or action.max() > 7:
            stop(f"--data {path}: {name} states must be cells of the image, and moves from 0 to 7")
        if (goal.sum(1) != 1).any():
            stop(f"--data {path}: {name} image {int((goal.sum(1) != 1).argmax())} has not one goal")
        if (walls.reshape(len(x), -1) & goal).any():
            stop(f"--data {path}: a goal of the {name} images is in a wall")
        if not (walls[:, [0, -1], :].all() and walls[:, :, [0, -1]].all()):
            stop(f"--data {path}: {name} images need a wall all around")
        # A row of the file is one state: the states of a maze are brought together
        keys = np.concatenate([np.packbits(walls.reshape(len(x), -1), 1), np.packbits(goal, 1)], 1)
        _, one, maze = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        order, maze = np.argsort(maze.reshape(-1), kind="stable"), maze.reshape(-1)
        walls, goals = torch.from_numpy(walls[one]), torch.from_numpy(np.stack(np.divmod(goal[one].argmax(1), n), 1))
        mazes = Mazes(walls, goals, shortest(walls, goals))
        cut_off = ~starts(mazes).numpy()[maze, row, col]
        if cut_off.any():
            stop(f"--data {path}: in {name} row {int(cut_off.argmax())} no way leads from the state to its goal")
        first = torch.searchsorted(torch.from_numpy(maze[order]), torch.arange(len(one) + 1))
        parts += [mazes, Lessons(*(torch.from_numpy(column[order]) for column in (row, col, action)), first)]
    if parts[0].walls.shape[1:] != parts[2].walls.shape[1:]:
        stop(f"--data {path}: mazes to train on and to test on must have one size")
    return tuple(parts)


@functools.lru_cache(maxsize=4)
def make_mazes(
    data: Optional[str], n: int, obstacles: int, obstacle_size: int, mazes: int, test_mazes: int, paths: int, seed: int
) -> tuple[Mazes, Lessons, Mazes, Lessons]:
    """Step (1): mazes to train on and others to test on, and what the expert does in each. Split by maze."""
    if data is not None:
        training, taught, test, tested = read_mazes(data)
        fresh = torch.nonzero(unseen(test, training))[:, 0]
        if len(fresh) == 0:
            stop(f"--data {data}: each of its test mazes is in training too")
        return training, taught, test.take(fresh), taught_in(tested, fresh)
    rng = np.random.default_rng(seed)
    training = random_mazes(mazes, n, obstacles, obstacle_size, rng)
    taught, found = lessons(training, paths, rng), []
    while (missing := test_mazes - sum(len(x.walls) for x in found)) > 0:
        more = random_mazes(missing, n, obstacles, obstacle_size, rng)
        found.append(more.take(unseen(more, training)))
        if len(found) > 100:
            stop(f"nearly each maze of {n} × {n} cells is in training: take fewer --mazes or a larger --size")
    test = Mazes.together(found)
    return training, taught, test, lessons(test, paths, rng)


def taught_in(lessons: Lessons, mazes: torch.Tensor) -> Lessons:
    """The lessons of some of the mazes."""
    count = (lessons.first[1:] - lessons.first[:-1])[mazes]
    first = torch.cat([torch.zeros(1, dtype=torch.long), count.cumsum(0)])
    rows = torch.arange(int(first[-1])) + (lessons.first[mazes] - first[:-1]).repeat_interleave(count)
    return Lessons(*(column[rows] for column in lessons[:3]), first)


def recipe(args: Args) -> dict:
    # With --evaluate another --seed plays other episodes, in the run's own test mazes
    seed = args.seed if args.evaluate is None else read_settings(Path(args.evaluate)).seed
    return {"data": args.data, "n": args.size, "obstacles": args.obstacles, "obstacle_size": args.obstacle_size,
            "mazes": args.mazes, "test_mazes": args.test_mazes, "paths": args.paths, "seed": seed}  # fmt: skip


class World(NamedTuple):
    """What a run in RandomMaze-v0 learns from, and is measured in."""

    training: Mazes
    lessons: Lessons
    training_starts: torch.Tensor  # a few, to see what is learned beside what is understood
    test: Mazes
    test_lessons: Lessons
    test_starts: torch.Tensor
    transfer: Optional[Mazes]
    transfer_starts: Optional[torch.Tensor]


def make_arena(args: Args) -> World:
    training, taught, test, tested = make_mazes(**recipe(args))
    rng, transfer = np.random.default_rng(args.seed + 10_000), None
    few = random_starts(training.take(slice(200)), 1, rng)
    if args.model == "vin" and args.transfer_size:
        transfer = random_mazes(args.test_mazes, args.transfer_size, *OFFICIAL[args.transfer_size], rng)
        transfer = transfer.take(unseen(transfer, training))
    far = random_starts(transfer, args.paths, rng) if transfer else None
    return World(training, taught, few, test, tested, random_starts(test, args.paths, rng), transfer, far)


class MazeEnv(gym.Env):
    """A maze, an agent somewhere in it, eight moves: +1 at the goal and −1 in a wall, which both end the episode, and
    −0.01 for a step. Truncated where the walk is twice as long as the shortest path was."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}

    def __init__(self, split: str = "training", render_mode: Optional[str] = None, **recipe: Any):
        defaults = {"data": None, "n": 8, "obstacles": 30, "obstacle_size": 0, "mazes": 1_000, "test_mazes": 1_000,
                    "paths": 1, "seed": 0}  # fmt: skip
        training, _, test, _ = make_mazes(**{**defaults, **recipe})
        self.mazes, self.render_mode = {"training": training, "test": test}[split], render_mode
        n = self.mazes.walls.shape[-1]
        image, cell = gym.spaces.Box(0.0, GOAL, (2, n, n), np.float32), gym.spaces.MultiDiscrete([n, n])
        self.observation_space = gym.spaces.Dict({"image": image, "position": cell})
        self.action_space = gym.spaces.Discrete(len(MOVES))

    def reset(self, *, seed: Optional[int] = None, options: Optional[dict] = None):
        super().reset(seed=seed)
        maze = self.mazes.take([int(self.np_random.integers(len(self.mazes.walls)))])
        self.image, self.distance = images(maze)[0].numpy(), maze.distance[0].numpy()
        cells = np.argwhere(starts(maze)[0].numpy())
        self.cell = tuple(cells[self.np_random.integers(len(cells))].tolist())
        self.left, self.path = 2 * self.distance[self.cell], [self.cell]
        return self._observation(), {}

    def _observation(self) -> dict:
        return {"image": self.image.copy(), "position": np.array(self.cell)}

    def step(self, action: int):
        (i, j), (row, col) = MOVES[action], self.cell
        self.cell, self.left = (row + i, col + j), self.left - COSTS[action]
        self.path.append(self.cell)
        arrived, crashed = self.distance[self.cell] == 0, bool(self.image[0][self.cell])
        reward = STEP + ARRIVED * arrived + CRASHED * crashed
        over = bool(arrived or crashed)
        return self._observation(), float(reward), over, not over and bool(self.left < 1e-4), {}

    def render(self) -> np.ndarray:
        picture = np.where(self.image[0][..., None] > 0, 70, 240).repeat(3, -1).astype(np.uint8)
        for cell in self.path:
            picture[cell] = (255, 190, 190)
        picture[self.distance == 0] = (120, 200, 120)
        picture[self.cell] = (220, 60, 60)
        scale = max(240 // len(picture), 1)
        return picture.repeat(scale, axis=0).repeat(scale, axis=1)


if "RandomMaze-v0" not in gym.registry:
    gym.register("RandomMaze-v0", entry_point=MazeEnv)


def make_task(args: Args, render: bool = False, split: str = "test") -> gym.Env:
    """The environment, checked to be one that the networks fit."""
    own = args.env_id == "RandomMaze-v0"
    if own:
        make_mazes(**recipe(args))  # what is wrong with them is said here
    env = make_env(args.env_id, render, **({"split": split, **recipe(args)} if own else {}))
    if not own and args.train != "rl":
        stop(f"an expert is known for RandomMaze-v0 alone: add --train rl for {args.env_id}")
    observations, actions = env.observation_space, env.action_space
    if not isinstance(actions, gym.spaces.Discrete):
        stop(f"the policy names one of some moves, and the actions of {args.env_id} are {actions}")
    parts = observations.spaces if isinstance(observations, gym.spaces.Dict) else {}
    if not {"image", "position"} <= set(parts):
        stop(
            f'the observations must be {{"image", "position"}}, and those of {args.env_id} are {observations}'.replace(
                "\n", " "
            )
        )
    image, position = parts["image"], parts["position"]
    if len(image.shape) != 3 or image.shape[1] != image.shape[2] or position.shape != (2,):
        stop(f"an image [C, n, n] and a cell (row, column) are needed, and {args.env_id} has {image} and {position}")
    if args.model == "cnn" and image.shape[1] < 4:
        stop("the cnn halves the image twice: it must have at least 4 × 4 cells")
    if lowest := int(actions.start):
        moves = gym.spaces.Discrete(int(actions.n))
        env = gym.wrappers.TransformAction(env, lambda a: a + lowest, moves)
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
