"""What a data set holds: every file probed once, before anything is chosen."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sat_ext.data.buckets import BucketConfig
from sat_ext.data.index import Index, build_index
from sat_ext.data.index.probing import Probing
from sat_ext.data.params import BadSampleConfig, DataConfig, sources_of
from sat_ext.preview.uses import uses_of
from sat_ext.starter.buckets import Size


@dataclass(frozen=True, kw_only=True)
class Survey:
    """`clips` and `stills` are arrays with a row for each record: its width, height, `seconds` (0 for a still),
    `fps`, and frames `available` at the model's rate."""

    clips: np.ndarray
    stills: np.ndarray
    bad: tuple[tuple[str, str], ...]

    @property
    def shapes(self) -> list[Size]:
        """Width and height of every record."""
        both = np.concatenate([self.clips, self.stills])
        return list(zip(both["width"].astype(int).tolist(), both["height"].astype(int).tolist()))

    def sentences(self) -> list[str]:
        """What was found, for a person."""
        lines = []
        if len(self.clips):
            low, middle, high = np.quantile(self.clips["seconds"], (0, 0.5, 1))
            rates = Counter(round(rate, 2) for rate in self.clips["fps"].tolist()).most_common(3)
            lines.append(
                f"{len(self.clips):,} clips of {low:.1f} to {high:.1f} s (median {middle:.1f} s), at "
                f"{', '.join(f'{rate:g}' for rate, _ in rates)} frames a second"
            )
        if len(self.stills):
            lines.append(f"{len(self.stills):,} stills")
        shapes = Counter(self.shapes).most_common(4)
        others = len(set(self.shapes)) - len(shapes)
        named = ", ".join(f"{w}x{h}" for (w, h), _ in shapes)
        lines.append(f"sizes: {named}{f' and {others} others' if others else ''}")
        if self.bad:
            path, reason = self.bad[0]
            lines.append(
                f"{len(self.bad)} files cannot be read, such as {path} ({reason}); sat-ext check lists them"
            )
        return lines


def survey(paths: Sequence[str], fps: int, native: Size, *, probing: Probing) -> Survey:
    """Read and probe the sources. Raises `DataError` if there is nothing to train on, or a caption is missing."""
    config = DataConfig(
        fps=fps, buckets=BucketConfig(frames=(1, 5), sizes=(native,)),
        on_bad_sample=BadSampleConfig(skip=sys.maxsize),
    )  # fmt: skip
    index: Index = build_index(sources_of(paths), config, probing=probing)
    part = uses_of(index, fps, []).part
    return Survey(clips=part[part["seconds"] > 0], stills=part[part["seconds"] == 0], bad=index.bad)
