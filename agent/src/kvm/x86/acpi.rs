//! ACPI tables: how a guest that is not made for Dunlin finds processors, interrupts, the console, the virtio windows, and
//! the ports for power and reset.
//!
//! Owns the tables (ACPI 6.5). Knows only numbers: must not know devices, guest memory or how a guest is loaded.
//!
//! The machine is of the hardware-reduced kind (3.11.1, 4.1): no PIC, no PM timer, no system control interrupt. Every
//! interrupt is edge-triggered, since that is what [`crate::kvm::bus::IrqLine`] is.

use acpi_tables::Aml;
use acpi_tables::aml;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use crate::kvm::ports::{
    RESET_BYTE, RESET_PORT, SERIAL_IRQ, SERIAL_PORT, SERIAL_PORTS, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT,
    SLEEP_TYPE_OFF, STUN_IRQ, STUN_PORT,
};

const OEM: [u8; 6] = *b"DUNLIN";
const OEM_TABLE: [u8; 8] = *b"DUNLINVM";
const OEM_REVISION: u32 = 1;

/// The length of the header that all tables but the root pointer share (5.2.6).
const HEADER_BYTES: u32 = 36;
/// Where KVM's local and I/O APICs lie.
const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;
/// The I/O APIC's id; those of processors are their numbers, and live in another space.
const IO_APIC_ID: u8 = 0;
/// FADT, IA-PC boot architecture flags (5.2.9.3): no VGA, no CMOS clock. With bit 1 clear: no keyboard controller.
const BOOT_ARCHITECTURE: u16 = 1 << 2 | 1 << 5;
/// Tables start at multiples of this.
const ALIGN: usize = 16;

/// A virtio-mmio window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Its guest-physical address.
    pub address: u32,
    /// Its length.
    pub bytes: u32,
    /// Its interrupt: a pin of the I/O APIC.
    pub irq: u32,
}

/// What the tables tell of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Board {
    /// The number of processors; their APIC ids are 0 and up.
    pub cpus: u8,
    /// The virtio-mmio windows.
    pub windows: Vec<Window>,
}

/// The tables as they lie in memory from `address` on, which is where the root pointer is.
pub fn tables(board: &Board, address: u64) -> Vec<u8> {
    let mut memory = Memory { address, bytes: Vec::new() };
    // The root pointer's place; it is known last.
    memory.bytes.resize(Rsdp::len(), 0);
    let dsdt = memory.put(&dsdt(board));
    let fadt = memory.put(&fadt(dsdt));
    let madt = memory.put(&madt(board));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = memory.put(&xsdt);
    let mut root = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut root);
    memory.bytes[..root.len()].copy_from_slice(&root);
    memory.bytes
}

/// Tables one behind the other.
struct Memory {
    address: u64,
    bytes: Vec<u8>,
}

impl Memory {
    /// Puts a table behind the last; returns where it is.
    fn put(&mut self, table: &dyn Aml) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGN), 0);
        let at = self.address + self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        at
    }
}

/// The fixed description (5.2.9): sleep and reset by I/O ports.
fn fadt(dsdt: u64) -> impl Aml {
    let port = |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into());
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        .flag(Flags::HwReducedAcpi);
    fadt.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    fadt.reset_reg = port(RESET_PORT);
    fadt.reset_value = RESET_BYTE;
    fadt.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(SLEEP_STATUS_PORT);
    fadt.finalize()
}

/// The interrupt controllers (5.2.12).
fn madt(board: &Board) -> MADT {
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, LocalInterruptController::Address(LOCAL_APIC));
    for id in 0..board.cpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(IO_APIC_ID, IO_APIC, 0));
    madt
}

/// The devices, and the one sleep state: off.
fn dsdt(board: &Board) -> Sdt {
    let mut body = Vec::new();
    for (index, (port, irq)) in [(SERIAL_PORT, SERIAL_IRQ), (STUN_PORT, STUN_IRQ)].into_iter().enumerate() {
        let io = aml::IO::new(port, port, 0, SERIAL_PORTS);
        device(&mut body, &format!("COM{}", index + 1), &aml::EISAName::new("PNP0501"), index, &io, irq);
    }
    for (index, window) in board.windows.iter().enumerate() {
        let registers = aml::Memory32Fixed::new(true, window.address, window.bytes);
        device(&mut body, &format!("VR{index:02X}"), &"LNRO0005", index, &registers, window.irq);
    }
    aml::Name::new("_S5_".into(), &aml::Package::new(vec![&SLEEP_TYPE_OFF])).to_aml_bytes(&mut body);
    let mut dsdt = Sdt::new(*b"DSDT", HEADER_BYTES, 2, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&body);
    dsdt
}

