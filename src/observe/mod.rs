//! What the relay shows of itself: metrics, health and a status page over HTTP, what systemd is told, and a bar for who
//! waits at a terminal.
//!
//! It reads [`Vitals`], on threads of its own, and can neither stop nor slow the relay: nothing here is waited for.

mod bar;
mod http;
pub mod metrics;
mod systemd;

use crate::config::Config;
use crate::relay::vitals::Vitals;
use http::{Answer, Status};
use metrics::Metrics;
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Instant;

/// The status page: one file, which asks for nothing but `/metrics` and `/readyz`.
const PAGE: &str = include_str!("page.html");

/// It could not be begun.
#[derive(Debug)]
pub enum Error {
    /// The address of `-listen` cannot be had.
    Listen {
        /// It.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The system grants no thread.
    Thread(io::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Listen { address, source } => write!(
                f,
                "listen on {address}: {source}; give -listen another port, or end the program that has it"
            ),
            Error::Thread(source) => write!(f, "start a thread: {source}"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Listen { source, .. } | Error::Thread(source) => Some(source),
        }
    }
}

/// Serves HTTP where the configuration says, and tells systemd and a terminal if there are such.
pub fn start(config: &Config, vitals: &Arc<Vitals>) -> Result<(), Error> {
    if let Some(address) = config.listen {
        let failed = |source| Error::Listen { address, source };
        let listener = TcpListener::bind(address).map_err(failed)?;
        let bound = listener.local_addr().map_err(failed)?;
        let metrics = Metrics::new(vitals.clone());
        let vitals = vitals.clone();
        let answer = move |path: &str| answer(path, &vitals, &metrics);
        http::serve(listener, answer).map_err(Error::Thread)?;
        log::info!(address:% = bound; "serving metrics, health and a status page");
    }
    systemd::start(vitals.clone()).map_err(Error::Thread)?;
    bar::start(config.log.format, config.drain, vitals.clone()).map_err(Error::Thread)
}

/// The relay has ended; the process is about to.
pub fn stopping() {
    systemd::stopping();
    bar::stopping();
}

fn answer(path: &str, vitals: &Vitals, metrics: &Metrics) -> Answer {
    let health = |health: Result<String, String>| match health {
        Ok(text) => Answer::text(Status::Ok, text + "\n"),
        Err(text) => Answer::text(Status::Unavailable, text + "\n"),
    };
    match path {
        "/" => Answer::new(Status::Ok, "text/html; charset=utf-8", PAGE.to_string()),
        "/metrics" => Answer::new(Status::Ok, metrics::CONTENT_TYPE, metrics.text()),
        "/livez" => health(vitals.liveness(Instant::now()).map(|()| "alive".into())),
        "/readyz" => health(vitals.readiness()),
        _ => Answer::text(
            Status::NotFound,
            "there are /, /metrics, /livez and /readyz\n".into(),
        ),
    }
}
