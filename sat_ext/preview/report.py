"""The preview page's contents, ready to print: what the template needs and nothing of how it was found."""

from dataclasses import dataclass
from typing import Literal

from sat_ext.preview.charts import Chart
from sat_ext.preview.pictures import Picture

Level = Literal["problem", "warning", "note"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """One picture of a film strip; `label` is its time. `repeated`: it only fills up a short clip."""

    picture: Picture
    label: str
    repeated: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """One sample as the model gets it. `origin` says what was done to the file; `condition` is the picture that an
    image-to-video model gets beside the target."""

    frames: tuple[Frame, ...]
    caption: str
    source: str
    key: str
    origin: str
    condition: Picture | None


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketPart:
    """One bucket. Shares are of all samples and of all work of the first steps, 0 to 1; `work` is of one step,
    relative to the costliest step; `cost` is of one sample, relative to the costliest. `condition` says what an
    image-to-video model gets of it, and is empty for others; `remark` says why samples are missing."""

    name: str
    anchor: str
    frames: int
    height: int
    width: int
    seconds: float
    records: int
    tokens: int
    batch: str
    cost: float
    work: float
    loss_weight: str
    share: float
    work_share: float
    samples: tuple[Shown, ...]
    condition: str
    remark: str

    @property
    def title(self) -> str:
        """What its samples are."""
        return "Stills" if self.frames == 1 else f"{self.frames} frames"


@dataclass(frozen=True, kw_only=True, slots=True)
class SourcePart:
    """One source. `asked` and `got` are shares of the samples; in `steps` each record is seen once.

    `epochs` is how often the whole run (`args.train_iters`) sees each record; None where that is not set.
    """

    name: str
    path: str
    sampler: str
    records: int
    asked: float
    got: float
    steps: float
    epochs: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Something to know before training: what, in one plain sentence; what to do; some of the files."""

    level: Level
    text: str
    remedy: str = ""
    examples: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The page. `looked` steps of the schedule were counted, for `world` GPUs; `still_share` and `still_work` are
    the stills' parts of samples and work; `efficiency` is the mean work of a step over the costliest step's;
    `weighs` says whether the engine knows the loss weights."""

    yaml: tuple[str, ...]
    clips: int
    clip_seconds: float
    stills: int
    left_out: int
    world: int
    looked: int
    samples: int
    steps: float
    train_iters: int | None
    still_share: float
    still_work: float
    efficiency: float
    weighs: bool
    conditioning: str
    findings: tuple[Finding, ...]
    sources: tuple[SourcePart, ...]
    buckets: tuple[BucketPart, ...]
    charts: tuple[Chart, ...]
    reasons: tuple[tuple[str, int, tuple[str, ...]], ...]

    @property
    def verdict(self) -> str:
        """The page's headline."""
        problems, warnings = (sum(f.level == level for f in self.findings) for level in ("problem", "warning"))
        looks = f"{warnings}\u00a0thing{'' if warnings == 1 else 's'} worth a look" if warnings else ""
        if problems:
            first = f"{problems}\u00a0problem{'' if problems == 1 else 's'} to fix first"
            return f"{first}, and {looks}." if looks else f"{first}."
        return f"Ready to train, with {looks}." if looks else "Ready to train."

    @property
    def epochs(self) -> float | None:
        """How often the whole run sees the records that it sees least."""
        visits = [s.epochs for s in self.sources if s.epochs is not None]
        return min(visits, default=None)
