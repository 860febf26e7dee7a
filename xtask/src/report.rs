//! The report in a browser, as a reader has it: does it load, do its filters work, is it readable on a phone and in print?

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use ringfence_guests::{Cache, apt};
use serde_json::{Value, json};

use crate::Workspace;
use crate::browser::{Browser, base64};
use crate::steps::{Log, Pass, StepResult, say};

/// By Debian's name and by others'.
const PROGRAMS: [&str; 3] = ["chromium", "chromium-browser", "google-chrome"];
const PACKAGES: [&str; 1] = ["chromium"];

/// What real guests said, hostile in every text.
const RUN: &str = "crates/matrix/tests/data/real.json";

/// The stored run that docs/compatibility.md shows.
const STORED: &str = "docs/compatibility.json";

/// Makes the page, and reads it. Pictures of it stay in target/xtask/report.
pub(crate) fn run(workspace: &Workspace, log: &mut Log) -> StepResult {
    let program = match program(workspace) {
        Ok(program) => program,
        Err(reason) => return Ok(skipped(&reason)),
    };
    let folder = folder(workspace)?;
    let [page, data] = ["page.html", "page.json"].map(|name| folder.join(name));
    write(workspace, log, "html", RUN, &page)?;
    write(workspace, log, "json", RUN, &data)?;
    let data = fs::read(&data).map_err(|error| format!("{}: {error}", data.display()))?;
    let data: Value = serde_json::from_slice(&data).map_err(|error| format!("{RUN} as JSON: {error}"))?;
    let cells = data["cells"].as_array().ok_or("the JSON has no cells")?;
    with_browser(program, &folder, |browser| {
        let mut reader = Reader { browser, url: format!("file://{}", page.display()), cells, checks: 0 };
        reader.desktop(&folder)?;
        reader.filters()?;
        reader.cells()?;
        reader.phone(&folder)?;
        reader.print(&folder)?;
        reader.without_scripts()?;
        Ok(Pass::Whole(format!("{} checks, pictures in {}", reader.checks, folder.display())))
    })
}

/// Takes a picture of the page that shows the stored run.
pub(crate) fn picture(workspace: &Workspace, log: &mut Log, path: &Path) -> StepResult {
    let program = match program(workspace) {
        Ok(program) => program,
        Err(reason) => return Ok(skipped(&reason)),
    };
    let folder = folder(workspace)?;
    let page = folder.join("stored.html");
    write(workspace, log, "html", STORED, &page)?;
    with_browser(program, &folder, |browser| {
        let mut reader = Reader { browser, url: format!("file://{}", page.display()), cells: &[], checks: 0 };
        reader.browser.call("Emulation.setScrollbarsHidden", json!({"hidden": true}))?;
        reader.window(1000, 720, false)?;
        reader.open("")?;
        reader.picture(path)?;
        Ok(Pass::Whole(path.display().to_string()))
    })
}

fn folder(workspace: &Workspace) -> Result<PathBuf, String> {
    let folder = workspace.target.join("xtask/report");
    fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    Ok(folder)
}

/// The embedded matrix and the real one of `from`, as a user makes it.
fn write(workspace: &Workspace, log: &mut Log, format: &str, from: &str, to: &Path) -> Result<(), String> {
    let mut command = Command::new(workspace.ringfence());
    command.args(["matrix", "--from", from, "--format", format, "--output"]).arg(to);
    log.run(command.current_dir(&workspace.root))
}

fn with_browser(program: &str, folder: &Path, work: impl FnOnce(Browser) -> StepResult) -> StepResult {
    let profile = tempfile::tempdir().map_err(|error| format!("no folder for the browser: {error}"))?;
    let messages = folder.join("chromium.log");
    let messages = File::create(&messages).map_err(|error| format!("{}: {error}", messages.display()))?;
    work(Browser::start(program, profile.path(), Stdio::from(messages))?)
}

