"""CogVideo's video encoder over the chunks of a clip, with the output that it has for the whole clip.

Its convolutions are causal in time: a chunk of frames needs the last ones of the chunk before it, and nothing
after it. Its group norms are not: their statistics are taken over every frame of the clip, so chunks that are
normed on their own (as with diffusers' `num_sample_frames_batch_size`) produce other latents. Here each norm is
measured first, in a pass over all chunks that ends at it, and a last pass applies them all. Every pass computes
its inputs again, so that at most one activation of the whole clip is held."""

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Recompute = Literal["block", "level"]


def encode_clip(encoder: Any, pixels: Tensor, frames: int, recompute: Recompute) -> Tensor:
    """`encoder(pixels)` for (B, 3, T, H, W), computed `frames` frames at a time, and one more at first."""
    stream = list(pixels.tensor_split(tuple(range(frames + 1, pixels.shape[2], frames)), dim=2))
    for segment in segments(encoder, recompute):
        for norm in (n for layer in segment for n in layer.norms):
            for index, chunk in enumerate(stream):
                through(segment, chunk, first=index == 0)
            norm.take()
        # popped: a chunk's memory is free as soon as the next segment's chunk is made of it
        made = [through(segment, stream.pop(0), first=index == 0) for index in range(len(stream))]
        stream = [chunk for chunk in made if chunk is not None]
    return torch.cat(stream, dim=2)


def through(segment: "list[Layer]", chunk: Tensor, *, first: bool) -> Tensor | None:
    """The chunk after the segment's layers; None where it ended at a norm that is still being measured."""
    result: Tensor | None = chunk
    for layer in segment:
        if result is not None:
            result = layer(result, first)
    return result


def segments(encoder: Any, recompute: Recompute) -> "Iterator[list[Layer]]":
    """The encoder's layers in their order, cut where an activation of the whole clip is held."""
    head: list[Layer] = [Convolution(encoder.conv_in)]
    for number, level in enumerate(encoder.down):
        blocks: list[list[Layer]] = [[Block(block)] for block in level.block]
        if hasattr(level, "downsample"):
            blocks[-1].append(Downsample(level.downsample))
        blocks[0] = head + blocks[0]
        head = []
        if number == 0 and recompute == "level":
            blocks = [[layer for block in blocks for layer in block]]
        while blocks:
            yield blocks.pop(0)  # popped: its convolutions hold frames, which must go with it
    yield [Block(encoder.mid.block_1)]
    yield [Block(encoder.mid.block_2)]
    yield [Activated(encoder.norm_out, encoder.conv_out)]


class Convolution:
    """A convolution that is causal in time, over the chunks of a clip: it keeps the frames that the next needs.

    Before the first chunk comes its first frame again, as in CogVideo's `_fake_cp_pass_from_previous_rank`."""

    norms: "tuple[Norm, ...]" = ()
    last: Tensor

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, chunk: Tensor, first: bool) -> Tensor:
        """The output for `chunk`, which is the clip's `first` or follows the one of the last call."""
        return self.module.conv(self.padded(chunk, first))

    def padded(self, chunk: Tensor, first: bool) -> Tensor:
        """`chunk` with the frames before it, and zeros around, in one copy."""
        before = self.module.time_kernel_size - 1
        high, wide = self.module.height_pad, self.module.width_pad
        batch, channels, frames, height, width = chunk.shape
        padded = chunk.new_zeros(batch, channels, before + frames, height + 2 * high, width + 2 * wide)
        inner = padded[..., high : high + height, wide : wide + width]
        inner[:, :, before:] = chunk
        if before:
            inner[:, :, :before] = chunk[:, :, :1] if first else self.last
            self.last = inner[:, :, -before:].clone()
        return padded


