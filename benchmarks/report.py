"""Curves, figures and tables of what benchmarks/run.py trained, so that no number is typed by hand.

    python benchmarks/report.py --runs runs/benchmarks     # read the finished runs, then draw and write
    python benchmarks/report.py                            # draw and write again from benchmarks/results
    python benchmarks/report.py --check                    # write nothing; name what differs from the curves

Each finished run becomes benchmarks/results/curves/<run>.csv and a row of benchmarks/results/runs.csv. It replaces all
runs of the same command, or with --beside only the one of its seed. A task is a file and its preset; the commands of a
task share docs/figures/report_<file>_<preset>.png, with the numbers of papers and public logs from benchmarks/marks.csv
(a line across where a mark has no step). In README.md and docs/*.md, markers that GitHub does not show are filled; what
nobody ran stays as it is:

    <!-- report: mbpo pendulum -->  a table and its figure  <!-- end of report -->
    <!-- report: speed mbpo -->  the rates in benchmarks/results/speed_<machine>.csv  <!-- end of report -->
    <!-- report: peers -->  the ratios in benchmarks/results/peers.csv  <!-- end of report -->
    <!-- minutes mbpo pendulum -->9.8<!-- . -->   also "last", "steps", "seeds"; "lines mbpo": of the file; "algorithm
    mbpo": from the banner "The algorithm" to "Plumbing", without the task; "diff mbpo mage": new or changed in mage.py

In the docstrings of algos/ the comment after a command is filled if it is "# not measured yet" or a measured number.
"""

import csv
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import tyro
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
INDEX = ("run", "file", "flags", "seed", "commit", "steps", "minutes")
# What is reported of a file, or of a task; the return elsewhere
SCORE = {"vin": "eval/success_rate", "dyna_q maze": "eval/episodic_length"}
WORDS = {"eval/success_rate": "success rate", "eval/episodic_length": "length"}  # in docstrings
KEPT = re.compile(r"eval/|charts/episodic_(return|length)")
MOST = 200  # points of a curve of training


@dataclass
class Args:
    runs: Optional[Path] = None
    """Read the finished runs in this folder of benchmarks/run.py first."""
    beside: bool = False
    """Keep the other seeds of a command that is read: they were run elsewhere, or earlier."""
    check: bool = False
    """Write nothing; end with an error if a page differs from the curves."""


class Run(NamedTuple):
    """A finished run: a row of runs.csv, with its curves."""

    run: str
    file: str
    flags: str
    seed: int
    commit: str
    steps: int
    minutes: float  # not a number if it was ever stopped
    curves: dict[str, np.ndarray]  # tag → [N, 3]: step, minutes since its first event, value

    @property
    def command(self) -> str:
        return f"{self.file} {self.flags}".strip()

    @property
    def task(self) -> str:
        """File and preset."""
        preset = self.flags.split()[0] if self.flags and not self.flags.startswith("-") else ""
        return f"{self.file} {preset}".strip()

    @property
    def tag(self) -> str:
        return SCORE.get(self.task, SCORE.get(self.file, "eval/episodic_return"))

    @property
    def last(self) -> float:
        return self.curves[self.tag][-1, 2]

    @property
    def drawn(self) -> str:
        """The tag of the curve: the episodes of training if there are too few evaluations."""
        training = self.tag.replace("eval/", "charts/")
        return self.tag if len(self.curves[self.tag]) > 2 or training not in self.curves else training


Tasks = dict[str, dict[str, list[Run]]]  # task → command → its seeds


# ── From runs to CSV ──────────────────────────────────────────────────────────────────────────────────────────────


