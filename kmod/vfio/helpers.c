// SPDX-License-Identifier: GPL-2.0
/* C for what Rust can't call: static inlines, macros, and loops over them. */
#include <linux/cred.h>
#include <linux/fs.h>
#include <linux/iommu.h>
#include <linux/jiffies.h>
#include <linux/memcontrol.h>
#include <linux/pagemap.h>
#include <linux/pseudo_fs.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>

#include "helpers.h"

/* Of statfs; nobody sees it. */
#define MUSER_FS_MAGIC 0x6d757365

/* iova_bitmap_set() */
MODULE_IMPORT_NS("IOMMUFD");

void muser_vfio_put_device(struct vfio_device *vdev)
{
	vfio_put_device(vdev);
}

struct mem_cgroup *muser_memcg_of_current(void)
{
	return get_mem_cgroup_from_mm(current->mm);
}

void muser_memcg_put(struct mem_cgroup *memcg)
{
	mem_cgroup_put(memcg);
}

/*
 * Where the cgroup has no more, nothing is killed for it: who touches the page is told, and may be
 * of another cgroup than the tasks that would be killed.
 */
struct page *muser_alloc_page(struct mem_cgroup *memcg)
{
	struct mem_cgroup *before = set_active_memcg(memcg);
	struct page *page = alloc_page(GFP_KERNEL_ACCOUNT | __GFP_ZERO | __GFP_RETRY_MAYFAIL |
				       __GFP_NOWARN);

	set_active_memcg(before);
	return page;
}

void muser_get_page(struct page *page)
{
	get_page(page);
}

void muser_put_page(struct page *page)
{
	put_page(page);
}

void muser_lock_page(struct page *page)
{
	lock_page(page);
}

void muser_unlock_page(struct page *page)
{
	unlock_page(page);
}

void *muser_page_address(struct page *page)
{
	return page_address(page);
}

void *muser_alloc_shared(size_t size)
{
	return __vmalloc(size, GFP_KERNEL_ACCOUNT | __GFP_ZERO | __GFP_RETRY_MAYFAIL |
			       __GFP_NOWARN);
}

void muser_free_shared(void *memory)
{
	vfree(memory);
}

int muser_map_shared(struct vm_area_struct *vma, void *memory, size_t size)
{
	size_t done;
	int ret;

	for (done = 0; done < size; done += PAGE_SIZE) {
		ret = vm_insert_page(vma, vma->vm_start + done, vmalloc_to_page(memory + done));
		if (ret)
			return ret;
	}
	return 0;
}

/* Unpins pages one by one: IOMMUFD unpins only what one call has pinned, and all of that. */
void muser_unpin(struct vfio_device *vdev, u64 first, size_t count)
{
	size_t i;

	for (i = 0; i < count; i++)
		vfio_unpin_pages(vdev, (first + i) << PAGE_SHIFT, 1);
}

/* Pins `count` pages one by one, or none. */
int muser_pin(struct vfio_device *vdev, u64 first, size_t count, bool writable, u64 *frames)
{
	int prot = IOMMU_READ | (writable ? IOMMU_WRITE : 0);
	struct page *page;
	size_t i;
	int ret;

	for (i = 0; i < count; i++) {
		ret = vfio_pin_pages(vdev, (first + i) << PAGE_SHIFT, 1, prot, &page);
		if (ret != 1) {
			muser_unpin(vdev, first, i);
			return ret < 0 ? ret : -EFAULT;
		}
		frames[i] = page_to_pfn(page);
		/* Another device's registers have no address in the kernel. */
		if (PageReserved(page) && !is_zero_pfn(frames[i])) {
			muser_unpin(vdev, first, i + 1);
			return -EFAULT;
		}
	}
	return 0;
}

/* Returns what was not copied, and changes none of that. Never waits for a page. */
size_t muser_copy_frame(u64 frame, size_t start, void __user *user, size_t len, bool to_frame)
{
	void *at = page_address(pfn_to_page(frame)) + start;
	size_t missed = len;

	if (!access_ok(user, len))
		return len;
	pagefault_disable();
	if (to_frame)
		missed = __copy_from_user_inatomic(at, user, len);
	else
		missed = __copy_to_user_inatomic(user, at, len);
	pagefault_enable();
	return missed;
}

