"""Train a language model over all ranks: mpirun -n N python -m dllm.train."""
import datetime
import pathlib
import signal
import sys
import time

from . import __version__, cli, config, storage
from .comm import runtime
from .errors import DONE, STOPPED_EARLY, UserError

EPILOG = """
examples
  mpirun -n 8 python -m dllm.train                                  the embedded corpus: Python's standard library
  mpirun -n 8 python -m dllm.train --data DIR --preset wlm-200      a corpus made by dllm.prepare, a published recipe
  mpirun -n 4 python -m dllm.train --data 'DIR/site{rank}'          private text: each rank reads its own folder only
  mpirun -n 3 python -m dllm.train --resume RUN                     go on from RUN's newest checkpoint, on any number of ranks
  mpirun -n 2 python -m dllm.train --set model.hidden=512 --set train.lr=0.001

SIGUSR1, SIGTERM or Ctrl-C: the step is finished, a checkpoint written, exit code 75.
Every key that --set takes is in the header of config.toml in any run's folder; dllm/config.py says what each does.
"""


def arguments(argv, rank=0):
    parser = cli.Parser("train", __doc__, EPILOG, rank)
    parser.add_argument("--preset", default=None, metavar="NAME", help="; ".join(config.preset_names()))
    parser.add_argument("--config", metavar="FILE", help="a TOML file, laid over the preset")
    parser.add_argument("--data", metavar="DIR", help="folder made by dllm.prepare; {rank} in it: one for each rank")
    parser.add_argument("--out", metavar="RUN", help="new folder for the run (default: runs/PRESET-DATE-TIME)")
    parser.add_argument("--resume", metavar="RUN", help="go on with this run")
    parser.add_argument("--max-steps", type=cli.at_least(1), default=0, metavar="N", help="end when N steps are done")
    parser.add_argument("--max-seconds", type=cli.at_least(0.001, float), default=0, metavar="S", help="end after S seconds")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="any setting; may be repeated")
    parser.add_argument("--progress", choices=("auto", "live", "plain", "none"), default="auto", help="default: auto")
    options = parser.parse_args(argv)
    if options.resume and (options.preset or options.config or options.out):
        parser.error("--resume brings its own configuration and folder: leave out --preset, --config and --out")
    return options


def settings(options):
    """The Config of the command line, and that of the run which is resumed."""
    extra = config.parse_settings(options.set)
    if options.data:
        extra.setdefault("data", {})["path"] = options.data
    if options.resume:
        path = pathlib.Path(options.resume, "config.toml")
        if not path.exists():
            raise UserError(f"--resume {options.resume}: there is no run there (no config.toml)")
        return config.from_dict(config.merge(config.load_toml(path), extra))
    sections = config.load_toml(config.preset_path(options.preset or "default"))
    if options.config:
        sections = config.merge(sections, config.load_toml(options.config))
    return config.from_dict(config.merge(sections, extra))


def main(argv=None):
    comm = runtime.world()
    return cli.run(lambda argv: train(argv, comm), argv, comm)


def train(argv, comm):
    begin = time.monotonic()
    stopping = []
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.append(True))
    with runtime.together(comm):
        options = arguments(argv, comm.rank)
        configuration = settings(options)
    place = runtime.node(comm)
    threads = configuration.train.threads or place.threads

    import threadpoolctl

    from . import checkpoint, report
    from .corpus import embedded
    from .data.shards import Corpus
    from .training import Trainer, warm_up

    place.threads = threads
    threadpoolctl.threadpool_limits(threads)
    silent = options.progress == "none"
    early = report.Reporter(comm.rank == 0 and not silent)
    with runtime.together(comm):
        run = _run_folder(options, comm.rank)
        resume = checkpoint.intact(run) if options.resume else None
    run = comm.bcast(run)
    if resume:
        resume, warnings = resume
        for warning in warnings:
            early.warn(warning)
    path = configuration.data.path
    if not path:
        path = embedded(comm, place.comm, "bpe", 2048, early.say)
    with runtime.together(comm):
        corpus = Corpus(str(path).replace("{rank}", str(comm.rank)))
        if resume and resume.manifest["tokenizer"] != corpus.tokenizer_hash:
            raise UserError(f"the vocabulary of {corpus.folder} is not the one that {run} was trained with")
    begin_compiling = time.monotonic()
    with runtime.leader_first(place):
        warm_up(configuration)
    compiling = time.monotonic() - begin_compiling

    with runtime.together(comm):
        if comm.rank == 0:
            _make_run(run, configuration, corpus, options.resume)
    try:
        reporter = report.Reporter(comm.rank == 0, run, options.progress)
        trainer = Trainer(comm, place, configuration, corpus, run, reporter, resume)
    except UserError:
        _unmake_run(run, comm, options.resume)
        raise
    early.say(_header(comm, place, trainer, corpus, run, compiling, time.monotonic() - begin, resume))
    reporter.begin(trainer.state.step, trainer.total_steps)
    done = trainer.run(options.max_steps, options.max_seconds, lambda: bool(stopping))
    reporter.end()
    summary = trainer.summary()
    reporter.summarise(summary)
    if comm.rank == 0 and not silent:
        _farewell(reporter, trainer, summary, done)
    runtime.finish(comm)
    return DONE if done else STOPPED_EARLY


