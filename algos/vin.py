# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "numpy>=2.0,<3", "gymnasium>=1.3,<2", "tyro>=1.0.16,<2", "tensorboard>=2.18,<3", "tqdm>=4.66,<5",
#     "pillow>=11,<14", "matplotlib>=3.9,<4",
# ]
# ///
"""VIN: value iteration as layers of a network, so that the network learns to plan.

The network turns an image of a maze into a map of rewards and runs value iteration on it: on a grid, one sweep is a
convolution and a maximum over its channels. All of it is differentiable, so that the rewards and the effects of the
moves are learned from examples of good moves alone. The network then plans in mazes that it has never seen.

Paper: Tamar, Wu, Thomas, Levine, Abbeel, "Value Iteration Networks", NeurIPS 2016, arXiv 1602.02867.
Official code: github.com/avivt/VIN.

The algorithm (Section 3 of the paper, for its grid worlds):
    (1) sample random mazes, and in each of them shortest paths from random cells to the goal
    (2) take some mazes, and in each some cells of these paths with the expert's moves
    (3) plan: R̄ = f_R(φ(s)); K times Q̄ = W_R ∗ R̄ + W_V ∗ V̄, V̄ = max_ā Q̄; and Q̄ once more
    (4) attend to Q̄ at the agent's cell; a linear layer turns it into the log-probabilities of the eight moves
    (5) update all weights by the gradient of the cross-entropy of the expert's moves

Symbols: φ(s) → images, R̄ → reward, Q̄, V̄ → q, v, ā → the channels of q, K → iterations, ψ(s) → attend.
A step is one update; an epoch, in which each maze is seen once, plays the part of an episode.

Usage (share of the walks in unseen mazes that reach the goal; docs/vin.md has the curves):
    python algos/vin.py                                     # success rate 0.998 [0.997, 0.998]
    python algos/vin.py maze16                              # 32.3 minutes, success rate 0.991 [0.989, 0.993]
    python algos/vin.py maze28                              # mazes of 28 × 28 cells
    python algos/vin.py --data gridworld_8x8.npz            # the public mazes
    python algos/vin.py --evaluate runs/NAME --episodes 10 --capture-video

Differences from the paper and its code: the step size falls steadily, not in four stages; the first convolution
starts with weights for the cell itself only; lengths are measured with √2 for a diagonal move, not in numbers of
cells; a checksum of a maze decides whether it is for training or for tests. The file leaves out reinforcement learning.
"""

import argparse
import io
import math
import os
import shlex
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple, Optional

import gymnasium as gym
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

ALGORITHM = "vin"


@dataclass
class Args:  # tyro turns each field into a flag and each comment into its help
    env_id: str = "Maze8-v0"  # a maze environment with a method sample(count, test, generator), see class Maze
    total_timesteps: int = 6_000  # gradient updates
    data: Optional[str] = None  # train and test on the mazes of this .npz in the layout of the public gridworld data
    mazes: int = 5_000  # number of training mazes
    test_mazes: int = 1_000  # number of test mazes
    paths: int = 7  # shortest paths per maze, from different cells
    iterations: int = 10  # K: sweeps of value iteration; a goal more than K + 2 cells away has no effect
    reward_channels: int = 150  # channels between the image and the reward map
    q_channels: int = 10  # channels of Q̄: abstract actions ā
    batch_mazes: int = 32  # mazes per update
    batch_cells: int = 10  # cells of each of them
    learning_rate: float = 0.01  # RMSProp's initial step size
    hold_steps: int = 0  # updates before it falls
    decay_steps: int = 3_000  # updates in which it falls to a tenth
    seed: int = 1  # on one CPU, two runs with the same seed are identical
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu, cuda or mps
    compile: bool = False  # torch.compile the planner
    eval_every: int = 1_000  # steps between evaluations (at the end of an epoch, like all that follow)
    picture_every: int = 2_000  # steps between pictures of rewards, values and walks
    checkpoint_every: int = 1_000  # steps between checkpoints; one is also written about every minute
    episodes: int = 20  # episodes per evaluation in the environment
    capture_video: bool = False  # save the first episode of each evaluation as a GIF
    run_dir: Optional[str] = None  # output folder; runs/<env>__<algorithm>__<seed>__<time> by default
    resume: Optional[str] = None  # continue the run in this folder with its own settings
    evaluate: Optional[str] = None  # do not train: play with the agent of this run folder

    def __post_init__(self):
        """tyro reports a ValueError raised here as one sentence and exits with code 2."""
        for name, value in vars(self).items():
            zero = value == 0 and name in ("seed", "hold_steps")
            if type(value) in (int, float) and not (0 < value < math.inf or zero):
                raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be a positive number")


