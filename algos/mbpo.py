# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "numpy>=2.0,<3", "gymnasium>=1.3,<2", "mujoco>=3.3,<5", "imageio>=2.34,<3", "tyro>=1.0.16,<2",
#     "tensorboard>=2.18,<3", "tqdm>=4.66,<5", "pillow>=11,<14", "matplotlib>=3.9,<4", "pygame-ce>=2.5,<3",
# ]
# ///
"""MBPO: learn a policy from short imagined continuations of real experience.

An ensemble of probabilistic networks learns the environment from real steps. The policy continues real states in it for
k steps, a hundred thousand times, and soft actor-critic (SAC) trains on these imagined transitions, many updates for
each real step. The branches are short, so the model's errors cannot accumulate.

Paper: Janner, Fu, Zhang, Levine, "When to Trust Your Model: Model-Based Policy Optimization", NeurIPS 2019,
arXiv 1906.08253. Official code: github.com/jannerm/mbpo. The ensemble is that of PETS (Chua et al. 2018, arXiv
1805.12114), the policy's learner is SAC (Haarnoja et al. 2018, arXiv 1812.05905).

The algorithm (Algorithm 2 of the paper):
    (1) every 250 steps train p_θ on D_env by maximum likelihood, until its error on held-out rows stops improving
    (2) from M states of D_env follow π_φ through p_θ for k steps, and add these branches to D_model
    (3) take an action by π_φ in the environment (at first a random one) and add the transition to D_env
    (4) for G updates train π_φ and its critics by SAC on D_model, with a small share of D_env

Symbols: p_θ → Ensemble, D_env → replay, D_model → pool, M → rollouts, k → rollout_length, E → epoch_steps,
    G → updates, π_φ → Policy; of SAC: Q_θ → critics, Q̄ → targets, α → alpha, H̄ → target_entropy.

Usage (return: mean and 95 % interval over seeds; docs/mbpo.md has the curves):
    python algos/mbpo.py                                    # return 1000 [1000, 1000]
    python algos/mbpo.py pendulum                           # return −126 [−140, −98]
    python algos/mbpo.py --rollout-length 0                 # the control: SAC with as many updates and no model
    python algos/mbpo.py --env-id my_module:MyEnv-v0        # any Gymnasium task: its termination is learned too
    python algos/mbpo.py --evaluate runs/NAME --episodes 10 --capture-video

Differences from the paper and its code: invertedpendulum has smaller networks (hopper and pendulum have the paper's
sizes); an update trains the critics first, then policy and temperature; every elite gets equally many rows of a
batch; a transition enters D_env at once; where TERMINAL does not know when an episode terminates, the ensemble learns
it.
"""

import argparse
import copy
import io
import math
import os
import shlex
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
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

ALGORITHM = "mbpo"


