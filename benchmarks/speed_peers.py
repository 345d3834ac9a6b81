"""The hot paths of algos/ beside the same work by other libraries, in one process and in turns.

    pip install stable-baselines3 jax mctx
    pip install --no-deps mbrl lightzero omegaconf hydra-core termcolor antlr4-python3-runtime==4.9.3
    taskset -c 0 python benchmarks/speed.py --peers     # on one core: JAX takes all that it finds

A library that is not installed is left out. LightZero's compiled trees are used without the rest of it, which needs
packages that contradict ours. The fastest round of each side counts; the first one, which compiles, is not timed.
"""

import importlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import gymnasium as gym
import mbpo
import numpy as np
import pets
import torch

SIMULATIONS = 50
ROOTS = (16, 64, 256)  # that are searched at the same time


class Pair(NamedTuple):
    """The same work by a file of algos/ and by a library."""

    file: str
    library: str
    name: str
    unit: str
    work: float  # units in one call
    ours: Callable
    theirs: Callable


# ── Stable-Baselines3: updates of SAC ─────────────────────────────────────────────────────────────────────────────


def stable_baselines3_pairs() -> Iterator[Pair]:
    from stable_baselines3 import SAC

    updates = 20
    env, args = gym.make("Pendulum-v1"), mbpo.Args(env_id="Pendulum-v1", device="cpu")
    sizes = {"net_arch": [args.hidden] * 2}
    theirs = SAC("MlpPolicy", env, policy_kwargs=sizes, batch_size=args.batch_size, learning_starts=2_000, device="cpu")
    theirs.learn(1_000)  # random actions fill its replay
    agent, replay = mbpo.Agent(env, args), mbpo.Replay(1_000, env, "cpu")
    obs, _ = env.reset(seed=0)
    for i in range(1_000):
        a = env.action_space.sample()
        obs2, r, terminated, _, _ = env.step(a)
        replay.add(obs, a, r, obs2, terminated, 0)
        obs = env.reset()[0] if i % 200 == 199 else obs2
    critic_optimizer = torch.optim.Adam(agent.critics.parameters(), args.learning_rate, fused=True)
    policy_optimizer = torch.optim.Adam([*agent.policy.parameters(), agent.log_alpha], args.learning_rate, fused=True)

    def ours() -> None:
        for _ in range(updates):
            batch = replay.rows(torch.randint(replay.size, (args.batch_size,)))[:5]
            mbpo.update(agent, critic_optimizer, policy_optimizer, batch, args)

    name = f"SAC, 2 × {args.hidden}, batch {args.batch_size}"
    yield Pair("mbpo", "Stable-Baselines3", name, "updates/s", updates, ours,
               lambda: theirs.train(gradient_steps=updates, batch_size=args.batch_size))  # fmt: skip


# ── mbrl-lib: the ensemble and the planner of PETS ────────────────────────────────────────────────────────────────


