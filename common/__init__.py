"""What the commands share. Each command imports it first, for the two things below, which must not wait for torch."""

import os
import signal
import sys

if sys.version_info < (3, 11):  # noqa: UP036 (requires-python holds for an installation only, not for a checkout)
    print(f"{os.path.basename(sys.argv[0])}: needs Python 3.11 or later, this is {sys.version.split()[0]}",
          file=sys.stderr)
    sys.exit(2)


def end_at_once(number, frame):
    """Signal handler until `cli.run_command`: an exception may be lost, or abort, within the imports of C++ modules."""
    os.write(2, f"{os.path.basename(sys.argv[0])}: interrupted\n".encode())
    os._exit(130)


# only in a command of this folder, not in a program that imports it, such as a notebook or pytest
if sys.argv[0] in sys.orig_argv and os.path.dirname(os.path.realpath(sys.argv[0])) == os.path.dirname(__path__[0]):
    signal.signal(signal.SIGINT, end_at_once)
