from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from sat_ext.models.config import ABSENT
from sat_ext.models.transformer import predict_velocity
from tests.models.conftest import FAMILIES, Seen, make_batch, make_engine, small_config, write_pretrained

I2V = [family for family in FAMILIES if "i2v" in family]
GENERATION_1_5 = [family for family in FAMILIES if family.startswith("1.5")]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("frames", [1, 5, 9])
def test_every_family_trains_on_stills_and_clips(family: str, frames: int) -> None:
    engine = make_engine(OmegaConf.create(small_config(family)))
    loss, metrics = engine(make_batch(frames))
    loss.backward()
    trained = [p for p in engine.parameters() if p.requires_grad]
    assert loss.isfinite() and any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    here, absent = ("loss_image", "loss_video") if frames == 1 else ("loss_video", "loss_image")
    assert metrics[here] == loss.detach() and metrics[absent] == ABSENT


@pytest.mark.parametrize("frames", [1, 9])
def test_gradient_checkpointing_gives_the_same_gradients(frames: int) -> None:
    gradients = []
    for checkpointing in (False, True):
        engine = make_engine(small_config("5b-i2v", gradient_checkpointing=checkpointing))
        engine(make_batch(frames, seed=3))[0].backward()
        gradients.append(engine.network.proj_out.weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("family", I2V)
@pytest.mark.parametrize("training", [True, False])
def test_stills_never_see_their_target_as_condition(family: str, training: bool) -> None:
    engine = make_engine(small_config(family, condition_dropout=0.0)).train(training)
    seen = Seen(engine)
    for kinds in (["image", "image"], ["video", "video"]):  # a clip of one frame leaks as an image does
        engine(make_batch(1, kind=kinds))
        assert not seen.condition().any()


@pytest.mark.parametrize("family", I2V)
def test_clips_see_their_first_frame_and_nothing_after(family: str) -> None:
    engine = make_engine(small_config(family, condition_dropout=0.0)).eval()
    seen, batch = Seen(engine), make_batch(9)
    engine(batch)
    condition = seen.condition()
    expected = engine.first_stage.encode_condition(batch["mp4"][:, :1])
    torch.testing.assert_close(condition[:, :1], expected)
    assert not condition[:, 1:].any()
    assert condition.shape[1] == (4 if family.startswith("1.5") else 3)


def test_training_puts_noise_on_the_condition_frame() -> None:
    engine = make_engine(small_config("5b-i2v", condition_dropout=0.0))
    seen, batch = Seen(engine), make_batch(9)
    engine(batch)
    clean = engine.first_stage.encode_condition(batch["mp4"][:, :1])
    difference = (seen.condition()[:, :1] - clean).flatten(1).std(dim=1)
    assert (difference > 1e-3).all() and difference[0] != difference[1]


def test_condition_dropout_is_per_sample() -> None:
    engine = make_engine(small_config("5b-i2v", condition_dropout=0.5))
    seen = Seen(engine)
    engine(make_batch(5, count=32, seed=0))
    dropped = seen.condition().flatten(1).eq(0).all(dim=1)
    assert 6 <= dropped.sum() <= 26


def test_caption_dropout_is_per_sample_and_off_in_evaluation() -> None:
    engine = make_engine(small_config("5b", caption_dropout=0.5))
    seen, batch = Seen(engine), make_batch(5, count=32, seed=0)
    engine(batch)
    empty = engine.text.encode([""], torch.device("cpu"), torch.float32)

    def dropped() -> torch.Tensor:
        return (seen.calls[-1]["text"] - empty).flatten(1).abs().amax(dim=1) < 1e-5

    assert 6 <= dropped().sum() <= 26
    engine.eval()(batch)
    assert not dropped().any()


@pytest.mark.parametrize("family", GENERATION_1_5)
@pytest.mark.parametrize("frames", [1, 9])
def test_padding_latent_carries_no_loss(family: str, frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the transformer says of the padding, the loss and its gradient stay the same."""
    engine = make_engine(small_config(family))
    outputs = []

    def shifted(*args: Any, by: float) -> list[torch.Tensor]:
        (prediction,) = predict_velocity(*args)
        outputs.append(prediction)
        prediction.retain_grad()
        mask = torch.zeros_like(prediction)
        mask[:, 0] = by
        return [prediction + mask]

    losses = []
    for by in (0.0, 100.0):
        monkeypatch.setattr("sat_ext.models.engine.predict_velocity", lambda *args, by=by: shifted(*args, by=by))
        loss, _ = engine(make_batch(frames, seed=5))
        loss.backward()
        losses.append(loss.detach())
    assert torch.equal(*losses)
    assert outputs[0].shape[1] == ((frames - 1) // 4 + 1) + 1
    assert not outputs[0].grad[:, 0].any() and outputs[0].grad[:, 1:].any()


def test_even_latents_are_not_padded() -> None:
    engine = make_engine(small_config("1.5-5b"))
    seen = Seen(engine)
    engine(make_batch(5))
    assert seen.latents().shape[1] == 2


def test_1_5_i2v_gets_its_ofs_and_the_others_none() -> None:
    for family in FAMILIES:
        engine = make_engine(small_config(family))
        seen = Seen(engine)
        engine(make_batch(5))
        ofs = seen.calls[-1]["ofs"]
        assert ofs == (2.0 if family == "1.5-5b-i2v" else None)


def test_loss_weights_scale_the_loss_and_not_the_metrics() -> None:
    plain = make_engine(small_config("5b"))
    weighted = make_engine(small_config("5b", loss_weights={"image": 3.0, "video": 0.5}))
    for frames, factor in ((1, 3.0), (5, 0.5)):
        loss, metrics = plain(make_batch(frames, seed=1))
        heavy, heavy_metrics = weighted(make_batch(frames, seed=1))
        torch.testing.assert_close(heavy, factor * loss)
        assert metrics == heavy_metrics


def test_metrics_of_a_mixed_batch_are_means_per_kind() -> None:
    engine = make_engine(small_config("5b"))
    loss, metrics = engine(make_batch(5, count=4, seed=1, kind=["image", "video", "video", "video"]))
    torch.testing.assert_close(loss.detach(), (metrics["loss_image"] + 3 * metrics["loss_video"]) / 4)


def test_evaluation_is_repeatable_and_independent_of_the_batch() -> None:
    engine = make_engine(small_config("5b-i2v")).eval()
    batch = make_batch(5, count=3)
    _, together = engine(batch)
    torch.manual_seed(99)
    assert engine(batch)[1] == together
    alone = [engine({k: v[i : i + 1] for k, v in batch.items() if k != "seed"})[1]["loss_video"] for i in range(3)]
    torch.testing.assert_close(torch.stack(alone).mean(), together["loss_video"])
    renamed = engine({**batch, "key": ["x", "y", "z"]})[1]
    assert renamed["loss_video"] != together["loss_video"]


def test_evaluation_looks_at_every_part_of_the_noise_range() -> None:
    engine = make_engine(small_config("5b")).eval()
    seen = Seen(engine)
    engine(make_batch(1, count=3))
    parts = torch.stack([call["timestep"] for call in seen.calls]) // 250
    assert torch.equal(parts, torch.arange(4)[:, None].expand(4, 3))


def test_a_seed_in_the_batch_fixes_every_draw() -> None:
    one, other = make_engine(small_config("5b-i2v")), make_engine(small_config("5b-i2v"))
    other(make_batch(5))  # another history
    assert torch.equal(one(make_batch(5, seed=7))[0], other(make_batch(5, seed=7))[0])
    assert one(make_batch(5, seed=7))[0] != one(make_batch(5, seed=8))[0]


def test_lora_trains_its_adapters_alone_and_starts_as_the_base() -> None:
    base = make_engine(small_config("5b"))
    lora = make_engine(small_config("5b", train={"mode": "lora", "rank": 4, "alpha": 4}))
    names = [name for name, p in lora.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 4 * 2 and all("lora_" in name for name in names)  # layers, targets, A and B
    base_state = {name.replace(".base_layer", ""): value for name, value in lora.state_dict().items()}
    base.load_state_dict({name: v for name, v in base_state.items() if "lora_" not in name})
    torch.testing.assert_close(lora(make_batch(5, seed=1))[0], base(make_batch(5, seed=1))[0])


def test_learned_positions_train_with_every_other_weight_and_not_beside_a_lora() -> None:
    name = "patch_embed.pos_embedding"
    engine = make_engine(small_config("5b-i2v"))
    frozen = [n for n, p in engine.network.named_parameters() if not p.requires_grad]
    assert not frozen and not list(engine.network.named_buffers()), "full tuning trains every weight"
    engine(make_batch(9))[0].backward()
    positions = engine.network.get_parameter(name)
    assert positions.grad is not None and (positions.grad[:, 8:] != 0).any()  # behind 8 tokens of text
    lora = make_engine(small_config("5b-i2v", train={"mode": "lora", "rank": 4, "alpha": 4}))
    assert name in dict(lora.network.named_buffers())
    lora.load_state_dict({k: v for k, v in engine.state_dict().items() if k.endswith(name)}, strict=False)
    assert torch.equal(lora.network.get_buffer(name).float(), positions)


def test_lora_learns() -> None:
    engine = make_engine(small_config("5b", train={"mode": "lora", "rank": 4, "alpha": 4}))
    torch.nn.init.normal_(engine.network.transformer_blocks[0].norm1.linear.weight, std=0.5)
    torch.nn.init.normal_(engine.network.transformer_blocks[1].norm1.linear.weight, std=0.5)
    optimizer = torch.optim.Adam([p for p in engine.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(30):
        loss, _ = engine(make_batch(1, seed=1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_checkpoint_leaves_out_what_the_yaml_gives_back(pretrained: Callable[..., Path]) -> None:
    folder = str(pretrained("5b-i2v"))
    full = make_engine({"pretrained": folder, "conditioning": "i2v"})
    assert set(full.state_dict()) == {f"network.{name}" for name in full.network.state_dict()}
    lora_config = {"pretrained": folder, "conditioning": "i2v", "train": {"mode": "lora", "rank": 2}}
    state = make_engine(lora_config).state_dict()
    assert state and all("lora_" in name for name in state)


def test_checkpoint_restores_what_it_left_out(pretrained: Callable[..., Path]) -> None:
    folder = str(pretrained("5b-i2v"))
    config = {"pretrained": folder, "conditioning": "i2v", "train": {"mode": "lora", "rank": 2}}
    trained, fresh = make_engine(config), make_engine(config)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    found = fresh.load_state_dict(trained.state_dict(), strict=False)
    assert not found.missing_keys and not found.unexpected_keys
    batch = make_batch(5, seed=1)
    assert torch.equal(fresh(batch)[0], trained(batch)[0])
    assert set(fresh.load_state_dict({}, strict=False).missing_keys) == set(trained.state_dict())


def test_first_stage_and_text_encoder_never_train(pretrained: Callable[..., Path]) -> None:
    engine = make_engine({"pretrained": str(pretrained()), "conditioning": "i2v"})
    trained = {name.split(".")[0] for name, p in engine.named_parameters() if p.requires_grad}
    assert trained == {"network"}
    engine.train()(make_batch(5))[0].backward()
    assert all(p.grad is None for p in engine.first_stage.parameters())


def test_engine_of_a_folder_takes_its_schedule(tmp_path: Path) -> None:
    folder = write_pretrained(tmp_path, "2b", snr_shift_scale=3.0)
    engine = make_engine({"pretrained": str(folder)})
    assert engine.config.schedule.snr_shift_scale == 3.0


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_engine_runs_in_half_precision(pretrained: Callable[..., Path], dtype: torch.dtype) -> None:
    engine = make_engine({"pretrained": str(pretrained()), "conditioning": "i2v"}).to(dtype)
    batch = make_batch(5)
    loss, _ = engine({**batch, "mp4": batch["mp4"].to(dtype)})
    assert loss.dtype == torch.float32 and loss.isfinite()


def test_adapters_without_a_folder_get_a_gradient() -> None:
    engine = make_engine(small_config("5b", train={"mode": "lora", "rank": 4, "alpha": 4}))
    engine(make_batch(5, count=2, seed=0))[0].backward()
    assert max(p.grad.abs().max() for p in engine.parameters() if p.grad is not None) > 0


@pytest.mark.parametrize("training", [True, False])
def test_uint8_pixels_are_the_same_batch(training: bool) -> None:
    engine = make_engine(small_config("5b-i2v")).train(training)
    batch = make_batch(5, seed=3)
    pixels = ((batch["mp4"] + 1) * 127.5).round().to(torch.uint8)
    as_float, as_uint8 = (
        engine({**batch, "mp4": mp4})[0] for mp4 in (pixels.to(torch.float32).div(127.5).sub(1), pixels)
    )
    assert torch.equal(as_float, as_uint8)


def test_loss_weights_of_the_schedule_count_in_training_and_not_in_evaluations() -> None:
    engine, batch = make_engine(small_config("5b")), make_batch(5, seed=3)
    weighted = {**batch, "loss_weight": torch.full((2,), 6.0)}
    for training, factor in ((True, 6.0), (False, 1.0)):
        engine.train(training)
        (plain, reported), (loss, metrics) = engine(batch), engine(weighted)
        torch.testing.assert_close(loss, factor * plain)
        assert metrics["loss_video"] == reported["loss_video"]  # what is logged stays comparable
