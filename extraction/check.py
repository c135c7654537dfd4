"""What was recovered, run by the runtime, against the graph itself, run operator by operator in float64."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_audio_native.conditioning import Conditioner, Conditioning
from mlx_audio_native.weights import load_parts

from .conditioners import PROMPT, Conditioners
from .errors import ExtractionError
from .evaluate import Evaluator

# largest differences, times max(1, largest value): what float32 arithmetic alone explains
SECONDS_BOUND = 2e-6
TEXT_BOUND = 1e-5
HALF_GELU_BOUND = 1e-4
# a pass of a full-size T5 takes seconds with the BLAS that mlx-cpu brings
_LARGE_BYTES = 100 * 2**20


def text_bound(found: Conditioners) -> float:
    """The runtime's GELU has its exact constants; an export's may be half precision."""
    return HALF_GELU_BOUND if found.text.half_gelu else TEXT_BOUND


def compare(found: Conditioners, folder: Path) -> dict[str, float]:
    """Largest differences of `seconds` and `text` between the folder's conditioner and the graph, over max(1, largest).

    Raises ExtractionError, saying where, if one is out of bounds.
    """
    # on the CPU float32 is float32: a GPU may round products to TF32
    with mx.stream(mx.cpu):
        model = load_parts(folder, ("conditioner",)).conditioner
        evaluator = Evaluator(found.wiring)
        rng = np.random.default_rng(0)
        worst = {"seconds": _compare_seconds(found, model, evaluator, rng), "text": 0.0}
        for length in _lengths(found):
            for kind, difference in _compare_text(found, model, evaluator, rng, length).items():
                worst[kind] = max(worst[kind], difference)
    return worst


def _lengths(found: Conditioners) -> list[int]:
    """Token counts to try: the shortest, the longest, around the crop, and some between."""
    last, crop = found.text.encode_length, found.max_length
    lengths = {1, 7, crop, last}
    if found.wiring.graph.size < _LARGE_BYTES:
        lengths |= {2, 3, 17, crop - 1, crop + 1, last - 1, (crop + last) // 2}
    return sorted(length for length in lengths if 1 <= length <= last)


def _compare_seconds(found: Conditioners, model: Conditioner, evaluator: Evaluator, rng: np.random.Generator) -> float:
    """At 0, at both ends, past them, and at random."""
    if found.global_ is None or not found.numbers:
        return 0.0
    columns = {}
    for name, number in found.numbers.items():
        span = number.max - number.min
        fixed = [0.0, number.min, number.max, number.min - span, number.max + span]
        columns[name] = np.array([*fixed, *rng.uniform(number.min, number.max, 19)], np.float32)
    count = len(next(iter(columns.values())))
    # every combination of ends is not needed, but ends of one number should meet the middle of the other
    for place, name in enumerate(columns):
        columns[name] = np.roll(columns[name], 7 * place)
    tokens = np.ones((count, 1), np.int32)
    values = np.asarray(model.encode(tokens, tokens, **columns).global_cond)
    worst = 0.0
    for row in range(count):
        feeds = {number.input: columns[name][row] for name, number in found.numbers.items()}
        expected = evaluator.run(feeds, [found.global_])[0].reshape(-1)
        where = f"seconds {', '.join(f'{columns[name][row]:.9g}' for name in columns)}"
        worst = max(worst, _difference(values[row], expected, SECONDS_BOUND, where))
    return worst


def _compare_text(
    found: Conditioners, model: Conditioner, evaluator: Evaluator, rng: np.random.Generator, length: int
) -> dict[str, float]:
    text = found.text
    ids, mask = np.zeros((2, int(np.prod(found.wiring.shape(text.ids)))), np.int64)
    ids[:length], mask[:length] = rng.integers(0, text.config["vocab_size"], length), 1
    numbers = {name: float(np.float32(rng.uniform(n.min, n.max))) for name, n in found.numbers.items()}
    feeds = {number.input: numbers[name] for name, number in found.numbers.items()}
    feeds |= {text.ids: ids, text.mask: mask}
    expected = evaluator.run(feeds, [found.cross])[0].reshape(-1, found.cond_dim)
    encoded: Conditioning = model.encode(ids[None, : text.encode_length], mask[None, : text.encode_length], **numbers)
    actual = np.asarray(encoded.cross_attention)[0]
    first = found.cross_ids.index(PROMPT)
    rows = slice(first, first + found.max_length)
    words, states = expected[rows], actual[rows]
    if found.masking != "rows":
        # where the export leaves padding in, or cuts channels, only the rest of it can be compared
        words, states = words[:length], states[:length]
    if found.masking == "channels":
        states = states * mask[: found.max_length]
    where = f"text of {length} tokens"
    others = np.delete(expected, rows, 0), np.delete(actual, rows, 0)
    return {
        "text": _difference(states, words, text_bound(found), where),
        "seconds": _difference(others[1], others[0], SECONDS_BOUND, f"{where}, seconds {numbers}")
        if others[0].size
        else 0.0,
    }


def _difference(actual: np.ndarray, expected: np.ndarray, bound: float, where: str) -> float:
    if actual.shape != expected.shape:
        raise ExtractionError(f"{where}: {list(actual.shape)} was recovered, the graph gives {list(expected.shape)}")
    difference = np.abs(actual - expected)
    relative = float(difference.max() / max(1.0, np.abs(expected).max()))
    if not relative <= bound:
        place = np.unravel_index(int(np.nan_to_num(difference, nan=np.inf).argmax()), difference.shape)
        raise ExtractionError(
            f"what was recovered disagrees with the graph: {where}, at {list(map(int, place))}, {actual[place]:.9g} "
            f"instead of {expected[place]:.9g} (off by {relative:.2g} of the largest value, bound {bound:g})"
        )
    return relative
