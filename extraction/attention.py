"""What a DiT's graph does to queries and keys before a softmax: their norms, and the scale of their product."""

from __future__ import annotations

from math import isfinite, prod, sqrt

import numpy as np

from .errors import ExtractionError
from .evaluate import Evaluator
from .graph import Linear, Wiring
from .layer_norm import Read, layer_norm, plain_scale
from .probe import shaped
from .schema import Operator

_CLOSE = 1e-6
_MOST_FACTOR = 1e4
Norm = tuple[np.ndarray, np.ndarray]


def measure(
    wiring: Wiring,
    evaluator: Evaluator,
    softmax: Operator,
    made_by: tuple[Linear, Linear],
    heads: int,
    head: int,
) -> tuple[tuple[Norm, Norm] | None, float]:
    """Gain and offset of the queries' and of the keys' norm, float64, or None; and how the scores are scaled.

    `made_by` are the products that queries and keys come from. The scale is in excess of 1/√head: 1.0 where it is that.
    Raises ExtractionError.
    """
    product = _product(wiring, softmax)
    norms, scales = [], []
    for side, linear in enumerate(made_by):
        read = _reader(wiring, evaluator, product, side, linear, heads, head)
        where = f"what {product} makes of {linear.operator}"
        norms.append(layer_norm(read, head, where))
        normed = norms[-1] is not None
        tensor = product.inputs[side]
        scales.append(_factor(wiring, evaluator, tensor, linear.output) if normed else plain_scale(read, head, where))
    if (norms[0] is None) != (norms[1] is None):
        raise ExtractionError(f"{product} multiplies normed by plain states")
    ones = {tensor: np.ones(evaluator.room(product, wiring.shape(tensor))) for tensor in product.inputs}
    behind = float(evaluator.run(ones, [softmax.inputs[0]])[0].reshape(-1)[0]) / head
    excess = scales[0] * scales[1] * behind * sqrt(head)
    if not (isfinite(excess) and excess > 0):
        raise ExtractionError(f"the scores before {softmax} are scaled by no positive number")
    excess = 1.0 if abs(excess - 1) <= _CLOSE else excess
    if norms[0] is None:
        return None, excess
    queries, keys = ((norm[0] / scale, norm[1] / scale) for norm, scale in zip(norms, scales, strict=True))
    return (queries, keys), excess


def _product(wiring: Wiring, softmax: Operator) -> Operator:
    """The product of queries and keys before a softmax."""
    tensor = softmax.inputs[0]
    while (operator := wiring.producer.get(tensor)) is not None:
        computed = [index for index in operator.inputs if index != -1 and wiring.dynamic(index)]
        if operator.name == "BATCH_MATMUL" and len(computed) == len(operator.inputs) == 2:
            return operator
        if len(computed) != 1:
            break
        tensor = computed[0]
    raise ExtractionError(f"{softmax} does not follow a product of queries and keys")


def _reader(
    wiring: Wiring, evaluator: Evaluator, product: Operator, side: int, linear: Linear, heads: int, head: int
) -> Read:
    """Reads the first head's queries (side 0) or keys at position 0, for what every head is fed."""
    tensor = product.inputs[side]
    # position 0 is not rotated; channels lie last unless the operand is transposed
    last = product.options["adj_y"] if side else not product.options["adj_x"]

    def read(value: np.ndarray) -> np.ndarray:
        shape = evaluator.room(linear.operator, wiring.shape(linear.output))
        states = evaluator.run({linear.output: np.resize(value, shape)}, [tensor])[0]
        count = max(states.size // (heads * head), 1)
        states = shaped(states, (heads, count, head) if last else (heads, head, count), f"an operand of {product}")
        return states[0, 0] if last else states[0, :, 0]

    return read


def _factor(wiring: Wiring, evaluator: Evaluator, tensor: int, start: int) -> float:
    """The single numbers that are multiplied in between two tensors, whatever their sign.

    A norm hides what stands before it, so that this may be too much or too little: what is missing is in the excess.
    """
    factor = 1.0
    for operator in wiring.slice([tensor], {start}):
        for index in operator.inputs if operator.name == "MUL" else ():
            if index != -1 and not wiring.dynamic(index) and prod(wiring.shape(index)) == 1:
                factor *= abs(float(evaluator.constant(index).reshape(-1)[0]))
    return factor if 0 < factor < _MOST_FACTOR else 1.0