/// A Chromium: the machine's, or one that apt adds.
pub(crate) fn program(workspace: &Workspace) -> Result<&'static str, String> {
    let present = || PROGRAMS.into_iter().find(|program| apt::is_in_path(program));
    if let Some(program) = present() {
        return Ok(program);
    }
    let progress = |line: &str| say(&format!("    {line}"));
    let cache = Cache::open(&workspace.target.join("guests"), &progress).map_err(|error| error.to_string())?;
    apt::install(&cache, "Chromium", &PACKAGES)?;
    present().ok_or_else(|| "apt installed it, yet it is not in PATH".to_owned())
}

fn skipped(reason: &str) -> Pass {
    let rule = "!".repeat(72);
    say(&format!("{rule}\n!! SKIPPED: the report in a browser. There is no Chromium: {reason}."));
    say(&format!("!! As root run: {}\n{rule}", apt::command(&PACKAGES)));
    Pass::Skipped("the report in a browser".to_owned())
}

/// Someone before the page, who knows what it should show.
struct Reader<'d> {
    browser: Browser,
    url: String,
    cells: &'d [Value],
    checks: usize,
}

/// Cells that are to be seen, by the page's own elements.
const SHOWN: &str = "[...document.querySelectorAll('.cell')].filter((cell) => cell.checkVisibility()).length";

