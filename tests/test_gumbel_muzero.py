"""Gumbel MuZero's own part: sequential halving, improved policies, Connect Four. test_muzeros.py has the rest."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import module
from test_muzero import Model

gumbel = module("gumbel_muzero")
ARGS = gumbel.Args(device="cpu")


def slow_sigma(logits, n, q, value, args):
    """Eq. 33, 10 and 8, for the actions of one node."""
    prior, tried = [math.exp(x) for x in logits], [a for a in range(len(n)) if n[a] > 0]
    mixed = value
    if tried:
        mean = sum(prior[a] * q[a] for a in tried) / sum(prior[a] for a in tried)
        mixed = (value + sum(n) * mean) / (1 + sum(n))
    completed = [q[a] if n[a] > 0 else mixed for a in range(len(n))]
    low, high = min(completed), max(completed)
    return [(args.c_visit + max(n)) * args.c_scale * (x - low) / max(high - low, 1e-8) for x in completed]


def slow_policy(logits, sigma):
    """Eq. 11"""
    weights = [math.exp(x + y - max(logits) - max(sigma)) for x, y in zip(logits, sigma, strict=True)]
    return [x / sum(weights) for x in weights]


def slow_halving(m, n):
    """Visits of the action that each of n simulations chooses: all that are left are visited equally often, in about
    n / log₂ m simulations, and then half of them is left, but at least two."""
    visits, left, order = [0] * m, m, []
    while len(order) < n:
        for _ in range(max(1, int(n / (math.ceil(math.log2(m)) * left))) if m > 1 else n):
            for j in range(left):
                order.append(visits[j])
                visits[j] += 1
        left = max(2, left // 2) if m > 1 else 1
    return order[:n]


def test_halving_divides_the_simulations():
    for m in (*range(1, 20), 32):
        for n in (1, 2, 3, 4, 7, 16, 25, 50, 64, 200):
            assert gumbel.halving(m, n) == slow_halving(m, n), (m, n)
    assert gumbel.halving(4, 11) == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4]
    assert [gumbel.halving(16, 64).count(k) for k in (0, 1, 2, 3, 6, 7, 14)] == [16, 8, 8, 4, 4, 2, 2]


def new_node(model, s):
    logits, (value,), (reward,) = model.numbers(s)
    return SimpleNamespace(s=s, logits=logits[0], values=[value], value=value, reward=reward, children={})


def edges(model, node):
    """N and q of all actions: the number of values that were backed up, and r + γ times their mean."""
    n, q = [0] * model.actions, [0.0] * model.actions
    for a, child in node.children.items():
        n[a], q[a] = len(child.values), child.reward + model.gamma * np.mean(child.values)
    return n, q


def slow_search(model, obs, scores):
    """One root, by recursion. `scores`: g + logits of the actions that are considered"""
    root = new_node(model, torch.from_numpy(obs[None]))
    root.logits = np.where(model.legal(obs[None])[0], root.logits, -1e9)

    def best(node, wanted):
        """Of the considered actions that have so many visits."""
        n, q = edges(model, node)
        sigma = slow_sigma(node.logits, n, q, node.value, model.args)
        return max((a for a in scores if n[a] == wanted), key=lambda a: scores[a] + sigma[a])

    def visit(node, a):
        if a in node.children:
            child = node.children[a]
            n, q = edges(model, child)
            policy = slow_policy(child.logits, slow_sigma(child.logits, n, q, child.value, model.args))
            value = visit(child, np.argmax([policy[b] - n[b] / (1 + sum(n)) for b in range(model.actions)]))
            child.values.append(value)
        else:
            child = node.children[a] = new_node(model, model.dynamics(node.s, torch.tensor([a])))
        return child.reward + model.gamma * child.values[-1]

    for wanted in slow_halving(len(scores), model.args.simulations):
        root.values.append(visit(root, best(root, wanted)))
    n, q = edges(model, root)
    policy = slow_policy(root.logits, slow_sigma(root.logits, n, q, root.value, model.args))
    return root, best(root, max(n)), policy


def assert_same(model, tree, b, i, node):
    """Node i of tree b, and all below it."""
    n, q = edges(model, node)
    assert tree.visits[b, i].tolist() == n and np.allclose(tree.q[b, i], q)
    assert tree.value[b, i] == node.value and np.allclose(tree.logits[b, i], node.logits)
    for a, child in node.children.items():
        assert tree.reward[b, i, a] == child.reward
        assert_same(model, tree, b, tree.child[b, i, a], child)


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize(("actions", "considered", "simulations"), [(2, 16, 20), (9, 4, 30), (9, 16, 3)])
@pytest.mark.parametrize("gamma", [0.97, -1.0])
def test_trees_are_those_of_a_recursive_search(gamma, actions, considered, simulations, noise):
    obs, args = np.random.default_rng(1).normal(size=(3, 4)), replace(ARGS, considered=considered, c_visit=5.0)
    model = Model(replace(args, simulations=simulations), actions, gamma)
    torch.manual_seed(0)
    found = gumbel.search(model, obs, noise)
    torch.manual_seed(0)
    uniform = torch.rand(3, actions, dtype=torch.float64)
    for b, legal in enumerate(model.legal(obs)):
        logits, guess, _ = model.numbers(torch.from_numpy(obs[b : b + 1]))
        scores = {a: logits[0, a] - noise * math.log(-math.log(uniform[b, a])) for a in np.flatnonzero(legal)}
        ranked = sorted(scores, key=scores.get)[::-1][: min(considered, simulations)]
        root, action, policy = slow_search(model, obs[b], {a: scores[a] for a in ranked})
        assert_same(model, found.tree, b, 0, root)
        assert found.action[b] == action and np.allclose(found.policy[b], policy) and found.guess[b] == guess[0]
        assert found.value[b] == pytest.approx(np.mean(root.values)) and (found.policy[b, ~legal] == 0).all()
        assert np.allclose(found.prior[b], slow_policy(np.where(legal, logits[0], -1e9), [0.0] * actions))
        assert noise or gumbel.Agent.forward(model, obs[b]) == action
    assert (ARGS.c_visit, ARGS.c_scale, ARGS.considered) == (50, 0.1, 16)


def test_considered_actions_are_a_sample_without_replacement():
    model = Model(replace(ARGS, considered=2, simulations=2), 5)
    torch.manual_seed(0)
    found = gumbel.search(model, np.tile([1.0, -0.3, 0.2, 0.5], (20_000, 1)), True)
    p, pairs = found.prior[0], found.tree.visits[:, 0]
    assert (pairs.sum(1) == 2).all() and pairs.max() == 1 and (p > 0).sum() == 3
    for a, b in zip(*np.triu_indices(5, 1), strict=True):
        expected = p[a] * p[b] / (1 - p[a]) + p[b] * p[a] / (1 - p[b])
        assert (pairs[:, a] * pairs[:, b]).mean() == pytest.approx(expected, abs=0.015)


class Bandit(Model):
    """A hidden state is logits and prizes of the actions, value and reward; each episode is one move."""

    def dynamics(self, s, a):
        return torch.nn.functional.pad(s[torch.arange(len(s)), 6 + a][:, None], (13, 0))

    def numbers(self, s):
        return s[:, :6].numpy(), s[:, 12].numpy().copy(), s[:, 13].numpy()


@pytest.mark.parametrize("simulations", [2, 4, 16])
def test_the_policy_improves_however_few_the_simulations_are(simulations):
    """In expectation over the noise, for each of 30 bandits whose values are known."""
    rng, model = np.random.default_rng(0), Bandit(replace(ARGS, simulations=simulations), 6)
    logits, prizes, model.legal = rng.normal(size=(30, 6)), rng.random((30, 6)), lambda obs: obs[:, :6] < 9
    value = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True) * prizes).sum(1)
    obs = np.concatenate([logits, prizes, value[:, None], 0 * value[:, None]], 1).repeat(400, 0)
    torch.manual_seed(0)
    found = gumbel.search(model, obs, True)
    played = obs[np.arange(12_000), 6 + found.action].reshape(30, 400).mean(1)
    learned = (found.policy * obs[:, 6:12]).sum(1).reshape(30, 400).mean(1)
    assert (played > value - 0.03).all() and played.mean() > value.mean() + 0.03
    assert (learned > value).all() and learned.mean() > value.mean() + 0.05


def directions(stones):
    """In which four of these stones are in a row."""
    board, steps = np.pad(stones, 3), ((0, 1), (1, 0), (1, 1), (1, -1))
    cells = np.argwhere(board)
    return {step for step in steps for cell in cells if all(board[*cell + i * np.array(step)] for i in range(4))}


def test_connect_four_is_that_of_slow_rules():
    env, rng, kinds = gumbel.ConnectFour(), np.random.default_rng(0), set()
    env.opponent = None
    for _ in range(60):
        obs, over = env.reset()[0], False
        while not over:
            own, other, a = obs[0].copy(), obs[1], int(rng.integers(7))
            free = [row for row in range(6) if not obs[:, row, a].any()]
            assert env.legal(obs[None])[0, a] == bool(free) and env.observation_space.contains(obs)
            obs, r, over, *_ = env.step(a)
            if free:
                own[max(free), a] = 1
                won = directions(own)
                assert np.array_equal(obs, [other, own]) and (r, over) == (bool(won), bool(won))
            kinds |= won if free else {(r, over)}
    assert len(kinds) == 5 and (-1.0, True) in kinds


def test_a_full_board_is_a_draw_and_an_action_is_a_column():
    env, agent = gumbel.ConnectFour(), gumbel.Agent(gumbel.ConnectFour(), ARGS)
    assert [agent.codes[a].nonzero().tolist() for a in (0, 6)] == [[[0, row, a] for row in range(6)] for a in (0, 6)]
    pattern = np.float32([[(column // 2 + row) % 2 for column in range(7)] for row in range(6)])
    env.stones = np.stack([pattern, 1 - pattern])
    env.stones[:, 0, 6] = 0
    assert env.legal(env.stones[None]).tolist() == [[False] * 6 + [True]]
    assert env.step(6)[1:3] == (0, True)
