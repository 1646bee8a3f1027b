"""Protects the user from other users of the machine: makes private folders and token files, and checks who owns a server."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import stat
import urllib.parse
from pathlib import Path

import psutil

from heliostat.errors import ConfigError

log = logging.getLogger(__name__)

WILDCARDS = ("0.0.0.0", "::")


def folder(path: Path) -> Path:
    """Makes a folder that only this user may enter. If this user already has the folder, closes it to other users.

    Raises ConfigError if the path is a link, a file, or another user's folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        status = path.lstat()  # follows no link, because the link's owner could choose any target
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise ConfigError(f"{path}: isn't a folder of this user. Remove this path, or set TMPDIR to another folder") from None
        path.chmod(0o700)
    return path


def write_token(path: Path, token: str | None = None) -> str:
    """Writes a token to a new file that only this user can read from the start, and returns the token.

    `token`: None for a new random token of 64 hex digits.
    """
    token = secrets.token_hex(32) if token is None else token
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(token)
    return token


def tighten(path: Path) -> None:
    """Removes other users' permissions from a file of this user, with a warning.

    Ray leaves ~/.ray/auth_token readable by all users.
    """
    try:
        status = path.stat()
    except OSError:
        return
    if status.st_uid == os.getuid() and status.st_mode & 0o077:
        path.chmod(status.st_mode & 0o700)
        log.warning(
            ("other users of this machine could read %s until now. If there are other users, make a new token: "
                "`rm %s`, then `ray get-auth-token --generate`"), path, path,
        )  # fmt: skip


def ours(url: str) -> bool:
    """Checks whether all processes that listen at a URL's loopback address belong to this user.

    Returns False if no process listens there, or if the system hides one of the processes.
    """
    parts = urllib.parse.urlsplit(url)
    host = {"localhost": "127.0.0.1"}.get(parts.hostname or "", parts.hostname)
    try:
        pids = [pid for ip, pid in _listeners(parts.port) if ip.removeprefix("::ffff:") in (host, *WILDCARDS)]
        return bool(pids) and all(pid is not None and psutil.Process(pid).uids().effective == os.getuid() for pid in pids)
    except psutil.Error:
        return False


def _listeners(port: int | None) -> list[tuple[str, int | None]]:
    """Lists (address, process id) of the sockets that listen on a port. The process id is None if the system hides it."""
    try:
        connections = [(c, c.pid) for c in psutil.net_connections("tcp")]
    except psutil.AccessDenied:  # for example on macOS, which shows only the connections of this user's processes
        connections = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                connections += [(c, process.pid) for c in process.net_connections("tcp")]
    return [(c.laddr.ip, pid) for c, pid in connections if c.status == psutil.CONN_LISTEN and c.laddr.port == port]
