"""Renders the demo model's sounds, in batches on any device: thousands of clips on a GPU take seconds."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from golden.sounds import KINDS, MAX_SECONDS, SAMPLE_RATE, SCALES, TONES, WINDOW, Clip

# onsets sit on this grid (5.8 ms, as a sequencer's clock would have it): at most 2.9 ms off
CONTROL_BLOCK = 256


def render(clips: list[Clip], device: torch.device | str = "cpu") -> torch.Tensor:
    """Stereo float32 audio (B, 2, WINDOW) in -1..1; each clip is silent from its `seconds` on."""
    out = torch.zeros(len(clips), 2, WINDOW, device=device)
    for kind in KINDS:
        rows = [i for i, clip in enumerate(clips) if clip.kind == kind]
        if rows:
            out[rows] = _RENDERERS[kind]([clips[i] for i in rows], torch.device(device))
    seconds = _column(clips, "seconds", out.device)
    # a clip ends with a 10 ms fade that reaches zero at its end
    fade = ((seconds - _time(out.device)) / 0.010).clamp(0, 1)
    return out * torch.where(seconds[:, :1] >= MAX_SECONDS - 1e-6, 1.0, fade)[:, None, :]


def _time(device: torch.device, samples: int = WINDOW) -> torch.Tensor:
    return torch.arange(samples, device=device, dtype=torch.float32) / SAMPLE_RATE


def _column(clips: list[Clip], name: str, device: torch.device) -> torch.Tensor:
    return torch.tensor([getattr(clip, name) for clip in clips], device=device, dtype=torch.float32)[:, None]


def _vary(clips: list[Clip], index: int, low: float, high: float, device: torch.device) -> torch.Tensor:
    values = torch.tensor([clip.variation[index] for clip in clips], device=device, dtype=torch.float32)[:, None]
    return low + (high - low) * values


def _pan(mono: torch.Tensor, left: float, right: float) -> torch.Tensor:
    return torch.stack((left * mono, right * mono), dim=1)


def _noise(samples: int, seed: int, device: torch.device) -> torch.Tensor:
    """The same white noise for every clip: a drum machine's sample, not a new one at every hit."""
    return torch.randn(samples, generator=torch.Generator().manual_seed(seed)).to(device)


def _kick_hit(clips: list[Clip], device: torch.device) -> torch.Tensor:
    t = _time(device, 16384)
    base, decay = _vary(clips, 0, 46, 58, device), _vary(clips, 1, 0.07, 0.12, device)
    punch, drop = 130.0, 0.028
    phase = 2 * math.pi * (base * t + punch * drop * (1 - torch.exp(-t / drop)))
    end = ((16384 / SAMPLE_RATE - t) / 0.02).clamp(0, 1)
    return 0.85 * torch.sin(phase) * torch.exp(-t / decay) * (t / 0.0005).clamp(0, 1) * end


def _snare_hit(clips: list[Clip], device: torch.device) -> torch.Tensor:
    t = _time(device, 12288)
    tune, snappy = _vary(clips, 0, 0.94, 1.06, device), _vary(clips, 1, 0.045, 0.07, device)
    body = sum(
        gain * torch.sin(2 * math.pi * hertz * tune * t) * torch.exp(-t / 0.05)
        for hertz, gain in ((185.0, 0.5), (331.0, 0.35))
    )
    rattle = _noise(12288, 11, device)
    rattle = rattle - torch.nn.functional.avg_pool1d(rattle[None, None], 9, 1, 4)[0, 0]
    return 0.6 * (body + 0.28 * rattle * torch.exp(-t / snappy)) * (t / 0.0005).clamp(0, 1)


def _hat_hit(clips: list[Clip], device: torch.device) -> torch.Tensor:
    """A metal disc: inharmonic partials, the higher the quicker gone. Only the decay varies: one disc, not many."""
    t = _time(device, 8192)
    decay = _vary(clips, 2, 0.03, 0.05, device)
    metal = sum(
        gain * torch.sin(2 * math.pi * hertz * t) * torch.exp(-t / decay * (hertz / 7000) ** 0.5)
        for hertz, gain in ((5230.0, 0.8), (6470.0, 1.0), (7513.0, 1.0), (8821.0, 0.9), (10343.0, 0.7), (12071.0, 0.5))
    )
    return 0.2 * metal * (t / 0.0003).clamp(0, 1)


