//! What a guest printed, read from its console.

use std::fmt;
use std::ops::RangeInclusive;

/// Begins each line of the init script that is meant for us.
const MARK: &str = "RINGFENCE ";

/// The feature bits of a virtio device as the guest's driver holds them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Features(Vec<bool>);

impl Features {
    /// Whether bit `bit` was acknowledged.
    pub fn has(&self, bit: u32) -> bool {
        self.0.get(bit as usize).copied().unwrap_or(false)
    }

    /// Reads sysfs' form: one character a bit, bit 0 first; 64 or 128 of them.
    fn parse(text: &str) -> Option<Self> {
        let bits: Option<Vec<bool>> = text
            .chars()
            .map(|digit| match digit {
                '0' => Some(false),
                '1' => Some(true),
                _ => None,
            })
            .collect();
        bits.filter(|bits| matches!(bits.len(), 64 | 128)).map(Self)
    }
}

impl fmt::Display for Features {
    /// The numbers of the bits that are set.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let set = self.0.iter().enumerate().filter(|(_, set)| **set);
        f.write_str(&set.map(|(bit, _)| bit.to_string()).collect::<Vec<_>>().join(" "))
    }
}

/// How far the guest got with its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskState {
    /// It answered a read.
    Ready,
    /// The driver found no disk.
    Absent,
    /// The disk is there and answers no read.
    Stuck,
    /// The driver will have nothing to do with it.
    Refused,
}

/// What the guest said of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Guest {
    /// `uname -r`.
    pub kernel: Option<String>,
    /// The features that the disk's driver acknowledged.
    pub features: Option<Features>,
    /// The virtio device status, as in `0x0000000f`.
    pub status: Option<String>,
    /// The type of the disk's IOMMU group, as in `DMA-FQ`; none without a group.
    pub group: Option<String>,
    /// Its memory by its own addresses, as in `/proc/iomem`.
    pub ram: Vec<RangeInclusive<u64>>,
    /// How far it got with the disk.
    pub disk: Option<DiskState>,
    /// SHA-256 of the whole disk before the guest wrote.
    pub read: Option<String>,
    /// SHA-256 of the whole disk as read back after it wrote.
    pub written: Option<String>,
    /// What failed.
    pub errors: Vec<String>,
    /// How the script ended: `done`, `failed` or `refused`.
    pub end: Option<String>,
}

impl Guest {
    /// Reads the marked lines of a console; a damaged line counts as missing.
    pub fn parse(console: &str) -> Self {
        let mut guest = Self::default();
        for line in console.lines() {
            // The kernel may have printed to the same line before us.
            let Some((_, fact)) = line.split_once(MARK) else { continue };
            let Some((key, value)) = fact.trim().split_once('=') else { continue };
            guest.learn(key, value);
        }
        guest
    }

    fn learn(&mut self, key: &str, value: &str) {
        let text = || Some(value.to_owned()).filter(|value| !value.is_empty());
        match key {
            "kernel" => self.kernel = text(),
            "features" => self.features = Features::parse(value),
            "status" => self.status = text(),
            "group" => self.group = text(),
            "ram" => self.ram.extend(range(value)),
            "disk" => self.disk = disk_state(value),
            "read" => self.read = sha256(value),
            "written" => self.written = sha256(value),
            "error" => self.errors.extend(text()),
            "end" => self.end = text(),
            _ => {}
        }
    }
}

/// `start-end` in hexadecimal, the end included.
fn range(value: &str) -> Option<RangeInclusive<u64>> {
    let (start, end) = value.split_once('-')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    Some(number(start)?..=number(end)?)
}

fn disk_state(value: &str) -> Option<DiskState> {
    match value {
        "ready" => Some(DiskState::Ready),
        "absent" => Some(DiskState::Absent),
        "stuck" => Some(DiskState::Stuck),
        "refused" => Some(DiskState::Refused),
        _ => None,
    }
}

fn sha256(value: &str) -> Option<String> {
    let digits = value.len() == 64 && value.bytes().all(|byte| byte.is_ascii_hexdigit());
    digits.then(|| value.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_bits_from_the_left() {
        let features = Features::parse(&format!("{:0<64}", "010000000100")).unwrap();
        assert!(features.has(1) && features.has(9));
        assert!(!features.has(0) && !features.has(63) && !features.has(4000));
        assert_eq!(features.to_string(), "1 9");
        let newer = Features::parse(&format!("{:0>128}", "1")).unwrap();
        assert!(newer.has(127));
        assert_eq!(Features::parse("0101"), None, "cut short");
        assert_eq!(Features::parse(&"x".repeat(64)), None);
    }

    #[test]
    fn a_console_is_read_among_the_kernels_lines() {
        let digest = "ab".repeat(32);
        let console = format!(
            "SeaBIOS\r\n[ 1.0] oops RINGFENCE kernel=6.1.0\r\nRINGFENCE disk=ready\r\n\
             RINGFENCE ram=00001000-0009fbff\r\nRINGFENCE ram=?\r\nRINGFENCE group=DMA-FQ\r\nRINGFENCE read={digest}\r\nRINGFENCE written=cut\r\n\
             RINGFENCE error=a\r\nRINGFENCE unknown=1\r\nRINGFENCE end=done\r\n"
        );
        let expected = Guest {
            kernel: Some("6.1.0".into()),
            group: Some("DMA-FQ".into()),
            ram: vec![0x1000..=0x9_fbff],
            disk: Some(DiskState::Ready),
            read: Some(digest),
            errors: vec!["a".into()],
            end: Some("done".into()),
            ..Guest::default()
        };
        assert_eq!(Guest::parse(&console), expected);
        assert_eq!(Guest::parse(""), Guest::default());
    }
}
