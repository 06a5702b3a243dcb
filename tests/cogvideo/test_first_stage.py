"""The chunked first stage against a small double of CogVideo's autoencoder, which encodes a clip whole."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sat_ext.cogvideo.chunked_first_stage import ChunkedFirstStage
from sat_ext.errors import ConfigError, DataError

PARENT = f"{__name__}.Autoencoder"
LENGTHS = [1, 5, 9, 13, 17, 33, 49]


class Causal(nn.Module):
    """As `ContextParallelCausalConv3d` is seen from outside, on one GPU."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.time_kernel_size, self.height_pad, self.width_pad = 3, 1, 1
        self.conv = nn.Conv3d(channels_in, channels_out, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(torch.cat([x[:, :, :1]] * 2 + [x], dim=2), (1, 1, 1, 1)))


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class Residual(nn.Module):
    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, channels_in), nn.GroupNorm(4, channels_out)
        self.conv1, self.conv2 = Causal(channels_in, channels_out), Causal(channels_out, channels_out)
        if channels_in != channels_out:
            self.nin_shortcut = nn.Conv3d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv2(swish(self.norm2(self.conv1(swish(self.norm1(x))))))
        return inner + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Down(nn.Module):
    def __init__(self, channels: int, compress_time: bool) -> None:
        super().__init__()
        self.compress_time = compress_time
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        if self.compress_time and x.shape[2] > 1:
            x = torch.cat([x[:, :, :1], F.avg_pool3d(x[:, :, 1:].float(), (2, 1, 1)).to(x.dtype)], dim=2)
        frames = F.pad(x, (0, 1, 0, 1)).transpose(1, 2)
        return self.conv(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).transpose(1, 2)


