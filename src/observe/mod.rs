//! What the relay shows of itself: metrics, health and a status page over HTTP, what systemd is told, and a bar for who
//! waits at a terminal.
//!
//! It reads [`Vitals`], on threads of its own, and can neither stop nor slow the relay: nothing here is waited for.

mod bar;
mod exposition;
mod history;
mod http;
mod listen;
pub mod metrics;
mod request;
mod status;
mod systemd;

use crate::config::Config;
use crate::relay::vitals::Vitals;
use exposition::Format;
use history::History;
use http::{Answer, Status};
use request::Request;
use status::Settings;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

/// The files of the status page, which asks for nothing else but `status`: by path, with what each is.
const FILES: [(&str, &str, &str); 4] = [
    (
        "/",
        "text/html; charset=utf-8",
        include_str!("page/page.html"),
    ),
    (
        "/page.css",
        "text/css; charset=utf-8",
        include_str!("page/page.css"),
    ),
    (
        "/page.js",
        "text/javascript; charset=utf-8",
        include_str!("page/page.js"),
    ),
    ("/icon.svg", "image/svg+xml", include_str!("page/icon.svg")),
];

/// Nothing runs on the page, and nothing is loaded by it, but what is served here; no other site embeds or reads it. Nor can
/// text that is shown (a warning may quote a server) become markup.
const PAGE_HEADERS: &str = "Content-Security-Policy: default-src 'none'; script-src 'self'; style-src 'self'; \
                            connect-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; \
                            frame-ancestors 'none'; require-trusted-types-for 'script'\r\n\
                            Cross-Origin-Resource-Policy: same-origin\r\nReferrer-Policy: no-referrer\r\n";

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
    if !config.listen.is_empty() {
        let failed = |(address, source)| Error::Listen { address, source };
        let listeners = listen::bind(&config.listen).map_err(failed)?;
        let bound = listeners.iter().filter_map(|it| it.local_addr().ok());
        let bound: Vec<String> = bound.map(|address| address.to_string()).collect();
        let site = Site {
            settings: Settings::new(config),
            history: History::start(vitals.clone()).map_err(Error::Thread)?,
            vitals: vitals.clone(),
        };
        let answer = move |request: &Request| site.answer(request);
        http::serve(listeners, answer).map_err(Error::Thread)?;
        log::info!(address = bound.join(","); "serving metrics, health and a status page");
    }
    systemd::start(vitals.clone()).map_err(Error::Thread)?;
    bar::start(config.log.format, config.drain, vitals.clone()).map_err(Error::Thread)
}

/// The relay has ended; the process is about to.
pub fn stopping() {
    systemd::stopping();
    bar::stopping();
}

/// What the answers are made of.
struct Site {
    settings: Settings,
    history: Arc<History>,
    vitals: Arc<Vitals>,
}

impl Site {
    fn answer(&self, request: &Request) -> Answer {
        let health = |health: Result<String, String>| match health {
            Ok(text) => Answer::text(Status::Ok, text + "\n"),
            Err(text) => Answer::text(Status::Unavailable, text + "\n"),
        };
        let path = request.path.as_str();
        if let Some((_, kind, text)) = FILES.iter().find(|(of, ..)| *of == path) {
            return Answer::new(Status::Ok, kind, text.to_string()).with(PAGE_HEADERS);
        }
        match path {
            "/status" => {
                let json = self.settings.status(&self.vitals, &self.history);
                Answer::new(Status::Ok, "application/json", json).with(PAGE_HEADERS)
            }
            "/metrics" => {
                let format = Format::negotiate(&request.accept);
                let text = format.text(&self.vitals);
                Answer::new(Status::Ok, format.content_type(), text).with("Vary: Accept\r\n")
            }
            "/livez" => {
                let liveness = self.vitals.liveness(Instant::now());
                health(liveness.map(|()| "alive".into()))
            }
            "/readyz" => health(self.vitals.readiness()),
            _ => Answer::text(
                Status::NotFound,
                "there are /, /metrics, /livez, /readyz and /status\n".into(),
            ),
        }
    }
}
