# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "numpy>=2.0,<3", "gymnasium>=1.3,<2", "ale-py>=0.11.1,<1", "tyro>=1.0.16,<2",
#     "tensorboard>=2.18,<3", "tqdm>=4.66,<5", "pillow>=11,<14", "matplotlib>=3.9,<4", "pygame-ce>=2.5,<3",
# ]
# ///
"""ICM: explore by curiosity, the error of a prediction of what one's own actions do.

Where rewards are far away, a policy gradient has nothing to follow. This agent rewards itself: a forward model
predicts the features of the next observation, and its error is an intrinsic reward. The features are learned by an
inverse model, which predicts the action from two successive observations, so that they need not hold what the agent
can neither cause nor be affected by: a screen full of noise would be an endless source of prediction error in pixels.

Paper: Pathak, Agrawal, Efros, Darrell, "Curiosity-driven Exploration by Self-supervised Prediction", ICML 2017,
arXiv 1705.05363. Official code: github.com/pathak22/noreward-rl. Normalised rewards, and random features and pixels as
controls: Burda et al., "Large-Scale Study of Curiosity-Driven Learning", ICLR 2019, arXiv 1808.04355.

The algorithm (section 2 of the paper, with PPO as its policy optimiser):
    (1) act with π for some steps in many copies of the task
    (2) add to each reward r^e the intrinsic reward r^i, the error of the forward model (Eq. 6)
    (3) compute advantages of the sum
    (4) for some epochs over these steps, train policy and value by PPO's clipped loss (Eq. 1),
    (5) the inverse model and its encoder (Eq. 3), and the forward model (Eq. 5)

Symbols: π → Agent.actor, φ → ICM.encoder, g → ICM.inverse, f → ICM.forward_model, L_I → inverse_loss,
    L_F → forward_error, β → beta.

Usage (return: mean and 95 % interval over seeds; docs/icm.md has the curves):
    python algos/icm.py                                     # 4.7 minutes, return 1.000 [1.000, 1.000]
    python algos/icm.py maze --reward extrinsic             # 2.4 minutes, return 0.000 [0.000, 0.000]
    python algos/icm.py mountaincar                         # 3.9 minutes, return −121 [−130, −114]
    python algos/icm.py --env-id NoisyMaze-v0 --features pixels   # what inverse features are for
    python algos/icm.py --evaluate runs/NAME --episodes 10 --capture-video

Differences from the paper and its code: PPO replaces A3C, and no policy has an LSTM; r^e and r^i are each divided by
the running standard deviation of their discounted sums (Burda et al.), which replaces η; the encoder learns from the
inverse model alone (section 2.2), while Eq. 7 and the official code let the forward loss reach it: --joint; the forward
model predicts the change of the features, which have a fixed norm.
"""

import argparse
import io
import math
import os
import shlex
import signal
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, Optional

import ale_py
import gymnasium as gym
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

ALGORITHM = "icm"


