//! A slow disk of several queues, each of which is reset while the disk has requests of it.

use crate::{Anything, Failure, PATIENCE, guest, pci};
use ringfence_dma::Buffer;
use ringfence_driver::blk::{Answer, Blk, BlkError, Completion, Options, Queue, QueueError, Request, RequestError};
use ringfence_driver::pci::PciError;
use ringfence_driver::{Host, Transport};
use ringfence_vfio::Function;
use std::thread::sleep;
use std::time::Duration;

const QUEUES: u16 = 4;
const REQUESTS: usize = 4;
const LEN: usize = 4096;

/// What no read of this disk brings: it is all zeroes.
const MARK: u8 = 0xa5;

/// Longer than the disk takes for a request.
const LATE: Duration = Duration::from_millis(2500);

/// Resets each queue with requests under way, and tells what became of those: all are lost, and what the disk does about them
/// after it has confirmed the reset is not taken for an answer to a later one. In the end all of the disk is reset.
pub(crate) fn reset(host: Host<'_, Anything<'_>>, function: Function, data: Buffer<'_>) -> Result<(), Failure> {
    let options = Options { depth: 16, segments: 1 };
    let mut way = pci(function, PATIENCE)?;
    let mut disk = Blk::start_queues(&mut way, host, options, QUEUES)?;
    let (transport, mut queues) = disk.split();
    data.memory().fill(MARK);
    let buffer = |queue: usize, turn: usize| data.sub((queue * REQUESTS + turn) * LEN, LEN);
    for (number, queue) in queues.iter_mut().enumerate() {
        for turn in 0..REQUESTS {
            queue.submit(Request::Read { sector: 0, into: &[buffer(number, turn)] })?;
        }
        tell(queue, transport, number)?;
    }
    let mut lost = 0;
    for queue in &mut queues {
        queue.restart(transport)?;
        while let Some(Completion { result, .. }) = queue.poll()? {
            lost += usize::from(result == Err(RequestError::Lost));
        }
    }
    // The disk said that it is done with all of them.
    sleep(LATE);
    let is_marked = |number: usize| holds(buffer(number / REQUESTS, number % REQUESTS), MARK);
    let late = (0..usize::from(QUEUES) * REQUESTS).filter(|&number| !is_marked(number)).count();
    guest::tell("in-flight", format_args!("{lost} lost; {late} written after the reset"));
    for (number, queue) in queues.iter_mut().enumerate() {
        if let Err(error) = goes_on(queue, transport, number, buffer(number, 0)) {
            guest::tell("found-out", format_args!("queue {number}: {error}"));
            match error.downcast_ref() {
                // Nothing is believed any more.
                Some(BlkError::<PciError>::Broken(_) | BlkError::NeedsReset { .. }) => break,
                _ => return Err(error),
            }
        }
    }
    drop(disk);
    let mut disk = Blk::start_queues(&mut way, host, options, QUEUES)?;
    let (transport, mut queues) = disk.split();
    for (number, queue) in queues.iter_mut().enumerate() {
        goes_on(queue, transport, number, buffer(number, 1))?;
    }
    guest::tell("anew", format_args!("{QUEUES} queues"));
    Ok(())
}

/// Whether each byte of a buffer is this.
fn holds(buffer: Buffer<'_>, byte: u8) -> bool {
    let mut bytes = [!byte; LEN];
    buffer.memory().read(0, &mut bytes);
    bytes == [byte; LEN]
}

/// Has the disk hear of what was submitted.
fn tell<T: Transport<Error = PciError>>(
    queue: &mut Queue<'_, Anything<'_>>,
    transport: &mut T,
    number: usize,
) -> Result<(), Failure> {
    if queue.publish()? {
        transport.notify(number as u16)?;
    }
    Ok(())
}

/// Reads zeroes, and nothing else.
fn goes_on<'a, T: Transport<Error = PciError>>(
    queue: &mut Queue<'a, Anything<'a>>,
    transport: &mut T,
    number: usize,
    into: Buffer<'a>,
) -> Result<(), Failure> {
    into.memory().fill(MARK);
    let asked = queue.submit(Request::Read { sector: 0, into: &[into] })?;
    tell(queue, transport, number)?;
    loop {
        match queue.poll().map_err(of_pci)? {
            Some(ended) if ended.id == asked && ended.result == Ok(Answer::Done) && holds(into, 0) => return Ok(()),
            Some(ended) => return Err(format!("{ended:?}, and zeroes were to be read").into()),
            None => match transport.needs_reset()? {
                None => transport.wait(number as u16)?,
                Some(status) => return Err(BlkError::<PciError>::NeedsReset { status }.into()),
            },
        }
    }
}

/// The error as one of the whole disk.
fn of_pci(error: QueueError) -> BlkError<PciError> {
    match error {
        BlkError::Broken(error) => BlkError::Broken(error),
        error => unreachable!("a queue that is polled: {error}"),
    }
}
