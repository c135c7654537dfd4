"""The command line: thin commands over the package. Each imports what it needs when it runs."""

from __future__ import annotations

import argparse
import json
import logging
import os
import secrets
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from itertools import chain, count, islice
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from . import MlxAudioError, __version__
from .blas import launch_directly
from .errors import InputError

log = logging.getLogger(__name__)
# options of `generate` that a recipe holds too, by the names of both and of Model.generate
_SOUND = ("noise_level", "inpaint", "bars", "bpm")
_COMPILE = "on a GPU, compile first: faster clips after up to half a minute, and a wait for each new length"
_REQUEST = ("prompt", "seconds", "steps", "seed", "cfg_scale", "negative_prompt", "sampler", *_SOUND)


class Command(NamedTuple):
    name: str
    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def generate_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="what to make, e.g. 'kick drum loop, 120 BPM'")
    add("--seconds", type=float, help="length of the clip (default: 4, or the model's window if that is shorter)")
    add("--steps", type=int, help="sampling steps (default: what the model is made for)")
    add("--seed", type=int, help="the same seed makes the same clip (default: drawn, and kept in the file)")
    add("--cfg-scale", type=float, metavar="SCALE", help="guidance; 1 is none (default: what the model is made for)")
    add("--negative-prompt", metavar="TEXT", help="what to guide away from, at another --cfg-scale than 1")
    samplers = "pingpong, euler, rk4 or dpmpp; dpmpp-3m-sde, dpmpp-2m or v-ddim for models of the objective v"
    add("--sampler", metavar="NAME", help=f"{samplers} (default: what the model is made for)")
    add("--init-audio", type=Path, metavar="FILE", help="sound to start from: any file that libsndfile reads")
    add("--noise-level", type=float, metavar="LEVEL", help="how much of it is made anew, 0 to 1 (default: 0.7)")
    add("--inpaint", type=_stretch, metavar="START,END", help="make only these seconds of it anew, and keep the rest")
    add("--trim", action="store_true", help="of an init audio longer than the model's window, take the start")
    add("--bars", type=int, help="make a loop of so many bars, of four beats each")
    add("--bpm", type=float, help="the loop's tempo (default: the one in PROMPT)")
    add("--count", type=int, default=1, metavar="N", help="clips to make, from seeds SEED, SEED+1, …")
    add("--output", type=Path, metavar="PATH", help="a .wav file or a folder (default: a new file named by the prompt)")
    add("--overwrite", action="store_true", help="replace what --output names")
    add("--from", dest="source", type=Path, metavar="FILE.wav", help="make a file's clip again; other options override")
    add("--model", metavar="DIR|ID", help="a model folder, or a hub id (default: the embedded model)")
    add("--compile", action="store_true", help=_COMPILE)


def _stretch(text: str) -> tuple[float, float]:
    try:
        start, end = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"give a start and an end in seconds, as in 1.5,3, not {text!r}") from None
    return start, end


def generate(args: argparse.Namespace) -> None:
    from . import load, read_recipe

    options = {name: value for name in _REQUEST if (value := getattr(args, name)) is not None}
    recipe = read_recipe(args.source) if args.source else None
    if recipe:
        kept = recipe.options()
        # a length that is asked for takes the place of the recipe's
        for name in ("bars", "bpm") if "seconds" in options else ("seconds",) if "bars" in options else ():
            kept.pop(name, None)
        options = kept | options
        if recipe.init_audio and not args.init_audio:
            raise InputError(f"{args.source} was made from {recipe.init_audio!r}: give that file with --init-audio")
    if "prompt" not in options:
        args.parser.error("give a PROMPT, or --from FILE.wav")
    if args.count < 1:
        raise InputError(f"--count must be at least 1, not {args.count}")
    paths = _output_paths(args.output, options["prompt"], args.count, args.overwrite)
    start = time.perf_counter()
    model = load(args.model)
    if args.compile:
        model.compile()
    log.info("%-18s %7.3f s", "loading", time.perf_counter() - start)
    if recipe and recipe.model_sha256 != model.sha256:
        warnings.warn(
            f"{args.source} was made by other weights ({recipe.model!r}): the sound will differ", stacklevel=1
        )
    seed = options.pop("seed", None)
    for clip_seed, path in enumerate(paths, start=secrets.randbelow(2**32) if seed is None else seed):
        audio = model.generate(**options, seed=clip_seed, init_audio=args.init_audio, trim=args.trim)
        audio.save(path, args.overwrite)
        if recipe and recipe.init_audio_sha256 not in (None, audio.recipe.init_audio_sha256):
            warnings.warn(f"{args.source} was made from another file than {args.init_audio}", stacklevel=1)
        print(f"{path}: {audio.recipe.seconds:g} s, seed {clip_seed}")
    _log_machine()