def _repeat(hits: torch.Tensor, clips: list[Clip], offset: float, per_beat: float) -> torch.Tensor:
    """Place a hit (B, L) at every 1/per_beat of a beat, from `offset` beats on → (B, WINDOW)."""
    return _convolve(_impulses(clips, offset, per_beat, hits.device), hits)


def _impulses(clips: list[Clip], offset: float, per_beat: float, device: torch.device) -> torch.Tensor:
    """Ones at the onsets, on the sequencer's grid, up to each clip's end; (B, WINDOW)."""
    places = []
    for row, clip in enumerate(clips):
        step, first = 60.0 / clip.bpm / per_beat, offset * 60.0 / clip.bpm
        count = max(0, math.ceil((min(clip.seconds, MAX_SECONDS) - first) / step))
        onsets = (round((first + step * i) * SAMPLE_RATE / CONTROL_BLOCK) * CONTROL_BLOCK for i in range(count))
        places += [row * WINDOW + onset for onset in onsets if onset < WINDOW]
    impulses = torch.zeros(len(clips) * WINDOW, device=device)
    impulses[torch.tensor(places, dtype=torch.long, device=device)] = 1.0
    return impulses.view(len(clips), WINDOW)


def _convolve(impulses: torch.Tensor, hits: torch.Tensor) -> torch.Tensor:
    size = 2 * WINDOW
    return torch.fft.irfft(torch.fft.rfft(impulses, size) * torch.fft.rfft(hits, size), size)[:, :WINDOW]


def _kick(clips: list[Clip], device: torch.device) -> torch.Tensor:
    return _pan(_repeat(_kick_hit(clips, device), clips, 0.0, 1.0), 1.0, 1.0)


def _snare(clips: list[Clip], device: torch.device) -> torch.Tensor:
    return _pan(_repeat(_snare_hit(clips, device), clips, 0.0, 1.0), 1.0, 0.8)


def _hat(clips: list[Clip], device: torch.device) -> torch.Tensor:
    return _pan(_repeat(_hat_hit(clips, device), clips, 0.0, 1.0), 0.75, 1.0)


def _house(clips: list[Clip], device: torch.device) -> torch.Tensor:
    hats = _pan(_repeat(_hat_hit(clips, device), clips, 0.5, 1.0), 0.6, 0.8)
    return 0.9 * (_kick(clips, device) + hats)


def _additive(clips: list[Clip], device: torch.device, weights, count: int) -> torch.Tensor:
    """Sum of harmonics k·f with `weights(k, k·f, t)`, band-limited below 16 kHz; tones start where the seed says.

    With one phase for all, a model learns each note's run of phases by heart, and unseen notes snap to neighbours.
    """
    hertz = 440.0 * torch.exp2((_column(clips, "pitch", device).double() - 69.0) / 12.0)
    t = _time(device)
    start = _vary(clips, 3, 0.0, 1.0, device).double() if clips[0].kind in TONES else 0.0
    cycles = start + hertz * t.double()  # float32 would lose the phase after a second
    out = torch.zeros(len(clips), WINDOW, device=device)
    for k in range(1, count + 1):
        k_hertz = (k * hertz).float()
        gain = weights(k, k_hertz, t) * (k_hertz < 16000)
        out += gain * torch.sin(2 * math.pi * torch.frac(k * cycles)).float()
    return out


def _attack(device: torch.device, seconds: float) -> torch.Tensor:
    return (_time(device) / seconds).clamp(0, 1)


def _sine(clips: list[Clip], device: torch.device) -> torch.Tensor:
    level = _vary(clips, 0, 0.4, 0.6, device)
    tone = level * _additive(clips, device, lambda k, f, t: torch.ones_like(f), 1)
    return _pan(tone * _attack(device, 0.008), 1.0, 1.0)


