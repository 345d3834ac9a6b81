# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "numpy>=2.0,<3", "gymnasium>=1.3,<2", "ale-py>=0.11.1,<1", "tyro>=1.0.16,<2",
#     "tensorboard>=2.18,<3", "tqdm>=4.66,<5", "pillow>=11,<14", "matplotlib>=3.9,<4", "pygame-ce>=2.5,<3",
# ]
# ///
"""MuZero: plan by tree search in a model that is learned only for planning.

A representation turns the observation into a hidden state, a dynamics function turns a hidden state and an action into
the next one, and a prediction function reads policy, value and reward from it. Hidden states need not reconstruct the
observation: they are trained only to predict these three. A Monte Carlo tree search through the model improves the
policy, and the policy is trained to predict what the search found.

Paper: Schrittwieser et al., "Mastering Atari, Go, Chess and Shogi by Planning with a Learned Model", Nature 2020,
arXiv 1911.08265. Pseudocode is published with the paper, a full implementation is not.

The algorithm (section 3 and Appendices B, D, F, G and H of the paper):
    (1) search from the observation of each of N games; Reanalyze searches old positions again
    (2) sample actions from the visit counts, and play them
    (3) store observation, action, reward, and the policy π and value ν of the search
    (4) sample positions t, and compute their n-step returns z
    (5) unroll the model for K steps along the actions that were played, and train policy, value and reward (Eq. 1)
    (6) copy the parameters to the network that searches

Symbols: h, g, f → Agent.representation, dynamics, prediction; s → hidden state; p, v, r → policy, value, reward;
    N(s,a), Q(s,a), P(s,a), R(s,a), S(s,a) → visits, q, prior, reward, child of Tree; u → reward; γ → gamma.

Two players are one player with −γ: rewards and values are those of the player to move, and what is good for the next
player is bad for this one. Neither search nor replay nor loss needs to know whose move it is.

Usage (return: mean and 95 % interval over seeds; docs/muzero.md has the curves):
    python algos/muzero.py                                    # return 500 [500, 500]
    python algos/muzero.py tictactoe                          # not measured yet
    python algos/muzero.py --env-id Acrobot-v1 --reanalyze 0
    python algos/muzero.py --evaluate runs/NAME --episodes 10 --capture-video

Differences from the paper: a node counts as one visit of itself, so that the first simulation follows the prior; the
reward is read from the hidden state that the step leads to; a time limit is not the end: the value of the last
observation is added to the return; one process, small networks with group norm and Adam replace many TPUs and SGD.
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
from functools import partial
from pathlib import Path
from typing import NamedTuple, Optional

import gymnasium as gym
import numpy as np
import torch
import tyro
from ale_py.roms import get_all_rom_ids
from ale_py.vector_env import AtariVectorEnv
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

ALGORITHM = "muzero"


@dataclass
class Args:  # tyro turns each field into a flag and each comment into its help
    env_id: str = "CartPole-v1"  # any environment with Discrete actions and vectors or images as observations
    total_timesteps: int = 30_000  # moves of all games together
    envs: int = 16  # N: games that are played at the same time
    round_moves: int = 50  # moves of each game between entries of the log
    simulations: int = 50  # simulations per search
    c1: float = 1.25  # c₁: weight of the prior
    c2: float = 19_652.0  # c₂: number of visits from which on this weight grows
    noise_alpha: float = 0.25  # α of the Dirichlet noise in the prior of a root
    noise_share: float = 0.25  # share of this noise
    cooling: bool = True  # the temperature T is 1, 0.5 and 0.25 up to 50, 75 and 100 % of the run; else it is 1
    gamma: float = 0.997  # γ: discount factor
    n_steps: int = 10  # n of the n-step returns
    unroll: int = 5  # K: steps that the model is unrolled for
    reanalyze: float = 1.0  # old positions that are searched again for each move
    fresh_values: bool = True  # returns end in a value of the network that searches now; else in that of the old search
    copy_every: int = 50  # updates between copies of the parameters to the network that searches
    replay_size: int = 100_000  # positions that are kept
    learning_starts: int = 1_000  # moves before the first update
    train_every: int = 2  # moves per update
    batch_size: int = 128  # positions per update
    prioritized: bool = False  # sample positions in proportion to |ν − z|; else uniformly
    learning_rate: float = 2e-3  # Adam's step size, which falls exponentially to a tenth
    weight_decay: float = 1e-4  # c: weight of the L2 regularisation
    value_weight: float = 1.0  # weight of the value's loss
    gradient_clip: float = 5.0  # the norm of the gradient is clipped to this
    squash: bool = True  # predict values and rewards on the scale of Appendix F
    support: int = 20  # they are distributions over the integers from −support to support
    latent: int = 64  # size of a hidden state (dense networks)
    hidden: int = 128  # units of hidden layers
    channels: int = 32  # channels of the convolutions (networks for boards and images)
    blocks: int = 2  # residual blocks of representation and dynamics (the same)
    seed: int = 1  # on one CPU, two runs with the same seed are identical
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu, cuda or mps
    eval_every: int = 2_500  # moves between evaluations (at the end of a round, like all that follow)
    picture_every: int = 5_000  # moves between pictures of a search
    checkpoint_every: int = 5_000  # moves between checkpoints; one is also written about every minute
    episodes: int = 20  # episodes per evaluation
    capture_video: bool = False  # save the first episode of each evaluation as a GIF
    run_dir: Optional[str] = None  # output folder; runs/<env>__<algorithm>__<seed>__<time> by default
    resume: Optional[str] = None  # continue the run in this folder with its own settings
    evaluate: Optional[str] = None  # do not train: play with the agent of this run folder

    def __post_init__(self):
        """tyro reports a ValueError raised here as one sentence and exits with code 2."""
        may_be_zero = ("seed", "noise_share", "reanalyze", "weight_decay", "blocks")
        for name, value in vars(self).items():
            if type(value) in (int, float) and not (0 < value < math.inf or (value == 0 and name in may_be_zero)):
                raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be a positive number")
        if self.gamma > 1 or self.noise_share > 1:
            raise ValueError("--gamma and --noise-share must not exceed 1")
        if self.replay_size < self.envs * 2 * (self.unroll + self.n_steps + 1):
            raise ValueError(f"--replay-size {self.replay_size} is too small for {self.envs} games")


PRESETS = {
    "cartpole": ("CartPole-v1: minutes", Args()),
    "tictactoe": ("tic-tac-toe, learned by playing against itself", Args(
        "TicTacToe-v0", 200_000, envs=64, simulations=25, cooling=False, gamma=1.0, n_steps=9, reanalyze=0.0,
        noise_alpha=0.5, train_every=16, batch_size=256, squash=False, support=1, hidden=256, blocks=1,
        eval_every=20_000, picture_every=40_000, checkpoint_every=50_000, episodes=100)),
    "mspacman": ("Ms. Pac-Man from pixels, with networks small enough for one core", Args(
        "Atari/ms_pacman-v0", 100_000, round_moves=10, simulations=25, gamma=0.99, fresh_values=False, support=60,
        channels=16, blocks=1, replay_size=50_000, train_every=8, batch_size=64, learning_rate=1e-3,
        value_weight=0.25, eval_every=20_000, picture_every=50_000, checkpoint_every=25_000, episodes=10)),
}  # fmt: skip


# ── The algorithm: the network ────────────────────────────────────────────────────────────────────────────────────


def squash(x: Tensor) -> Tensor:
    """Appendix F: h(x) = sign(x) (√(|x| + 1) − 1) + εx, ε = 0.001"""
    return x.sign() * ((x.abs() + 1).sqrt() - 1) + 1e-3 * x


def unsquash(y: Tensor) -> Tensor:
    """h⁻¹(y) = sign(y) (((√(1 + 4ε (|y| + 1 + ε)) − 1) / 2ε)² − 1)"""
    c = y.abs() + 1 + 1e-3
    root = 2 * c / ((1 + 4e-3 * c).sqrt() + 1)  # the same quotient, without the difference of nearly equal numbers
    return y.sign() * (root.square() - 1)


def two_hot(x: Tensor, support: int) -> Tensor:
    """[...] → [..., 2 support + 1]: φ(x), probabilities of the two integers next to x, with mean x."""
    x = x.clamp(-support, support)
    low = x.floor().clamp(max=support - 1)
    index = (low + support).long()[..., None]
    probs = torch.zeros(*x.shape, 2 * support + 1, device=x.device)
    return probs.scatter_(-1, index, (low + 1 - x)[..., None]).scatter_(-1, index + 1, (x - low)[..., None])


def to_unit(s: Tensor) -> Tensor:
    """Appendix G: each hidden state is scaled to [0, 1]."""
    low, high = s.flatten(1).aminmax(dim=1, keepdim=True)
    return ((s.flatten(1) - low) / (high - low).clamp(min=1e-5)).view_as(s)


def discount(env: gym.Env, args: Args) -> float:
    """γ, and −γ for two players."""
    return args.gamma * getattr(env.unwrapped, "sign", 1)


def dense(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ELU(), nn.Linear(hidden, outputs))


def convolution(inputs: int, channels: int, stride: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, channels, 3, stride, padding=1, bias=False)
    return nn.Sequential(layer, nn.GroupNorm(1, channels), nn.ReLU())


class Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        second = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.GroupNorm(1, channels)
        self.layers = nn.Sequential(convolution(channels, channels), *second)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.layers(x)).relu()


class Agent(nn.Module):
    """The three functions h, g and f, and the policy that searches with them."""

    player = "tree search"

    def __init__(self, env: gym.Env, args: Args):
        super().__init__()
        space, self.actions, self.args = env.observation_space, int(env.action_space.n), args
        self.image, self.scale, task = len(space.shape) == 3, 255.0 if space.dtype == np.uint8 else 1.0, env.unwrapped
        self.legal_moves, self.gamma = getattr(task, "legal", None), discount(env, args)
        self.bounds = (-1.0, 1.0) if self.gamma < 0 else (1e30, -1e30)  # of Q, known in board games
        codes = torch.eye(self.actions)  # how the dynamics see an action
        if self.image:
            blocks, (channels, *sides), layers = args.blocks, space.shape, []
            while max(sides) > 8:  # 96 × 96 pixels become 6 × 6
                layers += [convolution(channels, args.channels, 2), Residual(args.channels)]
                channels, sides = args.channels, [-(-side // 2) for side in sides]
            layers += [] if layers else [convolution(channels, args.channels)]
            self.encoder = nn.Sequential(*layers, *(Residual(args.channels) for _ in range(blocks)))
            codes = torch.as_tensor(getattr(task, "planes", codes[:, :, None, None].expand(-1, -1, *sides)))
            first, width = convolution(args.channels + codes.shape[1], args.channels), args.channels * math.prod(sides)
            self.step = nn.Sequential(first, *(Residual(args.channels) for _ in range(blocks)))
        else:
            self.encoder, width = dense(math.prod(space.shape), args.hidden, args.latent), args.latent
            self.step = dense(args.latent + self.actions, args.hidden, args.latent)
        self.register_buffer("codes", codes.float(), persistent=False)
        self.outputs = [self.actions, 2 * args.support + 1, 2 * args.support + 1]
        self.heads = dense(width, args.hidden, sum(self.outputs))
        nn.init.zeros_(self.heads[-1].weight)  # the first searches find a uniform policy and values of 0
        nn.init.zeros_(self.heads[-1].bias)
        self.to(args.device)

    def representation(self, obs: Tensor) -> Tensor:
        """h: observations [B, ...] → hidden states s⁰"""
        obs = obs.float() / self.scale
        return to_unit(self.encoder(obs if self.image else obs.flatten(1)))

    def dynamics(self, s: Tensor, a: Tensor) -> Tensor:
        """g: hidden states s^{k−1}, actions [B] → s^k"""
        x = self.step(torch.cat([s, self.codes[a]], 1))
        return to_unit(x if self.image else s + x)

    def prediction(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f: hidden states → logits of policy [B, A] and value, and of the reward on the step that led there."""
        return self.heads(s.flatten(1)).split(self.outputs, -1)

    def scalar(self, logits: Tensor) -> Tensor:
        """Appendix F: the mean of a distribution over the support, on the original scale."""
        x, support = logits.softmax(-1), self.args.support
        # x and −x are subtracted first, so that equal probabilities give exactly 0
        mean = (x[..., support + 1 :] - x[..., :support].flip(-1)) @ torch.arange(1.0, support + 1, device=x.device)
        return unsquash(mean) if self.args.squash else mean

    def value(self, obs: Tensor) -> Tensor:
        return self.scalar(self.prediction(self.representation(obs))[1])

    @torch.inference_mode()
    def values(self, obs: np.ndarray) -> Tensor:
        """For targets, which are computed on the CPU."""
        return self.value(self.tensor(obs)).cpu()

    def tensor(self, obs: np.ndarray) -> Tensor:
        return torch.from_numpy(obs if obs.dtype == np.uint8 else np.float32(obs)).to(self.codes.device)

    def numbers(self, s: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For the search: policy [B, A], value [B] and reward [B] of hidden states, in one copy from the device."""
        logits, value, reward = self.prediction(s)
        x = torch.cat([self.scalar(torch.stack([value, reward])), logits.T]).cpu().double().numpy()
        return x[2:].T, x[0], x[1]

    def legal(self, obs: np.ndarray) -> np.ndarray:
        """[B, A]: the legal actions at the root; inside the tree the model has to know them."""
        return self.legal_moves(obs) if self.legal_moves else np.ones((len(obs), self.actions), bool)

    def reset(self) -> None:
        pass

    def forward(self, obs: np.ndarray) -> int:
        """The most visited action, without noise."""
        return int(search(self, obs[None]).visits.argmax())


# ── The algorithm: the search ─────────────────────────────────────────────────────────────────────────────────────


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(1, keepdims=True))
    return x / x.sum(1, keepdims=True)


class Tree:
    """B trees as arrays [B, node, action]. Simulation i adds node i to each of them; node 0 is the root."""

    def __init__(self, roots: int, simulations: int, actions: int, bounds: tuple[float, float]):
        shape = roots, simulations + 1, actions
        self.visits, self.q, self.prior, self.reward = (np.zeros(shape) for _ in range(4))
        self.child, self.total = np.full(shape, -1), np.ones(shape[:2])  # S(s,a), N(s)
        self.low, self.high = (np.full(roots, bound) for bound in bounds)  # of Q in each tree


def puct(tree: Tree, nodes: int, args: Args) -> np.ndarray:
    """[B, nodes]: what each node would select. One call for the whole tree costs less than one for each depth.

    Eq. 2: a = argmax Q̄(s,a) + P(s,a) √N(s) / (1 + N(s,a)) (c₁ + log((N(s) + c₂ + 1) / c₂)), N(s) = 1 + Σ N(s,b)"""
    n, total = tree.visits[:, :nodes], tree.total[:, :nodes, None]
    weight = np.sqrt(total) * (args.c1 + np.log((total + args.c2 + 1) / args.c2))
    # Eq. 5: Q̄ = (Q − min) / (max − min), and 0 for actions that were not tried
    low, width = tree.low[:, None, None], np.maximum(tree.high - tree.low, 1e-30)[:, None, None]
    q = (n > 0) * (tree.q[:, :nodes] - low) / width
    return (q + tree.prior[:, :nodes] * (weight / (1 + n))).argmax(2)


class Search(NamedTuple):
    """What a search found at B roots."""

    visits: np.ndarray  # [B, A]
    value: np.ndarray  # ν [B]: the mean of all values that were backed up to the root
    prior: np.ndarray  # [B, A]: the policy without search
    guess: np.ndarray  # [B]: the value without search
    tree: Tree


@torch.inference_mode()
def search(agent: Agent, obs: np.ndarray, noise: bool = False) -> Search:
    """Step (1), Appendix B: simulations from all roots [B, ...] at the same time."""
    args, roots = agent.args, np.arange(len(obs))
    tree = Tree(len(obs), args.simulations, agent.actions, agent.bounds)
    parent = roots * 0  # the node that simulation i expands
    s = agent.representation(agent.tensor(obs))
    states = s.new_empty(args.simulations + 1, *s.shape)  # node i of all trees
    states[0], (logits, guess, _), legal = s, agent.numbers(s), agent.legal(obs)
    prior = softmax(np.where(legal, logits, -1e9))
    tree.prior[:, 0], value_sum = prior, guess.copy()
    if noise:  # P = (1 − ε) p + ε η, η ~ Dirichlet(α)
        eta = legal * (torch.distributions.Gamma(args.noise_alpha, 1.0).sample(prior.shape).double().numpy() + 1e-9)
        tree.prior[:, 0] += args.noise_share * (eta / eta.sum(1, keepdims=True) - prior)
    for i in range(1, args.simulations + 1):
        # Selection: from the root down to an edge that leads to no node yet
        choice, path, trees, nodes = puct(tree, i, args), [], roots, roots * 0
        while len(trees):
            path.append((trees, nodes, choice[trees, nodes]))
            parent[trees], nodes = nodes, tree.child[path[-1]]
            trees, nodes = trees[nodes >= 0], nodes[nodes >= 0]
        action = choice[roots, parent]
        # Expansion: R(s,a) = r, S(s,a) = s', P(s',·) = p
        before = states[torch.from_numpy(parent), torch.from_numpy(roots)]
        states[i] = agent.dynamics(before, torch.from_numpy(action).to(s.device))
        logits, value, tree.reward[roots, parent, action] = agent.numbers(states[i])
        tree.prior[:, i], tree.child[roots, parent, action] = softmax(logits), i
        # Backup, Eq. 3: G^{k−1} = r_k + γ G^k
        returns = []
        for edges in reversed(path):
            value[edges[0]] = tree.reward[edges] + agent.gamma * value[edges[0]]
            returns.append(value[edges[0]])
        # Eq. 4: Q = (N Q + G) / (N + 1), N = N + 1, for all edges of the paths
        edges = trees, nodes, _ = tuple(map(np.concatenate, zip(*reversed(path), strict=True)))
        tree.visits[edges] += 1
        tree.total[trees, nodes] += 1
        tree.q[edges] += (np.concatenate(returns) - tree.q[edges]) / tree.visits[edges]
        np.minimum.at(tree.low, trees, tree.q[edges])
        np.maximum.at(tree.high, trees, tree.q[edges])
        value_sum += value
    return Search(tree.visits[:, 0], value_sum / (args.simulations + 1), prior, guess, tree)


# ── The algorithm: learning ───────────────────────────────────────────────────────────────────────────────────────


class Batch(NamedTuple):
    """Positions, and what the model should predict on the K steps after them."""

    obs: Tensor  # [B, ...]
    action: Tensor  # [B, K]
    reward: Tensor  # u [B, K]
    value: Tensor  # z [B, K+1]
    policy: Tensor  # π [B, K+1, A]
    known: Tensor  # [B, K+1]: 0 after a time limit
    alive: Tensor  # [B, K+1]: 0 after the end of the episode
    weight: Tensor  # [B]


def n_step_returns(reward: Tensor, value: Tensor, n: int, gamma: float) -> Tensor:
    """z_t = u_{t+1} + γ u_{t+2} + … + γ^{n−1} u_{t+n} + γ^n ν_{t+n}, where reward [B, K+n] holds u_{t+1} at t and value
    [B, K+1] holds ν_{t+n}."""
    powers = gamma ** torch.arange(n, device=reward.device)
    return reward.unfold(1, n, 1) @ powers + gamma**n * value


def half_gradient(s: Tensor) -> Tensor:
    """Appendix G: half of the gradient reaches the previous step, however long the unroll is."""
    return 0.5 * s + 0.5 * s.detach()


def muzero_loss(agent: Agent, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Step (5), Eq. 1: Σ_k l^r(u_{t+k}, r^k) + l^v(z_{t+k}, v^k) + l^p(π_{t+k}, p^k). The losses of unrolled steps are
    divided by K (Appendix G)."""
    args, K = agent.args, batch.action.shape[1]
    states = [agent.representation(batch.obs)]
    for k in range(K):
        states.append(agent.dynamics(half_gradient(states[k]), batch.action[:, k]))
    policy, value, reward = (x.unflatten(0, (K + 1, -1)).transpose(0, 1) for x in agent.prediction(torch.cat(states)))
    scale = squash if args.squash else lambda x: x
    z, u = (two_hot(scale(x), args.support) for x in (batch.value, batch.reward))
    weight = batch.weight[:, None] / torch.tensor([1.0, *[K] * K], device=z.device)  # [B, K+1]

    def cross_entropy(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return -(weight * (target * logits.log_softmax(-1)).sum(-1)).sum() / len(weight)

    losses = {
        "losses/policy": cross_entropy(policy, batch.policy, weight * batch.alive),
        "losses/value": cross_entropy(value, z, weight * batch.known),
        "losses/reward": cross_entropy(reward[:, 1:], u, weight[:, 1:] * batch.known[:, :-1]),
    }
    loss = losses["losses/policy"] + args.value_weight * losses["losses/value"] + losses["losses/reward"]
    return loss, losses


class Replay:
    """The last moves of N games, as columns [rows, N, ...]. Images are a memory-mapped file in the run folder."""

    def __init__(self, env: gym.Env, args: Args):
        self.keep, self.size, self.args = args.replay_size // args.envs, 0, args
        self.rows = self.keep * 5 // 4  # a run does not overwrite images that its last checkpoint needs
        self.look = args.unroll + args.n_steps + 1  # rows after a position that its targets need
        space, shape = env.observation_space, (self.rows, args.envs)
        self.gamma = discount(env, args)
        self.shape, self.dtype = (*shape, *space.shape), np.uint8 if space.dtype == np.uint8 else np.float32
        self.obs = np.zeros(self.shape if math.prod(space.shape) < 5_000 else 0, self.dtype)
        names = ("reward", "bootstrap", "terminated", "truncated", "value", "priority")
        self.columns = {name: torch.zeros(shape) for name in names}
        self.columns |= {"action": torch.zeros(shape, dtype=torch.long)}
        self.columns |= {"policy": torch.zeros(*shape, int(env.action_space.n))}

    def open(self, folder: Path) -> None:
        """The file of the images. Its space is reserved: a full disk is reported now and not during training."""
        if len(self.obs):
            return
        path = folder / "replay.dat"
        if self.size and not path.is_file():
            raise UserError(f"{path}, which holds the images of the run, is missing: it cannot continue")
        with open(path, "ab") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, math.prod(self.shape) * np.dtype(self.dtype).itemsize)
        self.obs = np.memmap(path, self.dtype, "r+", shape=self.shape)

    def add(self, obs: np.ndarray, **columns: Tensor) -> None:
        """One move of each game."""
        row = self.size % self.rows
        self.obs[row], self.columns["priority"][row - self.keep] = obs, 0.0
        for name, column in columns.items():
            self.columns[name][row] = column
        self.size += 1
        if self.args.prioritized and self.ready():
            row = torch.full((self.args.envs,), (self.size - self.look - 1) % self.rows)
            column, _, z = self.returns(row, torch.arange(self.args.envs), 0, None)
            self.columns["priority"][row[0]] = (column["value"][:, 0] - z[:, 0]).abs() + 1e-3

    def ready(self) -> int:
        """Number of rows whose targets are complete."""
        return max(0, min(self.size, self.keep) - self.look)

    def sample(self, count: int, prioritized: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, games and weights of positions; none if no targets are complete yet."""
        if not prioritized:
            count = count if self.ready() else 0
            row = (self.size - self.look - 1 - torch.randint(max(self.ready(), 1), (count,))) % self.rows
            return row, torch.randint(self.args.envs, (count,)), torch.ones(count)
        # Appendix G: P(i) = p_i / Σ_k p_k with p_i = |ν_i − z_i|, and the weights w_i = 1 / (N P(i))
        p = self.columns["priority"].flatten()
        index = torch.multinomial(p, count, replacement=True)
        return index // self.args.envs, index % self.args.envs, p.sum() / (self.ready() * self.args.envs * p[index])

    def returns(self, row: Tensor, game: Tensor, K: int, agent: Optional[Agent]) -> tuple[dict, Tensor, Tensor]:
        """The columns of K + n + 1 moves, which of them belong to the episode, and z of the first K + 1. The value at
        the end of a return is that of the network, or, without one, of the stored search."""
        n = self.args.n_steps
        window = (row[:, None] + torch.arange(K + n + 1)) % self.rows, game[:, None].expand(-1, K + n + 1)
        column = {name: column[window] for name, column in self.columns.items()}
        over = ((column["terminated"] + column["truncated"]) > 0).cumsum(1)
        alive = F.pad(over, (1, 0))[:, :-1] == 0
        value, ends = torch.zeros(len(row), K + 1), alive[:, n:]
        rows, games = (x[:, n:][ends] for x in window)
        value[ends] = agent.values(self.obs[rows.numpy(), games.numpy()]) if agent else column["value"][:, n:][ends]
        # After a terminal state all rewards and values are 0. At a time limit the value of what followed is added.
        reward = (alive * (column["reward"] + column["bootstrap"]))[:, :-1]
        return column, alive, n_step_returns(reward, value, n, self.gamma)

    def batch(self, row: Tensor, game: Tensor, weight: Tensor, agent: Agent) -> Batch:
        """Step (4): what the model should predict on the K steps after each position."""
        K = self.args.unroll
        column, alive, z = self.returns(row, game, K, agent if self.args.fresh_values else None)
        known = F.pad((alive * column["truncated"]).cumsum(1), (1, 0))[:, : K + 1] == 0
        anything = torch.randint(agent.actions, (len(row), K))  # the absorbing state stays the same under all actions
        action = torch.where(alive[:, :K], column["action"][:, :K], anything)
        reward, policy = (alive * column["reward"])[:, :K], column["policy"][:, : K + 1]
        obs, alive = torch.from_numpy(self.obs[row.numpy(), game.numpy()]), alive[:, : K + 1]
        return Batch(*(x.to(self.args.device) for x in (obs, action, reward, z, policy, known, alive, weight)))

    def state_dict(self) -> dict:
        columns = self.columns
        if isinstance(self.obs, np.memmap):
            self.obs.flush()
        else:
            columns = columns | {"obs": torch.from_numpy(self.obs)}
        return {"size": self.size, "columns": {name: x[: self.size].clone() for name, x in columns.items()}}

    def load_state_dict(self, state: dict) -> None:
        self.size = state["size"]
        for name, column in state["columns"].items():
            (torch.from_numpy(self.obs) if name == "obs" else self.columns[name])[: len(column)] = column


# ── What the search believes ──────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def heldout_metrics(agent: Agent, learner: Agent, replay: Replay) -> dict[str, Tensor]:
    """On positions that sample() excludes until the next move: the loss, and the difference between the value that is
    unrolled for k steps and that of the observation k steps later."""
    games = torch.arange(replay.args.envs)
    row = torch.full_like(games, (replay.size - replay.look) % replay.rows)
    batch = replay.batch(row, games, torch.ones(len(games)), agent)
    metrics, s = {"model/heldout_loss": muzero_loss(learner, batch)[0]}, learner.representation(batch.obs)
    for k in range(1, replay.args.unroll + 1):
        s = learner.dynamics(s, batch.action[:, k - 1])
        if k in (1, replay.args.unroll):
            later = learner.tensor(replay.obs[((row + k) % replay.rows).numpy(), games.numpy()])
            error = (learner.scalar(learner.prediction(s)[1]) - learner.value(later)).abs()
            metrics[f"model/value_error_{k}"] = (error * batch.alive[:, k]).sum() / batch.alive[:, k].sum().clamp(min=1)
    return metrics


def draw_search(agent: Agent, env: gym.Env, step: int) -> Figure:
    """An episode without noise: its values before and after the search, and the tree of one move."""
    found, over = [], False
    with torch.random.fork_rng():
        torch.manual_seed(agent.args.seed)
        obs, _ = env.reset(seed=int(torch.randint(2**31, ())))
        while not over and len(found) < 200:
            found.append(search(agent, obs[None]))
            obs, _, terminated, truncated, _ = env.step(int(found[-1].visits.argmax()))
            over = terminated or truncated
    change = [np.abs(x.visits[0] / x.visits.sum() - x.prior[0]).sum() for x in found]
    at, figure = int(np.argmax(change)), Figure(figsize=(10, 3.4), dpi=80, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    tree, stack = found[at].tree, [(0, 0, 0.0, 1.0)]
    while stack:  # each child is below its parent and has a share of its width, in proportion to the visits
        node, depth, low, high = stack.pop()
        ends = low + (high - low) * np.cumsum(tree.visits[0, node]) / max(tree.visits[0, node].sum(), 1)
        for a in tree.visits[0, node].nonzero()[0]:
            begin, end, line = (low, *ends)[a], ends[a], 5 * tree.visits[0, node, a] / agent.args.simulations
            left.plot([(low + high) / 2, (begin + end) / 2], [-depth, -depth - 1], "k-", lw=line)
            stack.append((tree.child[0, node, a], depth + 1, begin, end))
    left.set(title=f"step {step:,}: the tree of move {at + 1}, where the policy changes most", xticks=[], yticks=[])
    right.plot([x.guess[0] for x in found], color="silver", label="value before the search")
    right.plot([x.value[0] for x in found], label="after it")
    right.axvline(at, color="k", lw=0.5)
    right.set(xlabel="move of the episode")
    right.legend()
    return figure


# ── Training ──────────────────────────────────────────────────────────────────────────────────────────────────────


def evaluate(agent: Agent, envs: list[gym.Env], run: "Run") -> None:
    """Plays the episodes of play() at the same time, so that their searches share each call of the network."""
    returns, frames, going = [0.0] * len(envs), [], [*range(len(envs))]
    with torch.random.fork_rng():
        torch.manual_seed(run.args.seed + 10_000)
        obs = [env.reset(seed=int(torch.randint(2**31, ())))[0] for env in envs]
    while going:
        if run.args.capture_video and 0 in going and len(frames) < 500:
            frames.append(Image.fromarray(envs[0].render()).reduce(2))
        actions, still = search(agent, np.stack([obs[i] for i in going])).visits.argmax(1).tolist(), []
        for i, a in zip(going, actions, strict=True):
            obs[i], r, terminated, truncated, _ = envs[i].step(a)
            returns[i] += float(r)
            still += [] if terminated or truncated else [i]
        going = still
    if frames:
        video = run.dir / f"video_{run.step:08d}.gif"
        frames[0].save(video, save_all=True, append_images=frames[1:], duration=40, loop=0)
    run.log("eval/episodic_return", np.mean(returns))
    mean, low, high = np.mean(returns), min(returns), max(returns)
    tqdm.write(f"step {run.step:,}: the {agent.player}'s mean return is {mean:.2f}, from {low:.2f} to {high:.2f}")
    sys.stdout.flush()


def train(args: Args) -> None:
    torch.manual_seed(args.seed)
    envs, test_envs = Environments(args), [make_env(args) for _ in range(args.episodes)]
    agent, learner, N = Agent(test_envs[0], args), Agent(test_envs[0], args), args.envs
    agent.load_state_dict(learner.state_dict())
    optimizer = torch.optim.Adam(learner.parameters(), args.learning_rate, weight_decay=args.weight_decay, fused=True)
    replay = Replay(test_envs[0], args)
    run = Run(args, agent=agent, learner=learner, optimizer=optimizer, replay=replay, envs=envs)
    replay.open(run.dir)

    while run.unfinished():
        run.begin_episode()
        progress, metrics, values = run.step / args.total_timesteps, [], []
        temperature = 1.0 if progress < 0.5 or not args.cooling else 0.5 if progress < 0.75 else 0.25
        optimizer.param_groups[0]["lr"] = args.learning_rate * 0.1**progress
        for _ in range(args.round_moves):
            # (1) search from the observation of each game, and from old ones
            old = int((run.step + N) * args.reanalyze) - int(run.step * args.reanalyze)
            row, game, _ = replay.sample(old, prioritized=False)
            found = search(agent, np.concatenate([envs.obs, replay.obs[row.numpy(), game.numpy()]]), noise=True)
            policy = torch.from_numpy(found.visits / args.simulations).float()
            value = torch.from_numpy(found.value).float()
            replay.columns["policy"][row, game], replay.columns["value"][row, game] = policy[N:], value[N:]
            # (2) sample actions from the visit counts, p ∝ N^{1/T}, and play them
            action, obs = torch.multinomial(policy[:N] ** (1 / temperature), 1)[:, 0], envs.obs.copy()
            next_obs, reward, terminated, truncated = envs.step(action.tolist())
            # (3) store the moves, and the value of what a time limit cut off
            bootstrap = torch.zeros(N)
            if truncated.any():
                bootstrap[truncated] = agent.gamma * agent.values(next_obs[truncated.numpy()])
            replay.add(obs, action=action, reward=reward, bootstrap=bootstrap, terminated=terminated,
                       truncated=truncated, policy=policy[:N], value=value[:N])  # fmt: skip
            run.count_steps(N)
            values.append(value[:N].mean())
            first, last = (max(0, step - args.learning_starts) // args.train_every for step in (run.step - N, run.step))
            for update in range(first, last if replay.ready() else first):
                # (4) sample positions, and compute their targets
                batch = replay.batch(*replay.sample(args.batch_size, args.prioritized), agent)
                # (5) unroll the model, and train policy, value and reward
                loss, losses = muzero_loss(learner, batch)
                optimizer.zero_grad()
                loss.backward()
                losses["losses/gradient_norm"] = nn.utils.clip_grad_norm_(learner.parameters(), args.gradient_clip)
                optimizer.step()
                metrics.append({tag: x.detach() for tag, x in losses.items()})
                # (6) copy the parameters to the network that searches
                if (update + 1) % args.copy_every == 0:
                    agent.load_state_dict(learner.state_dict())
        for tag in metrics[0] if metrics else ():
            run.log(tag, torch.stack([x[tag] for x in metrics]).mean())
        run.log("model/value", torch.stack(values).mean())
        if replay.ready():
            for tag, x in heldout_metrics(agent, learner, replay).items():
                run.log(tag, x)
        run.end_episode(envs.statistics())
        if run.due(args.picture_every):
            run.picture(draw_search(agent, test_envs[0], run.step))
        if run.due(args.eval_every):
            evaluate(agent, test_envs, run)
    run.close()


# ── The task: games that are played at the same time, tic-tac-toe, and Atari ──────────────────────────────────────


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
    """N games. Each episode begins with a seed of torch's generator; --resume takes the actions of the unfinished ones
    again, so that every deterministic environment continues where it was. Nobody answers in a board game: the agent
    plays both sides."""

    def __init__(self, args: Args):
        self.envs = [make_env(args) for _ in range(args.envs)]
        for env in self.envs:
            env.unwrapped.opponent = None
        self.seeds, self.actions, self.finished = [0] * args.envs, [[]] * args.envs, []
        self.obs = np.stack([self.begin(i) for i in range(args.envs)])

    def begin(self, i: int) -> np.ndarray:
        self.seeds[i], self.actions[i] = int(torch.randint(2**31, ())), []
        return self.envs[i].reset(seed=self.seeds[i])[0]

    def step(self, actions: list[int]) -> tuple[np.ndarray, Tensor, Tensor, Tensor]:
        """The observation after each action, reward, terminated and truncated; `obs` is where the next move begins."""
        n, next_obs = len(self.envs), self.obs.copy()
        r, terminated, truncated = torch.zeros(n), torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)
        for i, (env, a) in enumerate(zip(self.envs, actions, strict=True)):
            next_obs[i], reward, end, cut, info = env.step(a)
            r[i], terminated[i], truncated[i] = float(reward), bool(end), bool(cut and not end)
            self.actions[i].append(a)
            if end or cut:
                self.finished.append((info["episode"]["r"], info["episode"]["l"]))
            self.obs[i] = self.begin(i) if end or cut else next_obs[i]
        if not (r.isfinite().all() and np.isfinite(next_obs).all()):
            raise UserError("the environment returned NaN or infinity as an observation or reward")
        return next_obs, r, terminated, truncated

    def statistics(self) -> dict:
        """The mean return and length of the episodes that ended since the last call, as plumbing expects them."""
        finished, self.finished = self.finished, []
        return {"episode": dict(zip("rl", np.mean(finished, 0), strict=True))} if finished else {}

    def state_dict(self) -> dict:
        return {"seeds": self.seeds, "actions": self.actions}

    def load_state_dict(self, state: dict) -> None:
        self.seeds, self.actions = state["seeds"], state["actions"]
        for i, env in enumerate(self.envs):
            self.obs[i] = env.reset(seed=self.seeds[i])[0]
            for a in self.actions[i]:
                self.obs[i] = env.step(a)[0]


class TicTacToe(gym.Env):
    """An observation is the stones of the player to move and those of the other player, [2, 3, 3]. Each move is
    answered by `opponent` (observation → action), by default at random; without one the agent plays both sides. The
    reward is 1 for the move that wins, and −1 if the opponent wins or the move is not legal."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 2}
    observation_space, action_space = gym.spaces.Box(0, 1, (2, 3, 3), np.float32), gym.spaces.Discrete(9)
    sign, planes = -1, np.eye(9).reshape(9, 1, 3, 3)  # two players; an action is a plane with a stone
    lines = np.array([[0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 3, 6], [1, 4, 7], [2, 5, 8], [0, 4, 8], [2, 4, 6]])

    def __init__(self, render_mode: Optional[str] = None):
        self.render_mode, self.opponent = render_mode, self.random_move

    @staticmethod
    def legal(obs: np.ndarray) -> np.ndarray:
        return (obs.sum(1) == 0).reshape(len(obs), -1)

    def random_move(self, obs: np.ndarray) -> int:
        return int(self.np_random.choice(self.legal(obs[None])[0].nonzero()[0]))

    def reset(self, *, seed: Optional[int] = None, options: Optional[dict] = None):
        super().reset(seed=seed)
        self.stones = np.zeros(self.observation_space.shape, np.float32)
        if self.opponent and self.np_random.random() < 0.5:
            self.move(self.opponent(self.stones))
        return self.stones, {}

    def move(self, action: int) -> tuple[bool, bool]:
        """Whether this move wins, and whether it ends the game. The other player's stones come first then."""
        own, other = self.stones.copy()
        own.flat[action] = 1
        won = bool(own.flat[self.lines].all(1).any())
        self.stones = np.stack([other, own])
        return won, won or bool(self.stones.sum(0).all())

    def step(self, action: int):
        if not self.legal(self.stones[None])[0, action]:
            return self.stones, -1.0, True, False, {}
        won, over = self.move(action)
        reward = float(won)
        if self.opponent and not over:
            won, over = self.move(self.opponent(self.stones))
            reward = -float(won)
        return self.stones, reward, over, False, {}

    def render(self) -> np.ndarray:
        """Red: the player to move."""
        colours = np.full((*self.stones.shape[1:], 3), 230, np.uint8)
        colours[self.stones[0] > 0], colours[self.stones[1] > 0] = (200, 40, 40), (40, 80, 200)
        return colours.repeat(64, 0).repeat(64, 1)


class Atari(gym.Env):
    """One game of ale-py's vector environment: the last four frames in grey, with sticky actions."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}

    def __init__(self, game: str, render_mode: Optional[str] = None):
        size = {"img_height": 96, "img_width": 96, "num_threads": 1}
        self.game = AtariVectorEnv(game, 1, repeat_action_probability=0.25, reward_clipping=False, use_fire_reset=False,
                                   autoreset_mode=gym.vector.AutoresetMode.SAME_STEP, **size)  # fmt: skip
        self.observation_space, self.action_space = self.game.single_observation_space, self.game.single_action_space
        self.render_mode = render_mode

    def reset(self, *, seed: Optional[int] = None, options: Optional[dict] = None):
        super().reset(seed=seed)
        self.frames = self.game.reset(seed=seed)[0][0]
        return self.frames, {}

    def step(self, action: int):
        obs, reward, terminated, truncated, info = self.game.step(np.array([action]))
        self.frames = (info["final_obs"] if terminated[0] or truncated[0] else obs)[0]
        return self.frames, float(reward[0]), bool(terminated[0]), bool(truncated[0]), {}

    def render(self) -> np.ndarray:
        return self.frames[-1, :, :, None].repeat(3, 2).repeat(4, 0).repeat(4, 1)


if "TicTacToe-v0" not in gym.registry:
    gym.register("TicTacToe-v0", entry_point=TicTacToe, max_episode_steps=9)
if "Atari/pong-v0" not in gym.registry:
    for game in get_all_rom_ids():  # an episode has at most 108,000 frames
        gym.register(f"Atari/{game}-v0", entry_point=partial(Atari, game), max_episode_steps=27_000)


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
