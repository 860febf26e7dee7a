//! What a 4 KiB read costs in instructions, here and with `virtio-drivers`: what the two drivers do themselves, with a
//! device that only marks requests as done. Four requests are under way at a time, which is what the queue of
//! `virtio-drivers` has room for without tables.
//!
//! ```sh
//! cargo build --release -p ringfence-hal --example cost
//! valgrind --tool=callgrind --callgrind-out-file=cost.out target/release/examples/cost
//! callgrind_annotate --inclusive=yes cost.out | grep -E 'cost::(ours|theirs)'
//! ```
//!
//! Each of the functions that it lists handles [`REQUESTS`] requests.

use ringfence_dma::{Buffer, Gpa, HostSlice, Ram};
use ringfence_driver::blk::{Blk, Options, Request};
use ringfence_driver::mapper::Direct;
use ringfence_driver::policy::{DriverPolicy, Identity, Platform, Taken};
use ringfence_driver::{DeviceStatus, Host, Transport};
use ringfence_ring::Layout;
use std::cell::RefCell;
use std::convert::Infallible;
use std::ptr::NonNull;
use virtio_drivers::device::blk::{BlkReq, BlkResp, VirtIOBlk};
use virtio_drivers::transport::{self, DeviceType, InterruptStatus};
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};

const BATCH: usize = 4;
const ROUNDS: usize = 25_000;
/// How many requests each driver makes.
pub const REQUESTS: usize = BATCH * ROUNDS;

const VERSION_1: u64 = 1 << 32;
const PACKED: u64 = 1 << 34;
const BLOCK: usize = 4096;

/// A ring in this process' memory, and where the device is in it.
#[derive(Default)]
struct Ring {
    descriptors: u64,
    driver: u64,
    device: u64,
    size: u16,
    next: u16,
    wrap: bool,
}

impl Ring {
    /// Marks all that is there as done, the status written.
    fn serve_split(&mut self) {
        // SAFETY: the driver's own ring and buffers, at their own addresses; it waits meanwhile.
        unsafe {
            let available = ((self.driver + 2) as *const u16).read_volatile();
            while self.next != available {
                let slot = u64::from(self.next % self.size);
                let head = ((self.driver + 4 + 2 * slot) as *const u16).read();
                let (mut index, mut written) = (head, 0);
                loop {
                    let descriptor = self.descriptors + 16 * u64::from(index);
                    let (addr, len) = ((descriptor as *const u64).read(), ((descriptor + 8) as *const u32).read());
                    let (flags, next) =
                        (((descriptor + 12) as *const u16).read(), ((descriptor + 14) as *const u16).read());
                    if flags & 2 != 0 {
                        written += len;
                    }
                    if flags & 1 == 0 {
                        (addr as *mut u8).write_volatile(0);
                        break;
                    }
                    index = next;
                }
                let entry = self.device + 4 + 8 * slot;
                (entry as *mut u32).write(head.into());
                ((entry + 4) as *mut u32).write(written);
                self.next = self.next.wrapping_add(1);
                ((self.device + 2) as *mut u16).write_volatile(self.next);
            }
        }
    }

    fn serve_packed(&mut self) {
        // SAFETY: as above.
        unsafe {
            loop {
                let first = self.descriptors + 16 * u64::from(self.next);
                let available = ((first + 14) as *const u16).read_volatile();
                if (available & 1 << 7 != 0) != self.wrap || (available & 1 << 15 != 0) == self.wrap {
                    return;
                }
                let (was, mut written) = (self.wrap, 0);
                loop {
                    let descriptor = self.descriptors + 16 * u64::from(self.next);
                    let (addr, len) = ((descriptor as *const u64).read(), ((descriptor + 8) as *const u32).read());
                    let (id, flags) =
                        (((descriptor + 12) as *const u16).read(), ((descriptor + 14) as *const u16).read());
                    self.next += 1;
                    if self.next == self.size {
                        (self.next, self.wrap) = (0, !self.wrap);
                    }
                    if flags & 2 != 0 {
                        written += len;
                    }
                    if flags & 1 == 0 {
                        (addr as *mut u8).write_volatile(0);
                        ((first + 12) as *mut u16).write(id);
                        break;
                    }
                }
                ((first + 8) as *mut u32).write(written);
                ((first + 14) as *mut u16).write_volatile(if was { 1 << 7 | 1 << 15 } else { 0 });
            }
        }
    }
}

