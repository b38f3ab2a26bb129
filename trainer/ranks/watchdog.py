"""A rank that dies takes the job down, and one line names it; so does a mistake that only one rank meets.

Each rank holds a connection to rank 0. However a process dies, its kernel closes its sockets, and a machine that falls
silent fails TCP's keep-alive within 30 s: either ends the connection. So nothing is polled, a rank that is merely slow
is not taken for dead, and it does not matter whether collectives fail (gloo's do) or hang (NCCL's).
"""

import contextlib
import hashlib
import json
import math
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import traceback
from datetime import timedelta
from typing import Any, NoReturn

from torch.distributed import TCPStore

from trainer.ranks.errors import PORT

DIED = 1  # exit status of the ranks that outlive another
MISTAKE = 2  # exit status after a user's mistake
START = 300.0  # seconds that the ranks wait for each other at the start
GRACE = 3.0  # seconds in which ranks that fail together are heard, so that rank 0 speaks for all
AGAIN = "run the same command again to resume"


class Watchdog:
    """Within its context no rank is left waiting for one that died or failed; a job of one process has none."""

    def __init__(self, rank: int, size: int, start: float = START) -> None:
        """`start`: seconds within which all `size` ranks must have entered."""
        self.rank, self.size, self.start = rank, size, start
        self.host = socket.gethostname()
        self._left, self._connected, self._all_left = False, threading.Event(), threading.Event()

    def __enter__(self) -> "Watchdog":
        if self.size > 1:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """A normal end is said to the others. After an error, which may come of another rank's death, they decide."""
        if self.size == 1:
            return
        if error is not None and not isinstance(error, SystemExit):
            time.sleep(2 * GRACE)  # a death elsewhere ends this process meanwhile
            traceback.print_exception(error)
            self._say(died=f" ({kind.__name__}: {' '.join(str(error).split())[:200]})")
            time.sleep(4 * GRACE)
            os._exit(DIED)
        self._left = True
        self._say(leave=True)
        if self.rank == 0:
            self._all_left.wait(4 * GRACE)

    def fail(self, error: Exception) -> int:
        """Says a user's mistake in one line, once for all ranks, and ends them with status 2.

        With several ranks it does not return.
        """
        line = " ".join(str(error).split())
        if self.size == 1:
            print(f"error: {line}", file=sys.stderr, flush=True)
            return MISTAKE
        if self._say(failed=line):
            time.sleep(4 * GRACE)
        _end(f"error: {line} (rank {self.rank})", MISTAKE)  # rank 0 is not there to speak

    def _say(self, **message: Any) -> bool:
        with contextlib.suppress(OSError):
            if self._connected.wait(4 * GRACE):
                self._line.sendall(_encode(message))
                return True
        return False

    def _watch(self) -> None:
        """The thread of every rank: ends the process when rank 0 says so, or is gone."""
        try:
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            key = f"watchdog-{_command()}"
            serves = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun does
            if not serves:
                _await(address, self.start)  # torch's store would wait too, but not in silence
            # On rank 0 the process group will share this store: the address is the same.
            self._store = TCPStore(
                *address, is_master=serves, timeout=timedelta(seconds=self.start),
                wait_for_workers=False, multi_tenant=True,
            )  # fmt: skip
            if self.rank == 0:
                # On the family of addresses that rank 0 is known by.
                family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
                listener = socket.create_server(("", 0), family=family, backlog=self.size)
                token = secrets.token_hex(8)
                threading.Thread(target=self._serve, args=(listener, token), name="watchdog-0", daemon=True).start()
                self._store.set(key, f"{listener.getsockname()[1]} {token}")
            port, token = self._store.get(key).decode().split()
            self._line = socket.create_connection((address[0], int(port)), timeout=self.start)
        except (KeyError, ValueError, OSError, RuntimeError) as error:  # torch's store raises RuntimeErrors
            where = ":".join(os.environ.get(name, f"({name} is not set)") for name in ("MASTER_ADDR", "MASTER_PORT"))
            listens = self.rank == 0 and "listen" in str(error)
            what = "cannot listen" if listens else "finds no rank 0"
            how = PORT if listens else "see what rank 0 said"
            reason = (str(error).splitlines() or [""])[0]
            line = f"error: rank {self.rank} ({self.host}) {what} at {where} ({reason}); {how}"
            _end(line, MISTAKE if listens else DIED)
        _keep_alive(self._line)
        os.register_at_fork(after_in_child=self._line.close)  # else a child would hold the connection open
        self._line.sendall(_encode({"hello": self.rank, "host": self.host, "token": token}))
        self._connected.set()
        with contextlib.suppress(OSError):
            for message in map(json.loads, self._line.makefile("rb")):
                if "exit" in message:
                    os._exit(message["exit"])
                if "left" in message:
                    return
        if not self._left:
            try:  # the first on each machine speaks
                self._speaker = socket.socket(socket.AF_UNIX)
                self._speaker.bind(f"\0unsoftmax-{token}")
            except OSError:
                os._exit(DIED)
            _end(f"error: rank 0 ({os.environ['MASTER_ADDR']}) died; {AGAIN}", DIED)

    def _serve(self, listener: socket.socket, token: str) -> None:
        """A second thread of rank 0: hears all ranks, its own too, and ends them together."""
        selector = selectors.DefaultSelector()
        selector.register(listener, selectors.EVENT_READ)
        peers: dict[int, _Peer] = {}
        verdict_at, trouble_since = time.monotonic() + self.start, math.inf
        while sum(peer.left for peer in peers.values()) < self.size:
            wait = None if verdict_at == math.inf else max(0.0, verdict_at - time.monotonic())
            for key, _ in selector.select(wait):
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    _keep_alive(connection)
                    selector.register(connection, selectors.EVENT_READ, _Peer(connection, token))
                    continue
                peer: _Peer = key.data
                peer.hear()
                if peer.rank is not None:
                    peers[peer.rank] = peer
                if peer.ended:
                    selector.unregister(peer.connection)
            now = time.monotonic()
            died = [rank for rank, peer in peers.items() if peer.died is not None]
            failed = [rank for rank, peer in peers.items() if peer.failed is not None]
            if died or failed:
                trouble_since = min(trouble_since, now)
                verdict_at = trouble_since + (0 if len(died + failed) == self.size else 0.5 if died else GRACE)
            elif len(peers) == self.size:
                verdict_at = math.inf
            if now < verdict_at:
                continue
            status = DIED
            if died:  # whatever else failed, failed of that
                first = peers[min(died)]
                line = f"{first} died{first.died}{f' and {len(died) - 1} more' if died[1:] else ''}; {AGAIN}"
            elif failed:
                first, status = peers[min(failed)], MISTAKE
                line = f"{first.failed} (rank {first.rank})" if first.rank else first.failed
            else:
                missing = ", ".join(str(rank) for rank in range(self.size) if rank not in peers)
                line = f"rank {missing} did not start within {self.start:.0f} s; see what it said"
            _write(f"error: {line}")
            for peer in peers.values():
                if peer.rank:  # rank 0 itself ends last, here
                    peer.tell(exit=status)
            os._exit(status)
        for peer in peers.values():
            peer.tell(left=True)
        self._all_left.set()


