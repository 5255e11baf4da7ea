//! What comes over the link: acks, answers to the checkpoint and to looks.

use super::{Interrupt, Publisher};
use crate::jetstream::ack::{AckError, AckErrorKind, parse_ack};
use crate::jetstream::client::{Ack, Answer, Reply};
use crate::jetstream::streams;
use crate::postgres::Lsn;
use crate::relay::checkpoint::kv;
use crate::relay::checkpoint::store::Overtaken;
use crate::relay::connect;
use crate::relay::core::Core;
use crate::relay::core::agreement::is_of_message;
use crate::relay::vitals::ReconnectCause;
use std::time::Instant;

impl Publisher<'_> {
    /// Takes what has come over the link.
    pub(super) fn answered(&mut self, answers: Vec<Answer>, now: Instant) -> Result<(), Interrupt> {
        for answer in answers {
            match answer {
                Answer::Ack(ack) => self.acked(ack, now)?,
                Answer::Reply(reply) => self.replied(reply, now)?,
                // the core looks at its limits before each event
                Answer::Info => {}
                Answer::Pong(number) if number >= self.pinged => self.core.on_pong(),
                Answer::Pong(_) => {}
            }
        }
        Ok(())
    }

    /// Hands the core what JetStream said to a publish.
    fn acked(&mut self, Ack { reply, result }: Ack, now: Instant) -> Result<(), Interrupt> {
        match self.core.answer(reply, result, now) {
            Ok(Some(token)) => {
                self.pulse.acked(token, now);
                self.outage.worked();
                Ok(())
            }
            outcome => self.trouble(outcome.map(|_| ())),
        }
    }

    fn replied(&mut self, Reply { token, result }: Reply, now: Instant) -> Result<(), Interrupt> {
        let result = match result.map_err(AckError::from) {
            // the checkpoint keeps its own time, and a stream is looked at again
            Err(AckError::NoAnswer) => return Ok(()),
            result => result,
        };
        match kv::answers_to(token) {
            Some(number) => self.written(number, result, now),
            None => self.looked_at(token, result),
        }
    }

    /// The answer to a write of the record.
    fn written(
        &mut self,
        number: u64,
        answer: Result<Vec<u8>, AckError>,
        now: Instant,
    ) -> Result<(), Interrupt> {
        let Some(store) = &mut self.store else {
            return Ok(());
        };
        let answer = answer.and_then(|body| parse_ack(&body, None));
        // a new connection creates the bucket again, or finds out what is wrong with it
        let reason = match &answer {
            Err(AckError::NoResponders) => {
                Some("the checkpoint's bucket is gone, or has no leader".to_string())
            }
            Err(error) if error.kind() == AckErrorKind::Closed => {
                Some(format!("the checkpoint's bucket takes no record: {error}"))
            }
            _ => None,
        };
        if let Some(reason) = reason {
            return Err(Interrupt::Reconnect(ReconnectCause::NoStream, reason));
        }
        match store.on_written(number, answer, now) {
            Ok(true) => {
                let held = store.held().map_or(Lsn::INVALID, |it| it.young.stored_lsn);
                self.vitals.checkpointed_lsn.raise(held.0);
                if let Core::ExactlyOnce(core) = &mut self.core {
                    core.on_recorded(now);
                }
                Ok(())
            }
            Ok(false) => Ok(()),
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
        let Core::ExactlyOnce(core) = &mut self.core else {
            return Ok(());
        };
        let Ok(body) = answer else {
            return Ok(());
        };
        let outcome = if is_of_message(token) {
            let Ok(found) = connect::message(&body) else {
                return Ok(());
            };
            core.on_witness(token, found.as_ref())
        } else {
            let Ok(info) = streams::parse_info(&body) else {
                return Ok(());
            };
            let (created, last_seq) =
                info.map_or_else(Default::default, |info| (info.created, info.state.last_seq));
            core.on_look(token, &created, last_seq)
        };
        self.trouble(outcome)
    }
}
