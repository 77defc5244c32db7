"""Turn text, pairs of texts, or texts with labels into a corpus of tokens in HDF5 shards. Under mpirun ranks share it."""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import cli, config
from .comm import messages, runtime
from .data import audio, source_names, text
from .data.checked_tokens import LONGEST_LIST
from .data.corpus import Corpus
from .data.drawing import Drawing
from .data.forms import LABELLED, RECORDED, SPLITS, files_of, form_of, named, named_file, option
from .data.label_names import check_options, public_names
from .data.labelling import Classing, Tagging
from .data.lane_kinds import PRESETS
from .data.new_folder import left_over
from .data.pair_order import LEAST_SHARE
from .data.pairs import Pairing
from .data.preparation import prepare_corpus
from .data.private_counts import LARGEST_EPSILON, LEAST_EPSILON, MOST_UNITS, UNITS_PER_EXAMPLE, PrivateCounting
from .data.recordings import Recordings, Transcribing
from .data.sources import Reading, plain_files
from .data.tokenizer_files import load_tokenizer
from .data.tokenizers import KINDS, OF_SOUND, Tokenizer
from .data.vocabulary import Vocabulary
from .errors import DONE, UserError
from .files import storage

if TYPE_CHECKING:
    from mpi4py import MPI

OF_ALL = (  # the same on all ranks
    "tokenizer", "vocab_size", "epsilon", "words_per_line", "share_vocabulary", "deal", "copies", "field", "keep_bytes",
    "valid_fraction", "test_fraction", "longest", "seed", "tag_column", "rate", "augment", "labels", "share_labels",
)  # fmt: skip
EPILOG = """
examples
  python -m dllm.prepare --train book.txt --tokenizer char --out data/book
  mpirun -n 8 python -m dllm.prepare --train *.txt --valid held-out/*.txt --tokenizer bpe --vocab-size 8192 --out data/web
  python -m dllm.prepare --train 'crawl/*.jsonl.zst' --field text --valid-fraction 0.01 --tokenizer bpe --out data/crawl
  mpirun -n 4 python -m dllm.prepare --train 'texts/site{rank}.txt' --tokenizer-from data/web --out 'data/site{rank}'
  mpirun -n 4 python -m dllm.prepare --train 'texts/site{rank}.txt' --tokenizer bpe --epsilon 2 --out 'data/site{rank}'
  mpirun -n 4 python -m dllm.prepare --classes 'site{rank}.tsv' --labels good,bad --tokenizer byte --out 'data/site{rank}'
  mpirun -n 8 python -m dllm.prepare --train *.txt --deal dirichlet --alpha 0.3 --tokenizer char --out 'data/part{rank}'
  python -m dllm.prepare --pairs train.en train.de --valid-pairs valid.en valid.de --tokenizer bpe --out data/en-de
  python -m dllm.prepare --audio recordings --valid-audio held-out --tokenizer mulaw --out data/sound
  python -m dllm.prepare --transcripts train.tsv --valid-transcripts valid.tsv --tokenizer mel --augment 3 --out data/speech
  python -m dllm.prepare --tags train.conllu --valid-tags dev.conllu --tokenizer bpe --out data/tags
  python -m dllm.prepare --class pos=pos.txt --class neg=neg.txt --valid-fraction 0.1 --tokenizer-from RUN --out data/reviews

With {rank} in --out every rank prepares its own private text, and only its owner can read what is written. All folders get
one vocabulary. Rare words may be names or numbers of people, so say where it comes from:
  --tokenizer byte       fixed: nothing travels
  --tokenizer-from DIR   that of a corpus, a run or a model, made of text that may be known: nothing travels
  --epsilon E            a private count: each line counts at most --words-per-line words, drawn at random, and every rank
                         adds noise and drops rare words before anything leaves it. What is told is (E, 1e-6)-differentially
                         private for a line, or a pair. A small E tells less and needs more text; 1 is strict, 8 is loose
  --share-vocabulary     all words and their counts go to rank 0, and into everybody's vocabulary

To try what uneven text does, --deal cuts up text that all ranks can read: evenly, by whole files, or each file by shares
drawn from Dirichlet(alpha); valid and test text always evenly.

Text is named by files, folders, patterns in quotes, named pipes, - for standard input (of one rank), ipfs://, swarm://, or an
URL that fsspec knows. What is packed by gzip, xz, bzip2 or Zstandard is unpacked, whatever its name. With --field it is JSON
lines or Parquet, a document a record, and each document ends with a line. What is no plain file is written to one beside --out
for the time being: it takes disk, and little memory. Zstandard, Parquet and URLs need pip install 'dllm[inputs]'.

--tokenizer byte takes any file as it is. The others take UTF-8: a byte-order mark is dropped, CR LF is one line end, and a line
ends between two files. --keep-bytes keeps all that. --valid-fraction and --test-fraction hold out whole documents, lines of
plain text, or pairs, the same ones on any number of ranks; of a novel better hold out a chapter, as a file.

Hosts need not share a disk: then each shard lies on --copies of their disks, and all have the manifest and the vocabulary.
Splits of at most 64 MiB of tokens lie on every disk. All ranks read all text, so it must be on every host, at the same place.
Private text is never copied.

Pairs are for translation, summaries, questions and answers: line i of SRC belongs to line i of TGT. They are shuffled by
--seed, and only targets are predicted. Pairs of which a side is empty are left out. --vocab-size counts tokens of text; two
more, between and behind the two sides, have no spelling: text with <sep> in it is text.

Tags are of words, in CoNLL-U or in columns between tabs or white space: a word a line, an empty line behind each sentence.
--tag-column counts from 1; without it, it is 4 of CoNLL-U (UPOS) and else the last. Words of a sentence are joined by single
spaces, and the tag stands on a word's first token. Classes are of texts, one a line: --classes has a label and a tab before
each, --class LABEL=FILE one label for a file. Both are shuffled by --seed, and --tokenizer-from RUN takes the vocabulary of a
language model that is to lie beneath. Labels are those of the train text of all ranks, or of --labels. In a wrong column they
are the text itself, so say of private text where their names come from:
  --class LABEL=FILE     has named them: nothing travels
  --labels A,B,C|FILE    a list, or a file with one a line; of transcripts the letters in it: nothing travels but its hash
  --share-labels         those of the train text, at most 256 of 64 characters, go to all ranks, without how many there are

tokenizers
  byte   256 tokens; exact for any file: marks, CR LF and ends of files stay as they are
  char   one token a character of the train text
  word   words between white space and an <eos> a line; rare ones become <unk> where --vocab-size limits them
  bpe    byte-pair encoding over bytes, exact; --vocab-size from 256, default 4096
  mulaw  256 levels of sound: WAV files, or FLAC with pip install 'dllm[audio]', at --rate, one behind the other
  mel    no tokens but frames: 100 a second of 40 log-mel bands of recordings, for --classes, --class and --transcripts
"""


