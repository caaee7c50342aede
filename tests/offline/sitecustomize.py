"""Python runs this file at its start if its folder is in PYTHONPATH: every process that a test starts then reaches only
this machine. A name look-up or a packet to any other address fails, and is written to the file that CALLS names.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from typing import Any

CALLS = "OFFLINE_TEST_CALLS"
_LOOK_UPS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")
_PACKETS = ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getnameinfo")
_HERE = ("", "localhost", "::1", "::", "0.0.0.0")
_NOBODY = (".invalid", ".test", "example.com", "example.org")
"""Names that the tests use for servers that do not exist."""


def forbid(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook."""
    if event in _LOOK_UPS:
        host = arguments[0]
    elif event in _PACKETS:
        address = arguments[0] if event == "socket.getnameinfo" else arguments[-1]
        if not isinstance(address, tuple):  # a Unix socket, or a connected one
            return
        host = address[0]
    else:
        return
    name = host.decode("ascii", "replace") if isinstance(host, bytes) else str(host or "")
    if name in _HERE or name.startswith("127."):
        return
    if not name.endswith(_NOBODY):
        with open(_FILE, "a") as stream:
            stack = "".join(traceback.format_stack(limit=16))
            stream.write(f"{event} {name!r} by {sys.argv or sys.executable}\n{stack}\n")
    raise socket.gaierror(socket.EAI_NONAME, f"the tests reach no other machine: {name}")


_FILE = os.environ.get(CALLS, "")
if _FILE:
    sys.addaudithook(forbid)
