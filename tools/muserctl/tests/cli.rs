// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! muserctl over a made-up sysfs. What only the module can answer, the e2e tests ask it in a guest.

#![expect(clippy::unwrap_used, reason = "a test fails where it panics")]

use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{symlink, MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const A: &str = "83b8f4f2-509f-482f-bc1e-e6bfe0fa1001";
const B: &str = "83b90000-509f-482f-bc1e-e6bfe0fa1002";
const FOREIGN: &str = "f0000000-509f-482f-bc1e-e6bfe0fa1003";

/// A tree with the files that the kernel has.
struct Tree(TempDir);

impl Tree {
    /// A kernel without the module.
    fn without_module() -> Self {
        let tree = Self(tempfile::tempdir().unwrap());
        fs::set_permissions(tree.0.path(), fs::Permissions::from_mode(0o755)).unwrap();
        for dir in ["sys", "dev/muser", "proc"] {
            fs::create_dir_all(tree.path(dir)).unwrap();
        }
        tree
    }

    /// The module and its two types.
    fn new() -> Self {
        let tree = Self::without_module();
        tree.kind("muser", "muser-pci", "vfio-pci");
        tree.kind("muser-platform", "muser-platform", "vfio-platform");
        tree
    }

    fn path(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn kind(&self, parent: &str, kind: &str, api: &str) {
        let dir = format!("sys/devices/virtual/muser/{parent}");
        let types = format!("{dir}/mdev_supported_types/{kind}");
        self.write(&format!("{types}/name"), "muser device\n");
        self.write(&format!("{types}/description"), "a device in userspace\n");
        self.write(&format!("{types}/device_api"), &format!("{api}\n"));
        self.write(&format!("{types}/available_instances"), "65535\n");
        self.write(&format!("{types}/create"), "");
        fs::create_dir_all(self.path(&types).join("devices")).unwrap();
        let bus = self.path("sys/class/mdev_bus");
        fs::create_dir_all(&bus).unwrap();
        symlink(self.path(&dir), bus.join(parent)).unwrap();
    }

    fn device(&self, uuid: &str, parent: &str, kind: &str, group: u32) {
        let parent = format!("sys/devices/virtual/muser/{parent}");
        let dir = format!("{parent}/{uuid}");
        self.write(&format!("{dir}/remove"), "");
        self.write(&format!("{dir}/reattach_timeout_ms"), "5000\n");
        self.write(&format!("{dir}/max_memory"), "268435456\n");
        self.write(&format!("{dir}/uid"), "1000\n");
        self.write(&format!("{dir}/gid"), "100\n");
        self.write(&format!("{dir}/vfio-dev/vfio{group}/dev"), "510:0\n");
        let types = self.path(&parent).join("mdev_supported_types").join(kind);
        fs::create_dir_all(types.join("devices")).unwrap();
        symlink(&types, self.path(&dir).join("mdev_type")).unwrap();
        symlink(self.path(&dir), types.join("devices").join(uuid)).unwrap();
        let groups = self.path(&format!("sys/kernel/iommu_groups/{group}"));
        symlink(groups, self.path(&dir).join("iommu_group")).unwrap();
        let bus = self.path("sys/bus/mdev/devices");
        fs::create_dir_all(&bus).unwrap();
        symlink(self.path(&dir), bus.join(uuid)).unwrap();
        self.write(&format!("dev/muser/{uuid}"), "");
    }

    fn with_devices() -> Self {
        let tree = Self::new();
        tree.device(A, "muser", "muser-pci", 4);
        tree.device(B, "muser-platform", "muser-platform", 5);
        tree.device(FOREIGN, "mtty", "mtty-1", 6);
        tree
    }

    fn attribute(&self, uuid: &str, name: &str) -> PathBuf {
        self.path("sys/bus/mdev/devices").join(uuid).join(name)
    }

    /// Replaces the attribute `remove` by a pipe, to which a write waits for a reader.
    fn remove_waits(&self, uuid: &str) -> PathBuf {
        let path = self.attribute(uuid, "remove");
        fs::remove_file(&path).unwrap();
        let made = Command::new("mkfifo").arg(&path).status().unwrap();
        assert!(made.success());
        path
    }

    fn command(&self, program: impl AsRef<Path>, args: &[&str]) -> Command {
        let mut command = Command::new(program.as_ref());
        command
            .args(args)
            .arg("--sysfs")
            .arg(self.path("sys"))
            .arg("--dev")
            .arg(self.path("dev"))
            .arg("--proc")
            .arg(self.path("proc"));
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        let program = env!("CARGO_BIN_EXE_muserctl");
        self.command(program, args).output().unwrap()
    }

    /// stdout of a command that must succeed.
    fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.ok(args)).unwrap()
    }

    /// stderr of a command that must fail with `status`, and print nothing.
    fn fails(&self, status: i32, args: &[&str]) -> String {
        failed(status, &self.run(args))
    }
}

