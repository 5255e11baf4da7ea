//! The request to stop, as a flag for loops and as a channel for waits.

use crossbeam_channel::{Receiver, Sender, bounded};
use std::convert::Infallible;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// Starts as "go on"; once stopping it stays so.
#[derive(Debug)]
pub struct Stop {
    stopping: AtomicBool,
    sender: Mutex<Option<Sender<Infallible>>>,
    receiver: Receiver<Infallible>,
}

impl Default for Stop {
    fn default() -> Stop {
        let (sender, receiver) = bounded(0);
        Stop {
            stopping: AtomicBool::new(false),
            sender: Mutex::new(Some(sender)),
            receiver,
        }
    }
}

impl Stop {
    /// Asks everyone to stop.
    pub fn begin(&self) {
        self.stopping.store(true, Ordering::Release);
        if let Ok(mut sender) = self.sender.lock() {
            sender.take();
        }
    }

    /// For loops.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// For `select!`: nothing is ever sent; the channel closes when stopping begins.
    pub fn channel(&self) -> &Receiver<Infallible> {
        &self.receiver
    }

    /// Waits so long, or until stopping begins.
    pub fn wait(&self, timeout: std::time::Duration) {
        let _ = self.receiver.recv_timeout(timeout);
    }
}
