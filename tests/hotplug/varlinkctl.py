#!/usr/bin/python3
"""What `varlinkctl --exec call ADDRESS METHOD PARAMETERS -- PROGRAM ARGUMENT...` of systemd 258 does, for
machines that have an older one: the same bytes to the broker, and the same surroundings for PROGRAM."""

import fcntl
import json
import os
import socket
import sys

if sys.argv[1:3] != ["--exec", "call"] or sys.argv[6] != "--":
    sys.exit("usage: varlinkctl.py --exec call ADDRESS METHOD PARAMETERS -- PROGRAM ARGUMENT...")
address, method, parameters = sys.argv[3:6]
program = sys.argv[7:]

broker = socket.socket(socket.AF_UNIX)
broker.connect(address)
call = {"method": method, "parameters": json.loads(parameters)}
broker.sendall(json.dumps(call, separators=(",", ":")).encode() + b"\0")
data, fds = b"", []
while not data.endswith(b"\0"):
    more, new, _, _ = socket.recv_fds(broker, 65536, 16)
    if not more:
        sys.exit("the broker has closed the connection")
    data, fds = data + more, fds + new
reply = json.loads(data[:-1])
if "error" in reply:
    sys.exit(f"{reply['error']}: {reply['parameters']}")
broker.close()

# The reply on standard input, sealed, the files from 3 on; out of the way first.
answer = os.memfd_create("varlink-reply", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
os.write(answer, json.dumps(reply["parameters"], separators=(",", ":")).encode() + b"\n")
seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
fcntl.fcntl(answer, fcntl.F_ADD_SEALS, seals)
os.lseek(answer, 0, os.SEEK_SET)
high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 100) for fd in [answer, *fds]]
for number, fd in zip([0, *range(3, 3 + len(fds))], high):
    os.dup2(fd, number, inheritable=True)
os.closerange(3 + len(fds), 100)
os.environ["LISTEN_FDS"] = str(len(fds))
os.environ["LISTEN_PID"] = str(os.getpid())
os.environ.pop("LISTEN_FDNAMES", None)
os.execvp(program[0], program)
