"""A folder of text embeddings, found by caption. A file holds those of many captions."""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from sat_ext.errors import ConfigError, DataError, MediaError
from sat_ext.latents.checksummed import files_fingerprint, opened, read_tensors, write_checksummed
from sat_ext.latents.keys import KeyTable, packed

FINGERPRINT = "fingerprint"  # the key in a file's metadata
BATCH = 16  # captions
_PART = 1 << 16  # captions that are Python objects at a time
FILE_SECONDS = 60.0  # of work that a kill loses at most


class TextEmbeddings:
    """A folder of embeddings, (L, D) each, found by caption. Only what is asked for is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.table = KeyTable(folder, "text", _list)
        files, notes = self.table.files, self.table.notes
        if not files:
            raise DataError(f"{folder}: there are no text embeddings here; write them with sat-ext cache.")
        if other := next((file for file, note in zip(files, notes) if note != notes[0]), None):
            raise DataError(f"{folder}: {other.name} and {files[0].name} are of different encoders; delete one.")
        self.fingerprint: dict[str, str] = json.loads(notes[0])

    def __getitem__(self, caption: str) -> Tensor:
        found = self.table.find(key := caption_key(caption))
        if found is None:
            shown = caption if len(caption) <= 80 else caption[:80] + "..."
            raise DataError(
                f"{self.folder}: there is no embedding of the caption {shown!r}; write it with sat-ext cache."
            )
        try:
            return read_tensors(found[0], [key])[key]
        except MediaError as error:  # unlike a bad file, it cannot be replaced by another sample
            raise DataError(f"{error}.") from error

    def encode(self, captions: Sequence[str], device: torch.device, dtype: torch.dtype) -> Tensor:
        """Of several captions, (B, L, D): what a text encoder would return."""
        return torch.stack([self[caption] for caption in captions]).to(device, dtype)

    def require(self, expected: Mapping[str, str], remedy: str) -> None:
        """Raise `ConfigError` where the embeddings are not those of an encoder of this fingerprint."""
        known = {k: v for k, v in expected.items() if k in self.fingerprint}  # others are of another version
        if "config" in known:
            known.pop("encoder", None)  # its folder may have another name here
        for name, value in known.items():
            if value != self.fingerprint[name]:
                raise ConfigError(
                    f"{self.folder}: these text embeddings are of {name} {self.fingerprint[name]}, and {value} is "
                    f"asked for; {remedy}."
                )

    def lacking(self, captions: pa.Array) -> pa.Array:
        """Those of `captions` that are not here."""
        parts = (captions[first : first + _PART].to_pylist() for first in range(0, len(captions), _PART))
        keys = np.concatenate([packed(map(caption_key, part)) for part in parts])
        return captions.filter(pa.array(~self.table.has(keys)))

    def require_captions(self, captions: pa.Array, command: str) -> None:
        """Raise `DataError` unless there is an embedding of each; `command` is what writes them."""
        missing = self.lacking(captions)
        if len(missing):
            raise DataError(
                f"{self.folder}: {len(missing)} of {len(captions)} captions are not in this cache (first: "
                f"{missing[0].as_py()[:80]!r}); run {command}."
            )


def _list(file: Path) -> tuple[list[str], tuple[()], str]:
    with opened(file) as (shard, metadata):
        # sorted: files written at other times may have another order
        return list(shard.keys()), (), json.dumps(json.loads(metadata.get(FINGERPRINT, "{}")), sort_keys=True)


def encoder_fingerprint(
    model_dir: str | None = None, max_length: int | None = None, dtype: torch.dtype | None = None
) -> dict[str, str]:
    """What embeddings follow from: the encoder's name and, where `model_dir` is a folder, hashes of its
    configuration and weights; the tokens of a caption; the dtype."""
    found: dict[str, str] = {}
    if model_dir is not None:
        found["encoder"] = Path(model_dir).name
        config = Path(model_dir) / "config.json"
        if any(Path(model_dir).glob("*.safetensors")):
            found["weights"] = files_fingerprint(Path(model_dir))
        if config.is_file():
            found["config"] = blake2b(config.read_bytes(), digest_size=16).hexdigest()
    if max_length is not None:
        found["max_length"] = str(max_length)
    if dtype is not None:
        found["dtype"] = str(dtype).removeprefix("torch.")
    return found


def write_text_embeddings(
    folder: Path,
    captions: Iterable[str],
    embed: Callable[[list[str]], Tensor],
    fingerprint: Mapping[str, str],
    *,
    batch: int = BATCH,
    per_file: int = 512,
) -> int:
    """Write the embeddings of the captions that `folder` lacks, and of the empty one; returns how many.

    `embed` maps at most `batch` captions to (B, L, D); no more than these are taken from `captions` before it.
    `fingerprint` is an `encoder_fingerprint`. Several processes may write different captions into one folder.
    Raises `ConfigError` where the folder holds another encoder's, and `DataError` where it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = TextEmbeddings(folder) if any(folder.glob("text-*.safetensors")) else None
    if held is not None:
        held.require(fingerprint, "write to another folder")
    waiting, seen = chain([""], captions), set[str]()
    tensors: dict[str, Tensor] = {}
    end = time.monotonic() + FILE_SECONDS
    while taken := list(islice(waiting, min(batch, per_file - len(tensors)))):
        part = {key: caption for caption in taken if (key := caption_key(caption)) not in seen}
        part = {key: caption for key, caption in part.items() if held is None or held.table.find(key) is None}
        seen |= part.keys()
        if part:
            with torch.no_grad():
                embedded = embed(list(part.values())).cpu()
            # cloned: safetensors does not write views of one tensor
            tensors |= {key: one.clone() for key, one in zip(part, embedded)}
        if len(tensors) == per_file or time.monotonic() > end:
            _write(folder, tensors, fingerprint)
            tensors, end = {}, time.monotonic() + FILE_SECONDS
    _write(folder, tensors, fingerprint)
    return len(seen)


def _write(folder: Path, tensors: dict[str, Tensor], fingerprint: Mapping[str, str]) -> None:
    name = blake2b("".join(tensors).encode(), digest_size=8).hexdigest()
    if tensors:
        file = folder / f"text-{name}.safetensors"
        write_checksummed(file, tensors, {FINGERPRINT: json.dumps(dict(fingerprint))})


def caption_key(caption: str) -> str:
    """The name of a caption's embedding: a hash of its text."""
    return blake2b(caption.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
