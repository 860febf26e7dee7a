//! A slow disk of several queues, each of which is reset while the disk has requests of it.

use crate::{Anything, Failure, PATIENCE, guest, pci};
use ringfence_dma::Buffer;
use ringfence_driver::blk::{Answer, Blk, BlkError, Completion, Options, Queue, Request, RequestError};
use ringfence_driver::pci::PciError;
use ringfence_driver::{Host, Transport};
use ringfence_vfio::Function;
use std::thread::sleep;
use std::time::{Duration, Instant};

const QUEUES: u16 = 4;
const REQUESTS: usize = 4;
const LEN: usize = 4096;

/// What no read of this disk brings: it is all zeroes.
const MARK: u8 = 0xa5;

/// Longer than the disk takes for a request.
const LATE: Duration = Duration::from_millis(2500);

/// Resets each queue with requests under way, and tells what became of those: all are lost, and what the disk does about them
/// after it has confirmed the reset is not taken for an answer to a later one.
pub(crate) fn reset(host: Host<'_, Anything<'_>>, function: Function, data: Buffer<'_>) -> Result<(), Failure> {
    let options = Options { depth: 16, segments: 1 };
    let mut disk = Blk::start_queues(pci(function, PATIENCE)?, host, options, QUEUES)?;
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
    let since = Instant::now();
    let is_marked = |number: usize| {
        let mut bytes = [0; LEN];
        buffer(number / REQUESTS, number % REQUESTS).memory().read(0, &mut bytes);
        bytes == [MARK; LEN]
    };
    while since.elapsed() < LATE {
        sleep(Duration::from_millis(20));
    }
    let late = (0..usize::from(QUEUES) * REQUESTS).filter(|&number| !is_marked(number)).count();
    let mut found_out = 0;
    for (number, queue) in queues.iter_mut().enumerate() {
        found_out += goes_on(queue, transport, number, buffer(number, 0))?;
    }
    guest::tell("in-flight", format_args!("{lost} lost; written after the reset: {late}; found out: {found_out}"));
    Ok(())
}

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

/// Reads through a queue that was reset, and resets it once more where it breaks; how often that was.
fn goes_on<'a, T: Transport<Error = PciError>>(
    queue: &mut Queue<'a, Anything<'a>>,
    transport: &mut T,
    number: usize,
    into: Buffer<'a>,
) -> Result<usize, Failure> {
    for broken in 0..REQUESTS {
        into.memory().fill(MARK);
        let asked = queue.submit(Request::Read { sector: 0, into: &[into] })?;
        tell(queue, transport, number)?;
        let ended = loop {
            match queue.poll() {
                Ok(None) => transport.wait(number as u16)?,
                Ok(Some(completion)) => break completion,
                Err(BlkError::Broken(error)) => {
                    guest::tell("found-out", format_args!("queue {number}: {error}"));
                    queue.restart(transport)?;
                    break queue.poll()?.ok_or("a request is neither lost nor done")?;
                }
                Err(error) => return Err(error.into()),
            }
        };
        if ended.id != asked {
            return Err("a request ends that nobody asked for".into());
        }
        if ended.result == Err(RequestError::Lost) {
            continue;
        }
        let mut bytes = [MARK; LEN];
        into.memory().read(0, &mut bytes);
        return match (ended.result, bytes == [0; LEN]) {
            (Ok(Answer::Done), true) => Ok(broken),
            (result, _) => {
                Err(format!("a read of zeroes after a reset: {result:?}, and what is there is something else").into())
            }
        };
    }
    Err(format!("queue {number} breaks again and again").into())
}
