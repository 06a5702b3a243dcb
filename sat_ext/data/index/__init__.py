"""All records of a run, in Arrow columns: every file of every source probed once, and put into its bucket.

| module | does |
|---|---|
| `columns.py` | items to Arrow columns, and back |
| `probe_cache.py` | what files held in earlier runs, by fingerprint |
| `probing.py` | probes the others in parallel, each file with a time limit |
| `place.py` | rows to buckets, windows and visits |
| `build.py` | these in order |
| `lengths.py` | whether the longest bucket is filled |
"""

from sat_ext.data.index.build import Group, Index, build_index
from sat_ext.data.index.lengths import clip_lengths, longest_is_rare
from sat_ext.data.index.probing import probe_files

__all__ = ["Group", "Index", "build_index", "clip_lengths", "longest_is_rare", "probe_files"]
