"""What goes wrong for reasons outside this code; each ends as one clear sentence."""

from __future__ import annotations


class MlxAudioError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(MlxAudioError):
    """A model config that is missing, malformed, inconsistent, or asks for what the runtime cannot honour."""


class WeightsError(MlxAudioError):
    """A tensor file that is missing, damaged, or does not fit its config."""


class TokenizerError(MlxAudioError):
    """A sentencepiece model that is missing, damaged, or not a T5 vocabulary."""


class InputError(MlxAudioError):
    """A value given by the caller that the model cannot take."""


class AudioFileError(MlxAudioError):
    """A WAV that cannot be written, or that carries no usable recipe."""


class HubError(MlxAudioError):
    """A model that could not be had from the hub."""


class BackendError(MlxAudioError):
    """MLX cannot start on this machine."""
