"""Wheels for a GPU machine without a network: what it lacks beside PyTorch to run this project, kept small.

    python benchmarks/carry.py [--folder .carry] [--python 3.12] [--limit 60]

Takes the versions of constraints.txt for that Python on x86-64 Linux, builds DeepSpeed's wheel (it publishes none)
without its compiled operators, and leaves out of bitsandbytes the libraries of other CUDA versions. The folder is
ignored by git; `benchmarks/gpu.py` installs from it. Ends with 1 where it is larger than `--limit` MB.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
# Beside PyTorch, transformers, peft, accelerate, pyarrow and pytest, which such machines have. SAT imports
# wandb without need, so `gpu.py` puts an empty module there.
MISSING = (
    "SwissArmyTransformer", "annotated-types", "antlr4-python3-runtime", "av", "bitsandbytes", "braceexpand",
    "cpm-kernels", "datasets", "deepspeed", "diffusers", "dill", "hjson", "importlib-metadata", "multiprocess",
    "omegaconf", "pydantic", "pydantic-core", "simplejpeg", "tensorboardX", "typing-inspection", "webdataset",
)  # fmt: skip
SOURCES = ("deepspeed",)  # which publish no wheel
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64")
KEPT = ("libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so")


def main() -> int:
    """Fill the folder, and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / ".carry")
    parser.add_argument("--python", default="3.12", help="the GPU machine's")
    parser.add_argument("--limit", type=float, default=60.0, help="MB")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for old in args.folder.glob("*.whl"):
        old.unlink()
    pinned = versions(args.python)
    wheels = [f"{n}=={pinned[n.lower()]}" for n in MISSING if n not in SOURCES]
    platforms = [option for platform in PLATFORMS for option in ("--platform", platform)]
    pip("download", "--only-binary=:all:", "--python-version", args.python, "--implementation", "cp", *platforms,
        "-d", str(args.folder), *wheels)  # fmt: skip
    for name in SOURCES:
        pip("wheel", "--no-build-isolation", "-w", str(args.folder), f"{name}=={pinned[name]}", DS_BUILD_OPS="0")
    for wheel in args.folder.glob("bitsandbytes-*.whl"):
        strip(wheel)
    files = sorted(args.folder.glob("*.whl"), key=lambda f: -f.stat().st_size)
    for file in files:
        print(f"{file.stat().st_size / 1e6:6.1f} MB  {file.name}")
    size = sum(file.stat().st_size for file in files) / 1e6
    print(f"{size:6.1f} MB in all, of {args.limit:.0f}")
    return int(size > args.limit or len(files) != len(MISSING))


def versions(python: str) -> dict[str, str]:
    """Pinned versions by name in lower case, where constraints.txt has them for that Python on x86-64 Linux."""
    environment = {
        "python_version": python, "python_full_version": f"{python}.0", "platform_machine": "x86_64",
        "sys_platform": "linux", "platform_system": "Linux", "implementation_name": "cpython",
        "platform_python_implementation": "CPython", "os_name": "posix", "extra": "",
    }  # fmt: skip
    found = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate(environment):
                found[requirement.name.lower()] = str(requirement.specifier).removeprefix("==")
    return found


def pip(command: str, *arguments: str, **environment: str) -> None:
    """Run pip for the packages named alone."""
    line = [sys.executable, "-m", "pip", command, "-q", "--no-deps", *arguments]
    subprocess.run(line, check=True, env={**os.environ, **environment})


def strip(wheel: Path) -> None:
    """Leave out the libraries of bitsandbytes that are for other CUDA versions and for other makes of GPU."""
    small = wheel.with_suffix(".small")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            name = entry.filename.rpartition("/")[2]
            if not name.startswith("libbitsandbytes_") or name in KEPT:
                target.writestr(entry, source.read(entry))
    small.replace(wheel)


if __name__ == "__main__":
    sys.exit(main())
