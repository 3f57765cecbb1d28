"""Pairs from Parquet files that hold the images' bytes.

Written by img2dataset (a column `jpg`), Hugging Face's datasets (`image`, of bytes and path) and
many others; the columns are found by name, and no others are read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from hqclip_jax.data.text import clean
from refine.errors import RefineError
from refine.inputs.fetch import BUFFER, open_file
from refine.inputs.pairs import CAPTION_COLUMNS, IMAGES, UID_COLUMNS, Pair, Skip, uid_of
from refine.inputs.stores import Found, is_remote

IMAGE_COLUMNS = ("image", "image_bytes", *IMAGES)
BATCH_ROWS = 16
PIECE_BYTES = 1 << 30


def pieces(file: Found) -> list[tuple[int, int] | None]:
    """Cuts a large local file into pieces of about a gigabyte, at its row groups: the first and one
    past the last of each. Another one, or one that can't be read, is a single piece, None.

    Raises:
        RefineError: the file can't be opened.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.size <= PIECE_BYTES or is_remote(file.address):
        return [None]
    with open_file(file) as opened:
        try:
            metadata = pq.read_metadata(opened)
            groups = range(metadata.num_row_groups)
            sizes = [_stored_bytes(metadata.row_group(number)) for number in groups]
        except (pa.ArrowException, OSError, ValueError):
            return [None]  # reading it will tell what is wrong
    found, first, held = [], 0, 0
    for number, size in enumerate(sizes):
        if number > first and held + size > PIECE_BYTES:
            found.append((first, number))
            first, held = number, 0
        held += size
    return [*found, (first, len(sizes))] if sizes else [None]


def read_rows(path: Path, source: str, groups: tuple[int, int] | None) -> Iterator[Pair | Skip]:
    """Streams a file's rows in order, a few at a time in memory.

    A row group that can't be read, or a file, yields a Skip "broken_parquet" in place of what is
    lost; a row with no image yields "missing_image".

    Args:
        path: a local file.
        source: the file's name in records and in `skipped.jsonl`.
        groups: the row groups to read, or all if None.

    Raises:
        RefineError: the file can't be opened, or lacks a column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        opened = pa.OSFile(str(path))
    except OSError as e:
        raise RefineError(f"{path} can't be opened: {e}") from e
    with opened:
        try:
            # Buffered and not ahead of time: otherwise a row group is read at once.
            file = pq.ParquetFile(
                opened, buffer_size=BUFFER, pre_buffer=False, page_checksum_verification=True
            )
            schema, metadata = file.schema_arrow, file.metadata
            sizes = (metadata.row_group(n).num_rows for n in range(metadata.num_row_groups))
            starts = list(accumulate(sizes, initial=0))
        except (pa.ArrowException, OSError, ValueError) as e:
            yield Skip("broken_parquet", source, detail=_told(e))
            return
        columns = _Columns.of(schema, source)
        for number in range(*(groups or (0, len(starts) - 1))):
            row = starts[number]
            try:
                for batch in file.iter_batches(
                    BATCH_ROWS, [number], columns.paths, use_threads=False
                ):
                    for item in columns.items(batch, source, row):
                        yield item
                        row += 1
            except (pa.ArrowException, OSError, ValueError) as e:
                detail = f"row group {number} from row {row:,} on: {_told(e)}"
                yield Skip("broken_parquet", source, detail=detail)


@dataclass(frozen=True)
class _Columns:
    """Which columns hold a pair."""

    image: str
    inner: str  # of the image's column, where that is of Hugging Face's form
    caption: str
    uid: str | None

    @property
    def paths(self) -> list[str]:
        image = f"{self.image}.{self.inner}" if self.inner else self.image
        return [image, self.caption, *filter(None, [self.uid])]

    @classmethod
    def of(cls, schema: Any, source: str) -> "_Columns":
        import pyarrow.types as kinds

        def is_text(kind: Any) -> bool:
            kind = kind.value_type if kinds.is_dictionary(kind) else kind
            return kinds.is_string(kind) or kinds.is_large_string(kind) or _is_bytes(kind)

        fields = {field.name.lower(): field for field in reversed(list(schema))}
        found = ", ".join(f"{field.name} ({field.type})" for field in schema)[:2000]

        def pick(names: tuple[str, ...], fits: Any) -> Any:
            return next((fields[n] for n in names if n in fields and fits(fields[n].type)), None)

        image = pick(IMAGE_COLUMNS, lambda kind: _inner(kind) is not None)
        caption = pick(CAPTION_COLUMNS, is_text)
        uid = pick(UID_COLUMNS, lambda kind: is_text(kind) or kinds.is_integer(kind))
        for column, names, what in (
            (image, IMAGE_COLUMNS, "the images' bytes"),
            (caption, CAPTION_COLUMNS, "the captions as text"),
        ):
            if column is None:
                raise RefineError(
                    f"{source} has no column of {what}, named {' or '.join(names)}: it holds "
                    f"{found or 'no column'}"
                )
        return cls(image.name, _inner(image.type), caption.name, uid and uid.name)

    def items(self, batch: Any, source: str, row: int) -> Iterator[Pair | Skip]:
        """The rows of a batch; `row` is the number of its first."""
        import pyarrow.compute as pc

        images = batch.column(self.image)
        if self.inner:
            images = pc.struct_field(images, self.inner)
        captions = _plain(batch.column(self.caption))
        uids = _plain(batch.column(self.uid)) if self.uid else [None] * len(batch)
        for image, caption, uid in zip(images, captions, uids, strict=True):
            yield _item(image.as_py(), caption, uid, source, str(row))
            row += 1


def _item(
    image: bytes | None, caption: bytes | None, given: object, source: str, key: str
) -> Pair | Skip:
    text = (caption or b"").decode("utf-8", "replace")
    uid = uid_of(given, image, text)
    if image is None:
        return Skip("missing_image", source, key, uid, "the image's bytes are null")
    return Pair(uid, image, clean(text), source, key)


def _is_bytes(kind: Any) -> bool:
    import pyarrow.types as kinds

    return kinds.is_binary(kind) or kinds.is_large_binary(kind) or kinds.is_fixed_size_binary(kind)


def _inner(kind: Any) -> str | None:
    """The field of a column's type that holds bytes: "" for the column itself, None for none."""
    import pyarrow.types as kinds

    if _is_bytes(kind):
        return ""
    held = kinds.is_struct(kind) and kind.get_field_index("bytes") >= 0
    return "bytes" if held and _is_bytes(kind.field("bytes").type) else None


def _plain(column: Any) -> list:
    """A column's values; text as bytes, because nobody has checked that it is UTF-8."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_integer(column.type):
        return column.to_pylist()
    return column.cast(pa.large_binary()).to_pylist()


def _stored_bytes(group: Any) -> int:
    return sum(group.column(n).total_compressed_size for n in range(group.num_columns))


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]
