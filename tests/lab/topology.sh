# shellcheck shell=bash
# shellcheck disable=SC2034  # the variables are for `run`
# The machines that the lab can be; sourced by `run`.
#
# lab_device NAME BDF VENDOR:DEVICE STATE QEMU-DEVICE
#   NAME     the guest has LAB_NAME=BDF in its environment (upper case, _ for -)
#   BDF      where the guest sees it: the guest refuses to go on when it does not
#   STATE    vfio-pci: bound to it before the program runs; host: left to the
#            host's driver; none: no driver
#   QEMU-DEVICE  the argument of -device; "" for what another line brings (VFs)
# lab_bus QEMU-DEVICE    a port or a bridge, no device of its own in the list
# lab_vfs NAME N         the PF makes N virtual functions before anything is bound
#
# Slots 1d to 1f are the lab's own (shares, serial ports) and the chipset's.

topology_devices() {
    # each alone in its group
    lab_device e1000e      0000:00:02.0 8086:10d3 vfio-pci e1000e,addr=02.0,romfile=
    lab_device edu0        0000:00:03.0 1234:11e8 vfio-pci edu,addr=03.0,dma_mask=0xffffffffffffffff
    lab_device edu1        0000:00:04.0 1234:11e8 vfio-pci edu,addr=04.0,dma_mask=0xffffffffffffffff
    lab_device nvme        0000:00:05.0 1b36:0010 host     nvme,addr=05.0,serial=lab0
    lab_device virtio-net  0000:00:06.0 1af4:1041 host     virtio-net-pci,addr=06.0,disable-legacy=on,iommu_platform=on,romfile=

    # one group, two functions of one device, both on vfio-pci: viable
    lab_device pair0       0000:00:07.0 1234:11e8 vfio-pci edu,addr=07.0,multifunction=on,dma_mask=0xffffffffffffffff
    lab_device pair1       0000:00:07.1 1234:11e8 vfio-pci edu,addr=07.1,dma_mask=0xffffffffffffffff

    # one group, two devices behind a PCI bridge, one of them the host's: not viable
    lab_bus pcie-pci-bridge,id=bridge,addr=08.0
    lab_device mixed-edu   0000:01:01.0 1234:11e8 vfio-pci edu,bus=bridge,addr=01.0,dma_mask=0xffffffffffffffff
    lab_device mixed-e1000 0000:01:02.0 8086:100e host     e1000,bus=bridge,addr=02.0,romfile=

    # SR-IOV: a PF with its host driver and two VFs
    lab_bus pcie-root-port,id=sriov,chassis=2,slot=2,addr=09.0
    lab_device igb         0000:02:00.0 8086:10c9 host     igb,bus=sriov,addr=00.0,romfile=
    lab_vfs    igb         2
    lab_device igb-vf0     0000:02:10.0 8086:10ca vfio-pci ""
    lab_device igb-vf1     0000:02:10.2 8086:10ca none     ""

    # an empty port: `device_add …,bus=free` on /dev/virtio-ports/lab.qmp
    lab_bus pcie-root-port,id=free,chassis=3,slot=3,addr=0a.0
}

# A name is a machine and what its kernel is told.
topology() {
    lab_iommu=(-device "intel-iommu,intremap=on,caching-mode=on")
    lab_cmdline=(intel_iommu=on)
    lab_noiommu=N
    case $1 in
        default) ;;
        # SET_IOMMU gives EPERM unless vfio_iommu_type1.allow_unsafe_interrupts
        no-intremap)
            lab_iommu=(-device "intel-iommu,intremap=off,caching-mode=on")
            lab_cmdline+=(intremap=off) ;;
        # no IOMMU at all: /dev/vfio/noiommu-N; only the kernels that are built
        no-iommu)
            lab_iommu=() lab_cmdline=()
            lab_noiommu=Y ;;
        *) return 1 ;;
    esac
    topology_devices
}
LAB_TOPOLOGIES='default no-intremap no-iommu'

# Modules for the devices above; what is built in or not there is skipped.
LAB_DEVICE_MODULES='vfio vfio_iommu_type1 vfio-pci e1000e e1000 igb igbvf nvme virtio_net'
