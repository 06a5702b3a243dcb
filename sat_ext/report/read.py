"""The files that a run leaves, as plain values. Of a run that goes on, what there is by now."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sat_ext.errors import DataError
from sat_ext.types import KINDS

SHEETS = {**KINDS, "animated": "animated"}  # contact sheets: of stills, of clips, and of stills made to move
_SAMPLES = re.compile(rf"(\d+)_({'|'.join(SHEETS)})\.png")

Scalars = Mapping[str, Mapping[int, float]]  # by name and step


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """`scalars` are TensorBoard's, without "Train/". `held_out` has by kind the loss at each evaluated step.

    `starts`, `steps`, `skipped` and `data` are what `sat_ext.sat.run_log` writes, `memory` is `memory.json`.
    `motion` has, by the kind of the captions and by whose samples they are (of the "model", its "base", or
    "held_out"), the flow at each evaluated step; `samples`, by kind, its contact sheet."""

    folder: Path
    scalars: Scalars
    held_out: Mapping[str, Mapping[int, float]]
    starts: Sequence[Mapping[str, Any]]
    steps: Sequence[Mapping[str, Any]]
    skipped: Sequence[Mapping[str, Any]]
    data: Mapping[str, Any]
    memory: Mapping[str, Any]
    motion: Mapping[str, Mapping[str, Mapping[int, float]]]
    samples: Mapping[str, Mapping[int, Path]]

    @property
    def iteration(self) -> int:
        """The last step of which anything is known."""
        known = [row["iteration"] for row in self.steps] + [step for of in self.scalars.values() for step in of]
        return max(known, default=0)

    @property
    def train_iters(self) -> int | None:
        """How many steps the run is for."""
        return self.starts[-1]["train_iters"] if self.starts else None


def read_run(folder: Path, events: Path | None = None) -> RunFiles:
    """The files of the run in `folder`, or of the newest run in it; `events` is TensorBoard's folder, where it is
    not the one that the run has noted. Raises `DataError` where there is no run."""
    folder = _find(folder)
    rows = _lines(folder / "steps.jsonl")
    starts = [row for row in rows if "start" in row]
    if events is None:
        noted = [folder / row["events"] for row in starts[-1:]]
        events = next((e for e in [*noted, folder.parent / "runs" / folder.name] if e.is_dir()), None)
    elif not events.is_dir():
        raise DataError(
            f"--events: there is no folder {events}; name the one with TensorBoard's files of this run."
        )
    scalars = _scalars(events) if events else {}
    held_out = {kind: dict(scalars.get(f"valid_loss_{kind}", {})) for kind in KINDS}
    for row in _lines(folder / "heldout.jsonl"):
        for kind in KINDS:
            if f"loss_{kind}" in row and "data" not in row:
                held_out[kind][row["iteration"]] = row[f"loss_{kind}"]
    samples: dict[str, dict[int, Path]] = {kind: {} for kind in SHEETS}
    for file in sorted((folder / "samples").glob("*.png")):
        if match := _SAMPLES.fullmatch(file.name):
            samples[match[2]][int(match[1])] = file
    motion: dict[str, dict[str, dict[int, float]]] = {kind: {} for kind in KINDS}
    for row in _lines(folder / "motion.jsonl"):
        for name in row.keys() - {"iteration", "prompts"}:
            motion[row["prompts"]].setdefault(name, {})[row["iteration"]] = row[name]
    return RunFiles(
        folder=folder, scalars=scalars, starts=starts,
        held_out={kind: dict(sorted(of.items())) for kind, of in held_out.items()},
        steps=[row for row in rows if "start" not in row], skipped=_lines(folder / "skipped.jsonl"),
        data=_json(folder / "data.json"), memory=_json(folder / "memory.json"), samples=samples,
        motion=motion,
    )  # fmt: skip


def _find(folder: Path) -> Path:
    marks = ("steps.jsonl", "training_config.yaml")
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; name the folder of a run.")
    found = [f.parent for pattern in ("", "*/") for mark in marks for f in folder.glob(pattern + mark)]
    if not found:
        raise DataError(f"{folder}: no run in it (no {' or '.join(marks)}); name the folder of args.save.")
    return folder if folder in found else max(found, key=lambda f: f.stat().st_mtime)


def _scalars(folder: Path) -> dict[str, dict[int, float]]:
    """The values of all event files of a folder. Where a resumed run has repeated a step, its own count."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    found: dict[str, dict[int, float]] = {}
    for file in sorted(folder.glob("events.out.tfevents.*"), key=lambda f: (f.stat().st_mtime, f.name)):
        for event in LegacyEventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(value.tag.removeprefix("Train/"), {})[event.step] = value.simple_value
    return {name: dict(sorted(values.items())) for name, values in found.items()}


def _lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, which may be missing, or just be written to."""
    if not file.exists():
        return []
    found = []
    for line in file.read_text(errors="replace").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:  # the end of a line that was cut short
            continue
    return found


def _json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(errors="replace")))
    except (OSError, ValueError):
        return {}
