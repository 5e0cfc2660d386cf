//! The configuration file: what an operator sets once for a host, `/etc/dunlin/dunlin.toml` unless `--config` names another.
//!
//! Owns the file's keys and their defaults. The command line beats the file, the file beats the defaults. What is not
//! understood is refused with file and line: a key that is silently ignored is a limit that does not hold.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::{Deserializer, Error as _, Unexpected};
use serde::{Deserialize, de};
use toml::Spanned;

use super::registry::{DEFAULT_RUN_DIR, DEFAULT_STATE_DIR};
use crate::announce::Schedule;
use crate::announce::conflict::OnConflict;
use crate::cgroup;
use crate::migrate::{OnStuck, SourceOptions};
use crate::model::units::{display_duration, parse_duration};
use crate::model::{BytesPerSecond, VmId, VmRef};
use crate::stun::StunPolicy;
use crate::track::DEFAULT_BUDGET;

/// Where the file is unless told otherwise. It need not exist.
pub const DEFAULT_FILE: &str = "/etc/dunlin/dunlin.toml";
/// The version of the file's form that this build reads.
const VERSION: i64 = 1;
/// A longer file is no configuration.
const MAX_BYTES: u64 = 1 << 20;

/// The configuration, complete: the file's values, and the defaults where it has none.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Folder with one entry and the sockets of each VM.
    pub run_dir: PathBuf,
    /// Folder with journals and the audit log.
    pub state_dir: PathBuf,
    /// Of `dunlin migrate`, and as far as it has them of `dunlin vm receive`.
    pub migrate: MigrateConfig,
    /// When announcements are repeated, and how many.
    pub announce: AnnounceConfig,
    /// Of everything that watches VMs.
    pub track: TrackConfig,
    /// Of everything that slows writers.
    pub stun: StunConfig,
    /// Of encrypted links.
    pub tls: TlsConfig,
}

/// The table `[tls]`: where the files of encrypted links are; those that are not named where `dunlin pki` says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsConfig {
    /// Certificates of the CAs whose hosts are trusted.
    pub ca: Option<PathBuf>,
    /// This host's certificate.
    pub cert: Option<PathBuf>,
    /// Its private key.
    pub key: Option<PathBuf>,
    /// Revocation lists.
    pub crl: Option<PathBuf>,
}

/// The table `[announce]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AnnounceConfig {
    /// When rounds are repeated.
    pub schedule: Schedule,
    /// What all who announce at this host may send together, at least 1; none: no limit.
    pub frames_per_second: Option<u32>,
    /// What is done when somebody else has the addresses: of `dunlin announce`, `vm receive` and `vm run`; none: each as it is used to.
    pub on_conflict: Option<OnConflict>,
}

/// The table `[stun]`: whose writers may be slowed, and how far.
#[derive(Clone, Debug, PartialEq)]
pub struct StunConfig {
    /// VMs that are never touched, whoever asks: names, `uuid:U`, `pid:P`, or `*` for all.
    pub never: Vec<String>,
    /// VMs of other VMMs that may be slowed, likewise.
    pub foreign: Vec<String>,
    /// The largest part of its time for which a vCPU may be held, above 0, at most 1.
    pub max_share: f64,
    /// When the vCPUs of a VM have been held for so long, all together, everybody is let go.
    pub max_total: Duration,
    /// How long a limit takes to come down.
    pub ramp: Duration,
    /// For how long a vCPU of a foreign VM may be held at a time, 10 ms to 1 s. A CPU limit below 10 % needs more than 10 ms.
    pub longest_hold: Duration,
}

impl StunConfig {
    /// What it allows, as policy takes it.
    pub fn policy(&self) -> StunPolicy {
        StunPolicy { max_share: self.max_share, max_total: self.max_total, ramp: self.ramp, ..StunPolicy::default() }
    }
}

impl Default for StunConfig {
    fn default() -> Self {
        let StunPolicy { max_share, max_total, ramp, .. } = StunPolicy::default();
        let longest_hold = Duration::from_millis(50);
        Self { never: Vec::new(), foreign: Vec::new(), max_share, max_total, ramp, longest_hold }
    }
}

