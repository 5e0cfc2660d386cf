//! The ports: traits through which policy reaches mechanism.
//!
//! Each has a real twin (a mechanism) and, where a migration depends on it, a simulated one that a seed drives.
//! Methods are blocking; the data plane is plain threads.

pub mod clock;
pub mod events;
pub mod faults;
pub mod frame;
pub mod free_pages;
pub mod guest_memory;
pub mod journal;
pub mod link;
pub mod machine;
pub mod region;
pub mod relay;
pub mod throttle;
pub mod tunnel;

pub use clock::{Bell, Clock, Job, Place};
pub use events::{
    Arm, ArmError, EventHook, EventSample, EventSource, EventSourceError, Look, LostEvents, Protected, SampleLog,
    SampleLogError, SpaceEvents, ThreadEvents,
};
pub use faults::{FaultError, Faults};
pub use frame::FramePort;
pub use free_pages::FreePages;
pub use guest_memory::{GuestMemory, GuestMemoryError};
pub use journal::{Journal, JournalError, JournalRecord};
pub use link::{BulkItem, BulkReceiver, BulkSender, ControlChannel, LinkError, SourceLink, TargetLink, Unconnected};
pub use machine::{DirtyLog, Fate, FaultSource, Gate, Loan, Machine, MachineError, MachineState, PauseTiming, Vcpus};
pub use region::{BytesView, Region};
pub use relay::{FormerPorts, Relay};
pub use throttle::{THROTTLE_LEASE, Throttle};
pub use tunnel::{SourceTunnel, VxlanDevice, WireError, WireguardDevice, WireguardPeer, Wires};
