// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What comes through the handler, and what does not. A process has one handler, so what ends the
//! process or needs it fresh runs in a child: this very program, asked for one test that is
//! otherwise ignored.

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use vm_memory::Bytes;

use super::super::{page_size, Mapping};
use super::*;

fn page() -> usize {
    usize::try_from(page_size()).unwrap()
}

fn file(pages: usize) -> Arc<File> {
    let file = File::from(memfd_create("guard", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len((pages * page()) as u64).unwrap();
    Arc::new(file)
}

fn guarded(file: &Arc<File>, pages: usize) -> Mapping {
    Mapping::guarded(file, 0, pages * page(), true, page()).unwrap()
}

fn byte(mapping: &Mapping, page_number: usize) -> u8 {
    let slice = mapping.slice();
    slice.read_obj(page_number * page() + 7).unwrap()
}

fn set_byte(mapping: &Mapping, page_number: usize, value: u8) {
    let slice = mapping.slice();
    slice.write_obj(value, page_number * page() + 7).unwrap();
}

#[test]
fn cut_off_pages_read_as_zeroes_and_the_rest_stays() {
    let file = file(4);
    let (mapping, other) = (guarded(&file, 4), guarded(&file, 4));
    (0..4).for_each(|at| set_byte(&mapping, at, 0x55));
    file.set_len(2 * page_size()).unwrap();

    let seen = [3, 2, 1, 0].map(|at| byte(&mapping, at));

    assert_eq!(seen, [0, 0, 0x55, 0x55]);
    assert!(mapping.is_cut());
    assert!(!other.is_cut(), "nobody touched it");
    set_byte(&mapping, 1, 0x66);
    assert_eq!(byte(&other, 1), 0x66, "what is left is shared");
}

#[test]
fn write_to_what_was_cut_off_is_lost() {
    let file = file(2);
    let mapping = guarded(&file, 2);
    file.set_len(page_size()).unwrap();

    set_byte(&mapping, 1, 0x77);
    file.set_len(2 * page_size()).unwrap();

    assert_eq!(byte(&guarded(&file, 2), 1), 0);
}

#[test]
fn read_only_mapping_survives_as_well() {
    let file = file(1);
    let mapping = Mapping::guarded(&file, 0, page(), false, page()).unwrap();
    file.set_len(0).unwrap();

    assert_eq!(byte(&mapping, 0), 0);
}

#[test]
fn end_inside_a_page_takes_what_is_beyond_the_page() {
    let file = file(3);
    let mapping = guarded(&file, 3);
    (0..3).for_each(|at| set_byte(&mapping, at, 0x55));
    file.set_len(page_size() + 100).unwrap();

    assert_eq!([0, 1, 2].map(|at| byte(&mapping, at)), [0x55, 0x55, 0]);
}

#[test]
fn mapping_from_within_a_file_is_cut_where_the_file_is() {
    let file = file(4);
    let offset = 2 * page_size();
    let mapping = Mapping::guarded(&file, offset, 2 * page(), true, page()).unwrap();
    (0..2).for_each(|at| set_byte(&mapping, at, 0x55));
    file.set_len(3 * page_size()).unwrap();

    assert_eq!([1, 0].map(|at| byte(&mapping, at)), [0, 0x55]);
}

#[test]
fn many_threads_touch_what_is_being_cut() {
    const PAGES: usize = 64;
    let file = file(PAGES);
    let mapping = guarded(&file, PAGES);
    let start = Barrier::new(5);
    let cut = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (mapping, start, cut) = (&mapping, &start, &cut);
            scope.spawn(move || {
                start.wait();
                let mut last = false;
                while !last {
                    last = cut.load(Ordering::Acquire);
                    for at in 0..PAGES {
                        set_byte(mapping, (at * 7 + thread) % PAGES, 1);
                        byte(mapping, (at * 11 + thread) % PAGES);
                    }
                }
            });
        }
        start.wait();
        for pages in (0..PAGES as u64).rev() {
            file.set_len(pages * page_size()).unwrap();
        }
        cut.store(true, Ordering::Release);
    });
    assert_eq!(file.metadata().unwrap().len(), 0);
    assert!(mapping.is_cut());
}

#[test]
fn mappings_come_and_go_while_others_fault() {
    let until = Instant::now() + Duration::from_millis(300);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while Instant::now() < until {
                    let file = file(3);
                    let mappings = [1, 2, 3].map(|pages| guarded(&file, pages));
                    mappings.iter().for_each(|mapping| set_byte(mapping, 0, 1));
                    file.set_len(0).unwrap();
                    let seen = mappings.each_ref().map(|mapping| byte(mapping, 0));
                    assert_eq!(seen, [0, 0, 0]);
                }
            });
        }
    });
    let places = PLACES.load(Ordering::Acquire);
    assert!(places < 1000, "{places} places for what a few threads hold");
}

/// Names the scene that a child is to play.
const SCENE: &str = "MUSER_GUARD_SCENE";

/// How a process ends that does `play`: this program, asked for the test that calls this.
fn child(test: &str, scene: &str, play: impl FnOnce()) -> ExitStatus {
    match std::env::var(SCENE) {
        Ok(wanted) if wanted == scene => {
            play();
            std::process::exit(0);
        }
        Ok(_) => ExitStatus::default(),
        Err(_) => {
            let module = module_path!().split_once("::").unwrap().1;
            let name = format!("{module}::{test}");
            let mut command = Command::new(std::env::current_exe().unwrap());
            let output = command.args(["--exact", &name]).env(SCENE, scene).output();
            let output = output.unwrap();
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(text.contains("running 1 test"), "{name}: {text}");
            output.status
        }
    }
}

