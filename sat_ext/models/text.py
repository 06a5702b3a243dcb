"""Captions to embeddings. Nothing here trains, as in the published models."""

from __future__ import annotations

import re
import zlib

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5EncoderModel

from sat_ext.models.config import ModelConfig, folder_config, text_length, transformer_of

WORD_SEED = 1  # of the words' vectors; changing it makes every checkpoint of a tiny model useless


class T5Text(nn.Module):
    """A T5 encoder and its tokenizer. Captions are padded to `length` tokens, without an attention mask,
    as CogVideo's FrozenT5Embedder and diffusers' pipelines do."""

    def __init__(self, encoder: T5EncoderModel, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        super().__init__()
        self.encoder = encoder.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.length = length

    def train(self, mode: bool = True) -> T5Text:
        return super().train(False)  # T5 has dropout

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
        return self.encoder(tokens.input_ids.to(device))[0].to(dtype)


class WordText(nn.Module):
    """Each word its own fixed random vector: the text encoder of the tiny models.

    A frozen T5 with random weights mixes the letters of a caption so that captions of different meaning end
    up close together; independent vectors are as far apart as they can be. A word's vector comes from its
    letters alone, so there is no vocabulary and no file. Words that are left over pad with zeros.
    """

    def __init__(self, dimension: int, length: int) -> None:
        super().__init__()
        self.dimension = dimension
        self.length = length
        self._vectors: dict[str, Tensor] = {}

    def _vector(self, word: str) -> Tensor:
        if word not in self._vectors:
            generator = torch.Generator().manual_seed(zlib.crc32(word.encode()) + WORD_SEED)
            self._vectors[word] = torch.randn(self.dimension, generator=generator)
        return self._vectors[word]

    def encode(self, captions: list[str], device: torch.device, dtype: torch.dtype) -> Tensor:
        """Embeddings, (B, length, D). Longer captions are cut."""
        embeddings = torch.zeros(len(captions), self.length, self.dimension)
        for row, caption in zip(embeddings, captions, strict=True):
            for place, word in enumerate(re.findall(r"\w+", caption.lower())[: self.length]):
                row[place] = self._vector(word)
        return embeddings.to(device, dtype)


TextEncoder = T5Text | WordText


def build_text(config: ModelConfig, dtype: torch.dtype) -> TextEncoder:
    """The text encoder that `config` asks for."""
    if config.text.kind == "words":
        return WordText(transformer_of(config).text_embed_dim, text_length(config))
    assert config.pretrained is not None, "ModelConfig checks it"
    folder_config(config.pretrained, "text_encoder")
    folder_config(config.pretrained, "tokenizer", "tokenizer_config.json")
    encoder = T5EncoderModel.from_pretrained(
        config.pretrained, subfolder="text_encoder", dtype=dtype, use_safetensors=True, local_files_only=True
    )
    tokenizer = AutoTokenizer.from_pretrained(config.pretrained, subfolder="tokenizer", local_files_only=True)
    return T5Text(encoder, tokenizer, text_length(config))
