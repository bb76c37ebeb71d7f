"""The trained adapter as a repository of the hub: `--push_to_hub`."""

from argparse import Namespace
from pathlib import Path

from huggingface_hub import create_repo, upload_folder

from ..problems import BadInput


def create_repository(args: Namespace) -> str:
    """Make sure that the repository is there, and return its name; raises `BadInput`."""
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        return create_repo(name, exist_ok=True, token=args.hub_token).repo_id
    except Exception as error:  # no token, no network, no such name: each client version has its own classes
        raise BadInput([f"--push_to_hub: {name} cannot be written to: {error}"]) from error


def upload(args: Namespace) -> str:
    """Upload the output folder without its checkpoints and logs; returns the address."""
    name = create_repository(args)
    ignored = ["checkpoint-*", ".*", f"{args.logging_dir}/*"]
    found = upload_folder(repo_id=name, folder_path=args.output_dir, token=args.hub_token, ignore_patterns=ignored)
    return str(found.commit_url)
