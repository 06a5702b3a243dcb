"""The small runs that the tests of checkpoints kill and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

STEPS, SAVE, EVALUATE = 8, 3, 2
QUICK = {"train_iters": 4, "save_interval": 2, "eval_interval": None, "valid_data": None}
MODEL = {
    "conditioning": "i2v", "first_stage": {"kind": "cosine"}, "text": {"kind": "byt5", "max_length": 16},
    "transformer": {
        "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 32, "out_channels": 16,
        "time_embed_dim": 16, "text_embed_dim": 16, "max_text_seq_length": 16,
        "use_rotary_positional_embeddings": True,
    },
}  # fmt: skip


def write_config(demo: Path, folder: Path, *, stage: int = 1, accumulate: int = 1, **args: Any) -> list[str]:
    """The arguments of a run whose checkpoints go to `folder / "save"`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model": MODEL,
        "args": {
            "experiment_name": "run", "train_iters": STEPS, "save_interval": SAVE, "eval_interval": EVALUATE,
            "eval_iters": 1, "log_interval": 100, "lr_decay_style": "cosine", "warmup": 0.3, "num_workers": 0,
            "save": str(folder / "save"), "checkpoint": "full", "train_data": [str(demo / "train")],
            "valid_data": [str(demo / "heldout")], **args,
        },
        "data": {
            "target": "sat_ext.JointImageVideoDataset",
            "params": {"video_size": [32, 32], "fps": 8, "max_num_frames": 5},
        },
        "deepspeed": {
            "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": accumulate,
            "gradient_clipping": 1.0, "zero_optimization": {"stage": stage}, "bf16": {"enabled": False},
            "zero_allow_untested_optimizer": True, "steps_per_print": 10**6,
            "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "lr": 1e-3}},
        },
    }  # fmt: skip
    file = folder / f"{len(list(folder.glob('*.yaml')))}.yaml"
    file.write_text(yaml.safe_dump(config))
    return ["--base", str(file)]
