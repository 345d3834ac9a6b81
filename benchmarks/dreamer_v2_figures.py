"""The figures of docs/dreamer_v2.md, each from several seeds of `algos/dreamer_v2.py`.

    python benchmarks/dreamer_v2_figures.py catch            # the game in the file
    python benchmarks/dreamer_v2_figures.py ablations        # the same without this or that, and what a fork looks like
    python benchmarks/dreamer_v2_figures.py catch --workers 1 --runs /tmp/runs

Runs stay in the folder --runs: one that is there and finished is not made again, one that was stopped goes on. Each
experiment writes benchmarks/results/dreamer_v2_<name>.csv and docs/figures/dreamer_v2_<name>.png, and prints its table.
"""

import csv
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent))
from figure_runs import curve, interval, load, minutes, train_all

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = {
    "catch": {"Dreamer V2": "catch"},
    "ablations": {
        "Dreamer V2": "catch", "a normal in place of choices": "catch --prior gaussian",
        "no KL balancing": "catch --kl-balance 0.5",
    },
}  # fmt: skip
TAGS = ("eval/episodic_return", "model/kl", "losses/image", "losses/reward")
TABLE = (0.5, 0.75, 1.0)  # the parts of the run that the table shows


@dataclass
class Args:
    name: Annotated[Literal[tuple(EXPERIMENTS)], tyro.conf.Positional]
    """Which experiment."""
    runs: Path = Path("runs/dreamer_v2_figures")
    """Where the runs are kept."""
    seeds: int = 3
    """So many seeds."""
    first_seed: int = 1
    """The first of them."""
    workers: int = max((os.cpu_count() or 2) // 2, 1)
    """Runs at a time, each with one thread."""
    flags: str = ""
    """More flags for each run."""


def forks(folder: Path, episodes: int = 40, samples: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """What the model of a finished run foresees for the ball's jump when all before it was seen: in how many of the
    samples the ball is at the left, at the right, at both places, at neither, and in how many it is plainly at one of
    them; and a strip of pictures: the last one that was seen, what is foreseen on average, and nine samples."""
    module = load("dreamer_v2")
    settings = json.loads((folder / "args.json").read_text())
    args = module.Args(**{name: value for name, value in settings.items() if name != "algorithm"})
    env = module.make_task(args)
    dreamer = module.DreamerV2(args, env, torch.device("cpu"))
    dreamer.load(torch.load(folder / "checkpoint.pt", weights_only=False)["learned"])
    counts, strip, game = np.zeros(5), None, env.unwrapped
    torch.manual_seed(0)
    for episode in range(episodes):
        seen, actions = [env.reset(seed=10_000 + episode)[0]], [np.zeros(dreamer.actions, np.float32)]
        for _ in range(game.JUMPS_ON - 1):
            seen.append(env.step(1)[0])
            actions.append(dreamer.as_numbers(1))
        rows = module.Sequences(
            torch.as_tensor(np.stack(seen))[None].expand(samples, -1, -1, -1, -1),
            torch.as_tensor(np.stack([*actions, dreamer.as_numbers(1)]))[None].expand(samples, -1, -1),
            *[torch.zeros(samples, game.JUMPS_ON + 1)] * 3,
        )
        ahead = module.seen_then_foreseen_v2(dreamer.world, rows, game.JUMPS_ON)[0][:, -1].mean(1) + 0.5
        side = ahead.shape[-1] // game.TILES
        tiles = ahead.unfold(1, side, side).unfold(2, side, side).mean((-2, -1))[:, game.JUMPS_ON]  # the row it is in
        places = tiles[:, [game.ball - game.JUMP, game.ball + game.JUMP]]
        left, right = (places > 0.5).T
        plainly = (places.amax(1) > 0.8) & (places.amin(1) < 0.2)
        counts += [x.sum().item() for x in (left & ~right, right & ~left, left & right, ~left & ~right, plainly)]
        if strip is None:
            pictures = [torch.as_tensor(seen[-1][0]) / 255, ahead.mean(0), *ahead[:9]]
            strip = np.concatenate([np.pad(x.numpy().clip(0, 1), 1, constant_values=1) for x in pictures], 1)
    return counts / counts[:4].sum(), strip


def draw_forks(folders: dict[str, list[Path]]) -> None:
    """One row of pictures for each kind of latent, and the shares over all seeds."""
    shown = {label: folders[label] for label in ("Dreamer V2", "a normal in place of choices")}
    figure = Figure(figsize=(9, 2.6), dpi=90)
    print("\n| the ball's jump as it is foreseen | left | right | both | neither | plainly at one place |")
    print("|-|-|-|-|-|-|")
    for axes, (label, runs) in zip(figure.subplots(len(shown), 1), shown.items(), strict=True):
        shares, strips = zip(*(forks(run) for run in runs), strict=True)
        for seed, share in enumerate(shares):
            print(f"| {label}, {runs[seed].name} | " + " | ".join(f"{100 * x:.1f} %" for x in share) + " |")
        axes.imshow(strips[0], cmap="gray", vmin=0, vmax=1)
        side = strips[0].shape[0]
        axes.set_xticks(side * (np.arange(3) + 0.5), ["seen", "mean", "samples ..."], fontsize=8)
        axes.set_yticks([])
        axes.set_title(label, fontsize=9)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "figures" / "dreamer_v2_forks.png")


def main(args: Args) -> None:
    variants = {label: f"{flags} {args.flags}".strip() for label, flags in EXPERIMENTS[args.name].items()}
    folders = train_all("dreamer_v2", variants, args.seeds, args.runs, args.workers, args.first_seed)

    figure = Figure(figsize=(9, 3.6), dpi=90)
    left = figure.add_subplot(1, 2, 1, xlabel="environment steps", ylabel="return of an episode")
    right = figure.add_subplot(1, 2, 2, xlabel="environment steps", ylabel="KL of posterior and prior, nats")
    panels, rows = {"eval/episodic_return": left, "model/kl": right}, []
    for label, command in variants.items():
        for tag in TAGS:
            curves = [curve(folder, tag) for folder in folders[label]]
            for seed, points in enumerate(curves, args.first_seed):
                rows += [[label, seed, tag, step, f"{value:.6g}"] for step, value in points]
            shared = sorted(set.intersection(*({step for step, _ in points} for points in curves)))
            values = np.array([[dict(points)[step] for step in shared] for points in curves])
            means, halves = interval(values)
            if tag in panels:
                (line,) = panels[tag].plot(shared, means, label=label)
                panels[tag].fill_between(shared, means - halves, means + halves, alpha=0.15, color=line.get_color())
                for one in values:
                    panels[tag].plot(shared, one, linewidth=0.6, alpha=0.6, color=line.get_color())
            if tag == "eval/episodic_return":
                shown = [shared[round(part * len(shared)) - 1] for part in TABLE]
                print(f"\n| `{command}`, evaluation at | " + " | ".join(f"{x:,}" for x in shown) + " | minutes |")
                print("|-|" + "-|" * (len(shown) + 1))
                for seed, (folder, one) in enumerate(zip(folders[label], values, strict=True), args.first_seed):
                    cells = " | ".join(f"{one[shared.index(step)]:.2f}" for step in shown)
                    print(f"| seed {seed} | {cells} | {minutes([folder])} |")
                cells = " | ".join(f"{means[shared.index(s)]:.2f} ± {halves[shared.index(s)]:.2f}" for s in shown)
                print(f"| mean | {cells} | {minutes(folders[label])} |")
    left.axhline(1, color="gray", linewidth=0.8, linestyle="--")
    left.axhline(-0.75, color="gray", linewidth=0.8, linestyle=":")  # random moves
    right.set_yscale("log")
    for axes in (left, right):
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "figures" / f"dreamer_v2_{args.name}.png")
    if args.name == "ablations":
        draw_forks(folders)
    else:
        one = folders["Dreamer V2"][0]
        for kind, suffix in (("dreams", "gif"), ("codes", "png")):
            last = max((one / kind).glob(f"*.{suffix}"))
            shutil.copy(last, ROOT / "docs" / "figures" / f"dreamer_v2_{kind}.{suffix}")
    path = ROOT / "benchmarks" / "results" / f"dreamer_v2_{args.name}.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["variant", "seed", "tag", "step", "value"], *rows])
    print(f"\nwrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=(__doc__ or "").split("\n\n")[0]))
