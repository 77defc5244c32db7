"""Find a learning rate by a range test over all ranks: mpirun -n N python -m dllm.tools.lr_find, or dllm lr-find.

On a fresh model the rate grows by the same factor at each step. The loss falls, then diverges; a good rate lies before that.
Sources: Smith 2017, "Cyclical learning rates for training neural networks", section 3.3; the two proposals: Howard and Gugger
2020, "fastai: a layered API for deep learning".
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import cli, config
from ..comm import runtime
from ..comm.messages import broadcast
from ..comm.node_info import find_node, leader_first
from ..errors import DONE, UserError
from ..inference import model_folder
from ..inference.loaded_model import LoadedModel, open_parent
from ..model import blocks
from ..runs.ownership import Ownership
from ..training.curves import Curve, Line, check_picture, draw, write_picture
from ..training.options import of_corpus, parent_of, said_by_user, train_config, train_options
from ..training.progress import Reporter

if TYPE_CHECKING:
    from mpi4py import MPI

    from ..training.trainer import Trainer

EPILOG = """
examples
  mpirun -n 8 dllm lr-find                                       the embedded corpus, the default preset
  mpirun -n 8 dllm lr-find --preset wlm-200 --data DIR --out range.png
  mpirun -n 4 dllm lr-find --data DIR --set model.hidden=512 --low 1e-6 --high 1 --steps 200

Rates go from 1e-5 to 1, with train.optimizer = sgd from 0.001 to 100, where --low and --high do not say otherwise.
It takes --preset, --config, --data, --init-from, --set and --progress as train does; with the same ones the rate that is found
fits. It leaves nothing behind but --out. The last line says what to type next.

