# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "numpy>=2.0,<3", "gymnasium>=1.3,<2", "tyro>=1.0.16,<2", "tensorboard>=2.18,<3", "tqdm>=4.66,<5",
#     "pillow>=11,<14", "matplotlib>=3.9,<4", "pygame-ce>=2.5,<3",
# ]
# ///
"""Dyna-Q: learn from each real step once, and from remembered steps n more times.

Q-learning updates a table Q(s, a) after each real step. Dyna-Q keeps a second table, the model, which remembers what
each action did in each state, and replays n remembered actions through the same update between two real steps. Only
real steps are expensive, and values spread back from the goal within one episode instead of one cell per episode.

Book: R. S. Sutton and A. G. Barto, "Reinforcement Learning: An Introduction", 2nd edition, 2018, chapter 8; letters,
equations, examples and figures below are the book's. Paper: R. S. Sutton, "Integrated architectures for learning,
planning, and reacting based on approximating dynamic programming", ICML 1990.

The algorithm (box "Tabular Dyna-Q", section 8.2):
    (a) S ← current (nonterminal) state
    (b) A ← ε-greedy(S, Q), ties broken at random
    (c) take action A; observe reward R and state S'
    (d) Q(S, A) ← Q(S, A) + α [R + γ max_a Q(S', a) − Q(S, A)]
    (e) Model(S, A) ← R, S'
    (f) n times: S, A ← a state seen before and an action taken there, both at random; R, S' ← Model(S, A); as in (d)
Dyna-Q+ (section 8.3) adds κ √τ to the rewards of (f). Prioritised sweeping (section 8.4) replaces (d) and (f).

Symbols: n → planning_steps, Q₀ → initial_value, κ → bonus, τ(s, a) → now − tried_at, θ → theta, P → priority,
    N(s, a, s') → counts, p̂(s', r | s, a) → outcomes.

Usage (length: steps of the greedy path, mean and 95 % interval over seeds; docs/dyna_q.md has the figures):
    python algos/dyna_q.py                                    # 0.4 minutes, length 14.6 [14.0, 15.2]
    python algos/dyna_q.py maze --planner prioritized --planning-steps 5 --alpha 0.5
    python algos/dyna_q.py shortcut --bonus 0                 # Dyna-Q does not find the shortcut, Dyna-Q+ does
    python algos/dyna_q.py --env-id Taxi-v4 --alpha 0.5       # any environment with Discrete states and actions
    python algos/dyna_q.py --evaluate runs/NAME --episodes 10 --capture-video

Differences from the book: stochastic tasks are planned with counts of outcomes, by samples (Eq. 8.2) or by their
expectation (Eq. 8.1); a terminal state is one more row of Q that stays 0; time limits bootstrap.
"""

import argparse
import io
import math
import os
import shlex
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar, Literal, Optional

import gymnasium as gym
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

ALGORITHM = "dyna_q"


@dataclass
class Args:  # tyro turns each field into a flag and each comment into its help
    env_id: str = "DynaMaze-v0"  # any environment with Discrete observations and actions
    total_timesteps: int = 3_000  # real environment steps
    planner: Literal["dyna", "prioritized"] = "dyna"  # planning updates at random, or by prioritised sweeping
    planning_steps: int = 50  # n: planning updates after each real step; 0 is Q-learning
    model: Literal["deterministic", "sample", "expectation"] = "deterministic"  # the last outcome; or counts of all
    bonus: float = 0.0  # κ of Dyna-Q+: planning adds κ √τ to rewards and includes untried actions
    theta: float = 1e-4  # θ: prioritised sweeping queues larger changes only
    alpha: float = 0.1  # α: step size of learning and planning
    gamma: float = 0.95  # γ: discount
    epsilon: float = 0.1  # ε: probability of a random action
    initial_value: float = 0.0  # Q₀: value of each action at the start; a large one makes the agent explore
    seed: int = 1  # on one CPU, two runs with the same seed are identical
    device: ClassVar[str] = "cpu"  # not a setting: the tables are Python lists
    eval_every: int = 500  # steps between evaluations (at the end of an episode, like all that follow)
    picture_every: int = 500  # steps between pictures of the values and the predicted path
    checkpoint_every: int = 10_000  # steps between checkpoints; one is also written about every minute
    episodes: int = 1  # episodes per evaluation
    capture_video: bool = False  # save the first episode of each evaluation as a GIF
    run_dir: Optional[str] = None  # output folder; runs/<env>__<algorithm>__<seed>__<time> by default
    resume: Optional[str] = None  # continue the run in this folder with its own settings
    evaluate: Optional[str] = None  # do not train: play with the agent of this run folder

    def __post_init__(self):
        """tyro reports a ValueError raised here as one sentence and exits with code 2."""
        may_be_zero = "planning_steps", "bonus", "theta", "epsilon", "initial_value", "seed"
        for name, value in vars(self).items():
            if type(value) in (int, float) and not (0 < value < math.inf or (value == 0 and name in may_be_zero)):
                raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be a positive number")
            if name in ("alpha", "gamma", "epsilon") and value > 1:
                raise ValueError(f"--{name} is {value}: it must be at most 1")
        if self.planner == "prioritized" and (self.model == "sample" or self.bonus or not self.planning_steps):
            raise ValueError("--planner prioritized needs --planning-steps, and neither --model sample nor --bonus")


