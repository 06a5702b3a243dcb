"""What a run's start costs before its first batch: sources read, files probed or known, rows put into buckets.

    python benchmarks/startup.py [--records 1000000] [--rows 10000000] [--folder DIR] [--json startup.json]

It makes the data first: a folder of small stills (hard links to a few) with captions, the same files listed by a
JSONL and a Parquet table, and 1,000 samples in each of many tars; and, with --rows, tables of so many rows that
name files that are not there, which are read and not probed. Each start is a process of its own, timed without
imports: cold (nothing probed, but the files' names in the page cache), warm, and warm with ten files more. CPU and
memory count its processes together. Beside it stand webdataset, MosaicML streaming and Hugging Face datasets, as
far as they are installed."""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from report import report

SOURCES = {"folder": "folder", "jsonl": "rows.jsonl", "parquet": "rows.parquet", "tars": "tars"}
PACKAGES = {"webdataset": "webdataset", "streaming": "mosaicml-streaming", "datasets": "datasets"}
LINKS = 50_000  # of one file; ext4 allows 65,000
IN_FOLDER = IN_TAR = 1000
ADDED = 10


def main() -> None:
    """Make the data, run every start, print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--rows", type=int, default=0, help="of the tables without files")
    parser.add_argument("--sources", nargs="*", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--folder", type=Path, help="for the data, which are kept; by default a temporary folder")
    parser.add_argument("--warm-only", action="store_true", help="of data and caches kept from an earlier call")
    parser.add_argument("--without-others", action="store_true", help="our own starts only")
    parser.add_argument("--json", type=Path, help="save the table here too")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(CALLS[args.child[0]](args.child[1])))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        os.environ["SAT_EXT_CACHE"], os.environ["HF_HOME"] = str(folder / "cache"), str(folder / "hf")
        rows: list[list[object]] = []
        for name in args.sources if args.records else ():
            make(name, folder, args.records)
            path = str(folder / SOURCES[name])
            if not args.warm_only:
                forget(folder)
                rows.append(run("sat_ext", f"{name}, cold", "index", path))
            rows.append(run("sat_ext", f"{name}, warm", "index", path))
            if name == "folder" and not args.warm_only:
                add_stills(folder / "folder" / "more", ADDED)
                rows.append(run("sat_ext", f"{name}, {ADDED} files more", "index", path))
                shutil.rmtree(folder / "folder" / "more")
            rows += [] if args.without_others else others(name, path)
        for name in ("jsonl", "parquet") if args.rows else ():
            make_rows(folder / f"many.{name}", args.rows, lambda number: f"none/{number:09}.jpg")
            rows.append(run("sat_ext", f"{args.rows:,} rows of {name}", "list", str(folder / f"many.{name}")))
        columns = ["what", "start", "s", "CPU s", "main MB", "all MB", "records", "probed"]
        report(f"Starts of {args.records:,} records", columns, rows, args.json)
        if missing := [name for module, name in PACKAGES.items() if not importlib.util.find_spec(module)]:
            print(f"not installed, so not compared: {', '.join(missing)}")


# --- the data


def make(name: str, folder: Path, records: int) -> None:
    """The data of one source; what is there already is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    if name == "tars":
        make_tars(folder / "tars", records)
        return
    if not (folder / "folder").is_dir():
        add_stills(folder / "folder", records)
    if name in ("jsonl", "parquet"):
        make_rows(folder / SOURCES[name], records, lambda number: f"folder/{place(number)}.jpg")


