"""How fast each file's hot path is on this machine, beside the machine's own matrix-product rate.

    python benchmarks/speed.py
    python benchmarks/speed.py --save benchmarks/results/speed_cpu.csv
    python benchmarks/speed.py --only vin icm
    python benchmarks/speed.py --compile                       # hot paths with torch.compile beside those without

Timings of a shared machine are noisy: the variants of a row are timed in turn, round by round, and the best round
of each counts. Quote ratios of one run.
"""

import csv
import functools
import platform
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Literal, Optional

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "algos"))
import dagger_mbrl
import dreamer_v1
import dreamer_v2
import dreamer_v3
import dyna_q
import gumbel_muzero
import icm
import mage
import mbpo
import mpc_rs
import muzero
import pddm
import pets
import tabular_dp
import vin

Row = tuple[str, str, float]  # what, unit, rate


def best_rates(variants: dict[str, tuple[Callable[[], object], float]], rounds: int) -> dict[str, float]:
    """variants: name → (what to call, units of work in one call). Units per second, the best of the rounds."""
    best = dict.fromkeys(variants, float("inf"))
    for _ in range(rounds):
        for name, (call, _) in variants.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return {name: units / best[name] for name, (_, units) in variants.items()}


def kinds(compiled: bool) -> dict[str, bool]:
    """What is added to the name of a row, and whether torch.compile is on. Round one compiles; the best counts."""
    torch.compiler.reset()  # sizes that were met before would make it compile for all sizes
    return {"": False, ", compiled": True} if compiled else {"": False}


def matrix_product(rounds: int) -> dict[str, float]:
    """The yardstick: float32, 1024 × 1024, GFLOP/s."""
    a, b = torch.rand(1024, 1024), torch.rand(1024, 1024)
    return best_rates({"float32 1024 × 1024": (lambda: a @ b, 2 * 1024**3 / 1e9)}, rounds)


# ── tabular_dp: sweeps over all states and actions ────────────────────────────────────────────────────────────────


def sweep_rates(rounds: int, _: bool) -> list[Row]:
    """A sweep of value iteration as in the file, and as loops over the environment's own table."""
    variants = {}
    for env_id in ("FrozenLake8x8-v1", "Taxi-v4"):
        env = gym.make(env_id)
        P, r = tabular_dp.model_of(env)
        V, table = r.max(1), env.unwrapped.P

        def loops(V=V, table=table, r=r):
            return [
                max(sum(p * (x + 0.99 * V[s2] * (not end)) for p, s2, x, end in table[s][a]) for a in range(r.shape[1]))
                for s in range(len(r))
            ]

        def sweep(P=P, r=r, V=V):
            return tabular_dp.backup(P, r, V, 0.99).max(1)

        assert np.allclose(loops(), sweep())
        variants |= {f"{env_id}, a sweep": (sweep, r.size / 1e6), f"{env_id}, loops": (loops, r.size / 1e6)}
    return [(name, "million states × actions/s", rate) for name, rate in best_rates(variants, rounds).items()]


# ── dagger_mbrl: fits and plans ───────────────────────────────────────────────────────────────────────────────────


def dagger_rates(rounds: int, _: bool) -> list[Row]:
    """One fit of the model and one plan in it, with the steps of ten episodes of the expert and of the learner."""
    calls = {}
    for name, task in (("grid", dagger_mbrl.Grid()), ("helicopter", dagger_mbrl.Helicopter())):
        rng = np.random.default_rng(0)
        data = [task.execute(task.expert, 10, rng) for _ in range(2)]

        def fit_and_plan(task=task, data=data):
            return task.plan(task.fit(*dagger_mbrl.weigh(*data, 0.5)))

        calls[f"{name}, fit and plan"] = fit_and_plan, 1
    return [(name, "plans/s", rate) for name, rate in best_rates(calls, rounds).items()]


# ── dyna_q: planning updates ──────────────────────────────────────────────────────────────────────────────────────


def explored(env_id: str, args: dyna_q.Args, steps: int = 5_000) -> dyna_q.Model:
    """A model filled by random actions."""
    env = gym.make(env_id)
    states, actions = int(env.observation_space.n), int(env.action_space.n)
    model = dyna_q.Model(states, actions, args)
    random.seed(0)
    s, _ = env.reset(seed=0)
    for now in range(steps):
        a = random.randrange(actions)
        obs, r, terminated, truncated, _ = env.step(a)
        model.learn(s, a, float(r), states if terminated else int(obs), now)
        s = int(env.reset()[0]) if terminated or truncated else int(obs)
    return model


