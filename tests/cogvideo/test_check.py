"""What is said of a CogVideo model YAML before its weights are loaded: each in one sentence."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sat_ext.cogvideo.check import check_model, check_run
from sat_ext.cogvideox import tokens
from sat_ext.engines import engine_of
from sat_ext.errors import ConfigError
from sat_ext.types import Bucket

JOINT = {"target": "sat_ext.cogvideo.JointDiffusionLoss", "params": {}}
THEIRS = {"target": "sgm.modules.diffusionmodules.loss.VideoDiffusionLoss", "params": {}}


def bucket(frames: int, height: int = 480, width: int = 720) -> Bucket:
    return Bucket(frames=frames, height=height, width=width)


def model(generation: str = "1.0", **changes: Any) -> dict[str, Any]:
    """The keys of CogVideo's 5B YAMLs that decide what it takes."""
    new = generation == "1.5"
    network = {
        "num_frames": 81 if new else 49,
        "latent_height": 300 if new else 60,
        "latent_width": 300 if new else 90,
        "patch_size": [2, 2, 2] if new else 2,
        "hidden_size": 3072,
        "modules": {
            "pos_embed_config": {
                "target": "dit_video_concat.Rotary3DPositionEmbeddingMixin",
                "params": {"hidden_size_head": 64, "text_length": 224 if new else 226},
            },
            "final_layer_config": {"target": "dit_video_concat.FinalLayerMixin"},
        },
    }
    return {
        "network_config": {"target": "dit_video_concat.DiffusionTransformer", "params": network},
        "loss_fn_config": JOINT,
        **changes,
    }


def with_targets(made: dict[str, Any], position: str, final: str = "FinalLayer") -> dict[str, Any]:
    modules = made["network_config"]["params"]["modules"]
    modules["pos_embed_config"]["target"] = f"sat_ext.cogvideo.{position}"
    modules["final_layer_config"]["target"] = f"sat_ext.cogvideo.{final}"
    return made


@pytest.mark.parametrize(("generation", "longest"), [("1.0", 49), ("1.5", 165)])
def test_stills_and_clips_of_the_models_own_size_are_taken(generation: str, longest: int) -> None:
    check_model(model(generation), [bucket(1), bucket(17), bucket(longest)])
    i2v = model(generation, noised_image_input=True)
    i2v["loss_fn_config"] = {**JOINT, "params": {"condition_dropout": 0.05}}
    check_model(i2v, [bucket(1), bucket(longest)])


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            model(noised_image_input=True, loss_fn_config=THEIRS),
            r"buckets\.frames: CogVideo's own loss would show a still .* its target as the condition; name "
            r"sat_ext\.cogvideo\.JointDiffusionLoss in model\.loss_fn_config\.target, or leave 1 out of the list",
        ),
        (model(latent_input=True), r"model\.latent_input: true expects encoded clips.*set it to false"),
        (
            model(loss_fn_config={**JOINT, "params": {"condition_dropout": 0.1}}),
            r"condition_dropout: this model has no image condition to drop.*leave configs/cogvideo/i2v\.yaml out",
        ),
        (model("1.0", sat_ext_overlay="1.5"), r"for CogVideoX 1\.5 is appended to the YAML of a 1\.0 model"),
        (model("1.5", sat_ext_overlay="1.0"), r"for CogVideoX 1\.0 is appended to the YAML of a 1\.5 model"),
        (
            with_targets(model(), "SinusoidalPositionEmbedding"),
            r"SinusoidalPositionEmbedding is not for this model's rotary positions; append .*sizes-5b",
        ),
        (
            model("1.5", loss_fn_config=THEIRS),
            r"1 frames are 1 latent frames, and this model takes multiples of 2; name sat_ext\.cogvideo\.Joint.*, "
            r"which pads them, or use 5\.",
        ),
    ],
)  # fmt: skip
def test_what_cannot_train_is_named(made: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_model(made, [bucket(1), bucket(49)])


CONDITIONED = {"noised_image_input": True, "scale_factor": 0.7}
AT_ONE = {**JOINT, "params": {"condition_scale": 1.0}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"loss_fn_config": AT_ONE, "scale_factor": 0.5},
            r"loss_fn_config\.params\.scale_factor: 0\.7, but model\.scale_factor is 0\.5, .* same number in both",
        ),
        (
            {"loss_fn_config": AT_ONE, "sampler_config": {"target": "sat_ext.cogvideo.PaddedSampler"}},
            r"sampler_config\.params\.condition_scale: None, but the loss trains at 1\.0 .* same number in both",
        ),
        (
            {"loss_fn_config": {**THEIRS, "params": {"condition_scale": 1.0}}},
            r"loss_fn_config\.params\.condition_scale: an option of sat_ext\.cogvideo\.JointDiffusionLoss, .* "
            r"append configs/cogvideo/joint\.yaml\.",
        ),
        (
            {"not_trainable_prefixes": ["all"]},
            r"not_trainable_prefixes: 'all' leaves only LoRA to train, and the network has none .*lora\.yaml",
        ),
    ],
)  # fmt: skip
def test_a_scale_or_a_lora_without_its_other_half_is_refused(changes: dict[str, Any], message: str) -> None:
    made = model("1.5", **{**CONDITIONED, **changes})
    with pytest.raises(ConfigError, match=message):
        check_model(made, [bucket(5)])


