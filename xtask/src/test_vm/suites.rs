//! What runs in the test machine: one table of suites, and the programs built for them.
//!
//! Owns which of the workspace's tests mean something on a distribution's kernel that they do not show on a developer's.

use std::collections::BTreeMap;
use std::env::consts::ARCH;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use dunlin_linux::protocol::{Suite, SuiteKind};

use super::self_test;
use crate::build_ebpf;
use crate::build_guest;
use crate::run;
use crate::setup;
use crate::workspace::root;

/// Modules that the machine itself needs, then those that the suites use.
pub(super) const BED_MODULES: [&str; 17] = [
    "virtio_pci",
    "virtio_console",
    "virtiofs",
    "overlay",
    "loop",
    "kvm_amd",
    "kvm_intel",
    "tun",
    "veth",
    "bridge",
    "sch_netem",
    "sch_tbf",
    "8021q",
    "vxlan",
    "wireguard",
    "nf_tables",
    "nbd",
];
/// Modules of the Linux guest inside: stock drivers for our devices.
pub(super) const GUEST_MODULES: [&str; 5] = ["virtio_mmio", "virtio_net", "virtio_blk", "virtio_rng", "virtio_balloon"];

/// Where the program of a suite comes from.
#[derive(Clone, Copy, Debug)]
enum Source {
    /// The tests in the agent's library.
    Library,
    /// An integration suite of `tests/tests`.
    Integration(&'static str),
    /// The agent itself, with arguments.
    Agent(&'static [&'static str]),
}

/// A row of the table.
#[derive(Debug)]
struct Row {
    name: &'static str,
    source: Source,
    only: &'static [&'static str],
    ignored_too: bool,
    limit_s: u64,
}

/// The suites, in their order.
const SUITES: [Row; 16] = [
    // What this kernel can do: the compatibility table's first half.
    Row { name: "doctor", source: Source::Agent(DOCTOR), only: &[], ignored_too: false, limit_s: 120 },
    // The machine on a KVM that is a module, with hardware page tables.
    Row {
        name: "kvm",
        source: Source::Library,
        only: &["kvm::guest_tests", "kvm::machine_tests", "kvm::dirty", "kvm::time_tests", "kvm::x86"],
        ignored_too: false,
        limit_s: 120,
    },
    Row { name: "tracking", source: Source::Integration("tracking"), only: &[], ignored_too: false, limit_s: 120 },
    // The fleet where exits from guest code are told: a flood, and what is left after kill -9. How soon a source comes back is
    // not asked in an emulated machine.
    Row {
        name: "agent",
        source: Source::Integration("agent"),
        only: &["nothing_is_loaded", "a_flood_of_pages"],
        ignored_too: false,
        limit_s: 180,
    },
    // The test guest, watched and moved, as on an operator's own host.
    Row {
        name: "prove",
        source: Source::Agent(&["doctor", "--prove", "--json"]),
        only: &[],
        ignored_too: false,
        limit_s: 120,
    },
    // What needs such a kernel.
    Row { name: "kernel", source: Source::Integration("kernel"), only: &[], ignored_too: true, limit_s: 120 },
    Row { name: "linux", source: Source::Integration("linux"), only: &[], ignored_too: true, limit_s: 400 },
    // A tunnel that the usual development host's kernel cannot make.
    Row {
        name: "wan-wireguard",
        source: Source::Integration("wan_wireguard"),
        only: &[],
        ignored_too: true,
        limit_s: 400,
    },
    Row { name: "foreign", source: Source::Integration("foreign"), only: &[], ignored_too: true, limit_s: 180 },
    // Not only there, but with cgroups of version 2. Who is to be slowed, and whether a migration ends because of that, shows
    // nothing where all have one emulated CPU: loading the programs slows the writer as well.
    Row {
        name: "stun-foreign",
        source: Source::Integration("stun_foreign"),
        only: &["leaves_nothing", "least_share", "nothing_is_begun"],
        ignored_too: false,
        limit_s: 300,
    },
    // Three holds in one migration: minutes.
    Row {
        name: "stun-let-go",
        source: Source::Integration("stun_foreign"),
        only: &["everybody_is_let_go"],
        ignored_too: false,
        limit_s: 600,
    },
    Row {
        name: "attribution",
        source: Source::Integration("attribution"),
        only: &["two_processes"],
        ignored_too: true,
        limit_s: 240,
    },
    Row {
        name: "while-qemu-migrates",
        source: Source::Integration("attribution"),
        only: &["a_vm_that_qemu_is_migrating"],
        ignored_too: true,
        limit_s: 400,
    },
    Row { name: "guest-names", source: Source::Integration("guest_names"), only: &[], ignored_too: true, limit_s: 180 },
    Row {
        name: "regimes",
        source: Source::Integration("regimes"),
        only: &["with_marks"],
        ignored_too: true,
        limit_s: 180,
    },
    // Delay and loss between the two hosts of a tunnel.
    Row { name: "wan", source: Source::Integration("wan"), only: &["over_a_wan"], ignored_too: true, limit_s: 400 },
];

