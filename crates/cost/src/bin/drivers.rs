//! What a 4 KiB read costs in instructions, here and with `virtio-drivers`: what the two drivers do themselves, with a
//! device that only marks requests as done. Ours has 32 under way at a time, `virtio-drivers` as many as its queue takes.
//!
//! ```sh
//! cargo xtask instructions
//! ```
//!
//! or, for one of them (`ours` or `theirs`; `split` or `packed`; `direct`, or `tables` of descriptors; `each` is told of by
//! itself, or a whole `batch`):
//!
//! ```sh
//! cargo build --release -p ringfence-cost --bin drivers
//! valgrind --tool=callgrind --collect-atstart=no '--toggle-collect=*drivers::driver_*' --callgrind-out-file=drivers.out \
//!     target/release/drivers ours split direct batch
//! ```
//!
//! The count that callgrind ends with is for [`REQUESTS`] requests.

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

/// How many requests the driver makes.
pub const REQUESTS: usize = 64_000;

/// How many are under way at a time: ours; and theirs, whose queue has 16 descriptors, without tables and with.
const OURS: usize = 32;
const THEIRS: [usize; 2] = [4, 16];

const VERSION_1: u64 = 1 << 32;
const PACKED: u64 = 1 << 34;
const INDIRECT: u64 = 1 << 28;
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
                let (mut index, mut written, mut table) = (head, 0, self.descriptors);
                loop {
                    let descriptor = table + 16 * u64::from(index);
                    let (addr, len) = ((descriptor as *const u64).read(), ((descriptor + 8) as *const u32).read());
                    let (flags, next) =
                        (((descriptor + 12) as *const u16).read(), ((descriptor + 14) as *const u16).read());
                    if flags & 4 != 0 {
                        (table, index) = (addr, 0);
                        continue;
                    }
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
                    if flags & 4 != 0 {
                        // Header, data, status.
                        written = ((addr + 24) as *const u32).read() + 1;
                        (((addr + 32) as *const u64).read() as *mut u8).write_volatile(0);
                        ((first + 12) as *mut u16).write(id);
                        break;
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
        Ok(128)
    }

    fn start_queue(&mut self, _: u16, layout: &Layout) -> Result<(), Infallible> {
        let Layout { size, descriptors, driver, device } = *layout;
        let (descriptors, driver, device) = (descriptors.0, driver.0, device.0);
        self.ring = Ring { descriptors, driver, device, size, next: 0, wrap: true };
        Ok(())
    }

    fn reset_queue(&mut self, _: u16) -> Result<(), Infallible> {
        unreachable!("it is not among the features")
    }

    fn notify(&mut self, _: u16) -> Result<(), Infallible> {
        Ok(())
    }

    fn wait(&mut self, _: u16) -> Result<(), Infallible> {
        Ok(())
    }
}

/// Theirs, whose driver keeps it to itself: the ring is beside it.
struct Theirs {
    offered: u64,
}

thread_local! {
    static RING: RefCell<Ring> = RefCell::default();
}

impl transport::Transport for Theirs {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn read_device_features(&mut self) -> u64 {
        self.offered
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

/// How a driver tells the device.
#[derive(Clone, Copy, PartialEq)]
enum Telling {
    Each,
    Batch,
}

#[inline(never)]
fn driver_submit_each<'a>(disk: &mut OurDisk<'a>, data: &[Buffer<'a>]) {
    for (number, buffer) in data.iter().enumerate() {
        disk.send(Request::Read { sector: 8 * number as u64, into: std::slice::from_ref(buffer) }).unwrap();
    }
}

#[inline(never)]
fn driver_submit_batch<'a>(disk: &mut OurDisk<'a>, data: &[Buffer<'a>]) {
    for (number, buffer) in data.iter().enumerate() {
        disk.submit(Request::Read { sector: 8 * number as u64, into: std::slice::from_ref(buffer) }).unwrap();
    }
    disk.notify().unwrap();
}

#[inline(never)]
fn driver_complete(disk: &mut OurDisk<'_>) {
    for _ in 0..OURS {
        assert!(disk.poll().unwrap().unwrap().result.is_ok());
    }
}

fn ours(offered: u64, telling: Telling) {
    let ram = Ram::new(128 * PAGE_SIZE);
    let data: [_; OURS] = std::array::from_fn(|number| at_itself(ram.slice(number * BLOCK, BLOCK)));
    let direct = Direct::new(at_itself(ram.slice(64 * PAGE_SIZE, 64 * PAGE_SIZE)));
    let (platform, policy) = (Platform::X86, DriverPolicy::New);
    let host = Host { platform, policy, physical: Some(&direct), translated: Some(&direct) };
    let transport = Ours { ring: Ring::default(), status: DeviceStatus::empty(), offered };
    let mut disk = Blk::start(transport, host, Options { depth: 128, segments: 4 }).unwrap();
    for _ in 0..REQUESTS / OURS {
        match telling {
            Telling::Each => driver_submit_each(&mut disk, &data),
            Telling::Batch => driver_submit_batch(&mut disk, &data),
        }
        let ring = &mut disk.device_mut().transport_mut().ring;
        if offered & PACKED == 0 {
            ring.serve_split()
        } else {
            ring.serve_packed()
        }
        driver_complete(&mut disk);
    }
}

struct Slot {
    request: BlkReq,
    response: BlkResp,
    data: Box<[u8; BLOCK]>,
}

#[inline(never)]
fn driver_submit_theirs(disk: &mut VirtIOBlk<Flat, Theirs>, slots: &mut [Slot], by_token: &mut [u16]) {
    for (number, slot) in slots.iter_mut().enumerate() {
        // SAFETY: nothing of the slot is touched before it is completed.
        let token =
            unsafe { disk.read_blocks_nb(8 * number, &mut slot.request, &mut slot.data[..], &mut slot.response) };
        by_token[usize::from(token.unwrap())] = number as u16;
    }
}

#[inline(never)]
fn driver_complete_theirs(disk: &mut VirtIOBlk<Flat, Theirs>, slots: &mut [Slot], by_token: &[u16]) {
    for _ in 0..slots.len() {
        let token = disk.peek_used().unwrap();
        let slot = &mut slots[usize::from(by_token[usize::from(token)])];
        // SAFETY: the same as were submitted.
        unsafe { disk.complete_read_blocks(token, &slot.request, &mut slot.data[..], &mut slot.response) }.unwrap();
    }
}

fn theirs(offered: u64) {
    let slot = |_| Slot { request: BlkReq::default(), response: BlkResp::default(), data: Box::new([0; BLOCK]) };
    let mut slots: Vec<_> = (0..THEIRS[usize::from(offered & INDIRECT != 0)]).map(slot).collect();
    let mut by_token = [0; 16];
    let mut disk = VirtIOBlk::<Flat, _>::new(Theirs { offered }).unwrap();
    for _ in 0..REQUESTS / slots.len() {
        driver_submit_theirs(&mut disk, &mut slots, &mut by_token);
        RING.with_borrow_mut(Ring::serve_split);
        driver_complete_theirs(&mut disk, &mut slots, &by_token);
    }
}

fn main() {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let said = |word: &str| arguments.iter().any(|argument| argument == word);
    let bit = |word, bit| if said(word) { bit } else { 0 };
    let offered = VERSION_1 | bit("packed", PACKED) | bit("tables", INDIRECT);
    match said("theirs") {
        true => theirs(offered),
        false => ours(offered, if said("batch") { Telling::Batch } else { Telling::Each }),
    }
    println!("{REQUESTS} requests");
}
