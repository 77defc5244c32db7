"""The serving engine under constant load, without HTTP; the counterpart of peers/torch_serve.py.

    python -m benchmarks.serve SIZE STREAMS SECONDS THREADS PRECISION [PROMPT] [wait]

PROMPT: streams end after 32 to 95 tokens, and others with prompts of so many tokens come for them; 0, the default: all go on
for ever. wait: it says that it is ready, and begins when it reads a line, as others do that are measured beside it. Prints
one JSON line: {"tokens_per_second", "gaps", "seconds", "processor_seconds"}; gaps: seconds between a stream's tokens, of all.
"""

import json
import sys
import threading
import time

import numpy as np

from dllm.config import ModelConfig
from dllm.engines.requests import Request, Token
from dllm.engines.text_engine import TextEngine
from dllm.model.language_model import LanguageModel
from dllm.model.layout import Layout

from .sizes import SIZES


class Random:
    """A model of a size with random parameters."""

    def __init__(self, size):
        self.config, self.vocabulary = (
            ModelConfig(embedding=size.hidden, hidden=size.hidden, layers=size.layers),
            size.vocabulary,
        )

    def model(self, window, lanes, team):
        model = LanguageModel(Layout(self.config, self.vocabulary, np.float32), window, lanes, training=False, team=team)
        model.bind(np.zeros(model.layout.size, np.float32))
        model.initialise(1)
        return model


def main():
    size, streams, seconds, threads = SIZES[sys.argv[1]], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    prompt, rng = int((sys.argv[6:] or "0")[0]), np.random.default_rng(1)
    engine = TextEngine(Random(size), slots=streams, threads=threads, precision=sys.argv[5], cache_bytes=0)
    engine.start()
    if sys.argv[7:] == ["wait"]:
        print("ready", flush=True)
        sys.stdin.readline()
    last, gaps, over, begin = {}, [], threading.Event(), time.perf_counter() + min(1, seconds)  # what is before warms up
    spent = []  # seconds of processors, from `begin` on

    def submit():
        tokens = rng.integers(0, size.vocabulary, max(1, prompt))
        length = int(rng.integers(32, 96)) if prompt else 10**9
        engine.submit(Request(prompt=tokens, max_tokens=length, seed=int(rng.integers(2**62))), deliver)

    def deliver(news):
        now = time.perf_counter()
        for stream, event in news:
            if not isinstance(event, Token):
                last.pop(stream)
                submit()
                continue
            if stream in last and now > begin:
                gaps.append(now - last[stream])
            last[stream] = now
        if now > begin:
            spent.append(time.process_time())
        if now > begin + seconds:
            over.set()

    for _ in range(streams):
        submit()
    while not over.wait(1):
        assert engine.load()["alive"], "the engine failed"
    seconds = max(last.values()) - begin
    found = {"tokens_per_second": len(gaps) / seconds, "gaps": gaps, "seconds": seconds}
    print(json.dumps(found | {"processor_seconds": spent[-1] - spent[0]}))


if __name__ == "__main__":
    main()
