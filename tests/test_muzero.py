"""The mathematics of algos/muzero.py against slow and obvious references."""

import dataclasses
import json
import math

import gymnasium as gym
import helpers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

muzero = helpers.module("muzero")
Args = muzero.Args
CPU = torch.device("cpu")
TTT, FOUR = muzero.BOARDS["TicTacToe-v0"], muzero.BOARDS["ConnectFour-v0"]


# ── (1) The search ────────────────────────────────────────────────────────────────────────────────────────────────


class Toy:
    """A model made of random matrices, for one state [3] and for many."""

    def __init__(self, actions, seed, reward_size=1.0):
        rng = np.random.default_rng(seed)
        self.A, self.W = actions, torch.from_numpy(rng.normal(size=(actions, 3, 3)))
        self.heads = torch.from_numpy(rng.normal(size=(3, actions + 2)) * 2)
        self.reward_size = reward_size

    def heads_of(self, hidden):
        """logits [.., A], value [..], reward [..]"""
        out = (hidden @ self.heads).numpy()
        return out[..., : self.A], out[..., self.A], self.reward_size * out[..., self.A + 1]

    def __call__(self, hidden, actions):
        hidden = torch.tanh(torch.einsum("bi,bij->bj", hidden, self.W[actions]))
        logits, value, reward = self.heads_of(hidden)
        return hidden, reward, logits, value


class Node:
    def __init__(self, prior):
        self.prior, self.N, self.W, self.reward, self.children, self.hidden = prior, 0, 0.0, 0.0, None, None

    def open(self, hidden, logits, value, legal):
        self.hidden, self.logits, self.value = hidden, logits, float(value)
        p = chances(np.where(legal, logits, -np.inf))
        self.children = {a: Node(p[a]) for a in np.flatnonzero(legal)}


def chances(logits):
    x = np.exp(logits - np.max(logits))
    return x / x.sum()


def pick_by_puct(args):
    """Equation 2."""

    def pick(node, q_of, scaled, at_root, i):
        N = 1 + sum(child.N for child in node.children.values())

        def score(a):
            child = node.children[a]
            q = scaled(q_of(child)) if child.N else 0.0
            more = args.c1 + math.log((N + args.c2 + 1) / args.c2)
            return q + child.prior * math.sqrt(N) / (1 + child.N) * more

        return max(node.children, key=score)

    return pick


def pick_by_gumbel(args, noise):
    """Danihelka et al.: sequential halving at the root, Equation 14 below it."""

    def pick(node, q_of, scaled, at_root, i):
        children = node.children
        tried = [a for a in children if children[a].N]
        total = sum(children[a].N for a in tried)
        mixed = node.value
        if tried:
            mean = sum(children[a].prior * q_of(children[a]) for a in tried) / sum(children[a].prior for a in tried)
            mixed = (node.value + total * mean) / (1 + total)
        weight = (args.gumbel_visits + max(child.N for child in children.values())) * args.gumbel_scale
        sigma = {
            a: weight * min(max(scaled(q_of(child) if child.N else mixed), 0), 1) for a, child in children.items()
        }  # fmt: skip
        if at_root:
            ranked = sorted(children, key=lambda a: -(node.logits[a] + noise[a]))
            candidates = ranked[: min(args.considered, args.simulations)]
            wanted = muzero.halving(len(candidates), args.simulations)[i]
            due = [a for a in candidates if wanted == children[a].N]
            return max(due, key=lambda a: node.logits[a] + noise[a] + sigma[a])
        policy = chances(np.array([node.logits[a] + sigma[a] for a in children]))
        return max(children, key=lambda a: policy[a] - children[a].N / (1 + total))

    return pick


def plain_search(model, hidden, legal, gamma, simulations, pick, bounds=None, least=0.0):
    """One root, by recursion over nodes: Appendix B as it stands, Equations 3 to 5."""
    low, high = bounds or (math.inf, -math.inf)
    root, every = Node(1.0), np.ones(model.A, bool)
    logits, value, _ = model.heads_of(hidden)
    root.open(hidden, logits, value, legal)
    root.N, root.W = 1, root.value

    def q_of(child):
        return child.reward + gamma * child.W / child.N

    def scaled(q):
        return (q - low) / max(high - low, least) if high > low else 0.0

    def visit(node, i):
        """Go down one way, and give back what it is worth to `node`."""
        nonlocal low, high
        chosen = pick(node, q_of, scaled, node is root, i)
        child = node.children[chosen]
        if child.N == 0:
            s, reward, logits, value = model(node.hidden[None], torch.tensor([chosen]))
            child.open(s[0], logits[0], value[0], every)
            child.reward, G = float(reward[0]), child.value
        else:
            G = visit(child, i)
        child.N += 1
        child.W += G
        low, high = min(low, q_of(child)), max(high, q_of(child))
        return child.reward + gamma * G

    for i in range(simulations):
        G = visit(root, i)
        root.N += 1
        root.W += G
    return [root.children[a].N if a in root.children else 0 for a in range(model.A)], root.W / root.N


@given(
    st.integers(0, 10_000), st.sampled_from([2, 3, 9]), st.sampled_from([0.997, 0.9, 1.0, -1.0]),
    st.sampled_from([1, 2, 20, 50]), st.booleans(), st.sampled_from(["puct", "gumbel"]),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_the_batched_search_visits_what_a_plain_one_visits(seed, actions, gamma, simulations, bounded, search):
    """Random networks, some actions masked at the root, one and two players."""
    model, rng = Toy(actions, seed, reward_size=[1.0, 0.0, 10.0][seed % 3]), np.random.default_rng(seed)
    hidden = torch.from_numpy(rng.normal(size=(5, 3)))
    legal = rng.random((5, actions)) < 0.7
    legal[np.arange(5), rng.integers(actions, size=5)] = True
    bounds = (-30.0, 30.0) if bounded else None
    logits, value, _ = model.heads_of(hidden)
    args = Args(
        search=search, simulations=simulations, c2=[19_652.0, 20.0][seed % 2], gumbel_scale=[0.1, 1.0][seed % 2],
        considered=[16, 2][seed // 2 % 2], least_range=[0.0, 3.0][seed // 4 % 2],
    )  # fmt: skip
    np.random.seed(seed)
    found = muzero.tree_search(model, hidden, logits, value, legal, gamma, args, bounds, noise=search == "gumbel")
    np.random.seed(seed)
    noise = np.random.gumbel(size=(5, actions))
    for b in range(5):
        pick = pick_by_puct(args) if search == "puct" else pick_by_gumbel(args, noise[b])
        visits, mean = plain_search(model, hidden[b], legal[b], gamma, simulations, pick, bounds, args.least_range)
        assert found.visits[b].tolist() == visits
        if search == "puct":
            assert found.value[b] == pytest.approx(mean, abs=1e-9)
    if search == "puct":
        assert np.allclose(found.policy, found.visits / simulations)
    assert (found.visits[~legal] == 0).all()


def test_a_tree_does_not_depend_on_what_else_is_in_the_batch():
    model = Toy(4, 3)
    hidden = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 3)))
    logits, value, _ = model.heads_of(hidden)
    legal = np.ones((6, 4), bool)
    for search in ("puct", "gumbel"):
        args = Args(simulations=30, search=search)
        together = muzero.tree_search(model, hidden, logits, value, legal, 0.9, args)
        for b in range(6):
            alone = muzero.tree_search(
                model, hidden[b : b + 1], logits[b : b + 1], value[b : b + 1], legal[:1], 0.9, args
            )
            assert alone.visits[0].tolist() == together.visits[b].tolist()


