"""Functions of single numbers that MLX's CPU back end computes one by one; NumPy does 8 or 16 at once there.

The CPU's forms evaluate their argument.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np


def sine(x: mx.array) -> mx.array:
    return _by_numpy(np.sin, x) if mx.default_device() == mx.cpu else mx.sin(x)


def silu(x: mx.array) -> mx.array:
    """x·sigmoid(x); without the mx.compile of nn.silu, which on a CPU runs a C++ compiler for a second at first."""
    if mx.default_device() != mx.cpu:
        return x * mx.sigmoid(x)
    half = 0.5 * x
    return half + half * _by_numpy(np.tanh, half)


def _by_numpy(function: np.ufunc, x: mx.array) -> mx.array:
    return mx.array(function(np.asarray(x.astype(mx.float32)))).astype(x.dtype)
