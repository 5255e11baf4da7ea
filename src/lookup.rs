//! Name lookup with a deadline.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::mpsc;
use std::time::Duration;

/// The addresses of a host name. The system's resolver knows no deadline, so it works on a thread of its own, which ends when
/// the resolver does.
///
/// # Errors
/// [`io::ErrorKind::TimedOut`] once `limit` has passed, [`io::ErrorKind::NotFound`] for a name without an address, and what
/// the resolver reports.
pub fn look_up(host: &str, port: u16, limit: Duration) -> io::Result<Vec<SocketAddr>> {
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(address, port)]);
    }
    let (sender, receiver) = mpsc::channel();
    let target = (host.to_string(), port);
    std::thread::Builder::new()
        .name("resolve".into())
        .spawn(move || {
            let found = target.to_socket_addrs().map(Iterator::collect::<Vec<_>>);
            // nobody waits any more after the deadline
            let _ = sender.send(found);
        })?;
    let found = receiver
        .recv_timeout(limit)
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    match found.is_empty() {
        true => Err(io::Error::new(
            io::ErrorKind::NotFound,
            "the name has no address",
        )),
        false => Ok(found),
    }
}
