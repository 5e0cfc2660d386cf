//! What is written is read again, what is damaged is refused, what was cut off is left out.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use proptest::prelude::*;

use super::format::{RecordedSample, RecordedThread, runs, take_runs};
use super::*;
use crate::model::{AddressSpace, ExitTimes, Gva, PageBitmap, PageCount, VmId};
use crate::port::{Clock, EventSample, EventSource, Look, SampleLog, SpaceEvents, ThreadEvents};

const FRAMES: u64 = 1000;

fn header() -> RecordingHeader {
    let vm =
        RecordedVm { name: "web1".to_owned(), vm_id: VmId(uuid::Uuid::nil()), pid: 7, start_time_ticks: 9, cpus: 1 };
    RecordingHeader {
        vm,
        began_unix_ms: 1,
        interval_ns: 5,
        armed: false,
        writes: false,
        frames: FRAMES,
        sources: Vec::new(),
    }
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("recording")
    }

    fn recorder(&self, max_bytes: u64) -> Result<Recorder, RecordingError> {
        Recorder::create(&self.file(), &header(), max_bytes, |thread| Some(format!("t{thread}")))
    }
}

fn look(recorder: &mut Recorder, ms: u64, threads: &[(u32, ThreadEvents)], written: &[u64]) {
    let sample = EventSample { threads: threads.iter().cloned().collect(), ..EventSample::default() };
    let mut pages = PageBitmap::new(PageCount(FRAMES));
    for &page in written {
        pages.insert(page);
    }
    let at = Duration::from_secs(100) + Duration::from_millis(ms);
    recorder.look(&Look { at, logged: ms > 10, sample: &sample, pages: &pages, writes: &[] }).unwrap();
}

fn pages(count: u64) -> ThreadEvents {
    ThreadEvents { pages_made_writable: count, ..ThreadEvents::default() }
}

#[test]
fn looks_are_given_again_with_their_times_names_and_pages() {
    let folder = Folder::new();
    let mut recorder = folder.recorder(1 << 20).unwrap();
    look(&mut recorder, 0, &[(1, pages(50))], &[3]);
    look(&mut recorder, 10, &[(1, pages(70)), (2, pages(5))], &[0, 1, 2, 64, 999]);
    look(&mut recorder, 30, &[(1, pages(70)), (2, pages(6))], &[]);
    let mut replay = Replay::open(&folder.file()).unwrap();
    assert_eq!(replay.header(), &header());
    let (mut source, clock) = (replay.source(), replay.clock());
    let mut seen = Vec::new();
    while let Some(look) = replay.advance().unwrap() {
        let mut pages = source.empty_pages();
        let sample = source.sample(&mut pages).unwrap();
        assert_eq!((clock.now(), look.names[&1].as_str()), (look.at, "t1"));
        let counts: Vec<u64> = sample.threads.values().map(|events| events.pages_made_writable).collect();
        seen.push((look.at.as_millis(), look.logged, counts, pages.count().0));
    }
    assert_eq!(seen, [(0, false, vec![50], 1), (10, false, vec![70, 5], 5), (30, true, vec![70, 6], 0)]);
    assert!(!replay.broke_off());
    assert!(matches!(folder.recorder(1 << 20), Err(RecordingError::Exists(_))), "a recording was overwritten");
}

#[test]
fn of_a_recording_that_was_cut_off_the_whole_lines_are_read() {
    let folder = Folder::new();
    let mut recorder = folder.recorder(1 << 20).unwrap();
    look(&mut recorder, 0, &[(1, pages(50))], &[3]);
    look(&mut recorder, 10, &[(1, pages(70))], &[4]);
    let whole = std::fs::read(folder.file()).unwrap();
    let ends: Vec<usize> = whole.iter().enumerate().filter(|(_, byte)| **byte == b'\n').map(|(at, _)| at).collect();
    for cut in 0..=whole.len() {
        std::fs::write(folder.file(), &whole[..cut]).unwrap();
        let Ok(mut replay) = Replay::open(&folder.file()) else {
            assert!(cut < ends[0], "{cut}");
            continue;
        };
        let mut looks = 0;
        while replay.advance().unwrap().is_some() {
            looks += 1;
        }
        // A line whose end alone is missing is there.
        assert_eq!(looks, ends[1..].iter().filter(|&&end| cut >= end).count(), "{cut}");
        let within = !ends.iter().any(|&end| cut == end || cut == end + 1);
        assert_eq!(replay.broke_off(), within, "{cut}");
    }
}

