"""Train a language model over all ranks: mpirun -n N python -m dllm.train."""

import contextlib
import signal
import sys
import time

from . import __version__, cli, config
from .comm import runtime
from .comm.node_info import find_node, leader_first
from .errors import BAD_INPUT, DONE, STOPPED_EARLY, UserError
from .model.precision import check_precision
from .training.options import train_config, train_options

SAMPLE_PAIRS = 3  # that the sample at the end answers


def main(argv=None):
    stopping = []
    signal.signal(signal.SIGUSR1, lambda *_: stopping.append(True))  # at once: a rank that is only starting must not die of it
    comm = runtime.world()
    return cli.run(lambda argv: train(argv, comm, stopping), argv, comm)


def train(argv, comm, stopping):
    begin = time.monotonic()
    with runtime.together(comm):
        options = train_options(argv, comm.rank)
        configuration = train_config(options)
        check_precision(configuration.train.precision)
    place = find_node(comm, configuration.train.threads)

    from .data.preparation import open_corpus
    from .runs import checkpoint, run_folder
    from .runs.ownership import Claim
    from .training import progress
    from .training.trainer import Trainer
    from .training.warmup import code_hash, warm_up

    facts = {"code": code_hash(), "--resume": options.resume, "--max-steps": options.max_steps}
    runtime.check_same(comm, facts | config.flat(configuration))  # before anything communicates by them
    reporter = progress.Reporter(comm.rank == 0, options.progress)
    with runtime.together(comm):
        run = options.resume or (run_folder.new_name(options.out, options.preset or "default") if comm.rank == 0 else None)
        resume, warnings = checkpoint.intact(run) if options.resume else (None, [])
    claim = comm.bcast(Claim.of_this_job(run) if comm.rank == 0 else None)
    run = claim.run
    for warning in warnings:
        reporter.warn(warning)
    corpus = open_corpus(comm, place, configuration.data.path, reporter.say)
    if resume:
        runtime.agree(comm, corpus.check_vocabulary, resume.manifest["tokenizer"], run)
    compiling = time.monotonic()
    with leader_first(place):
        warm_up(configuration)
    compiling = time.monotonic() - compiling
    trainer = Trainer(comm, place, configuration, corpus, claim, reporter, resume)
    with runtime.together(comm):  # only now: a refused command leaves nothing behind and changes nothing
        if comm.rank == 0:
            run_folder.make(run, configuration, corpus.tokenizer)
            claim.take()
    reporter.say(_header(comm, place, trainer, corpus, run, compiling, time.monotonic() - begin, resume))
    reporter.begin(run, trainer.state.step, trainer.total_steps)
    if comm.rank == 0:
        run_folder.not_done(run)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.append(True))
    trainer, done, summary = _run(trainer, options, stopping)
    return _finish(trainer, done, summary)


def _run(trainer, options, stopping):
    """Train through all deaths that can be survived. Returns the last Trainer, whether it came to its end, its summary."""
    from mpi4py import MPI

    while True:
        try:
            done = trainer.run(options.max_steps, options.max_seconds, lambda: bool(stopping))
            return trainer, done, trainer.summary()
        except MPI.Exception:
            if not trainer.resilient:
                raise
            trainer = _go_on(trainer, options)
        except UserError as error:
            trainer.saver.abandon()
            if not trainer.deaths or not error.shared:
                raise
            trainer.reporter.warn(str(error))
            runtime.finish(trainer.comm, BAD_INPUT)


def _finish(trainer, done, summary):
    """What is left to write and to say. Returns the exit code."""
    from .runs import run_folder

    comm, reporter, run = trainer.comm, trainer.reporter, trainer.claim.run
    trainer.close()
    reporter.end()
    reporter.summarise(summary)
    if reporter.mode != "none":
        _farewell(reporter, trainer, summary, done)
    code = DONE if done else STOPPED_EARLY
    if comm.rank == 0 and done and trainer.claim.holds():
        try:
            run_folder.done(run, summary["steps"])
        except OSError as error:
            reporter.warn(f"cannot write {run}/DONE: {error.strerror}; a launcher will not know that the run is done")
    runtime.finish(comm, code if trainer.deaths else None)
    return code


def _go_on(trainer, options):
    """After a death: the survivors' Trainer, at the last step that all of them had finished. Collective over the survivors."""
    from mpi4py import MPI

    from .comm import recovery
    from .training.progress import Reporter
    from .training.trainer import Trainer

    begin, settings, run = time.monotonic(), trainer.config, trainer.claim.run
    trainer.reporter.end()
    try:
        while True:
            comm, survived, dead = trainer.survive()
            if comm.size < settings.resilience.min_ranks:
                raise recovery.GiveUp(f"{comm.size} ranks are left, fewer than resilience.min_ranks")
            successor = None
            with recovery.watchdog(), contextlib.suppress(MPI.Exception):
                reporter = Reporter(comm.rank == 0, options.progress, trainer.reporter)
                place = find_node(comm, trainer.place.threads)
                successor = Trainer(comm, place, settings, trainer.corpus, trainer.claim, reporter, survived=survived)
            if recovery.all_agree(comm, successor is not None):
                break
            comm.Revoke()  # another death meanwhile: once more from where we were
    except recovery.GiveUp as problem:
        trainer.reporter.complain(f"rank {trainer.comm.rank}: {problem}; go on with --resume {run}")
        runtime.die()
    except UserError as problem:  # such as text that only the dead rank had
        if comm.rank == 0:
            trainer.reporter.complain(str(problem))
        runtime.leave(BAD_INPUT)
    step = successor.state.step
    reporter.begin(run, step, successor.total_steps)
    ranks = f"rank{'s' if len(dead) > 1 else ''} {', '.join(map(str, dead))} of {trainer.comm.size} died"
    reporter.warn(f"{ranks}; {comm.size} go on from step {step}, {time.monotonic() - begin:.2f} s later")
    successor.deaths = trainer.deaths + len(dead)
    return successor


