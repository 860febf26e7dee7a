//! A network card whose other end is passt: what it sends to the gateway reaches this machine's own address.
//!
//! passt's TCP has patience for a few seconds, which is less than a busy machine may take: a connection that it resets is made
//! anew. And of a connection that both sides close it forgets what it has not sent yet, as soon as all is acknowledged that it
//! has, if the guest closed first (docs/wrap.md): so the guest closes no half before it has all that it came for, and its
//! peers close last.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::{io, mem, thread};

use ringfence_guests::{Backend, Passt};

use super::{BYTES, Machine, Shared, content, digest, says, script};

const NETWORK: u16 = 1;
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const DEVICE: &[&str] = &[
    "-netdev",
    "vhost-user,id=net,chardev=socket",
    "-device",
    "virtio-net-pci,netdev=net,disable-legacy=on,iommu_platform=on,romfile=",
];

/// Whether there was anything to connect to.
pub(super) enum Connected {
    Yes,
    /// passt shuts itself into namespaces, which not every machine lets it.
    NoPasst(String),
}

/// Has a guest take an address, fetch bytes by TCP and send some back.
pub(super) fn connect(machine: &Machine<'_>, passt: &Passt, log: &Shared<'_>) -> Result<Connected, String> {
    let folder = tempfile::tempdir().map_err(|error| format!("cannot create a folder: {error}"))?;
    let at = |name: &str| folder.path().join(name);
    let content = content();
    let failed = |error| format!("cannot listen: {error}");
    let giver = Peer::give(content.clone()).map_err(failed)?;
    let taken = Arc::<Mutex<Vec<u8>>>::default();
    let taker = Peer::take(Arc::clone(&taken)).map_err(failed)?;
    let initramfs = at("initramfs");
    let rest = SCRIPT
        .replace("$GATEWAY", &GATEWAY.to_string())
        .replace("$GIVER", &giver.address.port().to_string())
        .replace("$TAKER", &taker.address.port().to_string())
        .replace("$BYTES", &BYTES.to_string());
    machine.write_guest(&script(NETWORK, &rest), "virtio_net", &initramfs)?;

    let plain = at("plain");
    let back_end = match Backend::start(passt.serve(GUEST, GATEWAY, &plain), &plain, &at("passt-log")) {
        Ok(back_end) => back_end,
        Err(error) => return Ok(Connected::NoPasst(error.to_string())),
    };
    machine.is_refused(&initramfs, DEVICE, &plain, log)?;
    let said = machine.run_wrapped("net", &initramfs, DEVICE, &back_end, log)?;
    // With it end the connections that it had.
    drop(back_end);
    giver.end()?;
    taker.end()?;
    says(&said, "end", "done")?;
    says(&said, "address", &GUEST.to_string())?;
    says(&said, "fetched", &digest(&content))?;
    let (first, second) = content.split_at(BYTES / 2);
    match mem::take(&mut *taken.lock().unwrap_or_else(PoisonError::into_inner)) == [second, first].concat() {
        true => Ok(Connected::Yes),
        false => Err("what the guest sent is not what arrived".to_owned()),
    }
}

/// A program of this machine that serves who connects, one after the other.
struct Peer {
    address: SocketAddr,
    ended: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Peer {
    /// Gives all of `content` to each.
    fn give(content: Vec<u8>) -> io::Result<Self> {
        Self::listen(move |mut stream| {
            stream.write_all(&content)?;
            io::copy(&mut stream, &mut io::sink()).map(drop)
        })
    }

    /// Takes what each has, and answers how much that was. Who has it all leaves it in `taken`.
    fn take(taken: Arc<Mutex<Vec<u8>>>) -> io::Result<Self> {
        Self::listen(move |mut stream| {
            let mut bytes = Vec::new();
            (&stream).take(2 * BYTES as u64).read_to_end(&mut bytes)?;
            let count = bytes.len();
            if count == BYTES {
                *taken.lock().unwrap_or_else(PoisonError::into_inner) = bytes;
            }
            writeln!(stream, "{count}")?;
            stream.shutdown(Shutdown::Write)
        })
    }

    fn listen(mut serve: impl FnMut(TcpStream) -> io::Result<()> + Send + 'static) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        let ended = Arc::<AtomicBool>::default();
        let thread = thread::spawn({
            let ended = Arc::clone(&ended);
            move || {
                while let Ok((stream, _)) = listener.accept()
                    && !ended.load(Ordering::Relaxed)
                {
                    // A connection that did not last is the guest's to make anew.
                    let _ = serve(stream);
                }
            }
        });
        Ok(Self { address, ended, thread })
    }

    /// Ends it, once nobody is connected.
    fn end(self) -> Result<(), String> {
        self.ended.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.address);
        self.thread.join().map_err(|_| "the guest's peer panicked".to_owned())
    }
}

const SCRIPT: &str = r#"
ip link set lo up
ip link set eth0 up
cat >/run/dhcp <<'END'
#!/bin/busybox sh
[ "$1" = bound ] || exit 0
ip addr add "$ip/$mask" dev eth0
ip route add default via "$router"
END
chmod +x /run/dhcp
udhcpc -i eth0 -n -q -t 100 -T 1 -s /run/dhcp || finish failed
tell address "$(ip -4 -o addr show dev eth0 | sed 's/.*inet \([0-9.]*\).*/\1/')"
# Something to read from that has no end.
mkfifo /run/never /run/pipe
sleep 1000 >/run/never &
fetch() {
    nc $GATEWAY $GIVER </run/never >/run/pipe &
    head -c $BYTES </run/pipe >/run/fetched
    kill $!
    wait $!
    [ "$(stat -c %s /run/fetched)" = $BYTES ]
}
tries() { for try in 1 2 3 4 5; do "$@" && return; done; finish failed; }
tries fetch
tell fetched "$(digest /run/fetched)"
half=$(($BYTES / 2 / 4096))
{ dd if=/run/fetched bs=4096 skip=$half; dd if=/run/fetched bs=4096 count=$half; } 2>/dev/null >/run/sent
send() { [ "$(nc $GATEWAY $TAKER </run/sent)" = $BYTES ]; }
tries send
finish done
"#;
