//! A VM moves there and back with everything that makes fewer bytes travel, and the guest finds every page as it left it: before each write it checks what it wrote there last.
#![cfg(target_arch = "x86_64")]

use dunlin::model::{DirtyLogKind, ReducerReport};
use dunlin_tests::rig::Side;
use dunlin_tests::{Hop, HopOptions, Rig, VmSpec, guest};

/// Slow enough for compressing to be worth it.
const SLOW: [&str; 2] = ["--bandwidth", "1Gbit"];

/// A writer of text with hot pages, and one of noise that changes little of each page.
fn writers(dirty_log: DirtyLogKind) -> VmSpec {
    VmSpec {
        cpus: 2,
        dirty_log,
        guest: "dunlin.wl0=ws:24M,rate:6000,pattern:hotcold,fill:text \
                dunlin.wl1=ws:24M,rate:6000,pattern:hotcold,share:5,fill:random"
            .to_owned(),
        ..VmSpec::default()
    }
}

fn options(verify: bool, more: &[&str]) -> HopOptions {
    let more = SLOW.iter().chain(more).map(|&word| word.to_owned()).collect();
    HopOptions { verify, more, ..HopOptions::default() }
}

/// Moves there and back; returns both moves.
fn there_and_back(spec: &VmSpec, options: &HopOptions) -> [Hop; 2] {
    let mut rig = Rig::boot(spec).unwrap();
    // A guest whose first frames have come and gone.
    let counters = rig.counters().unwrap();
    assert_eq!(guest::errors(&counters), Vec::<String>::new(), "before it moves: {counters:#}");
    let hops = [Side::B, Side::A].map(|side| {
        let hop = rig.hop(options).unwrap();
        println!("shows {}", serde_json::to_string(&hop.report).unwrap());
        assert_eq!((hop.exit_code, hop.source_exit_code, rig.at()), (Some(0), Some(0), side), "{hop:#?}");
        if options.verify {
            assert_eq!(hop.report.verified_pages, hop.report.memory_bytes / 4096);
        }
        let counters = rig.counters().unwrap();
        assert_eq!(guest::errors(&counters), Vec::<String>::new(), "{counters:#}");
        rig.verify_inside().unwrap();
        hop
    });
    assert!(rig.stop().unwrap().success());
    hops
}

fn reducer<'a>(hop: &'a Hop, name: &str) -> &'a ReducerReport {
    hop.report
        .reducers
        .iter()
        .find(|reducer| reducer.name == name)
        .unwrap_or_else(|| panic!("{name}: {:#?}", hop.report))
}

/// Pages that were not zeros, counted as often as they were due.
fn full_pages(hop: &Hop) -> u64 {
    hop.report.rounds.iter().map(|round| round.pages - round.zero_pages).sum()
}

#[test]
fn without_options_zero_pages_alone_are_spared() {
    for hop in there_and_back(&writers(DirtyLogKind::Bitmap), &options(true, &[])) {
        let [zeros] = &hop.report.reducers[..] else { panic!("{:#?}", hop.report.reducers) };
        assert_eq!((zeros.name.as_str(), zeros.saved_bytes), ("zero-pages", zeros.pages * 4096));
        assert!(zeros.pages > 30_000 && zeros.cpu_ns > 0, "{zeros:?}");
        assert!(hop.report.wire_bytes > full_pages(&hop) * 4096);
    }
    for hop in there_and_back(
        &VmSpec { memory_bytes: 64 << 20, guest: String::new(), ..VmSpec::default() },
        &options(true, &["--zero-pages=false"]),
    ) {
        assert_eq!(hop.report.reducers, []);
        assert!(
            hop.report.wire_bytes > hop.report.memory_bytes
                && hop.report.rounds.iter().all(|round| round.zero_pages == 0)
        );
    }
}

