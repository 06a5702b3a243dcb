"""From a run's files to its page."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from PIL import Image

from sat_ext.memory.table import gigabytes
from sat_ext.preview.findings import by_reason
from sat_ext.preview.report import environment, webp
from sat_ext.report.charts import LineChart, line_chart
from sat_ext.report.findings import find, share_of_step
from sat_ext.report.read import SHEETS, RunFiles
from sat_ext.types import KINDS

MOST_SHEETS = 12  # evaluations whose samples are shown, the first and the last among them
WIDEST, QUALITY = 1600, 80  # pixels and WebP's quality of a sheet
MOTION = {"model": 0, "base": 2, "held_out": 1}  # colours
PARTS = {  # of a step
    "data": "waiting for data",
    "encode": "captions and pixels to embeddings and latents",
    "forward": "forward pass",
    "backward": "backward pass",
    "optimizer": "optimizer",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sheet:
    """The samples of one evaluation, as a picture in a data: URI."""

    step: int
    uri: str
    width: int
    height: int


def render(run: RunFiles) -> str:
    """The page. All text is escaped: file names may hold anything."""
    bad, dropped = (run.data.get(name, [0, []])[1] for name in ("bad", "dropped"))
    gone = [*bad, *dropped, *((row["path"], row["reason"]) for row in run.skipped)]
    shares = share_of_step(run)
    return environment().get_template("run.html.j2").render(
        run=run, verdict=_verdict(run), figures=_figures(run), findings=find(run), charts=_charts(run),
        parts=[(PARTS[name], share) for name, share in shares.items()],
        samples={SHEETS[kind]: _sheets(of) for kind, of in run.samples.items() if of}, buckets=_buckets(run),
        starts=_starts(run), reasons=by_reason(gone),
    )  # fmt: skip


def _verdict(run: RunFiles) -> str:
    done, of = run.iteration, run.train_iters
    if of is None:
        return f"{done:,} steps."
    return f"All {of:,} steps are done." if done >= of else f"{done:,} of {of:,} steps."


def _figures(run: RunFiles) -> list[tuple[str, str]]:
    """Names and values."""
    found = []
    for kind, name in KINDS.items():
        if run.held_out[kind]:
            found.append((f"held-out loss of {name}", f"{list(run.held_out[kind].values())[-1]:.4g}"))
    seconds = sum(sum(row["seconds"].values()) for row in run.steps)
    if seconds:
        samples, tokens, steps = (sum(row[name] for row in run.steps) for name in ("samples", "tokens", "steps"))
        found.append(("seconds a step", f"{seconds / steps:.3g}"))
        if samples:  # a data set of ours
            found.append(("samples a second", f"{samples / seconds:,.3g}"))
            found.append(("tokens a second", f"{tokens / seconds:,.0f}"))
            found.append(("samples seen", f"{samples:,}"))
        found.append(("of training, without evaluations", str(timedelta(seconds=round(seconds)))))
    return found


def _charts(run: RunFiles) -> list[LineChart]:
    of = run.scalars
    losses, names = {}, list(KINDS.values())
    for color, (kind, name) in enumerate(KINDS.items()):
        losses[f"{name}, training"] = (color, of.get(f"loss_{kind}", {}))
        losses[f"{name}, held out"] = (color, run.held_out[kind])
    if not any(series for _, series in losses.values()):  # a script without losses by kind
        losses = {"training": (0, of.get("train_loss", {})), "held out": (0, of.get("valid_loss", {}))}
    held_out = [name for name in losses if name.endswith("held out")]
    norms = {"all": (2, of.get("grad_norm", {}))}
    norms |= {f"of {names[i]}": (i, of.get(f"gradient_{kind}", {})) for i, kind in enumerate(KINDS)}
    clipped = {"clipped": (2, of.get("clipped", {}))}
    charts = [
        line_chart("Loss", "Dots are held-out samples, always the same ones.", losses, marked=held_out),
        line_chart("Gradient norm", "Of an update, before clipping.", norms, log=True),
        line_chart("Clipped", "The part of the updates that were clipped.", clipped),
        line_chart("Learning rate", "", {"rate": (0, of.get("lr", {}))}),
        *(
            line_chart(
                f"Motion, captions of {KINDS[kind]}",
                "Optical flow of samples, in frame heights a second.",
                {name.replace("_", " "): (MOTION[name], series) for name, series in sorted(found.items())},
            )
            for kind, found in run.motion.items()
        ),
    ]
    return [chart for chart in charts if chart is not None]


def _sheets(of: Mapping[int, Path]) -> list[Sheet]:
    steps = sorted(of)
    if len(steps) > MOST_SHEETS:
        steps = [steps[round(k * (len(steps) - 1) / (MOST_SHEETS - 1))] for k in range(MOST_SHEETS)]
    return [_sheet(step, of[step]) for step in steps]


def _sheet(step: int, file: Path) -> Sheet:
    with Image.open(file) as image:
        shown = image.convert("RGB")
    shown.thumbnail((WIDEST, 10 * WIDEST), Image.Resampling.LANCZOS)
    return Sheet(step=step, uri=webp(shown, QUALITY), width=shown.width, height=shown.height)


def _buckets(run: RunFiles) -> list[list[str]]:
    """Bucket, its steps, seconds of one, and predicted and measured GB."""
    rows = []
    for b in run.memory.get("buckets", []):
        sizes = [gigabytes(b[name]) if b.get(name) else "not measured" for name in ("predicted", "allocated")]
        seconds = f"{b['seconds']:.3g}" if b.get("seconds") else "not measured"
        rows.append([b["bucket"], f"{b['steps']:,}", seconds, *sizes])
    return rows


def _starts(run: RunFiles) -> list[str]:
    found = []
    for number, row in enumerate(run.starts):
        when = datetime.fromtimestamp(row["time"], timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        goes_on = f"{'resumed' if number else 'continued'} at step {row['start']:,}"
        what = goes_on if row["start"] else "started"
        found.append(f"{when}: {what} on {row['world']} rank{'' if row['world'] == 1 else 's'}")
    return found
