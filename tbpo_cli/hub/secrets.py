"""What must not be published: keys, passwords, and paths of this machine."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class

from tbpo_cli.errors import TbpoError
from tbpo_cli.hub.markdown import escaped

# detect-secrets knows the forms of some twenty services. Its detectors of random text see a secret
# in every name, its keyword detector reads program text only, and its addresses are wider here.
LEFT_OUT = {
    "Base64 High Entropy String",
    "Hex High Entropy String",
    "Secret Keyword",
    "Public IP (ipv4)",
    "Basic Auth Credentials",
}
QUERY, NAME, VALUE = r"(?:[?&#;]|%3F|%26|\\u0026)", r"[\w.-]", r"(?:=|%3D)[^\s&\"'<{$]"
# Forms that detect-secrets 1.5 does not know, and those of recipes and addresses.
PATTERNS = {
    "a token": r"\bhf_[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}",
    "an API key": r"\b(?:sk|pk|rk)-(?:(?=[\w-]*\d)[\w-]{16,}|[A-Za-z]{24,})"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bAIza[\w-]{30,}|\bxox[a-z]-[\w-]{10,}|\bnpm_\w{30,}"
    r"|\b(?:gsk|r8|tgp_v1|fw|lsv2_[a-z]{2}|dop_v1|wandb_v1)_\w{20,}|\bdapi[0-9a-f]{32}"
    r"|\b(?:xai|pplx|nvapi|GOCSPX|pa|PMAK)-[\w-]{20,}|\b(?:ya29|hvs|hvb)\.[\w-]{20,}"
    r"|\b(?:dckr_pat|shpat|shpss|lin_api|rubygems|sbp|sb_secret|figd|ntn|glsa)[-_][\w-]{20,}"
    r"|\bAGE-SECRET-KEY-1[0-9A-Z]{20,}|\bkey-[0-9a-f]{32}\b",
    "a key of 40 digits": r"(?<![\w-])[0-9a-f]{40}(?![\w-])",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
    "a password in an address": r"://[^/\s\"'@]+@|://[^/\s\"':@]+:(?!\d+/)[^\s\"'@]+@[\w.-]+",
    "a key in an address": rf"(?i){QUERY}(?:"
    rf"(?:{NAME}*(?:key|token|secret|signature|credential)s?|sig|sign|auth|authorization|jwt|sas|hmac)"
    rf"{VALUE}{{8,}}"
    rf"|(?:{NAME}*(?:password|passwd|passphrase)|pass|pwd|pw|creds?){VALUE}{{3,}}"
    rf"|(?:code|state|ticket|{NAME}*session(?:[-_]?id)?|sid){VALUE}{{16,}})",
    "a webhook's address": r"(?i)/(?:api/)?webhooks?b?\d*/(?:[\w.@-]+/)*[\w.@-]{16,}"
    r"|hooks\.[\w.-]+/(?:[\w-]+/)+[\w-]{12,}",
    "a bearer token": r"(?i)\bbearer\s+[\w.~+/-]{12,}",
    "a header that says who asks": r"(?i)\b(?:authorization|proxy-authorization|x-auth[\w-]*)"
    r"[\"']?\s*[:=]\s*[\"']?(?:[a-z][\w-]{2,}\s+)?(?:\w+=)?[\"']?[^\s\"'$<{]{8,}"
    r"|\bbasic\s+[a-z0-9+/]{8,}={1,2}|\b(?:set-)?cookie[\"']?\s*:\s*[\"']?[\w.-]+=[^\s;\"'$<{]{8,}"
    r"|\bcurl\b.*\s(?:-u|--user)[\s=]*[\"']?[^\s:\"'$<{]+:[^\s\"'$<{]{3,}",
    "a secret": r"(?i)(?:(?:api|access|account|private|subscription|signing)[-_]?key|secret|token"
    r"|passw(?:or)?d|passphrase|\bpwd|authorization)[\"']?"
    r"\s*[=:]\s*[\"']?(?!\d*\.)[^\s\"'$<{]{8,}",
}

# Where things are on a machine. Quoted: all that begins as the path of a file does.
BEGINNING = (
    r"file(?::|&#58;)/{1,3}|~(?:[A-Za-z_][\w.-]*)?/|(?:\.\.[\\/])+"
    r"|[A-Za-z]:(?:\\{1,2}|/)(?=[\w. ]{2,}[\\/])"
)
QUOTED = re.compile(rf"""(["'`])(python:)?(?:{BEGINNING}|\\\\+|/)(?:(?!\1)[^\n])*\1""")
# Without quotes only what is surely a path: its first folder exists here, or on many machines.
UNQUOTED = re.compile(rf"""(?<![\w.~:/\\;-])(?:{BEGINNING}|/(?=[\w.-]+/))[^\s"'`<>|()\[\],]*""")
FOLDERS = {"home", "Users", "root", "mnt", "data", "scratch", "workspace", "Volumes", "nfs", "fsx"}


def check_no_secret(texts: dict[str, str], known: Collection[str] = ()) -> None:
    """Refuses texts, by file name, that hold what looks like a secret.

    Args:
        known: values that look like one and are public: commits of repositories.

    Raises:
        TbpoError: with the places, never the content.
    """
    detectors: dict[str, Any] = get_mapping_from_secret_type_to_class()
    services = {name: detectors[name]() for name in detectors.keys() - LEFT_OUT}
    places = []
    for name, text in texts.items():
        for value in known:
            text = text.replace(value, "")
        for number, line in enumerate(text.splitlines(), 1):
            kinds = [kind for kind, pattern in PATTERNS.items() if re.search(pattern, line)]
            kinds += [kind for kind, each in services.items() if any(each.analyze_string(line))]
            places += [f"{name}, line {number}: {kind}" for kind in kinds]
    if places:
        raise TbpoError(
            "what would be published holds a secret",
            "; ".join(places),
            "texts for everyone",
            "take it out of the recipe or the card's template, and revoke it if others may have "
            "seen it",
        )


def without_folders(text: str, folders: Collection[Path]) -> str:
    """The text with only the names of paths, and of what lies in one of the folders."""
    text = QUOTED.sub(
        lambda found: f"{found[1]}{found[2] or ''}{_name(found[0][1:-1])}{found[1]}", text
    )
    for folder in sorted(map(str, folders), key=len, reverse=True):
        for shown in (folder, escaped(folder)):
            text = text.replace(f"{shown}/", "")
            text = re.sub(rf"{re.escape(shown)}(?![\w.-])", Path(folder).name, text)
    return UNQUOTED.sub(_named, text)


def _named(found: re.Match[str]) -> str:
    path = found[0]
    first = path.lstrip("/").partition("/")[0]
    is_ours = not path.startswith("/") or first in FOLDERS or Path(f"/{first}").is_dir()
    return _name(path) if is_ours else path


def _name(path: str) -> str:
    """The last part of a path; if it has none, the path."""
    parts = [part for part in re.split(r"/+|\\{1,2}(?=[\w. -])", path) if part.strip("/\\ ")]
    return parts[-1].rstrip("/\\") if parts and parts[-1] not in ("~", "..") else path
