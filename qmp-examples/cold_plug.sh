#!/bin/bash
# A QEMU that has a device from its start, by an inherited iommufd and device. Asks it for its PCI
# devices, and ends it: the lease ends with it.
set -euo pipefail
device=${1:?usage: cold_plug.sh DEVICE}

commands='{"execute": "qmp_capabilities"}
{"execute": "query-pci"}
{"execute": "quit"}'
sed 's/^/-> /' <<<"$commands"

# vfio-broker puts the numbers of the open files where the arguments have braces, and becomes QEMU.
# The monitor is on standard input and output, for the three commands.
"${VFIO_BROKER:-vfio-broker}" exec --vm example --device "$device" -- \
    "${QEMU:-qemu-system-x86_64}" -machine q35 -nodefaults -display none -m 64 -S \
    -qmp stdio \
    -object 'iommufd,id=iommufd0,fd={iommufd}' \
    -device "vfio-pci,id=nic,addr=05.0,iommufd=iommufd0,fd={cdev:$device}" \
    <<<"$commands" | sed 's/^/<- /'
