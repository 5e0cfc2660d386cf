#![no_main]
//! See `dunlin::fuzz`.

libfuzzer_sys::fuzz_target!(|input: &[u8]| (dunlin::fuzz::find("guest_words").expect("a target").run)(input));
