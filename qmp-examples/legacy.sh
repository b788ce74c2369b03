#!/bin/bash
# A QEMU of any age, with the way of opening devices that all of them know: it opens /dev/vfio/N by
# itself, and vfio-broker answers with the lease's files. Asks it for its PCI devices, and ends it.
set -euo pipefail
device=${1:?usage: legacy.sh DEVICE [container|group]}
handout=${2:-container}

commands='{"execute": "qmp_capabilities"}
{"execute": "query-pci"}
{"execute": "quit"}'
sed 's/^/-> /' <<<"$commands"

# No argument names an open file, so vfio-broker stays and answers what QEMU opens.
"${VFIO_BROKER:-vfio-broker}" exec --vm example --device "$device" --handout "$handout" -- \
    "${QEMU:-qemu-system-x86_64}" -machine q35 -nodefaults -display none -m 64 -S \
    -sandbox on -qmp stdio \
    -device "vfio-pci,id=nic,addr=05.0,host=$device" \
    <<<"$commands" | sed 's/^/<- /'
