"""What a LoRA trained on pictures of a new look does to a model's motion, and what `target: base` keeps of it.

    make demo && python benchmarks/motion.py runs/demo [--updates 300] [--seeds 3] [--shares 0.2 0.4 0.6]
        [--jobs 2] [--json motion.json] [--picture motion.png]

The base is the model of `make demo`, which has seen filled shapes, moving and at rest. A LoRA is then trained on
32 stills of a look it has never seen: other colours, on paper. Beside them it gets:

- stills: nothing.
- base: clips of the old look, at a share of the samples, whose target is the base.
- clips: the same clips as ordinary data.

Of 48 prompts for clips of the new look ("a pink circle moving left on paper", without a first frame), it counts
the samples that have the look, and those that move in the asked direction; and the same of the base, with the same
noise. `flow` is the mean length of the optical flow, in frame heights a second.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import cycle, islice, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from mixing import backward
from report import report

from sat_ext import demo_data
from sat_ext.checkpoint.layout import find_run, read_run_config
from sat_ext.checkpoint.reading import read_weights, under_adapters
from sat_ext.contact_sheet import SheetRow, write_sheet
from sat_ext.data.index import build_index
from sat_ext.data.sources import SourceConfig
from sat_ext.data.stream import JointStream
from sat_ext.demo_data import BACKGROUNDS, MOTIONS, SHAPES, Scene
from sat_ext.demo_score import seen_in
from sat_ext.models.engine import VideoDiffusionEngine
from sat_ext.models.generate import generate
from sat_ext.pixels import to_uint8
from sat_ext.recipe import recipe_of

COLOURS = {"pink": (240, 110, 180), "teal": (0, 140, 140), "brown": (120, 70, 30), "navy": (30, 30, 110)}
GROUNDS = {**BACKGROUNDS, "paper": (240, 215, 160)}
OLD_COLOURS = dict(demo_data.COLOURS)
FRAMES, STILLS, PROMPTS = 9, 32, 48
TRAIN = {"mode": "lora", "rank": 16, "alpha": 16, "target_modules": "all-linear"}
LEARNING_RATE = 3e-3
LOOK, MOTION = 0.95, 0.9  # goals: of the look of stills alone, and of the base's motion


class Way(NamedTuple):
    """What is trained on beside the stills."""

    name: str
    share: float = 0.0
    target: str = "data"


STILLS_ALONE = Way("stills")


demo_data.COLOURS.update(COLOURS)  # what `Scene` can draw
demo_data.BACKGROUNDS.update(GROUNDS)


def main() -> int:
    """Run everything and show it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="the folder of a run of `make demo`")
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.2, 0.4, 0.6], help="of what the base teaches"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    run = find_run(args.run)
    middle = sorted(args.shares)[len(args.shares) // 2]
    ways = [None, STILLS_ALONE, *(Way("base", share, "base") for share in args.shares), Way("clips", middle)]
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(args.jobs) as pool:
        write_stills(Path(folder))
        jobs = list(product(ways, range(args.seeds)))
        futures = {job: pool.submit(measure, run, Path(folder), *job, args.updates) for job in jobs}
        found = {job: future.result() for job, future in futures.items()}
    rows = []
    for way in ways:
        of_seeds = [found[way, seed] for seed in range(args.seeds)]
        name = ("base, not trained", "") if way is None else (way.name, way.share or "")
        rows.append([*name, *(spread([o[k] for o in of_seeds]) for k in ("look", "direction", "flow"))])
    columns = ["beside the stills", "share", f"look, of {PROMPTS}", f"direction, of {PROMPTS}", "flow"]
    report("Samples of a look learned from stills", columns, rows, args.json, updates=args.updates)
    if args.picture:
        draw(args.picture, {way: found[way, 0]["clips"] for way in ways})
    goals = list(goals_of(found, ways, args.seeds))
    report("Goals", ["figure", "measured", "goal", "result"], goals)
    return 0 if any(met for *_, met in goals) else 1


def goals_of(
    found: dict[Any, dict[str, Any]], ways: list[Way | None], seeds: int
) -> Iterator[tuple[str, str, str, bool]]:
    """For each share: whether the base's motion is kept while the look is learned as from stills alone."""
    mean = {
        (w, k): statistics.mean(found[w, s][k] for s in range(seeds))
        for w, _ in found
        for k in ("look", "direction")
    }
    for way in (way for way in ways if way and way.target == "base"):
        look = mean[way, "look"] / max(1e-9, mean[STILLS_ALONE, "look"])
        motion = mean[way, "direction"] / max(1e-9, mean[None, "direction"])
        met = look >= LOOK and motion >= MOTION
        yield f"base, {way.share}: look, motion", f"{look:.2f}, {motion:.2f}", f">= {LOOK}, {MOTION}", met


def write_stills(folder: Path) -> None:
    """The pictures of the new look, each with its caption."""
    rng = np.random.default_rng(0)
    for number, (shape, colour) in enumerate(islice(cycle(product(SHAPES, COLOURS)), STILLS)):
        x, y = rng.uniform(0.43, 0.57, 2)
        scene = Scene(
            shape=shape, colour=colour, background="paper", direction=None, size=(96, 96),
            diameter=rng.uniform(0.5, 0.6), start=(x, y),
        )  # fmt: skip
        scene.draw().save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(scene.caption)


def measure(run: Path, folder: Path, way: Way | None, seed: int, updates: int) -> dict[str, Any]:
    """Train one LoRA on one core, and look at its samples; without a way, at those of the base."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    config = read_run_config(run)
    recipe = recipe_of(config)
    model = {**recipe.engine.model, "train": TRAIN}
    engine = VideoDiffusionEngine(SimpleNamespace(model_config=model, seed=seed))
    weights, _ = read_weights(run)
    weights = under_adapters(weights, {name for name, _ in engine.named_parameters()})
    _, unexpected = engine.load_state_dict(weights, strict=False)
    assert not unexpected
    if way is not None:
        sources = [SourceConfig(path=str(folder), name="stills", share=1 - way.share)]
        if way.share:
            clips = next(s.path for s in recipe.sources if s.path.endswith("videos"))
            sources.append(SourceConfig(path=clips, name="clips", share=way.share, target=way.target))  # type: ignore[arg-type]
        train(engine, tuple(sources), recipe, seed, updates)
    return look_at(engine.eval(), seed)


def train(engine: Any, sources: tuple[SourceConfig, ...], recipe: Any, seed: int, updates: int) -> None:
    """The LoRA, with AdamW."""
    trained = [p for p in engine.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, LEARNING_RATE, (0.9, 0.99), weight_decay=0.0)
    size = recipe.step_size
    stream = JointStream(
        build_index(sources, recipe.data), replace(recipe.data, seed=seed), size=size, world=1, dtype=torch.uint8
    )
    batches = stream.batches(start=0, rank=0)
    for number in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (number + 1) / 10, 2 * (1 - number / updates))
        backward(engine.train(), [next(batches)], seed, number, size)
        optimizer.step()
        optimizer.zero_grad()


def prompts() -> list[tuple[str, str, str]]:
    """Shape, colour and direction of each."""
    every = list(product(SHAPES, COLOURS, MOTIONS))
    return every[:PROMPTS]


def look_at(engine: VideoDiffusionEngine, seed: int) -> dict[str, Any]:
    """How many samples have the look and the direction, and their flow."""
    from sat_ext.motion import flow_score

    captions = [f"a {colour} {shape} moving {direction} on paper" for shape, colour, direction in prompts()]
    generator = torch.Generator().manual_seed(seed)
    made = generate(engine, captions, frames=FRAMES, height=64, width=64, generator=generator)
    clips = [to_uint8(clip) for clip in made]
    look = sum(has_look(clip, colour) for clip, (_, colour, _) in zip(clips, prompts(), strict=True))
    moves = sum(
        seen_in(clip).direction == direction for clip, (*_, direction) in zip(clips, prompts(), strict=True)
    )
    flow = statistics.mean(flow_score(clip, fps=8) for clip in clips)
    shown = [(caption, clip) for caption, clip in zip(captions, clips)][::9]
    return {"look": look, "direction": moves, "flow": flow, "clips": shown}


def has_look(clip: np.ndarray, colour: str) -> bool:
    """Whether a clip shows that colour on paper, and not the colours that the base knows."""
    edge = np.concatenate([clip[:, (0, -1)].reshape(-1, 3), clip[:, :, (0, -1)].reshape(-1, 3)]).astype(float)
    background = np.median(edge, axis=0)
    distance = np.linalg.norm(clip - background, axis=-1)
    shape = np.median(clip[distance > 0.8 * np.quantile(distance, 0.97)], axis=0)
    return nearest(background, GROUNDS) == "paper" and nearest(shape, {**OLD_COLOURS, **COLOURS}) == colour


def nearest(colour: np.ndarray, names: dict[str, tuple[int, int, int]]) -> str:
    """The name of the nearest colour."""
    return min(names, key=lambda name: float(np.linalg.norm(colour - np.array(names[name]))))


def draw(path: Path, shown: dict[Way | None, list[tuple[str, np.ndarray]]]) -> None:
    """The same prompts of every way."""
    rows = []
    for number in range(len(shown[None])):
        caption = shown[None][number][0]
        strips = {
            "base" if w is None else f"{w.name} {w.share or ''}".strip(): clips[number][1]
            for w, clips in shown.items()
        }
        rows.append(SheetRow(caption=caption, strips=strips))
    write_sheet(rows, path)


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.3g} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.2g}"


if __name__ == "__main__":
    sys.exit(main())
