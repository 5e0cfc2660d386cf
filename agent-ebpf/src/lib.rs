//! Types that the BPF programs and the agent share. No code, no dependencies, fixed layout.
#![no_std]
