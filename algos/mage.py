# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "numpy>=2.0,<3", "gymnasium>=1.3,<2", "mujoco>=3.3,<5", "imageio>=2.34,<3", "tyro>=1.0.16,<2",
#     "tensorboard>=2.18,<3", "tqdm>=4.66,<5", "pillow>=11,<14", "matplotlib>=3.9,<4", "pygame-ce>=2.5,<3",
# ]
# ///
"""MAGE: train the critic for the gradient that improves the policy.

A deterministic policy is improved along ∇_a Q(s, a), but critics are usually trained on values only. A differentiable
model of the environment also gives a target for the gradient: that of the Bellman target, through reward, dynamics,
next action and next value. MAGE trains the critics on both. Everything else is TD3 on one-step imagined transitions.

Paper: D'Oro, Jaśkowski, "How to Learn a Useful Critic? Model-based Action-Gradient-Estimator Policy Optimization",
NeurIPS 2020, arXiv 2004.14309. Official code: github.com/nnaisense/MAGE. TD3: Fujimoto et al. 2018, arXiv 1802.09477.

The algorithm (Algorithm 1 of the paper):
    (1) act with the policy π_θ and noise (at first at random), and add the transition to the replay B
    (2) every 25 steps, train the model p_ω on B by maximum likelihood
    (3) for states s of B imagine ŝ ~ p_ω(·|s, a), a = π_θ(s); compute the target y = r + γ Q̄(ŝ, π̄(ŝ)) and ∇_a y
    (4) train the critics Q_φ: the value on y, and ∇_a Q_φ on ∇_a y
    (5) improve π_θ along ∇_a Q_φ, and let the target networks follow

Symbols: p_ω → Ensemble, B → replay, ŝ → s2, Q̄, π̄ → target_critics, target_policy, δ̂ → y − Q_φ(s, a),
    1/λ → gradient_weight.

Usage (return: mean and 95 % interval over seeds; docs/mage.md has the curves):
    python algos/mage.py                                    # return −157 [−181, −132]
    python algos/mage.py invertedpendulum                   # not measured yet
    python algos/mage.py --gradient-weight 0                # Dyna-TD3, the paper's ablation
    python algos/mage.py --gradient-weight 0 --no-imagine   # TD3: real transitions, no model
    python algos/mage.py --env-id my_module:MyEnv-v0        # any Gymnasium task: its reward and end are learned too
    python algos/mage.py --evaluate runs/NAME --episodes 10 --capture-video

Differences from the paper and its code: y does not depend on φ, so ∇_a y takes one first-order pass instead of a double
backward pass, with the same loss and gradients; each row of a batch goes through one member of the ensemble instead of
all of them; networks, batches and the number of random steps are smaller, sized for a laptop; an agent whose loss
diverges is not silently replaced by a new one.
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

ALGORITHM = "mage"


@dataclass
class Args:  # tyro turns each field into a flag and each comment into its help
    env_id: str = "Pendulum-v1"  # any environment with vector observations and bounded continuous actions
    total_timesteps: int = 3_000  # environment steps, including the random ones
    random_steps: int = 400  # steps of random actions before the first update of critics and policy
    imagine: bool = True  # train on imagined transitions; --no-imagine trains on those of the replay, without a model
    gradient_weight: float = 5.0  # 1/λ: weight of the action gradient's loss next to the value's; 0 is Dyna-TD3
    updates: int = 10  # updates of the critics per environment step
    batch_size: int = 64  # states per update, a multiple of the members
    policy_every: int = 2  # updates of the critics per update of the policy
    gamma: float = 0.99  # γ: discount factor
    tau: float = 0.005  # step size with which the target networks follow
    learning_rate: float = 5e-4  # RAdam's step size for policy and critics
    hidden: int = 64  # units in each of the two hidden layers of policy and critics
    exploration_noise: float = 0.1  # standard deviation of the noise on actions, which are scaled to [−1, 1]
    target_noise: float = 0.2  # standard deviation of the noise on the next action of a target
    noise_clip: float = 0.5  # largest absolute value of that noise
    gradient_clip: float = 5.0  # largest absolute value of each entry of a gradient
    members: int = 8  # networks in the ensemble
    model_layers: int = 2  # hidden layers per member
    model_hidden: int = 64  # units per hidden layer
    model_learning_rate: float = 1e-3  # RAdam's step size for the model
    weight_decay: float = 1e-4  # decoupled weight decay of the model
    model_batch_size: int = 256  # transitions per minibatch and member
    model_every: int = 25  # environment steps between trainings of the model
    model_batches: int = 40  # minibatches per training, rounded up to whole passes over the data
    seed: int = 1  # on one CPU, two runs with the same seed are identical
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu, cuda or mps
    eval_every: int = 200  # steps between evaluations (at the end of an episode, like all that follow)
    picture_every: int = 1_000  # steps between pictures of the critics' action gradients
    checkpoint_every: int = 1_000  # steps between checkpoints; one is also written about every minute
    episodes: int = 10  # episodes per evaluation
    capture_video: bool = False  # save the first episode of each evaluation as a GIF
    run_dir: Optional[str] = None  # output folder; runs/<env>__<algorithm>__<seed>__<time> by default
    resume: Optional[str] = None  # continue the run in this folder with its own settings
    evaluate: Optional[str] = None  # do not train: play with the agent of this run folder

    def __post_init__(self):
        """tyro reports a ValueError raised here as one sentence and exits with code 2."""
        may_be_zero = ("seed", "gradient_weight", "exploration_noise", "target_noise", "noise_clip", "weight_decay")
        for name, value in vars(self).items():
            if type(value) in (int, float) and not (0 < value < math.inf or (value == 0 and name in may_be_zero)):
                raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be a positive number")
        if self.batch_size % self.members:
            raise ValueError(f"--batch-size {self.batch_size} is not a multiple of --members {self.members}")
        if self.gradient_weight and not self.imagine:
            raise ValueError("--no-imagine gives no target for the gradient: add --gradient-weight 0, which is TD3")


PRESETS = {
    "pendulum": ("Pendulum-v1: swing up and balance within 3,000 steps", Args()),
    "invertedpendulum": ("InvertedPendulum-v5: balance within 5,000 steps", Args(
        "InvertedPendulum-v5", 5_000, random_steps=500, eval_every=500)),
}  # fmt: skip


# ── The algorithm ─────────────────────────────────────────────────────────────────────────────────────────────────


class Standardizer(nn.Module):
    """Columns with mean 0 and standard deviation 1 in the data."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))

    def fit(self, x: Tensor) -> None:
        std, mean = torch.std_mean(x, 0, correction=0)
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 1e-6, std, 0.0))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / torch.where(self.std > 0, self.std, 1.0)

    def inverse(self, x: Tensor) -> Tensor:
        """A column that was constant in the data stays constant: a goal must not drift."""
        return self.mean + self.std * x