def test_noise_at_the_root_is_dirichlet_over_the_legal_actions():
    model, hidden = Toy(3, 0), torch.zeros(4_000, 3, dtype=torch.float64)
    logits, value, _ = model.heads_of(hidden)
    legal = np.tile([True, False, True], (4_000, 1))
    np.random.seed(0)
    args = Args(simulations=1, noise_alpha=0.5, noise_share=0.3)
    found = muzero.tree_search(model, hidden, logits, value, legal, 0.9, args, noise=True)
    tree = found.tree
    eta = (tree.prior[tree.first] - 0.7 * found.prior) / 0.3
    assert np.allclose(eta.sum(1), 1) and (eta[:, 1] == 0).all() and (eta >= -1e-12).all()
    assert eta[:, 0].mean() == pytest.approx(0.5, abs=0.02)
    assert eta[:, 0].var() == pytest.approx(1 / 4 / 2, abs=0.01)  # of Beta(α, α): 1 / (4 (2α + 1))


def rules_model(rules):
    """The rules of the game as the model: a state is a board from the mover's side, and whether the game is over."""

    def heads(hidden):
        logits = np.zeros((len(hidden), rules.actions))
        legal = rules.legal(boards(hidden))
        return np.where(legal, logits, -30.0), np.zeros(len(hidden))

    def boards(hidden):
        return hidden[:, :-1].numpy().astype(np.int8).reshape(-1, rules.rows, rules.columns)

    def dynamics(hidden, actions):
        before, over, actions = boards(hidden), hidden[:, -1].numpy() > 0, actions.numpy()
        over = over | ~rules.legal(before)[np.arange(len(before)), actions]
        safe = np.where(over, rules.legal(before).argmax(1), actions)
        after, won, ended = rules.move(before, safe)
        flat = np.concatenate([after.reshape(len(after), -1), (over | ended)[:, None]], 1)
        hidden = torch.from_numpy(flat.astype(np.float64))
        logits, value = heads(hidden)
        return hidden, np.where(over, 0.0, won), logits, value

    def root(board):
        return torch.from_numpy(np.append(board.ravel(), 0).astype(np.float64))[None]

    return root, heads, dynamics


def board_of(text):
    return np.array([{"x": 1, "o": -1, ".": 0}[c] for c in text.replace(" ", "")], np.int8).reshape(3, 3)


FORCED = [  # x to move; what wins by force is found by minimax, below
    "x.o ... o.x", "x.. o.. ...", "xo. ... ...",
]  # fmt: skip


@pytest.mark.parametrize("text", FORCED)
@pytest.mark.parametrize("search", ["puct", "gumbel"])
def test_with_the_true_rules_the_search_finds_the_forced_win(text, search):
    board = board_of(text)
    if (board == 1).sum() > (board == -1).sum():
        board = -board
    values = muzero.minimax_moves("TicTacToe-v0", board[None], 9)
    root, heads, dynamics = rules_model(TTT)
    legal = TTT.legal(board[None])
    logits, value = heads(root(board))
    args = Args(simulations=1_000, search=search)
    found = muzero.tree_search(dynamics, root(board), logits, value, legal, -1.0, args, (-1.0, 1.0))
    best = max(values.values())
    kept = {a for a, v in values.items() if np.sign(round(v, 6)) == np.sign(round(best, 6))}
    assert int(found.best[0]) in kept, (values, found.visits)
    if best > 0.5 and search == "puct":  # the other one divides its visits at the root, whatever it finds
        assert found.value[0] > 0.5


def test_halving_divides_the_simulations():
    """16 candidates, 64 simulations: 16 × 1, 8 × 2, 4 × 4, 2 × 8."""
    order = muzero.halving(16, 64)
    visits = np.zeros(16, int)
    for wanted in order:  # the first of those that have as many visits
        visits[np.flatnonzero(visits == wanted)[0]] += 1
    assert sorted(visits.tolist(), reverse=True) == [15] * 2 + [7] * 2 + [3] * 4 + [1] * 8
    assert len(muzero.halving(5, 23)) == 23 and muzero.halving(1, 4).tolist() == [0, 1, 2, 3]
    assert muzero.halving(4, 3).tolist() == [0, 0, 0]


def test_gumbel_search_visits_as_sequential_halving_says():
    model = Toy(16, 1)
    hidden = torch.from_numpy(np.random.default_rng(2).normal(size=(8, 3)))
    logits, value, _ = model.heads_of(hidden)
    legal = np.ones((8, 16), bool)
    args = Args(simulations=64, considered=16, search="gumbel")
    np.random.seed(0)
    found = muzero.tree_search(model, hidden, logits, value, legal, 0.9, args, noise=True)
    expected = [15] * 2 + [7] * 2 + [3] * 4 + [1] * 8
    assert all(sorted(row.tolist(), reverse=True) == expected for row in found.visits)
    assert (np.take_along_axis(found.visits, found.best[:, None], 1) == 15).all()
    legal[:, 3:] = False  # fewer candidates than wanted
    found = muzero.tree_search(model, hidden, logits, value, legal, 0.9, args, noise=True)
    assert (found.visits[:, 3:] == 0).all() and (found.visits.sum(1) == 64).all()
    assert np.allclose(found.policy[:, 3:], 0) and np.allclose(found.policy.sum(1), 1)


