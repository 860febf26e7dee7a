use crate::channel::{SendError, Sender};
use crate::wire::{BackendRequest, IotlbReport, NeedReply};
use ringfence_dma::{Access, Fault, Permission};
use ringfence_iotlb::{Ask, Question};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// The way from a back-end to its front-end: the channel of SET_BACKEND_REQ_FD.
///
/// Queue threads send on it, the session's thread reads the answers. Sending never waits: what the socket does not take
/// stays in order and goes out when the session's thread next comes by.
#[derive(Debug, Default)]
pub(crate) struct Backend {
    sender: Mutex<Option<Sender>>,
    /// Whether REPLY_ACK was negotiated, so that a miss is answered even where it is denied.
    answers: AtomicBool,
}

impl Backend {
    pub(crate) fn connect(&self, sender: Option<Sender>) {
        *self.sender.lock().unwrap_or_else(PoisonError::into_inner) = sender;
    }

    pub(crate) fn is_connected(&self) -> bool {
        self.sender.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    pub(crate) fn expect_answers(&self, answers: bool) {
        self.answers.store(answers, Ordering::Relaxed);
    }

    /// Sends what the socket did not take before.
    pub(crate) fn flush(&self) -> Result<(), SendError> {
        match &mut *self.sender.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(sender) => sender.flush(),
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
        let mut sender = self.sender.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(sender) = &mut *sender else { return };
        for request in requests {
            if let Err(error) = sender.queue(&request.encode(need_reply)) {
                tracing::error!("the front-end does not read what its device asks: {error}; the device stands still");
                break;
            }
        }
        match sender.flush() {
            // A front-end that went away is noticed where its answers are read.
            Ok(()) | Err(SendError::Closed) => {}
            Err(error) => {
                tracing::error!("what a device asks can't be sent: {error}; it is tried again with what follows")
            }
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
