"""The functions that SAT's `training_main` calls back: one forward pass, one evaluation, their metrics."""

import argparse
import json
import time
from collections.abc import Iterator
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from sat import mpu
from sat.helpers import print_rank0
from sat.training.deepspeed_training import evaluate_and_print_results

from sat_ext.checkpoint.layout import CONFIG_NAME
from sat_ext.config import import_named
from sat_ext.contact_sheet import write_sheet
from sat_ext.errors import ConfigError
from sat_ext.models.config import ABSENT
from sat_ext.models.generate import sample_rows
from sat_ext.sat.motion_log import MotionLog
from sat_ext.sat.registry import get_dataset
from sat_ext.sat.run import micro_steps, run_of
from sat_ext.sat.side_files import side_file, write_side_file
from sat_ext.sat.steps import mean_metrics
from sat_ext.types import groups_of

PROGRESS_SECONDS = 5.0


def get_target(name: str) -> Any:
    """The data set class of a `data.target`: a dotted path, or a registered name. Raises `ConfigError`."""
    if "." not in name:
        import_module("sat_ext.sat.dataset")  # registers ours
        return get_dataset(name)
    target = import_named(name, f"data.target: '{name}'", "check the spelling.")
    if not hasattr(target, "create_dataset_function"):
        raise ConfigError(f"data.target: '{name}' has no create_dataset_function; name a data set class.")
    return target


