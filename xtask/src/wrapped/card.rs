//! A network card whose other end is passt: what it sends to the gateway reaches this machine's own address.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread::JoinHandle;
use std::time::Duration;
use std::{io, thread};

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

/// How long a connection that the guest has made may stand still.
const STILL: Duration = Duration::from_secs(60);

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
    let peer = Peer::listen(content.clone()).map_err(|error| format!("cannot listen: {error}"))?;
    let initramfs = at("initramfs");
    let rest = SCRIPT.replace("$GATEWAY", &GATEWAY.to_string()).replace("$PORT", &peer.address.port().to_string());
    machine.write_guest(&script(NETWORK, &rest), "virtio_net", &initramfs)?;

    let plain = at("plain");
    let back_end = match Backend::start(passt.serve(GUEST, GATEWAY, &plain), &plain, &at("passt-log")) {
        Ok(back_end) => back_end,
        Err(error) => return Ok(Connected::NoPasst(error.to_string())),
    };
    machine.is_refused(&initramfs, DEVICE, &plain, log)?;
    let said = machine.run_wrapped("net", &initramfs, DEVICE, &back_end, log)?;
    says(&said, "end", "done")?;
    says(&said, "address", &GUEST.to_string())?;
    says(&said, "fetched", &digest(&content))?;
    let (first, second) = content.split_at(BYTES / 2);
    match peer.end()? == [second, first].concat() {
        true => Ok(Connected::Yes),
        false => Err("what the guest sent is not what arrived".to_owned()),
    }
}

/// A program of this machine: gives all it has to the first who comes, and takes all that the second has.
struct Peer {
    address: SocketAddr,
    thread: JoinHandle<io::Result<Vec<u8>>>,
}

impl Peer {
    fn listen(content: Vec<u8>) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        let thread = thread::spawn(move || {
            let next = || -> io::Result<TcpStream> {
                let stream = listener.accept()?.0;
                stream.set_read_timeout(Some(STILL))?;
                stream.set_write_timeout(Some(STILL))?;
                Ok(stream)
            };
            let mut first = next()?;
            first.write_all(&content)?;
            first.shutdown(Shutdown::Write)?;
            let mut taken = Vec::new();
            next()?.take(2 * BYTES as u64).read_to_end(&mut taken)?;
            Ok(taken)
        });
        Ok(Self { address, thread })
    }

    /// What it was given, once the guest is over.
    fn end(self) -> Result<Vec<u8>, String> {
        // Whoever it still waits for comes now.
        let _ = [0, 1].map(|_| TcpStream::connect(self.address));
        let taken = self.thread.join().map_err(|_| "the guest's peer panicked".to_owned())?;
        taken.map_err(|error| format!("the guest's peer: {error}"))
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
udhcpc -i eth0 -n -q -t 20 -T 1 -s /run/dhcp || finish failed
tell address "$(ip -4 -o addr show dev eth0 | sed 's/.*inet \([0-9.]*\).*/\1/')"
nc $GATEWAY $PORT </dev/null >/run/fetched || finish failed
tell fetched "$(digest /run/fetched)"
half=$(($(stat -c %s /run/fetched) / 2 / 4096))
{ dd if=/run/fetched bs=4096 skip=$half; dd if=/run/fetched bs=4096 count=$half; } 2>/dev/null >/run/sent
nc $GATEWAY $PORT </run/sent || finish failed
finish done
"#;
