"""All settings with their effects, as a table: on the screen (`dllm train --settings`), and for the documentation."""

import json
import math
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .bounds import KINDS, choices_in_words, in_words
from .sections import FIELDS, SECTIONS, Config, flat

COLUMNS = (25, 16, 30)  # widths of name, value and bounds; the effect gets what is left of the line
LEAST = 30  # characters of that


class SettingRow(NamedTuple):
    """A setting as a line of the table."""

    name: str  # section.key
    kind: str  # such as "a whole number"
    value: str  # as TOML writes it
    bounds: str  # such as "at least 1" or "one of sgd, adam"; "": none beyond those of its kind
    doc: str  # its effect


def settings_table(config: Config, choices: Mapping[str, tuple[Any, ...]]) -> list[SettingRow]:
    """Every setting, with its value in a Config. choices : "section.key" -> what it may be, where that is known elsewhere."""
    values = flat(config)
    rows = []
    for name, entry in FIELDS.items():
        value = json.dumps(values[name], ensure_ascii=False)
        rows.append(SettingRow(name, KINDS[entry.type], value, bounds_of(name, choices), entry.metadata["doc"]))
    return rows


def bounds_of(name: str, choices: Mapping[str, tuple[Any, ...]]) -> str:
    """What "section.key" may be, in the words of the messages."""
    metadata = FIELDS[name].metadata
    if some := choices.get(name) or metadata["choices"]:
        return choices_in_words(some)
    words = [in_words(rule, limit) for rule, limit in metadata["bounds"].items() if math.isfinite(limit)]
    return " and ".join(words) + ("" if metadata["also"] is None else f", or {metadata['also']:g}")


def settings_text(rows: Iterable[SettingRow], width: int = 120) -> str:
    """The table for a screen of so many columns."""
    lines = []
    for row in [SettingRow("setting", "", "value", "it may be", "effect"), *rows]:
        bounds = row.bounds or row.kind
        cells = [
            textwrap.wrap(text, space, break_on_hyphens=False) or [""]
            for text, space in zip(
                (row.name, row.value, bounds, row.doc), (*COLUMNS, max(LEAST, width - sum(COLUMNS) - 3)), strict=True
            )
        ]
        for number in range(max(map(len, cells))):
            parts = [cell[number] if number < len(cell) else "" for cell in cells]
            padded = [f"{part:{space}}" for part, space in zip(parts, COLUMNS, strict=False)]
            lines.append(" ".join([*padded, parts[-1]]).rstrip())
    return "\n".join(lines)


def settings_markdown(rows: Iterable[SettingRow]) -> str:
    """The table as Markdown: a heading and a table for each section."""
    rows, lines = list(rows), []
    for section, kind in SECTIONS.items():
        lines += [f"## {section}", "", kind.__doc__ or "", ""]
        lines += ["| setting | default | it may be | effect |", "| --- | --- | --- | --- |"]
        for row in rows:
            if row.name.startswith(f"{section}."):
                cells = f"`{row.name}`", f"`{row.value}`", ", ".join(filter(None, (row.kind, row.bounds))), row.doc
                lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines)
