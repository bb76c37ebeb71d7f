"""The hub: whether it answers, and the trained adapter as a repository on it (`--push_to_hub`)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from .problems import BadInput, first_line

PATIENCE = 5.0  # seconds until a hub that does not answer counts as out of reach


@cache
def unreachable() -> str | None:
    """Return why the hub cannot be reached; None if it answers.

    After a failure this process works offline: files in the local cache are still found, and everything else fails at
    once instead of after half a minute of retries. Call it before `datasets` is imported, which reads the setting once.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception as error:  # each version of the client has its own classes
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"
        return f"{constants.ENDPOINT} cannot be reached: {error}"
    return None


@contextmanager
def looking_up(option: str, name: str) -> Iterator[None]:
    """Inside, a library loads `name` from a folder or the hub; its failures are raised as one line about the option.

    Raises:
        BadInput: it cannot be loaded; if the hub is out of reach, that is the reason given.
    """
    why = None if Path(name).exists() else unreachable()
    try:
        yield
    except BadInput:
        raise
    except (OSError, ValueError, ImportError) as error:
        reason = f"it is not on this machine, and {why}" if why else first_line(error)
        raise BadInput([f"{option} {name}: {reason}"]) from error


def create_repository(name: str | None, output: str | Path, token: str | None, private: bool | None = None) -> str:
    """Make sure that a repository exists, called after the output folder if no name is given; return its full name.

    Raises:
        BadInput: the repository cannot be written to, or the hub cannot be reached.
    """
    from huggingface_hub import create_repo

    name = name or Path(output).resolve().name
    if why := unreachable():
        raise BadInput([f"--push_to_hub: {name} cannot be written to: {why}"])
    try:
        return create_repo(name, exist_ok=True, token=token, private=private).repo_id
    except Exception as error:  # no token, no such name, no permission: each client version has its own classes
        raise BadInput([f"--push_to_hub: {name} cannot be written to: {error}"]) from error


def upload(name: str, output: str | Path, token: str | None, ignored: tuple[str, ...] = ()) -> str:
    """Upload an output folder without its checkpoints and hidden files; return the address of the commit."""
    from huggingface_hub import upload_folder

    patterns = ["checkpoint-*", ".*", *ignored]
    found = upload_folder(repo_id=name, folder_path=str(output), token=token, ignore_patterns=patterns)
    return str(found.commit_url)
