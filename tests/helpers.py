"""Run a script as a user would, and read what it left."""

import math
import os
import subprocess
import sys
from pathlib import Path

import house
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

ROOT = Path(__file__).resolve().parent.parent
LEAN = sorted(house.LEAN & {path.stem for path in (ROOT / "algos").glob("*.py")})
CLOCK_TAGS = ("time/", "charts/SPS")  # what depends on the clock and not on the seed


def module(name: str):
    return house.load(ROOT / "algos" / f"{name}.py")


def run(name: str, flags: str, run_dir: Path | None = None) -> Path:
    """In this process."""
    argv = [*flags.split(), "--no-progress", *(["--run-dir", str(run_dir)] if run_dir else [])]
    module(name).main(argv)
    return run_dir


def command(name: str, *flags: object, cwd: Path | None = None, script: Path | None = None) -> subprocess.Popen:
    """In a process of its own."""
    script = script or ROOT / "algos" / f"{name}.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    return subprocess.Popen(
        [sys.executable, str(script), *map(str, flags)],
        cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def scalars(run_dir: Path, clock: bool = False) -> dict[str, dict[int, float]]:
    """tag → {step: value}; of a step taken twice the second taking, as TensorBoard shows it."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    found = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    for tag in events.Tags()["tensors"]:
        if "hyperparameters" not in tag:
            found[tag] = {e.step: float(make_ndarray(e.tensor_proto)) for e in events.Tensors(tag)}
    return {tag: curve for tag, curve in found.items() if clock or not tag.startswith(CLOCK_TAGS)}


def tags(run_dir: Path) -> set[str]:
    events = EventAccumulator(str(run_dir)).Reload().Tags()
    return {tag for kind in ("scalars", "tensors", "images") for tag in events[kind] if "hyperparameters" not in tag}


def checkpoint(run_dir: Path) -> dict:
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def tags_on_page(name: str) -> set[str]:
    """The tags that a file's page explains."""
    return house.tags_on(ROOT / "docs" / f"{name}.md")


def leaves(tree: object, path: str = "") -> dict[str, object]:
    """A nested checkpoint, flat: path → number, string or tensor."""
    if isinstance(tree, dict):
        return {k: v for key, x in tree.items() for k, v in leaves(x, f"{path}/{key}").items()}
    if isinstance(tree, list | tuple):
        return {k: v for key, x in enumerate(tree) for k, v in leaves(x, f"{path}/{key}").items()}
    return {path: tree}


def differences(a: object, b: object) -> list[str]:
    """Where two checkpoints are not the same to the bit."""
    a, b = leaves(a), leaves(b)

    def same(x: object, y: object) -> bool:
        if isinstance(x, torch.Tensor):
            return isinstance(y, torch.Tensor) and x.dtype == y.dtype and torch.equal(x, y)
        return x == y or (isinstance(x, float) and isinstance(y, float) and math.isnan(x) and math.isnan(y))

    return sorted(key for key in a.keys() | b.keys() if key not in a or key not in b or not same(a[key], b[key]))
