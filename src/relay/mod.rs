//! The relay: a supervisor that runs one session after another, and what a session is made of.
//!
//! [`session`] connects both sides and starts the three threads: [`reader`], [`publisher`], [`feedback`].
//! They share [`progress`] and are ended by [`stop`]. What the publisher decides is decided in [`core`], what
//! may be confirmed in [`confirm`]. [`slot`] and [`rejoin`] read what each side holds before a
//! start, [`checkpoint`] what an earlier process has left (in a [`bucket`]); [`publication`] sees whether rows are left out.
//! What the outside may know of all this is in [`vitals`].
//! This file is the one retry loop for sessions; a lost connection to NATS alone is the publisher's.

pub mod checkpoint;
pub mod core;
pub mod error;
pub mod feedback;
pub mod outage;
pub mod pace;
pub mod progress;
pub mod publication;
#[cfg(any())]
pub mod publisher;
#[cfg(any())]
mod pulse;
pub mod reader;
pub mod repeated;
#[cfg(any())]
mod report;
#[cfg(any())]
pub mod session;
pub mod slot;
pub mod stop;
pub mod vitals;

/// WIP stub while session and publisher are being rewired.
pub fn run(_: crate::config::Config, _: &vitals::Vitals) -> crate::exit::Exit {
    crate::exit::Exit::Internal
}
