#!/usr/bin/python3
"""The same as hotplug.py, with QEMU's own Python library: pip install qemu.qmp"""

import asyncio
import os
import sys

try:
    from qemu.qmp import QMPClient
except ImportError:
    sys.exit("QEMU's Python library is not there: pip install qemu.qmp")

from broker import Qemu, call, connect, say

device = sys.argv[1] if len(sys.argv) == 2 else sys.exit("usage: hotplug_qemu_qmp.py DEVICE")


async def main(machine):
    qemu = QMPClient("example")
    await qemu.connect(machine.socket)

    async def execute(command, **arguments):
        arguments = {name.replace("_", "-"): value for name, value in arguments.items()}
        say("->", f"{command} {arguments}")
        return await qemu.execute(command, arguments)

    async def getfd(name, fd):
        # The open file is sent before the command, and waits for it: nothing may come in between.
        qemu.send_fd_scm(fd)
        await execute("getfd", fdname=name)
        os.close(fd)

    lease, fds = call(connect(), "Acquire", vm="example", devices=[device], backend="iommufd")
    print("#", lease["devices"], "with lease", lease["lease"])
    await getfd("lease", fds["lease"])
    await getfd("iommufd", fds["iommufd"])
    await getfd("device", fds["cdev"])
    await execute("object-add", qom_type="iommufd", id="iommufd0", fd="iommufd")
    await execute(
        "device_add", driver="vfio-pci", id="nic", bus="port1", iommufd="iommufd0", fd="device"
    )
    assert await execute("qom-get", path="/machine/peripheral/nic", property="realized") is True
    print("# plugged in")

    # Listened for before it is asked for, or it could be missed.
    with qemu.listener("DEVICE_DELETED") as deleted:
        await execute("device_del", id="nic")
        async for event in deleted:
            if event["data"].get("device") == "nic":
                break
    await execute("object-del", id="iommufd0")
    await execute("closefd", fdname="lease")
    print("# unplugged and given back")
    await qemu.disconnect()


machine = Qemu()
asyncio.run(main(machine))
machine.end()
