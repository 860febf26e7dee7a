//! A headless Chromium, driven by the DevTools protocol over a pipe: JSON messages that end in a zero byte.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// It answers within milliseconds; on a machine that boots guests meanwhile, within seconds.
const PATIENCE: Duration = Duration::from_secs(60);

/// A browser with one page.
pub(crate) struct Browser {
    process: Child,
    commands: ChildStdin,
    messages: Receiver<Value>,
    session: Option<String>,
    sent: u64,
    /// What it complained of since it was last asked: exceptions, errors and warnings on the console, broken policies,
    /// and every request for something else than the page.
    complaints: Vec<String>,
}

impl Browser {
    /// Starts `program` with everything that it keeps in `profile`, and its own messages in `log`.
    pub(crate) fn start(program: &str, profile: &Path, log: Stdio) -> Result<Self, String> {
        // The pipe is descriptors 3 and 4, which the shell makes of our 0 and 1.
        let mut process = Command::new("sh")
            .args(["-c", r#"exec "$0" "$@" 3<&0 4>&1 </dev/null >&2"#, program])
            .args(["--headless", "--remote-debugging-pipe", "--disable-gpu", "--disable-quic", "--no-first-run"])
            .args(["--disable-background-networking", "--disable-component-update", "--disable-sync"])
            // Root has no sandbox here; the only page is ours, and it may load nothing.
            .arg("--no-sandbox")
            .arg(format!("--user-data-dir={}", profile.display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .map_err(|error| format!("cannot start {program}: {error}"))?;
        let commands = process.stdin.take().expect("was piped");
        let mut answers = BufReader::new(process.stdout.take().expect("was piped"));
        let (to, messages) = mpsc::channel();
        thread::spawn(move || {
            let mut message = Vec::new();
            while matches!(answers.read_until(0, &mut message), Ok(length) if length > 0) {
                let Ok(value) = serde_json::from_slice(message.strip_suffix(&[0]).unwrap_or(&message)) else { break };
                if to.send(value).is_err() {
                    break;
                }
                message.clear();
            }
        });
        let mut browser = Self { process, commands, messages, session: None, sent: 0, complaints: Vec::new() };
        let page = browser.call("Target.createTarget", json!({"url": "about:blank"}))?;
        let attach = json!({"targetId": page["targetId"], "flatten": true});
        let session = browser.call("Target.attachToTarget", attach)?;
        browser.session = session["sessionId"].as_str().map(str::to_owned);
        for domain in ["Page", "Runtime", "Log", "Network"] {
            browser.call(&format!("{domain}.enable"), json!({}))?;
        }
        Ok(browser)
    }

    /// Calls a method, and waits for its result.
    pub(crate) fn call(&mut self, method: &str, parameters: Value) -> Result<Value, String> {
        self.sent += 1;
        let mut message = json!({"id": self.sent, "method": method, "params": parameters});
        if let Some(session) = &self.session {
            message["sessionId"] = json!(session);
        }
        let text = format!("{message}\0");
        self.commands.write_all(text.as_bytes()).map_err(|error| format!("{method}: the browser is gone: {error}"))?;
        let id = self.sent;
        let answer = self.until(method, |message| message["id"] == id)?;
        match answer.get("error") {
            Some(error) => Err(format!("{method}: {error}")),
            None => Ok(answer["result"].clone()),
        }
    }

    /// Opens a page, and waits until it is loaded. The same address with another hash is a page anew, too.
    pub(crate) fn open(&mut self, url: &str) -> Result<(), String> {
        self.call("Page.navigate", json!({"url": "about:blank"}))?;
        let navigated = self.call("Page.navigate", json!({"url": url}))?;
        if let Some(error) = navigated.get("errorText") {
            return Err(format!("{url}: {error}"));
        }
        self.wait(url, "location.protocol !== 'about:' && document.readyState === 'complete'")
    }

    /// The value of a JavaScript expression in the page.
    pub(crate) fn evaluate(&mut self, expression: &str) -> Result<Value, String> {
        let parameters = json!({"expression": expression, "returnByValue": true, "awaitPromise": true});
        let answer = self.call("Runtime.evaluate", parameters)?;
        match answer.get("exceptionDetails") {
            Some(details) => Err(format!("{expression}: {}", details["exception"]["description"])),
            None => Ok(answer["result"]["value"].clone()),
        }
    }

    /// Waits until an expression holds.
    pub(crate) fn wait(&mut self, what: &str, expression: &str) -> Result<(), String> {
        let started = Instant::now();
        while self.evaluate(expression)? != true {
            if started.elapsed() > PATIENCE {
                return Err(format!("{what}: waited in vain for {expression}"));
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Clicks in the middle of the first element that `selector` finds, as a mouse does.
    pub(crate) fn click(&mut self, selector: &str) -> Result<(), String> {
        let place = self.evaluate(&format!(
            "(() => {{ const it = document.querySelector({selector:?}); it.scrollIntoView({{block: 'center'}}); \
             const {{x, y, width, height}} = it.getBoundingClientRect(); return [x + width / 2, y + height / 2]; }})()"
        ))?;
        for kind in ["mousePressed", "mouseReleased"] {
            let event = json!({"type": kind, "x": place[0], "y": place[1], "button": "left", "clickCount": 1});
            self.call("Input.dispatchMouseEvent", event)?;
        }
        Ok(())
    }

    /// What the browser complained of since this was last asked.
    pub(crate) fn complaints(&mut self) -> Result<Vec<String>, String> {
        // What is under way comes in a moment, and before the answer to this.
        thread::sleep(Duration::from_millis(50));
        self.call("Runtime.evaluate", json!({"expression": "1"}))?;
        Ok(std::mem::take(&mut self.complaints))
    }

    /// The next message that `fits`; all before it are looked at on the way.
    fn until(&mut self, what: &str, fits: impl Fn(&Value) -> bool) -> Result<Value, String> {
        let end = Instant::now() + PATIENCE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let message =
                self.messages.recv_timeout(left).map_err(|_| format!("{what}: the browser does not answer"))?;
            if fits(&message) {
                return Ok(message);
            }
            self.complaints.extend(complaint(&message));
        }
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        self.session = None;
        // It takes its own processes with it; if it does not answer, it has to go all the same.
        if self.call("Browser.close", json!({})).is_err() {
            let _ = self.process.kill();
        }
        let _ = self.process.wait();
    }
}

/// What an event complains of, if it does.
fn complaint(event: &Value) -> Option<String> {
    let of = &event["params"];
    match event["method"].as_str()? {
        "Runtime.exceptionThrown" => Some(format!("exception: {}", of["exceptionDetails"])),
        "Runtime.consoleAPICalled" if ["error", "warning", "assert"].contains(&of["type"].as_str()?) => {
            Some(format!("console: {}", of["args"]))
        }
        "Log.entryAdded" if ["error", "warning"].contains(&of["entry"]["level"].as_str()?) => {
            Some(format!("log: {}", of["entry"]["text"]))
        }
        "Network.requestWillBeSent" if of["type"] != "Document" => Some(format!("request: {}", of["request"]["url"])),
        _ => None,
    }
}

/// The bytes of a screenshot or a PDF.
pub(crate) fn base64(text: &str) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut word, mut bits) = (0u32, 0);
    for digit in text.bytes().take_while(|&digit| digit != b'=') {
        let value = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            other => return Err(format!("byte {other:#x} is not base64")),
        };
        (word, bits) = (word << 6 | u32::from(value), bits + 6);
        if bits >= 8 {
            bits -= 8;
            bytes.push((word >> bits) as u8);
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_are_decoded() {
        for (text, bytes) in [("", ""), ("Zg==", "f"), ("Zm8=", "fo"), ("Zm9v", "foo"), ("Zm9vYmFy", "foobar")] {
            assert_eq!(base64(text), Ok(bytes.into()));
        }
        assert!(base64("Zm9\n").is_err());
    }

    #[test]
    fn an_error_is_told_from_what_is_none() {
        let console = |kind: &str| json!({"method": "Runtime.consoleAPICalled", "params": {"type": kind, "args": []}});
        assert!(complaint(&console("error")).is_some());
        assert!(complaint(&console("log")).is_none());
        assert!(complaint(&json!({"id": 1, "result": {}})).is_none());
    }
}
