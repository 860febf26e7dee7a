//! Where the registers of `virtio_pci_common_cfg` are (§4.1.4.3), for drivers and devices alike.

/// Which half of the offered features DEVICE_FEATURE shows: 32 bits.
pub const DEVICE_FEATURE_SELECT: usize = 0x00;
/// 32 of the features that the device offers.
pub const DEVICE_FEATURE: usize = 0x04;
/// Which half of the taken features DRIVER_FEATURE is: 32 bits.
pub const DRIVER_FEATURE_SELECT: usize = 0x08;
/// 32 of the features that the driver takes.
pub const DRIVER_FEATURE: usize = 0x0c;
/// The MSI-X vector for changes of the configuration: 16 bits.
pub const CONFIG_MSIX_VECTOR: usize = 0x10;
/// The most queues that there may be: 16 bits.
pub const NUM_QUEUES: usize = 0x12;
/// The device status (§2.1): 8 bits.
pub const DEVICE_STATUS: usize = 0x14;
/// Counts changes of the configuration: 8 bits.
pub const CONFIG_GENERATION: usize = 0x15;
/// Which queue those below are about: 16 bits.
pub const QUEUE_SELECT: usize = 0x16;
/// How many descriptors it has: 16 bits.
pub const QUEUE_SIZE: usize = 0x18;
/// Its MSI-X vector: 16 bits.
pub const QUEUE_MSIX_VECTOR: usize = 0x1a;
/// Whether it is enabled: 16 bits.
pub const QUEUE_ENABLE: usize = 0x1c;
/// Where it is rung, in units of `notify_off_multiplier`: 16 bits.
pub const QUEUE_NOTIFY_OFF: usize = 0x1e;
/// Where its descriptors are: 64 bits, in halves.
pub const QUEUE_DESC: usize = 0x20;
/// Where the area is that the driver writes: 64 bits, in halves.
pub const QUEUE_DRIVER: usize = 0x28;
/// Where the area is that the device writes: 64 bits, in halves.
pub const QUEUE_DEVICE: usize = 0x30;
/// What to ring with: 16 bits.
pub const QUEUE_NOTIFY_DATA: usize = 0x38;
/// Resets the queue alone: 16 bits.
pub const QUEUE_RESET: usize = 0x3a;
/// Where the structure ends that has the field above, which older devices lack.
pub const WITH_QUEUE_RESET: usize = 0x3c;

/// VIRTIO_MSI_NO_VECTOR: no interrupt.
pub const NO_VECTOR: u16 = 0xffff;