LARGE = {"batch_mazes": 12, "eval_every": 5_000, "picture_every": 10_000}
PRESETS = {
    "maze8": ("mazes of 8 × 8 cells: minutes", Args()),
    "maze16": ("mazes of 16 × 16 cells", Args("Maze16-v0", 60_000, iterations=20, hold_steps=30_000,
                                              decay_steps=30_000, **LARGE)),
    "maze28": ("mazes of 28 × 28 cells", Args("Maze28-v0", 50_000, iterations=36, hold_steps=25_000,
                                              decay_steps=25_000, **LARGE)),
}  # fmt: skip


# ── The algorithm: mazes and their shortest paths ─────────────────────────────────────────────────────────────────

MOVES = ((-1, 0), (1, 0), (0, 1), (0, -1), (-1, 1), (-1, -1), (1, 1), (1, -1))  # N S E W NE NW SE SW: row, column
COSTS = torch.tensor([math.hypot(*move) for move in MOVES])
GOAL = 10.0  # value of the goal's channel at the goal, as in the paper's data


class Mazes(NamedTuple):
    """Cells of a maze are numbered row by row: cell = row · n + column."""

    images: Tensor  # [M, 2, n, n], φ(s): 1 at walls; GOAL at the goal
    distance: Tensor  # [M, n²]: length of the shortest path to the goal; ∞ in walls and where there is none
    expert: Tensor  # [M, n²]: the expert's moves
    visits: Tensor  # [M, n²]: number of the expert's paths through a cell

    def rows(self, index) -> "Mazes":
        return Mazes(*(column[index] for column in self))

    def open(self) -> Tensor:
        """[M, n²]: cells from which a path leads to the goal."""
        return self.distance.isfinite() & (self.distance > 0)


def shortest_paths(walls: Tensor, goals: Tensor) -> tuple[Tensor, Tensor]:
    """Value iteration for all mazes at once: distances and best moves, [M, n, n] each."""
    distance, n = torch.full(walls.shape, math.inf), walls.shape[-1]
    distance[torch.arange(len(walls)), goals[:, 0], goals[:, 1]] = 0.0
    while True:
        padded = F.pad(distance, (1, 1, 1, 1), value=math.inf)
        after = torch.stack([padded[:, 1 + i : 1 + i + n, 1 + j : 1 + j + n] for i, j in MOVES])
        # d(s) = min_a [c(a) + d(s')], and 0 at the goal
        through = after + COSTS[:, None, None, None]
        new = torch.minimum(distance, through.amin(0)).masked_fill(walls, math.inf)
        if torch.equal(new, distance):
            break
        distance = new
    # The last of several best moves, as in 99 % of the public data; sums of 1 and √2 are rounded.
    best = through <= distance + 1e-4
    return distance, (best * torch.arange(len(MOVES))[:, None, None, None]).amax(0)


def next_cells(mazes: Mazes, moves: Tensor) -> Tensor:
    """[M, n²]: the cell that a move leads to. A walk stays at the goal and in a wall."""
    n = mazes.images.shape[-1]
    offsets = torch.tensor([i * n + j for i, j in MOVES], device=moves.device)
    return torch.arange(n * n, device=moves.device) + offsets[moves] * mazes.open()


def label(walls: Tensor, goals: Tensor, paths: int) -> Mazes:
    """Step (1): the expert's moves, and paths from different random cells of each maze."""
    images = torch.stack([walls.float(), torch.zeros(walls.shape)], 1)
    images[torch.arange(len(walls)), 1, goals[:, 0], goals[:, 1]] = GOAL
    distance, expert = (x.flatten(1) for x in shortest_paths(walls, goals))
    mazes = Mazes(images, distance, expert, torch.zeros(distance.shape))
    order = torch.rand(distance.shape).masked_fill(~mazes.open(), -1.0).argsort(1, descending=True)
    here = torch.zeros(distance.shape).scatter_(1, order[:, :paths], 1.0) * mazes.open()  # paths now in each cell
    after = next_cells(mazes, expert)
    while here.any():
        mazes.visits.add_(here)
        here = torch.zeros(distance.shape).scatter_add_(1, after, here) * (distance > 0)
    return mazes


