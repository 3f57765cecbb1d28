"""Rows of Parquet files with images in them, as Hugging Face's datasets library stores them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from hqclip_jax.evals.datasets import EvalDataError

ROWS = 32  # at a time


def parquet_files(path: Path) -> list[Path]:
    """One file, or those of a folder. Raises EvalDataError where there is none."""
    files = [path] if path.is_file() else sorted(path.glob("*.parquet"))
    if not files:
        raise EvalDataError(f"{path} holds no .parquet")
    return files


def parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[dict]:
    """Yields the rows in order, a few in memory at a time.

    Raises:
        EvalDataError: a file is no Parquet, or lacks a column.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    for file in parquet_files(path):
        try:
            with ParquetFile(file) as rows:
                if missing := set(columns) - set(rows.schema_arrow.names):
                    raise EvalDataError(f"{file} has no column {', '.join(sorted(missing))}")
                for batch in rows.iter_batches(ROWS, columns=list(columns)):
                    yield from batch.to_pylist()
        except pyarrow.ArrowInvalid as e:
            raise EvalDataError(f"{file} can't be read as Parquet: {e}") from e


def image_bytes(cell: dict | bytes | None) -> bytes:
    """Of a column of images, each `{"bytes": ..., "path": ...}`; what isn't there is b""."""
    if isinstance(cell, dict):
        cell = cell.get("bytes")
    return cell or b""
