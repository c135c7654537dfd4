"""A whole conditioners graph: its inputs' roles, the text and seconds paths, and how its outputs are put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from . import seconds, t5
from .errors import ExtractionError
from .evaluate import Evaluator
from .graph import Wiring
from .probe import Probe, shaped
from .seconds import Seconds
from .t5 import T5

# by their order in the global vector; one alone is the total
_NAMES = {0: (), 1: ("seconds_total",), 2: ("seconds_start", "seconds_total")}
PROMPT = "prompt"


@dataclass
class Conditioners:
    """What a graph of conditioners was recovered as.

    `cross` and `global_` are output tensors, `global_` None where the graph has none. `numbers` are in the order of the
    global vector, `cross_ids` in that of the tokens. `masking` says what the token mask is multiplied over: rows, as it
    should be, or channels, or nothing.
    """

    wiring: Wiring
    evaluator: Evaluator
    text: T5
    numbers: dict[str, Seconds]
    cross: int
    global_: int | None
    cross_ids: tuple[str, ...]
    max_length: int
    cond_dim: int
    masking: str
    projection_bias: np.ndarray | None
    warnings: list[str] = field(default_factory=list)


def recover(wiring: Wiring) -> Conditioners:
    """Raises ExtractionError where the graph is none of conditioners, or not one that the runtime can express."""
    evaluator = Evaluator(wiring)
    text = t5.recover(wiring, evaluator)
    found = _numbers(wiring, evaluator, text)
    return _Outputs(wiring, evaluator, text, found).assemble()


def _numbers(wiring: Wiring, evaluator: Evaluator, text: T5) -> list[Seconds]:
    """A number conditioner for every input of the graph that is neither ids nor mask and reaches its outputs."""
    reaching = {index for output in wiring.graph.outputs for index in wiring.reached_by(output)}
    numbers = []
    for index in wiring.graph.inputs:
        if index in (text.ids, text.mask) or index not in reaching:
            continue
        linears = [linear for linear in wiring.linears() if index in wiring.reached_by(linear.input)]
        if not linears or any(wiring.reached_by(linear.input) != (index,) for linear in linears):
            steps = seconds.describe(wiring, evaluator, wiring.graph.outputs, index)
            raise ExtractionError(f"input {index} reaches the outputs, but by no number conditioner", steps)
        numbers.append(seconds.recover(wiring, evaluator, linears, index))
    return numbers


class _Outputs:
    def __init__(self, wiring: Wiring, evaluator: Evaluator, text: T5, numbers: list[Seconds]) -> None:
        self.wiring, self.evaluator, self.text, self.numbers = wiring, evaluator, text, numbers
        self.dim = text.projection.channels if text.projection else text.residual[0].channels
        for number in numbers:
            if len(number.weight) != self.dim:
                raise ExtractionError(
                    f"text is {self.dim} wide, input {number.input} is embedded as {len(number.weight)}"
                )
        self.probe = Probe(wiring, evaluator, text.encode_length, text.mask)
        self.warnings = list(text.warnings)

    def assemble(self) -> Conditioners:
        graph, reach = self.wiring.graph, self.wiring.reached_by
        crosses = [index for index in graph.outputs if self.text.ids in reach(index)]
        if len(crosses) != 1:
            raise ExtractionError(f"{len(crosses)} outputs depend on the token ids; conditioners have one")
        cross = crosses[0]
        inputs = {number.input for number in self.numbers}
        globals_ = [
            i for i in graph.outputs if i != cross and inputs & set(reach(i)) and self.text.mask not in reach(i)
        ]
        if len(globals_) > 1:
            raise ExtractionError(f"{len(globals_)} outputs depend on the seconds alone; conditioners have one")
        global_ = globals_[0] if globals_ else None

        order, bias = self._tokens(cross)
        rows = [row for row, place in enumerate(order) if place is None]
        blocks = list(dict.fromkeys(order))
        if not rows or rows != list(range(rows[0], rows[0] + len(rows))) or len(order) != len(rows) + len(blocks) - 1:
            raise ExtractionError("the cross-attention output is no text and one token for each number")
        if len(rows) > self.text.encode_length:
            raise ExtractionError(f"{len(rows)} text tokens come out of {self.text.encode_length}")
        text_bias = bias[rows[0]]
        masking = self._text_rows(cross, len(order), rows, text_bias)
        in_global = self._global(global_, bias, order) if global_ is not None else []
        named = in_global if len(in_global) >= len(blocks) - 1 else [place for place in blocks if place is not None]
        if len(named) != len(self.numbers) or len(named) not in _NAMES:
            raise ExtractionError(f"{len(self.numbers)} numbers are embedded, {len(named)} of them reach one output")
        names = dict(zip(named, _NAMES[len(named)], strict=True))
        numbers = {}
        for place in named:
            row = bias[order.index(place)] if place in order else np.zeros(self.dim)
            # a bias that is added behind the product shows when the product is fed with zeros
            total = self.numbers[place].bias + row.astype(np.float32) if row.any() else self.numbers[place].bias
            numbers[names[place]] = replace(self.numbers[place], bias=total)
        self._warn(cross, global_, masking)
        projection = self.text.projection
        own = self.evaluator.bias(projection) if projection else None
        return Conditioners(
            *(self.wiring, self.evaluator, self.text, numbers, cross, global_),
            tuple(PROMPT if place is None else names[place] for place in blocks),
            *(len(rows), self.dim, masking),
            own if own is None or not text_bias.any() else own + text_bias.astype(np.float32),
            self.warnings,
        )

    def _read(self, target: int, codes: Sequence[np.ndarray], text: np.ndarray | None, mask: np.ndarray | None = None):
        """An output for fed embeddings and text: `text` (rows, channels) of the projection or the first residual."""
        given = {}
        for number, code in zip(self.numbers, codes, strict=True):
            for linear in number.linears:
                given[linear.output] = np.broadcast_to(code, self.dim)
        stages = {}
        if self.text.projection:
            product = self.text.projection.output
            given[product] = np.zeros(self.wiring.shape(product)) if text is None else text
        else:
            stages = {stage: np.zeros(1) for stage in self.text.residual}
            if text is not None:
                stages[self.text.residual[0]] = text
        return self.probe.read(stages, target, mask, given)

    def _tokens(self, cross: int) -> tuple[list[int | None], np.ndarray]:
        """For each token the number that it embeds, None for text; and what each token is when all products are 0."""
        zero = [np.zeros(1)] * len(self.numbers)
        codes = [1 + place * self.dim + np.arange(self.dim) for place in range(len(self.numbers))]
        bias = self.probe.rows(self._read(cross, zero, None), "the cross-attention output", self.dim)
        found = self._rows(self._read(cross, codes, None), len(bias)) - bias
        order: list[int | None] = []
        for row in found:
            match = [place for place, code in enumerate(codes) if np.abs(row - code).max() < 1e-6]
            if not match and row.any():
                raise ExtractionError(f"token {len(order)} of the cross-attention output is neither text nor a number")
            order.append(match[0] if match else None)
        return order, bias

    def _rows(self, value: np.ndarray, tokens: int) -> np.ndarray:
        return shaped(value, (tokens, self.dim), "the cross-attention output")

    def _text_rows(self, cross: int, size: int, rows: list[int], bias: np.ndarray) -> str:
        """Checks that the text tokens are the last states, normed, cropped and projected. Returns what is masked."""
        text, count = self.text, len(rows)
        zero = [np.zeros(1)] * len(self.numbers)
        rng = np.random.default_rng(0)
        products = [linear.output for number in self.numbers for linear in number.linears]
        given = {product: np.zeros(self.dim) for product in products}
        final = text.projection.input if text.projection else cross
        pick = slice(None) if text.projection else slice(rows[0], rows[0] + count)
        gain, epsilon = self.probe.norm(text.residual, final, "the last norm", pick, given)
        if np.float32(epsilon) != np.float32(text.config["layer_norm_epsilon"]):
            raise ExtractionError(
                f"the last norm has the epsilon {epsilon:g}, the others {text.config['layer_norm_epsilon']}"
            )
        text.weights["encoder.final_layer_norm.weight"] = lambda: text.stored(gain)
        length = text.encode_length
        if text.projection:
            length = int(np.prod(self.wiring.shape(text.projection.output), dtype=object)) // self.dim
        states = rng.standard_normal((length, self.dim))
        whole = self._rows(self._read(cross, zero, states), size)[rows]
        if text.projection and not np.allclose(whole, states[:count] + bias, rtol=0, atol=1e-9):
            raise ExtractionError("the text tokens are not the first rows of the projection")
        mask = np.arange(int(np.prod(self.wiring.shape(text.mask)))) % 3 != 1
        found = self._rows(self._read(cross, zero, states, mask.astype(np.float64)), size)[rows]
        if np.allclose(found, whole * mask[:count, None], rtol=0, atol=1e-9):
            return "rows"
        if count == self.dim and np.allclose(found, whole * mask[None, :count], rtol=0, atol=1e-9):
            return "channels"
        if np.allclose(found, whole, rtol=0, atol=1e-9):
            return "nothing"
        raise ExtractionError("the text tokens are not the last states times the token mask")

    def _global(self, global_: int, bias: np.ndarray, order: list[int | None]) -> list[int]:
        zero = [np.zeros(1)] * len(self.numbers)
        codes = [1 + place * self.dim + np.arange(self.dim) for place in range(len(self.numbers))]
        base = self.probe.rows(self._read(global_, zero, None), "the global output", self.dim)
        found = shaped(self._read(global_, codes, None), base.shape, "the global output") - base
        in_order = []
        for row, rest in zip(found, base, strict=True):
            match = [place for place, code in enumerate(codes) if np.abs(row - code).max() < 1e-6]
            if not match or match[0] in in_order:
                raise ExtractionError("the global output is no sequence of the numbers' embeddings")
            if match[0] in order and not np.array_equal(rest, bias[order.index(match[0])]):
                raise ExtractionError("the global output and the tokens hold different embeddings of the seconds")
            in_order.append(match[0])
        return in_order

    def _warn(self, cross: int, global_: int | None, masking: str) -> None:
        graph, reach = self.wiring.graph, self.wiring.reached_by
        numbers = [number.input for number in self.numbers]
        expected = {cross: [self.text.ids, self.text.mask, *numbers]}
        if global_ is not None:
            expected[global_] = numbers
        for index in graph.outputs:
            expected.setdefault(index, [self.text.mask])
        for output, wanted in expected.items():
            for index in wanted:
                if index not in reach(output):
                    self.warnings.append(
                        f"{label(self.wiring, output, False)} does not depend on {label(self.wiring, index)}"
                    )
        if global_ is None:
            self.warnings.append("no output depends on the seconds alone: this export has lost its global conditioning")
        if masking == "channels":
            self.warnings.append(
                "the export multiplies the token mask over channels instead of tokens: its own text output is wrong, "
                "the recovered weights are not"
            )
        if masking == "nothing":
            self.warnings.append("the export does not zero padding tokens with the mask; the runtime does")


def label(wiring: Wiring, index: int, is_input: bool = True) -> str:
    """An input or output of the graph for people: its place, type and shape."""
    graph = wiring.graph
    place = (graph.inputs if is_input else graph.outputs).index(index)
    tensor = graph.tensors[index]
    return f"{'input' if is_input else 'output'} {place} ({tensor.type} {list(tensor.shape)}, {tensor.name!r})"
