"""The text path: all weights of a T5 encoder under their Hugging Face names, exactly as the graph holds them.

The graph's matrix products, its token lookup and its softmaxes are the skeleton; the role of each follows from which of
them reach which. What lies between them is identified by probing (see probe.py), so that fused or separate q, k and v,
and any spelling of norms, masks, layouts and activations, come out the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from . import relative_bias
from .errors import ExtractionError
from .evaluate import Evaluator
from .graph import Linear, Wiring
from .probe import Probe, Stage, shaped
from .schema import Operator

# what the runtime's config takes
_MOST_TOKENS = 2**14
Weight = Callable[[], np.ndarray]


@dataclass
class T5:
    """What was recovered. `weights` are under Hugging Face's names and made when called for, one at a time.

    `residual` are the stages whose sum is the last hidden state before its norm; `projection` is what follows that
    norm, or None. `unreachable` are the buckets of a folded bias that no input can reach.
    """

    ids: int
    mask: int
    encode_length: int
    residual: list[Stage]
    projection: Linear | None = None
    weights: dict[str, Weight] = field(default_factory=dict)
    config: dict[str, object] = field(default_factory=dict)
    unreachable: tuple[int, ...] = ()
    half_gelu: bool = False
    half: bool = False
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def stored(self, values: np.ndarray) -> np.ndarray:
        """Probed values in the file's precision: float16 where that is exact and the table's too."""
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        return half if self.half and np.array_equal(half, values) else values


def recover(wiring: Wiring, evaluator: Evaluator) -> T5:
    """Raises ExtractionError where the graph is no T5 encoder that the runtime can express."""
    return _Recovery(wiring, evaluator).run()


class _Recovery:
    def __init__(self, wiring: Wiring, evaluator: Evaluator) -> None:
        self.wiring, self.evaluator = wiring, evaluator
        lookups = [lookup for lookup in wiring.lookups() if len(wiring.reached_by(lookup.indices)) == 1]
        if len(lookups) != 1:
            raise ExtractionError(f"{len(lookups)} token lookups found; conditioners have one")
        self.embedding = lookups[0]
        self.vocabulary, self.width = wiring.shape(self.embedding.table)
        self.ids = wiring.reached_by(self.embedding.indices)[0]
        size = int(np.prod(wiring.shape(self.embedding.output), dtype=object))
        self.length = size // max(self.width, 1)
        if size == 0 or size != self.length * self.width:
            raise ExtractionError(f"{self.embedding.operator} gives {list(wiring.shape(self.embedding.output))}")
        self.linears = [linear for linear in wiring.linears() if self.ids in wiring.reached_by(linear.input)]
        softmaxes = [op for op in wiring.graph.operators if op.name == "SOFTMAX" and wiring.dynamic(op.outputs[0])]
        outputs = [self.embedding.output, *(linear.output for linear in self.linears)]
        self.near = wiring.sources([*outputs, *(op.outputs[0] for op in softmaxes)])
        self.softmaxes = [op for op in softmaxes if op.inputs and op.inputs[0] in self.near]
        self.mask = self._mask_input()
        self.probe = Probe(wiring, evaluator, self.length, self.mask)
        self.t5 = T5(self.ids, self.mask, self.length, [Stage(self.embedding.output, self.width)])
        self.t5.half = evaluator.constant(self.embedding.table).dtype == np.float16
        self.epsilons: set[float] = set()
        self.bias: np.ndarray | None = None
        self.activations: set[str] = set()
        self.key_first: list[bool] = []
        self.ones = 0

    def run(self) -> T5:
        self._check_ids()
        self.t5.weights["shared.weight"] = lambda: self.evaluator.constant(self.embedding.table)
        unused, layers = list(self.linears), 0
        group = self._reading_residual(unused)
        while (softmax := self._softmax_after(group)) is not None:
            out = self._attention(group, softmax, f"encoder.block.{layers}.layer.0.")
            unused = [linear for linear in unused if linear not in (*group, out)]
            group = self._reading_residual(unused)
            out = self._feed_forward(group, unused, layers)
            unused = [linear for linear in unused if linear not in (*group, out)]
            group = self._reading_residual(unused)
            layers += 1
        if not layers:
            raise ExtractionError("no attention follows the token lookup: this is no T5 encoder")
        if len(group) > 1 or len(unused) > len(group):
            raise ExtractionError(f"{unused[-1].operator} has no place in a T5 encoder of {layers} layers")
        self.t5.projection = group[0] if group else None
        self._finish(layers)
        return self.t5

    def _mask_input(self) -> int:
        inputs = set(self.wiring.graph.inputs)
        masks = {i for op in self.softmaxes for i in self.near[op.inputs[0]] if i in inputs}
        if len(masks) != 1 or self.ids in masks:
            raise ExtractionError(
                f"attention is masked by {len(masks - {self.ids})} inputs of the graph; T5 has one mask"
            )
        mask = masks.pop()
        sizes = {int(np.prod(self.wiring.shape(index), dtype=object)) for index in (self.ids, mask)}
        if len(sizes) > 1 or max(sizes) > _MOST_TOKENS:
            raise ExtractionError(f"ids and mask have {sorted(sizes)} tokens; both need as many, up to {_MOST_TOKENS}")
        return mask

    def _check_ids(self) -> None:
        """The indices of the lookup are the token ids themselves, however negative ones are treated."""
        size = int(np.prod(self.wiring.shape(self.ids), dtype=object))
        steps = np.linspace(0, self.vocabulary - 1, 4 * size).round().astype(np.int64).reshape(4, size)
        for ids in steps:
            found = self.evaluator.run({self.ids: ids}, [self.embedding.indices])[0]
            if found.size > size or not np.array_equal(found.reshape(-1), ids[: found.size]):
                raise ExtractionError(f"{self.embedding.operator} does not look up the token ids themselves")

    def _reading_residual(self, linears: Sequence[Linear]) -> list[Linear]:
        """Those whose input is made of the whole residual stream so far, and of nothing else."""
        stream = {stage.tensor for stage in self.t5.residual}
        return [linear for linear in linears if self.near[linear.input] == stream]

    def _softmax_after(self, group: Sequence[Linear]) -> Operator | None:
        outputs = {linear.output for linear in group}
        for softmax in self.softmaxes:
            sources = self.near[softmax.inputs[0]] - {self.mask}
            if sources and sources <= outputs:
                return softmax
        return None

    def _stages(self, group: Sequence[Linear], tensor: int) -> tuple[list[Linear], list[Stage]]:
        """Those of the group that reach a tensor directly, in the graph's order."""
        used = [linear for linear in group if linear.output in self.near[tensor]]
        return used, [Stage(linear.output, linear.channels) for linear in used]

    def _attention(self, group: Sequence[Linear], softmax: Operator, name: str) -> Linear:
        where = f"attention before {softmax}"
        scores, weights = softmax.inputs[0], softmax.outputs[0]
        heads, rest = divmod(int(np.prod(self.wiring.shape(scores), dtype=object)), self.length**2)
        if rest or not heads or softmax.options["beta"] != 1:
            raise ExtractionError(f"{where} has scores of shape {list(self.wiring.shape(scores))}")
        after = [linear for linear in self.linears if weights in self.near[linear.input]]
        if len(after) != 1:
            raise ExtractionError(f"{where} is followed by {len(after)} products")
        out = after[0]
        used, stages = self._stages(group, scores)
        pairs, bias = self.probe.scores(stages, scores, heads, where)
        self._masks(stages, scores, bias, where)
        if self.bias is not None and not np.array_equal(bias, self.bias):
            raise ExtractionError(f"{where} has a relative bias of its own; T5 shares one")
        self.bias = bias
        self.key_first.append(bool(pairs[:, 0].min() > pairs[:, 1].min()))
        value_used, value_stages = self._stages(group, out.input)
        context = self.probe.context(weights, value_stages, out.input, heads, where)
        order = np.lexsort((context[:, 1], context[:, 0]))
        if len(context) != pairs.shape[0] * pairs.shape[2] or self.near[out.input] != {
            weights,
            *(stage.tensor for stage in value_stages),
        }:
            raise ExtractionError(f"{where}: queries, keys and values do not fit each other")
        picked = {"q": pairs[:, 0].reshape(-1), "k": pairs[:, 1].reshape(-1), "v": context[order, 1]}
        gains = self._gains([*used, *value_used], name + "layer_norm.weight", where)
        for letter, channels in picked.items():
            linears = value_used if letter == "v" else used
            self._put(f"{name}SelfAttention.{letter}.weight", linears, channels, gains)
        self.t5.weights[f"{name}SelfAttention.o.weight"] = lambda: _columns(self.evaluator.weight(out), order)
        self._no_bias(out)
        self._fits(out, self.width)
        self.t5.residual.append(Stage(out.output, self.width))
        self.t5.config.update(d_kv=pairs.shape[2], num_heads=heads)
        self._unused(group, [*used, *value_used])
        return out

    def _masks(self, stages: Sequence[Stage], scores: int, bias: np.ndarray, where: str) -> None:
        """A masked key is out of reach for every query of every head, and the mask does nothing else."""
        mask = np.arange(int(np.prod(self.wiring.shape(self.mask), dtype=object))) % 3 != 1
        found = self.probe.read({stage: np.zeros(1) for stage in stages}, scores, mask.astype(np.float64))
        found = shaped(found, bias.shape, where)
        real = mask[: self.length]
        if len(real) < self.length or (found[..., real] != bias[..., real]).any() or found[..., ~real].max() > -1e4:
            raise ExtractionError(f"{where}: the mask does not hide padding, or does more than that")

    def _feed_forward(self, group: Sequence[Linear], linears: Sequence[Linear], layer: int) -> Linear:
        name = f"encoder.block.{layer}.layer.1."
        made = {linear.output for linear in group}
        after = [linear for linear in linears if self.near[linear.input] and self.near[linear.input] <= made]
        if len(after) != 1:
            raise ExtractionError(f"layer {layer} has {len(after)} products after its first feed-forward product")
        out = after[0]
        where = f"feed-forward before {out.operator}"
        used, stages = self._stages(group, out.input)
        width = self.evaluator.weight(out).shape[1]
        activation, channels = self.probe.feed_forward(stages, out.input, width, where)
        self.activations.add(activation)
        order = np.argsort(channels[:, 0])
        gains = self._gains(used, name + "layer_norm.weight", where)
        letters = ("wi",) if channels.shape[1] == 1 else ("wi_0", "wi_1")
        for letter, side in zip(letters, channels[order].T, strict=True):
            self._put(f"{name}DenseReluDense.{letter}.weight", used, side, gains)
        self.t5.weights[f"{name}DenseReluDense.wo.weight"] = lambda: _columns(self.evaluator.weight(out), order)
        self._no_bias(out)
        self._fits(out, self.width)
        self.t5.residual.append(Stage(out.output, self.width))
        gated = channels.shape[1] == 2
        kind = {(False, True): "relu", (True, False): "gated-gelu"}.get((gated, activation == "relu"))
        if kind is None or self.t5.config.get("feed_forward_proj", kind) != kind:
            raise ExtractionError(f"{where}: {'gated ' if gated else ''}{activation} is none that the runtime has")
        self.t5.config.update(d_ff=width, feed_forward_proj=kind)
        self._unused(group, used)
        return out

    def _unused(self, group: Sequence[Linear], used: Sequence[Linear]) -> None:
        for linear in group:
            if linear not in used:
                raise ExtractionError(f"{linear.operator} reads the residual stream but has no part in its block")

    def _gains(self, linears: Sequence[Linear], name: str, where: str) -> dict[int, np.ndarray | None]:
        """Records the norm before some products, and returns what is left to multiply into each of their weights."""
        found: dict[int, np.ndarray] = {}
        for tensor in dict.fromkeys(linear.input for linear in linears):
            found[tensor], epsilon = self.probe.norm(self.t5.residual, tensor, f"the norm in {where}")
            self.epsilons.add(epsilon)
        gains = list(found.values())
        if all(np.array_equal(gain, gains[0]) for gain in gains):
            self.t5.weights[name] = lambda: self.t5.stored(gains[0])
            self.ones += int((gains[0] == 1).all())
            return dict.fromkeys(found)
        self.t5.weights[name] = lambda: np.ones(self.width, np.float32)
        self.t5.notes.append(f"{name} is folded into some of the weights after it: now into all of them")
        return dict(found)

    def _put(self, name: str, linears: Sequence[Linear], channels: np.ndarray, gains: dict) -> None:
        """Adds a weight made of chosen output channels of some products, counted over all of them."""
        for linear in linears:
            self._no_bias(linear)

        def make() -> np.ndarray:
            parts, start = [], 0
            for linear in linears:
                inside = (channels >= start) & (channels < start + linear.channels)
                if inside.any():
                    weight = _rows(self.evaluator.weight(linear), channels[inside] - start)
                    gain = gains[linear.input]
                    parts.append((inside, weight if gain is None else weight.astype(np.float32) * gain))
                start += linear.channels
            if len(parts) == 1:
                return parts[0][1]
            whole = np.empty((len(channels), self.width), np.result_type(*(weight for _, weight in parts)))
            for inside, weight in parts:
                whole[inside] = weight
            return whole

        for linear in linears:
            if self.evaluator.weight(linear).shape != (linear.channels, self.width):
                raise ExtractionError(f"{linear.operator} has no weight of {linear.channels} × {self.width}")
        self.t5.weights[name] = make

    def _fits(self, linear: Linear, channels: int) -> None:
        if linear.channels != channels:
            raise ExtractionError(f"{linear.operator} writes {linear.channels} channels, the residual has {channels}")

    def _no_bias(self, linear: Linear) -> None:
        if self.evaluator.bias(linear).any():
            raise ExtractionError(f"{linear.operator} adds a bias, which T5 has not")

    def _finish(self, layers: int) -> None:
        if len(self.epsilons) != 1 or not min(self.epsilons) > 0:
            raise ExtractionError(f"the norms have the epsilons {sorted(self.epsilons)}; T5 has one, above 0")
        if len(self.activations) != 1:
            raise ExtractionError(f"the layers have different activations: {', '.join(sorted(self.activations))}")
        if self.ones:
            self.t5.notes.append(f"the gains of {self.ones} norms are 1: none, or folded into the weights after them")
        odd = [block for block, first in enumerate(self.key_first) if self.key_first.count(first) * 2 < layers]
        if odd:
            self.t5.warnings.append(
                f"queries and keys of block {', '.join(map(str, odd))} change places against the other blocks: the "
                "exporter may have transposed the scores; the recovered weights follow the graph"
            )
        self.t5.half_gelu = "half-precision" in next(iter(self.activations))
        lookups = self.wiring.lookups(dynamic=False)
        tables = [self.evaluator.constant(lookup.table) for lookup in lookups]
        table, distance, self.t5.unreachable = relative_bias.recover(self.bias, tables)
        self.t5.weights["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = lambda: (
            self.t5.stored(table)
        )
        self.t5.config.update(
            vocab_size=self.vocabulary,
            d_model=self.width,
            num_layers=layers,
            relative_attention_num_buckets=len(table),
            relative_attention_max_distance=distance,
            layer_norm_epsilon=self.epsilons.pop(),
        )


def _rows(weight: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows of a weight, a view where they are neighbours."""
    if len(rows) and (np.diff(rows) == 1).all():
        return weight[rows[0] : rows[-1] + 1]
    return weight[rows]


def _columns(weight: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return weight if np.array_equal(columns, np.arange(weight.shape[1])) else weight[:, columns]
