"""Trains the demo model's Oobleck autoencoder: the reference's modules, sounds rendered on the GPU, a time budget.

What decides is the number of steps, so a whole step (crop, forward, losses, backward, Adam, averaging) is one CUDA
graph. The VAE's KL weight starts at zero: with it from the start the latents collapse before anything is heard.
"""

from __future__ import annotations

import math
import random
import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from golden import reference, sounds
from golden.render import render

L1_WEIGHT = 45.0
EDGE_WEIGHT = 60.0  # L1 of the first difference: hats and attacks weigh as much as bass
LOUDNESS = 0.15  # a crop counts by LOUDNESS / (its rms + 0.03), or quiet sounds are never learned
STFT_SIZES = (2048, 512, 128)
KL_WEIGHT = 3e-4
LEARNING_RATE = 1.5e-3
FLOOR = 3e-4  # -70 dB: what lies below it is silence to the spectral loss


def autoencoder(config: dict[str, Any]) -> nn.Module:
    """The reference's AudioAutoencoder of a model config, in eval mode (in training mode it checkpoints every unit)."""
    reference.import_reference()
    from stable_audio_tools.models.factory import create_pretransform_from_config

    model = create_pretransform_from_config(config["model"]["pretransform"], config["sample_rate"]).model
    # posterior noise starts small, or the first thousand steps drown in it
    last = model.encoder.layers[-1]
    with torch.no_grad():
        last.bias[last.bias.numel() // 2 :] = -4.0
    return model.eval().requires_grad_(True)


def pool(clips: int, seed: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rendered clips (clips, 2, WINDOW) float16, and the frame in which each ends."""
    rng = random.Random(seed)
    audio = torch.empty(clips, 2, sounds.WINDOW, dtype=torch.float16, device=device)
    ends = torch.empty(clips, dtype=torch.float32, device=device)
    for start in range(0, clips, 256):
        batch = [sounds.draw(rng, captioned=False) for _ in range(min(256, clips - start))]
        audio[start : start + len(batch)] = render(batch, device).half()
        ends[start : start + len(batch)] = torch.tensor([c.seconds * sounds.SAMPLE_RATE / sounds.HOP for c in batch])
    return audio, ends


def spectral_loss(estimate: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Log-magnitude and linear-magnitude L1 over several STFT sizes; float32 (B, 2, L) each."""
    loss = estimate.new_zeros(())
    both = torch.cat((estimate, target)).flatten(0, 1)
    for size in STFT_SIZES:
        window = torch.hann_window(size, device=both.device)
        spectrum = torch.stft(both, size, size // 4, window=window, return_complex=True)
        magnitude = (spectrum.real.square() + spectrum.imag.square() + 1e-12).sqrt() / window.sum()
        a, b = magnitude.chunk(2)
        loss = loss + (torch.log(a + FLOOR) - torch.log(b + FLOOR)).abs().mean() + 20.0 * (a - b).abs().mean()
    return loss


class Trainer:
    """One autoencoder with its optimiser and running average; `step` is captured as a CUDA graph where there is one."""

    def __init__(
        self,
        config: dict[str, Any],
        device: torch.device,
        clips: int,
        batch: int,
        frames: int,
        start: dict[str, torch.Tensor] | None = None,
        seed: int = 0,
    ):
        torch.manual_seed(seed)
        self.device, self.batch, self.frames = device, batch, frames
        self.model = autoencoder(config).to(device)
        if start is not None:
            reference.load_autoencoder(self.model, start)
        # the KL term waits until the waveform stands
        self.kl_from = 0.25 if start is None else -0.25
        self.audio, self.ends = pool(clips, seed, device)
        self.average = [p.detach().clone() for p in self.model.parameters()]
        self.lr = torch.tensor(LEARNING_RATE, device=device)
        self.kl_weight = torch.zeros((), device=device)
        self.ema_weight = torch.tensor(0.01, device=device)
        on_gpu = device.type == "cuda"
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=self.lr, betas=(0.8, 0.99), weight_decay=0.0, capturable=on_gpu, fused=on_gpu
        )
        self.report: dict[str, torch.Tensor] = {}
        self.graph: Any = None
        if on_gpu:
            self._capture()

    def _crops(self) -> torch.Tensor:
        """Crops on the hop grid, each beginning before its clip ends, so that sound, ends and silence are all seen."""
        rows = torch.randint(len(self.audio), (self.batch,), device=self.device)
        latest = self.ends[rows].clamp(max=sounds.FRAMES - self.frames)
        start = (
            (torch.rand(self.batch, device=self.device) * (latest + 1)).floor().clamp(max=sounds.FRAMES - self.frames)
        )
        index = start.long()[:, None] * sounds.HOP + torch.arange(self.frames * sounds.HOP, device=self.device)
        return torch.gather(self.audio[rows], 2, index[:, None].expand(-1, 2, -1)).float()

    def _step(self) -> None:
        target = self._crops()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False):
            mean, scale = self.model.encoder(target).float().chunk(2, dim=1)
            deviation = F.softplus(scale) + 1e-4
            kl = (mean.square() + deviation.square() - 2 * torch.log(deviation) - 1).sum(1).mean()
            estimate = self.model.decoder(mean + deviation * torch.randn_like(mean)).float()
        weight = LOUDNESS / (target.square().mean(dim=(1, 2), keepdim=True).sqrt() + 0.03)
        error = weight * (estimate - target)
        l1, edge = error.abs().mean(), error.diff(dim=-1).abs().mean()
        spectral = spectral_loss(estimate, target)
        loss = L1_WEIGHT * l1 + EDGE_WEIGHT * edge + spectral + self.kl_weight * kl
        self.optimiser.zero_grad(set_to_none=False)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 5.0, foreach=True)
        self.optimiser.step()
        torch._foreach_lerp_(self.average, [p.detach() for p in self.model.parameters()], 0.002)
        self.report = {"l1": l1.detach(), "edge": edge.detach(), "stft": spectral.detach(), "kl": kl.detach()}

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step()

    def step(self, progress: float) -> None:
        """One step at `progress` in 0..1 of the budget, which sets learning rate and KL weight."""
        warm = min(1.0, progress / 0.01)
        self.lr.fill_(LEARNING_RATE * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))))
        self.kl_weight.fill_(KL_WEIGHT * min(1.0, max(0.0, (progress - self.kl_from) / 0.25)))
        if self.graph is None:
            self._step()
        else:
            self.graph.replay()

    def averaged(self) -> nn.Module:
        """The model with its averaged weights, for good: training ends here."""
        with torch.no_grad():
            for parameter, average in zip(self.model.parameters(), self.average, strict=True):
                parameter.copy_(average)
        return self.model


