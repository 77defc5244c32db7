"""ONNX Runtime in an environment of its own, DLLM_TEST_ONNX; .ci/tools makes one. Run by that environment's Python, this file
serves lines of JSON: a model's path, the file of what it is given and that of what it says, both .npz.
"""

import json
import os
import pathlib
import sys

import numpy as np

PYTHON = pathlib.Path(os.environ.get("DLLM_TEST_ONNX") or "/nonexistent", "bin/python")
LIMIT = 60  # seconds of an answer


def missing():
    """Why there is no ONNX Runtime, or ""."""
    return "" if PYTHON.exists() else "needs ONNX Runtime: run .ci/tools FOLDER, then DLLM_TEST_ONNX=FOLDER/onnx"


class Sessions:
    """ONNX Runtime at work. Leaving its `with` ends it."""

    def __init__(self, folder):
        from helpers.ipfs_nodes import Process

        self._folder, self._process, self._count = folder, Process(PYTHON, __file__, log=folder / "sessions.log"), 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()

    def __call__(self, model, given):
        """name -> array of what the model of a file says, given name -> array."""
        self._count += 1
        inputs, outputs = (self._folder / f"{self._count}-{side}.npz" for side in ("given", "said"))
        np.savez(inputs, **given)
        self._process.tell(json.dumps([str(model), str(inputs), str(outputs)]))
        assert self._process.json(LIMIT) == {"done": str(outputs)}
        with np.load(outputs) as said:
            return dict(said)


def serve():
    """Answer lines of standard input until it ends."""
    import onnxruntime

    sessions = {}
    for line in sys.stdin:
        model, inputs, outputs = json.loads(line)
        try:
            if model not in sessions:
                sessions[model] = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
            names = [output.name for output in sessions[model].get_outputs()]
            with np.load(inputs) as given:
                said = sessions[model].run(names, dict(given))
            np.savez(outputs, **dict(zip(names, said, strict=True)))
            answer = {"done": outputs}
        except Exception as error:  # the test says what it was
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
