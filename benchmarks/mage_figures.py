"""The figures of docs/mage.md, each from several seeds of `algos/mage.py`.

    python benchmarks/mage_figures.py pendulum            # MAGE, Dyna-TD3 and TD3
    python benchmarks/mage_figures.py invertedpendulum    # MAGE and Dyna-TD3
    python benchmarks/mage_figures.py pendulum --workers 1 --runs /tmp/runs

Runs stay in the folder --runs: one that is there and finished is not made again, one that was stopped goes on. Each
experiment writes benchmarks/results/mage_<name>.csv and docs/figures/mage_<name>.png, and prints its tables.
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

POLE = "pendulum --env-id InvertedPendulum-v5 --random-steps 500 --total-timesteps 5000 --eval-every 500"
POLE += " --picture-every 500"
EXPERIMENTS = {  # label → command line, the number of seeds, and the steps of the table
    "pendulum": (
        {
            "MAGE": "pendulum",
            "Dyna-TD3": "pendulum --gradient-weight 0",
            "TD3": "pendulum --gradient-weight 0 --no-imagine",
            "TD3, an update a step": "pendulum --gradient-weight 0 --no-imagine --updates 1",
        },
        5,
        (600, 800, 1_000, 1_400, 2_000, 3_000),
    ),
    "invertedpendulum": (
        {"MAGE": POLE, "Dyna-TD3": f"{POLE} --gradient-weight 0"},
        3,
        (1_000, 2_000, 3_000, 4_000, 5_000),
    ),
}


@dataclass
class Args:
    name: Annotated[Literal["pendulum", "invertedpendulum"], tyro.conf.Positional]
    """Which experiment."""
    runs: Path = Path("runs/mage_figures")
    """Where the runs are kept."""
    workers: int = max((os.cpu_count() or 2) // 2, 1)
    """Runs at a time, each with one thread."""


def area(points: list[tuple[int, float]]) -> float:
    """Under a curve of evaluations, by trapezia, over its length: a mean return."""
    steps, values = np.array(points).T
    return float(((values[1:] + values[:-1]) / 2 * np.diff(steps)).sum() / (steps[-1] - steps[0]))


def main(args: Args) -> None:
    variants, seeds, shown = EXPERIMENTS[args.name]
    folders = train_all("mage", variants, seeds, args.runs, args.workers)

    rows, areas, figure = [], {}, Figure(figsize=(10, 4), dpi=90)
    panels = {
        "eval/episodic_return": figure.add_subplot(
            1, 2, 1, xlabel="real environment steps", ylabel="evaluation return"
        ),
        "model/gradient_cosine": figure.add_subplot(
            1,
            2,
            2,
            xlabel="real environment steps",
            ylabel="cosine of the critics' and the true ∇ₐ Q",
            ylim=(-1.05, 1.05),
        ),
    }
    head = " | ".join(f"{step:,}" for step in shown)
    print(f"\n| {args.name}, evaluation at | {head} | last, each seed | cosine, mean | minutes a run |")
    print("|-|" + "-|" * (len(shown) + 3))
    for label, flags in variants.items():
        table, cosine = {}, 0.0
        for tag, axes in panels.items():
            curves = [curve(folder, tag) for folder in folders[label]]
            rows += [
                [label, seed, tag, *(f"{x:.6g}" for x in point)] for seed, c in enumerate(curves, 1) for point in c
            ]
            steps, values = [step for step, _ in curves[0]], np.array([[value for _, value in c] for c in curves])
            means, halves = interval(values)
            (line,) = axes.plot(steps, means, label=label)
            axes.fill_between(steps, means - halves, means + halves, alpha=0.15, color=line.get_color())
            if tag == "eval/episodic_return":
                areas[label] = np.array([area(c) for c in curves])
                table = {step: f"{means[i]:.0f} ± {halves[i]:.0f}" for i, step in enumerate(steps)}
                each = ", ".join(f"{value:.1f}" for value in values[:, -1])
            else:
                cosine = values.mean()
        cells = " | ".join(table.get(step, "") for step in shown)
        print(f"| `{flags}` | {cells} | {each} | {cosine:.2f} | {minutes(folders[label])} |")
    print("\n| area under the curve | mean return over the steps | MAGE's less this, the same seed |\n|-|-|-|")
    for label, found in areas.items():
        (mean, half), (lead, room) = (interval(x) for x in (found, areas["MAGE"] - found))
        print(f"| {label} | {mean:.0f} ± {half:.0f} | " + (f"{lead:.0f} ± {room:.0f} |" if label != "MAGE" else "|"))
    panels["eval/episodic_return"].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "figures" / f"mage_{args.name}.png")
    path = ROOT / "benchmarks" / "results" / f"mage_{args.name}.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["variant", "seed", "tag", "step", "value"], *rows])
    print(f"\nwrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=(__doc__ or "").split("\n\n")[0]))
