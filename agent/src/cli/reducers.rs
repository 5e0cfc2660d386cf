//! The options of `dunlin migrate` that make fewer bytes travel.

use std::time::Duration;

use clap::Args;

use crate::migrate::{Compress, Reducers};
use crate::model::PageCount;
use crate::model::units::{parse_duration, parse_size_bytes};

/// What is done so that fewer bytes travel.
#[derive(Debug, Args)]
pub(super) struct ReducerArgs {
    /// Send pages of zeros as a mark.
    #[arg(long, value_name = "BOOL", default_value_t = true, num_args = 0..=1, default_missing_value = "true", require_equals = true, action = clap::ArgAction::Set)]
    zero_pages: bool,

    /// Compress pages while the link is what they wait for: none, lz4, zstd[:LEVEL] (1 to 19) or auto.
    #[arg(long, value_name = "HOW", default_value_t = Compress::None)]
    compress: Compress,

    /// Send of a page that was sent before only what has changed. SIZE, for example 64MiB, is the room for copies of sent pages at the source.
    #[arg(long, value_name = "SIZE", value_parser = parse_size_bytes)]
    delta: Option<u64>,

    /// Send of a page that equals one which the target holds only where that is.
    #[arg(long)]
    dedup: bool,

    /// Send pages that were dirty after both of the last rounds last.
    #[arg(long)]
    skip_hot: bool,

    /// Leave out what the guest says is free, in rounds while it runs; it needs a balloon that names free pages.
    #[arg(long)]
    free_pages: bool,

    /// Have the guest go on with SIZE of its memory until the migration is over, so that its page cache is not sent; it needs a balloon.
    #[arg(long, value_name = "SIZE", value_parser = parse_size_bytes)]
    balloon_before: Option<u64>,

    /// How long the guest may take to give up memory, before the first round begins all the same.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_duration, requires = "balloon_before")]
    balloon_limit: Duration,
}

impl ReducerArgs {
    /// As they were asked for.
    pub(super) fn reducers(&self) -> Reducers {
        Reducers {
            zero_pages: self.zero_pages,
            compress: self.compress,
            delta_bytes: self.delta.unwrap_or(0),
            dedup: self.dedup,
            skip_hot: self.skip_hot,
            free_pages: self.free_pages,
        }
    }

    /// What the guest is to go on with, and how long it may take for that.
    pub(super) fn squeeze(&self) -> (Option<PageCount>, Duration) {
        (self.balloon_before.map(PageCount::covering), self.balloon_limit)
    }
}
