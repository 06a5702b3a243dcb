"""A CogVideo checkout's own train_video.py, run as it is."""

import argparse
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from sat_ext.cogvideo.section import CHECKOUT
from sat_ext.config import read_yaml
from sat_ext.engines import engine_of
from sat_ext.errors import ConfigError


def is_for_script(argv: Sequence[str]) -> bool:
    """Whether the YAML files after `--base` name CogVideo's engine. Raises `ConfigError` for a broken file."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--base", nargs="+", default=[])
    paths = parser.parse_known_args(list(argv))[0].base
    return bool(paths) and engine_of(read_yaml(paths).get("model")).is_cogvideo


def run_script() -> None:
    """Run the checkout's train_video.py with this process's arguments, as if it had been called in its place.
    Raises `ConfigError` where `COGVIDEO_SAT` names no checkout."""
    folder = os.environ.get(CHECKOUT)
    if not folder:
        raise ConfigError(
            "model.network_config: a model YAML of CogVideo needs CogVideo's code; set the environment variable "
            "COGVIDEO_SAT to the sat folder of a checkout, or use a file of configs/model/."
        )
    script = Path(folder, "train_video.py")
    if not Path(folder, "dit_video_concat.py").is_file() or not script.is_file():
        raise ConfigError(f"COGVIDEO_SAT: {folder} holds no train_video.py of CogVideo; name its sat folder.")
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(name, default)  # DeepSpeed reads them even for a single process
    sys.path.insert(0, str(script.parent))
    sys.argv[0] = str(script)
    runpy.run_path(str(script), run_name="__main__")
