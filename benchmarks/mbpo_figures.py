"""The figures of docs/mbpo.md, each from several seeds of `algos/mbpo.py`.

    python benchmarks/mbpo_figures.py invertedpendulum    # MBPO and its control, SAC with as many updates
    python benchmarks/mbpo_figures.py pendulum
    python benchmarks/mbpo_figures.py hopper              # two seeds, 50,000 steps: hours
    python benchmarks/mbpo_figures.py pendulum --workers 1 --runs /tmp/runs

Runs stay in the folder --runs: one that is there and finished is not made again, one that was stopped goes on. Each
experiment writes benchmarks/results/mbpo_<name>.csv and docs/figures/mbpo_<name>.png, and prints its table.
"""

import csv
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent))
from mpc_rs_figures import curve, interval, minutes, train_all

ROOT = Path(__file__).resolve().parent.parent

SHORT = "--total-timesteps 5000"
EXPERIMENTS = {  # label → command line, the number of seeds, and the steps of the table
    "invertedpendulum": (
        {"MBPO": "invertedpendulum", "SAC, as many updates": f"invertedpendulum --rollout-length 0 {SHORT}"},
        5,
        (1_000, 2_000, 3_000, 4_000, 5_000, 10_000),
    ),
    "pendulum": (
        {"MBPO": "pendulum", "SAC, as many updates": "pendulum --rollout-length 0"},
        5,
        (1_000, 2_000, 3_000, 4_000),
    ),
    "hopper": (
        {
            "MBPO": "hopper --total-timesteps 50000",
            "SAC, as many updates": "hopper --total-timesteps 50000 --rollout-length 0",
        },
        2,
        (10_000, 20_000, 30_000, 40_000, 50_000),
    ),
}


@dataclass
class Args:
    name: Annotated[Literal["invertedpendulum", "pendulum", "hopper"], tyro.conf.Positional]
    """Which experiment."""
    runs: Path = Path("runs/mbpo_figures")
    """Where the runs are kept."""
    seeds: int = 0
    """So many seeds; 0: as many as the page shows."""
    workers: int = max((os.cpu_count() or 2) // 2, 1)
    """Runs at a time, each with one thread."""


def main(args: Args) -> None:
    variants, seeds, shown = EXPERIMENTS[args.name]
    seeds = args.seeds or seeds
    folders = train_all("mbpo", variants, seeds, args.runs, args.workers)

    rows, figure = [], Figure(figsize=(7, 4), dpi=100)
    axes = figure.add_subplot(xlabel="real environment steps", ylabel="evaluation return")
    head = " | ".join(f"{step:,}" for step in shown)
    print(f"\n| {args.name}, evaluation at | {head} | last, each seed | minutes a run |")
    print("|-|" + "-|" * (len(shown) + 2))
    for label, flags in variants.items():
        curves = [curve(folder, "eval/episodic_return") for folder in folders[label]]
        rows += [[label, seed, step, f"{value:.4f}"] for seed, points in enumerate(curves, 1) for step, value in points]
        steps, values = [step for step, _ in curves[0]], np.array([[value for _, value in points] for points in curves])
        means, halves = interval(values)
        found = {step: f"{means[i]:.0f} ± {halves[i]:.0f}" for i, step in enumerate(steps)}
        each = ", ".join(f"{value:.1f}" for value in values[:, -1])
        cells = " | ".join(found.get(step, "") for step in shown)
        print(f"| `{flags}` | {cells} | {each} | {minutes(folders[label])} |")
        (line,) = axes.plot(steps, means, label=label)
        axes.fill_between(steps, means - halves, means + halves, alpha=0.15, color=line.get_color())
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "figures" / f"mbpo_{args.name}.png")
    path = ROOT / "benchmarks" / "results" / f"mbpo_{args.name}.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["variant", "seed", "step", "evaluation"], *rows])
    print(f"\nwrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=(__doc__ or "").split("\n\n")[0]))