/// The table `[track]`: what may be done to VMs of other VMMs, and what watching may cost.
#[derive(Clone, Debug, PartialEq)]
pub struct TrackConfig {
    /// VMs whose memory may be read: names, `uuid:U`, `pid:P`, or `*` for all.
    pub read_memory: Vec<String>,
    /// VMs whose memory may be write-protected by soft-dirty marks, likewise.
    pub soft_dirty: Vec<String>,
    /// The part of one core that all BPF programs together may take, above 0, at most 1.
    pub budget: f64,
}

impl Default for TrackConfig {
    fn default() -> Self {
        Self { read_memory: Vec::new(), soft_dirty: Vec::new(), budget: DEFAULT_BUDGET }
    }
}

/// The table `[migrate]`.
#[derive(Clone, Debug, PartialEq)]
pub struct MigrateConfig {
    /// Page streams.
    pub streams: u16,
    /// The blackout to stay below.
    pub downtime: Duration,
    /// The most that all page streams together may send.
    pub bandwidth: Option<BytesPerSecond>,
    /// Pre-copy gives up after so many rounds.
    pub max_rounds: u32,
    /// What to do when pre-copy does not end by itself.
    pub on_stuck: OnStuck,
    /// Nothing moving for this long counts as a stalled peer.
    pub stall: Duration,
    /// Plain TCP beyond loopback is fine.
    pub insecure_plaintext: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            run_dir: DEFAULT_RUN_DIR.into(),
            state_dir: DEFAULT_STATE_DIR.into(),
            migrate: MigrateConfig::default(),
            announce: AnnounceConfig::default(),
            track: TrackConfig::default(),
            stun: StunConfig::default(),
            tls: TlsConfig::default(),
        }
    }
}

impl Default for MigrateConfig {
    fn default() -> Self {
        let SourceOptions { streams, downtime, bandwidth, max_rounds, on_stuck, stall, .. } = SourceOptions::default();
        Self { streams, downtime, bandwidth, max_rounds, on_stuck, stall, insecure_plaintext: false }
    }
}

/// A file that cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("configuration {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It cannot be understood.
    #[error("configuration {}, line {line}: {problem}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong there.
        problem: String,
    },
}

/// The whole file; every key but `version` may be absent.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(rename = "version")]
    _version: i64,
    run_dir: Option<Absolute>,
    state_dir: Option<Absolute>,
    #[serde(default)]
    migrate: MigrateTable,
    announce: Option<Spanned<AnnounceTable>>,
    #[serde(default)]
    track: TrackTable,
    #[serde(default)]
    stun: StunTable,
    #[serde(default)]
    tls: TlsTable,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct TlsTable {
    ca: Option<Absolute>,
    cert: Option<Absolute>,
    key: Option<Absolute>,
    crl: Option<Absolute>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct StunTable {
    never: Option<Vec<VmWord>>,
    foreign: Option<Vec<VmWord>>,
    max_share: Option<Share>,
    max_total: Option<Time>,
    ramp: Option<Time>,
    longest_hold: Option<Hold>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct TrackTable {
    read_memory: Option<Vec<VmWord>>,
    soft_dirty: Option<Vec<VmWord>>,
    budget: Option<Share>,
}

/// `*`, or a VM as every command takes it.
struct VmWord(String);
/// A part of a whole: above 0, at most 1.
struct Share(f64);

impl<'de> Deserialize<'de> for VmWord {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let word = String::deserialize(deserializer)?;
        if word != "*" {
            word.parse::<VmRef>().map_err(de::Error::custom)?;
        }
        Ok(Self(word))
    }
}

impl<'de> Deserialize<'de> for Share {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let share = f64::deserialize(deserializer)?;
        if share > 0.0 && share <= 1.0 {
            Ok(Self(share))
        } else {
            Err(D::Error::custom(format!("{share} must be above 0 and at most 1 (0.01 is 1 %)")))
        }
    }
}

/// A time that a CPU limit can have as its period.
struct Hold(Duration);

