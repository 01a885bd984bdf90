"""The OpenAI API in words: what a request may say, and how an error is told.

Models of pydantic, strict as the original is: a number in quotes is an error, a field that nobody
knows is not. No engine and no network in this room.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from holdfast.i18n import _
from holdfast.serving.sampling import Sampling

CHOICES = 128  # most choices of a request, prompts times n, as in the original
_STOPS, _STOP_SIZE = 4, 500
_SEED = 1 << 63


class ApiError(Exception):
    """What is answered instead: the original's body, a status, perhaps headers."""

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
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.kind = (
            status, message, param, code, kind,
        )  # fmt: skip
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The JSON of the error, in the form that the clients know."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


def server_error(message: str, *, status: int = 500, code: str | None = None) -> ApiError:
    """An error that is ours; the client is told that asking again does not help."""
    headers = {"x-should-retry": "false"} if status == 500 else {"Retry-After": "1"}
    return ApiError(status, message, code=code, kind="server_error", headers=headers)


def too_many(message: str, retry_after: int, code: str) -> ApiError:
    """429, with the seconds after which it is worth trying again."""
    headers = {"Retry-After": str(retry_after)}
    return ApiError(429, message, code=code, kind="rate_limit_error", headers=headers)


# ------------------------------------------------------------------------------------- requests


class _Object(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class StreamOptions(_Object):
    """`stream_options`."""

    include_usage: bool | None = None


class _Request(_Object):
    """What both APIs have."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    n: Annotated[int, Field(ge=1, le=CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-_SEED, lt=_SEED)] | None = None
    stop: str | list[str] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    ignore_eos: bool | None = None

    @field_validator("stop")
    @classmethod
    def _stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        stops = value if isinstance(value, list) else [value or "-"]
        if len(stops) > _STOPS:
            raise ValueError(_("at most {count} stop strings", count=_STOPS))
        if not all(0 < len(stop) <= _STOP_SIZE for stop in stops):
            raise ValueError(_("a stop string has 1 to {count} characters", count=_STOP_SIZE))
        return value

    @property
    def stops(self) -> list[str]:
        """The stop strings; none is []."""
        return [self.stop] if isinstance(self.stop, str) and self.stop else list(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(
        self, *, max_tokens: int, vocabulary: int, logprobs: int | None, prompt_logprobs: bool
    ) -> Sampling:
        """How texts for this request are made. Raises ApiError over a token that is not there."""
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
        )


class CompletionRequest(_Request):
    """`POST /v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: int | None = None
    suffix: str | None = None

    def check(self) -> None:
        """Raise ApiError over what this server does not do."""
        if self.best_of is not None and self.best_of != (self.n or 1):
            _unsupported("best_of")
        if self.suffix:
            _unsupported("suffix")


class Part(_Object):
    """A part of a message's content."""

    type: str
    text: str | None = None


class Message(_Object):
    """A message of a conversation."""

    role: str
    content: str | list[Part] | None = None
    name: str | None = None

    @property
    def text(self) -> str:
        """The words of the message. Raises ApiError over pictures and sounds."""
        if isinstance(self.content, list):
            if any(part.type != "text" for part in self.content):
                raise ApiError(
                    400, _("Only text is understood here: content parts of the type 'text'."),
                    param="messages", code="unsupported_value",
                )  # fmt: skip
            return "".join(part.text or "" for part in self.content)
        return self.content or ""


class ChatRequest(_Request):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None

    def check(self) -> None:
        """Raise ApiError over what this server does not do."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, _("'top_logprobs' needs 'logprobs': true."), param="top_logprobs",
                           code="invalid_value")  # fmt: skip
        if self.tools:
            _unsupported("tools")
        if self.functions:
            _unsupported("functions")
        if self.response_format and self.response_format.get("type", "text") != "text":
            _unsupported("response_format")


def _unsupported(name: str) -> NoReturn:
    raise ApiError(400, _("'{name}' is not supported by this server.", name=name), param=name,
                   code="unsupported_parameter")  # fmt: skip


def _bias(given: dict[str, float], vocabulary: int) -> dict[int, float]:
    bias = {}
    for name, value in given.items():
        token = int(name) if name.isascii() and name.isdigit() and len(name) < 20 else vocabulary
        if token >= vocabulary:
            raise ApiError(
                400, _("'logit_bias' names the token {name}; the vocabulary has 0 to {last}.",
                       name=name[:20], last=vocabulary - 1),
                param="logit_bias", code="invalid_value",
            )  # fmt: skip
        bias[token] = value
    return bias


# -------------------------------------------------------------------------------------- parsing


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`. Raises ApiError where there is none."""
    try:
        value = json.loads(body, parse_constant=_no_constant)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise ApiError(
            400, _("The body of the request is not JSON: {reason}", reason=error),
            code="invalid_json",
        ) from error  # fmt: skip
    if not isinstance(value, dict):
        raise ApiError(400, _("The body of the request must be a JSON object."),
                       code="invalid_json")  # fmt: skip
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(_("{name} is not a number in JSON", name=name))


def parse_completion(body: bytes) -> CompletionRequest:
    """The request in `body`. Raises ApiError with the field that is wrong."""
    try:
        request = CompletionRequest.model_validate(parse_json(body))
    except ValidationError as error:
        raise _told(error) from error
    request.check()
    return request


def parse_chat(body: bytes) -> ChatRequest:
    """The request in `body`. Raises ApiError with the field that is wrong."""
    try:
        request = ChatRequest.model_validate(parse_json(body))
    except ValidationError as error:
        raise _told(error) from error
    request.check()
    return request


def _told(error: ValidationError) -> ApiError:
    """The first problem, as the original says it."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = [part for part in first["loc"] if part not in _UNIONS]
    param = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in where).lstrip(".")
    if first["type"] == "missing":
        return ApiError(400, _("You must provide '{name}'.", name=param), param=param,
                        code="missing_required_parameter")  # fmt: skip
    in_union = len(where) < len(first["loc"])
    known = _alternatives().get(str(where[-1])) if in_union else None
    known = known or _reasons(first.get("ctx", {})).get(first["type"])
    reason = known or str(first["msg"]).removeprefix("Value error, ")
    code = "invalid_type" if first["type"].endswith("_type") else "invalid_value"
    return ApiError(400, _("Invalid '{name}': {reason}", name=param, reason=reason), param=param,
                    code=code)  # fmt: skip


def _reasons(limits: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong by pydantic's name for it: its own words are English, and speak of Python."""
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
        "greater_than_equal": _("it must be at least {least}", least=limits.get("ge")),
        "less_than_equal": _("it may be at most {most}", most=limits.get("le")),
        "less_than": _("it must be less than {limit}", limit=limits.get("lt")),
    }


def _alternatives() -> dict[str, str]:
    """What the fields may be that may be several things: pydantic tells of the first alone."""
    return {
        "prompt": _("a text, a list of texts, a list of token ids, or a list of such lists is "
                    "needed"),
        "stop": _("a text or a list of texts is needed"),
        "content": _("a text or a list of content parts is needed"),
    }  # fmt: skip


# What pydantic puts into a place for the alternative of a union that it tried.
_UNIONS = ("str", "list[str]", "list[int]", "list[list[int]]", "list[Part]")
