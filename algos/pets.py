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
"""PETS: plan in a model that knows what it does not know.

An ensemble of networks learns from real steps how an action changes the state; each predicts a Gaussian. To judge
an action sequence the agent sends particles along it, each through one member and with that member's noise: where the
world is noisy or the data are thin the particles part, and the plan is judged by their mean. The cross-entropy method
shapes the sequences, and the first action of the result is executed; then it plans anew. A dozen trials are enough.

Paper: K. Chua, R. Calandra, R. McAllister, S. Levine, "Deep Reinforcement Learning in a Handful of Trials using
Probabilistic Dynamics Models", NeurIPS 2018, arXiv 1805.12114. Official code: github.com/kchua/handful-of-trials.

The algorithm (Algorithm 1 of the paper):
    (1) for one trial act at random: the data D
    (2) later, in each state s_t, improve a sequence of actions by CEM: judge each candidate by the mean return of P
        particles that trajectory sampling sends through the ensemble f̃, keep the elites, draw the next ones like them
    (3) execute the first action a_t of the mean alone
    (4) add (s_t, a_t, s_{t+1}) to D
    (5) after each trial train f̃_θ, each member on a bootstrap of D (Eq. 1), going on from the weights it has

Symbols (paper → this file):
    s, a, s' → s, a, s2              f̃_θ = N(μ_θ, Σ_θ) → Ensemble     B → members, the bootstraps
    P, s^p → particles               T → horizon                       D → replay
    TS1, TS∞, DS, MM, E → --propagation                                D, P, DE, PE → --model
    of the code: popsize → candidates     num_elites → elites     max_iters → iterations     alpha → alpha

Run (measured on 2 CPU cores, imports included; docs/pets.md has the curves of five seeds):
    python algos/pets.py                              # 5.5 minutes: 179.7 ± 0.1 of about 180, 178 in the sixth trial
    python algos/pets.py pendulum                     # 3.5 minutes: −131 ± 5
    python algos/pets.py cartpole --propagation E     # the paper's ablations: also --model D, --optimizer random
    python algos/pets.py cartpole --dynamics true     # the same planner in the true equations: no model error
    python algos/pets.py cartpole-paper --bf16        # the paper's sizes: 8.5 seconds a step here
    python algos/pets.py --env-id MountainCarContinuous-v0    # reward and end are learned too

Deviations from the paper and the official code:
  - Rows are counted, not trials: `--random-steps` and `--refit-every` are the length of one of the paper's trials.
  - Angles come as cosine and sine, as Gymnasium gives them, and the changes of both are predicted; the official code
    predicts the angle's and shows the network cosine and sine. HalfCheetah's pitch is read as it is.
  - Reacher, Pusher and HalfCheetah are Gymnasium's, with their own rewards and lengths. The reward of the bodies that
    run is a function of s and s' once x is in the state: the change of x is predicted as a speed and x is not read; the
    official code puts the speed into the state instead.
  - The cart-pole has the code's bodies, moved by their equations and not by MuJoCo; its rail's ends stop the cart dead.
  - MM refits a Gaussian to the particles' next states, as the paper says; the code refits one to their changes. With
    DE, DS and MM spread by the members' disagreement; the code then takes their mean alone, and has no TS for P and D.
  - A state coordinate that never changes (a reacher's goal) stays as it is in imagination, and a particle whose member
    believes it at a terminal state earns nothing from there on; the official code knows neither case.
  - CEM never stops before its first round, the action 0 that ends the shifted plan is clipped to the box, and a
    return that is no finite number is −1e30, not −1e6.
  - The baselines with Gaussian processes are other algorithms.
"""

import functools
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
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional

import gymnasium as gym
import numpy as np
import torch
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

ALGORITHM = "pets"


