"""The reference's side of `python -m golden bench`: stable-audio-tools in torch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mlx_audio_native.schema import read_json

from .bench_side import serve
from .record_torch import load_reference, sample
from .recording import Run

_COMPILED_RUNS = 3  # before CUDA graphs replay: one compiles, one warms up, one records


class Reference:
    """A model folder's reference with weight norm removed; T5 is float16 where the rest is in half precision."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = getattr(torch, options["dtype"])
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options["tf32"]
        folder = Path(options["folder"])
        self.model = model = load_reference(folder, read_json(folder / "config.json"))
        for module in model.modules():
            if hasattr(module, "weight_g"):
                nn.utils.remove_weight_norm(module)
        model.to(self.device)
        model.model.to(self.dtype)
        model.pretransform.to(self.dtype)
        model.pretransform.iterate_batch = False
        if self.dtype != torch.float32:
            model.conditioner.conditioners["prompt"].model.half()
        if options["compile"]:
            model.model.model = torch.compile(model.model.model, mode="reduce-overhead")
            model.pretransform.model.decoder = torch.compile(model.pretransform.model.decoder, mode="reduce-overhead")
        self.seconds: dict[str, float] = {}

    def about(self) -> dict[str, Any]:
        on_gpu = self.device.type == "cuda"
        return {
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
            "cuda": on_gpu,
            "warm_up": _COMPILED_RUNS if self.options["compile"] else 1,
        }

    @torch.inference_mode()
    def run(self) -> dict[str, float]:
        options, model = self.options, self.model
        batch = [{"prompt": options["prompt"], "seconds_start": 0, "seconds_total": options["seconds"]}]
        batch *= options["batch"]
        with self._measure("clip"):
            with self._measure("conditioning"):
                with self._measure("text and seconds"):
                    encoded = model.conditioner(batch, self.device)
                inputs = {
                    key: value.to(self.dtype) if torch.is_tensor(value) and value.is_floating_point() else value
                    for key, value in model.get_conditioning_inputs(encoded).items()
                }
            with self._measure("sampling"):
                noise = torch.randn(options["shape"], device=self.device, dtype=self.dtype).mT.contiguous()
                run = Run("bench", options["sampler"], options["steps"], options["cfg_scale"])
                latents = sample(model, run, noise, inputs)
            with self._measure("decoding"):
                audio = model.pretransform.decode(latents[..., : options["latents"]])
            with self._measure("to NumPy"):
                audio.float().mT.cpu().numpy()
        with self._measure("seconds alone"):
            for id_, conditioner in model.conditioner.conditioners.items():
                if id_ != "prompt":
                    conditioner([clip[id_] for clip in batch], self.device)
        return {**self.seconds, "a step": self.seconds["sampling"] / options["steps"]}

    @contextmanager
    def _measure(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[name] = time.perf_counter() - start


if __name__ == "__main__":
    serve(Reference)
