# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "numpy>=2.0,<3", "gymnasium>=1.3,<2", "tyro>=1.0.16,<2", "pillow>=11,<14", "matplotlib>=3.9,<4",
# ]
# ///
"""DAgger for model learning: fit the model on what an expert sees and on what its own plans see, half and half.

A plan made in a learned model fails where the model is wrong. A model that is fitted to an expert's steps is never
tested where its plan goes instead, and believes in shortcuts that do not exist. A model that is fitted only to steps of
its own plans never sees what it misses. With half of each, the model's error on these steps bounds the loss.

Paper: S. Ross and J. A. Bagnell, "Agnostic system identification for model-based reinforcement learning", ICML 2012,
arXiv:1203.1007. Public code of later work by the same group: vvanirudh/LAMPS-MBRL.

The algorithm:
    (1) D_expert ← the expert's steps in the world, D_learner ← ∅
    (2) fit the model M̂ with a total weight of ½ on D_expert and ½ on D_learner
    (3) π̂ ← plan in M̂
    (4) execute π̂ in the world; D_learner ← D_learner ∪ its steps
    (5) repeat; return the π̂ that was best in the world

Performance difference via planning: J(π*) − J(π̂) = [J(π*) − Ĵ(π*)] + [Ĵ(π*) − Ĵ(π̂)] + [Ĵ(π̂) − J(π̂)]; hatted values are
those in the model. The first term is the model's error where the expert goes, the last one where the learner goes.

Symbols: J → value, d_t → occupancy[t], π* → expert, s, u and W: state, action and weights of the helicopter's model.

Usage (seconds; values in the world, the expert's in brackets):
    python algos/dagger_mbrl.py                        # expert data −10.10, own data 0.55, both 9.55 [9.55]
    python algos/dagger_mbrl.py maps --seed 3          # a random map
    python algos/dagger_mbrl.py helicopter --seed 3    # a planar helicopter, an affine model, plans by LQR
    python algos/dagger_mbrl.py --data both            # one of the three stories alone
    python algos/dagger_mbrl.py --evaluate runs/NAME --episodes 10 --capture-video

Differences from the paper: whole episodes of expert and learner in place of one sample at a time; all of the learner's
steps are kept and the model is fitted again, which is follow-the-leader, a no-regret learner.
"""

import argparse
import io
import json
import math
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Optional

import gymnasium as gym
import numpy as np
import tyro
from matplotlib.figure import Figure
from PIL import Image

ALGORITHM = "dagger_mbrl"


@dataclass
class Args:  # tyro turns each field into a flag and each comment into its help
    env_id: str = "Doors-v0"  # Doors-v0, RandomDoors-v0 or Helicopter-v0; or a class with the same methods
    data: Literal["all", "expert", "learner", "both"] = "all"  # what the model is fitted to; all: one after the other
    iterations: int = 4  # plans executed in the world, and fits of the model
    rollouts: int = 1  # episodes of the expert and of the learner in each iteration
    model_error: float = 0.5  # size of the random error of the helicopter's first model
    seed: int = 1  # of the random map, the first model, the noise and the episodes
    time_limit: Optional[int] = None  # steps per episode, in place of the environment's own limit
    episodes: int = 1  # episodes that the best policy plays at the end
    capture_video: bool = False  # save the first episode as a GIF
    run_dir: Optional[str] = None  # output folder; runs/<env>__<algorithm>__<seed>__<time> by default
    evaluate: Optional[str] = None  # do not train: play with the policy of this run folder

    def __post_init__(self):
        """tyro reports a ValueError raised here as one sentence and exits with code 2."""
        for name, value in vars(self).items():
            may_be_zero = name in ("model_error", "seed")
            if type(value) in (int, float) and not (0 < value < math.inf or (value == 0 and may_be_zero)):
                raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be a positive number")


PRESETS = {
    "grid": ("a trophy behind a door that the model takes for a wall, and a pit that it takes for floor", Args()),
    "maps": ("a random map with doors and pits, another one for each seed", Args("RandomDoors-v0", iterations=8)),
    "helicopter": ("a planar helicopter, an affine model, plans by LQR", Args(
        "Helicopter-v0", iterations=15, rollouts=2, episodes=20)),
}  # fmt: skip


# ── The algorithm: tables, and the two lemmas ─────────────────────────────────────────────────────────────────────


class Table(NamedTuple):
    """A world or a model of states and actions in numbers. A terminal state leads to itself with reward 0."""

    P: np.ndarray  # P(s'|s, a), [S, A, S]
    r: np.ndarray  # r(s, a), [S, A]


