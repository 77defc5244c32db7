"""Runs side by side: settings that differ, results, and curves of their losses in one picture: dllm compare RUN..."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from .. import cli
from ..errors import DONE, UserError, printable
from ..remote.locate import local_copy
from ..training.curves import SCORES, check_picture, curves_of, draw, read_lines, write_picture
from .facts import Facts, as_json, look

EPILOG = """
examples
  dllm compare runs/a runs/b runs/c                  a table: what differs between them, and what came out
  dllm compare runs/* --plot losses.png              and their losses by step in one picture
  dllm compare runs/a runs/b --json                  for scripts

A run that goes on is compared as far as it is. The best of a row of results has a star. Of settings only those are shown that
differ; where a run's corpus has another vocabulary, compare bits per byte, not perplexity or loss. Of a model that hears
tokens/s counts frames.
"""
LONGEST = 24  # characters of a cell
RESULTS = {  # a row of the table -> whether the highest (True), the lowest (False) or none (None) is best
    "state": None, "steps": None, "epoch": None, "parameters": None, "vocabulary": None, "ranks": None,
    "best valid loss": False, "best valid perplexity": False, "bits per byte": False, "accuracy": True, "F1": True,
    "word error rate": False, "letter error rate": False, "at step": None, "last train loss": False, "tokens/s": True,
    "wall seconds": None,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""
    return cli.run(compare, argv, product=True)


def compare(argv: list[str]) -> int:
    """Print how runs differ. Raises UserError."""
    parser = cli.Parser("tools.compare", __doc__, EPILOG)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders of runs; or ipfs://CID, swarm://REFERENCE")
    parser.add_argument("--plot", metavar="FILE.png", help="also draw the losses of all runs; needs pip install 'dllm[plot]'")
    parser.add_argument("--json", action="store_true", help="one JSON object: runs, settings and results by run")
    options = parser.parse_args(argv)
    check_picture("--plot", options.plot)
    paths = list(dict.fromkeys(options.runs))
    folders = [local_copy(path) for path in paths]
    facts = [look(path, folder) for path, folder in zip(paths, folders, strict=True)]
    for one in facts:
        if one["kind"] != "run":
            raise UserError(f"{one['path']} is the folder of a {one['kind']}: runs are compared")
    names, settings = short_names(paths), differing(facts)
    results = {row: [_results(one)[row] for one in facts] for row in RESULTS}
    if options.plot:
        lines = {name: read_lines(folder / "metrics.jsonl") for name, folder in zip(names, folders, strict=True)}
        write_picture("--plot", options.plot, draw(curves_of(lines), "losses"))
    if options.json:
        print(json.dumps(as_json({"runs": paths, "settings": settings, "results": results})))
        return DONE
    rows = [("", names), *((name, [_said(value) for value in values]) for name, values in settings.items())]
    rows += [("", [""] * len(names))] * bool(settings)
    rows += [(name, _starred(values, RESULTS[name])) for name, values in results.items() if set(values) != {None}]
    print("\n".join(_table(rows)))
    if options.plot:
        print(printable(f"plot: {options.plot}"))
    return DONE


def differing(facts: Sequence[Facts]) -> dict[str, list[Any]]:
    """ "section.key" -> value of each run, of those that are not the same in all."""
    first = facts[0]["settings"]
    table = {name: [one["settings"][name] for one in facts] for name in first}
    return {name: values for name, values in table.items() if any(value != values[0] for value in values)}


def short_names(paths: Sequence[str]) -> list[str]:
    """Names that tell the runs apart: those of their folders, where these differ."""
    names = [os.path.basename(os.path.abspath(path)) for path in paths]
    return names if len(set(names)) == len(names) else [path.rstrip("/") for path in paths]


def _results(facts: Facts) -> dict[str, Any]:
    best = facts["best"] or {}
    values = (
        facts["state"], facts["step"], facts["epoch"], facts["parameters"], facts["vocabulary"], facts["ranks"],
        best.get("loss"), *(best.get(name) for name in SCORES), best.get("step"), facts["last_loss"],
        facts["tokens_per_second"], facts["wall_seconds"],
    )  # fmt: skip
    return dict(zip(RESULTS, values, strict=True))


def _starred(values: Sequence[Any], highest: bool | None) -> list[str]:
    """As text, with a star behind the best where several runs have one and they differ."""
    there = [value for value in values if value is not None]
    star = None if highest is None or len(set(there)) < 2 else (max if highest else min)(there)
    return [_said(value) + ("*" if star is not None and value == star else "") for value in values]


def _said(value: Any) -> str:
    """A value as a cell of the table."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e12 else f"{value:.5g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return json.dumps(value) if isinstance(value, bool) or value == "" else str(value)


def _table(rows: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """Lines of columns that are as wide as they need to be; of a long cell its end is shown, in which paths differ."""
    cells = [[printable(cell) for cell in (name, *values)] for name, values in rows]
    cells = [[name, *(one if len(one) <= LONGEST else f"...{one[3 - LONGEST :]}" for one in rest)] for name, *rest in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


if __name__ == "__main__":
    sys.exit(main())