impl Reader<'_> {
    fn expect(&mut self, what: &str, expression: &str, expected: impl Into<Value>) -> Result<(), String> {
        let (found, expected) = (self.browser.evaluate(expression)?, expected.into());
        self.checks += 1;
        if found == expected { Ok(()) } else { Err(format!("{what}: {expression} is {found}, not {expected}")) }
    }

    /// Opens the page anew, with this hash.
    fn open(&mut self, hash: &str) -> Result<(), String> {
        let url = format!("{}{hash}", self.url);
        self.browser.open(&url)
    }

    /// Nothing was complained of, and nothing fetched.
    fn quiet(&mut self, when: &str) -> Result<(), String> {
        self.checks += 1;
        match self.browser.complaints()? {
            complaints if complaints.is_empty() => Ok(()),
            complaints => Err(format!("{when}, the browser complains: {}", complaints.join("; "))),
        }
    }

    fn count(&self, fits: impl Fn(&Value) -> bool) -> usize {
        self.cells.iter().filter(|cell| fits(cell)).count()
    }

    fn window(&mut self, width: u32, height: u32, mobile: bool) -> Result<(), String> {
        let size = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile});
        self.browser.call("Emulation.setDeviceMetricsOverride", size).map(drop)
    }

    fn picture(&mut self, path: &Path) -> Result<(), String> {
        let picture = self.browser.call("Page.captureScreenshot", json!({"format": "png"}))?;
        save(path, &picture)
    }

    /// Everything is there, and the danger on top.
    fn desktop(&mut self, folder: &Path) -> Result<(), String> {
        self.window(1280, 900, false)?;
        self.open("")?;
        let total = self.cells.len();
        self.expect("all cells", "document.querySelectorAll('.cell').length", total)?;
        self.expect("all are shown", SHOWN, total)?;
        self.expect("the count", "document.getElementById('shown').textContent", format!("{total} of {total} cells"))?;
        for (class, verdict) in [("corrupts", "corrupts"), ("past", "works-bypassing")] {
            let links = format!("document.querySelectorAll('.card.{class} a').length");
            self.expect("each danger is named", &links, self.count(|cell| cell["observed"] == verdict))?;
            let top = format!("document.querySelector('.card.{class} a').getBoundingClientRect().bottom < innerHeight");
            self.expect("danger is in the first window", &top, true)?;
        }
        self.expect(
            "what a guest prints is no script",
            "document.scripts.length === 1 && !('hacked' in window)",
            true,
        )?;
        self.expect("nor any other element", "document.querySelectorAll('img').length", 0)?;
        self.expect("nothing is too wide", "document.documentElement.scrollWidth <= innerWidth", true)?;
        self.picture(&folder.join("desktop.png"))?;
        self.quiet("on a desktop")
    }

    /// Each filter leaves what it says, and the address says which.
    fn filters(&mut self) -> Result<(), String> {
        let corrupts = self.count(|cell| cell["observed"] == "corrupts");
        let danger = self.count(|cell| cell["observed"] == "corrupts" || cell["observed"] == "works-bypassing");
        let real = self.count(|cell| cell["source"] == "real");
        let xen = self.count(|cell| cell["platform"] == "xen" || cell["stands_for"]["platform"] == "xen");
        let amd = self.count(|cell| cell["platform"] == "x86-amd");
        let refused = self.count(|cell| cell["driver"] == "new" && cell["device"] == "old-physical");

        for (name, value, expected) in [
            ("verdict", "corrupts", corrupts),
            ("source", "real", real),
            ("platform", "xen", xen),
            ("platform", "x86-amd", amd),
        ] {
            self.open("")?;
            self.choose(name, value)?;
            self.shows(&format!("#{name}={value}"), expected)?;
        }
        // Two at once, and back again.
        self.open("")?;
        self.choose("driver", "new")?;
        self.choose("device", "old-physical")?;
        self.shows("#driver=new&device=old-physical", refused)?;
        self.browser.click("#filters [type=reset]")?;
        self.shows("#all", self.cells.len())?;

        self.browser.click("#filters [name=danger]")?;
        self.shows("#danger=only", danger)?;
        let groups = "[...document.querySelectorAll('.group, .row:not(.head)')].every((place) => \
                      place.checkVisibility() === !!place.querySelector('.cell:not([hidden])'))";
        self.expect("no empty rows", groups, true)?;

        // The link in the table of verdicts is a filter.
        self.browser.click(".counts a[href='#verdict=corrupts']")?;
        self.shows("#verdict=corrupts", corrupts)?;
        self.expect("the form follows", "document.forms[0].elements.verdict.value", "corrupts")?;

        // Words are looked for in evidence, in whatever case.
        self.open("#source=real")?;
        self.browser.click("#filters [name=text]")?;
        self.browser.call("Input.insertText", json!({"text": "PAGE fault"}))?;
        self.shows(
            "#source=real&text=PAGE+fault",
            self.count(|cell| cell["evidence"].to_string().contains("page fault")),
        )?;
        self.open("#text=nosuchthing")?;
        self.shows("#text=nosuchthing", 0)?;
        self.expect("that is said", "document.getElementById('nothing').checkVisibility()", true)?;

        // An address alone is enough; what it does not know does no harm.
        self.open("#platform=xen&colour=red")?;
        self.shows("#platform=xen&colour=red", xen)?;
        self.quiet("with filters")
    }

    fn choose(&mut self, name: &str, value: &str) -> Result<(), String> {
        let field = format!("document.forms[0].elements.{name}");
        let chosen = format!(
            "({field}.value = {value:?}, {field}.dispatchEvent(new Event('input', {{bubbles: true}})), {field}.value)"
        );
        self.expect("the form has it", &chosen, value)?;
        self.browser.wait("the address", &format!("location.hash.includes('{name}=')"))
    }

    fn shows(&mut self, hash: &str, cells: usize) -> Result<(), String> {
        self.browser.wait("the address", &format!("location.hash === {hash:?}"))?;
        self.browser
            .wait("the page", "new Promise((done) => requestAnimationFrame(() => setTimeout(() => done(true))))")?;
        self.expect(hash, SHOWN, cells)?;
        let text = "document.getElementById('shown').textContent";
        self.expect(hash, text, format!("{cells} of {} cells", self.cells.len()))
    }

    /// A cell opens to its evidence, by a click on it and by a link to it.
    fn cells(&mut self) -> Result<(), String> {
        let id = "real.x86-amd.linux.serve-blk-offer";
        let cell = format!("document.getElementById('{id}')");
        let evidence = format!("{cell}.querySelector('.evidence').checkVisibility({{contentVisibilityAuto: true}})");
        self.open("")?;
        self.expect("closed at first", &evidence, false)?;
        self.browser.click(&format!("[id='{id}'] > summary"))?;
        self.expect("opens", &evidence, true)?;
        let seen = format!("{cell}.innerText");
        for text in ["Kernel panic - not syncing: \"><script>window.hacked=1</script>", "addresses seen", "and 22 more"]
        {
            self.expect("shows what was seen", &format!("{seen}.includes({})", json!(text)), true)?;
        }
        // A link from the summary finds a cell that a filter hides.
        self.open("#verdict=skipped")?;
        self.expect("hidden by the filter", &format!("{cell}.checkVisibility()"), false)?;
        self.browser.click(&format!(".card.corrupts a[href='#{id}']"))?;
        self.browser.wait("the cell opens", &evidence)?;
        let there =
            format!("{cell}.getBoundingClientRect().top < innerHeight && {cell}.getBoundingClientRect().bottom > 0");
        self.expect("and is in view", &there, true)?;
        self.quiet("with cells open")
    }

    /// 360 pixels are enough, with everything open, too.
    fn phone(&mut self, folder: &Path) -> Result<(), String> {
        self.window(360, 740, true)?;
        self.open("")?;
        self.picture(&folder.join("phone.png"))?;
        for when in ["closed", "open"] {
            let wide = "[...document.querySelectorAll('body *')].filter((it) => it.getBoundingClientRect().right > 360.5 \
                        && !it.closest('.wide')).map((it) => `${it.tagName}.${it.className}`).slice(0, 5)";
            self.expect(when, wide, json!([]))?;
            self.expect(when, "document.documentElement.scrollWidth", 360)?;
            self.expect(when, "innerWidth", 360)?;
            self.expect(
                when,
                "document.querySelectorAll('.cell[open]').length",
                if when == "open" { self.cells.len() } else { 0 },
            )?;
            self.browser.click("#filters [name=open]")?;
        }
        self.open("#real.x86-amd.linux.serve-blk-offer")?;
        self.picture(&folder.join("phone-cell.png"))?;
        self.quiet("on a phone")
    }

    /// No filters, and evidence only where it was opened.
    fn print(&mut self, folder: &Path) -> Result<(), String> {
        self.window(1000, 900, false)?;
        self.open("#embedded.xen.old.old-emulated")?;
        self.browser.call("Emulation.setEmulatedMedia", json!({"media": "print"}))?;
        self.expect("no filters", "document.getElementById('filters').checkVisibility()", false)?;
        let evidence = "[...document.querySelectorAll('.evidence')].filter((evidence) => \
                        evidence.checkVisibility({contentVisibilityAuto: true})).length";
        self.expect("the evidence that was opened", evidence, 1)?;
        let pdf = self.browser.call("Page.printToPDF", json!({"printBackground": false, "preferCSSPageSize": true}))?;
        save(&folder.join("print.pdf"), &pdf)?;
        self.picture(&folder.join("print.png"))?;
        self.browser.call("Emulation.setEmulatedMedia", json!({"media": ""}))?;
        self.quiet("in print")
    }

    /// Without JavaScript everything is there but the filters.
    fn without_scripts(&mut self) -> Result<(), String> {
        self.browser.call("Emulation.setScriptExecutionDisabled", json!({"value": true}))?;
        self.window(1280, 900, false)?;
        self.open("")?;
        self.expect("all cells", SHOWN, self.cells.len())?;
        self.expect("no filters", "document.getElementById('filters').checkVisibility()", false)?;
        self.quiet("without scripts")
    }
}

fn save(path: &Path, answer: &Value) -> Result<(), String> {
    let bytes = base64(answer["data"].as_str().unwrap_or_default())?;
    fs::write(path, bytes).map_err(|error| format!("{}: {error}", path.display()))
}