def add_stills(folder: Path, count: int) -> None:
    """Stills and captions, `IN_FOLDER` a folder."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        texts = [Path(name, f"{n}.txt") for n in range(-(-count // LINKS) * 20)]
        for number, text in enumerate(texts):
            text.write_text(caption(number))
        for number in range(count):
            if number % LINKS == 0:
                still = Path(name, f"{number}.jpg")
                still.write_bytes(picture())
            target = folder / place(number)
            if number % IN_FOLDER == 0:
                target.parent.mkdir(parents=True)
            os.link(still, f"{target}.jpg")
            os.link(texts[number % len(texts)], f"{target}.txt")


def place(number: int) -> str:
    """The name of a record without its suffix."""
    return f"{number // IN_FOLDER:05}/{number:08}"


def caption(number: int) -> str:
    """Of a hundred letters."""
    return (
        f"Number {number:09}: a small picture of one colour, as plain as it can be, for counting and not looking."
    )


def picture() -> bytes:
    """A JPEG of less than a kilobyte."""
    out = io.BytesIO()
    Image.new("RGB", (96, 64), (200, 90, 40)).save(out, "JPEG")
    return out.getvalue()


def make_rows(table: Path, count: int, name_of: Callable[[int], str]) -> None:
    """A table of `count` rows, JSONL or Parquet."""
    if table.exists():
        return
    table.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([("path", pa.string()), ("caption", pa.string())])
    numbers = iter(range(count))
    with table.open("w") as text, pq.ParquetWriter(table.with_suffix(".draft"), schema) as writer:
        while some := list(islice(numbers, 100_000)):
            rows = [{"path": name_of(number), "caption": caption(number)} for number in some]
            if table.suffix == ".jsonl":
                text.writelines(json.dumps(row) + "\n" for row in rows)
            else:
                writer.write_table(pa.Table.from_pylist(rows, schema))
    draft = table.with_suffix(".draft")
    draft.replace(table) if table.suffix == ".parquet" else draft.unlink()


def make_tars(folder: Path, records: int) -> None:
    """Tars of `IN_TAR` samples each, alike."""
    if folder.is_dir():
        return
    folder.mkdir()
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(IN_TAR):
            for suffix, data in ((".jpg", picture()), (".txt", caption(number).encode())):
                member = tarfile.TarInfo(f"{number:08}{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    for number in range(-(-records // IN_TAR)):
        (folder / f"{number:05}.tar").write_bytes(out.getvalue())


def forget(folder: Path) -> None:
    """What earlier runs have kept."""
    for kept in (folder / "cache", folder / "folder" / ".sat_ext", folder / "tars" / ".sat_ext"):
        shutil.rmtree(kept, ignore_errors=True)


# --- the starts


def run(what: str, name: str, call: str, path: str) -> list[object]:
    """One start in a process of its own: a row of the table."""
    print(f"{what}: {name} ...", file=sys.stderr, flush=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--child", call, path]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0.0
    while child.poll() is None:
        peak = max(peak, megabytes(child.pid))
        time.sleep(0.2)
    assert child.stdout is not None
    found = json.loads(child.stdout.read().splitlines()[-1])
    main = found["main"]
    print(found, f"all {peak:.0f} MB", file=sys.stderr, flush=True)
    return [what, name, found["s"], found["cpu"], round(main), round(max(peak, main)), *found["counts"]]


def megabytes(pid: int) -> float:
    """What a process and those below it take, shared memory once."""
    total = 0
    try:
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            total += next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    except (psutil.Error, OSError, StopIteration):  # it has just ended
        pass
    return total / 1e3


def timed(call: Callable[[], tuple[int, int]]) -> dict[str, Any]:
    """Seconds, CPU seconds of all processes, megabytes of this one, and what `call` counts."""
    used, began = cpu(), time.perf_counter()
    counts = call()
    status = Path("/proc/self/status").read_text()
    main = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return {"s": time.perf_counter() - began, "cpu": cpu() - used, "main": main / 1e3, "counts": counts}


def cpu() -> float:
    """Seconds of this process and of its children that have ended."""
    both = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in both)


def start_index(path: str) -> dict[str, Any]:
    """Ours, as the first rank of a run builds it."""
    from sat_ext.config import load
    from sat_ext.data.index import build_index
    from sat_ext.data.params import DataConfig
    from sat_ext.data.sources import SourceConfig

    config = load(DataConfig, {"video_size": [480, 720], "max_num_frames": 49}, "data.params")
    probed = [0]

    def counted(outcomes: Any, total: int) -> Any:
        probed[0] += total
        return outcomes

    def build() -> tuple[int, int]:
        return build_index([SourceConfig(path=path)], config, probing=counted).table.num_rows, probed[0]

    return timed(build)


def start_list(path: str) -> dict[str, Any]:
    """Ours, up to the probing."""
    from sat_ext.data.sources import read_batches

    return timed(lambda: (sum(batch.num_rows for batch in read_batches(path)), 0))


def others(name: str, path: str) -> Iterator[list[object]]:
    """The other packages on the same source: the first start, and the second."""
    if name == "tars" and importlib.util.find_spec("webdataset"):
        yield run("webdataset", f"{name}, one pass (it has no index)", "webdataset", path)
    if importlib.util.find_spec("datasets"):
        for start in ("cold", "warm"):
            yield run("datasets", f"{name}, {start}", f"datasets {name}", path)


def start_webdataset(path: str) -> dict[str, Any]:
    """Every sample's names, read from the tars."""
    import webdataset

    urls = sorted(map(str, Path(path).glob("*.tar")))
    data = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    return timed(lambda: (sum(1 for _ in data), 0))


def start_datasets(kind: str, path: str) -> dict[str, Any]:
    """Its own table of the rows; for folders and tars with the files as they are, not probed."""
    import datasets

    builders = {"folder": "imagefolder", "jsonl": "json", "parquet": "parquet", "tars": "webdataset"}
    given: dict[str, Any] = {"data_files": path}
    if kind == "folder":
        given = {"data_dir": path}
    elif kind == "tars":
        given = {"data_files": sorted(map(str, Path(path).glob("*.tar")))}
    return timed(lambda: (len(datasets.load_dataset(builders[kind], split="train", **given)), 0))


CALLS: dict[str, Callable[[str], dict[str, Any]]] = {
    "index": start_index,
    "list": start_list,
    "webdataset": start_webdataset,
    **{f"datasets {kind}": (lambda path, kind=kind: start_datasets(kind, path)) for kind in SOURCES},
}


if __name__ == "__main__":
    main()
