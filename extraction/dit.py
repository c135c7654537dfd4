"""The diffusion transformer: its weights under stable-audio-tools' names, from the graph that a TFLite export made.

The products with constant matrices and the softmaxes are the skeleton; the role of each follows from which of them
reach which. The norms between them are identified by feeding them (in float64, where gains come out exact), so that it
does not matter how an exporter spelled them, nor whether it folded their gains into the product that follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import pi, prod

import numpy as np

from . import attention
from .errors import ExtractionError
from .evaluate import Evaluator
from .graph import Linear, Wiring
from .layer_norm import layer_norm
from .probe import shaped
from .schema import Operator
from .seconds import Chain, chains

_CLOSE = 1e-6
_LAYER = "transformer.layers.{}."


@dataclass
class DiT:
    """What was recovered. `config` is that of the reference, `weights` go by their names below `model.model.`.

    `latents`, `time`, `tokens` and `vector` are inputs of the graph; `vector` is None where the export has lost its
    global conditioning. `frames` and `context` are the numbers of latent frames and of tokens that the graph takes;
    `entry` is the first product on the way of the latents, the output is the sum of those of `ends`.
    """

    wiring: Wiring
    evaluator: Evaluator
    latents: int
    time: int
    tokens: int
    vector: int | None
    frames: int
    context: int
    config: dict[str, object]
    entry: Linear
    ends: tuple[Linear, Linear]
    weights: dict[str, np.ndarray]
    notes: list[str]


def recover(wiring: Wiring) -> DiT:
    """Raises ExtractionError where the graph is no DiT that the runtime can express."""
    if len(wiring.graph.outputs) != 1:
        raise ExtractionError(f"a DiT has one output, this graph {len(wiring.graph.outputs)}")
    return _Recovery(wiring).run()


@dataclass(frozen=True)
class _Entry:
    """The products that depend on one input of the graph alone."""

    input: int
    linears: list[Linear]


class _Recovery:
    def __init__(self, wiring: Wiring) -> None:
        self.wiring, self.evaluator = wiring, Evaluator(wiring)
        self.linears = wiring.linears()
        softmaxes = [op for op in wiring.graph.operators if op.name == "SOFTMAX" and op.inputs and -1 not in op.inputs]
        self.softmaxes = [op for op in softmaxes if wiring.dynamic(op.inputs[0])]
        outputs = [*(linear.output for linear in self.linears), *(op.outputs[0] for op in self.softmaxes)]
        self.ends, self.near = {*outputs, *wiring.graph.inputs}, wiring.sources(outputs)
        self.unused = list(self.linears)
        self.weights: dict[str, np.ndarray] = {}
        self.epsilons: set[float] = set()
        self.query_key_normed: set[bool] = set()
        self.notes: list[str] = []
        self.ones = 0

    def run(self) -> DiT:
        latents, time, tokens, vector = self.entries()
        self.embedding("to_cond_embed", tokens.linears[:2], biased=False)
        self.embedding("to_timestep_embed", time.linears, biased=True)
        if vector:
            self.embedding("to_global_embed", vector.linears, biased=False)
        preprocess, project_in = latents.linears
        self.put("preprocess_conv", preprocess, preprocess.channels)
        self.put("transformer.project_in", project_in, preprocess.channels)
        self.frames, self.context = self.rows(preprocess), self.rows(tokens.linears[0])
        self.width, self.context_width = project_in.channels, tokens.linears[1].channels
        self.first = [time.linears[1].output, project_in.output]
        self.residual = {*self.first, *([vector.linears[1].output] if vector else [])}
        for entry, rows in ((time, 1), (vector, 1), (latents, self.frames)):
            if entry:
                self.fits(entry.linears[1], rows)

        depth = heads = ff_dim = 0
        linear = self.next_reader()
        while self.attention_of({linear.output}) is not None:
            heads, ff_dim = self.layer(linear, _LAYER.format(depth))
            depth, linear = depth + 1, self.next_reader()
        if not depth:
            raise ExtractionError(f"{linear.operator} is followed by no attention: this is no DiT")
        self.put("transformer.project_out", linear, self.width)
        postprocess = self.reader_of({linear.output}, f"after {linear.operator}")
        self.put("postprocess_conv", postprocess, preprocess.channels)
        for name in ("preprocess_conv.weight", "postprocess_conv.weight"):
            self.weights[name] = self.weights[name][..., None]
        if self.before(self.wiring.graph.outputs[0]) != {linear.output, postprocess.output}:
            raise ExtractionError("the output is not the last projection and what is made of it")
        if self.unused:
            raise ExtractionError(f"{self.unused[0].operator} has no place in a DiT of {depth} layers")
        self.weights["timestep_features.weight"] = self.frequencies(time)[:, None]
        if self.ones:
            self.notes.append(
                f"the gains of {self.ones} norms are 1: folded into the weights after them, or never moved"
            )
        config = self.config(preprocess.channels, depth, heads, ff_dim, vector is not None)
        return DiT(
            *(self.wiring, self.evaluator, latents.input, time.input, tokens.input, vector.input if vector else None),
            *(self.frames, self.context, config, preprocess, (linear, postprocess), self.weights, self.notes),
        )

    def before(self, tensor: int) -> set[int]:
        """The nearest products, softmaxes and inputs that a tensor is made of."""
        return {tensor} if tensor in self.ends else set(self.near.get(tensor, ()))

    def entries(self) -> tuple[_Entry, _Entry, _Entry, _Entry | None]:
        """Latents, time, tokens and global vector, told apart by what the graph does with them."""
        found: dict[str, _Entry] = {}
        reaching = {index for output in self.wiring.graph.outputs for index in self.wiring.reached_by(output)}
        for index in self.wiring.graph.inputs:
            if index not in reaching:
                continue
            linears = [linear for linear in self.linears if self.wiring.reached_by(linear.input) == (index,)]
            kind = self.kind(index, linears)
            if kind is None or kind in found:
                raise ExtractionError(f"input {index} of shape {list(self.wiring.shape(index))} has no part in a DiT")
            found[kind] = _Entry(index, linears)
        for kind in ("latents", "time", "tokens"):
            if kind not in found:
                raise ExtractionError(f"no input of the graph is a DiT's {kind}")
        return found["latents"], found["time"], found["tokens"], found.get("vector")

    def kind(self, index: int, linears: Sequence[Linear]) -> str | None:
        if len(linears) < 2 or self.before(linears[0].input) != {index}:
            return None
        first, second = linears[:2]
        before = self.before(second.input)
        if before == {first.output, index}:
            return "latents" if len(linears) == 2 else None
        if before != {first.output} or any(self.before(item.input) != {second.output} for item in linears[2:]):
            return None
        if len(linears) > 2:
            return "tokens"
        return "time" if prod(self.wiring.shape(index)) == 1 else "vector"

    def rows(self, linear: Linear) -> int:
        """How many rows a product has."""
        rows, rest = divmod(prod(self.wiring.shape(linear.output)), max(linear.channels, 1))
        if rest or not rows:
            raise ExtractionError(f"{linear.operator} gives {list(self.wiring.shape(linear.output))}")
        return rows

    def fits(self, linear: Linear, rows: int) -> None:
        if linear.channels != self.width or self.rows(linear) != rows:
            raise ExtractionError(f"{linear.operator} gives no {rows} × {self.width} values for the residual stream")

    def reader_of(self, sources: set[int], where: str) -> Linear:
        """The product, not yet taken, whose input is made of these tensors and nothing else."""
        found = [linear for linear in self.unused if self.before(linear.input) == sources]
        if len(found) != 1:
            names = ", ".join(str(linear.operator) for linear in found[:3]) or "none"
            raise ExtractionError(f"{where}, a DiT has one product; found {names}")
        return found[0]

    def next_reader(self) -> Linear:
        return self.reader_of(self.residual, "on the whole residual stream")

    def attention_of(self, sources: set[int]) -> Operator | None:
        return next((op for op in self.softmaxes if self.before(op.inputs[0]) == sources), None)

    def put(self, name: str, linear: Linear, inputs: int, biased: bool = False) -> None:
        """Takes a product: its weight, from `inputs` channels, and its bias, which must be zero unless `biased`."""
        weight, bias = self.evaluator.weight(linear), self.evaluator.bias(linear)
        if weight.shape != (linear.channels, inputs) or bias.size != linear.channels:
            raise ExtractionError(f"{linear.operator} has weights {list(weight.shape)}, expected {inputs} inputs")
        self.weights[f"{name}.weight"] = weight
        if biased:
            self.weights[f"{name}.bias"] = bias
        elif bias.any():
            raise ExtractionError(f"{linear.operator} adds a bias, which {name} has not")
        self.unused.remove(linear)

    def embedding(self, name: str, linears: Sequence[Linear], biased: bool) -> None:
        first, second = linears
        self.put(f"{name}.0", first, self.evaluator.weight(first).shape[1], biased)
        self.put(f"{name}.2", second, first.channels, biased)

    def layer(self, qkv: Linear, name: str) -> tuple[int, int]:
        """Takes a layer's products. Returns the number of heads and the width of the feed-forward."""
        self.norm(qkv, name + "pre_norm")
        self.put(name + "self_attn.to_qkv", qkv, self.width)
        softmax = self.attention_of({qkv.output})
        heads = self.heads(softmax, self.frames + 1)
        self.queries_and_keys(name + "self_attn.", softmax, (qkv, qkv), heads)
        self.branch(name + "self_attn.to_out", self.reader_of({softmax.outputs[0], qkv.output}, f"after {softmax}"))

        query = self.next_reader()
        self.norm(query, name + "cross_attend_norm")
        self.put(name + "cross_attn.to_q", query, self.width)
        found = [(linear, op) for linear in self.unused if (op := self.attention_of({query.output, linear.output}))]
        if len(found) != 1 or self.rows(found[0][0]) != self.context:
            raise ExtractionError(f"{query.operator} meets the keys of {len(found)} products; expected one's")
        keys, softmax = found[0]
        self.put(name + "cross_attn.to_kv", keys, self.context_width)
        if keys.channels != 2 * self.context_width or self.heads(softmax, self.context) != heads:
            raise ExtractionError(f"{keys.operator} gives no keys and values for {heads} heads")
        self.queries_and_keys(name + "cross_attn.", softmax, (query, keys), heads)
        self.branch(name + "cross_attn.to_out", self.reader_of({softmax.outputs[0], keys.output}, f"after {softmax}"))

        wide = self.next_reader()
        self.norm(wide, name + "ff_norm")
        self.put(name + "ff.ff.0.proj", wide, self.width, biased=True)
        narrow = self.reader_of({wide.output}, f"after {wide.operator}")
        self.branch(name + "ff.ff.2", narrow, wide.channels // 2, biased=True)
        return heads, wide.channels // 2

    def branch(self, name: str, linear: Linear, inputs: int | None = None, biased: bool = False) -> None:
        """Takes a product that is added to the residual stream."""
        self.put(name, linear, inputs or self.width, biased)
        self.fits(linear, self.frames + 1)
        self.residual.add(linear.output)

    def heads(self, softmax: Operator, keys: int) -> int:
        heads, rest = divmod(prod(self.wiring.shape(softmax.inputs[0])), (self.frames + 1) * keys)
        if rest or not heads or self.width % heads or softmax.options["beta"] != 1:
            raise ExtractionError(f"{softmax} has scores of shape {list(self.wiring.shape(softmax.inputs[0]))}")
        return heads

    def norm(self, linear: Linear, name: str) -> None:
        """Gain and offset of the norm between the residual stream and a product."""
        where = f"the norm before {linear.operator}"
        shapes = {tensor: self.evaluator.room(linear.operator, self.wiring.shape(tensor)) for tensor in self.residual}
        zeros = {tensor: np.zeros(shape) for tensor, shape in shapes.items()}

        def read(value: np.ndarray) -> np.ndarray:
            feeds = {tensor: np.resize(value, shapes[tensor]) for tensor in self.first}
            found = self.evaluator.run(zeros | feeds, [linear.input])[0]
            return shaped(found, (self.frames + 1, self.width), where)[0]

        found = layer_norm(read, self.width, where)
        if found is None:
            raise ExtractionError(f"no norm stands between the residual stream and {linear.operator}")
        gain, offset, epsilon = found[0].astype(np.float32), found[1].astype(np.float32), found[2]
        self.epsilons.add(epsilon)
        self.ones += int((gain == 1).all())
        self.weights |= {f"{name}.gamma": gain, f"{name}.beta": offset}

    def queries_and_keys(self, name: str, softmax: Operator, made_by: tuple[Linear, Linear], heads: int) -> None:
        """Takes the norms of queries and keys, where there are such, and makes up for a scale that was folded."""
        head = self.width // heads
        norms, excess = attention.measure(self.wiring, self.evaluator, softmax, made_by, heads, head)
        self.query_key_normed.add(norms is not None)
        if excess != 1:
            self.notes.append(f"{name}: 1/√{head} is folded into the graph's weights; here the queries make up for it")
        if norms is not None:
            for letter, (gain, offset), factor in zip("qk", norms, (excess, 1.0), strict=True):
                self.weights[f"{name}{letter}_norm.weight"] = (gain * factor).astype(np.float32)
                self.weights[f"{name}{letter}_norm.bias"] = (offset * factor).astype(np.float32)
        elif excess != 1:
            queries = f"{name}to_qkv.weight" if made_by[0] is made_by[1] else f"{name}to_q.weight"
            weight = self.weights[queries].astype(np.float32)
            weight[: self.width] *= np.float32(excess)
            self.weights[queries] = weight

    def frequencies(self, time: _Entry) -> np.ndarray:
        """w of the features cos(2π·t·w), sin(2π·t·w)."""
        features = chains(self.wiring, time.input, time.linears[0].input)
        half, rest = divmod(len(features), 2)
        steps = [item.steps if isinstance(item, Chain) else () for item in features]
        ends = [step[-1][0] if step else "" for step in steps]
        angles = [step[:-1] for step in steps]
        multiplied = all(name == "mul" for angle in angles for name, _ in angle)
        if rest or ends != ["cos"] * half + ["sin"] * half or angles[:half] != angles[half:] or not multiplied:
            raise ExtractionError("the time's features are not cosines and then sines of its multiples")
        factors = np.array([[constant for _, constant in angle] for angle in angles[:half]])
        for place in range(factors.shape[1]):
            others = np.delete(factors, place, axis=1).prod(1)
            if (np.abs(others / (2 * pi) - 1) < _CLOSE).all():
                return factors[:, place].astype(np.float32)
        self.notes.append("2π is folded into the time's frequencies: they are right up to rounding")
        return (factors.prod(1) / (2 * pi)).astype(np.float32)

    def config(self, channels: int, depth: int, heads: int, ff_dim: int, whole: bool) -> dict[str, object]:
        if len(self.epsilons) != 1 or len(self.query_key_normed) != 1:
            raise ExtractionError("the layers have norms of different kinds or epsilons; a DiT has one kind")
        token_dim = self.weights["to_cond_embed.0.weight"].shape[1]
        if self.context_width not in (self.width, token_dim):
            raise ExtractionError(f"tokens of {token_dim} become {self.context_width} wide, which no DiT does")
        epsilon, mult = self.epsilons.pop(), ff_dim / self.width
        # the reference cuts the product down to a whole number
        mult = mult if int(self.width * mult) == ff_dim else (ff_dim + 0.5) / self.width
        return {
            **{"io_channels": channels, "embed_dim": self.width, "depth": depth, "num_heads": heads},
            "cond_token_dim": token_dim,
            "global_cond_dim": self.weights["to_global_embed.0.weight"].shape[1] if whole else 0,
            **({"project_cond_tokens": False} if self.context_width != self.width else {}),
            "transformer_type": "continuous_transformer",
            **({"attn_kwargs": {"qk_norm": "ln"}} if self.query_key_normed.pop() else {}),
            **({"ff_kwargs": {"mult": mult}} if mult != 4 else {}),
            **({"norm_kwargs": {"eps": epsilon}} if epsilon != 1e-5 else {}),
        }
