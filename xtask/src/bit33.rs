//! Invariant 1: feature bit 33 is named in `policy` alone.

use std::fs;
use std::path::{Path, PathBuf};

use crate::Workspace;
use crate::steps::{Pass, StepResult};

/// The crate that may name it.
const POLICY: &str = "policy";

/// Scans the sources of every crate but the policy.
pub(crate) fn run(workspace: &Workspace) -> StepResult {
    let crates = workspace.root.join("crates");
    let mut files = Vec::new();
    sources(&crates, &mut files)?;
    let allowed = crates.join(POLICY);
    let mut scanned = 0;
    let mut found = Vec::new();
    for file in files.iter().filter(|file| !file.starts_with(&allowed)) {
        let text = fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()))?;
        scanned += 1;
        let shown = file.strip_prefix(&workspace.root).unwrap_or(file).display().to_string();
        found.extend(namings(&text).into_iter().map(|(line, what)| format!("{shown}:{line} names {what}")));
    }
    match found.is_empty() {
        true => Ok(Pass::Whole(format!("{scanned} files"))),
        false => Err(format!(
            "bit 33 belongs to crates/{POLICY}; take an Addressing from there instead:\n        {}",
            found.join("\n        ")
        )),
    }
}

/// Rust files below each crate's `src`.
fn sources(crates: &Path, files: &mut Vec<PathBuf>) -> Result<(), String> {
    for member in list(crates)? {
        below(&member.join("src"), files)?;
    }
    Ok(())
}

fn below(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), String> {
    for path in list(folder)? {
        if path.is_dir() {
            below(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

fn list(folder: &Path) -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let mut paths: Vec<_> = entries.filter_map(|entry| entry.ok().map(|entry| entry.path())).collect();
    paths.sort();
    Ok(paths)
}

/// The lines whose code names the bit, by name or by number. Text in comments
/// and in strings is free to explain it.
fn namings(source: &str) -> Vec<(usize, &'static str)> {
    let code = code(source);
    code.lines().enumerate().filter_map(|(index, line)| Some((index + 1, naming(line)?))).collect()
}

fn naming(line: &str) -> Option<&'static str> {
    let squeezed: String = line.chars().filter(|char| !char.is_whitespace() && *char != '_').collect();
    let has = |what: &str| squeezed.to_ascii_uppercase().contains(what);
    if has("ACCESSPLATFORM") {
        return Some("ACCESS_PLATFORM");
    }
    // Lower case is QEMU's property of that name; the constant is upper case.
    if squeezed.contains("IOMMUPLATFORM") {
        return Some("IOMMU_PLATFORM");
    }
    let shifted = ["1<<33", "1U64<<33", "1U128<<33", "0X200000000", "8589934592"];
    shifted.iter().any(|number| has_number(&squeezed.to_ascii_uppercase(), number)).then_some("1 << 33")
}

/// Whether `number` occurs and no digit continues it on either side.
fn has_number(line: &str, number: &str) -> bool {
    let digit = |char: Option<char>| char.is_some_and(|char| char.is_ascii_hexdigit());
    line.match_indices(number)
        .any(|(at, _)| !digit(line[..at].chars().next_back()) && !digit(line[at + number.len()..].chars().next()))
}

/// The source with comments and the text of strings blanked, line by line.
fn code(source: &str) -> String {
    let mut code = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(char) = rest.chars().next() {
        let length = token(rest).unwrap_or(0);
        let blank = length > 0;
        let length = length.max(char.len_utf8());
        let (text, after) = rest.split_at(length);
        match blank {
            true => code.extend(text.chars().filter(|char| *char == '\n')),
            false => code.push_str(text),
        }
        rest = after;
    }
    code
}

/// The length of the comment, string or quoted character that begins here.
fn token(rest: &str) -> Option<usize> {
    if rest.starts_with("//") {
        return Some(rest.find('\n').unwrap_or(rest.len()));
    }
    if rest.starts_with("/*") {
        return Some(block_comment(rest));
    }
    if let Some(raw) = rest.strip_prefix('r') {
        let hashes = raw.bytes().take_while(|byte| *byte == b'#').count();
        if raw[hashes..].starts_with('"') {
            let close = format!("\"{}", "#".repeat(hashes));
            let start = 1 + hashes + 1;
            return Some(rest[start..].find(&close).map_or(rest.len(), |at| start + at + close.len()));
        }
    }
    if rest.starts_with('"') {
        return Some(quoted(rest, '"'));
    }
    // 'a' and '\n' are characters; 'a without a close is a lifetime.
    let mut chars = rest.strip_prefix('\'')?.chars();
    match (chars.next()?, chars.next()?) {
        ('\\', _) => Some(quoted(rest, '\'')),
        (char, '\'') => Some(2 + char.len_utf8()),
        _ => None,
    }
}

/// The length up to and with the closing `quote`, past escapes.
fn quoted(rest: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, char) in rest.char_indices().skip(1) {
        match char {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if char == quote => return at + char.len_utf8(),
            _ => {}
        }
    }
    rest.len()
}

/// The length of a block comment, nested ones included.
fn block_comment(rest: &str) -> usize {
    let (mut depth, mut at) = (0_u32, 0);
    let bytes = rest.as_bytes();
    while at < bytes.len() {
        match &bytes[at..(at + 2).min(bytes.len())] {
            b"/*" => (depth, at) = (depth + 1, at + 2),
            b"*/" => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            return at;
        }
    }
    rest.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_that_names_the_bit_is_found() {
        for line in [
            "let f = VIRTIO_F_ACCESS_PLATFORM;",
            "Features::AccessPlatform",
            "const VIRTIO_F_IOMMU_PLATFORM: u32 = 0;",
            "let f = 1 << 33;",
            "let f = 1u64<<33;",
            "let f = 1_u64 << 33;",
            "if f & 0x2_0000_0000 != 0 {",
        ] {
            assert_eq!(namings(line).len(), 1, "{line}");
        }
    }

    #[test]
    fn words_about_it_and_other_numbers_are_free() {
        for line in [
            "// ACCESS_PLATFORM, 1 << 33",
            "/* 1 << 33 /* nested */ ACCESS_PLATFORM */ let x = 1;",
            "let s = \"ACCESS_PLATFORM \\\" 1 << 33\";",
            "let s = r#\"ACCESS_PLATFORM \" 1 << 33\"#;",
            "let c = '\"'; // ACCESS_PLATFORM",
            "fn f<'a>(x: &'a str) {} // 1 << 33",
            "format!(\"iommu_platform={x}\")",
            "let x = 1 << 333; let y = 11 << 33; let z = 0x2_0000_0000_0;",
        ] {
            assert_eq!(namings(line), [], "{line}");
        }
    }

    #[test]
    fn lines_are_counted_through_what_is_blanked() {
        let source = "/* a\n b */\nlet s = \"x\n y\";\nlet f = 1 << 33;\n";
        assert_eq!(namings(source), [(5, "1 << 33")]);
    }

    #[test]
    fn this_workspace_keeps_it() {
        run(&Workspace::here()).unwrap();
    }
}
