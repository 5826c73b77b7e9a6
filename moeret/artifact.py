"""Models and indexes on disk: immutable files named by one manifest.

An artifact is a directory. `manifest.json` lists its files with size and SHA-256, and is the only name that ever gets
new contents: a writer adds files whose names carry their own digest, then renames a new manifest over the old one. A
reader therefore sees the old artifact or the new one, whatever moment a writer dies at, and a directory without a
manifest is one whose making has not finished. Writers hold a lock on the directory (moeret.lock).

An artifact may keep its last versions, *snapshots*: their manifests lie in `snapshots`, and files that one of them names stay.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from moeret.errors import ArtifactError
from moeret.lock import sync

T = TypeVar("T")
MANIFEST = "manifest.json"
_SNAPSHOTS = "snapshots"
_FORMATS = {"model": "moeret-8", "index": "moeret-10"}
"""Of the kinds that changed at other times than the rest."""
_DIGESTED = re.compile(r"-([0-9a-f]{12})(\.[a-z0-9]+)?$")
_TEMPORARY = ".unfinished"
_KEYS = {"format", "kind", "snapshot", "fingerprint", "meta", "files"}


@dataclass(frozen=True, slots=True)
class FileEntry:
    """What the manifest says of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Artifact:
    """A published directory: `meta` is its kind's own JSON, `fingerprint` a hash of meta and all file digests.

    `snapshot` counts what was published there; 0 where no snapshots are kept.
    """

    root: Path
    kind: str
    meta: dict[str, Any]
    files: dict[str, FileEntry]
    fingerprint: str
    snapshot: int

    def path(self, name: str) -> Path:
        """The path of a file that the manifest lists."""
        if name not in self.files:
            raise ArtifactError(
                f"{self.root / MANIFEST} lists no file {name!r}; the {self.kind} is damaged, make it anew"
            )
        return self.root / name


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def exists(root: Path) -> bool:
    """Whether a published artifact lies at `root`, damaged or not."""
    return (root / MANIFEST).exists()


def read(root: Path, kind: str, known: Artifact | None = None) -> Artifact:
    """Reads the manifest at `root` and checks every file against it, but for those that `known`, read before, has too.

    Raises:
      ArtifactError: nothing is there, it is unfinished, of another kind or format, or a file is missing or altered.
    """
    artifact = look(root, kind)
    check(artifact, (name for name, own in artifact.files.items() if known is None or known.files.get(name) != own))
    return artifact


def look(root: Path, kind: str) -> Artifact:
    """What the manifest at `root` says; no file is checked. Raises ArtifactError as `read` does."""
    if not root.is_dir():
        raise ArtifactError(f"no {kind} at {root}: there is no such directory")
    return _parse(root, root / MANIFEST, kind)


def inside(artifact: Artifact, prefix: str, kind: str) -> Artifact:
    """What `Draft.include` put under `prefix` of an artifact that was read: its files are checked already.

    Raises:
      ArtifactError: nothing of this kind is there, or its manifest names other files than the outer one.
    """
    root = artifact.path(f"{prefix}/{MANIFEST}").parent
    own = _parse(root, root / MANIFEST, kind)
    for name, entry in own.files.items():
        if artifact.files.get(f"{prefix}/{name}") != entry:
            raise ArtifactError(
                f"{root / MANIFEST} and {artifact.root / MANIFEST} do not agree on {name!r}; make the {artifact.kind} anew"
            )
    return own


def _parse(root: Path, manifest: Path, kind: str) -> Artifact:
    """What a manifest says, without a look at the files."""
    try:
        raw = json.loads(manifest.read_text())
        found = raw["format"], raw["kind"]
        if strange := raw.keys() - _KEYS:
            raise ValueError(f"nobody writes {min(strange)!r}")
        files = {name: FileEntry(**entry) for name, entry in raw["files"].items()}
        if foreign := [name for name in files if not _is_name(name)]:
            raise ValueError(f"it names no file of its directory: {foreign[0]!r}")
        number = raw.get("snapshot", {"number": 0})
        if "snapshot" in raw and number["digest"] != fingerprint([number["number"], raw["fingerprint"]]):
            raise ValueError("the snapshot's digest is another")
        artifact = Artifact(root, raw["kind"], raw["meta"], files, raw["fingerprint"], number["number"])
    except FileNotFoundError:
        raise ArtifactError(
            f"{root} holds no finished {kind} (no {MANIFEST}); run the command that makes it, again if it was cut off"
        ) from None
    except OSError as error:
        raise ArtifactError(f"cannot read {manifest}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{manifest} is damaged ({type(error).__name__}: {error}); make the {kind} anew") from None
    if found[1] != kind:
        raise ArtifactError(f"{root} is {_a(str(found[1]))}; expected {_a(kind)}")
    if found[0] != _format(kind):
        raise ArtifactError(
            f"{root} is {_a(kind)} in format {found[0]}; expected {_a(kind)} in format {_format(kind)}; "
            "another version of moeret made it, make it anew"
        )
    if artifact.fingerprint != _fingerprint_of(kind, artifact.meta, files):
        raise ArtifactError(
            f"{manifest} was altered: its fingerprint does not match its contents; make the {kind} anew"
        )
    return artifact


