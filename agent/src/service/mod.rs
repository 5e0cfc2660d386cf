//! The service floor and composition root: joins policy and mechanism.
//!
//! - [`machine`] hosts one VM: the ownership gate, the session for a manager, the control sockets.
//! - [`migration`] is the manager at a source, [`receive`] the one at a target; [`progress`] knows how far a migration is, and [`steering`] lets others see and steer it; [`foresight`] says what is to be expected of it; [`reports`] reads what it said at its end.
//! - [`registry`] knows which VMs this host runs.
//! - [`config`] reads the configuration file.
//! - [`trust`] finds what encrypted links are made with, [`pki`] makes it.
//! - [`tunnel`] has the tunnels by which VMs keep their addresses in another subnet.
//! - [`balloon`] answers for a guest's memory.
//! - [`announce`] announces by hand, on an interface that an operator names; [`pacing`] is the limit that all announcements of a host share.
//! - [`inventory`] finds every KVM VM of this host, [`addresses`] knows their addresses, whence they came and where they went.
//! - [`observe`] watches how one VM writes its memory, [`exits`] why it leaves its guest, [`profile`] measures its curve and its writers, [`rogues`] says who keeps it from migrating, [`prediction`] what moving it would take; [`doctor`] tries what this host can do.
//! - [`recording`] keeps what [`observe`] sees in a file, and makes its figures again.
//! - [`agent`] serves what [`fleet`] sees, which watches all VMs together; [`sources`] is the plan of what can be seen of them.
//!
//! Everything that acts on a VM passes [`audit::record`].

pub mod addresses;
pub mod agent;
pub mod announce;
pub mod arm;
pub mod audit;
pub mod balloon;
pub mod clock;
pub mod config;
pub mod control;
pub mod doctor;
pub mod events;
pub mod exits;
pub mod fleet;
pub mod foresight;
pub mod gate;
pub mod guest_names;
pub mod interrupt;
mod intervals;
pub mod inventory;
pub mod lease;
mod loan;
pub mod machine;
pub mod migration;
pub mod observe;
pub(crate) mod out;
pub mod pacing;
pub mod pki;
pub mod prediction;
pub mod profile;
pub mod progress;
pub mod prove;
pub mod receive;
pub mod recording;
pub mod registry;
pub mod reports;
pub mod resolve;
pub mod rogues;
mod rounds;
mod seat;
pub mod session;
pub mod sources;
pub mod steering;
pub mod stun;
mod throttling;
mod traffic;
pub mod trust;
pub mod tunnel;
pub mod watch;
