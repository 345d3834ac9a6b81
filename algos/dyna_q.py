# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "numpy>=2.0,<3",
#     "gymnasium>=1.1,<2",
#     "tyro>=1.0,<2",
#     "tensorboard>=2.18,<3",
#     "tqdm>=4.66,<5",
#     "pillow>=11,<14",
#     "matplotlib>=3.9,<4",
#     "pygame-ce>=2.5,<3",
# ]
# ///
"""Dyna-Q: learn from every step twice, once as it happens and n more times as it is remembered.

A table Q(s, a) is learned by Q-learning, and a second table, the model, remembers what each action did. Between two
real steps the agent replays n remembered actions through the same update. Real steps are dear and remembered ones
are free, so the agent is near the shortest path after three episodes instead of twenty-five.

Paper: R. S. Sutton, "Integrated architectures for learning, planning, and reacting based on approximating dynamic
programming", ICML 1990. The text followed here, with its box, equation and figure numbers: R. S. Sutton and
A. G. Barto, "Reinforcement Learning: An Introduction", 2nd edition, 2018, chapter 8.

The algorithm (box "Tabular Dyna-Q", section 8.2; prioritised sweeping, section 8.4, replaces (3) and (5)):
    (1) S ← the current, nonterminal state; A ← ε-greedy(S, Q), ties broken at random
    (2) take A; observe R and S'
    (3) learn:  Q(S, A) ← Q(S, A) + α [R + γ max_a Q(S', a) − Q(S, A)]
    (4) model:  Model(S, A) ← R, S'
    (5) plan, n times: S ← a state seen before, A ← an action taken there before, both at random;
        R, S' ← Model(S, A); Q(S, A) ← Q(S, A) + α [R + γ max_a Q(S', a) − Q(S, A)]
The update of (3) and (5) is Eq. 8.2; with `--model expectation` step (5) makes the expected update, Eq. 8.1.

Symbols (book → this file):
    Q(s, a) → Q[s][a]               n → planning_steps         α → alpha        Q₀ → initial_value
    S, A, R, S' → s, a, r, s2       γ → gamma                  ε → epsilon      κ → bonus
    Model(s, a) → Model             τ(s, a) → now − tried_at   θ → theta        P → priority
    N(s, a, s') → counts            p̂(s', r | s, a) → outcomes

Run (measured on 2 CPU cores, imports included; docs/dyna_q.md has curves of 30 seeds):
    python algos/dyna_q.py                            # the Dyna maze: 14 steps, the shortest path; 10 seconds
    python algos/dyna_q.py maze --planning-steps 0    # the same without planning: plain Q-learning
    python algos/dyna_q.py shortcut                   # Dyna-Q+: 10 steps, by the path that opens at step 3,000; 12 s
    python algos/dyna_q.py frozenlake                 # a stochastic task, planned with expected updates; 33 seconds
    python algos/dyna_q.py --env-id FrozenLake-v1 --model sample

Deviations from the book:
  - A terminated transition leads to one extra state whose row of Q stays 0: the value of a terminal state without a
    special case, also where Q₀ is not 0. A truncated one (a time limit) leads where it led, and is bootstrapped.
  - Stochastic tasks: the book's box assumes a deterministic world. `--model sample` and `--model expectation` keep
    counts of what followed (s, a), with the mean reward of each successor, and plan with a draw from them (Eq. 8.2)
    or with their mean (Eq. 8.1, which has no step size).
  - Prioritised sweeping with counts uses the expected update, for the priority too; with a deterministic model it is
    the book's box to the letter.
"""

import functools
import heapq
import json
import math
import os
import random
import shlex
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional

import gymnasium as gym
import numpy as np
import torch
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

ALGORITHM = "dyna_q"


@dataclass
class Args:
    env_id: str = "DynaMaze-v0"
    """Any Gymnasium environment with Discrete observations and actions; `module:Env-v0` imports the module first."""
    maze_scale: int = 1
    """Cut each cell of this file's own mazes into scale × scale smaller ones (the grid resolution of Example 8.4)."""
    total_timesteps: int = 3_000
    """Real environment steps in all."""
    planner: Literal["dyna", "prioritized"] = "dyna"
    """How planning chooses what to update: at random as Dyna-Q does, or by prioritised sweeping (section 8.4)."""
    planning_steps: int = 50
    """n: planning updates after each real step; 0 is plain Q-learning."""
    model: Literal["deterministic", "sample", "expectation"] = "deterministic"
    """What Model(s, a) holds: the last outcome, or counts of all of them, planned with by a draw or by their mean."""
    bonus: float = 0.0
    """κ of Dyna-Q+: planning adds κ √τ to the reward of what was not tried for τ steps, and may try the untried."""
    theta: float = 1e-4
    """θ of prioritised sweeping: a smaller expected change is not queued."""
    alpha: float = 0.1
    """α: the step size, in learning and in planning."""
    gamma: float = 0.95
    """γ: the discount."""
    epsilon: float = 0.1
    """ε: the share of random actions while learning."""
    initial_value: float = 0.0
    """Q₀: the value of every action at the start; above what can be earned it makes the agent explore."""
    replay_size: int = 1_000
    """How many of the latest real transitions are kept to measure the model on; learning does not use them."""
    seed: int = 1
    """Fixes Python, NumPy, torch and the environment: the same seed on one CPU gives the same run."""
    device: str = "auto"
    """auto, cpu or cuda[:index]. This file's tables are Python lists, fastest on the CPU, and stay there."""
    compile: bool = False
    """torch.compile for the hot path. This file has no tensor code to compile: the flag changes nothing here."""
    log_every: int = 100
    """Write losses, model errors and timings every this many steps (returns are written at each episode's end)."""
    eval_every: int = 500
    """Play the greedy policy in an environment of its own every this many steps; 0: only at the end."""
    eval_episodes: int = 10
    """Episodes for each of those evaluations."""
    eval_max_steps: int = 1_000
    """Cut an evaluation episode here: a greedy policy that has learned nothing may walk in circles for ever."""
    picture_every: int = 20
    """Draw the value map at the end of an episode when this many steps have passed, 20 times at most and at the end;
    0: no picture."""
    capture_video: bool = False
    """Record the first episode of each evaluation as a GIF in the run folder."""
    run_dir: Optional[str] = None
    """Where to write; by default runs/<env>__<algorithm>__<seed>__<time>."""
    checkpoint_every: int = 10_000
    """Save a checkpoint every this many steps, at the end of the episode (or once it is as late again); 0: only at
    the end of the run, and when it is stopped."""
    resume: Optional[str] = None
    """Go on with the run in this folder, with its settings. --total-timesteps may be raised: the episode that the
    first end cut is then left, and a new one begun."""
    evaluate: Optional[str] = None
    """Do not train: play the policy saved in this run folder."""
    episodes: int = 10
    """Episodes to play with --evaluate."""
    progress: bool = True
    """Show a progress bar (never when the output is no terminal)."""


