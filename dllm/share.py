"""Publish a run, a model or a corpus under a name that anybody can check, and fetch one: dllm publish, dllm fetch."""

from __future__ import annotations

import argparse
import os
import pathlib
import stat
import sys
from collections.abc import Callable, Mapping, Sequence

from . import cli, config
from .data.corpus import Corpus
from .errors import DONE, UserError, printable, reason
from .files import storage
from .inference import model_folder
from .remote import car, ipfs, locate, swarm
from .remote.progress import Progress
from .remote.tree import Tree
from .runs import checkpoint
from .runs.run_folder import Trained

PUBLISH = "Publish a run, a model or a corpus: dllm publish FOLDER prints its URL."
PUBLISH_EPILOG = """
examples
  dllm publish MODEL                        give it to the node of IPFS at DLLM_IPFS, such as http://127.0.0.1:5001
  dllm publish RUN --to run.car             make a file of it, which any node takes: ipfs dag import run.car
  dllm publish CORPUS --set storage.pin=false
  dllm publish MODEL --to swarm             give it to the node of Swarm at DLLM_BEE, and pay with the stamps of DLLM_BEE_STAMP

The last line is ipfs://CID or swarm://REFERENCE. Both are hashes of all files and their names: whoever fetches them gets these
bytes or nothing. Everybody who knows the hash can read them, and nobody can take them back.

Of a run its settings, tokenizer, newest and best checkpoint are published, of a model and a corpus the files that belong to it.
All are checked first. What is of private text is refused without --private: a run on text with {rank} in its path, and files
that only their owner can read, as prepare, train and export make them of such text.

A node that is not on this machine needs https and a token: DLLM_IPFS_TOKEN has it, or USER:PASSWORD.
"""
FETCH = "Fetch what was published: dllm fetch URL --out FOLDER."
FETCH_EPILOG = """
examples
  dllm fetch ipfs://CID --out models/theirs
  dllm fetch ipfs://CID/README.md --out README.md
  dllm fetch model.car --out models/theirs                     of a CAR file, without a network

Blocks come from the node at DLLM_IPFS, else from the trustless gateways in IPFS_GATEWAY. Each is compared with its name.
What swarm://REFERENCE names comes from the Bee node at DLLM_BEE, and is compared with the reference.
generate, evaluate, export, serve, prepare and train take such URLs in place of folders and keep them in the user's cache.
"""

Files = Mapping[str, pathlib.Path]  # name below the root -> where it lies


def main(argv: Sequence[str] | None = None) -> int:
    """`publish` or `fetch`, the first word; returns its exit code."""
    name, *words = sys.argv[1:] if argv is None else argv or [""]
    commands = {"publish": publish, "fetch": fetch}
    if name not in commands:
        return cli.run(lambda _: _unknown(name, list(commands)), words)
    return cli.run(commands[name], words, product=name == "publish")


def _unknown(name: str, known: Sequence[str]) -> int:
    raise UserError(f"python -m dllm.share {name}: it is one of {', '.join(known)}")


def publish(argv: list[str]) -> int:
    """Give a folder to a store, and print its URL. Raises UserError."""
    parser = cli.Parser("share publish", PUBLISH, PUBLISH_EPILOG)
    parser.add_argument("folder", metavar="FOLDER", help="of a run, a model or a corpus")
    to = f"{', '.join(STORES)}, or a new FILE.car (default: ipfs)"
    parser.add_argument("--to", default="ipfs", metavar="STORE", help=to)
    parser.add_argument("--private", action="store_true", help="also what is of private text, which a model may repeat")
    _add_settings(parser)
    options = parser.parse_args(argv)
    settings = _storage(options)
    if options.to not in STORES and not options.to.endswith(".car"):
        parser.error(f"argument --to: {options.to} is none of {', '.join(STORES)}, FILE.car")
    files = published_files(options.folder, options.private)
    try:
        size = sum(path.stat().st_size for path in files.values())
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {reason(error)}") from None
    if options.to in STORES:
        url = STORES[options.to](files, settings, Progress(f"publishing {options.folder}", 2 * size))
    else:
        _check_free("--to", options.to)
        if options.private:
            storage.owner_only()
        url = f"{ipfs.SCHEME}{car.write(options.to, files, Progress(f'writing {options.to}', size))}"
    print(printable(f"{options.folder}: {len(files)} files, {size / 1e6:,.1f} MB"))
    print(url, flush=True)
    return DONE


