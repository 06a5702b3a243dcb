"""A local S3 server behind a long line: two processes, which share one core.

The line is a relay in user space, as the kernel's own delay (netem) is a module that many machines lack: it passes
on what it gets 15 ms later, lets a new connection wait for 30 ms, and carries 1 Gbit/s each way, all connections
together. It loses nothing, and TCP's slow start is not modelled: both would make a real line slower.

The server answers what s3fs asks in order to read: listings, HEAD, and GET with ranges. Its files lie in the page
cache, and aiohttp sends them by `sendfile`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_longlong
from dataclasses import dataclass
from datetime import datetime, timezone
from multiprocessing import Pipe, Process, Value
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

LATENCY, RATE = 0.030, 125e6  # seconds there and back; bytes a second
CHUNK = 1 << 18


@dataclass
class Far:
    """The address of the line's near end, and what passed since `reset`."""

    url: str
    pids: tuple[int, ...]
    sent: Any
    asked: Any
    _cpu: float = 0.0

    def reset(self) -> None:
        """Count from 0 again."""
        self.sent.value = self.asked.value = 0
        self._cpu = self._cpu_time()

    @property
    def cpu(self) -> float:
        """CPU seconds of both processes since `reset`."""
        return self._cpu_time() - self._cpu

    def _cpu_time(self) -> float:
        stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in self.pids]
        return sum(int(stat[11]) + int(stat[12]) for stat in stats) / os.sysconf("SC_CLK_TCK")


@contextmanager
def far_server(root: Path, core: int) -> Iterator[Far]:
    """Serve the folders in `root` as buckets, at the far end of the line, on one core."""
    sent, asked = Value(c_longlong), Value(c_longlong)
    server = _start(core, _serve, root, asked)
    line = _start(core, _relay, server.port, sent)
    try:
        yield Far(f"http://127.0.0.1:{line.port}", (server.process.pid, line.process.pid), sent, asked)  # type: ignore[arg-type]
    finally:
        for each in (line, server):
            each.process.terminate()
            each.process.join()


@dataclass
class _Started:
    process: Process
    port: int


def _start(core: int, run: Any, *args: Any) -> _Started:
    here, there = Pipe()

    def main() -> None:
        os.sched_setaffinity(0, {core})
        logging.getLogger("asyncio").setLevel(logging.ERROR)  # of a reader that left, curl's end
        asyncio.run(run(*args, there))

    process = Process(target=main, daemon=True)
    process.start()
    return _Started(process, here.recv())


async def _serve(root: Path, asked: Any, ready: Connection) -> None:
    from aiohttp import web

    async def answer(request: web.Request) -> web.StreamResponse:
        asked.value += 1
        bucket, _, key = request.match_info["path"].partition("/")
        if "list-type" in request.query:
            return web.Response(text=_listing(root / bucket, request.query), content_type="application/xml")
        path = root / bucket / key
        return web.FileResponse(path, CHUNK) if path.is_file() else web.Response(status=404)

    application = web.Application()
    application.router.add_get("/{path:.*}", answer)  # HEAD too
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    ready.send(runner.addresses[0][1])
    await asyncio.Event().wait()


def _listing(bucket: Path, query: Any) -> str:
    """ListObjectsV2 in one page."""
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
    files, folders = [], set()
    for path in sorted(p for p in bucket.rglob("*") if p.is_file()):
        key = path.relative_to(bucket).as_posix()
        inside = key.removeprefix(prefix)
        if not key.startswith(prefix):
            continue
        if delimiter and delimiter in inside:
            folders.add(prefix + inside.partition(delimiter)[0] + delimiter)
            continue
        status = path.stat()
        changed = datetime.fromtimestamp(status.st_mtime, timezone.utc).isoformat(timespec="milliseconds")
        tag = f"&quot;{status.st_mtime_ns:x}-{status.st_size:x}&quot;"  # as aiohttp makes it
        files.append(
            f"<Contents><Key>{escape(key)}</Key><Size>{status.st_size}</Size><ETag>{tag}</ETag>"
            f"<LastModified>{changed}</LastModified></Contents>"
        )
    commons = "".join(f"<CommonPrefixes><Prefix>{escape(f)}</Prefix></CommonPrefixes>" for f in sorted(folders))
    count = len(files) + len(folders)
    inner = f"<KeyCount>{count}</KeyCount><IsTruncated>false</IsTruncated>{''.join(files)}{commons}"
    return f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{inner}</ListBucketResult>'


async def _relay(port: int, sent: Any, ready: Connection) -> None:
    loop = asyncio.get_running_loop()
    free = {"up": 0.0, "down": 0.0}  # when the line has carried what it has taken, by direction

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, way: str) -> None:
        arrives = 0.0
        try:
            while data := await source.read(CHUNK):
                free[way] = max(free[way], loop.time()) + len(data) / RATE
                arrives = free[way] + LATENCY / 2
                loop.call_at(arrives, sink.write, data)
                sent.value += len(data) * (way == "down")
                await asyncio.sleep(free[way] - loop.time())
                await sink.drain()
        except ConnectionError:
            pass
        loop.call_at(max(arrives, loop.time()), sink.close)

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(LATENCY)
        there, away = await asyncio.open_connection("127.0.0.1", port, limit=4 * CHUNK)
        await asyncio.gather(pump(reader, away, "up"), pump(there, writer, "down"))

    server = await asyncio.start_server(connect, "127.0.0.1", 0, limit=4 * CHUNK)
    ready.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()
