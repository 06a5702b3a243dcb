"""Captions to embeddings. Nothing here trains, as in the published models."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BitsAndBytesConfig, ByT5Tokenizer, T5Config, T5EncoderModel

from sat_ext.models.config import ModelConfig, TextConfig
from sat_ext.models.folder import folder_config
from sat_ext.models.quantize import import_bitsandbytes
from sat_ext.models.text_offload import EmbeddingCache, encoder_dtype, on_device, own_cores

# Of the small encoder. Changing one makes every checkpoint of a tiny model useless.
BYT5_SEED = 1
HEAD_WIDTH = 16
HEAD_FOCUS = 12.0  # in logits: all but about exp(-12) of each head's attention


class T5Text(nn.Module):
    """A T5 encoder and its tokenizer. Captions are padded to `length` tokens, without an attention mask,
    as CogVideo's FrozenT5Embedder and diffusers' pipelines do.

    An encoder that is quantized or off the GPU stays out of the module tree: what moves, casts, saves or
    partitions the model does not see it, and every rank holds it in its own memory."""

    encoder: nn.Module

    def __init__(self, encoder: nn.Module, tokenizer: Any, length: int, lever: TextConfig) -> None:
        super().__init__()
        encoder.eval().requires_grad_(False)
        if lever.device == "gpu" and lever.quantization == "none":
            self.encoder = encoder
        else:
            self.__dict__["encoder"] = encoder
        self.moves = lever.device == "on_off"
        self.tokenizer = tokenizer
        self.length = length
        self.embeddings = EmbeddingCache()

    def train(self, mode: bool = True) -> "T5Text":
        """Stay in evaluation mode: T5 has dropout."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, captions: list[str], device: torch.device, dtype: torch.dtype) -> Tensor:
        """Embeddings, (B, length, D), on `device`. Longer captions are cut."""
        if "encoder" in self._modules:
            # every batch, nothing from the cache: under ZeRO-3 this gathers weights, so all ranks must call alike
            return self._embed(captions).to(device, dtype)
        place = on_device([self.encoder], device) if self.moves else own_cores()
        return self.embeddings.get(captions, dtype, self._embed, place).to(device, dtype)

    def _embed(self, captions: list[str]) -> Tensor:
        tokens = self.tokenizer(
            captions, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        return self.encoder(tokens.input_ids.to(next(self.encoder.parameters()).device))[0]


def build_text(config: ModelConfig, dtype: torch.dtype) -> T5Text:
    """The text encoder that `config` asks for. Raises `ConfigError` if its quantization cannot be had."""
    if config.text.device == "cpu":
        dtype = encoder_dtype(dtype)
    if config.text.kind == "byt5":
        small = small_byt5(config.transformer.text_embed_dim).to(dtype)
        return T5Text(small, ByT5Tokenizer(), config.text_length, config.text)
    assert config.pretrained is not None, "ModelConfig checks it"
    folder_config(config.pretrained, "text_encoder")
    folder_config(config.pretrained, "tokenizer", "tokenizer_config.json")
    encoder = T5EncoderModel.from_pretrained(
        config.pretrained, subfolder="text_encoder", dtype=dtype, use_safetensors=True, local_files_only=True,
        **_quantization(config.text, dtype),
    )  # fmt: skip
    for layer in encoder.modules():  # bitsandbytes' own for CPUs with AVX512 packs narrow layers wrongly
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    tokenizer = AutoTokenizer.from_pretrained(config.pretrained, subfolder="tokenizer", local_files_only=True)
    return T5Text(encoder, tokenizer, config.text_length, config.text)


def _quantization(lever: TextConfig, dtype: torch.dtype) -> dict[str, Any]:
    """`from_pretrained`'s arguments for quantization, which happens on the device where the encoder stays."""
    if lever.quantization == "none":
        return {}
    import_bitsandbytes(f"model.text.quantization: {lever.quantization}")
    chosen = {
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype),
    }[lever.quantization]
    here = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": chosen, "device_map": {"": here}}


def small_byt5(width: int) -> nn.Module:
    """A T5 encoder of one layer over bytes, for tiny models: random, and the same on every machine.

    Head h looks at the byte h places before, so that an embedding depends on the last few letters. With plain
    random weights every head would average over the caption, and words would hardly differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(BYT5_SEED)
        shape = T5Config(
            vocab_size=len(ByT5Tokenizer()), d_model=width, d_kv=HEAD_WIDTH, d_ff=2 * width,
            num_heads=max(1, width // HEAD_WIDTH), num_layers=1, dropout_rate=0.0,
        )  # fmt: skip
        # only the stack: the model around it would name the embedding a second time
        encoder: Any = T5EncoderModel(shape).encoder
    # T5's first buckets of relative position are 0, 1, 2, ... places before
    bias = encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    with torch.no_grad():
        bias.copy_(HEAD_FOCUS * torch.eye(*bias.shape))
    return encoder