def plan_with_dictionaries(Q: dict, memory: dict, tried: dict, actions: range, n: int, alpha: float, gamma: float):
    """The box as one would first write it: dictionaries with tuples for keys, random.choice."""
    for _ in range(n):
        s = random.choice(list(tried))
        a = random.choice(tried[s])
        r, s2 = memory[s, a]
        Q[s, a] += alpha * (r + gamma * max(Q[s2, b] for b in actions) - Q[s, a])


def plan_with_arrays(Q: np.ndarray, reward: np.ndarray, after: np.ndarray, pairs: np.ndarray, n: int, alpha, gamma):
    """n updates at once, all from the same old values: another algorithm, here for its speed alone."""
    s, a = pairs[np.random.randint(len(pairs), size=n)].T
    Q[s, a] += alpha * (reward[s, a] + gamma * Q[after[s, a]].max(1) - Q[s, a])


def dyna_q_rates(rounds: int) -> dict[str, float]:
    calls, n = 400, 50  # as in training: n = 50 updates a call
    plain, with_bonus = dyna_q.Args(planning_steps=n), dyna_q.Args(planning_steps=n, bonus=1e-3)
    sampled, expected = (replace(plain, model=model) for model in ("sample", "expectation"))
    maze, lake = explored("DynaMaze-v0", plain), explored("FrozenLake8x8-v1", expected)
    lake_samples = explored("FrozenLake8x8-v1", sampled)
    tables = [[[0.0] * 4 for _ in range(len(model.counts) + 1)] for model in (maze, lake, lake_samples)]
    tried = {s: list(maze.actions[s]) for s in maze.states}
    memory = {(s, a): maze.outcomes[s][a][0][1:] for s in tried for a in tried[s]}
    dictionary = {(s, a): 0.0 for s in range(len(maze.counts) + 1) for a in range(4)}
    array, pairs = np.zeros((len(maze.counts) + 1, 4)), np.array(list(memory))
    reward, after = np.zeros((len(maze.counts), 4)), np.zeros((len(maze.counts), 4), dtype=int)
    for (s, a), (r, s2) in memory.items():
        reward[s, a], after[s, a] = r, s2

    def repeat(function: Callable, *args: object) -> tuple[Callable[[], None], int]:
        def call() -> None:
            for _ in range(calls):
                function(*args)

        return call, calls * n

    return best_rates(
        {
            "Dyna maze, deterministic": repeat(dyna_q.plan, tables[0], maze, plain, 10_000),
            "Dyna maze, with the bonus": repeat(dyna_q.plan, tables[0], maze, with_bonus, 10_000),
            "FrozenLake 8×8, sample updates": repeat(dyna_q.plan, tables[2], lake_samples, sampled, 10_000),
            "FrozenLake 8×8, expected updates": repeat(dyna_q.plan, tables[1], lake, expected, 10_000),
            "(dictionaries, Dyna maze)": repeat(
                plan_with_dictionaries, dictionary, memory, tried, range(4), n, 0.1, 0.95
            ),
            "(arrays, all at once, Dyna maze)": repeat(plan_with_arrays, array, reward, after, pairs, n, 0.1, 0.95),
        },
        rounds,
    )


# ── mpc_rs, pddm, pets: plans ─────────────────────────────────────────────────────────────────────────────────────


def plan_rates(module: ModuleType, rounds: int, compiled: bool = False) -> list[tuple[str, str, float]]:
    """Plans per second of each preset. One of HalfCheetah's size takes seconds on a CPU: few rounds of it."""
    rows = []
    for preset, (_, args) in module.PRESETS.items():
        if preset == "halfcheetah" and rounds == 1:
            continue
        variants = {}
        for more, on in kinds(compiled and hasattr(args, "compile")).items():
            changed = {"compile": on} if on else {}
            env = module.make_env(args)
            agent, (obs, _) = module.Agent(env, replace(args, **changed)), env.reset(seed=0)
            variants[f"{preset}{more}"] = functools.partial(agent, obs), 1
        rates = best_rates(variants, rounds if preset != "halfcheetah" else min(rounds, 2))
        rows += [(name, "plans/s", rate) for name, rate in rates.items()]
    return rows


# ── mbpo: updates, training steps, branches ───────────────────────────────────────────────────────────────────────


