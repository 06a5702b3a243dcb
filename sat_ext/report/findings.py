"""What to look at in a run, in plain words, the worst first."""

from collections.abc import Iterator, Mapping

from sat_ext.preview.findings import by_level
from sat_ext.preview.report import Finding, count, percent
from sat_ext.report.read import RunFiles
from sat_ext.types import KINDS

RISEN = 1.03  # a held-out loss over its best
WAITING = 0.1  # of a step
MOST = 0.5  # of the updates
OVER = 1.05  # measured memory over predicted
STILL = 0.7  # flow of samples over the base's
_LISTED = 8


def find(run: RunFiles) -> list[Finding]:
    """All findings, the worst first."""
    return by_level(finding for check in _CHECKS for finding in check(run))


def share_of_step(run: RunFiles) -> dict[str, float]:
    """Which part of the measured time each part of a step takes, 0 to 1."""
    totals: dict[str, float] = {}
    for row in run.steps:
        for name, seconds in row["seconds"].items():
            totals[name] = totals.get(name, 0.0) + max(0.0, seconds)
    whole = sum(totals.values())
    return {name: value / whole for name, value in totals.items()} if whole else {}


def _held_out(run: RunFiles) -> Iterator[Finding]:
    if not any(run.held_out.values()):
        yield Finding(
            level="note",
            text="There is no held-out loss.",
            remedy="Set data.params.held_out: 0.02 and args.eval_interval: training loss alone does not show "
            "whether the model learns what it has not seen.",
        )
    rising = {kind: best for kind, of in run.held_out.items() if (best := _best_before_rise(of)) is not None}
    for kind, best in rising.items():
        of = run.held_out[kind]
        other = next(k for k in KINDS if k != kind)
        falls = run.held_out[other] and other not in rising
        yield Finding(
            level="warning",
            text=f"The held-out loss of {KINDS[kind]} rises: {of[best]:.4g} at step {count(best)}, "
            f"{_last(of):.4g} at step {count(max(of))}"
            + (f", while that of {KINDS[other]} does not." if falls else "."),
            remedy=(f"Give {KINDS[kind]} a larger share, or " if falls else "")
            + f"use the checkpoint near step {count(best)}, a lower learning rate, or more data.",
        )


def _best_before_rise(of: Mapping[int, float]) -> int | None:
    """The step of the least loss, if the last two lie clearly above it."""
    if len(of) < 3:
        return None
    best = min(of, key=lambda step: of[step])
    return best if all(value > RISEN * of[best] for value in list(of.values())[-2:]) else None


def _data_wait(run: RunFiles) -> Iterator[Finding]:
    if (share := share_of_step(run).get("data", 0.0)) > WAITING:
        yield Finding(
            level="warning",
            text=f"{percent(share)} of the time goes into waiting for data.",
            remedy="Raise args.num_workers; sat-ext bench says how many keep the GPU fed.",
        )


def _clipping(run: RunFiles) -> Iterator[Finding]:
    clipped = list(run.scalars.get("clipped", {}).values())
    if clipped and (share := sum(clipped[len(clipped) // 2 :]) / len(clipped[len(clipped) // 2 :])) > MOST:
        norms = list(run.scalars.get("grad_norm", {}).values())
        yield Finding(
            level="note",
            text=f"In the second half of the run so far, {percent(share)} of the updates were clipped"
            + (f" (the norm before clipping is {norms[-1]:.3g})." if norms else "."),
            remedy="Clipping is for rare spikes. Raise deepspeed.gradient_clipping; if the loss then jumps, lower "
            "the learning rate.",
        )


def _skipped(run: RunFiles) -> Iterator[Finding]:
    files = dict.fromkeys(f"{row['path']}: {row['reason']}" for row in run.skipped)
    bad = run.data.get("bad", [0, []])
    if files or bad[0]:
        examples = [*files, *(f"{path}: {reason}" for path, reason in bad[1])]
        yield Finding(
            level="warning",
            text=f"{count(len(files))} files could not be read in training, and {count(bad[0])} before it.",
            remedy="sat-ext check says for each what to do.",
            examples=examples[:_LISTED],
        )


def _memory(run: RunFiles) -> Iterator[Finding]:
    over = [
        b["bucket"]
        for b in run.memory.get("buckets", [])
        if b.get("allocated") and b.get("predicted") and b["allocated"] > OVER * b["predicted"]
    ]
    if over:
        yield Finding(
            level="note",
            text=f"More memory was taken than predicted, with {', '.join(over)}.",
            remedy="Please report it with memory.json of the run: sat-ext plan is meant to be right.",
        )


def _motion(run: RunFiles) -> Iterator[Finding]:
    for kind, of in run.motion.items():
        model, base = of.get("model"), of.get("base")
        if model and base and (kept := _last(model) / max(1e-9, _last(base))) < STILL:
            yield Finding(
                level="warning",
                text=f"Clips of the captions of {KINDS[kind]} move less than the base's: {_last(model):.3g} "
                f"against {_last(base):.3g} frame heights a second ({percent(kept)}).",
                remedy="Add clips with target: base (docs/styles.md), or raise their share.",
            )


_CHECKS = (_held_out, _motion, _data_wait, _clipping, _skipped, _memory)


def _last(of: Mapping[int, float]) -> float:
    return list(of.values())[-1]
