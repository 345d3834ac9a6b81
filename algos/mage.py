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
"""MAGE: train the critic for the one thing that the actor asks it for, its gradient in the action.

A deterministic actor is improved along ∇_a Q, yet critics are commonly fitted to values alone, and their slope is what
comes of that. With a model of the world that can be differentiated the slope has a target too: that of the right side
of Bellman's equation, through the reward, the dynamics, the next action and the next value. MAGE fits the critics to
both. All else is TD3 as its code has it, on transitions of one imagined step from real states.

Paper: P. D'Oro, W. Jaśkowski, "How to Learn a Useful Critic? Model-based Action-Gradient-Estimator Policy
Optimization", NeurIPS 2020, arXiv 2004.14309. Official code: github.com/nnaisense/MAGE. The learner below it (TD3):
S. Fujimoto et al., "Addressing Function Approximation Error in Actor-Critic Methods", 2018, arXiv 1802.09477.

The algorithm (Algorithm 1 of the paper):
    (1) act by the policy π_θ with some noise (at first at random); add the transition to B
    (2) every 25 steps train p_ω on B by maximum likelihood
    (3) for states s from B imagine ŝ ~ p_ω(·|s, a), a = π_θ(s); the target r + γ Q̄(ŝ, π̄(ŝ)) and its gradient in a
    (4) train the critics: value to value, gradient in a to gradient in a
    (5) train π_θ to climb the critics; let the targets follow

Symbols (paper → this file):
    s, a, r, ŝ → s, a, r, s2        p_ω → GaussianEnsemble, by `sampler`        B → replay
    π_θ → Actor, policy             Q_φ → SmoothCritics, critics                Q̄, π̄ → target_critics, target_policy
    δ̂ → y − Q(s, a)                 ∇_a δ̂ → slope − ∇_a Q(s, a)                 1/λ → gradient_weight

Run (measured on 2 CPU cores; docs/mage.md has the curves):
    python algos/mage.py                                    # return −128 after 3,000 steps, 5 seeds; 5.4 minutes
    python algos/mage.py --gradient-weight 0                # Dyna-TD3: the same without the gradients; −1120
    python algos/mage.py --gradient-weight 0 --no-imagine   # TD3: real transitions, and no model; −150
    python algos/mage.py halfcheetah
    python algos/mage.py --env-id MountainCarContinuous-v0  # an unknown task: reward and end are learned too

Deviations from the paper and the official code:
  - The code differentiates twice through model, reward and target networks. The target does not depend on the critics
    that are trained: its gradient is taken once and is a number then. Loss and gradients are the same.
  - Each member of the ensemble computes its own share of a batch alone, equally many rows drawn at random; in the code
    all members compute all rows, and of each row one member is kept.
  - Means and deviations for model, policy and critics are taken anew whenever the model is trained; the code refreshes
    those of policy and critics in each step.
  - A state coordinate that never changed in the data stays as it is in imagination; in the code it becomes noisy.
  - The reward needs the distance that a body covers. The code puts the speed before the observation (the swimmer reads
    its position); here it holds the position, which no network reads, and the reward is a function of both states.
  - Rewards are the task's own, of the action that the task gets, and the tasks are Gymnasium's v5. The code's see the
    policy's action, in [−1, 1]: in Pendulum and Pusher effort costs a quarter there, in the returns too.
  - A learned reward sees s, a and the change ŝ − s (in the code it was meant to see ŝ and sees s twice), learns the
    environment's own reward in units of its deviation, and from all members' minibatches.
  - The code starts policy and critics anew, silently, where a loss runs away. Here --catastrophe-guard does so, also
    where it is no number, and logs each reset; it is off by default.
  - The preset `pendulum` has smaller networks and batches, larger steps and fewer random actions than the paper: it is
    for a laptop.
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
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, Optional

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

ALGORITHM = "mage"


@dataclass
class Args:
    env_id: str = "Pendulum-v1"
    """Any Gymnasium environment with vectors for observations and a bounded box of actions; `module:Env-v0` imports
    the module first. Where this file's table TASKS has no entry, the reward and the end of an episode are learned."""
    total_timesteps: int = 3_000
    """Real environment steps in all, those of random actions included."""
    random_steps: int = 400
    """So many steps of uniformly random actions come first."""
    imagine: bool = True
    """Train on imagined transitions. --no-imagine: on those of the replay, with no model; with --gradient-weight 0 that
    is TD3."""
    gradient_weight: float = 5.0
    """1/λ: weight of the action gradient's error in the critics' loss, beside 1 for the value's; 0: Dyna-TD3."""
    updates: int = 10
    """Updates of the critics after each real step."""
    batch_size: int = 64
    """States in one of them."""
    policy_every: int = 2
    """Every so many updates of the critics the policy is updated once, and its target follows."""
    gamma: float = 0.99
    """γ: discount."""
    tau: float = 0.005
    """How far the targets follow in each update."""
    learning_rate: float = 5e-4
    """RAdam's step size for policy and critics."""
    hidden: int = 64
    """Units in each of the two hidden layers of policy and critics."""
    exploration_noise: float = 0.1
    """Deviation of the noise on a real action, where actions go from −1 to 1."""
    target_noise: float = 0.2
    """Deviation of the noise on the next action in a target."""
    noise_clip: float = 0.5
    """And its largest value."""
    gradient_clip: float = 5.0
    """Largest entry of any gradient that RAdam is given."""
    catastrophe_guard: bool = False
    """Start policy and critics anew where the critics' loss passes 100 or the policy's 100,000, and say so."""
    members: int = 8
    """B: networks in the ensemble."""
    model_layers: int = 2
    """Hidden layers of each member."""
    model_hidden: int = 64
    """Units in each."""
    model_learning_rate: float = 1e-3
    """RAdam's step size for the model."""
    weight_decay: float = 1e-4
    """Decoupled decay of the model's weights and biases."""
    model_batch_size: int = 256
    """Rows in a minibatch of the model, for each member its own."""
    model_every: int = 25
    """Train the model every so many real steps."""
    model_batches: int = 40
    """So many minibatches at least: passes over all of B are finished."""
    learn_reward: bool = False
    """Learn the reward r(s, a, s') with the model, also where TASKS knows it."""
    reward_hidden: int = 256
    """Units in each of the three hidden layers of a learned reward."""
    seed: int = 1
    """Fixes Python, NumPy, torch and the environment: the same seed on one CPU gives the same run."""
    device: str = "auto"
    """auto, cpu or cuda[:index]."""
    compile: bool = False
    """torch.compile for the losses, the hot path: speed may change, results only by rounding."""
    log_every: int = 100
    """Write losses, values and timings every this many steps (returns are written at each episode's end)."""
    eval_every: int = 200
    """Let the deterministic policy play in an environment of its own every this many steps; 0: only at the end."""
    eval_episodes: int = 10
    """Episodes for each of those evaluations."""
    eval_max_steps: int = 1_000
    """Cut an evaluation episode here."""
    picture_every: int = 200
    """Compare the critics' action gradients with the simulator's, and draw them, at the first evaluation after this
    many steps, 20 times at most; 0: never."""
    true_states: int = 40
    """States in which they are compared."""
    true_horizon: int = 300
    """Steps after which a return is cut when the simulator's gradients are measured."""
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
    """Do not train: let the policy saved in this run folder play."""
    episodes: int = 10
    """Episodes to play with --evaluate."""
    progress: bool = True
    """Show a progress bar (never when the output is no terminal)."""


