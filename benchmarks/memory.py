"""Peak memory of the published models on one GPU, predicted and measured: every lever alone, and the stacks.

    python benchmarks/memory.py [--models cogvideox-5b-i2v] [--rows 16] [--minutes 8] [--json FILE]

Each row is a run of train_video.py in a process of its own, on random weights of the published sizes (30 GB in
--folder, made on the GPU, removed at the end). `allocated` and `reserved` are the most that PyTorch's allocator
held in the steps of the largest bucket; `predicted` is what `sat-ext plan` says of the first. Step time is the
median; the first step of each bucket, which makes optimizer states and looks for kernels, is left out of both.
Each row is saved when it is done; one that dies or outlasts its time says so in its place. With `--minutes` the
rows that matter most come first, a row begins only while two minutes are left, and those without time are named.
Where COGVIDEO_SAT names the sat folder of CogVideo v1.0, its own script at the same work is a row too. `--tiny`
tries all of this on a CPU with small models: what needs a GPU says so in its row, and no figure means anything.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from memory_rows import FIRST, MODELS, NATIVE, ROWS, Row
from report import report

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.media import pattern, write_clip  # noqa: E402

GB = 1e9
STEPS = 4  # of each bucket
EXTENSIONS = Path(tempfile.gettempdir(), f"sat_ext-extensions-{os.getpid()}")  # what DeepSpeed compiles at a start
ROW_MINUTES = 2.0  # the least that a row is given: what loading 20 GB, a cache and eight steps take
COLUMNS = ("model", "row", "allocated (GB)", "reserved (GB)", "predicted (GB)", "error (%)", "step (s)")
TINY_SIZE = (9, 64, 64)
T5_XXL: dict[str, Any] = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
T5_TINY: dict[str, Any] = {**T5_XXL, "vocab_size": 384, "d_ff": 32, "num_layers": 1, "num_heads": 2}
TINY_TRANSFORMER = {"num_layers": 2, "num_attention_heads": 2}
TINY_AUTOENCODER = {"block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 2}


def main() -> int:
    """Write models and data, run the rows, show what each took."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--rows", nargs="+", default=[""], help="only rows whose name has one of these in it")
    parser.add_argument("--minutes", type=float, help="for all of it; without, as long as the rows take")
    parser.add_argument("--row-minutes", type=float, default=8.0, help="after which a row is ended")
    parser.add_argument("--folder", type=Path, help="where models are written, 30 GB each; a temporary one if not")
    parser.add_argument("--tiny", action="store_true", help="small models on a CPU: to try this script")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "memory.json")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU; add --tiny to try this script without one.")
    gpu = "none (--tiny, no measure of anything)" if args.tiny else torch.cuda.get_device_name()
    clock = Clock(args.minutes, args.row_minutes)
    rows: list[list[object]] = []
    runs: list[dict[str, Any]] = []

    def save() -> None:
        report("peak memory on one GPU", COLUMNS, rows, args.json, gpu=gpu, cuda=torch.version.cuda, runs=runs)

    for name in args.models:
        with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
            folder = Path(temporary)
            write_model(name, folder / "model", tiny=args.tiny)
            write_media(folder / "data", TINY_SIZE if args.tiny else NATIVE[name])
            wanted = [row for row in ROWS if any(part in row.name for part in args.rows)]
            if args.minutes is not None:
                wanted.sort(key=lambda row: FIRST.index(row.name) if row.name in FIRST else len(FIRST))
            for row in wanted:
                found = run_row(name, row, folder, clock, tiny=args.tiny) if clock.fits() else {"error": NO_TIME}
                rows.append([name, row.name, *figures(found)])
                runs.append({"model": name, "row": row.name, **found})
                save()  # whatever ends this process, what is measured is kept
    if not args.tiny and os.environ.get("COGVIDEO_SAT") and "cogvideox-5b-i2v" in args.models:
        rows.append(run_cogvideo(clock))
        save()
    print(f"GPU: {gpu}; CUDA {torch.version.cuda}")
    shutil.rmtree(EXTENSIONS, ignore_errors=True)
    return 0


NO_TIME = "left out: the minutes are used up"


class Clock:
    """`minutes` for all rows (None: no end), and `row` for one at most."""

    def __init__(self, minutes: float | None, row: float) -> None:
        self.end = None if minutes is None else time.monotonic() + 60 * minutes
        self.row = 60 * row

    def fits(self) -> bool:
        """Whether there is time for another row."""
        return self.end is None or self.end - time.monotonic() >= 60 * ROW_MINUTES

    def limit(self) -> float:
        """Seconds that what begins now may take."""
        return self.row if self.end is None else max(1.0, min(self.row, self.end - time.monotonic()))


def write_model(name: str, folder: Path, *, tiny: bool) -> None:
    """A folder in diffusers' layout with random weights: the YAML's transformer, its autoencoder, T5 v1.1 XXL."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    model = yaml.safe_load((ROOT / "configs" / "model" / f"{name}.yaml").read_text())["model"]
    transformer = {**model["transformer"], **(TINY_TRANSFORMER if tiny else {})}
    autoencoder = {**model["first_stage"]["autoencoder"], **(TINY_AUTOENCODER if tiny else {})}
    device = "cpu" if tiny else "cuda"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):  # random numbers for 10 billion weights take a GPU seconds
        CogVideoXTransformer3DModel(**transformer).save_pretrained(folder / "transformer")
        AutoencoderKLCogVideoX(**autoencoder).save_pretrained(folder / "vae")
        T5EncoderModel(T5Config(**(T5_TINY if tiny else T5_XXL))).save_pretrained(folder / "text_encoder")
    torch.set_default_dtype(torch.float32)
    torch.cuda.empty_cache()
    ByT5Tokenizer().save_pretrained(folder / "tokenizer")
    CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing",
        snr_shift_scale=model["schedule"]["snr_shift_scale"], clip_sample=False,
    ).save_pretrained(folder / "scheduler")  # fmt: skip


def write_media(folder: Path, shape: tuple[int, int, int]) -> None:
    """Clips of the model's length and size, and stills, with captions beside them."""
    from PIL import Image

    frames, height, width = shape
    for i in range(4):
        write_clip(folder / f"clip{i}.mp4", frames=frames + 1, fps=8, size=(height, width))
        Image.fromarray(pattern(i, height, width)).save(folder / f"still{i}.png")
        for kind in ("clip", "still"):
            (folder / f"{kind}{i}.txt").write_text(f"{kind} number {i}")


