"""A pack's groups go through the transformer together, as if each went alone."""

from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from torch import Tensor, nn

from sat_ext.models.config import ABSENT
from sat_ext.models.engine import VideoDiffusionEngine
from sat_ext.models.packs import Group
from sat_ext.models.quantize import QuantizedLinear
from sat_ext.models.transformer import predict_velocity
from tests.models.conftest import FAMILIES, make_batch, make_engine, small_config

Inputs = tuple[Tensor, Tensor, Tensor]


def inputs_of(engine: VideoDiffusionEngine) -> list[Inputs]:
    """A clip, two stills and a pair of clips of another shape."""
    transformer = engine.config.transformer
    frames = transformer.patch_size_t or 1
    torch.manual_seed(1)
    return [
        (
            torch.randn(samples, length * frames, transformer.in_channels, height, width),
            torch.randn(samples, transformer.max_text_seq_length, transformer.text_embed_dim),
            torch.randint(0, 1000, (samples,)),
        )
        for samples, length, height, width in ((1, 3, 8, 8), (2, 1, 8, 4), (2, 2, 4, 8))
    ]


def opened(engine: VideoDiffusionEngine) -> VideoDiffusionEngine:
    """A new model's blocks are the identity: with other gates they do something."""
    for name, parameter in engine.network.named_parameters():
        if parameter.is_floating_point():
            nn.init.normal_(parameter, std=0.05 if "lora" in name else 0.1)
    return engine