/// Those that are no part of `cargo xtask test`: a developer's kernel runs them as well, or they take minutes there.
pub(super) const BY_HAND: [&str; 6] = ["kvm", "tracking", "agent", "prove", "stun-let-go", "while-qemu-migrates"];

const DOCTOR: &[&str] = &["doctor", "--json", "--run-dir", "/run/dunlin", "--state-dir", "/var/lib/dunlin-bed"];

/// Everything that was built.
#[derive(Debug)]
pub(super) struct Programs {
    /// Process 1 of the test machine.
    pub(super) bed: PathBuf,
    /// Process 1 of the Linux guest.
    pub(super) guest: PathBuf,
    /// Test binaries, by target name.
    tests: BTreeMap<String, PathBuf>,
}

impl Programs {
    /// Builds them, where they are not up to date.
    pub(super) fn build() -> Result<Self> {
        setup::ensure()?;
        eprintln!("Building the BPF programs, dunlin, its tests and the guests, where they are not up to date ...");
        build_ebpf::build(&build_ebpf::Arguments::default())?;
        build_guest::run()?;
        run::run(Command::new("cargo").args(["build", "--workspace", "--all-targets", "--quiet"]).current_dir(root()))?;
        let linux = Self::build_static()?;
        Ok(Self { bed: linux.join("dunlin-bed"), guest: linux.join("dunlin-linux-guest"), tests: Self::build_tests()? })
    }

    /// Programs of an initramfs, which has no libraries. With a target of its own, or proc macros would be static too.
    fn build_static() -> Result<PathBuf> {
        let target = format!("{ARCH}-unknown-linux-gnu");
        let folder = root().join("target/static");
        let mut command = Command::new("cargo");
        command.args([
            "build",
            "--release",
            "--quiet",
            "--package",
            "dunlin-linux",
            "--bins",
            "--target",
            &target,
            "--target-dir",
        ]);
        command
            .arg(&folder)
            .current_dir(root())
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .env("RUSTFLAGS", "-Ctarget-feature=+crt-static");
        run::run(&mut command)
            .context("the programs of the test machine (a static C library is needed: package libc6-dev)")?;
        Ok(folder.join(target).join("release"))
    }

    fn build_tests() -> Result<BTreeMap<String, PathBuf>> {
        let mut command = Command::new("cargo");
        command.args(["test", "--workspace", "--no-run", "--quiet", "--message-format=json"]).current_dir(root());
        let output =
            command.stderr(Stdio::inherit()).stdin(Stdio::null()).output().context("cargo could not be started")?;
        ensure!(output.status.success(), "the tests did not compile; the compiler's words are above");
        let text = String::from_utf8_lossy(&output.stdout);
        let artifacts = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        Ok(artifacts
            .filter(|artifact| artifact["profile"]["test"] == true)
            .filter_map(|artifact| {
                let name = artifact["target"]["name"].as_str()?.to_owned();
                let kind = artifact["target"]["kind"][0].as_str()?.to_owned();
                // The agent's library and program have one name.
                let name = if kind == "lib" { format!("lib {name}") } else { name };
                Some((name, PathBuf::from(artifact["executable"].as_str()?)))
            })
            .collect())
    }