@dataclass
class Args:
    env_id: str = "CartPoleSwingUp-v0"
    """Any Gymnasium environment with vectors for observations and a bounded box of actions; `module:Env-v0` imports
    the module first. Where this file's table TASKS has no entry, reward and termination are learned."""
    total_timesteps: int = 2_400
    """Real environment steps in all, those of random actions included."""
    model: Literal["PE", "P", "DE", "D"] = "PE"
    """PE: an ensemble of probabilistic networks. P: one of them. DE: an ensemble that predicts no variance. D: one."""
    members: int = 5
    """B: networks in the ensemble (P and D have one)."""
    propagation: Literal["TSinf", "TS1", "DS", "MM", "E"] = "TSinf"
    """How a particle meets the ensemble. TSinf: one member for all its life. TS1: a random one each step. DS: a
    Gaussian with the moments of all members. MM: that, and a Gaussian is fitted to the particles each step. E: the mean
    of all members, without noise."""
    particles: int = 5
    """P: particles for each candidate; for TS a multiple of the members."""
    optimizer: Literal["cem", "random"] = "cem"
    """cem: shape the candidates in `iterations` rounds. random: draw as many uniformly, at once, and take the best."""
    candidates: int = 100
    """Action sequences in each round of CEM."""
    elites: int = 10
    """So many of them shape the next round."""
    iterations: int = 4
    """Rounds of CEM for each real step."""
    alpha: float = 0.1
    """How much of a round's mean and variance stays in the next."""
    epsilon: float = 0.001
    """CEM stops early once all its variances, in the actions' own units squared, are below this: for a box much smaller
    than ±1 lower it."""
    horizon: int = 20
    """T: the length of a sequence."""
    dynamics: Literal["learned", "true"] = "learned"
    """true: plan in the task's own equations of motion, where this file has them. Nothing is learned then."""
    learn_reward: bool = False
    """Learn reward and termination with the model, also where TASKS knows them."""
    random_steps: int = 200
    """So many steps of uniformly random actions come first: the length of a trial."""
    refit_every: int = 200
    """Train the ensemble again every this many real steps: the length of a trial."""
    epochs: int = 60
    """Passes over the data in each training."""
    batch_size: int = 32
    """Rows in a minibatch, for each member its own."""
    learning_rate: float = 1e-3
    """Adam's step size."""
    layers: int = 2
    """Hidden layers of each member."""
    hidden: int = 128
    """Units in each."""
    weight_decay: tuple[float, ...] = (1e-4, 2.5e-4, 5e-4)
    """L2 on each layer's weights, ½ λ ‖w‖², from the first to the last; one number stands for all."""
    bf16: bool = False
    """Plan with weights and activations in bfloat16; states, noise and rewards stay in float32."""
    seed: int = 1
    """Fixes Python, NumPy, torch and the environment: the same seed on one CPU gives the same run."""
    device: str = "auto"
    """auto, cpu or cuda[:index]."""
    compile: bool = False
    """torch.compile for one imagined step, the planner's hot path: speed may change, results only by rounding."""
    log_every: int = 100
    """Write planned returns, losses and timings every this many steps (returns are written at each episode's end)."""
    eval_every: int = 0
    """Let the planner play in an environment of its own every this many steps; 0: only at the end. Training explores
    with the same planner and no noise of its own, so that its returns tell the same."""
    eval_episodes: int = 3
    """Episodes for each of those evaluations."""
    eval_max_steps: int = 1_000
    """Cut an evaluation episode here."""
    picture_every: int = 200
    """Draw plans beside what happened at the end of an episode when this many steps have passed, 20 times at most and
    at the end; 0: no picture."""
    capture_video: bool = False
    """Record the first episode of each evaluation as a GIF in the run folder."""
    run_dir: Optional[str] = None
    """Where to write; by default runs/<env>__<algorithm>__<seed>__<time>."""
    checkpoint_every: int = 1_000
    """Save a checkpoint every this many steps, at the end of the episode (or once it is as late again); 0: only at
    the end of the run, and when it is stopped."""
    resume: Optional[str] = None
    """Go on with the run in this folder, with its settings. --total-timesteps may be raised: the episode that the
    first end cut is then left, and a new one begun."""
    evaluate: Optional[str] = None
    """Do not train: let the planner play with the model saved in this run folder."""
    episodes: int = 10
    """Episodes to play with --evaluate."""
    progress: bool = True
    """Show a progress bar (never when the output is no terminal)."""


