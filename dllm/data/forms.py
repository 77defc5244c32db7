"""What names files on the command line of `prepare`: an option for each form in which texts come, and each split."""

from __future__ import annotations

import argparse
from typing import Any

from ..config import path_of_rank
from . import source_names
from .checked_tokens import problem_of_label
from .label_files import LabelledFile

SPLITS = ("train", "valid", "test")
FORMS = ("text", "pairs", "tags", "classes", "class", "transcripts")
LABELLED = ("tags", "classes", "class", "transcripts")  # forms with labels
RECORDED = ("classes", "class", "transcripts")  # forms whose texts may be recordings


def option(form: str, split: str) -> str:
    """Names files of a split."""
    return f"--{split}" if form == "text" else f"--{form}" if split == "train" else f"--{split}-{form}"


def files_of(options: argparse.Namespace, form: str, split: str) -> list[Any]:
    """What an option for a split's files has been given."""
    found: list[Any] = getattr(options, option(form, split)[2:].replace("-", "_"))
    return found


def form_of(parser: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    """That of the files. Raises UserError where there are several, or options do not go with it."""
    given = [form for form in FORMS if files_of(options, form, "train") or (form == "text" and options.files_from)]
    if not given or len({form.removesuffix("es") for form in given}) > 1:
        parser.error("give either --train or --pairs, --tags, --classes, --class or --transcripts")
    form = given[-1]
    for other, split in ((other, split) for other in FORMS if other not in given for split in SPLITS[1:]):
        if files_of(options, other, split) and {form, other} != {"class", "classes"}:
            parser.error(f"{option(other, split)} goes with {option(other, 'train')}, which is not given")
    for name in ("field", "keep_bytes"):
        if form != "text" and getattr(options, name):
            parser.error(f"--{name.replace('_', '-')} goes with --train: {option(form, 'train')} reads lines of plain text")
    if options.longest and form == "text":
        parser.error("--longest goes with --pairs, --tags and --classes")
    if options.tag_column and form != "tags":
        parser.error("--tag-column goes with --tags")
    return form


def named_file(parser: argparse.ArgumentParser, form: str, word: Any) -> Any:
    """A word of a form's option, of labels with the label that it gives. Raises UserError."""
    if form == "class":
        label, sign, name = word.partition("=")
        if not (sign and name):
            parser.error(f"--class {word}: it takes LABEL=FILE")
        if problem := problem_of_label(label):
            parser.error(f"--class {word}: the label {problem}")
        return LabelledFile(name, label.strip(" \t"))
    return LabelledFile(word) if form in ("tags", "classes", "transcripts") else word


def named(words: list[Any], rank: int) -> list[Any]:
    """The names that words have on a rank: of sources, pairs of such, or LabelledFiles. Raises UserError."""
    if words and isinstance(words[0], LabelledFile):
        return [
            LabelledFile(name, word.label)
            for word in words
            for name in source_names.named([path_of_rank(str(word.file), rank)])
        ]
    if words and not isinstance(words[0], str):
        return [tuple(source_names.one(path_of_rank(word, rank)) for word in both) for both in words]
    return source_names.named(path_of_rank(word, rank) for word in words)
