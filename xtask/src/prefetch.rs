//! What guests are made of, fetched while the first steps compile: that waits for the network, and they for processors.

use std::thread;

use ringfence_guests::{Cache, Passt, QemuSource, Virtiofsd};
use ringfence_matrix::real::Session;

use crate::Workspace;
use crate::guests::GuestArgs;
use crate::report;
use crate::steps::say;

/// Begins. What can't be had the step that needs it finds out, and says; one that comes too early waits for the cache.
pub(crate) fn begin(workspace: &Workspace, guests: &GuestArgs) {
    // Whoever chose a QEMU has it, or knows what he fetches.
    let Some(cells) = guests.cells().ok().filter(|_| guests.takes_any_qemu()) else { return };
    let folder = workspace.target.join("guests");
    let workspace = workspace.clone();
    let progress = |line: &str| say(&format!("    meanwhile: {line}"));
    thread::spawn(move || {
        let _ = Session::prepare(&cells, &folder, QemuSource::Auto, &progress);
        if let Ok(cache) = Cache::open(&folder, &progress) {
            let _ = Virtiofsd::unpacked(&cache);
            let _ = Passt::unpacked(&cache);
        }
        let _ = report::program(&workspace);
    });
}
