"""What trains without an error, but hardly as it is meant: for `sat-ext check --base` and the start of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sat_ext.cogvideo.network import LOSS, is_conditioned, read_network
from sat_ext.models.config import TrainConfig

# A LoRA's step is the learning rate times the factor on its product. The least that CogVideo trains one with: lr
# 5e-4 (the comment at `lr` in sat/configs/sft.yaml: "Between 1E-3 and 5E-4 For Lora and 1E-5 For SFT") times 1/256
# (`r: 256` in sat/configs/cogvideox_5b_i2v_lora.yaml, and alpha 1, the default of sat.model.finetune.lora2).
LEAST_LORA_STEP = 5e-4 / 256
SAT_LR = 1e-4  # the default of SAT's --lr


def doubts(model: Mapping[str, Any], deepspeed: Mapping[str, Any], args: Mapping[str, Any]) -> list[str]:
    """A sentence each. The arguments are the sections of the merged YAML, `args` may be SAT's arguments."""
    given = ((deepspeed.get("optimizer") or {}).get("params") or {}).get("lr")
    lr = args.get("lr") or SAT_LR if given is None else given
    found = [_lora_rate(model, float(lr)), _condition_scale(model), _precision(model, deepspeed)]
    return [sentence for sentence in found if sentence]


def lora_scale(model: Mapping[str, Any]) -> tuple[float, str] | None:
    """The factor on the product of a LoRA's two matrices, and what it is made of; None where no LoRA trains."""
    if "network_config" in model:
        network = read_network(model)
        alpha, rank = network.lora_alpha, network.lora_rank
    else:
        train = model.get("train") or {}
        alpha, rank = train.get("alpha", TrainConfig.alpha), train.get("rank", TrainConfig.rank)
        if train.get("mode") != "lora":
            return None
    return (alpha / rank, f"{alpha}/{rank}") if rank else None


def _lora_rate(model: Mapping[str, Any], lr: float) -> str | None:
    scale = lora_scale(model)
    if scale is None or lr * scale[0] >= LEAST_LORA_STEP:
        return None
    cure = "append configs/cogvideo/lora-rate.yaml" if "network_config" in model else "use configs/train/lora.yaml"
    return (
        f"deepspeed.optimizer.params.lr: {lr:g} is a rate for tuning every weight; a LoRA scaled by {scale[1]} "
        f"hardly learns at it (lr x scale is {lr * scale[0]:.1e}, and the least that CogVideo trains one with is "
        f"{LEAST_LORA_STEP:.1e}: 5e-4 at 1/256); {cure}."
    )


def _precision(model: Mapping[str, Any], deepspeed: Mapping[str, Any]) -> str | None:
    """CogVideoX-2B, the one model without rotary positions, was published in fp16, the others in bf16."""
    if "network_config" in model:
        network = read_network(model)
        is_2b = network.text_length is not None and not network.is_rotary
    else:
        transformer = model.get("transformer") or {}
        rotary = transformer.get("use_rotary_positional_embeddings", False)
        is_2b = bool(model.get("pretrained") and transformer and not rotary)
    if not is_2b or not (deepspeed.get("bf16") or {}).get("enabled"):
        return None
    return (
        "deepspeed.bf16.enabled: true, but CogVideoX-2B was published in fp16; bf16 keeps three bits less; "
        "append configs/train/fp16.yaml."
    )


def _condition_scale(model: Mapping[str, Any]) -> str | None:
    if "network_config" not in model or not is_conditioned(model) or read_network(model).generation != "1.5":
        return None
    loss = model.get("loss_fn_config") or {}
    if loss.get("target") != LOSS or (loss.get("params") or {}).get("condition_scale") is not None:
        return None
    return (
        "model.loss_fn_config.params.condition_scale: missing, so the condition trains at scale_factor (0.7), "
        "which no sampler of CogVideoX 1.5 uses; append configs/cogvideo/1.5.yaml (1.0, for sample_video.py)."
    )