PRESETS = {
    "maze": ("Example 8.1, the Dyna maze: the more planning, the fewer episodes", Args()),
    "blocking": ("Example 8.2: the short path closes at step 1,000", Args("BlockingMaze-v0", bonus=1e-3, alpha=1.0)),
    "shortcut": ("Example 8.3: a shortcut opens at step 3,000", Args("ShortcutMaze-v0", 6_000, bonus=1e-3, alpha=1.0)),
    "frozenlake": ("FrozenLake 8×8, slippery: planning with expected updates", Args(
        "FrozenLake8x8-v1", 60_000, model="expectation", alpha=0.02, gamma=0.99, initial_value=1.0,
        eval_every=4_000, picture_every=10_000, episodes=100)),
}  # fmt: skip


# ── The algorithm ─────────────────────────────────────────────────────────────────────────────────────────────────

Table = list[list[float]]  # Q[s][a]; plain lists are the fastest for single updates
Outcome = tuple[float, float, int]  # what may follow (s, a): probability, mean reward, next state


class Agent:
    """Q and its greedy policy."""

    player = "greedy policy"

    def __init__(self, env: gym.Env, args: Args):
        states, actions = int(env.observation_space.n), int(env.action_space.n)
        self.Q: Table = [[args.initial_value] * actions for _ in range(states)]
        self.Q.append([0.0] * actions)  # the terminal state

    def reset(self) -> None:
        """The policy has no memory."""

    def __call__(self, obs: int) -> int:
        values = self.Q[int(obs)]
        return values.index(max(values))

    def state_dict(self) -> dict:
        return {"Q": torch.tensor(self.Q, dtype=torch.float64)}

    def load_state_dict(self, state: dict) -> None:
        self.Q = state["Q"].tolist()


class Model:
    """Model(s, a): the last outcome of each action in each state, or the frequencies of all outcomes."""

    def __init__(self, states: int, actions: int, args: Args):
        self.deterministic, self.plan_untried = args.model == "deterministic", args.bonus > 0
        self.counts = [[{} for _ in range(actions)] for _ in range(states)]  # s' → N(s, a, s'), mean reward
        # Section 8.3: an untried action is believed to lead back to its state with reward 0
        self.outcomes = [[[(1.0, 0.0, s)]] * actions for s in range(states)]
        self.tried_at = [[0] * actions for _ in range(states)]  # the step at which (s, a) was last tried
        self.states: list[int] = []  # the states seen before
        self.actions: list[list[int]] = [[] for _ in range(states)]  # the actions that planning may choose in s
        self.predecessors = [{} for _ in range(states + 1)]  # s' → the pairs predicted to lead there, in order
        self.queue: dict[tuple[int, int], float] = {}  # prioritised sweeping: (s, a) → P

    def learn(self, s: int, a: int, r: float, s2: int, now: int) -> None:
        if not self.actions[s]:
            self.states.append(s)
            self.actions[s] = list(range(len(self.counts[s]))) if self.plan_untried else []
        if a not in self.actions[s]:
            self.actions[s].append(a)
        self.tried_at[s][a], counts = now, self.counts[s][a]
        if self.deterministic:  # the last outcome replaces the one before: the world may have changed
            for before in counts:
                del self.predecessors[before][s, a]
            counts.clear()
        number, mean = counts.get(s2, (0, r))
        counts[s2] = number + 1, mean + (r - mean) / (number + 1)
        # p̂(s' | s, a) = N(s, a, s') / Σ_x N(s, a, x)
        total = sum(number for number, _ in counts.values())
        self.outcomes[s][a] = [(number / total, mean, x) for x, (number, mean) in counts.items()]
        self.predecessors[s2][s, a] = None

    def sample(self, s: int, a: int, u: float) -> Outcome:
        """An outcome with its probability, from a uniform random number."""
        for outcome in self.outcomes[s][a]:
            u -= outcome[0]
            if u < 0:
                break
        return outcome

    def most_likely(self, s: int, a: int) -> int:
        return max(self.outcomes[s][a])[2]

    def state_dict(self) -> dict:
        return vars(self)

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


