# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "numpy>=2.0,<3",
#     "gymnasium>=1.1,<2",
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
"""ICM: curiosity, which is the error of a prediction of what one's own actions do.

Where rewards are far away, a policy gradient has nothing to climb. This agent rewards itself: it learns to foresee what
follows an action, and likes what it did not foresee. Pixels would make it watch leaves in the wind for ever, which
nobody foresees; so the forecast is of features that are learned by another task, to tell from two observations in a
row which action lay between them. What the agent can neither cause nor be affected by has no place in them.

Paper: D. Pathak, P. Agrawal, A. Efros, T. Darrell, "Curiosity-driven Exploration by Self-supervised Prediction", ICML
2017, arXiv 1705.05363. Official code: github.com/pathak22/noreward-rl. With random features and pixels, and rewards of
one size: Y. Burda et al., "Large-Scale Study of Curiosity-Driven Learning", ICLR 2019, arXiv 1808.04355.

The algorithm (section 2 of the paper; the policy is optimised by PPO):
    (1) play some steps in many environments at once
    (2) curiosity: of each transition the bonus r^i = η/2 ‖f(φ(s), a) − φ(s')‖², divided by what such bonuses add up to
    (3) advantages, of the rewards and of the bonuses apart, and their sum
    (4) for some passes over these steps: the policy and its two values learn, by PPO's clipped loss
    (5) and with them the forward model f, and the inverse model g, which finds the action and so shapes φ

Symbols (paper → this file):
    φ → encoder                     g, â, L_I → inverse, inverse_loss          β → beta
    r^e, r^i → reward, bonus        f, φ̂, L_F → forecast, forward_loss         η → eta
    π → Agent                       λ → policy_weight

Run (measured on 2 CPU cores; docs/icm.md has the curves):
    python algos/icm.py                                           # 4 minutes: the goal, 10 seeds of 10
    python algos/icm.py --reward extrinsic                        # PPO alone
    python algos/icm.py --reward intrinsic                        # curiosity alone
    python algos/icm.py mountaincar                               # 3 minutes: −120, PPO alone −200

Deviations from the paper and the official code:
  - PPO in place of A3C, and no LSTM: one process. The rewards and the bonuses have a value function each, and the
    bonuses' goes on beyond the end of an episode (Burda et al.), so that its end costs no curiosity.
  - φ learns from the inverse model alone, as section 2.2 of the paper says; Equation 7 and the official code let the
    forward model's loss shape it too: --joint. It can make that loss small by making all features alike.
  - φ(s) has the same length for all s (a layer norm without weights), and the forward model learns in each of PPO's
    passes. What it learns is the change, φ(s') − φ(s) (Burda et al.), and it begins with "nothing changes".
  - Bonuses are divided by the running deviation of their discounted sum (Burda et al.); η then changes nothing.
    --no-normalize gives the paper's. Rewards are counted from what random moves earn, and divided by the size of their
    sums where that is above 1: nothing in them then hides the bonuses before there is something to find.
  - Adam's step size falls in a line, as PPO's authors have it for games.
  - Observations get mean 0 and deviation 1, by what was seen so far (Burda et al.: by random steps).
  - An observation that is no image, or a small one, is read by two layers in place of the convolutions.
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

import ale_py
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

ALGORITHM = "icm"


@dataclass
class Args:
    env_id: str = "CuriousMaze-v0"
    """This file's maze, or any Gymnasium environment with Discrete or Box actions whose observations are numbers or an
    image (a Dict with an "image" is taken for that). `module:Env-v0` imports the module first."""
    reward: Literal["both", "extrinsic", "intrinsic"] = "both"
    """extrinsic: the environment's rewards alone, which is PPO; intrinsic: curiosity alone."""
    features: Literal["inverse", "random", "pixels", "noise"] = "inverse"
    """What is foreseen: features that the inverse model shapes, those of a network that never learns, or the
    observation itself. With noise the bonus is a random number: as large, and telling nothing."""
    joint: bool = False
    """The forward model's loss shapes φ too, as in the official code."""
    total_timesteps: int = 1_500_000
    """Steps of all environments together, rounded up to whole updates."""
    envs: int = 64
    """Environments at a time."""
    episode_limit: int = 0
    """Cut an episode after so many steps, if it is not over before; 0: where the environment does (CuriousMaze-v0 after
    200)."""
    horizon: int = 64
    """Steps of each of them between two updates."""
    processes: bool = False
    """Each environment in a process of its own: for games, not for small tasks."""
    maze_size: int = 13
    """CuriousMaze-v0 has so many tiles a side, the walls included; an odd number."""
    maze_layout: int = 0
    """Another number is another maze."""
    noisy_tv: bool = False
    """The walls of a dead end near its start show noise."""
    clip_reward: bool = False
    """Of the environment's rewards the sign alone counts."""
    passes: int = 4
    """Over the steps that were played, in each update."""
    minibatches: int = 4
    """In each pass."""
    learning_rate: float = 5e-4
    """Adam's step size, for everything."""
    decay_steps: int = 1_500_000
    """It falls in a line to a hundredth of that at this step, and stays there; 0: it does not fall."""
    gamma: float = 0.99
    """γ: discount of the environment's rewards."""
    bonus_gamma: float = 0.99
    """γ of the bonuses."""
    gae_lambda: float = 0.95
    """λ of the advantages (GAE)."""
    clip: float = 0.2
    """PPO's ε: a chance may change by this share."""
    entropy: float = 0.01
    """Weight of the policy's entropy."""
    value_weight: float = 0.5
    """Weight of the values' error."""
    gradient_clip: float = 0.5
    """The policy's gradient is not longer than this."""
    reward_weight: float = 5.0
    """Of the environment's advantages, beside those of the bonuses."""
    bonus_weight: float = 1.0
    """Of the bonuses' advantages."""
    eta: float = 0.01
    """η: size of the bonuses. Without effect where they are normalised."""
    beta: float = 0.2
    """β: the forward model's share in the loss; the rest is the inverse model's."""
    policy_weight: float = 0.1
    """λ: weight of the policy's loss beside the two models'. They share no weights, so that Adam makes little of it."""
    normalize: bool = True
    """Divide the bonuses by the running standard deviation of their discounted sum."""
    episodic: bool = False
    """The sum of bonuses to come ends with the episode; else it goes on in the next."""
    hidden: int = 128
    """Width of the layers of the policy, and of φ where the observation is small."""
    feature_size: int = 64
    """Numbers in φ(s) where the observation is small; what four convolutions leave, where it is an image."""
    model_hidden: int = 256
    """Width of the hidden layer of the forward and the inverse model."""
    seed: int = 1
    """Fixes Python, NumPy, torch and the environments: the same seed on one CPU gives the same run."""
    device: str = "auto"
    """auto, cpu or cuda[:index]."""
    compile: bool = False
    """torch.compile for the losses that are learned from: speed may change, results only by rounding."""
    log_every: int = 20_000
    """Write losses and timings every this many steps."""
    eval_every: int = 100_000
    """Evaluate every this many steps; 0: only at the end."""
    eval_episodes: int = 10
    """Episodes of an evaluation."""
    eval_max_steps: int = 10_000
    """Cut an evaluation episode here."""
    picture_every: int = 75_000
    """Draw visits and bonuses every this many steps, 20 times at most; 0: never."""
    capture_video: bool = False
    """Record the first episode of each evaluation as a GIF in the run folder."""
    run_dir: Optional[str] = None
    """Where to write; by default runs/<env>__<algorithm>__<seed>__<time>."""
    checkpoint_every: int = 500_000
    """Save a checkpoint every this many steps; 0: only at the end of the run, and when it is stopped."""
    resume: Optional[str] = None
    """Go on with the run in this folder, with its settings; --total-timesteps may be raised."""
    evaluate: Optional[str] = None
    """Do not train: let the agent saved in this run folder play."""
    episodes: int = 10
    """Episodes to play with --evaluate."""
    progress: bool = True
    """Show a progress bar (never when the output is no terminal)."""


