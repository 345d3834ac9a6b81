# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "numpy>=2.0,<3", "gymnasium>=1.3,<2", "mujoco>=3.3,<5", "imageio>=2.34,<3", "tyro>=1.0.16,<2",
#     "tensorboard>=2.18,<3", "tqdm>=4.66,<5", "pillow>=11,<14", "matplotlib>=3.9,<4", "pygame-ce>=2.5,<3",
# ]
# ///
"""PDDM: plan with an ensemble of learned models by averaging smooth candidate plans, weighted by their returns.

Each network of an ensemble predicts how an action changes the state. To act, the agent adds noise that is smooth in
time to its last plan, scores each of these candidates by its mean return over the networks, and takes the average of
all candidates, weighted by the exponential of their returns. It executes the first action and keeps the rest.

Paper: Nagabandi, Konolige, Levine, Kumar, "Deep Dynamics Models for Learning Dexterous Manipulation", CoRL 2019, arXiv
1909.11652. Official code: github.com/google-research/pddm.

The algorithm (Algorithm 1 of the paper):
    (1) act at random at first
    (2) afterwards, in each state s_t, sample N candidates around the mean μ of the last plan with filtered noise
        (Eqs. 3 and 4), predict their returns R_k with every network, and update μ by the weighted mean (Eq. 2)
    (3) execute only the first action, and shift μ by one step
    (4) add (s_t, a_t, s_{t+1}) to the data D
    (5) regularly, train each network of the ensemble further on D

Symbols: f̂_θ → Ensemble, N → candidates, H → horizon, β → beta, Σ = (σ/2 · (high − low))² → sigma,
    γ → gamma: the weight of a return, not a discount (kappa in the official code).

Usage (return: mean and 95 % interval over seeds; docs/pddm.md has the curves):
    python algos/pddm.py                                    # 3.7 minutes, return −138 [−171, −103]
    python algos/pddm.py reacher                            # not measured yet
    python algos/pddm.py halfcheetah                        # not measured yet
    python algos/pddm.py --env-id my_module:MyEnv-v0        # any Gymnasium task: its reward and end are learned too
    python algos/pddm.py --evaluate runs/NAME --episodes 10 --capture-video

Differences from the paper and its code: the noise is filtered as in the paper, where the code filters the action; the
networks are trained further, where the code starts them again each time; a candidate earns nothing after a terminal
state; the last action of the shifted plan is repeated; HalfCheetah's reward is not a function of Gymnasium's
observation, so it is learned.
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
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Optional

import gymnasium as gym
import numpy as np
import torch
import tyro
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

ALGORITHM = "pddm"


@dataclass
class Args:  # tyro turns each field into a flag and each comment into its help
    env_id: str = "Pendulum-v1"  # any environment with vector observations and bounded continuous actions
    total_timesteps: int = 2_000  # environment steps, including the random ones
    members: int = 3  # networks in the ensemble
    candidates: int = 200  # N: action sequences per environment step
    horizon: int = 20  # H: length of an action sequence
    sigma: float = 1.0  # std of the noise before the filter, in halves of the action range
    beta: float = 0.5  # share of new noise in each step's: 1 is no filter, a smaller one makes candidates smoother
    gamma: float = 3.0  # weight of a return in exp(γ R): a larger one follows the best candidates more closely
    random_steps: int = 200  # steps of random actions before the first training
    refit_every: int = 200  # environment steps between trainings of the model
    epochs: int = 40  # passes over the data per training
    batch_size: int = 64  # transitions per minibatch and member
    learning_rate: float = 1e-3  # Adam's step size
    layers: int = 2  # hidden layers per network
    hidden: int = 100  # units per hidden layer
    seed: int = 1  # on one CPU, two runs with the same seed are identical
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu, cuda or mps
    eval_every: int = 1_000  # steps between evaluations (at the end of an episode, like all that follow)
    picture_every: int = 400  # steps between pictures of one planning step
    checkpoint_every: int = 1_000  # steps between checkpoints; one is also written about every minute
    episodes: int = 10  # episodes per evaluation
    capture_video: bool = False  # save the first episode of each evaluation as a GIF
    run_dir: Optional[str] = None  # output folder; runs/<env>__<algorithm>__<seed>__<time> by default
    resume: Optional[str] = None  # continue the run in this folder with its own settings
    evaluate: Optional[str] = None  # do not train: play with the agent of this run folder

    def __post_init__(self):
        """tyro reports a ValueError raised here as one sentence and exits with code 2."""
        for name, value in vars(self).items():
            if type(value) in (int, float) and not (0 < value < math.inf or (value == 0 and name == "seed")):
                raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be a positive number")
        if self.beta > 1:
            raise ValueError(f"--beta {self.beta} exceeds 1")


PRESETS = {
    "pendulum": ("Pendulum-v1: swing up and balance within 2,000 steps", Args()),
    "reacher": ("Reacher-v5: a two-link arm to a random target", Args(
        "Reacher-v5", 3_000, candidates=200, horizon=15, sigma=0.2, beta=0.7, gamma=10.0, random_steps=500,
        refit_every=500, hidden=200, picture_every=500, episodes=20)),
    "halfcheetah": ("HalfCheetah-v5 at the official sizes: for a GPU", Args(
        "HalfCheetah-v5", 170_000, candidates=700, sigma=0.9, beta=0.9, gamma=1.0, random_steps=20_000,
        refit_every=3_000, batch_size=512, hidden=250, eval_every=15_000, picture_every=15_000, episodes=1)),
}  # fmt: skip


# ── The algorithm ─────────────────────────────────────────────────────────────────────────────────────────────────


class Ensemble(nn.Module):
    """f̂_θ: networks in one batched module. Each predicts the change of the state; inputs and outputs are normalised.
    Where the task's reward is unknown, it is one more coordinate, and the last output is the log-odds of an end."""

    def __init__(self, state_size: int, action_size: int, learn_reward: bool, args: Args):
        super().__init__()
        self.members, self.learn_reward, self.size = args.members, learn_reward, state_size + learn_reward
        widths = [state_size + action_size, *[args.hidden] * args.layers, self.size + learn_reward]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in pairwise(widths):  # Xavier's initialisation, different in each member
            std = (2 / (fan_in + fan_out)) ** 0.5
            self.weights.append(std * torch.randn(self.members, fan_in, fan_out))
            self.biases.append(torch.zeros(self.members, 1, fan_out))
        for name, size in (("input", widths[0]), ("target", self.size)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised inputs [B, N, D + A] → normalised targets [B, N, ·], log-odds of an end [B, N]."""
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, F.relu(x, inplace=True) if i else x, weight)  # one product for all members
        return x[..., : self.size], x[..., -1]

    def targets(self, data: "Transitions") -> Tensor:
        return torch.cat([data.s2 - data.s, data.r], -1) if self.learn_reward else data.s2 - data.s

    def normalised(self, data: "Transitions") -> tuple[Tensor, Tensor]:
        x = (torch.cat([data.s, data.a], -1) - self.input_mean) / self.input_std
        return x, (self.targets(data) - self.target_mean) / self.target_std.clamp(min=1e-6)


def ensemble_loss(model: Ensemble, x: Tensor, y: Tensor, terminated: Tensor) -> Tensor:
    """Each argument [B, N, ·], inputs and targets normalised: the sum over the members of their mean losses."""
    output, logit = model(x)
    # Section 3.1: maximum likelihood with a constant variance is least squares
    loss = (y - output).square().mean((1, 2)).sum()
    if model.learn_reward:
        loss = loss + F.binary_cross_entropy_with_logits(logit, terminated[..., 0]) * model.members
    return loss


def fit(model: Ensemble, optimizer: torch.optim.Optimizer, data: "Transitions", args: Args) -> float:
    """Step (5). Returns the mean loss per member."""
    std, mean = torch.std_mean(torch.cat([data.s, data.a], 1), 0, correction=0)
    model.input_mean.copy_(mean)
    model.input_std.copy_(torch.where(std > 1e-6, std, 1.0))
    std, mean = torch.std_mean(model.targets(data), 0, correction=0)
    model.target_mean.copy_(mean)
    model.target_std.copy_(std)  # 0 for what never changes, such as a goal: no error of a network may move it
    (x, y), losses = model.normalised(data), []
    for _ in range(args.epochs):
        # Section 3.1: the members differ by their first weights and by the order of their minibatches
        rows = torch.rand(model.members, len(x)).argsort(1).to(x.device)
        for batch in rows.split(args.batch_size, 1):
            loss = ensemble_loss(model, x[batch], y[batch], data.terminated[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses).mean().item() / model.members


def filtered_noise(u: Tensor, beta: float) -> Tensor:
    """White noise u [N, H, A] → noise n of the same shape that is smooth in time."""
    n, last = [], torch.zeros_like(u[:, 0])
    for u_t in u.unbind(1):
        # Eq. 4: n_t = β u_t + (1 − β) n_{t−1}, with n_{−1} = 0
        last = beta * u_t + (1 - beta) * last
        n.append(last)
    return torch.stack(n, 1)


class Agent(nn.Module):
    """Steps (2) and (3): the planner. Each plan starts from the rest of the last one; reset() begins an episode."""

    player = "planner"

    def __init__(self, env: gym.Env, args: Args):
        super().__init__()
        self.args, self.reward = args, REWARDS.get(args.env_id)
        self.model = Ensemble(*env.observation_space.shape, *env.action_space.shape, self.reward is None, args)
        self.to(args.device)
        self.low = torch.as_tensor(env.action_space.low, dtype=torch.float32, device=args.device)
        self.high = torch.as_tensor(env.action_space.high, dtype=torch.float32, device=args.device)
        self.reset()

    def reset(self) -> None:
        self.mean = ((self.low + self.high) / 2).repeat(self.args.horizon, 1)  # μ [H, A]

    def predict(self, s: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Next state, reward and end as each member predicts them: s [B, N, D], a [B, N, A]."""
        y, logit = self.model((torch.cat([s, a], -1) - self.model.input_mean) / self.model.input_std)
        change = y * self.model.target_std + self.model.target_mean
        # Section 3.1: ŝ_{t+1} = ŝ_t + f̂_θ(ŝ_t, a_t)
        s2 = s + change[..., : s.shape[-1]]
        if self.reward:
            return s2, self.reward(s, a, s2), torch.zeros_like(logit, dtype=torch.bool)
        return s2, change[..., -1], logit > 0

    @torch.inference_mode()
    def imagine(self, s: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """s [N, D], actions [N, H, A] → states [B, N, H, D] and returns [B, N] of each member, up to an end."""
        s, actions = (x.expand(self.model.members, *x.shape) for x in (s, actions))
        states, returns, alive = [], torch.zeros_like(s[..., 0]), torch.ones_like(s[..., 0])
        for a in actions.unbind(2):
            s, r, terminated = self.predict(s, a)
            returns, alive = returns + alive * r, alive * ~terminated
            states.append(s)
        return torch.stack(states, 2), returns

    def refine(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """One update of μ in state s [D]. Returns the candidates [N, H, A] and their weights [N]."""
        # Eq. 3: u_t ~ N(0, Σ)
        u = torch.randn(self.args.candidates, *self.mean.shape, device=s.device)
        noise = filtered_noise(self.args.sigma * (self.high - self.low) / 2 * u, self.args.beta)
        # Section 3.2: a_t = μ_t + n_t; R_k is the mean of the members' predictions
        actions = (self.mean + noise).clamp(self.low, self.high)
        _, returns = self.imagine(s.expand(len(actions), -1), actions)
        # A model may overflow far from its data: such a candidate is the worst of all.
        returns = returns.mean(0)
        returns = torch.where(returns.isfinite(), returns, -1e30)
        # Eq. 2: μ_t = Σ_k e^{γ R_k} a_t^k / Σ_j e^{γ R_j}; softmax subtracts the largest R, so that nothing overflows
        weights = torch.softmax(self.args.gamma * returns, 0)
        self.mean = torch.einsum("k,kta->ta", weights, actions).clamp(self.low, self.high)  # for rounding
        return actions, weights

    def forward(self, obs: np.ndarray) -> np.ndarray:
        self.refine(torch.as_tensor(obs, dtype=torch.float32, device=self.mean.device))
        a = self.mean[0].cpu().numpy()
        self.mean = torch.cat([self.mean[1:], self.mean[-1:]])
        return a


# ── What the model believes ───────────────────────────────────────────────────────────────────────────────────────


@torch.inference_mode()
def heldout_metrics(agent: Agent, replay: "Replay", first: int) -> dict[str, float]:
    """On the rows from `first` on, which the model has not been trained on yet; states in units of their std."""
    model, data, scale = agent.model, replay.rows(slice(first, None)), replay.rows().s.std(0).clamp(min=1e-6)
    batch = [column.expand(model.members, *column.shape) for column in (*model.normalised(data), data.terminated)]
    metrics = {
        "model/heldout_loss": ensemble_loss(model, *batch).item() / model.members,
        "model/disagreement": model(batch[0])[0].std(0, correction=0).mean().item(),
    }
    for h in (1, 5, 20):  # start in a real state and take the actions that were taken there, without looking
        starts = torch.nonzero((data.episode[: len(data.s) - h + 1] == data.episode[h - 1 :])[:, 0]).flatten()
        if len(starts):
            rows = starts[:, None] + torch.arange(h, device=starts.device)
            predicted = agent.imagine(data.s[starts], data.a[rows])[0][:, :, -1].mean(0)
            metrics[f"model/open_loop_error_{h}"] = ((predicted - data.s2[rows[:, -1]]) / scale).abs().mean().item()
    return metrics


@torch.inference_mode()
def draw_plan(agent: Agent, replay: "Replay") -> Figure:
    """A planning step of the last episode: the candidates, their weighted mean, and what then happened."""
    data = replay.rows()
    s = data.s[data.episode[:, 0] == data.episode[-1]]
    now = min(5, len(s) - 1)
    agent.reset()
    for obs in s[:now].cpu().numpy():  # plan as in the episode, up to the step that is drawn
        agent(obs)
    actions, weights = agent.refine(s[now])
    order = weights[:200].argsort()  # the heaviest candidate on top
    actions, weights = torch.cat([actions[order], agent.mean[None]]), (weights[order] / weights.max()).clamp(min=1e-3)
    states = agent.imagine(s[now].expand(len(actions), -1), actions)[0].mean(0).cpu()
    steps, happened = range(now + 1, now + 1 + states.shape[1]), s[now + 1 : now + 1 + states.shape[1]].cpu()
    figure = Figure(figsize=(8, 6), layout="constrained")
    grid = figure.subplots(min(4, s.shape[1]), sharex=True, squeeze=False)[:, 0]
    for i, axes in enumerate(grid):
        lines = [list(zip(steps, path, strict=True)) for path in states[:-1, :, i]]
        cloud = LineCollection(lines, array=weights.cpu(), cmap="YlOrRd", norm="log", linewidths=0.7)
        axes.add_collection(cloud)
        axes.plot(steps, states[-1, :, i], color="tab:blue", linewidth=3, label="prediction for the weighted mean")
        axes.plot(steps[: len(happened)], happened[:, i], "k--", label="what then happened")
        axes.set(ylabel=f"s[{i}]")
    axes.set_xlabel("step of the episode")
    figure.colorbar(cloud, ax=grid, label="candidates' predictions, coloured by weight (relative to the largest)")
    figure.legend(handles=axes.lines, loc="outside lower center", ncols=2)
    figure.suptitle(f"step {replay.size:,}: one plan of {agent.args.horizon} steps and its candidates")
    return figure


# ── Training ──────────────────────────────────────────────────────────────────────────────────────────────────────


def train(args: Args) -> None:
    torch.manual_seed(args.seed)
    env, test_env = make_env(args), make_env(args)
    agent, replay = Agent(env, args), Replay(args.total_timesteps, env, args.device)
    optimizer = torch.optim.Adam(agent.model.parameters(), args.learning_rate, fused=True)
    run = Run(args, agent=agent, optimizer=optimizer, replay=replay)

    while run.unfinished():
        obs, info = env.reset(seed=run.begin_episode())
        agent.reset()
        over = False
        while not over and run.step < args.total_timesteps:
            if run.step < args.random_steps:
                # (1) act at random at first
                a = torch.lerp(agent.low, agent.high, torch.rand_like(agent.low)).cpu().numpy()
            else:
                # (2) update the mean by the candidates' weighted mean, (3) execute only the first action
                a = agent(obs)
            next_obs, r, terminated, truncated, info = env.step(a)
            # (4) add the transition to the data
            replay.add(obs, a, r, next_obs, terminated, run.episode_start)
            obs, over = next_obs, terminated or truncated
            run.count_steps()
            # (5) regularly, train each network of the ensemble further
            if run.step >= args.random_steps and (run.step - args.random_steps) % args.refit_every == 0:
                if run.step > args.random_steps:
                    for tag, value in heldout_metrics(agent, replay, run.step - args.refit_every).items():
                        run.log(tag, value)
                run.log("losses/model", fit(agent.model, optimizer, replay.rows(), args))
        run.end_episode(info)
        if run.due(args.picture_every):
            with torch.random.fork_rng():
                run.picture(draw_plan(agent, replay))
        if run.due(args.eval_every):
            run.evaluate(agent, test_env)
    run.close()


# ── The task: rewards as functions of batches, for tasks that never terminate; elsewhere both are learned ─────────


def make_task(args: Args, **kwargs) -> gym.Env:
    env = gym.make(args.env_id, **kwargs)
    for name, space in (("observations", env.observation_space), ("actions", env.action_space)):
        if not (isinstance(space, gym.spaces.Box) and len(space.shape) == 1):
            hint = " gymnasium.wrappers.FlattenObservation makes one." if name == "observations" else ""
            raise UserError(f"the {name} of {env.spec.id} are {space}, and a vector of real numbers is needed.{hint}")
    if not env.action_space.is_bounded():
        raise UserError(f"the actions of {env.spec.id} are unbounded: use gymnasium.wrappers.TransformAction")
    return env


def pendulum_reward(s: Tensor, a: Tensor, s2: Tensor) -> Tensor:
    angle = torch.atan2(s[..., 1], s[..., 0])  # s = (cos θ, sin θ, θ'), upright at θ = 0
    return -(angle.square() + 0.1 * s[..., 2].square() + 0.001 * a[..., 0].square())


def reacher_reward(s: Tensor, a: Tensor, s2: Tensor) -> Tensor:
    return -s2[..., 8:10].norm(dim=-1) - a.square().sum(-1)  # s[8:10]: from the target to the fingertip


REWARDS = {"Pendulum-v1": pendulum_reward, "Reacher-v5": reacher_reward}


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


class Transitions(NamedTuple):
    s: Tensor
    a: Tensor
    r: Tensor
    s2: Tensor
    terminated: Tensor  # 1 if s2 is a terminal state, 0 at a time limit
    episode: Tensor  # the step at which the episode began


class Replay:
    """All transitions as the rows of one matrix."""

    def __init__(self, capacity: int, env: gym.Env, device: str):
        (state_size,), (action_size,) = env.observation_space.shape, env.action_space.shape
        self.widths = state_size, action_size, 1, state_size, 1, 1
        self.size, self.data = 0, torch.zeros(capacity, sum(self.widths), device=device)

    def add(self, *columns) -> None:
        row = np.hstack(columns)
        if not np.isfinite(row).all():
            raise UserError("the environment returned NaN or infinity as an observation or reward")
        self.data[self.size] = torch.from_numpy(row)
        self.size += 1

    def rows(self, index=slice(None)) -> Transitions:
        return Transitions(*self.data[: self.size][index].split(self.widths, -1))

    def state_dict(self) -> dict:
        return {"rows": self.data[: self.size].clone()}

    def load_state_dict(self, state: dict) -> None:
        self.size = len(state["rows"])
        self.data[: self.size] = state["rows"]


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
