"""A conversation as a prompt: the tokenizer's own template where it has one, and safely."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from holdfast.serving.api import rendering
from holdfast.serving.api.chatting import ChatTemplate
from holdfast.serving.api.protocol import ApiError
from holdfast.training.text.tokenizer import TextTokenizer
from tests.serving.models import Training, poet, serving

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TALK = [{"role": "user", "content": "月"}, {"role": "assistant", "content": "明"}]


MADE: list[ChatTemplate] = []


def with_template(tokenizer: TextTokenizer, where: str, template: object) -> ChatTemplate:
    state = tokenizer.to_state()
    if where == "config":
        config = json.loads(str(state["tokenizer_config.json"]))
        state["tokenizer_config.json"] = json.dumps({**config, "chat_template": template})
    else:
        state["chat_template.jinja"] = str(template)
    made = ChatTemplate(TextTokenizer.from_state(state))
    MADE.append(made)
    return made


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """No process is left, also where a traceback still holds the template."""
    yield
    while MADE:
        MADE.pop().close()


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


# ------------------------------------------------------------------------- roles and their places

KNOWS_THREE = (
    "{% for m in messages %}{% if m.role in ('system', 'user', 'assistant') %}"
    "<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}<assistant>"
)


def test_developer_is_system_where_the_template_does_not_know_it(tokenizer: TextTokenizer) -> None:
    talk = [{"role": "developer", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    found = with_template(tokenizer, "file", KNOWS_THREE)
    assert found.render(talk) == "<system>Be short.<user>Hi<assistant>"
    knows = KNOWS_THREE.replace("'system'", "'system', 'developer'")
    found = with_template(tokenizer, "file", knows)
    assert found.render(talk) == "<developer>Be short.<user>Hi<assistant>"


@pytest.mark.parametrize(
    ("template", "talk", "number"),
    [
        # A role that the template does not know; its content stands in another message too.
        (KNOWS_THREE, [("tool", "1"), ("user", "What is 1+1?")], 1),
        (KNOWS_THREE, [("user", "Hi"), ("function", "x"), ("user", "Hi")], 2),
        # Only the last message is shown, or only a system message that comes first.
        ("{{ messages[-1].content }}", [("user", "Hi"), ("assistant", "a"), ("user", "b")], 1),
        ("{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
         "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
         [("user", "Hi"), ("system", "Be short."), ("user", "b")], 2),
        # The role is shown, but not what was said.
        ("{% for m in messages %}<{{ m.role }}>{% if m.role != 'tool' %}{{ m.content }}{% endif %}"
         "{% endfor %}", [("user", "Hi"), ("tool", "5 degrees")], 2),
        # A template for contents in parts shows nothing of a text.
        ("{% for m in messages %}{{ m.content[0].text }}{% endfor %}", [("user", "Hi")], 1),
    ],
)  # fmt: skip
def test_a_message_that_the_template_leaves_out_is_refused(
    tokenizer: TextTokenizer, template: str, talk: list[tuple[str, str]], number: int
) -> None:
    found = with_template(tokenizer, "file", template)
    with pytest.raises(ApiError, match=f"leaves out message {number}, of the role") as error:
        found.render([{"role": role, "content": content} for role, content in talk])
    assert error.value.status == 400 and error.value.param == f"messages[{number - 1}]"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content | upper | trim }}{% endfor %}",
        "{% for m in messages %}{{ m | tojson }}{% endfor %}",
        "{% for m in messages %}{% if m.content not in ('5', 'Hi ', '') %}"
        "{{ raise_exception('marks?') }}{% endif %}{{ m.content }}{% endfor %}",
    ],
)
def test_a_message_that_is_shown_in_another_form_is_not_left_out(
    tokenizer: TextTokenizer, template: str
) -> None:
    found = with_template(tokenizer, "file", template)
    talk = [("user", "Hi "), ("assistant", ""), ("user", "5")]
    assert "5" in found.render([{"role": role, "content": content} for role, content in talk])


# -------------------------------------------------------------------- templates that do no good

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HARMFUL = {
    "a loop": LOOP,
    "gigabytes": "{% set x = 'a' * 3000000000 %}{{ x }}",
    "gigabytes by a method": "{{ 'a'.ljust(3000000000) }}",
    "doubling": "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "a long prompt": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a number": "{{ 10 ** 10 ** 7 }}",
    "a larger number": "{{ 10 ** 10 ** 10 }}",
    "zero": "{{ 1 // 0 }}",
    "an attribute of nothing": "{{ messages[7].content.strip() }}",
    "no template": "{% for %}",
    "files": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
}


@pytest.mark.parametrize("name", HARMFUL)
def test_a_harmful_template_is_one_line_within_limits_of_time_and_memory(
    tokenizer: TextTokenizer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 2.0)
    found = with_template(tokenizer, "file", HARMFUL[name])
    most, began, stop = [0], time.monotonic(), threading.Event()

    def look() -> None:
        while not stop.wait(0.05):
            for child in psutil.Process().children():
                try:
                    most[0] = max(most[0], child.memory_info().rss)
                except psutil.Error:
                    continue

    watching = threading.Thread(target=look)
    watching.start()
    try:
        with pytest.raises(ApiError) as error:
            found.render(TALK)
    finally:
        stop.set()
        watching.join()
    assert "\n" not in error.value.message and len(error.value.message) < 700
    assert most[0] < 1 << 30, "it took more memory than it may"
    assert time.monotonic() - began < 40


def test_a_template_is_used_again_after_its_process_has_ended(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 1.0)
    template = "{% if messages[0].content == 'loop' %}" + LOOP + "{% endif %}" + KNOWS_THREE
    found = with_template(tokenizer, "file", template)
    assert found.render(TALK) == "<user>月<assistant>明<assistant>"
    with pytest.raises(ApiError) as error:
        found.render([{"role": "user", "content": "loop"}])
    assert (error.value.status, error.value.code) == (500, "chat_template_failed")
    assert found.render(TALK) == "<user>月<assistant>明<assistant>"


def test_others_are_answered_while_a_template_loops_and_no_process_is_left(
    tmp_path: Path, tokenizer: TextTokenizer, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(rendering, "SECONDS", 1.5)
    state = {**tokenizer.to_state(), "chat_template.jinja": LOOP}
    run = tmp_path / "run"
    training = Training(run, poet(tokenizer, steps=1), TextTokenizer.from_state(state))
    training.epoch(1.0)
    training.close()
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with serving(run) as url:
        answers: list[Any] = []
        body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}

        def ask() -> None:
            answers.append(httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60))

        asking = threading.Thread(target=ask)
        asking.start()
        longest = 0.0
        while asking.is_alive():
            began = time.monotonic()
            assert httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 1},
                              timeout=30).status_code == 200  # fmt: skip
            longest = max(longest, time.monotonic() - began)
        asking.join()
        assert answers[0].status_code == 500
        assert answers[0].json()["error"]["code"] == "chat_template_failed"
        assert longest < 3, "the template held the others up"
    assert not any(record.exc_info for record in caplog.records), "one line, no traceback"
    until = time.monotonic() + 10
    while {child.pid for child in psutil.Process().children(recursive=True)} - before:
        assert time.monotonic() < until, "a process is left"
        time.sleep(0.05)
