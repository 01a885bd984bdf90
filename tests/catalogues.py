"""Collect the strings of the source and compile the catalogues: python tests/catalogues.py update.

`make i18n` runs it; test_catalogues.py checks that nobody forgot to.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from babel.messages import Catalog
from babel.messages.extract import extract_from_dir
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po, write_po

SOURCE = Path(__file__).parents[1] / "src" / "holdfast"
LANGUAGES = ("en", "zh")
HEADER = "# Holdfast: every sentence that a person reads. `make i18n` keeps it complete.\n#"


def po_path(language: str) -> Path:
    return SOURCE / "locale" / language / "LC_MESSAGES" / "holdfast.po"


def extracted() -> set[str]:
    """All strings marked with `_` and `N_` in the package."""
    found = extract_from_dir(
        SOURCE, method_map=[("**.py", "python")], keywords={"_": None, "N_": None}
    )
    return {message for _file, _line, message, _comments, _context in found if message}


def read(language: str) -> Catalog:
    path = po_path(language)
    if not path.exists():
        return Catalog(locale=language, domain="holdfast", fuzzy=False, header_comment=HEADER)
    with path.open("rb") as file:
        return read_po(file, locale=language, domain="holdfast")


def merged(language: str) -> Catalog:
    """The catalogue with exactly the strings of the source; English translates to itself."""
    old = read(language)
    new = Catalog(locale=language, domain="holdfast", fuzzy=False, header_comment=HEADER)
    for message in sorted(extracted()):
        known = old.get(message)
        text = message if language == "en" else (known.string if known else "")
        new.add(message, str(text or ""))
    return new


def po_bytes(catalog: Catalog) -> bytes:
    buffer = io.BytesIO()
    write_po(buffer, catalog, width=0, sort_output=True, omit_header=False, no_location=True)
    lines = buffer.getvalue().decode("utf-8").splitlines(keepends=True)
    dated = ('"POT-Creation-Date', '"PO-Revision-Date', '"Generated-By', '"Last-Translator')
    return "".join(line for line in lines if not line.startswith(dated)).encode("utf-8")


class _Undated(Catalog):
    """Without the header's times and versions: the same strings give the same bytes."""

    mime_headers = property(lambda _self: [("Content-Type", "text/plain; charset=utf-8")])


def mo_bytes(language: str) -> bytes:
    """The compiled form of the .po file as it is now."""
    catalog = read(language)
    plain = _Undated(locale=language, domain="holdfast", fuzzy=False)
    for message in catalog:
        if message.id:
            plain.add(message.id, message.string)
    buffer = io.BytesIO()
    write_mo(buffer, plain)
    return buffer.getvalue()


def update() -> list[str]:
    """Write .po and .mo of all languages; returns what still has no translation."""
    missing = []
    for language in LANGUAGES:
        catalog = merged(language)
        path = po_path(language)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(po_bytes(catalog))
        path.with_suffix(".mo").write_bytes(mo_bytes(language))
        missing += [f"{language}: {m.id}" for m in catalog if m.id and not m.string]
    return missing


if __name__ == "__main__":
    if sys.argv[1:] != ["update"]:
        sys.exit("usage: python tests/catalogues.py update")
    for line in update():
        print("not translated:", line)
