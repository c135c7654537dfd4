"""The reference implementation, stable-audio-tools 0.0.19, built from a model config without reaching a hub.

Its package imports torchaudio, k-diffusion, torchvision and alias-free-torch at module level for paths that
text-to-audio never takes. `import_reference` lets those imports pass where the packages are missing; anything
that would really use them fails loudly. k-diffusion's own samplers are never replaced: its sampling.py and
external.py are imported from the package, past an `__init__` that would pull in a training stack.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

REFERENCE_VERSION = "0.0.19"
# the reference accepts known T5 names only; this one is replaced by the config's own t5_config
_NAMED_T5 = "t5-base"


class _Absent(types.ModuleType):
    """A module that may be imported from, whose contents fail when they are used."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        where = f"{self.__name__}.{name}"

        def fail(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError(f"{where} is not installed and text-to-audio should not need it")

        return fail


def import_reference() -> None:
    """Import stable_audio_tools with nothing but torch, einops, transformers and what k-diffusion needs."""
    if "stable_audio_tools.models.diffusion" in sys.modules:
        return
    import transformers  # noqa: F401  first: it looks for torchvision, and must not find a stand-in

    absent: dict[str, types.ModuleType] = {}
    for package in ("torchaudio", "torchvision", "alias_free_torch"):
        if importlib.util.find_spec(package) is None:
            absent[package] = _Absent(package)
            absent[package].transforms = absent[f"{package}.transforms"] = _Absent(f"{package}.transforms")
    sys.modules.update(absent)
    try:
        _import_k_diffusion()
        for name in ("diffusion", "autoencoders", "conditioners"):
            importlib.import_module(f"stable_audio_tools.models.{name}")
    finally:
        for name in absent:
            del sys.modules[name]


def _import_k_diffusion() -> None:
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the reference needs k-diffusion 0.1.1: pip install --no-deps k-diffusion==0.1.1")
    shell = types.ModuleType("k_diffusion")
    shell.__path__, shell.__spec__ = [str(Path(spec.origin).parent)], spec
    sys.modules["k_diffusion"] = shell
    for name in ("utils", "sampling", "external"):
        setattr(shell, name, importlib.import_module(f"k_diffusion.{name}"))


@contextmanager
def _local_t5(t5_config: dict[str, Any], spiece: Path | None) -> Iterator[None]:
    """Inside, the reference's T5Conditioner gets an encoder of `t5_config` and the tokenizer of `spiece`."""
    import transformers
    from stable_audio_tools.models.conditioners import T5Conditioner

    def tokenizer(name: str) -> Any:
        if spiece is None:
            return None
        return transformers.T5Tokenizer(str(spiece), extra_ids=0, legacy=True)

    def encoder(name: str) -> nn.Module:
        return transformers.T5EncoderModel(transformers.T5Config(**t5_config))

    saved = transformers.AutoTokenizer.from_pretrained, transformers.T5EncoderModel.from_pretrained
    dims = dict(T5Conditioner.T5_MODEL_DIMS)
    transformers.AutoTokenizer.from_pretrained = staticmethod(tokenizer)
    transformers.T5EncoderModel.from_pretrained = staticmethod(encoder)
    T5Conditioner.T5_MODEL_DIMS[_NAMED_T5] = t5_config["d_model"]
    try:
        yield
    finally:
        transformers.AutoTokenizer.from_pretrained, transformers.T5EncoderModel.from_pretrained = saved
        T5Conditioner.T5_MODEL_DIMS.clear()
        T5Conditioner.T5_MODEL_DIMS.update(dims)


def _strip_additions(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The config as the reference knows it, without the model folder's additions, and its `t5_config`."""
    config = _copy(config)
    t5_config = None
    for entry in config["model"].get("conditioning", {}).get("configs", []):
        for key in ("encode_length", "features", "scale", "angle_constants"):
            entry["config"].pop(key, None)
        t5_config = entry["config"].pop("t5_config", t5_config)
        if entry["type"] == "t5" and t5_config is not None:
            # enable_grad puts the encoder into the module tree, so that it is in the state dict and can be trained
            entry["config"].update(t5_model_name=_NAMED_T5, enable_grad=True)
    return config, t5_config


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value


def build(config: dict[str, Any], spiece: Path | None = None, seed: int = 0) -> nn.Module:
    """The reference's ConditionedDiffusionModelWrapper for a model config, float32, with weights drawn from `seed`.

    Its T5 (`t5_config` of the prompt conditioner) is part of the module tree: the state dict has the names of the
    model folder contract. `spiece` is needed only where texts are tokenized.
    """
    import_reference()
    from stable_audio_tools.models.factory import create_model_from_config

    config, t5_config = _strip_additions(config)
    torch.manual_seed(seed)
    if t5_config is None:
        return create_model_from_config(config).float()
    with _local_t5(t5_config, spiece):
        return create_model_from_config(config).float()


def randomise(module: nn.Module, seed: int = 0, scale: float = 0.05) -> nn.Module:
    """Move every parameter that starts at a constant (zero branches, unit gains), so that it counts in parity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    return module


def load_autoencoder(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Fill an AudioAutoencoder from its state dict, or from one in which weight norm is fused (then g = ‖w‖, v = w)."""
    complete = dict(tensors)
    for name in model.state_dict():
        if name.endswith("weight_g") and name not in tensors:
            weight = complete.pop(name.removesuffix("_g"))
            complete[name.removesuffix("_g") + "_v"] = weight
            complete[name] = weight.flatten(1).norm(dim=1)[:, None, None]
    model.load_state_dict(complete)


def conditioning(model: nn.Module, prompts: list[str], seconds: list[float]) -> dict[str, torch.Tensor]:
    """`cross_attn_cond` (B, N, D), `cross_attn_mask` (B, N), `global_cond` (B, G) for prompts and seconds_total."""
    device = next(model.parameters()).device
    batch = [{"prompt": p, "seconds_total": s, "seconds_start": 0} for p, s in zip(prompts, seconds, strict=True)]
    inputs = model.get_conditioning_inputs(model.conditioner(batch, device))
    return {key: inputs[key] for key in ("cross_attn_cond", "cross_attn_mask", "global_cond")}


def velocity(model: nn.Module, x: torch.Tensor, t: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The DiT's output (B, C, T) for latents (B, C, T) at times (B,), without guidance."""
    return model.model(
        x,
        t,
        cross_attn_cond=inputs["cross_attn_cond"],
        cross_attn_mask=inputs["cross_attn_mask"],
        global_cond=inputs["global_cond"],
    )
