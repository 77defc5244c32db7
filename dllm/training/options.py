"""The options of `train`, which `launch` takes too, and the Config that they mean."""

from __future__ import annotations

import argparse
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .. import cli, config
from ..comm import methods, topology
from ..data.corpus import Corpus
from ..data.lane_kinds import lanes_of
from ..data.record_lanes import RecordLanes
from ..errors import UserError
from ..model import blocks
from ..remote.locate import is_url
from ..runs.run_folder import read_settings
from . import event_files

MOST_TRACED = 1000  # steps: one has about 40 events on each rank
DESCRIPTION = "Train a language model over all ranks: mpirun -n N python -m dllm.train."
EPILOG = """
examples
  mpirun -n 8 python -m dllm.train                                  the embedded corpus: Python's standard library
  mpirun -n 8 python -m dllm.train --data DIR --preset wlm-200      a corpus made by dllm.prepare, a published recipe
  mpirun -n 4 python -m dllm.train --data 'DIR/site{rank}'          private text: each rank reads its own folder only
  mpirun -n 3 python -m dllm.train --resume RUN                     go on from RUN's newest checkpoint, on any number of ranks
  mpirun -n 3 python -m dllm.train --resume RUN --set train.epochs=20     further than it was to go
  mpirun -n 2 python -m dllm.train --init-from RUN --data DIR       fine-tune: a new run that begins with RUN's parameters
  mpirun -n 2 python -m dllm.train --set model.hidden=512 --set train.lr=0.001
  mpirun -n 4 python -m dllm.train --trace 100:105                  trace.json of these steps, for ui.perfetto.dev
  mpirun -n 8 python -m dllm.train --set averaging.compression=powersgd    smaller messages; more ways in docs/how-to

SIGUSR1 to mpirun: the step is finished, a checkpoint written, exit code 75. SIGTERM and Ctrl-C do the same where mpirun
passes them on: MPICH's does so with SIGTERM, Open MPI's ends the job instead.
--settings shows every key that --set takes, what it does and what it may be; config.toml in a run's folder has all of them.
"""


def train_options(argv: Sequence[str], rank: int = 0) -> argparse.Namespace:
    """The options, read. Raises UserError where they contradict each other; ends the process where they ask for help."""
    parser = cli.Parser("train", DESCRIPTION, EPILOG, rank)
    parser.add_argument("--preset", default=None, metavar="NAME", help="; ".join(config.preset_names()))
    parser.add_argument("--config", metavar="FILE", help="a TOML file, laid over the preset")
    parser.add_argument("--data", metavar="DIR", help="folder made by dllm.prepare; {rank} in it: one for each rank")
    parser.add_argument("--out", metavar="RUN", help="new folder for the run (default: runs/PRESET-DATE-TIME)")
    parser.add_argument("--resume", metavar="RUN", help="go on with this run")
    parser.add_argument("--init-from", metavar="MODEL", help="begin a new run with the parameters of a run or a model")
    parser.add_argument("--max-steps", type=cli.at_least(1), default=0, metavar="N", help="end when N steps are done")
    parser.add_argument("--max-seconds", type=cli.at_least(0.001, float), default=0, metavar="S", help="end after S seconds")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="any setting; may be repeated")
    parser.add_argument("--progress", choices=("auto", "live", "plain", "none"), default="auto", help="default: auto")
    parser.add_argument("--trace", type=_steps, metavar="STEPS", help="write trace.json of some steps: FIRST:LAST, or how many")
    parser.add_argument("--settings", action="store_true", help="show what --set takes, as the other options set it, and end")
    options = parser.parse_args(argv)
    if options.resume and (options.preset or options.config or options.out):
        parser.error("--resume brings its own configuration and folder: leave out --preset, --config and --out")
    if options.resume and options.init_from:
        parser.error("--resume goes on with the parameters that a run has: leave out --init-from, or begin a new run")
    return options


def _steps(text: str) -> tuple[int, int]:
    """An argparse type: FIRST:LAST, or how many steps, as (0, count)."""
    found = re.fullmatch(r"(?:(\d{1,15}):)?(\d{1,15})", text)
    first, last = (int(found[1] or 0), int(found[2])) if found else (0, 0)
    count = last - first + 1 if found and found[1] else last
    if not 1 <= count <= MOST_TRACED or (found and found[1] and first < 1):
        raise argparse.ArgumentTypeError(f"{text} is neither FIRST:LAST nor a number of steps, at most {MOST_TRACED:,} of them")
    return first, last


def parent_of(options: argparse.Namespace) -> str:
    """The model whose parameters a new run begins with, by --init-from or train.init_from; "": they are drawn."""
    if options.resume or options.init_from:
        return options.init_from or ""
    train = said_by_user(options).get("train")
    name = train.get("init_from") if isinstance(train, dict) else None
    return name if isinstance(name, str) else ""


def train_config(options: argparse.Namespace, shape: Callable[[str | None], Mapping[str, Any]] | None = None) -> config.Config:
    """The Config of the command line, and that of the run which is resumed.

    shape : what --init-from decides of the section `model`, for a kind of model
    """
    extra = [_lasting(setting) for setting in options.set]
    for key, value in (("data.path", options.data), ("train.init_from", options.init_from)):
        if value:
            extra.append(f"{key}={value if is_url(value) else os.path.abspath(value)}")
    if options.resume:
        settings = read_settings(options.resume, config.parse_settings(extra))
    else:
        settings = config.resolve(options.preset or "default", options.config, extra, shape)
    if 0 < settings.train.max_steps < options.max_steps:  # what is asked for now lifts what was said before
        settings = replace(settings, train=replace(settings.train, max_steps=options.max_steps))
    methods.check(settings)
    event_files.check(settings.log)
    return settings


def said_by_user(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that the command line says, not a preset or a run: section -> key -> value. Raises UserError."""
    return config.of_user(options.config, options.set)


def of_corpus(settings: config.Config, corpus: Corpus, said: Mapping[str, Any] | None = None) -> config.Config:
    """The settings with the labels and the frames that a corpus has.

    said : settings that the user has said

    Raises UserError where such a model cannot learn from it, or is of others; and where a setting that was said has no effect.
    """
    by_record, said = issubclass(lanes_of(corpus, settings.model.kind), RecordLanes), said or {}
    if corpus.features and "embedding" in said.get("model", {}):
        raise UserError(f"model.embedding is of tokens, and {corpus.folder} holds frames of sound: leave it out")
    if by_record and "last_window" in said.get("train", {}):
        raise UserError(f"train.last_window is of running text, and {corpus.folder} holds {corpus.content}: leave it out")
    labels = len(corpus.labels) if settings.model.kind in blocks.LABELLED else 0
    for name, count in (("labels", labels), ("features", corpus.features)):
        expected = getattr(settings.model, name)
        if expected not in (0, count):
            raise UserError(f"{corpus.folder} has {count} {name}, and the model was made for {expected}")
    return replace(settings, model=replace(settings.model, labels=labels, features=corpus.features))


def print_settings(settings: config.Config, rank: int = 0) -> None:
    """What --settings shows: every setting with its value, its bounds and its effect; from rank 0 alone."""
    if rank == 0:
        rows = config.settings_table(settings, methods.choices())
        print(config.settings_text(rows, shutil.get_terminal_size((120, 24)).columns))


def _lasting(setting: str) -> str:
    """A setting as a run can keep it: the path of a topology's file from the root."""
    key, _, value = setting.partition("=")
    is_file = key.strip() == "averaging.topology" and value not in topology.NAMES and os.path.isfile(value)
    return f"{key}={os.path.abspath(value)}" if is_file else setting
