"""The figures of docs/vin.md, each from several seeds of `algos/vin.py`.

    python benchmarks/vin_figures.py maze8
    python benchmarks/vin_figures.py maze16
    python benchmarks/vin_figures.py reactive   # the paper's other networks in the same mazes
    python benchmarks/vin_figures.py maze28
    python benchmarks/vin_figures.py rl
    python benchmarks/vin_figures.py public --data gridworld_8x8.npz

Runs stay in the folder --runs: one that is there and finished is not made again, one that was stopped goes on. Each
experiment writes benchmarks/results/vin_<name>.csv and docs/figures/vin_<name>.png, and prints its table.
"""

import csv
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Optional

import numpy as np
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent))
from figure_runs import curve, interval, minutes, train_all

ROOT = Path(__file__).resolve().parent.parent
FEW = "--transfer-size 0 --picture-every 0 --eval-episodes 20"
SHORT = "--total-timesteps 4000000 --hold-steps 2000000 --decay-steps 2000000"
SHORTER = "--total-timesteps 1000000 --hold-steps 500000 --decay-steps 500000 --eval-every 200000"
EXPERIMENTS = {  # label → command line, and the number of seeds
    "maze8": ({"VIN": "maze8", "FCN": f"maze8 --model fcn {FEW}"}, 3),
    "maze16": ({"VIN": "maze16"}, 3),
    "reactive": (
        {"FCN": f"maze16 --model fcn {SHORT} {FEW}", "CNN": f"maze16 --model cnn {SHORTER} {FEW}"},
        1,
    ),
    "maze28": ({"VIN": "maze28"}, 1),
    "rl": ({"VIN, from rewards": "maze8 --train rl --total-timesteps 1000000 --eval-every 100000"}, 3),
    "public": ({"VIN": "maze8 --transfer-size 0"}, 3),
}
COLUMNS = {
    "eval/success_rate": ("success", 100, "%"),
    "eval/trajectory_difference": ("detour", 1, ""),
    "eval/prediction_loss": ("prediction loss", 1, ""),
    "eval/prediction_error": ("other moves", 100, "%"),
    "eval/wrong_moves": ("wrong moves", 100, "%"),
    "eval/transfer_success_rate": ("transfer", 100, "%"),
    "model/value_correlation": ("value and way", 1, ""),
}


@dataclass
class Args:
    name: Annotated[Literal[tuple(EXPERIMENTS)], tyro.conf.Positional]
    """Which experiment."""
    data: Optional[Path] = None
    """The public data, for `public`."""
    runs: Path = Path("runs/vin_figures")
    """Where the runs are kept."""
    workers: int = max((os.cpu_count() or 2) // 2, 1)
    """Runs at a time, each with one thread."""


def main(args: Args) -> None:
    variants, seeds = EXPERIMENTS[args.name]
    if args.name == "public":
        if args.data is None:
            raise SystemExit("public needs --data FILE.npz")
        variants = {label: f"{flags} --data {args.data.resolve()}" for label, flags in variants.items()}
    folders = train_all("vin", variants, seeds, args.runs, args.workers)

    rows, figure = [], Figure(figsize=(5, 3.6), dpi=90)
    axes = figure.add_subplot(xlabel="moves shown" if args.name != "rl" else "moves made", ylabel="success rate")
    head = " | ".join(name for name, _, _ in COLUMNS.values())
    print(f"\n| {args.name} | {head} | success, each seed | minutes a run |\n|-|" + "-|" * (len(COLUMNS) + 2))
    for label in variants:
        cells, each = [], ""
        for tag, (_, scale, unit) in COLUMNS.items():
            try:
                curves = [curve(folder, tag) for folder in folders[label]]
            except KeyError:  # only a VIN has it
                cells.append("")
                continue
            rows += [[label, seed, tag, *(f"{x:.6g}" for x in p)] for seed, c in enumerate(curves, 1) for p in c]
            steps, values = [step for step, _ in curves[0]], np.array([[v for _, v in c] for c in curves])
            mean, half = interval(scale * values[:, -1:])
            spread = f" ± {half[0]:.2g}" if seeds > 1 else ""
            cells.append(f"{mean[0]:.3g}{spread}{' ' * bool(unit)}{unit}")
            if tag == "eval/success_rate":
                each = ", ".join(f"{100 * value:.2f}" for value in values[:, -1])
                (line,) = axes.plot(steps, values.mean(0), label=label)
                axes.fill_between(steps, values.min(0), values.max(0), alpha=0.2, color=line.get_color())
        print(f"| {label} | {' | '.join(cells)} | {each} | {minutes(folders[label])} |")
    axes.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "figures" / f"vin_{args.name}.png")
    path = ROOT / "benchmarks" / "results" / f"vin_{args.name}.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["variant", "seed", "tag", "step", "value"], *rows])
    print(f"\nwrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=(__doc__ or "").split("\n\n")[0]))
