# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "numpy>=2.0,<3",
#     "gymnasium>=1.1,<2",
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
"""MBPO: learn a policy from short imagined continuations of real experience.

An ensemble of probabilistic networks learns the world from real steps. From real states the policy is let run in it for
k steps, a hundred thousand times; on these imagined transitions soft actor-critic trains, many updates for each real
step. The branches are short, so that a model's errors cannot pile up; they are many, so that a model-free learner gets
all the data it wants. The real step is the only thing that is dear.

Paper: M. Janner, J. Fu, M. Zhang, S. Levine, "When to Trust Your Model: Model-Based Policy Optimization", NeurIPS 2019,
arXiv 1906.08253. Official code: github.com/jannerm/mbpo. The policy's learner (SAC): T. Haarnoja et al., "Soft
Actor-Critic Algorithms and Applications", 2018, arXiv 1812.05905. The ensemble, and the equations' numbers in it, are
PETS' (K. Chua et al., 2018, arXiv 1805.12114); --value-expansion is MVE (V. Feinberg et al., 2018, arXiv 1803.00101).

The algorithm (Algorithm 2 of the paper):
    (1) every 250 steps train p_θ on D_env by maximum likelihood, until what it has not seen gets no better
    (2) from M states drawn from D_env follow the policy through p_θ for k steps; add what is imagined to D_model
    (3) take an action by π_φ (at first a random one) and add the transition to D_env
    (4) for G updates train π_φ and its critics on D_model, with a little of D_env

Symbols (paper → this file):
    s, a, r, s' → s, a, r, s2       p_θ → Ensemble, the elites drawn by `elite_sampler`     D_env → replay
    D_model → imagined              M → rollouts           k → rollout_length, rollout_schedule       G → updates
    π_φ → Policy                    η, η̂ → a policy's return in the world, in the model     ε_m, ε_π, C → return_bound
    of SAC: Q_θ → critics, Q̄ → targets, α → alpha, H̄ → target_entropy

Run (measured on 2 CPU cores; docs/mbpo.md says what is measured so far):
    python algos/mbpo.py                              # 1,000 from 2,500 steps on: 4 minutes (once lost, for a while)
    python algos/mbpo.py pendulum
    python algos/mbpo.py pendulum --rollout-length 0  # the control: SAC with as many updates, and no model
    python algos/mbpo.py hopper
    python algos/mbpo.py --env-id MountainCarContinuous-v0    # an unknown task: its end is learned too

Deviations from the paper and the official code:
  - D_model keeps the branches of the last `--retain-epochs` epochs. The code keeps as many rows as they would be if
    none ended early: where branches end early it also keeps older ones.
  - Each elite gets equally many rows of a batch, drawn at random; the code draws a member for each row alone.
  - A transition is in D_env as soon as it is made; the code adds an episode when it is over.
  - A state coordinate that never changed in the training rows stays as it is in imagination. A transition that
    overflows is left out, and its branch ends.
  - A training of the model that falls on an epoch's start is no exception: it is due every `--model-every` steps.
  - Of MVE the target alone, with SAC's entropies; its critics are trained on imagined states only if branches are.
  - The critics step first, then policy and temperature together, then the targets; in the code's graph all but the
    targets step at once.
  - The tasks are Gymnasium's v5, with their observations and ends. Where a task has no entry in TASKS its end is
    learned with the model; the reward is always learned, as in the paper.
"""

import copy
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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, Optional

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

ALGORITHM = "mbpo"


@dataclass
class Args:
    env_id: str = "InvertedPendulum-v5"
    """Any Gymnasium environment with vectors for observations and a bounded box of actions; `module:Env-v0` imports
    the module first. The reward is learned; where this file's table TASKS has no entry, the end of an episode too."""
    total_timesteps: int = 10_000
    """Real environment steps in all, those of random actions included."""
    random_steps: int = 500
    """So many steps of uniformly random actions come first."""
    epoch_steps: int = 250
    """E: steps of an epoch, in which the rollouts' schedule counts; the first begins after the random steps."""
    model_every: int = 250
    """Train the model and imagine anew every this many steps."""
    rollouts: int = 100_000
    """M: branches for each time; the paper's 400 for each real step (humanoid: 100)."""
    rollout_schedule: tuple[int, int, int, int] = (20, 150, 1, 1)
    """The rollouts' length k, by epochs: `20 150 1 15` goes from 1 in epoch 20 evenly to 15 in epoch 150."""
    rollout_length: Optional[int] = None
    """k, if it is not to change; 0: no branches, SAC alone on real data with as many updates."""
    value_expansion: int = 0
    """H: the critics' target follows the policy through the model for so many steps before it asks the critics."""
    retain_epochs: int = 1
    """How many epochs imagined transitions are kept."""
    real_ratio: float = 0.05
    """Share of real transitions in a batch of SAC."""
    updates: int = 10
    """G: updates of SAC after each real step."""
    batch_size: int = 256
    """Transitions in one of them."""
    gamma: float = 0.99
    """γ: discount."""
    tau: float = 0.005
    """How far the targets follow the critics in each update."""
    learning_rate: float = 3e-4
    """Adam's step size for policy, critics and temperature."""
    hidden: int = 256
    """Units in each of the two hidden layers of policy and critics."""
    target_entropy: Optional[float] = None
    """H̄: the entropy that α steers the policy to. None: the paper's for the task, where TASKS has it, else minus the
    number of actions."""
    members: int = 7
    """B: networks in the ensemble."""
    elites: int = 5
    """So many of them, the best on held-out data, are believed."""
    model_layers: int = 4
    """Hidden layers of each member."""
    model_hidden: int = 200
    """Units in each."""
    model_learning_rate: float = 1e-3
    """Adam's step size for the ensemble."""
    model_batch_size: int = 256
    """Rows in a minibatch of the ensemble, for each member its own."""
    weight_decay: tuple[float, ...] = (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)
    """L2 on each layer's weights, ½ λ ‖w‖², from the first to the last; one number stands for all."""
    holdout: float = 0.2
    """Share of D_env that a training holds out, 5,000 rows at most: it ends by them."""
    patience: int = 5
    """A training ends after more than so many passes without a member that gets better by 1 %."""
    learn_termination: bool = False
    """Learn the end of an episode, also where TASKS knows it."""
    seed: int = 1
    """Fixes Python, NumPy, torch and the environment: the same seed on one CPU gives the same run."""
    device: str = "auto"
    """auto, cpu or cuda[:index]."""
    compile: bool = False
    """torch.compile for the losses of SAC, the hot path: speed may change, results only by rounding."""
    log_every: int = 250
    """Write losses, values and timings every this many steps (returns are written at each episode's end)."""
    eval_every: int = 500
    """Let the deterministic policy play in an environment of its own every this many steps; 0: only at the end."""
    eval_episodes: int = 5
    """Episodes for each of those evaluations."""
    eval_max_steps: int = 1_000
    """Cut an evaluation episode here."""
    picture_every: int = 1_000
    """Draw the model's errors and the imagined returns at the first evaluation after this many steps, 20 times at most;
    0: no picture."""
    capture_video: bool = False
    """Record the first episode of each evaluation as a GIF in the run folder."""
    run_dir: Optional[str] = None
    """Where to write; by default runs/<env>__<algorithm>__<seed>__<time>."""
    checkpoint_every: int = 2_500
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


