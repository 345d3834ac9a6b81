# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "numpy>=2.0,<3", "gymnasium>=1.3,<2", "mujoco>=3.3,<5", "imageio>=2.34,<3", "tyro>=1.0.16,<2",
#     "tensorboard>=2.18,<3", "tqdm>=4.66,<5", "pillow>=11,<14", "matplotlib>=3.9,<4", "pygame-ce>=2.5,<3",
# ]
# ///
"""MPC-RS: plan with a learned model by trying thousands of random action sequences in it.

A network learns by regression how an action changes the state. To act, the agent samples K random action sequences,
predicts where each would lead in H steps, and executes the first action of the best one. It plans again in the next
state (model-predictive control by random shooting), and its own experience improves the network where it acts.

Paper: Nagabandi, Kahn, Fearing, Levine, "Neural Network Dynamics for Model-Based Deep Reinforcement Learning with
Model-Free Fine-Tuning", ICRA 2018, arXiv 1708.02596. Official code: github.com/nagaban2/nn_dynamics.

The algorithm (Algorithm 1 of the paper):
    (1) act at random and collect D_RAND
    (2) afterwards, in each state s_t, find the action sequence A_t with the best predicted return over H steps (Eq. 4)
    (3) execute only its first action a_t
    (4) add (s_t, a_t, s_{t+1}) to D_RL
    (5) when D_RAND is complete, and regularly afterwards, train f̂_θ on minibatches from D_RAND and D_RL (Eq. 2)

Symbols: f̂_θ → Network, K → candidates, H → horizon, D_RAND → the first random_steps rows of replay, D_RL → the others.

Usage (return: mean and 95 % interval over seeds; docs/mpc_rs.md has the curves):
    python algos/mpc_rs.py                                  # 5.2 minutes, return −189 [−214, −165]
    python algos/mpc_rs.py halfcheetah                      # not measured yet
    python algos/mpc_rs.py --env-id my_module:MyEnv-v0      # any Gymnasium task: its reward and end are learned too
    python algos/mpc_rs.py --evaluate runs/NAME --episodes 10 --capture-video

Differences from the paper and its code: only the model-based half, without the policy that imitates the planner; the
model is trained after a fixed number of steps, not of rollouts; means and standard deviations are those of all data,
where the code keeps those of D_RAND; new data serve as the validation set before the model is trained on them;
HalfCheetah's reward is not a function of Gymnasium's observation, so it is learned.
"""

import argparse
import io
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Optional

import gymnasium as gym
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

ALGORITHM = "mpc_rs"


@dataclass
class Args:  # tyro turns each field into a flag and each comment into its help
    env_id: str = "Pendulum-v1"  # any environment with vector observations and bounded continuous actions
    total_timesteps: int = 2_000  # environment steps, including the random ones
    candidates: int = 4_000  # K: random action sequences per environment step
    horizon: int = 15  # H: length of an action sequence
    random_steps: int = 200  # steps of random actions before the first training: D_RAND
    refit_every: int = 200  # environment steps between trainings of the model
    epochs: int = 30  # passes over D_RAND per training
    batch_size: int = 64  # transitions per minibatch
    new_fraction: float = 0.9  # share of D_RL in a minibatch
    data_noise: float = 0.01  # std of the noise on the normalised inputs and targets of the training
    learning_rate: float = 1e-3  # Adam's step size
    layers: int = 1  # hidden layers of the network
    hidden: int = 200  # units per hidden layer
    seed: int = 1  # on one CPU, two runs with the same seed are identical
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu, cuda or mps
    eval_every: int = 1_000  # steps between evaluations (at the end of an episode, like all that follow)
    picture_every: int = 400  # steps between pictures of predicted and real trajectories
    checkpoint_every: int = 1_000  # steps between checkpoints; one is also written about every minute
    episodes: int = 10  # episodes per evaluation
    capture_video: bool = False  # save the first episode of each evaluation as a GIF
    run_dir: Optional[str] = None  # output folder; runs/<env>__<algorithm>__<seed>__<time> by default
    resume: Optional[str] = None  # continue the run in this folder with its own settings
    evaluate: Optional[str] = None  # do not train: play with the agent of this run folder

    def __post_init__(self):
        """tyro reports a ValueError raised here as one sentence and exits with code 2."""
        may_be_zero = ("seed", "data_noise", "new_fraction")
        for name, value in vars(self).items():
            if type(value) in (int, float) and not (0 < value < math.inf or (value == 0 and name in may_be_zero)):
                raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be a positive number")
        if round(self.new_fraction * self.batch_size) >= self.batch_size:
            raise ValueError(f"--new-fraction {self.new_fraction} leaves no room for D_RAND in a minibatch")


PRESETS = {
    "pendulum": ("Pendulum-v1: swing up and balance within 2,000 steps", Args()),
    "halfcheetah": ("HalfCheetah-v5 at the paper's sizes: for a GPU", Args(
        "HalfCheetah-v5", 73_000, candidates=1_000, horizon=20, random_steps=10_000, refit_every=9_000, epochs=60,
        batch_size=512, layers=2, hidden=500, eval_every=9_000, picture_every=9_000, episodes=1)),
}  # fmt: skip


