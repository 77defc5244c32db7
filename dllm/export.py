"""Make a model folder of a run, for use anywhere: python -m dllm.export RUN --out MODEL."""

from __future__ import annotations

import argparse
import pathlib
import shlex
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from . import cli, config
from .comm.node_info import NodeInfo, find_node
from .data.corpus import Corpus
from .errors import DONE, UserError, printable
from .exchange import formats
from .files import safetensors, storage
from .inference import model_card, model_folder
from .inference.loaded_model import LoadedModel
from .kernels.gemm import aligned
from .kernels.types import Array
from .model import torch_weights
from .model.layout import Layout
from .remote.locate import local_copy
from .runs import checkpoint

if TYPE_CHECKING:
    from mpi4py import MPI

EPILOG = """
examples
  python -m dllm.export RUN --out MODEL
  python -m dllm.export RUN --out MODEL --weights int8 --split test      a quarter of the size; perplexity of the test split
  python -m dllm.export RUN --out MODEL --average 3                      the mean of the run's last three checkpoints
  python -m dllm.export MODEL --out SMALLER --weights bf16               of a model folder, imported ones too

MODEL holds the weights in safetensors under PyTorch's names, the tokenizer, config.json, and a README.md that says where the
model comes from. Perplexity is measured before and after on the run's corpus, where that is there.
"""