class TrainingHooks:
    """State between SAT's calls: the held-out losses so far, and what the progress line shows."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.root = Path(args.save) if args.save else None  # before SAT adds the experiment's name
        self.evaluations: list[dict[str, float]] = []
        self._started = 0.0
        self._progress = Progress()
        self._sampled: dict[str, int] = {}
        self._motion: MotionLog | None = None

    def forward_step(
        self, data_iterator: Iterator[dict[str, Any]], model: Any, args: argparse.Namespace, timers: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """One micro-step of training: the loss, and the loss per kind."""
        if not self._started:
            self._started = time.time()
            self._write_config()
            self._evaluate_first(model, timers)
        batch = self._next(data_iterator, timers)
        # noise and dropout follow from the step and the rank alone: a resumed run draws what the first would have
        seeds = np.random.SeedSequence([args.seed, micro_steps(args), dist.get_rank()])
        batch["seed"] = int(seeds.generate_state(1)[0])
        logs = (args.iteration + 1) % args.log_interval == 0
        batch["gradient_norms"] = run_of(args).settings.gradient_norms and logs
        loss, metrics = model(batch)
        if dist.get_rank() == 0:
            samples = sum(len(g["txt"]) for g in groups_of(batch)) * mpu.get_data_parallel_world_size()
            self._progress.update(metrics, samples, args)
        return loss, metrics

    def forward_step_eval(
        self, data_iterator: Iterator[dict[str, Any]], model: Any, args: argparse.Namespace, timers: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """One step of an evaluation, of one bucket on all ranks; the first of each kind is also sampled from."""
        batch = self._next(data_iterator, timers)
        kind = batch["kind"][0]
        if self._sampled.get(kind) != args.iteration:
            self._sampled[kind] = args.iteration
            self._write_samples(getattr(model, "module", model), batch, kind)
        return model(batch)

    def handle_metrics(self, gathered: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Write down the held-out losses. SAT calls it on the first rank."""
        means = mean_metrics(gathered)
        record = {"iteration": self.args.iteration, **{k: round(float(v), 6) for k, v in means.items()}}
        if run_of(self.args).evaluated == "test":
            record["data"] = "test_data"
        else:
            self.evaluations.append(record)
        write_side_file(self.args.save, "heldout.jsonl", json.dumps(record) + "\n", append=True)
        return means

    def write_result(self) -> None:
        """`result.json` in the folder of `args.save`: held-out loss by kind, first and last, and seconds."""
        if self.root is None or not self.evaluations or dist.get_rank() != 0:
            return
        first, last = self.evaluations[0], self.evaluations[-1]
        losses = [name for name in first if name.startswith("loss_")]
        result = {
            "before": {name.removeprefix("loss_"): first[name] for name in losses},
            "after": {name.removeprefix("loss_"): last.get(name) for name in losses},
            "seconds": round(time.time() - self._started, 1),
            "run": str(self.args.save),
        }
        write_side_file(str(self.root), "result.json", json.dumps(result, indent=2) + "\n")

    def _next(self, data_iterator: Iterator[dict[str, Any]], timers: Any) -> dict[str, Any]:
        timers("data loader").start()
        batch = next(data_iterator)
        timers("data loader").stop()
        for group in groups_of(batch):
            group.update((k, v.to(self.args.device)) for k, v in group.items() if isinstance(v, torch.Tensor))
        return batch

    def _write_samples(self, engine: Any, batch: dict[str, Any], kind: str) -> None:
        """`samples/<iteration>_<kind>.png` in the run's folder. Every rank takes part: ZeRO-3 gathers weights."""
        sampling = engine.config.sampling
        if sampling.number == 0 or not self.args.save:
            return
        batch = {k: v[: sampling.number] for k, v in batch.items() if k in ("mp4", "txt", "kind")}
        rows = sample_rows(engine, batch, generator=torch.Generator(self.args.device).manual_seed(0))
        if dist.get_rank() == 0:
            with side_file("samples/"):
                write_sheet(rows, Path(self.args.save) / "samples" / f"{self.args.iteration:08d}_{kind}.png")
        if sampling.motion and run_of(self.args).evaluated != "test":  # whose captions are others
            self._motion = self._motion or MotionLog(self.args)
            self._motion.add(engine, batch, kind, rows)

    def _write_config(self) -> None:
        """The merged YAML beside the checkpoints, under the name that CogVideo's script gives it."""
        if self.args.save and dist.get_rank() == 0:
            folder = Path(self.args.save)
            with side_file(CONFIG_NAME):
                folder.mkdir(parents=True, exist_ok=True)
                OmegaConf.save(OmegaConf.create(self.args.resolved_config), folder / CONFIG_NAME)

    def _evaluate_first(self, model: Any, timers: Any) -> None:
        """Held-out loss before the first step: SAT evaluates after steps only."""
        streams = run_of(self.args).streams
        if "valid_data" in streams and self.args.eval_interval:
            batches = streams["valid_data"][0].batches(rank=mpu.get_data_parallel_rank())
            evaluate_and_print_results(
                f"iteration {self.args.iteration}", batches, model, self.args.eval_iters, self.args, timers,
                False, split="val", step=self.args.iteration,
                hooks={"forward_step_eval": self.forward_step_eval, "handle_metrics": self.handle_metrics},
            )  # fmt: skip
        elif getattr(model, "module", model).config.sampling.motion:
            print_rank0(
                "motion is not measured, as nothing is held out: set args.valid_data and args.eval_interval"
            )


class Progress:
    """A line every few seconds: the loss per kind (a running mean), samples a second, the time that is left."""

    def __init__(self) -> None:
        self._losses: dict[str, float] = {}
        self._samples = 0
        self._begin: tuple[float, int] | None = None
        self._shown = 0.0

    def update(self, metrics: dict[str, torch.Tensor], samples: int, args: argparse.Namespace) -> None:
        """Count one micro-step of `samples` samples over all ranks."""
        for name, value in metrics.items():
            if name.startswith("loss_") and (loss := float(value.detach())) != ABSENT:
                self._losses[name] = 0.95 * self._losses.get(name, loss) + 0.05 * loss
        now = time.monotonic()
        if self._begin is None:  # the first micro-step is left out: it warms up
            self._begin = now, args.iteration
            return
        self._samples += samples
        seconds, steps = now - self._begin[0], args.iteration - self._begin[1]
        if now - self._shown < PROGRESS_SECONDS or steps == 0:
            return
        self._shown = now
        left = timedelta(seconds=int((args.train_iters - args.iteration) * seconds / steps))
        losses = "  ".join(f"{k} {v:.3f}" for k, v in sorted(self._losses.items()))
        rate = f"{self._samples / seconds:.1f} samples/s"
        print_rank0(f"step {args.iteration}/{args.train_iters}  {losses}  {rate}  ETA {left}")
