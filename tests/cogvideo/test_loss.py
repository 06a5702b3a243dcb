"""The joint loss over small doubles of CogVideo's loss, denoiser, conditioner and networks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sat_ext.cogvideo import loss as module
from sat_ext.cogvideo.loss import JointDiffusionLoss
from sat_ext.cogvideox import OFS
from sat_ext.errors import ConfigError
from sat_ext.models.config import ABSENT

CHANNELS, HEIGHT, WIDTH = 2, 3, 4
PARAMS = "model.loss_fn_config.params"
NEAREST = "did you mean 'condition_dropout'?"
OF_THE_YAML = "that CogVideo's own YAML has there."


class ParentLoss(nn.Module):
    """The documented interface of `VideoDiffusionLoss`, with the random numbers that it draws, in its order."""

    def __init__(self, sigma_sampler_config: Any, batch2model_keys: Sequence[str] = ()) -> None:
        super().__init__()
        self.sigma_sampler_config = sigma_sampler_config
        self.batch2model_keys = set(batch2model_keys)
        self.table = nn.Parameter(torch.ones(2))  # a parent may have weights

    def __call__(
        self, network: Any, denoiser: Any, conditioner: Any, input: Tensor, batch: dict[str, Any]
    ) -> Tensor:
        cond = conditioner(batch)
        inputs = {key: batch[key] for key in self.batch2model_keys & set(batch)}
        levels = torch.rand(len(input))
        noise = torch.randn_like(input)
        if "concat_images" in batch:
            cond["concat"] = batch["concat_images"]
        signal = levels[:, None, None, None, None]
        noisy = signal * input + (1 - signal**2).sqrt() * noise
        prediction = denoiser(network, noisy, levels, cond, **inputs)
        return self.get_loss(prediction, input, 1 / (1 - signal**2))

    def get_loss(self, model_output: Tensor, target: Tensor, w: Tensor) -> Tensor:
        return (w * (model_output - target) ** 2).flatten(1).mean(1)


class NotALoss(nn.Module):
    pass


class Transformer(nn.Module):
    """Mixes all frames of noisy latents and condition, and remembers what it was given."""

    def __init__(self, patch_size: Any = 2, ofs_embed_dim: int | None = None, *, i2v: bool = False) -> None:
        super().__init__()
        self.patch_size, self.ofs_embed_dim = patch_size, ofs_embed_dim
        self.scale = nn.Parameter(torch.tensor([0.5, 0.25] if i2v else [0.5]))
        self.seen: dict[str, Any] = {}

    def forward(self, x: Tensor, **inputs: Any) -> Tensor:
        self.seen = {"x": x, **inputs}
        parts = x.split(CHANNELS, dim=2)
        out = sum(factor * part for factor, part in zip(self.scale, parts, strict=True))
        assert isinstance(out, Tensor)
        return out + out.mean(dim=1, keepdim=True)


class Network(nn.Module):
    """CogVideo's wrapper: the condition goes beside the latents, into `diffusion_model`."""

    def __init__(self, transformer: Transformer) -> None:
        super().__init__()
        self.diffusion_model = transformer

    def forward(self, x: Tensor, cond: dict[str, Tensor], **inputs: Any) -> Tensor:
        joined = torch.cat([x, cond["concat"]], dim=2) if "concat" in cond else x
        prediction: Tensor = self.diffusion_model(joined, **inputs)
        return prediction


def denoiser(network: Network, noisy: Tensor, levels: Tensor, cond: dict[str, Tensor], **inputs: Any) -> Tensor:
    prediction = network(noisy, cond, **inputs)
    if prediction.requires_grad:
        prediction.retain_grad()
    denoiser.prediction = prediction  # type: ignore[attr-defined]
    return prediction


def joint(**params: Any) -> Any:
    return JointDiffusionLoss(parent=f"{__name__}.ParentLoss", sigma_sampler_config={}, **params)


def latents_of(count: int, frames: int) -> Tensor:
    return torch.randn(count, frames, CHANNELS, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))


def batch_of(kinds: Sequence[str] | None, frames: int, *, i2v: bool = False, **more: Any) -> dict[str, Any]:
    batch = dict(more) if kinds is None else {"kind": list(kinds), **more}
    if i2v:
        first = latents_of(4 if kinds is None else len(kinds), frames) + 10
        first[:, 1:] = 0
        batch["concat_images"] = first
    return batch


