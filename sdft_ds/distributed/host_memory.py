"""Host memory that this machine and this process's cgroups allow, in bytes."""

import re
from collections.abc import Iterator
from pathlib import Path

MEMINFO, CGROUPS = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def available(meminfo: Path = MEMINFO, cgroups: Path = CGROUPS) -> int | None:
    """What can still be allocated; None where the system does not say. Reclaimable file cache counts as free."""
    if not meminfo.exists():
        return None
    room = [limit - used for limit, used in _limits(cgroups)]
    return min([_kilobytes(meminfo, "MemAvailable"), *room])


def total(meminfo: Path = MEMINFO, cgroups: Path = CGROUPS) -> int | None:
    """What this process may have if nothing else runs; None where the system does not say."""
    if not meminfo.exists():
        return None
    return min([_kilobytes(meminfo, "MemTotal"), *(limit for limit, _ in _limits(cgroups))])


def _kilobytes(meminfo: Path, name: str) -> int:
    return int(re.search(rf"{name}: *(\d+) kB", meminfo.read_text())[1]) * 1024


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """(Limit, used below it) of each cgroup (v2) of this process."""
    own = re.search(r"^0::/(.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
    innermost = root / own[1] if own else root
    for folder in (innermost, *innermost.parents):
        limit = folder / "memory.max"
        if limit.exists() and limit.read_text().strip() != "max":
            cached = re.search(r"^inactive_file (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
            yield int(limit.read_text()), int((folder / "memory.current").read_text()) - int(cached[1])