def run_row(name: str, row: Row, folder: Path, clock: Clock, *, tiny: bool) -> dict[str, Any]:
    """One run of train_video.py: what it wrote into `memory.json`, or why it ended."""
    began = time.monotonic()
    frames, height, width = TINY_SIZE if tiny else NATIVE[name]
    own: dict[str, Any] = {
        "args": {
            "experiment_name": "memory", "train_iters": 2 * STEPS, "save": str(folder / "save"), "log_interval": 1,
            "save_interval": None, "eval_interval": None, "valid_data": None, "num_workers": 2,
            "checkpoint": "weights", "keep_last": None,
        },
        "model": {"pretrained": str(folder / "model"), **row.model, **(_tiny(row) if tiny else {})},
        "data": {
            "target": "sat_ext.JointImageVideoDataset",
            "params": {
                "fps": 8, "sources": [{"name": "all", "path": str(folder / "data")}],
                "buckets": {"frames": [1, frames], "sizes": [[height, width]]},
            },
        },
        "deepspeed": {**row.deepspeed, **({"bf16": {"enabled": False}} if tiny else {})},
    }  # fmt: skip
    files = [f"configs/model/{name}.yaml", f"configs/train/{row.train}.yaml", f"configs/zero/{row.zero}.yaml"]
    base = [*(str(ROOT / file) for file in files), str(folder / "own.yaml")]
    Path(base[-1]).write_text(yaml.safe_dump(own))
    if row.cached:
        cache = folder / "cache"
        own["data"]["params"]["cache"] = {"folder": str(cache)}
        if not (folder / "cached").exists():
            made = [sys.executable, "-m", "sat_ext.cli.main", "cache", "--base", *base, "-o", str(cache)]
            if error := run(made, clock.limit()):
                return {"error": f"the cache: {error}"}
            (folder / "cached").touch()
        Path(base[-1]).write_text(yaml.safe_dump(own))
    shutil.rmtree(folder / "save", ignore_errors=True)
    error = run([sys.executable, "train_video.py", "--base", *base], clock.limit() - (time.monotonic() - began))
    written = list((folder / "save").glob("*/memory.json"))
    if error or not written:
        return {"error": error or "no memory.json was written"}
    return json.loads(written[0].read_text())  # type: ignore[no-any-return]


def _tiny(row: Row) -> dict[str, Any]:
    """What the small model has otherwise."""
    swapped = min(row.model.get("block_swap", 0), TINY_TRANSFORMER["num_layers"])
    return {"transformer": TINY_TRANSFORMER, "block_swap": swapped}


def run(command: list[str], seconds: float) -> str | None:
    """Run `command` here; its last line where it failed (out of memory is a result too), or that it was ended with
    all that it started."""
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(EXTENSIONS)}
    with tempfile.TemporaryFile("w+") as output:  # a pipe would be held open by what outlives the command
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            return f"ended after {seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for lock in EXTENSIONS.glob("**/lock"):  # of a compilation that was ended: later ones would wait
                lock.unlink()
        output.seek(0)
        lines = output.read().strip().splitlines() or [f"exit status {process.returncode}"]
    return None if process.returncode == 0 else lines[-1][:200]


def figures(found: dict[str, Any]) -> list[object]:
    """Allocated, reserved, predicted, error and step time, of the bucket that took most."""
    if found.get("error"):
        return [found["error"], "", "", "", ""]
    if not found["buckets"]:
        return ["no step was made", "", "", "", ""]
    largest = max(found["buckets"], key=lambda b: (b["allocated"] or 0, b["predicted"] or 0))
    predicted, allocated = largest["predicted"], largest["allocated"]
    error = round(100 * (predicted / allocated - 1), 1) if allocated else "not measured"
    return [
        "not measured" if not allocated else round(allocated / GB, 2),
        "not measured" if not allocated else round(largest["reserved"] / GB, 2),
        round(predicted / GB, 2),
        error,
        "not measured" if not allocated else round(largest["seconds"], 2),
    ]


def run_cogvideo(clock: Clock) -> list[object]:
    """CogVideo's own script at LoRA of 5B-I2V, by the benchmark of its own; its largest bucket."""
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary, "cogvideo.json")
        name = ["cogvideox-5b-i2v", "CogVideo's own script, LoRA, our overlays"]
        if not clock.fits():
            return [*name, NO_TIME, "", "", "", ""]
        command = [sys.executable, str(ROOT / "benchmarks" / "cogvideo_gpu.py"), "--json", str(file)]
        error = run(command, clock.limit())
        if error:
            return [*name, error, "", "", "", ""]
        row = max(json.loads(file.read_text())["rows"], key=lambda r: r["peak (GB)"])
        return [*name, row["peak (GB)"], "", "", "", row["median step (s)"]]


if __name__ == "__main__":
    sys.exit(main())
