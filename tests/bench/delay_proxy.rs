//! A network that takes its time, for `scripts/bench`: passes bytes on to an address, each a delay after it came, in both
//! directions. Prints the port it listens on, and serves until it is killed.

use std::error::Error;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::{Duration, Instant};

const USAGE: &str = "delay_proxy ADDRESS MILLISECONDS";
/// One read at most, and how many of them may be on their way: far more than the delay times the rate of either server.
const READ_BYTES: usize = 64 * 1024;
const READS: usize = 1024;

fn main() -> Result<(), Box<dyn Error>> {
    let mut given = std::env::args().skip(1);
    let address = given.next().ok_or(USAGE)?;
    let delay = Duration::from_millis(given.next().ok_or(USAGE)?.parse()?);
    let listener = TcpListener::bind("127.0.0.1:0")?;
    println!("{}", listener.local_addr()?.port());
    for client in listener.incoming() {
        let client = client?;
        let server = TcpStream::connect(&address)?;
        pass(client.try_clone()?, server.try_clone()?, delay)?;
        pass(server, client, delay)?;
    }
    Ok(())
}

/// Starts what passes one direction on, until either end closes.
fn pass(mut from: TcpStream, mut to: TcpStream, delay: Duration) -> Result<(), Box<dyn Error>> {
    to.set_nodelay(true)?;
    let (sender, receiver) = sync_channel::<(Instant, Vec<u8>)>(READS);
    thread::spawn(move || {
        let mut buffer = vec![0; READ_BYTES];
        loop {
            match from.read(&mut buffer) {
                Ok(0) => return,
                Ok(length) => {
                    let due = Instant::now() + delay;
                    if sender.send((due, buffer[..length].to_vec())).is_err() {
                        return;
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    });
    thread::spawn(move || {
        for (due, bytes) in receiver {
            thread::sleep(due.saturating_duration_since(Instant::now()));
            if to.write_all(&bytes).is_err() {
                break;
            }
        }
        // whichever end is gone, the other one is to learn of it
        let _ = to.shutdown(Shutdown::Both);
    });
    Ok(())
}