class MLP(nn.Module):
    """K networks of one shape in a batched module: x [N, ·], or for each its own [K, N, ·] → [K, N, ·]. SiLU has no
    kinks, so that second derivatives exist everywhere."""

    def __init__(self, networks: int, *sizes: int):
        super().__init__()
        self.networks, self.weights, self.biases = networks, nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in pairwise(sizes):
            weights = [nn.init.xavier_uniform_(torch.empty(fan_in, fan_out)) for _ in range(networks)]
            self.weights.append(torch.stack(weights))
            self.biases.append(torch.zeros(networks, 1, fan_out))

    def forward(self, x: Tensor) -> Tensor:
        x = x.expand(self.networks, -1, -1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, F.silu(x) if i else x, weight)  # one product for all networks
        return x


class Ensemble(nn.Module):
    """p_ω(ŝ|s, a): each member predicts a Gaussian over the standardised change of the state. Where the task's reward
    is unknown, one more network learns r(s, a, ŝ), and the members' last output is the log-odds that the episode ends.
    """

    def __init__(self, state_size: int, action_size: int, learn_reward: bool, args: Args):
        super().__init__()
        self.members, self.learn_reward = args.members, learn_reward
        self.sizes, inputs = (state_size, state_size, int(learn_reward)), state_size + action_size
        self.networks = MLP(args.members, inputs, *[args.model_hidden] * args.model_layers, sum(self.sizes))
        self.reward_network = MLP(1, inputs + state_size, 256, 256, 256, 1) if learn_reward else None
        self.inputs, self.changes, self.rewards = Standardizer(inputs), Standardizer(state_size), Standardizer(1)

    def forward(self, s: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """s [B, N, D], a [B, N, A] → mean and log-variance [B, N, D] of the changes, log-odds [B, N, ·] of an end."""
        mean, logvar, logit = self.networks(self.inputs(torch.cat([s, a], -1))).split(self.sizes, -1)
        return mean, -5 + 4 * torch.sigmoid(logvar), logit  # the code's range of log σ²

    def reward(self, s: Tensor, a: Tensor, s2: Tensor) -> Tensor:
        """The standardised reward [..., 1]."""
        x = torch.cat([self.inputs(torch.cat([s, a], -1)), self.changes(s2 - s)], -1)
        return self.reward_network(x.flatten(0, -2)).view(*x.shape[:-1], 1)


def model_loss(model: Ensemble, s: Tensor, a: Tensor, r: Tensor, s2: Tensor, terminated: Tensor) -> Tensor:
    """Each argument [B, N, ·]: the mean over the members."""
    mean, logvar, logit = model(s, a)
    # Algorithm 1, maximum likelihood: E[(μ_ω(s, a) − Δ)² / σ_ω²(s, a) + log σ_ω²(s, a)], Δ = s' − s standardised
    loss = ((mean - model.changes(s2 - s)).square() * (-logvar).exp() + logvar).mean()
    if model.learn_reward:
        loss = loss + F.mse_loss(model.reward(s, a, s2), model.rewards(r))
        loss = loss + F.binary_cross_entropy_with_logits(logit, terminated)
    return loss


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, clip: float) -> None:
    """Only the optimiser's own parameters receive a gradient."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad()
    loss.backward(inputs=parameters)
    nn.utils.clip_grad_value_(parameters, clip)
    optimizer.step()


def fit(model: Ensemble, optimizer: torch.optim.Optimizer, data: "Transitions", args: Args) -> float:
    """Step (2): whole passes over the data, each member in its own order. Returns the mean loss."""
    model.inputs.fit(torch.cat([data.s, data.a], 1))
    model.changes.fit(data.s2 - data.s)
    model.rewards.fit(data.r)
    count, size, losses = len(data.s), min(args.model_batch_size, len(data.s)), []
    while len(losses) < args.model_batches:
        order = torch.rand(model.members, count).argsort(1).to(data.s.device)
        for rows in order[:, : count - count % size].split(size, 1):  # a smaller last minibatch is left out
            loss = model_loss(model, *(column[rows] for column in data[:5]))
            descend(optimizer, loss, args.gradient_clip)
            losses.append(loss.detach())
    return torch.stack(losses).mean().item()


class Agent(nn.Module):
    """Policy, critics, their targets and the model. Inside, actions are scaled to [−1, 1]."""

    player = "policy"

    def __init__(self, env: gym.Env, args: Args):
        super().__init__()
        self.args, self.reward = args, REWARDS.get(args.env_id)
        (state_size,), (action_size,) = env.observation_space.shape, env.action_space.shape
        self.states = Standardizer(state_size)
        self.policy = MLP(1, state_size, args.hidden, args.hidden, action_size)
        self.critics = MLP(2, state_size + action_size, args.hidden, args.hidden, 1)
        self.target_policy = copy.deepcopy(self.policy).requires_grad_(False)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.model = Ensemble(state_size, action_size, self.reward is None, args)
        self.to(args.device)
        self.low = torch.as_tensor(env.action_space.low, dtype=torch.float32, device=args.device)
        self.high = torch.as_tensor(env.action_space.high, dtype=torch.float32, device=args.device)

    def reset(self) -> None:
        """The policy has no memory."""

    def unscale(self, a: Tensor) -> Tensor:
        """From [−1, 1] to the task's box."""
        return torch.lerp(self.low, self.high, (a + 1) / 2)

    @torch.inference_mode()
    def act(self, obs: np.ndarray, noise: float) -> Tensor:
        a = self.pi(self.policy, torch.as_tensor(obs[None], dtype=torch.float32, device=self.low.device))[0]
        return (a + noise * torch.randn_like(a)).clamp(-1, 1)

    def forward(self, obs: np.ndarray) -> np.ndarray:
        return self.unscale(self.act(obs, noise=0.0)).cpu().numpy()

    def pi(self, policy: MLP, s: Tensor) -> Tensor:
        return torch.tanh(policy(self.states(s))[0])

    def q(self, critics: MLP, s: Tensor, a: Tensor) -> Tensor:
        """s [N, D], a [N, A] or, for each critic its own, [2, N, A] → [2, N]."""
        return critics(torch.cat([self.states(s).expand(*a.shape[:-1], -1), a], -1))[..., 0]

    def imagine(self, s: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ŝ, reward and end of rows [N, ·], differentiable in a. The first N/B rows go through the first member, ..."""
        mean, logvar, logit = self.model(*(x.unflatten(0, (self.model.members, -1)) for x in (s, a)))
        # ŝ ~ p_ω(·|s, a), reparameterised: ŝ = s + μ_ω + σ_ω ε
        change = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        s2 = s + self.model.changes.inverse(change).flatten(0, 1)
        if self.reward:
            return s2, *self.reward(s, self.unscale(a), s2)
        r = self.model.rewards.inverse(self.model.reward(s, a, s2))[:, 0]
        return s2, r, torch.rand_like(r) < logit.flatten().sigmoid()

    def target(self, s2: Tensor, r: Tensor, terminated: Tensor) -> Tensor:
        """y [N] of TD3 (its Algorithm 1)."""
        a2 = self.pi(self.target_policy, s2)
        noise = (self.args.target_noise * torch.randn_like(a2)).clamp(-self.args.noise_clip, self.args.noise_clip)
        # TD3: y = r + γ min_i Q̄_i(s', π̄(s') + ε), ε ~ clip(N(0, σ²), −c, c)
        q = self.q(self.target_critics, s2, (a2 + noise).clamp(-1, 1)).amin(0)
        return r + self.args.gamma * torch.where(terminated, 0.0, q)

    def imagined_target(self, s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """Step (3): y [N] and ∇_a y [N, A], along all paths of the paper's Figure 1."""
        a = a.detach().requires_grad_()
        y = self.target(*self.imagine(s, a))
        # ∇_a δ̂ = ∇_a y − ∇_a Q_φ, and y does not depend on φ: ∇_a y is a constant for the critics. The plain form,
        # grad((y − Q_φ).sum(), a, create_graph=True), differentiates twice through model, reward and target networks.
        (slope,) = torch.autograd.grad(y.sum(), a)
        return y.detach(), slope


def critic_losses(agent: Agent, s: Tensor, a: Tensor, y: Tensor, slope: Optional[Tensor]) -> tuple[Tensor, Tensor]:
    """Step (4): the losses of the values and of the action gradients, means over both critics."""
    a = a.detach().expand(2, -1, -1).requires_grad_()
    q = agent.q(agent.critics, s, a)
    # Algorithm 1: |δ̂| and ‖∇_a δ̂‖ at a = π_θ(s), where δ̂ = y − Q_φ(s, a); in the code both under a Huber loss
    value_loss = F.huber_loss(q, y.expand_as(q))
    if slope is None:
        return value_loss, torch.zeros(())
    (critic_slope,) = torch.autograd.grad(q.sum(), a, create_graph=True)  # each critic's own, [2, N, A]
    distance = torch.linalg.vector_norm(slope - critic_slope, dim=-1)
    return value_loss, F.huber_loss(distance, torch.zeros_like(distance))


def policy_loss(agent: Agent, s: Tensor) -> Tensor:
    """Step (5): −E[min_i Q_i(s, π_θ(s))]; the minimum is the code's, TD3 takes the first critic."""
    return -agent.q(agent.critics, s, agent.pi(agent.policy, s)).amin(0).mean()


@torch.no_grad()
def follow(target: nn.Module, network: nn.Module, tau: float) -> None:
    for old, new in zip(target.parameters(), network.parameters(), strict=True):
        old.lerp_(new, tau)


# ── What the model believes ───────────────────────────────────────────────────────────────────────────────────────


@torch.inference_mode()
def heldout_metrics(agent: Agent, replay: "Replay", first: int) -> dict[str, float]:
    """On the rows from `first` on, which the model has not been trained on yet; states in units of their std."""
    data, scale, members = replay.rows(slice(first, None)), replay.rows().s.std(0).clamp(min=1e-6), agent.model.members
    batch = (column.expand(members, *column.shape) for column in data[:5])
    metrics = {"model/heldout_loss": model_loss(agent.model, *batch).item()}
    for h in (1, 5, 20):  # start in a real state and take the actions that were taken there, without looking
        starts = torch.nonzero((data.episode[: len(data.s) - h + 1] == data.episode[h - 1 :])[:, 0]).flatten()
        if len(starts):
            s = data.s[starts].repeat(members, 1)
            for t in range(h):
                s, _, _ = agent.imagine(s, data.a[starts + t].repeat(members, 1))
            error = s.view(members, len(starts), -1).mean(0) - data.s2[starts + h - 1]
            metrics[f"model/open_loop_error_{h}"] = (error / scale).abs().mean().item()
    return metrics


def draw_slopes(agent: Agent, replay: "Replay") -> Figure:
    """Six states of the last episode: the critics over the first action, and the two slopes that step (4) equates."""
    data, copies, reach = replay.rows(), 20 * agent.model.members, np.array([-0.4, 0.4])
    s = data.s[data.episode[:, 0] == data.episode[-1]]
    steps = torch.linspace(0, len(s) - 1, 6).long()
    s, a = s[steps], agent.pi(agent.policy, s[steps]).detach().requires_grad_()
    q = agent.q(agent.critics, s, a).amin(0)
    (critic_slope,) = torch.autograd.grad(q.sum(), a)
    samples = agent.imagined_target(s.repeat(copies, 1), a.repeat(copies, 1))
    y, slope = (x.unflatten(0, (copies, 6)).mean(0) for x in samples)
    actions = a.detach().repeat(41, 1, 1)
    actions[..., 0] = torch.linspace(-1, 1, 41, device=s.device)[:, None]
    curves = agent.q(agent.critics, s.repeat(41, 1), actions.flatten(0, 1)).amin(0).view(41, 6).detach()
    lines = (q, critic_slope, "critics: value and slope at a = π(s)"), (y, slope, "their target, through the model")
    figure = Figure(figsize=(10, 6), layout="constrained")
    for i, axes in enumerate(figure.subplots(2, 3, sharex=True).flat):
        axes.plot(actions[:, i, 0].cpu(), curves[:, i].cpu(), color="black", label="critics: Q(s, a)")
        for value, gradient, label in lines[: 1 + agent.args.imagine]:
            tangent = value[i].item() + gradient[i, 0].item() * reach
            axes.plot(a[i, 0].item() + reach, tangent, linewidth=3, label=label)
        axes.set(xlabel="first action, scaled to [−1, 1]", ylabel="value", title=f"step {steps[i]} of the episode")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(f"step {replay.size:,}: value and slope of the first action, in six states of the last episode")
    return figure


# ── Training ──────────────────────────────────────────────────────────────────────────────────────────────────────


def train(args: Args) -> None:
    torch.manual_seed(args.seed)
    env, test_env = make_env(args), make_env(args)
    agent, replay = Agent(env, args), Replay(args.total_timesteps, env, args.device)
    model_optimizer = torch.optim.RAdam(agent.model.parameters(), args.model_learning_rate, foreach=True,
                                        weight_decay=args.weight_decay, decoupled_weight_decay=True)  # fmt: skip
    critic_optimizer = torch.optim.RAdam(agent.critics.parameters(), args.learning_rate, foreach=True)
    policy_optimizer = torch.optim.RAdam(agent.policy.parameters(), args.learning_rate, foreach=True)
    run = Run(args, agent=agent, replay=replay, model_optimizer=model_optimizer, critic_optimizer=critic_optimizer,
              policy_optimizer=policy_optimizer)  # fmt: skip
    losses = {}

    while run.unfinished():
        obs, info = env.reset(seed=run.begin_episode())
        over = False
        while not over and run.step < args.total_timesteps:
            # (1) act with the policy and noise, at first at random; add the transition to B
            if run.step < args.random_steps:
                a = 2 * torch.rand_like(agent.low) - 1
            else:
                a = agent.act(obs, args.exploration_noise)
            next_obs, r, terminated, truncated, info = env.step(agent.unscale(a).cpu().numpy())
            replay.add(obs, a.cpu().numpy(), r, next_obs, terminated, run.episode_start)
            obs, over = next_obs, terminated or truncated
            run.count_steps()
            # (2) every 25 steps, train p_ω on B by maximum likelihood
            if run.step % args.model_every == 0:
                metrics = {f"losses/{name}": value.item() for name, value in losses.items()}
                if args.imagine:
                    metrics |= heldout_metrics(agent, replay, run.step - args.model_every)
                    metrics["losses/model"] = fit(agent.model, model_optimizer, replay.rows(), args)
                for tag, value in metrics.items():
                    run.log(tag, value)
                agent.states.fit(replay.rows().s)
            for i in range(args.updates if run.step >= args.random_steps else 0):
                batch = replay.rows(torch.randint(replay.size, (args.batch_size,), device=args.device))
                # (3) imagine ŝ; compute the target and its gradient in a
                if args.imagine:
                    a = agent.pi(agent.policy, batch.s)
                    y, slope = agent.imagined_target(batch.s, a)
                else:
                    a, slope = batch.a, None
                    y = agent.target(batch.s2, batch.r[:, 0], batch.terminated[:, 0].bool())
                # (4) train the critics. Algorithm 1, divided by λ: φ ← φ − α_Q ∇_φ (|δ̂| + 1/λ ‖∇_a δ̂‖)
                losses["critic"], losses["action_gradient"] = critic_losses(agent, batch.s, a, y, slope)
                loss = losses["critic"] + args.gradient_weight * losses["action_gradient"]
                descend(critic_optimizer, loss, args.gradient_clip)
                follow(agent.target_critics, agent.critics, args.tau)
                # (5) improve π_θ along ∇_a Q_φ; let the targets follow
                if (run.step * args.updates + i) % args.policy_every == 0:
                    losses["policy"] = policy_loss(agent, batch.s)
                    descend(policy_optimizer, losses["policy"], args.gradient_clip)
                    follow(agent.target_policy, agent.policy, args.tau)
        run.end_episode(info)
        if run.due(args.picture_every):
            with torch.random.fork_rng():
                run.picture(draw_slopes(agent, replay))
        if run.due(args.eval_every):
            run.evaluate(agent, test_env)
    run.close()


# ── The task: differentiable rewards and ends as functions of batches; elsewhere both are learned ─────────────────


def make_task(args: Args, **kwargs) -> gym.Env:
    env = gym.make(args.env_id, **kwargs)
    for name, space in (("observations", env.observation_space), ("actions", env.action_space)):
        if not (isinstance(space, gym.spaces.Box) and len(space.shape) == 1):
            hint = " gymnasium.wrappers.FlattenObservation makes one." if name == "observations" else ""
            raise UserError(f"the {name} of {env.spec.id} are {space}, and a vector of real numbers is needed.{hint}")
    if not env.action_space.is_bounded():
        raise UserError(f"the actions of {env.spec.id} are unbounded: use gymnasium.wrappers.TransformAction")
    return env


def pendulum_reward(s: Tensor, a: Tensor, s2: Tensor) -> tuple[Tensor, Tensor]:
    angle = torch.atan2(s[..., 1], s[..., 0])  # s = (cos θ, sin θ, θ'), upright at θ = 0
    reward = -(angle.square() + 0.1 * s[..., 2].square() + 0.001 * a[..., 0].square())
    return reward, torch.zeros_like(reward, dtype=torch.bool)


def inverted_pendulum_reward(s: Tensor, a: Tensor, s2: Tensor) -> tuple[Tensor, Tensor]:
    fallen = s2[..., 1].abs() > 0.2  # s = (x, θ, x', θ')
    return (~fallen).float(), fallen


REWARDS = {"InvertedPendulum-v5": inverted_pendulum_reward, "Pendulum-v1": pendulum_reward}


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
