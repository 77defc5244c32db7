"""Turn text into a corpus: manifest.json, tokenizer.json and HDF5 shards. Alone, or under mpirun to share the work."""

import sys

from . import cli
from .comm import runtime
from .data.tokenizers import KINDS
from .errors import DONE, UserError

EPILOG = """
examples
  python -m dllm.prepare --train book.txt --tokenizer char --out data/book
  mpirun -n 8 python -m dllm.prepare --train *.txt --valid held-out/*.txt --tokenizer bpe --vocab-size 8192 --out data/web
  mpirun -n 4 python -m dllm.prepare --train 'texts/site{rank}.txt' --tokenizer word --out 'data/site{rank}'
  mpirun -n 8 python -m dllm.prepare --train *.txt --deal dirichlet --alpha 0.3 --tokenizer char --out 'data/part{rank}'

With {rank} in --out every rank prepares its own text, and only counts of words travel between ranks, never text. All
folders get one vocabulary. To try what uneven text does, --deal cuts up text that all ranks can read: evenly, by whole
files, or each file by shares drawn from Dirichlet(alpha); valid and test text always evenly. Files of any size are read a
piece at a time; --tokenizer byte takes anything, the others UTF-8.

tokenizers
  byte   256 tokens; exact for any file
  char   one token a character of the train text
  word   words between white space and an <eos> a line; rare ones become <unk> where --vocab-size limits them
  bpe    byte-pair encoding over bytes, exact; --vocab-size from 256, default 4096
"""


def main(argv=None):
    comm = runtime.world()
    return cli.run(lambda argv: prepare(argv, comm), argv, comm)


def prepare(argv, comm):
    with runtime.together(comm):
        parser = cli.Parser("prepare", __doc__, EPILOG, comm.rank)
        for split in ("train", "valid", "test"):
            parser.add_argument(
                f"--{split}", nargs="+", default=[], metavar="FILE", required=split == "train", help=f"{split} text"
            )
        parser.add_argument("--tokenizer", choices=list(KINDS), required=True)
        parser.add_argument("--vocab-size", type=cli.at_least(1), default=0, metavar="N", help="at most N tokens")
        parser.add_argument(
            "--deal", choices=("evenly", "files", "dirichlet"), help="whose text is whose, with {rank} in --out"
        )
        parser.add_argument("--alpha", type=cli.at_least(1e-3, float), default=1.0, help="dirichlet; small: uneven (default 1)")
        parser.add_argument("--seed", type=cli.at_least(0), default=1, metavar="S", help="dirichlet (default 1)")
        parser.add_argument("--out", required=True, metavar="DIR", help="new folder for the corpus")
        options = parser.parse_args(argv)
        splits = {name: getattr(options, name) for name in ("train", "valid", "test") if getattr(options, name)}
        private = "{rank}" in options.out
        if not private and any("{rank}" in path for path in splits["train"]):
            parser.error("--train has {rank}, so --out must have it too: each rank writes a folder of its own")
        if options.deal and not private:
            parser.error("--deal gives each rank a folder of its own: put {rank} in --out")
        if options.deal and any("{rank}" in path for paths in splits.values() for path in paths):
            parser.error("--deal is for text that all ranks can read: leave {rank} out of --train, --valid and --test")
    if private:
        splits = {name: [path.replace("{rank}", str(comm.rank)) for path in paths] for name, paths in splits.items()}
    if options.deal:
        splits = runtime.agree(comm, _deal, splits, comm.size, options)[comm.rank]
    out = options.out.replace("{rank}", str(comm.rank))

    from .corpus import prepare as prepare_corpus
    from .data.shards import Corpus

    def say(text):
        if comm.rank == 0:
            print(text, flush=True)

    prepare_corpus(comm, splits, options.tokenizer, options.vocab_size, out, private, say)
    corpus = Corpus(out)
    counts = ", ".join(f"{name} {entry['tokens']:,}" for name, entry in corpus.manifest["splits"].items())
    say(f"{out}: {counts} {options.tokenizer} tokens, vocabulary {corpus.vocabulary:,}")
    if private:
        sizes = sorted(comm.allgather(corpus.split("train")["tokens"]))
        say(f"train tokens of a rank: {sizes[0]:,} to {sizes[-1]:,}, {sum(sizes):,} in all")
    say(f"train with  mpirun -n {comm.size if private else 8} python -m dllm.train --data '{options.out}'")
    runtime.finish(comm)
    return DONE


def _deal(splits, ranks, options):
    """For each rank {split: spans}."""
    from .data import text

    shares = {
        "evenly": text.evenly,
        "files": text.by_file,
        "dirichlet": lambda paths, ranks: text.by_dirichlet(paths, ranks, options.alpha, options.seed),
    }
    dealt = {}
    for name, paths in splits.items():
        dealt[name] = text.deal_out(paths, shares[options.deal if name == "train" else "evenly"](paths, ranks))
        empty = next((rank for rank, spans in enumerate(dealt[name]) if not spans), None)
        if empty is not None:
            hint = {"evenly": "", "files": ", or more files", "dirichlet": ", or a larger --alpha"}[options.deal]
            raise UserError(f"rank {empty} of {ranks} gets no {name} text: take fewer ranks{hint}")
    return [{name: parts[rank] for name, parts in dealt.items()} for rank in range(ranks)]


if __name__ == "__main__":
    sys.exit(main())
