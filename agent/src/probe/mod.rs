//! Loads and attaches the BPF programs of `agent-ebpf` and reads their maps. Thin; must not know what a rate means.
