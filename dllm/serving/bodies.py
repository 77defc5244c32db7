"""The body of a request, read once, whoever asks first: an object of JSON, or a form. And the model that it names."""

from __future__ import annotations

import re
from typing import TypeAlias

from starlette.datastructures import UploadFile
from starlette.requests import Request as HttpRequest

from .errors import Refused
from .fields import Json, read_json

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
