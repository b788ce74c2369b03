"""What the examples share: a call to the broker, and a QEMU to try things with."""

import atexit
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile


def call(connection, method, **parameters):
    """One call of the broker's, with the open files that come back: their kinds to their numbers."""
    message = {"method": "org.vfiobroker.Broker." + method, "parameters": parameters}
    connection.sendall(json.dumps(message).encode() + b"\0")
    data, fds = b"", []
    while not data.endswith(b"\0"):
        more, new, _, _ = socket.recv_fds(connection, 65536, 16)
        if not more:
            sys.exit("the broker has closed the connection")
        data, fds = data + more, fds + new
    reply = json.loads(data[:-1])
    if "error" in reply:
        sys.exit(f"{method}: {reply['error']}: {reply['parameters']}")
    reply = reply["parameters"]
    return reply, {fd["kind"]: fds[fd["index"]] for fd in reply.get("fds", [])}


def connect():
    """A connection to the broker."""
    broker = socket.socket(socket.AF_UNIX)
    path = os.environ.get("VFIO_BROKER_SOCKET", "/run/vfio-broker/broker.sock")
    try:
        broker.connect(path)
    except OSError as error:
        sys.exit(f"{path}: {error.strerror}: is vfio-brokerd running?")
    return broker


class Qemu:
    """A QEMU with two free ports, that runs no guest. Ends with this program."""

    def __init__(self):
        self.directory = tempfile.mkdtemp(prefix="vfio-broker-example-")
        self.socket = self.directory + "/qmp"
        # The monitor is listened on before QEMU starts: so nobody has to wait for the socket.
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.socket)
        listener.listen(1)
        fd = listener.fileno()
        command = [os.environ.get("QEMU", "qemu-system-x86_64")]
        command += ["-machine", "q35", "-nodefaults", "-display", "none", "-m", "64", "-S"]
        # PCI Express's own hotplug: QEMU then takes a device out at once while no guest has
        # switched its port on. With ACPI's, the default of q35, it always waits for the guest.
        command += ["-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off"]
        command += ["-device", "pcie-root-port,id=port1,chassis=1"]
        command += ["-device", "pcie-root-port,id=port2,chassis=2"]
        command += ["-chardev", f"socket,id=monitor,fd={fd},server=on,wait=off"]
        command += ["-mon", "chardev=monitor,mode=control"]
        self.process = subprocess.Popen(command, pass_fds=[fd], stdin=subprocess.DEVNULL)
        listener.close()
        # Also when an example fails: what runs on would keep the device.
        atexit.register(self.end)

    def open_files(self, name):
        """How many open files of that name QEMU has."""
        links = f"/proc/{self.process.pid}/fd"
        return sum(name in os.readlink(f"{links}/{fd}") for fd in os.listdir(links))

    def end(self):
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)


class Qmp:
    """A QMP client of the standard library's parts. Prints what is said."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self.lines = self.socket.makefile("r")
        self.events = []
        self.read()
        self("qmp_capabilities")

    def read(self):
        line = self.lines.readline()
        if not line:
            sys.exit("QEMU has closed its monitor")
        say("<-", line)
        return json.loads(line)

    def __call__(self, command, file=None, **arguments):
        # qom_type and fdset_id are written with a hyphen.
        arguments = {name.replace("_", "-"): value for name, value in arguments.items()}
        message = json.dumps({"execute": command, "arguments": arguments})
        say("->", message)
        line = message.encode() + b"\n"
        if file is None:
            self.socket.sendall(line)
        else:
            # An open file goes along with the command that takes it.
            socket.send_fds(self.socket, [line], [file])
        while True:
            reply = self.read()
            if "return" in reply:
                return reply["return"]
            if "error" in reply:
                sys.exit(f"{command}: {reply['error']['desc']}")
            self.events.append(reply)

    def wait(self, event, device):
        """Waits for something to happen to a device."""
        while not any(e["event"] == event and e["data"].get("device") == device for e in self.events):
            self.events.append(self.read())


def say(arrow, message):
    """The secret stays one, and long answers are cut."""
    message = re.sub(r'("key": )"[^"]*"', r'\1"..."', message.strip())
    print(arrow, message if len(message) < 300 else message[:300] + " ...", flush=True)
