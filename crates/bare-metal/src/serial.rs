//! COM1, a 16550, polled.

use core::fmt;

use crate::port;

const DATA: u16 = 0x3f8;
const INTERRUPTS: u16 = DATA + 1;
const FIFO: u16 = DATA + 2;
const LINE: u16 = DATA + 3;
const STATE: u16 = DATA + 5;
const ROOM: u8 = 1 << 5;

/// How often to look for room: a port that is not there must not stop us.
const PATIENCE: u32 = 1_000_000;

/// 115200 baud, 8N1, no interrupts.
pub(crate) fn start() {
    port::write_8(INTERRUPTS, 0);
    port::write_8(LINE, 0x80);
    port::write_8(DATA, 1);
    port::write_8(INTERRUPTS, 0);
    port::write_8(LINE, 3);
    port::write_8(FIFO, 7);
}

/// The console.
pub(crate) struct Serial;

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            (0..PATIENCE).find(|_| port::read_8(STATE) & ROOM != 0);
            port::write_8(DATA, byte);
        }
        Ok(())
    }
}
