use super::world::Mapping;
use anyhow::ensure;
use ringfence_dma::BusAddr;
use ringfence_policy::Addressing;
use ringfence_vhost_user::client::Counters;

pub(super) const HEADER: &str = "\
mapping            negotiated  a buffer's address   misses  updates  invalidations  verified";

/// What came of driving the disk in one mapping mode.
pub(super) struct Row {
    pub(super) addressing: Addressing,
    /// Where the device saw the first buffer, and where it is in the driver's memory.
    pub(super) bus: BusAddr,
    pub(super) physical: u64,
    pub(super) counters: Counters,
    /// Bytes that were compared, in the image and in memory.
    pub(super) verified: u64,
}

impl Row {
    pub(super) fn line(&self, mapping: Mapping) -> String {
        let addressing = match self.addressing {
            Addressing::Physical => "physical",
            Addressing::Translated => "translated",
        };
        let Counters { misses, updates, invalidations, .. } = self.counters;
        format!(
            "{:<18} {addressing:<11} {:<18} {misses:>8} {updates:>8} {invalidations:>14} {:>6} MiB",
            mapping.name(),
            self.bus.to_string(),
            self.verified >> 20,
        )
    }
}

/// What must be so in each mode, besides the bytes.
pub(super) fn expect(rows: &[(Mapping, Row)]) -> anyhow::Result<()> {
    for (mapping, row) in rows {
        let name = mapping.name();
        let Counters { misses, updates, invalidations, denied, .. } = row.counters;
        ensure!(denied == 0, "{name}: {denied} translations that the driver had made were denied");
        if *mapping == Mapping::None {
            ensure!(
                row.addressing == Addressing::Physical,
                "{name}: translated, though the driver did not take the flag"
            );
            ensure!(row.bus.0 == row.physical, "{name}: the device saw {} instead of the physical address", row.bus);
            ensure!(misses + updates + invalidations == 0, "{name}: {misses} misses without translation");
            continue;
        }
        ensure!(row.addressing == Addressing::Translated, "{name}: the flag was not taken");
        ensure!(row.bus.0 != row.physical, "{name}: the bus address is the physical one, which proves nothing");
        ensure!(misses > 0 && updates > 0, "{name}: nothing was ever asked for");
        ensure!(*mapping != Mapping::Strict || invalidations > misses / 8, "{name}: mappings were not taken away");
    }
    Ok(())
}
