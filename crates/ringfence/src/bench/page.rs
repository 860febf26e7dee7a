//! Measurements as a page of its own: no script, nothing from elsewhere.

use super::compare::{Compared, Row};
use super::outcome::{Count, Outcome, Time};
use askama::Template;

#[derive(Template)]
#[template(path = "bench.html")]
struct Page {
    title: String,
    about: String,
    groups: Vec<Group>,
    absent: Vec<String>,
}

struct Group {
    name: String,
    plots: Vec<Plot>,
}

/// Horizontal bars, one below the other.
struct Plot {
    name: &'static str,
    /// What a long bar is.
    better: &'static str,
    height: usize,
    bars: Vec<Bar>,
}

struct Bar {
    y: usize,
    text_y: usize,
    label: String,
    width: f64,
    /// Where its value is written.
    value_x: f64,
    value: String,
    /// A heading instead.
    heading: bool,
    ours: bool,
}

/// In the units of the drawing.
const ROW: usize = 20;
const LABEL: f64 = 300.0;
const LONGEST: f64 = 380.0;

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
        let seconds = self.rows.iter().flat_map(|row| &row.rounds).map(|outcome| outcome.seconds).sum::<f64>();
        let page = Page {
            title: "Vhost-user disks, compared".into(),
            about: format!(
                "ringfence {} on {} processors. Medians of {rounds} rounds, each of which measures everything once; \
                 {seconds:.0} s in all. Ratios are to the first of each load, in the same round.",
                self.version, self.processors
            ),
            groups: groups.into_iter().map(|(name, rows)| group(name, &rows)).collect(),
            absent: self.absent.clone(),
        };
        Ok(page.render()?)
    }
}

impl Outcome {
    pub(super) fn page(&self) -> anyhow::Result<String> {
        let row = |subject: &str, value| (subject.to_owned(), value);
        let latency = &self.latency;
        let steps = [
            row("50 %", latency.p50),
            row("90 %", latency.p90),
            row("99 %", latency.p99),
            row("99.9 %", latency.p99_9),
            row("99.99 %", latency.p99_99),
        ];
        let most = steps.iter().map(|(_, value)| *value as f64).fold(0.0, f64::max);
        let bars = steps.iter().enumerate();
        let bars =
            bars.map(|(at, (label, value))| bar(at, label, *value as f64, most, Time(*value as f64).to_string()));
        let plot =
            Plot { name: "Latency", better: "shorter is better", height: steps.len() * ROW + 4, bars: bars.collect() };
        let page = Page {
            title: self.shape.to_string(),
            about: self.to_string(),
            groups: vec![Group { name: self.shape.to_string(), plots: vec![plot] }],
            absent: Vec::new(),
        };
        Ok(page.render()?)
    }
}

fn group(name: &str, rows: &[&Row]) -> Group {
    let requests = |row: &Row| Some((row.iops, format!("{} ({:.2} ×)", Count(row.iops), row.ratio)));
    let latency = |row: &Row| Some((row.p99, format!("{}, half within {}", Time(row.p99), Time(row.p50))));
    let cpu = |row: &Row| row.server_cpu.map(|time| (time, Time(time).to_string()));
    Group {
        name: name.to_owned(),
        plots: vec![
            plot("Requests a second", "longer is better", rows, requests),
            plot("Latency: 99 % are within", "shorter is better", rows, latency),
            plot("The server's processor time a request", "shorter is better", rows, cpu),
        ],
    }
}

/// Bars of different loads have scales of their own: they are not to be compared.
fn plot(
    name: &'static str,
    better: &'static str,
    rows: &[&Row],
    value: impl Fn(&Row) -> Option<(f64, String)>,
) -> Plot {
    let mut bars = Vec::new();
    let mut load = "";
    for row in rows {
        if row.load != load {
            load = &row.load;
            bars.push(Bar { heading: true, ..bar(bars.len(), load, 0.0, 1.0, String::new()) });
        }
        let Some((number, text)) = value(row) else { continue };
        let same = rows.iter().filter(|other| other.load == row.load).filter_map(|other| value(other));
        let most = same.map(|(number, _)| number).fold(0.0, f64::max);
        let ours = row.subject == "ringfence";
        bars.push(Bar { ours, ..bar(bars.len(), &row.subject, number, most, text) });
    }
    Plot { name, better, height: bars.len() * ROW + 4, bars }
}

fn bar(at: usize, label: &str, value: f64, most: f64, text: String) -> Bar {
    let width = if most > 0.0 { value / most * LONGEST } else { 0.0 };
    Bar {
        y: at * ROW + 3,
        text_y: at * ROW + 16,
        label: label.to_owned(),
        width: width.max(1.0),
        value_x: LABEL + width + 6.0,
        value: text,
        heading: false,
        ours: false,
    }
}
