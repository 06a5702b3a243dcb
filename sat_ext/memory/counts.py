"""Parameters of a run, counted on the real classes without allocating any, and the bytes of the frozen ones."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sat_ext.cogvideo.network import PRETRAINED
from sat_ext.memory.results import remembered
from sat_ext.memory.run import Run
from sat_ext.models.config import (
    AutoencoderConfig,
    FirstStageConfig,
    ModelConfig,
    TextConfig,
    TrainConfig,
    TransformerConfig,
)
from sat_ext.models.folder import folder_config
from sat_ext.models.quantize import NF4_BLOCK
from sat_ext.models.text_offload import computes_in_bf16

# https://huggingface.co/google/t5-v1_1-xxl, config.json: the text encoder of every published CogVideoX model.
T5_XXL = {
    "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
# SAT trains these without weight decay, in a group of their own (NO_WD_MODULES in sat/transformer_defaults.py).
NO_DECAY = (nn.LayerNorm, nn.RMSNorm)
# Bytes of a scale: in the transformer's NF4 one bfloat16 per block of weights, in its FP8 one exponent per row
# (`sat_ext.models.quantize`); bitsandbytes, which quantizes text encoders, keeps fp32.
NETWORK_SCALES, TEXT_SCALES = {"nf4": 2, "fp8": 1}, {"nf4": 4, "int8": 4}


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter.

    `decays` tells SAT's optimizer groups apart; `block` is the transformer's. A `matrix` of `rows` is the weight
    of a linear layer, which can be quantized; a `modulation` scales and shifts after a norm."""

    numel: int
    trains: bool = False
    decays: bool = True
    block: int | None = None
    matrix: bool = False
    modulation: bool = False
    rows: int = 1


@dataclass(frozen=True, kw_only=True)
class Part:
    """The parameters of one model, in the order of its modules, and how many numbers its buffers hold."""

    parameters: tuple[Parameter, ...]
    buffers: int


@dataclass(frozen=True, kw_only=True)
class Counts:
    """The parameters of each model of a run, and how many numbers the transformer's buffers hold."""

    network: tuple[Parameter, ...]
    first_stage: tuple[Parameter, ...]
    text: tuple[Parameter, ...]
    buffers: int

    @property
    def groups(self) -> list[list[int]]:
        """Sizes of the trained parameters, by SAT's optimizer groups."""
        groups = [[p.numel for p in self.network if p.trains and p.decays == decays] for decays in (True, False)]
        return [group for group in groups if group]

    @property
    def frozen(self) -> list[Parameter]:
        """The transformer's parameters that do not train."""
        return [p for p in self.network if not p.trains]

    @property
    def frozen_block(self) -> list[Parameter]:
        """Those of one block; all blocks are alike."""
        return [p for p in self.frozen if p.block == 0]


def count(run: Run) -> Counts:
    """Count the parameters of `run`. Models that its caches replace are not built, and have none."""
    model = run.model
    network = _network(model.transformer, replace(model.train, quantization="none"))
    first: tuple[Parameter, ...] = ()
    if model.first_stage.kind == "autoencoder" and not run.cached:
        first = _autoencoder(model.first_stage.autoencoder).parameters
    text = () if run.cached_text else _t5(t5_shape(model)).parameters
    return Counts(network=network.parameters, first_stage=first, text=text, buffers=network.buffers)


@remembered
def _network(transformer: TransformerConfig, train: TrainConfig) -> Part:
    config = ModelConfig(transformer=transformer, train=train, text=TextConfig(kind="byt5"))
    return _part(empty_network(config, torch.float32))


@remembered
def _autoencoder(config: AutoencoderConfig) -> Part:
    return _part(empty_first_stage(FirstStageConfig(autoencoder=config), torch.float32))


@remembered
def _t5(shape: dict[str, Any] | int) -> Part:
    return _part(empty_t5(shape))


def empty_network(config: ModelConfig, dtype: torch.dtype) -> Any:
    """The transformer on the meta device; what trains requires gradients."""
    from sat_ext.models.transformer import build_transformer

    with torch.device("meta"):
        network = build_transformer(config, dtype)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(config.train.mode != "lora" or "lora_" in name)
    return network


