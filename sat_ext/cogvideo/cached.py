"""Training CogVideo's engine from a cache: what replaces its first stage and its text encoder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sat_ext.cogvideo.network import CACHED_FIRST_STAGE
from sat_ext.cogvideo.text_embedders import PARAMS, FrozenEmbedder
from sat_ext.errors import ConfigError, DataError
from sat_ext.latents.text import TextEmbeddings, encoder_fingerprint


class CachedFirstStage(nn.Module):
    """A target for `model.first_stage_config`: there is no first stage, as batches bring latents in `mp4`.

    The parameters of the class that it replaces may stay in `params`; only `sat-ext cache` needs them."""

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


class CachedTextEmbedder(FrozenEmbedder):
    """A target for an entry of `emb_models` that reads embeddings from `folder`, which `sat-ext cache` wrote.

    `model_dir` and `max_length` are those of the encoder that it replaces. Where they are set, a folder of another
    encoder's embeddings raises `ConfigError`. A tensor (B, L, D) in place of captions, as a batch's
    `text_embeddings` with that as the `input_key`, is used as it is; then no `folder` is needed. `parent` is the
    class that CogVideo's `GeneralConditioner` asks for."""

    PARENT = "sgm.modules.encoders.modules.AbstractEmbModel"

    def __init__(
        self, *, folder: str | None = None, model_dir: str | None = None, max_length: int | None = None,
        **params: Any,
    ) -> None:  # fmt: skip
        super().__init__(**params)
        self.embeddings = None if folder is None else TextEmbeddings(Path(folder))
        if self.embeddings is not None:
            expected = encoder_fingerprint(model_dir, max_length)
            self.embeddings.require(expected, "name the folder of this encoder's, or write them again")

    def forward(self, text: Sequence[str] | Tensor) -> Tensor:
        """Embeddings (B, L, D) of captions. Raises `DataError` for a caption that is not in the folder."""
        if isinstance(text, Tensor):
            if text.dim() != 3:
                raise DataError(f"text_embeddings: (B, L, D) is expected, got a tensor {tuple(text.shape)}.")
            return text.to(self.like)
        if self.embeddings is None:
            raise ConfigError(
                f"{PARAMS}.folder: 'folder' is missing, and the batch brings captions; name the folder of their "
                "embeddings, or set input_key: text_embeddings where the batch carries them."
            )
        return self.embeddings.encode(text, self.like.device, self.like.dtype)
