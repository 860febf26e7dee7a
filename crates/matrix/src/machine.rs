use ringfence_dma::{Buffer, Gpa, HostSlice, Physical, Ram};
use ringfence_policy::Platform;
use std::fmt;
use std::sync::LazyLock;

/// The unit of frames.
pub const PAGE: usize = 4096;

/// How many pages the guest has, which it numbers from 0.
pub const OWN: usize = 32;

/// How many there are in all. The rest is the neighbours'.
pub const ALL: usize = 96;

/// On Xen the machine's first frames hold the hypervisor itself.
const HYPERVISOR: usize = 16;

/// On Xen, where the guest got frames in a row.
const EXCHANGED: usize = 40;

/// A part of the guest's memory, in its own numbering: the first page, and the first that is not of it.
#[derive(Clone, Copy, Debug)]
pub struct Area(usize, usize);

impl Area {
    /// Set aside for rings.
    pub const RINGS: Area = Area(4, 12);
    /// Set aside for bouncing. In one piece in the machine, too, on every platform.
    pub const BOUNCE: Area = Area(12, 20);
    /// For buffers.
    pub const BUFFERS: Area = Area(20, 28);
}

/// A machine's memory: that of the guest whose driver is watched, and that of its neighbours, full of canaries.
///
/// A guest numbers its frames itself. On Xen those numbers are not the machine's: a low one, taken for one of the
/// machine's, is somebody else's frame. Everywhere else the two are the same.
#[derive(Debug)]
pub struct Machine {
    /// The guest's pages in the guest's order, then the neighbours'.
    ram: Ram,
    /// By machine frame: which page of `ram` that is.
    pages: Vec<usize>,
    /// By page of `ram`: which machine frame that is.
    frames: Vec<usize>,
    xen: bool,
}

/// What every byte is before anything has happened: never 0, and different from its neighbours.
static CANARIES: LazyLock<Vec<u8>> =
    LazyLock::new(|| (0..ALL * PAGE).map(|at| (at * 13 + at / PAGE * 7) as u8 | 0x80).collect());

impl Machine {
    /// The memory of a machine of this kind, with canaries everywhere.
    pub fn new(platform: Platform) -> Self {
        let xen = matches!(platform, Platform::Xen | Platform::XenGrants);
        let mut frames: Vec<usize> = (0..ALL).collect();
        if xen {
            let Area(bounce, bounce_end) = Area::BOUNCE;
            for (page, frame) in frames.iter_mut().enumerate().take(OWN) {
                *frame = match page {
                    // Xen exchanges frames for ones in a row when a guest asks for a pool to bounce in.
                    page if (bounce..bounce_end).contains(&page) => EXCHANGED + (page - bounce),
                    // Backwards, so that no two pages that follow each other do so in the machine.
                    _ => ALL - 1 - page,
                };
            }
            let own = frames[..OWN].to_vec();
            let mut others = (0..ALL).filter(|frame| !own.contains(frame));
            frames[OWN..].fill_with(|| others.next().expect("as many frames as pages"));
        }
        let mut pages = vec![0; ALL];
        for (page, &frame) in frames.iter().enumerate() {
            pages[frame] = page;
        }
        let ram = Ram::new(ALL * PAGE);
        ram.slice(0, ALL * PAGE).write(0, &CANARIES);
        Self { ram, pages, frames, xen }
    }

    /// A part of the guest's memory, for its driver.
    pub fn buffer(&self, area: Area) -> Buffer<'_> {
        let Area(first, end) = area;
        Buffer::new(self.ram.slice(first * PAGE, (end - first) * PAGE), Gpa((first * PAGE) as u64))
    }

    /// Where a byte of the guest's is in the machine: what Xen tells a guest about itself. `None` where the guest has no
    /// memory.
    pub fn machine_addr(&self, guest: Gpa) -> Option<u64> {
        let page = usize::try_from(guest.0 / PAGE as u64).ok().filter(|&page| page < OWN)?;
        Some((self.frames[page] * PAGE) as u64 + guest.0 % PAGE as u64)
    }

    /// What the guest calls the place where `reached` begins. `None` if that is not its own.
    pub fn guest_addr(&self, reached: HostSlice<'_>) -> Option<Gpa> {
        let at = reached.as_ptr() as usize - self.ram.slice(0, 1).as_ptr() as usize;
        (at < OWN * PAGE).then_some(Gpa(at as u64))
    }

    /// Every byte that is not as it was, but for those in `lent`.
    pub fn damage(&self, lent: &[Buffer<'_>]) -> Vec<Damage> {
        let mut now = vec![0; ALL * PAGE];
        self.ram.slice(0, ALL * PAGE).read(0, &mut now);
        for buffer in lent {
            let at = buffer.physical().0 as usize;
            now[at..at + buffer.len()].copy_from_slice(&CANARIES[at..at + buffer.len()]);
        }
        if now == *CANARIES {
            return Vec::new();
        }
        let mut damage: Vec<Damage> = Vec::new();
        for (at, (&found, &was)) in now.iter().zip(CANARIES.iter()).enumerate().filter(|(_, (found, was))| found != was)
        {
            let addr = (self.frames[at / PAGE] * PAGE + at % PAGE) as u64;
            match damage.last_mut() {
                Some(last) if last.addr + last.found.len() as u64 == addr => {
                    last.found.push(found);
                    last.was.push(was);
                }
                _ => damage.push(Damage { addr, owner: self.owner(at / PAGE), was: vec![was], found: vec![found] }),
            }
        }
        damage
    }

    fn owner(&self, page: usize) -> Owner {
        match self.frames[page] {
            _ if page < OWN => Owner::Guest,
            frame if self.xen && frame < HYPERVISOR => Owner::Hypervisor,
            _ => Owner::Neighbour,
        }
    }
}

