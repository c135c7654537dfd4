"""What the LiteRT interpreter gives for an exported file, without any delegate, recorded as a golden file."""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from .export_sources import Source

_TOOLS = ("torch", "transformers", "stable-audio-tools", "onnx2tf", "tensorflow", "litert-torch", "ai-edge-litert")


def record(path: Path, source_name: str, source: Source, recipe: str) -> Path:
    """Run `path` on a few texts and numbers and write `<path>.safetensors`: inputs and outputs, a row for each run."""
    inputs = _inputs(source)
    outputs = run(path, inputs)
    target = path.with_suffix(".safetensors")
    provenance = {
        "recorded": "outputs of the LiteRT interpreter without delegate",
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
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
    return {"input_ids": ids, "attention_mask": mask, "numbers": numbers}


def run(path: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`cross_attention`, `mask` and `global_cond` for each row of the inputs."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    resolver = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = Interpreter(str(path), experimental_op_resolver_type=resolver)
    interpreter.allocate_tensors()
    rows: dict[str, list[np.ndarray]] = {"cross_attention": [], "mask": [], "global_cond": []}
    tokens = max(detail["shape"][1] for detail in interpreter.get_output_details() if len(detail["shape"]) == 3)
    for row in range(len(inputs["input_ids"])):
        for detail in interpreter.get_input_details():
            value = _input(detail["name"], inputs, row)
            interpreter.set_tensor(detail["index"], value.reshape(detail["shape"]).astype(detail["dtype"]))
        interpreter.invoke()
        for detail in interpreter.get_output_details():
            value = interpreter.get_tensor(detail["index"])[0]
            kind = "cross_attention" if value.ndim == 2 else "mask" if value.shape == (tokens,) else "global_cond"
            rows[kind].append(value)
    return {name: np.stack(values) for name, values in rows.items()}


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
