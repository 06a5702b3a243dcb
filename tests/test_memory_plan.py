"""The planner's parts: that they add up, and that each lever moves the part that it is for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sat_ext.config import read_yaml
from sat_ext.errors import ConfigError
from sat_ext.memory.advice import with_zero
from sat_ext.memory.counts import Parameter, bytes_of, count
from sat_ext.memory.measured import encoding
from sat_ext.memory.plan import Plan, checkpoint_memory, make_plan, power_of_two, rounding
from sat_ext.memory.run import Run, run_from, with_model
from sat_ext.models.config import GradientCheckpointing
from sat_ext.models.quantize import CODES, QuantizedLinear
from sat_ext.models.text_offload import REMEMBERED
from sat_ext.recipe import recipe_of
from sat_ext.types import Bucket

CONFIGS = Path(__file__).parent.parent / "configs"


def run_of(model: str = "cogvideox-5b-i2v", train: str = "lora", **zero: Any) -> Run:
    names = (f"model/{model}", f"train/{train}", "data/joint", "zero/zero2")
    config = read_yaml([str(CONFIGS / f"{name}.yaml") for name in names])
    config["deepspeed"]["zero_optimization"] = {"stage": 2, **zero}
    return run_from(recipe_of(config))


@pytest.mark.parametrize(
    ("model", "millions"),
    [("cogvideox-2b", 1694), ("cogvideox-5b-i2v", 5625), ("cogvideox-1.5-5b", 5571)],
)
def test_parameters_of_the_published_models(model: str, millions: int) -> None:
    counts = count(run_of(model, "full"))
    assert round(sum(map(sum, counts.groups)) / 1e6) == millions
    assert round(sum(p.numel for p in counts.text) / 1e6) == 4762  # the encoder of T5 v1.1 XXL
    assert round(sum(p.numel for p in counts.first_stage) / 1e6) == 216


def test_a_lora_trains_two_matrices_a_layer() -> None:
    (trained,) = count(run_of()).groups
    assert sum(trained) == 42 * 4 * 2 * 3072 * 128


def of_targets(targets: Any, **changes: Any) -> Run:
    run = run_of()
    return with_model(run, train=replace(run.model.train, target_modules=targets, **changes))


def test_a_dora_of_all_linear_layers_also_trains_a_norm_a_row() -> None:
    (trained,) = count(of_targets("all-linear", dora=True)).groups
    ins, outs = [3072] * 5 + [12288] + [512] * 2, [3072] * 4 + [12288, 3072] + [18432] * 2
    assert sum(trained) == 42 * (128 * sum(ins + outs) + sum(outs))


def test_more_adapters_take_more_memory_and_a_dora_the_most() -> None:
    lora, every, dora, nf4 = (
        make_plan(run)
        for run in (
            run_of(), of_targets("all-linear"), of_targets("all-linear", dora=True),
            of_targets("all-linear", dora=True, quantization="nf4"),
        )
    )  # fmt: skip
    for part in ("weights", "gradients", "optimizer", "activations"):
        assert lora.per_gpu[part] < every.per_gpu[part] < dora.per_gpu[part], part
    assert nf4.per_gpu["weights"] < dora.per_gpu["weights"]


@pytest.mark.parametrize("targets", [("proj_out",), ("patch_embed.proj",), ("transformer_blocks",)])
def test_adapters_outside_of_the_blocks_are_planned_and_unknown_ones_refused(targets: tuple[str, ...]) -> None:
    if targets == ("transformer_blocks",):
        with pytest.raises(ConfigError, match="no layer of the transformer is called 'transformer_blocks'"):
            make_plan(of_targets(targets))
        return
    assert make_plan(of_targets(targets)).gpu < make_plan(run_of()).gpu


def test_a_dora_is_not_planned_for_zero3() -> None:
    assert with_zero(of_targets("attention", dora=True), "zero3") is None
    assert with_zero(of_targets("attention", rslora=True), "zero3") is not None


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("gpus", [1, 8])
def test_parts_add_up_to_the_peak(train: str, stage: int, gpus: int) -> None:
    plan = make_plan(run_of(train=train, stage=stage), gpus=gpus)
    assert plan.gpu - plan.per_gpu["overhead"] == max(b.peak for b in plan.buckets)
    assert all(value >= 0 for value in (*plan.per_gpu.values(), *plan.per_host.values()))


def test_weights_and_states_are_split_over_gpus() -> None:
    one, eight = (make_plan(run_of(train="full", stage=3), gpus=n) for n in (1, 8))
    assert eight.per_gpu["gradients"] == pytest.approx(one.per_gpu["gradients"] / 8, rel=1e-3)
    assert eight.per_gpu["text_encoder"] == pytest.approx(one.per_gpu["text_encoder"] / 8, rel=1e-3)
    assert eight.per_gpu["weights"] == pytest.approx(one.per_gpu["weights"] / 8, rel=1e-3)


def test_an_offloaded_optimizer_is_on_the_host() -> None:
    plan = make_plan(run_of(train="full", offload_optimizer={"device": "cpu"}), gpus=2, per_node=2)
    numbers = 5_570_479_680 + 17_776 * 3072  # with the learned positions
    assert plan.per_gpu["optimizer"] == plan.per_gpu["gradients"] == 0
    # fp32 weights, two moments, and the weights on their way back, in two halves
    assert plan.per_host["optimizer"] == pytest.approx((4 + 8 + 2) * numbers, rel=1e-6)


def difference(lever: Run, run: Run) -> tuple[dict[str, int], dict[str, int]]:
    """What a lever saves, by part: of a GPU and of the host."""
    before, after = make_plan(run), make_plan(lever)

    def parts(a: Any, b: Any) -> dict[str, int]:
        return {n: a[n] - b[n] for n in a if a[n] != b[n] and n not in ("overhead", "loading", "pinned")}

    return parts(before.per_gpu, after.per_gpu), parts(before.per_host, after.per_host)


def one_clip(run: Run) -> Run:
    return replace(run, steps={(clip := Bucket(frames=49, height=480, width=720)): {clip: 1}})


def test_a_cache_takes_first_stage_and_text_encoder_away() -> None:
    plan = make_plan(replace(run_of(), cached=True, cached_text=True))
    assert plan.per_gpu["first_stage"] == plan.per_gpu["text_encoder"] == 0
    assert run_from(recipe_of({**_config(), "data": _data(cache={"folder": "cache"})})).cached


@pytest.mark.parametrize(("fast", "item"), [(True, 2), (False, 4)])
def test_text_on_the_cpu_moves_to_the_host(fast: bool, item: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 where the CPU does not compute in bf16."""
    monkeypatch.setattr("sat_ext.memory.counts.computes_in_bf16", lambda: fast)
    run = one_clip(run_of())
    gpu, host = difference(with_model(run, text=replace(run.model.text, device="cpu")), run)
    assert gpu["text_encoder"] == 4_762_310_656 * 2
    assert -host["text_encoder"] == 4_762_310_656 * item + REMEMBERED


