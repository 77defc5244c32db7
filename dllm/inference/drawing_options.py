"""The options of commands that draw texts."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .. import cli
from ..errors import UserError

if TYPE_CHECKING:
    from ..data.tokenizers import Tokenizer
    from .generation import Sampling

SETTINGS = ("top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "best_of", "seed")


def add_drawing(parser: cli.Parser) -> None:
    """Add the options that say how tokens are drawn."""
    from .drawing import LEAST_REPETITION, MOST_PENALTY, MOST_REPETITION, MOST_TEXTS

    number, add = cli.at_least(0, float), parser.add_argument
    signed = cli.at_least(-MOST_PENALTY, float, MOST_PENALTY)
    add("--temperature", type=number, metavar="T", help="default: 0.8; with --source 0, always the most likely")
    add("--top-k", type=cli.at_least(0), metavar="K", help="among the K likeliest; 0: all")
    add("--top-p", type=number, metavar="P", help="among those that hold P")
    add("--min-p", type=number, metavar="P", help="among those at least P times as likely as the likeliest")
    add("--presence-penalty", type=signed, metavar="X", help="taken from the logits of tokens that were drawn")
    add("--frequency-penalty", type=signed, metavar="X", help="the same, for each time that they were drawn")
    add(
        "--repetition-penalty", type=cli.at_least(LEAST_REPETITION, float, MOST_REPETITION), metavar="X",
        help="above 1: less of what was drawn or is in the prompt (Keskar et al. 2019)",
    )  # fmt: skip
    add(
        "--logit-bias", action="append", metavar="TOKEN=X",
        help="added to the logit of a token, a number or its text; <unk>=0 lets <unk> be drawn; may be given again",
    )  # fmt: skip
    add("--best-of", type=cli.at_least(1, int, MOST_TEXTS), metavar="N", help="draw N texts, give the likeliest a token")
    add("--seed", type=cli.at_least(0), metavar="S", help="default: 1")


def check_drawing(parser: cli.Parser, options: argparse.Namespace) -> None:
    """Raise UserError where a probability is none."""
    for name in ("top_p", "min_p"):
        if (getattr(options, name) or 0) > 1:
            parser.error(f"argument --{name.replace('_', '-')}: it is a probability, at most 1")


def drawing_asked(options: argparse.Namespace) -> str:
    """The first option given that says how tokens are drawn; "": there is none."""
    if options.temperature:  # 0: the likeliest
        return "--temperature"
    names = (name for name in (*SETTINGS, "logit_bias") if getattr(options, name) is not None)
    return next((f"--{name.replace('_', '-')}" for name in names), "")


def sampling_of(options: argparse.Namespace, tokenizer: Tokenizer, temperature: float) -> Sampling:
    """How tokens are drawn, as far as the options say it. Raises UserError."""
    from .generation import Sampling

    given = {name: getattr(options, name) for name in SETTINGS if getattr(options, name) is not None}
    bias = dict(_bias(one, tokenizer) for one in options.logit_bias or ())
    return Sampling(temperature=temperature, logit_bias=tuple(bias.items()), **given)


def _bias(text: str, tokenizer: Tokenizer) -> tuple[int, float]:
    """A token and what is added to its logit, of TOKEN=X. Raises UserError."""
    from .drawing import MOST_BIAS, token_of

    name, _, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = float("nan")
    if not name or not -MOST_BIAS <= value <= MOST_BIAS:
        raise UserError(f"--logit-bias {text}: it takes TOKEN=X, with X from {-MOST_BIAS:g} to {MOST_BIAS:g}")
    if name.isascii() and name.isdigit():
        token = int(name) if len(name) < 10 else tokenizer.size
        if token >= tokenizer.size:
            raise UserError(f"--logit-bias {text}: tokens are numbers from 0 to {tokenizer.size - 1}")
        return token, value
    found = token_of(name, tokenizer)
    if found is None:
        raise UserError(f"--logit-bias {text}: {name!r} is not one token: give the number of a token")
    return found, value
