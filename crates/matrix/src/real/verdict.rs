//! What a real cell amounts to, and why one should believe it.

use ringfence_guests::{DiskState, End, ImageState, Iommu, Translation};
use serde_json::{Map, Value, json};

use super::seen::{Addresses, Counts, Seen};
use crate::Verdict;
use crate::world::Flag;

/// How many addresses a cell's evidence shows.
const ADDRESSES: usize = 6;

/// The verdict, and in a line what was seen.
pub(crate) fn of(seen: &Seen) -> (Verdict, String) {
    if let Some(words) = refused_to_start(seen) {
        return (Verdict::RefusedByDevice, format!("QEMU: {words}"));
    }
    if let Some(wrong) = wrong(seen) {
        return (Verdict::Corrupts, wrong);
    }
    if seen.guest().written.is_some() && seen.guest().errors.is_empty() {
        return success(seen);
    }
    if let Some(refusal) = seen.server.as_ref().and_then(|server| server.refusal.as_ref()) {
        return (Verdict::RefusedByDevice, shortened(refusal));
    }
    if let Some(line) = seen.outcome.console.lines().find(|line| line.contains("must provide VIRTIO_F_ACCESS_PLATFORM"))
    {
        return (Verdict::RefusedByDriver, line.trim().to_owned());
    }
    if let (Some(DiskState::Refused), Some(reason)) = (seen.guest().disk, seen.guest().errors.first()) {
        return (Verdict::RefusedByDriver, reason.clone());
    }
    if let Some(status) = turned_down(seen) {
        return (Verdict::RefusedByDevice, status);
    }
    failure(seen)
}

/// QEMU's words, if it did not start because of what it was told of the flag.
fn refused_to_start(seen: &Seen) -> Option<String> {
    let refused = matches!(&seen.outcome.end, End::Exited(status) if !status.success());
    let line = seen.qemu_lines().into_iter().find(|line| {
        let line = line.to_lowercase();
        line.contains("iommu_platform") || line.contains("iommu platform")
    })?;
    let words = line.rsplit(": ").next().unwrap_or(line);
    (refused && seen.outcome.console.trim().is_empty()).then(|| words.to_owned())
}

/// The wrong bytes, if any were seen.
fn wrong(seen: &Seen) -> Option<String> {
    let guest = seen.guest();
    if let ImageState::Wrong { at } = seen.image {
        return Some(format!("the image on the host is wrong from byte {at:#x} on"));
    }
    let differ = |found: &Option<String>, wanted: &str| found.as_deref().is_some_and(|found| found != wanted);
    if differ(&guest.read, &seen.initial) {
        return Some("the guest read other bytes than the image held".into());
    }
    if differ(&guest.written, &seen.expected) {
        return Some("the guest read back other bytes than it wrote".into());
    }
    if guest.written.is_some() && guest.errors.is_empty() && seen.image != ImageState::Written {
        return Some("the image on the host does not hold what the guest wrote".into());
    }
    let damaged = seen.damage_lines().first().map(|line| format!("the guest's memory is damaged: {line}"));
    let line = damaged.or_else(|| strayed(seen))?;
    Some(line + &unheard(seen).map(|words| format!("; {words}")).unwrap_or_default())
}

/// That our server took other memory for the driver's ring. These drivers break no ring; what lies where a ring was that was
/// taken away, and the server was told of nothing, is somebody else's.
fn strayed(seen: &Seen) -> Option<String> {
    let server = seen.server.as_ref()?;
    let deaf = seen.iommu().amd_invalidations > 0 && server.counts?.invalidations == 0;
    let line = server.complaints.iter().find(|line| line.contains("the driver broke the ring"))?;
    deaf.then(|| format!("the device took other memory for the driver's ring: {}", line.trim()))
}

/// That the guest took pages away, and our server was told of none.
fn unheard(seen: &Seen) -> Option<String> {
    let (taken, told) = (seen.iommu().amd_invalidations, seen.server.as_ref()?.counts?.invalidations);
    (taken > 0).then(|| format!("the guest took pages away {taken} times, and the server was told so {told} times"))
}

