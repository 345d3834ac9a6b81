"""The search of algos/muzero.py beside DeepMind's mctx, on one network with the same weights.

    pip install mctx
    python benchmarks/muzero_mctx.py --threads 1

mctx is JAX, compiled as a whole; compiling is not counted. Both search 50 simulations from the same roots; the rate
counts simulations of all roots together, the network included. Beside them the network's calls alone, as PyTorch makes
them and with torch.compile: no tree around them could be faster.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "algos"))
import muzero  # noqa: E402


@dataclass
class Args:
    threads: int = torch.get_num_threads()
    """Of torch; XLA takes those that the system gives it: `taskset -c 0` for one."""
    simulations: int = 50
    """Of each search."""
    rounds: int = 10
    """Rounds, one after the other; the best counts."""
    batches: tuple[int, ...] = (1, 8, 64, 256)
    """Roots at a time."""


def networks(args: muzero.Args, planner: muzero.TreePlanner):
    """The dense network as a function of JAX: (recurrent_fn, root_fn)."""
    import jax
    import jax.numpy as jnp
    import mctx

    net, gamma, support = planner.network, planner.setting.gamma, args.support
    weights = {name: jnp.asarray(p.detach().numpy()) for name, p in net.named_parameters()}
    mean, std = jnp.asarray(net.input_mean.numpy()), jnp.asarray(net.input_std.numpy())
    numbers = jnp.arange(-support, support + 1.0)

    def perceptron(name: str, x):
        x = jax.nn.elu(x @ weights[f"{name}.0.weight"].T + weights[f"{name}.0.bias"])
        return x @ weights[f"{name}.2.weight"].T + weights[f"{name}.2.bias"]

    def to_unit(s):
        low, high = s.min(1, keepdims=True), s.max(1, keepdims=True)
        return (s - low) / jnp.maximum(high - low, 1e-5)

    def number(logits):
        y = (jax.nn.softmax(logits) * numbers).sum(-1)
        if not args.squash:
            return y
        c = jnp.abs(y) + 1 + 1e-3
        return jnp.sign(y) * (jnp.square(2 * c / (jnp.sqrt(1 + 4e-3 * c) + 1)) - 1)

    def prediction(s):
        policy, value, reward = jnp.split(perceptron("heads", s), np.cumsum(net.outputs)[:2], axis=-1)
        return policy, number(value), number(reward)

    def recurrent(_, key, action, s):
        s = to_unit(s + perceptron("step", jnp.concatenate([s, jax.nn.one_hot(action, net.outputs[0])], 1)))
        policy, value, reward = prediction(s)
        return mctx.RecurrentFnOutput(
            reward=reward, discount=jnp.full_like(reward, gamma), prior_logits=policy, value=value
        ), s

    def root(obs):
        s = to_unit(perceptron("eyes", (obs - mean) / std))
        policy, value, _ = prediction(s)
        return mctx.RootFnOutput(prior_logits=policy, value=value, embedding=s)

    return recurrent, root


def searches(args: muzero.Args, planner: muzero.TreePlanner) -> dict:
    """Name → what searches from observations [B, ...]; mctx's give their numbers as NumPy arrays too."""
    import jax
    import mctx

    recurrent, root = networks(args, planner)
    policies = {"gumbel": mctx.gumbel_muzero_policy, "puct": mctx.muzero_policy}
    policy, key = policies[args.search], jax.random.PRNGKey(0)

    @jax.jit
    def search(obs, key):
        found = policy((), key, root(obs), recurrent, args.simulations)
        return found.action, found.action_weights

    def calls(dynamics: Callable) -> Callable:
        @torch.inference_mode()
        def call(obs: np.ndarray) -> None:
            hidden = planner.network.representation(torch.from_numpy(obs))
            for i in range(args.simulations):
                hidden, *_ = dynamics(hidden, torch.full((len(obs),), i % 2))

        return call

    return {
        "muzero.py": lambda obs: planner.search(obs, noise=True),
        "mctx": lambda obs: [np.asarray(x) for x in search(obs, key)],
        "network alone": calls(planner.dynamics),
        "network alone, compiled": calls(torch.compile(planner.dynamics)),
    }


def main(args: Args) -> None:
    try:
        import mctx  # noqa: F401
    except ImportError:
        print("muzero_mctx.py: mctx is not installed: pip install mctx", file=sys.stderr)
        raise SystemExit(2) from None
    torch.set_num_threads(args.threads)
    print(f"{os.cpu_count()} cores, torch with {args.threads} threads, {args.simulations} simulations a search\n")
    print("| search | roots | muzero.py, simulations/s | mctx | ratio | our network alone | compiled |")
    print("|-|-|-|-|-|-|-|")
    for search in ("gumbel", "puct"):
        settings = muzero.Args(search=search, simulations=args.simulations)
        env = muzero.make_task(settings)
        torch.manual_seed(0)
        planner = muzero.make_tree_planner(settings, env, torch.device("cpu"))
        with torch.no_grad():
            for p in planner.network.heads[-1].parameters():
                p.normal_(std=0.3)  # a network that has opinions
        calls = searches(settings, planner)
        for batch in args.batches:
            obs = np.random.default_rng(0).normal(size=(batch, 4)).astype(np.float32)
            best = dict.fromkeys(calls, np.inf)
            for search_once in calls.values():
                search_once(obs)  # compiles
            for _ in range(args.rounds):
                for name, search_once in calls.items():
                    start = time.perf_counter()
                    search_once(obs)
                    best[name] = min(best[name], time.perf_counter() - start)
            ours, theirs, *alone = (batch * args.simulations / seconds for seconds in best.values())
            cells = [f"{ours:,.0f}", f"{theirs:,.0f}", f"{ours / theirs:.2f}", *(f"{rate:,.0f}" for rate in alone)]
            print(f"| {search} | {batch} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=(__doc__ or "").split("\n\n")[0]))
