"""benchmarks/figures.py, muzero_figures.py and speed.py: they run, and what they compute is right."""

import itertools
import json
import math
import re
import shutil
from dataclasses import asdict, replace
from types import SimpleNamespace

import gymnasium as gym
import helpers
import numpy as np
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

figures = helpers.load(helpers.ROOT / "benchmarks" / "figures.py")
speed = helpers.load(helpers.ROOT / "benchmarks" / "speed.py")
report = helpers.load(helpers.ROOT / "benchmarks" / "report.py")
boards = helpers.load(helpers.ROOT / "benchmarks" / "muzero_figures.py")


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    (tmp_path / "docs/figures").mkdir(parents=True)
    shutil.copytree(helpers.ROOT / "benchmarks/results", tmp_path / "benchmarks/results")
    return tmp_path


def test_every_figure_on_a_page_has_its_command():
    pages = "".join(page.read_text() for page in (helpers.ROOT / "docs").glob("*.md"))
    named = set(re.findall(r"benchmarks/figures\.py (\w+)", pages))
    assert len(named) > 10 and named <= set(figures.NAMES)
    assert set(figures.NAMES) == {*figures.MEASURE, *figures.EARLIER, *figures.WITHOUT_NUMBERS}
    drawn = {name for name, shown in figures.SHOWN.items() if shown.panels}
    assert all(f"(figures/{name}.png)" in pages for name in drawn)
    assert all(figures.csv_path(name).is_file() for name in (*figures.MEASURE, *figures.EARLIER))


def test_a_figure_and_its_table_come_from_the_csv(root, capsys):
    figures.main(figures.Args("pets_ablation"))
    assert (root / "docs/figures/pets_ablation.png").stat().st_size > 5_000
    assert "| PE-TS1 | 176.0 ± 5.2 | 176.9 ± 4.7 | 103.7 ± 8.5 | 180.1, 170.8, 179.7 |" in capsys.readouterr().out
    figures.main(figures.Args("dyna_q_sweeping"))
    assert "| 6 × 9, α = 0.5 | 8,478 | 1,002 | 8.5 | 29 and 26 of 30 |" in capsys.readouterr().out


def test_long_runs_are_read_or_their_command_is_named(tmp_path):
    args, commands = figures.Args("icm_maze", seeds=2, runs=tmp_path), {"ICM": "icm maze --beta 0.1"}
    with pytest.raises(SystemExit, match=r'run\.py "1-2 icm maze --beta 0\.1"'):
        figures.finished(commands, ("a/b",), args)
    for seed in (1, 2):
        run = figures.place("icm", "maze --beta 0.1", seed, tmp_path)
        with SummaryWriter(str(run.folder)) as writer:
            writer.add_scalar("a/b", seed / 2, 10)
            writer.add_scalar("other", 9, 10)
        run.finished.write_text(json.dumps({}))
    assert figures.finished(commands, ("a/b", "c/d"), args) == [("ICM", 1, "a/b", 10, 0.5), ("ICM", 2, "a/b", 10, 1)]


def test_an_exact_evaluation_takes_the_place_of_the_sampled_one():
    before = figures.dyna_q.Run.evaluate
    curves = figures.train_dyna_q("frozenlake --total-timesteps 500 --eval-every 250", 1)
    P, r = figures.tabular_dp.model_of(gym.make("FrozenLake8x8-v1"))
    *_, best = figures.tabular_dp.value_iteration(P, r, figures.tabular_dp.Args(gamma=0.99))
    values = curves["eval/exact_value"][:, 2]
    assert len(values) == 2 and all(0 <= value <= best[0] for value in values)
    assert "eval/episodic_return" not in curves and figures.dyna_q.Run.evaluate is before


def test_updates_until_the_shortest_path():
    made = {planner: figures.updates_until_shortest(planner, 1, 1.0, 1) for planner in ("dyna", "prioritized")}
    assert made["prioritized"] < made["dyna"] < math.inf
    assert figures.updates_until_shortest("dyna", 1, 1.0, 1, limit=10) == math.inf


def test_minimax_wins_prevents_a_win_and_plays_perfectly():
    muzero = helpers.module("gumbel_muzero")
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


