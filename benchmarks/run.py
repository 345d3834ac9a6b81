"""Train many runs of algos/ on Ray, on this machine or on a cluster.

    python benchmarks/run.py "1-5 dyna_q maze" "1-3 mbpo pendulum --rollout-length 0"
    python benchmarks/run.py --table benchmarks/bars.txt
    python benchmarks/run.py --table benchmarks/bars.txt --address auto --gpus 0.25

A line names seeds, a file of algos/, and what stands behind it on a command line. Each seed is one run, in a folder of
its own below --runs; on a cluster all machines must see that folder. A run that is there and finished is not made
again, one that was stopped or killed goes on from its checkpoint. A run whose process dies is tried again, a wrong
setting is not. Ctrl-C stops every run at a checkpoint: the same command goes on.

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple, Optional

import tyro
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Args:
    lines: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Lines as in a table, each one word of the shell: "1-5 dyna_q maze"."""
    table: Optional[Path] = None
    """A file of such lines; # begins a comment."""
    runs: Path = Path("runs/benchmarks")
    """Where the runs are kept."""
    cpus: float = 1.0
    """Cores for a run; it takes as many threads, one at least."""
    gpus: float = 0.0
    """Share of a GPU for a run."""
    retries: int = 3
    """A run whose process dies is tried again so often."""
    address: Optional[str] = None
    """A Ray cluster's address, or auto; by default Ray is started on this machine."""
    every: float = 5.0
    """Show the table every so many seconds."""


class Run(NamedTuple):
    name: str  # the file of algos/
    flags: str
    seed: int
    folder: Path

    @property
    def finished(self) -> Path:
        """Is there when the run is done, and says what it was and how long it took."""
        return self.folder.with_name(self.folder.name + ".json")

    @property
    def output(self) -> Path:
        return self.folder.with_name(self.folder.name + ".log")

    @property
    def commits(self) -> Path:
        """Which code it was begun and gone on with."""
        return self.folder.with_name(self.folder.name + ".commits")


ALL_DONE = "steps already: raise --total-timesteps"  # what a script says to --resume after its last checkpoint


class WrongSetting(Exception):
    """The script refused its settings: to try again would not help."""


