"""The figures of docs/dyna_q.md, each from 30 seeds of `algos/dyna_q.py`.

    python benchmarks/dyna_q_figures.py figure-8-2      # steps per episode with n = 0, 5, 50
    python benchmarks/dyna_q_figures.py figure-8-4      # blocking maze: Dyna-Q+ against Dyna-Q
    python benchmarks/dyna_q_figures.py figure-8-5      # shortcut maze: Dyna-Q+ against Dyna-Q
    python benchmarks/dyna_q_figures.py sweeping        # updates until the greedy path is the shortest
    python benchmarks/dyna_q_figures.py frozenlake      # the greedy policy's exact value against the optimum
    python benchmarks/dyna_q_figures.py presets         # what every preset's greedy policy scores
    python benchmarks/dyna_q_figures.py gif             # the value maps of the first episodes
    python benchmarks/dyna_q_figures.py all

Each writes benchmarks/results/dyna_q_<name>.csv and docs/figures/dyna_q_<name>.png, and prints its table.
"""

import csv
import functools
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal, Optional

import gymnasium as gym
import numpy as np
import tyro
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "algos"))
import dyna_q  # noqa: E402

QUIET = ["--no-progress", "--picture-every", "0", "--checkpoint-every", "0"]
Curve = list[tuple[int, float]]


def run(flags: list[str], exact: bool = False) -> dict[str, Curve]:
    """Train once, in a folder that goes away; what TensorBoard shows of it: tag → [(step, value)]."""
    if exact:
        dyna_q.evaluate = exact_evaluate
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        args = dyna_q.parse_args([*flags, *QUIET, "--run-dir", f"{folder}/run"])
        dyna_q.check_settings(args)
        dyna_q.train(args)
        events = EventAccumulator(f"{folder}/run", size_guidance={"tensors": 0, "scalars": 0}).Reload()
        curves = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        for tag in events.Tags()["tensors"]:
            if not tag.startswith("hyperparameters"):
                curves[tag] = [(e.step, float(make_ndarray(e.tensor_proto))) for e in events.Tensors(tag)]
        return curves


def run_all(variants: dict[str, str], seeds: int, workers: int, exact: bool = False) -> dict[str, list[dict]]:
    """Every variant (label → command line) with seeds 1, 2, ..., spread over the cores."""
    jobs = [(label, seed, [*flags.split(), "--seed", str(seed)]) for label, flags in variants.items()
            for seed in range(1, seeds + 1)]  # fmt: skip
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        curves = pool.imap(functools.partial(run, exact=exact), [flags for *_, flags in jobs])
        results: dict[str, list[dict]] = {label: [] for label in variants}
        for (label, *_), curve in zip(jobs, tqdm(curves, total=len(jobs), disable=None), strict=True):
            results[label].append(curve)
    return results


def exact_values(P: dict, gamma: float, policy: Optional[Callable] = None) -> np.ndarray:
    """On the true P: v_π of a deterministic policy by solving its linear system, or v_* by value iteration."""
    states, actions = len(P), len(P[0])
    move, reward = np.zeros((states, actions, states)), np.zeros((states, actions))
    for s, a in np.ndindex(states, actions):
        for p, s2, r, end in P[s][a]:
            reward[s, a] += p * r
            move[s, a, s2] += p * (not end)
    if policy is not None:
        rows, chosen = np.arange(states), [policy(s) for s in range(states)]
        return np.linalg.solve(np.eye(states) - gamma * move[rows, chosen], reward[rows, chosen])
    values = np.zeros(states)
    while np.abs((new := (reward + gamma * move @ values).max(1)) - values).max() > 1e-12:
        values = new
    return new


def exact_evaluate(new_policy: Callable, env: gym.Env, *_) -> tuple[list[float], list[int]]:
    """In place of dyna_q.evaluate: the policy's value on the true P instead of some episodes' mean."""
    start, _ = env.reset(seed=0)
    return [exact_values(env.unwrapped.P, FROZENLAKE_GAMMA, new_policy())[start]], [0]


