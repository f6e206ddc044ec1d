// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Servers and clients that come and go.

#![expect(clippy::unwrap_used, reason = "a test that can't go on panics")]

use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use libmuser::transport::memory::{self, Host, IrqAction, IrqData};
use libmuser::transport::{AttachOptions, Take, Transport};
use libmuser::{Access, Bar, Device, Ended, PciBuilder, PciModel, Region, Reset, Result, Server};
use libmuser::{SharedMemory, Stop};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};

mod common;
use common::{count, errno, fired, Event, Running, DEADLINE, INTX};

struct Null;
impl Device for Null {}

fn model() -> PciModel {
    let bar = Bar::memory32(0x4000)
        .mappable(0x1000..0x2000)
        .mappable(0x3000..0x4000);
    PciBuilder::new(1, 2)
        .interrupt_pin(libmuser::Pin::A)
        .bar(0, bar)
        .build()
        .unwrap()
}

fn is_readable(fd: &impl AsFd) -> bool {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).unwrap() == 1
}

/// Waits until a request is there.
fn wait_readable(fd: &impl AsFd) {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(DEADLINE).unwrap();
    assert_eq!(poll(&mut fds, timeout).unwrap(), 1, "no request came");
}

#[test]
fn device_not_described_can_not_be_opened() {
    let (_transport, host) = memory::pair().unwrap();

    assert_eq!(errno(host.open()), libc::ENXIO);
}

#[test]
fn second_server_is_refused() {
    let (client, running) = Running::start(model());

    let second = Server::new(model(), running.host.transport(), |_| Ok(Null)).unwrap_err();

    assert!(second.is_busy(), "{second}");
    assert_eq!(client.read(0, 0, &mut [0]).unwrap(), 1);
}

#[test]
fn server_with_another_device_is_refused() {
    let (transport, host) = memory::pair().unwrap();
    drop(Server::new(model(), transport, |_| Ok(Null)).unwrap());
    let other = PciBuilder::new(1, 2)
        .bar(0, Bar::memory32(0x8000))
        .build()
        .unwrap();

    let error = Server::new(other, host.transport(), |_| Ok(Null)).unwrap_err();

    assert!(error.is_refused() && !error.is_busy(), "{error}");
    assert_eq!(error.errno().number(), libc::ESTALE);
    let text = error.to_string();
    assert!(
        text.contains("BAR 0 was described with another size"),
        "{text}"
    );
}

#[test]
fn successor_with_other_state_is_refused_before_it_has_the_device() {
    let keeping = |device, bytes| {
        let builder = PciBuilder::new(1, device).bar(0, Bar::memory32(0x100));
        builder.state(bytes).build().unwrap()
    };
    let (client, running) = Running::start(keeping(2, 8));
    let standby = AttachOptions::new().standby(true);

    // The number of bytes and configuration space differ, which clients are not described.
    for model in [keeping(2, 16), keeping(3, 8)] {
        let transport = running.host.transport();
        let error = Server::attach(model, transport, &standby, |_| Ok(Null)).unwrap_err();

        assert!(error.is_refused() && !error.is_busy(), "{error}");
        assert_eq!(error.errno().number(), libc::ESTALE);
        assert!(error.to_string().contains("state"), "{error}");
        assert_eq!(client.read(0, 0, &mut [0]).unwrap(), 1);
    }
    let next = keeping(2, 8);
    let transport = running.host.transport();
    let next = Server::attach(next, transport, &standby, |bus| {
        assert!(bus.is_recovered());
        Ok(Null)
    });
    assert!(next.is_ok());
    assert_eq!(running.wait().unwrap(), Ended::HandedOver);
}

#[test]
fn error_of_the_constructor_is_returned_and_detaches() {
    let (transport, host) = memory::pair().unwrap();

    let failed = Server::<Null>::new(model(), transport, |_| Err(libmuser::Errno::ENOMEM.into()));

    assert_eq!(failed.unwrap_err().errno().number(), libc::ENOMEM);
    assert!(Server::new(model(), host.transport(), |_| Ok(Null)).is_ok());
}

#[test]
fn removed_device_ends_the_server_and_its_clients() {
    let (client, running) = Running::start(model());

    running.host.remove();

    assert_eq!(running.wait().unwrap(), Ended::Removed);
    assert_eq!(errno(client.read(0, 0, &mut [0])), libc::ENODEV);
    assert_eq!(errno(running.host.open()), libc::ENODEV);
}