def fuse_snake() -> None:
    """Compile the reference's snake activation, which in eager mode costs more memory traffic than the convolutions."""
    from stable_audio_tools.models import blocks

    blocks.snake_beta = torch.compile(blocks.snake_beta, dynamic=False)


def train(
    config: dict[str, Any],
    seconds: float,
    device: torch.device,
    clips: int,
    batch: int,
    frames: int,
    start: dict[str, torch.Tensor] | None = None,
) -> nn.Module:
    """An autoencoder trained for `seconds` of wall time, start-up not counted; on from a state dict, if given."""
    reference.import_reference()
    if device.type == "cuda":
        fuse_snake()
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    begun = time.monotonic()
    trainer = Trainer(config, device, clips, batch, frames, start)
    print(f"autoencoder: ready after {time.monotonic() - begun:.0f} s", flush=True)
    begun, steps, told = time.monotonic(), 0, 0.0
    while (elapsed := time.monotonic() - begun) < seconds:
        for _ in range(20 if trainer.graph else 1):
            trainer.step(elapsed / seconds)
            steps += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
        if elapsed - told > 30:
            told = elapsed
            figures = " ".join(f"{name} {float(value):.4f}" for name, value in trainer.report.items())
            print(f"autoencoder: {elapsed:5.0f} s, {steps} steps, {figures}", flush=True)
    print(f"autoencoder: {steps} steps", flush=True)
    return trainer.averaged()


@torch.no_grad()
def quality(model: nn.Module, device: torch.device, each: int = 8) -> dict[str, float]:
    """Signal to distortion in dB by kind, on fresh clips of any pitch and tempo, decoded from the latents' means."""
    rng = random.Random(10_007)
    rows: dict[str, list[float]] = {kind: [] for kind in sounds.KINDS}
    silence: list[float] = []
    while min(len(v) for v in rows.values()) < each:
        clip = sounds.draw(rng, captioned=False)
        if len(rows[clip.kind]) >= each:
            continue
        target = render([clip], device)
        latents = model.encoder(target).chunk(2, dim=1)[0]
        estimate = model.decoder(latents)
        error = (estimate - target).square().sum()
        rows[clip.kind].append(float(10 * torch.log10(target.square().sum() / error)))
        end = int((clip.seconds + 0.1) * sounds.SAMPLE_RATE)
        if end < sounds.WINDOW - 4096:
            after = estimate[..., end:].square().mean(dim=(0, 1)).unfold(0, 441, 441).mean(-1).max()
            before = target.square().mean(dim=(0, 1)).unfold(0, 441, 441).mean(-1).max()
            silence.append(float(10 * torch.log10(after / before)))
    figures = {kind: sum(v) / len(v) for kind, v in rows.items()}
    figures["worst silence"] = max(silence)
    return figures