ATARI = Args(  # Burda et al., with ICM's images of 42 × 42
    envs=128, horizon=128, processes=True, episode_limit=4_500, clip_reward=True, passes=3, minibatches=8,
    learning_rate=1e-4, decay_steps=0, clip=0.1, entropy=0.001, reward_weight=1.0, hidden=256,
    total_timesteps=10_000_000, log_every=100_000, eval_every=1_000_000, picture_every=1_000_000, eval_episodes=5,
)  # fmt: skip
PRESETS = {
    "maze": ("a maze with one reward, 62 moves away", Args()),
    "mountaincar": (
        "MountainCar-v0: nothing tells the hill from the valley but its top",
        Args(
            env_id="MountainCar-v0",
            envs=16,
            horizon=128,
            total_timesteps=300_000,
            decay_steps=0,
            eval_every=20_000,
            log_every=4_000,
            picture_every=20_000,
        ),
    ),
    "montezuma": (
        "Montezuma's Revenge, curiosity and score",
        Args(**{**vars(ATARI), "env_id": "ALE/MontezumaRevenge-v5"}),
    ),
    "breakout": (
        "Breakout, by curiosity alone",
        Args(**{**vars(ATARI), "env_id": "ALE/Breakout-v5", "reward": "intrinsic"}),
    ),
}

STREAMS = {"both": ("extrinsic", "intrinsic"), "extrinsic": ("extrinsic",), "intrinsic": ("intrinsic",)}


# ── The algorithm ─────────────────────────────────────────────────────────────────────────────────────────────────


def encoder(shape: tuple[int, ...], hidden: int, size: int) -> tuple[nn.Sequential, int]:
    """The paper's four convolutions for an image; two layers for numbers, and for the window of a small maze. And how
    many features come out."""
    if len(shape) == 3 and min(shape[1:]) >= 32:
        layers = [nn.Conv2d(shape[0] if i == 0 else 32, 32, 3, stride=2, padding=1) for i in range(4)]
        layers = [layer for convolution in layers for layer in (convolution, nn.ELU())] + [nn.Flatten()]
        network = nn.Sequential(*layers)
        return network, network(torch.zeros(1, *shape)).shape[1]
    layers = [nn.Flatten(), nn.Linear(math.prod(shape), hidden), nn.ELU(), nn.Linear(hidden, size), nn.ELU()]
    return nn.Sequential(*layers), size


