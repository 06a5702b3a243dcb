"""What one visit of a record shows: which moments of its file, and which of its captions."""

from dataclasses import dataclass

import numpy as np
import torch

from sat_ext.data.clips import sample_times
from sat_ext.data.index import Group, Index
from sat_ext.data.params import DataConfig
from sat_ext.data.parts import file_times, part_info
from sat_ext.files import suffix_of
from sat_ext.types import IMAGE_EXTENSIONS, Bucket, Item, Sample


@dataclass(frozen=True, kw_only=True, slots=True)
class Visit:
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

    def sample(self, pixels: torch.Tensor, caption: str, condition: torch.Tensor | None = None) -> Sample:
        """The sample of these pixels or latents."""
        return Sample(
            pixels=pixels, caption=caption, num_frames=self.num_frames, fps=self.fps,
            kind="image" if self.bucket.frames == 1 else "video", source=self.source, key=self.item.key,
            condition=condition,
        )  # fmt: skip


def visit_of(index: Index, config: DataConfig, group: Group, record: int, rng: np.random.Generator) -> Visit:
    """A visit of `record` of `group`; `rng` is what random samplers draw from."""
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
    return Visit(
        item=item, source=group.source, bucket=group.bucket, times=times, num_frames=num_frames, fps=fps,
        seen=index.seen(row),
    )  # fmt: skip


def draw_caption(item: Item, rng: np.random.Generator) -> str:
    """One of the item's captions. A single one takes no draw, so that it changes no other random number."""
    if len(item.captions) == 1:
        return item.captions[0]
    weights = np.array(item.caption_weights or (1.0,) * len(item.captions))
    return item.captions[int(rng.choice(len(weights), p=weights / weights.sum()))]
