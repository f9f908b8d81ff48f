"""The connections that our port has accepted: how many an address has, and how one is ended.

gRPC's Python has no handle for a connection, and its core no limit by address. The sockets are
ours all the same: they are found among the process's open files. A filter on the listening one
has the kernel drop what opens a connection from an address that has enough; `shutdown` on a
duplicate of an accepted one makes gRPC read its end and let go of everything that it carried
([why so](../../docs/decisions/0021-connections-are-sockets-of-ours.md)).
A connection is named as gRPC names it (`context.peer()`). Those of a Unix socket have no address
and no names: they are counted in all, and none can be ended alone.
Does not know calls. Fails never: a connection that is gone is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import resource
import socket
import stat
import struct
import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence
from ipaddress import IPv6Address, ip_address
from urllib.parse import unquote

from sage_fed.core import Address, UnixSocket

_FILES = "/proc/self/fd"

_SO_ATTACH_FILTER = 26
_LOAD_BYTE, _LOAD_WORD, _AND, _JUMP_EQUAL, _RETURN = 0x30, 0x20, 0x54, 0x15, 0x06
_IP_HEADER = 0xFFF00000
"""Where a packet's IP header begins, to a program that is asked at its TCP header."""

_MAX_KEPT_OUT = 256
"""Addresses in one program: the kernel takes 4096 instructions, one of IPv6 has 12."""

_log = logging.getLogger(__name__)


class Connections:
    """The accepted connections of one listening socket.

    Args:
        max_per_address: how many one address may have. Further ones are not answered until it has
            fewer; those that came in before that was known are closed, the newest first.
    """

    def __init__(self, max_per_address: int) -> None:
        self._max_per_address = max_per_address
        self._lock = threading.Lock()
        self._listen: Address | UnixSocket | None = None
        self._foreign: set[tuple[int, int]] = set()
        self._listening: set[tuple[int, int]] = set()
        self._full: frozenset[str] = frozenset()
        self._filters = True
        self._known: dict[tuple[int, int], str] = {}

    def follow(self, listen: Address | UnixSocket) -> None:
        """Look at the connections that come to this address, which is bound by now."""
        self._listen = listen

    @property
    def num_open(self) -> int:
        """How many there were at the last look."""
        return len(self._known)

    @property
    def num_full(self) -> int:
        """How many addresses have as many as they may."""
        return len(self._full)

    def names(self) -> Iterable[str]:
        """Return the names of those that there were at the last look."""
        return tuple(self._known.values())

    def scan(self) -> Sequence[str]:
        """Look at the open sockets and close what an address has too many of; return those.

        May run in any thread.
        """
        with self._lock:
            self._look()
            of_host = self._of_host()
            self._keep_out(
                frozenset(h for h, pairs in of_host.items() if len(pairs) >= self._max_per_address)
            )
            surplus = [p for pairs in of_host.values() for p in pairs[self._max_per_address :]]
            return [name for file, name in surplus if self._shut(file, name)]

    def _look(self) -> None:
        files = _open_files()
        # In the order of their arrival, as far as it was seen: the newest go first.
        known = {file: name for file, name in self._known.items() if file in files}
        foreign = self._foreign & files
        for file in files - known.keys() - foreign:
            if (name := self._name_of(file)) is None:
                foreign.add(file)
            else:
                known[file] = name
        self._known, self._foreign = known, foreign
        self._listening &= files

    def close(self, name: str) -> bool:
        """End a connection; False where there is none of that name."""
        if name.startswith("unix:"):
            return False
        with self._lock:
            if name not in self._known.values():
                # Made since the last look.
                self._look()
            found = [file for file, known in self._known.items() if known == name]
            return sum(self._shut(file, name) for file in found) > 0

    def _of_host(self) -> dict[str, list[tuple[tuple[int, int], str]]]:
        of_host: defaultdict[str, list[tuple[tuple[int, int], str]]] = defaultdict(list)
        for file, name in self._known.items():
            if not name.startswith("unix:"):
                of_host[host_of(name)].append((file, name))
        return of_host

    def _keep_out(self, full: frozenset[str]) -> None:
        """Have the kernel drop what these addresses send to the listening sockets."""
        if full == self._full or not self._filters:
            return
        self._full = full
        program = keep_out_program(sorted(full)[:_MAX_KEPT_OUT])
        for fd, _ in self._listening:
            try:
                with contextlib.closing(_Borrowed(fileno=fd)) as listening:
                    _attach(listening, program)
            except OSError as error:
                # A sandbox may forbid it: what is too many is then closed, at a greater cost.
                self._filters, self._full = False, frozenset()
                _log.warning("addresses with too many connections cannot be kept out: %s", error)
                return

    def _name_of(self, file: tuple[int, int]) -> str | None:
        """Return the connection's name; None for what is none of ours."""
        try:
            # Borrowed for some questions; the descriptor stays gRPC's.
            with contextlib.closing(_Borrowed(fileno=file[0])) as borrowed:
                if borrowed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    self._note_listening(file, borrowed)
                    return None
                return self._name(borrowed)
        except OSError:
            return None  # it is not connected yet, or no more

    def _note_listening(self, file: tuple[int, int], listening: socket.socket) -> None:
        own = listening.getsockname()
        match self._listen:
            case Address(port=port) if isinstance(own, tuple) and own[1] == port:
                self._listening.add(file)

    def _name(self, connected: socket.socket) -> str | None:
        own, peer = connected.getsockname(), connected.getpeername()
        match self._listen:
            case Address(port=port) if isinstance(own, tuple) and own[1] == port:
                return _name_of_address(peer[0], peer[1])
            case UnixSocket(path=path) if own == path:
                return "unix:"
            case _:
                return None

    def _shut(self, file: tuple[int, int], name: str) -> bool:
        fd, inode = file
        try:
            # A duplicate is the same socket, whatever becomes of the number meanwhile.
            with socket.socket(fileno=os.dup(fd)) as duplicate:
                if os.fstat(duplicate.fileno()).st_ino != inode or self._name(duplicate) != name:
                    return False
                duplicate.shutdown(socket.SHUT_RDWR)
        except OSError:
            return False
        return True