class _Peer:
    """Rank 0's end of a rank's connection, and what came over it."""

    def __init__(self, connection: socket.socket, token: str) -> None:
        self.connection, self._token, self._rest = connection, token, b""
        self.rank, self.host = None, ""
        self.left = self.ended = False
        self.failed: str | None = None
        self.died: str | None = None  # why, if that is known
        os.register_at_fork(after_in_child=connection.close)

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host})"

    def hear(self) -> None:
        """Takes in what came."""
        try:
            came = self.connection.recv(65536)
        except OSError:
            came = b""
        *lines, self._rest = (self._rest + came).split(b"\n")
        for line in lines:
            message = json.loads(line) if self.rank is not None or self._token.encode() in line else {}
            if "hello" in message:
                self.rank, self.host = message["hello"], message["host"]
            self.left = self.left or "leave" in message
            self.failed = message.get("failed", self.failed)
            self.died = message.get("died", self.died)
        self.ended = not came
        if self.ended and self.failed is None and self.died is None and not self.left:
            self.died = ""

    def tell(self, **message: Any) -> None:
        """Sends it, if the rank is still there."""
        with contextlib.suppress(OSError):
            self.connection.sendall(_encode(message))


def _await(address: tuple[str, int], seconds: float) -> None:
    """Returns once something listens there. Raises OSError when nothing has by then."""
    until = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection(address, timeout=5).close()
        except OSError as error:
            if time.monotonic() > until:
                raise OSError(f"after {seconds:.0f} s: {error.strerror or error}") from error
        time.sleep(0.2)


def _command() -> str:
    """A digest of what was typed, the same on all ranks: another run's rank 0 at this address is not taken for ours."""
    typed = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    return hashlib.sha256(json.dumps(typed).encode()).hexdigest()[:16]


def _encode(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _keep_alive(connection: socket.socket) -> None:
    """A machine that falls silent is noticed within 30 s; probes are answered by its kernel, not by the process."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4)):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _end(line: str, status: int) -> NoReturn:
    _write(line)
    os._exit(status)


def _write(line: str) -> None:
    """A line on stderr, past Python's buffers, which the main thread may hold."""
    os.write(2, f"{line}\n".encode())
