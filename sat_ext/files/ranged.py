"""Files read in ranges: behind URLs, through fsspec, and members of tars.

File systems are made in the process that uses them: fsspec's event loop does not survive a fork."""

import io
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec

from sat_ext.errors import ConfigError, MediaError
from sat_ext.files.locations import TarMember

T = TypeVar("T")

# Bytes of a range request: the first, enough for a header; the largest, and the largest of what is expected.
_FIRST_READ = 32 << 10
_LARGEST_READ, _LARGEST_EXPECTED = 4 << 20, 16 << 20

# Seconds until a silent server is given up, and for a whole request.
_CONNECT_TIMEOUT, _READ_TIMEOUT, _REQUEST_TIMEOUT = 20.0, 30.0, 120.0
# Until a server that refuses is given up, and the first pause, which doubles. botocore waits by itself.
_PATIENCE, _PAUSE = 5.0, 0.25

EMPTY = "the file is empty (0 bytes)"
REPLACED = "replaced since it was indexed; the new file is used from the next start on"
_NO_RANGES = "its server does not answer range requests; copy it to a disk, or use one that does"
_EXTRAS = {"s3": "sat_ext[s3]", "s3a": "sat_ext[s3]", "http": "sat_ext[http]", "https": "sat_ext[http]"}

# Every file system, by process, never dropped: if a forked worker dropped those that it inherited, closing their
# connections would remove them from the epoll set on which the parent still waits.
_kept: dict[tuple[int, int], Any] = {}


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for `url`, and the path in it. Raises `ConfigError` if no package reads it."""
    protocol = url.partition("://")[0]
    try:
        if "::" in url:  # part of a name, which fsspec would take for a chain and open what follows it
            maker = fsspec.get_filesystem_class(protocol)
            fs = maker(**{**maker._get_kwargs_from_urls(url), **_timeouts(protocol)})
            path = maker._strip_protocol(url)
        else:
            fs, path = fsspec.core.url_to_fs(url, **_timeouts(protocol))
    except Exception as error:  # each of fsspec's file systems has its own errors
        if "Protocol not known" in str(error):
            raise ConfigError(f"{url}: fsspec does not read {protocol}:// URLs; check it.") from error
        why = (str(error).splitlines() or [type(error).__name__])[0]
        remedy = "check its settings"
        if isinstance(error, ImportError):
            remedy = f"pip install {_EXTRAS.get(protocol, 'the package that it names')}"
        raise ConfigError(f"{url}: {protocol}:// cannot be read ({why}); {remedy}.") from error
    _kept[os.getpid(), id(fs)] = fs
    return fs, path


def _timeouts(protocol: str) -> dict[str, Any]:
    """Timeouts for servers that never answer; fsspec's own configuration files win."""
    options: dict[str, Any] = {}
    if protocol in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(_REQUEST_TIMEOUT, sock_connect=_CONNECT_TIMEOUT, sock_read=_READ_TIMEOUT)
        options = {"client_kwargs": {"timeout": timeout}}
    elif protocol in ("s3", "s3a"):
        options = {"config_kwargs": {"connect_timeout": _CONNECT_TIMEOUT, "read_timeout": _READ_TIMEOUT}}
        options["local_expiry_check"] = True  # of a file whose size is known, s3fs compares tags only so
    configured = fsspec.config.conf.get(protocol, {})
    return {key: value for key, value in options.items() if key not in configured}


def info_of(url: str) -> dict[str, Any]:
    """What the file system reports about a file without reading it. Raises `MediaError`."""
    fs, path = filesystem(url)
    return dict(retried(url, lambda: fs.info(path)))


def retried(path: str, call: Callable[[], T]) -> T:
    """What `call` returns, tried again after pauses where the connection is lost or the server has trouble.

    Raises `MediaError` of `path`."""
    began, pause = time.monotonic(), _PAUSE
    while True:
        try:
            return call()
        except Exception as error:  # each of fsspec's file systems has its own errors
            if _is_final(error) or time.monotonic() + pause > began + _PATIENCE:
                raise MediaError(path, reason_of(error)) from error
        time.sleep(pause)
        pause *= 2


def _is_final(error: BaseException) -> bool:
    """Whether another attempt would get the same answer or, after a time-out, only double the wait."""
    cause, status = error.__cause__, getattr(error, "status", None)
    if isinstance(error, FileNotFoundError) and cause and not hasattr(cause, "response"):
        return _is_final(cause)  # of HTTP, as in `reason_of`; botocore's errors have a `response`
    if status is not None:
        return bool(status < 500 and status != 429)
    finals = (TimeoutError, ValueError, FileNotFoundError, PermissionError)
    return isinstance(error, finals) or type(error).__name__ == "FileExpired"


