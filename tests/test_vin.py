"""The mathematics of algos/vin.py against slow and obvious references."""

import heapq
import math
import shutil
import signal

import gymnasium as gym
import helpers
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

vin = helpers.module("vin")
Args = vin.Args
CPU = torch.device("cpu")
QUICK = "--mazes 60 --test-mazes 20 --batch-mazes 6 --batch-cells 5 --iterations 4 --eval-episodes 3 --log-every 60"


def some_mazes(count=20, n=8, seed=0, obstacles=30, size=0):
    return vin.random_mazes(count, n, obstacles, size, np.random.default_rng(seed))


def network(kind="vin", n=8, seed=0, scale=0.3, **settings):
    torch.manual_seed(seed)
    net = {"vin": vin.VIN, "cnn": vin.CNN, "fcn": vin.FCN}[kind](2, n, 8, Args(**settings))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(scale * torch.randn(p.shape))
    return net


def keys(mazes):
    return {(w.numpy().tobytes(), tuple(g.tolist())) for w, g in zip(mazes.walls, mazes.goals, strict=True)}


def cells_of(mazes, seed=0, each=3):
    return vin.random_starts(mazes, each, np.random.default_rng(seed))


# ── (1) Mazes and shortest paths ──────────────────────────────────────────────────────────────────────────────────


def dijkstra(walls, goal):
    """Lengths of shortest paths to the goal, cell by cell."""
    n, found, queue = len(walls), {}, [(0.0, *goal)]
    while queue:
        length, row, col = heapq.heappop(queue)
        if (row, col) in found or walls[row][col]:
            continue
        found[row, col] = length
        for i in (-1, 0, 1):
            for j in (-1, 0, 1):
                if (i or j) and 0 <= row + i < n and 0 <= col + j < n:
                    heapq.heappush(queue, (length + math.hypot(i, j), row + i, col + j))
    return np.array([[found.get((row, col), math.inf) for col in range(n)] for row in range(n)])


@st.composite
def mazes(draw):
    """Any walls within a wall, and a goal in a free cell: also mazes in two parts, which random_mazes seldom draws."""
    n = draw(st.integers(4, 9))
    walls = np.ones((n, n), bool)
    inside = (n - 2) ** 2
    walls[1:-1, 1:-1] = np.array(draw(st.lists(st.booleans(), min_size=inside, max_size=inside))).reshape(n - 2, n - 2)
    goal = (draw(st.integers(1, n - 2)), draw(st.integers(1, n - 2)))
    walls[goal] = False
    walls, goals = torch.from_numpy(walls)[None], torch.tensor([goal])
    return vin.Mazes(walls, goals, vin.shortest(walls, goals))


@settings(max_examples=60)
@given(mazes())
def test_distances_are_dijkstras(maze):
    assert np.allclose(maze.distance[0], dijkstra(maze.walls[0].tolist(), maze.goals[0].tolist()), atol=1e-5)


@settings(max_examples=60)
@given(mazes(), st.integers(1, 9))
def test_the_experts_paths_are_as_short_as_can_be(maze, paths):
    """Each lesson followed to the goal is as long as Dijkstra says; as many different starts as were asked for."""
    expected = dijkstra(maze.walls[0].tolist(), maze.goals[0].tolist())
    assume((np.isfinite(expected) & (expected > 0)).any())
    taught = vin.lessons(maze, paths, np.random.default_rng(0))
    move = {(r, c): a for r, c, a in zip(*(x.tolist() for x in taught[:3]), strict=True)}
    free = int((np.isfinite(expected) & (expected > 0)).sum())
    assert taught.first.tolist() == [0, len(taught.row)]
    assert min(paths, free) <= len(move)
    for start in move:
        cell, length = start, 0.0
        while cell in move:
            i, j = vin.MOVES[move[cell]]
            cell, length = (cell[0] + i, cell[1] + j), length + math.hypot(i, j)
        assert cell == tuple(maze.goals[0].tolist())
        assert length == pytest.approx(expected[start], abs=1e-4)


def test_lessons_of_many_mazes_are_those_of_each():
    mazes = some_mazes(30)
    rng = np.random.default_rng(3)
    taught = vin.lessons(mazes, 7, rng)
    start = vin.random_starts(mazes, 7, np.random.default_rng(3))
    first = torch.tensor([(start[0] < m).sum() for m in range(31)])
    assert (start[0].diff() >= 0).all() and start[0].bincount().max() == 7
    for m in range(30):
        one = vin.Mazes(*(column[m : m + 1] for column in mazes))
        best = vin.expert_moves(one)[0]
        expected = []
        for _, row, col in start[:, first[m] : first[m + 1]].T.tolist():
            while one.distance[0, row, col] > 0:
                expected.append((row, col, int(best[row, col])))
                row, col = row + vin.MOVES[expected[-1][2]][0], col + vin.MOVES[expected[-1][2]][1]
        rows = slice(taught.first[m], taught.first[m + 1])
        assert list(zip(*(x[rows].tolist() for x in taught[:3]), strict=True)) == expected


def test_a_best_move_is_one_that_comes_nearer_by_its_own_length():
    mazes = some_mazes(10)
    best = vin.best_moves(mazes)
    for m, row, col in cells_of(mazes, each=5).T.tolist():
        for a, (i, j) in enumerate(vin.MOVES):
            there = mazes.distance[m, row + i, col + j].item() + math.hypot(i, j)
            assert best[a, m, row, col] == (abs(there - mazes.distance[m, row, col].item()) < 1e-4)


def test_starts_are_different_cells_from_which_there_is_a_way():
    mazes = some_mazes(50)
    start = cells_of(mazes, each=60)  # more than there are
    assert len(set(map(tuple, start.T.tolist()))) == start.shape[1] == vin.starts(mazes).sum()
    few = [cells_of(mazes, seed=seed, each=1) for seed in range(300)]
    met = torch.stack(few)[:, 1:, 0]
    assert len(set(map(tuple, met.tolist()))) == vin.starts(mazes)[0].sum()  # each of them may be drawn


