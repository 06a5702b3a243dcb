"""Runs a function on files in a separate process, so that no file can hang or crash the caller's.

    with Guard(probe, timeout=60) as guard:
        info = guard(path)  # what probe(path) returns or raises, or MediaError

A process and not a thread, because nothing can interrupt the C code of FFmpeg and Pillow. Not `multiprocessing`'s,
because data workers are daemonic, and those may not have children.
"""

import ctypes
import faulthandler
import gc
import logging
import mmap
import os
import pickle
import resource
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import torch

from sat_ext.errors import MediaError, SatExtError

log = logging.getLogger(__name__)

R = TypeVar("R")

# A still of `types.MAX_PIXELS` takes up to 1.5 GiB on its way to 8-bit RGB; 16 reference frames of 8K in 10 bit,
# which H.264 and HEVC may keep, 1.6 GiB.
MEMORY = 4 << 30

_ALIGNMENT = 64  # bytes, of the arrays in shared memory: a cache line
_GRACE = 5.0  # seconds to wait for a process stuck in the kernel, and until an orphan that hangs ends
_FATAL = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

_started: "WeakSet[Guard[Any]]" = WeakSet()
_forking = threading.Lock()


class Guard(Generic[R]):
    """Calls `function(path, *args)` in a separate process, for one thread at a time.

    A call raises `MediaError` if it takes longer than `timeout` seconds (the user's `setting`) or `memory` bytes
    more than the process had at its start, or if it ends the process; the next call starts another. The process is
    forked at the first call, so `function` need not be picklable, and a data worker that inherits a guard starts
    its own. Arguments and results are pickled, except for NumPy arrays in results: these lie in shared memory, one
    after another while its `capacity` bytes last, and are overwritten after `release`.
    """

    def __init__(
        self,
        function: Callable[..., R],
        *,
        timeout: float,
        setting: str = "data.params.on_bad_sample.timeout",
        capacity: int = 0,
        memory: int = MEMORY,
    ) -> None:
        assert timeout > 0
        self.function, self.timeout, self.setting = function, timeout, setting
        self.capacity, self.memory = capacity, memory
        self.pid: int | None = None  # of the process, while there is one
        self._pipe: Connection | None = None
        self._end: Finalize | None = None
        self._shared: mmap.mmap | None = None
        self._used = 0

    def __call__(self, path: str, *args: Any) -> R:
        """What `function` returns. Raises `MediaError`, and what `function` raises for a user to fix."""
        if self._pipe is not None and self._pipe.poll(0):  # only its end can be readable now: it died since
            self._stop()
        pipe = self._pipe or self._start()
        try:
            pipe.send((path, args, self._used))
            if not pipe.poll(self.timeout):
                raise MediaError(path, f"reading it took longer than {self.timeout:g} s ({self.setting})")
            answer, places = pipe.recv()
        except (EOFError, OSError):  # it ended before or during its answer
            raise MediaError(path, f"the process that read it {_fate(self._stop())}") from None
        except BaseException:  # too slow, or Ctrl-C: a late answer would be taken for the next call's
            self._stop()
            raise
        if isinstance(answer, SatExtError):
            raise answer
        if places:
            assert self._shared is not None
            self._used = places[-1][1]
        return pickle.loads(answer, buffers=[memoryview(self._shared)[a:b] for a, b in places])  # type: ignore[arg-type]

    def __enter__(self) -> "Guard[R]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> Any:
        raise TypeError("a guard belongs to the process that made it; make another one there")

    def release(self) -> None:
        """Release the arrays of earlier results: the next ones overwrite them."""
        self._used = 0

    def close(self) -> None:
        """End the process, if there is one."""
        self._stop()

    def _start(self) -> Connection:
        if self._shared is None and self.capacity:
            self._shared = mmap.mmap(-1, self.capacity)
        # From the main thread only: the kernel sends the signal of a parent's death when the *thread* ends.
        parent = os.getpid() if threading.current_thread() is threading.main_thread() else None
        with _forking:  # else another thread's fork inherits `there`, and the end of our process goes unnoticed
            here, there = Pipe()
            pid = os.fork()
            if pid == 0:
                try:
                    here.close()
                    _prepare(parent, self.memory)
                    _serve(there, self.function, self._shared, self.timeout)
                finally:
                    os._exit(0)
            there.close()
            _started.add(self)
            self.pid, self._pipe = pid, here
        # Not `atexit`: data workers end by `os._exit`, after running only multiprocessing's finalizers.
        self._end = Finalize(self, _end, (pid, here), exitpriority=10)
        return here

    def _stop(self) -> int | None:
        """End the process; its exit code, the negative number of the signal that ended it, or None if unknown."""
        end, self._end, self._pipe, self.pid = self._end, None, None, None
        _started.discard(self)
        return None if end is None else end()