def expected_target(Q: Table, outcomes: list[Outcome], gamma: float) -> float:
    # Eq. 8.1: Σ_{s',r} p̂(s', r | s, a) [r + γ max_a' Q(s', a')]
    target = 0.0
    for p, r, s2 in outcomes:
        target += p * (r + gamma * max(Q[s2]))
    return target


def epsilon_greedy(values: list[float], epsilon: float) -> int:
    explore, choice = torch.rand(2).tolist()
    best = max(values)
    actions = [a for a, value in enumerate(values) if value == best or explore < epsilon]
    return actions[int(choice * len(actions))]


def plan(Q: Table, model: Model, args: Args, now: int) -> int:
    """(f): n updates, each on the values that the last one left: a batch of n would be another algorithm."""
    states, actions, outcomes, number = model.states, model.actions, model.outcomes, len(model.states)
    expected, sampled = args.model == "expectation", args.model == "sample"
    step_size, gamma, bonus = 1.0 if expected else args.alpha, args.gamma, args.bonus
    # One call to torch for all random numbers. They are so large that their remainders are uniform.
    integers = iter(torch.randint(2**30, (2 * args.planning_steps,), dtype=torch.int32).tolist())
    for i, j in zip(integers, integers, strict=True):
        s = states[i % number]
        choices = actions[s]
        a = choices[j % len(choices)]
        if expected:
            target = expected_target(Q, outcomes[s][a], gamma)
        else:
            if sampled:
                _, r, s2 = model.sample(s, a, j / 2**30)  # the remainder left this independent of the action
            else:
                ((_, r, s2),) = outcomes[s][a]
            target = r + gamma * max(Q[s2])
        if bonus:
            # Section 8.3: R + κ √τ
            target += bonus * math.sqrt(now - model.tried_at[s][a])
        # Eq. 8.2: Q(S, A) ← Q(S, A) + α [R + γ max_a Q(S', a) − Q(S, A)]; Eq. 8.1 assigns its target
        values = Q[s]
        values[a] += step_size * (target - values[a])
    return args.planning_steps


def prioritized_sweeping(Q: Table, model: Model, s: int, a: int, args: Args) -> int:
    """Steps (e) to (g) of the box in section 8.4. Returns the number of updates."""

    def error(s: int, a: int) -> float:
        # R + γ max_a Q(S', a) − Q(S, A)
        return expected_target(Q, model.outcomes[s][a], args.gamma) - Q[s][a]

    def insert(s: int, a: int) -> None:
        # P ← |R + γ max_a Q(S', a) − Q(S, A)|; if P > θ, insert S, A into the queue with priority P
        if (priority := abs(error(s, a))) > args.theta:
            model.queue[s, a] = max(priority, model.queue.get((s, a), 0.0))

    insert(s, a)
    step_size = 1.0 if args.model == "expectation" else args.alpha
    for updates in range(args.planning_steps):
        if not model.queue:
            return updates
        s, a = max(model.queue, key=model.queue.get)
        del model.queue[s, a]
        # Q(S, A) ← Q(S, A) + α [R + γ max_a Q(S', a) − Q(S, A)]; Eq. 8.1 has no step size
        Q[s][a] += step_size * error(s, a)
        for before in model.predecessors[s]:
            insert(*before)
    return args.planning_steps


# ── What the model believes ───────────────────────────────────────────────────────────────────────────────────────


def predicted_path(agent: Agent, model: Model, s: int) -> list[int]:
    """Greedy actions and the most likely outcomes, up to a terminal state (the last row of Q) or a cycle."""
    path = []
    while s < len(model.counts) and s not in path:
        path.append(s)
        s = model.most_likely(s, agent(s))
    return [*path, s]


