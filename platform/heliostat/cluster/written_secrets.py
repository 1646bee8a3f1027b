"""Finds secrets that are written into a cluster file: keys, tokens, passwords in commands, options and environment variables."""

from __future__ import annotations

import re
from collections.abc import Iterator

from heliostat.cluster.cluster_file import ClusterFile

WORDS = r"[A-Z0-9_]*(?:SECRET|PASSWORD|PASSWD|PASSPHRASE|ACCESS_KEY|API_KEY|APIKEY|AUTH_TOKEN|TOKEN)(?:_[A-Z0-9_]*)?"
VALUE = r"['\"]?[^\s'\"$<{#]{8,}"  # neither a variable nor a placeholder
PATTERNS = {
    "an AWS access key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a private key": r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----",
    "a Google API key": r"\bAIza[0-9A-Za-z_-]{35}\b",
    "a GitHub or Hugging Face token": r"\b(?:gh[pousr]_[0-9A-Za-z]{36,}|hf_[0-9A-Za-z]{30,})\b",
    "a password in a URL": r"\w+://[^\s/:@$]*:[^\s/@$]+@",
    # both take it as -pVALUE, too
    "a password for sshpass": r"\bsshpass\s+(?:-\w\s+\S+\s+)*-p\s*['\"]?[^\s'\"$-][^\s'\"]*",
    "a password for a registry": r"\blogin\b.*\s(?:-p\s*|--password[\s=]+)['\"]?[^\s'\"$<-]",
    "a bearer token": r"(?i)\bbearer\s+[^\s'\"$<{]{8,}",
    "credentials for a registry": r"\s--(?:src-|dest-)?creds[\s=]+['\"]?[^\s'\"$<-]",
    "a secret's value": rf"(?i)\b(?P<name>{WORDS})['\"]?\s*[=:]\s*(?P<value>{VALUE})",
}
SECRET_NAMES = re.compile(r"(?i)secret|password|passwd|token$|access_key|api_?key")
HARMLESS = re.compile(r"(?i)(?:_PATH|_FILE|_DIR|_MODE|_TTL|_URL|_TYPE|_NAME)$")  # say where a secret is, or how it is used


def faults(cluster: ClusterFile) -> Iterator[str]:
    """Reports every secret in the file, one line each, without repeating it."""
    text = cluster.path.read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), 1):
        code = "" if line.lstrip().startswith("#") else line.split(" #")[0]
        if what := found_in(code):
            yield f"line {number}: {what} is written in; give it by environment or as a Kubernetes secret"
    for document in (cluster.raw, *cluster.others):
        if document.get("kind") == "Secret" and (document.get("data") or document.get("stringData")):
            yield "a Secret with its values is in the file; make it with `kubectl create secret`"
        for name, value in _environment(document):
            if SECRET_NAMES.search(name) and value and not HARMLESS.search(name):
                yield f"env {name}: its value is written in; use valueFrom.secretKeyRef"


def found_in(line: str) -> str | None:
    """Detects a secret in a line and returns its kind, or None."""
    for what, pattern in PATTERNS.items():
        for match in re.finditer(pattern, line):
            named = match.groupdict().get("name")
            if named is None or not (HARMLESS.search(named) or _refers(match["value"])):
                return what
    return None


def _refers(value: str) -> bool:
    """Checks whether the value is the path of a file that holds a secret, not the secret itself."""
    return value.lstrip("'\"").startswith(("/", "~", "./"))


def _environment(node: object) -> Iterator[tuple[str, str]]:
    """Yields (name, literal value) of every container's environment variables."""
    if isinstance(node, dict):
        for entry in node["env"] if isinstance(node.get("env"), list) else []:
            if isinstance(entry, dict) and isinstance(entry.get("value"), str):
                yield str(entry.get("name")), entry["value"]
        for value in node.values():
            yield from _environment(value)
    elif isinstance(node, list):
        for value in node:
            yield from _environment(value)
