"""What every script of algos/ promises its user, for each file in tests/cases.py."""

import importlib.util
import json
import math
import os
import random
import shutil
import signal
import tempfile
import time

import helpers
import house
import pytest
import torch
from cases import CASES

NAMES = [path.stem for path in house.scripts(helpers.ROOT)]
name_of = pytest.mark.parametrize("name", NAMES)


def test_every_script_has_its_case():
    assert sorted(CASES) == NAMES


@pytest.fixture(scope="module", autouse=True)
def written(tmp_path_factory):
    """The folder in which every run of any process leaves the tags that it wrote."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tags"
    folder.mkdir(exist_ok=True)
    check_run.folder = folder
    return folder


def check_run(name, run_dir):
    """It learned, and wrote what it should."""
    written = helpers.scalars(run_dir, clock=True)
    assert all(math.isfinite(value) for curve in written.values() for value in curve.values())
    for tag in ("charts/episodic_return", "charts/SPS", "eval/episodic_return", "time/env"):
        assert written[tag], tag
    assert any(tag.startswith("losses/") for tag in written)
    assert json.loads((run_dir / "args.json").read_text())["algorithm"] == name
    assert 0 < sum(curve[max(curve)] for tag, curve in written.items() if tag.startswith("time/")) < 1.01
    assert (run_dir / "picture.png").stat().st_size > 1_000
    assert (run_dir / "picture.gif").stat().st_size > 1_000
    explained = house.tags_on(helpers.ROOT / "docs" / f"{name}.md")
    assert helpers.tags(run_dir) <= explained
    with tempfile.NamedTemporaryFile("w", prefix=f"{name}.", dir=check_run.folder, delete=False) as file:
        file.write("\n".join(helpers.tags(run_dir)))
    return helpers.checkpoint(run_dir)


def check_learned(before, after):
    """Every tensor that the checkpoint calls learned is another than at the start; every optimiser has stepped."""
    learned = helpers.leaves(after["learned"])
    assert helpers.differences(before["learned"], after["learned"]) == sorted(learned)
    steps = [value for key, value in helpers.leaves(after.get("optimisers", {})).items() if key.endswith("/step")]
    assert all(value > 0 for value in steps)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """name → the folder of one finished quick run, which no test changes."""
    folders = {}

    def get(name):
        if name not in folders:
            folders[name] = helpers.run(name, CASES[name].quick, tmp_path_factory.mktemp(name) / "run")
        return folders[name]

    return get


def started_only(name, flags, folder):
    short = "--total-timesteps 1 --eval-episodes 1 --eval-max-steps 1 --picture-every 0"
    return helpers.checkpoint(helpers.run(name, f"{flags} {short}", folder))


PRESETS = [  # those beyond the first in the slower tier
    pytest.param(name, f"{preset} {CASES[name].presets.get(preset, '')}".strip(),
                 marks=[pytest.mark.learning] if number else [])
    for name in NAMES
    for number, preset in enumerate(helpers.module(name).PRESETS)
    if not (package := CASES[name].optional.get(preset)) or importlib.util.find_spec(package)
]
OPTIONS = [(name, flags) for name in NAMES for flags in CASES[name].options]


def quickly(name, flags):
    """The quick flags between the preset, if there is one, and the options, which override them."""
    words = flags.split()
    preset, options = (words[0], words[1:]) if words and not words[0].startswith("--") else ("", words)
    return " ".join([preset, CASES[name].quick, *options]).strip()


@pytest.mark.parametrize(("name", "flags"), PRESETS + OPTIONS)
def test_every_preset_and_option_learns(name, flags, tmp_path):
    flags = quickly(name, flags)
    after = check_run(name, helpers.run(name, flags, tmp_path / "run"))
    check_learned(started_only(name, flags, tmp_path / "start"), after)
    if "--capture-video" in flags:
        check_film(next((tmp_path / "run" / "videos").glob("*.gif")))


def check_film(path):
    from PIL import Image

    with Image.open(path) as film:
        assert film.format == "GIF"
        assert film.n_frames > 2
        assert len(film.convert("RGB").getcolors(maxcolors=1_000_000)) > 1  # not one flat colour


@name_of
def test_every_tag_explained_is_written_by_some_run(name, quick, written, tmp_path):
    explained, tags = house.tags_on(helpers.ROOT / "docs" / f"{name}.md"), helpers.tags(quick(name))
    tags = tags.union(*(path.read_text().split() for path in written.glob(f"{name}.*")))
    for number, flags in enumerate(CASES[name].options):  # those that are not made yet
        if not explained <= tags:
            tags |= helpers.tags(helpers.run(name, quickly(name, flags), tmp_path / str(number)))
    assert tags == explained


@name_of
def test_settings_are_written_as_a_table(name, quick):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(quick(name))).Reload()
    text = events.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0].decode()
    settings = json.loads((quick(name) / "args.json").read_text())
    assert "|seed|1|" in text
    assert all(f"|{key}|" in text for key in settings if key != "algorithm")


@name_of
def test_runs_alone_in_an_empty_folder(name, tmp_path):
    shutil.copy(helpers.ROOT / "algos" / f"{name}.py", tmp_path)
    process = helpers.command(name, *CASES[name].quick.split(), cwd=tmp_path, script=tmp_path / f"{name}.py")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert f"__{name}__1__" in run_dir.name
    assert f"tensorboard --logdir runs/{run_dir.name}" in out
    assert str(run_dir.relative_to(tmp_path) / "picture.png") in out
    assert "device: " in out
    assert "steps/s" not in err  # no progress bar where there is no terminal
    check_run(name, run_dir)


@name_of
def test_help_lists_presets_and_fields(name, capsys):
    with pytest.raises(SystemExit) as exit:
        helpers.module(name).main(["--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    for preset in helpers.module(name).PRESETS:
        assert preset in shown
    with pytest.raises(SystemExit):
        helpers.module(name).main([next(iter(helpers.module(name).PRESETS)), "--help"])
    shown += capsys.readouterr().out
    for field in helpers.module(name).Args.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in shown


@name_of
def test_flags_override_the_preset_and_without_one_the_default(name):
    module = helpers.module(name)
    for preset, (_, settings) in module.PRESETS.items():
        args = module.parse_args([preset, "--seed", "3"])
        assert vars(args) == {**vars(settings), "seed": 3}
    first = next(iter(module.PRESETS.values()))[1]
    assert vars(module.parse_args(["--seed", "3"])) == {**vars(first), "seed": 3}
    assert vars(module.parse_args([])) == vars(first)
    assert module.parse_args(["--no-progress"]) == module.parse_args([next(iter(module.PRESETS)), "--no-progress"])


@name_of
def test_same_seed_same_run(name, tmp_path, quick):
    again = helpers.run(name, CASES[name].quick, tmp_path / "again")
    other = helpers.run(name, f"{CASES[name].quick} --seed 2", tmp_path / "other")
    assert helpers.scalars(again) == helpers.scalars(quick(name))
    assert helpers.differences(helpers.checkpoint(again), helpers.checkpoint(quick(name))) == []
    assert helpers.scalars(other) != helpers.scalars(quick(name))


@pytest.mark.learning
@name_of
def test_looking_changes_nothing(name, tmp_path, quick):
    """Without pictures and evaluations the same is learned, with the same dice."""
    blind = helpers.run(name, f"{CASES[name].quick} --picture-every 0 --eval-every 0", tmp_path / "blind")
    blind, seeing = helpers.checkpoint(blind), helpers.checkpoint(quick(name))
    kept = {"step", "random", "learned", "optimisers"} & set(seeing)
    assert helpers.differences({key: blind[key] for key in kept}, {key: seeing[key] for key in kept}) == []


def interrupt_after(monkeypatch, module, steps, number=signal.SIGTERM):
    """A real signal to this process, at the first episode's end after so many steps."""
    original, sent = module.RunLog.episode, []

    def episode(self, step, *rest):
        original(self, step, *rest)
        if step >= steps and not sent:
            sent.append(step)
            signal.raise_signal(number)

    monkeypatch.setattr(module.RunLog, "episode", episode)


