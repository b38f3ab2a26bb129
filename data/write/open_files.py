"""Files and connections that were open before a fork: every writing process gets its own, or none.

After a fork all processes share the place in an open file, so their reads get in each other's way: a dataset that keeps
a zip archive open would yield other bytes than it asked for, whatever object hides the file. A file that is opened
again has a place of its own, at the same position. A connection or a pipe cannot be opened again. It is cut, so that
the dataset connects anew or fails, and never reads what another process asked for.
"""

import fcntl
import os
import socket
import stat
from collections.abc import Collection

_KEPT = os.O_ACCMODE | os.O_APPEND | os.O_NONBLOCK | os.O_DIRECT  # flags that an open file goes on with


class SharedFileError(ValueError):
    """A file that is open cannot be opened again."""


def reopen(ours: Collection[int]) -> None:
    """Gives this process a place of its own in every file that it inherited open for reading, and cuts connections.

    To be called in a forked process before it reads. It leaves the standard streams alone.

    Args:
        ours: descriptors to leave alone.

    Raises:
        SharedFileError: a file cannot be opened again.
    """
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            kind, flags = os.fstat(number).st_mode, fcntl.fcntl(number, fcntl.F_GETFL)
        except OSError:  # that of the listing itself
            continue
        if number <= 2 or number in ours or flags & os.O_ACCMODE == os.O_WRONLY or flags & os.O_PATH:
            continue
        if stat.S_ISREG(kind):
            _replace(number, _open_again(number, flags))
        elif stat.S_ISSOCK(kind):
            end, other = socket.socketpair()
            other.close()
            _replace(number, end.detach())
        elif stat.S_ISFIFO(kind):
            _replace(number, os.open(os.devnull, os.O_RDONLY))


def _open_again(number: int, flags: int) -> int:
    position, link = os.lseek(number, 0, os.SEEK_CUR), f"/proc/self/fd/{number}"
    try:
        again = os.open(link, flags & _KEPT)
    except OSError as error:
        path, why = os.readlink(link), error.strerror
        mend = "open it in __getitem__ instead, or write with workers=1"
        raise SharedFileError(f"{path}: was open before the writing processes started ({why}); {mend}") from error
    os.lseek(again, position, os.SEEK_SET)
    return again


def _replace(number: int, by: int) -> None:
    os.dup2(by, number, inheritable=os.get_inheritable(number))
    os.close(by)
