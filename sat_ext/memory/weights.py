"""Bytes of weights that do not train, as they are kept. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from sat_ext.memory.counts import Counts, Parameter
from sat_ext.memory.run import Run

# Bytes a weight of NF4 beside its half: a scale of 8 bits for each block of 64, and one in fp32 for 256 of these
# (double quantization: Dettmers et al. 2023, "QLoRA", section 3).
ABSMAX = 1 / 64 + 4 / (64 * 256)
SCALE = {"fp8": 1, "int8": 4}  # bytes a row: an exponent (`Float8Linear`), or bitsandbytes' fp32


def bytes_of(parameters: Iterable[Parameter], run: Run, split: int = 1) -> int:
    """Bytes of frozen parameters of the transformer, each split in so many parts; quantized as the YAML says."""
    kind = run.model.train.quantization if run.lora else "none"
    total = 0
    for parameter in parameters:
        if kind == "none" or not parameter.matrix or parameter.block is None:
            total += -(-parameter.numel // split) * run.itemsize
        else:
            total += _quantized(parameter, kind)
    return total


def text_bytes(run: Run, counts: Counts, split: int = 1) -> int:
    """Bytes of the text encoder's weights."""
    kind = run.model.text.quantization
    return sum(
        -(-p.numel // split) * run.itemsize if kind == "none" or not p.matrix else _quantized(p, kind)
        for p in counts.text
    )


def _quantized(parameter: Parameter, kind: str) -> int:
    if kind == "nf4":
        return int(parameter.numel * (0.5 + ABSMAX))
    return parameter.numel + SCALE[kind] * parameter.rows
