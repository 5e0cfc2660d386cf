//! Process 1 of a Linux guest that does what VMs do while they are moved: writes memory, copies files, answers over TCP, keeps time.
//!
//! Owns the start: modules, network, disk, and one thread or process for each kind of work. What it does is said on the kernel's command
//! line (see [`options`]); what it saw is told over HTTP (`/state`), and on the console where there is no network.

mod clock;
mod copier;
mod echo;
mod network;
mod options;
mod state;
mod web;
mod writer;

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use dunlin_linux::arguments::Arguments;
use dunlin_linux::protocol::MODULES;
use dunlin_linux::system;

use crate::options::Options;
use crate::state::State;

/// How often the console is told, where it is.
const TOLD: Duration = Duration::from_secs(1);

fn main() {
    let mut words = std::env::args().skip(1);
    let done = match words.next().as_deref() {
        Some(writer::VERB) => writer::run(words),
        _ => run(),
    };
    if let Err(error) = done {
        println!("GUEST FAILED {error:#}");
    }
    if std::process::id() == 1 {
        system::power_off();
    }
}

fn run() -> Result<()> {
    system::mount_basics()?;
    let order = fs::read_to_string(format!("{MODULES}/order")).context("the list of modules")?;
    for name in order.lines() {
        if let Err(error) = system::load_module(&Path::new(MODULES).join(format!("{name}.ko")), "") {
            println!("GUEST module {error:#}");
        }
    }
    let options = Options::of(&Arguments::parse(&fs::read_to_string("/proc/cmdline")?))?;
    let writers = writer::start_all(&options.writers)?;
    let state = Arc::new(State::new(writers));
    clock::watch(state.clone())?;
    if let Some(address) = options.address {
        network::up(address)?;
        echo::serve(state.clone())?;
        web::serve(state.clone())?;
    }
    if let Some(copy) = &options.copy {
        copier::start(copy, state.clone())?;
    }
    if options.symbols {
        tell_symbols()?;
    }
    println!("READY {}", serde_json::to_string(&state.identity())?);
    loop {
        std::thread::sleep(TOLD);
        if options.console {
            println!("STATE {}", serde_json::to_string(&state.report())?);
        }
    }
}

/// Says where the kernel is, for who looks for it from outside. Whoever is process 1 may know.
fn tell_symbols() -> Result<()> {
    let symbols = BufReader::new(File::open("/proc/kallsyms").context("/proc/kallsyms")?);
    for line in symbols.lines() {
        let line = line?;
        if line.ends_with(" _text") || line.ends_with(" init_task") {
            println!("SYMBOL {line}");
        }
    }
    Ok(())
}