@pytest.mark.parametrize(("n", "share", "room"), [(8, 0.498, 0.008), (16, 0.3897, 0.012), (28, 0.3162, 0.015)])
def test_mazes_are_as_full_as_the_papers(n, share, room):
    """Share of walls in the official data: 8 × 8 and 16 × 16 of training, 28 × 28 of the test."""
    mazes = some_mazes(1_000, n, 0, *vin.OFFICIAL[n])
    assert mazes.walls.float().mean() == pytest.approx(share, abs=room)
    assert mazes.walls[:, [0, -1]].all() and mazes.walls[:, :, [0, -1]].all()
    assert not mazes.walls[torch.arange(1_000), mazes.goals[:, 0], mazes.goals[:, 1]].any()
    assert vin.starts(mazes).flatten(1).any(1).all()
    assert set(mazes.goals.flatten().tolist()) == set(range(1, n - 1))


def test_one_obstacle_is_a_disc_or_a_rectangle():
    """In an open field: how many cells, and of what extent."""
    found = set()
    for mazes in (some_mazes(1_500, 16, 0, 1, 2), some_mazes(300, 16, 1, 1, 1), some_mazes(300, 16, 2, 1, 0)):
        shapes = set()
        for walls in mazes.walls[:, 1:-1, 1:-1].numpy():
            if walls[[0, 1, -1, -2]].any() or walls[:, [0, 1, -1, -2]].any() or not walls.any():
                continue  # at the edge it may be cut
            rows, cols = np.nonzero(walls.any(1))[0], np.nonzero(walls.any(0))[0]
            shapes.add((np.ptp(rows) + 1, np.ptp(cols) + 1, int(walls.sum())))
        found.add(frozenset(shapes))
    plus, disc = (3, 3, 5), (5, 5, 21)
    assert found == {
        frozenset({(1, 1, 1)}), frozenset({(1, 1, 1), plus}),
        frozenset({(1, 1, 1), (1, 2, 2), (2, 1, 2), (2, 2, 4), plus, disc}),
    }  # fmt: skip


def test_no_maze_that_is_tested_was_trained_on():
    """5 × 5 mazes are so few that many would come twice."""
    recipe = {"data": None, "n": 5, "obstacles": 4, "obstacle_size": 0, "mazes": 300, "test_mazes": 100, "paths": 2}
    training, _, test, tested = vin.make_mazes(**recipe, seed=0)

    assert len(test.walls) == 100 and len(tested.first) == 101
    assert keys(training).isdisjoint(keys(test))
    drawn = vin.random_mazes(100, 5, 4, 0, np.random.default_rng(5))
    assert not vin.unseen(drawn, training).all()  # without the check they would
    assert vin.make_mazes(**recipe, seed=0)[0] is training  # drawn once
    assert not torch.equal(vin.make_mazes(**recipe, seed=1)[0].walls, training.walls)


def test_a_world_is_the_same_for_the_same_seed():
    args = Args(mazes=30, test_mazes=20)
    vin.make_mazes.cache_clear()
    one = vin.make_arena(args)
    vin.make_mazes.cache_clear()
    two = vin.make_arena(args)
    assert helpers.differences(one._asdict(), two._asdict()) == []
    assert one.transfer.walls.shape == (20, 16, 16) and one.test.walls.shape == (20, 8, 8)
    assert vin.make_arena(Args(mazes=30, test_mazes=20, model="cnn")).transfer is None


# ── (2) Minibatches ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_batch_holds_lessons_of_its_own_mazes():
    mazes = some_mazes(12)
    taught, x = vin.lessons(mazes, 7, np.random.default_rng(0)), vin.images(mazes)
    chosen, seen = torch.tensor([4, 0, 11]), set()
    np.random.seed(0)
    for _ in range(200):
        batch = vin.draw_batch(chosen, x, taught, 5, 10**9)
        assert torch.equal(batch.images, x[chosen]) and len(batch.row) == 15
        for k, row, col, a in zip(*(c.tolist() for c in batch[1:5]), strict=True):
            seen.add((int(chosen[k]), row, col, a))
    expected = set()
    for m in chosen.tolist():
        rows = slice(taught.first[m], taught.first[m + 1])
        expected |= {(m, *lesson) for lesson in zip(*(c[rows].tolist() for c in taught[:3]), strict=True)}
    assert seen == expected
    assert [len(column) for column in vin.draw_batch(chosen, x, taught, 5, 7)[1:]] == [7] * 5


def test_images_are_walls_and_goal():
    mazes = some_mazes(3)
    x = vin.images(mazes)
    for m in range(3):
        row, col = mazes.goals[m].tolist()
        assert x[m, 1, row, col] == 10 and x[m, 1].sum() == 10
        assert torch.equal(x[m, 0] == 1, mazes.walls[m]) and set(x[m, 0].unique().tolist()) == {0.0, 1.0}


# ── (3) The planner ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_sweep_is_a_convolution_and_a_maximum_with_its_gradient():
    torch.manual_seed(0)
    rewards, kernel, value = (torch.randn(*s, dtype=torch.float64) for s in ((4, 25 * 3), (4, 9), (5, 5, 3)))
    q = F.conv2d(value.permute(2, 0, 1)[:, None], kernel.view(4, 1, 3, 3), padding=1)
    q = q + rewards.view(4, 5, 5, 3).permute(3, 0, 1, 2)
    assert torch.allclose(vin.Sweep.apply(rewards, kernel, value).permute(2, 0, 1), q.amax(1))
    parts = [x.requires_grad_() for x in (rewards, kernel, value)]
    assert torch.autograd.gradcheck(vin.Sweep.apply, parts)


def test_gathering_is_the_transpose_of_lending():
    """⟨neighbours(x), y⟩ = ⟨x, gathered(y)⟩"""
    x, y = torch.randn(6, 6, 4, dtype=torch.float64), torch.randn(3, 3, 6, 6, 4, dtype=torch.float64)
    assert (vin.neighbours(x) * y.view(9, -1)).sum().item() == pytest.approx((x * vin.gathered(y)).sum().item())
    around = vin.neighbours(x).view(3, 3, 6, 6, 4)
    for row, col, i, j in np.ndindex(6, 6, 3, 3):
        r, c = row + i - 1, col + j - 1
        expected = x[r, c] if 0 <= r < 6 and 0 <= c < 6 else torch.zeros(4, dtype=torch.float64)
        assert torch.equal(around[i, j, row, col], expected)


