"""What each update sees, and what the model learns from it: five ways to mix stills and clips, clipped or not.

    python benchmarks/mixing.py [--updates 200] [--equal tokens] [--seeds 3] [--clip 0 1.0 0.1] [--jobs 2]
        [--json mixing.json] [--picture mixing.png]

The tiny model trains with AdamW on the demo's data, made in a temporary folder, from the same start, with the same
tokens in all (or, with `--equal updates`, as many updates) and at most as many tokens in each update. Held-out
losses are of stills and of clips (mean and spread over the seeds). The variance is that of an update's gradient at
the end of the run, over the squared norm of its mean, times the samples of an update: what a sample's gradient
would have if samples were independent.

- padded: as CogVideo's own data class, every sample is as long as the longest clip: stills stand still.
- one kind: each update is a batch of one bucket, the loss its mean.
- weighted: the same, and samples count alike.
- accumulated: an update is four such batches, together as large, as in CogVideo's engine with accumulation.
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
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
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
from sat_ext.types import Bucket, groups_of

CONFIGS = Path(__file__).parent.parent / "configs"
KINDS = ("image", "video")
WAYS = ("padded", "one kind", "weighted", "accumulated", "packs")
LEARNING_RATE, BETAS = 6e-3, (0.9, 0.99)  # AdamW's best for the tiny model
GRADIENTS = 32  # updates from which the variance is estimated
CLIPPED = 1.03  # goal: packs' loss at the tightest clipping over that without
Batch = dict[str, Any]


class Outcome(NamedTuple):
    """One run."""

    image: float
    video: float
    variance: float
    samples: int
    seconds: float
    tokens: int
    updates: int


def main() -> int:
    """Run everything and show it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--updates", type=int, default=200, help="of the way with packs")
    parser.add_argument("--equal", choices=("tokens", "updates"), default="tokens", help="what all ways have")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--clip", type=float, nargs="+", default=[0.0, 1.0, 0.1], help="gradient norms; 0 is none")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_demo(Path(folder) / "data", clips=192, stills=192, held_out=48)
        runs = list(itertools.product(args.ways, args.clip, range(args.seeds)))
        with ProcessPoolExecutor(args.jobs) as pool:
            futures = {run: pool.submit(train, folder, *run, args.updates, args.equal) for run in runs}
            found = {run: future.result() for run, future in futures.items()}
    rows = []
    for way, clip in itertools.product(args.ways, args.clip):
        of_seeds = [found[way, clip, seed] for seed in range(args.seeds)]
        seconds = sum(o.seconds for o in of_seeds)
        rows.append([
            way, clip or "none", *(spread([getattr(o, kind) for o in of_seeds]) for kind in KINDS),
            round(statistics.mean(o.variance for o in of_seeds), 1),
            round(statistics.mean(o.updates for o in of_seeds)),
            *(round(sum(getattr(o, what) for o in of_seeds) / seconds, 1) for what in ("tokens", "samples")),
        ])  # fmt: skip
    columns = ["an update", "clipped at", "stills", "clips", "variance", "updates", "tokens a second"]
    columns.append("samples a second")
    title = f"Held-out loss by what each update sees, at equal {args.equal}"
    report(title, columns, rows, args.json, updates=args.updates)
    goals = list(goals_of({k: v._asdict() for k, v in found.items()}, args.ways, args.clip, args.seeds))
    report("Packs", ["figure", "clipped at", "measured", "goal", "result"], goals)
    if args.picture:
        draw(args.picture, rows, args.clip)
    return 0 if all(met for *_, met in goals) else 1


def goals_of(
    found: dict[Any, dict[str, float]], ways: Sequence[str], clips: Sequence[float], seeds: int
) -> Iterator[tuple[str, Any, float, str, bool]]:
    """Rows: what packs lose by clipping, and how they compare with the best other way."""
    if "packs" not in ways:
        return
    mean = {
        (way, clip, kind): statistics.mean(found[way, clip, seed][kind] for seed in range(seeds))
        for way, clip, kind in itertools.product(ways, clips, KINDS)
    }
    for kind in KINDS:
        if 0.0 in clips and len(clips) > 1:
            tight = min(clip for clip in clips if clip)
            ratio = mean["packs", tight, kind] / mean["packs", 0.0, kind]
            yield (
                f"{kind} loss over that without clipping",
                tight,
                round(ratio, 3),
                f"<= {CLIPPED}",
                ratio <= CLIPPED,
            )
        for clip in clips if len(ways) > 1 else ():
            best = min((w for w in ways if w != "packs"), key=lambda w: mean[w, clip, kind])
            ratio = mean["packs", clip, kind] / mean[best, clip, kind]
            yield f"{kind} loss over that of '{best}'", clip or "none", round(ratio, 3), "<= 1", ratio <= 1


