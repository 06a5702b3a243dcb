"""A text encoder on the CPU: in which dtype, and on how many of the cores."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sat_ext.ranks import local_ranks

CPU_INFO = Path("/proc/cpuinfo")


def encoder_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which dtype this machine's CPU encodes the captions of a run in `dtype`.

    fp16 is slow on CPUs and T5 overflows in it. bf16 without instructions of its own takes longer than fp32:
    T5-XXL 5 times as long with AVX2 alone, and a layer of it 3 times with AVX512.
    """
    return dtype if dtype == torch.bfloat16 and computes_in_bf16() else torch.float32


def computes_in_bf16() -> bool:
    """Whether this CPU multiplies matrices in bf16. oneDNN alone says so of every AVX512, where it converts."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    flags = CPU_INFO.read_text().split() if CPU_INFO.exists() else []
    return "avx512_bf16" in flags or "amx_bf16" in flags


@contextmanager
def own_cores() -> Iterator[None]:
    """Inside, PyTorch computes on this rank's share of the machine's cores, where it would on one alone: torchrun
    sets OMP_NUM_THREADS to 1, which is right for a rank whose work is on the GPU."""
    before = torch.get_num_threads()
    if before == 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks()))
    try:
        yield
    finally:
        torch.set_num_threads(before)
