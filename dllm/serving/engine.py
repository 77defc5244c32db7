"""Continuous batching: one thread takes all streams a token further at a time; any may join or leave at any token.

    submit -> waiting -> reading the prompt -> in the step -> ended
              (queue)    (windows)             (a token each)

A turn of the thread lets streams in where slots are free, reads at most one window of the prompts that are not read yet,
WINDOW_TOKENS together, so that those in the step do not stall, and takes one step. Since a window of one prompt takes almost
as long as one of some prompts, the first waits a few turns for others. What happened goes out in one call for each
`deliver`. A stream's tokens depend on the model and its request alone, to the bit (decoder.py, kernels/sample.py).
"""

import threading
import time
import traceback
from collections import deque

import numpy as np

from ..kernels.sample import BAD, Choice
from ..kernels.team import Team
from ..kernels.tiles import BF16
from ..model.decoder import Decoder
from .prefix import PrefixCache
from .requests import MOST, Finished, Full, Request, Stopped, Stream, Token

__all__ = ["Engine", "Finished", "Full", "Request", "Stopped", "Stream", "Token"]

WINDOW = 64  # tokens of a prompt at a time at most; states are kept at its multiples
WINDOW_TOKENS = 256  # of all prompts that are read in one turn
TOGETHER, PATIENCE = 4, 4  # prompts that are worth a window, and turns that fewer wait for more while others are in the step
TOLD = 64  # tokens of prompts whose probabilities are taken at a time
RATE_SECONDS = 5.0  # that tokens_per_second looks back


