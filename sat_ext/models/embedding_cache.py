"""Embeddings of recent captions, for encoders that take seconds a caption."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

REMEMBERED = 512_000_000  # bytes: some 280 captions of T5-XXL in bf16


class Remembered:
    """Embeddings (L, D) by caption in CPU memory, at most `limit` bytes of those used last. The empty caption's
    stays for good: caption dropout asks for it at every tenth sample.

    Only for an encoder that each rank holds whole: one that ZeRO-3 splits must be called by all ranks alike.
    """

    def __init__(self, limit: int = REMEMBERED) -> None:
        self.limit = limit
        self._found: OrderedDict[str, Tensor] = OrderedDict()
        self._size = 0

    def embeddings(self, captions: Sequence[str], encode: Callable[[list[str]], list[Tensor]]) -> Tensor:
        """(B, L, D), on the CPU. `encode` gets each caption that is not remembered, once, and returns
        (L, D) for each.

        It should encode them one by one, so that an embedding does not depend, to the last bit, on what else was
        missing: a resumed run remembers nothing.
        """
        missing = [c for c in dict.fromkeys(captions) if c not in self._found]
        fresh = dict(zip(missing, (e.cpu() for e in encode(missing)), strict=True)) if missing else {}
        rows = [fresh[c] if c in fresh else self._found[c] for c in captions]
        for caption in dict.fromkeys(captions):
            if caption in fresh:
                self._found[caption] = fresh[caption].clone()
                self._size += fresh[caption].nbytes
            self._found.move_to_end(caption)
        while self._size > self.limit and (oldest := next((c for c in self._found if c), None)) is not None:
            self._size -= self._found.pop(oldest).nbytes
        return torch.stack(rows)
