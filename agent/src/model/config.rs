//! What an operator asks of a machine: its network ports, disks, console and dirty log.

use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::announce::Station;
use super::spec::SpecError;

/// How a machine learns which pages its guest wrote. Chosen when the VM is created: KVM cannot switch the ring on
/// once a vCPU exists.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DirtyLogKind {
    /// One bit a page, fetched with `KVM_GET_DIRTY_LOG` and re-armed with `KVM_CLEAR_DIRTY_LOG`.
    #[default]
    Bitmap,
    /// One ring a vCPU (`KVM_CAP_DIRTY_LOG_RING_ACQ_REL`): says which vCPU wrote.
    Ring,
}

impl FromStr for DirtyLogKind {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "bitmap" => Ok(Self::Bitmap),
            "ring" => Ok(Self::Ring),
            _ => Err(SpecError::new(text, "is no dirty log; write `bitmap` or `ring`")),
        }
    }
}

/// One network port: `tap=T,mac=M[,ip=A]...[,router=A]...[,gateway=A]...[,vlan=V]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetSpec {
    /// The tap interface's name (it must exist, or be creatable, in the machine's network namespace).
    pub tap: String,
    /// Who the guest is on it, and with what it is announced.
    pub station: Station,
}

/// As JSON has it.
#[derive(Serialize, Deserialize)]
struct Readable {
    tap: String,
    #[serde(flatten)]
    station: Station,
}

/// On the wire tap, MAC and addresses, as it always was; the rest travels as [`super::MachineShape`] says.
impl Serialize for NetSpec {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            return Readable { tap: self.tap.clone(), station: self.station.clone() }.serialize(serializer);
        }
        (&self.tap, &self.station.mac, &self.station.ips).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for NetSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            let Readable { tap, station } = Readable::deserialize(deserializer)?;
            return Ok(Self { tap, station });
        }
        let (tap, mac, ips) = Deserialize::deserialize(deserializer)?;
        Ok(Self { tap, station: Station::new(mac, ips) })
    }
}

/// One disk: `path=F[,readonly]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSpec {
    /// A raw file or block device.
    pub path: PathBuf,
    /// Whether the guest is refused to write.
    pub readonly: bool,
}

/// Where the guest's serial console goes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SerialSpec {
    /// Nowhere; output is dropped (and kept in the machine's console ring for `dunlin vm console`).
    #[default]
    None,
    /// The machine's standard input and output.
    Stdio,
    /// Output is appended to a file.
    File(PathBuf),
    /// A Unix socket that the machine listens on; one client at a time.
    Socket(PathBuf),
}

impl FromStr for NetSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (mut tap, mut station) = (None, Vec::new());
        for part in text.split(',') {
            match part.split_once('=') {
                // IFNAMSIZ is 16 with the closing zero.
                Some(("tap", name)) if (1..16).contains(&name.len()) && !name.contains('/') => {
                    tap = Some(name.to_owned());
                }
                Some(("tap", name)) => return Err(SpecError::new(text, format!("has `{name}`, which names no tap"))),
                // The station's text begins with it.
                Some(("mac", _)) => station.insert(0, part),
                _ => station.push(part),
            }
        }
        let tap = tap.ok_or_else(|| SpecError::new(text, "needs both tap= and mac="))?;
        Ok(Self { tap, station: station.join(",").parse()? })
    }
}

impl FromStr for DiskSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (mut path, mut readonly) = (None, false);
        for part in text.split(',') {
            match part.split_once('=') {
                Some(("path", file)) if !file.is_empty() => path = Some(PathBuf::from(file)),
                None if part == "readonly" => readonly = true,
                _ => return Err(SpecError::new(text, format!("has `{part}`; write path=F[,readonly]"))),
            }
        }
        path.map(|path| Self { path, readonly }).ok_or_else(|| SpecError::new(text, "needs path="))
    }
}

impl FromStr for SerialSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('=') {
            None if text == "stdio" => Ok(Self::Stdio),
            None if text == "none" => Ok(Self::None),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("socket", path)) if !path.is_empty() => Ok(Self::Socket(path.into())),
            _ => Err(SpecError::new(text, "is no console; write stdio, none, file=F or socket=F")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_options_read_as_documented() {
        let net: NetSpec = "ip=10.0.0.2,tap=t0,mac=02:00:00:00:00:01,ip=fd00::2,vlan=7".parse().unwrap();
        assert_eq!((net.tap.as_str(), net.station.ips.len()), ("t0", 2));
        let json = serde_json::to_string(&net).unwrap();
        assert_eq!(json, r#"{"tap":"t0","mac":"02:00:00:00:00:01","ips":["10.0.0.2","fd00::2"],"vlan":"7"}"#);
        assert_eq!(serde_json::from_str::<NetSpec>(&json).unwrap(), net);
        for bad in [
            "",
            "tap=t0",
            "mac=02:00:00:00:00:01",
            "tap=averyverylongname,mac=02:00:00:00:00:01",
            "tap=a,mac=02:00:00:00:00:01,x=1",
        ] {
            assert!(bad.parse::<NetSpec>().is_err(), "{bad} was accepted");
        }
        let disk: DiskSpec = "path=/d.img,readonly".parse().unwrap();
        assert!(disk.readonly);
        assert!("readonly".parse::<DiskSpec>().is_err());
        assert_eq!("file=/tmp/x".parse(), Ok(SerialSpec::File("/tmp/x".into())));
        assert!("tcp=1".parse::<SerialSpec>().is_err());
    }
}
