"""What must not be published: keys, passwords, and where things are on this machine."""

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
# Forms that detect-secrets 1.5 does not know, and those of recipes and addresses.
PATTERNS = {
    "a token": r"\bhf_[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}",
    "an API key": r"\b(?:sk|pk|rk)-(?:(?=[\w-]*\d)[\w-]{16,}|[A-Za-z]{24,})"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bAIza[\w-]{30,}|\bxox[a-z]-[\w-]{10,}|\bnpm_\w{30,}"
    r"|\b(?:gsk|r8|tgp_v1|fw|lsv2_[a-z]{2}|dop_v1|wandb_v1)_\w{20,}|\bdapi[0-9a-f]{32}"
    r"|\b(?:xai|pplx|nvapi|GOCSPX|pa)-[\w-]{20,}|\bya29\.[\w-]{20,}",
    "a key of 40 digits": r"(?<![\w-])[0-9a-f]{40}(?![\w-])",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
    "a password in an address": r"://[^/\s\"'@]+@|://[^/\s\"':@]+:(?!\d+/)[^\s\"'@]+@[\w.-]+",
    "a key in an address": r"(?i)[?&](?:[\w-]*(?:key|token|secret)|sig|signature|auth)="
    r"[^\s&\"']{8,}",
    "a bearer token": r"(?i)\bbearer\s+[\w.~+/-]{12,}",
    "a secret": r"(?i)(?:(?:api|access)[-_]?key|secret|token|passw(?:or)?d|authorization)[\"']?"
    r"\s*[=:]\s*[\"']?(?!\d*\.)[^\s\"'$<{]{8,}",
}


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
    """The text with only the names of quoted paths, and of what lies in one of the folders."""
    text = re.sub(r'"(python:)?/(?:[^"\n]*/)?([^"/\n]+)"', r'"\1\2"', text)
    for folder in sorted(map(str, folders), key=len, reverse=True):
        for shown in (folder, escaped(folder)):
            text = text.replace(f"{shown}/", "")
    return text