PAPER = Args(  # what the paper's tasks share
    total_timesteps=100_000, random_steps=1_000, batch_size=1_024, learning_rate=1e-4, hidden=384, model_layers=4,
    model_hidden=512, model_learning_rate=1e-4, model_batches=120, log_every=1_000, eval_every=1_000,
    picture_every=5_000, checkpoint_every=10_000,
)  # fmt: skip
PRESETS = {
    "pendulum": ("Pendulum-v1: swing up and hold within 3,000 steps", Args()),
    "cartpole": (
        "ContinuousCartPole-v0: balance with any force between CartPole's two, at the paper's settings",
        replace(PAPER, env_id="ContinuousCartPole-v0"),
    ),
    "halfcheetah": ("HalfCheetah-v5 at the paper's settings", replace(PAPER, env_id="HalfCheetah-v5")),
    "hopper": ("Hopper-v5 at the paper's settings", replace(PAPER, env_id="Hopper-v5")),
    "walker2d": ("Walker2d-v5 at the paper's settings", replace(PAPER, env_id="Walker2d-v5")),
    "swimmer": ("Swimmer-v5 at the paper's settings", replace(PAPER, env_id="Swimmer-v5")),
    "pusher": ("Pusher-v5 at the paper's settings", replace(PAPER, env_id="Pusher-v5")),
}


# ── The algorithm ─────────────────────────────────────────────────────────────────────────────────────────────────

Predict = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]  # s, a → s', r, ended


