"""Serve a model over HTTP from all ranks: mpirun -n 4 python -m dllm.serve MODEL, or dllm serve MODEL -n 4."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import signal
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import cli
from .comm import messages, runtime
from .comm.node_info import find_node, leader_first
from .errors import DONE, UserError, reason
from .files.starter import launched_rank
from .launching.mpirun import all_here
from .remote.http import is_loopback
from .runs import ownership
from .serving import tokens
from .serving.origins import Origins

if TYPE_CHECKING:
    from mpi4py import MPI

    from .inference.loaded_model import LoadedModel
    from .launching.join_file import JoinFile
    from .peers.joiner import Seat

EPILOG = """
examples
  mpirun -n 4 python -m dllm.serve MODEL                     MODEL: made by dllm export, or the folder of a run
  dllm serve MODEL -n 4                                      the same, started under mpirun, and again when it ends
  dllm serve small large tagger -n 2                         several: a request's "model" says which, or its path alone
  dllm serve MODEL -n 8 --hostfile FILE --host 0.0.0.0 --token-file TOKEN
  curl 127.0.0.1:8000/v1/completions --json '{"prompt": "Once upon a time", "max_tokens": 50}'
  curl 127.0.0.1:8000/v1/tag --json '{"input": "She reads"}'             of a tagger; of a classifier /v1/classify
  curl 127.0.0.1:8000/v1/audio/transcriptions -F file=@spoken.wav        of a model of kind ctc

OpenAI's clients work with base_url="http://127.0.0.1:8000/v1"; a page for people is at /. Every rank answers; ranks of one host
share the port, and one without room hands streams to another. Under Open MPI with `--with-ft ulfm` a rank that dies takes
none of the others with it, and  dllm serve MODEL --join FILE  starts another in its place, on the same host: the server names
the file. SIGTERM or SIGUSR1: no new requests, those under way are finished, exit code 0.
A host other than loopback needs a token, which clients send as  Authorization: Bearer TOKEN. Each line of the token file is the
token of a client of its own: what is kept of its prompts makes no answer to another client faster. Without tokens all clients
share what is kept, but for requests that say "cache_salt": TEXT.

