//! How a program is linked that nobody loads but QEMU, and the guide's code.

use std::path::PathBuf;
use std::{env, fs};

/// Whose first piece of Rust is the program `guide`.
const GUIDE: &str = "../../docs/driver.md";

fn main() {
    let script = format!("{}/link.ld", env::var("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    for argument in ["-nostdlib", "-nostartfiles", "-static", "-no-pie", "-Wl,--build-id=none", "-T", &script] {
        println!("cargo:rustc-link-arg-bins={argument}");
    }
    let guide = fs::read_to_string(GUIDE).expect("the guide is in the repository");
    let code = guide.split("```").find_map(|piece| piece.strip_prefix("rust")?.split_once('\n'));
    let (_, code) = code.expect("the guide has some code");
    let to = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it")).join("guide.rs");
    fs::write(to, code).expect("cargo has made the folder");
    for file in ["link.ld", GUIDE] {
        println!("cargo:rerun-if-changed={file}");
    }
}
