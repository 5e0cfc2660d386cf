//! The BPF programs, loaded into the running kernel, against VMs whose writes are known to the page.
#![cfg(target_arch = "x86_64")]

use std::sync::mpsc;

use dunlin::model::{DirtyLogKind, PageBitmap, PageCount};
use dunlin::port::{EventSample, EventSource};
use dunlin::probe::{KernelCounters, ProbeOptions};
use dunlin::trial::tiny_vm::{FIRST_FRAME, TinyVm};

const PAGES: PageCount = PageCount(300);

fn attach(frames: PageCount) -> KernelCounters {
    KernelCounters::attach(ProbeOptions { pid: std::process::id(), frames, log: false }).unwrap_or_else(|e| {
        let mut text = e.to_string();
        let mut source = std::error::Error::source(&e);
        while let Some(next) = source {
            text += &format!(": {next}");
            source = next.source();
        }
        panic!("{text}")
    })
}

#[test]
fn explore() {
    for kind in [DirtyLogKind::Bitmap, DirtyLogKind::Ring] {
        let mut counters = attach(PageCount(4096));
        println!("{:?}", counters.hooks());
        let mut vm = TinyVm::new(PAGES, kind).unwrap();
        let mut show = |what: &str| {
            let mut set = counters.empty_pages();
            let sample = counters.sample(&mut set).unwrap();
            println!("{kind:?} {what}: unique {} {:?}", set.count(), sample);
            println!("{:?}", set.runs(1000).collect::<Vec<_>>());
        };
        show("new");
        vm.write_pages(PAGES).unwrap();
        show("first");
        vm.write_pages(PAGES).unwrap();
        show("second");
        vm.set_logging(true).unwrap();
        vm.write_pages(PageCount(100)).unwrap();
        show("logged 100");
        if kind == DirtyLogKind::Bitmap {
            vm.fetch_log().unwrap();
            vm.write_pages(PageCount(77)).unwrap();
            show("logged 77");
        }
        vm.set_logging(false).unwrap();
        vm.write_pages(PageCount(77)).unwrap();
        show("off 77");
        vm.write_pages(PageCount(77)).unwrap();
        show("off 77");
    }
}
