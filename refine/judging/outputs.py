"""A finished data set as the commands that judge it see it: manifest, records by number, faults."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hqclip_jax.data.record import MANIFEST_FILE, NAMES, DatasetError, Record, RecordError, decode
from hqclip_jax.data.shards import ShardSource, open_source
from refine.errors import RefineError
from refine.sink import QUARANTINE_FILE


@dataclass(frozen=True)
class Output:
    """What a refinement wrote.

    Attributes:
        directory: where it lies.
        manifest: its `manifest.json`.
        source: its records, by number from 0.
    """

    directory: Path
    manifest: dict
    source: ShardSource

    @classmethod
    def open(cls, directory: Path) -> "Output":
        """
        Raises:
            RefineError: no finished data set here, or one with a shard missing or cut short.
        """
        if str(directory).startswith(("gs:/", "s3:/")):
            raise RefineError(f"{directory} is not on a local disk: copy it to one first")
        try:
            source = open_source(directory)
            manifest = json.loads((directory / MANIFEST_FILE).read_text())
        except FileNotFoundError as e:
            raise RefineError(
                f"{directory} has no {MANIFEST_FILE}: finish its `python -m refine run` first"
            ) from e
        except DatasetError as e:
            raise RefineError(str(e)) from e
        return cls(directory, manifest, source)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def refiner(self) -> str:
        """Engine, model and prompt hash, such as "vllm:Qwen2-VL-7B:0123456789ab"."""
        return str(self.manifest.get("plan", {}).get("refiner") or self.engine)

    @property
    def engine(self) -> str:
        return str(self.manifest.get("engine", "unknown"))

    @property
    def counts(self) -> dict[str, int]:
        """What became of the pairs, by reason."""
        return self.manifest.get("counts", {})

    @property
    def quarantine(self) -> Path:
        """May be absent."""
        return self.directory / QUARANTINE_FILE

    @cached_property
    def quarantined(self) -> dict[str, int]:
        """How many pairs went to quarantine, by reason, most frequent first."""
        found: dict[str, int] = {}
        for line in self.quarantine_lines():
            try:
                reason = str(json.loads(line)["reason"])
            except (ValueError, KeyError, TypeError):
                reason = "unreadable line"
            found[reason] = found.get(reason, 0) + 1
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    def quarantine_lines(self) -> Iterator[str]:
        """One line a quarantined pair; none where there is no such file."""
        if self.quarantine.exists():
            with open(self.quarantine, encoding="utf-8", errors="replace") as file:
                yield from file

    def record(self, number: int, names: tuple[str, ...] = NAMES) -> Record:
        """A record, or those fields of it.

        Raises:
            RefineError: its bytes are not what was written.
        """
        try:
            return decode(self.source[number], names)
        except (RecordError, DatasetError) as e:
            raise RefineError(
                f"record {number:,} of {self.directory}: {e}; look at the whole with "
                f"`python -m hqclip_jax.data.check {self.directory}`"
            ) from e