PRESETS = {
    "maze": (
        "Example 8.1, the Dyna maze: Figure 8.2, the fewer episodes the more planning",
        Args(),
    ),
    "blocking": (
        "Example 8.2: the short way closes at step 1,000; compare --bonus 0",
        Args(env_id="BlockingMaze-v0", total_timesteps=3_000, bonus=1e-3, alpha=1.0, picture_every=100),
    ),
    "shortcut": (
        "Example 8.3: a shorter way opens at step 3,000; compare --bonus 0",
        Args(env_id="ShortcutMaze-v0", total_timesteps=6_000, bonus=1e-3, alpha=1.0, picture_every=250),
    ),
    "frozenlake": (
        "FrozenLake 8×8, slippery: a stochastic model with expected updates",
        Args(
            env_id="FrozenLake8x8-v1", total_timesteps=60_000, model="expectation", alpha=0.02, gamma=0.99,
            initial_value=1.0, eval_every=4_000, eval_episodes=100, picture_every=2_000,
        ),
    ),
    "taxi": (
        "Taxi: 500 states, a reward for the right passenger at the right door",
        Args(
            env_id="Taxi-v4", total_timesteps=30_000, gamma=0.99, alpha=0.5,
            eval_every=2_000, eval_episodes=100, picture_every=2_000,
        ),
    ),
    "cliff": (
        "CliffWalking: the short way along the edge",
        Args(env_id="CliffWalking-v1", total_timesteps=5_000, gamma=1.0, alpha=0.5, picture_every=250),
    ),
}


# ── The algorithm ─────────────────────────────────────────────────────────────────────────────────────────────────

Table = list[list[float]]  # Q[s][a]; the last row belongs to the terminal state and stays 0
Outcome = tuple[float, float, int]  # what followed (s, a): probability, reward, next state


class Model:
    """Model(s, a): a table of what each action did in each state."""

    def __init__(self, states: int, actions: int, kind: str, try_untried: bool):
        self.kind, self.try_untried = kind, try_untried
        self.counts = [[{} for _ in range(actions)] for _ in range(states)]  # s' → N(s, a, s'), mean reward
        # An untried action is believed to lead back to its state with reward 0 (Dyna-Q+, footnote of section 8.3).
        self.outcomes = [[[(1.0, 0.0, s)]] * actions for s in range(states)]
        self.tried_at = [[0] * actions for _ in range(states)]  # the step of the last real try: τ = now − tried_at
        self.states: list[int] = []  # the states seen, and below the actions that planning may choose there
        self.actions: list[list[int]] = [[] for _ in range(states)]
        self.predecessors = [{} for _ in range(states + 1)]  # the pairs predicted to lead to s (a set that keeps order)

    def learn(self, s: int, a: int, r: float, s2: int, now: int) -> None:
        if not self.actions[s]:
            self.states.append(s)
            if self.try_untried:
                self.actions[s] = list(range(len(self.counts[s])))
        if a not in self.actions[s]:
            self.actions[s].append(a)
        self.tried_at[s][a] = now
        counts = self.counts[s][a]
        if self.kind == "deterministic":  # the world may have changed: what happened last is what happens
            for old in counts:
                del self.predecessors[old][s, a]
            counts.clear()
        number, mean = counts.get(s2, (0, 0.0))
        counts[s2] = number + 1, mean + (r - mean) / (number + 1)
        # p̂(s' | s, a) = N(s, a, s') / Σ_x N(s, a, x)
        total = sum(number for number, _ in counts.values())
        self.outcomes[s][a] = [(number / total, mean, x) for x, (number, mean) in counts.items()]
        self.predecessors[s2][s, a] = None

    def draw(self, s: int, a: int) -> Outcome:
        """One outcome, as often as it was seen."""
        u = random.random()
        for outcome in self.outcomes[s][a]:
            u -= outcome[0]
            if u < 0:
                break
        return outcome

    def most_likely(self, s: int, a: int) -> Outcome:
        return max(self.outcomes[s][a], key=lambda outcome: outcome[0])


def expected_target(Q: Table, outcomes: list[Outcome], gamma: float) -> float:
    # Eq. 8.1: Σ_{s',r} p̂(s', r | s, a) [r + γ max_a' Q(s', a')]
    target = 0.0
    for p, r, s2 in outcomes:
        target += p * (r + gamma * max(Q[s2]))
    return target


def epsilon_greedy(values: list[float], epsilon: float) -> int:
    if random.random() < epsilon:
        return random.randrange(len(values))
    best = max(values)
    return random.choice([a for a, value in enumerate(values) if value == best])


def greedy(values: list[float]) -> int:
    return values.index(max(values))


def greedy_policy(Q: Table) -> Callable[[Any], int]:
    """The policy that is evaluated: no exploration, no dice."""
    return lambda obs: greedy(Q[int(obs)])


def td_error(Q: Table, s: int, a: int, r: float, s2: int, gamma: float) -> float:
    # δ = R + γ max_a Q(S', a) − Q(S, A)
    return r + gamma * max(Q[s2]) - Q[s][a]


def plan(Q: Table, model: Model, n: int, alpha: float, gamma: float, bonus: float, now: int) -> None:
    """Step (5), Dyna's planning: n updates of pairs from memory.

    The updates are one after the other, each on the values the last one left, as in the book: a batch of n would be
    another algorithm. Plain lists and local names are the fastest for that (benchmarks/speed.py).
    """
    rand, expected, stochastic = random.random, model.kind == "expectation", model.kind == "sample"
    for s in random.choices(model.states, k=n):  # S ← a state seen before, all as likely ...
        actions = model.actions[s]
        a = actions[int(rand() * len(actions))]  # ... and then A ← one of its actions: not uniform over the pairs
        # Dyna-Q+, section 8.3: the reward of a planned step is R + κ √τ
        extra = bonus * math.sqrt(now - model.tried_at[s][a]) if bonus else 0.0
        values = Q[s]
        if expected:
            # Eq. 8.1: Q(s, a) ← Σ_{s',r} p̂(s', r | s, a) [r + γ max_a' Q(s', a')]
            values[a] = extra + expected_target(Q, model.outcomes[s][a], gamma)
        else:
            _, r, s2 = model.draw(s, a) if stochastic else model.outcomes[s][a][0]
            # Eq. 8.2: Q(S, A) ← Q(S, A) + α [R + γ max_a Q(S', a) − Q(S, A)]
            values[a] += alpha * (r + extra + gamma * max(Q[s2]) - values[a])