def mbrl_pairs() -> Iterator[Pair]:
    import mbrl.models
    from mbrl.planning.trajectory_opt import CEMOptimizer

    args = pets.Args(device="cpu")
    env = pets.make_env(args)
    agent, obs = pets.Agent(env, args), env.reset(seed=0)[0]
    D, A = len(obs), env.action_space.shape[0]
    network = mbrl.models.GaussianMLP(
        D + A, D, "cpu", args.layers, args.members, args.hidden, propagation_method="fixed_model"
    )
    wrapped = mbrl.models.OneDTransitionRewardModel(network, normalize=True, learned_rewards=False)

    def reward(a: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
        return pets.cart_pole_reward(s2, a, s2)[:, None]

    simulator = mbrl.models.ModelEnv(
        env, wrapped, lambda a, s2: torch.zeros(len(s2), 1, dtype=torch.bool), reward, torch.Generator().manual_seed(0)
    )
    low, high = ([bound.tolist()] * args.horizon for bound in (env.action_space.low, env.action_space.high))
    cem = CEMOptimizer(args.iterations, args.elites / args.candidates, args.candidates, low, high, args.alpha,
                       torch.device("cpu"), return_mean_elites=True)  # fmt: skip
    start = torch.zeros(args.horizon, A)

    def returns_of(actions: torch.Tensor) -> torch.Tensor:
        return simulator.evaluate_action_sequences(actions, initial_state=obs, num_particles=args.particles)

    name = f"CEM, {args.candidates} × {args.particles} particles × {args.horizon} steps × {args.iterations}"
    yield Pair("pets", "mbrl-lib", name, "plans/s", 1, lambda: agent(obs), lambda: cem.optimize(returns_of, start))

    updates, shape = 20, (args.members, args.batch_size)
    s, a, s2, rest = torch.randn(*shape, D), torch.randn(*shape, A), torch.randn(*shape, D), torch.zeros(*shape, 1)
    optimizer = pets.make_optimizer(agent.model, args)
    their_optimizer = torch.optim.Adam(network.parameters(), args.learning_rate, weight_decay=1e-4)
    x = torch.cat([s, a], -1)

    def ours() -> None:
        for _ in range(updates):
            optimizer.zero_grad()
            pets.ensemble_loss(agent.model, s, a, rest, s2, rest).backward()
            optimizer.step()

    def theirs() -> None:
        for _ in range(updates):
            network.update(x, their_optimizer, s2 - s)

    name = f"ensemble of {args.members}, {args.layers} × {args.hidden}, batch {args.batch_size}"
    yield Pair("pets", "mbrl-lib", name, "training steps/s", updates, ours, theirs)


# ── mctx and LightZero: tree search with one network ──────────────────────────────────────────────────────────────


def searches(library: str, search_of: Callable) -> Iterator[Pair]:
    for name in ("muzero", "gumbel_muzero"):
        torch.manual_seed(0)
        module = importlib.import_module(name)
        settings = module.Args(simulations=SIMULATIONS, device="cpu")
        agent = module.Agent(module.make_env(settings), settings)
        for p in agent.heads[-1].parameters():
            torch.nn.init.normal_(p, std=0.3)  # a network with opinions searches deeper
        theirs = search_of(name, module, agent)
        for roots in ROOTS:
            obs = torch.randn(roots, 4).numpy()
            yield Pair(name, library, f"CartPole's network, {roots} roots", "simulations/s", roots * SIMULATIONS,
                       lambda module=module, agent=agent, obs=obs: module.search(agent, obs, noise=True),
                       lambda theirs=theirs, obs=obs: theirs(obs))  # fmt: skip


def mctx_search(name: str, _: ModuleType, agent: torch.nn.Module) -> Callable:
    """Compiled with the network as a whole."""
    import jax
    import jax.numpy as jnp
    import mctx

    policy = {"muzero": mctx.muzero_policy, "gumbel_muzero": mctx.gumbel_muzero_policy}[name]
    weights = {key: jnp.asarray(p.detach().numpy()) for key, p in agent.named_parameters()}
    numbers = jnp.arange(-agent.args.support, agent.args.support + 1.0)

    def dense(part, x):
        x = jax.nn.elu(x @ weights[f"{part}.0.weight"].T + weights[f"{part}.0.bias"])
        return x @ weights[f"{part}.2.weight"].T + weights[f"{part}.2.bias"]

    def to_unit(s):
        low, high = s.min(1, keepdims=True), s.max(1, keepdims=True)
        return (s - low) / jnp.maximum(high - low, 1e-5)

    def scalar(logits):
        y = (jax.nn.softmax(logits) * numbers).sum(-1)
        c = jnp.abs(y) + 1 + 1e-3
        return jnp.sign(y) * (jnp.square(2 * c / (jnp.sqrt(1 + 4e-3 * c) + 1)) - 1)

    def prediction(s):
        logits, value, reward = jnp.split(dense("heads", s), np.cumsum(agent.outputs)[:2], axis=-1)
        return logits, scalar(value), scalar(reward)

    def recurrent(_, key, action, s):
        s = to_unit(s + dense("step", jnp.concatenate([s, jax.nn.one_hot(action, agent.actions)], 1)))
        prior, value, reward = prediction(s)
        discount = jnp.full_like(reward, agent.gamma)
        return mctx.RecurrentFnOutput(reward=reward, discount=discount, prior_logits=prior, value=value), s

    @jax.jit
    def search(obs):
        s = to_unit(dense("encoder", obs))
        prior, value, _ = prediction(s)
        root = mctx.RootFnOutput(prior_logits=prior, value=value, embedding=s)
        found = policy((), jax.random.PRNGKey(0), root, recurrent, agent.args.simulations)
        return found.action_weights, found.search_tree.node_values[:, 0]

    return lambda obs: [np.asarray(x) for x in search(obs)]


def compiled_tree(module: str) -> ModuleType:
    """One of LightZero's, from its file: importing the package would import all of it."""
    folder = Path(find_spec("lzero").submodule_search_locations[0]) / "mcts" / "ctree"
    (path,) = folder.glob(f"*/{module}.*.so")
    spec = spec_from_file_location(module, path)
    tree = module_from_spec(spec)
    spec.loader.exec_module(tree)
    return tree


def lightzero_search(name: str, module: ModuleType, agent: torch.nn.Module) -> Callable:
    """Its tree in C++, our network."""
    gumbel = name == "gumbel_muzero"
    tree, args = compiled_tree("gmz_tree" if gumbel else "mz_tree"), agent.args

    @torch.inference_mode()
    def search(obs: np.ndarray) -> list:
        count = len(obs)
        players, zeros = [-1] * count, [0.0] * count  # −1: a game of one player
        s = agent.representation(agent.tensor(obs))
        states = s.new_empty(args.simulations + 1, *s.shape)
        states[0], (logits, value, _) = s, agent.numbers(s)
        roots = tree.Roots(count, [[*range(agent.actions)]] * count)
        noises = np.random.dirichlet([0.3] * agent.actions, count).tolist()
        guess = [value.tolist()] if gumbel else []
        roots.prepare(0.25, noises, zeros, *guess, logits.tolist(), players)
        bounds = tree.MinMaxStatsList(count)
        bounds.set_delta(0.01)
        for i in range(1, args.simulations + 1):
            results = tree.ResultsWrapper(num=count)
            if gumbel:
                found = tree.batch_traverse(roots, args.simulations, args.considered, agent.gamma, results, players)
            else:
                found = tree.batch_traverse(roots, 19_652, 1.25, agent.gamma, bounds, results, players)
            node, root, action, _ = found
            before = states[torch.tensor(node), torch.tensor(root)]
            states[i] = agent.dynamics(before, torch.tensor(action))
            logits, value, reward = (x.tolist() for x in agent.numbers(states[i]))
            backup = tree.batch_back_propagate if gumbel else tree.batch_backpropagate
            backup(i, agent.gamma, reward, value, logits, bounds, results, players)
        return [roots.get_distributions(), roots.get_values()]

    return search


# ── All libraries ─────────────────────────────────────────────────────────────────────────────────────────────────

LIBRARIES: dict[str, Callable[[], Iterator[Pair]]] = {
    "stable_baselines3": stable_baselines3_pairs,
    "mbrl": mbrl_pairs,
    "mctx": lambda: searches("mctx", mctx_search),
    "lzero": lambda: searches("LightZero", lightzero_search),
}


def pairs() -> Iterator[Pair]:
    for package, pairs_of in LIBRARIES.items():
        if find_spec(package) is None:
            print(f"{package} is not installed: left out")
        else:
            yield from pairs_of()