def _output_paths(output: Path | None, prompt: str, number: int, overwrite: bool) -> list[Path]:
    """Where clips go. A file that --output names must be free; a name made from the prompt gets a number to be so."""
    from .audio import check_output, file_stem

    named = output is not None and not output.is_dir()
    base = output if named else (output or Path()) / f"{file_stem(prompt)}.wav"
    paths = chain([base], (base.with_name(f"{base.stem}-{index}{base.suffix}") for index in count(2)))
    if not named and not overwrite:
        paths = (path for path in paths if not path.exists())
    chosen = list(islice(paths, number))
    for path in chosen:
        check_output(path, overwrite)
    return chosen


def _log_machine() -> None:
    import mlx.core as mx

    log.info("peak memory %.0f MB, MLX %s on %s", mx.get_peak_memory() / 1e6, mx.__version__, mx.default_device())


def batch_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    keys = "a prompt and, if wanted, a name and generate's options as a recipe calls them"
    add("path", type=Path, metavar="FILE.jsonl", help=f"a line a clip, a JSON object of {keys}")
    add("--output", type=Path, metavar="DIR", required=True, help="where NAME.wav and manifest.jsonl go")
    add("--batch-size", type=int, default=1, metavar="N", help="clips made at once; above 1 last bits may differ")
    add("--overwrite", action="store_true", help="replace clips that were made otherwise")
    add("--model", metavar="DIR|ID", help="a model folder, or a hub id (default: the embedded model)")
    add("--compile", action="store_true", help=_COMPILE)


def batch(args: argparse.Namespace) -> None:
    from .blas import require_backend

    require_backend()
    from . import batch

    print("\n".join(batch.run(args.model, args.path, args.output, args.batch_size, args.overwrite, args.compile)))
    _log_machine()


def info_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("path", type=Path, metavar="FILE.wav|DIR", help="a generated clip, or a model folder")
    add("--plot", type=Path, metavar="OUT.png", help="draw a clip's waveform and spectrogram")
    add("--overwrite", action="store_true", help="replace what --plot names")


def info(args: argparse.Namespace) -> None:
    if args.path.is_dir():
        if args.plot:
            raise InputError(f"--plot draws a clip; {args.path} is a folder")
        from .info import describe

        for line in describe(args.path):
            print(line)
    else:
        info_clip(args.path)
        if args.plot:
            from .plot import plot_file

            plot_file(args.path, args.plot, args.overwrite)
            print(f"{args.plot}: written")


def info_clip(path: Path) -> None:
    from . import read_recipe

    for name, value in asdict(read_recipe(path)).items():
        if value is not None:
            print(f"{name + ':':19}{value!r}")  # repr: a stranger's file must not steer the terminal


def extract_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("path", type=Path, metavar="FILE.tflite", help="an export of the conditioners")
    add("--output", type=Path, metavar="DIR", required=True, help="the model folder to write")
    add("--tokenizer", type=Path, metavar="spiece.model", help="a sentencepiece model to put beside the weights")
    add("--no-check", action="store_true", help="do not compare what was recovered with the graph itself")
    add("--overwrite", action="store_true", help="replace a folder that an extraction wrote")


def extract(args: argparse.Namespace) -> None:
    function = _extraction().extract
    report = _extracted(function, args.path, args.output, args.tokenizer, not args.no_check, args.overwrite)
    print("\n".join([*report.lines(), f"{args.output}: written"]))


def convert_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a checkpoint's folder or hub id, or a folder with a model's .tflite files")
    add("--output", type=Path, metavar="DIR", required=True, help="the model folder to write")
    add("--dtype", metavar="NAME", help="float16, bfloat16 or float32 (default: as each weight is stored)")
    add("--q-bits", type=int, choices=(8, 4), help="quantise the dense layers of T5 and transformer")
    add("--q-group-size", type=int, choices=(32, 64, 128), help="weights to a scale (default: 64)")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text-encoder", metavar="DIR|ID", help="a T5's folder or hub id, if SOURCE has none or another")
    text.add_argument("--conditioners", type=Path, metavar="FILE.tflite", help="take T5 from an export of conditioners")
    add("--tokenizer", type=Path, metavar="spiece.model", help="where neither T5 nor SOURCE has one beside it")
    add("--overwrite", action="store_true", help="replace a model folder")


def convert(args: argparse.Namespace) -> None:
    from . import hub
    from .config import read_config_json
    from .convert import Recovered, convert
    from .quantization import Quantization
    from .weights import WEIGHTS, open_checkpoint

    if args.q_group_size and not args.q_bits:
        args.parser.error("--q-group-size says nothing without --q-bits")
    quantization = Quantization(args.q_bits, args.q_group_size or 64) if args.q_bits else None
    model, text_encoder = hub.resolve(args.source), args.text_encoder
    with tempfile.TemporaryDirectory() as scratch:
        if any(model.glob("*.tflite")) and not (model / WEIGHTS).exists():
            config, tensors, report = _extracted(_extraction("arm").read, model)
            print("\n".join(report.lines()))
            model = Recovered(model, sorted(model.glob("*.tflite")), config, tensors)
        if path := args.conditioners:
            # through a folder, so that what was recovered is checked and need not stay in memory
            folder = Path(scratch) / "conditioner"
            report = _extracted(_extraction().extract, path, folder)
            print("\n".join(report.lines()))
            text_encoder = Recovered(path.absolute().parent, [path], read_config_json(folder), open_checkpoint(folder))
        lines = convert(model, args.output, args.dtype, quantization, text_encoder, args.tokenizer, args.overwrite)
    print("\n".join(lines))
    _log_machine()


def inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="FILE.tflite", help="a TFLite file")
    parser.add_argument("--json", action="store_true", help="for programs")


def inspect(args: argparse.Namespace) -> None:
    report = _extraction().inspect(args.path)
    print(json.dumps(report.as_json(), indent=2) if args.json else "\n".join(report.lines()))


def bench_arguments(parser: argparse.ArgumentParser) -> None:
    from .releases import OPEN_1_0, SMALL

    add = parser.add_argument
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", metavar="DIR|ID", help="a model folder, or a hub id (default: the embedded model)")
    model.add_argument("--random", choices=(SMALL, OPEN_1_0), help="the sizes of this model, with random weights")
    add("--seconds", type=float, help="length of the clip (default: the model's window)")
    add("--steps", type=int, help="sampling steps (default: what the model is made for)")
    add("--batch", type=int, default=1, metavar="N", help="clips at once (default: 1)")
    add("--dtype", metavar="NAME", help="float16, bfloat16 or float32 (default: what generate takes)")
    add("--compile", action="store_true", help=_COMPILE)
    add("--runs", type=int, default=5, metavar="N", help="after the first, cold one (default: 5)")
    add("--json", type=Path, metavar="FILE", help="write the figures there, too")


def bench(args: argparse.Namespace) -> None:
    from .bench import run, table, write_json

    options = {name: getattr(args, name) for name in ("seconds", "steps", "batch")}
    report = run(args.model, args.random, args.dtype, args.runs, args.compile, **options)
    print("\n".join(table(report)))
    if args.json:
        write_json(report, args.json)


def serve_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    add("--port", type=int, default=7860, help="0 takes any that is free (default: 7860)")
    add("--model", metavar="DIR|ID", help="a model folder, or a hub id (default: the embedded model)")
    add("--compile", action="store_true", help=_COMPILE)


def serve(args: argparse.Namespace) -> None:
    from .page import serve

    serve(args.model, args.host, args.port, args.compile)


def _extraction(module: str = "") -> ModuleType:
    try:
        import tflite  # noqa: F401
    except ImportError as error:
        raise InputError("reading .tflite files takes an extra: pip install '.[extract]' in the clone") from error
    return import_module(f"extraction.{module}" if module else "extraction")


def _extracted(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of `extraction` returns; lines that show what is wrong go before the error's sentence."""
    from extraction import ExtractionError

    try:
        return function(*arguments)
    except ExtractionError as error:
        for line in error.details:
            print(line, file=sys.stderr)
        raise MlxAudioError(error.problem) from error


COMMANDS = (
    Command("generate", "a prompt in, a WAV out", generate_arguments, generate),
    Command("batch", "a list of prompts in, a folder of WAVs out", batch_arguments, batch),
    Command("serve", "a page in the browser, and an HTTP API", serve_arguments, serve),
    Command("convert", "a published checkpoint as one model folder", convert_arguments, convert),
    Command("extract", "a .tflite file's conditioners as part of a model folder", extract_arguments, extract),
    Command("inspect", "what a .tflite file holds", inspect_arguments, inspect),
    Command("bench", "how long each stage takes on this machine", bench_arguments, bench),
    Command("info", "what made a clip, or what a model folder holds", info_arguments, info),
)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        "mlx-audio-native", description="Text to audio with Stable Audio Open models, in MLX."
    )
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        sub = commands.add_parser(command.name, help=command.summary, description=command.summary)
        command.add_arguments(sub)
        sub.add_argument("--verbose", action="store_true", help="tell the time of each stage, and the peak memory")
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(run=command.run, parser=sub)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run a command. Returns 0, 1 after an error told in one line on stderr, 130 if interrupted.

    A wrong command line raises SystemExit with 2.
    """
    args = parser().parse_args(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger(__package__).setLevel(logging.INFO if args.verbose else logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)  # the same one once, however many clips
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        try:
            args.run(args)
            sys.stdout.flush()
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:  # `| head` has read enough; what is left goes nowhere, without a word
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except Exception as error:  # whatever it is, a person gets a sentence, and the traceback on request
            if args.debug:
                traceback.print_exc()
            kind = "" if isinstance(error, MlxAudioError | OSError) else f"unexpected {type(error).__name__}: "
            print(f"error: {kind}{' '.join(str(error).split())}", file=sys.stderr)
            return 1
    return 0


def run() -> None:
    launch_directly()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does, leaving nothing half-written
    sys.exit(main())
