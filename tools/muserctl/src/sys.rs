// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The system calls that the standard library does not have: the only unsafe code of muserctl.

use muser_uapi::{muser_area, muser_irq_state, muser_query, muser_region, MUSER_QUERY};
use nix::sys::signal::SigSet;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Room for one of the arrays at first; the module says how much there really is.
const ROOM: usize = 8;
/// How often the description may grow between two calls before we give up.
const ATTEMPTS: usize = 8;

/// What `MUSER_QUERY` answers, with its arrays.
#[derive(Clone, Debug, Default)]
pub(crate) struct Query {
    /// The struct; its pointers and counts mean nothing here.
    pub(crate) head: muser_query,
    /// Regions.
    pub(crate) regions: Vec<muser_region>,
    /// Areas of all regions, in their order.
    pub(crate) areas: Vec<muser_area>,
    /// Interrupt indexes.
    pub(crate) irqs: Vec<muser_irq_state>,
}

/// Asks the device behind `node` for its state.
pub(crate) fn query(node: &File) -> io::Result<Query> {
    let mut query = Query {
        regions: vec![muser_region::default(); ROOM],
        areas: vec![muser_area::default(); ROOM],
        irqs: vec![muser_irq_state::default(); ROOM],
        ..Query::default()
    };
    for _ in 0..ATTEMPTS {
        query.head = muser_query {
            size: u32::try_from(size_of::<muser_query>()).unwrap_or(u32::MAX),
            num_regions: count(&query.regions),
            num_areas: count(&query.areas),
            num_irqs: count(&query.irqs),
            regions: address(&mut query.regions),
            areas: address(&mut query.areas),
            irqs: address(&mut query.irqs),
            ..muser_query::default()
        };
        // SAFETY: the argument is a `muser_query` of the size it says, and its three addresses
        // lead to arrays of as many elements as it says, all of which outlive the call. Any bytes
        // that the kernel writes there are a valid value.
        let result = unsafe {
            libc::ioctl(
                node.as_raw_fd(),
                libc::Ioctl::from(MUSER_QUERY),
                &raw mut query.head,
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        let fits = [
            fit(&mut query.regions, query.head.num_regions),
            fit(&mut query.areas, query.head.num_areas),
            fit(&mut query.irqs, query.head.num_irqs),
        ];
        if fits == [true; 3] {
            return Ok(query);
        }
    }
    Err(io::Error::other("the description does not stop growing"))
}

/// Has the process of a command be killed when this one ends, in whatever way, and get all signals,
/// also those that this one has blocked.
pub(crate) fn make_child(command: &mut Command) {
    let parent = std::process::id();
    // With its own children it is told to end, and by nobody but this process.
    command.process_group(0);
    let make_child = move || {
        SigSet::empty().thread_set_mask()?;
        // SAFETY: prctl takes numbers only here.
        let result = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        // The parent may have ended before.
        match std::os::unix::process::parent_id() == parent {
            true => Ok(()),
            false => Err(io::Error::from_raw_os_error(libc::ESRCH)),
        }
    };
    // SAFETY: between fork and exec, the function makes three system calls and allocates nothing.
    unsafe { command.pre_exec(make_child) };
}

/// Bytes of a page of memory.
pub(crate) fn page_size() -> u64 {
    // SAFETY: sysconf takes no pointer.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(size).unwrap_or(4096)
}

fn count<T>(elements: &[T]) -> u32 {
    u32::try_from(elements.len()).unwrap_or(u32::MAX)
}

fn address<T>(elements: &mut [T]) -> u64 {
    elements.as_mut_ptr().expose_provenance() as u64
}

/// Makes the array `there` long; false if it was too short for that many.
fn fit<T: Clone + Default>(elements: &mut Vec<T>, there: u32) -> bool {
    let there = usize::try_from(there).unwrap_or(usize::MAX).min(1 << 16);
    let fits = there <= elements.len();
    elements.resize(there, T::default());
    fits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn query_of_a_plain_file_is_enotty() {
        let file = File::open("/dev/null").unwrap();
        let error = query(&file).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
    }

    #[test]
    fn arrays_grow_to_what_is_there_and_say_so() {
        let mut elements = vec![0u8; 4];
        assert!(!fit(&mut elements, 9));
        assert_eq!(elements.len(), 9);
        assert!(fit(&mut elements, 9));
        assert!(fit(&mut elements, 2));
        assert_eq!(elements.len(), 2);
    }
}
