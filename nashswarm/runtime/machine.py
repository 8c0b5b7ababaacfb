"""Read what Linux reports about the machine: cores, caches and instruction sets."""

import dataclasses
import logging
import os
import pathlib
import platform

CPUS, CPUINFO = pathlib.Path("/sys/devices/system/cpu"), pathlib.Path("/proc/cpuinfo")
ASSUMED = {1: 32 << 10, 2: 1 << 20, 3: 8 << 20}  # level → bytes, if the system does not report them
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
INSTRUCTIONS = (  # that products with packed weights can use
    *(
        "avx2",
        "fma",
        "f16c",
        "avx512f",
        "avx512bw",
        "avx512_vbmi",
        "avx512_vnni",
        "avx512_bf16",
        "avx_vnni",
        "amx_int8",
    ),
    *("asimd", "asimddp", "i8mm", "sve"),
)

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Machine:
    """The processor of this machine.

    ``cores``: how many this process may use.  ``caches``: level → bytes of one data cache.  ``sharers``: level → number
    of processors that share it.  ``assumed``: levels whose size the system does not report.
    """

    name: str
    cores: int
    caches: dict[int, int]
    sharers: dict[int, int]
    instructions: tuple[str, ...]
    assumed: tuple[int, ...] = ()

    def level(self, size: int) -> str:
        """Return the nearest level of memory that holds ``size`` bytes.

        >>> machine = Machine("", 1, {1: 32768, 2: 1048576, 3: 33554432}, {1: 1, 2: 1, 3: 2}, ())
        >>> machine.level(20_000), machine.level(2_000_000), machine.level(10**9)
        ('L1', 'L3', 'memory')
        """
        return next((f"L{level}" for level, capacity in sorted(self.caches.items()) if size <= capacity), "memory")

    def __str__(self) -> str:
        caches = ", ".join(
            f"L{level} {_binary(size)}"
            + (" (assumed)" if level in self.assumed else "")
            + (f" for {self.sharers[level]} processors" if self.sharers.get(level, 1) > 1 else "")
            for level, size in sorted(self.caches.items())
        )
        return f"{self.name}: {self.cores} cores, {caches}; {' '.join(self.instructions) or 'instruction sets unknown'}"


def read_machine(cpus: pathlib.Path = CPUS, cpuinfo: pathlib.Path = CPUINFO) -> Machine:
    """Read the properties of this machine; a warning names cache sizes that had to be assumed."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    caches: dict[int, int] = {}
    sharers: dict[int, int] = {}
    for folder in sorted((cpus / f"cpu{min(allowed)}" / "cache").glob("index*")):
        kind, level, size, shared = (_text(folder / name) for name in ("type", "level", "size", "shared_cpu_list"))
        if kind in ("Data", "Unified") and level.isdigit() and size[:-1].isdigit() and size[-1] in UNITS:
            caches[int(level)] = int(size[:-1]) * UNITS[size[-1]]
            sharers[int(level)] = _count(shared)
    top = max(caches, default=0)  # some machines have no third level
    assumed = tuple(level for level in ASSUMED if level not in caches and (level < top or top < 2))
    if assumed:
        sizes = ", ".join(f"L{level} {_binary(ASSUMED[level])}" for level in assumed)
        log.warning("the system does not say how large its caches are: assumed %s", sizes)
    caches |= {level: ASSUMED[level] for level in assumed}
    facts: dict[str, str] = {}
    for line in _text(cpuinfo).splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())  # of the first processor
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    instructions = tuple(name for name in INSTRUCTIONS if name in flags)
    name = facts.get("model name") or platform.machine()
    return Machine(name, len(allowed), caches, sharers, instructions, assumed)


def _text(path: pathlib.Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _count(listed: str) -> int:
    """Count the processors in a list like 0-3,8; an empty list means one.

    >>> _count("0-3,8"), _count("")
    (5, 1)
    """
    ranges = [part.partition("-")[::2] for part in listed.split(",") if part]
    return sum(int(last or first) - int(first) + 1 for first, last in ranges) or 1


def _binary(size: int) -> str:
    """Write a number of bytes in binary units.

    >>> _binary(32768), _binary(1 << 20), _binary(100)
    ('32 KiB', '1 MiB', '100 B')
    """
    for shift, unit in ((20, "MiB"), (10, "KiB")):
        if size >= 1 << shift:
            return f"{size / (1 << shift):g} {unit}"
    return f"{size} B"
