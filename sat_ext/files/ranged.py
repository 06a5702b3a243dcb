"""Files behind URLs, read by ranges through fsspec.

File systems are made in the process that uses them: fsspec's event loop does not survive a fork.
"""

import os
import time
from typing import Any
from urllib.parse import urlsplit

import fsspec

from sat_ext.errors import ConfigError, MediaError
from sat_ext.files.ranges import RangedFile

# Bytes of a range request: the first, enough for a header, and the largest.
_FIRST_READ = 32 << 10
_LARGEST_READ = 4 << 20

# Seconds until a silent server is given up, and for a whole request.
_CONNECT_TIMEOUT, _READ_TIMEOUT, _REQUEST_TIMEOUT = 20.0, 30.0, 120.0
_ATTEMPTS = 3

_NO_RANGES = "its server does not answer range requests; copy it to a disk, or use one that does"
_EXTRAS = {"s3": "sat_ext[s3]", "s3a": "sat_ext[s3]", "http": "sat_ext[http]", "https": "sat_ext[http]"}

# Every file system, by process, never dropped: if a forked worker dropped those that it inherited, closing their
# connections would remove them from the epoll set on which the parent still waits.
_kept: dict[tuple[int, int], Any] = {}


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for `url`, and the path in it. Raises `ConfigError` where no package reads it."""
    protocol = url.partition("://")[0]
    try:
        if "::" in url:  # part of a name, which fsspec would take for a chain and open what follows it
            maker = fsspec.get_filesystem_class(protocol)
            fs = maker(**{**maker._get_kwargs_from_urls(url), **_timeouts(protocol)})
            path = maker._strip_protocol(url)
        else:
            fs, path = fsspec.core.url_to_fs(url, **_timeouts(protocol))
    except ImportError as error:
        package = _EXTRAS.get(protocol, "the package that it names")
        raise ConfigError(f"{url}: {protocol}:// cannot be read ({error}); pip install {package}.") from error
    except Exception as error:  # each of fsspec's file systems has its own errors
        if isinstance(error, ValueError) and "Protocol not known" in str(error):
            raise ConfigError(f"{url}: {protocol}:// is no kind of URL that fsspec reads; check it.") from error
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{url}: {protocol}:// cannot be read ({why}); check its settings.") from error
    _kept[os.getpid(), id(fs)] = fs
    return fs, path


def _timeouts(protocol: str) -> dict[str, Any]:
    """Timeouts for servers that never answer; fsspec's own configuration files win."""
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
    """What the file system reports about a file without reading it. Raises `MediaError`."""
    fs, path = filesystem(url)
    try:
        return dict(fs.info(path))
    except Exception as error:  # each of fsspec's file systems has its own errors
        raise MediaError(url, reason_of(error)) from error


def reason_of(error: BaseException) -> str:
    """Why a file cannot be read, in words independent of the file system."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and cause and getattr(cause, "status", 404) != 404:
        return f"its server refuses it with status {cause.status}"  # type: ignore[attr-defined]
    if isinstance(error, FileNotFoundError) and cause and not hasattr(cause, "status"):
        return reason_of(cause)  # fsspec's HTTP reports a dead server as a missing file
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
    """A file behind a URL; errors name `path`.

    It holds one range. Each range that follows the last one, or starts a little after it, is twice as long: a
    header costs little, and sequential reading few requests. Raises `MediaError` at once if the file is missing or
    empty, or its server does not support ranges.
    """

    def __init__(self, url: str, path: str) -> None:
        self._path = path
        self._file: Any = None
        fs, inner = filesystem(url)
        try:
            self._file = fs.open(inner, "rb", block_size=_FIRST_READ, cache_type="none")
        except Exception as error:  # each of fsspec's file systems has its own errors
            raise MediaError(path, reason_of(error)) from error
        size = getattr(self._file, "size", None)
        if size is None:  # fsspec would stream it, without seeking
            raise MediaError(path, _NO_RANGES)
        if size == 0:
            raise MediaError(path, "the file is empty (0 bytes)")
        super().__init__(urlsplit(url).path, int(size))
        self._held, self._held_at = memoryview(b""), 0
        self._ahead = _FIRST_READ // 2

    def read_at(self, position: int, buffer: memoryview) -> int:
        """Raises `MediaError` if the server or the connection fails."""
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
                is_final = isinstance(error, (TimeoutError, ValueError, FileNotFoundError, PermissionError))
                if is_final or attempt == _ATTEMPTS:
                    raise MediaError(self._path, reason_of(error)) from error
                time.sleep(0.2 * attempt)
        if not data:
            raise MediaError(self._path, f"ends at byte {start} of {self.size}: it changed while it was read")
        return data

    def close(self) -> None:
        """Close the connection."""
        if self._file is not None:
            self._file.close()
        super().close()
