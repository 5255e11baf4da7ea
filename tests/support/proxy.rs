//! A TCP proxy on loopback with faults that a test switches while connections run.
//!
//! Each direction of a connection has a thread that reads and a thread that writes, with a bounded queue
//! between them, so that a delay does not limit the throughput and a frozen direction fills up as a
//! network does: first the queue, then the kernel's buffers, then the sender.

use super::ports::free_port;
use super::process::lock;
use crossbeam_channel::{Receiver, Sender, bounded};
use socket2::SockRef;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// What one read takes, and how many reads wait in a direction's queue.
const CHUNK_BYTES: usize = 16 << 10;
const QUEUE_CHUNKS: usize = 64;

/// How often a trickle writes, and a blocked write looks whether the connection is to end.
const TICK: Duration = Duration::from_millis(50);

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the client to the server.
    ToServer,
    /// From the server to the client.
    ToClient,
}

/// What happens to bytes, from now on, on all connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// They pass.
    Pass,
    /// They stay where they are; nothing is lost. A network that is gone, until it comes back.
    Freeze,
    /// They pass until these come, in one piece: then it is [`Mode::Freeze`].
    FreezeAt(&'static str),
    /// Those of one direction disappear, the other passes: a half-open connection. A connection that has lost bytes
    /// passes no later ones in that direction, whatever the mode: no network delivers what follows a gap.
    Swallow(Direction),
    /// They arrive this much later.
    Delay(Duration),
    /// So many of them pass each second, in each direction of each connection.
    Trickle(u64),
    /// Connections end with a reset, also new ones: nobody listens there.
    Refuse,
    /// A connection ends in order where the client sends this word; what it sent before passes.
    EndAt(&'static str),
}

/// A listening proxy; it ends, with all its connections, when dropped.
pub struct Proxy {
    shared: Arc<Shared>,
    port: u16,
    acceptor: Option<JoinHandle<()>>,
}

struct Shared {
    server: SocketAddr,
    mode: Mutex<Mode>,
    mode_changed: Condvar,
    links: Mutex<Vec<Running>>,
    accepted: AtomicU64,
    passed: [AtomicU64; 2],
    ending: AtomicBool,
}

/// The two sockets of one connection. Nobody duplicates them: the last owner closes them, and only that
/// sends the reset.
struct Link {
    client: TcpStream,
    server: TcpStream,
    /// Of each direction, whether bytes have disappeared.
    swallowed: [AtomicBool; 2],
    ending: AtomicBool,
}

/// A connection's sockets, while its threads have them, and the threads.
struct Running {
    link: Weak<Link>,
    threads: Vec<JoinHandle<()>>,
}

impl Proxy {
    /// Forwards to `127.0.0.1:SERVER_PORT`, faultless at first.
    pub fn start(server_port: u16) -> Proxy {
        let (listener, port) = listen();
        let shared = Arc::new(Shared {
            server: ([127, 0, 0, 1], server_port).into(),
            mode: Mutex::new(Mode::Pass),
            mode_changed: Condvar::new(),
            links: Mutex::default(),
            accepted: AtomicU64::new(0),
            passed: Default::default(),
            ending: AtomicBool::new(false),
        });
        let acceptor = thread::spawn({
            let shared = Arc::clone(&shared);
            move || accept(&shared, &listener)
        });
        Proxy {
            shared,
            port,
            acceptor: Some(acceptor),
        }
    }

    /// The port on 127.0.0.1 that clients connect to.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Switches what happens to bytes.
    pub fn set(&self, mode: Mode) {
        *lock(&self.shared.mode) = mode;
        self.shared.mode_changed.notify_all();
        if mode == Mode::Refuse {
            self.reset();
        }
    }

    /// What happens to bytes now.
    pub fn mode(&self) -> Mode {
        *lock(&self.shared.mode)
    }

    /// Ends all present connections in order (FIN to both sides); what was on its way is lost.
    pub fn cut(&self) {
        self.shared.end_links(|link| {
            // a side that has gone by itself cannot be shut down again
            let _ = link.client.shutdown(Shutdown::Both);
            let _ = link.server.shutdown(Shutdown::Both);
        });
    }

    /// Ends all present connections with a reset (RST to both sides).
    pub fn reset(&self) {
        self.shared.end_links(|link| {
            for socket in [&link.client, &link.server] {
                reset_on_close(socket);
                // wakes our reader and tells the other side nothing
                let _ = socket.shutdown(Shutdown::Read);
            }
        });
    }

    /// How many connections there have been.
    pub fn accepted(&self) -> u64 {
        self.shared.accepted.load(Ordering::Relaxed)
    }

    /// How many bytes have been passed on in a direction, over all connections.
    pub fn passed(&self, direction: Direction) -> u64 {
        self.shared.passed[direction as usize].load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::SeqCst);
        // wakes the acceptor
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        self.cut();
    }
}

