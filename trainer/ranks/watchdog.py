"""When a rank dies, the job ends and one line names the rank. So it is with a mistake that only one rank meets.

Each rank holds a connection to rank 0. However a process dies, its kernel closes its sockets. A machine that falls
silent fails TCP's keep-alive within 30 s. Either ends the connection. So nothing is polled, and a slow rank is not
taken for dead. It does not matter whether collectives fail (gloo's do) or hang (NCCL's do).
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
POLL = 1.0  # seconds in which a changed limit is seen
GRACE = 3.0  # seconds to wait for other ranks that fail, so that one line names the first of them
AGAIN = "run the same command again to resume"


class Watchdog:
    """Within its context no rank waits for a rank that died or failed. A job of one process needs none."""

    def __init__(self, rank: int, size: int, start: float = START) -> None:
        """`start`: seconds within which all `size` ranks must have entered; it may be changed within the context."""
        self.rank, self.size, self.start = rank, size, start
        self.host = socket.gethostname()
        self._left, self._connected, self._all_left = False, threading.Event(), threading.Event()

    def __enter__(self) -> "Watchdog":
        if self.size > 1:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Tell the others of a normal end. An error may come from another rank's death, so rank 0 decides who died."""
        if self.size == 1:
            return
        if error is not None and not isinstance(error, SystemExit):
            time.sleep(2 * GRACE)  # a death elsewhere ends this process meanwhile
            traceback.print_exception(error)
            self._send(died=f" ({kind.__name__}: {' '.join(str(error).split())[:200]})")
            time.sleep(4 * GRACE)
            os._exit(DIED)
        self._left = True
        self._send(leave=True)
        if self.rank == 0:
            self._all_left.wait(4 * GRACE)

    def fail(self, error: Exception) -> int:
        """Print a user's mistake in one line, once for all ranks, and end them with status 2.

        With several ranks it does not return.
        """
        line = " ".join(str(error).split())
        if self.size == 1:
            print(f"error: {line}", file=sys.stderr, flush=True)
            return MISTAKE
        if self._send(failed=line):
            time.sleep(4 * GRACE)
        _end(f"error: {line} (rank {self.rank})", MISTAKE)  # rank 0 is not there to print it

    def _send(self, **message: Any) -> bool:
        with contextlib.suppress(OSError):
            if self._connected.wait(4 * GRACE):
                self._line.sendall(_encode(message))
                return True
        return False

    def _watch(self) -> None:
        """The thread of every rank: it ends the process when rank 0 says so, or is gone."""
        try:
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            key = f"watchdog-{command_digest()}"
            serves = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun does
            if not serves:
                await_address(address, self.start)  # torch's store would wait too, but print warnings
            # On rank 0 the process group shares this store, since the address is the same.
            self._store = TCPStore(
                *address, is_master=serves, timeout=timedelta(seconds=self.start),
                wait_for_workers=False, multi_tenant=True,
            )  # fmt: skip
            if self.rank == 0:
                # In the address family of MASTER_ADDR.
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
            how = PORT if listens else "see what rank 0 printed"
            reason = (str(error).splitlines() or [""])[0]
            line = f"error: rank {self.rank} ({self.host}) {what} at {where} ({reason}); {how}"
            _end(line, MISTAKE if listens else DIED)
        _keep_alive(self._line)
        os.register_at_fork(after_in_child=self._line.close)  # a child would hold the connection open
        self._line.sendall(_encode({"hello": self.rank, "host": self.host, "token": token}))
        self._connected.set()
        with contextlib.suppress(OSError):
            for message in map(json.loads, self._line.makefile("rb")):
                if "exit" in message:
                    os._exit(message["exit"])
                if "left" in message:
                    return
        if not self._left:
            try:  # the first on each machine prints it
                self._first = socket.socket(socket.AF_UNIX)
                self._first.bind(f"\0unsoftmax-{token}")
            except OSError:
                os._exit(DIED)
            _end(f"error: rank 0 ({os.environ['MASTER_ADDR']}) died; {AGAIN}", DIED)

    def _serve(self, listener: socket.socket, token: str) -> None:
        """A second thread of rank 0: it listens to all ranks, its own too, and ends them together."""
        selector = selectors.DefaultSelector()
        selector.register(listener, selectors.EVENT_READ)
        peers: dict[int, _Peer] = {}
        began, trouble_since = time.monotonic(), math.inf
        verdict_at = began + self.start
        while sum(peer.left for peer in peers.values()) < self.size:
            wait = None if verdict_at == math.inf else min(POLL, max(0.0, verdict_at - time.monotonic()))
            for key, _ in selector.select(wait):
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    _keep_alive(connection)
                    selector.register(connection, selectors.EVENT_READ, _Peer(connection, token))
                    continue
                peer: _Peer = key.data
                peer.receive()
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
            else:
                verdict_at = began + self.start
            if now < verdict_at:
                continue
            status = DIED
            if died:  # the death made the others fail
                first = peers[min(died)]
                line = f"{first} died{first.died}{f' and {len(died) - 1} more' if died[1:] else ''}; {AGAIN}"
            elif failed:
                first, status = peers[min(failed)], MISTAKE
                line = f"{first.failed} (rank {first.rank})" if first.rank else first.failed
            else:
                missing = ", ".join(str(rank) for rank in range(self.size) if rank not in peers)
                line = f"rank {missing} did not start within {self.start:.0f} s; see what it printed"
            _write(f"error: {line}")
            for peer in peers.values():
                if peer.rank:  # rank 0 itself ends last, below
                    peer.send(exit=status)
            os._exit(status)
        for peer in peers.values():
            peer.send(left=True)
        self._all_left.set()


class _Peer:
    """Rank 0's end of a rank's connection, and what it received."""

    def __init__(self, connection: socket.socket, token: str) -> None:
        self.connection, self._token, self._rest = connection, token, b""
        self.rank, self.host = None, ""
        self.left = self.ended = False
        self.failed: str | None = None
        self.died: str | None = None  # why, if that is known
        os.register_at_fork(after_in_child=connection.close)

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host})"

    def receive(self) -> None:
        """Receive what is there."""
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

    def send(self, **message: Any) -> None:
        """Send it, if the rank is still there."""
        with contextlib.suppress(OSError):
            self.connection.sendall(_encode(message))


def await_address(address: tuple[str, int], seconds: float) -> None:
    """Wait until something listens there. Raises OSError when nothing does after `seconds`."""
    until = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection(address, timeout=5).close()
        except OSError as error:
            if time.monotonic() > until:
                raise OSError(f"after {seconds:.0f} s: {error.strerror or error}") from error
        time.sleep(0.2)


def command_digest() -> str:
    """A digest of the command line, which all ranks share: it tells our rank 0 from another run's at this address."""
    typed = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    return hashlib.sha256(json.dumps(typed).encode()).hexdigest()[:16]


def _encode(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _keep_alive(connection: socket.socket) -> None:
    """Notice a machine that falls silent, within 30 s. Its kernel answers the probes, so a busy process may be slow."""
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
