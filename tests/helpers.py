"""Load a script, run it as a user would, and read what it left."""

import ast
import importlib.util
import math
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

ROOT = Path(__file__).resolve().parent.parent
NAMES = sorted(path.stem for path in (ROOT / "algos").glob("*.py"))
TABULAR = [name for name in NAMES if "import torch" not in (ROOT / "algos" / f"{name}.py").read_text()]  # take seconds
TRAINED = [name for name in NAMES if name not in TABULAR]
TAG = re.compile(r"(?:charts|eval|losses|model|time)/[\w*]+")
CLOCK_TAGS = ("time/", "charts/SPS")  # what depends on the clock and not on the seed


def load(path: Path):
    """A script as a module; the same module each time."""
    return sys.modules.get(module_name(path)) or load_again(path)


def module_name(path: Path) -> str:
    return f"{path.stem}_{abs(hash(path))}"


def load_again(path: Path):
    name, before = module_name(path), sys.modules.get(module_name(path))
    spec = importlib.util.spec_from_file_location(name, path)
    made = sys.modules[name] = importlib.util.module_from_spec(spec)  # where its dataclasses look for their types
    spec.loader.exec_module(made)
    sys.modules[name] = before or made
    return made


def module(name: str):
    return load(ROOT / "algos" / f"{name}.py")


def header(path: Path) -> dict:
    """The PEP 723 block."""
    block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", path.read_text())
    return tomllib.loads(re.sub(r"^# ?", "", block[1], flags=re.M))


def requirements() -> dict[str, str]:
    """Package → its line in requirements.txt, without the comment."""
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    return {re.match(r"[\w-]+", line)[0]: line for line in lines if line}


def tags_in(path: Path) -> set[str]:
    """The TensorBoard tags that a script can write, with a * for what an f-string fills in."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    strings = [node for node in nodes if isinstance(node, ast.JoinedStr)]
    parts = {id(part) for node in strings for part in node.values}
    tags = {"".join(x.value if isinstance(x, ast.Constant) else "*" for x in node.values) for node in strings}
    tags |= {x.value for x in nodes if isinstance(x, ast.Constant) and isinstance(x.value, str) and id(x) not in parts}
    return {tag for tag in tags if TAG.fullmatch(tag)}


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
    """The tags that a file's page explains: the first cell of each row of its table of metrics."""
    section = (ROOT / "docs" / f"{name}.md").read_text().split("## Logged metrics")[-1].split("\n## ")[0]
    cells = re.findall(r"^\|([^|]+)\|", section, flags=re.M)
    return {tag for cell in cells for tag in re.findall(r"`([^`]+)`", cell) if TAG.fullmatch(tag)}


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