MUJOCO = Args(  # what the paper's larger tasks share
    random_steps=5_000, epoch_steps=1_000, updates=20, log_every=1_000, eval_every=1_000, picture_every=5_000,
    checkpoint_every=10_000,
)  # fmt: skip
PRESETS = {
    "invertedpendulum": (
        "InvertedPendulum-v5: a pole kept upright from a few thousand steps on, at the paper's settings",
        Args(),
    ),
    "pendulum": (
        "Pendulum-v1: swing up and hold within 4,000 steps",
        Args(
            env_id="Pendulum-v1", total_timesteps=4_000, random_steps=400, epoch_steps=200, model_every=200,
            rollouts=80_000, log_every=200, eval_every=200, eval_episodes=10,
        ),
    ),
    "hopper": (
        "Hopper-v5 at the official code's settings: branches grow from 1 step to 11 (15 in epoch 150)",
        replace(MUJOCO, env_id="Hopper-v5", total_timesteps=125_000, rollout_schedule=(20, 150, 1, 15)),
    ),
    "walker2d": (
        "Walker2d-v5 at the paper's settings",
        replace(MUJOCO, env_id="Walker2d-v5", total_timesteps=300_000),
    ),
    "halfcheetah": (
        "HalfCheetah-v5 at the paper's settings: 40 updates for each step",
        replace(MUJOCO, env_id="HalfCheetah-v5", total_timesteps=400_000, updates=40),
    ),
    "ant": (
        "Ant-v5 without contact forces in its observation, at the paper's settings: branches up to 25 steps",
        replace(MUJOCO, env_id="Ant-v5", total_timesteps=300_000, rollout_schedule=(20, 100, 1, 25)),
    ),
    "humanoid": (
        "Humanoid-v5, positions and speeds alone in its observation, at the paper's settings",
        replace(MUJOCO, env_id="Humanoid-v5", total_timesteps=300_000, rollout_schedule=(20, 300, 1, 25),
                model_every=1_000, retain_epochs=5, model_hidden=400),
    ),
}  # fmt: skip


# ── The algorithm ─────────────────────────────────────────────────────────────────────────────────────────────────

Predict = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]  # s, a → s', r, ended