def test_the_planner_is_the_papers_convolutions():
    """As the official code has it: 150 channels, 1×1, then K times both kernels on both maps, and once more."""
    net, x = network(iterations=5, q_channels=6, reward_channels=9).double(), vin.images(some_mazes(4)).double()

    def slow(p):
        h = F.conv2d(x, p["h_kernel"], p["h_bias"], padding=1)
        r = F.conv2d(h, p["r_kernel"].view(1, -1, 1, 1))
        w = torch.stack([p["reward_kernel"].view(6, 3, 3), p["value_kernel"].view(6, 3, 3)], 1)
        v = torch.zeros_like(r)
        for _ in range(5):
            v = F.conv2d(torch.cat([r, v], 1), w, padding=1).max(1, keepdim=True)[0]
        return F.conv2d(torch.cat([r, v], 1), w, padding=1), r, v

    names = ("h_kernel", "h_bias", "r_kernel", "reward_kernel", "value_kernel")
    parameters, trace = dict(net.named_parameters()), []
    q, (expected, r, v) = net.plan(x, trace), slow(parameters)
    assert torch.allclose(q, expected, rtol=1e-9) and q.shape == (4, 6, 8, 8)
    assert torch.allclose(net.reward(x), r[:, 0]) and torch.allclose(trace[-1], v[:, 0]) and len(trace) == 5
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = [parameters[name] for name in names]
    for one, other in zip(*(torch.autograd.grad((y * weight).sum(), wanted) for y in (q, expected)), strict=True):
        assert torch.allclose(one, other, rtol=1e-8) and one.abs().max() > 0


def hand_set(net, ways):
    """R̄ = −1 in free cells, 0 at the goal, −1,000 in walls. Each channel is a move: W_R has its cost at the cell
    itself, W_V a 1 where it leads; the ninth stays where it is."""
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
        net.h_kernel[0, :, 1, 1], net.h_bias[0] = torch.tensor([-999.0, 1 / vin.GOAL]), -1.0
        net.r_kernel[0] = 1.0
        for a, (i, j) in enumerate(ways):
            net.reward_kernel[a, 4] = math.hypot(i, j) or 1.0
            net.value_kernel[a, 3 * (1 + i) + 1 + j] = 1.0
            if a < 8:
                net.out.weight[a, a] = 1.0


@pytest.mark.parametrize("n", [8, 16])
def test_with_hand_set_kernels_it_is_value_iteration_on_the_maze(n):
    """V̄ is minus the shortest path's length, in each cell that is free; and the agent walks it."""
    mazes = some_mazes(30, n, 0, *vin.OFFICIAL[n])
    net = network(n=n, q_channels=9, iterations=60, reward_channels=2)
    hand_set(net, (*vin.MOVES, (0, 0)))
    trace = []
    net.plan(vin.images(mazes), trace)
    on = mazes.distance.isfinite()
    assert mazes.distance[on].max() > n
    assert torch.allclose(trace[-1][on], -mazes.distance[on], atol=1e-5)
    scores = vin.walk_metrics(net, mazes, cells_of(mazes), CPU)
    assert scores == {"success_rate": 1.0, "trajectory_difference": pytest.approx(0, abs=1e-5)}


def test_each_sweep_is_one_of_tabular_value_iteration():
    """A loop over cells and moves, after each of seven sweeps; longer ways are not seen yet."""
    mazes = some_mazes(3)
    net, trace = network(q_channels=9, iterations=7, reward_channels=2), []
    hand_set(net, (*vin.MOVES, (0, 0)))
    net.plan(vin.images(mazes), trace)
    for m in range(3):
        R = np.where(mazes.walls[m], -1000.0, -1.0)
        R[tuple(mazes.goals[m])] = 0.0
        V = np.zeros((8, 8))
        for k in range(7):
            old = np.pad(V, 1)
            for row, col in np.ndindex(8, 8):
                stay = R[row, col] + old[row + 1, col + 1]
                V[row, col] = max(stay, *(math.hypot(i, j) * R[row, col] + old[row + 1 + i, col + 1 + j]
                                          for i, j in vin.MOVES))  # fmt: skip
            assert np.allclose(trace[k][m].detach(), V, atol=1e-4)


@pytest.mark.parametrize("sweeps", [1, 3, 5])
def test_a_goal_is_felt_from_k_plus_two_cells(sweeps):
    """f_R, W_R and the last product see a cell further each, and the sweeps one each; the first of them finds V̄ = 0."""
    net = network(n=31, iterations=sweeps, scale=1.0).double()
    x = torch.zeros(1, 2, 31, 31, dtype=torch.float64)
    with_goal = x.clone()
    with_goal[0, 1, 15, 15] = 10.0
    felt = (net.plan(x) != net.plan(with_goal))[0].any(0)
    assert torch.nonzero(felt).amin(0).tolist() == [15 - sweeps - 2] * 2
    assert torch.nonzero(felt).amax(0).tolist() == [15 + sweeps + 2] * 2


# ── (4) Attention, and the reactive networks ──────────────────────────────────────────────────────────────────────


def test_attention_reads_the_agents_own_cell():
    net, q = network(), torch.randn(5, 10, 8, 8)
    maze, row, col = torch.tensor([3, 0, 3]), torch.tensor([2, 6, 5]), torch.tensor([5, 1, 2])
    seen = net.attend(q, maze, row, col)
    for k in range(3):
        assert torch.equal(seen[k], q[maze[k], :, row[k], col[k]])
    assert not torch.equal(seen[0], q[3, :, 5, 2])  # not of its transpose


def test_the_fcn_is_a_convolution_that_spans_the_maze():
    net, mazes = network("fcn", n=6, scale=0.1), some_mazes(3, 6, obstacles=5)
    x = vin.images(mazes)
    first, second, third = (layer for layer in net.layers if isinstance(layer, torch.nn.Linear))
    kernel = first.weight.view(150, 11, 11, 2).permute(0, 3, 1, 2)
    y = F.conv2d(x, kernel, first.bias, padding=5).relu()
    for layer in (second, third):
        y = F.conv2d(y, layer.weight[:, :, None, None], layer.bias).relu()
    maze, row, col = torch.tensor([0, 2, 2, 1]), torch.tensor([1, 2, 4, 0]), torch.tensor([4, 3, 1, 5])
    seen = net.attend(net.plan(x), maze, row, col)
    assert torch.allclose(seen, y[maze, :, row, col], atol=1e-4)
    assert seen.abs().max() > 0.01


