"""Tables on the screen, and the same as JSON and as a picture."""

import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import llvmlite.binding

from dllm.kernels import processor

MPIS = {  # what `mpirun --version` says of each
    "Open MPI": r"Open MPI\)? ([\d.]+)",
    "Intel MPI": r"Intel.*Version ([\d.]+)",
    "MPICH": r"HYDRA[^:]*:\s*Version:\s*(\S+)",
}


@functools.cache
def machine() -> dict[str, Any]:
    """What was measured on: the processor, its caches in bytes, what the kernels use of it, and versions."""
    levels = {"L1d": 1, "L2": 2, "L3": 3}
    versions = {"Python": platform.python_version(), "numba": importlib.metadata.version("numba")}
    versions["LLVM"] = ".".join(map(str, llvmlite.binding.llvm_version_info))
    return {
        "processor": processor_name(_text(["cat", "/proc/cpuinfo"]), _text(["lscpu"])),
        "cores": os.cpu_count(),
        "caches": {name: processor.cache_bytes(level, 0) for name, level in levels.items()},
        "vector_bytes": processor.VECTOR,
        "bf16": processor.BF16 or "fp32",
        "int8": "amx" if processor.AMX_INT8 else "vnni" if processor.VNNI else "",
        "versions": versions | mpi_version(_text(["mpirun", "--version"])),
    }


def hardware() -> str:
    """Two lines that name the machine, and what was used of it."""
    facts = machine()
    size = lambda count: f"{count >> 20} MB" if count >= 1 << 20 else f"{count >> 10} KB"
    parts = [facts["processor"], f"{facts['cores']} cores"]
    parts += [f"{name} {size(count)}" for name, count in facts["caches"].items() if count]
    used = [f"vectors of {facts['vector_bytes']} bytes", f"bf16 by {facts['bf16']}"]
    used += [f"int8 by {facts['int8']}"] if facts["int8"] else []
    used += [f"{name} {version}" for name, version in facts["versions"].items()]
    return f"{', '.join(parts)}\n{', '.join(used)}"


def processor_name(cpuinfo: str, lscpu: str) -> str:
    """The processor's name, by what Linux and `lscpu` say: on ARM Linux has numbers only, which `lscpu` mostly can read."""
    lines = [line.partition(":") for line in (*cpuinfo.splitlines(), *lscpu.splitlines())]
    facts = {key.strip().lower(): value.strip() for key, _, value in reversed(lines) if value.strip() != "-"}
    numbers = [f"{key} {facts[f'cpu {key}']}" for key in ("implementer", "part") if f"cpu {key}" in facts]
    return facts.get("model name") or ", ".join(numbers) or platform.machine()


def mpi_version(text: str) -> dict[str, str]:
    """{MPI's name: its version}, by what `mpirun --version` says."""
    found = {name: re.search(pattern, text) for name, pattern in MPIS.items()}
    return next(({name: match[1]} for name, match in found.items() if match), {})


def _text(command: list[str]) -> str:
    """What a command says in English, "" where there is none."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def middle(values: Sequence[float]) -> float | None:
    """The median of what was measured, None of nothing."""
    return statistics.median(values) if values else None


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median (least - most) of what was measured."""
    if not values:
        return "-"
    return f"{middle(values):.{digits}f} ({min(values):.{digits}f} - {max(values):.{digits}f})"


def ratio(one: Sequence[float], other: Sequence[float]) -> str:
    """How many times `other` goes into `one`, as text; of medians."""
    return f"{middle(one) / middle(other):.2f} x" if one and other else "-"


class Table:
    """Rows that are shown as they come.

    columns : (name, width) each, no two of one name
    """

    def __init__(self, title: str, columns: Sequence[tuple[str, int]]) -> None:
        if len(dict(columns)) < len(columns):
            raise ValueError("two columns of one name: a row is kept by the names")
        self.title, self.columns, self.rows = title, columns, []
        print(f"\n{title}\n")
        print("".join(f"{name:>{width}}" if i else f"{name:{width}}" for i, (name, width) in enumerate(columns)), flush=True)

    def row(self, *cells: object) -> None:
        """Show and keep a row."""
        self.rows.append(dict(zip((name for name, _ in self.columns), cells, strict=True)))
        widths = [width for _, width in self.columns]
        pairs = enumerate(zip(cells, widths, strict=True))
        print("".join(f"{cell:>{width}}" if i else f"{cell:{width}}" for i, (cell, width) in pairs), flush=True)


Measured: TypeAlias = tuple[Table, dict[str, Any], Callable[[Any], object]]  # what was measured, and how to draw it


def save(folder: pathlib.Path, command: str, table: Table, data: Any, draw: Callable[[Any], object]) -> list[pathlib.Path]:
    """Write `command`.json and, where matplotlib is there, `command`.png into a folder. Returns the paths.

    data : what was measured, as it was measured
    draw : function of matplotlib's axes
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{command}.json"]
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    content = {"title": table.title, "hardware": machine(), "time": now, "table": table.rows, "measured": data}
    paths[0].write_text(json.dumps(content, indent=1) + "\n")
    try:
        import matplotlib
    except ImportError:
        return paths
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    draw(axes)
    axes.set_title(f"{table.title}\n{hardware()}", fontsize=9)
    axes.legend(fontsize=8)
    paths.append(folder / f"{command}.png")
    figure.savefig(paths[1], dpi=120)
    pyplot.close(figure)
    return paths


def bars(label: str, groups: dict[str, dict[str, float | None]], axes: Any) -> None:
    """Bars in groups: name -> {series: value}; label of the axis."""
    series = list(dict.fromkeys(name for values in groups.values() for name in values))
    for i, name in enumerate(series):
        places = [n + (i - (len(series) - 1) / 2) * 0.8 / len(series) for n in range(len(groups))]
        heights = [values.get(name) or 0 for values in groups.values()]
        drawn = axes.bar(places, heights, 0.8 / len(series), label=name)
        axes.bar_label(drawn, [f"{height:.3g}" if height else "" for height in heights], fontsize=7)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel(label)


def roofline(limits: dict[str, float], points: dict[str, list[tuple[float, float]]], axes: Any) -> None:
    """Speed over operations a byte of memory, below what the machine can do (Williams, Waterman and Patterson 2009).

    limits : of ceilings.py; points : series -> [(operations a byte, GFLOP/s)]
    """
    intensities = [intensity for series in points.values() for intensity, _ in series]
    edges = min(1.0, *intensities), max(intensities) * 2
    for number, precision in enumerate(name for name in ("fp32", "bf16") if name in limits):
        bend = limits[precision] / limits["copy"]
        speeds = [min(limits[precision], limits["copy"] * x) for x in (edges[0], bend, edges[1])]
        axes.plot((edges[0], bend, edges[1]), speeds, color="black", ls="-:"[number], label=f"ceiling {precision}")
    for (label, series), marker in zip(points.items(), "ox^", strict=True):
        if series:
            axes.plot(*zip(*series, strict=True), marker, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations a byte")
    axes.set_ylabel("GFLOP/s")
