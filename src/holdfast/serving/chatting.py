"""A conversation as one prompt: the tokenizer's own template, or a plain one for base models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.i18n import _
from holdfast.serving.protocol import ApiError
from holdfast.training.tokenizer import TextTokenizer

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


class ChatTemplate:
    """How the messages of a conversation become the text that a model goes on from."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        files = tokenizer.to_state()
        config = _json_of(files.get("tokenizer_config.json"))
        self._template = _template_of(files, config)
        self._special = {
            name: token for name in _SPECIAL if (token := _content(config.get(name))) is not None
        }

    @property
    def own(self) -> bool:
        """Whether the tokenizer brings a template of its own."""
        return self._template is not None

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt for `messages` (role, content).

        A model that was trained on plain text knows no roles: it is given the messages' texts, a
        line each, and goes on behind the last. Raises ApiError where the template refuses them.
        """
        for message in messages:
            if message["role"] not in _ROLES:
                raise ApiError(
                    400, _("Invalid 'messages': the role {role} is none of {roles}.",
                           role=message["role"][:40], roles=", ".join(_ROLES)),
                    param="messages", code="invalid_value",
                )  # fmt: skip
        if self._template is None:
            return "\n".join(message["content"] for message in messages if message["content"])
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered, _places = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                chat_template=self._template,
                add_generation_prompt=True,
                **self._special,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise ApiError(
                400, _("The model's chat template refuses these messages: {reason}", reason=error),
                param="messages", code="invalid_value",
            ) from error  # fmt: skip
        text: str = rendered[0]
        return text


def _json_of(text: object) -> dict[str, Any]:
    try:
        value = json.loads(text) if isinstance(text, str) else {}
    except ValueError:
        return {}  # a config that cannot be read says nothing
    return value if isinstance(value, dict) else {}


def _template_of(files: Mapping[str, object], config: Mapping[str, Any]) -> str | None:
    template = files.get("chat_template.jinja") or config.get("chat_template")
    if isinstance(template, list):  # several by name: the one that is called default
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    return template if isinstance(template, str) and template else None


def _content(token: object) -> str | None:
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) else None