@pytest.mark.parametrize("n", [8, 16, 28])
def test_the_cnn_sees_the_agent_as_a_channel(n):
    net, mazes = network("cnn", n, scale=0.05), some_mazes(2, n)
    x = vin.images(mazes)
    maze, row, col = torch.tensor([1, 1]), torch.tensor([2, 3]), torch.tensor([3, 2])
    seen = net.attend(net.plan(x), maze, row, col)
    for k in range(2):
        y = torch.cat([x[1:2], torch.zeros(1, 1, n, n)], 1)
        y[0, 2, row[k], col[k]] = 1.0
        for i, layer in enumerate(layer for layer in net.layers if isinstance(layer, torch.nn.Conv2d)):
            y = F.conv2d(y, layer.weight, layer.bias, padding=1).relu()
            y = F.max_pool2d(y, 2) if i in (0, 2) else y
        assert torch.allclose(seen[k], y.flatten(), atol=1e-5)
    assert seen.shape == (2, net.width) and (seen[0] - seen[1]).abs().max() > 1e-4


# ── (5) Losses ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_losses_by_hand():
    torch.manual_seed(0)
    logits, value, returns = torch.randn(6, 8, requires_grad=True), torch.randn(6, requires_grad=True), torch.randn(6)
    action = torch.randint(8, (6,))
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    chosen = torch.stack([p[k, a] for k, a in enumerate(action)])
    assert vin.imitation_loss(logits, action).item() == pytest.approx(-chosen.log().mean().item(), rel=1e-5)
    policy, error, entropy = vin.policy_gradient_losses(logits, value, action, returns)
    assert policy.item() == pytest.approx(-(chosen.log() * (returns - value)).mean().item(), rel=1e-4)
    assert error.item() == pytest.approx(((returns - value) ** 2).mean().item(), rel=1e-5)
    assert entropy.item() == pytest.approx(-(p * p.log()).sum(1).mean().item(), rel=1e-5)
    assert torch.autograd.grad(policy, value, allow_unused=True, retain_graph=True) == (None,)  # it is subtracted only


def test_the_policy_gradient_climbs_the_expected_return():
    """One state and eight moves, enumerated: the mean of the losses' gradients, weighted by the moves' chances, is
    minus the gradient of the expected return, whatever the baseline says."""
    torch.manual_seed(0)
    logits, reward = torch.randn(8, dtype=torch.float64, requires_grad=True), torch.randn(8, dtype=torch.float64)
    (expected,) = torch.autograd.grad((logits.softmax(0) * reward).sum(), logits)
    found = torch.zeros(8, dtype=torch.float64)
    for a in range(8):
        value = torch.tensor([0.7], dtype=torch.float64)
        loss, _, _ = vin.policy_gradient_losses(logits[None], value, torch.tensor([a]), reward[a : a + 1])
        found += logits.softmax(0)[a].detach() * torch.autograd.grad(loss, logits)[0]
    assert torch.allclose(found, -expected)


def play(at_most=10**9, seed=0, count=12, gamma=0.9):
    """A round, and the same moves made once more, one environment after the other."""
    args = Args(gamma=gamma, mazes=50, test_mazes=10)
    envs = [vin.make_task(args, split="training") for _ in range(count)]
    for i, env in enumerate(envs):
        env.reset(seed=seed + i)
    generators = [vin.env_state(env) for env in envs]
    net = network(scale=0.2, iterations=3)
    baseline = torch.nn.Linear(net.width, 1)
    torch.manual_seed(seed)
    batch, mean_return, mean_length = vin.play_round(net, baseline, envs, args, CPU, at_most)
    returns, lengths, bootstrapped = [], [], 0
    for i, env in enumerate(envs):
        vin.set_env_state(env, generators[i])
        obs, _ = env.reset()
        rows = torch.nonzero(batch.maze == i)[:, 0]
        rewards, over = [], False
        for k in rows:
            assert not over
            assert (batch.row[k], batch.col[k]) == tuple(obs["position"])
            assert np.array_equal(batch.images[i], obs["image"])
            obs, r, terminated, truncated, _ = env.step(int(batch.action[k]))
            rewards.append(r)
            over = terminated or truncated
        row, col = (torch.tensor([x]) for x in obs["position"])
        G = 0.0
        if not (over and terminated):
            bootstrapped += 1
            G = baseline(net.attend(net.plan(batch.images), torch.tensor([i]), row, col)).item()
        expected = []
        for r in reversed(rewards):
            G = r + gamma * G
            expected.insert(0, G)
        assert np.allclose(batch.returns[rows], expected, atol=1e-5)
        returns.append(sum(rewards))
        lengths.append(len(rewards))
    assert mean_return == pytest.approx(np.mean(returns), abs=1e-6)
    assert mean_length == np.mean(lengths)
    return sum(lengths), bootstrapped


def test_a_rounds_returns_are_those_of_its_episodes():
    """Terminal states are worth nothing; after a time limit the baseline's word stands."""
    found = [play(seed=seed) for seed in range(6)]
    assert sum(bootstrapped for _, bootstrapped in found) > 0
    assert all(bootstrapped < 12 for _, bootstrapped in found)


def test_a_round_may_be_cut():
    for at_most in (1, 5, 13, 20):
        taken, bootstrapped = play(at_most)
        assert taken == at_most
        assert bootstrapped > 0


# ── Walks and what is measured of them ────────────────────────────────────────────────────────────────────────────


def test_walks_are_the_environments_episodes():
    """A bad network: walks that arrive, crash, and go round. The environment is played cell by cell."""
    mazes = vin.make_mazes(None, 8, 30, 0, 40, 10, 2, 0)[0]
    start, net = cells_of(mazes, each=4), network(seed=4, scale=0.2, iterations=4)
    arrived, length, cells, actions = vin.walk(vin.chooser(net, mazes, CPU), mazes, start)
    env = gym.make("RandomMaze-v0", mazes=40, test_mazes=10, paths=2)
    kinds, total = set(), []
    for k, (m, row, col) in enumerate(start.T.tolist()):
        policy, own = vin.walker(net, CPU), env.unwrapped
        env.reset(seed=0)
        maze = mazes.take([m])
        own.image, own.distance = vin.images(maze)[0].numpy(), maze.distance[0].numpy()
        own.cell, own.left, own.path = (row, col), 2 * own.distance[row, col], [(row, col)]
        obs, r, walked, terminated, truncated, rewards = own._observation(), 0, 0.0, False, False, 0.0
        while not (terminated or truncated):
            a = policy(obs)
            obs, r, terminated, truncated, _ = own.step(a)
            walked, rewards = walked + vin.COSTS[a], rewards + r
        assert bool(arrived[k]) == (terminated and r > 0)
        assert length[k].item() == pytest.approx(walked, abs=1e-4)
        steps = len(own.path) - 1
        assert cells[: steps + 1, :, k].tolist() == [list(cell) for cell in own.path]
        assert (actions[:, k] >= 0).sum() == steps
        kinds.add("arrived" if arrived[k] else "crashed" if terminated else "limit")
        total.append((rewards, steps))
    assert kinds == {"arrived", "crashed", "limit"}
    world = vin.World(mazes, None, start, None, None, None, None, None)
    assert vin.training_score(net, world, CPU) == pytest.approx(tuple(np.mean(total, 0)), abs=1e-5)
    scores = vin.walk_metrics(net, mazes, start, CPU)
    assert scores["success_rate"] == pytest.approx(np.mean(arrived.numpy()))
    detour = [length[k] - mazes.distance[tuple(start[:, k])] for k in range(start.shape[1]) if arrived[k]]
    assert scores["trajectory_difference"] == pytest.approx(np.mean(detour), abs=1e-5)


