"""What kernels for NVIDIA GPUs have in common: when they can run, and how one is made of its source."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable
from functools import cache

import mlx.core as mx


def is_default() -> bool:
    """Whether arrays are computed on an NVIDIA GPU."""
    return mx.cuda.is_available() and mx.default_device() == mx.gpu


@cache
def capability() -> int:
    """The major number of the GPU's compute capability."""
    return mx.device_info().get("compute_capability_major", 0)


def processors() -> int:
    """How many streaming multiprocessors the GPU has, which MLX does not pass on; 0 if the driver does not tell."""
    attribute, value = 16, ctypes.c_int()  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDeviceGetAttribute(ctypes.byref(value), attribute, 0)
    except OSError:
        return 0
    return 0 if failed else value.value


@cache
def build(
    name: str,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    source: str,
    header: str = "",
    shared_memory: int = 0,
) -> Callable[..., list[mx.array]]:
    """mx.fast.cuda_kernel, under a name that is the source's alone: MLX keeps compiled modules by it."""
    tag = hashlib.sha256((header + source).encode()).hexdigest()[:12]
    return mx.fast.cuda_kernel(
        name=f"{name}_{tag}",
        input_names=list(inputs),
        output_names=list(outputs),
        source=source,
        header=header,
        shared_memory=shared_memory,
    )
