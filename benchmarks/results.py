"""Tables on the screen, and the same as JSON and as a picture."""

import datetime
import json
import os
import pathlib
import platform
import statistics


def hardware():
    """One line that names the machine."""
    cpu = pathlib.Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, Python {platform.python_version()}"


def middle(values):
    """The median of what was measured, None of nothing."""
    return statistics.median(values) if values else None


def spread(values, digits=1):
    """Median (least - most) of what was measured."""
    if not values:
        return "-"
    return f"{middle(values):.{digits}f} ({min(values):.{digits}f} - {max(values):.{digits}f})"


def ratio(one, other):
    """How many times `other` goes into `one`, as text; of medians."""
    return f"{middle(one) / middle(other):.2f} x" if one and other else "-"


class Table:
    """Rows that are shown as they come.

    columns : (name, width) each
    """

    def __init__(self, title, columns):
        self.title, self.columns, self.rows = title, columns, []
        print(f"\n{title}\n")
        print("".join(f"{name:>{width}}" if i else f"{name:{width}}" for i, (name, width) in enumerate(columns)), flush=True)

    def row(self, *cells):
        self.rows.append(dict(zip((name for name, _ in self.columns), cells, strict=True)))
        widths = [width for _, width in self.columns]
        pairs = enumerate(zip(cells, widths, strict=True))
        print("".join(f"{cell:>{width}}" if i else f"{cell:{width}}" for i, (cell, width) in pairs), flush=True)


def save(folder, command, table, data, bars=None):
    """Write `command`.json and, where matplotlib is there, `command`.png into a folder. Returns the paths.

    data : what was measured, as it was measured
    bars : (label of the axis, name -> {series: value}), for the picture
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{command}.json"]
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    content = {"title": table.title, "hardware": hardware(), "time": now, "table": table.rows, "measured": data}
    paths[0].write_text(json.dumps(content, indent=1) + "\n")
    if bars and draw(folder / f"{command}.png", table.title, *bars):
        paths.append(folder / f"{command}.png")
    return paths


def draw(path, title, label, groups):
    """A picture of bars in groups. False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("agg")
    from matplotlib import pyplot

    series = list(dict.fromkeys(name for values in groups.values() for name in values))
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for i, name in enumerate(series):
        places = [n + (i - (len(series) - 1) / 2) * 0.8 / len(series) for n in range(len(groups))]
        heights = [values.get(name) or 0 for values in groups.values()]
        bars = axes.bar(places, heights, 0.8 / len(series), label=name)
        axes.bar_label(bars, [f"{height:.3g}" if height else "" for height in heights], fontsize=7)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel(label)
    axes.set_title(f"{title}\n{hardware()}", fontsize=9)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