def mean_and_std(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each column; what is constant has the deviation 1."""
    std = x.std(0, correction=0)
    return x.mean(0), torch.where(std > 1e-6, std, 1.0)


class GaussianEnsemble(nn.Module):
    """p_ω(s'|s, a): B networks in one batched module. Each predicts the change of the state, mean and log-variance;
    with `ends` also the log-odds that the episode ends. With `rewards` one more network is r(s, a, s').

    Inputs, changes and rewards have mean 0 and deviation 1 in the data, so that each coordinate counts alike. The first
    `unread` coordinates of a state are predicted but not read: where the body stands does not matter to how it moves.
    """

    def __init__(
        self, members: int, state_size: int, action_size: int, layers: int, hidden: int, unread: int, ends: bool,
        rewards: int,
    ):  # fmt: skip
        super().__init__()
        self.members, self.unread, self.state_size, self.ends = members, unread, state_size, ends
        input_size = state_size - unread + action_size
        sizes = [input_size, *[hidden] * layers, 2 * state_size + ends]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for i, (m, n) in enumerate(itertools.pairwise(sizes)):
            start = nn.init.xavier_uniform_ if i < layers else nn.init.xavier_normal_
            self.weights.append(torch.stack([start(torch.empty(m, n)) for _ in range(members)]))
            self.biases.append(torch.zeros(members, 1, n))
        for name, size in (("input", input_size), ("change", state_size), *[("reward", 1)] * bool(rewards)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))
        self.register_buffer("moves", torch.zeros(state_size))  # 1 for each coordinate that has been seen to move
        self.reward = None
        if rewards:
            layers = [nn.Linear(m, n) for m, n in itertools.pairwise((input_size + state_size, *[rewards] * 3, 1))]
            for layer in layers:
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
            hidden_layers = [x for layer in layers[:-1] for x in (layer, nn.SiLU())]
            self.reward = nn.Sequential(*hidden_layers, layers[-1])

    def set_normalizer(self, data: "Transitions") -> None:
        change = data.next_obs - data.obs
        named = {"input": torch.cat([data.obs[:, self.unread :], data.action], -1), "change": change}
        if self.reward:
            named["reward"] = data.reward[:, None]
        for name, x in named.items():
            for kind, value in zip(("mean", "std"), mean_and_std(x), strict=True):
                self.get_buffer(f"{name}_{kind}").copy_(value)
        # The goal of a pusher is part of its state and never moves: no noise of a network may let it drift.
        self.moves.copy_(change.abs().amax(0) > 1e-6)

    def inputs(self, s: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return (torch.cat([s[..., self.unread :], a], -1) - self.input_mean) / self.input_std

    def changes(self, s: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
        return (s2 - s - self.change_mean) / self.change_std

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [B, N, ·], each member's own rows: mean and log-variance of the changes [B, N, D], log-odds [B, N]."""
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, F.silu(x) if i else x, weight)  # one product for all members
        # The code's fixed range: a member is never surer than e⁻⁵ of a coordinate's variance, nor less than e⁻¹
        logvar = -5 + 4 * torch.sigmoid(x[..., self.state_size : 2 * self.state_size])
        return x[..., : self.state_size], logvar, x[..., -1]

    def rewards(self, s: torch.Tensor, a: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
        """r(s, a, s'), learned: in units of its deviation."""
        return self.reward(torch.cat([self.inputs(s, a), self.changes(s, s2)], -1))[..., 0]


def world_loss(model: GaussianEnsemble, data: "Transitions") -> torch.Tensor:
    """Columns [B, N, ...], for each member its own rows: a scalar, the members' mean."""
    mean, logvar, logit = model(model.inputs(data.obs, data.action))
    # ℓ(ω) = E[(μ_ω(s, a) − Δ)² / σ_ω²(s, a) + log σ_ω²(s, a)], Δ = s' − s, normalised
    y = model.changes(data.obs, data.next_obs)
    loss = ((mean - y).square() * (-logvar).exp() + logvar).mean()
    if model.ends:
        loss = loss + F.binary_cross_entropy_with_logits(logit, data.terminated.float())
    if model.reward:
        r = (data.reward - model.reward_mean) / model.reward_std
        loss = loss + (model.rewards(data.obs, data.action, data.next_obs) - r).square().mean()
    return loss


def descend(optimizer: torch.optim.Optimizer, loss: torch.Tensor, clip: float) -> None:
    """No parameter gets a gradient here but the optimiser's own."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad()
    loss.backward(inputs=parameters)
    torch.nn.utils.clip_grad_value_(parameters, clip)
    optimizer.step()


def fit_passes(
    model: GaussianEnsemble, loss: Callable, optimizer: torch.optim.Optimizer, data: "Transitions", args: Args,
    log: "RunLog",
) -> None:  # fmt: skip
    """Step (2): whole passes over B, each member in an order of its own, until there were minibatches enough."""
    model.set_normalizer(data)
    count, size, done = len(data.obs), min(args.model_batch_size, len(data.obs)), 0
    while done < args.model_batches:
        order = torch.from_numpy(np.random.rand(model.members, count).argsort(1)).to(data.obs.device)
        for rows in order[:, : count - count % size].split(size, 1):  # a smaller rest is left out
            value = loss(model, Transitions(*(column[rows] for column in data)))
            descend(optimizer, value, args.gradient_clip)
            log.mean("losses/model", value)
            done += 1


def sampler(args: Args, model: GaussianEnsemble, middle: torch.Tensor, half: torch.Tensor) -> Predict:
    """The world as the ensemble has it, differentiable: each row goes through one member. Actions lie in [−1, 1], and
    are `middle` + `half` · a to the task's own reward."""
    task = TASKS.get(args.env_id)

    def predict(s: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        seats = model.members * -(-len(s) // model.members)  # as many with each member
        seat = torch.randperm(seats, device=s.device)[: len(s)]
        rows = torch.zeros(seats, dtype=torch.long, device=s.device)  # a seat that stays empty computes row 0 again
        rows = rows.index_copy_(0, seat, torch.arange(len(s), device=s.device)).view(model.members, -1)
        mean, logvar, logit = model(model.inputs(s[rows], a[rows]))
        # ŝ = s + Δ̂, and Δ̂ = μ + σ ε: a sample through which the gradient in a passes
        change = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        change = (change * model.change_std + model.change_mean) * model.moves
        s2 = s + change.flatten(0, 1)[seat]
        if model.reward:
            r = model.rewards(s, a, s2) * model.reward_std + model.reward_mean
        else:
            r = task.reward(s, middle + half * a, s2)
        if model.ends:
            return s2, r, torch.rand_like(r) < logit.flatten()[seat].sigmoid()
        return s2, r, task.ended(s2)

    return predict


class Actor(nn.Module):
    """π_θ(s): one action in (−1, 1)."""

    def __init__(self, state_size: int, action_size: int, hidden: int, unread: int):
        super().__init__()
        self.unread = unread
        layers = [nn.Linear(state_size - unread, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, action_size)]
        for layer in layers:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.net = nn.Sequential(layers[0], nn.SiLU(), layers[1], nn.SiLU(), layers[2])
        self.register_buffer("mean", torch.zeros(state_size - unread))
        self.register_buffer("std", torch.ones(state_size - unread))

    def forward(self, s: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.net((s[..., self.unread :] - self.mean) / self.std))

    act = forward


class SmoothCritics(nn.Module):
    """Q_φ(s, a), two of them in one batched module. No kinks: their gradients are to be trained."""

    def __init__(self, state_size: int, action_size: int, hidden: int, unread: int):
        super().__init__()
        self.unread = unread
        sizes = [state_size - unread + action_size, hidden, hidden, 1]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for m, n in itertools.pairwise(sizes):
            self.weights.append(torch.stack([nn.init.xavier_uniform_(torch.empty(m, n)) for _ in range(2)]))
            self.biases.append(torch.zeros(2, 1, n))
        self.register_buffer("mean", torch.zeros(state_size - unread))
        self.register_buffer("std", torch.ones(state_size - unread))

    def forward(self, s: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """s [N, D], a [N, A], or [2, N, A] for each its own: [2, N]."""
        s = ((s[..., self.unread :] - self.mean) / self.std).expand(2, -1, -1)
        x = torch.cat([s, a.expand(2, -1, -1)], -1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, F.silu(x) if i else x, weight)
        return x[..., 0]


def next_value(learner: "TD3", s2: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Q̄(s', π̄(s')): the smaller of two, at an action that is blurred a little."""
    a2 = (learner.target_policy(s2) + noise).clamp(-1, 1)
    return learner.target_critics(s2, a2).amin(0)


def imagined_target(
    learner: "TD3", predict: Predict, s: torch.Tensor, a: torch.Tensor, noise: torch.Tensor, gamma: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Step (3): y = r(s, a, ŝ) + γ Q̄(ŝ, π̄(ŝ)) [N], ŝ ~ p_ω(·|s, a), and its slope ∇_a y [N, A] along every path: the
    reward, the dynamics, the next action and the next value."""

    with torch.enable_grad():
        a = a.detach().requires_grad_()
        s2, r, ended = predict(s, a)
        y = r + gamma * (~ended) * next_value(learner, s2, noise)
        # One backward pass, to the actions alone: the critics that are trained do not stand in the target, so it and
        # its slope are numbers to them. The rows do not meet: the sum's gradient has each row's own.
        (slope,) = torch.autograd.grad(y.sum(), a)
    return y.detach(), slope


def critic_losses(
    critics: Callable, s: torch.Tensor, a: torch.Tensor, y: torch.Tensor, slope: Optional[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Step (4): the losses of values and of action gradients, and the values' mean."""

    def total(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q = critics(s, a)  # [2, N]
        return q.sum(), q

    def huber(x: torch.Tensor) -> torch.Tensor:  # mean over the rows, half the sum of both critics
        return F.smooth_l1_loss(x, torch.zeros_like(x))

    if slope is None:
        q = critics(s, a)
        return huber(y - q), torch.zeros_like(y[0]), q.mean()
    dq, q = torch.func.grad(total, has_aux=True)(a.expand(2, -1, -1))  # each critic's own gradient [2, N, A]
    # δ̂ = y − Q(s, a), and ‖∇_a δ̂‖ at a = π_θ(s)
    return huber(y - q), huber(torch.linalg.vector_norm(slope - dq, dim=-1)), q.mean()


def actor_loss(policy: Actor, critics: Callable, s: torch.Tensor) -> torch.Tensor:
    """Step (5): −E[min Q(s, π_θ(s))]; the code's minimum, where TD3 has the first critic."""
    return -critics(s, policy(s)).amin(0).mean()


class TD3:
    """Policy and two critics, each with its target."""

    def __init__(self, state_size: int, action_size: int, unread: int, args: Args, device: torch.device):
        self.args, self.count, self.resets = args, 0, 0
        self.sizes, self.device = (state_size, action_size, args.hidden, unread), device
        self.critic_losses, self.actor_loss = critic_losses, actor_loss
        if args.compile:
            self.critic_losses, self.actor_loss = torch.compile(critic_losses), torch.compile(actor_loss)
        self.start()

    def start(self) -> None:
        self.policy, self.critics = Actor(*self.sizes).to(self.device), SmoothCritics(*self.sizes).to(self.device)
        self.target_policy = copy.deepcopy(self.policy).requires_grad_(False)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.optimizers = {name: torch.optim.RAdam(net.parameters(), self.args.learning_rate, foreach=True)
                           for name, net in (("policy", self.policy), ("critics", self.critics))}  # fmt: skip

    def networks(self) -> dict[str, nn.Module]:
        return {"policy": self.policy, "critics": self.critics, "target_policy": self.target_policy,
                "target_critics": self.target_critics}  # fmt: skip

    def set_normalizer(self, s: torch.Tensor) -> None:
        mean, std = mean_and_std(s[:, self.policy.unread :])
        for network in self.networks().values():
            network.mean.copy_(mean)
            network.std.copy_(std)

    def blur(self, a: torch.Tensor) -> torch.Tensor:
        noise = self.args.target_noise * torch.randn_like(a)
        return noise.clamp(-self.args.noise_clip, self.args.noise_clip)

    def target(
        self, batch: "Transitions", predict: Optional[Predict]
    ) -> tuple[torch.Tensor, torch.Tensor, Optional[torch.Tensor]]:
        """Step (3): a, y and, where it is wanted, ∇_a y. Imagined from the states alone, or of real transitions."""
        args, s = self.args, batch.obs
        with torch.no_grad():
            if predict is None:
                value = next_value(self, batch.next_obs, self.blur(batch.action))
                return batch.action, batch.reward + args.gamma * (~batch.terminated) * value, None
            a = self.policy(s)
            noise = self.blur(a)
            if args.gradient_weight:
                return a, *imagined_target(self, predict, s, a, noise, args.gamma)
            s2, r, ended = predict(s, a)
            return a, r + args.gamma * (~ended) * next_value(self, s2, noise), None

    def fit_critics(
        self, s: torch.Tensor, a: torch.Tensor, y: torch.Tensor, slope: Optional[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Step (4)"""
        loss, slope_loss, value = self.critic_losses(self.critics, s, a, y, slope)
        # φ ← φ − α_Q ∇_φ (|δ̂| + 1/λ ‖∇_a δ̂‖), both as Huber's loss has them
        descend(self.optimizers["critics"], loss + self.args.gradient_weight * slope_loss, self.args.gradient_clip)
        return {"losses/critic": loss, "losses/action_gradient": slope_loss, "charts/value": value}

    def improve(self, s: torch.Tensor) -> dict[str, torch.Tensor]:
        """Step (5), of the policy every second time."""
        self.count, metrics, follow = self.count + 1, {}, [(self.target_critics, self.critics)]
        if self.count % self.args.policy_every == 0:
            metrics["losses/policy"] = self.actor_loss(self.policy, self.critics, s)
            # θ ← θ + α_π ∇_θ Q_φ(s, π_θ(s))
            descend(self.optimizers["policy"], metrics["losses/policy"], self.args.gradient_clip)
            follow.append((self.target_policy, self.policy))
        with torch.no_grad():
            for target, network in follow:
                torch._foreach_lerp_(list(target.parameters()), list(network.parameters()), self.args.tau)
        return metrics

    def guard(self, metrics: dict[str, torch.Tensor]) -> bool:
        """--catastrophe-guard: whether a loss has run away, and all begins anew but the means and deviations."""
        safe = metrics["losses/critic"] <= 100 and abs(metrics.get("losses/policy", 0.0)) <= 100_000  # NaN is not
        if not safe:
            mean, std, self.resets = self.policy.mean, self.policy.std, self.resets + 1
            self.start()
            for network in self.networks().values():
                network.mean.copy_(mean)
                network.std.copy_(std)
        return not safe


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
def world_metrics(
    predict: Predict, model: GaussianEnsemble, replay: "ReplayBuffer", first: int, particles: int
) -> dict[str, float]:
    """On the rows from `first` on, which the model has not been trained on."""
    data = replay.rows(np.arange(first, replay.size))
    data = Transitions(*(column.expand(model.members, *column.shape) for column in data))
    metrics = {"model/heldout_loss": world_loss(model, data).item()}
    mean, logvar, _ = model(model.inputs(data.obs, data.action))
    moves = model.moves > 0
    metrics["model/heldout_mse"] = (mean - model.changes(data.obs, data.next_obs))[..., moves].square().mean().item()
    metrics["model/disagreement"] = mean.std(0, correction=0)[..., moves].mean().item()
    metrics["model/noise"] = (0.5 * logvar).exp()[..., moves].mean().item()
    for horizon in (1, 5, 20):
        if sequences := windows(replay, first, horizon):
            errors, spread = open_loop(predict, sequences, state_scale(replay), particles)
            metrics[f"model/open_loop_error_{horizon}"] = errors.mean().item()
            metrics[f"model/open_loop_spread_{horizon}"] = spread.mean().item()
    return {tag: value for tag, value in metrics.items() if math.isfinite(value)}


def simulator_state(env: gym.Env) -> tuple[gym.Env, dict, Optional[np.ndarray]]:
    """All that decides how it goes on: the environment's variables, and MuJoCo's own record where there is one."""
    world, record = env.unwrapped, None
    apart = {"spec", "observation_space", "action_space"}
    if type(getattr(world, "data", None)).__name__ == "MjData":
        import mujoco

        kind = mujoco.mjtState.mjSTATE_INTEGRATION
        record = np.empty(mujoco.mj_stateSize(world.model, kind))
        mujoco.mj_getState(world.model, world.data, record, kind)
        apart |= {"model", "data", "mujoco_renderer"}
    variables = {name: value for name, value in vars(world).items() if name not in apart}
    return world, copy.deepcopy(variables, {id(world): world}), record  # what refers to the world goes on doing so


def set_simulator_state(env: gym.Env, state: tuple[gym.Env, dict, Optional[np.ndarray]]) -> None:
    (source, variables, record), world = state, env.unwrapped
    vars(world).update(copy.deepcopy(variables, {id(source): world}))
    if record is not None:
        import mujoco

        mujoco.mj_setState(world.model, world.data, record, mujoco.mjtState.mjSTATE_INTEGRATION)
        mujoco.mj_forward(world.model, world.data)  # some rewards look at what follows from it


def goes_on_alike(one: gym.Env, two: gym.Env) -> bool:
    """Whether a state can be given from one environment to another: not where it is kept outside of the environment."""
    before, rng = random_states(), np.random.default_rng(0)
    one.reset(seed=1)
    two.reset(seed=2)
    actions = rng.uniform(-1, 1, (6, *one.action_space.shape)).astype(np.float32)
    for a in actions[:3]:
        one.step(a)
    try:
        set_simulator_state(two, simulator_state(one))
    except Exception:  # whatever the environment holds
        return False
    went = [[env.step(a)[:3] for a in actions[3:]] for env in (one, two)]
    set_random_states(before)
    return all(
        np.allclose(obs, obs2, atol=1e-5) and np.isclose(r, r2, atol=1e-5) and ended == ended2
        for (obs, r, ended), (obs2, r2, ended2) in zip(*went, strict=True)
    )


def true_gradients(
    act: Callable[[Any], Any], envs: list[gym.Env], seed: int, states: int, limit: int, horizon: int, gamma: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """∇_a Q^π(s, a) at a = π(s), of the world itself: states s [K, D] and gradients [K, A], differences of the policy's
    discounted returns after slightly other first actions; and [K/4, A] again by half as large a difference: where the
    two do not agree, the return is no smooth function of the action. Two environments for each action.

    Each state is met up to `limit` steps after a reset, with a share of random actions between none and all."""
    rng, found = np.random.default_rng(seed), []
    for env in envs:
        env.reset(seed=seed)
    for _ in range(states):
        share, (obs, _) = rng.random(), envs[0].reset()
        for _ in range(rng.integers(limit)):
            chance = rng.uniform(-1, 1, envs[0].action_space.shape).astype(np.float32)
            obs, _, terminated, truncated, _ = envs[0].step(chance if rng.random() < share else act(obs))
            if terminated or truncated:
                obs, _ = envs[0].reset()
        found.append((np.array(obs), simulator_state(envs[0])))
    gradients = []
    for size, (s, state) in [*((0.01, x) for x in found), *((0.005, x) for x in found[: -(-states // 4)])]:
        a, step = act(s), size * np.eye(len(envs) // 2, dtype=np.float32)
        tried = np.clip(np.concatenate([a + step, a - step]), -1, 1)  # [2A, A]
        returns, alive, actions = np.zeros(len(envs)), np.ones(len(envs), bool), tried
        for env in envs:
            set_simulator_state(env, state)
        obs = np.repeat(s[None], len(envs), 0)
        for t in range(horizon):
            for i in np.flatnonzero(alive):
                obs[i], r, terminated, _, _ = envs[i].step(actions[i])
                returns[i] += gamma**t * float(r)
                alive[i] = not terminated
            if not alive.any():
                break
            actions = act(obs)
        up, down = np.split(returns, 2)
        apart = np.diagonal(tried[: len(step)] - tried[len(step) :])
        gradients.append((up - down) / apart)
    return np.array([s for s, _ in found]), np.array(gradients[:states]), np.array(gradients[states:])


def critic_gradients(learner: TD3, s: torch.Tensor) -> torch.Tensor:
    """What the policy climbs: ∇_a min Q(s, a) at a = π(s), [K, A]."""
    a = learner.policy(s).detach()
    return torch.func.grad(lambda a: learner.critics(s, a).amin(0).sum())(a).detach()


def gradient_fit(believed: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """Of all states together: the cosine of the angle between the two, and how far they are apart, in lengths of the
    true one."""
    lengths = np.linalg.norm(believed), np.linalg.norm(true)
    cosine = float((believed * true).sum() / max(lengths[0] * lengths[1], 1e-12))
    return cosine, float(np.linalg.norm(believed - true) / max(lengths[1], 1e-12))


def draw_gradients(believed: np.ndarray, true: np.ndarray, history: list, title: str) -> np.ndarray:
    """The picture: left, the critics' action gradients [K, A] against the simulator's; right, [(step, cosine)]."""
    figure = Figure(figsize=(9, 3.6), dpi=80)
    figure.suptitle(title, fontsize=11)
    axes = figure.add_axes((0.09, 0.15, 0.38, 0.72))
    axes.set(xlabel="∇ₐ Q of the world, by finite differences", ylabel="∇ₐ Q of the critics")
    axes.axline((0, 0), slope=1, color="gray", linewidth=1)
    for j in range(true.shape[1]):
        axes.plot(true[:, j], believed[:, j], "o", markersize=4, alpha=0.7, label=f"action {j + 1}")
    if true.shape[1] > 1:
        axes.legend(fontsize=7)
    axes = figure.add_axes((0.58, 0.15, 0.4, 0.72))
    axes.set(xlabel="real environment steps", ylabel="cosine of the two", ylim=(-1.05, 1.05))
    axes.axhline(0, color="gray", linewidth=1)
    axes.plot(*np.array(history).T, "o-", markersize=3)
    return figure_to_array(figure)


# ── Training ──────────────────────────────────────────────────────────────────────────────────────────────────────


def check_settings(args: Args) -> None:
    """Every wrong setting that can be seen before training starts, as one sentence."""
    check_run_settings(args)
    for least, names in (
        (1, ("random_steps", "updates", "batch_size", "policy_every", "hidden", "reward_hidden")),
        (1, ("members", "model_layers", "model_hidden", "model_batch_size", "model_every", "model_batches")),
        (1, ("true_states", "true_horizon")),
        (0, ("gradient_weight", "exploration_noise", "target_noise", "noise_clip", "weight_decay")),
    ):
        for name in names:
            if getattr(args, name) < least:
                stop(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least {least}")
    if not 0 <= args.gamma < 1 or not 0 < args.tau <= 1:
        stop("--gamma must lie in [0, 1) and --tau in (0, 1]")
    if min(args.learning_rate, args.model_learning_rate, args.gradient_clip) <= 0:
        stop("--learning-rate, --model-learning-rate and --gradient-clip must be above 0")
    if not args.imagine and args.gradient_weight:
        stop("--no-imagine leaves no target with a gradient: add --gradient-weight 0, and it is TD3")
    if not args.imagine and args.learn_reward:
        stop("--no-imagine has no model that a reward could be learned with: leave out --learn-reward")
    if args.imagine and args.random_steps < args.model_every:
        stop(f"--random-steps is {args.random_steps}: there is no model before step --model-every, {args.model_every}")


def make_dynamics(args: Args, env: gym.Env) -> Optional[GaussianEnsemble]:
    """None where no step needs a model."""
    if not args.imagine:
        return None
    (state_size,), (action_size,), task = env.observation_space.shape, env.action_space.shape, TASKS.get(args.env_id)
    rewards = args.reward_hidden if args.learn_reward or task is None else 0
    return GaussianEnsemble(args.members, state_size, action_size, args.model_layers, args.model_hidden,
                            task.unread if task else 0, ends=task is None, rewards=rewards)  # fmt: skip


def make_learner(args: Args, env: gym.Env, device: torch.device) -> TD3:
    task = TASKS.get(args.env_id)
    return TD3(env.observation_space.shape[0], env.action_space.shape[0], task.unread if task else 0, args, device)


def deterministic(policy: nn.Module, device: torch.device) -> Callable[[Any], Any]:
    """The deterministic policy as a function of one observation."""

    @torch.inference_mode()
    def act(obs: np.ndarray) -> np.ndarray:
        return policy.act(torch.as_tensor(obs, dtype=torch.float32, device=device)).cpu().numpy()

    return act


def load_policy(args: Args, env: gym.Env, checkpoint: dict) -> Callable[[], Callable[[Any], Any]]:
    """For --evaluate: what makes the policy of a checkpoint, for each episode the same."""
    device = pick_device(args.device)
    policy = make_learner(args, env, device).policy
    policy.load_state_dict(checkpoint["learned"]["policy"])
    return lambda: deterministic(policy, device)


def train(args: Args) -> Path:
    device = pick_device(args.device)
    print(f"device: {device}")
    seed_everything(args.seed)
    env, eval_env = make_task(args), make_task(args, render=args.capture_video)
    probes = [make_task(args) for _ in range(2 * env.action_space.shape[0])] if args.picture_every else []
    if probes and not goes_on_alike(*probes[:2]):
        print(f"no pictures: the state of {args.env_id} can't be given from one environment to another, so the true "
              "gradients of its return can't be measured")  # fmt: skip
        probes = []
    env.action_space.seed(args.seed)
    run_dir, checkpoint = open_run(args)

    learner, model, predict = make_learner(args, env, device), make_dynamics(args, env), None
    if model:
        loss = torch.compile(world_loss) if args.compile else world_loss
        model_optimizer = torch.optim.RAdam(
            model.to(device).parameters(), args.model_learning_rate, weight_decay=args.weight_decay,
            decoupled_weight_decay=True, foreach=True,
        )  # fmt: skip
        box = env.env.action_space  # the task's own
        low, high = (torch.as_tensor(x, dtype=torch.float32, device=device) for x in (box.low, box.high))
        predict = sampler(args, model, (low + high) / 2, (high - low) / 2)
    # Room for all of B, and one row more: a full buffer would begin to forget when the run is lengthened.
    replay = ReplayBuffer(args.total_timesteps + 1, env.observation_space, env.action_space, device)
    step, fitted_at, history = 0, 0, []

    def parts() -> tuple[dict, dict]:
        """All that learns, and what makes it."""
        networks, optimizers = learner.networks(), learner.optimizers
        if model:
            networks, optimizers = {**networks, "model": model}, {**optimizers, "model": model_optimizer}
        return networks, optimizers

    if checkpoint:
        step, fitted_at, history = checkpoint["step"], checkpoint["fitted_at"], checkpoint["history"]
        learner.count, learner.resets = checkpoint["count"], checkpoint["resets"]
        for found, kind in zip(parts(), ("learned", "optimisers"), strict=True):
            for name, part in found.items():
                part.load_state_dict(checkpoint[kind][name])
        replay.load_state_dict(checkpoint["replay"])
        set_env_state(env, checkpoint["env"])
        set_random_states(checkpoint["random"])
    if args.total_timesteps < args.random_steps:
        print(f"nothing will be learned: the first {args.random_steps:,} steps are random (--random-steps)")
    log = RunLog(args, run_dir, checkpoint)

    # These three look at the variables of the loop as they are when they are called, and leave the dice alone.
    def save() -> None:
        learned, optimizers = ({name: part.state_dict() for name, part in found.items()} for found in parts())
        save_checkpoint(
            run_dir, step=step, fitted_at=fitted_at, history=history, count=learner.count, resets=learner.resets,
            learned=learned, optimisers=optimizers, replay=replay.state_dict(), env=env_state(env),
            log=log.state_dict(),
        )  # fmt: skip
        log.lap("log")

    def measure() -> None:
        set_env_state(eval_env, env_state(env), generators=False)
        log.evaluation(step, lambda: deterministic(learner.policy, device), eval_env)

    def draw() -> None:
        before = random_states()
        limit = min(args.eval_max_steps, env.spec.max_episode_steps or args.eval_max_steps)
        for probe in probes:
            set_env_state(probe, env_state(env), generators=False)
        act = deterministic(learner.policy, device)
        s, true, finer = true_gradients(
            act, probes, args.seed + 20_000, args.true_states, limit, args.true_horizon, args.gamma
        )
        believed = critic_gradients(learner, torch.as_tensor(s, dtype=torch.float32, device=device)).cpu().numpy()
        (cosine, error), (trust, _) = gradient_fit(believed, true), gradient_fit(finer, true[: len(finer)])
        found = {"cosine": cosine, "error": error, "trust": trust}
        log.scalars(step, {f"model/gradient_{name}": value for name, value in found.items()})
        history.append((step, cosine))
        title = f"{args.env_id}: step {step:,}, trust in the true gradients {trust:.2f}"
        log.picture(step, draw_gradients(believed, true, history, title))
        set_random_states(before)

    obs = np.array(env.reset(seed=None if checkpoint else args.seed)[0])  # copied: some environments reuse theirs
    episode_return, episode_length = 0.0, 0
    with StopSignal() as stop_signal:
        while step < args.total_timesteps:
            # (1) act by the policy π_θ with some noise (at first at random); add the transition to B
            if step < args.random_steps:
                a = env.action_space.sample()
            else:
                with torch.inference_mode():
                    a = learner.policy(torch.as_tensor(obs, dtype=torch.float32, device=device))
                    a = (a + args.exploration_noise * torch.randn_like(a)).clamp(-1, 1).cpu().numpy()
            next_obs, r, terminated, truncated, _ = env.step(a.copy())
            step, r, over = step + 1, float(r), bool(terminated or truncated)
            if not math.isfinite(r) or not np.isfinite(next_obs).all():
                stop(f"{args.env_id} gave the reward {r} and {next_obs} at step {step:,}: nothing to learn from")
            replay.add(obs, a, r, next_obs, terminated, truncated)
            obs, episode_return, episode_length = np.array(next_obs), episode_return + r, episode_length + 1
            log.lap("env")

            # (2) every 25 steps train p_ω on B
            if step - fitted_at >= args.model_every:
                data = replay.rows(np.arange(replay.size))
                learner.set_normalizer(data.obs)
                if model:
                    if fitted_at:
                        for tag, value in world_metrics(predict, model, replay, fitted_at, 10).items():
                            log.mean(tag, value)
                    fit_passes(model, loss, model_optimizer, data, args, log)
                fitted_at = step
                log.lap("model")

            if step == args.random_steps:
                log.start_clock(step)
            if step >= args.random_steps:
                data = replay.sample(args.updates * args.batch_size)
                for batch in zip(*(column.split(args.batch_size) for column in data), strict=True):
                    # (3) imagine ŝ ~ p_ω(·|s, π_θ(s)); the target and its gradient in a
                    s, (a, y, slope) = batch[0], learner.target(Transitions(*batch), predict)
                    # (4) train the critics: value to value, gradient in a to gradient in a
                    metrics = learner.fit_critics(s, a, y, slope)
                    # (5) train π_θ to climb the critics; let the targets follow
                    metrics |= learner.improve(s)
                    if args.catastrophe_guard and learner.guard(metrics):
                        log.bar.write(f"step {step:,}: a loss ran away, policy and critics begin anew")
                for tag, value in metrics.items():
                    log.mean(tag, value)
                if args.catastrophe_guard:
                    log.mean("charts/resets", learner.resets)
                log.lap("policy")

            log.bar.update()
            if over:
                log.episode(step, episode_return, episode_length)
            if log.due("log", args.log_every, step):
                log.flush(step)
            if log.due("eval", args.eval_every, step) and step < args.total_timesteps:
                measure()
                if probes and log.due("picture", args.picture_every, step, at_most=20):
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
    if probes:
        draw()
    log.finish(step)
    return run_dir


# ── The tasks: what the model must be told of them ────────────────────────────────────────────────────────────────


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


class ContinuousCartPole(gym.ActionWrapper):
    """Gymnasium's CartPole, pushed by any force between its two."""

    def __init__(self, render_mode: Optional[str] = None):
        super().__init__(CartPoleEnv(render_mode=render_mode))
        self.action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def action(self, action: np.ndarray) -> int:
        self.unwrapped.force_mag = 10.0 * float(np.clip(action[0], -1, 1))
        return 1


if "ContinuousCartPole-v0" not in gym.registry:
    gym.register("ContinuousCartPole-v0", entry_point=ContinuousCartPole, max_episode_steps=500)


def cart_pole_lost(s: torch.Tensor) -> torch.Tensor:  # s = (x, x', angle, angle')
    return ~((s[..., 0].abs() <= 2.4) & (s[..., 2].abs() <= 12 * math.pi / 180))


WITH_X = {"exclude_current_positions_from_observation": False}  # the reward is a function of s and s' only with x
TASKS = {
    "Pendulum-v1": Task(pendulum_reward),
    "ContinuousCartPole-v0": Task(lambda s, a, s2: torch.ones_like(s2[..., 0]), cart_pole_lost),
    "InvertedPendulum-v5": Task(lambda s, a, s2: (~fallen(s2)).float(), fallen),
    "Reacher-v5": Task(reacher_reward),
    "Pusher-v5": Task(pusher_reward),
    "HalfCheetah-v5": Task(forward(0.1, 0.05), unread=1, settings=WITH_X),
    "Swimmer-v5": Task(forward(1e-4, 0.04), unread=2, settings=WITH_X),
    "Hopper-v5": Task(forward(1e-3, 0.008, hopper_healthy), lambda s: ~hopper_healthy(s), unread=1, settings=WITH_X),
    "Walker2d-v5": Task(forward(1e-3, 0.008, walker_healthy), lambda s: ~walker_healthy(s), unread=1, settings=WITH_X),
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
