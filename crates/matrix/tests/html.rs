//! The report as a text. That it works in a browser is tested by `cargo xtask report`.

use ringfence_matrix::record::{Observed, Record, Source, Table};
use ringfence_matrix::{Genuine, Matrix, Verdict, html};
use std::collections::HashSet;

/// What real guests said, hostile in every text.
fn hostile() -> Vec<Record> {
    Table::from_json(include_str!("data/real.json")).unwrap().cells
}

fn both() -> Table {
    let mut table = Matrix::run(&Default::default(), &Genuine).table();
    table.cells.extend(hostile());
    table
}

/// What stands between `before` and the next `after`, everywhere.
fn between<'p>(page: &'p str, before: &'p str, after: &'p str) -> impl Iterator<Item = &'p str> {
    page.split(before).skip(1).map(move |rest| rest.split(after).next().unwrap())
}

#[test]
fn every_cell_is_there_and_every_link_leads_to_one() {
    let table = both();
    let page = html::page(&table);
    let cells: Vec<&str> = between(&page, r#"<details class="cell" id=""#, "\"").collect();
    assert_eq!(cells.len(), table.cells.len());
    let ids: Vec<&str> = between(&page, " id=\"", "\"").collect();
    let unique: HashSet<&str> = ids.iter().copied().collect();
    assert_eq!(unique.len(), ids.len());
    for link in between(&page, "href=\"#", "\"") {
        assert!(unique.contains(link) || link.starts_with("verdict="), "{link} leads nowhere");
    }
}

#[test]
fn danger_is_named_before_anything_else() {
    let table = both();
    let page = html::page(&table);
    let top = page.split("id=\"map\"").next().unwrap();
    let dangerous =
        |cell: &&Record| [Verdict::Corrupts, Verdict::Bypasses].map(Observed::Verdict).contains(&cell.observed);
    assert_eq!(between(top, "<a href=\"#", "\"").count(), table.cells.iter().filter(dangerous).count());
    assert!(top.contains("8 cells corrupt memory, 1 of them real"), "{top}");
}

#[test]
fn what_is_not_so_comes_first() {
    let mut table = Matrix::run(&"platform=x86".parse().unwrap(), &Genuine).table();
    assert!(!html::page(&table).contains("id=\"unexpected\""));
    let cell = table.cells.iter_mut().find(|cell| cell.device == "old-physical").unwrap();
    (cell.unexpected, cell.agrees) = (true, Some(false));
    cell.proposal.says = ringfence_matrix::record::Says::Decided;
    let page = html::page(&table);
    let (top, cells) = page.split_once("class=\"dangers\"").unwrap();
    assert!(top.contains("href=\"#embedded.x86.old.old-physical\"") && cells.contains(">NOT SO<"));
}

/// A guest's words are text, wherever they stand, and the page asks nobody for anything.
#[test]
fn nothing_that_a_guest_says_is_markup() {
    let page = html::page(&both());
    assert_eq!(page.matches("<script").count(), 1);
    assert_eq!(page.matches("<img").count(), 0);
    assert!(page.contains("&#60;script&#62;window.hacked=1"), "escaped, not lost");
    // No attribute ends where a guest says so.
    assert!(!page.contains("\"><script") && !page.contains("onerror=\"window"));
    for outside in ["http:", "https:", "@import", "url(", "<link", "<iframe", "<object"] {
        assert!(!page.contains(outside), "{outside}");
    }
    assert!(page.contains("default-src &#39;none&#39;") || page.contains("default-src 'none'"));
}

/// As many cells as a real run has, each with as much evidence.
#[test]
fn a_large_page_is_still_a_page() {
    let mut table = both();
    let worst = hostile().into_iter().find(|cell| cell.platform == "x86-amd").unwrap();
    for number in 0..160 {
        let mut cell = worst.clone();
        cell.device = format!("device-{number}");
        cell.evidence.insert(
            "guest_log".into(),
            vec!["[   12.345678] a line of a guest's log, as long as such lines are"; 12].into(),
        );
        table.cells.push(cell);
    }
    assert!(table.cells.iter().filter(|cell| cell.source == Source::Real).count() > 160);
    let size = html::page(&table).len();
    assert!(size < 1 << 20, "{size} bytes");
}
