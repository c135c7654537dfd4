"""What goes wrong while reading a graph."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_audio_native.errors import MlxAudioError


class ExtractionError(MlxAudioError):
    """A file that is no usable TFLite graph, or a graph whose formula the runtime cannot express.

    `problem` is one sentence; `details` are lines that show it, such as the operators of a slice.
    """

    def __init__(self, problem: str, details: Sequence[str] = ()) -> None:
        super().__init__("\n".join((problem, *details)))
        self.problem, self.details = problem, tuple(details)

    def about(self, subject: object) -> ExtractionError:
        """The same error, beginning with what it is about."""
        return ExtractionError(f"{subject}: {self.problem}", self.details)
