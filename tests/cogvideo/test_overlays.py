"""The YAMLs of configs/cogvideo/, appended to CogVideo's own: they change what they say, and no more."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from sat_ext.cogvideo.check import check_model
from sat_ext.config import load, read_yaml
from sat_ext.data.params import DataConfig
from sat_ext.engines import engine_of
from sat_ext.errors import ConfigError
from sat_ext.recipe import doubts_of
from sat_ext.sat.section import DEEPSPEED_KEYS
from sat_ext.sat.settings import settings_of

FOLDER = Path(__file__).parents[2] / "configs" / "cogvideo"
OVERLAYS = sorted(p.stem for p in FOLDER.glob("*.yaml"))
CONFIGS = [Path(p) / "configs" for p in os.environ.get("COGVIDEO_SAT", "").split(":") if p]
# what a checkout's own code can build: main lists 1.0 models too, whose patch_size its network cannot read
MODELS = [
    pytest.param(path, id=f"{path.parents[2].name}-{path.stem}")
    for folder in CONFIGS
    for path in sorted(folder.glob("cogvideox*.yaml"))
    if "1.5" in path.name or not list(folder.glob("cogvideox1.5*"))
]
needs_checkout = pytest.mark.skipif(not CONFIGS, reason="COGVIDEO_SAT is not set")

# Values of CogVideo's that the overlays replace, by file. Everything else that CogVideo's YAMLs say stays.
REPLACED = {
    "joint": {
        "data.target", "model.loss_fn_config.target", "model.first_stage_config.target",
        "model.loss_fn_config.params.sigma_sampler_config.target", "deepspeed.optimizer.type",
    },
    "i2v": {"model.noised_image_dropout"},
    "1.5": {
        "model.latent_input", "model.sampler_config.target", "data.params.video_size", "data.params.fps",
        "data.params.max_num_frames",
    },
    "lora": {"model.not_trainable_prefixes", "deepspeed.optimizer.params.lr"},
    "lora-rate": {"deepspeed.optimizer.params.lr"},
    "sizes-2b": {
        "model.network_config.params.modules.pos_embed_config.target",
        "model.network_config.params.modules.final_layer_config.target",
    },
    "sizes-5b": {
        "model.network_config.params.modules.pos_embed_config.target",
        "model.network_config.params.modules.final_layer_config.target",
    },
    "cached": {
        "args.eval_interval", "args.valid_data", "model.noised_image_input", "model.first_stage_config.target",
        "model.conditioner_config.params.emb_models.0.target",
        "model.conditioner_config.params.emb_models.0.params.model_dir",
    },
    "offload-text": {
        "model.conditioner_config.params.emb_models.0.target",
        "model.conditioner_config.params.emb_models.0.params.model_dir",
    },
}  # fmt: skip


def path_of(overlay: str) -> str:
    return str(FOLDER / f"{overlay}.yaml")


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value and where it stands. A list of plain values is one."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if _is_tree_list(tree) else None
    if items is None:
        yield path, tree
        return
    for key, value in items:
        yield from leaves(value, f"{path}.{key}" if path else str(key))


def _is_tree_list(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(v, dict) for v in value)


def targets(tree: Any) -> list[str]:
    return [v for path, v in leaves(tree) if path.endswith("target") and str(v).startswith("sat_ext.")]


def theirs(model: Path) -> list[str]:
    """CogVideo's own files for a model."""
    return [str(model), str(model.with_name("sft.yaml"))]


def is_new(model: Path) -> bool:
    return "1.5" in model.name


def fitting(model: Path) -> list[str]:
    """The overlays that go with a model, all at once."""
    own = ["1.5"] if is_new(model) else ["sizes-2b" if "2b" in model.name else "sizes-5b"]
    lora = "lora-rate" if "lora" in model.name else "lora"
    return ["joint", *own, *(["i2v"] if "i2v" in model.name else []), lora]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_targets_exist(overlay: str) -> None:
    tree = OmegaConf.to_container(OmegaConf.load(path_of(overlay)))
    for target in targets(tree):
        module, _, name = target.rpartition(".")
        assert getattr(import_module(module), name)