# ── The algorithm: the network ────────────────────────────────────────────────────────────────────────────────────


class Agent(nn.Module):
    """The VI module between a reward map and a reactive policy. It is a convolution everywhere: any size will do."""

    player = "planner"

    def __init__(self, env: gym.Env, args: Args):
        super().__init__()
        self.iterations, channels = args.iterations, env.observation_space["image"].shape[0]
        self.f_1 = nn.Conv2d(channels, args.reward_channels, 3, padding=1)
        self.f_2 = nn.Conv2d(args.reward_channels, 1, 1, bias=False)
        self.w_r = nn.Conv2d(1, args.q_channels, 3, padding=1, bias=False)
        self.w_v = nn.Conv2d(1, args.q_channels, 3, padding=1, bias=False)
        self.out = nn.Linear(args.q_channels, int(env.action_space.n), bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.01)
        # R̄ starts from the cell itself: otherwise it may settle on walls that are displaced by a cell.
        self.f_1.weight.data *= F.pad(torch.ones(1, 1), (1, 1, 1, 1))
        self.to(args.device)
        if args.compile:
            self.plan = torch.compile(self.plan)

    def reward(self, images: Tensor) -> Tensor:
        """R̄ = f_R(φ(s)) [B, 1, n, n]: self.f_2(self.f_1(images)) as one convolution, which is faster."""
        kernel = torch.einsum("c, cijk -> ijk", self.f_2.weight.flatten(), self.f_1.weight)
        return F.conv2d(images, kernel[None], self.f_2.weight.flatten() @ self.f_1.bias[:, None], padding=1)

    def plan(self, images: Tensor, iterations: int) -> Tensor:
        """Step (3): Q̄ [B, A, n, n] after some sweeps of value iteration."""
        reward = self.w_r(self.reward(images))  # the same in each sweep
        q = reward
        for _ in range(iterations):
            # V̄(i, j) = max_ā Q̄(ā, i, j)
            v = q.max(1, keepdim=True).values
            # Q̄(ā, i, j) = Σ_{i', j'} W_R(ā, i', j') R̄(i + i', j + j') + W_V(ā, i', j') V̄(i + i', j + j')
            q = reward + self.w_v(v)
        return q

    def attend(self, q: Tensor, cells: Tensor) -> Tensor:
        """Step (4): log-probabilities, up to a constant, [B, C, 8] at the cells [B, C]: linear in ψ(s) = Q̄(·, s)."""
        maze = torch.arange(len(q), device=q.device)[:, None]
        return self.out(q.flatten(2).mT[maze, cells])

    @torch.inference_mode()
    def forward(self, obs: dict) -> int:
        device, (row, column) = next(self.parameters()).device, obs["position"]
        images = torch.as_tensor(obs["image"], dtype=torch.float32, device=device)[None]
        cell = torch.tensor([[row * images.shape[-1] + column]], device=device)
        return int(self.attend(self.plan(images, self.iterations), cell).argmax())

    def reset(self) -> None:
        """An episode begins: nothing to forget."""


# ── What the network believes ─────────────────────────────────────────────────────────────────────────────────────


def walk(mazes: Mazes, moves: Tensor) -> tuple[Tensor, Tensor]:
    """A walk from every cell: where it ends and its length, [M, n²] each. A walk ends at the goal, in a wall, or as
    soon as it is twice as long as the shortest path."""
    after, costs, walking = next_cells(mazes, moves), COSTS.to(moves.device)[moves], mazes.open()
    cells = torch.arange(moves.shape[1], device=moves.device).expand_as(moves)
    lengths = torch.zeros(moves.shape, device=moves.device)
    while walking.any():
        lengths = lengths + walking * costs.gather(1, cells)
        cells = torch.where(walking, after.gather(1, cells), cells)
        walking = mazes.open().gather(1, cells) & (lengths < 2 * mazes.distance - 1e-4)
    return cells, lengths


@torch.inference_mode()
def predict(agent: Agent, mazes: Mazes) -> tuple[Tensor, Tensor]:
    """Log-odds of the moves [M, n², 8] and V̄ [M, n²] in every cell."""
    q = torch.cat([agent.plan(images, agent.iterations) for images in mazes.images.split(100)])
    every_cell = torch.arange(mazes.distance.shape[1], device=q.device).expand(len(q), -1)
    return agent.attend(q, every_cell), q.amax(1).flatten(1)


