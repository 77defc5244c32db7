"""`dllm COMMAND` and `python -m dllm COMMAND`: the commands as one program."""

import importlib
import sys

from . import __version__
from .errors import BAD_INPUT, DONE
from .files import telling
from .files.starter import launched_rank

COMMANDS = {
    "prepare": "text, or pairs of texts, to a corpus of tokens",
    "train": "train a model over all ranks (under mpirun)",
    "launch": "the same, started under mpirun, watched and brought back until it is done",
    "resize": "another number of ranks for a run that launch watches",
    "lr-find": "a learning rate, by a range test over all ranks (under mpirun)",
    "info": "what a run, a corpus or a model is, how far, how good, and what to type next",
    "compare": "runs side by side: settings that differ, results, curves",
    "evaluate": "loss and perplexity of a trained model; what it makes of pairs",
    "predict": "tags of words or classes of texts, of each line of a file, with a trained model",
    "generate": "continue a text, or answer a source, with a trained model",
    "serve": "answer over HTTP with a trained model, from all ranks",
    "export": "a run as one folder to use anywhere: safetensors, tokenizer, model card",
    "import": "the same of a PyTorch nn.LSTM",
    "publish": "a run, a model or a corpus to IPFS, or to a file that its nodes take",
    "fetch": "what was published, checked byte for byte",
}
PLACES = {  # a module, and its first word
    "import": "import_", "publish": "share publish", "fetch": "share fetch",
    "info": "tools.info", "compare": "tools.compare", "lr-find": "tools.lr_find",
    "predict": "tools.predict",
}  # fmt: skip


def main() -> int:
    """The command. Returns its exit code."""
    telling.never_end()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        module, *first = PLACES.get(name, name).split()
        code: int = importlib.import_module(f"dllm.{module}").main([*first, *sys.argv[2:]])
        return code
    lines = [f"dllm {__version__}: decentralised training of LSTM language models", "", "usage: dllm COMMAND ..."]
    lines += [f"  {command:10}{text}" for command, text in COMMANDS.items()]
    speaks = launched_rank() in (None, 0)
    if name in ("-h", "--help", "--version"):
        if speaks:
            print("\n".join(lines[:1] if name == "--version" else [*lines, "", "dllm COMMAND --help tells more."]))
        return DONE
    if speaks:
        print(f"dllm: there is no command {name}; there are {', '.join(COMMANDS)}", file=sys.stderr)
    return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
