"""MuZero's own part: the search by upper confidence bounds, its actions, and Atari. test_muzeros.py has the rest."""

import math
from dataclasses import replace
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import module
from torch.nn import functional as F

muzero = module("muzero")
ARGS = muzero.Args(device="cpu")
UNKNOWN = 1e30, -1e30  # bounds of Q before the first simulation


class Model:
    """Random matrices; a hidden state is the observation, four numbers. Up to a third of the actions are illegal."""

    representation, tensor = torch.nn.Identity(), staticmethod(torch.from_numpy)

    def __init__(self, args, actions, gamma=0.97, bounds=UNKNOWN):
        rng, self.args, self.actions = np.random.default_rng(actions), args, actions
        self.gamma, self.bounds, self.heads = gamma, bounds, torch.from_numpy(rng.normal(size=(4, actions + 2)))
        self.step = torch.from_numpy(rng.normal(size=(actions, 4, 4)))

    def dynamics(self, s, a):
        return (s[:, None] @ self.step[a])[:, 0].tanh()

    def numbers(self, s):
        x = (s @ self.heads).numpy()
        return x[:, 2:], x[:, 0].copy(), x[:, 1]

    def legal(self, obs):
        return np.arange(self.actions) % 3 != np.floor(obs[:, :1] * 100) % 3


def new_node(prior):
    return SimpleNamespace(prior=prior, values=[], q=0.0)  # N(s,a): the number of values that were backed up


def score(child, total, low, high, args):
    """Eq. 2 and 5: an action of a node that has N(s) = `total`."""
    n, more = len(child.values), math.log((total + args.c2 + 1) / args.c2)
    q = (child.q - low) / (high - low) if n and high > low else 0.0
    return q + child.prior * math.sqrt(total) / (1 + n) * (args.c1 + more)


def slow_search(model, obs, priors):
    """One root, by recursion: Appendix B as it stands. `priors`: action → P(s⁰,a)"""
    (low, high), root = model.bounds, new_node(1.0)
    root.s, root.children = torch.from_numpy(obs[None]), {a: new_node(p) for a, p in priors.items()}
    root.values.append(model.numbers(root.s)[1][0])

    def visit(node):
        nonlocal low, high
        total = 1 + sum(len(child.values) for child in node.children.values())
        a = max(node.children, key=lambda a: score(node.children[a], total, low, high, model.args))
        child, old = node.children[a], bool(node.children[a].values)
        if not old:
            child.s = model.dynamics(node.s, torch.tensor([a]))
            logits, (value,), (child.reward,) = model.numbers(child.s)
            child.children = {b: new_node(p) for b, p in enumerate(np.exp(logits[0]) / np.exp(logits[0]).sum())}
        child.values.append(visit(child) if old else value)
        child.q = child.reward + model.gamma * np.mean(child.values)
        low, high = min(low, child.q), max(high, child.q)
        return child.reward + model.gamma * child.values[-1]

    for _ in range(model.args.simulations):
        root.values.append(visit(root))
    return root, low, high


def assert_same(tree, b, i, node):
    """Node i of tree b, and all below it."""
    for a, n in enumerate(tree.visits[b, i]):
        child = node.children.get(a, new_node(0.0))
        assert n == len(child.values) and tree.prior[b, i, a] == pytest.approx(child.prior, abs=1e-6)
        if n:
            assert [tree.q[b, i, a], tree.reward[b, i, a]] == pytest.approx([child.q, child.reward], abs=1e-9)
            assert_same(tree, b, tree.child[b, i, a], child)


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("actions", [2, 9])
@pytest.mark.parametrize(("gamma", "bounds"), [(0.97, UNKNOWN), (-1.0, (-1.0, 1.0))])
def test_trees_are_those_of_a_recursive_search(gamma, bounds, actions, noise):
    model = Model(replace(ARGS, simulations=30, c1=1.1, c2=15.0, noise_share=0.4), actions, gamma, bounds)
    obs = np.random.default_rng(1).normal(size=(3, 4))
    torch.manual_seed(0)
    found = muzero.search(model, obs, noise)
    torch.manual_seed(0)
    eta = torch.distributions.Gamma(0.25, 1.0).sample((3, actions)).double().numpy()
    for b, legal in enumerate(model.legal(obs)):
        logits, guess, _ = model.numbers(torch.from_numpy(obs[b : b + 1]))
        prior, eta[b] = np.zeros(actions), eta[b] * legal / eta[b][legal].sum()
        prior[legal] = np.exp(logits[0, legal]) / np.exp(logits[0, legal]).sum()
        assert found.prior[b] == pytest.approx(prior) and found.guess[b] == guess[0] and 0 < legal.sum() <= actions
        mixed = 0.6 * prior + 0.4 * eta[b] if noise else prior
        root, low, high = slow_search(model, obs[b], {a: mixed[a] for a in np.flatnonzero(legal)})
        assert_same(found.tree, b, 0, root)
        assert found.value[b] == pytest.approx(np.mean(root.values), abs=1e-9) and found.visits[b].sum() == 30
        assert [found.tree.low[b], found.tree.high[b]] == pytest.approx([low, high], abs=1e-9)
        assert noise or muzero.Agent.forward(model, obs[b]) == found.visits[b].argmax()
    env = muzero.TicTacToe() if gamma < 0 else gym.make("CartPole-v1")
    assert muzero.Agent(env, ARGS).bounds == bounds and (ARGS.c1, ARGS.c2) == (1.25, 19_652)


