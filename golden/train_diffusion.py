"""Trains the demo model's T5, number conditioner and DiT jointly, on the latents of a trained autoencoder.

Rectified flow: x_t = (1 - t)·x + t·noise, the target is noise - x. T5 is first, and then all along, held to what its
captions say in numbers (`golden.attributes`). Like the autoencoder's, a whole step is one CUDA graph.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from golden import attributes, reference, sounds
from golden.render import render

CAPTIONS = 4  # wordings per clip
TOKENS = 40  # real tokens a caption may have; the rest of max_length is zero rows, as at inference
DROPOUT = 0.1  # of all cross-attention tokens, so that guidance has a null
LEARNING_RATE = 1e-3
# so much, and a smaller rate for T5 than for the DiT, that the text stays what its lesson made it: the diffusion loss
# alone teaches it notes by heart
ATTRIBUTES_WEIGHT = 5.0
TEXT_RATE = 0.1
TEXT_CAPTIONS = 100_000
# T5 is kept steady: states may not move far when its insides shake by so much, whatever the pieces. Else attention
# grows so sharp on text unlike the captions that float32's rounding shows (1.5e-5 off)
SHAKE = 0.02
STEADY_WEIGHT = 3e-4
# clips reach a 43rd of the seconds' range: frequencies wider than N(0, 1) tell tenths of a second apart at once
FREQUENCY_SPREAD = 16.0


@dataclass
class Data:
    """What a training set holds on the device; N clips."""

    latents: torch.Tensor  # (N, C, T) float16, posterior means over the pretransform's scale
    ids: torch.Tensor  # (N, CAPTIONS, TOKENS), padded with 0
    seconds: torch.Tensor  # (N,)
    text_ids: torch.Tensor  # (TEXT_CAPTIONS, TOKENS), of clips that are never rendered
    targets: torch.Tensor  # (TEXT_CAPTIONS, attributes.SIZE)


def tokenize(tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Ids (texts, TOKENS), closed by EOS and padded with 0."""
    rows = tokenizer.encode(texts, num_threads=8)
    return torch.tensor([[*row, tokenizer.eos_id(), *[0] * (TOKENS - 1 - len(row))] for row in rows])


def dataset(model: nn.Module, tokenizer: Any, clips: int, texts: int, seed: int, device: torch.device) -> Data:
    """Draw, render, encode and caption `clips` clips, and caption `texts` more."""
    rng = random.Random(seed)
    encoder = model.pretransform.model.encoder
    drawn = [sounds.draw(rng, captioned=True) for _ in range(clips)]
    ids = tokenize(tokenizer, [sounds.caption(clip, rng) for clip in drawn for _ in range(CAPTIONS)])
    described = [attributes.draw(rng) for _ in range(texts)]
    targets = [attributes.attributes(clip) for clip in described]
    latents = []
    for start in range(0, clips, 256):
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            mean = encoder(render(drawn[start : start + 256], device)).chunk(2, dim=1)[0]
        latents.append((mean.float() / model.pretransform.scale).half())
    return Data(
        torch.cat(latents),
        ids.view(clips, CAPTIONS, TOKENS).to(device),
        torch.tensor([clip.seconds for clip in drawn], device=device),
        tokenize(tokenizer, [sounds.caption(clip, rng) for clip in described]).to(device),
        torch.tensor(targets, device=device),
    )


