"""What was read from a source, kept for the next start in our own cache.

Not beside the data: whoever made these could have it name any file."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

import pyarrow as pa

from sat_ext.files.atomic import cache_folder, written_aside


def place_of(kind: str, name: str) -> Path:
    """Where the table of this name is kept."""
    return cache_folder() / kind / f"{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}.arrow"


def load(place: Path, schema: pa.Schema, state: str) -> pa.Table | None:
    """The table at `place`, mapped into memory; None if there is none that was kept in the same `state`."""
    with suppress(OSError, pa.ArrowException), pa.memory_map(str(place)) as file:
        table = pa.ipc.open_file(file).read_all()
        if table.schema.equals(schema) and table.schema.metadata == {b"state": os.fsencode(state)}:
            table.validate(full=True)
            return table.replace_schema_metadata(None)
    return None


def save(place: Path, table: pa.Table, state: str) -> None:
    """Keep `table`, if the folder can be written."""
    table = table.replace_schema_metadata({"state": os.fsencode(state)})
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(place, shared=True) as draft, pa.ipc.new_file(str(draft), table.schema) as writer:
            writer.write_table(table)
