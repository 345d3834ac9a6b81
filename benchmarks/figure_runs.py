"""What the figure scripts share: runs of several seeds, their curves, and intervals over the seeds.

A run that is there and finished is not made again; one that was stopped continues.
"""

import importlib.util
import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import ModuleType

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

sys.path.insert(0, str(Path(__file__).resolve().parent))
from run import place, train


def train_all(
    script: str, variants: dict[str, str], seeds: int, runs: Path, workers: int, first: int = 1
) -> dict[str, list[Path]]:
    """Every variant (label → command line) with every seed from `first` on: label → its finished run folders. Ctrl-C
    stops each run at a checkpoint."""
    every = {label: [place(script, flags, first + i, runs) for i in range(seeds)] for label, flags in variants.items()}
    jobs = [of_one[i] for i in range(seeds) for of_one in every.values()]
    stopping = threading.Event()
    with ThreadPoolExecutor(workers) as pool:
        done = [pool.submit(train, job, to_stop=stopping.is_set) for job in jobs]
        try:
            for number, one in enumerate(as_completed(done), 1):
                one.result()
                print(f"{number} of {len(jobs)} runs done", flush=True)
        except BaseException:
            stopping.set()
            pool.shutdown(cancel_futures=True)
            raise
    return {label: [run.folder for run in of_one] for label, of_one in every.items()}


def load(name: str) -> ModuleType:
    """A file of algos/ as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).resolve().parent.parent / "algos" / f"{name}.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0}).Reload()
    if tag in events.Tags()["scalars"]:
        return [(e.step, e.value) for e in events.Scalars(tag)]
    return [(e.step, float(make_ndarray(e.tensor_proto))) for e in events.Tensors(tag)]


def interval(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and 95 % bootstrap half-width over the seeds, [seeds, ...] → [...]."""
    rng = np.random.default_rng(0)
    means = samples[rng.integers(len(samples), size=(2_000, len(samples)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return samples.mean(0), (high - low) / 2


def minutes(folders: list[Path]) -> str:
    """The mean wall-clock of the runs that were never stopped."""
    clocks = [json.loads(folder.with_name(folder.name + ".json").read_text()) for folder in folders]
    whole = [clock["seconds"] / 60 for clock in clocks if not clock["resumed"]]
    return f"{np.mean(whole):.1f}" if whole else ""
