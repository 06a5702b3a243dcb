"""The levers on memory in the YAML's `model:`, and the combinations of them that make no sense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sat_ext.errors import ConfigError

Quantization = Literal["none", "nf4", "fp8"]


@dataclass(frozen=True, kw_only=True)
class GradientCheckpointing:
    """Keep the input of a block of the transformer alone, and compute the rest anew in the backward pass.

    `every`: of n blocks one is recomputed; 1 is all of them, the least memory. `offload`: those inputs wait in
    pinned CPU memory, copied while the GPU computes.
    """

    every: int = 1
    offload: bool = False

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(f"model.gradient_checkpointing.every: {self.every}; give 1 (all blocks) or more.")
