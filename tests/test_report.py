"""benchmarks/report.py: what it writes is what the runs measured."""

import csv
import importlib.util
import shutil

import helpers
import numpy as np
import pytest

report = helpers.load(helpers.ROOT / "benchmarks" / "report.py")
runner = helpers.load(helpers.ROOT / "benchmarks" / "run.py")
with_scipy = pytest.mark.skipif(
    importlib.util.find_spec("scipy") is None, reason="pip install -r benchmarks/requirements.txt"
)
PAGE = """A page.

<!-- report: dyna_q maze -->
old
<!-- end of report -->

<!-- report: dyna_q cliff -->
nobody ran it
<!-- end of report -->

| <!-- last dyna_q maze --> old <!-- . --> | <!-- minutes dyna_q maze --><!-- . --> |
<!-- seeds dyna_q maze -->x<!-- . -->, <!-- lines dyna_q -->1<!-- . -->, <!-- last mage pendulum -->as typed<!-- . -->
"""


def a_run(seed=1, file="dyna_q", flags="maze", values=(1.0, 2.0), steps=(10, 20), minutes=3.0):
    curve = np.array([(s, s / 10, v) for s, v in zip(steps, values, strict=True)])
    name = f"{file}_{flags}__{seed}"
    curves = dict.fromkeys(("eval/episodic_return", "eval/episodic_length"), curve)
    return report.Run(name, file, flags, seed, "abc", int(steps[-1]), minutes, curves)


def at(folder, monkeypatch):
    monkeypatch.setattr(report, "ROOT", folder)
    for name in ("docs/figures", "benchmarks/results"):
        (folder / name).mkdir(parents=True)
    shutil.copytree(helpers.ROOT / "algos", folder / "algos")  # docstrings are written too


@with_scipy
def test_pages_say_what_the_runs_measured(tmp_path, monkeypatch, capsys):
    at(tmp_path, monkeypatch)
    flags = "maze --total-timesteps 600 --eval-every 200"
    (tmp_path / "README.md").write_text(PAGE)
    (tmp_path / "docs" / "dyna_q.md").write_text(PAGE)
    for seed in (3, 4):
        runner.train(runner.place("dyna_q", "maze", seed, tmp_path / "none")._replace(
            flags=flags, folder=tmp_path / "runs" / f"dyna_q_maze__{seed}"))  # fmt: skip
    report.main(report.Args(runs=tmp_path / "runs"))
    last = []
    for seed in (3, 4):
        events = report.EventAccumulator(str(tmp_path / "runs" / f"dyna_q_maze__{seed}")).Reload()
        points = [(e.step, e.value) for e in events.Scalars("eval/episodic_length")]
        with open(tmp_path / f"benchmarks/results/curves/dyna_q_maze__{seed}.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["tag"] == "eval/episodic_length"]
        assert [(int(row["step"]), float(row["value"])) for row in rows] == [
            (step, pytest.approx(value, rel=1e-5)) for step, value in points
        ]
        last.append(points[-1][1])
    text = (tmp_path / "docs" / "dyna_q.md").read_text()
    n = report.digits(np.array(last))
    each = ", ".join(f"{value:.{n}f}" for value in last).replace("-", "−")
    assert f"| `dyna_q.py {flags}` | 3–4 | 600 |" in text and f"| {each} |" in text
    assert "(figures/report_dyna_q_maze.png)" in text
    assert "(docs/figures/report_dyna_q_maze.png)" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "docs/figures/report_dyna_q_maze.png").stat().st_size > 5_000
    assert "nobody ran it" in text and "-->as typed<!--" in text  # of what was not run nothing is said anew

    report.main(report.Args(check=True))  # and now nothing differs
    report.main(report.Args())
    assert (tmp_path / "docs" / "dyna_q.md").read_text() == text
    (tmp_path / "docs" / "dyna_q.md").write_text(text.replace(f"| {each} |", "| 99 |"))
    with pytest.raises(SystemExit):
        report.main(report.Args(check=True))
    assert "docs/dyna_q.md" in capsys.readouterr().err
    (tmp_path / "docs" / "dyna_q.md").write_text(text.replace("<!-- end of report -->", "", 1))
    with pytest.raises(SystemExit):  # nothing is taken for the table that is not
        report.main(report.Args())
    assert "report without its end" in capsys.readouterr().err


