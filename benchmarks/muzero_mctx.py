"""The speed of the searches of muzero.py and gumbel_muzero.py beside mctx, on one network with the same weights.

    pip install jax mctx
    taskset -c 0 python benchmarks/muzero_mctx.py

mctx is JAX, and is compiled with the network as a whole; the time of compiling is not counted. A rate is the number of
simulations of all roots per second, the network included.
"""

import os
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import mctx
import numpy as np
import torch
import tyro
from figure_runs import load


@dataclass
class Args:
    simulations: int = 50  # simulations per search
    rounds: int = 10  # searches of each kind, taken in turns; the fastest counts
    roots: tuple[int, ...] = (16, 64, 256)  # roots that are searched at the same time


def compiled_search(agent: torch.nn.Module, policy):
    """mctx's search with the dense network of the agent."""
    weights = {name: jnp.asarray(p.detach().numpy()) for name, p in agent.named_parameters()}
    numbers = jnp.arange(-agent.args.support, agent.args.support + 1.0)

    def dense(name, x):
        x = jax.nn.elu(x @ weights[f"{name}.0.weight"].T + weights[f"{name}.0.bias"])
        return x @ weights[f"{name}.2.weight"].T + weights[f"{name}.2.bias"]

    def to_unit(s):
        low, high = s.min(1, keepdims=True), s.max(1, keepdims=True)
        return (s - low) / jnp.maximum(high - low, 1e-5)

    def scalar(logits):
        y = (jax.nn.softmax(logits) * numbers).sum(-1)
        c = jnp.abs(y) + 1 + 1e-3
        return jnp.sign(y) * (jnp.square(2 * c / (jnp.sqrt(1 + 4e-3 * c) + 1)) - 1)

    def prediction(s):
        policy, value, reward = jnp.split(dense("heads", s), np.cumsum(agent.outputs)[:2], axis=-1)
        return policy, scalar(value), scalar(reward)

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


def main(args: Args) -> None:
    print(f"{os.cpu_count()} cores, torch with {torch.get_num_threads()} threads, {args.simulations} simulations\n")
    print("| search | roots | ours, simulations/s | mctx | ratio |\n|-|-|-|-|-|")
    for name, policy in (("muzero", mctx.muzero_policy), ("gumbel_muzero", mctx.gumbel_muzero_policy)):
        torch.manual_seed(0)
        module = load(name)
        settings = module.Args(simulations=args.simulations, device="cpu")
        agent = module.Agent(module.make_env(settings), settings)
        for p in agent.heads[-1].parameters():
            torch.nn.init.normal_(p, std=0.3)  # a network with opinions searches deeper
        calls = [lambda obs, search=module.search, agent=agent: search(agent, obs, noise=True)]
        calls.append(compiled_search(agent, policy))
        for roots in args.roots:
            obs, best = torch.randn(roots, 4).numpy(), [np.inf, np.inf]
            for call in calls:
                call(obs)  # compiles
            for _ in range(args.rounds):
                for i, call in enumerate(calls):
                    start = time.perf_counter()
                    call(obs)
                    best[i] = min(best[i], time.perf_counter() - start)
            ours, theirs = (roots * args.simulations / seconds for seconds in best)
            print(f"| {name} | {roots} | {ours:,.0f} | {theirs:,.0f} | {ours / theirs:.2f} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