@dataclass
class Args:  # tyro turns each field into a flag and each comment into its help
    env_id: str = "CuriousMaze-v0"  # any environment with discrete actions and vectors or images as observations
    total_timesteps: int = 1_000_000  # environment steps, those of all copies together
    reward: Literal["both", "extrinsic", "intrinsic"] = "both"  # extrinsic: PPO alone; intrinsic: curiosity alone
    features: Literal["inverse", "random", "pixels"] = "inverse"  # φ: learned, a fixed network, or the observation
    joint: bool = False  # the forward model's loss trains the encoder too
    intrinsic_weight: float = 1.0  # weight of the normalised intrinsic reward
    extrinsic_weight: float = 1.0  # weight of the normalised extrinsic reward
    beta: float = 0.2  # β: weight of the forward model's loss, with 1 − β for the inverse model's
    feature_size: int = 64  # features of a vector or small image; larger images have those of the convolutions
    model_hidden: int = 256  # units in the hidden layer of forward and inverse model
    envs: int = 64  # copies of the task
    horizon: int = 64  # steps in each copy between updates
    epochs: int = 4  # passes over these steps per update
    minibatches: int = 4  # minibatches per pass
    learning_rate: float = 5e-4  # Adam's step size, which falls linearly to 0
    gamma: float = 0.99  # γ: discount factor
    gae_lambda: float = 0.95  # λ of generalised advantage estimation
    clip: float = 0.2  # ε: how far PPO's probability ratio may leave 1
    entropy_weight: float = 0.01  # weight of the policy's entropy
    value_weight: float = 0.5  # weight of the value's loss
    gradient_clip: float = 0.5  # the norm of the gradient of policy and value is clipped to this
    hidden: int = 64  # units in each of the two layers of policy, value and encoder
    seed: int = 1  # on one CPU, two runs with the same seed are identical
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu, cuda or mps
    eval_every: int = 100_000  # steps between evaluations (after an update, like all that follow)
    picture_every: int = 100_000  # steps between pictures of the intrinsic reward
    checkpoint_every: int = 100_000  # steps between checkpoints; one is also written about every minute
    episodes: int = 10  # episodes per evaluation
    capture_video: bool = False  # save the first episode of each evaluation as a GIF
    run_dir: Optional[str] = None  # output folder; runs/<env>__<algorithm>__<seed>__<time> by default
    resume: Optional[str] = None  # continue the run in this folder with its own settings
    evaluate: Optional[str] = None  # do not train: play with the agent of this run folder

    def __post_init__(self):
        """tyro reports a ValueError raised here as one sentence and exits with code 2."""
        may_be_zero = ("seed", "intrinsic_weight", "extrinsic_weight", "beta", "gae_lambda", "entropy_weight")
        for name, value in vars(self).items():
            if type(value) in (int, float) and not (0 < value < math.inf or (value == 0 and name in may_be_zero)):
                raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be a positive number")
        for name in ("gamma", "gae_lambda", "beta"):
            if getattr(self, name) > 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}: it must not exceed 1")
        if self.joint and self.features != "inverse":
            raise ValueError(f"--joint trains the encoder, and --features {self.features} has none to train")


PRESETS = {
    "maze": ("one reward at the end of a maze, 62 steps away, found by curiosity", Args()),
    "mountaincar": ("MountainCar-v0: −1 per step until the top is reached", Args(
        "MountainCar-v0", 300_000, envs=16, horizon=16, gae_lambda=0.98, entropy_weight=0.0, eval_every=20_000,
        picture_every=50_000)),
    "breakout": ("Breakout by curiosity alone at the settings of Burda et al.: for a GPU", Args(
        "Stacked/Breakout-v5", 100_000_000, reward="intrinsic", feature_size=512, model_hidden=512, hidden=512,
        envs=128, horizon=128, epochs=3, minibatches=8, learning_rate=1e-4, clip=0.1, entropy_weight=0.001,
        eval_every=1_000_000, picture_every=1_000_000, checkpoint_every=1_000_000)),
}  # fmt: skip


# ── The algorithm ─────────────────────────────────────────────────────────────────────────────────────────────────


def linear(inputs: int, outputs: int, gain: float = math.sqrt(2)) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def make_encoder(shape: tuple[int, ...], hidden: int, size: int) -> tuple[nn.Module, int]:
    """The paper's four convolutions for an image, two layers for a vector or small image; and its number of outputs."""
    if len(shape) == 3 and min(shape[1:]) >= 32:
        widths = shape[0], 32, 32, 32
        convolutions = [nn.Conv2d(widths[i], 32, 3, stride=2, padding=1) for i in range(4)]
        network = nn.Sequential(*(part for layer in convolutions for part in (layer, nn.ELU())), nn.Flatten())
        return network, network(torch.zeros(1, *shape)).shape[1]
    layers = linear(math.prod(shape), hidden), nn.Tanh(), linear(hidden, size), nn.Tanh()
    return nn.Sequential(nn.Flatten(), *layers), size


class Moments(nn.Module):
    """Running mean and variance of each entry of x, all rows [B, *shape] so far taken together."""

    def __init__(self, shape: tuple[int, ...] = ()):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))
        self.register_buffer("count", torch.tensor(0.0))

    def update(self, x: Tensor) -> None:
        share = len(x) / (self.count + len(x))  # of the new rows
        difference = x.mean(0) - self.mean
        self.var += share * (x.var(0, correction=0) - self.var + (1 - share) * difference.square())
        self.mean += share * difference
        self.count += len(x)


