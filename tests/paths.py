"""Where the data for tests and benchmarks lies: DLLM_DATA, or shared/data beside the project."""

import os
import pathlib

DATA = pathlib.Path(os.environ.get("DLLM_DATA") or pathlib.Path(__file__).parents[2] / "shared/data")
