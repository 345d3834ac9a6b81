"""The figures of docs/dreamer_v1.md, each from several seeds of `algos/dreamer_v1.py`.

    python benchmarks/dreamer_figures.py pendulum            # from numbers
    python benchmarks/dreamer_figures.py pendulum-pixels
    python benchmarks/dreamer_figures.py cartpole-pixels
    python benchmarks/dreamer_figures.py pendulum --workers 1 --runs /tmp/runs

Runs stay in the folder --runs: one that is there and finished is not made again, one that was stopped goes on. Each
experiment writes benchmarks/results/dreamer_v1_<name>.csv and docs/figures/dreamer_v1_<name>.png, and prints its table.
"""

import csv
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent))
from figure_runs import curve, interval, minutes, train_all

ROOT = Path(__file__).resolve().parent.parent
HORIZONS = (1, 5, 15, 45)
TABLE = (0.25, 0.5, 0.75, 1.0)  # the parts of the run that the table shows


@dataclass
class Args:
    name: Annotated[Literal["pendulum", "pendulum-pixels", "cartpole-pixels"], tyro.conf.Positional]
    """Which preset."""
    runs: Path = Path("runs/dreamer_figures")
    """Where the runs are kept."""
    flags: str = ""
    """More flags for each run."""
    seeds: int = 3
    """So many seeds."""
    first_seed: int = 1
    """The first of them."""
    workers: int = max((os.cpu_count() or 2) // 2, 1)
    """Runs at a time, each with one thread."""


def main(args: Args) -> None:
    command = f"{args.name} {args.flags}".strip()
    (folders,) = train_all(
        "dreamer_v1", {"": command}, args.seeds, args.runs, args.workers, args.first_seed
    ).values()

    figure = Figure(figsize=(9, 3.6), dpi=90)
    left = figure.add_subplot(1, 2, 1, xlabel="environment steps", ylabel="return")
    right = figure.add_subplot(1, 2, 2, xlabel="environment steps", ylabel="½ mean squared error")
    rows = []
    tags = {"eval/episodic_return": (left, "evaluation")}
    tags |= {f"model/open_loop_error_{h}": (right, f"{h} steps ahead") for h in HORIZONS}
    for tag, (axes, label) in tags.items():
        curves = [curve(folder, tag) for folder in folders]
        for seed, points in enumerate(curves, args.first_seed):
            rows += [[seed, tag, step, f"{value:.6g}"] for step, value in points]
        shared = sorted(set.intersection(*({step for step, _ in points} for points in curves)))
        values = np.array([[dict(points)[step] for step in shared] for points in curves])
        means, halves = interval(values)
        (line,) = axes.plot(shared, means, label=label)
        axes.fill_between(shared, means - halves, means + halves, alpha=0.15, color=line.get_color())
        if axes is left:
            for one in values:
                axes.plot(shared, one, linewidth=0.6, alpha=0.6, color=line.get_color())
            shown = [shared[round(part * len(shared)) - 1] for part in TABLE]
            print(f"\n| {args.name}, evaluation at | " + " | ".join(f"{step:,}" for step in shown) + " | minutes |")
            print("|-|" + "-|" * (len(shown) + 1))
            for seed, one in enumerate(values, args.first_seed):
                cells = " | ".join(f"{one[shared.index(step)]:.1f}" for step in shown)
                print(f"| seed {seed} | {cells} | {minutes([folders[seed - args.first_seed]])} |")
            cells = " | ".join(f"{means[shared.index(s)]:.0f} ± {halves[shared.index(s)]:.0f}" for s in shown)
            print(f"| `{command}` | {cells} | {minutes(folders)} |")
    right.set_yscale("log")
    for axes in (left, right):
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "figures" / f"dreamer_v1_{args.name}.png")
    if films := sorted((folders[0] / "dreams").glob("*.gif")):
        shutil.copy(films[-1], ROOT / "docs" / "figures" / f"dreamer_v1_{args.name}.gif")
    path = ROOT / "benchmarks" / "results" / f"dreamer_v1_{args.name}.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["seed", "tag", "step", "value"], *rows])
    print(f"\nwrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=(__doc__ or "").split("\n\n")[0]))
