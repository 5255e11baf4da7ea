//! What can only be a defect, of the relay or of a server, ends the relay with 70, and nothing of it is confirmed.

use crate::rig::{DEADLINE, Rig, SLOT};
use crate::support::relay::Relay;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

/// What becomes of a Begin: its bytes are changed, and the kind of the message is given.
type Change = fn(&mut Vec<u8>) -> u8;

/// Forwards connections to a server, and from the second transaction on, over all of them, changes each Begin.
fn misplace(listener: &TcpListener, server: u16, change: Change) {
    let transactions = Arc::new(AtomicU32::new(0));
    for relay in listener.incoming() {
        let transactions = Arc::clone(&transactions);
        thread::spawn(move || forward(relay?, server, &transactions, change));
    }
}

fn forward(
    mut relay: TcpStream,
    server: u16,
    transactions: &AtomicU32,
    change: Change,
) -> io::Result<()> {
    let mut server = TcpStream::connect(("127.0.0.1", server))?;
    let (mut from, mut to) = (relay.try_clone()?, server.try_clone()?);
    thread::spawn(move || {
        io::copy(&mut from, &mut to)?;
        to.shutdown(Shutdown::Write)
    });
    let mut head = [0; 5];
    loop {
        server.read_exact(&mut head)?;
        // its length counts itself
        let [mut kind, length @ ..] = head;
        let mut body = vec![0; u32::from_be_bytes(length) as usize - 4];
        server.read_exact(&mut body)?;
        // CopyData, XLogData with three numbers, Begin
        let begins = kind == b'd' && body[0] == b'w' && body[25] == b'B';
        if begins && transactions.fetch_add(1, Ordering::Relaxed) > 0 {
            kind = change(&mut body);
        }
        let length = (body.len() as u32 + 4).to_be_bytes();
        relay.write_all(&[&[kind][..], &length, &body].concat())?;
    }
}

/// Runs a relay through it, over one transaction that it lets pass and one that it does not: exit code and log.
fn run_through(rig: &Rig, change: Change) -> (i32, Vec<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let port = listener.local_addr().expect("it listens").port();
    let server = rig.pg.port();
    // it ends with the test's process
    thread::spawn(move || misplace(&listener, server, change));
    let db = format!("postgres://postgres@127.0.0.1:{port}/postgres?sslmode=disable");
    let nats = rig.nats.url();
    let mut relay = Relay::run(&["-db", &db, "-nats", &nats, "-hold-back", "0"], &[]);
    rig.commit_event(1, "a");
    rig.wait_for_messages(1);
    let before = rig.pg.current_wal_lsn();
    rig.commit_event(2, "a");
    let (code, log) = (relay.wait_exit(DEADLINE), relay.log());
    assert!(rig.pg.confirmed_flush_lsn(SLOT) <= before);
    assert_eq!(rig.messages().len(), 1);
    (code, log)
}

/// No transaction is sent before one that was committed earlier.
#[test]
fn transactions_out_of_order_are_an_error_and_no_panic() {
    let rig = Rig::start();
    let (code, log) = run_through(&rig, |body| {
        body[26..34].copy_from_slice(&1_u64.to_be_bytes());
        b'd'
    });
    assert_eq!(code, 70, "{log:#?}");
    let last = log.last().expect("it says why");
    assert!(last.contains("a Begin message at"), "{last}");
    assert!(
        !log.iter().any(|line| line.contains("panicked")),
        "{log:#?}"
    );
}

/// An error of which nobody knows whether it passes is tried again; one that returns at the same place ends the relay, which names
/// the place and the way past it.
#[test]
fn an_error_that_returns_at_the_same_place_is_not_retried_without_end() {
    let rig = Rig::start();
    let (code, log) = run_through(&rig, |body| {
        *body = b"SERROR\0VERROR\0CXX000\0Mcache lookup failed\0Wslot \"s\", output plugin \"pgoutput\", in the change callback, associated LSN 0/99\0\0".to_vec();
        b'E'
    });
    assert_eq!(code, 65, "{log:#?}");
    let last = log.last().expect("it says why");
    assert!(
        last.contains("XX000: cache lookup failed") && last.contains("decode the WAL at 0/99"),
        "{last}"
    );
    let connected = log
        .iter()
        .filter(|line| line.contains("msg=\"connected\""))
        .count();
    assert_eq!(connected, 8, "{log:#?}");
}
