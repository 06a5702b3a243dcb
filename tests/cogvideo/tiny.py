"""Small models of a CogVideo checkout: its own YAMLs with smaller numbers, and random weights made here.

    COGVIDEO_SAT=/path/to/CogVideo/sat python tests/cogvideo/tiny.py FOLDER

writes into FOLDER `t5/`, `vae.pt`, `transformer/` of every model, one YAML for each of the checkout's model
configurations, `sft.yaml`, and `data.yaml`: the lines that a user changes for our data class.
"""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import yaml

HERE = Path(__file__).parent
SIZE = (64, 96)  # height and width of the videos in pixels, which 1.0 models are tied to
FRAMES = 17  # of the longest video
TEXT_LENGTH = 16  # tokens
HIDDEN, HEADS, EMBEDDING, TEXT_HIDDEN, LORA_RANK = 32, 2, 32, 16, 4
OURS = {  # the README's three lines
    "args": {"iterable_dataset": "custom", "iterable_dataset_eval": "custom"},
    "data": {"target": "sat_ext.JointImageVideoDataset"},
}
AUTOENCODER = {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1}  # group norm wants multiples of 32


def write_all(sat: Path, folder: Path) -> None:
    """Weights and every YAML of the checkout whose `sat` folder is given."""
    write_weights(sat, folder)
    for name in model_names(sat):
        write_yaml(folder / f"{name}.yaml", model(sat, name, folder))
    write_yaml(folder / "sft.yaml", settings(sat))
    write_yaml(folder / "data.yaml", OURS)


def model_names(sat: Path) -> list[str]:
    """The checkout's model configurations that its own code can build.

    The main branch lists 1.0 models too, whose `patch_size: 2` its network cannot read.
    """
    names = sorted(p.stem for p in (sat / "configs").glob("cogvideox*.yaml"))
    return [n for n in names if "1.5" in n] or names


def model(sat: Path, name: str, weights: Path) -> dict[str, Any]:
    """`configs/<name>.yaml` of the checkout with two narrow layers, and with the weights of `write_weights`."""
    config: dict[str, Any] = yaml.safe_load((sat / "configs" / f"{name}.yaml").read_text())
    tree = config["model"]
    network = tree["network_config"]["params"]
    network.update(
        num_layers=2, hidden_size=HIDDEN, num_attention_heads=HEADS, time_embed_dim=EMBEDDING, num_frames=FRAMES,
        latent_height=SIZE[0] // 8, latent_width=SIZE[1] // 8,
    )  # fmt: skip
    if "ofs_embed_dim" in network:
        network["ofs_embed_dim"] = EMBEDDING
    modules = network["modules"]
    modules["pos_embed_config"]["params"]["text_length"] = TEXT_LENGTH
    if "hidden_size_head" in modules["pos_embed_config"]["params"]:
        modules["pos_embed_config"]["params"]["hidden_size_head"] = HIDDEN // HEADS
    modules["patch_embed_config"]["params"]["text_hidden_size"] = TEXT_HIDDEN
    if "lora_config" in modules:
        modules["lora_config"]["params"]["r"] = LORA_RANK
    for embedder in tree["conditioner_config"]["params"]["emb_models"]:
        embedder["params"].update(model_dir=str(weights / "t5"), max_length=TEXT_LENGTH)
    first_stage = tree["first_stage_config"]["params"]
    first_stage["ckpt_path"] = str(weights / "vae.pt")
    for part in ("encoder_config", "decoder_config"):
        first_stage[part]["params"].update(AUTOENCODER)
    tree["sampler_config"]["params"]["num_steps"] = 2
    tree["sampler_config"]["params"]["guider_config"]["params"]["num_steps"] = 2
    return config


def settings(sat: Path) -> dict[str, Any]:
    """`configs/sft.yaml` of the checkout for a few steps on a CPU, without paths."""
    config: dict[str, Any] = yaml.safe_load((sat / "configs" / "sft.yaml").read_text())
    del config["args"]["load"]
    config["args"].update(
        num_workers=0, log_interval=1, train_data=[], valid_data=None, save=None, train_iters=4,
        eval_interval=None, save_interval=1000,
    )  # fmt: skip
    config["data"]["params"].update(video_size=list(SIZE), max_num_frames=FRAMES)
    deepspeed = config["deepspeed"]
    deepspeed.update(steps_per_print=1000000, train_micro_batch_size_per_gpu=1)
    deepspeed["zero_optimization"].update(reduce_bucket_size=1000000, allgather_bucket_size=1000000)
    # FusedEmaAdam is compiled for a GPU, and DeepSpeed's own Adam for this CPU: seconds that no test needs
    deepspeed["optimizer"]["type"] = "AdamW"
    deepspeed["optimizer"]["params"].update(lr=1e-3, eps=1e-8, weight_decay=1e-4, torch_adam=True)
    return config


def write_weights(sat: Path, folder: Path) -> None:
    """`t5/`, `vae.pt`, and for every model without LoRA `<name>/transformer/` as CogVideo's weights are laid out.

    The last two need the checkout's modules, and so a process of its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_t5(folder / "t5")
    code = f"import sys; sys.path.append({str(HERE)!r}); import tiny; tiny._build(*sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, str(sat), str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def write_t5(folder: Path) -> None:
    """A text encoder of two layers, and a tokenizer that knows the letters."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    T5Tokenizer(vocab=vocabulary, extra_ids=0).save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(vocabulary), d_model=TEXT_HIDDEN, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    T5EncoderModel(config).save_pretrained(folder)


def _build(sat: str, folder: str) -> None:
    import on_cpu

    path = on_cpu.prepare(sat)
    import torch.distributed as dist
    from diffusion_video import SATVideoDiffusionEngine
    from omegaconf import OmegaConf
    from sat import mpu
    from sgm.util import instantiate_from_config

    first_stage = model(path, model_names(path)[0], Path(folder))["model"]["first_stage_config"]
    first_stage["params"]["ckpt_path"] = None
    torch.manual_seed(0)
    torch.save({"state_dict": instantiate_from_config(first_stage).state_dict()}, Path(folder) / "vae.pt")

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mpu.initialize_model_parallel(1)
    for name in [n for n in model_names(path) if "lora" not in n]:
        config = OmegaConf.create(model(path, name, Path(folder))["model"])
        torch.manual_seed(0)
        engine = SATVideoDiffusionEngine(
            Namespace(model_config=config, fp16=False, bf16=True, device="cpu"), params_dtype=torch.bfloat16
        )
        weights = {k: v for k, v in engine.bfloat16().state_dict().items() if k.startswith("model.")}
        file = Path(folder, name, "transformer", "1", "mp_rank_00_model_states.pt")
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"module": weights}, file)
        (file.parent.parent / "latest").write_text("1")


def write_yaml(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


if __name__ == "__main__":
    write_all(Path(os.environ["COGVIDEO_SAT"]), Path(sys.argv[1]))
