"""A process that has imported SAT, DeepSpeed and the engine once, and forks the ranks of a run in milliseconds.

    with Server() as server:
        run = server.start(["--base", "run.yaml"], world=2, folder=tmp_path)
        run.wait() == [0, 0]

Each rank is a real process, in a process group of the run's own, that calls `train_video.main` as the entry script
does, or `sat-ext` (`cli=True`). It writes the loss of every micro-step, exactly, and the keys of its samples to
`<folder>/rank<r>.jsonl`, and everything it prints to `<folder>/rank<r>.log`.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]


class Server:
    """Requests go to its standard input, one JSON line each; it answers with the ranks' process ids."""

    def __enter__(self) -> Server:
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        environment |= {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{environment.get('PYTHONPATH', '')}",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}",  # ninja, as in a shell
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.sat.ranks"], cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        with suppress(subprocess.TimeoutExpired):  # a process that pytest forked may hold the other end
            self.process.wait(timeout=5)
        self.process.kill()
        self.process.wait(timeout=20)

    def ask(self, request: dict[str, Any]) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise AssertionError("the fork server ended")

    def start(self, arguments: list[str], *, world: int, folder: Path, **more: Any) -> Running:
        """Fork the ranks of one run. `more` is what `prepare` of the rank understands."""
        folder.mkdir(parents=True, exist_ok=True)
        request = {"arguments": arguments, "world": world, "folder": str(folder), "port": free_port(), **more}
        return Running(self, self.ask({"start": request})["pids"], folder)


class Running:
    """The ranks of one run."""

    def __init__(self, server: Server, pids: list[int], folder: Path) -> None:
        self.server, self.pids, self.folder = server, pids, folder

    def wait(self, timeout: float = 120.0) -> list[int]:
        """Exit statuses, negative for a signal. Ranks that outlast the time, or one that failed, are killed."""
        # the server has been seen to wait on past its time: nothing may hang the tests
        last = threading.Timer(timeout + 30, self.kill)
        last.start()
        try:
            return list(self.server.ask({"wait": self.pids, "timeout": timeout})["statuses"])
        finally:
            last.cancel()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Signal the ranks and all that they have started."""
        os.killpg(self.pids[0], number)

    def alive(self) -> bool:
        """Whether all ranks run: one that has ended is a zombie until `wait`."""
        states = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in self.pids]
        return "Z" not in states

    def log(self, rank: int = 0) -> str:
        return (self.folder / f"rank{rank}.log").read_text()

    def records(self, rank: int = 0) -> list[dict[str, Any]]:
        return records_in(self.folder, rank)


def records_in(folder: Path, rank: int) -> list[dict[str, Any]]:
    """One for each micro-step of training: `loss` (hexadecimal), `rate`, `keys`, `iteration`, ..."""
    file = folder / f"rank{rank}.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def found_by(module: str, folder: Path, world: int) -> list[dict[str, Any]]:
    """What each of the ranks that a module of tests starts has found, by case."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", module, str(folder)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


def finish(run: Running, statuses: tuple[int, ...] = (0, 0)) -> None:
    assert run.wait() == list(statuses), run.log(0)[-4000:] + run.log(len(run.pids) - 1)[-4000:]


def folder_of(save: Path) -> Path:
    (run,) = save.glob("run-*")
    return run


# --- in the server ---


PRELOADED = (  # what a run imports in its course, two thirds of its time
    "train_video", "sat_ext.models.engine", "sat_ext.models.transformer", "sat_ext.sat.dataset",
    "sat_ext.sat.checkpoint.save", "deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2", "deepspeed.module_inject", "PIL.ImageFont",
    "sat_ext.cli.main", "sat_ext.models.t5",
)  # fmt: skip


def serve() -> None:
    """Answer requests until standard input ends."""
    for name in PRELOADED:
        import_module(name)
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # what the ranks share is neither looked through for garbage nor copied for it
    answer = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer.write(json.dumps({"pids": start(request["start"])}) + "\n")
        else:
            answer.write(json.dumps({"statuses": wait(request["wait"], request["timeout"])}) + "\n")


def start(request: dict[str, Any]) -> list[int]:
    pids: list[int] = []
    for rank in range(request["world"]):
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, pids[0] if pids else 0)
            end(run_rank(rank, request))
        os.setpgid(pid, pids[0] if pids else pid)
        pids.append(pid)
    return pids


