"""Training CogVideo's engine from a cache: what takes the place of its first stage and its text encoder."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sat_ext.cogvideo.network import CACHED_FIRST_STAGE, LOSS, read_network, target_of
from sat_ext.cogvideo.text_embedders import PARAMS, FrozenEmbedder
from sat_ext.errors import ConfigError, DataError
from sat_ext.latents.text import TextEmbeddings, encoder_fingerprint


class CachedFirstStage(nn.Module):
    """A target for `model.first_stage_config`: there is no first stage, and batches bring latents in `mp4`.

    The parameters of the class that it replaces may stay in `params`; only `sat-ext cache` needs them.
    """

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def encode(self, latents: Tensor) -> Tensor:
        """Returns its argument, (B, C, t, h, w). Raises `ConfigError` for pixels."""
        if latents.shape[1] == 3:
            raise ConfigError(
                f"model.first_stage_config.target: {CACHED_FIRST_STAGE} takes latents, and the batch brings "
                "pixels; set data.params.cache.folder, or remove the target."
            )
        return latents

    def decode(self, *_: Any, **__: Any) -> Tensor:
        """Raises `ConfigError`: there is no decoder."""
        raise ConfigError(
            f"model.first_stage_config.target: {CACHED_FIRST_STAGE} cannot decode samples; set "
            "args.eval_interval: null."
        )


class CachedTextEmbedder(FrozenEmbedder):
    """A target for an entry of `emb_models` that reads embeddings; there is no text encoder.

    - `folder`: what `sat-ext cache` wrote. Captions that are not in it raise `DataError`.
    - `model_dir`, `max_length`: those of the encoder it replaces; where set, a folder of another's embeddings
      raises `ConfigError`.

    A tensor (B, L, D) in place of captions, as a batch's `text_embeddings` with that as the `input_key`, is used
    as it is; then no `folder` is needed. Embeddings come in the training dtype and where the engine is. `parent`
    is the class that CogVideo's `GeneralConditioner` asks for.
    """

    PARENT = "sgm.modules.encoders.modules.AbstractEmbModel"

    def __init__(
        self,
        *,
        folder: str | None = None,
        model_dir: str | None = None,
        max_length: int | None = None,
        **params: Any,
    ) -> None:
        super().__init__(**params)
        self.embeddings: TextEmbeddings | None = None
        if folder is not None:
            self.embeddings = TextEmbeddings(Path(folder))
            expected = encoder_fingerprint(model_dir, max_length)
            self.embeddings.require(expected, "name the folder of this encoder's, or write them again")

    def forward(self, text: Sequence[str] | Tensor) -> Tensor:
        """Embeddings (B, L, D) of captions; embeddings stay as they are."""
        if isinstance(text, Tensor):
            if text.dim() != 3:
                raise DataError(f"text_embeddings: (B, L, D) is expected, got a tensor {tuple(text.shape)}.")
            return text.to(self.like)
        if self.embeddings is None:
            raise ConfigError(
                f"{PARAMS}.folder: 'folder' is missing, and the batch brings captions; name the folder of their "
                "embeddings, or set input_key: text_embeddings where the batch carries them."
            )
        return torch.stack([self.embeddings[caption] for caption in text]).to(self.like)


def check_cache(args: argparse.Namespace, model: Mapping[str, Any], *, is_cached: bool) -> None:
    """Raise `ConfigError` where the section and the arguments do not go with a cache, or with training without."""
    first_stage = target_of(model.get("first_stage_config"))
    if not is_cached:
        if first_stage == CACHED_FIRST_STAGE:
            raise ConfigError(
                f"model.first_stage_config.target: {CACHED_FIRST_STAGE} takes latents; set "
                "data.params.cache.folder to what sat-ext cache wrote."
            )
        return
    if first_stage != CACHED_FIRST_STAGE:
        raise ConfigError(
            f"data.params.cache: CogVideo's engine takes latents through model.first_stage_config.target: "
            f"{CACHED_FIRST_STAGE}, and the YAML has {first_stage}; append configs/cogvideo/cached.yaml."
        )
    loss = target_of(model.get("loss_fn_config"))
    if read_network(model).is_conditioned and loss != LOSS:
        raise ConfigError(
            f"data.params.cache: the cached condition goes through model.loss_fn_config.target: {LOSS}, and the "
            f"YAML has {loss}; append configs/cogvideo/joint.yaml."
        )
    if args.model_parallel_size > 1:
        raise ConfigError(
            "data.params.cache: CogVideo's script does not hand cached conditions to ranks that share a model; "
            "set args.model_parallel_size: 1."
        )
    if args.eval_interval:
        raise ConfigError(
            f"args.eval_interval: {args.eval_interval}, but CogVideo's evaluations decode samples, and a run from "
            "data.params.cache has no first stage; set it to null."
        )