class RewardScale(nn.Module):
    """Divides rewards [T, N] by the running standard deviation of their discounted sums."""

    def __init__(self, args: Args):
        super().__init__()
        self.gamma, self.moments = args.gamma, Moments()
        self.register_buffer("sums", torch.zeros(args.envs))

    def forward(self, reward: Tensor, over: Tensor) -> Tensor:
        sums = []
        for r, end in zip(reward, over, strict=True):
            self.sums = self.gamma * self.sums + r
            sums.append(self.sums)
            self.sums = self.sums * ~end
        self.moments.update(torch.cat(sums))
        return (reward / (self.moments.var + 1e-8).sqrt()).clamp(-10, 10)


class Agent(nn.Module):
    """π and V: two networks without shared layers, and the running normalisation of what they see."""

    player = "greedy policy"

    def __init__(self, env: gym.Env, args: Args):
        super().__init__()
        shape, self.device = env.observation_space.shape, args.device
        self.moments = Moments(shape)
        (actor, width), (critic, _) = (make_encoder(shape, args.hidden, args.hidden) for _ in range(2))
        self.actor = nn.Sequential(actor, linear(width, int(env.action_space.n), 0.01))
        self.critic = nn.Sequential(critic, linear(width, 1, 1.0))
        self.to(args.device)

    def normalise(self, obs: np.ndarray) -> Tensor:
        """Observations [B, ...] with mean 0 and standard deviation 1, clipped. An image has one standard deviation: a
        pixel that hardly ever changes would otherwise count most when it does."""
        x, var = torch.as_tensor(obs, dtype=torch.float32, device=self.device), self.moments.var
        var = var.mean() if var.ndim == 3 else var
        return ((x - self.moments.mean) / (var + 1e-8).sqrt()).clamp(-10, 10)

    def reset(self) -> None:
        pass

    @torch.inference_mode()
    def forward(self, obs: np.ndarray) -> int:
        return self.actor(self.normalise(obs[None])).argmax().item()


class ICM(nn.Module):
    """The intrinsic curiosity module: the encoder φ, the inverse model g and the forward model f."""

    def __init__(self, env: gym.Env, args: Args):
        super().__init__()
        shape, self.actions, self.args = env.observation_space.shape, int(env.action_space.n), args
        self.encoder, size = make_encoder(shape, args.hidden, args.feature_size)
        if args.features == "pixels":
            self.encoder, size = nn.Flatten(), math.prod(shape)
        self.encoder.requires_grad_(args.features == "inverse")
        hidden = args.model_hidden
        self.inverse = nn.Sequential(linear(2 * size, hidden), nn.ReLU(), linear(hidden, self.actions, 0.01))
        self.forward_model = nn.Sequential(linear(size + self.actions, hidden), nn.ReLU(), linear(hidden, size, 0.01))
        self.to(args.device)

    def phi(self, s: Tensor) -> Tensor:
        """φ(s) [B, F], of a fixed norm: otherwise intrinsic rewards grow with the features."""
        x = self.encoder(s)
        return x if self.args.features == "pixels" else F.layer_norm(x, x.shape[-1:])

    def forward_error(self, phi: Tensor, a: Tensor, phi2: Tensor) -> Tensor:
        """Eq. 5: L_F = ½ ‖φ̂(s_{t+1}) − φ(s_{t+1})‖² for each row"""
        # Eq. 4: φ̂(s_{t+1}) = f(φ(s_t), a_t)
        predicted = phi + self.forward_model(torch.cat([phi, F.one_hot(a, self.actions)], 1))
        return 0.5 * (predicted - phi2).square().sum(1)

    @torch.no_grad()
    def intrinsic_reward(self, s: Tensor, a: Tensor, s2: Tensor) -> Tensor:
        """Eq. 6: r^i = η/2 ‖φ̂(s_{t+1}) − φ(s_{t+1})‖², up to η"""
        return self.forward_error(self.phi(s), a, self.phi(s2))

    def losses(self, s: Tensor, a: Tensor, s2: Tensor) -> tuple[Tensor, Tensor]:
        """L_I and L_F. Without a stop-gradient the encoder could make L_F small by making all features alike."""
        phi, phi2 = self.phi(s), self.phi(s2)
        # Eq. 2: â = g(φ(s_t), φ(s_{t+1})), Eq. 3: L_I(â, a), the cross-entropy
        inverse_loss = F.cross_entropy(self.inverse(torch.cat([phi, phi2], 1)), a)
        if not self.args.joint:
            phi, phi2 = phi.detach(), phi2.detach()
        return inverse_loss, self.forward_error(phi, a, phi2).mean()


