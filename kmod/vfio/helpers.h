/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What bindgen makes bindings of: the kernel's headers, and C for what it can't express
 * (static inlines, function-like macros, constants that are casts).
 */
#ifndef MUSER_HELPERS_H
#define MUSER_HELPERS_H

#include <linux/anon_inodes.h>
#include <linux/cdev.h>
#include <linux/completion.h>
#include <linux/device.h>
#include <linux/eventfd.h>
#include <linux/file.h>
#include <linux/idr.h>
#include <linux/iova_bitmap.h>
#include <linux/mdev.h>
#include <linux/mm.h>
#include <linux/mount.h>
#include <linux/poll.h>
#include <linux/rwsem.h>
#include <linux/sched.h>
#include <linux/vfio.h>
#include <linux/wait.h>
#include <linux/xarray.h>

struct mem_cgroup;

enum muser_constants {
	MUSER_TASK_INTERRUPTIBLE = TASK_INTERRUPTIBLE,
	MUSER_TASK_KILLABLE = TASK_KILLABLE,
};

/* vfio */
void muser_vfio_put_device(struct vfio_device *vdev);

/* device memory: pages charged to a memory cgroup */
struct mem_cgroup *muser_memcg_of_current(void);
void muser_memcg_put(struct mem_cgroup *memcg);
struct page *muser_alloc_page(struct mem_cgroup *memcg);
void muser_get_page(struct page *page);
void muser_put_page(struct page *page);
void muser_lock_page(struct page *page);
void muser_unlock_page(struct page *page);
void *muser_page_address(struct page *page);

/* memory shared with a process */
void *muser_alloc_shared(size_t size);
void muser_free_shared(void *memory);
int muser_map_shared(struct vm_area_struct *vma, void *memory, size_t size);

/* pinned pages of a client, by the number of their page frames */
void muser_unpin(struct vfio_device *vdev, u64 first, size_t count);
int muser_pin(struct vfio_device *vdev, u64 first, size_t count, bool writable, u64 *frames);
size_t muser_copy_frame(u64 frame, size_t start, void __user *user, size_t len, bool to_frame);
u64 muser_page_frame(struct page *page);
u64 muser_zero_frame(void);
void muser_set_dirty(struct iova_bitmap *bitmap, unsigned long iova, size_t len);

/* windows which show them */
void muser_make_window(struct vm_area_struct *vma);
vm_fault_t muser_show_frame(struct vm_fault *vmf, u64 frame, bool writable);
bool muser_fault_is_remote(const struct vm_fault *vmf);
bool muser_fault_is_write(const struct vm_fault *vmf);

/* inodes without a name */
struct vfsmount *muser_mount(void);
struct inode *muser_inode(struct vfsmount *mount);
void muser_adopt(struct file *file, struct inode *inode);
void muser_zap(struct inode *inode, u64 offset, u64 len);

/* plain copies of memory which others change meanwhile: C allows what Rust does not */
void muser_copy(void *to, const void *from, size_t len);
size_t muser_copy_in(void *to, const void __user *from, size_t len);
void muser_clear(void *memory, size_t len);

/* waiting */
bool muser_fatal_signal_pending(void);
u64 muser_jiffies(void);

/* the character device */
void *muser_inode_cdev(struct inode *inode);
void muser_ida_init(struct ida *ida);
kuid_t muser_current_fsuid(void);
kgid_t muser_current_fsgid(void);
u32 muser_uid_value(kuid_t uid);
u32 muser_gid_value(kgid_t gid);
char *muser_devnode_name(const struct device *dev);
u32 muser_pid_in_current_ns(struct task_struct *task);

/* fields of struct vm_fault that lie in anonymous structs */
struct vm_area_struct *muser_fault_vma(struct vm_fault *vmf);
unsigned long muser_fault_pgoff(struct vm_fault *vmf);
unsigned long muser_vma_pgoff(struct vm_area_struct *vma);

#endif