/// A device with one range of registers and one interrupt: edge-triggered, active high, its own.
fn device(body: &mut Vec<u8>, name: &str, id: &dyn Aml, unique: usize, registers: &dyn Aml, irq: u32) {
    let interrupt = aml::Interrupt::new(true, true, false, false, irq);
    let resources = aml::ResourceTemplate::new(vec![registers, &interrupt]);
    let children: [&dyn Aml; 3] = [
        &aml::Name::new("_HID".into(), id),
        &aml::Name::new("_UID".into(), &unique),
        &aml::Name::new("_CRS".into(), &resources),
    ];
    let device = aml::Device::new(name.into(), children.to_vec());
    aml::Scope::new("_SB_".into(), vec![&device]).to_aml_bytes(body);
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn board(cpus: u8, windows: u32) -> Board {
        let window = |index| Window { address: 0xd000_0000 + index * 0x1000, bytes: 0x1000, irq: 5 + index };
        Board { cpus, windows: (0..windows).map(window).collect() }
    }

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// Follows the tables as a guest does, and checks all that it meets: signature, length, checksum, place.
    fn walk(memory: &[u8], address: u64) -> BTreeMap<String, Vec<u8>> {
        let table = |at: u64| {
            let start = usize::try_from(at.checked_sub(address).expect("below the range")).unwrap();
            let length = u32_at(memory, start + 4) as usize;
            let table = &memory[start..start + length];
            assert_eq!(sum(table), 0, "checksum of the table at {at:#x}");
            assert_eq!(start % ALIGN, 0);
            (String::from_utf8(table[..4].to_vec()).unwrap(), table.to_vec())
        };
        assert_eq!(&memory[..8], b"RSD PTR ");
        assert_eq!((memory[15], u32_at(memory, 20)), (2, 36));
        assert_eq!((sum(&memory[..20]), sum(&memory[..36])), (0, 0));
        let (name, xsdt) = table(u64_at(memory, 24));
        assert_eq!(name, "XSDT");
        let mut found = BTreeMap::from([(name, xsdt.clone())]);
        for entry in xsdt[36..].chunks_exact(8) {
            let (name, bytes) = table(u64_at(entry, 0));
            if name == "FACP" {
                let (dsdt, bytes) = table(u64_at(&bytes, 140));
                found.insert(dsdt, bytes);
            }
            found.insert(name, bytes);
        }
        found
    }

    /// Where `needle` lies in `hay`, once.
    fn once(hay: &[u8], needle: &[u8]) -> bool {
        hay.windows(needle.len()).filter(|window| window == &needle).count() == 1
    }

    #[test]
    fn power_and_reset_are_the_ports_that_the_machine_answers() {
        let memory = tables(&board(2, 2), 0xe_0000);
        let tables = walk(&memory, 0xe_0000);
        assert_eq!(tables.keys().map(String::as_str).collect::<Vec<_>>(), ["APIC", "DSDT", "FACP", "XSDT"]);
        let fadt = &tables["FACP"];
        // ACPI 6.5, table 5.9: reset register at 116, its value at 128, flags at 112; sleep registers at 244 and 256.
        let port = |at: usize| (fadt[at], fadt[at + 1], u64_at(fadt, at + 4));
        assert_eq!(port(116), (1, 8, u64::from(RESET_PORT)));
        assert_eq!(fadt[128], RESET_BYTE);
        assert_eq!(u32_at(fadt, 112) & (1 << 20 | 1 << 10), 1 << 20 | 1 << 10);
        assert_eq!(port(244), (1, 8, u64::from(SLEEP_CONTROL_PORT)));
        assert_eq!(port(256), (1, 8, u64::from(SLEEP_STATUS_PORT)));
        // Name(_S5_, Package(1) { 5 })
        assert!(once(&tables["DSDT"], b"\x08_S5_\x12\x04\x01\x0a\x05"));
    }

    #[test]
    fn devices_have_their_windows_and_edge_triggered_interrupts() {
        let memory = tables(&board(1, 19), 0xe_0000);
        let tables = walk(&memory, 0xe_0000);
        let dsdt = &tables["DSDT"];
        for index in 0..19u32 {
            // Memory32Fixed (6.4.3.4), then Extended Interrupt (6.4.3.6) with flags consumer and edge.
            let mut resources = vec![0x86, 9, 0, 1];
            resources.extend_from_slice(&(0xd000_0000 + index * 0x1000).to_le_bytes());
            resources.extend_from_slice(&0x1000u32.to_le_bytes());
            resources.extend_from_slice(&[0x89, 6, 0, 0b11, 1]);
            resources.extend_from_slice(&(5 + index).to_le_bytes());
            assert!(once(dsdt, &resources), "window {index}");
            assert!(once(dsdt, format!("VR{index:02X}").as_bytes()));
        }
        assert!(once(dsdt, &[0x47, 1, 0xf8, 3, 0xf8, 3, 0, 8, 0x89, 6, 0, 0b11, 1, 4, 0, 0, 0]), "COM1");
    }

    #[test]
    fn each_processor_has_its_apic() {
        let memory = tables(&board(254, 0), 0xe_0000);
        let madt = &walk(&memory, 0xe_0000)["APIC"];
        assert_eq!(u32_at(madt, 36), LOCAL_APIC);
        let (processors, io_apic) = madt[44..].split_at(254 * 8);
        for (id, entry) in processors.chunks_exact(8).enumerate() {
            assert_eq!(entry, [0, 8, id as u8, id as u8, 1, 0, 0, 0]);
        }
        assert_eq!(io_apic[..2], [1, 12]);
        assert_eq!((u32_at(io_apic, 4), u32_at(io_apic, 8)), (IO_APIC, 0));
    }

    proptest! {
        #[test]
        fn whatever_the_board_every_table_is_whole_and_in_its_place(
            cpus in 1..=254u8, windows in 0..20u32, page in 0..0xf_fff0u64
        ) {
            let address = page << 12;
            let memory = tables(&board(cpus, windows), address);
            prop_assert!(memory.len() < 16 << 10);
            prop_assert_eq!(walk(&memory, address).len(), 4);
        }
    }
}