def encode_text(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """T5's states (B, n, D) for ids (B, n), zero where the id is padding."""
    prompt, mask = model.conditioner.conditioners["prompt"], ids != 0
    return prompt.proj_out(prompt.model(input_ids=ids, attention_mask=mask.long())[0]) * mask[..., None]


@contextmanager
def shaken(t5: nn.Module) -> Iterator[None]:
    """Inside, noise of SHAKE times their size is on T5's norms, queries and keys."""
    moved = [module for name, module in t5.named_modules() if name.endswith((".q", ".k", "layer_norm"))]
    hooks = [
        module.register_forward_hook(lambda _, __, output: output * (1 + SHAKE * torch.randn_like(output)))
        for module in moved
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def condition(
    model: nn.Module, states: torch.Tensor, seconds: torch.Tensor, max_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference's conditioning: tokens (B, max_length + 1, D) and global (B, D), from T5's states (B, n, D)."""
    number = model.conditioner.conditioners["seconds_total"]
    states = nn.functional.pad(states, (0, 0, 0, max_length - states.shape[1]))
    normalised = (seconds.clamp(number.min_val, number.max_val) - number.min_val) / (number.max_val - number.min_val)
    embedding = number.embedder(normalised)
    return torch.cat((states, embedding[:, None]), dim=1), embedding


class Trainer:
    """Model, data, optimiser and running average. `step` trains everything, `step_text` the text encoder alone."""

    def __init__(self, model: nn.Module, data: Data, max_length: int, batch: int, device: torch.device):
        self.model, self.data, self.max_length, self.batch, self.device = model, data, max_length, batch, device
        self.on_gpu = device.type == "cuda"
        self.velocity = torch.compile(model.model, dynamic=False) if self.on_gpu else model.model
        conditioners = model.conditioner.conditioners
        text = list(conditioners["prompt"].parameters())
        self.learned = [*model.model.parameters(), *conditioners["seconds_total"].parameters(), *text]
        # the same in every key's score where nothing is rotated: softmax cannot tell, so that it would drift (up to 22)
        # and cost half precision a digit
        transformer = model.model.model.transformer
        rotated = 2 * len(transformer.rotary_pos_emb.inv_freq)
        self.without_effect = [
            bias.detach()
            for layer in transformer.layers
            for bias in (layer.self_attn.k_norm.bias[rotated:], layer.cross_attn.k_norm.bias)
        ]
        torch._foreach_zero_(self.without_effect)
        self.average = [p.detach().clone() for p in self.learned]
        self.lr, self.text_lr = torch.tensor(0.0, device=device), torch.tensor(0.0, device=device)
        self.optimiser = torch.optim.AdamW(
            [
                {"params": self.learned[: -len(text)], "lr": self.lr},
                {"params": text, "lr": self.text_lr},
            ],
            betas=(0.9, 0.98),
            weight_decay=0.01,
            capturable=self.on_gpu,
            fused=self.on_gpu,
        )
        self.loss, self.text_loss = torch.zeros((), device=device), torch.zeros((), device=device)
        self.step_text = self._captured(self._step_text)
        self.step = self._captured(self._step)

    def _draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.randint(len(self.data.latents), (self.batch,), device=self.device)
        return rows, self.data.ids[rows, torch.randint(CAPTIONS, (self.batch,), device=self.device)]

    def _attributes_loss(self) -> torch.Tensor:
        """Mean squared error of every real token's state."""
        rows = torch.randint(len(self.data.text_ids), (self.batch,), device=self.device)
        ids = self.data.text_ids[rows]
        real, states = (ids != 0)[..., None], encode_text(self.model, ids)
        targets = nn.functional.pad(self.data.targets[rows], (0, states.shape[-1] - attributes.SIZE))
        return ((states - targets[:, None]).square() * real).sum() / (real.sum() * states.shape[-1])

    def _unsteadiness(self) -> torch.Tensor:
        """Mean square of how far T5's states move when shaken, for random pieces, in units of the shaking."""
        prompt = self.model.conditioner.conditioners["prompt"]
        shape = self.batch // 4, TOKENS
        lengths = torch.randint(1, TOKENS + 1, (shape[0], 1), device=self.device)
        pieces = torch.randint(1, prompt.model.config.vocab_size, shape, device=self.device)
        ids = pieces * (torch.arange(TOKENS, device=self.device) < lengths)
        with torch.no_grad():
            states = encode_text(self.model, ids)
        with shaken(prompt.model):
            return ((encode_text(self.model, ids) - states) / SHAKE).square().mean()

    def _update(self, loss: torch.Tensor) -> None:
        self.optimiser.zero_grad(set_to_none=False)
        loss.backward()
        nn.utils.clip_grad_norm_(self.learned, 1.0, foreach=True)
        self.optimiser.step()
        torch._foreach_zero_(self.without_effect)
        torch._foreach_lerp_(self.average, [p.detach() for p in self.learned], 0.002)

    def _step_text(self) -> None:
        loss = self._attributes_loss()
        self._update(loss + STEADY_WEIGHT * self._unsteadiness())
        self.text_loss.lerp_(loss.detach(), 0.02)

    def _times(self) -> torch.Tensor:
        """Half of the times uniform, half spread as the sampler's schedule spreads its steps."""
        uniform = torch.rand(self.batch, device=self.device)
        scheduled = torch.sigmoid(6.5 - 8.5 * torch.rand(self.batch, device=self.device))
        return torch.where(torch.rand(self.batch, device=self.device) < 0.5, uniform, scheduled)

    def _step(self) -> None:
        rows, ids = self._draw()
        clean = self.data.latents[rows].float()
        states = encode_text(self.model, ids)
        # so that how many tokens a caption has says nothing: a note in tune has a shorter one, and was learnt by heart
        rate = 0.9 * torch.rand(self.batch, 1, 1, device=self.device)
        states = states * (torch.rand(*states.shape[:2], 1, device=self.device) >= rate)
        tokens, embedding = condition(self.model, states, self.data.seconds[rows], self.max_length)
        keep = (torch.rand(self.batch, 1, 1, device=self.device) >= DROPOUT).float()
        t = self._times()
        noise = torch.randn_like(clean)
        noisy = torch.lerp(clean, noise, t[:, None, None])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.on_gpu, cache_enabled=False):
            velocity = self.velocity(
                noisy, t, cross_attn_cond=tokens * keep, cross_attn_mask=None, global_cond=embedding
            )
        loss = (velocity.float() - (noise - clean)).square().mean()
        text_loss = self._attributes_loss()
        self._update(loss + ATTRIBUTES_WEIGHT * (text_loss + STEADY_WEIGHT * self._unsteadiness()))
        self.loss.lerp_(loss.detach(), 0.02)
        self.text_loss.lerp_(text_loss.detach(), 0.02)

    def _captured(self, step: Callable[[], None]) -> Callable[[], None]:
        """`step` as a CUDA graph, or as it is without a GPU. Warming up moves no weight: the learning rate is zero."""
        if not self.on_gpu:
            return step
        self.lr.zero_()
        self.text_lr.zero_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    def run(self, step: Callable[[], None], seconds: float, name: str, text_rate: float) -> None:
        """Repeat a step for `seconds` of wall time; the rate rises in a fiftieth of it, then falls on a cosine."""
        begun, steps, told = time.monotonic(), 0, 0.0
        while (elapsed := time.monotonic() - begun) < seconds:
            progress = elapsed / seconds
            rate = LEARNING_RATE * min(1.0, progress / 0.02) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
            self.lr.fill_(rate)
            self.text_lr.fill_(text_rate * rate)
            for _ in range(20 if self.on_gpu else 1):
                step()
                steps += 1
            if self.on_gpu:
                torch.cuda.synchronize()
            if elapsed - told > 20:
                told = elapsed
                print(self._line(name, elapsed, steps), flush=True)
        print(self._line(name, elapsed, steps), flush=True)

    def _line(self, name: str, elapsed: float, steps: int) -> str:
        losses = f"loss {float(self.loss):.4f}, attributes {float(self.text_loss):.6f}"
        return f"{name}: {elapsed:.0f} s, {steps} steps, {losses}"

    def averaged(self) -> None:
        """Put the averaged weights into the model, for good: training ends here."""
        with torch.no_grad():
            for parameter, average in zip(self.learned, self.average, strict=True):
                parameter.copy_(average)


def train(
    config: dict[str, Any],
    autoencoder: dict[str, torch.Tensor],
    spiece: Path,
    seconds: float,
    device: torch.device,
    clips: int,
    start: dict[str, torch.Tensor] | None = None,
    batch: int = 256,
) -> nn.Module:
    """The whole reference model around a trained autoencoder's state dict, trained for `seconds` of wall time.

    `start` holds a model folder's tensors to go on from, but for its autoencoder. A twentieth of the time is T5's
    alone. Writes the pretransform's scale, which gives the latents unit variance, into `config`.
    """
    import sentencepiece

    begun = time.monotonic()
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(spiece))
    model = reference.build(config).to(device)
    reference.load_autoencoder(model.pretransform.model, autoencoder)
    if start is not None:
        model.load_state_dict({**model.state_dict(), **start})
    else:
        with torch.no_grad():
            model.conditioner.conditioners["seconds_total"].embedder.embedding[0].weights.mul_(FREQUENCY_SPREAD)
    model.eval()
    model.model.requires_grad_(True)
    data = dataset(model, tokenizer, clips, TEXT_CAPTIONS if device.type == "cuda" else 100, 1, device)
    model.pretransform.scale = config["model"]["pretransform"]["scale"] = float(data.latents.float().std())
    data.latents /= model.pretransform.scale
    print(
        f"diffusion: {clips} clips after {time.monotonic() - begun:.0f} s, scale {model.pretransform.scale:.4f}",
        flush=True,
    )
    max_length = config["model"]["conditioning"]["configs"][0]["config"]["max_length"]
    trainer = Trainer(model, data, max_length, batch, device)
    print(f"diffusion: ready after {time.monotonic() - begun:.0f} s", flush=True)
    trainer.run(trainer.step_text, 0.05 * seconds, "text", 2.0)
    trainer.run(trainer.step, 0.95 * seconds, "diffusion", TEXT_RATE)
    trainer.averaged()
    return model
