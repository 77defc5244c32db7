"""OpenAI's protocol: what a request may say, checked, and the bodies of answers and errors.

The form is that of https://platform.openai.com/docs/api-reference/completions; `top_k` and `seed` in answers are additions.
"""

import json
import math
import secrets
import time
from dataclasses import dataclass

encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
SEEDS = 1 << 63  # seeds are 0 to SEEDS - 1; the next choice has the next seed
CHOICES = 64  # streams that one request may ask for
STOPS, STOP_LENGTH = 4, 256
LOGPROBS = 20
NEUTRAL = {  # what we do not do, and the values of it that ask for nothing
    "suffix": (None, ""), "logit_bias": (None, {}), "presence_penalty": (None, 0), "frequency_penalty": (None, 0),
}  # fmt: skip
FORGOTTEN = {"user", "metadata"}  # say something about the client and nothing about the answer


class Refused(Exception):
    """A request that gets an error for an answer."""

    def __init__(self, message, param=None, status=400, code=None, headers=None):
        super().__init__(message)
        self.message, self.param, self.status, self.code, self.headers = message, param, status, code, headers or {}

    def body(self):
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def data(self):
        """The body as bytes: in ASCII, since it may tell of what is no character."""
        return json.dumps(self.body()).encode()


def busy(message="this server has as much to do as it may take on: try again"):
    return Refused(message, status=503, code="overloaded", headers={"Retry-After": "1"})


