"""The Hugging Face hub: the only importer of its client, whose errors become ours. Imported late, because it is slow to import."""

import errno
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from moeret.errors import HubError, MoeretError


def fetch_files(name: str, patterns: Sequence[str]) -> Path:
    """The folder, in the hub client's own cache, with those files of a repository that match; raises what the client raises."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=list(patterns)))


def commit_of(repo_id: str, revision: str | None = None) -> str:
    """The commit that a branch, a tag or the head of a repository is at.

    Raises:
      HubError: there is no such repository or revision, or the hub does not answer.
    """
    from huggingface_hub import HfApi

    with _in_words(repo_id):
        return HfApi().model_info(repo_id, revision=revision).sha


def fetch_file(repo_id: str, commit: str, name: str, folder: Path) -> bool:
    """Puts one file of a repository into a folder under its own name, unless it is there already; False if there is none.

    Raises:
      HubError: the hub does not give it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with _in_words(repo_id):
        try:
            HfApi().hf_hub_download(repo_id, name, revision=commit, local_dir=folder)
        except LocalEntryNotFoundError:  # the client's way to say that it cannot reach the hub
            raise
        except EntryNotFoundError:
            return False
    return True


@contextmanager
def progress(shown: bool) -> Iterator[None]:
    """Within it the hub's client draws its bars, or does not; they are the whole process's, so they are set back."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = not are_progress_bars_disabled()
    (enable_progress_bars if shown else disable_progress_bars)()
    try:
        yield
    finally:
        (enable_progress_bars if before else disable_progress_bars)()


def exists(repo_id: str) -> bool:
    """Whether the hub has such a model that everybody, or we, may see. Raises HubError if it does not answer."""
    from huggingface_hub import HfApi

    with _in_words(repo_id):
        return HfApi().repo_exists(repo_id)


def open_repository(repo_id: str, *, private: bool) -> tuple[str, set[str]]:
    """Makes a model repository, unless it is there, and returns the commit that it is at, and its files.

    Raises:
      HubError: the hub does not let us, or the repository is there and public where a private one is wanted.
    """
    from huggingface_hub import HfApi

    with _in_words(repo_id):
        api = HfApi()
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        found = api.model_info(repo_id)
        if private and not found.private:
            raise HubError(f"{repo_id} is there and public; make it private on the hub, or name another")
        return found.sha, {own.rfilename for own in found.siblings or []}


def commit_files(
    repo_id: str, parent: str, files: Mapping[str, Path | bytes], deleted: Sequence[str], message: str
) -> str:
    """Adds and deletes files of a repository in one commit on top of `parent`, and returns the commit's address.

    Raises:
      HubError: the hub does not take it, also where somebody else's commit came first; nothing changed then.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    with _in_words(repo_id):
        operations = [CommitOperationAdd(name, own) for name, own in files.items()]
        operations += [CommitOperationDelete(name) for name in deleted]
        return HfApi().create_commit(repo_id, operations, commit_message=message, parent_commit=parent).commit_url


@contextmanager
def _in_words(repo_id: str) -> Iterator[None]:
    """Raises HubError for all that the hub's client raises: its own errors and those of its HTTP library."""
    try:
        yield
    except MoeretError:
        raise
    except Exception as error:
        raise HubError(f"{repo_id}: {_reason(error)}") from None


_HERE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def _reason(error: Exception) -> str:
    from huggingface_hub import errors, get_token

    status = getattr(getattr(error, "response", None), "status_code", None)
    said = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if isinstance(error, OSError) and error.errno in _HERE:
        return f"its files cannot be read or written here ({said}); make room or choose another folder, then run this again"
    if isinstance(error, errors.HFValidationError):
        return f"is no hub id as OWNER/NAME ({error})"
    if isinstance(error, errors.GatedRepoError):
        return "its owner gives access on request only; ask for it on the hub, then log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return "there is no such revision; leave it out for the newest"
    if status == 401 and not get_token():
        return (
            "the hub wants a token, or there is no such model; give one by `hf auth login` or HF_TOKEN, check the name"
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        return "the hub has no such model, or your token may not see it; check the name and the token"
    if status in (401, 403):
        return f"the hub does not let your token do this; use one that may write there ({said})"
    if status == 412:
        return "somebody else changed it meanwhile; run this again"
    return f"the hub did not do it ({said}); check the network, then run this again"