def snapshots(root: Path, kind: str) -> list[Artifact]:
    """The versions that are kept of an artifact, oldest first, the present one last; their files are not checked.

    Raises:
      ArtifactError: the manifest of one is damaged; the message names it.
    """
    present = _parse(root, root / MANIFEST, kind)
    kept = [_parse_snapshot(root, path, kind) for path in _snapshot_files(root)]
    return [*(own for own in kept if own.snapshot < present.snapshot), present]  # a killed writer keeps the present too


def _parse_snapshot(root: Path, path: Path, kind: str) -> Artifact:
    try:
        return _parse(root, path, kind)
    except ArtifactError as error:
        raise ArtifactError(
            f"the earlier snapshot {path} cannot be used; restore it, or delete it to do without it ({error})"
        ) from None


def _snapshot_files(root: Path) -> list[Path]:
    found = (path for path in (root / _SNAPSHOTS).glob("*.json") if path.stem.isdecimal())
    return sorted(found, key=lambda path: int(path.stem))


def _format(kind: str) -> str:
    return _FORMATS.get(kind, "moeret-9")


def _a(kind: str) -> str:
    return f"an {kind}" if kind[:1] in "aeiou" else f"a {kind}"


def load(root: Path, kind: str, make: Callable[[Artifact], T]) -> T:
    """`make(read(root, kind))`, again if a writer published the next version meanwhile and deleted this one's files."""
    return retry(root, lambda root: make(read(root, kind)))


def retry(root: Path, run: Callable[[Path], T]) -> T:
    """`run(root)`, again if that fails and a writer has published the next version meanwhile."""
    while True:
        before = _manifest_bytes(root)
        try:
            return run(root)
        except (ArtifactError, FileNotFoundError):
            if before is None or _manifest_bytes(root) == before:
                raise


def _manifest_bytes(root: Path) -> bytes | None:
    try:
        return (root / MANIFEST).read_bytes()
    except OSError:
        return None


def check(artifact: Artifact, names: Iterable[str] | None = None) -> None:
    """Checks these files, or all, of a version whose manifest was read. Raises ArtifactError as `read` does."""
    for name in artifact.files if names is None else names:
        _check_file(artifact, name, artifact.files[name])


def _check_file(artifact: Artifact, name: str, entry: FileEntry) -> None:
    path = artifact.root / name
    try:
        if path.stat().st_size != entry.bytes:
            raise ArtifactError(f"{path} is damaged: {path.stat().st_size} bytes, its manifest says {entry.bytes}")
        if sha256_of(path) != entry.sha256:
            raise ArtifactError(f"{path} is damaged: its SHA-256 is not the one in the manifest")
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing; the {artifact.kind} is damaged, restore it or make it anew") from None
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from None


def _is_name(name: str) -> bool:
    """Whether a manifest may list a file of such a name: one below its directory, in one spelling, and no lock of a writer."""
    return name != MANIFEST and name.isprintable() and re.fullmatch(r"([^./][^/]*/)*[^./][^/]*", name) is not None


def _fingerprint_of(kind: str, meta: dict[str, Any], files: dict[str, FileEntry]) -> str:
    return fingerprint([kind, meta, {name: entry.sha256 for name, entry in files.items()}])


