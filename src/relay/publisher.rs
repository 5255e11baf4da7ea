//! The publisher thread: carries what the core decides to JetStream, and the answers back.
//!
//! It holds the connection to NATS, and makes a new one when the core or the connection itself says so;
//! the copy stream from Postgres stands still meanwhile and stays up. It calls nothing that can hang:
//! publishing takes what the socket takes, and asking and closing are done by threads of the link.

use super::bucket;
use super::checkpoint::{CheckpointStore, Opened, Overtaken};
use super::core::memory::Memory;
use super::core::{Cause, Core, Next, Tally, Trouble};
use super::error::{Error, Verdict};
use super::outage::{Outage, WORKING};
use super::progress::Progress;
use super::pulse::Pulse;
use super::rejoin::{self, Joined};
use super::repeated::Repeated;
use super::report::Report;
use super::stop::Stop;
use super::vitals::{Phase, ReconnectCause, Vitals};
use crate::config::Config;
use crate::jetstream;
use crate::jetstream::ack::AckError;
use crate::jetstream::client::{Link, Reply};
use crate::jetstream::connection::Ack;
use crate::jetstream::resume::{Lineage, OUTBOX_POSITION};
use crate::jetstream::streams;
use crate::jetstream::wire::Publish;
use crate::outbox::batch::{Batch, Fate};
use crate::outbox::park::{self, OnPoison};
use crossbeam_channel::{Receiver, never, select};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// So long outstanding acks are waited for when the session ends before everything is settled.
pub const SETTLE_LIMIT: Duration = Duration::from_secs(10);
/// So long the last write of the checkpoint is tried; without it the next start reads back more. A cluster
/// that has just lost a node needs some seconds to find the bucket a leader.
const KEEP_LIMIT: Duration = Duration::from_secs(5);
/// While something is held back, the confirmable position is looked at this often.
const HOLD_BACK_TICK: Duration = Duration::from_secs(1);
/// An idle stream is looked at this often, to see that it did not go backwards.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
/// Events that are handed to the connection at once: the server has them while the next are being looked at.
const BURST: usize = 128;
/// The loop comes round more often than every `LOOK_INTERVAL`; what it does takes seconds at most.
const LOOP_LIMIT: Duration = Duration::from_secs(60);
/// One attempt to connect: several servers, and dozens of requests, with a deadline each.
const CONNECT_LIMIT: Duration = Duration::from_secs(600);

/// The thread's state. `run` consumes it.
pub struct Publisher<'a> {
    config: &'a Config,
    lineage: &'a Lineage,
    changes: Receiver<Batch>,
    progress: &'a Progress,
    stop: &'a Stop,
    core: Core,
    store: CheckpointStore,
    /// `<slot> <system id> <timeline>`, as the position header begins.
    source: Arc<str>,
    outage: Outage,
    said: Repeated,
    report: Report,
    closing: Closing,
    /// The reader has ended, and all it has read was taken.
    drained: bool,
    /// Waits until what was published before it is answered.
    postponed: Option<Interrupt>,
    next_look: Instant,
    /// At the end the checkpoint is waited for until then.
    keep_until: Option<Instant>,
    /// Of the tally's `late`, what was warned of.
    told_late: u64,
    vitals: &'a Vitals,
    pulse: Pulse<'a>,
}

/// Whether more changes come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Closing {
    /// They may.
    No,
    /// They do not; what is in the window has until then, and this connection.
    By(Instant),
    /// They do not; the window is settled however long it takes (`--drain`), unless the relay is to stop.
    WhenSettled,
}

/// What the thread leaves.
pub struct Left {
    /// Why it ended.
    pub result: Result<(), Error>,
    /// Everything that was read is stored.
    pub settled: bool,
    /// What it got done.
    pub tally: Tally,
    /// How far the streams were.
    pub memory: Memory,
    /// The checkpoint.
    pub store: CheckpointStore,
}

/// Why [`Publisher::serve`] left a connection.
enum Interrupt {
    /// It is replaced, for this reason.
    Reconnect(ReconnectCause, String),
    /// The same, after an event that the stream will never take as it is.
    Refused {
        /// Names the event.
        token: u64,
        /// What the stream says.
        error: AckError,
    },
    /// The session ends.
    End(Error),
}