def test_gumbels_policy_is_the_completed_one():
    """π' of a root against the formulas, written out."""
    model = Toy(5, 7)
    hidden = torch.from_numpy(np.random.default_rng(3).normal(size=(4, 3)))
    logits, value, _ = model.heads_of(hidden)
    args = Args(simulations=6, considered=3, search="gumbel", gumbel_visits=2.0, gumbel_scale=0.5)
    found = muzero.tree_search(model, hidden, logits, value, np.ones((4, 5), bool), 0.9, args)
    for b in range(4):
        tree, row, prior = found.tree, found.tree.first[b], chances(logits[b])
        n, q = tree.visits[row], tree.q[row]
        tried = [a for a in range(5) if n[a]]
        assert 0 < len(tried) < 5
        mean = sum(prior[a] * q[a] for a in tried) / sum(prior[a] for a in tried)
        mixed = (value[b] + n.sum() * mean) / (1 + n.sum())
        every = [tree.q[r, a] for r in range(row, row + tree.size) for a in range(5) if tree.visits[r, a]]
        low, high = tree.low[b], tree.high[b]  # the smallest and largest that there have been
        assert low <= min(every) < max(every) <= high
        completed = [min(max(((q[a] if n[a] else mixed) - low) / (high - low), 0), 1) for a in range(5)]
        sigma = [(2.0 + max(n)) * 0.5 * x for x in completed]
        assert np.allclose(found.policy[b], chances(logits[b] + np.array(sigma)))
        assert found.value[b] == pytest.approx(found.policy[b] @ [q[a] if n[a] else mixed for a in range(5)])


def test_small_differences_of_q_are_made_much_of_unless_the_range_has_a_least():
    """Rewards that differ by a hundredth, no values: by Equation 5 they are 0 and 1."""
    hidden = torch.zeros(1, 1, dtype=torch.float64)

    def dynamics(hidden, a):
        return hidden, 0.01 * a.numpy(), np.zeros((1, 2)), np.zeros(1)

    said = []
    for least in (0.0, 1.0):
        args = Args(search="gumbel", simulations=2, least_range=least)
        found = muzero.tree_search(dynamics, hidden, np.zeros((1, 2)), np.zeros(1), np.ones((1, 2), bool), 0.0, args)
        said.append(found.policy[0, 1])
    weight = (50 + 1) * 0.1
    assert said[0] == pytest.approx(1 / (1 + math.exp(-weight)))
    assert said[1] == pytest.approx(1 / (1 + math.exp(-0.01 * weight)))


@pytest.mark.parametrize("simulations", [2, 4, 16])
def test_gumbels_policy_improves_where_the_values_are_true(simulations):
    """A bandit: its π' earns at least what the prior earned, at every root, and more in the mean."""
    rng, actions, roots = np.random.default_rng(0), 6, 200
    prizes, logits = rng.uniform(size=(roots, actions)), rng.normal(size=(roots, actions))
    hidden = torch.from_numpy(np.concatenate([prizes, np.ones((roots, 1))], 1))
    prior = np.stack([chances(row) for row in logits])

    def dynamics(hidden, a):
        reward = (hidden.gather(1, a[:, None])[:, 0] * hidden[:, -1]).numpy()
        over = hidden.clone()
        over[:, -1] = 0.0
        return over, reward, np.zeros((roots, actions)), np.zeros(roots)

    args = Args(simulations=simulations, search="gumbel")
    value = (prior * prizes).sum(1)
    np.random.seed(0)
    legal = np.ones((roots, actions), bool)
    found = muzero.tree_search(dynamics, hidden, logits, value, legal, 0.0, args, noise=True)
    assert (found.policy * prizes).sum(1).mean() > value.mean() + 0.05
    taken = np.take_along_axis(prizes, found.best[:, None], 1).mean()
    assert taken > value.mean() + 0.03


def test_actions_are_drawn_by_visits_and_temperature():
    visits = np.tile([0, 8, 2], (20_000, 1))
    found = muzero.Found(visits, None, None, visits.argmax(1), None, None, None)
    np.random.seed(0)
    for T, share in ((1.0, 0.8), (0.5, 64 / 68), (0.0, 1.0)):
        drawn, chance = muzero.draw_actions(found, np.full(20_000, T), Args())
        assert (drawn == 1).mean() == pytest.approx(share, abs=0.01)
        assert (drawn != 0).all()
        assert np.allclose(chance, np.where(drawn == 1, share, 1 - share))


def test_temperature_falls_with_steps_or_moves():
    args = Args(temperature_steps=100, temperature_moves=0)
    assert [muzero.temperature(args, step, np.zeros(1))[0] for step in (0, 49, 50, 75, 500)] == [1, 1, 0.5, 0.25, 0.25]
    args = Args(temperature_steps=0, temperature_moves=4)
    assert muzero.temperature(args, 10**6, np.array([0, 3, 4, 9])).tolist() == [1, 1, 0, 0]


# ── Values and rewards as chances ─────────────────────────────────────────────────────────────────────────────────


@given(st.floats(-1e5, 1e5))
def test_unsquash_is_the_inverse_of_squash(x):
    there = muzero.squash(torch.tensor(x, dtype=torch.float64))
    assert float(there) == pytest.approx(math.copysign(math.sqrt(abs(x) + 1) - 1, x) + 0.001 * x, abs=1e-9)
    assert float(muzero.unsquash(there)) == pytest.approx(x, rel=1e-9, abs=1e-9)


