//! Either side is killed while requests are under way, without a word.

use crate::driven::{bytes, file_ref, stamp};
use crate::served::*;
use ringfence_dma::{Buffer, BusAddr, Gpa, Permission};
use ringfence_driver::Transport;
use ringfence_driver::blk::{Blk, Options, Request};
use ringfence_driver::mapper::Direct;
use ringfence_driver::pci::PciError;
use ringfence_policy::IommuMode;
use ringfence_vfio_user::client::{Client, ClientError};
use ringfence_vfio_user::server::Server;
use ringfence_vfio_user::wire::Request as Message;
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// What the other process is, and which socket it is about: this very program, again.
const ROLE: &str = "RINGFENCE_TEST_ROLE";
const SOCKET: &str = "RINGFENCE_TEST_SOCKET";
const IMAGE: &str = "RINGFENCE_TEST_IMAGE";

/// Another process, killed when it is dropped.
struct Other(Child);

impl Other {
    /// Starts it, and waits for its first word.
    fn start(role: &str, socket: &Path, image: &Path) -> (Self, String) {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "killed::the_other_process", "--nocapture"]);
        command.env(ROLE, role).env(SOCKET, socket).env(IMAGE, image).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut other = Self(command.spawn().unwrap());
        // The test harness has words of its own.
        let lines = BufReader::new(other.0.stdout.take().unwrap()).lines().map_while(Result::ok);
        let word = lines.into_iter().find_map(|line| line.split_once("ready: ").map(|(_, word)| word.to_owned()));
        (other, word.expect("it does what it is for"))
    }

    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// No test of its own: what the tests below start.
#[test]
fn the_other_process() {
    let path = |name| std::env::var_os(name).expect("it is told");
    match std::env::var(ROLE).as_deref() {
        Ok("client") => be_a_client(path(SOCKET).as_ref()),
        Ok("server") => be_a_server(path(SOCKET).as_ref(), path(IMAGE).to_str().unwrap()),
        _ => {}
    }
}

/// Keeps a disk busy, and says which file its memory is.
fn be_a_client(socket: &Path) {
    let client = Client::new(UnixStream::connect(socket).unwrap(), false, None).unwrap();
    keep_busy(&client, |memory, done| {
        if done == 100 {
            println!("ready: {}", rustix::fs::fstat(memory.as_fd()).unwrap().st_ino);
        }
        true
    });
}

fn be_a_server(socket: &Path, image: &str) {
    let server = Server::bind(socket).unwrap();
    let (_kept, end) = UnixStream::pair().unwrap();
    println!("ready: listening");
    serve(server, &disk(image, 1), options(IommuMode::Offer), end.as_fd());
}

/// Requests are under way at all times, until `go_on` says no or nothing comes back any more: then what the driver says.
fn keep_busy(
    client: &Client,
    mut go_on: impl FnMut(&ringfence_hostmem::SharedMemory, u64) -> bool,
) -> Option<PciError> {
    let memory = memory();
    client.map(BusAddr(0), MEMORY as u64, Permission::ReadWrite, Some((file_ref(&memory), 0))).unwrap();
    let mapper = Direct::new(Buffer::new(memory.slice(0, RINGS), Gpa(0)));
    let mut disk = Blk::start(pci(client).unwrap(), host(&mapper), Options::default()).unwrap();
    let page = |number: usize| buffer(&memory, number * PAGE as usize, PAGE as usize);
    for number in 0..16 {
        disk.submit(Request::Read { sector: number as u64 * 8, into: &[page(number)] }).unwrap();
    }
    let mut done = 0;
    while go_on(&memory, done) {
        disk.notify().unwrap();
        let since = Instant::now();
        while disk.poll().unwrap().is_none() {
            if client.serve_pending().is_err() || since.elapsed().as_secs() >= 20 {
                return disk.device_mut().transport_mut().status().err();
            }
        }
        done += 1;
        let number = done as usize % 16;
        disk.submit(Request::Read { sector: number as u64 * 8, into: &[page(number)] }).unwrap();
    }
    None
}

/// Whether this process has that file mapped.
fn has_mapped(inode: &str) -> bool {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().any(|line| line.contains("/memfd:") && line.split_whitespace().nth(4) == Some(inode))
}

#[test]
fn a_client_that_is_killed_leaves_nothing_behind_and_the_next_is_served() {
    let served = Served::disk(IommuMode::Offer);
    for _ in 0..3 {
        let (other, inode) = Other::start("client", &served.socket, Path::new(""));
        assert!(has_mapped(&inode), "the server has its memory");
        other.kill();
        let since = Instant::now();
        while has_mapped(&inode) {
            assert!(since.elapsed().as_secs() < 20, "the server keeps the memory of a client that is gone");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    let client = served.client();
    assert!(keep_busy(&client, |_, done| done < 100).is_none(), "the next one is served");
}

#[test]
fn a_server_that_is_killed_is_gone_and_one_that_is_started_again_serves() {
    let folder = tempfile::tempdir().unwrap();
    let (socket, image) = (folder.path().join("socket"), folder.path().join("image"));
    std::fs::write(&image, vec![0; 8 << 20]).unwrap();
    let connect = || Client::new(UnixStream::connect(&socket).unwrap(), false, None).unwrap();
    let memory = memory();
    let data = buffer(&memory, 0, PAGE as usize);
    let write_or_read = |writes: bool| {
        let client = connect();
        client.map(BusAddr(0), MEMORY as u64, Permission::ReadWrite, Some((file_ref(&memory), 0))).unwrap();
        let mapper = Direct::new(Buffer::new(memory.slice(0, RINGS), Gpa(0)));
        let mut disk = Blk::start(pci(&client).unwrap(), host(&mapper), Options::default()).unwrap();
        match writes {
            true => disk.write(3, &[data]).and_then(|()| disk.flush()).unwrap(),
            false => disk.read(3, &[data]).unwrap(),
        }
    };

    let (other, _) = Other::start("server", &socket, &image);
    data.memory().write(0, &stamp(1, PAGE as usize));
    write_or_read(true);
    let client = connect();
    let mut other = Some(other);
    let error = keep_busy(&client, |_, done| {
        if done == 200 {
            other.take().unwrap().kill();
        }
        true
    });
    // As a card that was pulled out: registers read as ones.
    assert!(matches!(error, Some(PciError::Gone)), "{error:?}");
    assert!(matches!(client.ask(&Message::DeviceInfo), Err(ClientError::Channel(_))), "and the connection is over");

    let (other, _) = Other::start("server", &socket, &image);
    data.memory().fill(0);
    write_or_read(false);
    assert_eq!(bytes(data), stamp(1, PAGE as usize), "what was flushed is there");
    other.kill();
}