#[test]
fn a_damaged_line_is_refused_with_its_place() {
    let folder = Folder::new();
    let mut recorder = folder.recorder(1 << 20).unwrap();
    look(&mut recorder, 0, &[(1, pages(50))], &[3]);
    let whole = std::fs::read_to_string(folder.file()).unwrap();
    let good = r#"{"schema":"dunlin.recorded-sample/v1","at_ns":5,"logged":false,"threads":[],"lost":{"out_of_range":0,"threads_full":0,"exits_full":0,"too_large":0,"unreadable":0,"unattributed":0},"pages":[1,2]}"#;
    let writes = |write: &str| format!(r#"{{"schema":"dunlin.recorded-writes/v1","writes":[{write}]}}"#);
    for (words, line) in [
        ("EOF while parsing", String::new()),
        ("no line of a recording", "nonsense".to_owned()),
        ("where `dunlin.recorded-sample/v1` belongs", r#"{"schema":"other\u001b/v1"}"#.to_owned()),
        ("missing field", r#"{"schema":"dunlin.recorded-sample/v1"}"#.to_owned()),
        ("within the frames", good.replace("[1,2]", "[999,2]")),
        ("within the frames", good.replace("[1,2]", "[1,0]")),
        ("within the frames", good.replace("[1,2]", "[1]")),
        ("within the frames", good.replace("[1,2]", "[18446744073709551615,2]")),
        ("more than a day", good.replace("\"at_ns\":5", "\"at_ns\":86400000000001")),
        ("twice", good.replace("[],\"lost", r#"[{"thread_id":1},{"thread_id":1}],"lost"#)),
        (
            "than any thread",
            good.replace("[],\"lost", r#"[{"thread_id":1,"pages_made_writable":9007199254740992}],"lost"#),
        ),
        ("than any thread", good.replace("[],\"lost", r#"[{"thread_id":1,"first_writes":[[4000000,1]]}],"lost"#)),
        ("a write is none", writes("[1,1,1,0,0]")),
        ("a write is none", writes("[1,1,1,1,2]")),
        ("a write is none", writes("[1,4294967296,1,1,1]")),
        ("a write is none", writes("[1,1,1,1,1,1,1,1]")),
        ("a write is none", writes("[1,1,1,1]")),
        ("expected a", writes("1")),
        ("lost than there can be", good.replace("\"too_large\":0", "\"too_large\":18446744073709551615")),
    ] {
        std::fs::write(folder.file(), format!("{whole}{line}\n{good}\n")).unwrap();
        let mut replay = Replay::open(&folder.file()).unwrap();
        replay.advance().unwrap();
        let error = replay.advance().unwrap_err().to_string();
        assert!(error.contains("line 3: ") && error.contains(words), "{line}: {error}");
        assert!(!error.contains('\u{1b}'), "a file moves the terminal's cursor");
    }
    std::fs::write(folder.file(), format!("{whole}{good}\n")).unwrap();
    let mut replay = Replay::open(&folder.file()).unwrap();
    assert!(replay.advance().unwrap().is_some() && replay.advance().unwrap().is_some());
    let wide = header_line(u64::MAX);
    std::fs::write(folder.file(), wide).unwrap();
    assert!(Replay::open(&folder.file()).unwrap_err().to_string().contains("line 1: `frames`"));
}

fn header_line(frames: u64) -> Vec<u8> {
    use crate::model::schema::Schema;
    serde_json::to_vec(&RecordingHeader { frames, ..header() }.tagged()).unwrap()
}

#[test]
fn a_line_without_end_is_not_read_whole() {
    let folder = Folder::new();
    let mut file = std::fs::File::create(folder.file()).unwrap();
    file.write_all(&header_line(FRAMES)).unwrap();
    file.write_all(b"\n").unwrap();
    file.write_all(&vec![b' '; MAX_LINE_BYTES + 10]).unwrap();
    let mut replay = Replay::open(&folder.file()).unwrap();
    assert!(replay.advance().unwrap_err().to_string().contains("line 2: it is too long"));
}

#[test]
fn a_recording_ends_at_its_size_and_can_be_replayed() {
    let folder = Folder::new();
    let mut recorder = folder.recorder(1000).unwrap();
    let sample = EventSample { threads: [(1, pages(1))].into(), ..EventSample::default() };
    let mut full = None;
    for second in 0..100 {
        let look = Look {
            at: Duration::from_secs(second),
            logged: false,
            sample: &sample,
            pages: &PageBitmap::new(PageCount(0)),
            writes: &[],
        };
        if let Err(error) = recorder.look(&look) {
            full = Some((second, error.to_string()));
            break;
        }
    }
    let (kept, words) = full.expect("the size is kept");
    assert!(words.contains("--max-size") && std::fs::metadata(folder.file()).unwrap().len() <= 1000, "{words}");
    let mut replay = Replay::open(&folder.file()).unwrap();
    let mut looks = 0;
    while replay.advance().unwrap().is_some() {
        looks += 1;
    }
    assert!(looks == kept && kept > 0, "{looks} of {kept}");
}

#[test]
fn the_form_of_a_line_is_kept() {
    let [header, writes, sample]: [serde_json::Value; 3] = samples().try_into().unwrap();
    let golden = r#"{"schema":"dunlin.recorded-sample/v1","at_ns":1000000000,"logged":false,"threads":[{"thread_id":8,"name":"vcpu0","pages_made_writable":3,"huge_mappings":0,"dirty_ring_pushes":0,"pages_logged":0,"guest_exits":2,"exits":{"REASON":{"count":2,"total_ns":3000,"longest_ns":2000,"bins":[[9,1],[10,1]]}},"guest_exit_reasons":{"REASON":{"count":2,"total_ns":3000,"longest_ns":2000,"bins":[[9,1],[10,1]]}},"first_writes":[[1,3]],"spaces":[{"address_space":4096,"pages_made_writable":3,"first_writes":[[1,3]]}],"code":[{"address_space":4096,"instruction":4096,"pages":3}]}],"lost":{"out_of_range":0,"threads_full":0,"exits_full":0,"too_large":0,"unreadable":0,"unattributed":0,"writes_full":1},"pages":[70,2,100,1]}"#;
    assert_eq!(sample, serde_json::from_str::<serde_json::Value>(golden).unwrap());
    RecordedSample::parse(golden.as_bytes(), 1 << 16, 0).unwrap();
    assert_eq!(header["schema"], "dunlin.recording/v1");
    let golden = r#"{"schema":"dunlin.recorded-writes/v1","writes":[[999000000,8,70,1,1,4096,4096]]}"#;
    assert_eq!(writes, serde_json::from_str::<serde_json::Value>(golden).unwrap());
}

fn any_thread() -> impl Strategy<Value = ThreadEvents> {
    let times = (0u64..1000, 0u64..1 << 30, prop::array::uniform4(0u32..50)).prop_map(|(count, total_ns, few)| {
        let mut times = ExitTimes { count, total_ns, longest_ns: total_ns, ..ExitTimes::default() };
        times.bins[..4].copy_from_slice(&few);
        times
    });
    let exits = prop::collection::btree_map("[a-c]", times, 0..3);
    let bins = prop::collection::vec(0u32..9, dunlin_ebpf::FIRST_WRITE_BINS as usize);
    let space = (0u64..99, bins.clone())
        .prop_map(|(pages, bins)| SpaceEvents { pages_made_writable: pages, first_writes: bins });
    let spaces = prop::collection::btree_map((0u64..4).prop_map(AddressSpace), space, 0..4);
    let code =
        prop::collection::btree_map((0u64..3, 0u64..3).prop_map(|(a, i)| (AddressSpace(a), Gva(i))), 0u64..99, 0..4);
    (prop::array::uniform5(0u64..1000), exits.clone(), exits, bins, spaces, code).prop_map(
        |([pages, huge, pushes, logged, guest], exits, reasons, first_writes, spaces, code)| ThreadEvents {
            pages_made_writable: pages,
            huge_mappings: huge,
            dirty_ring_pushes: pushes,
            pages_logged: logged,
            guest_exits: guest,
            exits,
            guest_exit_reasons: reasons,
            first_writes,
            spaces,
            code,
        },
    )
}

proptest! {
    #[test]
    fn any_set_of_pages_is_its_runs(written in prop::collection::vec((0u64..FRAMES, 1u64..200), 0..20)) {
        let mut pages = PageBitmap::new(PageCount(FRAMES));
        for page in written.into_iter().flat_map(|(first, count)| first..first + count) {
            pages.insert(page);
        }
        let mut again = PageBitmap::new(PageCount(FRAMES));
        take_runs(&runs(&pages), &mut again);
        prop_assert_eq!(again, pages);
    }

    /// Whatever counters do, those of a replay differ from look to look by what the true ones did.
    #[test]
    fn differences_are_those_of_the_counters(looks in prop::collection::vec(any_thread(), 2..5)) {
        let (mut before, mut replayed) = (ThreadEvents::default(), ThreadEvents::default());
        for now in looks {
            let new = now.since(&before);
            let line = serde_json::to_string(&RecordedThread::of(1, None, &new)).unwrap();
            let next = serde_json::from_str::<RecordedThread>(&line).unwrap().onto(Some(&replayed));
            prop_assert_eq!(next.since(&replayed), new);
            (before, replayed) = (now, next);
        }
    }
}