def reason_of(error: BaseException) -> str:
    """Why a file cannot be read, in words independent of the file system."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and cause:  # fsspec's HTTP reports every failure as a missing file
        status = getattr(cause, "status", None)
        if status is None:
            return reason_of(cause)
        if status != 404:
            return f"its server refuses it with status {status}"
    if isinstance(error, (FileNotFoundError, NotADirectoryError)) or "null byte" in str(error):
        return "no such file"
    if type(error).__name__ == "FileExpired":  # s3fs's
        return REPLACED
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if isinstance(error, TimeoutError):
        return "its server did not answer in time"
    if isinstance(error, ValueError) and "range requests" in str(error):
        return _NO_RANGES
    return f"cannot be read: {str(error) or type(error).__name__}"


class _RangedFile(io.RawIOBase):
    """`size` bytes, fetched by `_read_at`. FFmpeg looks at the suffix of `name`."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size
        self._position = 0

    def _read_at(self, position: int, buffer: memoryview) -> int:
        """Read from `position` into the start of `buffer`; returns the number of bytes, at least 1."""
        raise NotImplementedError

    def expect(self, start: int, stop: int) -> None:
        """From `start` on, all will be read up to `stop`: one request is enough."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = max(0, offset + (0, self._position, self.size)[whence])
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self.size - self._position)
        if count <= 0:
            return 0
        count = self._read_at(self._position, memoryview(buffer)[:count])
        self._position += count
        return count


class MemberFile(_RangedFile):
    """A tar's member in the `whole` tar, which it closes. Errors name `path`."""

    def __init__(self, whole: io.RawIOBase, path: str, member: TarMember) -> None:
        super().__init__(member.name, member.size)
        self._whole, self._path, self._offset = whole, path, member.offset
        self.info = getattr(whole, "info", {})

    def expect(self, start: int, stop: int) -> None:
        """As for the tar."""
        if isinstance(self._whole, RemoteFile):
            self._whole.expect(self._offset + start, self._offset + stop)

    def _read_at(self, position: int, buffer: memoryview) -> int:
        self._whole.seek(self._offset + position)
        count = self._whole.readinto(buffer)
        if not count:
            raise MediaError(self._path, f"its tar ends after {position} of its {self.size} bytes")
        return count

    def close(self) -> None:
        """Close the tar."""
        self._whole.close()
        super().close()


class RemoteFile(_RangedFile):
    """A file behind a URL; errors name `path`.

    It holds the first range, to which decoders return, and the last one. Each range that follows that, or starts a
    little after it, is twice as long: a header costs little, and sequential reading few requests. `info` is what
    `info_of` returns; S3 is not asked for it where the fingerprint is `known`.

    Raises `MediaError` at once if the file is missing or empty, or its server does not support ranges."""

    _file: Any = None
    _expected = range(0)

    def __init__(self, url: str, path: str, known: str = "") -> None:
        self._path = path
        fs, inner = filesystem(url)
        length, _, tag = known.partition("-")
        if tag.startswith('"') and url.startswith(("s3://", "s3a://")):  # s3fs compares it with each answer's
            self.info: dict[str, Any] = {"name": inner, "size": int(length), "ETag": tag}
        else:
            self.info = retried(path, lambda: fs.info(inner))
        size = self.info.get("size")
        if size is None or not self.info.get("partial", True):  # fsspec would stream it, without seeking
            raise MediaError(path, _NO_RANGES)
        if size == 0:
            raise MediaError(path, EMPTY if self.info.get("type") != "directory" else "no such file")
        self._file = retried(
            path, lambda: fs.open(inner, "rb", block_size=_FIRST_READ, cache_type="none", size=size)
        )
        self._file.details = self.info  # else S3 would ask for it again
        super().__init__(urlsplit(url).path, int(size))
        self._held = [(0, memoryview(b""))]
        self._ahead = _FIRST_READ // 2

    def _read_at(self, position: int, buffer: memoryview) -> int:
        if not (part := self._held_from(position)):
            at, last = self._held[-1]
            gap = position - at - len(last)
            self._ahead = min(2 * self._ahead, _LARGEST_READ) if 0 <= gap <= self._ahead else _FIRST_READ
            expected = self._expected.stop - position if position in self._expected else 0
            part = memoryview(self._fetch(position, max(len(buffer), expected or self._ahead)))
            self._held = [self._held[0] if self._held[0][1] else (position, part), (position, part)]
        part = part[: len(buffer)]
        buffer[: len(part)] = part
        return len(part)

    def _held_from(self, position: int) -> memoryview:
        for at, data in self._held:
            if 0 <= position - at < len(data):
                return data[position - at :]
        return memoryview(b"")

    def _fetch(self, start: int, length: int) -> bytes:
        def read() -> bytes:
            self._file.seek(start)
            return bytes(self._file.read(min(length, self.size - start)))

        data = retried(self._path, read)
        if not data:
            raise MediaError(self._path, f"ends at byte {start} of {self.size}: it changed while it was read")
        return data

    def expect(self, start: int, stop: int) -> None:
        """As described; at most 16 MiB."""
        self._expected = range(start, min(stop, self.size, start + _LARGEST_EXPECTED))

    def close(self) -> None:
        """Close the connection."""
        if self._file is not None:
            self._file.close()
        super().close()