def write_csv(path: Path, header: Iterable, rows: Iterable) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def read_csv(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_curves(folder: Path) -> dict[str, np.ndarray]:
    """Tag → [N, 3]: step, minutes since the first event, value."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    begin = events.FirstEventTimestamp()
    return {
        tag: np.array([(e.step, (e.wall_time - begin) / 60, e.value) for e in events.Scalars(tag)])
        for tag in events.Tags()["scalars"]
    }


def read_run(finished: Path) -> Run:
    """`finished` is the file that benchmarks/run.py writes at the end of a run."""
    known = json.loads(finished.read_text())
    folder = finished.with_suffix("")
    curves = {tag: curve for tag, curve in read_curves(folder).items() if KEPT.match(tag)}
    steps = int(max((curve[-1, 0] for curve in curves.values()), default=0))
    minutes = float("nan") if known["resumed"] else known["seconds"] / 60
    run = Run(folder.name, known["name"], known["flags"], known["seed"], known["commit"], steps, minutes, curves)
    if run.tag not in curves:
        sys.exit(f"report.py: {finished} was written by a run without an evaluation")
    return run


def thinned(tag: str, curve: np.ndarray) -> np.ndarray:
    """The means of equal parts of a long curve of training; evaluations stay as they are."""
    if len(curve) <= MOST or tag.startswith("eval/"):
        return curve
    return np.array([part.mean(0) for part in np.array_split(curve, MOST)])


def save_runs(new: list[Run], results: Path, beside: bool = False) -> None:
    """In place of the runs of the same commands, or only of the same seeds."""
    replaced = {(run.command, run.seed if beside else None) for run in new}
    kept = []
    for run in load_runs(results):
        if (run.command, run.seed if beside else None) in replaced:
            (results / "curves" / f"{run.run}.csv").unlink()
        else:
            kept.append(run)
    for run in new:
        points = [
            (tag, f"{step:.0f}", f"{minutes:.3f}", f"{value:.6g}")
            for tag, curve in sorted(run.curves.items())
            for step, minutes, value in thinned(tag, curve)
        ]
        write_csv(results / "curves" / f"{run.run}.csv", ("tag", "step", "minutes", "value"), points)
    rows = []
    for run in sorted([*kept, *new], key=lambda run: (run.file, run.flags, run.seed)):
        rows.append((*run[:6], "" if np.isnan(run.minutes) else f"{run.minutes:.2f}"))
    write_csv(results / "runs.csv", INDEX, rows)


def load_runs(results: Path) -> list[Run]:
    runs = []
    for row in read_csv(results / "runs.csv"):
        curves: dict[str, list] = {}
        for point in read_csv(results / "curves" / f"{row['run']}.csv"):
            numbers = [float(point[name]) for name in ("step", "minutes", "value")]
            curves.setdefault(point["tag"], []).append(numbers)
        row |= {"seed": int(row["seed"]), "steps": int(row["steps"]), "minutes": float(row["minutes"] or "nan")}
        runs.append(Run(**row, curves={tag: np.array(curve) for tag, curve in curves.items()}))
    return runs


# ── Statistics ────────────────────────────────────────────────────────────────────────────────────────────────────


def bootstrap(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile interval of the mean over the seeds, [seeds, ...] → low, high [...]."""
    chosen = np.random.default_rng(0).integers(len(samples), size=(2_000, len(samples)))
    low, high = np.percentile(samples[chosen].mean(1), [2.5, 97.5], axis=0)
    return low, high


def iqm(samples: np.ndarray) -> float:
    """The mean of the middle half."""
    quarter = len(samples) // 4
    return np.sort(samples)[quarter : len(samples) - quarter].mean()


def digits(values: np.ndarray) -> int:
    """Decimals that show three or four figures."""
    largest = np.abs(values).max()
    return 3 if largest <= 1 else int(np.clip(2 - np.floor(np.log10(largest)), 0, 3))


def numbers(values: Iterable[float], n: int) -> str:
    return ", ".join(f"{value:.{n}f}" for value in values).replace("-", "−")


def spread(values: np.ndarray) -> str:
    """The mean and its interval; one seed has none."""
    n = digits(values)
    interval = f" [{numbers(bootstrap(values), n)}]" if len(values) > 1 else ""
    return numbers([values.mean()], n) + interval


def on_a_grid(curves: list[np.ndarray], column: int) -> tuple[np.ndarray, np.ndarray]:
    """x [N] and values [seeds, N] over the steps (column 0) or minutes (1) that all seeds have: the points of the curve
    with the fewest, between which the others are interpolated."""
    low = max(curve[0, column] for curve in curves)
    high = min(curve[-1, column] for curve in curves)
    x = min(curves, key=len)[:, column]
    x = x[(low <= x) & (x <= high)]
    return x, np.array([np.interp(x, curve[:, column], curve[:, -1]) for curve in curves])


# ── Figures and tables ────────────────────────────────────────────────────────────────────────────────────────────


def tasks_of(runs: list[Run]) -> Tasks:
    tasks: Tasks = {}
    for run in sorted(runs, key=lambda run: (run.file, run.flags, run.seed)):
        tasks.setdefault(run.task, {}).setdefault(run.command, []).append(run)
    return tasks


def figure_of(task: str) -> str:
    return f"figures/report_{task.replace(' ', '_')}.png"


def uninterrupted(runs: Iterable[Run]) -> list[Run]:
    return [run for run in runs if not np.isnan(run.minutes)]


def draw(task: str, variants: dict[str, list[Run]], marks: list[dict], path: Path) -> None:
    every = [run for runs in variants.values() for run in runs]
    columns = (0, 1) if uninterrupted(every) else (0,)
    figure = Figure(figsize=(9.2, 3.4), dpi=90)
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for number, runs in enumerate(variants.values()):
        for axis, column in zip(axes, columns, strict=True):
            curves = [run.curves[run.drawn] for run in (uninterrupted(runs) if column else runs)]
            for curve in curves:
                axis.plot(curve[:, column], curve[:, 2], color=f"C{number}", linewidth=0.5, alpha=0.5)
            if curves:
                x, values = on_a_grid(curves, column)
                label = textwrap.shorten(script(runs[0]), 60)
                axis.plot(x, values.mean(0), color=f"C{number}", label=label, linewidth=1.6)
                axis.fill_between(x, *bootstrap(values), color=f"C{number}", alpha=0.18, linewidth=0)
    for mark in marks:
        if f"{mark['file']} {mark['preset']}".strip() != task:
            continue
        value, text = float(mark["value"]), {"textcoords": "offset points", "fontsize": 6}
        if mark["step"]:
            axes[0].plot(float(mark["step"]), value, "k*", markersize=8)
            axes[0].annotate(mark["label"], (float(mark["step"]), value), (-4, -9), ha="right", **text)
        else:
            axes[0].axhline(value, color="black", linewidth=0.7, linestyle=":")
            axes[0].annotate(mark["label"], (0.02, value), (0, 3), ("axes fraction", "data"), **text)
    axes[0].xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k")
    axes[0].set(xlabel="steps", ylabel=", ".join(sorted({run.drawn for run in every})))
    axes[-1].set(xlabel=("steps", "minutes")[columns[-1]])
    if any(run.drawn.endswith("_length") for run in every):
        axes[0].set_yscale("log")  # an episode that does not arrive is long
    axes[0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path)


def script(run: Run) -> str:
    return f"{run.file}.py {run.flags}".strip()


def table(task: str, variants: dict[str, list[Run]], figure: str) -> str:
    lines = [
        "| command | seeds | steps | last evaluation, mean and 95 % interval | IQM | each seed | minutes |",
        "|-|-|-|-|-|-|-|",
    ]
    for runs in variants.values():
        last = np.array([run.last for run in runs])
        n = digits(last)
        middle = numbers([iqm(last)], n) if len(last) >= 5 else ""
        cells = [f"`{script(runs[0])}`", seeds(runs), steps(runs), spread(last), middle, numbers(last, n), clock(runs)]
        lines.append(f"| {' | '.join(cells)} |")
    every = [run for runs in variants.values() for run in runs]
    over = "steps and minutes" if uninterrupted(every) else "steps"
    commits = ", ".join(dict.fromkeys(commit for run in every for commit in run.commit.split()))
    few = any(1 < len(runs) < 4 for runs in variants.values())
    warning = " Of two or three seeds it is little more than their range." if few else ""
    lines += ["", f"![{task}: evaluations over {over}]({figure})", ""]
    lines.append(f"*`{every[0].tag}`. Thin: seeds. Thick: their mean, with its interval.{warning} Commit {commits}.*")
    return "\n".join(lines)


def steps(runs: list[Run]) -> str:
    low, high = min(run.steps for run in runs), max(run.steps for run in runs)
    return f"{low:,}" if high < 1.02 * low else f"{low:,} to {high:,}"


def seeds(runs: list[Run]) -> str:
    found = [run.seed for run in runs]
    if len(found) > 1 and found == list(range(found[0], found[0] + len(found))):
        return f"{found[0]}–{found[-1]}"
    return ", ".join(map(str, found))


def clock(runs: list[Run]) -> str:
    """Mean minutes of those that were never stopped."""
    whole = [run.minutes for run in uninterrupted(runs)]
    return f"{np.mean(whole):.1f}" if whole else ""


def speed_table(file: str, results: Path) -> Optional[str]:
    """A file's rows of benchmarks/speed.py, with a column for each machine (speed_<machine>.csv)."""
    rates: dict[tuple[str, str], dict[str, str]] = {}  # (hot path, unit) → machine → rate
    notes = {}
    for path in sorted(results.glob("speed_*.csv"), key=lambda path: path.stem):
        machine = path.stem.removeprefix("speed_").replace("_", " ")
        rows = [row for row in read_csv(path) if row["file"] in (file, "matrix product")]
        if not any(row["file"] == file for row in rows):
            continue
        for row in rows:
            rate = float(f"{float(row['rate']):.3g}")
            name = row["hot_path"] if row["file"] == file else f"matrix product, {row['hot_path']}"
            rates.setdefault((name, row["unit"]), {})[machine] = f"{rate:,.0f}" if rate >= 100 else f"{rate:g}"
        notes[machine] = f"{machine}: threads {rows[-1]['threads']}; torch {rows[-1]['torch']}."
    if not notes:
        return None
    lines = [f"| hot path | unit | {' | '.join(notes)} |", "|-" * (2 + len(notes)) + "|"]
    for (name, unit), found in rates.items():
        lines.append(f"| {' | '.join([name, unit, *(found.get(machine, '') for machine in notes)])} |")
    return "\n".join([*lines, "", f"*{' '.join(notes.values())}*"])


def peers_table(rows: list[dict[str, str]]) -> Optional[str]:
    """What benchmarks/speed.py --peers wrote."""
    lines = ["| file | library | work | ours | its | unit | ratio |", "|-|-|-|-|-|-|-|"]
    for row in rows:
        ours, theirs = float(row["ours"]), float(row["theirs"])
        cells = row["file"], row["library"], row["work"], f"{ours:,.0f}", f"{theirs:,.0f}", row["unit"]
        lines.append(f"| {' | '.join(cells)} | {ours / theirs:.2f} |")
    return "\n".join(lines) if rows else None


# ── Pages ─────────────────────────────────────────────────────────────────────────────────────────────────────────

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


def by_command(tasks: Tasks) -> dict[str, list[Run]]:
    return {command: runs for variants in tasks.values() for command, runs in variants.items()}


def lines_of(what: str, paths: list[Path]) -> Optional[str]:
    """Of a file, of its algorithm without the task and the plumbing, or those that `diff` shows in the second file."""
    if not all(path.is_file() for path in paths):
        return None
    text = paths[-1].read_text()
    lines = f"{len(text.splitlines()):,}"
    if what == "algorithm":
        sections = re.split(r"^# ── ", text, flags=re.M)[1:]
        return str(sum(len(x.splitlines()) for x in sections if not x.startswith(("The task", "Plumbing"))))
    if what == "diff":
        shown = subprocess.run(["diff", *paths], capture_output=True, text=True).stdout
        return f"{len(re.findall('^>', shown, re.M)):,} of {lines}"
    return lines


def cell(what: str, of: str, tasks: Tasks) -> Optional[str]:
    """The text of a small marker; None if nothing is known yet: what stands there stays."""
    if what in ("lines", "algorithm", "diff"):
        return lines_of(what, [ROOT / "algos" / f"{name}.py" for name in of.split()])
    runs = by_command(tasks).get(of)
    if not runs:
        return None
    if what == "last":
        return spread(np.array([run.last for run in runs]))
    return {"minutes": clock(runs) or None, "steps": steps(runs), "seeds": str(len(runs))}[what]


def filled_page(text: str, page: Path, tasks: Tasks) -> str:
    if len(re.findall("^<!-- report: ", text, re.M)) != len(TABLE.findall(text)):
        sys.exit(f"report.py: {page.name} has a report without its end, or an end without its report")

    def fill_table(found: re.Match) -> str:
        task, made = found["task"], None
        if task.startswith("speed "):
            made = speed_table(task.removeprefix("speed "), ROOT / "benchmarks" / "results")
        elif task == "peers":
            made = peers_table(read_csv(ROOT / "benchmarks" / "results" / "peers.csv"))
        elif task in tasks:
            made = table(task, tasks[task], ("" if page.parent.name == "docs" else "docs/") + figure_of(task))
        return f"{found[1]}\n{made}\n\n{found[3]}" if made else found[0]

    def fill_cell(found: re.Match) -> str:
        new = cell(found["what"], found["of"], tasks)
        return found[0] if new is None else f"{found[1]}{new}{found[5]}"

    return CELL.sub(fill_cell, TABLE.sub(fill_table, text))


def filled_docstring(text: str, tasks: Tasks) -> str:
    """The usage lines of a script. A command without a preset is that of the first one."""
    first = re.search(r'^PRESETS = \{\s+"([\w-]+)"', text, re.M)

    def fill(found: re.Match) -> str:
        runs = by_command(tasks).get(f"{found['file']} {found['flags'].strip() or (first and first[1])}")
        if not runs:
            return found[0]
        minutes = f"{clock(runs)} minutes, " if clock(runs) else ""
        word = WORDS.get(runs[0].tag, "return")
        return f"{found[1]}{minutes}{word} {spread(np.array([run.last for run in runs]))}"

    return USAGE.sub(fill, text)


def main(args: Args) -> None:
    results = ROOT / "benchmarks" / "results"
    if args.check and args.runs:
        sys.exit("report.py: --check writes nothing: leave out --runs")
    if args.runs:
        finished = sorted(path for path in args.runs.glob("*.json") if path.with_suffix("").is_dir())
        if not finished:
            sys.exit(f"report.py: {args.runs} holds no finished run of benchmarks/run.py")
        save_runs([read_run(path) for path in finished], results, args.beside)
        print(f"{len(finished)} runs read")
    tasks, marks = tasks_of(load_runs(results)), read_csv(ROOT / "benchmarks" / "marks.csv")
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "algos").glob("*.py"))]
    shown = {found["task"] for page in pages for found in TABLE.finditer(page.read_text())}
    if not args.check:
        for task in sorted(shown & set(tasks)):
            draw(task, tasks[task], marks, ROOT / "docs" / figure_of(task))
    differ = []
    for page in pages:
        old = page.read_text()
        new = filled_docstring(old, tasks) if page.suffix == ".py" else filled_page(old, page, tasks)
        if new != old:
            differ.append(str(page.relative_to(ROOT)))
            if not args.check:
                page.write_text(new)
    if args.check and differ:
        sys.exit(f"not what the curves say: {', '.join(differ)}; run python benchmarks/report.py")
    print(f"{len(tasks)} tasks; {'written: ' + ', '.join(differ) if differ else 'the pages are as their curves say'}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=(__doc__ or "").split("\n\n")[0]))
