//! The words: newtypes with units and neutral names that every other floor speaks.
//!
//! Owns what things are called and how they are written as text and JSON. Must not know any kernel
//! interface, any trait of [`crate::port`], or how anything is done.

pub mod addresses;
pub mod announce;
pub mod bitmap;
pub mod blackout;
pub mod bucket;
pub mod chain;
pub mod config;
pub mod curve;
pub mod exits;
pub mod fair;
pub mod first_writes;
pub mod foretold;
pub mod guest;
pub mod guest_write;
pub mod heat;
pub mod id;
pub mod inventory;
pub mod mac;
pub mod migration_status;
pub mod network;
pub mod network_report;
pub mod outcome;
pub mod packing;
pub mod process;
pub mod random;
pub mod region;
pub mod relay;
pub mod report;
pub mod schema;
pub mod shape;
mod spec;
pub mod stage;
pub mod stun;
pub mod tunnel;
pub mod units;
pub mod vlan;
pub mod writer;

pub use announce::{AnnounceReport, AnnounceRound, Station};
pub use bitmap::PageBitmap;
pub use blackout::{BlackoutLedger, BlackoutPhase};
pub use chain::chain;
pub use config::{DirtyLogKind, DiskSpec, NetSpec, SerialSpec};
pub use curve::{CurveError, CurvePoint, Estimate, UniqueRate, WriteCurve};
pub use dunlin_ebpf::PageSubset;
pub use exits::{EXIT_TIME_BINS, ExitTimes};
pub use fair::{Allocation, max_min};
pub use first_writes::{FirstWrites, Slowed};
pub use foretold::{Chosen, CostFrom, Foretold, ForetoldFrom, MigrationRecord};
pub use guest::{AddressSpace, Gfn, Gpa, Gva, MemoryRange, RamSlot};
pub use guest_write::GuestWrite;
pub use heat::RegionHeat;
pub use id::{MigrationId, VmId, VmRef};
pub use inventory::{KernelVm, KvmDescriptors, MemorySlot, VcpuFacts};
pub use mac::MacAddress;
pub use migration_status::MigrationStatus;
pub use network_report::{AskedReport, NetworkPlace, NetworkReport, NetworkWord};
pub use outcome::{Ending, Owner};
pub use packing::Packing;
pub use process::GuestProcess;
pub use random::Random;
pub use region::{PageRun, RegionId, RegionKind, RegionSpec};
pub use relay::{RelayReport, RelayedFrame};
pub use report::{
    LinkReport, LoanReport, MigrationReport, PostCopyReport, ReducerReport, RoundReport, SqueezeReport, WaitBucket,
    WaitReport,
};
pub use shape::{MAX_BOOT_IMAGE_BYTES, MachineShape};
pub use spec::SpecError;
pub use stage::{Stage, Step};
pub use stun::{
    Attribution, StunReport, ThrottleHolder, ThrottleStatus, ThrottleView, VcpuLimit, VcpuStun, VcpuThrottle,
    VcpuWrites, VmWrites,
};
pub use tunnel::{
    OfferedLine, TunnelEntry, TunnelKind, TunnelLine, TunnelOffer, TunnelReport, TunnelSide, TunnelSpec, TunnelTraffic,
    Vni, WireguardEnd, WireguardKey, WireguardOffer, WireguardTraffic,
};
pub use units::{BytesPerSecond, HUGE_PAGE_BYTES, PAGE_SIZE, PageCount, PageIndex, PagesPerSecond};
pub use vlan::{VlanId, VlanTags};
pub use writer::Writer;
