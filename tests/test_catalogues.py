"""The catalogue is complete, nothing in it is stale, and it keeps what a program relies on.

`make i18n` mends what most of these tests complain about; a translation only a person can write.
"""

from __future__ import annotations

import gettext
import re
from collections import Counter
from collections.abc import Iterator
from string import Formatter

import pytest
from babel.messages.mofile import read_mo

from holdfast import i18n
from holdfast.cli.options import build_train_parser
from holdfast.i18n import _, set_language
from tests import catalogues

# What has no Chinese character in Chinese either: a command, a unit as everybody writes it, and
# what is put in brackets there.
WITHOUT_CHINESE = {
    "holdfast clean", "{rate} tokens/s", ", {bounds}",
    "--model-config {path}: {reason}",
}  # fmt: skip

CHINESE = re.compile(r"[\u4e00-\u9fff]")
PERCENT_FORMAT = re.compile(r"%(?:\(\w+\))?[a-z]")


@pytest.fixture
def chinese(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Speak Chinese in a test, and what was spoken before it afterwards."""
    before = i18n.language()
    monkeypatch.setenv("LANGUAGE", "zh")
    set_language("zh")
    yield
    set_language(before)


def translations() -> dict[str, str]:
    return {str(m.id): str(m.string) for m in catalogues.read() if m.id}


def formats(text: str) -> Counter[str]:
    """The `{placeholders}` with their specifications, and the formats of argparse."""
    fields = [f"{name}!{conversion}:{spec}" for _text, name, spec, conversion in
              Formatter().parse(text) if name is not None]  # fmt: skip
    return Counter(fields + PERCENT_FORMAT.findall(text))


def leading_space(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]


def test_the_catalogue_has_exactly_the_strings_of_the_source() -> None:
    found = translations().keys()
    source = catalogues.extracted()
    assert source, "nothing was extracted: the catalogue cannot be judged"
    assert sorted(source - found) == []
    assert sorted(found - source) == []


def test_the_compiled_catalogue_says_what_its_text_form_says() -> None:
    with catalogues.MO.open("rb") as file:
        compiled = {message.id: message.string for message in read_mo(file) if message.id}
    assert compiled == translations()


@pytest.mark.usefixtures("chinese")
def test_english_is_the_text_of_the_source_also_after_chinese() -> None:
    set_language("en")
    assert _("it is empty") == "it is empty"
    assert gettext.gettext("usage: ") == "usage: "
    assert build_train_parser("holdfast train").format_usage().startswith("usage: ")


def test_every_string_is_translated_into_chinese() -> None:
    plain = {text for text, shown in translations().items() if not CHINESE.search(shown)}
    assert plain == WITHOUT_CHINESE
    assert all(translations()[text].strip() for text in WITHOUT_CHINESE)


def test_no_english_is_left_inside_the_chinese_punctuation() -> None:
    """A half-width comma or full stop after a Chinese character is a slip of the keyboard."""
    slip = re.compile(r"[\u4e00-\u9fff][,.;?!](?! ?\.\.)")
    assert [shown for shown in translations().values() if slip.search(shown)] == []


@pytest.mark.parametrize(
    "what",
    [formats, leading_space, lambda text: text.count("\n")],
    ids=["formats", "space", "lines"],
)
def test_a_translation_keeps_what_the_program_relies_on(what: object) -> None:
    assert callable(what)
    wrong = [(text, shown) for text, shown in translations().items() if what(text) != what(shown)]
    assert wrong == []


@pytest.mark.usefixtures("chinese")
def test_our_messages_and_those_of_argparse_are_chinese_after_set_language() -> None:
    damaged = _("{path} is damaged: {why}.", path="latest.pt", why=_("it is empty"))
    assert damaged == "latest.pt 已损坏：文件是空的。"
    assert gettext.gettext("usage: ") == "用法: "
    assert build_train_parser("holdfast train").format_usage() == "用法: holdfast train [选项]\n"


@pytest.mark.usefixtures("chinese")
def test_the_results_of_an_epoch_read_as_they_were_specified() -> None:
    shown = [
        _("📊 Epoch {epoch} results", epoch="1/3"),
        _("  ⏱️  Time: {seconds} s ({minutes} min)", seconds="264.1", minutes="4.4"),
        _("  📉 Training loss: {loss}", loss="5.2341"),
        _("  📊 Validation loss: {loss}", loss="4.8934"),
        _("💾 Saving the checkpoint..."),
        "  " + _("✓ Epoch checkpoint: {name} ({size})", name="model_epoch_1.pt", size="1.42 GiB"),
        "  " + _("🏆 Best model: {name} ({space}) [{why}]", name="best_model.pt",
                 space=_("the same data, no extra space"), why=_("first best")),
        "  " + _("📌 Newest model: {name} [to resume training]", name="latest.pt"),
        "  " + _("📍 Main checkpoint: {name}", name="model.pt"),
    ]  # fmt: skip
    assert shown == [
        "📊 Epoch 1/3 结果",
        "  ⏱️  用时: 264.1s (4.4min)",
        "  📉 训练损失: 5.2341",
        "  📊 验证损失: 4.8934",
        "💾 保存检查点...",
        "  ✓ Epoch检查点: model_epoch_1.pt (1.42 GiB)",
        "  🏆 最佳模型: best_model.pt (同一份数据，不占额外空间) [首个最佳]",
        "  📌 最新模型: latest.pt [用于恢复训练]",
        "  📍 主检查点: model.pt",
    ]
