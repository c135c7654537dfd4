"""The embedded model's conditioner is what the extraction makes of its own float32 TFLite export."""

from pathlib import Path

import mlx.core as mx
import numpy as np
from safetensors.numpy import load_file

from extraction import extract
from mlx_audio_native.model import DEMO

EXPORT = Path(__file__).parent.parent / "golden" / "data" / "demo_conditioners_float32.tflite"


def test_the_embedded_conditioner_is_extracted_byte_for_byte(tmp_path):
    extract(EXPORT, tmp_path / "model")
    extracted = load_file(tmp_path / "model" / "model.safetensors")
    embedded = load_file(DEMO / "model.safetensors")
    names = {name for name in embedded if name.startswith("conditioner.")}
    assert names == set(extracted)
    for name in names:
        assert embedded[name].dtype == extracted[name].dtype == np.float32
        assert embedded[name].tobytes() == extracted[name].tobytes(), name


def test_the_embedded_conditioner_gives_what_the_interpreter_gives():
    from mlx_audio_native import load

    recorded = load_file(EXPORT.with_suffix(".safetensors"))
    with mx.stream(mx.cpu):
        conditioner = load(parts=("conditioner",)).conditioner
        ids, mask, numbers = (recorded[name] for name in ("input_ids", "attention_mask", "numbers"))
        result = conditioner.encode(ids, mask, seconds_total=numbers[:, 0])
        tokens = np.asarray(result.cross_attention)
    for found, expected, bound in (
        (tokens[:, :-1], recorded["cross_attention"][:, :-1], 5e-6),
        (tokens[:, -1], recorded["cross_attention"][:, -1], 1e-6),
        (np.asarray(result.global_cond), recorded["global_cond"], 1e-6),
    ):
        assert np.abs(found - expected).max() <= bound * max(1.0, np.abs(expected).max())
