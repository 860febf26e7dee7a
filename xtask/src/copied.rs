//! Whether a guest did to its disk what guests do: read all, write half, and read all again.

use std::fmt::Debug;

use ringfence_guests::{Guest, Image, ImageState};

/// Holds what a guest told against what it should have.
pub(crate) fn hold(what: &str, told: Option<&str>, wanted: &str, errors: &impl Debug) -> Result<(), String> {
    match told == Some(wanted) {
        true => Ok(()),
        false => Err(format!("{what} is {}, not {wanted} {errors:?}", told.unwrap_or("not told"))),
    }
}

/// Holds what it told of its copying against `image`, as that was and as it is.
pub(crate) fn all_of(guest: &Guest, image: &Image) -> Result<(), String> {
    hold("SHA-256 of what it read", guest.read.as_deref(), image.initial(), &guest.errors)?;
    hold("SHA-256 of what it read back", guest.written.as_deref(), image.expected(), &guest.errors)?;
    match image.state().map_err(|error| error.to_string())? {
        ImageState::Written => Ok(()),
        state => Err(format!("the image on the host is not what it wrote: {state:?}")),
    }
}

/// Holds that a guest that did not come to its disk left `image` alone.
pub(crate) fn nothing_of(image: &Image) -> Result<(), String> {
    match image.state().map_err(|error| error.to_string())? {
        ImageState::Untouched => Ok(()),
        state => Err(format!("the image was written to: {state:?}")),
    }
}
