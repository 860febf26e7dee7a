//! The keys of a table in order, for removals that are wider than what they hold.

use std::ops::RangeInclusive;

/// Keys, put in order when somebody asks for a range of them: most come and go without that.
#[derive(Default)]
pub(crate) struct Index {
    /// Each in order, and at least twice as long as the next when that was added.
    runs: Vec<Vec<u64>>,
    /// In no order yet.
    latest: Vec<u64>,
}

impl Index {
    pub(crate) fn add(&mut self, key: u64) {
        self.latest.push(key);
    }

    /// Takes the keys of a range out.
    pub(crate) fn take(&mut self, keys: &RangeInclusive<u64>) -> Vec<u64> {
        self.sort();
        let mut taken = Vec::new();
        for run in &mut self.runs {
            let from = run.partition_point(|key| key < keys.start());
            let to = run.partition_point(|key| key <= keys.end());
            taken.extend(run.drain(from..to));
        }
        self.runs.retain(|run| !run.is_empty());
        taken
    }

    /// Each key is moved as often as its run doubles.
    fn sort(&mut self) {
        if self.latest.is_empty() {
            return;
        }
        let mut run = std::mem::take(&mut self.latest);
        run.sort_unstable();
        while let Some(mut longer) = self.runs.pop_if(|last| last.len() < 2 * run.len()) {
            longer.append(&mut run);
            // The stable sort finds the two halves in order, and merges them in one go.
            longer.sort();
            run = longer;
        }
        self.runs.push(run);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn takes_what_a_set_would() {
        let mut state = 1_u64;
        let mut random = |below: u64| {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            (state >> 33) % below
        };
        let (mut index, mut set) = (Index::default(), BTreeSet::new());
        for round in 0..5000 {
            for _ in 0..random(20) {
                let key = random(10_000);
                if set.insert(key) {
                    index.add(key);
                }
            }
            if round % 3 == 0 {
                let first = random(10_000);
                let keys = first..=first + random(2000);
                let mut taken = index.take(&keys);
                taken.sort_unstable();
                assert_eq!(taken, set.extract_if(keys, |_| true).collect::<Vec<_>>());
            }
            assert!(index.runs.len() < 16, "{} runs", index.runs.len());
        }
        assert!(set.len() > 100);
    }
}
