//! The common configuration structure (§4.1.4.3): which field a write is of, and what a read shows.
//!
//! A driver accesses each field in its own width, and a 64-bit one in halves. Whoever writes across fields writes each that
//! he writes whole, in order; a part of one is nothing.

use super::queue::Queue;
use ringfence_driver::pci::common as at;

/// How long the structure is that is shown: up to the field for resetting a queue, and what is behind it in its word.
pub(super) const LEN: usize = at::WITH_QUEUE_RESET + 4;

/// What is not a queue's, and not the device's to know.
#[derive(Debug)]
pub(super) struct Common {
    device_feature_select: u32,
    driver_feature_select: u32,
    pub(super) driver_features: u64,
    pub(super) config_vector: u16,
    pub(super) status: u8,
    pub(super) queue_select: u16,
}

/// A field that can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Field {
    DeviceFeatureSelect,
    DriverFeatureSelect,
    DriverFeature,
    ConfigVector,
    Status,
    QueueSelect,
    Queue(QueueField),
}

/// A field of the selected queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum QueueField {
    Size,
    Vector,
    Enable,
    /// Of the three areas, in the order of the structure, the lower or upper half.
    Address {
        area: usize,
        half: Half,
    },
    Reset,
}

/// A half of 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Half {
    Low,
    High,
}

/// What a write comes to beyond the field itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    None,
    Features { select: u32, value: u32 },
    ConfigVector(u16),
    Status(u8),
    Queue(QueueField, u32),
}

const fn address(area: usize, half: Half) -> Field {
    Field::Queue(QueueField::Address { area, half })
}

/// Where each is and how many bytes it has, in order.
const FIELDS: [(usize, usize, Field); 16] = [
    (at::DEVICE_FEATURE_SELECT, 4, Field::DeviceFeatureSelect),
    (at::DRIVER_FEATURE_SELECT, 4, Field::DriverFeatureSelect),
    (at::DRIVER_FEATURE, 4, Field::DriverFeature),
    (at::CONFIG_MSIX_VECTOR, 2, Field::ConfigVector),
    (at::DEVICE_STATUS, 1, Field::Status),
    (at::QUEUE_SELECT, 2, Field::QueueSelect),
    (at::QUEUE_SIZE, 2, Field::Queue(QueueField::Size)),
    (at::QUEUE_MSIX_VECTOR, 2, Field::Queue(QueueField::Vector)),
    (at::QUEUE_ENABLE, 2, Field::Queue(QueueField::Enable)),
    (at::QUEUE_DESC, 4, address(0, Half::Low)),
    (at::QUEUE_DESC + 4, 4, address(0, Half::High)),
    (at::QUEUE_DRIVER, 4, address(1, Half::Low)),
    (at::QUEUE_DRIVER + 4, 4, address(1, Half::High)),
    (at::QUEUE_DEVICE, 4, address(2, Half::Low)),
    (at::QUEUE_DEVICE + 4, 4, address(2, Half::High)),
    (at::QUEUE_RESET, 2, Field::Queue(QueueField::Reset)),
];

/// The fields that `data` at `offset` covers whole, and their values.
pub(super) fn fields(offset: u64, data: &[u8]) -> Vec<(Field, u32)> {
    let whole = |&(start, len, field): &(usize, usize, Field)| {
        let from = (start as u64).checked_sub(offset)?;
        let from = usize::try_from(from).ok()?;
        let bytes = data.get(from..from.checked_add(len)?)?;
        let mut value = [0; 4];
        value[..len].copy_from_slice(bytes);
        Some((field, u32::from_le_bytes(value)))
    };
    FIELDS.iter().filter_map(whole).collect()
}

impl Common {
    /// As after a reset.
    pub(super) fn new() -> Self {
        Self {
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            config_vector: at::NO_VECTOR,
            status: 0,
            queue_select: 0,
        }
    }

