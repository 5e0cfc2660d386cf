//! Build, test, demo and bench tasks; see `cargo xtask --help`.
fn main() {}
