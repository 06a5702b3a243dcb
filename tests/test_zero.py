"""The files of configs/zero/ say what the planner compares, and no "auto" reaches DeepSpeed."""

from __future__ import annotations

import pytest

from sat_ext.errors import ConfigError
from sat_ext.memory.counts import count
from sat_ext.memory.run import read_options, run_from
from sat_ext.recipe import read_recipe
from sat_ext.zero import AUTO_SIZES, ZERO, ZERO_NAMES, fill_in_auto
from tests.zero import FOLDER, zero_section


def test_every_name_has_a_file_and_every_file_a_name() -> None:
    assert {p.stem for p in FOLDER.glob("*.yaml")} == set(ZERO_NAMES)


@pytest.mark.parametrize("name", ZERO_NAMES)
def test_a_file_says_what_the_planner_compares_and_for_whom_it_is(name: str) -> None:
    offloads = "offload" in name or "nvme" in name
    assert zero_section(name) == {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "steps_per_print": 1_000_000,
        "zero_optimization": ZERO[name],
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
        # PyTorch's kernel: DeepSpeed compiles its FusedAdam at the first start, for which a machine needs nvcc
        "optimizer": {"type": "AdamW", **({} if offloads else {"params": {"torch_adam": True, "fused": True}})},
        **({"aio": {"block_size": 1_048_576, "queue_depth": 8}} if name == "zero3-nvme" else {}),
    }
    comment = [line for line in (FOLDER / f"{name}.yaml").read_text().splitlines() if line.startswith("# ")]
    assert "for " in " ".join(comment).lower()


@pytest.mark.parametrize("name", ZERO_NAMES)
def test_auto_becomes_a_number_that_follows_from_the_hidden_size(name: str) -> None:
    section = zero_section(name)
    filled = fill_in_auto(section, 3072)
    assert "auto" not in str(filled)
    assert section == zero_section(name)  # which is left as it was
    zero = filled["zero_optimization"]
    for key, value in section["zero_optimization"].items():
        if isinstance(value, dict) and "buffer_size" in value:
            value = {**value, "buffer_size": 131_596_288}
        assert zero[key] == (AUTO_SIZES[key](3072) if value == "auto" else value)


@pytest.mark.parametrize("model", ["cogvideox-2b", "cogvideox-5b-i2v", "cogvideox-1.5-5b-i2v"])
def test_a_buffer_for_nvme_holds_the_largest_weight(model: str) -> None:
    """On one GPU a rank's part is the whole, and DeepSpeed asserts that it fits."""
    names = (f"model/{model}", "train/full", "data/joint", "zero/zero3-nvme")
    run = run_from(read_recipe([str(FOLDER.parent / f"{name}.yaml") for name in names]))
    counts, hidden = count(run), 64 * run.model.transformer.num_attention_heads
    largest = max(p.numel for p in (*counts.network, *counts.first_stage, *counts.text))
    assert largest == 131_596_288
    section = fill_in_auto(zero_section("zero3-nvme"), hidden)["zero_optimization"]
    assert section["offload_param"]["buffer_size"] >= largest
    assert read_options(run.deepspeed, hidden).offload_param.buffer_size >= largest


def test_the_sizes_are_those_of_hugging_faces_trainers() -> None:
    zero = fill_in_auto(zero_section("zero3"), 100)["zero_optimization"]
    assert zero["reduce_bucket_size"] == 10_000
    assert zero["stage3_prefetch_bucket_size"] == 9_000
    assert zero["stage3_param_persistence_threshold"] == 1_000


def test_an_auto_that_nothing_follows_from_is_named() -> None:
    with pytest.raises(ConfigError, match=r"optimizer.params.lr: 'auto' is known for reduce_bucket_size"):
        fill_in_auto({"optimizer": {"params": {"lr": "auto"}}}, 8)
    with pytest.raises(ConfigError, match=r"deepspeed.zero_optimization.sub_group_size: 'auto'"):
        fill_in_auto({"zero_optimization": {"sub_group_size": "auto"}}, 8)


def test_cogvideos_old_key_gives_way_to_its_successor() -> None:
    """DeepSpeed takes either, and CogVideo's sft.yaml has `cpu_offload: false`."""
    section = zero_section("zero2-offload")
    section["zero_optimization"]["cpu_offload"] = False
    assert "cpu_offload" not in fill_in_auto(section, 8)["zero_optimization"]
    assert fill_in_auto({"zero_optimization": {"cpu_offload": True}}, 8) == {
        "zero_optimization": {"cpu_offload": True}
    }