@given(st.floats(-20, 20))
def test_unsquash_in_single_precision(y):
    assert float(muzero.squash(muzero.unsquash(torch.tensor(y)))) == pytest.approx(y, rel=1e-5, abs=1e-5)


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=8), st.sampled_from([1, 5, 20]))
def test_two_hot_means_the_number(xs, support):
    x = torch.tensor(xs)
    chances = muzero.two_hot(x, support)
    assert chances.shape == (len(xs), 2 * support + 1)
    assert (chances >= 0).all() and ((chances > 0).sum(-1) <= 2).all()
    assert torch.allclose(chances.sum(-1), torch.ones(len(xs)))
    numbers = torch.arange(-support, support + 1.0)
    assert torch.allclose(chances @ numbers, x.clamp(-support, support), atol=1e-5)
    for squashed in (False, True):  # and a network that says so is read right
        meant = muzero.from_logits((chances + 1e-30).log(), squashed)
        wanted = x.clamp(-support, support)
        assert torch.allclose(meant, muzero.unsquash(wanted) if squashed else wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("support", [1, 10, 20, 50, 60, 100, 300])
@pytest.mark.parametrize("roots", [1, 8, 64])
def test_a_network_that_learned_nothing_yet_prefers_nothing(support, roots):
    """Its values are 0 to the last digit: what rounding would leave, Eq. 5 would stretch from 0 to 1."""
    args = Args(hidden=8, latent=4, support=support, search="gumbel")
    setting = muzero.Setting((3,), np.dtype(np.float32), 3, None, 0.99, None, 1)
    torch.manual_seed(support)
    planner = muzero.TreePlanner(muzero.MuZero((3,), 3, None, False, args), setting, args, torch.device("cpu"))
    found = planner.search(np.random.default_rng(0).normal(size=(roots, 3)).astype(np.float32), noise=True)
    assert (found.value == 0).all()
    assert found.policy == pytest.approx(np.full((roots, 3), 1 / 3), abs=1e-12)


# ── (4) Targets ───────────────────────────────────────────────────────────────────────────────────────────────────

MOVE, END, CUT = muzero.MOVE, muzero.END, muzero.CUT


def random_stream(seed, rows=60):
    """Episodes one after the other: rewards, values, kinds; where each row's episode began."""
    rng = np.random.default_rng(seed)
    reward, value, kind, first = [], [], [], []
    while len(reward) < rows:
        length, cut, start = rng.integers(1, 12), rng.random() < 0.4, len(reward)
        reward += rng.normal(size=length).tolist()
        kind += [MOVE] * (length - 1) + [MOVE if cut else END] + [CUT] * cut
        reward += [99.0] * cut  # what stands there is nobody's reward
        value += rng.normal(size=length + cut).tolist()
        first += [start] * (length + cut)
    return np.array(reward), np.array(value), np.array(kind), np.array(first)


def slow_target(reward, value, kind, t, n, gamma):
    """z of row t, read off its episode step by step; None where nobody knows it."""
    if kind[t] == CUT:
        return None
    z, discount = 0.0, 1.0
    for i in range(n):
        z += discount * reward[t + i]
        discount *= gamma
        if kind[t + i] == END:
            return z
        if kind[t + i + 1] == CUT:
            return z + discount * value[t + i + 1]
    return z + discount * value[t + n]


def episode_of(kind):
    """Of windows [B, W]: is a row of the first one's episode? Is it one from which on nobody knows?"""
    inside, cut = np.zeros(kind.shape, bool), np.zeros(kind.shape, bool)
    for b, row in enumerate(kind.tolist()):
        for i, what in enumerate(row):
            inside[b, i], cut[b, i] = True, what == CUT
            if what != MOVE:
                cut[b, i:] = what == CUT
                break
    return inside, cut


@pytest.mark.parametrize("gamma", [0.9, -1.0, 1.0])
@pytest.mark.parametrize(("n", "K"), [(1, 1), (3, 2), (5, 5), (20, 3)])
def test_targets_are_those_of_a_slow_loop(gamma, n, K):
    for seed in range(5):
        reward, value, kind, first = random_stream(seed)
        # the window must not leave the stream
        padded = [np.concatenate([x, np.zeros(40, x.dtype)]) for x in (reward, value, kind)]
        last = np.flatnonzero(kind != MOVE)[-1]
        starts = [t for t in range(last + 1) if kind[t] != CUT]
        windows = np.array(starts)[:, None] + np.arange(K + n + 1)
        reward_in, value_in, kind_in = (x[windows] for x in padded)
        inside, cut = episode_of(kind_in)
        moved = inside & ~cut
        sums, row, factor = muzero.n_step(reward_in * moved, inside, cut, n, K, gamma)
        z = sums + factor * padded[1][np.array(starts)[:, None] + row]
        # Where nothing is to be corrected V-trace is the same
        corrected = muzero.vtrace(reward_in * moved, value_in * inside, 1.0 * moved, n, K, gamma)
        assert np.allclose(np.where(cut[:, : K + 1], 0, corrected), np.where(cut[:, : K + 1], 0, z))
        for i, t in enumerate(starts):
            for k in range(K + 1):
                same = t + k < len(first) and first[t + k] == first[t]
                if same and kind[t + k] == CUT:
                    continue  # no loss there
                expected = slow_target(reward, value, kind, t + k, n, gamma) if same else 0.0
                assert z[i, k] == pytest.approx(expected, abs=1e-9), (t, k)


def test_a_won_game_told_from_both_sides():
    """Five moves of tic-tac-toe, the first player wins with the last one: +1 for it, −1 for the other, in turn."""
    reward, kind = np.array([[0, 0, 0, 0, 1.0, 7, 7, 7]]), np.array([[MOVE] * 4 + [END] + [MOVE] * 3])
    inside, cut = episode_of(kind)
    sums, _, factor = muzero.n_step(reward * inside, inside, cut, 3, 4, -1.0)
    assert sums[0].tolist() == [0, 0, 1, -1, 1] and factor[0].tolist() == [-1, -1, 0, 0, 0]
    reward, kind = np.pad(reward, ((0, 0), (0, 9))), np.pad(kind, ((0, 0), (0, 9)))
    inside, cut = episode_of(kind)
    sums, _, factor = muzero.n_step(reward * inside, inside, cut, 9, 5, -1.0)
    assert sums[0].tolist() == [1, -1, 1, -1, 1, 0] and not factor.any()


def setting(actions=2, shape=(1,), stack=1, gamma=0.9):
    return muzero.Setting(shape, np.dtype(np.float32), actions, None, gamma, None, stack)


def filled(rows=64, n=2, K=3, steps=100, games=2, seed=0, stack=1):
    """A store of episodes, whose observation is the row's own number; and what was played, to the end of each."""
    rng = np.random.default_rng(seed)
    store = muzero.Histories(games, rows, K + n, setting(shape=(stack,), stack=stack), None)
    played, ages = [[] for _ in range(games)], np.zeros(games, int)
    every = np.arange(games)
    for _ in range(steps):
        ends = rng.random(games) < 0.15
        cut = ~ends & (rng.random(games) < 0.1)
        row = {
            "action": rng.integers(2, size=games), "reward": rng.normal(size=games), "value": rng.normal(size=games),
            "policy": rng.dirichlet([1, 1], size=games), "chance": rng.uniform(0.1, 1, size=games),
            "kind": np.where(ends, END, MOVE), "age": ages.copy(),
        }  # fmt: skip
        obs = np.repeat(np.array([[len(p)] for p in played], np.float32), stack, 1)
        store.add(every, obs, **row)
        for g in every:
            played[g].append({name: column[g] for name, column in row.items()})
        which = np.flatnonzero(cut)
        if len(which):
            values = rng.normal(size=len(which))
            obs = np.repeat(np.array([[len(played[g])] for g in which], np.float32), stack, 1)
            store.add(which, obs, value=values, kind=np.full(len(which), CUT), age=ages[which] + 1)
            for g, v in zip(which, values, strict=True):
                played[g].append({"value": v, "kind": CUT, "age": ages[g] + 1})
        ages = np.where(ends | cut, 0, ages + 1)
    return store, played


@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("vtrace", [False, True])
def test_batches_hold_what_was_played(prioritized, fresh, vtrace):
    """Against a loop over the rows, after the ring went round."""
    n, K, gamma = 3, 3, 0.9
    store, played = filled(n=n, K=K)
    args, seen = Args(steps=n, unroll=K, gamma=gamma, vtrace=vtrace, consistency=1.0), []
    np.random.seed(0)
    for _ in range(30):
        games, numbers, weight = store.draw(16, prioritized, 0.5, 1.0)
        value_of = (lambda obs: 1_000.0 + obs[:, 0]) if fresh else None
        batch = muzero.make_batch(store, games, numbers, weight, value_of, gamma, args, CPU)
        for b, (g, t) in enumerate(zip(games, numbers, strict=True)):
            seen.append((g, t))
            assert batch.obs[b, 0] == t and store.made[g] - 64 <= t < store.made[g]
            rows, state = played[g], "going"
            for k in range(K + 1):
                row = rows[t + k] if state == "going" else None
                if row is not None and row["kind"] == CUT:
                    state = "cut"
                assert bool(batch.known[b, k]) == (state != "cut")
                assert bool(batch.moved[b, k]) == (state == "going")
                if state == "going":
                    assert k == 0 or batch.later[k - 1, b, 0] == t + k
                    assert np.allclose(batch.policy[b, k], row["policy"])
                    z, trusted, at = 0.0, 1.0, t + k
                    value = value_in(rows, fresh)
                    for i in range(n):
                        # What was played counts as far as it would be played now, if it is to be corrected
                        move = rows[at]
                        share = min(1.0, move["policy"][move["action"]] / move["chance"]) if vtrace else 1.0
                        after = 0.0 if move["kind"] == END else value(at + 1)
                        z += gamma**i * trusted * (value(at) * (1 - share) + share * move["reward"])
                        z += gamma ** (i + 1) * trusted * share * after
                        trusted, at = trusted * share, at + 1
                        if move["kind"] == END or rows[at]["kind"] == CUT or i == n - 1:
                            break
                        z -= gamma ** (i + 1) * trusted * after  # in place of it comes what follows
                    assert float(batch.value[b, k]) == pytest.approx(z, rel=1e-6, abs=1e-3)
                elif state == "ended":
                    assert batch.value[b, k] == 0
                if k < K and state != "cut":
                    assert float(batch.reward[b, k]) == pytest.approx(row["reward"] if row else 0.0, abs=1e-6)
                    if row:
                        assert batch.action[b, k] == row["action"]
                if row is not None and row["kind"] == END:
                    state = "ended"
    oldest = {g: min(t for game, t in seen if game == g) for g in (0, 1)}
    assert all(t - (store.made[g] - 64) < 6 for g, t in oldest.items())  # nearly all that is kept is drawn
    assert {played[g][t]["kind"] for g, t in seen} >= {MOVE, END}


def value_in(rows, fresh):
    return lambda at: 1_000.0 + at if fresh else rows[at]["value"]


@pytest.mark.parametrize("seed", range(3))
def test_vtrace_values_the_present_policy(seed):
    """Five states for ever, played by an older policy μ. Learned with ratios, the values are those of the policy that
    is min(μ, π) made to sum to 1 (π, where μ tried enough of everything); without them those of μ."""
    rng = np.random.default_rng(seed)
    S, A, gamma, n = 5, 2, 0.9, 3
    move, prize = rng.dirichlet(np.ones(S), (S, A)), rng.normal(size=(S, A))
    old, new = rng.dirichlet(np.full(A, 5.0), S), np.where(prize == prize.max(1, keepdims=True), 0.95, 0.05)

    def truth(policy):
        P, r = np.einsum("sa,sat->st", policy, move), (policy * prize).sum(1)
        return np.linalg.solve(np.eye(S) - gamma * P, r)

    length = 20_000
    state, state_in, actions = 0, [], []
    for _ in range(length + n):
        action = int(rng.random() < old[state, 1])
        state_in.append(state)
        actions.append(action)
        state = rng.choice(S, p=move[state, action])
    state_in, actions = np.array(state_in), np.array(actions)
    windows = np.arange(length)[:, None] + np.arange(n + 1)
    reward = prize[state_in, actions][windows]
    ratio = np.minimum(new / old, 1.0)[state_in, actions][windows]
    both = np.minimum(old, new)
    between = truth(both / both.sum(1, keepdims=True))
    for weights, expected in ((ratio, between), (ratio * 0 + 1, truth(old))):
        value = np.zeros(S)
        for _ in range(150):  # each state's value: the mean of its targets
            targets = muzero.vtrace(reward, value[state_in[windows]], weights, n, 0, gamma)[:, 0]
            value = np.bincount(state_in[:length], targets, S) / np.bincount(state_in[:length], minlength=S)
        assert np.abs(value - expected).max() < 0.15 * np.abs(between - truth(old)).min()


def test_what_is_not_over_is_drawn_only_as_far_as_its_targets_are_known():
    store, played = filled(rows=500, n=4, K=3, steps=61, seed=4)
    np.random.seed(0)
    drawn = set(zip(*store.draw(20_000, False, 0, 0)[:2], strict=True))
    expected = set()
    for g, rows in enumerate(played):
        last = max(t for t, row in enumerate(rows) if row["kind"] != MOVE)
        expected |= {(g, t) for t in range(len(rows)) if t <= last or t + 7 < len(rows)}
    assert drawn == expected
    ones = {(g, t) for g, t in expected if played[g][t]["kind"] != CUT}
    assert set(zip(*store.draw(20_000, True, 1.0, 1.0)[:2], strict=True)) == ones


def test_importance_weights_make_the_mean_a_uniform_one():
    store, _ = filled(rows=40)
    rng = np.random.default_rng(1)
    store.priority = np.where(store.priority > 0, rng.exponential(size=store.priority.shape), 0.0)
    f = rng.normal(size=store.priority.shape) + store.priority  # what is drawn more often has more of it
    uniform = f[store.priority > 0].mean()
    np.random.seed(0)
    for alpha in (0.5, 1.0):
        games, numbers, weight = store.draw(200_000, True, alpha, 1.0)
        drawn = f[games, numbers % 40]
        assert abs((weight * drawn).mean() - uniform) < 4 * (weight * drawn).std() / 200_000**0.5
        assert abs(drawn.mean() - uniform) > 8 * drawn.std() / 200_000**0.5  # which it would not be without them
        shares = store.priority[games, numbers % 40] ** alpha
        assert np.allclose(weight * shares, (weight * shares)[0], rtol=1e-4)
    games, numbers, weight = store.draw(100, True, 1.0, 0.0)
    assert (weight == 1).all()


def test_a_killed_run_finds_the_images_of_its_checkpoint(tmp_path):
    """What was written to the file after the checkpoint lies where nothing of the checkpoint's can be drawn."""
    kind = muzero.Setting((2, 40, 30), np.dtype(np.uint8), 2, None, 0.9, None, 2)

    def play(store, first, count):
        for number in range(first, first + count):
            obs = np.stack([np.full((1, 40, 30), number % 7 + x, np.uint8) for x in (0, 0)], 1)
            row = {"reward": np.array([float(number)]), "age": np.array([number % 7])}
            store.add(np.arange(1), obs, kind=np.array([END if number % 7 == 6 else MOVE]), **row)

    store = muzero.Histories(1, 20, 3, kind, tmp_path, spare=8)
    play(store, 0, 45)
    state = {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in store.state_dict().items()}
    state["columns"] = {name: x if x is None else torch.from_numpy(x.copy()) for name, x in state["columns"].items()}
    state = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in state.items()}
    play(store, 45, 8)
    again = muzero.Histories(1, 20, 3, kind, tmp_path, spare=8)
    again.load_state_dict(state)
    for prioritized in (False, True):
        games, numbers, _ = again.draw(400, prioritized, 1.0, 1.0)
        assert set(numbers) == set(range(45 - 20 + 1, int(again.ready[0])))
        assert (again.take("obs", games, numbers)[:, 1, 0, 0] == numbers % 7).all()
        assert (again.take("obs", games, numbers)[:, 0, 0, 0] == np.maximum(numbers % 7 - 1, 0)).all()
        assert (again.take("reward", games, numbers) == numbers).all()


