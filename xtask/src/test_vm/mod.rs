//! `cargo xtask test-vm`: the suites on the kernels that people run.
//!
//! Boots distributions' kernels in QEMU, with KVM inside, and runs the table of [`suites`] there. Several kernels run side by side, as
//! many as there are CPUs. Everything it makes is under `target/test-vm`.

mod initramfs;
mod kernels;
mod machine;
mod modules;
mod record;
mod report;
mod self_test;
mod suites;

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use dunlin_linux::protocol::{JOB, Job, MODULES};
use serde_json::json;

use crate::interrupt;
use crate::run;
use crate::summary::Totals;
use crate::workspace::root;
use initramfs::Initramfs;
use kernels::{Kernel, PINS, cache};
use machine::{Accelerator, Config};
use modules::Modules;
use report::{Gatherer, Report, table};
use suites::{BED_MODULES, BY_HAND, GUEST_MODULES, Programs};

/// Options of `cargo xtask test-vm`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  cargo xtask test-vm                                  # one kernel, all suites
  cargo xtask test-vm --kernel 6.1 --kernel 6.12
  cargo xtask test-vm --kernel ./linux-image-6.12.90_amd64.deb --filter tracking
  cargo xtask test-vm --shell                          # look around inside

Where the machine runs in software, its time is not its own: tests that failed are run once more there, by themselves, and the
summary counts those that passed only then. With KVM nothing is tried twice.

Exits with 0 only if every test on every kernel passed. Logs stay in target/test-vm/results.")]
pub(crate) struct Arguments {
    /// 6.12, 6.1, or the path of a package, an unpacked package, or an image (vmlinuz-VERSION); may be given several times.
    #[arg(long = "kernel", value_name = "KERNEL")]
    kernels: Vec<String>,

    /// Only this suite, or tests whose name holds this.
    #[arg(long, value_name = "NAME", conflicts_with = "shell")]
    filter: Option<String>,

    /// A shell in the machine instead of the suites.
    #[arg(long)]
    shell: bool,

    /// Keep the results in docs/compatibility, with this host's beside, and make docs/src/compatibility.md of them.
    #[arg(long, conflicts_with_all = ["shell", "filter"])]
    record: bool,

    /// Check that the machine notices tests that fail, hang, leave processes or run out of memory, and a kernel that panics.
    #[arg(long, conflicts_with_all = ["shell", "filter", "record"])]
    self_test: bool,

    /// RAM of the machine in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 2048, value_parser = clap::value_parser!(u32).range(256..=1_048_576))]
    memory: u32,

    /// Minutes that one kernel may take, from power-on to its verdict.
    #[arg(long, value_name = "MINUTES", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=600))]
    limit: u32,

    /// How often a Linux guest is moved to and fro.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    moves: u32,

    /// Leave out the suites that run on this host, too, or take minutes.
    #[arg(long, conflicts_with_all = ["filter", "record", "self_test", "shell"])]
    only_there: bool,
}

/// The same as part of `cargo xtask test`, where an emulated machine has no three minutes for one test.
const MOVES_OF_TEST: u32 = 2;

impl Arguments {
    /// What `cargo xtask test` asks for: one kernel, or all.
    pub(crate) fn of_test(all: bool) -> Self {
        let count = if all { PINS.len() } else { 1 };
        let kernels = PINS[..count].iter().map(|pin| pin.name.to_owned()).collect();
        Self {
            kernels,
            filter: None,
            shell: false,
            record: false,
            self_test: false,
            memory: 2048,
            limit: 30,
            moves: MOVES_OF_TEST,
            only_there: !all,
        }
    }

    /// Whether the machine notices what goes wrong, on one kernel.
    pub(crate) fn of_self_test() -> Self {
        Self { self_test: true, only_there: false, ..Self::of_test(false) }
    }
}

/// Runs the verb; false when a test failed.
pub(crate) fn run(arguments: &Arguments) -> Result<bool> {
    let totals = test(arguments)?;
    if !arguments.shell {
        println!("{totals}");
    }
    Ok(totals.failed == 0)
}

