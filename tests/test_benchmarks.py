"""The benchmarks still run, and what they compute is right."""

import csv
import itertools
import json
import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import gymnasium as gym
import helpers
import numpy as np
import pytest
import torch

figures = helpers.load(helpers.ROOT / "benchmarks" / "dyna_q_figures.py")
speed = helpers.load(helpers.ROOT / "benchmarks" / "speed.py")


def test_speed_prints_a_row_for_each_variant(tmp_path, capsys):
    speed.main(speed.Args(rounds=1, threads=1, save=tmp_path / "speed.csv"))
    rows = (tmp_path / "speed.csv").read_text().splitlines()[1:]
    names = [path.stem for path in (helpers.ROOT / "algos").glob("*.py")]
    assert {row.split(",")[0] for row in rows} == {"matrix product", *names}
    assert all(float(row.split(",")[-3]) > 0 and row.split(",")[-2] == "1" for row in rows)
    assert capsys.readouterr().out.count("\n| ") == len(rows) + 1
    speed.main(speed.Args(rounds=1, threads=1, only=("dyna_q",), save=tmp_path / "speed.csv"))
    again = (tmp_path / "speed.csv").read_text().splitlines()[1:]
    assert [row.rsplit(",", 3)[0] for row in again] == [row.rsplit(",", 3)[0] for row in rows]
    changed = {row.split(",")[0] for row, other in zip(again, rows, strict=True) if row != other}
    assert changed == {"dyna_q"}


@pytest.mark.learning  # a minute of compiling
def test_speed_with_and_without_compile(tmp_path):
    with pytest.raises(SystemExit):
        speed.main(speed.Args(rounds=1, compile=True))
    some = ("vin",)
    speed.main(speed.Args(rounds=2, threads=1, compile=True, only=some, save=tmp_path / "speed.csv"))
    with open(tmp_path / "speed.csv", newline="") as file:
        rates = {(row["hot_path"], row["unit"]): float(row["rate"]) for row in csv.DictReader(file)}
    compiled = [(name, unit) for name, unit in rates if name.endswith(", compiled")]
    assert len(compiled) == 2
    for name, unit in compiled:
        assert 0.05 < rates[name, unit] / rates[name.removesuffix(", compiled"), unit] < 20
    torch.compiler.reset()


def test_a_run_gives_its_curves():
    curves = figures.run(["maze", "--total-timesteps", "2000", "--eval-every", "500", "--seed", "2"])
    steps = [step for step, _ in curves["eval/episodic_return"]]
    assert steps[-1] == 2_000 and 2 <= len(steps) <= 4 and curves["charts/episodic_length"]


def test_an_exact_evaluation_takes_the_place_of_the_sampled_one():
    curves = figures.run(["frozenlake", "--total-timesteps", "500", "--eval-every", "250"], figures.Exact)
    best = figures.exact_values(gym.make("FrozenLake8x8-v1").unwrapped.P, 0.99)[0]
    assert len(curves["eval/exact_value"]) == 2
    assert all(0 <= value <= best for _, value in curves["eval/exact_value"])


def test_a_finer_map_has_each_cell_several_times():
    assert figures.finer("S# .G", 2) == "SS## SS## ..GG ..GG"


def test_updates_until_the_shortest_path():
    made = {planner: figures.updates_until_shortest((planner, 1, 1.0, 1)) for planner in ("dyna", "prioritized")}
    assert made["prioritized"] < made["dyna"] < math.inf
    assert figures.updates_until_shortest(("dyna", 1, 1.0, 1), limit=10) == math.inf


