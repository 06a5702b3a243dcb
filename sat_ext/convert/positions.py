"""Position embeddings that CogVideo keeps in its checkpoints and diffusers computes.

With them a file of SAT's can be made from a folder of diffusers', and a file's own compared.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sat_ext.cogvideox import Grid, latent_frames, rotary_table, sinusoidal_table

UNUSED = "transformer.position_embeddings.weight"
UNUSED_LENGTH = 64  # `max_sequence_length` of every YAML of CogVideo's


def computed(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that SAT's transformer has beyond diffusers', by SAT's names, for a model of this config.json.

    Rotary models carry SAT's own position embedding too, which their network never reads; it is zero here.
    """
    patch, head = config["patch_size"], config["attention_head_dim"]
    hidden = config["num_attention_heads"] * head
    grid = Grid(
        latent_frames(config["sample_frames"]), config["sample_height"] // patch, config["sample_width"] // patch
    )
    if not config["use_rotary_positional_embeddings"]:
        scale = config["spatial_interpolation_scale"]
        video = sinusoidal_table(grid, hidden, (1.0, scale, scale))
        text = torch.zeros(config["max_text_seq_length"], hidden)
        return {"mixins.pos_embed.pos_embedding": torch.cat([text, video])[None].to(dtype)}
    tensors = {UNUSED: torch.zeros(UNUSED_LENGTH, hidden, dtype=dtype)}
    if config["patch_size_t"] is None:  # 1.5 computes its tables at every start
        cosines, sines = rotary_table(grid, head)
        tensors["mixins.pos_embed.freqs_sin"] = sines.to(dtype)
        tensors["mixins.pos_embed.freqs_cos"] = cosines.to(dtype)
    return tensors