def _run_folder(options, rank):
    """The run's folder; a new one must not exist yet."""
    if options.resume:
        return options.resume
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    run = options.out or f"runs/{options.preset or 'default'}-{stamp}"
    if rank == 0 and pathlib.Path(run).exists():
        raise UserError(f"--out {run} exists; choose another name, or go on with it by --resume {run}")
    return run


def _make_run(run, configuration, corpus, resumed):
    import tomli_w

    from .data.shards import save_tokenizer

    try:
        pathlib.Path(run).mkdir(parents=True, exist_ok=True)
        storage.write_text(pathlib.Path(run, "config.toml"), tomli_w.dumps(config.as_dict(configuration)))
        if not resumed:
            save_tokenizer(run, corpus.tokenizer)
    except OSError as error:
        raise UserError(f"cannot write to the run folder {run}: {error.strerror}") from None


def _unmake_run(run, comm, resumed):
    """A run that could not begin leaves nothing behind."""
    if comm.rank == 0 and not resumed:
        for name in ("config.toml", "tokenizer.json"):
            pathlib.Path(run, name).unlink(missing_ok=True)
        pathlib.Path(run).rmdir()


def _header(comm, place, trainer, corpus, run, compiling, starting, resume):
    """Ten lines that say what is about to happen."""
    settings, model, train = trainer.config, trainer.config.model, trainer.config.train
    split = corpus.manifest["splits"]["train"]
    what = "one-hot" if not model.embedding else f"{'tied ' if model.tied else ''}embedding {model.embedding}"
    pace = f"{trainer.schedule.per_epoch:,} tokens in {trainer.schedule.windows:,} steps an epoch"
    return f"""\
dllm {__version__}: {comm.size} rank{"s" * (comm.size > 1)}, {place.threads} thread{"s" * (place.threads > 1)} each, {runtime.library()}
data       {corpus.folder}  {split["tokens"]:,} {corpus.tokenizer.kind} tokens, vocabulary {corpus.vocabulary:,}
lanes      {train.lanes} of {trainer.lanes.length:,} tokens, {len(trainer.mine)} on this rank, windows of {train.window}: {pace}
model      {what}, {model.layers} x {model.hidden} LSTM, dropout {model.dropout}: {trainer.layout.size:,} parameters, {train.precision}
training   {train.optimizer}, lr {train.lr} {train.schedule}, clip {train.clip or "none"}, {trainer.total_steps:,} steps
averaging  {settings.averaging.method} in {len(trainer.averaging.buckets)} buckets while backward runs
run        {run}  {f"going on from step {trainer.state.step}" if resume else "config.toml, metrics.jsonl, checkpoints/"}
start      {starting:.1f} s, of which {compiling:.1f} s compiling or loading kernels"""


def _farewell(reporter, trainer, summary, done):
    """The end: what came out, a sample, the plot, and what to type next."""
    run, ranks = trainer.run_folder, summary["ranks"]
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
    reporter.say(f"generate   python -m dllm.generate {run} --prompt 'def main('")


def _sample(trainer):
    from .inference import sample
    from .model import LanguageModel

    settings, corpus = trainer.config, trainer.corpus
    model = LanguageModel(
        settings.model, corpus.vocabulary, trainer.dtype, settings.train.window, 1, trainer.state.theta, training=False
    )
    prompt = corpus.tokenizer.encode((settings.log.prompt or "\n").encode(), end=False)
    tokens = list(sample(model, prompt, settings.log.sample, seed=settings.train.seed, temperature=0.7))
    text = corpus.tokenizer.decode([*prompt, *tokens]).decode(errors="replace").strip("\n")
    return "\n".join("  | " + line for line in text.splitlines())


if __name__ == "__main__":
    sys.exit(main())
