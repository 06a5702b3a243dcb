"""The budget of files that cannot be read: counted once over all processes of a rank, and by reason."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import numpy as np
import pytest

from sat_ext.data.faults import Faults
from sat_ext.errors import DataError, MediaError
from sat_ext.types import Bucket


def faults(skip: int = 100, consecutive: int = 20) -> Faults:
    return Faults(skip=skip, consecutive=consecutive)


def bad(number: int, reason: str = "no such file") -> MediaError:
    return MediaError(f"clips/{number}.mp4", reason)


def in_a_worker(do: Callable[[], object]) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            do()
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_bad_file_is_logged_and_known(caplog: pytest.LogCaptureFixture) -> None:
    found = faults()
    with caplog.at_level(logging.WARNING):
        found.add(7, bad(7))
        found.add(7, bad(7))
    assert 7 in found
    assert 8 not in found
    assert found.known == {7: ("clips/7.mp4", "no such file")}
    assert caplog.messages == ["skipped: clips/7.mp4: no such file"]


def test_what_one_data_worker_finds_all_know_and_it_counts_once() -> None:
    found = faults(skip=2)
    in_a_worker(lambda: found.add(5, bad(5)))
    in_a_worker(lambda: found.add(5, bad(5)))
    in_a_worker(lambda: found.add(6, bad(6)))
    in_a_worker(lambda: None if 5 in found and 6 in found else os._exit(1))
    assert 5 in found and found.known == {n: (f"clips/{n}.mp4", "no such file") for n in (5, 6)}
    with pytest.raises(DataError, match=r"^3 files could not be read, 1 in a row"):
        found.add(9, bad(9))


def test_past_the_budget_the_error_has_the_list_the_reasons_and_the_remedy() -> None:
    found = faults(skip=2)
    found.add(1, bad(1))
    found.clear_run()
    found.add(2, bad(2, "truncated at byte 10 of 20"))
    with pytest.raises(DataError) as caught:
        found.add(3, bad(3, "truncated at byte 5 of 30"))
    assert str(caught.value) == (
        "3 files could not be read, 2 in a row, more than data.params.on_bad_sample allows (skip 2, "
        "consecutive 20), 2 truncated at byte .. of .., 1 no such file; fix or remove them: clips/1.mp4: "
        "no such file; clips/2.mp4: truncated at byte 10 of 20; clips/3.mp4: truncated at byte 5 of 30"
    )


def test_workers_that_find_faults_at_once_lose_none() -> None:
    found = faults(skip=1000, consecutive=1000)
    pids = []
    for worker in range(4):
        if (pid := os.fork()) == 0:
            for number in range(100):
                found.add(100 * worker + number, bad(number))
            os._exit(0)
        pids.append(pid)
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in pids)
    assert 0 in found and sorted(found.known) == list(range(400))


def test_a_budget_of_none_ends_at_the_first_file() -> None:
    with pytest.raises(DataError, match=r"^1 files could not be read.*skip 0.*clips/0\.mp4: no such file$"):
        faults(skip=0).add(0, bad(0))


def test_too_many_in_a_row_end_the_run_and_a_readable_file_resets_the_count() -> None:
    found = faults(consecutive=2)
    for number in range(4):
        found.add(number, bad(number))
        found.clear_run()
    found.add(4, bad(4))
    found.add(5, bad(5))
    with pytest.raises(DataError, match=r"7 files could not be read, 3 in a row.*consecutive 2\),"):
        found.add(6, bad(6))


def test_a_summary_by_reason_comes_whenever_the_count_has_doubled(caplog: pytest.LogCaptureFixture) -> None:
    found = faults()
    with caplog.at_level(logging.WARNING):
        for number in range(9):
            found.add(number, bad(number, f"truncated at byte {number}" if number % 3 else "no such file"))
    summaries = [m for m in caplog.messages if "skipped so far" in m]
    assert [int(m.split()[0]) for m in summaries] == [2, 4, 8]
    assert summaries[-1] == (
        "8 files skipped so far, of 100 that data.params.on_bad_sample allows: 5 truncated at byte .., "
        "3 no such file"
    )


def test_a_budget_without_end_takes_no_memory_for_it() -> None:
    found = Faults(skip=10**12, consecutive=20)
    found.add(10**9, bad(1))
    assert found.known == {10**9: ("clips/1.mp4", "no such file")}


def test_undecodable_names_and_long_reasons_are_kept_as_far_as_they_can_be_shown() -> None:
    found = faults()
    path = "p" * 4000 + "/die Ente\n.mp4"
    found.add(1, MediaError(path, "r" * 4000))
    found.add(2, MediaError(os.fsdecode(b"caf\xe9.mp4"), "no such file"))
    assert found.known == {1: (path, "r" * 300), 2: ("caf?.mp4", "no such file")}


def test_a_bucket_without_a_readable_file_is_named() -> None:
    found, bucket = faults(), Bucket(frames=9, height=64, width=64)
    rows = np.array([3, 4], dtype=np.uint32)
    found.add(3, bad(3))
    found.require_another(rows, "clips", bucket)
    found.add(4, bad(4))
    with pytest.raises(
        DataError,
        match=r"^source 'clips': no file of bucket 9x64x64 can be read, such as clips/3\.mp4 \(no such file\); ",
    ):
        found.require_another(rows, "clips", bucket)


def test_reasons_that_differ_in_numbers_are_one() -> None:
    found = faults()
    assert found.summary() == ""
    for number, reason in enumerate(("1x2 pixels, over", "a", "30x4 pixels, over")):
        found.add(number, bad(number, reason))
    assert found.summary() == "2 ..x.. pixels, over, 1 a"
