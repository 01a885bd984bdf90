"""The OpenAI API in words: what a request may say, and how an error is told.

Models of pydantic, strict as the original is: a number in quotes is an error, an unknown field is
not. No engine and no network in this room.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError
from pydantic_core import PydanticCustomError

from holdfast.i18n import _
from holdfast.serving.engine.sampling import Sampling

log = logging.getLogger("holdfast")

CHOICES = 128  # most choices of a request, prompts times n, as in the original
_STOPS, _STOP_SIZE = 4, 500
_STOP_IDS = 128
_MESSAGES = 2048  # messages of a conversation, and parts of a message
_BIASES = 1024  # tokens that `logit_bias` may name
_SEED = 1 << 63
_TOLD = 600  # characters of an error's message: what was sent is not sent back whole

# Fields that other servers know and that change the text, with the value that says nothing. To
# leave them out in silence would be a wrong answer.
_ELSEWHERE: dict[str, object] = {
    "tools": None,
    "functions": None,
    "suffix": None,
    "audio": None,
    "modalities": ["text"],
    "repetition_penalty": 1,
    "length_penalty": 1,
    "typical_p": 1,
    "min_p": 0,
    "min_tokens": 0,
    "mirostat": 0,
    "use_beam_search": None,
    "bad_words": None,
    "grammar": None,
    "json_schema": None,
    "guided_json": None,
    "guided_regex": None,
    "guided_choice": None,
    "guided_grammar": None,
    "structured_outputs": None,
    "chat_template": None,
    "continue_final_message": None,
    "include_stop_str_in_output": None,
    "truncate_prompt_tokens": None,
}


class ApiError(Exception):
    """An error as the original API tells it: body, status, perhaps headers."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ) -> None:
        message = _shortened(message, _TOLD)
        super().__init__(message)
        self.status, self.message, self.code, self.kind = status, message, code, kind
        self.param = None if param is None else _shortened(param, 100)
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """Return the JSON of the error, in the form that the clients know."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def invalid(message: str, param: str | None, code: str = "invalid_value") -> ApiError:
    """Return the error over a request that is wrong in the field `param`."""
    return ApiError(400, message, param=param, code=code)


def server_error(message: str, *, status: int = 500, code: str | None = None) -> ApiError:
    """Return an error that is ours; the client is told that asking again does not help."""
    headers = {"x-should-retry": "false"} if status == 500 else {"Retry-After": "1"}
    return ApiError(status, message, code=code, kind="server_error", headers=headers)


def tokenizer_failed(error: BaseException) -> ApiError:
    """Log that a model's tokenizer raised an error, and return the error for the client."""
    reason = (str(error) or type(error).__name__).strip().partition("\n")[0]
    told = server_error(
        _("The model's tokenizer failed: {reason}", reason=reason), code="tokenizer_failed"
    )
    log.warning("%s", told)
    return told


def too_many(message: str, retry_after: int, code: str) -> ApiError:
    """Return 429, with the seconds after which it is worth trying again."""
    headers = {"Retry-After": str(retry_after)}
    return ApiError(429, message, code=code, kind="rate_limit_error", headers=headers)


# ------------------------------------------------------------------------------------- requests


# What may be one thing or a list is read by hand. As a union, pydantic tries every alternative on
# every item and keeps an error for each: a body of 1 MiB took seconds and a gigabyte.


def _prompt(value: object) -> object:
    if value is None or isinstance(value, str) or _whole_numbers(value):
        return value
    if isinstance(value, list):
        check_count(len(value), CHOICES)
        if all(isinstance(one, str) for one in value) or all(map(_whole_numbers, value)):
            return value
    raise PydanticCustomError(
        "prompt_type",
        "{reason}",
        {
            "reason": _(
                "a text, a list of texts, a list of token ids, or a list of such lists is needed"
            )
        },
    )


def _whole_numbers(value: object) -> bool:
    return isinstance(value, list) and set(map(type, value)) <= {int}


def _stops(value: object) -> object:
    stops: list[Any] = value if isinstance(value, list) else [value] if value else []
    if len(stops) > _STOPS:
        raise ValueError(_("at most {count} stop strings", count=_STOPS))
    if not all(isinstance(stop, str) for stop in stops):
        raise PydanticCustomError(
            "stop_type", "{reason}", {"reason": _("a text or a list of texts is needed")}
        )
    if not all(0 < len(stop) <= _STOP_SIZE for stop in stops):
        raise ValueError(_("a stop string has 1 to {count} characters", count=_STOP_SIZE))
    return stops


