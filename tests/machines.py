"""Two machines out of Linux's namespaces, joined by a cable that can be pulled.

Each has its own network, host name, processes, /tmp, /dev/shm and home, and its own copy of the data, at the same
path with other modification times. They share one folder, as a cluster's nodes do. A machine lasts as long as its
first process, which reads from a pipe of the tests: it is gone with them, however they end.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMESPACES = ("--mount", "--net", "--uts", "--ipc", "--pid")
# its number, the data, and what it shares with the machine of the tests, some of which may lie in /tmp
BOOT = """set -e
number=$1 data=$2; shift 2
mount --rbind / /mnt
mount -t tmpfs none /tmp
mount -t tmpfs none /dev/shm
mount -t proc none /proc
for path in "$@"; do mkdir -p "$path"; mount --rbind "/mnt$path" "$path"; done
mkdir -p "$data" /tmp/home
mount -t tmpfs none "$data"
cp -r "/mnt$data/." "$data"
find "$data" -exec touch -d "200$number-01-01" {} +
printf '127.0.0.1 localhost\\n10.7.7.1 machine1\\n10.7.7.2 machine2\\n' > /tmp/hosts
mount --bind /tmp/hosts /etc/hosts
umount -l /mnt
hostname "machine$number"
ip link set lo up
echo up
exec cat
"""
ENTER = f"""#!/bin/bash
declare -A pids=(PIDS)
pid=${{pids[$1]}}; shift
exec nsenter --target "$pid" {" ".join(NAMESPACES)} -- env -C "$PWD" HOME=/tmp/home "$@"
"""
# as DeepSpeed calls them: `ssh [-o OPTION] HOST COMMAND...`, and `pdsh -S -f NUMBER -w HOSTS COMMAND...`
SSH = """#!/bin/bash
while [[ $1 == -* ]]; do shift 2; done
host=$1; shift
exec enter "$host" bash -c "$*"
"""
PDSH = """#!/bin/bash
IFS=, read -ra hosts <<< "$5"; shift 5
for n in "${!hosts[@]}"; do
    command="$*"
    enter "${hosts[n]}" bash -c "${command//%n/$n}" & started+=($!)
done
most=0
for one in "${started[@]}"; do
    wait "$one"; status=$?
    [ "$status" -le "$most" ] || most=$status
done
exit "$most"
"""


class Machines:
    """Machines 1 and 2; 0 is that of the tests."""

    def __init__(self, pids: list[int], shared: Path, data: Path) -> None:
        self.shared, self.data = shared, data
        bin = shared / "bin"
        bin.mkdir()
        known = " ".join(f"[machine{number}]={pid}" for number, pid in enumerate(pids, 1))
        for name, text in {"enter": ENTER.replace("PIDS", known), "ssh": SSH, "pdsh": PDSH}.items():
            (bin / name).write_text(text)
            (bin / name).chmod(0o755)
        own = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SAT_EXT_CACHE")
        self.environment = {k: v for k, v in os.environ.items() if k not in own} | {
            "PATH": f"{bin}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }

    def start(self, machine: int, command: list[str], folder: Path) -> subprocess.Popen[bytes]:
        """Start `command` in `folder`, its output in `<machine>.log` there."""
        enter = [self.shared / "bin" / "enter", f"machine{machine}"] if machine else []
        with (folder / f"{machine}.log").open("ab") as log:
            return subprocess.Popen(
                [*enter, *command], cwd=folder, env=self.environment, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT,
            )  # fmt: skip

    def call(self, machine: int, *command: str | Path) -> str:
        """What `command` prints."""
        enter = [self.shared / "bin" / "enter", f"machine{machine}"]
        done = subprocess.run(
            [*enter, *command], cwd="/", env=self.environment, check=True, stdout=subprocess.PIPE, text=True
        )
        return done.stdout

    @contextmanager
    def unplugged(self) -> Iterator[None]:
        """Nothing that one sends reaches the other, and neither is told, as when a switch dies."""
        self.call(1, "ip", "link", "set", "cable", "down")
        try:
            yield
        finally:
            self.call(1, "ip", "link", "set", "cable", "up")


@contextmanager
def two_machines(shared: Path, data: Path) -> Iterator[Machines]:
    """Two machines that share `shared`, and have a copy of `data` each."""
    probe = ["unshare", *NAMESPACES, "--fork", "mount", "-t", "tmpfs", "none", "/mnt"]
    if shutil.which("ip") is None or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("two machines are made of namespaces, which take root, and `ip`")
    shared.mkdir()
    together = [shared, *{Path(p).resolve() for p in (ROOT, sys.prefix, sys.base_prefix)}]
    with ExitStack() as stack:
        pids = []
        for number in "12":
            command = ["unshare", *NAMESPACES, "--fork", "--kill-child", "bash", "-c", BOOT, "boot", number, data]
            first = stack.enter_context(
                subprocess.Popen([*command, *together], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            )
            stack.callback(first.kill)
            assert first.stdout is not None and first.stdout.readline() == b"up\n"
            pids.append(int(Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text()))
        ends = [["name", "cable", "netns", str(pid)] for pid in pids]
        subprocess.run(["ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1]], check=True)
        machines = Machines(pids, shared, data)
        for number in (1, 2):
            machines.call(number, "ip", "address", "add", f"10.7.7.{number}/24", "dev", "cable")
            machines.call(number, "ip", "link", "set", "cable", "up")
        yield machines
