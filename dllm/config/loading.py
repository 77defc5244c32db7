"""How a preset, a TOML file and --set become one Config, and what is wrong with them.

A preset sets some fields, a TOML file more, ``--set section.key=value`` wins. What a preset or a run says of one corpus, or of
its own length, does not outlive it (`lay_over`).
"""

import dataclasses
import difflib
import math
import pathlib
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import UserError, reason, shown
from ..files import storage
from .bounds import KINDS, LARGEST, RULES, choices_in_words, demand
from .sections import FIELDS, SECTIONS, Config, flat
from .together import check_said, check_together

PRESETS = pathlib.Path(__file__).parents[1] / "presets"
LONGEST_WORD = 4096  # characters of a setting that is a word, as many as a path has: all of them fit into storage.SMALL
# Strings and comments of TOML, where a dot means nothing, and a key of ten parts or more. One of n parts takes n^2 to read.
QUOTED = re.compile(
    r"'''.*?(?:'''|\Z)" r'|"""(?:\\.?|[^\\])*?(?:"""|\Z)' r"|'[^'\n]*+(?:'|\n|\Z)" r'|"(?:\\.|[^"\\\n])*+(?:"|\n|\\?\Z)'
    r"|#[^\n]*", re.DOTALL,
)  # fmt: skip  # an open string ends with its line, so each character is looked at once, whatever the text
MOST_SHOWN = 20  # keys of a section in a message
TEXTS = ("log.prompt",)  # settings that may have lines
LONG_KEY = re.compile(r"(?:\.[ \t]*[\w-]+[ \t]*){9}")


def resolve(
    preset: str = "default",
    file: str | pathlib.Path | None = None,
    settings: Iterable[str] = (),
    shape: Callable[[str | None], Mapping[str, Any]] | None = None,
) -> Config:
    """The Config of a preset, overlaid by a TOML file and by ``section.key=value`` strings. Raises UserError.

    shape : what of the section `model` a model to begin with decides, for a kind that is asked for; laid over the preset
    """
    below = load_toml(preset_path(preset))
    in_file, said = {} if file is None else load_toml(file), parse_settings(settings)
    of_run = _is_of_run(in_file)
    if shape is not None:
        kind = _get(merge(merge(below, in_file), said), "model", "kind")
        below = merge(below, {"model": shape(kind if isinstance(kind, str) else None)})
    if of_run:
        found = from_dict(lay_over(lay_over(below, in_file), said))
    else:
        found = from_dict(lay_over(below, merge(in_file, said)))
    check_said(found, said if of_run else merge(in_file, said))
    return found


def of_user(file: str | pathlib.Path | None, settings: Iterable[str]) -> dict[str, Any]:
    """What a user has said by a TOML file and by ``section.key=value`` strings: section -> key -> value. Raises UserError."""
    in_file, said = {} if file is None else load_toml(file), parse_settings(settings)
    return dict(said) if _is_of_run(in_file) else merge(in_file, said)


def _is_of_run(in_file: Mapping[str, Any]) -> bool:
    """Whether a file is that of a run, which has all settings and belongs to its corpus as a preset does."""
    return _get(in_file, "data", "path") is not None


def preset_names() -> list[str]:
    """What --preset takes."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def preset_path(name: str) -> pathlib.Path:
    """The TOML file of a preset. Raises UserError where there is none of that name."""
    if name not in preset_names():
        raise UserError(f"--preset {name}: there is none of that name; there are {', '.join(preset_names())}")
    return PRESETS / f"{name}.toml"


def load_toml(path: str | pathlib.Path) -> dict[str, Any]:
    """What a TOML file holds. Raises UserError."""
    try:
        return _parse(storage.read_text(path, what="the configuration "))
    except ValueError as error:
        raise UserError(f"cannot read the configuration {path}: {reason(error):.200}") from None


def _parse(text: str) -> dict[str, Any]:
    """What TOML says. Raises ValueError: also where nobody writes settings so, and reading them would take too long."""
    if len(text) > storage.SMALL:
        raise ValueError(f"more than {storage.SMALL >> 10} kB")
    if LONG_KEY.search(QUOTED.sub("_", text)):
        raise ValueError("a key of so many parts is no setting's")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of `above` laid over those of `below`."""
    merged = dict(below)
    for name, section in above.items():
        both = isinstance(section, dict) and isinstance(merged.get(name), dict)
        merged[name] = {**merged[name], **section} if both else section
    return merged


