//! Tests that go wrong in every way that a test can: `cargo xtask test-vm --self-test` looks that the test machine notices each. Nothing
//! else runs them.

use std::process::Command;
use std::time::Duration;

/// Set by the self-test alone.
const ALLOWED: &str = "DUNLIN_BED_FAULTS";

fn only_in_the_self_test() {
    assert!(std::env::var_os(ALLOWED).is_some(), "{ALLOWED} is not set: this is not the test machine");
}

#[test]
#[ignore = "goes wrong on purpose: `cargo xtask test-vm --self-test` runs it"]
fn a_fine_test() {
    only_in_the_self_test();
}

#[test]
#[ignore = "goes wrong on purpose: `cargo xtask test-vm --self-test` runs it"]
fn b_fails() {
    only_in_the_self_test();
    panic!("as planned");
}

#[test]
#[ignore = "goes wrong on purpose: `cargo xtask test-vm --self-test` runs it"]
fn c_hangs_with_a_child() {
    only_in_the_self_test();
    let mut child = Command::new("sleep").arg("600").spawn().unwrap();
    child.wait().unwrap();
}

#[test]
#[ignore = "goes wrong on purpose: `cargo xtask test-vm --self-test` runs it"]
fn d_leaves_a_process() {
    only_in_the_self_test();
    // Its handle is dropped, which neither ends it nor waits for it.
    drop(Command::new("sleep").arg("600").spawn().unwrap());
}

#[test]
#[ignore = "goes wrong on purpose: `cargo xtask test-vm --self-test` runs it"]
fn e_runs_out_of_memory() {
    only_in_the_self_test();
    let mut all = Vec::new();
    loop {
        all.push(vec![1u8; 64 << 20]);
        std::hint::black_box(&all);
    }
}

#[test]
#[ignore = "goes wrong on purpose: `cargo xtask test-vm --self-test` runs it"]
fn f_panics_the_kernel() {
    only_in_the_self_test();
    std::fs::write("/proc/sysrq-trigger", "c").unwrap();
    std::thread::sleep(Duration::from_secs(600));
}
