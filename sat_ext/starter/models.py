"""The models that a run can be written for, and the files of `configs/` that it starts from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from sat_ext.config import did_you_mean
from sat_ext.errors import ConfigError
from sat_ext.starter.buckets import Size

ROOT = Path(__file__).parents[2]  # of the repository: configs/ and train_video.py are not part of the package
CONFIGS = ROOT / "configs"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model of `configs/model/`: `native` is the (height, width) that it is made for, `frames` its longest clip,
    `fps` its rate. `cogvideo` is CogVideo's own YAML with the LoRA or, of 1.5, the one for all weights, and
    `overlays` what of `configs/cogvideo/` goes with it; with other sizes than the native one, `sizes` too."""

    native: Size = (480, 720)
    frames: int = 49
    fps: int = 8
    fp16: bool = False
    cogvideo: str | None = None
    overlays: tuple[str, ...] = ()
    sizes: str | None = None

    @property
    def generation(self) -> str:
        """Of CogVideo's code."""
        return "1.5" if "1.5" in self.overlays else "1.0"


_NEW: dict[str, Any] = {"native": (768, 1360), "frames": 81, "fps": 16}
MODELS = {
    "cogvideox-2b": Model(
        fp16=True, cogvideo="cogvideox_2b_lora", overlays=("joint", "lora-rate"), sizes="sizes-2b"
    ),
    "cogvideox-5b": Model(cogvideo="cogvideox_5b_lora", overlays=("joint", "lora-rate"), sizes="sizes-5b"),
    "cogvideox-5b-i2v": Model(
        cogvideo="cogvideox_5b_i2v_lora", overlays=("joint", "i2v", "lora-rate"), sizes="sizes-5b"
    ),
    "cogvideox-1.5-5b": Model(**_NEW, cogvideo="cogvideox1.5_5b", overlays=("joint", "1.5", "lora")),
    "cogvideox-1.5-5b-i2v": Model(
        **_NEW, cogvideo="cogvideox1.5_5b_i2v", overlays=("joint", "1.5", "i2v", "lora")
    ),
    "tiny": Model(native=(64, 64), frames=9),
    "tiny-t2v": Model(native=(64, 64), frames=9),
}  # fmt: skip


def model_of(name: str) -> Model:
    """The model of this name. Raises `ConfigError`."""
    if name not in MODELS:
        hint = did_you_mean(name, MODELS) or f"there are {', '.join(MODELS)}."
        raise ConfigError(f"--model: '{name}' is not known; {hint}")
    if not CONFIGS.is_dir():
        raise ConfigError(f"init: there is no {CONFIGS}; install sat_ext from its repository (pip install -e .).")
    return MODELS[name]


def config_file(name: str) -> dict[str, Any]:
    """A file of `configs/`, such as "zero/zero1". What it takes from files before it stays as written."""
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))


def own_files(model: Model, checkout: Path) -> list[str]:
    """CogVideo's two files for a model, relative to the `sat` folder of a checkout. Raises `ConfigError`."""
    if model.cogvideo is None:
        raise ConfigError("--cogvideo: the tiny models are not CogVideo's; leave it out, or name another --model.")
    files = [f"configs/{model.cogvideo}.yaml", "configs/sft.yaml"]
    is_new = (checkout / "configs/cogvideox1.5_5b.yaml").is_file()
    if missing := [f for f in files if not (checkout / f).is_file()]:
        raise ConfigError(
            f"--cogvideo: there is no {checkout / missing[0]}; name the folder CogVideo/sat"
            + (", checked out at main." if model.generation == "1.5" else " of tag v1.0.")
        )
    if is_new != (model.generation == "1.5"):
        branch = {"1.0": "tag v1.0", "1.5": "main"}[model.generation]
        raise ConfigError(
            f"--cogvideo: {checkout} is CogVideo's {'main' if is_new else 'tag v1.0'}, whose code does not run "
            f"this model; check out {branch}."
        )
    return files


def merged(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sections of several files, the later over the earlier, with what they refer to as written."""
    return dict(OmegaConf.to_container(OmegaConf.merge(*parts)))  # type: ignore[arg-type]
