"""/v1/completions: from the engine's tokens to choices, whole or chunk by chunk."""

import contextlib

from .openai import Refused, choice, encode, logprobs
from .requests import Finished, Request
from .streams import Gone, Inbox, check, unless_gone
from .text import Text


class Choice:
    """One choice of an answer.

    Parameters
    ----------
    index : int
    wanted : openai.Completion
    prompt : Prompt
    echoed : bytes
        What the text begins with.
    vocabulary : Vocabulary
    """

    def __init__(self, index, wanted, prompt, echoed, vocabulary):
        self.index, self.wanted, self.prompt, self.vocabulary = index, wanted, prompt, vocabulary
        self.text = Text(vocabulary.decode, wanted.stop)
        self.count, self.reason, self.cancel = 0, None, lambda: None
        self.blanks = 1 if prompt.blank else 0  # prompt tokens that nobody wrote
        self.text.begin(echoed)
        if not self.request():
            self.reason = "length"

    def request(self):
        """What the engine has to do; None where that is nothing."""
        wanted, seed = self.wanted, (self.wanted.seed + self.index % self.wanted.n) % (1 << 63)
        scored = wanted.echo and wanted.logprobs is not None
        if not wanted.max_tokens and not scored:
            return None
        return Request(
            prompt=self.prompt.tokens, max_tokens=wanted.max_tokens, temperature=wanted.temperature, top_p=wanted.top_p,
            top_k=wanted.top_k, seed=seed, logprobs=wanted.logprobs, echo=scored, score_only=not wanted.max_tokens,
        )  # fmt: skip

    def add(self, event):
        """Take in a Token or Finished. Raises Refused where the engine failed."""
        if self.reason:
            return
        if isinstance(event, Finished):
            check(event)
            self.reason = event.reason
        elif event.prompt and self.blanks:
            self.blanks -= 1
        elif event.number == self.vocabulary.end and not event.prompt:  # a target ends here
            self.reason = "stop"
            self.cancel()
        else:
            self.count += not event.prompt
            if self.text.add(event):
                self.reason = "stop"
                self.cancel()

    def part(self):
        """The choice with what is new since the last call; None where there is nothing."""
        text, pieces = self.text.take(final=self.reason is not None)
        if not text and not pieces and not self.reason:
            return None
        detail = logprobs(pieces, self.vocabulary.name) if self.wanted.logprobs is not None else None
        return choice(self.index, text, detail, self.reason)


class Run:
    """One request under way: its choices, and where they are computed."""

    def __init__(self, wanted, prompts, vocabulary, peers, most):
        """Raises Refused where there is no room. most : numbers that an answer may hold, so that memory is bounded."""
        tokens = sum(wanted.max_tokens + wanted.echo * len(prompt) for prompt in prompts)
        told = wanted.n * tokens * (1 + (wanted.logprobs or 0))
        if told > most:
            raise Refused(f"choices x tokens x (1 + logprobs) are {told}; {most} are allowed", "max_tokens")
        self.inbox, self.choices = Inbox(), []
        for prompt in prompts:
            echoed = vocabulary.echo(prompt) if wanted.echo and wanted.logprobs is None else b""
            for _ in range(wanted.n):
                self.choices.append(Choice(len(self.choices), wanted, prompt, echoed, vocabulary))
        self.prompt_tokens = sum(len(prompt) for prompt in prompts)
        self.left = [one for one in self.choices if one.reason is None]
        self.rank, cancels = peers.begin({one.index: one.request() for one in self.left}, self.inbox)
        for one in self.left:
            one.cancel = cancels[one.index]

    async def parts(self):
        """Lists of choices with what is new, until all have ended. Raises Refused, Gone."""
        if ended := [one.part() for one in self.choices if one.reason]:
            yield ended
        try:
            while self.left:
                touched = {}
                for index, event in await self.inbox.get():
                    if self.choices[index] in self.left:
                        self.choices[index].add(event)
                        touched[index] = self.choices[index]
                self.left = [one for one in self.left if not one.reason]
                yield [part for one in touched.values() if (part := one.part())]
        finally:
            self.inbox.cancel()

    @property
    def counts(self):
        """Tokens of the prompts and of the choices."""
        return self.prompt_tokens, sum(one.count for one in self.choices)

    async def whole(self):
        """The choices when all have ended."""
        found = {one.index: choice(one.index, "", None, None) for one in self.choices}
        async for parts in self.parts():
            for part in parts:
                _join(found[part["index"]], part)
        return list(found.values())


def _join(whole, part):
    whole["text"] += part["text"]
    whole["finish_reason"] = part["finish_reason"]
    if whole["logprobs"] is None:
        whole["logprobs"] = part["logprobs"]
    else:
        for name, values in part["logprobs"].items():
            whole["logprobs"][name] += values


class Events:
    """A response of server-sent events: a Run as it comes."""

    def __init__(self, run, answer, include_usage, headers, notes):
        self.run, self.answer, self.include_usage, self.headers, self.notes = run, answer, include_usage, headers, notes

    async def __call__(self, scope, receive, send):
        names = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store", **self.headers}
        headers = [(name.encode(), value.encode()) for name, value in names.items()]
        try:
            await self.run.inbox.taken()
        except BaseException:
            self.run.inbox.cancel()
            raise
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        with contextlib.suppress(Gone):  # then nobody misses the end
            await unless_gone(receive, self.run.inbox, self._stream(send))
            await send({"type": "http.response.body", "body": b""})

    async def _stream(self, send):
        more = {"usage": None} if self.include_usage else {}
        try:
            async for parts in self.run.parts():
                text = "".join(f"data: {encode(self.answer.body([part]) | more)}\n\n" for part in parts)
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
            end = "data: [DONE]\n\n"
            if self.include_usage:
                end = f"data: {encode(self.answer.body([], self.run.counts))}\n\n{end}"
        except Refused as refused:
            end = f"data: {encode(refused.body())}\n\n"
        finally:
            self.notes["prompt_tokens"], self.notes["completion_tokens"] = self.run.counts
        await send({"type": "http.response.body", "body": end.encode(), "more_body": True})
