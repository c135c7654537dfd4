"""What goes wrong while reading a graph."""

from __future__ import annotations

from mlx_audio_native.errors import MlxAudioError


class ExtractionError(MlxAudioError):
    """A file that is no usable TFLite graph, or a graph whose formula the runtime cannot express."""
