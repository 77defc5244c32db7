"""Continue a text with a trained model: python -m dllm.generate MODEL --prompt "..."."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from . import cli
from .errors import DONE, UserError
from .files import telling

if TYPE_CHECKING:
    from .data.tokenizers import Tokenizer
    from .kernels.types import Array

EPILOG = """
examples
  python -m dllm.generate MODEL --prompt "def main(" --tokens 500
  python -m dllm.generate MODEL --temperature 0                    always the most likely token
  python -m dllm.generate MODEL --beams 8 --tokens 30              the likeliest text that a search finds
  python -m dllm.generate MODEL --top-p 0.9 --seed 7 --json        one JSON line with prompt, text and tokens
  python -m dllm.generate MODEL --source "en 4071"                 the target, of a model of pairs
  python -m dllm.generate MODEL --precision int8                   as dllm.serve --precision int8 would continue it
"""


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""
    return cli.run(generate, argv, product=True)


def generate(argv: list[str]) -> int:
    """Print what follows a prompt or a source, token by token or as JSON."""
    options = _options(argv)

    from .inference.generation import Sampling, continuation, decode
    from .inference.loaded_model import LoadedModel
    from .model.precision import described

    model = LoadedModel.open(options.model, options.checkpoint == "best")
    for warning in model.warnings:
        print(f"dllm: {warning}", file=sys.stderr)
    if options.precision != "fp32":
        print(f"dllm: {described(options.precision, model.dtype)}", file=sys.stderr)
    prompt, temperature = _prompt(options, model.tokenizer), options.temperature
    if temperature is None:
        temperature = Sampling.temperature if options.source is None else 0
    sampling = Sampling(temperature=temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed)

    def show(text: str) -> None:
        if not options.json:
            print(text, end="", flush=True)

    # With --beams all of it, which may fail:
    found = continuation(model, prompt, options.tokens, sampling, options.beams, options.precision)
    show(options.prompt)
    text, tokens = "", []
    for token, piece in decode(model.tokenizer, found):
        if telling.has_no_reader():
            break
        show(piece)
        text += piece
        tokens += [] if token is None else [token]
    show("\n")
    if options.json:
        given = {"prompt": options.prompt} if options.source is None else {"source": options.source}
        print(json.dumps({**given, "text": text, "tokens": tokens}, ensure_ascii=not telling.has_all_letters()))
    return DONE


def _options(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser("generate", __doc__, EPILOG)
    parser.add_argument("model", metavar="MODEL", help="folder of a run, or of a model made by dllm export; or ipfs://CID")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="what to continue (default: the start of a line)")
    parser.add_argument("--source", metavar="TEXT", help="of a model of pairs: print its target")
    parser.add_argument("--tokens", type=cli.at_least(1), default=200, metavar="N", help="at most (default: 200)")
    parser.add_argument(
        "--temperature", type=cli.at_least(0, float), metavar="T", help="default: 0.8; with --source 0, always the most likely"
    )
    parser.add_argument("--top-k", type=cli.at_least(0), default=0, metavar="K", help="among the K likeliest; 0: all")
    parser.add_argument("--top-p", type=cli.at_least(0, float), default=1.0, metavar="P", help="among those that hold P")
    parser.add_argument(
        "--beams", type=cli.at_least(1), metavar="N", help="no drawing: search for the likeliest text, N kept at each token"
    )
    parser.add_argument("--seed", type=cli.at_least(0), default=1, metavar="S", help="default: 1")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="of a run; default: best")
    cli.add_precision(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON line at the end instead of streaming")
    options = parser.parse_args(argv)
    if options.source is not None and options.prompt:
        parser.error("give either --prompt or --source")
    if options.top_p > 1:
        parser.error("argument --top-p: it is a probability, at most 1")
    return options


def _prompt(options: argparse.Namespace, tokenizer: Tokenizer) -> Array:
    """Token numbers that the model reads before it says anything. Raises UserError."""
    from .inference.generation import source_prompt, start_tokens

    if tokenizer.pairs != (options.source is not None):
        raise UserError(
            f"{options.model} was trained on pairs: give --source" if tokenizer.pairs
            else f"{options.model} was not trained on pairs: give --prompt"
        )  # fmt: skip
    if options.source is None:
        return start_tokens(tokenizer, options.prompt)
    return source_prompt(tokenizer, options.source)


if __name__ == "__main__":
    sys.exit(main())
