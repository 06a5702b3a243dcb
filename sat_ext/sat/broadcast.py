"""One object on every rank: made by the first, and held once in the memory of each machine."""

import mmap
import os
import pickle
import re
import socket
import tempfile
import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import pyarrow as pa
import torch.distributed as dist
from torch.distributed import distributed_c10d

from sat_ext.errors import DataError, SatExtError
from sat_ext.files import is_url
from sat_ext.ranks import gather

T = TypeVar("T")

HEARTBEAT = 5.0  # seconds between messages to the ranks that wait; they give up after `args.timeout_minutes`
_CHUNK = 64 << 20  # bytes in one message
_ALIGNMENT = 64  # of buffers, which Arrow recommends
_PIECE = 4 << 20  # bytes of one value of the store, which takes at most 8 MiB


@dataclass(frozen=True, slots=True)
class _Work:
    """What rank 0 asks of all ranks while they wait for it; their parts are in the store under `name`."""

    do: Callable[[Any], Any]
    name: str


# what to do, the part of each rank, and where the answer goes; None: there will be no more
_asked: "SimpleQueue[tuple[Callable[[Any], Any], Sequence[Any], Future[list[Any]]] | None]" = SimpleQueue()


def on_all_ranks(do: Callable[[Any], T], parts: Sequence[Any]) -> list[T]:
    """`do` of each rank's part, on that rank, in their order. `do` is pickled.

    To be called inside `make` of `share_from_first_rank`, as the other ranks wait there. A `SatExtError` of any
    rank is raised here.
    """
    answer: Future[list[T]] = Future()
    _asked.put((do, parts, answer))
    return answer.result()


def share_from_first_rank(make: Callable[[], T], *, heartbeat: float = HEARTBEAT) -> T:
    """What `make` returns on rank 0, on every rank. A `SatExtError` of rank 0 is raised on all of them.

    Arrays in it (Arrow's and NumPy's) are not copied for each rank: the ranks of a machine map one file in the
    folder for temporary files, and remove it as soon as they have. Such arrays are read-only.
    """
    if dist.get_world_size() == 1:
        return make()
    buffers: list[pickle.PickleBuffer] = []
    message: Any = None
    if dist.get_rank() == 0:
        message = _made(make, buffers, heartbeat)
    while message is None or isinstance(message, _Work):
        message = _broadcast(None)
        if isinstance(message, _Work):
            _do_own_part(message)
    if isinstance(message, SatExtError):
        raise message
    header, spans, name = message
    memory = _spread(buffers, spans, Path(tempfile.gettempdir(), name))
    return pickle.loads(header, buffers=[memory[start:end] for start, end in spans])


def require_everywhere(paths: Sequence[str], place: str) -> None:
    """Raise `DataError` if some ranks lack a local file or folder of `paths` that others have.

    What all of them lack is left to its reader, whose error says more.
    """
    # os.path: a mount that has died is an error to `Path.exists`, on that rank alone
    lacking = [p for p in paths if not is_url(p) and not os.path.exists(re.sub(r"/?[^/]*[{*?].*", "", p) or ".")]
    found = gather((socket.gethostname(), lacking))
    for path in paths:
        without = [f"rank {rank} ({host})" for rank, (host, lacks) in enumerate(found) if path in lacks]
        if 0 < len(without) < len(found):
            raise DataError(
                f"{place}: {path} does not exist on {', '.join(without)}, but {len(found) - len(without)} of "
                f"{len(found)} ranks have it; a mount may be missing on that machine."
            )


