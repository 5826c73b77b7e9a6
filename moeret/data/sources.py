"""Streams of documents for the indexing job: checked in one pass, cut into shards, read again shard by shard."""

import hashlib
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress, groupby
from pathlib import Path
from typing import Literal

import numpy as np

from moeret.artifact import sha256_of
from moeret.config import require
from moeret.data.beir import Problems, short
from moeret.data.records import Raw, document_in, format_of, readable, records
from moeret.errors import DataError
from moeret.types import Document


@dataclass(frozen=True, slots=True)
class Source:
    """One file of documents: a domain's, or (domain "") of documents without a domain."""

    path: Path
    domain: str = ""


@dataclass(frozen=True, slots=True)
class Shard:
    """The records `start` to `end` of one source, counted from 0, but for those in `skipped`.

    `number` is the shard's place in the plan. The first record is on line (or row) `line`, counted from 1, which begins at byte
    `offset` of the decompressed file (0 for Parquet).
    """

    number: int
    source: Source
    start: int
    end: int
    offset: int
    line: int
    skipped: tuple[int, ...]

    @property
    def documents(self) -> int:
        """How many documents the shard has; at least one."""
        return self.end - self.start - len(self.skipped)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A record that is left out, and why; `line` is the row, from 1, in a Parquet file."""

    path: Path
    line: int
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """All sources' documents in shards, in order.

    `digests` has the SHA-256 of each file as it is on disk, under "domain NAME" (a domain's second file: "domain NAME 2") or
    "corpus N" for the Nth source without a domain.
    """

    shards: tuple[Shard, ...]
    digests: dict[str, str]
    skipped: tuple[Skipped, ...]

    @property
    def documents(self) -> int:
        """How many documents all shards have."""
        return sum(shard.documents for shard in self.shards)


def scan(sources: Sequence[Source], shard_documents: int, on_error: Literal["stop", "skip"] = "stop") -> Plan:
    """Checks every record of every source and cuts the sources into shards of at most `shard_documents` records.

    In one source no id may come twice. Sources of one domain, and those without one, share their ids: what comes again just
    alike in a later file is left out without a word, another document of the same id is refused. With "skip" what is refused is
    left out and listed; with "stop" it is raised, ids once every record could be read. In memory are about 8 bytes a
    document (thrice that for a moment), and the ids that come again.

    Raises:
      ConfigError: `shard_documents` is below 1, or `on_error` is neither.
      DataError: a file that is missing, unreadable, damaged, empty or has nothing that can be used; with "stop" also records
        that cannot be used, with their lines.
    """
    require(shard_documents >= 1, f"shard_documents must be at least 1, got {shard_documents}")
    require(on_error in ("stop", "skip"), f"on_error must be stop or skip, got {on_error!r}")
    scanned, digests, spaces = [], {}, {}
    for source in sources:
        one = _Scanned(source, on_error == "skip")
        space = spaces.setdefault(source.domain, [])
        space.append(one)
        scanned.append(one)
        key = f"domain {source.domain}" + (f" {len(space)}" if len(space) > 1 else "")
        digests[key if source.domain else f"corpus {len(space)}"] = one.read(shard_documents)
    for space in spaces.values():
        _check_ids(space)
    skipped = (skip for one in scanned for skip in sorted(one.skipped, key=lambda skip: skip.line))
    return Plan(_cut(scanned, shard_documents), digests, tuple(skipped))


def read_shard(shard: Shard) -> list[Document]:
    """The documents of a shard, as `scan` saw them, in order.

    Raises:
      DataError: the file cannot be read, or not as before.
    """
    [(_, documents)] = read_shards([shard])
    return documents


def read_shards(shards: Sequence[Shard]) -> Iterator[tuple[Shard, list[Document]]]:
    """Each shard, in order, with its documents, as `read_shard` has them; every file is gone through once."""
    for source, own in groupby(shards, key=lambda shard: shard.source):
        mine = list(own)
        stream = enumerate(records(source.path, mine[0].start, mine[0].offset, mine[0].line), start=mine[0].start)
        for shard in mine:
            out, documents = set(shard.skipped), []
            for number, (_, _, raw) in stream:
                if number >= shard.start and number not in out:
                    documents.append(_again(source.path, raw))
                if number == shard.end - 1:
                    break
            if len(documents) != shard.documents:
                raise _changed(source.path)
            yield shard, documents


def _again(path: Path, raw: Raw) -> Document:
    """The document of a record that was one before."""
    try:
        return document_in(raw)
    except DataError as error:
        raise _changed(path) from error


def _changed(path: Path) -> DataError:
    return DataError(f"{path} changed while it was being indexed; run the command again")


@dataclass(slots=True)
class _Scanned:
    """What is known of one source: per record a hash of its id, per shard where it begins, and what is left out."""

    source: Source
    skip: bool
    hashes: array = field(default_factory=lambda: array("Q"))
    starts: list[tuple[int, int]] = field(default_factory=list)
    out: list[int] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    problems: Problems = field(init=False)

    def __post_init__(self) -> None:
        self.problems = Problems(self.source.path)

    def read(self, shard_documents: int) -> str:
        """Reads the whole file once, and returns its SHA-256."""
        path, digest = self.source.path, hashlib.sha256()
        for number, (line, offset, raw) in enumerate(records(path, digest=digest)):
            if number % shard_documents == 0:
                self.starts.append((offset, line))
            try:
                self.hashes.append(_hash(document_in(raw).id))
            except DataError as error:
                self.hashes.append(0)
                self.refuse(number, line, str(error))
        if not self.hashes:
            raise DataError(f"{path}: the corpus is empty")
        self.check()
        if format_of(path) == "jsonl":
            return digest.hexdigest()
        with readable(path):
            return sha256_of(path)

    def refuse(self, number: int, line: int, reason: str) -> None:
        """Leaves a record out, or notes it for `check`."""
        if self.skip:
            self.out.append(number)
            self.skipped.append(Skipped(self.source.path, line, reason))
        else:
            self.problems.add(f"{self.place(line)}: {reason}")

    def check(self) -> None:
        """Raises DataError if there are problems, or if every record was refused."""
        self.problems.raise_if_any()
        if len(self.skipped) == len(self.hashes):
            first = min(self.skipped, key=lambda skip: skip.line)
            raise DataError(
                f"{self.source.path}: none of its {len(self.hashes)} records can be used; "
                f"the first, {self.place(first.line)}: {first.reason}"
            )

    def place(self, line: int) -> str:
        """A record's place, as messages name it."""
        return f"{'row' if format_of(self.source.path) == 'parquet' else 'line'} {line}"


def _hash(id: str) -> int:
    return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "little")


