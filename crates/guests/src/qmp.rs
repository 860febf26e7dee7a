//! QEMU's monitor: what QEMU itself knows of the disk.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

/// QEMU answers at once, unless its main loop waits for a back-end.
const PATIENCE: Duration = Duration::from_secs(5);

/// The disk's `id` on QEMU's command line.
pub(crate) const DEVICE: &str = "disk";

/// The same in QEMU's tree of objects: on its bus, and as virtio.
const FRONTEND: &str = "/machine/peripheral/disk";
const BACKEND: &str = "/machine/peripheral/disk/virtio-backend";

/// What QEMU's front-end holds of the disk: asked of QEMU, not of the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Virtio {
    /// Features that the device offers its driver, by QEMU's names.
    pub offered: Vec<String>,
    /// Features that the driver took, by QEMU's names.
    pub taken: Vec<String>,
    /// The bits of the device status, by QEMU's names.
    pub status: Vec<String>,
    /// The first queue, once the driver has made one.
    pub ring: Option<Ring>,
}

/// Where a driver says that its queue is: addresses as it gave them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ring {
    /// The descriptor table.
    pub descriptors: u64,
    /// The driver's part.
    pub available: u64,
    /// The device's part.
    pub used: u64,
}

/// The first QEMU that dies of `x-query-virtio-status`, by an assertion of its own.
const DIES_OF_STATUS: u64 = 11;

/// A connection to a running QEMU.
#[derive(Debug)]
pub struct Monitor {
    stream: BufReader<UnixStream>,
    /// QEMU's major version.
    major: u64,
}

impl Monitor {
    /// Connects to the socket that QEMU was told of; `None` while there is none.
    pub fn connect(socket: &Path) -> Option<Self> {
        let stream = UnixStream::connect(socket).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).ok()?;
        let mut monitor = Self { stream: BufReader::new(stream), major: 0 };
        let greeting: Value = serde_json::from_str(&monitor.line()?).ok()?;
        monitor.major = greeting["QMP"]["version"]["qemu"]["major"].as_u64()?;
        monitor.ask("qmp_capabilities", &json!({}))?;
        Some(monitor)
    }

    /// What QEMU knows of the disk, as far as it tells.
    pub(crate) fn virtio(&mut self) -> Option<Virtio> {
        let ring = self.ring();
        if self.major < DIES_OF_STATUS
            && let Some(status) = self.ask("x-query-virtio-status", &json!({ "path": BACKEND }))
        {
            return Some(Virtio {
                offered: names(&status["host-features"], &["dev-features", "transports"]),
                taken: names(&status["guest-features"], &["dev-features", "transports"]),
                status: names(&status["status"], &["statuses"]),
                ring,
            });
        }
        let offers = self.property(BACKEND, "iommu_platform")?.as_bool()?;
        let offered = offers.then(|| "VIRTIO_F_IOMMU_PLATFORM".to_owned()).into_iter().collect();
        Some(Virtio { offered, ring, ..Virtio::default() })
    }

    fn ring(&mut self) -> Option<Ring> {
        let is_vhost = self.property(FRONTEND, "type")?.as_str()?.starts_with("vhost");
        // Of a vhost-user device the other question makes QEMU ask the back-end, by a message that stops the queue.
        let (question, fields) = match is_vhost {
            true => ("x-query-virtio-vhost-queue-status", ["desc-phys", "avail-phys", "used-phys"]),
            false => ("x-query-virtio-queue-status", ["vring-desc", "vring-avail", "vring-used"]),
        };
        ring(&self.ask(question, &json!({ "path": BACKEND, "queue": 0 }))?, fields)
    }

    fn property(&mut self, path: &str, property: &str) -> Option<Value> {
        self.ask("qom-get", &json!({ "path": path, "property": property }))
    }

    /// Ends QEMU; it answers before it goes.
    pub(crate) fn quit(&mut self) {
        // Whoever asks kills it if it does not go.
        let _ = self.ask("quit", &json!({}));
    }

    /// Has QEMU do something, and waits for its answer; `None` for an error as for a QEMU that has gone.
    pub fn ask(&mut self, command: &str, arguments: &Value) -> Option<Value> {
        let mut question = json!({ "execute": command, "arguments": arguments }).to_string();
        question.push('\n');
        self.stream.get_mut().write_all(question.as_bytes()).ok()?;
        loop {
            let mut answer: Value = serde_json::from_str(&self.line()?).ok()?;
            match answer.as_object_mut()? {
                answer if answer.contains_key("error") => return None,
                answer if answer.contains_key("return") => return answer.remove("return"),
                // An event.
                _ => {}
            }
        }
    }

    fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        (self.stream.read_line(&mut line).ok()? > 0).then_some(line)
    }
}