impl<'de> Deserialize<'de> for Hold {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Time(time) = Time::deserialize(deserializer)?;
        if (cgroup::PERIOD..=cgroup::LONGEST_PERIOD).contains(&time) {
            Ok(Self(time))
        } else {
            Err(D::Error::custom(format!("{} must be from 10ms to 1s", display_duration(time))))
        }
    }
}

/// Looked at first: a file of another version may have other keys.
#[derive(Deserialize)]
struct Version {
    version: Option<Spanned<i64>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct MigrateTable {
    streams: Option<Whole<1, 64>>,
    downtime: Option<Time>,
    bandwidth: Option<Rate>,
    max_rounds: Option<Whole<1, 1000>>,
    on_stuck: Option<OnStuck>,
    stall: Option<Time>,
    insecure_plaintext: Option<bool>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AnnounceTable {
    initial: Option<Time>,
    step: Option<Time>,
    max: Option<Time>,
    rounds: Option<Whole<1, 1000>>,
    jitter: Option<Time>,
    frames_per_second: Option<Whole<1, 1_000_000>>,
    on_conflict: Option<OnConflict>,
}

/// A path that means the same in every working folder.
struct Absolute(PathBuf);
/// A time as people write it: `30ms`.
struct Time(Duration);
/// A rate as people write it: `1Gbit`.
struct Rate(BytesPerSecond);
/// A number between limits.
struct Whole<const LEAST: i64, const MOST: i64>(i64);

impl<'de> Deserialize<'de> for Absolute {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let path = PathBuf::deserialize(deserializer)?;
        if path.is_absolute() {
            Ok(Self(path))
        } else {
            Err(D::Error::custom(format!("`{}` must begin with `/`", path.display())))
        }
    }
}

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        parse_duration(&String::deserialize(deserializer)?).map(Self).map_err(de::Error::custom)
    }
}

impl<'de> Deserialize<'de> for Rate {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map(Self).map_err(de::Error::custom)
    }
}

impl<'de, const LEAST: i64, const MOST: i64> Deserialize<'de> for Whole<LEAST, MOST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = i64::deserialize(deserializer)?;
        if (LEAST..=MOST).contains(&number) {
            return Ok(Self(number));
        }
        let range = format!("a number from {LEAST} to {MOST}");
        Err(D::Error::invalid_value(Unexpected::Signed(number), &range.as_str()))
    }
}

/// What is wrong, and at which byte it begins.
struct Problem {
    at: usize,
    what: String,
}

impl From<toml::de::Error> for Problem {
    fn from(error: toml::de::Error) -> Self {
        Self { at: error.span().map_or(0, |span| span.start), what: error.message().to_owned() }
    }
}

