//! What `dunlin wws`, `dunlin heat` and `dunlin rogue` have in common: how a VM's profile is measured, and how that goes on is shown.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use indicatif::ProgressBar;

use super::places::{RunDir, StateDir};
use crate::model::VmRef;
use crate::model::outcome::exit;
use crate::model::units::{display_bytes, display_duration, parse_duration};
use crate::service::config::Config;
use crate::service::guest_names::GuestFiles;
use crate::service::interrupt::Interrupt;
use crate::service::out::complain;
use crate::service::profile::{
    Allowed, How, LONGEST_WINDOW, Profile, ProfileError, ProfileRequest, SHORTEST_WINDOW, profile,
};

/// Which regime to measure under.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum RegimeArg {
    /// The most exact one that is possible and allowed.
    Auto,
    /// Write protection by the VM's own dirty log (VMs that dunlin runs).
    Armed,
    /// Write protection by soft-dirty marks (needs --allow-soft-dirty).
    SoftDirty,
    /// What shows while someone else has the VM's dirty log on.
    Logged,
    /// Comparing a sample of the VM's pages (needs --allow-read-memory).
    Sampled,
}

/// What an operator knows of the guest's kernel.
#[derive(Debug, Args)]
pub(super) struct GuestFilesArgs {
    /// The System.map of the guest's kernel, or a copy of its /proc/kallsyms: where its list of processes begins.
    #[arg(long, value_name = "FILE")]
    system_map: Option<PathBuf>,

    /// The types of the guest's kernel: its vmlinux, or BTF alone, as in its /sys/kernel/btf/vmlinux.
    #[arg(long, value_name = "FILE")]
    btf: Option<PathBuf>,
}

impl GuestFilesArgs {
    /// The files.
    pub(super) fn files(self) -> GuestFiles {
        GuestFiles { system_map: self.system_map, btf: self.btf }
    }
}

/// How to measure.
#[derive(Debug, Args)]
pub(super) struct ProfilingArgs {
    /// Under which regime to measure.
    #[arg(long, value_enum, default_value = "auto")]
    regime: RegimeArg,

    /// The length of a window.
    #[arg(long, value_name = "TIME", default_value = "1280ms", value_parser = parse_duration)]
    window: Duration,

    /// How many windows to measure.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    windows: u32,

    /// The part of the time, in percent, that windows may take; in between the VM is left alone.
    #[arg(long, value_name = "PERCENT", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=100))]
    duty: u32,

    /// How much windows may slow the VM down on average, in percent: it is left alone between two of them for as long as that takes.
    #[arg(long, value_name = "PERCENT", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=100))]
    max_slowdown: u32,

    /// Write-protect one page of each N, a power of two, to stand for all; 1 protects all, which is exact and may slow the VM down.
    /// Without it as many are protected as keep faults below some percent of a vCPU's time. For VMs that dunlin runs with a bitmap.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=4096))]
    protect_one_in: Option<u64>,

    /// Allow reading the memory of this VM though another VMM runs it; `track.read_memory` of the configuration can allow it too.
    #[arg(long)]
    allow_read_memory: bool,

    /// Allow write-protecting the memory of this VM by soft-dirty marks though another VMM runs it; `track.soft_dirty` of the
    /// configuration can allow it too.
    #[arg(long)]
    allow_soft_dirty: bool,

    /// Print diagnostics of the BPF programs themselves.
    #[arg(long)]
    probe_log: bool,

    #[command(flatten)]
    run_dir: RunDir,

    #[command(flatten)]
    state_dir: StateDir,
}

impl ProfilingArgs {
    /// The folder with the log of migrations.
    pub(super) fn state_dir(self, config: &Config) -> PathBuf {
        self.state_dir.path(config)
    }

    /// What they ask for, of a VM.
    ///
    /// # Errors
    /// In words, what cannot be.
    pub(super) fn request(self, vm: VmRef, config: &Config) -> Result<ProfileRequest, String> {
        if !(SHORTEST_WINDOW..=LONGEST_WINDOW).contains(&self.window) {
            let (shortest, longest) = (display_duration(SHORTEST_WINDOW), display_duration(LONGEST_WINDOW));
            return Err(format!("--window must be {shortest} to {longest}"));
        }
        if let Some(every) = self.protect_one_in.filter(|every| !every.is_power_of_two()) {
            return Err(format!("--protect-one-in must be a power of two, not {every}"));
        }
        let how = match self.regime {
            RegimeArg::Auto => How::Auto,
            RegimeArg::Armed => How::Armed,
            RegimeArg::SoftDirty => How::SoftDirty,
            RegimeArg::Logged => How::Logged,
            RegimeArg::Sampled => How::Sampled,
        };
        Ok(ProfileRequest {
            run_dir: self.run_dir.path(config),
            state_dir: self.state_dir.path(config),
            vm,
            how,
            allowed: Allowed { read_memory: self.allow_read_memory, soft_dirty: self.allow_soft_dirty },
            config: config.track.clone(),
            window: self.window,
            windows: self.windows,
            duty: f64::from(self.duty) / 100.0,
            protect_one_in: self.protect_one_in,
            max_slowdown: f64::from(self.max_slowdown) / 100.0,
            names: false,
            guest_files: GuestFiles::default(),
            who: false,
            probe_log: self.probe_log,
        })
    }
}

