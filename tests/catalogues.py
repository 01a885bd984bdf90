"""Collect the strings of the source and compile the catalogue: python tests/catalogues.py update.

English is in the source itself and needs no catalogue. `make i18n` runs this module;
test_catalogues.py fails where that was forgotten.
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from babel.messages import Catalog
from babel.messages.extract import extract_from_dir
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po, write_po

SOURCE = Path(__file__).parents[1] / "src" / "holdfast"
PO = SOURCE / "locale" / "zh" / "LC_MESSAGES" / "holdfast.po"
MO = PO.with_suffix(".mo")
HEADER = "# Holdfast: every sentence that a person reads. `make i18n` keeps it complete.\n#"


def extracted() -> set[str]:
    """Return all strings marked with `_` and `N_` in the package, and the messages of errors."""
    marked = ["_", "N_"], _errors()  # apart: Babel does not look for one inside the other
    return {
        message
        for names in marked
        for _file, _line, message, _comments, _context in extract_from_dir(
            SOURCE, method_map=[("**.py", "python")], keywords=dict.fromkeys(names)
        )
        if any(map(str.isalpha, message))
    }


def _errors() -> set[str]:
    """Return the names of the classes of errors: they translate their message themselves."""
    classes = re.findall(
        r"^class (\w+)\((\w+)\):", "".join(map(Path.read_text, SOURCE.rglob("*.py"))), re.M
    )
    names = {"HoldfastError"}
    while more := {name for name, base in classes if base in names} - names:
        names |= more
    return names


def read() -> Catalog:
    """Return the Chinese catalogue as it is now."""
    with PO.open("rb") as file:
        return read_po(file, locale="zh", domain="holdfast")


def merged() -> Catalog:
    """Return the catalogue with exactly the strings of the source."""
    old = read()
    new = Catalog(locale="zh", domain="holdfast", fuzzy=False, header_comment=HEADER)
    for message in sorted(extracted()):
        known = old.get(message)
        new.add(message, str(known.string if known else ""))
    return new


def po_bytes(catalog: Catalog) -> bytes:
    buffer = io.BytesIO()
    write_po(buffer, catalog, width=0, sort_output=True, omit_header=False, no_location=True)
    lines = buffer.getvalue().decode("utf-8").splitlines(keepends=True)
    dated = ('"POT-Creation-Date', '"PO-Revision-Date', '"Generated-By', '"Last-Translator')
    return "".join(line for line in lines if not line.startswith(dated)).encode("utf-8")


class _Undated(Catalog):
    """A catalogue without times and versions: the same strings give the same bytes."""

    mime_headers = property(lambda _self: [("Content-Type", "text/plain; charset=utf-8")])


def mo_bytes() -> bytes:
    """Return the compiled form of the .po file as it is now."""
    plain = _Undated(locale="zh", domain="holdfast", fuzzy=False)
    for message in read():
        if message.id:
            plain.add(message.id, message.string)
    buffer = io.BytesIO()
    write_mo(buffer, plain)
    return buffer.getvalue()


def update() -> list[str]:
    """Write the .po and the .mo file; return the strings that have no translation."""
    catalog = merged()
    PO.write_bytes(po_bytes(catalog))
    MO.write_bytes(mo_bytes())
    return [str(message.id) for message in catalog if message.id and not message.string]


if __name__ == "__main__":
    if sys.argv[1:] != ["update"]:
        sys.exit("usage: python tests/catalogues.py update")
    for line in update():
        print("not translated:", line)
