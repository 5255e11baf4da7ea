//! The relay: a supervisor that runs one session after another, and what a session is made of.
//!
//! [`session`] connects both sides, and [`threads`] are the three that then work: [`reader`], [`publisher`], [`feedback`].
//! They share [`progress`] and are ended by [`stop`]. What the publisher decides is decided in [`core`]. [`slot`] and
//! [`connect`] read what each side holds before a start, [`checkpoint`] what an earlier process has left; [`preflight`]
//! judges what Postgres holds.
//! What the outside may know of all this is in [`vitals`], made of [`figure`]s, and in [`slot_wal`].
//! This file is the one retry loop for sessions; a lost connection to NATS alone is the publisher's.

pub mod checkpoint;
pub mod connect;
pub mod core;
pub mod error;
pub mod feedback;
pub mod figure;
pub mod outage;
pub mod pace;
pub mod preflight;
pub mod progress;
pub mod publisher;
mod pulse;
pub mod reader;
pub mod repeated;
mod report;
pub mod session;
pub mod slot;
pub mod slot_wal;
pub mod stop;
pub mod threads;
pub mod vitals;

use crate::config::Config;
use crate::exit::Exit;
use crate::outbox::mapper::Mapper;
use error::{Error, Verdict};
use outage::{Outage, WORKING};
use repeated::Repeated;
use session::Session;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::sync::Arc;
use std::time::{Duration, Instant};
use stop::Stop;
use threads::Ended;
use vitals::{Phase, Vitals};

/// How often a standby looks whether the slot is free: the time a takeover takes at most.
const SLOT_INTERVAL: Duration = Duration::from_secs(1);
/// What the supervisor does between two looks at itself: connecting to several servers, with dozens of requests,
/// each with a deadline of seconds.
const SUPERVISOR_LIMIT: Duration = Duration::from_secs(600);

/// Relays until it is told to stop, everything is drained, or it cannot go on.
pub fn run(config: Config, vitals: &Vitals) -> Exit {
    let stop = Arc::new(Stop::default());
    if let Err(error) = watch_signals(stop.clone()) {
        log::error!(cause:% = error; "cannot watch for signals");
        return Exit::Internal;
    }
    match supervise(&config, &stop, vitals) {
        Ok(ended) => {
            log::info!(reason:? = ended; "stopped");
            Exit::Done
        }
        Err((error, exit)) => {
            log::error!(code = exit as u8; "{error}");
            exit
        }
    }
}

/// One session after another, until one ends for good.
fn supervise(config: &Config, stop: &Stop, vitals: &Vitals) -> Result<Ended, (Error, Exit)> {
    let mut session = Session::new(config, stop, Mapper::new(&config.mapping), vitals);
    let mut outage = Outage::new(config.max_outage);
    let mut said = Repeated::default();
    loop {
        let start = Instant::now();
        vitals.supervisor.within(SUPERVISOR_LIMIT);
        let error = match session.run() {
            Ok(ended) => return Ok(ended),
            Err(error) => error,
        };
        if stop.is_stopping() {
            log::info!(cause:% = error; "the session had ended already");
            return Ok(Ended::Stopped);
        }
        let now = Instant::now();
        if session.take_worked() || now.saturating_duration_since(start) >= WORKING {
            outage.worked();
        }
        match error.verdict() {
            Verdict::Exit(exit) if !session.may_be_let_in_again(&error) => {
                return Err((error, exit));
            }
            Verdict::WaitForSlot if config.no_wait => return Err((error, Exit::SlotInUse)),
            Verdict::WaitForSlot => {
                // being the standby is no outage
                outage.worked();
                vitals.enter(Phase::Standby, Some(error.to_string()));
                if said.is_new("standby", now) {
                    log::info!("{error}; waiting for it as a standby");
                }
                stop.wait(SLOT_INTERVAL);
            }
            verdict @ (Verdict::Retry | Verdict::Exit(_)) => {
                let Some(pause) = outage.failed(now) else {
                    return Err(match verdict {
                        Verdict::Exit(exit) => (error, exit),
                        _ => (Error::GaveUp(error.to_string()), Exit::Unavailable),
                    });
                };
                vitals.enter(Phase::Connecting, Some(error.to_string()));
                if said.is_new(&error.to_string(), now) {
                    log::warn!("{error}; trying again");
                }
                stop.wait(pause);
            }
        }
        if stop.is_stopping() {
            return Ok(Ended::Stopped);
        }
    }
}

/// The first SIGTERM or SIGINT stops in order, the second at once; SIGHUP is for the terminal that is gone.
fn watch_signals(stop: Arc<Stop>) -> std::io::Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP])?;
    let watch = move || {
        for signal in signals.forever() {
            match signal {
                SIGHUP => log::info!("ignored SIGHUP"),
                signal if stop.is_stopping() => {
                    log::warn!(signal; "stopping at once; what is not confirmed comes again at the next start");
                    crate::logging::flush();
                    std::process::exit(128 + signal);
                }
                signal => {
                    log::info!(signal; "stopping: waiting for what was published to be acknowledged");
                    stop.begin();
                }
            }
        }
    };
    std::thread::Builder::new()
        .name("signals".to_string())
        .spawn(watch)?;
    Ok(())
}