class Rollout(NamedTuple):
    """T steps of N copies: [T, N, ...], or a minibatch of them [B, ...]."""

    s: Tensor  # normalised
    a: Tensor
    log_prob: Tensor
    value: Tensor
    s2: Tensor  # where the action led, also at the end of an episode
    r: Tensor
    terminated: Tensor
    over: Tensor  # terminated or truncated


@torch.no_grad()
def act(agent: Agent, envs: "Environments", horizon: int) -> tuple[Rollout, Tensor]:
    """Step (1), and the observations as they are, for the running normalisation."""
    steps, seen = [], []
    for _ in range(horizon):
        seen.append(torch.from_numpy(envs.obs.copy()))
        s = agent.normalise(envs.obs)
        policy = Categorical(logits=agent.actor(s), validate_args=False)
        a = policy.sample()
        s2, r, terminated, over = envs.step(a.tolist())
        r, terminated, over = (torch.from_numpy(x).to(s.device) for x in (r, terminated, over))
        value = agent.critic(s)[:, 0]
        steps.append(Rollout(s, a, policy.log_prob(a), value, agent.normalise(s2), r, terminated, over))
    return Rollout(*map(torch.stack, zip(*steps, strict=True))), torch.cat(seen)


@torch.no_grad()
def gae(r: Tensor, value: Tensor, next_value: Tensor, terminated: Tensor, over: Tensor, args: Args) -> Tensor:
    """Step (3): Â_t = δ_t + γλ Â_{t+1} with δ_t = r_t + γ V(s_{t+1}) − V(s_t), all [T, N]. V is 0 after a terminal
    state; Â_{t+1} is 0 where an episode is over."""
    delta = r + args.gamma * next_value * ~terminated - value
    advantage, following = torch.empty_like(r), torch.zeros_like(r[0])
    for t in reversed(range(len(r))):
        following = delta[t] + args.gamma * args.gae_lambda * following * ~over[t]
        advantage[t] = following
    return advantage


def ppo_loss(agent: Agent, s: Tensor, a: Tensor, log_prob: Tensor, advantage: Tensor, target: Tensor, args: Args):
    """Step (4): the loss, and its parts as metrics."""
    policy = Categorical(logits=agent.actor(s), validate_args=False)
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    # L = −E[min(ρ Â, clip(ρ, 1 − ε, 1 + ε) Â)], ρ = π(a|s) / π_old(a|s)
    ratio = (policy.log_prob(a) - log_prob).exp()
    policy_loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - args.clip, 1 + args.clip) * advantage).mean()
    value_loss, entropy = F.mse_loss(agent.critic(s)[:, 0], target), policy.entropy().mean()
    loss = policy_loss + args.value_weight * value_loss - args.entropy_weight * entropy
    return loss, {"losses/policy": policy_loss, "losses/value": value_loss, "losses/entropy": entropy}


def update(agent: Agent, icm: ICM, optimizer, batch: Rollout, advantage: Tensor, target: Tensor, args: Args) -> dict:
    """Steps (4) and (5). λ of Eq. 7, which weighs π against the model, has no effect: they share no weights, and the
    steps of Adam do not depend on the size of a loss."""
    loss, metrics = ppo_loss(agent, batch.s, batch.a, batch.log_prob, advantage, target, args)
    if args.reward != "extrinsic":
        inverse_loss, forward_loss = icm.losses(batch.s, batch.a, batch.s2)
        # Eq. 7: (1 − β) L_I + β L_F
        loss = loss + (1 - args.beta) * inverse_loss + args.beta * forward_loss
        metrics |= {"losses/inverse": inverse_loss, "losses/forward": forward_loss}
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(agent.parameters(), args.gradient_clip)
    optimizer.step()
    return {name: value.detach() for name, value in metrics.items()}


# ── What the forward model cannot predict yet ─────────────────────────────────────────────────────────────────────