def end(status: int) -> NoReturn:
    """As a process ends, but for taking every imported module apart: that takes seconds and shows nothing."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def wait(pids: list[int], timeout: float) -> list[int]:
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + timeout
    while len(statuses) < len(pids):
        for pid in set(pids) - set(statuses):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                statuses[pid] = os.waitstatus_to_exitcode(status)
                if statuses[pid]:  # as a launcher does, after a while for the others to end by themselves
                    deadline = min(deadline, time.monotonic() + 15)
        if time.monotonic() > deadline:
            for pid in set(pids) - set(statuses):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [statuses[pid] for pid in pids]


def run_rank(rank: int, request: dict[str, Any]) -> int:
    """In the forked process: the run, and its exit status."""
    folder = Path(request["folder"])
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(request["world"]),
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(request["port"]),
    }  # fmt: skip
    try:
        sys.argv = ["train_video.py", *request["arguments"]]
        import train_video

        if request.get("cli"):
            from sat_ext.cli.main import main

            if request.get("slow_encoding"):
                encode_slowly(request["slow_encoding"])
            sys.argv[0] = "sat-ext"
            main()
            return 0
        prepare(folder / f"rank{rank}.jsonl", request)
        train_video.main()
        return 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        from sat_ext.sat.excepthook import sentence_of

        sentence = sentence_of(error)
        print(f"error: {sentence}" if sentence else traceback.format_exc(), file=sys.stderr)
        return 1


def prepare(records: Path, request: dict[str, Any]) -> None:
    """Have the rank write what it trains on; `draws`: and take dropout from the global generators."""
    import sat_ext.sat.training as training
    from sat_ext.sat.checkpoint.data_state import stream_of
    from sat_ext.sat.checkpoint.writer import Writer
    from sat_ext.types import Bucket, groups_of

    if request.get("slow_writes"):
        write = Writer.write
        Writer.write = lambda *arguments: (time.sleep(request["slow_writes"]), write(*arguments))[1]
    if request.get("own_disks"):
        node = records.with_suffix("")
        node.mkdir(exist_ok=True)
        os.chdir(node)
    if request.get("busy") is not None:
        be_busy(records.parent / "busy", request["busy"])
    if request.get("full_disk") is not None:
        fill_up(*request["full_disk"])

    original: Callable[..., Any] = training.TrainingHooks.forward_step

    def forward_step(self: Any, data: Any, model: Any, args: Any, timers: Any) -> Any:
        import random

        import numpy as np
        import torch

        seen: dict[str, Any] = {}

        def watched() -> Any:
            for batch in data:
                seen.update(keys=[], sources=[], shapes=[])
                for group in groups_of(batch):
                    _, frames, _, height, width = group["mp4"].shape
                    shape = str(Bucket(frames=frames, height=height, width=width))
                    seen["keys"] += group["key"]
                    seen["sources"] += group["source"]
                    seen["shapes"] += [shape] * len(group["key"])
                yield batch

        if request.get("fill_at") == args.sat_ext.micro_steps and args.rank == 0:
            fill(Path(args.save).parent)
        if request.get("slow"):
            time.sleep(request["slow"])
        if request.get("gradients") and not records.exists():
            write_gradients(records.with_suffix(".pt"), stream_of(args).schedule)
        if args.sat_ext.micro_steps in request.get("nan", []):
            watched_data = watched()
            next(watched_data)
            loss, metrics = torch.tensor(float("nan")), {}
        else:
            loss, metrics = original(self, watched(), model, args, timers)
        if [records.stem, args.sat_ext.micro_steps] in request.get("nan_on", []):
            loss = loss * float("nan")
        if request.get("draws"):  # as CogVideo's engine does, whose noise and dropout are drawn so
            loss = loss * (1 + 0.1 * (random.random() + float(np.random.rand()) + torch.rand(())))
        rate = model.optimizer.param_groups[0]["lr"]
        if request.get("maps"):  # files of checkpoints that are mapped
            maps = Path("/proc/self/maps").read_text().splitlines()
            seen["maps"] = sorted({line.split(maxsplit=5)[5] for line in maps if ".pt" in line})
        seen["optimizer"] = type(getattr(model.optimizer, "optimizer", model.optimizer)).__name__
        record = {"loss": float(loss).hex(), "rate": float(rate).hex(), "iteration": args.iteration, **seen}
        with records.open("a") as file:
            file.write(json.dumps(record) + "\n")
        return loss, metrics

    training.TrainingHooks.forward_step = forward_step


def write_gradients(file: Path, schedule: Any) -> None:
    """Write the batches of the first update, all weights before it, the gradients that the optimizer sees, and how
    many samples a step of all ranks has on average."""
    import torch
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters
    from deepspeed.utils import safe_get_full_grad

    from sat_ext.models.engine import VideoDiffusionEngine

    forward, step = VideoDiffusionEngine.forward, DeepSpeedEngine.step
    batches: list[Any] = []

    def watched_forward(self: Any, batch: Any) -> Any:
        if self.training:
            batches.append(batch)
        return forward(self, batch)

    def watched_step(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.is_gradient_accumulation_boundary() and not file.exists():
            parameters = dict(self.module.named_parameters())
            with GatheredParameters(list(parameters.values())):
                weights = {n: p.detach().clone() for n, p in parameters.items()}
            gradients = {n: safe_get_full_grad(p) for n, p in parameters.items() if p.requires_grad}
            steps = 10**9
            found = {"batches": batches, "weights": weights, "gradients": gradients}
            torch.save({**found, "samples": sum(schedule.state(steps)) / steps}, file)
        return step(self, *arguments, **options)

    VideoDiffusionEngine.forward, DeepSpeedEngine.step = watched_forward, watched_step


def encode_slowly(seconds: float) -> None:
    """Each sample takes so long for each frame, and is written, and told in the log, at once."""
    from sat_ext.latents import writer

    encode = writer.encode_sample

    def slow(encoders: Any, pixels: Any, entry: Any, conditions: int) -> Any:
        time.sleep(seconds * pixels.shape[1])
        print("encoded", entry.key, pixels.shape[1], time.monotonic(), flush=True)
        return encode(encoders, pixels, entry, conditions)

    writer.FILE_SECONDS = 0.0
    writer.encode_sample = slow


def fill_up(rank: int, limit: int) -> None:
    """From now on, `rank` cannot write files of more than `limit` bytes."""
    if rank == int(os.environ["RANK"]):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def fill(folder: Path) -> None:
    """Leave no room on the disk of `folder`."""
    with suppress(OSError), open(folder / "fill", "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def be_busy(mark: Path, step: int) -> None:
    """From batch `step` on, a data worker makes `mark`, and takes a minute for each."""
    from sat_ext.data.stream import JointStream

    original: Callable[..., Any] = JointStream.batch

    def batch(self: Any, planned: Any, rank: int) -> Any:
        self.made = getattr(self, "made", 0) + 1
        if self.made > step:
            mark.touch()
            time.sleep(60)
        return original(self, planned, rank)

    JointStream.batch = batch  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    serve()
