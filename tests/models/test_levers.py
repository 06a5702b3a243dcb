from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sat_ext.errors import ConfigError
from sat_ext.models.engine import VideoDiffusionEngine
from sat_ext.models.folder import load_model_config
from tests.models.conftest import SMALL, small_config

LORA = {"mode": "lora", "rank": 2}
SIX = {**SMALL, "num_layers": 6}
SWAP = {"transformer": SIX, "block_swap": 4, "train": LORA, "gradient_checkpointing": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient_checkpointing": {"every": 0}}, r"checkpointing\.every: 0; give 1 \(all blocks\) or more"),
        ({"train": {"quantization": "nf4"}}, "quantization: nf4 is for frozen weights, and mode: full trains"),
        ({**SWAP, "train": {}}, "block_swap: 4, but swapped weights are never written back, and mode: full"),
        ({**SWAP, "gradient_checkpointing": False}, "only when it is recomputed; set model.gradient"),
        ({**SWAP, "gradient_checkpointing": {"every": 2}}, "only when it is recomputed"),
        ({**SWAP, "block_swap": 7}, "two blocks are on the GPU at a time, and the model has 6; give 3 to 6"),
        ({**SWAP, "block_swap": 2}, "give 3 to 6, or 0 for none"),
        ({**SWAP, "block_swap": -1}, "give 3 to 6, or 0 for none"),
        ({"text": {"kind": "byt5", "quantization": "nf4"}}, "text.quantization: nf4 is for a folder's T5"),
        ({"first_stage": {"frames": 6}}, "first_stage.frames: 6 is not a multiple of 4; use 8"),
        ({"first_stage": {"frames": 0}}, "first_stage.frames: 0 is not a multiple of 4; use 4"),
    ],
)  # fmt: skip
def test_levers_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model_config(small_config("2b", **changes))


@pytest.mark.parametrize("device", ["cpu", "on_off"])
def test_a_quantized_text_encoder_stays_on_the_gpu(pretrained: Any, device: str) -> None:
    text = {"device": device, "quantization": "int8"}
    with pytest.raises(
        ConfigError, match=f"int8 is for a folder's T5 that stays on the GPU, .* device: {device};"
    ):
        load_model_config({"pretrained": str(pretrained()), "conditioning": "i2v", "text": text})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (SWAP, "block_swap: 4, but ZeRO-3 shards all weights and gathers them itself; use stage 2"),
        ({"train": {**LORA, "quantization": "fp8"}}, "train.quantization: fp8, but ZeRO-3 shards"),
    ],
)
def test_zero_3_takes_neither_swapped_nor_quantized_weights(changes: dict[str, Any], message: str) -> None:
    args = SimpleNamespace(
        model_config=small_config("2b", **changes), deepspeed_config={"zero_optimization": {"stage": 3}}
    )
    with pytest.raises(ConfigError, match=message):
        VideoDiffusionEngine(args)
    args.deepspeed_config["zero_optimization"]["stage"] = 2
    VideoDiffusionEngine(args)