class PriorityQueue:
    """Pairs by priority, the largest first. A pair stands in it once, with the largest priority it was given."""

    def __init__(self):
        self.heap: list[tuple[float, int, int]] = []
        self.priority: dict[tuple[int, int], float] = {}

    def __len__(self) -> int:
        return len(self.priority)

    def push(self, priority: float, s: int, a: int) -> None:
        if priority > self.priority.get((s, a), 0.0):
            self.priority[s, a] = priority
            heapq.heappush(self.heap, (-priority, s, a))

    def pop(self) -> tuple[int, int]:
        while True:
            negative, s, a = heapq.heappop(self.heap)
            if self.priority.get((s, a)) == -negative:  # else a larger priority has overtaken this entry
                del self.priority[s, a]
                return s, a


def priority(Q: Table, model: Model, s: int, a: int, gamma: float) -> float:
    # P ← |R + γ max_a Q(S', a) − Q(S, A)|
    return abs(expected_target(Q, model.outcomes[s][a], gamma) - Q[s][a])


def prioritized_sweeping(
    Q: Table, model: Model, queue: PriorityQueue, s: int, a: int, n: int, alpha: float, gamma: float, theta: float
) -> int:
    """Steps (3) and (5) of prioritised sweeping: steps (e) to (g) of its box. Returns the number of updates made."""
    step_size = 1.0 if model.kind == "expectation" else alpha  # Eq. 8.1 assigns, Eq. 8.2 moves by α
    # (e), (f): if P > θ, insert S, A with priority P
    if (p := priority(Q, model, s, a, gamma)) > theta:
        queue.push(p, s, a)
    # (g): n times, while the queue is not empty
    for made in range(n):
        if not queue:
            return made
        s, a = queue.pop()
        # Q(S, A) ← Q(S, A) + α [R + γ max_a Q(S', a) − Q(S, A)]
        Q[s][a] += step_size * (expected_target(Q, model.outcomes[s][a], gamma) - Q[s][a])
        for s_before, a_before in model.predecessors[s]:  # the value of s moved: so may theirs
            if (p := priority(Q, model, s_before, a_before, gamma)) > theta:
                queue.push(p, s_before, a_before)
    return n


# ── What the model believes: measured, and drawn ──────────────────────────────────────────────────────────────────


def open_loop_error(model: Model, sequences: "Transitions") -> float:
    """Start where real sequences [B, T] start, take their actions in the model: the share that ends up elsewhere."""
    terminal, wrong = len(model.counts), 0
    ends = torch.where(sequences.terminated[:, -1], terminal, sequences.next_obs[:, -1]).tolist()
    for s, actions, end in zip(sequences.obs[:, 0].tolist(), sequences.action.tolist(), ends, strict=True):
        for a in actions:
            if s != terminal:
                s = model.most_likely(s, a)[2]
        wrong += s != end
    return wrong / len(ends)


def model_metrics(model: Model, replay: "ReplayBuffer") -> dict[str, float]:
    metrics = {"model/tried_pairs": sum(bool(counts) for row in model.counts for counts in row)}
    for horizon in (1, 5, 20):
        if sequences := replay.sample(32, length=horizon):
            metrics[f"model/open_loop_error_{horizon}"] = open_loop_error(model, sequences)
    return metrics


def grid_of(env: gym.Env) -> Optional[np.ndarray]:
    """The letters of a grid task's cells, one a state: S start, G goal, # wall, H hole or cliff. Else None."""
    task = env.unwrapped
    if hasattr(task, "_cliff"):
        grid = np.where(task._cliff, "H", ".")
        grid.flat[[task.start_state_index, -1]] = "S", "G"
        return grid
    grid = np.asarray(getattr(task, "desc", "")).astype(str)
    return grid if grid.size == env.observation_space.n else None


def action_directions(model: Model, columns: int) -> np.ndarray:
    """Where each action leads on the grid, by the model's own experience: right, left, down, up, or nowhere."""
    directions = np.zeros((len(model.counts[0]), 2))  # (right, down)
    for s in model.states:
        for a in model.actions[s]:
            for p, _, s2 in model.outcomes[s][a]:
                right, down = s2 % columns - s % columns, s2 // columns - s // columns
                if s2 < len(model.counts) and abs(right) + abs(down) == 1:
                    directions[a] += p * right, p * down
    along = np.abs(directions) == np.abs(directions).max(1, keepdims=True)  # a slippery move leans to all sides
    return np.sign(directions) * along


def imagined_path(Q: Table, model: Model, s: int) -> list[int]:
    """Greedy actions, most likely outcomes: until the end, a circle, or a state where no action is better yet."""
    path = []
    while s < len(model.counts) and s not in path and max(Q[s]) > min(Q[s]):
        path.append(s)
        s = model.most_likely(s, greedy(Q[s]))[2]
    return [*path, s]