def draw_curiosity(agent: Agent, icm: ICM, envs: "Environments", rollout: Rollout, reward: Tensor, step: int) -> Figure:
    """In a maze: the visits of each tile and the mean intrinsic reward of its moves. Elsewhere: that of some steps."""
    figure, task = Figure(figsize=(9, 4), dpi=80, layout="constrained"), envs.envs[0].unwrapped
    if envs.visits is None:
        axes = figure.subplots()
        axes.plot(reward[:, :3].cpu())
        axes.set(xlabel="step of the last rollout", ylabel="intrinsic reward", title=f"step {step:,}: three copies")
        return figure
    figure.suptitle(f"step {step:,}: {(envs.visits > 0).sum()} of {len(task.distance)} tiles visited")
    panels = {"log₁₀(visits + 1)": np.where(task.walls, np.nan, np.log10(envs.visits + 1))}
    if icm.args.reward != "extrinsic":
        s, a, s2, tiles = task.all_moves()
        error = icm.intrinsic_reward(agent.normalise(s), torch.from_numpy(a).to(agent.device), agent.normalise(s2))
        curiosity = np.full(task.walls.shape, np.nan)
        curiosity[tuple(tiles.T)] = error.view(-1, 4).mean(1).cpu()
        panels["mean intrinsic reward of the four moves"] = curiosity
    for axes, (label, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        axes.set(xticks=[], yticks=[], facecolor="black")
        figure.colorbar(axes.imshow(values, cmap="viridis", vmin=0), ax=axes, label=label)
        axes.plot(*task.goal[::-1], "*", color="gold", markersize=12)
    return figure


# ── Training ──────────────────────────────────────────────────────────────────────────────────────────────────────


def train(args: Args) -> None:
    torch.manual_seed(args.seed)
    envs, test_env = Environments(args), make_env(args)
    agent, icm = Agent(test_env, args), ICM(test_env, args)
    extrinsic, intrinsic = RewardScale(args).to(args.device), RewardScale(args).to(args.device)
    parameters = [p for p in (*agent.parameters(), *icm.parameters()) if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, args.learning_rate, eps=1e-5, fused=True)
    run = Run(args, agent=agent, icm=icm, optimizer=optimizer, extrinsic=extrinsic, intrinsic=intrinsic, envs=envs)

    while run.unfinished():
        run.begin_episode()
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - run.step / args.total_timesteps)
        # (1) act for some steps in many copies of the task
        rollout, seen = act(agent, envs, args.horizon)
        run.count_steps(rollout.r.numel())
        # (2) intrinsic rewards, by a model that has not been trained on these steps
        r, bonus = args.extrinsic_weight * extrinsic(rollout.r, rollout.over), torch.zeros_like(rollout.r)
        s, a, s2 = (x.flatten(0, 1) for x in (rollout.s, rollout.a, rollout.s2))
        if args.reward != "extrinsic":
            bonus = icm.intrinsic_reward(s, a, s2).view_as(r)
            run.log("model/intrinsic_reward", bonus.mean())
            r = r * (args.reward == "both") + args.intrinsic_weight * intrinsic(bonus, rollout.over)
        # (3) advantages of the sum
        with torch.no_grad():
            next_value = agent.critic(s2).view_as(r)
        advantage = gae(r, rollout.value, next_value, rollout.terminated, rollout.over, args)
        flat = Rollout(*(x.flatten(0, 1) for x in rollout))
        advantage, target = advantage.flatten(), (advantage + rollout.value).flatten()
        metrics = []
        for _ in range(args.epochs):
            for index in torch.randperm(len(s)).to(args.device).chunk(args.minibatches):
                # (4) train policy and value, (5) the inverse model with its encoder, and the forward model
                batch = Rollout(*(x[index] for x in flat))
                metrics.append(update(agent, icm, optimizer, batch, advantage[index], target[index], args))
        for tag in metrics[0]:
            run.log(tag, torch.stack([m[tag] for m in metrics]).mean())
        agent.moments.update(seen.float().to(args.device))
        if envs.visits is not None:
            run.log("charts/tiles_visited", (envs.visits > 0).sum())
        run.end_episode(envs.statistics())
        if run.due(args.picture_every):
            run.picture(draw_curiosity(agent, icm, envs, rollout, bonus, run.step))
        if run.due(args.eval_every):
            run.evaluate(agent, test_env)
    run.close()


# ── The task: a maze with one reward, and stacked frames of Atari games ───────────────────────────────────────────


