"""What every script promises its user."""

import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import torch
from helpers import ROOT, TABULAR, TRAINED, checkpoint, differences, leaves, module, scalars, tags_on_page
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

# Pendulum's episodes have 200 steps: a run is two of them, and every optimiser must step.
PLANNER = "--random-steps 100 --refit-every 100 --epochs 1 --candidates 10 --horizon 4 --hidden 16"
SEARCH = "--env-id CartPole-v1 --envs 4 --round-moves 50 --simulations 3 --n-steps 3 --learning-starts 50 "
SEARCH += (
    "--train-every 10 --copy-every 5 --batch-size 16 --hidden 16 --latent 8 --channels 4 --blocks 1 --replay-size 300"
)
TINY = {
    "pets": f"{PLANNER} --elites 3 --iterations 1",
    "mpc_rs": PLANNER,
    "pddm": PLANNER,
    "mbpo": "--random-steps 100 --model-every 200 --rollouts 100 --hidden 16 --model-hidden 16 --updates 1",
    "mage": "--random-steps 100 --model-every 200 --hidden 16 --model-hidden 16 --updates 1 --batch-size 32",
    # An epoch has 200 updates.
    "vin": "--env-id Maze8-v0 --mazes 800 --batch-mazes 4 --batch-cells 5 --test-mazes 20 --iterations 3 "
    "--reward-channels 9",
    # An update has 200 steps, in which episodes are half over.
    "icm": "--env-id CuriousMaze-v0 --envs 2 --horizon 100 --hidden 16 --model-hidden 16 --feature-size 8 --epochs 1",
    "planet": "--action-repeat 1 --random-steps 100 --updates 2 --batch-size 4 --batch-length 8 --horizon 3 "
    "--deter-size 8 --stoch-size 4 --units 8 --depth 2 --candidates 4 --elites 2 --iterations 2 "
    "--free-nats 0 --overshooting 3",
    "dreamer_v1": "--action-repeat 1 --random-steps 100 --train-every 40 --pretrain 2 --batch-size 4 --batch-length 8 "
    "--horizon 3 --deter-size 8 --stoch-size 4 --units 8 --depth 2 --dense-units 8 --free-nats 0 --ends",
    "dreamer_v2": "--random-steps 100 --train-every 40 --pretrain 2 --batch-size 4 --horizon 3 --deter-size 8 "
    "--stoch-size 3 --classes 4 --units 8 --depth 2 --dense-units 8 --reinforce-share 0.5 --slow-every 5",
    "dreamer_v3": "--learning-starts 50 --train-ratio 3 --batch-size 4 --batch-length 8 --horizon 3 --size tiny",
    # Four games of 50 moves at once.
    "muzero": SEARCH,
    "gumbel_muzero": f"{SEARCH} --considered 2",
    "dyna_q": "--env-id Taxi-v4 --planning-steps 5 --epsilon 0.8",  # nobody arrives within its 200 steps
}
COMMON = "--env-id Pendulum-v1 --total-timesteps 400 --eval-every 200 --episodes 1 --picture-every 400"
SHORT = {"vin", "dyna_q", "muzero", "gumbel_muzero"}  # whose episodes may be
TOGETHER = {"icm", "muzero", "gumbel_muzero"}  # which take 200 steps at once
slow = pytest.mark.slow
every_file = pytest.mark.parametrize("name", TRAINED)
TRANSITIONS = [name for name in TRAINED if hasattr(module(name), "Replay") and name not in TOGETHER]
with_replay = pytest.mark.parametrize("name", TRANSITIONS)


def run(name, flags, run_dir):
    """A short run in this process; later flags override earlier ones. Its checkpoint."""
    module(name).main([*f"{COMMON} {TINY[name]} {flags}".split(), "--run-dir", str(run_dir)])
    return checkpoint(run_dir)


def resume(name, run_dir, flags=""):
    module(name).main(["--resume", str(run_dir), *flags.split()])
    return checkpoint(run_dir)


def learned(state):
    """Everything but the settings, which name the length of a run."""
    return {name: value for name, value in state.items() if name != "args"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """name → the folder of a finished run of 400 steps, which no test changes."""
    folders = {}

    def get(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name) / "run"
            run(name, "", folders[name])
        return folders[name]

    return get


def command(*words, cwd=None, **kwargs):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *map(str, words)]
    return subprocess.Popen(words, cwd=cwd, env=environment, text=True, stdout=-1, stderr=-1, **kwargs)


