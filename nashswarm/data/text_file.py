"""Read text files and tables of text, huge ones in pieces that are spread evenly over them."""

import gzip
import io
import json
import logging
import pathlib
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, cast

TABLES = (".jsonl", ".json", ".csv", ".parquet")
PIECE = 1 << 16  # bytes of a huge file that are read together
log = logging.getLogger(__name__)


def read_file(path: pathlib.Path, column: str | None = None, most: int | None = None) -> str:
    """Return the text of a file: plain text, or a column of a table (.jsonl, .json, .csv, .parquet), also with .gz.

    A byte order mark is left out.  The rows of a table are joined by newlines.  ``column``: of a table; by default the
    one named ``text``, or the only one that holds text.  ``most``: about how many bytes of text to read at most.  A
    larger file is read in pieces that are spread evenly over it, or where that cannot be (.gz, .csv) from its
    beginning; a log line says so.

    Raises ValueError if the file is not UTF-8, cannot be read as its name says, or has no such column.
    """
    kind = (path.suffixes[-2:-1] if path.suffix == ".gz" else path.suffixes[-1:] or [""])[-1:]
    table = kind[0] if kind and kind[0] in TABLES else None
    if column is not None and table is None:
        raise ValueError(f"{path} is no table ({', '.join(TABLES)}), so it has no column {column}")
    try:
        if table is not None:
            return "\n".join(_column(path, _rows(path, table, column, most), column))
        return _unmarked(_content(path, most).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); convert it first") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is cut short or no sound gzip file: {error}") from error


def _unmarked(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _content(path: pathlib.Path, most: int | None) -> bytes:
    """Return the bytes of a file, unzipped, or whole lines from it of ``most`` bytes."""
    if path.suffix == ".gz":
        with gzip.open(path) as zipped:
            content = zipped.read(-1 if most is None else most)
            if most is None or not zipped.read(1):
                return content
        log.info("%s is large: its first %d bytes are read", path, most)
        return _whole_lines(content, starts=True)
    size = path.stat().st_size
    if most is None or size <= most:
        return path.read_bytes()
    count = max(most // PIECE, 1)
    log.info("%s is large: %d pieces that are spread evenly over it are read", path, count)
    with path.open("rb") as file:
        pieces = []
        for number in range(count):
            file.seek(number * size // count)
            pieces.append(_whole_lines(file.read(min(PIECE, most)), starts=number == 0))
    return b"\n".join(piece.rstrip(b"\n") for piece in pieces)


def _whole_lines(piece: bytes, starts: bool) -> bytes:
    """Return the whole lines of a piece of a file, or if it has none, its whole characters.

    ``starts``: whether the piece starts with a line.
    """
    first = 0 if starts else piece.find(b"\n") + 1
    last = piece.rfind(b"\n") + 1
    if first < last:
        return piece[first:last]
    return piece.decode("utf-8", errors="ignore").encode()


def _rows(path: pathlib.Path, table: str, column: str | None, most: int | None) -> Iterable[dict[str, Any]]:
    """Return the rows of a table as mappings.  Raises ValueError for a file that is not what its name says."""
    try:
        if table == ".jsonl":
            return [_object(line) for line in _unmarked(_content(path, most).decode("utf-8-sig")).split("\n") if line]
        if table == ".parquet":
            return list(_parquet_rows(path, most))
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            if table == ".json":
                import pandas

                return cast("list[dict[str, Any]]", pandas.read_json(file).to_dict("records"))
            return list(_csv_rows(path, file, most))
    except UnicodeDecodeError:
        raise
    except Exception as error:  # those of pandas, pyarrow and gzip share no base class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} cannot be read as its name says: {reason}") from error


def _object(line: str) -> dict[str, Any]:
    if not isinstance(row := json.loads(line), dict):
        raise ValueError(f"a line is {line[:20]!r}, no object in braces")
    return row


def _csv_rows(path: pathlib.Path, file: io.BufferedIOBase, most: int | None) -> Iterator[dict[str, Any]]:
    import pandas

    for part in pandas.read_csv(cast(Any, file), encoding="utf-8-sig", chunksize=1000):
        yield from cast("list[dict[str, Any]]", part.to_dict("records"))
        if most is not None:
            most -= int(part.memory_usage(deep=True).sum())
            if most < 0:
                log.info("%s is large: only its beginning is read", path)
                return


def _parquet_rows(path: pathlib.Path, most: int | None) -> Iterator[dict[str, Any]]:
    from pyarrow import parquet  # type: ignore[import-untyped]

    with parquet.ParquetFile(path) as file:
        count = file.metadata.num_row_groups
        sizes = [file.metadata.row_group(number).total_byte_size for number in range(count)]
        wanted = count if most is None or sum(sizes) <= most else max(count * most // sum(sizes), 1)
        if wanted < count:
            log.info("%s is large: %d of its %d groups of rows are read", path, wanted, count)
        left = most
        for batch in file.iter_batches(1000, row_groups=[number * count // wanted for number in range(wanted)]):
            yield from batch.to_pylist()
            left = None if left is None else left - batch.nbytes
            if left is not None and left < 0:
                return


def _column(path: pathlib.Path, rows: Iterable[dict[str, Any]], column: str | None) -> Iterator[str]:
    """Yield the text of one column, row by row; rows without it are left out."""
    rows = list(rows)
    first: dict[str, Any] = {}  # value of each column that is there
    for row in rows:
        for name, value in row.items():
            if value is not None and name not in first and value == value:  # NaN stands for nothing
                first[name] = value
    strings = [str(name) for name, value in first.items() if isinstance(value, str)]
    chosen = column or ("text" if "text" in strings else strings[0] if len(strings) == 1 else None)
    if chosen is None:
        raise ValueError(
            f"{path} has no column named text, and {len(strings)} other columns of text: name the one to read text, or "
            "give it as FILE::COLUMN"
        )
    if chosen not in strings:
        raise ValueError(f"{path} has no column of text named {chosen}, only {', '.join(strings) or 'none'}")
    return (row[chosen] for row in rows if isinstance(row.get(chosen), str))
