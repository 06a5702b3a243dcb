"""What the start of a run reads, sends and holds on 8, 64 and 1,024 ranks: counted, from the code that runs."""

from __future__ import annotations

import mmap
import os
import pickle
import sys
import tempfile
import threading
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from PIL import Image
from sat import mpu
from torch.distributed import distributed_c10d

import sat_ext
from sat_ext.data.index.probing import Outcome, _outcome
from sat_ext.data.probe import probe
from sat_ext.sat import broadcast
from sat_ext.sat import probing as shared

MACHINE = 8  # ranks
FEW, MANY = 500, 2000  # records
OTHERS = 10  # files and folders of the first rank: the data's own folder, and the index beside it
PARAMS = {"video_size": [64, 64], "fps": 8, "max_num_frames": 9}
MakeArgs = Callable[..., Namespace]


class Ranks:
    """A mock of the processes, and of nothing else: each rank is a thread, whose collectives go through memory.

    What a rank would be sent is pickled, as PyTorch does, and counted. Each machine has a folder of its own for
    temporary files. Probing is the real one without its guard, which would be a process, too. The threads take
    turns, a thread until it has to wait for the others: 1,024 that run at once spend a minute on their locks.
    """

    def __init__(self, world: int, data: Path, temporary: Path) -> None:
        self.world, self.data, self.temporary = world, data, temporary
        self.received: Counter[int] = Counter()  # bytes by rank, of broadcasts and gathers
        self.stored: Counter[int] = Counter()  # bytes that a rank has written to the store or read from it
        self.opened: Counter[int] = Counter()  # files and folders of the data
        self.probed: Counter[int] = Counter()
        # by machine: file (or rank, for its own memory) and size
        self.mapped: dict[int, set[tuple[int, int]]] = {}
        self.largest_gather = 0
        self._own, self._box, self._boxes = threading.local(), b"", [b""] * world
        self._all = tuple(range(world))
        self._arrivals: Counter[tuple[int, ...]] = Counter()
        self._turns = [threading.Semaphore(0) for _ in range(world)]
        self._left, self._errors = set(self._all), list[BaseException]()
        self._store = dist.HashStore()

    @property
    def rank(self) -> int:
        return getattr(self._own, "rank", 0)  # only the first rank has other threads

    def run(self, call: Callable[[], Any]) -> list[Any]:
        """What `call` returns on each rank."""
        found: list[Any] = [None] * self.world

        def run(rank: int) -> None:
            self._own.rank = rank
            self._turns[rank].acquire()
            try:
                found[rank] = call()
            except BaseException as error:
                self._errors.append(error)
            self._left.remove(rank)
            self._next()

        threads = [threading.Thread(target=run, args=(rank,)) for rank in self._all]
        for thread in threads:
            thread.start()
        self._turns[0].release()
        for thread in threads:
            thread.join()
        if self._errors:
            raise self._errors[0]
        return found

    def _next(self) -> None:
        """Let the next rank run that has not ended."""
        following = ((self.rank + step) % self.world for step in range(1, self.world + 1))
        if (rank := next((r for r in following if r in self._left), None)) is not None:
            self._turns[rank].release()

    # --- collectives

    def barrier(self, group: tuple[int, ...] | None = None) -> None:
        members = group or self._all
        self._arrivals[members] += 1
        complete = -(-self._arrivals[members] // len(members)) * len(members)
        while self._arrivals[members] < complete:
            self._next()
            self._turns[self.rank].acquire()
            assert not self._errors, "another rank has failed"

    def broadcast(self, box: list[Any], src: int, group: tuple[int, ...] | None = None) -> None:
        if self.rank == src:
            self._box = pickle.dumps(box)
        self.barrier(group)
        if self.rank != src:
            box[:] = pickle.loads(self._box)
            self.received[self.rank] += len(self._box)
        self.barrier(group)

    def all_gather(self, values: list[Any], value: Any) -> None:
        self._boxes[self.rank] = pickle.dumps(value)
        self.barrier()
        values[:] = map(pickle.loads, self._boxes)
        size = max(map(len, self._boxes)) * self.world  # PyTorch pads them to the longest
        self.received[self.rank] += size
        self.largest_gather = max(self.largest_gather, size)
        self.barrier()

    def new_group(self, ranks: Sequence[int]) -> tuple[int, ...]:
        self.barrier()
        return tuple(ranks)

    def set(self, key: str, value: bytes) -> None:
        assert len(value) <= 8 << 20  # as TCPStore does
        self.stored[self.rank] += len(value)
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        value: bytes = self._store.get(key)
        self.stored[self.rank] += len(value)
        return value

    # --- the system

    def map(self, file: int, size: int, **options: Any) -> mmap.mmap:
        which = os.fstat(file).st_ino if file >= 0 else -1 - self.rank
        self.mapped.setdefault(self.rank // MACHINE, set()).add((which, size))
        return mmap.mmap(file, size, **options)

    def temporary_folder(self) -> str:
        folder = self.temporary / str(self.rank // MACHINE)
        folder.mkdir(exist_ok=True)
        return str(folder)

    def probe_files(self, paths: Iterable[str], **_: Any) -> Iterator[Outcome]:
        for path in paths:
            self.probed[self.rank] += 1
            yield _outcome(probe, path)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {
                "get_rank": lambda *_: self.rank,
                "get_world_size": lambda *_: self.world,
                "broadcast_object_list": self.broadcast,
                "all_gather_object": self.all_gather,
                "barrier": self.barrier,
                "new_group": self.new_group,
                "destroy_process_group": lambda group: None,
            }.items():
                patch.setattr(dist, name, value)
            store = SimpleNamespace(set=self.set, get=self.get, delete_key=self._store.delete_key)
            patch.setattr(distributed_c10d, "_get_default_store", lambda: store)
            patch.setattr(mpu, "get_model_parallel_world_size", lambda: 1)
            patch.setattr(mpu, "get_data_parallel_rank", lambda: self.rank)
            patch.setattr(mpu, "get_data_parallel_world_size", lambda: self.world)
            patch.setattr(tempfile, "gettempdir", self.temporary_folder)
            patch.setattr(broadcast, "mmap", SimpleNamespace(mmap=self.map, ACCESS_READ=mmap.ACCESS_READ))
            patch.setattr(shared, "probe_files", self.probe_files)
            watchers.append(self)
            try:
                yield
            finally:
                watchers.remove(self)


watchers: list[Ranks] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("open", "os.scandir", "os.listdir"):
        for ranks in watchers:
            if str(arguments[0]).startswith(f"{ranks.data}/") or str(arguments[0]) == str(ranks.data):
                ranks.opened[ranks.rank] += 1


sys.addaudithook(_watch)


def make_data(folder: Path, records: int) -> Path:
    """Stills with captions, a hundred in a folder."""
    folder.mkdir()
    Image.new("RGB", (96, 64), (200, 40, 90)).save(folder / "0.png")
    for number in range(records):
        name = folder / f"{number // 100:03}" / f"{number:06}"
        name.parent.mkdir(exist_ok=True)
        os.link(folder / "0.png", f"{name}.png")
        Path(f"{name}.txt").write_text(f"Still {number}, of one colour, to be counted and not looked at.")
    (folder / "0.png").unlink()
    return folder


def start(make_args: MakeArgs, ranks: Ranks) -> list[Any]:
    """The data set of every rank, as SAT makes it."""
    create = sat_ext.JointImageVideoDataset.create_dataset_function

    def call() -> Any:
        args = make_args(train_data=[str(ranks.data)], valid_data=None)
        return create(args.train_data[0], args, **PARAMS)

    with ranks.in_place():
        return ranks.run(call)


@pytest.fixture(params=[8, 64, 1024])
def starts(
    request: pytest.FixtureRequest, sat_args: MakeArgs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[int, Ranks]:
    """What was counted at the first start of so many ranks, for few and for many records."""
    monkeypatch.setenv("SAT_EXT_CACHE", str(tmp_path / "cache"))
    found = {}
    for records in (FEW, MANY):
        (tmp_path / f"tmp{records}").mkdir()
        found[records] = Ranks(
            request.param, make_data(tmp_path / str(records), records), tmp_path / f"tmp{records}"
        )
        streams = start(sat_args, found[records])
        assert {len(group.rows) for own in streams for group in own.stream.index.groups} == {records}
    return found


def test_a_start_grows_with_ranks_or_with_records_but_not_with_their_product(starts: dict[int, Ranks]) -> None:
    few, many = starts[FEW], starts[MANY]
    for records, ranks in starts.items():
        world, machines = ranks.world, ranks.world // MACHINE

        # reads: each file is probed once, by one rank; nobody but the first reads lists and captions
        assert sum(ranks.probed.values()) == records
        assert max(ranks.probed.values()) <= -(-records // world)
        assert all(ranks.opened[rank] == ranks.probed[rank] for rank in range(1, world))
        folders = 2 * records // 100  # for names, and for links
        assert ranks.opened[0] <= records + ranks.probed[0] + folders + OTHERS

        # memory: each machine holds the index once, as a file that its ranks map
        assert len(ranks.mapped) == machines
        assert all(len(files) == 1 and min(files)[0] > 0 for files in ranks.mapped.values())
        sizes = {size for files in ranks.mapped.values() for _, size in files}
        assert len(sizes) == 1 and max(sizes) < 400 * records

        # sent: the index to one rank of each other machine, and to all others only what ranks say to each other
        index = max(sizes)
        full = {rank // MACHINE for rank, received in ranks.received.items() if received > index}
        assert full == set(range(1, machines))
        assert sum(received > index for received in ranks.received.values()) == machines - 1
        assert min(ranks.received[rank] for rank in range(1, world)) < 5000 + 40 * world
        assert ranks.largest_gather <= 40 * world

        # what is to be probed, and what was found, goes to one rank each
        assert all(ranks.stored[rank] < 300 * (records / world + 2) for rank in range(1, world))

    # four times the records: the same for each rank, but for its part of the files
    assert few.largest_gather == many.largest_gather
    others = [sorted(ranks.received.values())[: -(ranks.world // MACHINE)] for ranks in (few, many)]
    assert others[1] == pytest.approx(others[0], rel=0.02)


def test_a_second_start_reads_nothing_on_other_ranks(
    sat_args: MakeArgs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAT_EXT_CACHE", str(tmp_path / "cache"))
    data = make_data(tmp_path / "data", FEW)
    for number in range(2):
        (tmp_path / f"tmp{number}").mkdir()
        ranks = Ranks(64, data, tmp_path / f"tmp{number}")
        start(sat_args, ranks)
    assert not ranks.probed and not ranks.stored
    assert set(ranks.opened) == {0}
