"""From a .tflite file to the conditioner part of a model folder, and to a report."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlx_audio_native.errors import MlxAudioError
from mlx_audio_native.names import PREFIXES, number_prefix, t5_prefix
from mlx_audio_native.tokenizer import Tokenizer
from mlx_audio_native.weights import save

from .check import compare
from .conditioners import PROMPT, Conditioners, recover
from .errors import ExtractionError
from .graph import Wiring
from .report import Report, report
from .schema import read

# what a folder may hold for --overwrite to replace it
_OWN_FILES = {"config.json", "model.safetensors", "spiece.model"}


def inspect(path: Path | str) -> Report:
    """What a .tflite file holds. Raises ExtractionError for a file that is no TFLite graph."""
    wiring = Wiring(read(path))
    try:
        wiring.refuse_unsupported()
        with np.errstate(all="ignore"):
            return report(wiring, recover(wiring))
    except ExtractionError as error:
        return report(wiring, problem=str(error))


def extract(
    path: Path | str,
    output: Path | str,
    spiece: Path | str | None = None,
    check: bool = True,
    overwrite: bool = False,
) -> Report:
    """Write the conditioner of a .tflite file as the model folder `output`, whole or not at all.

    `check` compares the folder with the graph before it appears; `spiece` is a sentencepiece model to put beside it;
    `overwrite` replaces a folder that an extraction wrote. Raises ExtractionError.
    """
    path, output = Path(path), Path(output)
    _refuse_existing(output, overwrite)
    wiring = Wiring(read(path))
    try:
        wiring.refuse_unsupported()
        # what a damaged graph makes of numbers is compared, not warned of
        with np.errstate(all="ignore"):
            found = recover(wiring)
        config, tensors = config_of(found), Tensors(found)
        if spiece is not None and len(Tokenizer(spiece)) > found.text.config["vocab_size"]:
            raise ExtractionError(f"{spiece} has more pieces than the text encoder has rows")
        with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
            new = Path(scratch) / "new"
            save(new, config, tensors, spiece)
            differences = compare(found, new) if check else None
            result = report(wiring, found, check=differences)
            _put_in_place(new, output, Path(scratch) / "old")
    except ExtractionError as error:
        raise error.about(path) from error
    except MlxAudioError as error:
        raise ExtractionError(
            f"{path}: what was recovered is no conditioner that the runtime takes: {error}"
        ) from error
    except OSError as error:
        raise ExtractionError(f"cannot write {output}: {error.strerror or error}") from error
    return result


def _refuse_existing(output: Path, overwrite: bool) -> None:
    if not output.parent.is_dir():
        raise ExtractionError(f"{output.parent} is not a directory")
    if not (output.exists() or output.is_symlink()):
        return
    if not overwrite:
        raise ExtractionError(f"{output} exists already; ask for it to be overwritten, or choose another name")
    others = (
        [item.name for item in output.iterdir() if item.name not in _OWN_FILES] if output.is_dir() else [output.name]
    )
    if others or output.is_symlink():
        raise ExtractionError(f"{output} holds more than an extraction writes, and is left as it is: {others[:3]}")


def _put_in_place(new: Path, output: Path, old: Path) -> None:
    if output.exists():
        output.rename(old)
    try:
        new.rename(output)
    except OSError:
        if old.exists():
            old.rename(output)
        raise


class Tensors(Mapping[str, np.ndarray]):
    """What was recovered, under the names of a model folder; each tensor is made when it is asked for and not kept."""

    def __init__(self, found: Conditioners) -> None:
        makers: dict[str, Callable[[], np.ndarray]] = {}
        for name, make in found.text.weights.items():
            makers[t5_prefix(PROMPT) + name] = make
        projection = found.text.projection
        if projection is not None:
            prefix = f"{PREFIXES['conditioner']}conditioners.{PROMPT}.proj_out."
            makers[prefix + "weight"] = lambda: found.evaluator.weight(projection)
            makers[prefix + "bias"] = lambda: found.projection_bias
        for id_, number in found.numbers.items():
            prefix = number_prefix(id_)
            makers[prefix + "0.weights"] = lambda number=number: number.frequencies
            makers[prefix + "1.weight"] = lambda number=number: number.weight
            makers[prefix + "1.bias"] = lambda number=number: number.bias
        self._makers = makers

    def __getitem__(self, name: str) -> np.ndarray:
        array = self._makers[name]()
        array = array if array.dtype in (np.float16, np.float32) else array.astype(np.float32)
        if not np.isfinite(array).all():
            raise ExtractionError(f"the weights for {name} are not all finite")
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def config_of(found: Conditioners) -> dict[str, Any]:
    """The model config of the recovered conditioner, in stable-audio-tools' schema with this package's additions."""
    prompt = {
        "max_length": found.max_length,
        "encode_length": found.text.encode_length,
        "t5_config": {"model_type": "t5", **found.text.config},
        **({"project_out": True} if found.text.projection is not None else {}),
    }
    configs: list[dict[str, Any]] = [{"id": PROMPT, "type": "t5", "config": prompt}]
    for id_, number in found.numbers.items():
        values: dict[str, Any] = {"min_val": number.min, "max_val": number.max, "features": list(number.features)}
        if number.scale is not None:
            values["scale"] = number.scale
        values["angle_constants"] = list(number.angle_constants)
        configs.append({"id": id_, "type": "number", "config": values})
    return {
        "model_type": "diffusion_cond",
        "model": {
            "conditioning": {"cond_dim": found.cond_dim, "configs": configs},
            "diffusion": {"cross_attention_cond_ids": list(found.cross_ids), "global_cond_ids": list(found.numbers)},
        },
    }
