"""CogVideo's own train_video.py on one GPU: CogVideoX-5B-I2V in its real size with random weights, LoRA, 20 steps.

    COGVIDEO_SAT=/path/to/CogVideo/sat python benchmarks/cogvideo_gpu.py [--overlays joint i2v] [--json FILE]

The checkout is tag v1.0 of CogVideo, and stays as it is; behind its YAMLs come those of configs/cogvideo/ that
`--overlays` names. The text encoder has the size of T5 v1.1 XXL; everything is made here, in a folder of 10 GB
that is removed at the end. Memory is the most that PyTorch's allocator held in the steps of a bucket, and time is
from one step's start to the next's; the first step of each bucket is left out, which makes optimizer states and
looks for the fastest kernels. `--tiny` tries all of this on a CPU with small models, and its figures say nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from report import report

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT), str(ROOT / "tests" / "cogvideo")]

import on_cpu  # noqa: E402
import tiny  # noqa: E402

from tests.media import pattern, write_clip  # noqa: E402

MODEL = "cogvideox_5b_i2v_lora"
SIZE, FRAMES = (480, 720), (1, 17, 33, 49)
T5_XXL: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
}
CLIPS = 8  # of each kind
GB = 1e9
COLUMNS = (
    "samples",
    "frames",
    "steps",
    "median step (s)",
    "slowest (s)",
    "peak (GB)",
    "loss, first",
    "loss, last",
)


def main() -> int:
    """Write data, weights and YAMLs, run the script in a process of its own, show what it took."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--overlays", nargs="+", default=["joint", "i2v"], help="files of configs/cogvideo/")
    parser.add_argument("--tiny", action="store_true", help="small models on a CPU: to try this script")
    parser.add_argument("--json", type=Path, help="save the table here too")
    args = parser.parse_args()
    sat = os.environ.get("COGVIDEO_SAT", "")
    if not (Path(sat) / "configs" / f"{MODEL}.yaml").is_file() or not sat:
        parser.error(f"COGVIDEO_SAT: {sat!r} has no configs/{MODEL}.yaml; name the sat folder of CogVideo v1.0.")
    if not args.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU; add --tiny to try this script without one.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_media(folder / "data", tiny.SIZE if args.tiny else SIZE)
        files = write_yamls(Path(sat), folder, args)
        environment = os.environ | {"PYTHONPATH": str(ROOT), "STEPS_FILE": str(folder / "steps.jsonl")}
        command = [sys.executable, __file__, "--inside", *(["--tiny"] if args.tiny else []), "--base", *files]
        subprocess.run(command, env=environment, check=True)
        steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    gpu = "none (--tiny, no measure of anything)" if args.tiny else torch.cuda.get_device_name()
    facts = {"gpu": gpu, "cuda": torch.version.cuda, "overlays": args.overlays, "steps": steps}
    report(f"{MODEL}, CogVideo's own train_video.py", COLUMNS, rows_of(steps), args.json, **facts)
    print(f"GPU: {gpu}; CUDA {torch.version.cuda}; overlays {', '.join(args.overlays)}")
    return 0


def rows_of(steps: Sequence[dict[str, Any]]) -> list[list[object]]:
    """A row for each shape of batch; its first step counts only where it has no other."""
    shapes = sorted({(s["samples"], s["frames"]) for s in steps}, key=lambda shape: shape[1])
    return [_row([s for s in steps if (s["samples"], s["frames"]) == shape], *shape) for shape in shapes]


def _row(steps: Sequence[dict[str, Any]], samples: int, frames: int) -> list[object]:
    measured = steps[1:] or steps
    seconds, peak = [s["seconds"] for s in measured], max(s["peak"] for s in measured) / GB
    figures = [statistics.median(seconds), max(seconds), peak, steps[0]["loss"], steps[-1]["loss"]]
    return [samples, frames, len(steps), *[round(f, 3) for f in figures]]


def write_media(folder: Path, size: tuple[int, int]) -> None:
    """Clips of 56 frames at 8 a second, and stills, with captions beside them."""
    from PIL import Image

    for i in range(CLIPS):
        write_clip(folder / f"clip{i}.mp4", frames=56, fps=8, size=size)
        Image.fromarray(pattern(i, *size)).save(folder / f"still{i}.png")
        for kind in ("clip", "still"):
            (folder / f"{kind}{i}.txt").write_text(f"{kind} number {i}")


