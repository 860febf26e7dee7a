//! The machine's side, as far as a test or a tool needs one.
