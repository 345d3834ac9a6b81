"""The figures of docs/pets.md, each from several seeds of `algos/pets.py`.

    python benchmarks/pets_figures.py cartpole         # the paper's swing-up, learned and true dynamics
    python benchmarks/pets_figures.py ablation         # the paper's ablations on it: model, propagation, optimiser
    python benchmarks/pets_figures.py pendulum
    python benchmarks/pets_figures.py halfcheetah      # a planner of a laptop's size, one seed
    python benchmarks/pets_figures.py cartpole-paper   # the paper's sizes, one seed: hours
    python benchmarks/pets_figures.py toy              # the ensemble on a line with noise and a gap: no agent
    python benchmarks/pets_figures.py pendulum --workers 1 --runs /tmp/runs

Runs stay in the folder --runs: one that is there and finished is not made again, one that was stopped goes on. Each
experiment writes benchmarks/results/pets_<name>.csv and docs/figures/pets_<name>.png, and prints its table.
"""

import csv
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "algos"))
import pets
from mpc_rs_figures import curve, interval, minutes, train_all

ROOT = Path(__file__).resolve().parent.parent

SHORT = "--total-timesteps 1600 --eval-episodes 1 --picture-every 0"
LAPTOP = "--particles 5 --candidates 200 --elites 20 --iterations 4 --horizon 15"
EXPERIMENTS = {  # label → command line, and the number of seeds
    "cartpole": (
        {"PETS": "cartpole", "CEM, true dynamics": "cartpole --dynamics true --total-timesteps 200"},
        5,
    ),
    "ablation": (
        {
            "PE-TS∞": "cartpole",  # the runs of the first experiment, up to the last step of the others
            "PE-TS1": f"cartpole --propagation TS1 {SHORT}",
            "PE-E": f"cartpole --propagation E {SHORT}",
            "DE-TS∞": f"cartpole --model DE {SHORT}",
            "P-TS": f"cartpole --model P {SHORT}",
            "D-E": f"cartpole --model D --propagation E {SHORT}",
            "PE-TS∞, random shooting": f"cartpole --optimizer random {SHORT}",
        },
        3,
    ),
    "pendulum": (
        {"PETS": "pendulum --eval-episodes 10"},
        5,
    ),
    "halfcheetah": (
        {"PETS, small planner": f"halfcheetah --total-timesteps 6000 {LAPTOP}"},
        1,
    ),
    "cartpole-paper": (
        {"PETS, the paper's sizes": "cartpole-paper --eval-episodes 1"},
        1,
    ),
}


@dataclass
class Args:
    name: Annotated[
        Literal["cartpole", "ablation", "pendulum", "halfcheetah", "cartpole-paper", "toy"], tyro.conf.Positional
    ]
    """Which experiment."""
    runs: Path = Path("runs/pets_figures")
    """Where the runs are kept."""
    seeds: int = 0
    """So many seeds; 0: as many as the page shows."""
    workers: int = max((os.cpu_count() or 2) // 2, 1)
    """Runs at a time, each with one thread."""


def main(args: Args) -> None:
    if args.name == "toy":
        draw_toy()
        return
    variants, seeds = EXPERIMENTS[args.name]
    seeds = args.seeds or seeds
    folders = train_all("pets", variants, seeds, args.runs, args.workers)

    rows, figure = [], Figure(figsize=(7, 4), dpi=100)
    axes = figure.add_subplot(xlabel="real environment steps", ylabel="return of a trial")
    curves = {label: [curve(folder, "charts/episodic_return") for folder in folders[label]] for label in variants}
    end = min(points[-1][0] for label, flags in variants.items() if "true" not in flags for points in curves[label])
    head = f"{args.name} | trial at 1,200 steps | trial at {end:,}, each seed | mean | evaluation | minutes a run"
    print(f"\n| {head} |\n|{'-|' * 6}")
    for label, flags in variants.items():
        evaluations = [curve(folder, "eval/episodic_return") for folder in folders[label]]
        training = [[point for point in points if point[0] <= end] for points in curves[label]]
        for tag, kept in (("eval/episodic_return", evaluations), ("charts/episodic_return", training)):
            rows += [[label, seed, tag, step, f"{value:.4f}"] for seed, x in enumerate(kept, 1) for step, value in x]
        tests = np.array([points[-1][1] for points in evaluations])
        last = np.array([points[-1][1] for points in training])
        middle = [dict(points).get(1_200, np.nan) for points in training]
        spread = [f" ± {half:.1f}" if seeds > 1 else "" for half in (interval(last)[1], interval(tests)[1])]
        each = ", ".join(f"{value:.1f}" for value in last)
        print(f"| `{flags}` | {np.mean(middle):.1f} (min {np.min(middle):.1f}) | {each} | {last.mean():.1f}{spread[0]} "
              f"| {tests.mean():.1f}{spread[1]} | {minutes(folders[label])} |")  # fmt: skip
        if "--dynamics true" in flags:
            axes.axhline(tests.mean(), linestyle=":", color="black", label=label)
            continue
        means, halves = interval(np.array([[value for _, value in points] for points in training]))
        steps = [step for step, _ in training[0]]
        (line,) = axes.plot(steps, means, label=label)
        axes.fill_between(steps, means - halves, means + halves, alpha=0.15, color=line.get_color())
    axes.legend(fontsize=8)
    save(figure, args.name)
    path = ROOT / "benchmarks" / "results" / f"pets_{args.name}.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["variant", "seed", "tag", "step", "value"], *rows])
    print(f"\nwrote {path.relative_to(ROOT)}")


def save(figure: Figure, name: str) -> None:
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "figures" / f"pets_{name}.png")


