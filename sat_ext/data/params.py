"""`data.params` of the YAML as one frozen dataclass, with the checks that need more than one key."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal

from sat_ext.cogvideox import SequenceShape, tokens
from sat_ext.config import convert
from sat_ext.data.buckets import BucketConfig, StepSize, batch_sizes, make_buckets, pack_budget
from sat_ext.data.captions import CaptionConfig
from sat_ext.data.clips import find_sampler
from sat_ext.data.sources import SourceConfig, check_roots
from sat_ext.errors import ConfigError
from sat_ext.latents.store import CacheConfig
from sat_ext.types import Bucket, MixPart, ShortClips

MOST_SAMPLES = 4096  # of a rank's step: far more than any GPU holds


@dataclass(frozen=True, kw_only=True)
class BadSampleConfig:
    """How many unreadable files a run tolerates."""

    skip: int = 100  # different ones in all
    consecutive: int = 20  # in a row
    timeout: float = 60.0  # seconds, after which a file counts as unreadable

    def __post_init__(self) -> None:
        if not 0 < self.timeout <= 86_400:
            raise ConfigError(
                f"data.params.on_bad_sample.timeout: {self.timeout} seconds; use more than 0 (60 is the default) "
                "and at most 86400, a day."
            )
        for name, count in (("skip", self.skip), ("consecutive", self.consecutive)):
            if count < 0:
                raise ConfigError(f"data.params.on_bad_sample.{name}: {count} files; use 0 or more.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on."""

    fps: int = 8  # what the model sees, whatever the rates of the files
    video_size: tuple[int, int] | None = None  # (height, width), short for `buckets.sizes` of one entry
    max_num_frames: int | None = None  # 4k+1, short for `buckets.frames` up to it
    skip_frms_num: float = 0.0  # trimmed from both ends of a clip, as far as it still fills its bucket
    sources: tuple[SourceConfig, ...] = ()  # replaces SAT's `train_data`
    mix: dict[MixPart, float] | None = None  # shares by kind, where sources hold both
    held_out: int | float | None = None  # of the training data, for evaluations: a part below 1, or a number
    caption: CaptionConfig = field(default_factory=CaptionConfig)
    allowed_roots: tuple[str, ...] = ()  # where names and links in the data may lead to: folders, "sftp://"
    buckets: BucketConfig = field(default_factory=BucketConfig)
    # `{cost: auto}`; `{tokens: N}` of a pack; or samples per rank by number of frames, of one bucket a step
    batch: dict[Any, Any] = field(default_factory=lambda: {"cost": "auto"})
    short_clips: ShortClips = "shorter_bucket"
    on_bad_sample: BadSampleConfig = field(default_factory=BadSampleConfig)
    decoder: Literal["auto", "pyav", "decord", "torchcodec"] = "auto"
    cache: CacheConfig | None = None
    seed: int = 0  # of the order of the data, on all ranks

    def __post_init__(self) -> None:
        if self.fps < 1:
            raise ConfigError(f"data.params.fps: {self.fps} frames a second; use 1 or more.")
        if not 0 <= self.skip_frms_num < math.inf:
            raise ConfigError(f"data.params.skip_frms_num: {self.skip_frms_num} frames; use 0 or more.")
        if self.batch != {"cost": "auto"}:
            keys = str if list(self.batch) == ["tokens"] else int
            try:
                sizes = convert(dict[keys, int], self.batch, "data.params.batch")  # type: ignore[valid-type]
            except ConfigError:
                sizes = {}
            if not sizes or min(sizes.values()) < 1:
                raise ConfigError(
                    f"data.params.batch: {self.batch!r}; write {{cost: auto}}, {{tokens: 20000}}, or samples per "
                    "frame count as in {1: 8, 49: 1}."
                )
        if self.mix is not None and not (self.mix and all(0 < share < math.inf for share in self.mix.values())):
            raise ConfigError(
                f"data.params.mix: {self.mix!r}; write shares above 0, as in {{image: 0.4, video: 0.6}}."
            )
        if self.held_out is not None and (self.held_out <= 0 or 1 <= self.held_out != int(self.held_out)):
            raise ConfigError(
                f"data.params.held_out: {self.held_out}; write a part of the records (0.02) or a number of them."
            )
        name_sources(self.sources, "data.params.sources")
        check_roots(self.allowed_roots, "data.params.allowed_roots")

    def make_buckets(self) -> tuple[Bucket, ...]:
        """The buckets, from `buckets` or its short forms. Raises `ConfigError`."""
        return make_buckets(self.buckets, self.video_size, self.max_num_frames)

    @property
    def makes_packs(self) -> bool:
        """Whether `batch` is of packs, and not the samples of one bucket, by frames."""
        return "tokens" in self.batch or self.batch == {"cost": "auto"}

    def step_size(
        self, buckets: tuple[Bucket, ...], *, largest: int, shape: SequenceShape, packs: bool
    ) -> StepSize:
        """The size of a rank's steps; `largest` is SAT's micro-batch, for the costliest bucket. Without `packs` a
        step has one bucket. Raises `ConfigError`."""
        length = {bucket: tokens(bucket, shape) for bucket in buckets}
        batches, budget = batch_sizes(buckets, largest=largest, shape=shape), None
        if self.batch == {"cost": "auto"}:
            budget = pack_budget(buckets, largest=largest, shape=shape)
        elif self.makes_packs:
            budget = int(self.batch["tokens"])
            longest = max(buckets, key=lambda bucket: length[bucket])
            if budget < length[longest]:
                raise ConfigError(
                    f"data.params.batch.tokens: {budget} are too few for one sample of {longest}, which has "
                    f"{length[longest]}; use {length[longest]} or more."
                )
        else:
            by_frames = convert(dict[int, int], self.batch, "data.params.batch")
            if missing := [b.frames for b in buckets if b.frames not in by_frames]:
                raise ConfigError(
                    f"data.params.batch: no size for the buckets of {missing[0]} frames; add '{missing[0]}: 1', "
                    "or write {cost: auto}."
                )
            batches = {bucket: by_frames[bucket.frames] for bucket in buckets}
        if not packs:
            return StepSize(tokens=length, batches=batches)
        shortest = min(buckets, key=lambda bucket: length[bucket])
        if budget is not None and budget > MOST_SAMPLES * length[shortest]:
            value = f"deepspeed.train_micro_batch_size_per_gpu: {largest}"
            if self.batch != {"cost": "auto"}:
                value = f"data.params.batch.tokens: {budget}"
            raise ConfigError(
                f"{value} makes steps of {budget // length[shortest]} samples of {shortest}, more than the "
                f"{MOST_SAMPLES} that a step may have; use less."
            )
        return StepSize(tokens=length, batches=batches, budget=budget)


