"""Before the first step: all ranks see the same folder for checkpoints, and no other run saves there."""

import fcntl
import os
import socket
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from sat_ext.checkpoint.layout import LOCK_NAME
from sat_ext.errors import ConfigError
from sat_ext.ranks import gather
from sat_ext.sat.broadcast import share_from_first_rank

LOOKS = 30  # for the token, a tenth of a second apart


def claim(folder: Path) -> None:
    """Make `folder`, and lock it until the first rank's process ends. Called on every rank. Raises `ConfigError`
    on all if one of them sees another folder, or another run holds the lock."""
    token = share_from_first_rank(lambda: _leave_token(folder.parent))
    blind = gather(None if _sees(folder.parent, token) else socket.gethostname())
    if dist.get_rank() == 0:
        (folder.parent / token).unlink(missing_ok=True)
    for rank, host in enumerate(blind):
        if host is not None:
            raise ConfigError(
                f"args.save: rank {rank} on {host} does not see what rank 0 wrote into {folder.parent}; "
                "name a folder that all ranks share."
            )
    share_from_first_rank(lambda: _lock(folder))


def _leave_token(folder: Path) -> str:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number, path = tempfile.mkstemp(prefix=".shared-", dir=folder)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    os.close(number)
    return os.path.basename(path)


def _sees(folder: Path, token: str) -> bool:
    # other machines may see a new name on a network file system only after a while
    for _ in range(LOOKS):
        with suppress(OSError):
            if token in os.listdir(folder):  # not exists(): NFS clients cache that a name is missing
                return True
        time.sleep(0.1)
    return False


def _lock(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
        held = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    try:
        # not flock, which a forked data worker that outlives the run would keep
        fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        raise ConfigError(
            f"args.save: another run is saving into {folder}; wait for its end, or change args.experiment_name."
        ) from None
    except OSError:  # a file system without locks
        os.close(held)


def _cannot_write(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"args.save: {folder} cannot be written to ({error.strerror}); name another folder.")
