"""The Hub: the base as others find it, the model card, and the upload in one commit that is read back."""

from __future__ import annotations

import hashlib
import inspect
import re
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub as hf
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile

from tbpo_cli import console
from tbpo_cli.core.losses import LOSSES
from tbpo_cli.errors import TbpoError
from tbpo_cli.measures import MEASURES
from tbpo_cli.recipe import Recipe
from tbpo_cli.run import FREE_KEYS

WAITS = (1, 2, 4, 8, 16)  # seconds before each further attempt, or as long as the Hub says
PASSING = {408, 429, 500, 502, 503, 504}
TOKEN = ("HF_TOKEN", "a token that may write to the repository", "hf auth login, or export HF_TOKEN=… of such a token")
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
SECRETS = {
    "a token": r"\bhf_[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}",
    "an API key": r"\b(?:sk|pk|rk)-(?=[\w-]*\d)[\w-]{16,}|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
    "a password in an address": r"://[^/\s:@]+:[^/\s@]+@",
    "a secret": r"(?i)(?:(?:api|access)_?key|secret|token|passw(?:or)?d)[\"']?\s*[=:]\s*[\"']?(?!\d*\.)[^\s\"'$<{]{8,}",
}
Files = dict[str, Path | bytes]  # path in the repository → content, or the file that has it


@dataclass(frozen=True)
class Base:
    """The base as others find it: id and revision on the Hub, its licence files, and metadata of its licence."""

    id: str
    revision: str
    licence_files: tuple[Path, ...]
    licence: dict[str, Any]


def open_repository(recipe: Recipe, card: str) -> None:
    """Makes the repository if there is none. Raises TbpoError if token, repository and card do not go together."""
    api, repo, push, found = hf.HfApi(), recipe.push.repo, recipe.push, []
    assert repo is not None
    if hf.get_token() is None:
        raise TbpoError("there is no token for the Hub", *TOKEN)
    if _ask(api.whoami, repo).get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise TbpoError("the token may only read", *TOKEN)
    _ask(hf.ModelCard(card).validate, repo)
    if not _ask(lambda: api.repo_exists(repo), repo):
        kinds = ("dataset", "space")
        found = [f"is a {kind}" for kind in kinds if _ask(partial(api.repo_exists, repo, repo_type=kind), repo)]
    else:
        _ask(lambda: api.auth_check(repo, write=True), repo)
        other, what = ("adapter_config.json", "an adapter") if is_whole(recipe) else ("config.json", "a whole model")
        found += [f"holds {what}"] * (other in _ask(lambda: _files(api, repo), repo))
        found += ["is public"] * (push.private and not _ask(lambda: api.model_info(repo).private, repo))
    if found:
        expected = f"a {'private ' if push.private else ''}model repository with the same kind of weights, or none"
        raise TbpoError(f"the repository {found[0]}", f"push.repo = {repo!r}", expected, "give it another name")
    _ask(lambda: api.create_repo(repo, private=push.private, exist_ok=True), repo)


def published_base(recipe: Recipe, trained: dict[str, Any], online: bool) -> Base:
    """The base on the Hub, pinned to the commit that was `trained` on (align's manifest), as far as `online` allows.

    Raises:
        TbpoError: if the base is a folder and push.base_model names no repository with the same weights.
    """
    base, is_local, push = recipe.model.base, Path(recipe.model.base).is_absolute(), recipe.push
    if is_local and push.base_model is None:
        what, where = "the base is a folder of this machine, which nobody else can load", f"model.base = {base!r}"
        fix = f'publish it once (hf upload USER/NAME {base}), and add push.base_model = "USER/NAME"'
        raise TbpoError(what, where, "a repository on the Hub, which the adapter and its card can name", fix)
    name, _, revision = ((is_local and push.base_model) or base).partition("@")
    revision = revision or (not is_local and (trained.get("base_commit") or recipe.model.revision)) or "main"
    if online and not re.fullmatch("[0-9a-f]{40}", revision):
        revision = _ask(lambda: hf.HfApi().model_info(name, revision=revision).sha, name)
    weights = [Path(path) for path in trained["inputs"]["files"].get("model.base", ()) if path.endswith("safetensors")]
    there = _ask(lambda: _files(hf.HfApi(), name, revision), name) if online and weights else {}
    if online and (other := [path.name for path in weights if not _is_at(path.name, path, there)]):
        where, fix = f"{name}@{revision}: {', '.join(other)}", "name the repository[@revision] that holds them"
        raise TbpoError("push.base_model is another base than was trained on", where, "the same weights", fix)
    folder = Path(base)
    licence: dict[str, Any] = {"license": push.license}
    with suppress(OSError, ValueError):  # offline, and not in the cache
        patterns = ["README.md", *LICENCES]
        folder = Path(
            hf.snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=not online)
        )
    with suppress(Exception):  # a card that is not there, or broken, says nothing
        licence = licence if push.license else hf.metadata_load(folder / "README.md") or {}
    licence = {key: licence[key] for key in ("license", "license_name", "license_link") if licence.get(key)}
    return Base(name, revision, tuple(path for pattern in LICENCES for path in folder.glob(pattern)), licence)