def test_seeds_that_were_not_read_stay_where_that_is_asked_for(tmp_path):
    report.save_runs([a_run(1), a_run(2), a_run(1, flags="cliff")], tmp_path)

    def known():
        return {(run.flags, run.seed): run.score[-1, 2] for run in report.load_runs(tmp_path)}

    report.save_runs([a_run(2, values=(1.0, 5.0)), a_run(3)], tmp_path, beside=True)
    assert known() == {("maze", 1): 2, ("maze", 2): 5, ("maze", 3): 2, ("cliff", 1): 2}
    report.save_runs([a_run(4)], tmp_path)  # else a command is what was read of it
    assert known() == {("maze", 4): 2, ("cliff", 1): 2}
    assert sorted(path.stem for path in (tmp_path / "curves").iterdir()) == ["dyna_q_cliff__1", "dyna_q_maze__4"]


@with_scipy
def test_small_markers_hold_single_numbers(tmp_path, monkeypatch):
    at(tmp_path, monkeypatch)
    groups = report.groups_of([a_run(1, values=(0, -120.04)), a_run(2, values=(0, -130.08), minutes=float("nan"))])
    text = report.filled(PAGE, tmp_path / "README.md", groups)
    assert "<!-- last dyna_q maze -->−125 [−130, −120]<!-- . -->" in text
    assert "<!-- minutes dyna_q maze -->3.0<!-- . -->" in text  # that of the run that was never stopped
    assert "<!-- seeds dyna_q maze -->2<!-- . -->" in text
    with_flags = "<!-- last mbpo pendulum --rollout-length 0 --><!-- . -->, <!-- last mbpo pendulum -->old<!-- . -->"
    control = {"mbpo pendulum": {"pendulum --rollout-length 0": [a_run(1, "mbpo", values=(0, 7))]}}
    assert report.filled(with_flags, tmp_path / "README.md", control) == with_flags.replace("0 -->", "0 -->7.00")
    # Flags with points; a marker whose end was forgotten takes nothing of what follows; no minutes are known
    control["mbpo pendulum"]["pendulum --gamma 0.5"] = [a_run(1, "mbpo", values=(0, 8), minutes=float("nan"))]
    some = "<!-- last mbpo pendulum --gamma 0.5 -->x<!-- . -->, <!-- minutes mbpo pendulum --gamma 0.5 -->9<!-- . -->"
    assert report.filled(some, tmp_path / "README.md", control) == some.replace("x", "8.00")
    some = "| <!-- seeds mbpo pendulum --gamma 0.5 -->x | kept | <!-- seeds mbpo pendulum --gamma 0.5 -->y<!-- . --> |"
    assert report.filled(some, tmp_path / "README.md", control) == some.replace("y", "1")
    lines = len((helpers.ROOT / "algos/dyna_q.py").read_text().splitlines())
    assert f"<!-- lines dyna_q -->{lines:,}<!-- . -->" in text
    for name, task in (("one", "c\n"), ("two", "d\ne\n")):
        text = f"a\n# ── The algorithm\nb\n# ── The task\n{task}# ── Training\nf\n# ── Plumbing\ng\n"
        (tmp_path / "algos" / f"{name}.py").write_text(text)
    some = "<!-- algorithm one -->x<!-- . -->, <!-- algorithm three -->kept<!-- . -->, <!-- diff one two -->y<!-- . -->"
    assert report.filled(some, tmp_path / "README.md", {}) == some.replace("x", "4").replace("y", "2 of 10")


