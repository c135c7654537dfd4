"""Conditioners written by hand in TensorFlow, with everything folded that an optimiser may fold.

2π lies in the frequencies, the norms' gains in the weights after them, the relative bias in a constant; there are
slices and transposes that change nothing, and each formula is spelled otherwise than the two exporters spell it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .export_sources import Source


def folded_route(source: Source, state: dict[str, np.ndarray], output: Path) -> None:
    """Write the conditioners of `state` (names of a model folder) as a float32 TFLite file."""
    import tensorflow as tf

    t5 = {name.split("prompt.model.")[1]: value for name, value in state.items() if "prompt.model." in name}
    embedding = {name.split("embedding.")[1]: value for name, value in state.items() if "seconds_total" in name}
    length, count, heads = source.encode_length, source.max_length, source.t5["num_heads"]
    bias = _bias(t5["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"], length)
    # float32 twice, as onnxsim folds it
    frequencies = ((embedding["0.weights"] * np.float32(2)) * np.float32(np.pi))[None]

    def norm(x: Any) -> Any:
        return x / tf.sqrt(tf.reduce_mean(x * x, axis=-1, keepdims=True) + 1e-6)

    def split(x: Any) -> Any:
        return tf.transpose(tf.reshape(x, [length, heads, -1]), [1, 0, 2])

    def block(x: Any, hidden: Any, layer: int) -> Any:
        name = f"encoder.block.{layer}.layer."
        gain = t5[name + "0.layer_norm.weight"][:, None]
        q, k, v = (
            split(tf.matmul(norm(x), t5[f"{name}0.SelfAttention.{letter}.weight"].T * gain))
            for letter in ("q", "k", "v")
        )
        scores = tf.einsum("htd,hsd->hts", q, k) + bias
        attention = tf.nn.softmax(tf.where(hidden, tf.constant(-1e9), scores), -1)
        context = tf.reshape(tf.transpose(tf.matmul(attention, v), [1, 0, 2]), [length, -1])
        x = tf.matmul(context, t5[name + "0.SelfAttention.o.weight"].T) + x
        gain = t5[name + "1.layer_norm.weight"][:, None]
        inner = tf.nn.relu(tf.matmul(norm(x), t5[name + "1.DenseReluDense.wi.weight"].T * gain))
        return tf.matmul(inner, t5[name + "1.DenseReluDense.wo.weight"].T) + x

    def conditioners(seconds: Any, attention_mask: Any, input_ids: Any) -> tuple[Any, Any, Any]:
        x = tf.gather_nd(t5["shared.weight"], tf.reshape(input_ids, [length, 1]))
        hidden = tf.equal(tf.reshape(attention_mask, [1, 1, length]), 0)
        for layer in range(source.t5["num_layers"]):
            x = block(x, hidden, layer)
        x = norm(x)[:count] * t5["encoder.final_layer_norm.weight"]
        mask = tf.cast(attention_mask[:, :count], tf.float32)
        tokens = tf.expand_dims(x * tf.reshape(mask, [count, 1]), 0)
        ratio = tf.minimum(tf.maximum(tf.reshape(seconds, [1, 1]), 0.0), 256.0) / 256.0
        angles = frequencies * ratio
        features = tf.concat([ratio, tf.sin(angles), tf.cos(angles)], axis=-1)[:, 0 : 1 + 2 * source.frequencies]
        dense = tf.matmul(features, embedding["1.weight"].T) + embedding["1.bias"]
        cross = tf.concat([tokens, tf.expand_dims(dense, 1)], axis=-2)
        return tf.concat([mask, tf.ones([1, 1])], -1), dense, cross

    signature = [
        tf.TensorSpec([1], tf.float32, "seconds_0"),
        tf.TensorSpec([1, length], tf.int32, "attention_mask"),
        tf.TensorSpec([1, length], tf.int32, "input_ids"),
    ]
    function = tf.function(conditioners, input_signature=signature).get_concrete_function()
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function])
    output.write_bytes(converter.convert())


def _bias(table: np.ndarray, length: int) -> np.ndarray:
    """The relative bias (heads, length, length) of transformers' T5."""
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    buckets = T5Attention._relative_position_bucket(distance, num_buckets=len(table))
    return table[buckets.numpy()].transpose(2, 0, 1)