def test_every_overlay_says_what_it_replaces() -> None:
    assert set(OVERLAYS) == set(REPLACED)
    for overlay in OVERLAYS:
        assert Path(path_of(overlay)).read_text().startswith("# ")


def test_what_they_set_beside_sats_own_is_known() -> None:
    tree = read_yaml([path_of("joint")])
    settings = settings_of(Namespace(base=[path_of("joint")]))
    assert (settings.checkpoint, settings.keep_last) == ("full", 3)
    assert set(tree["deepspeed"]) <= set(DEEPSPEED_KEYS)
    for overlay in OVERLAYS:
        params = OmegaConf.select(OmegaConf.load(path_of(overlay)), "data.params", default=OmegaConf.create())
        load(DataConfig, {str(k): v for k, v in params.items()}, "data.params")


def test_the_package_names_what_it_has() -> None:
    package = import_module("sat_ext.cogvideo")
    for name in package.__all__:
        assert getattr(package, name).__name__ == name
    with pytest.raises(AttributeError, match="'sat_ext.cogvideo' has no attribute 'JointLoss'; it has JointDiff"):
        _ = package.JointLoss


@needs_checkout
@pytest.mark.parametrize("model", MODELS)
def test_all_that_cogvideo_says_stays_but_what_the_overlays_are_for(model: Path) -> None:
    before = dict(leaves(read_yaml(theirs(model))))
    for chosen in [[o] for o in fitting(model)] + [fitting(model), ["offload-text"], ["cached"]]:
        after = dict(leaves(read_yaml([*theirs(model), *map(path_of, chosen)])))
        changed = {path for path, value in before.items() if after.get(path) != value}
        assert changed <= set().union(*(REPLACED[o] for o in chosen)), chosen


@needs_checkout
@pytest.mark.parametrize("model", MODELS)
def test_the_merged_files_pass_the_checks(model: Path) -> None:
    merged = read_yaml([*theirs(model), *map(path_of, [*fitting(model), "offload-text"])])
    buckets = load(DataConfig, merged["data"]["params"], "data.params").make_buckets()
    assert {b.frames for b in buckets} == {1, *range(9, 82 if is_new(model) else 50, 8)}
    check_model(merged["model"], buckets)
    text = merged["model"]["conditioner_config"]["params"]["emb_models"][0]["params"]["max_length"]
    assert text == (224 if is_new(model) else 226)


@needs_checkout
@pytest.mark.parametrize("model", MODELS)
def test_a_lora_of_every_generation_trains_at_cogvideos_own_rate_for_it(model: Path) -> None:
    merged = read_yaml([*theirs(model), *map(path_of, fitting(model))])
    assert 5e-4 <= merged["deepspeed"]["optimizer"]["params"]["lr"] <= 1e-3
    assert "Between 1E-3 and 5E-4 For Lora and 1E-5 For SFT" in model.with_name("sft.yaml").read_text()
    if "2b" in model.name:
        assert doubts_of(engine_of(merged["model"]), merged["deepspeed"], {}, 4)[0].endswith(
            "append configs/train/fp16.yaml."
        )
        fp16 = str(FOLDER.parent / "train" / "fp16.yaml")
        merged = read_yaml([*theirs(model), *map(path_of, fitting(model)), fp16])
        assert not merged["deepspeed"]["bf16"]["enabled"] and merged["deepspeed"]["fp16"]["enabled"]
    assert doubts_of(engine_of(merged["model"]), merged["deepspeed"], {}, 4) == []
    assert engine_of(merged["model"]).lora_scale is not None
    without = read_yaml([*theirs(model), *map(path_of, fitting(model)[:-1])])
    found = doubts_of(engine_of(without["model"]), without["deepspeed"], {}, 4)
    if "lora" not in model.name:
        assert not any("a LoRA" in sentence for sentence in found)
        with pytest.raises(ConfigError, match="'all' leaves only LoRA to train, and the network has none"):
            check_model(
                read_yaml([*theirs(model), *map(path_of, [*fitting(model)[:-1], "lora-rate"])])["model"], []
            )
        return
    scale = 256 if "i2v" in model.name else 128
    assert found[0].startswith("deepspeed.optimizer.params.lr: 1e-05 is a rate for tuning every weight; a LoRA")
    assert f"scaled by 1/{scale} hardly learns at it" in found[0]


