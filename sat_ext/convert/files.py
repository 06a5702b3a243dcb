"""Reading and writing weights without holding a model in memory.

What is read (SAT's files by `sat_ext.checkpoint`) stays on the disk, mapped into memory, until its bytes
are written. What is written takes its name when it is whole.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sat_ext.convert.names import Blocks
from sat_ext.errors import ConfigError
from sat_ext.files.atomic import written_aside

WEIGHTS_NAME = "diffusion_pytorch_model"  # diffusers' name of a model's weights, without its ending
SHARD_BYTES = 5 * 10**9  # of one file; what the published 5B models' are cut at
_NAMES = {  # of dtypes in the header, as the format's documentation has them
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

Advance = Callable[[int], None]  # told of the bytes that were written


def _untold(written: int) -> None:
    pass


def read_safetensors(folder: Path, name: str = WEIGHTS_NAME) -> dict[str, Tensor]:
    """The tensors of a model's folder in diffusers' layout, in one file or in shards, mapped from the disk."""
    index = folder / f"{name}.safetensors.index.json"
    files = [folder / f"{name}.safetensors"]
    if index.is_file():
        try:
            files = [folder / file for file in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{index}: not an index of shards; copy or download it again.") from error
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= read_tensors(file)
    return weights


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, mapped from the disk."""
    if not file.is_file():
        raise ConfigError(
            f"{file}: there is no such file; the folder is not whole, or its weights have another name."
        )
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118, it is no mapping
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file}: not a safetensors file, or cut short; copy or download it again.") from error


def read_metadata(file: Path) -> dict[str, str]:
    """The strings that a safetensors file holds beside its tensors."""
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata() or {})


def shape_of(blocks: Blocks) -> torch.Size:
    """The shape of the tensor that the blocks make."""
    if len(blocks) == 1:
        return blocks[0].shape
    return torch.Size([sum(b.shape[0] for b in blocks), *blocks[0].shape[1:]])


def bytes_of(blocks: Blocks) -> int:
    """Its size."""
    return sum(b.nbytes for b in blocks)


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file or a folder under, which takes `path`'s place when the block ends well.

    `ConfigError` where `path` is there already, or cannot be written; then nothing is left behind.
    """
    if os.path.lexists(path):  # which, unlike exists, does not raise where the folder cannot be read
        raise ConfigError(f"{path}: is there already; name another folder with -o, or remove it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as draft:
            yield draft
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error}).") from error


def write_tensors(
    file: Path,
    weights: Mapping[str, Blocks],
    metadata: Mapping[str, str] | None = None,
    advance: Advance = _untold,
) -> None:
    """One safetensors file, a block at a time.

    The safetensors package would first make a copy of all that goes into the file. Format: 8 bytes of the header's
    length, the header (JSON: dtype, shape and place of each tensor), the bytes, widest types first.
    """
    names = sorted(weights, key=lambda n: (-weights[n][0].element_size(), n))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in names:
        blocks = weights[name]
        start, end = end, end + bytes_of(blocks)
        header[name] = {
            "dtype": _NAMES[blocks[0].dtype],
            "shape": list(shape_of(blocks)),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            for block in weights[name]:
                opened.write(block.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
                advance(block.nbytes)


def write_safetensors(folder: Path, weights: Mapping[str, Blocks], advance: Advance) -> None:
    """A model's weights as diffusers' `save_pretrained` names them: one file, or shards and their index."""
    shards: list[dict[str, Blocks]] = [{}]
    size = 0
    for name, blocks in weights.items():
        if shards[-1] and size + bytes_of(blocks) > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = blocks
        size += bytes_of(blocks)
    if len(shards) == 1:
        write_tensors(folder / f"{WEIGHTS_NAME}.safetensors", weights, advance=advance)
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{WEIGHTS_NAME}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, shard, advance=advance)
        places |= dict.fromkeys(shard, file)
    total = sum(bytes_of(b) for b in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / f"{WEIGHTS_NAME}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_checkpoint(file: Path, section: str, weights: Mapping[str, Blocks], advance: Advance = _untold) -> None:
    """`{section: weights}` in torch's format, which `torch.load(weights_only=True)` reads.

    torch saves whole tensors, so those made of several blocks are put together in a file beside `file` first.
    """
    scratch = file.with_name(file.name + ".joined")
    joined = {name: blocks for name, blocks in weights.items() if len(blocks) > 1 or _is_view(blocks[0])}
    write_tensors(scratch, joined)
    whole = read_tensors(scratch)
    state = {name: whole[name] if name in whole else blocks[0].detach() for name, blocks in weights.items()}
    try:
        with open(file, "wb") as opened:
            torch.save({section: state}, cast(IO[bytes], _Counted(opened, advance)))
    except RuntimeError as error:  # torch's words for a disk that is full
        raise OSError(f"torch could not write it: {str(error).splitlines()[0]}") from error
    del state, whole
    scratch.unlink()


def _is_view(tensor: Tensor) -> bool:
    """Whether it is a part of a larger tensor, which torch would save along with it."""
    return tensor.untyped_storage().nbytes() != tensor.nbytes or not tensor.is_contiguous()


class _Counted:
    """A file that tells how much was written."""

    def __init__(self, file: Any, advance: Advance) -> None:
        self._file, self._advance = file, advance

    def write(self, data: Any) -> int:
        written: int = self._file.write(data)
        self._advance(written)
        return written

    def flush(self) -> None:
        self._file.flush()
