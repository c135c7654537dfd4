"""An Oobleck decoder: its weights under stable-audio-tools' names, from the graph that a TFLite export made of it.

The graph is walked back from its output. Reshapes and transpositions are looked through; every other operator must be
what the decoder has at its place, and nothing that the output depends on may be left over. Weight norm is fused in such
a graph, and snake's exp(α) and 1/(exp(β) + 1e-9) are folded, so α and β come back through a logarithm.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod

import numpy as np

from .convolutions import padding
from .errors import ExtractionError
from .evaluate import Evaluator
from .graph import Wiring
from .schema import Operator

_LAYOUT = ("RESHAPE", "TRANSPOSE", "EXPAND_DIMS", "SQUEEZE", "QUANTIZE", "DEQUANTIZE")
_DILATIONS = (1, 3, 9)
_KERNEL = 7
_SNAKE_EPSILON = 1e-9
_OPERANDS = {
    **{"CONV_2D": 2, "TRANSPOSE_CONV": 3, "SELECT": 3, "SELECT_V2": 3},
    **dict.fromkeys(("ADD", "SUB", "MUL", "DIV", "GREATER", "GREATER_EQUAL"), 2),
}
_MOST_LEVELS = 19  # of the runtime's config


@dataclass
class Decoder:
    """What was recovered. `config` is that of the decoder, `weights` go by their names below `decoder.layers.`.

    `latents` are the frames of the graph's window. `entry` is the input of the first convolution; `stages` are those of
    the transposed ones and of the last one, and at last the output, each with the multiplications up to there.
    """

    wiring: Wiring
    evaluator: Evaluator
    config: dict[str, object]
    scale: float
    latents: int
    weights: dict[str, np.ndarray]
    entry: int
    stages: list[tuple[int, int]]


def recover(wiring: Wiring) -> Decoder:
    """Raises ExtractionError where the graph is no Oobleck decoder that the runtime can express."""
    if len(wiring.graph.outputs) != 1 or len(wiring.graph.inputs) != 1:
        raise ExtractionError("a decoder has one input and one output")
    return _Recovery(wiring).run()


@dataclass(frozen=True)
class _Level:
    """A transposed convolution between its activation and its residual units, all tensors by layer."""

    upsample: Operator
    stride: int
    tensors: dict[str, np.ndarray]


class _Recovery:
    def __init__(self, wiring: Wiring) -> None:
        self.wiring, self.evaluator = wiring, Evaluator(wiring)
        self.placed: set[int] = set()
        self.activations: set[str] = set()

    def run(self) -> Decoder:
        output = self.wiring.graph.outputs[0]
        tensor = self.look_through(output)
        tanh = self.take(tensor, "TANH")
        last = self.convolution(self.look_through(tanh.inputs[0]) if tanh else tensor, _KERNEL, 1)
        audio_weight, none = self.weights(last)
        if none.any():
            raise ExtractionError(f"{last} adds a bias, which a decoder's last convolution has not")
        tensor, snake = self.activation(last.inputs[0], "")
        levels: list[_Level] = []
        while not self.is_first(tensor) and len(levels) < _MOST_LEVELS:
            tensor, level = self.level(tensor)
            levels.insert(0, level)
        if not levels:
            raise ExtractionError("no transposed convolution makes the last one's input: this is no Oobleck decoder")
        first = self.convolution(tensor, _KERNEL, 1)
        scale = self.scale(first.inputs[0])
        self.refuse_others(output)

        count = len(levels)
        named = _below("0.", dict(zip(("weight", "bias"), self.weights(first), strict=True)))
        for place, level in enumerate(levels, start=1):
            named |= _below(f"{place}.layers.", level.tensors)
        named |= _below(f"{count + 1}.", snake) | {f"{count + 2}.weight": audio_weight}
        widths = [audio_weight.shape[1], *(self.wiring.shape(level.upsample.inputs[2])[-1] for level in levels[::-1])]
        if any(width % widths[0] for width in widths):
            raise ExtractionError(f"the levels have {widths} channels, which are no multiples of the first")
        if len(self.activations) > 1:
            raise ExtractionError(f"the activations are {' and '.join(sorted(self.activations))}; a decoder has one")
        config = {
            **{"out_channels": len(audio_weight), "latent_dim": named["0.weight"].shape[1], "channels": widths[0]},
            "c_mults": [width // widths[0] for width in widths[1:]],
            "strides": [level.stride for level in levels[::-1]],
            **{"use_snake": self.activations == {"snake"}, "final_tanh": tanh is not None},
        }
        ends = [*(level.upsample.inputs[2] for level in levels), last.inputs[0], output]
        latents = prod(self.wiring.shape(first.inputs[0])[1:3])
        return Decoder(
            *(self.wiring, self.evaluator, config, scale, latents, named, first.inputs[0]),
            [(tensor, self.work(tensor)) for tensor in ends],
        )

    def look_through(self, tensor: int) -> int:
        """The tensor before the operators that only move numbers."""
        while (operator := self.take(tensor, *_LAYOUT)) is not None:
            tensor = operator.inputs[0]
        return tensor

    def take(self, tensor: int, *names: str) -> Operator | None:
        """The operator that makes a computed tensor, if it has one of these names; it has found its place then."""
        operator = self.wiring.producer.get(tensor)
        if operator is None or operator.name not in names or not self.wiring.dynamic(tensor):
            return None
        operands = operator.inputs[: _OPERANDS.get(operator.name, 1)]
        if -1 in operands or len(operands) < _OPERANDS.get(operator.name, 1):
            raise ExtractionError(f"{operator} lacks an operand")
        self.placed.add(operator.outputs[0])
        return operator

    def need(self, tensor: int, *names: str) -> Operator:
        operator = self.take(tensor, *names)
        if operator is None:
            raise ExtractionError(f"{self.describe(tensor)} stands where an Oobleck decoder has {' or '.join(names)}")
        return operator

    def describe(self, tensor: int) -> str:
        return str(self.wiring.producer.get(tensor, f"tensor {tensor}"))

    def convolution(self, tensor: int, kernel: int, dilation: int) -> Operator:
        """A convolution that keeps the length. Raises ExtractionError for any other."""
        operator = self.need(self.look_through(tensor), "CONV_2D")
        axis = self.axis(operator, operator.inputs[0], operator.outputs[0])
        letter = "hw"[axis]
        size = self.wiring.shape(operator.inputs[1])[1 + axis]
        # along an axis of one point a dilation says nothing
        own = operator.options[f"dilation_{letter}"] if size > 1 else dilation
        length = self.wiring.shape(operator.inputs[0])[1 + axis]
        reach = dilation * (kernel - 1)
        same = padding(operator, length, length, 1, reach + 1) == (reach // 2, reach // 2)
        if (size, own, operator.options[f"stride_{letter}"], same) != (kernel, dilation, 1, True):
            raise ExtractionError(f"{operator} is not the convolution of {kernel} taps, dilated {dilation}, due there")
        return operator

    def axis(self, operator: Operator, narrow: int, wide: int) -> int:
        """Which of a convolution's two axes is the time's: 0 or 1. The other one has a single point everywhere."""
        shapes = [self.wiring.shape(tensor) for tensor in (narrow, wide, operator.inputs[1])]
        if any(len(shape) != 4 or 0 in shape for shape in shapes) or shapes[0][0] != 1 or shapes[1][0] != 1:
            raise ExtractionError(f"{operator} works on {list(shapes[0])}; one clip and two axes were expected")
        for axis in (1, 0):
            if all(shape[2 - axis] == 1 for shape in shapes):
                return axis
        raise ExtractionError(f"{operator} works on two axes; audio has one")

    def weights(self, operator: Operator) -> tuple[np.ndarray, np.ndarray]:
        """A convolution's kernel as torch stores it, and its bias."""
        transposed = operator.name == "TRANSPOSE_CONV"
        kernel = self.constant(operator, operator.inputs[1])
        kernel = kernel.reshape(len(kernel), -1, kernel.shape[-1])
        place = 3 if transposed else 2
        absent = len(operator.inputs) <= place or operator.inputs[place] == -1
        bias = np.zeros(len(kernel), np.float32) if absent else self.constant(operator, operator.inputs[place])
        if bias.size != len(kernel):
            raise ExtractionError(f"{operator} has {bias.size} biases for {len(kernel)} channels")
        return kernel.transpose((2, 0, 1) if transposed else (0, 2, 1)), bias.reshape(-1)

    def constant(self, operator: Operator, tensor: int) -> np.ndarray:
        if tensor == -1 or self.wiring.dynamic(tensor):
            raise ExtractionError(f"{operator} has an operand that is computed, where a weight was expected")
        return self.evaluator.constant(tensor)

    def activation(self, tensor: int, name: str) -> tuple[int, dict[str, np.ndarray]]:
        """What is activated before `tensor`, and snake's parameters under names that begin with `name`."""
        tensor = self.look_through(tensor)
        elu = self.take(tensor, "ELU", "SELECT", "SELECT_V2")
        if elu is not None:
            self.activations.add("ELU")
            return self.look_through(elu.inputs[0]) if elu.name == "ELU" else self.spelled_elu(elu), {}
        add = self.need(tensor, "ADD")
        self.activations.add("snake")
        for stream, wave in self.both(add):
            stream = self.look_through(stream)
            found = self.wave(wave, stream)
            if found is not None:
                frequency, magnitude = (value.astype(np.float64) for value in found)
                with np.errstate(divide="ignore", invalid="ignore"):
                    alpha, beta = np.log(frequency), np.log(1 / magnitude - _SNAKE_EPSILON)
                if not (np.isfinite(alpha).all() and np.isfinite(beta).all()):
                    raise ExtractionError(f"the snake that ends in {add} has factors that are not above 0")
                return stream, {f"{name}alpha": alpha.astype(np.float32), f"{name}beta": beta.astype(np.float32)}
        raise ExtractionError(f"{add} stands where an Oobleck decoder has the end of a snake")

    def spelled_elu(self, select: Operator) -> int:
        """x of `x above 0 ? x : exp(x) - 1`."""
        test = self.need(self.look_through(select.inputs[0]), "GREATER", "GREATER_EQUAL")
        below = self.need(self.look_through(select.inputs[2]), "SUB")
        power = self.need(self.look_through(below.inputs[0]), "EXP")
        stream = self.look_through(select.inputs[1])
        same = {stream} == {self.look_through(test.inputs[0]), self.look_through(power.inputs[0])}
        zero, one = self.constant(test, test.inputs[1]), self.constant(below, below.inputs[1])
        if not same or zero.any() or (one != 1).any():
            raise ExtractionError(f"{select} stands where an Oobleck decoder has the end of an ELU")
        return stream

    def both(self, operator: Operator) -> list[tuple[int, int]]:
        """The two operands, in both orders."""
        a, b = operator.inputs[:2]
        return [(a, b), (b, a)]

    def wave(self, tensor: int, stream: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Frequency and magnitude of `magnitude · sin²(frequency · stream)`, or None where `tensor` is none."""
        found = self.scaled(tensor)
        square = found and self.take(self.look_through(found[0]), "MUL", "SQUARE")
        if not square or len({self.look_through(operand) for operand in square.inputs}) != 1:
            return None
        sine = self.take(self.look_through(square.inputs[0]), "SIN")
        angle = sine and self.scaled(sine.inputs[0])
        if not angle or self.look_through(angle[0]) != stream:
            return None
        return angle[1], found[1]

    def scaled(self, tensor: int) -> tuple[int, np.ndarray] | None:
        """x and the factors, a channel each, of `tensor = x · factors` or `x / divisors`."""
        operator = self.take(self.look_through(tensor), "MUL", "DIV")
        for x, factor in self.both(operator) if operator else ():
            if self.wiring.dynamic(x) and not self.wiring.dynamic(factor):
                if operator.name == "DIV" and x != operator.inputs[0]:
                    return None
                with np.errstate(divide="ignore"):
                    values = self.evaluator.constant(factor).astype(np.float64).reshape(-1)
                    return x, values if operator.name == "MUL" else 1 / values
        return None

    def is_first(self, tensor: int) -> bool:
        operator = self.wiring.producer.get(tensor)
        return operator is not None and operator.name == "CONV_2D"

    def level(self, tensor: int) -> tuple[int, _Level]:
        """What a level works on, and the level whose output is `tensor`."""
        tensors: dict[str, np.ndarray] = {}
        for place, dilation in reversed(list(enumerate(_DILATIONS, start=2))):
            tensor, unit = self.residual_unit(tensor, dilation)
            tensors |= _below(f"{place}.layers.", unit)
        upsample = self.need(self.look_through(tensor), "TRANSPOSE_CONV")
        stride = self.stride(upsample)
        tensor, snake = self.activation(upsample.inputs[2], "0.")
        tensors |= snake | dict(zip(("1.weight", "1.bias"), self.weights(upsample), strict=True))
        return tensor, _Level(upsample, stride, tensors)

    def stride(self, upsample: Operator) -> int:
        narrow, wide = upsample.inputs[2], upsample.outputs[0]
        axis = self.axis(upsample, narrow, wide)
        stride = int(upsample.options[f"stride_{'hw'[axis]}"])
        length, longer = self.wiring.shape(narrow)[1 + axis], self.wiring.shape(wide)[1 + axis]
        kernel = self.wiring.shape(upsample.inputs[1])[1 + axis]
        fits = stride > 0 and kernel == 2 * stride and longer == length * stride - stride % 2
        if not fits or padding(upsample, length, longer, stride, kernel)[0] != ceil(stride / 2):
            raise ExtractionError(f"{upsample} makes {longer} frames of {length} by {kernel} taps, as Oobleck does not")
        return stride

    def residual_unit(self, tensor: int, dilation: int) -> tuple[int, dict[str, np.ndarray]]:
        """What a unit works on and adds to, and its tensors."""
        add = self.need(self.look_through(tensor), "ADD")
        for stream, branch in self.both(add):
            stream, branch = self.look_through(stream), self.look_through(branch)
            point = self.wiring.producer.get(branch)
            if point is None or point.name != "CONV_2D" or self.kernel(point) != 1:
                continue
            point = self.convolution(branch, 1, 1)
            between, second = self.activation(point.inputs[0], "2.")
            wide = self.convolution(between, _KERNEL, dilation)
            start, first = self.activation(wide.inputs[0], "0.")
            if start != stream:
                raise ExtractionError(f"{add} does not add a residual unit to what it works on")
            first |= dict(zip(("1.weight", "1.bias"), self.weights(wide), strict=True))
            return stream, first | second | dict(zip(("3.weight", "3.bias"), self.weights(point), strict=True))
        raise ExtractionError(f"{add} stands where an Oobleck decoder has the end of a residual unit")

    def kernel(self, operator: Operator) -> int:
        return prod(self.wiring.shape(operator.inputs[1])[1:3]) if len(operator.inputs) > 1 else 0

    def scale(self, tensor: int) -> float:
        """What the graph multiplies its latents by before the first convolution."""
        tensor = self.look_through(tensor)
        scale = 1.0
        if tensor != self.wiring.graph.inputs[0] and (found := self.scaled(tensor)) is not None:
            tensor = self.look_through(found[0])
            if len(set(found[1].tolist())) != 1:
                raise ExtractionError("the latents are scaled channel by channel; the runtime knows one scale")
            scale = float(str(np.float32(found[1][0])))
        if tensor != self.wiring.graph.inputs[0]:
            raise ExtractionError(f"{self.describe(tensor)} stands between the latents and the first convolution")
        return scale

    def refuse_others(self, output: int) -> None:
        for operator in self.wiring.slice([output], ()):
            if operator.outputs[0] not in self.placed:
                raise ExtractionError(f"{operator} has no place in an Oobleck decoder")

    def work(self, tensor: int) -> int:
        """Multiplications of the convolutions behind a tensor."""
        total = 0
        for operator in self.wiring.slice([tensor], ()):
            if operator.name in ("CONV_2D", "TRANSPOSE_CONV"):
                wide = operator.outputs[0] if operator.name == "CONV_2D" else operator.inputs[2]
                kernel = self.wiring.shape(operator.inputs[1])
                total += prod(self.wiring.shape(wide)[:3]) * prod(kernel)
        return total


def _below(prefix: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {prefix + name: tensor for name, tensor in tensors.items()}
