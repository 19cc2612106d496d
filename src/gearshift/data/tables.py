"""Tables with a column of encoded images: parquet files on this disk, and data sets of the Hugging Face hub."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gearshift.runtime.errors import RunError, UsageError


@contextmanager
def reaching_hub(hub: str, local: str, split: str | None = None) -> Iterator[None]:
    """Whatever fails inside is a data set that cannot be had: absent, gated, or out of reach.

    `local` says how a local copy is named. Raises RunError with the reason and how to get access.
    """
    try:
        yield
    except Exception as error:  # the hub client has no common base for "cannot be reached"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"cannot load {'' if split is None else f'split {split} of '}{hub} from the hub ({reason}); if it is "
            f"gated, ask for access on https://huggingface.co/datasets/{hub} and log in with `hf auth login`; or use a "
            f"local copy ({local})"
        ) from error


def encoded(cell: Any) -> tuple[Any, str]:
    """What an image column holds in one cell, encoded bytes alone or the hub's struct of bytes and path: a stream or a
    file to open, and the path, empty where none is given."""
    if not isinstance(cell, dict):
        return io.BytesIO(cell), ""
    path = cell.get("path") or ""
    return (path if cell.get("bytes") is None else io.BytesIO(cell["bytes"])), path


def count_rows(files: Sequence[Path], columns: Sequence[str], expected: str) -> int:
    """Rows of parquet files. Raises UsageError, with what was `expected`, where one lacks a column, and RunError where
    one cannot be read."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    count = 0
    for path in files:
        try:
            opened = ParquetFile(path)
        except (ArrowException, OSError) as error:
            raise RunError(f"{path} is not a parquet file that can be read ({error}); fetch it again") from error
        if not set(columns) <= set(opened.schema_arrow.names):
            raise UsageError(f"{path} has the columns {', '.join(opened.schema_arrow.names)}; {expected}")
        count += opened.metadata.num_rows
    return count


def read_rows(files: Sequence[Path], columns: Sequence[str]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(file, row) in order, the named columns alone. Raises RunError where a file breaks off."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    for path in files:
        try:
            for batch in ParquetFile(path).iter_batches(1024, columns=list(columns)):
                for row in batch.to_pylist():
                    yield path, row
        except (ArrowException, OSError) as error:
            raise RunError(f"{path} ends in the middle ({error}); fetch it again") from error
