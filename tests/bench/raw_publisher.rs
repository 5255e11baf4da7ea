//! The yardstick of `scripts/bench`: publishes to JetStream as fast as one connection can, and nothing else.
//!
//! It writes what the relay writes (message id, fence, position) with a window of unacknowledged publishes, and
//! takes an ack only at the sequence it predicted.
//!
//! With `--batch` it sends atomic batches (ADR-50) of so many messages instead: the fence stands on the first, one
//! ack comes for all. With `--rate` it sends so many a second, each once the one before is stored, and measures
//! how long an ack takes. Prints one line of JSON.

mod connection;

use connection::{CHUNK_BYTES, Connection, Outcome};
use std::fmt::Write as _;
use std::io::Write as _;
use std::time::{Duration, Instant};

const USAGE: &str =
    "raw_publisher ADDRESS --events N [--window N] [--payload BYTES] [--batch N] [--rate N]";

struct Options {
    address: String,
    events: u64,
    window: u64,
    payload: usize,
    batch: u64,
    rate: u64,
}

fn options() -> Outcome<Options> {
    let mut given = std::env::args().skip(1);
    let mut options = Options {
        address: given.next().ok_or(USAGE)?,
        events: 0,
        window: 1000,
        payload: 300,
        batch: 0,
        rate: 0,
    };
    while let Some(name) = given.next() {
        let value: u64 = given.next().ok_or(USAGE)?.parse()?;
        match name.as_str() {
            "--events" => options.events = value,
            "--window" => options.window = value,
            "--payload" => options.payload = usize::try_from(value)?,
            "--batch" => options.batch = value,
            "--rate" => options.rate = value,
            _ => return Err(USAGE.into()),
        }
    }
    if options.events == 0 || options.window == 0 {
        return Err(USAGE.into());
    }
    Ok(options)
}

/// A request to the JetStream API, with nothing else under way.
fn request(connection: &mut Connection, api: &str, body: &str) -> Outcome<String> {
    write!(
        connection.outgoing,
        "PUB $JS.API.{api} i.a {}\r\n{body}\r\n",
        body.len()
    )?;
    connection.flush()?;
    Ok(String::from_utf8(connection.message()?)?)
}

fn publish(
    connection: &mut Connection,
    options: &Options,
    number: u64,
    payload: &[u8],
) -> Outcome<()> {
    let place = number % options.batch.max(1);
    let mut head = String::with_capacity(300);
    head.push_str("NATS/1.0\r\n");
    if options.batch == 0 || place == 0 {
        write!(head, "Nats-Expected-Last-Sequence: {number}\r\n")?;
    }
    write!(
        head,
        "Nats-Msg-Id: 00000000-0000-4000-8000-{number:012x}\r\n\
         Outbox-Position: jetstream_outbox 7312345678901234567 1 0/{number:X} 1\r\n"
    )?;
    let mut asks = true;
    if options.batch > 0 {
        let first = number - place;
        write!(
            head,
            "Nats-Batch-Id: b{first}\r\nNats-Batch-Sequence: {}\r\n",
            place + 1
        )?;
        asks = place + 1 == options.batch || number + 1 == options.events;
        if asks {
            head.push_str("Nats-Batch-Commit: 1\r\n");
        }
    }
    head.push_str("\r\n");
    let reply = if asks { "i.0 " } else { "" };
    let (head_len, len) = (head.len(), head.len() + payload.len());
    write!(
        connection.outgoing,
        "HPUB events.order.agg-{} {reply}{head_len} {len}\r\n{head}",
        number % 1000
    )?;
    connection.outgoing.extend_from_slice(payload);
    connection.outgoing.extend_from_slice(b"\r\n");
    Ok(())
}

/// One event at a time, `rate` a second. Returns how long the acks took, in ascending order.
fn one_by_one(
    connection: &mut Connection,
    options: &Options,
    payload: &[u8],
) -> Outcome<Vec<Duration>> {
    let start = Instant::now();
    let mut took = Vec::new();
    for sent in 0..options.events {
        let due = Duration::from_secs(sent) / u32::try_from(options.rate)?;
        std::thread::sleep(due.saturating_sub(start.elapsed()));
        let begun = Instant::now();
        publish(connection, options, sent, payload)?;
        connection.flush()?;
        let answer = connection.message()?;
        took.push(begun.elapsed());
        if number(&answer, "seq") != Some(sent + 1) {
            return Err(String::from_utf8_lossy(&answer).into());
        }
    }
    took.sort();
    Ok(took)
}

/// The number behind `"name":` in a flat JSON object.
fn number(body: &[u8], name: &str) -> Option<u64> {
    let text = std::str::from_utf8(body).ok()?;
    let (_, rest) = text.split_once(&format!("\"{name}\":"))?;
    let end = rest.find(|c: char| !c.is_ascii_digit())?;
    rest.get(..end)?.parse().ok()
}

fn main() -> Outcome<()> {
    let options = options()?;
    let mut connection = Connection::open(&options.address)?;
    let config =
        "{\"name\":\"raw\",\"subjects\":[\"events.>\"],\"storage\":\"file\",\"allow_atomic\":true}";
    let made = request(&mut connection, "STREAM.CREATE.raw", config)?;
    if made.contains("\"error\"") {
        return Err(made.into());
    }
    let payload = format!(
        "{{\"pad\":\"{}\"}}",
        "x".repeat(options.payload.max(10) - 10)
    );
    if options.rate > 0 {
        let took = one_by_one(&mut connection, &options, payload.as_bytes())?;
        let ms = |share: usize| {
            let nth = (took.len() * share).div_ceil(100) - 1;
            took.get(nth)
                .map_or(0.0, |took| took.as_secs_f64() * 1000.0)
        };
        println!("{{\"p50\":{:.3},\"p99\":{:.3}}}", ms(50), ms(99));
        return Ok(());
    }
    let per_ack = options.batch.max(1);
    let start = Instant::now();
    let (mut sent, mut acked) = (0, 0);
    while acked < options.events {
        while sent < options.events
            && sent - acked < options.window.max(per_ack)
            && connection.outgoing.len() < CHUNK_BYTES
        {
            publish(&mut connection, &options, sent, payload.as_bytes())?;
            sent += 1;
        }
        connection.flush()?;
        // what has come, and at least one ack when nothing more may be sent
        let full = sent == options.events || sent - acked >= options.window.max(per_ack);
        let mut body = connection.message_if_there()?;
        if body.is_none() && full {
            body = Some(connection.message()?);
        }
        while let Some(answer) = body {
            let expected = options.events.min(acked + per_ack);
            if number(&answer, "seq") != Some(expected) || answer.starts_with(b"{\"error\"") {
                let text = String::from_utf8_lossy(&answer);
                return Err(format!("expected an ack of {expected}: {text}").into());
            }
            acked = expected;
            body = connection.message_if_there()?;
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    println!("{{\"events\":{},\"seconds\":{seconds:.4}}}", options.events);
    Ok(())
}