def sources_of(paths: Sequence[str], weights: Sequence[float] | None = None) -> list[SourceConfig]:
    """One source for each path of SAT's `train_data`; `weights` are its `train_data_weights`."""
    stems = [PurePath(p).stem for p in paths]
    names = [None if stems.count(stem) == 1 else path for stem, path in zip(stems, paths)]
    shares = weights or itertools.repeat(None)
    return [SourceConfig(path=p, name=n, share=s) for p, n, s in zip(paths, names, shares)]


def name_sources(sources: tuple[SourceConfig, ...], where: str) -> dict[str, SourceConfig]:
    """The sources by name, by default their path's. Raises `ConfigError` for a name used twice, for an unknown
    sampler, and if only some of them have a share."""
    named: dict[str, SourceConfig] = {}
    for source in sources:
        find_sampler(source.sampler, f"{where}: sampler")
        name = source.name or PurePath(source.path).stem
        if name in named:
            raise ConfigError(
                f"{where}: two sources are called '{name}' ({named[name].path} and {source.path}); "
                "give each a 'name'."
            )
        named[name] = source
    without = [n for n, s in named.items() if s.share is None]
    if 0 < len(without) < len(named):
        raise ConfigError(
            f"{where}: '{without[0]}' has no share but others have; give every source a share, or none."
        )
    return named
