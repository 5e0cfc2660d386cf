//! Who wrote in the windows: vCPUs, their address spaces, code in these, and regions of guest memory. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use super::WriterProfile;
use super::average::{Basis, average};
use crate::model::{
    AddressSpace, FirstWrites, GuestProcess, Gva, MemoryRange, PAGE_SIZE, RegionHeat, Slowed, VcpuFacts, WriteCurve,
    Writer,
};
use crate::port::ThreadEvents;

/// Pages of one region of the map.
const REGION_PAGES: u64 = 512;
/// Address spaces, places in code, and regions that are told of one profile: those that wrote most.
const MOST_SPACES: usize = 64;
const MOST_CODE: usize = 16;
const MOST_REGIONS: usize = 16;
/// Code that lies in one page of guest memory is one writer.
const CODE_PAGE: u64 = PAGE_SIZE as u64;

/// One window's events.
pub(super) struct Window {
    /// Its length.
    pub(super) length: Duration,
    /// When it began, after the moment that the times of its events count from, and how far that may be off.
    pub(super) begin: (Duration, Duration),
    /// Pages that each protected one stands for.
    pub(super) every: u64,
    /// What each thread did in it.
    pub(super) threads: BTreeMap<u32, ThreadEvents>,
    /// For which part of it each thread was idle, where that is known.
    pub(super) idle: BTreeMap<u32, f64>,
    /// By which part longer a thread that is never idle may take for its work since mappings are small.
    pub(super) longer: f64,
    /// For which part of it a thread wanted to run and had no CPU, at most.
    pub(super) waited: f64,
}

impl Window {
    /// The curve of what `thread` wrote by these counts.
    fn curve(&self, thread: u32, bins: &[u32], fault_cost: Duration) -> WriteCurve {
        let bins: Vec<u64> = bins.iter().map(|&pages| pages.into()).collect();
        let (after, within) = self.begin;
        let writes = FirstWrites::from_bins(self.length, &bins).standing_for(self.every).begun(after, within);
        writes.curve(&Slowed { fault_cost, idle: self.idle.get(&thread).copied(), longer: self.longer })
    }
}

/// A vCPU's number by its thread: the kernel's, or one by the order of threads where the kernel does not tell.
pub(super) fn vcpu_numbers(vcpus: &[VcpuFacts], windows: &[Window]) -> BTreeMap<u32, u32> {
    let mut numbers: BTreeMap<u32, u32> = vcpus.iter().filter_map(|vcpu| Some((vcpu.thread_id?, vcpu.index))).collect();
    for &thread in windows.iter().flat_map(|window| window.threads.keys()) {
        let next = numbers.values().max().map_or(0, |&last| last + 1);
        numbers.entry(thread).or_insert(next);
    }
    numbers
}

