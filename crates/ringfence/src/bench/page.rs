//! Measurements as a page of its own: what there is to know first, then plots. No script, nothing from elsewhere.

use super::compare::{Compared, IOMMU, Row};
use super::outcome::{Binary, Count, Outcome, Time};
use askama::Template;

#[derive(Template)]
#[template(path = "bench.html")]
struct Page {
    title: String,
    about: String,
    facts: Vec<Fact>,
    summary: Option<Summary>,
    groups: Vec<Group>,
    absent: Vec<String>,
}

/// A number that is worth its size.
struct Fact {
    name: &'static str,
    value: String,
    more: String,
}

/// Who is how much faster than whom.
struct Summary {
    told: Vec<String>,
    others: Vec<String>,
    lines: Vec<Line>,
}

struct Line {
    load: String,
    ours: String,
    /// Against each of the others, where both were measured.
    cells: Vec<Option<Cell>>,
}

struct Cell {
    /// How many times as many requests as the other we do.
    times: String,
    ahead: bool,
}

struct Group {
    name: String,
    plots: Vec<Plot>,
}

struct Plot {
    name: String,
    /// What a long bar is.
    better: &'static str,
    loads: Vec<Load>,
}

/// Bars that are to be compared: those of different loads have scales of their own.
struct Load {
    name: String,
    bars: Vec<Bar>,
}

struct Bar {
    label: String,
    value: String,
    ours: bool,
    /// Of the longest, in percent.
    width: f64,
    /// A part of that, of a darker colour.
    inner: f64,
}

impl Compared {
    pub(super) fn page(&self) -> anyhow::Result<String> {
        let mut groups: Vec<(&str, Vec<&Row>)> = Vec::new();
        for row in &self.rows {
            match groups.last_mut() {
                Some((name, rows)) if *name == row.group => rows.push(row),
                _ => groups.push((row.group, vec![row])),
            }
        }
        let rounds = self.rows.first().map_or(0, |row| row.rounds.len());
        let each = self.rows.iter().flat_map(|row| &row.rounds).map(|outcome| outcome.seconds).fold(0.0, f64::max);
        let page = Page {
            title: "Vhost-user disks, compared".into(),
            about: format!(
                "ringfence {} on {} processors. A round measures everything once, for {each:.1} s each; told are \
                 medians of {rounds}, and of ratios the median of those within a round.",
                self.version, self.processors
            ),
            facts: Vec::new(),
            summary: Some(self.summary()),
            groups: groups.into_iter().map(|(name, rows)| group(name, &rows)).collect(),
            absent: self.absent.clone(),
        };
        Ok(page.render()?)
    }

    fn summary(&self) -> Summary {
        let mut others: Vec<String> = Vec::new();
        for row in self.rows.iter().filter(|row| row.group != IOMMU && !row.is_ours()) {
            if !others.iter().any(|other| other == family(&row.subject)) {
                others.push(family(&row.subject).to_owned());
            }
        }
        let ours = self.rows.iter().filter(|row| row.group != IOMMU && row.is_ours());
        let lines: Vec<Line> = ours.map(|row| self.line(row, &others)).collect();
        let contested = lines.iter().filter(|line| line.cells.iter().any(Option::is_some));
        let won = contested.clone().filter(|line| line.cells.iter().flatten().all(|cell| cell.ahead)).count();
        let mut told = Vec::new();
        if contested.clone().count() > 0 {
            told.push(format!("More requests than everybody else in {won} of {} loads.", contested.count()));
        }
        let costs = self.rows.iter().filter(|row| row.group == IOMMU && row.subject == "static");
        let costs: Vec<_> = costs.map(|row| format!("{} ({})", percent(row.ratio), row.load)).collect();
        if !costs.is_empty() {
            told.push(format!("Behind an IOMMU with static mappings: {} of the requests without.", costs.join(", ")));
        }
        Summary { told, others, lines }
    }

    /// Against the best that each of the others can do.
    fn line(&self, ours: &Row, others: &[String]) -> Line {
        let cell = |other: &String| {
            let same = |row: &&Row| row.group == ours.group && row.load == ours.load && family(&row.subject) == other;
            let best = self.rows.iter().filter(same).max_by(|a, b| a.ratio.total_cmp(&b.ratio))?;
            let times = 1.0 / best.ratio;
            Some(Cell { times: format!("{times:.2} ×"), ahead: times >= 1.0 })
        };
        let load = match ours.group {
            "A client that sleeps" => format!("{}, {}, a client that sleeps", disk(ours), ours.load),
            _ => format!("{}, {}", disk(ours), ours.load),
        };
        Line { load, ours: format!("{}/s", Count(ours.iops)), cells: others.iter().map(cell).collect() }
    }
}

/// A program, in whatever mode.
fn family(subject: &str) -> &str {
    subject.split(", ").next().unwrap_or(subject)
}

fn disk(row: &Row) -> &'static str {
    match row.group {
        "A file in memory" => "file",
        "A disk in memory" => "memory",
        _ => "null",
    }
}

fn percent(ratio: f64) -> String {
    if ratio < 0.1 { format!("{:.1} %", ratio * 100.0) } else { format!("{:.0} %", ratio * 100.0) }
}