def test_a_rate_is_doubted_for_the_built_in_lora_too_and_never_for_full_tuning() -> None:
    def found(lr: float | None, **train: Any) -> list[str]:
        optimizer = {} if lr is None else {"params": {"lr": lr}}
        return doubts_of(engine_of({"train": train}), {"optimizer": optimizer}, {"lr": 1e-7}, 4)

    assert found(1e-4, mode="lora") == found(1e-5, mode="full") == found(None) == []
    assert "a LoRA scaled by 64/128 hardly learns" in found(1e-6, mode="lora")[0]
    assert "a LoRA scaled by 1/128 hardly learns" in found(1e-4, mode="lora", alpha=1)[0]
    assert "lr: 1e-07 is a rate" in found(None, mode="lora")[0]


@needs_checkout
@pytest.mark.parametrize("model", MODELS)
def test_updates_of_one_kind_are_doubted_where_cogvideos_own_file_clips(model: Path) -> None:
    merged = read_yaml([*theirs(model), *map(path_of, fitting(model))])
    engine, deepspeed = engine_of(merged["model"]), merged["deepspeed"]
    assert deepspeed["gradient_clipping"] == 0.1
    found = doubts_of(engine, deepspeed, {}, accumulation=1)[-1]
    assert found.startswith(
        "deepspeed.gradient_accumulation_steps: 1, so each update has one source and one bucket"
    )
    assert "clipped at 0.1" in found and "set it to 4 or more" in found
    for mixed in (
        doubts_of(engine, deepspeed, {}, 4),
        doubts_of(engine, {**deepspeed, "gradient_clipping": 0}, {}, 1),
    ):
        assert not any("accumulation" in sentence for sentence in mixed)


@needs_checkout
@pytest.mark.parametrize("model", [p for p in MODELS if "1.5_5b_i2v" in p.id])
def test_a_condition_that_no_sampler_uses_is_doubted(model: Path) -> None:
    merged = read_yaml([*theirs(model), *map(path_of, ["joint", "1.5", "i2v"])])
    params = merged["model"]["loss_fn_config"]["params"]
    assert params["condition_scale"] == merged["model"]["sampler_config"]["params"]["condition_scale"] == 1.0
    assert doubts_of(engine_of(merged["model"]), merged["deepspeed"], {}, 4) == []
    del params["condition_scale"]
    assert (
        "the condition trains at scale_factor (0.7), which no"
        in doubts_of(engine_of(merged["model"]), {}, {}, 4)[0]
    )


@needs_checkout
@pytest.mark.parametrize("model", MODELS)
def test_overlays_of_another_model_are_refused(model: Path) -> None:
    if is_new(model):
        own, wrong = ["joint", "1.5"], ["sizes-5b", "sizes-2b"]
    else:
        own, wrong = ["joint"], ["1.5", "sizes-5b" if "2b" in model.name else "sizes-2b"]
    wrong += [] if "i2v" in model.name else ["i2v"]
    for overlay in wrong:
        merged = read_yaml([*theirs(model), *map(path_of, [*own, overlay])])
        buckets = load(DataConfig, merged["data"]["params"], "data.params").make_buckets()
        with pytest.raises(ConfigError, match=r"leave|append configs/cogvideo/sizes-"):
            check_model(merged["model"], buckets)


@needs_checkout
def test_mains_own_1_0_files_still_say_a_patch_size_that_it_cannot_read() -> None:
    """What `check_run` refuses: should CogVideo mend it, this shows."""
    for folder in CONFIGS:
        if list(folder.glob("cogvideox1.5*")):
            network = read_yaml([str(folder / "cogvideox_5b.yaml")])["model"]["network_config"]["params"]
            assert network["patch_size"] == 2
            assert "patch_size[1:]" in (folder.parent / "dit_video_concat.py").read_text()
