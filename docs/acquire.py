#!/usr/bin/python3
import json, socket, sys

usage = "usage: acquire.py SOCKET VM DEVICE"
path, vm, device = sys.argv[1:] if len(sys.argv) == 4 else sys.exit(usage)
broker = socket.socket(socket.AF_UNIX)
broker.connect(path)
call = {"method": "org.vfiobroker.Broker.Acquire", "parameters": {"vm": vm, "devices": [device]}}
broker.sendall(json.dumps(call).encode() + b"\0")
data, fds = b"", []
while not data.endswith(b"\0"):
    more, new, _, _ = socket.recv_fds(broker, 65536, 16)
    if not more:
        sys.exit("the broker has closed the connection")
    data, fds = data + more, fds + new
reply = json.loads(data[:-1])
if "error" in reply:
    sys.exit(f"{reply['error']}: {reply['parameters']}")
print({f"{fd['kind']} {fd['name']}".strip(): fds[fd["index"]] for fd in reply["parameters"]["fds"]})
