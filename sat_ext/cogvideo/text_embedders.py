"""CogVideo's text encoder off the GPU: on the CPU, or on the GPU for a call only.

T5-XXL's encoder has 4.8 billion parameters, which never train. It stays out of the engine's module tree, where
nothing moves, casts, saves or partitions it, and out of checkpoints. If a checkpoint of CogVideo's has one, SAT
lists those keys as unexpected and does not use them."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sat_ext.cogvideo.target import Target
from sat_ext.config import convert
from sat_ext.models.text_offload import EmbeddingCache, encoder_dtype, on_device, own_cores

PARAMS = "model.conditioner_config.params.emb_models.params"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class FrozenEmbedder(Target, nn.Module):
    """An embedder without registered weights, so it cannot train (`_check_text` refuses `is_trainable: true`)."""

    WHERE = PARAMS
    like: Tensor

    def __init__(self, **params: Any) -> None:
        super().__init__(**params)
        # moved and cast with the engine, so it has the device and dtype that embeddings need; in no state_dict
        self.register_buffer("like", torch.zeros(0), persistent=False)


class OffloadedTextEmbedder(FrozenEmbedder):
    """A target for an entry of `emb_models`: the class `parent`, its encoder not on the GPU.

    "on_off" copies it to the GPU for each call, if the engine is there, and frees the copy after it. By default it
    has the training dtype, as in CogVideo, but on the CPU fp32 unless that is bf16 and the CPU computes in it.
    Every rank holds it in its own memory, and remembers the embeddings of recent captions. `parent` is one of
    CogVideo's `Frozen...` classes, which take `device`."""

    PARENT = "sgm.modules.encoders.modules.FrozenT5Embedder"
    CALLS = ("forward",)

    def __init__(
        self, *, device: Literal["cpu", "on_off"] = "cpu", dtype: Literal["fp32", "bf16"] | None = None,
        **params: Any,
    ) -> None:  # fmt: skip
        moves = convert(Literal["cpu", "on_off"], device, f"{PARAMS}.device") == "on_off"
        dtype = convert(Literal["fp32", "bf16"] | None, dtype, f"{PARAMS}.dtype")
        super().__init__(device="cpu", **params)
        self.moves = moves
        self.encoder_dtype = None if dtype is None else DTYPES[dtype]
        self.embeddings = EmbeddingCache()
        self.held: list[nn.Module] = []
        for name in list(self._modules):
            module = self._modules.pop(name)
            assert module is not None
            self.__dict__[name] = module.eval().requires_grad_(False)  # the parent finds it, nothing else does
            self.held.append(module)

    @torch.no_grad()
    def forward(self, text: Sequence[str]) -> Tensor:
        """Embeddings of the captions, (B, max_length, D), in the training dtype and on the engine's device."""
        on_gpu = self.moves and self.like.device.type != "cpu"
        dtype = self.encoder_dtype or (self.like.dtype if on_gpu else encoder_dtype(self.like.dtype))
        for module in self.held:
            module.to(dtype=dtype)
        if on_gpu:
            self.device = self.like.device  # where the parent sends its tokens
        place = on_device(self.held, self.like.device) if on_gpu else own_cores()
        return self.embeddings.get(text, self.like.dtype, super().forward, place).to(self.like)
