from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch

from tests.sat.ranks import Server

# A test passes or fails for what was changed, not for what was drawn; pytest --hypothesis-profile=search looks
# further.
hypothesis.settings.register_profile("default", derandomize=True, deadline=None)
hypothesis.settings.register_profile("search", derandomize=False, max_examples=3000, deadline=None)
hypothesis.settings.load_profile("default")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[Any]:
    """What a test printed or logged may name files in bytes that are no UTF-8; pytest-xdist sends nothing else."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(autouse=True, scope="session")
def own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Indexes of the tests' tables are not kept among the user's."""
    patch = pytest.MonkeyPatch()
    patch.setenv("SAT_EXT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Forks the ranks of whole runs."""
    with Server() as server:
        yield server


@pytest.fixture(autouse=True)
def ordinary_scheduling() -> Iterator[None]:
    """SVT-AV1, run by root, gives the thread that encodes a real-time priority (SCHED_FIFO 99), and with it every
    process that the tests start later. On two cores, two ranks that wait for a third then keep it from running."""
    yield
    if os.sched_getscheduler(0) != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


@pytest.fixture(autouse=True)
def pytorchs_own_linear() -> Iterator[None]:
    """DeepSpeed puts its own in place for ZeRO-3, which keeps more for the backward pass, and leaves it there."""
    yield
    torch.nn.functional.linear = torch._C._nn.linear


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that join their launcher's process group find that of another test, where there is one."""
    if torch.distributed.is_initialized():
        for name in ("cache", "prior"):
            monkeypatch.setattr(f"sat_ext.cli.{name}.join", lambda: (0, 1))
        monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
        # whose store counts on where another command ended
        monkeypatch.setattr("sat_ext.cli.cache._get_default_store", torch.distributed.HashStore)
        monkeypatch.setenv("LOCAL_RANK", "0")
