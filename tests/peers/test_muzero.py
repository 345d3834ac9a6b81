"""The searches of muzero.py and gumbel_muzero.py against mctx, node by node; transforms and returns against rlax."""

import functools
import itertools

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import module

jax, mctx, rlax = map(pytest.importorskip, ("jax", "mctx", "rlax"))
jnp, ROOTS = jax.numpy, 64
assert_equal = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9)
every_case = pytest.mark.parametrize(("actions", "simulations"), [(2, 50), (9, 4), (9, 25), (18, 50)])
every_search = [*itertools.product((0.97, -1.0), (False, True))]  # γ of one and of two players; without and with noise


@pytest.fixture(autouse=True)
def double_precision():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def random_agent(name, actions, simulations, **settings):
    """A network with random weights, and observations. Most actions at a root are legal, at least one."""
    torch.manual_seed(actions + simulations)
    env, algorithm = gym.Env(), module(name)
    env.observation_space, env.action_space = gym.spaces.Box(-9, 9, (18,)), gym.spaces.Discrete(actions)
    env.legal = lambda obs: (obs[:, :actions] > -1) | (obs[:, :actions] == obs[:, :actions].max(1, keepdims=True))
    args = algorithm.Args(simulations=simulations, latent=16, hidden=32, device="cpu", **settings)
    agent = algorithm.Agent(env, args)
    for p in agent.heads[-1].parameters():
        torch.nn.init.normal_(p, std=0.5)
    return algorithm, agent, torch.randn(ROOTS, 18).numpy()


def search_with_mctx(policy, agent, **settings):
    """The same network, called from within JAX: a compiled search from observations, or with other logits at a root."""
    A = agent.actions

    @torch.inference_mode()
    def step(action, s):
        s = agent.dynamics(torch.from_numpy(np.array(s)), torch.from_numpy(np.array(action)).long())
        return *(np.ascontiguousarray(x) for x in agent.numbers(s)), s.numpy()

    def recurrent(gamma, key, action, s):
        shapes = [((ROOTS, A), np.float64), ((ROOTS,), np.float64), ((ROOTS,), np.float64), (s.shape, np.float32)]
        prior, value, reward, s = jax.pure_callback(step, [jax.ShapeDtypeStruct(*x) for x in shapes], action, s)
        discount = jnp.full_like(reward, gamma)
        return mctx.RecurrentFnOutput(reward=reward, discount=discount, prior_logits=prior, value=value), s

    search = functools.partial(policy, recurrent_fn=recurrent, num_simulations=agent.args.simulations, **settings)
    search = jax.jit(search, compiler_options={"xla_backend_optimization_level": 0})

    @torch.inference_mode()
    def call(obs, logits=None, **more):
        s = agent.representation(agent.tensor(obs))
        prior, value, _ = agent.numbers(s)
        prior, value, s = (jnp.array(x) for x in (prior if logits is None else logits, value, s.numpy()))
        root = mctx.RootFnOutput(prior_logits=prior, value=value, embedding=s)
        return search(agent.gamma, jax.random.PRNGKey(0), root, invalid_actions=jnp.array(~agent.legal(obs)), **more)

    return call


def assert_same_trees(ours, theirs):
    assert (ours.child == theirs.children_index).all() and (ours.visits == theirs.children_visits).all()
    assert (ours.visits[:, 0].sum(1) == ours.child.shape[1] - 1).all() and ours.visits[:, 1:].any()
    assert_equal(ours.reward, theirs.children_rewards, atol=1e-12)
    assert_equal(
        ours.q, (ours.visits > 0) * (theirs.children_rewards + theirs.children_discounts * theirs.children_values)
    )


def with_bounds(first, last, body, state):
    """Eq. 5 for mctx, which itself scales Q in each node: the extremes of all Q that a tree has had."""

    def simulation(i, state):
        (key, tree), (low, high) = body(i, state), state[1].extra_data
        q, seen = tree.children_rewards + tree.children_discounts * tree.children_values, tree.children_visits > 0
        low = jnp.minimum(low, jnp.where(seen, q, jnp.inf).min((1, 2)))
        high = jnp.maximum(high, jnp.where(seen, q, -jnp.inf).max((1, 2)))
        return key, tree.replace(extra_data=(low, high))

    start = jnp.full(ROOTS, jnp.inf), jnp.full(ROOTS, -jnp.inf)
    return jax.lax.fori_loop(first, last, simulation, (state[0], state[1].replace(extra_data=start)))