RESUMES = [(name, "", signal.SIGTERM) for name in NAMES]
RESUMES += [  # in the slower tier: each trains twice
    pytest.param(name, flags, number, marks=pytest.mark.learning)
    for name in NAMES
    for flags, number in [("", signal.SIGINT), *((flags, signal.SIGTERM) for flags in CASES[name].resume)]
]


@pytest.mark.parametrize(("name", "flags", "number"), RESUMES)
def test_stop_and_resume_equal_one_run_to_the_bit(name, flags, number, tmp_path, monkeypatch, capsys):
    module, flags = helpers.module(name), quickly(name, flags)
    total = module.parse_args(flags.split()).total_timesteps
    straight = helpers.run(name, flags, tmp_path / "straight")
    capsys.readouterr()
    with monkeypatch.context() as patch:
        interrupt_after(patch, module, total // 2, number)
        with pytest.raises(SystemExit) as exit:
            helpers.run(name, flags, tmp_path / "run")
    assert exit.value.code == 128 + number
    assert f"--resume {tmp_path / 'run'}" in capsys.readouterr().out
    stopped_at = helpers.checkpoint(tmp_path / "run")["step"]
    assert total // 2 <= stopped_at < total
    helpers.run(name, f"--resume {tmp_path / 'run'}")
    assert helpers.differences(helpers.checkpoint(tmp_path / "run"), helpers.checkpoint(straight)) == []
    assert helpers.scalars(tmp_path / "run") == helpers.scalars(straight)


@name_of
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(name, tmp_path):
    """SIGKILL, which nothing can catch; then --resume to the end, and the run is the straight one."""
    total = int(CASES[name].quick.split("--total-timesteps ")[1].split()[0])
    flags = f"{CASES[name].quick} --checkpoint-every {total // 2}"  # none inside an episode
    process = helpers.command(name, *flags.split(), "--total-timesteps", 1_000_000, "--run-dir", tmp_path / "run")
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoint.pt").exists() and process.poll() is None:
        assert time.monotonic() < deadline or process.kill()
        time.sleep(0.02)
    time.sleep(random.uniform(0, 0.5))
    process.kill()
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err
    end = helpers.checkpoint(tmp_path / "run")["step"] + 300
    helpers.run(name, f"--resume {tmp_path / 'run'} --total-timesteps {end}")
    helpers.run(name, f"{flags} --total-timesteps {end}", tmp_path / "straight")
    resumed, straight = helpers.checkpoint(tmp_path / "run"), helpers.checkpoint(tmp_path / "straight")
    assert helpers.differences(resumed, straight) == []
    # The killed run meant to go on: it evaluated at steps where the straight one ended.
    curves, expected = helpers.scalars(tmp_path / "run"), helpers.scalars(tmp_path / "straight")
    assert {tag: curve for tag, curve in curves.items() if not tag.startswith("eval/")} == {
        tag: curve for tag, curve in expected.items() if not tag.startswith("eval/")
    }


@name_of
def test_cut_inside_an_episode_resumes_too(name, tmp_path, monkeypatch):
    """Where an episode outlasts the patience, the run is cut, and the seam is no transition."""
    module = helpers.module(name)
    monkeypatch.setattr(module.StopSignal, "PATIENCE", {signal.SIGTERM: -1.0, signal.SIGINT: -1.0})
    monkeypatch.setattr(module.RunLog, "flush", lambda self, step: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        helpers.run(name, CASES[name].quick, tmp_path / "run")
    monkeypatch.undo()
    cut = helpers.checkpoint(tmp_path / "run")
    assert cut["step"] not in helpers.scalars(tmp_path / "run").get("charts/episodic_return", {})
    helpers.run(name, f"--resume {tmp_path / 'run'} --total-timesteps {cut['step'] + 300}")
    after = helpers.checkpoint(tmp_path / "run")
    assert after["step"] == cut["step"] + 300
    if isinstance(cut.get("replay", {}).get("columns"), dict):  # sequences: the last row of the part that was cut
        rows = cut["replay"]["size"]
        assert not cut["replay"]["columns"]["last"][rows - 1]
        assert after["replay"]["columns"]["last"][rows - 1] and not after["replay"]["columns"]["terminated"][rows - 1]
    elif "replay" in after:  # its columns: obs, action, reward, next_obs, terminated, truncated
        assert not cut["replay"]["columns"][5][cut["step"] - 1]
        assert after["replay"]["columns"][5][cut["step"] - 1]


@name_of
def test_a_signal_in_the_last_episode_changes_nothing(name, tmp_path, quick, monkeypatch, capsys):
    """The run is over anyway: it is finished, not stopped."""
    module, total = helpers.module(name), int(CASES[name].quick.split("--total-timesteps ")[1].split()[0])
    last = max(step for step in helpers.scalars(quick(name))["charts/episodic_return"])
    interrupt_after(monkeypatch, module, last)
    original = module.StopSignal.to_stop
    monkeypatch.setattr(module.StopSignal, "to_stop", lambda self, over: original(self, over) and False)
    helpers.run(name, CASES[name].quick, tmp_path / "run")
    assert helpers.checkpoint(tmp_path / "run")["step"] == total
    assert "tensorboard --logdir" in capsys.readouterr().out


@name_of
def test_evaluate_scores_what_training_scored(name, tmp_path, quick, capsys):
    module, copy = helpers.module(name), shutil.copytree(quick(name), tmp_path / "run")
    saved = module.parse_args(["--evaluate", str(copy)])
    scores = module.play(module.parse_args(["--evaluate", str(copy), "--episodes", str(saved.eval_episodes)]))
    for tag, values in zip(("eval/episodic_return", "eval/episodic_length"), scores, strict=True):
        final = helpers.scalars(copy)[tag]
        assert sum(values) / len(values) == pytest.approx(final[max(final)], rel=1e-6)
    returns, _ = scores
    capsys.readouterr()
    module.main(["--evaluate", str(copy), "--capture-video", "--episodes", "3"])
    out = capsys.readouterr().out
    assert f"return {sum(returns[:3]) / 3:.2f} (min {min(returns[:3]):.2f}, max {max(returns[:3]):.2f})" in out
    check_film(copy / "videos" / "evaluation.gif")


@name_of
def test_resume_can_lengthen_a_run(name, tmp_path, quick):
    copy = shutil.copytree(quick(name), tmp_path / "run")
    before = helpers.checkpoint(copy)["step"]
    helpers.run(name, f"--resume {copy} --total-timesteps {before + 200}")
    assert helpers.checkpoint(copy)["step"] == before + 200


# ── A user's mistakes ─────────────────────────────────────────────────────────────────────────────────────────────


def refused(name, argv, capsys):
    """Exit code 2 and one sentence; returns it."""
    with pytest.raises(SystemExit) as exit:
        helpers.module(name).main(argv)
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert err.startswith(f"{name}: ")
    return err


BAD = [(name, flags, word) for name in NAMES for flags, word in CASES[name].bad]
BAD += [
    (name, flags, word)
    for name in NAMES
    for flags, word in [
        ("--total-timesteps 0", "--total-timesteps"),
        ("--eval-every -1", "--eval-every"),
        ("--episodes 0", "--episodes"),
        ("--seed -1", "--seed"),
        ("--seed 5000000000", "--seed"),
        ("--log-every 0", "--log-every"),
        ("--env-id :", "can't be made"),
        ("--device meta", "--device"),
        ("--resume a --evaluate b", "one of them"),
        ("--run-dir /proc/no_such_place/run", "/proc/no_such_place/run"),
        ("--env-id NoSuchTask-v0", "NoSuchTask"),
        ("--env-id no_such_module:Task-v0", "no_such_module"),
        ("--device no_such_device", "--device"),
        ("--device cuda:99", "cuda:99"),
        ("--resume no_such_folder", "no_such_folder"),
        ("--evaluate no_such_folder", "no_such_folder"),
    ]
]


@pytest.mark.parametrize(("name", "flags", "word"), BAD)
def test_a_wrong_setting_stops_at_once(name, flags, word, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert word in refused(name, [*CASES[name].quick.split(), *flags.split()], capsys)
    assert list(tmp_path.iterdir()) == []  # nothing was begun


@name_of
@pytest.mark.parametrize("argv", [["no_such_preset"], ["--no-such-flag", "1"], ["--seed", "three"]])
def test_a_wrong_word_on_the_command_line(name, argv, capsys):
    with pytest.raises(SystemExit) as exit:
        helpers.module(name).main(argv)
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert argv[-1] in err or argv[0] in err
    assert "Traceback" not in err


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def truncate(folder):
    whole = (folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])


def empty(folder):
    (folder / "checkpoint.pt").write_bytes(b"")


def another_algorithm(folder):
    torch.save({**helpers.checkpoint(folder), "algorithm": "another"}, folder / "checkpoint.pt")


def settings_of_another(folder):
    settings = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps({**settings, "algorithm": "another"}))


def older_settings(folder):
    settings = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps({**settings, "setting_that_was": 1}))