def test_a_walk_ends_at_twice_the_shortest_way():
    """Always the first straight move that is free: it goes to and fro, until it is cut, and has not arrived."""
    mazes = some_mazes(5, obstacles=1)
    start = cells_of(mazes, each=5)
    far = start[:, mazes.distance[tuple(start)] >= 3]

    def choose(*where):
        found = []
        for m, r, c in zip(*(x.tolist() for x in where), strict=True):
            free = [a for a, (i, j) in enumerate(vin.MOVES[:4]) if 1 <= mazes.distance[m, r + i, c + j] < math.inf]
            found.append(free[0])
        return torch.tensor(found)

    arrived, length, _, actions = vin.walk(choose, mazes, far)
    shortest = mazes.distance[tuple(far)]
    assert not arrived.any() and len(arrived) > 3
    assert (length >= 2 * shortest - 1e-4).all() and (length < 2 * shortest + 1).all()
    assert ((actions >= 0).sum(0) == length).all()


def test_the_last_move_of_a_walk_may_lead_over_its_limit():
    """A way of length 1, walked as √2 and 1: it is not yet cut after √2, and arrives."""
    walls = torch.ones(1, 5, 5, dtype=torch.bool)
    walls[0, 1:4, 1:4] = False
    goals = torch.tensor([[1, 2]])
    mazes = vin.Mazes(walls, goals, vin.shortest(walls, goals))
    start = torch.tensor([[0], [1], [1]])
    ways = {(1, 1): 6, (2, 2): 0}  # south-east, north
    arrived, length, cells, _ = vin.walk(lambda _, row, col: torch.tensor([ways[int(row), int(col)]]), mazes, start)
    assert arrived.tolist() == [True] and length.item() == pytest.approx(1 + math.sqrt(2))
    assert cells[:, :, 0].tolist() == [[1, 1], [2, 2], [1, 2]]


