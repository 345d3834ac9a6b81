"""A CUDA device for machines without one: real values on the CPU, in tensors that refuse to meet a CPU tensor.

    with pretended() as waits:
        main(["pendulum", "--device", "cuda"])

`waits` counts, for each line of the scripts, how often a GPU would have had to finish its work there: .item(), .cpu(),
an index on the CPU. Not covered: autocast, torch.compile, random generators, speed, gradients from device to device.
"""

import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

T = torch.Tensor
COPIES = {"aten::copy_", "aten::_to_copy"}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
waits: Counter[str] = Counter()


class MixedError(RuntimeError):
    """An operation got tensors of both devices."""


def waited() -> None:
    frame = sys._getframe()
    while frame and "algos" not in frame.f_code.co_filename:
        frame = frame.f_back
    waits[f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "elsewhere"] += 1


class OnCuda(torch.Tensor):
    """Wraps a CPU tensor, its `value`."""

    in_backward = False  # the gradients that C++ makes there are not judged

    @staticmethod
    def __new__(cls, value: T) -> T:
        options = {"strides": value.stride(), "storage_offset": value.storage_offset(), "dtype": value.dtype}
        wrapper = T._make_wrapper_subclass(cls, value.shape, **options)
        wrapper.value = value.detach()
        return wrapper

    device = property(lambda self: torch.device("cuda:0"))
    is_cuda = property(lambda self: True)

    def __repr__(self) -> str:
        return f"OnCuda({self.value})"

    def __reduce_ex__(self, protocol: int):
        return self.value.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict) -> T:
        if id(self) not in memo:
            copy = OnCuda(self.value.clone())
            is_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad) if is_parameter else copy
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name
        judged = (args, kwargs)
        if name in INDEXING and isinstance(args[0], cls):  # by tensors of either device
            judged = (args[0], args[2:])
            if any(isinstance(i, T) and not isinstance(i, cls) for i in args[1]):
                waited()
        others = [x for x in tree_leaves(judged) if isinstance(x, T) and not isinstance(x, cls)]
        if name not in COPIES and not cls.in_backward and any(x.dim() for x in others):
            raise MixedError(f"{name}: CPU tensors of shapes {[tuple(x.shape) for x in others]} meet CUDA tensors")
        if name == "aten::_local_scalar_dense":
            waited()
        plain_args, plain_kwargs = tree_map_only(OnCuda, lambda x: x.value, (args, kwargs))
        result = func(*plain_args, **plain_kwargs)
        if name == "aten::copy_" and not isinstance(args[0], OnCuda):  # from CUDA into a CPU tensor
            waited()
            return args[0]
        wrapped = tree_map_only(T, lambda x: x if isinstance(x, OnCuda) else OnCuda(x), result)
        return return_and_correct_aliasing(func, args, kwargs, wrapped)


def to(x: T, *args, **kwargs) -> T:
    """Tensor.to."""
    args = [*args, *(kwargs[name] for name in ("device", "dtype") if name in kwargs)]
    dtype = next((a for a in args if isinstance(a, torch.dtype)), x.dtype)
    device = next((torch.device(a) for a in args if isinstance(a, str | torch.device)), x.device)
    if isinstance(x, OnCuda) == (device.type == "cuda"):
        return x if dtype == x.dtype else x.type(dtype)
    if device.type == "cuda":
        return OnCuda(x.detach().to(dtype, copy=True))
    waited()
    return x.detach().value.to(dtype, copy=True)


class Pretended(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        on_cuda = bool(args) and isinstance(args[0], OnCuda)
        if func is T.to or func in (T.cpu, T.cuda):
            return to(*args, *([] if func is T.to else [name]), **kwargs)
        if on_cuda and func in (T.numpy, T.__array__):
            raise TypeError("a CUDA tensor has no NumPy array")
        if on_cuda and func is T.tolist:
            return to(args[0], "cpu").tolist()
        if on_cuda and name == "one_hot":
            return OnCuda(func(args[0].value, *args[1:], **kwargs))
        if kwargs.get("device") is not None:
            device = torch.device(kwargs.pop("device"))
            if on_cuda or device.type != "cuda":
                return to(func(*args, **kwargs), device)
            return tree_map_only(T, OnCuda, func(*args, **kwargs))
        if name in ("backward", "grad"):
            with patch.object(OnCuda, "in_backward", True):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


@contextmanager
def pretended():
    waits.clear()
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # module.to() makes new parameters
    try:
        with patch.object(torch, "inference_mode", torch.no_grad), Pretended():  # a wrapper is no inference tensor
            yield waits
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
