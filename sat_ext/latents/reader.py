"""What a record shows, and the entry that its latents have in a cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sat_ext.data.clips import sample_times
from sat_ext.data.index import Group, Index
from sat_ext.data.params import DataConfig
from sat_ext.data.parts import file_times, part_info
from sat_ext.files import suffix_of
from sat_ext.latents.store import CacheConfig, Entry, LatentStore, fingerprint_of
from sat_ext.types import IMAGE_EXTENSIONS, Bucket, Item, Sample


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """One visit of a record: the moments of its file to show (None for a still), and what they are called.

    `seen` is which file it was when the index was made (`Index.seen`).
    """

    item: Item
    source: str
    bucket: Bucket
    times: tuple[float, ...] | None
    num_frames: int
    fps: int
    seen: tuple[str, float]

    def sample(self, pixels: Tensor, caption: str) -> Sample:
        """With its pixels (T, 3, H, W)."""
        return Sample(
            pixels=pixels, caption=caption, num_frames=self.num_frames, fps=self.fps,
            kind="image" if self.bucket.frames == 1 else "video", source=self.source, key=self.item.key,
        )  # fmt: skip


def show(index: Index, config: DataConfig, group: Group, record: int, rng: np.random.Generator) -> Shown:
    """What a visit of `record` of `group` shows; samplers that draw do from `rng`."""
    row = int(group.rows[record])
    item, whole = index.item(row)
    times, num_frames, fps = None, 1, config.fps
    if whole.frames > 1 or suffix_of(item.path) not in IMAGE_EXTENSIONS:
        clip = sample_times(
            index.samplers[group.source],
            info=part_info(item, whole),
            frames=group.bucket.frames,
            fps=config.fps,
            rng=rng,
            short=config.short_clips,
            skip_frames=config.skip_frms_num,
            window=0 if group.windows is None else int(group.windows[record]),
        )
        times, num_frames, fps = tuple(file_times(item, whole, clip.times)), clip.num_frames, clip.fps
    return Shown(
        item=item, source=group.source, bucket=group.bucket, times=times, num_frames=num_frames, fps=fps,
        seen=index.seen(row),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Cached:
    """Latents in place of media. `media` (from `media_codes`) tells the files of the index's rows apart, `encoder`
    is the first stage's fingerprint. Without `draws` (evaluations) latents are the posterior's mode, and the
    condition is the clean frame's. `conditions`: the model wants a condition, which is zero for stills.
    `as_pixels`: its engine takes latents in `mp4`, as CogVideo's does.
    """

    store: LatentStore
    config: CacheConfig
    media: np.ndarray
    encoder: str
    draws: bool
    conditions: bool
    as_pixels: bool = False

    def find(self, index: Index, config: DataConfig, group: Group, record: int, visit: int) -> tuple[Shown, Entry]:
        """What visit number `visit` of a record shows, and its entry."""
        row = int(group.rows[record])
        window = 0 if group.windows is None else int(group.windows[record])
        item, _ = index.item(row)
        name = f"{group.source}/{item.key}"
        # of the record's name and the draw alone, so that other files and shares do not change it
        seeds = [config.seed, int(fingerprint_of(name)[:16], 16), window, visit % self.config.clips]
        shown = show(index, config, group, record, np.random.default_rng(seeds))
        times = None if shown.times is None else [round(t, 6) for t in shown.times]
        media = f"{int(self.media[row]):016x}"
        clip = fingerprint_of(times, item.crop)
        return shown, Entry(name=name, media=media, clip=clip, size=str(group.bucket), encoder=self.encoder)

    def read(self, entry: Entry, visit: int, rng: np.random.Generator) -> dict[str, Tensor]:
        """`latents` and, of an image-to-video model, `condition_latents` (1, C, h, w). Raises `MediaError`."""
        parts = self.store.read(entry.key)
        latents = parts["mean"]
        if self.draws and "std" in parts:
            generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
            noise = torch.randn(latents.shape, generator=generator)
            latents = (latents.float() + parts["std"].float() * noise).to(latents.dtype)
        found = {"latents": latents}
        if self.conditions and "first" not in parts:
            found["condition_latents"] = torch.zeros_like(latents[:1])
        elif self.conditions:
            noisy = parts["noisy"]
            found["condition_latents"] = (
                noisy[visit // self.config.clips % len(noisy)] if self.draws else parts["first"]
            )
        return found

    def wanted(self, index: Index, config: DataConfig) -> Iterator[tuple[Shown, Entry]]:
        """Every entry that training on `index` can ask for, each once."""
        seen: set[str] = set()
        for group in index.groups:
            for record in range(len(group.rows)):
                for draw in range(self.config.clips):
                    shown, entry = self.find(index, config, group, record, draw)
                    if entry.key not in seen:
                        seen.add(entry.key)
                        yield shown, entry


def media_codes(index: Index) -> np.ndarray:
    """For each row of the index's table a number (uint64) that changes when its file does."""
    prints: list[str] = index.table["fingerprint"].to_pylist()
    codes = {text: int(fingerprint_of(text)[:16], 16) for text in dict.fromkeys(prints)}
    return np.array([codes[text] for text in prints], np.uint64)