fn success(seen: &Seen) -> (Verdict, String) {
    let ring = match seen.ring() {
        Some(ring) => format!("ring at {:#x}", ring.descriptors),
        None => "ring at an address that QEMU does not tell".into(),
    };
    let pages = seen.pages().count();
    match (seen.addresses(), seen.platform.iommu) {
        (Addresses::Translated, _) => {
            (Verdict::WorksTranslated, format!("{ring}; the IOMMU mapped {pages} pages, each by itself"))
        }
        (Addresses::Shifted, _) if pages == 0 => {
            (Verdict::WorksUnconfined, format!("{ring}, which is no address of the guest's own; nothing confines it"))
        }
        (Addresses::Shifted, _) => {
            (Verdict::WorksUnconfined, format!("{ring}; the IOMMU mapped {pages} pages, all by the same offset"))
        }
        (Addresses::Own | Addresses::Unknown, Iommu::Present) => {
            (Verdict::Bypasses, format!("{ring}, the guest's own address; the IOMMU mapped no page"))
        }
        (Addresses::Own | Addresses::Unknown, Iommu::Absent) => {
            (Verdict::WorksUntranslated, format!("{ring}, the guest's own address"))
        }
    }
}

/// The device status of a driver whose choice of features was not accepted, whether it has looked or not.
fn turned_down(seen: &Seen) -> Option<String> {
    let status = seen.guest().status.as_deref()?;
    let bits = u32::from_str_radix(status.strip_prefix("0x")?, 16).ok()?;
    const DRIVER: u32 = 2;
    const FEATURES_OK: u32 = 8;
    let turned_down = bits & DRIVER != 0 && bits & FEATURES_OK == 0 && seen.flag() == Flag::NotTaken;
    turned_down.then(|| format!("status {bits:#04x}: the features without the flag are not accepted"))
}

fn failure(seen: &Seen) -> (Verdict, String) {
    let counted = seen.server.as_ref().and_then(|server| server.counts).is_some_and(|counts| counts.faults > 0);
    if let Some(fault) = seen.iommu().faults.first().map(String::as_str).or(seen.fault_lines().first().copied()) {
        return (Verdict::FailsCleanly, fault.to_owned());
    }
    if counted {
        return (Verdict::FailsCleanly, "the server counted faults".into());
    }
    let what = match (&seen.outcome.end, seen.guest().disk, seen.qemu_lines().first()) {
        (_, _, Some(line)) => (*line).to_owned(),
        (End::Panicked, ..) => {
            let panic = seen.outcome.console.lines().find(|line| line.contains("Kernel panic - not syncing"));
            panic.unwrap_or_default().trim().to_owned()
        }
        (End::TimedOut(after), ..) => format!("the guest says nothing more; ended after {} s", after.as_secs()),
        (_, Some(disk), _) => format!("the disk is {disk:?}").to_lowercase(),
        (..) => "the guest does not get to its disk".into(),
    };
    (Verdict::FailsSilently, what)
}

/// As QEMU calls the file that is the guest's memory.
const GUEST_MEMORY: &str = "memfd:memory-backend-memfd";