    /// The suite of tests that go wrong on purpose.
    pub(super) fn faults(&self) -> Result<Suite> {
        Ok(Suite {
            name: self_test::SUITE.to_owned(),
            program: self.tests.get(self_test::SUITE).cloned().context("no tests that go wrong were built")?,
            arguments: Vec::new(),
            kind: SuiteKind::Tests { only: Vec::new(), ignored_too: true },
            limit_s: self_test::LIMIT_S,
        })
    }

    /// The table's suites, or those in which `filter` finds something; with `only_there` without those of [`BY_HAND`].
    pub(super) fn suites(&self, filter: Option<&str>, only_there: bool) -> Result<Vec<Suite>> {
        let mut suites = Vec::new();
        for row in &SUITES {
            let (mut only, mut wanted) = (row.only.iter().map(|&part| part.to_owned()).collect::<Vec<_>>(), true);
            if let Some(filter) = filter
                && !row.name.contains(filter)
            {
                // A filter that names no suite means tests.
                wanted = !SUITES.iter().any(|row| row.name.contains(filter)) && !matches!(row.source, Source::Agent(_));
                only = vec![filter.to_owned()];
            }
            if !wanted || only_there && BY_HAND.contains(&row.name) {
                continue;
            }
            let test =
                |name: &str| self.tests.get(name).cloned().with_context(|| format!("no test binary {name} was built"));
            let (program, arguments, kind) = match row.source {
                Source::Library => {
                    (test("lib dunlin")?, &[][..], SuiteKind::Tests { only, ignored_too: row.ignored_too })
                }
                Source::Integration(name) => {
                    (test(name)?, &[][..], SuiteKind::Tests { only, ignored_too: row.ignored_too })
                }
                Source::Agent(arguments) => (root().join("target/debug/dunlin"), arguments, SuiteKind::Objects),
            };
            suites.push(Suite {
                name: row.name.to_owned(),
                program,
                arguments: arguments.iter().map(|&word| word.to_owned()).collect(),
                kind,
                limit_s: row.limit_s,
            });
        }
        Ok(suites)
    }
}

/// Of `suites` those of `tests` (suite, test), and no other test in them than these.
pub(super) fn only_tests(suites: &[Suite], tests: &[(String, String)]) -> Vec<Suite> {
    let of = |suite: &Suite| {
        let names: Vec<_> =
            tests.iter().filter(|(name, _)| *name == suite.name).map(|(_, test)| test.clone()).collect();
        let kind = match &suite.kind {
            _ if names.is_empty() => return None,
            SuiteKind::Tests { ignored_too, .. } => SuiteKind::Tests { only: names, ignored_too: *ignored_too },
            SuiteKind::Objects => SuiteKind::Objects,
        };
        Some(Suite { kind, ..suite.clone() })
    };
    suites.iter().filter_map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_try_is_of_the_failed_tests_only() {
        let suite = |name: &str, kind: SuiteKind| Suite {
            name: name.into(),
            program: PathBuf::new(),
            arguments: Vec::new(),
            kind,
            limit_s: 1,
        };
        let named = |only: &[&str]| SuiteKind::Tests {
            only: only.iter().map(|&name| name.to_owned()).collect(),
            ignored_too: true,
        };
        let suites =
            [suite("doctor", SuiteKind::Objects), suite("wan", named(&[])), suite("linux", named(&["moves", "boots"]))];
        let failed = [("linux", "moves::far"), ("doctor", "(program)")].map(|(a, b)| (a.to_owned(), b.to_owned()));
        assert_eq!(
            only_tests(&suites, &failed),
            [suite("doctor", SuiteKind::Objects), suite("linux", named(&["moves::far"]))]
        );
    }
}
