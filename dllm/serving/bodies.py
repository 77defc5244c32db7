"""The body of a request, read once, whoever asks first: an object of JSON, or a form. And the model that it names.

What comes behind a body is the news that the client has left.
"""

from __future__ import annotations

import asyncio
import importlib.util
import re
from collections.abc import Coroutine, Sequence
from typing import Any, TypeAlias, TypeVar

from starlette.datastructures import UploadFile
from starlette.requests import Request as HttpRequest
from starlette.types import Receive

from ..engines.errors import Refused
from ..engines.streams import Inbox
from ..errors import UserError
from ..inference.loaded_model import LoadedModel
from ..peers.reports import MOST_MODELS
from .fields import Json, read_json

Result = TypeVar("Result")
Form: TypeAlias = dict[str, str | bytes]  # a file as bytes

CHARSET = re.compile(r";\s*charset\s*=\s*\"?([^\";]*)", re.IGNORECASE)
JSON, FORM = "dllm.json", "dllm.form"  # where a request's scope has what was read


async def read_body(request: HttpRequest) -> Json:
    """The object of JSON. Raises Refused, Disconnected."""
    scope = request.scope
    if FORM in scope:
        raise Refused("the body must be a JSON object, and is a form")
    if JSON not in scope:
        scope[JSON] = read_json(await request.body())
    body: Json = scope[JSON]
    return body


async def read_form(request: HttpRequest) -> Form:
    """The fields of a form. Raises Refused where it is none, or has a field twice; and Disconnected."""
    scope = request.scope
    if not is_form(request) or JSON in scope:
        raise Refused("a recording comes as multipart/form-data, in the field file")
    if FORM not in scope:
        scope[FORM] = await _read_form(request)
    form: Form = scope[FORM]
    return form


def is_form(request: HttpRequest) -> bool:
    """Whether a request says that it has a form."""
    return request.headers.get("content-type", "").lower().startswith("multipart/form-data")


async def _read_form(request: HttpRequest) -> Form:
    kind = request.headers["content-type"]
    if not all(charset.lower() in ("utf-8", "utf8", "us-ascii") for charset in CHARSET.findall(kind)):
        raise Refused("the charset of a form must be utf-8")
    found: Form = {}
    try:
        async with request.form(max_files=1, max_fields=10, max_part_size=10_000) as form:
            for name, value in form.multi_items():
                if name in found:
                    raise Refused(f"{name[:100]} is there more than once", name[:100])
                found[name] = await value.read() if isinstance(value, UploadFile) else value
    except ValueError:  # of a codec, of whatever text
        raise Refused("the form cannot be read") from None
    return found


async def named_model(request: HttpRequest, forms: bool) -> str | None:
    """The model that a request names, of the query where it has no body; None: none. Raises Refused, Disconnected.

    forms : whether its body may be a form
    """
    if request.method != "POST":
        return request.query_params.get("model")
    given = await read_form(request) if forms and is_form(request) else await read_body(request)
    wanted = given.get("model")
    if wanted is not None and not isinstance(wanted, str):
        raise Refused("model must be a string", "model")
    return wanted


async def unless_disconnected(receive: Receive, inbox: Inbox, work: Coroutine[Any, Any, Result]) -> Result:
    """What the coroutine `work`, which reads from an inbox, returns; it gets Disconnected where the client leaves.

    It runs in a task of its own, so that each of its steps begins there and not below all that has called this.
    """

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        inbox.close()

    watcher, worker = asyncio.create_task(watch()), asyncio.create_task(work)
    try:
        return await worker
    finally:
        watcher.cancel()
        inbox.cancel()


def check_forms(model: LoadedModel) -> None:
    """Raise UserError where requests could not be read: recordings come as forms."""
    if model.config.features and not importlib.util.find_spec("python_multipart"):
        raise UserError("recordings are sent as forms, which takes python-multipart: pip install 'dllm[serve]'")


def check_names(names: Sequence[str], paths: Sequence[str]) -> None:
    """Raise UserError where requests could not name each model. paths : as the user has given them"""
    for place, name in enumerate(names):
        if name in names[:place]:
            both = f"{paths[names.index(name)]} and {paths[place]}"
            raise UserError(f"two models would be called {name}: {both}; give one of the folders another name")
    if len(names) > MOST_MODELS:
        raise UserError(f"{len(names)} models are given; one server has at most {MOST_MODELS}: start another one for the rest")