A server at loopback answers to loopback's names alone, and to --allow-host; at another address to any name, unless there is an
--allow-host. Pages of other sites are refused, but for --allow-origin. docs/how-to/put-behind-a-proxy.md has lines for proxies.
"""
ROOT_PATH = re.compile(r"(/[A-Za-z0-9._~-]*[A-Za-z0-9_~-])+")  # no empty part, no . and no ..
RANKS_OPTION = re.compile(r"-n(=?\d+)?|--ranks(=.*)?")


def arguments(argv: Sequence[str], rank: int = 0) -> argparse.Namespace:
    """The options of the command. Raises UserError; rank 0 alone prints help."""
    parser = cli.Parser("serve", __doc__, EPILOG, rank)
    positive, seconds = cli.at_least(1), cli.at_least(0.01, float)
    for name, kind, default, metavar, text in (
        ("--host", str, "127.0.0.1", "ADDRESS", "address to listen on"),
        ("--port", cli.at_least(0), 8000, "P", "of all ranks of a host; 0: a free one"),
        ("--token-file", str, None, "FILE", f"file with clients' tokens, one a line, mode 600 (or one in {tokens.VARIABLE})"),
        ("--interface", str, None, "NAME", "network interface between hosts, such as wg0"),
        ("--slots", positive, 64, "N", "streams of a model that a rank computes at once"),
        ("--queue", cli.at_least(0), 256, "N", "streams of a model that wait for a slot"),
        ("--threads", cli.at_least(0), 0, "N", "of a model on a rank; 0: cores / ranks of its host"),
        ("--cache", cli.at_least(0), 64, "MIB", "of a model, for states of prompts that come again; 0: nothing is kept"),
        ("--max-prompt", positive, 32768, "N", "tokens"),
        ("--max-source", positive, 8192, "N", "tokens or frames of a source; so many in all are read at once"),
        ("--max-tokens", positive, 4096, "N", "tokens of a choice"),
        ("--max-body", positive, 1 << 20, "N", "bytes of a request, with its recording"),
        ("--max-requests", positive, 256, "N", "at once, of a rank"),
        ("--max-connections", positive, 512, "N", "of a rank; beyond it the idle ones go"),
        ("--deadline", seconds, 600.0, "S", "for a whole request"),
        ("--drain", seconds, 30.0, "S", "for requests under way when the server is told to end"),
        ("--ranks", positive, None, "N", "start mpirun with so many ranks, and again when it ends"),
        ("--hostfile", str, None, "FILE", "with --ranks: hosts to run on, as for mpirun"),
        ("--join", str, None, "FILE", "take the place of a dead rank of the server that has written this file"),
    ):  # fmt: skip
        names = [name, "-n"] if name == "--ranks" else [name]
        shown = "" if default is None else " (default %(default)s)"
        parser.add_argument(*names, type=kind, default=default, metavar=metavar, help=text + shown)
    text = "folder of a model or of a run, or ipfs://CID; several: all have names of their own"
    parser.add_argument("model", metavar="MODEL", nargs="+", help=text)
    cli.add_precision(parser)
    for name, metavar, text in (
        ("--allow-host", "NAME", "another name that clients may call this server by; may come again"),
        ("--allow-origin", "ORIGIN", "a site whose pages may ask, such as https://app.example.com; *: all; may come again"),
    ):
        parser.add_argument(name, action="append", default=[], metavar=metavar, help=text)
    parser.add_argument("--root-path", default="", metavar="PATH", help="what a proxy has before every path, such as /llm")
    parser.add_argument("--log-prompts", action="store_true", help="have prompts in the log")
    options = parser.parse_args(argv)
    if options.port > 65535:
        parser.error("argument --port: at most 65535")
    if options.hostfile and not options.ranks:
        parser.error("--hostfile goes with -n")
    if options.join and options.ranks:
        parser.error("--join starts one rank: leave out -n")
    options.root_path = options.root_path.rstrip("/")
    if options.root_path and not ROOT_PATH.fullmatch(options.root_path):
        parser.error("argument --root-path: write it as /llm, of letters, digits and . _ ~ -")
    Origins(names=options.allow_host, pages=options.allow_origin)  # says what is wrong with them
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    if launched_rank() is None and has_ranks_option(words):
        return cli.run(start, words)
    stopping: list[bool] = []
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.append(True))  # before imports that take long: no starting rank dies
    return cli.collective(lambda argv, comm: serve(argv, comm, stopping), words)


def has_ranks_option(words: Sequence[str]) -> bool:
    """Whether these arguments of the command say how many ranks shall be started."""
    options = words[: words.index("--")] if "--" in words else words
    return any(RANKS_OPTION.fullmatch(word) for word in options)


def start(words: list[str]) -> int:
    """Start the ranks under mpirun and keep them up; returns the exit code. Raises UserError."""
    from .launching.server_supervisor import ServerSupervisor

    options = arguments(words)
    tokens_of(options)  # what is wrong with them is said here, once
    check(options)
    pass_on = [ownership.JOB, *([tokens.VARIABLE] if tokens.VARIABLE in os.environ and not options.token_file else [])]
    supervisor = ServerSupervisor(options, words, pass_on)
    if tokens.VARIABLE in pass_on and not all_here(supervisor.hosts):
        supervisor.say(f"mpirun sends {tokens.VARIABLE} to other hosts in clear: --token-file, a copy on each host, does not")
    return supervisor.supervise()


def serve(argv: Sequence[str], comm: MPI.Comm, stopping: Sequence[bool]) -> int:
    """One rank, until it is told to stop; then the process ends with the exit code. Collective. Raises UserError.

    stopping : not empty: told already
    """
    with runtime.together(comm):
        options = arguments(argv, comm.rank)
        check(options)
        file = read_join_file(options, comm.size)
        if file:
            options = arguments([*file.about.words, *argv])
        clients = tokens_of(options)
    runtime.check_same(comm, vars(options))
    node = find_node(comm)

    from .engines.kinds import make_engine
    from .launching.join_file import facts_of, host_name
    from .peers import joiner
    from .serving.server import Server

    if file:
        joiner.check_place(file, options.join)
    with runtime.together(comm):
        listener = listen(options.host, options.port, shared=file is not None) if node.rank == 0 else None
    port = messages.broadcast(node.comm, listener.getsockname()[1] if listener else 0, int)
    with runtime.together(comm):
        listener = listener or listen(options.host, port, shared=True)
    models = open_models(comm, options)
    known = facts_of_models(models, options.precision)
    if file:
        threads = options.threads or file.about.threads
        compared = joiner.stretched(clients, bytes.fromhex(file.about.salt))[0]
        if stopping:
            return DONE
        joiner.check_facts(file.about, facts_of(options, port, {**known, "tokens": compared}))
    else:
        threads = options.threads or node.threads
        seat = joiner.first_seat(comm, clients, node.ranks == comm.size)
        seat.about = joiner.about(seat, options, port, facts_of(options, port, {**known, "tokens": seat.compared}), threads)
    engines = [runtime.agree(comm, make_engine, model, options, threads) for model in models]
    with leader_first(node):
        for engine in engines:
            engine.start()  # compiles the kernels, or loads them
    if file:  # as late as can be: the place is kept for a while only
        if stopping:
            for engine in engines:
                engine.stop(0)
            return DONE
        seat = joiner.claim(file, options.join, host_name())
    server = Server(comm, list(zip(models, engines, strict=True)), options, clients, listener, seat)
    if comm.rank == 0:
        say_where(models, options, listener, seat)
    code = server.run(stopping)
    server.leave(code)
    return code


def open_models(comm: MPI.Comm, options: argparse.Namespace) -> list[LoadedModel]:
    """The models that shall be served, the same on all ranks. Collective. Raises UserError."""
    from .inference.loaded_model import LoadedModel
    from .runs.gathering import gather_run
    from .serving.bodies import check_forms, check_names

    models = list[LoadedModel]()
    for path in options.model:
        gather_run(comm, path, cli.warn_once(comm), best=True)
        model = runtime.agree(comm, LoadedModel.open, path)
        runtime.check_same(comm, facts_of_models([model], options.precision))
        runtime.agree(comm, check_forms, model)
        models.append(model)
    runtime.agree(comm, check_names, [model.name for model in models], options.model)
    return models


def facts_of_models(models: Sequence[LoadedModel], precision: str) -> dict[str, Any]:
    """In what of them all ranks of a server must be the same."""
    from .model.precision import described

    return {
        "model": ", ".join(model.fingerprint for model in models),
        "name": ", ".join(model.name for model in models),
        "labels": [model.tokenizer.labels for model in models],
        "products": ", ".join(dict.fromkeys(described(precision, model.dtype) for model in models)),
    }


def read_join_file(options: argparse.Namespace, ranks: int) -> JoinFile | None:
    """What is known of the server that this process shall join; None: it shall join none. Raises UserError."""
    from .launching import join_file

    if not options.join:
        return None
    if ranks > 1:
        raise UserError("--join takes the place of one rank: start it by mpirun -n 1, or without mpirun")
    return join_file.read(options.join)


def say_where(models: Sequence[LoadedModel], options: argparse.Namespace, listener: socket.socket, seat: Seat) -> None:
    """Tell the user where the server is."""
    from .launching.join_file import path_of

    bound, port = listener.getsockname()[:2]
    host, place = f"[{options.host}]" if ":" in options.host else options.host, seat.place
    what = f"rank {place.rank} of {place.size}" if place.life else f"{place.size} rank{'s' * (place.size > 1)}"
    known = facts_of_models(models, options.precision)
    print(f"dllm: {known['name']} at http://{host}:{port}, {what}", flush=True)
    if options.precision != "fp32":
        print(f"dllm: {known['products']}", flush=True)
    if seat.about and not place.life:
        words = f"dllm serve {' '.join(options.model)} --join {path_of(bound, port)}"
        print(f"dllm: if a rank dies, this starts another in its place: {words}", flush=True)


def tokens_of(options: argparse.Namespace) -> tuple[str, ...]:
    """The tokens, empty where there are none. Raises UserError where there has to be one."""
    found = tokens.read_tokens(options.token_file)
    if not found and not is_loopback(options.host):
        raise UserError(f"--host {options.host} can be reached by others: give a token by --token-file or {tokens.VARIABLE}")
    return found


def listen(host: str, port: int, shared: bool = False) -> socket.socket:
    """A bound socket that ranks of this host share. port 0: a free one; shared: others of them have it already.

    Raises UserError.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        if port and not shared:  # sharing a port with a server of somebody else would go unnoticed
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named, else asyncio leaves out TCP_NODELAY
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000)  # ms; of a client that does not read
        listener.bind((host, port))
        return listener
    except OSError as error:
        raise UserError(f"cannot listen on {host} port {port}: {reason(error)}") from None


def check(options: argparse.Namespace) -> None:
    """Raise UserError where something is missing here."""
    if not all(importlib.util.find_spec(name) for name in ("cryptography", "starlette", "uvicorn")):
        raise UserError("serving needs Starlette, uvicorn and cryptography: pip install 'dllm[serve]'")


if __name__ == "__main__":
    sys.exit(main())
