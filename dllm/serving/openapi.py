"""The description of the interface at /openapi.json, in OpenAPI 3.1."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from .. import __version__
from ..engines.limits import Limits
from ..engines.requests import LARGEST_REPETITION, LEAST_REPETITION, MAX_BIAS, MAX_BIASED, MAX_LOGPROBS, MAX_PENALTY
from .fields import CHOICES, NEUTRAL, SALT_LENGTH
from .labels import FORMATS
from .openai import LARGEST_K, SEEDS, STOP_LENGTH, STOPS
from .scoring import EMBEDDED

Schema: TypeAlias = dict[str, Any]


REQUEST_NAME = "^[A-Za-z0-9_.:/+=@-]{1,128}$"  # as guard.REQUEST_ID has it
SOUND, PAIRS = "classifier of recordings", "lm of pairs"  # kinds of their own for clients: they send forms, and pairs
TOKENS = {
    "/tokenize": ("The token numbers of a text", "TokenizeRequest", "Tokenized"),
    "/detokenize": ("The text of token numbers", "DetokenizeRequest", "Detokenized"),
}
POSTS = {  # kind -> path -> what is done, the schemas of the request and of the answer; completions come as events, too
    "lm": {
        "/v1/completions": ("Continue texts", "CompletionRequest", "Completion"),
        "/v1/score": ("Log-probabilities of a text", "ScoreRequest", "Score"),
        "/v1/embeddings": ("The model's state after a text", "EmbeddingRequest", "Embeddings"),
        **TOKENS,
    },
    PAIRS: {
        "/v1/completions": ("Draw targets of sources", "CompletionRequest", "Completion"),
        "/v1/score": ("Log-probabilities of a target after its source, or of tokens", "PairScoreRequest", "Score"),
        "/v1/embeddings": ("The model's state after a source", "EmbeddingRequest", "Embeddings"),
        **TOKENS,
    },
    "seq2seq": {
        "/v1/completions": ("Give targets to sources", "TargetRequest", "Completion"),
        "/v1/score": ("Log-probabilities of a target after its source", "TargetScoreRequest", "Score"),
        **TOKENS,
    },
    "tagger": {"/v1/tag": ("Tags of the words of texts", "LabelRequest", "Tags")},
    "classifier": {"/v1/classify": ("Classes of texts", "LabelRequest", "Classes")},
    SOUND: {"/v1/classify": ("The class of a recording", "RecordingRequest", "Classes")},
    "ctc": {"/v1/audio/transcriptions": ("What is said in a recording", "TranscriptionRequest", "Transcription")},
}
JSON = "application/json"
READ: Schema = {"type": "string", "minLength": 1}  # a text that is read as a whole: one that is empty is none
FORMS = {"RecordingRequest", "TranscriptionRequest"}  # the others are JSON


def described_as(kind: str, of_sound: bool, of_pairs: bool) -> str:
    """The kind of POSTS of a kind of model that hears recordings, or was trained on pairs."""
    return {("classifier", True): SOUND}.get((kind, of_sound)) or (PAIRS if kind == "lm" and of_pairs else kind)


class Described(NamedTuple):
    """A model of the description."""

    name: str
    vocabulary: int
    kind: str = "lm"  # of POSTS
    beams: int = CHOICES  # that a search may have


def describe(models: Sequence[Described], limits: Limits, needs_token: bool) -> Schema:
    """The whole description, a dict: what any of the models answers."""
    posts, requests = dict[str, Schema](), dict[str, Schema]()
    for path in dict.fromkeys(path for one in models for path in POSTS[one.kind]):
        having = [one for one in models if path in POSTS[one.kind]]
        content, more = _bodies_of(path, having, limits)
        whats = dict.fromkeys(POSTS[one.kind][path][0] for one in having)
        posts[path] = {"post": _post("; ".join(whats), content, POSTS[having[0].kind][path][2])}
        requests |= more
    info = {"/tokenizer_info": {"get": _info(models)}} if "/tokenize" in posts else {}
    used = {answer for one in models for _, _, answer in POSTS[one.kind].values()} | {"Models", "Model", "Health", "Error"}
    used |= {"TokenizerInfo"} if info else set()
    listed = "The models there are" if len(models) > 1 else "The model there is"
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
            "/v1/models": {"get": _get(listed, _schema("Models"))},
            "/v1/models/{model}": {"get": _named(models[0].name) | _get("The model of this name", _schema("Model"), JSON, 404)},
            **info,
            **posts,
        },
        "components": {"schemas": requests | {name: schema for name, schema in _answers().items() if name in used}},
    }  # fmt: skip
    _name_requests(description)
    if needs_token:
        description["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        description["security"] = [{"token": []}]
    return description


def _schema(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _content(schema: Schema, kind: str = JSON) -> Schema:
    return {"content": {kind: {"schema": schema}}}


def _errors(*statuses: int) -> Schema:
    what = {
        400: "The request is wrong", 401: "The bearer token is wrong or missing", 403: "Of another site, or by another name",
        404: "There is no such model or path", 408: "The body came too slowly", 413: "The body is too large",
        500: "The engine failed", 503: "There is no room: try again", 504: "It took too long",
    }  # fmt: skip
    return {str(status): {"description": what[status], **_content(_schema("Error"))} for status in statuses}


def _get(what: str, schema: Schema, kind: str = JSON, *errors: int) -> Schema:
    answers = {"200": {"description": what, **_content(schema, kind)}, **_errors(401, 403, *errors)}
    return {"summary": what, "responses": answers}


def _named(model: str) -> Schema:
    place = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}, "example": model}
    return {"parameters": [place]}


def _info(models: Sequence[Described]) -> Schema:
    """Of several models the one is asked about that is named, or the only one that has tokens."""
    what, schema = "What the tokenizer is", _schema("TokenizerInfo")
    if len(models) == 1:
        return _get(what, schema)
    names = [one.name for one in models if "/tokenize" in POSTS[one.kind]]
    wanted = {"name": "model", "in": "query", "required": len(names) > 1, "schema": {"enum": names}}
    return {"parameters": [wanted]} | _get(what, schema, JSON, 400, 404)


def _bodies_of(path: str, having: Sequence[Described], limits: Limits) -> tuple[Schema, Schema]:
    """What requests for a path may be, by media type, and the schemas that this refers to. Of several models one is named."""
    content, schemas = dict[str, list[Schema]](), dict[str, Schema]()
    for number, one in enumerate(having, 1):
        name = POSTS[one.kind][path][1]
        schema = (_completions(one.name, one.vocabulary, limits, one.beams) | _requests(one.name, one.vocabulary))[name]
        media = "multipart/form-data" if name in FORMS else JSON
        if len(having) > 1:
            name, schema = f"{name}{number}", _naming(schema, one.name)
        schemas[name] = schema
        content.setdefault(media, []).append(_schema(name))
    told = {media: {"schema": {"oneOf": several} if len(several) > 1 else several[0]} for media, several in content.items()}
    return told, schemas


def _naming(schema: Schema, model: str) -> Schema:
    """The schema of a request that has to name its model."""
    if "oneOf" in schema:
        return {"oneOf": [_naming(one, model) for one in schema["oneOf"]]}
    return schema | {
        "required": ["model", *schema["required"]], "properties": schema["properties"] | {"model": {"const": model}},
    }  # fmt: skip


def _ready() -> Schema:
    told = _content(_object(["status"], status={"enum": ["ok", "draining"]}))
    answers = {"200": {"description": "They should", **told}, "503": {"description": "Not any more", **told}}
    return {"summary": "Whether requests should come to this rank", "responses": answers | _errors(403), "security": []}


def _name_requests(description: Schema) -> None:
    """Say that every request may have a name, and that every answer has it."""
    name, schema = "X-Request-Id", {"type": "string", "pattern": REQUEST_NAME}
    about = "Names the request in the answer and in the log; one is made where there is none that is well formed"
    parts = description["components"]
    parts["parameters"] = {name: {"name": name, "in": "header", "description": about, "schema": {"type": "string"}}}
    parts["headers"] = {name: {"description": about, "required": True, "schema": schema}}
    for operation in (one for methods in description["paths"].values() for one in methods.values()):
        operation["parameters"] = [*operation.get("parameters", []), {"$ref": f"#/components/parameters/{name}"}]
        for answer in operation["responses"].values():
            answer["headers"] = {name: {"$ref": f"#/components/headers/{name}"}}


def _post(what: str, content: Schema, answer: str) -> Schema:
    """content : of requests, by media type"""
    done = _content(_schema(answer))
    if answer == "Transcription":
        done["content"]["text/plain"] = {"schema": {"type": "string"}}
    if answer == "Completion":
        done["content"]["text/event-stream"] = {"schema": _object(["data"], data={"type": "string"})}  # of one event
    return {
        "summary": what, "requestBody": {"required": True, "content": content},
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


def _bodies(model: str, vocabulary: int) -> tuple[Schema, Schema, Schema]:
    """What many requests have: a text, tokens, and the fields of all requests."""
    text = {"type": "string"}
    tokens = {"type": "array", "minItems": 1, "items": _integer(0, vocabulary - 1)}
    salt = _maybe({"type": "string", "maxLength": SALT_LENGTH})
    named = {"model": _maybe({"const": model}), "user": _maybe(text), "metadata": {}, "cache_salt": salt}
    return text, tokens, named


def _some(schema: Schema, most: int = CHOICES) -> Schema:
    return {"type": "array", "minItems": 1, "maxItems": most, "items": schema}


def _completions(model: str, vocabulary: int, limits: Limits, beams: int) -> Schema:
    """Requests for texts that are drawn, and for targets that are searched for."""
    text, tokens, named = _bodies(model, vocabulary)
    flag, stop = _maybe({"type": "boolean"}), {"type": "string", "minLength": 1, "maxLength": STOP_LENGTH}
    written = named | {
        "prompt": {"anyOf": [text, tokens, _some(text), _some(tokens)]},
        "max_tokens": _maybe(_integer(0, limits.tokens)),
        "seed": _maybe(_integer(0, SEEDS - 1)),
        "stop": _maybe({"anyOf": [stop, {"type": "array", "maxItems": STOPS, "items": stop}]}),
        "logprobs": _maybe(_integer(0, MAX_LOGPROBS)),
        "stream": flag,
        "stream_options": _maybe(_object([], closed=True, include_usage=flag, include_obfuscation=flag)),
    }
    written |= {name: {"description": "Asks for nothing", "enum": [*values]} for name, values in NEUTRAL.items()}
    bias = {"type": "object", "maxProperties": MAX_BIASED, "additionalProperties": _number(-MAX_BIAS, MAX_BIAS)}
    few = vocabulary <= MAX_BIASED
    bias["propertyNames"] = {"enum": [str(one) for one in range(vocabulary)]} if few else {"pattern": "^[0-9]{1,9}$"}
    penalty = _maybe(_number(-MAX_PENALTY, MAX_PENALTY))
    drawn = {
        "temperature": _maybe(_number(0, 2)),
        "top_p": _maybe(_number(0, 1)),
        "top_k": {"description": "-1 and 0: among all", **_maybe(_integer(-1, LARGEST_K))},
        "min_p": _maybe(_number(0, 1)),
        "logit_bias": {"description": "Token number: what is added to its logit. `<unk>` comes only if named", **_maybe(bias)},
        "presence_penalty": penalty,
        "frequency_penalty": penalty,
        "repetition_penalty": _maybe(_number(LEAST_REPETITION, LARGEST_REPETITION)),
        "echo": flag,
        "n": _maybe(_integer(1, CHOICES)),
        "best_of": {"description": "At least n; with stream the same as n", **_maybe(_integer(1, CHOICES))},
    }
    searched = {
        "prompt": {"anyOf": [READ, tokens, _some(READ), _some(tokens)]},
        "temperature": _maybe({"enum": [0, 1]}),
        "top_p": _maybe({"const": 1}),
        "top_k": _maybe({"enum": [-1, 0]}),
        "min_p": _maybe({"const": 0}),
        "logit_bias": _maybe({"type": "object", "maxProperties": 0}),
        "presence_penalty": _maybe({"const": 0}),
        "frequency_penalty": _maybe({"const": 0}),
        "repetition_penalty": _maybe({"const": 1}),
        "echo": _maybe({"const": False}),
        "n": {"description": "At most best_of", **_maybe(_integer(1, beams))},
        "best_of": {"description": "1 with stream or logprobs", **_maybe(_integer(1, beams))},
    }
    return {
        "CompletionRequest": _object(["prompt"], closed=True, **written, **drawn),
        "TargetRequest": _object(["prompt"], closed=True, **(written | searched)),
    }


def _requests(model: str, vocabulary: int) -> Schema:
    """All other requests."""
    text, tokens, named = _bodies(model, vocabulary)
    flag, recording = _maybe({"type": "boolean"}), {"file": {"type": "string", "format": "binary"}, "model": {"const": model}}
    of_tokens = _object(["tokens"], closed=True, **named, tokens=tokens)
    of_target = _object(["source", "target"], closed=True, **named, source=READ, target=text)
    many = {"anyOf": [text, tokens, _some(text, EMBEDDED), _some(tokens, EMBEDDED)]}
    return {
        "ScoreRequest": {"oneOf": [_object(["text"], closed=True, **named, text=text), of_tokens]},
        "PairScoreRequest": {"oneOf": [of_target, of_tokens]},
        "TargetScoreRequest": of_target,
        "LabelRequest": _object(["input"], closed=True, **named, input={"anyOf": [READ, _some(READ)]}),
        "RecordingRequest": _object(["file"], closed=True, **recording),
        "TranscriptionRequest": _object(
            ["file"], closed=True, **recording, response_format={"enum": [*FORMATS]}, language=text, prompt=text,
            temperature=text, stream={"enum": ["false"]},
        ),
        "EmbeddingRequest": _object(
            ["input"], closed=True, **named, input=many, encoding_format=_maybe({"enum": ["float", "base64"]}),
        ),
        "TokenizeRequest": _object(
            ["prompt"], closed=True, **named, prompt=text, add_special_tokens=flag, return_token_strs=flag,
        ),
        "DetokenizeRequest": _object(["tokens"], closed=True, **named, tokens=_several(_integer(0, vocabulary - 1))),
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
    rank, named = _object(known, rank=count), _object(["model", "kind"], model=text, kind=text)
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
        "Transcription": _object(["text"], text=text, task=text, language=text, duration=_number(0)),
        "Tokenized": _object(
            ["count", "max_model_len", "tokens", "token_strs"], count=count, max_model_len=count, tokens=_several(count),
            token_strs=_maybe(_several(text)),
        ),
        "Detokenized": _object(["prompt"], prompt=text),
        "TokenizerInfo": _object(
            ["tokenizer_class", "kind", "vocab_size", "bos_token", "eos_token"], tokenizer_class=text, kind=text,
            vocab_size=count, model_max_length=count,
            bos_token=_maybe(text), eos_token=_maybe(text), pad_token={"type": "null"}, unk_token=_maybe(text),
            chat_template={"type": "null"},
        ),
        "Model": entry,
        "Models": _object(["object", "data"], object={"const": "list"}, data=_several(entry)),
        "Health": _object(
            ["status"], status={"enum": ["ok", "draining"]}, rank=_integer(0), model=text, models=_several(named),
            ranks=_several(rank),
        ),
        "Error": _object(["error"], error=error),
    }  # fmt: skip
