//! The checkpoint's bucket: the requests that make it and write to it, and whether it can hold the record, by its stream's
//! configuration and what is in it. Pure.
//!
//! A bucket is a stream `KV_<bucket>` of `$KV.<bucket>.>` (ADR-8). Those that `setup` and the relay create have no fault; these are
//! of buckets that somebody has made or edited.

use super::sources::overlap;
use super::streams::{Request, StreamInfo, set};
use crate::nats::options::OWN_API;
use serde_json::json;

/// nats-server's code for a stream without `max_bytes` in an account that asks for it (`max_bytes_required`).
pub const MAX_BYTES_REQUIRED: u32 = 10113;
/// nats-server's code for a stream whose subjects another one captures.
pub const SUBJECTS_OVERLAP: u32 = 10065;
/// What a bucket gets where `max_bytes` is asked for: room for a thousand slots.
pub const BUCKET_BYTES: u64 = 16 << 20;

/// Where a write of a bucket's key goes: into another domain, or through an import, by way of the API's prefix (ADR-8's
/// clients do the same).
pub fn key_write_subject(api_prefix: &str, key: &str) -> String {
    match api_prefix {
        OWN_API => key.to_string(),
        prefix => format!("{prefix}.{key}"),
    }
}

/// The subjects of all keys of a bucket (ADR-8).
pub fn bucket_subjects(bucket: &str) -> String {
    format!("$KV.{bucket}.>")
}

/// Asks for a new key-value bucket with one value a key (ADR-8); [`parse_info`](super::streams::parse_info) reads the answer. The
/// server sets the window of duplicates, for which it may have a limit.
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

/// What keeps a bucket from holding the record for as long as it is needed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Completes a sentence that begins with the bucket.
    pub what: String,
    /// Why it matters.
    pub why: &'static str,
    /// How `nats stream edit` changes it; `None`: by another bucket.
    pub edit: Option<String>,
    /// No record can be written, or none read back.
    pub is_fatal: bool,
}

/// The record of a relay with a hundred streams.
const LARGE_RECORD: i64 = 64 << 10;
/// The record of a relay with a few.
const RECORD: u64 = 4 << 10;

/// What comes of a record that is gone.
const FORGOTTEN: &str =
    "without a record nobody knows whether the slot was moved or the publication changed";

/// What is wrong with a bucket beside streams of so many replicas.
pub fn faults(bucket: &str, info: &StreamInfo, replicas: u32) -> Vec<Fault> {
    let mut faults = fatal(bucket, info);
    faults.extend(passing(info, replicas));
    faults
}

fn fatal(bucket: &str, info: &StreamInfo) -> Vec<Fault> {
    let config = &info.config;
    let subjects = bucket_subjects(bucket);
    let mut faults = Vec::new();
    let mut fault = |what: String, why, edit: Option<String>| {
        faults.push(Fault {
            what,
            why,
            edit,
            is_fatal: true,
        });
    };
    if let Some(mirror) = &config.mirror {
        let what = format!("is a mirror of {}", mirror.name);
        fault(what, "nothing can be written to it", None);
    } else if !config.subjects.iter().any(|it| overlap(it, &subjects)) {
        let captured = match &config.subjects[..] {
            [] => "nothing".to_string(),
            some => format!("{}, not {subjects}", some.join(", ")),
        };
        let what = format!("captures {captured}");
        let edit = format!("--subjects='{subjects}'");
        fault(what, "nothing can be written to it", Some(edit));
    }
    if config.sealed {
        fault("is sealed".into(), "nothing can be written to it", None);
    }
    if config.no_ack {
        let what = "acknowledges nothing (no_ack)".into();
        let why = "no write of the record is acknowledged";
        fault(what, why, Some("--ack".into()));
    }
    if config.allow_msg_counter {
        let what = "counts (allow_msg_counter)".into();
        fault(what, "it takes numbers and no records", None);
    }
    if config.discard_new_per_subject {
        let what = "refuses another value of a key that has one (discard new per subject)".into();
        let edit = Some("--no-discard-per-subject".into());
        fault(what, "no record can be written once there is one", edit);
    }
    if config.retention == "interest" {
        let what = "has interest retention".into();
        let why = "a record is gone once no consumer waits for it, or each has taken it";
        fault(what, why, None);
    }
    if config.subject_transform.is_some() {
        let what = "stores the record under another subject (subject_transform)".into();
        fault(what, "it is not found when it is looked for", None);
    }
    faults
}

