"""What trains without an error, but hardly as it is meant: for `sat-ext check --base` and the start of a run."""

from collections.abc import Mapping
from typing import Any

from sat_ext.engines import Engine

# A LoRA's step is the learning rate times the factor on its product. The least that CogVideo trains one with: lr
# 5e-4 (the comment at `lr` in sat/configs/sft.yaml: "Between 1E-3 and 5E-4 For Lora and 1E-5 For SFT") times 1/256
# (`r: 256` in sat/configs/cogvideox_5b_i2v_lora.yaml, and alpha 1, the default of sat.model.finetune.lora2).
LEAST_LORA_STEP = 5e-4 / 256
SAT_LR = 1e-4  # the default of SAT's --lr


def doubts(engine: Engine, deepspeed: Mapping[str, Any], args: Mapping[str, Any]) -> list[str]:
    """A sentence each. `deepspeed` and `args` are sections of the merged YAML; `args` may be SAT's arguments."""
    given = ((deepspeed.get("optimizer") or {}).get("params") or {}).get("lr")
    lr = args.get("lr") or SAT_LR if given is None else given
    found = [_lora_rate(engine, float(lr)), engine.doubt(), _precision(engine, deepspeed)]
    return [sentence for sentence in found if sentence]


def _lora_rate(engine: Engine, lr: float) -> str | None:
    scale = engine.lora_scale
    if scale is None or lr * scale[0] >= LEAST_LORA_STEP:
        return None
    return (
        f"deepspeed.optimizer.params.lr: {lr:g} is a rate for tuning every weight; a LoRA scaled by {scale[1]} "
        f"hardly learns at it (lr x scale is {lr * scale[0]:.1e}, and the least that CogVideo trains one with is "
        f"{LEAST_LORA_STEP:.1e}: 5e-4 at 1/256); {engine.lora_remedy}."
    )


def _precision(engine: Engine, deepspeed: Mapping[str, Any]) -> str | None:
    """CogVideoX-2B, the one model without rotary positions, was published in fp16, the others in bf16."""
    if not engine.is_2b or not (deepspeed.get("bf16") or {}).get("enabled"):
        return None
    return (
        "deepspeed.bf16.enabled: true, but CogVideoX-2B was published in fp16; bf16 keeps three bits less; "
        "append configs/train/fp16.yaml."
    )