def stop(message: str) -> None:
    print(f"run.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse(line: str, runs: Path) -> list[Run]:
    """ "1-3,7 mbpo pendulum --rollout-length 0" → four runs; a comment alone → none."""
    line = line.split("#")[0].strip()
    if not line:
        return []
    seeds, name, *flags = [*line.split(), ""][: max(len(line.split()), 2)]
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", seeds):
        stop(f"{line!r} must begin with seeds, as 1-5 or 1,2,7")
    if not (ROOT / "algos" / f"{name}.py").is_file():
        stop(f"{line!r} names no file of algos/ after the seeds")
    numbers = []
    for part in seeds.split(","):
        first, last = map(int, (part.split("-") * 2)[:2])
        if last < first:
            stop(f"{line!r} counts backwards: {part}")
        numbers += range(first, last + 1)
    return [place(name, " ".join(flags), seed, runs) for seed in numbers]


def place(name: str, flags: str, seed: int, runs: Path) -> Run:
    words = re.sub(r"[^\w.-]+", "_", f"{name} {flags}".strip().replace(" --", "__"))
    return Run(name, flags, seed, (runs / f"{words}__{seed}").resolve())


def commit(name: str) -> str:
    """Of this checkout; with a + where that file of algos/ has changed since. Empty where there is none."""
    git = ["git", "--no-optional-locks", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", f"algos/{name}.py"], capture_output=True)
    except OSError:  # no git
        return ""
    return "" if head.returncode else head.stdout.strip() + "+" * (changed.returncode == 1)


def die_with_parent() -> None:
    """A run must not outlive the worker that watches it: the next one goes on in the same folder."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # no global of this module: Ray sends those to its workers


def train(run: Run, threads: int = 1, to_stop: Callable[[], bool] = lambda: False) -> None:
    """In a process of its own: one run, begun or gone on with, to its end, or until it is to stop."""
    if run.finished.exists():
        if json.loads(run.finished.read_text()).get("flags", run.flags) != run.flags:
            raise WrongSetting(f"{run.folder} holds a run of other flags")
        return
    go_on = (run.folder / "checkpoint.pt").exists()
    if not go_on:
        for left in (run.output, run.commits):
            left.unlink(missing_ok=True)
        shutil.rmtree(run.folder, ignore_errors=True)  # killed before its first checkpoint
    begin = [*run.flags.split(), "--seed", str(run.seed), "--run-dir", str(run.folder)]
    flags = ["--resume", str(run.folder)] if go_on else begin
    command = [sys.executable, str(ROOT / "algos" / f"{run.name}.py"), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with open(run.commits, "a") as known:
        print(commit(run.name), file=known)
    with open(run.output, "a") as output:
        print("$", shlex.join(command), file=output, flush=True)
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            preexec_fn=die_with_parent, start_new_session=True,  # Ctrl-C comes to it once, from here
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
    if process.returncode:
        lines = [line.strip("│╭╮╰╯─ ") for line in run.output.read_text().splitlines()]  # without tyro's frame
        last = [line for line in lines if line and not line.startswith("For full helptext")][-1]
        if go_on and ALL_DONE in last:  # killed in its last evaluation, after its last checkpoint: begin anew
            shutil.rmtree(run.folder)
            return train(run, threads, to_stop)
        raise (WrongSetting if process.returncode == 2 else RuntimeError)(last)
    seconds = time.perf_counter() - start
    commits = " ".join(dict.fromkeys(run.commits.read_text().split()))  # a run that went on may have several
    known = {"name": run.name, "flags": run.flags, "seed": run.seed, "commit": commits}
    temporary = run.finished.with_suffix(".tmp")
    temporary.write_text(json.dumps({**known, "seconds": seconds, "resumed": go_on}))
    temporary.rename(run.finished)


def train_on_ray(run: Run, threads: int) -> None:
    """Ray cancels a task by Ctrl-C from within, which does nothing where Ctrl-C is ignored, as it is in all that a
    shell began in the background. So there is a handler; the process is this task's alone."""
    told: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: told.append(number))
    train(run, threads, lambda: bool(told))


@dataclass
class Watched:
    """How far a run is, read from what it writes."""

    run: Run
    state: str = "waiting"
    step: int = 0
    total: int = 0
    score: float = float("nan")
    loaders: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.begun_before = self.written()

    def written(self) -> int:
        """When the run was last begun or gone on with; 0: never."""
        return self.run.commits.stat().st_mtime_ns if self.run.commits.exists() else 0

    def look(self) -> None:
        if self.state == "waiting" and self.written() != self.begun_before:
            self.state = "running"
        for path in self.run.folder.glob("events.out.tfevents*"):
            for event in self.loaders.setdefault(path, EventFileLoader(str(path))).Load():
                self.step = max(self.step, event.step)
                for value in event.summary.value:
                    if value.tag.startswith("hyperparameters"):
                        self.total = int(re.search(rb"\|total_timesteps\|(\d+)", value.tensor.string_val[0])[1])
                    if value.tag == "eval/episodic_return":
                        self.score = value.tensor.float_val[0] if value.HasField("tensor") else value.simple_value

    def row(self) -> str:
        share = f"{100 * min(self.step / self.total, 1):.0f} %" if self.total else ""
        return f"{self.run.folder.name:<56} {self.state:<10} {self.step:>10,} {share:>6} {self.score:>10.4g}"


def show(watched: list[Watched], lines_before: int) -> int:
    """The table, in place of the last one where the output is a terminal."""
    for one in watched:
        one.look()
    count = {state: sum(one.state == state for one in watched) for state in sorted({one.state for one in watched})}
    rows = [one.row() for one in watched if one.state not in ("waiting", "finished")]
    lines = [*rows, ", ".join(f"{number} {state}" for state, number in count.items())]
    if sys.stdout.isatty() and lines_before:
        print(f"\x1b[{lines_before}A\x1b[J", end="")
    print(*lines, sep="\n", flush=True)
    return len(lines)


def main(args: Args) -> None:
    try:
        import ray
    except ImportError:
        stop("Ray is not installed: pip install -r benchmarks/requirements.txt")
    if args.table is not None and not args.table.is_file():
        stop(f"{args.table} is no file")
    lines = [*args.lines, *(args.table.read_text().splitlines() if args.table else [])]
    runs = [run for line in lines for run in parse(line, args.runs)]
    if not runs:
        stop('nothing to run: give lines as "1-5 dyna_q maze", or a --table')
    if len({run.folder for run in runs}) < len(runs):
        stop("a run is named twice")

    cluster = {} if args.address else {"include_dashboard": False}
    ray.init(address=args.address or "local", log_to_driver=False, logging_level="ERROR", **cluster)
    have = ray.cluster_resources()
    for what, wanted in (("CPU", args.cpus), ("GPU", args.gpus)):
        if not args.address and wanted > have.get(what, 0):  # Ray would wait for it for ever
            stop(f"each run is to have {wanted:g} {what}, and this machine has {have.get(what, 0):g}")
    # Each run has a worker process of its own. One that dies is tried again, and so is a script that ends badly
    task = ray.remote(
        num_cpus=args.cpus, num_gpus=args.gpus, max_calls=1, max_retries=args.retries, retry_exceptions=[RuntimeError]
    )(train_on_ray)
    watched = [Watched(run) for run in runs]
    pending = {task.remote(run, max(int(args.cpus), 1)): one for run, one in zip(runs, watched, strict=True)}
    drawn, last = 0, 0.0
    # A KeyboardInterrupt that is raised where Python cleans up is lost: the first Ctrl-C is only noted
    told: list[int] = []

    def note(number: int, _: object) -> None:
        told.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    usual = signal.signal(signal.SIGINT, note)
    try:
        while pending:
            if told:
                raise KeyboardInterrupt
            done, _ = ray.wait(list(pending), timeout=min(args.every, 1.0))
            for ref in done:
                one = pending.pop(ref)
                try:
                    ray.get(ref)
                    one.state = "finished"
                except Exception as error:
                    one.state = "failed"
                    print(f"{one.run.folder.name}: {getattr(error, 'cause', None) or error}", file=sys.stderr)
                    drawn = 0
            if done or time.monotonic() - last >= args.every:
                drawn, last = show(watched, drawn), time.monotonic()
    except KeyboardInterrupt:
        print("\nstopping: each run writes a checkpoint", flush=True)
        for ref in pending:
            ray.cancel(ref)
        _, left = ray.wait(list(pending), num_returns=len(pending), timeout=60)
        if left:
            print(f"{len(left)} did not within a minute: they go back to the checkpoint before")
        print("stopped; the same command goes on")
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGINT, usual)
    if any(one.state == "failed" for one in watched):
        raise SystemExit(1)


if __name__ == "__main__":
    main(tyro.cli(Args, description=(__doc__ or "").split("\n\n")[0]))
