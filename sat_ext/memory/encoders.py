"""The peaks of what never trains: the first stage's encoder and decoder, and the text encoder. Pure.

Counted on diffusers' `AutoencoderKLCogVideoX` (0.42) and transformers' `T5EncoderModel`, and compared in
`tests/test_memory_encoders.py` with runs of the published sizes on tensors without memory. What cuDNN takes as a
workspace for a convolution is not in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sat_ext.cogvideo.network import PRETRAINED
from sat_ext.memory.run import Run
from sat_ext.models.config import AutoencoderConfig, text_length, transformer_of
from sat_ext.types import Bucket

CACHED_FRAMES = 2  # of a convolution's input, for the next chunk: its kernel of 3 frames, less one
SPLIT = 2 * 1024**3  # bytes, counted as if of 2 a number, over which CogVideoXSafeConv3d convolves in parts
# The decoder's peak for one tile, in its first channels times pixels of a frame: for 1 frame, 9, and more.
DECODED = (41, 135, 179)
TILE = (240, 360)  # pixels: half of `sample_height` and `sample_width` of every published autoencoder


@dataclass(frozen=True, kw_only=True)
class Level:
    """One of the encoder's resolutions: channels in and out, and how often frames and pixels were halved."""

    before: int
    channels: int
    blocks: int
    halved: int
    frames_halved: int


def encode_peak(run: Run, bucket: Bucket) -> int:
    """Bytes on top of all weights while the pixels of a micro-batch become latents, pixels included."""
    first, item = run.model.first_stage, run.itemsize
    samples = run.batches[bucket]
    pixels = samples * bucket.frames * 3 * bucket.height * bucket.width
    given = pixels * (1 + item)  # as they come (uint8), and in the training dtype
    if run.cached:
        return 0
    if first.kind == "cosine":  # fp32: padded pixels, their colours, and blocks of them
        return given + 3 * 4 * pixels
    height, width = bucket.height, bucket.width
    if first.tiling and (height > TILE[0] or width > TILE[1]):
        height, width = min(height, TILE[0]), min(width, TILE[1])
    area = (1 if first.slicing else samples) * height * width
    extra = 0
    if run.whole_clips:  # CogVideo's own encoder has no chunks
        peak = _chunk_peak(first.autoencoder, bucket.frames, area, old=False)
    else:
        chunks = list(_chunks(bucket.frames, first.frames))
        peak = max(_chunk_peak(first.autoencoder, f, area, old=i > 0) for i, f in enumerate(chunks))
        # ChunkedFirstStage: an activation of the clip at full resolution
        if run.model.pretrained == PRETRAINED and run.recompute == "block":
            extra = first.autoencoder.block_out_channels[0] * bucket.frames * area
    return given + (peak + extra) * item


def _chunks(frames: int, size: int) -> Iterator[int]:
    """Frames of the chunks: the first takes what is left over."""
    for i in range(max(frames // size, 1)):
        yield min(size, frames) + (frames % size if i == 0 and frames > size else 0)


def _levels(config: AutoencoderConfig) -> Iterator[Level]:
    before = config.block_out_channels[0]
    for i, channels in enumerate(config.block_out_channels):
        yield Level(
            before=before, channels=channels, blocks=config.layers_per_block, halved=i, frames_halved=min(i, 2)
        )
        before = channels


def _chunk_peak(config: AutoencoderConfig, frames: int, area: int, *, old: bool) -> int:
    """Numbers at the peak of one chunk of `frames` pixel frames; `old`: there was a chunk before it.

    At each resolution the peak is the last convolution: the input of the resolution and of the block, the
    activated input, the same with the frames before it, and the output: 5 times the frames and the 2 of the
    cache. Caches of the convolutions so far wait for the next chunk, and those of the last chunk are still there.
    """
    peak, made = 0, CACHED_FRAMES * 3 * area  # of conv_in
    levels = list(_levels(config))
    every = made + sum(_caches(level, area) for level in levels) + _caches_after(levels[-1], area)
    for level in levels:
        made += _caches(level, area)
        here, time = area // 4**level.halved, max(1, frames // 2**level.frames_halved)
        plain = (5 * time + CACHED_FRAMES) * level.channels * here
        peak = max(peak, plain + _in_parts(time + CACHED_FRAMES, level.channels * here) + made + every * old)
    return peak


def _caches(level: Level, area: int) -> int:
    convolutions = level.before + (2 * level.blocks - 1) * level.channels
    return CACHED_FRAMES * convolutions * (area // 4**level.halved)


def _caches_after(last: Level, area: int) -> int:
    """Of the two blocks in the middle, and of the last convolution."""
    return CACHED_FRAMES * 5 * last.channels * (area // 4**last.halved)


def _in_parts(frames: int, frame: int) -> int:
    """What a convolution takes more where it is done in parts: all but the first copied, their outputs joined."""
    parts = int(2 * frames * frame / SPLIT) + 1 if 2 * frames * frame > SPLIT else 1
    if parts == 1:
        return 0
    first = -(-frames // parts)
    return (frames - first + CACHED_FRAMES * (parts - 1) + frames - CACHED_FRAMES) * frame


def decode_peak(run: Run, bucket: Bucket) -> int:
    """Bytes on top of all weights while one sample's latents become pixels, tile by tile."""
    first = run.model.first_stage
    pixels = 3 * bucket.frames * bucket.height * bucket.width
    if first.kind == "cosine":
        return 3 * 4 * pixels
    area = min(bucket.height, TILE[0]) * min(bucket.width, TILE[1])
    tile = DECODED[(bucket.frames > 1) + (bucket.frames > 9)] * first.autoencoder.block_out_channels[0] * area
    return (tile + pixels) * run.itemsize


def text_peak(run: Run, bucket: Bucket) -> int:
    """Bytes on top of the weights while captions become embeddings, on the GPU.

    A layer of T5 holds its input, the norm of it, and three tensors of the feed-forward's width, or q, k, v and
    the scores of every head, which T5 computes in full, twice (in fp32 for the softmax).
    """
    if run.cached_text or run.model.text.device == "cpu":
        return 0
    width = transformer_of(run.model).text_embed_dim
    length, samples = text_length(run.model), run.batches[bucket]
    heads, inner = max(1, width // 64), int(2.5 * width)
    states = samples * length * width * run.itemsize
    feed_forward = 3 * samples * length * inner * run.itemsize
    scores = samples * heads * length**2 * (2 * run.itemsize + 4)
    return 3 * states + max(feed_forward, 4 * states + scores)