#[test]
fn device_that_nobody_holds_is_removed() {
    let (client, Running { host, ended, .. }) = Running::start(model());
    drop(client);

    drop(host);

    assert_eq!(
        ended.recv_timeout(DEADLINE).unwrap().unwrap(),
        Ended::Removed
    );
}

#[test]
fn last_close_disables_interrupts_and_resets() {
    let (client, running) = Running::start(model());
    let counters = count(&client, INTX, 1);
    let second = running.host.open().unwrap();
    let interrupts = running.recorder.bus().interrupts();

    drop(client);
    interrupts.raise(0).unwrap();
    assert_eq!(fired(&counters), [1]);
    interrupts.lower(0).unwrap();
    let unmask = IrqData::None(1);
    second.set_irqs(INTX, 0, IrqAction::Unmask, unmask).unwrap();
    drop(second);

    let next = running.host.open().unwrap();
    next.read(0, 0, &mut [0]).unwrap();
    let events = running.recorder.take_events();
    assert_eq!(events, [Event::Reset(Reset::Close), Event::Read(0, 1)]);
    interrupts.raise(0).unwrap();
    assert_eq!(fired(&counters), [1]);
}

#[test]
fn request_without_server_times_out() {
    let (transport, host) = memory::pair().unwrap();
    drop(Server::new(model(), transport, |_| Ok(Null)).unwrap());
    host.set_reattach_timeout(Duration::from_millis(20));
    let client = host.open().unwrap();

    assert_eq!(errno(client.read(0, 0, &mut [0])), libc::ETIMEDOUT);

    // It was withdrawn: the next server does not find it.
    let server = Server::new(model(), host.transport(), |_| Ok(Null)).unwrap();
    assert!(!is_readable(&server));
}

/// Panics at its first read, without which it can't be made to leave a request unanswered.
struct Fragile(mpsc::Sender<()>);
impl Device for Fragile {
    fn read(&mut self, access: Access) -> Result<u64> {
        if access.offset == 8 {
            panic!("offset 8");
        }
        let _ = self.0.send(());
        Ok(7)
    }
}

#[test]
fn panic_fails_the_request_and_ends_the_server() {
    let (transport, host) = memory::pair().unwrap();
    let (sender, _reads) = mpsc::channel();
    let mut server = Server::new(model(), transport, |_| Ok(Fragile(sender))).unwrap();
    let client = host.open().unwrap();
    let serving = thread::spawn(move || (server.run(), server));

    assert_eq!(errno(client.read(0, 8, &mut [0])), libc::EIO);

    let (ended, mut server) = serving.join().unwrap();
    let error = ended.unwrap_err();
    assert!(
        error.is_panicked() && error.to_string().contains("offset 8"),
        "{error}"
    );
    assert!(server.process().unwrap_err().is_panicked());
    assert!(server.run().unwrap_err().is_panicked());
}

/// Takes a request and goes away without a reply.
fn take_and_leave(host: &Host) {
    let mut transport = host.transport();
    transport
        .attach(model().description(), &AttachOptions::new())
        .unwrap();
    let request = transport.turn(None, Take::Wait, &mut Vec::new()).unwrap();
    assert!(!request.unwrap().replay);
}

#[test]
fn request_left_behind_is_replayed_to_the_next_server() {
    let (transport, host) = memory::pair().unwrap();
    drop(Server::new(model(), transport, |_| Ok(Null)).unwrap());
    let client = host.open().unwrap();
    let reading = thread::spawn(move || {
        let mut data = [0; 2];
        client.read(0, 4, &mut data).map(|_| data)
    });
    take_and_leave(&host);

    let running = Running::attach(model(), host.transport(), host.clone());

    assert_eq!(reading.join().unwrap().unwrap(), [4, 5]);
    let events = running.recorder.take_events();
    assert_eq!(events[..2], [Event::Read(4, 2), Event::Replay(4)]);
}

