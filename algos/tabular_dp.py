# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "numpy>=2.0,<3", "gymnasium>=1.3,<2", "tyro>=1.0.16,<2", "pillow>=11,<14", "matplotlib>=3.9,<4",
#     "pygame-ce>=2.5,<3",
# ]
# ///
"""Dynamic programming: plan with a model that is known, then with one that is only counted.

A model gives the probability of each next state and the expected reward of each action. With it, the value of a policy
is the solution of a linear system, and the best policy is found by sweeps over all states, without a single real step.
Model-based reinforcement learning is the same with a model learned from data; the last step shows what that costs.

Book: R. S. Sutton and A. G. Barto, "Reinforcement Learning: An Introduction", 2nd edition, 2018, chapter 4; its
equations are cited below. Step (5): A. Agarwal, S. Kakade and L. F. Yang, "Model-based reinforcement learning with a
generative model is minimax optimal", COLT 2020.

The algorithms:
    (1) The model: P(s'|s, a) and r(s, a), from the environment's own table. A terminal state is worth 0.
    (2) Policy evaluation: V ← r_π + γ P_π V in sweeps; or all at once, by solving (I − γ P_π) V = r_π.
    (3) Policy iteration: evaluate π, then π(s) ← argmax_a Q(s, a), until π stays the same. Modified: by m sweeps only.
    (4) Value iteration: V(s) ← max_a [r(s, a) + γ Σ_s' P(s'|s, a) V(s')], for all states at once or one by one.
    (5) Plug-in: call the world N times for each state and action, count P̂ = N(s, a, s') / N, and plan with P̂.

Symbols: P[s, a, s'], r[s, a], Q[s, a], V[s]; π → policy [S], ε → tolerance, m → evaluation_sweeps, N → samples.

Usage (seconds; docs/tabular_dp.md explains the results):
    python algos/tabular_dp.py                             # FrozenLake: 724 sweeps or 3 policies, V(start) = 0.542026
    python algos/tabular_dp.py gambler                     # the book's Example 4.3, V(25) = 0.16
    python algos/tabular_dp.py --env-id CliffWalking-v1    # any environment with a table `unwrapped.P`
    python algos/tabular_dp.py random                      # planning with a counted model: errors over N
    python algos/tabular_dp.py --evaluate runs/NAME --episodes 10 --capture-video

Differences from the book: ties keep the old action, so that policy iteration stops; value iteration stops when its
greedy policy is within ε of the best one. The first policy is greedy for the values of acting at random.
"""

import argparse
import io
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, Optional

import gymnasium as gym
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

ALGORITHM = "tabular_dp"


@dataclass
class Args:  # tyro turns each field into a flag and each comment into its help
    env_id: str = "FrozenLake-v1"  # any environment with a table `unwrapped.P`, as Gymnasium's toy texts have
    gamma: float = 0.99  # γ: discount; with 1, every policy must end
    tolerance: float = 1e-10  # ε: the greedy policy's values are this close to the best ones
    evaluation_sweeps: int = 5  # m: sweeps per policy of modified policy iteration
    samples: int = 0  # N: largest number of samples per state and action of the counted models; 0 counts nothing
    seed: int = 1  # of the random MDP, the samples and the episodes
    time_limit: Optional[int] = None  # steps per episode, in place of the environment's own limit
    episodes: int = 100  # episodes that the best policy plays at the end
    capture_video: bool = False  # save the first episode as a GIF
    run_dir: Optional[str] = None  # output folder; runs/<env>__<algorithm>__<seed>__<time> by default
    evaluate: Optional[str] = None  # do not plan: play with the policy of this run folder

    def __post_init__(self):
        """tyro reports a ValueError raised here as one sentence and exits with code 2."""
        for name, value in vars(self).items():
            may_be_zero = name in ("gamma", "samples", "seed")
            if type(value) in (int, float) and not (0 < value < math.inf or (value == 0 and may_be_zero)):
                raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be a positive number")
        if self.gamma > 1:
            raise ValueError(f"--gamma is {self.gamma}: it must be at most 1")


