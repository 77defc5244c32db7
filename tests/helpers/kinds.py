"""Small models of all kinds, and servers of one or several of them in this process."""

import asyncio
import contextlib
import io
import json
import re
from types import SimpleNamespace

import numpy as np

from dllm.data import audio
from dllm.engines.kinds import make_engine
from dllm.inference.loaded_model import LoadedModel
from helpers.asking import LIMIT, OPTIONS, client_of
from helpers.model_folders import make_kind

SHAPES = {
    "lm": {},
    "seq2seq": {"bidirectional": True, "layers": 2},
    "tagger": {"bidirectional": True},
    "classifier": {"bidirectional": True},
    "ctc": {"bidirectional": True, "features": 5},
    "sound": {"kind": "classifier", "features": 5},
}
TARGET = {"prompt": "abcab", "max_tokens": 8}


class Kinds:
    """Servers of these models. ask(name, path, body): the response of one of the model of this name, or of several at once.

    Parameters
    ----------
    folder : path
    shapes : dict
        Of the models, by their names.

    Attributes
    ----------
    models : dict
        name -> LoadedModel
    """

    def __init__(self, folder, shapes=SHAPES):
        for name, shape in shapes.items():
            make_kind(folder / name, {"kind": name} | shape)
        self.models = {name: LoadedModel.open(folder / name) for name in shapes}
        self._started = {}

    def engine(self, name, slots=8):
        """A model's, started when it is asked for."""
        if (name, slots) not in self._started:
            options = SimpleNamespace(**OPTIONS | {"slots": slots, "cache": 0})
            self._started[name, slots] = make_engine(self.models[name], options, 1)
            self._started[name, slots].start()
        return self._started[name, slots]

    def stop(self):
        """All engines."""
        for engine in self._started.values():
            engine.stop()

    def __call__(self, name, path, body=None, **more):
        return self.together(name, (path, {"content": json.dumps(body)} if body else more))[0]

    def together(self, name, *requests, tokens=(), slots=8, in_turn=False, **limits):
        """The responses to several requests, each (path, what httpx is told). name : of a model, or the names of several"""

        async def work():
            names = [name] if isinstance(name, str) else name
            async with client_of([(self.models[one], self.engine(one, slots)) for one in names], tokens, **limits) as client:
                asked = [client.request(**{"method": "POST", "url": path} | what) for path, what in requests]
                return [await one for one in asked] if in_turn else await asyncio.gather(*asked)

        return asyncio.run(asyncio.wait_for(work(), LIMIT))


def recording(seconds=0.2):
    """The bytes of a WAV file, and its Sound."""
    samples = np.sin(np.arange(int(8000 * seconds)) / 5).astype(np.float32)
    with io.BytesIO() as file:
        with contextlib.closing(audio.wave.open(file, "wb")) as out:
            out.setnchannels(1)
            out.setsampwidth(2)
            out.setframerate(8000)
            out.writeframes((samples * 30000).astype("<i2").tobytes())
        return file.getvalue(), audio.Sound(samples, 8000)


def refused(response, status, says):
    """Check that a refusal says this in one line."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert "\n" not in error["message"]
    assert re.search(says, error["message"]), error