def filled(module: ModuleType, args: object, steps: int) -> tuple:
    """An agent and a replay of random transitions."""
    torch.manual_seed(0)
    env = module.make_env(args)
    agent, replay = module.Agent(env, args), module.Replay(steps, env, args.device)
    (state_size,), (action_size,) = env.observation_space.shape, env.action_space.shape
    for row in torch.randn(steps, 2 * state_size + action_size).numpy():
        s, a, s2 = np.split(row, [state_size, state_size + action_size])
        replay.add(s, a, 0.0, s2, False, 0)
    return agent, replay


def mbpo_rates(rounds: int, compiled: bool = False) -> list[tuple[str, str, float]]:
    """At Hopper's sizes: updates of SAC with their sampling, training steps of the ensemble, imagined rows."""
    args = mbpo.PRESETS["hopper"][1]
    agent, replay = filled(mbpo, args, 5_000)
    pool = mbpo.ModelPool(sum(replay.widths[:-1]), args.device)
    pool.add(torch.randn(100_000, sum(replay.widths[:-1])), 100_000)
    critic_optimizer = torch.optim.Adam(agent.critics.parameters(), args.learning_rate, fused=True)
    policy_optimizer = torch.optim.Adam([*agent.policy.parameters(), agent.log_alpha], args.learning_rate, fused=True)
    model_optimizer = mbpo.make_optimizer(agent.model, args)
    batch = replay.rows(torch.randint(replay.size, (args.members, args.model_batch_size)))
    states = torch.randn(args.rollouts, replay.widths[0])

    def update() -> None:
        for _ in range(args.updates):
            mbpo.update(agent, critic_optimizer, policy_optimizer, mbpo.sample_batch(replay, pool, args), args)

    def train() -> None:
        for _ in range(10):
            model_optimizer.zero_grad()
            mbpo.ensemble_loss(agent.model, batch).backward()
            model_optimizer.step()

    few = min(rounds, 5)
    (updates,) = best_rates({"": (update, args.updates)}, few).values()
    (steps,) = best_rates({"": (train, 10)}, few).values()
    (rows,) = best_rates({"": (functools.partial(mbpo.branch, agent, states, 1), len(states))}, few).values()
    return [
        ("SAC, 2 × 256, batch 256", "updates/s", updates),
        ("ensemble, 7 × 4 × 200, batch 256", "training steps/s", steps),
        ("branches, each row through one elite", "million rows/s", rows / 1e6),
    ]


# ── mage: updates ─────────────────────────────────────────────────────────────────────────────────────────────────


def mage_rates(rounds: int, compiled: bool = False) -> list[tuple[str, str, float]]:
    """At the default's sizes: updates of the critics, and training steps of the model."""
    args = mage.Args()
    agent, replay = filled(mage, args, 1_000)
    optimizer = torch.optim.RAdam(agent.critics.parameters(), args.learning_rate, foreach=True)
    model_optimizer = torch.optim.RAdam(agent.model.parameters(), args.model_learning_rate, foreach=True)
    rows = replay.rows(torch.randint(replay.size, (args.members, args.model_batch_size)))

    def update() -> None:
        for _ in range(10):
            s = replay.rows(torch.randint(replay.size, (args.batch_size,))).s
            a = agent.pi(agent.policy, s)
            value_loss, slope_loss = mage.critic_losses(agent, s, a, *agent.imagined_target(s, a))
            mage.descend(optimizer, value_loss + args.gradient_weight * slope_loss, args.gradient_clip)

    def train() -> None:
        mage.descend(model_optimizer, mage.model_loss(agent.model, *rows[:5]), args.gradient_clip)

    few = min(rounds, 5)
    (updates,) = best_rates({"": (update, 10)}, few).values()
    (steps,) = best_rates({"": (train, 1)}, few).values()
    return [("MAGE, 8 × 2×64, batch 64", "updates/s", updates), ("its model, batch 256", "training steps/s", steps)]


# ── vin: sweeps, updates, mazes ───────────────────────────────────────────────────────────────────────────────────


def wide_plan(agent: vin.Agent, images: torch.Tensor, iterations: int) -> torch.Tensor:
    """As one would first write it, and the public code does: 150 channels, and in each sweep one convolution of both
    maps."""
    reward = agent.f_2(agent.f_1(images))
    kernel = torch.cat([agent.w_r.weight, agent.w_v.weight], 1)
    q = agent.w_r(reward)
    for _ in range(iterations):
        q = torch.nn.functional.conv2d(torch.cat([reward, q.max(1, keepdim=True).values], 1), kernel, padding=1)
    return q


