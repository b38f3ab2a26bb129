"""Files that were open before a fork: every writing process opens them again for itself.

After a fork all processes share the place in such a file, so their reads get in each other's way: a dataset that keeps
a zip archive open would yield other bytes than it asked for, whatever object hides the file. A file that is opened
again has a place of its own, at the same position.
"""

import fcntl
import os
import stat

_AT_OPENING = os.O_CREAT | os.O_EXCL | os.O_TRUNC | os.O_NOFOLLOW  # flags for the first opening alone; /proc has links


class SharedFileError(ValueError):
    """A file that is open cannot be opened again."""


def reopen() -> None:
    """Gives this process a place of its own in every regular file that it inherited open for reading.

    To be called in a forked process before it reads. It leaves the standard streams alone.

    Raises:
        SharedFileError: a file cannot be opened again.
    """
    for name in os.listdir("/proc/self/fd"):
        number = int(name)
        try:
            if number <= 2 or not stat.S_ISREG(os.fstat(number).st_mode):
                continue
            flags = fcntl.fcntl(number, fcntl.F_GETFL)
        except OSError:  # the listing's own
            continue
        if flags & os.O_ACCMODE == os.O_WRONLY or flags & os.O_PATH:
            continue
        position, link = os.lseek(number, 0, os.SEEK_CUR), f"/proc/self/fd/{number}"
        try:
            again = os.open(link, flags & ~_AT_OPENING)
        except OSError as error:
            path, why = os.readlink(link), error.strerror
            mend = "open it in __getitem__ instead, or write with workers=1"
            raise SharedFileError(f"{path}: was open before the writing processes started ({why}); {mend}") from error
        os.lseek(again, position, os.SEEK_SET)
        os.dup2(again, number, inheritable=os.get_inheritable(number))
        os.close(again)
