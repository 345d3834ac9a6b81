"""How well agents of muzero.py and gumbel_muzero.py play their board games, measured exactly where it can be.

    python benchmarks/muzero_figures.py runs/NAME runs/OTHER --games 200 --save

Each agent plays without noise, and begins half of the games. Its opponents move at random; perfectly (tic-tac-toe); or
by minimax over the next --depth moves (Connect Four). In tic-tac-toe, every position of the game shows how often the
network's policy alone, and the search, give away what perfect play would have. --save writes the measures to
benchmarks/results/muzero_boards.csv.
"""

import importlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated

import gymnasium as gym
import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "algos"), str(ROOT / "benchmarks")]
from report import write_csv  # noqa: E402

BATCH = 512  # positions that are searched at the same time


@dataclass
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]  # run folders
    games: int = 200  # games against each opponent
    depth: int = 2  # moves that minimax looks ahead in Connect Four: 1 wins if it can, 2 also prevents a win
    save: bool = False  # write benchmarks/results/muzero_boards.csv


class Minimax:
    """An opponent that looks `depth` moves ahead on a board of its own, and chooses at random among the best moves."""

    def __init__(self, game: gym.Env, depth: float):
        self.game, self.depth, self.known, self.rng = game, depth, {}, np.random.default_rng(0)

    def values(self, stones: np.ndarray, depth: float) -> dict[int, float]:
        """Legal action → 1 if the player to move wins, −1 if it loses, and 0 for draws and beyond the depth."""
        if (key := (stones.tobytes(), depth)) not in self.known:
            self.known[key] = {}
            for action in self.game.legal(stones[None])[0].nonzero()[0].tolist():
                self.game.stones = stones
                won, over = self.game.move(action)
                ahead = not over and depth > 1
                answer = max(self.values(self.game.stones, depth - 1).values()) if ahead else 0.0
                self.known[key][action] = float(won) - answer
        return self.known[key]

    def best(self, stones: np.ndarray) -> list[int]:
        values = self.values(stones, self.depth)
        return [action for action, value in values.items() if value == max(values.values())]

    def __call__(self, stones: np.ndarray) -> int:
        return int(self.rng.choice(self.best(stones)))


def choose(module: ModuleType, agent: torch.nn.Module, obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[B, ...] → [B], [B]: what the policy chooses without the search, and what the search chooses."""
    parts = []
    for i in range(0, len(obs), BATCH):
        found = module.search(agent, obs[i : i + BATCH])
        action = found.action if hasattr(found, "action") else found.visits.argmax(1)
        parts.append((found.prior.argmax(1), action))
    return tuple(map(np.concatenate, zip(*parts, strict=True)))


def play(module: ModuleType, agent: torch.nn.Module, opponent: Callable | None, games: int) -> np.ndarray:
    """Games that are searched together → [2, 3]: wins, draws and losses where the agent begins, and where it does not.
    Without an opponent the environment answers at random."""
    envs = [module.make_env(agent.args) for _ in range(games)]
    obs, returns, going = [], [0] * games, [*range(games)]
    for i, env in enumerate(envs):
        task, answer = env.unwrapped, opponent or env.unwrapped.random_move
        task.opponent = None  # reset() begins with an empty board
        obs.append(env.reset(seed=i)[0])
        if i % 2:
            task.move(answer(task.stones))
            obs[i] = task.stones
        task.opponent = answer
    while going:
        _, actions = choose(module, agent, np.stack([obs[i] for i in going]))
        for i, action in zip([*going], actions.tolist(), strict=True):
            obs[i], reward, over, _, _ = envs[i].step(action)
            if over:
                returns[i] = round(reward)
                going.remove(i)
    return np.array([[returns[side::2].count(r) for r in (1, 0, -1)] for side in (0, 1)])


def mistakes(module: ModuleType, agent: torch.nn.Module, perfect: Minimax) -> tuple[int, list[float]]:
    """The number of positions of the game, and the shares of them in which a random move, the policy, and the search
    give something away."""
    perfect.values(np.zeros((2, 3, 3), np.float32), math.inf)  # visits all positions
    obs = np.stack([np.frombuffer(key, np.float32).reshape(2, 3, 3) for key, _ in perfect.known])
    best = [perfect.best(stones) for stones in obs]
    wrong = [[a not in good for a, good in zip(moves, best, strict=True)] for moves in choose(module, agent, obs)]
    chance = [1 - len(good) / len(values) for good, values in zip(best, perfect.known.values(), strict=True)]
    return len(obs), np.mean([chance, *wrong], 1).tolist()


def measure(folder: Path, args: Args) -> list[list]:
    """Measures of a run: name and value."""
    algorithm = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)["algorithm"]
    module = importlib.import_module(algorithm)
    agent = module.load_policy(str(folder))
    game, rows = module.make_env(agent.args).unwrapped, []
    if not hasattr(game, "opponent"):
        sys.exit(f"{folder} plays {agent.args.env_id}, which is not a board game")
    small = game.observation_space.shape == (2, 3, 3)
    strong = Minimax(game, math.inf if small else args.depth)
    opponents = {"random": None, "perfect" if small else f"minimax {args.depth}": strong}
    print(f"\n{folder}: {algorithm}, {agent.args.env_id}, {agent.args.simulations} simulations\n")
    print("| opponent | begins | won | drawn | lost |\n|-|-|-|-|-|")
    for name, opponent in opponents.items():
        for side, counts in zip(("agent", "opponent"), play(module, agent, opponent, args.games), strict=True):
            print(f"| {name} | {side} | {' | '.join(map(str, counts))} |", flush=True)
            for what, count in zip(("won", "drawn", "lost"), counts, strict=True):
                rows.append([f"{name}/{side} begins/{what}", count])
    if small:
        count, shares = mistakes(module, agent, strong)
        print(f"\n| of {count:,} positions | mistakes |\n|-|-|")
        for name, share in zip(("random moves", "policy", "search"), shares, strict=True):
            print(f"| {name} | {share:.2%} |")
            rows.append([f"mistakes/{name}", f"{share:.5f}"])
    return rows


def main(args: Args) -> None:
    if not args.runs:
        sys.exit("name at least one run folder")
    rows = [[folder.name, *row] for folder in args.runs for row in measure(folder, args)]
    if args.save:
        write_csv(ROOT / "benchmarks" / "results" / "muzero_boards.csv", ("run", "measure", "value"), rows)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
