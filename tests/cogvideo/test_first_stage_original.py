"""The chunked first stage against CogVideo's autoencoder, with random weights, at a small size."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import in_checkout

TARGET = "sat_ext.cogvideo.ChunkedFirstStage"


def config(sat: Path, **options: Any) -> dict[str, Any]:
    """The first stage of the checkout's own YAML, four times narrower, and without a file of weights."""
    import yaml

    stage: dict[str, Any] = yaml.safe_load(next(sat.glob("configs/cogvideox*5b_i2v.yaml")).read_text())["model"][
        "first_stage_config"
    ]
    params = stage["params"]
    del params["ckpt_path"]
    for part in ("encoder_config", "decoder_config"):
        params[part]["params"].update(ch=32, num_res_blocks=2)
    if options:
        stage["target"] = TARGET
        params.update(options)
    return stage


def pair(sat: Path, **options: Any) -> tuple[Any, Any]:
    """CogVideo's autoencoder, and the chunked one with its weights."""
    import torch
    from sgm.util import instantiate_from_config, is_context_parallel_initialized, set_context_parallel_group
    from torch import distributed

    if not is_context_parallel_initialized():
        distributed.init_process_group("gloo")
        set_context_parallel_group(1, distributed.group.WORLD)
    torch.manual_seed(0)
    whole = instantiate_from_config(config(sat)).eval()
    for parameter in whole.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)  # norms too
    chunked = instantiate_from_config(config(sat, **options)).eval()
    missing, unexpected = chunked.load_state_dict(whole.state_dict(), strict=False)
    assert not missing and not unexpected
    return whole, chunked


def clip(frames: int) -> Any:
    """Noise whose level changes over time, so that the norms' statistics of one chunk are not the clip's."""
    import torch

    return (torch.linspace(0.1, 1.0, frames)[:, None, None] * torch.randn(1, 3, frames, 16, 24)).clamp(-1, 1)


def check_latents_are_the_original_s(sat: Path) -> None:
    import torch

    for recompute in ("block", "level"):
        whole, chunked = pair(sat, frames=8, recompute=recompute)
        for frames in (1, 5, 9, 17, 33, 49):
            pixels = clip(frames)
            torch.manual_seed(1)
            with torch.no_grad():
                expected = whole.encode(pixels)
            state = torch.random.get_rng_state()
            torch.manual_seed(1)
            latents = chunked.encode(pixels)
            assert torch.equal(torch.random.get_rng_state(), state)
            assert latents.shape == (1, 16, (frames - 1) // 4 + 1, 2, 3)
            torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)


def check_bfloat16_is_as_near_to_float32_as_the_original(sat: Path) -> None:
    import torch

    whole, chunked = pair(sat, frames=4)
    rounded = copy.deepcopy(whole).bfloat16()
    chunked.bfloat16()
    whole.load_state_dict({k: v.float() for k, v in rounded.state_dict().items()})
    ratios = []
    for frames in (1, 5, 9, 17, 33, 49):
        pixels = clip(frames).bfloat16()
        with torch.no_grad():
            exact = whole.encoder(pixels.float())
            theirs = (rounded.encoder(pixels) - exact).norm()
            ours = (chunked.encode(pixels, unregularized=True)[0] - exact).norm()
        ratios.append(float(ours / theirs))
    # each is the ratio of two roundings of a few hundred numbers, now above and now below 1
    assert max(ratios) < 1.5 and sum(ratios) / len(ratios) < 1.15, ratios


def check_the_engine_s_slices_are_encoded_alike(sat: Path) -> None:
    """The engine encodes the batch, and an I2V model's first frame beside it, with one regularizer log at most."""
    import torch

    whole, chunked = pair(sat, clips=1)
    pixels = torch.cat([clip(5), clip(5)])
    torch.manual_seed(1)
    with torch.no_grad():
        expected, log = whole.encode(pixels, return_reg_log=True)
    torch.manual_seed(1)
    latents, ours = chunked.encode(pixels, return_reg_log=True)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours["kl_loss"], log["kl_loss"], rtol=1e-4, atol=1e-3)


def check_the_peak_of_all_activations_falls(sat: Path) -> None:
    from test_first_stage import peak_bytes

    pixels = clip(49)
    whole, blocks = pair(sat, frames=4)
    _, level = pair(sat, frames=4, recompute="level")
    peaks = [peak_bytes(stage, pixels) for stage in (whole, blocks, level)]
    activation = 4 * 32 * pixels[0, 0].numel()  # one at full resolution, of the whole clip
    assert peaks[0] > 4 * activation, peaks
    assert peaks[1] < 1.7 * activation, peaks
    assert peaks[2] < 0.9 * activation, peaks


def check_decoding_is_the_original_s(sat: Path) -> None:
    import torch

    whole, chunked = pair(sat, clips=1)
    latents = torch.randn(1, 16, 3, 3, 4)
    with torch.no_grad():
        assert torch.equal(chunked.decode(latents), whole.decode(latents))


test_original = in_checkout.test_of(__file__)
if __name__ == "__main__":
    in_checkout.main(globals())