@dataclass
class Args:  # tyro turns each field into a flag and each comment into its help
    env_id: str = "InvertedPendulum-v5"  # any environment with vector observations and bounded continuous actions
    total_timesteps: int = 5_000  # environment steps, including the random ones
    random_steps: int = 500  # steps of random actions before the first training
    epoch_steps: int = 250  # E: steps per epoch; an imagined transition is kept for about one epoch
    model_every: int = 250  # steps between trainings of the model, each followed by new branches
    rollouts: int = 100_000  # M: branches after each training of the model
    rollout_schedule: tuple[int, int, int, int] = (20, 150, 1, 1)  # a b x y: k grows from x in epoch a to y in epoch b
    rollout_length: Optional[int] = None  # a constant k in place of the schedule; 0: SAC alone, without a model
    real_ratio: float = 0.05  # share of real transitions in a batch of SAC
    updates: int = 10  # G: updates of SAC per environment step
    batch_size: int = 256  # transitions per update of SAC
    gamma: float = 0.99  # discount
    tau: float = 0.005  # step of the target critics towards the critics in each update
    learning_rate: float = 3e-4  # Adam's step size for policy, critics and temperature
    hidden: int = 128  # units in each of the two hidden layers of policy and critics
    target_entropy: Optional[float] = None  # H̄; by default the paper's for the task, else minus the number of actions
    members: int = 7  # networks in the ensemble
    elites: int = 5  # members with the lowest held-out error, the only ones that imagine
    model_layers: int = 4  # hidden layers per member
    model_hidden: int = 100  # units per hidden layer of a member
    model_learning_rate: float = 1e-3  # Adam's step size for the ensemble
    model_batch_size: int = 256  # transitions per minibatch and member
    weight_decay: tuple[float, ...] = (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)  # λ of ½ λ ‖w‖², one number per layer
    holdout: float = 0.2  # share of D_env, at most 5,000 rows, that decides when a training of the model ends
    patience: int = 5  # a training ends after more passes than this in which no member improved by 1 %
    seed: int = 1  # on one CPU, two runs with the same seed are identical
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu, cuda or mps
    eval_every: int = 500  # steps between evaluations (at the end of an episode, like all that follow)
    picture_every: int = 1_000  # steps between pictures of the model's errors and branches
    checkpoint_every: int = 1_000  # steps between checkpoints; one is also written about every minute
    episodes: int = 5  # episodes per evaluation
    capture_video: bool = False  # save the first episode of each evaluation as a GIF
    run_dir: Optional[str] = None  # output folder; runs/<env>__<algorithm>__<seed>__<time> by default
    resume: Optional[str] = None  # continue the run in this folder with its own settings
    evaluate: Optional[str] = None  # do not train: play with the agent of this run folder

    def __post_init__(self):
        """tyro reports a ValueError raised here as one sentence and exits with code 2."""
        may_be_zero = ("seed", "rollout_length", "real_ratio", "patience")
        for name, value in vars(self).items():
            if type(value) in (int, float) and name != "target_entropy":
                if not (0 < value < math.inf or (value == 0 and name in may_be_zero)):
                    raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be a positive number")
                if name in ("gamma", "tau", "real_ratio", "holdout") and value >= 1:
                    raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be below 1")
        if self.elites > self.members:
            raise ValueError(f"--elites {self.elites} exceeds --members {self.members}")
        if len(self.weight_decay) != self.model_layers + 1:
            raise ValueError(f"--weight-decay needs {self.model_layers + 1} numbers, one per layer")
        first, last, *lengths = self.rollout_schedule
        if not first < last or min(lengths) < 1:
            raise ValueError("--rollout-schedule needs an epoch, a later epoch and two lengths of at least 1")
        if self.holdout * self.random_steps < 1:
            raise ValueError(f"--random-steps {self.random_steps} are too few for --holdout {self.holdout}")


PRESETS = {
    "invertedpendulum": ("the paper's InvertedPendulum with smaller networks: a pole kept upright", Args()),
    "pendulum": ("Pendulum-v1: swing up and balance within 4,000 steps", Args(
        "Pendulum-v1", 4_000, random_steps=400, epoch_steps=200, model_every=200, rollouts=80_000,
        hidden=256, model_hidden=200)),
    "hopper": ("Hopper-v5 at the official code's settings: k grows to 11 (15 in epoch 150); hours", Args(
        "Hopper-v5", 125_000, random_steps=5_000, epoch_steps=1_000, rollout_schedule=(20, 150, 1, 15), updates=20,
        hidden=256, model_hidden=200, eval_every=1_000, picture_every=5_000, checkpoint_every=10_000)),
}  # fmt: skip


# ── The algorithm ─────────────────────────────────────────────────────────────────────────────────────────────────


class Ensemble(nn.Module):
    """p_θ: all members in one batched module. Each predicts a Gaussian over the change of the state and the reward and,
    where the task's termination is unknown, the log-odds that the episode ends."""

    def __init__(self, state_size: int, action_size: int, learn_end: bool, args: Args):
        super().__init__()
        self.members, self.learn_end, self.size = args.members, learn_end, state_size + 1
        widths = [state_size + action_size, *[args.model_hidden] * args.model_layers, 2 * self.size + learn_end]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in pairwise(widths):
            weight, std = torch.empty(self.members, fan_in, fan_out), 0.5 * fan_in**-0.5
            self.weights.append(nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std))
            self.biases.append(torch.zeros(self.members, 1, fan_out))
        # Learned bounds: otherwise the variance is arbitrary far from the data.
        self.max_logvar = nn.Parameter(torch.full((self.size,), 0.5))
        self.min_logvar = nn.Parameter(torch.full((self.size,), -10.0))
        self.register_buffer("input_mean", torch.zeros(state_size + action_size))
        self.register_buffer("input_std", torch.ones(state_size + action_size))
        self.register_buffer("elites", torch.arange(args.elites))

    def forward(self, s: Tensor, a: Tensor, chosen: Optional[Tensor] = None) -> tuple[Tensor, Tensor, Tensor]:
        """s [B, N, D], a [B, N, A] → mean and log-variance of the targets [B, N, ·], log-odds of an end [B, N]."""
        x = (torch.cat([s, a], -1) - self.input_mean) / self.input_std
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if chosen is not None:
                weight, bias = weight[chosen], bias[chosen]
            x = F.silu(x, inplace=not torch.is_grad_enabled()) if i else x
            x = torch.baddbmm(bias, x, weight)  # one product for all members
        # PETS, Appendix A.1: soft bounds on log σ²
        logvar = self.max_logvar - F.softplus(self.max_logvar - x[..., self.size : 2 * self.size])
        logvar = self.min_logvar + F.softplus(logvar - self.min_logvar)
        return x[..., : self.size], logvar, x[..., -1]


