"""The figures of docs/muzero.md, each from several seeds of `algos/muzero.py`.

    python benchmarks/muzero_figures.py cartpole        # five seeds of the default preset; what each knows of the track
    python benchmarks/muzero_figures.py tictactoe       # self-play, then 400 games against each opponent
    python benchmarks/muzero_figures.py connect4

Runs stay in the folder --runs: one that is there and finished is not made again, one that was stopped goes on. Each
experiment writes benchmarks/results/muzero_<name>.csv and docs/figures/muzero_<name>.png, and prints its table.
"""

import csv
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).resolve().parent))
from figure_runs import curve, load, minutes, train_all

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = {  # label → command line, and the number of seeds
    "cartpole": ({"MuZero": "cartpole"}, 5),
    "tictactoe": ({"tic-tac-toe": "tictactoe"}, 1),
    "connect4": ({"Connect Four": "connect4"}, 1),
}
OPPONENTS = {  # of each board: opponent, and how many moves it looks ahead
    "tictactoe": {"random": 0, "one-ply": 0, "perfect": 0},
    "connect4": {"random": 0, "one-ply": 0, "minimax": 2},
}
GAMES = 400
TRAINING = ("charts/episodic_return",)


@dataclass
class Args:
    name: Annotated[Literal[tuple(EXPERIMENTS)], tyro.conf.Positional]
    """Which experiment."""
    runs: Path = Path("runs/muzero_figures")
    """Where the runs are kept."""
    seeds: int = 0
    """So many seeds; 0: as many as the page shows."""
    first_seed: int = 1
    """The first of them."""
    workers: int = max((os.cpu_count() or 2) // 2, 1)
    """Runs at a time, each with one thread."""


def loaded(folder: Path) -> tuple[ModuleType, Any, Any]:
    """algos/muzero.py, and settings and planner of a finished run."""
    muzero = load("muzero")
    saved = muzero.read_settings(folder)
    planner = muzero.make_tree_planner(saved, muzero.make_task(saved), torch.device("cpu"))
    planner.network.load_state_dict(muzero.load_checkpoint(folder)["learned"]["average"])
    return muzero, saved, planner


def against(folder: Path, opponent: str, depth: int, games: int) -> dict[str, list[int]]:
    """Wins, draws and losses of a finished run without dice, where the agent began and where the opponent did."""
    muzero, saved, planner = loaded(folder)
    saved = replace(saved, opponent=opponent, opponent_depth=depth or saved.opponent_depth)
    muzero.seed_everything(saved.seed)
    envs = [muzero.make_task(saved) for _ in range(games)]
    seed, found = saved.seed + 100_000, {"first": [0, 0, 0], "second": [0, 0, 0]}
    returns, _ = planner.play_together(envs, seed, saved.eval_max_steps)
    for i, value in enumerate(returns):
        obs, _ = envs[i].reset(seed=seed + 10_000 + i)  # the same game from its beginning: is a stone there already?
        found["second" if obs.any() else "first"][1 - round(value)] += 1
    return found


def mistakes(folder: Path) -> list[tuple[str, int, int]]:
    """Tic-tac-toe: of which positions, how many, and in how many its move gives away what perfect play would have. All
    of the game's; and those that games of it against perfect play can bring, where either side begins."""
    muzero, _, planner = loaded(folder)
    rules = planner.setting.rules

    def after(board: np.ndarray) -> list[np.ndarray]:
        """The positions that follow, None where the game is over; in the order of the legal moves."""
        actions = np.flatnonzero(rules.legal(board[None])[0])
        boards, _, over = rules.move(np.repeat(board[None], len(actions), 0), actions)
        return [None if end else one for one, end in zip(boards, over, strict=True)]

    empty = np.zeros((rules.rows, rules.columns), np.int8)
    every, todo = {}, [empty]
    while todo:
        board = todo.pop()
        if board.tobytes() not in every:
            every[board.tobytes()] = board
            todo += [one for one in after(board) if one is not None]
    worth = {name: muzero.minimax_moves("TicTacToe-v0", board[None], 9) for name, board in every.items()}
    found = planner.search(muzero.planes_of(np.stack(list(every.values()))))
    moves = dict(zip(every, found.best.tolist(), strict=True))
    wrong = {name: np.sign(worth[name][moves[name]]) != np.sign(max(worth[name].values())) for name in every}
    rows = [("all", len(every), sum(wrong.values()))]
    for who, todo in (("it begins", [empty]), ("the other begins", after(empty))):
        met = set()
        while todo:
            if (name := todo.pop().tobytes()) in met:
                continue
            met.add(name)
            reply = after(every[name])[list(worth[name]).index(moves[name])]
            if reply is not None:
                values = worth[reply.tobytes()]
                best = [value > max(values.values()) - 1e-9 for value in values.values()]
                todo += [one for one, good in zip(after(reply), best, strict=True) if good and one is not None]
        rows.append((who, len(met), sum(wrong[name] for name in met)))
    return rows


TRACK, SPEEDS = np.linspace(-2.4, 2.4, 49), np.linspace(-1.0, 1.0, 41)


def along_the_track(folder: Path) -> np.ndarray:
    """CartPole: the value [speeds, places] of a pole that stands upright on a cart at each place of the track."""
    _, _, planner = loaded(folder)
    x, speed = np.meshgrid(TRACK, SPEEDS)
    nothing = np.zeros_like(x)
    obs = np.stack([x, speed, nothing, nothing], -1).astype(np.float32)
    return planner.values(obs.reshape(-1, 4)).reshape(x.shape)


def draw_tracks(values: dict[str, list[np.ndarray]], first_seed: int, path: Path) -> None:
    columns = max(map(len, values.values()))
    figure = Figure(figsize=(9.2, 2.1 * len(values)), dpi=90, layout="constrained")
    axes = figure.subplots(len(values), columns, sharex=True, sharey=True, squeeze=False)
    largest = max(value.max() for every in values.values() for value in every)
    for row, (label, every) in zip(axes, values.items(), strict=True):
        for seed, (axis, value) in enumerate(zip(row, every, strict=True), first_seed):
            shown = axis.pcolormesh(TRACK, SPEEDS, value, vmin=0, vmax=largest, cmap="viridis")
            axis.set_title(f"{label}: seed {seed}", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("place of the cart", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("its speed", fontsize=8)
    figure.colorbar(shown, ax=axes, label="value")
    figure.savefig(path)


def clock(folder: Path, tag: str) -> list[float]:
    """Minutes from a run's first event to each point of a curve."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [(e.wall_time - events.FirstEventTimestamp()) / 60 for e in events.Scalars(tag)]


def main(args: Args) -> None:
    variants, seeds = EXPERIMENTS[args.name]
    seeds = args.seeds or seeds
    folders = train_all("muzero", variants, seeds, args.runs, args.workers, args.first_seed)
    board = args.name in OPPONENTS
    figure = Figure(figsize=(9.2, 3.4), dpi=90)
    axes = figure.subplots(1, 2, sharey=True)
    rows = []
    print(f"\n| {args.name} | seed | evaluations, {'wins' if board else 'mean return'} | minutes |\n|-|-|-|-|")
    for number, label in enumerate(variants):
        for seed, folder in enumerate(folders[label], args.first_seed):
            for tag in ("eval/episodic_return", *(("eval/wins", "eval/losses") if board else TRAINING)):
                rows += [[label, seed, tag, step, f"{y:.4f}"] for step, y in curve(folder, tag)]
            lines = [("eval/wins", "won", "tab:green"), ("eval/losses", "lost", "tab:red")]
            for tag, name, color in lines if board else [("eval/episodic_return", label, f"C{number}")]:
                steps, values = zip(*curve(folder, tag), strict=True)
                name = name if seed == args.first_seed else None  # in the legend once
                for axis, x in zip(axes, (steps, clock(folder, tag)), strict=True):
                    axis.plot(x, values, color=color, marker=".", linewidth=1, label=name)
            evaluations = curve(folder, "eval/wins" if board else "eval/episodic_return")
            each = ", ".join(f"{y:.2f}" if board else f"{y:.1f}" for _, y in evaluations)
            print(f"| `{variants[label]}` | {seed} | {each} | {minutes([folder])} |")
    axes[0].xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k")
    axes[0].set(xlabel="moves", ylabel="share of games" if board else "return of an evaluation")
    axes[1].set(xlabel="minutes")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "figures" / f"muzero_{args.name}.png")
    if board:
        print("\n| opponent | seed | begins | won | drawn | lost |\n|-|-|-|-|-|-|")
        for opponent, depth in OPPONENTS[args.name].items():
            for label in variants:
                for seed, folder in enumerate(folders[label], args.first_seed):
                    for side, counts in against(folder, opponent, depth, GAMES).items():
                        print(f"| {opponent} | {seed} | {side} | {' | '.join(map(str, counts))} |")
                        for what, count in zip(("won", "drawn", "lost"), counts, strict=True):
                            rows.append([label, seed, f"after/{opponent}/{side}/{what}", 0, count])
    if args.name == "cartpole":
        values = {label: [along_the_track(folder) for folder in folders[label]] for label in variants}
        draw_tracks(values, args.first_seed, ROOT / "docs" / "figures" / "muzero_track.png")
        middle = len(SPEEDS) // 2
        print("\n| value | seed | rolling off at the left | at the right | at rest in the middle |\n|-|-|-|-|-|")
        for label in variants:
            for seed, value in enumerate(values[label], args.first_seed):
                ends = (value[0, 0], value[-1, -1], value[middle, len(TRACK) // 2])
                print(f"| `{variants[label]}` | {seed} | {' | '.join(f'{y:.0f}' for y in ends)} |")
                where = ("left", "right", "middle")
                rows += [[label, seed, f"value/{w}", 0, f"{y:.2f}"] for w, y in zip(where, ends, strict=True)]
    if args.name == "tictactoe":
        print("\n| positions | seed | number | played wrongly |\n|-|-|-|-|")
        for label in variants:
            for seed, folder in enumerate(folders[label], args.first_seed):
                for which, number, wrong in mistakes(folder):
                    print(f"| {which} | {seed} | {number:,} | {wrong} |")
                    rows += [[label, seed, f"positions/{which}", 0, number], [label, seed, f"wrong/{which}", 0, wrong]]
    path = ROOT / "benchmarks" / "results" / f"muzero_{args.name}.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["variant", "seed", "tag", "step", "value"], *rows])
    print(f"\nwrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=(__doc__ or "").split("\n\n")[0]))
