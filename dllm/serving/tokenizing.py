"""/tokenize, /detokenize and /tokenizer_info, as vLLM has them: clients that count tokens, such as lm-eval, ask there."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ..data.tokenizers import END_OF_LINE, WordTokenizer
from ..engines.errors import Refused
from ..errors import UserError
from .bodies import read_body
from .fields import Fields, Json

if TYPE_CHECKING:
    from .service import Service


async def tokenize(service: Service, request: HttpRequest) -> Response:
    """The token numbers of a text: those that /v1/completions reads. Raises Refused, UserError."""
    fields = Fields(await read_body(request), service.name)
    if not isinstance(fields.body.get("prompt"), str):
        raise Refused("prompt must be there, a string", "prompt")
    text = [fields.body["prompt"]] if not fields.get("prompt") else fields.texts("prompt", service.vocabulary.size, most=1)
    special, named = fields.flag("add_special_tokens", True), fields.flag("return_token_strs")
    fields.refuse_unread()
    framed = special and service.kind == "lm"
    read = service.vocabulary.prompt if framed else service.vocabulary.source
    (prompt,) = await service.read_prompts(text, "prompt", read)
    tokens: list[int] = prompt.tokens.tolist() if prompt.after else prompt.written
    names = await asyncio.to_thread(service.vocabulary.names, tokens) if named else None
    body: Json = {"count": len(tokens), "max_model_len": service.limits.prompt, "tokens": tokens, "token_strs": names}
    return await service.answer(body, {})


async def detokenize(service: Service, request: HttpRequest) -> Response:
    """The text of token numbers. Raises Refused."""
    fields = Fields(await read_body(request), service.name)
    tokens = fields.get("tokens")
    if not isinstance(tokens, list) or not all(type(one) is int for one in tokens):
        raise Refused("tokens must be there, a list of token numbers", "tokens")
    if tokens:
        fields.texts("tokens", service.vocabulary.size, most=1)
    fields.refuse_unread()
    await service.read_prompts([tokens], "tokens", lambda given: given)
    text = await asyncio.to_thread(service.vocabulary.text, tokens)
    return await service.answer({"prompt": text}, {})


async def tokenizer_info(service: Service, request: HttpRequest) -> Response:
    """What the tokenizer is, as a tokenizer_config.json of Hugging Face says it.

    A text begins behind the end of a line; a model of words says such ends itself. The tokens of pairs have no spelling.
    """
    tokenizer = service.vocabulary.tokenizer
    line: str | None = None
    with contextlib.suppress(UserError):
        line = "\n" if not tokenizer.pairs and len(tokenizer.encode(b"\n", False)) == 1 else None
    unknown = None if tokenizer.unknown is None else service.vocabulary.name(tokenizer.unknown, False)
    body: Json = {
        "tokenizer_class": type(tokenizer).__name__, "kind": tokenizer.kind, "vocab_size": tokenizer.size,
        "model_max_length": service.limits.prompt, "bos_token": line,
        "eos_token": line if isinstance(tokenizer, WordTokenizer) and END_OF_LINE in tokenizer.numbers else None,
        "pad_token": None, "unk_token": unknown, "chat_template": None,
    }  # fmt: skip
    return await service.answer(body, {})