def draw(path: Path, rows: Sequence[Sequence[Any]], clips: Sequence[float]) -> None:
    """A bar for each row, in a panel for each kind."""
    width, height, left, bar = 1040, 40 + 26 * len(rows), 230, 18
    image = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    for panel, kind in enumerate(("stills", "clips")):
        values = [float(row[2 + panel].split()[0]) for row in rows]
        origin, room, low = left + panel * 400, 330, 0.8 * min(values)
        pen.text((origin, 8), f"held-out loss of {kind}", "black", font)
        for i, (row, value) in enumerate(zip(rows, values, strict=True)):
            top = 36 + 26 * i
            if not panel:
                pen.text(
                    (8, top),
                    f"{row[0]}, {'not clipped' if row[1] == 'none' else f'clipped at {row[1]}'}",
                    "black",
                    font,
                )
            end = origin + room * (value - low) / (max(values) - low)
            pen.rectangle((origin, top, end, top + bar), "#3366cc" if row[0] == "packs" else "#aab4c8")
            pen.text((end + 4, top), f"{value:.3f}", "black", font)
    image.save(path)


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.4f}"


def train(folder: str, way: str, clip: float, seed: int, updates: int, equal: str) -> Outcome:
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
    batches, tokens, samples, number, begun = updates_of(stream, way), 0, 0, 0, time.perf_counter()
    while (done := tokens / budget if equal == "tokens" else number / updates) < 1:
        warm, decay = min(1.0, done / 0.03), 0.5 + 0.5 * math.cos(math.pi * done)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * warm * (0.02 + 0.98 * decay)
        taken = backward(engine, next(batches), seed, samples, size)
        if clip:
            torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        optimizer.zero_grad()
        tokens, samples, number = tokens + taken[0], samples + taken[1], number + 1
    seconds = time.perf_counter() - begun
    variance = variance_of(engine, trained, batches, seed, size)
    losses = evaluate(engine, recipe)
    return Outcome(losses["loss_image"], losses["loss_video"], variance, samples, seconds, tokens, number)


def recipe_in(folder: str) -> Recipe:
    """The demo's, with the data of this folder."""
    names = ("model/tiny", "data/demo", "train/demo")
    yaml = read_yaml([str(CONFIGS / f"{name}.yaml") for name in names])
    recipe = recipe_of(yaml)
    sources = tuple(replace(s, path=s.path.replace("runs/demo/data", f"{folder}/data")) for s in recipe.sources)
    held_out = (SourceConfig(path=f"{folder}/data/heldout"),)
    return replace(recipe, lists={**recipe.lists, "train_data": sources, "valid_data": held_out})


def sizes_of(recipe: Recipe, way: str) -> StepSize:
    """How large the steps are; an update has at most as many tokens whatever the way."""
    size, budget = recipe.step_size, recipe.step_size.budget
    assert budget is not None
    if way == "padded":  # each sample takes the room of the longest
        return replace(size, tokens=dict.fromkeys(size.tokens, max(size.tokens.values())))
    if way == "packs":
        return size
    of_step = budget // 4 if way == "accumulated" else budget
    return replace(size, batches={b: max(1, of_step // n) for b, n in size.tokens.items()}, budget=None)


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


def backward(
    engine: VideoDiffusionEngine, update: list[Batch], seed: int, number: int, size: StepSize
) -> tuple[int, int]:
    """Add the gradients of an update, and return its tokens and samples."""
    tokens = samples = 0
    for i, batch in enumerate(update):
        batch["seed"] = hash((seed, number, i)) % 2**31
        loss, _ = engine(batch)
        (loss / len(update)).backward()
        for group in groups_of(batch):
            count, frames, _, height, width = group["mp4"].shape
            tokens += count * size.tokens[Bucket(frames=frames, height=height, width=width)]
            samples += count
    return tokens, samples


def variance_of(
    engine: Any, trained: list[Any], batches: Iterator[list[Batch]], seed: int, size: StepSize
) -> float:
    """The variance of an update's gradient over the squared norm of its mean, times its mean number of samples."""
    gradients, samples = [], 0
    for number in range(GRADIENTS):
        samples += backward(engine, next(batches), seed, -number, size)[1]
        gradients.append(torch.cat([p.grad.flatten() for p in trained]))
        engine.zero_grad()
    stacked = torch.stack(gradients)
    mean = stacked.mean(0)
    variance = (stacked - mean).square().sum() / (GRADIENTS - 1)
    return float(variance / (mean.square().sum() - variance / GRADIENTS).clamp(min=1e-12)) * samples / GRADIENTS


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
