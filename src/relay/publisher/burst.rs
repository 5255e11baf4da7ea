//! What goes over the link: events in bursts, and what is done with one that cannot go.

use super::{Interrupt, Publisher};
use crate::jetstream::client::Link;
use crate::jetstream::wire::Publish;
use crate::outbox::batch::Fate;
use crate::outbox::park::{self, OnPoison};
use crate::relay::connect;
use crate::relay::core::{Core, Next};
use crate::relay::error::Error;
use crate::relay::vitals::ReconnectCause;
use std::time::{Duration, Instant};

/// Limits that were read again so shortly before are not read once more: many events in a row that are too large must not cost
/// a connection each.
const LIMITS_ARE_NEW: Duration = Duration::from_secs(1);
/// Events that are handed to the connection at once: the server has them while the next are being looked at.
const BURST: usize = 128;

impl Publisher<'_> {
    /// Publishes all that may go now, as one burst.
    ///
    /// An event that cannot be published interrupts once everything before it is answered: the connection
    /// is dropped with what has not left yet, so each attempt would lose the same events again.
    pub(super) fn publish(&mut self, link: &Link, now: Instant) -> Result<(), Interrupt> {
        if self.postponed.is_none() && link.server_info().ldm {
            self.postponed = Some(Interrupt::Reconnect(
                ReconnectCause::LameDuck,
                format!(
                    "{} is in lame duck mode: it is about to shut down",
                    link.server()
                ),
            ));
        }
        if self.postponed.is_none() {
            self.publish_burst(link, now)?;
        }
        match self.postponed.take() {
            Some(interrupt) if self.core.window().waiting() == 0 => Err(interrupt),
            postponed => {
                self.postponed = postponed;
                Ok(())
            }
        }
    }

    fn publish_burst(&mut self, link: &Link, now: Instant) -> Result<(), Interrupt> {
        self.core.set_max_payload(link.max_payload());
        let mut burst = Vec::new();
        let outcome = loop {
            if burst.len() == BURST {
                self.hand_over(link, std::mem::take(&mut burst), now);
            }
            match self.core.next(now) {
                Ok(Next::Publish(publish)) => {
                    if publish.event.fate() == Fate::Park {
                        let event = publish.event.view();
                        log::warn!(
                            id = event.id, table = event.table, position:% = event.position, cause = park::cause(event.headers);
                            "parking an event that cannot be published"
                        );
                    }
                    burst.push(publish);
                }
                Ok(Next::TooLarge { token, too_large }) => {
                    let (size, limit) = (too_large.size, too_large.limit);
                    let cause = format!("{size} bytes are more than the {limit} that NATS accepts");
                    let is_new = |at| now.duration_since(at) < LIMITS_ARE_NEW;
                    if !self.limits_read.is_some_and(is_new) {
                        // they may have been raised since
                        let reason = format!(
                            "reading {} again: {} is too large, {cause}",
                            too_large.setting,
                            self.describe(token)
                        );
                        self.postponed = Some(Interrupt::Reconnect(ReconnectCause::Limits, reason));
                        break Ok(());
                    }
                    let room = self.core.room(&self.config.mapping.policy.park_subject);
                    if !self.put_aside(token, &cause, room) {
                        let event = self.describe(token);
                        self.postponed = Some(Interrupt::End(Error::TooLarge { event, too_large }));
                        break Ok(());
                    }
                }
                Ok(Next::Read { stream, from, to }) => {
                    self.hand_over(link, std::mem::take(&mut burst), now);
                    let outcome = self.read(link, &stream, from, to);
                    if outcome.is_err() {
                        break outcome;
                    }
                }
                Ok(Next::Ping) => {
                    self.hand_over(link, std::mem::take(&mut burst), now);
                    self.pinged = link.ping();
                }
                Ok(Next::Nothing) => break Ok(()),
                Err(trouble) => {
                    self.postponed = self.trouble(Err(trouble)).err();
                    break Ok(());
                }
            }
        };
        self.hand_over(link, burst, now);
        outcome
    }

    fn hand_over(&mut self, link: &Link, burst: Vec<Publish>, now: Instant) {
        if !burst.is_empty() {
            self.pulse.published(&burst, now);
            link.publish(burst, &self.source);
        }
    }

    /// Does with an event that is not on its way, and never can be, what the operator wants done with it; `false`:
    /// the relay is to halt. `room`: what the park subject takes.
    pub(super) fn put_aside(&mut self, token: u64, cause: &str, room: usize) -> bool {
        let policy = &self.config.mapping.policy;
        let Some(event) = self.core.event(token) else {
            return false;
        };
        // cut to what is taken already, and still not taken
        let is_cut = event.headers.contains(park::BODY_CUT)
            && event.id.len() + event.headers.len() + event.body.len() <= room;
        match (event.fate, policy.on_poison) {
            (Fate::Park, _) if is_cut => false,
            (Fate::Park, _) | (_, OnPoison::Park) => {
                let subject = &policy.park_subject;
                let parked = park::parked(&event, subject, cause, room);
                self.core.replace(token, parked);
                true
            }
            (_, OnPoison::Skip) => {
                log::warn!(
                    id = event.id, table = event.table, position:% = event.position, cause;
                    "gave up an event that cannot be published"
                );
                self.core.give_up(token);
                true
            }
            (_, OnPoison::Stop) => false,
        }
    }

    pub(super) fn describe(&self, token: u64) -> String {
        let event = self.core.event(token);
        event.map_or_else(
            || "an event".to_string(),
            |event| format!("row {} of {} at {}", event.id, event.table, event.position),
        )
    }

    /// Reads what the core wants to know of a stream before it goes on.
    fn read(&mut self, link: &Link, stream: &str, from: u64, to: u64) -> Result<(), Interrupt> {
        let timeout = self.config.nats.request_timeout;
        self.pulse.nothing_waits();
        // a write of the record may wait
        let mut meanwhile = Vec::new();
        let found = connect::read_gap(link, stream, from..=to, timeout, |answer| {
            meanwhile.push(answer)
        })
        .map_err(|error| Interrupt::Reconnect(ReconnectCause::Connection, error.to_string()))?;
        if let Core::ExactlyOnce(core) = &mut self.core {
            let outcome = core.on_read(found, Instant::now());
            let mut dropped = None;
            self.trouble(outcome.map(|found| dropped = found))?;
            if let Some((id, earlier)) = dropped {
                let at = earlier
                    .position
                    .map(|at| at.to_string())
                    .unwrap_or_default();
                log::warn!(
                    id, stream, seq = from, earlier = at;
                    "dropped an event: an earlier one has used its id"
                );
            }
        }
        // the stream answers, and the window moves on
        if self.core.read_again_at().is_none() {
            self.outage.worked();
        }
        self.answered(meanwhile, Instant::now())
    }
}