/// Runs everything and prints the table; how many tests ended how.
pub(crate) fn test(arguments: &Arguments) -> Result<Totals> {
    if run::output("id", &["-u"]).as_deref() != Some("0") {
        bail!("the test machine shares this host's files by a read-only mount: run it as root");
    }
    let default = [PINS[0].name.to_owned()];
    let words = if arguments.kernels.is_empty() { &default[..] } else { &arguments.kernels };
    let programs = Programs::build()?;
    let kernels = words.iter().map(|word| kernels::find(word)).collect::<Result<Vec<_>>>()?;
    for (index, kernel) in kernels.iter().enumerate() {
        let again = kernels[..index].iter().any(|other| other.label == kernel.label);
        ensure!(!again, "two kernels are called {}: their results would mix, so run one after the other", kernel.label);
    }
    let guests = guests(&programs, &kernels)?;
    interrupt::install()?;
    if arguments.shell {
        ensure!(kernels.len() == 1, "a shell is in one machine: give one --kernel");
        let job = Job {
            shell: true,
            environment: environment(&guests, arguments.moves),
            folder: root().to_owned(),
            ..Job::default()
        };
        shell(arguments, &programs, &kernels[0], job)?;
        return Ok(Totals::default());
    }
    if arguments.self_test {
        let environment = vec![(self_test::ALLOWED.to_owned(), "1".to_owned())];
        // Files of its own: what a failed run has left is still there.
        let kernels: Vec<Kernel> = kernels
            .into_iter()
            .map(|kernel| Kernel { label: format!("{}-self-test", kernel.label), ..kernel })
            .collect();
        let job = Job { suites: vec![programs.faults()?], environment, folder: root().to_owned(), ..Job::default() };
        let reports = side_by_side(arguments, &programs, &kernels, &job)?;
        let mut totals = Totals::default();
        for report in &reports {
            totals.add(self_test::judge(report));
        }
        return Ok(totals);
    }
    let suites = programs.suites(arguments.filter.as_deref(), arguments.only_there)?;
    if arguments.only_there {
        let names = BY_HAND.join(", ");
        println!(
            "left out of the test machine: {names}: this host runs them, or they take minutes there (`cargo xtask test-vm` runs them)"
        );
    }
    let job =
        Job { suites, environment: environment(&guests, arguments.moves), folder: root().to_owned(), ..Job::default() };
    let reports = side_by_side(arguments, &programs, &kernels, &job)?;
    println!("\n{}", table(&reports));
    let mut totals = Totals::default();
    for report in &reports {
        if let Some(problem) = &report.problem {
            println!("kernel {}: {problem} ({})", report.label, results(&report.label).join("console.log").display());
        }
        totals.add(report.totals());
    }
    if arguments.record {
        record::record(&reports, &programs)?;
    }
    Ok(totals)
}

/// Where a kernel's logs and report are kept.
fn results(label: &str) -> PathBuf {
    cache().join("results").join(label)
}

/// What the tests inside must know: the Linux guests that can be booted there.
fn environment(guests: &[(Kernel, PathBuf)], moves: u32) -> Vec<(String, String)> {
    let guests: Vec<_> = guests
        .iter()
        .map(|(kernel, initrd)| json!({ "label": kernel.label, "kernel": kernel.image, "initrd": initrd }))
        .collect();
    vec![
        ("DUNLIN_LINUX_GUESTS".into(), json!(guests).to_string()),
        ("DUNLIN_BIN".into(), root().join("target/debug/dunlin").display().to_string()),
        ("DUNLIN_MOVES".into(), moves.to_string()),
        ("CI".into(), std::env::var("CI").unwrap_or_default()),
    ]
}

/// An initramfs of the Linux guest for each kernel that is tested, which is a guest's kernel too.
fn guests(programs: &Programs, kernels: &[Kernel]) -> Result<Vec<(Kernel, PathBuf)>> {
    let init = fs::read(&programs.guest).context("the Linux guest")?;
    let mut guests = Vec::new();
    for kernel in kernels {
        let modules = Modules::of(&kernel.modules)?.select(&GUEST_MODULES)?;
        let bytes = Initramfs::new(&init, &modules, MODULES)?.finish()?;
        guests.push((kernel.clone(), put("guests", &kernel.label, &bytes)?));
    }
    Ok(guests)
}

/// Writes a file of ours in the cache.
fn put(kind: &str, label: &str, bytes: &[u8]) -> Result<PathBuf> {
    let folder = cache().join(kind);
    fs::create_dir_all(&folder)?;
    let path = folder.join(format!("{label}.cpio"));
    fs::write(&path, bytes).with_context(|| format!("write {}", path.display()))?;
    Ok(path)
}

