"""Measure a trained model on a split: mpirun -n N python -m dllm.evaluate MODEL. The last line is JSON."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from . import cli
from .comm import runtime
from .comm.node_info import NodeInfo, find_node, leader_first
from .config import is_private
from .errors import DONE, UserError, printable

if TYPE_CHECKING:
    from mpi4py import MPI

    from .inference.loaded_model import LoadedModel

EPILOG = """
examples
  python -m dllm.evaluate RUN
  mpirun -n 8 python -m dllm.evaluate RUN --split valid --checkpoint last
  python -m dllm.evaluate MODEL --data DIR          a model folder, or a run on another corpus of the same vocabulary
  python -m dllm.evaluate MODEL --precision int8    perplexity of what dllm.serve --precision int8 gives, and that of fp32
  mpirun -n 8 python -m dllm.evaluate MODEL --pairs                        exact match, BLEU, chrF and ROUGE of the test split
  python -m dllm.evaluate MODEL --pairs news.en news.de --write out.de     the same of other files; what the model says
  python -m dllm.evaluate MODEL --pairs --beam 5                           by a search

The loss is in nats a token; perplexity is its exponential. State is carried over the whole split, in as many lanes as
train.eval_lanes of the run says (--lanes changes it; 1 reads the split from end to end). With --precision bf16 or int8 it is
that of the products that dllm.serve and dllm.generate take with it, and perplexity_fp32 stands beside it.

Of a tagger and a classifier the loss is in nats a label, without perplexity. There are accuracy and macro_f1, in per cent, and
confusion: rows are true, columns said. Of text of sound it is in nats a letter, with wer and cer, the error rates. Of tags
that name spans (B-PER, I-PER, O) there are precision, recall and f1 of conlleval. --plot needs pip install 'dllm[plot]'.