def losses(loss: Any, network: Network, frames: int, batch: dict[str, Any], seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    count = len(batch["kind"]) if "kind" in batch else 4
    result: Tensor = loss(network, denoiser, lambda batch: {}, latents_of(count, frames), batch)
    return result


@pytest.mark.parametrize("i2v", [False, True])
@pytest.mark.parametrize("patch, frames", [(2, 3), ([2, 2, 2], 4), ([1, 2, 2], 3)])
def test_clips_without_options_give_the_parents_numbers_and_draws(patch: Any, frames: int, i2v: bool) -> None:
    network = Network(Transformer(patch, i2v=i2v))
    found = []
    for loss in (ParentLoss({}), joint()):
        network.zero_grad()
        value = losses(loss, network, frames, batch_of(["video"] * 3, frames, i2v=i2v, loss_weight=torch.ones(3)))
        value.mean().backward()
        found.append((value, network.diffusion_model.scale.grad.clone(), torch.get_rng_state()))
    for theirs, ours in zip(*found, strict=True):
        assert torch.equal(theirs, ours)


def test_another_data_class_gives_the_parents_numbers() -> None:
    network = Network(Transformer(i2v=True))
    for batch in (batch_of(None, 3, i2v=True), batch_of(None, 3, i2v=True, num_frames=torch.full((4,), 9))):
        assert torch.equal(losses(ParentLoss({}), network, 3, batch), losses(joint(), network, 3, batch))


def test_the_batch_is_left_as_it_was() -> None:
    batch = batch_of(["image", "video"], 3, i2v=True)
    before = copy.deepcopy(batch)
    losses(joint(), Network(Transformer([2, 2, 2], 8, i2v=True)), 3, batch)
    assert set(batch) == set(before) and torch.equal(batch["concat_images"], before["concat_images"])


@pytest.mark.parametrize(
    "batch, frames, still",
    [
        (batch_of(["image", "video"] * 2, 3, i2v=True), 3, [True, False] * 2),
        (batch_of(None, 3, i2v=True, num_frames=torch.tensor([1, 9, 5, 1])), 3, [True, False, False, True]),
        (batch_of(None, 1, i2v=True), 1, [True] * 4),
        (batch_of(["video"] * 4, 1, i2v=True), 1, [True] * 4),
    ],
    ids=["kind", "num_frames", "one_latent_frame", "one_latent_frame_of_a_clip"],
)
def test_stills_train_without_their_condition(batch: dict[str, Any], frames: int, still: list[bool]) -> None:
    network = Network(Transformer(i2v=True))
    losses(joint(), network, frames, batch)
    condition = network.diffusion_model.seen["x"][:, :, CHANNELS:]
    for i, dropped in enumerate(still):
        expected = torch.zeros_like(condition[i]) if dropped else batch["concat_images"][i]
        assert torch.equal(condition[i], expected)


def test_the_loss_of_a_still_does_not_depend_on_its_condition() -> None:
    network, batch = Network(Transformer(i2v=True)), batch_of(["image", "video"], 3, i2v=True)
    batch["concat_images"].requires_grad_()
    value = losses(joint(), network, 3, batch)
    value.sum().backward()
    gradient = batch["concat_images"].grad
    assert not gradient[0].any() and gradient[1].any()
    other = batch | {"concat_images": batch["concat_images"] * 3}
    again = losses(joint(), network, 3, other)
    assert torch.equal(value[0], again[0]) and not torch.equal(value[1], again[1])


def test_conditions_are_dropped_sample_by_sample_in_training_alone() -> None:
    network, loss = Network(Transformer(i2v=True)), joint(condition_dropout=0.25)
    batch = batch_of(["video"] * 400, 3, i2v=True)
    losses(loss, network, 3, batch)
    dropped = ~network.diffusion_model.seen["x"][:, :, CHANNELS:].flatten(1).any(dim=1)
    assert 70 <= dropped.sum() <= 130
    network.eval()
    losses(loss, network, 3, batch)
    assert torch.equal(network.diffusion_model.seen["x"][:, :, CHANNELS:], batch["concat_images"])


def test_ranks_of_one_seed_drop_other_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    network, loss, batch = (
        Network(Transformer(i2v=True)),
        joint(condition_dropout=0.5),
        batch_of(["video"] * 20, 3, i2v=True),
    )
    dropped = []
    monkeypatch.setattr(
        module.mpu, "model_parallel_is_initialized", lambda: False
    )  # as another test may have left it
    for rank in (0, 1):
        monkeypatch.setattr(module.dist, "is_initialized", lambda: True)
        monkeypatch.setattr(module.dist, "get_world_size", lambda: 2)
        monkeypatch.setattr(module.dist, "get_rank", lambda rank=rank: rank)
        losses(loss, network, 3, batch)
        dropped.append(network.diffusion_model.seen["x"][:, :, CHANNELS:].flatten(1).any(dim=1))
    assert not torch.equal(*dropped)


def test_dropout_without_a_condition_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        losses(joint(condition_dropout=0.1), Network(Transformer()), 3, batch_of(["video"], 3))
    assert str(error.value) == (
        f"{PARAMS}.condition_dropout: 0.1, but the model has no image condition to drop "
        "(model.noised_image_input is not set); remove it."
    )


def test_kinds_and_samples_are_weighed_and_metrics_are_not() -> None:
    network, weight = Network(Transformer()), torch.tensor([2.0, 3.0, 4.0])
    batch = batch_of(["image", "video", "image"], 3, loss_weight=weight)
    plain = losses(ParentLoss({}), network, 3, batch)
    loss = joint(loss_weights={"image": 0.5})
    torch.testing.assert_close(losses(loss, network, 3, batch), plain * weight * torch.tensor([0.5, 1.0, 0.5]))
    torch.testing.assert_close(loss.metrics()["loss_image"], (plain[0] + plain[2]) / 2)
    torch.testing.assert_close(loss.metrics()["loss_video"], plain[1])


def test_an_evaluation_weighs_kinds_but_not_samples() -> None:
    network, batch = (
        Network(Transformer()).eval(),
        batch_of(["image", "video"], 3, loss_weight=torch.full((2,), 7.0)),
    )
    plain = losses(ParentLoss({}), network, 3, batch)
    found = losses(joint(loss_weights={"image": 2, "video": 0}), network, 3, batch)
    torch.testing.assert_close(found, plain * torch.tensor([2.0, 0.0]))


def test_metrics_are_of_the_last_call_and_absent_where_there_is_no_sample() -> None:
    network, loss = Network(Transformer()), joint()
    assert {k: float(v) for k, v in loss.metrics().items()} == {"loss_image": ABSENT, "loss_video": ABSENT}
    losses(loss, network, 3, batch_of(["image"], 1))
    assert loss.metrics()["loss_image"] > 0 and loss.metrics()["loss_video"] == ABSENT
    losses(loss, network, 3, batch_of(["video"], 3))
    assert loss.metrics()["loss_image"] == ABSENT and loss.metrics()["loss_video"] > 0
    assert all(v.ndim == 0 and not v.requires_grad for v in loss.metrics().values())


@pytest.mark.parametrize("frames, padded", [(1, 2), (3, 4), (4, 4)])
def test_latents_and_condition_are_padded_to_whole_patches(frames: int, padded: int) -> None:
    network, batch = Network(Transformer([2, 2, 2], i2v=True)), batch_of(["video"] * 2, frames, i2v=True)
    batch["concat_images"].requires_grad_()
    spy: list[Tensor] = []
    loss = joint()
    get_loss = loss.get_loss
    loss.get_loss = lambda output, target, w: spy.append(target) or get_loss(output, target, w)
    losses(loss, network, frames, batch)
    clean, seen = latents_of(2, frames), network.diffusion_model.seen["x"]
    assert seen.shape == (2, padded, 2 * CHANNELS, HEIGHT, WIDTH)
    assert torch.equal(spy[0][:, -frames:], clean) and torch.equal(spy[0][:, 0], clean[:, 0])
    if frames > 1:  # the condition's frame is the first of all, as the sampler has it
        assert torch.equal(seen[:, 0, CHANNELS:], batch["concat_images"][:, 0])
        assert not seen[:, 1:, CHANNELS:].any()


@pytest.mark.parametrize("cached", [False, True])
def test_the_condition_is_brought_from_the_engines_scale_to_the_one_asked_for(cached: bool) -> None:
    network, batch = Network(Transformer(i2v=True)), batch_of(["video", "image"], 3, i2v=True)
    unscaled = batch["concat_images"]
    batch["concat_images"] = 0.7 * unscaled
    if cached:  # `sat-ext cache` writes it as the engine makes it
        batch["condition_latents"] = batch.pop("concat_images")[:, :1]
    for asked, expected in ((None, 0.7), (1.0, 1.0), (1 / 0.7, 1 / 0.7)):
        losses(joint(condition_scale=asked), network, 3, batch)
        seen = network.diffusion_model.seen["x"][:, :, CHANNELS:]
        torch.testing.assert_close(seen[0], expected * unscaled[0])
        assert not seen[1].any()
    losses(joint(condition_scale=2.0), Network(Transformer()), 3, batch_of(["video"], 3))  # nothing to scale


def test_a_condition_on_every_frame_is_on_the_padding_too() -> None:
    network, batch = Network(Transformer([2, 2, 2], i2v=True)), batch_of(["video"], 3, i2v=True)
    batch["concat_images"] = batch["concat_images"][:, :1].expand(-1, 3, -1, -1, -1)
    losses(joint(), network, 3, batch)
    condition = network.diffusion_model.seen["x"][:, :, CHANNELS:]
    assert torch.equal(condition, batch["concat_images"][:, :1].expand(-1, 4, -1, -1, -1))


def test_the_padding_carries_no_loss_and_no_gradient() -> None:
    network, loss = Network(Transformer([2, 2, 2])), joint()
    value = losses(loss, network, 3, batch_of(["video"] * 2, 3))
    value.sum().backward()
    gradient = denoiser.prediction.grad  # type: ignore[attr-defined]
    assert gradient.shape[1] == 4 and not gradient[:, 0].any() and (gradient[:, 1:] != 0).all()
    output, target, w = latents_of(2, 4), latents_of(2, 4) * 2, torch.ones(2, 1, 1, 1, 1)
    changed = target.clone()
    changed[:, 0] += 5
    assert torch.equal(loss.get_loss(output, target, w), loss.get_loss(output, changed, w))
    torch.testing.assert_close(
        loss.get_loss(output, target, w), (output - target)[:, 1:].square().flatten(1).mean(1)
    )


def test_networks_that_embed_ofs_get_it() -> None:
    network = Network(Transformer([2, 2, 2], 8))
    losses(joint(), network, 4, batch_of(["video"] * 3, 4))
    assert network.diffusion_model.seen["ofs"].tolist() == [OFS] * 3
    given = torch.tensor([1.0, 2.0, 3.0])
    losses(joint(), network, 4, batch_of(["video"] * 3, 4, ofs=given))
    assert torch.equal(network.diffusion_model.seen["ofs"], given)
    other = Network(Transformer([2, 2, 2]))
    losses(joint(), other, 4, batch_of(["video"] * 3, 4))
    assert "ofs" not in other.diffusion_model.seen


def test_the_network_runs_once() -> None:
    network, calls = Network(Transformer([2, 2, 2], 8, i2v=True)), []
    network.diffusion_model.register_forward_hook(lambda *_: calls.append(1))
    losses(joint(condition_dropout=0.5), network, 1, batch_of(["image"] * 2, 1, i2v=True))
    assert len(calls) == 1


def test_ranks_that_share_a_model_take_the_first_ones_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """CogVideo sends them neither `kind` nor `loss_weight`."""
    sent: list[Tensor] = []

    def broadcast(values: Tensor, src: int, group: str) -> None:
        assert (src, group) == (2, "pair")
        if rank == 2:
            sent.append(values.clone())
        else:
            values.copy_(sent[0])

    mpu = SimpleNamespace(
        model_parallel_is_initialized=lambda: True,
        get_model_parallel_world_size=lambda: 2,
        get_model_parallel_rank=lambda: rank - 2,
        get_model_parallel_group=lambda: "pair",
    )
    monkeypatch.setattr(module, "mpu", mpu)
    for name, value in {"is_initialized": True, "get_world_size": 4}.items():
        monkeypatch.setattr(module.dist, name, lambda value=value: value)
    monkeypatch.setattr(module.dist, "get_rank", lambda: rank)
    monkeypatch.setattr(module.dist, "broadcast", broadcast)
    network = Network(Transformer(i2v=True))
    weight = torch.tensor([2.0, 3.0])
    batch = batch_of(["image", "video"], 3, i2v=True, loss_weight=weight, target=["data", "base"])
    found = []
    for rank in (2, 3):
        given = (
            batch if rank == 2 else {"concat_images": batch["concat_images"], "num_frames": torch.tensor([9, 9])}
        )
        loss = joint(loss_weights={"image": 0.5}, condition_dropout=0.5)
        torch.manual_seed(0)
        value = loss(network, denoiser, lambda batch: {}, latents_of(2, 3), given)
        found.append((value, network.diffusion_model.seen["x"], *loss.metrics().values()))
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


def test_it_is_the_parents_class_with_its_weights() -> None:
    loss = joint(batch2model_keys=["fps"])
    assert isinstance(loss, ParentLoss) and isinstance(loss, JointDiffusionLoss)
    assert list(loss.state_dict()) == ["table"] and loss.batch2model_keys == {"fps"}
    assert isinstance(copy.deepcopy(loss), ParentLoss)


@pytest.mark.parametrize(
    "params, message",
    [
        ({"condition_droput": 0.1}, f"{PARAMS}: unknown key 'condition_droput'; {NEAREST}"),
        (
            {"condition_dropout": 1.5},
            f"{PARAMS}.condition_dropout: 1.5 is not a probability; use a value from 0 to 1.",
        ),
        ({"condition_dropout": "often"}, f"{PARAMS}.condition_dropout: expected float, got 'often'."),
        (
            {"condition_scale": -1},
            f"{PARAMS}.condition_scale: -1.0 is not a scale; give a number above 0.",
        ),
        ({"loss_weights": {"image": -1}}, "loss_weights.image: -1.0 is below 0; 0 leaves the kind out."),
        (
            {"loss_weights": {"image": 0, "video": 0}},
            "loss_weights: both are 0, so nothing would be learned; give one above 0.",
        ),
        ({"loss_weights": {"still": 1}}, f"{PARAMS}.loss_weights: unknown key 'still'; valid keys: image, video."),
        (
            {"parent": f"{__name__}.NotALoss"},
            f"{PARAMS}.parent: {__name__}.NotALoss has no get_loss, so JointDiffusionLoss cannot extend it; "
            f"name the class {OF_THE_YAML}",
        ),
        (
            {"parent": f"{__name__}.denoiser"},
            f"{PARAMS}.parent: {__name__}.denoiser is not a module class; name the one {OF_THE_YAML}",
        ),
        (
            {"parent": "nowhere.at.All"},
            f"{PARAMS}.parent: nowhere.at.All cannot be imported (No module named 'nowhere'); run CogVideo's own "
            "train_video.py in its sat folder.",
        ),
    ],
)  # fmt: skip
def test_a_wrong_option_is_named(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        JointDiffusionLoss(**({"parent": f"{__name__}.ParentLoss", "sigma_sampler_config": {}} | params))
    assert str(error.value) == message


class LoraLinear(nn.Module):
    """What SAT's class of this name has that the loss looks at."""

    def __init__(self, original: Transformer) -> None:
        super().__init__()
        self.original, self.scaling, self.patch_size = original, 0.5, original.patch_size
        self.matrix_A = nn.ParameterList([nn.Parameter(torch.tensor(2.0))])

    def forward(self, x: Tensor, **inputs: Any) -> Tensor:
        base: Tensor = self.original(x, **inputs)
        return base + self.scaling * self.matrix_A[0] * x[:, :, :CHANNELS]


@pytest.mark.parametrize("patch, frames", [(2, 3), ([2, 2, 2], 3)])
def test_the_base_is_the_target_where_the_batch_says_so(patch: Any, frames: int) -> None:
    network = Network(LoraLinear(Transformer(patch)))  # type: ignore[arg-type]
    base = Network(network.diffusion_model.original)
    batch = batch_of(["video", "video", "image"], frames)
    loss, taught = joint(), {**batch, "target": ["data", "base", "base"]}
    of_data = losses(loss, network, frames, batch)
    value = losses(loss, network, frames, taught)
    padding = loss._padding
    predicted = denoiser.prediction.detach()  # type: ignore[attr-defined]
    losses(loss, base, frames, batch)
    expected = denoiser.prediction.detach()  # type: ignore[attr-defined]
    torch.manual_seed(0)
    signal = torch.rand(3)
    error = (predicted - expected)[:, padding:].square().flatten(1).mean(1) / (1 - signal**2)
    assert value[0] == of_data[0]
    torch.testing.assert_close(value[1:], error[1:])
    losses(loss, network, frames, taught).sum().backward()
    assert network.diffusion_model.scaling == 0.5 and network.diffusion_model.matrix_A[0].grad.any()
    metrics = loss.metrics()
    assert metrics["loss_image"] == ABSENT and metrics["loss_video"] == value[0]
    torch.testing.assert_close(metrics["loss_base"], error[1:].mean())
    network.eval()
    assert torch.equal(losses(loss, network, frames, taught), losses(loss, network, frames, batch))
    assert "loss_base" not in loss.metrics()


def test_every_step_has_the_metrics_of_all_ranks_and_no_target_of_another() -> None:
    network = Network(LoraLinear(Transformer()))  # type: ignore[arg-type]
    batch = batch_of(["video"], 3)
    loss = joint()
    expected = losses(loss, network, 3, batch)
    assert loss.metrics()["loss_base"] == ABSENT  # another rank may have such a sample, and waits for this one

    def broken(*inputs: Any, **more: Any) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("out of memory")
        return denoiser(*inputs, **more)

    with pytest.raises(RuntimeError):
        loss(network, broken, lambda batch: {}, latents_of(1, 3), {**batch, "target": ["base"]})
    assert network.diffusion_model.scaling == 0.5
    assert torch.equal(losses(loss, network, 3, batch), expected)