#[test]
fn requests_left_behind_are_replayed_in_order() {
    let (mut transport, host) = memory::pair().unwrap();
    transport
        .attach(model().description(), &AttachOptions::new())
        .unwrap();
    let mut reading = Vec::new();
    for offset in [3, 1, 2] {
        let client = host.open().unwrap();
        reading.push(thread::spawn(move || client.read(0, offset, &mut [0])));
        transport.turn(None, Take::Wait, &mut Vec::new()).unwrap();
    }
    drop(transport);

    let running = Running::attach(model(), host.transport(), host.clone());

    for thread in reading {
        assert_eq!(thread.join().unwrap().unwrap(), 1);
    }
    let events = running.recorder.take_events();
    let replayed = events
        .iter()
        .filter(|event| matches!(event, Event::Replay(_)));
    assert!(replayed.eq([3, 1, 2].map(Event::Replay).iter()));
}

#[test]
fn stopped_server_stops_and_can_go_on() {
    let (transport, host) = memory::pair().unwrap();
    let mut server = Server::new(model(), transport, |_| Ok(Null)).unwrap();
    let client = host.open().unwrap();
    let stop = Stop::new().unwrap();
    let handle = stop.clone();

    let serving = thread::spawn(move || (server.run_until(&stop), server));
    assert_eq!(client.read(0, 0, &mut [0]).unwrap(), 1);
    handle.stop();
    let (ended, mut server) = serving.join().unwrap();

    assert_eq!(ended.unwrap(), Ended::Stopped);
    let serving = thread::spawn(move || server.run());
    assert_eq!(client.read(0, 0, &mut [0]).unwrap(), 1);
    host.remove();
    assert_eq!(serving.join().unwrap().unwrap(), Ended::Removed);
}

/// Answers when the next request is queued already.
struct Busy {
    queue: OwnedFd,
    answers: mpsc::Sender<()>,
}

impl Device for Busy {
    fn read(&mut self, _access: Access) -> Result<u64> {
        wait_readable(&self.queue);
        let _ = self.answers.send(());
        Ok(0)
    }
}

#[test]
fn server_that_always_has_work_stops() {
    let (transport, host) = memory::pair().unwrap();
    let queue = transport.as_fd().try_clone_to_owned().unwrap();
    let (answers, answered) = mpsc::channel();
    let mut server = Server::new(model(), transport, |_| Ok(Busy { queue, answers })).unwrap();
    let clients = [host.open().unwrap(), host.open().unwrap()];
    let reading = clients.map(|client| {
        // Until the device is removed.
        thread::spawn(move || while client.read(0, 0, &mut [0]).is_ok() {})
    });
    let stop = Stop::new().unwrap();
    let handle = stop.clone();
    let (sender, ended) = mpsc::channel();
    let serving = thread::spawn(move || sender.send(server.run_until(&stop)));
    for _ in 0..100 {
        answered.recv_timeout(DEADLINE).unwrap();
    }

    handle.stop();

    let ended = ended.recv_timeout(DEADLINE).expect("it did not stop");
    assert_eq!(ended.unwrap(), Ended::Stopped);
    host.remove();
    for thread in reading {
        thread.join().unwrap();
    }
    serving.join().unwrap().unwrap();
}

#[test]
fn server_waiting_for_its_stop_sees_the_removal() {
    let (transport, host) = memory::pair().unwrap();
    let mut server = Server::new(model(), transport, |_| Ok(Null)).unwrap();
    let serving = thread::spawn(move || server.run_until(&Stop::new()?));

    host.remove();

    assert_eq!(serving.join().unwrap().unwrap(), Ended::Removed);
}

#[test]
fn server_in_a_loop_of_its_own_is_readable_when_there_is_work() {
    let (transport, host) = memory::pair().unwrap();
    let mut server = Server::new(model(), transport, |_| Ok(Null)).unwrap();
    let client = host.open().unwrap();
    assert!(!is_readable(&server));
    assert!(!server.process().unwrap());

    let reading = thread::spawn(move || client.read(0, 0, &mut [0]).unwrap());
    wait_readable(&server);
    assert!(server.process().unwrap());
    assert_eq!(reading.join().unwrap(), 1);

    // The client is closed by now, which resets the device.
    wait_readable(&server);
    assert!(server.process().unwrap());
    assert!(!is_readable(&server));
    host.remove();
    assert!(is_readable(&server));
    assert!(server.process().unwrap_err().is_removed());
}

