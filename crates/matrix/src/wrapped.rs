//! An old device as a back-end of its own, for `ringfence wrap`'s code to stand before.

use ringfence_device::Device;
use ringfence_policy::IommuMode;
use ringfence_ring::Format;
use ringfence_vhost_user::server::{self, Server};
use ringfence_wrap::{Kind, MIN_POOL, OnError, Options, Wrapped};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// A device that offers no flag and translates nothing, on a socket of its own; ended with the value. Of the world it
/// sees what comes through the socket.
pub(crate) struct Plain {
    socket: PathBuf,
    /// Closing it ends the server.
    end: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
    _folder: tempfile::TempDir,
}

impl Plain {
    pub(crate) fn serve(device: Arc<dyn Device>) -> Self {
        let folder = tempfile::tempdir().expect("a folder for a socket");
        let socket = folder.path().join("plain");
        let server = Server::bind(&socket).expect("a path that nobody else has");
        let (end, ended) = UnixStream::pair().expect("two more descriptors");
        let options = server::Options {
            iommu: IommuMode::Off,
            keep: server::Keep::Cache,
            queue_size: 256,
            poll: Duration::ZERO,
            io_timeout: Duration::from_secs(10),
        };
        let serve = move || server.run(device, options, ended.as_fd()).expect("a socket that is there");
        Self { socket, end: Some(end), thread: Some(std::thread::spawn(serve)), _folder: folder }
    }

    /// What stands before it.
    pub(crate) fn wrapped(&self) -> Arc<dyn Device> {
        let options = Options {
            backend: self.socket.clone(),
            kind: Kind::Blk,
            queues: None,
            queue_size: 256,
            pool: MIN_POOL,
            format: Format::Split,
            timeout: None,
            on_error: OnError::Reconnect,
            patience: Duration::from_secs(10),
        };
        Arc::new(Wrapped::open(options).expect("a back-end that is there"))
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        drop(self.end.take());
        let ended = self.thread.take().expect("joined only here").join();
        assert!(ended.is_ok() || std::thread::panicking(), "the old device's server panicked");
    }
}
