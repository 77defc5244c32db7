"""Measure dllm on this machine, and its peers beside it where they are installed.

    python -m benchmarks COMMAND [--quick] [--ranks 2] [--rounds 3] [--sizes ptb-small ...] [--out FOLDER]

Runs alone: it starts mpirun itself. Each rank and each peer's process has one thread. What is compared is measured in turns
in one go; a table shows medians (least - most). Written to FOLDER: COMMAND.json, and COMMAND.png where matplotlib is there.
Peers: pip install '.[bench]', tensorflow for Keras, jax. Keep the machine quiet meanwhile.
"""

import argparse
import pathlib
import tempfile

from . import commands, decentralised, http_load, kinds, papers, replicas, resilience, reviews, tokenizing
from .results import hardware, save
from .sizes import SIZES

COMMANDS = {
    "kernels": commands.kernels,
    "step": commands.step,
    "kinds": kinds.kinds,
    "scaling": commands.scaling,
    "overlap": commands.overlap,
    "startup": commands.startup,
    "memory": commands.memory,
    "generation": commands.generation,
    "serving": commands.serving,
    "http": http_load.http,
    "quality": commands.quality,
    "resilience": resilience.resilience,
    "recovery": resilience.recovery,
    "decentralised": decentralised.decentralised,
    "uneven": decentralised.uneven,
    "network": decentralised.network,
    "replicas": replicas.replicas,
    "papers": papers.papers,
    "reviews": reviews.reviews,
    "tokenizing": tokenizing.tokenizing,
}
PEERS = ["torch", "tensorflow", "jax"]


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, function in COMMANDS.items():
        command = subparsers.add_parser(name, help=function.__doc__.splitlines()[0], description=function.__doc__)
        command.add_argument("--quick", action="store_true", help="one short round: to see that it works, not to quote")
        ranks = 8 if name in ("decentralised", "uneven") else 2
        command.add_argument("--ranks", type=int, default=ranks, help=f"ranks, and cores that peers get (default {ranks})")
        command.add_argument("--rounds", type=int, default=3, help="turns of each contestant, where seconds count (default 3)")
        command.add_argument("--steps", type=int, default=0, help="of training, where steps count")
        command.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), help="default: all")
        command.add_argument(
            "--peers", nargs="*", default=PEERS, choices=PEERS, help=f"default: {' '.join(PEERS)}, where installed"
        )
        command.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results"), help="default: ./results")
        command.add_argument(
            "--data",
            type=pathlib.Path,
            help="folder of texts: tinyshakespeare/, wikitext-2/ for quality and averaging methods; kinds, reviews say which",
        )
    options = parser.parse_args()
    options.seconds = 1 if options.quick else 8
    options.rounds = 1 if options.quick else options.rounds
    print(hardware())
    with tempfile.TemporaryDirectory() as work:
        options.work = pathlib.Path(work)
        table, data, draw = COMMANDS[options.command](options)
    for path in save(options.out, options.command, table, data, draw):
        print(f"\nwritten to {path}", end="")
    print()


if __name__ == "__main__":
    main()