def test_a_run_keeps_the_room_that_its_checkpoints_need(tmp_path, capsys):
    """The file of pictures has rows enough for what is played between two checkpoints: with fewer, a run that is
    killed would go on from overwritten ones; with more, the file would no longer be read as it was written."""
    settings = {"algorithm": "muzero", **dataclasses.asdict(Args(checkpoint_every=100))}
    (tmp_path / "args.json").write_text(json.dumps(settings))
    assert muzero.parse_args(["--resume", str(tmp_path)]).checkpoint_every == 100
    for other in ("50", "200", "0"):
        with pytest.raises(SystemExit) as end:
            muzero.parse_args(["--resume", str(tmp_path), "--checkpoint-every", other])
        assert end.value.code == 2
        assert "--checkpoint-every is 100 there" in capsys.readouterr().err


def test_frames_are_stacked_again_from_the_episode_alone():
    store, played = filled(rows=50, stack=3, steps=80, seed=2)
    np.random.seed(0)
    games, numbers, _ = store.draw(500, False, 0, 0)
    obs = store.take("obs", games, numbers)
    for g, t, row in zip(games, numbers, obs, strict=True):
        age = played[g][t]["age"]
        assert row.tolist() == [t - min(j, age) for j in (2, 1, 0)]


# ── (5) The loss ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_half_of_the_gradient_passes_the_dynamics_input():
    """h = w x; one head reads h, another w h after two steps: halved once a step, the first head's untouched."""
    w = torch.tensor(3.0, requires_grad=True)
    h = w * 1.0
    loss = h * 1.0  # a head at k = 0
    for _ in range(2):
        h = muzero.half_gradient(h) * 2.0
        loss = loss + h
    loss.backward()
    assert float(loss.detach()) == 3 + 6 + 12
    assert float(w.grad) == 1 + 2 / 2 + 4 / 4


