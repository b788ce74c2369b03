#!/usr/bin/python3
"""A second device later on, on the iommufd of the first: both then share the guest's mappings, and
its memory is pinned and counted once."""

import os
import sys

from broker import Qemu, Qmp, call, connect

usage = "usage: second_device.py DEVICE DEVICE"
first, second = sys.argv[1:] if len(sys.argv) == 3 else sys.exit(usage)
broker = connect()
machine = Qemu()
qemu = Qmp(machine.socket)


def plug(fds, name, port):
    qemu("getfd", fds["cdev"], fdname=name)
    qemu("device_add", driver="vfio-pci", id=name, bus=port, iommufd="iommufd0", fd=name)
    os.close(fds["cdev"])


lease, fds = call(broker, "Acquire", vm="example", devices=[first], backend="iommufd")
qemu("getfd", fds["lease"], fdname="lease")
qemu("getfd", fds["iommufd"], fdname="iommufd")
qemu("object-add", qom_type="iommufd", id="iommufd0", fd="iommufd")
plug(fds, "first", "port1")

# With the lease and its key the device is added to that lease: there is no further iommufd in the
# answer. Its lease fd is another one for the same lease, and need not be kept.
name, key = lease["lease"], lease["key"]
more, fds2 = call(broker, "Acquire", vm="example", devices=[second], lease=name, key=key)
assert more["lease"] == name and "iommufd" not in fds2
plug(fds2, "second", "port2")
print("#", first, "and", second, "on one iommufd, with lease", name)

for fd in [fds["lease"], fds["iommufd"], fds2["lease"]]:
    os.close(fd)
# The lease ends as a whole, with QEMU or when it is released. Devices that are to be given back one
# by one are better acquired one by one: see README.md.
machine.end()
print("# QEMU has ended, and so has the lease")
