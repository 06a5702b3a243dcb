"""The random number generators of this process: saved, restored, seeded."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from deepspeed.runtime.activation_checkpointing.checkpointing import get_cuda_rng_tracker


def capture() -> dict[str, Any]:
    """The state of Python's, NumPy's and PyTorch's generators, and of those for model-parallel dropout, in plain
    values and tensors, so that reading it back runs no code."""
    version, words, gauss = random.getstate()
    state: Any = np.random.get_state()
    kind, keys, place, has_gauss, cached = state
    return {
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), int(place), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state().cpu() if torch.cuda.is_available() else None,
        "tracker": {name: state.cpu() for name, state in get_cuda_rng_tracker().get_states().items()},
    }


def restore(state: dict[str, Any]) -> None:
    """Undo whatever was drawn since `capture`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    kind, keys, place, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), place, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    if state["tracker"]:  # set_states would forget the running ones, which SAT adds when it seeds
        get_cuda_rng_tracker().set_states(state["tracker"])


def seed(*numbers: int) -> None:
    """Seed all generators from `numbers`."""
    # mixed, because sums of seed, step and rank would give some of them the same stream
    words = np.random.SeedSequence(numbers).generate_state(2)
    random.seed(int(words[0]))
    np.random.seed(int(words[0]))
    torch.manual_seed(int(words[1]))  # CUDA's too


@contextmanager
def untouched() -> Iterator[None]:
    """Random numbers drawn inside do not change those drawn afterwards."""
    state = capture()
    try:
        yield
    finally:
        restore(state)
