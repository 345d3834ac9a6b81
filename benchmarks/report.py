"""Curves, figures and tables of what benchmarks/run.py trained, so that no number is typed by hand.

    python benchmarks/report.py --runs runs/benchmarks     # read the finished runs, then draw and write
    python benchmarks/report.py                            # draw and write anew from benchmarks/results
    python benchmarks/report.py --check                    # write nothing; name what differs from the curves

Each finished run becomes benchmarks/results/curves/<run>.csv, and a row of benchmarks/results/runs.csv that says what
it was. What is read takes the place of all that was there of the same command, or with --beside of its own seed alone.
A task is a file and its preset; all flags that it was run with share docs/figures/report_<file>_<preset>.png, where a
page has its table, with the numbers of papers and public logs from benchmarks/marks.csv (a line across where a mark has
no step). In README.md and docs/*.md three kinds of markers, which GitHub does not show, are filled; what nobody ran
stays as it is:

    <!-- report: mbpo pendulum -->  a table and its figure  <!-- end of report -->
    <!-- report: speed mbpo -->  what benchmarks/speed.py --save speed_<machine>.csv wrote  <!-- end of report -->
    <!-- minutes mbpo pendulum -->9.8<!-- . -->   and so with "last", "steps", "seeds"; "lines mbpo": of the file;
    "algorithm mbpo": of its sections from "The algorithm" to "Plumbing", without the task; "diff mbpo mage": those of
    mage.py that `diff` shows as new or changed

In the docstrings of algos/ the comment behind a command is filled too, if it is "# not measured yet" or was filled.

Needs scipy: pip install -r benchmarks/requirements.txt
"""

import csv
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import tyro
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
INDEX = ("run", "file", "flags", "seed", "commit", "steps", "minutes")
# What is reported of a file, or of a task; of all others the return
SCORE = {"vin": "eval/success_rate", "dyna_q maze": "eval/episodic_length"}
WORDS = {"eval/success_rate": "success rate", "eval/episodic_length": "length"}  # in docstrings
KEPT = re.compile(r"eval/|charts/episodic_(return|length)")


@dataclass
class Args:
    runs: Optional[Path] = None
    """Read the finished runs in this folder of benchmarks/run.py first."""
    beside: bool = False
    """Of a command that is read, keep the seeds that are there already: they were run elsewhere, or earlier."""
    check: bool = False
    """Write nothing; end with an error if a page differs from what the curves say."""


class Run(NamedTuple):
    """A finished run: a row of runs.csv, with its curves."""

    run: str
    file: str
    flags: str
    seed: int
    commit: str
    steps: int
    minutes: float  # not a number where it was stopped in between
    curves: dict[str, np.ndarray]  # tag → [N, 3]: step, minutes since its first event, value

    @property
    def task(self) -> str:
        """File and preset."""
        preset = self.flags.split()[0] if self.flags and not self.flags.startswith("-") else ""
        return f"{self.file} {preset}".strip()

    @property
    def tag(self) -> str:
        return SCORE.get(self.task, SCORE.get(self.file, "eval/episodic_return"))

    @property
    def score(self) -> np.ndarray:
        return self.curves[self.tag]

    @property
    def drawn(self) -> str:
        """The tag of the curve: the episodes of training, where evaluations are too few for one."""
        training = self.tag.replace("eval/", "charts/")
        return self.tag if len(self.score) > 2 or training not in self.curves else training


def stop(message: str) -> None:
    print(f"report.py: {message}", file=sys.stderr)
    raise SystemExit(2)


# ── From runs to CSV ──────────────────────────────────────────────────────────────────────────────────────────────


def read_run(finished: Path) -> Run:
    """The events of one run; `finished` is what benchmarks/run.py writes when it is done."""
    known, name = json.loads(finished.read_text()), finished.name.removesuffix(".json")
    events = EventAccumulator(str(finished.with_name(name)), size_guidance={"scalars": 0}).Reload()
    begin, curves = events.FirstEventTimestamp(), {}
    for tag in filter(KEPT.match, events.Tags()["scalars"]):
        curves[tag] = np.array([(e.step, (e.wall_time - begin) / 60, e.value) for e in events.Scalars(tag)])
    steps = int(max((curve[-1, 0] for curve in curves.values()), default=0))
    minutes = float("nan") if known["resumed"] else known["seconds"] / 60
    run = Run(name, known["name"], known["flags"], known["seed"], known["commit"], steps, minutes, curves)
    if run.tag not in curves:
        stop(f"{finished} was written by a run without an evaluation")
    return run


