"""Files behind URLs, read by ranges through fsspec.

File systems are made in the process that uses them: fsspec's event loop does not survive a fork.
"""

from __future__ import annotations

import os
import time
from typing import Any
from urllib.parse import urlsplit

import fsspec

from sat_ext.errors import ConfigError, MediaError
from sat_ext.files.ranges import RangedFile

# Bytes of a range request: the first one, which is to hold a header, and the largest.
_FIRST_READ = 32 << 10
_LARGEST_READ = 4 << 20

# Seconds without an answer after which a server is given up, and of a request in all.
_CONNECT_TIMEOUT, _READ_TIMEOUT, _REQUEST_TIMEOUT = 20.0, 30.0, 120.0
_ATTEMPTS = 3

_NO_RANGES = "its server does not answer range requests; copy it to a disk, or serve it by one that does"
_EXTRAS = {"s3": "sat_ext[s3]", "s3a": "sat_ext[s3]", "http": "sat_ext[http]", "https": "sat_ext[http]"}

# Every file system that was made, by process, and never dropped: were a forked worker to drop those that it takes
# over, closing their connections would strike them from the list (epoll) on which its parent still waits for them.
_kept: dict[tuple[int, int], Any] = {}


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for `url`, and the path in it. Raises `ConfigError` where no package reads it."""
    protocol = url.partition("://")[0]
    try:
        if "::" in url:  # a name, which fsspec would cut there, and open what it says behind it
            maker = fsspec.get_filesystem_class(protocol)
            fs = maker(**{**maker._get_kwargs_from_urls(url), **_timeouts(protocol)})
            path = maker._strip_protocol(url)
        else:
            fs, path = fsspec.core.url_to_fs(url, **_timeouts(protocol))
    except ImportError as error:
        package = _EXTRAS.get(protocol, "the package that it names")
        raise ConfigError(f"{url}: {protocol}:// cannot be read ({error}); pip install {package}.") from error
    except Exception as error:  # each file system of fsspec has errors of its own
        if isinstance(error, ValueError) and "Protocol not known" in str(error):
            raise ConfigError(f"{url}: {protocol}:// is no kind of URL that fsspec reads; check it.") from error
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{url}: {protocol}:// cannot be read ({why}); check its settings.") from error
    _kept[os.getpid(), id(fs)] = fs
    return fs, path


def _timeouts(protocol: str) -> dict[str, Any]:
    """Options against servers that never answer; fsspec's own configuration files win."""
    if protocol in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(_REQUEST_TIMEOUT, sock_connect=_CONNECT_TIMEOUT, sock_read=_READ_TIMEOUT)
        options: dict[str, Any] = {"client_kwargs": {"timeout": timeout}}
    elif protocol in ("s3", "s3a"):
        options = {"config_kwargs": {"connect_timeout": _CONNECT_TIMEOUT, "read_timeout": _READ_TIMEOUT}}
    else:
        options = {}
    configured = fsspec.config.conf.get(protocol, {})
    return {key: value for key, value in options.items() if key not in configured}


def info_of(url: str) -> dict[str, Any]:
    """What the file system tells of a file without reading it. Raises `MediaError`."""
    fs, path = filesystem(url)
    try:
        return dict(fs.info(path))
    except Exception as error:  # each file system of fsspec has errors of its own
        raise MediaError(url, reason_of(error)) from error


def reason_of(error: BaseException) -> str:
    """Why a file cannot be read, in words that do not depend on the file system."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and cause and getattr(cause, "status", 404) != 404:
        return f"its server refuses it with status {cause.status}"  # type: ignore[attr-defined]
    if isinstance(error, FileNotFoundError) and cause and not hasattr(cause, "status"):
        return reason_of(cause)  # fsspec's HTTP takes a dead server for a missing file
    if isinstance(error, (FileNotFoundError, NotADirectoryError)) or "null byte" in str(error):
        return "no such file"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if isinstance(error, TimeoutError):
        return "its server did not answer in time"
    if isinstance(error, ValueError) and "range requests" in str(error):
        return _NO_RANGES
    return f"cannot be read: {str(error) or type(error).__name__}"


class RemoteFile(RangedFile):
    """A file behind a URL; `path` is named in errors.

    One range of it is held. Each range that follows the last one, or starts a little after it, is twice as
    long: a header costs little, and reading on costs few requests. Raises `MediaError` at once where it is
    missing or empty, or its server knows no ranges.
    """

    def __init__(self, url: str, path: str) -> None:
        self._path = path
        self._file: Any = None
        fs, inner = filesystem(url)
        try:
            self._file = fs.open(inner, "rb", block_size=_FIRST_READ, cache_type="none")
        except Exception as error:  # each file system of fsspec has errors of its own
            raise MediaError(path, reason_of(error)) from error
        size = getattr(self._file, "size", None)
        if size is None:  # fsspec would stream it, and cannot seek
            raise MediaError(path, _NO_RANGES)
        if size == 0:
            raise MediaError(path, "the file is empty (0 bytes)")
        super().__init__(urlsplit(url).path, int(size))
        self._held, self._held_at = memoryview(b""), 0
        self._ahead = _FIRST_READ // 2

    def read_at(self, position: int, buffer: memoryview) -> int:
        """Raises `MediaError` for what the server or the connection does wrong."""
        at = position - self._held_at
        if not 0 <= at < len(self._held):
            gap = at - len(self._held)
            self._ahead = min(2 * self._ahead, _LARGEST_READ) if 0 <= gap <= self._ahead else _FIRST_READ
            self._held = memoryview(self._fetch(position, max(len(buffer), self._ahead)))
            self._held_at, at = position, 0
        part = self._held[at : at + len(buffer)]
        buffer[: len(part)] = part
        return len(part)

    def _fetch(self, start: int, length: int) -> bytes:
        data = b""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self._file.seek(start)
                data = self._file.read(min(length, self.size - start))
                break
            except Exception as error:
                lasting = isinstance(error, (TimeoutError, ValueError, FileNotFoundError, PermissionError))
                if lasting or attempt == _ATTEMPTS:
                    raise MediaError(self._path, reason_of(error)) from error
                time.sleep(0.2 * attempt)
        if not data:
            raise MediaError(self._path, f"ends at byte {start} of {self.size}: it changed while it was read")
        return data

    def close(self) -> None:
        """Give the connection back."""
        if self._file is not None:
            self._file.close()
        super().close()