PRESETS = {
    "frozenlake": ("FrozenLake 4×4, slippery", Args()),
    "gridworld": ("Example 4.1 of the book: a 4×4 grid, −1 a step", Args("Gridworld-v0", gamma=1.0)),
    "gambler": ("Example 4.3 of the book: stakes on a coin, 100 wins", Args("Gambler-v0", gamma=1.0, episodes=1_000)),
    "taxi": ("Taxi, 500 states", Args("Taxi-v4")),
    "random": ("20 states with random transitions; planning with counted models", Args(
        "RandomMDP-v0", gamma=0.9, samples=4_096)),
}  # fmt: skip


# ── The algorithm ─────────────────────────────────────────────────────────────────────────────────────────────────


def model_of(env: gym.Env) -> tuple[np.ndarray, np.ndarray]:
    """P [S, A, S] and r [S, A] from lists of (probability, next state, reward, terminated). The same next state may be
    listed twice. Where an episode may end, a row of P sums to less than 1: what follows the end is worth 0."""
    states, actions = int(env.observation_space.n), int(env.action_space.n)
    P, r = np.zeros((states, actions, states)), np.zeros((states, actions))
    for s in range(states):
        for a in range(actions):
            for p, s2, reward, terminated in env.unwrapped.P[s][a]:
                r[s, a] += p * reward
                P[s, a, s2] += p * (not terminated)
    return P, r


def backup(P: np.ndarray, r: np.ndarray, V: np.ndarray, gamma: float) -> np.ndarray:
    # Q(s, a) = r(s, a) + γ Σ_s' P(s'|s, a) V(s')
    return r + gamma * (P @ V)


def greedy(Q: np.ndarray, policy: Optional[np.ndarray] = None) -> np.ndarray:
    """π(s) = argmax_a Q(s, a) [S]; the old policy's action wherever it is as good."""
    best = Q.argmax(1)
    if policy is None:
        return best
    rows = np.arange(len(Q))
    return np.where(Q[rows, policy] >= Q[rows, best] - 1e-12 * (1 + abs(Q).max()), policy, best)


def sweeps_of(update: Callable[[np.ndarray], np.ndarray], states: int, limit: float) -> Iterator[np.ndarray]:
    """Yields V ← update(V), from V = 0, until V changes by less than the limit or by no more than rounding."""
    V = np.zeros(states)
    for _ in range(200_000):
        before, V = V, update(V)
        yield V
        if abs(V - before).max() < max(limit, 1e-15 * abs(V).max()):
            return
    raise UserError("the values do not converge: with a --gamma of 1 or close to it, every policy must end")


def evaluation_sweeps(P_pi: np.ndarray, r_pi: np.ndarray, gamma: float, limit: float) -> Iterator[np.ndarray]:
    # Eq. 4.5: V_{k+1}(s) = Σ_a π(a|s) [r(s, a) + γ Σ_s' P(s'|s, a) V_k(s')]
    return sweeps_of(lambda V: r_pi + gamma * (P_pi @ V), len(r_pi), limit)


def evaluate(P: np.ndarray, r: np.ndarray, policy: np.ndarray, gamma: float) -> np.ndarray:
    """V_π [S] of a policy: actions [S], or probabilities [S, A]."""
    if policy.ndim == 1:
        policy = np.eye(r.shape[1])[policy]
    # P_π(s'|s) = Σ_a π(a|s) P(s'|s, a) and r_π(s) = Σ_a π(a|s) r(s, a)
    P_pi, r_pi = np.einsum("sa,sat->st", policy, P), (policy * r).sum(1)
    if gamma == 1:  # a policy that may go on for ever has no solution, but may have a limit
        *_, V = evaluation_sweeps(P_pi, r_pi, 1.0, 1e-13)
        return V
    # Eq. 4.4, V_π = r_π + γ P_π V_π, as a linear system: (I − γ P_π) V_π = r_π
    return np.linalg.solve(np.eye(len(P)) - gamma * P_pi, r_pi)


def policy_iteration(P: np.ndarray, r: np.ndarray, args: Args) -> Iterator[np.ndarray]:
    """Yields V_π of each policy. The first one is greedy for the values of acting at random."""
    states, actions = r.shape
    V, policy, before = evaluate(P, r, np.full((states, actions), 1 / actions), args.gamma), None, None
    while before is None or (policy != before).any():
        before = policy
        policy = greedy(backup(P, r, V, args.gamma), policy)
        V = evaluate(P, r, policy, args.gamma)
        yield V