def _square(clips: list[Clip], device: torch.device) -> torch.Tensor:
    cutoff = _vary(clips, 1, 2500, 5000, device)
    tone = _additive(clips, device, lambda k, f, t: (k % 2) / k / (1 + (f / cutoff) ** 2), 31)
    return _pan(_vary(clips, 0, 0.35, 0.5, device) * tone * _attack(device, 0.008), 0.9, 1.0)


def _saw(clips: list[Clip], device: torch.device) -> torch.Tensor:
    cutoff = _vary(clips, 1, 1500, 3000, device)
    tone = _additive(clips, device, lambda k, f, t: 1 / k / (1 + (f / cutoff) ** 2), 32)
    return _pan(_vary(clips, 0, 0.35, 0.5, device) * tone * _attack(device, 0.008), 1.0, 0.9)


def _string(clips: list[Clip], device: torch.device, count: int = 16) -> torch.Tensor:
    """A plucked string: harmonics of 1/k, the higher the quicker gone."""
    bright = _vary(clips, 1, 0.8, 1.4, device)
    numbers = _additive(clips, device, lambda k, f, t: k**-1.2 * torch.exp(-t * (1.6 + 1.1 * (k - 1) / bright)), count)
    return _vary(clips, 0, 0.4, 0.55, device) * numbers * _attack(device, 0.002)


def _pluck(clips: list[Clip], device: torch.device) -> torch.Tensor:
    return _pan(_string(clips, device), 1.0, 0.75)


def _arpeggio(clips: list[Clip], device: torch.device) -> torch.Tensor:
    """Root, third, fifth and octave, plucked in turn on every half beat; each note stops the one before."""
    strings = torch.stack(
        [_string([replace(c, note=c.note + SCALES[c.scale][degree]) for c in clips], device, 8) for degree in range(4)]
    )
    onset = _impulses(clips, 0.0, 2.0, device) > 0
    now = torch.arange(WINDOW, device=device).expand(len(clips), -1)
    since = now - torch.where(onset, now, 0).cummax(1).values
    following = torch.where(onset, now, WINDOW).roll(-1, 1)
    following[:, -1] = WINDOW
    until = following.flip(1).cummin(1).values.flip(1) - now
    note = (onset.cumsum(1) - 1).clamp(min=0) % 4
    rows = torch.arange(len(clips), device=device)[:, None]
    return _pan(strings[note, rows, since] * (until / 512).clamp(0, 1), 0.75, 1.0)


def _sweep(clips: list[Clip], device: torch.device) -> torch.Tensor:
    """White noise, a 370 ms loop, through a band that glides 300 → 9000 Hz (or back) over the clip."""
    size, hop = 1024, 256
    noise = _noise(16384, 23, device).repeat(WINDOW // 16384)
    window = torch.hann_window(size, device=device)
    spectrum = torch.stft(noise, size, hop, window=window, return_complex=True)  # (F, N)
    progress = (
        torch.arange(spectrum.shape[1], device=device) * hop / SAMPLE_RATE / _column(clips, "seconds", device)
    ).clamp(0, 1)
    rising = torch.tensor([clip.rising for clip in clips], device=device)[:, None]
    centre = math.log2(300) + math.log2(9000 / 300) * torch.where(rising, progress, 1 - progress)
    octaves = torch.log2(torch.arange(spectrum.shape[0], device=device).clamp(min=0.5) * SAMPLE_RATE / size)
    gain = torch.exp(-0.5 * ((octaves[None, :, None] - centre[:, None, :]) / 0.55) ** 2)
    gain = gain / (gain.square().sum(1, keepdim=True) / spectrum.shape[0]).sqrt().clamp(min=1e-6)
    swept = torch.istft(spectrum[None] * gain, size, hop, window=window, length=WINDOW)
    return _pan(0.16 * swept * _attack(device, 0.008), 1.0, 1.0)


_RENDERERS = {
    "kick": _kick,
    "snare": _snare,
    "hat": _hat,
    "house": _house,
    "sine": _sine,
    "square": _square,
    "saw": _saw,
    "pluck": _pluck,
    "arpeggio": _arpeggio,
    "sweep": _sweep,
}
