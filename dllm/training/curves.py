"""What metrics.jsonl says, and pictures of it: for loss.png of a run, for runs side by side, for a range of learning rates."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import pathlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import UserError, printable, reason
from ..files import storage
from ..kernels.types import Array

FONTS = ("Noto Sans CJK", "WenQuanYi", "IPAGothic", "Droid Sans Fallback")  # which have the letters of East Asia
Line = dict[str, Any]  # of metrics.jsonl
SCORES = {  # of a line beside its loss, as far as they are defined -> in words, and how they are written
    "perplexity": ("perplexity", "{:.2f}"), "bits_per_byte": ("bits per byte", "{:.3f}"), "accuracy": ("accuracy", "{:.2f} %"),
    "f1": ("F1", "{:.2f} %"), "wer": ("word error rate", "{:.2f} %"), "cer": ("letter error rate", "{:.2f} %"),
}  # fmt: skip


class Curve(NamedTuple):
    """A line of a picture."""

    label: str
    points: Sequence[tuple[float, float]]
    marked: bool = False  # few points, each of which counts
    colour: int = 0  # curves of one number have one colour


def read_lines(path: pathlib.Path) -> list[Line]:
    """The lines of a metrics.jsonl; one that a full disk or a crash cut short is left out. Raises UserError."""
    lines: list[Line] = []
    for text in storage.read_text(path, storage.LARGEST_METRICS).splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and is_number(line.get("loss")) and is_step(line.get("step")):
                lines.append(line)
    return lines


def is_number(value: Any) -> bool:
    """Whether a value out of a file is one that a run may have measured, which can be computed with."""
    return isinstance(value, float) or (type(value) is int and abs(value) <= 2**53)


def is_step(value: Any) -> bool:
    """Whether a value out of a file may count steps."""
    return type(value) is int and 0 <= value <= 2**53


def curves_of(runs: Mapping[str, Iterable[Line]]) -> list[Curve]:
    """The losses by step of runs, name -> lines: one of training and one of each split, in a colour for each run."""
    found = list[Curve]()
    for number, (name, lines) in enumerate(runs.items()):
        splits: dict[str, list[tuple[float, float]]] = {}
        for line in lines:
            splits.setdefault(str(line.get("split", "train")), []).append((line["step"], line["loss"]))
        for split, points in splits.items():
            label = f"{name} {split}" if len(runs) > 1 else split
            colour = number if len(runs) > 1 else len(found)
            found.append(Curve(printable(label), points, split != "train", colour))
    return found


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def check_picture(option: str, path: str | None) -> None:
    """Raise UserError where a picture that is asked for could not be drawn: before the work that it shows."""
    if path is None:
        return
    if not can_draw():
        raise UserError(f"{option} {path} needs matplotlib: pip install 'dllm[plot]'")
    try:
        _pyplot()
    except Exception as error:
        raise UserError(f"{option} {path} needs a matplotlib that works: {printable(reason(error))}") from None
    if pathlib.Path(path).suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"{option} {path}: its name must end with .png, .svg or .pdf")
    if not pathlib.Path(os.path.abspath(path)).parent.is_dir():
        raise UserError(f"{option} {path}: there is no folder {pathlib.Path(path).parent}")


def draw(curves: Sequence[Curve], title: str, x: str = "step", log: bool = False) -> Callable[..., None]:
    """A picture of losses, which needs matplotlib. Returns what writes it, once: write(path, format="png"); it raises OSError.

    x : what is measured there
    log : by powers of ten
    """
    figure, axes = _pyplot().subplots(figsize=(7, 4), layout="constrained")
    for curve in curves:
        marker, dashed = "o" if curve.marked else "", curve.marked and _shared(curve, curves)
        points = zip(*curve.points, strict=True)
        axes.plot(*points, label=_plain(curve.label), color=f"C{curve.colour % 10}", marker=marker, ls="--" if dashed else "-")
    axes.set(xlabel=x, ylabel="loss (nats)", title=_plain(title), xscale="log" if log else "linear")
    axes.grid(alpha=0.3)
    if curves:
        axes.legend()
    return functools.partial(_save, figure)


def draw_matrix(values: Array, rows: Sequence[str], columns: Sequence[str], title: str) -> Callable[..., None]:
    """A picture of numbers from 0 to 1 (rows,columns), with their names. Returns what writes it, as `draw` does."""
    size = [min(20.0, 2 + 0.3 * len(names)) for names in (columns, rows)]
    with _fonts():
        figure, axes = _pyplot().subplots(figsize=size, layout="constrained")
        axes.imshow(values, cmap="Greys", vmin=0, vmax=1, aspect="auto")
        names = [[_plain(printable(name.strip() or name)) for name in side] for side in (rows, columns)]
        axes.set_yticks(range(len(rows)), names[0])
        axes.set_xticks(range(len(columns)), names[1], rotation=90)
        axes.xaxis.tick_top()
        axes.set_title(_plain(title))
    return functools.partial(_save, figure)


@contextlib.contextmanager
def _fonts() -> Iterator[None]:
    """Text of any script, as far as this machine has letters for it, without a word on those that it lacks."""
    pyplot = _pyplot()
    from matplotlib import font_manager

    there = {font.name for font in font_manager.fontManager.ttflist}
    family = ["DejaVu Sans", *sorted(name for name in there if name.startswith(FONTS))]
    with pyplot.rc_context({"font.family": family}):
        yield


def write_whole(path: storage.Path, write: Callable[..., None]) -> None:
    """Make a picture of what `draw` has given, whole or not at all. Raises OSError."""
    with storage.atomic(path) as temporary:
        write(temporary, pathlib.Path(path).suffix[1:])


def write_picture(option: str, path: str, write: Callable[..., None]) -> None:
    """Make the picture that an option asks for, of what `draw` has given. Raises UserError."""
    try:
        write_whole(path, write)
    except OSError as error:
        raise UserError(f"cannot write {option} {path}: {reason(error)}") from None


def _save(figure: Any, path: pathlib.Path, form: str = "png") -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # a letter that no font here has is a box
            figure.savefig(path, dpi=120, format=form)
    finally:
        _pyplot().close(figure)


def _pyplot() -> Any:
    """The part of matplotlib that draws, without a screen. Raises whatever a broken one does."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _shared(curve: Curve, curves: Sequence[Curve]) -> bool:
    """Whether another curve has its colour."""
    return sum(other.colour == curve.colour for other in curves) > 1


def _plain(text: str) -> str:
    """For matplotlib, to which a dollar means a formula."""
    return text.replace("$", r"\$")
