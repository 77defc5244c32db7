"""Measure a trained model on a split: mpirun -n N python -m dllm.evaluate RUN. The last line is JSON."""
import json
import sys

from . import cli, config
from .comm import runtime
from .errors import DONE, UserError

EPILOG = """
examples
  python -m dllm.evaluate RUN
  mpirun -n 8 python -m dllm.evaluate RUN --split valid --checkpoint last
  python -m dllm.evaluate RUN --data DIR            another corpus of the same vocabulary

The loss is in nats a token; perplexity is its exponential. State is carried over the whole split, in as many lanes as
train.eval_lanes of the run says (--lanes changes it; 1 reads the split from end to end).
"""


def main(argv=None):
    comm = runtime.world()
    return cli.run(lambda argv: evaluate(argv, comm), argv, comm)


def evaluate(argv, comm):
    with runtime.together(comm):
        parser = cli.Parser("evaluate", __doc__, EPILOG, comm.rank)
        parser.add_argument("run", metavar="RUN", help="folder of a run")
        parser.add_argument("--data", metavar="DIR", help="folder made by dllm.prepare (default: the run's)")
        parser.add_argument("--split", default="test", help="default: test")
        parser.add_argument("--lanes", type=cli.at_least(1), default=0, metavar="L", help="parallel streams of text")
        parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="default: best")
        options = parser.parse_args(argv)
    place = runtime.node(comm)

    import threadpoolctl

    from .corpus import embedded
    from .inference import Evaluation, load_run

    threadpoolctl.threadpool_limits(place.threads)
    with runtime.together(comm):
        settings, tokenizer, found = load_run(options.run, options.checkpoint == "best")
        if options.lanes:
            settings = config.from_dict(config.merge(config.as_dict(settings), {"train": {"eval_lanes": options.lanes}}))
    path = options.data or settings.data.path
    if not path:
        path = embedded(comm, place.comm, "bpe", 2048, lambda text: None)
    with runtime.together(comm):
        from .data.shards import Corpus, tokenizer_hash

        corpus = Corpus(str(path).replace("{rank}", str(comm.rank)))
        if corpus.tokenizer_hash != tokenizer_hash(tokenizer):
            raise UserError(f"the vocabulary of {corpus.folder} is not the one that {options.run} was trained with")
        corpus.split(options.split)
    with runtime.leader_first(place):
        pass
    evaluation = Evaluation(comm, corpus, options.split, settings, found.dtype, "{rank}" in str(path))
    with runtime.together(comm):
        theta = found.theta(evaluation.model.layout)
    result = evaluation.run(theta)
    if comm.rank == 0:
        print(f"{options.run}, step {found.step}, {options.split} split in windows of {settings.train.window}")
        print(json.dumps(result), flush=True)
    runtime.finish(comm)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