def test_a_condition_at_one_scale_everywhere_is_taken() -> None:
    sampler = {"target": "sat_ext.cogvideo.PaddedSampler", "params": {"condition_scale": 1.0}}
    check_model(model("1.5", **CONDITIONED, loss_fn_config=AT_ONE, sampler_config=sampler), [bucket(81)])
    check_model(model("1.5", loss_fn_config=AT_ONE, sampler_config=sampler), [bucket(81)])  # text to video


def test_odd_latent_frames_of_a_1_5_model_need_our_loss() -> None:
    theirs = model("1.5", loss_fn_config=THEIRS)
    check_model(theirs, [bucket(13), bucket(77)])
    with pytest.raises(ConfigError, match=r"81 frames are 21 latent frames.*or use 77 or 85\."):
        check_model(theirs, [bucket(13), bucket(81)])


def test_a_network_that_asks_for_ofs_needs_our_loss() -> None:
    made = model("1.5", loss_fn_config=THEIRS)
    made["network_config"]["params"]["ofs_embed_dim"] = 512
    with pytest.raises(ConfigError, match="CogVideo's own loss does not pass 'ofs', which this network needs"):
        check_model(made, [bucket(13)])


def test_more_frames_than_positions_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"53 frames are 14 latent frames.*positions for 13 .*use 49 or less"):
        check_model(model(), [bucket(53)])
    with pytest.raises(ConfigError, match=r"positions for 42 .*use 165 or less"):
        check_model(model("1.5"), [bucket(169)])


def test_1_0_models_take_other_sizes_with_our_positions_and_final_layer_only() -> None:
    turned = [bucket(17, 720, 480)]
    with pytest.raises(
        ConfigError,
        match=r"bucket 17x720x480: dit_video_concat\.Rotary\w+ is right at 480x720 pixels only; .*5b\.yaml",
    ):
        check_model(model(), turned)
    half = with_targets(model(), "InterpolatedRotaryPositionEmbedding")
    half["network_config"]["params"]["modules"]["final_layer_config"]["target"] = (
        "dit_video_concat.FinalLayerMixin"
    )
    with pytest.raises(ConfigError, match=r"dit_video_concat\.FinalLayerMixin is right at 480x720"):
        check_model(half, turned)
    check_model(with_targets(model(), "InterpolatedRotaryPositionEmbedding"), turned)
    check_model(model("1.5"), turned)


def test_1_5_models_take_sizes_up_to_their_table() -> None:
    check_model(model("1.5"), [bucket(81, 768, 1360)])
    with pytest.raises(ConfigError, match=r"bucket 81x2416x1360: this model has positions for 2400x2400 pixels"):
        check_model(model("1.5"), [bucket(81, 2416, 1360)])


def test_a_patch_size_of_neither_generation_is_refused() -> None:
    made = model()
    made["network_config"]["params"]["patch_size"] = [2, 2]
    with pytest.raises(ConfigError, match=r"patch_size: \[2, 2\] is neither a number .* nor three"):
        check_model(made, [])


def test_captions_are_as_long_as_the_network_takes_them() -> None:
    embedder = {"input_key": "txt", "params": {"max_length": 224}}
    conditioner = {"params": {"emb_models": [embedder]}}
    check_model(model("1.5", conditioner_config=conditioner), [])
    with pytest.raises(
        ConfigError, match=r"emb_models\[0\]\.params\.max_length: 224, but .* of 226 tokens .*write 226"
    ):
        check_model(model("1.0", conditioner_config=conditioner), [])