def test_predictions_are_measured_cell_by_cell():
    mazes, net = some_mazes(15), network(scale=0.2, iterations=3)
    taught = vin.lessons(mazes, 5, np.random.default_rng(0))
    found = vin.prediction_metrics(net, mazes, taught, CPU)
    losses, others, wrong = [], 0, 0
    for m in range(15):
        q = net.plan(vin.images(mazes)[m : m + 1])[0]
        for k in range(taught.first[m], taught.first[m + 1]):
            row, col, a = (int(x[k]) for x in taught[:3])
            logits = net.out.weight @ q[:, row, col]
            losses.append(-logits.log_softmax(0)[a].item())
            choice = int(logits.argmax())
            others += choice != a
            wrong += not vin.best_moves(mazes)[choice, m, row, col]
    assert found["prediction_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert found["prediction_error"] == pytest.approx(others / len(losses))
    assert found["wrong_moves"] == pytest.approx(wrong / len(losses)) and 0 < wrong <= others


def test_values_that_are_minus_the_way_correlate_fully():
    mazes, net = some_mazes(10), network(q_channels=9, iterations=60, reward_channels=2)
    hand_set(net, (*vin.MOVES, (0, 0)))
    assert vin.value_metrics(net, mazes, CPU)["model/value_correlation"] == pytest.approx(1, abs=1e-4)
    with torch.no_grad():
        net.r_kernel.neg_()
    assert vin.value_metrics(net, mazes, CPU)["model/value_correlation"] < 0.9
    full = vin.Mazes(*(column[:1].clone() for column in mazes))
    full.distance.fill_(math.inf)
    full.distance[0, 3, 3] = 0.0
    assert vin.value_metrics(net, full, CPU) == {}  # one cell correlates with nothing


def test_the_picture_shows_a_long_way_and_failures():
    mazes, net = some_mazes(30), network(seed=4, scale=0.2, iterations=4)
    start = cells_of(mazes, each=2)
    walks = vin.telling_walks(net, mazes, start, CPU)
    assert walks.arrived.tolist() == [True, False, False]
    for m in range(3):
        steps = walks.best[m].diff(dim=0).float().norm(dim=1)
        assert steps.sum().item() == pytest.approx(walks.mazes.distance[m][tuple(walks.best[m][0])].item(), abs=1e-4)
        assert torch.equal(walks.taken[m][0], walks.best[m][0])
        end = walks.mazes.distance[m][tuple(walks.taken[m][-1])]
        assert (end == 0) == bool(walks.arrived[m])
    none = vin.telling_walks(network(scale=0.0), mazes, start, CPU)  # its first move is the same everywhere
    shown = [w.numpy().tobytes() + c[0].numpy().tobytes() for w, c in zip(none.mazes.walls, none.taken, strict=True)]
    assert none.arrived.sum() <= 1 and len(set(shown)) == 3
    hand_set(good := network(q_channels=9, iterations=60, reward_channels=2), (*vin.MOVES, (0, 0)))
    assert vin.telling_walks(good, mazes, start, CPU).arrived.tolist() == [True] * 3
    x = vin.images(walks.mazes)
    one, other = (vin.draw_maps(n, x, walks, "title") for n in (net, network("cnn", scale=0.05)))
    assert one.shape[1] > 3 * other.shape[1] and one.std() > 10 and other.std() > 10
    film = vin.film_sweeps(net, x)
    assert len(film) == 5 and not np.array_equal(film[0], film[1])
    assert all(frame.shape == film[0].shape for frame in film)


# ── The environment ───────────────────────────────────────────────────────────────────────────────────────────────


def test_the_environment_keeps_gymnasiums_rules():
    env = gym.make("RandomMaze-v0", mazes=20, test_mazes=10, render_mode="rgb_array")
    check_env(env.unwrapped)
    env.reset(seed=0)
    frame = env.render()
    assert frame.dtype == np.uint8 and len(np.unique(frame.reshape(-1, 3), axis=0)) >= 4


def test_test_mazes_are_played_in_the_test():
    args = Args(mazes=20, test_mazes=10)
    training, _, test, _ = vin.make_mazes(**vin.recipe(args))
    for split, mazes in (("training", training), ("test", test)):
        env, met = vin.make_task(args, split=split), set()
        walls = [w.tobytes() for w in mazes.walls.numpy()]
        for seed in range(60):
            obs, _ = env.reset(seed=seed)
            met.add(walls.index((obs["image"][0] > 0).tobytes()))
            row, col = obs["position"]
            assert obs["image"][0, row, col] == 0 and obs["image"][1, row, col] == 0
        assert len(met) > 8


class Field(gym.Env):
    """Somebody else's: an open field, four moves, an image of three channels; 1 for being where the flag is."""

    def __init__(self, render_mode=None, moving=False):
        image, cell = gym.spaces.Box(-1, 10, (3, 6, 6), np.float32), gym.spaces.Box(0, 5, (2,), np.int64)
        self.observation_space = gym.spaces.Dict({"position": cell, "image": image})
        self.action_space, self.moving = gym.spaces.Discrete(4), moving

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.flag, self.cell = self.np_random.integers(6, size=2), self.np_random.integers(6, size=2)
        self.steps = 0
        return self.obs(), {}

    def obs(self):
        image = np.zeros((3, 6, 6), np.float32)
        image[(2, *self.flag)] = 5.0
        image[0] = 1.0 + self.moving * self.steps
        return {"image": image, "position": self.cell.copy()}

    def step(self, action):
        self.steps += 1
        self.cell = np.clip(self.cell + ((-1, 0), (0, 1), (1, 0), (0, -1))[action], 0, 5)
        found = bool((self.cell == self.flag).all())
        return self.obs(), float(found), found, self.steps >= 12, {}


@pytest.fixture
def fields():
    gym.register("Field-v0", entry_point=Field)
    gym.register("Moving-v0", entry_point=Field, kwargs={"moving": True})
    yield
    del gym.registry["Field-v0"], gym.registry["Moving-v0"]


@pytest.mark.parametrize("model", ["vin", "fcn"])
def test_another_environment_is_played(fields, model, tmp_path):
    flags = f"--env-id Field-v0 --train rl --model {model} --batch-mazes 3 --total-timesteps 300 --eval-episodes 5"
    run_dir = helpers.run("vin", f"{flags} --log-every 60", tmp_path / "run")
    scores = helpers.scalars(run_dir)
    assert set(scores["eval/episodic_return"]) == {300} and "eval/success_rate" not in scores
    assert (run_dir / "picture.png").stat().st_size > 1_000
    assert (run_dir / "sweeps.gif").exists() == (model == "vin")


def refused(flags, capsys, tmp_path):
    with pytest.raises(SystemExit) as exit:
        helpers.run("vin", flags, tmp_path / "run")
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("vin: ") and err.count("\n") == 1
    return err


def test_moves_that_do_not_begin_at_0(fields):
    class Counted(Field):
        def __init__(self, **settings):
            super().__init__(**settings)
            self.action_space = gym.spaces.Discrete(4, start=1)

        def step(self, action):
            assert 1 <= action <= 4
            return super().step(action - 1)

    gym.register("Counted-v0", entry_point=Counted)
    env = vin.make_task(Args(env_id="Counted-v0", train="rl"))
    env.reset(seed=0)
    for action in range(4):
        env.step(action)
    assert env.action_space == gym.spaces.Discrete(4)
    del gym.registry["Counted-v0"]


def test_observations_of_another_kind_are_refused(fields, capsys, tmp_path):
    class Compass(Field):
        def __init__(self, **settings):
            super().__init__(**settings)
            self.observation_space = gym.spaces.Dict({**self.observation_space, "direction": gym.spaces.Discrete(4)})
            if settings.get("moving"):
                del self.observation_space.spaces["position"]

        def obs(self):
            return {**super().obs(), "direction": 0, "image": super().obs()["image"] - 20.0}

    gym.register("Compass-v0", entry_point=Compass)
    gym.register("Lost-v0", entry_point=Compass, kwargs={"moving": True})
    assert "position" in refused("--env-id Lost-v0 --train rl", capsys, tmp_path)
    flags = "--env-id Compass-v0 --train rl --batch-mazes 3 --total-timesteps 60 --eval-episodes 3"
    helpers.run("vin", flags, tmp_path / "run")  # more than is needed, and an image of negative numbers, are no matter
    assert (tmp_path / "run" / "picture.png").exists()
    del gym.registry["Compass-v0"], gym.registry["Lost-v0"]


def test_numbers_that_run_away_are_said(capsys, tmp_path):
    flags = f"{QUICK} --total-timesteps 6000 --learning-rate 1e6"
    assert "--learning-rate" in refused(f"{flags} --train rl", capsys, tmp_path)


def test_an_image_that_changes_is_refused(fields, capsys, tmp_path):
    assert "changes within an episode" in refused("--env-id Moving-v0 --train rl", capsys, tmp_path)
    assert "--train rl" in refused("--env-id Field-v0", capsys, tmp_path)


# ── The public data ───────────────────────────────────────────────────────────────────────────────────────────────


def public_layout(path, training, test, change=None):
    """Both [mazes, lessons]; each state is one row with its own image, shuffled."""
    arrays = []
    for seed, (mazes, taught) in enumerate((training, test)):
        maze = torch.searchsorted(taught.first, torch.arange(len(taught.row)), right=True) - 1
        order = np.random.default_rng(seed).permutation(len(maze))
        arrays.append(vin.images(mazes)[maze].numpy().astype(np.uint8)[order])
        arrays += [x.numpy().astype(np.float32)[order] for x in taught[:3]]
    if change:
        change(arrays)
    np.savez(path, *arrays)
    return path


def data(seed=0, count=30):
    mazes = some_mazes(count, seed=seed, n=6, obstacles=12)
    return mazes, vin.lessons(mazes, 3, np.random.default_rng(seed))


def by_maze(mazes, taught):
    """{maze: its lessons}, all as plain values."""
    found = {}
    for m in range(len(mazes.walls)):
        rows = slice(taught.first[m], taught.first[m + 1])
        key = (mazes.walls[m].numpy().tobytes(), tuple(mazes.goals[m].tolist()))
        lessons = zip(*(x[rows].tolist() for x in taught[:3]), strict=True)
        found[key] = sorted(found.get(key, []) + list(lessons))
    return found


def test_public_data_is_read_as_it_was_written(tmp_path):
    """And a test maze that is in training too is left out, with its lessons."""
    training, test = data(0), data(1)
    both = vin.Mazes(*(torch.cat([a[:4], b]) for a, b in zip(training[0], test[0], strict=True)))
    taught = vin.lessons(both, 3, np.random.default_rng(5))
    path = public_layout(tmp_path / "d.npz", training, (both, taught))
    made = vin.make_mazes(str(path), 0, 0, 0, 0, 0, 0, 0)
    assert by_maze(*made[:2]) == by_maze(*training)
    expected = {key: value for key, value in by_maze(both, taught).items() if key not in by_maze(*training)}
    assert by_maze(*made[2:]) == expected and len(expected) < len(by_maze(both, taught))
    assert torch.equal(made[0].distance, vin.shortest(made[0].walls, made[0].goals))


def test_a_run_on_public_data(tmp_path):
    path = public_layout(tmp_path / "d.npz", data(0), data(1))
    flags = "--total-timesteps 400 --batch-mazes 5 --batch-cells 4 --log-every 100 --eval-episodes 3 --paths 2"
    run_dir = helpers.run("vin", f"{flags} --data {path}", tmp_path / "run")
    scores = helpers.scalars(run_dir)
    assert set(scores["eval/success_rate"]) == {400}
    assert helpers.checkpoint(run_dir)["step"] == 400
    by_rewards = helpers.run("vin", f"{flags} --data {path} --train rl", tmp_path / "rl")
    assert set(helpers.scalars(by_rewards)["eval/success_rate"]) == {400}


def larger():
    """The four arrays of a test with mazes of another size."""
    mazes = some_mazes(3, 8)
    taught = vin.lessons(mazes, 1, np.random.default_rng(0))
    maze = torch.searchsorted(taught.first, torch.arange(len(taught.row)), right=True) - 1
    return [vin.images(mazes)[maze].numpy(), *(x.numpy() for x in taught[:3])]


def broken(number, value):
    def change(arrays):
        arrays[number] = value(arrays[number])

    return change


def wall_in(arrays):
    """A cell with no way out: its state can't reach the goal."""
    for k, (row, col) in enumerate(zip(arrays[1].astype(int), arrays[2].astype(int), strict=True)):
        around = np.s_[row - 1 : row + 2, col - 1 : col + 2]
        if not arrays[0][k, 1][around].any():
            arrays[0][k, 0][around] = 1
            arrays[0][k, 0, row, col] = 0
            return


def bury_the_goal(arrays):
    arrays[0][5, 0][arrays[0][5, 1] > 0] = 1


def bury(arrays):
    arrays[4][3, 0] = 1


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (broken(0, lambda x: x[:, 0]), "[N, 2, n, n]"), (broken(4, lambda x: x[:, :, :5]), "[N, 2, n, n]"),
        (lambda arrays: arrays.__setitem__(slice(4, 8), larger()), "one size"),
        (broken(2, lambda x: x.astype(str).astype(object)), "can't be read"),
        (broken(1, lambda x: x[:-1]), "other numbers"), (broken(3, lambda x: x + 8), "from 0 to 7"),
        (broken(2, lambda x: x + 6), "cells of the image"), (broken(5, lambda x: x - 6), "cells of the image"),
        (broken(0, lambda x: x * np.array([1, 0], np.uint8)[:, None, None]), "not one goal"),
        (broken(4, lambda x: x * np.array([0, 1], np.uint8)[:, None, None]), "wall all around"),
        (wall_in, "no way leads"), (bury_the_goal, "in a wall"), (bury, "in a wall"),
        (lambda arrays: arrays.pop(), "arr_7"),
    ],
)  # fmt: skip
def test_data_of_another_layout_is_refused(change, word, tmp_path, capsys):
    path = public_layout(tmp_path / "d.npz", data(0), data(1), change)
    assert word in refused(f"--data {path}", capsys, tmp_path)


