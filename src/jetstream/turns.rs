//! Work for several threads that is done in the order it was given, by one of them at a time.
//!
//! Whoever gives work calls one thread if none is at work, and that one goes on until nothing is left. The others sleep:
//! nobody is woken to hand a turn on, which would cost what is under way a system call and the processor it needs.

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Gives work; the workers end when it is dropped and nothing is left.
pub struct Giver<T> {
    work: Sender<T>,
    calls: Sender<()>,
    is_taken: Arc<AtomicBool>,
}

/// Of one worker; each has a clone.
pub struct Turns<T> {
    work: Receiver<T>,
    calls: Receiver<()>,
    /// Somebody has been called, and looks for work before it sets this back.
    is_taken: Arc<AtomicBool>,
}

/// Both ends of a new queue.
pub fn turns<T>() -> (Giver<T>, Turns<T>) {
    let (give, work) = unbounded();
    // one place: nobody is called while somebody is
    let (call, calls) = bounded(1);
    let is_taken = Arc::new(AtomicBool::new(false));
    let giver = Giver {
        work: give,
        calls: call,
        is_taken: is_taken.clone(),
    };
    let turns = Turns {
        work,
        calls,
        is_taken,
    };
    (giver, turns)
}

impl<T> Giver<T> {
    /// Never blocks. Without effect when no worker is left.
    pub fn give(&self, work: T) {
        let _ = self.work.send(work);
        if !self.is_taken.swap(true, Ordering::SeqCst) {
            let _ = self.calls.try_send(());
        }
    }
}

impl<T> Turns<T> {
    /// Waits to be called; false when there will be no more work. A worker that is called takes work until there is
    /// none, or nobody ever works again.
    pub fn wait(&self) -> bool {
        self.calls.recv().is_ok()
    }

    /// The next work of this turn; None ends it.
    pub fn next(&self) -> Option<T> {
        loop {
            if let Ok(work) = self.work.try_recv() {
                return Some(work);
            }
            self.is_taken.store(false, Ordering::SeqCst);
            // for what was given just before nobody was called
            if self.work.is_empty() || self.is_taken.swap(true, Ordering::SeqCst) {
                return None;
            }
        }
    }
}

impl<T> Clone for Turns<T> {
    fn clone(&self) -> Turns<T> {
        Turns {
            work: self.work.clone(),
            calls: self.calls.clone(),
            is_taken: self.is_taken.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;
    use std::time::Duration;

    const LONG: Duration = Duration::from_secs(30);

    /// The giver is at most a few ahead, so that turns end all the time just when something is given.
    #[test]
    fn everything_is_done_once_and_in_order_whoever_does_it() {
        let (giver, turns) = turns();
        let (done, seen) = unbounded();
        let at_work = Arc::new(AtomicBool::new(false));
        let workers: Vec<_> = (0..3)
            .map(|_| {
                let (turns, done, at_work) = (turns.clone(), done.clone(), at_work.clone());
                thread::spawn(move || {
                    while turns.wait() {
                        while let Some(work) = turns.next() {
                            assert!(!at_work.swap(true, Ordering::SeqCst), "two at work");
                            done.send(work).unwrap();
                            at_work.store(false, Ordering::SeqCst);
                        }
                    }
                })
            })
            .collect();
        for number in 0..2_000_000_u32 {
            giver.give(number);
            if number % 4 == 3 {
                for expected in number - 3..=number {
                    assert_eq!(seen.recv_timeout(LONG), Ok(expected));
                }
            }
        }
        drop(giver);
        for worker in workers {
            worker.join().unwrap();
        }
    }

    #[test]
    fn what_was_given_before_the_end_is_done() {
        let (giver, turns) = turns();
        giver.give(1);
        giver.give(2);
        drop(giver);
        assert!(turns.wait());
        assert_eq!(turns.next(), Some(1));
        assert_eq!(turns.next(), Some(2));
        assert_eq!(turns.next(), None);
        assert!(!turns.wait());
    }
}