Proposed is a tenth of the rate at which the smoothed loss is lowest, since there it is about to diverge; "steepest" is where it
falls fastest, another common choice. Both are starting points: a warm-up (train.warmup) allows for more.
"""
SMOOTH = 0.9  # of the exponential mean of losses that tells a divergence
DIVERGED = 4.0  # a smoothed loss of so many times the lowest one ends the test
SPAN = 4  # steps before and behind one over which its loss is smoothed
SETTLE = 10  # steps before losses count: the mean of the first few says little
ROWS = 16  # of the table
RANGE, RANGES = (1e-5, 1.0), {"sgd": (1e-3, 100.0)}  # rates of a test, by optimiser


class Found(NamedTuple):
    """What a range test says."""

    rates: list[float]
    losses: list[float]  # nats a token, of all ranks
    smoothed: list[float]
    lowest: int  # step at which the smoothed loss is lowest
    steepest: int  # step at which it falls fastest by the rate's logarithm

    @property
    def proposal(self) -> float:
        """A rate to train with, with two digits."""
        return float(f"{self.rates[self.lowest] / 10:.1e}")


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""
    return cli.collective(lr_find, argv, product=True)


def lr_find(argv: list[str], comm: MPI.Comm) -> int:
    """Run the test and print what it says. Collective."""
    with runtime.together(comm):
        options, train = _options(argv, comm.rank)
        origin = parent_of(train)
    reporter = Watch(comm.rank == 0, train.progress)
    parent = open_parent(comm, origin, reporter.warn) if origin else None
    with runtime.together(comm):
        settings = train_config(train, model_folder.shape_for(parent.config if parent else None))
        configuration = _configuration(options, settings)
    runtime.check_same(comm, vars(options) | config.flat(configuration))
    _test(comm, configuration, reporter, parent, said_by_user(train))
    found = runtime.agree(comm, judge, reporter.lines)
    with runtime.together(comm):
        if comm.rank == 0:
            _tell(options, shlex.join(_without_rate(train)), found)
    return DONE


def judge(lines: list[Line]) -> Found:
    """What the lines of metrics of a test say, one of each step. Raises UserError where it was too short to say anything."""
    rates, losses = [line["lr"] for line in lines], [line["loss"] for line in lines]
    around = (losses[max(0, step - SPAN) : step + SPAN + 1] for step in range(len(losses)))
    smoothed = [sum(some) / len(some) for some in around]  # of both sides: a mean of the past would lag behind
    if len(lines) < 2 * SETTLE:
        raise UserError(f"the loss diverged after {len(lines)} steps: begin at a lower --low, or take more --steps")
    steps = range(SETTLE, len(lines) - 1)
    slope = lambda step: (smoothed[step + 1] - smoothed[step - 1]) / math.log(rates[step + 1] / rates[step - 1])
    return Found(rates, losses, smoothed, min(steps, key=smoothed.__getitem__), min(steps, key=slope))


class Watch(Reporter):
    """Keeps the losses of a test, the same on all ranks, instead of writing them down."""

    def __init__(self, speaks: bool, progress: str) -> None:
        super().__init__(speaks, progress)
        self.lines: list[Line] = []
        self._mean, self._lowest = 0.0, math.inf

    def log(self, line: Line) -> None:
        """A step was taken."""
        self.lines.append(line)
        self._mean = SMOOTH * self._mean + (1 - SMOOTH) * line["loss"]
        smoothed = self._mean / (1 - SMOOTH ** len(self.lines))
        self._lowest = min(self._lowest, smoothed)
        self.diverged = len(self.lines) > SETTLE and smoothed > DIVERGED * self._lowest
        if self.mode == "plain" and len(self.lines) % SETTLE == 0:
            self.say(f"step {line['step']}  lr {line['lr']:.2e}  loss {line['loss']:.4f}")

    diverged = False


def _options(argv: list[str], rank: int) -> tuple[argparse.Namespace, argparse.Namespace]:
    """This command's options, and those of train. Raises UserError."""
    parser = cli.Parser("tools.lr_find", __doc__, EPILOG, rank)
    parser.add_argument("--low", type=cli.at_least(1e-12, float), default=None, metavar="LR", help="first rate")
    parser.add_argument("--high", type=cli.at_least(1e-12, float), default=None, metavar="LR", help="last rate")
    parser.add_argument("--steps", type=cli.at_least(2 * SETTLE, int, 100_000), default=150, metavar="N", help="default: 150")
    parser.add_argument("--out", metavar="FILE.png", help="draw the curve; needs pip install 'dllm[plot]'")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    options, rest = parser.parse_known_args(argv)
    train = train_options(rest, rank)
    if train.resume or train.max_steps or train.max_seconds or train.settings or train.trace:
        parser.error("of train's options lr-find takes --preset, --config, --data, --init-from, --set and --progress")
    check_picture("--out", options.out)
    return options, train


def _configuration(options: argparse.Namespace, settings: config.Config) -> config.Config:
    """The Config of the test: the rate as a function of the step, and nothing that writes or evaluates. Raises UserError."""
    low, high = RANGES.get(settings.train.optimizer, RANGE)
    low, high = low if options.low is None else options.low, high if options.high is None else options.high
    if low >= high:
        raise UserError(f"--low {low:g} must be below --high {high:g}")
    train = dataclasses.replace(
        settings.train, schedule="range", min_lr=low, lr=high, warmup=0, max_steps=options.steps,
        epochs=options.steps,
    )  # fmt: skip
    return dataclasses.replace(
        settings,
        train=train,
        log=dataclasses.replace(settings.log, every=1),
        checkpoint=dataclasses.replace(settings.checkpoint, every_steps=0, every_minutes=0.0),
        storage=dataclasses.replace(settings.storage, copies=0),
    )