# ── Each file ─────────────────────────────────────────────────────────────────────────────────────────────────────


@slow
@every_file
def test_runs_alone_in_an_empty_folder(name, tmp_path):
    shutil.copy(ROOT / "algos" / f"{name}.py", tmp_path)
    moving = "--envs 4 --horizon 50" if name == "icm" else ""  # a GIF drops the frames in which it stands still
    words = f"{COMMON} {TINY[name]} {moving} --capture-video".split()
    process = command(f"{name}.py", *words, cwd=tmp_path)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert f"__{name}__1__" in run_dir.name
    lines = out.splitlines()
    assert f"runs/{run_dir.name}" in lines[0] and f"tensorboard --logdir runs/{run_dir.name}" in lines[1]
    assert sum("mean return" in line for line in lines) == 2
    assert str(run_dir.relative_to(tmp_path) / "picture.png") in lines[-2]
    assert f"{name}.py --evaluate runs/{run_dir.name}" in lines[-1]
    assert "steps/s" not in err  # no progress bar where there is no terminal
    with Image.open(next(run_dir.glob("video_*.gif"))) as video:
        at_least = 1 if name in SHORT else 100
        assert video.n_frames >= at_least and len(video.convert("RGB").getcolors(1_000_000)) > 1
    with Image.open(run_dir / "picture.png") as picture:
        assert len(picture.convert("RGB").getcolors(1_000_000)) > 10
    assert helpers.tags(run_dir) <= tags_on_page(name)


@every_file
def test_every_tag_of_the_page_is_written(name, whole):
    assert tags_on_page(name) <= helpers.tags(whole(name))
    assert all(np.isfinite(value) for curve in scalars(whole(name), clock=True).values() for value in curve.values())


@every_file
def test_same_seed_same_run_and_looking_changes_nothing(name, whole, tmp_path):
    again = run(name, "--eval-every 400 --picture-every 200 --episodes 2 --checkpoint-every 200", tmp_path / "again")
    assert differences(learned(again), learned(checkpoint(whole(name)))) == []


@every_file
def test_stopped_and_continued_equals_one_run_to_the_bit(name, whole, tmp_path, monkeypatch):
    count_steps = module(name).Run.count_steps

    def stop_at_step_150(self, n=1):
        count_steps(self, n)
        if self.step - n < 150 <= self.step:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(module(name).Run, "count_steps", stop_at_step_150)
        run(name, "", tmp_path / "run")
    assert stopped.value.code == 128 + signal.SIGTERM and checkpoint(tmp_path / "run")["step"] == 200
    assert differences(learned(resume(name, tmp_path / "run")), learned(checkpoint(whole(name)))) == []
    assert scalars(tmp_path / "run") == scalars(whole(name))
    lengthened = resume(name, tmp_path / "run", "--total-timesteps 500")
    assert lengthened["step"] == (600 if name in TOGETHER else 500)
    assert lengthened["args"] == checkpoint(whole(name))["args"] | {"total_timesteps": 500}


@every_file
def test_everything_is_trained(name, whole, tmp_path):
    """Every tensor of the agent changes, but for steps that only count; every optimiser steps. Another seed starts
    with other weights."""
    steps = 200 if name == "dyna_q" else 1  # its values begin as zeros
    words = f"--total-timesteps {steps} --seed"
    before, other = (run(name, f"{words} {seed}", tmp_path / f"{seed}") for seed in (1, 2))
    assert differences(before["agent"], other["agent"])
    after = checkpoint(whole(name))
    unchanged = leaves(after["agent"]).keys() - set(differences(before["agent"], after["agent"]))
    assert not unchanged, unchanged
    steps = [value for part in after.values() for key, value in leaves(part).items() if key.endswith("/step")]
    assert (steps or name == "dyna_q") and all(value > 0 for value in steps)


@every_file
def test_the_policy_of_a_run_plays(name, whole, capsys):
    before, files = (whole(name) / "checkpoint.pt").read_bytes(), {*whole(name).iterdir()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module(name).Run, "__init__", None)  # --evaluate does not open the run for writing
        module(name).main(["--evaluate", str(whole(name)), "--episodes", "2"])
    args = module(name).Args(**checkpoint(whole(name))["args"])
    assert args.env_id in (out := capsys.readouterr().out) and module(name).Agent.player in out
    assert (whole(name) / "checkpoint.pt").read_bytes() == before and {*whole(name).iterdir()} == files
    policy = module(name).load_policy(str(whole(name)))
    env = module(name).make_env(args)
    obs, _ = env.reset(seed=0)
    policy.reset()
    torch.manual_seed(0)
    first = policy(obs)
    policy.reset()
    torch.manual_seed(0)
    assert env.action_space.contains(first) and first == policy(obs)


