"""Options: the metadata of a dataclass field, and the judgement of a value against it.

Nothing about files, presets or the command line enters here; they all ask this module.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from holdfast.i18n import N_, _

_METADATA = "holdfast"
_TOO_LARGE = 2**63  # beyond this a whole number fits no counter of torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Meta:
    """The keywords of `option`."""

    help: str
    metavar: str | None = None
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    aliases: tuple[str, ...] = ()
    short: str | None = None
    const: str | None = None
    near: tuple[str, ...] = ()
    may_be_empty: bool = False
    count_or: str | None = None
    of_this_start: bool = False
    private: bool = False


def option(default: Any, **meta: Any) -> Any:
    """A dataclass field that is an option; its type annotation says what values it takes.

    Keywords: `help` (marked with `N_`), `metavar`, the bounds `ge`, `gt`, `le`, `lt`, `aliases`
    (other names that mean the same), `short` (a one-letter flag), `const` (the value of the flag
    when nothing follows it), `near` (what people type who mean this option; for suggestions only),
    `may_be_empty` (an empty text is a value), `count_or` (a text option whose values are this word
    and whole numbers), `of_this_start` (not kept by `save_config`), `private` (no checkpoint tells
    it: those are given to others).
    """
    return dataclasses.field(default=default, metadata={_METADATA: Meta(**meta)})


@dataclass(frozen=True, slots=True)
class Option:
    """One option: its section, its values and its default."""

    name: str
    section: str
    kind: type[int] | type[float] | type[bool] | type[str]
    optional: bool
    choices: tuple[str, ...]
    default: Any
    meta: Meta

    @property
    def flag(self) -> str:
        """The long flag, `--batch-size`."""
        return flag_of(self.name)

    @property
    def names(self) -> tuple[str, ...]:
        """The name and its aliases."""
        return (self.name, *self.meta.aliases)

    @property
    def metavar(self) -> str:
        """The placeholder of the value in `--help`."""
        if self.choices:
            return "|".join(self.choices)
        names = {int: "N", float: "X", bool: "", str: "TEXT"}
        return self.meta.metavar or names[self.kind]

    def accepts(self, value: object) -> bool:
        """Return True if this option may have `value`; types are strict."""
        if value is None:
            return self.optional
        if self.meta.count_or is not None and type(value) in (int, str):
            return value == self.meta.count_or or _is_count(str(value))
        if type(value) is str and self.kind is str:
            return self._accepts_text(value)
        if type(value) is bool:
            return self.kind is bool
        if type(value) is int and self.kind in (int, float):
            return abs(value) < _TOO_LARGE and self._within(value)
        return type(value) is float and self.kind is float and self._within(value)

    def _accepts_text(self, value: str) -> bool:
        if self.choices:
            return value in self.choices
        return "\0" not in value and bool(value.strip() or self.meta.may_be_empty)

    def _within(self, value: float) -> bool:
        m = self.meta
        return (
            math.isfinite(value)
            and (m.ge is None or value >= m.ge)
            and (m.gt is None or value > m.gt)
            and (m.le is None or value <= m.le)
            and (m.lt is None or value < m.lt)
        )

    def normalise(self, value: object) -> object:
        """Return the accepted `value` in the option's own type: 1 becomes 1.0 for a float."""
        if self.kind is str and isinstance(value, int):
            return str(value)
        return float(value) if self.kind is float and isinstance(value, int) else value

    def parse(self, text: str) -> object:
        """Return the value that `text` on a command line means; `text` itself if it means none."""
        if self.kind is str:
            return text
        if self.optional and text.lower() == "none":
            return None
        if self.kind is bool:
            return {"true": True, "false": False}.get(text.lower(), text)
        try:
            return self.kind(text)
        except ValueError:
            return text

    def expected(self, nothing: str) -> str:
        """Return the allowed values in words; `nothing` is how the user writes "no value" there."""
        words = self._kind_in_words()
        m = self.meta
        bounds = [
            _(text, value=format_value(bound))
            for text, bound in (
                (N_("at least {value}"), m.ge),
                (N_("more than {value}"), m.gt),
                (N_("at most {value}"), m.le),
                (N_("less than {value}"), m.lt),
            )
            if bound is not None
        ]
        if bounds:
            words += _(", {bounds}", bounds=_(" and ").join(bounds))
        if self.optional and self.default is None and self.kind is not str:
            words += _(", or {nothing}", nothing=nothing)
        return words

    def _kind_in_words(self) -> str:
        if self.choices:
            return _("one of {choices}", choices=", ".join(self.choices))
        if self.meta.count_or is not None:
            return _('a whole number or "{word}"', word=self.meta.count_or)
        if self.kind is not str:
            numbers = {int: _("a whole number"), float: _("a number")}
            return numbers.get(self.kind, _("true or false"))
        if self.meta.const is not None:
            return _('text (a path or "{const}")', const=self.meta.const)
        return _("text") if self.meta.may_be_empty else _("text that is not empty")

    def hint(self, value: object) -> str:
        """Return what the refused `value` was probably meant to be; empty if unclear."""
        if isinstance(value, str) and self.choices:
            return did_you_mean(nearest(value, self.choices))
        if isinstance(value, str) and self.kind is not str:
            meant = self.parse(value.strip())
            if meant is not None and self.accepts(meant):
                return _("; write it without quotes: {value}", value=value.strip())
        if isinstance(value, float) and value.is_integer() and self.kind is int:
            return _("; write {value}", value=int(value)) if self.accepts(int(value)) else ""
        if type(value) is int and abs(value) >= _TOO_LARGE:
            return _("; this one is too large")
        return ""


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) < _TOO_LARGE


