# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "numpy>=2.0,<3", "gymnasium>=1.3,<2", "mujoco>=3.3,<5", "imageio>=2.34,<3", "tyro>=1.0.16,<2",
#     "tensorboard>=2.18,<3", "tqdm>=4.66,<5", "pillow>=11,<14", "matplotlib>=3.9,<4", "pygame-ce>=2.5,<3",
# ]
# ///
"""PETS: plan with an ensemble of probabilistic models that knows where it is uncertain.

Each network of an ensemble predicts a Gaussian over the next state, and each is trained on its own bootstrap of the
data. An action sequence is scored by particles that are sent through the networks: they spread out where the world is
noisy or the data are few. The cross-entropy method improves the sequence, and only its first action is executed.

Paper: Chua, Calandra, McAllister, Levine, "Deep Reinforcement Learning in a Handful of Trials using Probabilistic
Dynamics Models", NeurIPS 2018, arXiv 1805.12114. Official code: github.com/kchua/handful-of-trials.

The algorithm (Algorithm 1 of the paper):
    (1) act at random for one trial
    (2) afterwards, in each state s_t, improve a sequence of actions by CEM; score each candidate by the mean return of
        P particles that trajectory sampling sends through the ensemble f̃
    (3) execute only the first action a_t
    (4) add (s_t, a_t, s_{t+1}) to the data D
    (5) after each trial, train f̃_θ further, each member on its own bootstrap of D (Eq. 1)

Symbols: B → members, P → particles, T → horizon, D → replay, f̃_θ = N(μ_θ, Σ_θ) → Ensemble,
    TS1, TS∞, DS, MM, E → --propagation, D, P, DE, PE → --model.

Usage (return: mean and 95 % interval over seeds; docs/pets.md has the curves):
    python algos/pets.py                                    # return 179 [177, 180]
    python algos/pets.py pendulum                           # 4.4 minutes, return −167 [−212, −126]
    python algos/pets.py cartpole --model D --optimizer random   # the paper's ablations
    python algos/pets.py --env-id my_module:MyEnv-v0        # any Gymnasium task: its reward and end are learned too
    python algos/pets.py --evaluate runs/NAME --episodes 10 --capture-video

Differences from the paper and its code: the model is trained after a fixed number of steps, not after each trial;
angles enter and leave the network as cosine and sine; a particle that reaches a terminal state earns nothing more;
HalfCheetah's reward is not a function of Gymnasium's observation, so it is learned.
"""

import argparse
import io
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple, Optional

import gymnasium as gym
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

ALGORITHM = "pets"


@dataclass
class Args:  # tyro turns each field into a flag and each comment into its help
    env_id: str = "CartPoleSwingUp-v0"  # any environment with vector observations and bounded continuous actions
    total_timesteps: int = 2_400  # environment steps, including the random ones
    model: Literal["PE", "P", "DE", "D"] = "PE"  # probabilistic or deterministic networks, an ensemble (E) or one
    members: int = 5  # B: networks in the ensemble
    propagation: Literal["TSinf", "TS1", "DS", "MM", "E"] = "TSinf"  # how particles pass through the ensemble
    particles: int = 5  # P: particles per candidate, for TS a multiple of the members
    optimizer: Literal["cem", "random"] = "cem"  # cross-entropy method, or random shooting with as many candidates
    candidates: int = 100  # action sequences per iteration of CEM
    elites: int = 10  # number of elite candidates used to update the distribution
    iterations: int = 4  # iterations of CEM per environment step
    alpha: float = 0.1  # weight of the old mean and variance in each update
    horizon: int = 20  # T: length of an action sequence
    random_steps: int = 200  # steps of random actions before the first training
    refit_every: int = 200  # environment steps between trainings of the model
    epochs: int = 60  # passes over the data per training
    batch_size: int = 32  # transitions per minibatch and member
    learning_rate: float = 1e-3  # Adam's step size
    layers: int = 2  # hidden layers per network
    hidden: int = 128  # units per hidden layer
    weight_decay: tuple[float, ...] = (1e-4, 2.5e-4, 5e-4)  # λ of the L2 penalty ½ λ ‖w‖², one number per layer
    seed: int = 1  # on one CPU, two runs with the same seed are identical
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu, cuda or mps
    compile: bool = False  # torch.compile the imagined step
    eval_every: int = 2_400  # steps between evaluations (at the end of an episode, like all that follow)
    picture_every: int = 400  # steps between pictures of predicted and real trajectories
    checkpoint_every: int = 1_000  # steps between checkpoints; one is also written about every minute
    episodes: int = 3  # episodes per evaluation
    capture_video: bool = False  # save the first episode of each evaluation as a GIF
    run_dir: Optional[str] = None  # output folder; runs/<env>__<algorithm>__<seed>__<time> by default
    resume: Optional[str] = None  # continue the run in this folder with its own settings
    evaluate: Optional[str] = None  # do not train: play with the agent of this run folder

    def __post_init__(self):
        """tyro reports a ValueError raised here as one sentence and exits with code 2."""
        for name, value in vars(self).items():
            if type(value) in (int, float) and not (0 < value < math.inf or (value == 0 and name in ("seed", "alpha"))):
                raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be a positive number")
        if self.elites > self.candidates:
            raise ValueError(f"--elites {self.elites} exceeds --candidates {self.candidates}")
        if self.propagation in ("TSinf", "TS1") and self.model in ("PE", "DE") and self.particles % self.members:
            raise ValueError(f"--particles {self.particles} is not a multiple of --members {self.members}")
        if len(self.weight_decay) != self.layers + 1:
            raise ValueError(f"--weight-decay needs {self.layers + 1} numbers, one per layer")


