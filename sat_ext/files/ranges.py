"""Seekable files over bytes elsewhere: the base of remote files and of tar members."""

import io
import os
from typing import Any

from sat_ext.errors import MediaError
from sat_ext.files.locations import TarMember


class RangedFile(io.RawIOBase):
    """`size` bytes, fetched by `read_at`. FFmpeg looks at the suffix of `name`."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size
        self._position = 0

    def read_at(self, position: int, buffer: memoryview) -> int:
        """Read from `position` into the start of `buffer`; returns the number of bytes, at least 1."""
        raise NotImplementedError

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As in any file; positions after the end are allowed."""
        self._position = max(0, offset + (0, self._position, self.size)[whence])
        return self._position

    def tell(self) -> int:
        """The position, in bytes from the start."""
        return self._position

    def readinto(self, buffer: Any) -> int:
        """As in any raw file: the number of bytes read, 0 at the end."""
        count = min(len(buffer), self.size - self._position)
        if count <= 0:
            return 0
        count = self.read_at(self._position, memoryview(buffer)[:count])
        self._position += count
        return count


class MemberFile(RangedFile):
    """A tar's member in the `whole` tar, which it closes. Errors name `path`."""

    def __init__(self, whole: io.FileIO | RangedFile, path: str, member: TarMember) -> None:
        super().__init__(member.name, member.size)
        self._whole, self._path, self._offset = whole, path, member.offset

    def read_at(self, position: int, buffer: memoryview) -> int:
        """Raises `MediaError` if the tar ends too early."""
        self._whole.seek(self._offset + position)
        count = self._whole.readinto(buffer)
        if not count:
            raise MediaError(self._path, f"its tar ends after {position} of its {self.size} bytes")
        return count

    def close(self) -> None:
        """Close the tar."""
        self._whole.close()
        super().close()
