//! A socket of the loopback interface for one client, which knows a token: over it a session is handed over to another client of
//! its protocol. Other users of the host can connect first, and are sent away.

use crate::random::unique;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

/// How long the client may take to connect; it does so at once.
const LIMIT: Duration = Duration::from_secs(10);
/// Between two looks whether it has.
const PAUSE: Duration = Duration::from_millis(1);

/// The socket, until it has its client.
pub struct Offer {
    /// To connect to, without TLS.
    pub address: SocketAddr,
    /// What the client must know.
    pub token: String,
    listener: TcpListener,
}

impl Offer {
    /// Listens.
    ///
    /// # Errors
    /// When there is no socket or random number to be had.
    pub fn new() -> io::Result<Offer> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        listener.set_nonblocking(true)?;
        Ok(Offer {
            address: listener.local_addr()?,
            token: unique()?,
            listener,
        })
    }

    /// Waits for the client whom `let_in`, which is given a deadline, lets in, and then listens no more.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`] when nobody has come, and what the socket reports.
    pub fn accept<T>(
        self,
        let_in: impl Fn(&TcpStream, Instant) -> io::Result<Option<T>>,
    ) -> io::Result<(TcpStream, T)> {
        let deadline = Instant::now() + LIMIT;
        while Instant::now() < deadline {
            match self.listener.accept() {
                Ok((client, _)) => {
                    // a stranger's failure is not ours
                    let Ok(Some(said)) = prepare(&client).and_then(|()| let_in(&client, deadline))
                    else {
                        continue;
                    };
                    client.set_read_timeout(None)?;
                    return Ok((client, said));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(PAUSE),
                Err(error) => return Err(error),
            }
        }
        Err(io::ErrorKind::TimedOut.into())
    }
}

fn prepare(client: &TcpStream) -> io::Result<()> {
    client.set_nonblocking(false)?;
    client.set_nodelay(true)
}