def _test(
    comm: MPI.Comm, configuration: config.Config, reporter: Watch, parent: LoadedModel | None, said: Mapping[str, Any]
) -> None:
    """Take the steps. Collective. An error that all ranks share ends it, where some steps were taken: such as one of a loss
    that is not finite. said : settings, by the user
    """
    from ..data.corpus import open_corpus
    from ..training.setup import set_up
    from ..training.trainer import Trainer
    from ..training.validation import Validation
    from ..training.warmup import warm_up

    node = find_node(comm, configuration.train.threads)
    corpus = open_corpus(comm, node, configuration.data.path, reporter.say, configuration.storage)
    if parent:
        runtime.agree(comm, corpus.check_vocabulary, parent.vocabulary, configuration.train.init_from)
    configuration = runtime.agree(comm, of_corpus, configuration, corpus, said)
    reporter.units = blocks.units(configuration.model)
    with leader_first(node):
        warm_up(configuration)
    nowhere = os.path.join(tempfile.gettempdir(), f"dllm-lr-find-{os.urandom(8).hex()}")
    rank = set_up(comm, node, configuration, corpus, _NoFolder(broadcast(comm, nowhere, str), ""), reporter, parent)
    trainer = Trainer(dataclasses.replace(rank, validation=Validation()))
    Trainer.before_step.append(_nothing_to_save)
    try:
        trainer.run(stop=lambda: reporter.diverged)
    except UserError as error:
        if not (error.shared and reporter.lines):
            raise
        reporter.say(f"the test ends: {error}")
        rank.upkeep.end()
    finally:
        Trainer.before_step.remove(_nothing_to_save)
    trainer.close()  # such an error comes between two steps, of all ranks alike


class _NoFolder(Ownership):
    """Of a run's folder that is never made."""

    def is_held(self) -> bool:
        return True

    def show_alive(self) -> None:
        pass


def _nothing_to_save(trainer: Trainer) -> None:
    """The step that follows counts as saved, so a run ends without a checkpoint."""
    trainer.rank.saver.step = trainer.state.step + 1


def _without_rate(train: argparse.Namespace) -> list[str]:
    """The words by which train gets the settings of the test."""
    given = {f"--{name.replace('_', '-')}": getattr(train, name) for name in ("preset", "config", "data", "init_from")}
    named = [word for option, value in given.items() if value for word in (option, value)]
    return named + [word for setting in train.set if not setting.startswith("train.lr=") for word in ("--set", setting)]


def _tell(options: argparse.Namespace, words: str, found: Found) -> None:
    """The table, the picture and what to type next."""
    steepest, lowest = found.rates[found.steepest], found.rates[found.lowest]
    if options.out:
        curves = [Curve("loss", list(zip(found.rates, found.losses, strict=True))),
                  Curve("smoothed", list(zip(found.rates, found.smoothed, strict=True)), colour=1),
                  Curve(f"proposal {found.proposal:.1e}", [(found.proposal, _at(found, found.proposal))], True, 2),
                  Curve(f"steepest {steepest:.1e}", [(steepest, found.smoothed[found.steepest])], True, 3)]  # fmt: skip
        write_picture("--out", options.out, draw(curves, "range of learning rates", "learning rate", log=True))
    if options.json:
        told: dict[str, Any] = {"proposal": found.proposal, "steepest": steepest, "lowest": lowest}
        print(json.dumps(told | {"rates": found.rates, "losses": found.losses, "smoothed": found.smoothed}), flush=True)
        return
    every, last = max(1, len(found.rates) // ROWS), len(found.rates) - 1
    print(f"{'learning rate':>14}{'loss':>10}{'smoothed':>10}")
    for step in sorted({*range(0, last, every), last, found.lowest, found.steepest}):
        mark = "  lowest" * (step == found.lowest) + "  steepest" * (step == found.steepest)
        print(f"{found.rates[step]:14.2e}{found.losses[step]:10.4f}{found.smoothed[step]:10.4f}{mark}")
    if options.out:
        print(f"plot       {options.out}")
    if found.lowest > last - SETTLE:
        print("beware     the loss still falls at the highest rates: a higher --high says more")
    print(f"proposal   {found.proposal:.1e}, a tenth of the rate with the lowest loss; steepest descent is at {steepest:.1e}")
    print(f"next       mpirun -n N python -m dllm.train {words} --set train.lr={found.proposal:g}".replace("  --set", " --set"))
    sys.stdout.flush()


def _at(found: Found, rate: float) -> float:
    """The smoothed loss at the rate of the test that is nearest to `rate`."""
    return found.smoothed[min(range(len(found.rates)), key=lambda step: abs(math.log(found.rates[step] / rate)))]


if __name__ == "__main__":
    sys.exit(main())
