"""`sat-ext prior`: clips that the base makes itself, to train a LoRA on with `target: base`."""

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor

from sat_ext.cli.base import BaseOption, MoreYaml
from sat_ext.cli.cache import join, own_device
from sat_ext.cogvideox import latent_frames
from sat_ext.config import read_yaml
from sat_ext.data.buckets import assign
from sat_ext.data.decode import read_still
from sat_ext.data.index import build_index
from sat_ext.data.probe import probe
from sat_ext.data.sources import SourceConfig, read_source
from sat_ext.data.transform import Fit
from sat_ext.data.visits import read_pixels
from sat_ext.errors import ConfigError, DataError
from sat_ext.files import suffix_of
from sat_ext.files.atomic import written_aside
from sat_ext.latents.reader import Entries
from sat_ext.latents.store import fingerprint_of, write_latents
from sat_ext.latents.writer import encode_conditions
from sat_ext.media import write_video
from sat_ext.pixels import to_model_range, to_uint8
from sat_ext.recipe import Recipe, recipe_of
from sat_ext.types import IMAGE_EXTENSIONS, Bucket, MediaInfo

if TYPE_CHECKING:
    from sat_ext.models.engine import VideoDiffusionEngine

CRF = 4  # of H.264, as good as lossless: what a first stage loses is more
WRITE_SECONDS = 60.0  # latents of so much work are lost by a kill, and encoded again by `sat-ext cache`


class Prompt(NamedTuple):
    """What a clip is to show, and the still that it begins with, if it does, or what is inside `crop` of it."""

    caption: str
    image: str | None = None
    crop: tuple[int, int, int, int] | None = None


def prior(
    base: BaseOption,
    prompts: Annotated[
        str, typer.Option(help="a text file, one prompt a line; or a folder or table of captioned stills")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="the folder of the clips, a source to train on")],
    more: MoreYaml = None,
    steps: Annotated[int | None, typer.Option(min=1, help="denoising steps; default: the model's YAML")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="strength of the prompt; default: the model's YAML")
    ] = None,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Let the model of a run, without its LoRA, make a clip of each prompt, as long as the run's longest bucket.

    Each is an MP4 with its caption beside it; an image-to-video model animates stills. Where the run has a cache,
    the latents go into it as they are. What is there is kept, so a killed command can be run again. Under torchrun
    or the DeepSpeed launcher each rank makes a part."""
    from sat_ext.models.generate import build_engine, load_weights

    config = read_yaml([*base, *(more or [])])
    run = recipe_of(config)
    if not run.engine.takes_packs:
        raise ConfigError(
            "--base: needs a 'model' section of the built-in engine (configs/model/), which makes the clips; they "
            "can be trained on under CogVideo's script too."
        )
    if max(bucket.frames for bucket in run.buckets) == 1:
        raise ConfigError("data.params.buckets: only stills; the base makes clips, so add a longer bucket.")
    wanted = read_prompts(prompts, animates=run.engine.is_conditioned)
    refuse_inside_sources(output, run)
    try:
        for folder in (output, *([Path(run.data.cache.folder)] if run.data.cache else [])):
            folder.mkdir(parents=True, exist_ok=True)
        missing = missing_in(output, wanted)  # of all ranks, as none makes a clip before all have met
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be used ({error.strerror}); name another folder.") from error
    rank, world = join()
    console = Console(stderr=True, quiet=rank > 0)
    if missing := missing[rank::world]:
        device = own_device()
        engine = build_engine(config)
        if (loaded := (config.get("args") or {}).get("load")) is not None:
            load_weights(engine, Path(loaded))
        options = {"steps": steps, "guidance_scale": guidance}
        options = {name: value for name, value in options.items() if value is not None}
        maker = Maker(engine.to(device), run, output, seed, options)
        if rank == 0:  # whose console alone is seen, and whose part is as large as any
            estimate = timedelta(seconds=round(maker.seconds() * len(missing)))
            of_all = f"{len(missing)} of {len(wanted)} clips of {maker.buckets[0]}"
            console.print(f"{of_all} to make on this rank, about {estimate}")
        shown: Iterable[int] = track(missing, "clips", total=len(missing), console=console)
        maker.make(wanted, shown)
    dist.barrier()
    if rank == 0:
        if any(source.target == "base" for source in clips_at(output, run.sources)):
            print(f"{output}: {len(wanted)} clips, which the YAML names as a source.")
        else:
            print(f"{output}: {len(wanted)} clips. To train on them, add to data.params.sources:")
            print(f"  - {{name: {output.name}, path: {output}, share: 0.3, target: base}}")
    dist.destroy_process_group()


def read_prompts(source: str, *, animates: bool) -> list[Prompt]:
    """The prompts, each of a still where the model `animates` them. Raises `ConfigError` and `DataError`."""
    if suffix_of(source) == ".txt":
        if animates:
            raise ConfigError(
                f"--prompts: {source} is a list, and an image-to-video model animates pictures; name a folder or "
                "table of captioned stills."
            )
        try:
            # split by hand, as `splitlines` also ends a line at the separators that text from the web holds
            lines = Path(source).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompts: {source} cannot be read ({error}); name a text file.") from error
        found = [Prompt(line.strip()) for line in lines if line.strip()]
    else:
        stills = [item for item in read_source(source) if suffix_of(item.path) in IMAGE_EXTENSIONS]
        found = [Prompt(i.captions[0], *((i.path, i.crop) if animates else ())) for i in stills]
    if not found:
        raise DataError(f"--prompts: nothing in {source}; write one prompt a line, or name captioned stills.")
    return found


def missing_in(folder: Path, prompts: Sequence[Prompt]) -> list[int]:
    """The numbers of the prompts without a clip. Raises `ConfigError` where a clip or a caption in its place is of
    another prompt, as captions of the user's own would be overwritten, and `OSError`."""
    found = []
    for number, prompt in enumerate(prompts):
        clip = folder / f"{number:06d}.mp4"
        text, is_made = clip.with_suffix(".txt"), clip.exists()
        caption = text.read_text(encoding="utf-8", errors="replace").strip() if text.exists() else ""
        if (is_made or text.exists()) and caption != prompt.caption.strip():
            raise ConfigError(f"-o: {clip} is of another prompt ({caption[:60]!r}); name a new folder.")
        if not is_made:
            found.append(number)
    return found


