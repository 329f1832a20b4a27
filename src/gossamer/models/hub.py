"""Checkpoints from the Hugging Face hub: safetensors, configs and tokenizers; never pickles, never code."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

# HTTPError is the base class of whichever HTTP client the installed huggingface_hub uses.
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from gossamer.errors import CheckpointError, DownloadError, ModelNotFoundError
from gossamer.models.catalog import suggest
from gossamer.models.checkpoint import check_directory, check_parts

_ALLOWED = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
# Folders hold other formats (onnx/, original/), except those of sentence-transformers, which are numbered (1_Pooling/);
# "consolidated" is a second copy of the same weights.
_IGNORED = ["[!0-9]*/*", "consolidated*"]
_METADATA_TIMEOUT = 10.0


def snapshot(repo_id: str, *, refresh: bool = False) -> Path:
    """The directory of a hub checkpoint, downloaded if it is not in Hugging Face's own cache.

    A complete cached snapshot is used without asking the hub whether a newer one exists.

    Args:
        repo_id: ``organisation/name``.
        refresh: download the current revision even if a snapshot is cached.

    Raises:
        ModelNotFoundError: there is no such model, no access to it, or no connection.
        CheckpointError: the repository has no safetensors weights.
        DownloadError: the connection broke during the download.
    """
    if not refresh and (cached := cached_snapshot(repo_id)):
        return cached
    _check_repository(repo_id)
    try:
        directory = snapshot_download(
            repo_id, allow_patterns=_ALLOWED, ignore_patterns=_IGNORED, force_download=refresh
        )
    except (HfHubHTTPError, HTTPError, OSError) as error:
        raise DownloadError(
            f"the download of {repo_id} broke off: {error}. Run the command again; finished files are kept."
        ) from error
    check_directory(Path(directory))
    return Path(directory)


def cached_snapshot(repo_id: str) -> Path | None:
    """The complete snapshot of ``repo_id`` on this disk, or ``None``."""
    try:
        directory = Path(
            snapshot_download(repo_id, allow_patterns=_ALLOWED, ignore_patterns=_IGNORED, local_files_only=True)
        )
        check_directory(directory)
    except (LocalEntryNotFoundError, HFValidationError, CheckpointError):
        return None
    return directory


def _check_repository(repo_id: str) -> None:
    """Asks the hub for the list of files before any of them is downloaded."""
    try:
        # One short request without retries, so that a machine without a network gets its answer at once.
        info = HfApi().model_info(repo_id, timeout=_METADATA_TIMEOUT)
    except HFValidationError:
        raise _not_found(repo_id, "It is neither a path on this machine nor a valid Hugging Face id") from None
    except GatedRepoError as error:
        reason = f"Access to it is restricted: accept its terms at huggingface.co/{repo_id}, then run `hf auth login`"
        raise _not_found(repo_id, reason) from error
    except RepositoryNotFoundError as error:
        raise _not_found(
            repo_id, "It is no path on this machine, and the Hugging Face hub has no such model"
        ) from error
    except (HfHubHTTPError, HTTPError, OfflineModeIsEnabled, OSError) as error:
        reason = (
            "It is no path on this machine, it is not in the Hugging Face cache, and the hub cannot be reached "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        )
        raise _not_found(repo_id, reason) from error
    check_parts([sibling.rfilename for sibling in info.siblings or ()], f"huggingface.co/{repo_id}")


def _not_found(model: str, reason: str) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"cannot find the model {model!r}. {reason}. {suggest(model)} "
        "A checkpoint directory or a .gguf file on this machine works too."
    )
