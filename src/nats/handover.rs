//! Hands a signed-in session over to another client of the protocol, on a socket of the loopback interface.
//!
//! The `nats` crate, over which the operator's commands speak to JetStream, has no deadlines, believes every length that it is
//! told, fails on an INFO of more than 4096 bytes, and knows neither our TLS options nor our sign-in. So the session is made by
//! [`handshake`](super::handshake), as the relay's is, and the crate speaks to a server that has let it in already. What comes
//! for it is parsed on the way, within the bounds of [`protocol`]; INFO and errors do not reach it.
//!
//! Another local user could connect to the socket first; so CONNECT must name a random token.

use super::connection::max_reply;
use super::error::{EndedBy, Error};
use super::handshake::{Session, Timed};
use super::protocol::{self, ServerOp};
use super::tls;
use crate::loopback::Offer;
use crossbeam_channel::{Receiver, Sender, bounded};
use rustls::client::ClientConnection;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// The longest write to either side.
const LIMIT: Duration = Duration::from_secs(10);
/// What the other client says to be let in has some hundred bytes.
const MAX_HELLO_BYTES: u64 = 64 * 1024;
/// Carried at once.
const CHUNK_BYTES: usize = 64 * 1024;

/// Where the session waits for its new client. It ends when this is dropped.
pub struct Handover {
    /// To connect to, without TLS.
    pub address: SocketAddr,
    /// To give as the token to sign in with.
    pub token: String,
    /// Yields once, why the session is over.
    pub lost: Receiver<Error>,
    carrier: Arc<Carrier>,
}

struct Carrier {
    server_name: String,
    server: TcpStream,
    tls: Mutex<Option<ClientConnection>>,
    lost: Sender<Error>,
}

/// Offers the session to the first client that comes with the token.
///
/// # Errors
/// When there is no socket, thread or random number to be had.
pub fn hand_over(session: Session) -> Result<Handover, Error> {
    let server_name = session.server.clone();
    let failed = |source| Error::Unreachable {
        server: server_name.clone(),
        source,
    };
    let offer = Offer::new().map_err(failed)?;
    let (address, token) = (offer.address, offer.token.clone());
    let (report, lost) = bounded(1);
    let limit = max_reply(&session.info);
    // with every field that the crate insists on
    let greeting = format!(
        r#"INFO {{"server_id":"","version":"","proto":1,"go":"","host":"","port":0,"client_id":0,"headers":true,"max_payload":{}}}{}"#,
        session.info.max_payload, "\r\n"
    );
    let carrier = Arc::new(Carrier {
        server_name: session.server,
        server: session.stream,
        tls: Mutex::new(session.tls),
        lost: report,
    });
    let (run, expected) = (carrier.clone(), token.clone());
    let carry = move || {
        let accepted = offer.accept(|client, by| let_in(client, &greeting, &expected, by));
        let ended = accepted.and_then(|client| run.carry(client, session.bytes, limit));
        run.over(ended.map_or_else(
            |error| run.broken(&error),
            |()| Error::Lost {
                by: EndedBy::Silence,
                server: run.server_name.clone(),
                reason: "the server closed the connection without a word (its log says why)".into(),
            },
        ));
    };
    let spawned = thread::Builder::new()
        .name("nats-handover".into())
        .spawn(carry);
    spawned.map_err(failed)?;
    Ok(Handover {
        address,
        token,
        lost,
        carrier,
    })
}

impl Drop for Handover {
    fn drop(&mut self) {
        let _ = self.carrier.server.shutdown(Shutdown::Both);
    }
}

/// The client that was let in, and what it has said since.
type Client = (TcpStream, Vec<u8>);

