//! Evidence as the page shows it: whatever has a name, in whatever shape it comes.

use crate::record::Record;
use crate::sides::{device_title, driver_title, platform_title};
use serde_json::{Map, Value};

/// How many lines of one piece of evidence a page shows; all of them are in the JSON.
const LINES: usize = 60;
/// How many characters of one text.
const CHARACTERS: usize = 4000;

/// What evidence is called, in the order in which it is shown. Names that are not here follow, as they are.
const LABELS: &[(&str, &str)] = &[
    ("flaws", "what is wrong"),
    ("damage", "damage"),
    ("flag", "the flag"),
    ("offered", "features offered"),
    ("taken", "features taken"),
    ("driver", "the driver"),
    ("device", "the device"),
    ("addresses", "addresses seen"),
    ("ring", "the ring"),
    ("guest_memory", "the guest's memory"),
    ("forbidden_page", "forbidden page"),
    ("iommu", "the IOMMU"),
    ("iommu_group", "IOMMU group"),
    ("faults", "IOMMU faults"),
    ("server", "the server"),
    ("disk", "the disk"),
    ("status", "device status"),
    ("guest_log", "the guest's last lines"),
    ("kernel", "kernel"),
    ("qemu", "QEMU"),
    ("command", "command"),
    ("seconds", "seconds"),
    ("date", "ran on"),
    ("log", "whole log"),
];

/// A piece of evidence.
#[derive(Clone)]
pub(super) struct Entry {
    pub(super) label: String,
    pub(super) body: Body,
    /// Lines or rows that are not shown.
    pub(super) left_out: usize,
}

#[derive(Clone)]
pub(super) enum Body {
    Text(String),
    Lines(Vec<String>),
    /// The names of the columns, and the rows.
    Rows(Vec<String>, Vec<Vec<String>>),
}

/// The evidence of a cell, what is known by name first. `null` says nothing, and is not shown.
pub(super) fn entries(cell: &Record) -> Vec<Entry> {
    let known = LABELS.iter().filter_map(|(name, label)| Some((*label, cell.evidence.get(*name)?)));
    let known = known.map(|(label, value)| (label.to_owned(), value));
    let others = cell.evidence.iter().filter(|(name, _)| !LABELS.iter().any(|(known, _)| known == name));
    let others = others.map(|(name, value)| (name.replace('_', " "), value));
    let stands_for = cell.stands_for.iter().map(|place| Entry {
        label: "stands for".into(),
        body: Body::Text(format!(
            "{}: {} × {}",
            platform_title(&place.platform),
            driver_title(&place.driver),
            device_title(&place.device)
        )),
        left_out: 0,
    });
    stands_for.chain(known.chain(others).filter_map(|(label, value)| entry(label, value))).collect()
}

fn entry(label: String, value: &Value) -> Option<Entry> {
    let (body, left_out) = match value {
        Value::Null => return None,
        Value::Array(items) if items.is_empty() => (Body::Text("none".into()), 0),
        Value::Array(items) => {
            let shown = &items[..items.len().min(LINES)];
            let objects: Option<Vec<&Map<String, Value>>> = shown.iter().map(Value::as_object).collect();
            let body = objects.map_or_else(|| Body::Lines(shown.iter().map(text).collect()), rows);
            (body, items.len() - shown.len())
        }
        Value::Object(object) => {
            (Body::Lines(object.iter().map(|(name, value)| format!("{name}: {}", text(value))).collect()), 0)
        }
        value => (Body::Text(text(value)), 0),
    };
    Some(Entry { label, body, left_out })
}

/// Objects as a table: a column for each name that any of them has.
fn rows(objects: Vec<&Map<String, Value>>) -> Body {
    let mut head: Vec<&String> = Vec::new();
    for name in objects.iter().flat_map(|object| object.keys()) {
        if !head.contains(&name) {
            head.push(name);
        }
    }
    let rows =
        objects.iter().map(|object| head.iter().map(|name| object.get(*name).map_or(String::new(), text)).collect());
    Body::Rows(head.iter().map(|name| name.replace('_', " ")).collect(), rows.collect())
}

/// A value in a line or more; what is too long ends in `…`.
fn text(value: &Value) -> String {
    let text = match value {
        Value::Null => "–".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    match text.char_indices().nth(CHARACTERS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn of(value: Value) -> Option<Entry> {
        entry("name".into(), &value)
    }

    #[test]
    fn every_shape_is_shown() {
        let shown = |value| match of(value).unwrap().body {
            Body::Text(text) => text,
            Body::Lines(lines) => lines.join("|"),
            Body::Rows(head, rows) => {
                let rows = rows.iter().map(|row| row.join(","));
                std::iter::once(head.join(",")).chain(rows).collect::<Vec<_>>().join("|")
            }
        };
        assert!(of(Value::Null).is_none());
        assert_eq!(shown(json!("text")), "text");
        assert_eq!(shown(json!(3)), "3");
        assert_eq!(shown(json!([])), "none");
        assert_eq!(shown(json!(["a", "b"])), "a|b");
        assert_eq!(shown(json!([1, {"a": 2}])), "1|{\"a\":2}");
        assert_eq!(shown(json!({"a": 1, "b": [2]})), "a: 1|b: [2]");
        assert_eq!(shown(json!([{"a_b": 1}, {"c": null, "a_b": "x"}])), "a b,c|1,|x,–");
    }

    #[test]
    fn what_is_long_is_cut_and_that_is_said() {
        let entry = of(vec!["line"; LINES + 3].into()).unwrap();
        assert_eq!(entry.left_out, 3);
        assert_eq!(text(&"ä".repeat(CHARACTERS).into()).chars().count(), CHARACTERS);
        assert!(text(&"ä".repeat(CHARACTERS + 1).into()).ends_with("ä…"));
    }
}
