"""What was recovered from a file, and what looks wrong in the export: for people, and as JSON for programs."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .check import HALF_GELU_BOUND
from .conditioners import Conditioners, label
from .graph import Wiring


@dataclass(frozen=True)
class Report:
    """`conditioners` is None where none could be recovered, with the reason in `problem`. `check` holds the largest
    differences from the graph, None where they were not measured."""

    file: str
    sha256: str
    bytes: int
    written_by: str
    inputs: list[str]
    outputs: list[str]
    operators: dict[str, int]
    constants: dict[str, int]
    conditioners: dict[str, Any] | None
    problem: str | None
    notes: list[str]
    warnings: list[str]
    check: dict[str, float] | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The report as text."""
        lines = [f"{self.file}: {self.bytes:,} bytes, sha256 {self.sha256}"]
        lines += [f"  {text}" for text in (*self.inputs, *self.outputs)]
        lines.append("operators: " + ", ".join(f"{count} {name}" for name, count in self.operators.items()))
        lines.append("constants: " + ", ".join(f"{count:,} {name.lower()}" for name, count in self.constants.items()))
        found = self.conditioners
        if self.problem is not None:
            lines.append(f"no conditioners: {self.problem}")
        if found is not None:
            lines += [f"{name}: {number['formula']}" for name, number in found["numbers"].items()]
            sizes = ", ".join(f"{name} {value}" for name, value in found["text"].items())
            lines.append(f"precision: {found['precision']}")
            lines.append(f"text: {found['encode_length']} tokens encoded, {found['max_length']} kept; {sizes}")
            lines.append(f"tokens: {', '.join(found['cross_attention'])}; global: {', '.join(found['global'])}")
        if self.check:
            lines.append("differs from the graph by " + ", ".join(f"{v:.1e} ({k})" for k, v in self.check.items()))
        lines += [f"note: {text}" for text in self.notes]
        return [*lines, *(f"warning: {text}" for text in self.warnings)]


def report(
    wiring: Wiring,
    found: Conditioners | None = None,
    problem: str | None = None,
    check: dict[str, float] | None = None,
) -> Report:
    """`found` is None where recovery failed, for `problem`."""
    graph = wiring.graph
    return Report(
        file=graph.path.name,
        sha256=_sha256(graph.path),
        bytes=graph.path.stat().st_size,
        written_by=graph.description,
        inputs=[label(wiring, index) for index in graph.inputs],
        outputs=[label(wiring, index, False) for index in graph.outputs],
        operators=dict(Counter(operator.name for operator in graph.operators).most_common()),
        constants=dict(_constants(wiring).most_common()),
        conditioners=_describe(found) if found else None,
        problem=problem,
        notes=_notes(found) if found else [],
        warnings=_warnings(wiring, found),
        check=check,
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _constants(wiring: Wiring) -> Counter[str]:
    """How many numbers the file's constants of each type hold."""
    constants: Counter[str] = Counter()
    for tensor in wiring.graph.tensors:
        if tensor.data is not None:
            constants[tensor.type] += int(np.prod(tensor.shape, dtype=object))
    return constants


def _describe(found: Conditioners) -> dict[str, Any]:
    return {
        "numbers": {
            name: {
                "formula": number.formula,
                **{"min": number.min, "max": number.max, "scale": number.scale, "features": list(number.features)},
                **{"angle_constants": list(number.angle_constants), "frequencies": len(number.frequencies)},
                "input": found.wiring.graph.inputs.index(number.input),
            }
            for name, number in found.numbers.items()
        },
        "text": dict(found.text.config),
        "encode_length": found.text.encode_length,
        "max_length": found.max_length,
        "cond_dim": found.cond_dim,
        "precision": max(_constants(found.wiring).items(), key=lambda item: item[1])[0].lower(),
        "projection": found.text.projection is not None,
        "cross_attention": list(found.cross_ids),
        "global": list(found.numbers),
        "unreachable_buckets": list(found.text.unreachable),
        "half_precision_gelu": found.text.half_gelu,
    }


def _notes(found: Conditioners) -> list[str]:
    text = found.text
    notes = [f"{name}: {note}" for name, number in found.numbers.items() for note in number.notes]
    notes += text.notes
    if text.unreachable:
        buckets = ", ".join(map(str, text.unreachable))
        notes.append(
            f"relative bias: a folded constant; buckets {buckets} could not be recovered and are 0, "
            f"no input of {text.encode_length} tokens can reach them"
        )
    if text.half_gelu:
        notes.append(f"GELU's constants are half precision in the graph: text agrees to {HALF_GELU_BOUND:g} only")
    return notes


def _warnings(wiring: Wiring, found: Conditioners | None) -> list[str]:
    """Inputs that nothing consumes, and outputs that do not depend on an input they should."""
    graph = wiring.graph
    reached = {index for output in graph.outputs for index in (output, *wiring.reached_by(output))}
    warnings = [
        f"{label(wiring, index)} {'reaches no output' if index in wiring.consumed else 'feeds no operator'}"
        for index in graph.inputs
        if index not in reached
    ]
    if found:
        return warnings + found.warnings
    for output in graph.outputs:
        missing = [
            index for index in graph.inputs if index not in wiring.reached_by(output) and index in wiring.consumed
        ]
        warnings += [f"{label(wiring, output, False)} does not depend on {label(wiring, index)}" for index in missing]
    return warnings
