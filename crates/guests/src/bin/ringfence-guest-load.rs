//! Loads a disk from within a guest, for `cargo xtask guest-speed`: so many threads, each with one request at a time,
//! past the page cache.
//!
//! `ringfence-guest-load DISK read|write BLOCK THREADS SECONDS` prints the number of requests and the seconds they took,
//! `ringfence-guest-load run PROGRAM ARGUMENT…` the seconds that a program took, with what it says on standard output
//! dropped.

use rustix::fs::OFlags;
use std::fs::OpenOptions;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Direct I/O wants memory like that.
const ALIGNED: usize = 4096;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let told = match arguments.split_first() {
        Some((first, command)) if first == "run" => run(command).map(|seconds| format!("{seconds:.6}")),
        _ => load(&arguments).map(|(requests, seconds)| format!("{requests} {seconds:.6}")),
    };
    match told {
        Ok(told) => {
            println!("{told}");
            ExitCode::SUCCESS
        }
        Err(reason) => {
            eprintln!("{reason}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: &[String]) -> Result<f64, String> {
    let (program, arguments) = command.split_first().ok_or("nothing to run")?;
    let began = Instant::now();
    let output = Command::new(program).args(arguments).output().map_err(|error| format!("{program}: {error}"))?;
    let took = began.elapsed();
    match output.status.success() {
        true => Ok(took.as_secs_f64()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

fn load(arguments: &[String]) -> Result<(u64, f64), String> {
    let [disk, way, block, threads, seconds] = arguments else {
        return Err("usage: ringfence-guest-load DISK read|write BLOCK THREADS SECONDS".into());
    };
    let number = |text: &String| text.parse::<u64>().map_err(|error| format!("{text}: {error}"));
    let (block, threads, time) = (number(block)? as usize, number(threads)?, Duration::from_secs(number(seconds)?));
    let writes = way == "write";
    let direct = i32::try_from(OFlags::DIRECT.bits()).expect("a flag of open");
    let mut options = OpenOptions::new();
    let mut file =
        options.read(true).write(writes).custom_flags(direct).open(disk).map_err(|error| format!("{disk}: {error}"))?;
    let size = file.seek(SeekFrom::End(0)).map_err(|error| format!("{disk}: {error}"))?;
    let blocks = size / block as u64;
    if blocks == 0 || block % 512 != 0 {
        return Err(format!("{disk} of {size} bytes has no blocks of {block}"));
    }
    let (over, requests) = (AtomicBool::new(false), AtomicU64::new(0));
    let began = Instant::now();
    std::thread::scope(|scope| {
        let work = |seed: u64| -> std::io::Result<()> {
            let mut memory = vec![seed as u8; block + ALIGNED];
            let start = memory.as_ptr().align_offset(ALIGNED);
            let buffer = &mut memory[start..start + block];
            let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            while !over.load(Ordering::Relaxed) {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let at = random % blocks * block as u64;
                if writes {
                    file.write_all_at(buffer, at)?
                } else {
                    file.read_exact_at(buffer, at)?
                }
                requests.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        };
        let workers: Vec<_> = (1..=threads).map(|seed| scope.spawn(move || work(seed))).collect();
        std::thread::sleep(time);
        over.store(true, Ordering::Relaxed);
        let ends = workers.into_iter().map(|worker| worker.join().expect("a worker does not panic"));
        ends.collect::<Result<Vec<_>, _>>().map_err(|error| format!("{disk}: {error}"))
    })?;
    Ok((requests.into_inner(), began.elapsed().as_secs_f64()))
}