def vin_rates(rounds: int, compiled: bool = False) -> list[tuple[str, str, float]]:
    def plan(how: Callable, images: torch.Tensor, iterations: int) -> None:
        with torch.no_grad():
            how(images, iterations)

    def learn(how: Callable, agent: vin.Agent, mazes: vin.Mazes, optimizer, args: vin.Args) -> None:
        batch = mazes.rows(torch.randperm(len(mazes.images))[: args.batch_mazes])
        cells = torch.multinomial(batch.visits, args.batch_cells, replacement=True)
        logits = agent.attend(how(batch.images, args.iterations), cells)
        moves = batch.expert.gather(1, cells)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), moves.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    plans, updates, mazes, few = {}, {}, {}, min(rounds, 5)
    for preset in ("maze8", "maze16", "maze28"):
        args = vin.PRESETS[preset][1]
        env = vin.make_env(args)
        some, agent = vin.label(*env.unwrapped.sample(200, test=False), args.paths), vin.Agent(env, args)
        optimizer = torch.optim.RMSprop(agent.parameters(), 1e-4, alpha=0.9, eps=1e-3)
        first = kinds(compiled and preset == "maze8")
        ways = {preset + more: torch.compile(agent.plan) if on else agent.plan for more, on in first.items()}
        ways[f"({preset}, as one would first write it)"] = functools.partial(wide_plan, agent)
        for name, how in ways.items():
            plans[name] = functools.partial(plan, how, some.images[:32], args.iterations), args.iterations
            updates[name] = functools.partial(learn, how, agent, some, optimizer, args), 1
        mazes[preset] = (lambda env=env, paths=args.paths: vin.label(*env.unwrapped.sample(500, False), paths)), 500
    rows = [(name, "sweeps/s, 32 mazes each", rate) for name, rate in best_rates(plans, rounds).items()]
    rows += [(name, "updates/s", rate) for name, rate in best_rates(updates, rounds).items()]
    return rows + [(name, "mazes with paths/s", rate) for name, rate in best_rates(mazes, few).items()]


# ── icm: steps of the environments, of the agent, and learned from ─────────────────────


def icm_rates(rounds: int, compiled: bool = False) -> list[tuple[str, str, float]]:
    args = icm.Args(device="cpu")
    envs, one = icm.Environments(args), icm.make_env(args)
    agent, module = icm.Agent(one, args), icm.ICM(one, args)
    optimizer = torch.optim.Adam([*agent.parameters(), *module.parameters()], fused=True)
    rollout, _ = icm.act(agent, envs, args.horizon)
    flat, steps = icm.Rollout(*(x.flatten(0, 1) for x in rollout)), args.horizon * args.envs
    advantage, target = torch.randn(2, steps)

    def walk() -> None:
        for _ in range(args.horizon):
            envs.step(torch.randint(4, (args.envs,)).tolist())

    def learn() -> None:
        module.intrinsic_reward(flat.s, flat.a, flat.s2)
        for _ in range(args.epochs):
            for i in torch.randperm(steps).chunk(args.minibatches):
                batch = icm.Rollout(*(x[i] for x in flat))
                icm.update(agent, module, optimizer, batch, advantage[i], target[i], args)

    variants = {
        "64 mazes": (walk, steps),
        "mazes and policy": (lambda: icm.act(agent, envs, args.horizon), steps),
        "intrinsic rewards and four epochs of updates": (learn, steps),
    }
    return [(name, "steps/s", rate) for name, rate in best_rates(variants, min(rounds, 10)).items()]


# ── dreamer_v1 and dreamer_v2: updates ────────────────────────────────────────────────────────────────────────────