/// Our transport to it.
struct Ours {
    ring: Ring,
    status: DeviceStatus,
    offered: u64,
}

impl Transport for Ours {
    type Error = Infallible;

    fn identity(&self) -> Identity {
        Identity { vendor: 0, device: 2, slot: 0 }
    }

    fn reset(&mut self) -> Result<(), Infallible> {
        self.status = DeviceStatus::empty();
        Ok(())
    }

    fn status(&mut self) -> Result<DeviceStatus, Infallible> {
        Ok(self.status)
    }

    fn set_status(&mut self, status: DeviceStatus) -> Result<(), Infallible> {
        self.status = status;
        Ok(())
    }

    fn offered(&mut self) -> Result<u64, Infallible> {
        Ok(self.offered)
    }

    fn take(&mut self, _: Taken) -> Result<(), Infallible> {
        Ok(())
    }

    fn config_generation(&mut self) -> Result<u32, Infallible> {
        Ok(0)
    }

    fn read_config(&mut self, offset: u32, into: &mut [u8]) -> Result<(), Infallible> {
        let mut config = [0; 64];
        config[2] = 1;
        into.copy_from_slice(&config[offset as usize..][..into.len()]);
        Ok(())
    }

    fn max_queue_size(&mut self, _: u16) -> Result<u16, Infallible> {
        Ok(16)
    }

    fn start_queue(&mut self, _: u16, layout: &Layout) -> Result<(), Infallible> {
        let Layout { size, descriptors, driver, device } = *layout;
        let (descriptors, driver, device) = (descriptors.0, driver.0, device.0);
        self.ring = Ring { descriptors, driver, device, size, next: 0, wrap: true };
        Ok(())
    }

    fn notify(&mut self, _: u16) -> Result<(), Infallible> {
        Ok(())
    }

    fn wait(&mut self, _: u16) -> Result<(), Infallible> {
        Ok(())
    }
}

/// Theirs, whose driver keeps it to itself: the ring is beside it.
struct Theirs;

thread_local! {
    static RING: RefCell<Ring> = RefCell::default();
}

impl transport::Transport for Theirs {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn read_device_features(&mut self) -> u64 {
        VERSION_1
    }

    fn write_driver_features(&mut self, _: u64) {}

    fn max_queue_size(&mut self, _: u16) -> u32 {
        16
    }

    fn notify(&mut self, _: u16) {}

    fn get_status(&self) -> transport::DeviceStatus {
        transport::DeviceStatus::empty()
    }

    fn set_status(&mut self, _: transport::DeviceStatus) {}

    fn set_guest_page_size(&mut self, _: u32) {}

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(&mut self, _: u16, size: u32, descriptors: PhysAddr, driver: PhysAddr, device: PhysAddr) {
        RING.set(Ring { descriptors, driver, device, size: size as u16, next: 0, wrap: true });
    }

    fn queue_unset(&mut self, _: u16) {}

    fn queue_used(&mut self, _: u16) -> bool {
        false
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        InterruptStatus::empty()
    }

    fn read_config_generation(&self) -> u32 {
        0
    }

    fn read_config_space<T: zerocopy::FromBytes + zerocopy::IntoBytes>(&self, _: usize) -> virtio_drivers::Result<T> {
        Ok(T::new_zeroed())
    }

    fn write_config_space<T: zerocopy::IntoBytes + zerocopy::Immutable>(
        &mut self,
        _: usize,
        _: T,
    ) -> virtio_drivers::Result<()> {
        Ok(())
    }
}

/// Addresses are what they are.
struct Flat;

// SAFETY: memory is leaked, zeroed and aligned.
unsafe impl Hal for Flat {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let start = Box::leak(Box::new(Ram::new(pages * PAGE_SIZE))).slice(0, pages * PAGE_SIZE).as_ptr();
        (start.expose_provenance() as u64, NonNull::new(start).expect("an allocation"))
    }

    unsafe fn dma_dealloc(_: PhysAddr, _: NonNull<u8>, _: usize) -> i32 {
        0
    }

    unsafe fn mmio_phys_to_virt(_: PhysAddr, _: usize) -> NonNull<u8> {
        unreachable!("there are no registers here")
    }

    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        buffer.cast::<u8>().as_ptr().expose_provenance() as u64
    }

    unsafe fn unshare(_: PhysAddr, _: NonNull<[u8]>, _: BufferDirection) {}
}