fn failed(status: i32, output: &Output) -> String {
    assert_eq!(output.status.code(), Some(status), "{output:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[track_caller]
fn assert_says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
}

#[test]
fn every_command_without_module_says_how_to_load_it() {
    let tree = Tree::without_module();
    for args in [
        &["list"][..],
        &["types"],
        &["create"],
        &["show"],
        &["show", A],
        &["remove", A],
        &["set", A, "max_memory=1M"],
        &["list", "--json"],
    ] {
        assert_says(
            &tree.fails(1, args),
            &["module muser is not loaded", "`modprobe muser`"],
        );
    }
}

#[test]
fn types_are_those_of_muser() {
    let tree = Tree::with_devices();
    let json = tree.json(&["types", "--json"]);
    assert_eq!(json["schema"], 1);
    let types = json["types"].as_array().unwrap();
    assert_eq!(types.len(), 2);
    assert_eq!(
        types[0],
        serde_json::json!({
            "name": "muser-pci",
            "parent": "muser",
            "label": "muser device",
            "description": "a device in userspace",
            "device_api": "vfio-pci",
            "available_instances": 65535,
            "devices": [A],
        })
    );
    assert_eq!(types[1]["name"], "muser-platform");
    let text = tree.ok(&["types"]);
    assert_says(
        &text,
        &["muser-pci       vfio-pci       65535      1        a device in userspace"],
    );
}

#[test]
fn list_without_devices_is_empty() {
    let tree = Tree::new();
    assert_eq!(tree.ok(&["list"]), "");
    let json = tree.json(&["list", "--json"]);
    assert_eq!(json, serde_json::json!({"schema": 1, "devices": []}));
}

#[test]
fn list_shows_null_and_question_marks_for_an_unknown_state() {
    let tree = Tree::with_devices();
    let json = tree.json(&["list", "--json"]);
    let devices = json["devices"].as_array().unwrap();
    assert_eq!(devices.len(), 2, "{json}");
    assert_eq!(
        devices[0],
        serde_json::json!({
            "uuid": A,
            "type": "muser-pci",
            "parent": "muser",
            "device_api": "vfio-pci",
            "node": tree.path("dev/muser").join(A),
            "iommu_group": 4,
            "group_path": tree.path("dev/vfio/4"),
            "cdev": tree.path("dev/vfio/devices/vfio4"),
            "removing": false,
            "described": null,
            "attached": null,
            "client": null,
            "server": null,
            "standby": null,
            "successor": null,
        })
    );
    let text = tree.ok(&["list"]);
    assert_eq!(text.lines().count(), 3);
    let cells: Vec<_> = text.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(cells, [A, "muser-pci", "?", "?", "?", "4", "vfio4"]);
}

#[test]
fn kernel_without_cdevs_has_none() {
    let tree = Tree::with_devices();
    fs::remove_file(tree.attribute(A, "vfio-dev/vfio4/dev")).unwrap();
    let json = tree.json(&["show", A, "--json"]);
    assert_eq!(json["devices"][0]["cdev"], Value::Null);
}

#[test]
fn show_has_every_documented_key_and_no_other() {
    let tree = Tree::with_devices();
    let readme = include_str!("../README.md");
    let (_, example) = readme.split_once("```json\n").unwrap();
    let (example, _) = example.split_once("```").unwrap();
    let example: Value = serde_json::from_str(example).unwrap();

    let shown = tree.json(&["show", "83B8", "--json"]);

    let keys = |json: &Value| -> Vec<String> {
        json["devices"][0]
            .as_object()
            .unwrap()
            .keys()
            .cloned()
            .collect()
    };
    assert_eq!(keys(&shown), keys(&example));
    let device = &shown["devices"][0];
    assert_eq!(device["attributes"]["reattach_timeout_ms"], 5000);
    assert_eq!(device["attributes"]["max_memory"], 268_435_456);
    assert_eq!(device["attributes"].as_object().unwrap().len(), 2);
    assert_eq!(
        device["creator"],
        serde_json::json!({"uid": 1000, "gid": 100})
    );
    assert_says(
        device["state_error"].as_str().unwrap(),
        &["is not a device of muser"],
    );
    assert_eq!(device["regions"], Value::Null);
}

#[test]
fn show_without_uuid_shows_all() {
    let text = Tree::with_devices().ok(&["show"]);
    assert_says(&text, &[A, B, "max_memory           256 MiB (268435456)"]);
    assert!(!text.contains(FOREIGN));
}

#[test]
fn ambiguous_prefix_lists_the_candidates() {
    let error = Tree::with_devices().fails(1, &["show", "83b"]);
    assert_says(&error, &["83b is ambiguous", A, B]);
    assert!(!error.contains(FOREIGN));
}

#[test]
fn unknown_device_lists_those_there_are() {
    let error = Tree::with_devices().fails(1, &["remove", "00"]);
    assert_says(&error, &["there is no muser device 00", A, B]);
    let error = Tree::new().fails(1, &["remove", "00"]);
    assert_says(
        &error,
        &[
            "there is no muser device 00",
            "nor any other",
            "muserctl create",
        ],
    );
}

#[test]
fn device_of_another_driver_is_not_touched() {
    let tree = Tree::with_devices();
    let error = tree.fails(1, &["remove", FOREIGN]);
    assert_says(&error, &["of type mtty-1, not one of muser's"]);
    assert_eq!(
        fs::read_to_string(tree.attribute(FOREIGN, "remove")).unwrap(),
        ""
    );
}

#[test]
fn malformed_arguments_are_usage_errors() {
    let tree = Tree::with_devices();
    for (args, says) in [
        (&["create", "83b8"][..], "8-4-4-4-12"),
        (&["create", "--type", "mtty-1"], "muser-platform"),
        (&["show", "../.."], "hexadecimal"),
        (&["set", A], "NAME=VALUE"),
        (&["set", A, "max_memory"], "NAME=VALUE"),
        (&["set", A, "max_memory=much"], "not a number"),
        (&["set", A, "../remove=1"], "NAME=VALUE"),
        (&["remove", A, "--timeout", "soon"], "seconds"),
        (&["remove"], "UUID"),
        (&["destroy"], "destroy"),
    ] {
        assert_says(&tree.fails(2, args), &[says]);
    }
}

#[test]
fn create_writes_the_uuid_and_prints_it() {
    let tree = Tree::new();
    let create = |parent: &str, kind: &str| {
        let dir = format!("sys/class/mdev_bus/{parent}/mdev_supported_types/{kind}/create");
        fs::read_to_string(tree.path(&dir)).unwrap()
    };

    assert_eq!(tree.ok(&["create", &A.to_uppercase()]), format!("{A}\n"));
    assert_eq!(create("muser", "muser-pci"), A);

    let random = tree.ok(&["create", "--type", "muser-platform"]);
    assert_eq!(
        create("muser-platform", "muser-platform"),
        random.trim_end()
    );
    assert_eq!(random.len(), 37);
    assert_eq!(&random[14..15], "4", "{random} is not of version 4");
    assert_ne!(random, tree.ok(&["create", "--type", "muser-platform"]));
}

#[test]
fn create_json_is_that_of_list() {
    let tree = Tree::with_devices();
    let created = tree.json(&["create", A, "--json"]);
    assert_eq!(
        created["devices"][0],
        tree.json(&["list", "--json"])["devices"][0]
    );
}

#[test]
fn create_of_a_type_that_the_module_lacks_names_those_it_has() {
    let tree = Tree::without_module();
    tree.kind("muser", "muser-pci", "vfio-pci");
    let error = tree.fails(1, &["create", "--type", "muser-platform"]);
    assert_says(&error, &["has no type muser-platform; it has muser-pci"]);
}

#[test]
fn set_writes_exact_numbers() {
    let tree = Tree::with_devices();
    tree.ok(&["set", "83b8", "reattach_timeout_ms=60000", "max_memory=64M"]);
    let read = |name| fs::read_to_string(tree.attribute(A, name)).unwrap();
    assert!(read("reattach_timeout_ms").starts_with("60000"));
    assert!(read("max_memory").starts_with("67108864"));
}

#[test]
fn whose_a_device_is_is_shown_but_not_set() {
    let tree = Tree::with_devices();
    let error = tree.fails(1, &["set", A, "uid=0"]);
    assert_says(&error, &["has no attribute uid"]);
    for name in ["uid", "gid"] {
        fs::remove_file(tree.attribute(A, name)).unwrap();
    }
    let json = tree.json(&["show", A, "--json"]);
    assert_eq!(json["devices"][0]["creator"], Value::Null);
}

#[test]
fn set_of_an_unknown_attribute_changes_nothing() {
    let tree = Tree::with_devices();
    let error = tree.fails(1, &["set", A, "reattach_timeout_ms=1", "poll=1"]);
    assert_says(
        &error,
        &["has no attribute poll", "max_memory, reattach_timeout_ms"],
    );
    let error = tree.fails(1, &["set", A, "reattach_timeout_ms=1", "remove=1"]);
    assert_says(&error, &["has no attribute remove"]);
    let timeout = fs::read_to_string(tree.attribute(A, "reattach_timeout_ms")).unwrap();
    assert_eq!(timeout, "5000\n");
}

#[test]
fn remove_writes_one_and_prints_nothing() {
    let tree = Tree::with_devices();
    assert_eq!(tree.ok(&["remove", "83b8"]), "");
    assert_eq!(
        fs::read_to_string(tree.attribute(A, "remove")).unwrap(),
        "1"
    );
}

/// What mdev leaves of a device whose removal waits for a client.
#[test]
fn device_that_is_being_removed_is_shown_as_such() {
    let tree = Tree::with_devices();
    for name in ["mdev_type", "remove", "max_memory", "reattach_timeout_ms"] {
        fs::remove_file(tree.attribute(A, name)).unwrap();
    }

    let json = tree.json(&["list", "--json"]);

    let device = &json["devices"][0];
    assert_eq!(device["uuid"], A);
    assert_eq!(device["removing"], true);
    assert_eq!(device["type"], "muser-pci");
    assert_eq!(device["device_api"], "vfio-pci");
    assert_says(&tree.ok(&["show", A]), &["being removed"]);
    assert_says(
        &tree.fails(1, &["remove", A]),
        &["is being removed already"],
    );
}

#[test]
fn removal_that_another_began_meanwhile_is_named() {
    let tree = Tree::with_devices();
    fs::remove_file(tree.attribute(A, "remove")).unwrap();
    assert_says(
        &tree.fails(1, &["remove", A]),
        &["is being removed already"],
    );
}

#[test]
fn remove_waits_no_longer_than_the_timeout_and_names_the_client() {
    let tree = Tree::with_devices();
    let pipe = tree.remove_waits(A);
    tree.write("proc/4242/comm", "qemu-system-x86\n");
    fs::create_dir_all(tree.path("proc/4242/fd")).unwrap();
    symlink(tree.path("dev/vfio/4"), tree.path("proc/4242/fd/9")).unwrap();

    let start = Instant::now();
    let error = tree.fails(1, &["remove", A, "--timeout", "0.6"]);

    assert!(start.elapsed() >= Duration::from_millis(600));
    assert_says(
        &error,
        &[
            "waiting: a VFIO client has the device open (qemu-system-x86, pid 4242)",
            "a VFIO client still has the device open (qemu-system-x86, pid 4242)",
        ],
    );
    // The removal goes on: the child waits in the pipe.
    assert_eq!(fs::read_to_string(pipe).unwrap(), "1");
}

#[test]
fn remove_ends_when_the_client_lets_go() {
    let tree = Tree::with_devices();
    let pipe = tree.remove_waits(A);
    let mut muserctl = tree
        .command(env!("CARGO_BIN_EXE_muserctl"), &["remove", A])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(muserctl.stderr.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert_says(
        &line,
        &["waiting: a VFIO client has the device open; ctrl-C"],
    );

    assert_eq!(fs::read_to_string(pipe).unwrap(), "1");
    assert!(muserctl.wait().unwrap().success());
}

#[test]
fn interrupt_ends_the_waiting_not_the_removal() {
    let tree = Tree::with_devices();
    let pipe = tree.remove_waits(A);
    // A group of its own, to be signalled as a terminal does; and what runs us may ignore the signal,
    // as a shell has its background jobs do.
    let muserctl = env!("CARGO_BIN_EXE_muserctl");
    let mut muserctl = tree
        .command("env", &["--default-signal=INT", muserctl, "remove", A])
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .unwrap();
    let mut stderr = BufReader::new(muserctl.stderr.take().unwrap());
    stderr.read_line(&mut String::new()).unwrap();

    let group = format!("-{}", muserctl.id());
    let killed = Command::new("kill")
        .args(["-INT", "--", &group])
        .status()
        .unwrap();
    assert!(killed.success());

    assert!(!muserctl.wait().unwrap().success());
    // Nothing keeps our pipe open, so a caller who reads it isn't held up either.
    stderr.read_to_string(&mut String::new()).unwrap();
    assert_eq!(fs::read_to_string(pipe).unwrap(), "1");
}

/// Runs as nobody if we are root, who may do everything.
#[test]
fn missing_permission_names_the_file_its_owner_and_mode() {
    let tree = Tree::with_devices();
    let program = tree.path("muserctl");
    fs::copy(env!("CARGO_BIN_EXE_muserctl"), &program).unwrap();
    let create = tree.path("sys/class/mdev_bus/muser/mdev_supported_types/muser-pci/create");
    let node = tree.path("dev/muser").join(A);
    let remove = tree.attribute(A, "remove");
    let memory = tree.attribute(A, "max_memory");
    for path in [&create, &node, &remove, &memory] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o000)).unwrap();
    }
    let run = |args: &[&str]| {
        let mut command = tree.command(&program, args);
        if fs::metadata("/proc/self").unwrap().uid() == 0 {
            command.uid(65534).gid(65534);
        }
        command.output().unwrap()
    };

    for (args, path) in [
        (&["create"][..], &create),
        (&["remove", A], &remove),
        (&["set", A, "max_memory=1"], &memory),
    ] {
        let error = failed(1, &run(args));
        let name = path.file_name().unwrap().to_str().unwrap();
        assert_says(
            &error,
            &["permission denied", name, "it belongs to", "mode 0000"],
        );
    }
    let output = run(&["show", A, "--json"]);
    assert!(output.status.success(), "{output:?}");
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    let error = json["devices"][0]["state_error"].as_str().unwrap();
    assert_says(
        error,
        &["permission denied", node.to_str().unwrap(), "mode 0000"],
    );
    let output = run(&["list"]);
    assert_says(&String::from_utf8(output.stdout).unwrap(), &[A, "?"]);
}

#[test]
fn reader_that_goes_away_is_no_error() {
    let tree = Tree::with_devices();
    let mut muserctl = tree
        .command(env!("CARGO_BIN_EXE_muserctl"), &["show"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(muserctl.stdout.take());
    let output = muserctl.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
}

#[test]
fn help_documents_exit_status_and_examples() {
    let help = Tree::new().ok(&["--help"]);
    assert_says(
        &help,
        &["EXIT STATUS", "EXAMPLES", "JSON", "create", "show"],
    );
    assert!(!help.contains("write-remove") && !help.contains("sysfs <"));
}
