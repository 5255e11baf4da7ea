//! TLS to the server, which the `nats` crate then reaches through a socket on the loopback interface.
//!
//! The crate's own TLS gives up ("failed to write whole buffer") as soon as it is ahead of the network by the
//! socket's buffer and 64 KiB, which one large event or a backlog is; it has no deadlines, and fails where the system has
//! no certificates. So the crate speaks plain NATS to this tunnel, and the tunnel TLS 1.2 or 1.3 to the
//! server, on the connection the probe has made.
//!
//! Another local user could connect to the socket first and would be given a connection with our client certificate;
//! so the first line must carry a random token in place of the connection's name.

use super::error::Error;
use super::options::{Options, ServerUrl};
use super::probe::Greeting;
use super::sign_in;
use super::tls;
use rustls::ClientConfig;
use rustls::client::ClientConnection;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// The longest CONNECT line; a user's JWT makes most of it.
const MAX_CONNECT_BYTES: u64 = 64 * 1024;

/// Read from a socket at once: four TLS records.
const CHUNK_BYTES: usize = 64 * 1024;

/// Between two looks whether the crate has connected.
const ACCEPT_PAUSE: Duration = Duration::from_millis(1);

/// An open tunnel; it ends by itself when either side closes.
pub struct Tunnel {
    /// Where the crate is to connect.
    pub address: SocketAddr,
    /// The name the crate is to give, which the tunnel replaces by the real one.
    pub token: String,
}

/// Makes the TLS handshake and waits, on a thread of its own, for the crate. `ended` is called once, with the
/// reason, when the server's side is over.
pub fn open(
    options: &Options,
    config: &Arc<ClientConfig>,
    server: &ServerUrl,
    greeting: Greeting,
    deadline: Instant,
    ended: impl FnOnce(String) + Send + 'static,
) -> Result<Tunnel, Error> {
    let Greeting { stream, line, .. } = greeting;
    let session = tls::open(config, server, &stream, deadline)?;

    let failed = |reason: String| Error::Tls {
        server: server.to_string(),
        reason,
    };
    let local = |error: io::Error| failed(format!("open a loopback socket: {error}"));
    let listener = TcpListener::bind(("127.0.0.1", 0)).map_err(local)?;
    let address = listener.local_addr().map_err(local)?;
    listener.set_nonblocking(true).map_err(local)?;
    let token = sign_in::unique().map_err(local)?;

    let (name, expected) = (options.name.clone(), token.clone());
    let run = move || {
        let accepted = accept(&listener, &plain_info(&line), &expected, &name, deadline);
        // nobody else may come in
        drop(listener);
        match accepted {
            Ok((client, connect)) => carry(session, &stream, &client, connect, ended),
            Err(error) => ended(format!("the client did not use its TLS tunnel: {error}")),
        }
    };
    thread::Builder::new()
        .name("nats-tls-out".into())
        .spawn(run)
        .map_err(local)?;
    Ok(Tunnel { address, token })
}

/// The server's INFO as the crate may see it: without TLS, and without other servers to connect to.
fn plain_info(line: &[u8]) -> Vec<u8> {
    let json = line.get(4..).unwrap_or_default();
    // the probe has read it as JSON before
    let mut info: serde_json::Value = serde_json::from_slice(json).unwrap_or_default();
    if let Some(info) = info.as_object_mut() {
        for field in [
            "tls_required",
            "tls_verify",
            "tls_available",
            "connect_urls",
        ] {
            info.remove(field);
        }
    }
    format!("INFO {info}\r\n").into()
}

/// Waits for the crate: whoever connects and says CONNECT with the token. Gives its socket, and what it said first with
/// its real name.
fn accept(
    listener: &TcpListener,
    info: &[u8],
    token: &str,
    name: &str,
    deadline: Instant,
) -> io::Result<(TcpStream, Vec<u8>)> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let mut client = match listener.accept() {
            Ok((client, _)) => client,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                thread::sleep(ACCEPT_PAUSE);
                continue;
            }
            Err(error) => return Err(error),
        };
        client.set_nonblocking(false)?;
        client.set_nodelay(true)?;
        client.set_read_timeout(Some(left))?;
        let mut said = Vec::new();
        let greeted = client.write_all(info).and_then(|()| {
            let mut reader = BufReader::new((&client).take(MAX_CONNECT_BYTES));
            reader.read_until(b'\n', &mut said)?;
            // what the crate has sent behind the line
            said.extend_from_slice(reader.buffer());
            Ok(())
        });
        let text = String::from_utf8_lossy(&said);
        // a stranger's failure is not ours
        if greeted.is_ok() && text.starts_with("CONNECT ") && text.contains(token) {
            client.set_read_timeout(None)?;
            let name = serde_json::Value::from(name).to_string();
            let connect = text.replacen(&format!("\"{token}\""), &name, 1);
            // 1 asks for later INFO lines, whose length the crate cannot bear
            let connect = connect.replacen("\"protocol\":1", "\"protocol\":0", 1);
            return Ok((client, connect.into_bytes()));
        }
    }
}

