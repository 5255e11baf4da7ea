//! Parse, start the logger, run, exit code; nothing else.

fn main() {}
