"""The upload to the Hub, in one commit that is read back."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import huggingface_hub as hf
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash

from tbpo_cli import console
from tbpo_cli.config.recipe import Recipe
from tbpo_cli.errors import TbpoError
from tbpo_cli.hub.card import is_whole
from tbpo_cli.hub.client import TOKEN, look_up, with_retries

Files = dict[str, Path | bytes]  # path in the repository → content, or the file that has it


def check_token() -> None:
    """Raises TbpoError if this machine has no token for the Hub."""
    if hf.get_token() is None:
        raise TbpoError("there is no token for the Hub", *TOKEN)


@with_retries
def check_repository(repo: str, recipe: Recipe) -> None:
    """Asks the Hub whether this token may publish the recipe's weights there; changes nothing.

    Raises:
        TbpoError: if there is no token, it may not write there, or the repository is of another
            kind.
    """
    api = hf.HfApi()
    private = recipe.push.private
    check_token()
    owner = api.whoami()
    if owner.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise TbpoError("the token may only read", *TOKEN)
    if api.repo_exists(repo):
        api.auth_check(repo, write=True)
        other = "config.json"
        kind = "a whole model"
        if is_whole(recipe):
            other = "adapter_config.json"
            kind = "an adapter"
        faults = {
            f"holds {kind}": other in look_up(repo)[1],
            "is public": private and not api.model_info(repo).private,
        }
    else:
        _check_namespace(repo, owner)
        kinds = ("dataset", "space")
        faults = {f"is a {kind}": api.repo_exists(repo, repo_type=kind) for kind in kinds}
    if fault := next((what for what, holds in faults.items() if holds), None):
        expected = "model repository with the same kind of weights, or none"
        raise TbpoError(
            f"the repository {fault}",
            f"push.repo = {repo!r}",
            f"a {'private ' if private else ''}{expected}",
            "give it another name",
        )


def _check_namespace(repo: str, owner: dict[str, Any]) -> None:
    """Raises TbpoError if a new repository is neither the user's nor of one of their groups."""
    names = [owner["name"], *(group["name"] for group in owner.get("orgs", ()))]
    if repo.partition("/")[0] not in names:
        raise TbpoError(
            f"no repository can be made there with the token of {owner['name']}",
            f"push.repo = {repo!r}",
            f"{TOKEN[1]}: one of {', '.join(f'{name}/…' for name in names)}",
            f"--set push.repo={names[0]}/{repo.partition('/')[2]}, or {TOKEN[2]}",
        )


@with_retries
def open_repository(repo: str, recipe: Recipe, card: str) -> str:
    """Makes the repository if there is none; returns its newest commit.

    Raises:
        TbpoError: if token, repository and card do not go together.
    """
    check_repository(repo, recipe)
    hf.ModelCard(card).validate()
    hf.HfApi().create_repo(repo, private=recipe.push.private, exist_ok=True)
    return look_up(repo)[0]


@with_retries
def publish(repo: str, message: str, files: Files, old: Collection[str]) -> dict[str, Any]:
    """Uploads what the repository does not have yet, in one commit, and compares it afterwards.

    Args:
        old: paths that an earlier push put there; those that are not among `files` are removed.

    Returns:
        The receipt: repo, url, commit and the files' hashes.

    Raises:
        TbpoError: if the Hub has other content than was sent.
    """
    api = hf.HfApi()
    _, there = look_up(repo)
    additions = [hf.CommitOperationAdd(path, source) for path, source in files.items()]
    changes: list[Any] = [
        hf.CommitOperationDelete(path) for path in old if path in there and path not in files
    ]
    changes += [addition for addition in additions if not _is_at(addition, there)]
    if changes:
        console.say(f"sending {len(changes)} changes to {repo} …")
        api.create_commit(repo, changes, commit_message=message)
    commit, there = look_up(repo)
    if wrong := [addition.path_in_repo for addition in additions if not _is_at(addition, there)]:
        raise TbpoError(
            "the Hub has other content than was sent",
            f"{repo}: {', '.join(wrong)}",
            "the same hashes",
            "push again",
        )
    hashes = {addition.path_in_repo: addition.upload_info.sha256.hex() for addition in additions}
    return {"repo": repo, "url": f"{api.endpoint}/{repo}", "commit": commit, "sha256": hashes}


def _is_at(addition: hf.CommitOperationAdd, there: dict[str, RepoFile]) -> bool:
    """Whether the Hub has this content, by its hash: SHA-256 of large files, else git's."""
    remote = there.get(addition.path_in_repo)
    if remote is None or remote.size != addition.upload_info.size:
        return False
    if remote.lfs is not None:
        return remote.lfs.sha256 == addition.upload_info.sha256.hex()
    with addition.as_file() as opened:
        return remote.blob_id == git_hash(opened.read())