/// The curve of the whole VM, and those of its vCPUs and address spaces, averaged over the windows.
pub(super) fn curves(
    windows: &[Window],
    numbers: &BTreeMap<u32, u32>,
    processes: &BTreeMap<AddressSpace, GuestProcess>,
    fault_cost: Duration,
    population: u64,
) -> (Option<WriteCurve>, Vec<WriterProfile>) {
    let basis = Basis { every: windows.first().map_or(1, |window| window.every), population };
    let mut whole = Vec::new();
    let mut by_vcpu: BTreeMap<Writer, Vec<WriteCurve>> = BTreeMap::new();
    let mut by_space: BTreeMap<(u32, AddressSpace), (u64, Vec<WriteCurve>)> = BTreeMap::new();
    let mut code: BTreeMap<(u32, AddressSpace, u64), u64> = BTreeMap::new();
    for window in windows {
        let mut vcpus = Vec::new();
        for (thread, events) in &window.threads {
            let Some(&index) = numbers.get(thread) else { continue };
            let curve = window.curve(*thread, &events.first_writes, fault_cost);
            by_vcpu.entry(Writer::Vcpu { index, thread_id: *thread }).or_default().push(curve.clone());
            vcpus.push(curve);
            for (&space, wrote) in &events.spaces {
                let entry = by_space.entry((index, space)).or_default();
                entry.0 += wrote.pages_made_writable;
                entry.1.push(window.curve(*thread, &wrote.first_writes, fault_cost));
            }
            for (&(space, instruction), &pages) in &events.code {
                *code.entry((index, space, instruction.0 / CODE_PAGE)).or_default() += pages;
            }
        }
        whole.extend(WriteCurve::sum(&vcpus));
    }
    let mut writers = Vec::new();
    let mut add = |writer, curves: &[WriteCurve], share| {
        if let Some(curve) = average(curves, basis) {
            writers.push(WriterProfile { writer, share, curve });
        }
    };
    for (writer, curves) in by_vcpu {
        add(writer, &curves, 1.0);
    }
    let mut spaces: Vec<_> = by_space.into_iter().filter(|(_, (pages, _))| *pages > 0).collect();
    spaces.sort_by_key(|(_, (pages, _))| std::cmp::Reverse(*pages));
    spaces.truncate(MOST_SPACES);
    for ((vcpu, address_space), (_, curves)) in &spaces {
        let process = processes.get(address_space).cloned();
        add(Writer::AddressSpace { vcpu: *vcpu, address_space: *address_space, process }, curves, 1.0);
    }
    let mut code: Vec<_> = code.into_iter().filter(|(_, pages)| *pages > 0).collect();
    code.sort_by_key(|(_, pages)| std::cmp::Reverse(*pages));
    code.truncate(MOST_CODE);
    for ((vcpu, address_space, page), pages) in code {
        let Some((_, (of, curves))) = spaces.iter().find(|(key, _)| *key == (vcpu, address_space)) else { continue };
        let (first, last) = (Gva(page * CODE_PAGE), Gva(page * CODE_PAGE + CODE_PAGE - 1));
        add(Writer::Code { vcpu, address_space, first, last }, curves, pages as f64 / *of as f64);
    }
    (average(&whole, basis), writers)
}

/// How many of each region's pages are in `words`, a bitmap of guest frames; by the region's number, without those of which none is.
pub(super) fn by_region(words: &[u64]) -> impl Iterator<Item = (u64, u64)> {
    let regions = words.chunks(REGION_PAGES as usize / 64).enumerate();
    regions
        .map(|(index, words)| (index as u64, words.iter().map(|word| u64::from(word.count_ones())).sum()))
        .filter(|&(_, pages)| pages > 0)
}

/// Guest memory in parts of 2 MiB, those that were written: how many pages of each, by its number.
pub(super) fn heat(regions: impl Iterator<Item = (u64, u64)>, ram: &[MemoryRange]) -> Vec<RegionHeat> {
    let mut heat = Vec::new();
    for (index, unique_pages) in regions {
        let start = index * REGION_PAGES * PAGE_SIZE as u64;
        let end = start + REGION_PAGES * PAGE_SIZE as u64;
        // What of the part is RAM; all of it where the slots are not known.
        let inside =
            |range: &MemoryRange| range.end().0.min(end).saturating_sub(range.start.0.max(start)) / PAGE_SIZE as u64;
        let known: u64 = ram.iter().map(inside).sum();
        let all = if ram.is_empty() { REGION_PAGES } else { known.max(unique_pages).min(REGION_PAGES) };
        let range = MemoryRange { start: crate::model::Gpa(start), bytes: end - start };
        heat.push(RegionHeat { range, unique_pages: unique_pages.min(all), pages: all });
    }
    heat
}

/// The parts of a range of memory, with what `heat` has of each.
pub(super) fn all_regions(range: &MemoryRange, heat: &[RegionHeat]) -> Vec<RegionHeat> {
    let bytes = REGION_PAGES * PAGE_SIZE as u64;
    let first = range.start.0 / bytes;
    let parts = (first..range.end().0.div_ceil(bytes)).map(|index| {
        let start = crate::model::Gpa(index * bytes);
        let found = heat.binary_search_by_key(&start, |region| region.range.start).ok().map(|at| heat[at]);
        let inside = range.end().0.min(start.0 + bytes) - range.start.0.max(start.0);
        let still =
            RegionHeat { range: MemoryRange { start, bytes }, unique_pages: 0, pages: inside / PAGE_SIZE as u64 };
        found.unwrap_or(still)
    });
    parts.collect()
}