/// Measures, and shows on standard error how it goes on where that is a terminal.
fn measured(request: &ProfileRequest, interrupt: &Interrupt) -> Result<Profile, ProfileError> {
    let bar = ProgressBar::new(u64::from(request.windows)).with_message(format!("measuring {}", request.vm));
    bar.set_style(
        indicatif::ProgressStyle::with_template("{msg} {bar:30} window {pos} of {len} {elapsed}")
            .unwrap_or_else(|_| indicatif::ProgressStyle::default_bar()),
    );
    bar.enable_steady_tick(Duration::from_millis(200));
    let result = profile(request, interrupt, &mut |done, all| {
        bar.set_length(all.into());
        bar.set_position(done.into());
    });
    bar.finish_and_clear();
    result
}

/// The profile that the arguments ask for; or, with the reason said where there is one, the exit code.
pub(super) fn taken(vm: VmRef, arguments: ProfilingArgs, config: &Config) -> anyhow::Result<Result<Profile, u8>> {
    match arguments.request(vm, config) {
        Ok(request) => taken_by(&request),
        Err(words) => {
            complain!("dunlin: {words}");
            Ok(Err(exit::USAGE))
        }
    }
}

/// The profile that is asked for, likewise.
pub(super) fn taken_by(request: &ProfileRequest) -> anyhow::Result<Result<Profile, u8>> {
    let interrupt = Interrupt::install()?;
    match measured(request, &interrupt) {
        Err(error) => no_profile(error).map(Err),
        Ok(profile) => Ok(Ok(profile)),
    }
}

/// The exit code of what is no failure of the measurement, with the reason said where there is one.
pub(super) fn no_profile(error: ProfileError) -> anyhow::Result<u8> {
    let code = match error {
        ProfileError::Interrupted => return Ok(exit::CANCELLED),
        ProfileError::GuestFile(_) => exit::USAGE,
        ProfileError::NotInSamples { .. } => exit::REFUSED,
        other => return Err(other.into()),
    };
    complain!("dunlin: {error}");
    Ok(code)
}

/// What stands above every report of a profile.
pub(super) fn heading(profile: &Profile) -> String {
    use std::fmt::Write;
    let vm = &profile.vm;
    let mut out = String::new();
    let _ = writeln!(
        out,
        "{} (pid {}, {} vCPUs, {} of memory)",
        vm.name,
        vm.pid,
        vm.cpus,
        display_bytes(profile.memory_bytes)
    );
    let window = display_duration(Duration::from_nanos(profile.window_ns));
    let windows = if profile.windows == 1 { "1 window".to_owned() } else { format!("{} windows", profile.windows) };
    let _ = writeln!(out, "regime: {} ({windows} of {window}); {}", profile.regime.word(), profile.meaning);
    if let Some(bytes) = profile.granularity_bytes {
        let cost = profile.fault_cost_ns.map_or_else(String::new, |ns| {
            format!("; a first write costs the guest {}", display_duration(Duration::from_nanos(ns)))
        });
        let _ = writeln!(out, "granularity: mappings of up to {}{cost}", display_bytes(bytes));
    }
    for missing in &profile.missing_sources {
        let _ = writeln!(out, "not seen: {} ({}: {})", missing.gives, missing.name, missing.reason);
    }
    for note in &profile.notes {
        let _ = writeln!(out, "note: {note}");
    }
    if let Some(lost) = profile.lost_events.filter(|lost| lost.total > 0) {
        let _ = writeln!(out, "lost events: {} (the figures are too low by what they hold)", lost.total);
    }
    out
}

/// Writes a drawing.
pub(super) fn write_drawing(path: &PathBuf, svg: &str) -> anyhow::Result<()> {
    use anyhow::Context;
    std::fs::write(path, svg).with_context(|| format!("{} could not be written", path.display()))
}