def ensemble_loss(model: Ensemble, data: "Transitions") -> Tensor:
    """The columns of data are [B, N, ·]: the sum over the members of their mean losses."""
    mean, logvar, logit = model(data.s, data.a)
    y = torch.cat([data.s2 - data.s, data.r], -1)
    # PETS, Eq. 1: Σ_n [μ_θ(s_n, a_n) − y_n]ᵀ Σ_θ⁻¹ [μ_θ(s_n, a_n) − y_n] + log det Σ_θ(s_n, a_n)
    loss = ((mean - y).square() * (-logvar).exp() + logvar).mean((1, 2)).sum()
    # PETS, Appendix A.1: pull the bounds towards the data
    loss = loss + 0.01 * (model.max_logvar.sum() - model.min_logvar.sum())
    if model.learn_end:
        loss = loss + F.binary_cross_entropy_with_logits(logit, data.terminated[..., 0]) * model.members
    return loss


def make_optimizer(model: Ensemble, args: Args) -> torch.optim.Optimizer:
    """Adam (unlike AdamW) adds λ w to the gradient, which is the gradient of the penalty ½ λ ‖w‖²."""
    groups = [{"params": [w], "weight_decay": decay} for w, decay in zip(model.weights, args.weight_decay, strict=True)]
    groups.append({"params": [*model.biases, model.max_logvar, model.min_logvar]})
    return torch.optim.Adam(groups, args.model_learning_rate, fused=True)


def fit(model: Ensemble, optimizer: torch.optim.Optimizer, replay: "Replay", args: Args) -> dict[str, Tensor | int]:
    """Step (1): train until the held-out error stops improving. Each member keeps the weights of its best pass."""
    order = torch.randperm(replay.size, device=replay.data.device)
    unseen, order = order.tensor_split([min(int(args.holdout * replay.size), 5_000)])
    unseen, data = replay.rows(unseen), replay.rows(order)
    std, mean = torch.std_mean(torch.cat([data.s, data.a], 1), 0, correction=0)
    model.input_mean.copy_(mean)
    model.input_std.copy_(torch.where(std > 1e-6, std, 1.0))
    # PETS, Section 4: each member's own data set, sampled with replacement and kept for all passes
    rows = order[torch.randint(len(order), (model.members, len(order)), device=order.device)]
    parameters, best = [*model.weights, *model.biases], torch.full((model.members,), math.inf, device=order.device)
    best_parameters, losses, passes, waited = [p.detach().clone() for p in parameters], [], 0, 0
    while waited <= args.patience:
        rows = rows.gather(1, torch.rand(rows.shape, device=rows.device).argsort(1))
        for batch in rows.split(args.model_batch_size, 1):
            loss = ensemble_loss(model, replay.rows(batch))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach() / model.members)
        with torch.no_grad():
            predicted, _, _ = model(*(x.expand(model.members, -1, -1) for x in (unseen.s, unseen.a)))
            error = (predicted - torch.cat([unseen.s2 - unseen.s, unseen.r], -1)).square().mean((1, 2))
            improved = error < 0.99 * best
            best = torch.where(improved, error, best)
            for p, saved in zip(parameters, best_parameters, strict=True):
                saved[improved] = p[improved]
        passes, waited = passes + 1, 0 if improved.any() else waited + 1
    for p, saved in zip(parameters, best_parameters, strict=True):
        p.data.copy_(saved)
    model.elites.copy_(best.argsort()[: args.elites])
    metrics = {"losses/model": torch.stack(losses).mean(), "model/heldout_mse": best[model.elites].mean()}
    return metrics | {"model/passes": passes}