def make_task(args: Args, **kwargs) -> gym.Env:
    env = gym.make(args.env_id, **kwargs)
    space, actions = env.observation_space, env.action_space
    if not (isinstance(space, gym.spaces.Box) and len(space.shape) in (1, 3)):
        hint = "gymnasium.wrappers.FlattenObservation makes a vector."
        raise UserError(f"the observations of {env.spec.id} are {space}, and vectors or images are needed. {hint}")
    if not (isinstance(actions, gym.spaces.Discrete) and actions.start == 0):
        raise UserError(f"the actions of {env.spec.id} are {actions}, and Discrete(n) is needed")
    return env


class Environments:
    """N copies of the task. Each episode begins with a seed of torch's generator; --resume takes the actions of the
    unfinished ones again, so that every deterministic environment continues where it was."""

    def __init__(self, args: Args):
        self.envs = [make_env(args) for _ in range(args.envs)]
        self.seeds, self.actions = [0] * args.envs, [[]] * args.envs
        self.obs = np.stack([self.begin(i) for i in range(args.envs)])
        task = self.envs[0].unwrapped
        self.visits, self.finished = np.zeros(task.walls.shape, int) if hasattr(task, "walls") else None, []

    def begin(self, i: int) -> np.ndarray:
        self.seeds[i], self.actions[i] = int(torch.randint(2**31, ())), []
        return self.envs[i].reset(seed=self.seeds[i])[0]

    def step(self, actions: list[int]) -> tuple[np.ndarray, ...]:
        """s', r, terminated and over of each copy; `obs` is what the policy sees next."""
        next_obs, n = self.obs.copy(), len(self.envs)
        r, terminated, over = np.zeros(n, np.float32), np.zeros(n, bool), np.zeros(n, bool)
        for i, (env, a) in enumerate(zip(self.envs, actions, strict=True)):
            next_obs[i], r[i], terminated[i], truncated, info = env.step(a)
            self.actions[i].append(a)
            over[i] = terminated[i] or truncated
            if self.visits is not None:
                self.visits[info["tile"]] += 1
            if over[i]:
                self.finished.append((info["episode"]["r"], info["episode"]["l"]))
            self.obs[i] = self.begin(i) if over[i] else next_obs[i]
        if not (np.isfinite(r).all() and np.isfinite(next_obs).all()):
            raise UserError("the environment returned NaN or infinity as an observation or reward")
        return next_obs, r, terminated, over

    def statistics(self) -> dict:
        """The mean return and length of the episodes that ended since the last call, as plumbing expects them."""
        finished, self.finished = self.finished, []
        return {"episode": dict(zip("rl", np.mean(finished, 0), strict=True))} if finished else {}

    def state_dict(self) -> dict:
        visits = None if self.visits is None else torch.from_numpy(self.visits.copy())
        return {"seeds": self.seeds, "actions": self.actions, "visits": visits}

    def load_state_dict(self, state: dict) -> None:
        self.seeds, self.actions = state["seeds"], state["actions"]
        self.visits = None if state["visits"] is None else state["visits"].numpy()
        for i, env in enumerate(self.envs):
            self.obs[i] = env.reset(seed=self.seeds[i])[0]
            for a in self.actions[i]:
                self.obs[i] = env.step(a)[0]