def arguments(argv: list[str]) -> argparse.Namespace:
    """The options of the command. Raises UserError."""
    parser = cli.Parser("export", __doc__, EPILOG)
    parser.add_argument("run", metavar="RUN", help="folder of a run, or of a model, or ipfs://CID")
    parser.add_argument("--out", required=True, metavar="MODEL", help="the folder to make")
    parser.add_argument("--average", type=cli.at_least(1), metavar="K", help="take the mean of the last K checkpoints")
    parser.add_argument("--weights", choices=tuple(torch_weights.KINDS), default="fp32", help="default: fp32")
    parser.add_argument("--also", action="append", choices=tuple(formats.FORMATS), default=[], help="and a file for it")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="of a run; default: best")
    parser.add_argument("--data", metavar="DIR", help="corpus to measure perplexity on (default: the run's)")
    parser.add_argument("--split", metavar="NAME", help="split of it (default: valid)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""
    return cli.collective(export, argv)


def export(argv: list[str], comm: MPI.Comm) -> int:
    """Write the model folder of a run; on one rank."""
    if comm.size > 1:
        raise UserError.of_all("export is the work of one process: start it without mpirun")
    options = arguments(argv)
    model_folder.check_free(options.out)
    source = LoadedModel.open(options.run, options.checkpoint == "best")
    model_folder.check_windows(source.settings.train)
    if config.is_private(source.data or ""):
        storage.owner_only()  # it may repeat a text: who else shall have it is for its owner to say
    for warning in source.warnings:
        _say(warning)
    layout = source.layout
    vector, step = source.vector, source.scalars.get("step")
    if options.average:
        vector, step = _average(options, source, layout)
    tensors = torch_weights.read_vector(layout, vector)
    torch_weights.check_finite(options.run, tensors)
    encoded = torch_weights.encode(tensors, options.weights)
    data = safetensors.pack(encoded)
    also = formats.pack(options.also, formats.Stored(source.settings, source.tokenizer, encoded, options.weights))
    stored = torch_weights.decode(safetensors.unpack(data, options.out))
    result = model_folder.flat(source.config, source.tokenizer.size, stored)

    node = find_node(comm)
    corpus = _corpus(options, source, comm, node)
    measured = [] if corpus is None else _measure(options.split or "valid", source, result, corpus, comm, node)
    facts = model_folder.describe(source.settings, source.tokenizer, options.weights, data)
    facts |= _origin(source, step, options.average or 1, measured)
    model_folder.write(options.out, data, source.tokenizer, facts, also)
    size = sum(path.stat().st_size for path in pathlib.Path(options.out).iterdir())
    print(f"{printable(options.out)}: {size / 1e6:,.1f} MB, {facts['parameters']:,} parameters in {options.weights}")
    out = shlex.quote(printable(options.out))
    print(f"try it: {model_card.command(source.config.kind, out, source.tokenizer.pairs, source.tokenizer.rate > 0)}")
    return DONE


def _say(text: str) -> None:
    print(f"dllm: {printable(text)}", file=sys.stderr)


def _average(options: argparse.Namespace, source: LoadedModel, layout: Layout) -> tuple[Array, int]:
    """The mean of a run's last K checkpoints, added up in float64, and the step of the newest."""
    if not source.scalars:
        raise UserError(f"--average: {options.run} is a model folder, it has no checkpoints")
    total, newest, count = np.zeros(layout.size), 0, 0
    for found in checkpoint.available(local_copy(options.run))[0]:
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
            mean: Array = aligned((layout.size,), source.dtype)
            mean[:] = total / count
            return mean, newest
    raise UserError(
        f"--average {options.average}: {options.run} has {count} checkpoints; train keeps more with "
        f"--set checkpoint.keep={options.average}"
    )


def _corpus(options: argparse.Namespace, source: LoadedModel, comm: MPI.Comm, node: NodeInfo) -> Corpus | None:
    """The Corpus to measure on, or None, and then it was said why: where the user names one, it must be there."""
    from .data.supply import supply
    from .inference.evaluation import corpus_of

    split = options.split or "valid"
    try:
        path = options.data or source.data
        if path and config.is_private(path):
            raise UserError(f"the corpus {path} is in parts; --data DIR would name one")
        corpus, _ = corpus_of(comm, node, source, options.run, data=options.data, split=split)
        supply(comm, corpus, corpus.files(split), _say)
        return corpus
    except UserError as error:
        if options.data or options.split:
            raise
        _say(f"perplexity is not measured: {error}")
        return None


def _measure(
    split: str, source: LoadedModel, result: Array, corpus: Corpus, comm: MPI.Comm, node: NodeInfo
) -> list[dict[str, Any]]:
    """Perplexity before and after, as an entry of config.json; printed. Where there is none, the loss is printed alone."""
    from .inference.evaluation import Evaluation
    from .kernels.team import Team

    settings, team, found = source.settings, Team(node.threads), list[dict[str, Any]]()
    for vector in (source.vector, result):
        evaluation = Evaluation(comm, corpus, split, settings, vector.dtype, team=team, say=_say)
        found.append(evaluation.run(vector))
    name = "perplexity" if evaluation.units.text else "loss"
    before, after = (entry[name] for entry in found)
    print(f"{name} on the {split} split: {before:.4f} before, {after:.4f} after ({after / before - 1:+.2%})")
    if name == "loss":
        return []
    return [{"split": split, "tokens": found[0]["tokens"], "before": before, "after": after, "corpus": corpus.hash}]


def _origin(source: LoadedModel, step: int | None, averaged: int, measured: list[dict[str, Any]]) -> dict[str, Any]:
    """What config.json says of where the model comes from. Paths of this machine are not in it."""
    if source.facts:
        known: dict[str, Any] = {
            name: source.facts[name] for name in ("embedded", "training", "imported") if name in source.facts
        }
        if "training" in known:
            known["training"] = known["training"] | {"measured": measured or known["training"]["measured"]}
        return known
    recipe = config.as_dict(source.settings)
    path = recipe.pop("data")["path"]
    recipe["train"].pop("init_from")
    *before, newest = source.texts
    earlier = [{"corpus": text.corpus or None, "tokens": text.tokens} for text in before]
    training = {
        "step": step, "averaged": averaged, "tokens": sum(text.tokens for text in source.texts),
        "corpus": newest.corpus or None, "earlier": earlier, "measured": measured, "recipe": recipe,
    }  # fmt: skip
    return {"embedded": path == "", "training": training}


if __name__ == "__main__":
    sys.exit(main())