/// What has to hold in every cell, and does not.
pub(crate) fn flaws(seen: &Seen, verdict: Verdict) -> Vec<String> {
    let mut flaws = Vec::new();
    let translated = matches!(verdict, Verdict::WorksTranslated | Verdict::WorksUnconfined);
    let works = translated || matches!(verdict, Verdict::WorksUntranslated | Verdict::Bypasses);
    if works && seen.addresses() == Addresses::Unknown {
        flaws.push("no address of the device was seen".to_owned());
    }
    if works && seen.outcome.guest().is_err() {
        flaws.push("the guest did not come to its end".to_owned());
    }
    if !works && verdict != Verdict::Corrupts && seen.image == ImageState::Written {
        flaws.push("the image is written, though the disk did not work".to_owned());
    }
    // Firmware is refused too, and may never hand over.
    if verdict == Verdict::RefusedByDevice && refused_to_start(seen).is_none() && seen.guest().status.is_none() {
        flaws.push("the guest's own driver did not come to be refused".to_owned());
    }
    let unwrapped = seen.server.is_none();
    match seen.back_end_memory.as_ref().map(|shared| shared.iter().any(|name| name.contains(GUEST_MEMORY))) {
        Some(true) if !unwrapped => flaws.push("the wrapped back-end has the guest's memory mapped".to_owned()),
        // So that the line above means something.
        Some(false) if unwrapped => flaws.push("a back-end serves without the guest's memory".to_owned()),
        _ => {}
    }
    let Some(server) = &seen.server else { return flaws };
    if let Err(end) = &server.end {
        flaws.push(format!("the server answered SIGTERM with {end}"));
    }
    if server.refusal.is_some() && !server.serves_on {
        flaws.push("the server serves nobody after a refusal".to_owned());
    }
    let misses = server.counts.map(|counts| counts.misses);
    match misses {
        None if works => flaws.push("the server's log has no counts".to_owned()),
        // Xen's machine addresses are no business of a device without an IOMMU.
        // Nor does a function ask, which is granted what it may reach.
        Some(0) if translated && server.ring.is_none() && seen.pages().next().is_some() => {
            flaws.push("the server asked for no translation".to_owned());
        }
        Some(misses @ 1..) if works && !translated => {
            flaws.push(format!("the server asked for {misses} translations, and the addresses are the guest's own"));
        }
        _ => {}
    }
    flaws
}

/// What the verdict follows from.
pub(crate) fn evidence(seen: &Seen) -> Map<String, Value> {
    let guest = seen.guest();
    let text = |lines: Vec<&str>| lines.into_iter().map(str::to_owned).collect::<Vec<_>>();
    let hex = |address: u64| format!("{address:#x}");
    let mut evidence = Map::new();
    let mut put = |name: &str, value: Value| {
        if !value.is_null() {
            evidence.insert(name.to_owned(), value);
        }
    };
    put("flag", json!(seen.flag().slug()));
    if let Some(virtio) = &seen.outcome.virtio {
        put("offered", json!(virtio.offered));
        put("taken", json!(virtio.taken));
    }
    put("driver", json!(driver_words(seen)));
    put("device", json!(device_words(seen)));
    put("kernel", json!(guest.kernel));
    put("iommu_group", json!(guest.group));
    put("status", json!(guest.status));
    if let Some(ring) = seen.ring() {
        put(
            "ring",
            json!([{
                "descriptors": hex(ring.descriptors),
                "available": hex(ring.available),
                "used": hex(ring.used),
                "guests_own": seen.is_own(ring.descriptors).to_string(),
            }]),
        );
    }
    put(
        "guest_memory",
        json!(guest.ram.iter().map(|range| format!("{:#x} to {:#x}", range.start(), range.end())).collect::<Vec<_>>()),
    );
    let shown = seen.pages().take(ADDRESSES);
    let address = |page: Translation| json!({ "bus": hex(page.bus), "machine": hex(page.machine) });
    put("addresses", json!(shown.map(address).collect::<Vec<_>>()));
    if seen.platform.iommu == Iommu::Present {
        let reached = format!("{} pages of memory in {} accesses", seen.pages().count(), seen.iommu().accesses);
        put("iommu", json!([Some(reached), unheard(seen)].into_iter().flatten().collect::<Vec<_>>()));
        let faults = seen.iommu().faults.iter().map(String::as_str).chain(seen.fault_lines());
        put("faults", json!(text(faults.collect())));
    }
    if let Some(counts) = seen.server.as_ref().and_then(|server| server.counts) {
        let Counts { misses, updates, invalidations, faults } = counts;
        put(
            "server",
            json!(format!("misses={misses} updates={updates} invalidations={invalidations} faults={faults}")),
        );
    }
    put("back_end_memory", json!(seen.back_end_memory));
    put("damage", json!(text(seen.damage_lines())));
    put("disk", json!(disk_words(seen.image)));
    if seen.guest().written.is_none() {
        let end: Vec<&str> = seen.outcome.console.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        put("guest_log", json!(text(end[end.len().saturating_sub(12)..].to_vec())));
    }
    put("command", json!(seen.outcome.command));
    put("seconds", json!(format!("{:.1}", seen.elapsed().as_secs_f64())));
    evidence
}

