"""How fast each file's hot path is on this machine, next to the machine's own matrix-product rate.

    python benchmarks/speed.py
    python benchmarks/speed.py --save benchmarks/results/speed_cpu.csv
    python benchmarks/speed.py --only dyna_q icm
    python benchmarks/speed.py --compile                       # also with the files' --compile
    python benchmarks/speed.py --peers                         # beside other libraries instead: see speed_peers.py

A case trains for a while and is then stopped. It times the calls of one function, or the time from one call to the
next: a whole update. Timings of a shared machine are noisy, so the fastest tenth counts. Quote ratios of one run.
"""

import dataclasses
import importlib
import platform
import signal
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple, Optional
from unittest.mock import patch

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "algos"), str(ROOT / "benchmarks")]
from report import read_csv, write_csv  # noqa: E402

DREAMER_1 = "--image-size 64 --batch-size 50 --batch-length 50 --horizon 15 --deter-size 200 --stoch-size 30 --depth 32"
DREAMER_1 += " --units 200 --dense-units 400 --value-layers 3 --actor-layers 4"
DREAMER_2 = "--image-size 64 --batch-length 50 --horizon 15 --deter-size 600 --classes 32 --units 600 --depth 48"
DREAMER_2 += " --dense-units 400 --dense-layers 4"
PLANET = "--random-steps 200 --updates 1 --deter-size 200 --stoch-size 30 --units 200 --horizon 12"
PLANET += " --candidates 1000 --elites 100 --iterations 10"
MBPO = "invertedpendulum --random-steps 100 --rollouts 10000"
SEARCH = "--reanalyze 0 --simulations 25"


class Case(NamedTuple):
    file: str
    name: str
    words: str  # of the training run
    function: str  # that is timed
    unit: str
    work: float = 1  # units in one call
    update: bool = False  # time from one call to the next, and count its floating-point operations
    counted: bool = True  # the counter fails in an imagination without gradients
    large: bool = False  # takes seconds a call


CASES = [
    Case("dyna_q", "Dyna maze, deterministic", "maze", "plan", "million updates/s", 50e-6),
    Case("dyna_q", "Dyna maze, with the bonus", "maze --bonus 0.001", "plan", "million updates/s", 50e-6),
    Case("dyna_q", "FrozenLake 8×8, sample updates", "frozenlake --model sample", "plan", "million updates/s", 50e-6),
    Case("dyna_q", "FrozenLake 8×8, expected updates", "frozenlake", "plan", "million updates/s", 50e-6),
    Case("mpc_rs", "pendulum", "pendulum", "Agent.__call__", "plans/s"),
    Case("mpc_rs", "halfcheetah", "halfcheetah --random-steps 1000", "Agent.__call__", "plans/s", large=True),
    Case("pddm", "pendulum", "pendulum", "Agent.__call__", "plans/s"),
    Case("pddm", "reacher", "reacher", "Agent.__call__", "plans/s"),
    Case("pets", "cartpole", "cartpole", "Agent.__call__", "plans/s"),
    Case("pets", "halfcheetah", "halfcheetah", "Agent.__call__", "plans/s", large=True),
    Case("mbpo", "SAC, 2 × 128, batch 256", MBPO, "update", "updates/s"),
    Case("mbpo", "ensemble", MBPO, "ensemble_loss", "training steps/s", update=True),
    Case("mbpo", "branches", f"{MBPO} --updates 1 --model-every 10", "branch", "million rows/s", 0.01),
    Case("mage", "MAGE, 8 × 2×64, batch 64", "pendulum", "critic_losses", "updates/s", update=True),
    Case("mage", "its model, batch 256", "pendulum", "model_loss", "training steps/s", update=True),
    Case("vin", "maze8", "maze8", "Mazes.rows", "updates/s", update=True),
    Case("vin", "maze16", "maze16", "Mazes.rows", "updates/s", update=True),
    Case("icm", "64 mazes and policy", "maze", "act", "steps/s", 64 * 64),
    Case("icm", "minibatch", "maze", "update", "updates/s"),
    Case("planet", "plan, 200 × 10 actions, 5 rounds", "pendulum --random-steps 200 --updates 10", "plan", "plans/s"),
    Case("planet", "plan, 1,000 × 12 actions, 10 rounds", f"pendulum {PLANET}", "plan", "plans/s", large=True),
    Case("planet", "update, 16 × 32 vectors", "pendulum --random-steps 200", "SequenceReplay.sample", "updates/s",
         update=True),
    Case("dreamer_v1", "update, 8 × 32 images of 32 × 32", "pendulum-pixels", "SequenceReplay.sample", "updates/s",
         update=True),
    Case("dreamer_v1", "update, 50 × 50 of 64 × 64", f"pendulum-pixels {DREAMER_1}", "SequenceReplay.sample",
         "updates/s", update=True, large=True),
    Case("dreamer_v1", "update, 50 × 50 of 64 × 64 in bfloat16", f"pendulum-pixels {DREAMER_1} --bf16",
         "SequenceReplay.sample", "updates/s", update=True, large=True),
    Case("dreamer_v2", "update, 16 × 8 images of 32 × 32", "catch", "SequenceReplay.sample", "updates/s", update=True),
    Case("dreamer_v2", "update, 16 × 50 of 64 × 64", f"catch {DREAMER_2}", "SequenceReplay.sample", "updates/s",
         update=True, large=True),
    Case("dreamer_v2", "update, 16 × 50 of 64 × 64 in bfloat16", f"catch {DREAMER_2} --bf16", "SequenceReplay.sample",
         "updates/s", update=True, large=True),
    Case("dreamer_v3", "update, 16 × 16 rows, size tiny", "cartpole", "SequenceReplay.sample", "updates/s",
         update=True, counted=False),
    Case("dreamer_v3", "update, 16 × 16 images of 32 × 32", "catch", "SequenceReplay.sample", "updates/s", update=True,
         counted=False),
    *(
        case
        for file in ("muzero", "gumbel_muzero")
        for case in (
            Case(file, "CartPole-v1, 1 root", f"cartpole {SEARCH} --envs 1", "search", "simulations/s", 25),
            Case(file, "CartPole-v1, 64 roots", f"cartpole {SEARCH} --envs 64", "search", "simulations/s", 25 * 64),
            Case(file, "TicTacToe-v0, 64 roots", f"tictactoe {SEARCH} --envs 64", "search", "simulations/s", 25 * 64),
            Case(file, "CartPole-v1, batch 128", "cartpole", "muzero_loss", "updates/s", update=True),
        )
    ),
]  # fmt: skip


