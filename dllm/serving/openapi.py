"""The description of the interface at /openapi.json, in OpenAPI 3.1."""

from typing import Any, TypeAlias

from .. import __version__
from .limits import Limits
from .openai import CHOICES, SALT_LENGTH, SEEDS, STOP_LENGTH, STOPS
from .requests import MAX_LOGPROBS

Schema: TypeAlias = dict[str, Any]


REQUEST_NAME = "^[A-Za-z0-9_.:/+=@-]{1,128}$"  # as limits.REQUEST_ID has it
SOUND = "classifier of recordings"  # a kind of its own for clients: they send forms
POSTS = {  # kind -> path -> what is done, the schemas of the request and of the answer; completions come as events, too
    "lm": {
        "/v1/completions": ("Continue texts", "CompletionRequest", "Completion"),
        "/v1/score": ("Log-probabilities of a text", "ScoreRequest", "Score"),
        "/v1/embeddings": ("The model's state after a text", "EmbeddingRequest", "Embeddings"),
    },
    "seq2seq": {
        "/v1/completions": ("Give targets to sources", "TargetRequest", "Completion"),
        "/v1/score": ("Log-probabilities of a target after its source", "TargetScoreRequest", "Score"),
    },
    "tagger": {"/v1/tag": ("Tags of the words of texts", "LabelRequest", "Tags")},
    "classifier": {"/v1/classify": ("Classes of texts", "LabelRequest", "Classes")},
    SOUND: {"/v1/classify": ("The class of a recording", "RecordingRequest", "Classes")},
    "ctc": {"/v1/audio/transcriptions": ("What is said in a recording", "TranscriptionRequest", "Transcription")},
}
FORMS = {"RecordingRequest", "TranscriptionRequest"}  # the others are JSON


