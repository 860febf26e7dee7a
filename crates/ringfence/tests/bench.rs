//! `ringfence bench` against `ringfence serve blk`: what it tells is so, and what is wrong is told.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;
use tempfile::TempDir;

const RINGFENCE: &str = env!("CARGO_BIN_EXE_ringfence");

struct Served {
    child: Child,
    folder: TempDir,
}

impl Served {
    fn new(arguments: &[&str]) -> Self {
        let folder = TempDir::new().unwrap();
        let mut command = Command::new(RINGFENCE);
        command.args(["serve", "blk", "--log", "off", "--socket"]).arg(folder.path().join("disk.sock")).args(arguments);
        let child = command.stderr(Stdio::null()).spawn().unwrap();
        let served = Self { child, folder };
        // It is there before it listens.
        while UnixStream::connect(served.socket()).is_err() {
            std::thread::sleep(Duration::from_millis(5));
        }
        served
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("disk.sock")
    }

    fn bench(&self, arguments: &[&str]) -> Output {
        bench(&self.socket(), arguments).output().unwrap()
    }

    fn json(&self, arguments: &[&str]) -> serde_json::Value {
        let output = self.bench(&[arguments, &["--format", "json"]].concat());
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn bench(socket: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(RINGFENCE);
    command.args(["bench", "--seconds", "0.2", "--warmup", "0.05", "--socket"]).arg(socket).args(arguments);
    command
}

fn failure(output: Output) -> String {
    assert!(!output.status.success());
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn every_mapping_moves_the_right_bytes_and_shows_in_the_traffic() {
    let served = Served::new(&["--image", "memory:64M"]);
    for (iommu, more) in [
        ("off", &["--queues", "2"][..]),
        ("off", &["--packed", "--poll", "0"]),
        ("off", &["--no-indirect", "--no-event-idx"]),
        ("static", &["--queues", "2"]),
        ("bounce", &[]),
        ("dynamic", &["--miss-delay", "60"]),
    ] {
        let common = ["--rw", "randrw", "--size", "8M", "-b", "8k", "-d", "16", "--verify", "--iommu", iommu];
        let told = served.json(&[&common[..], more].concat());
        let number = |path: &str| told.pointer(path).and_then(serde_json::Value::as_f64).expect(path);
        assert!(number("/requests") > 0.0 && number("/verified") > 0.0, "{told}");
        assert!(number("/latency/p50") <= number("/latency/p99.9") && number("/latency/min") > 0.0, "{told}");
        assert_eq!(number("/backend/pid"), f64::from(served.child.id()));
        let invalidations = number("/iotlb/invalidations");
        match iommu {
            // Each request takes its pages away again.
            "dynamic" => assert!(invalidations >= number("/requests") - 16.0, "{told}"),
            _ => assert_eq!(invalidations, 0.0, "{told}"),
        }
        if iommu == "off" {
            assert_eq!(number("/iotlb/misses") + number("/iotlb/updates"), 0.0, "{told}");
        }
    }
}

#[test]
fn what_is_wrong_is_told() {
    let nothing = Served::new(&["--image", "null:64M"]);
    let told = failure(nothing.bench(&["--rw", "randread", "--size", "8M", "--verify"]));
    assert!(told.contains("wrong data: at byte 0x"), "{told}");
    let told = failure(nothing.bench(&["--queues", "100"]));
    assert!(told.contains("16 queues, and 100 are asked for"), "{told}");
    let told = failure(nothing.bench(&["--size", "1G"]));
    assert!(told.contains("the disk has 67108864"), "{told}");

    let old = Served::new(&["--image", "null:64M", "--iommu", "off"]);
    let told = failure(old.bench(&["--iommu", "static"]));
    assert!(told.contains("can't be measured behind an IOMMU"), "{told}");
    let strict = Served::new(&["--image", "null:64M", "--iommu", "require"]);
    let told = failure(strict.bench(&["--iommu", "off"]));
    assert!(told.contains("wants an IOMMU"), "{told}");
    let read_only = Served::new(&["--image", "null:64M", "--read-only"]);
    let told = failure(read_only.bench(&["--rw", "randwrite"]));
    assert!(told.contains("read-only"), "{told}");

    let told = failure(bench(Path::new("/nowhere/disk.sock"), &[]).output().unwrap());
    assert!(told.contains("/nowhere/disk.sock"), "{told}");
}

#[test]
fn what_is_ended_early_is_told_all_the_same() {
    let served = Served::new(&["--image", "null:64M"]);
    let child = Command::new(RINGFENCE)
        .args(["bench", "--seconds", "1000", "--warmup", "0", "--format", "html", "--socket"])
        .arg(served.socket())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(500));
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let page = String::from_utf8(output.stdout).unwrap();
    assert!(page.starts_with("<!doctype html>") && page.contains("99.9 %") && !page.contains("<script"), "{page}");
}
