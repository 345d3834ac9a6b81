"""The figures of docs/icm.md, each from several seeds of `algos/icm.py`.

    python benchmarks/icm_figures.py maze           # curiosity, PPO alone, noise
    python benchmarks/icm_figures.py features       # other things to foresee
    python benchmarks/icm_figures.py alone          # without any reward, beside a random walk
    python benchmarks/icm_figures.py tv             # a screen full of noise in the maze
    python benchmarks/icm_figures.py mountaincar

Runs stay in the folder --runs: one that is there and finished is not made again, one that was stopped goes on. Each
experiment writes benchmarks/results/icm_<name>.csv and docs/figures/icm_<name>.png, and prints its table.
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
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
from figure_runs import curve, interval, load, minutes, train_all

ROOT = Path(__file__).resolve().parent.parent
LARGE, LONG = 21, 400  # tiles a side, steps of an episode: in the default maze random moves leave too little to find
MORE = "--total-timesteps 2_500_000 --decay-steps 2_500_000"
EXPERIMENTS = {  # label → command line, and the number of seeds
    "maze": (
        {
            "ICM": "maze",
            "PPO alone": "maze --reward extrinsic",
            "PPO and noise": "maze --features noise",
        },
        5,
    ),
    "features": (
        {
            "ICM": "maze",
            "random features": "maze --features random",
            "pixels": "maze --features pixels",
            "ICM, joint": "maze --joint",
        },
        3,
    ),
    "alone": (
        {"curiosity alone": f"maze --reward intrinsic --maze-size {LARGE} --episode-limit {LONG} {MORE}"},
        5,
    ),
    "tv": (
        {
            "ICM": "maze --noisy-tv",
            "pixels": "maze --noisy-tv --features pixels",
        },
        3,
    ),
    "mountaincar": ({"ICM": "mountaincar", "PPO alone": "mountaincar --reward extrinsic"}, 5),
}
TAGS = ("charts/places", "charts/success_rate", "eval/success_rate", "eval/episodic_return")


@dataclass
class Args:
    name: Annotated[Literal[tuple(EXPERIMENTS)], tyro.conf.Positional]
    """Which experiment."""
    runs: Path = Path("runs/icm_figures")
    """Where the runs are kept."""
    seeds: int = 0
    """So many seeds; 0: as many as the page shows."""
    first_seed: int = 1
    """The first of them."""
    workers: int = max((os.cpu_count() or 2) // 2, 1)
    """Runs at a time, each with one thread."""


def random_walk(seed: int, steps: list[int]) -> list[tuple[int, float]]:
    """Tiles of the large maze that random moves have visited until each of these steps of 64 environments together."""
    mazes, rng, done, points = load("icm").CuriousMazes(64, LARGE, LONG), np.random.default_rng(seed), 0, []
    mazes.reset(seed=seed)
    seen = np.zeros(mazes.walls.shape, bool)
    for step in steps:
        while done < step:
            seen[tuple(mazes.step(rng.integers(4, size=64))[4]["tile"].T)] = True
            done += 64
        points.append((step, float(seen.sum())))
    return points


def first_success(points: list[tuple[int, float]]) -> str:
    return next((f"{step:,}" for step, value in points if value > 0), "never")


def at_the_end(curves: Optional[list]) -> str:
    """Mean, and each seed's."""
    last = [points[-1][1] for points in curves or []]
    return f"{np.mean(last):.2f} ({', '.join(f'{value:.4g}' for value in last)})" if last else ""


def film(one: Path, other: Path, path: Path) -> None:
    """The pictures of two runs, one above the other, as they were at the same steps."""
    frames = []
    for frame in sorted((one / "frames").glob("*.png")):
        if (other / "frames" / frame.name).exists():
            rows = [np.asarray(Image.open(folder / "frames" / frame.name)) for folder in (one, other)]
            width = max(row.shape[1] for row in rows)
            rows = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
            frames.append(Image.fromarray(np.concatenate(rows)))
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=500, loop=0)


def main(args: Args) -> None:
    variants, seeds = EXPERIMENTS[args.name]
    seeds = args.seeds or seeds
    folders = train_all("icm", variants, seeds, args.runs, args.workers, args.first_seed)

    measured = {label: {tag: [curve(x, tag) for x in folders[label]] for tag in TAGS} for label in variants}
    if args.name == "alone":
        steps = [step for step, _ in measured["curiosity alone"]["charts/places"][0]]
        walks = [random_walk(seed, steps) for seed in range(args.first_seed, args.first_seed + seeds)]
        measured["random walk"] = {"charts/places": walks}
    shown = [tag for tag in ("charts/places", "eval/success_rate") if args.name != "alone" or tag == "charts/places"]
    if args.name == "mountaincar":
        shown[1] = "eval/episodic_return"
    figure = Figure(figsize=(4.6 * len(shown), 3.6), dpi=90)
    panels = dict(zip(shown, np.atleast_1d(figure.subplots(1, len(shown))), strict=True))
    rows = []
    print(f"\n| {args.name} | success at the end | first success | return at the end | places | minutes a run |")
    print("|-|-|-|-|-|-|")
    for label, curves in measured.items():
        for tag, points in curves.items():
            for seed, one in enumerate(points, args.first_seed):
                rows += [[label, seed, tag, step, f"{y:.4f}"] for step, y in one]
            if tag in panels:
                steps, values = [step for step, _ in points[0]], np.array([[y for _, y in one] for one in points])
                means, halves = interval(values)
                (line,) = panels[tag].plot(steps, means, label=label)
                panels[tag].fill_between(steps, means - halves, means + halves, alpha=0.15, color=line.get_color())
        cells = [at_the_end(curves.get(tag)) for tag in ("eval/success_rate", "eval/episodic_return", "charts/places")]
        first = ", ".join(first_success(one) for one in curves.get("charts/success_rate", []))
        name = f"`{variants[label]}`" if label in variants else label
        clock = minutes(folders[label]) if label in variants else ""
        print(f"| {name} | {cells[0]} | {first} | {cells[1]} | {cells[2]} | {clock} |")
    for tag, axes in panels.items():
        axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k")
        axes.set(xlabel="environment steps", ylabel={"charts/places": "places visited"}.get(tag, tag.split("/")[1]))
    panels["charts/places"].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "figures" / f"icm_{args.name}.png")
    if args.name == "maze":
        film(folders["ICM"][0], folders["PPO alone"][0], ROOT / "docs" / "figures" / "icm_visits.gif")
    path = ROOT / "benchmarks" / "results" / f"icm_{args.name}.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["variant", "seed", "tag", "step", "value"], *rows])
    print(f"\nwrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=(__doc__ or "").split("\n\n")[0]))
