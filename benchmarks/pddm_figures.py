"""PDDM's planner against CEM and random shooting on Reacher-v5, in the same models and on the same episodes.

    python benchmarks/pddm_figures.py

For each seed, `pddm.py reacher` collects the data and trains the ensemble. Then each planner acts with this ensemble
in the same test episodes; each imagines as many steps per environment step. Runs stay in the folder --runs, and one
that is finished is not made again. Writes benchmarks/results/pddm_reacher.csv and docs/figures/pddm_reacher.png.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "algos"))
import pddm
import pets
from figure_runs import interval

ROOT = Path(__file__).resolve().parent.parent
ITERATIONS = 4  # of CEM, each with a quarter of the candidates
ELITES = 0.2  # share of the candidates


@dataclass
class Args:
    seeds: int = 5  # training runs
    episodes: int = 10  # test episodes per run and planner
    runs: Path = Path("runs/pddm_figures")  # where the runs are kept
    flags: str = ""  # further settings of every run, such as --flags="--hidden 100"
    out: Path = ROOT  # the results are written under this folder


class RandomShooting:
    """As mpc_rs.py plans, with the mean return over the ensemble."""

    def __init__(self, agent: pddm.Agent):
        self.agent, self.args, self.low, self.high = agent, agent.args, agent.low, agent.high
        agent.reset()
        self.centre = agent.mean

    def reset(self) -> None:
        pass

    def returns_of(self, actions: torch.Tensor) -> torch.Tensor:
        _, returns = self.agent.imagine(self.s.expand(len(actions), -1), actions)
        return returns.mean(0)

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        self.s = torch.as_tensor(obs, dtype=torch.float32, device=self.low.device)
        noise = torch.rand(self.args.candidates, *self.centre.shape, device=self.low.device)
        actions = torch.lerp(self.low, self.high, noise)
        return actions[self.returns_of(actions).argmax(), 0].cpu().numpy()


class Cem(RandomShooting):
    """As pets.py plans, with its smoothing and its warm start."""

    def __init__(self, agent: pddm.Agent):
        super().__init__(agent)
        candidates = self.args.candidates // ITERATIONS
        self.settings = pets.Args(candidates=candidates, elites=round(ELITES * candidates), iterations=ITERATIONS)
        self.reset()

    def reset(self) -> None:
        self.mean = self.centre

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        self.s = torch.as_tensor(obs, dtype=torch.float32, device=self.low.device)
        plan = pets.cem(self.returns_of, self.mean, self.low, self.high, self.settings)
        self.mean = torch.cat([plan[1:], self.centre[:1]])
        return plan[0].cpu().numpy()


PLANNERS = {"PDDM": lambda agent: agent, "CEM": Cem, "random shooting": RandomShooting}


def play(planner, env: gym.Env, episodes: int) -> list[float]:
    returns = []
    torch.manual_seed(0)
    for episode in range(episodes):
        obs, info = env.reset(seed=10_000 + episode)
        planner.reset()
        while "episode" not in info:
            obs, _, _, _, info = env.step(planner(obs))
        returns.append(float(info["episode"]["r"]))
    return returns


def main(args: Args) -> None:
    scores = {name: [] for name in PLANNERS}
    for seed in range(1, args.seeds + 1):
        folder = args.runs / f"reacher_{seed}"
        if not (folder / "finished").exists():
            begin = f"reacher --seed {seed} --eval-every 1000000 --episodes 1 {args.flags} --run-dir {folder}"
            pddm.main((f"--resume {folder}" if (folder / "checkpoint.pt").exists() else begin).split())
            (folder / "finished").touch()
        agent = pddm.load_policy(folder)
        env = pddm.make_env(agent.args)
        for name, make in PLANNERS.items():
            scores[name].append(np.mean(play(make(agent), env, args.episodes)))
            print(f"seed {seed}, {name}: {scores[name][-1]:.2f}", flush=True)

    figure = Figure(figsize=(5, 4), layout="constrained", dpi=100)
    axes = figure.add_subplot(ylabel="mean return of the test episodes", title="Reacher-v5, same model and budget")
    for each in zip(*scores.values(), strict=True):
        axes.plot(list(PLANNERS), each, "o-", color="gray", linewidth=0.7, markersize=3)
    for name, samples in scores.items():
        mean, half = interval(np.array(samples))
        axes.errorbar([name], [mean], [half], fmt="s", color="tab:blue", capsize=5)
        print(f"| {name} | {', '.join(f'{x:.2f}' for x in samples)} | {mean:.2f} ± {half:.2f} |")
    (args.out / "docs" / "figures").mkdir(parents=True, exist_ok=True)
    (args.out / "benchmarks" / "results").mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / "docs" / "figures" / "pddm_reacher.png")
    with open(args.out / "benchmarks" / "results" / "pddm_reacher.csv", "w", newline="") as file:
        rows = [[name, seed, f"{x:.4f}"] for name, samples in scores.items() for seed, x in enumerate(samples, 1)]
        csv.writer(file, lineterminator="\n").writerows([["planner", "seed", "return"], *rows])


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
