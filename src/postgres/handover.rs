//! Hands an authenticated session over to another client of the protocol, on a socket of the loopback interface.
//!
//! The `postgres` crate, over which the operator's commands run their SQL, knows neither libpq's `sslmode`s nor its
//! password file, `require_auth` or several of `target_session_attrs`, and would need a second TLS library. So the session is
//! made by [`Connection`], as the relay's is, and the crate speaks to a server that has let it in already: we
//! answer its start-up message with what our own start-up has found, and carry bytes from then on.
//!
//! Another local user could connect to the socket first; so the start-up message must name a random token as its user.

use super::connection::Connection;
use super::error::Error;
use super::limits::{MAX_MESSAGE_BYTES, WRITE_TIMEOUT};
use super::stream::Stream;
use crate::loopback::Offer;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How often an unanswered request's deadline is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// Version 3.0 of the protocol, which every server since 7.4 speaks.
const PROTOCOL: u32 = 3 << 16;
/// Carried at once.
const CHUNK_BYTES: usize = 64 * 1024;

/// Where the session waits for its new client.
pub struct Handover {
    /// To connect to, without TLS.
    pub address: SocketAddr,
    /// To give as the user; no password will be asked for.
    pub token: String,
}

/// Offers the session to the first client that comes with the token. It ends when either side does, and when an
/// answer has been due for `answer_limit`: then the server, or the network, has vanished.
///
/// # Errors
/// [`Error::Io`] when there is no socket, thread or random number to be had.
pub fn hand_over(connection: Connection, answer_limit: Duration) -> Result<Handover, Error> {
    let doing = "hand the session over";
    let io = |source| Error::Io { doing, source };
    let offer = Offer::new().map_err(io)?;
    let (address, token) = (offer.address, offer.token.clone());
    let expected = token.clone();
    let run = move || {
        let accepted = offer.accept(|client, by| started_up(client, expected.as_bytes(), by));
        let served = accepted.and_then(|(mut client, ())| {
            client.write_all(&welcome(&connection))?;
            carry(&connection.stream, &client, answer_limit)
        });
        if let Err(error) = served {
            log::debug!(cause:% = error; "the session that was handed over has ended");
        }
    };
    thread::Builder::new()
        .name("pg-handover".into())
        .spawn(run)
        .map_err(io)?;
    Ok(Handover { address, token })
}

/// Reads a start-up message; its user must be the token.
fn started_up(mut client: &TcpStream, token: &[u8], deadline: Instant) -> io::Result<Option<()>> {
    let left = deadline.saturating_duration_since(Instant::now());
    client.set_read_timeout(Some(left))?;
    let mut word = [0; 4];
    client.read_exact(&mut word)?;
    let length = (u32::from_be_bytes(word) as usize)
        .checked_sub(word.len())
        .filter(|length| *length <= MAX_MESSAGE_BYTES)
        .ok_or(io::ErrorKind::InvalidData)?;
    let mut message = Vec::new();
    client.take(length as u64).read_to_end(&mut message)?;
    match message.split_first_chunk() {
        Some((version, parameters)) if u32::from_be_bytes(*version) == PROTOCOL => {
            let mut words = parameters.split(|byte| *byte == 0);
            while let (Some(name), Some(value)) = (words.next(), words.next()) {
                if name == b"user" {
                    return Ok((value == token).then_some(()));
                }
            }
            Ok(None)
        }
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// AuthenticationOk, each ParameterStatus, BackendKeyData and ReadyForQuery.
fn welcome(connection: &Connection) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut message = |tag: u8, body: &[&[u8]]| {
        let body = body.concat();
        bytes.push(tag);
        // settings and numbers are far below 4 GiB
        bytes.extend_from_slice(&(body.len() as u32 + 4).to_be_bytes());
        bytes.extend_from_slice(&body);
    };
    message(b'R', &[&0_u32.to_be_bytes()]);
    for (name, value) in connection.parameters() {
        message(b'S', &[name.as_bytes(), b"\0", value.as_bytes(), b"\0"]);
    }
    // without the key nothing can be cancelled, and nothing is
    message(
        b'K',
        &[
            &connection.backend_pid().to_be_bytes(),
            &0_u32.to_be_bytes(),
        ],
    );
    message(b'Z', &[b"I"]);
    bytes
}

/// Carries bytes both ways until either side ends; this thread carries the server's.
fn carry(server: &Arc<Stream>, client: &TcpStream, answer_limit: Duration) -> io::Result<()> {
    // since when an answer is due
    let asked = Arc::new(Mutex::new(None::<Instant>));
    let outward = {
        let (server, asked, client) = (server.clone(), asked.clone(), client.try_clone()?);
        move || {
            // either error shows on the other side as the end of the session
            let _ = carry_out(&server, &client, &asked);
            server.shutdown();
        }
    };
    let thread = thread::Builder::new()
        .name("pg-handover-out".into())
        .spawn(outward)?;
    let result = carry_in(server, client, &asked, answer_limit);
    let _ = client.shutdown(Shutdown::Both);
    server.shutdown();
    // a panic has been printed
    let _ = thread.join();
    result
}

fn carry_in(
    server: &Stream,
    mut client: &TcpStream,
    asked: &Mutex<Option<Instant>>,
    answer_limit: Duration,
) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK_BYTES];
    client.set_write_timeout(Some(WRITE_TIMEOUT))?;
    loop {
        match server.read(&mut chunk, Some(Instant::now() + LOOK)) {
            Ok(0) => return Ok(()),
            Ok(count) => {
                let bytes = chunk.get(..count).unwrap_or_default();
                *lock(asked) = (!ends_ready(bytes)).then(Instant::now);
                client.write_all(bytes)?;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if lock(asked).is_some_and(|since| since.elapsed() > answer_limit) {
                    return Err(io::ErrorKind::TimedOut.into());
                }
            }
            Err(error) => return Err(error),
        }
    }
}

/// The last message is ReadyForQuery. (What only looks like it would go without a deadline, no more.)
fn ends_ready(bytes: &[u8]) -> bool {
    bytes
        .split_last()
        .is_some_and(|(_status, before)| before.ends_with(b"Z\0\0\0\x05"))
}

fn carry_out(
    server: &Stream,
    mut client: &TcpStream,
    asked: &Mutex<Option<Instant>>,
) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let count = client.read(&mut chunk)?;
        if count == 0 {
            return Ok(());
        }
        *lock(asked) = Some(Instant::now());
        let bytes = chunk.get(..count).unwrap_or_default();
        server.write_all(bytes, Instant::now() + WRITE_TIMEOUT)?;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