# ── The algorithm ─────────────────────────────────────────────────────────────────────────────────────────────────


class Network(nn.Module):
    """f̂_θ: predicts the change of the state; inputs and outputs are normalised. Where the task's reward is unknown,
    the reward is one more coordinate, and the last output is the log-odds that the episode ends."""

    def __init__(self, state_size: int, action_size: int, learn_reward: bool, args: Args):
        super().__init__()
        self.learn_reward, self.size = learn_reward, state_size + learn_reward
        widths = [state_size + action_size, *[args.hidden] * args.layers, self.size + learn_reward]
        self.layers = nn.ModuleList(nn.Linear(fan_in, fan_out) for fan_in, fan_out in pairwise(widths))
        for layer in self.layers:
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        for name, size in (("input", widths[0]), ("target", self.size)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised inputs [N, D + A] → normalised targets [N, ·], log-odds of an end [N]."""
        for i, layer in enumerate(self.layers):
            x = layer(F.relu(x, inplace=True) if i else x)
        return x[..., : self.size], x[..., -1]

    def targets(self, data: "Transitions") -> Tensor:
        # Section IV-A: the change s_{t+1} − s_t, because s_{t+1} itself hardly differs from s_t
        return torch.cat([data.s2 - data.s, data.r], -1) if self.learn_reward else data.s2 - data.s

    def normalised(self, data: "Transitions") -> tuple[Tensor, Tensor]:
        x = (torch.cat([data.s, data.a], -1) - self.input_mean) / self.input_std
        return x, (self.targets(data) - self.target_mean) / self.target_std.clamp(min=1e-6)


def network_loss(model: Network, x: Tensor, y: Tensor, terminated: Tensor) -> Tensor:
    """Normalised inputs x [N, D + A] and targets y [N, ·], terminated [N, 1]."""
    output, logit = model(x)
    # Eq. 2: E(θ) = 1/|D| Σ ½ ‖(s_{t+1} − s_t) − f̂_θ(s_t, a_t)‖²
    loss = 0.5 * (y - output).square().sum(-1).mean()
    if model.learn_reward:
        loss = loss + F.binary_cross_entropy_with_logits(logit, terminated[..., 0])
    return loss


def minibatches(rows: int, args: Args) -> Iterator[Tensor]:
    """The rows of each minibatch of one epoch, which passes once over D_RAND and samples the rest from D_RL."""
    on = {"device": args.device}
    new = min(round(args.new_fraction * args.batch_size), rows - args.random_steps)  # at first D_RL is small
    old = min(args.batch_size - new, args.random_steps)
    for chunk in torch.randperm(args.random_steps, **on)[: args.random_steps // old * old].split(old):
        yield torch.cat([chunk, torch.randint(args.random_steps, max(rows, args.random_steps + 1), (new,), **on)])


def fit(model: Network, optimizer: torch.optim.Optimizer, data: "Transitions", args: Args) -> float:
    """Step (5). Returns the mean loss."""
    std, mean = torch.std_mean(torch.cat([data.s, data.a], 1), 0, correction=0)
    model.input_mean.copy_(mean)
    model.input_std.copy_(torch.where(std > 1e-6, std, 1.0))
    std, mean = torch.std_mean(model.targets(data), 0, correction=0)
    model.target_mean.copy_(mean)
    model.target_std.copy_(std)  # 0 for what never changes, such as a goal: no error of the network may move it
    (x, y), losses = model.normalised(data), []
    for _ in range(args.epochs):
        for batch in minibatches(len(x), args):
            # Section IV-B: Gaussian noise on inputs and targets
            noisy_x, noisy_y = (v[batch] + args.data_noise * torch.randn_like(v[batch]) for v in (x, y))
            loss = network_loss(model, noisy_x, noisy_y, data.terminated[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses).mean().item()


class Agent(nn.Module):
    """Steps (2) and (3): the planner. It keeps nothing from one step to the next."""

    player = "planner"

    def __init__(self, env: gym.Env, args: Args):
        super().__init__()
        self.args, self.reward = args, REWARDS.get(args.env_id)
        self.model = Network(*env.observation_space.shape, *env.action_space.shape, self.reward is None, args)
        self.to(args.device)
        self.low = torch.as_tensor(env.action_space.low, dtype=torch.float32, device=args.device)
        self.high = torch.as_tensor(env.action_space.high, dtype=torch.float32, device=args.device)

    def reset(self) -> None:
        pass

    def predict(self, s: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Next state, reward and end of rows [N, ·]."""
        y, logit = self.model((torch.cat([s, a], -1) - self.model.input_mean) / self.model.input_std)
        change = y * self.model.target_std + self.model.target_mean
        # Section IV-A: ŝ_{t+1} = ŝ_t + f̂_θ(ŝ_t, a_t)
        s2 = s + change[..., : s.shape[-1]]
        if self.reward:
            return s2, self.reward(s, a, s2), torch.zeros_like(logit, dtype=torch.bool)
        return s2, change[..., -1], logit > 0

    @torch.inference_mode()
    def imagine(self, s: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """s [N, D], actions [N, H, A] → states [N, H, D] and returns [N], counted up to a terminal state."""
        states, returns, alive = [], torch.zeros(len(s), device=s.device), torch.ones(len(s), device=s.device)
        for a in actions.unbind(1):
            s, r, terminated = self.predict(s, a)
            returns, alive = returns + alive * r, alive * ~terminated
            states.append(s)
        return torch.stack(states, 1), returns

    def forward(self, obs: np.ndarray) -> np.ndarray:
        args, s = self.args, torch.as_tensor(obs, dtype=torch.float32, device=self.low.device)
        noise = torch.rand(args.candidates, args.horizon, len(self.low), device=s.device)
        actions = torch.lerp(self.low, self.high, noise)
        # Eq. 4: A_t^(H) = argmax Σ_{t'=t}^{t+H−1} r(ŝ_{t'}, a_{t'})
        _, returns = self.imagine(s.expand(args.candidates, -1), actions)
        # A model may overflow far from its data: such a candidate is the worst of all.
        best = torch.where(returns.isfinite(), returns, -1e30).argmax(0, keepdim=True)
        return actions[best, 0][0].cpu().numpy()


# ── What the model believes ───────────────────────────────────────────────────────────────────────────────────────


@torch.inference_mode()
def heldout_metrics(agent: Agent, replay: "Replay", first: int) -> dict[str, float]:
    """On the rows from `first` on, which the model has not been trained on yet; states in units of their std."""
    data, scale = replay.rows(slice(first, None)), replay.rows().s.std(0).clamp(min=1e-6)
    metrics = {"model/heldout_loss": network_loss(agent.model, *agent.model.normalised(data), data.terminated).item()}
    for h in (1, 5, 20):  # start in a real state and take the actions that were taken there, without looking
        starts = torch.nonzero((data.episode[: len(data.s) - h + 1] == data.episode[h - 1 :])[:, 0]).flatten()
        if len(starts):
            rows = starts[:, None] + torch.arange(h, device=starts.device)
            states, _ = agent.imagine(data.s[starts], data.a[rows])
            # Eq. 3: E_val^(H) = 1/|D_val| Σ 1/H Σ_{h=1}^H ½ ‖s_{t+h} − ŝ_{t+h}‖²
            errors = 0.5 * ((states - data.s2[rows]) / scale).square().sum(-1)
            metrics[f"model/open_loop_error_{h}"] = errors.mean().item()
    return metrics


@torch.inference_mode()
def draw_predictions(agent: Agent, replay: "Replay") -> Figure:
    """The last episode (black), and predictions for its actions (orange), each from the real state at a dot."""
    data, horizon = replay.rows(), agent.args.horizon
    s, a = (column[data.episode[:, 0] == data.episode[-1]][:100] for column in (data.s, data.a))
    figure = Figure(figsize=(8, 6), layout="constrained")
    for i, axes in enumerate(figure.subplots(min(4, s.shape[1]), sharex=True, squeeze=False)[:, 0]):
        axes.plot(s[:, i].cpu(), color="black", linewidth=3)
        for t in range(0, len(s), horizon):
            states, _ = agent.imagine(s[t : t + 1], a[None, t : t + horizon])
            predicted = torch.cat([s[t : t + 1], states[0]])[:, i].cpu()
            axes.plot(range(t, t + len(predicted)), predicted, "o-", color="tab:orange", markevery=[0])
        margin = 0.3 * (s[:, i].max() - s[:, i].min()).item() + 1e-3
        axes.set(ylabel=f"s[{i}]", ylim=(s[:, i].min().item() - margin, s[:, i].max().item() + margin))
    axes.set_xlabel("step of the episode")
    labels = ["what happened", f"predicted from the state at the dot, {horizon} steps without looking"]
    figure.legend(axes.lines[:2], labels, loc="outside lower center", ncols=2)
    figure.suptitle(f"step {replay.size:,}: the last episode and the model's predictions for its actions")
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
                # (1) act at random and collect D_RAND
                a = torch.lerp(agent.low, agent.high, torch.rand_like(agent.low)).cpu().numpy()
            else:
                # (2) find the action sequence with the best predicted return, (3) execute only its first action
                a = agent(obs)
            next_obs, r, terminated, truncated, info = env.step(a)
            # (4) add the transition to D_RL
            replay.add(obs, a, r, next_obs, terminated, run.episode_start)
            obs, over = next_obs, terminated or truncated
            run.count_steps()
            # (5) train the network on minibatches from D_RAND and D_RL
            if run.step >= args.random_steps and (run.step - args.random_steps) % args.refit_every == 0:
                if run.step > args.random_steps:
                    for tag, value in heldout_metrics(agent, replay, run.step - args.refit_every).items():
                        run.log(tag, value)
                run.log("losses/model", fit(agent.model, optimizer, replay.rows(), args))
        run.end_episode(info)
        if run.due(args.picture_every):
            with torch.random.fork_rng():
                run.picture(draw_predictions(agent, replay))
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


REWARDS = {"Pendulum-v1": pendulum_reward}


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
