"""LiteRT's side of `python -m golden bench`: the .tflite files of `golden export-model`, one clip at a time on the CPU.

Their inputs are zeros, which takes as long as any.
"""

from __future__ import annotations

import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from .bench_side import serve
from .recording import GoldenError

_FILES = {"text and seconds": "conditioners", "a step": "dit", "decoding": "autoencoder"}


class Graphs:
    """The interpreters, with the delegate and the threads that are its default and the machine's."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.steps, self.interpreters = options["steps"], {}
        for stage, kind in _FILES.items():
            paths = sorted(Path(options["folder"]).glob(f"{kind}*.tflite"))
            if len(paths) != 1:
                raise GoldenError(f"{options['folder']} has {len(paths)} files {kind}*.tflite, not one")
            interpreter = self.interpreters[stage] = Interpreter(str(paths[0]), num_threads=os.cpu_count())
            interpreter.allocate_tensors()
            for detail in interpreter.get_input_details():
                interpreter.set_tensor(detail["index"], np.zeros(detail["shape"], detail["dtype"]))

    def about(self) -> dict[str, Any]:
        return {"LiteRT": version("ai-edge-litert"), "device": f"CPU, {os.cpu_count()} threads", "warm_up": 1}

    def run(self) -> dict[str, float]:
        seconds = {stage: self._invoke(stage) for stage in ("text and seconds", "decoding")}
        steps = [self._invoke("a step") for _ in range(self.steps)]
        seconds |= {"sampling": sum(steps), "a step": sum(steps) / self.steps}
        return {**seconds, "clip": seconds["text and seconds"] + seconds["sampling"] + seconds["decoding"]}

    def _invoke(self, stage: str) -> float:
        start = time.perf_counter()
        self.interpreters[stage].invoke()
        return time.perf_counter() - start


if __name__ == "__main__":
    serve(Graphs)