def by_bounds(tree, node):
    low, high = tree.extra_data
    seen = (tree.children_visits[node] > 0) & (high - low > 1e-9)  # XLA rounds the same Q in two ways
    return jnp.where(seen, (tree.qvalues(node) - low) / (high - low), 0.0)


@every_case
def test_trees_of_puct_are_mctxs(actions, simulations):
    """mctx is given the noise in the prior of the roots."""
    muzero, agent, obs = random_agent("muzero", actions, simulations)
    settings = {"dirichlet_fraction": 0.0, "loop_fn": with_bounds, "qtransform": by_bounds}
    peer = search_with_mctx(mctx.muzero_policy, agent, **settings)
    for agent.gamma, noise in every_search:
        ours = muzero.search(agent, obs, noise)
        theirs = peer(obs, np.log(ours.tree.prior[:, 0] + 1e-300))
        assert_same_trees(ours.tree, theirs.search_tree)
        assert_equal(ours.visits / simulations, theirs.action_weights)
        assert_equal(ours.value, theirs.search_tree.node_values[:, 0])


def test_trees_of_board_games_are_mctxs():
    """With mctx's own qtransform, because the bounds of Q are known: no rewards, and values from −1 to 1."""
    muzero, agent, obs = random_agent("muzero", 9, 50, support=1, squash=False)
    agent.heads[-1].weight.data[-3:], agent.heads[-1].bias.data[-3:] = 0.0, 0.0
    agent.gamma, agent.bounds = -1.0, (-1.0, 1.0)
    qtransform = functools.partial(mctx.qtransform_by_min_max, min_value=-1.0, max_value=1.0)
    peer = search_with_mctx(mctx.muzero_policy, agent, dirichlet_fraction=0.0, qtransform=qtransform)
    assert_same_trees(muzero.search(agent, obs).tree, peer(obs).search_tree)


@every_case
def test_gumbel_trees_actions_and_policies_are_mctxs(actions, simulations, monkeypatch):
    """The Gumbel noise is mctx's."""
    considered = 3 if actions == 9 else 16
    muzero, agent, obs = random_agent("gumbel_muzero", actions, simulations, considered=considered)
    peer = search_with_mctx(mctx.gumbel_muzero_policy, agent, max_num_considered_actions=considered)
    gumbel = jax.random.gumbel(jax.random.split(jax.random.PRNGKey(0))[1], (ROOTS, actions), jnp.float64)
    uniform = torch.from_numpy(np.exp(-np.exp(-np.array(gumbel))))
    monkeypatch.setattr(torch, "rand", lambda *shape, **kwargs: uniform)
    for agent.gamma, noise in every_search:
        ours, theirs = muzero.search(agent, obs, noise), peer(obs, gumbel_scale=float(noise))
        assert_same_trees(ours.tree, theirs.search_tree)
        assert (ours.action == theirs.action).all()
        assert_equal(ours.policy, theirs.action_weights)
        assert_equal(ours.value, theirs.search_tree.node_values[:, 0])


@pytest.mark.parametrize("name", ["muzero", "gumbel_muzero"])
def test_values_and_returns_are_rlaxs(name):
    torch.manual_seed(0)
    muzero, x = module(name), torch.randn(1_000, dtype=torch.float64) * 100
    assert_equal(muzero.squash(x), rlax.signed_hyperbolic(x.numpy(), 1e-3))
    assert_equal(muzero.unsquash(x), rlax.signed_parabolic(x.numpy(), 1e-3))
    x = torch.cat([x.float() / 4, torch.arange(-22.0, 23.0)])
    assert_equal(muzero.two_hot(x, 20), rlax.transform_to_2hot(x.numpy(), -20, 20, 41), atol=2e-5)  # rlax adds 1e-5
    for n, K, gamma in ((1, 5, 0.97), (9, 5, -1.0), (10, 3, 0.97)):
        reward, value = torch.randn(4, K + n), torch.randn(4, K + 1)
        v, discount = np.pad(value, ((0, 0), (n - 1, 0))), np.full(reward.shape, gamma, np.float32)
        returns = jax.vmap(functools.partial(rlax.n_step_bootstrapped_returns, n=n))
        theirs = returns(reward.numpy(), discount, v)[:, : K + 1]
        assert_equal(muzero.n_step_returns(reward, value, n, gamma), theirs, atol=1e-5)