def test_exact_values_agree_with_episodes():
    env, gamma = gym.make("FrozenLake-v1"), 0.9
    P = env.unwrapped.P
    best = figures.exact_values(P, gamma)
    q = np.array([[sum(p * (r + gamma * best[s2] * (not end)) for p, s2, r, end in P[s][a]) for a in P[s]] for s in P])
    assert np.abs(best - np.max(q, axis=1)).max() < 1e-9  # Bellman's equation

    def policy(s):
        return int(np.argmax(q[s]))

    assert np.abs(figures.exact_values(P, gamma, policy) - best).max() < 1e-9
    rng, returns = np.random.default_rng(0), []
    for _ in range(4_000):  # roll the policy out on P
        s, discount, total, end = 0, 1.0, 0.0, False
        while not end and discount > 1e-4:
            outcomes = P[s][policy(s)]
            _, s, r, end = outcomes[rng.choice(len(outcomes), p=[x[0] for x in outcomes])]
            total, discount = total + discount * r, discount * gamma
        returns.append(total)
    assert abs(np.mean(returns) - best[0]) < 4 * np.std(returns) / len(returns) ** 0.5


def test_interval_is_the_bootstraps():
    samples = np.random.default_rng(1).normal(size=(400, 3))
    mean, half = figures.interval(samples)
    assert np.allclose(mean, samples.mean(0))
    assert np.allclose(half, 1.96 * samples.std(0) / 20, rtol=0.15)


def test_every_run_has_a_folder_of_its_own(tmp_path, monkeypatch):
    """Also where a flag is a path, or has a point in it."""
    runner = helpers.load(helpers.ROOT / "benchmarks" / "figure_runs.py")
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(runner, "train", lambda run, to_stop: run.finished.write_text("{}"))
    all_flags = ("maze8 --data /a/b-c.npz", "maze8 --beta 0.1", "maze8 --beta 0.2", "a --model D", "a --model E")
    variants = {flags: flags for flags in all_flags}
    folders = runner.train_all("vin", variants, 2, tmp_path / "runs", 1)
    assert len(list((tmp_path / "runs").iterdir())) == 10
    assert all(path.parent == tmp_path / "runs" for paths in folders.values() for path in paths)


@pytest.mark.learning  # they train
def test_a_failed_run_stops_the_others_at_a_checkpoint(tmp_path, monkeypatch):
    """And so does Ctrl-C: what was stopped goes on, what had not begun is not begun."""
    runner = helpers.load(helpers.ROOT / "benchmarks" / "figure_runs.py")
    long = "maze --total-timesteps 1000000 --eval-every 1000000 --picture-every 1000000"
    variants = {"long": long, "wrong": "maze --gamma 7", "later": "shortcut"}
    with pytest.raises(Exception, match="--gamma"):
        runner.train_all("dyna_q", variants, 1, tmp_path / "runs", 2)
    (folder,) = [path for path in (tmp_path / "runs").iterdir() if path.is_dir()]
    assert "1000000" in folder.name and (folder / "checkpoint.pt").exists()
    assert not list((tmp_path / "runs").glob("*.json"))


def test_minutes_are_those_of_runs_that_were_never_stopped(tmp_path):
    runner = helpers.load(helpers.ROOT / "benchmarks" / "figure_runs.py")
    for name, seconds, resumed in (("a", 60, False), ("b", 240, False), ("c", 6_000, True)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"seconds": seconds, "resumed": resumed}))
    assert runner.minutes([tmp_path / name for name in "abc"]) == "2.5"
    assert runner.minutes([tmp_path / "c"]) == ""


@pytest.mark.learning  # they train
def test_the_networks_figures_come_from_finished_runs(tmp_path, capsys):
    runner = helpers.load(helpers.ROOT / "benchmarks" / "vin_figures.py")
    short = "maze8 --total-timesteps 20 --mazes 40 --test-mazes 10 --batch-mazes 4 --episodes 1"
    runner.main(runner.Args("controls", seeds=2, flags=short))
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| FCN |", "| CNN |"))]
    assert len(rows) == 2 and all(0 <= float(row.split("|")[2].split("±")[0]) < 1 for row in rows)
    runner.vin.main([*short.split(), "--run-dir", str(tmp_path / "run")])
    (tmp_path / "docs/figures").mkdir(parents=True)
    runner.main(runner.Args("film", run=tmp_path / "run", out=tmp_path))
    assert (tmp_path / "docs/figures/vin_sweeps.gif").stat().st_size > 1_000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "LARGER", {"Maze8-v0": ("Maze8-v0", 3)})
        runner.main(runner.Args("larger", run=tmp_path / "run"))
    assert "with K = 3: 0." in capsys.readouterr().out


