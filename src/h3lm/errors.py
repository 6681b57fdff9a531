"""The one exception for mistakes that a user can mend, and the errors of a full disk."""

import errno

# of the disk, a quota, and a limit on the size of files
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(ValueError):
    """What is wrong and what to do about it, in one line.

    Raised for bad input, settings and files, never for faults of our own. The command line prints
    the message alone and exits with status 1; from Python it is a `ValueError`.
    """