--pairs is for models of pairs: the likeliest target of every source, each alone, compared with the target that belongs to it,
of the split or of two files. exact_match, bleu, chrf and rougeL are in per cent; the loss is that of targets with their end.
It needs pip install 'dllm[tasks]'. BLEU counts words, which --bleu-tokenize cuts as sacrebleu does: 13a where spaces stand
between words, zh for Chinese, ja-mecab and ko-mecab for Japanese and Korean, char for any other. A score that is not defined
is null, and bleu_reason or the like says why. bleu_signature is what to quote with the figure.
"""


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""
    return cli.collective(evaluate, argv, product=True)


def evaluate(argv: list[str], comm: MPI.Comm) -> int:
    """Measure a model on a split, or on pairs. Collective."""
    with runtime.together(comm):
        options = _options(argv, comm.rank)
    runtime.check_same(comm, vars(options))
    node = find_node(comm)

    from .inference.loaded_model import LoadedModel
    from .model.precision import described
    from .runs.gathering import gather_run

    gather_run(comm, options.model, cli.warn_once(comm), options.checkpoint == "best")
    model = runtime.agree(comm, LoadedModel.open, options.model, options.checkpoint == "best")
    for warning in model.warnings:
        cli.warn_once(comm)(warning)
    if options.precision != "fp32" and model.config.kind != "lm" and options.pairs is None:
        raise UserError.of_all(
            f"--precision {options.precision} is of models of text, and with --pairs: {options.model} is none"
        )
    if options.precision != "fp32" and model.dtype == "float64":
        raise UserError.of_all(f"{options.model} has parameters of float64: --precision {options.precision} is for float32")
    runtime.check_same(comm, {"model": model.fingerprint, "products": described(options.precision, model.dtype)})
    measure = _measure_split if options.pairs is None else _measure_pairs
    measure(comm, node, options, model)
    runtime.finish(comm)
    return DONE


def _options(argv: list[str], rank: int) -> argparse.Namespace:
    from .inference.scores import BLEU_TOKENIZERS
    from .inference.search_options import add_search, beam_of

    parser = cli.Parser("evaluate", __doc__, EPILOG, rank)
    parser.add_argument("model", metavar="MODEL", help="folder of a run, or of a model made by dllm export; or ipfs://CID")
    parser.add_argument("--data", metavar="DIR", help="folder made by dllm.prepare (default: the run's)")
    parser.add_argument("--split", default="test", help="default: test")
    parser.add_argument("--lanes", type=cli.at_least(1), default=0, metavar="L", help="parallel streams of text")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="of a run; default: best")
    parser.add_argument("--pairs", nargs="*", metavar="SRC TGT", help="compare what the model says with targets")
    parser.add_argument("--plot", metavar="FILE.png", help="of a tagger or classifier: draw which labels are taken for others")
    parser.add_argument("--write", metavar="FILE", help="with --pairs: what the model says, line i for line i of SRC")
    parser.add_argument(
        "--bleu-tokenize", choices=BLEU_TOKENIZERS, help="with --pairs: what cuts texts into words for BLEU (default 13a)"
    )
    add_search(parser, "with --pairs: ")
    cli.add_precision(parser)
    options = parser.parse_args(argv)
    if options.pairs is not None and len(options.pairs) not in (0, 2):
        parser.error("argument --pairs: it takes SRC and TGT, or nothing")
    if options.plot and options.pairs is not None:
        parser.error("--plot does not go with --pairs")
    for name in ("write", "bleu_tokenize", "beam", "min_tokens"):
        if getattr(options, name) is not None and options.pairs is None:
            parser.error(f"--{name.replace('_', '-')} goes with --pairs")
    options.bleu_tokenize = options.bleu_tokenize or BLEU_TOKENIZERS[0]
    options.search = beam_of(parser, options, always=options.pairs is not None)
    return options


def _measure_split(comm: MPI.Comm, node: NodeInfo, options: argparse.Namespace, model: LoadedModel) -> None:
    """Print the loss of a split."""
    from .inference.evaluation import Evaluation, corpus_of
    from .inference.labelling import KINDS
    from .kernels.team import Team
    from .model.precision import described, products_of
    from .training.curves import check_picture
    from .training.warmup import warm_up

    with runtime.together(comm):
        check_picture("--plot", options.plot)
        if options.plot and model.config.kind not in KINDS:
            raise UserError(f"--plot draws which labels are taken for others, and {options.model} says no labels")
    settings, split, warn = model.settings, options.split, cli.warn_once(comm)
    if options.lanes:
        settings = replace(settings, train=replace(settings.train, eval_lanes=options.lanes))
    corpus, private = corpus_of(comm, node, model, options.model, data=options.data, split=split)
    with leader_first(node):
        warm_up(settings)
        _warm_up_decoder(model, options.precision)
    evaluation = Evaluation(comm, corpus, split, settings, model.dtype, private, Team(node.threads), warn)
    result = evaluation.run(model.vector, whole=True)
    if options.precision != "fp32":
        plain, result = result["perplexity"], evaluation.run(model.vector, precision=options.precision)
        result |= {"precision": products_of(options.precision, model.dtype), "perplexity_fp32": plain}
    with runtime.together(comm):
        if comm.rank == 0 and options.plot:
            _draw_confusion(options.plot, model, result)
    if comm.rank == 0:
        print(printable(f"{options.model}, {model.origin}, {split} split in windows of {settings.train.window}"))
        if options.precision != "fp32":
            found, change = result["perplexity"], result["perplexity"] / plain - 1
            print(f"{described(options.precision)}: perplexity {found:.4f}, in fp32 {plain:.4f}, {change:+.3%}")
        print(json.dumps(result), flush=True)


def _draw_confusion(path: str, model: LoadedModel, result: dict[str, Any]) -> None:
    """Draw how often each label was said where each was true. Raises UserError."""
    import numpy as np

    from .training.curves import draw_matrix, write_picture

    if "confusion" not in result:
        raise UserError(f"--plot: {len(model.tokenizer.labels):,} labels are too many for a picture")
    counts = np.array(result["confusion"])
    title = f"true (rows) and said, {result['accuracy']:.1f} % right"
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    write_picture("--plot", path, draw_matrix(shares, model.tokenizer.labels, model.tokenizer.labels, title))


def _warm_up_decoder(model: LoadedModel, precision: str) -> None:
    """Compile what a Decoder needs, where it is to be measured."""
    from .model.decoder import Decoder

    if precision != "fp32":
        Decoder(model.model(1), 1, precision).warm_up()


def _measure_pairs(comm: MPI.Comm, node: NodeInfo, options: argparse.Namespace, model: LoadedModel) -> None:
    """Print how good the targets are that the model gives, and write them to a file where that is wanted."""
    from .data.supply import supply
    from .inference import answering, scores, source_files
    from .inference.evaluation import corpus_of
    from .inference.search_options import check_attention
    from .kernels.team import Team
    from .model.precision import described, products_of
    from .training.warmup import warm_up

    tokenizer, train = model.tokenizer, model.settings.train
    with runtime.together(comm):
        if comm.rank == 0:
            scores.check(options.bleu_tokenize)
            source_files.check_place("--write", options.write)
        check_attention(model, options.model, {"--coverage": options.coverage})
        if not tokenizer.pairs:
            raise UserError(f"{options.model} was not trained on pairs: dllm.prepare --pairs makes data for that")
        if not options.pairs and is_private(options.data or model.data or ""):
            raise UserError("every rank has pairs of its own, which stay there: give --pairs SRC TGT, or --data DIR")
    if options.pairs:
        source, target = options.pairs
        pairs, in_order = runtime.agree(comm, answering.read_files, source, target, tokenizer), None
    else:
        otherwise = ", or --pairs SRC TGT"
        corpus, _ = corpus_of(comm, node, model, options.model, data=options.data, split=options.split, otherwise=otherwise)
        supply(comm, corpus, corpus.files(options.split), cli.warn_once(comm))
        pairs = runtime.agree(comm, answering.read_split, corpus, options.split)
        in_order = runtime.agree(comm, answering.order_of_files, corpus, options.split)
        if options.write and in_order is None:
            cli.warn_once(comm)(
                f"{corpus.folder} does not say which line each pair was: --write has its own order; prepare it anew"
            )
    lanes = options.lanes or train.eval_lanes or train.lanes
    how = answering.Answering(
        tokenizer=tokenizer, lanes=lanes, limit=train.window, beam=options.search, precision=options.precision,
        replace=model.config.copy,
    )  # fmt: skip
    with leader_first(node):
        warm_up(model.settings)
        answering.warm_up(model, how)
    window = max(train.window, *(max(len(source), len(target) + 1) for source, target, *_ in pairs))
    with runtime.together(comm):
        whole = model.network(window, lanes, Team(node.threads))
    texts, losses = answering.solve(comm, whole, how, pairs)
    with runtime.together(comm):
        if comm.rank == 0:
            if options.write:
                lines = texts if in_order is None else in_order(texts)
                source_files.write("--write", options.write, "".join(text + "\n" for text in lines))
            what = options.pairs[0] if options.pairs else options.split
            print(
                printable(
                    f"{options.model}, {model.origin}, {len(pairs):,} pairs of {what}, at most {train.window} tokens each"
                )
            )
            measured: dict[str, Any] = {"split": what, **answering.measure(pairs, texts, losses, options.bleu_tokenize)}
            if options.precision != "fp32":
                print(described(options.precision))
                measured["precision"] = products_of(options.precision, model.dtype)
            print(json.dumps(measured), flush=True)


if __name__ == "__main__":
    sys.exit(main())
