"""The choices of a run: buckets, mix, what is held out, memory, and how long."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import yaml

from sat_ext.config import plain
from sat_ext.data.index import build_index
from sat_ext.data.params import sources_of
from sat_ext.data.stream import JointStream
from sat_ext.errors import ConfigError
from sat_ext.memory.advice import Room, advise, first_that_fits
from sat_ext.memory.measured import measurements
from sat_ext.memory.plan import Plan
from sat_ext.memory.run import run_from
from sat_ext.memory.table import gigabytes, sentences
from sat_ext.models.folder import load_model_config
from sat_ext.recipe import recipe_of
from sat_ext.starter.buckets import choose_lengths, choose_sizes
from sat_ext.starter.models import Model, config_file, merged, own_files
from sat_ext.starter.survey import Survey
from sat_ext.zero import ZERO_NAMES

TARGET_UPDATES, MOST_EPOCHS = 2000, 100  # a LoRA's usual length, and where few files only repeat
EVALUATIONS = 10
HELD_OUT, FEW, MANY = 8, 20, 400  # records: of the small, below which nothing is held out, from which 2 % are
LEAST_SHARE = 0.25  # of the rarer kind
WORKERS = 4  # at most, for each rank
QUICK = ("zero1", "zero2")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The YAML to write, its comments by dotted path, and sentences about what was chosen and why.

    `before` are files of CogVideo's own that come before it. `cache` is the folder to fill first, if one is
    needed; under CogVideo's script `cached` is a further YAML, to train from it."""

    config: dict[str, Any]
    comments: dict[str, str]
    reasons: list[str]
    before: list[str]
    cache: str | None
    cached: dict[str, Any]


