"""CogVideo's own, unmodified `train_video.py` on a machine without a GPU.

    COGVIDEO_SAT=/path/to/CogVideo/sat python tests/cogvideo/on_cpu.py --base model.yaml sft.yaml ...
    COGVIDEO_SAT=... torchrun --nproc_per_node 2 tests/cogvideo/on_cpu.py --base ...

The arguments are that script's; after `sat-ext`, those of that command, with the checkout's code at hand. What
stands in for the missing GPU is all here: tensors asked for on "cuda" are made on the CPU, the ranks speak gloo,
and packages that the script imports but a training run does not need are empty. Nothing of the checkout changes,
and no compiled file is left in it.

With ON_CPU_RECORD=FOLDER, FOLDER/<rank>.jsonl gets a line for every micro-batch that the script trained or was
evaluated on: split, iteration, key, kind, shape, and the loss to its last bit.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import runpy
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Imported by the checkout's modules; each is empty where it is not installed.
STUBS = ("torchvision", "kornia", "pytorch_lightning", "beartype", "matplotlib", "magvit2_pytorch",
         "gateloop_transformer", "taylor_series_linear_attention")  # fmt: skip
FACTORIES = ("arange", "empty", "empty_like", "eye", "full", "full_like", "linspace", "ones", "ones_like", "rand",
             "randint", "randn", "randn_like", "tensor", "as_tensor", "zeros", "zeros_like")  # fmt: skip


def prepare(sat_folder: str | Path) -> Path:
    """Make modules of the checkout's `sat` folder importable on this CPU, and give the folder back.

    Changes `torch` for the whole process: call it in a process of its own.
    """
    folder = Path(sat_folder).resolve()
    sys.dont_write_bytecode = True
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    stub_missing_packages()
    without_cuda()
    without_compiler()
    video_writer()
    sys.path.insert(0, str(folder))
    return folder


def stub_missing_packages() -> None:
    """Let the checkout import what is not installed, while libraries that look first still miss it."""
    sys.meta_path.append(StubFinder())
    find_spec = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> importlib.machinery.ModuleSpec | None:
        spec = find_spec(name, package)
        return None if spec and isinstance(spec.loader, StubFinder) else spec

    importlib.util.find_spec = find


class StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what nothing else found: the packages in `STUBS` and every module under them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] in STUBS:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing in it."""


class Stub(types.ModuleType):
    """An empty package: whatever is taken from it is a class that does nothing when it is only named."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if self.__name__ == "beartype":
            return typing if name == "typing" else lambda function: function
        if self.__name__ == "beartype.typing":
            return getattr(typing, name)
        if name == "LightningModule":
            return torch.nn.Module
        return type(name, (), {})


def without_cuda() -> None:
    """Tensors and modules stay on the CPU, whatever device they are sent to or made on."""
    from torch.utils._device import _device_constructors

    _device_constructors()  # kept from its first call: `with torch.device` then redirects the originals
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.Tensor.to = on_cpu(torch.Tensor.to)  # type: ignore[method-assign]
    torch.nn.Module.to = on_cpu(torch.nn.Module.to)  # type: ignore[method-assign]
    torch.load = on_cpu(torch.load, "map_location")
    for name in FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))
    for name in ("synchronize", "empty_cache", "set_device", "manual_seed"):
        setattr(torch.cuda, name, lambda *_, **__: None)


def on_cpu(function: Callable[..., Any], key: str = "device") -> Callable[..., Any]:
    """`function` with "cpu" for a GPU among its arguments. An integer is one where `to` gets it first."""
    moves = function.__name__ == "to"

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        args = tuple("cpu" if _is_gpu(a, integers=moves and i == 1) else a for i, a in enumerate(args))
        if _is_gpu(kwargs.get(key), integers=True):
            kwargs[key] = "cpu"
        return function(*args, **kwargs)

    return call


def _is_gpu(value: Any, *, integers: bool) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    if isinstance(value, str):
        return value == "cuda" or value.startswith("cuda:")
    return integers and type(value) is int


def without_compiler() -> None:
    """DeepSpeed on a CPU compiles an all-reduce through shared memory at its first start; gloo's does the same."""
    backend: Any = importlib.import_module("deepspeed.comm.torch")  # as an attribute, that name is torch itself
    backend.build_shm_op = lambda: None


def video_writer() -> None:
    """imageio writes MP4 with `imageio-ffmpeg`, which the checkout lists; where it is missing, PyAV writes."""
    if importlib.util.find_spec("imageio_ffmpeg") is None:
        import imageio

        imageio.get_writer = VideoWriter  # type: ignore[assignment]


class VideoWriter:
    """As much of imageio's writer as CogVideo's script uses."""

    def __init__(self, path: str, fps: int) -> None:
        import av

        self.container = av.open(path, "w")
        self.stream = self.container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        self.frames = 0

    def __enter__(self) -> VideoWriter:
        return self

    def append_data(self, frame: np.ndarray) -> None:
        """Append uint8 RGB (height, width, 3)."""
        import av

        if not self.frames:
            self.stream.height, self.stream.width = frame.shape[:2]
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture.pts = self.frames
        self.frames += 1
        self.container.mux(self.stream.encode(picture))

    def __exit__(self, *_: object) -> None:
        self.container.mux(self.stream.encode(None))
        self.container.close()


class Record:
    """What went through the script's two hooks, one line of JSON each."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a")

    def watch(self, module: Any) -> None:
        """Have SAT's `training_main` in `module` hand both hooks over to this record."""
        original = module.training_main

        def training_main(args: Any, **hooks: Any) -> Any:
            for name, split in (("forward_step_function", "train"), ("forward_step_eval", "valid")):
                hooks[name] = functools.partial(self.step, split, hooks[name])
            return original(args, **hooks)

        module.training_main = training_main

    def step(self, split: str, hook: Callable[..., Any], data: Any, model: Any, args: Any, timers: Any) -> Any:
        """Call `hook`, and write down the batch that it took from `data`."""
        taken: list[dict[str, Any]] = []

        def batches() -> Iterator[dict[str, Any]]:
            for batch in data:
                taken.append(batch)
                yield batch

        loss, metrics = hook(batches(), model, args, timers)
        (batch,) = taken
        line = {
            "split": split,
            "iteration": args.iteration,
            "loss": loss.item(),
            "shape": list(batch["mp4"].shape),
        }
        line |= {k: batch[k] for k in ("key", "kind", "source")}
        print(json.dumps(line), file=self.file, flush=True)
        return loss, metrics


def main() -> None:
    """Run the script named by COGVIDEO_SAT with this process's arguments."""
    if "COGVIDEO_SAT" not in os.environ:
        sys.exit("COGVIDEO_SAT: not set; name the 'sat' folder of a CogVideo checkout.")
    folder = prepare(os.environ["COGVIDEO_SAT"])
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(name, default)
    if sys.argv[1:2] == ["sat-ext"]:
        from sat_ext.cli.main import main as sat_ext

        sys.argv = sys.argv[1:]
        return sat_ext()
    if "ON_CPU_RECORD" in os.environ:
        record = Record(Path(os.environ["ON_CPU_RECORD"], os.environ["RANK"] + ".jsonl"))
        record.watch(importlib.import_module("sat.training.deepspeed_training"))
    script = folder / "train_video.py"
    # the script counts no device here, and wants the number of one; YAML settings still beat these
    flags = ["--device", os.environ["LOCAL_RANK"], "--distributed-backend", "gloo"]
    sys.argv = [str(script), *sys.argv[1:], *flags]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    sys.path[:1] = []  # this folder is no place to import from
    main()
