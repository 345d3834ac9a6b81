import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # equal to the bit is a promise for one CPU

import hypothesis
import pytest
import torch

torch.set_num_threads(1)  # two threads collapse where another process wants a core
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


def pytest_collection_modifyitems(items):
    """Each core takes whole scripts: their tests share runs, and all that runs wrote is gathered."""
    for item in items:
        name = item.callspec.params.get("name") if hasattr(item, "callspec") else None
        if item.path.stem == "test_scripts":
            item.add_marker(pytest.mark.xdist_group(name or item.path.stem))
