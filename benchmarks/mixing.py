"""What each update sees, and what the model learns from it: five ways to mix stills and clips, clipped or not.

    python benchmarks/mixing.py [--updates 400] [--seeds 3] [--clip 0 1.0 0.1] [--jobs 2] [--json mixing.json]

The tiny model trains on the demo's data, made in a temporary folder, from the same start with the same tokens.
Held-out losses are of stills and of clips (the mean and the spread over the seeds); the variance is of an update's
gradient at the end of the run, over the squared norm of its mean.

- padded: as CogVideo's own data class, every sample is as long as the longest clip: stills stand still.
- one kind: each update is a batch of one bucket, the loss its mean.
- weighted: the same, and samples count alike.
- accumulated: an update is four such batches of a quarter of the size.
- packs: an update is a pack.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from report import report

from sat_ext.config import read_yaml
from sat_ext.data.buckets import StepSize
from sat_ext.data.held_out import HeldOut
from sat_ext.data.index import build_index
from sat_ext.data.sources import SourceConfig
from sat_ext.data.stream import JointStream
from sat_ext.demo_data import write_demo
from sat_ext.models.engine import VideoDiffusionEngine
from sat_ext.recipe import Recipe, recipe_of
from sat_ext.types import groups_of

CONFIGS = Path(__file__).parent.parent / "configs"
WAYS = ("padded", "one kind", "weighted", "accumulated", "packs")
LEARNING_RATE, BETAS = 6e-3, (0.9, 0.99)  # of configs/train/demo.yaml
MICRO_BATCH = 8
GRADIENTS = 32  # updates from which the variance is estimated
Batch = dict[str, Any]


class Outcome(NamedTuple):
    """One run."""

    image: float
    video: float
    variance: float
    samples: int
    seconds: float


def main() -> int:
    """Run everything and show it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--updates", type=int, default=400, help="of the way with packs; all have its tokens")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--clip", type=float, nargs="+", default=[0.0, 1.0, 0.1], help="gradient norms; 0 is none")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_demo(Path(folder) / "data", clips=192, stills=192, held_out=48)
        runs = list(itertools.product(args.ways, args.clip, range(args.seeds)))
        with ProcessPoolExecutor(args.jobs) as pool:
            futures = {run: pool.submit(train, folder, *run, args.updates) for run in runs}
            found = {run: future.result() for run, future in futures.items()}
    rows = []
    for way, clip in itertools.product(args.ways, args.clip):
        of_seeds = [found[way, clip, seed] for seed in range(args.seeds)]
        seconds = sum(o.seconds for o in of_seeds)
        rows.append([
            way, clip or "none", *(spread([getattr(o, kind) for o in of_seeds]) for kind in ("image", "video")),
            round(statistics.mean(o.variance for o in of_seeds), 2),
            round(sum(o.samples for o in of_seeds) / seconds, 1),
        ])  # fmt: skip
    columns = ["an update", "clipped at", "stills", "clips", "gradient's variance", "samples a second"]
    report(
        "Held-out loss by what each update sees, at equal tokens", columns, rows, args.json, updates=args.updates
    )
    return 0


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.4f}"


def train(folder: str, way: str, clip: float, seed: int, updates: int) -> Outcome:
    """One run on one core."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    recipe = recipe_in(folder)
    args = SimpleNamespace(model_config=dict(recipe.engine.model), seed=seed)
    engine = VideoDiffusionEngine(args).train()
    trained = [p for p in engine.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, LEARNING_RATE, BETAS, weight_decay=0.01)
    size = sizes_of(recipe, way)
    stream = stream_of(recipe, recipe.sources, size, seed, accumulation=4 if way == "accumulated" else 1)
    budget = updates * recipe.step_size.budget  # tokens
    batches, tokens, samples, begun = updates_of(stream, way), 0, 0, time.perf_counter()
    while tokens < budget:
        done = tokens / budget
        warm, decay = min(1.0, done / 0.03), 0.5 + 0.5 * math.cos(math.pi * done)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * warm * (0.02 + 0.98 * decay)
        taken = backward(engine, next(batches), seed, samples)
        if clip:
            torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        optimizer.zero_grad()
        tokens, samples = tokens + taken[0], samples + taken[1]
    seconds = time.perf_counter() - begun
    variance = variance_of(engine, trained, batches, seed)
    losses = evaluate(engine, recipe)
    return Outcome(losses["loss_image"], losses["loss_video"], variance, samples, seconds)


def recipe_in(folder: str) -> Recipe:
    """The demo's, with the data of this folder."""
    names = ("model/tiny", "data/demo", "train/demo")
    yaml = read_yaml([str(CONFIGS / f"{name}.yaml") for name in names])
    recipe = recipe_of(yaml)
    sources = tuple(replace(s, path=s.path.replace("runs/demo/data", f"{folder}/data")) for s in recipe.sources)
    held_out = (SourceConfig(path=f"{folder}/data/heldout"),)
    return replace(recipe, lists={**recipe.lists, "train_data": sources, "valid_data": held_out})


