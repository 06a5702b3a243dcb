"""How an error that ends a run is shown: one sentence for what a user can fix, a traceback for the rest."""

import sys
from collections.abc import Callable
from types import TracebackType

import torch.distributed as dist

from sat_ext.errors import SatExtError
from sat_ext.ranks import rank_and_world


def sentence_of(error: BaseException) -> str | None:
    """The sentence of an error that a user can fix; None for any other."""
    text = str(error)
    if isinstance(error, SatExtError):
        # PyTorch puts a data worker's traceback before the sentence that ended it
        kind = type(error)
        return text.rpartition(f"\n{kind.__module__}.{kind.__qualname__}: ")[2].strip()
    if not isinstance(error, RuntimeError):
        return None
    if text.startswith("DataLoader worker (pid"):  # raised wherever the training is when a worker is killed
        return (
            f"a data worker of rank {rank_and_world()[0]} was killed, perhaps by the kernel for lack of memory; "
            f"lower args.num_workers or args.prefetch_factor ({' '.join(text.split()).rstrip('.')})."
        )
    if dist.is_initialized():
        from sat_ext.sat.peers import sentence_of_lost  # imports SAT, which takes seconds

        return sentence_of_lost(error)
    return None


def in_a_sentence(
    show: Callable[..., object], kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """`sys.excepthook` that prints `error: <sentence>` for such an error, and shows any other as before."""
    if sentence := sentence_of(error):
        print(f"error: {sentence}", file=sys.stderr, flush=True)
    else:
        show(kind, error, traceback)