OWN = """
import gymnasium as gym, numpy as np
class Env(gym.Env):
    observation_space, action_space = gym.spaces.Box(-9, 9, (2,)), gym.spaces.Box(-1, 1, (2,))
    broken = False
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.s = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.s, {}
    def step(self, a):
        self.s = np.clip(self.s + 0.1 * np.asarray(a) + (0, 0.02), -9, 9).astype(np.float32)
        r = np.nan if self.broken and abs(self.s[0]) > 1 else -abs(self.s).sum()
        return self.s, r, self.s[1] > 1, False, {}
class Choice(Env):
    action_space = gym.spaces.Discrete(5)
    def step(self, a):
        return super().step(np.array([a % 2, a // 2 - 1]))
for name, task in (("Own", Env), ("Choice", Choice)):
    gym.register(f"{name}-v0", task)
    gym.register(f"Broken{name}-v0", type("Broken", (task,), {"broken": True}))
"""


@pytest.mark.parametrize(
    "name", [name for name in TRAINED if name not in ("vin", "dyna_q")]
)  # these have mazes, states
def test_your_own_environment(name, tmp_path, monkeypatch, capsys):
    """Reward and termination are learned, an endless task gets a time limit, and NaN ends in one sentence."""
    (tmp_path / "own_task.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    task = "Choice-v0" if name in TOGETHER | {"dreamer_v2"} else "Own-v0"
    vector = "--obs vector" if "dreamer" in name else ""
    with pytest.warns(UserWarning, match="no time limit"):
        after = run(name, f"--env-id own_task:{task} --total-timesteps 300 {vector}", tmp_path / "run")
    assert after["step"] == (400 if name in TOGETHER else 300)
    with pytest.raises(SystemExit) as exit:
        run(name, f"--env-id own_task:Broken{task} {vector}", tmp_path / "broken")
    assert exit.value.code == 2 and "NaN" in capsys.readouterr().err
    if name in TRANSITIONS:
        env = module(name).make_env(replace(module(name).Args(), env_id="own_task:Own-v0"))
        replay = module(name).Replay(300, env, "cpu")
        replay.load_state_dict(after["replay"])
        data = replay.rows()
        assert torch.equal(data.terminated[:, 0] > 0, data.s2[:, 1] > 1) and data.terminated.sum() > 0
        same_episode = data.episode[1:, 0] == data.episode[:-1, 0]
        assert torch.equal(data.s[1:][same_episode], data.s2[:-1][same_episode])
        assert torch.equal(data.terminated[:-1, 0] > 0, ~same_episode)


@with_replay
def test_a_time_limit_is_not_a_terminal_state(name, whole):
    env = module(name).make_env(module(name).Args(env_id="Pendulum-v1"))
    replay = module(name).Replay(400, env, "cpu")
    replay.load_state_dict(checkpoint(whole(name))["replay"])
    assert replay.size == 400 and (replay.rows().terminated == 0).all()
    assert replay.rows().episode[:, 0].unique().tolist() == [0, 200]


@slow
@pytest.mark.parametrize(("name", "preset"), [(name, preset) for name in TRAINED for preset in module(name).PRESETS])
def test_every_preset_starts(name, preset, tmp_path):
    args = module(name).PRESETS[preset][1]
    if args.env_id.startswith("ControlSuite/"):
        pytest.importorskip("dm_control.suite")
    words = f"{preset} {TINY[name]} --total-timesteps 130 --episodes 1"
    own = not hasattr(module(name).Args, "random_steps")  # a task of its own kind
    words += f" --env-id {args.env_id}" if own else " --random-steps 60"
    words += " --layers 2 --weight-decay 1e-4 1e-4 1e-4" if name == "pets" else ""
    module(name).main([*words.split(), "--run-dir", str(tmp_path / "run")])
    whole = 200 if name in TOGETHER else getattr(args, "action_repeat", 1)
    assert checkpoint(tmp_path / "run")["step"] == -(-130 // whole) * whole


@given(st.data())
def test_a_number_out_of_range_is_refused_by_its_flag(data):
    args = module(data.draw(st.sampled_from(TRAINED))).Args()
    numbers = [field.name for field in fields(args) if type(getattr(args, field.name)) in (int, float)]
    name = data.draw(st.sampled_from(numbers))
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} "):
        replace(args, **{name: data.draw(st.sampled_from([-1, float("nan"), float("inf")]))})


@every_file
def test_help_fits_on_two_screens(name, capsys):
    with pytest.raises(SystemExit) as exit:
        module(name).parse_args([next(iter(module(name).PRESETS)), "--help"])
    assert exit.value.code == 0 and len(capsys.readouterr().out.splitlines()) <= 120


@slow
@pytest.mark.parametrize("name", TABULAR)
def test_a_file_that_plans_in_seconds(name, tmp_path, monkeypatch, capsys):
    """It runs alone, twice alike, plays again, and refuses what is wrong in one sentence."""
    shutil.copy(ROOT / "algos" / f"{name}.py", tmp_path)
    process = command(f"{name}.py", "--capture-video", "--run-dir", "one", cwd=tmp_path)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "one/picture.png" in out and f"{name}.py --evaluate one" in out
    for image in (*(tmp_path / "one").glob("*.png"), *(tmp_path / "one").glob("*.gif")):
        with Image.open(image) as picture:
            assert len(picture.convert("RGB").getcolors(1_000_000)) > 2
    monkeypatch.chdir(tmp_path)
    module(name).main(["--capture-video", "--run-dir", "two"])
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {path.name for path in (tmp_path / "two").iterdir()} and len(names) > 4
    for path in (tmp_path / "one").glob("*.csv"):
        assert path.read_text() == (tmp_path / "two" / path.name).read_text()
    module(name).main(["--evaluate", "two", "--episodes", "3"])
    assert "3 episodes: mean return" in capsys.readouterr().out
    policy, env = module(name).load_policy("two"), module(name).make_env(module(name).Args())
    assert env.action_space.contains(policy(env.reset(seed=0)[0]))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "policy.npz").write_bytes((tmp_path / "two" / "policy.npz").read_bytes()[:100])
    wrong = {
        "--run-dir two": "not empty", "--evaluate one/two": "holds no policy", "--evaluate bad": "damaged",
        "--env-id Nonsense-v0": "Nonsense", "--env-id no_module:Env-v0": "no_module", "--gamma 2": "--gamma",
    }  # fmt: skip
    for flags, word in wrong.items():
        with pytest.raises(SystemExit) as exit:
            module(name).main(flags.split())
        error = capsys.readouterr().err
        assert exit.value.code == 2 and word in error and "Traceback" not in error


