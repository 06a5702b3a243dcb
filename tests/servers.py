"""Local servers for the tests: HTTP with byte ranges that counts what it sends, and S3."""

from __future__ import annotations

import os
import re
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote

import pytest


@dataclass
class Served:
    """A folder behind `url`. `sent` counts the bytes of bodies, `requests` the answers by method."""

    url: str
    root: Path
    sent: int = 0
    requests: list[str] = field(default_factory=list)
    ranges: bool = True
    says_ranges: bool = True
    hangs: bool = False
    refuses: int = 0  # how many requests for data are answered with 503 before one is served
    stumbles: int = 0  # how many requests of any kind are
    drops: int = 0  # how many answers end in the middle of their body

    def reset(self) -> None:
        self.sent, self.requests = 0, []


@contextmanager
def http_server(root: Path, port: int = 0) -> Iterator[Served]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            served.requests.append(self.command)
            path = served.root / unquote(self.path.partition("?")[0]).lstrip("/")
            if served.stumbles:
                served.stumbles -= 1
                return self.refuse(503)
            if body and served.hangs:
                time.sleep(5)
            if body and served.refuses:
                served.refuses -= 1
                return self.refuse(503)
            if path.is_dir():
                names = (n + "/" * (path / n).is_dir() for n in sorted(os.listdir(path)))
                links = "".join(f'<a href="{quote(name)}">{name}</a>' for name in names)
                data, status, mime = links.encode(), 200, "text/html"
            elif path.is_file():
                data, status, mime = path.read_bytes(), 200, "application/octet-stream"
            else:
                return self.refuse(404)
            total, wanted = len(data), re.match(r"bytes=(\d+)-(\d+)?", self.headers.get("Range", ""))
            if wanted and served.ranges:
                status = 206
                start, stop = int(wanted[1]), int(wanted[2] or total - 1) + 1
                data = data[start:stop]
            self.send_response(status)
            if status == 206:
                self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{total}")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Content-Type", mime)
            self.send_header("ETag", f'"{total}"')
            if served.says_ranges:
                self.send_header("Accept-Ranges", "bytes" if served.ranges else "none")
            self.end_headers()
            if body:
                if served.drops:
                    served.drops -= 1
                    self.close_connection = True
                    data = data[: len(data) // 2]
                try:
                    self.wfile.write(data)
                except (BrokenPipeError, ConnectionResetError):
                    return
                served.sent += len(data)

        def refuse(self, status: int) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *args: object) -> None:
            pass  # a client that closed its connection

    server = Server(("127.0.0.1", port), Handler)
    served = Served(f"http://127.0.0.1:{server.server_port}", root)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 server of its own, found by the environment alone, with an empty bucket: its URL s3://BUCKET."""
    server_module = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    import s3fs

    server = server_module.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        bucket = f"data-{uuid.uuid4().hex}"  # moto's servers in one process share what they hold
        s3fs.S3FileSystem().mkdir(bucket)
        yield f"s3://{bucket}"
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()
