"""Continue a text, or answer sources, with a trained model: python -m dllm.generate MODEL --prompt "..."."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from . import cli
from .comm import runtime
from .errors import DONE, UserError
from .files import telling

if TYPE_CHECKING:
    from mpi4py import MPI

    from .data.tokenizers import Tokenizer
    from .inference.loaded_model import LoadedModel
    from .kernels.types import Array

EPILOG = """
examples
  python -m dllm.generate MODEL --prompt "def main(" --tokens 500
  python -m dllm.generate MODEL --temperature 0                    always the most likely token
  python -m dllm.generate MODEL --beam 8 --tokens 30               the likeliest text that a search finds
  python -m dllm.generate MODEL --top-p 0.9 --seed 7 --json        one JSON line with prompt, text and tokens
  python -m dllm.generate MODEL --temperature 0 --repetition-penalty 1.2       without going round in circles
  python -m dllm.generate MODEL --logit-bias "<unk>=0"              words that are not in the vocabulary may come as <unk>
  python -m dllm.generate MODEL --source "en 4071"                 the target, of a model of pairs
  python -m dllm.generate MODEL --source "ein Hund" --attention a.png        and a picture of what it looked at
  mpirun -n 8 python -m dllm.generate MODEL --source-file news.en --out news.de --beam 5
  python -m dllm.generate MODEL --source-file - --beam 5 --n-best 5          of standard input, five targets a line
  python -m dllm.generate MODEL --out x.wav --tokens 16000          of a model of sound: so many samples
  python -m dllm.generate MODEL --precision int8                   as dllm.serve --precision int8 would continue it