def rollout_length(args: Args, step: int) -> int:
    """k in the epoch of this step."""
    if args.rollout_length is not None:
        return args.rollout_length
    (a, b, x, y), e = args.rollout_schedule, max(step - args.random_steps, 0) // args.epoch_steps
    # Appendix C: k = min(max(x + (e − a) / (b − a) · (y − x), x), y)
    return int(x + min(max((e - a) / (b - a), 0), 1) * (y - x))


@torch.no_grad()
def branch(agent: "Agent", states: Tensor, length: int) -> Tensor:
    """Step (2): k-step rollouts from the states [M, D], as rows (s, a, r, s', terminated) of D_model."""
    rows = []
    for s in states.split(10_000):  # their activations fit into the cache
        for _ in range(length):
            a, _ = agent.policy(s)
            s2, r, terminated = agent.predict(s, a)
            finite = s2.isfinite().all(1) & r.isfinite()  # a model may overflow far from its data
            rows.append(torch.cat([s, a, r[:, None], s2, terminated[:, None]], 1)[finite])
            s = s2[finite & ~terminated]
    return torch.cat(rows)


class ModelPool:
    """D_model: the latest imagined transitions, as the rows of one matrix."""

    def __init__(self, width: int, device: str):
        self.data = torch.empty(0, width, device=device)

    def add(self, rows: Tensor, capacity: int) -> None:
        kept = self.data[max(len(self.data) + len(rows) - capacity, 0) :]
        self.data = torch.cat([kept, rows])

    def state_dict(self) -> dict:
        return {"rows": self.data}

    def load_state_dict(self, state: dict) -> None:
        self.data = state["rows"].to(self.data.device)


def sample_batch(replay: "Replay", pool: ModelPool, args: Args) -> tuple[Tensor, ...]:
    """Columns s, a, r, s', terminated [N, ·] of one update: a few rows of D_env, the others of D_model."""
    real = args.batch_size if args.rollout_length == 0 else int(args.real_ratio * args.batch_size)
    batch = replay.data[torch.randint(replay.size, (real,), device=args.device), :-1]
    if real < args.batch_size:
        index = torch.randint(len(pool.data), (args.batch_size - real,), device=args.device)
        batch = torch.cat([batch, pool.data[index]])
    return batch.split(replay.widths[:-1], 1)


class Policy(nn.Module):
    """π_φ(a|s): a Gaussian, squashed into (−1, 1) by tanh."""

    def __init__(self, state_size: int, action_size: int, hidden: int):
        super().__init__()
        sizes = ((state_size, hidden), (hidden, hidden), (hidden, 2 * action_size))
        self.net = nn.Sequential(*(layer for size in sizes for layer in (nn.Linear(*size), nn.ReLU())))[:-1]
        for layer in self.net[::2]:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """A sample a ~ π(·|s) [..., A], reparameterised, and log π(a|s) [..., 1]."""
        mean, log_std = self.net(s).chunk(2, -1)
        log_std, noise = log_std.clamp(-20, 2), torch.randn_like(mean)
        u = mean + log_std.exp() * noise
        # SAC, Eq. 26: log π(a|s) = log N(u; μ, σ²) − Σ log(1 − tanh² u), and 1 − tanh² u = 4 / (eᵘ + e⁻ᵘ)²
        log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))
        return torch.tanh(u), (log_normal - log_slope).sum(-1, keepdim=True)


class Critics(nn.Module):
    """Q_θ(s, a): two critics in one batched module."""

    def __init__(self, state_size: int, action_size: int, hidden: int):
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in pairwise([state_size + action_size, hidden, hidden, 1]):
            self.weights.append(torch.stack([nn.init.xavier_uniform_(torch.empty(fan_in, fan_out)) for _ in range(2)]))
            self.biases.append(torch.zeros(2, 1, fan_out))

    def forward(self, s: Tensor, a: Tensor) -> Tensor:
        """[2, N, 1]"""
        x = torch.cat([s, a], -1).expand(2, -1, -1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, F.relu(x) if i else x, weight)
        return x