def test_data_that_is_no_data_is_refused(tmp_path, capsys):
    (tmp_path / "text.npz").write_text("no archive")
    assert "can't be read" in refused(f"--data {tmp_path / 'text.npz'}", capsys, tmp_path)
    assert "can't be read" in refused(f"--data {tmp_path / 'nothing.npz'}", capsys, tmp_path)
    np.save(tmp_path / "one.npy", np.zeros(3))
    assert "can't be read" in refused(f"--data {tmp_path / 'one.npy'}", capsys, tmp_path)
    path = public_layout(tmp_path / "d.npz", data(0), data(0))
    assert "in training too" in refused(f"--data {path}", capsys, tmp_path)


# ── The run ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_transfer_has_its_own_sweeps_and_gives_them_back(tmp_path, monkeypatch):
    """Measured with K = 7 on 16 × 16; what is trained goes on with K = 4."""
    seen = []
    original = vin.walk_metrics

    def spy(net, mazes, *rest):
        seen.append((mazes.walls.shape[-1], net.iterations))
        return original(net, mazes, *rest)

    monkeypatch.setattr(vin, "walk_metrics", spy)
    flags = "--total-timesteps 240 --eval-every 120 --transfer-iterations 7 --picture-every 0"
    run_dir = helpers.run("vin", f"{QUICK} {flags}", tmp_path / "run")
    assert seen == [(8, 4), (16, 7)] * 2
    plain = helpers.run("vin", f"{QUICK} {flags} --transfer-size 0", tmp_path / "plain")
    one, other = (helpers.checkpoint(folder)["learned"] for folder in (run_dir, plain))
    assert helpers.differences(one, other) == []
    assert set(helpers.scalars(run_dir)) - set(helpers.scalars(plain)) >= {"eval/transfer_success_rate"}