def stop_at(args: Args) -> float:
    """‖V_{k+1} − V_k‖ < ε (1 − γ) / 2γ implies ‖V_π − V*‖ < ε for the greedy policy. γ = 1 has no such bound."""
    return args.tolerance * (1 - args.gamma) / (2 * args.gamma) if 0 < args.gamma < 1 else args.tolerance


def value_iteration(P: np.ndarray, r: np.ndarray, args: Args) -> Iterator[np.ndarray]:
    """All values of a sweep are computed from those of the sweep before."""
    # Eq. 4.10: V_{k+1}(s) = max_a [r(s, a) + γ Σ_s' P(s'|s, a) V_k(s')]
    return sweeps_of(lambda V: backup(P, r, V, args.gamma).max(1), len(r), stop_at(args))


def value_iteration_in_place(P: np.ndarray, r: np.ndarray, args: Args) -> Iterator[np.ndarray]:
    """Gauss–Seidel: each state already sees the new values of the states before it."""

    def sweep(V: np.ndarray) -> np.ndarray:
        V = V.copy()
        for s in range(len(V)):
            V[s] = (r[s] + args.gamma * (P[s] @ V)).max()
        return V

    return sweeps_of(sweep, len(r), stop_at(args))


def modified_policy_iteration(P: np.ndarray, r: np.ndarray, args: Args) -> Iterator[np.ndarray]:
    """As policy iteration, but with m sweeps in place of the solution; m = 1 is value iteration."""
    rows = np.arange(len(r))

    def improve_and_evaluate(V: np.ndarray) -> np.ndarray:
        Q = backup(P, r, V, args.gamma)
        policy, V = Q.argmax(1), Q.max(1)  # the maximum is the first of the m sweeps
        for _ in range(args.evaluation_sweeps - 1):
            V = r[rows, policy] + args.gamma * (P[rows, policy] @ V)
        return V

    return sweeps_of(improve_and_evaluate, len(r), stop_at(args))


METHODS = {
    "value iteration": value_iteration,
    "value iteration in place": value_iteration_in_place,
    "modified policy iteration": modified_policy_iteration,
    "policy iteration": policy_iteration,
}


def count_model(P: np.ndarray, samples: int, rng: np.random.Generator) -> np.ndarray:
    # P̂(s'|s, a) = N(s, a, s') / N: each state and action is tried N times; the end of an episode is one more outcome
    ends = (1 - P.sum(-1, keepdims=True)).clip(0)
    outcomes = np.concatenate([P, ends], -1)
    counts = rng.multinomial(samples, outcomes / outcomes.sum(-1, keepdims=True))
    return counts[..., :-1] / samples


class PlugIn(NamedTuple):
    """What planning with counted models gives, on the mean over 20 of them."""

    samples: int  # N, for each state and action
    bound: float  # γ / (1 − γ) ‖(P̂ − P) V*‖, which q_error cannot exceed
    q_error: float  # ‖Q̂* − Q*‖
    suboptimality: float  # max_s V*(s) − V_π̂(s)
    believed: float  # mean value of π̂ in the counted model
    earned: float  # mean value of π̂ in the world


def plug_in(P: np.ndarray, r: np.ndarray, samples: int, args: Args, rng: np.random.Generator) -> PlugIn:
    """Plan with a counted model, and compare the policy with the best one. r is known."""
    *_, best = policy_iteration(P, r, args)
    Q_best, rows = backup(P, r, best, args.gamma), []
    for _ in range(20):
        counted = count_model(P, samples, rng)
        *_, believed = policy_iteration(counted, r, args)
        Q = backup(counted, r, believed, args.gamma)
        earned = evaluate(P, r, greedy(Q), args.gamma)
        bound = args.gamma * abs((counted - P) @ best).max() / (1 - args.gamma) if args.gamma < 1 else math.inf
        rows.append((samples, bound, abs(Q - Q_best).max(), (best - earned).max(), believed.mean(), earned.mean()))
    return PlugIn(*np.mean(rows, 0))


# ── What the planner sees ─────────────────────────────────────────────────────────────────────────────────────────


