"""`python -m golden COMMAND`: records, checks and measures. A command is a module with `add_arguments` and `run`."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from mlx_audio_native import MlxAudioError
from mlx_audio_native.blas import launch_directly

# command → its module here, imported only when asked for, and what it does
COMMANDS = {
    "export": ("export", "export reference conditioners to TFLite and record the interpreter's outputs"),
    "export-model": ("export_model", "export a model folder whole to TFLite: conditioners, DiT, decoder"),
    "export-arm": ("export_arm", "export a tiny random model as Arm's recipe does, for the tests"),
    "checkpoint": ("checkpoint", "write a random checkpoint in a release's own layout and size"),
    "train": ("train", "train the embedded demo model from nothing, on one large GPU"),
    "record": ("record", "record the reference's tensors for the stored models, or for a model folder"),
    "compare": ("compare", "hold a model folder against recorded tensors; the embedded model's without arguments"),
    "conformance": ("conformance", "how far each stage is from the reference in each precision"),
    "bench": ("bench", "time the runtime beside the reference, with the same weights"),
    "listen": ("listen", "generate held-out prompts and count how many sound like what was asked for"),
}


def main(argv: list[str]) -> int:
    commands = "\n".join(f"  {name:<12}{what}" for name, (_, what) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m golden",
        description=f"commands:\n{commands}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS)
    name = parser.parse_args(argv[:1]).command
    module, what = COMMANDS[name]
    options = argparse.ArgumentParser(prog=f"python -m golden {name}", description=what)
    try:
        command = import_module(f".{module}", __package__)
        command.add_arguments(options)
        return command.run(options.parse_args(argv[1:]))
    except ModuleNotFoundError as error:
        print(f"error: {name} needs {error.name}; the README tells how to install the reference", file=sys.stderr)
        return 1
    except MlxAudioError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    launch_directly()  # as the command line does
    sys.exit(main(sys.argv[1:]))
