"""The figure of docs/pets.md that separates the two kinds of uncertainty: python benchmarks/pets_figures.py"""

import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "algos"))
import pets

FIGURE = Path(__file__).resolve().parent.parent / "docs" / "figures" / "pets_toy.png"


def true_noise(s: np.ndarray) -> np.ndarray:
    return 0.05 + 0.2 / (1 + np.exp(-3 * s))


def main(path: Path = FIGURE, epochs: int = 200) -> None:
    """s' − s = sin 2s + noise(s), observed only on [−2, −0.3] and [0.7, 2.5]."""
    torch.manual_seed(0)
    rng, env = np.random.default_rng(0), gym.Env()
    env.observation_space, env.action_space = gym.spaces.Box(-9, 9, (1,)), gym.spaces.Box(-1, 1, (1,))
    replay = pets.Replay(1_000, env, "cpu")
    for s in np.concatenate([rng.uniform(-2, -0.3, 500), rng.uniform(0.7, 2.5, 500)]):
        replay.add(s, 0.0, 0.0, s + np.sin(2 * s) + true_noise(s) * rng.normal(), False, 0)
    args = pets.Args(epochs=epochs, batch_size=64, hidden=64, weight_decay=(1e-4,) * 3)
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
    right.plot(s, true_noise(s), "k--", linewidth=1, label="true noise")
    right.plot(s, np.sqrt((std**2).mean(0)), label="aleatoric: predicted noise")
    right.plot(s, mean.std(0), label="epistemic: disagreement of the means")
    for low, high in ((-2, -0.3), (0.7, 2.5)):
        right.axvspan(low, high, color="gray", alpha=0.15)
    right.set(xlabel="s", ylabel="standard deviation", ylim=(0, 1), title="Two kinds of uncertainty")
    for axes in (left, right):
        axes.legend(fontsize=8, loc="upper right" if axes is left else "upper left")
    figure.savefig(path)


if __name__ == "__main__":
    main()
