"""Items of sources to Arrow columns and back, because a million Python objects would take gigabytes."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from operator import attrgetter
from typing import Any

import pyarrow as pa

from sat_ext.errors import DataError
from sat_ext.types import Item, MediaInfo

# The fields of `Item`; its `fps` is `item_fps`, beside the file's own.
ITEM_COLUMNS = pa.schema(
    [
        ("path", pa.string()),
        ("key", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("caption_weights", pa.list_(pa.float64())),
        ("start", pa.float64()),
        ("end", pa.float64()),
        ("crop", pa.list_(pa.int32())),
        ("item_fps", pa.float64()),
        ("weight", pa.float64()),
    ]
)

# The fields of `MediaInfo`.
INFO_COLUMNS = pa.schema(
    [
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("frames", pa.int64()),
        ("fps", pa.float64()),
        ("duration", pa.float64()),
        ("codec", pa.string()),
    ]
)

# `fingerprint` is `sat_ext.files.fingerprint`'s.
FILE_COLUMNS = pa.schema([*INFO_COLUMNS, ("fingerprint", pa.string())])

_FIELDS = attrgetter(*("fps" if name == "item_fps" else name for name in ITEM_COLUMNS.names))
ROWS = 4096  # in a batch: Arrow's strings end at 2 GiB, and a caption may have 100 kB


def item_batches(items: Iterable[Item]) -> Iterator[pa.RecordBatch]:
    """The items in their order, as batches of `ITEM_COLUMNS`. Raises `DataError` for text that is not UTF-8."""
    remaining = iter(items)
    while some := list(islice(remaining, ROWS)):
        values = zip(*map(_FIELDS, some))
        try:
            columns = [pa.array(column, field.type) for column, field in zip(values, ITEM_COLUMNS)]
        except UnicodeEncodeError as error:
            raise DataError(f"{error.object!r}: not valid UTF-8; rename the file, or fix its caption.") from None
        yield pa.record_batch(columns, schema=ITEM_COLUMNS)


def to_item(values: Mapping[str, Any]) -> Item:
    """The item of one row of `ITEM_COLUMNS`."""
    fields: dict[str, Any] = {name: values[name] for name in ITEM_COLUMNS.names}
    fields |= {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return Item(fps=fields.pop("item_fps"), **fields)


def to_info(values: Mapping[str, Any]) -> MediaInfo:
    """What the file of one row holds (`INFO_COLUMNS`)."""
    return MediaInfo(**{name: values[name] for name in INFO_COLUMNS.names})
