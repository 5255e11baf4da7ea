//! What systemd is told of a unit of `Type=notify` (`sd_notify(3)`): that the relay has begun, what it is doing, and, where
//! the unit has a `WatchdogSec`, that its threads still move.
//!
//! A relay that connects, or waits as a standby, has not failed: systemd counts it as started from the first attempt's
//! end on, and the status line says what it waits for.

use crate::relay::vitals::Vitals;
use sd_notify::NotifyState;
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// How soon a change is told.
const INTERVAL: Duration = Duration::from_secs(1);

/// Starts a thread, if there is somebody to tell.
pub fn start(vitals: Arc<Vitals>) -> io::Result<()> {
    if std::env::var_os("NOTIFY_SOCKET").is_none() {
        return Ok(());
    }
    // half of what systemd waits, as the manual page has it
    let watchdog = sd_notify::watchdog_enabled().map(|limit| limit / 2);
    let mut teller = Teller::default();
    let tell = move || {
        loop {
            let now = Instant::now();
            teller.tell(&vitals, watchdog, now);
            thread::sleep(watchdog.unwrap_or(INTERVAL).min(INTERVAL));
        }
    };
    let thread = thread::Builder::new().name("systemd".into());
    thread.spawn(tell).map(drop)
}

/// The process is about to end.
pub fn stopping() {
    notify(&[NotifyState::Stopping]);
}

/// What was told last.
#[derive(Default)]
struct Teller {
    is_ready: bool,
    status: String,
    alive_at: Option<Instant>,
}

impl Teller {
    /// `watchdog`: how often systemd wants to hear that the threads move.
    fn tell(&mut self, vitals: &Vitals, watchdog: Option<Duration>, now: Instant) {
        if !self.is_ready && vitals.has_begun() {
            self.is_ready = true;
            notify(&[NotifyState::Ready]);
        }
        let status = vitals.readiness().unwrap_or_else(|hindrance| hindrance);
        if status != self.status {
            notify(&[NotifyState::Status(&status)]);
            self.status = status;
        }
        let is_due = |every| {
            let since = |at| now.saturating_duration_since(at) >= every;
            self.alive_at.is_none_or(since)
        };
        if watchdog.is_some_and(is_due) && vitals.liveness(now).is_ok() {
            self.alive_at = Some(now);
            notify(&[NotifyState::Watchdog]);
        }
    }
}

fn notify(state: &[NotifyState<'_>]) {
    // nobody listens any more: the relay goes on
    if let Err(error) = sd_notify::notify(state) {
        log::debug!(cause:% = error; "systemd was not told");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_watchdog_hears_nothing_while_a_thread_is_late() {
        const EVERY: Duration = Duration::from_secs(2);
        let vitals = Vitals::default();
        let start = Instant::now();
        let mut teller = Teller::default();
        let mut told_at = |vitals: &Vitals, after: u64| {
            let now = start + Duration::from_secs(after);
            teller.tell(vitals, Some(EVERY), now);
            teller.alive_at == Some(now)
        };
        vitals.publisher.within(Duration::from_secs(10));
        assert!(told_at(&vitals, 0));
        // not before it is due
        assert!(!told_at(&vitals, 1));
        assert!(told_at(&vitals, 2));
        assert!(!told_at(&vitals, 100));
        // it is back
        vitals.publisher.within(Duration::from_secs(200));
        assert!(told_at(&vitals, 101));

        // a unit without a WatchdogSec asks for nothing
        let mut teller = Teller::default();
        teller.tell(&vitals, None, start);
        assert_eq!(teller.alive_at, None);
    }
}