def _text(value: object) -> object:
    """Return the words of a message, whose content may come in parts. Raises ApiError over pictures
    and sounds."""
    parts = value if isinstance(value, list) else [{"type": "text", "text": value}]
    if len(parts) > _MESSAGES:
        raise ValueError(_("at most {count} content parts", count=_MESSAGES))
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise invalid(
                _("Only text is understood here: content parts of the type 'text'."),
                "messages",
                "unsupported_value",
            )
        text = part.get("text") or "" if kind else None
        if not isinstance(text, str):
            raise PydanticCustomError(
                "content_type",
                "{reason}",
                {"reason": _("a text or a list of content parts is needed")},
            )
        texts.append(text)
    return "".join(texts)


def _few(value: object) -> object:
    if isinstance(value, dict) and len(value) > _BIASES:
        raise ValueError(_("it may name at most {count} tokens", count=_BIASES))
    return value


def check_count(count: int, limit: int) -> None:
    """Raise ApiError where a request asks for `count` texts and at most `limit` can be made."""
    if count > limit:
        raise invalid(
            _(
                "{count} texts are asked for at a time; at most {limit} can be.",
                count=count,
                limit=limit,
            ),
            "n",
        )


class _Object(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class StreamOptions(_Object):
    """`stream_options`."""

    include_usage: bool | None = None


class _Request(_Object):
    """The fields that both APIs have."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    n: Annotated[int, Field(ge=1, le=CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-_SEED, lt=_SEED)] | None = None
    stop: Annotated[list[str], PlainValidator(_stops)] = []
    stop_token_ids: Annotated[list[int], Field(max_length=_STOP_IDS, fail_fast=True)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[
        dict[str, Annotated[float, Field(ge=-100, le=100)]] | None, BeforeValidator(_few)
    ] = None
    ignore_eos: bool | None = None
    response_format: dict[str, Any] | None = None

    def check(self) -> None:
        """Raise ApiError over what this server does not do."""
        kind = (self.response_format or {}).get("type", "text")
        if kind not in ("text", "json_object"):
            raise invalid(
                _(
                    "'response_format' may be of the type text or json_object here, not "
                    "{kind}: ask for json_object, and describe the form in the prompt.",
                    kind=str(kind)[:40],
                ),
                "response_format",
                "unsupported_value",
            )

    @property
    def json_object(self) -> bool:
        """True if the text must become a JSON object."""
        return (self.response_format or {}).get("type") == "json_object"

    @property
    def wants_usage(self) -> bool:
        """True if a stream ends with the counts of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(
        self, *, max_tokens: int, vocabulary: int, logprobs: int | None, prompt_logprobs: bool
    ) -> Sampling:
        """Return the sampling of this request. Raises ApiError over a token that is not there."""
        seed = self.seed
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=min(max(0, self.top_k or 0), vocabulary),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=_bias(self.logit_bias or {}, vocabulary),
            # Without one, a seed of its own: several choices then differ as they should.
            seed=secrets.randbits(63) if seed is None else seed,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            ignore_eos=bool(self.ignore_eos),
            stop_token_ids=_known_tokens(self.stop_token_ids or [], vocabulary),
        )


class CompletionRequest(_Request):
    """`POST /v1/completions`."""

    prompt: Annotated[str | list[Any] | None, PlainValidator(_prompt)] = None
    """A text, texts, token ids, or lists of token ids."""
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: int | None = None

    def check(self) -> None:
        super().check()
        if self.best_of is not None and self.best_of != (self.n or 1):
            _unsupported("best_of")


class Message(_Object):
    """A message of a conversation."""

    role: str
    content: Annotated[str, PlainValidator(_text)] = ""
    tool_calls: Any = None
    function_call: Any = None


class ChatRequest(_Request):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=_MESSAGES, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid(_("'top_logprobs' needs 'logprobs': true."), "top_logprobs")
        for name in ("tool_calls", "function_call"):
            if any(getattr(message, name) for message in self.messages):
                _unsupported(name)


def _unsupported(name: str) -> NoReturn:
    raise invalid(
        _("'{name}' is not supported by this server.", name=name), name, "unsupported_parameter"
    )


def _bias(given: dict[str, float], vocabulary: int) -> dict[int, float]:
    bias = {}
    for name, value in given.items():
        token = int(name) if name.isascii() and name.isdigit() and len(name) < 20 else vocabulary
        if token >= vocabulary:
            raise invalid(
                _(
                    "'logit_bias' names the token {name}; the vocabulary has 0 to {last}.",
                    name=name[:20],
                    last=vocabulary - 1,
                ),
                "logit_bias",
            )
        bias[token] = value
    return bias