def test_an_embedder_of_ours_does_not_train() -> None:
    embedder = {"target": "sat_ext.cogvideo.OffloadedTextEmbedder", "is_trainable": True}
    with pytest.raises(ConfigError, match=r"emb_models\[0\]\.is_trainable: true, but sat_ext.*Embedder does not"):
        check_model(model(conditioner_config={"params": {"emb_models": [embedder]}}), [])


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A module of the name that CogVideo's has, of either generation."""

    def make(generation: str) -> None:
        new = "ofs_embed_dim=None, " if generation == "1.5" else ""
        code = f"class DiffusionTransformer:\n    def __init__(self, patch_size, {new}**kwargs): ...\n"
        (tmp_path / "dit_video_concat.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "dit_video_concat", raising=False)

    return make


ARGS = Namespace(eval_interval=100, only_log_video_latents=True, save="ckpts", model_parallel_size=1)


def test_a_model_of_the_other_generation_than_the_checkout_is_refused(checkout: Callable[[str], None]) -> None:
    checkout("1.5")
    check_run(ARGS, model("1.5"), [bucket(1)])
    with pytest.raises(
        ConfigError,
        match=r"the YAML of a CogVideoX 1\.0 model, and the code that runs is of CogVideo's branch main; "
        r"check out tag v1\.0, or name the YAML of a 1\.5 model\.",
    ):
        check_run(ARGS, model("1.0"), [bucket(1)])


def test_an_evaluation_that_would_fail_after_many_steps_is_told_before(checkout: Callable[[str], None]) -> None:
    checkout("1.5")
    theirs = model("1.5", sampler_config={"target": "sgm.modules.diffusionmodules.sampling.VPSDEDPMPP2MSampler"})
    check_run(ARGS, theirs, [bucket(13)])  # 4 latent frames
    with pytest.raises(
        ConfigError,
        match=r"model\.sampler_config\.target: sgm\..* even numbers .* append configs/cogvideo/1\.5\.yaml",
    ):
        check_run(ARGS, theirs, [bucket(13), bucket(17)])
    theirs["network_config"]["params"]["ofs_embed_dim"] = 512
    with pytest.raises(ConfigError, match="is not given 'ofs'"):
        check_run(ARGS, theirs, [bucket(13)])
    check_run(ARGS, {**theirs, "sampler_config": {"target": "sat_ext.cogvideo.PaddedSampler"}}, [bucket(17)])


def test_a_1_5_model_is_refused_at_the_tag_v1_0(checkout: Callable[[str], None]) -> None:
    checkout("1.0")
    check_run(ARGS, model("1.0"), [bucket(1)])
    with pytest.raises(
        ConfigError, match=r"of a CogVideoX 1\.5 model.*CogVideo's tag v1\.0; check out branch main"
    ):
        check_run(ARGS, model("1.5"), [bucket(1)])


def test_mains_evaluations_cannot_decode_a_still(checkout: Callable[[str], None]) -> None:
    checkout("1.5")
    args = Namespace(**{**vars(ARGS), "only_log_video_latents": False})
    check_run(args, model("1.5"), [bucket(81)])
    with pytest.raises(
        ConfigError, match=r"args\.only_log_video_latents: .* of which a bucket of 1 frames has 1;"
    ):
        check_run(args, model("1.5"), [bucket(1), bucket(81)])


def test_what_the_script_would_stumble_over_later_is_told_before(checkout: Callable[[str], None]) -> None:
    checkout("1.0")
    with pytest.raises(ConfigError, match=r"args\.save: missing, .*; name a folder"):
        check_run(Namespace(**{**vars(ARGS), "save": None}), model(), [bucket(1)])
    with pytest.raises(ConfigError, match=r"args\.model_parallel_size: 2, and the network is for 1 .* same"):
        check_run(Namespace(**{**vars(ARGS), "model_parallel_size": 2}), model(), [bucket(1)])


def test_a_misspelt_target_of_ours_is_told_wherever_it_stands() -> None:
    wrong = {"target": "sat_ext.cogvideo.CachedTextEmbeder", "params": {}}
    made = model(conditioner_config={"target": "sgm.GeneralConditioner", "params": {"emb_models": [wrong]}})
    with pytest.raises(
        ConfigError,
        match=r"model\.conditioner_config\.params\.emb_models\[0\]\.target: there is no "
        r"'sat_ext\.cogvideo\.CachedTextEmbeder'; there is sat_ext\.cogvideo\.CachedTextEmbedder\.",
    ):
        check_model(made, [bucket(1)])


def test_costs_follow_the_networks_patches() -> None:
    old, new = engine_of(model("1.0")).sequence_shape(), engine_of(model("1.5")).sequence_shape()
    assert tokens(bucket(49), old) == 13 * 30 * 45 + 226
    assert tokens(bucket(81), new) == 11 * 30 * 45 + 224  # 21 latent frames, padded to 22
    assert tokens(bucket(1), new) == 30 * 45 + 224  # a still is padded to 2
    assert engine_of({"network_config": {"params": {"hidden_size": 64}}}).sequence_shape().hidden_size == 64


def test_noise_levels_that_do_not_divide_the_ranks_are_reported_before(
    checkout: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout("1.5")
    levels = {"params": {"uniform_sampling": True, "group_num": 40, "num_idx": 1000}}
    theirs = model("1.5", loss_fn_config={**THEIRS, "params": {"sigma_sampler_config": levels}})
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    for ranks in (8, 40, 16):
        monkeypatch.setattr("torch.distributed.get_world_size", lambda ranks=ranks: ranks)
        check_run(ARGS, {**theirs, "loss_fn_config": {**JOINT, "params": {"sigma_sampler_config": levels}}}, [])
        if ranks != 16:
            check_run(ARGS, theirs, [])
    with pytest.raises(ConfigError, match=r"group_num: 40 does not divide 16 ranks, .*uniform_sampling: false"):
        check_run(ARGS, theirs, [])


def test_the_loss_weights_are_known_to_our_engine_and_our_loss() -> None:
    assert engine_of({}).weighs_losses
    assert engine_of({"pretrained": "x"}).weighs_losses
    assert engine_of(model()).weighs_losses
    assert not engine_of(model(loss_fn_config=THEIRS)).weighs_losses
    assert not engine_of({"network_config": {"params": {"hidden_size": 64}}}).weighs_losses