/// The regions that were written most, as writers of their part of the VM's curve.
pub(super) fn regions(heat: &[RegionHeat], whole: &WriteCurve) -> Vec<WriterProfile> {
    let all: u64 = heat.iter().map(|region| region.unique_pages).sum();
    let mut hottest: Vec<&RegionHeat> = heat.iter().collect();
    hottest.sort_by_key(|region| std::cmp::Reverse(region.unique_pages));
    let part = |region: &RegionHeat| WriterProfile {
        writer: Writer::Region { range: region.range },
        share: region.unique_pages as f64 / all as f64,
        curve: whole.clone(),
    };
    hottest.into_iter().take(MOST_REGIONS).map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Gpa, PageBitmap, PageCount};
    use crate::port::SpaceEvents;

    #[test]
    fn writers_are_found_by_number_space_and_code() {
        let mut bins = vec![0; dunlin_ebpf::FIRST_WRITE_BINS as usize];
        bins[dunlin_ebpf::first_write_bin(50_000_000) as usize] = 300;
        let space = SpaceEvents { pages_made_writable: 300, first_writes: bins.clone() };
        let events = ThreadEvents {
            pages_made_writable: 300,
            first_writes: bins,
            spaces: [(AddressSpace(0x1000), space)].into(),
            code: [((AddressSpace(0x1000), Gva(0x4006)), 200), ((AddressSpace(0x1000), Gva(0x4ff0)), 100)].into(),
            ..ThreadEvents::default()
        };
        let window = Window {
            length: Duration::from_millis(100),
            begin: (Duration::ZERO, Duration::ZERO),
            every: 1,
            threads: [(77, events)].into(),
            idle: BTreeMap::new(),
            longer: 0.0,
            waited: 0.0,
        };
        let windows = [window];
        let numbers = vcpu_numbers(&[VcpuFacts { index: 3, thread_id: Some(77) }], &windows);
        let process = GuestProcess { pid: 9, name: "db".to_owned(), threads: None };
        let (whole, writers) =
            curves(&windows, &numbers, &[(AddressSpace(0x1000), process.clone())].into(), Duration::ZERO, 300);
        assert!((whole.unwrap().last().unique_pages - 300.0).abs() < 1e-6);
        assert_eq!(writers[0].writer, Writer::Vcpu { index: 3, thread_id: 77 });
        let named = Writer::AddressSpace { vcpu: 3, address_space: AddressSpace(0x1000), process: Some(process) };
        assert_eq!(writers[1].writer, named);
        assert_eq!(writers.len(), 3);
        assert!(matches!(writers[2].writer, Writer::Code { first: Gva(0x4000), last: Gva(0x4fff), .. }));
        assert!((writers[2].share - 1.0).abs() < 1e-9);
        // A thread that the kernel does not name gets a number of its own.
        assert_eq!(vcpu_numbers(&[VcpuFacts { index: 3, thread_id: Some(1) }], &windows)[&77], 4);
    }

    #[test]
    fn the_map_holds_what_was_written_and_how_much_of_it_is_memory() {
        let mut pages = PageBitmap::new(PageCount(2048));
        (512..612).for_each(|page| pages.insert(page));
        pages.insert(1024);
        let ram = [MemoryRange { start: Gpa(0), bytes: 1025 * 4096 }];
        let heat = heat(by_region(pages.words()), &ram);
        assert_eq!(
            heat.iter().map(|region| (region.unique_pages, region.pages)).collect::<Vec<_>>(),
            [(100, 512), (1, 1)]
        );
        let whole = WriteCurve::new(vec![crate::model::CurvePoint::exact(1_000_000, 101.0)]).unwrap();
        let regions = regions(&heat, &whole);
        assert!((regions[0].share - 100.0 / 101.0).abs() < 1e-9);
        assert_eq!(regions[0].writer, Writer::Region { range: heat[0].range });
    }
}
