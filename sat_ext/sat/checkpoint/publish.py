"""With all files on the disk: the checkpoint gets its name, `latest` names it, and old ones are removed."""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from sat.helpers import print_rank0

from sat_ext.checkpoint.layout import MANIFEST_NAME, drafts_of, full_checkpoints
from sat_ext.checkpoint.manifest import Manifest, write_manifest, write_synced
from sat_ext.files.atomic import PARTIAL, written_aside
from sat_ext.sat.checkpoint.writer import Writer


def publish(
    partial: Path, manifest: Manifest, model_config: dict[str, Any], keep_last: int | None, writer: Writer
) -> None:
    """On the first rank. An error before the rename leaves things as they were; after it, the checkpoint stays."""
    folder, final = partial.parent, partial.with_name(str(manifest.iteration))
    latest = folder / "latest.new"
    writer.attempt(MANIFEST_NAME, lambda: write_manifest(partial, manifest))
    # names first: after a power failure, `final` must not lack a file
    writer.attempt(partial.name, lambda: _sync(partial))
    writer.attempt("model_config.json", lambda: _replace(folder / "model_config.json", json.dumps(model_config)))
    # written now, while a full disk still does no harm, and renamed last
    writer.attempt("latest", lambda: write_synced(latest, final.name))
    writer.attempt(partial.name, lambda: _rename(partial, final), verb="rename")
    if writer.error is None:
        writer.placed = True
        try:
            _sync(folder)  # `latest` must not name a checkpoint whose rename could be lost
            os.replace(latest, folder / "latest")
            _sync(folder)
        except OSError as error:
            writer.error = (
                f"saved as {final}, but 'latest' could not be written ({error.strerror}): write {final.name} there"
            )
    with suppress(OSError):
        latest.unlink()
    if writer.error is None:  # never while `latest` may name an old one
        prune(folder, manifest.iteration, keep_last)


def prune(folder: Path, newest: int, keep_last: int | None) -> None:
    """Remove all but the `keep_last` newest; those of later iterations, which a run left behind, go first."""
    try:
        if keep_last is not None:
            found = full_checkpoints(folder)
            ranked = sorted(found, key=lambda p: (int(p.name) <= newest, int(p.name)), reverse=True)
            for old in ranked[keep_last:]:
                old.rename(old.with_name(old.name + PARTIAL))  # first: a kill leaves nothing that looks whole
        for leftover in folder.glob(f"*{PARTIAL}"):
            shutil.rmtree(leftover)
    except OSError as error:  # no reason to end the run: the new checkpoint is good
        print_rank0(
            f"warning: {folder}: an old checkpoint could not be removed ({error.strerror}: {error.filename}); it "
            "is tried again at the next save.",
            level="WARNING",
        )


def _rename(partial: Path, final: Path) -> None:
    _, aside = drafts_of(final)
    # a rename does not replace a folder that is not empty: that of an earlier run, resumed from before it
    if moved := final.exists():
        final.rename(aside)
    try:
        partial.rename(final)
    except OSError:
        if moved:
            aside.rename(final)
        raise


def _replace(path: Path, text: str) -> None:
    with written_aside(path) as draft:
        write_synced(draft, text)


def _sync(folder: Path) -> None:
    """Put a folder's names on the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
