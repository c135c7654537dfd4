"""Walking a graph: who makes and reads each tensor, what depends on what, its products with constant matrices."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from .errors import ExtractionError
from .schema import Graph, Operator

_REFUSED_TYPES = ("VARIABLE", "SPARSE", "RESOURCE", "VARIANT")
_REFUSED_OPERATORS = ("CUSTOM:", "VAR_HANDLE", "READ_VARIABLE", "ASSIGN_VARIABLE", "CALL_ONCE", "WHILE", "IF")


@dataclass(frozen=True)
class Linear:
    """y = x @ weightᵀ + bias with a constant weight: tensors `input`, `output`, `weight`, and `bias` or -1 for none.

    `transposed` says that the weight is stored as (inputs, outputs).
    """

    operator: Operator
    input: int
    output: int
    weight: int
    bias: int
    transposed: bool
    channels: int


@dataclass(frozen=True)
class Lookup:
    """Rows of a constant table, picked by computed indices."""

    operator: Operator
    indices: int
    output: int
    table: int


class Wiring:
    """A graph with its connections."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.producer = {index: operator for operator in graph.operators for index in operator.outputs}
        self._place = {index: place for place, op in enumerate(graph.operators) for index in op.outputs}
        self.consumed = {index for operator in graph.operators for index in operator.inputs}
        self._inputs = {index: 1 << place for place, index in enumerate(graph.inputs)}
        self._reach = dict(self._inputs)
        for operator in graph.operators:
            reach = 0
            for index in operator.inputs:
                reach |= self._reach.get(index, 0)
            self._reach.update(dict.fromkeys(operator.outputs, reach))

    def refuse_unsupported(self) -> None:
        """Raise ExtractionError for an operator that is custom, or works on variables, resources or sparse data."""
        for operator in self.graph.operators:
            if operator.name.startswith(_REFUSED_OPERATORS):
                raise ExtractionError(f"{operator} is not supported")
            for index in (*operator.inputs, *operator.outputs):
                kind = self.graph.tensors[index].type if index != -1 else ""
                if kind in _REFUSED_TYPES:
                    raise ExtractionError(f"{operator} uses tensor {index}, which is {kind.lower()}: not supported")

    def shape(self, index: int) -> tuple[int, ...]:
        return self.graph.tensors[index].shape

    def dynamic(self, index: int) -> bool:
        """Whether a tensor depends on any input of the graph."""
        return self._reach.get(index, 0) != 0

    def reached_by(self, index: int) -> tuple[int, ...]:
        """The graph's inputs that a tensor depends on, in the graph's order."""
        return tuple(i for i, bit in self._inputs.items() if self._reach.get(index, 0) & bit)

    def slice(self, outputs: Sequence[int], known: Collection[int], constants: bool = False) -> list[Operator]:
        """The operators that compute `outputs`, in order, where the tensors in `known` need no computing.

        Those that depend on no input are in the slice only if `constants` are asked for.
        """
        pending, places = list(outputs), set()
        while pending:
            index = pending.pop()
            place = self._place.get(index)
            if place is None or place in places or index in known or not (constants or self.dynamic(index)):
                continue
            places.add(place)
            pending.extend(self.graph.operators[place].inputs)
        return [self.graph.operators[place] for place in sorted(places)]

    def constants(self, outputs: Sequence[int]) -> set[int]:
        """The stored constants that some tensors are made of."""
        operands = {index for op in self.slice(outputs, (), constants=True) for index in op.inputs}
        return {i for i in operands.union(outputs) if i != -1 and self.graph.tensors[i].data is not None}

    def sources(self, stops: Collection[int]) -> dict[int, frozenset[int]]:
        """For every computed tensor: the nearest tensors before it among `stops` and the graph's inputs."""
        nearest: dict[int, frozenset[int]] = {}
        ends = {*stops, *self.graph.inputs}
        for operator in self.graph.operators:
            found: set[int] = set()
            for index in operator.inputs:
                found.update((index,) if index in ends else nearest.get(index, ()))
            nearest.update(dict.fromkeys(operator.outputs, frozenset(found)))
        return nearest

    def linears(self) -> list[Linear]:
        """Every product of a computed tensor with a constant matrix, in the graph's order."""
        found = []
        for operator in self.graph.operators:
            if operator.name not in ("FULLY_CONNECTED", "CONV_2D", "BATCH_MATMUL") or len(operator.inputs) < 2:
                continue
            x, weight = operator.inputs[:2]
            shape = self.shape(weight) if weight != -1 else ()
            if x == -1 or not self.dynamic(x) or self.dynamic(weight) or len(shape) < 2:
                continue
            transposed = operator.name == "BATCH_MATMUL" and not operator.options["adj_y"]
            if operator.name == "CONV_2D" and not _is_product(shape, operator):
                continue
            if operator.name == "BATCH_MATMUL" and (any(size != 1 for size in shape[:-2]) or operator.options["adj_x"]):
                continue
            bias = operator.inputs[2] if len(operator.inputs) > 2 else -1
            channels = shape[-1] if transposed else shape[-2] if operator.name == "BATCH_MATMUL" else shape[0]
            found.append(Linear(operator, x, operator.outputs[0], weight, bias, transposed, channels))
        return found

    def lookups(self, dynamic: bool = True) -> list[Lookup]:
        """Every lookup in a constant table, by computed (`dynamic`) or by constant indices, in the graph's order."""
        found = []
        for operator in self.graph.operators:
            if operator.name not in ("GATHER", "GATHER_ND", "EMBEDDING_LOOKUP") or len(operator.inputs) < 2:
                continue
            table, indices = operator.inputs[:2]
            if operator.name == "EMBEDDING_LOOKUP":
                table, indices = indices, table
            if -1 in (table, indices) or self.dynamic(table) or len(self.shape(table)) != 2:
                continue
            if self.dynamic(indices) == dynamic and operator.options.get("axis", 0) == 0:
                found.append(Lookup(operator, indices, operator.outputs[0], table))
        return found


def _is_product(shape: tuple[int, ...], operator: Operator) -> bool:
    """Whether a convolution is a matrix product: of one point, at every place."""
    return shape[1:3] == (1, 1) and (operator.options["stride_h"], operator.options["stride_w"]) == (1, 1)
