"""Starts a program the way systemd starts one with socket activation.

passed_sockets.py WHAT... -- PROGRAM ARGUMENT...

WHAT is `tcp`, `unix:PATH`, `deaf` (a TCP socket that does not listen), `file` (no socket at all), or `pid:N`: the process
that LISTEN_PID names, instead of the program itself.
"""

import os
import socket
import sys

end = sys.argv.index("--")
passed, pid = [], os.getpid()
for what in sys.argv[1:end]:
    kind, _, value = what.partition(":")
    if kind == "pid":
        pid = int(value)
    elif kind == "file":
        passed.append(os.open("/dev/null", os.O_RDONLY))
    else:
        family = socket.AF_UNIX if kind == "unix" else socket.AF_INET
        one = socket.socket(family, socket.SOCK_STREAM)
        one.bind(value if kind == "unix" else ("127.0.0.1", 0))
        if kind != "deaf":
            one.listen()
        passed.append(one.detach())
# Out of the way first: a target may be one of the sources.
passed = [os.dup2(fd, 100 + n, inheritable=False) for n, fd in enumerate(passed)]
for n, fd in enumerate(passed):
    os.dup2(fd, 3 + n, inheritable=True)
os.environ["LISTEN_FDS"] = str(len(passed))
os.environ["LISTEN_PID"] = str(pid)
os.execvp(sys.argv[end + 1], sys.argv[end + 1 :])
