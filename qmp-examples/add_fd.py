#!/usr/bin/python3
"""The iommufd by an fd set (add-fd), so that it can be closed again.

QEMU never closes an iommufd that it was given by a name (getfd): object-del leaves it open until QEMU
ends. One that it was given by its number in an fd set is closed by remove-fd."""

import os
import sys

from broker import Qemu, Qmp, call, connect

device = sys.argv[1] if len(sys.argv) == 2 else sys.exit("usage: add_fd.py DEVICE")
machine = Qemu()
qemu = Qmp(machine.socket)
lease, fds = call(connect(), "Acquire", vm="example", devices=[device], backend="iommufd")
qemu("getfd", fds["lease"], fdname="lease")

# add-fd says which number the file has in QEMU; where a name is wanted, a number will do.
added = qemu("add-fd", fds["iommufd"], fdset_id=1, opaque="iommufd of " + lease["lease"])
qemu("object-add", qom_type="iommufd", id="iommufd0", fd=str(added["fd"]))
# The device goes by name: QEMU closes it when it is unplugged, so its number must be in no fd set,
# where remove-fd would close whatever has the number by then.
qemu("getfd", fds["cdev"], fdname="device")
for fd in fds.values():
    os.close(fd)
qemu("device_add", driver="vfio-pci", id="nic", bus="port1", iommufd="iommufd0", fd="device")
print("# plugged in;", machine.open_files("iommu"), "iommufd open")

qemu("device_del", id="nic")
qemu.wait("DEVICE_DELETED", "nic")
qemu("object-del", id="iommufd0")
print("# the object is deleted;", machine.open_files("iommu"), "iommufd open")
# A stopped QEMU would close it later: when it goes on, or (9.0) when it ends.
qemu("cont")
qemu("remove-fd", fdset_id=1)
qemu("query-fdsets")
print("# the set is removed;", machine.open_files("iommu"), "iommufd open")
qemu("closefd", fdname="lease")
machine.end()
