// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command line: what a person can ask for, and the manual page for it.

use std::fmt;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

const AFTER_HELP: &str = "\
The first run on a machine downloads a Debian build root, Debian's own kernel
and the kernel's source, and prepares them: about 6 minutes and 4 GB for what
`demo` needs, about 30 minutes and 6 GB for all that `test` needs, on two cores.
All of it is kept in the cache; later runs need no network.

EXIT STATUS
    0  everything asked for was done, and every test and lint passed
    1  something failed; the last lines say what and why
    2  the command line was not understood

ENVIRONMENT
    MUSER_CACHE           where the cache is (default: $XDG_CACHE_HOME/muser,
                          or ~/.cache/muser)
    MUSER_DEBIAN_MIRROR   the Debian mirror to use (default: the one that this
                          machine's apt uses)
    MUSER_GUEST_TIMEOUT   seconds that a guest may run before it is ended
                          (default: 900, with the debug kernel 2400, and what
                          a storm's kills or the fuzzer's seconds take on top)
    CARGO_TARGET_DIR      where build output goes (default: target)

FILES
    tests/kernel/*.config     configuration fragments of the kernels built here
    tests/e2e/guest/init      what runs first in a guest
    target/xtask/vmm/log/     what QEMU, its guests and the samples said
    target/xtask/KERNEL/      muser.ko, the guest's image and its console log
    target/xtask/log/         the full output of every step";

/// Builds, checks, boots and tests muser.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version, after_help = AFTER_HELP)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Task,

    /// Ask the Debian archive again which kernels there are
    ///
    /// Otherwise it is asked when something has to be downloaded anyway, and
    /// what is in the cache is used as long as it is complete.
    #[arg(long, global = true)]
    pub(crate) refresh: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Task {
    /// Show one device working, from the sysfs write to a client's register read
    ///
    /// Builds the module, the library and the samples, boots a kernel in QEMU,
    /// and explains each step in plain words. About a minute; on a new machine
    /// about 8 minutes more to prepare.
    Demo(Boot),

    /// Run every test there is: lints, host tests, devices in QEMU, and the suite in each kernel
    ///
    /// Ends with a list of what failed and why, and the line `N passed, N
    /// failed`. About 15 minutes when everything is prepared, and less than an
    /// hour on a new machine with two cores.
    Test(Test),

    /// Kill a device's process under its clients, and account for every operation
    ///
    /// Eight client threads add, read, start DMA and wait for interrupts, while
    /// the device's process is killed at random moments, started again, and now
    /// and then taken over from. Ends with how long a client waits for a new
    /// process, and the line `kills N, operations N, lost N, doubled N, stuck N`;
    /// fails unless the last three are 0.
    Storm(Storm),

    /// Do to a part of muser whatever its peers could do, right and wrong
    Fuzz {
        #[command(subcommand)]
        part: Fuzz,
    },

    /// Run every lint
    ///
    /// Formatting, clippy for the workspace and for the module, rustdoc,
    /// spelling, licences and advisories of dependencies. About a minute.
    Check {
        /// Correct the formatting and the spelling instead of complaining
        #[arg(long)]
        fix: bool,
    },

    /// Write the manual pages of muserctl and of the samples
    ///
    /// Each program says itself what stands in its page, as in its --help.
    Man {
        /// Where to; made if it is not there
        dir: PathBuf,
    },

    /// Prepare a kernel and print its build directory, the KDIR of a module build
    Kernel {
        /// Which kernel
        kernel: Kernel,
    },

    /// Build muser.ko and print where it is
    Module {
        /// The kernel to build for
        #[arg(long, default_value = "stock")]
        kernel: Kernel,
        /// Run the kernel's clippy on it as well
        #[arg(long)]
        clippy: bool,
    },

    /// Run one command in a guest and show what it prints
    ///
    /// The guest has muser.ko, every program of samples/, tools/, tests/e2e and
    /// tests/fuzz in /bin, busybox and mdevctl. Exits with the command's status.
    Run {
        #[command(flatten)]
        boot: Boot,
        /// The command, for example: e2e --list
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },

    /// Boot a guest with everything in it and give a shell
    ///
    /// `exit` powers it off. Ctrl-A X ends QEMU at once.
    Shell(Boot),

    /// Remove from the cache what was not used for a day
    Clean {
        /// Remove all of it; the next run prepares everything anew
        #[arg(long)]
        all: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Boot {
    /// The kernel to boot
    #[arg(long, default_value = "stock")]
    pub(crate) kernel: Kernel,
}

/// What can be fuzzed.
#[derive(Debug, Subcommand)]
pub(crate) enum Fuzz {
    /// The module: several processes in a guest call all that it has
    ///
    /// Device processes, clients and owners, in turns well-behaved and hostile.
    /// Ends with each operation's count and successes, the module's functions
    /// that were never entered, and one line of result with the seed. Fails when
    /// the kernel complains, a process can't be killed, memory comes out that
    /// nobody wrote, or something is left behind.
    Kmod {
        /// How long
        #[arg(long, default_value_t = 60)]
        seconds: u64,

        /// Where the calls come from; printed, and another one each time if not given
        ///
        /// The same seed makes the same calls, but the kernel schedules anew.
        #[arg(long)]
        seed: Option<u64>,

        /// The kernel to boot; the debug kernel alone tells what was covered
        #[arg(long, default_value = "debug")]
        kernel: Kernel,
    },

    /// PCI configuration space: any device, any accesses, against a second implementation
    ///
    /// Guided by what of the library an input reaches. Ends with the number of
    /// executions, the edges covered, and the command to repeat it. An input that
    /// shows a fault is made smaller and kept. Needs a C++ compiler.
    Config(Search),

    /// A client's stream: a server that answers anything, with descriptors of every kind
    ///
    /// Whatever a client is used for meanwhile must end, with what was asked for
    /// or an error, and leave nothing in the process. Otherwise as config.
    Client(Search),

    /// A server's stream: a client that says anything, with descriptors of every kind
    ///
    /// After each input the server must serve a client that behaves, and have
    /// nothing left of the other one. Otherwise as config.
    Server(Search),
}

/// A part of libmuser that has a fuzz target.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Target {
    Client,
    Config,
    Server,
}

impl Target {
    pub(crate) const ALL: [Self; 3] = [Self::Client, Self::Config, Self::Server];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Config => "config",
            Self::Server => "server",
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What to do with a target of libmuser's.
#[derive(Debug, Args)]
pub(crate) struct Search {
    /// How long
    #[arg(long, default_value_t = 60)]
    pub(crate) seconds: u64,

    /// Where the inputs come from; printed, and another one each time if not given
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) seed: Option<u32>,

    /// Run this one input, such as one that has shown a fault
    #[arg(long, value_name = "FILE", conflicts_with_all = ["seconds", "seed"])]
    pub(crate) input: Option<PathBuf>,

    /// Put what was found so far into tests/fuzz-targets/corpus, as few inputs as reach the same
    #[arg(long, conflicts_with_all = ["seconds", "seed", "input"])]
    pub(crate) keep: bool,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct Storm {
    /// How often a process of the device is killed
    #[arg(long, default_value_t = 1000)]
    pub(crate) kills: u64,

    /// Where the random choices come from; printed, and another one each time if not given
    ///
    /// The same seed makes the same choices, but the kernel schedules anew.
    #[arg(long)]
    pub(crate) seed: Option<u64>,

    /// How the clients come to the device: group, cdev or compat; or socket, over a supervised
    /// vfio-user socket on this machine, without a guest
    ///
    /// The stock kernel has groups only. Type1 on the debug kernel goes without
    /// DMA, since a lock inversion of its own would turn lockdep off.
    #[arg(long, default_value = "group")]
    pub(crate) road: String,

    /// The device's program, one of the guest's: counter, which is built on
    /// libmuser, or storm-device, the same on the bare ABI
    #[arg(long, default_value = "counter")]
    pub(crate) device: String,

    /// The kernel to boot
    #[arg(long, default_value = "small")]
    pub(crate) kernel: Kernel,
}

#[derive(Debug, Args)]
pub(crate) struct Test {
    /// Run only tests whose name contains this; leaves the lints out
    pub(crate) filter: Option<String>,

    /// The kernel to boot the suite in
    #[arg(long, default_value = "all")]
    pub(crate) kernel: Selection,

    /// Leave the lints out
    #[arg(long)]
    pub(crate) no_check: bool,

    /// Leave the tests out that need no kernel
    #[arg(long)]
    pub(crate) no_host: bool,

    /// Leave the tests out that have QEMU as a client over the socket
    #[arg(long)]
    pub(crate) no_vmm: bool,

    /// Run this part alone; given several times, these parts
    #[arg(long, conflicts_with_all = ["kernel", "no_check", "no_host", "no_vmm"])]
    pub(crate) only: Vec<Stage>,
}

impl Test {
    /// Whether a part of the tests was asked for.
    pub(crate) fn wants(&self, stage: Stage) -> bool {
        if !self.only.is_empty() {
            return self.only.contains(&stage);
        }
        match stage {
            // Lints have no names to filter by.
            Stage::Check => !self.no_check && self.filter.is_none(),
            Stage::Host => !self.no_host,
            // One test, of that name.
            Stage::Fuzz => {
                let named = |filter: &String| "fuzz".contains(filter.as_str());
                !self.no_host && self.filter.as_ref().is_none_or(named)
            }
            Stage::Vmm => !self.no_vmm,
            Stage::Stock => self.kernel.has(Kernel::Stock),
            Stage::Small => self.kernel.has(Kernel::Small),
            Stage::Debug => self.kernel.has(Kernel::Debug),
        }
    }
}

/// A part of the tests.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Stage {
    /// Every lint
    Check,
    /// What needs no kernel
    Host,
    /// Half a minute of each fuzz target, where the toolchain has what it takes
    Fuzz,
    /// QEMU as a client over the socket, without a guest and with one
    Vmm,
    /// The suite in Debian's own kernel
    Stock,
    /// The suite in the small kernel
    Small,
    /// The suite in the debug kernel
    Debug,
}

impl From<Kernel> for Stage {
    fn from(kernel: Kernel) -> Self {
        match kernel {
            Kernel::Stock => Self::Stock,
            Kernel::Small => Self::Small,
            Kernel::Debug => Self::Debug,
        }
    }
}

/// A kernel that the module is built for and tested in.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Kernel {
    /// Debian's own binary kernel, unmodified
    Stock,
    /// A small one with IOMMUFD, VFIO character devices and the mtty sample
    Small,
    /// The small one with lockdep, KASAN, kmemleak and Rust's debug assertions
    Debug,
}

impl Kernel {
    pub(crate) const ALL: [Self; 3] = [Self::Stock, Self::Small, Self::Debug];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Stock => "stock",
            Self::Small => "small",
            Self::Debug => "debug",
        }
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One kernel, or each of them in turn.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Selection {
    /// Each of them in turn
    All,
    /// Debian's own binary kernel, unmodified
    Stock,
    /// A small one with IOMMUFD, VFIO character devices and the mtty sample
    Small,
    /// The small one with lockdep, KASAN, kmemleak and Rust's debug assertions
    Debug,
    /// None: only what runs on the host
    None,
}

impl Selection {
    fn has(self, kernel: Kernel) -> bool {
        match self {
            Self::All => true,
            Self::Stock => kernel == Kernel::Stock,
            Self::Small => kernel == Kernel::Small,
            Self::Debug => kernel == Kernel::Debug,
            Self::None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(arguments: &[&str]) -> Vec<Stage> {
        let arguments = ["xtask", "test"].iter().chain(arguments);
        let Task::Test(test) = Cli::try_parse_from(arguments).unwrap().command else {
            panic!("not the command test");
        };
        let stages = Stage::value_variants().iter().copied();
        stages.filter(|&stage| test.wants(stage)).collect()
    }

    #[test]
    fn everything_runs_unless_it_is_left_out() {
        assert_eq!(asked(&[]), Stage::value_variants());
        let kernels = [Stage::Stock, Stage::Small, Stage::Debug];
        assert_eq!(asked(&["--no-check", "--no-host", "--no-vmm"]), kernels);
        assert_eq!(
            asked(&["--kernel", "none"]),
            [Stage::Check, Stage::Host, Stage::Fuzz, Stage::Vmm]
        );
    }

    #[test]
    fn filter_leaves_the_lints_out() {
        assert!(!asked(&["gpio"]).contains(&Stage::Check));
    }

    #[test]
    fn only_runs_what_it_names() {
        assert_eq!(asked(&["--only", "vmm", "gpio"]), [Stage::Vmm]);
        assert_eq!(
            asked(&["--only", "check", "--only", "small"]),
            [Stage::Check, Stage::Small]
        );
        let both = ["xtask", "test", "--only", "vmm", "--no-host"];
        assert!(Cli::try_parse_from(both).is_err());
    }
}
