"""The numbers of docs/dagger_mbrl.md that come from many seeds of `algos/dagger_mbrl.py`.

    python benchmarks/dagger_figures.py maps          # share of random maps on which the best plan is the expert's
    python benchmarks/dagger_figures.py helicopter    # cost of each story's last plan, divided by the expert's

Each writes benchmarks/results/dagger_mbrl_<name>.csv and prints its table.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "algos"))
import dagger_mbrl as dagger  # noqa: E402


def main(name: tyro.conf.Positional[Literal["maps", "helicopter"]], first: int = 0, number: int = 0) -> None:
    """Seeds first, first + 1, …; 200 maps or 20 helicopters."""
    lines = ["seed,data,expert,best,last"]
    for seed in range(first, first + (number or {"maps": 200, "helicopter": 20}[name])):
        args = replace(dagger.PRESETS[name][1], seed=seed)
        task = dagger.make_env(args).unwrapped
        for data in dagger.EXPERT_SHARE:
            values = [row.value for row in dagger.learn(task, data, args)]
            lines.append(f"{seed},{data},{task.value(task.expert):.6g},{max(values):.6g},{values[-1]:.6g}")
    (ROOT / "benchmarks" / "results" / f"dagger_mbrl_{name}.csv").write_text("\n".join(lines) + "\n")
    rows = [line.split(",") for line in lines[1:]]
    for data in dagger.EXPERT_SHARE:
        expert, best, last = np.array([row[2:] for row in rows if row[1] == data], float).T
        if name == "maps":
            print(f"{data:7}: the expert's value in {(best > expert - 1e-9).mean():.1%} of maps", end="")
            print(f", by the last plan in {(last > expert - 1e-9).mean():.1%}")
        else:
            ratio = last / expert
            print(f"{data:7}: {(ratio <= 1.1).sum()} of {len(ratio)} within 1.1 of the expert's cost", end="")
            print(f"; mean ratio {ratio.mean():.2f}, median {np.median(ratio):.2f}, worst {ratio.max():.2f}")


if __name__ == "__main__":
    tyro.cli(main)
