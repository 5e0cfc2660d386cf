//! Both ends of page streams against one another, round after round.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::migrate::owed_testing::Memory;
use crate::migrate::pacer::{Pace, Pacer};
use crate::migrate::pieces::{Holes, pieces};
use crate::migrate::zeros::zero_bits;
use crate::model::{PageBitmap, PageCount, PageRun, RegionId};
use crate::port::{BulkItem, BulkReceiver, BulkSender, BytesView, Clock, LinkError, Region};

const PAGES: u64 = 150;
const ID: RegionId = RegionId::RAM;

/// A clock on which everything but computing takes its time.
#[derive(Default)]
struct Slow(AtomicU64);

impl Clock for Slow {
    fn now(&self) -> Duration {
        Duration::from_micros(self.0.fetch_add(50, Ordering::Relaxed))
    }

    fn sleep(&self, _: Duration) {}

    fn thread_cpu(&self) -> Duration {
        Duration::ZERO
    }
}

/// What one stream carries.
#[derive(Default)]
struct Pipe(VecDeque<(BulkItem, Vec<u8>)>);

impl Pipe {
    fn put(&mut self, item: BulkItem, bytes: Vec<u8>) -> u64 {
        let sent = 32 + bytes.len() as u64;
        self.0.push_back((item, bytes));
        sent
    }
}

impl BulkSender for Pipe {
    fn start_round(&mut self, round: u32, digested: bool) -> Result<u64, LinkError> {
        Ok(self.put(BulkItem::StartRound { round, digested }, Vec::new()))
    }

    fn pages(&mut self, id: RegionId, run: PageRun, bytes: BytesView<'_>) -> Result<u64, LinkError> {
        Ok(self.put(BulkItem::Pages(id, run), bytes.iter().map(|byte| byte.load(Ordering::Relaxed)).collect()))
    }

    fn copied(&mut self, id: RegionId, run: PageRun, bytes: &[u8]) -> Result<u64, LinkError> {
        Ok(self.put(BulkItem::Pages(id, run), bytes.to_vec()))
    }

    fn packed(&mut self, id: RegionId, run: PageRun, packing: Packing, bytes: &[u8]) -> Result<u64, LinkError> {
        Ok(self.put(BulkItem::Packed(id, run, packing, bytes.len() as u32), bytes.to_vec()))
    }

    fn zeros(&mut self, id: RegionId, run: PageRun) -> Result<u64, LinkError> {
        Ok(self.put(BulkItem::Zeros(id, run), Vec::new()))
    }

    fn end_round(&mut self, round: u32) -> Result<u64, LinkError> {
        Ok(self.put(BulkItem::EndRound(round), Vec::new()))
    }

    fn want(&mut self, id: RegionId, run: PageRun) -> Result<u64, LinkError> {
        Ok(self.put(BulkItem::Want(id, run), Vec::new()))
    }

    fn flush(&mut self) -> Result<(), LinkError> {
        Ok(())
    }

    fn answers(&mut self) -> Result<Box<dyn BulkReceiver>, LinkError> {
        Err(LinkError::Protocol("a pipe has no answers".to_owned()))
    }
}

/// The bytes of the item that was taken out last.
struct Taken(Vec<u8>);

impl BulkReceiver for Taken {
    fn next(&mut self, _: &mut dyn FnMut() -> bool) -> Result<BulkItem, LinkError> {
        Err(LinkError::Protocol("items are taken by hand".to_owned()))
    }

    fn read_into(&mut self, target: BytesView<'_>, _: &mut dyn FnMut() -> bool) -> Result<(), LinkError> {
        assert_eq!(target.len(), self.0.len());
        target.iter().zip(&self.0).for_each(|(byte, &value)| byte.store(value, Ordering::Relaxed));
        Ok(())
    }

    fn read_packed(&mut self, target: &mut [u8], _: &mut dyn FnMut() -> bool) -> Result<(), LinkError> {
        target.copy_from_slice(&self.0);
        Ok(())
    }

    fn back(&mut self) -> Result<Box<dyn BulkSender>, LinkError> {
        Err(LinkError::Protocol("a pipe has no way back".to_owned()))
    }
}

/// Takes everything that a stream carries, as a target does.
fn take(pipe: &mut Pipe, memory: &Memory, announced: &[Packing]) -> Result<(), LinkError> {
    let mut unpacker = Unpacker::default();
    let go_on = &mut || true;
    while let Some((item, bytes)) = pipe.0.pop_front() {
        let mut taken = Taken(bytes);
        match item {
            BulkItem::Pages(_, run) => taken.read_into(memory.bytes(run), go_on)?,
            BulkItem::Zeros(_, run) => memory.zero(run),
            BulkItem::Packed(_, run, packing, bytes) => {
                unpacker.take((packing, run, bytes), announced, memory, &mut taken, go_on)?;
            }
            other => panic!("{other:?}"),
        }
    }
    Ok(())
}

