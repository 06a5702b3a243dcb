"""A text encoder off the GPU: its dtype and cores on the CPU, its visits to the GPU, and a cache of embeddings."""

import os
import platform
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from sat_ext.models.side_stream import host_memory, page_lock
from sat_ext.ranks import local_ranks

CPU_INFO = Path("/proc/cpuinfo")
REMEMBERED = 512_000_000  # bytes: some 280 captions of T5-XXL in bf16


def encoder_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which this machine's CPU encodes the captions of a run in `dtype`.

    fp16 is slow on CPUs, and T5 overflows in it. Without instructions of its own bf16 is slower than fp32: T5-XXL
    took 5 times as long with AVX2, and a layer of it 3 times with AVX512."""
    return dtype if dtype == torch.bfloat16 and computes_in_bf16() else torch.float32


def computes_in_bf16() -> bool:
    """Whether this CPU multiplies matrices in bf16."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    # oneDNN says yes for every AVX512, though without these it only converts
    flags = CPU_INFO.read_text().split() if CPU_INFO.exists() else []
    return "avx512_bf16" in flags or "amx_bf16" in flags


@contextmanager
def own_cores() -> Iterator[None]:
    """Inside, PyTorch computes on this rank's share of the machine's cores if it was limited to one."""
    before = torch.get_num_threads()
    # torchrun sets OMP_NUM_THREADS to 1, which suits ranks that compute on the GPU; any other number is a choice
    if before == 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks()))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def on_device(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside, the modules' weights are copies on `device`; afterwards the same tensors as before."""
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    if device.type == "cuda":
        lock_weights(tensors)  # copies from pageable memory take several times as long
    homes = [t.data for t in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device, non_blocking=True)
        yield
    finally:
        for tensor, home in zip(tensors, homes):
            tensor.data = home


def lock_weights(tensors: Iterable[Tensor]) -> None:
    """Move the tensors' data into page-locked memory, unless it is there or was refused before."""
    failed = False
    for tensor in tensors:
        if getattr(tensor, "locked_at", None) == tensor.data_ptr():
            continue
        if not failed:  # one refusal, and one warning, is enough: the limit is the process's
            memory = host_memory(tensor.nbytes)
            home = memory.view(tensor.dtype).view(tensor.shape)
            home.copy_(tensor.data)
            tensor.data = home
            tensor.lock = memory  # type: ignore[attr-defined]  # the lock lasts as long as this reference
            failed = not page_lock(memory)
        tensor.locked_at = tensor.data_ptr()  # type: ignore[attr-defined]


class EmbeddingCache:
    """Embeddings (L, D) by caption in CPU memory: those used last, `limit` bytes of them.

    Only for an encoder that each rank holds whole: one that ZeRO-3 splits must be called by all ranks alike."""

    def __init__(self, limit: int = REMEMBERED) -> None:
        self.limit = limit
        self._found: OrderedDict[str, Tensor] = OrderedDict()

    def get(
        self, captions: Sequence[str], dtype: torch.dtype, encode: Callable[[list[str]], Tensor],
        place: AbstractContextManager[None],
    ) -> Tensor:  # fmt: skip
        """(B, L, D) on the CPU. Those that are missing are encoded inside `place`, or it is not entered."""
        missing = [c for c in dict.fromkeys(captions) if c not in self._found]
        if missing:
            with place:
                # one by one: to the last bit an embedding depends on its batch, and a resumed run misses others
                self._found.update({c: encode([c])[0].to("cpu", dtype) for c in missing})
        rows = [self._found[c] for c in captions]
        for caption in (*captions, ""):  # caption dropout needs the empty one again and again: it never grows old
            if caption in self._found:
                self._found.move_to_end(caption)
        while len(self._found) > self.limit // rows[0].nbytes:  # all take the same
            self._found.popitem(last=False)
        return torch.stack(rows)
