use crate::channel::{SendError, Sender};
use crate::wire::{BackendRequest, IotlbReport, NeedReply};
use ringfence_device::eventfd;
use ringfence_dma::{Access, Fault, Permission};
use ringfence_iotlb::{Ask, Question};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The way from a back-end to its front-end: the channel of SET_BACKEND_REQ_FD.
///
/// Queue threads send on it, the session's thread reads the answers. Sending never waits: what the socket does not take
/// stays in order, and the session's thread sends it when there is room.
#[derive(Debug, Default)]
pub(crate) struct Backend {
    outgoing: Mutex<Option<Outgoing>>,
    /// Whether REPLY_ACK was negotiated, so that a miss is answered even where it is denied.
    answers: AtomicBool,
}

/// A channel, as those have it who send.
#[derive(Debug)]
pub(crate) struct Outgoing {
    pub(crate) sender: Sender,
    /// Rung where the socket did not take everything: the session's thread may be asleep.
    pub(crate) backed_up: OwnedFd,
}

impl Backend {
    pub(crate) fn connect(&self, outgoing: Option<Outgoing>) {
        *self.outgoing() = outgoing;
    }

    pub(crate) fn is_connected(&self) -> bool {
        self.outgoing().is_some()
    }

    /// Whether something waits for room in the socket.
    pub(crate) fn is_backed_up(&self) -> bool {
        self.outgoing().as_ref().is_some_and(|outgoing| outgoing.sender.is_backed_up())
    }

    fn outgoing(&self) -> MutexGuard<'_, Option<Outgoing>> {
        self.outgoing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn expect_answers(&self, answers: bool) {
        self.answers.store(answers, Ordering::Relaxed);
    }

    /// Sends what the socket did not take before.
    pub(crate) fn flush(&self) -> Result<(), SendError> {
        match &mut *self.outgoing() {
            Some(outgoing) => outgoing.sender.flush(),
            None => Ok(()),
        }
    }

    /// Tells the front-end of an access that its translation does not allow.
    pub(crate) fn access_failed(&self, fault: Fault) {
        let report = IotlbReport::AccessFail { iova: fault.addr, perm: permission(fault.access) };
        self.send(&[BackendRequest::IotlbMsg(report)], NeedReply::No);
    }

    /// Tells the front-end that the configuration space has changed.
    pub(crate) fn config_changed(&self) {
        self.send(&[BackendRequest::ConfigChangeMsg], NeedReply::No);
    }

    fn send(&self, requests: &[BackendRequest], need_reply: NeedReply) {
        let mut outgoing = self.outgoing();
        let Some(Outgoing { sender, backed_up }) = &mut *outgoing else { return };
        for request in requests {
            if let Err(error) = sender.queue(&request.encode(need_reply)) {
                tracing::error!("the front-end does not read what its device asks: {error}; the device stands still");
                break;
            }
        }
        // Who sends the rest also finds out why it can't be sent.
        let _ = sender.flush();
        if sender.is_backed_up() {
            eventfd::ring(backed_up.as_fd());
        }
    }
}

impl Ask for Backend {
    fn ask(&self, questions: &[Question]) {
        let need_reply = if self.answers.load(Ordering::Relaxed) { NeedReply::Yes } else { NeedReply::No };
        let misses: Vec<_> = questions
            .iter()
            .map(|question| IotlbReport::Miss { iova: question.addr, perm: permission(question.access) })
            .map(BackendRequest::IotlbMsg)
            .collect();
        self.send(&misses, need_reply);
    }
}

fn permission(access: Access) -> Permission {
    match access {
        Access::Read => Permission::ReadOnly,
        Access::Write => Permission::WriteOnly,
    }
}
