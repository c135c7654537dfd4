"""A side of `python -m golden bench` that runs in a process of its own, under its own interpreter.

It prints a line of JSON about itself; then, for every line that it reads, it makes a clip and prints a line of JSON:
how many seconds each stage took, by the names of mlx_audio_native.bench.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .recording import GoldenError

_ROOT = Path(__file__).parent.parent


def serve(make: Callable[[dict[str, Any]], Any]) -> None:
    """In the side's process: `make` takes the options and returns what has `about()` and `run()`."""
    answers, sys.stdout = sys.stdout, sys.stderr  # the reference prints, too
    side = make(json.loads(sys.argv[1]))
    print(json.dumps(side.about()), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(side.run()), file=answers, flush=True)


class Side:
    """The other end: `about` what it says of itself, and `seconds` of each stage, a value a run, the first one cold.

    `run` and `warm_up` are those of mlx_audio_native.bench.Bench.
    """

    def __init__(self, name: str, process: subprocess.Popen[str], errors: IO[str]) -> None:
        self.name, self._process, self._errors = name, process, errors
        self.about = self._read()
        self.seconds: dict[str, list[float]] = {}

    def run(self) -> None:
        print(file=self._process.stdin, flush=True)
        for stage, seconds in self._read().items():
            self.seconds.setdefault(stage, []).append(seconds)

    def warm_up(self) -> None:
        """A run that is not counted."""
        self.run()
        for seconds in self.seconds.values():
            seconds.pop()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines() or ["it said nothing"]
            raise GoldenError(f"{self.name} did not run: {said[-1]}")
        return json.loads(line)


@contextmanager
def open_side(name: str, module: str, python: str, **options: Any) -> Iterator[Side]:
    """Start one; it ends with the block. Raises GoldenError if it cannot run."""
    command = [python, "-m", f"golden.{module}", json.dumps(options)]
    pipe = subprocess.PIPE
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        try:
            process = subprocess.Popen(command, cwd=_ROOT, stdin=pipe, stdout=pipe, stderr=errors, text=True)
        except OSError as error:
            raise GoldenError(f"cannot start {python}: {error.strerror}") from None
        with process:
            yield Side(name, process, errors)
