#!/usr/bin/python3
"""A device into a running QEMU and out of it again, with nothing but Python's standard library."""

import os
import sys

from broker import Qemu, Qmp, call, connect

device = sys.argv[1] if len(sys.argv) == 2 else sys.exit("usage: hotplug.py DEVICE")
broker = connect()
machine = Qemu()
qemu = Qmp(machine.socket)

# One lease: its lease fd, an empty iommufd, and the device by its own node, unbound.
lease, fds = call(broker, "Acquire", vm="example", devices=[device], backend="iommufd")
print("#", lease["devices"], "with lease", lease["lease"])

# The lease fd first: from here on the lease lives as long as QEMU does.
qemu("getfd", fds["lease"], fdname="lease")
qemu("getfd", fds["iommufd"], fdname="iommufd")
qemu("getfd", fds["cdev"], fdname="device")
# QEMU has its own copies now. A copy of the device that is kept here would keep it in use for ever.
for fd in fds.values():
    os.close(fd)

# Names are used up: "iommufd" and "device" mean nothing afterwards, "lease" stays.
qemu("object-add", qom_type="iommufd", id="iommufd0", fd="iommufd")
qemu("device_add", driver="vfio-pci", id="nic", bus="port1", iommufd="iommufd0", fd="device")
assert qemu("qom-get", path="/machine/peripheral/nic", property="realized") is True
print("# plugged in")

# device_del only asks: the event says that it has happened.
qemu("device_del", id="nic")
qemu.wait("DEVICE_DELETED", "nic")
qemu("object-del", id="iommufd0")
# The lease ends with its lease fd. Release would say besides whether the device is shown to be free.
qemu("closefd", fdname="lease")
print("# unplugged and given back")
machine.end()