def draw_values(agent: Agent, model: Model, env: gym.Env, start: int, title: str) -> Figure:
    """Colour: max_a Q(s, a). Arrows: where the model expects the greedy action to lead. Red: the predicted path."""
    Q, grid = np.array(agent.Q[:-1]), np.array(getattr(env.unwrapped, "desc", ""), dtype=str)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    if grid.size != len(Q):  # not a task on a grid: a column for each state, a row for each action
        shown = axes.imshow(Q.T, aspect="auto", interpolation="nearest")
        axes.set(xlabel="state", ylabel="action")
    else:
        columns, values, arrows = grid.shape[1], np.full(len(Q), np.nan), np.zeros((len(Q), 2))
        values[model.states] = Q[model.states].max(1)
        for s in model.states:
            for p, _, s2 in model.outcomes[s][agent(s)]:
                if s2 < len(Q) and np.ptp(Q[s]) > 0:  # no arrow where all actions are equal or the episode ends
                    arrows[s] += p * (s2 % columns - s % columns), p * (s2 // columns - s // columns)
        shown = axes.imshow(values.reshape(grid.shape), cmap="YlGn")
        y, x = np.indices(grid.shape)
        axes.quiver(x, y, *arrows.T, angles="xy", scale_units="xy", scale=2, pivot="mid", color="0.4", width=0.005)
        path = np.array([s for s in predicted_path(agent, model, start) if s < len(Q)])
        axes.plot(path % columns, path // columns, color="tab:red", linewidth=4, alpha=0.5)
        for (row, column), letter in np.ndenumerate(grid):
            if letter in "SGH#":
                axes.text(column, row, letter, ha="center", va="center", fontsize=14, weight="bold")
        axes.set(xticks=[], yticks=[], facecolor="0.85")
    axes.set_title(title)
    figure.colorbar(shown)
    return figure


# ── Training ──────────────────────────────────────────────────────────────────────────────────────────────────────


def train(args: Args) -> None:
    torch.manual_seed(args.seed)
    env, test_env = make_env(args), make_env(args)
    terminal, actions = int(env.observation_space.n), int(env.action_space.n)
    agent, model = Agent(env, args), Model(terminal, actions, args)
    run = Run(args, agent=agent, model=model)

    while run.unfinished():
        Q, errors, surprises, updates = agent.Q, 0.0, 0, 0
        # (a) S ← the current, nonterminal state
        start, info = env.reset(seed=run.begin_episode(), options={"step": run.step})
        s, over = int(start), False
        while not over and run.step < args.total_timesteps:
            # (b) A ← ε-greedy(S, Q)
            a = epsilon_greedy(Q[s], args.epsilon)
            # (c) take action A; observe R and S'
            obs, r, terminated, truncated, info = env.step(a)
            s2, r, over = terminal if terminated else int(obs), float(r), terminated or truncated
            if not math.isfinite(r):
                raise UserError("the environment returned NaN or infinity as a reward")
            run.count_steps()
            # (d) Q(S, A) ← Q(S, A) + α [R + γ max_a Q(S', a) − Q(S, A)]
            error = r + args.gamma * max(Q[s2]) - Q[s][a]
            if args.planner == "dyna":
                Q[s][a] += args.alpha * error
            # (e) Model(S, A) ← R, S'
            surprises += model.most_likely(s, a) != s2
            model.learn(s, a, r, s2, run.step)
            # (f) plan, n times
            if args.planner == "dyna":
                updates += plan(Q, model, args, run.step)
            else:
                updates += prioritized_sweeping(Q, model, s, a, args)
            s, errors = s2, errors + abs(error)
        length = run.step - run.episode_start
        run.log("losses/td_error", errors / length)
        run.log("model/heldout_error", surprises / length)
        run.log("model/tried_pairs", sum(bool(counts) for row in model.counts for counts in row))
        run.log("charts/planning_updates", updates / length)
        run.end_episode(info)
        if run.due(args.picture_every):
            run.picture(draw_values(agent, model, env, int(start), f"{args.env_id}, step {run.step:,}"))
        if run.due(args.eval_every):
            test_env.reset(options={"step": run.step})  # a maze that changes is evaluated as it is now
            run.evaluate(agent, test_env)
            run.log("eval/episodic_length", np.mean([*test_env.length_queue][-args.episodes :]))
    run.close()


# ── The task: mazes of Examples 8.1 to 8.3 ────────────────────────────────────────────────────────────────────────


def make_task(args: Args, **kwargs) -> gym.Env:
    env = gym.make(args.env_id, **kwargs)
    for name, space in (("observations", env.observation_space), ("actions", env.action_space)):
        if not isinstance(space, gym.spaces.Discrete) or space.start != 0:
            raise UserError(f"the {name} of {env.spec.id} are {space}, and numbers from 0 on are needed: Discrete(n)")
    return env


class Maze(gym.Env):
    """Walk from S to G, which pays 1; walls (#) and the edge stop a move. The second map holds from step `change_at` of
    the run on. reset(options={"step": ...}) sets this step for later episodes too; it is `change_at` by default."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    action_space = gym.spaces.Discrete(4)  # up, down, left, right

    def __init__(self, maps: tuple[str, ...], change_at: int = 0, render_mode: Optional[str] = None):
        self.maps = [np.array([list(row) for row in text.split()]) for text in maps]
        self.change_at = self.first_step = self.clock = change_at
        self.render_mode = render_mode
        self.observation_space = gym.spaces.Discrete(self.maps[0].size)

    @property
    def desc(self) -> np.ndarray:
        return self.maps[-1 if self.clock >= self.change_at else 0]

    def reset(self, *, seed: Optional[int] = None, options: Optional[dict] = None):
        super().reset(seed=seed)
        self.first_step = (options or {}).get("step", self.first_step)
        self.clock = self.first_step
        self.s = int(np.flatnonzero(self.desc == "S")[0])
        return self.s, {}

    def step(self, action: int):
        (rows, columns), (down, right) = self.desc.shape, ((-1, 0), (1, 0), (0, -1), (0, 1))[action]
        row, column = self.s // columns + down, self.s % columns + right
        if 0 <= row < rows and 0 <= column < columns and self.desc[row, column] != "#":
            self.s = row * columns + column
        won = bool(self.desc.flat[self.s] == "G")
        self.clock += 1
        return self.s, float(won), won, False, {}

    def render(self) -> np.ndarray:
        colors = {".": (240, 240, 240), "#": (70, 70, 70), "S": (200, 220, 255), "G": (120, 200, 120)}
        image = np.array([[colors[letter] for letter in row] for row in self.desc], np.uint8)
        image.reshape(-1, 3)[self.s] = 220, 60, 60
        return image.repeat(48, 0).repeat(48, 1)


OPEN_RIGHT, OPEN_LEFT, OPEN_BOTH = (
    f"........G ......... ......... {wall} ......... ...S....." for wall in ("########.", ".########", ".#######.")
)
MAZES = {
    "DynaMaze-v0": ((".......#G ..#....#. S.#....#. ..#...... .....#... .........",), 0),
    "BlockingMaze-v0": ((OPEN_RIGHT, OPEN_LEFT), 1_000),
    "ShortcutMaze-v0": ((OPEN_LEFT, OPEN_BOTH), 3_000),
}
for name, (maps, change_at) in MAZES.items():
    if name not in gym.registry:
        kwargs = {"maps": maps, "change_at": change_at}
        gym.register(name, Maze, kwargs=kwargs, max_episode_steps=10_000)


# ── Plumbing: the same in every file, nothing below is specific to the algorithm ──────────────────────────────────


class UserError(Exception):
    """A wrong setting, environment or folder: main() prints one sentence and exits with code 2."""


def make_env(args: Args) -> gym.Env:
    sys.path.append("")  # module:Env-v0 finds a module in the current folder
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo renders without a screen
    try:
        env = make_task(args, **({"render_mode": "rgb_array"} if args.capture_video else {}))
    except (gym.error.Error, ImportError) as error:  # Gymnasium names the package to install
        raise UserError(f"--env-id {args.env_id}: {error}") from None
    if env.spec.max_episode_steps is None:
        gym.logger.warn(f"{args.env_id} has no time limit: episodes are truncated after 1,000 steps")
        env = gym.wrappers.TimeLimit(env, 1_000)
    return gym.wrappers.RecordEpisodeStatistics(env)


class Run:
    """The folder of a run: curves and checkpoints. `parts` are what a checkpoint holds and --resume restores."""

    def __init__(self, args: Args, **parts):
        checkpoint = load_checkpoint(args.resume) if args.resume else None
        self.args, self.parts, self.signal, self.step = args, parts, 0, checkpoint["step"] if checkpoint else 0
        name = f"{args.env_id.replace('/', '-').replace(':', '-')}__{ALGORITHM}__{args.seed}__{int(time.time())}"
        self.dir = Path(args.resume or args.run_dir or f"runs/{name}")
        if self.step >= args.total_timesteps:
            raise UserError(f"{self.dir} has taken {self.step:,} steps already: raise --total-timesteps to continue")
        self.dir.mkdir(parents=True, exist_ok=True)
        if not checkpoint and any(self.dir.iterdir()):
            raise UserError(f"{self.dir} is not empty: choose another --run-dir, or continue with --resume {self.dir}")
        if checkpoint:
            for part in parts:
                parts[part].load_state_dict(checkpoint[part])
            torch.set_rng_state(checkpoint["generator"])
            for number, state in enumerate(checkpoint["cuda_generators"][: torch.cuda.device_count()]):
                torch.cuda.set_rng_state(state, number)
        while any(self.dir.glob(f"events.out.tfevents.{int(time.time())}.*")):
            time.sleep(0.05)  # TensorBoard reads the files in the order of their names, which hold the second
        # After a kill the steps since the last checkpoint are taken again: TensorBoard hides the first attempt.
        self.writer = SummaryWriter(str(self.dir), purge_step=self.step + 1 if checkpoint else None)
        table = "\n".join(f"|{name}|{value}|" for name, value in vars(args).items())
        self.writer.add_text("hyperparameters", f"|setting|value|\n|-|-|\n{table}", self.step)
        print(f"run folder: {self.dir}\ncurves: tensorboard --logdir {shlex.quote(str(self.dir))}", flush=True)
        self.bar = tqdm(total=args.total_timesteps, initial=self.step, unit=" steps", disable=None)
        self.first_step, self.began, self.saved = self.step, time.perf_counter(), time.perf_counter()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)

    def on_signal(self, number: int, _) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)
        os.write(2, b"\nstopping at the end of this episode; the same signal again stops immediately\n")

    def unfinished(self) -> bool:
        return self.step < self.args.total_timesteps and not self.signal

    def begin_episode(self) -> int:
        """The episode's seed comes from torch's generator, the only one that a script uses."""
        self.episode_start = self.step
        return int(torch.randint(2**31, ()))

    def count_steps(self, n: int = 1) -> None:
        self.step += n
        self.bar.update(n)

    def due(self, every: int) -> bool:
        """Whether the last episode contains a multiple of `every` or ends the run."""
        return self.step // every > self.episode_start // every or self.step >= self.args.total_timesteps

    def log(self, tag: str, value: float) -> None:
        self.writer.add_scalar(tag, value, self.step)

    def end_episode(self, info: dict) -> None:
        if "episode" in info:  # it was not interrupted by the end of the run
            self.log("charts/episodic_return", info["episode"]["r"])
            self.log("charts/episodic_length", info["episode"]["l"])
            self.bar.set_postfix_str(f"return {info['episode']['r']:.4g}")
        self.log("charts/SPS", (self.step - self.first_step) / (time.perf_counter() - self.began))
        if self.due(self.args.checkpoint_every) or time.perf_counter() - self.saved > 60 or self.signal:
            self.save()

    def save(self) -> None:
        """Write next to the old checkpoint and rename: a kill at any moment leaves a complete one."""
        machine = ("resume", "evaluate", "run_dir", "device")  # these belong to the command, not to the run
        state = {
            "algorithm": ALGORITHM,
            "args": {name: value for name, value in asdict(self.args).items() if name not in machine},
            "step": self.step,
            "generator": torch.get_rng_state(),
            "cuda_generators": torch.cuda.get_rng_state_all(),
        }
        buffer, temporary = io.BytesIO(), self.dir / "checkpoint.tmp"
        torch.save(state | {name: part.state_dict() for name, part in self.parts.items()}, buffer)
        try:
            temporary.write_bytes(buffer.getbuffer())
            os.replace(temporary, self.dir / "checkpoint.pt")
        finally:  # a full disk leaves the old checkpoint
            temporary.unlink(missing_ok=True)
        self.saved = time.perf_counter()

    def picture(self, figure: Figure) -> None:
        figure.savefig(self.dir / "picture.png")
        self.writer.add_figure("model/picture", figure, self.step)

    def evaluate(self, agent: "Agent", env: gym.Env) -> None:
        video = self.dir / f"video_{self.step:08d}.gif"
        self.log("eval/episodic_return", play(agent, env, self.args, f"step {self.step:,}", video))

    def close(self) -> None:
        for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            signal.signal(number, handler)
        self.bar.close()
        self.writer.close()
        script, folder = f"python {sys.argv[0]}", shlex.quote(str(self.dir))
        if self.step < self.args.total_timesteps:
            self.save()
            print(f"stopped at step {self.step:,}; to continue: {script} --resume {folder}")
            sys.exit(128 + self.signal)
        print(f"picture: {self.dir / 'picture.png'}\nto watch it: {script} --evaluate {folder} --capture-video")


def play(agent: "Agent", env: gym.Env, args: Args, title: str, video: Path) -> float:
    """The mean return of evaluation episodes. They are always the same ones and leave the generator as it was."""
    returns, frames = [], []
    with torch.random.fork_rng():
        torch.manual_seed(args.seed + 10_000)
        for episode in range(args.episodes):
            obs, info = env.reset(seed=int(torch.randint(2**31, ())))
            agent.reset()
            while "episode" not in info:
                obs, _, _, _, info = env.step(agent(obs))
                if args.capture_video and episode == 0 and len(frames) < 500:
                    frames.append(Image.fromarray(env.render()).reduce(2))
            returns.append(float(info["episode"]["r"]))
    if frames:
        frames[0].save(video, save_all=True, append_images=frames[1:], duration=40, loop=0)
    mean, low, high = np.mean(returns), min(returns), max(returns)
    tqdm.write(f"{title}: the {agent.player}'s mean return is {mean:.2f}, from {low:.2f} to {high:.2f}")
    sys.stdout.flush()  # the log of a batch job shows it at once
    return mean


def load_checkpoint(run_dir: str) -> dict:
    path = Path(run_dir) / "checkpoint.pt"
    if not path.is_file():
        raise UserError(f"{run_dir} holds no checkpoint.pt: not a run folder, or stopped before its first checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        raise UserError(f"{path} is damaged: it cannot be read") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("algorithm") != ALGORITHM:
        raise UserError(f"{path} is not a checkpoint of {ALGORITHM}")
    names = {field.name for field in fields(Args)}  # a setting added to Args since then takes its default
    checkpoint["args"] = Args(**{name: value for name, value in checkpoint["args"].items() if name in names})
    return checkpoint


def load_policy(run_dir: str, args: Optional[Args] = None) -> "Agent":
    """policy = load_policy("runs/NAME"), then action = policy(obs); call policy.reset() before each episode."""
    checkpoint = load_checkpoint(run_dir)
    args = args or checkpoint["args"]
    agent = Agent(make_env(args), args)
    agent.load_state_dict(checkpoint["agent"])
    return agent


def parse_args(words: list[str]) -> Args:
    """A preset, by default the first one, and flags that override it; or the settings of an earlier run."""
    folders = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    folders.add_argument("--resume")
    folders.add_argument("--evaluate")
    found, _ = folders.parse_known_args(words)
    if found.resume and found.evaluate:
        raise UserError("--resume trains and --evaluate plays: choose one")
    if run_dir := found.resume or found.evaluate:
        saved = load_checkpoint(run_dir)["args"]
        args = tyro.cli(Args, default=saved, args=words)
        changed = {name for name, value in vars(saved).items() if getattr(args, name) != value}
        if changed := changed - {"resume", "evaluate", *MAY_CHANGE.split()}:
            raise UserError(f"{run_dir} keeps its own settings: {', '.join(sorted(changed))} cannot be changed")
    else:
        preset = [] if {*words} & {*PRESETS, "-h", "--help"} else [next(iter(PRESETS))]
        args = tyro.extras.overridable_config_cli(PRESETS, args=preset + words, description=__doc__.split("\n\n")[0])
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {args.device} is not available on this machine") from None
    return args


MAY_CHANGE = "total_timesteps device compile seed eval_every picture_every checkpoint_every episodes capture_video"


def main(words: Optional[list[str]] = None) -> None:
    try:
        args = parse_args(sys.argv[1:] if words is None else words)
        if args.evaluate:
            play(load_policy(args.evaluate, args), make_env(args), args, args.env_id, Path(args.evaluate) / "play.gif")
        else:
            train(args)
    except (UserError, OSError) as error:  # an OSError is most often a full disk
        print(f"{ALGORITHM}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
