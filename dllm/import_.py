"""Make a model folder of another program's model: dllm import FILE --tokenizer FILE --out MODEL."""

from __future__ import annotations

import argparse
import pathlib
import sys
from dataclasses import replace

from . import cli
from .data import tokenizer_files, tokenizers
from .data.checked_tokens import MOST_LABELS, problem_of_label
from .data.lines import plain_lines
from .errors import DONE, UserError, printable
from .exchange import hugging_face, imports
from .files import safetensors, storage
from .inference import model_folder
from .model import blocks, torch_weights
from .remote.locate import is_url, local_copy

EPILOG = """
MODULE.safetensors holds the state dict of nn.Embedding, nn.LSTM and nn.Linear, named embedding, lstm and output, or encoder,
rnn and decoder as in PyTorch's word_language_model, with any prefix before all of them. Without an embedding the inputs
are one-hot; without an output weight, or with the embedding's, the two are tied.

MODEL.keras, or MODEL.weights.h5 where its groups and shapes say enough, is of Keras 3: Embedding, LSTM or Bidirectional(LSTM),
Dropout, GlobalMaxPooling1D or GlobalAveragePooling1D, Dense. Nothing of it is run.

The tokenizer is a tokenizer.json, or the folder of a run, model or corpus that has one: its token numbers must be the file's.
It may be what transformers saved of a model folder: dllm import SAVED/model.safetensors --tokenizer SAVED --out MODEL.
"""


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""
    return cli.run(import_, argv)


def import_(argv: list[str]) -> int:
    """Write the model folder of a file."""
    options = _arguments(argv)
    model_folder.check_free(options.out)
    tokenizer = _tokenizer(options.tokenizer)
    found = imports.read(imports.Asked(options.module, tokenizer, _labels(options.labels)))
    torch_weights.check_finite(options.module, found.tensors)
    if found.vocabulary != tokenizer.size:
        raise UserError(f"{options.module} has a vocabulary of {found.vocabulary}, {options.tokenizer} one of {tokenizer.size}")
    tokenizer.labels = found.labels if found.settings.model.kind in blocks.LABELLED else tokenizer.labels
    model_folder.check_kind(found.settings.model, tokenizer, pathlib.Path(options.tokenizer))
    train = found.settings.train
    settings = replace(found.settings, train=replace(train, window=options.window or train.window))
    data = safetensors.pack(found.tensors)
    facts = model_folder.describe(settings, tokenizer, "fp32", data) | {
        "imported": printable(pathlib.Path(options.module).name)[:255]
    }
    model_folder.write(options.out, data, tokenizer, facts)
    for note in found.notes:
        print(f"dllm: {printable(note)}", file=sys.stderr)
    print(f"{printable(options.out)}: {facts['parameters']:,} parameters, of {facts['model']}")
    return DONE


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser("import_", __doc__, EPILOG)
    parser.add_argument("module", metavar="FILE", help="MODULE.safetensors, MODEL.keras or MODEL.weights.h5")
    parser.add_argument("--tokenizer", required=True, metavar="FILE", help="a tokenizer.json, or a folder that has one")
    parser.add_argument("--out", required=True, metavar="MODEL", help="the folder to make")
    parser.add_argument(
        "--labels", metavar="A,B", help="names of the classes, in the order of their numbers, or a file of them, one a line"
    )
    parser.add_argument(
        "--window", type=cli.at_least(1), default=0, metavar="N", help="tokens of a text that are read (default: as FILE says)"
    )
    return parser.parse_args(argv)


def _tokenizer(path: str) -> tokenizers.Tokenizer:
    """Of a tokenizer.json or of a folder that has one."""
    if pathlib.Path(path).is_dir() or (is_url(path) and not path.endswith(".json")):
        file = tokenizer_files.tokenizer_file(path)
    else:
        file = local_copy(path)
    value = storage.read_json(file, [])
    if isinstance(value, dict) and "kind" not in value and "model" in value:
        try:
            value = hugging_face.read_tokenizers_form(value)
        except ValueError as error:
            raise UserError(f"{file}: {error}") from None
    elif not isinstance(value, dict) or "kind" not in value:
        raise UserError(f"{file} has no 'kind'; make the folder anew")
    return tokenizers.load(value, file)


def _labels(word: str | None) -> tuple[str, ...]:
    """Names that the command line gives. Raises UserError."""
    if word is None:
        return ()
    names = word.split(",") if "," in word else plain_lines(storage.read_text(word, storage.LARGEST_LIST, "the labels in "))
    for name in names:
        if problem := problem_of_label(name):
            raise UserError(f"--labels has a label that {problem}")
    if len({*names}) != len(names) or not 2 <= len(names) <= MOST_LABELS:
        raise UserError(f"--labels names {len(names):,} labels, some twice or too few: give 2 or more, each once")
    return tuple(names)


if __name__ == "__main__":
    sys.exit(main())
