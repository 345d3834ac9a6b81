"""The figures and tables of docs/ that need more than report.py: comparisons, exact values, films.

    python benchmarks/figures.py pets_ablation                            # from benchmarks/results/pets_ablation.csv
    python benchmarks/figures.py dyna_q_figure_8_2 --measure --seeds 30   # measure again first
    python benchmarks/figures.py icm_maze --measure --runs runs/benchmarks

A figure is docs/figures/<name>.png. Its numbers are in benchmarks/results/<name>.csv, a row for each variant, seed,
tag and step, and are also printed: means ± half of the 95 % bootstrap interval over the seeds. What compares long runs
reads those of benchmarks/run.py below --runs, and names the command if one is missing.
"""

import functools
import multiprocessing
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Annotated, Literal

import gymnasium as gym
import matplotlib
import numpy as np
import torch
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "algos"), str(ROOT / "benchmarks")]
import dyna_q  # noqa: E402
import icm  # noqa: E402
import mage  # noqa: E402
import pddm  # noqa: E402
import pets  # noqa: E402
import tabular_dp  # noqa: E402
import vin  # noqa: E402
from report import bootstrap, digits, numbers, on_a_grid, read_csv, read_curves, write_csv  # noqa: E402
from run import place  # noqa: E402

COLUMNS = ("variant", "seed", "tag", "step", "value")
Row = tuple[str, int, str, float, float]
Measured = dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]  # tag → variant → steps [N], values [seeds, N]


@dataclass
class Shown:
    """How the numbers of a CSV are shown."""

    xlabel: str = "environment steps"
    panels: dict[str, dict] = field(default_factory=dict)  # tag → settings of its axes
    at: tuple[int, ...] = ()  # steps in the tables, besides the last one
    optimum: float | None = None


SHOWN = {
    "dyna_q_figure_8_2": Shown(
        "episode", {"charts/episodic_length": {"ylabel": "steps per episode", "xlim": (2, 50), "ylim": (0, 800)}},
        at=(1, 3, 5, 25), optimum=14,
    ),
    "dyna_q_figure_8_4": Shown("time step", {"cumulative_reward": {"title": "Blocking maze"}}, at=(1_000,)),
    "dyna_q_figure_8_5": Shown("time step", {"cumulative_reward": {"title": "Shortcut maze"}}, at=(3_000,)),
    "dyna_q_frozenlake": Shown(
        panels={"share_of_optimum": {"ylabel": "exact value of the greedy policy / optimum", "xscale": "log"}},
        at=(20_000, 60_000), optimum=1.0,
    ),
    "dyna_q_sweeping": Shown(),
    "icm_maze": Shown(panels={
        "eval/episodic_return": {"title": "return of the greedy policy"}, "charts/tiles_visited": {},
        "losses/entropy": {}, "losses/value": {"yscale": "log"}, "losses/forward": {"yscale": "log"},
    }),
    "mage_pendulum": Shown(
        panels={"eval/episodic_return": {}, "model/gradient_cosine": {"ylim": (-1.05, 1.05)}}, at=(1_000,)
    ),
    "pddm_reacher": Shown(),
    "pets_ablation": Shown(panels={"charts/episodic_return": {"ylabel": "return of a trial"}}, at=(1_200,)),
    "vin_reactive": Shown("updates", {"eval/success_rate": {}}),
}  # fmt: skip
# Tables of runs that today's files do not repeat: they are only printed
EARLIER = ("mage_invertedpendulum", "pets_halfcheetah", "vin_maze16", "vin_maze28", "vin_public")
NAMES = (*SHOWN, *EARLIER, "dyna_q_episodes", "pets_toy", "vin_larger", "vin_sweeps")


def figure_path(name: str) -> Path:
    return ROOT / "docs" / "figures" / name


def csv_path(name: str) -> Path:
    return ROOT / "benchmarks" / "results" / f"{name}.csv"


def read(name: str) -> Measured:
    points: dict[str, dict[str, dict[str, list]]] = {}
    for row in read_csv(csv_path(name)):
        seeds = points.setdefault(row["tag"], {}).setdefault(row["variant"], {})
        seeds.setdefault(row["seed"], []).append((float(row["step"]), float(row["value"])))
    return {
        tag: {label: on_a_grid([np.array(x) for x in seeds.values()], 0) for label, seeds in variants.items()}
        for tag, variants in points.items()
    }