--source-file answers line i of a file in line i of --out, or of standard output; an empty line stays one. With --n-best, or
--json, every target is a line of its own, a JSON object {"line", "text", "score", "logprob"}, the best of a source first. The
score is log P / ((5 + n) / 6)^A of n tokens, plus the coverage penalty (Wu et al. 2016). <unk> is never said, or becomes the
word of the source which the model looked at most: --unknown source, the default of models that copy (model.copy).
"""
TOGETHER = 32  # sources of a batch; what comes out does not depend on it


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""
    words = sys.argv[1:] if argv is None else argv
    if any(word.partition("=")[0] == "--source-file" for word in words):
        return cli.collective(answer_file, argv, product=True)
    return cli.run(generate, argv, product=True)


def generate(argv: list[str]) -> int:
    """Print what follows a prompt or a source, token by token or as JSON."""
    options = _options(argv)

    from .data.tokenizer import is_behind_word
    from .inference.drawing_options import drawing_asked, sampling_of
    from .inference.generation import Sampling, continuation, decode
    from .inference.loaded_model import LoadedModel
    from .inference.search_options import check_attention
    from .model.precision import described
    from .training.curves import check_picture

    model = LoadedModel.open(options.model, options.checkpoint == "best")
    for warning in model.warnings:
        print(f"dllm: {warning}", file=sys.stderr)
    if options.precision != "fp32":
        print(f"dllm: {described(options.precision, model.dtype)}", file=sys.stderr)
    check_attention(model, options.model, {"--coverage": options.coverage, "--attention": options.attention})
    check_picture("--attention", options.attention)
    if model.tokenizer.rate or options.out:
        return _sound(options, model)
    text_tokens, temperature = _tokens(options, model.tokenizer), options.temperature
    if temperature is None:
        temperature = Sampling.temperature if options.source is None else 0
    sampling = sampling_of(options, model.tokenizer, temperature)
    if model.config.kind == "seq2seq" and (drawing := drawing_asked(options)):
        raise UserError(f"{options.model} searches for targets, and draws none: leave out {drawing}, or give --beam")

    def show(text: str) -> None:
        if not options.json:
            print(text, end="", flush=True)

    # With --beam all of it, which may fail:
    found = continuation(model, text_tokens, options.tokens or 200, sampling, options.search, options.precision)
    show(options.prompt)
    text, tokens = "", []
    for token, piece in decode(model.tokenizer, found, is_behind_word(options.prompt)):
        if telling.has_no_reader():
            break
        show(piece)
        text += piece
        tokens += [] if token is None else [token]
    show("\n")
    if options.json:
        given = {"prompt": options.prompt} if options.source is None else {"source": options.source}
        print(json.dumps({**given, "text": text, "tokens": tokens}, ensure_ascii=not telling.has_all_letters()))
    if options.attention:
        _draw_attention(options.attention, model, text_tokens, tokens)
    return DONE


def answer_file(argv: list[str], comm: MPI.Comm) -> int:
    """Answer the lines of a file. Collective."""
    with runtime.together(comm):
        options = _options(argv, comm.rank)
    runtime.check_same(comm, vars(options))

    from .comm.node_info import find_node, leader_first
    from .inference import source_files
    from .inference.answering import Answering, warm_up
    from .inference.loaded_model import LoadedModel
    from .inference.search_options import check_attention
    from .kernels.team import Team
    from .runs.gathering import gather_run

    node, say = find_node(comm), cli.warn_once(comm)
    with runtime.together(comm):
        if comm.rank == 0:
            source_files.check_place("--out", options.out)
    gather_run(comm, options.model, say, options.checkpoint == "best")
    model = runtime.agree(comm, LoadedModel.open, options.model, options.checkpoint == "best")
    runtime.check_same(comm, {"model": model.fingerprint})
    for warning in model.warnings:
        say(warning)
    replace = options.unknown == "source" or (options.unknown is None and model.config.copy)
    window, whole = model.window, model.config.kind != "seq2seq"
    with runtime.together(comm):
        if not model.tokenizer.pairs:
            raise UserError(f"{options.model} was not trained on pairs: give --prompt")
        check_attention(model, options.model, {"--coverage": options.coverage, "--unknown source": replace})
    lines = source_files.read_lines(comm, options.source_file)
    name = source_files.INPUT if options.source_file == "-" else options.source_file
    how = Answering(
        tokenizer=model.tokenizer, lanes=TOGETHER, limit=options.tokens or window, beam=options.search,
        precision=options.precision, replace=replace,
    )  # fmt: skip
    sources = runtime.agree(comm, source_files.tokens_of, model.tokenizer, lines, name, 0 if whole else window, say)
    with leader_first(node):
        warm_up(model, how)
    trained = runtime.agree(comm, model.network, window, TOGETHER, Team(node.threads))
    targets = source_files.translate(comm, trained, how, lines, sources, say)
    with runtime.together(comm):
        if comm.rank == 0:
            as_json = options.json or options.n_best > 1
            text = source_files.as_lines(targets, as_json, not (options.out or telling.has_all_letters()))
            if options.out:
                source_files.write("--out", options.out, text)
            else:
                print(text, end="", flush=True)
    runtime.finish(comm)
    return DONE


def _options(argv: list[str], rank: int = 0) -> argparse.Namespace:
    from .inference.drawing_options import add_drawing, check_drawing, drawing_asked
    from .inference.search_options import add_search, beam_of

    parser = cli.Parser("generate", __doc__, EPILOG, rank)
    whole = cli.at_least(1)
    parser.add_argument("model", metavar="MODEL", help="folder of a run, or of a model made by dllm export; or ipfs://CID")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="what to continue (default: the start of a line)")
    parser.add_argument("--source", metavar="TEXT", help="of a model of pairs: print its target")
    parser.add_argument("--source-file", metavar="F", help="of a model of pairs: the target of every line; -: standard input")
    parser.add_argument("--out", metavar="F", help="with --source-file: where the targets go; of a model of sound: a WAV file")
    parser.add_argument(
        "--tokens", type=whole, metavar="N", help="at most (default: 200; with --source-file the window of training)"
    )
    add_drawing(parser)
    add_search(parser, "draw nothing, ")
    parser.add_argument("--n-best", type=whole, metavar="N", help="with --source-file: so many targets a line, as JSON")
    parser.add_argument("--unknown", choices=("never", "source"), help="with --source-file: what <unk> becomes")
    parser.add_argument("--attention", metavar="F", help="with --source: draw what each token looked at (.png, .svg, .pdf)")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="of a run; default: best")
    cli.add_precision(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of streaming text")
    options = parser.parse_args(argv)
    if (options.source is not None) + bool(options.prompt) + (options.source_file is not None) > 1:
        parser.error("give either --prompt or --source" + " or --source-file" * (options.source_file is not None))
    for name in ("n_best", "unknown", "attention"):
        needed = "source" if name == "attention" else "source_file"
        if getattr(options, name) is not None and getattr(options, needed) is None:
            parser.error(f"--{name.replace('_', '-')} goes with --{needed.replace('_', '-')}")
    check_drawing(parser, options)
    for name in ("source_file", "beam"):
        if getattr(options, name) is not None and (drawing := drawing_asked(options)):
            parser.error(f"--{name.replace('_', '-')} takes the likeliest texts and draws none: leave out {drawing}")
    options.n_best = options.n_best or 1
    options.search = beam_of(parser, options, options.n_best, options.source_file is not None)
    return options


def _tokens(options: argparse.Namespace, tokenizer: Tokenizer) -> Array:
    """Token numbers that the model reads before it says anything. Raises UserError."""
    from .inference.generation import source_tokens, start_tokens

    if tokenizer.pairs != (options.source is not None):
        raise UserError(
            f"{options.model} was trained on pairs: give --source" if tokenizer.pairs
            else f"{options.model} was not trained on pairs: give --prompt"
        )  # fmt: skip
    return start_tokens(tokenizer, options.prompt) if options.source is None else source_tokens(tokenizer, options.source)


def _sound(options: argparse.Namespace, model: LoadedModel) -> int:
    """Write what a model of sound continues. Raises UserError."""
    from .inference.drawing_options import sampling_of
    from .inference.speech import write_sound

    if model.tokenizer.bands:
        raise UserError(
            f"{options.model} continues nothing; python -m dllm.predict {options.model} FILE.wav says what it hears"
        )
    if not model.tokenizer.rate or options.source is not None:
        raise UserError("--out goes with --source-file, or with a model of sound")
    if not options.out or options.prompt or options.search or options.json:
        raise UserError(f"{options.model} is a model of sound: give --out FILE.wav, and no --prompt, --beam or --json")
    temperature = 1.0 if options.temperature is None else options.temperature
    sampling = sampling_of(options, model.tokenizer, temperature)
    write_sound(model, options.out, options.tokens or 0, sampling, options.precision)
    return DONE


def _draw_attention(path: str, model: LoadedModel, source: Array, target: list[int]) -> None:
    """Make the picture of what each token of a target looked at."""
    from .inference.answering import alignment, as_text
    from .training.curves import draw_matrix, write_picture

    weights = alignment(model.network(len(source), 1), model.tokenizer, source, target)
    rows, columns = ([as_text(model.tokenizer, [token]) for token in side] for side in (target, source))
    write_picture("--attention", path, draw_matrix(weights, [*rows, "<end>"], columns, "what each token looked at"))


if __name__ == "__main__":
    sys.exit(main())