    /// Sets what is only here, and says what else there is to do.
    pub(super) fn write(&mut self, field: Field, value: u32) -> Effect {
        match field {
            Field::DeviceFeatureSelect => self.device_feature_select = value,
            Field::DriverFeatureSelect => self.driver_feature_select = value,
            Field::QueueSelect => self.queue_select = value as u16,
            Field::DriverFeature => return Effect::Features { select: self.driver_feature_select, value },
            Field::ConfigVector => return Effect::ConfigVector(value as u16),
            Field::Status => return Effect::Status(value as u8),
            Field::Queue(field) => return Effect::Queue(field, value),
        }
        Effect::None
    }

    /// The driver takes 32 features. What lies above the 64 that there are is never offered.
    pub(super) fn take(&mut self, select: u32, value: u32) {
        let (low, high) = (self.driver_features as u32, (self.driver_features >> 32) as u32);
        let (low, high) = match select {
            0 => (value, high),
            1 => (low, value),
            _ => return,
        };
        self.driver_features = u64::from(low) | u64::from(high) << 32;
    }

    /// The structure as it reads now, with `queue` selected if there is such a one.
    pub(super) fn image(&self, offered: u64, queues: u16, generation: u8, queue: Option<&Queue>) -> [u8; LEN] {
        let mut image = [0; LEN];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        let half = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        put(at::DEVICE_FEATURE_SELECT, &self.device_feature_select.to_le_bytes());
        put(at::DEVICE_FEATURE, &half(offered, self.device_feature_select).to_le_bytes());
        put(at::DRIVER_FEATURE_SELECT, &self.driver_feature_select.to_le_bytes());
        put(at::DRIVER_FEATURE, &half(self.driver_features, self.driver_feature_select).to_le_bytes());
        put(at::CONFIG_MSIX_VECTOR, &self.config_vector.to_le_bytes());
        put(at::NUM_QUEUES, &queues.to_le_bytes());
        put(at::DEVICE_STATUS, &[self.status]);
        put(at::CONFIG_GENERATION, &[generation]);
        put(at::QUEUE_SELECT, &self.queue_select.to_le_bytes());
        // §4.1.4.3.1: of a queue that is not there the size reads as 0.
        put(at::QUEUE_MSIX_VECTOR, &at::NO_VECTOR.to_le_bytes());
        if let Some(queue) = queue {
            put(at::QUEUE_SIZE, &queue.size().to_le_bytes());
            put(at::QUEUE_MSIX_VECTOR, &queue.vector.to_le_bytes());
            put(at::QUEUE_ENABLE, &u16::from(queue.is_enabled()).to_le_bytes());
            put(at::QUEUE_NOTIFY_OFF, &self.queue_select.to_le_bytes());
            let [descriptors, driver, device] = queue.addresses();
            put(at::QUEUE_DESC, &descriptors.to_le_bytes());
            put(at::QUEUE_DRIVER, &driver.to_le_bytes());
            put(at::QUEUE_DEVICE, &device.to_le_bytes());
            put(at::QUEUE_NOTIFY_DATA, &self.queue_select.to_le_bytes());
        }
        image
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_is_of_the_fields_that_it_covers_whole() {
        assert_eq!(fields(at::DEVICE_STATUS as u64, &[4]), [(Field::Status, 4)]);
        assert_eq!(fields(at::QUEUE_SIZE as u64, &[4]), [], "half a field");
        assert_eq!(fields(at::QUEUE_SIZE as u64 + 1, &[4, 5]), [], "not where one begins");
        let address = |area, half| Field::Queue(QueueField::Address { area, half });
        assert_eq!(
            fields(at::QUEUE_DESC as u64, &0x1_0000_0002_u64.to_le_bytes()),
            [(address(0, Half::Low), 2), (address(0, Half::High), 1)]
        );
        assert_eq!(fields(0, &[0; LEN]).len(), FIELDS.len());
        assert_eq!(fields(u64::MAX - 3, &[0; 64]), []);
    }

    #[test]
    fn features_are_taken_by_halves() {
        let mut common = Common::new();
        for (select, value) in [(0, 1), (1, 2), (2, 3), (u32::MAX, 4)] {
            common.take(select, value);
        }
        assert_eq!(common.driver_features, 2 << 32 | 1);
    }
}
