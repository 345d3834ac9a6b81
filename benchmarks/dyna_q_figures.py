"""The figures of docs/dyna_q.md, each from many seeds of `algos/dyna_q.py`.

    python benchmarks/dyna_q_figures.py figure-8-2      # steps per episode with n = 0, 5, 50
    python benchmarks/dyna_q_figures.py figure-8-4      # blocking maze: Dyna-Q+ against Dyna-Q
    python benchmarks/dyna_q_figures.py figure-8-5      # shortcut maze: Dyna-Q+ against Dyna-Q
    python benchmarks/dyna_q_figures.py sweeping        # updates until the greedy path is the shortest
    python benchmarks/dyna_q_figures.py frozenlake --seeds 10   # exact value of the greedy policy against the optimum
    python benchmarks/dyna_q_figures.py gif             # the value maps of the first episodes

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
import torch
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "algos"), str(ROOT / "benchmarks")]
import dyna_q  # noqa: E402
from figure_runs import interval  # noqa: E402

Curve = list[tuple[int, float]]


class Recorded(dyna_q.Run):
    """A run that keeps its curves in memory and draws nothing."""

    curves: dict[str, Curve]

    def log(self, tag: str, value: float) -> None:
        self.curves.setdefault(tag, []).append((self.step, float(value)))

    def picture(self, figure: Figure) -> None:
        pass


class Exact(Recorded):
    """In place of episodes: the value of the greedy policy at the start, from the true transition probabilities."""

    def evaluate(self, agent: dyna_q.Agent, env: gym.Env) -> None:
        self.log("eval/exact_value", exact_values(env.unwrapped.P, self.args.gamma, agent)[0])
        env.length_queue.append(0)


def run(flags: list[str], kind: type = Recorded) -> dict[str, Curve]:
    """Train once, in a temporary folder: tag → [(step, value)]."""
    dyna_q.Run, kind.curves = kind, {}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        dyna_q.train(dyna_q.parse_args([*flags, "--picture-every", "1000000", "--run-dir", f"{folder}/run"]))
    return kind.curves


def run_all(variants: dict[str, str], seeds: int, workers: int, kind: type = Recorded) -> dict[str, list[dict]]:
    """Each variant (label → command line) with seeds 1, 2, ..."""
    jobs = [[*flags.split(), "--seed", str(s)] for flags in variants.values() for s in range(1, seeds + 1)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        curves = pool.map(functools.partial(run, kind=kind), jobs, chunksize=1)
    return {label: curves[i * seeds : (i + 1) * seeds] for i, label in enumerate(variants)}


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
    variants = {
        f"n = {n}": f"maze --planning-steps {n} --total-timesteps {t} --eval-every {t}" for n, t in steps.items()
    }
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
    variants = {"Dyna-Q+": f"{preset} --eval-every {end}", "Dyna-Q": f"{preset} --eval-every {end} --bonus 0"}
    grid = np.arange(0, end + 1, 50)
    lines, rows, lengths = {}, [], {}
    for label, curves in run_all(variants, seeds, workers).items():
        # The return is 1 at the end of each episode: the cumulative reward is the number of ends so far
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


def finer(map_: str, scale: int) -> str:
    """Each cell of a map as scale × scale cells, as in Example 8.4."""
    return " ".join(" ".join(["".join(letter * scale for letter in row)] * scale) for row in map_.split())


def updates_until_shortest(job: tuple[str, int, float, int], limit: int = 60_000) -> float:
    """Planning updates (n = 5) made when the greedy path first is a shortest one; ∞ after `limit` × scale steps.

    A loop of its own, because it looks at the path after each real step; the updates are those of the file.
    """
    planner, scale, alpha, seed = job
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    args = dyna_q.Args(planner=planner, planning_steps=5, alpha=alpha)
    env = dyna_q.Maze((finer(dyna_q.MAZES["DynaMaze-v0"][0][0], scale),))
    states = int(env.observation_space.n)
    agent, model, updates = dyna_q.Agent(env, args), dyna_q.Model(states, 4, args), 0
    Q = agent.Q
    start, _ = env.reset(seed=seed)
    moves = {}
    for s in range(states):  # the true next state, terminal at the goal
        for a in range(4):
            env.s = s
            s2, _, won, *_ = env.step(a)
            moves[s, a] = states if won else s2
    s = start
    for now in range(1, limit * scale + 1):
        a = dyna_q.epsilon_greedy(Q[s], args.epsilon)
        s2 = moves[s, a]
        r = float(s2 == states)
        if planner == "dyna":
            Q[s][a] += alpha * (r + args.gamma * max(Q[s2]) - Q[s][a])
        model.learn(s, a, r, s2, now)
        if planner == "dyna":
            updates += dyna_q.plan(Q, model, args, now)
        else:
            updates += dyna_q.prioritized_sweeping(Q, model, s, a, args)
        walker = start
        for _ in range(13 * scale + 1):  # the shortest: 13 cells to cross, and one step into any part of the goal's
            walker = moves[walker, agent(walker)]
            if walker == states:
                return updates
        s = start if s2 == states else s2
    return np.inf


def sweeping(seeds: int, workers: int, scales: tuple[int, ...] = (1, 2)) -> None:
    rows, medians = [], {}
    print("\n| grid | states | α | Dyna-Q | prioritised sweeping | ratio | seeds that got there |\n|-|-|-|-|-|-|-|")
    for alpha in (0.5, 1.0):
        for scale in scales:
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
                  f"{solved} of {seeds} |", flush=True)  # fmt: skip
    write("sweeping", ["planner", "maze_scale", "alpha", "seed", "updates"], rows)
    labels = {"dyna": "Dyna-Q", "prioritized": "prioritised sweeping"}
    lines = {f"{labels[k]}, α = {a}": ([47 * i**2 for i in scales], np.array([medians[k, a, i] for i in scales]), 0.0)
             for a in (0.5, 1.0) for k in labels}  # fmt: skip
    plot("sweeping", lines, "states", "median updates to the shortest path",
         f"Dyna maze at {len(scales)} resolutions, n = 5, {seeds} seeds", yscale="log")  # fmt: skip


def frozenlake(seeds: int, workers: int) -> None:
    best = exact_values(gym.make("FrozenLake8x8-v1").unwrapped.P, dyna_q.PRESETS["frozenlake"][1].gamma)[0]
    q_learning = "frozenlake --planning-steps 0 --total-timesteps 400000 --eval-every 4000"
    variants = {
        "expected updates, n = 50": "frozenlake --eval-every 1000",
        "sample updates, n = 50": "frozenlake --model sample --eval-every 1000",
        "Q-learning, α = 0.1": f"{q_learning} --alpha 0.1",
        "Q-learning, α = 0.02": q_learning,
    }
    lines, rows, final, grid = {}, [], {}, np.arange(1, 101) * 4_000
    for label, curves in run_all(variants, seeds, workers, Exact).items():
        # Evaluations are made at the ends of episodes: the value at a step of the grid is the last one before it
        x, values = grid[grid <= 60_000] if "n = 50" in label else grid, []
        for curve in curves:
            steps, value = np.array(curve["eval/exact_value"]).T
            values.append(value[np.searchsorted(steps, x, side="right") - 1] / best)
        values = np.array(values)
        lines[label], final[label] = (x, *interval(values)), values[:, -1]
        rows += [[label, i, t, f"{v:.5f}"] for i, row in enumerate(values, 1) for t, v in zip(x, row, strict=True)]
    plot("frozenlake", lines, "environment step", "exact value of the greedy policy / optimum",
         f"FrozenLake 8×8, slippery, {seeds} seeds", level=1.0, xscale="log")  # fmt: skip
    write("frozenlake", ["variant", "seed", "step", "share_of_optimum"], rows)
    print(f"\nv*(start) = {best:.4f}; shares of it:\n")
    print("| | at 20,000 steps | at 60,000 | at 400,000 | seeds within 2 % at the end | mean first within 2 % |")
    print("|-|-|-|-|-|-|")
    for label, (x, mean, half) in lines.items():
        x = x.tolist()
        cells = [f"{mean[x.index(t)]:.3f} ± {half[x.index(t)]:.3f}" if t in x else "" for t in
                 (20_000, 60_000, 400_000)]  # fmt: skip
        first = next((f"step {t:,}" for t, m in zip(x, mean, strict=True) if m >= 0.98), "not reached")
        print(f"| {label} | {' | '.join(cells)} | {(final[label] >= 0.98).sum()} of {seeds} | {first} |")


class Filmed(Recorded):
    frames: list[Image.Image]

    def picture(self, figure: Figure) -> None:
        if len(self.frames) < 15:
            figure.set_dpi(45)
            FigureCanvasAgg(figure).draw()
            self.frames.append(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3]))


def episodes_gif(seeds: int, workers: int) -> None:
    """The value maps at the ends of the first episodes, n = 0, 5 and 50 side by side (seed 1)."""
    films, draw = [], dyna_q.draw_values
    dyna_q.Run = Filmed
    for n in (0, 5, 50):
        Filmed.frames, Filmed.curves = [], {}
        dyna_q.draw_values = lambda agent, model, env, start, title, n=n: draw(
            agent, model, env, start, f"n = {n}, episode {len(Filmed.frames) + 1}"
        )
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
            flags = f"maze --planning-steps {n} --total-timesteps {20_000 if n == 0 else 4_000} --picture-every 1"
            dyna_q.train(dyna_q.parse_args([*flags.split(), "--run-dir", f"{folder}/run"]))
        films.append(Filmed.frames)
    frames = [Image.fromarray(np.hstack([np.asarray(frame) for frame in row])) for row in zip(*films, strict=True)]
    path = ROOT / "docs" / "figures" / "dyna_q_episodes.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=700, loop=0)
    print(f"wrote {path.relative_to(ROOT)}")


EXPERIMENTS = {
    "figure-8-2": figure_8_2,
    "figure-8-4": functools.partial(changing_maze, "figure_8_4", "blocking", "Blocking maze", 1_000),
    "figure-8-5": functools.partial(changing_maze, "figure_8_5", "shortcut", "Shortcut maze", 3_000),
    "sweeping": sweeping,
    "frozenlake": frozenlake,
    "gif": episodes_gif,
}


@dataclass
class Args:
    experiment: tyro.conf.Positional[Literal["figure-8-2", "figure-8-4", "figure-8-5", "sweeping", "frozenlake", "gif"]]
    """Which figure."""
    seeds: int = 30
    """Seeds 1 to this many."""
    workers: int = multiprocessing.cpu_count()
    """Runs at a time, one process each."""


if __name__ == "__main__":
    args = tyro.cli(Args, description=(__doc__ or "").split("\n\n")[0])
    began = time.time()
    EXPERIMENTS[args.experiment](args.seeds, args.workers)
    print(f"\n{args.experiment}: {args.seeds} seeds, {time.time() - began:.0f} s on {args.workers} processes\n")
