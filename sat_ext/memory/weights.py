"""Bytes of weights that do not train, as they are kept. Pure."""

from collections.abc import Iterable

from sat_ext.memory.counts import Counts, Parameter
from sat_ext.memory.run import Run
from sat_ext.models.quantize import NF4_BLOCK
from sat_ext.models.text_offload import computes_in_bf16

# Bytes of the scales: in blocks of a transformer's NF4 a bfloat16 each, a row of its FP8 an exponent
# (`sat_ext.models.quantize`); of a text encoder, which bitsandbytes quantizes, fp32 in both.
NETWORK_SCALES = {"nf4": 2, "fp8": 1}
TEXT_SCALES = {"nf4": 4, "int8": 4}


def bytes_of(parameters: Iterable[Parameter], run: Run, split: int = 1) -> int:
    """Bytes of frozen parameters of the transformer, each split in so many parts; quantized as the YAML says."""
    kind = run.model.train.quantization if run.lora else "none"
    total = 0
    for parameter in parameters:
        if kind == "none" or not parameter.matrix or parameter.block is None:
            total += -(-parameter.numel // split) * run.itemsize
        else:
            own = "fp8" if parameter.modulation else kind
            total += _quantized(parameter, own, NETWORK_SCALES[own])
    return total


def text_bytes(run: Run, counts: Counts, split: int = 1) -> int:
    """Bytes of the text encoder's weights. On the CPU they are fp32 unless it computes in bf16; the run's CPU
    is assumed to be like this machine's."""
    kind, item = run.model.text.quantization, run.itemsize
    if run.model.text.device == "cpu" and not computes_in_bf16():
        item = 4
    return sum(
        -(-p.numel // split) * item if kind == "none" or not p.matrix else _quantized(p, kind, TEXT_SCALES[kind])
        for p in counts.text
    )


def _quantized(parameter: Parameter, kind: str, scale: int) -> int:
    if kind == "nf4":
        return parameter.numel // 2 + scale * -(-parameter.numel // NF4_BLOCK)
    return parameter.numel + scale * parameter.rows