#[test]
fn shared_memory_is_the_same_from_every_side() {
    let (client, running) = Running::start(model());
    let device: SharedMemory = running
        .recorder
        .bus()
        .memory(Region::Bar(0), 0x1000)
        .unwrap();
    let mapped = client.map(0, 0x1000).unwrap();

    device.write(0x10, 0x1122_3344_u32).unwrap();
    let mut data = [0; 4];
    client.read(0, 0x1010, &mut data).unwrap();
    assert_eq!(data, [0x44, 0x33, 0x22, 0x11]);
    client.write(0, 0x1ff8, &[9; 8]).unwrap();
    assert_eq!(mapped.read::<u64>(0xff8).unwrap(), 0x0909_0909_0909_0909);
    mapped.store(0x20, 5_u64).unwrap();
    assert_eq!(device.load::<u64>(0x20).unwrap(), 5);

    assert_eq!(running.recorder.take_events(), []);
    device.clear();
    assert_eq!(mapped.read::<u64>(0xff8).unwrap(), 0);
}

#[test]
fn access_across_shared_memory_is_served_by_both() {
    let (client, running) = Running::start(model());
    client
        .map(0, 0x1000)
        .unwrap()
        .write_bytes(0, &[0xaa; 0x1000])
        .unwrap();
    let mut data = vec![0; 0x1008];

    assert_eq!(client.read(0, 0xffc, &mut data).unwrap(), 0x1008);

    assert_eq!(data[..4], [0xfc, 0xfd, 0xfe, 0xff]);
    assert!(data[4..0x1004].iter().all(|byte| *byte == 0xaa));
    assert_eq!(data[0x1004..], [0, 1, 2, 3]);
    assert_eq!(
        running.recorder.take_events(),
        [Event::Read(0xffc, 4), Event::Read(0x2000, 4)]
    );
}

#[test]
fn access_out_of_shared_memory_goes_on_in_the_device() {
    let (client, running) = Running::start(model());
    let mut data = [0xee; 8];

    assert_eq!(client.read(0, 0x1ffc, &mut data).unwrap(), 8);

    assert_eq!(data, [0, 0, 0, 0, 0, 1, 2, 3]);
    assert_eq!(running.recorder.take_events(), [Event::Read(0x2000, 4)]);
}

#[test]
fn shared_memory_outlives_its_server() {
    let (transport, host) = memory::pair().unwrap();
    let first = Server::new(model(), transport, |bus| {
        bus.memory(Region::Bar(0), 0x3000).unwrap().write(0, 7_u8)?;
        Ok(Null)
    });
    drop(first.unwrap());

    let mut found = None;
    let second = Server::new(model(), host.transport(), |bus| {
        found = Some(bus.memory(Region::Bar(0), 0x3000).unwrap().read::<u8>(0)?);
        Ok(Null)
    });

    assert!(second.is_ok());
    assert_eq!(found, Some(7));
    assert_eq!(
        host.open()
            .unwrap()
            .map(0, 0x3000)
            .unwrap()
            .read::<u8>(0)
            .unwrap(),
        7
    );
}

#[test]
fn place_that_is_not_shared_has_no_memory() {
    let (client, running) = Running::start(model());

    assert!(running.recorder.bus().memory(Region::Bar(0), 0).is_none());
    assert!(running
        .recorder
        .bus()
        .memory(Region::Bar(1), 0x1000)
        .is_none());
    assert_eq!(errno(client.map(0, 0x2000)), libc::EINVAL);
    assert!(client.map(0, 0x1000).unwrap().read::<u64>(0xffc).is_err());
    assert!(client
        .map(0, 0x1000)
        .unwrap()
        .write(usize::MAX, 0_u8)
        .is_err());
    assert!(client.map(0, 0x1000).unwrap().load::<u32>(2).is_err());
}

#[test]
fn many_clients_at_once_each_get_their_own_answers() {
    let (client, running) = Running::start(model());
    thread::scope(|scope| {
        for first in [0_u64, 0x40, 0x80, 0xc0] {
            let client = &client;
            scope.spawn(move || {
                for round in 0..200 {
                    let offset = first + round % 0x40;
                    let mut byte = [0];
                    client.read(0, offset, &mut byte).unwrap();
                    assert_eq!(u64::from(byte[0]), offset);
                }
            });
        }
    });
    assert_eq!(running.recorder.take_events().len(), 800);
}
