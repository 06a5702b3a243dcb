"""Real-time priority must not leak from an encoder of one test into the processes of the next."""

from __future__ import annotations

import os
from pathlib import Path

from tests.media import write_clip


def test_an_encoder_may_raise_the_priority(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mkv", frames=3, codec="libsvtav1", b_frames=0)  # as root: SCHED_FIFO


def test_the_next_test_has_the_ordinary_one() -> None:
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