fn listen() -> (TcpListener, u16) {
    loop {
        let port = free_port();
        match TcpListener::bind(("127.0.0.1", port)) {
            Ok(listener) => return (listener, port),
            Err(error) if error.kind() == ErrorKind::AddrInUse => {}
            Err(error) => panic!("listen on 127.0.0.1:{port}: {error}"),
        }
    }
}

fn reset_on_close(socket: &TcpStream) {
    SockRef::from(socket)
        .set_linger(Some(Duration::ZERO))
        .expect("set SO_LINGER on an open socket");
}

fn accept(shared: &Arc<Shared>, listener: &TcpListener) {
    for client in listener.incoming() {
        if shared.ending.load(Ordering::SeqCst) {
            return;
        }
        let Ok(client) = client else { continue };
        shared.accepted.fetch_add(1, Ordering::Relaxed);
        let server = TcpStream::connect_timeout(&shared.server, Duration::from_secs(5));
        // held while the mode is looked at, so that `set(Refuse)` misses no connection
        let mut links = lock(&shared.links);
        let refuse = *lock(&shared.mode) == Mode::Refuse;
        match server {
            Ok(server) if !refuse => {
                links.retain(|running| running.link.strong_count() > 0);
                links.push(shared.link(client, server));
            }
            _ => reset_on_close(&client),
        }
    }
}

impl Shared {
    fn link(self: &Arc<Self>, client: TcpStream, server: TcpStream) -> Running {
        for socket in [&client, &server] {
            socket.set_nodelay(true).expect("set TCP_NODELAY");
            socket.set_write_timeout(Some(TICK)).expect("set a timeout");
        }
        let link = Arc::new(Link {
            client,
            server,
            swallowed: Default::default(),
            ending: AtomicBool::new(false),
        });
        let mut threads = Vec::new();
        for direction in [Direction::ToServer, Direction::ToClient] {
            let (sender, receiver) = bounded(QUEUE_CHUNKS);
            let reading = Arc::clone(&link);
            threads.push(thread::spawn(move || read(&reading, direction, &sender)));
            let (shared, writing) = (Arc::clone(self), Arc::clone(&link));
            threads.push(thread::spawn(move || {
                shared.write(&writing, direction, &receiver);
            }));
        }
        Running {
            link: Arc::downgrade(&link),
            threads,
        }
    }

    /// Ends every connection in the given way, and waits until its threads have let go of the sockets.
    fn end_links(&self, end: impl Fn(&Link)) {
        for Running { link, threads } in lock(&self.links).drain(..) {
            if let Some(link) = link.upgrade() {
                link.ending.store(true, Ordering::SeqCst);
                end(&link);
            }
            // under the lock, or a writer could look at `ending` before and sleep after
            drop(lock(&self.mode));
            self.mode_changed.notify_all();
            for thread in threads {
                let _ = thread.join();
            }
        }
    }

