"""What stable-audio-tools gives for a model folder, in float32 on the CPU, stage by stage."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from mlx_audio_native.errors import WeightsError
from mlx_audio_native.schema import read_json

from . import reference
from .recording import BOUNDS, GoldenError, Recording, Request, Run, sha256

FRAMES = 8  # latent frames of what is sampled; the window is longer, and heard once
_TOOLS = ("stable-audio-tools", "torch", "transformers", "sentencepiece", "k-diffusion", "numpy")
_SCHEDULE = "stable-audio-tools 0.0.19: even in log-SNR from -6 to 2, first time 1, last 0; linear for rk4"
_SIGMAS = {"sigma_min": 0.3, "sigma_max": 500, "rho": 1.0}
_V_SCHEDULE = f"k-diffusion 0.1.1: polyexponential, {_SIGMAS}, then 0; linear in t for v-ddim"
_REFERENCE_FORMULA = {"features": ["x", "sin", "cos"], "angle_constants": [2.0, 3.1415927410125732]}
_LONG = "kick drum loop, rising tone, saw bass, plucked string, square lead, " * 20
_RUNS = (
    Run("pingpong", "pingpong", 8),
    Run("euler", "euler", 4),
    Run("rk4", "rk4", 3),
    Run("dpmpp", "dpmpp", 6),
    Run("pingpong_null", "pingpong", 3, cfg_scale=3.0),
    Run("euler_negative", "euler", 3, cfg_scale=3.0, negative=True),
    Run("dpmpp_negative", "dpmpp", 3, cfg_scale=2.0, negative=True),
    Run("rk4_null", "rk4", 2, cfg_scale=2.0),
)
_V_RUNS = (
    Run("dpmpp-3m-sde", "dpmpp-3m-sde", 20),
    Run("dpmpp-2m", "dpmpp-2m", 20),
    Run("v-ddim", "v-ddim", 20),
    Run("dpmpp-3m-sde_null", "dpmpp-3m-sde", 20, cfg_scale=7.0),
    Run("dpmpp-3m-sde_negative", "dpmpp-3m-sde", 3, cfg_scale=7.0, negative=True),
    Run("dpmpp-2m_negative", "dpmpp-2m", 20, cfg_scale=7.0, negative=True),
    Run("v-ddim_null", "v-ddim", 20, cfg_scale=7.0),
    Run("default", "dpmpp-3m-sde", 100, cfg_scale=7.0),
)


def request_for(config: dict[str, Any], model: nn.Module) -> Request:
    """Two clips; then a prompt of 90 tokens, and numbers at both ends of their range and past them."""
    tokenize = model.conditioner.conditioners[_prompt(config)["id"]].tokenizer
    long = next(text for end in range(len(_LONG)) if len(tokenize(text := _LONG[:end]).input_ids) == 90)
    numbers = {}
    for index, entry in enumerate(_numbers(config)):
        low, high = entry["config"].get("min_val", 0), entry["config"].get("max_val", 1)
        inside = low + (high - low) * 0.02
        numbers[entry["id"]] = tuple(np.roll([inside, 1.3 * high, low - 3.0, 0.9 * high], index).tolist())
    return Request(
        prompts=("kick drum loop, 120 BPM", "square lead, F#3", long, "sine"),
        numbers=numbers,
        seconds=(1.5, 4.0),
        negative_prompt="snare drum",
        times=(1.0, 0.9525741, 0.5, 0.02),
        runs=_V_RUNS if config["model"]["diffusion"]["diffusion_objective"] == "v" else _RUNS,
    )


def _prompt(config: dict[str, Any]) -> dict[str, Any]:
    return next(entry for entry in config["model"]["conditioning"]["configs"] if entry["type"] == "t5")


def _numbers(config: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for entry in config["model"]["conditioning"]["configs"] if entry["type"] == "number"]


def load_reference(folder: Path, config: dict[str, Any]) -> nn.Module:
    """The reference of a model folder, every tensor used. Raises GoldenError where it knows no such formula."""
    for entry in _numbers(config):
        own = entry["config"]
        formula = {**_REFERENCE_FORMULA, "scale": 1 / (own.get("max_val", 1) - own.get("min_val", 0))}
        for key, value in formula.items():
            if own.get(key, value) != value:
                raise GoldenError(f"the reference cannot embed {entry['id']} with {key} {own[key]}, only {value}")
    config = json.loads(json.dumps(config))
    prompt = _prompt(config)["config"]
    if "t5_config" not in prompt:
        raise GoldenError(f"{folder / 'config.json'} has no t5_config, without which the reference asks a hub for T5")
    # it has one length for both; cropping afterwards is what exports do
    prompt["max_length"] = prompt.get("encode_length", prompt.get("max_length", 128))
    model = reference.build(config, folder / "spiece.model")
    try:
        tensors = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"cannot read {folder / 'model.safetensors'}: {error}") from None
    if not any(name.endswith("weight_v") for name in tensors):
        for module in model.modules():
            if hasattr(module, "weight_g"):
                nn.utils.remove_weight_norm(module)
    for name, derived in model.state_dict().items():
        if name.endswith("inv_freq"):
            tensors.setdefault(name, derived)
        elif name.endswith("encoder.embed_tokens.weight"):  # the same parameter as T5's shared table
            tensors.setdefault(name, tensors.get(name.replace("encoder.embed_tokens", "shared"), derived))
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise WeightsError(f"{folder} does not fit the reference: {' '.join(str(error).split())[:300]}") from None
    return model.float().eval().requires_grad_(False)


def record(folder: Path) -> Recording:
    """Every stage of a model folder."""
    return Recorder(folder).record()


class Recorder:
    """One reference model, and what it is asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_json(folder / "config.json")
        self.model = load_reference(folder, self.config)
        self.request = request_for(self.config, self.model)
        self.prompt_id = _prompt(self.config)["id"]
        self.max_length = _prompt(self.config)["config"].get("max_length", 128)
        self.tensors: dict[str, np.ndarray] = {}

    def record(self) -> Recording:
        """Every stage, each fed with what the reference gave for the one before."""
        request, clips = self.request, len(self.request.seconds)
        ratio = self.config["model"]["pretransform"]["config"]["downsampling_ratio"]
        channels, window = self.config["model"]["io_channels"], self.config["sample_size"] // ratio
        rng = np.random.RandomState(0)  # its stream is the same in every version
        draws = 1 + max(run.steps for run in request.runs)
        noise = torch.tensor(rng.standard_normal((draws, clips, FRAMES, channels)), dtype=torch.float32)
        whole = torch.tensor(rng.standard_normal((1, window, channels)), dtype=torch.float32)
        self._keep("input.noise", noise)
        self._keep("input.window", whole)
        with torch.no_grad():
            inputs = self._condition()
            inputs = {key: value[:clips] for key, value in inputs.items()}
            self._keep("input.cross_attention", inputs["cross_attn_cond"])
            self._keep("input.global_cond", inputs["global_cond"])
            for t in request.times:
                self._keep(f"velocity.t={t:g}", self._velocity(noise[0], t, inputs))
            first = {key: value[:1] for key, value in inputs.items()}
            self._keep("velocity.window", self._velocity(whole, request.times[-2], first))
            self._sample(noise)
            self._autoencode(self.tensors[f"sampling.{request.runs[0].name}.{request.runs[0].steps}"])
        return Recording(self.tensors, request, dict.fromkeys(BOUNDS, "float32"), self._provenance())

    def _keep(self, name: str, tensor: torch.Tensor) -> None:
        self.tensors[name] = tensor.detach().to(torch.int32 if ".ids" in name else torch.float32).numpy()

    def _encode(self, prompts: tuple[str, ...], numbers: dict[str, tuple[float, ...]], negative: bool = False):
        batch = [
            {self.prompt_id: p, **dict(zip(numbers, row, strict=True))}
            for p, *row in zip(prompts, *numbers.values(), strict=True)
        ]
        encoded = self.model.conditioner(batch, torch.device("cpu"))
        encoded[self.prompt_id] = [part[:, : self.max_length].detach() for part in encoded[self.prompt_id]]
        return self.model.get_conditioning_inputs(encoded, negative=negative)

    def _condition(self) -> dict[str, torch.Tensor]:
        text = self.model.conditioner.conditioners[self.prompt_id]
        tokens = text.tokenizer(
            list(self.request.prompts),
            truncation=True,
            max_length=text.max_length,
            padding="max_length",
            return_tensors="pt",
        )
        ids, mask = tokens.input_ids, tokens.attention_mask
        for stage in ("input", "tokens"):
            self._keep(f"{stage}.ids", ids)
            self._keep(f"{stage}.mask", mask)
        states = text.model(input_ids=ids, attention_mask=mask)["last_hidden_state"]
        self._keep("text.states", states * mask[..., None])
        inputs = self._encode(self.request.prompts, self.request.numbers)
        self._keep("conditioning.cross_attention", inputs["cross_attn_cond"])
        self._keep("conditioning.mask", inputs["cross_attn_mask"])
        self._keep("seconds.global_cond", inputs["global_cond"])
        return {key: inputs[key] for key in ("cross_attn_cond", "cross_attn_mask", "global_cond")}

    def _velocity(self, latents: torch.Tensor, t: float, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        times = torch.full((len(latents),), t)
        return reference.velocity(self.model, latents.mT, times, inputs).mT

    def _sample(self, noise: torch.Tensor) -> None:
        seconds = self.request.seconds
        known = {"seconds_start": (0.0,) * len(seconds), "seconds_total": seconds}
        numbers = {id_: known[id_] for id_ in self.request.numbers}
        inputs = self._encode(self.request.prompts[: len(seconds)], numbers)
        negative = self._encode((self.request.negative_prompt,) * len(seconds), numbers, negative=True)
        for run in self.request.runs:
            given = {**inputs, **(negative if run.negative else {})}
            for step, latents in enumerate(_states(self.model, run, noise.mT, given), start=1):
                self._keep(f"sampling.{run.name}.{step}", latents.mT)

    def _autoencode(self, latents: np.ndarray) -> None:
        self._keep("input.latents", torch.tensor(latents))
        pretransform = self.model.pretransform
        audio = pretransform.decode(torch.tensor(latents).mT)
        self._keep("decoder.audio", audio.mT)
        encoded = pretransform.model.encoder(audio)
        mean = encoded.chunk(2, dim=1)[0] if pretransform.model.bottleneck is not None else encoded
        self._keep("encoder.latents", mean.mT / pretransform.scale)

    def _provenance(self) -> dict[str, str]:
        return {
            "recorded": "every stage of stable-audio-tools' text-to-audio, float32, on the CPU",
            "model": self.folder.resolve().name,
            "sha256": sha256(self.folder / "model.safetensors"),
            "config_sha256": sha256(self.folder / "config.json"),
            "schedule": _V_SCHEDULE if self.request.runs is _V_RUNS else _SCHEDULE,
            "versions": ", ".join(f"{name} {version(name)}" for name in _TOOLS),
        }


def _states(model: nn.Module, run: Run, noise: torch.Tensor, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Latents after each step of the reference's own sampler, started from the first noise, drawing the others."""
    seen: list[torch.Tensor] = []
    with _draws(noise[1:]):
        last = sample(model, run, noise[0], inputs, callback=lambda info: seen.append(info["x"].clone()))
    # euler and rk4 show the latents after a step, v-ddim too but for the last; the others before it
    return [*seen[:-1], last] if run.sampler in ("euler", "rk4", "v-ddim") else [*seen[1:], last]


def sample(
    model: nn.Module, run: Run, noise: torch.Tensor, inputs: dict[str, torch.Tensor], **options: Any
) -> torch.Tensor:
    """Latents (B, C, T) by the reference's own sampler, from noise on its device; `options` go to it."""
    from stable_audio_tools.inference.sampling import sample_k, sample_rf

    over_sigmas = model.diffusion_objective == "v"
    options = {**options, **(_SIGMAS if over_sigmas else {"dist_shift": None})}
    with redirect_stderr(io.StringIO()):  # progress bars that cannot be turned off
        return (sample_k if over_sigmas else sample_rf)(
            model.model,
            noise,
            steps=run.steps,
            sampler_type=run.sampler,
            device=noise.device,
            cfg_scale=run.cfg_scale,
            batch_cfg=True,
            rescale_cfg=True,
            **options,
            **inputs,
        )


@contextmanager
def _draws(noise: torch.Tensor) -> Iterator[None]:
    """Inside, torch.randn_like and k-diffusion's Brownian trees hand these out."""
    from k_diffusion import sampling

    rest, real, tree = iter(noise), torch.randn_like, sampling.BrownianTreeNoiseSampler

    def draw(like: torch.Tensor) -> torch.Tensor:
        drawn = next(rest)
        if drawn.shape != like.shape:
            raise RuntimeError(f"noise of {tuple(like.shape)} was wanted")
        return drawn

    torch.randn_like = draw
    sampling.BrownianTreeNoiseSampler = lambda x, sigma_min, sigma_max: lambda sigma, sigma_next: draw(x)
    try:
        yield
    finally:
        torch.randn_like, sampling.BrownianTreeNoiseSampler = real, tree
