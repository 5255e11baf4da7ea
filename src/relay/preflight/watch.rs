//! Looks at the publication again while a session runs. A thread of its own does, since a server that does not answer may
//! hold it up for as long as a connect takes; it borrows nothing, so that nobody has to wait for its end.

use super::outboxes::{self, Outboxes};
use super::publication_state::PublicationState;
use super::{Facts, Finding, failures_of, publication};
use crate::config::Config;
use crate::outbox::mapping::Mapping;
use crate::postgres::{self, ConnInfo, Connection};
use crate::relay::checkpoint::store::SeenPublication;
use crate::relay::slot_wal::SlotWalSeen;
use crossbeam_channel::{Receiver, Sender, bounded, never};
use std::thread;
use std::time::Duration;

/// How often a running session looks: so much later a change is seen at most, and a look costs Postgres one
/// short session.
pub const WATCH_INTERVAL: Duration = Duration::from_secs(10);

/// The looks of one session.
#[derive(Debug)]
pub struct Watch {
    state: PublicationState,
    seen: SeenPublication,
    asks: Sender<Vec<u32>>,
    looks: Receiver<Outboxes>,
}

impl Watch {
    /// Begins with what the session's own connection, to the server `peer`, has read, and writes to `seen` what changes.
    pub fn new(
        config: &Config,
        peer: &str,
        state: PublicationState,
        seen: SeenPublication,
        slot_wal: SlotWalSeen,
    ) -> Watch {
        let (asks, asked) = bounded::<Vec<u32>>(1);
        let (found, looks) = bounded(1);
        let look = Look {
            db: config.db.without_replication(),
            peer: peer.to_string(),
            publication: config.publication.clone(),
            mapping: config.mapping.clone(),
            slot: config.slot.clone(),
            slot_wal,
        };
        let answer = move || {
            let mut failures = 0;
            for remembered in asked {
                match look.run(&remembered) {
                    Ok(now) => {
                        failures = 0;
                        if now.is_some_and(|now| found.send(now).is_err()) {
                            return;
                        }
                    }
                    Err(error) => {
                        failures += 1;
                        // the first may be an outage, which the session reports itself
                        match failures {
                            2 => {
                                log::warn!(cause:% = error; "cannot look whether the publication is still the same; trying again");
                            }
                            _ => log::debug!(cause:% = error; "cannot look at the publication"),
                        }
                    }
                }
            }
        };
        thread::Builder::new()
            .name("watch".to_string())
            .spawn(answer)
            .expect("the system grants a thread, or the relay cannot work at all");
        Watch {
            state,
            seen,
            asks,
            looks,
        }
    }

    /// Asks for a look; while one is under way it is the one.
    pub fn ask(&self) {
        let _ = self.asks.try_send(self.state.oids());
    }

    /// Looks as they come, for a `select!`; each is for [`Watch::on_look`].
    pub fn looks(&self) -> &Receiver<Outboxes> {
        &self.looks
    }

    /// There are no more looks: the thread has panicked, as the log says.
    pub fn end(&mut self) {
        self.looks = never();
    }

    /// What a look found: something that halts the relay, or perhaps more than before, which counts from now on.
    pub fn on_look(&mut self, now: Outboxes, config: &Config) -> Result<(), Vec<Finding>> {
        let facts = Facts {
            version: now.version,
            outboxes: now,
            ..Facts::default()
        };
        if let Some(lost) = self.state.lost(&facts, config) {
            self.state.loses(&lost);
            self.seen.set(Some(self.state.to_text()));
            return Err(vec![lost]);
        }
        let failures = failures_of(&[&publication::START], &facts, config);
        if !failures.is_empty() {
            return Err(failures);
        }
        if let Some(now) = PublicationState::of(&facts.outboxes, config)
            && now != self.state
        {
            self.seen.set(Some(now.to_text()));
            self.state = now;
        }
        Ok(())
    }

    /// The last that was seen.
    pub fn into_state(self) -> PublicationState {
        self.state
    }
}

/// One look by a connection of its own. It is not kept: Postgres would wait for it in a smart shutdown.
struct Look {
    db: ConnInfo,
    peer: String,
    publication: String,
    mapping: Mapping,
    slot: String,
    slot_wal: SlotWalSeen,
}

impl Look {
    /// `None`: of several hosts another one has answered, which may be behind and proves nothing.
    fn run(&self, remembered: &[u32]) -> Result<Option<Outboxes>, postgres::Error> {
        let mut connection = Connection::connect(&self.db)?;
        if connection.peer() != self.peer {
            return Ok(None);
        }
        connection.use_database_encoding()?;
        self.slot_wal.look(&mut connection, &self.slot);
        outboxes::read(
            &mut connection,
            &self.publication,
            &self.mapping,
            remembered,
        )
        .map(Some)
    }
}