def small_network(seed=0, **changes):
    torch.manual_seed(seed)
    args = Args(hidden=8, latent=4, support=5, unroll=3, steps=2, **changes)
    network = muzero.MuZero((3,), 2, None, False, args)
    for p in network.parameters():
        torch.nn.init.normal_(p, 0, 0.5)
    return network, args


def random_batch(count=6, K=3):
    torch.manual_seed(1)
    return muzero.Unrolled(
        torch.randn(count, 3), torch.randint(2, (count, K)), torch.randn(count, K + 1) * 3, torch.randn(count, K),
        torch.rand(count, K + 1, 2).softmax(-1), torch.randint(2, (count, K + 1)).float().cummin(1)[0],
        torch.randint(2, (count, K + 1)).float(), torch.rand(count), torch.randn(K, count, 3),
    )  # fmt: skip


@pytest.mark.parametrize("squashed", [True, False])
def test_the_loss_is_equation_1_row_by_row(squashed):
    """And, with --consistency, how far unrolled states are from those of what was seen."""
    network, args = small_network(squash=squashed, value_weight=0.25, consistency=2.0 * squashed)
    batch = random_batch()
    code = muzero.squash if squashed else lambda x: x
    policy = value = reward = apart = 0.0

    def ce(logits, x):
        return -(muzero.two_hot(code(x), 5) * logits.log_softmax(-1)).sum()

    for b in range(6):
        s = network.representation(batch.obs[b : b + 1])
        for k in range(4):
            share = float(batch.weight[b]) / 6 / (1 if k == 0 else 3)
            if k:
                s = network.dynamics(s, batch.action[b : b + 1, k - 1])
            p, v, r = network.prediction(s)
            if k:
                reward += share * batch.known[b, k - 1] * ce(r[0], batch.reward[b, k - 1])
            if k and squashed:
                seen = network.representation(batch.later[k - 1, b : b + 1])
                apart += share * batch.moved[b, k] * (s - seen).square().sum()
            policy += share * batch.moved[b, k] * -(batch.policy[b, k] * p[0].log_softmax(-1)).sum()
            value += share * batch.known[b, k] * ce(v[0], batch.value[b, k])
    losses, loss, guess = (x.detach() for x in muzero.muzero_loss(network, batch, args))
    assert torch.allclose(losses, torch.stack([policy, value, reward, torch.as_tensor(apart)]), rtol=1e-4)
    assert float(loss) == pytest.approx((policy + 0.25 * value + reward + 2 * apart).item(), rel=1e-4)
    assert torch.allclose(guess, network.value(batch.obs), atol=1e-5)