impl<'a> Publisher<'a> {
    /// `core` is connected already, to the link that [`Publisher::run`] is given.
    pub fn new(
        config: &'a Config,
        lineage: &'a Lineage,
        changes: Receiver<Batch>,
        progress: &'a Progress,
        stop: &'a Stop,
        (core, store): (Core, CheckpointStore),
        vitals: &'a Vitals,
    ) -> Publisher<'a> {
        let now = Instant::now();
        Publisher {
            config,
            lineage,
            changes,
            progress,
            stop,
            core,
            store,
            source: lineage.source.to_string().into(),
            outage: Outage::new(config.max_outage),
            said: Repeated::default(),
            report: Report::new(now),
            closing: Closing::No,
            drained: false,
            postponed: None,
            next_look: now + LOOK_INTERVAL,
            keep_until: None,
            told_late: 0,
            vitals,
            pulse: Pulse::new(vitals),
        }
    }

    /// Publishes until no more changes come and those that came are settled, or the deadline for that passes.
    pub fn run(mut self, link: Link) -> Left {
        let result = self.work(link);
        self.pulse.tell(&self.core, self.progress, 0);
        self.vitals.nats_is_connected(false);
        self.vitals.publisher.ended();
        self.progress
            .confirmable(self.core.confirmable(Instant::now()));
        self.report.finish(&self.core, self.progress);
        let settled = self.core.is_settled();
        if !settled {
            log::warn!("not everything was acknowledged in time; it comes again at the next start");
        } else if result.is_ok() && !self.store.holds(&self.core.marks(&self.lineage.source)) {
            log::warn!(
                "the checkpoint was not written in time; what it lacks is stored, but not confirmed, so Postgres sends it again at the next start"
            );
        }
        let tally = self.core.tally();
        Left {
            result,
            settled,
            tally,
            memory: self.core.into_memory(),
            store: self.store,
        }
    }

    fn work(&mut self, link: Link) -> Result<(), Error> {
        let mut link = link;
        loop {
            self.vitals.nats_is_connected(true);
            self.progress.set_max_payload(link.max_payload());
            let start = Instant::now();
            let (cause, reason) = match self.serve(&link) {
                Ok(()) => return Ok(()),
                Err(Interrupt::End(error)) => return Err(error),
                Err(Interrupt::Reconnect(cause, reason)) => (cause, reason),
                Err(Interrupt::Refused { token, error }) => {
                    self.core.disconnected();
                    let event = self.describe(token);
                    let reason = format!("JetStream refused {event}: {error}");
                    if !self.put_aside(token, &error.to_string()) {
                        return Err(Error::Refused { event, error });
                    }
                    (ReconnectCause::Refused, reason)
                }
            };
            if start.elapsed() >= WORKING {
                // also when there was nothing to publish
                self.outage.worked();
            }
            self.vitals.nats_is_connected(false);
            self.vitals.reconnects(cause);
            self.pulse.nothing_waits();
            self.core.disconnected();
            drop(link);
            match self.reconnect(&reason)? {
                Some(connected) => link = connected,
                None => return Ok(()),
            }
        }
    }

    /// Works with one connection until it fails, or everything is done.
    fn serve(&mut self, link: &Link) -> Result<(), Interrupt> {
        let (idle, never_stops) = (never(), never());
        self.postponed = None;
        loop {
            let now = Instant::now();
            while let Ok(acks) = link.acks().try_recv() {
                self.acked(acks, now)?;
            }
            while let Ok(message) = link.replies().try_recv() {
                self.replied(link.decode(message), now)?;
            }
            let outcome = self.core.tick(now);
            self.trouble(outcome)?;
            self.not_stuck(link)?;
            self.publish(link, now)?;
            self.look(link, now);
            self.tell_late(now);
            let settled = self.is_settled(now);
            if self.drained {
                self.core.rest();
            }
            let confirmable = self.core.confirmable(now);
            self.progress.confirmable(confirmable);
            let marks = || self.core.marks(&self.lineage.source);
            if let Some(write) = self.store.write(marks, confirmable, now, settled) {
                bucket::send(&self.store, link, write);
            }
            self.report.tick(now, &self.core, self.progress);
            self.pulse
                .tell(&self.core, self.progress, self.changes.len());
            self.vitals.publisher.within(LOOP_LIMIT);
            if settled && self.is_kept(now) {
                return Ok(());
            }
            let changes = if !self.drained && self.core.wants_batch() {
                &self.changes
            } else {
                &idle
            };
            let wake = self.wake(now);
            let stop = match self.closing {
                Closing::No | Closing::WhenSettled => self.stop.channel(),
                Closing::By(_) => &never_stops,
            };
            select! {
                recv(link.acks()) -> acks => match acks {
                    Ok(acks) => self.acked(acks, Instant::now())?,
                    Err(_) => return Err(self.lost(link.lost().try_recv().ok())),
                },
                recv(link.replies()) -> message => match message {
                    Ok(message) => self.replied(link.decode(message), Instant::now())?,
                    Err(_) => return Err(self.lost(link.lost().try_recv().ok())),
                },
                recv(link.lost()) -> error => return Err(self.lost(error.ok())),
                recv(changes) -> batch => match batch {
                    Ok(batch) => {
                        self.pulse.arrived(&batch);
                        self.core.offer(Arc::new(batch));
                    }
                    Err(_) => {
                        self.drained = true;
                        self.close(now);
                    }
                },
                recv(stop) -> _ => self.close(now),
                default(wake) => {}
            }
        }
    }

    /// Both connections must live: events may still go out over theirs while nothing comes of a question.
    fn not_stuck(&self, link: &Link) -> Result<(), Interrupt> {
        let limit = self.config.nats.request_timeout;
        if link.is_stuck_for() <= limit {
            return Ok(());
        }
        let reason = format!(
            "the connection for questions to JetStream has been dead for {} s",
            limit.as_secs()
        );
        Err(Interrupt::Reconnect(ReconnectCause::Connection, reason))
    }

    /// The link is over; why, it says before its acks end.
    fn lost(&mut self, error: Option<jetstream::Error>) -> Interrupt {
        let reason = match error {
            Some(error) => bucket::lost(&mut self.store, error).to_string(),
            None => "the connection to NATS ended".to_string(),
        };
        Interrupt::Reconnect(ReconnectCause::Connection, reason)
    }

    /// The end is near: what was read is taken and settled.
    fn close(&mut self, now: Instant) {
        self.closing = match self.config.drain && !self.stop.is_stopping() {
            true => Closing::WhenSettled,
            false => Closing::By(now + SETTLE_LIMIT),
        };
    }

    /// Everything that is to be published is, or has had its time.
    fn is_settled(&self, now: Instant) -> bool {
        match self.closing {
            Closing::No => false,
            Closing::WhenSettled => self.core.is_settled(),
            Closing::By(deadline) => self.drained && self.core.is_settled() || now >= deadline,
        }
    }

    /// The checkpoint holds what was settled, or has had its time.
    fn is_kept(&mut self, now: Instant) -> bool {
        let until = *self.keep_until.get_or_insert(now + KEEP_LIMIT);
        now >= until || self.store.holds(&self.core.marks(&self.lineage.source))
    }

    /// How long nothing needs to be done unless something comes.
    fn wake(&self, now: Instant) -> Duration {
        let mut wake = self.next_look;
        if let Some(deadline) = self.core.deadline() {
            wake = wake.min(deadline);
        }
        if let Closing::By(deadline) = self.closing {
            wake = wake.min(deadline);
        }
        if let Some(until) = self.keep_until {
            wake = wake.min(until);
        }
        let wait = wake.saturating_duration_since(now);
        if self.core.is_holding_back() {
            wait.min(HOLD_BACK_TICK)
        } else {
            wait
        }
    }

    /// Hands the core what JetStream said to publishes.
    fn acked(&mut self, acks: Vec<Ack>, now: Instant) -> Result<(), Interrupt> {
        for Ack { reply, result } in acks {
            match self.core.answer(reply, result, now) {
                Ok(Some(token)) => {
                    self.pulse.acked(token, now);
                    self.outage.worked();
                }
                outcome => self.trouble(outcome.map(|_| ()))?,
            }
        }
        Ok(())
    }

    fn replied(&mut self, reply: Option<Reply>, now: Instant) -> Result<(), Interrupt> {
        let Some(Reply { token, result }) = reply else {
            return Ok(());
        };
        match bucket::answers_to(token) {
            Some(number) => self.written(number, result, now),
            None => self.looked_at(token, result),
        }
    }

    /// The answer to a write of the checkpoint.
    fn written(
        &mut self,
        number: u64,
        answer: Result<Vec<u8>, AckError>,
        now: Instant,
    ) -> Result<(), Interrupt> {
        match bucket::answered(&mut self.store, number, answer) {
            Ok(Some(marks)) => {
                self.core.kept(marks, now);
                Ok(())
            }
            Ok(None) => Ok(()),
            Err(Overtaken) => Err(Interrupt::Reconnect(
                ReconnectCause::Overtaken,
                "the checkpoint of this slot was written meanwhile: by another relay, or by a write of ours that had no answer in time"
                    .to_string(),
            )),
        }
    }

    /// The answer to a [look](Self::look) at a stream.
    fn looked_at(
        &mut self,
        token: u64,
        answer: Result<Vec<u8>, AckError>,
    ) -> Result<(), Interrupt> {
        match answer.map(|body| streams::parse_info(&body)) {
            Ok(Ok(Some(info))) => {
                let last_seq = info.state.last_seq;
                let outcome = self
                    .core
                    .looked_at(token as usize, last_seq, Instant::now());
                self.trouble(outcome)
            }
            _ => Ok(()),
        }
    }

    /// Publishes all that may go now, as one burst.
    ///
    /// An event that cannot be published interrupts once everything before it is answered: the connection
    /// is dropped with what has not left yet, so each attempt would lose the same events again.
    fn publish(&mut self, link: &Link, now: Instant) -> Result<(), Interrupt> {
        if self.postponed.is_none() {
            self.publish_burst(link, now)?;
        }
        match self.postponed.take() {
            Some(interrupt) if self.core.waiting() == 0 => Err(interrupt),
            postponed => {
                self.postponed = postponed;
                Ok(())
            }
        }
    }

    fn publish_burst(&mut self, link: &Link, now: Instant) -> Result<(), Interrupt> {
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
                            "parked an event that cannot be published"
                        );
                    }
                    burst.push(publish);
                }
                Ok(Next::TooLarge {
                    token,
                    size,
                    limit,
                    setting,
                }) => {
                    let cause = format!("{size} bytes are more than the {limit} that NATS accepts");
                    if !self.put_aside(token, &cause) {
                        let event = self.describe(token);
                        self.postponed = Some(Interrupt::End(Error::TooLarge {
                            event,
                            size,
                            limit,
                            setting,
                        }));
                        break Ok(());
                    }
                }
                Ok(Next::Lookup { stream, seq, token }) => {
                    let outcome = self.look_up(link, &stream, seq, token);
                    if outcome.is_err() {
                        break outcome;
                    }
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
    /// the relay is to halt.
    fn put_aside(&mut self, token: u64, cause: &str) -> bool {
        let policy = &self.config.mapping.policy;
        let Some(event) = self.core.event(token) else {
            return false;
        };
        // cut to what is taken already, and still not taken
        let is_cut = event.headers.contains(park::BODY_CUT)
            && event.id.len() + event.headers.len() + event.body.len()
                <= self.core.room(event.subject);
        match (event.fate, policy.on_poison) {
            (Fate::Park, _) if is_cut => false,
            (Fate::Park, _) | (_, OnPoison::Park) => {
                let subject = &policy.park_subject;
                let parked = park::parked(&event, subject, cause, self.core.room(subject));
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

    fn describe(&self, token: u64) -> String {
        let event = self.core.event(token);
        event.map_or_else(
            || "an event".to_string(),
            |event| format!("row {} of {} at {}", event.id, event.table, event.position),
        )
    }

    /// An event was taken for a duplicate although it is not stored: by whom its id was used is told.
    fn look_up(
        &mut self,
        link: &Link,
        stream: &str,
        seq: u64,
        token: u64,
    ) -> Result<(), Interrupt> {
        let timeout = self.config.nats.request_timeout;
        let request = streams::message_request(stream, seq);
        self.pulse.nothing_waits();
        // a write of the checkpoint may wait
        let mut meanwhile = Vec::new();
        let keep = |message| meanwhile.push(message);
        let found = streams::message_among(link, request, timeout, keep)
            .map_err(|error| Interrupt::Reconnect(ReconnectCause::Connection, error.to_string()))?;
        let position = found
            .as_ref()
            .and_then(|message| message.header(OUTBOX_POSITION)?.parse().ok());
        let used = found
            .as_ref()
            .and_then(|message| Some((message.header("Nats-Msg-Id")?, position.as_ref())));
        let before = self.core.tally().dropped + self.core.tally().skipped;
        let outcome = self.core.looked_up(token, used, Instant::now());
        let mut dropped = None;
        self.trouble(outcome.map(|id| dropped = id))?;
        if let Some(id) = dropped {
            let earlier = position
                .map(|position| position.to_string())
                .unwrap_or_default();
            log::warn!(id, stream, seq, earlier; "dropped an event: an earlier one has used its id");
        }
        if self.core.tally().dropped + self.core.tally().skipped > before {
            // the stream answers, and the window moves on
            self.outage.worked();
        }
        for message in meanwhile {
            self.replied(link.decode(message), Instant::now())?;
        }
        Ok(())
    }

    fn tell_late(&mut self, now: Instant) {
        let late = self.core.tally().late;
        if late > self.told_late && self.said.is_new("late", now) {
            log::warn!(
                events = late - self.told_late;
                "published events behind later ones: somebody else's messages in this replicated stream had let those pass"
            );
            self.told_late = late;
        }
    }

    /// Looks at the streams now and then while nothing is being published.
    fn look(&mut self, link: &Link, now: Instant) {
        if now < self.next_look {
            return;
        }
        self.next_look = now + LOOK_INTERVAL;
        for (index, name) in self.core.idle_streams() {
            let (api, body) = streams::info_request(name);
            link.request(index as u64, &api, body);
        }
    }

    fn trouble(&mut self, outcome: Result<(), Trouble>) -> Result<(), Interrupt> {
        Err(match outcome {
            Ok(()) => return Ok(()),
            Err(Trouble::Reconnect(cause)) => {
                let kind = match cause {
                    Cause::Broken(_) => ReconnectCause::OtherAck,
                    Cause::Refused(_) => ReconnectCause::Refused,
                    Cause::AckTimeout => ReconnectCause::AckTimeout,
                    Cause::NoStream(_) => ReconnectCause::NoStream,
                    Cause::EndsEarly(_) => ReconnectCause::EndsEarly,
                };
                Interrupt::Reconnect(kind, cause.to_string())
            }
            Err(Trouble::Refused { token, error }) => Interrupt::Refused { token, error },
            Err(Trouble::Backwards(backwards)) => Interrupt::End(Error::Backwards(backwards)),
            Err(Trouble::Halt(halt)) => Interrupt::End(Error::Halt(halt)),
        })
    }

    /// Connects and reads the streams back until that works. `None`: the session is to end.
    fn reconnect(&mut self, reason: &str) -> Result<Option<Link>, Error> {
        let mut reason = reason.to_string();
        let mut tries = 0;
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
            if matches!(self.closing, Closing::By(_)) {
                // what is not acknowledged comes again; nobody is to wait for a server that is away
                return Ok(None);
            }
            match self.rejoin(tries) {
                Ok(link) => {
                    self.vitals.enter(Phase::Relaying, None);
                    log::info!(server = link.server(); "connected to NATS again");
                    return Ok(Some(link));
                }
                Err(error)
                    if error.verdict() == Verdict::Retry
                        && !matches!(error, Error::Backwards(_) | Error::Overtaken) =>
                {
                    reason = error.to_string();
                }
                Err(error) => return Err(error),
            }
            tries += 1;
        }
    }

    fn rejoin(&mut self, tries: usize) -> Result<Link, Error> {
        let found = rejoin::find(self.config, tries, &mut self.said)?;
        let timeout = self.config.nats.request_timeout;
        let opened = bucket::open(&mut self.store, &found.link, found.replicas(), timeout)?;
        let Opened {
            marks,
            went_back,
            by_another,
        } = opened.unwrap_or_default();
        if went_back {
            self.core.checkpoint_went_back();
        }
        if by_another {
            // a new session finds out who has the slot, and learns what the other has published
            return Err(Error::Overtaken);
        }
        // a relay that has taken over may have come further, and what it wrote must not be taken back
        let reached = marks.reached.and_then(|at| self.lineage.reach(&at));
        self.core.has_reached(reached.unwrap_or_default());
        let (last_known, acked_seq) = (
            |stream: &str| self.core.last_known(stream),
            |stream: &str| self.core.acked_seq(stream),
        );
        let joined = found.join(self.config, self.lineage, last_known, acked_seq)?;
        joined.tell_others(&mut self.said);
        let Joined {
            link,
            routes,
            streams,
        } = joined;
        self.core
            .connected(routes, streams, Instant::now())
            .map_err(Error::from)?;
        let puts_aside = self.config.mapping.policy.on_poison != OnPoison::Stop;
        self.core
            .takes(link.max_payload(), self.source.len(), puts_aside);
        let marks = self.core.marks(&self.lineage.source);
        if let Some(marks) = bucket::begin(&mut self.store, &link, marks, timeout)? {
            self.core.kept(marks, Instant::now());
        }
        if !self.store.is_kept() {
            self.core.has_no_checkpoint(Instant::now());
        }
        Ok(link)
    }
}
