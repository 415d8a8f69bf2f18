"""Upload an export to the Hugging Face Hub, by huggingface_hub. Importing this module is cheap."""

import re
import shlex
from pathlib import Path
from typing import Any

from lightlm import __version__
from lightlm.convert.record import RECORD
from lightlm.errors import ConvertError, UsageError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
# What the Hub means by the status of a refused request.
_REFUSALS = {
    401: "the token is not valid; make one with write access at https://huggingface.co/settings/tokens",
    403: "the token may not write there; it needs write access to this organization or user",
    404: "there is no such organization or user, or the token may not see it",
    409: "a repository of another kind has this name",
    413: "a file is too large",
    429: "too many requests; try again later",
}


def check_upload(repository: str) -> None:
    """Raise UsageError or ConvertError for what would keep an upload from working, without asking the Hub."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UsageError(f"--push {repository}: not a name on the Hub: {error}") from None
    if not _REPOSITORY.fullmatch(repository):
        raise UsageError(f"--push {repository}: write ORGANIZATION/NAME, such as me/{Path(repository).name}")
    if constants.is_offline_mode():
        raise ConvertError("--push: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it")
    if not get_token():
        raise ConvertError("--push: there is no token of the Hub; run `hf auth login`, or set HF_TOKEN")


def check_license(name: str) -> str:
    """Return the Hub's identifier of a license, such as apache-2.0; raise UsageError if it cannot be one."""
    if not _LICENSE.fullmatch(name.lower()):
        raise UsageError(f"--license {name}: write the Hub's identifier, such as apache-2.0, mit, cc-by-4.0 or other")
    return name.lower()


def upload(folder: Path, repository: str, *, private: bool = False) -> str:
    """Upload all files of a folder as one commit, make the repository if there is none, and return its address.

    Args:
        private: make it private; nothing is uploaded to one that is public already.

    Raises:
        ConvertError: the Hub refuses, or cannot be reached; the folder is unchanged.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi(token=True, library_name="lightlm", library_version=__version__)
    message = f"Export from LightLM {__version__}"
    failed = f"{folder} is written, but not uploaded to {repository}"
    try:
        address = str(api.create_repo(repository, private=private or None, exist_ok=True))
        if private and not api.model_info(repository).private:
            raise ConvertError(f"{failed}: the repository is public already; make it private, or leave out --private")
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message, ignore_patterns=RECORD)
    except ConvertError:
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = _REFUSALS.get(status, _first_line(error))
        raise ConvertError(f"{failed}: the Hub answered {status}: {reason}") from None
    except OfflineModeIsEnabled:
        raise ConvertError(f"{failed}: HF_HUB_OFFLINE is set") from None
    except Exception as error:  # whatever its network library raises
        # `hf upload` does not look whether the repository is public already.
        other = "" if private else f", or: {shlex.join(['hf', 'upload', repository, folder.as_posix()])}"
        raise ConvertError(
            f"{failed}: the Hub cannot be reached ({type(error).__name__}: {_first_line(error)}); check the "
            f"connection, then run the same command again{other}"
        ) from None
    return address


def _first_line(error: Any) -> str:
    return next(iter(str(error).splitlines()), "no reason given")
