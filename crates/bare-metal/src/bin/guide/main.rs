//! The code of docs/driver.md as it stands there, in a kernel that has what it leaves to one: a heap, and somewhere to say
//! what the disk's first sector is.

#![no_std]
#![no_main]

#[path = "../confined/heap.rs"]
mod heap;

#[expect(unreachable_pub, reason = "a stranger's file")]
mod guide {
    include!(concat!(env!("OUT_DIR"), "/guide.rs"));
}

use core::fmt::{self, Display};

use ringfence_bare_metal::{finish, tell, watchdog};

#[unsafe(no_mangle)]
extern "C" fn guest() -> ! {
    watchdog::allow(100, || finish("failed"));
    match guide::read_first_sector() {
        Ok(sector) => {
            tell("sector", Hex(&sector));
            finish("done")
        }
        Err(error) => {
            tell("error", error);
            finish("failed")
        }
    }
}

struct Hex<'b>(&'b [u8]);

impl Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
