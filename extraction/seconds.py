"""The seconds path: from the graph's operators to clip, offset, scale, angle factors, feature order and weights.

Every element of the feature vector is followed on its own, as the chain of operations that the graph applies to the
seconds; reshapes, slices and concatenations move these chains about and need no rule of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

import numpy as np

from .arrays import Array, kind
from .errors import ExtractionError
from .evaluate import Evaluator
from .graph import Linear, Wiring
from .schema import Operator

_MOST_FEATURES = 2**14
_PI = float(np.float32(np.pi))


class _Inexpressible(ExtractionError):
    """The graph's formula is none that the runtime's number conditioner has."""


class Chain:
    """What the graph does to the seconds on the way to one feature: steps like ("mul", 2.0), sine or cosine last."""

    __slots__ = ("steps",)

    def __init__(self, steps: tuple[tuple[str, float], ...] = ()) -> None:
        self.steps = steps

    def then(self, step: str, constant: Any = 0.0) -> Chain:
        if isinstance(constant, Chain):
            raise _Inexpressible("two computed values meet in one operation")
        if not isfinite(constant):
            raise _Inexpressible(f"{step} {constant}")
        return Chain((*self.steps, (step, float(constant))))

    def __add__(self, other: Any) -> Chain:
        return self.then("add", other)

    def __sub__(self, other: Any) -> Chain:
        return self.then("add", -other if not isinstance(other, Chain) else other)

    def __rsub__(self, other: Any) -> Chain:
        return self.then("mul", -1.0).then("add", other)

    def __mul__(self, other: Any) -> Chain:
        return self.then("mul", other)

    def __truediv__(self, other: Any) -> Chain:
        if not isinstance(other, Chain) and other == 0:
            raise _Inexpressible("a division by 0")
        return self.then("div", other)

    def __rtruediv__(self, other: Any) -> Chain:
        raise _Inexpressible("a constant is divided by a computed value")

    def __neg__(self) -> Chain:
        return self.then("mul", -1.0)

    def sin(self) -> Chain:
        return self.then("sin")

    def cos(self) -> Chain:
        return self.then("cos")

    __radd__, __rmul__ = __add__, __mul__


_CLAMPS = {"RELU": (0, None), "RELU6": (0, 6), "RELU_0_TO_1": (0, 1), "RELU_N1_TO_1": (-1, 1)}


class _Chains(Evaluator):
    """The evaluation with chains for numbers, in NumPy arrays of objects."""

    def array(self, value: Any) -> Array:
        return value if hasattr(value, "dtype") and kind(value) == "O" else super().array(value)

    def room(self, operator: Operator, shape: Any, work: int = 0) -> tuple[int, ...]:
        shape = super().room(operator, shape, work)
        if np.prod(shape, dtype=object) > _MOST_FEATURES:
            raise ExtractionError(f"{operator} has more than {_MOST_FEATURES} features of the seconds")
        return shape

    def _apply(self, operator: Operator, operands: list[Array | None]) -> Sequence[Array]:
        if any(value is not None and kind(value) == "O" for value in operands):
            name = operator.name
            if name in ("CAST", "DEQUANTIZE", "QUANTIZE"):
                return operands[:1]
            if name in _CLAMPS and len(operands) == 1:
                low, high = _CLAMPS[name]
                clamped = _each("max", operands[0], np.array(low))
                return [clamped if high is None else _each("min", clamped, np.array(high))]
            if name in ("MINIMUM", "MAXIMUM", "DIV") and len(operands) == 2:
                self.room(operator, np.broadcast_shapes(operands[0].shape, operands[1].shape))
                return [_each({"MINIMUM": "min", "MAXIMUM": "max", "DIV": "div"}[name], *operands)]
        return super()._apply(operator, operands)


def _each(step: str, a: Array, b: Array) -> Array:
    def apply(left: Any, right: Any) -> Any:
        if not isinstance(left, Chain) and not isinstance(right, Chain):
            raise _Inexpressible("constants among the features")
        if step == "div":
            return left / right
        return left.then(step, right) if isinstance(left, Chain) else right.then(step, left)

    return np.asarray(np.frompyfunc(apply, 2, 1)(a, b), dtype=object)


@dataclass(frozen=True)
class Seconds:
    """One number conditioner: `embedding = [features] @ weightᵀ + bias`, with x = (clip(s, min, max) - min) · scale.

    `scale` None stands for the division by max - min. weight (D, features), bias (D,), frequencies (F,): as stored.
    """

    input: int
    linears: tuple[Linear, ...]
    min: float
    max: float
    scale: float | None
    angle_constants: tuple[float, ...]
    features: tuple[str, ...]
    frequencies: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    notes: tuple[str, ...]

    @property
    def formula(self) -> str:
        """The formula in a line, such as `clip(s, 0, 256)·0.00390625 → [x, sin(x·w·2·π), cos(x·w·2·π)] @ Wᵀ + b`."""
        clip = f"clip(s, {self.min:g}, {self.max:g})"
        x = clip if self.min == 0 else f"({clip} - {self.min:g})" if self.min > 0 else f"({clip} + {-self.min:g})"
        x += f"/{self.max - self.min:g}" if self.scale is None else f"·{self.scale:.9g}"
        angle = "x·w" + "".join("·π" if c == _PI else f"·{c:.9g}" for c in self.angle_constants)
        features = [name if name == "x" else f"{name}({angle})" for name in self.features]
        return f"{x} → [{', '.join(features)}] @ Wᵀ + b"


def chains(wiring: Wiring, input_: int, target: int) -> np.ndarray:
    """What the graph makes of an input of one number in each element of a tensor: Chains, or plain constants."""
    start = np.full(wiring.shape(input_), None, object)
    start[...] = Chain()
    return _Chains(wiring).run({input_: start}, [target])[0].reshape(-1)


def recover(wiring: Wiring, evaluator: Evaluator, linears: Sequence[Linear], input_: int) -> Seconds:
    """The number conditioner behind `linears`, which all read the same graph input. Raises ExtractionError.

    An exporter may write a chain once for the tokens and once for the global vector; both must then say the same.
    """
    found = [_recover_one(wiring, evaluator, linear, input_) for linear in linears]
    first = found[0]
    for other in found[1:]:
        if other.formula != first.formula or any(
            not np.array_equal(getattr(other, name), getattr(first, name)) for name in ("frequencies", "weight", "bias")
        ):
            raise ExtractionError(f"input {input_} is embedded twice, by different formulas")
    return Seconds(**{**vars(first), "linears": tuple(linears)})


def _recover_one(wiring: Wiring, evaluator: Evaluator, linear: Linear, input_: int) -> Seconds:
    shape = wiring.shape(input_)
    if np.prod(shape, dtype=np.int64) != 1:
        raise ExtractionError(f"input {input_} takes {list(shape)} numbers at once; only a batch of one is understood")
    try:
        return _interpret(chains(wiring, input_, linear.input), evaluator, linear, input_)
    except ExtractionError as error:
        problem = f"the seconds formula is none that the runtime has: {error}"
        raise ExtractionError(problem, describe(wiring, evaluator, [linear.output])) from error


def _interpret(features: np.ndarray, evaluator: Evaluator, linear: Linear, input_: int) -> Seconds:
    weight = evaluator.weight(linear)
    if weight.shape[1] != len(features) or not all(isinstance(item, Chain) and item.steps for item in features):
        raise _Inexpressible(f"{len(features)} features meet a weight of shape {list(weight.shape)}")
    kinds = [item.steps[-1][0] if item.steps[-1][0] in ("sin", "cos") else "x" for item in features]
    places = {feature: [i for i, other in enumerate(kinds) if other == feature] for feature in dict.fromkeys(kinds)}
    angles = {feature: [features[i].steps[:-1] for i in places[feature]] for feature in places if feature != "x"}
    if len(places.get("x", ())) > 1 or not angles:
        raise _Inexpressible("the features are not x, sines and cosines")
    number = features[places["x"][0]].steps if "x" in places else _shared_number(next(iter(angles.values())))
    notes: list[str] = []
    low, high, scale = _number(number, notes)
    frequencies: dict[str, tuple[float, ...]] = {}
    factors: dict[str, tuple[float, ...]] = {}
    for feature, chains in angles.items():
        frequencies[feature], factors[feature] = _angle(chains, number, notes)
    reference = next(iter(frequencies))
    for feature, found in frequencies.items():
        if sorted(found) != sorted(frequencies[reference]) or factors[feature] != factors[reference]:
            raise _Inexpressible("sines and cosines have different angles")
        # the columns of both follow the frequencies of the one that comes first
        ranks = np.argsort(np.argsort(frequencies[reference], kind="stable"))
        places[feature] = [places[feature][i] for i in np.argsort(found, kind="stable")[ranks]]
    columns = [i for feature in places for i in places[feature]]
    if columns != list(range(len(features))):
        notes.append("features are interleaved in the graph; their columns were sorted into blocks")
        weight = weight[:, columns]
    stored = np.array(frequencies[reference], np.float64)
    exact = stored.astype(np.float16) if weight.dtype == np.float16 else stored.astype(np.float32)
    return Seconds(
        *(input_, (linear,), low, high, scale, factors[reference], tuple(places)),
        *(exact if (exact == stored).all() else stored.astype(np.float32), weight, evaluator.bias(linear)),
        tuple(dict.fromkeys(notes)),
    )


def _shared_number(chains: Sequence[tuple[tuple[str, float], ...]]) -> tuple[tuple[str, float], ...]:
    """Without an x among the features: everything up to the last clip, and one scaling after it, is the number."""
    last = max((i for i, step in enumerate(chains[0]) if step[0] in ("min", "max", "add")), default=-1)
    return chains[0][: last + 2]


def _number(steps: Sequence[tuple[str, float]], notes: list[str]) -> tuple[float, float, float | None]:
    """min, max and scale of `(clip(s, min, max) - min) · scale` for a chain of clips, shifts and scalings."""
    low, high, offset, scale, divisor = -inf, inf, 0.0, 1.0, None
    for step, constant in steps:
        if step in ("min", "max"):
            bound = constant / scale - offset
            if scale != 1:
                # a clip after the scaling names its end in scaled units: take the whole number that scales to it
                whole = float(round(bound))
                bound = whole if np.float32(whole + offset) * np.float32(scale) == np.float32(constant) else bound
            low, high = (low, min(high, bound)) if step == "min" else (max(low, bound), high)
        elif step == "add":
            offset += constant / scale
        elif step in ("mul", "div") and constant > 0:
            divisor = constant if step == "div" and scale == 1 else None
            scale *= constant if step == "mul" else 1 / constant
            if not 0 < scale < inf:
                raise _Inexpressible("a scale beyond all numbers")
        else:
            raise _Inexpressible(f"{step} {constant:g} on the way to x")
    if not (isfinite(low) and isfinite(high) and low < high):
        raise _Inexpressible(f"the seconds are clipped to {low:g} and {high:g}")
    if offset != -low:
        raise _Inexpressible(f"{-offset:g} is subtracted where the clip begins at {low:g}")
    if divisor is not None and divisor == high - low:
        return low, high, None
    if float(np.float32(scale)) != scale:
        notes.append(f"the scale {scale:.9g} was rounded to float32: the graph has it as a quotient or product")
    return low, high, float(np.float32(scale))


def _angle(
    chains: Sequence[tuple[tuple[str, float], ...]], number: Sequence[tuple[str, float]], notes: list[str]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Frequencies, and the factors that all angles share, from chains that begin with `number`."""
    tails = [chain[len(number) :] for chain in chains]
    if any(chain[: len(number)] != tuple(number) for chain in chains) or len({len(tail) for tail in tails}) != 1:
        raise _Inexpressible("the angles do not all begin with x")
    constants = []
    for place, column in enumerate(zip(*tails, strict=True)):
        if any(step not in ("mul", "div") for step, _ in column):
            raise _Inexpressible(f"{column[0][0]} {column[0][1]:g} inside an angle")
        values = tuple(constant if step == "mul" else 1 / constant for step, constant in column)
        if any(float(np.float32(value)) != value for value in values):
            notes.append(f"factor {place + 1} of the angle is a quotient and was rounded to float32")
            values = tuple(float(np.float32(value)) for value in values)
        constants.append(values)
    varying = [place for place, column in enumerate(constants) if len(set(column)) > 1]
    if len(varying) > 1 or not constants:
        raise _Inexpressible("the angles are not x times frequencies times shared factors")
    place = varying[0] if varying else 0
    if place:
        notes.append("the graph multiplies by shared factors before the frequencies; here they follow, up to rounding")
    return constants[place], tuple(column[0] for i, column in enumerate(constants) if i != place)


def describe(wiring: Wiring, evaluator: Evaluator, outputs: Sequence[int], start: int | None = None) -> list[str]:
    """The operators behind some tensors, a line each, with small constants; only those after `start`, if given."""
    return [
        f"  {operator.index} {operator.name}({', '.join(_operand(wiring, evaluator, i) for i in operator.inputs)})"
        f" → {', '.join(f't{i} {list(wiring.shape(i))}' for i in operator.outputs)}"
        for operator in wiring.slice(outputs, ())
        if start is None or start in wiring.reached_by(operator.outputs[0])
    ]


def _operand(wiring: Wiring, evaluator: Evaluator, index: int) -> str:
    if index == -1:
        return "-"
    shape = wiring.shape(index)
    if wiring.dynamic(index) or np.prod(shape, dtype=object) > 4:
        return f"t{index} {list(shape)}" if wiring.dynamic(index) else f"constant {list(shape)}"
    return " ".join(f"{value:.9g}" for value in np.asarray(evaluator.constant(index)).reshape(-1).tolist()) or "[]"