PRESETS = {
    "cartpole": (
        "the paper's swing-up of a cart's pole, with a planner that a laptop can afford: solved in a handful of trials",
        Args(),
    ),
    "cartpole-paper": (
        "the same at the paper's sizes: 400 candidates of 20 particles, 5 networks of 3×500",
        Args(
            particles=20, candidates=400, elites=40, iterations=5, horizon=25, epochs=5, layers=3, hidden=500,
            weight_decay=(1e-4, 2.5e-4, 2.5e-4, 5e-4),
        ),
    ),
    "pendulum": (
        "Pendulum-v1: swing up and hold within 2,000 steps",
        Args(env_id="Pendulum-v1", total_timesteps=2_000),
    ),
    "reacher": (
        "Reacher-v5: a two-link arm to a random target, at the paper's sizes for its arm",
        Args(
            env_id="Reacher-v5", total_timesteps=15_000, particles=20, candidates=400, elites=40, iterations=5,
            horizon=25, epochs=5, layers=4, hidden=200, weight_decay=(2.5e-4, 5e-4, 5e-4, 5e-4, 7.5e-4),
            learning_rate=7.5e-4, random_steps=150, refit_every=150, eval_episodes=10, picture_every=750,
        ),
    ),
    "pusher": (
        "Pusher-v5: a seven-joint arm pushes a thing to its place, at the paper's sizes",
        Args(
            env_id="Pusher-v5", total_timesteps=15_000, particles=20, candidates=500, elites=50, iterations=5,
            horizon=25, epochs=5, layers=3, hidden=200, weight_decay=(2.5e-4, 5e-4, 5e-4, 7.5e-4), random_steps=150,
            refit_every=150, picture_every=750,
        ),
    ),
    "halfcheetah": (
        "HalfCheetah-v5 at the paper's sizes: 500 candidates of 20 particles, T = 30, 300 trials",
        Args(
            env_id="HalfCheetah-v5", total_timesteps=300_000, particles=20, candidates=500, elites=50, iterations=5,
            horizon=30, epochs=5, layers=4, hidden=200, weight_decay=(2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4),
            random_steps=1_000, refit_every=1_000, log_every=1_000, eval_episodes=1, picture_every=5_000,
        ),
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


def fit_ensemble(
    model: Ensemble, optimizer: torch.optim.Optimizer, replay: "ReplayBuffer", args: Args, log: "RunLog",
    cut: Callable[[], bool],
) -> bool:  # fmt: skip
    """Step (5). False where it was cut short."""
    data = replay.rows(np.arange(replay.size))
    model.set_normalizer(data)
    x, y, ended = model.inputs(data.obs, data.action), model.targets(data), data.terminated.float()
    rows = bootstraps(model.members, replay.size)  # kept for all epochs: drawn anew, all members would see all rows
    for _ in range(args.epochs):
        if cut():
            return False
        rows = np.take_along_axis(rows, np.random.rand(*rows.shape).argsort(1), 1)
        for first in range(0, replay.size, args.batch_size):
            index = torch.from_numpy(rows[:, first : first + args.batch_size]).to(x.device)
            loss = ensemble_loss(model, x[index], y[index], ended[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            log.mean("losses/model", loss / model.members)
    return True


def trajectory_sampling(model: Ensemble, s: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [P·K, ·] through one member each: the first P/B particles of all candidates through the first, and so on."""
    mean, std, logit = model.gaussian(*(x.unflatten(0, (model.members, -1)) for x in (s, a)))
    # Section 5: s_{t+1}^p ~ f̃_{θ_b(p,t)}(s_t^p, a_t)
    return (mean + std * torch.randn_like(mean)).flatten(0, 1), logit.flatten()


def all_members(model: Ensemble, s: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean and deviation of the mixture of all members, in each row."""
    mean, std, logit = model.gaussian(*(x.expand(model.members, -1, -1) for x in (s, a)))
    # Section 4: E = 1/B Σ_b μ_b,  Var = 1/B Σ_b σ_b² + 1/B Σ_b (μ_b − E)²
    return mean.mean(0), (std.square().mean(0) + mean.var(0, correction=0)).sqrt(), logit.mean(0)


def propagator(args: Args, model: Optional[Ensemble], particles: int) -> Predict:
    """What the planner takes for the world: next state, reward and end of rows [P·K, ·], the first particles of all
    candidates, then the second ones, and so on."""
    task = TASKS.get(args.env_id)

    def predict(s: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if model is None:
            s2 = task.dynamics(s, a)
            return s2, task.reward(s, a, s2), task.ended(s2)
        with torch.autocast(s.device.type, torch.bfloat16, enabled=args.bf16):
            if args.propagation == "TSinf":
                y, logit = trajectory_sampling(model, s, a)
            elif args.propagation == "TS1":  # the particles of each candidate change places, and back again
                row = torch.arange(len(s), device=s.device).view(particles, -1)
                row = row.gather(0, torch.rand(row.shape, device=s.device).argsort(0)).flatten()
                y, logit = (x[row.argsort()] for x in trajectory_sampling(model, s[row], a))  # they share the action
            else:
                y, std, logit = all_members(model, s, a)
                y = y if args.propagation == "E" else y + std * torch.randn_like(y)
        s2 = s + y[..., : s.shape[-1]]
        if args.propagation == "MM":  # forget which particle was where: only mean and deviation go on
            clouds = s2.view(particles, -1, s.shape[-1])
            s2 = (clouds.mean(0) + clouds.std(0, correction=0) * torch.randn_like(clouds)).view_as(s)
        if model.rewards:
            return s2, y[..., -1], logit > 0
        return s2, task.reward(s, a, s2), task.ended(s2)

    return predict


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


WORST = -1e30  # instead of −∞, whose differences are no numbers


def trusted(returns: torch.Tensor) -> torch.Tensor:
    """A model far from its data may overflow: what is no finite number is the worst of all."""
    return torch.where(returns.isfinite(), returns, WORST)


def uniform_sequences(low: torch.Tensor, high: torch.Tensor, candidates: int, horizon: int) -> torch.Tensor:
    return low + (high - low) * torch.rand(candidates, horizon, len(low), device=low.device)  # [K, H, A]


def truncated_normal(*shape: int, device: torch.device) -> torch.Tensor:
    """The standard normal without what lies beyond two deviations."""
    # z = Φ⁻¹(u) for u uniform between Φ(−2) and Φ(2), and Φ(z) = ½ + ½ erf(z / √2)
    u = 2 * torch.rand(shape, device=device) - 1
    return math.sqrt(2) * torch.erfinv(math.erf(math.sqrt(2)) * u)


def cem(
    judge: Callable[[torch.Tensor], torch.Tensor], mean: torch.Tensor, low: torch.Tensor, high: torch.Tensor, args: Args
) -> tuple[torch.Tensor, torch.Tensor]:
    """From the mean [T, A] of the first candidates to that of the last elites, and the best return seen on the way's
    last round. `judge` gives the returns [K] of action sequences [K, T, A]."""
    var = ((high - low) / 4).square().expand_as(mean)  # in each real step wide again: a plan may have to change
    for i in range(args.iterations):
        if i and var.max() < args.epsilon:
            break
        # No sample leaves the box: its edge is at least two deviations away, and the normal is cut there.
        room = torch.minimum(mean - low, high - mean) / 2
        std = torch.minimum(room, var.sqrt())
        noise = truncated_normal(args.candidates, *mean.shape, device=mean.device)
        actions = torch.clamp(mean + std * noise, low, high)  # for rounding
        returns = judge(actions)
        best = actions[returns.topk(args.elites).indices]
        # The code's update: μ ← α μ + (1 − α) mean(elites), and the variance alike
        mean = args.alpha * mean + (1 - args.alpha) * best.mean(0)
        var = args.alpha * var + (1 - args.alpha) * best.var(0, correction=0)
    return mean, returns.max()


class Planner:
    """Step (2), anew in every state. It remembers its plan: one is made for each episode."""

    def __init__(
        self, predict: Predict, particles: int, action_space: gym.spaces.Box, args: Args, device: torch.device
    ):
        self.predict, self.particles, self.args, self.device = predict, particles, args, device
        self.low, self.high = (torch.as_tensor(x, dtype=torch.float32, device=device)
                               for x in (action_space.low, action_space.high))  # fmt: skip
        self.mean = ((self.low + self.high) / 2).repeat(args.horizon, 1)  # [T, A]

    def plan(self, obs: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """The plan [T, A], and the best return that was imagined."""
        args, s = self.args, torch.as_tensor(obs, dtype=torch.float32, device=self.device)

        def judge(actions: torch.Tensor) -> torch.Tensor:
            """The mean return of each candidate's particles."""
            rows = actions.repeat(self.particles, 1, 1)  # [P·K, T, A]
            returns = imagine(self.predict, s.expand(len(rows), -1), rows)[1]
            # 1/P Σ_p Σ_τ r(s_τ^p, a_τ)
            return trusted(returns).view(self.particles, -1).mean(0)

        if args.optimizer == "random":
            actions = uniform_sequences(self.low, self.high, args.candidates * args.iterations, args.horizon)
            returns = judge(actions)
            return actions[returns.argmax()].clone(), returns.max()  # a view would keep all of them alive
        # The mean, not the best sample: that one is the best by luck, or by an error of the model.
        plan, best = cem(judge, self.mean, self.low, self.high, args)
        last = torch.zeros_like(plan[:1]).clamp(self.low, self.high)
        self.mean = torch.cat([plan[1:], last])  # the next step's plan starts where this one goes on
        return plan, best

    def imagine_particles(self, obs: np.ndarray, plan: torch.Tensor) -> torch.Tensor:
        """Where a plan [T, A] may lead: states [P, T + 1, D]."""
        s = torch.as_tensor(obs, dtype=torch.float32, device=self.device).expand(self.particles, -1)
        states, _ = imagine(self.predict, s, plan.expand(self.particles, -1, -1))
        return torch.cat([s[:, None], states], 1)

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        return self.plan(obs)[0][0].cpu().numpy()


# ── What the model believes: measured, and drawn ──────────────────────────────────────────────────────────────────


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


def draw_particles(
    states: np.ndarray, begin: int, plans: dict[int, np.ndarray], errors: Optional[np.ndarray], unread: int, title: str
) -> np.ndarray:
    """The picture: left, what happened in an episode [L, D] from step `begin` on, over the particles of the plans made
    at some of its steps [P, T + 1, D]; right, errors and spread [2, T] of the particles that never look."""
    shown = range(unread, min(states.shape[1], unread + 4))
    figure = Figure(figsize=(9, 4.2), dpi=80)
    figure.suptitle(title, fontsize=11)
    for row, i in enumerate(shown):
        height = 0.76 / len(shown)
        axes = figure.add_axes((0.08, 0.88 - (row + 1) * height, 0.52, height * 0.9))
        for t, planned in plans.items():
            axes.plot(np.arange(t, t + planned.shape[1]), planned[:, :, i].T, color="tab:orange", linewidth=0.6)
        axes.plot(np.arange(begin, begin + len(states)), states[:, i], color="black", linewidth=1.2)
        low, high = states[:, i].min(), states[:, i].max()
        margin = 0.3 * (high - low) + 1e-3  # a plan that leaves the picture is still a plan
        axes.set(ylabel=f"s[{i}]", ylim=(low - margin, high + margin), xlim=(begin, begin + len(states)))
        axes.tick_params(labelsize=7, labelbottom=row == len(shown) - 1)
    axes.set(xlabel="step of the episode")
    lines = [axes.lines[-1], *axes.lines[:-1][:1]]
    figure.legend(lines, ["happened", "imagined by the particles"][: len(lines)], fontsize=8, loc="upper left")
    axes = figure.add_axes((0.73, 0.12, 0.25, 0.76))
    axes.set(xlabel="steps without looking, h", ylabel="½ ‖s − ŝ‖², in deviations")
    if errors is not None:
        for values, label, color in zip(errors, ("error", "expected"), ("tab:blue", "tab:orange"), strict=True):
            axes.semilogy(np.arange(1, len(values) + 1), np.clip(values, 1e-12, 1e12), label=label, color=color)
        axes.legend(fontsize=8)
    return figure_to_array(figure)


# ── Training ──────────────────────────────────────────────────────────────────────────────────────────────────────


def check_settings(args: Args) -> None:
    """Every wrong setting that can be seen before training starts, as one sentence."""
    check_run_settings(args)
    for least, names in (
        (1, ("members", "particles", "candidates", "elites", "iterations", "horizon", "random_steps", "refit_every")),
        (1, ("epochs", "batch_size", "layers", "hidden")),
        (0, ("epsilon",)),
    ):
        for name in names:
            if getattr(args, name) < least:
                stop(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least {least}")
    if not 0 <= args.alpha < 1 or args.learning_rate <= 0:
        stop("--alpha must lie in [0, 1), --learning-rate be above 0")
    if args.elites > args.candidates:
        stop(f"--elites is {args.elites}: of {args.candidates} --candidates there can't be more")
    if len(args.weight_decay) not in (1, args.layers + 1) or not all(0 <= x < math.inf for x in args.weight_decay):
        stop(f"--weight-decay wants one number for all layers or {args.layers + 1} of them, none below 0")
    if args.propagation in ("TS1", "TSinf") and particle_count(args) % member_count(args):
        stop(f"--particles is {args.particles}: with {args.propagation} each of {args.members} members has as many")
    if args.dynamics == "true":
        known = [name for name, task in TASKS.items() if task.dynamics]
        if args.env_id not in known:
            stop(f"--dynamics true: this file has the equations of {', '.join(known)}, not those of {args.env_id}")
        if args.learn_reward:
            stop("--dynamics true learns nothing: leave out --learn-reward")


def member_count(args: Args) -> int:
    return args.members if args.model in ("PE", "DE") and args.dynamics == "learned" else 1


def particle_count(args: Args) -> int:
    """Without noise and with one mean for all, all particles would be the same."""
    noiseless = args.model in ("DE", "D") and member_count(args) == 1
    return 1 if args.propagation == "E" or args.dynamics == "true" or noiseless else args.particles


def make_ensemble(args: Args, env: gym.Env) -> Optional[Ensemble]:
    if args.dynamics == "true":
        return None
    unread = TASKS[args.env_id].unread if args.env_id in TASKS else 0
    heads = args.learn_reward or args.env_id not in TASKS
    (state_size,), (action_size,) = env.observation_space.shape, env.action_space.shape
    seconds = float(env.unwrapped.dt) if unread else 1.0
    return Ensemble(member_count(args), state_size, action_size, args.layers, args.hidden, unread, seconds,
                    args.model in ("PE", "P"), heads, heads)  # fmt: skip


def planners(args: Args, env: gym.Env, predict: Predict, device: torch.device) -> Callable[[], Planner]:
    """Only the planner's own calls are compiled: nearly all of them have one shape."""
    if args.compile:
        predict = torch.compile(predict, options={"fallback_random": True})  # the same dice as without
    return functools.partial(Planner, predict, particle_count(args), env.action_space, args, device)


def load_policy(args: Args, env: gym.Env, checkpoint: dict) -> Callable[[], Callable[[Any], Any]]:
    """For --evaluate: what makes the planner of a checkpoint, anew for each episode."""
    device, model = pick_device(args.device), make_ensemble(args, env)
    if model:
        model.load_state_dict(checkpoint["learned"])
        model.to(device)
    return planners(args, env, propagator(args, model, particle_count(args)), device)


def train(args: Args) -> Path:
    device = pick_device(args.device)
    print(f"device: {device}")
    seed_everything(args.seed)
    env, eval_env = make_task(args), make_task(args, render=args.capture_video)
    env.action_space.seed(args.seed)
    run_dir, checkpoint = open_run(args)

    model, particles = make_ensemble(args, env), particle_count(args)
    if model:
        optimizer = make_optimizer(model.to(device), args.weight_decay, args.learning_rate)
    # Room for all of D, and one row more: a full buffer would begin to forget when the run is lengthened.
    replay = ReplayBuffer(args.total_timesteps + 1, env.observation_space, env.action_space, device)
    step, fitted_at = 0, 0
    if checkpoint:
        step, fitted_at = checkpoint["step"], checkpoint["fitted_at"]
        if model:
            model.load_state_dict(checkpoint["learned"])
            optimizer.load_state_dict(checkpoint["optimisers"]["model"])
        replay.load_state_dict(checkpoint["replay"])
        set_env_state(env, checkpoint["env"])
        set_random_states(checkpoint["random"])
    predict = propagator(args, model, particles)
    new_policy = planners(args, env, predict, device)
    if model and args.total_timesteps < args.random_steps:
        print(f"nothing will be learned: the first {args.random_steps:,} steps are random (--random-steps)")
    log = RunLog(args, run_dir, checkpoint)

    # These three look at the variables of the loop as they are when they are called.
    def save() -> None:
        save_checkpoint(
            run_dir, step=step, fitted_at=fitted_at, learned=model.state_dict() if model else {},
            optimisers={"model": optimizer.state_dict()} if model else {}, replay=replay.state_dict(),
            env=env_state(env), log=log.state_dict(),
        )  # fmt: skip
        log.lap("log")

    def test() -> None:
        set_env_state(eval_env, env_state(env), generators=False)
        log.evaluation(step, new_policy, eval_env)

    def draw() -> None:
        before = random_states()
        begin = min(planned, default=0)  # planning may have begun inside this episode
        happened = replay.rows(np.arange(step - episode_length + begin, step)[:200]).obs.cpu().numpy()
        recent = fitted_at or max(step - 1_000, 0)  # the rows since the last fit
        sequences = windows(replay, recent, 50) or windows(replay, recent, 10)
        errors = None
        if sequences:
            errors = torch.stack(open_loop(predict, sequences, state_scale(replay), particles)).cpu().numpy()
        title = f"{args.env_id}, {args.model} {args.propagation}: step {step:,}, return {episode_return:.1f}"
        unread = model.unread if model else 0
        log.picture(step, draw_particles(happened, begin, planned, errors, unread, title))
        set_random_states(before)

    obs = np.array(env.reset(seed=None if checkpoint else args.seed)[0])  # copied: some environments reuse theirs
    policy, planned, episode_return, episode_length = new_policy(), {}, 0.0, 0
    with StopSignal() as stop_signal:
        while step < args.total_timesteps:
            # (1) for one trial act at random
            if model and fitted_at == 0:
                a = env.action_space.sample()
            else:
                # (2) the action sequence that CEM finds, judged by particles
                plan, best = policy.plan(obs)
                if args.picture_every and len(planned) * args.horizon < 200 and episode_length % args.horizon == 0:
                    before = random_states()
                    planned[episode_length] = policy.imagine_particles(obs, plan).cpu().numpy()
                    set_random_states(before)
                # (3) execute its first action
                a = plan[0].cpu().numpy()
                log.mean("model/planned_return", best)
            log.lap("plan")

            # (4) add (s_t, a_t, s_{t+1}) to D
            next_obs, r, terminated, truncated, _ = env.step(a.copy())
            step, r, over = step + 1, float(r), bool(terminated or truncated)
            if not math.isfinite(r) or not np.isfinite(next_obs).all():
                stop(f"{args.env_id} gave the reward {r} and {next_obs} at step {step:,}: nothing to learn from")
            replay.add(obs, a, r, next_obs, terminated, truncated)
            obs, episode_return, episode_length = np.array(next_obs), episode_return + r, episode_length + 1
            log.lap("env")

            log.bar.update()
            if over:
                log.episode(step, episode_return, episode_length)
            last = step == args.total_timesteps and args.picture_every
            if (over and log.due("picture", args.picture_every, step, at_most=20)) or last:
                draw()  # before the model has learned from what is drawn
            # (5) after each trial train f̃_θ
            if model and step >= args.random_steps and (fitted_at == 0 or step - fitted_at >= args.refit_every):
                if fitted_at:
                    log.scalars(step, ensemble_metrics(predict, model, replay, fitted_at, particles))
                if fit_ensemble(model, optimizer, replay, args, log, cut=lambda: stop_signal.to_stop(False)):
                    log.lap("model")
                    if fitted_at == 0:
                        log.start_clock(step)
                    fitted_at = step
            if log.due("log", args.log_every, step):
                log.flush(step)
            if log.due("eval", args.eval_every, step) and step < args.total_timesteps:
                test()
            if log.due("checkpoint", args.checkpoint_every, step, wait_for=over):
                save()
            if stop_signal.to_stop(over):
                break
            if over and step < args.total_timesteps:
                obs = np.array(env.reset()[0])
                policy, planned, episode_return, episode_length = new_policy(), {}, 0.0, 0
                log.lap("env")
        save()
    if stop_signal.number and step < args.total_timesteps:
        log.stopped(step, stop_signal.number)
    test()
    log.finish(step)
    return run_dir


# ── The tasks: what the planner knows of them ─────────────────────────────────────────────────────────────────────


def never(s: torch.Tensor) -> torch.Tensor:
    return torch.zeros(s.shape[:-1], dtype=torch.bool, device=s.device)


class Task(NamedTuple):
    """Rewards, ends and motion as functions of batches: s, s2 [..., D], a [..., A]."""

    reward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    ended: Callable[[torch.Tensor], torch.Tensor] = never
    dynamics: Optional[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = None
    unread: int = 0  # the first coordinates say where the body stands
    settings: dict = {}  # for gym.make


def pendulum_reward(s: torch.Tensor, a: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
    """s = (cos θ, sin θ, θ'), θ = 0 upright; of the state before the step, as Gymnasium has it."""
    angle = torch.atan2(s[..., 1], s[..., 0])
    return -(angle.square() + 0.1 * s[..., 2].square() + 0.001 * a[..., 0].square())


def pendulum_dynamics(s: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """θ'' = 3g/2l sin θ + 3/ml² u, with g = 10, m = l = 1; semi-implicit Euler of 0.05 s."""
    speed = torch.clamp(s[..., 2] + (15 * s[..., 1] + 3 * a[..., 0]) * 0.05, -8, 8)
    angle = torch.atan2(s[..., 1], s[..., 0]) + speed * 0.05
    return torch.stack([torch.cos(angle), torch.sin(angle), speed], -1)


CART, POLE, LENGTH, INERTIA = 10.472, 5.019, 0.6, 0.1887  # kg, kg, m, kg m² about the pole's middle: PETS' bodies
FRICTION, GRAVITY, FORCE = 1.0, 9.81, 100.0  # N s/m on the rail and N m s in the hinge, m/s², N for each unit of action
RAIL = 2.5  # m to either side


def cart_pole_derivative(s: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Of s = (x, x', θ, θ') under the force u, for a pole that hangs at θ = 0."""
    _, v, angle, w = s.unbind(-1)
    sin, cos, lever = torch.sin(angle), torch.cos(angle), POLE * LENGTH / 2
    # Two laws, for the push on the whole and the turn about the hinge:  [M+m, m l cos; m l cos, I + m l²] [x''; θ''] =
    push = u - FRICTION * v + lever * w**2 * sin
    turn = -lever * GRAVITY * sin - FRICTION * w
    mass, moment = CART + POLE, INERTIA + lever * LENGTH / 2
    bottom = mass * moment - (lever * cos) ** 2
    dv = (moment * push - lever * cos * turn) / bottom
    dw = (mass * turn - lever * cos * push) / bottom
    return torch.stack([v, dv, w, dw], -1)


def cart_pole_dynamics(s: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """s = (x, x', cos θ, sin θ, θ'), a in [−3, 3]: 0.04 s, one step of Runge and Kutta's fourth order."""
    y = torch.stack([s[..., 0], s[..., 1], torch.atan2(s[..., 3], s[..., 2]), s[..., 4]], -1)
    u, h = FORCE * a[..., 0], 0.04
    k1 = cart_pole_derivative(y, u)
    k2 = cart_pole_derivative(y + h / 2 * k1, u)
    k3 = cart_pole_derivative(y + h / 2 * k2, u)
    k4 = cart_pole_derivative(y + h * k3, u)
    x, v, angle, w = (y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)).unbind(-1)
    cos, sin, lever = torch.cos(angle), torch.sin(angle), POLE * LENGTH / 2
    stopped = x.abs() > RAIL  # the cart does not bounce; the pole takes the blow
    w = torch.where(stopped, w + v * lever * cos / (INERTIA + lever * LENGTH / 2), w)
    return torch.stack([x.clamp(-RAIL, RAIL), torch.where(stopped, 0.0, v), cos, sin, w], -1)


def cart_pole_reward(s: torch.Tensor, a: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
    """How near the pole's tip is to the point above the rail's middle, as in PETS: exp(−d² / 0.6²) − 0.01 a²."""
    x, cos, sin = s2[..., 0], s2[..., 2], s2[..., 3]
    squared = (x + LENGTH * sin) ** 2 + (LENGTH + LENGTH * cos) ** 2
    return torch.exp(-squared / 0.36) - 0.01 * a[..., 0] ** 2


def forward(cost: float, seconds: float, healthy: Callable[[torch.Tensor], torch.Tensor] = never) -> Callable:
    """The stock reward of the bodies that run: mean speed in x, less the effort, and 1 while the body is healthy."""

    def reward(s: torch.Tensor, a: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
        return (s2[..., 0] - s[..., 0]) / seconds - cost * a.square().sum(-1) + healthy(s2).float()

    return reward


def hopper_healthy(s: torch.Tensor) -> torch.Tensor:  # s = (x, height, angle, ...)
    return (s[..., 1] > 0.7) & (s[..., 2].abs() < 0.2) & (s[..., 2:].abs() < 100).all(-1)


def walker_healthy(s: torch.Tensor) -> torch.Tensor:
    return (s[..., 1] > 0.8) & (s[..., 1] < 2.0) & (s[..., 2].abs() < 1.0)


def fallen(s: torch.Tensor) -> torch.Tensor:  # InvertedPendulum-v5: s = (x, angle, x', angle')
    return (s[..., 1].abs() > 0.2) | ~s.isfinite().all(-1)


def reacher_reward(s: torch.Tensor, a: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
    return -torch.linalg.vector_norm(s2[..., 8:10], dim=-1) - a.square().sum(-1)


def pusher_reward(s: torch.Tensor, a: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
    tip, thing, goal = s2[..., 14:17], s2[..., 17:20], s2[..., 20:23]
    near, far = (torch.linalg.vector_norm(thing - x, dim=-1) for x in (tip, goal))
    return -0.5 * near - far - 0.1 * a.square().sum(-1)


WITH_X = {"exclude_current_positions_from_observation": False}  # the reward is a function of s and s' only with x
TASKS = {
    "Pendulum-v1": Task(pendulum_reward, dynamics=pendulum_dynamics),
    "CartPoleSwingUp-v0": Task(cart_pole_reward, dynamics=cart_pole_dynamics),
    "InvertedPendulum-v5": Task(lambda s, a, s2: (~fallen(s2)).float(), fallen),
    "Reacher-v5": Task(reacher_reward),
    "Pusher-v5": Task(pusher_reward),
    "HalfCheetah-v5": Task(forward(0.1, 0.05), unread=1, settings=WITH_X),
    "Swimmer-v5": Task(forward(1e-4, 0.04), unread=2, settings=WITH_X),
    "Hopper-v5": Task(forward(1e-3, 0.008, hopper_healthy), lambda s: ~hopper_healthy(s), unread=1, settings=WITH_X),
    "Walker2d-v5": Task(forward(1e-3, 0.008, walker_healthy), lambda s: ~walker_healthy(s), unread=1, settings=WITH_X),
}


class CartPoleSwingUp(gym.Env):
    """A cart on a rail, and a pole that hangs from it: swing it up and hold it there, by forces on the cart alone.
    The task of PETS, with its bodies and its reward."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 25}

    def __init__(self, render_mode: Optional[str] = None):
        self.render_mode = render_mode
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (5,), np.float64)
        self.action_space = gym.spaces.Box(-3, 3, (1,), np.float32)

    def reset(self, *, seed: Optional[int] = None, options: Optional[dict] = None):
        super().reset(seed=seed)
        x, v, angle, w = self.np_random.normal(0, 0.1, 4)
        self.state = np.array([x, v, np.cos(angle), np.sin(angle), w])
        return self.state, {}

    def step(self, action: np.ndarray):
        s, a = torch.from_numpy(self.state), torch.as_tensor(action, dtype=torch.float64).clamp(-3, 3)
        s2 = cart_pole_dynamics(s, a)
        self.state = s2.numpy()
        return self.state, float(cart_pole_reward(s, a, s2)), False, False, {}

    def render(self) -> np.ndarray:
        picture = Image.new("RGB", (400, 240), "white")
        pen, (x, _, cos, sin, _) = ImageDraw.Draw(picture), self.state
        column, row = 200 + 70 * x, 120
        pen.line((200 - 70 * RAIL, row, 200 + 70 * RAIL, row), fill=(180, 180, 180), width=2)
        pen.rectangle((column - 20, row - 10, column + 20, row + 10), fill=(70, 70, 70))
        pen.line((column, row, column + 120 * LENGTH * sin, row + 120 * LENGTH * cos), fill=(220, 60, 60), width=6)
        return np.asarray(picture)


if "CartPoleSwingUp-v0" not in gym.registry:
    gym.register("CartPoleSwingUp-v0", entry_point=CartPoleSwingUp, max_episode_steps=200)


def make_task(args: Args, render: bool = False) -> gym.Env:
    """The environment, checked to be one that this planner fits."""
    env = make_env(args.env_id, render, **(TASKS[args.env_id].settings if args.env_id in TASKS else {}))
    observations, actions = env.observation_space, env.action_space
    if isinstance(actions, gym.spaces.Discrete):
        stop(f"the actions of {args.env_id} are {actions} and this planner wants real numbers: dyna_q.py takes "
             "Discrete actions, of tasks whose observations are Discrete too")  # fmt: skip
    for name, space in (("actions", actions), ("observations", observations)):
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            stop(f"the planner needs {name} that are one vector of numbers, and those of {args.env_id} are {space}")
    if not np.issubdtype(actions.dtype, np.floating):
        stop(f"the actions of {args.env_id} are whole numbers ({actions}) and this planner wants real ones")
    if not (np.isfinite(actions.low).all() and np.isfinite(actions.high).all()):
        stop(f"the action box of {args.env_id} has no bounds ({actions}): there is nothing to draw uniformly from")
    if observations.dtype not in (np.float32, np.float64):  # whole numbers have no differences to learn
        env = gym.wrappers.DtypeObservation(env, np.float32)
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