fn passing(info: &StreamInfo, replicas: u32) -> Vec<Fault> {
    let config = &info.config;
    let mut faults = Vec::new();
    let mut fault = |what: String, why, edit: Option<&str>| {
        faults.push(Fault {
            what,
            why,
            edit: edit.map(str::to_string),
            is_fatal: false,
        });
    };
    if config.persist_mode == "async" {
        let what = "acknowledges before it has written (persist_mode async)".into();
        fault(what, "a record that was acknowledged can be lost", None);
    }
    if config.storage == "memory" {
        let why = "a restart of nats-server loses it";
        fault("is kept in memory".into(), why, None);
    }
    if config.retention == "workqueue" {
        let what = "is a work queue".into();
        fault(what, "a consumer takes the record out of it", None);
    }
    if !config.sources.is_empty() {
        let what = "copies from other streams (sources)".into();
        let why = "the record of a relay with the same slot in a clone of the database takes the place of this one's";
        fault(what, why, None);
    }
    if config.max_age > 0 {
        let what = format!(
            "drops what is in it after {} s (max_age)",
            config.max_age as f64 / 1e9
        );
        fault(what, FORGOTTEN, Some("--max-age=0"));
    }
    if config.discard == "old" && (config.max_msgs > 0 || config.max_bytes > 0) {
        let what =
            "drops the oldest value of any key at its limit (max_msgs or max_bytes, discard old)";
        fault(what.into(), FORGOTTEN, Some("--discard=new"));
    }
    if config.max_msgs_per_subject <= 0 {
        let what = "keeps each value that a key ever had (max_msgs_per_subject)".into();
        let why = "it grows with each record, one a second, until there is no room";
        fault(what, why, Some("--max-msgs-per-subject=1"));
    }
    if (1..LARGE_RECORD).contains(&config.max_msg_size) {
        let what = format!(
            "takes values of up to {} bytes (max_msg_size)",
            config.max_msg_size
        );
        let why = "a record that has grown over it cannot be written, and the relay waits";
        fault(what, why, Some("--max-msg-size=-1"));
    }
    if config.num_replicas < replicas {
        let what = format!(
            "has {} of the {replicas} replicas that the streams of the events have",
            config.num_replicas
        );
        let why =
            "while its servers are away the relay waits, and with their disks the record is lost";
        faults.push(Fault {
            what,
            why,
            edit: Some(format!("--replicas={replicas}")),
            is_fatal: false,
        });
    }
    faults
}

/// Why a bucket that refuses what is over its limits takes no record, or soon may take none. `has_key`: it holds an earlier one of
/// the same key, whose place the next one takes.
pub fn lacks_room(info: &StreamInfo, has_key: bool) -> Option<Fault> {
    let (config, state) = (&info.config, &info.state);
    if config.discard != "new" {
        return None;
    }
    let over = |limit: i64, needs: u64| u64::try_from(limit).is_ok_and(|it| it > 0 && needs > it);
    let one_more = u64::from(!has_key);
    let (limit, value, more) = if over(config.max_bytes, state.bytes.saturating_add(one_more)) {
        ("max_bytes", config.max_bytes, more_bytes(config.max_bytes))
    } else if over(config.max_msgs, state.messages.saturating_add(one_more)) {
        ("max_msgs", config.max_msgs, "--max-msgs=-1".into())
    } else {
        let left = u64::try_from(config.max_bytes)
            .ok()?
            .saturating_sub(state.bytes);
        return (config.max_bytes > 0 && left < RECORD).then(|| Fault {
            what: format!("has {left} bytes left (max_bytes {})", config.max_bytes),
            why: "a record that grows over it cannot be written, and the relay waits",
            edit: Some(more_bytes(config.max_bytes)),
            is_fatal: false,
        });
    };
    Some(Fault {
        what: format!("is full ({limit} {value}, discard new)"),
        why: "there is no room for the record",
        edit: Some(more),
        is_fatal: true,
    })
}