/// Carries bytes both ways until either side ends; this thread is the one that writes to the server.
fn carry(
    session: ClientConnection,
    server: &TcpStream,
    client: &TcpStream,
    connect: Vec<u8>,
    ended: impl FnOnce(String) + Send + 'static,
) {
    let session = Arc::new(Mutex::new(session));
    let (Ok(server_in), Ok(client_in)) = (server.try_clone(), client.try_clone()) else {
        return ended("out of file descriptors".into());
    };
    let inward = {
        let session = session.clone();
        move || {
            let reason = match carry_in(&session, &server_in, &client_in) {
                Ok(()) => "the server closed the connection".into(),
                Err(error) => error.to_string(),
            };
            ended(reason);
            hang_up(&server_in, &client_in);
        }
    };
    let started = thread::Builder::new()
        .name("nats-tls-in".into())
        .spawn(inward);
    if started.is_err() {
        return hang_up(server, client);
    }
    // its cause is the crate's own doing, or shows on the other way, perhaps with an alert that says more; so it is the
    // other way that reports, and hangs up on the crate after that
    let _ = carry_out(&session, server, client, connect);
    let _ = server.shutdown(Shutdown::Both);
}

fn hang_up(server: &TcpStream, client: &TcpStream) {
    // one that is closed already needs no closing
    let _ = server.shutdown(Shutdown::Both);
    let _ = client.shutdown(Shutdown::Both);
}

/// Server to client. Waits outside the lock, and never writes to the server: what TLS itself has to say goes with
/// the client's next bytes.
fn carry_in(
    session: &Mutex<ClientConnection>,
    mut server: &TcpStream,
    mut client: &TcpStream,
) -> io::Result<()> {
    let mut sealed = vec![0; CHUNK_BYTES];
    let mut open = Vec::new();
    loop {
        // the handshake may have brought plaintext along
        {
            let mut session = session.lock().unwrap_or_else(PoisonError::into_inner);
            tls::take_plaintext(&mut session, &mut open)?;
        }
        client.write_all(&open)?;
        open.clear();
        let n = match server.read(&mut sealed) {
            Ok(0) => return Ok(()),
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        let sealed = sealed.get(..n).unwrap_or_default();
        let mut session = session.lock().unwrap_or_else(PoisonError::into_inner);
        if !tls::unseal(&mut session, sealed, &mut open)? {
            return Ok(());
        }
    }
}

/// Client to server.
fn carry_out(
    session: &Mutex<ClientConnection>,
    mut server: &TcpStream,
    mut client: &TcpStream,
    connect: Vec<u8>,
) -> io::Result<()> {
    let mut open = connect;
    let mut len = open.len();
    let mut sealed = Vec::new();
    loop {
        {
            let mut session = session.lock().unwrap_or_else(PoisonError::into_inner);
            session
                .writer()
                .write_all(open.get(..len).unwrap_or_default())?;
            while session.wants_write() {
                session.write_tls(&mut sealed)?;
            }
        }
        server.write_all(&sealed)?;
        sealed.clear();
        open.resize(CHUNK_BYTES, 0);
        len = match client.read(&mut open) {
            Ok(0) => return Ok(()),
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_crate_sees_neither_tls_nor_other_servers() {
        let line = br#"INFO {"version":"2.15.1","tls_required":true,"tls_available":true,"tls_verify":true,"nonce":"x","connect_urls":["a:1"]}
"#;
        assert_eq!(
            String::from_utf8(plain_info(line)).unwrap(),
            "INFO {\"nonce\":\"x\",\"version\":\"2.15.1\"}\r\n"
        );
    }

    #[test]
    fn a_stranger_is_turned_away() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let say = |text: &str| {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(text.as_bytes()).unwrap();
            stream
        };
        let _strangers = [
            say("GET / HTTP/1.1\r\n"),
            say("CONNECT {\"name\":\"guess\"}\r\nPING\r\n"),
        ];
        let _crate = say("CONNECT {\"protocol\":1,\"name\":\"secret\"}\r\nPING\r\n");
        let deadline = Instant::now() + Duration::from_secs(10);
        let (_, said) = accept(&listener, b"INFO {}\r\n", "secret", "re\"lay", deadline).unwrap();
        assert_eq!(
            String::from_utf8(said).unwrap(),
            "CONNECT {\"protocol\":0,\"name\":\"re\\\"lay\"}\r\nPING\r\n"
        );
        let nobody = accept(&listener, b"", "secret", "relay", Instant::now()).unwrap_err();
        assert_eq!(nobody.kind(), io::ErrorKind::TimedOut);
    }
}
