"""What TFLite files give, by the LiteRT interpreter without delegates: goldens of somebody's own export.

A folder's files are told apart by their names, as Arm's recipe gives them: conditioners, dit, autoencoder. Their
inputs and outputs are told apart by shapes and by what they do, since names and order change with the exporter.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import numpy as np

from .recording import GoldenError, Recording, Request, sha256

_KINDS = ("conditioners", "dit", "autoencoder")  # in this order: the first has the second in it
_TIMES = (1.0, 0.9525741, 0.5, 0.02)
_NUMBERS = (0.0, 1.5, 30.0, 300.0, 10.0)
_NUMBER_IDS = ("seconds_start", "seconds_total")
_PIECES = 40  # ids below it are in any vocabulary; 1 ends a text


class Graph:
    """A TFLite file in the interpreter. Raises GoldenError if it is none, or cannot be run.

    `sparing` lets tensors share memory, as a decoder's must. The interpreter of ai-edge-litert 2.3.0 then overwrites
    some that it still needs, where a DiT's heads are rotated whole.
    """

    def __init__(self, path: Path, sparing: bool = False) -> None:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        self.path = path
        resolver = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        try:
            self._interpreter = Interpreter(
                str(path), experimental_op_resolver_type=resolver, experimental_preserve_all_tensors=not sparing
            )
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise GoldenError(f"{path} cannot be run: {str(error).splitlines()[0]}") from None
        self.inputs = {detail["index"]: detail for detail in self._interpreter.get_input_details()}
        self._outputs = self._interpreter.get_output_details()

    def shape(self, index: int) -> tuple[int, ...]:
        return tuple(int(size) for size in self.inputs[index]["shape"])

    def run(self, values: dict[int, np.ndarray]) -> list[np.ndarray]:
        """The outputs; an input that is not given is zero."""
        for index, detail in self.inputs.items():
            value = np.asarray(values.get(index, 0))
            value = np.broadcast_to(value.reshape(detail["shape"]) if value.ndim else value, detail["shape"])
            self._interpreter.set_tensor(index, value.astype(detail["dtype"]))
        self._interpreter.invoke()
        return [self._interpreter.get_tensor(detail["index"]).copy() for detail in self._outputs]

    @property
    def precision(self) -> str:
        """Of the weights: int8 stands for every integer, float16 for half precision anywhere."""
        found = {detail["dtype"] for detail in self._interpreter.get_tensor_details() if detail["shape"].size > 1}
        return "int8" if found & {np.int8, np.uint8} else "float16" if np.float16 in found else "float32"

    def refuse(self, why: str) -> GoldenError:
        found = ", ".join(f"{self.shape(index)} {np.dtype(d['dtype']).name}" for index, d in self.inputs.items())
        return GoldenError(f"{self.path} {why}; its inputs are {found}")


def record(folder: Path) -> Recording:
    """Goldens of the files in a folder, one of each kind at most. Raises GoldenError."""
    graphs = {kind: Graph(path, sparing=kind == "autoencoder") for kind, path in _find(folder).items()}
    tensors: dict[str, np.ndarray] = {}
    stages: dict[str, str] = {}
    notes: dict[str, str] = {}
    numbers: dict[str, tuple[float, ...]] = {}
    if "conditioners" in graphs:
        numbers = _record_conditioners(graphs["conditioners"], tensors)
        stages |= dict.fromkeys(("seconds", "conditioning"), graphs["conditioners"].precision)
    if "dit" in graphs:
        if not _record_dit(graphs["dit"], tensors):
            notes["global conditioning"] = "lost in the DiT's export, which hears the time alone; compared with zeros"
        stages["velocity"] = graphs["dit"].precision
    if "autoencoder" in graphs:
        _record_decoder(graphs["autoencoder"], tensors)
        stages["decoder"] = graphs["autoencoder"].precision
    provenance = {
        "recorded": "outputs of the LiteRT interpreter without delegates",
        "files": ", ".join(f"{graph.path.name} {sha256(graph.path)}" for graph in graphs.values()),
        "versions": f"ai-edge-litert {version('ai-edge-litert')}",
        "schedule": "none, nothing was sampled",
        **notes,
    }
    return Recording(tensors, Request((), numbers, (), "", _TIMES, ()), stages, provenance)


def _find(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.tflite")):
        kind = next((kind for kind in _KINDS if kind in path.name.lower()), None)
        if kind is None or kind in found:
            raise GoldenError(f"{path}: its name must have one of {', '.join(_KINDS)}, and no other file's the same")
        found[kind] = path
    return found


def _record_conditioners(graph: Graph, tensors: dict[str, np.ndarray]) -> dict[str, tuple[float, ...]]:
    texts = [index for index, detail in graph.inputs.items() if np.issubdtype(detail["dtype"], np.integer)]
    seconds = [index for index, detail in graph.inputs.items() if detail["shape"].prod() == 1 and index not in texts]
    if len(texts) != 2 or not 1 <= len(seconds) <= 2 or len(texts) + len(seconds) != len(graph.inputs):
        raise graph.refuse("is not a conditioners graph")
    length = graph.shape(texts[0])[-1]
    counts = np.array([1, 5, max(1, length // 3), length - 1, length])
    mask = (np.arange(length) < counts[:, None]).astype(np.int32)
    ids = np.random.RandomState(1).randint(3, _PIECES, mask.shape).astype(np.int32) * mask
    ids[np.arange(len(ids)), counts - 1] = 1

    def run(row: int, values: dict[int, float], order: list[int] = texts) -> dict[str, np.ndarray]:
        fed = {index: np.float32(value) for index, value in values.items()}
        return by_kind(graph, graph.run({order[0]: ids[row], order[1]: mask[row], **fed}))

    # only the right order gives a mask with as many ones as there are tokens
    other = texts[::-1]
    fits = [order for order in (texts, other) if run(1, {}, order)["mask"].sum() == counts[1] + len(seconds)]
    if not fits:
        raise graph.refuse("gives no mask of its tokens")
    texts = fits[0]
    still = run(1, {})["global_cond"]
    moved = {index: run(1, {index: 7.0})["global_cond"] != still for index in seconds}
    if not all(change.any() for change in moved.values()):
        raise graph.refuse("has a seconds input that its global output does not hear")
    seconds.sort(key=lambda index: int(moved[index].argmax()))
    numbers = {id_: tuple(np.roll(_NUMBERS, shift).tolist()) for shift, id_ in enumerate(_NUMBER_IDS[-len(seconds) :])}
    rows = [
        run(row, {index: values[row] for index, values in zip(seconds, numbers.values(), strict=True)}, texts)
        for row in range(len(counts))
    ]
    tensors |= {"input.ids": ids, "input.mask": mask.astype(np.float32)}
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    tensors["seconds.global_cond"] = stacked.pop("global_cond")
    tensors |= {f"conditioning.{name}": array for name, array in stacked.items()}
    return numbers


def by_kind(graph: Graph, outputs: list[np.ndarray]) -> dict[str, np.ndarray]:
    """A conditioners graph's outputs: tokens have two axes, the mask 0 or 1 for each of them, the rest is global."""
    outputs = [np.float32(output[0]) for output in outputs]
    tokens = [output for output in outputs if output.ndim == 2]
    vectors = [output for output in outputs if output.ndim == 1]
    if len(tokens) != 1 or len(vectors) != 2:
        raise graph.refuse("does not give tokens, a mask and a global vector")
    masks = [vector for vector in vectors if len(vector) == len(tokens[0])]
    if len(masks) == 2:
        masks = [vector for vector in masks if np.isin(vector, (0, 1)).all()]
    if len(masks) != 1:
        raise graph.refuse("does not give a mask")
    (rest,) = (vector for vector in vectors if vector is not masks[0])
    return {"cross_attention": tokens[0], "mask": masks[0], "global_cond": rest}