class Encoder(nn.Module):
    """As `ContextParallelEncoder3D` is seen from outside: 4x in time, 8x in space, posterior parameters out."""

    temporal_compress_level = 2

    def __init__(self, attention: bool = False) -> None:
        super().__init__()
        widths = (8, 8, 16, 16)
        self.conv_in = Causal(3, widths[0])
        self.down = nn.ModuleList()
        before = widths[0]
        for number, width in enumerate(widths):
            level = nn.Module()
            level.block = nn.ModuleList([Residual(before, width), Residual(width, width)])
            level.attn = nn.ModuleList([nn.Identity()] if attention else [])
            if number < len(widths) - 1:
                level.downsample = Down(width, compress_time=number < self.temporal_compress_level)
            self.down.append(level)
            before = width
        self.mid = nn.Module()
        self.mid.block_1, self.mid.block_2 = Residual(before, before), Residual(before, before)
        self.norm_out, self.conv_out = nn.GroupNorm(4, before), Causal(before, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            for block in level.block:
                x = block(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        return self.conv_out(swish(self.norm_out(self.mid.block_2(self.mid.block_1(x)))))


class Gaussian(nn.Module):
    def forward(self, moments: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        mean, logvar = moments.chunk(2, dim=1)
        return mean + torch.exp(0.5 * logvar) * torch.randn_like(mean), {"kl_loss": logvar.sum()}


class Autoencoder(nn.Module):
    """As `VideoAutoencoderInferenceWrapper` is seen from outside."""

    def __init__(self, cp_size: int = 0, attention: bool = False, plain: bool = False) -> None:
        super().__init__()
        self.encoder = nn.Conv3d(3, 4, 1) if plain else Encoder(attention)
        self.decoder = nn.Linear(2, 3)
        self.regularization = Gaussian()

    def encode(self, x: Tensor) -> Tensor:
        return self.regularization(self.encoder(x))[0]

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)


def pair(**options: Any) -> tuple[Autoencoder, Any]:
    """An autoencoder, and the chunked one with its weights."""
    torch.manual_seed(0)
    whole = Autoencoder().eval()
    for parameter in whole.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)  # norms' too
    chunked: Any = ChunkedFirstStage(parent=PARENT, **options)
    chunked.load_state_dict(whole.state_dict())
    return whole, chunked.eval()


def clip(frames: int, samples: int = 1, size: tuple[int, int] = (16, 24)) -> Tensor:
    """Noise whose level changes over time, so that the norms' statistics of one chunk are not the clip's."""
    ramp = torch.linspace(0.1, 1.0, frames)[:, None, None]
    return (ramp * torch.randn(samples, 3, frames, *size)).clamp(-1, 1)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made inside that are alive, and keeps the highest count."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def peak_bytes(stage: Any, pixels: Tensor) -> int:
    with LiveBytes(pixels) as memory, torch.no_grad():
        stage.encode(pixels)
    return memory.peak


@pytest.mark.parametrize(("frames", "recompute"), [(4, "block"), (8, "level"), (16, "block")])
def test_chunks_give_the_latents_of_the_whole_clip(frames: int, recompute: str) -> None:
    whole, chunked = pair(frames=frames, recompute=recompute)
    for length in LENGTHS:
        pixels = clip(length)
        torch.manual_seed(1)
        expected = whole.encode(pixels)
        torch.manual_seed(1)
        latents = chunked.encode(pixels)
        assert latents.shape == (1, 2, (length - 1) // 4 + 1, 2, 3)
        torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)


def test_chunks_normed_on_their_own_would_give_other_latents() -> None:
    whole, chunked = pair()
    pixels = clip(17)
    with torch.no_grad():
        first_chunk = whole.encoder(pixels[:, :, :9])
    moments = chunked.encode(pixels, unregularized=True)[0]
    assert (moments[:, :, :3] - first_chunk).norm() > 0.05 * first_chunk.norm()


def test_bfloat16_chunks_are_as_near_to_float32_as_the_whole_clip() -> None:
    whole, chunked = pair()
    pixels = clip(33).bfloat16()
    with torch.no_grad():
        exact = whole.encoder(pixels.float())
        rounded = whole.bfloat16().encoder(pixels)
    moments = chunked.bfloat16().encode(pixels, unregularized=True)[0]
    assert moments.dtype == torch.bfloat16
    assert (moments - exact).norm() < 1.3 * (rounded - exact).norm()


def test_the_posterior_is_sampled_once_from_the_same_random_numbers() -> None:
    whole, chunked = pair(frames=4, clips=1)
    pixels = clip(9, samples=3)
    torch.manual_seed(1)
    expected = whole.encode(pixels)
    following = torch.rand(1)
    torch.manual_seed(1)
    latents, log = chunked.encode(pixels, return_reg_log=True)
    assert torch.equal(torch.rand(1), following)
    assert log.keys() == {"kl_loss"}
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("clips", [1, 2, 5])
def test_samples_do_not_mix_whatever_their_number_at_a_time(clips: int) -> None:
    _, chunked = pair(clips=clips)
    pixels = clip(9, samples=3)
    alone = torch.cat([chunked.encode(sample, unregularized=True)[0] for sample in pixels.split(1)])
    torch.testing.assert_close(chunked.encode(pixels, unregularized=True)[0], alone, rtol=1e-5, atol=1e-5)


def test_the_largest_activation_is_a_chunk_s() -> None:
    whole, chunked = pair(frames=8)
    largest: list[int] = []
    for stage in (whole, chunked):
        sizes: list[int] = []
        handles = [
            m.register_forward_hook(lambda _m, _i, out, sizes=sizes: sizes.append(out.numel()))
            for m in stage.encoder.modules()
            if isinstance(m, (nn.Conv3d, nn.GroupNorm))
        ]
        with torch.no_grad():
            stage.encode(clip(49))
        largest.append(max(sizes))
        assert all(handle.id is not None for handle in handles)
    assert largest == [8 * 49 * 16 * 24, 8 * 9 * 16 * 24]


def test_the_peak_of_all_activations_falls() -> None:
    whole, blocks = pair(frames=4)
    _, level = pair(frames=4, recompute="level")
    long, short = clip(49), clip(25)
    activation = 4 * 8 * long[0, 0].numel()  # one at full resolution, of the whole clip
    assert peak_bytes(whole, long) > 4 * activation
    assert peak_bytes(blocks, long) < 1.6 * activation
    assert peak_bytes(level, long) < 0.8 * activation
    # what is held at half the resolution still grows
    assert peak_bytes(level, long) - peak_bytes(level, short) < 0.25 * (activation / 49 * 24)


def test_many_clips_cost_the_peak_of_one() -> None:
    _, chunked = pair()
    assert peak_bytes(chunked, clip(9, samples=4)) < 1.1 * peak_bytes(chunked, clip(9))


def test_weights_decoder_and_class_are_the_parent_s() -> None:
    whole, chunked = pair()
    assert isinstance(chunked, Autoencoder) and isinstance(chunked, ChunkedFirstStage)
    assert list(chunked.state_dict()) == list(whole.state_dict())
    latents = torch.randn(1, 2)
    assert torch.equal(chunked.decode(latents), whole.decode(latents))
    pixels = clip(5)
    with torch.no_grad():
        assert torch.equal(chunked.encoder(pixels), whole.encoder(pixels))  # called whole, it is as it was


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 6}, r"params\.frames: 6 is not a multiple of 4, the frames of one latent frame; use 8\.$"),
        ({"frames": 0}, r"params\.frames: 0 is not a multiple of 4, the frames of one latent frame; use 4\.$"),
        ({"clips": 0}, r"params\.clips: 0 is below 1; 1 encodes the batch sample by sample\.$"),
        (
            {"recompute": "blok"},
            r"params\.recompute: 'blok' is not one of block, level \(did you mean 'block'\?\)",
        ),
        ({"cp_size": 2}, r"params\.cp_size: 2 splits a clip over GPUs, and chunks do not; set 1\.$"),
        ({"frame": 8}, r"first_stage_config\.params: unknown key 'frame'; did you mean 'frames'\?$"),
        ({"attention": True}, r"encoder_config: Encoder of .*Autoencoder is not built like .* out\.$"),
        ({"plain": True}, r"encoder_config: Conv3d of .*Autoencoder is not built like .* out\.$"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ChunkedFirstStage(parent=PARENT, **options)


def test_a_clip_that_does_not_divide_is_named() -> None:
    _, chunked = pair()
    with pytest.raises(DataError, match=r"^A clip of 8 frames cannot .* another; use 5 or 9 frames\.$"):
        chunked.encode(clip(8))
