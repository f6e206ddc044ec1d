// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `demo`: shows a person what muser does, step by step, and fails loudly where it does not.

use std::fmt::Display;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{anyhow, ensure, Context, Result};
use muser_e2e::mdev::{random_uuid, Mdev, Type};
use muser_e2e::node::{INTX, MSI};
use muser_e2e::pci::Function;
use muser_e2e::process::Process;
use muser_e2e::vfio::{Client, IrqData, IrqSet, Road};
use muser_e2e::{kmsg, module, time};

fn main() -> ExitCode {
    println!("muser: a PCI device that is a program. What follows happens in this very kernel.");
    let mut story = Story::default();
    let told = tell(&mut story);
    // What went wrong before the end must not stay behind.
    if told.is_err() {
        story.process = None;
        story.client = None;
        story.mdev = None;
    }
    match told {
        Ok(()) => {
            println!("\n✓ All {} steps did what they should.", story.steps);
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("  ✗ {error:#}");
            println!("\n✗ Step {} failed.", story.steps);
            println!("  What to look at:{}", hints(story.steps));
            ExitCode::FAILURE
        }
    }
}

/// What the steps so far have made.
#[derive(Default)]
struct Story {
    steps: u32,
    log: Option<kmsg::Log>,
    client: Option<Client>,
    process: Option<Process>,
    mdev: Option<Mdev>,
}

impl Story {
    fn step(&mut self, title: &str, why: &str) {
        self.steps += 1;
        println!("\n{}. {title}\n  {why}", self.steps);
    }

    fn client(&self) -> Result<&Client> {
        self.client.as_ref().context("the client is not open")
    }

    fn mdev(&self) -> Result<&Mdev> {
        self.mdev.as_ref().context("there is no device")
    }
}

fn done(what: impl Display) {
    println!("  ✓ {what}");
}

fn shown(command: &str) {
    println!("    $ {command}");
}

fn tell(story: &mut Story) -> Result<()> {
    story.log = kmsg::Log::from_now().ok();
    load(story)?;
    create(story)?;
    serve(story)?;
    open(story)?;
    walk(story)?;
    outputs(story)?;
    inputs(story)?;
    interrupts(story)?;
    restart(story)?;
    remove(story)?;
    unload(story)
}

fn load(story: &mut Story) -> Result<()> {
    story.step(
        "Load the module",
        "muser.ko tells the kernel's mediated devices (mdev) which types of device it can make.",
    );
    shown("modprobe muser");
    module::load()?;
    for kind in Type::ALL {
        let (name, api) = (kind.attribute("name")?, kind.attribute("device_api")?);
        println!("    {}: {name} ({api})", kind.directory().display());
    }
    done("the module is loaded, and its types are there");
    Ok(())
}

fn create(story: &mut Story) -> Result<()> {
    story.step(
        "Create a device",
        "A UUID written to the type's `create` makes a VFIO device, and a node for its program.",
    );
    let uuid = random_uuid()?;
    shown(&format!(
        "echo {uuid} > {}",
        Type::Pci.directory().join("create").display()
    ));
    Type::Pci.create_raw(&uuid).context("writing to create")?;
    let mdev = Mdev::adopt(&uuid);
    println!("    {}  the program's side", listed(&mdev.node())?);
    println!(
        "    {}  the client's side, as a group",
        listed(&mdev.group_node()?)?
    );
    if let Ok(cdev) = mdev.cdev_node() {
        println!("    {}  the client's side, as a cdev", listed(&cdev)?);
    }
    story.mdev = Some(mdev);
    done("the device has its nodes, and they belong to who created it");
    Ok(())
}

/// A line as `ls -l` writes it.
fn listed(path: &Path) -> Result<String> {
    let meta = std::fs::metadata(path).with_context(|| format!("{} is missing", path.display()))?;
    let kind = if meta.file_type().is_char_device() {
        'c'
    } else {
        '-'
    };
    let mode = meta.permissions().mode();
    let letters: String = (0..9)
        .rev()
        .map(|bit| {
            if mode & 1 << bit == 0 {
                '-'
            } else {
                ['x', 'w', 'r'][bit % 3]
            }
        })
        .collect();
    let (major, minor) = (meta.rdev() >> 8 & 0xFFF, meta.rdev() & 0xFF);
    let (uid, gid) = (meta.uid(), meta.gid());
    Ok(format!(
        "{kind}{letters} {uid}:{gid} {major},{minor} {}",
        path.display()
    ))
}

