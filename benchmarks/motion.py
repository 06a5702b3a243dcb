"""What a LoRA trained on pictures of a new look does to a model's motion, and what `target: base` keeps of it.

    python benchmarks/motion.py [--base-updates 1500] [--updates 800] [--seeds 3] [--shares 0.2 0.3 0.4]
        [--jobs 2] [--json motion.json] [--picture motion.png]

The base is a tiny text-to-video model, trained first, on the demo's shapes in motion and at rest. A LoRA is then
trained on 32 stills of a look it has never seen: other colours, on paper. Beside them it gets:

- stills: nothing.
- base: clips of the old look, at a share of the samples, whose target is the base.
- clips: the same clips as ordinary data.

Of 48 prompts for clips of the new look ("a pink circle moving left on paper") it counts the samples that have the
look, and those that move in the asked direction; and the same of the base, with the same noise. `flow` is the mean
length of the optical flow, in frame heights a second.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from mixing import backward, recipe_in, stream_of, updates_of
from report import report

from sat_ext import demo_data
from sat_ext.checkpoint.reading import under_adapters
from sat_ext.contact_sheet import SheetRow, write_sheet
from sat_ext.data.sources import SourceConfig
from sat_ext.demo_data import BACKGROUNDS, MOTIONS, SHAPES, Scene, write_demo
from sat_ext.demo_score import seen_in
from sat_ext.models.engine import VideoDiffusionEngine
from sat_ext.models.generate import generate
from sat_ext.pixels import to_uint8
from sat_ext.recipe import Recipe

COLOURS = {"pink": (240, 110, 180), "teal": (0, 140, 140), "brown": (120, 70, 30), "navy": (30, 30, 110)}
GROUNDS = {**BACKGROUNDS, "paper": (240, 215, 160)}
OLD_COLOURS = dict(demo_data.COLOURS)
FRAMES, STILLS, PROMPTS = 9, 32, 48
TRAIN = {"mode": "lora", "rank": 16, "alpha": 16, "target_modules": "all-linear"}
BASE_RATE, LEARNING_RATE = 6e-3, 3e-3  # of Muon, as in the demo, and of the LoRA
LOOK, MOTION = 0.95, 0.9  # goals: of the look of stills alone, and of the base's motion


class Way(NamedTuple):
    """What is trained on beside the stills."""

    name: str
    share: float = 0.0
    target: str = "data"


STILLS_ALONE = Way("stills")


def main() -> int:
    """Run everything and show it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base-updates", type=int, default=1500)
    parser.add_argument("--updates", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.2, 0.3, 0.4], help="of what the base teaches"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    middle = sorted(args.shares)[len(args.shares) // 2]
    ways = [None, STILLS_ALONE, *(Way("base", share, "base") for share in args.shares), Way("clips", middle)]
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(args.jobs) as pool:
        folder = Path(name)
        write_demo(folder / "data", clips=960, stills=960, held_out=48)
        write_stills(folder / "look")
        pool.submit(train_base, folder, args.base_updates).result()
        jobs = list(product(ways, range(args.seeds)))
        futures = {job: pool.submit(measure, folder, *job, args.updates) for job in jobs}
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
    folder.mkdir()
    demo_data.COLOURS.update(COLOURS)  # what `Scene` can draw
    demo_data.BACKGROUNDS.update(GROUNDS)
    rng = np.random.default_rng(0)
    for number, (shape, colour, direction) in enumerate(prompts(STILLS)):
        x, y = rng.uniform(0.43, 0.57, 2)
        scene = Scene(
            shape=shape, colour=colour, background="paper", direction=None, size=(96, 96),
            diameter=rng.uniform(0.5, 0.6), start=(x, y),
        )  # fmt: skip
        scene.draw().save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption_of(shape, colour, direction))


def tiny(folder: Path, mode: dict[str, Any], seed: int) -> tuple[VideoDiffusionEngine, Recipe]:
    """The demo's model without a first frame, with new weights."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    recipe = recipe_in(str(folder))
    transformer = {**recipe.engine.model["transformer"], "in_channels": 16}
    model = {**recipe.engine.model, "conditioning": "none", "transformer": transformer, "train": mode}
    return VideoDiffusionEngine(SimpleNamespace(model_config=model, seed=seed)), recipe


def train_base(folder: Path, updates: int) -> None:
    """The weights that LoRAs begin with, into `folder`."""
    engine, recipe = tiny(folder, {"mode": "full"}, seed=0)
    weights = list(engine.network.parameters())
    groups = {matrices: [w for w in weights if (w.ndim == 2) == matrices] for matrices in (True, False)}
    muon = torch.optim.Muon(groups[True], BASE_RATE, weight_decay=0.01)
    rest = torch.optim.AdamW(groups[False], BASE_RATE, (0.9, 0.99), weight_decay=0.01)
    train(engine, [muon, rest], BASE_RATE, recipe.sources, recipe, 0, updates)
    torch.save(engine.state_dict(), folder / "base.pt")


def measure(folder: Path, way: Way | None, seed: int, updates: int) -> dict[str, Any]:
    """Train one LoRA on one core, and look at its samples; without a way, at those of the base."""
    engine, recipe = tiny(folder, TRAIN, seed)
    weights = under_adapters(torch.load(folder / "base.pt"), {name for name, _ in engine.named_parameters()})
    _, unexpected = engine.load_state_dict(weights, strict=False)
    assert not unexpected
    if way is not None:
        sources = [SourceConfig(path=str(folder / "look"), name="stills", share=1 - way.share)]
        if way.share:
            clips = str(folder / "data/train/videos")
            sources.append(SourceConfig(path=clips, name="clips", share=way.share, target=way.target))  # type: ignore[arg-type]
        trained = [p for p in engine.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, LEARNING_RATE, (0.9, 0.99), weight_decay=0.0)
        train(engine, [optimizer], LEARNING_RATE, tuple(sources), recipe, seed, updates)
    return look_at(engine.eval(), seed)


def train(
    engine: VideoDiffusionEngine, optimizers: Sequence[torch.optim.Optimizer], rate: float,
    sources: tuple[SourceConfig, ...], recipe: Recipe, seed: int, updates: int,
) -> None:  # fmt: skip
    """Packs, with a rate that rises and falls."""
    batches = updates_of(stream_of(recipe, sources, recipe.step_size, seed), "packs")
    for number in range(updates):
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = rate * min(1.0, (number + 1) / 30, 2 * (1 - number / updates))
        backward(engine.train(), next(batches), seed, number, recipe.step_size)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def prompts(count: int = PROMPTS) -> list[tuple[str, str, str]]:
    """Shape, colour and direction of each: every combination once, in an order of no meaning."""
    every = list(product(SHAPES, COLOURS, MOTIONS))
    return [every[i] for i in np.random.default_rng(0).permutation(len(every))[:count]]


def caption_of(shape: str, colour: str, direction: str) -> str:
    """As people describe pictures: by what would happen next, too."""
    return f"a {colour} {shape} moving {direction} on paper"


def look_at(engine: VideoDiffusionEngine, seed: int) -> dict[str, Any]:
    """How many samples have the look and the direction, and their flow."""
    from sat_ext.motion import flow_score

    captions = [caption_of(*prompt) for prompt in prompts()]
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