def run(engine: VideoDiffusionEngine, groups: list[Inputs]) -> list[Tensor]:
    return predict_velocity(engine.network, engine.config, groups)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_predicts_what_its_groups_do_alone(family: str) -> None:
    engine = opened(make_engine(small_config(family)))
    groups = inputs_of(engine)
    together = run(engine, groups)
    for group, velocity in zip(groups, together, strict=True):
        (alone,) = run(engine, [group])
        assert velocity.shape == (*group[0].shape[:2], engine.config.transformer.out_channels, *group[0].shape[3:])
        torch.testing.assert_close(velocity, alone, rtol=1e-5, atol=1e-5 * float(alone.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_each_sample_of_a_pack_is_predicted_as_by_diffusers_alone(family: str) -> None:
    engine = opened(make_engine(small_config(family)))
    given: list[Any] = []
    engine.network.register_forward_pre_hook(
        lambda _, args, options: given.append((*args, options)), with_kwargs=True
    )
    together = run(engine, inputs_of(engine))
    ((groups, options),) = given
    own = CogVideoXTransformer3DModel.from_config(engine.network.config)
    own.load_state_dict(engine.network.state_dict())
    own.patch_embed = engine.network.patch_embed  # diffusers' raises for other sizes than the native one
    for group, velocities in zip(groups, together, strict=True):
        for i, velocity in enumerate(velocities):
            ofs = options["ofs"] if options["ofs"] is None else torch.full((1,), options["ofs"])
            (alone,) = own(
                group.latents[i : i + 1], group.text[i : i + 1], group.timesteps[i : i + 1], ofs=ofs,
                image_rotary_emb=group.rotary, return_dict=False,
            )  # fmt: skip
            torch.testing.assert_close(velocity, alone[0], rtol=1e-5, atol=1e-5 * float(alone.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "levers",
    [
        {},
        {"gradient_checkpointing": {"every": 1}},
        {"gradient_checkpointing": {"every": 2, "offload": True}},
        {"train": {"mode": "lora", "rank": 4}, "block_swap": 3, "gradient_checkpointing": True},
        {"train": {"mode": "lora", "rank": 4, "quantization": "fp8"}},
    ],
    ids=["plain", "checkpointing", "offload", "swap", "fp8"],
)
def test_its_gradients_are_the_sum_of_those_of_its_groups(family: str, levers: dict[str, Any]) -> None:
    transformer = {**FAMILIES[family]["transformer"], "num_layers": 4}  # block swap needs 3
    engine = opened(make_engine(small_config(family, transformer=transformer, **levers))).train()
    groups = inputs_of(engine)

    def gradients(packs: list[list[Inputs]]) -> dict[str, Tensor]:
        engine.zero_grad()
        for pack in packs:
            sum(v.square().sum() for v in run(engine, pack)).backward()  # type: ignore[union-attr]
        return {n: p.grad.clone() for n, p in engine.named_parameters() if p.grad is not None}

    together, apart = gradients([groups]), gradients([[group] for group in groups])
    assert together and together.keys() == apart.keys()
    scale = max(float(gradient.abs().max()) for gradient in apart.values())
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, apart[name], rtol=1e-4, atol=1e-6 * scale, msg=name)


def test_weights_are_dequantized_once_for_all_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(small_config("5b", train={"mode": "lora", "quantization": "fp8"}))
    read, counted = QuantizedLinear.read, []
    monkeypatch.setattr(QuantizedLinear, "read", lambda self, *a: counted.append(self) or read(self, *a))
    with torch.no_grad():
        run(engine, inputs_of(engine))
    assert counted and len(counted) == len(set(counted))


def test_a_block_is_called_once_for_all_groups() -> None:
    engine = make_engine(small_config("5b"))
    calls: list[nn.Module] = []
    for block in engine.network.transformer_blocks:
        block.register_forward_pre_hook(lambda block, _: calls.append(block))
    run(engine, inputs_of(engine))
    assert calls == list(engine.network.transformer_blocks)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_a_pack_is_the_sum_over_its_groups(family: str) -> None:
    engine = opened(make_engine(small_config(family, loss_weights={"image": 2.0}))).train()
    clip, stills = make_batch(9, count=1), make_batch(1, count=3)
    for batch, weight in ((clip, 0.5), (stills, 1.5)):
        batch["loss_weight"] = torch.full((len(batch["txt"]),), weight)
        batch["timestep"] = torch.linspace(0.1, 0.9, len(batch["txt"]))
    seen: list[list[Group]] = []
    engine.network.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    loss, metrics = engine({"groups": [clip, stills], "seed": 3})
    assert [len(pack) for pack in seen] == [2]
    assert [g.timesteps.tolist() for g in seen[0]] == [[100], [100, 500, 900]]
    expected = 0.5 * metrics["loss_video"] + 1.5 * 2.0 * metrics["loss_image"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    "levers",
    [
        {},
        {"gradient_checkpointing": {"offload": True}},
        {"train": {"mode": "lora", "rank": 4}, "block_swap": 3, "gradient_checkpointing": True},
    ],
    ids=["plain", "offload", "swap"],
)
def test_the_gradient_of_each_kind_is_measured_and_changes_nothing(levers: dict[str, Any]) -> None:
    transformer = {**FAMILIES["5b"]["transformer"], "num_layers": 4}
    engine = opened(make_engine(small_config("5b", **levers) | {"transformer": transformer})).train()
    trained = [p for p in engine.parameters() if p.requires_grad]
    clip, stills = make_batch(9, count=1), make_batch(1, count=3)
    pack = {"groups": [clip, stills], "seed": 3}
    norms, gradients = {}, {}
    for kind, weight in (("image", 0.0), ("video", 0.0), ("both", 1.0)):
        for group in (clip, stills):
            group["loss_weight"] = torch.full((len(group["txt"]),), 1.0 if group["kind"][0] == kind else weight)
        loss, metrics = engine({**pack, "gradient_norms": kind == "both"})
        loss.backward()
        gradients[kind] = [p.grad.clone() for p in trained if p.grad is not None]
        norms[kind] = float(torch.stack([g.norm() for g in gradients[kind]]).norm())
        engine.zero_grad()
    for kind in ("image", "video"):
        assert float(metrics[f"gradient_{kind}"]) == pytest.approx(norms[kind], rel=1e-4)
    for both, image, video in zip(*(gradients[k] for k in ("both", "image", "video")), strict=True):
        torch.testing.assert_close(both, image + video, rtol=1e-4, atol=1e-6)
    _, metrics = engine({**stills, "seed": 3, "gradient_norms": True})
    assert float(metrics["gradient_video"]) == ABSENT