/// The initramfs of the test machine for one kernel, and the job in it.
fn bed(programs: &Programs, kernel: &Kernel, mut job: Job) -> Result<(PathBuf, Job)> {
    let modules = Modules::of(&kernel.modules)?.select(&BED_MODULES)?;
    job.modules = modules.modules.iter().map(|(name, _)| name.clone()).collect();
    job.missing_modules.clone_from(&modules.missing);
    let mut archive = Initramfs::new(&fs::read(&programs.bed).context("the bed")?, &modules, MODULES)?;
    archive.file(JOB, &serde_json::to_vec(&job)?)?;
    Ok((put("beds", &kernel.label, &archive.finish()?)?, job))
}

fn config<'a>(arguments: &Arguments, kernel: &'a Kernel, initramfs: &'a Path, console: &'a Path) -> Config<'a> {
    Config {
        accelerator: Accelerator::of_host(),
        image: &kernel.image,
        initramfs,
        memory_mib: arguments.memory,
        console,
        limit: Duration::from_secs(u64::from(arguments.limit) * 60),
    }
}

fn shell(arguments: &Arguments, programs: &Programs, kernel: &Kernel, job: Job) -> Result<()> {
    let (initramfs, _) = bed(programs, kernel, job)?;
    machine::shell(&config(arguments, kernel, &initramfs, Path::new("")))
}

/// Runs all kernels, as many at a time as there are CPUs.
fn side_by_side(arguments: &Arguments, programs: &Programs, kernels: &[Kernel], job: &Job) -> Result<Vec<Report>> {
    let workers = std::thread::available_parallelism().map_or(1, usize::from).min(kernels.len());
    let queue: Mutex<VecDeque<usize>> = Mutex::new((0..kernels.len()).collect());
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    let mut done: Vec<(usize, Result<Report>)> = std::thread::scope(|scope| {
        let work = || {
            let mut done = Vec::new();
            while let Some(index) = next() {
                done.push((index, judged(arguments, programs, &kernels[index], job)));
            }
            done
        };
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("no worker panics")).collect()
    });
    done.sort_by_key(|(index, _)| *index);
    done.into_iter().map(|(index, report)| report.with_context(|| format!("kernel {}", kernels[index].label))).collect()
}

/// Runs one kernel's suites, and once more what failed where time is emulated: there a busy host is enough for that.
fn judged(arguments: &Arguments, programs: &Programs, kernel: &Kernel, job: &Job) -> Result<Report> {
    let mut report = one(arguments, programs, kernel, job.clone(), "")?;
    let failed = report.failed();
    if !failed.is_empty() && !arguments.self_test && Accelerator::of_host() == Accelerator::Tcg {
        println!(
            "{} | {} of its tests failed, in a machine that runs in software: once more, alone",
            kernel.label,
            failed.len()
        );
        let suites = suites::only_tests(&job.suites, &failed);
        let second = one(arguments, programs, kernel, Job { suites, ..job.clone() }, "second-try-")?;
        report.take_second_try(&second);
    }
    let path = results(&kernel.label).join("report.json");
    fs::write(&path, serde_json::to_string_pretty(&report)? + "\n")
        .with_context(|| format!("write {}", path.display()))?;
    Ok(report)
}

/// Runs one kernel's suites; what they print is marked with its name. Its logs' names begin with `prefix`.
fn one(arguments: &Arguments, programs: &Programs, kernel: &Kernel, job: Job, prefix: &str) -> Result<Report> {
    let folder = results(&kernel.label);
    fs::create_dir_all(&folder)?;
    let console = folder.join(format!("{prefix}console.log"));
    let began = Instant::now();
    let nonce = format!("{:x}-{}", std::process::id(), kernel.label);
    let (initramfs, job) = bed(programs, kernel, Job { nonce: nonce.clone(), ..job })?;
    let config = config(arguments, kernel, &initramfs, &console);
    println!("{} | booting {} {}", kernel.label, kernel.image.display(), config.accelerator.words());
    let mut log = fs::File::create(folder.join(format!("{prefix}messages.jsonl")))?;
    let mut gatherer = Gatherer::new(&kernel.label, config.accelerator.words(), &nonce, &job.missing_modules);
    let end = machine::run(&config, |message| {
        use std::io::Write;
        // The log is for people; a full disk shows at the report.
        let _ = writeln!(log, "{}", serde_json::to_string(&message).unwrap_or_default());
        for line in gatherer.hear(message) {
            // Nor does a reader that has gone away end a run: a panic here would leave the machine to nobody.
            let _ = writeln!(std::io::stdout(), "{} | {line}", kernel.label);
        }
    })?;
    Ok(gatherer.finish(end, began.elapsed().as_millis() as u64))
}
