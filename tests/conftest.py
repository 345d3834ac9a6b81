import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # equal to the bit is a promise for one CPU

import hypothesis
import torch

torch.set_num_threads(1)  # two threads collapse where another process wants a core
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")