def test_boards_are_measured_from_run_folders(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(boards, "ROOT", tmp_path)
    folders = []
    for name, preset in (("muzero", "tictactoe"), ("gumbel_muzero", "connect4")):
        muzero = helpers.module(name)
        args = replace(muzero.PRESETS[preset][1], simulations=2, channels=2, hidden=2, device="cpu")
        agent = muzero.Agent(muzero.make_env(args), args)
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        state = {"algorithm": name, "args": asdict(args), "agent": agent.state_dict()}
        torch.save(state, folders[-1] / "checkpoint.pt")
    boards.main(boards.Args(tuple(folders), games=6, save=True))
    table, text = capsys.readouterr().out, (tmp_path / "benchmarks/results/muzero_boards.csv").read_text()
    rows = [line.split(",") for line in text.splitlines()[1:]]
    for run, opponents in (("muzero", ("random", "perfect")), ("gumbel_muzero", ("random", "minimax 2"))):
        for name, side in itertools.product(opponents, ("agent", "opponent")):
            counts = [x for folder, tag, x in rows if folder == run and tag.startswith(f"{name}/{side} begins/")]
            assert sum(map(int, counts)) == 3 and f"| {name} | {side} | {' | '.join(counts)} |" in table
    assert "muzero,mistakes/random moves,0.42035\n" in text and "\ngumbel_muzero,mistakes" not in text
    with pytest.raises(SystemExit):
        boards.main(boards.Args(()))


@pytest.mark.learning  # it trains
def test_the_cosine_of_gradients_is_that_of_the_simulator(tmp_path, monkeypatch):
    """A critic that knows the return of each action has the simulator's slope."""
    mage = figures.mage
    mage.main(["pendulum", "--total-timesteps", "200", "--run-dir", str(tmp_path / "run")])
    agent = mage.load_policy(str(tmp_path / "run"))
    slope = figures.gradient_cosine(agent, count=4)
    assert -1 <= slope <= 1 and slope == figures.gradient_cosine(agent, count=4)
    monkeypatch.setattr(figures, "discounted_return", lambda agent, env, state, action: believed(state, action))

    def believed(state, action):
        s = torch.tensor([[math.cos(state[0]), math.sin(state[0]), state[1]]], dtype=torch.float32)
        return float(agent.q(agent.critics, s, torch.tensor([[action]])).amin(0).detach())

    assert figures.gradient_cosine(agent, count=4, step=0.05) > 0.95


def test_the_reactive_networks_are_the_papers():
    """The FCN is a convolution that spans the maze; the CNN sees the agent as a channel."""
    vin, F = figures.vin, torch.nn.functional
    env = vin.make_env(vin.Args())
    mazes = vin.label(*env.unwrapped.sample(3, False), 7)
    fcn, cnn = figures.FCN(env, vin.Args()), figures.CNN(env, vin.Args())
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


def test_speed_times_what_its_cases_name(tmp_path):
    assert set(speed.FILES) >= set(helpers.TRAINED)
    for case in speed.CASES:
        module = helpers.module(case.file)
        module.parse_args(case.words.split())
        owner = module
        for part in case.function.split("."):
            owner = getattr(owner, part)
    path = tmp_path / "speed.csv"
    path.write_text("file,hot_path,unit,rate,threads,torch\nicm,as it was,steps/s,5,1,2\ndyna_q,old,x,5,1,2\n")
    speed.main(speed.Args(seconds=0, threads=1, only=("matrix product", "tabular_dp", "dyna_q"), save=path))
    rows = report.read_csv(path)
    assert [row["file"] for row in rows] == ["matrix product", *["tabular_dp"] * 4, *["dyna_q"] * 4, "icm"]
    assert rows[-1]["hot_path"] == "as it was" and all(float(row["rate"]) > 0 for row in rows)


@pytest.mark.learning  # minutes
def test_speed_of_every_file(capsys):
    speed.main(speed.Args(seconds=0, threads=1, large=False))
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert {row[0].strip("| ") for row in rows[1:]} >= set(speed.FILES)
    assert sum("GFLOP/s" in row[3] for row in rows) > 5
