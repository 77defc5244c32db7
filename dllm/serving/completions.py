"""/v1/completions: from the engine's tokens to choices, whole or chunk by chunk."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..engines.errors import Disconnected, Refused
from ..engines.requests import Event, Finished, Request, SourceRequest
from ..engines.streams import Cancel, Inbox, check_finished
from ..peers.peers import Peers
from .bodies import read_body, unless_disconnected
from .fields import Json
from .openai import SEEDS, Answer, Completion, choice_body, encode, logprobs_body
from .streamed_text import Detokenizer, Prompt, Vocabulary
from .tokens import mixed

if TYPE_CHECKING:
    from .service import Service


class CompletionChoice:
    """One choice of an answer.

    Parameters
    ----------
    index : int
    wanted : openai.Completion
    prompt : Prompt
    salt : bytes
        Of what may be kept of it.
    echoed : (bytes, bool) or None
        What the text begins with, and whether that ends with a word; None: the prompt is not shown, or token by token.
    vocabulary : Vocabulary

    Attributes
    ----------
    count : int
        Tokens that were generated.
    reason : str or None
        "stop" or "length"; None: it is under way.
    """

    def __init__(
        self, index: int, wanted: Completion, prompt: Prompt, salt: bytes, echoed: tuple[bytes, bool] | None,
        vocabulary: Vocabulary,
    ) -> None:  # fmt: skip
        self.index, self.wanted, self.prompt, self.salt, self.vocabulary = index, wanted, prompt, salt, vocabulary
        behind = prompt.behind and not wanted.echo
        self.text = Detokenizer(vocabulary.spell, wanted.stop, behind, places=wanted.logprobs is not None)
        self.count, self._number, self._logprob = 0, 0, 0.0
        self.reason: str | None = None
        self.cancel: Cancel = lambda: None
        self._heard = 0  # tokens of the prompt that came
        if echoed is not None:
            self.text.begin(*echoed)
        if not self.request():
            self.reason = "length"

    def request(self) -> Request | None:
        """What the engine has to do; None where that is nothing."""
        wanted, seed = self.wanted, (self.wanted.seed + self.index % self.wanted.best_of) % SEEDS
        scored = wanted.echo and wanted.logprobs is not None
        if not wanted.max_tokens and not scored:
            return None
        return Request(
            prompt=self.prompt.tokens, max_tokens=wanted.max_tokens, temperature=wanted.temperature, top_p=wanted.top_p,
            top_k=wanted.top_k, min_p=wanted.min_p, logit_bias=wanted.logit_bias,
            banned=self.vocabulary.never_drawn(wanted.logit_bias), repetition_penalty=wanted.repetition_penalty,
            presence_penalty=wanted.presence_penalty, frequency_penalty=wanted.frequency_penalty, seed=seed,
            logprobs=wanted.logprobs, echo=scored, score_only=not wanted.max_tokens, salt=self.salt,
        )  # fmt: skip

    def add(self, event: Event) -> None:
        """Take in a Token or Finished. Raises Refused where the engine failed."""
        if self.reason:
            return
        if isinstance(event, Finished):
            check_finished(event)
            self.reason = event.reason
            return
        if event.prompt:
            place, prompt = self._heard, self.prompt
            self._heard += 1
            if prompt.before <= place < len(prompt.tokens) - prompt.after:
                self.text.add(event)
            return
        ends = event.number == self.vocabulary.end  # a target
        self.count += not ends
        self._number, self._logprob = self._number + 1, self._logprob + (event.logprob or 0.0)
        if ends or self.text.add(event):
            self.reason = "stop"
            self.cancel()

    @property
    def mean_logprob(self) -> float:
        """Of all tokens that were generated, that of an end too, nats."""
        return self._logprob / max(1, self._number)

    def new_part(self) -> Json | None:
        """The choice with what is new since the last call; None where there is nothing."""
        text, tokens = self.text.flush(final=self.reason is not None)
        if not text and not tokens and not self.reason:
            return None
        logprobs = logprobs_body(tokens, self.vocabulary.name) if self.wanted.logprobs is not None else None
        return choice_body(self.index, text, logprobs, self.reason)


class CompletionRun:
    """One request under way: its choices, and where they are computed. Raises Refused where there is no room.

    Parameters
    ----------
    wanted : openai.Completion
    prompts : list of Prompt
    salt : bytes
        Of the client and its request: what is kept is found again by the same alone.
    vocabulary : Vocabulary
    peers : Peers
    most : int
        Numbers that it may hold, so that memory is bounded.

    Attributes
    ----------
    rank : int
        Which computes it.
    """

    def __init__(
        self, wanted: Completion, prompts: list[Prompt], salt: bytes, vocabulary: Vocabulary, peers: Peers, most: int
    ) -> None:  # fmt: skip
        tokens = sum(wanted.max_tokens + wanted.echo * len(prompt) for prompt in prompts)
        numbers = wanted.best_of * tokens * (1 + (wanted.logprobs or 0))
        if numbers > most:
            texts = "best_of" if wanted.best_of > wanted.n else "choices"
            raise Refused(f"{texts} x tokens x (1 + logprobs) are {numbers}; {most} are allowed", "max_tokens")
        self.inbox, self._wanted = Inbox(), wanted
        self.choices: list[CompletionChoice] = []
        for prompt in prompts:
            at_once = wanted.echo and wanted.logprobs is None
            echoed = vocabulary.tokenizer.spell_all(prompt.written) if at_once else None
            for _ in range(self._texts):
                self.choices.append(CompletionChoice(len(self.choices), wanted, prompt, salt, echoed, vocabulary))
        self.prompt_tokens = sum(len(prompt) for prompt in prompts)
        self._left = [one for one in self.choices if not one.reason]
        self._ended = [one for one in self.choices if one.reason]  # before anything was computed
        self.rank, cancels = peers.submit(self._requests(), self.inbox)
        for index, cancel in cancels.items():
            for one in self._choices(index):
                one.cancel = cancel

    @property
    def _texts(self) -> int:
        """Choices of each prompt, among which those are that are answered."""
        return self._wanted.best_of

    def _requests(self) -> Mapping[int, Request | SourceRequest]:
        """What the engine has to do, by the numbers of its streams."""
        return {one.index: request for one in self._left if (request := one.request())}

    def _choices(self, stream: int) -> list[CompletionChoice]:
        """Those that a stream makes."""
        return [self.choices[stream]]

    def _add(self, stream: int, event: Event) -> None:
        """Let the choices that a stream makes take in an event. Raises Refused where the engine failed."""
        self.choices[stream].add(event)

    async def next_parts(self) -> list[Json] | None:
        """Choices with what is new since the last call; None: all have said their end. Raises Refused, Disconnected."""
        if self._ended:
            parts, self._ended = [one.new_part() for one in self._ended], []
            return [part for part in parts if part]
        if not self._left:
            return None
        events = await self.inbox.get()
        for stream, event in events:
            self._add(stream, event)
        streams = {stream: None for stream, _ in events}
        touched = [one for stream in streams for one in self._choices(stream) if one in self._left]
        self._left = [one for one in self._left if not one.reason]
        return [part for one in touched if (part := one.new_part())]

    @property
    def counts(self) -> tuple[int, int]:
        """Tokens of the prompts and of the choices."""
        return self.prompt_tokens, sum(one.count for one in self.choices)

    async def whole(self) -> list[Json]:
        """The best choices of each prompt when all have ended. Raises Refused, Disconnected."""
        found = {one.index: choice_body(one.index, "", None, None) for one in self.choices}
        while (parts := await self.next_parts()) is not None:
            for part in parts:
                _join(found[part["index"]], part)
        return [found[one.index] | {"index": index} for index, one in enumerate(self._best())]

    def _best(self) -> list[CompletionChoice]:
        """The choices that are answered, those of a prompt by their log-probability where there are others."""
        n, texts = self._wanted.n, self._texts
        if n == texts:
            return self.choices
        groups = (self.choices[start : start + texts] for start in range(0, len(self.choices), texts))
        return [one for group in groups for one in sorted(group, key=lambda one: -one.mean_logprob)[:n]]


def _join(whole: Json, part: Json) -> None:
    whole["text"] += part["text"]
    whole["finish_reason"] = part["finish_reason"]
    if whole["logprobs"] is None:
        whole["logprobs"] = part["logprobs"]
    else:
        for name, values in part["logprobs"].items():
            whole["logprobs"][name] += values


async def complete(service: Service, request: HttpRequest) -> Response | EventStream:
    """Continued texts, whole or as they come. Raises Refused, Disconnected."""
    body = await read_body(request)
    wanted = Completion.read(body, service.name, service.vocabulary.size, service.limits.tokens)
    prompts = await service.read_prompts(wanted.prompts, "prompt", service.vocabulary.prompt)
    return await answer(service, request, wanted, prompts, CompletionRun)


async def answer(
    service: Service, request: HttpRequest, wanted: Completion, prompts: list[Prompt], run_of: type[CompletionRun]
) -> Response | EventStream:
    """The answer of a run that is begun."""
    fields = service.log_fields(request, wanted.prompts)
    fields["stream"], fields["inputs"] = wanted.stream, len(prompts)
    salt = mixed(request.scope["dllm.salt"], wanted.cache_salt)
    run = run_of(wanted, prompts, salt, service.vocabulary, service.peers, service.limits.numbers)
    fields["computed_by"], answer = run.rank, Answer(service.name, wanted.seed)
    headers = {"x-dllm-rank": str(run.rank)}
    if wanted.stream:
        return EventStream(run, answer, wanted.include_usage, headers, fields)
    choices = await unless_disconnected(request.receive, run.inbox, run.whole())
    fields["prompt_tokens"], fields["completion_tokens"] = run.counts
    return await service.answer(answer.body(choices, run.counts), headers)


class EventStream:
    """A response of server-sent events: a CompletionRun as it comes. An ASGI application.

    Parameters
    ----------
    run : CompletionRun
    answer : openai.Answer
    include_usage : bool
        Whether the last event counts tokens.
    headers : mapping of str
        Of the response.
    log_fields : dict
        Gets the counts of tokens.
    """

    def __init__(
        self, run: CompletionRun, answer: Answer, include_usage: bool, headers: Mapping[str, str], log_fields: Json
    ) -> None:
        self.run, self.answer, self.include_usage = run, answer, include_usage
        self.headers, self.log_fields = headers, log_fields

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        names = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store", **self.headers}
        headers = [(name.encode(), value.encode()) for name, value in names.items()]
        try:
            await self.run.inbox.all_accepted()
        except BaseException:
            self.run.inbox.cancel()
            raise
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        with contextlib.suppress(Disconnected):  # then nobody misses the end
            await unless_disconnected(receive, self.run.inbox, self._send_events(scope["dllm.send"]))
            await send({"type": "http.response.body", "body": b""})

    async def _send_events(self, send: Send) -> None:
        write = self.answer.events({"usage": None} if self.include_usage else {})
        try:
            while (parts := await self.run.next_parts()) is not None:
                await send({"type": "http.response.body", "body": "".join(map(write, parts)).encode(), "more_body": True})
            end = "data: [DONE]\n\n"
            if self.include_usage:
                end = f"data: {encode(self.answer.body([], self.run.counts))}\n\n{end}"
        except Refused as refused:
            end = f"data: {encode(refused.body())}\n\n"
        finally:
            self.log_fields["prompt_tokens"], self.log_fields["completion_tokens"] = self.run.counts
        await send({"type": "http.response.body", "body": end.encode(), "more_body": True})