def test_offloaded_inputs_take_whole_powers_of_two() -> None:
    """4.6 GB of inputs of 42 blocks: PyTorch's allocator of page-locked memory rounds each up."""
    run = one_clip(with_model(run_of(), gradient_checkpointing=GradientCheckpointing(offload=True)))
    allocations = {power_of_two(tokens * 3072 * 2): 42 for tokens in (17_550, 226)}
    assert sum(size * count for size, count in allocations.items()) == pytest.approx(5.7e9, rel=0.01)
    assert make_plan(run).per_host["checkpoints"] == sum(checkpoint_memory(run)) == sum(
        size * count for size, count in allocations.items()
    )  # fmt: skip
    shorter = {b: {b: 1} for b in (Bucket(frames=n, height=480, width=720) for n in (1, 17, 49))}
    kept = sum(checkpoint_memory(replace(run, steps=shorter)))
    assert kept == sum(checkpoint_memory(run)) + 42 * (2**23 + 2**26)  # of the other buckets, never given back


def test_swapped_blocks_wait_on_the_host_and_two_are_fetched() -> None:
    run = one_clip(run_of())
    gpu, host = difference(with_model(run, block_swap=20), run)
    block = 132_197_632 * 2
    assert gpu["weights"] == 18 * block
    assert host["block_swap"] == -20 * block


def test_quantized_weights_of_blocks() -> None:
    run = one_clip(run_of())
    sizes = {}
    for kind in ("none", "fp8", "nf4"):
        plan = make_plan(with_model(run, train=replace(run.model.train, quantization=kind)))
        sizes[kind] = plan.per_gpu["weights"]
    matrices = [p for p in count(run).network if p.matrix and p.block is not None]
    every, modulation = sum(p.numel for p in matrices), sum(p.numel for p in matrices if p.modulation)
    assert every / 5.57e9 > 0.99 and modulation / every == pytest.approx(1 / 7, rel=0.01)
    saved = (2 - 0.5 - 2 / 64) * (every - modulation) + modulation  # modulation is in FP8
    assert sizes["none"] - sizes["nf4"] == pytest.approx(saved, rel=1e-3)
    assert sizes["none"] - sizes["fp8"] == pytest.approx(every, rel=1e-2)