def _known_tokens(given: list[int], vocabulary: int) -> frozenset[int]:
    unknown = [token for token in given if not 0 <= token < vocabulary]
    if unknown:
        raise invalid(
            _(
                "Invalid '{name}': a token is not in the vocabulary (0 to {last}).",
                name="stop_token_ids",
                last=vocabulary - 1,
            ),
            "stop_token_ids",
        )
    return frozenset(given)


# -------------------------------------------------------------------------------------- parsing

_CONTAINERS = 20_000  # lists and objects in a body: far more than messages and their parts
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(body: bytes) -> dict[str, Any]:
    """Return the JSON object in `body`. Raises ApiError where there is none."""
    if _containers(body) > _CONTAINERS:
        raise _no_json(_("it has more than {count} lists and objects", count=_CONTAINERS))
    try:
        text = body.decode("utf-8-sig")
        value = json.loads(text, parse_constant=_no_constant)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except RecursionError as error:
        raise _no_json(_("it is nested too deeply")) from error
    except (json.JSONDecodeError, UnicodeError) as error:
        raise _no_json(error) from error
    except ValueError as error:  # Python's limit for the digits of a whole number
        raise _no_json(_("a number has too many digits")) from error
    if not isinstance(value, dict):
        raise invalid(_("The body of the request must be a JSON object."), None, "invalid_json")
    return value


def _no_json(reason: object) -> ApiError:
    return invalid(
        _("The body of the request is not JSON: {reason}", reason=reason), None, "invalid_json"
    )


def _containers(body: bytes) -> int:
    """Count lists and objects in `body`. Each takes 60 times its text, and Python's garbage
    collector goes through all of them again and again: half a million held every thread up for a
    second."""
    if len(body) <= _CONTAINERS:
        return 0
    outside = body.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')[::2]
    return sum(b"".join(outside).count(bracket) for bracket in (b"[", b"{"))


def _no_constant(name: str) -> NoReturn:
    raise _no_json(_("{name} is not a number in JSON", name=name))


def parse_completion(body: bytes) -> CompletionRequest:
    """Return the request in `body`. Raises ApiError with the field that is wrong."""
    return _parse(CompletionRequest, body)


def parse_chat(body: bytes) -> ChatRequest:
    """Return the request in `body`. Raises ApiError with the field that is wrong."""
    return _parse(ChatRequest, body)


_Kind = TypeVar("_Kind", CompletionRequest, ChatRequest)


def _parse(kind: type[_Kind], body: bytes) -> _Kind:
    value = parse_json(body)
    for name, neutral in _ELSEWHERE.items():
        if value.get(name) and value[name] != neutral:
            _unsupported(name)
    try:
        request = kind.model_validate(value)
    except ValidationError as error:
        raise _told(error) from error
    request.check()
    return request


def _told(error: ValidationError) -> ApiError:
    """Return the first problem, as the original says it."""
    first = error.errors(include_url=False, include_input=False)[0]
    param = "".join(f"[{p}]" if isinstance(p, int) else f".{p[:40]}" for p in first["loc"])
    param = param.lstrip(".")
    if first["type"] == "missing":
        return invalid(
            _("You must provide '{name}'.", name=param), param, "missing_required_parameter"
        )
    known = _reasons(first.get("ctx", {})).get(first["type"])
    reason = known or str(first["msg"]).removeprefix("Value error, ")
    code = "invalid_type" if first["type"].endswith("_type") else "invalid_value"
    return invalid(_("Invalid '{name}': {reason}", name=param, reason=reason), param, code)


def _reasons(limits: Mapping[str, Any]) -> dict[str, str]:
    """Return our words by pydantic's name for an error: its own are English, and speak of
    Python."""
    an_object = _("an object is needed")
    return {
        "string_type": _("a text is needed"),
        "int_type": _("a whole number is needed"),
        "float_type": _("a number is needed"),
        "bool_type": _("true or false is needed"),
        "list_type": _("a list is needed"),
        "dict_type": an_object,
        "model_type": an_object,
        "too_short": _("at least one is needed"),
        "too_long": _("it may have at most {most} items", most=limits.get("max_length")),
        "greater_than_equal": _("it must be at least {least}", least=limits.get("ge")),
        "less_than_equal": _("it may be at most {most}", most=limits.get("le")),
        "less_than": _("it must be less than {limit}", limit=limits.get("lt")),
    }