/// The names in some lists of an object, without QEMU's explanations after the colon.
fn names(object: &Value, lists: &[&str]) -> Vec<String> {
    let texts = lists.iter().filter_map(|list| object[*list].as_array()).flatten().filter_map(Value::as_str);
    texts.map(|text| text.split(':').next().unwrap_or(text).to_owned()).collect()
}

fn ring(queue: &Value, fields: [&str; 3]) -> Option<Ring> {
    let [descriptors, available, used] = fields.map(|field| queue[field].as_u64());
    let ring = Ring { descriptors: descriptors?, available: available?, used: used? };
    (ring.descriptors != 0).then_some(ring)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    /// A QEMU of version `major` that gives these answers, a line or more each.
    fn asked(major: u64, answers: &'static [&'static str]) -> Option<Virtio> {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("qmp");
        let listener = UnixListener::bind(&socket).unwrap();
        let qemu = thread::spawn(move || {
            let mut peer = BufReader::new(listener.accept().unwrap().0);
            writeln!(peer.get_mut(), r#"{{"QMP":{{"version":{{"qemu":{{"major":{major}}}}}}}}}"#).unwrap();
            let mut questions = Vec::new();
            for answer in [&[r#"{"return":{}}"#], answers].concat() {
                let mut question = String::new();
                peer.read_line(&mut question).unwrap();
                questions.push(question);
                writeln!(peer.get_mut(), "{answer}").unwrap();
            }
            questions
        });
        let virtio = Monitor::connect(&socket).unwrap().virtio();
        let questions = qemu.join().unwrap();
        let asked = |what: &str| questions.iter().any(|question| question.contains(what));
        assert_eq!(asked("x-query-virtio-status"), major < DIES_OF_STATUS);
        assert!(!asked("vhost") || !asked("x-query-virtio-queue-status"), "that would stop the queue");
        virtio
    }

    #[test]
    fn an_answer_is_found_among_events_and_read() {
        let answers = &[
            r#"{"return":"virtio-blk-pci"}"#,
            r#"{"return":{"vring-desc":4294959104,"vring-avail":2,"vring-used":3}}"#,
            "{\"event\":\"RESET\"}\n{\"return\":{\"host-features\":{\"dev-features\":[\"A: a\"],\"transports\":[\"B: b\",\"C\"]},\
             \"guest-features\":{\"transports\":[\"B: b\"]},\"status\":{\"statuses\":[\"OK: fine\"]}}}",
        ];
        let expected = Virtio {
            offered: vec!["A".into(), "B".into(), "C".into()],
            taken: vec!["B".into()],
            status: vec!["OK".into()],
            ring: Some(Ring { descriptors: 0xffff_e000, available: 2, used: 3 }),
        };
        assert_eq!(asked(10, answers), Some(expected));
    }

    #[test]
    fn a_qemu_that_would_die_is_asked_less() {
        let answers = &[
            r#"{"return":"vhost-user-blk-pci"}"#,
            r#"{"return":{"desc-phys":1,"avail-phys":2,"used-phys":3}}"#,
            r#"{"return":true}"#,
        ];
        let ring = Some(Ring { descriptors: 1, available: 2, used: 3 });
        let offered = vec!["VIRTIO_F_IOMMU_PLATFORM".to_owned()];
        assert_eq!(asked(11, answers), Some(Virtio { offered, ring, ..Virtio::default() }));
    }

    #[test]
    fn what_a_qemu_does_not_know_is_not_told() {
        const UNKNOWN: &str = r#"{"error":{"class":"CommandNotFound"}}"#;
        assert_eq!(asked(7, &[UNKNOWN, UNKNOWN, r#"{"return":false}"#]), Some(Virtio::default()));
        assert_eq!(asked(7, &[UNKNOWN, UNKNOWN, UNKNOWN]), None);
    }

    #[test]
    fn a_queue_without_addresses_is_no_ring() {
        let names = ["a", "b", "c"];
        assert_eq!(ring(&json!({ "a": 0, "b": 0, "c": 0 }), names), None);
        let expected = Ring { descriptors: 1, available: 2, used: 3 };
        assert_eq!(ring(&json!({ "a": 1, "b": 2, "c": 3 }), names), Some(expected));
    }
}
