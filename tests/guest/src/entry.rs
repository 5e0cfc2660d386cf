//! Owns all code that runs at CPL 0, in assembly and as short as it can be: PVH entry, start of the other vCPUs, interrupt
//! handlers, the switch between tasks, and the wait gate.
//!
//! The interrupt stack of a task is the end of its own `Task`, so an interrupt saves its registers where they stay. CPL 0
//! never reads the time stamp counter (some hosts emulate it there with another offset than at CPL 3): "now" comes from the
//! caller of the gate, or is the time for which the timer was armed.

use core::arch::global_asm;
use core::mem::offset_of;

use crate::cpu::{Cpu, FRAME_OFFSET, STACK_BYTES, TASK_BYTES, Task, Tss};

/// Selector of the first TSS; each vCPU has the next 16 bytes of the GDT.
pub const TSS_SELECTOR: u16 = 0x40;
/// Vector of the LAPIC timer.
pub const TIMER_VECTOR: u8 = 0x20;
/// What rax holds when `ud2` means the wait gate. An invalid opcode is the one way from CPL 3 to CPL 0 that every KVM backend
/// delivers: some refuse `syscall` and `int n`.
pub const GATE_MAGIC: u64 = 0x6475_6e6c;
/// First vector of devices.
pub const DEVICE_VECTOR: u8 = 0x50;
/// Vector of the interrupt from the previous vCPU.
pub const CROSS_VECTOR: u8 = 0x60;
/// Vector of the interrupt to itself.
pub const OWN_VECTOR: u8 = 0x61;
/// Vector that only wakes a vCPU.
pub const WAKE_VECTOR: u8 = 0x62;
/// Vector of spurious LAPIC interrupts.
pub const SPURIOUS_VECTOR: u8 = 0xff;
/// Where the start code of the other vCPUs is copied to.
pub const TRAMPOLINE: u64 = 0x8000;

// The register area that assembly calls FRAME must end exactly at the end of a task.
const _: () = assert!(offset_of!(Task, frame) == FRAME_OFFSET && size_of::<Task>() == TASK_BYTES);
const _: () = assert!(offset_of!(Tss, bitmap_offset) == 102);

unsafe extern "C" {
    /// Addresses of the handlers of exceptions 0 to 31.
    pub static exception_table: [u64; 32];
    /// Addresses of the handlers of devices.
    pub static device_table: [u64; 8];
    /// The IDT, filled in by `idt.rs`.
    pub static mut idt: [[u64; 2]; 256];
    /// The GDT; TSS descriptors are filled in by `idt.rs`.
    pub static mut gdt: [u64; 40];
    /// Physical address of the PVH start info.
    pub static pvh_start_info: u32;
    /// Which vCPU the next AP is.
    pub static mut ap_cpu: u64;
    /// First and last byte of the start code of the other vCPUs.
    pub static trampoline_start: u8;
    pub static trampoline_end: u8;
    pub static image_start: u8;
    pub static image_end: u8;
    pub fn timer_handler();
    pub fn cross_handler();
    pub fn own_handler();
    pub fn wake_handler();
    pub fn spurious_handler();
}

