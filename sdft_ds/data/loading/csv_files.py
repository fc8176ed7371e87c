"""CSV and TSV files: delimiter, encoding and header are detected; every cell is read as text."""

import codecs
import csv
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from charset_normalizer import from_bytes

from sdft_ds.data.loading.file_kinds import kind_of, open_bytes
from sdft_ds.data.rows import DataError

DELIMITERS = ",;\t|"
SAMPLE = 1 << 16  # characters from which the delimiter is detected
CHUNK = 1 << 20
MARKS = {  # byte order mark -> encoding; that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
WESTERN = "cp1252"
ENCODINGS = [WESTERN, "cp1250", "cp1251", "cp1253", "cp1254", "shift_jis", "gb18030", "big5", "euc_kr"]


@dataclass(frozen=True)
class CsvDialect:
    """guessed: no mark in the file says the encoding. padded: a space follows each delimiter."""

    delimiter: str
    encoding: str
    guessed: bool
    padded: bool
    columns: tuple[str, ...]

    @property
    def described(self) -> str:
        """The delimiter and the encoding where they are not those of most files, for a note."""
        parts = [] if self.delimiter in ",\t" else [f"delimiter {self.delimiter!r}"]
        parts += [] if self.encoding.startswith("utf-8") else [f"encoding {self.encoding}"]
        hint = " (a guess: save the file as UTF-8 if letters come out wrong)" if self.guessed else ""
        return f"{' and '.join(parts)}{hint}" if parts else ""


def detect(file: Path) -> CsvDialect:
    """Raises DataError for two columns of one name, and for a record with more fields than the header."""
    encoding, guessed = _encoding(file)
    with open_bytes(file) as opened:
        sample = io.TextIOWrapper(opened, encoding=encoding, errors="replace", newline="").read(SAMPLE)
    header = sample.lstrip("\r\n").splitlines()[0] if sample.strip() else ""
    delimiter = "\t" if kind_of(file).suffix == ".tsv" else _delimiter(header, sample)
    raw = header.split(delimiter)[1:]
    padded = bool(raw) and all(field.startswith(" ") for field in raw)
    fields = next(csv.reader([header], delimiter=delimiter, skipinitialspace=padded), [])
    dialect = CsvDialect(
        delimiter=delimiter,
        encoding=encoding,
        guessed=guessed,
        padded=padded,
        columns=tuple(field.strip() or f"Unnamed: {i}" for i, field in enumerate(fields)),
    )
    if twice := sorted({name for name in dialect.columns if dialect.columns.count(name) > 1}):
        raise DataError(f"{file} has two columns of the name {twice[0]!r}: rename one.")
    if _check_width(_records(io.StringIO(sample, newline=""), dialect, file), file) == 1 and len(sample) < SAMPLE:
        raise DataError(f"{file} has a header, but no rows.")
    return dialect


def check_records(file: Path, unclosed: bool) -> None:
    """Raises DataError, with the line as an editor counts it, for the first record with more fields than the header;
    for text that is not in the detected encoding; and if `unclosed`, for the last record, whose quote has no end."""
    dialect = detect(file)
    csv.field_size_limit(sys.maxsize)
    try:
        with open_bytes(file) as opened:
            text = io.TextIOWrapper(opened, encoding=dialect.encoding, newline="")
            last = _check_width(_records(text, dialect, file), file)
    except UnicodeDecodeError as error:
        what = f"neither UTF-8 nor {dialect.encoding} ({error.reason})"
        raise DataError(f"{file} is {what}: save it as UTF-8.") from None
    if unclosed:
        raise DataError(f"{file}, line {last}: a quotation mark is opened and never closed.")


def _records(text: io.TextIOBase, dialect: CsvDialect, file: Path) -> Iterator[tuple[int, list[str]]]:
    """(number of its first line, fields) of each record; of one whose quote does not end, no fields. Raises DataError
    for text behind a closing quote: there, or in a line before, a quotation mark is missing."""
    reader = csv.reader(text, delimiter=dialect.delimiter, skipinitialspace=dialect.padded, strict=True)
    line = 1
    try:
        for record in reader:
            yield line, record
            line = reader.line_num + 1
    except csv.Error as error:
        if "end of data" not in str(error):
            raise DataError(
                f"{file}, line {line}: a quotation mark is missing, or a quoted text holds one that is not doubled."
            ) from None
        yield line, []


def _check_width(records: Iterator[tuple[int, list[str]]], file: Path) -> int:
    """The line of the last record."""
    width, line = None, 1
    for line, record in records:
        width = width if width is not None or not record else len(record)
        if width is not None and len(record) > width:
            raise DataError(
                f"{file}, line {line}: {len(record)} fields, where the header has {width}: put a text that holds the "
                "delimiter into double quotes."
            )
    return line


def _delimiter(header: str, sample: str) -> str:
    """The one that splits most records into as many fields as the header, of which there are several."""
    others = sorted({c for c in header if not c.isalnum() and c not in DELIMITERS + " \"'_-.()"})

    def evenness(delimiter: str) -> float:
        records = csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter, skipinitialspace=True)
        widths = [len(record) for record in records if record]
        return sum(width == widths[0] for width in widths) / len(widths) if widths[0] > 1 else 0.0

    candidates = [delimiter for delimiter in [*DELIMITERS, *others] if delimiter in header]
    return max(candidates, key=evenness, default=",")


def _encoding(file: Path) -> tuple[str, bool]:
    """(encoding, whether it is a guess)."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open_bytes(file) as opened:
        begin = chunk = opened.read(CHUNK)
        for mark, encoding in MARKS.items():
            if begin.startswith(mark):
                return encoding, False
        if zeros := [i % 2 for i in range(min(len(begin), SAMPLE)) if not begin[i]]:  # UTF-16 without a mark
            return ("utf-16-le" if sum(zeros) * 2 > len(zeros) else "utf-16-be"), True
        try:
            while chunk:
                decoder.decode(chunk)
                chunk = opened.read(CHUNK)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return _legacy_encoding(chunk or begin), True
    return "utf-8", False


def _legacy_encoding(chunk: bytes) -> str:
    """One of ENCODINGS, from lines that are not ASCII; that of Western Europe wherever nothing is said against it."""
    lines = b"\n".join(line for line in chunk.splitlines() if not line.isascii())[:SAMPLE]
    found = list(from_bytes(lines, cp_isolation=ENCODINGS))
    if not found or any(WESTERN in match.could_be_from_charset for match in found):
        return WESTERN
    # Central European, which has most letters in the same places, only if the language is one of there.
    return WESTERN if found[0].encoding == "cp1250" and not found[0].coherence else found[0].encoding
