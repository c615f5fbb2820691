"""Every address that a Python process asks for, noted, and refused where that is wanted. Standard library only.

`finetune/__init__.py` calls `guard` where FINETUNE_EGRESS_LOG names a file (scripts/egress_check.sh sets it), so that
each process of ours has it before anything else is imported. A child process that fetches calls `watch`: so the record
can say which hosts the bytes came from. An audit hook (PEP 578) sees what Python does; what native code does, which
also looks up a name that is given to `connect` itself, only the system sees: the check has a namespace without routes
and strace for that.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any

VARIABLE = "FINETUNE_EGRESS_LOG"
"""Environment variable with the file that attempts are noted in. Children inherit it."""

_ADDRESSED = ("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg")
_NAMED = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo")
_LOCAL_FAMILIES = tuple(getattr(socket, name) for name in ("AF_UNIX", "AF_NETLINK", "AF_ALG") if hasattr(socket, name))


def guard(log: str) -> None:
    """From here on this process can speak to its own machine only; each other attempt is noted, and is an OSError."""
    _install(log, refuse=True)


def watch(log: str) -> None:
    """From here on every address outside this machine that this process asks for is noted; none is refused."""
    _install(log, refuse=False)


def attempts(log: Path) -> list[dict[str, Any]]:
    """What was noted: `event`, `address`, `process`, `program`, `when`. A line that was cut is passed over."""
    found = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def hosts(log: Path) -> list[str]:
    """Names of the hosts that were asked for, sorted; their addresses where nobody asked by name."""
    noted = attempts(log)
    named = {entry["address"] for entry in noted if entry["event"] in _NAMED}
    return sorted(named or {entry["address"] for entry in noted})


def outside(event: str, args: tuple[Any, ...]) -> str:
    """The address that an audit event asks for when it is not this machine's own, as text; else empty."""
    if event in _NAMED:
        # Of getnameinfo the first argument is a whole address, of the others a name.
        name = _text(args[0][0] if isinstance(args[0], tuple) else args[0])
        return "" if name is None or is_local(name) else name
    if event not in _ADDRESSED or args[0].family in _LOCAL_FAMILIES:
        return ""
    address = args[-1]
    if address is None:  # a message on a socket that is connected: it was looked at then
        return ""
    host, port = (address[0], address[1]) if isinstance(address, tuple) and len(address) > 1 else (address, "")
    return "" if is_local(_text(host), listening=event == "socket.bind") else f"{_text(host)}:{port}"


def is_local(host: str | None, *, listening: bool = False) -> bool:
    """Whether a name or an address is this machine alone. Listening on every interface is not."""
    if host is None or host in ("localhost", "localhost.localdomain", "ip6-localhost"):
        return True
    if host in ("", "0.0.0.0", "::"):  # to connect there is to connect to oneself
        return not listening
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def _text(host: Any) -> str | None:
    """A host as a text: names may be bytes, and those of some families are numbers."""
    if host is None:
        return None
    return bytes(host).decode("ascii", "replace") if isinstance(host, bytes | bytearray) else str(host)


def _install(log: str, refuse: bool) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    sys.addaudithook(_hook(handle, refuse))
    if refuse:
        _note(handle, "guarded", "")


def _hook(handle: int, refuse: bool) -> Callable[[str, tuple[Any, ...]], None]:
    def look(event: str, args: tuple[Any, ...]) -> None:
        if not event.startswith("socket."):
            return
        if address := outside(event, args):
            _note(handle, event, address)
            if refuse:
                raise PermissionError(f"{event} {address}: refused, nothing leaves this machine")

    return look


def _note(handle: int, event: str, address: str) -> None:
    """One line with one system call, so that lines of several processes do not mix."""
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    words = sys.orig_argv[1:4]
    entry = {"event": event, "address": address, "process": os.getpid(), "program": " ".join(words)[:200], "when": when}
    os.write(handle, json.dumps(entry).encode() + b"\n")
