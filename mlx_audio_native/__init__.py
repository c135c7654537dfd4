"""Text to audio with Stable Audio Open models, natively in MLX.

`load(folder)` gives a Model; `generate(prompt, seconds=4, seed=0)` uses the embedded one, read at the first call.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .blas import outlive_many_shapes, prefer_openblas, require_backend
from .errors import MlxAudioError

if TYPE_CHECKING:
    from .audio import Audio, Recipe, read_recipe
    from .model import Model, generate, load

__all__ = ["Audio", "MlxAudioError", "Model", "Recipe", "__version__", "generate", "load", "read_recipe"]
__version__ = "0.1.0"

prefer_openblas()  # must come before the first import of mlx.core, and so before this package's other modules
outlive_many_shapes()


def __getattr__(name: str) -> Any:
    """The rest is imported on first use: importing the package is quick, and needs no back end."""
    if name in ("Audio", "Recipe", "read_recipe"):
        return getattr(import_module(".audio", __name__), name)
    if name in ("Model", "generate", "load"):
        require_backend()
        return getattr(import_module(".model", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