def test_the_reactive_networks_are_the_papers():
    """The FCN is a convolution that spans the maze; the CNN sees the agent as a channel."""
    runner = helpers.load(helpers.ROOT / "benchmarks" / "vin_figures.py")
    vin, F = runner.vin, torch.nn.functional
    env = vin.make_env(vin.Args())
    mazes = vin.label(*env.unwrapped.sample(3, False), 7)
    fcn, cnn = runner.FCN(env, vin.Args()), runner.CNN(env, vin.Args())
    cells = torch.tensor([[9, 50], [10, 20], [0, 63]])
    first, second, third, last = (layer for layer in fcn.layers if isinstance(layer, torch.nn.Linear))
    y = F.conv2d(mazes.images, first.weight.view(150, 2, 15, 15), first.bias, padding=7).relu()
    for layer in (second, third):
        y = F.conv2d(y, layer.weight[:, :, None, None], layer.bias).relu()
    y = F.conv2d(y, last.weight[:, :, None, None]).flatten(2)
    found = fcn.attend(mazes.images, cells), cnn.attend(mazes.images, cells)
    for m, k in np.ndindex(3, 2):
        assert torch.allclose(found[0][m, k], y[m, :, cells[m, k]], atol=1e-4)
        here = torch.zeros(1, 1, 8, 8)
        here[0, 0, cells[m, k] // 8, cells[m, k] % 8] = 1
        assert torch.allclose(found[1][m, k], cnn.layers(torch.cat([mazes.images[m : m + 1], here], 1))[0], atol=1e-5)


@pytest.mark.learning  # they train
def test_the_curious_figures_come_from_finished_runs(tmp_path, monkeypatch, capsys):
    runner = helpers.load(helpers.ROOT / "benchmarks" / "icm_figures.py")
    short = "maze --envs 4 --horizon 25 --total-timesteps 800 --eval-every 400 --hidden 8 --model-hidden 8"
    writes_into(tmp_path, runner, monkeypatch)
    monkeypatch.setitem(runner.EXPERIMENTS, "maze", {"ICM": short, "PPO alone": f"{short} --reward extrinsic"})
    runner.main(runner.Args("maze", tmp_path / "runs", seeds=2, first_seed=3))
    made, table = (tmp_path / "benchmarks/results/icm_maze.csv").read_text(), capsys.readouterr().out
    for label, command in runner.EXPERIMENTS["maze"].items():
        rows = [x.split(",") for x in made.splitlines() if x.startswith(f"{label},")]
        last = [row[4] for row in rows if row[2] == "charts/tiles_visited" and row[3] == "800"]
        assert [row[1] for row in rows if row[2] == "losses/entropy" and row[3] == "800"] == ["3", "4"]
        assert len(last) == 2 and f"| `{command}` | 0, 0 | never, never | {', '.join(last)} |" in table
    assert "random moves,4,charts/tiles_visited,400," in made and "| random moves |" in table
    assert (tmp_path / "docs/figures/icm_maze.png").stat().st_size > 5_000
    assert runner.first_success([(10, 0.0), (20, 0.5), (30, 0.1)], 0) == "20"


def test_minimax_wins_prevents_a_win_and_plays_perfectly():
    boards = helpers.load(helpers.ROOT / "benchmarks" / "muzero_figures.py")
    muzero = boards.load("gumbel_muzero")
    game, one, two = muzero.ConnectFour(), *(boards.Minimax(muzero.ConnectFour(), depth) for depth in (1, 2))
    game.opponent = None
    stones, _ = game.reset()
    for action in (0, 6, 0, 6, 0):
        assert one.best(stones) == two.best(stones) == [*range(7)]
        stones, *_ = game.step(action)
    assert one.best(stones) == [*range(7)] and two.best(stones) == [0]
    assert one.best(game.step(6)[0]) == [0]

    agent, perfect = SimpleNamespace(args=muzero.BOARD), boards.Minimax(muzero.TicTacToe(), math.inf)

    def search(_, obs):
        moves = np.array([perfect(stones) for stones in obs])
        return SimpleNamespace(prior=np.eye(9)[moves], visits=np.eye(9)[moves])

    player = SimpleNamespace(make_env=muzero.make_env, search=search)
    assert boards.play(player, agent, perfect, 20).tolist() == [[0, 10, 0], [0, 10, 0]]
    (won, _, lost), (won_second, _, lost_second) = boards.play(player, agent, None, 100)
    assert won > 35 and 15 < won_second < won and lost == lost_second == 0
    count, shares = boards.mistakes(player, agent, perfect)
    assert count == 4_520 and shares == [pytest.approx(0.4203, abs=1e-4), 0, 0]  # the game has so many positions


def test_boards_are_measured_from_run_folders(tmp_path, capsys):
    boards, folders = helpers.load(helpers.ROOT / "benchmarks" / "muzero_figures.py"), []
    for name, preset in (("muzero", "tictactoe"), ("gumbel_muzero", "connect4")):
        muzero = boards.load(name)
        args = replace(muzero.PRESETS[preset][1], simulations=2, channels=2, hidden=2, device="cpu")
        agent = muzero.Agent(muzero.make_env(args), args)
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        state = {"algorithm": name, "args": asdict(args), "agent": agent.state_dict()}
        torch.save(state, folders[-1] / "checkpoint.pt")
    boards.main(boards.Args(tuple(folders), games=6, save=True, out=tmp_path))
    table, text = capsys.readouterr().out, (tmp_path / "benchmarks/results/muzero_boards.csv").read_text()
    rows = [line.split(",") for line in text.splitlines()[1:]]
    for run, opponents in (("muzero", ("random", "perfect")), ("gumbel_muzero", ("random", "minimax 2"))):
        for name, side in itertools.product(opponents, ("agent", "opponent")):
            counts = [x for folder, tag, x in rows if folder == run and tag.startswith(f"{name}/{side} begins/")]
            assert sum(map(int, counts)) == 3 and f"| {name} | {side} | {' | '.join(counts)} |" in table
    assert "muzero,mistakes/random moves,0.42035\n" in text and "\ngumbel_muzero,mistakes" not in text
    with pytest.raises(SystemExit):
        boards.main(boards.Args(()))


def writes_into(folder, runner, monkeypatch):
    """The figures and tables of a runner."""
    for name in ("docs/figures", "benchmarks/results"):
        (folder / name).mkdir(parents=True)
    monkeypatch.setattr(runner, "ROOT", folder)


def test_the_plain_planner_is_the_files():
    """What the sweeps are timed against computes the same, with the same gradient."""
    vin = speed.vin
    torch.manual_seed(0)
    net, x = vin.Agent(vin.make_env(vin.Args()), vin.Args()), torch.randn(3, 2, 8, 8)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(20)
    plans = net.plan(x, 4), speed.wide_plan(net, x, 4)
    assert torch.allclose(*plans, rtol=1e-3, atol=1e-3 * float(plans[1].abs().max()))
    wanted = (net.f_1.weight, net.w_r.weight, net.w_v.weight)
    for one, other in zip(*(torch.autograd.grad(plan.square().sum(), wanted) for plan in plans), strict=True):
        assert torch.allclose(one, other, atol=1e-3 * float(other.abs().max()))
