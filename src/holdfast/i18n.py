"""Chinese and English: a gettext catalogue, the choice of language, and characters on a console.

`_("... {name} ...", name=value)` translates and fills in. English is the source text and has no
catalogue. argparse and everything else that uses gettext's default domain speaks the same language.
"""

from __future__ import annotations

import gettext
import io
import locale
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

DOMAIN = "holdfast"
LOCALE_DIR = Path(__file__).parent / "locale"
LANGUAGES = ("en", "zh")

_current = "en"
_catalogue: gettext.NullTranslations = gettext.NullTranslations()
_chosen = False  # True once a language has been set


def language() -> str:
    """The language in force: "en" or "zh"."""
    return _current


def encode_anything(stream: TextIO) -> None:
    """Let `stream` write "?" for a character that its encoding lacks.

    Otherwise the first emoji on a GBK or latin-1 console raises UnicodeEncodeError, and the lines
    that say what was saved are never seen.
    """
    if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
        stream.reconfigure(errors="replace")


def detect_language(environ: Mapping[str, str] | None = None) -> str:
    """The language that the environment asks for; English where it says nothing.

    `HOLDFAST_LANG` comes first, then the variables of POSIX in their order of precedence. On
    Windows, where those are rarely set, the system's own locale is asked last.
    """
    environ = os.environ if environ is None else environ
    for name in ("HOLDFAST_LANG", "LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG"):
        value = environ.get(name, "")
        if value:
            return "zh" if value.lower().startswith("zh") else "en"
    if os.name == "nt" and environ is os.environ:
        return "zh" if (locale.getlocale()[0] or "").startswith(("zh", "Chinese")) else "en"
    return "en"


def set_language(lang: str) -> None:
    """Speak `lang` ("en" or "zh") from now on, in this process."""
    _speak(lang)
    # argparse asks gettext's default domain: point it at the same catalogue. LANGUAGE is what
    # gettext reads; setting it also makes child processes speak the language of their parent.
    os.environ["LANGUAGE"] = lang
    gettext.bindtextdomain(DOMAIN, LOCALE_DIR)
    gettext.textdomain(DOMAIN)


def follow_environment() -> None:
    """Speak the language of the environment, unless one was set; in the program of somebody else,
    whose own messages and child processes stay as they are."""
    if not _chosen:
        _speak(detect_language())


def _speak(lang: str) -> None:
    global _current, _catalogue, _chosen
    assert lang in LANGUAGES, lang
    _current, _chosen = lang, True
    _catalogue = gettext.translation(DOMAIN, LOCALE_DIR, languages=[lang], fallback=True)


def _(message: str, /, **values: object) -> str:
    """Translate `message` and fill in its `{names}`."""
    text = _catalogue.gettext(message)
    return text.format(**values) if values else text


def N_(message: str) -> str:
    """Mark `message` for the catalogue where it cannot be translated yet; `_` it when shown."""
    return message