fn at_itself(memory: HostSlice<'_>) -> Buffer<'_> {
    Buffer::new(memory, Gpa(memory.as_ptr().expose_provenance() as u64))
}

type OurDisk<'a> = Blk<'a, Ours, Direct<'a>>;

#[inline(never)]
fn ours_split_submit<'a>(disk: &mut OurDisk<'a>, data: &[Buffer<'a>; BATCH]) {
    ours_submit(disk, data);
}

#[inline(never)]
fn ours_split_complete(disk: &mut OurDisk<'_>) {
    ours_complete(disk);
}

#[inline(never)]
fn ours_packed_submit<'a>(disk: &mut OurDisk<'a>, data: &[Buffer<'a>; BATCH]) {
    ours_submit(disk, data);
}

#[inline(never)]
fn ours_packed_complete(disk: &mut OurDisk<'_>) {
    ours_complete(disk);
}

#[inline(always)]
fn ours_submit<'a>(disk: &mut OurDisk<'a>, data: &[Buffer<'a>; BATCH]) {
    for (number, buffer) in data.iter().enumerate() {
        let into = std::slice::from_ref(buffer);
        disk.submit(Request::Read { sector: 8 * number as u64, into }).unwrap();
        // As theirs: each by itself.
        disk.notify().unwrap();
    }
}

#[inline(always)]
fn ours_complete(disk: &mut OurDisk<'_>) {
    for _ in 0..BATCH {
        disk.poll().unwrap().unwrap().result.unwrap();
    }
}

struct Slot {
    request: BlkReq,
    response: BlkResp,
    data: Box<[u8; BLOCK]>,
    token: u16,
}

#[inline(never)]
fn theirs_submit(disk: &mut VirtIOBlk<Flat, Theirs>, slots: &mut [Slot; BATCH]) {
    for (number, slot) in slots.iter_mut().enumerate() {
        // SAFETY: nothing of the slot is touched before it is completed.
        let token =
            unsafe { disk.read_blocks_nb(8 * number, &mut slot.request, &mut slot.data[..], &mut slot.response) };
        slot.token = token.unwrap();
    }
}

#[inline(never)]
fn theirs_complete(disk: &mut VirtIOBlk<Flat, Theirs>, slots: &mut [Slot; BATCH]) {
    for _ in 0..BATCH {
        let token = disk.peek_used().unwrap();
        let slot = slots.iter_mut().find(|slot| slot.token == token).unwrap();
        // SAFETY: the same as were submitted.
        unsafe { disk.complete_read_blocks(token, &slot.request, &mut slot.data[..], &mut slot.response) }.unwrap();
    }
}

fn main() {
    let ram = Ram::new(64 * PAGE_SIZE);
    let data: [_; BATCH] = std::array::from_fn(|number| at_itself(ram.slice(number * BLOCK, BLOCK)));
    for offered in [VERSION_1, VERSION_1 | PACKED] {
        let direct = Direct::new(at_itself(ram.slice(32 * PAGE_SIZE, 32 * PAGE_SIZE)));
        let (platform, policy) = (Platform::X86, DriverPolicy::New);
        let host = Host { platform, policy, physical: Some(&direct), translated: Some(&direct) };
        let transport = Ours { ring: Ring::default(), status: DeviceStatus::empty(), offered };
        let mut disk = Blk::start(transport, host, Options { depth: 16, segments: 4 }).unwrap();
        for _ in 0..ROUNDS {
            match offered & PACKED {
                0 => {
                    ours_split_submit(&mut disk, &data);
                    disk.device_mut().transport_mut().ring.serve_split();
                    ours_split_complete(&mut disk);
                }
                _ => {
                    ours_packed_submit(&mut disk, &data);
                    disk.device_mut().transport_mut().ring.serve_packed();
                    ours_packed_complete(&mut disk);
                }
            }
        }
    }

    let slot =
        |_| Slot { request: BlkReq::default(), response: BlkResp::default(), data: Box::new([0; BLOCK]), token: 0 };
    let mut slots: [Slot; BATCH] = std::array::from_fn(slot);
    let mut disk = VirtIOBlk::<Flat, _>::new(Theirs).unwrap();
    for _ in 0..ROUNDS {
        theirs_submit(&mut disk, &mut slots);
        RING.with_borrow_mut(Ring::serve_split);
        theirs_complete(&mut disk, &mut slots);
    }
    println!("{REQUESTS} requests each");
}
