"""The rows of `memory.py`: a model, what trains, and levers, each a section of YAML behind the shipped files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MODELS = ("cogvideox-5b-i2v", "cogvideox-1.5-5b-i2v", "cogvideox-2b")
NATIVE: dict[str, tuple[int, int, int]] = {  # frames, height, width that each model was published for
    "cogvideox-5b-i2v": (49, 480, 720),
    "cogvideox-1.5-5b-i2v": (81, 768, 1360),
    "cogvideox-2b": (49, 480, 720),
}

CHUNKS = {"first_stage": {"tiling": True, "slicing": True}}
TEXT_CPU = {"text": {"device": "cpu"}}
OFFLOADED_INPUTS = {"gradient_checkpointing": {"every": 1, "offload": True}}
EIGHT_BIT = {"optimizer": {"type": "bitsandbytes.optim.AdamW8bit"}}


@dataclass(frozen=True, kw_only=True)
class Row:
    """`zero` is a file of configs/zero/; `model` and `deepspeed` go into the sections of these names; `cached`
    trains from `sat-ext cache`."""

    name: str
    train: str
    zero: str = "zero1"
    model: dict[str, Any] = field(default_factory=dict)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    cached: bool = False


def lora(name: str, **more: Any) -> Row:
    """Of rank 128 on one GPU."""
    return Row(name=f"LoRA, {name}", train="lora", **more)


def full(name: str, **more: Any) -> Row:
    """Every weight of the transformer, on one GPU: the optimizer is on the CPU."""
    return Row(name=f"full, {name}", train="full", **{"zero": "zero2-offload", **more})


def quantized(kind: str, **more: Any) -> dict[str, Any]:
    """A LoRA's base in `nf4` or `fp8`, with more of `model:`."""
    return {"train": {"quantization": kind}, **more}


# Every lever alone, on what `configs/train/` gives; then the stacks for 16 GB and for 9 GB.
ROWS: tuple[Row, ...] = (
    lora("no lever", model={"gradient_checkpointing": False}),
    lora("gradient checkpointing"),
    lora("... of every second block", model={"gradient_checkpointing": {"every": 2}}),
    lora("... and its inputs on the CPU", model=OFFLOADED_INPUTS),
    lora("... and first stage in slices and tiles", model=CHUNKS),
    lora("... and text encoder on the CPU", model=TEXT_CPU),
    lora("... and text encoder in NF4", model={"text": {"quantization": "nf4"}}),
    lora("... and cached", cached=True),
    lora("... and 8-bit optimizer", deepspeed=EIGHT_BIT),
    lora("... and base in FP8", model=quantized("fp8")),
    lora("... and base in NF4", model=quantized("nf4")),
    lora("... and 30 blocks swapped", model={"block_swap": 30}),
    lora("stack for 16 GB", model=OFFLOADED_INPUTS, cached=True),
    lora("stack for 9 GB", model=quantized("nf4", **OFFLOADED_INPUTS), cached=True, deepspeed=EIGHT_BIT),
    full("optimizer offloaded"),
    full("... and cached", cached=True),
    full("... and weights offloaded", zero="zero3-offload", cached=True),
    full("stack for 14 GB", zero="zero3-offload", model=OFFLOADED_INPUTS, cached=True),
)

# Of these first where minutes are few: what most would run, and the goals.
FIRST = (
    "LoRA, gradient checkpointing",
    "LoRA, stack for 9 GB",
    "LoRA, stack for 16 GB",
    "LoRA, ... and 30 blocks swapped",
)