def broken_settings(folder):
    (folder / "args.json").write_text("{")


def not_our_pickle(folder):
    torch.save([1, 2], folder / "checkpoint.pt")


@name_of
@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (truncate, "damaged"), (empty, "damaged"),
        (another_algorithm, "no checkpoint of"), (not_our_pickle, "no checkpoint of"),
        (settings_of_another, "another algorithm"), (older_settings, "setting_that_was"),
        (broken_settings, "args.json"),
        (lambda folder: (folder / "checkpoint.pt").unlink(), "checkpoint.pt"),
        (lambda folder: (folder / "args.json").unlink(), "no run folder"),
    ],
)  # fmt: skip
def test_a_damaged_run_folder_is_refused_and_left_alone(name, flag, damage, word, tmp_path, quick, capsys):
    copy = shutil.copytree(quick(name), tmp_path / "run")
    damage(copy)
    before = contents(copy)
    assert word in refused(name, [flag, str(copy)], capsys)
    assert contents(copy) == before


@name_of
def test_a_folder_in_use_is_not_overwritten(name, tmp_path, quick, capsys):
    copy = shutil.copytree(quick(name), tmp_path / "run")
    before = contents(copy)
    assert "--resume" in refused(name, [*CASES[name].quick.split(), "--run-dir", str(copy)], capsys)
    (tmp_path / "file").write_text("a file")
    refused(name, [*CASES[name].quick.split(), "--run-dir", str(tmp_path / "file")], capsys)
    assert contents(copy) == before


