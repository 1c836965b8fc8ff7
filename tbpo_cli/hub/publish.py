"""The Hub: the base as others find it, the model card, and the upload in one commit that is read back."""

from __future__ import annotations

import functools
import inspect
import re
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import huggingface_hub as hf
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash
from jinja2 import StrictUndefined, Template, TemplateError

from tbpo_cli import console
from tbpo_cli.config.recipe import Recipe
from tbpo_cli.core.losses import LOSSES
from tbpo_cli.errors import TbpoError
from tbpo_cli.evaluation.judges.endpoint import retry_after
from tbpo_cli.evaluation.measures import MEASURES
from tbpo_cli.runs.run_dir import FREE_KEYS

WAITS = (1, 2, 4, 8, 16)  # seconds before each further attempt, or as long as the Hub says
PASSING = {408, 429, 500, 502, 503, 504}
TOKEN = (
    "HF_TOKEN",
    "a token that may write to the repository",
    "hf auth login, or export HF_TOKEN=… of such a token",
)
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
SECRETS = {
    "a token": r"\bhf_[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}",
    "an API key": r"\b(?:sk|pk|rk)-(?=[\w-]*\d)[\w-]{16,}|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
    "a password in an address": r"://[^/\s:@]+:[^/\s@]+@",
    "a secret": r"(?i)(?:(?:api|access)_?key|secret|token|passw(?:or)?d)[\"']?\s*[=:]\s*[\"']?(?!\d*\.)[^\s\"'$<{]{8,}",
}
Ask = TypeVar("Ask", bound=Callable[..., Any])
Files = dict[str, Path | bytes]  # path in the repository → content, or the file that has it


@dataclass(frozen=True)
class Base:
    """The base as others find it: id and revision on the Hub, its licence files, and metadata of its licence."""

    id: str
    revision: str
    licence_files: tuple[Path, ...]
    licence: dict[str, Any]


def patient(ask: Ask) -> Ask:
    """Makes a function that asks the Hub about a repository, its first argument, patient: it asks again while the Hub
    is busy or cut off, as few calls of the client do, and raises TbpoError if the Hub refuses or never answers.

    An answer may be lost, so what is asked must do no harm twice.
    """

    @functools.wraps(ask)
    def insist(repo: str, *arguments: Any) -> Any:
        for planned in (*WAITS, None):
            try:
                return ask(repo, *arguments)
            except Exception as error:
                # A large file's fault is the cause of a RuntimeError; TransportError is httpx's, or httpx2's.
                fault = error.__cause__ or error if type(error) is RuntimeError else error
                response = getattr(fault, "response", None)
                status = getattr(response, "status_code", None)
                is_cut = any(kind.__name__ == "TransportError" for kind in type(fault).__mro__)
                if not is_cut and status not in PASSING:
                    if not isinstance(fault, HfHubHTTPError | ValueError | ConnectionError):
                        raise
                    asked = ("a request that it takes", "mend what it says, and push again")
                    expected, fix = TOKEN[1:] if status in (401, 403) else asked
                    raise TbpoError(
                        f"the Hub refuses: {' '.join(str(fault).split())}", repo, expected, fix
                    ) from error
                what = (
                    f"the Hub answers {status}"
                    if status
                    else f"the connection is cut ({type(fault).__name__})"
                )
                if planned is None:
                    raise TbpoError(
                        what, repo, "a Hub that answers", "the same command goes on from there"
                    ) from error
            told = "" if response is None else response.headers.get("Retry-After", "")
            wait = max(planned, retry_after(told) or 0)
            console.say(f"{what}; again in {wait:g} s")
            time.sleep(wait)

    return cast(Ask, insist)