def is_whole(recipe: Recipe) -> bool:
    """Whether whole weights are published, not an adapter."""
    return recipe.push.merge or recipe.model.lora is None


def render_card(recipe: Recipe, base: Base, results: dict[str, Any] | None, manifests: dict[str, Any]) -> str:
    """The model card: metadata that is always made here, and the text of push.card or of templates/card.md.

    Raises:
        TbpoError: if the template cannot be rendered.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError

    whole, loss, repo = is_whole(recipe), recipe.align.loss["name"], recipe.push.repo or "USER/NAME"
    index: dict[str, Any] = {}
    if results:
        index = {"model_name": repo.partition("/")[2], "eval_results": _index(recipe, results)}
    data = hf.ModelCardData(
        library_name="transformers" if whole else "peft",
        base_model=base.id,
        base_model_relation="finetune" if whole else "adapter",
        datasets=[source.path for source in recipe.data.train if not Path(source.path).is_absolute()] or None,
        tags=["tbpo", "preference-optimization", loss, *([] if whole else ["lora"])],
        pipeline_tag="text-generation",
        **base.licence,
        **index,
    )
    source = inspect.getdoc(LOSSES[loss]) or ""
    template = Path(recipe.push.card or Path(__file__).parent / "templates" / "card.md")
    environment = Environment(
        loader=FileSystemLoader(template.parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    try:
        text = environment.get_template(template.name).render(
            recipe=recipe, repo=repo, base=base, whole=whole, results=results, manifests=manifests, name_of=_name_of,
            measures=MEASURES,
            settings={key: value for key, value in recipe.settings().items() if key not in FREE_KEYS},
            meaning=source.partition("\n\n")[0].partition(" Source:")[0],
            paper=re.findall(r"arXiv ([\d.]+\d)", source)[0],
        )  # fmt: skip
    except (TemplateError, OSError, UnicodeDecodeError) as error:
        what, where = f"the card cannot be made: {error}", f"{template}, line {getattr(error, 'lineno', '?')}"
        raise TbpoError(what, where, "a Jinja template with the names of templates/card.md", "mend it") from None
    return f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n"


def _index(recipe: Recipe, results: dict[str, Any]) -> list[hf.EvalResult]:
    """What goes into the card's model-index."""
    policy = results["models"]["policy"]
    figures = {("accuracy", "reward accuracy"): policy["preference"]["all"].get("accuracy")}
    for rate in (rate for rate in results["win_rates"] if rate["model"] == "policy"):
        figures["win_rate", f"win rate against {rate['against']} by {rate['judge']}"] = rate["raw"]
    for suite, tasks in policy.get("suites", {}).items():
        figures |= {(task, f"{suite}: {task}"): figure for task, figure in tasks.items()}
    name_of = _name_of((recipe.data.eval or recipe.data.train)[0].path)
    return [
        hf.EvalResult("text-generation", name_of, name_of, kind, figure["value"], metric_name=name)
        for (kind, name), figure in figures.items()
        if figure is not None
    ]


def _name_of(path: str) -> str:
    """A source as the card names it: the file of a local one, whose folder is nobody's business; or the id."""
    return Path(path).name if Path(path).is_absolute() else path


def check_no_secret(texts: dict[str, str]) -> None:
    """Raises TbpoError with the places, never the content, of what looks like a secret in texts, by file name."""
    places = [
        f"{name}, line {number}: {kind}"
        for name, text in texts.items()
        for number, line in enumerate(text.splitlines(), 1)
        for kind, pattern in SECRETS.items()
        if re.search(pattern, line)
    ]
    if places:
        fix = "take it out of the recipe or the card's template, and revoke it if others may have seen it"
        raise TbpoError("what would be published holds a secret", "; ".join(places), "texts for everyone", fix)