def plus_minus(values: np.ndarray) -> str:
    low, high = bootstrap(values)
    n = digits(values) + 1
    return numbers([values.mean()], n) + (f" ± {(high - low) / 2:.{n}f}" if len(values) > 1 else "")


def print_tables(data: Measured, shown: Shown) -> None:
    for tag, variants in data.items():
        heads = [tag, *(f"at {step:,}" for step in shown.at), "last", "mean over steps", "last, each seed"]
        print(f"\n| {' | '.join(heads)} |\n{'|-' * len(heads)}|")
        for label, (steps, values) in variants.items():
            cells = [plus_minus(values[:, steps == step][:, 0]) if step in steps else "" for step in shown.at]
            each = numbers(values[:, -1], digits(values[:, -1]) + 1)
            print(f"| {' | '.join([label, *cells, plus_minus(values[:, -1]), plus_minus(values.mean(1)), each])} |")


def draw(name: str, data: Measured, shown: Shown) -> None:
    """A panel for each tag: means with their intervals."""
    wide = len(shown.panels) > 2
    figure = Figure(
        figsize=((3.4 if wide else 6.4) * len(shown.panels), 3.2 if wide else 4), dpi=90, layout="constrained"
    )
    for axes, (tag, settings) in zip(
        figure.subplots(1, len(shown.panels), squeeze=False)[0], shown.panels.items(), strict=True
    ):
        for label, (steps, values) in data[tag].items():
            (line,) = axes.plot(steps, values.mean(0), label=label)
            axes.fill_between(steps, *bootstrap(values), color=line.get_color(), alpha=0.2, linewidth=0)
        if shown.optimum is not None:
            axes.axhline(shown.optimum, color="0.4", linestyle="--", linewidth=1, label="optimum")
        axes.set(**{"xlabel": shown.xlabel, "ylabel": tag} | settings)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(figure_path(f"{name}.png"))


# ── Runs ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Args:
    name: Annotated[Literal[NAMES], tyro.conf.Positional]
    """Which figure or table."""
    measure: bool = False
    """Measure again before it is drawn."""
    seeds: int = 5
    """Seeds 1 to this many."""
    workers: int = 1
    """Short runs at a time, each in a process with one thread."""
    runs: Path = Path("runs/benchmarks")
    """Where benchmarks/run.py keeps the long ones."""


def folder_of(command: str, seed: int, args: Args) -> Path:
    """A run of benchmarks/run.py."""
    name, _, flags = command.partition(" ")
    run = place(name, flags, seed, args.runs)
    if not run.finished.exists():
        sys.exit(f'train first: python benchmarks/run.py "1-{args.seeds} {command}" --runs {args.runs}')
    return run.folder


def finished(commands: dict[str, str], tags: tuple[str, ...], args: Args) -> list[Row]:
    rows = []
    for label, command in commands.items():
        for seed in range(1, args.seeds + 1):
            curves = read_curves(folder_of(command, seed, args))
            rows += [(label, seed, tag, p[0], p[2]) for tag in tags for p in curves.get(tag, ())]
    return rows


