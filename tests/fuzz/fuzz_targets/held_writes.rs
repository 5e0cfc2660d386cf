#![no_main]
//! See `dunlin::fuzz`.

libfuzzer_sys::fuzz_target!(|input: &[u8]| (dunlin::fuzz::find("held_writes").expect("a target").run)(input));
