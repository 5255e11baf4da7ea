//! Whether an answer from another stream is a subject that was moved, or lasts. Pure.
//!
//! A moved subject, or a stream that was created again, is seen when the streams are read again. What comes from elsewhere again
//! and again while the same streams capture the same subjects halts: a leaf node, an import or a mapping leads the subject away, at times or always. What
//! is stored in between takes nothing back, as a mapping may lead away every tenth publish only.

use super::trouble::{Cause, Halt, Trouble};
use crate::jetstream::streams::Routes;
use std::time::{Duration, Instant};

/// So many answers are no moved subject.
const MOST: u32 = 5;
/// So long after one the next is counted with it.
const COUNTED_FOR: Duration = Duration::from_secs(60);

/// See the module.
#[derive(Debug, Default)]
pub struct Elsewhere(Option<Counted>);

#[derive(Debug)]
struct Counted {
    times: u32,
    /// When the last of them came.
    at: Instant,
    /// Where the subjects led then.
    routes: Routes,
}

impl Elsewhere {
    /// The streams were read again, over another connection.
    pub fn on_connect(&mut self, routes: &Routes) {
        self.0.take_if(|it| it.routes != *routes);
    }

    /// For an event of `stream`, by the routes, another one has answered.
    pub fn on_answer(
        &mut self,
        stream: String,
        answered: String,
        routes: &Routes,
        now: Instant,
    ) -> Trouble {
        let before = self.0.take_if(|it| now < it.at + COUNTED_FOR);
        let times = before.map_or(0, |it| it.times) + 1;
        if times >= MOST {
            return Trouble::Halt(Halt::Elsewhere { stream, answered });
        }
        self.0 = Some(Counted {
            times,
            at: now,
            routes: routes.clone(),
        });
        Trouble::Reconnect(Cause::Elsewhere { stream, answered })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jetstream::streams::StreamInfo;

    fn routes(stream: &str, created: &str) -> Routes {
        let info = format!(
            r#"{{"config":{{"name":"{stream}","subjects":["a.>"]}},"created":"{created}","state":{{}}}}"#
        );
        Routes::new(&[serde_json::from_str::<StreamInfo>(&info).unwrap()])
    }

    fn halts(elsewhere: &mut Elsewhere, routes: &Routes, now: Instant) -> bool {
        elsewhere.on_connect(routes);
        let trouble = elsewhere.on_answer("A".into(), "B".into(), routes, now);
        matches!(trouble, Trouble::Halt(Halt::Elsewhere { .. }))
    }

    #[test]
    fn what_comes_from_elsewhere_again_and_again_halts() {
        let (mut elsewhere, now) = (Elsewhere::default(), Instant::now());
        let halts = |nth: u32| {
            let now = now + nth * Duration::from_secs(59);
            halts(&mut elsewhere, &routes("A", "1"), now)
        };
        assert_eq!((1..=MOST).map(halts).position(|it| it), Some(4));
    }

    #[test]
    fn a_subject_that_is_moved_or_a_stream_created_again_halts_nothing_however_often() {
        for (stream, created) in [("B", "1"), ("A", "2")] {
            let (mut elsewhere, now) = (Elsewhere::default(), Instant::now());
            for _ in 0..20 {
                for routes in [routes("A", "1"), routes(stream, created)] {
                    assert!(!halts(&mut elsewhere, &routes, now));
                    assert!(!halts(&mut elsewhere, &routes, now));
                }
            }
        }
    }

    #[test]
    fn what_comes_seldom_halts_nothing() {
        let (mut elsewhere, now) = (Elsewhere::default(), Instant::now());
        for nth in 0..20 {
            assert!(!halts(
                &mut elsewhere,
                &routes("A", "1"),
                now + nth * COUNTED_FOR
            ));
        }
    }
}