class EnoughError(Exception):
    """The run has been timed for long enough."""


def spans_of(case: Case, words: str, seconds: float) -> tuple[list[float], int]:
    """Seconds of each call or update, and the floating-point operations of an update."""
    module = importlib.import_module(case.file)
    *path, name = case.function.split(".")
    owner = getattr(module, path[0]) if path else module
    original, calls, counter = getattr(owner, name), [], FlopCounterMode(display=False)

    def timed(*args, **kwargs):
        if len(calls) == 1 and case.update and case.counted:
            counter.__enter__()
        if len(calls) == 2 and case.update and case.counted:
            counter.__exit__(None, None, None)
        if len(calls) >= (4 if case.update else 2) and time.perf_counter() - calls[0][0] > seconds:
            raise EnoughError
        start = time.perf_counter()
        result = original(*args, **kwargs)
        calls.append((start, time.perf_counter()))
        return result

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with (
            TemporaryDirectory() as folder,
            redirect_stdout(StringIO()),
            redirect_stderr(StringIO()),
            patch.object(owner, name, timed),
            patch.object(module, "SummaryWriter"),  # its thread would outlive the folder
        ):
            module.train(module.parse_args([*words.split(), "--run-dir", folder]))
    except EnoughError:
        pass
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if case.update:
        starts = [start for start, _ in calls[2:]]  # without the update that is counted
        return np.diff(starts).tolist(), counter.get_total_flops()
    return [end - start for start, end in calls], 0


def rows_of(case: Case, seconds: float, compiled: bool) -> list[tuple[str, str, float]]:
    """Name, unit and rate."""
    name, words = f"{case.name}{', compiled' if compiled else ''}", f"{case.words}{' --compile' if compiled else ''}"
    spans, flops = spans_of(case, words, seconds)
    fast = float(np.quantile(spans, 0.1))
    rows = [(name, case.unit, case.work / fast)]
    return [*rows, (name, "GFLOP/s", flops / fast / 1e9)] if flops and not compiled else rows


def best_rates(calls: dict[str, Callable], work: float, unit: str, seconds: float) -> list[tuple[str, str, float]]:
    """Name, unit and rate of the best of several rounds, in which calls take turns."""
    best, begin = dict.fromkeys(calls, float("inf")), time.perf_counter()
    while max(best.values()) == float("inf") or time.perf_counter() - begin < seconds:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return [(name, unit, work / least) for name, least in best.items()]