def test_noise_is_dirichlet_over_the_legal_actions():
    model, obs = Model(replace(ARGS, simulations=1, noise_alpha=0.5, noise_share=0.3), 3), np.ones((4_000, 4))
    torch.manual_seed(0)
    found = muzero.search(model, obs, True)
    eta, legal = (found.tree.prior[:, 0] - 0.7 * found.prior) / 0.3, model.legal(obs[:1])[0]
    assert np.allclose(eta.sum(1), 1) and (eta[:, ~legal] == 0).all() and (eta > -1e-9).all() and legal.sum() == 2
    assert eta[:, legal].mean(0) == pytest.approx([0.5, 0.5], abs=0.02)
    assert eta[:, legal].var(0) == pytest.approx([1 / 8, 1 / 8], abs=0.01)  # of Beta(α, α): 1 / (4 (2 α + 1))


class Rules(Model):
    """The rules of tic-tac-toe as the model. A hidden state is the stones, whether the game is over, and the reward."""

    def __init__(self, simulations):
        super().__init__(replace(ARGS, simulations=simulations), 9, -1.0, (-1.0, 1.0))
        self.heads = F.one_hot(torch.full((20,), 1), 11) * (torch.arange(20) == 19)[:, None].double()
        self.game, self.representation = muzero.TicTacToe(), lambda obs: F.pad(obs.flatten(1), (0, 2))
        self.game.opponent, self.legal = None, self.game.legal

    def dynamics(self, s, a):
        s = s * (torch.arange(20) < 19)
        for row, action in zip(s, a.tolist(), strict=True):
            if not row[18]:
                self.game.stones = row[:18].view(2, 3, 3).numpy().copy()
                stones, row[19], row[18], *_ = self.game.step(action)
                row[:18] = torch.from_numpy(stones).flatten()
        return s


def minimax(own, other):
    """The best result of the player to move, and the actions that lead to it. A board is a set of cells."""
    results, lines = {}, ("012", "345", "678", "036", "147", "258", "048", "246")
    for a in {*range(9)} - own - other:
        won = any(own | {a} >= {*map(int, line)} for line in lines)
        results[a] = 1 if won else 0 if len(own | other) == 8 else -minimax(other, own | {a})[0]
    return max(results.values()), [a for a in results if results[a] == max(results.values())]


def test_with_the_rules_as_its_model_the_search_wins_and_blocks():
    rng, boards, best = np.random.default_rng(0), [], []
    while len(best) < 10:
        stones = rng.permutation(9).tolist()[:4]
        result, actions = minimax({*stones[:2]}, {*stones[2:]})
        if len(actions) == 1:  # it wins, or prevents a loss
            boards += [np.eye(9)[stones[:2]].sum(0), np.eye(9)[stones[2:]].sum(0)]
            best.append((result, *actions))
    found = muzero.search(Rules(250), np.reshape(boards, (10, 2, 3, 3)))
    assert found.visits.argmax(1).tolist() == [a for _, a in best] and {result for result, _ in best} == {0, 1}


@pytest.mark.parametrize(("flag", "powers"), [("--cooling", (1, 1, 2, 4)), ("--no-cooling", (1, 1, 1, 1))])
def test_actions_are_sampled_by_visits_and_temperature(flag, powers, tmp_path, monkeypatch):
    """Visits of 1 and 3 in each search: T is 1, 1, 1/2 and 1/4 in the four quarters."""
    played, step = [], muzero.Environments.step
    monkeypatch.setattr(muzero.Environments, "step", lambda *x: played.append(x[1]) or step(*x))
    monkeypatch.setattr(muzero.Run, "due", lambda *_: False)
    monkeypatch.setattr(muzero.Replay, "ready", lambda *_: 0)
    found = muzero.Search(np.tile([1.0, 3.0], (40, 1)), np.zeros(40), None, None, None)
    monkeypatch.setattr(muzero, "search", lambda *_, **__: found)
    flags = f"--envs 40 --round-moves 20 --total-timesteps 3200 --learning-starts 9999 --simulations 4 {flag}"
    muzero.main(f"{flags} --reanalyze 0 --episodes 1 --device cpu --run-dir {tmp_path / 'run'}".split())
    shares = [3**x / (1 + 3**x) for x in powers]
    assert np.reshape(played, (4, -1)).mean(1) == pytest.approx(shares, abs=0.04)


@pytest.mark.skipif("Atari/qbert-v0" not in gym.registry, reason="the ROMs are not here")
def test_atari_has_seeds_whole_episodes_and_its_own_rewards():
    """Three of the four frames of each observation, also of the last one, are those of the observation before."""
    env, copy, other = (gym.make("Atari/qbert-v0") for _ in range(3))
    obs, _, _ = (game.reset(seed=seed)[0] for game, seed in ((env, 3), (copy, 3), (other, 4)))
    assert env.spec.max_episode_steps == 27_000 and env.action_space == gym.spaces.Discrete(6)
    assert env.observation_space == gym.spaces.Box(0, 255, (4, 96, 96), np.uint8)
    rewards, over, steps, different, rng = set(), False, 0, 0, np.random.default_rng(0)
    while not over:
        assert env.observation_space.contains(obs)
        before, action = obs.copy(), int(rng.integers(6))
        obs, reward, over, truncated, _ = env.step(action)
        assert np.array_equal(obs[:3], before[1:]) and not truncated
        if steps < 100 and not over:
            assert np.array_equal(copy.step(action)[0], obs)
            different += not np.array_equal(other.step(action)[0], obs)
        rewards, steps = rewards | {reward}, steps + 1
    assert rewards == {0, 25} and different > 50 and 200 < steps < 2_000