def test_hidden_states_lie_between_0_and_1():
    network, _ = small_network()
    s = network.representation(torch.randn(20, 3) * 5)
    for a in (0, 1, 1):
        assert torch.allclose(s.min(1)[0], torch.zeros(20)) and torch.allclose(s.max(1)[0], torch.ones(20))
        s = network.dynamics(s, torch.full((20,), a))


def test_a_model_learns_a_board_game_by_heart():
    """Fitted to a few positions, the unrolled network says what it was told, and each action has its own plane."""
    args = Args(channels=8, blocks=0, hidden=16, support=1, squash=False, unroll=2, consistency=0.0)
    torch.manual_seed(0)
    network = muzero.MuZero((2, 3, 3), 9, TTT.planes, False, args)
    assert network.codes.shape == (9, 1, 3, 3) and (network.codes.flatten(1) == torch.eye(9)).all()
    obs = torch.randint(2, (8, 2, 3, 3)).to(torch.uint8)
    ones = torch.ones(8, 3)
    batch = muzero.Unrolled(
        obs, torch.randint(9, (8, 2)), torch.rand(8, 3) * 2 - 1, torch.rand(8, 2) * 2 - 1,
        torch.randn(8, 3, 9).softmax(-1), ones, ones, torch.ones(8),
    )  # fmt: skip
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(100):
        _, loss, _ = muzero.muzero_loss(network, batch, args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (network.value(obs) - batch.value[:, 0]).abs().max() < 0.2


# ── Boards ────────────────────────────────────────────────────────────────────────────────────────────────────────


def slow_winner(board, line):
    """1 or −1, who has so many in a row, else 0."""
    rows, columns = board.shape
    for r, c in np.ndindex(rows, columns):
        for dr, dc in ((0, 1), (1, 0), (1, 1), (1, -1)):
            cells = [(r + i * dr, c + i * dc) for i in range(line)]
            inside = all(0 <= i < rows and 0 <= j < columns for i, j in cells)
            if inside and board[r, c] and all(board[cell] == board[r, c] for cell in cells):
                return int(board[r, c])
    return 0


@pytest.mark.parametrize(("rules", "line"), [(TTT, 3), (FOUR, 4)])
def test_the_rules_of_the_boards(rules, line):
    rng, ends = np.random.default_rng(0), []
    for _ in range(60):
        board, over = np.zeros((rules.rows, rules.columns), np.int8), False
        while not over:
            legal = rules.legal(board[None])[0]
            a = int(rng.choice(np.flatnonzero(legal)))
            after, won, ended = rules.move(board[None], np.array([a]))
            expected = board.copy()
            if rules.drop:
                assert legal.tolist() == [(board[:, c] == 0).any() for c in range(7)]
                expected[max(r for r in range(6) if board[r, a] == 0), a] = 1
            else:
                expected[divmod(a, 3)] = 1
            assert (after[0] == -expected).all()
            assert bool(won[0]) == (slow_winner(expected, line) == 1)
            over = slow_winner(expected, line) != 0 or (expected != 0).all()
            assert bool(ended[0]) == over
            board = after[0]
        ends.append(bool(won[0]))
    assert 0 < sum(ends) < 60 or rules is FOUR


def test_tic_tac_toe_is_a_draw_and_perfect_play_never_loses():
    assert muzero.minimax("TicTacToe-v0", bytes(9), 9) == 0
    env, rng = gym.make("TicTacToe-v0", opponent="perfect"), np.random.default_rng(0)
    results = []
    for seed in range(60):
        _, info = env.reset(seed=seed)
        over = False
        while not over:
            action = int(rng.choice(np.flatnonzero(info["action_mask"])))
            _, reward, over, _, info = env.step(action)
        results.append(reward)
    assert max(results) <= 0 and min(results) == -1


def test_opponents_win_and_hinder():
    rng = np.random.default_rng(0)

    def moves(board, depth):
        return {muzero.opponent_move("TicTacToe-v0", board_of(board), depth, rng) for _ in range(200)}

    assert moves("x.. ... ...", 0) == set(range(1, 9))
    assert moves("xx. oo. ...", 1) == moves("xx. oo. ...", 2) == {2}
    assert moves("x.. oo. ..x", 1) == {1, 2, 5, 6, 7} and moves("x.. oo. ..x", 2) == {5}
    assert muzero.DEPTH == {"random": 0, "one-ply": 1, "perfect": 9}


def test_a_board_as_an_environment():
    env = gym.make("ConnectFour-v0")
    sides = set()
    for seed in range(12):
        obs, info = env.reset(seed=seed)
        assert env.observation_space.contains(obs)
        sides.add(int(obs[1].sum()))
        while True:
            stones = obs.sum()
            obs, reward, over, cut, info = env.step(int(np.flatnonzero(info["action_mask"])[0]))
            assert not cut and env.observation_space.contains(obs)
            if over:
                board = obs[0].astype(int) - obs[1]
                assert reward == slow_winner(board, 4)
                break
            assert obs.sum() == stones + 2 and obs[0].sum() <= obs[1].sum()
    assert sides == {0, 1}  # either begins
    env.reset(seed=0)
    for _ in range(7):
        obs, reward, over, _, info = env.step(0)
        if over:
            break
    assert over  # the column was full before
    assert env.unwrapped.render().shape == (240, 280, 3)


def test_self_play_tells_of_both_sides():
    games = muzero.SelfPlay(TTT, 2)
    for move, a in enumerate([0, 3, 1, 4]):
        reward, over, cut, _ = games.step(np.array([a, a]))
        assert not reward.any() and not over.any() and not cut.any()
        assert games.moves.tolist() == [move + 1] * 2
    reward, over, _, last = games.step(np.array([2, 8]))
    assert reward.tolist() == [1, 0] and over.tolist() == [True, False]
    assert last[0, 1].sum() == 3 and games.obs[0].sum() == 0 and games.moves.tolist() == [0, 5]
    again = muzero.SelfPlay(TTT, 2)
    again.load_state_dict({name: torch.from_numpy(x) for name, x in games.state_dict().items()})
    assert (again.obs == games.obs).all()


def test_games_begin_after_a_few_random_moves():
    np.random.seed(0)
    games = muzero.SelfPlay(TTT, 600, openings=4)
    stones = (games.boards != 0).sum((1, 2))
    assert (stones == games.moves).all() and (games.boards.sum((1, 2)) == -(games.moves % 2)).all()  # the mover's: 1
    assert (abs(np.bincount(stones, minlength=5) - 120) < 40).all()
    assert len(np.unique(games.boards[stones == 2], axis=0)) > 50  # of 72
    assert (games.obs == muzero.planes_of(games.boards)).all()
    games.boards[0] = board_of("xx. oo. ...")
    games.boards[1:], games.moves[:] = 0, 4
    games.step(np.full(600, 2))  # the first one's game is over
    assert games.moves[0] == (games.boards[0] != 0).sum() <= 4
    assert (games.moves[1:] == 5).all() and (games.boards[1:, 0, 2] == -1).all()


@pytest.mark.parametrize("env_id", ["CartPole-v1", "ALE/Breakout-v5"])
def test_copies_come_back_to_where_they_were(env_id):
    args = Args(env_id=env_id, envs=2, episode_limit=9)
    one, other, rng = muzero.Copies(args), muzero.Copies(args), np.random.default_rng(0)
    for _ in range(12):
        one.step(rng.integers(2, size=2))
    state = one.state_dict()
    other.load_state_dict(
        {"episode": torch.from_numpy(state["episode"]), "actions": [*map(torch.from_numpy, state["actions"])]}
    )
    assert one.moves.any() and one.episode.all()
    for _ in range(7):
        assert (one.obs == other.obs).all() and (one.moves == other.moves).all()
        actions = rng.integers(2, size=2)
        for x, y in zip(one.step(actions), other.step(actions), strict=True):
            assert (x == y).all()


def test_the_network_takes_games_and_images():
    args = Args(channels=4, blocks=1, hidden=8, support=3)
    network = muzero.MuZero((12, 96, 96), 4, None, True, args)
    s = network.representation(torch.zeros(2, 12, 96, 96, dtype=torch.uint8))
    assert s.shape == (2, 4, 6, 6)
    s = network.dynamics(s, torch.tensor([0, 3]))
    assert s.shape == (2, 4, 6, 6) and [x.shape for x in network.prediction(s)] == [(2, 4), (2, 7), (2, 7)]


def test_play_in_the_terminal(tmp_path, monkeypatch, capsys):
    flags = (
        "tictactoe --total-timesteps 64 --envs 4 --simulations 3 --channels 2 --blocks 0 --hidden 4 "
        "--learning-starts 40 --train-every 10 --batch-size 4 --eval-episodes 1 --eval-every 0 --picture-every 0 "
        "--averaging 1"
    )
    run_dir = helpers.run("muzero", flags, tmp_path / "run")
    learned = helpers.checkpoint(run_dir)["learned"]
    assert helpers.differences(learned["network"], learned["average"]) == []  # τ = 1: there is one network
    words = iter(["nine", "99", *(str(i) for _ in range(30) for i in range(9))])
    monkeypatch.setattr("builtins.input", lambda _: next(words, "q"))
    capsys.readouterr()
    muzero.main(["--play", str(run_dir)])
    shown = capsys.readouterr().out
    assert "you are X" in shown and "its visits: " in shown
    assert any(word in shown for word in ("it has won", "you have won", "nobody has won"))
    cart = helpers.run("muzero", "--total-timesteps 1 --envs 1 --simulations 1 --eval-max-steps 2", tmp_path / "cart")
    with pytest.raises(SystemExit):
        muzero.main(["--play", str(cart)])
    assert "no board game" in capsys.readouterr().err


def test_episodes_played_together_are_those_played_one_by_one():
    args = Args(hidden=16, latent=8, simulations=4)
    env = muzero.make_task(args)
    torch.manual_seed(0)
    planner = muzero.make_tree_planner(args, env, CPU)
    for p in planner.network.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    alone = muzero.evaluate(lambda: planner.act, env, 4, 7, 60)
    frames = []
    envs = [muzero.make_task(args, render=i == 0) for i in range(4)]
    assert planner.play_together(envs, 7, 60, frames) == alone
    assert len(set(alone[1])) > 1 and len(frames) == alone[1][0] + 1
    assert planner.play_together(envs, 7, 5)[1] == [5] * 4  # cut


def test_what_is_seen_is_normalised_by_what_was_seen():
    store, played = filled(rows=64, steps=100)
    mean, std = store.spread()
    kept = np.concatenate([np.arange(len(rows))[-64:] for rows in played])
    assert mean == pytest.approx(kept.mean()) and std == pytest.approx(kept.std())
    short, played = filled(rows=64, steps=5)  # rows that were not written yet do not count
    kept = np.concatenate([np.arange(len(rows)) for rows in played])
    assert short.spread()[0] == pytest.approx(kept.mean())
    network, _ = small_network()
    x = torch.randn(50, 3)
    before = network.representation(x)
    assert network.normalized and not muzero.MuZero((2, 3, 3), 9, TTT.planes, False, Args(network="mlp")).normalized
    network.set_normalizer(np.array([5.0, 0, -2]), np.array([2.0, 0.5, 0.0]))  # what never changes is only shifted
    y = x * torch.tensor([2.0, 0.5, 1.0]) + torch.tensor([5.0, 0, -2])
    assert torch.allclose(network.representation(y), before, atol=1e-5)
    assert not torch.allclose(network.representation(x), before, atol=1e-2)


@pytest.mark.learning
def test_it_learns_to_balance_a_pole(tmp_path):
    """Two minutes; random moves, and the search with a network that has learned nothing, are measured too."""
    flags = "--total-timesteps 10000 --eval-every 0 --eval-episodes 10 --picture-every 0"
    learned = helpers.scalars(helpers.run("muzero", flags, tmp_path / "run"))["eval/episodic_return"]
    args = muzero.PRESETS["cartpole"][1]
    envs = [muzero.make_task(args) for _ in range(10)]
    torch.manual_seed(0)
    untrained = np.mean(muzero.make_tree_planner(args, envs[0], CPU).play_together(envs, 1, 500)[0])
    rng = np.random.default_rng(0)
    by_chance = np.mean(muzero.evaluate(lambda: lambda obs: int(rng.integers(2)), envs[0], 20, 1, 500)[0])
    assert max(untrained, by_chance) < 60
    assert list(learned.values())[-1] > 400  # of ten seeds nine had 500 by then, one 474; at half of it 122 to 500