def test_each_maze_has_its_turn_once_in_an_epoch(tmp_path, monkeypatch):
    drawn = []
    original = vin.draw_batch

    def spy(mazes, *rest):
        drawn.append(mazes.tolist())
        return original(mazes, *rest)

    monkeypatch.setattr(vin, "draw_batch", spy)
    run_dir = helpers.run("vin", f"{QUICK} --total-timesteps 900", tmp_path / "run")
    for epoch in range(3):
        assert sorted(m for part in drawn[10 * epoch : 10 * epoch + 10] for m in part) == list(range(60))
    assert drawn[0] != drawn[10]
    assert list(helpers.scalars(run_dir)["charts/episodic_return"]) == [300, 600, 900]


def test_a_run_stopped_between_epochs_goes_on_with_the_same_mazes(tmp_path, monkeypatch):
    """After three of ten minibatches of the second epoch: resumed, it equals the straight run to the bit."""
    straight = helpers.run("vin", f"{QUICK} --total-timesteps 900", tmp_path / "straight")
    original, count = vin.draw_batch, []

    def stopping(*rest):
        count.append(1)
        if len(count) == 13:
            signal.raise_signal(signal.SIGTERM)
        return original(*rest)

    with monkeypatch.context() as patch:
        patch.setattr(vin, "draw_batch", stopping)
        with pytest.raises(SystemExit):
            helpers.run("vin", f"{QUICK} --total-timesteps 900", tmp_path / "run")
    assert helpers.checkpoint(tmp_path / "run")["step"] == 13 * 30
    helpers.run("vin", f"--resume {tmp_path / 'run'}")
    assert helpers.differences(helpers.checkpoint(tmp_path / "run"), helpers.checkpoint(straight)) == []
    assert helpers.scalars(tmp_path / "run") == helpers.scalars(straight)


@pytest.mark.parametrize("how", ["imitation", "rl"])
def test_a_run_learns_from_training_mazes_and_is_measured_in_others(how, tmp_path, monkeypatch):
    learned, measured, original, loss = set(), [], vin.walk_metrics, vin.Batch

    def spy(net, mazes, *rest):
        measured.append(mazes)
        return original(net, mazes, *rest)

    def batch(x, *rest):
        learned.update((walls.bool().numpy().tobytes(), divmod(int(goal.argmax()), 8)) for walls, goal in x)
        return loss(x, *rest)

    monkeypatch.setattr(vin, "walk_metrics", spy)
    monkeypatch.setattr(vin, "Batch", batch)
    args = vin.parse_args(f"{QUICK} --train {how} --total-timesteps 300 --transfer-size 8 --no-progress".split())
    args.run_dir = str(tmp_path / "run")
    vin.train(args)
    training, _, test, _ = vin.make_mazes(**vin.recipe(args))
    assert learned <= keys(training) and len(learned) > 20
    assert len(measured) == 2 and keys(measured[0]) == keys(test)
    assert keys(measured[1]).isdisjoint(keys(training))
    # --evaluate, also with another seed, plays in these test mazes too
    for seed in (1, 2):
        args = vin.parse_args(["--evaluate", str(tmp_path / "run"), "--seed", str(seed)])
        env = vin.make_task(args)
        for episode in range(30):
            obs, _ = env.reset(seed=episode)
            walls, goal = torch.from_numpy(obs["image"])
            assert (walls.bool().numpy().tobytes(), divmod(int(goal.argmax()), 8)) in keys(test)


def test_the_step_size_falls_to_a_tenth(tmp_path):
    rates = {}
    for total in (30, 600):
        folder = tmp_path / str(total)
        flags = f"{QUICK} --total-timesteps {total} --learning-rate 0.02 --hold-steps 90 --decay-steps 285"
        state = helpers.checkpoint(helpers.run("vin", flags, folder))["optimisers"]["all"]
        rates[total] = state["param_groups"][0]["lr"]
    assert rates[30] == pytest.approx(0.02)  # of the first update
    assert rates[600] == pytest.approx(0.02 * 0.1 ** ((570 - 90) / 285))


# ── Learning ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.learning  # for its minute of compiling
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_a_compiled_plan_is_that_of_eager_mode():
    net, x = network(iterations=4), vin.images(some_mazes(5))
    plans = [net.plan(x), torch.compile(net.plan)(x)]
    grads = [torch.autograd.grad(plan.square().sum(), (net.value_kernel, net.h_kernel)) for plan in plans]
    assert torch.allclose(*plans, rtol=1e-4)
    assert all(torch.allclose(one, other, rtol=1e-3) for one, other in zip(*grads, strict=True))


@pytest.mark.learning
def test_it_learns_to_plan_from_examples(tmp_path):
    """200,000 moves. A random walk and an untrained network are measured too."""
    run_dir = helpers.run(
        "vin", "--total-timesteps 200000 --eval-every 0 --mazes 2000 --test-mazes 300", tmp_path / "r"
    )
    mazes = some_mazes(300, seed=9)
    start = cells_of(mazes)
    torch.manual_seed(0)
    by_chance, *_ = vin.walk(lambda maze, row, col: torch.randint(8, maze.shape), mazes, start)
    untrained = vin.walk_metrics(vin.VIN(2, 8, 8, Args()), mazes, start, CPU)["success_rate"]
    assert max(by_chance.float().mean().item(), untrained) < 0.3
    assert helpers.scalars(run_dir)["eval/success_rate"][200_000] > 0.75


@pytest.mark.learning
def test_it_learns_to_plan_from_rewards(tmp_path):
    flags = (
        "--train rl --learning-rate 0.003 --total-timesteps 100000 --eval-every 0 --test-mazes 300 --transfer-size 0"
    )
    run_dir = helpers.run("vin", flags, tmp_path / "r")
    assert helpers.scalars(run_dir)["eval/success_rate"][100_000] > 0.6


@pytest.mark.learning
def test_another_environment_is_learned_from_its_rewards(fields, tmp_path):
    """An open field: where the flag is, says the image. By chance it is met in one episode of five."""
    flags = "--env-id Field-v0 --train rl --batch-mazes 4 --learning-rate 0.003 --iterations 8 --total-timesteps 40000"
    run_dir = helpers.run("vin", f"{flags} --eval-every 0 --picture-every 0", tmp_path / "r")
    env = gym.make("Field-v0")
    env.action_space.seed(0)
    by_chance, _ = vin.evaluate(lambda: lambda obs: int(env.action_space.sample()), env, 200, 1, 100)
    assert np.mean(by_chance) < 0.35
    assert helpers.scalars(run_dir)["eval/episodic_return"][40_000] > 0.6
