"""The comparisons of docs/icm.md, each from several seeds of `algos/icm.py`.

    python benchmarks/icm_figures.py maze           # ICM, PPO alone and random moves
    python benchmarks/icm_figures.py mountaincar    # ICM and PPO alone
    python benchmarks/icm_figures.py noise          # a screen full of noise: inverse features against pixels
    python benchmarks/icm_figures.py alone          # a large maze without rewards

Runs stay in the folder --runs: finished ones are not made again, stopped ones continue. Each comparison writes
benchmarks/results/icm_<name>.csv and docs/figures/icm_<name>.png, and prints its table.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).resolve().parent))
from figure_runs import curve, interval, load, minutes, train_all

ROOT = Path(__file__).resolve().parent.parent
NOISE, LARGE = "maze --env-id NoisyMaze-v0", "maze --env-id LargeMaze-v0 --total-timesteps 2000000"
EXPERIMENTS = {  # label → command line
    "maze": {"ICM": "maze", "PPO alone": "maze --reward extrinsic"},
    "mountaincar": {"ICM": "mountaincar", "PPO alone": "mountaincar --reward extrinsic"},
    "noise": {"ICM": NOISE, "pixels": f"{NOISE} --features pixels"},
    "alone": {"curiosity alone": f"{LARGE} --reward intrinsic"},
}
PANELS = {
    "eval/episodic_return": "return of the greedy policy",
    "charts/tiles_visited": "tiles visited",
    "losses/entropy": "entropy of the policy",
    "losses/value": "loss of the value",
    "losses/forward": "loss of the forward model",
}


@dataclass
class Args:
    name: Annotated[Literal[tuple(EXPERIMENTS)], tyro.conf.Positional]  # which comparison
    runs: Path = Path("runs/icm_figures")  # folder of the runs
    seeds: int = 5  # number of seeds
    first_seed: int = 1  # the first of them
    workers: int = 1  # runs at a time, each with one thread


def random_moves(flags: str, seed: int) -> list[tuple[int, float]]:
    """Tiles that random moves visit in as many steps as such a run takes."""
    icm, points = load("icm"), []
    args = icm.parse_args(flags.split())
    torch.manual_seed(seed)
    envs = icm.Environments(args)
    for step in range(args.envs, args.total_timesteps + 1, args.envs):
        envs.step(torch.randint(4, (args.envs,)).tolist())
        if step % (100 * args.envs) == 0:
            points.append((step, float((envs.visits > 0).sum())))
    return points


def first_success(points: list[tuple[int, float]], floor: float) -> str:
    return next((f"{step:,}" for step, value in points if value > floor), "never")


def main(args: Args) -> None:
    variants = EXPERIMENTS[args.name]
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    folders = train_all("icm", variants, args.seeds, args.runs, args.workers, args.first_seed)
    found = {
        label: {tag: [curve(x, tag) for x in folders[label]] for tag in tags_of(folders[label])} for label in variants
    }
    if args.name in ("maze", "alone"):
        walks = [random_moves(next(iter(variants.values())), seed) for seed in seeds]
        found["random moves"] = {"charts/tiles_visited": walks}
    shown = [tag for tag in PANELS if any(tag in curves for curves in found.values())]
    figure = Figure(figsize=(3.4 * len(shown), 3.2), dpi=90, layout="constrained")
    floor = -200 if args.name == "mountaincar" else 0
    print(
        f"\n| {args.name} | return at the end, each seed | first success in training | tiles visited | minutes a run |"
    )
    print("|-|-|-|-|-|")
    for label, curves in found.items():
        last = {tag: ", ".join(f"{points[-1][1]:.4g}" for points in each) for tag, each in curves.items()}
        first = ", ".join(first_success(points, floor) for points in curves.get("charts/episodic_return", []))
        name = f"`{variants[label]}`" if label in variants else label
        clock = minutes(folders[label]) if label in variants else ""
        columns = last.get("eval/episodic_return", ""), first, last.get("charts/tiles_visited", ""), clock
        print(f"| {name} | {' | '.join(columns)} |")
    for axes, tag in zip(np.atleast_1d(figure.subplots(1, len(shown))), shown, strict=True):
        for label, curves in found.items():
            if tag in curves:
                steps = np.array([step for step, _ in curves[tag][0]])
                means, halves = interval(np.array([[value for _, value in points] for points in curves[tag]]))
                (line,) = axes.plot(steps / 1_000, means, label=label)
                axes.fill_between(steps / 1_000, means - halves, means + halves, alpha=0.2, color=line.get_color())
        axes.set(xlabel="thousands of environment steps", title=PANELS[tag])
        if tag in ("losses/value", "losses/forward"):
            axes.set_yscale("log")
        if tag == shown[len(found) - len(variants)]:  # the second panel also has random moves
            axes.legend(fontsize=8)
    figure.savefig(ROOT / "docs" / "figures" / f"icm_{args.name}.png")
    path = ROOT / "benchmarks" / "results" / f"icm_{args.name}.csv"
    with open(path, "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["variant", "seed", "tag", "step", "value"])
        for label, curves in found.items():
            for tag in shown:
                for seed, points in zip(seeds, curves.get(tag, []), strict=False):
                    table.writerows([label, seed, tag, step, f"{value:.4g}"] for step, value in points)
    print(f"\nwrote {path.relative_to(ROOT)}")


def tags_of(folders: list[Path]) -> list[str]:
    written = EventAccumulator(str(folders[0])).Reload().Tags()["scalars"]
    return [tag for tag in (*PANELS, "charts/episodic_return") if tag in written]


if __name__ == "__main__":
    main(tyro.cli(Args, description=(__doc__ or "").split("\n\n")[0]))
