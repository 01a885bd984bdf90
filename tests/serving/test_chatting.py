"""A conversation as a prompt: the tokenizer's own template where it has one, and safely."""

from __future__ import annotations

import json

import pytest

from holdfast.serving.chatting import ChatTemplate
from holdfast.serving.protocol import ApiError
from holdfast.training.tokenizer import TextTokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TALK = [{"role": "user", "content": "月"}, {"role": "assistant", "content": "明"}]


def with_template(tokenizer: TextTokenizer, where: str, template: object) -> ChatTemplate:
    state = tokenizer.to_state()
    if where == "config":
        config = json.loads(str(state["tokenizer_config.json"]))
        state["tokenizer_config.json"] = json.dumps({**config, "chat_template": template})
    else:
        state["chat_template.jinja"] = str(template)
    return ChatTemplate(TextTokenizer.from_state(state))


@pytest.mark.parametrize(
    ("where", "template"),
    [
        ("file", TEMPLATE),
        ("config", TEMPLATE),
        ("config", [{"name": "rag", "template": "x"}, {"name": "default", "template": TEMPLATE}]),
    ],
)
def test_the_tokenizers_own_template_is_used_wherever_it_stands(
    tokenizer: TextTokenizer, where: str, template: object
) -> None:
    found = with_template(tokenizer, where, template)
    assert found.own
    assert found.render(TALK) == "<user>月<|endoftext|><assistant>明<|endoftext|><assistant>"


def test_without_one_the_texts_are_put_together_plainly(tokenizer: TextTokenizer) -> None:
    found = ChatTemplate(tokenizer)
    assert not found.own
    assert found.render([{"role": "system", "content": ""}, *TALK]) == "月\n明"


def test_what_a_template_refuses_is_an_error_of_the_request(tokenizer: TextTokenizer) -> None:
    found = with_template(tokenizer, "file", TEMPLATE)
    with pytest.raises(ApiError, match="no tools"):
        found.render([{"role": "tool", "content": "x"}])


def test_a_template_cannot_reach_out_of_its_sandbox(tokenizer: TextTokenizer) -> None:
    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(ApiError, match="template refuses"):
        with_template(tokenizer, "file", escape).render(TALK)