def train(module: ModuleType, flags: str, seed: int) -> dict[str, np.ndarray]:
    """The curves of a short run, in this process."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        module.main([*flags.split(), "--seed", str(seed), "--run-dir", folder])
        return read_curves(Path(folder))


def in_processes(function: Callable, jobs: list[tuple], args: Args) -> list:
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        return pool.starmap(function, jobs, chunksize=1)


# ── dyna_q ────────────────────────────────────────────────────────────────────────────────────────────────────────


def train_dyna_q(flags: str, seed: int) -> dict[str, np.ndarray]:
    """Evaluations are exact: the value of the greedy policy at the start, where the task has a table of transitions."""
    sampled = dyna_q.Run.evaluate

    def evaluate(run: dyna_q.Run, agent: dyna_q.Agent, env: gym.Env) -> None:
        if not hasattr(env.unwrapped, "P"):
            return sampled(run, agent, env)
        P, r = tabular_dp.model_of(env)
        policy = np.array([agent(s) for s in range(len(r))])
        run.log("eval/exact_value", tabular_dp.evaluate(P, r, policy, run.args.gamma)[0])
        env.length_queue.append(0)

    dyna_q.Run.evaluate = evaluate
    try:
        return train(dyna_q, f"{flags} --picture-every 10000000", seed)
    finally:
        dyna_q.Run.evaluate = sampled


def many(variants: dict[str, str], args: Args) -> list[tuple[str, int, dict[str, np.ndarray]]]:
    jobs = [(label, flags, seed) for label, flags in variants.items() for seed in range(1, args.seeds + 1)]
    curves = in_processes(train_dyna_q, [(flags, seed) for _, flags, seed in jobs], args)
    return [(label, seed, found) for (label, _, seed), found in zip(jobs, curves, strict=True)]


def figure_8_2(args: Args) -> list[Row]:
    """Steps of the first 50 episodes."""
    variants = {}
    for n, steps in {0: 20_000, 5: 12_000, 50: 10_000}.items():
        variants[f"n = {n}"] = f"maze --planning-steps {n} --total-timesteps {steps} --eval-every {steps}"
    runs, tag = many(variants, args), "charts/episodic_length"
    episodes = min(50, *(len(curves[tag]) for *_, curves in runs))
    return [(label, seed, tag, i + 1, curves[tag][i, 2]) for label, seed, curves in runs for i in range(episodes)]


def changing_maze(preset: str, args: Args) -> list[Row]:
    """The return is 1 at the end of each episode: the cumulative reward is the number of ends so far."""
    end = dyna_q.PRESETS[preset][1].total_timesteps
    rows, grid = [], range(0, end + 1, 50)
    flags = f"{preset} --eval-every {end}"
    for label, seed, curves in many({"Dyna-Q+": flags, "Dyna-Q": f"{flags} --bonus 0"}, args):
        ends = curves.get("charts/episodic_return", np.zeros((0, 3)))[:, 0]
        rows += [(label, seed, "cumulative_reward", step, (ends <= step).sum()) for step in grid]
    return rows


def frozenlake(args: Args) -> list[Row]:
    model, gamma = tabular_dp.model_of(gym.make("FrozenLake8x8-v1")), dyna_q.PRESETS["frozenlake"][1].gamma
    *_, best = tabular_dp.value_iteration(*model, tabular_dp.Args(gamma=gamma))
    planning, q_learning = "frozenlake --eval-every 1000", "frozenlake --planning-steps 0 --total-timesteps 400000"
    variants = {
        "expected updates, n = 50": planning,
        "sample updates, n = 50": f"{planning} --model sample",
        "Q-learning, α = 0.1": f"{q_learning} --alpha 0.1",
        "Q-learning, α = 0.02": q_learning,
    }
    rows = []
    for label, seed, curves in many(variants, args):
        steps, _, value = curves["eval/exact_value"].T  # at the ends of episodes
        grid = np.arange(1_000 if "n = 50" in label else 4_000, steps[-1] + 1, 1_000 if "n = 50" in label else 4_000)
        shares = np.interp(grid, steps, value / best[0])
        rows += [(label, seed, "share_of_optimum", step, x) for step, x in zip(grid, shares, strict=True)]
    return rows


def updates_until_shortest(planner: str, scale: int, alpha: float, seed: int, limit: int = 60_000) -> float:
    """Planning updates (n = 5) made when the greedy path first is a shortest one; ∞ after `limit` × scale steps. Each
    cell of the Dyna maze is scale × scale cells, as in Example 8.4.

    A loop of its own, because it looks at the path after each real step; the updates are those of the file.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    args = dyna_q.Args(planner=planner, planning_steps=5, alpha=alpha)
    rows = ["".join(letter * scale for letter in row) for row in dyna_q.MAZES["DynaMaze-v0"][0][0].split()]
    env = dyna_q.Maze((" ".join(row for row in rows for _ in range(scale)),))
    states = int(env.observation_space.n)
    agent, model, updates = dyna_q.Agent(env, args), dyna_q.Model(states, 4, args), 0
    Q = agent.Q
    start, _ = env.reset(seed=seed)
    moves = {}
    for s, a in np.ndindex(states, 4):  # the true next state, terminal at the goal
        env.s = s
        s2, _, won, *_ = env.step(a)
        moves[s, a] = states if won else s2
    s = start
    for now in range(1, limit * scale + 1):
        a = dyna_q.epsilon_greedy(Q[s], args.epsilon)
        s2 = moves[s, a]
        r = float(s2 == states)
        if planner == "dyna":
            Q[s][a] += alpha * (r + args.gamma * max(Q[s2]) - Q[s][a])
        model.learn(s, a, r, s2, now)
        if planner == "dyna":
            updates += dyna_q.plan(Q, model, args, now)
        else:
            updates += dyna_q.prioritized_sweeping(Q, model, s, a, args)
        walker = start
        for _ in range(13 * scale + 1):  # the shortest: 13 cells to cross, and one step into any part of the goal's
            walker = moves[walker, agent(walker)]
            if walker == states:
                return updates
        s = start if s2 == states else s2
    return np.inf