def keep_out_program(hosts: Sequence[str]) -> bytes:
    """Return the classic BPF program that drops packets from `hosts`, and passes all others.

    Each address is compared where its version of IP has the source; see `man 7 socket`,
    SO_ATTACH_FILTER, and `linux/filter.h` for the instructions' form.
    """
    program: list[tuple[int, int, int, int]] = []
    for host in hosts:
        address = ip_address(host.partition("%")[0])
        v4 = address.version == 4
        words = struct.unpack(f">{len(address.packed) // 4}I", address.packed)
        drop = 2 * len(words)
        program += [
            (_LOAD_BYTE, 0, 0, _IP_HEADER),
            (_AND, 0, 0, 0xF0),
            (_JUMP_EQUAL, 0, drop + 1, 0x40 if v4 else 0x60),
        ]
        for index, word in enumerate(words):
            source = _IP_HEADER + (12 if v4 else 8) + 4 * index
            left = drop - 2 * (index + 1)
            program += [(_LOAD_WORD, 0, 0, source), (_JUMP_EQUAL, 0, left + 1, word)]
        program.append((_RETURN, 0, 0, 0))
    program.append((_RETURN, 0, 0, 0xFFFFFFFF))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


def _attach(listening: socket.socket, program: bytes) -> None:
    """Put the program before a socket, in place of the one that was there."""
    kept = ctypes.create_string_buffer(program, len(program))
    described = struct.pack("HP", len(program) // 8, ctypes.addressof(kept))
    listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, described)


class _Borrowed(socket.socket):
    """A socket object over a descriptor that is another's to close."""

    def close(self) -> None:
        self.detach()


def host_of(name: str) -> str:
    """Return the host in a connection's name, as gRPC or this module writes it."""
    kind, _, rest = name.partition(":")
    if kind == "ipv4":
        return rest.rpartition(":")[0]
    if kind == "ipv6":
        host = unquote(rest).rpartition(":")[0].strip("[]")
        return _plain(host)
    return kind


def _name_of_address(host: str, port: int) -> str:
    host = _plain(host)
    if ":" in host:
        return f"ipv6:%5B{host.replace('%', '%25')}%5D:{port}"
    return f"ipv4:{host}:{port}"


def _plain(host: str) -> str:
    """Return an IPv4 address as such where it is written as one of IPv6."""
    try:
        address = ip_address(host)
    except ValueError:
        return host
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return str(mapped or address)


def _open_files() -> set[tuple[int, int]]:
    """Return the process's open sockets: the descriptor, which is used again, and the inode."""
    found = set()
    try:
        names = os.listdir(_FILES)  # noqa: PTH208 - names are all it takes, twice a second
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        # There is no descriptor left to look with, so all of them are in use.
        names = list(map(str, range(resource.getrlimit(resource.RLIMIT_NOFILE)[0])))
    for name in names:
        try:
            status = os.fstat(int(name))
        except OSError:
            continue  # closed since
        if stat.S_ISSOCK(status.st_mode):
            found.add((int(name), status.st_ino))
    return found