class Ensemble(nn.Module):
    """f̃_θ(s, a): B networks in one batched module. Each predicts the change of the state, mean and log-variance; with
    `rewards` also the reward's, with `ends` the log-odds that the episode ends.

    The first `unread` coordinates of a state are predicted but not read: where the body stands does not matter to how
    it moves. Their change is predicted as a speed, in `seconds` of a step: targets are not normalised, and a change of
    millimetres would drown in the noise that the lower bound of the variance leaves.
    """

    def __init__(
        self, members: int, state_size: int, action_size: int, layers: int, hidden: int, unread: int, seconds: float,
        probabilistic: bool, rewards: bool, ends: bool,
    ):  # fmt: skip
        super().__init__()
        self.members, self.unread, self.probabilistic = members, unread, probabilistic
        self.rewards, self.ends = rewards, ends
        self.input_size, self.target_size = state_size - unread + action_size, state_size + rewards
        sizes = [self.input_size, *[hidden] * layers, self.target_size * (1 + probabilistic) + ends]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for m, n in itertools.pairwise(sizes):
            std = 1 / (2 * math.sqrt(m))
            weight = nn.init.trunc_normal_(torch.empty(members, m, n), std=std, a=-2 * std, b=2 * std)
            self.weights.append(weight)
            self.biases.append(torch.zeros(members, 1, n))
        if probabilistic:  # bounds of the log-variance, learned: beyond its data a network would else predict any
            self.max_logvar = nn.Parameter(torch.full((self.target_size,), 0.5))
            self.min_logvar = nn.Parameter(torch.full((self.target_size,), -10.0))
        self.register_buffer("input_mean", torch.zeros(self.input_size))
        self.register_buffer("input_std", torch.ones(self.input_size))
        self.register_buffer("target_unit", torch.ones(self.target_size), persistent=False)
        self.target_unit[:unread] = seconds
        self.register_buffer("target_scale", torch.zeros(self.target_size))  # nothing moves that has not been seen to

    def inputs(self, s: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return torch.cat([s[..., self.unread :], a], -1)

    def targets(self, data: "Transitions") -> torch.Tensor:
        change = data.next_obs - data.obs
        return (torch.cat([change, data.reward[..., None]], -1) if self.rewards else change) / self.target_unit

    def set_normalizer(self, data: "Transitions") -> None:
        """Of the inputs alone; what is constant in the data has the deviation 1."""
        x, change = self.inputs(data.obs, data.action), (data.next_obs - data.obs).abs().amax(0)
        std = x.std(0, correction=0)
        self.input_mean.copy_(x.mean(0))
        self.input_std.copy_(torch.where(std > 1e-6, std, 1.0))
        # The goal of a reacher is part of its state and never moves: no error of a network may let it drift.
        moves = F.pad(change > 1e-6, (0, int(self.rewards)), value=True)  # the reward, the last one, always counts
        self.target_scale.copy_(torch.where(moves, self.target_unit, 0.0))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Optional[torch.Tensor], torch.Tensor]:
        """x [B, N, ·], each member's own rows: mean and log-variance of the targets [B, N, ·], log-odds [B, N]."""
        x = (x - self.input_mean) / self.input_std
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = F.silu(x, inplace=not torch.is_grad_enabled()) if i else x  # a plan makes gigabytes of them
            x = torch.baddbmm(bias, x, weight)  # one product for all members
        x = x.float()  # bfloat16 ends here
        mean, logvar = x[..., : self.target_size], None
        if self.probabilistic:
            # Appendix A.1: log σ² ← max − softplus(max − log σ²), then min + softplus(log σ² − min)
            logvar = self.max_logvar - F.softplus(self.max_logvar - x[..., self.target_size : 2 * self.target_size])
            logvar = self.min_logvar + F.softplus(logvar - self.min_logvar)
        return mean, logvar, x[..., -1]

    def gaussian(self, s: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """s [B, N, D], a [B, N, A]: mean and deviation of the change (and reward), in the state's own units."""
        mean, logvar, logit = self(self.inputs(s, a))
        std = (0.5 * logvar).exp() if self.probabilistic else torch.zeros_like(mean)
        return mean * self.target_scale, std * self.target_scale, logit


def ensemble_loss(model: Ensemble, x: torch.Tensor, y: torch.Tensor, ended: torch.Tensor) -> torch.Tensor:
    """x, y [B, N, ·], ended [B, N] of 0 and 1: a scalar, the sum over the members of their means."""
    mean, logvar, logit = model(x)
    if model.probabilistic:
        # Eq. 1: loss_Gauss(θ) = Σ_n [μ_θ(s_n, a_n) − s_{n+1}]ᵀ Σ_θ⁻¹ [μ_θ(s_n, a_n) − s_{n+1}] + log det Σ_θ(s_n, a_n)
        loss = ((mean - y).square() * (-logvar).exp() + logvar).mean((1, 2)).sum()
        # Appendix A.1: the bounds are drawn towards what the data need
        loss = loss + 0.01 * (model.max_logvar.sum() - model.min_logvar.sum())
    else:
        loss = 0.5 * (mean - y).square().mean((1, 2)).sum()
    if model.ends:  # the reward is one more coordinate of y
        loss = loss + F.binary_cross_entropy_with_logits(logit, ended) * model.members
    return loss


def make_optimizer(model: Ensemble, decays: tuple[float, ...], learning_rate: float) -> torch.optim.Optimizer:
    """Adam adds weight_decay · w to the gradient: that of ½ λ ‖w‖², the paper's L2, at no cost (AdamW does not)."""
    decays = decays * (len(model.weights) if len(decays) == 1 else 1)
    groups = [{"params": [w], "weight_decay": decay} for w, decay in zip(model.weights, decays, strict=True)]
    groups.append({"params": [p for name, p in model.named_parameters() if not name.startswith("weights")]})
    return torch.optim.Adam(groups, learning_rate, fused=True)


def bootstraps(members: int, rows: int) -> np.ndarray:
    """Section 4: each member has a data set D_b of its own, |D| rows of D drawn with replacement: [B, |D|]."""
    return np.random.randint(rows, size=(members, rows))


def fit_to_holdout(
    model: Ensemble, optimizer: torch.optim.Optimizer, replay: "ReplayBuffer", args: Args, log: "RunLog",
    cut: Callable[[], bool],
) -> Optional[list[int]]:  # fmt: skip
    """Step (1): passes over D_env until the rows held out get no better. The elites; None where it was cut short, and
    all is as it was before."""
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    order = np.random.permutation(replay.size)
    held_out = min(int(args.holdout * replay.size), 5_000)
    data, unseen = replay.rows(order[held_out:]), replay.rows(order[:held_out])
    model.set_normalizer(data)
    x, y, ended = model.inputs(data.obs, data.action), model.targets(data), data.terminated.float()
    unseen_x = model.inputs(unseen.obs, unseen.action).expand(model.members, -1, -1)
    unseen_y = model.targets(unseen)
    rows = bootstraps(model.members, len(x))  # kept for all passes

    parameters = [*model.weights, *model.biases]
    best, kept = torch.full((model.members,), math.inf, device=x.device), [p.detach().clone() for p in parameters]
    passes, waited = 0, 0
    while waited <= args.patience:
        if cut():
            model.load_state_dict(before[0])
            optimizer.load_state_dict(before[1])
            return None
        for first in range(0, len(x), args.model_batch_size):
            index = torch.from_numpy(rows[:, first : first + args.model_batch_size]).to(x.device)
            loss = ensemble_loss(model, x[index], y[index], ended[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            log.mean("losses/model", loss / model.members)
        rows = np.take_along_axis(rows, np.random.rand(*rows.shape).argsort(1), 1)
        with torch.no_grad():
            error = (model(unseen_x)[0] - unseen_y).square().mean((1, 2))  # [B]: of the means, not of the likelihood
            better = error < 0.99 * best
            best = torch.where(better, error, best)
            for p, saved in zip(parameters, kept, strict=True):  # each member's own best pass
                saved[better] = p[better]
        passes, waited = passes + 1, 0 if better.any() else waited + 1
    with torch.no_grad():
        for p, saved in zip(parameters, kept, strict=True):
            p.copy_(saved)
    elites = best.argsort()[: args.elites].tolist()
    log.mean("model/passes", passes)
    log.mean("model/elite_mse", best[elites].mean())
    return elites


def elite_sampler(args: Args, model: Ensemble, elites: list[int]) -> Predict:
    """What the policy takes for the world: each row goes through one elite, in each step drawn anew."""
    task, chosen = TASKS.get(args.env_id), copy.deepcopy(model)
    chosen.members = len(elites)
    for p in (*chosen.weights, *chosen.biases):
        p.data = p.data[elites]

    def predict(s: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        seats = len(elites) * -(-len(s) // len(elites))  # as many with each elite
        seat = torch.randperm(seats, device=s.device)[: len(s)]
        rows = torch.zeros(seats, dtype=torch.long, device=s.device)  # a seat that stays empty computes row 0 again
        rows = rows.index_copy_(0, seat, torch.arange(len(s), device=s.device)).view(len(elites), -1)
        mean, std, logit = chosen.gaussian(s[rows], a[rows])
        y = (mean + std * torch.randn_like(mean)).flatten(0, 1)[seat]
        s2, r = s + y[:, :-1], y[:, -1]
        if chosen.ends:  # drawn, like all else: what is taken for alive whenever it is likelier is valued too high
            return s2, r, torch.rand_like(r) < logit.flatten()[seat].sigmoid()
        return s2, r, task.ended(s2)

    return predict


def scheduled_length(schedule: tuple[int, int, int, int], epoch: int) -> int:
    """k in this epoch."""
    first, last, shortest, longest = schedule
    # Appendix C: k = min(max(x + (e − a) / (b − a) · (y − x), x), y)
    share = min(max((epoch - first) / (last - first), 0.0), 1.0)
    return int(shortest + share * (longest - shortest))


class ImaginedReplay:
    """D_model: what was imagined lately, one row [2D + A + 2] for each transition: s, a, r, s', ended."""

    def __init__(self, state_size: int, action_size: int, sweeps: int, device: torch.device):
        self.sizes = [state_size, action_size, 1, state_size, 1]
        self.sweeps, self.lengths, self.rows = sweeps, [], torch.empty(0, sum(self.sizes), device=device)

    def add(self, rows: torch.Tensor) -> None:
        """One sweep of branches; the oldest of `sweeps` is forgotten."""
        lengths = [*self.lengths, len(rows)]
        self.rows = torch.cat([self.rows[sum(lengths[: -self.sweeps]) :], rows])
        self.lengths = lengths[-self.sweeps :]

    def sample(self, n: int) -> tuple[torch.Tensor, ...]:
        """s, a, r, s', ended of n rows at random."""
        rows = self.rows[torch.randint(len(self.rows), (n,), device=self.rows.device)]
        s, a, r, s2, ended = rows.split(self.sizes, -1)
        return s, a, r[:, 0], s2, ended[:, 0]

    def state_dict(self) -> dict:
        return {"lengths": self.lengths, "rows": self.rows}

    def load_state_dict(self, state: dict) -> None:
        self.lengths, self.rows = state["lengths"], state["rows"].to(self.rows.device)


@torch.no_grad()
def branch(predict: Predict, policy: "Policy", s: torch.Tensor, length: int) -> torch.Tensor:
    """Step (2): k-step rollouts from the states s [M, D], as rows of D_model."""
    rows = []
    for part in s.split(10_000):  # what the cache can hold: faster by a quarter
        s = part
        for _ in range(length):
            a, _ = policy(s)
            s2, r, ended = predict(s, a)
            sound = s2.isfinite().all(-1) & r.isfinite()
            rows.append(torch.cat([s, a, r[:, None], s2, ended[:, None].float()], -1)[sound])
            s = s2[sound & ~ended]
            if len(s) == 0:
                break
    return torch.cat(rows)


class Policy(nn.Module):
    """π_φ(a|s): a Gaussian whose samples tanh brings into (−1, 1)."""

    def __init__(self, state_size: int, action_size: int, hidden: int):
        super().__init__()
        layers = [nn.Linear(state_size, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 2 * action_size)]
        for layer in layers:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.net = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    def forward(self, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """An action a ~ π(·|s) and log π(a|s)."""
        mean, log_std = self.net(s).chunk(2, -1)
        log_std = log_std.clamp(-20, 2)
        noise = torch.randn_like(mean)
        u = mean + log_std.exp() * noise
        # SAC, Eq. 26: log π(a|s) = log N(u; μ, σ²) − Σ log(1 − tanh² u), and 1 − tanh² u = 4 / (eᵘ + e⁻ᵘ)²
        log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))
        return torch.tanh(u), (log_normal - log_slope).sum(-1)

    def act(self, s: torch.Tensor) -> torch.Tensor:
        """The deterministic policy."""
        return torch.tanh(self.net(s).chunk(2, -1)[0])


class Critics(nn.Module):
    """Q_θ(s, a), two of them in one batched module."""

    def __init__(self, state_size: int, action_size: int, hidden: int):
        super().__init__()
        sizes = [state_size + action_size, hidden, hidden, 1]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for m, n in itertools.pairwise(sizes):
            self.weights.append(torch.stack([nn.init.xavier_uniform_(torch.empty(m, n)) for _ in range(2)]))
            self.biases.append(torch.zeros(2, 1, n))

    def forward(self, s: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        x = torch.cat([s, a], -1).expand(2, -1, -1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, F.relu(x) if i else x, weight)
        return x[..., 0]  # [2, B]


class SAC:
    """Policy, two critics with their targets, and the temperature."""

    def __init__(self, state_size: int, action_size: int, args: Args, device: torch.device):
        self.args, self.policy = args, Policy(state_size, action_size, args.hidden).to(device)
        self.critic_loss, self.policy_loss = critic_loss, policy_loss
        if args.compile:
            same_dice = {"fallback_random": True}
            self.critic_loss, self.policy_loss = (torch.compile(loss, options=same_dice)
                                                  for loss in (critic_loss, policy_loss))  # fmt: skip
        self.critics = Critics(state_size, action_size, args.hidden).to(device)
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = torch.zeros((), device=device, requires_grad=True)
        task = TASKS.get(args.env_id)
        entropies = (args.target_entropy, task and task.target_entropy, -float(action_size))
        self.target_entropy = next(x for x in entropies if x is not None)
        self.groups = {
            "critics": list(self.critics.parameters()),
            "policy": [*self.policy.parameters(), self.log_alpha],
        }
        self.optimizers = {name: torch.optim.Adam(group, args.learning_rate, fused=True)
                           for name, group in self.groups.items()}  # fmt: skip

    def descend(self, name: str, loss: torch.Tensor) -> None:
        self.optimizers[name].zero_grad()
        loss.backward(inputs=self.groups[name])  # the policy's loss passes through the critics and leaves them alone
        self.optimizers[name].step()

    def update(
        self, s: torch.Tensor, a: torch.Tensor, r: torch.Tensor, s2: torch.Tensor, ended: torch.Tensor,
        predict: Optional[Predict],
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        """Once for a batch [B, ...]."""
        args = self.args
        with torch.no_grad():
            # y = r + γ (1 − ended) V(s')
            y = r + args.gamma * (1 - ended) * soft_value(self, s2, args.gamma, args.value_expansion, predict)
        loss_q, value = self.critic_loss(self.critics, s, a, y)
        self.descend("critics", loss_q)
        loss_pi, log_prob = self.policy_loss(self.policy, self.critics, s, self.log_alpha.detach().exp())
        # SAC, Eq. 18: J(α) = E[−α (log π(a|s) + H̄)], with log α for its factor α, as the code has it
        loss_alpha = -self.log_alpha * (log_prob.detach().mean() + self.target_entropy)
        self.descend("policy", loss_pi + loss_alpha)  # neither reaches what the other steps
        with torch.no_grad():
            # Q̄ ← (1 − τ) Q̄ + τ Q
            torch._foreach_lerp_(list(self.targets.parameters()), self.groups["critics"], args.tau)
        return {
            "losses/critic": loss_q, "losses/policy": loss_pi, "losses/alpha": loss_alpha, "charts/value": value,
            "charts/entropy": -log_prob.mean(), "charts/alpha": self.log_alpha.exp(),
        }  # fmt: skip

    def learned(self) -> dict:
        return {"policy": self.policy.state_dict(), "critics": self.critics.state_dict(),
                "targets": self.targets.state_dict(), "log_alpha": self.log_alpha.detach()}  # fmt: skip

    def load(self, learned: dict, optimizers: dict) -> None:
        for name in ("policy", "critics", "targets"):
            getattr(self, name).load_state_dict(learned[name])
        self.log_alpha.data.copy_(learned["log_alpha"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(optimizers[name])


def soft_value(sac: SAC, s: torch.Tensor, gamma: float, steps: int, predict: Optional[Predict]) -> torch.Tensor:
    """V(s) by the target critics, `steps` steps of the policy in the model later: the multi-step target of MVE."""
    alpha, (value, discount) = sac.log_alpha.exp(), (torch.full((len(s),), x, device=s.device) for x in (0.0, 1.0))
    # V(s_0) = Σ_{h<H} γ^h [r̂_h − α log π(a_h|s_h)] + γ^H [min Q̄(s_H, a_H) − α log π(a_H|s_H)], up to a terminal state
    sound = True
    for _ in range(steps):
        a, log_prob = sac.policy(s)
        s2, r, ended = predict(s, a)
        sound = s2.isfinite().all(-1) & r.isfinite() & sound  # where the model overflows the critics are asked at once
        value = torch.where(sound, value + discount * (r - alpha * log_prob), value)
        discount = torch.where(sound, discount * gamma * (~ended), discount)
        s = torch.where((sound & ~ended)[:, None], s2, s)
    a, log_prob = sac.policy(s)
    return value + discount * (sac.targets(s, a).amin(0) - alpha * log_prob)


def critic_loss(
    critics: Critics, s: torch.Tensor, a: torch.Tensor, y: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """And the values' mean."""
    values = critics(s, a)
    # SAC, Eq. 5: J_Q = E[½ (Q(s, a) − (r + γ V(s')))²], of both critics
    return 0.5 * (values - y).square().mean(1).sum(), values.mean()


def policy_loss(
    policy: Policy, critics: Critics, s: torch.Tensor, alpha: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """And log π(a|s)."""
    a, log_prob = policy(s)
    # SAC, Eq. 9: J_π = E[α log π(a|s) − min Q(s, a)]
    return (alpha * log_prob - critics(s, a).amin(0)).mean(), log_prob


def return_bound(model_error: float, policy_shift: float, gamma: float, largest_reward: float) -> float:
    """Theorem 4.1: C(ε_m, ε_π), of total variation distances: η[π] ≥ η̂[π] − C. What short branches keep small; the
    algorithm itself does not need it."""
    # C(ε_m, ε_π) = 2 γ r_max (ε_m + 2 ε_π) / (1 − γ)² + 4 r_max ε_π / (1 − γ)
    drift = 2 * gamma * (model_error + 2 * policy_shift) / (1 - gamma) ** 2
    return largest_reward * (drift + 4 * policy_shift / (1 - gamma))


# ── What the model believes: measured, and drawn ──────────────────────────────────────────────────────────────────


@torch.inference_mode()
def imagine(predict: Predict, s: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """s [K, D], actions [K, H, A]: the states [K, H, D] they are believed to lead to, and the returns [K]."""
    states, returns = [], torch.zeros(len(s), device=s.device)
    alive = torch.ones(len(s), dtype=torch.bool, device=s.device)
    for a in actions.unbind(1):  # all candidates in one product a step
        s, r, ended = predict(s, a)
        # Algorithm 1: Σ_{τ=t}^{t+T} r(s_τ^p, a_τ) of this particle, up to a terminal state
        returns = returns + torch.where(alive, r, 0.0)
        alive = alive & ~ended
        states.append(s)
    return torch.stack(states, 1), returns


def windows(replay: "ReplayBuffer", first: int, length: int, at_most: int = 200) -> Optional["Transitions"]:
    """Sequences [B, T, ...] of the rows from `first` on, each inside one episode; or None. For a replay that has not
    yet come round."""
    over = replay.data.terminated[first : replay.size] | replay.data.truncated[first : replay.size]
    ends_before = np.concatenate([[0], np.cumsum(over)])
    starts = np.arange(max(len(over) - length + 1, 0))
    starts = starts[ends_before[starts + length - 1] == ends_before[starts]]
    if len(starts) == 0:
        return None
    starts = starts[:: -(-len(starts) // at_most)]
    return replay.rows(first + starts[:, None] + np.arange(length))


def state_scale(replay: "ReplayBuffer") -> torch.Tensor:
    std = replay.rows(np.arange(replay.size)).obs.std(0, correction=0)
    return torch.where(std > 1e-6, std, 1.0)


def open_loop(
    predict: Predict, sequences: "Transitions", scale: torch.Tensor, particles: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """[T] each: start where real sequences start, take their actions in the model, never look: how wrong the particles'
    mean is after h steps, and how wrong they expect to be. Where the ensemble knows its errors the two are alike."""
    s, actions = sequences.obs[:, 0].repeat(particles, 1), sequences.action.repeat(particles, 1, 1)
    states = imagine(predict, s, actions)[0].unflatten(0, (particles, -1)) / scale  # [P, N, T, D]
    # E_h = 1/N Σ ½ ‖s_{t+h} − ŝ_{t+h}‖², and Σ_d ½ Var_p[s^p_{t+h}], in deviations of the data
    errors = 0.5 * (states.mean(0) - sequences.next_obs / scale).square().sum(-1).mean(0)
    return errors, 0.5 * states.var(0, correction=0).sum(-1).mean(0)


@torch.inference_mode()
def ensemble_metrics(
    predict: Predict, model: Ensemble, replay: "ReplayBuffer", first: int, particles: int
) -> dict[str, float]:
    """On the rows from `first` on, which the model has not been trained on."""
    data = replay.rows(np.arange(first, replay.size))
    x, y, ended = (v.expand(model.members, *v.shape) for v in
                   (model.inputs(data.obs, data.action), model.targets(data), data.terminated.float()))  # fmt: skip
    metrics = {"model/heldout_loss": ensemble_loss(model, x, y, ended).item() / model.members}
    mean, logvar, _ = model(x)
    std = model.targets(replay.rows(np.arange(replay.size))).std(0, correction=0)
    varies = std > 1e-6  # a constant has no deviation to measure in
    metrics["model/heldout_mse"] = ((mean - y) / std)[..., varies].square().mean().item()
    metrics["model/disagreement"] = (mean.std(0, correction=0) / std)[..., varies].mean().item()
    if model.probabilistic:
        metrics["model/noise"] = ((0.5 * logvar).exp() / std)[..., varies].mean().item()
    for horizon in (1, 5, 10, 50):
        if sequences := windows(replay, first, horizon):
            errors, spread = open_loop(predict, sequences, state_scale(replay), particles)
            metrics[f"model/open_loop_error_{horizon}"] = errors.mean().item()
            metrics[f"model/open_loop_spread_{horizon}"] = spread.mean().item()
    return {tag: value for tag, value in metrics.items() if math.isfinite(value)}  # a young model may overflow


@torch.no_grad()
def imagined_return(predict: Predict, policy: Policy, replay: "ReplayBuffer", steps: int) -> float:
    """η̂[π]: what the deterministic policy would earn if the model were the world, from the last real first states."""
    over = replay.data.terminated[: replay.size] | replay.data.truncated[: replay.size]
    first = np.flatnonzero(np.concatenate([[True], over[:-1]]))[-20:]
    s = replay.rows(first).obs
    total, alive = torch.zeros(len(s), device=s.device), torch.ones(len(s), dtype=torch.bool, device=s.device)
    for _ in range(steps):
        s, r, ended = predict(s, policy.act(s))
        total = total + torch.where(alive, r, 0.0)
        alive = alive & ~ended
        if not alive.any():
            break
    return total.mean().item()


def draw_trust(errors: Optional[np.ndarray], length: int, history: list, title: str) -> np.ndarray:
    """The picture: left, errors and spread [2, T] of rollouts that never look, on real actions; right, what the policy
    earned and what the model had promised, [(step, real, imagined or NaN)]."""
    figure = Figure(figsize=(9, 3.6), dpi=80)
    figure.suptitle(title, fontsize=11)
    axes = figure.add_axes((0.09, 0.14, 0.38, 0.72))
    axes.set(xlabel="steps without looking, h", ylabel="½ ‖s − ŝ‖², in deviations")
    if errors is not None:
        for values, label, color in zip(errors, ("error", "expected"), ("tab:blue", "tab:orange"), strict=True):
            axes.semilogy(np.arange(1, len(values) + 1), np.clip(values, 1e-12, 1e12), label=label, color=color)
        axes.axvspan(0, length, color="gray", alpha=0.2, label="the branches' length")
        axes.legend(fontsize=8)
    axes = figure.add_axes((0.58, 0.14, 0.4, 0.72))
    axes.set(xlabel="real environment steps", ylabel="return")
    steps, real, imagined = np.array(history).T
    axes.plot(steps, real, "o-", markersize=3, label="real", color="black")
    axes.plot(steps, imagined, "o-", markersize=3, label="imagined", color="tab:orange")
    low, high = real.min(), real.max()
    margin = high - low + 1e-3 * max(abs(low), abs(high), 1)  # a promise out of all proportion is not drawn
    axes.set(ylim=(low - margin, high + margin))
    axes.legend(fontsize=8)
    return figure_to_array(figure)


# ── Training ──────────────────────────────────────────────────────────────────────────────────────────────────────


def check_settings(args: Args) -> None:
    """Every wrong setting that can be seen before training starts, as one sentence."""
    check_run_settings(args)
    for least, names in (
        (1, ("random_steps", "epoch_steps", "model_every", "rollouts", "retain_epochs", "updates", "batch_size")),
        (1, ("hidden", "members", "elites", "model_layers", "model_hidden", "model_batch_size")),
        (0, ("rollout_length", "value_expansion", "patience")),
    ):
        for name in names:
            value = getattr(args, name)
            if value is not None and value < least:
                stop(f"--{name.replace('_', '-')} is {value}: it must be at least {least}")
    first, last, shortest, longest = args.rollout_schedule
    if not (0 <= first < last and min(shortest, longest) >= 1):
        stop("--rollout-schedule wants an epoch, a later one, and two lengths above 0; no branches: --rollout-length 0")
    if args.elites > args.members:
        stop(f"--elites is {args.elites}: of {args.members} --members there can't be more")
    if not 0 <= args.gamma < 1 or not 0 < args.tau <= 1 or not 0 <= args.real_ratio <= 1 or not 0 < args.holdout < 1:
        stop("--gamma must lie in [0, 1), --tau in (0, 1], --real-ratio in [0, 1], --holdout in (0, 1)")
    if args.learning_rate <= 0 or args.model_learning_rate <= 0:
        stop("--learning-rate and --model-learning-rate must be above 0")
    if args.target_entropy is not None and not math.isfinite(args.target_entropy):
        stop(f"--target-entropy is {args.target_entropy}: it must be a finite number, or None")
    decays, right = args.weight_decay, (1, args.model_layers + 1)
    if len(decays) not in right or not all(0 <= x < math.inf for x in decays):
        stop(f"--weight-decay wants one number for all layers or {args.model_layers + 1} of them, none below 0")
    if args.rollout_length != 0 and int(args.real_ratio * args.batch_size) == args.batch_size:
        stop(f"--real-ratio is {args.real_ratio:g}: no imagined row would be used; for SAC alone --rollout-length 0")
    if args.random_steps * args.holdout < 1:
        stop(f"--random-steps is {args.random_steps}: too few to hold out {args.holdout:g} of them")


def rollout_length(args: Args, step: int) -> int:
    if args.rollout_length is not None:
        return args.rollout_length
    return scheduled_length(args.rollout_schedule, (step - args.random_steps) // args.epoch_steps)


def make_world(args: Args, env: gym.Env) -> Optional[Ensemble]:
    """None where no step needs a model."""
    if args.rollout_length == 0 and args.value_expansion == 0:
        return None
    (state_size,), (action_size,) = env.observation_space.shape, env.action_space.shape
    ends = args.learn_termination or args.env_id not in TASKS
    return Ensemble(args.members, state_size, action_size, args.model_layers, args.model_hidden, 0, 1.0,
                    probabilistic=True, rewards=True, ends=ends)  # fmt: skip


def deterministic(policy: nn.Module, device: torch.device) -> Callable[[Any], Any]:
    """The deterministic policy as a function of one observation."""

    @torch.inference_mode()
    def act(obs: np.ndarray) -> np.ndarray:
        return policy.act(torch.as_tensor(obs, dtype=torch.float32, device=device)).cpu().numpy()

    return act


def load_policy(args: Args, env: gym.Env, checkpoint: dict) -> Callable[[], Callable[[Any], Any]]:
    """For --evaluate: what makes the policy of a checkpoint, for each episode the same."""
    device = pick_device(args.device)
    policy = Policy(env.observation_space.shape[0], env.action_space.shape[0], args.hidden).to(device)
    policy.load_state_dict(checkpoint["learned"]["policy"])
    return lambda: deterministic(policy, device)


def batches(
    replay: "ReplayBuffer", imagined: ImaginedReplay, args: Args
) -> Iterator[tuple[torch.Tensor, ...]]:  # fmt: skip
    """For all updates of a step: s, a, r, s', ended [B, ...], drawn at once."""
    real = args.batch_size if args.rollout_length == 0 else int(args.real_ratio * args.batch_size)
    data = replay.sample(args.updates * real)
    columns = [data.obs, data.action, data.reward, data.next_obs, data.terminated.float()]
    columns = [x.unflatten(0, (args.updates, real)) for x in columns]
    if real < args.batch_size:
        more = imagined.sample(args.updates * (args.batch_size - real))
        more = [x.unflatten(0, (args.updates, args.batch_size - real)) for x in more]
        columns = [torch.cat(pair, 1) for pair in zip(columns, more, strict=True)]
    return zip(*columns, strict=True)


def train(args: Args) -> Path:
    device = pick_device(args.device)
    print(f"device: {device}")
    seed_everything(args.seed)
    env, eval_env = make_task(args), make_task(args, render=args.capture_video)
    env.action_space.seed(args.seed)
    run_dir, checkpoint = open_run(args)

    (state_size,), (action_size,) = env.observation_space.shape, env.action_space.shape
    sac, model = SAC(state_size, action_size, args, device), make_world(args, env)
    if model:
        model_optimizer = make_optimizer(model.to(device), args.weight_decay, args.model_learning_rate)
    # Room for all of D_env, and one row more: a full buffer would begin to forget when the run is lengthened.
    replay = ReplayBuffer(args.total_timesteps + 1, env.observation_space, env.action_space, device)
    sweeps = max(args.retain_epochs * args.epoch_steps // args.model_every, 1)
    imagined = ImaginedReplay(state_size, action_size, sweeps, device)
    step, fitted_at, elites, history = 0, 0, [], []
    if checkpoint:
        step, fitted_at, elites = checkpoint["step"], checkpoint["fitted_at"], checkpoint["elites"]
        history = checkpoint["history"]
        sac.load(checkpoint["learned"], checkpoint["optimisers"])
        if model:
            model.load_state_dict(checkpoint["learned"]["model"])
            model_optimizer.load_state_dict(checkpoint["optimisers"]["model"])
        imagined.load_state_dict(checkpoint["imagined"])
        replay.load_state_dict(checkpoint["replay"])
        set_env_state(env, checkpoint["env"])
        set_random_states(checkpoint["random"])
    predict = elite_sampler(args, model, elites) if elites else None
    if args.total_timesteps <= args.random_steps:
        print(f"nothing will be learned: the first {args.random_steps:,} steps are random (--random-steps)")
    log = RunLog(args, run_dir, checkpoint)

    # These three look at the variables of the loop as they are when they are called, and leave the dice alone.
    def save() -> None:
        learned, optimizers = sac.learned(), {name: x.state_dict() for name, x in sac.optimizers.items()}
        if model:
            learned["model"], optimizers["model"] = model.state_dict(), model_optimizer.state_dict()
        save_checkpoint(
            run_dir, step=step, fitted_at=fitted_at, elites=elites, history=history, learned=learned,
            optimisers=optimizers, imagined=imagined.state_dict(), replay=replay.state_dict(), env=env_state(env),
            log=log.state_dict(),
        )  # fmt: skip
        log.lap("log")

    def measure() -> None:
        before = random_states()
        set_env_state(eval_env, env_state(env), generators=False)
        log.evaluation(step, lambda: deterministic(sac.policy, device), eval_env)
        earned, promised = float(np.mean(log.scores[0])), math.nan
        if predict:
            limit = min(args.eval_max_steps, eval_env.spec.max_episode_steps or args.eval_max_steps)
            promised = imagined_return(predict, sac.policy, replay, limit)
            if math.isfinite(promised):  # whole episodes in a young model may overflow
                log.scalars(step, {"model/imagined_return": promised})
        history.append((step, earned, promised))
        set_random_states(before)

    def draw() -> None:
        before = random_states()
        sequences = windows(replay, fitted_at, 50) or windows(replay, fitted_at, 10)  # which the model has not seen
        errors = None
        if predict and sequences:
            errors = torch.stack(open_loop(predict, sequences, state_scale(replay), 10)).cpu().numpy()
        length = rollout_length(args, step)
        log.picture(step, draw_trust(errors, length, history, f"{args.env_id}: step {step:,}, k = {length}"))
        set_random_states(before)

    obs = np.array(env.reset(seed=None if checkpoint else args.seed)[0])  # copied: some environments reuse theirs
    episode_return, episode_length = 0.0, 0
    with StopSignal() as stop_signal:
        while step < args.total_timesteps:
            learning = step >= args.random_steps
            if learning and (fitted_at == 0 or step - fitted_at >= args.model_every):
                # (1) train p_θ on D_env
                if model:
                    if fitted_at:
                        log.scalars(step, ensemble_metrics(predict, model, replay, fitted_at, 10))
                    best = fit_to_holdout(model, model_optimizer, replay, args, log, lambda: stop_signal.to_stop(False))
                    if best is None:
                        break
                    elites, predict = best, elite_sampler(args, model, best)
                    log.lap("model")
                # (2) follow the policy through p_θ from states of D_env; add to D_model
                if length := rollout_length(args, step):
                    rows = branch(predict, sac.policy, replay.sample(args.rollouts).obs, length)
                    imagined.add(rows)
                    if len(imagined.rows) == 0:
                        stop(f"all that the model imagined at step {step:,} overflowed: there is nothing to learn from")
                    log.mean("model/rollout_length", len(rows) / args.rollouts)
                    log.lap("rollout")
                if fitted_at == 0:
                    log.start_clock(step)
                fitted_at = step

            # (3) take an action by π_φ (at first a random one) and add the transition to D_env
            if learning:
                with torch.inference_mode():
                    a = sac.policy(torch.as_tensor(obs, dtype=torch.float32, device=device))[0].cpu().numpy()
            else:
                a = env.action_space.sample()
            next_obs, r, terminated, truncated, _ = env.step(a.copy())
            step, r, over = step + 1, float(r), bool(terminated or truncated)
            if not math.isfinite(r) or not np.isfinite(next_obs).all():
                stop(f"{args.env_id} gave the reward {r} and {next_obs} at step {step:,}: nothing to learn from")
            replay.add(obs, a, r, next_obs, terminated, truncated)
            obs, episode_return, episode_length = np.array(next_obs), episode_return + r, episode_length + 1
            log.lap("env")

            # (4) for G updates train π_φ and its critics on D_model, with a little of D_env
            if learning:
                for batch in batches(replay, imagined, args):
                    metrics = sac.update(*batch, predict)
                for tag, value in metrics.items():
                    log.mean(tag, value)
                log.lap("policy")

            log.bar.update()
            if over:
                log.episode(step, episode_return, episode_length)
            if log.due("log", args.log_every, step):
                log.flush(step)
            if log.due("eval", args.eval_every, step) and step < args.total_timesteps:
                measure()
                if log.due("picture", args.picture_every, step, at_most=20):
                    draw()
            if log.due("checkpoint", args.checkpoint_every, step, wait_for=over):
                save()
            if stop_signal.to_stop(over):
                break
            if over and step < args.total_timesteps:
                obs, episode_return, episode_length = np.array(env.reset()[0]), 0.0, 0
                log.lap("env")
        save()
    if stop_signal.number and step < args.total_timesteps:
        log.stopped(step, stop_signal.number)
    measure()
    if args.picture_every:
        draw()
    log.finish(step)
    return run_dir


# ── The tasks: what the model's branches must know of them ────────────────────────────────────────────────────────


def never(s: torch.Tensor) -> torch.Tensor:
    return torch.zeros(s.shape[:-1], dtype=torch.bool, device=s.device)


class TaskEnd(NamedTuple):
    """Where an episode ends, a function of batches of states [..., D]; H̄; and the settings for gym.make."""

    ended: Callable[[torch.Tensor], torch.Tensor] = never
    target_entropy: Optional[float] = None
    settings: dict = {}


def fallen(s: torch.Tensor) -> torch.Tensor:  # InvertedPendulum-v5: s = (x, angle, x', angle')
    return (s[..., 1].abs() > 0.2) | ~s.isfinite().all(-1)


def double_fallen(s: torch.Tensor) -> torch.Tensor:
    """InvertedDoublePendulum-v5: s = (x, sin θ₁, sin θ₂, cos θ₁, cos θ₂, ...), the second angle from the first pole on;
    the tip, 0.6 (cos θ₁ + cos(θ₁ + θ₂)) above the cart, is not above 1."""
    sin1, sin2, cos1, cos2 = s[..., 1:5].unbind(-1)
    return ~(0.6 * (cos1 + cos1 * cos2 - sin1 * sin2) > 1)


def hopper_fallen(s: torch.Tensor) -> torch.Tensor:  # s = (height, angle, ...)
    return ~((s[..., 0] > 0.7) & (s[..., 1].abs() < 0.2) & (s[..., 1:].abs() < 100).all(-1))


def walker_fallen(s: torch.Tensor) -> torch.Tensor:
    return ~((s[..., 0] > 0.8) & (s[..., 0] < 2.0) & (s[..., 1].abs() < 1.0))


def off_height(low: float, high: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """The torso, at s[0], has left its range."""
    return lambda s: ~((s[..., 0] >= low) & (s[..., 0] <= high))


NO_FORCES = {"include_cfrc_ext_in_observation": False}  # as in the paper: 27 numbers for the ant, 45 for the humanoid
NO_BODIES = {f"include_{name}_in_observation": False for name in ("cinert", "cvel", "qfrc_actuator")}
TASKS = {
    "InvertedPendulum-v5": TaskEnd(fallen, -0.05),
    "InvertedDoublePendulum-v5": TaskEnd(double_fallen, -0.5),
    "Hopper-v5": TaskEnd(hopper_fallen, -1.0),
    "Walker2d-v5": TaskEnd(walker_fallen, -3.0),
    "HalfCheetah-v5": TaskEnd(target_entropy=-3.0),
    "Ant-v5": TaskEnd(off_height(0.2, 1.0), -4.0, NO_FORCES),
    "Humanoid-v5": TaskEnd(off_height(1.0, 2.0), -2.0, {**NO_FORCES, **NO_BODIES}),
    **{env_id: TaskEnd() for env_id in ("Pendulum-v1", "Swimmer-v5", "Reacher-v5", "Pusher-v5")},
}


def make_task(args: Args, render: bool = False) -> gym.Env:
    """The environment, checked to be one that this policy fits, its actions brought into [−1, 1]."""
    env = make_env(args.env_id, render, **(TASKS[args.env_id].settings if args.env_id in TASKS else {}))
    observations, actions = env.observation_space, env.action_space
    if isinstance(actions, gym.spaces.Discrete):
        stop(f"the actions of {args.env_id} are {actions} and this policy gives real numbers: dyna_q.py takes "
             "Discrete actions, of tasks whose observations are Discrete too")  # fmt: skip
    for name, space in (("actions", actions), ("observations", observations)):
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            stop(f"the policy needs {name} that are one vector of numbers, and those of {args.env_id} are {space}")
    if not np.issubdtype(actions.dtype, np.floating):
        stop(f"the actions of {args.env_id} are whole numbers ({actions}) and this policy gives real ones")
    if not (np.isfinite(actions.low).all() and np.isfinite(actions.high).all()):
        stop(f"the action box of {args.env_id} has no bounds ({actions}), and the policy's has")
    if observations.dtype not in (np.float32, np.float64):  # whole numbers have no differences to learn
        env = gym.wrappers.DtypeObservation(env, np.float32)
    return gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))


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


class Transitions(NamedTuple):
    """Columns of one length: [B, ...], or [B, T, ...] for sequences."""

    obs: Any
    action: Any
    reward: Any
    next_obs: Any
    terminated: Any
    truncated: Any


class ReplayBuffer:
    """The latest `capacity` transitions, in arrays made once. The end of an episode is in the row where it ended."""

    def __init__(self, capacity: int, observation_space: gym.Space, action_space: gym.Space, device: str = "cpu"):
        def column(shape: tuple, dtype: Any) -> np.ndarray:
            return np.zeros((capacity, *shape), np.float32 if dtype == np.float64 else dtype)

        self.data = Transitions(
            obs=column(observation_space.shape, observation_space.dtype),
            action=column(action_space.shape, action_space.dtype),
            reward=column((), np.float32),
            next_obs=column(observation_space.shape, observation_space.dtype),
            terminated=column((), bool),
            truncated=column((), bool),
        )
        self.capacity, self.size, self.pointer, self.device = capacity, 0, 0, device

    def add(self, obs: Any, action: Any, reward: float, next_obs: Any, terminated: bool, truncated: bool) -> None:
        for column, value in zip(self.data, (obs, action, reward, next_obs, terminated, truncated), strict=True):
            column[self.pointer] = value
        self.pointer = (self.pointer + 1) % self.capacity
        self.size = min(self.size + 1, self.capacity)

    def rows(self, index: np.ndarray) -> Transitions:
        return Transitions(*(torch.from_numpy(column[index]).to(self.device) for column in self.data))

    def sample(self, batch_size: int, length: Optional[int] = None) -> Optional[Transitions]:
        """Rows at random [B, ...]; with `length`, sequences [B, T, ...] that stay inside one episode, or None."""
        if length is None:
            return self.rows(np.random.randint(self.size, size=batch_size))
        oldest_first = (np.arange(self.size) + self.pointer - self.size) % self.capacity
        ends = np.cumsum(self.data.terminated[oldest_first] | self.data.truncated[oldest_first])
        ends_before = np.concatenate([[0], ends])  # ends_before[i]: episode ends in the rows older than i
        first = np.arange(max(self.size - length + 1, 0))
        first = first[ends_before[first + length - 1] == ends_before[first]]  # none but the last row may end one
        if len(first) == 0:
            return None
        return self.rows(oldest_first[np.random.choice(first, batch_size)[:, None] + np.arange(length)])

    def state_dict(self) -> dict:
        columns = [torch.from_numpy(column[: self.size]) for column in self.data]
        return {"columns": columns, "size": self.size, "pointer": self.pointer}

    def load_state_dict(self, state: dict) -> None:
        self.size, self.pointer = state["size"], state["pointer"]
        for column, saved in zip(self.data, state["columns"], strict=True):
            column[: self.size] = saved.numpy()
        if self.size and not self.data.terminated[self.pointer - 1]:  # a run cut inside an episode starts a new one:
            self.data.truncated[self.pointer - 1] = True  # the seam is an end, and not a terminal one


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