def arguments(argv: Sequence[str], rank: int = 0) -> tuple[argparse.Namespace, dict[str, list[Any]]]:
    """The options, and {split: paths}, with --pairs {split: (source, target) paths}. Raises UserError."""
    parser = cli.Parser("prepare", __doc__, EPILOG, rank)
    for split in SPLITS:
        sound = "--audio" if split == "train" else f"--{split}-audio"
        parser.add_argument(
            f"--{split}",
            sound,
            nargs="+",
            default=[],
            metavar="FILE",
            action=_Files,
            help=f"{split} text, or recordings for mulaw",
        )
    _add_reading(parser)
    for split in SPLITS:
        parser.add_argument(
            option("pairs", split), nargs=2, action="append", default=[], metavar=("SRC", "TGT"),
            help=f"{split} pairs; may be repeated",
        )  # fmt: skip
    _add_labels(parser)
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--tokenizer", choices=list(KINDS), help="the kind of one that is made here")
    tokenizer.add_argument("--tokenizer-from", metavar="DIR", help="take that of a corpus, a run or a model, as it is")
    parser.add_argument("--vocab-size", type=cli.at_least(1), default=0, metavar="N", help="at most N tokens")
    epsilon, words = cli.at_least(LEAST_EPSILON, float, LARGEST_EPSILON), cli.at_least(1, most=MOST_UNITS)
    parser.add_argument("--epsilon", type=epsilon, metavar="E", help="private text: count with noise, so that little is told")
    parser.add_argument(
        "--words-per-line", type=words, metavar="M", help=f"with --epsilon: at most so many count (default {UNITS_PER_EXAMPLE})"
    )
    parser.add_argument("--share-vocabulary", action="store_true", help="private text: send all words and counts to rank 0")
    parser.add_argument("--deal", choices=("evenly", "files", "dirichlet"), help="whose text is whose, with {rank} in --out")
    parser.add_argument("--alpha", type=cli.at_least(1e-3, float), default=1.0, help="dirichlet; small: uneven (default 1)")
    parser.add_argument("--seed", type=cli.at_least(0), default=1, metavar="S", help="dirichlet, order, fractions (default 1)")
    parser.add_argument(
        "--longest",
        type=cli.at_least(3),
        default=0,
        metavar="N",
        help="leave out pairs, texts, recordings of more tokens or frames",
    )
    parser.add_argument(
        "--copies", type=cli.at_least(0, most=1000), default=config.StorageConfig.copies, metavar="K",
        help="disks that have each shard, where hosts share none (default %(default)s; 0: no copies)",
    )  # fmt: skip
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder for the corpus")
    options = parser.parse_args(argv)
    splits = _splits(parser, options, rank)
    options.alone = config.is_private(options.out) and not options.deal
    _check_vocabulary(parser, options)
    check_options(parser, options)
    return options, splits