def choose(
    name: str, model: Model, paths: Sequence[str], found: Survey, output: Path, room: Room, *,
    weights: Path | None = None, checkout: Path | None = None,
) -> Choice:  # fmt: skip
    """The run on the data of a survey. Raises `ConfigError` where no configuration fits, and for other weights."""
    comments: dict[str, str] = {}
    reasons: list[str] = []
    data = _data(model, paths, found, comments, reasons)
    before: list[str] = []
    if checkout is None:
        parts = [config_file(f"model/{name}"), config_file("train/lora" if weights else "train/full")]
        parts.append({"model": {"pretrained": str(weights)} if weights else {"train": {"mode": "full"}}})
        if weights:
            load_model_config(merged(parts)["model"])  # raises for weights of another model
    else:
        before = [str(checkout / file) for file in own_files(model, checkout)]
        sizes = data["params"]["buckets"]["sizes"]
        extra = [model.sizes] if model.sizes and sizes != [list(model.native)] else []
        parts = [config_file(f"cogvideo/{overlay}") for overlay in (*model.overlays, *extra)]
        parts.append({"args": {"train_data": None, "valid_data": None}})
        if weights:
            parts.append({"args": {"load": str(weights)}})
    own = merged([*parts, {"data": data}])
    theirs = [yaml.safe_load(Path(file).read_text(encoding="utf-8")) for file in before]
    levers, plan = _fitting(merged([*theirs, own, _zero("zero1", model, weights, checkout)]), room)
    own = merged([own, _zero(plan.name, model, weights, checkout)])
    cache = str(output.with_suffix("").absolute()) + "_cache" if any("cache" in s for s in levers) else None
    own, cached = _pull(own, levers, cache, comments)
    comments["deepspeed.zero_optimization"] = f"configs/zero/{plan.name}.yaml, chosen by sat-ext plan"
    pulled = [lever.partition("  #")[0].partition(", with what")[0] for lever in levers]
    predicted = f"predicted {gigabytes(plan.gpu)} of {gigabytes(room.gpu_memory)} GB a GPU"
    reasons.append(f"memory: {', '.join([plan.name, *pulled])}; {predicted}")
    workers = max(1, min(WORKERS, (os.cpu_count() or 1) // room.gpus - 1))
    own["args"] = {**own.get("args", {}), "experiment_name": output.stem, "num_workers": workers}
    own["args"]["save"] = str(output.with_suffix("").parent / "runs" / output.stem)
    comments["args.num_workers"] = "data workers of each rank; sat-ext bench says whether they keep up"
    _length(merged([*theirs, own]), own, room.gpus, comments, reasons, evaluates=not cached)
    order = ("args", "model", "data", "deepspeed")
    return Choice(
        config={key: own[key] for key in order if own.get(key)}, comments=comments, reasons=reasons, before=before,
        cache=cache, cached=cached,
    )  # fmt: skip


def _data(
    model: Model, paths: Sequence[str], found: Survey, comments: dict[str, str], reasons: list[str]
) -> dict[str, Any]:
    """The section, with comments and reasons."""
    lengths = choose_lengths(found.clips["available"].tolist(), model.frames) if len(found.clips) else []
    has_stills = bool(len(found.stills))
    if len(found.clips) and not lengths:
        reasons.append("lengths: no clip fills 9 frames, so every clip trains as a still")
        has_stills = True
    sizes = choose_sizes(found.shapes, model.native)
    frames = [1] * has_stills + lengths
    longest = f"{lengths[-1]} frames are {(lengths[-1] - 1) / model.fps:.3g} s" if lengths else "stills only"
    comments["data.params.buckets.frames"] = f"a clip goes to the longest that it fills; {longest}"
    comments["data.params.buckets.sizes"] = f"of about {model.native[0]}x{model.native[1]} pixels, that crop least"
    reasons.append(f"buckets: {', '.join(map(str, frames))} frames; {', '.join(f'{h}x{w}' for h, w in sizes)}")
    sources = [
        {"path": os.path.abspath(s.path) if os.path.exists(s.path) else s.path}
        | ({"name": s.name} if s.name else {})
        for s in sources_of(paths)
    ]
    params: dict[str, Any] = {
        "fps": model.fps, "sources": sources, "buckets": {"frames": frames, "sizes": [list(s) for s in sizes]}
    }  # fmt: skip
    comments["data.params.fps"] = "what the model was trained at; frames are picked by time"
    total = len(found.clips) + len(found.stills)
    if lengths and has_stills:
        share = len(found.stills) / total
        image = round(min(1 - LEAST_SHARE, max(LEAST_SHARE, share)), 2)
        params["mix"] = {"image": image, "video": round(1 - image, 2)}
        comments["data.params.mix"] = (
            f"a guess: {share:.0%} of the records are stills; each kind has at least a quarter"
        )
        reasons.append(f"mix: {image:.0%} stills and {1 - image:.0%} clips of every update's samples")
    if total >= FEW:
        params["held_out"] = 0.02 if total >= MANY else HELD_OUT
        comments["data.params.held_out"] = "chosen by a hash of the names, never trained on, evaluated by kind"
        reasons.append(f"held out: {'2 %' if total >= MANY else HELD_OUT} of {total:,} records")
    else:
        reasons.append(f"held out: nothing, as there are {total} records; there are no evaluations")
    return {"target": "sat_ext.JointImageVideoDataset", "params": params}


def _zero(name: str, model: Model, weights: Path | None, checkout: Path | None) -> dict[str, Any]:
    """The `deepspeed` section of one of `configs/zero/`; without weights, of a model for CPUs."""
    section = config_file(f"zero/{name}")["deepspeed"]
    if checkout is not None:  # its own file has the rest
        steps = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 4}
        return {"deepspeed": {**steps, "zero_optimization": section["zero_optimization"]}}
    if weights is None:
        section["bf16"] = {"enabled": False}
        section["optimizer"] = {"type": "AdamW", "params": {"torch_adam": True, "lr": 1e-3}}
    elif model.fp16:
        section = merged([section, config_file("train/fp16")["deepspeed"]])
    return {"deepspeed": section}


def _fitting(config: dict[str, Any], room: Room) -> tuple[tuple[str, ...], Plan]:
    """The levers to pull and the ZeRO configuration. Levers come before the configurations that move weights over
    PCIe or between machines in every step, which fit without but are several times slower."""
    run = run_from(recipe_of(plain(config)).checked())
    for measure in measurements(run):
        measure()
    for names in (QUICK, ZERO_NAMES[1:]):
        levers, plan = first_that_fits(run, room, names)
        if plan is not None:
            return levers, plan
    raise ConfigError(f"--gpu-memory: {' '.join(sentences(advise(run, room), room)[:2])}")


def _pull(
    config: dict[str, Any], levers: Sequence[str], cache: str | None, comments: dict[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`config` with the levers, and what has to come after it to train from a cache under CogVideo's script."""
    cached: dict[str, Any] = {}
    for lever in levers:
        setting = lever.partition("  #")[0]
        if setting.startswith("configs/cogvideo/"):
            extra = config_file(setting.partition(".yaml")[0].removeprefix("configs/"))
            if "cached" in setting:
                cached = extra
                cached["data"]["params"]["cache"]["folder"] = cache
                cached["model"]["conditioner_config"]["params"]["emb_models"][0]["params"]["folder"] = cache
            else:
                config = merged([config, extra])
            continue
        where, _, value = setting.partition(": ")
        part: Any = {"folder": cache} if where == "data.params.cache" else yaml.safe_load(value)
        for key in reversed(where.split(".")):
            part = {key: part}
        config = merged([config, part])
        comments[where] = "needed to fit, says sat-ext plan"
        if where == "data.params.cache":  # no decoder is loaded
            config = merged([config, {"model": {"sampling": {"number": 0}}}])
    return config, cached


def _length(
    config: dict[str, Any], own: dict[str, Any], gpus: int, comments: dict[str, str], reasons: list[str],
    *, evaluates: bool,
) -> None:  # fmt: skip
    """How many updates, in whole epochs of the source that takes longest."""
    recipe = recipe_of(plain(config))
    index = build_index(recipe.sources, recipe.data)
    stream = JointStream(
        index, recipe.data, size=recipe.step_size, world=gpus, dtype=recipe.dtype,
        accumulation=recipe.accumulation,
    )  # fmt: skip
    samples = stream.schedule.mean_samples * gpus * recipe.accumulation  # of an update
    total = sum(index.shares.values())
    counts = {name: sum(len(g.rows) for g in index.groups if g.source == name) for name in index.shares}
    epoch = max(counts[name] / (share / total) for name, share in index.shares.items()) / samples
    epochs = max(1, min(MOST_EPOCHS, round(TARGET_UPDATES / epoch)))
    updates = ceil(epochs * epoch)
    interval = max(1, updates // EVALUATIONS)
    args = own["args"]
    args |= {"train_iters": updates, "save_interval": interval, "log_interval": min(20, interval)}
    evaluates = evaluates and recipe.data.held_out is not None
    args |= {"eval_interval": interval, "eval_iters": 8} if evaluates else {"eval_interval": None}
    words = f"{epochs} epoch{'' if epochs == 1 else 's'} of {ceil(epoch):,} updates of {samples:.3g} samples"
    comments["args.train_iters"] = words
    reasons.append(f"length: {updates:,} updates, {words}")
