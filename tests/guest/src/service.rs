//! Owns the service task of vCPU 0: devices, network services, heartbeat and status lines, in one loop that sleeps until the
//! next of them is due or an interrupt comes.

use core::sync::atomic::Ordering::Relaxed;

use dunlin_guest::cmdline::Config;
use dunlin_guest::text::{self, Buffer};

use crate::balloon::Balloon;
use crate::blk::Block;
use crate::cpu::{self, Cpu, DEVICE_VECTORS, SERVICE};
use crate::monitor::Monitor;
use crate::net::NetDevice;
use crate::report::{self, Extras};
use crate::stun::Channel;
use crate::virtio::{ID_BALLOON, ID_BLOCK, ID_NET, Transport};
use crate::web::{Order, Web};
use crate::{apic, clock, entry, panic, power, serial};

struct Service {
    monitor: Monitor,
    web: Option<Web>,
    block: Option<Block>,
    balloon: Option<Balloon>,
    channel: Option<Channel>,
    heartbeats: u64,
    heartbeat_cycles: u64,
    next_heartbeat: u64,
    stat_cycles: u64,
    next_stat: u64,
    ready: bool,
    tsc_source: &'static str,
}

/// Runs the service task of vCPU 0. `tsc_source` says where the clock's frequency comes from, `pool` which chunks of memory it can do without.
pub fn run(cpu: &'static Cpu, config: &Config, tsc_source: &'static str, pool: &'static [u64]) -> ! {
    let mut web = None;
    let mut block = None;
    let mut balloon = None;
    for (interrupt, place) in config.devices[..config.device_count].iter().enumerate() {
        let Some((transport, id)) = Transport::probe(place) else { continue };
        let slot = interrupt % DEVICE_VECTORS;
        let started = match id {
            ID_NET if web.is_none() => {
                let device = NetDevice::start(transport, slot);
                web = device.filter(|_| config.network.is_there()).map(|device| Web::start(device, &config.network));
                web.is_some()
            }
            ID_BLOCK if block.is_none() => {
                block = Block::start(transport, slot, config.block);
                block.is_some()
            }
            ID_BALLOON if balloon.is_none() && !pool.is_empty() => {
                balloon = Balloon::start(transport, slot, config.pool, pool);
                balloon.is_some()
            }
            _ => false,
        };
        let routed = started && apic::route(place.gsi, entry::DEVICE_VECTOR + slot as u8);
        serial::line(format_args!("DEVICE id={id} address={:#x} gsi={} in_use={}", place.address, place.gsi, routed));
    }
    let now = cpu.look(0);
    let mut service = Service {
        monitor: Monitor::new(cpu, config.cpus, config.ipi_ns, now),
        web,
        block,
        balloon,
        channel: config.stun.then(Channel::open),
        heartbeats: 0,
        heartbeat_cycles: clock::cycles(config.heartbeat_ns),
        next_heartbeat: now,
        stat_cycles: clock::cycles(config.stat_ns),
        next_stat: now + clock::cycles(config.stat_ns),
        ready: false,
        tsc_source,
    };
    crate::release_writer(cpu);
    let mut now = now;
    let mut planned = 0;
    while !panic::PANICKED.load(Relaxed) {
        cpu.tasks[SERVICE].wake.store(0, Relaxed);
        planned = service.round(now, planned);
        now = cpu.wait(planned);
    }
    cpu::halt_for_ever()
}

impl Service {
    /// One round; returns when the next must be.
    fn round(&mut self, now: u64, planned: u64) -> u64 {
        self.heartbeat(now);
        if let Some(channel) = &mut self.channel {
            channel.round();
        }
        let (run, mut next) = self.monitor.round(now, planned);
        if let Some(web) = &mut self.web {
            let (delay, order) = web.round(run, self.heartbeats, &mut self.block, self.balloon.as_ref());
            match order {
                Some(Order::PowerOff) => power::off(),
                Some(Order::Reset) => power::reset(),
                None => next = next.min(now + delay),
            }
        }
        if let Some(block) = &mut self.block {
            next = next.min(block.round(now, run));
        }
        if let Some(balloon) = &mut self.balloon {
            next = next.min(balloon.round(now));
        }
        if !self.ready {
            self.report_ready();
            next = next.min(now + clock::cycles(10_000_000));
        }
        if self.stat_cycles > 0 {
            if now >= self.next_stat {
                self.next_stat = (self.next_stat + self.stat_cycles).max(now);
                self.report_status();
            }
            next = next.min(self.next_stat);
        }
        if self.heartbeat_cycles > 0 {
            next = next.min(self.next_heartbeat);
        }
        next
    }

    fn heartbeat(&mut self, now: u64) {
        if self.heartbeat_cycles == 0 || now < self.next_heartbeat {
            return;
        }
        self.heartbeats += 1;
        // Heartbeats that a pause made impossible are left out: the gap is what the outside wants to see.
        let missed = (now - self.next_heartbeat) / self.heartbeat_cycles;
        self.next_heartbeat += (missed + 1) * self.heartbeat_cycles;
        let mut line = Buffer::<64>::new();
        text::heartbeat(&mut line, self.heartbeats, crate::io::tsc());
        serial::write(line.as_bytes());
    }

    fn extras(&self) -> Extras<'_> {
        Extras {
            heartbeats: self.heartbeats,
            net: self.web.as_ref().map(|web| &web.device),
            echo_lines: self.web.as_ref().map_or(0, |web| web.echo_lines),
            block: self.block.as_ref(),
            balloon: self.balloon.as_ref(),
        }
    }

    fn report_ready(&mut self) {
        let settings = crate::settings();
        if !cpu::all(settings.cpus).iter().all(report::is_settled) {
            return;
        }
        self.ready = true;
        report::reset_gaps();
        serial::line(format_args!(
            "READY version={} memory_bytes={} cpus={} tsc_hz={} tsc_source={} net={} block={} boot_ns={}",
            env!("CARGO_PKG_VERSION"),
            settings.memory_bytes,
            settings.cpus,
            clock::tsc_hz(),
            self.tsc_source,
            self.web.is_some(),
            self.block.is_some(),
            clock::uptime_ns()
        ));
    }

    fn report_status(&self) {
        let mut line = Buffer::<512>::new();
        text::stat(&mut line, clock::uptime_ns(), &self.extras().totals());
        serial::write(line.as_bytes());
    }
}