def draw_values(Q: Table, model: Model, grid: Optional[np.ndarray], start: int, title: str) -> np.ndarray:
    """The picture: colour is V(s) = max_a Q(s, a), arrows the greedy actions, the line the path the model imagines."""
    values = np.array(Q[:-1])
    figure = Figure(figsize=(6, 3.8), dpi=80)
    axes = figure.add_axes((0.1, 0.14, 0.76, 0.76) if grid is None else (0.02, 0.04, 0.86, 0.86), title=title)
    if grid is None:  # no grid to draw: all of Q, a row for each action, states left to right
        shown = axes.imshow(values.T, aspect="auto", interpolation="nearest", cmap="viridis")
        axes.set(xlabel="state", ylabel="action")
    else:
        rows, columns = grid.shape
        unseen, walls = np.ones(grid.size, dtype=bool), np.ma.masked_where(grid != "#", np.ones(grid.shape))
        unseen[model.states] = False
        best = np.ma.masked_where(unseen, values.max(1)).reshape(rows, columns)
        shown = axes.imshow(best, cmap="YlGn", vmin=min(0.0, best.min()), vmax=max(best.max(), 1e-3), aspect="auto")
        axes.imshow(walls, cmap="gray", vmin=0, vmax=4, aspect="auto")
        directions = action_directions(model, columns)
        learned = [s for s in model.states if max(Q[s]) > min(Q[s]) and grid.flat[s] != "#"]
        if learned:
            right, down = directions[[greedy(Q[s]) for s in learned]].T
            x, y = np.array(learned) % columns, np.array(learned) // columns
            axes.quiver(x, y, right, -down, pivot="mid", scale=columns * 1.6, width=0.006, color="0.3")
        path = imagined_path(Q, model, start)
        points = [(s % columns, s // columns) for s in path]
        if path[-1] == len(model.counts):  # it arrives: the end is where the last action points
            points[-1] = points[-2] + directions[greedy(Q[path[-2]])]
        axes.plot(*np.array(points, dtype=float).T, color="tab:red", linewidth=3, alpha=0.6)
        for row, column in np.argwhere(np.isin(grid, ["S", "G", "H"])):
            axes.text(column, row, grid[row, column], ha="center", va="center", fontsize=14, weight="bold")
        axes.set(xticks=[], yticks=[], xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    figure.colorbar(shown, cax=figure.add_axes((0.9, 0.14, 0.02, 0.76)))
    return figure_to_array(figure)


# ── Training ──────────────────────────────────────────────────────────────────────────────────────────────────────


def check_settings(args: Args) -> None:
    """Every wrong setting that can be seen before training starts, as one sentence."""
    check_run_settings(args)
    for name in ("planning_steps", "bonus", "theta"):
        if getattr(args, name) < 0:
            stop(f"--{name.replace('_', '-')} is {getattr(args, name)}: it can't be below 0")
    if not 0 < args.alpha <= 1 or not 0 <= args.gamma <= 1 or not 0 <= args.epsilon <= 1:
        stop("--alpha must lie in (0, 1], --gamma and --epsilon in [0, 1]")
    if not 1 <= args.maze_scale <= 40 or args.replay_size < 1:
        stop("--maze-scale must lie between 1 and 40, --replay-size be at least 1")
    if args.maze_scale > 1 and args.env_id not in MAZES:
        stop(f"--maze-scale is for this file's own mazes ({', '.join(MAZES)}), not for {args.env_id}")
    if args.planner == "prioritized":
        if args.planning_steps == 0:
            stop("--planner prioritized learns by planning alone: --planning-steps must be at least 1")
        if args.model == "sample":
            stop("--planner prioritized needs a priority that is no matter of luck: use --model expectation")
        if args.bonus:
            stop("--bonus grows with every step, so that no priority would stay true: use --planner dyna")


def load_policy(args: Args, env: gym.Env, checkpoint: dict) -> Callable[[], Callable[[Any], int]]:
    """For --evaluate: what makes the deterministic policy of a checkpoint, anew for each episode."""
    hold_still(env)
    return functools.partial(greedy_policy, checkpoint["learned"]["Q"].tolist())


def train(args: Args) -> Path:
    pick_device(args.device)
    print("device: cpu")  # whatever else there is: the tables are Python lists
    seed_everything(args.seed)
    env, eval_env = make_task(args), make_task(args, render=args.capture_video)
    hold_still(eval_env)
    env.action_space.seed(args.seed)
    run_dir, checkpoint = open_run(args)

    terminal, actions = int(env.observation_space.n), int(env.action_space.n)
    Q = [[args.initial_value] * actions for _ in range(terminal)] + [[0.0] * actions]
    model = Model(terminal, actions, args.model, try_untried=args.bonus > 0)
    queue = PriorityQueue()
    replay = ReplayBuffer(args.replay_size, env.observation_space, env.action_space)
    step, updates = 0, 0
    if checkpoint:
        step, updates = checkpoint["step"], checkpoint["updates"]
        Q = checkpoint["learned"]["Q"].tolist()
        vars(model).update(checkpoint["model"])
        for (s, a), p in checkpoint["queue"].items():
            queue.push(p, s, a)
        replay.load_state_dict(checkpoint["replay"])
        set_env_state(env, checkpoint["env"])
        set_random_states(checkpoint["random"])
    log = RunLog(args, run_dir, checkpoint)

    # These three look at the variables of the loop as they are when they are called.
    def save() -> None:
        save_checkpoint(
            run_dir, step=step, updates=updates, learned={"Q": torch.tensor(Q, dtype=torch.float64)}, model=vars(model),
            queue=queue.priority, replay=replay.state_dict(), env=env_state(env), log=log.state_dict(),
        )  # fmt: skip
        log.lap("log")

    def test() -> None:
        set_env_state(eval_env, env_state(env), generators=False)  # a maze that has changed has changed there too
        log.evaluation(step, functools.partial(greedy_policy, Q), eval_env)

    def draw() -> None:
        title = f"{args.env_id}, n = {args.planning_steps}: step {step:,}"
        log.picture(step, draw_values(Q, model, grid_of(env), start, title))

    start, _ = env.reset(seed=None if checkpoint else args.seed)
    s, episode_return, episode_length = int(start), 0.0, 0
    with StopSignal() as stop_signal:
        while step < args.total_timesteps:
            # (1) S ← the current, nonterminal state; A ← ε-greedy(S, Q)
            a = epsilon_greedy(Q[s], args.epsilon)
            log.lap("policy")

            # (2) take A; observe R and S'
            obs, r, terminated, truncated, _ = env.step(a)
            step, r, over = step + 1, float(r), bool(terminated or truncated)
            s2 = terminal if terminated else int(obs)
            if not math.isfinite(r):
                stop(f"{args.env_id} gave the reward {r} at step {step:,}: there is nothing to learn from that")
            replay.add(s, a, r, obs, terminated, truncated)
            log.lap("env")

            # (3) learn: Q(S, A) ← Q(S, A) + α δ
            delta = td_error(Q, s, a, r, s2, args.gamma)
            if args.planner == "dyna":
                Q[s][a] += args.alpha * delta
            log.mean("losses/td_error", abs(delta))
            log.lap("policy")

            # (4) model: Model(S, A) ← R, S', after a look at what it would have said
            surprised = not model.counts[s][a] or model.most_likely(s, a)[2] != s2
            log.mean("model/heldout_error", surprised)
            model.learn(s, a, r, s2, now=step)
            log.lap("model")

            # (5) plan, n times
            if args.planner == "dyna":
                plan(Q, model, args.planning_steps, args.alpha, args.gamma, args.bonus, now=step)
                updates += args.planning_steps
            else:
                updates += prioritized_sweeping(
                    Q, model, queue, s, a, args.planning_steps, args.alpha, args.gamma, args.theta
                )
            log.lap("plan")

            s, episode_return, episode_length = s2, episode_return + r, episode_length + 1
            log.bar.update()
            if log.due("log", args.log_every, step):
                log.scalars(step, {**model_metrics(model, replay), "charts/planning_updates": updates})
                log.flush(step)
            if log.due("eval", args.eval_every, step) and step < args.total_timesteps:
                test()
            if over:
                log.episode(step, episode_return, episode_length)
                if log.due("picture", args.picture_every, step, at_most=20):
                    draw()
            if log.due("checkpoint", args.checkpoint_every, step, wait_for=over):
                save()
            if stop_signal.to_stop(over):
                break
            if over:
                start, _ = env.reset()
                s, episode_return, episode_length = int(start), 0.0, 0
                log.lap("env")
        save()
    if stop_signal.number and step < args.total_timesteps:
        log.stopped(step, stop_signal.number)
    test()
    if args.picture_every:
        draw()
    log.finish(step)
    return run_dir


# ── The tasks ─────────────────────────────────────────────────────────────────────────────────────────────────────

# The mazes of Examples 8.1 to 8.3. A second map is how the maze looks after `change_at` steps of its life.
DYNA = """
.......#G
..#....#.
S.#....#.
..#......
.....#...
.........
"""
WALL = """
........G
.........
.........
{}
.........
...S.....
"""
MAZES = {
    "DynaMaze-v0": {"maps": [DYNA]},
    "BlockingMaze-v0": {"maps": [WALL.format("########."), WALL.format(".########")], "change_at": 1_000},
    "ShortcutMaze-v0": {"maps": [WALL.format(".########"), WALL.format(".#######.")], "change_at": 3_000},
}


class Maze(gym.Env):
    """Walk from S to G through a grid; reward 1 at G. Up, down, left, right; a move into a wall stays where it is."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, maps: list[str], change_at: int = 0, scale: int = 1, render_mode: Optional[str] = None):
        grids = [np.array([list(row) for row in text.split()]) for text in maps]
        self.grids = [np.kron(grid == "#", np.ones((scale, scale))).astype(bool) for grid in grids]  # True: a wall
        self.goal = set(np.flatnonzero(np.kron(grids[0] == "G", np.ones((scale, scale)))).tolist())
        self.start = int(np.flatnonzero(np.kron(grids[0] == "S", np.ones((scale, scale))))[0])
        self.change_at, self.clock, self.ages, self.render_mode = change_at, 0, True, render_mode
        self.observation_space = gym.spaces.Discrete(self.grids[0].size)
        self.action_space = gym.spaces.Discrete(4)
        self.next_states = [self._moves(grid) for grid in self.grids]

    @staticmethod
    def _moves(walls: np.ndarray) -> list[list[int]]:
        """next_states[s][a]"""
        rows, columns = walls.shape
        moves = []
        for row, column in np.ndindex(rows, columns):
            moves.append([])
            for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1)):
                i, j = row + down, column + right
                free = 0 <= i < rows and 0 <= j < columns and not walls[i, j]
                moves[-1].append(i * columns + j if free else row * columns + column)
        return moves

    @property
    def layout(self) -> int:
        return int(self.change_at > 0 and self.clock >= self.change_at)

    @property
    def desc(self) -> np.ndarray:
        letters = np.where(self.grids[self.layout], "#", ".")
        letters.flat[self.start] = "S"
        letters.flat[list(self.goal)] = "G"
        return letters

    def reset(self, *, seed: Optional[int] = None, options: Optional[dict] = None):
        super().reset(seed=seed)
        self.state = self.start
        return self.state, {}

    def step(self, action: int):
        self.state = self.next_states[self.layout][self.state][action]
        self.clock += self.ages  # after the move: the change comes after so many steps
        won = self.state in self.goal
        return self.state, float(won), won, False, {}

    def state_dict(self) -> dict:  # what lasts from one episode to the next
        return {"clock": self.clock}

    def load_state_dict(self, state: dict) -> None:
        self.clock = state["clock"]

    def render(self) -> np.ndarray:
        colours = {".": (240, 240, 240), "#": (70, 70, 70), "S": (200, 220, 255), "G": (120, 200, 120)}
        picture = np.array([[colours[letter] for letter in row] for row in self.desc], dtype=np.uint8)
        picture.reshape(-1, 3)[self.state] = (220, 60, 60)
        return picture.repeat(24, axis=0).repeat(24, axis=1)


def hold_still(env: gym.Env) -> None:
    """Evaluations are of the world as it is now: the steps taken in them do not bring its change nearer."""
    if env.spec.id in MAZES:
        env.unwrapped.ages = False


for _name, _kwargs in MAZES.items():
    if _name not in gym.registry:
        gym.register(_name, entry_point=Maze, kwargs=_kwargs)


def make_task(args: Args, render: bool = False) -> gym.Env:
    """The environment, checked to be one that a table fits."""
    extra = {"scale": args.maze_scale} if args.env_id in MAZES else {}
    env = make_env(args.env_id, render, **extra)
    for name, space in (("observations", env.observation_space), ("actions", env.action_space)):
        if not isinstance(space, gym.spaces.Discrete):
            stop(f"a table needs Discrete {name}, and those of {args.env_id} are {space}")
    if env.observation_space.n * env.action_space.n > 500_000:
        stop(f"{args.env_id} has {env.observation_space.n:,} states: too many for tables in plain Python")
    if first := env.observation_space.start:
        env = gym.wrappers.TransformObservation(env, lambda s: s - first, gym.spaces.Discrete(env.observation_space.n))
    if lowest := env.action_space.start:
        env = gym.wrappers.TransformAction(env, lambda a: a + lowest, gym.spaces.Discrete(env.action_space.n))
    return env


# ── Plumbing: nothing below is particular to the algorithm ────────────────────────────────────────────────────────


def make_env(env_id: str, render: bool = False, **kwargs: Any) -> gym.Env:
    if "" not in sys.path:
        sys.path.append("")  # for module:Env-v0, a module in the folder where the user stands
    if render:
        kwargs["render_mode"] = "rgb_array"
        if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            os.environ.setdefault("MUJOCO_GL", "egl")  # without a screen MuJoCo would else end the process
    try:
        env = gym.make(env_id, disable_env_checker=True, **kwargs)
        if render:  # what can't be drawn shows here, not after an hour of training
            env.reset()
            if not isinstance(env.render(), np.ndarray):
                stop(f"{env_id} draws no rgb_array: leave out --capture-video")
    except (gym.error.DependencyNotInstalled, ModuleNotFoundError) as error:
        stop(f"{env_id} needs a package that is not installed: {error}")
    except Exception as error:  # whatever the environment's own code may raise
        stop(f"{env_id!r} can't be made: {type(error).__name__}: {error}".replace("\n", " "))
    return env


def env_state(env: gym.Env) -> dict:
    """What an environment carries from one episode to the next: its generators, and what it says itself."""
    own = env.unwrapped.state_dict() if hasattr(env.unwrapped, "state_dict") else None
    generators = [x.np_random.bit_generator.state for x in (env.unwrapped, env.action_space)]
    return {"generators": generators, "own": own}


def set_env_state(env: gym.Env, state: dict, generators: bool = True) -> None:
    if generators:
        for x, saved in zip((env.unwrapped, env.action_space), state["generators"], strict=True):
            x.np_random.bit_generator.state = saved
    if state["own"] is not None:
        env.unwrapped.load_state_dict(state["own"])


def arrays_to_tensors(tree: Any) -> Any:
    """A checkpoint is read back as tensors and plain values only, so that no foreign code can hide in it."""
    if isinstance(tree, dict):
        return {key: arrays_to_tensors(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [arrays_to_tensors(value) for value in tree]
    if isinstance(tree, tuple):
        return tuple(arrays_to_tensors(value) for value in tree)
    if isinstance(tree, np.generic):
        return tree.item()
    return torch.from_numpy(tree.copy()) if isinstance(tree, np.ndarray) else tree


class Transitions(NamedTuple):
    """Columns of one length: [B, ...], or [B, T, ...] for sequences."""

    obs: Any
    action: Any
    reward: Any
    next_obs: Any
    terminated: Any
    truncated: Any


class ReplayBuffer:
    """The latest `capacity` transitions, in arrays made once. The end of an episode is in the row where it ended."""

    def __init__(self, capacity: int, observation_space: gym.Space, action_space: gym.Space, device: str = "cpu"):
        def column(shape: tuple, dtype: Any) -> np.ndarray:
            return np.zeros((capacity, *shape), np.float32 if dtype == np.float64 else dtype)

        self.data = Transitions(
            obs=column(observation_space.shape, observation_space.dtype),
            action=column(action_space.shape, action_space.dtype),
            reward=column((), np.float32),
            next_obs=column(observation_space.shape, observation_space.dtype),
            terminated=column((), bool),
            truncated=column((), bool),
        )
        self.capacity, self.size, self.pointer, self.device = capacity, 0, 0, device

    def add(self, obs: Any, action: Any, reward: float, next_obs: Any, terminated: bool, truncated: bool) -> None:
        for column, value in zip(self.data, (obs, action, reward, next_obs, terminated, truncated), strict=True):
            column[self.pointer] = value
        self.pointer = (self.pointer + 1) % self.capacity
        self.size = min(self.size + 1, self.capacity)

    def rows(self, index: np.ndarray) -> Transitions:
        return Transitions(*(torch.from_numpy(column[index]).to(self.device) for column in self.data))

    def sample(self, batch_size: int, length: Optional[int] = None) -> Optional[Transitions]:
        """Rows at random [B, ...]; with `length`, sequences [B, T, ...] that stay inside one episode, or None."""
        if length is None:
            return self.rows(np.random.randint(self.size, size=batch_size))
        oldest_first = (np.arange(self.size) + self.pointer - self.size) % self.capacity
        ends = np.cumsum(self.data.terminated[oldest_first] | self.data.truncated[oldest_first])
        ends_before = np.concatenate([[0], ends])  # ends_before[i]: episode ends in the rows older than i
        first = np.arange(max(self.size - length + 1, 0))
        first = first[ends_before[first + length - 1] == ends_before[first]]  # none but the last row may end one
        if len(first) == 0:
            return None
        return self.rows(oldest_first[np.random.choice(first, batch_size)[:, None] + np.arange(length)])

    def state_dict(self) -> dict:
        columns = [torch.from_numpy(column[: self.size]) for column in self.data]
        return {"columns": columns, "size": self.size, "pointer": self.pointer}

    def load_state_dict(self, state: dict) -> None:
        self.size, self.pointer = state["size"], state["pointer"]
        for column, saved in zip(self.data, state["columns"], strict=True):
            column[: self.size] = saved.numpy()
        if self.size and not self.data.terminated[self.pointer - 1]:  # a run cut inside an episode starts a new one:
            self.data.truncated[self.pointer - 1] = True  # the seam is an end, and not a terminal one


def evaluate(
    new_policy: Callable[[], Callable[[Any], Any]],
    env: gym.Env,
    episodes: int,
    seed: int,
    max_steps: int,
    frames: Optional[list] = None,
) -> tuple[list[float], list[int]]:
    """Returns and lengths of episodes, cut at `max_steps`, each with a policy made anew (some remember). The same seed
    gives the same episodes, and training's dice stay as they were. `frames` collects the first episode's pictures."""
    before = random_states()
    seed_everything(seed + 10_000)
    returns, lengths = [], []
    for episode in range(episodes):
        policy = new_policy()
        obs, _ = env.reset(seed=seed + 10_000 + episode)
        episode_return, length, over = 0.0, 0, False
        while not over and length < max_steps:
            if frames is not None and episode == 0:
                frames.append(thumbnail(env.render()))
            obs, reward, terminated, truncated, _ = env.step(policy(obs))
            episode_return, length = episode_return + float(reward), length + 1
            over = terminated or truncated
        if frames is not None and episode == 0:
            frames.append(thumbnail(env.render()))
        returns.append(episode_return)
        lengths.append(length)
    set_random_states(before)
    return returns, lengths


def play(args: Any) -> tuple[list[float], list[int]]:
    """--evaluate: load a checkpoint, play, print the scores."""
    seed_everything(args.seed)
    run_dir, checkpoint = Path(args.evaluate), load_checkpoint(Path(args.evaluate))
    env = make_task(args, render=args.capture_video)
    set_env_state(env, checkpoint["env"], generators=False)
    frames = [] if args.capture_video else None
    new_policy = load_policy(args, env, checkpoint)
    returns, lengths = evaluate(new_policy, env, args.episodes, args.seed, args.eval_max_steps, frames)
    print(f"{ALGORITHM} on {args.env_id}, trained for {checkpoint['step']:,} steps: {score_line(returns, lengths)}")
    if frames:
        save_gif(frames, run_dir / "videos" / "evaluation.gif")
        print(f"video:   {run_dir / 'videos' / 'evaluation.gif'}")
    return returns, lengths


def score_line(returns: list[float], lengths: list[int]) -> str:
    return (
        f"return {np.mean(returns):.2f} (min {min(returns):.2f}, max {max(returns):.2f}), "
        f"length {np.mean(lengths):.1f}, over {len(returns)} episodes of the deterministic policy"
    )


def figure_to_array(figure: Figure) -> np.ndarray:
    """[H, W, 3] uint8"""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def thumbnail(frame: np.ndarray, size: int = 320) -> np.ndarray:
    image = Image.fromarray(frame)
    image.thumbnail((size, size))
    return np.asarray(image)


def save_gif(frames: list[np.ndarray], path: Path, fps: float = 10, at_most: int = 300) -> None:
    # Pillow, for torch's add_video writes nothing, silently, where moviepy 2 is installed.
    every = -(-len(frames) // at_most)  # of a long film every second, third, ... frame
    images = [Image.fromarray(frame) for frame in frames[::every]]
    path.parent.mkdir(exist_ok=True)
    images[0].save(path, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)


class RunLog:
    """One run's TensorBoard events, pictures and progress bar."""

    def __init__(self, args: Any, run_dir: Path, checkpoint: Optional[dict]):
        self.args, self.run_dir = args, run_dir
        step = checkpoint["step"] if checkpoint else 0
        # TensorBoard takes a run's files in the order of their names, and those begin with the second.
        while any(run_dir.glob(f"events.out.tfevents.{int(time.time())}.*")):
            time.sleep(0.05)
        # A run killed after its last checkpoint takes those steps again: purge_step hides the first taking.
        self.writer = SummaryWriter(str(run_dir), purge_step=step + 1 if checkpoint else None)
        self.sums, self.numbers, self.last = {}, {}, {}
        if checkpoint:
            vars(self).update(checkpoint["log"])
            for path in [*run_dir.glob("frames/step_*"), *run_dir.glob("videos/step_*")]:
                if int(path.stem.removeprefix("step_")) > step:
                    path.unlink()
        else:
            rows = "".join(f"\n|{name}|{value}|" for name, value in asdict(args).items())
            self.writer.add_text("hyperparameters", f"|setting|value|\n|-|-|{rows}")
        hidden = None if args.progress else True  # None: hidden where the output is no terminal
        self.bar = tqdm(total=args.total_timesteps, initial=step, disable=hidden, unit=" steps", dynamic_ncols=True)
        self.start_clock(step)

    def state_dict(self) -> dict:
        return {"sums": {k: float(v) for k, v in self.sums.items()}, "numbers": self.numbers, "last": self.last}

    def start_clock(self, step: int) -> None:
        """Speed and shares of the time count from here: call it again at the end of a warm-up."""
        self.first_step, self.spent = step, defaultdict(float)
        self.began = self.last_lap = time.perf_counter()

    def lap(self, name: str) -> None:
        """The time since the last lap went into `name`."""
        now = time.perf_counter()
        self.spent[name] += now - self.last_lap
        self.last_lap = now

    def due(self, what: str, every: int, step: int, at_most: float = math.inf, wait_for: bool = True) -> bool:
        """Once in every `every` steps, never where that is 0; while `wait_for` is false later, by as much at most."""
        times, last = self.last.get(what, (0, 0))
        if every == 0 or step // every == last // every or times >= at_most:
            return False
        if not wait_for and step - last < 2 * every:
            return False
        self.last[what] = (times + 1, step)
        return True

    def mean(self, tag: str, value: Any) -> None:
        """Collect until the flush writes the mean; a tensor stays on its device until then."""
        value = value.detach() if isinstance(value, torch.Tensor) else value
        self.sums[tag] = self.sums.get(tag, 0.0) + value
        self.numbers[tag] = self.numbers.get(tag, 0) + 1

    def flush(self, step: int) -> None:
        seconds = time.perf_counter() - self.began
        shares = {f"time/{name}": spent / seconds for name, spent in self.spent.items()}
        means = {tag: float(total) / self.numbers[tag] for tag, total in self.sums.items()}
        self.sums, self.numbers = {}, {}
        self.scalars(step, {**means, **shares, "charts/SPS": (step - self.first_step) / seconds})

    def scalars(self, step: int, values: dict) -> None:
        for tag, value in values.items():
            self.writer.add_scalar(tag, float(value), step)
        self.lap("log")

    def episode(self, step: int, episode_return: float, length: int) -> None:
        self.scalars(step, {"charts/episodic_return": episode_return, "charts/episodic_length": length})
        self.bar.set_postfix_str(f"return {episode_return:.4g}", refresh=False)

    def evaluation(self, step: int, new_policy: Callable[[], Callable[[Any], Any]], env: gym.Env) -> None:
        args, frames = self.args, [] if self.args.capture_video else None
        self.scores = evaluate(new_policy, env, args.eval_episodes, args.seed, args.eval_max_steps, frames)
        returns, lengths = self.scores
        self.scalars(step, {"eval/episodic_return": np.mean(returns), "eval/episodic_length": np.mean(lengths)})
        if frames:
            save_gif(frames, self.run_dir / "videos" / f"step_{step:08d}.gif")
            self.lap("log")

    def picture(self, step: int, image: np.ndarray) -> None:
        """To TensorBoard, to the frames of picture.gif, and as the latest picture.png."""
        self.writer.add_image("model/picture", image, step, dataformats="HWC")
        for path in (self.run_dir / "frames" / f"step_{step:08d}.png", self.run_dir / "picture.png"):
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(image).save(path)
        self.lap("log")

    def finish(self, step: int) -> None:
        if self.sums:
            self.flush(step)
        self.bar.close()
        self.writer.close()
        print(f"{ALGORITHM} on {self.args.env_id}, {step:,} steps: {score_line(*self.scores)}")
        if frames := sorted((self.run_dir / "frames").glob("*.png")):
            save_gif([np.asarray(Image.open(frame)) for frame in frames], self.run_dir / "picture.gif", fps=4)
            print(f"picture: {self.run_dir / 'picture.png'}, and picture.gif beside it")
        if self.args.capture_video:
            print(f"videos:  {self.run_dir / 'videos'}")
        print(f"curves:  tensorboard --logdir {self.run_dir}")

    def stopped(self, step: int, number: int) -> None:
        self.bar.close()
        self.writer.close()
        print(f"stopped at step {step:,}; to go on: python {sys.argv[0]} --resume {shlex.quote(str(self.run_dir))}")
        raise SystemExit(128 + number)


class StopSignal:
    """Ctrl-C and SIGTERM end the run at the end of the episode, so that it can go on to the same bit; an episode that
    outlasts 30 or 5 seconds is cut. A second signal ends the program at once: the last checkpoint stays whole."""

    PATIENCE = {signal.SIGINT: 30.0, signal.SIGTERM: 5.0}

    def __init__(self):
        self.number, self.deadline, self.handlers = 0, math.inf, {}

    def __enter__(self) -> "StopSignal":
        for number in self.PATIENCE:
            self.handlers[number] = signal.signal(number, self.on_signal)
        return self

    def on_signal(self, number: int, frame: Any) -> None:
        self.number, self.deadline = number, time.monotonic() + self.PATIENCE[number]
        self.__exit__()
        os.write(2, b"\nstopping at the end of this episode; a second signal stops at once\n")  # print may be under way

    def to_stop(self, episode_over: bool) -> bool:
        return self.number != 0 and (episode_over or time.monotonic() > self.deadline)

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def open_run(args: Any) -> tuple[Path, Optional[dict]]:
    """The run folder, and with --resume its checkpoint. Nothing that is there already is overwritten."""
    checkpoint = load_checkpoint(Path(args.resume)) if args.resume is not None else None
    if checkpoint and checkpoint["step"] >= args.total_timesteps:
        stop(f"{args.resume} has taken {checkpoint['step']:,} steps already: raise --total-timesteps to go on")
    env_name = args.env_id.replace("/", "-").replace(":", "-")
    name = f"{env_name}__{ALGORITHM}__{args.seed}__{int(time.time())}"
    run_dir = Path(args.resume or args.run_dir or Path("runs") / name)
    try:
        while args.resume is None:
            try:
                run_dir.mkdir(parents=True)
                break
            except FileExistsError:
                if args.run_dir is None:  # another run of the same second
                    run_dir = run_dir.with_name(run_dir.name + "x")
                elif run_dir.is_dir() and not any(run_dir.iterdir()):
                    break
                else:
                    stop(f"{run_dir} is there and not empty: name another --run-dir, or go on with --resume {run_dir}")
        settings = json.dumps({"algorithm": ALGORITHM, **asdict(args)}, indent=2)
        (run_dir / "args.tmp").write_text(settings + "\n")
        os.replace(run_dir / "args.tmp", run_dir / "args.json")
    except OSError as error:
        stop(f"{run_dir} can't be written: {error.strerror}")
    return run_dir, checkpoint


def save_checkpoint(run_dir: Path, **state: Any) -> None:
    """Written beside the old one, then renamed: a kill at any moment leaves a whole checkpoint."""
    path = run_dir / "checkpoint.pt"
    with open(path.with_suffix(".tmp"), "wb") as file:
        torch.save(arrays_to_tensors({"algorithm": ALGORITHM, "random": random_states(), **state}), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path.with_suffix(".tmp"), path)


def load_checkpoint(run_dir: Path) -> dict:
    path = run_dir / "checkpoint.pt"
    if not path.is_file():
        stop(f"{run_dir} holds no checkpoint.pt: it is no run folder, or its run ended before the first checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # tensors and numbers, no foreign code
    except Exception:  # damage shows in many ways
        stop(f"{path} is damaged or cut short: it can't be read")
    if not isinstance(checkpoint, dict) or checkpoint.get("algorithm") != ALGORITHM:
        stop(f"{path} is no checkpoint of {ALGORITHM}")
    return checkpoint


def random_states() -> dict:
    """Of all generators a script may use: none keeps one of its own."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_states(states: dict) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    for index, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, index)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # CUDA too


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] in ("cpu", "cuda"):
        try:
            return torch.zeros(1, device=name).device
        except (RuntimeError, AssertionError):
            pass
    stop(f"--device {name} is not to be had here: use auto, cpu or cuda[:index]")


def stop(message: str) -> None:
    """A user's mistake: one sentence, exit code 2, no traceback."""
    print(f"{ALGORITHM}: {message}", file=sys.stderr)
    raise SystemExit(2)


def check_run_settings(args: Any) -> None:
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            stop(f"--{name.replace('_', '-')} is {value}: it must be a finite number")
    for least, names in (
        (1, ("total_timesteps", "eval_episodes", "eval_max_steps", "episodes", "log_every")),
        (0, ("eval_every", "checkpoint_every", "picture_every", "seed")),
    ):
        for name in names:
            if getattr(args, name) < least:
                stop(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least {least}")
    if args.seed >= 2**31:
        stop(f"--seed is {args.seed}: it must be below 2^31")


def read_settings(run_dir: Path) -> Any:
    """The settings a run was started with."""
    try:
        settings = dict(json.loads((run_dir / "args.json").read_text()))
    except (OSError, ValueError, TypeError):
        stop(f"{run_dir} is no run folder: it holds no args.json that can be read")
    if settings.pop("algorithm", None) != ALGORITHM:
        stop(f"{run_dir} is a run of another algorithm, not of {ALGORITHM}")
    if unknown := set(settings) ^ {field.name for field in fields(Args)}:
        stop(f"{run_dir} was written by another version of this file: {', '.join(sorted(unknown))} differ")
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    return Args(**{**settings, "resume": None, "evaluate": None})


def command_line(argv: Optional[list[str]], presets: dict) -> Any:
    """The preset is a subcommand, and the first one the default; flags after it override its settings."""
    if argv and argv[0].startswith("--no-") and not set(argv) & set(presets):
        argv = [next(iter(presets)), *argv]  # tyro finds the default preset behind any other flag
    descriptions = {name: description for name, (description, _) in presets.items()}
    defaults = {name: settings for name, (_, settings) in presets.items()}
    return tyro.cli(
        tyro.extras.subcommand_type_from_defaults(defaults, descriptions, prefix_names=False, sort_subcommands=False),
        default=next(iter(defaults.values())),
        args=argv,
        description=(__doc__ or "").split("\n\n")[0],
        config=(tyro.conf.CascadeSubcommandArgs,),
    )


MAY_CHANGE = {  # when a run goes on: nothing that the learning depends on
    "resume", "evaluate", "episodes", "total_timesteps", "device", "compile", "progress", "capture_video",
    "log_every", "eval_every", "eval_episodes", "eval_max_steps", "picture_every", "checkpoint_every",
}  # fmt: skip


def parse_args(argv: Optional[list[str]] = None) -> Any:
    words = sys.argv[1:] if argv is None else argv
    args = command_line(words, PRESETS)
    if args.resume is None and args.evaluate is None:
        return args
    if args.resume is not None and args.evaluate is not None:
        stop("--resume trains and --evaluate plays: give one of them")
    folder = args.evaluate if args.resume is None else args.resume
    if preset := [word for word in words if word in PRESETS and word != folder]:
        stop(f"the run's own settings are used: leave out the preset {preset[0]}")
    # Go on with the run's own settings: they become the defaults, and what the user typed stands above them.
    saved = read_settings(Path(folder))
    args = command_line(words, {name: (text, saved) for name, (text, _) in PRESETS.items()})
    for name, value in asdict(saved).items():
        free = name in MAY_CHANGE or (name == "seed" and args.evaluate)  # a new seed to evaluate: other episodes
        if getattr(args, name) != value and not free:
            stop(f"{folder} has its own settings: --{name.replace('_', '-')} is {value} there and can't change now")
    return args


def main(argv: Optional[list[str]] = None) -> None:
    args = parse_args(argv)
    check_settings(args)
    if args.evaluate is not None:
        play(args)
    else:
        train(args)


if __name__ == "__main__":
    main()
