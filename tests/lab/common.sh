# shellcheck shell=bash
# Shared by the lab's scripts; sourced, not run.
# shellcheck disable=SC2034  # the variables are for those who source this

LAB_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
LAB_CACHE=${VFIO_LAB_CACHE:-/var/cache/vfio-broker-lab}

# Exit status when the lab itself fails, not the program that it ran.
LAB_FAILED=125
# The guest hung before the program started.
LAB_HUNG=123

say() { printf 'lab: %s\n' "$*" >&2; }
die() { say "$*"; exit "$LAB_FAILED"; }

# What the lab boots. A series, never a full version: the newest that the
# archive offers is taken.
#   stock:  Debian's own image; VFIO groups, containers, type1; no iommufd,
#           no cdev, no no-IOMMU
#   built:  from Debian's source package with kernel.config: all of it
# name      how    series
LAB_KERNELS='
6.1         stock  6.1
6.12        built  6.12
7.2         stock  7.2
7.2-cdev    built  7.2
'
# What `setup` makes unless it is told; 7.2-cdev takes another long build.
LAB_KERNELS_DEFAULT=(6.1 6.12 7.2)

kernel_names() { awk 'NF { print $1 }' <<<"$LAB_KERNELS"; }
kernel_how()    { awk -v n="$1" '$1 == n { print $2 }' <<<"$LAB_KERNELS"; }
kernel_series() { awk -v n="$1" '$1 == n { print $3 }' <<<"$LAB_KERNELS"; }

# A built kernel is known by its options, not by the comments beside them.
config_hash() { grep '^CONFIG_' "$LAB_DIR/kernel.config" | sort | sha256sum | cut -c1-12; }

# What distinguishes this kernel in the cache from others of its series.
kernel_key() {
    case $(kernel_how "$1") in
        stock) echo "$(kernel_series "$1")-stock" ;;
        built) echo "$(kernel_series "$1")-built-$(config_hash)" ;;
        *) die "no kernel named '$1'; there are: $(kernel_names | xargs)" ;;
    esac
}

# The newest cached kernel of that name; fails when there is none.
# Its directory holds kernel, config, modules/ (a /lib/modules) and release.
kernel_dir() {
    local key kernel
    key=$(kernel_key "$1")
    kernel=$(find "$LAB_CACHE/kernels" -mindepth 2 -maxdepth 2 -path "*/$key@*/kernel" 2>/dev/null |
        sort -V | tail -n 1)
    [[ -n $kernel ]] && dirname "$kernel"
}

# The initramfs belongs to the kernel and to what is put into it.
initramfs_of() { # kernel-dir
    local h
    h=$(cat "$LAB_DIR/guest/init" "$LAB_DIR/guest/boot-modules" /bin/busybox | sha256sum | cut -c1-12)
    echo "$1/initramfs-$h.gz"
}