def walk_metrics(mazes: Mazes, moves: Tensor) -> tuple[float, float, float]:
    """The share of walks that arrive, with equal weights for all mazes; the mean length of a walk; and by how much the
    walks that arrive are longer than the shortest paths."""
    (cells, lengths), starts = walk(mazes, moves), mazes.open()
    arrived = starts & (mazes.distance.gather(1, cells) == 0)
    excess = torch.where(arrived, lengths - mazes.distance, 0.0).sum() / arrived.sum().clamp(min=1)
    return (arrived.sum(1) / starts.sum(1)).mean().item(), lengths[starts].mean().item(), excess.item()


def heldout_metrics(agent: Agent, mazes: Mazes) -> dict[str, float]:
    logits, values = predict(agent, mazes)
    success, _, excess = walk_metrics(mazes, logits.argmax(-1))
    losses = F.cross_entropy(logits.flatten(0, 1), mazes.expert.flatten(), reduction="none").view_as(values)
    known = mazes.distance.isfinite()
    values, paths = (torch.where(known, x, 0.0) for x in (values, -mazes.distance))
    centred = [(x - x.sum(1, keepdim=True) / known.sum(1, keepdim=True)) * known for x in (values, paths)]
    return {
        "eval/success_rate": success,
        "eval/trajectory_difference": excess,
        "eval/prediction_loss": ((losses * mazes.visits).sum() / mazes.visits.sum()).item(),
        "model/value_correlation": F.cosine_similarity(*centred).mean().item(),
    }


