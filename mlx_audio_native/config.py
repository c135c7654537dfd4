"""A model's config, read from stable-audio-tools' own model_config.json schema.

Every key is used, known to have no effect here, or an error: a typo must not become noise. Defaults are those of the
reference's constructors (stable-audio-tools 0.0.19). Each part's config stands with its net; this module joins them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .conditioning import ConditioningConfig, NumberConfig, PromptConfig
from .dit import DiTConfig
from .errors import ConfigError
from .oobleck import AutoencoderConfig
from .quantization import Quantization
from .schema import REQUIRED, Section, check, nearest, read_json

PARTS = ("conditioner", "dit", "autoencoder")
TEXT_ENCODER = "text_encoder"


@dataclass(frozen=True)
class ModelConfig:
    """A whole model; the sections of parts that were not asked for are None, and what hangs on them is not there."""

    sample_rate: int
    sample_size: int
    audio_channels: int
    conditioning: ConditioningConfig | None
    dit: DiTConfig | None
    autoencoder: AutoencoderConfig | None
    quantization: Quantization | None = None

    @classmethod
    def from_dict(
        cls, values: dict[str, Any], parts: Sequence[str] = PARTS, text_encoder: dict[str, Any] | None = None
    ) -> ModelConfig:
        """Read and check the sections that `parts` need; the others may hold anything.

        `text_encoder` is the Hugging Face config of a T5 that lies beside the model, used where the prompt's own
        config has no `t5_config`. Raises ConfigError.
        """
        for part in parts:
            check(part in PARTS, f"unknown part {part!r}; the parts are {', '.join(PARTS)}{nearest(part, PARTS)}")
        top = Section(values, "config")
        top.one_of("model_type", ("diffusion_cond",))
        # a conditioner alone makes no sound: an extracted one need not say at which rate
        sounding = "dit" in parts or "autoencoder" in parts
        sample_rate = top.size("sample_rate", REQUIRED if sounding else 44100)
        sample_size = top.size("sample_size", REQUIRED if sounding else 1, most=2**40)
        audio_channels = top.size("audio_channels", 2)
        quantised = top.take("quantization", dict, None)
        quantization = None if quantised is None else Quantization.read(Section(quantised, "config.quantization"))
        top.without_effect("training", "demo", "provenance")
        model = Section(top.take("model", dict), "model")
        top.done()

        conditioning = dit = autoencoder = None
        if "conditioner" in parts or "dit" in parts:
            diffusion = model.section("diffusion")
            if "conditioner" in parts:
                conditioning = ConditioningConfig.read(model.section("conditioning"), diffusion, text_encoder)
            if "dit" in parts:
                dit = DiTConfig.read(diffusion)
                _same("model.io_channels", model.size("io_channels"), "the DiT's io_channels", dit.io_channels)
        if "autoencoder" in parts:
            autoencoder = AutoencoderConfig.read(model.section("pretransform"))
        model.without_effect("conditioning", "diffusion", "pretransform", "io_channels")
        model.done()
        config = cls(sample_rate, sample_size, audio_channels, conditioning, dit, autoencoder, quantization)
        config._check_between_parts()
        return config

    def _check_between_parts(self) -> None:
        if self.autoencoder:
            ratio = self.autoencoder.downsampling_ratio
            check(self.latent_length > 0, f"sample_size {self.sample_size} is below a latent frame of {ratio}")
            coder = self.autoencoder.decoder
            _same("audio_channels", self.audio_channels, "the autoencoder's", coder.audio_channels)
            if self.dit:
                _same("the DiT's io_channels", self.dit.io_channels, "the autoencoder's latent_dim", coder.latent_dim)
        if self.dit and self.conditioning:
            width, ids = self.conditioning.cond_dim, self.global_ids
            _same("conditioning.cond_dim", width, "the DiT's cond_token_dim", self.dit.cond_token_dim)
            # an export may have lost its global conditioning: what the conditioner still makes is not heard then
            if self.dit.global_cond_dim:
                together = f"cond_dim times the {len(ids)} of global_cond_ids"
                _same(together, width * len(ids), "the DiT's global_cond_dim", self.dit.global_cond_dim)

    @property
    def objective(self) -> str:
        """`v`, `rectified_flow` or `rf_denoiser`."""
        return self.dit.objective

    @property
    def latent_channels(self) -> int:
        return self.dit.io_channels if self.dit else self.autoencoder.decoder.latent_dim

    @property
    def downsampling_ratio(self) -> int:
        """Audio frames to one latent frame."""
        return self.autoencoder.downsampling_ratio

    @property
    def latent_length(self) -> int:
        """Latent frames in the model's window."""
        return self.sample_size // self.downsampling_ratio

    @property
    def prompt(self) -> PromptConfig:
        return self.conditioning.prompt

    @property
    def numbers(self) -> tuple[NumberConfig, ...]:
        return self.conditioning.numbers

    @property
    def cross_attention_ids(self) -> tuple[str, ...]:
        return self.conditioning.cross_attention_ids

    @property
    def global_ids(self) -> tuple[str, ...]:
        return self.conditioning.global_ids


def _same(name: str, value: int, other: str, expected: int) -> None:
    check(value == expected, f"sizes do not fit: {name} is {value}, {other} {expected}")


def read_config(folder: Path | str, parts: Sequence[str] = PARTS, text_encoder: Path | None = None) -> ModelConfig:
    """The config of a model folder; its T5 may lie elsewhere, in `text_encoder`. Raises ConfigError."""
    folder = Path(folder)
    beside = (text_encoder or folder / TEXT_ENCODER) / "config.json"
    t5_config = read_json(beside) if "conditioner" in parts and beside.is_file() else None
    values = read_config_json(folder)
    try:
        return ModelConfig.from_dict(values, parts, t5_config)
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from None


def read_config_json(folder: Path) -> dict[str, Any]:
    """The JSON of a folder's `config.json` or `model_config.json`; of both, the one whose model_type is diffusion_cond.

    Raises ConfigError.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder")
    paths = [path for name in ("config.json", "model_config.json") if (path := folder / name).is_file()]
    if not paths:
        raise ConfigError(f"{folder} holds neither config.json nor model_config.json")
    found = [read_json(path) for path in paths]
    ours = [values for values in found if isinstance(values, dict) and values.get("model_type") == "diffusion_cond"]
    return (ours or found)[0]
