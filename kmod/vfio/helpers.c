// SPDX-License-Identifier: GPL-2.0
/* C for what Rust can't call: static inlines, macros, and loops over them. */
#include <linux/cred.h>
#include <linux/fs.h>
#include <linux/jiffies.h>
#include <linux/memcontrol.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>

#include "helpers.h"

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

struct page *muser_alloc_page(struct mem_cgroup *memcg)
{
	struct mem_cgroup *before = set_active_memcg(memcg);
	struct page *page = alloc_page(GFP_KERNEL_ACCOUNT | __GFP_ZERO);

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

void *muser_page_address(struct page *page)
{
	return page_address(page);
}

void *muser_alloc_shared(size_t size)
{
	return __vmalloc(size, GFP_KERNEL_ACCOUNT | __GFP_ZERO);
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

void muser_copy(void *to, const void *from, size_t len)
{
	memcpy(to, from, len);
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