def read_json(data):
    """The object of a request's body, bytes. Raises Refused."""

    def constant(text):
        raise ValueError(f"{text} is no number of JSON")

    try:
        value = json.loads(data.decode(), parse_constant=constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise Refused(f"the body is no JSON in UTF-8: {str(error) or 'it is nested too deeply'}"[:300]) from None
    if not isinstance(value, dict):
        raise Refused("the body must be a JSON object")
    return value


class Fields:
    """A request's body, field by field; what nobody has asked for is refused."""

    def __init__(self, body, model):
        self.body, self.left = body, set(body) - FORGOTTEN
        wanted = self.take("model")
        if wanted is not None and not isinstance(wanted, str):
            raise Refused("model must be a string", "model")
        if wanted not in (None, model):
            raise Refused(f"there is no model {wanted[:100]!r}; there is {model!r}", "model", 404, "model_not_found")

    def take(self, name, default=None):
        """A field; null is the same as none."""
        self.left.discard(name)
        value = self.body.get(name)
        return default if value is None else value

    def number(self, name, default, least, most, kind=float):
        value = self.take(name, default)
        if value is default:
            return value
        kinds = (int,) if kind is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
            what = "an integer" if kind is int else "a number"
            raise Refused(f"{name} must be {what} from {least} to {most}", name)
        return kind(value)

    def flag(self, name, default=False):
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise Refused(f"{name} must be true or false", name)
        return value

    def texts(self, name, vocabulary, most=CHOICES):
        """A list of str and of lists of token numbers, from one of them or several."""
        value = self.take(name)
        if isinstance(value, str) or _are_tokens(value):
            value = [value]
        if not isinstance(value, list) or not value or not all(isinstance(one, str) or _are_tokens(one) for one in value):
            raise Refused(f"{name} must be a string, a list of strings, a list of token numbers or a list of such lists", name)
        if len(value) > most:
            raise Refused(f"{name} has {len(value)} parts; {most} are allowed", name)
        for one in value:
            if not isinstance(one, str) and not all(0 <= number < vocabulary for number in one):
                raise Refused(f"{name}: token numbers are from 0 to {vocabulary - 1}", name)
            if isinstance(one, str) and not _is_unicode(one):
                raise Refused(f"{name} holds half of a surrogate pair, which is no character", name)
        return value

    def done(self):
        for name, neutral in NEUTRAL.items():
            if name in self.left and not any(self.body[name] == value for value in neutral):
                raise Refused(f"{name} is not supported", name, code="unsupported_parameter")
        unknown = sorted(self.left - set(NEUTRAL))
        if unknown:
            raise Refused(f"unknown parameter {unknown[0][:100]!r}", unknown[0][:100], code="unknown_parameter")


def _are_tokens(value):
    return isinstance(value, list) and value != [] and all(type(one) is int for one in value)


def _is_unicode(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What a request to /v1/completions asks for."""

    prompts: list  # of str, or of lists of token numbers
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int  # 0: among all tokens
    seed: int  # of the first choice
    stop: tuple  # of str
    logprobs: int | None  # alternatives to each token
    echo: bool
    n: int  # choices for each prompt
    stream: bool
    include_usage: bool

    @classmethod
    def read(cls, body, model, vocabulary, most_tokens):
        """Raises Refused.

        Parameters
        ----------
        body : dict
        model : str
            The one there is.
        vocabulary, most_tokens : int
        """
        fields = Fields(body, model)
        n = fields.number("n", 1, 1, CHOICES, int)
        if fields.number("best_of", n, 1, CHOICES, int) != n:
            raise Refused("best_of other than n is not supported", "best_of", code="unsupported_parameter")
        wanted = cls(
            prompts=fields.texts("prompt", vocabulary),
            max_tokens=fields.number("max_tokens", 16, 0, most_tokens, int),
            temperature=fields.number("temperature", 1.0, 0, 2),
            top_p=fields.number("top_p", 1.0, 0, 1) or 1e-9,
            top_k=fields.number("top_k", 0, 0, vocabulary, int),
            seed=fields.number("seed", secrets.randbelow(1 << 53), 0, SEEDS - 1, int),  # JavaScript's numbers end at 2^53
            stop=_stops(fields.take("stop", [])),
            logprobs=fields.number("logprobs", None, 0, LOGPROBS, int),
            echo=fields.flag("echo"),
            n=n,
            stream=fields.flag("stream"),
            include_usage=_include_usage(fields.take("stream_options"), body.get("stream")),
        )
        fields.done()
        if len(wanted.prompts) * n > CHOICES:
            raise Refused(f"{len(wanted.prompts)} prompts with n = {n} are more than {CHOICES} choices", "n")
        return wanted


def _stops(value):
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > STOPS or not all(isinstance(one, str) and one for one in stops):
        raise Refused(f"stop must be a string or a list of up to {STOPS}, none of them empty", "stop")
    if any(len(one) > STOP_LENGTH for one in stops):
        raise Refused(f"a stop string may have {STOP_LENGTH} characters", "stop")
    return tuple(stops)


def _include_usage(options, stream):
    if options is None:
        return False
    if not stream or not isinstance(options, dict) or not set(options) <= {"include_usage", "include_obfuscation"}:
        raise Refused('stream_options must be {"include_usage": true or false}, with stream', "stream_options")
    if not all(value is None or isinstance(value, bool) for value in options.values()):
        raise Refused("include_usage must be true or false", "stream_options")
    return bool(options.get("include_usage"))


def usage(prompt, completion):
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class Answer:
    """The bodies of one answer of /v1/completions: whole, or in chunks."""

    def __init__(self, model, seed):
        self.head = {
            "id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time()), "model": model,
            "seed": seed,
        }  # fmt: skip

    def body(self, choices, counts=None):
        """counts : (prompt tokens, completion tokens), or None: not said."""
        return self.head | {"choices": choices} | ({"usage": usage(*counts)} if counts else {})


def choice(index, text, logprobs, reason):
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def logprobs(pieces, name):
    """OpenAI's four lists of some Pieces. name : token number -> str."""
    tokens = [piece.token for piece in pieces]
    return {
        "tokens": [name(token.number) for token in tokens],
        "token_logprobs": [finite(token.logprob) for token in tokens],
        "top_logprobs": [_best(token, name) for token in tokens],
        "text_offset": [piece.start for piece in pieces],
    }


def _best(token, name):
    """Text -> log-probability of a token's alternatives; of two with the same text the likelier."""
    if token.logprob is None:
        return None
    found = {}
    for number, value in token.alternatives or ():
        found.setdefault(name(number), finite(value))
    return found


def finite(value):
    """JSON has no infinity: the log-probability of what cannot be."""
    return value if value is None or math.isfinite(value) else -1e9


def models(model, created):
    entry = {"id": model, "object": "model", "created": created, "owned_by": "dllm"}
    return {"object": "list", "data": [entry]}