def sweeping(args: Args) -> list[Row]:
    rows = []
    for scale in (1, 2):
        for alpha in (0.5, 1.0):
            for planner in ("dyna", "prioritized"):
                jobs = [(planner, scale, alpha, seed) for seed in range(1, args.seeds + 1)]
                for (*_, seed), made in zip(
                    jobs, in_processes(updates_until_shortest, jobs, args.workers), strict=True
                ):
                    rows.append((planner, seed, f"{6 * scale} × {9 * scale}, α = {alpha:g}", 0, made))
    return rows


def print_sweeping(data: Measured) -> None:
    print("\n| grid | Dyna-Q | prioritised sweeping | ratio | seeds that got there |\n|-|-|-|-|-|")
    for grid, variants in data.items():
        made = [variants[planner][1] for planner in ("dyna", "prioritized")]
        dyna, prioritized = map(np.median, made)
        solved = " and ".join(str(np.isfinite(x).sum()) for x in made)
        print(f"| {grid} | {dyna:,.0f} | {prioritized:,.0f} | {dyna / prioritized:.1f} | {solved} of {len(made[0])} |")


def dyna_q_episodes(_: Args) -> None:
    """The value maps at the ends of the first 15 episodes, n = 0, 5 and 50 side by side (seed 1)."""
    films = {0: [], 5: [], 50: []}
    for n, frames in films.items():

        def picture(_, figure: Figure, n=n, frames=frames) -> None:
            figure.axes[0].set_title(f"n = {n}, episode {len(frames) + 1}")
            figure.set_dpi(45)
            FigureCanvasAgg(figure).draw()
            frames.append(np.asarray(figure.canvas.buffer_rgba())[..., :3])

        dyna_q.Run.picture = picture
        steps = 20_000 if n == 0 else 4_000
        train(dyna_q, f"maze --planning-steps {n} --total-timesteps {steps} --eval-every {steps} --picture-every 1", 1)
    save_film("dyna_q_episodes", [np.hstack(row) for row in zip(*films.values(), strict=False)][:15], 700)


def save_film(name: str, frames: list[np.ndarray], milliseconds: int) -> None:
    first, *others = [Image.fromarray(frame) for frame in frames]
    first.save(figure_path(f"{name}.gif"), save_all=True, append_images=others, duration=milliseconds, loop=0)


# ── icm, pets: comparisons of long runs ───────────────────────────────────────────────────────────────────────────


def icm_maze(args: Args) -> list[Row]:
    """And the tiles that random moves visit in as many steps."""
    commands = {"ICM": "icm maze", "PPO alone": "icm maze --reward extrinsic"}
    rows = finished(commands, tuple(SHOWN["icm_maze"].panels), args)
    for label, seed, _, step, value in finished(commands, ("charts/episodic_return",), args):
        if value > 0 and (label, seed) not in {row[:2] for row in rows if row[2] == "first_success"}:
            rows.append((label, seed, "first_success", 0, step))
    settings = icm.PRESETS["maze"][1]
    for seed in range(1, args.seeds + 1):
        torch.manual_seed(seed)
        envs = icm.Environments(settings)
        for step in range(settings.envs, settings.total_timesteps + 1, settings.envs):
            envs.step(torch.randint(4, (settings.envs,)).tolist())
            if step % (100 * settings.envs) == 0:
                rows.append(("random moves", seed, "charts/tiles_visited", step, int((envs.visits > 0).sum())))
    return rows


