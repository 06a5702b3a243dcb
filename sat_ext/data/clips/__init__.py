"""Which moments of a clip to show: samplers by name. Pure arithmetic in seconds, no media.

Time 0 is the start of the file's first frame; at time t a decoder shows the last frame that starts at or before
t + `TIME_TOLERANCE`. Unlike frame numbers, times keep the speed right at every frame rate, constant or not: a
25 fps clip at 8 fps takes frames 0, 3, 6, 9, 12, 15, 18, 21, 25, and lasts as long as before.
"""

from sat_ext.data.clips.samplers import SAMPLERS, Window, find_sampler, is_still_sampler, register_sampler
from sat_ext.data.clips.times import ClipTimes, available_frames, records_of, sample_times

__all__ = [
    "SAMPLERS",
    "ClipTimes",
    "Window",
    "available_frames",
    "find_sampler",
    "is_still_sampler",
    "records_of",
    "register_sampler",
    "sample_times",
]