@pytest.mark.parametrize("kind", ["nf4", "fp8"])
def test_a_quantized_layer_takes_what_is_predicted(kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    layer = torch.nn.Linear(3072, 512, bias=False, dtype=torch.bfloat16)
    made = QuantizedLinear(layer, CODES[kind], in_state_dict=False)
    parameter = Parameter(numel=layer.weight.numel(), block=0, matrix=True, rows=512)
    run = run_of()
    run = with_model(run, train=replace(run.model.train, quantization=kind))
    assert made.weight.nbytes + made.scales.nbytes == bytes_of([parameter], run)


def test_slicing_matters_to_batches_of_stills() -> None:
    stills = Bucket(frames=1, height=480, width=720)
    sliced = run_of()
    run = with_model(sliced, first_stage=replace(sliced.model.first_stage, slicing=False))
    assert run.steps[stills] == {stills: 12}
    with pytest.raises(ConfigError, match="cannot encode 12 samples of 1x480x720 at once; set slicing: true"):
        make_plan(run)
    four = [encoding(replace(r, steps={stills: {stills: 4}}), stills) for r in (sliced, run)]
    assert four[1] > 3.5 * four[0]


def test_an_eight_bit_optimizer_keeps_two_bytes() -> None:
    run = run_of(train="full")
    eight = replace(run, deepspeed={**run.deepspeed, "optimizer": {"type": "bitsandbytes.optim.AdamW8bit"}})
    gpu, _ = difference(eight, run)
    assert gpu["optimizer"] == pytest.approx((8 - 2 * (1 + 4 / 256)) * 5.57e9, rel=0.01)


def test_page_locked_memory_is_rounded_up() -> None:
    assert rounding([2**30, 2**30 + 1]) == 2**30 - 1


# --- CogVideo's own YAML ---


def _config(**model: Any) -> dict[str, Any]:
    """CogVideo's 5B-I2V with LoRA, what memory follows from (sat/configs of tag v1.0)."""
    network = {
        "time_embed_dim": 512, "num_frames": 49, "latent_width": 90, "latent_height": 60, "num_layers": 42,
        "patch_size": 2, "in_channels": 32, "out_channels": 16, "hidden_size": 3072, "num_attention_heads": 48,
        "transformer_args": {"checkpoint_activations": True},
        "modules": {
            "pos_embed_config": {
                "target": "dit_video_concat.Rotary3DPositionEmbeddingMixin",
                "params": {"learnable_pos_embed": True, "hidden_size_head": 64, "text_length": 226},
            },
            "lora_config": {"target": "sat.model.finetune.lora2.LoraMixin", "params": {"r": 256}},
            "patch_embed_config": {"params": {"text_hidden_size": 4096}},
        },
    }  # fmt: skip
    section = {"noised_image_input": True, "network_config": {"params": network}, **model}
    deepspeed = {"train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
    return {"model": section, "data": _data("data_video.SFTDataset"), "deepspeed": deepspeed}


def _data(target: str = "sat_ext.JointImageVideoDataset", **more: Any) -> dict[str, Any]:
    return {"target": target, "params": {"video_size": [480, 720], "fps": 8, "max_num_frames": 49, **more}}


def _plan(config: dict[str, Any]) -> Plan:
    return make_plan(run_from(recipe_of(config)))


def test_cogvideos_yaml_is_read_as_ours() -> None:
    run = run_from(recipe_of(_config()))
    clip = Bucket(frames=49, height=480, width=720)
    assert run.steps == {clip: {clip: 2}}  # its data class pads all to the longest
    ours = run_of()
    ours = with_model(ours, train=replace(ours.model.train, rank=256))
    assert count(run).groups == count(ours).groups
    assert run.model.checkpointing and run.lora and run.model.conditioning == "i2v"


def test_our_targets_for_cogvideo_take_less() -> None:
    original = _plan(_config())
    chunked = _plan(_config(first_stage_config={"target": "sat_ext.cogvideo.ChunkedFirstStage"}))
    assert original.per_gpu["first_stage"] > 3 * chunked.per_gpu["first_stage"]
    embedder = {
        "input_key": "txt",
        "target": "sat_ext.cogvideo.OffloadedTextEmbedder",
        "params": {"device": "cpu"},
    }
    offloaded = _plan(_config(conditioner_config={"params": {"emb_models": [embedder]}}))
    assert offloaded.per_gpu["text_encoder"] == 0 < original.per_gpu["text_encoder"]


def test_the_error_says_what_is_missing() -> None:
    with pytest.raises(ConfigError, match="no 'data' section; add a file of configs/data/"):
        run_from(recipe_of({"model": {"pretrained": "x"}}))
    with pytest.raises(ConfigError, match="deepspeed.zero_optimization.stage: 4 is not one of 0, 1, 2, 3"):
        make_plan(run_of(stage=4))
