"""The levers on memory, as lines of YAML to write and as changes to a run."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from sat_ext.memory.run import Run, with_model
from sat_ext.models.config import GradientCheckpointing

Pull = Callable[[Run], Run]
CHUNKS = "configs/cogvideo/joint.yaml (ChunkedFirstStage)"
TEXT = "configs/cogvideo/offload-text.yaml"


@dataclass(frozen=True, kw_only=True)
class Lever:
    """A lever as YAML, and the run with it."""

    yaml: str
    pull: Pull


def levers(run: Run) -> list[Lever]:
    """Those that apply to `run` and change it, from the one that costs least time."""
    model, recompute = run.model, run.model.checkpointing
    encodes = not run.cached and model.first_stage.kind == "autoencoder"
    recompute_all = partial(with_model, gradient_checkpointing=GradientCheckpointing())
    some_kept = recompute is None or recompute.every > 1
    text = partial(_change, section="text", device="cpu", quantization="none")
    if run.is_cogvideo:
        checkpoints = "model.network_config.params.transformer_args.checkpoint_activations: true"
        known: list[tuple[str, bool, Pull]] = [
            (CHUNKS, run.whole_clips and not run.cached, _chunks),
            (checkpoints, some_kept, recompute_all),
            ("configs/cogvideo/cached.yaml, with what sat-ext cache made", not run.cached, _from_cache),
            (TEXT, not run.cached_text, text),
        ]
    else:
        not_offloaded = recompute is None or not recompute.offload
        offload = partial(with_model, gradient_checkpointing=GradientCheckpointing(offload=True))
        optimizer = {"type": "bitsandbytes.optim.AdamW8bit"}
        eight_bit = partial(replace, deepspeed={**run.deepspeed, "optimizer": optimizer})
        four_bit = partial(_change, section="train", quantization="nf4")
        in_lora, as_loaded = run.lora, run.lora and model.train.quantization == "none"
        blocks = model.transformer.num_layers
        known = [
            ("model.first_stage.slicing: true", encodes, _first_stage(slicing=True)),
            ("model.sampling.number: 0", True, partial(_change, section="sampling", number=0)),
            ("model.first_stage.tiling: true", encodes, _first_stage(tiling=True)),
            ("model.gradient_checkpointing: true", some_kept, recompute_all),
            ("model.first_stage.frames: 4", encodes, _first_stage(frames=4)),
            ("data.params.cache: {folder: ...}  # made once, by sat-ext cache", not run.cached, _from_cache),
            ("model.text.device: cpu  # seconds a caption; a cache costs none", not run.cached_text, text),
            (f"deepspeed.optimizer.type: {optimizer['type']}", not run.has_eight_bit_optimizer, eight_bit),
            ("model.gradient_checkpointing: {offload: true}", not_offloaded, offload),
            ("model.train.quantization: nf4", as_loaded, four_bit),
        ]
        for swapped in sorted({blocks // 4, blocks // 2, 3 * blocks // 4, blocks - 2}):
            applies = in_lora and swapped > max(2, model.block_swap)
            known.append((f"model.block_swap: {swapped}", applies, partial(_swap, blocks=swapped)))
    return [Lever(yaml=yaml, pull=pull) for yaml, applies, pull in known if applies and pull(run) != run]


def cache_levers(run: Run) -> dict[str, dict[str, Pull]]:
    """Those of `sat-ext cache`, by the encoder that they are for, from the one that costs least time."""
    text_on_cpu = partial(_change, section="text", device="cpu", quantization="none")
    if run.is_cogvideo:
        frames = "configs/cogvideo/joint.yaml, model.first_stage_config.params: {frames: 4, recompute: level}"
        return {"text": {TEXT: text_on_cpu}, "first_stage": {CHUNKS: _chunks, frames: _chunks_of_four}}
    return {
        "text": {
            "model.text.quantization: nf4": partial(_change, section="text", device="gpu", quantization="nf4"),
            "model.text.device: cpu": text_on_cpu,
        },
        "first_stage": {
            "model.first_stage.frames: 4": _first_stage(frames=4),
            "model.first_stage.tiling: true": _first_stage(tiling=True),
        },
    }


def _change(run: Run, *, section: str, **values: Any) -> Run:
    return with_model(run, **{section: replace(getattr(run.model, section), **values)})


def _first_stage(**values: Any) -> Pull:
    return partial(_change, section="first_stage", **values)


def _chunks(run: Run) -> Run:
    return replace(_change(run, section="first_stage", slicing=True), whole_clips=False)


def _chunks_of_four(run: Run) -> Run:
    return replace(_change(_chunks(run), section="first_stage", frames=4), recompute="level")


def _from_cache(run: Run) -> Run:
    # without samples, as no decoder is loaded
    return replace(_change(run, section="sampling", number=0), cached=True, cached_text=True)


def _swap(run: Run, *, blocks: int) -> Run:
    # the weights of a swapped block come back for the backward pass only if the block is recomputed
    recompute = run.model.checkpointing
    if recompute is None or recompute.every > 1:
        recompute = GradientCheckpointing(offload=bool(recompute and recompute.offload))
    return with_model(run, block_swap=blocks, gradient_checkpointing=recompute)
