"""A recovered DiT and a recovered decoder, run by the runtime, against their own graphs, run operator by operator."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from mlx_audio_native.config import ModelConfig
from mlx_audio_native.dit import DiT as RuntimeDiT
from mlx_audio_native.names import entries
from mlx_audio_native.oobleck import Autoencoder

from .dit import DiT
from .errors import ExtractionError
from .evaluate import Evaluator
from .graph import Wiring
from .oobleck import Decoder

# relative rms that float32 arithmetic alone explains
BOUND = 1e-5
# a decoder works far more than it weighs: these leave the embedded model a margin, and a level of the release's
_WORK_PER_BYTE = 1500
_BYTES_PER_BYTE = 32
_MOST_WORK = 6 * 10**10
_MOST_BYTES = 2**29


class _Roomy(Evaluator):
    """The evaluation with room for a decoder, still in proportion to the file."""

    def __init__(self, wiring: Wiring) -> None:
        super().__init__(wiring)
        self._most_bytes += min(_BYTES_PER_BYTE * wiring.graph.size, _MOST_BYTES)
        self._work_left += most_work(wiring)


def most_work(wiring: Wiring) -> int:
    """Multiplications that a graph may ask for to be evaluated."""
    return min(2 * 10**8 + _WORK_PER_BYTE * wiring.graph.size, _MOST_WORK)


def compare_dit(found: DiT, config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> float:
    """Relative rms between the velocities of the recovered DiT and of its graph. Raises ExtractionError."""
    rng = np.random.default_rng(0)
    sizes = config.dit
    latents = rng.standard_normal((found.frames, sizes.io_channels)).astype(np.float32)
    tokens = rng.standard_normal((found.context, sizes.cond_token_dim)).astype(np.float32)
    vector = rng.standard_normal(max(sizes.global_cond_dim, 1)).astype(np.float32)
    time = np.float32(0.37)
    # the graph first: its evaluation is bounded
    evaluator = found.evaluator
    feeds = {
        found.latents: _arranged(evaluator, found.latents, found.entry.input, latents),
        **{found.time: time, found.tokens: tokens},
        **({found.vector: vector} if found.vector is not None else {}),
    }
    output = found.wiring.graph.outputs[0]
    expected = evaluator.run(feeds, [output])[0]
    first, second = (linear.output for linear in found.ends)
    with mx.stream(mx.cpu):
        net = _filled(RuntimeDiT(sizes), tensors)
        actual = net(mx.array(latents[None]), mx.array([float(time)]), mx.array(tokens[None]), mx.array(vector[None]))
        actual = np.asarray(actual)[0]
    numbered = {first: np.zeros(found.wiring.shape(first)), second: np.arange(actual.size)}
    places = _places(evaluator.run(numbered, [output])[0], actual.size)
    whole = np.empty(actual.size)
    whole[places] = expected.reshape(-1)
    return _difference(actual, whole.reshape(actual.shape), "the velocity")


def compare_decoder(found: Decoder, config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> tuple[float, str]:
    """Relative rms between the recovered decoder and its graph, and a note on how far the graph was followed.

    A full-size decoder is trillions of multiplications: what it does first is then compared. Raises ExtractionError.
    """
    affordable = [place for place, (_, work) in enumerate(found.stages) if work <= most_work(found.wiring)]
    if not affordable:
        raise ExtractionError("the decoder asks for more work than a graph of this size can mean")
    stage, count = affordable[-1], len(found.stages)
    channels = config.autoencoder.decoder.latent_dim
    latents = np.random.default_rng(0).standard_normal((found.latents, channels)).astype(np.float32)
    evaluator, source = _Roomy(found.wiring), found.wiring.graph.inputs[0]
    feed = _arranged(evaluator, source, found.entry, latents, found.scale)
    expected = evaluator.run({source: feed}, [found.stages[stage][0]])[0]
    with mx.stream(mx.cpu):
        coder = _filled(Autoencoder(config.autoencoder), tensors)
        actual = np.asarray(_decode(coder, mx.array(latents[None]), stage, count))[0]
    expected = np.asarray(expected).reshape([size for size in expected.shape if size != 1])
    if expected.shape == actual.shape[::-1] and stage == count - 1:
        expected = expected.T
    note = "" if stage == count - 1 else f"the decoder is compared up to its layer {stage + 1} of {count - 1} only"
    return _difference(actual, expected, "the decoder's audio"), note


def _decode(coder: Autoencoder, latents: mx.array, stage: int, count: int) -> mx.array:
    """The audio, or for an earlier stage what goes into the convolution that begins the next one."""
    if stage == count - 1:
        return coder.decode(latents)
    layers = coder.decoder.layers
    x = latents * coder.config.scale
    for layer in layers[: stage + 1]:
        x = layer(x)
    following = layers[stage + 1]
    return following.layers[0](x) if stage < count - 2 else following(x)


def _filled(module: nn.Module, tensors: Mapping[str, np.ndarray]) -> Any:
    weights = []
    for entry in entries(module):
        array = tensors.get(entry.source)
        if array is None or tuple(array.shape) != entry.shape:
            found = "is missing" if array is None else f"is {list(array.shape)}, expected {list(entry.shape)}"
            raise ExtractionError(f"the recovered tensor {entry.source!r} {found}")
        value = mx.array(np.ascontiguousarray(array, np.float32))
        weights.append((entry.target, entry.convert(value) if entry.convert else value))
    module.load_weights(weights, strict=True)
    return module


def _arranged(evaluator: Evaluator, source: int, entry: int, rows: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """(frames, channels) in the order in which the graph's input holds them: `entry` has them channels last."""
    numbered = evaluator.run({source: np.arange(rows.size)}, [entry])[0]
    places = _places(np.asarray(numbered) / scale, rows.size)
    arranged = np.empty(rows.size, np.float32)
    arranged[places] = rows.reshape(-1)
    return arranged


def _places(numbered: np.ndarray, size: int) -> np.ndarray:
    places = np.rint(np.nan_to_num(numbered).reshape(-1)).astype(np.int64)
    if not np.array_equal(np.sort(places), np.arange(size)):
        raise ExtractionError("the latents are not merely put in another order on their way in or out")
    return places


def _difference(actual: np.ndarray, expected: np.ndarray, what: str) -> float:
    if actual.shape != expected.shape:
        raise ExtractionError(f"{what}: {list(actual.shape)} was recovered, the graph gives {list(expected.shape)}")
    relative = float(np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))) if expected.any() else inf
    if not relative <= BOUND:
        raise ExtractionError(
            f"what was recovered disagrees with the graph: {what} is off by {relative:.2g} "
            f"(relative rms, bound {BOUND:g})"
        )
    return relative
