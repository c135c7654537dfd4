"""What a model folder holds, in lines; nothing big is read."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .config import TEXT_ENCODER, read_config, read_config_json
from .convert import LICENCE, OF_TEXT_ENCODER
from .names import PREFIXES
from .sampling import DEFAULTS
from .tensorfile import PACKED, Stored, open_tensors
from .weights import WEIGHTS


def describe(folder: Path) -> Iterator[str]:
    """Files, parts, what they are made for, licence and provenance. Raises MlxAudioError."""
    files = [folder / WEIGHTS]
    tensors = open_tensors(files[0])
    parts = [part for part, prefix in PREFIXES.items() if any(name.startswith(prefix) for name in tensors)]
    config = read_config(folder, parts)
    if (beside := folder / TEXT_ENCODER / WEIGHTS).is_file():
        files.append(beside)
        tensors |= {PREFIXES["conditioner"] + name: tensor for name, tensor in open_tensors(beside).items()}
    for file in files:
        yield f"{file}: {file.stat().st_size / 1e6:.1f} MB"
    bits = config.quantization.bits if config.quantization else 0
    for part in parts:
        yield f"{part}: {_sizes({n: t for n, t in tensors.items() if n.startswith(PREFIXES[part])}, bits)}"
    if quantization := config.quantization:
        where = " and ".join(quantization.parts)
        yield f"quantised: {bits} bits in groups of {quantization.group_size}, in the blocks of {where}"
    if config.conditioning:
        t5 = config.prompt.t5_config
        yield f"text: up to {config.prompt.max_length} tokens, T5 of {t5.num_layers} layers, {t5.d_model} wide"
        for number in config.numbers:
            yield f"{number.id}: {number.min:g} to {number.max:g}"
    if config.dit:
        dit = config.dit
        yield f"transformer: {dit.depth} layers, {dit.embed_dim} wide, {dit.num_heads} heads, objective {dit.objective}"
        if dit.objective in DEFAULTS:
            default = DEFAULTS[dit.objective]
            yield f"defaults: {default.steps} steps of {default.sampler}, cfg scale {default.cfg_scale:g}"
    if config.autoencoder:
        window = config.autoencoder.decoded_frames(config.latent_length) / config.sample_rate
        yield f"audio: {config.sample_rate} Hz, {config.audio_channels} channels, up to {window:.3f} s"
        yield f"latents: {config.autoencoder.decoder.latent_dim} channels, {config.downsampling_ratio} frames each"
    names = sorted(path.name for path in folder.iterdir())
    licences = [name for name in names if LICENCE.fullmatch(name.removeprefix(OF_TEXT_ENCODER))]
    yield f"licence: {', '.join(map(ascii, licences)) or 'no file here tells'}"
    yield from _provenance(read_config_json(folder).get("provenance"))


def _sizes(tensors: dict[str, Stored], bits: int) -> str:
    """Parameters by dtype, and bytes. Of a quantised layer the bits count; its scales and offsets are bytes alone."""
    parameters: Counter[str] = Counter()
    for name, tensor in tensors.items():
        if tensor.dtype == PACKED and bits:
            parameters[f"{bits} bits"] += math.prod(tensor.shape) * 32 // bits
        elif not bits or not name.endswith((".scales", ".biases")):
            parameters[tensor.dtype] += math.prod(tensor.shape)
    counts = ", ".join(f"{number:,} parameters in {dtype}" for dtype, number in parameters.items())
    return f"{counts}; {sum(tensor.nbytes for tensor in tensors.values()) / 1e6:.1f} MB"


def _provenance(provenance: Any) -> Iterator[str]:
    """Whatever stands there, in ASCII: a stranger's file must not steer the terminal."""
    sources = provenance.get("sources") if isinstance(provenance, dict) else None
    for source in sources if isinstance(sources, list) else []:
        yield f"made of: {json.dumps(source)[:300]}"