@torch.inference_mode()
def draw_walks(agent: Agent, mazes: Mazes) -> Figure:
    """Up to two walks that get lost and the longest that arrive (red; shortest: green); R̄; V̄ after k sweeps."""
    moves, n = predict(agent, mazes)[0].argmax(-1), mazes.images.shape[-1]
    arrived = mazes.distance.gather(1, walk(mazes, moves)[0]) == 0
    lost, found = (torch.where(mazes.open() & kind, mazes.distance, 0.0) for kind in (~arrived, arrived))
    picked = [*((lost, int(i)) for i in lost.amax(1).topk(2).indices if lost[i].any())]
    picked += [(found, int(i)) for i in found.amax(1).topk(3).indices]
    sweeps = sorted({1, -(-agent.iterations // 4), -(-agent.iterations // 2), agent.iterations})
    figure = Figure(figsize=(1.9 * (2 + len(sweeps)), 6), layout="constrained")
    for axes, (lengths, i) in zip(figure.subplots(3, 2 + len(sweeps)), picked[:3], strict=True):
        maze = mazes.rows([i])
        axes[0].imshow(maze.images[0, 0].cpu(), cmap="Greys", vmax=1.4)
        for which, style in ((maze.expert, {"color": "tab:green", "linewidth": 5, "alpha": 0.4}),
                             (moves[i : i + 1], {"color": "tab:red", "linewidth": 1.5})):  # fmt: skip
            cells, after = [lengths[i].argmax().item()], next_cells(maze, which)[0]
            while after[cells[-1]] != cells[-1] and len(cells) <= 2 * lengths[i].max():
                cells.append(after[cells[-1]].item())
            axes[0].plot([cell % n for cell in cells], [cell // n for cell in cells], **style)
        axes[0].set_ylabel("lost" if lengths is lost else "arrived")
        goal = maze.distance.argmin().item()
        axes[0].plot(goal % n, goal // n, "*", color="gold", markersize=9, markeredgecolor="black")
        shown = {"reward R̄": agent.reward(maze.images)}
        shown |= {f"value V̄, k = {k}": agent.plan(maze.images, k - 1).amax(1, keepdim=True) for k in sweeps}
        for axis, (title, value) in zip(axes[1:], shown.items(), strict=True):
            axis.imshow(value[0, 0].cpu(), cmap="viridis")
            axis.set_title(title, fontsize=8)
    for axis in figure.axes:
        axis.set(xticks=[], yticks=[])
    figure.suptitle("walks in test mazes: the network's (red) and a shortest path (green)", fontsize=9)
    return figure


# ── Training ──────────────────────────────────────────────────────────────────────────────────────────────────────


def train(args: Args) -> None:
    torch.manual_seed(args.seed)
    env = make_env(args)
    # (1) sample random mazes, and shortest paths from random cells to the goal
    if args.data:
        training, test = read_data(args.data)
    else:
        training = label(*env.unwrapped.sample(args.mazes, test=False), args.paths)
        test = label(*env.unwrapped.sample(args.test_mazes, test=True), args.paths)
    training, test = (Mazes(*(column.to(args.device) for column in mazes)) for mazes in (training, test))
    agent, few = Agent(env, args), training.rows(slice(200))  # what is learned in some of the training mazes
    optimizer = torch.optim.RMSprop(agent.parameters(), alpha=0.9, eps=1e-3)  # the code's ε is 1e-6 under the root
    run = Run(args, agent=agent, optimizer=optimizer)

    while run.unfinished():
        run.begin_episode()
        losses = []
        for rows in torch.randperm(len(training.images)).split(args.batch_mazes):
            # (2) take some mazes, and some cells of their paths
            batch = training.rows(rows.to(args.device))
            cells = torch.multinomial(batch.visits, args.batch_cells, replacement=True)
            # (3) plan
            q = agent.plan(batch.images, args.iterations)
            # (4) attend to the agent's cell
            logits = agent.attend(q, cells)
            # (5) update all weights: −log π(a*|s)
            loss = F.cross_entropy(logits.flatten(0, 1), batch.expert.gather(1, cells).flatten())
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * 0.1 ** (max(run.step - args.hold_steps, 0) / args.decay_steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            run.count_steps()
            if run.step == args.total_timesteps:
                break
        run.log("losses/imitation", torch.stack(losses).mean().item())
        success, length, _ = walk_metrics(few, predict(agent, few)[0].argmax(-1))
        run.end_episode({"episode": {"r": success, "l": length}})
        if run.due(args.picture_every):
            run.picture(draw_walks(agent, test))
        if run.due(args.eval_every):
            for tag, value in heldout_metrics(agent, test).items():
                run.log(tag, value)
            run.evaluate(agent, env)
    run.close()


# ── The task: random mazes, or the paper's data ───────────────────────────────────────────────────────────────────


def make_task(args: Args, **kwargs) -> gym.Env:
    env = gym.make(args.env_id, **kwargs)
    if not (isinstance(env.observation_space, gym.spaces.Dict) and hasattr(env.unwrapped, "sample")):
        raise UserError(f"{env.spec.id} is not a maze with shortest paths: see class Maze in {ALGORITHM}.py for one")
    return env


def read_data(path: str) -> tuple[Mazes, Mazes]:
    """Training and test mazes of the public layout: images, rows, columns and moves, one state per row, twice."""
    found = []
    try:
        with np.load(path) as file:
            arrays = [torch.from_numpy(file[f"arr_{i}"].astype(np.int64)) for i in range(8)]
        for images, *states in (arrays[:4], arrays[4:]):
            row, column, move = (x.flatten() for x in states)
            unique, maze = images.flatten(1).unique(dim=0, return_inverse=True)
            walls, goal = (unique.view(-1, *images.shape[1:]) > 0).unbind(1)
            enclosed = walls.equal(F.pad(walls[:, 1:-1, 1:-1], (1, 1, 1, 1), value=True))
            if not enclosed or (goal.flatten(1).sum(1) != 1).any():
                raise ValueError("each maze needs one goal, and a wall around it")
            mazes, cell = label(walls, goal.nonzero()[:, 1:], 0), row * walls.shape[-1] + column
            if not (mazes.open()[maze, cell] & (move >= 0) & (move < len(MOVES))).all():
                raise ValueError("each state needs a path to its goal and a move from 0 to 7")
            mazes.expert[maze, cell] = move
            mazes.visits.index_put_((maze, cell), torch.ones(len(maze)), accumulate=True)
            found.append(mazes)
    except Exception as error:  # damage shows in many ways
        raise UserError(f"--data {path} does not have the layout of the public gridworld data: {error}") from None
    training, test = found
    known = {image.numpy().tobytes() for image in training.images}
    return training, test.rows([image.numpy().tobytes() not in known for image in test.images])


class Maze(gym.Env):
    """One of the test mazes, an agent in it, eight moves. Reward 1 at the goal; a wall also ends the episode, and it is
    truncated as soon as the walk is twice as long as the shortest path."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}
    action_space = gym.spaces.Discrete(len(MOVES))

    def __init__(self, size: int, obstacles: int, obstacle_size: int, render_mode: Optional[str] = None):
        self.size, self.obstacles, self.obstacle_size, self.render_mode = size, obstacles, obstacle_size, render_mode
        image = gym.spaces.Box(0.0, GOAL, (2, size, size), np.float32)
        self.observation_space = gym.spaces.Dict({"image": image, "position": gym.spaces.MultiDiscrete([size, size])})

    def sample(self, count: int, test: bool, generator: Optional[torch.Generator] = None) -> tuple[Tensor, Tensor]:
        """Walls [count, n, n] and goals [count, 2]. As in the official code, half of the obstacles are discs and half
        rectangles, and those that cover the goal are left out."""

        n, size, found = self.size, self.obstacle_size, []
        while (missing := count - sum(len(goals) for _, goals in found)) > 0:
            mazes = torch.arange(2 * missing + 8)

            def integers(low: int, high: int, *shape: int, candidates: int = len(mazes)) -> Tensor:
                return torch.randint(low, high, (*shape, candidates, 1), generator=generator)

            goals, number = integers(1, n - 1, 2)[..., 0].T, integers(1, self.obstacles + 1)[..., None]
            walls = F.pad(torch.zeros(len(mazes), n - 2, n - 2, dtype=torch.bool), (1, 1, 1, 1), value=True)
            for k in range(self.obstacles):
                rows, columns = torch.arange(n) - integers(0, n, 2)  # from the corner or the centre
                radius, width = integers(min(1, size), size + 1, 2)  # with size 0 a disc is a cell, a rectangle nothing
                rectangle = ((rows >= 0) & (rows < radius))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
                disc = rows[:, :, None] ** 2 + columns[:, None] ** 2 <= (radius[..., None] + 0.25) ** 2
                shape = torch.where(integers(0, 2)[..., None] == 1, disc, rectangle) & (k < number)
                walls |= shape & ~shape[mazes, goals[:, 0], goals[:, 1]][:, None, None]
            # A checksum separates training mazes from test mazes, with every seed.
            checksum = (walls.flatten(1) * torch.arange(n * n)).sum(1) + goals[:, 0]
            free = F.avg_pool2d(1.0 - walls.float(), 3, 1, 1)[mazes, goals[:, 0], goals[:, 1]]
            keep = (checksum % 2 == test) & (free > 0.12)  # the goal has a free neighbour
            found.append((walls[keep], goals[keep]))
        walls, goals = (torch.cat(parts)[:count] for parts in zip(*found, strict=True))
        return walls, goals

    def reset(self, *, seed: Optional[int] = None, options: Optional[dict] = None):
        super().reset(seed=seed)
        generator = torch.Generator().manual_seed(int(self.np_random.integers(2**31)))
        self.maze = label(*self.sample(1, True, generator), 0)
        starts = self.maze.open()[0].nonzero()[:, 0].tolist()
        self.cell, self.length = starts[self.np_random.integers(len(starts))], 0.0
        self.limit = 2 * self.maze.distance[0, self.cell].item() - 1e-4
        return self.observe(), {}

    def observe(self) -> dict:
        return {"image": self.maze.images[0].numpy().copy(), "position": np.array(divmod(self.cell, self.size))}

    def step(self, action: int):
        row, column = MOVES[action]
        self.cell, self.length = self.cell + row * self.size + column, self.length + COSTS[action].item()
        arrived = bool(self.maze.distance[0, self.cell] == 0)
        terminated = not self.maze.open()[0, self.cell]
        truncated = not terminated and self.length >= self.limit
        return self.observe(), float(arrived), bool(terminated), truncated, {}

    def render(self) -> np.ndarray:
        walls, goal = self.maze.images[0]
        picture = np.where(walls[..., None] > 0, 70, 240).repeat(3, -1).astype(np.uint8)
        picture[goal > 0] = (120, 200, 120)
        picture[divmod(self.cell, self.size)] = (220, 60, 60)
        scale = 480 // self.size
        return picture.repeat(scale, 0).repeat(scale, 1)


for size, obstacles, obstacle_size in ((8, 30, 0), (16, 40, 1), (28, 50, 2)):  # the paper's
    if f"Maze{size}-v0" not in gym.registry:
        sizes = {"size": size, "obstacles": obstacles, "obstacle_size": obstacle_size}
        gym.register(f"Maze{size}-v0", Maze, kwargs=sizes, max_episode_steps=1_000)


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
