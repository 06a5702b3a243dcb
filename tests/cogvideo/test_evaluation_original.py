"""Evaluations of CogVideo's own engine: a function of the samples and the weights, with nothing dropped."""

from __future__ import annotations

import sys
import tempfile
from argparse import Namespace
from functools import lru_cache
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))

import in_checkout
import tiny
import torch
from omegaconf import OmegaConf


@lru_cache(maxsize=2)
def engine_of(sat: Path, name: str) -> Any:
    """The engine of a configuration with the joint loss, its dropouts high, and random weights."""
    import torch.distributed as dist
    from diffusion_video import SATVideoDiffusionEngine
    from sat import mpu
    from sgm.util import initialize_context_parallel

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        mpu.initialize_model_parallel(1)
        initialize_context_parallel(1)
    folder = Path(tempfile.mkdtemp())
    tiny.write_t5(folder / "t5")
    config = tiny.model(sat, name, folder)["model"]
    config["latent_input"] = False
    config["first_stage_config"]["params"]["ckpt_path"] = None
    config["loss_fn_config"]["target"] = "sat_ext.cogvideo.JointDiffusionLoss"
    for embedder in config["conditioner_config"]["params"]["emb_models"]:
        embedder["ucg_rate"] = 0.9
    if config.get("noised_image_input"):
        config["noised_image_dropout"] = 0.9
        config["loss_fn_config"]["params"]["condition_dropout"] = 0.9
    torch.manual_seed(0)
    args = Namespace(model_config=OmegaConf.create(config), fp16=False, bf16=False, device="cpu")
    engine = SATVideoDiffusionEngine(args, params_dtype=torch.float32)
    for parameter in engine.model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return engine.eval()


def names_of(sat: Path) -> dict[str, str]:
    """A text-to-video and an image-to-video configuration of the checkout."""
    names = [n for n in tiny.model_names(sat) if "lora" not in n]
    return {"i2v": next(n for n in names if "i2v" in n), "t2v": next(n for n in names if "i2v" not in n)}


def batch_of(samples: list[int], frames: int) -> dict[str, Any]:
    """A batch as our data class makes it; sample i always has the same pixels, key and caption."""
    kind = "image" if frames == 1 else "video"
    pixels = [torch.randn(frames, 3, *tiny.SIZE, generator=torch.Generator().manual_seed(i)) for i in samples]
    return {
        "mp4": torch.stack(pixels).clamp(-1, 1), "txt": [f"a caption {i}" for i in samples],
        "num_frames": torch.full((len(samples),), frames), "fps": torch.full((len(samples),), 8),
        "kind": [kind] * len(samples), "source": ["held"] * len(samples), "key": [str(i) for i in samples],
    }  # fmt: skip


def evaluated(engine: Any, batches: list[dict[str, Any]], seed: int) -> tuple[float, dict[str, float]]:
    from sat_ext.sat.fixes.evaluation import of_all_samples

    torch.manual_seed(seed)
    args = Namespace(deepspeed=True, deepspeed_activation_checkpointing=False)
    hooks = {"forward_step_eval": lambda data, *_: engine.shared_step(next(data)), "handle_metrics": None}
    loss, metrics = of_all_samples(len, iter(batches), engine, len(batches), args, None, "val", hooks=hooks)
    engine.eval()
    assert metrics is not None
    return loss, {name: value.item() for name, value in metrics.items()}


def check_an_evaluation_is_a_function_of_its_samples(sat: Path) -> None:
    for kind, name in names_of(sat).items():
        engine = engine_of(sat, name)
        loss, metrics = evaluated(engine, [batch_of([1, 2], 9), batch_of([3, 4, 5], 1)], seed=0)
        single = [batch_of([i], 1) for i in (5, 3, 4)] + [batch_of([i], 9) for i in (2, 1)]
        again, by_kind = evaluated(engine, single, seed=1)
        assert abs(loss / again - 1) < 1e-5, (kind, loss, again)
        assert {"loss_image", "loss_video"} <= set(metrics)
        for metric in ("loss_image", "loss_video"):
            assert abs(metrics[metric] / by_kind[metric] - 1) < 1e-5, (kind, metrics, by_kind)
        mean = (3 * metrics["loss_image"] + 2 * metrics["loss_video"]) / 5
        assert abs(loss / mean - 1) < 1e-5, (kind, loss, mean)


def check_nothing_is_dropped_and_the_settings_come_back(sat: Path) -> None:
    for kind, name in names_of(sat).items():
        engine = engine_of(sat, name)
        sampler = engine.loss_fn.sigma_sampler
        batches = [batch_of([i], 9) for i in range(6)]
        before = evaluated(engine, batches, seed=0)
        assert "shared_step" not in vars(engine)
        rates = [embedder.ucg_rate for embedder in engine.conditioner.embedders]
        assert rates == [0.9] * len(rates)
        drops = engine.noised_image_dropout
        assert drops == (0.9 if kind == "i2v" else 0.0)
        try:
            for embedder in engine.conditioner.embedders:
                embedder.ucg_rate = 0.0
            engine.noised_image_dropout = 0.0
            # on several ranks each draws timesteps from its own part of the range: here, from a part of one
            sampler.uniform_sampling, sampler.group_width, sampler.sigma_interval = True, 1, 1
            assert evaluated(engine, batches, seed=1) == before
        finally:
            for embedder, rate in zip(engine.conditioner.embedders, rates):
                embedder.ucg_rate = rate
            engine.noised_image_dropout, sampler.uniform_sampling = drops, False
        # the check can tell: captions matter to this network
        others = [{**batch, "txt": ["another one"]} for batch in batches]
        assert evaluated(engine, others, seed=0)[0] != before[0]


test_original = in_checkout.test_of(__file__)
if __name__ == "__main__":
    in_checkout.main(globals())