fn read(text: &str) -> Result<Config, Problem> {
    let Version { version } = toml::from_str(text)?;
    let Some(version) = version else {
        return Err(Problem { at: 0, what: format!("it has no version; begin it with `version = {VERSION}`") });
    };
    if *version.get_ref() != VERSION {
        let what = format!("it has version {}; this build reads version {VERSION}", version.get_ref());
        return Err(Problem { at: version.span().start, what });
    }
    let file: File = toml::from_str(text)?;
    let (defaults, schedule) = (Config::default(), Schedule::default());
    let MigrateConfig { streams, downtime, bandwidth, max_rounds, on_stuck, stall, insecure_plaintext } =
        defaults.migrate;
    let announce = match file.announce {
        None => AnnounceConfig::default(),
        Some(table) => {
            let at = table.span().start;
            let AnnounceTable { initial, step, max, rounds, jitter, frames_per_second, on_conflict } =
                table.into_inner();
            let schedule = Schedule::new(
                initial.map_or(schedule.initial(), |time| time.0),
                step.map_or(schedule.step(), |time| time.0),
                max.map_or(schedule.max(), |time| time.0),
                rounds.map_or(schedule.rounds(), |number| number.0 as u32),
            )
            .and_then(|schedule| schedule.with_jitter(jitter.map_or(Duration::ZERO, |time| time.0)))
            .map_err(|error| Problem { at, what: format!("announce: {error}") })?;
            AnnounceConfig { schedule, frames_per_second: frames_per_second.map(|number| number.0 as u32), on_conflict }
        }
    };
    Ok(Config {
        run_dir: file.run_dir.map_or(defaults.run_dir, |path| path.0),
        state_dir: file.state_dir.map_or(defaults.state_dir, |path| path.0),
        migrate: MigrateConfig {
            streams: file.migrate.streams.map_or(streams, |number| number.0 as u16),
            downtime: file.migrate.downtime.map_or(downtime, |time| time.0),
            bandwidth: file.migrate.bandwidth.map(|rate| rate.0).or(bandwidth),
            max_rounds: file.migrate.max_rounds.map_or(max_rounds, |number| number.0 as u32),
            on_stuck: file.migrate.on_stuck.unwrap_or(on_stuck),
            stall: file.migrate.stall.map_or(stall, |time| time.0),
            insecure_plaintext: file.migrate.insecure_plaintext.unwrap_or(insecure_plaintext),
        },
        announce,
        track: TrackConfig {
            read_memory: words(file.track.read_memory),
            soft_dirty: words(file.track.soft_dirty),
            budget: file.track.budget.map_or(defaults.track.budget, |share| share.0),
        },
        stun: StunConfig {
            never: words(file.stun.never),
            foreign: words(file.stun.foreign),
            max_share: file.stun.max_share.map_or(defaults.stun.max_share, |share| share.0),
            max_total: file.stun.max_total.map_or(defaults.stun.max_total, |time| time.0),
            ramp: file.stun.ramp.map_or(defaults.stun.ramp, |time| time.0),
            longest_hold: file.stun.longest_hold.map_or(defaults.stun.longest_hold, |hold| hold.0),
        },
        tls: TlsConfig {
            ca: file.tls.ca.map(|path| path.0),
            cert: file.tls.cert.map(|path| path.0),
            key: file.tls.key.map(|path| path.0),
            crl: file.tls.crl.map(|path| path.0),
        },
    })
}

/// Whether a list names a VM: by `*`, its name, `uuid:U` or `pid:P`.
pub fn names(list: &[String], name: &str, vm_id: VmId, pid: u32) -> bool {
    list.iter()
        .any(|word| word == "*" || *word == name || *word == format!("uuid:{vm_id}") || *word == format!("pid:{pid}"))
}

fn words(list: Option<Vec<VmWord>>) -> Vec<String> {
    list.into_iter().flatten().map(|word| word.0).collect()
}

/// Reads a configuration's text; `path` is only named in errors.
///
/// # Errors
/// What is not understood, with its line.
pub fn parse(path: &Path, text: &str) -> Result<Config, ConfigError> {
    read(text).map_err(|Problem { at, what }| {
        let before = text.as_bytes().iter().take(at);
        let line = 1 + before.filter(|&&byte| byte == b'\n').count();
        ConfigError::Content { path: path.to_owned(), line, problem: what.trim().replace('\n', "; ") }
    })
}

