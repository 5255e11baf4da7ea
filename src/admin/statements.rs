//! The statements and requests that create what the relay needs. `setup` runs them, `-print-sql` and `-print-nats` print
//! them, `check` recommends them: they are the same text.

use crate::config::Config;
use crate::config::operation::Setup;
use crate::jetstream::bucket::create_bucket_request;
use crate::jetstream::sources;
use crate::jetstream::streams::{Request, matches, set};
pub use crate::relay::preflight::outbox_sql::{
    create_publication, create_table, mapping_of, tables,
};
pub use crate::relay::preflight::slot::create_slot;
use serde_json::{Value, json};
use std::time::Duration;

fn nanos(span: Duration) -> i64 {
    i64::try_from(span.as_nanos()).unwrap_or(i64::MAX)
}

/// Asks for the stream of the prefix.
pub fn create_stream(config: &Config, how: &Setup) -> Request {
    let mut body = json!({
        "name": how.stream, "subjects": [format!("{}.>", config.prefix)], "retention": "limits", "storage": "file",
        "discard": "old", "num_replicas": how.replicas.unwrap_or(1), "max_age": how.max_age.map_or(0, nanos),
        "max_bytes": how.max_bytes, "allow_direct": true,
    });
    // otherwise the server's default, for which it may have a limit
    if let Some(window) = how.duplicate_window {
        set(&mut body, "duplicate_window", nanos(window).into());
    }
    (
        format!("STREAM.CREATE.{}", how.stream),
        body.to_string().into(),
    )
}

/// Asks for the stream that copies from those of the relays. It has the same age and copies; it remembers no ids, as those of
/// other relays may be the same.
pub fn create_aggregate(
    how: &Setup,
    name: &str,
    sources: &[Value],
    server_version: &str,
) -> Request {
    let limits = json!({
        "num_replicas": how.replicas.unwrap_or(1), "max_age": how.max_age.map_or(0, nanos), "max_bytes": how.max_bytes,
    });
    sources::create_request(name, sources, limits, server_version)
}

/// Asks for the stream of the events that are parked; `None` if none are, or the stream of the prefix takes them.
///
/// One of its own, so that its age and limits can differ, and nobody who reads events meets what was parked.
pub fn create_park_stream(config: &Config, how: &Setup) -> Option<Request> {
    let subject = &config.mapping.policy.park_subject;
    if !config.mapping.policy.parks() || matches(&format!("{}.>", config.prefix), subject) {
        return None;
    }
    let name = park_stream(how);
    let body = json!({
        "name": name, "subjects": [subject], "retention": "limits", "storage": "file", "discard": "old",
        "num_replicas": how.replicas.unwrap_or(1), "max_bytes": how.max_bytes, "allow_direct": true,
    });
    Some((format!("STREAM.CREATE.{name}"), body.to_string().into()))
}

/// The stream of the events that are parked, if it has to be created.
pub fn park_stream(how: &Setup) -> String {
    format!("{}_parked", how.stream)
}

/// Asks for the bucket of the checkpoint.
pub fn create_bucket(config: &Config, replicas: u32, max_bytes: Option<u64>) -> Request {
    create_bucket_request(&config.checkpoint, replicas, max_bytes)
}