def thinned(tag: str, curve: np.ndarray, most: int = 200) -> np.ndarray:
    """Of the many episodes of training the means of so many equal parts; evaluations stay as they are."""
    if len(curve) <= most or tag.startswith("eval/"):
        return curve
    return np.array([part.mean(0) for part in np.array_split(curve, most)])


def save_runs(runs: list[Run], results: Path, beside: bool = False) -> None:
    """In place of those that are there of the same commands, or only of the same seeds."""
    (results / "curves").mkdir(parents=True, exist_ok=True)

    def key(run: Run) -> tuple:
        return (run.file, run.flags, run.seed) if beside else (run.file, run.flags)

    new, rows = {key(run) for run in runs}, list(runs)
    for run in load_runs(results):
        if key(run) in new:
            (results / "curves" / f"{run.run}.csv").unlink()
        else:
            rows.append(run)
    for run in runs:
        with open(results / "curves" / f"{run.run}.csv", "w", newline="") as file:
            out = csv.writer(file, lineterminator="\n")
            out.writerow(("tag", "step", "minutes", "value"))
            for tag, curve in sorted(run.curves.items()):
                for step, minutes, value in thinned(tag, curve):
                    out.writerow((tag, f"{step:.0f}", f"{minutes:.3f}", f"{value:.6g}"))
    with open(results / "runs.csv", "w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(INDEX)
        for run in sorted(rows, key=lambda run: (run.file, run.flags, run.seed)):
            minutes = "" if np.isnan(run.minutes) else f"{run.minutes:.2f}"
            out.writerow((run.run, run.file, run.flags, run.seed, run.commit, run.steps, minutes))


def load_runs(results: Path) -> list[Run]:
    if not (results / "runs.csv").exists():
        return []
    runs = []
    with open(results / "runs.csv", newline="") as file:
        for row in csv.DictReader(file):
            curves: dict[str, list] = {}
            with open(results / "curves" / f"{row['run']}.csv", newline="") as points:
                for point in csv.DictReader(points):
                    numbers = [float(point[name]) for name in ("step", "minutes", "value")]
                    curves.setdefault(point["tag"], []).append(numbers)
            row |= {"seed": int(row["seed"]), "steps": int(row["steps"]), "minutes": float(row["minutes"] or "nan")}
            runs.append(Run(**row, curves={tag: np.array(curve) for tag, curve in curves.items()}))
    return runs


# ── Statistics ────────────────────────────────────────────────────────────────────────────────────────────────────


def bootstrap(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile interval over the seeds, [seeds, ...] → low, high [...]; one seed has none."""
    from scipy import stats

    if len(samples) < 2:
        return samples[0], samples[0]
    found = stats.bootstrap(
        (samples,), np.mean, axis=0, n_resamples=2_000, method="percentile", rng=np.random.default_rng(0)
    )
    return found.confidence_interval.low, found.confidence_interval.high


def iqm(samples: np.ndarray) -> np.ndarray:
    """The mean of the middle half."""
    from scipy import stats

    return stats.trim_mean(samples, 0.25)


def digits(values: np.ndarray) -> int:
    """So many behind the point that three or four figures show."""
    largest = np.abs(values).max()
    return 3 if largest <= 1 else int(np.clip(2 - np.floor(np.log10(largest)), 0, 3))


def spread(values: np.ndarray) -> str:
    """The mean and its interval."""
    low, high = bootstrap(values)
    n = digits(values)
    middle = f"{values.mean():.{n}f}"
    return f"{middle} [{low:.{n}f}, {high:.{n}f}]".replace("-", "−") if len(values) > 1 else middle.replace("-", "−")


def on_a_grid(curves: list[np.ndarray], column: int) -> tuple[np.ndarray, np.ndarray]:
    """x [N] and values [seeds, N] over the steps (column 0) or minutes (1) that all seeds have, where the one with the
    fewest points has them; of the others what lies between two points is on the line."""
    low, high = (f(curve[end, column] for curve in curves) for f, end in ((max, 0), (min, -1)))
    x = min(curves, key=len)[:, column]
    x = x[(low <= x) & (x <= high)]
    return x, np.array([np.interp(x, curve[:, column], curve[:, 2]) for curve in curves])


# ── Figures and tables ────────────────────────────────────────────────────────────────────────────────────────────


def groups_of(runs: list[Run]) -> dict[str, dict[str, list[Run]]]:
    """Task → flags → its seeds."""
    groups: dict[str, dict[str, list[Run]]] = {}
    for run in sorted(runs, key=lambda run: (run.file, run.flags, run.seed)):
        groups.setdefault(run.task, {}).setdefault(run.flags, []).append(run)
    return groups


def name_of(task: str) -> str:
    return f"report_{task.replace(' ', '_')}"


def has_clock(variants: dict[str, list[Run]]) -> bool:
    return any(not np.isnan(run.minutes) for runs in variants.values() for run in runs)


def draw(task: str, variants: dict[str, list[Run]], marks: list[dict], path: Path) -> None:
    figure = Figure(figsize=(9.2, 3.4), dpi=90)
    columns = (0, 1) if has_clock(variants) else (0,)
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for number, runs in enumerate(variants.values()):
        for axis, column in zip(axes, columns, strict=True):
            # A run that was stopped in between has no clock
            curves = [run.curves[run.drawn] for run in runs if column == 0 or not np.isnan(run.minutes)]
            for curve in curves:
                axis.plot(curve[:, column], curve[:, 2], color=f"C{number}", linewidth=0.5, alpha=0.5)
            if curves:
                x, values = on_a_grid(curves, column)
                axis.plot(x, values.mean(0), color=f"C{number}", label=command(runs[0]), linewidth=1.6)
                axis.fill_between(x, *bootstrap(values), color=f"C{number}", alpha=0.18, linewidth=0)
    for mark in marks:
        if f"{mark['file']} {mark['preset']}".strip() == task:
            value, text = float(mark["value"]), {"textcoords": "offset points", "fontsize": 6}
            if mark["step"]:
                axes[0].plot(float(mark["step"]), value, "k*", markersize=8)
                axes[0].annotate(mark["label"], (float(mark["step"]), value), (-4, -9), ha="right", **text)
            else:
                axes[0].axhline(value, color="black", linewidth=0.7, linestyle=":")
                axes[0].annotate(mark["label"], (0.02, value), (0, 3), ("axes fraction", "data"), **text)
    axes[0].xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k")
    axes[0].set(xlabel="steps", ylabel=", ".join(sorted({run.drawn for runs in variants.values() for run in runs})))
    axes[-1].set(xlabel=("steps", "minutes")[columns[-1]])
    if any(run.drawn.endswith("_length") for runs in variants.values() for run in runs):
        axes[0].set_yscale("log")  # an episode that does not arrive is long
    axes[0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path)


def command(run: Run) -> str:
    return f"{run.file}.py {run.flags}".strip()


def table(task: str, variants: dict[str, list[Run]], figure: str) -> str:
    lines = [
        "| command | seeds | steps | last evaluation, mean and 95 % interval | IQM | each seed | minutes |",
        "|-|-|-|-|-|-|-|",
    ]
    for runs in variants.values():
        last = np.array([run.score[-1, 2] for run in runs])
        n = digits(last)
        each = ", ".join(f"{value:.{n}f}" for value in last).replace("-", "−")
        middle = f"{iqm(last):.{n}f}".replace("-", "−") if len(last) >= 5 else ""
        lines.append(
            f"| `{command(runs[0])}` | {seeds(runs)} | {steps(runs)} | {spread(last)} | {middle} | {each} "
            f"| {clock(runs)} |"
        )
    over = "steps and minutes" if has_clock(variants) else "steps"
    lines += ["", f"![{task}: evaluations over {over}]({figure})", ""]
    every = [run for runs in variants.values() for run in runs]
    commits = ", ".join(dict.fromkeys(commit for run in every for commit in run.commit.split()))
    few = any(1 < len(runs) < 4 for runs in variants.values())
    warning = " Of two or three seeds it is little more than their range." if few else ""
    lines.append(f"*`{every[0].tag}`. Thin: seeds. Thick: their mean, with its interval.{warning} Commit {commits}.*")
    return "\n".join(lines)


def steps(runs: list[Run]) -> str:
    low, high = min(run.steps for run in runs), max(run.steps for run in runs)
    return f"{low:,}" if high < 1.02 * low else f"{low:,} to {high:,}"


def seeds(runs: list[Run]) -> str:
    numbers = [run.seed for run in runs]
    if numbers == list(range(numbers[0], numbers[0] + len(numbers))) and len(numbers) > 1:
        return f"{numbers[0]}–{numbers[-1]}"
    return ", ".join(map(str, numbers))


def clock(runs: list[Run]) -> str:
    """Mean minutes of those that were never stopped."""
    whole = [run.minutes for run in runs if not np.isnan(run.minutes)]
    return f"{np.mean(whole):.1f}" if whole else ""


def by_command(groups: dict[str, dict[str, list[Run]]]) -> dict[str, list[Run]]:
    """Exactly these flags: `mbpo pendulum` is the preset with none behind it."""
    return {f"{runs[0].file} {flags}".strip(): runs for of_task in groups.values() for flags, runs in of_task.items()}


def algorithm_lines(path: Path) -> Optional[str]:
    """Number of lines from the banner "The algorithm" to the banner "Plumbing", without the sections of the task."""
    if not path.is_file():
        return None
    sections = re.split(r"^# ── ", path.read_text(), flags=re.M)[1:]
    return str(sum(len(x.splitlines()) for x in sections if not x.startswith(("The task", "Plumbing"))))


def changed_lines(first: Path, second: Path) -> Optional[str]:
    """How many lines of the second file `diff` shows as new or changed."""
    if not (first.is_file() and second.is_file()):
        return None
    shown = subprocess.run(["diff", first, second], capture_output=True, text=True).stdout
    return f"{len(re.findall('^>', shown, re.M)):,} of {len(second.read_text().splitlines()):,}"


def cell(what: str, of: str, groups: dict[str, dict[str, list[Run]]]) -> Optional[str]:
    """The text of a small marker; None where nothing is known yet: what stands there stays."""
    if what == "lines":
        path = ROOT / "algos" / f"{of}.py"
        return f"{len(path.read_text().splitlines()):,}" if path.is_file() else None
    if what == "algorithm":
        return algorithm_lines(ROOT / "algos" / f"{of}.py")
    if what == "diff":
        return changed_lines(*(ROOT / "algos" / f"{name}.py" for name in of.split()))
    if not (runs := by_command(groups).get(of)):
        return None
    if what == "last":
        return spread(np.array([run.score[-1, 2] for run in runs]))
    return {"minutes": clock(runs) or None, "steps": steps(runs), "seeds": str(len(runs))}[what]


TABLE = re.compile(
    r"(^<!-- report: (?P<task>[\w -]+?) -->\n)(?:(?!<!-- report: ).)*?(^<!-- end of report -->)", re.DOTALL | re.M
)
CELL = re.compile(
    r"(<!-- (?P<what>last|minutes|steps|seeds|lines|algorithm|diff) (?P<of>[^<>]+?) -->)"
    r"((?:(?!<!--)[^\n`])*)(<!-- \. -->)"
)


USAGE = re.compile(
    r"^(    python algos/(?P<file>\w+)\.py(?P<flags>(?: [^#\n]*)?)# )"
    r"(?:not measured yet|(?:[\d.]+ minutes, )?(?:return|length|success rate) .*)$",
    re.M,
)


def filled_docstring(text: str, groups: dict[str, dict[str, list[Run]]]) -> str:
    """A script whose usage lines name the measured not measured yet; without a preset those of the first one."""
    first = re.search(r'^PRESETS = \{\s+"([\w-]+)"', text, re.M)

    def fill(found: re.Match) -> str:
        runs = by_command(groups).get(f"{found['file']} {found['flags'].strip() or (first and first[1])}")
        if not runs:
            return found[0]
        minutes = f"{clock(runs)} minutes, " if clock(runs) else ""
        word = WORDS.get(runs[0].tag, "return")
        return f"{found[1]}{minutes}{word} {spread(np.array([run.score[-1, 2] for run in runs]))}"

    return USAGE.sub(fill, text)


def rounded(rate: float) -> str:
    rate = float(f"{rate:.3g}")
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:g}"


def speed_table(file: str, results: Path) -> Optional[str]:
    """A file's rows of benchmarks/speed.py, a column for each machine (speed_<machine>.csv) and one for what
    torch.compile makes of them there; matrix products also as a share of the machine's own."""
    rates: dict[tuple[str, str], dict[str, float]] = {}  # (hot path, unit) → machine → rate
    peaks: dict[str, dict[str, float]] = {}
    made_with = {}
    for path in sorted(results.glob("speed_*.csv"), key=lambda path: path.stem):
        with open(path, newline="") as source:
            rows = [row for row in csv.DictReader(source) if row["file"] in (file, "matrix product")]
        machine = path.stem.removeprefix("speed_").replace("_", " ")
        if all(row["file"] != file for row in rows):
            continue
        for row in rows:
            if row["file"] == file:
                rates.setdefault((row["hot_path"], row["unit"]), {})[machine] = float(row["rate"])
            else:
                peaks.setdefault(f"matrix product, {row['hot_path']}", {})[machine] = float(row["rate"])
        threads, version = (", ".join(sorted({row[name] for row in rows})) for name in ("threads", "torch"))
        made_with[machine] = f"threads {threads}; torch {version}"
    if not rates:
        return None
    columns = []  # a machine, and whether it is the column of torch.compile
    for machine in made_with:
        compiled = any(name.endswith(", compiled") and machine in of for (name, _), of in rates.items())
        columns += [(machine, False), (machine, True)] if compiled else [(machine, False)]
    heads = ["with `--compile`" if compiled else machine for machine, compiled in columns]
    lines = [f"| {' | '.join(['hot path', 'unit', *heads])} |", "|-" * (2 + len(columns)) + "|"]
    for (name, unit), of in [*(((name, "GFLOP/s"), of) for name, of in peaks.items()), *rates.items()]:
        if name.endswith(", compiled"):
            continue
        cells = []
        for machine, compiled in columns:
            rate = (rates.get((f"{name}, compiled", unit), {}) if compiled else of).get(machine)
            shares = [of[machine] for of in peaks.values() if unit == "GFLOP/s" and name not in peaks and machine in of]
            share = "".join(f" ({rate / most:.0%})" for most in shares if rate and not compiled)
            cells.append(rounded(rate) + share if rate else "")
        lines.append(f"| {' | '.join([name, unit, *cells])} |")
    note = " In brackets the share of the matrix product's rate." if any("%)" in line for line in lines) else ""
    lines += ["", f"*{' '.join(f'{machine}: {how}.' for machine, how in made_with.items())}{note}*"]
    return "\n".join(lines)


def filled(text: str, page: Path, groups: dict[str, dict[str, list[Run]]]) -> str:
    """A page with what its markers ask for."""

    if len(re.findall("^<!-- report: ", text, re.M)) != len(TABLE.findall(text)):
        stop(f"{page.name} has a report without its end, or an end without its report")

    def fill_table(found: re.Match) -> str:
        task = found["task"]
        if task.startswith("speed "):
            made = speed_table(task.removeprefix("speed "), ROOT / "benchmarks" / "results")
            return f"{found[1]}\n{made}\n\n{found[3]}" if made else found[0]
        if task not in groups:
            return found[0]
        up = "" if page.parent.name == "docs" else "docs/"
        return f"{found[1]}\n{table(task, groups[task], f'{up}figures/{name_of(task)}.png')}\n\n{found[3]}"

    def fill_cell(found: re.Match) -> str:
        new = cell(found["what"], found["of"], groups)
        return found[0] if new is None else f"{found[1]}{new}{found[5]}"

    return CELL.sub(fill_cell, TABLE.sub(fill_table, text))


def main(args: Args) -> None:
    results, marks = ROOT / "benchmarks" / "results", []
    if args.runs is not None:
        if args.check:
            stop("--check writes nothing: leave out --runs")
        finished = sorted(path for path in args.runs.glob("*.json") if path.with_suffix("").is_dir())
        if not finished:
            stop(f"{args.runs} holds no finished run of benchmarks/run.py")
        save_runs([read_run(path) for path in finished], results, args.beside)
        print(f"{len(finished)} runs read")
    elif args.beside:
        stop("--beside is about runs that are read: say where they are with --runs")
    groups = groups_of(load_runs(results))
    if (ROOT / "benchmarks" / "marks.csv").exists():
        with open(ROOT / "benchmarks" / "marks.csv", newline="") as file:
            marks = list(csv.DictReader(file))
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "algos").glob("*.py"))]
    shown = {found["task"] for page in pages for found in TABLE.finditer(page.read_text())}
    for task in () if args.check else sorted(shown & set(groups)):
        draw(task, groups[task], marks, ROOT / "docs" / "figures" / f"{name_of(task)}.png")
    differ = []
    for page in pages:
        old = page.read_text()
        if (new := filled_docstring(old, groups) if page.suffix == ".py" else filled(old, page, groups)) != old:
            differ.append(str(page.relative_to(ROOT)))
            if not args.check:
                page.write_text(new)
    if args.check and differ:
        print(f"not what the curves say: {', '.join(differ)}; run python benchmarks/report.py", file=sys.stderr)
        raise SystemExit(1)
    print(f"{len(groups)} tasks; {'written: ' + ', '.join(differ) if differ else 'the pages are as their curves say'}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=(__doc__ or "").split("\n\n")[0]))
