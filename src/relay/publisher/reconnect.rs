//! Another connection to NATS in place of one that is over, within the session.

use super::{Interrupt, Publisher};
use crate::jetstream::client::Link;
use crate::postgres::Lsn;
use crate::relay::checkpoint::store::Overtaken;
use crate::relay::connect::Connector;
use crate::relay::core::Core;
use crate::relay::core::resume::facts::Known;
use crate::relay::core::trouble::{Cause, Trouble};
use crate::relay::error::{Error, Verdict};
use crate::relay::vitals::{Phase, ReconnectCause};
use std::time::{Duration, Instant};

/// One attempt to connect: several servers, and dozens of requests, with a deadline each.
const CONNECT_LIMIT: Duration = Duration::from_secs(600);

impl Publisher<'_> {
    pub(super) fn trouble(&mut self, outcome: Result<(), Trouble>) -> Result<(), Interrupt> {
        Err(match outcome {
            Ok(()) => return Ok(()),
            Err(Trouble::Reconnect(cause)) => {
                let kind = match cause {
                    Cause::OtherAnswer { .. } | Cause::Elsewhere { .. } => {
                        ReconnectCause::UnexpectedAck
                    }
                    Cause::Refused(_) | Cause::Lags(_) => ReconnectCause::Refused,
                    Cause::AckTimeout => ReconnectCause::AckTimeout,
                    Cause::NoStream(ref subject) => {
                        self.unrouted = Some(subject.clone());
                        ReconnectCause::NoStream
                    }
                    Cause::Disagrees(_) => ReconnectCause::Regressed,
                };
                Interrupt::Reconnect(kind, cause.to_string())
            }
            Err(Trouble::Refused { token, why }) => Interrupt::Refused { token, why },
            Err(Trouble::Halt(halt)) => Interrupt::End(Error::Halt(halt)),
            Err(Trouble::OutOfOrder(position)) => Interrupt::End(Error::OutOfOrder(position)),
        })
    }

    /// Connects and reads the streams back until that works. `None`: the session is to end.
    pub(super) fn reconnect(&mut self, reason: &str) -> Result<Option<Link>, Error> {
        let mut reason = reason.to_string();
        let (mut tries, mut failed_reads) = (0, 0);
        loop {
            let now = Instant::now();
            let Some(pause) = self.outage.failed(now) else {
                return Err(Error::GaveUp(reason));
            };
            if self.said.is_new(&reason, now) {
                log::warn!(reason = reason.as_str(); "connecting to NATS again; Postgres keeps what is not stored");
            }
            self.vitals.hindered(Some(reason.clone()));
            self.vitals.publisher.within(CONNECT_LIMIT);
            self.stop.wait(pause);
            if self.stop.is_stopping() {
                self.close(Instant::now());
            }
            if self.ending.is_limited() {
                // what is not acknowledged comes again; nobody is to wait for a server that is away
                return Ok(None);
            }
            match self.rejoin(tries, failed_reads) {
                Ok(link) => {
                    self.vitals.enter(Phase::Relaying, None);
                    self.vitals
                        .set_nats(link.server(), &link.server_info().version);
                    log::info!(server = link.server(); "connected to NATS again");
                    return Ok(Some(link));
                }
                Err(error)
                    if error.verdict() == Verdict::Retry
                        && !matches!(error, Error::Regressed(_) | Error::Overtaken) =>
                {
                    failed_reads += u32::from(matches!(error, Error::ReadBack(_)));
                    reason = error.to_string();
                }
                Err(error) => return Err(error),
            }
            tries += 1;
        }
    }

    fn rejoin(&mut self, tries: usize, failed_reads: u32) -> Result<Link, Error> {
        let connector = Connector {
            config: self.config,
            lineage: self.lineage,
            stop: self.stop,
            accept_loss: false,
            failed_reads,
        };
        let found = connector.find(tries, &mut self.said)?;
        if let Some(subject) = self.unrouted.take() {
            connector.check_home(&found.link, &subject)?;
        }
        let (core, store) = match (&mut self.core, &mut self.store) {
            (Core::AtLeastOnce(core), store) => {
                let read = store.as_mut().map(|it| connector.read_key(&found, it));
                match read {
                    Some(Ok(Err(Overtaken))) => *store = None,
                    Some(Err(error)) => {
                        log::warn!("going on without the checkpoint: {error}");
                        *store = None;
                    }
                    Some(Ok(Ok(()))) | None => {}
                }
                core.resume(connector.capacity(&found));
                self.limits_read = Some(Instant::now());
                return Ok(found.link);
            }
            (Core::ExactlyOnce(core), Some(store)) => (core, store),
            (Core::ExactlyOnce(_), None) => {
                return Err(Error::Internal(
                    "exactly-once delivery without a checkpoint",
                ));
            }
        };
        if let Err(Overtaken) = connector.read_key(&found, store)? {
            // a new session finds out who has the slot, and resumes with what the other has recorded
            return Err(Error::Overtaken);
        }
        let cut = core.on_disconnect();
        let resumed = connector.resume(found, store, Known::of_core(cut));
        let (link, connection) = resumed.map_err(|error| match error {
            // the slot still has what is lost: a new session begins with an older cut
            Error::Lost(lost) => {
                store.distrust(&lost.stream);
                Error::Regressed(lost)
            }
            error => error,
        })?;
        if let Some(lost) = connection.resumed.disagreed.first() {
            return Err(Error::Regressed(lost.clone()));
        }
        core.resume(connection, Instant::now());
        self.limits_read = Some(Instant::now());
        connector.claim(&link, core, store, false, Lsn::INVALID)?;
        Ok(link)
    }
}