class Data(NamedTuple):
    """Steps, one per row."""

    s: np.ndarray
    a: np.ndarray
    r: np.ndarray
    s2: np.ndarray


def backup(P: np.ndarray, r: np.ndarray, V: np.ndarray, gamma: float) -> np.ndarray:
    # Q(s, a) = r(s, a) + γ Σ_s' P(s'|s, a) V(s')
    return r + gamma * (P @ V)


def values(table: Table, policy: np.ndarray, horizon: int, gamma: float = 1.0) -> np.ndarray:
    """V_t(s) [T + 1, S] of a policy [S] with T − t steps to go."""
    rows, V = np.arange(len(policy)), [np.zeros(len(policy))]
    for _ in range(horizon):
        V.append(backup(table.P[rows, policy], table.r[rows, policy], V[-1], gamma))
    return np.stack(V[::-1])


def occupancies(table: Table, policy: np.ndarray, start: np.ndarray, horizon: int, gamma: float = 1.0) -> np.ndarray:
    """γ^t d_t(s) [T, S]: the discounted probability of each state at step t."""
    rows, d = np.arange(len(policy)), [start]
    for _ in range(horizon - 1):
        d.append(gamma * d[-1] @ table.P[rows, policy])
    return np.stack(d)


def simulation_gap(world: Table, model: Table, policy: np.ndarray, start: np.ndarray, horizon: int, gamma=1.0) -> float:
    """The simulation lemma: how much the policy's value in the world exceeds its value in the model."""
    rows, V = np.arange(len(policy)), values(model, policy, horizon, gamma)
    d = occupancies(world, policy, start, horizon, gamma)
    # J(π) − Ĵ(π) = Σ_t γ^t E_{s ~ d_t} [r − r̂ + γ (P − P̂)(·|s, π(s)) V̂_{t+1}], s as visited in the world
    rewards = (world.r - model.r)[rows, policy]
    return float(sum(d[t] @ (rewards + gamma * (world.P - model.P)[rows, policy] @ V[t + 1]) for t in range(horizon)))


def weigh(expert: Data, learner: Data, expert_share: float) -> tuple[Data, np.ndarray]:
    """All steps and their weights. Each of the two parts has its share, whatever its size."""
    shares = (expert_share, 1 - expert_share) if len(learner.s) else (math.ceil(expert_share), 0)
    weights = [
        np.full(len(part.s), share / max(len(part.s), 1)) for part, share in zip((expert, learner), shares, strict=True)
    ]
    return Data(*(np.concatenate(column) for column in zip(expert, learner, strict=True))), np.concatenate(weights)


# ── Training ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Iteration(NamedTuple):
    """What one round gave, and the three terms of J(π*) − J(π̂)."""

    iteration: int
    value: float  # J(π̂), in the world
    expert_term: float  # J(π*) − Ĵ(π*): the model's error where the expert goes
    planning_term: float  # Ĵ(π*) − Ĵ(π̂): negative if the plan is good in the model
    learner_term: float  # Ĵ(π̂) − J(π̂): the model's error where the learner goes
    policy: np.ndarray
    model: Table | np.ndarray


EXPERT_SHARE = {"expert": 1.0, "learner": 0.0, "both": 0.5}


def train(args: Args) -> None:
    env, folder = make_env(args), make_folder(args)
    task, histories, log = env.unwrapped, {}, [f"data,{','.join(Iteration._fields[:5])}"]
    print(f"the expert's value: {task.value(task.expert):.2f}")
    for data in EXPERT_SHARE if args.data == "all" else [args.data]:
        histories[data] = learn(task, data, args)
        for row in histories[data]:
            log.append(f"{data}," + ",".join(f"{x:.9g}" for x in row[:5]))
            terms = " + ".join(f"{term:z.2f}" for term in row[2:5])
            print(f"{data:7} iteration {row.iteration:2}: value {row.value:.2f}, below the expert by {terms}")
        best = max(histories[data], key=lambda row: row.value)
        print(f"{data:7} best: value {best.value:.2f}")
    (folder / "log.csv").write_text("\n".join(log) + "\n")
    np.savez(folder / "policy.npz", policy=best.policy, args=json.dumps(asdict(args)), algorithm=ALGORITHM)

    frames = []
    for iteration in range(args.iterations):
        figure = task.draw({data: history[: iteration + 1] for data, history in histories.items()})
        figure.savefig(image := io.BytesIO(), format="png", dpi=80)
        frames.append(Image.open(image).convert("RGB"))
    frames[0].save(folder / "iterations.gif", save_all=True, append_images=frames[1:], duration=1_000, loop=0)
    figure.savefig(folder / "picture.png")
    play(as_function(best.policy), env, args, folder / "video.gif")
    script, place = f"python {sys.argv[0]}", shlex.quote(str(folder))
    print(f"picture: {folder / 'picture.png'}\nto watch it: {script} --evaluate {place} --capture-video")