def matrix_product(seconds: float) -> list[tuple[str, str, float]]:
    a, b = torch.rand(1024, 1024), torch.rand(1024, 1024)
    return best_rates({"float32 1024 × 1024": lambda: a @ b}, 2 * 1024**3 / 1e9, "GFLOP/s", seconds)


def sweeps(seconds: float) -> list[tuple[str, str, float]]:
    """A sweep of value iteration as in tabular_dp, and as loops over the environment's own table."""
    tabular_dp, rows = importlib.import_module("tabular_dp"), []
    for env_id in ("FrozenLake8x8-v1", "Taxi-v4"):
        env = gym.make(env_id)
        P, r = tabular_dp.model_of(env)
        V, table = r.max(1), env.unwrapped.P

        def loops(V=V, table=table, r=r):
            return [
                max(sum(p * (x + 0.99 * V[s2] * (not end)) for p, s2, x, end in table[s][a]) for a in range(r.shape[1]))
                for s in range(len(r))
            ]

        def sweep(P=P, r=r, V=V):
            return tabular_dp.backup(P, r, V, 0.99).max(1)

        assert np.allclose(loops(), sweep())
        calls = {f"{env_id}, a sweep": sweep, f"{env_id}, loops": loops}
        rows += best_rates(calls, r.size / 1e6, "million states × actions/s", seconds)
    return rows


FILES = ("matrix product", "tabular_dp", *dict.fromkeys(case.file for case in CASES))


@dataclass
class Args:
    seconds: float = 10.0
    """Time for each case, after its first call."""
    threads: int = torch.get_num_threads()
    """Torch's threads."""
    compile: bool = False
    """Also what the files' --compile makes of the hot paths."""
    large: bool = True
    """Also the papers' sizes, which take seconds a call."""
    only: tuple[Literal[FILES], ...] = FILES
    """These files alone."""
    peers: bool = False
    """The same work by other libraries, as far as they are installed; the table goes to docs/speed.md."""
    save: Optional[Path] = None
    """Also write the table here, as CSV: the files that were measured again, the others stay as they are there."""


def compare_with_peers(args: Args) -> None:
    peers = importlib.import_module("speed_peers")  # imports more than the other cases need
    print("| file | library | work | ours | its | unit | ratio |\n|-|-|-|-|-|-|-|")
    rows = []
    for *words, unit, work, ours, theirs in peers.pairs():
        calls = {"ours": ours, "theirs": theirs}
        for call in calls.values():
            call()  # compiles
        (*_, ours), (*_, theirs) = best_rates(calls, work, unit, args.seconds)
        rows.append((*words, unit, f"{ours:.4g}", f"{theirs:.4g}"))
        print(f"| {' | '.join(words)} | {ours:.3g} | {theirs:.3g} | {unit} | {ours / theirs:.2f} |", flush=True)
    path = args.save or ROOT / "benchmarks" / "results" / "peers.csv"
    write_csv(path, ("file", "library", "work", "unit", "ours", "theirs"), rows)


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    version = f"Python {platform.python_version()}, torch {torch.__version__}"
    print(f"{platform.machine()}, {args.threads} threads, {version}\n")
    if args.peers:
        compare_with_peers(args)
        return
    print("| file | hot path | rate | unit |\n|-|-|-|-|")
    table = [[*row.values()] for row in read_csv(args.save) if row["file"] not in args.only] if args.save else []

    def add(file: str, rows: list[tuple[str, str, float]]) -> None:
        for name, unit, rate in rows:
            table.append([file, name, unit, f"{rate:.4g}", args.threads, torch.__version__])
            print(f"| {file} | {name} | {rate:.3g} | {unit} |", flush=True)

    for file, function in {"matrix product": matrix_product, "tabular_dp": sweeps}.items():
        if file in args.only:
            add(file, function(args.seconds))
    for case in CASES:
        if case.file not in args.only or (case.large and not args.large):
            continue
        add(case.file, rows_of(case, args.seconds, compiled=False))
        settings = {field.name for field in dataclasses.fields(importlib.import_module(case.file).Args)}
        if args.compile and "compile" in settings:
            torch.compiler.reset()  # sizes that were met before would make it compile for all sizes
            add(case.file, rows_of(case, args.seconds, compiled=True))
    if args.save:
        table.sort(key=lambda row: FILES.index(row[0]))
        write_csv(args.save, ("file", "hot_path", "unit", "rate", "threads", "torch"), table)


if __name__ == "__main__":
    main(tyro.cli(Args, description=(__doc__ or "").split("\n\n")[0]))
