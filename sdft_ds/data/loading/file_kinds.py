"""What the names and the first bytes of data files say."""

import gzip
from pathlib import Path
from typing import IO, NamedTuple

from sdft_ds.data.rows import DataError

KINDS = {
    ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".arrow": "arrow",
    ".json.gz": "json", ".jsonl.gz": "json", ".csv.gz": "csv", ".tsv.gz": "csv",
}  # fmt: skip
UTF16 = (b"\xff\xfe", b"\xfe\xff")


class Kind(NamedTuple):
    """suffix: without .gz. loader: its name in `datasets`, None for a file that is no data file."""

    suffix: str
    loader: str | None


def display(paths: list[str]) -> str:
    """Their name in messages."""
    first, *more = paths
    return f"{first} and {len(more)} more" if more else first


def kind_of(file: Path) -> Kind:
    name = file.name.lower()
    plain = Path(name.removesuffix(".gz")).suffix
    return Kind(plain, KINDS.get(plain + ".gz" if name.endswith(".gz") else plain))


def open_bytes(file: Path) -> IO[bytes]:
    return gzip.open(file) if file.name.lower().endswith(".gz") else file.open("rb")


def check_beginning(file: Path) -> None:
    """Raises DataError for a file without rows. pyarrow's JSON reader aborts the process if the first row is `null`
    (apache/arrow#47409)."""
    with open_bytes(file) as opened:
        begins = opened.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not begins:
        raise DataError(f"{file} is empty.")
    if kind_of(file).loader != "json" or begins[:1] in (b"{", b"["):
        return
    if begins.startswith(UTF16):
        raise DataError(f"{file} is UTF-16: save it as UTF-8.")
    raise DataError(
        f"{file} begins with {begins[:10].decode(errors='replace')!r}; expected JSON Lines, one object per line, or a "
        "list of objects."
    )