def test_a_file_s_speeds_stand_beside_each_other_machine_by_machine(tmp_path, monkeypatch):
    at(tmp_path, monkeypatch)
    head = "file,hot_path,unit,rate,threads,torch\n"
    (tmp_path / "benchmarks/results/speed_cpu.csv").write_text(
        f"{head}matrix product,1024,GFLOP/s,200,2,2.13\n"
        "mage,updates,updates/s,1234.5,2,2.13\nmbpo,a,updates/s,122.4,2,2.13\nmbpo,a,GFLOP/s,50,2,2.13\n"
        "mbpo,b,updates/s,0.5,2,2.13\nmbpo,\"a, compiled\",updates/s,61.26,2,2.13\n"
    )
    (tmp_path / "benchmarks/results/speed_h100.csv").write_text(
        f"{head}matrix product,1024,GFLOP/s,50000,16,2.11\nmbpo,a,updates/s,900,16,2.11\nmbpo,a,GFLOP/s,500,16,2.11\n"
    )
    pages = {name: f"<!-- report: speed {name} -->\nold\n<!-- end of report -->" for name in ("mbpo", "mage", "vin")}
    made = {name: report.filled(page, tmp_path / "docs/page.md", {}) for name, page in pages.items()}
    assert made["mbpo"].splitlines()[2:-2] == [
        "| hot path | unit | cpu | with `--compile` | h100 |", "|-|-|-|-|-|",
        "| matrix product, 1024 | GFLOP/s | 200 |  | 50,000 |",
        "| a | updates/s | 122 | 61.3 | 900 |", "| a | GFLOP/s | 50 (25%) |  | 500 (1%) |",
        "| b | updates/s | 0.5 |  |  |", "",
        "*cpu: threads 2; torch 2.13. h100: threads 16; torch 2.11. "
        "In brackets the share of the matrix product's rate.*",
    ]  # fmt: skip
    assert made["mage"].splitlines()[2:-2] == [
        "| hot path | unit | cpu |", "|-|-|-|", "| matrix product, 1024 | GFLOP/s | 200 |",
        "| updates | updates/s | 1,230 |", "", "*cpu: threads 2; torch 2.13.*",
    ]  # fmt: skip
    assert made["vin"] == pages["vin"]  # not measured


@with_scipy
def test_intervals_are_those_of_a_mean():
    """Of many seeds: 1.96 standard errors. Of one: none."""
    samples = np.random.default_rng(0).normal(size=(400, 2)) * [1, 5]
    low, high = report.bootstrap(samples)
    assert np.allclose(high - low, 2 * 1.96 * samples.std(0) / 20, rtol=0.1)
    assert ((low < samples.mean(0)) & (samples.mean(0) < high)).all()
    low, high = report.bootstrap(samples[:1])
    assert np.array_equal(low, high) and report.spread(np.array([-3.0])) == "−3.00"


@with_scipy
def test_the_middle_half():
    assert report.iqm(np.array([-1e6, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 1e6])) == 3.5
    five = [a_run(seed, values=(0, last)) for seed, last in enumerate([9e3, 1, 2, 3, 4])]
    four = [a_run(seed, values=(0, last)) for seed, last in enumerate([9, 1, 2, 3])]
    assert "| 3 |" in report.table("t", {"": five}, "f")  # the middle three
    text = report.table("t", {"": four}, "f")
    assert "| 3.75 [" in text and "] |  | 9.00, 1.00, 2.00, 3.00 |" in text  # of four there is none


def test_seeds_that_were_evaluated_elsewhere_are_read_between_their_points():
    first, second = a_run(1), a_run(2, steps=(8, 15, 24), values=(0.0, 10.0, 1.0))
    for column, scale in ((0, 1), (1, 0.1)):
        x, values = report.on_a_grid([first.score, second.score], column)
        assert np.allclose(x, np.array([10, 20]) * scale)
        assert np.allclose(values, [[1, 2], [20 / 7, 5]])
        assert np.allclose(report.on_a_grid([first.score, second.score[1:]], column)[0], [20 * scale])  # not before 15


def test_long_curves_become_means_of_their_parts():
    curve = np.stack([np.arange(1_000.0), np.arange(1_000.0) / 7, np.random.default_rng(0).normal(size=1_000)], 1)
    thin = report.thinned("charts/episodic_return", curve)
    assert thin.shape == (200, 3) and np.allclose(thin.mean(0), curve.mean(0))
    assert np.allclose(thin[0], curve[:5].mean(0)) and report.thinned("charts/episodic_return", thin) is thin
    assert report.thinned("eval/episodic_return", curve) is curve  # the last evaluation is one


