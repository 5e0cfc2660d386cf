//! The source's part of one page stream: pages that are not zero go in the shortest way that was asked for.
//!
//! Each page is tried in turn: does the target hold an equal one, is it little changed since it was sent last; what is left of a piece is compressed as a whole,
//! while that is worth it ([`super::worth`]).

use std::ops::Range;
use std::sync::Arc;

use super::codec::Compressor;
use super::dictionary::Dictionary;
use super::sent_pages::SentPages;
use super::worth::Worth;
use super::{DICTIONARY_BYTES, Gain, Page, Reducers, delta};
use crate::migrate::bytes::copy_out;
use crate::migrate::meter::Meter;
use crate::migrate::pacer::Pacer;
use crate::model::{PAGE_SIZE, Packing, PageBitmap, PageRun, RegionId};
use crate::port::{BulkSender, Clock, LinkError, Region};

/// Pages that are copied, and compressed, in one go: 128 KiB.
const PIECE_PAGES: u32 = 32;
/// Pages that go as they are in one go, before it is asked again whether to compress: as many as the target takes memory for at once.
const PLAIN_PAGES: u32 = 256;

/// What a stream's pages come from, and what they wait for.
pub(in crate::migrate) struct Outlet<'a> {
    pub(in crate::migrate) region: &'a dyn Region,
    pub(in crate::migrate) pacer: &'a Pacer<'a>,
    pub(in crate::migrate) clock: &'a dyn Clock,
}

/// How a page goes, and where what it was packed into is; as it is, it is packed into nothing.
type Form = (Option<Packing>, Range<usize>);

/// What each packing has gained, and the CPU time that it took.
struct Gains(Vec<(Packing, Gain, Meter)>);

impl Gains {
    fn of(&mut self, packing: Packing) -> Option<&mut (Packing, Gain, Meter)> {
        self.0.iter_mut().find(|(kind, ..)| *kind == packing)
    }

    /// Does work for `pages`, and counts its time.
    fn time<T>(&mut self, packing: Packing, clock: &dyn Clock, pages: u64, work: impl FnOnce() -> T) -> T {
        match self.of(packing) {
            Some((.., meter)) => meter.time(clock, pages, work),
            None => work(),
        }
    }

    /// Notes pages that were packed into so many bytes.
    fn note(&mut self, packing: Packing, pages: u64, bytes: usize) {
        if let Some((_, gain, _)) = self.of(packing) {
            gain.note(pages, bytes);
        }
    }
}

/// One stream's reducers, through all rounds.
pub(in crate::migrate) struct Reducing {
    round: u32,
    sent: Option<Arc<SentPages>>,
    dictionary: Option<Dictionary>,
    compressors: Vec<Compressor>,
    worth: Worth,
    copy: Vec<u8>,
    packed: Vec<u8>,
    gains: Gains,
}

impl Reducing {
    /// For one of so many streams; `sent` is what all of them share.
    pub(in crate::migrate) fn new(reducers: &Reducers, streams: usize, sent: Option<Arc<SentPages>>) -> Self {
        let compressors: Vec<Compressor> = reducers.compress.codecs().into_iter().map(Compressor::new).collect();
        let gains = reducers.packings().into_iter().map(|kind| (kind, Gain::default(), Meter::default()));
        Self {
            round: 0,
            sent,
            dictionary: reducers.dedup.then(|| Dictionary::new(DICTIONARY_BYTES / streams.max(1) as u64)),
            worth: Worth::new(compressors.len()),
            compressors,
            copy: Vec::new(),
            packed: Vec::new(),
            gains: Gains(gains.collect()),
        }
    }

    /// A round begins in which the pages `due` are sent.
    pub(in crate::migrate) fn begin_round(&mut self, round: u32, due: &PageBitmap) {
        self.round = round;
        if let Some(dictionary) = &mut self.dictionary {
            dictionary.begin_round(due);
        }
    }

