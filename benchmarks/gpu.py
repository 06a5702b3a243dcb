"""All that a GPU machine without a network can say in ten minutes: tests/gpu, then the first rows of memory.py.

    python benchmarks/carry.py                                  # elsewhere: fills .carry, which travels along
    python3 benchmarks/gpu.py [--minutes 10] [--out FOLDER]     # there, with a Python that has PyTorch

Installs what is carried beside the machine's own packages, in a folder that is removed. What each step printed,
and the rows, are in `--out` as soon as they are there. Ends with 1 where a test failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = 3.0  # minutes of all, at most


def main() -> int:
    """Install, test, measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="for all of it, the installation too")
    parser.add_argument("--carried", type=Path, default=ROOT / ".carry")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--tiny", action="store_true", help="memory.py --tiny: to try this script on a CPU")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes - 15  # to be through before somebody else ends it
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder)
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(site)]
        subprocess.run([*pip, *map(str, sorted(args.carried.glob("*.whl")))], check=True, timeout=180)
        (site / "wandb.py").write_text('"""SAT imports it, and calls it only with --wandb."""\n')
        paths = [str(ROOT), str(site), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), "PYTHONUNBUFFERED": "1"}
        tests = step(
            "tests", [sys.executable, "-m", "pytest", "-v", "-rs", "-p", "no:cacheprovider", "tests/gpu"],
            min(60 * TESTS, end - time.monotonic()), args.out, environment,
        )  # fmt: skip
        left = end - time.monotonic()
        minutes = f"{(left - 10) / 60:.2f}"  # so that it ends by itself, with the row that it is at
        rows = [sys.executable, "benchmarks/memory.py", "--models", "cogvideox-5b-i2v", "--minutes", minutes]
        rows += ["--json", str(args.out / "memory.json"), *(["--tiny"] if args.tiny else [])]
        step("memory", rows, left, args.out, environment)
    return int(tests != 0)


def step(name: str, command: list[str], seconds: float, out: Path, environment: dict[str, str]) -> int:
    """Run `command` for so long at most, its output in `<name>.log`; its exit status, 124 where it was ended."""
    with (out / f"{name}.log").open("w") as log:
        try:
            status = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, timeout=max(1.0, seconds), check=False
            ).returncode
        except subprocess.TimeoutExpired:
            status = 124
    lines = (out / f"{name}.log").read_text(errors="replace").splitlines()
    print(f"--- {name}: exit status {status}", *lines[-40:], sep="\n", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