fn driver_words(seen: &Seen) -> String {
    let guest = seen.guest();
    let mut words = match (&guest.written, guest.disk) {
        (Some(_), _) if guest.errors.is_empty() => "read, wrote, and read the same back".to_owned(),
        (_, Some(disk)) => format!("the disk is {disk:?}").to_lowercase(),
        (_, None) => "did not come to its disk".to_owned(),
    };
    if let Some(wrong) = wrong(seen) {
        words = wrong;
    }
    for error in &guest.errors {
        words.push_str("; ");
        words.push_str(error);
    }
    words
}

fn device_words(seen: &Seen) -> Vec<String> {
    let mut words: Vec<String> = seen.qemu_lines().into_iter().take(8).map(str::to_owned).collect();
    words.extend(seen.server.iter().flat_map(|server| server.complaints.iter().cloned()));
    words
}

fn disk_words(image: ImageState) -> String {
    match image {
        ImageState::Untouched => "untouched".into(),
        ImageState::Partly => "partly written".into(),
        ImageState::Written => "written".into(),
        ImageState::Wrong { at } => format!("wrong from byte {at:#x} on"),
    }
}

/// The first sentence of our server's long one.
fn shortened(refusal: &str) -> String {
    refusal.split(". ").next().unwrap_or(refusal).to_owned()
}

#[cfg(test)]
mod tests {
    use ringfence_guests::{Outcome, Platform, Ring, Virtio};

    use super::super::seen::Server;
    use super::*;

    const READ: &str = "1111111111111111111111111111111111111111111111111111111111111111";
    const WRITTEN: &str = "2222222222222222222222222222222222222222222222222222222222222222";

    /// A guest with 256 MiB behind intel-iommu that works.
    fn console() -> String {
        format!(
            "RINGFENCE ram=00100000-0fffffff\nRINGFENCE status=0x0000000f\nRINGFENCE disk=ready\n\
             RINGFENCE read={READ}\nRINGFENCE written={WRITTEN}\nRINGFENCE end=done\n"
        )
    }

    fn on(platform: &str, console: &str) -> Seen {
        let platform = Platform::named(platform).unwrap();
        let mut outcome = Outcome::told(platform, console, "", End::Exited(Default::default()));
        let ring = Ring { descriptors: 0xffff_f000, available: 0xffff_f800, used: 0xffff_f900 };
        let offered = vec!["VIRTIO_F_IOMMU_PLATFORM".to_owned()];
        outcome.virtio = Some(Virtio { taken: offered.clone(), offered, status: Vec::new(), ring: Some(ring) });
        outcome.iommu.pages = vec![
            Translation { bus: 0xffff_f000, machine: 0x100_0000 },
            Translation { bus: 0xffff_e000, machine: 0x300_0000 },
            // An interrupt, which is no memory.
            Translation { bus: 0x1000, machine: 0xfee0_0000 },
        ];
        let (initial, expected) = (READ.to_owned(), WRITTEN.to_owned());
        let image = ImageState::Written;
        Seen { platform, outcome, image, initial, expected, server: None, back_end_memory: None }
    }

    fn good() -> Seen {
        on("x86-intel-lazy", &console())
    }

    fn ring_at(seen: &mut Seen, descriptors: u64) {
        seen.outcome.virtio.as_mut().unwrap().ring.as_mut().unwrap().descriptors = descriptors;
    }

    #[track_caller]
    fn check(expected: Verdict, mut seen: Seen, change: impl FnOnce(&mut Seen)) {
        change(&mut seen);
        let (verdict, why) = of(&seen);
        assert_eq!(verdict, expected, "{why}");
        assert!(!why.is_empty());
    }

