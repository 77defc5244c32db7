"""/v1/tag, /v1/classify and /v1/audio/transcriptions: what a model says of words, of a text and of a recording."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from starlette.datastructures import UploadFile
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response

from ..data import audio
from ..data.sound_tokenizers import MelTokenizer
from ..errors import UserError
from ..inference.labelling import text_of, words_of
from ..kernels.mel import HOP, WINDOW
from ..kernels.types import Array
from .errors import Refused
from .openai import Fields, Json, read_json, usage
from .requests import SourceRequest
from .sources import ask, check_source

if TYPE_CHECKING:
    from .app import Service

FORM = {"file", "model", "response_format", "language", "prompt", "temperature"}  # the last three say nothing to such a model


async def tag(service: Service, request: HttpRequest) -> Response:
    """A tag for each word of each text, and how probable it is. Raises Refused, Disconnected."""
    texts = _inputs(Fields(read_json(await request.body()), service.name))
    words = [text.split() for text in texts]
    if not all(words):
        raise Refused("input has a text without a word", "input")
    pieces = await service.read_prompts(
        words, "input", lambda some: _Words(words_of(service.vocabulary.tokenizer, " ".join(some)))
    )
    data = list[Json]()
    found, headers = await _say(service, request, texts, [one.tokens for one in pieces])
    for index, ((probable,), given, parts) in enumerate(zip(found, words, pieces, strict=True)):
        rows = probable[parts.starts]
        best = rows.argmax(axis=1).tolist()
        said = [
            {"word": word, "tag": service.labels[label], "probability": float(row[label])}
            for word, row, label in zip(given, rows, best, strict=True)
        ]
        data.append({"index": index, "words": said})
    return await service.answer(_body(service, data, pieces), headers)


async def classify(service: Service, request: HttpRequest) -> Response:
    """The class of each text, or of a recording, and how probable each is. Raises Refused, Disconnected."""
    if service.features:
        sources, texts = [await _recording(service, await _form(service, request))], list[str]()
    else:
        texts = _inputs(Fields(read_json(await request.body()), service.name))
        sources = await service.read_prompts(texts, "input", lambda text: text_of(service.vocabulary.tokenizer, text))
    sources = [source[-service.window :] for source in sources]  # as training has seen long ones
    found, headers = await _say(service, request, texts, sources)
    data = list[Json]()
    for index, (probable,) in enumerate(found):
        best, each = int(probable[0].argmax()), probable[0].tolist()
        probabilities = dict(zip(service.labels, each, strict=True))
        data.append({"index": index, "label": service.labels[best], "probability": each[best], "probabilities": probabilities})
    return await service.answer(_body(service, data, sources), headers)


async def transcribe(service: Service, request: HttpRequest) -> Response:
    """What is said in a recording, in OpenAI's form. Raises Refused, Disconnected."""
    form = await _form(service, request)
    wanted = form.get("response_format", "json")
    if wanted not in ("json", "text"):
        raise Refused("response_format must be json or text", "response_format")
    frames = await _recording(service, form)
    ((labels,),), headers = await _say(service, request, [], [frames])
    text = "".join(service.labels[label] for label in labels.tolist())
    if wanted == "text":
        return PlainTextResponse(text + "\n", headers=headers)
    return await service.answer({"text": text}, headers)


class _Words:
    """The tokens (n,) of a text, and where its words begin."""

    def __init__(self, words: Sequence[Array]) -> None:
        self.tokens = np.concatenate(words)
        self.starts = np.cumsum([0, *map(len, words)])[:-1]

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
    service: Service, request: HttpRequest, given: Sequence[Any], sources: Sequence[Array]
) -> tuple[list[tuple[Array, ...]], dict[str, str]]:
    for source in sources:
        check_source(service, source, "file" if service.features else "input")
    return await ask(service, request, given, [SourceRequest(source=source) for source in sources])


def _body(service: Service, data: list[Json], sources: Sequence[Any]) -> Json:
    counts = usage(sum(map(len, sources)), 0)
    del counts["completion_tokens"]
    return {"object": "list", "data": data, "model": service.name, "usage": counts}


async def _form(service: Service, request: HttpRequest) -> dict[str, str | bytes]:
    """The fields of a form, the file's as bytes. Raises Refused where it is no such form."""
    kind = request.headers.get("content-type", "")
    if not kind.startswith("multipart/form-data"):
        raise Refused("a recording comes as multipart/form-data, in the field file")
    found: dict[str, str | bytes] = {}
    async with request.form(max_files=1, max_fields=10, max_part_size=10_000) as form:
        for name, value in form.multi_items():
            if name in found:
                raise Refused(f"{name[:100]} is there more than once", name[:100])
            found[name] = await value.read() if isinstance(value, UploadFile) else value
    for name in sorted(found.keys() - FORM):
        raise Refused(f"unknown parameter {name[:100]!r}", name[:100], code="unknown_parameter")
    model = found.get("model", service.name)
    if model != service.name:
        raise Refused(f"there is no model {str(model)[:100]!r}; there is {service.name!r}", "model", 404, "model_not_found")
    return found


async def _recording(service: Service, form: dict[str, str | bytes]) -> Array:
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
