//! Twins of memory, streams and faults for the tests of post-copy.

use std::collections::{BTreeSet, VecDeque};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::model::{PAGE_SIZE, Packing, PageBitmap, PageCount, PageRun, RegionId, RegionKind, RegionSpec};
use crate::port::{BulkItem, BulkReceiver, BulkSender, BytesView, Clock, FaultError, Faults, LinkError, Region};

/// These pages of so many.
pub(super) fn bits(pages: u64, set: &[u64]) -> PageBitmap {
    let mut bitmap = PageBitmap::new(PageCount(pages));
    for &page in set {
        bitmap.insert(page);
    }
    bitmap
}

/// A clock that stands.
pub(super) struct Still;

impl Clock for Still {
    fn now(&self) -> Duration {
        Duration::from_secs(7)
    }

    fn sleep(&self, _: Duration) {}
}

/// Memory of ones.
pub(super) struct Memory {
    spec: RegionSpec,
    bytes: Vec<AtomicU8>,
}

impl Memory {
    pub(super) fn of(pages: u64) -> Self {
        let spec = RegionSpec { id: RegionId::RAM, kind: RegionKind::Ram, pages: PageCount(pages) };
        Self { spec, bytes: (0..pages as usize * PAGE_SIZE).map(|_| AtomicU8::new(0)).collect() }
    }

    pub(super) fn fill(&self, run: PageRun, value: u8) {
        self.bytes(run).iter().for_each(|byte| byte.store(value, Ordering::Relaxed));
    }

    pub(super) fn byte(&self, page: u64) -> u8 {
        self.bytes[page as usize * PAGE_SIZE].load(Ordering::Relaxed)
    }
}

impl Region for Memory {
    fn spec(&self) -> &RegionSpec {
        &self.spec
    }

    fn bytes(&self, run: PageRun) -> BytesView<'_> {
        &self.bytes[run.byte_offset() as usize..][..run.byte_len()]
    }

    fn data_within(&self, run: PageRun) -> Vec<PageRun> {
        vec![run]
    }

    fn prepare_for_write(&self, _: PageRun) {}

    fn zero(&self, run: PageRun) {
        self.fill(run, 0);
    }
}

/// Writes down what is sent.
#[derive(Clone, Default)]
pub(super) struct Recorder {
    pub(super) sent: Vec<PageRun>,
    wants: Arc<Mutex<Vec<u64>>>,
}

impl Recorder {
    pub(super) fn wants(&self) -> Vec<u64> {
        self.wants.lock().unwrap().clone()
    }
}

impl BulkSender for Recorder {
    fn start_round(&mut self, _: u32, _: bool) -> Result<u64, LinkError> {
        Ok(0)
    }

    fn pages(&mut self, _: RegionId, run: PageRun, _: BytesView<'_>) -> Result<u64, LinkError> {
        self.sent.push(run);
        Ok(run.byte_len() as u64)
    }

    fn copied(&mut self, _: RegionId, run: PageRun, _: &[u8]) -> Result<u64, LinkError> {
        self.sent.push(run);
        Ok(run.byte_len() as u64)
    }

    fn packed(&mut self, _: RegionId, run: PageRun, _: Packing, bytes: &[u8]) -> Result<u64, LinkError> {
        self.sent.push(run);
        Ok(bytes.len() as u64)
    }

    fn zeros(&mut self, _: RegionId, run: PageRun) -> Result<u64, LinkError> {
        self.sent.push(run);
        Ok(0)
    }

    fn end_round(&mut self, _: u32) -> Result<u64, LinkError> {
        Ok(0)
    }

    fn want(&mut self, _: RegionId, run: PageRun) -> Result<u64, LinkError> {
        self.wants.lock().unwrap().extend(run.indices());
        Ok(0)
    }

    fn flush(&mut self) -> Result<(), LinkError> {
        Ok(())
    }

    fn answers(&mut self) -> Result<Box<dyn BulkReceiver>, LinkError> {
        Err(LinkError::Protocol("a recorder has no answers".to_owned()))
    }
}

fn over() -> LinkError {
    LinkError::Io { doing: "receiving", source: std::io::ErrorKind::UnexpectedEof.into() }
}

/// Brings what it was given.
#[derive(Default)]
pub(super) struct Script {
    items: VecDeque<BulkItem>,
    value: u8,
}

impl Script {
    pub(super) fn of(items: Vec<BulkItem>) -> Self {
        Self { items: items.into(), value: 0 }
    }

    /// Pages of this byte.
    pub(super) fn filled(value: u8) -> Self {
        Self { value, ..Self::default() }
    }
}

impl BulkReceiver for Script {
    fn next(&mut self, _: &mut dyn FnMut() -> bool) -> Result<BulkItem, LinkError> {
        self.items.pop_front().ok_or_else(over)
    }

    fn read_into(&mut self, target: BytesView<'_>, _: &mut dyn FnMut() -> bool) -> Result<(), LinkError> {
        for byte in target {
            byte.store(self.value, Ordering::Relaxed);
        }
        Ok(())
    }

    fn read_packed(&mut self, target: &mut [u8], _: &mut dyn FnMut() -> bool) -> Result<(), LinkError> {
        target.fill(self.value);
        Ok(())
    }

    fn back(&mut self) -> Result<Box<dyn BulkSender>, LinkError> {
        Err(over())
    }
}

/// Faults that are made to happen.
pub(super) struct Caught {
    here: Vec<AtomicU64>,
    mapped: Mutex<BTreeSet<u64>>,
    due: Mutex<(Vec<u64>, bool)>,
    block_pages: u64,
}

impl Caught {
    pub(super) fn of(pages: u64) -> Self {
        Self::in_blocks(pages, 1)
    }

    /// So many are mapped together.
    pub(super) fn in_blocks(pages: u64, block_pages: u64) -> Self {
        let here = (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self { here, mapped: Mutex::default(), due: Mutex::default(), block_pages }
    }

    pub(super) fn happen(&self, pages: &[u64]) {
        self.due.lock().unwrap().0.extend(pages);
    }

    /// Behind them the machine has ended.
    pub(super) fn then_stop(&self) {
        self.due.lock().unwrap().1 = true;
    }

    pub(super) fn mapped(&self) -> Vec<u64> {
        self.mapped.lock().unwrap().iter().copied().collect()
    }
}

impl Faults for Caught {
    fn next(&self, pages: &mut Vec<u64>, _: Duration) -> Result<(), FaultError> {
        let mut due = self.due.lock().unwrap();
        *pages = std::mem::take(&mut due.0);
        if pages.is_empty() && due.1 { Err(FaultError::Gone) } else { Ok(()) }
    }

    fn block_pages(&self) -> u64 {
        self.block_pages
    }

    fn map(&self, run: PageRun) -> Result<(), FaultError> {
        self.mapped.lock().unwrap().extend(run.indices());
        Ok(())
    }

    fn map_zero(&self, run: PageRun) -> Result<(), FaultError> {
        self.map(run)
    }

    fn here(&self) -> &[AtomicU64] {
        &self.here
    }

    fn end(&self) -> Result<(), FaultError> {
        Ok(())
    }
}
