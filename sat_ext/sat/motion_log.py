"""How much samples move at the evaluations of a run, beside those of its base."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.distributed as dist
from sat.helpers import print_rank0

from sat_ext.contact_sheet import SheetRow, write_sheet
from sat_ext.errors import ConfigError
from sat_ext.models.generate import sample_rows
from sat_ext.models.transformer import adapters_off
from sat_ext.motion import flow_score
from sat_ext.pixels import to_uint8
from sat_ext.sat.run import recipe_in
from sat_ext.sat.side_files import side_file, write_side_file
from sat_ext.types import KINDS


class MotionLog:
    """Writes `motion.jsonl`: for the captions of stills and of clips the flow (`flow_score`) of what the model
    makes of them and, under a LoRA, of what its base makes of the same noise; and that of the clips themselves.

    Of a still's caption a clip of the run's longest bucket is made, which an image-to-video model begins with the
    still: `samples/<iteration>_animated.png`."""

    def __init__(self, args: argparse.Namespace) -> None:
        if (recipe := recipe_in(args)) is None:
            raise ConfigError("model.sampling.motion: true needs a data.target of sat_ext's; set it to false.")
        self.args, self.fps = args, recipe.data.fps
        self.frames = max(bucket.frames for bucket in recipe.buckets)
        self._of_base: dict[str, list[SheetRow]] = {}  # the same at every evaluation

    def add(self, engine: Any, batch: dict[str, Any], kind: str, made: Sequence[SheetRow]) -> None:
        """Measure an evaluation's samples of `batch`. Every rank takes part, as ZeRO-3 gathers weights."""
        if kind == "image":
            made = self._rows(engine, batch)
        if kind not in self._of_base and engine.config.train.mode == "lora":
            with adapters_off(engine.network):
                self._of_base[kind] = self._rows(engine, batch)
        if dist.get_rank() != 0:
            return
        base = self._of_base.get(kind)
        values = {"model": self._flow(made), **({"base": self._flow(base)} if base else {})}
        if kind == "video":
            values["held_out"] = mean(flow_score(to_uint8(clip), self.fps) for clip in batch["mp4"])
        row = {"iteration": self.args.iteration, "prompts": kind, **{k: round(v, 6) for k, v in values.items()}}
        write_side_file(self.args.save, "motion.jsonl", json.dumps(row) + "\n", append=True)
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in values.items())
        print_rank0(f"motion in frame heights a second, of the captions of {KINDS[kind]}: {shown}")
        if kind == "image":
            beside = [{"base": row.strips["generated"]} for row in base] if base else [{} for _ in made]
            pairs = zip(made, beside, strict=True)
            rows = [SheetRow(caption=row.caption, strips={**row.strips, **more}) for row, more in pairs]
            with side_file("samples/"):
                write_sheet(rows, Path(self.args.save) / "samples" / f"{self.args.iteration:08d}_animated.png")

    def _rows(self, engine: Any, batch: dict[str, Any]) -> list[SheetRow]:
        frames = max(self.frames if batch["kind"][0] == "image" else 1, batch["mp4"].shape[1])
        generator = torch.Generator(self.args.device).manual_seed(0)
        return sample_rows(engine, batch, frames=frames, generator=generator)

    def _flow(self, rows: Sequence[SheetRow]) -> float:
        return mean(flow_score(row.strips["generated"], self.fps) for row in rows)
