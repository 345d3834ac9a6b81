"""What a VIN is compared with on docs/vin.md, and the film of its sweeps.

    python benchmarks/vin_figures.py controls                    # the paper's reactive networks, in 16 × 16 mazes
    python benchmarks/vin_figures.py larger --run runs/NAME      # a trained VIN in the next larger mazes
    python benchmarks/vin_figures.py film --run runs/NAME        # docs/figures/vin_sweeps.gif

The controls are trained by vin.py's own loop, with their networks in the place of its planner. Each run is one with the
settings of --flags. Their tables are printed.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Optional

import matplotlib
import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "algos"))
import vin
from figure_runs import curve, interval

ROOT = Path(__file__).resolve().parent.parent
LARGER = {"Maze8-v0": ("Maze16-v0", 20), "Maze16-v0": ("Maze28-v0", 36)}  # and K there


@dataclass
class Args:
    name: Annotated[Literal["controls", "larger", "film"], tyro.conf.Positional]  # which experiment
    run: Optional[Path] = None  # folder of a trained VIN
    seeds: int = 1  # runs of each control
    flags: str = (
        "maze16 --total-timesteps 33000 --hold-steps 16500 --decay-steps 16500 --test-mazes 200 --eval-every 33000"
    )  # settings of the controls
    out: Path = ROOT  # figures are written under this folder


class Reactive(vin.Agent):
    """A network without a plan: `plan` returns the image, and `attend` sees it from each of the cells."""

    def __init__(self, env, args: vin.Args):
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


def controls(args: Args) -> None:
    print("| network | success rate | trajectory difference | prediction loss |\n|-|-|-|-|")
    planner = vin.Agent
    for network in (FCN, CNN):
        scores = []
        for seed in range(1, args.seeds + 1):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    vin.Agent = network
                    vin.main([*args.flags.split(), "--seed", str(seed), "--run-dir", folder])
                finally:
                    vin.Agent = planner
                tags = ("success_rate", "trajectory_difference", "prediction_loss")
                scores.append([curve(Path(folder), f"eval/{tag}")[-1][1] for tag in tags])
        mean, half = interval(np.array(scores))
        cells = " | ".join(f"{m:.3f} ± {h:.3f}" for m, h in zip(mean, half, strict=True))
        print(f"| {network.__name__} | {cells} |")


def unseen(env_id: str, count: int) -> vin.Mazes:
    torch.manual_seed(0)
    return vin.label(*vin.make_env(vin.Args(env_id=env_id)).unwrapped.sample(count, test=True), 7)


def larger(args: Args) -> None:
    agent, env_id = vin.load_policy(str(args.run)), vin.load_checkpoint(str(args.run))["args"].env_id
    env_id, agent.iterations = LARGER[env_id]
    success = vin.heldout_metrics(agent, unseen(env_id, 1_000))["eval/success_rate"]
    print(f"{args.run} in {env_id} with K = {agent.iterations}: {success:.3f}")


@torch.inference_mode()
def film(args: Args) -> None:
    """V̄ in three mazes after 0, 1, ... K sweeps."""
    agent, env_id = vin.load_policy(str(args.run)), vin.load_checkpoint(str(args.run))["args"].env_id
    images = unseen(env_id, 3).images
    values = [torch.zeros_like(images[:, 0])]
    values += [agent.plan(images, k - 1).amax(1) for k in range(1, agent.iterations + 1)]
    values = torch.stack(values)  # [K + 1, 3, n, n]
    low, high = values.amin((0, 2, 3), keepdim=True), values.amax((0, 2, 3), keepdim=True)
    pictures = matplotlib.colormaps["viridis"](((values - low) / (high - low)).numpy())[..., :3]
    cell = 200 // images.shape[-1]
    pictures = (255 * pictures).astype(np.uint8).repeat(cell, 2).repeat(cell, 3)
    pictures = np.pad(pictures, ((0, 0), (0, 0), (0, 0), (0, 6), (0, 0)), constant_values=255)
    frames = [Image.fromarray(np.concatenate(list(frame), 1)) for frame in pictures]
    path = args.out / "docs" / "figures" / "vin_sweeps.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=250, loop=0)


def main(args: Args) -> None:
    if args.name != "controls" and args.run is None:
        sys.exit(f"{args.name} needs --run, the folder of a trained VIN")
    {"controls": controls, "larger": larger, "film": film}[args.name](args)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