@name_of
def test_a_finished_run_is_not_resumed_by_accident(name, tmp_path, quick, capsys):
    copy = shutil.copytree(quick(name), tmp_path / "run")
    before = contents(copy)
    assert "--total-timesteps" in refused(name, ["--resume", str(copy)], capsys)
    assert "--total-timesteps" in refused(name, ["--resume", str(copy), "--total-timesteps", "10"], capsys)
    assert "preset" in refused(name, [next(iter(helpers.module(name).PRESETS)), "--resume", str(copy)], capsys)
    assert contents(copy) == before


@name_of
def test_settings_of_a_run_do_not_change_under_it(name, tmp_path, quick, capsys):
    copy = shutil.copytree(quick(name), tmp_path / "run")
    assert "--seed" in refused(name, ["--resume", str(copy), "--seed", "9"], capsys)
    assert "--env-id" in refused(name, ["--evaluate", str(copy), "--env-id", "Acrobot-v1"], capsys)


@name_of
def test_a_mistake_shows_no_traceback_from_the_shell(name, tmp_path):
    process = helpers.command(name, "--env-id", "NoSuchTask-v0", cwd=tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "Traceback" not in err
    assert err.startswith(f"{name}: ")


OWN = """
import gymnasium as gym
import numpy as np


class MyEnv(gym.Env):
    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.normal(size=2)
        return self.state.astype(np.float32), {}

    def step(self, action):
        place, speed = self.state
        self.state = np.array([place + 0.1 * speed, speed + 0.1 * float(action[0])])
        return self.state.astype(np.float32), -float(place**2), False, False, {}
"""