def refuse_inside_sources(folder: Path, run: Recipe) -> None:
    """Raise `ConfigError` where a source above `folder` would train on the clips as on any other data."""
    for source in run.sources:
        if source.kind != "image" and Path(os.path.abspath(source.path)) in Path(os.path.abspath(folder)).parents:
            raise ConfigError(
                f"-o: {folder} is inside the source {source.path}, which would train on the clips as its own; "
                "name a folder outside of it."
            )


def clips_at(folder: Path, sources: Iterable[SourceConfig]) -> list[SourceConfig]:
    """The sources that take clips from this folder."""
    where = os.path.abspath(folder)
    return [s for s in sources if os.path.abspath(s.path) == where and s.kind != "image"]


class Maker:
    """Makes clips with the base of `engine`, and puts them into `output` and, where the run has one, its cache."""

    def __init__(
        self, engine: "VideoDiffusionEngine", run: Recipe, output: Path, seed: int, options: dict[str, Any]
    ) -> None:
        self.engine, self.run, self.output, self.seed, self.options = engine, run, output, seed, options
        longest = max(bucket.frames for bucket in run.buckets)
        self.buckets = [bucket for bucket in run.buckets if bucket.frames == longest]
        self.waiting: dict[str, Tensor] = {}  # latents (t, C, h, w) by file name, not yet in the cache

    def seconds(self) -> float:
        """About how long one clip takes: as measured now for one denoising step, without the first stage."""
        from sat_ext.models.generate import generate_latents

        begun, shape = [time.perf_counter()], self._shape(self.buckets[0])
        for steps in (1, 2):
            list(generate_latents(self.engine, [""], **shape, **{**self.options, "steps": steps}))
            begun.append(time.perf_counter())
        one = (begun[2] - begun[1]) - (begun[1] - begun[0])
        one = one if one > 0 else (begun[2] - begun[1]) / 2  # the first pass warms up
        return one * (self.options.get("steps") or self.engine.config.sampling.steps)

    def make(self, prompts: Sequence[Prompt], numbers: Iterable[int]) -> None:
        """The clips of these numbers."""
        from sat_ext.models.generate import generate_latents
        from sat_ext.models.transformer import adapters_off

        since = time.monotonic()
        for number in numbers:
            prompt, first = prompts[number], None
            bucket = self.buckets[number % len(self.buckets)]
            if prompt.image is not None:
                bucket = self._nearest(probe(prompt.image), prompt.crop)
                fit = Fit(bucket.height, bucket.width, prompt.crop)
                first = to_model_range(torch.from_numpy(read_still(prompt.image, fit=fit)), torch.float32)
            seed = int(fingerprint_of(self.seed, number, prompt.caption)[:15], 16)  # of any rank the same
            noise = torch.Generator().manual_seed(seed)
            with adapters_off(self.engine.network):
                made = generate_latents(
                    self.engine, [prompt.caption], first_frames=first, generator=noise, **self._shape(bucket),
                    **self.options,
                )  # fmt: skip
                (latents,) = made
            self._write(number, prompt.caption, to_uint8(self.engine.first_stage.decode(latents)[0]))
            self.waiting[f"{number:06d}.mp4"] = latents[0].cpu().clone()  # safetensors writes no views
            if time.monotonic() - since > WRITE_SECONDS:
                self._into_cache()
                since = time.monotonic()
        self._into_cache()

    def _nearest(self, info: MediaInfo, crop: tuple[int, int, int, int] | None) -> Bucket:
        """The bucket of a still's shape, or a portrait would lose its head to a landscape."""
        if crop is not None:
            info = replace(info, width=crop[2], height=crop[3])
        found = assign(info, [replace(b, frames=1) for b in self.buckets], available=1, still=True, short="drop")
        assert isinstance(found, Bucket)
        return replace(found, frames=self.buckets[0].frames)

    def _shape(self, bucket: Bucket) -> dict[str, Any]:
        return {"frames": bucket.frames, "height": bucket.height, "width": bucket.width}

    def _write(self, number: int, caption: str, frames: Any) -> None:
        """The caption first: a clip without one would be an error for who trains on the folder meanwhile."""
        file = self.output / f"{number:06d}.mp4"
        try:
            with written_aside(file.with_suffix(".txt")) as draft:
                draft.write_text(caption + "\n", encoding="utf-8")
            with written_aside(file) as draft:
                write_video(draft, frames, self.run.data.fps, crf=CRF)
        except OSError as error:
            raise DataError(
                f"{file}: cannot be written ({error.strerror}); make room, and run the command again."
            ) from error

    def _into_cache(self) -> None:
        """Write the latents that wait under the keys that training will ask for: they have the sources' names."""
        data, waiting = self.run.data, self.waiting
        self.waiting = {}
        if data.cache is None or not waiting:
            return
        prints, device = self.run.engine.fingerprints(self.run.dtype), self.engine.network.device
        encoders = self.run.engine.encoders(self.engine.network.dtype, device)
        encoders.first_stage = self.engine.first_stage
        sources = clips_at(self.output, self.run.sources) or [SourceConfig(path=str(self.output))]
        entries = Entries(
            # held-out records too, and without the mix, as not all of its parts are in this folder
            index=build_index([replace(s, side=None) for s in sources], replace(data, mix=None)),
            config=data,
            encoder=prints.first_stage,
            clips=data.cache.clips,
        )
        samples = []
        for visit, entry in entries:
            latents = waiting.get(visit.item.key)
            if latents is not None and latent_frames(visit.bucket.frames) == len(latents):
                parts = {"mean": latents}
                if encoders.conditions:
                    pixels = visit.pixels(data.decoder, read_pixels)[None]
                    parts |= encode_conditions(encoders, pixels, entry, data.cache.conditions)
                samples.append((entry, {name: part.to(self.run.dtype) for name, part in parts.items()}))
        write_latents(Path(data.cache.folder), samples)
