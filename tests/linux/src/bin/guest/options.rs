//! What is asked of the guest, on the kernel's command line.
//!
//! | word | what |
//! |---|---|
//! | `dunlin.ip=10.0.0.2/24` | `eth0` gets this address, and the services run |
//! | `dunlin.wl=ws:16M,rate:2000` | a process writes that many pages of 4 KiB a second, over that much memory; may be given several times |
//! | `dunlin.copy=64M,rate:4M` | a file of that size on the first disk is copied again and again, so many bytes a second |
//! | `dunlin.console` | the state is told on the console each second |
//! | `dunlin.symbols` | where the kernel and its first task lie is told on the console, as `/proc/kallsyms` has it |

use std::net::Ipv4Addr;

use anyhow::{Context, Result, ensure};
use dunlin_linux::arguments::{Arguments, bytes, field};

/// All of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) address: Option<Address>,
    pub(crate) writers: Vec<Writer>,
    pub(crate) copy: Option<Copy>,
    pub(crate) console: bool,
    pub(crate) symbols: bool,
}

/// An address of `eth0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) ip: Ipv4Addr,
    pub(crate) prefix: u32,
}

/// A process that writes memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Writer {
    pub(crate) bytes: u64,
    pub(crate) pages_per_second: u64,
}

/// A file that is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Copy {
    pub(crate) bytes: u64,
    pub(crate) bytes_per_second: u64,
}

impl Options {
    /// Reads the words.
    pub(crate) fn of(arguments: &Arguments) -> Result<Self> {
        let address = arguments.get("ip").map(|text| -> Result<Address> {
            let (ip, prefix) = text.split_once('/').unwrap_or((text, "24"));
            let prefix = prefix.parse().with_context(|| format!("dunlin.ip={text}"))?;
            ensure!(prefix <= 32, "dunlin.ip={text}");
            Ok(Address { ip: ip.parse().with_context(|| format!("dunlin.ip={text}"))?, prefix })
        });
        let writers = arguments.all("wl").map(|text| {
            let number = |key| field(text, key).and_then(bytes);
            let writer =
                number("ws").zip(number("rate")).map(|(bytes, pages_per_second)| Writer { bytes, pages_per_second });
            writer
                .filter(|writer| writer.bytes >= 4096)
                .with_context(|| format!("dunlin.wl={text}: write ws:16M,rate:2000"))
        });
        let copy = arguments.get("copy").map(|text| {
            let size = text.split(',').next().and_then(bytes).filter(|&bytes| bytes > 0);
            let rate = field(text, "rate").and_then(bytes).unwrap_or(u64::MAX);
            size.map(|bytes| Copy { bytes, bytes_per_second: rate })
                .with_context(|| format!("dunlin.copy={text}: write 64M,rate:4M"))
        });
        Ok(Self {
            address: address.transpose()?,
            writers: writers.collect::<Result<_>>()?,
            copy: copy.transpose()?,
            console: arguments.get("console").is_some(),
            symbols: arguments.get("symbols").is_some(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_read_as_documented() {
        let of = |line: &str| Options::of(&Arguments::parse(line));
        let options = of(
            "dunlin.ip=10.0.0.2/8 dunlin.wl=ws:1M,rate:7 dunlin.wl=ws:4K,rate:0 dunlin.copy=64M,rate:4M dunlin.console",
        )
        .unwrap();
        assert_eq!(options.address, Some(Address { ip: Ipv4Addr::new(10, 0, 0, 2), prefix: 8 }));
        assert_eq!(
            options.writers,
            [Writer { bytes: 1 << 20, pages_per_second: 7 }, Writer { bytes: 4096, pages_per_second: 0 }]
        );
        assert_eq!(options.copy, Some(Copy { bytes: 64 << 20, bytes_per_second: 4 << 20 }));
        assert!(options.console && !options.symbols && of("dunlin.symbols").unwrap().symbols);
        for bad in ["dunlin.ip=x", "dunlin.ip=10.0.0.2/40", "dunlin.wl=ws:1M", "dunlin.wl=ws:1,rate:1", "dunlin.copy="]
        {
            assert!(of(bad).is_err(), "{bad}");
        }
    }
}
