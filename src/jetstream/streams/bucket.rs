//! The stream behind a key-value bucket (ADR-8).

use super::{Request, set};
use serde_json::json;

/// nats-server's code for a stream without `max_bytes` in an account that asks for it (`max_bytes_required`).
pub const MAX_BYTES_REQUIRED: u32 = 10113;
/// What a bucket gets there: room for a thousand slots.
pub const BUCKET_BYTES: u64 = 16 << 20;

/// Where a write of a bucket's key goes: into another domain, or through an import, by way of the API's prefix (ADR-8's
/// clients do the same).
pub fn key_write_subject(api_prefix: &str, key: &str) -> String {
    match api_prefix {
        "$JS.API" => key.to_string(),
        prefix => format!("{prefix}.{key}"),
    }
}

/// The error code of a stream whose subjects another one captures.
pub const SUBJECTS_OVERLAP: u32 = 10065;

/// The subjects of all keys of a bucket (ADR-8).
pub fn bucket_subjects(bucket: &str) -> String {
    format!("$KV.{bucket}.>")
}

/// Asks for a new key-value bucket with one value a key (ADR-8); [`parse_info`](super::parse_info) reads the answer. The server sets the window of
/// duplicates, for which it may have a limit.
pub fn create_bucket_request(bucket: &str, replicas: u32, max_bytes: Option<u64>) -> Request {
    let name = format!("KV_{bucket}");
    let mut body = json!({
        "name": name, "subjects": [bucket_subjects(bucket)], "storage": "file", "retention": "limits",
        "max_msgs_per_subject": 1, "max_consumers": -1, "max_msgs": -1, "max_bytes": -1, "max_msg_size": -1,
        "discard": "new", "num_replicas": replicas.max(1), "deny_delete": true, "allow_rollup_hdrs": true, "allow_direct": true,
    });
    if let Some(max_bytes) = max_bytes {
        set(&mut body, "max_bytes", max_bytes.into());
    }
    (format!("STREAM.CREATE.{name}"), body.to_string().into())
}
