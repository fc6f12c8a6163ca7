"""Model repositories of the Hugging Face Hub: reading from one, and what its refusals mean."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import (
    HfFileMetadata,
    constants,
    get_hf_file_metadata,
    get_token,
    hf_hub_download,
    hf_hub_url,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import CheckpointError, first_line

PREFIX = "hf-hub:"
_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\S+))?")


@dataclass(frozen=True)
class Repository:
    """A model repository of the Hub, and what its user can do where it cannot be read.

    Attributes:
        repo_id: `OWNER/NAME`.
        revision: A branch, tag or commit; the main branch if None.
        name_advice: For when another repository may be meant: a clause.
        fallback_advice: How to do without the repository: the end of a sentence.
        offline_advice: How to do without the network: likewise.
    """

    repo_id: str
    revision: str | None = None
    name_advice: str = "check its name, @REVISION and HF_ENDPOINT"
    fallback_advice: str = ""
    offline_advice: str = ""

    @classmethod
    def parse(cls, name: str) -> Repository | None:
        """Read `hf-hub:OWNER/NAME[@REVISION]`, the prefix being optional; None for other names."""
        match = _ID.fullmatch(name.removeprefix(PREFIX))
        return cls(*match.groups()) if match else None

    @property
    def address(self) -> str:
        """Where it is."""
        return f"{constants.ENDPOINT}/{self.repo_id}"

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.revision}" if self.revision else self.repo_id

    def find_file(self, name: str) -> Path | None:
        """Find a file in the Hub's cache, downloading it if it is not there; None if there is none.

        Raises:
            CheckpointError: If it cannot be downloaded, or the Hub does not say whether it has it.
        """
        try:
            read_token()
            return Path(hf_hub_download(self.repo_id, name, revision=self.revision))
        except RemoteEntryNotFoundError:
            return None
        except Exception as error:  # the client, its HTTP library and the disk each have their own
            raise CheckpointError(self.explain(error, name)) from None

    def ask_for(self, name: str, retry: bool = False) -> HfFileMetadata:
        """Ask the Hub about a file; nothing is downloaded, and nothing written.

        Args:
            name: Of the file.
            retry: Wait and ask again if the Hub is busy or fails.

        Returns:
            Among others `commit_hash`, the 40 hexadecimal digits of a commit, and `etag`, a word.

        Raises:
            Exception: One that `explain` explains.
        """
        read_token()
        url = hf_hub_url(self.repo_id, name, revision=self.revision)
        offered = get_hf_file_metadata(url, retry_on_errors=retry)
        is_commit = re.fullmatch("[0-9a-f]{40}", offered.commit_hash or "")
        if not is_commit or not re.fullmatch(r"[\w-]{1,128}", offered.etag or ""):
            raise CheckpointError(
                f"{url}: comes without a usable X-Repo-Commit or ETag, so not from a Hub; "
                f"check HF_ENDPOINT{self.fallback_advice}"
            )
        return offered

    def explain(self, error: Exception, name: str) -> str:
        """Say in one line why the Hub did not give a file, and what to do."""
        if isinstance(error, CheckpointError):
            return str(error)
        error = _unwrap(error)
        if isinstance(error, HfHubHTTPError):
            return self._explain_answer(error, name)
        if isinstance(error, OfflineModeIsEnabled):
            return (
                f"{self.address} cannot be asked, as HF_HUB_OFFLINE is set; unset that"
                f"{self.offline_advice}{self.fallback_advice}"
            )
        if isinstance(error, HFValidationError):
            return f"no repository is named {self.repo_id!r}; {self.name_advice}"
        if isinstance(error, OSError) and error.errno is not None:
            return (
                f"the Hub's cache cannot be used ({first_line(error)}); make room there, or name "
                "another folder with HF_HOME"
            )
        return (
            f"{self.address} cannot be read ({first_line(error)}); check the network and "
            f"HF_ENDPOINT{self.fallback_advice}"
        )

    def _explain_answer(self, error: HfHubHTTPError, name: str) -> str:
        status = error.response.status_code
        advice = self.name_advice + self.fallback_advice
        if isinstance(error, RevisionNotFoundError):
            revision = self.revision or "main"
            return f"{self.address} has no revision '{revision}'; {advice}"
        if isinstance(error, RemoteEntryNotFoundError):
            return f"{self.address} has no file '{name}'; {advice}"
        if status == 403:
            return (
                f"{self.address} is closed to you (HTTP 403); ask its owner for access, or use a "
                f"token that has it{self.fallback_advice}"
            )
        if isinstance(error, RepositoryNotFoundError) and status == 401:
            return (
                f"{self.address} is missing or private (HTTP 401); {self.name_advice}, or log in "
                "with `hf auth login` or HF_TOKEN"
            )
        if isinstance(error, RepositoryNotFoundError):
            reason = f"does not exist, or is closed to your token (HTTP {status})"
            return f"{self.address} {reason}; {advice}"
        if status == 401:
            return (
                f"{constants.ENDPOINT} does not accept your token (HTTP 401); renew it with "
                "`hf auth login`, or do without (`hf auth logout`, and unset HF_TOKEN)"
            )
        reason = f"HTTP {status} {error.response.reason_phrase}"
        remedy = "try again later" if _is_passing(status) else self.name_advice
        return f"{self.address} cannot be read ({reason}); {remedy}{self.fallback_advice}"


def _unwrap(error: Exception) -> Exception:
    """Return the error that the client wrapped in general advice, which does not say what failed.

    It wraps any error of its first request like this.
    """
    wrapped = error.__cause__
    if isinstance(error, HfHubHTTPError) or not isinstance(wrapped, Exception):
        return error
    return wrapped


def explain_upload(error: Exception) -> str:
    """Say in one line why the Hub did not take files, and what to do."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        # The client wraps an error of an upload in another that does not say what failed.
        error = error.__cause__
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 403:
            return (
                "your token may not write there (HTTP 403); give it write permission at "
                f"{constants.ENDPOINT}/settings/tokens, or name a repository of your own"
            )
        if isinstance(error, RepositoryNotFoundError):
            return (
                f"is no model repository that your token can see (HTTP {status}); name another "
                "--repo-id, or use a token of its owner"
            )
        if status == 401:
            return (
                f"{constants.ENDPOINT} does not accept your token (HTTP 401); renew it with "
                "`hf auth login`, or set HF_TOKEN to one that may write"
            )
        remedy = "wait" if _is_passing(status) else "correct that, or check HF_ENDPOINT"
        return (
            f"{constants.ENDPOINT} refuses ({describe_answer(error)}); {remedy}, and give the same "
            "command again"
        )
    if isinstance(error, OfflineModeIsEnabled):
        return "the network may not be used; unset HF_HUB_OFFLINE"
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ValueError):  # of the client itself: a bad repository id, tag or card
        return f"cannot be published ({reason}); correct that, and give the same command again"
    return (
        f"cannot be published ({reason}); check the network and HF_ENDPOINT, and give the same "
        "command again"
    )


def describe_answer(error: HfHubHTTPError) -> str:
    """Return the status of an answer and what the Hub says about it, in one line."""
    said = error.server_message or error.response.reason_phrase
    return f"HTTP {error.response.status_code}: {' '.join(said.split())}"


def _is_passing(status: int) -> bool:
    """Return whether the same request may do better later, by the HTTP status of the answer."""
    return status in (408, 429) or status >= 500


def read_token() -> str | None:
    """Read your token for the Hub; None if there is none.

    Raises:
        CheckpointError: If there may be one, but it cannot be read.
    """
    try:
        return get_token()
    except Exception as error:  # of the disk, or of where else the client looks for it
        raise CheckpointError(
            f"your token cannot be read ({first_line(error)}); fix or remove "
            f"{constants.HF_TOKEN_PATH}, or set HF_TOKEN"
        ) from None
