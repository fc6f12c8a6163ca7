"""Model repositories of the Hub that a user names, other than those on record."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .errors import CheckpointError, first_line

PREFIX = "hf-hub:"
_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\S+))?")


@dataclass(frozen=True)
class Repository:
    """A model repository of the Hub.

    Attributes:
        repo_id: `OWNER/NAME`.
        revision: A branch, tag or commit; the main branch if None.
    """

    repo_id: str
    revision: str | None = None

    @classmethod
    def parse(cls, name: str) -> Repository | None:
        """Read `hf-hub:OWNER/NAME[@REVISION]`, the prefix being optional; None if it is no such."""
        match = _ID.fullmatch(name.removeprefix(PREFIX))
        return cls(*match.groups()) if match else None

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.revision}" if self.revision else self.repo_id

    def find_file(self, name: str) -> Path | None:
        """Find a file in the Hub's cache, downloading it if it is not there; None if there is none.

        Raises:
            CheckpointError: If nobody can say, in one line with the remedy.
        """
        try:
            return Path(hf_hub_download(self.repo_id, name, revision=self.revision))
        except LocalEntryNotFoundError as error:  # a kind of the next, but says nothing of the Hub
            reason = self._explain(error.__cause__ or error)
        except EntryNotFoundError:
            return None
        except Exception as error:  # the client, its HTTP library and the disk each have their own
            reason = self._explain(error)
        raise CheckpointError(f"{constants.ENDPOINT}/{self.repo_id} {reason}") from None

    def _explain(self, error: BaseException) -> str:
        if isinstance(error, OfflineModeIsEnabled):
            return "is not in the Hub's cache, and HF_HUB_OFFLINE forbids the network; unset that"
        if not isinstance(error, HfHubHTTPError):
            return f"cannot be read ({first_line(error)}); check the network and HF_ENDPOINT"
        status = error.response.status_code
        if isinstance(error, RevisionNotFoundError):
            return f"has no revision '{self.revision or 'main'}'; name one that it has"
        if isinstance(error, RepositoryNotFoundError):
            return (
                f"does not exist, or is private (HTTP {status}); check the name, or log in with "
                "`hf auth login` or HF_TOKEN"
            )
        if status in (401, 403):
            return (
                f"is closed to you (HTTP {status}); ask its owner for access, or use a token that "
                "has it"
            )
        return f"cannot be read (HTTP {status} {error.response.reason_phrase}); try again later"
