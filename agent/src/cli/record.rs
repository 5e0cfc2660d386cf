//! `dunlin record`.

use std::path::PathBuf;

use clap::Args;

use super::dirty_rate::{WatchArgs, printer, text, told};
use crate::model::outcome::exit;
use crate::model::units::parse_size_bytes;
use crate::service::config::Config;
use crate::service::interrupt::Interrupt;
use crate::service::observe::ObserveRequest;
use crate::service::out::complain;
use crate::service::recording::{RecordRequest, record};

/// Watch how a VM writes its memory, and keep what is seen in a file
///
/// Prints what `dunlin dirty-rate` prints, and writes what each thread did and which pages turned writable, interval by interval, to a
/// file. `dunlin replay` makes the same figures of it, anywhere and without the VM. A recording that is broken off can be replayed up to its
/// last whole interval.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  dunlin record web-1 web-1.jsonl --interval 500ms --count 20
  dunlin record web-1 web-1.jsonl --arm --writes --count 1
  dunlin record pid:4711 vm.jsonl --max-size 64MiB")]
pub(super) struct RecordArgs {
    #[command(flatten)]
    watch: WatchArgs,

    /// The recording; it must not exist yet.
    file: PathBuf,

    /// Stop when the file would become larger than this.
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = parse_size_bytes)]
    max_size: u64,

    /// Keep each write by itself too: when, by which thread, to which page, in which address space and by which instruction.
    #[arg(long)]
    writes: bool,

    /// Room for the single writes of one interval, at 56 bytes each; those for which there is none are counted. Rounded up to a power
    /// of two, 1 GiB at most.
    #[arg(long, value_name = "SIZE", default_value = "32MiB", value_parser = parse_size_bytes, requires = "writes")]
    writes_buffer: u64,
}

impl RecordArgs {
    /// Runs the command.
    pub(super) fn run(self, json: bool, config: &Config) -> anyhow::Result<u8> {
        let Self { watch, file, max_size, writes, writes_buffer } = self;
        let observe = match watch.request(config) {
            Ok(observe) => observe,
            Err(words) => {
                complain!("dunlin: {words}");
                return Ok(exit::USAGE);
            }
        };
        let single_writes = writes.then(|| u32::try_from(writes_buffer).unwrap_or(u32::MAX));
        let observe = ObserveRequest { single_writes, ..observe };
        let request = RecordRequest { observe, file, max_bytes: max_size };
        let interrupt = Interrupt::install()?;
        let ended = record(&request, &interrupt, printer(json, text))?;
        Ok(told(ended, &request.observe.vm))
    }
}