def _record_dit(graph: Graph, tensors: dict[str, np.ndarray]) -> bool:
    """Whether the export hears its global conditioning; where it does not, zeros are what it is compared with."""
    (velocity,) = graph.run({})
    latents = [index for index in graph.inputs if graph.shape(index) == velocity.shape]
    tokens = [index for index in graph.inputs if len(graph.shape(index)) == 3 and index not in latents]
    times = [index for index in graph.inputs if np.prod(graph.shape(index)) == 1]
    vectors = [index for index in graph.inputs if len(graph.shape(index)) == 2 and index not in times]
    if not len(latents) == len(tokens) == len(times) == 1 or len(vectors) > 1 or velocity.ndim != 3:
        raise graph.refuse("is not a DiT graph")
    rng = np.random.RandomState(2)
    fed = {index: rng.standard_normal(graph.shape(index)).astype(np.float32) for index in (*latents, *tokens, *vectors)}
    for index, name in zip((*tokens, *vectors), ("conditioning.cross_attention", "seconds.global_cond"), strict=False):
        if name in tensors and tensors[name][:1].shape == fed[index].shape:
            fed[index] = tensors[name][1:2]
    louder = {index: fed[index] + 1 for index in vectors}
    hears = any((graph.run({**fed, **louder})[0] != graph.run(fed)[0]).any() for _ in vectors)
    width = fed[vectors[0]].shape if vectors else tensors.get("seconds.global_cond", np.zeros((1, 1)))[:1].shape
    tensors["input.noise"] = _channels_last(fed[latents[0]])[None]
    tensors["input.cross_attention"] = fed[tokens[0]]
    tensors["input.global_cond"] = fed[vectors[0]] if hears else np.zeros(width, np.float32)
    for t in _TIMES:
        (velocity,) = graph.run({**fed, times[0]: np.float32(t)})
        tensors[f"velocity.t={t:g}"] = _channels_last(velocity)
    return hears


def _record_decoder(graph: Graph, tensors: dict[str, np.ndarray]) -> None:
    (audio,) = graph.run({})
    index = next(iter(graph.inputs))
    if len(graph.inputs) != 1 or audio.ndim != 3 or audio.size <= np.prod(graph.shape(index)):
        raise graph.refuse("is not a decoder")
    latents = np.random.RandomState(3).standard_normal(graph.shape(index)).astype(np.float32)
    tensors["input.latents"] = _channels_last(latents)
    tensors["decoder.audio"] = _channels_last(graph.run({index: latents})[0])


def _channels_last(array: np.ndarray) -> np.ndarray:
    """(1, C, T) or (1, T, C) → (1, T, C): a clip is longer than it has channels."""
    array = np.float32(array)
    return array.swapaxes(1, 2) if array.shape[1] < array.shape[2] else array