/// A guest's write: a page of another content, a word of the page it is, a copy of another page, or zeros.
#[derive(Clone, Copy, Debug)]
enum Write {
    Page(u64, u8),
    Word(u64, u16, u8),
    Copy(u64, u64),
    Zero(u64),
}

impl Write {
    fn page(self) -> u64 {
        match self {
            Self::Page(page, _) | Self::Word(page, ..) | Self::Copy(_, page) | Self::Zero(page) => page,
        }
    }

    fn apply(self, memory: &Memory) {
        match self {
            Self::Page(page, value) => {
                let mut state = u64::from(value);
                for byte in memory.bytes(PageRun::new(page, 1)) {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    // Half noise, half order.
                    byte.store((state >> 60) as u8, Ordering::Relaxed);
                }
            }
            Self::Word(page, at, value) => {
                memory.bytes(PageRun::new(page, 1))[usize::from(at) % PAGE_SIZE].store(value, Ordering::Relaxed);
            }
            Self::Copy(from, to) => {
                let pairs = memory.bytes(PageRun::new(from, 1)).iter().zip(memory.bytes(PageRun::new(to, 1)));
                pairs.for_each(|(from, to)| to.store(from.load(Ordering::Relaxed), Ordering::Relaxed));
            }
            Self::Zero(page) => memory.zero(PageRun::new(page, 1)),
        }
    }
}

fn write() -> impl Strategy<Value = Write> {
    let page = || 0..PAGES;
    prop_oneof![
        (page(), 0..6u8).prop_map(|(page, value)| Write::Page(page, value)),
        (page(), any::<u16>(), any::<u8>()).prop_map(|(page, at, value)| Write::Word(page, at, value)),
        (page(), page()).prop_map(|(from, to)| Write::Copy(from, to)),
        page().prop_map(Write::Zero),
    ]
}

fn all_reducers() -> Vec<Reducers> {
    let none = Reducers::default();
    let room = 40 * PAGE_SIZE as u64;
    vec![
        none,
        Reducers { zero_pages: false, ..none },
        Reducers { compress: Compress::Lz4, ..none },
        Reducers { compress: Compress::Auto, ..none },
        Reducers { delta_bytes: room, ..none },
        Reducers { dedup: true, ..none },
        Reducers { compress: Compress::Zstd(1), delta_bytes: room, dedup: true, ..none },
        Reducers {
            compress: Compress::Auto,
            delta_bytes: room,
            dedup: true,
            zero_pages: false,
            skip_hot: true,
            free_pages: false,
        },
    ]
}

fn bytes_of(memory: &Memory) -> Vec<u8> {
    memory.bytes(PageRun::new(0, PAGES as u32)).iter().map(|byte| byte.load(Ordering::Relaxed)).collect()
}

/// Both ends, with two streams that share the pages of each round.
struct Ends {
    reducers: Reducers,
    source: Memory,
    target: Memory,
    streams: [Reducing; 2],
    wire: u64,
}

impl Ends {
    fn new(reducers: Reducers) -> Self {
        let sent = (reducers.delta_bytes > 0).then(|| Arc::new(SentPages::new(reducers.delta_bytes)));
        let streams = [(); 2].map(|()| Reducing::new(&reducers, 2, sent.clone()));
        Self { reducers, source: Memory::of(PAGES), target: Memory::of(PAGES), streams, wire: 0 }
    }