fn serve(story: &mut Story) -> Result<()> {
    story.step(
        "Start the program that is the device",
        "gpio is a sample: an ACCES PCI-IDIO-16 card, in a page of Rust on libmuser.",
    );
    start(story)
}

fn start(story: &mut Story) -> Result<()> {
    let uuid = story.mdev()?.uuid().to_owned();
    shown(&format!("gpio --uuid {uuid} &"));
    let process = Process::start(Command::new("gpio").args(["--uuid", &uuid]))
        .context("starting gpio; is it in the guest's PATH?")?;
    println!("    {}", process.expect_containing("serves")?);
    done(format!("process {} serves the device", process.id()));
    story.process = Some(process);
    Ok(())
}

fn open(story: &mut Story) -> Result<()> {
    story.step(
        "Open the device as any VFIO driver would",
        "The client knows nothing of muser: it opens a group, as QEMU or a userspace driver does.",
    );
    let mdev = story.mdev()?;
    println!("    open {}", mdev.group_node()?.display());
    let client = Client::open(mdev, Road::Group).context("opening the group")?;
    let info = client.info().context("VFIO_DEVICE_GET_INFO")?;
    println!(
        "    {} regions, {} interrupt indexes",
        info.num_regions, info.num_irqs
    );
    story.client = Some(client);
    done("the kernel answers from the description that the program gave it");
    Ok(())
}

fn walk(story: &mut Story) -> Result<()> {
    story.step(
        "Read what kind of device it is",
        "Configuration space comes from the program; this is what lspci would print.",
    );
    let function = Function::walk(story.client()?)?;
    for line in function.to_string().lines() {
        println!("    {line}");
    }
    ensure!(
        (function.vendor, function.device) == (0x494F, 0x0DC8),
        "this is {:04x}:{:04x}, not the card 494f:0dc8",
        function.vendor,
        function.device
    );
    done("it is the card which the kernel's gpio-pci-idio-16 driver looks for");
    Ok(())
}

/// BAR of the card's registers, and the registers in it (`drivers/gpio/gpio-idio-16.c`).
const REGISTERS: u32 = 2;
const OUTPUTS: u64 = 0;
const INPUTS: u64 = 1;
const CONTROL: u64 = 2;

fn get(client: &Client, register: u64) -> Result<u8> {
    let read = client.read_vec(REGISTERS, register, 1);
    Ok(read.with_context(|| format!("reading register {register}"))?[0])
}

fn set(client: &Client, register: u64, value: u8) -> Result<()> {
    client
        .write_all(REGISTERS, register, &[value])
        .with_context(|| format!("writing register {register}"))
}

fn outputs(story: &mut Story) -> Result<()> {
    story.step(
        "Set outputs",
        "Each write goes from the client through the kernel to the program, and is answered.",
    );
    let client = story.client()?;
    for value in [0x01, 0xA5, 0xFF, 0x00] {
        set(client, OUTPUTS, value)?;
        let back = get(client, OUTPUTS)?;
        println!("    wrote {value:08b}, read back {back:08b}");
        ensure!(
            back == value,
            "the outputs read {back:#04x}, not {value:#04x}"
        );
    }
    done("the outputs keep what was written");
    Ok(())
}

fn inputs(story: &mut Story) -> Result<()> {
    story.step(
        "Read inputs",
        "Nothing is wired to this card, so the program has its inputs toggle every three reads.",
    );
    let client = story.client()?;
    let reads = (0..9)
        .map(|_| get(client, INPUTS))
        .collect::<Result<Vec<_>>>()?;
    println!("    {reads:02x?}");
    let toggled = reads == [0, 0, 0, 0xFF, 0xFF, 0xFF, 0, 0, 0];
    ensure!(toggled, "the inputs did not toggle every three reads");
    done("the inputs toggle");
    Ok(())
}