/// Reads the file that the operator named, or [`DEFAULT_FILE`] if there is one.
///
/// # Errors
/// A named file that is not there, one that cannot be read, or that cannot be understood.
pub fn load(named: Option<&Path>) -> Result<Config, ConfigError> {
    use io::Read;
    let path = named.unwrap_or(Path::new(DEFAULT_FILE));
    let failed = |source| ConfigError::Io { path: path.to_owned(), source };
    let file = match std::fs::File::open(path) {
        Err(error) if named.is_none() && error.kind() == io::ErrorKind::NotFound => return Ok(Config::default()),
        opened => opened.map_err(failed)?,
    };
    let mut text = String::new();
    file.take(MAX_BYTES + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(failed(io::Error::other(format!("it is longer than {MAX_BYTES} bytes"))));
    }
    parse(path, &text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Config, String> {
        parse(Path::new("dunlin.toml"), text).map_err(|error| error.to_string())
    }

    #[test]
    fn the_file_beats_the_defaults_key_by_key() {
        assert_eq!(parsed("version = 1").unwrap(), Config::default());
        let text =
            "version = 1\nrun_dir = '/run/d'\n[migrate]\nstreams = 4\nbandwidth = '1Gbit'\n[announce]\nrounds = 9";
        let config = parsed(text).unwrap();
        assert_eq!(config.run_dir, Path::new("/run/d"));
        assert_eq!(config.state_dir, Config::default().state_dir);
        assert_eq!((config.migrate.streams, config.migrate.bandwidth), (4, Some(BytesPerSecond(125_000_000))));
        assert_eq!(config.migrate.downtime, MigrateConfig::default().downtime);
        let schedule = config.announce.schedule;
        assert_eq!((schedule.rounds(), schedule.initial()), (9, Duration::from_millis(50)));
        let config = parsed("version = 1\n[announce]\njitter = '20ms'\nframes_per_second = 500").unwrap().announce;
        assert_eq!((config.schedule.jitter(), config.frames_per_second), (Duration::from_millis(20), Some(500)));
    }

    #[test]
    fn the_book_shows_every_key_with_its_default() {
        let page = include_str!("../../../docs/src/configuration.md");
        let example = page.split("```toml\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
        assert_eq!(parsed(example).unwrap(), Config::default());
        let keys = [
            "run_dir",
            "state_dir",
            "streams",
            "downtime",
            "bandwidth",
            "max_rounds",
            "on_stuck",
            "never",
            "foreign",
            "max_share",
            "max_total",
            "ramp",
            "longest_hold",
            "stall",
            "insecure_plaintext",
            "initial",
            "step",
            "max",
            "rounds",
            "jitter",
            "frames_per_second",
            "on_conflict",
            "ca",
            "cert",
            "key",
            "crl",
        ];
        for key in keys {
            let shown = example.lines().any(|line| line.trim_start_matches("# ").starts_with(&format!("{key} =")));
            assert!(shown, "the book's example has no `{key}`");
        }
    }

    #[test]
    fn what_is_not_understood_is_refused_with_its_line() {
        for (text, line, word) in [
            ("", 1, "no version"),
            ("\n\nversion = 2\nnew_key = 1", 3, "version 2"),
            ("version = 1\nrundir = '/x'", 2, "unknown field `rundir`"),
            ("version = 1\nrun_dir = 'x'", 2, "must begin with `/`"),
            ("version = 1\n[migrate]\n\nstreams = 65", 4, "from 1 to 64"),
            ("version = 1\n[migrate]\ndowntime = '30'", 3, "no duration"),
            ("version = 1\n[migrate]\ndowntime = 30", 3, "expected a string"),
            ("version = 1\n[migrate]\nbandwidth = '1Gb'", 3, "no bandwidth"),
            ("version = 1\n[announce]\nround = 1", 3, "unknown field `round`"),
            ("version = 1\n[migrate]\non_stuck = 'pray'", 3, "unknown variant `pray`"),
            ("version = 1\n[stun]\nmax_share = 1.5", 3, "at most 1"),
            ("version = 1\n[tls]\nca = 'ca.pem'", 3, "must begin with `/`"),
            ("version = 1\n[tls]\npem = '/ca.pem'", 3, "unknown field `pem`"),
            ("version = 1\n[stun]\nlongest_hold = '5ms'", 3, "from 10ms to 1s"),
            ("version = 1\n\n[announce]\nmax = '200s'", 3, "longer than 100 s"),
            ("version = 1\n\n[announce]\njitter = '200s'", 3, "longer than 100 s"),
            ("version = 1\n[announce]\nframes_per_second = 0", 3, "from 1 to 1000000"),
            ("version = 1\nversion = 1", 2, "duplicate"),
            ("version = 1\n[migrate", 2, ""),
        ] {
            let error = parsed(text).unwrap_err();
            assert!(
                error.contains(&format!("dunlin.toml, line {line}: ")) && error.contains(word),
                "{text:?}: {error}"
            );
            assert!(!error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn only_a_named_file_must_exist() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("dunlin.toml");
        assert!(matches!(load(Some(&path)), Err(ConfigError::Io { .. })));
        std::fs::write(&path, "version = 1\nstate_dir = '/s'\n").unwrap();
        assert_eq!(load(Some(&path)).unwrap().state_dir, Path::new("/s"));
        std::fs::write(&path, [0xff]).unwrap();
        assert!(matches!(load(Some(&path)), Err(ConfigError::Io { .. })));
    }
}
