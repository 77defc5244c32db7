"""/v1/tag, /v1/classify and /v1/audio/transcriptions: what a model says of words, of a text and of a recording."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response

from ..data import audio
from ..data.sound_tokenizers import MelTokenizer
from ..data.tokenizers import Tokenizer
from ..engines.errors import Refused
from ..engines.requests import SourceRequest
from ..errors import UserError
from ..inference.labelling import text_of, words_in, words_of
from ..kernels.mel import HOP, WINDOW
from ..kernels.types import Array
from .bodies import Form, read_body, read_form
from .fields import Fields, Json, no_such_model
from .openai import usage
from .sources import ask, check_source

if TYPE_CHECKING:
    from .service import Service

FORM = {"file", "model", "response_format", "language", "prompt", "temperature", "stream"}  # four say nothing to such a model
FORMATS = "json", "text", "verbose_json"


async def tag(service: Service, request: HttpRequest) -> Response:
    """A tag for each word of each text, and how probable it is. Raises Refused, Disconnected."""
    texts = _inputs(Fields(await read_body(request), service.name))
    pieces = await service.read_prompts(texts, "input", lambda text: _Words(service.vocabulary.tokenizer, text))
    found, headers = await _say(service, request, texts, [one.tokens for one in pieces], sum(len(one.words) for one in pieces))
    data = list[Json]()
    for index, ((labels, probable), one) in enumerate(zip(found, pieces, strict=True)):
        rows = zip(one.words, labels[one.starts, 0].tolist(), probable[one.starts, 0].tolist(), strict=True)
        said = [{"word": word, "tag": service.labels[label], "probability": value} for word, label, value in rows]
        data.append({"index": index, "words": said})
    return await service.answer(_body(service, data, pieces), headers)


async def classify(service: Service, request: HttpRequest) -> Response:
    """The class of each text, or of a recording, and the likeliest ones, the first first. Raises Refused, Disconnected."""
    if service.features:
        sources, texts = [await _recording(service, await _form(service, request, {"file", "model"}))], list[str]()
    else:
        texts = _inputs(Fields(await read_body(request), service.name))
        sources = await service.read_prompts(texts, "input", lambda text: text_of(service.vocabulary.tokenizer, text))
    inputs = len(sources[0]) * HOP if service.features else len(sources)
    sources = [source[-service.window :] for source in sources]  # as training has seen long ones
    found, headers = await _say(service, request, texts, sources, inputs)
    data = list[Json]()
    for index, (labels, probable) in enumerate(found):
        names, values = [service.labels[label] for label in labels[0].tolist()], probable[0].tolist()
        entry = {"label": names[0], "probability": values[0], "probabilities": dict(zip(names, values, strict=True))}
        data.append({"index": index, **entry})
    return await service.answer(_body(service, data, sources), headers)


async def transcribe(service: Service, request: HttpRequest) -> Response:
    """What is said in a recording, in OpenAI's form. Raises Refused, Disconnected."""
    form = await _form(service, request, FORM)
    wanted = form.get("response_format", "json")
    if wanted not in FORMATS:
        raise Refused(f"response_format must be {', '.join(FORMATS[:-1])} or {FORMATS[-1]}", "response_format")
    if form.get("stream", "false") not in ("false", "False"):  # as clients of Python and others write it
        raise Refused("stream must be false: a recording is read as a whole", "stream", code="unsupported_parameter")
    frames = await _recording(service, form)
    ((labels,),), headers = await _say(service, request, [], [frames], len(frames) * HOP)
    text = "".join(service.labels[label] for label in labels.tolist())
    if wanted == "text":
        return PlainTextResponse(text + "\n", headers=headers)
    if wanted == "json":
        return await service.answer({"text": text}, headers)
    seconds = round(len(frames) * HOP, 3)
    body = {"task": "transcribe", "language": "unknown", "duration": seconds, "text": text}  # such a model knows of none
    return await service.answer(body, headers)


class _Words:
    """The words of a text, its tokens (n,), and where words begin. Raises Refused, UserError."""

    def __init__(self, tokenizer: Tokenizer, text: str) -> None:
        self.words = words_in(text)
        if not self.words:
            raise Refused("input has a text without a word", "input")
        pieces = words_of(tokenizer, text)
        self.tokens = np.concatenate(pieces)
        self.starts = np.cumsum([0, *map(len, pieces)])[:-1]

    def __len__(self) -> int:
        return len(self.tokens)


def _inputs(fields: Fields) -> list[str]:
    """The texts of a request. Raises Refused."""
    given = fields.get("input")
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise Refused("input must be a string or a list of strings", "input")
    fields.texts("input", 0)
    fields.refuse_unread()
    return texts


async def _say(
    service: Service, request: HttpRequest, given: Sequence[Any], sources: Sequence[Array], inputs: float
) -> tuple[list[tuple[Array, ...]], dict[str, str]]:
    """What is found of each source. inputs : words, texts or seconds, to be counted"""
    for source in sources:
        check_source(service, source, "file" if service.features else "input")
    request.scope["dllm"]["inputs"] = round(inputs, 3)
    return await ask(service, request, given, [SourceRequest(source=source) for source in sources])


def _body(service: Service, data: list[Json], sources: Sequence[Any]) -> Json:
    counts = usage(sum(map(len, sources)), 0)
    del counts["completion_tokens"]
    return {"object": "list", "data": data, "model": service.name, "usage": counts}


async def _form(service: Service, request: HttpRequest, names: Collection[str]) -> Form:
    """The fields of a form. Raises Refused where it is no form, or has others than these."""
    found = await read_form(request)
    for name in sorted(found.keys() - set(names)):
        raise Refused(f"unknown parameter {name[:100]!r}", name[:100], code="unknown_parameter")
    model = found.get("model", service.name)
    if model != service.name:
        raise no_such_model(str(model), service.name, param="model")
    return found


async def _recording(service: Service, form: Form) -> Array:
    """The frames (n,F) float32 of the file of a form. Raises Refused."""
    data, tokenizer = form.get("file"), service.vocabulary.tokenizer
    if not isinstance(data, bytes):
        raise Refused("file must be there, a recording", "file")
    assert isinstance(tokenizer, MelTokenizer)
    most = (service.limits.source + 2) * HOP + WINDOW  # seconds; a little more is refused by its frames
    try:
        return await asyncio.to_thread(lambda: tokenizer.frames(audio.decode(data, most)))
    except UserError as error:
        raise Refused(f"file: {error}", "file") from None