class Draft:
    """The next version of the artifact at `root`, invisible until `publish`."""

    def __init__(self, root: Path, kind: str):
        self.root, self.kind = root, kind
        self._files: dict[str, FileEntry] = {}

    def add(self, name: str, write: Callable[[Path], object]) -> str:
        """Lets `write` make a file, and returns its final name: `name` with a digest of the contents before the suffix."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + _TEMPORARY)
        temporary.unlink(missing_ok=True)  # a killed writer's
        try:
            write(temporary)
            entry = FileEntry(temporary.stat().st_size, sha256_of(temporary))
            sync(temporary)
            final = path.with_name(f"{path.stem}-{entry.sha256[:12]}{path.suffix}")
            temporary.replace(final)
            sync(final.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        relative = final.relative_to(self.root).as_posix()
        self._files[relative] = entry
        return relative

    def keep(self, artifact: Artifact, name: str) -> str:
        """Carries a file of the present version at the same root over into the next one, untouched."""
        self._files[name] = artifact.files[name]
        return name

    def keep_folder(self, artifact: Artifact, prefix: str) -> None:
        """Carries all files under `prefix` over into the next version."""
        self._files |= {name: entry for name, entry in artifact.files.items() if name.startswith(f"{prefix}/")}

    def copy(self, name: str, source: Path) -> str:
        """Copies a file in under its plain name, for names that others prescribe; it must never change afterwards."""
        target = self.root / name
        entry = FileEntry(source.stat().st_size, sha256_of(source))
        self._place(target, entry, lambda temporary: shutil.copyfile(source, temporary))
        self._files[name] = entry
        return name

    def include(self, artifact: Artifact, prefix: str) -> None:
        """Puts another artifact into this one under `prefix`: by hard link where the file system can, else a copy."""
        manifest = artifact.root / MANIFEST
        entries = {**artifact.files, MANIFEST: FileEntry(manifest.stat().st_size, sha256_of(manifest))}
        for name, entry in entries.items():
            source = artifact.root / name
            self._place(
                self.root / prefix / name, entry, lambda temporary, source=source: _link_or_copy(source, temporary)
            )
            self._files[f"{prefix}/{name}"] = entry

    @staticmethod
    def _place(target: Path, entry: FileEntry, write: Callable[[Path], object]) -> None:
        """Lets `write` make `target` under a temporary name, unless it is there already with these very bytes."""
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_file() and target.stat().st_size == entry.bytes and sha256_of(target) == entry.sha256:
            return
        temporary = target.with_name(target.name + _TEMPORARY)
        temporary.unlink(missing_ok=True)
        try:
            write(temporary)
            sync(temporary)
            temporary.replace(target)
            sync(target.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def publish(self, meta: dict[str, Any], keep: int = 0, *, forget: bool = False) -> Artifact:
        """Makes this version the one that readers see, in one rename, then deletes what no version needs.

        Of the versions before it the last `keep` stay as snapshots; none if this `forget`s them.
        """
        files = dict(sorted(self._files.items()))
        previous, before = _listed(self.root / MANIFEST), _number(self.root / MANIFEST)
        digest = _fingerprint_of(self.kind, meta, files)
        number = {"number": before + 1, "digest": fingerprint([before + 1, digest])}
        raw = {
            "format": _format(self.kind),
            "kind": self.kind,
            **({"snapshot": number} if keep else {}),
            "fingerprint": digest,
            "meta": meta,
            "files": {name: {"bytes": entry.bytes, "sha256": entry.sha256} for name, entry in files.items()},
        }
        if keep and before:  # those that are to be forgotten too: killed after the rename, it is known what is to go
            (self.root / _SNAPSHOTS).mkdir(exist_ok=True)
            write_atomically(self.root / _SNAPSHOTS / f"{before:06d}.json", (self.root / MANIFEST).read_bytes())
        write_atomically(self.root / MANIFEST, (json.dumps(raw, indent=1) + "\n").encode())
        prune(self.root, 0 if forget else keep, previous)
        return Artifact(self.root, self.kind, meta, files, digest, before + 1 if keep else 0)


def prune(root: Path, keep: int, previous: Set[str] = frozenset()) -> None:
    """Deletes what no version of the artifact at `root` needs once the last `keep` snapshots alone stay.

    Those are files of `previous`, of earlier snapshots, and what killed writers left in the same folders.
    """
    older = _snapshot_files(root)
    for path in older[: max(0, len(older) - keep)]:
        previous |= _listed(path)
        path.unlink()
    used = set().union(*(_listed(path) for path in (root / MANIFEST, *_snapshot_files(root))))
    folders = {(root / name).parent for name in previous | used}
    strays = {
        path.relative_to(root).as_posix()
        for folder in folders
        if folder.is_dir()
        for path in folder.iterdir()
        if path.is_file() and _is_stray(path, root, used)
    }
    for name in (previous | strays) - used:
        (root / name).unlink(missing_ok=True)
    for folder in sorted(folders | {root / _SNAPSHOTS}, reverse=True):
        while folder != root and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent


def _is_stray(path: Path, root: Path, used: Set[str]) -> bool:
    """Whether a writer of ours left this file: other people's names may end in twelve hex digits too (UUIDs, dates)."""
    if path.relative_to(root).as_posix() in used:
        return False
    digits = _DIGESTED.search(path.name)
    return path.name.endswith(_TEMPORARY) or (digits is not None and sha256_of(path).startswith(digits[1]))


def _listed(manifest: Path) -> set[str]:
    """The files that a manifest names; none where it is not to be read, or not ours."""
    return {*filter(_is_name, _raw(manifest).get("files", {}))}


def _number(manifest: Path) -> int:
    """The number of the snapshot at a manifest; 0 where there is none."""
    number = _raw(manifest).get("snapshot")
    return number["number"] if isinstance(number, dict) and isinstance(number.get("number"), int) else 0


def _raw(manifest: Path) -> dict[str, Any]:
    try:
        raw = json.loads(manifest.read_text())
        return raw if raw["format"] == _format(raw["kind"]) and isinstance(raw["files"], dict) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _link_or_copy(source: Path, target: Path) -> None:
    """Shares the bytes of an immutable file; across file systems, or where links are forbidden, copies them."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def write_atomically(path: Path, contents: bytes) -> None:
    """Replaces a small file: all of the new contents or all of the old, never a part."""
    temporary = path.with_name(path.name + _TEMPORARY)
    try:
        temporary.write_bytes(contents)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