    #[test]
    fn who_works_is_judged_by_addresses() {
        check(Verdict::WorksTranslated, good(), |_| ());
        // One offset for all is a window over memory: Xen's identity, PPC's 2^59.
        let all_by = |offset: u64| {
            move |seen: &mut Seen| {
                let page = |machine: u64| Translation { bus: machine.wrapping_add(offset), machine };
                seen.outcome.iommu.pages = vec![page(0x100_0000), page(0x300_0000)];
                ring_at(seen, 0x100_0000_u64.wrapping_add(offset));
            }
        };
        check(Verdict::WorksUnconfined, good(), all_by(1 << 59));
        check(Verdict::Bypasses, good(), all_by(0));
        // The IOMMU did nothing for memory: interrupts alone are no translation.
        let interrupts = |seen: &mut Seen| {
            seen.outcome.iommu.pages.drain(..2);
            ring_at(seen, 0x100_0000);
        };
        check(Verdict::Bypasses, good(), interrupts);
        check(Verdict::WorksUntranslated, on("x86-none", &console()), interrupts);
        // Outside what the guest calls its memory, and inside the machine's: Xen.
        check(Verdict::WorksUnconfined, on("xen-dom0", &console()), |seen| {
            seen.outcome.iommu.pages.clear();
            ring_at(seen, 0x1680_0000);
        });
    }

    #[test]
    fn wrong_bytes_come_before_all_else() {
        check(Verdict::Corrupts, good(), |seen| seen.image = ImageState::Wrong { at: 512 });
        check(Verdict::Corrupts, good(), |seen| seen.image = ImageState::Untouched);
        check(Verdict::Corrupts, good(), |seen| seen.image = ImageState::Partly);
        check(Verdict::Corrupts, good(), |seen| seen.initial = WRITTEN.to_owned());
        check(Verdict::Corrupts, good(), |seen| seen.expected = READ.to_owned());
        for line in
            ["[ 1.0] dd: Corrupted page table at address 47b6fd", "mm/pgtable-generic.c:51: bad pmd (____)(ff73)"]
        {
            let seen = on("x86-amd", &format!("{line}\nKernel panic - not syncing: Fatal exception"));
            check(Verdict::Corrupts, seen, |seen| seen.image = ImageState::Untouched);
        }
        for (taken, told, verdict) in
            [(300, 0, Verdict::Corrupts), (300, 300, Verdict::FailsSilently), (0, 0, Verdict::FailsSilently)]
        {
            check(verdict, on("x86-amd", "RINGFENCE disk=stuck"), |seen| {
                seen.image = ImageState::Untouched;
                seen.outcome.iommu.amd_invalidations = taken;
                let counts = Some(Counts { misses: 6, updates: 8, invalidations: told, faults: 0 });
                let complaints =
                    vec!["ERROR queue stopped: the driver broke the ring: a chain has no bytes".to_owned()];
                let (flag, refusal, ring) = (Some(true), None, None);
                seen.server = Some(Server { flag, refusal, counts, ring, complaints, serves_on: false, end: Ok(()) });
            });
        }
    }

    #[test]
    fn who_refuses_is_quoted() {
        let stuck = "RINGFENCE status=0x0000000f\nRINGFENCE disk=stuck\nRINGFENCE end=refused";
        let untouched = |seen: &mut Seen| seen.image = ImageState::Untouched;
        check(Verdict::RefusedByDevice, on("x86-none", stuck), |seen| {
            untouched(seen);
            seen.server = Some(Server {
                flag: None,
                refusal: Some("the IOMMU is required. More words".to_owned()),
                counts: None,
                ring: None,
                complaints: Vec::new(),
                serves_on: true,
                end: Ok(()),
            });
            assert_eq!(of(seen).1, "the IOMMU is required");
        });
        // QEMU's way: FEATURES_OK stays clear.
        let turned_down = "RINGFENCE status=0x00000083\nRINGFENCE disk=absent";
        check(Verdict::RefusedByDevice, on("x86-none", turned_down), |seen| {
            untouched(seen);
            seen.outcome.virtio.as_mut().unwrap().taken.clear();
        });
        check(Verdict::FailsSilently, on("x86-none", turned_down), untouched);
        let ours = "RINGFENCE disk=refused\nRINGFENCE error=it does not offer the flag\nRINGFENCE end=refused";
        check(Verdict::RefusedByDriver, on("x86-none", ours), untouched);
        // It has to say why.
        check(Verdict::FailsSilently, on("x86-none", "RINGFENCE disk=refused"), untouched);
        let driver = "virtio_net virtio1: device must provide VIRTIO_F_ACCESS_PLATFORM\nRINGFENCE disk=absent";
        check(Verdict::RefusedByDriver, on("x86-none", driver), untouched);
    }

