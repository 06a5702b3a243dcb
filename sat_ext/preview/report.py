"""The preview's contents, ready to print, and the one HTML file that prints them: no network, no script."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import jinja2
from PIL import Image

from sat_ext.preview.charts import Chart
from sat_ext.recipe import Recipe
from sat_ext.types import Bucket


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """One picture of a film strip: its bytes, and its size for the browser to reserve the place.

    `label` is its time; `repeated`: it only fills up a short clip."""

    uri: str
    width: int
    height: int
    label: str
    repeated: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """One sample as the model gets it. `origin` says what was done to the file."""

    frames: Sequence[Frame]
    caption: str
    source: str
    key: str
    origin: str


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketPart:
    """One bucket. Shares are of all samples and of all work of the first steps, 0 to 1; `cost` is of one sample,
    relative to the costliest; `batch` is a number or range of samples; `remark` says why samples are missing."""

    bucket: Bucket
    records: int
    tokens: int
    batch: str
    cost: float
    share: float
    work_share: float
    samples: Sequence[Shown]
    remark: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SourcePart:
    """One source. `asked` and `got` are shares of the samples; in `steps` each record is seen once.

    `epochs` is how often the whole run (`args.train_iters`) sees each record; None where that is not set."""

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

    level: Literal["problem", "warning", "note"]
    text: str
    remedy: str
    examples: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The page. `samples` and shares are counted over the first `looked` steps of the schedule on `world` GPUs;
    `efficiency` is the mean work of a step over the costliest step's. `reasons` are why files are left out: each
    with how many, and some of them."""

    recipe: Recipe
    yaml: Sequence[str]
    clips: int
    clip_time: timedelta
    stills: int
    world: int
    looked: int
    samples: int
    efficiency: float
    findings: Sequence[Finding]
    sources: Sequence[SourcePart]
    buckets: Sequence[BucketPart]
    charts: Sequence[Chart]
    reasons: Sequence[tuple[str, int, Sequence[str]]]

    @property
    def verdict(self) -> str:
        """The page's headline."""
        problems, warnings = (sum(f.level == level for f in self.findings) for level in ("problem", "warning"))
        looks = f"{warnings}\u00a0thing{'' if warnings == 1 else 's'} worth a look" if warnings else ""
        if problems:
            first = f"{problems}\u00a0problem{'' if problems == 1 else 's'} to fix first"
            return f"{first}, and {looks}." if looks else f"{first}."
        return f"Ready to train, with {looks}." if looks else "Ready to train."


def render(report: Report) -> str:
    """The page. All text is escaped: captions and file names may hold anything."""
    return environment().get_template("page.html.j2").render(report=report)


def environment() -> jinja2.Environment:
    """The templates of all pages, and what they are printed with."""
    packages = [jinja2.PackageLoader(f"sat_ext.{name}", ".") for name in ("preview", "report")]
    made = jinja2.Environment(
        loader=jinja2.ChoiceLoader(packages),
        autoescape=True,
        undefined=jinja2.StrictUndefined,  # a misspelt name fails, where it would print nothing
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(percent=percent, count=count)
    return made


def webp(image: Image.Image, quality: int) -> str:
    """A picture as a data: URI."""
    out = io.BytesIO()
    image.save(out, "WEBP", quality=quality)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def percent(share: float) -> str:
    r"""A share of 1 in percent, never 0 for what is there and never 100 for what is not all.

    >>> percent(0.4), percent(0.004), percent(0.0004), percent(0.9996), percent(0.0)
    ('40\xa0%', '0.4\xa0%', 'under 0.1\xa0%', 'over 99.9\xa0%', '0\xa0%')
    """
    if 0 < share < 0.001:
        return "under 0.1\u00a0%"
    if 0.999 < share < 1 - 1e-9:
        return "over 99.9\u00a0%"
    digits = 1 if abs(100 * share - round(100 * share)) >= 0.05 and (share < 0.1 or share > 0.9) else 0
    return f"{100 * share:.{digits}f}\u00a0%"


def count(number: float) -> str:
    """A number with its thousands apart; below 10 with a decimal where it is not whole.

    >>> count(1234567), count(2.46), count(3.0)
    ('1,234,567', '2.5', '3')
    """
    if number < 10 and abs(number - round(number)) >= 0.05:
        return f"{number:.1f}"
    return f"{number:,.0f}"
