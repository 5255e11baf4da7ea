//! The bytes to and from the server: TCP, a Unix socket, or TLS over TCP, shared by a reading and a writing thread.
//!
//! Over TLS both threads need the one session, yet neither may wait for the other: the reader would hold
//! up status updates for as long as the server is silent, and a blocked writer would stop the reading that
//! the server waits for. So the session's mutex is held only to encrypt or decrypt in memory, never over
//! a system call; `sending` alone keeps records in order on their way to the socket.

use super::limits::{CIPHERTEXT_BUFFER_BYTES, WRITE_TIMEOUT};
use rustls::ClientConnection;
use socket2::Socket;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

/// A connected stream. All methods take `&self`; one thread reads, any may write.
pub(super) struct Stream {
    socket: Socket,
    tls: Option<Tls>,
    /// Held while bytes go to the socket, from encryption on.
    sending: Mutex<()>,
    made: Instant,
    /// When bytes last came, in milliseconds after `made`.
    heard_ms: AtomicU64,
}

struct Tls {
    session: Mutex<ClientConnection>,
    /// Ciphertext that was read and not yet decrypted. Only the reader locks it.
    received: Mutex<Received>,
}

struct Received {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Stream {
    /// A stream without TLS.
    pub(super) fn plain(socket: Socket) -> Stream {
        Stream {
            socket,
            tls: None,
            sending: Mutex::new(()),
            made: Instant::now(),
            heard_ms: AtomicU64::new(0),
        }
    }

    /// A stream over a finished TLS handshake.
    pub(super) fn tls(socket: Socket, session: ClientConnection) -> Stream {
        Stream {
            tls: Some(Tls {
                session: Mutex::new(session),
                received: Mutex::new(Received {
                    bytes: vec![0; CIPHERTEXT_BUFFER_BYTES],
                    start: 0,
                    end: 0,
                }),
            }),
            ..Stream::plain(socket)
        }
    }

    /// Version and cipher of the TLS session.
    pub(super) fn tls_description(&self) -> Option<String> {
        let session = lock(&self.tls.as_ref()?.session);
        let (version, suite) = (
            session.protocol_version()?,
            session.negotiated_cipher_suite()?,
        );
        Some(format!("{:?} {:?}", version, suite.suite()))
    }

    /// From here on [`Stream::read`] without a deadline waits for ever, whatever earlier reads had.
    pub(super) fn wait_for_ever(&self) -> io::Result<()> {
        self.socket.set_read_timeout(None)
    }

    /// Reads what there is, at least one byte; 0 is the end of the stream. Fails with `WouldBlock` at the deadline, and
    /// can go on after that.
    pub(super) fn read(&self, into: &mut [u8], deadline: Option<Instant>) -> io::Result<usize> {
        match &self.tls {
            None => self.receive(into, deadline),
            Some(tls) => self.read_tls(tls, into, deadline),
        }
    }

    /// So long ago bytes came last.
    pub(super) fn silence(&self) -> Duration {
        let heard = Duration::from_millis(self.heard_ms.load(Ordering::Relaxed));
        self.made.elapsed().saturating_sub(heard)
    }

    fn receive(&self, into: &mut [u8], deadline: Option<Instant>) -> io::Result<usize> {
        let socket = &self.socket;
        let count = match deadline {
            None => read_socket(socket, into)?,
            Some(deadline) => Deadlined { socket, deadline }.read(into)?,
        };
        let heard_ms = self.made.elapsed().as_millis() as u64;
        self.heard_ms.store(heard_ms, Ordering::Relaxed);
        Ok(count)
    }

    fn read_tls(&self, tls: &Tls, into: &mut [u8], deadline: Option<Instant>) -> io::Result<usize> {
        let mut received = lock(&tls.received);
        loop {
            let (decrypted, answer_due) = {
                let mut session = lock(&tls.session);
                let decrypted = decrypt(&mut session, &mut received, into);
                (decrypted, session.wants_write())
            };
            if answer_due {
                // what the reader found counts; a connection that is lost shows in the next read as well
                let _ = self.send_answer(tls);
            }
            match decrypted? {
                Decrypted::Bytes(count) => return Ok(count),
                Decrypted::End => return Ok(0),
                Decrypted::NeedsMore => {}
            }
            let Received { bytes, start, end } = &mut *received;
            // used up, also when nothing comes in its place
            (*start, *end) = (0, 0);
            *end = self.receive(bytes, deadline)?;
            if *end == 0 {
                return Ok(0);
            }
        }
    }

