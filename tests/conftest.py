import torch

torch.set_num_threads(1)  # two threads collapse where another process wants a core