    /// These pages are free, and go as zeros in the round that has begun.
    pub(in crate::migrate) fn free(&mut self, free: &PageBitmap) {
        if let Some(dictionary) = &mut self.dictionary {
            dictionary.begin_round(free);
        }
    }

    /// These pages go as zeros.
    pub(in crate::migrate) fn zeros(&mut self, run: PageRun) {
        if let Some(sent) = &self.sent {
            sent.forget(run);
        }
    }

    /// What was gained so far.
    pub(in crate::migrate) fn gains(&self) -> impl Iterator<Item = (Packing, Gain)> + '_ {
        self.gains.0.iter().map(|&(packing, gain, meter)| (packing, Gain { cpu: meter.total(), ..gain }))
    }

    /// Sends pages that are not zeros, when the bandwidth limit allows it. Returns the bytes put on the wire.
    ///
    /// # Errors
    /// The stream failed.
    pub(in crate::migrate) fn send(
        &mut self,
        run: PageRun,
        stream: &mut dyn BulkSender,
        outlet: &Outlet<'_>,
    ) -> Result<u64, LinkError> {
        let Some(&(first_kind, ..)) = self.gains.0.first() else {
            outlet.pacer.pay(run.byte_len() as u64);
            return stream.pages(outlet.region.spec().id, run, outlet.region.bytes(run));
        };
        let mut copy = std::mem::take(&mut self.copy);
        copy.resize(PIECE_PAGES as usize * PAGE_SIZE, 0);
        let (mut wire, mut first) = (0, run.first.0);
        // Where nobody else looks at pages, those that are not compressed need no copy.
        let builds_on_sent = self.sent.is_some() || self.dictionary.is_some();
        while first < run.end() {
            let left = (run.end() - first) as u32;
            let way = if builds_on_sent { None } else { self.worth.choose() };
            if !builds_on_sent && way.is_none() {
                let plain = PageRun::new(first, PLAIN_PAGES.min(left));
                let view = outlet.region.bytes(plain);
                wire += put(&mut self.worth, (view.len(), plain), outlet, |id| stream.pages(id, plain, view))?;
                first = plain.end();
                continue;
            }
            let piece = PageRun::new(first, PIECE_PAGES.min(left));
            first = piece.end();
            let bytes = &mut copy[..piece.byte_len()];
            // No reducer does without the copy: its time is counted to the first of them.
            let read = || copy_out(outlet.region.bytes(piece), bytes);
            self.gains.time(first_kind, outlet.clock, piece.count.into(), read);
            let bytes = &copy[..piece.byte_len()];
            wire += if builds_on_sent {
                self.send_piece(piece, bytes, stream, outlet)?
            } else {
                self.send_whole(piece, bytes, way, (stream, outlet))?
            };
        }
        self.copy = copy;
        Ok(wire)
    }

    /// Sends a piece of which `copy` is a copy: neighbours that go alike go together.
    fn send_piece(
        &mut self,
        piece: PageRun,
        copy: &[u8],
        stream: &mut dyn BulkSender,
        outlet: &Outlet<'_>,
    ) -> Result<u64, LinkError> {
        let mut packed = std::mem::take(&mut self.packed);
        packed.clear();
        let forms = self.forms(piece, copy.as_chunks().0, &mut packed, outlet.clock);
        let (mut wire, mut at) = (0, 0);
        for alike in forms.chunk_by(|(one, _), (other, _)| one == other) {
            let run = PageRun::new(piece.first.0 + at as u64, alike.len() as u32);
            let pages = &copy[at * PAGE_SIZE..][..run.byte_len()];
            wire += match &alike[0] {
                (Some(packing), first) => {
                    let bytes = &packed[first.start..alike[alike.len() - 1].1.end];
                    self.gains.note(*packing, run.count.into(), bytes.len());
                    put(&mut self.worth, (bytes.len(), run), outlet, |id| stream.packed(id, run, *packing, bytes))?
                }
                (None, _) => {
                    let way = self.worth.choose();
                    self.send_whole(run, pages, way, (&mut *stream, outlet))?
                }
            };
            at += alike.len();
        }
        self.packed = packed;
        Ok(wire)
    }

    /// How each page of a piece goes; what it is packed into is appended to `packed`. Behind this they count as sent.
    fn forms(&mut self, piece: PageRun, pages: &[Page], packed: &mut Vec<u8>, clock: &dyn Clock) -> Vec<Form> {
        let (count, round) = (u64::from(piece.count), self.round);
        let mut forms: Vec<Form> = vec![(None, 0..0); pages.len()];
        if let Some(dictionary) = &mut self.dictionary {
            self.gains.time(Packing::Known, clock, count, || {
                for ((place, page), form) in piece.indices().zip(pages).zip(&mut forms) {
                    if let Some(known) = dictionary.find_or_note(place, page) {
                        let start = packed.len();
                        packed.extend_from_slice(&known.place.to_le_bytes());
                        packed.extend_from_slice(&known.hash.to_le_bytes());
                        *form = (Some(Packing::Known), start..packed.len());
                    }
                }
            });
        }
        if let Some(sent) = &self.sent {
            self.gains.time(Packing::Delta, clock, count, || {
                for ((place, page), form) in piece.indices().zip(pages).zip(&mut forms) {
                    if form.0.is_none() {
                        let start = packed.len();
                        let has_delta = sent.with(place, |base, hash| append_delta(base, hash, page, packed));
                        if has_delta == Some(true) {
                            *form = (Some(Packing::Delta), start..packed.len());
                        }
                    }
                    sent.note(place, round, page);
                }
            });
        }
        forms
    }

    /// Sends pages compressed in this way, or as they are.
    fn send_whole(
        &mut self,
        run: PageRun,
        pages: &[u8],
        way: Option<usize>,
        (stream, outlet): (&mut dyn BulkSender, &Outlet<'_>),
    ) -> Result<u64, LinkError> {
        let count = u64::from(run.count);
        if let Some(way) = way
            && let Some(compressor) = self.compressors.get_mut(way)
        {
            let packing = compressor.packing();
            let began = outlet.clock.thread_cpu();
            let packed = compressor.compress(pages);
            let took = outlet.clock.thread_cpu().saturating_sub(began);
            let spared = packed.map_or(0, |packed| pages.len() - packed.len());
            self.worth.compressed(way, count, took, spared as u64);
            if let Some((_, gain, meter)) = self.gains.of(packing) {
                meter.add(count, took);
                if let Some(packed) = packed {
                    gain.note(count, packed.len());
                }
            }
            if let Some(packed) = packed {
                return put(&mut self.worth, (packed.len(), run), outlet, |id| stream.packed(id, run, packing, packed));
            }
        }
        put(&mut self.worth, (pages.len(), run), outlet, |id| stream.copied(id, run, pages))
    }
}

/// Sends the bytes of a run when the bandwidth limit allows it, and notes how long that took.
fn put(
    worth: &mut Worth,
    (bytes, run): (usize, PageRun),
    outlet: &Outlet<'_>,
    send: impl FnOnce(RegionId) -> Result<u64, LinkError>,
) -> Result<u64, LinkError> {
    let began = outlet.clock.now();
    outlet.pacer.pay_packed(bytes as u64, run.byte_len() as u64);
    let sent = send(outlet.region.spec().id)?;
    worth.sent(sent, outlet.clock.now().saturating_sub(began));
    Ok(sent)
}

/// Appends what makes `page` of the base that the target has, under the base's hash. False, and nothing is appended, if that is too long.
fn append_delta(base: &Page, hash: u64, page: &Page, packed: &mut Vec<u8>) -> bool {
    let start = packed.len();
    packed.extend_from_slice(&hash.to_le_bytes());
    let length_at = packed.len();
    packed.extend_from_slice(&[0; 2]);
    if !delta::encode(base, page, packed) {
        packed.truncate(start);
        return false;
    }
    let length = (packed.len() - length_at - 2) as u16;
    packed[length_at..length_at + 2].copy_from_slice(&length.to_le_bytes());
    true
}