def draw_values(axes: Axes, env: gym.Env, P: np.ndarray, Q: np.ndarray, title: str) -> None:
    """Values and greedy actions. An action's arrow points where it leads from most states."""
    V, desc = Q.max(1), np.array(getattr(env.unwrapped, "desc", ""), dtype=str)
    shape = desc.shape if desc.size == len(V) else getattr(env.unwrapped, "shape", None)
    if shape is None:  # not a task on a grid
        axes.plot(V, ".-" if len(V) < 200 else "-")
        axes.set(xlabel="state", ylabel="V")
    else:
        y, x = np.indices(shape).reshape(2, -1)
        moves = np.stack([P @ grid - P.sum(-1) * grid[:, None] for grid in (x, y)], -1)  # [S, A, 2], on the mean
        moves = np.median(moves[P.sum((1, 2)) > 0], 0)
        arrows = (moves / (np.linalg.norm(moves, axis=1, keepdims=True) + 1e-12))[Q.argmax(1)]
        arrows[np.ptp(Q, axis=1) < 1e-12] = math.nan  # all actions are equal
        axes.imshow(V.reshape(shape), cmap="YlGn")
        axes.quiver(x, y, *arrows.T, angles="xy", scale_units="xy", scale=1.8, pivot="mid", color="0.4", width=0.008)
        for (row, column), letter in np.ndenumerate(desc if desc.shape == shape else np.full(shape, "")):
            if letter in "SGHT":
                axes.text(column - 0.45, row - 0.45, letter, va="top")
        axes.set(xticks=[], yticks=[])
    axes.set_title(title)