class Norm:
    """A group norm over all frames of a clip: measured chunk by chunk, then applied."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.measured: list[tuple[Tensor, Tensor]] = []
        self.statistics: tuple[Tensor, Tensor] | None = None

    def __call__(self, chunk: Tensor) -> Tensor | None:
        """The normed chunk, or None as long as the statistics are being measured."""
        if self.statistics is not None:
            # the module is called, not its weights used, so that ZeRO-3's hooks gather them first
            return self.module(chunk, *self.statistics)
        for frame in chunk.unbind(2):  # one at a time: bfloat16 is widened for it
            values = frame.to(torch.promote_types(frame.dtype, torch.float32))
            groups = values.reshape(len(frame), self.module.num_groups, -1)
            variance, mean = torch.var_mean(groups, dim=2, correction=0)
            self.measured.append((mean, variance))
        return None

    def take(self) -> None:
        """End the measuring."""
        means, variances = (torch.stack(values).double() for values in zip(*self.measured))
        # frames are equal in size, so the clip's variance is their variances' mean plus their means' variance
        variance = variances.mean(0) + means.var(0, correction=0)
        self.statistics = means.mean(0).float(), variance.float()
        self.measured.clear()


def accept_statistics(encoder: nn.Module) -> None:
    """Let every group norm of the encoder take `(x, mean, variance)` too; called with x alone, it is unchanged."""
    for module in encoder.modules():
        if isinstance(module, nn.GroupNorm):
            object.__setattr__(module, "forward", partial(_group_norm, module))


def _group_norm(
    module: nn.GroupNorm, x: Tensor, mean: Tensor | None = None, variance: Tensor | None = None
) -> Tensor:
    """`module`'s output for `x` (B, C, ...), with a mean and variance (B, groups) in place of those of `x`."""
    if mean is None or variance is None:
        return type(module).forward(module, x)
    samples, channels = x.shape[:2]
    repeats = channels // module.num_groups
    # each channel of each sample as a channel of one batch norm, which works in place of several operations
    return F.batch_norm(
        x.reshape(1, samples * channels, *x.shape[2:]),
        mean.repeat_interleave(repeats, dim=1).flatten(),
        variance.repeat_interleave(repeats, dim=1).flatten(),
        module.weight.float().repeat(samples),
        module.bias.float().repeat(samples),
        training=False,
        eps=module.eps,
    ).view(x.shape)


class Activated:
    """Group norm, swish, convolution."""

    def __init__(self, norm: Any, convolution: Any) -> None:
        self.norm, self.convolution = Norm(norm), Convolution(convolution)
        self.norms: tuple[Norm, ...] = (self.norm,)

    def __call__(self, chunk: Tensor, first: bool) -> Tensor | None:
        """The output, or None while the norm is being measured."""
        normed = self.norm(chunk)
        if normed is None:
            return None
        normed *= torch.sigmoid(normed)  # not F.silu, which rounds once where CogVideo's `nonlinearity` does twice
        padded = self.convolution.padded(normed, first)
        del normed  # at full resolution its memory is needed for the convolution's output
        return self.convolution.module.conv(padded)


class Block:
    """A residual block."""

    def __init__(self, block: Any) -> None:
        self.halves = Activated(block.norm1, block.conv1), Activated(block.norm2, block.conv2)
        self.norms = self.halves[0].norms + self.halves[1].norms
        self.shortcut: Any = None  # over the block's input, where the channels change
        if hasattr(block, "conv_shortcut"):
            self.shortcut = Convolution(block.conv_shortcut)
        elif hasattr(block, "nin_shortcut"):
            self.shortcut = lambda chunk, first: block.nin_shortcut(chunk)

    def __call__(self, chunk: Tensor, first: bool) -> Tensor | None:
        """The output, or None while one of its norms is being measured."""
        inner = self.halves[0](chunk, first)
        if inner is not None:
            inner = self.halves[1](inner, first)
        if inner is None:
            return None
        return inner.add_(chunk if self.shortcut is None else self.shortcut(chunk, first))


class Downsample:
    """Half the size, and where the module says so half the frames: the first stays, pairs are averaged."""

    norms: tuple[Norm, ...] = ()

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, chunk: Tensor, first: bool) -> Tensor:
        """The output; the clip's `first` chunk has an odd number of frames, every other an even one."""
        if self.module.compress_time:
            alone, pairs = chunk[:, :, : int(first)], chunk[:, :, int(first) :]
            if pairs.shape[2]:
                pairs = pairs.unflatten(2, (-1, 2)).mean(3)
            chunk = torch.cat([alone, pairs], dim=2)
        # frame by frame CogVideo's module leaves time alone, which its branches pool by different rules
        return torch.cat([self.module(frame) for frame in chunk.split(1, dim=2)], dim=2)


Layer = Convolution | Activated | Block | Downsample
