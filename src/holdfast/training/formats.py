"""From the bytes of one data file to its documents: compression, encoding, .txt, .jsonl, .parquet.

Nothing here knows about folders, tokenizers or splits. Everything wrong with a file ends in one
`DataError` that names the file and the place in it.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from holdfast.errors import DataError
from holdfast.i18n import _

FORMATS = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".zst")

# The commonest characters of modern and classical Chinese, simplified and traditional. Big5,
# EUC-KR, EUC-JP and Shift-JIS mostly decode as GB18030 without an error, into rare characters and
# private-use code points: of those, 0 to 1 % are in this list; of real Chinese, 11 % (Song lyrics)
# to 33 % (modern prose), of Japanese in GB18030 6 %.
_COMMON = frozenset(
    "的一是不了在人有我他这中大来上国个到说们为子和你地出会时要也得里以那就自之于而者其与无此何如"
    "日月风山花天春水这這國來時為個們說無"
)
_COMMON_SHARE = 0.03
_CHINESE_PUNCTUATION = frozenset("，。！？、；：“”‘’《》（）…—　")


def format_of(path: Path) -> str | None:
    """ ".txt", ".jsonl" or ".parquet" (whatever it is compressed with); None for other files."""
    name = path.name.lower()
    for suffix in COMPRESSIONS:
        name = name.removesuffix(suffix)
    suffix = Path(name).suffix
    return suffix if suffix in FORMATS else None


def documents_in(path: Path, *, text_field: str = "text") -> Iterator[str]:
    """The documents of one file, stripped, without the empty ones.

    Raises DataError: unreadable, damaged, binary or wrongly encoded file, missing field or column.
    """
    data_format = format_of(path)
    assert data_format is not None, f"discover() lets no {path.name} pass"
    data = _decompressed(path)
    texts: Iterable[str]
    if data_format == ".parquet":
        texts = _parquet(path, data, text_field)
    elif data_format == ".jsonl":
        texts = _jsonl(path, decode(data, path), text_field)
    else:
        texts = _plain(decode(data, path))
    for text in texts:
        stripped = text.strip()
        if stripped:
            yield stripped


def decode(data: bytes, path: Path) -> str:
    """Text of `data` with "\\n" line ends: UTF-8 with or without BOM, UTF-16 with BOM, GB18030.

    Strict: a byte that does not belong there, or a NUL, is a DataError that says where it is.
    `path` is for the message only.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):  # "Unicode" of Windows' Notepad
        try:
            return _newlines(data.decode("utf-16"))
        except UnicodeDecodeError as error:
            raise _not_text(path, data, error.start) from error
    nul = data.find(b"\0")
    if nul >= 0:
        message = _(
            "{path} is not a text file: byte {offset} is zero, as in binary data. "
            "Choose a .txt, .jsonl or .parquet file.",
            path=path,
            offset=nul,
        )
        raise DataError(message)
    try:
        return _newlines(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        not_utf8 = error
    try:
        text = data.decode("gb18030")
    except UnicodeDecodeError as error:
        raise _not_text(path, data, not_utf8.start) from error
    if not _reads_like_chinese(text):
        raise _not_text(path, data, not_utf8.start)
    return _newlines(text)


def _not_text(path: Path, data: bytes, offset: int) -> DataError:
    return DataError(
        _(
            "{path} is neither UTF-8 nor GB18030 text: byte {offset} (line {line}) is where it "
            "stops being UTF-8. Save the file as UTF-8 and try again.",
            path=path,
            offset=offset,
            line=data.count(b"\n", 0, offset) + 1,
        )
    )


def _reads_like_chinese(text: str) -> bool:
    """False for other encodings that happen to be valid GB18030 (see `_COMMON`)."""
    wide = [char for char in text if char > "\x7f" and char not in _CHINESE_PUNCTUATION]
    common = sum(char in _COMMON for char in wide)
    return common >= _COMMON_SHARE * len(wide)


def _newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _decompressed(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        message = _("Cannot read {path}: {reason}.", path=path, reason=error.strerror or error)
        raise DataError(message) from error
    suffix = path.suffix.lower()
    if not data or suffix not in COMPRESSIONS:
        return data  # an empty file is reported as empty, not as damaged
    try:
        return gzip.decompress(data) if suffix == ".gz" else _unzstd(data)
    except (OSError, EOFError, zlib.error) as error:
        message = _(
            "{path} is damaged or not a {suffix} file ({reason}). Fetch or compress it again.",
            path=path,
            suffix=suffix,
            reason=error,
        )
        raise DataError(message) from error


def _unzstd(data: bytes) -> bytes:
    """All frames of `data`. Raises EOFError where the last frame ends too early."""
    import zstandard

    parts = []
    while data:
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            parts.append(frame.decompress(data))
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from error
        if not frame.eof:  # the library itself says nothing about a truncated stream
            raise EOFError(_("it ends too early"))
        data = frame.unused_data
    return b"".join(parts)


def _plain(text: str) -> list[str]:
    """Blank-line separated documents where there are blank lines inside, else one a line."""
    text = text.strip()
    blocks = re.split(r"\n\s*\n", text)
    return blocks if len(blocks) > 1 else text.split("\n")


def _jsonl(path: Path, text: str, field: str) -> Iterator[str]:
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it splits at.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            message = _(
                "{path}, line {line}: this is not JSON ({reason}). "
                "A .jsonl file holds one JSON object a line.",
                path=path,
                line=number,
                reason=error,
            )
            raise DataError(message) from error
        value = record.get(field) if isinstance(record, dict) else None
        if not isinstance(value, str):
            raise _no_field(path, number, field, record)
        # A lone half of a surrogate pair ("\ud83d", cut by some crawler) is no character at all.
        yield re.sub("[\ud800-\udfff]", "\ufffd", value) if "\\ud" in line.lower() else value


def _no_field(path: Path, line: int, field: str, record: object) -> DataError:
    if not isinstance(record, dict):
        message = _(
            "{path}, line {line}: a JSON object was expected, such as {example}.",
            path=path,
            line=line,
            example=json.dumps({field: "…"}, ensure_ascii=False),
        )
    elif field in record:
        message = _(
            '{path}, line {line}: the field "{field}" is not a string.',
            path=path,
            line=line,
            field=field,
        )
    else:
        message = _(
            '{path}, line {line} has no field "{field}"; it has: {fields}. '
            "Name the one that holds the text with --text-field.",
            path=path,
            line=line,
            field=field,
            fields=", ".join(record) or "-",
        )
    return DataError(message)


def _parquet(path: Path, data: bytes, column: str) -> Iterator[str]:
    import pyarrow as pa
    from pyarrow import parquet

    if not data:
        return
    try:
        file = parquet.ParquetFile(pa.BufferReader(data))
        _check_column(path, file.schema_arrow, column)
        for batch in file.iter_batches(columns=[column]):
            values = (value for value in batch.column(0).to_pylist() if value)
            yield from (v.decode() if isinstance(v, bytes) else v for v in values)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        message = _("{path} is damaged or not a Parquet file ({reason}).", path=path, reason=reason)
        raise DataError(message) from error


def _text_kinds() -> list[Callable[[Any], bool]]:
    """Tests for the Arrow types that hold text, as pandas, Spark, DuckDB and Polars write it.

    Binary is text whose writer did not say so: its bytes are decoded, and refused where they are
    none. A column of nulls has no documents.
    """
    import pyarrow as pa

    kinds = pa.types
    return [
        kinds.is_string, kinds.is_large_string, kinds.is_string_view, kinds.is_binary,
        kinds.is_large_binary, kinds.is_binary_view, kinds.is_null,
    ]  # fmt: skip


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
