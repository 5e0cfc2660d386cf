//! What `cargo xtask test-vm` asks of the bed, and what the bed answers: a job in the initramfs, and a line of JSON each on a
//! virtio port.
//!
//! Owns both forms. The two programs are always of one build, so that there is no version.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The job's place in the initramfs.
pub const JOB: &str = "/job.json";
/// The folder of kernel modules in the initramfs.
pub const MODULES: &str = "/modules";
/// The name of the virtio port on which messages go out.
pub const PORT: &str = "org.dunlin.bed";
/// The tag of the file system that is the development host's, read only.
pub const ROOT_TAG: &str = "root";
/// The I/O port of QEMU's `isa-debug-exit`: QEMU ends with twice what is written there, plus one.
pub const EXIT_PORT: u16 = 0xf4;
/// Written to [`EXIT_PORT`] when everything was fine; not zero, since QEMU also ends with 1 when it cannot start.
pub const EXIT_FINE: u8 = 0x10;
/// Written when something was not.
pub const EXIT_NOT_FINE: u8 = 0x11;

/// What to do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// Told back in the last message: an old log is none of this run.
    pub nonce: String,
    /// Modules to load, each behind those it needs; files of [`MODULES`].
    pub modules: Vec<String>,
    /// Modules that were asked for and that this kernel's package has not.
    pub missing_modules: Vec<String>,
    /// A shell on the console instead of the suites.
    pub shell: bool,
    /// The folder in which everything is started.
    pub folder: PathBuf,
    /// Added to the environment of everything that is started.
    pub environment: Vec<(String, String)>,
    /// What to run, in this order.
    pub suites: Vec<Suite>,
}

/// One thing to run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Suite {
    /// How it is called in results.
    pub name: String,
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// What it is.
    pub kind: SuiteKind,
    /// How long a single test (or the program) may take, in seconds.
    pub limit_s: u64,
}

/// What a program is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SuiteKind {
    /// A test binary of libtest: each of its tests has a process of its own.
    Tests {
        /// Parts of names; a test whose name holds one of them is run. Empty: all.
        only: Vec<String>,
        /// Whether tests are run too that are left out on other hosts (`#[ignore]`).
        ignored_too: bool,
    },
    /// A program whose lines of JSON are results.
    Objects,
}

/// How a test ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// As it should.
    Passed,
    /// Otherwise.
    Failed,
    /// Not at all within its limit; it was killed.
    TimedOut,
}

/// What the bed says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Message {
    /// It is up.
    Started {
        /// `uname -r`.
        kernel: String,
        /// Since power-on, in milliseconds.
        uptime_ms: u64,
    },
    /// A module could not be loaded.
    NoModule {
        /// Its name.
        name: String,
        /// Why.
        problem: String,
    },
    /// A line that a program printed.
    Output {
        /// The suite.
        suite: String,
        /// The test, where it is known.
        test: Option<String>,
        /// The line.
        line: String,
    },
    /// A test begins.
    Begins {
        /// The suite.
        suite: String,
        /// The test.
        test: String,
    },
    /// A test has ended.
    Test {
        /// The suite.
        suite: String,
        /// The test.
        test: String,
        /// How.
        verdict: Verdict,
        /// What is to be said of it: why it was no success, what it left behind.
        detail: Option<String>,
        /// How long it took, in milliseconds.
        took_ms: u64,
    },
    /// A result of a program of [`SuiteKind::Objects`].
    Object {
        /// The suite.
        suite: String,
        /// What it printed.
        object: serde_json::Value,
    },
    /// Everything has been run.
    Done {
        /// The job's.
        nonce: String,
        /// Tests that passed.
        passed: u64,
        /// Tests that did not.
        failed: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_lines_that_read_back() {
        let message = Message::Test {
            suite: "a".into(),
            test: "b::c".into(),
            verdict: Verdict::TimedOut,
            detail: Some("two\nlines".into()),
            took_ms: 5,
        };
        let line = serde_json::to_string(&message).unwrap();
        assert!(!line.contains('\n'));
        assert_eq!(serde_json::from_str::<Message>(&line).unwrap(), message);
    }
}
