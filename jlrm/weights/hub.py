"""A directory of Hugging Face's format on its way to the hub.

What can go wrong is looked for before an export begins: the name, the token, the connection, and
what the repository holds. A repository that exists must be one of ours: its card is tagged `jlrm`,
and every file there is one that is uploaded, so that no shard of an earlier export is left beside
those of this one. The hub keeps what is replaced in its history.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from jlrm.config import UsageError

TAG = "jlrm"
LEFT_ALONE = (".gitattributes",)  # the hub's own
PATIENCE = 30.0  # seconds for the hub's first answer
REPOSITORY = re.compile(r"[A-Za-z0-9][\w-]*/[A-Za-z0-9][\w.-]*")
Returned = TypeVar("Returned")


class Target(NamedTuple):
    """Where an export goes: ORG/NAME, a branch ("" for the main one), and who may see it."""

    repo: str
    branch: str = ""
    is_private: bool = False

    def __str__(self) -> str:
        return f"{self.repo}@{self.branch}" if self.branch else self.repo


def check_name(repo: str) -> None:
    """Refuse what is no ORG/NAME. Raises UsageError."""
    if not REPOSITORY.fullmatch(repo) or ".." in repo or "--" in repo or repo.endswith((".", "-")):
        raise UsageError(f"--push {repo}: wanted ORG/NAME, letters, digits, -, _ and . in it.")


def check(target: Target, files: Sequence[str] | None = None) -> None:
    """Refuse to push where it can't end well; nothing is changed on the hub.

    Args:
      files: that are going to be uploaded; None: not known yet.

    Raises:
      UsageError: no token, one that the hub does not take, no connection, or a repository that
        holds something else.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    if not get_token():
        raise UsageError(
            "The hub wants a token: set HF_TOKEN to one that may write, or do: hf auth login"
        )
    asked: dict[str, Any] = {"revision": target.branch or None, "timeout": PATIENCE}
    try:
        found = _told(target, lambda api: api.model_info(target.repo, **asked))
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return  # to be made
    held = {each.rfilename for each in found.siblings or ()} - {*LEFT_ALONE}
    is_ours = TAG in (found.tags or ())
    others = sorted(held - {*files}) if files is not None else []
    if held and (not is_ours or others):
        what = f"{others[0]}, which is not of this export" if is_ours else "what jlrm did not write"
        raise UsageError(
            f"{target} holds {what}. Name another repository, or another --revision whose files "
            "may be replaced."
        )


def push(directory: pathlib.Path, target: Target) -> str:
    """Upload all files of a directory, and return the address of the commit.

    Raises:
      UsageError: as `check`, or the hub refuses.
    """
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    files = sorted(each.name for each in directory.iterdir())
    check(target, files)

    def upload(api: Any) -> str:
        api.create_repo(target.repo, private=target.is_private or None, exist_ok=True)
        if target.branch:
            api.create_branch(target.repo, branch=target.branch, exist_ok=True)
            check(target, files)  # a new branch begins with the files of the main one
        done = api.upload_folder(
            repo_id=target.repo,
            folder_path=directory,
            revision=target.branch or None,
            commit_message=f"Export of {directory.name} by jlrm",
        )
        return str(done.commit_url)

    try:
        return _told(target, upload)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise UsageError(f"The hub has no {target} any more: it was removed meanwhile.") from None


def _told(target: Target, ask: Callable[[Any], Returned]) -> Returned:
    """Ask the hub, and say in a sentence what went wrong.

    Raises:
      UsageError: anything but RepositoryNotFoundError and RevisionNotFoundError, which `check`
        waits for.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import (
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    api = HfApi(endpoint=constants.ENDPOINT)
    try:
        return ask(api)
    except (RepositoryNotFoundError, RevisionNotFoundError, UsageError):
        raise
    except OfflineModeIsEnabled:
        raise UsageError("HF_HUB_OFFLINE is set, so nothing can be pushed. Unset it.") from None
    except HfHubHTTPError as error:
        code = error.response.status_code
        said = {
            401: f"The hub at {api.endpoint} does not take this token: set HF_TOKEN to another.",
            403: f"This token may not write to {target.repo}. Take one with write access to it.",
        }
        why = " ".join((error.server_message or str(error)).split())[:200].rstrip(".")
        raise UsageError(said.get(code, f"The hub refused {target} ({code}): {why}.")) from None
    except Exception as error:  # connections fail in the ways of the client's HTTP library
        why = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        raise UsageError(f"The hub at {api.endpoint} can't be reached: {why}.") from None