    /// A round of what is due; windows of 16 pages go to either stream, whichever `turn` says.
    fn round(&mut self, number: u32, due: &PageBitmap, turn: u64) {
        let clock = Slow::default();
        let pacer = Pacer::new(&clock, Pace::default());
        let outlet = Outlet { region: &self.source, pacer: &pacer, clock: &clock };
        let mut pipes = [Pipe::default(), Pipe::default()];
        self.streams.iter_mut().for_each(|stream| stream.begin_round(number, due));
        let holes = if self.reducers.zero_pages { Holes::Ignored } else { Holes::Filled };
        for window in 0..PAGES.div_ceil(16) {
            let lane = (turn >> window & 1) as usize;
            let (stream, pipe) = (&mut self.streams[lane], &mut pipes[lane]);
            for run in due.runs_within(window * 16, (window + 1) * 16, 512) {
                let sent = pieces(
                    &self.source,
                    run,
                    holes,
                    || 512,
                    zero_bits,
                    |piece, is_zero| {
                        if is_zero {
                            stream.zeros(piece);
                            self.wire += pipe.zeros(ID, piece)?;
                        } else {
                            self.wire += stream.send(piece, pipe, &outlet)?;
                        }
                        Ok::<(), LinkError>(())
                    },
                );
                sent.unwrap();
            }
        }
        // In whichever order the streams are taken.
        let announced = self.reducers.packings();
        let first = (turn & 1) as usize;
        for lane in [first, 1 - first] {
            take(&mut pipes[lane], &self.target, &announced).unwrap();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// Whatever the guest writes between rounds, whoever sends it, in whichever way: the target holds what the source held.
    #[test]
    fn the_target_holds_what_was_sent(rounds in prop::collection::vec((prop::collection::vec(write(), 0..60), any::<u64>()), 1..6)) {
        for reducers in all_reducers() {
            let mut ends = Ends::new(reducers);
            for (number, (writes, turn)) in rounds.iter().enumerate() {
                let mut due = PageBitmap::new(PageCount(PAGES));
                for write in writes {
                    write.apply(&ends.source);
                    due.insert(write.page());
                }
                ends.round(number as u32 + 1, &due, *turn);
                prop_assert!(bytes_of(&ends.source) == bytes_of(&ends.target), "{:?}", reducers);
            }
        }
    }
}

#[test]
fn each_reducer_spares_what_it_is_there_for() {
    let none = Reducers::default();
    let gain = |reducers: Reducers, packing: Packing| {
        let mut ends = Ends::new(reducers);
        let all = PageBitmap::full(PageCount(PAGES));
        for round in 1..4 {
            // Four contents; then a word of each page.
            for page in 0..PAGES {
                let write = if round == 1 {
                    Write::Page(page, page as u8 % 4)
                } else {
                    Write::Word(page, 80, page as u8 + round as u8)
                };
                write.apply(&ends.source);
            }
            ends.round(round, &all, 0b1100_1010);
        }
        assert!(bytes_of(&ends.source) == bytes_of(&ends.target));
        let gains = ends.streams.iter().flat_map(Reducing::gains).filter(|(kind, _)| *kind == packing);
        let sum = gains.fold(Gain::default(), |mut sum, (_, gain)| {
            sum.add(gain);
            sum
        });
        assert!(
            sum.saved_bytes + ends.wire >= 3 * PAGES * 4096,
            "what is spared does not travel: {sum:?} {}",
            ends.wire
        );
        sum
    };
    let known = gain(Reducers { dedup: true, ..none }, Packing::Known);
    // All but four for each stream, in the first round.
    assert_eq!(known.pages, PAGES - 8);
    let delta = gain(Reducers { delta_bytes: 1 << 20, ..none }, Packing::Delta);
    assert_eq!(delta.pages, 2 * PAGES);
    assert!(delta.saved_bytes > 2 * PAGES * 4050, "{delta:?}");
    for (compress, packing) in [(Compress::Lz4, Packing::Lz4), (Compress::Zstd(1), Packing::Zstd)] {
        let gain = gain(Reducers { compress, ..none }, packing);
        // All but the first piece of each stream, which shows how long a byte takes.
        assert!(gain.pages >= 3 * PAGES - 64 && gain.saved_bytes > gain.pages * 1024, "{gain:?}");
    }
}

#[test]
fn what_was_not_announced_is_refused() {
    let mut ends = Ends::new(Reducers { dedup: true, ..Reducers::default() });
    let mut pipe = Pipe::default();
    let place = |place: u64| [place.to_le_bytes(), [0; 8]].concat();
    let mut refused = |run: PageRun, announced: &[Packing]| {
        pipe.packed(ID, run, Packing::Known, &place(PAGES)).unwrap();
        take(&mut pipe, &ends.target, announced).unwrap_err().to_string()
    };
    assert!(refused(PageRun::new(0, 1), &[Packing::Delta]).contains("unannounced"));
    assert!(refused(PageRun::new(0, 1), &[Packing::Known]).contains("not the one"));
    ends.round(1, &PageBitmap::new(PageCount(PAGES)), 0);
    assert!(bytes_of(&ends.target).iter().all(|&byte| byte == 0), "nothing was written");
}

#[test]
fn a_way_to_compress_reads_as_it_is_printed() {
    for right in ["none", "lz4", "zstd:1", "zstd:19", "auto"] {
        assert_eq!(right.parse::<Compress>().unwrap().to_string(), right);
    }
    assert_eq!("zstd".parse(), Ok(Compress::Zstd(1)));
    for wrong in ["", "gzip", "zstd:", "zstd:0", "zstd:20", "zstd:-1", "lz4:1", "zstd:x"] {
        assert!(wrong.parse::<Compress>().is_err(), "{wrong}");
    }
}

#[test]
fn the_target_is_told_what_it_must_know() {
    assert_eq!(Reducers::default().packings(), []);
    let all = Reducers { compress: Compress::Auto, delta_bytes: 1, dedup: true, skip_hot: true, ..Reducers::default() };
    assert_eq!(all.packings(), Packing::ALL);
    let names: Vec<String> = all.packings().iter().map(|packing| packing.name().to_owned()).collect();
    assert_eq!(known_packings(&names), Ok(Packing::ALL.to_vec()));
    assert!(known_packings(&["lz5".to_owned()]).unwrap_err().contains("lz5"));
}
