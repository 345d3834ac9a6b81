"""benchmarks/report.py: what it writes is what the runs measured."""

import json
import shutil

import helpers
import numpy as np
import pytest

report = helpers.load(helpers.ROOT / "benchmarks" / "report.py")
PAGE = """A page.

<!-- report: dyna_q maze -->
old
<!-- end of report -->

<!-- report: dyna_q cliff -->
nobody ran it
<!-- end of report -->

| <!-- last dyna_q maze --> old <!-- . --> | <!-- minutes dyna_q maze --><!-- . --> |
<!-- seeds dyna_q maze -->x<!-- . -->, <!-- lines dyna_q -->1<!-- . -->, <!-- last mage pendulum -->as typed<!-- . -->
<!-- last dyna_q maze --gamma 0.5 -->x<!-- . -->
"""


def a_run(seed=1, file="dyna_q", flags="maze", values=(1.0, 2.0), steps=(10, 20), minutes=3.0):
    curve = np.array([(s, s / 10, v) for s, v in zip(steps, values, strict=True)])
    name = f"{file}_{flags}__{seed}"
    curves = dict.fromkeys(("eval/episodic_return", "eval/episodic_length"), curve)
    return report.Run(name, file, flags, seed, "abc", int(steps[-1]), minutes, curves)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    for name in ("docs/figures", "benchmarks/results"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copytree(helpers.ROOT / "algos", tmp_path / "algos")  # docstrings are written too
    return tmp_path


def test_pages_say_what_the_runs_measured(root):
    flags = "maze --total-timesteps 600 --eval-every 200 --picture-every 10000"
    for page in ("README.md", "docs/dyna_q.md"):
        (root / page).write_text(PAGE)
    folder = root / "runs" / "dyna_q_maze__3"
    helpers.module("dyna_q").main([*flags.split(), "--seed", "3", "--run-dir", str(folder)])
    known = {"name": "dyna_q", "flags": flags, "seed": 3, "commit": "abc def", "seconds": 90, "resumed": False}
    folder.with_name(folder.name + ".json").write_text(json.dumps(known))
    report.main(report.Args(runs=root / "runs"))

    measured = helpers.scalars(folder)["eval/episodic_length"]
    rows = report.read_csv(root / "benchmarks/results/curves/dyna_q_maze__3.csv")
    written = {int(row["step"]): float(row["value"]) for row in rows if row["tag"] == "eval/episodic_length"}
    assert written == pytest.approx(measured, rel=1e-5)
    text = (root / "docs/dyna_q.md").read_text()
    last = report.spread(np.array([measured[600]]))
    assert f"| `dyna_q.py {flags}` | 3 | 600 | {last} |  | {last} | 1.5 |" in text and "Commit abc, def." in text
    assert "(figures/report_dyna_q_maze.png)" in text and (root / "docs/figures/report_dyna_q_maze.png").exists()
    assert "(docs/figures/report_dyna_q_maze.png)" in (root / "README.md").read_text()
    assert "nobody ran it" in text and "-->as typed<!--" in text

    report.main(report.Args(check=True))  # nothing differs
    (root / "docs/dyna_q.md").write_text(text.replace("| 600 |", "| 99 |"))
    with pytest.raises(SystemExit, match=r"docs/dyna_q\.md"):
        report.main(report.Args(check=True))
    (root / "docs/dyna_q.md").write_text(text.replace("<!-- end of report -->", "", 1))
    with pytest.raises(SystemExit, match="report without its end"):
        report.main(report.Args())


def test_the_pages_are_as_the_committed_curves_say():
    report.main(report.Args(check=True))


def test_small_markers_hold_single_numbers(root):
    runs = [a_run(1, values=(0, -120.04)), a_run(2, values=(0, -130.08), minutes=float("nan"))]
    tasks = report.tasks_of([*runs, a_run(flags="maze --gamma 0.5", values=(0, 8), minutes=float("nan"))])
    text = report.filled_page(PAGE, root / "README.md", tasks)
    assert "<!-- last dyna_q maze -->−125 [−130, −120]<!-- . -->" in text
    assert "<!-- minutes dyna_q maze -->3.0<!-- . -->" in text  # that of the run that was never stopped
    assert "<!-- seeds dyna_q maze -->2<!-- . -->" in text
    assert "<!-- last dyna_q maze --gamma 0.5 -->8.00<!-- . -->" in text
    assert f"<!-- lines dyna_q -->{len((root / 'algos/dyna_q.py').read_text().splitlines()):,}<!-- . -->" in text
    unfinished = "| <!-- seeds dyna_q maze -->x | kept | <!-- seeds dyna_q maze -->?<!-- . --> |"
    assert report.filled_page(unfinished, root / "README.md", tasks) == unfinished.replace("?", "2")


def test_docstrings_say_what_the_runs_measured():
    tasks = report.tasks_of([a_run(1, "mbpo", "pole", (0, 7)), a_run(2, "mbpo", "pole", (0, 9))])
    text = """
    python algos/mbpo.py              # not measured yet
    python algos/mbpo.py pole         # 9.9 minutes, return −3 [−4, −2]
    python algos/mbpo.py pole --tau 1 # not measured yet
    python algos/mbpo.py --resume X   # continues
PRESETS = {
    "pole": 1
"""
    filled = report.filled_docstring(text, tasks).splitlines()
    assert filled[1].endswith("# 3.0 minutes, return 8.00 [7.00, 9.00]") and filled[2].endswith(filled[1][-40:])
    assert filled[3:] == text.splitlines()[3:]


def test_speeds_of_machines_are_columns(root):
    head = "file,hot_path,unit,rate,threads,torch\nmatrix product,1024,GFLOP/s,200,2,2.13\n"
    mbpo = 'mbpo,a,updates/s,1234.5,2,2.13\nmbpo,"a, compiled",updates/s,61.26,2,2.13\n'
    (root / "benchmarks/results/speed_cpu.csv").write_text(head + mbpo)
    (root / "benchmarks/results/speed_h100.csv").write_text(f"{head}mbpo,a,updates/s,0.5,16,2.11\n")
    (root / "benchmarks/results/speed_old.csv").write_text(head)
    page = "<!-- report: speed {} -->\nold\n<!-- end of report -->"
    assert report.filled_page(page.format("mbpo"), root / "docs/page.md", {}).splitlines()[2:-2] == [
        "| hot path | unit | cpu | h100 |", "|-|-|-|-|", "| matrix product, 1024 | GFLOP/s | 200 | 200 |",
        "| a | updates/s | 1,230 | 0.5 |", "| a, compiled | updates/s | 61.3 |  |", "",
        "*cpu: threads 2; torch 2.13. h100: threads 16; torch 2.11.*",
    ]  # fmt: skip
    assert "old" in report.filled_page(page.format("vin"), root / "docs/page.md", {})  # not measured
    peers = "file,library,work,unit,ours,theirs\nmbpo,SB3,SAC,updates/s,150,100\n"
    (root / "benchmarks/results/peers.csv").write_text(peers)
    text = report.filled_page("<!-- report: peers -->\n<!-- end of report -->", root / "docs/page.md", {})
    assert "| mbpo | SB3 | SAC | 150 | 100 | updates/s | 1.50 |" in text


def test_runs_replace_those_of_their_command_or_of_their_seed(tmp_path):
    def known():
        return {(run.flags, run.seed): run.last for run in report.load_runs(tmp_path)}

    report.save_runs([a_run(1), a_run(2, minutes=float("nan")), a_run(1, flags="cliff")], tmp_path)
    first = {run.seed: run for run in report.load_runs(tmp_path) if run.flags == "maze"}
    assert first[1].minutes == 3 and np.isnan(first[2].minutes) and first[1].steps == 20
    assert np.allclose(first[1].curves["eval/episodic_return"], [(10, 1, 1), (20, 2, 2)])
    report.save_runs([a_run(2, values=(1.0, 5.0)), a_run(3)], tmp_path, beside=True)
    assert known() == {("maze", 1): 2, ("maze", 2): 5, ("maze", 3): 2, ("cliff", 1): 2}
    report.save_runs([a_run(4)], tmp_path)
    assert known() == {("maze", 4): 2, ("cliff", 1): 2}
    assert sorted(path.stem for path in (tmp_path / "curves").iterdir()) == ["dyna_q_cliff__1", "dyna_q_maze__4"]


def test_intervals_and_the_middle_half():
    samples = np.random.default_rng(0).normal(size=(400, 2)) * [1, 5]
    low, high = report.bootstrap(samples)
    assert np.allclose(high - low, 2 * 1.96 * samples.std(0) / 20, rtol=0.1)
    assert ((low < samples.mean(0)) & (samples.mean(0) < high)).all()
    assert report.spread(np.array([-3.0])) == "−3.00"
    assert report.iqm(np.array([-1e6, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 1e6])) == 3.5


def test_curves_on_a_grid_and_thinned():
    first, second = a_run(1).curves[a_run().tag], a_run(2, steps=(8, 15, 24), values=(0, 10, 1)).curves[a_run().tag]
    x, values = report.on_a_grid([first, second], 0)
    assert np.allclose(x, [10, 20]) and np.allclose(values, [[1, 2], [20 / 7, 5]])
    assert np.allclose(report.on_a_grid([first, second[1:]], 1)[0], [2])  # not before its first point
    curve = np.stack([np.arange(1_000.0), np.arange(1_000.0) / 7, np.random.default_rng(0).normal(size=1_000)], 1)
    thin = report.thinned("charts/episodic_return", curve)
    assert thin.shape == (200, 3) and np.allclose(thin.mean(0), curve.mean(0))
    assert report.thinned("eval/episodic_return", curve) is curve  # the last evaluation is one