def pets_ablation(args: Args) -> list[Row]:
    flags = {
        "PE-TS∞": "", "PE-TS1": " --propagation TS1", "PE-E": " --propagation E", "DE-TS∞": " --model DE",
        "P-TS": " --model P", "D-E": " --model D --propagation E", "PE-TS∞, random shooting": " --optimizer random",
    }  # fmt: skip
    commands = {label: f"pets cartpole --total-timesteps 1600{more}" for label, more in flags.items()}
    return finished(commands, ("charts/episodic_return", "eval/episodic_return"), args)


# ── pets: two kinds of uncertainty ────────────────────────────────────────────────────────────────────────────────


def pets_toy(_: Args) -> None:
    """s' − s = sin 2s + noise(s), observed only on [−2, −0.3] and [0.7, 2.5]."""

    def true_noise(s: np.ndarray) -> np.ndarray:
        return 0.05 + 0.2 / (1 + np.exp(-3 * s))

    torch.manual_seed(0)
    rng, env = np.random.default_rng(0), gym.Env()
    env.observation_space, env.action_space = gym.spaces.Box(-9, 9, (1,)), gym.spaces.Box(-1, 1, (1,))
    replay = pets.Replay(1_000, env, "cpu")
    for s in np.concatenate([rng.uniform(-2, -0.3, 500), rng.uniform(0.7, 2.5, 500)]):
        replay.add(s, 0.0, 0.0, s + np.sin(2 * s) + true_noise(s) * rng.normal(), False, 0)
    args = pets.Args(epochs=200, batch_size=64, hidden=64, weight_decay=(1e-4,) * 3)
    model, data = pets.Ensemble(1, 1, False, args), replay.rows()
    pets.fit(model, pets.make_optimizer(model, args), data, args)

    s = torch.linspace(-4, 5, 300)[:, None]
    with torch.no_grad():
        mean, logvar, _ = model(s.expand(5, -1, -1), torch.zeros(5, 300, 1))
    mean, std, s = mean[..., 0].numpy(), (0.5 * logvar).exp()[..., 0].numpy(), s[:, 0].numpy()
    figure = Figure(figsize=(9, 3.6), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(data.s, data.s2 - data.s, ".", markersize=2, color="gray", label="data")
    left.plot(s, np.sin(2 * s), "k--", linewidth=1, label="true mean")
    for b in range(args.members):
        (line,) = left.plot(s, mean[b], linewidth=1, label="members ± 2 std" if b == 0 else None)
        left.fill_between(s, mean[b] - 2 * std[b], mean[b] + 2 * std[b], alpha=0.1, color=line.get_color())
    left.set(xlabel="s", ylabel="s' − s", ylim=(-2.6, 2.6), title="Predictions of five members")
    left.legend(fontsize=8, loc="upper right")
    right.plot(s, true_noise(s), "k--", linewidth=1, label="true noise")
    right.plot(s, np.sqrt((std**2).mean(0)), label="aleatoric: predicted noise")
    right.plot(s, mean.std(0), label="epistemic: disagreement of the means")
    for low, high in ((-2, -0.3), (0.7, 2.5)):
        right.axvspan(low, high, color="gray", alpha=0.15)
    right.set(xlabel="s", ylabel="standard deviation", ylim=(0, 1), title="Two kinds of uncertainty")
    right.legend(fontsize=8, loc="upper left")
    figure.savefig(figure_path("pets_toy.png"))


# ── mage: the critics' action gradients beside the simulator's ────────────────────────────────────────────────────


def sample_states(agent: mage.Agent, env: gym.Env, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(θ, θ') and its observation after up to 200 steps, of which a share between none and all are random actions."""
    rng, found = np.random.default_rng(0), []
    for _ in range(count):
        obs, _ = env.reset(seed=int(rng.integers(2**31)))
        share = rng.random()
        for _ in range(rng.integers(200)):
            a = rng.uniform(-2, 2, 1).astype(np.float32) if rng.random() < share else agent(obs)
            obs, *_ = env.step(a)
        found.append((env.unwrapped.state, obs))
    return found


def discounted_return(agent: mage.Agent, env: gym.Env, state: np.ndarray, action: float, horizon: int = 300) -> float:
    """Of an action in [−1, 1] and, from then on, the policy's."""
    env.reset(seed=0)
    env.unwrapped.state, a, total = state, np.float32([2 * action]), 0.0
    for t in range(horizon):
        obs, r, *_ = env.step(a)
        total, a = total + agent.args.gamma**t * float(r), agent(obs)
    return total


def gradient_cosine(agent: mage.Agent, count: int = 40, step: float = 0.01) -> float:
    """∇_a Q at a = π(s): the critics', and the simulator's by finite differences of the policy's return."""
    env = gym.make("Pendulum-v1").unwrapped  # without its time limit
    states, observations = zip(*sample_states(agent, env, count), strict=True)
    s = torch.as_tensor(np.array(observations))
    a = agent.pi(agent.policy, s).detach().requires_grad_()
    (believed,) = torch.autograd.grad(agent.q(agent.critics, s, a).amin(0).sum(), a)
    true = []
    for state, action in zip(states, a[:, 0].tolist(), strict=True):
        low, high = max(action - step, -1), min(action + step, 1)
        rise = discounted_return(agent, env, state, high) - discounted_return(agent, env, state, low)
        true.append(rise / (high - low))
    return float(F.cosine_similarity(believed[:, 0], torch.tensor(true), dim=0))


def mage_run(flags: str, seed: int) -> list[tuple[str, float, float]]:
    """Tag, step and value. The run pauses to be measured; it continues to the bit as if it had not been stopped."""
    torch.set_num_threads(1)
    rows = []
    with TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        words = ["pendulum", *flags.split(), "--seed", str(seed), "--run-dir", folder]
        for pause in range(200, 3_001, 200):
            mage.main([*words, "--total-timesteps", str(pause)])
            words = ["--resume", folder]
            rows.append(("model/gradient_cosine", pause, gradient_cosine(mage.load_policy(folder))))
        tag = "eval/episodic_return"
        return rows + [(tag, step, value) for step, _, value in read_curves(Path(folder))[tag]]


def mage_pendulum(args: Args) -> list[Row]:
    variants = {
        "MAGE": "", "Dyna-TD3": "--gradient-weight 0", "TD3": "--gradient-weight 0 --no-imagine",
        "TD3, an update a step": "--gradient-weight 0 --no-imagine --updates 1",
    }  # fmt: skip
    jobs = [(flags, seed) for flags in variants.values() for seed in range(1, args.seeds + 1)]
    found = in_processes(mage_run, jobs, args)
    labels = [label for label in variants for _ in range(args.seeds)]
    return [(label, seed, *row) for label, (_, seed), rows in zip(labels, jobs, found, strict=True) for row in rows]


# ── pddm: its planner, CEM and random shooting in the same models ─────────────────────────────────────────────────


class RandomShooting:
    """As mpc_rs.py plans, with the mean return over the ensemble."""

    def __init__(self, agent: pddm.Agent):
        self.agent, self.args, self.low, self.high = agent, agent.args, agent.low, agent.high
        agent.reset()
        self.centre = agent.mean

    def reset(self) -> None:
        pass

    def returns_of(self, actions: Tensor) -> Tensor:
        _, returns = self.agent.imagine(self.s.expand(len(actions), -1), actions)
        return returns.mean(0)

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        self.s = torch.as_tensor(obs, dtype=torch.float32)
        actions = torch.lerp(self.low, self.high, torch.rand(self.args.candidates, *self.centre.shape))
        return actions[self.returns_of(actions).argmax(), 0].numpy()


class Cem(RandomShooting):
    """As pets.py plans, with its smoothing and its warm start: four iterations, each with a quarter of the candidates
    and a fifth of those as elites."""

    def __init__(self, agent: pddm.Agent):
        super().__init__(agent)
        candidates = self.args.candidates // 4
        self.settings = pets.Args(candidates=candidates, elites=round(0.2 * candidates), iterations=4)
        self.reset()

    def reset(self) -> None:
        self.mean = self.centre

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        self.s = torch.as_tensor(obs, dtype=torch.float32)
        plan = pets.cem(self.returns_of, self.mean, self.low, self.high, self.settings)
        self.mean = torch.cat([plan[1:], self.centre[:1]])
        return plan[0].numpy()


def pddm_reacher(args: Args) -> list[Row]:
    rows = []
    for seed in range(1, args.seeds + 1):
        agent = pddm.load_policy(str(folder_of("pddm reacher", seed, args)))
        env = pddm.make_env(agent.args)
        for label, planner in {"PDDM": agent, "CEM": Cem(agent), "random shooting": RandomShooting(agent)}.items():
            torch.manual_seed(0)
            returns = []
            for episode in range(10):
                obs, info = env.reset(seed=10_000 + episode)
                planner.reset()
                while "episode" not in info:
                    obs, _, _, _, info = env.step(planner(obs))
                returns.append(float(info["episode"]["r"]))
            rows.append((label, seed, "eval/episodic_return", 0, np.mean(returns)))
    return rows


def draw_planners(data: Measured) -> None:
    """A line for each seed."""
    scores = {label: values[:, 0] for label, (_, values) in data["eval/episodic_return"].items()}
    figure = Figure(figsize=(5, 4), layout="constrained", dpi=100)
    axes = figure.add_subplot(ylabel="mean return of the test episodes", title="Reacher-v5, same model and budget")
    for each in zip(*scores.values(), strict=True):
        axes.plot(list(scores), each, "o-", color="gray", linewidth=0.7, markersize=3)
    figure.savefig(figure_path("pddm_reacher.png"))


# ── vin: reactive networks, larger mazes, a film ──────────────────────────────────────────────────────────────────


class Reactive(vin.Agent):
    """A network without a plan: `plan` returns the image, and `attend` sees it from each of the cells."""

    def __init__(self, env: gym.Env, args: vin.Args):
        nn.Module.__init__(self)
        self.iterations, self.n = args.iterations, env.observation_space["image"].shape[1]
        self.layers = self.make_layers(args.q_channels)
        self.to(args.device)

    def plan(self, images: Tensor, iterations: int) -> Tensor:
        return images

    def reward(self, images: Tensor) -> Tensor:
        return images[:, 1:]

    def attend(self, images: Tensor, cells: Tensor) -> Tensor:
        return torch.stack([self.layers(self.see(x, of)) for x, of in zip(images, cells, strict=True)])


class FCN(Reactive):
    """A convolution that sees the whole maze from each cell, and two of 1×1; only the asked cells are computed."""

    def make_layers(self, channels: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(2 * (2 * self.n - 1) ** 2, 150), nn.ReLU(), nn.Linear(150, 150), nn.ReLU(),
            nn.Linear(150, channels), nn.ReLU(), nn.Linear(channels, 8, bias=False),
        )  # fmt: skip

    def see(self, image: Tensor, cells: Tensor) -> Tensor:
        return F.unfold(image[None], 2 * self.n - 1, padding=self.n - 1)[0].T[cells]


class CNN(Reactive):
    """Five convolutions and two poolings; the agent's cell is a third channel."""

    def make_layers(self, channels: int) -> nn.Module:
        layers, sizes = [], [3, 50, 50, 100, 100, 100]
        for i in range(5):
            layers += [nn.Conv2d(sizes[i], sizes[i + 1], 3, padding=1), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] * (i in (0, 2))
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(100 * (self.n // 4) ** 2, 8, bias=False))

    def see(self, image: Tensor, cells: Tensor) -> Tensor:
        here = F.one_hot(cells, self.n**2).view(-1, 1, self.n, self.n).to(image.dtype)
        return torch.cat([image.expand(len(cells), -1, -1, -1), here], 1)


CONTROLS = "maze16 --total-timesteps 33000 --hold-steps 16500 --decay-steps 16500 --test-mazes 200 --eval-every 3300"


def vin_reactive(args: Args) -> list[Row]:
    """The paper's reactive networks, trained by vin.py's own loop in the place of its planner."""
    rows, planner = [], vin.Agent
    for network in (FCN, CNN):
        for seed in range(1, args.seeds + 1):
            vin.Agent = network
            try:
                curves = train(vin, CONTROLS, seed)
            finally:
                vin.Agent = planner
            for tag in ("eval/success_rate", "eval/trajectory_difference", "eval/prediction_loss"):
                rows += [(network.__name__, seed, tag, step, value) for step, _, value in curves[tag]]
    return rows


def vin_larger(args: Args) -> None:
    """A VIN of 8 × 8 mazes in those of 16 × 16, with twice the sweeps."""
    agent, env = vin.load_policy(str(folder_of("vin maze8", 1, args))), vin.make_env(vin.PRESETS["maze16"][1])
    agent.iterations *= 2
    torch.manual_seed(0)
    mazes = vin.label(*env.unwrapped.sample(1_000, test=True), 7)
    print(f"success in 16 × 16 mazes: {vin.heldout_metrics(agent, mazes)['eval/success_rate']:.3f}")


@torch.inference_mode()
def vin_sweeps(args: Args) -> None:
    """V̄ in three mazes after 0, 1, ... K sweeps."""
    agent, env = vin.load_policy(str(folder_of("vin maze16", 1, args))), vin.make_env(vin.PRESETS["maze16"][1])
    torch.manual_seed(0)
    images = vin.label(*env.unwrapped.sample(3, test=True), 7).images
    values = [agent.plan(images, k - 1).amax(1) for k in range(1, agent.iterations + 1)]
    values = torch.stack([torch.zeros_like(values[0]), *values])  # [K + 1, 3, n, n]
    low, high = values.amin((0, 2, 3), keepdim=True), values.amax((0, 2, 3), keepdim=True)
    pictures = matplotlib.colormaps["viridis"](((values - low) / (high - low)).numpy())[..., :3]
    pictures = (255 * pictures).astype(np.uint8).repeat(12, 2).repeat(12, 3)
    pictures = np.pad(pictures, ((0, 0), (0, 0), (0, 0), (0, 6), (0, 0)), constant_values=255)
    save_film("vin_sweeps", [np.concatenate(list(frame), 1) for frame in pictures], 250)


# ── Command line ──────────────────────────────────────────────────────────────────────────────────────────────────

MEASURE: dict[str, Callable[[Args], list[Row]]] = {
    "dyna_q_figure_8_2": figure_8_2,
    "dyna_q_figure_8_4": functools.partial(changing_maze, "blocking"),
    "dyna_q_figure_8_5": functools.partial(changing_maze, "shortcut"),
    "dyna_q_frozenlake": frozenlake,
    "dyna_q_sweeping": sweeping,
    "icm_maze": icm_maze,
    "mage_pendulum": mage_pendulum,
    "pddm_reacher": pddm_reacher,
    "pets_ablation": pets_ablation,
    "vin_reactive": vin_reactive,
}
WITHOUT_NUMBERS = {
    "dyna_q_episodes": dyna_q_episodes,
    "pets_toy": pets_toy,
    "vin_larger": vin_larger,
    "vin_sweeps": vin_sweeps,
}


def main(args: Args) -> None:
    if args.name in WITHOUT_NUMBERS:
        WITHOUT_NUMBERS[args.name](args)
        return
    if args.measure:
        if args.name in EARLIER:
            sys.exit(f"{args.name} was measured with earlier files: leave out --measure")
        rows = MEASURE[args.name](args)
        write_csv(csv_path(args.name), COLUMNS, [(*row[:3], f"{row[3]:.0f}", f"{row[4]:.6g}") for row in rows])
    data, shown = read(args.name), SHOWN.get(args.name, Shown())
    if args.name == "dyna_q_sweeping":
        print_sweeping(data)
        return
    print_tables(data, shown)
    if args.name == "pddm_reacher":
        draw_planners(data)
    elif shown.panels:
        draw(args.name, data, shown)


if __name__ == "__main__":
    main(tyro.cli(Args, description=(__doc__ or "").split("\n\n")[0]))