def test_runs_come_back_from_their_files(tmp_path):
    first = [a_run(1), a_run(2, values=(3.5, -7.25), minutes=float("nan"))]
    report.save_runs(first, tmp_path)
    report.save_runs([a_run(1, values=(8.0, 9.0), flags="cliff"), a_run(1, flags="cliff --gamma 0.5")], tmp_path)
    runs = {(run.flags, run.seed): run for run in report.load_runs(tmp_path)}
    assert set(runs) == {("maze", 1), ("maze", 2), ("cliff", 1), ("cliff --gamma 0.5", 1)}
    assert runs["cliff", 1].score[:, 2].tolist() == [8, 9] and runs["maze", 2].score[:, 2].tolist() == [3.5, -7.25]
    assert runs["maze", 1].minutes == 3 and np.isnan(runs["maze", 2].minutes)
    assert runs["cliff --gamma 0.5", 1].task == "dyna_q cliff"
    report.save_runs([a_run(5)], tmp_path)  # the command was run anew: its old seeds go
    assert {(run.flags, run.seed) for run in report.load_runs(tmp_path)} == set(runs) - {("maze", 1), ("maze", 2)} | {
        ("maze", 5)
    }
    assert len(list((tmp_path / "curves").iterdir())) == 3


@with_scipy
def test_only_runs_that_were_never_stopped_have_a_clock(tmp_path, monkeypatch):
    """And a run without evaluations but the last shows its training."""
    axes = []
    monkeypatch.setattr(report.Figure, "savefig", lambda figure, path: axes.extend(figure.axes))
    pause = a_run(2, minutes=float("nan"))
    pause.score[:, 1] = (0, 600)
    report.draw("dyna_q maze", {"maze": [a_run(1), pause]}, [], tmp_path / "x.png")
    assert len(axes[0].lines) == 3 and len(axes[1].lines) == 2 and axes[1].get_xlim()[1] < 10
    trained = a_run(1)
    trained.curves["charts/episodic_length"] = trained.score
    trained.curves["eval/episodic_length"] = trained.score[-1:]
    report.draw("dyna_q maze", {"maze": [trained]}, [], tmp_path / "x.png")
    assert axes[2].get_ylabel() == "charts/episodic_length" and len(axes[2].lines[0].get_xdata()) == 2
    report.draw("dyna_q maze", {"maze": [pause]}, [], tmp_path / "x.png")  # nothing to show over minutes
    assert len(axes) == 5 and axes[4].get_xlabel() == "steps" and len(axes[4].lines) == 2
    assert "evaluations over steps](x.png)" in report.table("dyna_q maze", {"maze": [pause]}, "x.png")


@with_scipy
def test_the_pages_are_as_the_committed_curves_say():
    report.main(report.Args(check=True))


def test_every_line_of_the_table_can_be_run(tmp_path):
    runs = [run for line in (helpers.ROOT / "benchmarks/bars.txt").read_text().splitlines()
            for run in runner.parse(line, tmp_path)]  # fmt: skip
    assert {run.name for run in runs} == {*helpers.TRAINED}
    for name, flags in {(run.name, run.flags) for run in runs}:
        script = helpers.load(helpers.ROOT / "algos" / f"{name}.py")
        args = script.parse_args(flags.split())
        assert args.total_timesteps > 0


@with_scipy
def test_docstrings_say_what_the_runs_measured():
    groups = {"mbpo pole": {"pole": [a_run(1, "mbpo", values=(0, 7)), a_run(2, "mbpo", values=(0, 9))]}}
    text = """
    python algos/mbpo.py              # not measured yet
    python algos/mbpo.py pole         # 9.9 minutes, return −3 [−4, −2]
    python algos/mbpo.py pole --tau 1 # not measured yet
    python algos/mbpo.py --resume X   # continues
PRESETS = {
    "pole": 1
"""
    filled = report.filled_docstring(text, groups).splitlines()
    assert filled[1].endswith("# 3.0 minutes, return 8.00 [7.00, 9.00]") and filled[2].endswith(filled[1][-40:])
    assert filled[3:] == text.splitlines()[3:]
