"""Train many runs of algos/ on Ray, on this machine or on a cluster.

    python benchmarks/run.py "1-5 dyna_q maze" "1-3 mbpo pendulum --rollout-length 0"
    python benchmarks/run.py --table benchmarks/bars.txt
    python benchmarks/run.py --table benchmarks/bars.txt --address auto --gpus 0.25

A line names seeds, a file of algos/, and its words on a command line. Each seed is one run, in a folder of its own
below --runs; on a cluster all machines must see that folder. A finished run is not repeated; one that was stopped or
killed continues from its checkpoint. A run whose process dies is tried again, a wrong setting is not. Ctrl-C stops
every run at a checkpoint: the same command continues.

Needs Ray: pip install -r benchmarks/requirements.txt
"""

import ctypes
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple, Optional

import tyro
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

ROOT = Path(__file__).resolve().parent.parent
ALL_DONE = "steps already: raise --total-timesteps"  # what a script says to --resume after its last checkpoint


@dataclass
class Args:
    lines: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Lines as in a table, each one word of the shell: "1-5 dyna_q maze"."""
    table: Optional[Path] = None
    """A file of such lines; # begins a comment."""
    runs: Path = Path("runs/benchmarks")
    """Where the runs are kept."""
    cpus: float = 1.0
    """Cores for a run; it takes as many threads, at least one."""
    gpus: float = 0.0
    """Share of a GPU for a run."""
    retries: int = 3
    """How often a run whose process dies is tried again."""
    address: Optional[str] = None
    """A Ray cluster's address, or auto; by default Ray is started on this machine."""
    every: float = 30.0
    """Seconds between two reports of the progress."""


class Run(NamedTuple):
    name: str  # the file of algos/
    flags: str
    seed: int
    folder: Path

    @property
    def finished(self) -> Path:
        """Exists when the run is done, and says what it was and how long it took."""
        return self.folder.with_name(self.folder.name + ".json")

    @property
    def log(self) -> Path:
        """Each attempt's commit and command, and what it printed."""
        return self.folder.with_name(self.folder.name + ".log")


class WrongSetting(Exception):
    """The script refused its settings: to try again would not help."""


def parse(line: str, runs: Path) -> list[Run]:
    """ "1-3,7 mbpo pendulum --rollout-length 0" → four runs; a comment alone → none."""
    words = line.split("#")[0].split()
    if not words:
        return []
    seeds, name, *flags = [*words, ""] if len(words) == 1 else words
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", seeds):
        sys.exit(f"run.py: {line!r} must begin with seeds, as 1-5 or 1,2,7")
    if not (ROOT / "algos" / f"{name}.py").is_file():
        sys.exit(f"run.py: {line!r} names no file of algos/ after the seeds")
    numbers = []
    for part in seeds.split(","):
        first, _, last = part.partition("-")
        if last and int(last) < int(first):
            sys.exit(f"run.py: {line!r} counts backwards: {part}")
        numbers += range(int(first), int(last or first) + 1)
    return [place(name, " ".join(flags), seed, runs) for seed in numbers]


def place(name: str, flags: str, seed: int, runs: Path) -> Run:
    words = re.sub(r"[^\w.-]+", "_", f"{name} {flags}".strip().replace(" --", "__"))
    return Run(name, flags, seed, (runs / f"{words}__{seed}").resolve())


def commit(name: str) -> str:
    """Of this checkout; with a + if that file of algos/ has changed since. Empty without git."""
    git = ["git", "--no-optional-locks", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", f"algos/{name}.py"], capture_output=True)
    except OSError:
        return ""
    return "" if head.returncode else head.stdout.strip() + "+" * (changed.returncode == 1)


def die_with_parent() -> None:
    """A run must not outlive the worker that watches it: the next one continues in the same folder."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # no global of this module: Ray sends those to its workers


def train(run: Run, threads: int = 1, to_stop: Callable[[], bool] = lambda: False) -> None:
    """One run, begun or continued in a process of its own, to its end or until it is to stop."""
    if run.finished.exists():
        if json.loads(run.finished.read_text())["flags"] != run.flags:
            raise WrongSetting(f"{run.folder} holds a run of other flags")
        return
    resumed = (run.folder / "checkpoint.pt").exists()
    if resumed:
        flags = ["--resume", str(run.folder)]
    else:
        flags = [*run.flags.split(), "--seed", str(run.seed), "--run-dir", str(run.folder)]
        run.log.unlink(missing_ok=True)
        shutil.rmtree(run.folder, ignore_errors=True)  # killed before its first checkpoint
    command = [sys.executable, str(ROOT / "algos" / f"{run.name}.py"), *flags]
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with open(run.log, "a") as log:
        print(f"# commit {commit(run.name)}\n$ {shlex.join(command)}", file=log, flush=True)
        process = subprocess.Popen(
            command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, stdin=subprocess.DEVNULL, stdout=log,
            stderr=log, preexec_fn=die_with_parent, start_new_session=True,  # Ctrl-C comes to it once, from here
        )  # fmt: skip
        try:
            while process.poll() is None:
                time.sleep(0.2)
                if to_stop() and process.poll() is None:
                    raise KeyboardInterrupt
        except BaseException:
            process.terminate()  # the run writes a checkpoint
            process.wait()
            raise
    printed = run.log.read_text()
    if process.returncode:
        lines = [line.strip("│╭╮╰╯─ ") for line in printed.splitlines()]  # without tyro's frame
        last = [line for line in lines if line and not line.startswith("For full helptext")][-1]
        if resumed and ALL_DONE in last:  # killed in its last evaluation, after its last checkpoint: begin again
            shutil.rmtree(run.folder)
            return train(run, threads, to_stop)
        raise (WrongSetting if process.returncode == 2 else RuntimeError)(last)
    commits = " ".join(dict.fromkeys(re.findall(r"^# commit (\S+)$", printed, re.M)))
    known = {"name": run.name, "flags": run.flags, "seed": run.seed, "commit": commits}
    temporary = run.finished.with_suffix(".tmp")
    temporary.write_text(json.dumps({**known, "seconds": time.perf_counter() - start, "resumed": resumed}))
    temporary.rename(run.finished)


def train_on_ray(run: Run, threads: int) -> None:
    """Ray cancels a task by a SIGINT, which is ignored in what a shell began in the background, and so needs a handler.
    The process is this task's alone."""
    told: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: told.append(number))
    train(run, threads, lambda: bool(told))