def fetch(argv: list[str]) -> int:
    """Make a folder or file of what an URL or a CAR file names. Raises UserError."""
    parser = cli.Parser("share fetch", FETCH, FETCH_EPILOG)
    parser.add_argument(
        "url", metavar="URL", help="ipfs://CID, swarm://REFERENCE, with /path or not, or a file that ends with .car"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the new folder, or file")
    _add_settings(parser)
    options = parser.parse_args(argv)
    settings, out = _storage(options), pathlib.Path(os.path.abspath(options.out))
    _check_free("--out", out)
    if not locate.is_url(options.url) and options.url.endswith(".car"):
        blocks = car.CarFile(options.url)
        folder: locate.RemoteFolder = Tree(blocks.get, blocks.root)
    else:
        folder = locate.open_folder(options.url, settings)
    try:
        locate.fetch_all(folder, out, Progress(f"fetching {options.url}", folder.size))
    except OSError as error:
        raise UserError(f"cannot write to --out {out}: {reason(error)}") from None
    print(printable(f"{options.out}: {len(folder.names)} file{'s' * (len(folder.names) > 1)} of {options.url}"))
    return DONE


def published_files(folder: str, private: bool = False) -> Files:
    """What is published of the folder of a run, a model or a corpus, all of it checked.

    private : also of private text

    Raises
    ------
    UserError
        Where it is no such folder, something in it is damaged, or it is of private text.
    """
    path = pathlib.Path(folder)
    if (path / "config.toml").exists():
        names = _run_files(path, private)
    elif model_folder.is_model_folder(path):
        names, strange = model_folder.published(path)
        for name in strange:
            print(f"dllm: {printable(str(path / name))} is not what dllm writes, and is not published", file=sys.stderr)
    elif (path / "manifest.json").exists():
        names = _corpus_files(path)
    else:
        raise UserError(f"{folder} is not the folder of a run, a model or a corpus")
    files = {name: path / name for name in names if name != model_folder.README or (path / name).exists()}
    for name, file in files.items():
        _check_readable(file, name, private)
    return files


def _run_files(path: pathlib.Path, private: bool) -> list[str]:
    run = Trained.open(path)
    if config.is_private(run.settings.data.path) and not private:
        raise UserError(f"{path} was trained on private text, which its model may repeat: --private publishes it all the same")
    newest, warnings = checkpoint.intact(path)
    for warning in dict.fromkeys([*run.warnings, *warnings]):
        print(f"dllm: {printable(warning)}", file=sys.stderr)
    names = ["config.toml", "tokenizer.json"]
    for found in {one.step: one for one in (run.checkpoint, newest)}.values():
        parts = [found.folder / checkpoint.MANIFEST, *(file for _, file in found.parts())]
        names += [str(file.relative_to(path)) for file in parts]
    return names


def _corpus_files(path: pathlib.Path) -> list[str]:
    corpus = Corpus(path)
    names = ["manifest.json", "tokenizer.json"]
    for split, entry in corpus.manifest["splits"].items():
        corpus.verify(split, 0, entry["tokens"])
        names += [part["name"] for part in entry["shards"]]
    return names


def _check_readable(file: pathlib.Path, name: str, private: bool) -> None:
    """Raise UserError where a file is not there, is a link to elsewhere, or is for its owner's eyes."""
    try:
        found = os.lstat(file)
    except OSError as error:
        raise UserError(f"cannot read {file}: {reason(error)}") from None
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{file} is not a file: only files are published")
    if not (private or found.st_mode & 0o044):
        raise UserError(f"{file} is for its owner only, as what is of private text: --private publishes it all the same")


def _to_ipfs(files: Files, settings: config.StorageConfig, moved: Callable[[int], object]) -> str:
    return f"{ipfs.SCHEME}{ipfs.node(settings).publish(files, settings.pin, moved)}"


def _to_swarm(files: Files, settings: config.StorageConfig, moved: Callable[[int], object]) -> str:
    return f"{swarm.SCHEME}{swarm.node(settings).publish(files, moved)}"


STORES: dict[str, Callable[[Files, config.StorageConfig, Callable[[int], object]], str]] = {
    "ipfs": _to_ipfs,
    "swarm": _to_swarm,
}


def _add_settings(parser: argparse.ArgumentParser) -> None:
    text = "such as storage.timeout=60; may be repeated"
    parser.add_argument("--set", action="append", default=[], metavar="storage.KEY=VALUE", help=text)


def _storage(options: argparse.Namespace) -> config.StorageConfig:
    other = next((setting for setting in options.set if not setting.startswith("storage.")), None)
    if other is not None:
        raise UserError(f"--set {other}: only storage.KEY=VALUE has an effect here")
    return config.from_dict(config.parse_settings(options.set)).storage


def _check_free(option: str, path: str | os.PathLike[str]) -> None:
    if os.path.lexists(path):
        raise UserError(f"{option} {path} exists; choose another name, or remove it first")


if __name__ == "__main__":
    sys.exit(main())