fn interrupts(story: &mut Story) -> Result<()> {
    story.step(
        "Receive an interrupt",
        "The client gives VFIO an eventfd; the program raises the line when an input changes.",
    );
    let client = story.client()?;
    let line = client
        .enable_irq(INTX, 0)
        .context("giving INTx an eventfd")?;
    get(client, CONTROL)?;
    for read in 1..=3 {
        println!(
            "    read {read} of the inputs: {:02x}",
            get(client, INPUTS)?
        );
    }
    let count = line.wait(time::patience())?;
    ensure!(count == 1, "the eventfd counts {count} interrupts, not 1");
    println!("    the eventfd counts {count} interrupt");
    set(client, INPUTS, 0)?;
    client
        .set_irqs(&IrqSet::unmask(INTX, 0, IrqData::None(1)))
        .context("unmasking the line")?;
    ensure!(
        line.take()? == 0,
        "the line fired again although it was lowered"
    );
    let vectors = client.irq_info(MSI)?.count;
    println!("    (it has {vectors} MSI vector too, which Linux would prefer)");
    done("the interrupt came, was cleared, and is unmasked again");
    Ok(())
}

fn restart(story: &mut Story) -> Result<()> {
    story.step(
        "Kill the program, and start it again",
        "The kernel keeps what must not get lost; the client, which has the device open, only waits.",
    );
    set(story.client()?, OUTPUTS, 0x5A)?;
    let mut process = story.process.take().context("the program is not there")?;
    shown(&format!("kill -9 {}", process.id()));
    process.kill().context("killing gpio")?;
    println!("    the client asks for the outputs; nobody is there to answer");
    let client = story.client.take().context("the client is not open")?;
    let asked = std::thread::spawn(move || (get(&client, OUTPUTS), client));
    let started = start(story);
    let (outputs, client) = asked.join().map_err(|_| anyhow!("the client panicked"))?;
    story.client = Some(client);
    started?;
    let outputs = outputs.context("the read that waited")?;
    println!("    the answer: {outputs:08b}");
    ensure!(outputs == 0x5A, "the outputs are {outputs:#04x}, not 0x5a");
    done("the new process goes on where the old one was killed");
    Ok(())
}

fn remove(story: &mut Story) -> Result<()> {
    story.step(
        "Close the client and remove the device",
        "Nobody is killed: the program is told that its device is gone, and ends by itself.",
    );
    story.client = None;
    let mdev = story.mdev.take().context("there is no device")?;
    shown(&format!(
        "echo 1 > {}",
        mdev.directory().join("remove").display()
    ));
    mdev.remove().context("writing to remove")?;
    mdev.wait_gone()?;
    let mut process = story.process.take().context("the program is not there")?;
    let status = process.wait()?;
    for line in process.drain() {
        println!("    {line}");
    }
    ensure!(status.success(), "gpio ended with {status}");
    done(format!("the nodes are gone, and gpio ended ({status})"));
    Ok(())
}

fn unload(story: &mut Story) -> Result<()> {
    story.step(
        "Unload the module",
        "Nothing holds it any more. The kernel's log of all this must have no complaint.",
    );
    shown("rmmod muser");
    let mut unloaded = module::unload();
    // The last reference goes shortly after the last file is closed.
    let retried = time::until("rmmod", || {
        if unloaded.is_err() {
            unloaded = module::unload();
        }
        unloaded.is_ok()
    });
    if retried.is_err() {
        unloaded.context("unloading the module")?;
    }
    if let Some(log) = &mut story.log {
        let lines = log.lines().context("reading the kernel's log")?;
        if let Some(splat) = kmsg::splat(&lines) {
            anyhow::bail!("the kernel complained:\n{}", splat.join("\n"));
        }
    }
    done("the module is unloaded, and the kernel has no complaint");
    Ok(())
}

/// Where to look when a step failed.
fn hints(step: u32) -> String {
    let first = match step {
        1 => "whether muser.ko was built for this kernel (uname -r, modinfo muser)",
        2 => "ls /sys/class/mdev_bus/muser/mdev_supported_types",
        3 => "gpio -vv --uuid UUID, which tells each request",
        4..=9 => "muserctl show, which tells regions, interrupts and requests in flight",
        _ => "muserctl list, and who has the device open",
    };
    format!("\n    - {first}\n    - dmesg | tail -n 30")
}