    #[test]
    fn a_failure_is_clean_if_somebody_recorded_it() {
        let stuck = "RINGFENCE status=0x0000000f\nRINGFENCE disk=stuck";
        check(Verdict::FailsSilently, on("x86-amd", stuck), |seen| seen.image = ImageState::Untouched);
        check(Verdict::FailsCleanly, on("x86-amd", stuck), |seen| {
            seen.image = ImageState::Untouched;
            seen.outcome.iommu.faults.push("amdvi_page_fault".to_owned());
        });
        let fault = format!("DMAR: [DMA Read NO_PASID] Request device [00:05.0] fault addr 0xffff2000\n{stuck}");
        check(Verdict::FailsCleanly, on("x86-intel-lazy", &fault), |seen| seen.image = ImageState::Untouched);
    }

    #[test]
    fn what_does_not_fit_together_is_told() {
        let told = |change: &dyn Fn(&mut Seen)| {
            let mut seen = good();
            let counts = Some(Counts { misses: 3, updates: 3, invalidations: 1, faults: 0 });
            let complaints = Vec::new();
            let (refusal, ring) = (None, None);
            seen.server = Some(Server { flag: None, refusal, counts, ring, complaints, serves_on: false, end: Ok(()) });
            change(&mut seen);
            flaws(&seen, of(&seen).0)
        };
        assert_eq!(told(&|_| ()), [""; 0]);
        assert_eq!(told(&|seen| seen.server.as_mut().unwrap().end = Err("signal 9".to_owned())).len(), 1);
        assert_eq!(told(&|seen| seen.server.as_mut().unwrap().counts = None).len(), 1);
        assert_eq!(told(&|seen| seen.server.as_mut().unwrap().counts = Some(Counts::default())).len(), 1);
        // It translates, says the server; none of that, say the addresses.
        let contradiction = told(&|seen| {
            seen.outcome.iommu.pages.clear();
            ring_at(seen, 0x100_0000);
        });
        assert!(contradiction[0].contains("asked for 3 translations"), "{contradiction:?}");
        let mapped = |name: &str| Some(vec![name.to_owned()]);
        assert_eq!(told(&|seen| seen.back_end_memory = mapped("/memfd:ringfence (deleted)")), [""; 0]);
        let guests = "/memfd:memory-backend-memfd (deleted)";
        assert!(told(&|seen| seen.back_end_memory = mapped(guests))[0].contains("the guest's memory"));
        let deaf = told(&|seen| seen.server.as_mut().unwrap().refusal = Some("IOMMU".to_owned()));
        assert_eq!(deaf, ["the server serves nobody after a refusal"]);
        assert_eq!(told(&|seen| seen.outcome.virtio = None), [""; 0], "the IOMMU's pages are addresses too");
        let firmware_alone = told(&|seen| {
            *seen = Seen { server: seen.server.take(), image: ImageState::Untouched, ..on("x86-none", "") };
            let server = seen.server.as_mut().unwrap();
            (server.refusal, server.serves_on) = (Some("the IOMMU is required".to_owned()), true);
        });
        assert_eq!(firmware_alone, ["the guest's own driver did not come to be refused"]);
    }
}
