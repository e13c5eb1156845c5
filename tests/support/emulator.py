"""The CUDA kernels on the CPU: tensors in, tensors out, through tests/emulator."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from support import native_build

SOURCES = (
    "scheduler",
    "dropout_kernels",
    "family_kernels",
    "batch_norm_kernels",
    "machine_kernels",
    "bindings",
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ACTIVATIONS = ("none", "relu", "leaky_relu", "silu", "gelu", "gelu_tanh")


def why_not() -> str | None:
    """Why the emulator cannot be built here; None if it can."""
    try:
        import pybind11  # noqa: F401
    except ImportError:
        return "no pybind11: pip install pybind11"
    return native_build.why_not()


@functools.cache
def module() -> ModuleType:
    """The emulator, built where it is not up to date."""
    sources = [native_build.EMULATOR / f"{name}.cpp" for name in SOURCES]
    return native_build.load(native_build.build("emulator", sources, flags=["-O1"], module=True))


def configure(seed: int = 0, multiprocessors: int = 2, resident_blocks: int = 2) -> ModuleType:
    """Sets the schedule; seed 0 is the natural order."""
    m = module()
    m.configure(seed, multiprocessors, resident_blocks)
    return m


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def poisoned(shape, dtype: torch.dtype) -> torch.Tensor:
    """NaN everywhere: what a kernel does not write stays visible."""
    return torch.full(tuple(shape), float("nan"), dtype=dtype)


def placed(x: torch.Tensor, shift: int) -> torch.Tensor:
    """A copy of a dense tensor whose first element lies ``shift`` elements after a 64-byte border."""
    room = torch.empty(x.numel() + shift + 64, dtype=x.dtype)
    first = (-room.data_ptr() // x.element_size()) % (64 // x.element_size()) + shift
    y = torch.as_strided(room, x.shape, x.stride(), first)
    return y.copy_(x)


def address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def dropout(x, key, p, *, offset=0, scaled=True, p_tensor=None, out=None):
    y = placed(poisoned(x.shape, x.dtype), 0) if out is None else out
    module().dropout(
        DTYPES.index(x.dtype),
        address(x),
        address(y),
        x.numel(),
        address(key),
        offset % 2**64,
        p,
        address(p_tensor),
        scaled,
    )
    return y


def dropout_mask(n, key, p, *, offset=0, p_tensor=None):
    mask = torch.full((n,), 0xFF, dtype=torch.uint8)
    module().dropout_mask(address(mask), n, address(key), offset % 2**64, p, address(p_tensor))
    assert bool((mask <= 1).all())
    return mask.bool()


class BatchNorm:
    """One layer's tensors and options, and the calls on them; x has channels in dimension 1."""

    def __init__(self, channels_last=False, *, weight=None, bias=None, running_mean=None, running_var=None,
                 batches=None, skipped=None, momentum=0.1, eps=1e-5, residual=None, activation="none",
                 slope=0.01, key=None, p=0.0, sign_bits=None, on_chip=False):  # fmt: skip
        self.channels_last = channels_last
        self.tensors = {
            "weight": weight,
            "bias": bias,
            "running_mean": running_mean,
            "running_var": running_var,
            "batches": batches,
            "skipped": skipped,
            "residual": residual,
            "key": key,
            "sign_bits": sign_bits,
        }
        self.options = {
            "has_momentum": momentum is not None,
            "momentum": momentum or 0.0,
            "eps": eps,
            "activation": ACTIVATIONS.index(activation),
            "slope": slope,
            "p": p,
            "on_chip": on_chip,
        }

    def layer(self, x):
        n, c = x.shape[:2]
        s = x.numel() // (n * c) if n * c else 1
        made = module().BatchNorm(*((n * s, c, 1) if self.channels_last else (n, c, s)), self.channels_last)
        for name, value in self.options.items():
            setattr(made, name, value)
        for name, tensor in self.tensors.items():
            setattr(made, name, address(tensor))
        wide = acc_dtype(x.dtype)
        parameters = [t for t in (self.tensors["weight"], self.tensors["bias"]) if t is not None]
        buffers = [t for t in (self.tensors["running_mean"], self.tensors["running_var"]) if t is not None]
        made.wide_parameters = all(t.dtype == wide for t in parameters)
        made.wide_buffers = all(t.dtype == wide for t in buffers)
        return made

    def train(self, x):
        statistics = poisoned((2, x.shape[1]), acc_dtype(x.dtype))
        y = torch.full_like(x, float("nan"))
        module().batch_norm_train(
            DTYPES.index(x.dtype), self.layer(x), address(x), address(y), address(statistics)
        )
        return y, statistics

    def eval(self, x, save=True):
        statistics = poisoned((2, x.shape[1]), acc_dtype(x.dtype)) if save else None
        y = torch.full_like(x, float("nan"))
        module().batch_norm_eval(
            DTYPES.index(x.dtype), self.layer(x), address(x), address(y), address(statistics)
        )
        return y, statistics

    def backward(self, dy, x, statistics, *, batch_statistics=True, need_residual=False):
        wide = acc_dtype(x.dtype)
        dx = torch.full_like(x, float("nan"))
        d_residual = torch.full_like(x, float("nan")) if need_residual else None
        parameter_dtype = self.tensors["weight"].dtype if self.tensors["weight"] is not None else wide
        d_weight, d_bias = (poisoned((x.shape[1],), parameter_dtype) for _ in range(2))
        sums = poisoned((2, x.shape[1]), wide)
        module().batch_norm_backward(
            DTYPES.index(x.dtype),
            self.layer(x),
            batch_statistics,
            address(dy),
            address(x),
            address(statistics),
            address(sums),
            address(dx),
            address(d_residual),
            address(d_weight),
            address(d_bias),
        )
        return dx, d_weight, d_bias, d_residual

    def moments(self, x):
        packed = poisoned((2 * x.shape[1] + 2,), acc_dtype(x.dtype))
        module().batch_norm_moments(DTYPES.index(x.dtype), self.layer(x), address(x), address(packed))
        return packed