def flops_of(call: Callable) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def dreamer_rates(dreamer: ModuleType, rounds: int, compiled: bool = False) -> list[tuple[str, str, float]]:
    """An update and its parts in the default preset; twice at the paper's sizes, where there is time for it."""
    small, calls, flops = next(iter(dreamer.PRESETS.values()))[1], {}, {}
    large = dreamer.CONTROL if dreamer is dreamer_v1 else dreamer.ATARI
    variants = {more: replace(small, compile=on) for more, on in kinds(compiled).items()}
    if rounds > 1:
        variants |= {"large": large, "large, bfloat16": replace(large, bf16=True)}
    for variant, args in variants.items():
        args, shape = replace(args, env_id=small.env_id, device="cpu"), (args.batch_size, args.batch_length)
        env = dreamer.make_env(args)
        agent, obs = dreamer.Agent(env, args), torch.randint(256, (*shape, *env.observation_space.shape)).byte()
        rows = torch.rand(*shape, agent.actions), torch.rand(shape), torch.zeros(shape), torch.ones(shape)
        batch = dreamer.Sequences(obs, *rows)
        networks = agent.world, agent.actor, agent.value
        optimizers = [torch.optim.Adam(net.parameters(), 1e-4, fused=True) for net in networks]

        def model(args=args, agent=agent, batch=batch):
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                loss, states, _ = dreamer.world_model_loss(agent.world, batch, args)
            loss.backward(inputs=[*agent.world.parameters()])
            return states

        def behaviour(states, args=args, agent=agent, batch=batch) -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                actor_loss, value_loss, _ = dreamer.behaviour_losses(agent, states, batch, args)
            value_loss.backward(inputs=[*agent.value.parameters()], retain_graph=True)
            actor_loss.backward(inputs=[*agent.actor.parameters()])

        def update(model=model, behaviour=behaviour, optimizers=optimizers) -> None:
            behaviour(model())
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

        size = f"{shape[0]} × {shape[1]} images of {args.image_size} × {args.image_size}"
        name = f"update, {size}{variant.removeprefix('large')}"
        calls |= {name: update, f"the world model's part, {size}{variant.removeprefix('large')}": model}
        if not args.compile:
            flops[name] = flops_of(update)
    slow = {name: (call, 1) for name, call in calls.items() if "64 × 64" in name}
    quick = {name: (call, 1) for name, call in calls.items() if name not in slow}
    best = best_rates(quick, min(rounds, 10)) | (best_rates(slow, 2) if slow else {})
    rows = [(name, "updates/s", rate) for name, rate in best.items()]
    return rows + [(name, "GFLOP/s", best[name] * count / 1e9) for name, count in flops.items()]


# ── dreamer_v3: updates ───────────────────────────────────────────────────────────────────────────────────────────


def dreamer_v3_rates(rounds: int, compiled: bool = False) -> list[Row]:
    """An update of two presets."""
    calls = {}
    for preset in ("cartpole", "catch"):
        for more, on in kinds(compiled).items():
            args = replace(dreamer_v3.PRESETS[preset][1], compile=on, device="cpu")
            env, shape = dreamer_v3.make_env(args), (args.batch_size, args.batch_length)
            agent = dreamer_v3.Agent(env, args)
            obs = torch.randint(256, (*shape, *env.observation_space.shape))
            columns = torch.rand(*shape, agent.actions), torch.rand(shape), torch.zeros(shape), torch.zeros(shape)
            h, z = agent.world.rssm.start(shape[0])
            batch = dreamer_v3.Sequences(obs.byte() if args.obs == "pixels" else obs.float(), *columns, h, z)
            parameters = [p for p in agent.parameters() if p.requires_grad]
            optimizer = dreamer_v3.LaProp(parameters, args.learning_rate, args.warmup, args.gradient_clip)

            def update(agent=agent, batch=batch, args=args, optimizer=optimizer) -> None:
                world_loss, states, _ = dreamer_v3.world_model_loss(agent.world, batch, args)
                behaviour_loss, _ = dreamer_v3.behaviour_losses(agent, states, batch, args)
                optimizer.zero_grad()
                (world_loss + behaviour_loss).backward()
                optimizer.step()
                agent.after_update()

            calls[f"{preset}, {shape[0]} × {shape[1]} rows, size {args.size}{more}"] = update, 1
    return [(name, "updates/s", rate) for name, rate in best_rates(calls, min(rounds, 10)).items()]


# ── muzero and gumbel_muzero: simulations ─────────────────────────────────────────────────────────────────────────