class _Files(argparse.Action):
    """Files of a split; `options.audio`: some of them were given as recordings."""

    def __call__(
        self, parser: argparse.ArgumentParser, options: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        setattr(options, self.dest, values)
        options.audio = getattr(options, "audio", False) or "-a" in (option_string or "")


def _add_labels(parser: cli.Parser) -> None:
    for split in SPLITS:
        for form, what in (
            ("tags", "text, words with tags"), ("classes", "text, lines of LABEL TAB TEXT; with mel LABEL TAB RECORDING"),
            ("transcripts", "recordings, lines of TRANSCRIPT TAB RECORDING"),
        ):  # fmt: skip
            parser.add_argument(option(form, split), nargs="+", default=[], metavar="FILE", help=f"{split} {what}")
        parser.add_argument(
            option("class", split), action="append", default=[], metavar="LABEL=FILE",
            help=f"{split} text of a class, one a line, or with mel a recording; may be repeated",
        )  # fmt: skip
    parser.add_argument(
        "--tag-column", type=cli.at_least(1), default=0, metavar="N", help="where tags stand (default: UPOS, or last)"
    )
    parser.add_argument(
        "--labels", metavar="A,B,C|FILE", help="all labels, or a file with one a line (default: of the train text)"
    )
    parser.add_argument("--share-labels", action="store_true", help="private text: tell all ranks the names of its labels")


def _add_reading(parser: cli.Parser) -> None:
    share = cli.at_least(LEAST_SHARE, float, 0.5)
    parser.add_argument("--files-from", metavar="LIST", help="a file that names train text, one a line, behind --train")
    parser.add_argument("--field", default="", metavar="NAME", help="text is JSON lines or Parquet; this field is read")
    parser.add_argument(
        "--keep-bytes",
        action="store_true",
        help="keep byte-order marks, CR LF and a missing last line end, as byte always does",
    )
    rate = cli.at_least(audio.LEAST_RATE, most=audio.MOST_RATE)
    parser.add_argument("--rate", type=rate, metavar="HZ", help=f"of mulaw, mel: samples a second (default {audio.RATE})")
    parser.add_argument(
        "--augment", type=cli.at_least(0, most=1000), default=0, metavar="N",
        help="of mel: train on N more of each recording, with other pitch, speed, noise and ends, drawn by --seed",
    )  # fmt: skip
    for split in SPLITS[1:]:
        parser.add_argument(
            f"--{split}-fraction", type=share, default=0.0, metavar="F",
            help=f"take {split} from train: this share of the documents, lines or pairs, drawn by --seed",
        )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the command. Collective."""
    return cli.collective(prepare, argv)


def prepare(argv: Sequence[str], comm: MPI.Comm) -> int:
    """Exit code once the corpus is there. Collective. Raises UserError."""
    with runtime.together(comm):
        options, splits = arguments(argv, comm.rank)
    runtime.check_same(comm, {"--" + name.replace("_", "-"): str(getattr(options, name)) for name in OF_ALL})
    private, alone = config.is_private(options.out), options.alone
    if alone:
        storage.owner_only()
    with runtime.together(comm):
        splits = {name: named(paths, comm.rank) for name, paths in splits.items()}
    if not alone:
        runtime.check_same(comm, {f"list of {name} files": paths for name, paths in splits.items()})
    out = config.path_of_rank(options.out, comm.rank)
    held_out = {"valid": options.valid_fraction, "test": options.test_fraction}
    held_out = {name: share for name, share in held_out.items() if share}
    sound = runtime.agree(comm, _sound, options, comm.rank)
    names = runtime.agree(comm, public_names, options, comm.rank)
    drawing = _drawing(options, held_out, sound is not None, names)
    rate = sound.rate if sound and not sound.bands else 0
    reading = Reading(options.field, options.keep_bytes, {} if drawing else held_out, options.seed, rate)
    above = pathlib.Path(os.path.abspath(out if alone else options.out)).parents
    near = next((path for path in above if not config.is_private(str(path))), pathlib.Path(os.sep))

    def say(text: str) -> None:
        if comm.rank == 0:
            print(text, flush=True)

    for path in left_over(pathlib.Path(out), near):
        cli.warn_once(comm)(f"a prepare that crashed has left {path} more than a day ago; it may be removed")
    with plain_files(comm, splits, near, reading, alone, say) as files:
        if options.deal:
            files = runtime.agree(comm, text.deal, files, comm.size, options.deal, options.alpha, options.seed)[comm.rank]
        prepare_corpus(comm, files, _vocabulary(options, comm.rank), out, private, say, drawing, options.copies)
    corpus = runtime.agree(comm, Corpus, out)
    entries = corpus.manifest["splits"]
    counts = ", ".join(f"{name} {entry['tokens']:,}" for name, entry in entries.items())
    say(f"{out}: {counts} {corpus.tokenizer.kind} tokens, vocabulary {corpus.vocabulary:,}")
    if private:
        size = np.array([entries["train"]["tokens"]])
        of_each = ""
        if options.deal:  # the size of a site that has text of its own is nobody else's business
            least, most = (abs(int(messages.largest(comm, sign * size)[0])) for sign in (-1, 1))
            of_each = f" a rank {least:,} to {most:,},"
        say(f"train tokens:{of_each} {messages.total(comm, size)[0]:,} in all")
    recipe = ""
    if drawing:
        unit = drawing.unit
        say(f"{unit}s: " + ", ".join(f"{name} {entry[drawing.counted]:,}" for name, entry in entries.items()))
        longest = int(messages.largest(comm, np.array([max(entry["longest"] for entry in entries.values())]))[0])
        preset = PRESETS[corpus.content]
        recipe = f" --preset {preset}"
        if corpus.labels:
            say(f"{len(corpus.labels)} labels: {', '.join(corpus.labels)}"[:LONGEST_LIST])
        if longest > config.resolve(preset).train.window and corpus.content != "classes":
            say(f"the longest {unit} has {longest:,} tokens, and a window must hold it; --longest leaves long ones out")
            recipe += f" --set train.window={longest}"
    say(f"train with  mpirun -n {comm.size if private else 8} python -m dllm.train --data '{options.out}'{recipe}")
    runtime.finish(comm)
    return DONE


def _drawing(options: argparse.Namespace, held_out: dict[str, float], recorded: bool, names: tuple[str, ...]) -> Drawing | None:
    """What to do with records; None: it is running text, or sound. names : of labels, where they are given"""
    seed, longest = options.seed, options.longest
    if recorded and options.form in RECORDED:
        kind = Transcribing if options.transcripts else Recordings
        return kind(seed, longest, held_out, names=names, copies=options.augment)
    if options.pairs:
        return Pairing(seed, longest, held_out)
    if options.tags:
        return Tagging(seed, longest, held_out, names=names, column=options.tag_column)
    return Classing(seed, longest, held_out, names=names) if options.form in LABELLED else None


def _vocabulary(options: argparse.Namespace, rank: int) -> Vocabulary:
    counting = None
    if options.epsilon:
        counting = PrivateCounting(options.epsilon, options.words_per_line or UNITS_PER_EXAMPLE)
    folder = config.path_of_rank(options.tokenizer_from or "", rank)
    rate = (options.rate or audio.RATE) if options.tokenizer in OF_SOUND else 0
    return Vocabulary(options.tokenizer or "", options.vocab_size, folder, counting, rate)


def _sound(options: argparse.Namespace, rank: int) -> Tokenizer | None:
    """How recordings are read; None: text is. Raises UserError where other options do not go with it."""
    if options.tokenizer_from:
        found, name = load_tokenizer(config.path_of_rank(options.tokenizer_from, rank)), options.tokenizer_from
    elif options.tokenizer in OF_SOUND:
        found, name = _vocabulary(options, rank).of_counts({}, False), f"--tokenizer {options.tokenizer}"
    else:
        found, name = Tokenizer(), f"--tokenizer {options.tokenizer}"
    if options.form == "transcripts" and not found.bands:
        raise UserError(f"--transcripts are of recordings, and {name} reads none: take --tokenizer mel")
    if options.augment and not found.bands:
        raise UserError(f"--augment is of recordings with labels, and {name} reads none: take --tokenizer mel")
    if getattr(options, "audio", False) and (found.bands or not found.rate):
        raise UserError(f"--audio is of recordings, and {name} makes no levels of them: take --tokenizer mulaw")
    if found.bands and options.form not in RECORDED:
        raise UserError(f"{name} makes frames of recordings with labels: give --classes, --class or --transcripts")
    if found.rate and not found.bands and (options.form != "text" or options.field):
        raise UserError(f"{name} makes levels of recordings: give --audio, and no --field")
    return found if found.rate else None


def _check_vocabulary(parser: cli.Parser, options: argparse.Namespace) -> None:
    """Raises UserError where a vocabulary of private text would tell of it and nobody has said so."""
    counted = not (options.tokenizer is None or KINDS[options.tokenizer].fixed)
    private = options.alone
    chosen = [name for name in ("epsilon", "share_vocabulary") if getattr(options, name)]
    if options.tokenizer_from == "":
        parser.error("--tokenizer-from names no folder")
    if options.tokenizer_from and options.vocab_size:
        parser.error("--vocab-size goes with --tokenizer: that of --tokenizer-from is taken as it is")
    if options.rate and options.tokenizer not in OF_SOUND:
        parser.error("--rate goes with --tokenizer mulaw or mel")
    if options.words_per_line and not options.epsilon:
        parser.error("--words-per-line goes with --epsilon")
    if len(chosen) > 1:
        parser.error(
            "give either --epsilon or --share-vocabulary: one tells little of the text, the other all words and counts"
        )
    for word in ("--" + name.replace("_", "-") for name in chosen):
        if not counted:
            parser.error(f"{word} goes with --tokenizer char, word or bpe: here nothing is counted")
        if not private:
            parser.error(f"{word} is for private text, with {{rank}} in --out and without --deal")
    if private and counted and not chosen:
        raise UserError(
            f"a vocabulary of --tokenizer {options.tokenizer} tells of private text: take --tokenizer byte, --tokenizer-from "
            "DIR (of public text) or --epsilon E (a private count); --share-vocabulary shares all words and counts"
        )


def _splits(parser: cli.Parser, options: argparse.Namespace, rank: int) -> dict[str, list[Any]]:
    """Raises UserError where options contradict each other."""
    form = options.form = form_of(parser, options)
    forms = ("classes", "class") if form in ("classes", "class") else (form,)
    for split in SPLITS[1:]:
        if getattr(options, f"{split}_fraction") and any(files_of(options, one, split) for one in forms):
            parser.error(f"--{split}-fraction takes {split} from train: leave out either it or the {split} files")
    if options.valid_fraction + options.test_fraction > 1 - LEAST_SHARE:
        parser.error("--valid-fraction and --test-fraction leave nothing to train: they must add up to less than 1")
    splits = {
        split: [named_file(parser, one, word) for one in forms for word in files_of(options, one, split)] for split in SPLITS
    }
    if options.files_from:
        splits["train"] += source_names.listed(config.path_of_rank(options.files_from, rank), rank)
    splits = {split: words for split, words in splits.items() if words}
    private = {split: [*paths, *([options.files_from] if split == "train" else [])] for split, paths in splits.items()}
    ranks = [split for split, paths in private.items() if config.is_private(str(paths))]
    if "train" in ranks and not config.is_private(options.out):
        parser.error(f"{option(form, 'train')} has {{rank}}, so --out must have it too: each rank writes a folder of its own")
    if options.deal and (ranks or form != "text"):
        parser.error("--deal is for text that all ranks can read: leave {rank} out of --train, --valid and --test, and --pairs")
    if options.deal and not config.is_private(options.out):
        parser.error("--deal gives each rank a folder of its own: put {rank} in --out")
    return splits


if __name__ == "__main__":
    sys.exit(main())
