"""Parameters of a run, counted on the real classes, of which no weights are made (torch's meta device)."""

from collections.abc import Iterator
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

# https://huggingface.co/google/t5-v1_1-xxl, config.json: the text encoder of every published CogVideoX model.
T5_XXL = {
    "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
# What SAT trains without weight decay, in a group of its own (NO_WD_MODULES in sat/transformer_defaults.py).
NO_DECAY = (nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter: how many numbers, whether it trains, and where it is.

    `block`: of the transformer's repeated blocks. `matrix`: the weight of a linear layer, which can be quantized;
    `rows` of it; `modulation`: of one that scales and shifts after a norm. `decays`: SAT's optimizer group.
    """

    numel: int
    trains: bool = False
    decays: bool = True
    block: int | None = None
    matrix: bool = False
    modulation: bool = False
    rows: int = 1


@dataclass(frozen=True, kw_only=True)
class Part:
    """The parameters of one module, in the order of its modules, and numbers in its buffers."""

    parameters: tuple[Parameter, ...]
    buffers: int = 0


@dataclass(frozen=True, kw_only=True)
class Counts:
    """The parameters of each part, in the order of its modules, and numbers in the transformer's buffers."""

    network: tuple[Parameter, ...]
    first_stage: tuple[Parameter, ...]
    text: tuple[Parameter, ...]
    buffers: int

    @property
    def groups(self) -> list[list[int]]:
        """Sizes of what trains, by SAT's optimizer groups."""
        groups = [[p.numel for p in self.network if p.trains and p.decays == decays] for decays in (True, False)]
        return [group for group in groups if group]

    def of_block(self, block: int = 0) -> tuple[Parameter, ...]:
        """The parameters of one block of the transformer; all are alike."""
        return tuple(p for p in self.network if p.block == block)


def count(run: Run) -> Counts:
    """Count the parameters of `run`. What the data cache replaces has none: it is not built."""
    model = run.model
    network = _network(model.transformer, replace(model.train, quantization="none"))
    first: tuple[Parameter, ...] = ()
    text: tuple[Parameter, ...] = ()
    if model.first_stage.kind == "autoencoder" and not run.cached:
        first = _first_stage(model.first_stage.autoencoder).parameters
    if not run.cached_text:
        text = _t5(t5_shape(model)).parameters
    return Counts(network=network.parameters, first_stage=first, text=text, buffers=network.buffers)


@remembered
def _network(transformer: TransformerConfig, train: TrainConfig) -> Part:
    from sat_ext.models.transformer import build_transformer

    config = ModelConfig(transformer=transformer, train=train, text=TextConfig(kind="byt5"))
    with torch.device("meta"):
        network = build_transformer(config, torch.float32)
    lora = train.mode == "lora"
    return Part(
        parameters=tuple(_parameters(network, lambda name: not lora or "lora_" in name)),
        buffers=sum(b.numel() for b in network.buffers()),
    )


@remembered
def _first_stage(config: AutoencoderConfig) -> Part:
    from sat_ext.models.first_stage import build_first_stage

    first = FirstStageConfig(autoencoder=config)
    with torch.device("meta"):
        stage = build_first_stage(ModelConfig(first_stage=first, text=TextConfig(kind="byt5")), torch.float32)
    return Part(parameters=tuple(_parameters(stage)))


@remembered
def _t5(shape: dict[str, Any] | int) -> Part:
    return Part(parameters=tuple(_parameters(empty_t5(shape))))


def t5_shape(model: ModelConfig) -> dict[str, Any] | int:
    """The text encoder's config; T5 v1.1 XXL's where the model's folder is not on this machine. Of the small one
    over bytes, its width."""
    if model.text.kind == "byt5":
        return model.transformer.text_embed_dim
    if model.pretrained in (None, PRETRAINED) or not Path(str(model.pretrained)).is_dir():
        return T5_XXL
    return folder_config(str(model.pretrained), "text_encoder")


def empty_t5(shape: dict[str, Any] | int, **changes: Any) -> Any:
    """The encoder of what `t5_shape` gave and, of a config, `changes` to it, without memory for its weights."""
    from transformers import T5Config, T5EncoderModel

    from sat_ext.models.t5 import small_byt5

    if isinstance(shape, int):
        return small_byt5(shape).to("meta").eval()
    with torch.device("meta"):
        return T5EncoderModel(T5Config(**{**shape, **changes})).eval()


def _parameters(module: nn.Module, trains: object = None) -> Iterator[Parameter]:
    """In SAT's order of its optimizer groups: module by module, of each the weights before the biases."""
    seen: set[int] = set()
    for path, part in module.named_modules():
        own = [(n, p) for n, p in part._parameters.items() if p is not None and id(p) not in seen]
        for name, parameter in sorted(own, key=lambda item: item[0] == "bias"):
            seen.add(id(parameter))
            full = f"{path}.{name}"
            yield Parameter(
                numel=parameter.numel(),
                trains=bool(trains and trains(full)),  # type: ignore[operator]
                decays=name != "bias" and not isinstance(part, NO_DECAY),
                block=_block(path),
                # transformers keeps T5's `wo` as it is
                matrix=isinstance(part, nn.Linear)
                and name == "weight"
                and "lora_" not in path
                and not path.endswith(".wo"),
                modulation=".norm1." in path or ".norm2." in path,
                rows=parameter.shape[0] if parameter.ndim else 1,
            )


def _block(path: str) -> int | None:
    """The block that a module of the transformer is in: `transformer_blocks.7.attn1.to_q`."""
    names = path.split(".")
    return int(names[1]) if names[0] == "transformer_blocks" and len(names) > 1 else None
