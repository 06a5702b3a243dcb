"""Seekable files over bytes that lie elsewhere: the base of URLs and of tar members."""

from __future__ import annotations

import io
import os
from typing import Any

from sat_ext.errors import MediaError
from sat_ext.files.locations import TarMember


class RangedFile(io.RawIOBase):
    """`size` bytes that `read_at` fetches from any place. `name` is for FFmpeg, which looks at its extension."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size
        self._position = 0

    def read_at(self, position: int, buffer: memoryview) -> int:
        """Fill the start of `buffer` with what lies at `position`; how many bytes, at least 1."""
        raise NotImplementedError

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As of any file; places behind the end are allowed, and empty."""
        self._position = max(0, offset + (0, self._position, self.size)[whence])
        return self._position

    def tell(self) -> int:
        """The position, in bytes from the start."""
        return self._position

    def readinto(self, buffer: Any) -> int:
        """As of any raw file: how many bytes were read, 0 at the end."""
        count = min(len(buffer), self.size - self._position)
        if count <= 0:
            return 0
        count = self.read_at(self._position, memoryview(buffer)[:count])
        self._position += count
        return count


class MemberFile(RangedFile):
    """A tar's member, out of the whole tar, which it closes. `path` is named in errors."""

    def __init__(self, whole: io.FileIO | RangedFile, path: str, member: TarMember) -> None:
        super().__init__(member.name, member.size)
        self._whole, self._path, self._offset = whole, path, member.offset

    def read_at(self, position: int, buffer: memoryview) -> int:
        """Raises `MediaError` where the tar ends too early."""
        self._whole.seek(self._offset + position)
        count = self._whole.readinto(buffer)
        if not count:
            raise MediaError(self._path, f"its tar ends after {position} of its {self.size} bytes")
        return count

    def close(self) -> None:
        """Close the tar."""
        self._whole.close()
        super().close()
