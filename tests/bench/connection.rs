//! Sockets for the tools of `scripts/bench`, and as much of NATS's protocol as nats-server uses for them: no TLS, no
//! reconnect.

use std::error::Error;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// A server that says nothing for so long has failed.
const SILENCE: Duration = Duration::from_secs(30);
/// Read at once; and one write holds at least so much while the window has room.
pub const CHUNK_BYTES: usize = 64 * 1024;

pub type Outcome<T> = Result<T, Box<dyn Error>>;

/// A socket and its unread bytes.
pub struct Input {
    pub socket: TcpStream,
    received: Vec<u8>,
    taken: usize,
}

impl Input {
    pub fn open(address: &str) -> Outcome<Input> {
        let socket = TcpStream::connect(address)?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(SILENCE))?;
        socket.set_write_timeout(Some(SILENCE))?;
        Ok(Input {
            socket,
            received: Vec::new(),
            taken: 0,
        })
    }

    pub fn unread(&self) -> &[u8] {
        self.received.get(self.taken..).unwrap_or_default()
    }

    /// The next bytes; there must be so many.
    pub fn take(&mut self, count: usize) -> &[u8] {
        let start = self.taken;
        self.taken += count;
        self.received.get(start..self.taken).unwrap_or_default()
    }

    /// Waits for more.
    pub fn fill(&mut self) -> Outcome<()> {
        self.received.drain(..self.taken);
        self.taken = 0;
        let used = self.received.len();
        self.received.resize(used + CHUNK_BYTES, 0);
        let count = self
            .socket
            .read(self.received.get_mut(used..).unwrap_or_default())?;
        self.received.truncate(used + count);
        if count == 0 {
            return Err("the server closed the connection".into());
        }
        Ok(())
    }
}

/// One connection to nats-server, and what is to be written.
pub struct Connection {
    pub input: Input,
    pub outgoing: Vec<u8>,
}

impl Connection {
    pub fn open(address: &str) -> Outcome<Connection> {
        let mut connection = Connection {
            input: Input::open(address)?,
            outgoing: Vec::new(),
        };
        connection.outgoing.extend_from_slice(
            b"CONNECT {\"verbose\":false,\"pedantic\":false,\"headers\":true,\"no_responders\":true}\r\n\
              SUB i.* 1\r\n",
        );
        connection.flush()?;
        Ok(connection)
    }

    pub fn flush(&mut self) -> Outcome<()> {
        self.input.socket.write_all(&self.outgoing)?;
        self.outgoing.clear();
        Ok(())
    }

    /// A line without its end, if a whole one is there.
    fn line(&mut self) -> Option<&[u8]> {
        let end = self
            .input
            .unread()
            .windows(2)
            .position(|pair| pair == b"\r\n")?;
        self.input.take(end + 2).get(..end)
    }

    /// The body of the next message.
    pub fn message(&mut self) -> Outcome<Vec<u8>> {
        loop {
            match self.message_if_there()? {
                Some(body) => return Ok(body),
                None => self.input.fill()?,
            }
        }
    }

    /// The same, if one has arrived. A body is one line here: JSON without line breaks, or nothing behind a status.
    pub fn message_if_there(&mut self) -> Outcome<Option<Vec<u8>>> {
        loop {
            let start = self.input.taken;
            let Some(line) = self.line() else {
                return Ok(None);
            };
            if line.starts_with(b"MSG ") {
                return match self.line() {
                    Some(body) => Ok(Some(body.to_vec())),
                    None => {
                        self.input.taken = start;
                        Ok(None)
                    }
                };
            }
            if line == b"PING" {
                self.outgoing.extend_from_slice(b"PONG\r\n");
            } else if line.starts_with(b"-ERR") || line.starts_with(b"HMSG ") {
                return Err(String::from_utf8_lossy(line).into());
            }
        }
    }
}
