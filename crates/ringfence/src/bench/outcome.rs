use super::job::{Bytes, Shape};
use hdrhistogram::Histogram;
use serde::Serialize;
use std::fmt;

/// What a measurement came to. As JSON it is described in docs/performance.md.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Outcome {
    pub(super) shape: Shape,
    pub(super) backend: Backend,
    pub(super) seconds: f64,
    pub(super) requests: u64,
    /// Requests a second.
    pub(super) iops: f64,
    pub(super) bytes_per_second: f64,
    pub(super) latency: Latency,
    pub(super) cpu: CpuUse,
    pub(super) iotlb: Traffic,
    /// Blocks that were read and compared.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) verified: Option<u64>,
}

/// Who is measured.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Backend {
    pub(super) pid: Option<u32>,
    /// As the kernel has it: at most 15 bytes of the program's name.
    pub(super) program: Option<String>,
}

/// From submission to the moment at which the client saw the end, in nanoseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Latency {
    pub(super) mean: f64,
    pub(super) min: u64,
    pub(super) p50: u64,
    pub(super) p90: u64,
    pub(super) p99: u64,
    #[serde(rename = "p99.9")]
    pub(super) p99_9: u64,
    #[serde(rename = "p99.99")]
    pub(super) p99_99: u64,
    pub(super) max: u64,
}

/// Processor time, in nanoseconds a request, and in processors kept busy. The server's is unknown where its process is.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct CpuUse {
    pub(super) client_per_request: f64,
    pub(super) server_per_request: Option<f64>,
    pub(super) client_processors: f64,
    pub(super) server_processors: Option<f64>,
}

/// What was said about translations while it was measured.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Traffic {
    pub(super) misses: u64,
    pub(super) updates: u64,
    pub(super) invalidations: u64,
}

impl Latency {
    pub(super) fn of(histogram: &Histogram<u64>) -> Self {
        let at = |quantile| histogram.value_at_quantile(quantile);
        Self {
            mean: histogram.mean(),
            min: histogram.min(),
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p99_9: at(0.999),
            p99_99: at(0.9999),
            max: histogram.max(),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Outcome { shape, backend, seconds, requests, iops, bytes_per_second, latency, cpu, iotlb, verified } = self;
        writeln!(f, "{shape}: {requests} requests in {seconds:.1} s")?;
        writeln!(f, "  IOPS      {}, {}/s", Count(*iops), Binary(*bytes_per_second))?;
        let Latency { mean, min, p50, p90, p99, p99_9, p99_99, max } = *latency;
        writeln!(f, "  latency   mean {}, min {}, max {}", Time(mean), Time(min as f64), Time(max as f64))?;
        write!(f, "           ")?;
        for (name, value) in [("50 %", p50), ("90 %", p90), ("99 %", p99), ("99.9 %", p99_9), ("99.99 %", p99_99)] {
            write!(f, " {name} {}", Time(value as f64))?;
            f.write_str(if name == "99.99 %" { "\n" } else { "," })?;
        }
        write!(
            f,
            "  CPU       client {} a request ({:.2} processors)",
            Time(cpu.client_per_request),
            cpu.client_processors
        )?;
        let program = backend.program.as_deref().unwrap_or("back-end");
        match (cpu.server_per_request, cpu.server_processors, backend.pid) {
            (Some(time), Some(processors), Some(pid)) => {
                writeln!(f, ", {program} (pid {pid}) {} a request ({processors:.2} processors)", Time(time))?;
            }
            _ => writeln!(f, "; the back-end's is not known, because its process is not")?,
        }
        let Traffic { misses, updates, invalidations } = iotlb;
        writeln!(f, "  IOTLB     {misses} misses, {updates} updates, {invalidations} invalidations")?;
        if let Some(blocks) = verified {
            writeln!(f, "  verified  {blocks} blocks of {} read, all of them right", Bytes(shape.block_size))?;
        }
        Ok(())
    }
}

/// A time in nanoseconds, with three digits.
pub(super) struct Time(pub(super) f64);

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        scaled(f, self.0, 1000.0, &["ns", "µs", "ms", "s"])
    }
}

/// A number, with three digits.
pub(super) struct Count(pub(super) f64);

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        scaled(f, self.0, 1000.0, &["", "k", "M", "G"])
    }
}

/// Bytes, with three digits.
pub(super) struct Binary(pub(super) f64);

impl fmt::Display for Binary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        scaled(f, self.0, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB"])
    }
}

fn scaled(f: &mut fmt::Formatter<'_>, mut value: f64, step: f64, units: &[&str]) -> fmt::Result {
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < units.len() {
        value /= step;
        unit += 1;
    }
    let digits = if value < 9.995 && unit > 0 { 2 } else { usize::from(value < 99.95 && unit > 0) };
    let text = format!("{value:.digits$} {}", units[unit]);
    f.write_str(text.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits_tell_enough() {
        for (value, text) in
            [(0.0, "0 ns"), (999.4, "999 ns"), (1500.0, "1.50 µs"), (25_340.0, "25.3 µs"), (2.5e9, "2.50 s")]
        {
            assert_eq!(Time(value).to_string(), text);
        }
        assert_eq!(Count(6_690_000.0).to_string(), "6.69 M");
        assert_eq!(Count(12.0).to_string(), "12");
        assert_eq!(Binary(4.0 * 1_073_741_824.0).to_string(), "4.00 GiB");
    }
}
