"""What the LiteRT interpreter gives for an exported file, without any delegate, recorded as a golden file."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from .export_sources import Source
from .record_tflite import Graph, by_kind
from .recording import sha256

INPUTS = ("input_ids", "attention_mask", "numbers")
_TOOLS = ("torch", "transformers", "stable-audio-tools", "onnx2tf", "tensorflow", "litert-torch", "ai-edge-litert")


def record(path: Path, source_name: str, source: Source, recipe: str) -> Path:
    """Run `path` on a few texts and numbers and write `<path>.safetensors`: inputs and outputs, a row for each run."""
    inputs = _inputs(source)
    outputs = run(path, inputs)
    target = path.with_suffix(".safetensors")
    provenance = {
        "recorded": "outputs of the LiteRT interpreter without delegate",
        "file": path.name,
        "sha256": sha256(path),
        "source": source_name,
        "recipe": recipe,
        "versions": ", ".join(f"{name} {found}" for name in _TOOLS if (found := _version(name))),
    }
    save_file({**inputs, **outputs}, target, metadata=provenance)
    return target


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _inputs(source: Source) -> dict[str, np.ndarray]:
    """Texts of all kinds of lengths; numbers at 0, inside, at the ends and past them."""
    rng = np.random.default_rng(5)
    length, crop = source.encode_length, source.max_length
    counts = [1, 4, crop // 2, crop, length]
    ids = np.zeros((len(counts), length), np.int64)
    for row, count in enumerate(counts):
        ids[row, :count] = rng.integers(2, source.t5["vocab_size"], count)
        ids[row, count - 1] = 1
    mask = (np.arange(length) < np.array(counts)[:, None]).astype(np.int64)
    columns = [[0.0, low - 7, high, high * 1.5, low + 0.3 * (high - low)] for _, low, high in source.numbers]
    numbers = np.roll(np.array(columns, np.float32), np.arange(len(columns)).sum(), 1).T.copy()
    return dict(zip(INPUTS, (ids, mask, numbers), strict=True))


def run(path: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`cross_attention`, `mask` and `global_cond` for each row of the inputs."""
    graph = Graph(path)
    rows = []
    for row in range(len(inputs["input_ids"])):
        values = {index: _input(detail["name"], inputs, row) for index, detail in graph.inputs.items()}
        rows.append(by_kind(graph, graph.run(values)))
    return {name: np.stack([outputs[name] for outputs in rows]) for name in rows[0]}


def _input(name: str, inputs: dict[str, np.ndarray], row: int) -> np.ndarray:
    """Which input a tensor is, by the names that this package's own exports give: by number, or by what it is."""
    if "args_" in name:
        place = int(name.rsplit("args_", 1)[1])
    elif "seconds" in name:
        place = 2 + int(name.rsplit("seconds_", 1)[1].split(":")[0])
    else:
        place = 0 if "input_ids" in name else 1
    return (
        inputs["input_ids"][row]
        if place == 0
        else inputs["attention_mask"][row]
        if place == 1
        else inputs["numbers"][row, place - 2]
    )