def publish(recipe: Recipe, files: Files, old: Collection[str]) -> tuple[dict[str, Any], bool]:
    """Uploads what the repository does not have yet, in one commit, and compares what is there afterwards.

    What an earlier push put there (`old` paths) and is not among the files is removed.

    Returns:
        The receipt: repo, url, commit and the files' hashes; and whether the commit is a new one.

    Raises:
        TbpoError: if the Hub cannot be reached, refuses, or has other content than was sent.
    """
    api, repo, is_new = hf.HfApi(), recipe.push.repo, False
    assert repo is not None

    def commit() -> None:  # compares anew at each attempt: an answer that was lost makes no second commit
        nonlocal is_new
        there = _files(api, repo)
        missing = [path for path in files if not _is_at(path, files[path], there)]
        changes: list[Any] = [hf.CommitOperationDelete(path) for path in old if path in there and path not in files]
        with console.progress("uploading", len(missing)) as update:
            for number, path in enumerate(missing):
                update(number, path)
                changes.append(hf.CommitOperationAdd(path, files[path]))
                api.preupload_lfs_files(repo, changes[-1:])  # of large files, what the Hub has is not sent again
        if changes:
            is_new = True
            api.create_commit(repo, changes, commit_message=f"{recipe.run.name}, by tbpo")

    _ask(commit, repo)
    head = _ask(lambda: api.model_info(repo).sha, repo)
    there = _ask(lambda: _files(api, repo, head), repo)
    if wrong := [path for path in files if not _is_at(path, files[path], there)]:
        where = f"{repo}: {', '.join(wrong)}"
        raise TbpoError("the Hub has other content than was sent", where, "the same hashes", "push again")
    hashes = {path: hf.CommitOperationAdd(path, source).upload_info.sha256.hex() for path, source in files.items()}
    return {"repo": repo, "url": f"{api.endpoint}/{repo}", "commit": head, "sha256": hashes}, is_new


def _files(api: hf.HfApi, repo: str, revision: str | None = None) -> dict[str, RepoFile]:
    entries = api.list_repo_tree(repo, recursive=True, revision=revision)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _is_at(path: str, source: Path | bytes, there: dict[str, RepoFile]) -> bool:
    """Whether the Hub has this content, by the hash that it keeps: SHA-256 of large files, git's of the others."""
    file, remote = hf.CommitOperationAdd(path, source), there.get(path)
    if remote is None or remote.size != file.upload_info.size:
        return False
    if remote.lfs is not None:
        return remote.lfs.sha256 == file.upload_info.sha256.hex()
    with file.as_file() as opened:
        return remote.blob_id == hashlib.sha1(b"blob %d\0" % remote.size + opened.read()).hexdigest()


def _ask(call: Callable[[], Any], repo: str) -> Any:
    """What the call to the Hub returns; it is repeated while the Hub is busy or cut off. Raises TbpoError otherwise."""
    for wait in (*WAITS, None):
        try:
            return call()
        except Exception as error:
            # A large file's fault is the cause of a RuntimeError; TransportError is httpx's, or httpx2's.
            cause = error.__cause__ or error if type(error) is RuntimeError else error
            response = getattr(cause, "response", None)
            status = getattr(response, "status_code", None)
            is_cut = any(kind.__name__ == "TransportError" for kind in type(cause).__mro__)
            if not is_cut and status not in PASSING:
                if not isinstance(cause, HfHubHTTPError | ValueError | ConnectionError):
                    raise
                what, fix = (
                    f"the Hub refuses: {' '.join(str(cause).split())}",
                    ("", "mend what it says, and push again"),
                )
                raise TbpoError(what, repo, *(TOKEN[1:] if status in (401, 403) else fix)) from error
            what = f"the Hub answers {status}" if status else f"the connection is cut ({type(cause).__name__})"
            if wait is None:
                raise TbpoError(what, repo, "a Hub that answers", "the same command goes on from there") from error
        after = "" if response is None else response.headers.get("Retry-After", "")
        wait = max(wait, int(after) if after.isdigit() else 0)
        console.say(f"{what}; again in {wait} s")
        time.sleep(wait)
