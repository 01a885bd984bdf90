"""From one data file to its documents: compression, .txt, .jsonl, .parquet.

A file is read in blocks, as often as is wanted, and never held as a whole. Nothing here knows about
folders, tokenizers or splits. A file that cannot be read at all ends in one `DataError` that names
it; single damaged places are counted in a `Damage` and left out.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from holdfast.errors import DataError
from holdfast.i18n import _
from holdfast.training.text import damage as kinds
from holdfast.training.text import encodings
from holdfast.training.text.damage import Damage, Place

FORMATS = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".zst")

Part = tuple[str, bool]
"""A piece of a document's text, and whether the document ends with it. Most are a whole one."""

Seen = Callable[[int], None]
"""Bytes of the file that have been read: called now and then; what it raises ends the work."""

BLOCK = 1 << 18  # bytes read at a time
_PACKED = 1 << 10  # of zstd, where each byte may become thousands
PART = 1_000_000  # characters of a document that are held before they are passed on
_ROWS = 256  # of Parquet, decoded at a time
_GAP = re.compile(r"[\s\ufeff]*")


def format_of(path: Path) -> str | None:
    """ ".txt", ".jsonl" or ".parquet" (whatever it is compressed with); None for other files."""
    name = path.name.lower()
    for suffix in COMPRESSIONS:
        name = name.removesuffix(suffix)
    suffix = Path(name).suffix
    return suffix if suffix in FORMATS else None


def documents_in(
    path: Path, *, text_field: str = "text", damage: Damage | None = None
) -> Iterator[str]:
    """The documents of one file, stripped, without the empty ones.

    What cannot be read is left out and counted in `damage`; without one, the file is judged by
    itself at its end. Raises DataError: unreadable, damaged, binary or wrongly encoded file,
    missing field or column.
    """
    own = Damage() if damage is None else damage
    waiting: list[str] = []
    for text, ends in DataFile(path).parts(text_field, own):
        waiting.append(text)
        if ends:
            yield "".join(waiting)
            waiting.clear()
    if damage is None:
        own.judge()