fn more_bytes(now: i64) -> String {
    let more = u64::try_from(now).unwrap_or_default().saturating_mul(2);
    format!("--max-bytes={}", more.max(BUCKET_BYTES))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jetstream::streams::parse_info;
    use serde_json::{Value, json};

    /// As `setup` makes it, with these settings.
    fn bucket(settings: &Value, messages: u64, bytes: u64) -> StreamInfo {
        let (_, body) = create_bucket_request("b", 1, None);
        let mut config: Value = serde_json::from_slice(&body).unwrap();
        let fields = config.as_object_mut().unwrap();
        fields.extend(settings.as_object().unwrap().clone());
        let info = json!({ "config": config, "state": { "messages": messages, "bytes": bytes } });
        parse_info(&serde_json::to_vec(&info).unwrap())
            .unwrap()
            .unwrap()
    }

    #[test]
    fn faults_are_told_apart_from_what_does_no_harm() {
        for (settings, replicas, found) in [
            (json!({}), 1, &[][..]),
            (json!({ "max_bytes": 16 << 20, "max_msgs": 100 }), 1, &[]),
            (
                json!({ "compression": "s2", "deny_purge": true, "republish": { "dest": "x.>" } }),
                1,
                &[],
            ),
            (json!({ "max_msgs_per_subject": 64 }), 1, &[]),
            (json!({ "subjects": ["$KV.*.>"] }), 1, &[]),
            (
                json!({ "mirror": { "name": "M" }, "subjects": null }),
                1,
                &["is a mirror of M"],
            ),
            (
                json!({ "subjects": ["b.>", "c"] }),
                1,
                &["captures b.>, c, not $KV.b.>"],
            ),
            (json!({ "sealed": true }), 1, &["is sealed"]),
            (json!({ "no_ack": true }), 1, &["(no_ack)"]),
            (
                json!({ "allow_msg_counter": true }),
                1,
                &["(allow_msg_counter)"],
            ),
            (
                json!({ "discard_new_per_subject": true }),
                1,
                &["discard new per subject"],
            ),
            (json!({ "retention": "interest" }), 1, &["interest"]),
            (json!({ "retention": "workqueue" }), 1, &["work queue"]),
            (
                json!({ "subject_transform": { "dest": "x.>" } }),
                1,
                &["(subject_transform)"],
            ),
            (
                json!({ "persist_mode": "async", "storage": "memory" }),
                1,
                &["async", "memory"],
            ),
            (json!({ "sources": [{ "name": "M" }] }), 1, &["(sources)"]),
            (json!({ "max_age": 1 }), 1, &["(max_age)"]),
            (
                json!({ "max_msgs": 1, "discard": "old" }),
                1,
                &["discard old"],
            ),
            (
                json!({ "max_msgs_per_subject": -1 }),
                1,
                &["(max_msgs_per_subject)"],
            ),
            (json!({ "max_msg_size": 1000 }), 1, &["up to 1000 bytes"]),
            (json!({}), 3, &["has 1 of the 3 replicas"]),
        ] {
            let faults = faults("b", &bucket(&settings, 0, 0), replicas);
            assert_eq!(faults.len(), found.len(), "{settings}: {faults:?}");
            for (fault, found) in faults.iter().zip(found) {
                assert!(fault.what.contains(found), "{settings}: {fault:?}");
            }
        }
    }

    #[test]
    fn a_bucket_is_full_when_the_next_record_has_no_room() {
        for (settings, messages, bytes, has_key, full) in [
            (json!({}), 1000, 1 << 40, false, None),
            (json!({ "max_msgs": 2 }), 1, 0, false, None),
            (
                json!({ "max_msgs": 2 }),
                2,
                0,
                false,
                Some("is full (max_msgs 2, discard new)"),
            ),
            (
                json!({ "max_msgs": 2 }),
                u64::MAX,
                0,
                false,
                Some("is full (max_msgs 2, discard new)"),
            ),
            (json!({ "max_msgs": 2 }), 2, 0, true, None),
            (
                json!({ "max_msgs": 2, "discard": "old" }),
                2,
                0,
                false,
                None,
            ),
            (json!({ "max_bytes": 8192 }), 1, 4096, false, None),
            (
                json!({ "max_bytes": 8192 }),
                1,
                4097,
                false,
                Some("has 4095 bytes left (max_bytes 8192)"),
            ),
            (
                json!({ "max_bytes": 8192 }),
                1,
                8192,
                true,
                Some("has 0 bytes left (max_bytes 8192)"),
            ),
            (
                json!({ "max_bytes": 8192 }),
                1,
                8192,
                false,
                Some("is full (max_bytes 8192, discard new)"),
            ),
            (
                json!({ "max_bytes": 8192 }),
                1,
                8193,
                true,
                Some("is full (max_bytes 8192, discard new)"),
            ),
        ] {
            let found = lacks_room(&bucket(&settings, messages, bytes), has_key);
            let found = found.map(|fault| fault.what);
            assert_eq!(found, full.map(str::to_string), "{settings}");
        }
    }
}
