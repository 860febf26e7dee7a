//! Exceptions and the timer's interrupt: a table of gates into `entry.s`.

use core::arch::asm;

/// Exceptions, and the timer after them.
const GATES: usize = 33;
/// The vector of the timer.
pub(crate) const TIMER: u8 = 32;
/// How far the entries of exceptions are from each other.
const STEP: u64 = 16;

unsafe extern "C" {
    // Places in `entry.s`; only their addresses are used.
    safe fn exceptions();
    safe fn tick();
}

/// A 64-bit interrupt gate.
#[derive(Clone, Copy)]
#[repr(C)]
struct Gate(u64, u64);

impl Gate {
    const ABSENT: Self = Self(0, 0);

    fn to(entry: u64) -> Self {
        const CODE: u64 = 8 << 16;
        const STACK: u64 = 1 << 32;
        const PRESENT_INTERRUPT_GATE: u64 = 0x8e << 40;
        Self(entry & 0xffff | CODE | STACK | PRESENT_INTERRUPT_GATE | (entry >> 16 & 0xffff) << 48, entry >> 32)
    }
}

static mut TABLE: [Gate; GATES] = [Gate::ABSENT; GATES];

/// Called once, before anything can trap usefully.
pub(crate) fn start() {
    let first = exceptions as *const () as u64;
    let gates = core::array::from_fn(|vector| match vector as u8 {
        TIMER => Gate::to(tick as *const () as u64),
        _ => Gate::to(first + vector as u64 * STEP),
    });
    let table = &raw mut TABLE;
    #[repr(C, packed)]
    struct Pointer(u16, *mut [Gate; GATES]);
    let pointer = Pointer((size_of::<[Gate; GATES]>() - 1) as u16, table);
    // SAFETY: one processor that is here once, so nobody else has the table; it stays
    // where it is, and its gates lead to code that expects them.
    unsafe {
        table.write(gates);
        asm!("lidt [{}]", in(reg) &pointer, options(readonly, nostack));
    }
}

/// An exception is a bug here, or a device that wrote where it should not.
#[unsafe(no_mangle)]
extern "C" fn exception(number: u64, frame: *const u64, address: u64) -> ! {
    const WITH_CODE: [u64; 10] = [8, 10, 11, 12, 13, 14, 17, 21, 29, 30];
    let place = usize::from(WITH_CODE.contains(&number));
    // SAFETY: the processor has pushed the instruction's address there, after the code if
    // the exception has one.
    let instruction = unsafe { frame.add(place).read() };
    panic!("exception {number} at {instruction:#x}, address {address:#x}")
}