    fn write(&self, link: &Link, direction: Direction, chunks: &Receiver<(Instant, Vec<u8>)>) {
        let (from, to) = link.ends(direction);
        for (read_at, chunk) in chunks {
            if self.pass_on(link, direction, to, read_at, &chunk).is_none() {
                // the sender must learn that nobody takes its bytes any more
                let _ = from.shutdown(Shutdown::Read);
                return;
            }
        }
        // the other side has sent its last byte
        if !link.ending.load(Ordering::SeqCst) {
            let _ = to.shutdown(Shutdown::Write);
        }
    }

    /// Carries one chunk as the mode, which may change meanwhile, has it. `None` when the connection ended.
    fn pass_on(
        &self,
        link: &Link,
        direction: Direction,
        mut to: &TcpStream,
        read_at: Instant,
        mut chunk: &[u8],
    ) -> Option<()> {
        while !chunk.is_empty() {
            let mut mode = lock(&self.mode);
            if let Mode::FreezeAt(text) = *mode
                && chunk
                    .windows(text.len())
                    .any(|part| part == text.as_bytes())
            {
                *mode = Mode::Freeze;
            }
            if link.ending.load(Ordering::SeqCst) {
                return None;
            }
            let wait = |mode, span| {
                let waited = self.mode_changed.wait_timeout(mode, span);
                drop(waited.unwrap_or_else(PoisonError::into_inner));
            };
            let swallowed = &link.swallowed[direction as usize];
            let part = match *mode {
                _ if swallowed.load(Ordering::Relaxed) => return Some(()),
                Mode::Pass | Mode::FreezeAt(_) | Mode::Refuse => chunk.len(),
                Mode::EndAt(word) => {
                    let at = chunk
                        .windows(word.len())
                        .position(|it| it == word.as_bytes());
                    match at.filter(|_| direction == Direction::ToServer) {
                        None => chunk.len(),
                        Some(0) => {
                            link.ending.store(true, Ordering::SeqCst);
                            let _ = link.client.shutdown(Shutdown::Both);
                            let _ = link.server.shutdown(Shutdown::Both);
                            return None;
                        }
                        Some(at) => at,
                    }
                }
                Mode::Swallow(its) if its == direction => {
                    swallowed.store(true, Ordering::Relaxed);
                    return Some(());
                }
                Mode::Swallow(_) => chunk.len(),
                Mode::Freeze => {
                    wait(mode, Duration::from_secs(1));
                    continue;
                }
                Mode::Delay(delay) => {
                    let left = (read_at + delay).saturating_duration_since(Instant::now());
                    if !left.is_zero() {
                        wait(mode, left);
                        continue;
                    }
                    chunk.len()
                }
                Mode::Trickle(bytes_per_second) => {
                    let ticks_per_second = 20; // of TICK
                    let part = bytes_per_second.div_ceil(ticks_per_second);
                    wait(mode, TICK);
                    chunk.len().min(usize::try_from(part).unwrap_or(usize::MAX))
                }
            };
            match to.write(&chunk[..part]) {
                Ok(written) => {
                    self.passed[direction as usize].fetch_add(written as u64, Ordering::Relaxed);
                    chunk = &chunk[written..];
                }
                Err(error) if is_timeout(error.kind()) => {}
                Err(_) => return None,
            }
        }
        Some(())
    }
}

impl Link {
    fn ends(&self, direction: Direction) -> (&TcpStream, &TcpStream) {
        match direction {
            Direction::ToServer => (&self.client, &self.server),
            Direction::ToClient => (&self.server, &self.client),
        }
    }
}

fn is_timeout(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
    )
}

/// Reads until the end; dropping the queue's sending side tells the writer.
fn read(link: &Link, direction: Direction, chunks: &Sender<(Instant, Vec<u8>)>) {
    let (mut from, to) = link.ends(direction);
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(size) => {
                let chunk = buffer[..size].to_vec();
                if chunks.send((Instant::now(), chunk)).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => {
                // it was reset: so is the other side, or it would see an orderly end
                link.ending.store(true, Ordering::SeqCst);
                reset_on_close(to);
                let _ = to.shutdown(Shutdown::Read);
                return;
            }
        }
    }
}