class Engine:
    """Answers requests with one model.

    Parameters
    ----------
    bundle
        Has model(window, lanes, team), a LanguageModel.
    slots : int
        Streams at a time.
    threads : int
    cache_bytes : int
        Of states that are kept behind prefixes.
    queue : int
        Streams that may wait.
    precision : "fp32" or "bf16"
        bf16: products of bfloat16, about twice as fast where the processor has them. fp32: as the model is.
    """

    def __init__(self, bundle, slots=64, threads=1, cache_bytes=64 << 20, queue=256, precision="fp32"):
        if precision == "bf16" and not BF16:
            raise ValueError("this processor has no products of bfloat16: precision is fp32")
        self.slots, self.queue = slots, queue
        model = bundle.model(1, 1, Team(threads))
        self.decoder = Decoder(model, slots, precision == "bf16" and model.dtype == np.float32)
        self.cache = PrefixCache(cache_bytes)
        self._choice, self._told = Choice(slots, MOST), Choice(TOLD, MOST)
        self._next = np.zeros(slots, np.int64)  # the token that each stream's state has not seen
        self._free, self._reading, self._running = list(range(slots))[::-1], [], []
        self._waited = 0  # turns since a window was read, with prompts to read
        self._active = np.zeros(0, np.int64)  # the slots of _running
        self._news = {}  # deliver -> [(stream, event)]
        # Shared with other threads, under the lock:
        self._changed = threading.Condition()
        self._waiting, self._cancelled = deque(), []
        self._stopping, self._deadline, self._problem = False, None, ""
        self._thread = None
        self._steps = self._tokens = 0
        self._marks = deque([(time.monotonic(), 0)])  # (time, tokens), two a second

    def start(self):
        """Compile what is needed, and begin."""
        self.decoder.warm_up()
        self._marks[0] = time.monotonic(), 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def stop(self, drain_seconds=0.0):
        """Take nothing more, finish what is there within some seconds, end the rest with "error"."""
        with self._changed:
            self._stopping, self._deadline = True, time.monotonic() + drain_seconds
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def submit(self, request, deliver):
        """Begin with a request. From any thread.

        deliver(news) is called in the engine's thread, at most once a step, with all its news: a list of
        (stream, Token or Finished); streams that share an equal `deliver` share the call. It must not block.
        Raises Full, or ValueError for tokens that the model does not have.
        """
        prompt = request.prompt
        if prompt.min() < 0 or prompt.max() >= self.decoder.vocabulary:
            raise ValueError(f"tokens are numbers from 0 to {self.decoder.vocabulary - 1}")
        stream = Stream(request, deliver, self)
        with self._changed:
            if self._problem or self._stopping:
                raise Stopped(self._problem or "the engine is stopping")
            if len(self._waiting) >= self.queue:
                raise Full(f"{self.queue} streams wait already")
            self._waiting.append(stream)
            self._changed.notify()
        return stream

    def load(self):
        """Numbers for whoever watches. `alive` 0: the thread has ended, nothing is answered any more."""
        with self._changed:
            queued, problem = len(self._waiting), self._problem
        (then, before), now, tokens = self._marks[0], time.monotonic(), self._tokens
        rate = (tokens - before) / max(now - then, 1e-3) if now - self._marks[-1][0] < RATE_SECONDS else 0.0
        return {
            "active": self.slots - len(self._free), "queued": queued, "slots": self.slots, "tokens": tokens,
            "tokens_per_second": rate, "steps": self._steps,
            "cache_bytes": self.cache.bytes, "cache_hits": self.cache.hits,
            "alive": int(not problem and self._thread is not None and self._thread.is_alive()),
        }  # fmt: skip

    def _cancel(self, stream):
        with self._changed:
            if not stream._ended:
                self._cancelled.append(stream)
                self._changed.notify()

    def _run(self):
        message = "the engine is stopping"
        try:
            while self._turn():
                pass
        except BaseException as error:
            traceback.print_exc()
            message = f"the engine failed: {type(error).__name__}: {error}"
        with self._changed:
            self._problem, streams = message, [*self._waiting]
            self._waiting.clear()
        for stream in [*self._running, *self._reading, *streams]:
            if not stream._ended:
                stream._ended = True
                self._tell(stream, Finished("error", message))
        self._running, self._reading, self._free = [], [], list(range(self.slots))
        self._deliver()

    def _turn(self):
        """Returns whether there is more to do, now or later."""
        with self._changed:
            while not (self._waiting or self._cancelled or self._running or self._reading or self._stopping):
                self._changed.wait()
            cancelled, self._cancelled = self._cancelled, []
            for stream in cancelled:
                if stream in self._waiting:
                    self._waiting.remove(stream)
            idle = not (self._waiting or self._running or self._reading)
            if self._stopping and (idle or time.monotonic() >= self._deadline):
                return False
        for stream in cancelled:
            if not stream._ended:
                self._end(stream, "cancelled")
        while self._free and self._waiting:  # only this thread takes from it
            with self._changed:
                self._reading.append(self._waiting.popleft())
            self._admit(self._reading[-1])
        self._waited += bool(self._reading)
        if len(self._reading) >= TOGETHER or (self._reading and (not self._running or self._waited > PATIENCE)):
            self._read_window()
            self._waited = 0
        if self._running:
            self._step()
        self._deliver()
        return True

    def _admit(self, stream):
        """Give a stream a slot."""
        request, slot = stream.request, self._free.pop()
        stream._slot, choice = slot, self._choice
        if request.tells_prompt:
            self._tell(stream, Token(int(request.prompt[0]), None, [], True))
        self.decoder.states[slot] = 0
        choice.temperature[slot], choice.top_k[slot], choice.top_p[slot] = request.temperature, request.top_k, request.top_p
        choice.seed[slot], choice.position[slot] = request.seed % 2**64, 0
        choice.wanted[slot] = request.logprobs or 0
        self._next[slot] = request.prompt[-1]
        if request.to_read == 0:
            self._prompt_read(stream)
        else:
            self._look_up(stream)

    def _read_window(self):
        """A window of the prompts that have waited longest, as many as have room beside the first."""
        left = lambda stream: min(WINDOW - stream._read % WINDOW, stream.request.to_read - stream._read)
        streams, read = [], set()
        for stream in list(self._reading):
            if self._look_up(stream):
                continue
            T = left(streams[0] if streams else stream)
            if len(streams) == max(1, WINDOW_TOKENS // T):
                break
            tokens = stream.request.prompt[: stream._read + min(T, left(stream))].tobytes()
            if tokens not in read or stream.request.tells_prompt:  # else it waits a turn for the state behind them
                streams.append(stream)
                read.update([tokens] if self.cache.limit else [])
        if not streams:
            return
        T = left(streams[0])
        lengths = np.array([min(T, left(stream)) for stream in streams])
        tokens = np.zeros((T, len(streams)), np.int64)
        for n, (stream, length) in enumerate(zip(streams, lengths, strict=True)):
            tokens[:length, n] = stream.request.prompt[stream._read : stream._read + length]
        self.decoder.read(tokens, np.array([stream._slot for stream in streams]), lengths)
        self._tell_prompts(streams, lengths)
        for stream, length in zip(streams, lengths.tolist(), strict=True):
            if stream._ended:
                continue
            stream._read += length
            done = stream._read == stream.request.to_read
            if done or stream._read % WINDOW == 0:
                self.cache.put(stream._seen(), self.decoder.states[stream._slot])
            if done:
                self._prompt_read(stream)
            else:  # the others have their turn
                self._reading.remove(stream)
                self._reading.append(stream)

    def _look_up(self, stream):
        """Take over what is known by now of the state behind a prompt. Returns whether that is all of it."""
        request = stream.request
        if request.tells_prompt:  # every token's probability is wanted, so all are read
            return False
        length, state = self.cache.find(request.prompt[: request.to_read], stream._read)
        if length > stream._read:
            stream._read = length
            self.decoder.states[stream._slot] = state
        if stream._read < request.to_read:
            return False
        self._prompt_read(stream)
        return True

    def _tell_prompts(self, streams, lengths):
        """The log-probabilities of the tokens behind those of the window, for the streams that want them."""
        places = [
            (stream, t * len(streams) + n, stream._read + t + 1)
            for n, stream in enumerate(streams)
            if stream.request.tells_prompt
            for t in range(lengths[n])
            if stream._read + t + 1 < len(stream.request.prompt)
        ]
        for start in range(0, len(places), TOLD):
            part = places[start : start + TOLD]
            wants, told = np.arange(len(part)), self._told
            told.given[: len(part)] = [stream.request.prompt[at] for stream, _, at in part]
            told.wanted[: len(part)] = [stream.request.logprobs or 0 for stream, _, _ in part]
            self.decoder.choose(told, wants, np.array([row for _, row, _ in part]))
            for n, (stream, _, _) in enumerate(part):
                self._take(stream, told, n, int(told.token[n]), float(told.logprob[n]), True)

    def _prompt_read(self, stream):
        """What a stream does when its prompt is read: it ends, or joins the step."""
        if stream.request.to_generate == 0:
            self._end(stream, "length")
            return
        self._reading.remove(stream)
        self._running.append(stream)
        self._active = np.array([stream._slot for stream in self._running])

    def _step(self):
        """One token more for each stream."""
        slots, choice = self._active, self._choice
        self.decoder.read(self._next[slots][None], slots)
        self.decoder.choose(choice, slots)
        tokens, logprobs = choice.token[slots], choice.logprob[slots].tolist()
        self._next[slots] = tokens
        choice.position[slots] += np.uint64(1)
        for stream, token, logprob in zip(list(self._running), tokens.tolist(), logprobs, strict=True):
            self._take(stream, choice, stream._slot, token, logprob)
        now = time.monotonic()
        if now - self._marks[-1][0] >= RATE_SECONDS:  # after a rest
            self._marks = deque([(now, self._tokens)])
        self._steps += 1
        self._tokens += len(slots)
        if now - self._marks[-1][0] >= 0.5:
            self._marks.append((now, self._tokens))
            while len(self._marks) > 2 and now - self._marks[0][0] > RATE_SECONDS:
                self._marks.popleft()

    def _take(self, stream, choice, row, token, logprob, prompt=False):
        """One token of a stream, drawn or told."""
        if stream._ended:
            return
        if token == BAD:
            self._end(stream, "error", "the model gave numbers that are not finite")
            return
        alternatives, count = [], stream.request.logprobs
        if count:
            pairs = zip(choice.tokens[row, :count].tolist(), choice.logprobs[row, :count].tolist(), strict=True)
            alternatives = [pair for pair in pairs if pair[0] != BAD]
        self._tell(stream, Token(token, logprob, alternatives, prompt))
        if not prompt:
            stream._made.append(token)
            if len(stream._made) == stream.request.max_tokens:
                self._end(stream, "length")

    def _end(self, stream, reason, message=""):
        """Free its slot at once, and say so."""
        state = None
        if stream._slot is not None:
            if reason != "error":
                self.cache.put(stream._seen(), self.decoder.states[stream._slot])
            if stream.request.want_state:
                state = self.decoder.top(stream._slot)
            (self._running if stream in self._running else self._reading).remove(stream)
            self._active = np.array([stream._slot for stream in self._running], np.int64)
            self._free.append(stream._slot)
            stream._slot = None
        stream._ended = True
        self._tell(stream, Finished(reason, message, state))

    def _tell(self, stream, event):
        self._news.setdefault(stream.deliver, []).append((stream, event))

    def _deliver(self):
        news, self._news = self._news, {}
        for deliver, events in news.items():
            try:
                deliver(events)
            except Exception:  # nobody is there any more: its streams have no use
                with self._changed:
                    self._cancelled += [stream for stream, _ in events]
