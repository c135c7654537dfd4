"""What was recovered, run by the runtime, against the graph itself, run operator by operator."""

from __future__ import annotations

from math import inf
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_audio_native.weights import load_parts

from .conditioners import PROMPT, Conditioners
from .errors import ExtractionError
from .evaluate import Evaluator

# largest differences, times max(1, largest value): what float32 arithmetic alone explains
SECONDS_BOUND = 2e-6
TEXT_BOUND = 1e-5
HALF_GELU_BOUND = 1e-4
# the runtime adds up in another order than the graph: its rounding may be this many times as large
_ROUNDING = 4
# a pass of a full-size T5 takes seconds with the BLAS that mlx-cpu brings
_LARGE_BYTES = 100 * 2**20


def text_bound(found: Conditioners) -> float:
    """The runtime's GELU has its exact constants; an export's may be half precision."""
    return HALF_GELU_BOUND if found.text.half_gelu else TEXT_BOUND


def compare(found: Conditioners, folder: Path) -> dict[str, float]:
    """Largest differences of `seconds` and `text` between the folder's conditioner and the graph, over max(1, largest).

    Raises ExtractionError, saying where, if one is out of bounds.
    """
    comparison = _Comparison(found, folder)
    # on the CPU float32 is float32: a GPU may round products to TF32
    with mx.stream(mx.cpu):
        worst = {"seconds": comparison.seconds(), "text": 0.0}
        for place, length in enumerate(_lengths(found)):
            for kind, difference in comparison.text(length, place).items():
                worst[kind] = max(worst[kind], difference)
    return worst


def _lengths(found: Conditioners) -> list[int]:
    """Token counts to try: the shortest, the longest, around the crop, and some between."""
    last, crop = found.text.encode_length, found.max_length
    lengths = {1, 7, crop, last}
    if found.wiring.graph.size < _LARGE_BYTES:
        lengths |= {2, 3, 17, crop - 1, crop + 1, last - 1, (crop + last) // 2}
    return sorted(length for length in lengths if 1 <= length <= last)


class _Comparison:
    """The text is evaluated in float64. The seconds are evaluated in float32, in the graph's own order: an angle of
    hundreds of radians is rounded by 1e-5, and the runtime has to round it as the graph does."""

    def __init__(self, found: Conditioners, folder: Path) -> None:
        self.found = found
        self.conditioner = load_parts(folder, ("conditioner",)).conditioner
        self.exact, self.single = Evaluator(found.wiring), Evaluator(found.wiring, precision="float32")
        self.rng = np.random.default_rng(0)
        # a sum of features, none above 1, rounds by the size of its weights
        sums = [np.abs(number.weight.astype(np.float32)).sum(1).max() for number in found.numbers.values()]
        self.seconds_bound = SECONDS_BOUND * float(max(1.0, *sums)) if sums else SECONDS_BOUND
        self.values: dict[str, np.ndarray] = {}
        for place, (name, number) in enumerate(found.numbers.items()):
            span = number.max - number.min
            fixed = [0.0, number.min, number.max, number.min - span, number.max + span]
            values = np.array([*fixed, *self.rng.uniform(number.min, number.max, 19)], np.float32)
            # the ends of one number should meet the middle of another
            self.values[name] = np.roll(values, 7 * place)

    def seconds(self) -> float:
        """At 0, at both ends, past them, and at random."""
        if self.found.global_ is None or not self.values:
            return 0.0
        count = len(next(iter(self.values.values())))
        tokens = np.ones((count, 1), np.int32)
        actual = np.asarray(self.conditioner.encode(tokens, tokens, **self.values).global_cond)
        worst = 0.0
        for row in range(count):
            expected = np.asarray(self.single.run(self._feeds(row), [self.found.global_])[0]).reshape(-1)
            worst = max(worst, _difference(actual[row], expected, self.seconds_bound, self._where(row)))
        return worst

    def text(self, length: int, row: int) -> dict[str, float]:
        """Of random tokens, with the numbers of one row of values."""
        found, text = self.found, self.found.text
        ids, mask = np.zeros((2, int(np.prod(found.wiring.shape(text.ids)))), np.int64)
        ids[:length], mask[:length] = self.rng.integers(0, text.config["vocab_size"], length), 1
        products = [linear.output for number in found.numbers.values() for linear in number.linears]
        embedded = dict(zip(products, self.single.run(self._feeds(row), products), strict=True))
        expected = self.exact.run({**embedded, text.ids: ids, text.mask: mask}, [found.cross])[0]
        expected = expected.reshape(-1, found.cond_dim)
        numbers = {name: values[row : row + 1] for name, values in self.values.items()}
        last = text.encode_length
        encoded = self.conditioner.encode(ids[None, :last], mask[None, :last], **numbers)
        actual = np.asarray(encoded.cross_attention)[0]
        first = found.cross_ids.index(PROMPT)
        rows = slice(first, first + found.max_length)
        words, states = expected[rows], actual[rows]
        if found.masking != "rows":
            # where the export leaves padding in, or cuts channels, only the rest of it can be compared
            words, states = words[:length], states[:length]
        if found.masking == "channels":
            states = states * mask[: found.max_length]
        bound = text_bound(found)
        if _relative(states, words) > bound:
            # trained weights may amplify rounding: the graph's own in float32 tells how much
            rough = self.single.run({**embedded, text.ids: ids, text.mask: mask}, [found.cross])[0]
            bound = max(bound, _ROUNDING * _relative(rough.reshape(expected.shape), expected))
        differences = {"text": _difference(states, words, bound, f"text of {length} tokens")}
        if len(expected) > found.max_length:
            tokens = np.delete(actual, rows, 0), np.delete(expected, rows, 0)
            differences["seconds"] = _difference(*tokens, self.seconds_bound, self._where(row))
        return differences

    def _feeds(self, row: int) -> dict[int, float]:
        return {number.input: self.values[name][row] for name, number in self.found.numbers.items()}

    def _where(self, row: int) -> str:
        return "seconds " + ", ".join(f"{values[row]:.9g}" for values in self.values.values())


def _relative(actual: np.ndarray, expected: np.ndarray) -> float:
    if actual.shape != expected.shape:
        return inf
    return float(np.abs(actual - expected).max() / max(1.0, np.abs(expected).max()))


def _difference(actual: np.ndarray, expected: np.ndarray, bound: float, where: str) -> float:
    if actual.shape != expected.shape:
        raise ExtractionError(f"{where}: {list(actual.shape)} was recovered, the graph gives {list(expected.shape)}")
    relative = _relative(actual, expected)
    if not relative <= bound:
        difference = np.abs(actual - expected)
        place = np.unravel_index(int(np.nan_to_num(difference, nan=np.inf).argmax()), difference.shape)
        raise ExtractionError(
            f"what was recovered disagrees with the graph: {where}, at {list(map(int, place))}, {actual[place]:.9g} "
            f"instead of {expected[place]:.9g} (off by {relative:.2g} of the largest value, bound {bound:g})"
        )
    return relative