def empty_first_stage(first: FirstStageConfig, dtype: torch.dtype) -> Any:
    """The first stage on the meta device."""
    from sat_ext.models.first_stage import build_first_stage

    with torch.device("meta"):
        return build_first_stage(ModelConfig(first_stage=first, text=TextConfig(kind="byt5")), dtype).to(dtype)


def t5_shape(model: ModelConfig) -> dict[str, Any] | int:
    """The text encoder's config, T5 v1.1 XXL's if the model's folder is not on this machine. For the small encoder
    over bytes, its width."""
    if model.text.kind == "byt5":
        return model.transformer.text_embed_dim
    if model.pretrained in (None, PRETRAINED) or not Path(str(model.pretrained)).is_dir():
        return T5_XXL
    return folder_config(str(model.pretrained), "text_encoder")


def empty_t5(shape: dict[str, Any] | int, **changes: Any) -> Any:
    """The encoder of a `t5_shape` on the meta device, with `changes` to its config."""
    from transformers import T5Config, T5EncoderModel

    from sat_ext.models.t5 import small_byt5

    if isinstance(shape, int):
        return small_byt5(shape).to("meta").eval()
    with torch.device("meta"):
        return T5EncoderModel(T5Config(**{**shape, **changes})).eval()


def _part(module: nn.Module) -> Part:
    return Part(parameters=tuple(_parameters(module)), buffers=sum(b.numel() for b in module.buffers()))


def _parameters(module: nn.Module) -> Iterator[Parameter]:
    """In the order of SAT's optimizer groups: module by module, the weights of each before its biases."""
    # the order matters: ZeRO flattens groups in it, and cuts them into the parts of ranks
    seen: set[int] = set()  # a shared parameter counts once
    for path, part in module.named_modules():
        own = [(n, p) for n, p in part._parameters.items() if p is not None and id(p) not in seen]
        block = re.match(r"transformer_blocks\.(\d+)", path)
        # neither adapters nor T5's `wo` is ever quantized: transformers keeps the latter as it is
        is_quantizable = isinstance(part, nn.Linear) and "lora_" not in path and not path.endswith(".wo")
        for name, parameter in sorted(own, key=lambda item: item[0] == "bias"):
            seen.add(id(parameter))
            yield Parameter(
                numel=parameter.numel(),
                trains=parameter.requires_grad,
                decays=name != "bias" and not isinstance(part, NO_DECAY),
                block=int(block[1]) if block else None,
                matrix=is_quantizable and name == "weight",
                modulation=".norm1." in path or ".norm2." in path,
                rows=parameter.shape[0] if parameter.ndim else 1,
            )


def bytes_of(parameters: Iterable[Parameter], run: Run, split: int = 1) -> int:
    """Bytes of frozen parameters of the transformer, each split into `split` parts."""
    kind = run.model.train.quantization if run.lora else "none"
    total = 0
    for parameter in parameters:
        if kind == "none" or not parameter.matrix or parameter.block is None:
            total += -(-parameter.numel // split) * run.itemsize
        else:
            own = "fp8" if parameter.modulation else kind  # NF4's errors would scale whole channels
            total += _quantized(parameter, own, NETWORK_SCALES[own])
    return total


def text_bytes(run: Run, counts: Counts, split: int = 1) -> int:
    """Bytes of the text encoder's weights; the CPU that runs it is assumed to be like this machine's."""
    text, item = run.model.text, run.itemsize
    if text.device == "cpu" and not computes_in_bf16():
        item = 4
    return sum(
        _quantized(p, text.quantization, TEXT_SCALES[text.quantization])
        if text.quantization != "none" and p.matrix
        else -(-p.numel // split) * item
        for p in counts.text
    )


def _quantized(parameter: Parameter, kind: str, scale: int) -> int:
    if kind == "nf4":
        return parameter.numel // 2 + scale * -(-parameter.numel // NF4_BLOCK)
    return parameter.numel + scale * parameter.rows
