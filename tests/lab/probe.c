/* What the self-test runs in the guest: the legacy VFIO sequence on one device,
 * with real DMA when it is QEMU's edu. Prints one line a step.
 * probe BDF [errno expected from SET_IOMMU] */
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <linux/vfio.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

static int must(int r, const char *what)
{
	if (r < 0) {
		printf("FAIL %s: %s\n", what, strerror(errno));
		exit(1);
	}
	return r;
}

static void edu_dma(int device, uint64_t region, char *ram, uint64_t iova)
{
	/* edu: source, destination, count, command; its buffer is at 0x40000 */
	enum { SRC = 0x80, DST = 0x88, COUNT = 0x90, CMD = 0x98, BUFFER = 0x40000 };
	for (int out = 0; out < 2; out++) {
		uint64_t regs[4] = { iova, BUFFER, 256, 1 };
		if (out) {
			regs[0] = BUFFER;
			regs[1] = iova + 4096;
			regs[3] = 3;
		}
		for (int i = 0; i < 4; i++)
			must(pwrite(device, &regs[i], 8, region + SRC + 8 * i) == 8 ? 0 : -1, "write edu register");
		for (int tries = 0;; tries++) {
			uint64_t cmd;
			must(pread(device, &cmd, 8, region + CMD) == 8 ? 0 : -1, "read edu register");
			if (!(cmd & 1))
				break;
			must(tries < 500 ? 0 : -1, "edu DMA ends");
			usleep(10000);
		}
	}
	must(memcmp(ram, ram + 4096, 256) ? -1 : 0, "DMA brings back what it took");
	printf("ok DMA\n");
}

int main(int argc, char **argv)
{
	const size_t size = 4 << 20;
	const uint64_t iova = 0x10000000;
	char path[128], link[256];
	int expected = argc > 2 ? atoi(argv[2]) : 0;

	if (argc < 2)
		return 2;
	snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/iommu_group", argv[1]);
	ssize_t n = must(readlink(path, link, sizeof link - 1), path);
	link[n] = 0;
	snprintf(path, sizeof path, "/dev/vfio/%s", basename(link));

	int container = must(open("/dev/vfio/vfio", O_RDWR | O_CLOEXEC), "open container");
	int group = must(open(path, O_RDWR | O_CLOEXEC), path);
	struct vfio_group_status status = { .argsz = sizeof status };
	must(ioctl(group, VFIO_GROUP_GET_STATUS, &status), "GET_STATUS");
	must(status.flags & VFIO_GROUP_FLAGS_VIABLE ? 0 : -1, "viable");
	must(ioctl(group, VFIO_GROUP_SET_CONTAINER, &container), "SET_CONTAINER");
	int r = ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU);
	if (expected) {
		must(r < 0 && errno == expected ? 0 : -1, "SET_IOMMU with the expected error");
		printf("PASS %s: SET_IOMMU gives %s\n", path, strerror(expected));
		return 0;
	}
	must(r, "SET_IOMMU");
	printf("ok %s\n", path);

	char *ram = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	must(ram == MAP_FAILED ? -1 : 0, "mmap");
	for (int i = 0; i < 256; i++)
		ram[i] = (char)(i * 7 + 3);
	struct vfio_iommu_type1_dma_map map = {
		.argsz = sizeof map, .flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
		.vaddr = (uintptr_t)ram, .iova = iova, .size = size,
	};
	must(ioctl(container, VFIO_IOMMU_MAP_DMA, &map), "MAP_DMA");

	int device = must(ioctl(group, VFIO_GROUP_GET_DEVICE_FD, argv[1]), "GET_DEVICE_FD");
	struct vfio_region_info config = { .argsz = sizeof config, .index = VFIO_PCI_CONFIG_REGION_INDEX };
	must(ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &config), "GET_REGION_INFO");
	uint16_t id[3];
	must(pread(device, id, sizeof id, config.offset) == sizeof id ? 0 : -1, "read config");
	printf("ok device %04x:%04x\n", id[0], id[1]);
	if (id[0] == 0x1234 && id[1] == 0x11e8) {
		uint16_t command = id[2] | 6; /* memory, bus master */
		must(pwrite(device, &command, 2, config.offset + 4) == 2 ? 0 : -1, "write config");
		struct vfio_region_info bar = { .argsz = sizeof bar, .index = VFIO_PCI_BAR0_REGION_INDEX };
		must(ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &bar), "GET_REGION_INFO");
		edu_dma(device, bar.offset, ram, iova);
	}
	struct vfio_iommu_type1_dma_unmap unmap = { .argsz = sizeof unmap, .iova = iova, .size = size };
	must(ioctl(container, VFIO_IOMMU_UNMAP_DMA, &unmap), "UNMAP_DMA");
	must(unmap.size == size ? 0 : -1, "UNMAP_DMA reports all");
	printf("PASS %s\n", argv[1]);
	return 0;
}