def head(width: int, outputs: int, gain: float) -> nn.Linear:
    layer = nn.Linear(width, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """π, and the value of each stream of rewards."""

    def __init__(self, shape: tuple[int, ...], actions: gym.Space, streams: int, hidden: int):
        super().__init__()
        self.eyes, width = encoder(shape, hidden, hidden)
        self.body = nn.Sequential(nn.Linear(width, hidden), nn.ELU())
        self.discrete = isinstance(actions, gym.spaces.Discrete)
        outputs = int(actions.n) if self.discrete else math.prod(actions.shape)
        self.policy = head(hidden, outputs, 0.01)
        # 0 to begin with: until the first reward is found its value is right, and its noise can't drown curiosity
        self.values = head(hidden, streams, 0.0)
        if not self.discrete:
            self.log_std = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the policy is made of [B, A], logits or means; values [B, streams]."""
        h = self.body(self.eyes(x))
        return self.policy(h), self.values(h)

    def distribution(self, outputs: torch.Tensor) -> torch.distributions.Distribution:
        if self.discrete:
            return torch.distributions.Categorical(logits=outputs, validate_args=False)
        normal = torch.distributions.Normal(outputs, self.log_std.clamp(-5, 1).exp(), validate_args=False)
        return torch.distributions.Independent(normal, 1, validate_args=False)

    def best(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs.argmax(-1) if self.discrete else outputs


class ICM(nn.Module):
    """The intrinsic curiosity module: φ, the inverse model g, and the forward model f."""

    def __init__(self, shape: tuple[int, ...], actions: gym.Space, args: Args):
        super().__init__()
        self.features, self.joint, self.eta = args.features, args.joint, args.eta
        self.discrete = isinstance(actions, gym.spaces.Discrete)
        self.actions = int(actions.n) if self.discrete else math.prod(actions.shape)
        if self.features == "pixels":
            self.encoder, size = nn.Flatten(), math.prod(shape)
        else:
            self.encoder, size = encoder(shape, args.hidden, args.feature_size)
        self.encoder.requires_grad_(self.features == "inverse")
        if self.features == "inverse":
            self.inverse = nn.Sequential(
                nn.Linear(2 * size, args.model_hidden), nn.ReLU(), nn.Linear(args.model_hidden, self.actions)
            )
        self.forecast = nn.Sequential(
            nn.Linear(size + self.actions, args.model_hidden), nn.ReLU(), head(args.model_hidden, size, 0.0)
        )

    def learned(self) -> dict[str, nn.Module]:
        """Its parts that learn."""
        names = ("encoder", "inverse", "forecast") if self.features == "inverse" else ("forecast",)
        return {name: getattr(self, name) for name in names}

    def phi(self, s: torch.Tensor) -> torch.Tensor:
        """φ(s) [B, size]: of one length, else a bonus could be large because its features are."""
        x = self.encoder(s)
        return x if self.features == "pixels" else F.layer_norm(x, x.shape[-1:])

    def numbers(self, a: torch.Tensor) -> torch.Tensor:
        """Actions [B, ...] as numbers [B, A]."""
        return F.one_hot(a, self.actions).float() if self.discrete else a.clamp(-1, 1)

    def error(self, phi: torch.Tensor, a: torch.Tensor, phi2: torch.Tensor) -> torch.Tensor:
        """½ ‖φ̂(s') − φ(s')‖² of each row [B], with φ̂(s') = f(φ(s), a) (Eq. 4)."""
        # f = φ(s) + what it adds, at first nothing: else the first bonuses would be far larger than all later ones
        return 0.5 * (phi + self.forecast(torch.cat([phi, self.numbers(a)], 1)) - phi2).square().sum(1)

    @torch.no_grad()
    def wonder(self, s: torch.Tensor, a: torch.Tensor, s2: torch.Tensor) -> tuple[torch.Tensor, dict]:
        """Step (2): the bonus of each transition [B], and how good both models are where they have not learned yet."""
        phi, phi2 = self.phi(s), self.phi(s2)
        error = self.error(phi, a, phi2)
        # 1 says as much as to foresee that nothing changes
        still = 0.5 * (phi2 - phi).square().sum(1).mean()
        metrics = {"model/forward_error": error.mean() / still.clamp_min(1e-8)}
        if self.features == "inverse":
            guess, numbers = self.inverse(torch.cat([phi, phi2], 1)), self.numbers(a)
            wrong = (guess.argmax(1) != a).float() if self.discrete else (guess - numbers).square()
            metrics["model/inverse_error"] = wrong.mean()
        return self.eta * error, metrics  # Eq. 6: r^i = η/2 ‖φ̂(s') − φ(s')‖²

    def losses(self, s: torch.Tensor, a: torch.Tensor, s2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Step (5): L_I, L_F."""
        phi, phi2 = self.phi(s), self.phi(s2)
        # Eq. 5: L_F = ½ ‖φ̂(s') − φ(s')‖². With the gradient into φ it would be least where φ says nothing
        forward_loss = self.error(*((phi, a, phi2) if self.joint else (phi.detach(), a, phi2.detach()))).mean()
        if self.features != "inverse":
            return torch.zeros_like(forward_loss), forward_loss
        # Eq. 2 and 3: L_I(â, a), â = g(φ(s), φ(s'))
        guess = self.inverse(torch.cat([phi, phi2], 1))
        inverse_loss = F.cross_entropy(guess, a) if self.discrete else F.mse_loss(guess, self.numbers(a))
        return inverse_loss, forward_loss


class Moments:
    """Mean and variance of all that was seen, of each number by itself."""

    def __init__(self, shape: tuple[int, ...], device: torch.device):
        self.mean, self.variance = (torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(2))
        self.count = 0

    def update(self, x: torch.Tensor) -> None:
        """x [B, *shape]"""
        x = x.double()
        total, away = self.count + len(x), x.mean(0) - self.mean
        spread = self.count * self.variance + len(x) * x.var(0, correction=0) + away**2 * self.count * len(x) / total
        self.mean, self.variance, self.count = self.mean + away * len(x) / total, spread / total, total

    def scale(self, x: torch.Tensor) -> torch.Tensor:
        """Mean 0 and deviation 1, and nothing beyond 5. Of an image one deviation for all, for a pixel that has hardly
        ever changed says no more than others when it does."""
        deviation = self.variance.sqrt()
        if self.mean.ndim == 3:
            deviation = deviation.mean()
        return ((x.float() - self.mean.float()) / deviation.clamp_min(1e-3).float()).clamp(-5, 5)

    def state_dict(self) -> dict:
        return vars(self).copy()

    def load_state_dict(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, value.to(self.mean.device) if isinstance(value, torch.Tensor) else value)


class Rollout(NamedTuple):
    """What was played: T steps of N environments."""

    obs: torch.Tensor  # [T, N, ...] as the environment gives it
    action: torch.Tensor
    log_prob: torch.Tensor  # [T, N]
    values: torch.Tensor  # [T, N, streams]
    reward: torch.Tensor  # [T, N]
    next_obs: torch.Tensor  # [T, N, ...]: where the action led, also at an episode's end
    terminated: torch.Tensor  # [T, N] bool
    over: torch.Tensor  # [T, N] bool: terminated or truncated


def gae(
    reward: torch.Tensor, value: torch.Tensor, next_value: torch.Tensor, over: torch.Tensor, gamma: float, lam: float
) -> torch.Tensor:
    """Step (3): Â_t = δ_t + γλ Â_{t+1}, δ_t = r_t + γ V(s_{t+1}) − V(s_t), all [T, N]. `next_value` is 0 after a
    terminal step; where an episode is over the sum does not go on."""
    delta = reward + gamma * next_value - value
    going, advantage = gamma * lam * (~over).float(), torch.zeros_like(reward)
    following = torch.zeros_like(reward[0])
    for t in reversed(range(len(reward))):
        following = delta[t] + going[t] * following
        advantage[t] = following
    return advantage


def discounted(bonus: torch.Tensor, before: torch.Tensor, gamma: float) -> torch.Tensor:
    """[T, N] → what came in until each step, R_t = γ R_{t−1} + r_t; `before` [N] until the step before the first."""
    sums = torch.empty_like(bonus)
    for t in range(len(bonus)):
        before = gamma * before + bonus[t]
        sums[t] = before
    return sums


def advantages(
    played: Rollout,
    bonus: torch.Tensor,
    next_values: torch.Tensor,
    last_values: torch.Tensor,
    end_value: float,
    args: Args,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Step (3): the advantages to learn from [T, N], and what the values should have been [T, N, streams]. next_values
    [T, N, streams] are those of next_obs, last_values [N, streams] those of where the next step begins. After a
    terminal step the sum of rewards is end_value."""
    targets, total = torch.empty_like(played.values), torch.zeros_like(played.reward)
    for i, stream in enumerate(STREAMS[args.reward]):
        value = played.values[..., i]
        if stream == "extrinsic":
            reward, weight, gamma = played.reward, args.reward_weight, args.gamma
        else:
            reward, weight, gamma = bonus, args.bonus_weight, args.bonus_gamma
        if stream == "extrinsic" or args.episodic:
            last = end_value if stream == "extrinsic" else 0.0
            following, over = next_values[..., i].masked_fill(played.terminated, last), played.over
        else:  # the next episode's first state follows the last one
            following, over = torch.cat([value[1:], last_values[None, :, i]]), torch.zeros_like(played.over)
        advantage = gae(reward, value, following, over, gamma, args.gae_lambda)
        targets[..., i], total = advantage + value, total + weight * advantage
    return (total - total.mean()) / (total.std(correction=0) + 1e-8), targets


def ppo_losses(
    agent: Agent, x: torch.Tensor, action: torch.Tensor, log_prob: torch.Tensor, advantage: torch.Tensor,
    targets: torch.Tensor, clip: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Step (4): the policy's loss, the values', and the policy's entropy."""
    outputs, values = agent(x)
    new = agent.distribution(outputs)
    # L = −E[min(ρ Â, clip(ρ, 1 − ε, 1 + ε) Â)], ρ = π(a|s) / π_old(a|s)
    ratio = (new.log_prob(action) - log_prob).exp()
    policy = -torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()
    return policy, 0.5 * (values - targets).square().sum(-1).mean(), new.entropy().mean()


@torch.no_grad()
def play_steps(
    envs: gym.vector.VectorEnv, obs: np.ndarray, agent: Agent, scale: Callable, horizon: int, device: torch.device,
    before_step: Callable, after_step: Callable,
) -> tuple[Rollout, np.ndarray]:  # fmt: skip
    """Step (1): `horizon` steps of each environment, and the observations that come then."""
    rows = []
    for _ in range(horizon):
        x = torch.from_numpy(obs).to(device)
        outputs, values = agent(scale(x))
        distribution = agent.distribution(outputs)
        action = distribution.sample()
        before_step()
        new_obs, reward, terminated, truncated, infos = envs.step(action.cpu().numpy())
        over, reached = terminated | truncated, new_obs.copy()
        for i in np.flatnonzero(over):  # SAME_STEP: new_obs begins the next episode already
            reached[i] = infos["final_obs"][i]
        after_step(reward, terminated, over, reached, infos)
        found = (np.asarray(reward, np.float32), reached, terminated, over)
        reward, reached, terminated, over = (torch.from_numpy(column).to(device) for column in found)
        rows.append((x, action, distribution.log_prob(action), values, reward, reached, terminated, over))
        obs = new_obs
    return Rollout(*(torch.stack(column) for column in zip(*rows, strict=True))), obs


# ── What it has seen and what it wonders at: measured, and drawn ──────────────────────────────────────────────────


def place_grid(envs: gym.vector.VectorEnv) -> Optional[tuple[int, int]]:
    """Rows and columns of the map of visits: a maze's tiles, or for two numbers within bounds 40 × 40; else none."""
    if hasattr(envs.unwrapped, "walls"):
        return envs.unwrapped.walls.shape
    space = envs.single_observation_space
    known = len(space.shape) == 1 and space.shape[0] >= 2 and (np.abs([space.low[:2], space.high[:2]]) < 1e3).all()
    return (40, 40) if known else None


def places(envs: gym.vector.VectorEnv, reached: np.ndarray, infos: dict) -> np.ndarray:
    """[2, N]: row and column of each environment on that map."""
    if "tile" in infos:
        return infos["tile"].T
    low, high = envs.single_observation_space.low[:2], envs.single_observation_space.high[:2]
    column, row = np.clip(40 * (reached[:, :2] - low) / (high - low), 0, 39).astype(int).T
    return np.stack([39 - row, column])


@torch.no_grad()
def watch(
    env: gym.Env, agent: Agent, icm: Optional[ICM], scale: Callable, seed: int, device: torch.device, most: int = 500
) -> tuple[list[float], list[np.ndarray]]:
    """An episode, with the policy's own dice: the bonus of each step, if there are any, and what was seen after it."""
    before = random_states()
    seed_everything(seed)
    obs, _ = env.reset(seed=seed)
    bonuses, frames, over = [], [], False
    while not over and len(frames) < most:
        x = torch.from_numpy(np.asarray(obs)[None]).to(device)
        action = agent.distribution(agent(scale(x))[0]).sample()
        obs, _, terminated, truncated, _ = env.step(action[0].cpu().numpy())
        x2, over = torch.from_numpy(np.asarray(obs)[None]).to(device), terminated or truncated
        if icm:
            bonuses.append(float(icm.wonder(scale(x), action, scale(x2))[0]))
        frames.append(np.asarray(obs))
    set_random_states(before)
    return bonuses, frames


def draw_curiosity(
    visits: Optional[np.ndarray], lately: Optional[np.ndarray], walls: Optional[np.ndarray], bonuses: list[float],
    frames: list[np.ndarray], title: str,
) -> np.ndarray:  # fmt: skip
    """The picture: visits in all and since the last picture, the bonuses of an episode, and what was the most curious
    thing in it."""
    maps = [] if visits is None else [("visits", visits), ("visits of late", lately)]
    widths = [2.6] * len(maps) + [3.2] * bool(bonuses) + [2.2] * (len(frames[0].shape) == 3)
    figure = Figure(figsize=(sum(widths) or 4, 2.9), dpi=80)
    figure.suptitle(title, fontsize=10)
    axes = list(np.atleast_1d(figure.subplots(1, len(widths), width_ratios=widths))) if widths else []
    for name, counts in maps:
        axis = axes.pop(0)
        if walls is not None:
            axis.imshow(walls, cmap="Greys", vmin=0, vmax=1.6)
        axis.imshow(np.where(counts > 0, np.log10(np.maximum(counts, 1)), np.nan), cmap="inferno", vmin=0, vmax=5)
        axis.set(xticks=[], yticks=[])
        axis.set_title(f"{name}: {(counts > 0).sum()} places", fontsize=8)
    if bonuses:
        axis = axes.pop(0)
        axis.plot(1 + np.arange(len(bonuses)), bonuses, linewidth=1)
        axis.set_title("bonus, along an episode", fontsize=8)
        axis.set_ylim(bottom=0)
    if axes:
        best = int(np.argmax(bonuses)) if bonuses else len(frames) - 1
        axes[0].imshow(to_picture(frames[best]))
        axes[0].set(xticks=[], yticks=[])
        axes[0].set_title(f"{'the largest' if bonuses else 'the last'}, at {best + 1}", fontsize=8)
    figure.tight_layout(pad=0.5, rect=(0, 0, 1, 0.92))  # the title's room
    return figure_to_array(figure)


def to_picture(image: np.ndarray) -> np.ndarray:
    """[C, H, W] → three channels last, or the latest of stacked frames in grey; from its darkest to its brightest."""
    image = image.transpose(1, 2, 0) if len(image) == 3 else image[-1][..., None].repeat(3, -1)
    image = image.astype(np.float32) - image.min()
    return image / max(image.max(), 1e-8)


# ── Training ──────────────────────────────────────────────────────────────────────────────────────────────────────


def check_settings(args: Args) -> None:
    """Every wrong setting that can be seen before training starts, as one sentence."""
    check_run_settings(args)
    for least, names in (
        (1, ("envs", "horizon", "passes", "minibatches", "hidden", "feature_size", "model_hidden")),
        (0, ("episode_limit", "maze_layout", "decay_steps")),
        (0, ("entropy", "value_weight", "reward_weight", "bonus_weight")),
    ):
        for name in names:
            if getattr(args, name) < least:
                stop(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least {least}")
    for name in ("learning_rate", "clip", "gradient_clip", "eta", "policy_weight"):
        if getattr(args, name) <= 0:
            stop(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be above 0")
    for name in ("gamma", "bonus_gamma", "gae_lambda", "beta"):
        if not 0 <= getattr(args, name) <= 1:
            stop(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must lie in [0, 1]")
    if args.bonus_gamma == 1 and args.reward != "extrinsic" and (args.normalize or not args.episodic):
        stop("--bonus-gamma is 1: sums without an end need one below; else give --episodic and --no-normalize")
    if args.maze_size < 5 or args.maze_size % 2 == 0:
        stop(f"--maze-size is {args.maze_size}: it must be odd, and at least 5")
    if args.joint and (args.features != "inverse" or args.reward == "extrinsic"):
        stop("--joint says what shapes the features of the inverse model, and there are none")


def make_agent(args: Args, env: gym.Env, device: torch.device) -> Agent:
    return Agent(env.observation_space.shape, env.action_space, len(STREAMS[args.reward]), args.hidden).to(device)


def greedy_actor(agent: Agent, scale: Callable, device: torch.device) -> Callable[[Any], Any]:
    """The deterministic policy as a function of one observation."""

    @torch.inference_mode()
    def act(obs: np.ndarray) -> np.ndarray:
        return agent.best(agent(scale(torch.from_numpy(np.asarray(obs)[None]).to(device)))[0])[0].cpu().numpy()

    return act


def load_policy(args: Args, env: gym.Env, checkpoint: dict) -> Callable[[], Callable[[Any], Any]]:
    """For --evaluate: what makes the policy of a checkpoint, for each episode the same."""
    device = pick_device(args.device)
    agent, seen = make_agent(args, env, device), Moments(env.observation_space.shape, device)
    agent.load_state_dict(checkpoint["learned"]["agent"])
    seen.load_state_dict(checkpoint["seen"])
    return lambda: greedy_actor(agent, seen.scale, device)


def train(args: Args) -> Path:
    seed_everything(args.seed)
    eval_env, envs = make_task(args, render=args.capture_video), make_envs(args)  # before torch has threads
    device = pick_device(args.device)
    print(f"device: {device}")
    run_dir, checkpoint = open_run(args)

    shape, actions = eval_env.observation_space.shape, eval_env.action_space
    agent = make_agent(args, eval_env, device)
    curious = args.reward != "extrinsic"
    icm = ICM(shape, actions, args).to(device) if curious and args.features != "noise" else None
    learned = {"agent": agent, **(icm.learned() if icm else {})}
    fixed = icm.encoder if icm and args.features == "random" else nn.Identity()
    parameters = [p for part in learned.values() for p in part.parameters()]
    optimizer = torch.optim.Adam(parameters, args.learning_rate, fused=True)
    seen = Moments(shape, device)  # of observations
    sums = {stream: Moments((), device) for stream in ("reward", "bonus")}  # of their discounted sums
    so_far = {stream: torch.zeros(args.envs, device=device) for stream in sums}
    grid = place_grid(envs)
    visits, lately = (np.zeros(grid, np.int64) if grid else None for _ in range(2))
    returns, lengths = np.zeros(args.envs), np.zeros(args.envs, np.int64)
    step, usual = 0, 0.0
    eval_env.reset(seed=args.seed)
    eval_env.action_space.seed(args.seed)
    at_first = env_state(eval_env)
    own = hasattr(envs.unwrapped, "load_state_dict")
    if checkpoint:
        step, usual = checkpoint["step"], checkpoint["usual"]
        for name, part in learned.items():
            part.load_state_dict(checkpoint["learned"][name])
        fixed.load_state_dict(checkpoint["fixed"])
        optimizer.load_state_dict(checkpoint["optimisers"]["all"])
        seen.load_state_dict(checkpoint["seen"])
        for stream, moments in sums.items():
            moments.load_state_dict(checkpoint["sums"][stream])
            so_far[stream] = checkpoint["so_far"][stream].to(device)
        if grid:
            visits, lately = (checkpoint[name].numpy() for name in ("visits", "lately"))
    # Environments of others begin new episodes in a run that goes on; the maze is where it was
    obs, _ = envs.reset(seed=random.Random(f"{args.seed}, {step}").getrandbits(30))
    envs.action_space.seed(args.seed)
    if checkpoint:
        if own:
            envs.unwrapped.load_state_dict(checkpoint["envs"])
            obs = checkpoint["obs"].numpy()
            returns, lengths = (checkpoint[name].numpy() for name in ("returns", "lengths"))
        set_random_states(checkpoint["random"])
    log = RunLog(args, run_dir, checkpoint)
    policy_losses, icm_losses = ppo_losses, icm.losses if icm else None
    if args.compile:
        policy_losses, icm_losses = torch.compile(ppo_losses), torch.compile(icm.losses) if icm else None

    # These look at the variables of the loop as they are when they are called, and leave the dice alone.
    def save() -> None:
        save_checkpoint(
            run_dir, step=step, usual=usual, learned={name: part.state_dict() for name, part in learned.items()},
            fixed=fixed.state_dict(), optimisers={"all": optimizer.state_dict()}, seen=seen.state_dict(),
            sums={stream: moments.state_dict() for stream, moments in sums.items()}, so_far=so_far, visits=visits,
            lately=lately, env=at_first, envs=envs.unwrapped.state_dict() if own else None, obs=obs if own else None,
            returns=returns, lengths=lengths, log=log.state_dict(),
        )  # fmt: skip
        log.lap("log")

    def add_up(stream: str, amount: torch.Tensor, gamma: float) -> Moments:
        """What comes in, [T, N], discounted: the moments of its sums in all of the run."""
        collected = discounted(amount, so_far[stream], gamma)
        so_far[stream] = collected[-1]
        sums[stream].update(collected.flatten())
        return sums[stream]

    def measure() -> None:
        set_env_state(eval_env, at_first, generators=False)
        log.evaluation(step, lambda: greedy_actor(agent, seen.scale, device), eval_env)
        if solved := SOLVED.get(args.env_id):
            cut = min(args.eval_max_steps, args.episode_limit or math.inf)
            found = [solved(score) and length < cut for score, length in zip(*log.scores, strict=True)]
            log.scalars(step, {"eval/success_rate": np.mean(found)})

    def draw() -> None:
        bonuses, frames = watch(eval_env, agent, icm, seen.scale, args.seed, device)
        walls = getattr(envs.unwrapped, "walls", None)
        log.picture(step, draw_curiosity(visits, lately, walls, bonuses, frames, f"{args.env_id}: step {step:,}"))
        if grid:
            lately[:] = 0

    def after_step(
        reward: np.ndarray, terminated: np.ndarray, over: np.ndarray, reached: np.ndarray, infos: dict
    ) -> None:
        nonlocal step
        log.lap("env")
        step += args.envs
        returns[:], lengths[:] = returns + reward, lengths + 1
        if grid:
            where = tuple(places(envs, reached, infos))
            np.add.at(visits, where, 1)
            np.add.at(lately, where, 1)
        for i in np.flatnonzero(over):
            log.episode(step, returns[i], int(lengths[i]))
            if solved := SOLVED.get(args.env_id):
                log.mean("charts/success_rate", float(terminated[i] and solved(returns[i])))
        returns[over], lengths[over] = 0.0, 0
        log.lap("log")

    with StopSignal() as stop_signal:
        if not checkpoint:  # Burda et al.: some steps at random tell how large the numbers of an observation are
            for _ in range(args.horizon):
                obs, reward, terminated, truncated, infos = envs.step(envs.action_space.sample())
                seen.update(torch.from_numpy(obs).to(device))
                after_step(reward, terminated, terminated | truncated, obs, infos)
                usual += float((np.sign(reward) if args.clip_reward else reward).mean()) / args.horizon
            usual = usual if args.gamma < 1 else 0.0
            log.bar.update(step)
            log.start_clock(step)
        while step < args.total_timesteps:
            # (1) play some steps in many environments at once
            first = step
            played, obs = play_steps(
                envs, obs, agent, seen.scale, args.horizon, device, lambda: log.lap("policy"), after_step
            )
            if args.clip_reward:
                played = played._replace(reward=played.reward.sign())
            x, x2 = (seen.scale(column.flatten(0, 1)) for column in (played.obs, played.next_obs))
            action, log_prob = played.action.flatten(0, 1), played.log_prob.flatten()
            with torch.no_grad():
                next_values = torch.cat([agent(part)[1] for part in x2.split(4_096)]).view_as(played.values)
                last_values = agent(seen.scale(torch.from_numpy(obs).to(device)))[1]
            log.lap("policy")

            # (2) curiosity: the error of the forecast, divided by what such errors add up to
            bonus = torch.rand_like(played.reward)  # with --features noise
            if icm:
                bonus, metrics = icm.wonder(x, action, x2)
                bonus = bonus.view_as(played.reward)
                for tag, value in metrics.items():
                    log.mean(tag, value)
            if curious:
                log.mean("model/bonus", bonus.mean())
                if args.normalize:
                    deviation = add_up("bonus", bonus, args.bonus_gamma).variance.sqrt().float()
                    bonus = bonus / deviation.clamp_min(1e-8)
                log.mean("model/normalized_bonus", bonus.mean())
            # Large rewards are made smaller, for the values' error would else be all that the shared layers learn from
            collected = add_up("reward", played.reward, args.gamma)
            size = (collected.mean**2 + collected.variance).sqrt().float().clamp_min(1.0)
            # ... and counted from what random moves earn: where nothing else was found yet, all values are 0 and right.
            # An episode that ends earns no longer what is usual, Σ γ^t usual
            played = played._replace(reward=(played.reward - usual) / size)
            end_value = -usual / (1 - args.gamma) / float(size) if usual else 0.0
            log.lap("model")

            # (3) advantages, of the rewards and of the bonuses apart, and their sum
            advantage, targets = advantages(played, bonus, next_values, last_values, end_value, args)
            advantage, targets = advantage.flatten(), targets.flatten(0, 1)
            log.lap("update")

            if args.decay_steps:
                for group in optimizer.param_groups:
                    group["lr"] = args.learning_rate * max(1 - first / args.decay_steps, 0.01)
            for _ in range(args.passes):
                for rows in torch.randperm(len(x), device=device).chunk(args.minibatches):
                    # (4) the policy and its values learn
                    policy_loss, value_loss, entropy = policy_losses(
                        agent, x[rows], action[rows], log_prob[rows], advantage[rows], targets[rows], args.clip
                    )
                    loss = policy_loss + args.value_weight * value_loss - args.entropy * entropy
                    optimizer.zero_grad()
                    # Eq. 7: λ L_π + (1 − β) L_I + β L_F, a part at a time
                    (args.policy_weight * loss).backward()
                    nn.utils.clip_grad_norm_(agent.parameters(), args.policy_weight * args.gradient_clip)
                    log.mean("losses/policy", policy_loss)
                    log.mean("losses/value", value_loss)
                    log.mean("charts/entropy", entropy)
                    log.lap("update")
                    # (5) and with them the forward model and the inverse model
                    if icm:
                        inverse_loss, forward_loss = icm_losses(x[rows], action[rows], x2[rows])
                        ((1 - args.beta) * inverse_loss + args.beta * forward_loss).backward()
                        log.mean("losses/forward", forward_loss)
                        if args.features == "inverse":
                            log.mean("losses/inverse", inverse_loss)
                        log.lap("model")
                    optimizer.step()
                    log.lap("update")
            if not torch.stack([p.sum() for p in parameters]).isfinite().all():
                stop(f"the networks' numbers have run away at step {step:,}: take a smaller --learning-rate")
            for part in played.next_obs.flatten(0, 1).split(1_024):
                seen.update(part)
            log.lap("policy")

            log.bar.update(step - first)
            if log.due("log", args.log_every, step):
                if grid:
                    log.scalars(step, {"charts/places": (visits > 0).sum()})
                log.flush(step)
            if log.due("eval", args.eval_every, step) and step < args.total_timesteps:
                measure()
            if log.due("picture", args.picture_every, step, at_most=20) and step < args.total_timesteps:
                draw()
            if log.due("checkpoint", args.checkpoint_every, step):
                save()
            if stop_signal.to_stop(True):  # no update is cut
                break
        save()
    envs.close()
    if stop_signal.number and step < args.total_timesteps:
        log.stopped(step, stop_signal.number)
    measure()
    if args.picture_every:
        draw()
    log.finish(step)
    return run_dir


# ── The maze, and other tasks ─────────────────────────────────────────────────────────────────────────────────────

SOLVED = {  # of an episode's return: where a task has an end to reach
    "CuriousMaze-v0": lambda score: score > 0,
    "MountainCar-v0": lambda score: score > -200,
    "MountainCarContinuous-v0": lambda score: score > 0,
}
STEPS = np.array([(-1, 0), (0, 1), (1, 0), (0, -1)])  # N E S W: row, column
VIEW = 5  # tiles a side that the agent sees, itself in the middle


def carve(n: int, rng: np.random.Generator) -> np.ndarray:
    """[n, n] bool, True a wall: a maze in which one way leads from each tile to each other. It is dug from the top left
    to a neighbour at random, two tiles on, until there is none, and then from where there was a choice last."""
    walls = np.ones((n, n), bool)
    walls[1, 1], stack = False, [np.array([1, 1])]
    while stack:
        tile = stack[-1]
        ways = [(tile + d, tile + 2 * d) for d in STEPS if ((tile + 2 * d > 0) & (tile + 2 * d < n)).all()]
        ways = [(between, ahead) for between, ahead in ways if walls[tuple(ahead)]]
        if not ways:
            stack.pop()
            continue
        between, ahead = ways[rng.integers(len(ways))]
        walls[tuple(between)] = walls[tuple(ahead)] = False
        stack.append(ahead)
    return walls


def moves_from(walls: np.ndarray, start: tuple[int, int]) -> np.ndarray:
    """[n, n]: how many moves each tile is away, −1 in walls."""
    away, queue = np.full(walls.shape, -1), [start]
    away[start] = 0
    for row, column in queue:
        for i, j in STEPS:
            if not walls[row + i, column + j] and away[row + i, column + j] < 0:
                away[row + i, column + j] = away[row, column] + 1
                queue.append((row + i, column + j))
    return away


class CuriousMazes(gym.vector.VectorEnv):
    """Many agents, each in its own copy of one maze. The observation is the window of 5 × 5 tiles around the agent,
    [3, 5, 5]: each tile of the maze has a colour of its own, walls dark ones. +1 on the tile farthest from the start,
    where the episode ends, and nothing anywhere else. With `noisy_tv` the walls around the nearest dead end show noise.
    """

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP, "render_modes": ["rgb_array"]}

    def __init__(self, num_envs: int, n: int = 13, limit: int = 200, layout: int = 0, noisy_tv: bool = False):
        rng, half = np.random.default_rng(layout), VIEW // 2
        self.num_envs, self.limit, self.walls = num_envs, limit, carve(n, rng)
        self.away = moves_from(self.walls, (1, 1))
        self.goal = np.array(np.unravel_index(self.away.argmax(), self.away.shape))
        colours = rng.integers(0, 256, (3, n, n))
        self.image = np.where(self.walls, colours // 4, 128 + colours // 2).astype(np.uint8)
        free = (~self.walls).astype(int)
        exits = sum(np.roll(free, tuple(-d), (0, 1)) for d in STEPS)
        between = np.argwhere((self.away > 0) & (self.away < self.away.max()))
        row, column = min(between.tolist(), key=lambda tile: (exits[*tile], self.away[*tile]))  # a dead end, if any
        screen = np.zeros((n, n), bool)
        screen[row - 1 : row + 2, column - 1 : column + 2] = noisy_tv
        screen &= self.walls

        def windows(x: np.ndarray) -> np.ndarray:
            """[n, n, ..., 5, 5]: what is seen from each tile; nothing beyond the edge."""
            x = np.pad(x, [(0, 0)] * (x.ndim - 2) + [(half, half)] * 2)
            seen = np.lib.stride_tricks.sliding_window_view(x, (VIEW, VIEW), (-2, -1))
            return np.ascontiguousarray(np.moveaxis(seen, (-4, -3), (0, 1)))

        self.seen, self.noisy = windows(self.image), windows(screen) if noisy_tv else None
        self.single_observation_space = gym.spaces.Box(0, 255, (3, VIEW, VIEW), np.uint8)
        self.single_action_space = gym.spaces.Discrete(4)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed: Optional[int] = None, options: Optional[dict] = None):
        super().reset(seed=seed)
        self.tile, self.steps = np.ones((self.num_envs, 2), np.int64), np.zeros(self.num_envs, np.int64)
        return self._observation(), {}

    def _observation(self) -> np.ndarray:
        where = tuple(self.tile.T)
        if self.noisy is None:
            return self.seen[where]
        noise = self.np_random.integers(0, 256, (self.num_envs, 3, VIEW, VIEW), np.uint8)
        return np.where(self.noisy[where][:, None], noise, self.seen[where])

    def step(self, actions: np.ndarray):
        ahead = self.tile + STEPS[actions]
        self.tile = np.where(self.walls[tuple(ahead.T)][:, None], self.tile, ahead)
        self.steps += 1
        terminated = (self.tile == self.goal).all(1)
        truncated = ~terminated & (self.steps >= self.limit)
        obs = self._observation()
        infos = {"tile": self.tile, "final_obs": obs}
        if (over := terminated | truncated).any():
            self.tile, self.steps = np.where(over[:, None], 1, self.tile), np.where(over, 0, self.steps)
            obs = self._observation()
        return obs, terminated.astype(np.float64), terminated, truncated, infos

    def state_dict(self) -> dict:
        return {"tile": self.tile, "steps": self.steps, "generator": self.np_random.bit_generator.state}

    def load_state_dict(self, state: dict) -> None:
        self.tile, self.steps = state["tile"].numpy().copy(), state["steps"].numpy().copy()
        self.np_random.bit_generator.state = state["generator"]


class CuriousMaze(gym.Env):
    """One of them."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode: Optional[str] = None, **settings: Any):
        self.mazes, self.render_mode = CuriousMazes(1, **settings), render_mode
        self.observation_space, self.action_space = self.mazes.single_observation_space, gym.spaces.Discrete(4)

    def reset(self, *, seed: Optional[int] = None, options: Optional[dict] = None):
        super().reset(seed=seed)
        self.mazes.np_random = self.np_random
        obs, _ = self.mazes.reset()
        self.tile, self.steps = self.mazes.tile[0], 0
        return obs[0], {}

    def step(self, action: int):
        _, reward, terminated, truncated, infos = self.mazes.step(np.array([action]))
        self.tile, self.steps = infos["tile"][0], self.steps + 1
        return infos["final_obs"][0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), {}

    def render(self) -> np.ndarray:
        picture = self.mazes.image.transpose(1, 2, 0).copy()
        picture[tuple(self.mazes.goal)] = (255, 215, 0)
        picture[tuple(self.tile)] = (255, 0, 0)
        picture = picture.repeat(20, axis=0).repeat(20, axis=1)
        picture[-5:, : self.steps * len(picture) // self.mazes.limit] = 255  # how much of the time is gone
        return picture


if "CuriousMaze-v0" not in gym.registry:
    gym.register("CuriousMaze-v0", entry_point=CuriousMaze)
gym.register_envs(ale_py)


def maze_settings(args: Args) -> dict:
    limit = args.episode_limit or 200
    return {"n": args.maze_size, "limit": limit, "layout": args.maze_layout, "noisy_tv": args.noisy_tv}


class FourFrames(gym.Wrapper):
    """An action lasts for four frames of a game. Of the last two that were seen each pixel's brighter one is shown, for
    some games draw things in every second frame alone."""

    def step(self, action: int):
        frames, total, over = [], 0.0, False
        while not over and len(frames) < 4:
            frame, reward, terminated, truncated, info = self.env.step(action)
            frames, total, over = [*frames, frame], total + float(reward), terminated or truncated
        return np.max(frames[-2:], axis=0), total, terminated, truncated, info


def shrink(frame: np.ndarray) -> np.ndarray:
    """A game's grey picture → [42, 42]"""
    return np.asarray(Image.fromarray(frame).resize((42, 42), Image.Resampling.BOX))


def make_task(args: Args, render: bool = False) -> gym.Env:
    """One environment, checked, with observations and actions as the networks want them."""
    own, game = args.env_id == "CuriousMaze-v0", args.env_id.startswith("ALE/")
    if args.noisy_tv and not own:
        stop(f"--noisy-tv is in CuriousMaze-v0 alone, not in {args.env_id}")
    kwargs = maze_settings(args) if own else {"obs_type": "grayscale", "frameskip": 1} if game else {}
    package = "minigrid:" if args.env_id.startswith("MiniGrid-") else ""  # which brings them in, if it is installed
    env = make_env(package + args.env_id, render, **kwargs)
    if game:
        env = FourFrames(env)
        env = gym.wrappers.TransformObservation(env, shrink, gym.spaces.Box(0, 255, (42, 42), np.uint8))
        env = gym.wrappers.FrameStackObservation(env, 4)
    if args.episode_limit and not own:
        env = gym.wrappers.TimeLimit(env, args.episode_limit)
    if isinstance(env.observation_space, gym.spaces.Dict) and "image" in env.observation_space.spaces:
        image = env.observation_space["image"]
        env = gym.wrappers.TransformObservation(env, lambda obs: obs["image"], image)
    space, actions = env.observation_space, env.action_space
    if not isinstance(space, gym.spaces.Box) or len(space.shape) not in (1, 3):
        stop(f"the observations must be a row of numbers or an image, and those of {args.env_id} are {space}")
    if len(space.shape) == 3 and space.shape[-1] < space.shape[0]:  # the channels come first
        low, high = np.moveaxis(space.low, -1, 0), np.moveaxis(space.high, -1, 0)
        first = gym.spaces.Box(low, high, dtype=space.dtype.type)
        env = gym.wrappers.TransformObservation(env, lambda obs: np.ascontiguousarray(np.moveaxis(obs, -1, 0)), first)
    if isinstance(actions, gym.spaces.Box) and len(actions.shape) == 1 and actions.is_bounded():
        middle, half = (actions.high + actions.low) / 2, (actions.high - actions.low) / 2
        ones = gym.spaces.Box(-1.0, 1.0, actions.shape, np.float32)
        return gym.wrappers.TransformAction(env, lambda a: middle + half * np.clip(a, -1, 1), ones)
    if not isinstance(actions, gym.spaces.Discrete):
        stop(f"the actions must be Discrete or a Box within bounds, and those of {args.env_id} are {actions}")
    if lowest := int(actions.start):
        env = gym.wrappers.TransformAction(env, lambda a: a + lowest, gym.spaces.Discrete(int(actions.n)))
    return env


def make_envs(args: Args) -> gym.vector.VectorEnv:
    """Many at once. An episode's last observation is in `final_obs`, and the next one has begun in the same step."""
    if args.env_id == "CuriousMaze-v0":
        return CuriousMazes(args.envs, **maze_settings(args))
    mode, one = gym.vector.AutoresetMode.SAME_STEP, functools.partial(make_task, args)
    if not args.processes:
        return gym.vector.SyncVectorEnv([one] * args.envs, autoreset_mode=mode)

    def deaf() -> gym.Env:
        """Ctrl-C reaches all processes of a terminal; it is for the one that learns, and ends these."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return one()

    return gym.vector.AsyncVectorEnv([deaf] * args.envs, autoreset_mode=mode)


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