def _header(comm, place, trainer, corpus, run, compiling, starting, resume):
    """Ten lines that say what is about to happen."""
    model, train = trainer.config.model, trainer.config.train
    schedule, tokens = trainer.schedule, corpus.manifest["splits"]["train"]["tokens"]
    parameters = trainer.layout.parameters
    kind = "one-hot" if not model.embedding else f"{'tied ' if model.tied else ''}embedding {model.embedding}"
    lines = {
        f"dllm {__version__}": f"{comm.size} ranks x {place.threads} threads, {place.cores} cores, {runtime.mpi_library()}",
        "data": f"{corpus.folder}  {tokens:,} {corpus.tokenizer.kind} tokens, vocabulary {corpus.vocabulary:,}",
        "lanes": f"{train.lanes} of {trainer.lanes.length:,} tokens, {len(trainer.mine)} here; windows of {train.window}",
        "model": f"{kind}, {model.layers} x {model.hidden} LSTM, dropout {model.dropout:g}: {parameters:,} parameters",
        "training": f"{train.optimizer}, lr {train.lr:g} {train.schedule}, clip {train.clip or 'none'}, {train.precision}",
        "length": f"{trainer.total_steps:,} steps, {schedule.windows:,} an epoch of {schedule.per_epoch:,} tokens",
        "averaging": trainer.averaging.describe(),
        "run": f"{run}  {f'going on from step {trainer.state.step}' if resume else 'config.toml, metrics.jsonl, checkpoints/'}",
        "start": f"{starting:.1f} s, of which {compiling:.1f} s compiling or loading kernels",
    }
    return "\n".join(f"{name:11}{text}" for name, text in lines.items())


def _farewell(reporter, trainer, summary, done):
    """The end: what came out, a sample, the plot, and what to type next."""
    run, ranks = trainer.claim.run, summary["ranks"]
    if not done and not trainer.saver.whole:
        reporter.say(f"stopped at step {summary['steps']} without a checkpoint of it; older ones, if any, are in {run}")
        return
    if not done:
        reporter.say(f"stopped at step {summary['steps']}; go on with  mpirun -n {ranks} python -m dllm.train --resume {run}")
        return
    speed = summary["tokens_per_second"]
    parts = [f"{summary['steps']} steps in {summary['wall_seconds']:.0f} s"]
    parts += [f"{speed:,.0f} tokens/s", f"{summary['gflops']:.1f} GFLOP/s"] if speed else []
    best = summary["best_valid_perplexity"]
    parts += [f"best validation perplexity {best:.2f}"] if best else []
    reporter.say("done       " + ", ".join(parts))
    if trainer.config.log.sample:
        reporter.say("sample\n" + _sample(trainer))
    plot = reporter.plot()
    reporter.say(f"plot       {plot}" if plot else "plot       pip install matplotlib draws loss.png next time")
    if trainer.corpus.tokenizer.pairs:
        reporter.say(f"next       python -m dllm.generate {run} --source '...', or dllm.evaluate {run} --pairs")
        return
    prompt = trainer.config.log.prompt or "..."
    reporter.say(f"generate   python -m dllm.generate {run} --prompt '{prompt}'")


def _sample(trainer):
    from .inference.generation import Sampling, sample, start_tokens
    from .model.decoder import Decoder
    from .model.language_model import LanguageModel

    settings, corpus = trainer.config, trainer.corpus
    model = LanguageModel(trainer.layout, settings.train.window, 1, theta=trainer.state.theta, training=False)
    decoder = Decoder(model, SAMPLE_PAIRS)
    try:
        if corpus.tokenizer.pairs:
            text = "\n".join(_pairs(corpus, decoder, settings.log.sample))
        else:
            prompt = start_tokens(corpus.tokenizer, settings.log.prompt)
            tokens = list(sample(decoder, prompt, settings.log.sample, Sampling(temperature=0.7, seed=settings.train.seed)))
            text = corpus.tokenizer.decode([*prompt, *tokens]).decode(errors="replace").strip("\n")
    except UserError as error:  # the run is done, whatever became of the model
        return f"  | {error}"
    return "\n".join("  | " + line for line in text.splitlines())


def _pairs(corpus, decoder, limit):
    """The first sources of the validation split, or of the training one, with the targets that the model gives them."""
    from .inference.answering import answers, as_text, read_split

    tokenizer, split = corpus.tokenizer, "valid" if "valid" in corpus.manifest["splits"] else "train"
    sources = [source for source, _, _ in read_split(corpus, split, SAMPLE_PAIRS)]
    for source, target in zip(sources, answers(decoder, tokenizer, sources, limit), strict=True):
        yield f"{as_text(tokenizer, source)} -> {as_text(tokenizer, target)}"


if __name__ == "__main__":
    sys.exit(main())
