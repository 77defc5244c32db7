"""Trains several runs one after another in one start of all ranks: python several.py FILE, JSON lists of arguments."""

import json
import pathlib
import sys

from dllm import train

for arguments in json.loads(pathlib.Path(sys.argv[1]).read_text()):
    if code := train.main(arguments):
        sys.exit(code)