def draw(env: gym.Env, P: np.ndarray, Q: np.ndarray, errors: dict[str, list[float]], counted: list[PlugIn]) -> Figure:
    """The best values; the error of each method over its rounds, or of counted models over N."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_values(left, env, P, Q, f"{env.spec.id}: V* and the best actions")
    if counted:
        for name in ("bound", "q_error", "suboptimality"):
            right.loglog([row.samples for row in counted], [getattr(row, name) for row in counted], ".-", label=name)
        right.set(xlabel="N, samples of each state and action", title="planning with a counted model")
    else:
        for name, error in errors.items():
            right.loglog(range(1, len(error) + 1), np.clip(error, 1e-14, None), ".-", label=name)
        right.set(xlabel="rounds", title="largest error of V")
    figure.legend(*right.get_legend_handles_labels(), loc="outside right upper")
    return figure


def film(env: gym.Env, P: np.ndarray, r: np.ndarray, history: list[np.ndarray], args: Args, path: Path) -> None:
    """Values and greedy actions after some sweeps of value iteration, as a GIF."""
    frames = []
    for sweep in np.unique(np.geomspace(1, len(history), 20).round().astype(int)):
        figure = Figure(figsize=(4, 4), dpi=80)
        Q = backup(P, r, history[sweep - 1], args.gamma)
        draw_values(figure.subplots(), env, P, Q, f"{env.spec.id}: sweep {sweep}")
        figure.savefig(image := io.BytesIO(), format="png")
        frames.append(Image.open(image).convert("RGB"))
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=400, loop=0)


# ── Planning ──────────────────────────────────────────────────────────────────────────────────────────────────────


def train(args: Args) -> None:
    env, rng, folder = make_env(args), np.random.default_rng(args.seed), make_folder(args)
    # (1) the model, from the environment's own table
    P, r = model_of(env)
    start = getattr(env.unwrapped, "initial_state_distrib", np.eye(len(r))[env.reset(seed=args.seed)[0]])
    # (2) what acting at random is worth
    V = evaluate(P, r, np.full(r.shape, 1 / r.shape[1]), args.gamma)
    print(f"{'acting at random':26} {'':20} V(start) = {start @ V:.6f}")
    # (3) and (4) the best policy, by each method
    rounds = {}
    for name, method in METHODS.items():
        began = time.perf_counter()
        rounds[name] = list(method(P, r, args))
        seconds, V = time.perf_counter() - began, rounds[name][-1]
        print(f"{name:26} {len(rounds[name]):5} rounds, {seconds:4.2f} s, V(start) = {start @ V:.6f}")
    best = rounds["policy iteration"][-1]
    Q, errors = backup(P, r, best, args.gamma), {}
    log = ["method,round,value_at_start,error"]
    for name, history in rounds.items():
        errors[name] = [abs(V - best).max() for V in history]
        log += [f"{name},{k + 1},{start @ V:.10g},{errors[name][k]:.4g}" for k, V in enumerate(history)]
    (folder / "rounds.csv").write_text("\n".join(log) + "\n")
    # (5) plan with models that are counted, from more and more samples
    counted = [plug_in(P, r, 4**k, args, rng) for k in range(1, 1 + int(math.log(max(args.samples, 1), 4) + 1e-9))]
    for row in counted:
        print(", ".join(f"{name} {x:.4g}" for name, x in row._asdict().items()))

    policy = greedy(Q)
    np.savez(folder / "policy.npz", Q=Q, policy=policy, args=json.dumps(asdict(args)), algorithm=ALGORITHM)
    draw(env, P, Q, errors, counted).savefig(folder / "picture.png")
    film(env, P, r, rounds["value iteration"], args, folder / "sweeps.gif")
    play(as_function(policy), env, args, folder / "video.gif")
    script, place = f"python {sys.argv[0]}", shlex.quote(str(folder))
    print(f"picture: {folder / 'picture.png'}\nto watch it: {script} --evaluate {place} --capture-video")


def as_function(policy: np.ndarray) -> Callable[[int], int]:
    return lambda obs: int(policy[obs])


# ── The tasks: two examples of the book, and random transitions ───────────────────────────────────────────────────


def make_task(args: Args, **kwargs) -> gym.Env:
    kwargs |= {"seed": args.seed} if args.env_id == "RandomMDP-v0" else {}
    kwargs |= {"max_episode_steps": args.time_limit} if args.time_limit else {}
    env = gym.make(args.env_id, **kwargs)
    if not hasattr(env.unwrapped, "P"):
        raise UserError(f"{args.env_id} has no table of its model, `unwrapped.P`, which dynamic programming needs")
    if int(env.observation_space.n) ** 2 * int(env.action_space.n) > 2e8:
        raise UserError(f"{args.env_id} has {env.observation_space.n} states: their table does not fit in memory")
    return env


class TableEnv(gym.Env):
    """A task given by its table P[s][a] = [(probability, next state, reward, terminated), ...]."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(self, P: dict, start: np.ndarray, desc: Optional[np.ndarray] = None, render_mode=None):
        self.P, self.initial_state_distrib, self.desc, self.render_mode = P, start, desc, render_mode
        self.observation_space, self.action_space = gym.spaces.Discrete(len(P)), gym.spaces.Discrete(len(P[0]))

    def reset(self, *, seed: Optional[int] = None, options: Optional[dict] = None):
        super().reset(seed=seed)
        self.s = int(self.np_random.choice(len(self.P), p=self.initial_state_distrib))
        return self.s, {}

    def step(self, action: int):
        outcomes = self.P[self.s][int(action)]
        _, self.s, reward, terminated = outcomes[self.np_random.choice(len(outcomes), p=[x[0] for x in outcomes])]
        return self.s, float(reward), terminated, False, {}

    def render(self) -> np.ndarray:
        shape = (1, len(self.P)) if self.desc is None else self.desc.shape
        image = np.full((len(self.P), 3), 235, np.uint8)
        image[self.s] = 220, 60, 60
        cell = max(320 // shape[1], 4)
        return image.reshape(*shape, 3).repeat(cell, 0).repeat(cell, 1)


def gridworld(**kwargs) -> TableEnv:
    """Example 4.1: −1 for each step on a 4 × 4 grid; two corners (T) are terminal, and the edge stops a move."""
    P = {s: {} for s in range(16)}
    for s in range(16):
        for a, (down, right) in enumerate(((-1, 0), (1, 0), (0, -1), (0, 1))):
            s2 = min(max(s // 4 + down, 0), 3) * 4 + min(max(s % 4 + right, 0), 3)
            P[s][a] = [(1.0, s, 0.0, True)] if s in (0, 15) else [(1.0, s2, -1.0, s2 in (0, 15))]
    start = np.full(16, 1 / 14)
    start[[0, 15]] = 0
    return TableEnv(P, start, np.array(list("T..............T")).reshape(4, 4), **kwargs)


def gambler(heads: float = 0.4, **kwargs) -> TableEnv:
    """Example 4.3: stake 1 to 50, at most what is there or missing to 100. Heads wins the stake; 100 pays 1."""
    P = {s: {} for s in range(101)}
    for s in range(101):
        for a in range(50):
            stake = min(a + 1, s, 100 - s)
            win = (heads, s + stake, float(s + stake == 100), s + stake == 100)
            P[s][a] = [win, (1 - heads, s - stake, 0.0, s == stake)] if 0 < s < 100 else [(1.0, s, 0.0, True)]
    return TableEnv(P, np.eye(101)[50], **kwargs)


def random_mdp(seed: int, states: int = 20, actions: int = 4, **kwargs) -> TableEnv:
    """Next states by Dirichlet(0.3), rewards by U(0, 1), no end."""
    rng = np.random.default_rng(seed)
    rewards = rng.random((states, actions))
    rows = rng.dirichlet(np.full(states, 0.3), (states, actions))
    P = {s: {a: [(p, s2, rewards[s, a], False) for s2, p in enumerate(rows[s, a])] for a in range(actions)}
         for s in range(states)}  # fmt: skip
    return TableEnv(P, np.full(states, 1 / states), **kwargs)


for name, task in (("Gridworld-v0", gridworld), ("Gambler-v0", gambler), ("RandomMDP-v0", random_mdp)):
    if name not in gym.registry:
        gym.register(name, task, max_episode_steps=1_000)


# ── Plumbing: the same in both files that need no network, nothing below is specific to the algorithm ─────────────


class UserError(Exception):
    """A wrong setting, environment or folder: main() prints one sentence and exits with code 2."""


def make_env(args: Args) -> gym.Env:
    sys.path.append("")  # module:Env-v0 finds a module in the current folder
    try:
        env = make_task(args, **({"render_mode": "rgb_array"} if args.capture_video else {}))
    except (gym.error.Error, ImportError) as error:  # Gymnasium names the package to install
        raise UserError(f"--env-id {args.env_id}: {error}") from None
    return gym.wrappers.RecordEpisodeStatistics(env)


def make_folder(args: Args) -> Path:
    name = f"{args.env_id.replace('/', '-').replace(':', '-')}__{ALGORITHM}__{args.seed}__{int(time.time())}"
    folder = Path(args.run_dir or f"runs/{name}")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: choose another --run-dir")
    print(f"run folder: {folder}", flush=True)
    return folder


def play(policy: Callable, env: gym.Env, args: Args, video: Path) -> float:
    """The mean return of some episodes."""
    returns, lengths, frames = [], [], []
    for episode in range(args.episodes):
        obs, info = env.reset(seed=args.seed + 10_000 if episode == 0 else None)
        while "episode" not in info:
            obs, _, _, _, info = env.step(policy(obs))
            if args.capture_video and episode == 0 and len(frames) < 500:
                frames.append(Image.fromarray(env.render()))
        returns.append(float(info["episode"]["r"]))
        lengths.append(int(info["episode"]["l"]))
    if frames:
        frames[0].save(video, save_all=True, append_images=frames[1:], duration=250, loop=0)
    mean, error = np.mean(returns), 1.96 * np.std(returns) / math.sqrt(len(returns))
    print(f"{args.episodes:,} episodes: mean return {mean:.4f} ± {error:.4f}, mean length {np.mean(lengths):.1f}")
    return mean


def load_run(run_dir: str) -> dict:
    path = Path(run_dir) / "policy.npz"
    if not path.is_file():
        raise UserError(f"{run_dir} holds no policy.npz: not a run folder, or stopped before it was written")
    try:
        with np.load(path) as file:
            run = dict(file)
    except Exception:
        raise UserError(f"{path} is damaged: it cannot be read") from None
    if run.get("algorithm") != ALGORITHM:
        raise UserError(f"{path} is not a run of {ALGORITHM}")
    return run | {"args": Args(**json.loads(str(run["args"])))}


def load_policy(run_dir: str) -> Callable:
    """policy = load_policy("runs/NAME"), then action = policy(obs)"""
    return as_function(load_run(run_dir)["policy"])


def main(words: Optional[list[str]] = None) -> None:
    words = sys.argv[1:] if words is None else words
    try:
        folder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        folder.add_argument("--evaluate")
        if run_dir := folder.parse_known_args(words)[0].evaluate:
            run = load_run(run_dir)
            args = tyro.cli(Args, default=run["args"], args=words)
            play(as_function(run["policy"]), make_env(args), args, Path(args.evaluate) / "play.gif")
        else:
            preset = [] if {*words} & {*PRESETS, "-h", "--help"} else [next(iter(PRESETS))]
            description = __doc__.split("\n\n")[0]
            train(tyro.extras.overridable_config_cli(PRESETS, args=preset + words, description=description))
    except (UserError, OSError) as error:
        print(f"{ALGORITHM}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