@patient
def look_up(repo: str, revision: str | None = None) -> tuple[str, dict[str, RepoFile]]:
    """The commit that a revision is, by default the newest one, and its files by their paths."""
    api = hf.HfApi()
    commit = api.model_info(repo, revision=revision).sha or ""
    entries = api.list_repo_tree(repo, recursive=True, revision=commit)
    return commit, {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


@patient
def open_repository(repo: str, recipe: Recipe, card: str) -> str:
    """Makes the repository if there is none; returns its newest commit.

    Raises TbpoError if token, repository and card do not go together.
    """
    api, private = hf.HfApi(), recipe.push.private
    if hf.get_token() is None:
        raise TbpoError("there is no token for the Hub", *TOKEN)
    if api.whoami().get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise TbpoError("the token may only read", *TOKEN)
    hf.ModelCard(card).validate()
    if api.repo_exists(repo):
        api.auth_check(repo, write=True)
        other, kind = (
            ("adapter_config.json", "an adapter")
            if is_whole(recipe)
            else ("config.json", "a whole model")
        )
        is_public = private and not api.model_info(repo).private
        faults = {f"holds {kind}": other in look_up(repo)[1], "is public": is_public}
    else:
        faults = {
            f"is a {kind}": api.repo_exists(repo, repo_type=kind) for kind in ("dataset", "space")
        }
    if fault := next((what for what, holds in faults.items() if holds), None):
        expected = f"a {'private ' if private else ''}model repository with the same kind of weights, or none"
        raise TbpoError(
            f"the repository {fault}", f"push.repo = {repo!r}", expected, "give it another name"
        )
    api.create_repo(repo, private=private, exist_ok=True)
    return look_up(repo)[0]


def published_base(recipe: Recipe, trained: dict[str, Any], online: bool) -> Base:
    """The base on the Hub, pinned to the commit that was `trained` on (align's manifest), as far as `online` allows.

    Raises TbpoError if the base is a folder and push.base_model names no repository with the same weights.
    """
    base, push = recipe.model.base, recipe.push
    if not Path(base).is_absolute():
        name, revision = base, trained.get("base_commit") or recipe.model.revision
    elif push.base_model:
        name, _, revision = push.base_model.partition("@")
    else:
        what, where = (
            "the base is a folder of this machine, which nobody else can load",
            f"model.base = {base!r}",
        )
        fix = f'publish it once (hf upload USER/NAME {base}), and add push.base_model = "USER/NAME"'
        raise TbpoError(
            what, where, "a repository on the Hub, which the adapter and its card can name", fix
        )
    revision = revision or "main"
    if online:
        revision, files = look_up(name, revision)
        published = {file.lfs.sha256 for file in files.values() if file.lfs is not None}
        weights = trained["inputs"]["files"].get("model.base", {}).items()
        weights = [
            (Path(path).name, file["sha256"])
            for path, file in weights
            if path.endswith("safetensors")
        ]
        if other := [path for path, digest in weights if digest not in published]:
            where, fix = (
                f"{name}@{revision}: {', '.join(other)}",
                "name the repository[@revision] that holds them",
            )
            raise TbpoError(
                "push.base_model is another base than was trained on",
                where,
                "the same weights",
                fix,
            )
    folder, wanted = base, ["README.md", *LICENCES]
    licence: dict[str, Any] = {"license": push.license}
    with suppress(OSError, ValueError):  # offline, and not in the cache
        folder = hf.snapshot_download(
            name, revision=revision, allow_patterns=wanted, local_files_only=not online
        )
    with suppress(Exception):  # a card that is not there, or broken, says nothing
        licence = licence if push.license else hf.metadata_load(Path(folder) / "README.md") or {}
    licence = {
        key: licence[key] for key in ("license", "license_name", "license_link") if licence.get(key)
    }
    return Base(
        name,
        revision,
        tuple(path for each in LICENCES for path in Path(folder).glob(each)),
        licence,
    )


def is_whole(recipe: Recipe) -> bool:
    """Whether whole weights are published, not an adapter."""
    return recipe.push.merge or recipe.model.lora is None


def render_card(
    recipe: Recipe, base: Base, results: dict[str, Any] | None, manifests: dict[str, Any]
) -> str:
    """The model card: metadata that is always made here, and the text of push.card or of templates/card.md.

    Raises TbpoError if the template cannot be rendered.
    """
    whole, loss, repo = is_whole(recipe), recipe.align.loss_name, recipe.push.repo or "USER/NAME"
    data = hf.ModelCardData(
        library_name="transformers" if whole else "peft",
        base_model=base.id,
        base_model_relation="finetune" if whole else "adapter",
        datasets=[
            source.path for source in recipe.data.train if not Path(source.path).is_absolute()
        ]
        or None,
        tags=["tbpo", "preference-optimization", loss, *([] if whole else ["lora"])],
        pipeline_tag="text-generation",
        **base.licence,
        **(_index(recipe, repo, results) if results else {}),
    )
    source = inspect.getdoc(LOSSES[loss]) or ""
    paper = re.search(r"arXiv ([\d.]+\d)", source)
    path = Path(recipe.push.card or Path(__file__).parent / "templates" / "card.md")
    try:
        template = Template(
            path.read_text("utf-8"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        text = template.render(
            recipe=recipe, repo=repo, base=base, whole=whole, results=results, manifests=manifests, name_of=_name_of,
            measures=MEASURES,
            settings={key: value for key, value in recipe.settings().items() if key not in FREE_KEYS},
            meaning=source.partition("\n\n")[0].partition(" Source:")[0],
            paper=paper and paper[1],
        )  # fmt: skip
    except (TemplateError, OSError, UnicodeDecodeError) as error:
        what, where = (
            f"the card cannot be made: {error}",
            f"{path}, line {getattr(error, 'lineno', '?')}",
        )
        raise TbpoError(
            what, where, "a Jinja template with the names of templates/card.md", "mend it"
        ) from None
    return f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n"


def _index(recipe: Recipe, repo: str, results: dict[str, Any]) -> dict[str, Any]:
    """What the card's model-index is made of."""
    policy = results["models"]["policy"]
    figures = {("accuracy", "reward accuracy"): policy["preference"]["all"].get("accuracy")}
    for rate in (rate for rate in results["win_rates"] if rate["model"] == "policy"):
        figures["win_rate", f"win rate against {rate['against']} by {rate['judge']}"] = rate["raw"]
    for suite, tasks in policy.get("suites", {}).items():
        figures |= {(task, f"{suite}: {task}"): figure for task, figure in tasks.items()}
    name_of = _name_of((recipe.data.eval or recipe.data.train)[0].path)
    evaluated = [
        hf.EvalResult("text-generation", name_of, name_of, kind, figure["value"], metric_name=name)
        for (kind, name), figure in figures.items()
        if figure is not None
    ]
    return {"model_name": repo.partition("/")[2], "eval_results": evaluated}


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
        raise TbpoError(
            "what would be published holds a secret", "; ".join(places), "texts for everyone", fix
        )


@patient
def publish(repo: str, message: str, files: Files, old: Collection[str]) -> dict[str, Any]:
    """Uploads what the repository does not have yet, in one commit, and compares what is there afterwards.

    What an earlier push put there (`old` paths) and is not among the files is removed. Returns the receipt: repo, url,
    commit and the files' hashes. Raises TbpoError if the Hub has other content than was sent.
    """
    api, (_, there) = hf.HfApi(), look_up(repo)
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
        where = f"{repo}: {', '.join(wrong)}"
        raise TbpoError(
            "the Hub has other content than was sent", where, "the same hashes", "push again"
        )
    hashes = {addition.path_in_repo: addition.upload_info.sha256.hex() for addition in additions}
    return {"repo": repo, "url": f"{api.endpoint}/{repo}", "commit": commit, "sha256": hashes}


def _is_at(addition: hf.CommitOperationAdd, there: dict[str, RepoFile]) -> bool:
    """Whether the Hub has this content, by the hash that it keeps: SHA-256 of large files, git's of the others."""
    remote = there.get(addition.path_in_repo)
    if remote is None or remote.size != addition.upload_info.size:
        return False
    if remote.lfs is not None:
        return remote.lfs.sha256 == addition.upload_info.sha256.hex()
    with addition.as_file() as opened:
        return remote.blob_id == git_hash(opened.read())