def _made(make: Callable[[], Any], buffers: list[pickle.PickleBuffer], heartbeat: float) -> Any:
    """On rank 0: call `make`, and send the message that the others wait for. `buffers` gets the arrays."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(make())
        except BaseException as error:
            future.set_exception(error)
        _asked.put(None)

    threading.Thread(target=run, daemon=True).start()  # no executor: it would hold up the end on Ctrl-C
    while True:
        try:
            asked = _asked.get(timeout=heartbeat)
        except Empty:
            _broadcast(None)  # or the others, whose collective has a time limit, would give up
            continue
        if asked is None:
            break
        do, parts, answer = asked
        work = _Work(do, f"sat_ext/work/{uuid.uuid4().hex}")
        # by the store, because with a broadcast and a gather every rank would hold the parts and results of all
        for rank, part in enumerate(parts):
            _put(f"{work.name}/{rank}", part)
        _broadcast(work)
        _do_own_part(work)
        found = [_take(f"{work.name}/{rank}") for rank in range(len(parts))]
        if errors := [error for _, error in found if error is not None]:
            answer.set_exception(errors[0])
        else:
            answer.set_result([result for result, _ in found])
    if isinstance(error := future.exception(), SatExtError):
        return _broadcast(error)
    header = pickle.dumps(future.result(), protocol=5, buffer_callback=buffers.append)
    places: dict[tuple[int, int], tuple[int, int]] = {}  # memory that several arrays share is sent once
    spans, end = [], 0
    for buffer in map(pa.py_buffer, buffers):
        if (own := (buffer.address, buffer.size)) not in places:
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = start + buffer.size
            places[own] = start, end
        spans.append(places[own])
    return _broadcast((header, spans, f"sat_ext-{uuid.uuid4().hex}"))


def _do_own_part(work: _Work) -> None:
    """Returns when all ranks have done theirs."""
    name, error = f"{work.name}/{dist.get_rank()}", None
    try:
        found = work.do(_take(name))
    except SatExtError as own:
        found, error = None, own
    _put(name, (found, error))
    dist.barrier()


def _put(name: str, value: Any) -> None:
    store: Any = distributed_c10d._get_default_store()
    data = pickle.dumps(value)
    for start in range(0, len(data) + 1, _PIECE):  # the last one is shorter, perhaps empty
        store.set(f"{name}/{start}", data[start : start + _PIECE])


def _take(name: str) -> Any:
    store, data, is_last = distributed_c10d._get_default_store(), bytearray(), False
    while not is_last:
        key = f"{name}/{len(data)}"
        piece = store.get(key)
        store.delete_key(key)
        data += piece
        is_last = len(piece) < _PIECE
    return pickle.loads(data)


def _spread(buffers: list[pickle.PickleBuffer], spans: list[tuple[int, int]], path: Path) -> memoryview:
    """The memory of all buffers, which rank 0 has: on each machine a file at `path`, if one can be made there."""
    first, size = dist.get_rank() == 0, max((end for _, end in spans), default=0) or 1
    memory: Any = None
    if first:
        memory = _create(path, size)
        for buffer, (start, end) in zip(buffers, spans):
            memory[start:end] = buffer.raw()
    dist.barrier()  # so that rank 0's machine maps rank 0's file
    if not first:
        memory = _create(path, size)
    dist.barrier()  # so that a rank without memory sees whether there is a file
    if memory is None and not path.exists():  # the rank that made it found the disk full
        memory = mmap.mmap(-1, size)
    is_filled = gather(first or memory is None)
    if not all(is_filled):
        # one rank of each other machine; its other ranks would receive the bytes only to drop them
        receivers = [rank for rank, filled in enumerate(is_filled) if not filled]
        group = dist.new_group([0, *receivers])
        for start in range(0, size, _CHUNK) if first or dist.get_rank() in receivers else ():
            chunk = _broadcast(memory[start : start + _CHUNK] if first else None, group)
            if not first:
                memory[start : start + _CHUNK] = chunk
        dist.barrier()
        dist.destroy_process_group(group)
    if memory is None:
        with open(path, "rb") as file:
            memory = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    dist.barrier()  # all have mapped it
    path.unlink(missing_ok=True)
    return memoryview(memory).toreadonly()


def _create(path: Path, size: int) -> mmap.mmap | None:
    """Memory of `size` bytes: a new file or, if none can be made, private memory. None: another rank made it.

    It has its full size before the next barrier: no rank maps a file that still grows.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return None
    except OSError:
        return mmap.mmap(-1, size)
    try:
        os.posix_fallocate(file, 0, size)  # a full disk would otherwise end the process when it is written to
        return mmap.mmap(file, size)
    except OSError:
        path.unlink()
        return mmap.mmap(-1, size)
    finally:
        os.close(file)


def _broadcast(message: Any, group: dist.ProcessGroup | None = None) -> Any:
    box = [message]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]