def options_of(section: str, cls: type) -> dict[str, Option]:
    """The options of the dataclass `cls`, in its order."""
    hints = get_type_hints(cls)
    found = {}
    for field in dataclasses.fields(cls):
        kind, optional, choices = _read_type(hints[field.name])
        found[field.name] = Option(
            field.name, section, kind, optional, choices, field.default, field.metadata[_METADATA]
        )
    return found


def _read_type(hint: Any) -> tuple[Any, bool, tuple[str, ...]]:
    """(type, whether None is allowed, choices) of an annotation such as `int | None`."""
    optional = False
    if get_origin(hint) in (Union, types.UnionType):
        members = [member for member in get_args(hint) if member is not type(None)]
        assert len(members) == 1, f"an option has one type, perhaps with None: {hint}"
        hint, optional = members[0], True
    if get_origin(hint) is Literal:
        return str, optional, get_args(hint)
    assert hint in (int, float, bool, str), f"no option has the type {hint}"
    return hint, optional, ()


def flag_of(name: str) -> str:
    """`batch_size` as the flag `--batch-size`."""
    return "--" + name.replace("_", "-")


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate that `word` was probably meant to be, or None."""
    return next(iter(get_close_matches(word, list(candidates), n=1, cutoff=0.6)), None)


def did_you_mean(name: str | None) -> str:
    """The tail of a problem: `; did you mean NAME?`, or nothing."""
    return "" if name is None else _("; did you mean {name}?", name=name)


def format_value(value: object) -> str:
    """A value for people: 0.0001 as 1e-4, 10.0 as 10, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if value == 0 or 1e-3 < abs(value) < 1e6 or not math.isfinite(value):
            return repr(value).removesuffix(".0")
        mantissa, exponent = f"{value:.15e}".split("e")
        return f"{float(mantissa)!r}".removesuffix(".0") + f"e{int(exponent)}"
    return str(value)


def quote_value(value: object, *, as_json: bool) -> str:
    """The refused value as the user wrote it, on one line and not too long."""
    if isinstance(value, str) and not as_json:
        text = value if value and value.isprintable() else repr(value)
    else:
        text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."
