"""Captions to embeddings. Nothing here trains, as in the published models."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    ByT5Tokenizer,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
)

from sat_ext.errors import ConfigError
from sat_ext.models.config import ModelConfig, folder_config, text_length, transformer_of
from sat_ext.models.placement import on_device
from sat_ext.models.quantize import bitsandbytes, without_repacking

# Of the small encoder. Changing one makes every checkpoint of a tiny model useless.
BYT5_SEED = 1
HEAD_WIDTH = 16
HEAD_FOCUS = 12.0  # in logits: all but about exp(-12) of each head's attention


class T5Text(nn.Module):
    """A T5 encoder and its tokenizer. Captions are padded to `length` tokens, without an attention mask,
    as CogVideo's FrozenT5Embedder and diffusers' pipelines do.

    Unless `place` is "gpu", the encoder is no part of the module tree, and stays on the CPU when the engine is
    moved; "on_off" copies it to the captions' device for each call.
    """

    encoder: nn.Module

    def __init__(
        self, encoder: nn.Module, tokenizer: PreTrainedTokenizerBase, length: int, place: str = "gpu"
    ) -> None:
        super().__init__()
        encoder = encoder.eval().requires_grad_(False)
        if place == "gpu":
            self.encoder = encoder
        else:
            self.__dict__["encoder"] = encoder
        self.place = place
        self.tokenizer = tokenizer
        self.length = length

    def train(self, mode: bool = True) -> T5Text:
        """Stay in evaluation mode, whatever is asked: T5 has dropout."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, captions: list[str], device: torch.device, dtype: torch.dtype) -> Tensor:
        """Embeddings, (B, length, D). Longer captions are cut."""
        tokens = self.tokenizer(
            captions,
            padding="max_length",
            max_length=self.length,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        )
        if self.place == "cpu":
            return self.encoder(tokens.input_ids)[0].to(device, dtype)
        with on_device([self.encoder], device) if self.place == "on_off" else nullcontext():
            return self.encoder(tokens.input_ids.to(device))[0].to(dtype)


def build_text(config: ModelConfig, dtype: torch.dtype) -> T5Text:
    """The text encoder that `config` asks for."""
    length = text_length(config)
    if config.text.kind == "byt5":
        return T5Text(small_byt5(transformer_of(config).text_embed_dim).to(dtype), ByT5Tokenizer(), length)
    assert config.pretrained is not None, "ModelConfig checks it"
    folder_config(config.pretrained, "text_encoder")
    folder_config(config.pretrained, "tokenizer", "tokenizer_config.json")
    if config.text.device == "cpu" and dtype == torch.float16:
        dtype = torch.float32  # in fp16 CPUs are slow, and T5 overflows
    encoder = T5EncoderModel.from_pretrained(
        config.pretrained, subfolder="text_encoder", dtype=dtype, use_safetensors=True, local_files_only=True,
        quantization_config=_quantization(config.text.quantization, dtype),
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(config.pretrained, subfolder="tokenizer", local_files_only=True)
    return T5Text(without_repacking(encoder), tokenizer, length, config.text.device)


def _quantization(kind: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """What transformers takes. Raises `ConfigError` where it cannot be here."""
    if kind == "none":
        return None
    bitsandbytes("model.text.quantization")
    if kind == "int8":
        if not torch.cuda.is_available():
            raise ConfigError("model.text.quantization: int8 needs a GPU, and there is none; take nf4 or none.")
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def small_byt5(width: int) -> nn.Module:
    """A T5 encoder of one layer over bytes, for tiny models: random, and the same on every machine.

    Head h looks at the byte h places before, so that an embedding tells the last few letters. With plain random
    weights every head would average over the caption, and words would hardly differ.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(BYT5_SEED)
        shape = T5Config(
            vocab_size=len(ByT5Tokenizer()),
            d_model=width,
            d_kv=HEAD_WIDTH,
            d_ff=2 * width,
            num_heads=max(1, width // HEAD_WIDTH),
            num_layers=1,
            dropout_rate=0.0,
        )
        # only the stack: the model around it would name the embedding a second time
        encoder: Any = T5EncoderModel(shape).encoder
    # T5's first buckets of relative position are 0, 1, 2, ... places before
    bias = encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    with torch.no_grad():
        bias.copy_(HEAD_FOCUS * torch.eye(*bias.shape))
    return encoder