def learn(task: "Grid | Helicopter", data: str, args: Args) -> list[Iteration]:
    rng, history = np.random.default_rng(args.seed), []
    # (1) D_expert ← the expert's steps in the world, D_learner ← ∅
    expert_data = task.execute(task.expert, args.rollouts, rng)
    learner_data = Data(*(column[:0] for column in expert_data))
    for iteration in range(1, args.iterations + 1):
        # (2) fit the model, half of the weight on each
        model = task.fit(*weigh(expert_data, learner_data, EXPERT_SHARE[data]))
        # (3) plan in the model
        policy = task.plan(model)
        # (4) execute the plan in the world, and keep its steps
        steps, more = task.execute(policy, args.rollouts, rng), task.execute(task.expert, args.rollouts, rng)
        learner_data = Data(*map(np.concatenate, zip(learner_data, steps, strict=True)))
        expert_data = Data(*map(np.concatenate, zip(expert_data, more, strict=True)))
        value, planning_term = task.value(policy), task.value(task.expert, model) - task.value(policy, model)
        terms = task.gap(model, task.expert), planning_term, -task.gap(model, policy)
        # (5) repeat; train() keeps the plan that was best in the world
        history.append(Iteration(iteration, value, *terms, policy, model))
    return history


def as_function(policy: np.ndarray) -> Callable:
    """A table of actions [S], or the gains of an affine policy u = K (s, 1)."""
    return (lambda obs: int(policy[obs])) if policy.ndim == 1 else (lambda obs: policy @ np.append(obs, 1.0))


# ── The tasks: a grid with a door, and a helicopter ───────────────────────────────────────────────────────────────


def make_task(args: Args, **kwargs) -> gym.Env:
    kwargs |= {"max_episode_steps": args.time_limit} if args.time_limit else {}
    kwargs |= {"seed": args.seed} if args.env_id == "RandomDoors-v0" else {}
    kwargs |= {"seed": args.seed, "error": args.model_error} if args.env_id == "Helicopter-v0" else {}
    env = gym.make(args.env_id, **kwargs)
    for name in ("expert", "execute", "fit", "plan", "value", "gap", "draw"):
        if not hasattr(env.unwrapped, name):
            raise UserError(f"{args.env_id} has no `{name}`: see the classes Grid and Helicopter")
    return env


MOVES = np.array([(-1, 0), (0, 1), (1, 0), (0, -1)])  # up, right, down, left
ENDS = {"T": 10.0, "P": -10.0, "$": 1.0}  # trophy, pit, dollar: each ends the episode

LECTURE = """
#########
#...D...#
#.#####T#
#S.P....#
#.#####$#
#.......#
#########
"""