/// By machine address: what a device sees that nothing translates for. Each slice ends with its page: the next one of the
/// machine may be anywhere here.
impl Physical for Machine {
    fn slice(&self, addr: Gpa, len: usize) -> Option<HostSlice<'_>> {
        let frame = usize::try_from(addr.0 / PAGE as u64).ok()?;
        let offset = addr.0 as usize % PAGE;
        let page = *self.pages.get(frame)?;
        Some(self.ram.slice(page * PAGE + offset, len.min(PAGE - offset)))
    }
}

/// Bytes in a row that are not what they were, though nobody had lent them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// The machine address of the first.
    pub addr: u64,
    /// Whose they are.
    pub owner: Owner,
    /// What they were.
    pub was: Vec<u8>,
    /// What they are.
    pub found: Vec<u8>,
}

/// Whose memory something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The guest's, whose driver is watched; nothing that it had lent to the device.
    Guest,
    /// Another guest's, or another process's.
    Neighbour,
    /// Xen's own.
    Hypervisor,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Owner::Guest => "the guest's own",
            Owner::Neighbour => "a neighbour's",
            Owner::Hypervisor => "the hypervisor's",
        })
    }
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Damage { addr, owner, was, found } = self;
        let (shown, more) = (found.len().min(8), if found.len() > 8 { " …" } else { "" });
        write!(f, "{owner} {} bytes at {addr:#x} became", found.len())?;
        found[..shown].iter().try_for_each(|byte| write!(f, " {byte:02x}"))?;
        write!(f, "{more} (were")?;
        was[..shown].iter().try_for_each(|byte| write!(f, " {byte:02x}"))?;
        write!(f, "{more})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_page_has_a_frame_of_its_own() {
        for platform in Platform::ALL {
            let machine = Machine::new(platform);
            for page in 0..ALL {
                assert_eq!(machine.pages[machine.frames[page]], page, "{platform}");
            }
            let differ = (0..OWN).filter(|&page| machine.frames[page] != page).count();
            let xen = matches!(platform, Platform::Xen | Platform::XenGrants);
            assert_eq!(differ, if xen { OWN } else { 0 }, "{platform}");
        }
    }

    #[test]
    fn on_xen_an_address_of_the_guest_is_somebody_elses() {
        let machine = Machine::new(Platform::Xen);
        for page in 0..OWN {
            let gpa = Gpa((page * PAGE) as u64);
            assert_eq!(machine.guest_addr(machine.slice(gpa, 1).unwrap()), None);
            let true_addr = machine.machine_addr(gpa).unwrap();
            assert_eq!(machine.guest_addr(machine.slice(Gpa(true_addr), 1).unwrap()), Some(gpa));
        }
    }

    #[test]
    fn damage_is_found_to_the_byte_and_what_is_lent_is_none() {
        let machine = Machine::new(Platform::Xen);
        let lent = machine.buffer(Area::BUFFERS).sub(100, 10);
        lent.memory().fill(1);
        assert_eq!(machine.damage(&[lent]), []);
        machine.slice(Gpa(0x3ffe), 2).unwrap().write(0, &[1, 2]);
        let [damage] = &machine.damage(&[lent])[..] else { panic!("one run of bytes") };
        assert_eq!((damage.addr, damage.owner, &damage.found[..]), (0x3ffe, Owner::Hypervisor, &[1, 2][..]));
        assert_eq!(machine.damage(&[]).len(), 2);
    }
}
