"""The figures of docs/mpc_rs.md, each from several seeds of `algos/mpc_rs.py`.

    python benchmarks/mpc_rs_figures.py pendulum       # both planners, learned and true dynamics
    python benchmarks/mpc_rs_figures.py cartpole       # the swing-up, learned and true dynamics
    python benchmarks/mpc_rs_figures.py reacher        # MPPI against random shooting, equal model and budget
    python benchmarks/mpc_rs_figures.py halfcheetah    # the paper's settings, one seed
    python benchmarks/mpc_rs_figures.py pendulum --workers 1 --runs /tmp/runs

Runs stay in the folder --runs: one that is there and finished is not made again, one that was stopped goes on. Each
experiment writes benchmarks/results/mpc_rs_<name>.csv and docs/figures/mpc_rs_<name>.png, and prints its table.
"""

import csv
import importlib.util
import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import numpy as np
import tyro
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

sys.path.insert(0, str(Path(__file__).resolve().parent))
from run import place, train

ROOT = Path(__file__).resolve().parent.parent
TEN = "--eval-episodes 10"
MPPI = "--planner mppi --candidates 100 --horizon 20 --kappa 10"
TRUE = "--dynamics true --total-timesteps 200"
EXPERIMENTS = {  # label → command line, and the number of seeds
    "pendulum": (
        {
            "random shooting": f"pendulum {TEN}",
            "MPPI": f"pendulum {MPPI} {TEN}",
            "random shooting, true dynamics": f"pendulum {TRUE} {TEN}",
            "MPPI, true dynamics": f"pendulum {MPPI} {TRUE} {TEN}",
        },
        5,
    ),
    "cartpole": (
        {"MPPI": "cartpole", "MPPI, true dynamics": f"cartpole {TRUE}"},
        5,
    ),
    "reacher": (
        {"MPPI": "reacher", "random shooting": "reacher --planner random"},
        5,
    ),
    "halfcheetah": (
        {"random shooting": "halfcheetah"},
        1,
    ),
}


@dataclass
class Args:
    name: Annotated[Literal["pendulum", "cartpole", "reacher", "halfcheetah"], tyro.conf.Positional]
    """Which experiment."""
    runs: Path = Path("runs/mpc_rs_figures")
    """Where the runs are kept."""
    workers: int = max((os.cpu_count() or 2) // 2, 1)
    """Runs at a time, each with one thread."""


def train_all(
    script: str, variants: dict[str, str], seeds: int, runs: Path, workers: int, first: int = 1
) -> dict[str, list[Path]]:
    """Every variant (label → command line) with every seed from `first` on: label → its finished run folders. Ctrl-C
    stops each run at a checkpoint."""
    every = {label: [place(script, flags, first + i, runs) for i in range(seeds)] for label, flags in variants.items()}
    jobs = [of_one[i] for i in range(seeds) for of_one in every.values()]
    stopping = threading.Event()
    with ThreadPoolExecutor(workers) as pool:
        done = [pool.submit(train, job, to_stop=stopping.is_set) for job in jobs]
        try:
            for number, one in enumerate(as_completed(done), 1):
                one.result()
                print(f"{number} of {len(jobs)} runs done", flush=True)
        except BaseException:
            stopping.set()
            pool.shutdown(cancel_futures=True)
            raise
    return {label: [run.folder for run in of_one] for label, of_one in every.items()}


def load(name: str) -> ModuleType:
    """A file of algos/ as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).resolve().parent.parent / "algos" / f"{name}.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0}).Reload()
    if tag in events.Tags()["scalars"]:
        return [(e.step, e.value) for e in events.Scalars(tag)]
    return [(e.step, float(make_ndarray(e.tensor_proto))) for e in events.Tensors(tag)]


def interval(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and 95 % bootstrap half-width over the seeds, [seeds, ...] → [...]."""
    rng = np.random.default_rng(0)
    means = samples[rng.integers(len(samples), size=(2_000, len(samples)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return samples.mean(0), (high - low) / 2


def minutes(folders: list[Path]) -> str:
    """The mean wall-clock of the runs that were never stopped."""
    clocks = [json.loads(folder.with_name(folder.name + ".json").read_text()) for folder in folders]
    whole = [clock["seconds"] / 60 for clock in clocks if not clock["resumed"]]
    return f"{np.mean(whole):.1f}" if whole else ""


def main(args: Args) -> None:
    variants, seeds = EXPERIMENTS[args.name]
    folders = train_all("mpc_rs", variants, seeds, args.runs, args.workers)

    rows, figure = [], Figure(figsize=(7, 4), dpi=100)
    axes = figure.add_subplot(xlabel="real environment steps", ylabel="return of an episode")
    print(f"\n| {args.name} | final evaluation, each seed | mean | minutes a run |\n|-|-|-|-|")
    for label, flags in variants.items():
        evaluations, training = [], []
        for seed, folder in enumerate(folders[label], 1):
            for tag, kept in (("eval/episodic_return", evaluations), ("charts/episodic_return", training)):
                kept.append(curve(folder, tag))
                rows += [[label, seed, tag, step, f"{value:.4f}"] for step, value in kept[-1]]
        final = np.array([points[-1][1] for points in evaluations])
        mean, half = interval(final)
        each = ", ".join(f"{value:.1f}" for value in final)
        shown = f"{mean:.1f} ± {half:.1f}" if len(final) > 1 else f"{mean:.1f}"
        print(f"| `{flags}` | {each} | {shown} | {minutes(folders[label])} |")
        if "--dynamics true" in flags:
            axes.axhline(mean, linestyle=":", color="black" if "MPPI" in label else "gray", label=label)
            continue
        means, halves = interval(np.array([[value for _, value in points] for points in training]))
        steps = [step for step, _ in training[0]]
        (line,) = axes.plot(steps, means, label=f"{label}, while learning")
        axes.fill_between(steps, means - halves, means + halves, alpha=0.2, color=line.get_color())
        means, halves = interval(np.array([[value for _, value in points] for points in evaluations]))
        axes.errorbar([step for step, _ in evaluations[0]], means, halves, fmt="o", color=line.get_color(), capsize=3,
                      label=f"{label}, evaluation")  # fmt: skip
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "figures" / f"mpc_rs_{args.name}.png")
    path = ROOT / "benchmarks" / "results" / f"mpc_rs_{args.name}.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["variant", "seed", "tag", "step", "value"], *rows])
    print(f"\nwrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=(__doc__ or "").split("\n\n")[0]))
