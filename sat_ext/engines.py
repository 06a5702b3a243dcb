"""The engines that a `model` section can name, and what the rest of the program asks of them.

| engine | section | class | trained by |
|---|---|---|---|
| built-in | keys of `ModelConfig` | `models.section.BuiltIn` | this repository's train_video.py |
| CogVideo's | `network_config` ... | `cogvideo.section.CogVideo` | the train_video.py of a CogVideo checkout |

Only `engine_of` tells them apart. A third engine would be one more class with these members:

| member | meaning |
|---|---|
| `model` | the section, which may be empty: then nothing is known of the model |
| `is_cogvideo` | its layers are SAT's, CogVideo's script trains with its own arguments, and rank 0 alone samples |
| `is_conditioned` | the model is image-to-video |
| `condition_dropout` | how often an image-to-video model trains without its condition, 0 to 1 |
| `takes_packs` | a step can have samples of several shapes |
| `weighs_losses` | the loss multiplies by the batches' `loss_weight` |
| `lora_scale` | factor on the product of a LoRA's two matrices, and how it is written; None where no LoRA trains |
| `lora_remedy` | what gives a LoRA a learning rate that fits |
| `check_base()` | raises `ConfigError` where the target "base", the model without its LoRA, cannot be had |
| `is_2b` | the model is CogVideoX-2B, the one without rotary positions |
| `doubt()` | what of the section trains without an error, but hardly as it is meant, in a sentence; or None |
| `batch_dtype(training)` | what the pixels of a batch are handed over in, where the run trains in `training` |
| `sequence_shape()` | what the cost of a batch follows from |
| `model_config()` | the model in the built-in engine's words; its folder need not be on this machine |
| `caches_text` | the section takes text embeddings from a folder |
| `tokenizer` | the folder of the text encoder's tokenizer, or "byt5"; None where the section names none |
| `encodes_whole_clips` | the first stage holds an activation of a clip at full resolution |
| `recompute` | what it computes again in its backward pass, in the words of `ChunkedFirstStage` |
| `check(buckets)` | raises `ConfigError` where the model cannot train on samples of these shapes |
| `check_run(args, buckets)` | `check`, and what only a run with SAT's arguments, or from a cache, can get wrong |
| `fingerprints(dtype)` | of both encoders, without loading a weight; raises `ConfigError` |
| `encoders(dtype, device)` | the first stage and the text encoder, for `sat-ext cache`; raises `ConfigError` |
| `too_large(part)` | what to do where a GPU is too small for one of the encoders |
| `train_from(folder, clips)` | how to train from a cache in `folder` that has `clips` draws of each clip |"""

from collections.abc import Mapping
from typing import Any

from sat_ext.cogvideo.section import CogVideo
from sat_ext.config import plain
from sat_ext.errors import ConfigError
from sat_ext.models.section import BuiltIn

Engine = CogVideo | BuiltIn


def engine_of(model: Any) -> Engine:
    """The engine of a `model` section: a mapping, OmegaConf's too, which may be empty or None. Raises
    `ConfigError` for anything else."""
    if not isinstance(model or {}, Mapping):
        raise ConfigError(f"model: expected a mapping of keys, got {model!r}.")
    section = plain(model)
    return CogVideo(section) if "network_config" in section else BuiltIn(section)
