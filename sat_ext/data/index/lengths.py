"""Whether enough clips fill the longest bucket: a model is poor at a length that it never trains at."""

from collections import Counter
from collections.abc import Mapping

import numpy as np

from sat_ext.data.clips import find_sampler
from sat_ext.data.index.build import Index
from sat_ext.data.params import DataConfig

NEARLY_EMPTY = 0.1  # of the clips, in the longest bucket
LEFT_OUT = 0  # the length of clips that are too short for every bucket


def clip_lengths(index: Index) -> Counter[int]:
    """How many clips train at which number of frames; samplers of stills do not count."""
    frames = index.table["frames"].to_numpy()
    found: Counter[int] = Counter()
    for group in index.groups:
        if not find_sampler(index.samplers[group.source]).still:
            found[group.bucket.frames] += int((frames[np.unique(group.rows)] > 1).sum())
    reasons = index.left_out["reason"].value_counts().to_pylist()
    found[LEFT_OUT] += sum(reason["counts"] for reason in reasons if is_too_short(reason["values"]))
    return found


def is_too_short(reason: str) -> bool:
    """Whether a file has no bucket for its length."""
    return reason.startswith("too short")


def longest_is_rare(clips: Mapping[int, int], config: DataConfig) -> tuple[str, str] | None:
    """What is wrong and what to do if the longest bucket gets few of the clips (counted by `clip_lengths`).

    None if it gets enough, or if there are no clips.
    """
    total, longest = sum(clips.values()), max(b.frames for b in config.make_buckets())
    filled = clips.get(longest, 0)
    if longest == 1 or not total or filled > NEARLY_EMPTY * total:
        return None
    fates = {LEFT_OUT: "left out", 1: "as stills"}
    shorter = [n for n in sorted(clips, reverse=True) if clips[n] and n != longest]
    others = ", ".join(f"{clips[n]:,} {fates.get(n, f'at {n} frames')}" for n in shorter)
    start = f"none of the {total:,} clips is" if not filled else f"only {filled:,} of the {total:,} clips are"
    seconds = f"{(longest - 1) / config.fps:.3g} s"
    what = (
        f"{start} long enough for the longest bucket ({longest} frames, {seconds} at {config.fps} fps), so the "
        f"model {'never' if not filled else 'hardly'} trains at that length; the others are shorter: {others}"
    )
    enough = [n for n in clips if n > 1 and sum(clips[m] for m in clips if m >= n) > NEARLY_EMPTY * total]
    if not enough:
        change = "give data.params.buckets.frames shorter lengths"
    elif config.buckets.frames is None:
        change = f"set data.params.max_num_frames to {max(enough)}"
    else:
        change = f"take the lengths above {max(enough)} out of data.params.buckets.frames"
    return what, f"add clips of {seconds} or more, or {change}"
