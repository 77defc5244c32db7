"""Where the names of labels come from. In a wrong column they are the text itself, so private ones are not told unasked.

a public list     that of --labels, or what --class calls its files   nothing travels but a hash
the train text    of all ranks: --share-labels, or text of all ranks  its names go to rank 0, and from there to all
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from ..comm import messages
from ..comm.runtime import check_same, together
from ..config import path_of_rank
from ..errors import UserError
from ..files import storage
from . import vocabulary
from .checked_tokens import LONGEST_LABEL, MOST_LABELS, problem_of_label, problem_of_letter
from .forms import LABELLED
from .lines import plain_lines

if TYPE_CHECKING:
    from mpi4py import MPI

MOST_SHARED, LONGEST_SHARED = 256, 64  # names of private text, and characters of one: more than that are no labels


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Raises UserError where labels of private text would be told and nobody has said so."""
    labelled = options.form in LABELLED
    if options.labels is not None and not labelled:
        parser.error("--labels goes with --tags, --classes, --class or --transcripts")
    if options.labels == "":
        parser.error("--labels names no labels")
    if options.share_labels:
        if not (labelled and options.alone):
            parser.error("--share-labels is for labels of private text, with {rank} in --out")
        if options.labels:
            parser.error(
                "give either --labels or --share-labels: one is a list that all may know, the other tells what there is"
            )
        if options.epsilon:
            parser.error("--epsilon promises that little is told of a text, and --share-labels tells its labels: give --labels")
    elif labelled and options.alone and not (options.labels or _of_class_files(options)):
        raise UserError(
            "labels tell of private text, in a wrong column all of it: give those that all may know by --labels A,B,C or "
            "--labels FILE (one a line); --share-labels tells the names of all labels to all ranks"
        )


def public_names(options: argparse.Namespace, rank: int) -> tuple[str, ...]:
    """Those that the command line gives; (): none, and the train text has them. Raises UserError, which quotes no file.

    Of transcripts they are the letters of what is given, and the space between words.
    """
    word = options.labels
    if not word:
        return _of_classes(options)
    if "," in word:
        found, places = word.split(","), [f"--labels {word}"]
    else:
        path = path_of_rank(word, rank)
        lines = plain_lines(storage.read_text(path, storage.LARGEST_LIST, "the labels in "))
        found = [line for line in lines if line.strip(" \t")]
        places = [f"{path} line {number}" for number, line in enumerate(lines, 1) if line.strip(" \t")]
    problem_of: Callable[[str], str]
    if options.form == "transcripts":
        found, problem_of, what = [*" ".join(found), " "], problem_of_letter, "a letter that "
        places = places[:1]
    else:
        found, problem_of, what = [name.strip(" \t") for name in found], problem_of_label, "a label that "
    for number, name in enumerate(found):
        if problem := problem_of(name):
            raise UserError(f"{places[min(number, len(places) - 1)]} has {what}{problem}")
    names = tuple(sorted({*found}))
    if not 2 <= len(names) <= MOST_LABELS:
        raise UserError(
            f"--labels gives {len(names):,} names: 2 to {MOST_LABELS:,} are labels, with commas or in a file a line each"
        )
    return names


def _of_classes(options: argparse.Namespace) -> tuple[str, ...]:
    """The names of --class where private text has no others, and its user does not share them."""
    if options.share_labels or not options.alone or not _of_class_files(options):
        return ()
    return tuple(sorted({word.partition("=")[0].strip(" \t") for word in getattr(options, "class")}))


def _of_class_files(options: argparse.Namespace) -> bool:
    """Whether the command line names the class of each train text."""
    return options.form == "class" and not options.classes


def same_names(comm: MPI.Comm, names: Sequence[str]) -> list[str]:
    """A public list, the same on all ranks. Collective. Raises UserError on all ranks, which quotes none of them."""
    check_same(comm, {"labels (the sha256 of their names)": hash_of(names)})
    return [*names]


def shared_names(comm: MPI.Comm, mine: Collection[str], private: bool, letters: bool) -> list[str]:
    """Those of the train text of all ranks, in order. Collective. Raises UserError on all ranks.

    mine : of this rank's part. Which are there goes to rank 0, how often does not
    letters : of transcripts; of a private text there may be more of them than of other labels
    """
    with together(comm):
        _check(mine, private, letters)
    merged = vocabulary.merge(comm, dict.fromkeys(mine, 1))
    names = messages.broadcast(comm, sorted(merged), list[str])
    if len(names) < 2:
        raise UserError.of_all(f"the train text has {'one label' if names else 'no labels'}: there is nothing to learn")
    with together(comm):
        _check(names, private, letters)
    return names


def _check(names: Collection[str], private: bool, letters: bool) -> None:
    """Raise UserError where these are too many to be labels, or too long to be told."""
    most = MOST_SHARED if private and not letters else MOST_LABELS
    longest = LONGEST_SHARED if private else LONGEST_LABEL
    more = ", of private text" + "; --labels gives a list of them" * (not letters) if private else ""
    if len(names) > most:
        raise UserError(f"the train text has {len(names):,} labels, and {most:,} are the most{more}: is it the right column?")
    if any(len(name) > longest for name in names):
        raise UserError(
            f"the train text has a label of more than {longest} characters, the most{more}: is it the right column?"
        )


def hash_of(names: Sequence[str]) -> str:
    """Tells lists of labels apart; "none": there are no labels."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16] if names else "none"
