"""What a run says at its beginning and at its end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .. import __version__
from ..comm.runtime import mpi_library
from ..config import Config
from ..data.corpus import Corpus
from ..errors import UserError
from ..inference import model_card
from ..inference.answering import Answering, Pair, as_text, read_split
from ..inference.generation import Sampling, sample, start_tokens, streams_of
from ..model import blocks
from ..model.base import Model
from ..model.decoder import Decoder
from ..model.kinds import make_model
from ..model.language_model import LanguageModel
from ..model.precision import described
from ..runs.run_folder import newest_step
from .trainer import Trainer

SAMPLE_PAIRS = 3  # that the sample at the end answers


def header(trainer: Trainer, compiling: float, starting: float, resumed: bool) -> str:
    """Some ten lines that say what is about to happen. compiling, starting : seconds that this took."""
    rank, model, train = trainer.rank, trainer.config.model, trainer.config.train
    comm, node, corpus, run = rank.comm, rank.node, rank.corpus, rank.ownership.run
    schedule, tokens = trainer.schedule, corpus.manifest["splits"]["train"]["tokens"]
    parameters, units = rank.layout.parameters, blocks.units(model)
    precision = described(train.precision)
    what = f"going on from step {trainer.state.step}" if resumed else "config.toml, metrics.jsonl, checkpoints/"
    begin = {"beginning": f"the parameters of {train.init_from}"} if train.init_from and not resumed else {}
    lines = {
        f"dllm {__version__}": f"{comm.size} ranks x {node.threads} threads, {node.cores} cores, {mpi_library()}",
        "data": f"{corpus.folder}  {tokens:,} {corpus.tokenizer.kind} tokens, vocabulary {corpus.vocabulary:,}",
        "lanes": f"{train.lanes} of {rank.lanes.length:,} tokens, {len(rank.own_lanes)} here; windows of {train.window}",
        "model": f"{blocks.describe(model)}, dropout {model.dropout:g}: {parameters:,} parameters",
        **begin,
        "training": f"{train.optimizer}, lr {train.lr:g} {train.schedule}, clip {train.clip or 'none'}, {precision}",
        "length": f"{trainer.total_steps:,} steps, {schedule.windows:,} an epoch of {schedule.per_epoch:,} {units.predicted}",
        "averaging": trainer.averaging.describe(),
        **({"private": _what_others_learn(comm.size)} if trainer.config.data.private else {}),
        "run": f"{run}  {what}",
        "start": f"{starting:.1f} s, of which {compiling:.1f} s compiling or loading kernels",
    }
    return "\n".join(f"{name:11}{text}" for name, text in lines.items())


def _what_others_learn(ranks: int) -> str:
    """A warning to those who train on private text."""
    if ranks == 1:
        return "one rank: nothing leaves it"
    how_often = ", and how often, since there are only two ranks" if ranks == 2 else ""
    return f"the text stays at its rank; what it sends tells the others which words it read{how_often}; MPI encrypts nothing"


def not_saved(trainer: Trainer) -> str:
    """The last line of a run whose last state could not be written."""
    run, saver = trainer.rank.ownership.run, trainer.rank.saver
    older = newest_step(run)
    kept = "there is no older checkpoint" if older is None else f"its newest checkpoint is of step {older}"
    return (
        f"the model of step {trainer.state.step} is NOT on disk: {saver.problem}; {kept}. Make room, then "
        f"{'start again' if older is None else f'--resume {run}'}"
    )


def farewell(trainer: Trainer, summary: dict[str, Any], done: bool) -> None:
    """The end: what came out, a sample, the plot, and what to type next."""
    reporter, run, ranks = trainer.rank.reporter, trainer.rank.ownership.run, summary["ranks"]
    settings = trainer.config
    if not done:
        reporter.say(f"stopped at step {summary['steps']}; go on with  mpirun -n {ranks} python -m dllm.train --resume {run}")
        return
    speed = summary["tokens_per_second"]
    parts = [f"{summary['steps']} steps in {summary['wall_seconds']:.0f} s"]
    exhausted = trainer.rank.validation.exhausted(trainer.state)
    if not trainer.taken:
        further = "a larger train.patience" if exhausted else "--set train.epochs=N"
        parts = [f"nothing was left to do, all {summary['steps']} steps were done before; {further} goes further"]
    units = blocks.units(settings.model)
    parts += [f"{speed:,.0f} {units.read}/s", f"{summary['gflops']:.1f} GFLOP/s"] if speed else []
    best, loss = summary["best_valid_perplexity"], summary["best_valid_loss"]
    parts += [f"best validation perplexity {best:.2f}"] if best and best < 1e6 else []
    parts += [f"best validation loss {loss:.4f}"] if loss is not None and not units.text else []
    if exhausted and trainer.taken:
        parts.append(f"ended early, since {trainer.state.stale} evaluations brought nothing better")
    reporter.say("done       " + ", ".join(parts))
    text = settings.model.kind in ("lm", "seq2seq") and not trainer.corpus.tokenizer.rate
    if settings.log.sample and text and not settings.data.private:  # it might repeat another site's
        reporter.say("sample\n" + _sample(trainer))
    reporter.say(f"plot       {reporter.plot()}")
    if trainer.corpus.tokenizer.pairs:
        reporter.say(f"next       python -m dllm.generate {run} --source '...', or dllm.evaluate {run} --pairs")
        return
    if trainer.corpus.labels:
        reporter.say(f"next       python -m dllm.evaluate {run}, or dllm predict {run} FILE")
        return
    if trainer.corpus.tokenizer.rate and settings.model.kind == "lm":
        reporter.say(f"generate   python -m dllm.generate {run} --out sound.wav")
        return
    if settings.model.kind != "lm":
        reporter.say(f"next       {model_card.command(settings.model.kind, str(run), False)}")
        return
    prompt = trainer.config.log.prompt or "..."
    reporter.say(f"generate   python -m dllm.generate {run} --prompt '{prompt}'")


def _sample(trainer: Trainer) -> str:
    settings, corpus = trainer.config, trainer.corpus
    options: dict[str, Any] = {"theta": trainer.state.theta, "training": False}
    try:
        if corpus.tokenizer.pairs:
            pairs = _sample_pairs(corpus)
            window = max(settings.train.window, *(len(pair.source) for pair in pairs))
            model = make_model(trainer.rank.layout, window, SAMPLE_PAIRS, **options)
            text = "\n".join(_answered(corpus, model, settings, pairs))
        else:
            decoder = Decoder(LanguageModel(trainer.rank.layout, settings.train.window, 1, **options), 1)
            prompt = start_tokens(corpus.tokenizer, settings.log.prompt)
            tokens = list(sample(decoder, prompt, settings.log.sample, Sampling(temperature=0.7, seed=settings.train.seed)))
            text = corpus.tokenizer.decode([*prompt, *tokens]).decode(errors="replace").strip("\n")
    except UserError as error:  # the run is done, whatever became of the model
        return f"  | {error}"
    return "\n".join("  | " + line for line in text.splitlines())


def _sample_pairs(corpus: Corpus) -> list[Pair]:
    """The first pairs of the validation split, or of the training one. Raises UserError."""
    return read_split(corpus, "valid" if "valid" in corpus.manifest["splits"] else "train", SAMPLE_PAIRS)


def _answered(corpus: Corpus, model: Model, settings: Config, pairs: Sequence[Pair]) -> Iterator[str]:
    """The sources of pairs with the targets that the model gives them."""
    tokenizer = corpus.tokenizer
    how = Answering(tokenizer=tokenizer, lanes=SAMPLE_PAIRS, limit=settings.log.sample)
    sources = [pair.source for pair in pairs]
    for source, (best, *_) in zip(sources, how.search(streams_of(model, tokenizer, SAMPLE_PAIRS), sources), strict=True):
        yield f"{as_text(tokenizer, source)} -> {as_text(tokenizer, best.tokens)}"
