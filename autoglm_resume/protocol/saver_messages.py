"""Messages between a saver and whoever asks it: JSON, one a packet, and a descriptor at times."""

from __future__ import annotations

import array
import contextlib
import fcntl
import json
import socket
import struct
import termios
from typing import Any, TypeAlias

Message: TypeAlias = "dict[str, Any]"
_FD = array.array("i")


class Closed(Exception):
    """The other side is gone."""


def address(name: str) -> str:
    """Of a saver's listening socket: in the abstract namespace, so that no file is left."""
    return f"\0{name}"


def send(
    link: socket.socket, message: Message, fd: int | None = None, *, wait: bool = True
) -> None:
    """Raises Closed, and BlockingIOError if it should not `wait` and had to."""
    flags = 0 if wait else socket.MSG_DONTWAIT
    try:
        socket.send_fds(link, [json.dumps(message).encode()], [] if fd is None else [fd], flags)
    except (BrokenPipeError, ConnectionResetError):
        raise Closed from None


def receive(link: socket.socket, *, wait: bool) -> tuple[Message, int | None] | None:
    """The next message and the descriptor that came with it; None if there is none yet.

    Raises Closed.
    """
    # Not socket.recv_fds: until Python 3.12 it ignores its flags.
    flags = socket.MSG_CMSG_CLOEXEC | (0 if wait else socket.MSG_DONTWAIT)
    try:
        with contextlib.suppress(ConnectionResetError):
            # Said once, if the other side died before it read everything; what it sent comes then.
            link.recv(1, socket.MSG_PEEK | flags)
        link.recv(1, socket.MSG_PEEK | flags)
        (size,) = struct.unpack("i", fcntl.ioctl(link, termios.FIONREAD, bytes(4)))
        data, extra, _, _ = link.recvmsg(max(size, 1), socket.CMSG_LEN(_FD.itemsize), flags)
    except BlockingIOError:
        return None
    except ConnectionResetError:
        raise Closed from None
    if not data:
        raise Closed
    fds = array.array("i", b"".join(content for _, _, content in extra))
    return json.loads(data), fds[0] if fds else None