global_asm!(
    r#"
    .section .note.pvh, "a", @note
    .p2align 2
    .long 4
    .long 8
    .long 18                     # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_entry

    .section .boot.text, "ax", @progbits
    .code32
    .globl pvh_entry
pvh_entry:
    cli
    cld
    movl %ebx, pvh_start_info
    movb $0xff, %al              # the old interrupt controllers stay silent
    outb %al, $0x21
    outb %al, $0xa1
    lgdtl gdt_pointer
    xorl %esi, %esi              # 0: first vCPU
enter_long_mode:
    movl $0x620, %eax            # PAE, OSFXSR, OSXMMEXCPT
    movl %eax, %cr4
    movl $boot_pml4, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx
    rdmsr
    orl $0x100, %eax             # LME
    wrmsr
    movl $0x80010033, %eax       # PG, WP, NE, ET, MP, PE
    movl %eax, %cr0
    ljmpl $0x10, $long_mode

    .code64
long_mode:
    movl $0x18, %eax
    movl %eax, %ss
    movl %eax, %ds
    movl %eax, %es
    lidt idt_pointer(%rip)
    testl %esi, %esi
    jnz start_ap

    # First vCPU: the TSS of CPUS[0], then straight to CPL 3 on the stack of its service task.
    movl $CPUS, %edi
    movl ${RSP0}, %eax
    leal {TASK_BYTES}(%rdi), %ecx
    movq %rcx, (%rdi, %rax)
    movw $104, {BITMAP_OFFSET}(%rdi)
    leal {TSS}(%rdi), %eax
    movl %eax, %ecx
    shll $16, %ecx
    orl $0x0168, %ecx            # limit: registers and bitmap
    movl %ecx, gdt+{TSS_SELECTOR}
    movl %eax, %ecx
    shrl $16, %ecx
    movzbl %cl, %ecx
    orl $0x8900, %ecx
    andl $0xff000000, %eax
    orl %eax, %ecx
    movl %ecx, gdt+{TSS_SELECTOR}+4
    movl ${TSS_SELECTOR}, %eax
    ltr %ax
    movl $STACKS+{STACK_BYTES}, %ecx
    leal {TASK_BYTES}(%rdi), %esp
    pushq $0x2b
    pushq %rcx
    pushq ${USER_FLAGS}
    pushq $0x33
    pushq $user_start
    iretq

user_start:                      # CPL 3 from here: native speed
    xorl %ebp, %ebp
    subq $8, %rsp
    jmp rust_start

start_ap:
    movq ap_cpu, %rdi
    movl {SELECTOR}(%rdi), %eax
    ltr %ax
    movq $1, {ONLINE}(%rdi)
    leaq 2*{TASK_BYTES}(%rdi), %rbx
    xorl %esi, %esi
    jmp schedule

    # Registers are saved at the end of the task, rbx = task.
    .macro SAVE
    pushq %rax
    pushq %rcx
    pushq %rdx
    pushq %rbx
    pushq %rsi
    pushq %rdi
    pushq %rbp
    pushq %r8
    pushq %r9
    pushq %r10
    pushq %r11
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    leaq -{FRAME}(%rsp), %rbx
    .endm
    .macro END_OF_INTERRUPT
    movl $0xfee000b0, %eax
    movl $0, (%rax)
    .endm

    # Invalid opcode. With the magic number in rax it is the wait gate: rdi = deadline, rsi = now.
exception_6:
    cmpq ${GATE_MAGIC}, %rax
    je 1f
    pushq $0
    pushq $6
    jmp exception
1:  addq $2, (%rsp)              # past the ud2
    SAVE
    cmpq $0, {WAKE}(%rbx)
    je 1f
    movq $0, {WAKE}(%rbx)
    xorl %edi, %edi
1:  movq %rdi, {DEADLINE}(%rbx)
    movq {CPU}(%rbx), %rdi
    jmp schedule

    .globl timer_handler
timer_handler:
    SAVE
    movq {CPU}(%rbx), %rdi
    incq {TICKS}(%rdi)
    END_OF_INTERRUPT
    movq {ARMED}(%rdi), %rsi     # now is this, or what a task saw since
    cmpq {LAST_SEEN}(%rdi), %rsi
    cmovb {LAST_SEEN}(%rdi), %rsi

    # rbx = current task, rdi = vCPU, rsi = now.
schedule:
    leaq (%rdi), %r8             # r8 first choice: the other task, after idle the service
    leaq {TASK_BYTES}(%rdi), %r9
    cmpq %rbx, %r8
    jne 1f
    xchgq %r8, %r9
1:  cmpq %rsi, {DEADLINE}(%r8)
    jbe 2f
    xchgq %r8, %r9
    cmpq %rsi, {DEADLINE}(%r8)
    jbe 2f
    movq {DEADLINE}(%r8), %rdx   # none is due: idle until the earlier one
    cmpq {DEADLINE}(%r9), %rdx
    cmova {DEADLINE}(%r9), %rdx
    leaq 2*{TASK_BYTES}(%rdi), %r8
    movq {IDLE_CYCLES}(%rdi), %rcx
    jmp 3f
2:  movq $0, {DEADLINE}(%r8)
    movq {DEADLINE}(%r9), %rdx
    movq {TICK_CYCLES}(%rdi), %rcx
3:  subq %rsi, %rdx              # one that is due wraps around and so gets the full tick
    cmpq %rcx, %rdx
    cmova %rcx, %rdx
    addq %rdx, %rsi
    movq %rsi, {ARMED}(%rdi)
    imulq {MULTIPLIER}(%rdi), %rdx
    shrq $32, %rdx
    incl %edx
    movl $0xfee00380, %eax
    movl %edx, (%rax)

    # rbx = current task, r8 = next task.
switch_task:
    leaq 2*{TASK_BYTES}(%rdi), %rcx
    cmpq %rcx, %r8
    je idle
    cmpq %r8, %rbx
    je restore
    movq {FP_OWNER}(%rdi), %rcx
    cmpq %rcx, %r8
    je 1f
    fxsave64 (%rcx)
    fxrstor64 (%r8)
    movq %r8, {FP_OWNER}(%rdi)
1:  movq {CR3}(%r8), %rax
    cmpq {CURRENT_CR3}(%rdi), %rax
    je 2f
    movq %rax, {CURRENT_CR3}(%rdi)
    movq %rax, %cr3
2:  leaq {TASK_BYTES}(%r8), %rax
    movq %rax, {RSP0}(%rdi)
    leaq {FRAME}(%r8), %rsp
restore:
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %r11
    popq %r10
    popq %r9
    popq %r8
    popq %rbp
    popq %rdi
    popq %rsi
    popq %rbx
    popq %rdx
    popq %rcx
    popq %rax
    iretq

idle:
    leaq {TASK_BYTES}(%r8), %rsp
    sti
1:  hlt
    jmp 1b

    # Only counted: no task is woken by these.
    .macro COUNT name, field
    .globl \name
\name:
    pushq %rax
    movq {CPU}-{FRAME}-14*8(%rsp), %rax
    incq \field(%rax)
    END_OF_INTERRUPT
    popq %rax
    iretq
    .endm
    COUNT cross_handler, {CROSS_RECEIVED}
    COUNT own_handler, {OWN_RECEIVED}

    .globl spurious_handler
spurious_handler:
    pushq %rax
    movq {CPU}-{FRAME}-14*8(%rsp), %rax
    incq {SPURIOUS}(%rax)
    popq %rax
    iretq

    .globl wake_handler
wake_handler:
    SAVE
    movq {CPU}(%rbx), %rdi
    incq {WAKES}(%rdi)
    jmp wake_tasks

    .macro DEVICE number
device_\number:
    SAVE
    movq {CPU}(%rbx), %rdi
    incq {DEVICES}+8*\number(%rdi)
    jmp wake_service
    .endm
    DEVICE 0
    DEVICE 1
    DEVICE 2
    DEVICE 3
    DEVICE 4
    DEVICE 5
    DEVICE 6
    DEVICE 7

wake_tasks:
    movq $0, {DEADLINE}+{TASK_BYTES}(%rdi)
wake_service:
    END_OF_INTERRUPT
    movq $0, {DEADLINE}(%rdi)
    movq $1, {WAKE}(%rdi)
    movq %rdi, %r8               # the timer stays armed as it is
    jmp switch_task

    # Exceptions end the program: CPL 3 reports them. Stack: vector, error, rip, cs, rflags, rsp, ss.
exception:
    popq %rdi
    popq %rsi
    movq (%rsp), %rdx
    movq %cr2, %rcx
    movq 24(%rsp), %r8
    movq %cr3, %r9
    testb $3, 8(%rsp)
    jz exception_at_cpl0
    movq $exception_report, (%rsp)
    movq $panic_stack_end-8, 24(%rsp)
    iretq
exception_at_cpl0:
    leaq cpl0_text(%rip), %rsi
    movl $18, %ecx
    movl $0x3f8, %edx
    rep outsb
1:  cli
    hlt
    jmp 1b
cpl0_text:
    .ascii "\nPANIC at cpl 0  \n\n"

    .macro EXCEPTION number, has_error
exception_\number:
    .if !\has_error
    pushq $0
    .endif
    pushq $\number
    jmp exception
    .endm
    .irp number, 0,1,2,3,4,5,7,9,15,16,18,19,20,22,23,24,25,26,27,28,31
    EXCEPTION \number, 0
    .endr
    .irp number, 8,10,11,12,13,14,17,21,29,30
    EXCEPTION \number, 1
    .endr

    # Start of another vCPU in real mode, copied to {TRAMPOLINE}.
    .code16
    .globl trampoline_start
trampoline_start:
    cli
    xorw %ax, %ax
    movw %ax, %ds
    lgdtl trampoline_gdt_pointer - trampoline_start + {TRAMPOLINE}
    movl $0x11, %eax
    movl %eax, %cr0
    ljmpl $0x08, $(trampoline_32 - trampoline_start + {TRAMPOLINE})
    .code32
trampoline_32:
    movl $0x18, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl $1, %esi                # 1: another vCPU
    movl $enter_long_mode, %eax
    jmpl *%eax
    .p2align 2
trampoline_gdt_pointer:
    .word 40*8-1
    .long gdt
    .globl trampoline_end
trampoline_end:

    .code64
    .section .boot.data, "aw", @progbits
    .p2align 4
    .globl exception_table
exception_table:
    .irp number, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    .quad exception_\number
    .endr
    .globl device_table
device_table:
    .irp number, 0,1,2,3,4,5,6,7
    .quad device_\number
    .endr
    .globl gdt
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff     # 0x08 code, 32 bit, CPL 0
    .quad 0x00af9b000000ffff     # 0x10 code, 64 bit, CPL 0
    .quad 0x00cf93000000ffff     # 0x18 data, CPL 0
    .quad 0x00cffb000000ffff     # 0x23 code, 32 bit, CPL 3 (unused)
    .quad 0x00cff3000000ffff     # 0x2b data, CPL 3
    .quad 0x00affb000000ffff     # 0x33 code, 64 bit, CPL 3
    .quad 0
    .fill 32, 8, 0               # 0x40 one TSS a vCPU
gdt_pointer:
    .word 40*8-1
    .long gdt
idt_pointer:
    .word 256*16-1
    .quad idt
    .globl pvh_start_info
pvh_start_info:
    .long 0
    .globl ap_cpu
    .p2align 3
ap_cpu:
    .quad 0

    # Boot page tables: the first 4 GiB one to one in 2 MiB pages, user, accessed and dirty; the last GiB is not cached.
    .p2align 12
boot_pml4:
    .quad boot_pdpt + 0x27
    .fill 511, 8, 0
boot_pdpt:
    .quad boot_pd + 0x27, boot_pd + 0x1027, boot_pd + 0x2027, boot_pd + 0x3027
    .fill 508, 8, 0
boot_pd:
    .set address, 0xe7
    .rept 1536
    .quad address
    .set address, address + 0x200000
    .endr
    .set address, address + 0x18
    .rept 512
    .quad address
    .set address, address + 0x200000
    .endr

    .section .bss.entry, "aw", @nobits
    .p2align 12
    .globl idt
idt:
    .skip 4096
    .skip 16384
panic_stack_end:
    .text
    "#,
    TASK_BYTES = const TASK_BYTES,
    FRAME = const FRAME_OFFSET,
    STACK_BYTES = const STACK_BYTES,
    TSS_SELECTOR = const TSS_SELECTOR,
    TRAMPOLINE = const TRAMPOLINE,
    GATE_MAGIC = const GATE_MAGIC,
    CPU = const offset_of!(Task, cpu),
    CR3 = const offset_of!(Task, cr3),
    DEADLINE = const offset_of!(Task, deadline),
    WAKE = const offset_of!(Task, wake),
    TSS = const offset_of!(Cpu, tss),
    RSP0 = const offset_of!(Cpu, tss) + 4,
    USER_FLAGS = const crate::cpu::USER_FLAGS,
    BITMAP_OFFSET = const offset_of!(Cpu, tss) + 102,
    SELECTOR = const offset_of!(Cpu, tss_selector),
    CURRENT_CR3 = const offset_of!(Cpu, current_cr3),
    FP_OWNER = const offset_of!(Cpu, fp_owner),
    MULTIPLIER = const offset_of!(Cpu, timer_multiplier),
    TICK_CYCLES = const offset_of!(Cpu, tick_cycles),
    IDLE_CYCLES = const offset_of!(Cpu, idle_cycles),
    ARMED = const offset_of!(Cpu, armed_until),
    LAST_SEEN = const offset_of!(Cpu, last_seen),
    TICKS = const offset_of!(Cpu, ticks),
    CROSS_RECEIVED = const offset_of!(Cpu, cross_received),
    OWN_RECEIVED = const offset_of!(Cpu, own_received),
    WAKES = const offset_of!(Cpu, wakes),
    SPURIOUS = const offset_of!(Cpu, spurious),
    DEVICES = const offset_of!(Cpu, device_interrupts),
    ONLINE = const offset_of!(Cpu, online),
    options(att_syntax)
);
