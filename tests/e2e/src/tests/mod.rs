// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The tests, a file a topic; in the order in which they run.

mod attach;
mod attach_limit;
mod barrier;
mod clean;
mod close;
mod conformance;
mod counter;
mod dma;
mod dma_bad;
mod dma_dirty;
mod dma_library;
mod dma_pins;
mod dma_race;
mod dma_unmap;
mod dma_window;
mod doorbell;
mod faults;
mod gpio;
mod info;
mod interop;
mod ioctl;
mod irq;
mod irq_bad;
mod level;
mod mdevctl;
mod memory;
mod module;
mod muserctl;
mod owner;
mod parallel;
mod poller;
mod pressure;
mod quota;
mod reply;
mod request;
mod service;
mod standby;
mod state;
mod storm;
mod sysfs;
mod unprivileged;
mod vanish;
mod vfio_bad;
mod wait;

pub(crate) use self::conformance::run_case;
use crate::runner::{Body, Test};
use muser_e2e::vfio::Road;

/// Lists the tests of a topic: `once` those that need no road, `roads` those that run on each of
/// [`Road::ALL`], `dma` those that pin the client's memory and run on each of [`Road::DMA`].
macro_rules! topic {
    ($topic:literal, dma: [$($road:ident),* $(,)?]) => {
        /// The tests of this topic.
        pub(super) fn tests() -> Vec<$crate::runner::Test> {
            let roads: &[(&str, $crate::tests::OnRoad)] =
                &[$((concat!($topic, "::", stringify!($road)), $road)),*];
            roads.iter().flat_map(|&(name, run)| $crate::tests::dma_roads(name, run)).collect()
        }
    };
    ($topic:literal, once: [$($once:ident),* $(,)?], roads: [$($road:ident),* $(,)?]) => {
        /// The tests of this topic.
        pub(super) fn tests() -> Vec<$crate::runner::Test> {
            let once: &[(&str, $crate::tests::Once)] =
                &[$((concat!($topic, "::", stringify!($once)), $once)),*];
            let roads: &[(&str, $crate::tests::OnRoad)] =
                &[$((concat!($topic, "::", stringify!($road)), $road)),*];
            $crate::tests::list(once, roads)
        }
    };
}
use topic;

/// A test that needs no road.
type Once = fn() -> anyhow::Result<()>;

/// A test that runs on each road.
type OnRoad = fn(Road) -> anyhow::Result<()>;

fn list(once: &[(&str, Once)], roads: &[(&str, OnRoad)]) -> Vec<Test> {
    let once = once.iter().map(|&(name, run)| self::once(name, run));
    once.chain(roads.iter().flat_map(|&(name, run)| self::roads(name, run)))
        .collect()
}

fn once(name: &str, run: Once) -> Test {
    test(name.to_owned(), Body::Once(run))
}

fn roads(name: &str, run: OnRoad) -> impl Iterator<Item = Test> {
    Road::ALL
        .into_iter()
        .map(move |road| test(format!("{name}@{road}"), Body::On(road, run)))
}

fn dma_roads(name: &str, run: OnRoad) -> impl Iterator<Item = Test> {
    Road::DMA
        .into_iter()
        .map(move |road| test(format!("{name}@{road}"), Body::On(road, run)).pinning())
}

fn test(name: String, body: Body) -> Test {
    Test {
        name,
        body,
        lacking: || None,
        patience: 1,
        pins: false,
        injects: false,
    }
}

/// All tests.
pub(crate) fn all() -> Vec<Test> {
    let topics: &[fn() -> Vec<Test>] = &[
        module::tests,
        module::long,
        sysfs::tests,
        owner::tests,
        quota::tests,
        pressure::tests,
        attach::tests,
        attach_limit::tests,
        ioctl::tests,
        info::tests,
        vfio_bad::tests,
        request::tests,
        parallel::tests,
        barrier::tests,
        reply::tests,
        vanish::tests,
        wait::tests,
        standby::tests,
        irq::tests,
        irq_bad::tests,
        level::tests,
        memory::tests,
        dma::tests,
        dma::huge,
        dma_window::tests,
        dma_window::huge,
        dma_pins::tests,
        state::tests,
        dma_unmap::tests,
        dma_bad::tests,
        dma_race::tests,
        dma_dirty::where_it_logs,
        dma_library::tests,
        doorbell::tests,
        close::tests,
        storm::tests,
        faults::tests,
        interop::tests,
        conformance::tests,
        poller::tests,
        gpio::where_installed,
        counter::where_installed,
        muserctl::where_installed,
        mdevctl::where_installed,
        unprivileged::where_installed,
        service::where_installed,
        clean::tests,
    ];
    topics.iter().flat_map(|topic| topic()).collect()
}

/// Why a program can't be run: it is not there.
fn missing(program: &str) -> Option<String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).any(|directory| directory.join(program).exists());
    (!found).then(|| format!("{program} is not in this guest"))
}
