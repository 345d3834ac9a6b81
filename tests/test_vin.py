"""The mathematics of algos/vin.py against slow and obvious references."""

import math
from dataclasses import replace

import gymnasium as gym
import helpers
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from torch.nn import functional as F

vin = helpers.module("vin")
ARGS = vin.Args(iterations=4, q_channels=6, reward_channels=9)
DATA = helpers.ROOT.parent / "shared" / "data" / "gridworld_8x8.npz"


def some_mazes(count=20, n=8, seed=0, paths=7, test=False):
    torch.manual_seed(seed)
    return vin.label(*gym.make(f"Maze{n}-v0").unwrapped.sample(count, test), paths)


def network(scale=0.3, seed=0, **changes):
    torch.manual_seed(seed)
    agent = vin.Agent(vin.make_env(ARGS), replace(ARGS, **changes))
    for p in agent.parameters():
        p.data = scale * torch.randn(p.shape)
    return agent


@pytest.mark.parametrize("seed", range(20))
def test_paths_are_shortest_and_each_is_counted_once(seed):
    """Any walls, also mazes in two parts. A length that a path has and that no move can shorten is the shortest."""
    torch.manual_seed(seed)
    m = 2 + seed % 6
    n, paths, goal = m + 2, 1 + seed % 5, (1 + seed % m, 1 + seed // 6 % m)
    walls = F.pad(torch.rand(1, m, m) < 0.4, (1, 1, 1, 1), value=True)
    walls[0, goal[0], goal[1]] = False
    found = vin.label(walls, torch.tensor([goal]), paths)
    distance, move, left = (x.view(n, n) for x in (found.distance, found.expert, found.visits.clone()))
    ways = [(a, *way, math.hypot(*way)) for a, way in enumerate(vin.MOVES)]
    free, starts = [cell for cell in np.ndindex(n, n) if not walls[0][cell] and cell != goal], 0
    for r, c in sorted(free, key=lambda cell: -distance[cell]):
        ahead = [length + distance[r + i, c + j].item() for _, i, j, length in ways]
        assert distance[r, c].item() == pytest.approx(min(ahead), abs=1e-5)
        if min(ahead) < math.inf:
            assert move[r, c] == max(a for a in range(8) if ahead[a] < min(ahead) + 1e-3)
            new, length, first = int(left[r, c] > 0), 0.0, distance[r, c].item()
            starts += new
            while (r, c) != goal:  # take the path away again
                left[r, c] -= new
                _, i, j, cost = ways[move[r, c]]
                r, c, length = r + i, c + j, length + cost
            assert length == pytest.approx(first, abs=1e-4)
    assert distance[goal] == 0 and distance[walls[0]].isinf().all()
    assert torch.equal(found.open().view(n, n), distance.isfinite() & (distance > 0))
    assert (left == 0).all() and starts == min(paths, int(found.open().sum()))


def test_paths_start_anywhere():
    walls = torch.ones(400, 6, 6, dtype=torch.bool)
    walls[:, 1, 1:5] = False
    visits = vin.label(walls, torch.tensor([[1, 1]]).expand(400, -1), 1).visits[:, 7:11]
    assert visits.mean(0).tolist() == pytest.approx([0, 1, 2 / 3, 1 / 3], abs=0.08)


@pytest.mark.parametrize(("n", "count", "share"), [(8, 800, 0.498), (16, 400, 0.3897), (28, 200, 0.3162)])
def test_mazes_are_as_full_as_the_papers(n, count, share):
    """Share of walls in the official data."""
    found = some_mazes(count, n)
    walls, goals = found.images[:, 0] > 0, found.images[:, 1].nonzero()
    assert walls.float().mean() == pytest.approx(share, abs=0.015)
    assert walls[:, [0, -1]].all() and walls[:, :, [0, -1]].all()
    assert goals[:, 0].tolist() == [*range(count)] and {*goals[:, 1:].flatten().tolist()} == {*range(1, n - 1)}
    assert {*found.images[:, 1].unique().tolist()} == {0, 10} and {*found.images[:, 0].unique().tolist()} == {0, 1}
    assert not walls[tuple(goals.T)].any() and found.open().any(1).all()


def test_an_obstacle_is_a_disc_or_a_rectangle():
    """In an open field: rows, columns and cells. About 1,500 · ½ · (8 / 16)² or less lie inside and are discs."""
    torch.manual_seed(0)
    found, edge, plus, disc = [], [0, 1, -1, -2], (3, 3, 5), (5, 5, 21)
    for walls in vin.Maze(16, 1, 2).sample(1_500, False)[0][:, 1:-1, 1:-1].numpy():
        if walls.any() and not (walls[edge].any() or walls[:, edge].any()):
            found.append((*(np.ptp(np.nonzero(walls.any(axis))[0]) + 1 for axis in (1, 0)), int(walls.sum())))
    assert {*found} == {(1, 1, 1), (1, 2, 2), (2, 1, 2), (2, 2, 4), plus, disc}
    assert 110 < found.count(plus) + found.count(disc) < 230


def test_no_maze_is_for_training_and_for_tests():
    """With one obstacle there are so few mazes that both would be sampled."""
    env, keys = vin.Maze(6, 1, 0), []
    for test in (False, True):
        keys.append({(*w.flatten().tolist(), *g.tolist()) for w, g in zip(*env.sample(600, test), strict=True)})
    assert not keys[0] & keys[1] and min(len(found) for found in keys) > 60 and len(env.sample(7, False)[0]) == 7


def test_the_planner_is_the_papers_convolutions():
    """As in the official code: 150 channels, 1×1, then K times both kernels on both maps, and once more."""
    agent, x = network().double(), some_mazes(4).images.double()
    r = agent.f_2(agent.f_1(x))
    kernel, v = torch.cat([agent.w_r.weight, agent.w_v.weight], 1), torch.zeros_like(r)
    for _ in range(4):
        v = F.conv2d(torch.cat([r, v], 1), kernel, padding=1).max(1, keepdim=True)[0]
    expected, q = F.conv2d(torch.cat([r, v], 1), kernel, padding=1), agent.plan(x, 4)
    assert torch.allclose(agent.reward(x), r) and torch.allclose(q, expected, rtol=1e-9) and q.shape == (4, 6, 8, 8)
    wanted, weight = [*agent.parameters()][:-1], torch.randn(q.shape, dtype=torch.float64)
    gradients = [torch.autograd.grad((y * weight).sum(), wanted, retain_graph=True) for y in (q, expected)]
    assert all(torch.allclose(g, h, rtol=1e-8) and g.abs().max() > 0 for g, h in zip(*gradients, strict=True))


@pytest.mark.parametrize("n", [8, 16])
@torch.no_grad()
def test_with_hand_set_kernels_it_is_value_iteration_on_the_maze(n):
    """R̄ = −1 in free cells, 0 at the goal, −1,000 in walls. A channel per move: W_R has its cost at the cell itself,
    W_V a 1 in its direction; the ninth stays."""
    agent = network(0.0, q_channels=9, reward_channels=2, iterations=60)
    agent.f_1.weight[0, :, 1, 1], agent.f_1.bias[0] = torch.tensor([-999.0, 0.1]), -1.0
    agent.f_2.weight[0, 0], agent.out.weight[:, :8] = 1.0, torch.eye(8)
    for a, (i, j) in enumerate((*vin.MOVES, (0, 0))):
        agent.w_r.weight[a, 0, 1, 1], agent.w_v.weight[a, 0, 1 + i, 1 + j] = math.hypot(i, j) or 1.0, 1.0
    found = some_mazes(30, n)
    known, values = found.distance.isfinite(), vin.predict(agent, found)[1]
    assert torch.allclose(values[known], -found.distance[known], atol=1e-4) and found.distance[known].max() > n
    metrics = vin.heldout_metrics(agent, found)
    assert metrics["eval/success_rate"] == 1 and metrics["eval/trajectory_difference"] == pytest.approx(0, abs=1e-4)
    assert metrics["model/value_correlation"] == pytest.approx(1, abs=1e-3)


def test_fresh_weights_are_small_and_attention_reads_the_agents_own_cell():
    torch.manual_seed(0)
    agent = vin.Agent(vin.make_env(ARGS), vin.Args())
    for p in (agent.f_1.weight[:, :, 1, 1], *[*agent.parameters()][1:]):
        assert p.std().item() == pytest.approx(0.01, rel=0.3)
    assert (agent.f_1.weight != 0).sum() == 300
    agent, found = network(), some_mazes(3)
    q, moves = agent.plan(found.images, 4), vin.predict(agent, found)[0].argmax(-1)
    for m, row, col in np.ndindex(3, 8, 8):
        expected = agent.out.weight @ q[m, :, row, col]
        assert torch.allclose(agent.attend(q, torch.tensor([[row * 8 + col]] * 3))[m, 0], expected, atol=1e-6)
        action = agent({"image": found.images[m].numpy(), "position": (row, col)})
        assert action == moves[m, row * 8 + col] == expected.argmax()


def test_walks_are_the_environments_episodes():
    """A bad network: walks that arrive, crash, and take too long. The environment is played cell by cell."""
    found, agent = some_mazes(12, test=True), network(0.2, seed=3)
    logits, _ = vin.predict(agent, found)
    moves = logits.argmax(-1)
    ends, lengths = vin.walk(found, moves)
    env, kinds, arrivals, excess, walked = vin.Maze(8, 30, 0), set(), [], [], []
    for m in range(12):
        env.maze, of_maze = found.rows([m]), []
        for start in found.open()[m].nonzero()[:, 0].tolist():
            env.cell, env.length, env.limit = start, 0.0, 2 * found.distance[m, start].item() - 1e-4
            over = (False, False)
            while not any(over):
                obs, r, *over, _ = env.step(int(moves[m, env.cell]))
            assert tuple(obs["position"]) == divmod(ends[m, start].item(), 8)
            assert lengths[m, start].item() == pytest.approx(env.length, abs=1e-4)
            assert r == (ends[m, start] == found.distance[m].argmin())
            kinds.add((r, *over))
            of_maze.append(r)
            walked.append(env.length)
            excess += [env.length - found.distance[m, start].item()] if r else []
        arrivals.append(np.mean(of_maze))
    assert kinds == {(1, True, False), (0, True, False), (0, False, True)}
    expected, metrics = (np.mean(arrivals), np.mean(walked), np.mean(excess)), vin.heldout_metrics(agent, found)
    assert vin.walk_metrics(found, moves) == pytest.approx(expected, abs=1e-4)
    nll = -logits.log_softmax(-1).gather(2, found.expert[..., None])[..., 0]
    expected = expected[0], expected[2], np.average(nll, weights=found.visits)
    assert [*metrics.values()][:3] == pytest.approx(expected, abs=1e-3)


def test_the_environment_plays_test_mazes_from_any_cell():
    env, starts = gym.make("Maze8-v0", render_mode="rgb_array").unwrapped, set()
    check_env(env)
    for seed in range(30):
        wall, goal = (torch.from_numpy(image).flatten().nonzero()[:, 0] for image in env.reset(seed=seed)[0]["image"])
        assert int(wall.sum() + goal // 8) % 2 == 1 and env.maze.open()[0, env.cell] and env.length == 0
        assert env.limit == pytest.approx(2 * env.maze.distance[0, env.cell].item(), abs=2e-4)
        starts.add(env.cell)
    assert len(starts) > 10


def public_layout(path, change=lambda arrays: None):
    """One state per row, shuffled, with labels that are not ours; the test has four of training's mazes, too."""
    training, more, arrays = some_mazes(30, paths=3), some_mazes(9, seed=1, paths=3), []
    training.expert.copy_((training.expert + 1) % 8)
    test = vin.Mazes(*(torch.cat([x[:4], y]) for x, y in zip(training, more, strict=True)))
    for found in (training, test):
        states = torch.cat([(found.visits >= times).nonzero() for times in (1, 2, 3)])
        maze, cell = states[torch.randperm(len(states))].T
        columns = found.images[maze], cell // 8, cell % 8, found.expert[maze, cell]
        arrays += [x.numpy().astype(np.uint8) for x in columns]
    change(arrays)
    np.savez(path, *arrays)
    return training, more


def test_public_data_are_read_as_they_were_written(tmp_path):
    for written, read in zip(public_layout(tmp_path / "d.npz"), vin.read_data(tmp_path / "d.npz"), strict=True):
        rows = [next(m for m, x in enumerate(read.images) if torch.equal(x, image)) for image in written.images]
        found = read.rows(rows)
        assert len(read.images) == len(rows) and torch.equal(found.visits, written.visits)
        assert torch.equal(found.distance, written.distance)
        assert torch.equal(found.expert[found.visits > 0], written.expert[found.visits > 0])


def test_data_of_another_layout_are_refused(tmp_path):
    for number, change in ((0, lambda x: x[:, 0]), (5, lambda x: x[1:]), (3, lambda x: x + 8), (1, lambda x: x * 0)):
        public_layout(tmp_path / "d.npz", lambda arrays: arrays.__setitem__(number, change(arrays[number])))  # noqa: B023
        with pytest.raises(vin.UserError, match="layout"):
            vin.read_data(tmp_path / "d.npz")


@pytest.mark.skipif(not DATA.is_file(), reason="the public data are not here")
def test_the_public_data_load_and_train(tmp_path, monkeypatch):
    found, read = [], vin.read_data
    monkeypatch.setattr(vin, "read_data", lambda path: found.extend(read(path)) or found)
    vin.main(["--data", str(DATA), "--total-timesteps", "60", "--episodes", "1", "--run-dir", str(tmp_path / "run")])
    assert [len(mazes.images) for mazes in found] == [2_808, 453] and found[0].visits.sum() == 77_760
    assert helpers.scalars(tmp_path / "run")["eval/success_rate"][60] > 0.15


def test_an_epoch_shows_each_maze_once_and_only_cells_on_its_paths(tmp_path, monkeypatch):
    images, cells, rates, plan, attend, step = [], [], [], vin.Agent.plan, vin.Agent.attend, torch.optim.RMSprop.step
    mazes = some_mazes(10)
    monkeypatch.setattr(vin, "label", lambda *_: mazes)
    monkeypatch.setattr(vin, "predict", lambda *_: (torch.zeros(10, 64, 8), None))
    monkeypatch.setattr(vin.Agent, "plan", lambda *x: images.append(x[1]) or plan(*x))
    monkeypatch.setattr(vin.Agent, "attend", lambda *x: cells.append(x[2]) or attend(*x))
    monkeypatch.setattr(torch.optim.RMSprop, "step", lambda x: rates.append(x.param_groups[0]["lr"]) or step(x))
    monkeypatch.setattr(vin.Run, "due", lambda *_: False)
    flags = "--total-timesteps 8 --batch-mazes 4 --batch-cells 50 --learning-rate 0.02 --hold-steps 2 --decay-steps 3"
    vin.main([*flags.split(), "--run-dir", str(tmp_path / "run")])
    assert [len(x) for x in images] == [4, 4, 2, 4, 4, 2, 4, 4]
    visits = {image.numpy().tobytes(): of_maze for image, of_maze in zip(mazes.images, mazes.visits, strict=True)}
    shown = [image.numpy().tobytes() for batch in images for image in batch]
    assert {*shown[:10]} == {*shown[10:20]} == {*visits} and shown[:10] != shown[10:20]
    for key, some in zip(shown, torch.cat(cells), strict=True):
        assert (visits[key][some] > 0).all() and len(some) == 50
    assert helpers.scalars(tmp_path / "run")["losses/imitation"][3] == pytest.approx(math.log(8), abs=0.1)
    assert rates == pytest.approx([0.02] * 3 + [0.02 * 0.1 ** (k / 3) for k in range(1, 6)])


def test_your_own_mazes(monkeypatch, tmp_path):
    class Corridor(vin.Maze):
        def sample(self, count, test, generator=None):
            walls = torch.ones(count, 9, 9, dtype=torch.bool)
            walls[:, 3, 1:-1] = False
            return walls, torch.stack([torch.full((count,), 3), torch.arange(count) % 7 + 1], 1)

    spec = gym.envs.registration.EnvSpec("Corridor-v0", lambda **_: Corridor(9, 1, 1), max_episode_steps=99)
    monkeypatch.setitem(gym.registry, "Corridor-v0", spec)
    flags = "--env-id Corridor-v0 --mazes 30 --test-mazes 7 --batch-mazes 10 --episodes 2 --total-timesteps 150"
    vin.main([*flags.split(), "--run-dir", str(tmp_path / "run")])
    assert helpers.scalars(tmp_path / "run")["eval/success_rate"][150] > 0.9
    with pytest.raises(vin.UserError, match="not a maze"):
        vin.make_env(vin.Args("CartPole-v1"))
