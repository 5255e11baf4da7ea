//! The sockets of `-listen`. `localhost` and every address are two each, one of IPv4 and one of IPv6, under one port.

use socket2::{Domain, Protocol, Socket, Type};
use std::io;
use std::net::{SocketAddr, TcpListener};

/// As the standard library's.
const BACKLOG: i32 = 128;
/// How often the system is asked for a free port, until one is free for both.
const TRIES: usize = 16;

/// Binds all of them. An address that this machine does not have, where it has the other, is left out: not everyone
/// has IPv6.
pub fn bind(addresses: &[SocketAddr]) -> Result<Vec<TcpListener>, (SocketAddr, io::Error)> {
    let mut outcome = bind_once(addresses);
    for _ in 1..TRIES {
        match &outcome {
            Err((address, error)) if address.port() == 0 && is_taken(error) => {
                outcome = bind_once(addresses);
            }
            _ => break,
        }
    }
    outcome
}

fn bind_once(addresses: &[SocketAddr]) -> Result<Vec<TcpListener>, (SocketAddr, io::Error)> {
    let mut listeners: Vec<TcpListener> = Vec::new();
    let mut missing = None;
    for address in addresses {
        // port 0: the one that the first was given
        let port = listeners.first().and_then(|first| first.local_addr().ok());
        let port = port.map_or(address.port(), |first| first.port());
        match bind_one(SocketAddr::new(address.ip(), port), addresses.len() > 1) {
            Ok(listener) => listeners.push(listener),
            Err(error) if is_taken(&error) || addresses.len() == 1 => {
                return Err((*address, error));
            }
            Err(error) => missing = Some((*address, error)),
        }
    }
    match missing {
        Some(error) if listeners.is_empty() => Err(error),
        _ => Ok(listeners),
    }
}

fn bind_one(address: SocketAddr, is_one_of_two: bool) -> io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    // a relay that is started again does not wait for connections of the one before
    socket.set_reuse_address(true)?;
    if address.is_ipv6() && is_one_of_two {
        // the other one takes IPv4
        socket.set_only_v6(true)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// By another program, or not ours to have: no reason to go on with half of it.
fn is_taken(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::AddrInUse | io::ErrorKind::PermissionDenied
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn both_have_the_port_that_the_first_was_given() {
        let listeners = bind(&[address("127.0.0.1:0"), address("[::1]:0")]).unwrap();
        let ports: Vec<u16> = listeners
            .iter()
            .map(|listener| listener.local_addr().unwrap().port())
            .collect();
        assert!(ports.iter().all(|port| *port == ports[0]), "{ports:?}");
    }

    #[test]
    fn an_address_that_this_machine_does_not_have_is_left_out_where_it_has_another() {
        // TEST-NET-1
        let (ours, foreign) = (address("127.0.0.1:0"), address("192.0.2.1:0"));
        assert_eq!(bind(&[ours, foreign]).unwrap().len(), 1);
        assert_eq!(bind(&[foreign, ours]).unwrap().len(), 1);
        let (at, error) = bind(&[foreign]).unwrap_err();
        assert_eq!(
            (at, error.kind()),
            (foreign, io::ErrorKind::AddrNotAvailable)
        );
    }

    #[test]
    fn a_port_that_is_taken_is_an_error() {
        let taken = bind(&[address("127.0.0.1:0")]).unwrap();
        let ours = taken[0].local_addr().unwrap();
        let (at, error) = bind(&[ours, address("[::1]:0")]).unwrap_err();
        assert_eq!((at, error.kind()), (ours, io::ErrorKind::AddrInUse));
    }
}
