//! The `dunlin` binary: reads the command line, runs it, turns the outcome into an exit code.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use dunlin::cli::Cli;

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_env("DUNLIN_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    match Cli::parse().run() {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            // Nobody may be listening; the exit code says it, too.
            let _reader_is_gone = writeln!(std::io::stderr(), "dunlin: {error:#}");
            ExitCode::from(dunlin::model::outcome::exit::ERROR)
        }
    }
}