class DataFile:
    """One file of the data."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._encoding: encodings.Encoding | None = None
        self._has_blank_lines: bool | None = None

    def parts(
        self, text_field: str, damage: Damage, seen: Seen = lambda _bytes: None
    ) -> Iterator[Part]:
        """The documents, stripped, the empty ones dropped, those of a .txt in parts of about a
        million characters. Raises DataError."""
        data_format = format_of(self.path)
        assert data_format is not None, f"discover() lets no {self.path.name} pass"
        if data_format == ".parquet":
            return _stripped((text, True) for text in self._rows(text_field, damage, seen))
        lines = _lines(self._texts(damage, seen))
        if data_format == ".jsonl":
            return _stripped((text, True) for text in self._records(lines, text_field, damage))
        if self._has_blank_lines is None:
            self._has_blank_lines = encodings.has_blank_lines(self._texts(Damage(), seen))
        return _stripped(_blocks_of(lines) if self._has_blank_lines else lines)

    # ---------------------------------------------------------------------------------- as text

    def _texts(self, damage: Damage, seen: Seen) -> Iterator[str]:
        if self._encoding is None:
            self._encoding = encodings.find_encoding(lambda: self._blocks(seen), self.path)
        encoding = self._encoding

        def report(offset: int, size: int, line: int, reason: str) -> None:
            message = encodings.not_a_character(self.path, encoding.codec, offset, line, reason)
            damage.add(Place(self.path, line, offset, reason), size, message)

        def counted() -> Iterator[bytes]:
            for block in self._blocks(seen):
                damage.size += len(block)
                yield block

        return encodings.decoded(counted(), encoding, report)

    def _blocks(self, seen: Seen) -> Iterator[bytes]:
        """Yield the contents of the file, decompressed, in blocks."""
        suffix = self.path.suffix.lower()
        try:
            with self.path.open("rb") as file:
                for block in _decompressed(file, suffix):
                    yield block
                    seen(file.tell())
        except (OSError, EOFError, zlib.error) as error:
            raise self._unreadable(error, suffix) from error

    def _unreadable(self, error: Exception, suffix: str) -> DataError:
        if suffix not in COMPRESSIONS or (isinstance(error, OSError) and error.errno is not None):
            reason = getattr(error, "strerror", None) or error
            return DataError("Cannot read {path}: {reason}.", path=self.path, reason=reason)
        return DataError(
            "{path} is damaged or not a {suffix} file ({reason}). Fetch or compress it again.",
            path=self.path,
            suffix=suffix,
            reason=error,
        )

    # --------------------------------------------------------------------------------- as JSON

    def _records(self, lines: Iterable[Part], field: str, damage: Damage) -> Iterator[str]:
        waiting: list[str] = []
        number = 0
        for text, ends in lines:
            waiting.append(text)
            if not ends:
                continue
            line = "".join(waiting)
            waiting.clear()
            number += 1
            try:
                records = _objects(line)
            except (ValueError, RecursionError) as error:
                message = _(
                    "{path}, line {line}: this is not JSON ({reason}). "
                    "A .jsonl file holds one JSON object a line.",
                    path=self.path,
                    line=number,
                    reason=error,
                )
                self._leave_out(damage, number, line, kinds.NO_JSON, message)
                continue
            for record in records:
                value = record.get(field) if isinstance(record, dict) else None
                if isinstance(value, str):
                    # A lone half of a surrogate pair ("\ud83d", cut by some crawler) is no
                    # character at all.
                    yield re.sub("[\ud800-\udfff]", "\ufffd", value) if _may_escape(line) else value
                elif record != {} and not (
                    isinstance(record, dict) and field in record and value is None
                ):
                    reason, message = _no_text(self.path, number, field, record)
                    self._leave_out(damage, number, line, reason, message)

    def _leave_out(self, damage: Damage, number: int, line: str, reason: str, message: str) -> None:
        byte = self._start_of_line(number) if damage.wants_places else None
        damage.add(Place(self.path, number, byte, reason), len(line.encode()), message)

    def _start_of_line(self, number: int) -> int | None:
        """The offset of a line in what the file holds."""
        if self._encoding is None or self._encoding.codec.startswith("utf-16"):
            return None
        position, ends = 0, number - 1
        for block in self._blocks(lambda _bytes: None):
            here = block.count(b"\n")
            if here >= ends:
                at = -1
                for _end in range(ends):
                    at = block.index(b"\n", at + 1)
                return position + at + 1
            position += len(block)
            ends -= here
        return None

    # ------------------------------------------------------------------------------ as Parquet

    def _rows(self, column: str, damage: Damage, seen: Seen) -> Iterator[str]:
        import pyarrow as pa
        from pyarrow import parquet

        try:
            with self._seekable() as source:
                size = source.seek(0, 2)
                if not size:
                    return
                file = parquet.ParquetFile(source, buffer_size=1 << 20)
                _check_column(self.path, file.schema_arrow, column)
                row, rows = 0, max(1, file.metadata.num_rows)
                for batch in file.iter_batches(columns=[column], batch_size=_ROWS):
                    values = batch.column(0)
                    if pa.types.is_dictionary(values.type):
                        values = values.dictionary_decode()
                    for value in values:
                        row += 1
                        yield self._text_of(value, row, damage)
                    seen(size * row // rows)
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            message = _(
                "{path} is damaged or not a Parquet file ({reason}).", path=self.path, reason=reason
            )
            raise DataError(message) from error

    def _text_of(self, value: Any, row: int, damage: Damage) -> str:
        """The text of one cell, "" where there is none."""

        def report(_offset: int, size: int, _line: int, _reason: str) -> None:
            message = _(
                "{path}, row {row}: its text is not UTF-8. Write the file anew.",
                path=self.path,
                row=row,
            )
            damage.add(Place(self.path, row, None, kinds.NO_UTF8), size, message)

        data: bytes = value.as_buffer().to_pybytes() if value.is_valid else b""
        damage.size += len(data)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "".join(encodings.decoded([data], encodings.Encoding("utf-8", 0), report))

    @contextmanager
    def _seekable(self) -> Iterator[IO[bytes]]:
        """The file, or what it holds in a temporary one: Parquet is read from its end."""
        if self.path.suffix.lower() not in COMPRESSIONS:
            try:
                file = self.path.open("rb")
            except OSError as error:
                raise self._unreadable(error, "") from error
            with file:
                yield file
            return
        with tempfile.TemporaryFile() as temporary:
            for block in self._blocks(lambda _bytes: None):
                temporary.write(block)
            yield temporary


def _decompressed(file: IO[bytes], suffix: str) -> Iterator[bytes]:
    """Blocks of what `file` holds. Raises OSError, EOFError or zlib.error where it is damaged."""
    if suffix == ".zst":
        yield from _unzstd(file)
        return
    source: Any = gzip.GzipFile(fileobj=file) if suffix == ".gz" else file
    left = math.inf if suffix == ".gz" else os.fstat(file.fileno()).st_size
    while left > 0 and (block := source.read(BLOCK)):  # or a file that grows would never end
        yield block
        left -= len(block)


def _unzstd(file: IO[bytes]) -> Iterator[bytes]:
    """All frames. Raises EOFError where the last frame ends too early."""
    import zstandard

    frame = None
    while data := file.read(_PACKED):
        while data:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                yield frame.decompress(data)
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from error
            data = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:  # the library itself says nothing about a truncated stream
        raise EOFError(_("it ends too early"))


def _lines(texts: Iterable[str]) -> Iterator[Part]:
    """Lines without their ends, long ones in parts.

    Not splitlines(): JSON strings may hold U+2028 and other characters that it splits at.
    """
    waiting, size = [""], 0
    for text in texts:
        first, *more = text.split("\n")
        waiting.append(first)
        size += len(first)
        if more:
            yield "".join(waiting), True
            for line in more[:-1]:
                yield line, True
            waiting, size = [more[-1]], len(more[-1])
        elif size > PART:
            yield "".join(waiting), False
            waiting, size = [""], 0
    yield "".join(waiting), True


def _blocks_of(lines: Iterable[Part]) -> Iterator[Part]:
    """Documents that blank lines separate."""
    waiting: list[str] = []
    size, begins = 0, True  # `begins`: a line begins here
    for text, ends in lines:
        if begins and ends and not text.strip():
            yield "".join(waiting), True
            waiting, size = [], 0
            continue
        waiting.append(text + "\n" if ends else text)
        size += len(text)
        begins = ends
        if size > PART:
            yield "".join(waiting), False
            waiting, size = [], 0
    yield "".join(waiting), True


def _stripped(parts: Iterable[Part]) -> Iterator[Part]:
    """The documents without white space around them, the empty ones dropped."""
    begun, held = False, ""
    for part, ends in parts:
        text = held + part if begun else part.lstrip()
        kept = text.rstrip()
        held = text[len(kept) :]
        if kept or (begun and ends):
            yield kept, ends
        begun = not ends and (begun or bool(kept))


def _objects(line: str) -> list[Any]:
    """The JSON values in a line: one, or none, or several where files without a last line end were
    put together; each may come with the BOM of its file."""
    found, position = [], 0
    while (position := _end_of_gap(line, position)) < len(line):
        value, position = json.JSONDecoder().raw_decode(line, position)
        found.append(value)
    return found


def _end_of_gap(line: str, position: int) -> int:
    gap = _GAP.match(line, position)
    assert gap is not None, "it may be empty"
    return gap.end()


def _may_escape(line: str) -> bool:
    return "\\ud" in line or "\\uD" in line


def _no_text(path: Path, line: int, field: str, record: object) -> tuple[str, str]:
    """(reason, message) of a record without the text field."""
    if not isinstance(record, dict):
        return kinds.NO_OBJECT, _(
            "{path}, line {line}: a JSON object was expected, such as {example}.",
            path=path,
            line=line,
            example=json.dumps({field: "…"}, ensure_ascii=False),
        )
    if field in record:
        return kinds.NO_TEXT, _(
            '{path}, line {line}: the field "{field}" is not a string.',
            path=path,
            line=line,
            field=field,
        )
    return kinds.NO_FIELD, _(
        '{path}, line {line} has no field "{field}"; it has: {fields}. '
        "Name the one that holds the text with --text-field.",
        path=path,
        line=line,
        field=field,
        fields=", ".join(record) or "-",
    )


def _text_kinds() -> list[Callable[[Any], bool]]:
    """Tests for the Arrow types that hold text, as pandas, Spark, DuckDB and Polars write it.

    Binary is text whose writer did not say so: its bytes are decoded. A column of nulls has no
    documents.
    """
    import pyarrow as pa

    kinds = pa.types
    return [
        kinds.is_string,
        kinds.is_large_string,
        kinds.is_string_view,
        kinds.is_binary,
        kinds.is_large_binary,
        kinds.is_binary_view,
        kinds.is_null,
    ]


def _check_column(path: Path, schema: object, column: str) -> None:
    import pyarrow as pa

    assert isinstance(schema, pa.Schema)
    if column not in schema.names:
        message = _(
            '{path} has no column "{column}"; it has: {columns}. '
            "Name the one that holds the text with --text-field.",
            path=path,
            column=column,
            columns=", ".join(schema.names) or "-",
        )
        raise DataError(message)
    kind = schema.field(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not any(is_text(kind) for is_text in _text_kinds()):
        message = _(
            '{path}: the column "{column}" holds {kind}, not text.',
            path=path,
            column=column,
            kind=kind,
        )
        raise DataError(message)
