//! What can only be a defect, of the relay or of a server, ends the relay with 70, and nothing of it is confirmed.

use crate::rig::{DEADLINE, Rig, SLOT};
use crate::support::relay::Relay;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;

/// Forwards one connection to a server, and from the second transaction on changes where it says that it stands.
fn misplace(listener: &TcpListener, server: u16) -> io::Result<()> {
    let (mut relay, _) = listener.accept()?;
    let mut server = TcpStream::connect(("127.0.0.1", server))?;
    let (mut from, mut to) = (relay.try_clone()?, server.try_clone()?);
    let asks = thread::spawn(move || {
        io::copy(&mut from, &mut to)?;
        to.shutdown(Shutdown::Write)
    });
    let mut transactions = 0;
    let mut head = [0; 5];
    while server.read_exact(&mut head).is_ok() {
        // its length counts itself
        let [kind, length @ ..] = head;
        let mut body = vec![0; u32::from_be_bytes(length) as usize - 4];
        server.read_exact(&mut body)?;
        // CopyData, XLogData with three numbers, Begin, and the commit's LSN
        if kind == b'd' && body[0] == b'w' && body[25] == b'B' {
            transactions += 1;
            if transactions > 1 {
                body[26..34].copy_from_slice(&1_u64.to_be_bytes());
            }
        }
        // it may have gone
        if relay.write_all(&[&head[..], &body].concat()).is_err() {
            break;
        }
    }
    asks.join().expect("it only copies")
}

#[test]
fn a_transaction_out_of_commit_order_ends_the_relay() {
    let rig = Rig::start();
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let port = listener.local_addr().expect("it listens").port();
    let server = rig.pg.port();
    let between = thread::spawn(move || misplace(&listener, server));
    let db = format!("postgres://postgres@127.0.0.1:{port}/postgres?sslmode=disable");
    let nats = rig.nats.url();
    let mut relay = Relay::run(&["-db", &db, "-nats", &nats, "-hold-back", "0"], &[]);
    rig.commit_event(1, "a");
    rig.wait_for_messages(1);
    let before = rig.pg.current_wal_lsn();
    // no transaction is sent before one that was committed earlier
    rig.commit_event(2, "a");
    let (code, log) = (relay.wait_exit(DEADLINE), relay.log());
    assert_eq!(code, 70, "{log:#?}");
    let last = log.last().expect("it says why");
    assert!(last.contains("comes after a later one"), "{last}");
    // a relay that has gone has closed its connection
    between.join().expect("it ends").ok();
    assert!(rig.pg.confirmed_flush_lsn(SLOT) <= before);
    assert_eq!(rig.messages().len(), 1);
}
