"""All records of a run, in Arrow columns: every file of every source probed once, and put into its bucket."""

from sat_ext.data.index.build import Group, Index, build_index
from sat_ext.data.index.lengths import clip_lengths, longest_is_rare
from sat_ext.data.index.probing import probe_files

__all__ = ["Group", "Index", "build_index", "clip_lengths", "longest_is_rare", "probe_files"]