impl Outcome {
    pub(super) fn page(&self) -> anyhow::Result<String> {
        let latency = &self.latency;
        let steps = [
            ("50 %", latency.p50),
            ("90 %", latency.p90),
            ("99 %", latency.p99),
            ("99.9 %", latency.p99_9),
            ("99.99 %", latency.p99_99),
        ];
        let bars = steps.map(|(label, value)| {
            let width = share(value as f64, latency.p99_99 as f64);
            Bar { label: label.into(), value: Time(value as f64).to_string(), ours: true, width, inner: width }
        });
        let cpu = &self.cpu;
        let server = self.backend.program.as_deref().unwrap_or("the back-end");
        let fact = |name, value, more| Fact { name, value, more };
        let busy = |processors: f64| format!("{processors:.2} processors");
        let mut facts = vec![
            fact(
                "Requests a second",
                Count(self.iops).to_string(),
                format!("{} in {:.1} s", self.requests, self.seconds),
            ),
            fact("Bandwidth", format!("{}/s", Binary(self.bytes_per_second)), String::new()),
            fact("Latency", Time(latency.mean).to_string(), format!("mean; at most {}", Time(latency.max as f64))),
            fact("Client's CPU a request", Time(cpu.client_per_request).to_string(), busy(cpu.client_processors)),
            match (cpu.server_per_request, cpu.server_processors) {
                (Some(time), Some(processors)) => {
                    fact("Server's CPU a request", Time(time).to_string(), format!("{}, {server}", busy(processors)))
                }
                _ => fact("Server's CPU a request", "?".into(), "its process is not known".into()),
            },
            fact(
                "IOTLB misses",
                Count(self.iotlb.misses as f64).to_string(),
                format!("{} updates, {} invalidations", self.iotlb.updates, self.iotlb.invalidations),
            ),
        ];
        if let Some(blocks) = self.verified {
            facts.push(fact("Verified", Count(blocks as f64).to_string(), "blocks read, all of them right".into()));
        }
        let loads = vec![Load { name: String::new(), bars: bars.into() }];
        let plot = Plot { name: "So many requests are done within".into(), better: "shorter is better", loads };
        let page = Page {
            title: self.shape.to_string(),
            about: format!("What ringfence {} measured of {server}.", env!("CARGO_PKG_VERSION")),
            facts,
            summary: None,
            groups: vec![Group { name: "Latency".into(), plots: vec![plot] }],
            absent: Vec::new(),
        };
        Ok(page.render()?)
    }
}

fn group(name: &str, rows: &[&Row]) -> Group {
    let requests = |row: &Row| {
        let beside = match row.group {
            IOMMU if row.subject != "off" => format!(", {}", percent(row.ratio)),
            _ if row.is_ours() || row.group == IOMMU => String::new(),
            _ => format!(", {:.2} ×", row.ratio),
        };
        Some((row.iops, row.iops, format!("{}{beside}", Count(row.iops))))
    };
    let latency = |row: &Row| Some((row.p50, row.p99, format!("{}, {}", Time(row.p50), Time(row.p99))));
    let cpu = |row: &Row| row.server_cpu.map(|time| (time, time, Time(time).to_string()));
    let throughput = if name == IOMMU { "Requests a second, by how memory is mapped" } else { "Requests a second" };
    Group {
        name: name.to_owned(),
        plots: vec![
            plot(throughput, "longer is better", rows, requests),
            plot("Latency: half are within, 99 % are within", "shorter is better", rows, latency),
            plot("The server's processor time a request", "shorter is better", rows, cpu),
        ],
    }
}

/// `value` says how long the darker part of a bar is, how long all of it, and what is written beside.
fn plot(name: &str, better: &'static str, rows: &[&Row], value: impl Fn(&Row) -> Option<(f64, f64, String)>) -> Plot {
    let mut loads: Vec<Load> = Vec::new();
    for row in rows {
        let same = rows.iter().filter(|other| other.load == row.load).filter_map(|other| value(other));
        let most = same.map(|(_, whole, _)| whole).fold(0.0, f64::max);
        let Some((inner, whole, text)) = value(row) else { continue };
        let bar = Bar {
            label: row.subject.clone(),
            value: text,
            ours: row.is_ours(),
            width: share(whole, most),
            inner: share(inner, most),
        };
        match loads.last_mut() {
            Some(load) if load.name == row.load => load.bars.push(bar),
            _ => loads.push(Load { name: row.load.clone(), bars: vec![bar] }),
        }
    }
    Plot { name: name.to_owned(), better, loads }
}

/// In percent, and never nothing: a bar is seen.
fn share(value: f64, most: f64) -> f64 {
    if most > 0.0 { (value / most * 100.0).max(0.3) } else { 0.3 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(group: &'static str, subject: &str, ratio: f64) -> Row {
        let (iops, p50, p99) = (1000.0 * ratio, 10.0, 20.0);
        let load = "randread 4 KiB, QD1".into();
        Row { group, load, subject: subject.into(), iops, p50, p99, server_cpu: None, ratio, rounds: Vec::new() }
    }

    #[test]
    fn who_is_ahead_is_told_first() {
        let group = "A file in memory";
        let mut compared = Compared {
            schema: 1,
            version: "1",
            processors: 2,
            rows: vec![
                row(group, "ringfence", 1.0),
                row(group, "other, slow", 0.1),
                row(group, "other, fast", 0.5),
                row(IOMMU, "off", 1.0),
                row(IOMMU, "static", 0.97),
            ],
            absent: vec!["<nobody>".into()],
        };
        let page = compared.page().unwrap();
        for said in ["More requests than everybody else in 1 of 1 loads", ">2.00 ×<", ": 97 % (", "&#60;nobody&#62;"] {
            assert!(page.contains(said), "{said} in {page}");
        }
        compared.rows[2].ratio = 4.0;
        let page = compared.page().unwrap();
        assert!(page.contains("in 0 of 1 loads") && page.contains(r#"class="behind">0.25 ×"#), "{page}");
    }
}
