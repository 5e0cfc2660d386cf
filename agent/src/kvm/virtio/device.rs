//! A virtio device as the machine knows it: transport and worker joined behind [`Device`].
//!
//! Owns the order of things at pause and resume. Must not know what kind of device it is.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::mmio::{Backend, Served, Transport, register};
use super::worker::{Job, Worker, WorkerGone};
use crate::kvm::bus::{Device, DeviceError, IoEvent, IrqLine, MmioDevice};
use crate::kvm::memory::GuestRam;
use crate::model::network::PortCounters;

/// A device with its worker. Made standing.
pub struct VirtioDevice<B: Backend> {
    transport: Arc<Transport<B>>,
    worker: Worker,
}

struct Serve<B>(Arc<Transport<B>>);

impl<B: Backend> Job for Serve<B> {
    fn serve(&mut self, hold: &dyn Fn() -> bool) -> Served {
        self.0.serve(hold)
    }
}

impl<B: Backend> VirtioDevice<B> {
    /// The device `name` on `backend`, whose descriptor `watched` wakes the worker when the backend asks for it.
    ///
    /// # Errors
    /// No thread or descriptor is left.
    pub(super) fn assemble(
        name: &str,
        ram: Arc<GuestRam>,
        backend: B,
        watched: Option<OwnedFd>,
    ) -> Result<Self, DeviceError> {
        let failed =
            |source| DeviceError::Io { device: name.to_owned(), action: "setting up its queues and worker", source };
        let transport = Arc::new(Transport::new(name, ram, backend).map_err(failed)?);
        let signals: io::Result<_> = transport.notifications().iter().map(EventFd::try_clone).collect();
        let worker =
            Worker::spawn(name, signals.map_err(failed)?, watched, Serve(transport.clone())).map_err(failed)?;
        Ok(Self { transport, worker })
    }

    /// The transport, for tests and for a fuzz target.
    pub(super) fn transport(&self) -> &Transport<B> {
        &self.transport
    }

    /// Makes the worker look at its queues.
    pub(super) fn look_again(&self) {
        if let Some(any) = self.transport.notifications().first() {
            // It fails only when the counter is full, and then the worker is woken anyway.
            let _ = any.write(1);
        }
    }

    fn io_error(&self, action: &'static str) -> impl FnOnce(io::Error) -> DeviceError {
        move |source| DeviceError::Io { device: self.name(), action, source }
    }

    fn gone(&self) -> impl FnOnce(WorkerGone) -> DeviceError {
        move |gone| DeviceError::Worker { device: self.name(), problem: gone.to_string() }
    }

    fn must_stand(&self, action: &str) -> Result<(), DeviceError> {
        if !self.worker.is_paused() {
            return Err(DeviceError::Worker {
                device: self.name(),
                problem: format!("{action} wants a paused device"),
            });
        }
        self.worker.pause().map_err(self.gone())
    }
}

impl<B: Backend> MmioDevice for VirtioDevice<B> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.transport.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.transport.write(offset, data);
    }
}

impl<B: Backend> Device for VirtioDevice<B> {
    fn name(&self) -> String {
        self.transport.name().to_owned()
    }

    fn pause(&self) -> Result<(), DeviceError> {
        self.worker.pause().map_err(self.gone())?;
        self.transport.with_backend(Backend::quiesce).map_err(self.io_error("writing back at the pause"))
    }

    fn resume(&self) -> Result<(), DeviceError> {
        self.transport.with_backend(Backend::activate).map_err(self.io_error("taking its backend"))?;
        self.transport.interrupt().repeat();
        self.worker.resume().map_err(self.gone())
    }

    fn save(&self) -> Result<Vec<u8>, DeviceError> {
        self.must_stand("saving")?;
        Ok(self.transport.save())
    }

    fn restore(&self, state: &[u8]) -> Result<(), DeviceError> {
        self.must_stand("restoring")?;
        let wrong = |e: super::mmio::RestoreError| DeviceError::State { device: self.name(), problem: e.to_string() };
        self.transport.restore(state).map_err(wrong)
    }

    fn reset(&self) -> Result<(), DeviceError> {
        self.must_stand("resetting")?;
        self.transport.reset();
        Ok(())
    }

    fn order_pause(&self) {
        self.worker.order_pause();
    }

    fn hold_output(&self, bytes: usize) {
        self.transport.with_backend(|backend| backend.hold_output(bytes));
    }

    fn begin_increment(&self, number: u32) {
        self.transport.with_backend(|backend| backend.begin_increment(number));
    }

    fn let_out(&self, number: u32) {
        self.transport.with_backend(|backend| backend.let_out(number));
        self.look_again();
    }

    fn end_holding(&self) {
        self.transport.with_backend(Backend::end_holding);
        self.look_again();
    }

    fn held(&self) -> Result<Vec<u8>, DeviceError> {
        self.must_stand("saving")?;
        Ok(self.transport.with_backend(|backend| backend.held()))
    }

    fn take_held(&self, held: &[u8]) -> Result<(), DeviceError> {
        self.must_stand("restoring")?;
        if self.transport.with_backend(|backend| backend.take_held(held)) {
            return Ok(());
        }
        let problem = format!("{} bytes of held output are none", held.len());
        Err(DeviceError::State { device: self.name(), problem })
    }

    fn await_relay(&self) {
        self.transport.with_backend(Backend::await_relay);
    }

    fn relay_frames(&self, frames: Vec<Vec<u8>>) {
        self.transport.with_backend(|backend| frames.into_iter().for_each(|frame| backend.relay_frame(frame)));
        self.look_again();
    }

    fn relay_caught_up(&self) {
        self.transport.with_backend(Backend::relay_caught_up);
        self.look_again();
    }

    fn end_relay(&self) {
        self.transport.with_backend(Backend::end_relay);
        self.look_again();
    }

    fn former_port(&self) -> io::Result<Option<OwnedFd>> {
        self.transport.with_backend(|backend| backend.former_port().map(|port| port.try_clone_to_owned()).transpose())
    }

    fn counters(&self) -> Option<PortCounters> {
        self.transport.with_backend(|backend| backend.counters())
    }

    fn ask_to_announce(&self) {
        self.transport.with_live(|backend, features| {
            if let Some(features) = features {
                backend.ask_to_announce(features);
            }
        });
    }

    fn send_frame(&self, frame: &[u8]) -> io::Result<()> {
        self.transport.with_backend(|backend| backend.send_frame(frame))
    }

    fn io_events(&self) -> Vec<IoEvent<'_>> {
        let notification = |(queue, event)| IoEvent { offset: register::QUEUE_NOTIFY, value: queue as u32, event };
        self.transport.notifications().iter().enumerate().map(notification).collect()
    }

    fn connect_irq(&self, line: Arc<dyn IrqLine>) {
        self.transport.interrupt().connect(line);
    }
}
