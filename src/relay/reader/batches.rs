//! Batches on their way to the publisher: their size, and how many wait for it.

use crate::outbox::batch::Batch;
use crossbeam_channel::{Receiver, RecvTimeoutError, SendError, Sender, TrySendError};
use std::convert::Infallible;
use std::time::Duration;

/// A batch goes on at this size even if more is there: with the channel's bound and one event of the
/// largest size this is what the relay holds between its threads.
pub const BATCH_BYTES: usize = 64 * 1024;
/// The same for transactions without events and very small ones.
pub const BATCH_CHANGES: usize = 512;
/// By so much a batch goes beyond `BATCH_BYTES` when its last event is an ordinary one.
const BATCH_SLACK: usize = 4 * 1024;
/// One that is larger than this has an event larger than NATS takes by default, and others.
const LARGE_BATCH_BYTES: usize = (1 << 20) + 2 * BATCH_BYTES;
/// How often the reader looks whether anybody still works on a large batch.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// How many batches may wait for the publisher; a large one counts for several.
pub const CHANNEL_BATCHES: usize = 4;

/// Closes once a large batch is gone.
pub type Lease = Receiver<Infallible>;

/// With room for all it will ever hold, but for large events: one that grows is copied again and again.
pub fn empty() -> Batch {
    Batch::with_capacity(BATCH_BYTES + BATCH_SLACK, BATCH_CHANGES)
}

/// Takes out what a batch holds, into memory of just that size, and leaves the room for the next. (One that goes on itself and
/// gives back what it did not need leaves holes too small for the next.) Large events are not copied.
pub fn take(batch: &mut Batch) -> Batch {
    if batch.capacity() > BATCH_BYTES + BATCH_SLACK {
        let mut full = std::mem::replace(batch, empty());
        full.shrink();
        return full;
    }
    let full = batch.clone();
    batch.clear();
    full
}

/// A large batch takes several places in the channel, so that what waits there is bounded in bytes. Of those that are larger
/// than an event is that NATS takes by default there is one at a time: the next row is read once it is stored or parked. With
/// `before`, the one that was sent before: once that is, as the last event of this one may wait for the next row.
pub fn send(
    changes: &Sender<Batch>,
    mut batch: Batch,
    before: Option<&mut Option<Lease>>,
) -> Result<(), SendError<Batch>> {
    let bytes = batch.len_bytes();
    let own = (bytes > LARGE_BATCH_BYTES).then(|| batch.lease());
    let places = (bytes / BATCH_BYTES).min(CHANNEL_BATCHES);
    for _ in 1..places {
        changes.send(Batch::default())?;
    }
    changes.send(batch)?;
    let gone = match (own, before) {
        (Some(own), Some(before)) => before.replace(own),
        (own, _) => own,
    };
    let Some(gone) = gone else {
        return Ok(());
    };
    while gone.recv_timeout(LOOK_INTERVAL) == Err(RecvTimeoutError::Timeout) {
        // whoever took it may have left it behind
        if let Err(TrySendError::Disconnected(batch)) = changes.try_send(Batch::default()) {
            return Err(SendError(batch));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outbox::position::Position;
    use crossbeam_channel::bounded;
    use std::thread;

    fn batch(bytes: usize) -> Batch {
        let mut batch = empty();
        let body = |out: &mut Vec<u8>| {
            out.resize(out.len() + bytes, b'x');
            Ok::<(), Infallible>(())
        };
        let Ok(()) = batch.push_event("", Position::default(), |_| Ok(()), |_| Ok(()), body);
        batch
    }

    #[test]
    fn what_waits_for_the_publisher_is_bounded_in_bytes() {
        for bytes in [100, BATCH_BYTES + 100, 2 * BATCH_BYTES, 14 * BATCH_BYTES] {
            let (sender, receiver) = bounded(CHANNEL_BATCHES);
            while CHANNEL_BATCHES - sender.len() >= (bytes / BATCH_BYTES).clamp(1, CHANNEL_BATCHES)
            {
                send(&sender, batch(bytes), None).unwrap();
            }
            assert!(sender.is_full());
            let waiting: usize = receiver.try_iter().map(|batch| batch.len_bytes()).sum();
            let most = CHANNEL_BATCHES * (BATCH_BYTES + BATCH_SLACK);
            assert!(
                waiting <= most.max(bytes),
                "{waiting} bytes of {bytes} each"
            );
        }
    }

    #[test]
    fn of_large_batches_there_is_one_at_a_time() {
        let (sender, receiver) = bounded(CHANNEL_BATCHES);
        thread::scope(|scope| {
            let sending = scope.spawn(|| send(&sender, batch(LARGE_BATCH_BYTES + 1), None));
            let large = receiver.iter().find(|batch| !batch.is_empty());
            // it looks whether anybody is there, and waits on
            receiver.recv().unwrap();
            assert!(large.is_some() && !sending.is_finished());
            drop(large);
            sending.join().unwrap().unwrap();
            // or whoever took it is gone
            let sending = scope.spawn(|| send(&sender, batch(LARGE_BATCH_BYTES + 1), None));
            let large = receiver.iter().find(|batch| !batch.is_empty());
            drop(receiver);
            assert!(sending.join().unwrap().is_err());
            drop(large);
        });
    }

    #[test]
    fn a_large_batch_may_wait_for_the_next_one_and_that_for_no_other() {
        let (sender, receiver) = bounded(16);
        let large = || batch(LARGE_BATCH_BYTES + 1);
        let mut before = None;
        send(&sender, large(), Some(&mut before)).unwrap();
        send(&sender, batch(1), Some(&mut before)).unwrap();
        let first = receiver.iter().find(|batch| batch.len_bytes() > 1);
        thread::scope(|scope| {
            let sending = scope.spawn(|| send(&sender, large(), Some(&mut before)));
            let second = receiver.iter().find(|batch| batch.len_bytes() > 1);
            receiver.recv().unwrap();
            assert!(second.is_some() && !sending.is_finished());
            drop(first);
            sending.join().unwrap().unwrap();
            drop(second);
        });
    }

    #[test]
    fn a_batch_keeps_no_more_than_it_holds() {
        for bytes in [100, BATCH_BYTES, 10 * BATCH_BYTES] {
            let mut filled = batch(bytes);
            let full = take(&mut filled);
            assert_eq!((full.changes().len(), full.len_bytes()), (1, bytes));
            assert!(full.room() < bytes + 1024, "{} bytes", full.room());
            assert!(filled.is_empty() && filled.len_bytes() == 0);
            assert_eq!(filled.room(), empty().room());
        }
        // one that had grown while its events were made
        let mut filled = batch(10 * BATCH_BYTES);
        filled.clear();
        take(&mut filled);
        assert_eq!(filled.room(), empty().room());
    }
}