def _forget_all() -> None:
    """In a forked process: the guarded processes belong to its parent, so do not end them from here."""
    global _forking
    _forking = threading.Lock()  # a thread that held it was not forked, and would never release it
    for guard in list(_started):
        if guard._pipe is not None:
            guard._pipe.close()
        guard._end = guard._pipe = guard.pid = guard._shared = None
        guard._used = 0
    _started.clear()


os.register_at_fork(after_in_child=_forget_all)


def _end(pid: int, pipe: Connection) -> int | None:
    """Kill and reap a process. If it ended by itself, its own exit code is returned."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    pipe.close()  # after the kill, or the process could exit at the pipe's end and seem to have ended by itself
    deadline = time.monotonic() + _GRACE
    with suppress(ChildProcessError):
        while time.monotonic() < deadline:  # a process waiting for a network file system cannot be killed
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.001)
    return None


def _fate(code: int | None) -> str:
    if code is None:
        return "ended"
    if code >= 0:
        return f"ended with exit code {code}"
    hint = ", perhaps by the kernel for lack of memory" if -code == signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-code).name}{hint}"


# --- in the process ---


def _prepare(parent: int | None, memory: int) -> None:
    """Make the forked process harmless to its parent, and easy to end.

    It ends with `parent`; if that is None, when it next waits for work, or when its timer goes off.
    """
    gc.freeze()  # inherited objects must not be finalised here, nor copied because the collector marks them
    faulthandler.disable()  # or it would dump the stacks for each file that crashes a decoder
    warnings.simplefilter("ignore")  # Pillow's, about what it makes of broken files
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the parent decides when we end
        signal.signal(number, signal.SIG_IGN)
    # Back to ending this process, whatever the parent set; SIGALRM is `_serve`'s.
    for number in (*_FATAL, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    if parent is not None:
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the kernel knew that we want to end with it
            os._exit(0)
    # a core file for each broken file would fill the disk
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with suppress(OSError, ValueError):
        # Address space, as only that is refused before it is used; relative, as CUDA may hold a terabyte of it.
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        soft = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (soft if hard < 0 else min(soft, hard), hard))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # so the kernel kills this one, not the training
    torch.set_num_threads(1)  # the thread pool was not forked


def _serve(pipe: Connection, function: Callable[..., Any], shared: mmap.mmap | None, timeout: float) -> None:
    with suppress(EOFError):  # the parent has closed its end
        while True:
            path, args, used = pipe.recv()
            signal.setitimer(signal.ITIMER_REAL, timeout + _GRACE)  # ends an orphan that hangs
            pipe.send(_call(function, path, args, shared, used))
            signal.setitimer(signal.ITIMER_REAL, 0)


def _call(
    function: Callable[..., Any], path: str, args: tuple[Any, ...], shared: mmap.mmap | None, used: int
) -> tuple[bytes | SatExtError, list[tuple[int, int]]]:
    """The pickled result without its arrays, and their places (from, to) in shared memory."""
    places: list[tuple[int, int]] = []

    def belongs_in_the_pickle(buffer: pickle.PickleBuffer) -> bool:
        nonlocal used
        raw = buffer.raw()
        start = -(-used // _ALIGNMENT) * _ALIGNMENT
        if shared is None or start + raw.nbytes > len(shared):
            return True
        used = start + raw.nbytes
        memoryview(shared)[start:used] = raw
        places.append((start, used))
        return False

    try:
        result = function(path, *args)
        return pickle.dumps(result, protocol=5, buffer_callback=belongs_in_the_pickle), places
    except SatExtError as error:
        return error, []
    except Exception as error:
        log.debug("%s: %s", path, traceback.format_exc())
        if isinstance(error, MemoryError) or "allocate memory" in str(error):  # torch's is a RuntimeError
            return MediaError(path, "reading it takes more memory than a file may"), []
        line = (str(error).splitlines() or [""])[0]
        return MediaError(path, f"cannot be read: {type(error).__name__}: {line}"), []
