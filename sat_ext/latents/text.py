"""A folder of text embeddings, found by caption. A file holds those of many captions."""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sat_ext.errors import ConfigError, DataError, MediaError
from sat_ext.latents.checksummed import files_fingerprint, opened, read_tensors, write_checksummed

FINGERPRINT = "fingerprint"  # the key in a file's metadata
FILE_SECONDS = 60.0  # of work that a kill loses at most


class TextEmbeddings:
    """A folder of embeddings, (L, D) each, found by caption. Only what is asked for is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}
        self.fingerprint: dict[str, str] = {}
        files = sorted(folder.glob("text-*.safetensors"))
        if not files:
            raise DataError(f"{folder}: there are no text embeddings here; write them with sat-ext cache.")
        for file in files:
            with opened(file) as (shard, metadata):
                found = json.loads(metadata.get(FINGERPRINT, "{}"))
                self.files.update(dict.fromkeys(shard.keys(), file))
            if self.fingerprint and found != self.fingerprint:
                raise DataError(
                    f"{folder}: {file.name} and {files[0].name} are of different encoders; delete one."
                )
            self.fingerprint = found

    def __getitem__(self, caption: str) -> Tensor:
        key = caption_key(caption)
        if key not in self.files:
            shown = caption if len(caption) <= 80 else caption[:80] + "..."
            raise DataError(
                f"{self.folder}: there is no embedding of the caption {shown!r}; write it with sat-ext cache."
            )
        try:
            return read_tensors(self.files[key], [key])[key]
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

    def require_captions(self, captions: Sequence[str], command: str) -> None:
        """Raise `DataError` unless there is an embedding of each; `command` is what writes them."""
        missing = [c for c in captions if caption_key(c) not in self.files]
        if missing:
            raise DataError(
                f"{self.folder}: {len(missing)} of {len(captions)} captions are not in this cache (first: "
                f"{missing[0][:80]!r}); run {command}."
            )


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
    batch: int = 16,
    per_file: int = 512,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda items, total: items,
) -> int:
    """Write the embeddings of the captions that `folder` lacks, and of the empty one; returns how many.

    `embed` maps at most `batch` captions to (B, L, D). `fingerprint` is an `encoder_fingerprint`. Several
    processes may write different captions into one folder. Raises `ConfigError` where the folder holds another
    encoder's, and `DataError` where it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = {caption_key(caption): caption for caption in ("", *captions)}
    if any(folder.glob("text-*.safetensors")):
        present = TextEmbeddings(folder)
        present.require(fingerprint, "write to another folder")
        missing = {key: caption for key, caption in missing.items() if key not in present.files}
    shown = iter(progress(missing.items(), len(missing)))
    written = 0
    while written < len(missing):
        tensors: dict[str, Tensor] = {}
        end = time.monotonic() + FILE_SECONDS
        while part := dict(islice(shown, min(batch, per_file - len(tensors)))):
            with torch.no_grad():
                embedded = embed(list(part.values())).cpu()
            # cloned: safetensors does not write views of one tensor
            tensors |= {key: one.clone() for key, one in zip(part, embedded)}
            if time.monotonic() > end:
                break
        name = blake2b("".join(tensors).encode(), digest_size=8).hexdigest()
        file = folder / f"text-{name}.safetensors"
        write_checksummed(file, tensors, {FINGERPRINT: json.dumps(dict(fingerprint))})
        written += len(tensors)
    return written


def caption_key(caption: str) -> str:
    """The name of a caption's embedding: a hash of its text."""
    return blake2b(caption.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