/// The server's half of a handshake: INFO, CONNECT, PING, PONG. Gives what came after it.
fn let_in(
    stream: &TcpStream,
    greeting: &str,
    token: &str,
    deadline: Instant,
) -> io::Result<Option<Vec<u8>>> {
    (Timed { stream, deadline }).write_all(greeting.as_bytes())?;
    let mut reader = BufReader::new((Timed { stream, deadline }).take(MAX_HELLO_BYTES));
    let (mut connect, mut ping) = (String::new(), String::new());
    reader.read_line(&mut connect)?;
    reader.read_line(&mut ping)?;
    if !connect.starts_with("CONNECT ") || !connect.contains(token) || ping != "PING\r\n" {
        return Ok(None);
    }
    (Timed { stream, deadline }).write_all(b"PONG\r\n")?;
    Ok(Some(reader.buffer().to_vec()))
}

impl Carrier {
    /// Carries both ways until either side ends; this thread carries what the server says.
    fn carry(
        self: &Arc<Carrier>,
        (client, said): Client,
        bytes: Vec<u8>,
        limit: usize,
    ) -> io::Result<()> {
        let to_client = client.try_clone()?;
        let carrier = self.clone();
        let outward = move || {
            // either error shows on the other side as the end of the session
            let _ = carrier.carry_out(&client, said);
            let _ = carrier.server.shutdown(Shutdown::Both);
        };
        let thread = thread::Builder::new()
            .name("nats-handover".into())
            .spawn(outward)?;
        let result = self.carry_in(&to_client, bytes, limit);
        let _ = to_client.shutdown(Shutdown::Both);
        let _ = self.server.shutdown(Shutdown::Both);
        // a panic has been printed
        let _ = thread.join();
        result
    }

    fn carry_out(&self, mut client: &TcpStream, mut said: Vec<u8>) -> io::Result<()> {
        loop {
            let mut sealed = Vec::new();
            match &mut *self.tls() {
                Some(session) => {
                    session.writer().write_all(&said)?;
                    while session.wants_write() {
                        session.write_tls(&mut sealed)?;
                    }
                }
                None => std::mem::swap(&mut sealed, &mut said),
            }
            let (stream, deadline) = (&self.server, Instant::now() + LIMIT);
            (Timed { stream, deadline }).write_all(&sealed)?;
            said.resize(CHUNK_BYTES, 0);
            let count = client.read(&mut said)?;
            if count == 0 {
                return Ok(());
            }
            said.truncate(count);
        }
    }

    fn carry_in(&self, client: &TcpStream, mut bytes: Vec<u8>, limit: usize) -> io::Result<()> {
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            let mut done = 0;
            loop {
                let rest = bytes.get(done..).unwrap_or_default();
                let parsed = protocol::parse(rest, |_| limit);
                let Some((op, len)) = parsed.map_err(io::Error::other)? else {
                    break;
                };
                match op {
                    ServerOp::Info(_) | ServerOp::Ok => {}
                    ServerOp::Error(words) => {
                        self.over(Error::of_server(&self.server_name, &words));
                        return Ok(());
                    }
                    ServerOp::Message { .. } | ServerOp::Ping | ServerOp::Pong => {
                        let (stream, deadline) = (client, Instant::now() + LIMIT);
                        let whole = rest.get(..len).unwrap_or_default();
                        (Timed { stream, deadline }).write_all(whole)?;
                    }
                }
                done += len;
            }
            bytes.drain(..done);
            let count = (&self.server).read(&mut chunk)?;
            let came = chunk.get(..count).unwrap_or_default();
            let goes_on = match (came.is_empty(), &mut *self.tls()) {
                (true, _) => false,
                (false, Some(session)) => tls::unseal(session, came, &mut bytes)?,
                (false, None) => {
                    bytes.extend_from_slice(came);
                    true
                }
            };
            if !goes_on {
                return Ok(());
            }
        }
    }

    fn broken(&self, error: &io::Error) -> Error {
        Error::of_stream(&self.server_name, error, self.tls().is_some())
    }

    fn tls(&self) -> MutexGuard<'_, Option<ClientConnection>> {
        self.tls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Only the first cause is kept.
    fn over(&self, error: Error) {
        let _ = self.lost.try_send(error);
    }
}
