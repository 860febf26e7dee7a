//! Front-ends that take away what they gave, and others that never do, against each way to keep translations. In a
//! process of its own: it reads all that its process logs.

mod served;

use ringfence_iommu::Strict;
use ringfence_policy::IommuMode;
use ringfence_vhost_user::server::Keep;
use served::{BUFFERS, Driver, Frontend, PAGE, RINGS, Served};
use std::io::Write;
use std::sync::{Arc, Mutex};

/// Each front-end with each way to keep its translations: whether pages come back wrong, and what the log says of it,
/// once. QEMU's amd-iommu is a front-end that never invalidates.
#[test]
fn who_comes_to_harm_and_who_is_warned() {
    let log = Log::start();
    let says_nothing: &[&str] = &[];
    let warns: &[&str] = &["WARN", "never took the old one away", "as with --iotlb request"];
    let accuses: &[&str] = &["ERROR", "never took the old one away", "use --iotlb auto or --iotlb request"];
    for (front_end, connect, keep, harm, says) in [
        ("invalidates", Frontend::connect as fn(&Served) -> Frontend, Keep::Cache, false, says_nothing),
        ("invalidates", Frontend::connect, Keep::Request, false, says_nothing),
        ("invalidates", Frontend::connect, Keep::Auto, false, says_nothing),
        ("never invalidates", Frontend::connect_silently, Keep::Cache, true, accuses),
        ("never invalidates", Frontend::connect_silently, Keep::Request, false, warns),
        ("never invalidates", Frontend::connect_silently, Keep::Auto, false, warns),
    ] {
        log.clear();
        let wrong = wrong_pages(keep, connect);
        assert_eq!(wrong > 0, harm, "a front-end that {front_end}, --iotlb {keep}: {wrong} pages came back wrong");
        let lines = log.lines("bus address");
        assert_eq!(lines.len(), usize::from(!says.is_empty()), "{front_end}, {keep}: {lines:?}");
        for word in says {
            assert!(lines[0].contains(word), "{front_end}, {keep}: '{word}' is not in {lines:?}");
        }
    }
}

/// Writes and reads through addresses that mean another page each time, and counts the pages that come back wrong. Three
/// requests a round, so that an address that comes round again is for reading once and for writing once.
fn wrong_pages(keep: Keep, connect: fn(&Served) -> Frontend) -> usize {
    let served = Served::start_keeping(IommuMode::Offer, keep);
    let frontend = connect(&served);
    let strict = Strict::new(Arc::clone(&frontend.domain), frontend.buffer(RINGS));
    let mut disk = frontend.start(Driver::New, &strict).unwrap();
    let pages: Vec<_> = (0..16).map(|at| frontend.buffer((BUFFERS.0 + at * PAGE, PAGE))).collect();
    let mut wrong = 0;
    for round in 0..800_u64 {
        // One buffer alone for a while, mapped anew each time at the same address: that proves nothing yet.
        let (out, back) = match round {
            0..300 => (pages[0], pages[0]),
            _ => (pages[round as usize % 16], pages[(round as usize * 7 + 5) % 16]),
        };
        out.memory().fill(round as u8 | 1);
        disk.write(round % 64 * 8, &[out]).unwrap();
        for _ in 0..2 {
            back.memory().fill(0);
            disk.read(round % 64 * 8, &[back]).unwrap();
            wrong += usize::from(served::bytes(back) != [round as u8 | 1; PAGE]);
        }
    }
    wrong
}

/// What the servers of this process log.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn start() -> Self {
        let log = Self::default();
        let writer = log.clone();
        tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).init();
        log
    }

    fn clear(&self) {
        self.0.lock().unwrap().clear();
    }

    /// Those that contain `word`.
    fn lines(&self, word: &str) -> Vec<String> {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        text.lines().filter(|line| line.contains(word)).map(str::to_owned).collect()
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