PRESETS = {
    "cartpole": ("the paper's cart-pole swing-up, sized for a laptop: solved in a handful of trials", Args()),
    "pendulum": ("Pendulum-v1: swing up and balance within 2,000 steps", Args("Pendulum-v1", 2_000, eval_every=2_000)),
    "halfcheetah": ("HalfCheetah-v5 at the paper's sizes: for a GPU", Args(
        "HalfCheetah-v5", 300_000, particles=20, candidates=500, elites=50, iterations=5, horizon=30, epochs=5,
        layers=4, hidden=200, weight_decay=(2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4), random_steps=1_000,
        refit_every=1_000, eval_every=10_000, picture_every=5_000, episodes=1)),
}  # fmt: skip


# ── The algorithm ─────────────────────────────────────────────────────────────────────────────────────────────────


class Ensemble(nn.Module):
    """f̃_θ: B networks in one batched module. Each predicts a Gaussian over the change of the state. Where the task's
    reward is unknown, the reward is one more coordinate, and the last output is the log-odds that the episode ends."""

    def __init__(self, state_size: int, action_size: int, learn_reward: bool, args: Args):
        super().__init__()
        self.members = args.members if args.model in ("PE", "DE") else 1
        self.probabilistic, self.learn_reward = args.model in ("PE", "P"), learn_reward
        self.size = state_size + learn_reward
        outputs = self.size * (1 + self.probabilistic) + learn_reward
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in pairwise([state_size + action_size, *[args.hidden] * args.layers, outputs]):
            weight, std = torch.empty(self.members, fan_in, fan_out), 0.5 * fan_in**-0.5
            self.weights.append(nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std))
            self.biases.append(torch.zeros(self.members, 1, fan_out))
        # Learned bounds: otherwise the variance is arbitrary far from the data.
        self.max_logvar = nn.Parameter(torch.full((self.size,), 0.5), requires_grad=self.probabilistic)
        self.min_logvar = nn.Parameter(torch.full((self.size,), -10.0), requires_grad=self.probabilistic)
        self.register_buffer("input_mean", torch.zeros(state_size + action_size))
        self.register_buffer("input_std", torch.ones(state_size + action_size))

    def forward(self, s: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """s [B, N, D], a [B, N, A] → mean and log-variance of the targets [B, N, ·], log-odds of an end [B, N]."""
        x = (torch.cat([s, a], -1) - self.input_mean) / self.input_std
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = F.silu(x, inplace=not torch.is_grad_enabled()) if i else x  # a plan creates gigabytes of activations
            x = torch.baddbmm(bias, x, weight)  # one product for all members
        mean, logit = x[..., : self.size], x[..., -1]
        if not self.probabilistic:
            return mean, torch.full_like(mean, -math.inf), logit
        # Appendix A.1: soft bounds on log σ²
        logvar = self.max_logvar - F.softplus(self.max_logvar - x[..., self.size : 2 * self.size])
        logvar = self.min_logvar + F.softplus(logvar - self.min_logvar)
        return mean, logvar, logit


def ensemble_loss(model: Ensemble, s: Tensor, a: Tensor, r: Tensor, s2: Tensor, terminated: Tensor) -> Tensor:
    """Each argument [B, N, ·]: the sum over the members of their mean losses."""
    mean, logvar, logit = model(s, a)
    y = torch.cat([s2 - s, r], -1) if model.learn_reward else s2 - s
    if model.probabilistic:
        # Eq. 1: Σ_n [μ_θ(s_n, a_n) − s_{n+1}]ᵀ Σ_θ⁻¹ [μ_θ(s_n, a_n) − s_{n+1}] + log det Σ_θ(s_n, a_n)
        loss = ((mean - y).square() * (-logvar).exp() + logvar).mean((1, 2)).sum()
        # Appendix A.1: pull the bounds towards the data
        loss = loss + 0.01 * (model.max_logvar.sum() - model.min_logvar.sum())
    else:
        loss = 0.5 * (mean - y).square().mean((1, 2)).sum()
    if model.learn_reward:
        loss = loss + F.binary_cross_entropy_with_logits(logit, terminated[..., 0]) * model.members
    return loss


def make_optimizer(model: Ensemble, args: Args) -> torch.optim.Optimizer:
    """Adam (unlike AdamW) adds λ w to the gradient, which is the gradient of the paper's penalty ½ λ ‖w‖²."""
    groups = [{"params": [w], "weight_decay": decay} for w, decay in zip(model.weights, args.weight_decay, strict=True)]
    groups.append({"params": [*model.biases, model.max_logvar, model.min_logvar]})
    return torch.optim.Adam(groups, args.learning_rate, fused=True)


def fit(model: Ensemble, optimizer: torch.optim.Optimizer, data: "Transitions", args: Args) -> float:
    """Step (5). Returns the mean loss per member."""
    std, mean = torch.std_mean(torch.cat([data.s, data.a], 1), 0, correction=0)
    model.input_mean.copy_(mean)
    model.input_std.copy_(torch.where(std > 1e-6, std, 1.0))
    # Section 4: each member's own data set, |D| rows sampled with replacement and kept for all epochs
    rows, losses = torch.randint(len(data.s), (model.members, len(data.s))), []
    for _ in range(args.epochs):
        rows = rows.gather(1, torch.rand(rows.shape).argsort(1))
        for batch in rows.to(data.s.device).split(args.batch_size, 1):
            loss = ensemble_loss(model, *(column[batch] for column in data[:5]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses).mean().item() / model.members


def cem(returns_of: Callable[[Tensor], Tensor], mean: Tensor, low: Tensor, high: Tensor, args: Args) -> Tensor:
    """Improve the mean [T, A] of a Gaussian over action sequences; `returns_of` maps sequences [K, T, A] to [K]."""
    var = ((high - low) / 4).square().expand_as(mean)
    for _ in range(args.iterations):
        # The noise is truncated at two standard deviations, and two standard deviations stay inside the box.
        std = torch.minimum(var.sqrt(), torch.minimum(mean - low, high - mean) / 2)
        noise = nn.init.trunc_normal_(torch.empty(args.candidates, *mean.shape, device=mean.device), a=-2, b=2)
        actions = (mean + std * noise).clamp(low, high)
        elites = actions[returns_of(actions).topk(args.elites).indices]
        mean = args.alpha * mean + (1 - args.alpha) * elites.mean(0)
        var = args.alpha * var + (1 - args.alpha) * elites.var(0, correction=0)
    return mean  # not the best sample: that one owes its return partly to errors of the model


class Agent(nn.Module):
    """Steps (2) and (3): the planner. Each plan starts from the rest of the last one; reset() begins an episode."""

    player = "planner"

    def __init__(self, env: gym.Env, args: Args):
        super().__init__()
        self.args, self.reward = args, REWARDS.get(args.env_id)
        noiseless = args.model == "D" or args.propagation == "E"
        self.particles = 1 if noiseless else args.particles
        self.model = Ensemble(*env.observation_space.shape, *env.action_space.shape, self.reward is None, args)
        self.to(args.device)
        self.low = torch.as_tensor(env.action_space.low, dtype=torch.float32, device=args.device)
        self.high = torch.as_tensor(env.action_space.high, dtype=torch.float32, device=args.device)
        if args.compile:
            self.predict = torch.compile(self.predict, options={"fallback_random": True})
        self.reset()

    def reset(self) -> None:
        self.mean = ((self.low + self.high) / 2).repeat(self.args.horizon, 1)  # [T, A]

    def predict(self, s: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Next state, reward and end of rows [P·K, ·]: the first particle of every candidate, then the second, ..."""
        propagation, members = self.args.propagation, self.model.members
        if propagation in ("TSinf", "TS1"):
            order = inverse = slice(None)
            if propagation == "TS1":  # permute the particles of each candidate, and with them their networks
                rows = torch.arange(len(s), device=s.device).view(self.particles, -1)
                order = rows.gather(0, torch.rand(rows.shape, device=s.device).argsort(0)).flatten()
                inverse = order.argsort()
            mean, logvar, logit = self.model(*(x[order].unflatten(0, (members, -1)) for x in (s, a)))
            # Section 5: s_{t+1}^p ~ f̃_{θ_b(p,t)}(s_t^p, a_t)
            change = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
            change, logit = (x.flatten(0, 1)[inverse] for x in (change, logit))
        else:
            means, logvar, logits = self.model(*(x.expand(members, -1, -1) for x in (s, a)))
            change, logit = means.mean(0), logits.mean(0)
            if propagation != "E":
                # Section 4: Var = 1/B Σ_b σ_b² + 1/B Σ_b (μ_b − E)², the mixture of the members as one Gaussian
                var = logvar.exp().mean(0) + means.var(0, correction=0)
                change = change + var.sqrt() * torch.randn_like(change)
        s2 = s + change[..., : s.shape[-1]]
        if propagation == "MM":  # moment matching: replace the particles of a candidate by samples of one Gaussian
            particles = s2.view(self.particles, -1, s.shape[-1])
            std, mean = torch.std_mean(particles, 0, correction=0)
            s2 = (mean + std * torch.randn_like(particles)).view_as(s)
        if self.reward:
            return s2, self.reward(s, a, s2), torch.zeros_like(logit, dtype=torch.bool)
        return s2, change[..., -1], logit > 0

    @torch.inference_mode()
    def imagine(self, s: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """s [N, D], actions [N, T, A] → states [N, T, D] and returns [N], counted up to a terminal state."""
        states, returns, alive = [], torch.zeros(len(s), device=s.device), torch.ones(len(s), device=s.device)
        for a in actions.unbind(1):
            s, r, terminated = self.predict(s, a)
            returns, alive = returns + alive * r, alive * ~terminated
            states.append(s)
        return torch.stack(states, 1), returns

    def forward(self, obs: np.ndarray) -> np.ndarray:
        args, s = self.args, torch.as_tensor(obs, dtype=torch.float32, device=self.low.device)

        def returns_of(actions: Tensor) -> Tensor:
            rows = actions.repeat(self.particles, 1, 1)  # [P·K, T, A]
            _, returns = self.imagine(s.expand(len(rows), -1), rows)
            # A model may overflow far from its data: such a candidate is the worst of all.
            returns = torch.where(returns.isfinite(), returns, -1e30)
            # Algorithm 1: 1/P Σ_p Σ_τ r(s_τ^p, a_τ)
            return returns.view(self.particles, -1).mean(0)

        if args.optimizer == "random":
            noise = torch.rand(args.candidates * args.iterations, *self.mean.shape, device=s.device)
            actions = torch.lerp(self.low, self.high, noise)
            return actions[returns_of(actions).argmax(), 0].cpu().numpy()
        plan = cem(returns_of, self.mean, self.low, self.high, args)
        self.mean = torch.cat([plan[1:], torch.zeros_like(plan[:1]).clamp(self.low, self.high)])
        return plan[0].cpu().numpy()


# ── What the model believes ───────────────────────────────────────────────────────────────────────────────────────


@torch.inference_mode()
def heldout_metrics(agent: Agent, replay: "Replay", first: int) -> dict[str, float]:
    """On the rows from `first` on, which the model has not been trained on yet; states in units of their std."""
    model, particles = agent.model, agent.particles
    data, scale = replay.rows(slice(first, None)), replay.rows().s.std(0).clamp(min=1e-6)
    batch = [column.expand(model.members, *column.shape) for column in data[:5]]
    disagreement = model(*batch[:2])[0].std(0, correction=0)[:, : len(scale)] / scale
    metrics = {
        "model/heldout_loss": ensemble_loss(model, *batch).item() / model.members,
        "model/disagreement": disagreement.mean().item(),
    }
    for h in (1, 5, 20):  # start in a real state and take the actions that were taken there, without looking
        starts = torch.nonzero((data.episode[: len(data.s) - h + 1] == data.episode[h - 1 :])[:, 0]).flatten()
        if len(starts):
            rows = starts[:, None] + torch.arange(h, device=starts.device)
            states, _ = agent.imagine(data.s[starts].repeat(particles, 1), data.a[rows].repeat(particles, 1, 1))
            predicted = states[:, -1].view(particles, len(starts), -1).mean(0)
            metrics[f"model/open_loop_error_{h}"] = ((predicted - data.s2[rows[:, -1]]) / scale).abs().mean().item()
    return metrics


@torch.inference_mode()
def draw_particles(agent: Agent, replay: "Replay") -> Figure:
    """The last episode (black), and the particles (orange) that take its actions without looking."""
    data = replay.rows()
    s, a = (column[data.episode[:, 0] == data.episode[-1]][:100] for column in (data.s, data.a))
    figure = Figure(figsize=(8, 6), layout="constrained")
    for i, axes in enumerate(figure.subplots(min(4, s.shape[1]), sharex=True, squeeze=False)[:, 0]):
        for t in range(0, len(s), agent.args.horizon):
            actions = a[t : t + agent.args.horizon].expand(agent.particles, -1, -1)
            states, _ = agent.imagine(s[t].expand(agent.particles, -1), actions)
            states = torch.cat([s[t].expand(agent.particles, 1, -1), states], 1)
            axes.plot(range(t, t + states.shape[1]), states[:, :, i].T.cpu(), color="tab:orange", linewidth=0.6)
        axes.plot(s[:, i].cpu(), color="black")
        margin = 0.3 * (s[:, i].max() - s[:, i].min()).item() + 1e-3
        axes.set(ylabel=f"s[{i}]", ylim=(s[:, i].min().item() - margin, s[:, i].max().item() + margin))
    axes.set_xlabel("step of the episode")
    figure.suptitle(f"step {replay.size:,}: the last episode (black) and {agent.args.horizon}-step predictions")
    return figure


# ── Training ──────────────────────────────────────────────────────────────────────────────────────────────────────


def train(args: Args) -> None:
    torch.manual_seed(args.seed)
    env, test_env = make_env(args), make_env(args)
    agent, replay = Agent(env, args), Replay(args.total_timesteps, env, args.device)
    optimizer = make_optimizer(agent.model, args)
    run = Run(args, agent=agent, optimizer=optimizer, replay=replay)

    while run.unfinished():
        obs, info = env.reset(seed=run.begin_episode())
        agent.reset()
        over = False
        while not over and run.step < args.total_timesteps:
            if run.step < args.random_steps:
                # (1) act at random for one trial
                a = torch.lerp(agent.low, agent.high, torch.rand_like(agent.low)).cpu().numpy()
            else:
                # (2) improve a sequence of actions by CEM, (3) execute only the first one
                a = agent(obs)
            next_obs, r, terminated, truncated, info = env.step(a)
            # (4) add the transition to the data
            replay.add(obs, a, r, next_obs, terminated, run.episode_start)
            obs, over = next_obs, terminated or truncated
            run.count_steps()
            # (5) after each trial, train the ensemble further
            if run.step >= args.random_steps and (run.step - args.random_steps) % args.refit_every == 0:
                if run.step > args.random_steps:
                    for tag, value in heldout_metrics(agent, replay, run.step - args.refit_every).items():
                        run.log(tag, value)
                run.log("losses/model", fit(agent.model, optimizer, replay.rows(), args))
        run.end_episode(info)
        if run.due(args.picture_every):
            with torch.random.fork_rng():
                run.picture(draw_particles(agent, replay))
        if run.due(args.eval_every):
            run.evaluate(agent, test_env)
    run.close()


# ── The task: rewards as functions of batches, for tasks that never terminate; elsewhere both are learned ─────────


def make_task(args: Args, **kwargs) -> gym.Env:
    env = gym.make(args.env_id, **kwargs)
    for name, space in (("observations", env.observation_space), ("actions", env.action_space)):
        if not (isinstance(space, gym.spaces.Box) and len(space.shape) == 1):
            hint = " gymnasium.wrappers.FlattenObservation makes one." if name == "observations" else ""
            raise UserError(f"the {name} of {env.spec.id} are {space}, and a vector of real numbers is needed.{hint}")
    if not env.action_space.is_bounded():
        raise UserError(f"the actions of {env.spec.id} are unbounded: use gymnasium.wrappers.TransformAction")
    return env


def pendulum_reward(s: Tensor, a: Tensor, s2: Tensor) -> Tensor:
    angle = torch.atan2(s[..., 1], s[..., 0])  # s = (cos θ, sin θ, θ'), upright at θ = 0
    return -(angle.square() + 0.1 * s[..., 2].square() + 0.001 * a[..., 0].square())


def cart_pole_reward(s: Tensor, a: Tensor, s2: Tensor) -> Tensor:
    """How close the tip of the pole is to its highest point above the centre: exp(−d² / 0.6²) − 0.01 a²."""
    x, cos, sin = s2[..., 0], s2[..., 2], s2[..., 3]
    return torch.exp(-((x + 0.6 * sin) ** 2 + (0.6 + 0.6 * cos) ** 2) / 0.36) - 0.01 * a[..., 0] ** 2


REWARDS = {"CartPoleSwingUp-v0": cart_pole_reward, "Pendulum-v1": pendulum_reward}


class CartPoleSwingUp(gym.Env):
    """The paper's cart-pole: s = (x, x', cos θ, sin θ, θ'), hanging at θ = 0; a is the force on the cart in 100 N."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 25}
    observation_space = gym.spaces.Box(-np.inf, np.inf, (5,), np.float64)
    action_space = gym.spaces.Box(-3, 3, (1,), np.float32)

    def __init__(self, render_mode: Optional[str] = None):
        self.render_mode = render_mode

    def reset(self, *, seed: Optional[int] = None, options: Optional[dict] = None):
        super().reset(seed=seed)
        self.x, self.v, self.angle, self.w = self.np_random.normal(0, 0.1, 4)
        return self.observe(), {}

    def observe(self) -> np.ndarray:
        return np.array([self.x, self.v, np.cos(self.angle), np.sin(self.angle), self.w])

    def step(self, action: np.ndarray):
        lever, mass, moment = 5.019 * 0.3, 10.472 + 5.019, 0.1887 + 5.019 * 0.3**2  # kg m, kg, kg m² of cart and pole
        for _ in range(20):  # semi-implicit Euler, 2 ms each
            sin, cos = np.sin(self.angle), lever * np.cos(self.angle)
            # [mass, cos; cos, moment] [x''; θ''] = [push; turn], both with friction of 1 N s/m and 1 N m s
            push = 100 * np.clip(action[0], -3, 3) - self.v + lever * self.w**2 * sin
            turn = -lever * 9.81 * sin - self.w
            self.v += 0.002 * (moment * push - cos * turn) / (mass * moment - cos**2)
            self.w += 0.002 * (mass * turn - cos * push) / (mass * moment - cos**2)
            self.x, self.angle = self.x + 0.002 * self.v, self.angle + 0.002 * self.w
            if abs(self.x) > 2.5:  # the end of the rail stops the cart, and its momentum turns the pole
                self.x, self.v, self.w = np.clip(self.x, -2.5, 2.5), 0.0, self.w + self.v * cos / moment
        s2 = torch.from_numpy(self.observe())
        return s2.numpy(), float(cart_pole_reward(s2, torch.as_tensor(action), s2)), False, False, {}

    def render(self) -> np.ndarray:
        image = Image.new("RGB", (400, 240), "white")
        pen, x = ImageDraw.Draw(image), 200 + 70 * self.x
        pen.rectangle((x - 20, 110, x + 20, 130), fill="dimgray")
        pen.line((x, 120, x + 72 * np.sin(self.angle), 120 + 72 * np.cos(self.angle)), fill="crimson", width=6)
        return np.asarray(image)


if "CartPoleSwingUp-v0" not in gym.registry:
    gym.register("CartPoleSwingUp-v0", entry_point=CartPoleSwingUp, max_episode_steps=200)


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
