"""Make a model folder of a run, for use anywhere: python -m dllm.export RUN --out MODEL."""

import pathlib
import sys

import numpy as np

from . import cli, config
from .comm.node_info import find_node
from .data.lanes import Schedule
from .data.pair_lanes import read_lanes
from .errors import DONE, UserError
from .inference import loaded_model as folders
from .inference import model_card
from .inference.loaded_model import Bundle
from .kernels.gemm import aligned
from .model import torch_weights
from .model.layout import Layout
from .runs import checkpoint

EPILOG = """
examples
  python -m dllm.export RUN --out MODEL
  python -m dllm.export RUN --out MODEL --weights int8 --split test      a quarter of the size; perplexity of the test split
  python -m dllm.export RUN --out MODEL --average 3                      the mean of the run's last three checkpoints
  python -m dllm.export MODEL --out SMALLER --weights bf16               of a model folder, imported ones too

MODEL holds the weights in safetensors under PyTorch's names, the tokenizer, config.json, and a README.md that says where the
model comes from. Perplexity is measured before and after on the run's corpus, where that is there.
"""


def arguments(argv):
    parser = cli.Parser("export", __doc__, EPILOG)
    parser.add_argument("run", metavar="RUN", help="folder of a run, or of a model")
    parser.add_argument("--out", required=True, metavar="MODEL", help="the folder to make")
    parser.add_argument("--average", type=cli.at_least(1), metavar="K", help="take the mean of the last K checkpoints")
    parser.add_argument("--weights", choices=tuple(torch_weights.KINDS), default="fp32", help="default: fp32")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="of a run; default: best")
    parser.add_argument("--data", metavar="DIR", help="corpus to measure perplexity on (default: the run's)")
    parser.add_argument("--split", metavar="NAME", help="split of it (default: valid)")
    return parser.parse_args(argv)


def main(argv=None):
    return cli.collective(export, argv)


def export(argv, comm):
    if comm.size > 1:
        raise UserError.of_all("export is the work of one process: start it without mpirun")
    options = arguments(argv)
    folders.check_free(options.out)
    source = Bundle.open(options.run, options.checkpoint == "best")
    for warning in source.warnings:
        _say(warning)
    layout = Layout(source.config, source.tokenizer.size, source.dtype)
    vector, step = source.vector, source.scalars.get("step")
    if options.average:
        vector, step = _average(options, source, layout)
    tensors = torch_weights.read_vector(layout, vector)
    torch_weights.check_finite(options.run, tensors)
    data = torch_weights.pack(torch_weights.encode(tensors, options.weights))
    result = folders.flat(source.config, source.tokenizer.size, torch_weights.decode(torch_weights.unpack(data, options.out)))

    place = find_node(comm)
    corpus = _corpus(options, source, comm, place)
    measured = [] if corpus is None else [_measure(options.split or "valid", source, result, corpus, comm, place)]
    facts = folders.describe(source.settings, source.tokenizer, options.weights, data)
    facts |= _origin(source, step, options.average or 1, None if options.data else corpus, measured)
    folders.write(options.out, data, source.tokenizer, facts)
    size = sum(path.stat().st_size for path in pathlib.Path(options.out).iterdir())
    print(f"{options.out}: {size / 1e6:,.1f} MB, {facts['parameters']:,} parameters in {options.weights}")
    print(f"try it: python -m dllm.generate {options.out} {model_card.question(source.tokenizer)}")
    return DONE


def _say(text):
    print(f"dllm: {text}", file=sys.stderr)


def _average(options, source, layout):
    """The mean of a run's last K checkpoints, added up in float64, and the step of the newest."""
    if not source.scalars:
        raise UserError(f"--average: {options.run} is a model folder, it has no checkpoints")
    total, newest, count = np.zeros(layout.size), None, 0
    for found in checkpoint.available(options.run)[0]:
        try:
            found.verify()
        except UserError as error:
            _say(f"{error}; left out")
            continue
        checkpoint.check_fits(found, layout, source.dtype)
        theta = aligned((layout.size,), source.dtype)
        checkpoint.load_theta(found, layout, theta)
        total += theta
        newest, count = newest or found.step, count + 1
        if count == options.average:
            mean = aligned((layout.size,), source.dtype)
            mean[:] = total / count
            return mean, newest
    raise UserError(
        f"--average {options.average}: {options.run} has {count} checkpoints; train keeps more with "
        f"--set checkpoint.keep={options.average}"
    )


def _corpus(options, source, comm, place):
    """The Corpus to measure on, or None, and then it was said why: where the user names one, it must be there."""
    from .data.corpus import open_corpus
    from .data.tokenizer_files import tokenizer_hash

    path = options.data or source.data
    try:
        if path is None:
            raise UserError(f"{options.run} does not say where its corpus is; --data DIR would")
        if config.is_private(path):
            raise UserError(f"the corpus {path} is in parts; --data DIR would name one")
        corpus = open_corpus(comm, place, path, lambda text: None)
        corpus.check_vocabulary(tokenizer_hash(source.tokenizer), options.run)
        corpus.split(options.split or "valid")
        return corpus
    except UserError as error:
        if options.data or options.split:
            raise
        _say(f"perplexity is not measured: {error}")
        return None


def _measure(split, source, result, corpus, comm, place):
    """Perplexity before and after, as an entry of config.json; printed."""
    from .inference.evaluation import Evaluation
    from .kernels.team import Team

    settings, team, found = source.settings, Team(place.threads), []
    for vector in (source.vector, result):
        evaluation = Evaluation(comm, corpus, split, settings, vector.dtype, team=team)
        found.append(evaluation.run(vector))
    before, after = (entry["perplexity"] for entry in found)
    print(f"perplexity on the {split} split: {before:.4f} before, {after:.4f} after ({after / before - 1:+.2%})")
    return {"split": split, "tokens": found[0]["tokens"], "before": before, "after": after, "corpus": corpus.hash}


def _origin(source, step, averaged, corpus, measured):
    """What config.json says of where the model comes from. Paths of this machine are not in it."""
    if source.facts:
        known = {name: source.facts[name] for name in ("embedded", "training", "imported") if name in source.facts}
        if "training" in known:
            known["training"] = known["training"] | {"measured": measured or known["training"]["measured"]}
        return known
    recipe = config.as_dict(source.settings)
    path = recipe.pop("data")["path"]
    tokens = None if corpus is None else _tokens_seen(source.settings.train, source.scalars, corpus)
    training = {
        "step": step, "averaged": averaged, "tokens": tokens, "corpus": None if corpus is None else corpus.hash,
        "measured": measured, "recipe": recipe,
    }  # fmt: skip
    return {"embedded": path == "", "training": training}


def _tokens_seen(train, scalars, corpus):
    """Tokens that training has predicted when the checkpoint was written."""
    schedule = Schedule(read_lanes(corpus, "train", range(train.lanes), train.lanes, train.window), train.last_window)
    return scalars["epoch"] * schedule.per_epoch + sum(map(schedule.tokens, range(scalars["window"])))


if __name__ == "__main__":
    sys.exit(main())