class Grid(gym.Env):
    """Walk from S to what pays; a step costs 0.05, and walls (#) stop it. The first model takes doors (D) for walls and
    pits (P) for floor. A model is what was seen of each state and action, and the first model elsewhere."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}
    action_space = gym.spaces.Discrete(4)
    horizon = 60

    def __init__(self, text: str = LECTURE, render_mode: Optional[str] = None):
        self.desc, self.render_mode = np.array([list(row) for row in text.split()]), render_mode
        self.observation_space = gym.spaces.Discrete(self.desc.size + 1)  # the last one is terminal
        self.start = np.append(self.desc.ravel() == "S", False).astype(float)
        doors, pits = self.desc == "D", self.desc == "P"
        self.world = self.table(np.where(doors, ".", self.desc))
        self.nominal = self.table(np.where(doors, "#", np.where(pits, ".", self.desc)))
        self.expert = self.plan(self.world)

    def table(self, desc: np.ndarray) -> Table:
        end, columns = desc.size, desc.shape[1]
        P, r = np.zeros((end + 1, 4, end + 1)), np.full((end + 1, 4), -0.05)
        P[end, :, end], r[end] = 1, 0
        for s, a in np.ndindex(end, 4):
            row, column = np.clip(np.array(divmod(s, columns)) + MOVES[a], 0, np.array(desc.shape) - 1)
            letter = desc[row, column]
            P[s, a, s if letter == "#" else end if letter in ENDS else row * columns + column] = 1
            r[s, a] += ENDS.get(letter, 0.0)
        return Table(P, r)

    def execute(self, policy: np.ndarray, episodes: int, rng: np.random.Generator) -> Data:
        rows = []
        for _ in range(episodes):
            s, steps = int(self.start.argmax()), 0
            while s < self.desc.size and steps < self.horizon:
                a = policy[s]
                s2 = int(rng.choice(len(policy), p=self.world.P[s, a]))
                rows.append((s, a, self.world.r[s, a], s2))
                s, steps = s2, steps + 1
        return Data(*map(np.array, zip(*rows, strict=True)))

    def fit(self, data: Data, weights: np.ndarray) -> Table:
        """Weighted shares of the outcomes of each state and action that was seen."""
        P, r = np.zeros_like(self.nominal.P), np.zeros_like(self.nominal.r)
        np.add.at(P, (data.s, data.a, data.s2), weights)
        np.add.at(r, (data.s, data.a), weights * data.r)
        total = P.sum(-1)
        seen, total = total > 0, np.maximum(total, 1e-300)
        return Table(
            np.where(seen[..., None], P / total[..., None], self.nominal.P), np.where(seen, r / total, self.nominal.r)
        )

    def plan(self, model: Table) -> np.ndarray:
        """Value iteration for as many sweeps as an episode has steps. Ties take the first action."""
        V = np.zeros(len(model.r))
        for _ in range(self.horizon):
            Q = backup(*model, V, 1.0)
            V = Q.max(1)
        return Q.round(9).argmax(1)

    def value(self, policy: np.ndarray, model: Optional[Table] = None) -> float:
        return float(values(model or self.world, policy, self.horizon)[0] @ self.start)

    def gap(self, model: Table, policy: np.ndarray) -> float:
        return simulation_gap(self.world, model, policy, self.start, self.horizon)

    def reset(self, *, seed: Optional[int] = None, options: Optional[dict] = None):
        super().reset(seed=seed)
        self.s = int(self.start.argmax())
        return self.s, {}

    def step(self, action: int):
        reward = float(self.world.r[self.s, action])
        self.s = int(self.np_random.choice(len(self.start), p=self.world.P[self.s, action]))
        return self.s, reward, self.s == self.desc.size, False, {}

    def path(self, table: Table, policy: np.ndarray) -> np.ndarray:
        """The cells of an episode with the most likely outcomes, as [row, column]."""
        s, cells = int(self.start.argmax()), []
        while s < self.desc.size and len(cells) < self.horizon:
            cells.append(divmod(s, self.desc.shape[1]))
            a, s = policy[s], int(table.P[s, policy[s]].argmax())
        return np.array([*cells, cells[-1] + MOVES[a]] if s == self.desc.size else cells)

    def draw(self, histories: dict[str, list[Iteration]]) -> Figure:
        """The map, in red what the model does not know; its plan, and what happened."""
        figure = Figure(figsize=(4 * len(histories), 3.8), layout="constrained")
        all_axes = figure.subplots(1, len(histories), squeeze=False)[0]
        for axes, (data, history) in zip(all_axes, histories.items(), strict=True):
            last = history[-1]
            known = (last.model.P != self.nominal.P).any(-1)  # where seeing has changed the model
            axes.imshow(self.desc == "#", cmap="gray_r", vmax=2)
            for (row, column), letter in np.ndenumerate(self.desc):
                if letter in "STP$D":
                    sides = [(row - down) * self.desc.shape[1] + column - right for down, right in MOVES]
                    wrong = letter in "DP" and not any(known[s, a] for a, s in enumerate(sides))
                    axes.text(column, row, letter, ha="center", va="center", color="red" if wrong else "black", size=14)
            for table, style in ((last.model, "C1--"), (self.world, "C0-")):
                y, x = self.path(table, last.policy).T
                axes.plot(x, y, style, linewidth=3, alpha=0.7)
            axes.set(xticks=[], yticks=[], title=f"{data}, iteration {len(history)}: {last.value:.2f}")
        figure.supxlabel(
            "dashed: the plan in the model; solid: what happened; red: what the model does not know", size=9
        )
        return figure

    def render(self) -> np.ndarray:
        colors = {"#": 70, "T": 180, "$": 200, "P": 120}
        image = np.array([[[colors.get(letter, 240)] * 3 for letter in row] for row in self.desc], np.uint8)
        if self.s < self.desc.size:
            image.reshape(-1, 3)[self.s] = 220, 60, 60
        return image.repeat(40, 0).repeat(40, 1)


def random_grid(seed: int, **kwargs) -> Grid:
    """9 × 11 cells, a fifth of them walls, four pits, six doors. The trophy can be reached."""
    rng = np.random.default_rng(seed)
    while True:
        inside = np.where(rng.random(63) < 0.2, "#", ".")
        inside[rng.permutation(63)[:12]] = list("STPPPPDDDDDD")
        desc = np.pad(inside.reshape(7, 9), 1, constant_values="#")
        grid = Grid("\n".join("".join(row) for row in desc), **kwargs)
        if grid.value(grid.expert) > 0:
            return grid


class Helicopter(gym.Env):
    """Hover at the origin of a plane. s = (x, z, θ, their velocities), u = (thrust − g, torque). A model is affine,
    s' = W (s, u, 1), the least-squares correction of a wrong first model. Plans are linear-quadratic regulators."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    observation_space = gym.spaces.Box(-np.inf, np.inf, (6,))
    action_space = gym.spaces.Box(np.float32([-9.81, -20]), np.float32([9.81, 20]))
    horizon, dt, world = 120, 0.05, None
    Q, R = np.diag([1, 1, 1, 0.1, 0.1, 0.1]), 0.05 * np.eye(2)

    def __init__(self, seed: int = 1, error: float = 0.5, render_mode: Optional[str] = None):
        self.render_mode, rng = render_mode, np.random.default_rng(seed)
        W = np.zeros((6, 9))  # the world, linearised while it hovers
        W[:, :6] = np.eye(6) + self.dt * np.eye(6, k=3)
        W[3, 2], W[4, 6], W[5, 7], W[5, 5] = -9.81 * self.dt, self.dt, self.dt, 1 - 0.5 * self.dt
        self.expert, self.nominal = self.plan(W), W.copy()
        self.nominal[:, 6:8] *= rng.uniform(1 - error, 1 + error, (6, 2))
        self.nominal[3:, :6] += rng.normal(0, 0.1 * error, (3, 6))
        self.nominal[:, 8] += rng.normal(0, 0.1, 6)
        self.starts, self.noise = self.random_starts(30, rng), rng.normal(size=(self.horizon, 30, 3))

    def random_starts(self, n: int, rng: np.random.Generator) -> np.ndarray:
        return rng.uniform(-1, 1, (n, 6)) * (2, 2, 0.3, 1, 1, 0.5)

    def dynamics(self, s: np.ndarray, u: np.ndarray, W: Optional[np.ndarray], noise: np.ndarray) -> np.ndarray:
        """The next states [N, 6] in a model W, or in the world."""
        if W is None:
            (_, _, angle, vx, vz, spin), (thrust, torque) = s.T, u.T
            ax = -(9.81 + thrust) * np.sin(angle) - 0.1 * vx * abs(vx)
            az = (9.81 + thrust) * np.cos(angle) - 9.81 - 0.1 * vz * abs(vz)
            s2 = s + self.dt * np.stack([vx, vz, spin, ax, az, torque - 0.5 * spin], 1)
        else:
            s2 = np.hstack([s, u, np.ones((len(s), 1))]) @ W.T
        return s2 + 0.0125 * np.pad(noise, ((0, 0), (3, 0)))

    def cost(self, s: np.ndarray, u: np.ndarray) -> np.ndarray:
        return np.minimum(((s @ self.Q) * s).sum(-1) + ((u @ self.R) * u).sum(-1), 50)

    def crashed(self, s: np.ndarray) -> np.ndarray:
        return (abs(s[..., :2]) > 8).any(-1) | (abs(s[..., 2]) > 1.2)

    def fly(self, policy: np.ndarray, starts: np.ndarray, noise: np.ndarray, model: Optional[np.ndarray] = None):
        """States [T + 1, N, 6], actions [T, N, 2], and costs [T, N], 50 a step after a crash."""
        s, alive, rows = starts, np.ones(len(starts), bool), []
        for t in range(self.horizon):
            u = np.clip(np.hstack([s, np.ones((len(s), 1))]) @ policy.T, self.action_space.low, self.action_space.high)
            rows.append((s, u, np.where(alive, self.cost(s, u), 50), alive))
            s = np.where(alive[:, None], self.dynamics(s, u, model, noise[t]), s)
            alive = alive & ~self.crashed(s)
        states, actions, costs, alive = map(np.stack, zip(*rows, strict=True))
        return np.concatenate([states, s[None]]), actions, costs, alive

    def execute(self, policy: np.ndarray, episodes: int, rng: np.random.Generator) -> Data:
        noise = rng.normal(size=(self.horizon, episodes, 3))
        s, u, cost, alive = self.fly(policy, self.random_starts(episodes, rng), noise)
        return Data(s[:-1][alive], u[alive], -cost[alive], s[1:][alive])

    def fit(self, data: Data, weights: np.ndarray) -> np.ndarray:
        """Weighted ridge regression of what the first model leaves."""
        x = np.hstack([data.s, data.a, np.ones((len(data.s), 1))])
        # ΔW = argmin Σ_i w_i ‖s'_i − (W₀ + ΔW) x_i‖² + 10⁻⁶ ‖ΔW‖²
        xw = x.T * weights
        return self.nominal + np.linalg.solve(xw @ x + 1e-6 * np.eye(9), xw @ (data.s2 - x @ self.nominal.T)).T

    def plan(self, model: np.ndarray) -> np.ndarray:
        """The Riccati recursion on (s, 1): K [2, 7] of u = K (s, 1)."""
        A, B = np.vstack([np.delete(model, (6, 7), 1), np.eye(7)[6]]), np.vstack([model[:, 6:8], np.zeros(2)])
        S = Q = np.pad(self.Q, (0, 1))
        for _ in range(300):
            # K = −(R + Bᵀ S B)⁻¹ Bᵀ S A and S ← Q + Aᵀ S (A + B K)
            K = -np.linalg.solve(self.R + B.T @ S @ B, B.T @ S @ A)
            S = Q + A.T @ S @ (A + B @ K)
        return K

    def value(self, policy: np.ndarray, model: Optional[np.ndarray] = None) -> float:
        """Minus the mean cost per step, over fixed starts and noise."""
        return -float(self.fly(policy, self.starts, self.noise, model)[2].mean())

    def gap(self, model: np.ndarray, policy: np.ndarray) -> float:
        return self.value(policy) - self.value(policy, model)

    def reset(self, *, seed: Optional[int] = None, options: Optional[dict] = None):
        super().reset(seed=seed)
        self.s, self.steps = self.random_starts(1, self.np_random), 0
        return self.s[0].astype(np.float32), {}

    def step(self, action: np.ndarray):
        """After a crash, the reward is that of all steps that are missing."""
        u, self.steps = np.clip(action, self.action_space.low, self.action_space.high)[None], self.steps + 1
        reward = -self.cost(self.s, u)[0]
        self.s = self.dynamics(self.s, u, None, self.np_random.normal(size=(1, 3)))
        crashed = bool(self.crashed(self.s)[0])
        return self.s[0].astype(np.float32), reward - 50 * crashed * (self.horizon - self.steps), crashed, False, {}

    def draw(self, histories: dict[str, list[Iteration]]) -> Figure:
        """Costs over iterations; paths of the last plans from one start, in the world and in the model."""
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.axhline(-self.value(self.expert), color="black", label="the expert itself")
        for k, (data, history) in enumerate(histories.items()):
            left.semilogy(range(1, len(history) + 1), [-row.value for row in history], ".-", color=f"C{k}", label=data)
            for model, style in ((history[-1].model, "--"), (None, "-")):
                path = self.fly(history[-1].policy, self.starts[:1], self.noise[:, :1], model)[0][:, 0]
                right.plot(*path[:, :2].T, style, color=f"C{k}")
        left.set(xlabel="iteration", ylabel="cost per step")
        right.set(xlabel="x", ylabel="z", title="solid: flown; dashed: predicted by the model")
        left.legend()
        return figure

    def render(self) -> np.ndarray:
        image = np.full((160, 160, 3), 240, np.uint8)
        rotor = np.linspace(-0.8, 0.8, 60)
        x, z = self.s[0, 0] + rotor * np.cos(self.s[0, 2]), self.s[0, 1] + rotor * np.sin(self.s[0, 2])
        columns, rows = (80 + 10 * x).astype(int).clip(0, 158), (80 - 10 * z).astype(int).clip(0, 158)
        for shift in (0, 1):
            image[rows + shift, columns] = 220, 60, 60
        return image


for name, task, steps in (("Doors", Grid, 60), ("RandomDoors", random_grid, 60), ("Helicopter", Helicopter, 120)):
    if f"{name}-v0" not in gym.registry:
        gym.register(f"{name}-v0", task, max_episode_steps=steps)


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
