//! How large a message may be, by the server and by the stream that its subject leads to.

use crate::jetstream::streams::Routes;
use crate::jetstream::wire;
use crate::outbox::batch::EventSpans;

/// See the module.
#[derive(Clone, Debug)]
pub struct Capacity {
    /// Which subject goes to which stream, and the limits of these.
    pub routes: Routes,
    /// The largest message that the server takes, in bytes with its headers.
    pub max_payload: usize,
    /// The length of `<slot> <system id> <timeline>`, which begins the position header.
    pub position_source_len: usize,
    /// What is too large is parked or given up, and does not halt the relay.
    pub puts_aside: bool,
    /// The last event of a transaction in each stream says so.
    pub marks_ends: bool,
}

/// An event is larger than may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLarge {
    /// Its size as the server counts it.
    pub size: usize,
    /// What may go.
    pub limit: usize,
    /// The setting that says so.
    pub setting: &'static str,
}

impl Capacity {
    /// How many bytes of id, headers and body may go to `subject`.
    pub fn room(&self, subject: &str) -> usize {
        wire::room(self.limit(subject).0, self.position_source_len)
    }

    /// How many bytes more an event for `subject` may have that is published with this fence; an error says that it is too
    /// large.
    pub fn spare(
        &self,
        subject: &str,
        spans: &EventSpans,
        expected_last_sequence: Option<u64>,
        last_id_len: Option<usize>,
    ) -> Result<usize, TooLarge> {
        let (limit, setting) = self.limit(subject);
        let of_source = self.position_source_len;
        let size = wire::size(spans, expected_last_sequence, last_id_len, of_source);
        limit.checked_sub(size).ok_or(TooLarge {
            size,
            limit,
            setting,
        })
    }

    fn limit(&self, subject: &str) -> (usize, &'static str) {
        match self.routes.max_msg_size(subject) {
            Some(of_stream) if of_stream <= self.max_payload => {
                (of_stream, "max_msg_size of the stream")
            }
            _ => (self.max_payload, "max_payload of the server"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jetstream::streams::parse_info;
    use serde_json::json;

    fn capacity(max_msg_size: i64) -> Capacity {
        let config = json!({ "subjects": ["a.>"], "max_msg_size": max_msg_size });
        let info = json!({ "config": config, "state": {} }).to_string();
        let info = parse_info(info.as_bytes()).unwrap().unwrap();
        Capacity {
            routes: Routes::new(&[info]),
            max_payload: 1000,
            position_source_len: 10,
            puts_aside: false,
            marks_ends: false,
        }
    }

    #[test]
    fn the_smaller_limit_counts_and_is_named() {
        for (max_msg_size, limit, named) in [
            (-1, 1000, "max_payload of the server"),
            (999, 999, "max_msg_size of the stream"),
            (1000, 1000, "max_msg_size of the stream"),
            (1001, 1000, "max_payload of the server"),
        ] {
            let capacity = capacity(max_msg_size);
            assert_eq!(capacity.limit("a.b"), (limit, named), "{max_msg_size}");
            assert_eq!(capacity.limit("b"), (1000, "max_payload of the server"));
            assert_eq!(capacity.room("a.b"), wire::room(limit, 10));
        }
    }
}
