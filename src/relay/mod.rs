//! The relay.

use crate::config::Config;
use crate::exit::Exit;

/// Relays until it is told to stop.
pub fn run(_config: Config) -> Exit {
    Exit::Done
}