@slow
@pytest.mark.parametrize(("name", "preset"), [(name, preset) for name in TABULAR for preset in module(name).PRESETS])
def test_every_tabular_preset_runs(name, preset, tmp_path):
    fewer = ["--iterations", "2"] if hasattr(module(name).Args, "iterations") else []
    module(name).main([preset, *fewer, "--episodes", "2", "--run-dir", str(tmp_path / "run")])
    assert (tmp_path / "run" / "picture.png").is_file()


# ── The plumbing, which test_house.py holds equal in all files: shown with one of them ────────────────────────────


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of a finished run, for tests that change it."""
    shutil.copytree(whole("pets"), tmp_path / "finished")
    return tmp_path / "finished"


WRONG = {
    "--elites 200": "--elites",
    "--device cuda:9": "--device cuda:9",
    "--env-id Nonsense-v0": "Nonsense",
    "--env-id no_module:Env-v0": "no_module",
    "--env-id CartPole-v1": "actions",
    "--env-id FrozenLake-v1": "FlattenObservation",
    "--env-id CarRacing-v3": "",  # a missing package or a picture: either is named
    "nonsense": "nonsense",
    "--lr 1": "--lr",
    "--resume nowhere": "no checkpoint",
    "--evaluate nowhere": "no checkpoint",
    "--resume a --evaluate b": "choose one",
}


@pytest.mark.parametrize("flags", WRONG)
def test_a_mistake_ends_in_one_sentence_and_exit_code_2(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        module("pets").main(flags.split())
    error = capsys.readouterr().err
    assert exit.value.code == 2 and WRONG[flags] in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())  # before anything was written


def test_nothing_is_overwritten(finished, capsys):
    before = {path: path.read_bytes() for path in finished.iterdir()}
    for flag, more in (("--run-dir", ""), ("--resume", ""), ("--resume", "--hidden 9")):
        with pytest.raises(SystemExit) as exit:
            module("pets").main([flag, str(finished), *more.split()])
        assert exit.value.code == 2
    error = capsys.readouterr().err
    assert "not empty" in error and "400 steps already: raise --total-timesteps" in error and "hidden" in error
    assert {path: path.read_bytes() for path in finished.iterdir()} == before


def test_damaged_and_foreign_checkpoints_are_named(finished, whole, capsys):
    path = finished / "checkpoint.pt"
    for content, word in ((path.read_bytes()[:1_000], "damaged"), (b"", "damaged"),
                          ((whole("mpc_rs") / "checkpoint.pt").read_bytes(), "not a checkpoint of pets")):  # fmt: skip
        path.write_bytes(content)
        for flag in ("--resume", "--evaluate"):
            with pytest.raises(SystemExit) as exit:
                module("pets").main([flag, str(finished)])
            assert exit.value.code == 2 and word in capsys.readouterr().err


def test_a_full_disk_leaves_the_old_checkpoint(finished, monkeypatch, capsys):
    before = (finished / "checkpoint.pt").read_bytes()

    def write_half(self, data):
        with open(self, "wb") as file:
            file.write(data[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(SystemExit) as exit:
        resume("pets", finished, "--total-timesteps 600")
    monkeypatch.undo()
    assert exit.value.code == 2 and "No space left" in capsys.readouterr().err
    assert (finished / "checkpoint.pt").read_bytes() == before and not (finished / "checkpoint.tmp").exists()


def test_a_setting_added_later_takes_its_default_in_older_runs(finished):
    state = checkpoint(finished)
    del state["args"]["alpha"]
    torch.save(state, finished / "checkpoint.pt")
    assert resume("pets", finished, "--total-timesteps 500")["args"]["alpha"] == module("pets").Args().alpha


def test_a_stop_during_the_last_evaluation_loses_nothing(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module("pets"), "play", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run("pets", "--total-timesteps 200 --eval-every 1000", tmp_path / "run")
    module("pets").main(["--evaluate", str(tmp_path / "run"), "--episodes", "1"])
    assert resume("pets", tmp_path / "run", "--total-timesteps 400")["step"] == 400


def test_a_checkpoint_is_written_about_every_minute(tmp_path, monkeypatch):
    ticks, saved, save = itertools.count(0, 40.0), [], module("pets").Run.save
    clock = SimpleNamespace(perf_counter=lambda: next(ticks), time=time.time, sleep=time.sleep)
    monkeypatch.setattr(module("pets"), "time", clock)
    monkeypatch.setattr(module("pets").Run, "save", lambda self: saved.append(self.step) or save(self))
    run("pets", "--random-steps 390 --checkpoint-every 100000", tmp_path / "run")
    assert saved == [200, 400]


@slow
def test_killed_and_continued(tmp_path):
    """SIGKILL at any moment leaves a complete checkpoint; the steps since are taken again and shown once."""
    flags = f"{COMMON} {TINY['pets']} --total-timesteps 100000 --eval-every 100000 --checkpoint-every 200"
    process = command(ROOT / "algos" / "pets.py", *flags.split(), "--run-dir", tmp_path / "run")
    while not (tmp_path / "run" / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.1)
    time.sleep(0.5)
    process.kill()
    process.communicate()
    step = checkpoint(tmp_path / "run")["step"]
    assert step % 200 == 0 and not (tmp_path / "run" / "checkpoint.tmp").exists()
    resume("pets", tmp_path / "run", f"--total-timesteps {step + 200}")
    returns = scalars(tmp_path / "run")["charts/episodic_return"]
    assert list(returns) == list(range(200, step + 201, 200))


@slow
def test_a_second_signal_stops_at_once(tmp_path):
    flags = f"{COMMON} {TINY['pets']} --total-timesteps 100000 --random-steps 99000 --env-id own_task:Own-v0"
    (tmp_path / "own_task.py").write_text(OWN.replace("self.s[1] > 1, ", "__import__('time').sleep(0.05) or False, "))
    process = command(ROOT / "algos" / "pets.py", *flags.split(), "--run-dir", tmp_path / "run", cwd=tmp_path)
    while "run folder" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(1)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    _, err = process.communicate(timeout=10)  # an episode takes 50 seconds
    assert process.returncode == -signal.SIGINT and "end of this episode" in err