def describe(model: str, vocabulary: int, limits: Limits, needs_token: bool, kind: str = "lm", beams: int = CHOICES) -> Schema:
    """The whole description, a dict.

    Parameters
    ----------
    model : str
    vocabulary : int
    limits : limits.Limits
    needs_token : bool
    kind : str
        Of POSTS.
    beams : int
        That a search may have.
    """
    posts = {path: {"post": _post(*post)} for path, post in POSTS[kind].items()}
    used = {name for _, *names in POSTS[kind].values() for name in names} | {"Models", "Health", "Error"}
    schemas = _requests(model, vocabulary, limits, beams) | _answers()
    description: Schema = {
        "openapi": "3.1.0",
        "info": {
            "title": "dllm", "version": __version__,
            "description": "Completions in OpenAI's form, log-probabilities, states, labels and transcripts of LSTM models.",
        },
        "paths": {
            "/health": {"get": _get("How this rank and all others are", _schema("Health"))},
            "/health/ready": {"get": _ready()},
            "/metrics": {"get": _get("The same for Prometheus", {"type": "string"}, "text/plain")},
            "/v1/models": {"get": _get("The model there is", _schema("Models"))},
            **posts,
        },
        "components": {"schemas": {name: schema for name, schema in schemas.items() if name in used}},
    }  # fmt: skip
    _name_requests(description)
    if needs_token:
        description["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        description["security"] = [{"token": []}]
    return description


def _schema(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _content(schema: Schema, kind: str = "application/json") -> Schema:
    return {"content": {kind: {"schema": schema}}}


def _errors(*statuses: int) -> Schema:
    what = {
        400: "The request is wrong", 401: "The bearer token is wrong or missing", 403: "Of another site, or by another name",
        404: "There is no such model", 408: "The body came too slowly", 413: "The body is too large", 500: "The engine failed",
        503: "There is no room: try again", 504: "It took too long",
    }  # fmt: skip
    return {str(status): {"description": what[status], **_content(_schema("Error"))} for status in statuses}


def _get(what: str, schema: Schema, kind: str = "application/json") -> Schema:
    return {"summary": what, "responses": {"200": {"description": what, **_content(schema, kind)}, **_errors(401, 403)}}


def _ready() -> Schema:
    told = _content(_object(["status"], status={"enum": ["ok", "draining"]}))
    answers = {"200": {"description": "They should", **told}, "503": {"description": "Not any more", **told}}
    return {"summary": "Whether requests should come to this rank", "responses": answers | _errors(403), "security": []}


def _name_requests(description: Schema) -> None:
    """Say that every request may have a name, and that every answer has it."""
    name, schema = "X-Request-Id", {"type": "string", "pattern": REQUEST_NAME}
    about = "Names the request in the answer and in the log; one is made where there is none that is well formed"
    parts = description["components"]
    parts["parameters"] = {name: {"name": name, "in": "header", "description": about, "schema": schema}}
    parts["headers"] = {name: {"description": about, "required": True, "schema": schema}}
    for operation in (one for methods in description["paths"].values() for one in methods.values()):
        operation["parameters"] = [*operation.get("parameters", []), {"$ref": f"#/components/parameters/{name}"}]
        for answer in operation["responses"].values():
            answer["headers"] = {name: {"$ref": f"#/components/headers/{name}"}}


def _post(what: str, request: str, answer: str) -> Schema:
    done, form = _content(_schema(answer)), "multipart/form-data" if request in FORMS else "application/json"
    if answer == "Transcription":
        done["content"]["text/plain"] = {"schema": {"type": "string"}}
    if answer == "Completion":
        done["content"]["text/event-stream"] = {"schema": _object(["data"], data={"type": "string"})}  # of one event
    return {
        "summary": what, "requestBody": {"required": True, **_content(_schema(request), form)},
        "responses": {"200": {"description": what, **done}, **_errors(400, 401, 403, 404, 408, 413, 500, 503, 504)},
    }  # fmt: skip


def _object(required: list[str], closed: bool = False, **properties: Schema) -> Schema:
    more = {"additionalProperties": False} if closed else {}
    return {"type": "object", "required": required, "properties": properties, **more}


def _maybe(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _several(schema: Schema) -> Schema:
    return {"type": "array", "items": schema}


def _integer(least: float | None = None, most: float | None = None) -> Schema:
    bounds = {"minimum": least, "maximum": most}
    return {"type": "integer"} | {name: value for name, value in bounds.items() if value is not None}


def _number(least: float | None = None, most: float | None = None) -> Schema:
    return _integer(least, most) | {"type": "number"}


def _requests(model: str, vocabulary: int, limits: Limits, beams: int) -> Schema:
    text, flag = {"type": "string"}, _maybe({"type": "boolean"})
    tokens = {"type": "array", "minItems": 1, "items": _integer(0, vocabulary - 1)}
    several = [{"type": "array", "minItems": 1, "maxItems": CHOICES, "items": one} for one in (text, tokens)]
    texts = {"anyOf": [text, tokens, *several]}
    stop = {"type": "string", "minLength": 1, "maxLength": STOP_LENGTH}
    salt = _maybe({"type": "string", "maxLength": SALT_LENGTH})
    named = {"model": _maybe({"const": model}), "user": _maybe(text), "metadata": {}, "cache_salt": salt}
    written = named | {
        "prompt": texts,
        "max_tokens": _maybe(_integer(0, limits.tokens)),
        "seed": _maybe(_integer(0, SEEDS - 1)),
        "stop": _maybe({"anyOf": [stop, {"type": "array", "maxItems": STOPS, "items": stop}]}),
        "logprobs": _maybe(_integer(0, MAX_LOGPROBS)),
        "stream": flag,
        "stream_options": _maybe(_object([], closed=True, include_usage=flag, include_obfuscation=flag)),
        "suffix": _maybe({"const": ""}),
        "logit_bias": _maybe({"type": "object", "maxProperties": 0}),
        "presence_penalty": _maybe({"const": 0}),
        "frequency_penalty": _maybe({"const": 0}),
    }
    drawn = {
        "temperature": _maybe(_number(0, 2)),
        "top_p": _maybe(_number(0, 1)),
        "top_k": _maybe(_integer(0, vocabulary)),
        "echo": flag,
        "n": _maybe(_integer(1, CHOICES)),
        "best_of": {"description": "The same as n", **_maybe(_integer(1, CHOICES))},
    }
    searched = {
        "temperature": _maybe({"enum": [0, 1]}),
        "top_p": _maybe({"const": 1}),
        "top_k": _maybe({"const": 0}),
        "echo": _maybe({"const": False}),
        "n": {"description": "At most best_of", **_maybe(_integer(1, beams))},
        "best_of": {"description": "1 with stream or logprobs", **_maybe(_integer(1, beams))},
    }
    recording = {"file": {"type": "string", "format": "binary"}, "model": {"const": model}}
    return {
        "CompletionRequest": _object(["prompt"], closed=True, **written, **drawn),
        "TargetRequest": _object(["prompt"], closed=True, **written, **searched),
        "ScoreRequest": {
            "oneOf": [
                _object(["text"], closed=True, **named, text=text),
                _object(["tokens"], closed=True, **named, tokens=tokens),
            ]
        },
        "TargetScoreRequest": _object(["source", "target"], closed=True, **named, source=text, target=text),
        "LabelRequest": _object(["input"], closed=True, **named, input={"anyOf": [text, several[0]]}),
        "RecordingRequest": _object(["file"], closed=True, **recording),
        "TranscriptionRequest": _object(
            ["file"], closed=True, **recording, response_format={"enum": ["json", "text"]}, language=text, prompt=text,
            temperature=text,
        ),
        "EmbeddingRequest": _object(
            ["input"], closed=True, **named, input=texts, encoding_format=_maybe({"enum": ["float", "base64"]}),
        ),
    }  # fmt: skip


def _labelled(usage: Schema, entry: Schema) -> Schema:
    """Entries, one for each text."""
    text = {"type": "string"}
    return _object(
        ["object", "data", "model", "usage"], object={"const": "list"}, data=_several(entry), model=text, usage=usage
    )


def _answers() -> Schema:
    text, numbers = {"type": "string"}, {"type": "array", "items": _maybe(_number())}
    count = _integer(0)
    usage = _object(["prompt_tokens", "total_tokens"], prompt_tokens=count, completion_tokens=count, total_tokens=count)
    logprobs = _object(
        ["tokens", "token_logprobs", "top_logprobs", "text_offset"],
        tokens={"type": "array", "items": text}, token_logprobs=numbers,
        top_logprobs={"type": "array", "items": _maybe({"type": "object", "additionalProperties": _number()})},
        text_offset={"type": "array", "items": _integer(0)},
    )  # fmt: skip
    choice = _object(
        ["index", "text", "logprobs", "finish_reason"], index=_integer(0), text=text, logprobs=_maybe(logprobs),
        finish_reason={"enum": ["stop", "length", None]},
    )  # fmt: skip
    known = ["rank", "state", "host", "pid", "active", "queued", "slots", "tokens_per_second", "heard_seconds_ago"]
    rank = _object(known, rank=count)
    entry = _object(["id", "object"], id=text, object=text)
    embedding = _object(["object", "index", "embedding"], index=count, embedding={"anyOf": [_several(_number()), text]})
    word = _object(["word", "tag", "probability"], word=text, tag=text, probability=_number(0, 1))
    error = _object(["message", "type", "param", "code"], message=text, type=text, param=_maybe(text), code=_maybe(text))
    return {
        "Completion": _object(
            ["id", "object", "created", "model", "choices", "usage", "seed"], id=text, object={"const": "text_completion"},
            created=_integer(), model=text, seed=_integer(0), choices=_several(choice), usage=usage,
        ),
        "Score": _object(
            ["loss", "perplexity", "tokens", "token_ids", "token_logprobs", "usage"], logprob=_maybe(_number()),
            loss=_maybe(_number()), perplexity=_maybe(_number()),
            tokens=_several(text), token_ids=_several(_integer(0)), token_logprobs=numbers, usage=usage,
        ),
        "Embeddings": _object(
            ["object", "data", "model", "usage"], object={"const": "list"}, model=text, usage=usage, data=_several(embedding),
        ),
        "Tags": _labelled(usage, _object(["index", "words"], index=count, words=_several(word))),
        "Classes": _labelled(usage, _object(
            ["index", "label", "probability", "probabilities"], index=count, label=text, probability=_number(0, 1),
            probabilities={"type": "object", "additionalProperties": _number(0, 1)},
        )),
        "Transcription": _object(["text"], text=text),
        "Models": _object(["object", "data"], object={"const": "list"}, data=_several(entry)),
        "Health": _object(["status"], status={"enum": ["ok", "draining"]}, rank=_integer(0), model=text, ranks=_several(rank)),
        "Error": _object(["error"], error=error),
    }  # fmt: skip