def search_rates(file: ModuleType, rounds: int, compiled: bool = False) -> list[tuple[str, str, float]]:
    """Simulations per second, the network's calls included, and updates of the default preset."""
    searches, updates = {}, {}
    for preset in ("cartpole", "tictactoe"):
        args = replace(file.PRESETS[preset][1], simulations=25 if rounds > 1 else 5, device="cpu")
        env = file.make_env(args)
        agent, (obs, _) = file.Agent(env, args), env.reset(seed=0)
        for roots in (1, 16, 64, 256) if rounds > 1 else (1, 8):
            call = functools.partial(file.search, agent, np.repeat(obs[None], roots, 0), noise=True)
            searches[f"{args.env_id}, {roots} roots"] = call, roots * args.simulations
    args = file.PRESETS["cartpole"][1]
    agent, B, K, A = file.Agent(file.make_env(args), args), args.batch_size, args.unroll, 2
    batch = file.Batch(
        obs=torch.randn(B, 4), action=torch.randint(A, (B, K)), reward=torch.ones(B, K), value=torch.rand(B, K + 1),
        policy=torch.full((B, K + 1, A), 1 / A), known=torch.ones(B, K + 1), alive=torch.ones(B, K + 1),
        weight=torch.ones(B),
    )  # fmt: skip
    optimizer = torch.optim.Adam(agent.parameters(), args.learning_rate, fused=True)

    def update(loss_of: Callable) -> None:
        optimizer.zero_grad()
        loss_of(agent, batch)[0].backward()
        optimizer.step()

    for more, on in kinds(compiled).items():
        loss_of = torch.compile(file.muzero_loss) if on else file.muzero_loss
        updates[f"CartPole-v1, {B} positions, {K} steps{more}"] = functools.partial(update, loss_of), 1
    rows = [(name, "simulations/s", rate) for name, rate in best_rates(searches, min(rounds, 5)).items()]
    return rows + [(name, "updates/s", rate) for name, rate in best_rates(updates, rounds).items()]


MEASURED: dict[str, Callable[[int, bool], list[Row]]] = {
    "matrix product": lambda rounds, _: [(name, "GFLOP/s", rate) for name, rate in matrix_product(rounds).items()],
    "tabular_dp": sweep_rates,
    "dagger_mbrl": dagger_rates,
    "dyna_q": lambda rounds, _: [(name, "million updates/s", x / 1e6) for name, x in dyna_q_rates(rounds).items()],
    "mpc_rs": functools.partial(plan_rates, mpc_rs),
    "pddm": functools.partial(plan_rates, pddm),
    "pets": functools.partial(plan_rates, pets),
    "mbpo": mbpo_rates,
    "mage": mage_rates,
    "vin": vin_rates,
    "icm": icm_rates,
    "dreamer_v1": functools.partial(dreamer_rates, dreamer_v1),
    "dreamer_v2": functools.partial(dreamer_rates, dreamer_v2),
    "dreamer_v3": dreamer_v3_rates,
    "muzero": functools.partial(search_rates, muzero),
    "gumbel_muzero": functools.partial(search_rates, gumbel_muzero),
}


@dataclass
class Args:
    rounds: int = 30
    """Rounds; the best counts."""
    threads: int = torch.get_num_threads()
    """Torch's threads."""
    compile: bool = False
    """Also what torch.compile makes of the hot paths; dyna_q has nothing to compile. Takes two rounds at least."""
    only: tuple[Literal[tuple(MEASURED)], ...] = tuple(MEASURED)
    """These alone."""
    save: Optional[Path] = None
    """Also write the table here, as CSV: the files that were measured anew, the others stay as they are there."""


def main(args: Args) -> None:
    if args.compile and args.rounds < 2:
        sys.exit("--compile needs two rounds at least: the first one compiles")
    torch.set_num_threads(args.threads)
    python = f"Python {platform.python_version()}, torch {torch.__version__}"
    print(f"{platform.machine()}, {args.threads} threads, {python}\n")
    print("| file | hot path | rate | unit |\n|-|-|-|-|")
    table: dict[str, list] = {file: [] for file in MEASURED}
    if args.save and args.save.exists():
        with open(args.save, newline="") as file:
            for name, *row in list(csv.reader(file))[1:]:
                table[name].append(row)
    for file in args.only:
        rows = MEASURED[file](args.rounds, args.compile)
        table[file] = [(name, unit, f"{rate:.4g}", args.threads, torch.__version__) for name, unit, rate in rows]
        for name, unit, rate in rows:
            print(f"| {file} | {name} | {rate:.3g} | {unit} |", flush=True)
    if args.save:
        with open(args.save, "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["file", "hot_path", "unit", "rate", "threads", "torch"])
            writer.writerows([name, *row] for name, rows in table.items() for row in rows)


if __name__ == "__main__":
    main(tyro.cli(Args, description=(__doc__ or "").split("\n\n")[0]))
