//! What the guest of a machine does without, as it says itself.

use std::time::Duration;

use super::machine::MachineError;
use crate::model::{PageBitmap, PageCount};

/// A guest that can be asked for memory. What it gives or keeps back for a migration it has again when the migration is over, at whichever end: its machine sees to that.
pub trait FreePages: Send {
    /// Asks the guest which of its pages are free, waits at most `patience` until it has named all, and adds what it named to `into`. Each of them was free at some moment
    /// *after* this call had begun, and what it held need not be kept; the guest may have used it since. So a page may be left out only if its writes are logged
    /// since before the call.
    ///
    /// # Errors
    /// A guest that cannot be asked, or one for which what a free page holds counts.
    fn name_free_pages(&mut self, _into: &mut PageBitmap, _patience: Duration) -> Result<(), MachineError> {
        Err(MachineError::Refused { action: "name its free pages", reason: "this machine cannot".to_owned() })
    }

    /// Asks the guest to go on with `pages` of its memory. It follows when it can, or never.
    ///
    /// # Errors
    /// A guest that cannot be asked.
    fn squeeze_guest(&mut self, _pages: PageCount) -> Result<(), MachineError> {
        Err(MachineError::Refused { action: "give up memory", reason: "this machine cannot".to_owned() })
    }

    /// How much of its memory the guest has, once it has got nearer to what it was asked for, or `patience` is over.
    ///
    /// # Errors
    /// The machine is gone.
    fn guest_pages(&mut self, _patience: Duration) -> Result<PageCount, MachineError> {
        Err(MachineError::Refused { action: "say what its guest has", reason: "this machine cannot".to_owned() })
    }
}
