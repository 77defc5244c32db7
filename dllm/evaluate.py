"""Measure a trained model on a split: mpirun -n N python -m dllm.evaluate MODEL. The last line is JSON."""

import json
import sys
from dataclasses import replace

from . import cli
from .comm import runtime
from .comm.node_info import find_node, leader_first
from .config import is_private
from .errors import DONE, UserError

EPILOG = """
examples
  python -m dllm.evaluate RUN
  mpirun -n 8 python -m dllm.evaluate RUN --split valid --checkpoint last
  python -m dllm.evaluate MODEL --data DIR          a model folder, or a run on another corpus of the same vocabulary
  mpirun -n 8 python -m dllm.evaluate MODEL --pairs                        exact match, BLEU and ROUGE of the test split
  python -m dllm.evaluate MODEL --pairs news.en news.de --write out.de     the same of other files; what the model says

The loss is in nats a token; perplexity is its exponential. State is carried over the whole split, in as many lanes as
train.eval_lanes of the run says (--lanes changes it; 1 reads the split from end to end).

--pairs is for models of pairs: the likeliest target of every source, each alone, compared with the target that belongs to it,
of the split or of two files. exact_match, bleu and rougeL are in per cent; the loss is that of targets with their end. It
needs pip install 'dllm[tasks]'.
"""


def main(argv=None):
    return cli.collective(evaluate, argv)


def evaluate(argv, comm):
    with runtime.together(comm):
        parser = cli.Parser("evaluate", __doc__, EPILOG, comm.rank)
        parser.add_argument("model", metavar="MODEL", help="folder of a run, or of a model made by dllm export")
        parser.add_argument("--data", metavar="DIR", help="folder made by dllm.prepare (default: the run's)")
        parser.add_argument("--split", default="test", help="default: test")
        parser.add_argument("--lanes", type=cli.at_least(1), default=0, metavar="L", help="parallel streams of text")
        parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="of a run; default: best")
        parser.add_argument("--pairs", nargs="*", metavar="SRC TGT", help="compare what the model says with targets")
        parser.add_argument("--write", metavar="FILE", help="with --pairs: what the model says, a line for each source")
        options = parser.parse_args(argv)
        if options.pairs is not None and len(options.pairs) not in (0, 2):
            parser.error("argument --pairs: it takes SRC and TGT, or nothing")
        if options.write and options.pairs is None:
            parser.error("--write goes with --pairs")
    runtime.check_same(comm, vars(options))
    place = find_node(comm)

    from .data.corpus import open_corpus
    from .data.tokenizer_files import tokenizer_hash
    from .inference.evaluation import Evaluation
    from .inference.loaded_model import Bundle
    from .kernels.team import Team
    from .training.warmup import warm_up

    bundle = runtime.agree(comm, Bundle.open, options.model, options.checkpoint == "best")
    settings = bundle.settings
    if options.pairs is not None:
        return _evaluate_pairs(comm, place, options, bundle)
    if options.lanes:
        settings = replace(settings, train=replace(settings.train, eval_lanes=options.lanes))
    path = options.data or bundle.data
    if path is None:
        raise UserError.of_all(f"{options.model} does not say where its corpus is: give one by --data DIR")
    corpus = open_corpus(comm, place, path, lambda text: None)
    with runtime.together(comm):
        corpus.check_vocabulary(tokenizer_hash(bundle.tokenizer), options.model)
        corpus.split(options.split)
    with leader_first(place):
        warm_up(settings)
    evaluation = Evaluation(comm, corpus, options.split, settings, bundle.dtype, is_private(path), Team(place.threads))
    result = evaluation.run(bundle.theta(evaluation.model.layout))
    if comm.rank == 0:
        print(f"{options.model}, {bundle.origin}, {options.split} split in windows of {settings.train.window}")
        print(json.dumps(result), flush=True)
    runtime.finish(comm)
    return DONE


def _evaluate_pairs(comm, place, options, bundle):
    from .data.corpus import open_corpus
    from .data.tokenizer_files import tokenizer_hash
    from .files import storage
    from .inference import answering
    from .kernels.team import Team
    from .training.warmup import warm_up

    settings, tokenizer = bundle.settings, bundle.tokenizer
    path = options.data or bundle.data
    with runtime.together(comm):
        answering.check_scorers()
        if not tokenizer.pairs:
            raise UserError(f"{options.model} was not trained on pairs: dllm.prepare --pairs makes data for that")
        if not options.pairs and path is None:
            raise UserError(f"{options.model} does not say where its corpus is: give one by --data DIR, or --pairs SRC TGT")
        if not options.pairs and is_private(path):
            raise UserError("every rank has pairs of its own, which stay there: give --pairs SRC TGT, or --data DIR")
    if options.pairs:
        pairs = runtime.agree(comm, answering.read_files, *options.pairs, tokenizer)
    else:
        corpus = open_corpus(comm, place, path, lambda text: None)
        with runtime.together(comm):
            corpus.check_vocabulary(tokenizer_hash(tokenizer), options.model)
            pairs = answering.read_split(corpus, options.split)
    with leader_first(place):
        warm_up(settings)
    lanes, window = options.lanes or settings.train.eval_lanes or settings.train.lanes, settings.train.window
    with runtime.together(comm):
        model = bundle.model(window, lanes, Team(place.threads))
    texts, losses = answering.solve(comm, model, tokenizer, pairs, lanes, limit=window)
    with runtime.together(comm):
        if comm.rank == 0:
            if options.write:
                try:
                    storage.write_text(options.write, "".join(text + "\n" for text in texts))
                except OSError as error:
                    raise UserError(f"cannot write --write {options.write}: {error.strerror}") from None
            what = options.pairs[0] if options.pairs else options.split
            print(f"{options.model}, {bundle.origin}, {len(pairs):,} pairs of {what}, at most {window} tokens each")
            print(json.dumps({"split": what, **answering.measure(pairs, texts, losses)}), flush=True)
    runtime.finish(comm)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
