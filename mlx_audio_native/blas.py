"""MLX's back end on Linux: what makes the CPU one fast, CUDA's last and quick, and a plain word where there is none."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution

from .errors import BackendError

SWITCH = "MLX_AUDIO_NATIVE_OPENBLAS"
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_KEPT = 1 << 30


@cache
def prefer_openblas() -> bool:
    """Let MLX call an installed OpenBLAS in place of the slow reference BLAS that its CPU wheel brings.

    Works only before mlx.core is first imported: symbols loaded globally by then win over the wheel's own. The
    environment variable MLX_AUDIO_NATIVE_OPENBLAS=0 switches it off. Returns whether OpenBLAS was loaded, also later.
    """
    if sys.platform != "linux" or os.environ.get(SWITCH) == "0" or "mlx.core" in sys.modules:
        return False
    try:
        distribution("mlx-cpu")
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
    except (PackageNotFoundError, OSError):
        return False
    return True


@cache
def keep_freed_memory() -> None:
    """Let glibc keep up to 1 GB of freed memory for the next array, where MLX's CPU back end allocates by malloc.

    Else every large array is fetched from the system anew, page by page: a third of a decoder's time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(_MMAP_THRESHOLD, _KEPT)
        mallopt(_TRIM_THRESHOLD, _KEPT)


def outlive_many_shapes() -> None:
    """Let MLX's CUDA back end go on, however many shapes it meets; a setting of the user's own stays.

    Its caches of graphs, convolutions and attention evict what is old, but count their misses for the life of a process
    and may raise at twice their size (MLX 0.32, backend/cuda/lru_cache.h).
    """
    os.environ.setdefault("MLX_ENABLE_CACHE_THRASHING_CHECK", "0")


def launch_directly() -> None:
    """Let MLX's CUDA back end launch each kernel as it comes, not in CUDA graphs; a setting of the user's own stays.

    Into a graph it captures every product anew, at more cost to the host than to launch it, and short texts and the
    steps of many clips wait for the host. It holds for all of a process, if MLX has not run in it before: so it is for
    a program to decide, not for a library.
    """
    os.environ.setdefault("MLX_USE_CUDA_GRAPHS", "0")


def require_backend() -> None:
    """Raises BackendError, saying what to install, where mlx came without a back end (on Linux, each is an extra)."""
    try:
        import mlx.core  # noqa: F401
    except ImportError as error:
        extras = "pip install '.[cpu]' in the clone, or [cuda12] or [cuda13] for an NVIDIA GPU"
        raise BackendError(f"MLX cannot start ({error}); on Linux its back end is an extra: {extras}") from None
