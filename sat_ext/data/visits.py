"""Visits of records: which moments of its file and which of its captions a sample shows, and its pixels."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod

import numpy as np
import pyarrow.compute as pc
import torch

from sat_ext.data.clips import sample_times
from sat_ext.data.decode import read_frames, read_still
from sat_ext.data.index import Group, Index
from sat_ext.data.params import DataConfig
from sat_ext.data.parts import file_times, part_info
from sat_ext.data.transform import Fit
from sat_ext.files import is_url, open_ahead, require_unchanged, suffix_of
from sat_ext.types import IMAGE_EXTENSIONS, Bucket, Item, MediaInfo, Sample

_SOON = 32  # files that are opened before they are read
_SLACK = 64  # bytes between the samples of a batch in shared memory

Soon = Sequence[tuple[str, str]]  # paths and fingerprints
ReadPixels = Callable[..., np.ndarray]  # `read_pixels`, or a guard of it


@dataclass(frozen=True, kw_only=True, slots=True)
class Visit:
    """One visit of a record: the `times` of its file to show (None for a still), and what they are called.

    `seen` is which file it was when the index was made (`Index.seen`).
    """

    item: Item
    source: str
    bucket: Bucket
    times: tuple[float, ...] | None
    num_frames: int
    fps: int
    seen: tuple[str, float]

    def pixels(self, decoder: str, read: ReadPixels, soon: Soon = ()) -> torch.Tensor:
        """The pixels, uint8 (T, 3, height, width), in memory that a guard reuses after its `release`. `soon`: see
        `read_pixels`.

        Raises `MediaError`.
        """
        fit = Fit(self.bucket.height, self.bucket.width, self.item.crop)
        return torch.from_numpy(read(self.item.path, self.times, decoder, fit, self.seen, soon))

    def sample(self, pixels: torch.Tensor, caption: str, condition: torch.Tensor | None = None) -> Sample:
        """The sample of these pixels or latents."""
        return Sample(
            pixels=pixels, caption=caption, num_frames=self.num_frames, fps=self.fps,
            kind=self.bucket.kind, source=self.source, key=self.item.key,
            condition=condition,
        )  # fmt: skip


def visit_of(
    index: Index,
    config: DataConfig,
    group: Group,
    record: int,
    rng: np.random.Generator,
    known: tuple[Item, MediaInfo, str] | None = None,
) -> Visit:
    """A visit of `record` of `group`; `rng` is what random samplers draw from.

    `known` is what `Index.items` gives for its row: one who asks for many rows gets them faster.
    """
    item, whole, fingerprint = known or next(index.items(group.rows[record : record + 1]))
    times, num_frames, fps = None, 1, config.fps
    # a video of one frame is a still, too, but one that only a video decoder reads
    if whole.frames > 1 or suffix_of(item.path) not in IMAGE_EXTENSIONS:
        of_part, num_frames, fps = sample_times(
            index.samplers[group.source],
            info=part_info(item, whole),
            frames=group.bucket.frames,
            fps=config.fps,
            rng=rng,
            short=config.short_clips,
            skip_frames=config.skip_frms_num,
            window=group.window(record),
        )
        times = file_times(item, whole, of_part)
    return Visit(
        item=item, source=group.source, bucket=group.bucket, times=times, num_frames=num_frames, fps=fps,
        seen=(fingerprint, index.made),
    )  # fmt: skip


def draw_caption(item: Item, rng: np.random.Generator) -> str:
    """One of the item's captions."""
    if len(item.captions) == 1:  # no draw, which would change the visit's random numbers after it
        return item.captions[0]
    weights = np.array(item.caption_weights or (1.0,) * len(item.captions))
    return item.captions[int(rng.choice(len(weights), p=weights / weights.sum()))]


def read_pixels(
    path: str,
    times: Sequence[float] | None,
    decoder: str,
    fit: Fit,
    seen: tuple[str, float],
    soon: Soon = (),
) -> np.ndarray:
    """The pixels of one sample, uint8 (T, 3, height, width): the frames at `times`, or a still where that is None.

    `soon`: remote files that will be read next, as `open_ahead` takes them.

    Raises `MediaError`, also for a file that has been replaced since it was `seen`.
    """
    open_ahead(((path, seen[0]), *soon))
    require_unchanged(path, *seen)  # here, in the guard's process, as a lost network file system hangs on it
    return read_still(path, fit=fit) if times is None else read_frames(path, times, decoder=decoder, fit=fit)


def sample_capacity(bucket: Bucket) -> int:
    """Bytes that a sample of the bucket takes in a guard's shared memory."""
    return _SLACK + 3 * prod((bucket.frames, bucket.height, bucket.width))


class MediaReader:
    """The records of an index as samples of uint8 pixels."""

    def __init__(self, index: Index, config: DataConfig, read: ReadPixels) -> None:
        self.index, self.config, self._read = index, config, read
        self._has_urls = pc.any(pc.match_substring(index.table["path"], "://")).as_py()
        self._soon: dict[str, str] = {}

    def expect(self, coming: Iterable[tuple[Group, Sequence[int]]]) -> None:
        """These records will be read after those of earlier calls."""
        for group, records in coming if self._has_urls else ():
            for record in records:
                item, _, fingerprint = next(self.index.items(group.rows[record : record + 1]))
                if is_url(item.path):
                    self._soon.setdefault(item.path, fingerprint)

    def read(self, group: Group, record: int, number: int, rng: np.random.Generator) -> Sample:
        """A visit of a record, whatever its `number`. Raises `MediaError`."""
        visit = visit_of(self.index, self.config, group, record, rng)
        caption = draw_caption(visit.item, rng)
        if visit.item.path in self._soon:  # what comes before it was found bad, and left out
            while next(iter(self._soon)) != visit.item.path:
                del self._soon[next(iter(self._soon))]
            del self._soon[visit.item.path]
        soon = tuple(islice(self._soon.items(), _SOON))
        return visit.sample(visit.pixels(self.config.decoder, self._read, soon), caption)
