//! The floor of `scripts/bench`: a relay that promises nothing. It publishes each insert of the replication stream with
//! the headers the relay writes, and has a window of unacknowledged publishes; it confirms nothing, takes any ack that is no
//! error, and ends wherever the relay would go on. What the relay takes beyond it is the price of its promises.
//!
//! A slot for pgoutput, a table as that of bench.py (id, aggregatetype, aggregateid, payload), and trust for the user
//! postgres are taken for granted. It runs until it is killed, or until nats-server misses its PONGs, after some minutes.

mod connection;

use connection::{Connection, Input, Outcome};
use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

const WINDOW: u64 = 1000;
/// Between two looks for room in the window; who takes acks wakes the publisher before.
const LOOK: Duration = Duration::from_secs(1);
const USAGE: &str = "bare_relay POSTGRES_ADDRESS NATS_ADDRESS SLOT PUBLICATION";

/// The replication connection.
struct Replication(Input);

impl Replication {
    fn open(address: &str, slot: &str, publication: &str) -> Outcome<Replication> {
        let mut replication = Replication(Input::open(address)?);
        let parameters = "user\0postgres\0database\0postgres\0replication\0database\0\0";
        let mut startup = Vec::new();
        startup.extend_from_slice(&u32::try_from(parameters.len() + 8)?.to_be_bytes());
        startup.extend_from_slice(&0x0003_0000_u32.to_be_bytes());
        startup.extend_from_slice(parameters.as_bytes());
        replication.0.socket.write_all(&startup)?;
        replication.skip_to(b'Z')?;
        let start = format!(
            "START_REPLICATION SLOT \"{slot}\" LOGICAL 0/0 (proto_version '1', publication_names '{publication}')\0"
        );
        replication.send(b'Q', start.as_bytes())?;
        replication.skip_to(b'W')?;
        Ok(replication)
    }

    fn send(&mut self, kind: u8, body: &[u8]) -> Outcome<()> {
        let mut message = vec![kind];
        message.extend_from_slice(&u32::try_from(body.len() + 4)?.to_be_bytes());
        message.extend_from_slice(body);
        Ok(self.0.socket.write_all(&message)?)
    }

    /// The next message, if a whole one is there: its kind and its body.
    fn message_if_there(&mut self) -> Option<(u8, &[u8])> {
        let (&kind, rest) = self.0.unread().split_first()?;
        let length = u32::from_be_bytes(*rest.first_chunk()?) as usize;
        rest.get(..length)?;
        Some((kind, self.0.take(1 + length).get(5..)?))
    }

    fn skip_to(&mut self, wanted: u8) -> Outcome<()> {
        loop {
            match self.message_if_there() {
                Some((b'E', body)) => return Err(String::from_utf8_lossy(body).into()),
                Some((kind, _)) if kind == wanted => return Ok(()),
                Some(_) => {}
                None => self.0.fill()?,
            }
        }
    }

    /// A standby status update that confirms nothing.
    fn keep_alive(&mut self) -> Outcome<()> {
        let mut update = [0; 34];
        if let Some(kind) = update.first_mut() {
            *kind = b'r';
        }
        self.send(b'd', &update)
    }
}

/// The texts of an Insert's columns, which follow its relation and an 'N'.
fn columns(insert: &[u8]) -> Option<[&str; 4]> {
    let mut rest = insert.get(8..)?;
    let mut texts = [""; 4];
    for text in &mut texts {
        let length = u32::from_be_bytes(*rest.get(1..)?.first_chunk()?) as usize;
        *text = std::str::from_utf8(rest.get(5..5 + length)?).ok()?;
        rest = rest.get(5 + length..)?;
    }
    Some(texts)
}

fn publish(outgoing: &mut Vec<u8>, number: u64, insert: &[u8]) -> Outcome<()> {
    let [id, kind, aggregate, payload] = columns(insert).ok_or("an unexpected Insert")?;
    let mut head = String::with_capacity(300);
    write!(
        head,
        "NATS/1.0\r\nNats-Expected-Last-Sequence: {number}\r\nNats-Msg-Id: {id}\r\n\
         Outbox-Position: jetstream_outbox 7312345678901234567 1 0/{number:X} 1\r\n\r\n"
    )?;
    let (head_len, len) = (head.len(), head.len() + payload.len());
    write!(
        outgoing,
        "HPUB events.{kind}.{aggregate} i.0 {head_len} {len}\r\n{head}{payload}\r\n"
    )?;
    Ok(())
}

/// Counts acks until the connection ends, and wakes the publisher for room.
fn count_acks(mut connection: Connection, acked: &AtomicU64, publisher: &thread::Thread) {
    loop {
        match connection.message() {
            Ok(body) if body.starts_with(b"{\"error\"") => {
                eprintln!("{}", String::from_utf8_lossy(&body));
                std::process::exit(1);
            }
            Ok(_) => {
                acked.fetch_add(1, Ordering::Release);
                publisher.unpark();
            }
            Err(error) => {
                eprintln!("{error}");
                std::process::exit(1);
            }
        }
    }
}

/// Writes the publishes of what has been read, as far as the window has room; true if nothing of it is left.
fn take(
    replication: &mut Replication,
    sent: &mut u64,
    acked: &AtomicU64,
    outgoing: &mut Vec<u8>,
) -> Outcome<bool> {
    while *sent - acked.load(Ordering::Acquire) < WINDOW {
        let Some((kind, body)) = replication.message_if_there() else {
            return Ok(true);
        };
        match (kind, body.first(), body.get(25..)) {
            // XLogData, whose header has 25 bytes
            (b'd', Some(b'w'), Some(insert)) if insert.starts_with(b"I") => {
                publish(outgoing, *sent, insert)?;
                *sent += 1;
            }
            // a keepalive that asks for an answer
            (b'd', Some(b'k'), _) if body.last() == Some(&1) => replication.keep_alive()?,
            (b'd', ..) => {}
            _ => return Err(String::from_utf8_lossy(body).into()),
        }
    }
    Ok(false)
}

fn main() -> Outcome<()> {
    let given: Vec<String> = std::env::args().skip(1).collect();
    let [postgres, nats, slot, publication] = given.as_slice() else {
        return Err(USAGE.into());
    };
    let reader = Connection::open(nats)?;
    let mut socket = reader.input.socket.try_clone()?;
    let acked = Arc::new(AtomicU64::new(0));
    let (counted, publisher) = (Arc::clone(&acked), thread::current());
    thread::spawn(move || count_acks(reader, &counted, &publisher));

    let mut replication = Replication::open(postgres, slot, publication)?;
    let (mut sent, mut outgoing) = (0, Vec::new());
    loop {
        while sent - acked.load(Ordering::Acquire) >= WINDOW {
            thread::park_timeout(LOOK);
        }
        let is_read = take(&mut replication, &mut sent, &acked, &mut outgoing)?;
        socket.write_all(&outgoing)?;
        outgoing.clear();
        if is_read {
            replication.0.fill()?;
        }
    }
}
