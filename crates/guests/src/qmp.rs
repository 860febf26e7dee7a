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

/// A connection to a running QEMU.
pub(crate) struct Monitor {
    stream: BufReader<UnixStream>,
}

impl Monitor {
    /// Connects to the socket that QEMU was told of; `None` while there is none.
    pub(crate) fn connect(socket: &Path) -> Option<Self> {
        let stream = UnixStream::connect(socket).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).ok()?;
        let mut monitor = Self { stream: BufReader::new(stream) };
        monitor.line()?;
        monitor.ask("qmp_capabilities", &json!({}))?;
        Some(monitor)
    }

    /// What QEMU knows of the disk; `None` where it does not tell, as before 7.2.
    pub(crate) fn virtio(&mut self) -> Option<Virtio> {
        let path = format!("/machine/peripheral/{DEVICE}/virtio-backend");
        let status = self.ask("x-query-virtio-status", &json!({ "path": path }))?;
        // Of a vhost-user device QEMU would ask the back-end for the queue's state, by a message that stops the queue.
        let (question, fields) = match status.get("vhost-dev") {
            Some(_) => ("x-query-virtio-vhost-queue-status", ["desc-phys", "avail-phys", "used-phys"]),
            None => ("x-query-virtio-queue-status", ["vring-desc", "vring-avail", "vring-used"]),
        };
        let queue = self.ask(question, &json!({ "path": path, "queue": 0 }));
        Some(Virtio {
            offered: names(&status["host-features"], &["dev-features", "transports"]),
            taken: names(&status["guest-features"], &["dev-features", "transports"]),
            status: names(&status["status"], &["statuses"]),
            ring: queue.and_then(|queue| ring(&queue, fields)),
        })
    }

    /// Ends QEMU; it answers before it goes.
    pub(crate) fn quit(&mut self) {
        // Whoever asks kills it if it does not go.
        let _ = self.ask("quit", &json!({}));
    }

    /// The answer; `None` for an error as for a QEMU that has gone.
    fn ask(&mut self, command: &str, arguments: &Value) -> Option<Value> {
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

    #[test]
    fn an_answer_is_found_among_events_and_read() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("qmp");
        let listener = UnixListener::bind(&socket).unwrap();
        let qemu = thread::spawn(move || {
            let mut peer = BufReader::new(listener.accept().unwrap().0);
            let answers = [
                r#"{"return":{}}"#,
                r#"{"event":"RESET"}
                {"return":{"host-features":{"dev-features":["A: a"],"transports":["B: b","C"]},
                 "guest-features":{"transports":["B: b"]},"status":{"statuses":["OK: fine"]}}}"#,
                r#"{"return":{"vring-desc":4294959104,"vring-avail":2,"vring-used":3}}"#,
                r#"{"error":{"class":"CommandNotFound"}}"#,
            ];
            peer.get_mut().write_all(b"{\"QMP\":{}}\n").unwrap();
            for answer in answers {
                peer.read_line(&mut String::new()).unwrap();
                let lines = answer.replace("\n                {", "\u{1}{").replace('\n', "").replace('\u{1}', "\n");
                peer.get_mut().write_all(format!("{lines}\n").as_bytes()).unwrap();
            }
        });
        let mut monitor = Monitor::connect(&socket).unwrap();
        let expected = Virtio {
            offered: vec!["A".into(), "B".into(), "C".into()],
            taken: vec!["B".into()],
            status: vec!["OK".into()],
            ring: Some(Ring { descriptors: 0xffff_e000, available: 2, used: 3 }),
        };
        assert_eq!(monitor.virtio(), Some(expected));
        assert_eq!(monitor.virtio(), None, "a QEMU that does not know the question");
        qemu.join().unwrap();
    }

    #[test]
    fn a_queue_without_addresses_is_no_ring() {
        let names = ["a", "b", "c"];
        assert_eq!(ring(&json!({ "a": 0, "b": 0, "c": 0 }), names), None);
        let expected = Ring { descriptors: 1, available: 2, used: 3 };
        assert_eq!(ring(&json!({ "a": 1, "b": 2, "c": 3 }), names), Some(expected));
    }
}