#[test]
fn compressed_text_takes_less_and_noise_goes_as_it_is() {
    for (how, names) in [("lz4", &["lz4"][..]), ("zstd:3", &["zstd"]), ("auto", &["lz4", "zstd"])] {
        for hop in there_and_back(&writers(DirtyLogKind::Ring), &options(true, &["--compress", how])) {
            let (pages, saved) =
                names.iter().map(|name| reducer(&hop, name)).fold((0, 0), |(pages, saved), reducer| {
                    assert!(reducer.cpu_ns > 0, "{reducer:?}");
                    (pages + reducer.pages, saved + reducer.saved_bytes)
                });
            // A half of what is not zero is text.
            let full = full_pages(&hop);
            assert!((full / 5..full * 4 / 5).contains(&pages), "{how}: {pages} of {full}");
            assert!(saved > pages * 2048, "{how}: {saved} of {pages} pages");
            assert!(
                hop.report.wire_bytes + saved > full * 4096 && hop.report.wire_bytes < full * 4096,
                "{how}: {:#?}",
                hop.report
            );
        }
    }
}

#[test]
fn of_a_page_that_changed_little_only_that_travels() {
    for hop in there_and_back(
        &writers(DirtyLogKind::Bitmap),
        &options(false, &["--delta", "64MiB", "--max-rounds", "6", "--downtime", "5ms"]),
    ) {
        let delta = reducer(&hop, "delta");
        // What was sent again had been sent before, and half of it changes by a twentieth.
        let again: u64 = hop.report.rounds[1..].iter().map(|round| round.pages).sum();
        assert!(delta.pages > again / 5 && delta.pages <= again, "{delta:?} of {again}");
        assert!(delta.saved_bytes > delta.pages * 3000, "{delta:?}");
    }
}

/// Pages of zeros that are not marked are equal pages: one of them travels for each stream.
#[test]
fn equal_pages_travel_once() {
    let spec = VmSpec { memory_bytes: 64 << 20, dirty_log: DirtyLogKind::Ring, ..VmSpec::default() };
    let spec = VmSpec { guest: "dunlin.wl=ws:4M,rate:1000".to_owned(), ..spec };
    for hop in there_and_back(&spec, &options(true, &["--zero-pages=false", "--dedup"])) {
        let [dedup] = &hop.report.reducers[..] else { panic!("{:#?}", hop.report.reducers) };
        assert!(dedup.pages > 10_000 && dedup.saved_bytes == dedup.pages * (4096 - 16), "{dedup:?}");
        assert!(hop.report.wire_bytes < hop.report.memory_bytes / 2, "{:#?}", hop.report);
    }
}

#[test]
fn everything_together_with_the_bitmap_and_the_ring() {
    let all =
        ["--compress", "auto", "--delta", "16MiB", "--dedup", "--skip-hot", "--streams", "3", "--downtime", "5ms"];
    for (kind, verify) in [(DirtyLogKind::Bitmap, true), (DirtyLogKind::Ring, false)] {
        for hop in there_and_back(&writers(kind), &options(verify, &all)) {
            let names: Vec<&str> = hop.report.reducers.iter().map(|reducer| reducer.name.as_str()).collect();
            assert_eq!(names, ["zero-pages", "lz4", "zstd", "delta", "dedup", "skip-hot"]);
            let spared: u64 =
                ["lz4", "zstd", "delta", "dedup"].map(|name| reducer(&hop, name).saved_bytes).iter().sum();
            assert!(spared > 0 && hop.report.wire_bytes + spared > full_pages(&hop) * 4096, "{:#?}", hop.report);
        }
    }
}

/// Stop-and-copy and hybrid have rounds, too.
#[test]
fn other_strategies_with_rounds() {
    for strategy in ["stop-and-copy", "hybrid"] {
        let more = ["--compress", "lz4", "--dedup", "--delta", "8MiB"];
        let options = HopOptions { strategy: strategy.parse().unwrap(), ..options(false, &more) };
        for hop in there_and_back(&writers(DirtyLogKind::Bitmap), &options) {
            assert!(reducer(&hop, "lz4").saved_bytes > 1 << 20, "{strategy}: {:#?}", hop.report.reducers);
        }
    }
}