class Progress:
    """How far a run is, read from its events."""

    def __init__(self, run: Run):
        self.run, self.step, self.score = run, 0, float("nan")
        self.loaders: dict[Path, EventFileLoader] = {}

    def __str__(self) -> str:
        for path in self.run.folder.glob("events.out.tfevents*"):
            for event in self.loaders.setdefault(path, EventFileLoader(str(path))).Load():
                self.step = max(self.step, event.step)
                for value in event.summary.value:
                    if value.tag == "eval/episodic_return":
                        self.score = value.tensor.float_val[0] if value.HasField("tensor") else value.simple_value
        return f"{self.run.folder.name:<60} {self.step:>12,} steps, last evaluation {self.score:.4g}"


def main(args: Args) -> None:
    try:
        import ray
    except ImportError:
        sys.exit("run.py: Ray is not installed: pip install -r benchmarks/requirements.txt")
    lines = [*args.lines, *(args.table.read_text().splitlines() if args.table else [])]
    runs = [run for line in lines for run in parse(line, args.runs)]
    if not runs:
        sys.exit('run.py: nothing to run: give lines as "1-5 dyna_q maze", or a --table')
    if len({run.folder for run in runs}) < len(runs):
        sys.exit("run.py: a run is named twice")

    cluster = {} if args.address else {"include_dashboard": False}
    ray.init(address=args.address or "local", log_to_driver=False, logging_level="ERROR", **cluster)
    for what, wanted in (("CPU", args.cpus), ("GPU", args.gpus)):
        available = ray.cluster_resources().get(what, 0)
        if not args.address and wanted > available:  # Ray would wait for it for ever
            sys.exit(f"run.py: each run is to have {wanted:g} {what}, and this machine has {available:g}")
    # Each run has a worker process of its own. One that dies is tried again, and so is a script that ends badly
    task = ray.remote(
        num_cpus=args.cpus, num_gpus=args.gpus, max_calls=1, max_retries=args.retries, retry_exceptions=[RuntimeError]
    )(train_on_ray)
    pending = {task.remote(run, max(int(args.cpus), 1)): Progress(run) for run in runs}
    failed, shown = 0, time.monotonic()
    # A KeyboardInterrupt that is raised where Python cleans up is lost: Ctrl-C is only noted
    told: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: told.append(number))
    while pending and not told:
        done, _ = ray.wait(list(pending), timeout=min(args.every, 1.0))
        for ref in done:
            progress = pending.pop(ref)
            try:
                ray.get(ref)
                print(f"finished: {progress}", flush=True)
            except Exception as error:
                failed += 1
                name = progress.run.folder.name
                print(f"failed: {name}: {getattr(error, 'cause', None) or error}", file=sys.stderr, flush=True)
        if time.monotonic() - shown >= args.every:
            shown = time.monotonic()
            going = [progress for progress in pending.values() if progress.run.folder.exists()]
            print(*going, f"{len(pending)} of {len(runs)} to go", sep="\n", flush=True)
    signal.signal(signal.SIGINT, before)
    if told and pending:
        print("\nstopping: each run writes a checkpoint", flush=True)
        for ref in pending:
            ray.cancel(ref)
        _, left = ray.wait(list(pending), num_returns=len(pending), timeout=60)
        if left:
            print(f"{len(left)} did not within a minute: they continue from the checkpoint before")
        print("stopped; the same command continues")
        sys.exit(130)
    print(f"{len(runs) - failed} finished, {failed} failed")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main(tyro.cli(Args, description=(__doc__ or "").split("\n\n")[0]))
