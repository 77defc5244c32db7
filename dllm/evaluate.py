"""Measure a trained model on a split: mpirun -n N python -m dllm.evaluate MODEL. The last line is JSON."""

import json
import sys
from dataclasses import replace

from . import cli
from .comm import runtime
from .errors import DONE, UserError

EPILOG = """
examples
  python -m dllm.evaluate RUN
  mpirun -n 8 python -m dllm.evaluate RUN --split valid --checkpoint last
  python -m dllm.evaluate MODEL --data DIR          a model folder, or a run on another corpus of the same vocabulary

The loss is in nats a token; perplexity is its exponential. State is carried over the whole split, in as many lanes as
train.eval_lanes of the run says (--lanes changes it; 1 reads the split from end to end).
"""


def main(argv=None):
    comm = runtime.world()
    return cli.run(lambda argv: evaluate(argv, comm), argv, comm)


def evaluate(argv, comm):
    with runtime.together(comm):
        parser = cli.Parser("evaluate", __doc__, EPILOG, comm.rank)
        parser.add_argument("model", metavar="MODEL", help="folder of a run, or of a model made by dllm export")
        parser.add_argument("--data", metavar="DIR", help="folder made by dllm.prepare (default: the run's)")
        parser.add_argument("--split", default="test", help="default: test")
        parser.add_argument("--lanes", type=cli.at_least(1), default=0, metavar="L", help="parallel streams of text")
        parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="of a run; default: best")
        options = parser.parse_args(argv)
    runtime.check_same(comm, vars(options))
    place = runtime.node(comm)

    from .bundle import Bundle
    from .corpus import open_corpus
    from .data.shards import tokenizer_hash
    from .inference import Evaluation
    from .kernels.team import Team
    from .warmup import warm_up

    bundle = runtime.agree(comm, Bundle.open, options.model, options.checkpoint == "best")
    settings = bundle.settings
    if options.lanes:
        settings = replace(settings, train=replace(settings.train, eval_lanes=options.lanes))
    path = options.data or bundle.data
    if path is None:
        raise UserError.of_all(f"{options.model} does not say where its corpus is: give one by --data DIR")
    corpus = open_corpus(comm, place, path, lambda text: None)
    with runtime.together(comm):
        corpus.check_vocabulary(tokenizer_hash(bundle.tokenizer), options.model)
        corpus.split(options.split)
    with runtime.leader_first(place):
        warm_up(settings)
    evaluation = Evaluation(comm, corpus, options.split, settings, bundle.dtype, "{rank}" in path, Team(place.threads))
    result = evaluation.run(bundle.theta(evaluation.model.layout))
    if comm.rank == 0:
        print(f"{options.model}, {bundle.origin}, {options.split} split in windows of {settings.train.window}")
        print(json.dumps(result), flush=True)
    runtime.finish(comm)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
