//! What a VMM's command line says of its VM: who the VMM is, the VM's name and identity. Every word is the operator's, and none is
//! trusted further than to be shown.

use std::path::Path;

use uuid::Uuid;

/// What is known of a VM without asking its VMM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VmmFacts {
    /// The VMM: `qemu`, `cloud-hypervisor`, `firecracker`, `crosvm`, `kvmtool`, `dunlin`; the program's own name for another.
    pub vmm: String,
    /// The VM's name, if the command line gives it one.
    pub name: Option<String>,
    /// Its identity, likewise.
    pub uuid: Option<Uuid>,
}

/// Known programs: what the file's name begins with, and who that is.
const PROGRAMS: [(&str, &str); 8] = [
    ("qemu", "qemu"),
    ("kvm", "qemu"),
    ("cloud-hypervisor", "cloud-hypervisor"),
    ("cloud-hyperviso", "cloud-hypervisor"),
    ("firecracker", "firecracker"),
    ("crosvm", "crosvm"),
    ("lkvm", "kvmtool"),
    ("dunlin", "dunlin"),
];

/// Reads a command line; `process` is the name that the kernel has.
pub fn facts(process: &str, command: &[String]) -> VmmFacts {
    let program = command.first().and_then(|program| Path::new(program).file_name()?.to_str()).unwrap_or(process);
    let known = PROGRAMS.iter().find(|(prefix, _)| program.starts_with(prefix));
    let vmm = known.map_or_else(|| printable(program), |(_, vmm)| (*vmm).to_owned());
    let value = |option: &str| {
        // `-uuid U`, `--uuid U` and `--uuid=U`.
        let mut words = command
            .iter()
            .map(|word| word.strip_prefix('-').map_or(word.as_str(), |word| word.trim_start_matches('-')));
        let at = words.position(|word| word.split('=').next() == Some(option))?;
        let word = &command[at];
        word.starts_with('-')
            .then(|| word.split_once('=').map_or_else(|| command.get(at + 1).cloned(), |(_, v)| Some(v.to_owned())))?
    };
    let (name, uuid) = match vmm.as_str() {
        "qemu" => (value("name").and_then(|name| qemu_name(&name)), value("uuid")),
        "firecracker" => (value("id"), None),
        "dunlin" => (value("name"), value("uuid")),
        "crosvm" | "kvmtool" => (value("name"), None),
        _ => (None, None),
    };
    VmmFacts { vmm, name: name.map(|name| printable(&name)), uuid: uuid.and_then(|uuid| uuid.parse().ok()) }
}

/// `-name web-1,process=…` or `-name guest=web-1,debug-threads=on`.
fn qemu_name(value: &str) -> Option<String> {
    let guest = value.split(',').find_map(|part| part.strip_prefix("guest="));
    guest.or_else(|| value.split(',').next().filter(|first| !first.contains('='))).map(str::to_owned)
}

/// At most 64 characters, none of which moves a terminal's cursor.
fn printable(text: &str) -> String {
    text.chars().take(64).map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(line: &str) -> VmmFacts {
        facts("comm", &line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn command_lines_name_vms() {
        let uuid = "5f0c0c9e-0b0e-4c63-9a5c-0d7a6b1d9f01";
        for (line, vmm, name, has_uuid) in [
            (
                format!("/usr/bin/qemu-system-x86_64 -name guest=web-1,debug-threads=on -uuid {uuid}"),
                "qemu",
                Some("web-1"),
                true,
            ),
            ("/usr/bin/qemu-system-x86_64 -name web-2,process=x -m 1".to_owned(), "qemu", Some("web-2"), false),
            ("qemu-kvm -name debug-threads=on -uuid nonsense".to_owned(), "qemu", None, false),
            ("/bin/firecracker --id vm7 --api-sock /x".to_owned(), "firecracker", Some("vm7"), false),
            ("firecracker --id=vm8".to_owned(), "firecracker", Some("vm8"), false),
            (format!("dunlin vm run --name a --uuid={uuid}"), "dunlin", Some("a"), true),
            ("./mine -name x".to_owned(), "mine", None, false),
            ("qemu-system-x86_64 -name".to_owned(), "qemu", None, false),
            (String::new(), "comm", None, false),
        ] {
            let facts = of(&line);
            assert_eq!(
                (facts.vmm.as_str(), facts.name.as_deref(), facts.uuid.is_some()),
                (vmm, name, has_uuid),
                "{line}"
            );
        }
    }

    #[test]
    fn a_name_cannot_move_the_cursor() {
        assert_eq!(facts("c", &["qemu".into(), "-name".into(), "a\x1b[2Jb".into()]).name.as_deref(), Some("a?[2Jb"));
    }
}