def _check_ids(space: list[_Scanned]) -> None:
    """Finds the ids that come again among these sources: those whose hash does are read again, so that chance plays no part."""
    own = [np.frombuffer(one.hashes, np.uint64) for one in space]
    good = np.concatenate([np.delete(of, one.out) if one.out else of for of, one in zip(own, space, strict=True)])
    good.sort()
    repeated = np.unique(good[1:][good[1:] == good[:-1]])
    del good
    if not len(repeated):
        return
    first: dict[str, tuple[_Scanned, int, bytes]] = {}
    for one, hashes in zip(space, own, strict=True):
        again = repeated[np.minimum(np.searchsorted(repeated, hashes), len(repeated) - 1)] == hashes
        again[one.out] = False
        here: dict[str, int] = {}
        numbered = enumerate(records(one.source.path)) if again.any() else ()
        for number, (line, _, raw) in compress(numbered, again[: len(again) - again[::-1].argmax()].tobytes()):
            document = _again(one.source.path, raw)
            id, digest = document.id, hashlib.sha256(repr(document).encode()).digest()
            before, place, known = first.setdefault(id, (one, line, digest))
            if id in here:
                one.refuse(number, line, f"id {short(id)} is already on {one.place(here[id])}")
            elif known != digest:
                where = f"{before.place(place)} of {before.source.path}"
                one.refuse(
                    number, line, f"id {short(id)} is another document's on {where}; give one of them another id"
                )
            elif before is not one:
                one.out.append(number)
            here.setdefault(id, line)
        one.check()


def _cut(scanned: list[_Scanned], shard_documents: int) -> tuple[Shard, ...]:
    shards: list[Shard] = []
    for one in scanned:
        one.out.sort()
        for place, (offset, line) in enumerate(one.starts):
            start = place * shard_documents
            end = min(start + shard_documents, len(one.hashes))
            skipped = tuple(one.out[bisect_left(one.out, start) : bisect_left(one.out, end)])
            if len(skipped) < end - start:
                shards.append(Shard(len(shards), one.source, start, end, offset, line, skipped))
    return tuple(shards)
