"""Tables on the screen, and the same as JSON and as a picture."""

import datetime
import json
import os
import pathlib
import platform
import statistics
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias


def hardware() -> str:
    """One line that names the machine."""
    cpu = pathlib.Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, Python {platform.python_version()}"


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

    columns : (name, width) each
    """

    def __init__(self, title: str, columns: Sequence[tuple[str, int]]) -> None:
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
    content = {"title": table.title, "hardware": hardware(), "time": now, "table": table.rows, "measured": data}
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
