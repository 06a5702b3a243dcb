"""Writes the files of a full checkpoint."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from sat_ext.checkpoint.layout import OPTIMIZER_NAME, WEIGHTS_NAME
from sat_ext.ranks import gather


class Writer(TorchCheckpointEngine):
    """What DeepSpeed writes through. The first failure is kept in `error`, not raised, because the other ranks are
    already waiting in a barrier; nothing is attempted after it.

    `keep` says by name which weights belong in the checkpoint; `written` has the sizes of this rank's files;
    `placed` is set once the checkpoint has its name, so that an error after that does not call it unsaved."""

    def __init__(self, keep: Callable[[str], bool]) -> None:
        super().__init__()
        self.keep = keep
        self.error: str | None = None
        self.placed = False
        self.written: dict[str, int] = {}

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Do nothing: a rank that does not see the first one's folder, because it lost a mount, must fail rather
        than write to a disk of its own."""

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Write one of DeepSpeed's files: of the weights those to `keep`, and an optimizer into its own file."""
        file = Path(path)
        if file.name == WEIGHTS_NAME:
            weights = {name: value for name, value in state_dict["module"].items() if self.keep(name)}
            if state_dict.get("optimizer") is not None:  # without ZeRO it would be in the file that SAT loads
                self.write(state_dict["optimizer"], file.with_name(OPTIMIZER_NAME))
            state_dict = {**state_dict, "module": weights, "optimizer": None}
        self.write(state_dict, file)

    def write(self, value: Any, file: Path) -> None:
        """Write and sync one file."""

        def write() -> None:
            with open(file, "wb") as opened:
                torch.save(value, opened)
                opened.flush()
                os.fsync(opened.fileno())
                self.written[file.name] = os.fstat(opened.fileno()).st_size

        self.attempt(file.name, write)

    def attempt(self, path: str, write: Callable[[], None], verb: str = "write") -> None:
        """Call `write`, unless something failed before; keep its failure."""
        if self.error is not None:
            return
        try:
            write()
        except (OSError, RuntimeError) as error:  # PyTorch raises RuntimeError while it handles the OSError
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            reason = cause.strerror if isinstance(cause, OSError) else str(error).splitlines()[0].rstrip(". ")
            self.error = f"rank {dist.get_rank()} could not {verb} {os.path.basename(path)} ({reason})"
            if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                self.error += "; make room for it"

    def agree(self) -> list[dict[str, int]]:
        """Make the error of the first rank that has one that of all; `written` of every rank."""
        reports = gather((self.error, self.written))
        self.error = next((error for error, _ in reports if error is not None), None)
        return [written for _, written in reports]
