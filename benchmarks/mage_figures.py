"""Compares the critics' action gradients with the simulator's while MAGE, Dyna-TD3 and TD3 learn Pendulum-v1.

    python benchmarks/mage_figures.py --seeds 3

Writes docs/figures/mage_gradients.png and prints the mean cosines.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "algos"))
import mage

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = {"MAGE": "", "Dyna-TD3": "--gradient-weight 0", "TD3": "--gradient-weight 0 --no-imagine"}


@dataclass
class Args:
    seeds: int = 1  # training runs per variant
    pauses: tuple[int, ...] = tuple(range(400, 3_001, 200))  # steps at which to measure, multiples of 200
    states: int = 40  # states in which the gradients are compared
    path: Path = ROOT / "docs" / "figures" / "mage_gradients.png"  # the figure
    flags: str = ""  # further settings of every run


def sample_states(agent: mage.Agent, env: gym.Env, count: int) -> list[np.ndarray]:
    """(θ, θ') after up to 200 steps, of which a share between none and all take random actions."""
    rng, found = np.random.default_rng(0), []
    for _ in range(count):
        obs, _ = env.reset(seed=int(rng.integers(2**31)))
        share = rng.random()
        for _ in range(rng.integers(200)):
            a = rng.uniform(-2, 2, 1).astype(np.float32) if rng.random() < share else agent(obs)
            obs, *_ = env.step(a)
        found.append(env.unwrapped.state)
    return found


def observe(state: np.ndarray) -> np.ndarray:
    return np.array([np.cos(state[0]), np.sin(state[0]), state[1]], np.float32)


def discounted_return(agent: mage.Agent, env: gym.Env, state: np.ndarray, action: float, horizon: int = 300) -> float:
    """Of an action in [−1, 1] and, from then on, the policy's."""
    env.reset(seed=0)
    env.unwrapped.state, a, total = state, np.float32([2 * action]), 0.0
    for t in range(horizon):
        obs, r, *_ = env.step(a)
        total, a = total + agent.args.gamma**t * float(r), agent(obs)
    return total


def action_gradients(agent: mage.Agent, states: list[np.ndarray], step: float = 0.01) -> tuple[np.ndarray, np.ndarray]:
    """∇_a Q at a = π(s): the critics', and the simulator's by finite differences of the policy's return."""
    env = gym.make("Pendulum-v1").unwrapped  # without its time limit
    s = torch.as_tensor(np.array([observe(state) for state in states]))
    a = agent.pi(agent.policy, s).detach().requires_grad_()
    (believed,) = torch.autograd.grad(agent.q(agent.critics, s, a).amin(0).sum(), a)
    true = []
    for state, action in zip(states, a[:, 0].tolist(), strict=True):
        low, high = max(action - step, -1), min(action + step, 1)
        rise = discounted_return(agent, env, state, high) - discounted_return(agent, env, state, low)
        true.append(rise / (high - low))
    return believed[:, 0].numpy(), np.array(true)


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))


def main(args: Args) -> None:
    figure = Figure(figsize=(10, 4), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    for label, flags in VARIANTS.items():
        curves = np.zeros((args.seeds, len(args.pauses)))
        for seed in range(args.seeds):
            with tempfile.TemporaryDirectory() as folder:
                words = ["pendulum", *flags.split(), *args.flags.split(), "--seed", str(seed + 1), "--run-dir", folder]
                for i, pause in enumerate(args.pauses):
                    mage.main([*words, "--total-timesteps", str(pause)])
                    words = ["--resume", folder]  # continues to the bit as if it had not been stopped
                    agent = mage.load_policy(folder)
                    states = sample_states(agent, gym.make("Pendulum-v1").unwrapped, args.states)
                    believed, true = action_gradients(agent, states)
                    curves[seed, i] = cosine(believed, true)
        left.plot(true, believed, "o", markersize=4, alpha=0.6, label=label)  # of the last pause and seed
        (line,) = right.plot(args.pauses, curves.mean(0), label=f"{label}: {curves.mean():.2f} on average")
        right.fill_between(args.pauses, curves.min(0), curves.max(0), alpha=0.15, color=line.get_color())
        print(f"{label}: cosine {curves.mean():.3f} on average, at the end {curves[:, -1].mean():.3f}")
    left.axline((0, 0), slope=1, color="gray", linewidth=1)
    left.set(xlabel="∇ₐ Q of the simulator", ylabel="∇ₐ Q of the critics", title=f"{args.states} states, last step")
    right.set(xlabel="environment steps", ylabel="cosine of the two gradients", ylim=(-1.05, 1.05))
    for axes in (left, right):
        axes.legend(fontsize=8)
    figure.savefig(args.path)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