def write_yamls(sat: Path, folder: Path, args: argparse.Namespace) -> list[str]:
    """CogVideo's YAMLs, the overlays, and one with paths and the number of steps, as `--base` takes them."""
    if args.tiny:
        tiny.write_all(sat, folder)
        files = [folder / f"{MODEL}.yaml", folder / "sft.yaml"]
    else:
        write_text_encoder(folder / "t5")
        files = [sat / "configs" / f"{MODEL}.yaml", sat / "configs" / "sft.yaml"]
    files += [ROOT / "configs" / "cogvideo" / f"{name}.yaml" for name in args.overlays]
    model: Any = OmegaConf.to_container(OmegaConf.merge(*map(OmegaConf.load, files)).model, resolve=True)
    embedders = model["conditioner_config"]["params"]["emb_models"]
    embedders[0]["params"]["model_dir"] = str(folder / "t5")
    own = {
        "args": {
            "experiment_name": "gpu", "load": None, "save": str(folder / "save"), "save_interval": None,
            "train_iters": args.steps + 1, "eval_interval": None, "log_interval": 1, "num_workers": 2,
            "train_data": [str(folder / "data")], "valid_data": None,
        },
        "data": {"params": {"buckets": {"frames": [1, 9, tiny.FRAMES] if args.tiny else list(FRAMES)}}},
        "model": {"conditioner_config": {"params": {"emb_models": embedders}}},
        "deepspeed": {"train_micro_batch_size_per_gpu": 1},
    }  # fmt: skip
    if not args.tiny:
        own["model"]["first_stage_config"] = {"params": {"ckpt_path": None}}  # random weights
    (folder / "own.yaml").write_text(yaml.safe_dump(own))
    return [str(path) for path in (*files, folder / "own.yaml")]


def write_text_encoder(folder: Path) -> None:
    """T5 v1.1 XXL's encoder with random weights in bf16 (9.5 GB), made on the GPU, and the tests' tokenizer."""
    from transformers import T5Config, T5EncoderModel

    tiny.write_t5(folder)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        encoder = T5EncoderModel(T5Config(**T5_XXL, feed_forward_proj="gated-gelu"))
    torch.set_default_dtype(torch.float32)
    encoder.save_pretrained(folder)
    del encoder
    torch.cuda.empty_cache()


def run_inside(arguments: list[str]) -> None:
    """The checkout's script in this process, with a look at clock and memory at every step."""
    small = "--tiny" in arguments
    arguments = [a for a in arguments if a != "--tiny"]
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(name, default)
    folder = Path(os.environ["COGVIDEO_SAT"]).resolve()
    if small:
        on_cpu.prepare(folder)
        arguments += ["--device", "0", "--distributed-backend", "gloo"]
    else:
        sys.dont_write_bytecode = True
        on_cpu.stub_missing_packages()
        on_cpu.video_writer()
        sys.path.insert(0, str(folder))
    from sat.training import deepspeed_training

    original = deepspeed_training.training_main

    def training_main(args: argparse.Namespace, **hooks: Any) -> Any:
        hooks["forward_step_function"] = partial(look, [], hooks["forward_step_function"], not small)
        return original(args, **hooks)

    deepspeed_training.training_main = training_main
    sys.argv = [str(folder / "train_video.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def look(
    steps: list[dict[str, Any]], hook: Any, gpu: bool, data: Any, model: Any, args: argparse.Namespace, timers: Any
) -> Any:
    """Call `hook`; note when it began, the memory held since the last call, and what it trained on.

    The last call only ends the step before it, and the process: a checkpoint of random weights is 30 GB.
    """
    if gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    if steps:
        steps[-1] |= {"peak": peak_memory(gpu), "seconds": start - steps[-1].pop("start")}
    if args.iteration == args.train_iters - 1:
        lines = [json.dumps(step) + "\n" for step in steps]
        Path(os.environ["STEPS_FILE"]).write_text("".join(lines))
        sys.exit()
    taken: list[dict[str, Any]] = []

    def batches() -> Iterator[dict[str, Any]]:
        for batch in data:
            taken.append(batch)
            yield batch

    loss, metrics = hook(batches(), model, args, timers)
    samples, frames = taken[0]["mp4"].shape[:2]
    steps.append({"start": start, "samples": samples, "frames": frames, "loss": loss.item()})
    return loss, metrics


def peak_memory(gpu: bool) -> int:
    """Bytes held at most since the last call; on a CPU, since the start."""
    if not gpu:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        run_inside(sys.argv[2:])
    else:
        sys.exit(main())