class Maze(gym.Env):
    """A maze in which one path connects any two tiles, the same for each seed. The observation is the window of 5 × 5
    tiles around the agent; each tile has a colour of its own, walls dark ones. The reward is 1 on the tile that is
    farthest from the start, where the episode ends, and 0 elsewhere. `noisy` replaces the walls of the dead end nearest
    to the start by noise."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space, action_space = gym.spaces.Box(0, 255, (3, 5, 5), np.uint8), gym.spaces.Discrete(4)

    def __init__(self, render_mode: Optional[str] = None, size: int = 13, noisy: bool = False):
        self.render_mode, rng = render_mode, np.random.default_rng(6)
        self.walls, path = np.ones((size, size), bool), [(1, 1)]
        self.walls[1, 1] = False
        while path:  # dig two tiles ahead in a random direction, or go back if there is none
            row, col = path[-1]
            ahead = [(row + 2 * i, col + 2 * j) for i, j in self.steps]
            ahead = [tile for tile in ahead if min(tile) > 0 and max(tile) < size and self.walls[tile]]
            if not ahead:
                path.pop()
                continue
            tile = ahead[rng.integers(len(ahead))]
            self.walls[tile] = self.walls[(row + tile[0]) // 2, (col + tile[1]) // 2] = False
            path.append(tile)
        self.distance, queue = {(1, 1): 0}, deque([(1, 1)])
        while queue:
            tile = queue.popleft()
            for neighbour in {self.moved(tile, a) for a in range(4)} - self.distance.keys():
                self.distance[neighbour] = self.distance[tile] + 1
                queue.append(neighbour)
        self.goal = max(self.distance, key=self.distance.get)
        image = rng.integers(0, 256, (3, size, size))
        self.image = np.where(self.walls, image // 4, 128 + image // 2).astype(np.uint8)
        self.views, self.screen = self.windows(self.image), None
        if noisy:
            dead_ends = [t for t in self.distance if t != (1, 1) and sum(self.moved(t, a) != t for a in range(4)) == 1]
            row, col = min(dead_ends, key=self.distance.get)
            near = np.zeros((1, size, size), bool)
            near[:, row - 1 : row + 2, col - 1 : col + 2] = True
            self.screen = self.windows(near & self.walls)

    steps = ((0, 1), (1, 0), (0, -1), (-1, 0))

    def moved(self, tile: tuple[int, int], action: int) -> tuple[int, int]:
        ahead = tile[0] + self.steps[action][0], tile[1] + self.steps[action][1]
        return tile if self.walls[ahead] else ahead

    def windows(self, image: np.ndarray) -> dict[tuple[int, int], np.ndarray]:
        image = np.pad(image, ((0, 0), (1, 1), (1, 1)))
        return {(row, col): image[:, row - 1 : row + 4, col - 1 : col + 4] for row, col in self.distance}

    def window(self, tile: tuple[int, int]) -> np.ndarray:
        if self.screen is None:
            return self.views[tile].copy()
        noise = self.np_random.integers(0, 256, (3, 5, 5), np.uint8)
        return np.where(self.screen[tile], noise, self.views[tile])

    def reset(self, *, seed: Optional[int] = None, options: Optional[dict] = None):
        super().reset(seed=seed)
        self.tile = 1, 1
        return self.window(self.tile), {}

    def step(self, action: int):
        self.tile = self.moved(self.tile, action)
        found = self.tile == self.goal
        return self.window(self.tile), float(found), found, False, {"tile": self.tile}

    def all_moves(self) -> tuple[np.ndarray, ...]:
        """s, a, s' of the four moves from each tile, and the tiles [n, 2]."""
        tiles = list(self.distance)
        moves = [(self.window(t), a, self.window(self.moved(t, a))) for t in tiles for a in range(4)]
        return *map(np.stack, zip(*moves, strict=True)), np.array(tiles)

    def render(self) -> np.ndarray:
        picture = self.image.transpose(1, 2, 0).copy()
        picture[self.goal], picture[self.tile] = (255, 215, 0), (255, 0, 0)
        return picture.repeat(20, 0).repeat(20, 1)


def stacked(game: str, render_mode: Optional[str] = None) -> gym.Env:
    """An Atari game: each action is repeated four times, and the observation is the last four such frames in grey."""
    env = gym.make(f"ALE/{game}", obs_type="grayscale", frameskip=1, render_mode=render_mode)
    env = gym.wrappers.MaxAndSkipObservation(env, 4)
    env = gym.wrappers.TransformObservation(env, shrink, gym.spaces.Box(0, 255, (42, 42), np.uint8))
    return gym.wrappers.FrameStackObservation(env, 4)


def shrink(frame: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(frame).resize((42, 42), Image.Resampling.BOX))


if "CuriousMaze-v0" not in gym.registry:
    gym.register("CuriousMaze-v0", entry_point=Maze, max_episode_steps=200)
    gym.register("LargeMaze-v0", entry_point=partial(Maze, size=21), max_episode_steps=400)
    gym.register("NoisyMaze-v0", entry_point=partial(Maze, noisy=True), max_episode_steps=200)
    gym.register_envs(ale_py)
    for name in [name.removeprefix("ALE/") for name in gym.registry if name.startswith("ALE/")]:
        gym.register(f"Stacked/{name}", entry_point=partial(stacked, name), max_episode_steps=4_500)


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