u64 muser_page_frame(struct page *page)
{
	return page_to_pfn(page);
}

u64 muser_zero_frame(void)
{
	return page_to_pfn(ZERO_PAGE(0));
}

void muser_set_dirty(struct iova_bitmap *bitmap, unsigned long iova, size_t len)
{
	iova_bitmap_set(bitmap, iova, len);
}

void muser_make_window(struct vm_area_struct *vma)
{
	vm_flags_set(vma, VM_PFNMAP | VM_IO | VM_DONTEXPAND | VM_DONTDUMP | VM_DONTCOPY);
}

vm_fault_t muser_show_frame(struct vm_fault *vmf, u64 frame, bool writable)
{
	struct vm_area_struct *vma = vmf->vma;
	pgprot_t prot = writable ? vm_get_page_prot(vma->vm_flags) : vma->vm_page_prot;

	return vmf_insert_pfn_prot(vma, vmf->address, frame, prot);
}

bool muser_fault_is_remote(const struct vm_fault *vmf)
{
	return vmf->flags & FAULT_FLAG_REMOTE;
}

bool muser_fault_is_write(const struct vm_fault *vmf)
{
	return vmf->flags & FAULT_FLAG_WRITE;
}

static int muser_init_fs_context(struct fs_context *fc)
{
	return init_pseudo(fc, MUSER_FS_MAGIC) ? 0 : -ENOMEM;
}

/*
 * No owner: the mount is the module's own, and lives as long as it is loaded. It
 * would hold a reference to itself.
 */
static struct file_system_type muser_fs_type = {
	.name = "muser",
	.init_fs_context = muser_init_fs_context,
	.kill_sb = kill_anon_super,
};

struct vfsmount *muser_mount(void)
{
	return kern_mount(&muser_fs_type);
}

struct inode *muser_inode(struct vfsmount *mount)
{
	return alloc_anon_inode(mount->mnt_sb);
}

void muser_adopt(struct file *file, struct inode *inode)
{
	file->f_mapping = inode->i_mapping;
}

void muser_zap(struct inode *inode, u64 offset, u64 len)
{
	unmap_mapping_range(inode->i_mapping, offset, len, 1);
}

void muser_copy(void *to, const void *from, size_t len)
{
	memcpy(to, from, len);
}

/* copy_from_user() makes zeroes of what it misses, which here is somebody's memory. */
size_t muser_copy_in(void *to, const void __user *from, size_t len)
{
	return access_ok(from, len) ? __copy_from_user(to, from, len) : len;
}

void muser_clear(void *memory, size_t len)
{
	memset(memory, 0, len);
}

bool muser_fatal_signal_pending(void)
{
	return fatal_signal_pending(current);
}

u64 muser_jiffies(void)
{
	return get_jiffies_64();
}

void *muser_inode_cdev(struct inode *inode)
{
	return inode->i_cdev;
}

void muser_ida_init(struct ida *ida)
{
	ida_init(ida);
}

kuid_t muser_current_fsuid(void)
{
	return current_fsuid();
}

kgid_t muser_current_fsgid(void)
{
	return current_fsgid();
}

u32 muser_uid_value(kuid_t uid)
{
	return from_kuid(&init_user_ns, uid);
}

u32 muser_gid_value(kgid_t gid)
{
	return from_kgid(&init_user_ns, gid);
}

char *muser_devnode_name(const struct device *dev)
{
	return kasprintf(GFP_KERNEL, "muser/%s", dev_name(dev));
}

u32 muser_pid_in_current_ns(struct task_struct *task)
{
	return task_tgid_vnr(task);
}

struct vm_area_struct *muser_fault_vma(struct vm_fault *vmf)
{
	return vmf->vma;
}

unsigned long muser_fault_pgoff(struct vm_fault *vmf)
{
	return vmf->pgoff;
}

unsigned long muser_vma_pgoff(struct vm_area_struct *vma)
{
	return vma->vm_pgoff;
}
