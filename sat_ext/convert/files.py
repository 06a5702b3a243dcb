"""Weights mapped from the disk, and written to it; a file or folder gets its name when it is complete."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from sat_ext.errors import ConfigError
from sat_ext.files.atomic import written_aside

WEIGHTS_NAME = "diffusion_pytorch_model"  # diffusers' name of a model's weights, without its ending
SHARD_BYTES = 5 * 10**9  # of one file, as in the published 5B models
_BAR = {"unit": "B", "unit_scale": True, "disable": None}  # None: no bar unless stderr is a terminal


def read_safetensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model's folder in diffusers' layout, in one file or in shards. Raises `ConfigError`."""
    index = folder / f"{WEIGHTS_NAME}.safetensors.index.json"
    files = [folder / f"{WEIGHTS_NAME}.safetensors"]
    if index.is_file():
        try:
            files = [folder / file for file in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{index}: not an index of shards; copy or download it again.") from error
    return {name: tensor for file in files for name, tensor in read_tensors(file).items()}


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file. Raises `ConfigError`."""
    if not file.is_file():
        raise ConfigError(
            f"{file}: there is no such file; the folder is incomplete, or its weights have another name."
        )
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file}: not a safetensors file, or cut short; copy or download it again.") from error
    return tensors


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """`written_aside`, with a `ConfigError` if `path` exists or cannot be written."""
    if os.path.lexists(path):  # unlike exists, does not raise where the folder cannot be read
        raise ConfigError(f"{path}: already exists; name another folder with -o, or remove it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as draft:
            yield draft
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}).") from error


def write_tensors(file: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """One safetensors file."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
    save_file(contiguous, file, {"format": "pt", **(metadata or {})})


def write_safetensors(folder: Path, weights: Mapping[str, Tensor], title: str) -> None:
    """A model's weights as diffusers' `save_pretrained` names them: one file, or shards and their index."""
    split = split_state_dict_into_shards_factory(
        dict(weights),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=WEIGHTS_NAME + "{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    with tqdm(total=_size(weights), desc=title, **_BAR) as bar:
        for file, names in split.filename_to_tensors.items():
            shard = {name: weights[name] for name in names}
            write_tensors(folder / file, shard)
            bar.update(_size(shard))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{WEIGHTS_NAME}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_checkpoint(file: Path, section: str, weights: Mapping[str, Tensor], title: str) -> None:
    """`{section: weights}` in torch's format, which `torch.load(weights_only=True)` reads."""
    state = {name: _own_storage(tensor.detach().contiguous()) for name, tensor in weights.items()}
    try:
        with (
            open(file, "wb") as opened,
            tqdm.wrapattr(opened, "write", total=_size(weights), desc=title, **_BAR) as counted,
        ):
            torch.save({section: state}, counted)
    except RuntimeError as error:  # PyTorch raises it while it handles the OSError of a full disk
        raise OSError(str(error.__context__ or error).splitlines()[0]) from error


def _own_storage(tensor: Tensor) -> Tensor:
    """The contiguous `tensor` on its part of the storage alone: of a view, torch would save all that it views."""
    start = tensor.storage_offset() * tensor.element_size()
    storage = tensor.untyped_storage()[start : start + tensor.nbytes]
    return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape, tensor.stride())


def _size(weights: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in weights.values())
