"""The options of commands that search for texts, the same everywhere."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .. import cli
from ..errors import UserError
from .search import Beam

if TYPE_CHECKING:
    from .loaded_model import LoadedModel


def add_search(parser: cli.Parser, what: str = "") -> None:
    """Add --beam and what goes with it. what : when they count, for the help"""
    whole, number, add = cli.at_least(1), cli.at_least(0, float), parser.add_argument
    add("--beam", type=whole, metavar="K", help=f"{what}search for the likeliest texts, K kept at each token")
    add("--length-penalty", type=number, metavar="A", help="of a search: larger ones prefer longer texts; default: 1")
    add("--coverage", type=number, metavar="B", help="of a search: larger ones prefer texts that attend to all of the source")
    add("--min-tokens", type=cli.at_least(0), metavar="N", help="of a search: texts have N tokens at least")


def beam_of(parser: cli.Parser, options: argparse.Namespace, best: int = 1, always: bool = False) -> Beam | None:
    """What the options ask for, with as many wanted texts; None: no search, where not `always`. Raises UserError."""
    given = {"width": options.beam, "length_penalty": options.length_penalty, "coverage": options.coverage}
    given = {name: value for name, value in (given | {"least": options.min_tokens}).items() if value is not None}
    if options.beam is None and not always:
        if given:
            parser.error("--length-penalty, --coverage and --min-tokens go with --beam")
        return None
    if best > (options.beam or 1):
        parser.error(f"--n-best {best} takes --beam {best} at least")
    return Beam(best=best, **given)


def check_attention(model: LoadedModel, name: str, options: dict[str, object]) -> None:
    """Raise UserError where an option, name -> value, needs attention and the model has none. name : what users call it"""
    asked = [option for option, value in options.items() if value]
    if asked and model.config.kind != "seq2seq":
        raise UserError(f"{asked[0]} needs attention, which {name} has not: dllm train --preset seq2seq makes such models")
