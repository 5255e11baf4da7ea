//! Ports that nobody else is using.
//!
//! They lie below the kernel's ephemeral range: a port from inside it may be taken, while its server is
//! down, by any outgoing connection, even by a client that tries to reach that very server and then
//! finds itself at the other end. Within the test program no port is given out twice; a race with
//! another program shows as "address in use", and the fixtures then ask for another.

use super::process::lock;
use std::collections::HashSet;
use std::net::TcpListener;
use std::ops::Range;
use std::sync::{LazyLock, Mutex};

/// Below Linux' default ephemeral range (32768 to 60999), above the well-known ports of servers.
const RANGE: Range<u16> = 15_000..32_000;

/// How often a fixture tries another port when its server finds the first one taken.
pub const TRIES: usize = 10;

static TAKEN: LazyLock<Mutex<HashSet<u16>>> = LazyLock::new(Mutex::default);

/// A port of 127.0.0.1 on which nothing listens, and that this function never returns again.
pub fn free_port() -> u16 {
    for _ in 0..1000 {
        let port = fastrand::u16(RANGE);
        let fresh = lock(&TAKEN).insert(port);
        if fresh && TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
    panic!("find a free port: 1000 tries between {RANGE:?} were all in use");
}