class Silent:
    """A log that nobody reads."""

    def mean(self, tag: str, value: torch.Tensor) -> None:
        pass


def toy_noise(s: np.ndarray) -> np.ndarray:
    return 0.05 + 0.2 / (1 + np.exp(-3 * s))


def draw_toy() -> None:
    """s' − s = sin 2s + noise(s), seen on [−2, −0.3] and [0.7, 2.5] alone: five members, their noise, their spread."""
    pets.seed_everything(0)
    box = gym.spaces.Box(-9, 9, (1,))
    replay = pets.ReplayBuffer(1_001, box, gym.spaces.Box(-1, 1, (1,)))
    for s in np.concatenate([np.random.uniform(-2, -0.3, 500), np.random.uniform(0.7, 2.5, 500)]):
        change = np.sin(2 * s) + toy_noise(s) * np.random.randn()
        replay.add(np.array([s]), np.zeros(1), 0.0, np.array([s + change]), False, False)
    args = pets.Args(epochs=200, batch_size=64, layers=2, hidden=64, weight_decay=(1e-4,))
    model = pets.Ensemble(5, 1, 1, args.layers, args.hidden, 0, 1.0, True, False, False)
    optimizer = pets.make_optimizer(model, args.weight_decay, args.learning_rate)
    pets.fit_ensemble(model, optimizer, replay, args, Silent(), lambda: False)
    s = torch.linspace(-4, 5, 300)[:, None]
    with torch.no_grad():
        mean, std, _ = model.gaussian(s.expand(5, -1, -1), torch.zeros(5, 300, 1))
        mean, std = mean[..., 0].numpy(), std[..., 0].numpy()
    s, data = s[:, 0].numpy(), replay.rows(np.arange(replay.size))
    noise, doubt = np.sqrt((std**2).mean(0)), mean.std(0)
    figure = Figure(figsize=(9, 3.6), dpi=100)
    axes = figure.add_subplot(1, 2, 1, xlabel="s", ylabel="s' − s", ylim=(-2.6, 2.6), title="members, ± 2 deviations")
    axes.plot(data.obs[:, 0], (data.next_obs - data.obs)[:, 0], ".", markersize=2, color="gray", label="data")
    axes.plot(s, np.sin(2 * s), "k--", linewidth=1, label="truth")
    for b in range(5):
        (line,) = axes.plot(s, mean[b], linewidth=1)
        axes.fill_between(s, mean[b] - 2 * std[b], mean[b] + 2 * std[b], alpha=0.1, color=line.get_color())
    axes.legend(fontsize=8, loc="upper right")
    axes = figure.add_subplot(1, 2, 2, xlabel="s", ylabel="deviation", ylim=(0, 1), title="noise and doubt, told apart")
    axes.plot(s, toy_noise(s), "k--", linewidth=1, label="the world's noise")
    axes.plot(s, noise, label="aleatoric: the members' own noise")
    axes.plot(s, doubt, label="epistemic: how far they part")
    for low, high in ((-2, -0.3), (0.7, 2.5)):
        axes.axvspan(low, high, color="gray", alpha=0.15)
    axes.legend(fontsize=8)
    save(figure, "toy")
    inside = ((s > -1.8) & (s < -0.5)) | ((s > 0.9) & (s < 2.3))
    print(f"inside the data: aleatoric / true noise {np.mean(noise[inside] / toy_noise(s[inside])):.3f}, "
          f"members' spread {doubt[inside].mean():.3f}; in the gap {doubt[(s > 0) & (s < 0.4)].mean():.3f}, "
          f"beyond it {doubt[(s < -3) | (s > 4)].mean():.3f}")  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Args, description=(__doc__ or "").split("\n\n")[0]))