class Agent(nn.Module):
    """The policy, and what it learns from: the ensemble, two critics with their targets, and the temperature."""

    player = "deterministic policy"

    def __init__(self, env: gym.Env, args: Args):
        super().__init__()
        (state_size,), (action_size,) = env.observation_space.shape, env.action_space.shape
        self.terminal = TERMINAL.get(args.env_id)
        self.model = Ensemble(state_size, action_size, self.terminal is None, args)
        self.policy = Policy(state_size, action_size, args.hidden)
        self.critics = Critics(state_size, action_size, args.hidden)
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(()))
        self.target_entropy = args.target_entropy
        if self.target_entropy is None:
            self.target_entropy = TARGET_ENTROPY.get(args.env_id, -action_size)
        self.to(args.device)
        self.low = torch.as_tensor(env.action_space.low, dtype=torch.float32, device=args.device)
        self.high = torch.as_tensor(env.action_space.high, dtype=torch.float32, device=args.device)

    def reset(self) -> None:
        """The policy has no memory."""

    def to_action(self, a: Tensor) -> np.ndarray:
        """From [−1, 1], where policy, critics and model live, to the bounds of the environment."""
        return torch.lerp(self.low, self.high, (a + 1) / 2).cpu().numpy()

    @torch.inference_mode()
    def forward(self, obs: np.ndarray) -> np.ndarray:
        mean, _ = self.policy.net(torch.as_tensor(obs, dtype=torch.float32, device=self.low.device)).chunk(2, -1)
        return self.to_action(torch.tanh(mean))

    def predict(self, s: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One imagined step of rows [N, ·], each through one elite, chosen at random: next states, rewards, ends."""
        elites = self.model.elites
        seats = len(elites) * -(-len(s) // len(elites))  # equally many for each elite; a spare one repeats row 0
        seat = torch.randperm(seats, device=s.device)[: len(s)]
        row = torch.zeros(seats, dtype=torch.long, device=s.device)
        row[seat] = torch.arange(len(s), device=s.device)
        row = row.view(len(elites), seats // len(elites))
        mean, logvar, logit = self.model(s[row], a[row], elites)
        # Algorithm 2: s_{t+1}, r_t ~ p_θ(·|s_t, a_t)
        y = (mean + (0.5 * logvar).exp() * torch.randn_like(mean)).flatten(0, 1)[seat]
        s2, r = s + y[:, :-1], y[:, -1]
        if self.terminal:
            return s2, r, self.terminal(s2)
        return s2, r, torch.rand_like(r) < logit.flatten()[seat].sigmoid()


def update(agent: Agent, critic_optimizer, policy_optimizer, batch: tuple, args: Args) -> dict[str, Tensor]:
    """Step (4): one update of SAC."""
    s, a, r, s2, terminated = batch
    alpha = agent.log_alpha.detach().exp()
    with torch.no_grad():
        # SAC, Eq. 3: V(s') = E[min Q̄(s', a') − α log π(a'|s')]
        a2, log_prob = agent.policy(s2)
        value = agent.targets(s2, a2).amin(0) - alpha * log_prob
        y = r + args.gamma * (1 - terminated) * value
    # SAC, Eq. 5: J_Q = E[½ (Q(s, a) − (r + γ V(s')))²], summed over both critics
    q = agent.critics(s, a)
    critic_loss = 0.5 * (q - y).square().mean(1).sum()
    critic_optimizer.zero_grad()
    critic_loss.backward()
    critic_optimizer.step()
    # SAC, Eq. 9: J_π = E[α log π(a|s) − min Q(s, a)]
    b, log_prob = agent.policy(s)
    policy_loss = (alpha * log_prob - agent.critics(s, b).amin(0)).mean()
    # SAC, Eq. 18: J(α) = E[−α (log π(a|s) + H̄)], with log α as the factor, as in the official code
    alpha_loss = -agent.log_alpha * (log_prob.detach().mean() + agent.target_entropy)
    policy_optimizer.zero_grad()
    (policy_loss + alpha_loss).backward(inputs=[*agent.policy.parameters(), agent.log_alpha])  # not to the critics
    policy_optimizer.step()
    with torch.no_grad():
        # Q̄ ← (1 − τ) Q̄ + τ Q
        for target, p in zip(agent.targets.parameters(), agent.critics.parameters(), strict=True):
            target.lerp_(p, args.tau)
    return {"losses/critic": critic_loss, "losses/policy": policy_loss, "losses/alpha": alpha_loss,
            "charts/value": q.mean(), "charts/entropy": -log_prob.mean(), "charts/alpha": alpha}  # fmt: skip


# ── What the model believes ───────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def open_loop_error(agent: Agent, data: "Transitions", first: int, length: int) -> Tensor:
    """[length]: from the real states of the rows from `first` on take the actions that were taken there, without
    looking. The error of the mean of ten rollouts, in units of the states' std; NaN where no episode is that long."""
    last = data.episode[first + length - 1 :, 0]
    starts = first + torch.nonzero(data.episode[first : first + len(last), 0] == last).flatten()[:200]
    s, scale, errors = data.s[starts].repeat(10, 1), data.s.std(0).clamp(min=1e-6), []
    for t in range(length):
        s, _, _ = agent.predict(s, data.a[starts + t].repeat(10, 1))
        mean = s.view(10, len(starts), len(scale)).mean(0)
        errors.append(((mean - data.s2[starts + t]) / scale).abs().mean())
    return torch.stack(errors)


@torch.no_grad()
def draw_branches(agent: Agent, data: "Transitions", k: int) -> Figure:
    """Left: how the error grows along a branch. Right: branches from every fifth state of the last episode."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for length in (20, 5, 1):
        error = open_loop_error(agent, data, max(len(data.s) - 1_000, 0), length).tolist()
        if math.isfinite(sum(error)):
            break
    left.plot(range(length + 1), [0, *error], "o-", label="error of the predicted state")
    left.axvspan(0, k, color="tab:red", alpha=0.2, label=f"length of a branch: k = {k}")
    left.set(title="prediction of the last 1,000 steps", xlabel="steps without looking", ylabel="mean error / std")
    left.legend()
    episode = data.s[data.episode[:, 0] == data.episode[-1]][:100]
    paths, i = [episode[::5]], min(1, episode.shape[1] - 1)
    for _ in range(20):
        paths.append(agent.predict(paths[-1], agent.policy(paths[-1])[0])[0])
    paths, time = torch.stack(paths)[:, :, i].cpu(), torch.arange(21)[:, None] + torch.arange(0, len(episode), 5)
    right.plot(episode[:, i].cpu(), color="black")
    right.plot(time, paths, color="tab:orange", linewidth=0.5)
    right.plot(time[: k + 1], paths[: k + 1], color="tab:red")
    right.set(title=f"last episode (black), branches: k = {k} (red), 20 (orange)")
    right.set(xlabel="step of the episode", ylabel=f"s[{i}]")
    return figure


# ── Training ──────────────────────────────────────────────────────────────────────────────────────────────────────


def train(args: Args) -> None:
    torch.manual_seed(args.seed)
    env, test_env = make_env(args), make_env(args)
    agent, replay = Agent(env, args), Replay(args.total_timesteps, env, args.device)
    pool, model_optimizer = ModelPool(sum(replay.widths[:-1]), args.device), make_optimizer(agent.model, args)
    critic_optimizer = torch.optim.Adam(agent.critics.parameters(), args.learning_rate, fused=True)
    policy_optimizer = torch.optim.Adam([*agent.policy.parameters(), agent.log_alpha], args.learning_rate, fused=True)
    run = Run(args, agent=agent, replay=replay, pool=pool, model_optimizer=model_optimizer,
              critic_optimizer=critic_optimizer, policy_optimizer=policy_optimizer)  # fmt: skip

    while run.unfinished():
        obs, info = env.reset(seed=run.begin_episode())
        over, metrics = False, {}
        while not over and run.step < args.total_timesteps:
            k, steps = rollout_length(args, run.step), run.step - args.random_steps
            if k > 0 and steps >= 0 and steps % args.model_every == 0:
                for h in (1, 5, 20) if steps > 0 else ():  # on the rows since the last training
                    error = open_loop_error(agent, replay.rows(), run.step - args.model_every, h)[-1].item()
                    if math.isfinite(error):
                        run.log(f"model/open_loop_error_{h}", error)
                # (1) train p_θ on D_env
                for tag, value in fit(agent.model, model_optimizer, replay, args).items():
                    run.log(tag, value)
                # (2) follow π_φ through p_θ from states of D_env, and add these branches to D_model
                states = replay.rows(torch.randint(replay.size, (args.rollouts,), device=args.device)).s
                rows = branch(agent, states, k)
                pool.add(rows, capacity=max(args.epoch_steps // args.model_every, 1) * args.rollouts * k)
                run.log("model/rollout_length", len(rows) / args.rollouts)
            # (3) take an action and add the transition to D_env
            if steps < 0:
                a = 2 * torch.rand_like(agent.low) - 1
            else:
                with torch.no_grad():
                    a, _ = agent.policy(torch.as_tensor(obs, dtype=torch.float32, device=args.device))
            next_obs, r, terminated, truncated, info = env.step(agent.to_action(a))
            replay.add(obs, a.cpu(), r, next_obs, terminated, run.episode_start)
            obs, over = next_obs, terminated or truncated
            run.count_steps()
            # (4) train policy and critics for G updates
            for _ in range(args.updates if steps >= 0 else 0):
                batch = sample_batch(replay, pool, args)
                metrics = update(agent, critic_optimizer, policy_optimizer, batch, args)
        for tag, value in metrics.items():
            run.log(tag, value)
        run.end_episode(info)
        if run.due(args.picture_every) and len(pool.data):
            with torch.random.fork_rng():
                run.picture(draw_branches(agent, replay.rows(), k))
        if run.due(args.eval_every):
            run.evaluate(agent, test_env)
    run.close()


# ── The tasks: terminal states and target entropies; elsewhere the termination is learned ─────────────────────────


def make_task(args: Args, **kwargs) -> gym.Env:
    env = gym.make(args.env_id, **kwargs)
    for name, space in (("observations", env.observation_space), ("actions", env.action_space)):
        if not (isinstance(space, gym.spaces.Box) and len(space.shape) == 1):
            hint = " gymnasium.wrappers.FlattenObservation makes one." if name == "observations" else ""
            raise UserError(f"the {name} of {env.spec.id} are {space}, and a vector of real numbers is needed.{hint}")
    if not env.action_space.is_bounded():
        raise UserError(f"the actions of {env.spec.id} are unbounded: use gymnasium.wrappers.TransformAction")
    return env


TERMINAL = {  # whether an episode ends in the states [..., D]
    "InvertedPendulum-v5": lambda s: s[..., 1].abs() > 0.2,  # s = (x, angle, ...)
    "Pendulum-v1": lambda s: s[..., 0] > math.inf,  # never
    "Hopper-v5": lambda s: ~((s[..., 0] > 0.7) & (s[..., 1].abs() < 0.2) & (s[..., 1:].abs() < 100).all(-1)),
    "Walker2d-v5": lambda s: ~((s[..., 0] > 0.8) & (s[..., 0] < 2) & (s[..., 1].abs() < 1)),  # s = (height, angle, ...)
    "HalfCheetah-v5": lambda s: s[..., 0] > math.inf,
    "Ant-v5": lambda s: ~((s[..., 0] >= 0.2) & (s[..., 0] <= 1)),
    "Humanoid-v5": lambda s: ~((s[..., 0] >= 1) & (s[..., 0] <= 2)),
}
TARGET_ENTROPY = {"InvertedPendulum-v5": -0.05, "Hopper-v5": -1, "Walker2d-v5": -3, "HalfCheetah-v5": -3,
                  "Ant-v5": -4, "Humanoid-v5": -2}  # fmt: skip


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


class Transitions(NamedTuple):
    s: Tensor
    a: Tensor
    r: Tensor
    s2: Tensor
    terminated: Tensor  # 1 if s2 is a terminal state, 0 at a time limit
    episode: Tensor  # the step at which the episode began


class Replay:
    """All transitions as the rows of one matrix."""

    def __init__(self, capacity: int, env: gym.Env, device: str):
        (state_size,), (action_size,) = env.observation_space.shape, env.action_space.shape
        self.widths = state_size, action_size, 1, state_size, 1, 1
        self.size, self.data = 0, torch.zeros(capacity, sum(self.widths), device=device)

    def add(self, *columns) -> None:
        row = np.hstack(columns)
        if not np.isfinite(row).all():
            raise UserError("the environment returned NaN or infinity as an observation or reward")
        self.data[self.size] = torch.from_numpy(row)
        self.size += 1

    def rows(self, index=slice(None)) -> Transitions:
        return Transitions(*self.data[: self.size][index].split(self.widths, -1))

    def state_dict(self) -> dict:
        return {"rows": self.data[: self.size].clone()}

    def load_state_dict(self, state: dict) -> None:
        self.size = len(state["rows"])
        self.data[: self.size] = state["rows"]


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