def sizes_of(recipe: Recipe, way: str) -> StepSize:
    """How large the steps are."""
    size = recipe.step_size
    longest = max(size.tokens.values())
    if way == "padded":  # each sample takes the room of a clip
        return StepSize(
            tokens=dict.fromkeys(size.tokens, longest), batches=size.batches, budget=MICRO_BATCH * longest
        )
    if way == "packs":
        return size
    parts = 4 if way == "accumulated" else 1
    return replace(size, batches={b: max(1, n // parts) for b, n in size.batches.items()}, budget=None)


def stream_of(
    recipe: Recipe, sources: tuple[SourceConfig, ...], size: StepSize, seed: int, accumulation: int = 1
) -> JointStream:
    """The stream of one rank."""
    index = build_index(sources, recipe.data)
    data = replace(recipe.data, seed=seed)
    return JointStream(index, data, size=size, world=1, dtype=torch.uint8, accumulation=accumulation)


def updates_of(stream: JointStream, way: str) -> Iterator[list[Batch]]:
    """The micro-steps of each update."""
    steps = stream.batches(start=0, rank=0)
    while True:
        update = list(islice(steps, stream.accumulation))
        for group in [g for batch in update for g in groups_of(batch)]:
            if way == "padded":
                group["mp4"] = group["mp4"].expand(-1, 9, -1, -1, -1)
                group["kind"] = ["video"] * len(group["kind"])
            if way == "one kind":
                del group["loss_weight"]
        yield update


def backward(engine: VideoDiffusionEngine, update: list[Batch], seed: int, number: int) -> tuple[int, int]:
    """Add the gradients of an update, and return its tokens and samples."""
    tokens = samples = 0
    text = engine.config.text_length
    for i, batch in enumerate(update):
        batch["seed"] = hash((seed, number, i)) % 2**31
        loss, _ = engine(batch)
        (loss / len(update)).backward()
        for group in groups_of(batch):
            count, frames, _, height, width = group["mp4"].shape
            tokens += count * (text + (1 + (frames - 1) // 4) * (height // 8) * (width // 8))
            samples += count
    return tokens, samples


def variance_of(engine: Any, trained: list[Any], batches: Iterator[list[Batch]], seed: int) -> float:
    """The variance of an update's gradient over the squared norm of its mean, at these weights."""
    gradients = []
    for number in range(GRADIENTS):
        backward(engine, next(batches), seed, -number)
        gradients.append(torch.cat([p.grad.flatten() for p in trained]))
        engine.zero_grad()
    stacked = torch.stack(gradients)
    mean = stacked.mean(0)
    variance = (stacked - mean).square().sum() / (GRADIENTS - 1)
    return float(variance / (mean.square().sum() - variance / GRADIENTS).clamp(min=1e-12))


@torch.no_grad()
def evaluate(engine: VideoDiffusionEngine, recipe: Recipe) -> dict[str, float]:
    """Held-out losses: `loss_image` and `loss_video`."""
    stream = stream_of(recipe, recipe.held_out, replace(recipe.step_size, budget=None), seed=0)
    held_out = HeldOut(stream, samples=96, world=1)
    engine.eval()
    found: dict[str, list[tuple[float, int]]] = {"loss_image": [], "loss_video": []}
    for batch in islice(held_out.batches(rank=0), len(held_out.steps)):
        _, metrics = engine(batch)
        kind = f"loss_{batch['kind'][0]}"
        found[kind].append((float(metrics[kind]), len(batch["txt"])))
    return {kind: sum(v * n for v, n in values) / sum(n for _, n in values) for kind, values in found.items()}


if __name__ == "__main__":
    sys.exit(main())
