"""The position targets against CogVideo's own networks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))

import in_checkout
import tiny
import torch
from in_checkout import Skip
from omegaconf import OmegaConf

TARGETS = {
    "Rotary3DPositionEmbeddingMixin": "InterpolatedRotaryPositionEmbedding",
    "Basic3DPositionEmbeddingMixin": "SinusoidalPositionEmbedding",
}
HEIGHT, WIDTH = tiny.SIZE[0] // 8, tiny.SIZE[1] // 8


def names_of(sat: Path) -> list[str]:
    return [n for n in tiny.model_names(sat) if "lora" not in n]


def is_1_0(sat: Path) -> bool:
    return "1.5" not in names_of(sat)[0]


def network(
    sat: Path,
    name: str,
    *,
    ours: bool,
    height: int = HEIGHT,
    width: int = WIDTH,
    learned: bool = False,
    **options: Any,
) -> torch.nn.Module:
    """The tiny network of a configuration, of random weights, with its own mixins or with our targets."""
    from sgm.util import instantiate_from_config

    config = tiny.model(sat, name, Path("nowhere"))["model"]["network_config"]
    config["params"].update(latent_height=height, latent_width=width)
    modules = config["params"]["modules"]
    position = modules["pos_embed_config"]
    if learned:
        position["params"]["learnable_pos_embed"] = True
    if ours:
        position["target"] = f"sat_ext.cogvideo.{TARGETS[position['target'].rpartition('.')[2]]}"
        position["params"].update(options)
        modules["final_layer_config"]["target"] = "sat_ext.cogvideo.FinalLayer"
    torch.manual_seed(0)
    made: torch.nn.Module = instantiate_from_config(OmegaConf.create(config))
    for parameter in made.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return made


def run(net: Any, frames: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """The output, and gradients of the first and the last layer's weights."""
    torch.manual_seed(frames)
    net.zero_grad()
    latents = torch.randn(2, frames, net.in_channels, height, width, requires_grad=True)
    ofs = {"ofs": torch.full((2,), 2.0)} if getattr(net, "ofs_embed_dim", None) else {}
    text = torch.randn(2, tiny.TEXT_LENGTH, tiny.TEXT_HIDDEN)
    out = net(latents.to(dtype), timesteps=torch.tensor([3, 500]), context=text.to(dtype), **ofs)
    out.float().square().sum().backward()
    return [out, latents.grad, net.mixins["final_layer"].linear.weight.grad]


def assert_same(left: list[torch.Tensor], right: list[torch.Tensor], tolerance: float = 0.0) -> None:
    for a, b in zip(left, right, strict=True):
        assert a.isfinite().all() and a.std() > 0
        if tolerance:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(a, b), (a - b).abs().max()


def lengths(sat: Path) -> list[int]:
    return [1, 3, 5] if is_1_0(sat) else [2, 4]


def check_at_the_configured_size_they_are_the_originals_to_the_bit(sat: Path) -> None:
    for name in names_of(sat):
        for learned in [False] if is_1_0(sat) else [False, True]:
            theirs, ours = (network(sat, name, ours=o, learned=learned) for o in (False, True))
            assert list(theirs.state_dict()) == list(ours.state_dict())
            assert [n for n, _ in theirs.named_parameters()] == [n for n, _ in ours.named_parameters()]
            ours.load_state_dict(theirs.state_dict())
            for frames in lengths(sat):
                assert_same(run(theirs, frames, HEIGHT, WIDTH), run(ours, frames, HEIGHT, WIDTH))
            for net in (theirs, ours):
                net.bfloat16().dtype = torch.bfloat16
            both = [run(net, 2, HEIGHT, WIDTH, torch.bfloat16) for net in (theirs, ours)]
            assert_same(*both)


def transposed(sat: Path, name: str, *, learned: bool = False, **options: Any) -> tuple[Any, Any]:
    """Ours of the configured size, and theirs built at the transposed one, with the same weights."""
    ours = network(sat, name, ours=True, learned=learned, **options)
    theirs = network(sat, name, ours=False, height=WIDTH, width=HEIGHT, learned=learned)
    state = {k: v for k, v in ours.state_dict().items() if ".pos_embed." not in k}
    theirs.load_state_dict(state, strict=False)
    table = getattr(ours.mixins["pos_embed"], "pos_embedding", None)
    if table is not None and table.requires_grad:  # learned: what ours makes of it
        rows, columns, count = WIDTH // 2, HEIGHT // 2, (tiny.FRAMES - 1) // 4 + 1
        images = torch.empty(1, count, 1, WIDTH, HEIGHT)
        sizes = {} if is_1_0(sat) else {"rope_T": count, "rope_H": rows, "rope_W": columns}
        resized = ours.mixins["pos_embed"].position_embedding_forward(
            None, images=images, seq_length=count * rows * columns, **sizes
        )
        theirs.mixins["pos_embed"].pos_embedding.data.copy_(resized)
    return ours, theirs


def check_at_a_transposed_size_they_are_a_network_built_at_that_size(sat: Path) -> None:
    for name in names_of(sat):
        sines = "2b" in name
        options = {} if sines or not is_1_0(sat) else {"rotary": "count"}
        ours, theirs = transposed(sat, name, **options)
        for frames in lengths(sat):
            left, right = run(ours, frames, WIDTH, HEIGHT), run(theirs, frames, WIDTH, HEIGHT)
            assert_same(left, right, 1e-5 if sines else 0.0)
        # theirs built at the configured size is another thing, or raises
        wrong = network(sat, name, ours=False)
        wrong.load_state_dict(ours.state_dict())
        if is_1_0(sat):
            out = run(wrong, 3, WIDTH, HEIGHT)[0]
            assert out.shape != left[0].shape or not torch.allclose(out, left[0])


def check_a_learned_embedding_of_1_5_is_resized(sat: Path) -> None:
    if is_1_0(sat):
        raise Skip("1.0's is in the check above")
    for name in names_of(sat):
        ours, theirs = transposed(sat, name, learned=True)
        for frames in lengths(sat):
            assert_same(run(ours, frames, WIDTH, HEIGHT), run(theirs, frames, WIDTH, HEIGHT))


def check_1_5_takes_more_than_its_table_holds(sat: Path) -> None:
    if is_1_0(sat):
        raise Skip("1.0 stretches")
    for name in names_of(sat):
        ours = network(sat, name, ours=True)
        theirs = network(sat, name, ours=False, height=20, width=16)
        theirs.load_state_dict(ours.state_dict())
        assert_same(run(ours, 4, 20, 16), run(theirs, 4, 20, 16))


def check_by_default_1_0_stretches_as_diffusers_does(sat: Path) -> None:
    if not is_1_0(sat):
        raise Skip("1.5 counts")
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    for name in ("cogvideox_5b", "cogvideox_5b_i2v"):
        ours, theirs = transposed(sat, name)
        grid = (WIDTH // 2, HEIGHT // 2)
        crop = get_resize_crop_region_for_grid(grid, WIDTH // 2, HEIGHT // 2)
        cosines, sines = get_3d_rotary_pos_embed(tiny.HIDDEN // tiny.HEADS, crop, grid, 5)
        theirs.mixins["pos_embed"].freqs_cos = cosines
        theirs.mixins["pos_embed"].freqs_sin = sines
        for frames in lengths(sat):
            assert_same(run(ours, frames, WIDTH, HEIGHT), run(theirs, frames, WIDTH, HEIGHT))


test_original = in_checkout.test_of(__file__)

if __name__ == "__main__":
    in_checkout.main(globals())
