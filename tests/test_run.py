"""benchmarks/run.py: lines are read as they stand, and on Ray nothing is lost."""

import json
import os
import signal
import subprocess
import sys
import time

import helpers
import pytest

runner = helpers.load(helpers.ROOT / "benchmarks" / "run.py")


def test_a_line_is_a_run_for_each_seed(tmp_path):
    runs = runner.parse("1-3,7 mbpo pendulum --rollout-length 0  # SAC", tmp_path)
    assert [run.seed for run in runs] == [1, 2, 3, 7]
    assert {(run.name, run.flags) for run in runs} == {("mbpo", "pendulum --rollout-length 0")}
    assert len({run.folder for run in runs}) == 4 and all(run.folder.parent == tmp_path for run in runs)
    assert runner.parse("5 dyna_q", tmp_path)[0].flags == ""
    assert runner.parse("  # nothing", tmp_path) == runner.parse("", tmp_path) == []
    assert runner.parse("1  mbpo pendulum   --rollout-length  0", tmp_path) == runs[:1]
    others = ["--beta 0.1", "--beta 0.2", "--data /a/b-c.npz", "--data /a/b.npz"]
    assert len({runner.place("vin", flags, 1, tmp_path).folder for flags in others}) == 4


@pytest.mark.parametrize(("words", "told"), [
    (["dyna_q maze"], "seeds"),
    (["1-x dyna_q maze"], "seeds"),
    (["5-1 dyna_q maze"], "backwards"),
    (["1 no_such_file maze"], "algos/"),
    (["1"], "algos/"),
    (["# a comment"], "nothing to run"),
    (["1-2 dyna_q maze", "2 dyna_q maze"], "twice"),
])  # fmt: skip
def test_what_cannot_be_run_is_refused(words, told, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", object())
    with pytest.raises(SystemExit, match=told):
        runner.main(runner.Args(tuple(words), runs=tmp_path))


def test_without_ray_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit, match=r"pip install -r benchmarks/requirements\.txt"):
        runner.main(runner.Args(("1 dyna_q maze",)))
    assert (helpers.ROOT / "benchmarks" / "requirements.txt").read_text().count("ray") == 1


def test_every_line_of_the_table_can_be_run(tmp_path):
    lines = (helpers.ROOT / "benchmarks" / "bars.txt").read_text().splitlines()
    runs = {(run.name, run.flags) for line in lines for run in runner.parse(line, tmp_path)}
    assert {name for name, _ in runs} >= set(helpers.TRAINED)
    for name, flags in runs:
        assert helpers.module(name).parse_args(flags.split()).total_timesteps > 0


def test_a_run_is_finished_once_and_its_progress_is_seen(tmp_path):
    (run,) = runner.parse("3 dyna_q maze --total-timesteps 400 --eval-every 200", tmp_path)
    runner.train(run)
    known = json.loads(run.finished.read_text())
    assert (known["name"], known["flags"], known["seed"], known["resumed"]) == ("dyna_q", run.flags, 3, False)
    assert known["seconds"] > 0 and known["commit"] == runner.commit("dyna_q")
    score = helpers.scalars(run.folder)["eval/episodic_return"][400]
    assert f"400 steps, last evaluation {score:.4g}" in str(runner.Progress(run))
    before = run.log.read_text()
    runner.train(run)
    assert run.log.read_text() == before
    with pytest.raises(runner.WrongSetting, match="other flags"):
        runner.train(run._replace(flags="maze --gamma 0.5"))


@pytest.mark.learning
def test_a_run_that_was_killed_in_its_last_evaluation_begins_again(tmp_path):
    """Its checkpoint says that nothing is left to do, and there is no result."""
    (run,) = runner.parse("3 dyna_q maze --total-timesteps 400 --eval-every 200", tmp_path)
    runner.train(run)
    run.finished.unlink()
    runner.train(run)
    assert json.loads(run.finished.read_text())["resumed"] is False and runner.ALL_DONE not in run.log.read_text()


def start(folder, *lines, background=False):
    """On a Ray of its own. What a shell starts in the background ignores Ctrl-C until it asks for it."""
    pytest.importorskip("ray")
    ignored = (lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if background else None
    return subprocess.Popen(
        [sys.executable, str(helpers.ROOT / "benchmarks" / "run.py"), *lines, "--runs", str(folder), "--every", "1"],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        preexec_fn=ignored,
    )  # fmt: skip


def training(folder):
    """Processes that train into this folder: their numbers and their parents'."""
    found = subprocess.run(["ps", "-wweo", "pid,ppid,args"], text=True, capture_output=True).stdout.splitlines()
    return [tuple(map(int, row.split()[:2])) for row in found if "algos/" in row and f"{folder} " in f"{row} "]


@pytest.mark.learning
@pytest.mark.parametrize("what", ["worker", "training", "all", "all, in the background"])
def test_what_is_killed_continues_and_ends_as_if_nothing_had_happened(what, tmp_path):
    # Ctrl-C takes a few seconds to reach a run, and 10,000 steps take one to four
    steps = 120_000 if what.startswith("all") else 10_000
    line = f"1 dyna_q maze --total-timesteps {steps} --eval-every 1000 --checkpoint-every 500 --planning-steps 50"
    (run,) = runner.parse(line, tmp_path)
    process = start(tmp_path, line, background="background" in what)
    end = time.monotonic() + 240
    while not ((run.folder / "checkpoint.pt").exists() and training(run.folder)):
        assert time.monotonic() < end and process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    ((pid, worker),) = training(run.folder)
    if what.startswith("all"):
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130 and not training(run.folder) and not run.finished.exists()
        process = start(tmp_path, line)
    else:
        os.kill(pid if what == "training" else worker, signal.SIGKILL)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert json.loads(run.finished.read_text())["resumed"]
    whole = run._replace(folder=tmp_path / "whole" / run.folder.name)
    runner.train(whole)
    assert helpers.scalars(run.folder) == helpers.scalars(whole.folder)


@pytest.mark.learning
def test_a_wrong_setting_is_not_tried_again_and_hinders_no_other(tmp_path):
    lines = "1 dyna_q nonsense", "1 dyna_q maze --alpha 7", "1 dyna_q maze --total-timesteps 300"
    process = start(tmp_path, *lines)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and "--alpha" in out and "1 finished, 2 failed" in out
    bad = [run for line in lines[:2] for run in runner.parse(line, tmp_path)]
    assert [run.log.read_text().count("\n$ ") for run in bad] == [1, 1]
    out, _ = start(tmp_path, "1 dyna_q maze", "--gpus", "99").communicate(timeout=120)
    assert "99 GPU" in out and "this machine has" in out  # Ray would wait for ever
