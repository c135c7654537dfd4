"""Quantised weights: which layers have them, and how a config records it. MLX's own, from `nn.quantize`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import mlx.nn as nn

from .schema import Section, check

PARTS = ("conditioner", "dit")
BITS = (8, 4)
GROUP_SIZES = (32, 64, 128)
# all dense layers of T5's and of the DiT's blocks; what is left of the DiT are 2 % of its weights, and an error there
# is heard whole: 8 bits in project_out alone are as far off as in all blocks together
_QUANTISED = ("blocks.", "t5.blocks.")


@dataclass(frozen=True)
class Quantization:
    """`bits` a weight, with a scale and an offset for each `group_size` of a row, in the layers of `parts`."""

    bits: int
    group_size: int
    parts: tuple[str, ...] = PARTS

    @classmethod
    def read(cls, section: Section) -> Quantization:
        """Raises ConfigError."""
        bits, group_size = section.one_of("bits", BITS), section.one_of("group_size", GROUP_SIZES)
        parts = section.many("parts", str)
        section.done()
        check(set(parts) <= set(PARTS), f"{section.where}.parts may be {', '.join(PARTS)}, found {parts!r:.60}")
        return cls(bits, group_size, parts)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "parts": list(self.parts)}

    def layers(self, part: str, module: nn.Module) -> list[str]:
        """Paths of a part's layers that are quantised: dense ones of the blocks whose rows divide into groups."""
        return [
            path
            for path, layer in module.named_modules()
            if part in self.parts
            and path.startswith(_QUANTISED)
            and isinstance(layer, nn.Linear)
            and layer.weight.shape[1] % self.group_size == 0
        ]

    def apply(self, part: str, module: nn.Module) -> None:
        """Quantise those layers, in place."""
        chosen = set(self.layers(part, module))
        nn.quantize(module, self.group_size, self.bits, class_predicate=lambda path, _: path in chosen)