def lay_over(below: Mapping[str, Any], said: Mapping[str, Any], of_run: bool = False) -> dict[str, Any]:
    """What a user said, laid over the sections of a preset, or those of a run that goes on.

    A number of epochs, of a run a larger one, lifts a limit of steps that was set below. So does a corpus that takes the place
    of the embedded one, and with that the prompt of the sample goes, too.
    """
    merged = merge(below, said)
    moved = not _get(below, "data", "path") and bool(_get(merged, "data", "path"))
    epochs, before = (_get(sections, "train", "epochs") for sections in (said, below))
    longer = type(epochs) is int and (not of_run or type(before) is not int or epochs > before)
    lifted = {("train", "max_steps"): moved or longer, ("log", "prompt"): moved}
    for (section, key), gone in lifted.items():
        if gone and _get(said, section, key) is None and _get(merged, section, key) is not None:
            merged[section] = {name: value for name, value in merged[section].items() if name != key}
    return merged


def _get(sections: Mapping[str, Any], section: str, key: str) -> Any:
    """The value of section.key, None where there is none."""
    values = sections.get(section)
    return values.get(key) if isinstance(values, dict) else None


def parse_settings(settings: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Nested dict of ``section.key=value`` strings. A value is written as in TOML; a bare word is text. Raises UserError."""
    sections: dict[str, dict[str, Any]] = {}
    for text in settings:
        name, equals, written = text.partition("=")
        section, dot, key = name.strip().partition(".")
        if not (equals and dot and key):
            raise UserError(f"--set {text:.80}: write it as section.key=value, for example --set train.lr=0.01")
        try:
            value = _parse(f"value = {written}")["value"]
        except ValueError:
            value = written.strip()
        sections.setdefault(section, {})[key] = value
    return sections


def from_dict(sections: Mapping[str, Any]) -> Config:
    """A checked Config of nested dicts. Raises UserError that names the key, what it got and what would do."""
    parts = {}
    for section, values in sections.items():
        if section not in SECTIONS:
            raise UserError(f"unknown section '{section:.80}'{_suggest(section, list(SECTIONS))}")
        if not isinstance(values, dict):
            raise UserError(f"'{section}' is a section: write {section}.key = value")
        keys = [entry.name for entry in dataclasses.fields(SECTIONS[section])]
        for key in values:
            if key not in keys:
                raise UserError(f"unknown key '{section}.{key:.80}'{_suggest(key, keys, section + '.')}")
        parts[section] = SECTIONS[section](**{key: _typed(f"{section}.{key}", value) for key, value in values.items()})
    config = Config(**parts)
    _check(config)
    return config


def _suggest(name: str, known: list[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name[:80], known, n=1)
    if near:
        return f"; did you mean '{prefix}{near[0]}'?"
    shown = ", ".join(prefix + key for key in known[:MOST_SHOWN])
    return f"; there are {shown}" + (", ...: dllm train --settings shows all" if len(known) > MOST_SHOWN else "")


def _typed(name: str, value: Any) -> Any:
    kind = FIELDS[name].type
    if kind is float and type(value) is int:
        value = float(value) if abs(value) <= LARGEST else math.inf
    if type(value) is not kind:
        raise UserError(f"{name} = {shown(value)}: it takes {KINDS[kind]}")
    if isinstance(value, str):
        _check_word(name, value)
    return value


def _check_word(name: str, value: str) -> None:
    """Raise UserError where a word is none that a file or a screen can take."""
    if len(value) > LONGEST_WORD:
        raise UserError(f"{name} = {shown(value)}: it has {len(value):,} characters, at most {LONGEST_WORD:,} are taken")
    if name not in TEXTS and not value.isprintable():
        raise UserError(f"{name} = {shown(value)}: it must have printable characters alone")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise UserError(f"{name} = {shown(value)}: it must be UTF-8")


def _check(config: Config) -> None:
    for name, value in flat(config).items():
        _check_value(name, value)
    check_together(config)


def _check_value(name: str, value: Any) -> None:
    if (choices := FIELDS[name].metadata["choices"]) and value not in choices:
        raise UserError(f"{name} = {value!s:.60}: it is {choices_in_words(choices)}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if not abs(value) <= LARGEST:
        raise UserError(f"{name} = {shown(value)}: it must be a finite number of at most {LARGEST}")
    for rule, limit in FIELDS[name].metadata["bounds"].items():
        if not RULES[rule][1](value, limit) and value != FIELDS[name].metadata["also"]:
            raise UserError(f"{name} = {value}: it {demand(rule, limit)}")