def interval(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and 95 % bootstrap half-width over the seeds, [seeds, ...] → [...]."""
    rng = np.random.default_rng(0)
    means = samples[rng.integers(len(samples), size=(2_000, len(samples)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return samples.mean(0), (high - low) / 2


def write(name: str, header: list[str], rows: list[list]) -> None:
    path = ROOT / "benchmarks" / "results" / f"dyna_q_{name}.csv"
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
    print(f"wrote {path.relative_to(ROOT)}")


def plot(
    name: str, lines: dict[str, tuple], xlabel: str, ylabel: str, title: str, level: Optional[float] = None, **axis: Any
) -> None:
    """lines: label → (x, mean, half-width); `level`: the optimum, dashed."""
    figure = Figure(figsize=(6.4, 4), dpi=110, layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel, title=title, **axis)
    for label, (x, mean, half) in lines.items():
        (line,) = axes.plot(x, mean, label=label)
        axes.fill_between(x, mean - half, mean + half, color=line.get_color(), alpha=0.2, linewidth=0)
    if level is not None:
        axes.axhline(level, color="0.4", linestyle="--", linewidth=1, label="optimum")
    axes.legend()
    axes.grid(alpha=0.3)
    path = ROOT / "docs" / "figures" / f"dyna_q_{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"wrote {path.relative_to(ROOT)}")


def figure_8_2(seeds: int, workers: int) -> None:
    steps = {0: 20_000, 5: 12_000, 50: 10_000}
    variants = {f"n = {n}": f"maze --planning-steps {n} --total-timesteps {t} --eval-every 0" for n, t in steps.items()}
    results = run_all(variants, seeds, workers)
    episodes = min(50, *(len(c["charts/episodic_length"]) for curves in results.values() for c in curves))
    lines, rows = {}, []
    for label, curves in results.items():
        lengths = np.array([[value for _, value in c["charts/episodic_length"][:episodes]] for c in curves])
        lines[label] = (np.arange(1, episodes + 1), *interval(lengths))
        rows += [[label, seed, e + 1, int(x)] for seed, row in enumerate(lengths, 1) for e, x in enumerate(row)]
    plot("figure_8_2", {k: tuple(x[1:] for x in v) for k, v in lines.items()}, "episode", "steps per episode",
         f"Dyna maze, {seeds} seeds (episode 1 left out, as in the book)", level=14, ylim=(0, 800))  # fmt: skip
    write("figure_8_2", ["variant", "seed", "episode", "steps"], rows)
    print("\n| mean steps in episode | " + " | ".join(lines) + " |\n|-|" + "-|" * len(lines))
    for e in (1, 2, 3, 4, 5, 10, 15, 20, 25, 30, 50):
        if e <= episodes:
            print(f"| {e} | " + " | ".join(f"{m[e - 1]:.1f} ± {h[e - 1]:.1f}" for _, m, h in lines.values()) + " |")


def changing_maze(name: str, preset: str, title: str, change_at: int, seeds: int, workers: int) -> None:
    end = dyna_q.PRESETS[preset][1].total_timesteps
    variants = {"Dyna-Q+": f"{preset} --eval-every 0", "Dyna-Q": f"{preset} --eval-every 0 --bonus 0"}
    grid = np.arange(0, end + 1, 50)
    lines, rows, lengths = {}, [], {}
    for label, curves in run_all(variants, seeds, workers).items():
        # a return of 1 at every episode's end: the cumulative reward is the number of ends so far
        ends = [[step for step, _ in c.get("charts/episodic_return", [])] for c in curves]
        rewards = np.array([np.searchsorted(np.array(e, dtype=int), grid, side="right") for e in ends])
        lines[label] = (grid, *interval(rewards))
        lengths[label] = [v for c in curves for _, v in c.get("charts/episodic_length", [])[-20:]]
        rows += [[label, i, *pair] for i, row in enumerate(rewards, 1) for pair in zip(grid, row, strict=True)]
    plot(name, lines, "time step", "cumulative reward", f"{title}, {seeds} seeds")
    write(name, ["variant", "seed", "step", "cumulative_reward"], rows)
    print(f"\n| | reward by step {change_at:,} | by step {end:,} | median length of the last 20 episodes |\n|-|-|-|-|")
    for label, (_, mean, half) in lines.items():
        at = int(np.searchsorted(grid, change_at))
        print(f"| {label} | {mean[at]:.1f} ± {half[at]:.1f} | {mean[-1]:.1f} ± {half[-1]:.1f} "
              f"| {np.median(lengths[label]):.0f} |")  # fmt: skip


def updates_until_shortest(job: tuple[str, int, float, int], limit: int = 60_000) -> float:
    """Planning updates (n = 5) made when the greedy path first is a shortest one; ∞ after `limit` × scale steps.

    A loop of its own, for the path is looked at after every real step; the updates are those of the file.
    """
    planner, scale, alpha, seed = job
    dyna_q.seed_everything(seed)
    env = gym.make("DynaMaze-v0", scale=scale, disable_env_checker=True)
    moves, goal = env.unwrapped.next_states[0], env.unwrapped.goal
    states = env.observation_space.n
    Q = [[0.0] * 4 for _ in range(states + 1)]
    model, queue, updates = dyna_q.Model(states, 4, "deterministic", try_untried=False), dyna_q.PriorityQueue(), 0
    start, _ = env.reset(seed=seed)
    s = start
    for now in range(1, limit * scale + 1):
        a = dyna_q.epsilon_greedy(Q[s], 0.1)
        s2, r, terminated, *_ = env.step(a)
        s2 = states if terminated else s2
        if planner == "dyna":
            Q[s][a] += alpha * dyna_q.td_error(Q, s, a, r, s2, 0.95)
        model.learn(s, a, r, s2, now)
        if planner == "dyna":
            dyna_q.plan(Q, model, 5, alpha, 0.95, 0.0, now)
            updates += 5
        else:
            updates += dyna_q.prioritized_sweeping(Q, model, queue, s, a, 5, alpha, 0.95, 1e-4)
        walker = start
        for _ in range(13 * scale + 1):  # the shortest: 13 cells to cross, and one step into any part of the goal's
            walker = moves[walker][dyna_q.greedy(Q[walker])]
            if walker in goal:
                return updates
        s = env.reset()[0] if terminated else s2
    return np.inf


def sweeping(seeds: int, workers: int) -> None:
    rows, medians = [], {}
    print("\n| grid | states | α | Dyna-Q | prioritised sweeping | ratio | seeds that got there |\n|-|-|-|-|-|-|-|")
    for alpha in (0.5, 1.0):
        for scale in (1, 2, 3):
            made = {}
            for planner in ("dyna", "prioritized"):
                jobs = [(planner, scale, alpha, seed) for seed in range(1, seeds + 1)]
                with multiprocessing.get_context("spawn").Pool(workers) as pool:
                    made[planner] = np.array(pool.map(updates_until_shortest, jobs, chunksize=1))
                rows += [[*job, x] for job, x in zip(jobs, made[planner], strict=True)]
                medians[planner, alpha, scale] = np.median(made[planner])
            d, p = (np.median(made[planner]) for planner in ("dyna", "prioritized"))
            solved = " and ".join(str(np.isfinite(x).sum()) for x in made.values())
            print(f"| {6 * scale} × {9 * scale} | {47 * scale**2} | {alpha} | {d:,.0f} | {p:,.0f} | {d / p:.1f} | "
                  f"{solved} of {seeds} |")  # fmt: skip
    write("sweeping", ["planner", "maze_scale", "alpha", "seed", "updates"], rows)
    labels = {"dyna": "Dyna-Q", "prioritized": "prioritised sweeping"}
    lines = {f"{labels[k]}, α = {a}": ([47, 188, 423], np.array([medians[k, a, i] for i in (1, 2, 3)]), 0.0)
             for a in (0.5, 1.0) for k in labels}  # fmt: skip
    plot("sweeping", lines, "states", "median updates to the shortest path",
         f"Dyna maze at three resolutions, n = 5, {seeds} seeds", yscale="log")  # fmt: skip


FROZENLAKE_GAMMA = dyna_q.PRESETS["frozenlake"][1].gamma


def frozenlake(seeds: int, workers: int) -> None:
    best = exact_values(gym.make("FrozenLake8x8-v1").unwrapped.P, FROZENLAKE_GAMMA)[0]
    q_learning = "frozenlake --planning-steps 0 --total-timesteps 400000 --log-every 4000 --eval-every 4000"
    variants = {
        "expected updates, n = 50": "frozenlake --eval-every 1000",
        "sample updates, n = 50": "frozenlake --model sample --eval-every 1000",
        "Q-learning, α = 0.1": f"{q_learning} --alpha 0.1",
        "Q-learning, α = 0.02": q_learning,
    }
    lines, rows, final = {}, [], {}
    for label, curves in run_all(variants, seeds, workers, exact=True).items():
        steps = [step for step, _ in curves[0]["eval/episodic_return"]]
        values = np.array([[value for _, value in c["eval/episodic_return"]] for c in curves]) / best
        lines[label], final[label] = (steps, *interval(values)), values[:, -1]
        rows += [[label, i, t, f"{x:.5f}"] for i, row in enumerate(values, 1) for t, x in zip(steps, row, strict=True)]
    plot("frozenlake", lines, "environment step", "exact value of the greedy policy / optimum",
         f"FrozenLake 8×8, slippery, {seeds} seeds", level=1.0, xscale="log")  # fmt: skip
    write("frozenlake", ["variant", "seed", "step", "share_of_optimum"], rows)
    print(f"\nv*(start) = {best:.4f}; shares of it:\n")
    print("| | at 20,000 steps | at 60,000 | at 400,000 | seeds within 2 % at the end | mean first within 2 % |")
    print("|-|-|-|-|-|-|")
    for label, (steps, mean, half) in lines.items():
        cells = [f"{mean[steps.index(t)]:.3f} ± {half[steps.index(t)]:.3f}" if t in steps else "" for t in
                 (20_000, 60_000, 400_000)]  # fmt: skip
        first = next((f"step {t:,}" for t, m in zip(steps, mean, strict=True) if m >= 0.98), "not reached")
        print(f"| {label} | {' | '.join(cells)} | {(final[label] >= 0.98).sum()} of {seeds} | {first} |")


def presets(seeds: int, workers: int) -> None:
    """Every preset as it is: what the ε-greedy agent earned last, what the greedy policy scores, and the seconds."""
    rows = []
    print("\n| preset | steps | last 20 training returns | greedy return | greedy length | seconds |\n|-|-|-|-|-|-|")
    for preset, (_, settings) in dyna_q.PRESETS.items():
        start = time.time()
        curves = run_all({preset: preset}, seeds, workers)[preset]
        seconds = (time.time() - start) * workers / seeds
        final = np.array(
            [[np.mean([value for _, value in c["charts/episodic_return"][-20:]]),
              c["eval/episodic_return"][-1][1], c["eval/episodic_length"][-1][1]] for c in curves]
        )  # fmt: skip
        cells = [f"{mean:.2f} ± {half:.2f}" for mean, half in zip(*interval(final), strict=True)]
        print(f"| `{preset}` | {settings.total_timesteps:,} | {' | '.join(cells)} | {seconds:.0f} |")
        rows += [[preset, seed, *row] for seed, row in enumerate(final.tolist(), 1)]
    write("presets", ["preset", "seed", "training_return", "greedy_return", "greedy_length"], rows)


def episodes_gif(seeds: int, workers: int) -> None:
    """The value maps at the ends of the first episodes, n = 0, 5 and 50 side by side (seed 1)."""
    films = []
    for n in (0, 5, 50):
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
            flags = ["maze", "--planning-steps", str(n), "--total-timesteps", "20000", "--picture-every", "1"]
            dyna_q.main([*flags, "--eval-every", "0", "--no-progress", "--run-dir", f"{folder}/run"])
            frames = sorted(Path(f"{folder}/run/frames").iterdir())[:15]
            films.append([np.asarray(Image.open(frame))[:, :430] for frame in frames])
    path = ROOT / "docs" / "figures" / "dyna_q_episodes.gif"
    dyna_q.save_gif([np.hstack(frames) for frames in zip(*films, strict=True)], path, fps=1.5)
    print(f"wrote {path.relative_to(ROOT)}")


EXPERIMENTS = {
    "figure-8-2": figure_8_2,
    "figure-8-4": functools.partial(changing_maze, "figure_8_4", "blocking", "Blocking maze", 1_000),
    "figure-8-5": functools.partial(changing_maze, "figure_8_5", "shortcut", "Shortcut maze", 3_000),
    "sweeping": sweeping,
    "frozenlake": frozenlake,
    "presets": presets,
    "gif": episodes_gif,
}


@dataclass
class Args:
    experiment: tyro.conf.Positional[
        Literal["figure-8-2", "figure-8-4", "figure-8-5", "sweeping", "frozenlake", "presets", "gif", "all"]
    ]
    """Which figure."""
    seeds: int = 30
    """Seeds 1 to this many."""
    workers: int = multiprocessing.cpu_count()
    """Runs at a time, one process each."""


if __name__ == "__main__":
    args = tyro.cli(Args, description=(__doc__ or "").split("\n\n")[0])
    for name in EXPERIMENTS if args.experiment == "all" else [args.experiment]:
        start = time.time()
        EXPERIMENTS[name](args.seeds, args.workers)
        print(f"\n{name}: {args.seeds} seeds, {time.time() - start:.0f} s on {args.workers} processes\n")
