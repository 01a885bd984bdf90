"""A conversation as one prompt: the tokenizer's own template, or a plain one for base models."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.i18n import _
from holdfast.serving.api.protocol import invalid, server_error
from holdfast.serving.api.rendering import Failed, Refused, Renderer
from holdfast.training.text.tokenizer import TextTokenizer

log = logging.getLogger("holdfast")

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


class ChatTemplate:
    """A chat template: it makes one text of the messages of a conversation."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        files = tokenizer.to_state()
        config = _json_of(files.get("tokenizer_config.json"))
        self._template = _template_of(files, config)
        self._special = {
            name: token for name in _SPECIAL if (token := _content(config.get(name))) is not None
        }

        self._renderer = Renderer(self._template, self._special) if self._template else None

    @property
    def own(self) -> bool:
        """True if the tokenizer brings a template of its own."""
        return self._renderer is not None

    def start(self) -> None:
        """Start the process that renders without waiting for it."""
        if self._renderer is not None:
            self._renderer.start()

    def close(self) -> None:
        """End the process that renders."""
        if self._renderer is not None:
            self._renderer.close()

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the prompt for `messages` (role, content). Blocks: for threads beside the event
        loop.

        A model that was trained on plain text knows no roles: it is given the messages' texts, a
        line each, and goes on behind the last. Raises ApiError where the template refuses them,
        leaves one of them out, or does not come to an end.
        """
        for message in messages:
            if message["role"] not in _ROLES:
                raise invalid(
                    _(
                        "Invalid 'messages': the role {role} is none of {roles}.",
                        role=message["role"][:40],
                        roles=", ".join(_ROLES),
                    ),
                    "messages",
                )
        if self._renderer is None or self._template is None:
            return "\n".join(message["content"] for message in messages if message["content"])
        # What the original's clients send instead of "system"; few templates know it by that name.
        known = "developer" in self._template
        shown = [
            {**message, "role": "system"}
            if message["role"] == "developer" and not known
            else dict(message)
            for message in messages
        ]
        marks = [secrets.token_hex(6) for _message in shown]
        marked = [
            {**message, "content": mark} if message["content"].strip() else message
            for message, mark in zip(shown, marks, strict=True)
        ]
        try:
            text, traced = self._renderer.render([shown, marked])
        except Failed as error:
            reason = _("The model's chat template cannot be used: {reason}.", reason=error)
            log.warning(reason)
            raise server_error(reason, code="chat_template_failed") from error
        if isinstance(text, Refused):
            raise invalid(
                _("The model's chat template refuses these messages: {reason}", reason=text),
                "messages",
            )
        for i, (message, mark) in enumerate(zip(shown, marks, strict=True)):
            if not _is_in(text, traced, message["content"].strip(), mark):
                raise invalid(
                    _(
                        "The model's chat template leaves out message {number}, of the role "
                        "{role}: the model would never see it. Send it in another role or "
                        "place.",
                        number=i + 1,
                        role=messages[i]["role"],
                    ),
                    f"messages[{i}]",
                    "unsupported_value",
                )
        return text


def _is_in(text: str, traced: str | Refused, content: str, mark: str) -> bool:
    """Return whether a message's `content` came into the prompt.

    Short contents stand in others as well, so `traced` is asked, the prompt with a mark in place of
    each content. A template that changes upper to lower case keeps the mark; one that refuses marks
    is asked for the content.
    """
    if not content:
        return True
    return content in text if isinstance(traced, Refused) else mark in traced.lower()


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
