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
# A checkpoint waits for the end of an episode no longer than it is late already: the first one takes 343 steps
LINE = "dyna_q maze --total-timesteps 10000 --eval-every 1000 --checkpoint-every 500 --planning-steps 50"


def test_a_line_is_a_run_for_each_seed(tmp_path):
    runs = runner.parse("1-3,7 mbpo pendulum --rollout-length 0  # SAC", tmp_path)
    assert [run.seed for run in runs] == [1, 2, 3, 7]
    assert {run.name for run in runs} == {"mbpo"} and {run.flags for run in runs} == {"pendulum --rollout-length 0"}
    assert len({run.folder for run in runs}) == 4 and all(run.folder.parent == tmp_path for run in runs)
    assert runner.parse("5 dyna_q", tmp_path)[0].flags == ""
    assert runner.parse("  # nothing", tmp_path) == runner.parse("", tmp_path) == []
    assert runner.parse("1  mbpo pendulum   --rollout-length  0", tmp_path) == runs[:1]
    with pytest.raises(SystemExit):
        runner.parse("5-1 mbpo pendulum", tmp_path)
    with_other_flags = runner.parse("1 mbpo pendulum --rollout-length 1", tmp_path)
    assert with_other_flags[0].folder != runs[0].folder


@pytest.mark.parametrize(("words", "told"), [
    (["dyna_q maze"], "seeds"),
    (["1-x dyna_q maze"], "seeds"),
    (["1 no_such_file maze"], "algos/"),
    (["1"], "algos/"),
    ([], "nothing to run"),
    (["# a comment"], "nothing to run"),
    (["--table", "no_such_table"], "no_such_table"),
    (["1-2 dyna_q maze", "2 dyna_q maze"], "twice"),
])  # fmt: skip
def test_what_can_not_be_run_is_said(words, told, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", object())
    with pytest.raises(SystemExit) as ended:
        runner.main(runner.tyro.cli(runner.Args, args=[*words, "--runs", str(tmp_path)]))
    assert ended.value.code == 2 and told in capsys.readouterr().err


def test_without_ray_a_sentence_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit) as ended:
        runner.main(runner.Args(("1 dyna_q maze",)))
    assert ended.value.code == 2 and "pip install -r benchmarks/requirements.txt" in capsys.readouterr().err
    assert (helpers.ROOT / "benchmarks" / "requirements.txt").read_text().count("ray") == 1


def test_how_far_a_run_is_can_be_seen(tmp_path):
    (run,) = runner.parse("3 dyna_q maze --total-timesteps 600 --eval-every 200", tmp_path)
    one = runner.Watched(run)
    one.look()
    assert one.state == "waiting"
    runner.train(run)
    one.look()
    assert one.state == "running" and one.step == 600
    assert one.score == pytest.approx(helpers.scalars(run.folder)["eval/episodic_return"][600])
    assert "100 %" in one.row() and run.folder.name in one.row()
    again = runner.Watched(run)
    again.look()
    assert again.state == "waiting"  # there is a folder, and it is not this one's turn yet


@pytest.mark.learning  # they train
def test_a_finished_run_is_not_made_again_and_not_taken_for_another(tmp_path):
    (run,) = runner.parse("3 dyna_q maze --total-timesteps 400 --eval-every 200", tmp_path)
    runner.train(run)
    known = json.loads(run.finished.read_text())
    assert (known["name"], known["flags"], known["seed"], known["resumed"]) == ("dyna_q", run.flags, 3, False)
    assert known["seconds"] > 0 and known["commit"] == runner.commit("dyna_q")
    before = run.output.read_text()
    runner.train(run)
    assert run.output.read_text() == before
    with pytest.raises(runner.WrongSetting, match="other flags"):
        runner.train(run._replace(flags="maze --gamma 0.5"))
    # Killed in its last evaluation: the checkpoint says that nothing is left to do, and no result is there
    run.finished.unlink()
    runner.train(run)
    assert json.loads(run.finished.read_text())["resumed"] is False and runner.ALL_DONE not in run.output.read_text()


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
    """Processes that train into this folder."""
    found = subprocess.run(["ps", "-wweo", "pid,ppid,args"], text=True, capture_output=True).stdout.splitlines()
    return [tuple(map(int, row.split()[:2])) for row in found if "algos/" in row and f"{folder} " in f"{row} "]


def wait_for(what, process, seconds=240):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end and process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


@pytest.mark.learning
@pytest.mark.parametrize("what", ["worker", "training", "all", "all, in the background"])
def test_what_is_killed_goes_on_and_ends_as_if_nothing_had_been(what, tmp_path):
    # Ctrl-C needs a few seconds to come through to a run, and 10,000 steps take one to four
    line = f"1 {LINE}".replace("10000", "120000") if what.startswith("all") else f"1 {LINE}"
    (run,) = runner.parse(line, tmp_path)
    process = start(tmp_path, line, background="background" in what)
    wait_for(lambda: (run.folder / "checkpoint.pt").exists() and training(run.folder), process)
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
    assert process.returncode == 1 and "--alpha" in out and "1 finished" in out and "2 failed" in out
    bad = [run for line in lines[:2] for run in runner.parse(line, tmp_path)]
    assert [run.output.read_text().count("\n$ ") + 1 for run in bad] == [1, 1]


@pytest.mark.learning
def test_what_ray_can_never_give_is_said_at_once(tmp_path):
    out, _ = start(tmp_path, "1 dyna_q maze", "--gpus", "99").communicate(timeout=120)
    assert "99 GPU" in out and "this machine has" in out