    /// Sends what TLS itself has to say after a read: an alert. (The answer to a change of keys goes with the next
    /// write.) When a writer is at work it is left to it: the reader must not wait for a writer that may
    /// wait for our reading.
    fn send_answer(&self, tls: &Tls) -> io::Result<()> {
        let _sending = match self.sending.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Ok(()),
        };
        let records = encrypt(&mut lock(&tls.session), &[])?;
        send(&self.socket, &records, Instant::now() + WRITE_TIMEOUT)
    }

    /// Writes all of it before `deadline`, or fails with `WouldBlock`; then part of it may have been sent, and
    /// the stream is of no more use.
    pub(super) fn write_all(&self, bytes: &[u8], deadline: Instant) -> io::Result<()> {
        let _sending = lock(&self.sending);
        match &self.tls {
            None => send(&self.socket, bytes, deadline),
            Some(tls) => {
                let records = encrypt(&mut lock(&tls.session), bytes)?;
                send(&self.socket, &records, deadline)
            }
        }
    }

    /// Ends the connection for both sides at once; a blocked reader wakes with the end of the stream.
    pub(super) fn shutdown(&self) {
        // it fails only when the connection is gone already
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

/// A thread that panicked while it held the lock ends the program's session anyway; the others only have to
/// get out.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

enum Decrypted {
    /// So many bytes of plaintext, at least one.
    Bytes(usize),
    /// All ciphertext is used up and gave no plaintext.
    NeedsMore,
    /// The server has said that nothing follows.
    End,
}

/// Turns received ciphertext into plaintext until `into` is full or the ciphertext is used up.
fn decrypt(
    session: &mut ClientConnection,
    received: &mut Received,
    into: &mut [u8],
) -> io::Result<Decrypted> {
    let mut filled = 0;
    loop {
        // plaintext is taken before more is fed in: the session holds little of it
        let space = into.get_mut(filled..).unwrap_or_default();
        if space.is_empty() {
            return Ok(Decrypted::Bytes(filled));
        }
        match session.reader().read(space) {
            Ok(0) if filled == 0 => return Ok(Decrypted::End),
            Ok(0) => return Ok(Decrypted::Bytes(filled)),
            Ok(count) => {
                filled += count;
                continue;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        let mut ciphertext = received
            .bytes
            .get(received.start..received.end)
            .unwrap_or_default();
        if ciphertext.is_empty() {
            return Ok(match filled {
                0 => Decrypted::NeedsMore,
                _ => Decrypted::Bytes(filled),
            });
        }
        received.start += session.read_tls(&mut ciphertext)?;
        session.process_new_packets().map_err(io::Error::other)?;
    }
}

/// The records to send for `plaintext`, after whatever TLS itself has waiting.
fn encrypt(session: &mut ClientConnection, mut plaintext: &[u8]) -> io::Result<Vec<u8>> {
    let mut records = Vec::with_capacity(plaintext.len() + 64);
    loop {
        while session.wants_write() {
            session.write_tls(&mut records)?;
        }
        if plaintext.is_empty() {
            return Ok(records);
        }
        let count = session.writer().write(plaintext)?;
        plaintext = plaintext.get(count..).unwrap_or_default();
    }
}

fn read_socket(mut socket: &Socket, into: &mut [u8]) -> io::Result<usize> {
    loop {
        match socket.read(into) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

fn send(socket: &Socket, bytes: &[u8], deadline: Instant) -> io::Result<()> {
    Deadlined { socket, deadline }.write_all(bytes)
}

/// A socket whose every read and write ends at `deadline` with `WouldBlock`: for the handshake, and for writing.
pub(super) struct Deadlined<'a> {
    pub(super) socket: &'a Socket,
    pub(super) deadline: Instant,
}

impl Deadlined<'_> {
    fn remaining(&self) -> io::Result<Option<Duration>> {
        // the system would take less than a microsecond for "no timeout"
        match self.deadline.saturating_duration_since(Instant::now()) {
            remaining if remaining < Duration::from_micros(1) => {
                Err(io::ErrorKind::WouldBlock.into())
            }
            remaining => Ok(Some(remaining)),
        }
    }
}

impl Read for Deadlined<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.socket.set_read_timeout(self.remaining()?)?;
        read_socket(self.socket, into)
    }
}

impl Write for Deadlined<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.set_write_timeout(self.remaining()?)?;
        let mut socket = self.socket;
        socket.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::{RootCertStore, ServerConfig, ServerConnection};
    use rustls_pki_types::{PrivateKeyDer, ServerName};
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    /// A client's stream over TLS, and the server's end of it.
    fn connected() -> (Stream, ServerConnection, UnixStream) {
        let made = rcgen::generate_simple_self_signed(["localhost".to_string()]).unwrap();
        let certificate = made.cert.der().clone();
        let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.clone()], key)
            .unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(certificate).unwrap();
        let client = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let ours = Socket::from(std::os::fd::OwnedFd::from(ours));
        let mut server = ServerConnection::new(Arc::new(config)).unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        let mut session = ClientConnection::new(Arc::new(client), name).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| server.complete_io(&mut theirs).unwrap());
            let deadline = Instant::now() + Duration::from_secs(10);
            let mut socket = Deadlined {
                socket: &ours,
                deadline,
            };
            session.complete_io(&mut socket).unwrap();
        });
        (Stream::tls(ours, session), server, theirs)
    }

    /// The server sends much, with new keys in between that ask for ours in return, and reads nothing until it is
    /// through; meanwhile our writer fills the socket and blocks. Only a reader that goes on lets it end.
    #[test]
    fn a_blocked_writer_does_not_stop_the_reader() {
        const ROUNDS: usize = 64;
        const SENT_PER_ROUND: usize = 100_000;
        const WRITES: usize = 20_000;
        let (stream, mut server, mut theirs) = connected();
        let deadline = Instant::now() + Duration::from_secs(20);
        std::thread::scope(|scope| {
            let serving = scope.spawn(move || {
                for _ in 0..ROUNDS {
                    for chunk in vec![b'x'; SENT_PER_ROUND].chunks(10_000) {
                        server.writer().write_all(chunk).unwrap();
                        while server.wants_write() {
                            server.write_tls(&mut theirs).unwrap();
                        }
                    }
                    server.refresh_traffic_keys().unwrap();
                }
                let mut received = 0;
                let mut buffer = [0; 10_000];
                while received < WRITES * 39 {
                    server.read_tls(&mut theirs).unwrap();
                    server.process_new_packets().unwrap();
                    while let Ok(count) = server.reader().read(&mut buffer) {
                        assert!(buffer[..count].iter().all(|byte| *byte == b's'));
                        received += count;
                    }
                }
                received
            });
            let writing = scope.spawn(|| {
                for _ in 0..WRITES {
                    stream.write_all(&[b's'; 39], deadline).unwrap();
                }
            });
            let mut buffer = vec![0; 128 << 10];
            let mut received = 0;
            while received < ROUNDS * SENT_PER_ROUND {
                let deadline = Instant::now() + Duration::from_secs(30);
                let count = stream.read(&mut buffer, Some(deadline)).unwrap();
                assert!(count > 0 && buffer[..count].iter().all(|byte| *byte == b'x'));
                received += count;
            }
            writing.join().unwrap();
            assert_eq!(serving.join().unwrap(), WRITES * 39);
        });
    }

    /// Sends `text`, a byte of the ciphertext at a time.
    fn send_slowly(
        server: &mut ServerConnection,
        socket: &mut UnixStream,
        text: &str,
        pause: Duration,
    ) {
        server.writer().write_all(text.as_bytes()).unwrap();
        let mut records = Vec::new();
        server.write_tls(&mut records).unwrap();
        for byte in records {
            // who has seen enough closes it
            if socket.write_all(&[byte]).is_err() {
                return;
            }
            std::thread::sleep(pause);
        }
    }

    #[test]
    fn a_read_that_ended_at_its_deadline_can_go_on() {
        let (stream, mut server, mut theirs) = connected();
        let soon = || Some(Instant::now() + Duration::from_millis(20));
        let long = || Some(Instant::now() + Duration::from_secs(30));
        let mut buffer = [0; 100];
        for text in ["first", "second", "third"] {
            send_slowly(&mut server, &mut theirs, text, Duration::ZERO);
            let count = stream.read(&mut buffer, long()).unwrap();
            assert_eq!(&buffer[..count], text.as_bytes());
            let error = stream.read(&mut buffer, soon()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        }
    }

    #[test]
    fn bytes_that_drip_in_end_the_silence_and_do_not_move_the_deadline() {
        let (stream, mut server, mut theirs) = connected();
        let pause = Duration::from_millis(10);
        std::thread::scope(|scope| {
            // a minute's worth
            scope.spawn(move || send_slowly(&mut server, &mut theirs, &"x".repeat(6_000), pause));
            let start = Instant::now();
            let limit = Duration::from_millis(500);
            let error = stream.read(&mut [0; 10], Some(start + limit)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
            assert!(start.elapsed() < Duration::from_secs(20));
            assert!(stream.silence() < limit, "{:?}", stream.silence());
            stream.shutdown();
        });
    }

    #[test]
    fn a_write_that_nobody_takes_ends_at_its_deadline() {
        let (stream, _server, _theirs) = connected();
        let start = Instant::now();
        let deadline = start + Duration::from_millis(100);
        let error = stream.write_all(&vec![0; 10 << 20], deadline).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        assert!(start.elapsed() < Duration::from_secs(10));
    }
}