/// Whether this is a child, in which what `child` returns means nothing.
fn is_child() -> bool {
    std::env::var_os(SCENE).is_some()
}

/// A mapping that nobody guards, of a file that has become too short.
fn unguarded() -> Mapping {
    let file = file(1);
    let mapping = Mapping::new(std::os::fd::AsFd::as_fd(&*file), 0, page(), true).unwrap();
    file.set_len(0).unwrap();
    mapping
}

/// Has the handler installed.
fn install_by_mapping() {
    let file = file(1);
    let mapping = guarded(&file, 1);
    file.set_len(0).unwrap();
    assert_eq!(byte(&mapping, 0), 0);
}

fn install_before(handler: libc::sighandler_t, flags: libc::c_int) {
    // SAFETY: Zeroes are a good `sigaction`.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler;
    action.sa_flags = flags;
    super::action(Some(&action)).unwrap();
}

fn send() {
    nix::sys::signal::raise(nix::sys::signal::Signal::SIGBUS).unwrap();
}

#[test]
fn foreign_sigbus_still_kills() {
    let test = "foreign_sigbus_still_kills";
    let touched = child(test, "touched", || {
        install_by_mapping();
        byte(&unguarded(), 0);
    });
    let sent = child(test, "sent", || {
        // The standard library has a handler of its own, which would come first.
        install_before(libc::SIG_DFL, 0);
        install_by_mapping();
        send();
    });
    if !is_child() {
        assert_eq!(touched.signal(), Some(libc::SIGBUS));
        assert_eq!(sent.signal(), Some(libc::SIGBUS));
    }
}

#[test]
fn sigbus_that_was_ignored_stays_so_when_sent_but_not_when_caused() {
    let test = "sigbus_that_was_ignored_stays_so_when_sent_but_not_when_caused";
    let sent = child(test, "sent", || {
        install_before(libc::SIG_IGN, 0);
        install_by_mapping();
        send();
    });
    let touched = child(test, "touched", || {
        install_before(libc::SIG_IGN, 0);
        install_by_mapping();
        byte(&unguarded(), 0);
    });
    if !is_child() {
        assert_eq!(sent.code(), Some(0));
        assert_eq!(touched.signal(), Some(libc::SIGBUS));
    }
}

const REACHED: i32 = 42;

extern "C" fn leave(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: The handler was installed with `SA_SIGINFO`.
    let code = unsafe { (*info).si_code };
    let good = signal == libc::SIGBUS && code == libc::BUS_ADRERR;
    // SAFETY: `_exit` is async-signal-safe.
    unsafe { libc::_exit(if good { REACHED } else { 1 }) };
}

extern "C" fn leave_plainly(signal: libc::c_int) {
    let good = signal == libc::SIGBUS;
    // SAFETY: `_exit` is async-signal-safe.
    unsafe { libc::_exit(if good { REACHED } else { 1 }) };
}

#[test]
fn foreign_sigbus_reaches_the_handler_that_was_there() {
    let test = "foreign_sigbus_reaches_the_handler_that_was_there";
    let with_info = child(test, "with info", || {
        let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = leave;
        install_before(handler as libc::sighandler_t, libc::SA_SIGINFO);
        install_by_mapping();
        byte(&unguarded(), 0);
    });
    let plain = child(test, "plain", || {
        let handler: extern "C" fn(libc::c_int) = leave_plainly;
        install_before(handler as libc::sighandler_t, 0);
        install_by_mapping();
        byte(&unguarded(), 0);
    });
    if !is_child() {
        assert_eq!(with_info.code(), Some(REACHED));
        assert_eq!(plain.code(), Some(REACHED));
    }
}

/// No more memory of its own for this process than it has.
fn limit_data() {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let data = status.lines().find(|line| line.starts_with("VmData:"));
    let kib: u64 = data
        .unwrap()
        .split_whitespace()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap();
    let limit = libc::rlimit {
        rlim_cur: (kib + 4096) * 1024,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: `limit` leads to limits that are only read.
    let result = unsafe { libc::setrlimit(libc::RLIMIT_DATA, &raw const limit) };
    assert_eq!(result, 0);
}

#[test]
fn process_without_room_for_zeroes_survives_as_well() {
    const PAGES: usize = 1 << 16;
    let test = "process_without_room_for_zeroes_survives_as_well";
    let ended = child(test, "without room", || {
        let file = file(PAGES);
        let mapping = guarded(&file, PAGES);
        set_byte(&mapping, 0, 0x55);
        limit_data();
        file.set_len(page_size()).unwrap();
        for at in [9, 1, 5, PAGES - 1, 3] {
            assert_eq!(byte(&mapping, at), 0);
            set_byte(&mapping, at, 0x66);
        }
        assert_eq!(byte(&mapping, 0), 0x55, "what is left is left");
        assert!(
            mapping
                .guard
                .as_ref()
                .unwrap()
                .slot
                .spare
                .load(Ordering::Relaxed)
                < PAGES * page()
        );
        // Nobody finds what was written there.
        let start = mapping.slice().ptr_guard().as_ptr().addr();
        drop(mapping);
        let spare = std::mem::ManuallyDrop::new(unsafe_file(SPARE.load(Ordering::Relaxed)));
        let mut seen = [0xee];
        let at = (start + 9 * page() + 7) as u64;
        std::os::unix::fs::FileExt::read_exact_at(&*spare, &mut seen, at).unwrap();
        assert_eq!(seen, [0]);
    });
    if !is_child() {
        assert_eq!(ended.code(), Some(0));
    }
}

fn unsafe_file(number: i32) -> File {
    // SAFETY: The descriptor is open for ever, and the file is never dropped.
    unsafe { std::os::fd::FromRawFd::from_raw_fd(number) }
}
