//! What the status page shows, as JSON: `/status`. For people: its form may change with any version; programs read
//! `/metrics`. It holds no secret, and no payload.

use super::history::{History, unix_ms};
use super::metrics::METRICS;
use crate::config::Config;
use crate::logging::recent::recent;
use crate::relay::vitals::{Peer, Vitals};
use serde_json::{Value, json};
use std::time::{Instant, SystemTime};

/// Streams that are listed; there may be a stream for each of a thousand subjects.
const MAX_STREAMS: usize = 100;

/// What of the settings is shown.
pub struct Settings(Value);

impl Settings {
    /// Secrets are left out: servers are named without who signs in.
    pub fn new(config: &Config) -> Settings {
        let nats = config.nats.servers.iter().map(ToString::to_string);
        Settings(json!({
            "slot": config.slot,
            "publication": config.publication,
            "database": config.db.dbname(),
            "postgres": config.db.servers(),
            "nats": nats.collect::<Vec<_>>().join(","),
            "prefix": config.prefix,
            "delivery": config.delivery.to_string(),
            "hold_back_seconds": config.hold_back.as_secs_f64(),
            "checkpoint": config.checkpoint,
        }))
    }

    /// Everything, as it is now.
    pub fn status(&self, vitals: &Vitals, history: &History) -> String {
        let (is_ready, doing) = match vitals.readiness() {
            Ok(doing) => (true, doing),
            Err(doing) => (false, doing),
        };
        let streams = vitals.streams();
        let shown = streams.iter().take(MAX_STREAMS);
        let recent = recent();
        let metrics = METRICS.iter().map(|metric| metric.to_json(vitals));
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "now": unix_ms(SystemTime::now()),
            "started": unix_ms(vitals.started),
            "state": {
                "ready": is_ready,
                "doing": doing,
                "since": unix_ms(vitals.state_since()),
                "stuck": vitals.liveness(Instant::now()).err(),
            },
            "settings": self.0,
            "connected": {
                "postgres": peer(vitals.postgres()),
                "nats": peer(vitals.nats()),
            },
            "streams": shown.map(|stream| json!({ "name": stream.name, "last_seq": stream.last_seq })).collect::<Vec<_>>(),
            "more_streams": streams.len().saturating_sub(MAX_STREAMS),
            "slot_wal": vitals.slot_wal.get().map(|wal| json!({
                "bytes": wal.bytes,
                "limit_bytes": wal.limit_bytes,
                "safe_bytes": wal.safe_bytes,
                "status": wal.status,
                "at": unix_ms(wal.at),
            })),
            "warnings": {
                "total": recent.total,
                // the newest first
                "lines": recent.lines.iter().rev().map(|line| json!({
                    "first": unix_ms(line.first),
                    "at": unix_ms(line.at),
                    "times": line.times,
                    "level": line.level.as_str().to_ascii_lowercase(),
                    "message": line.message,
                    "values": line.values,
                })).collect::<Vec<_>>(),
            },
            "metrics": metrics.collect::<Vec<_>>(),
            "history": history.to_json(),
        })
        .to_string()
    }
}

fn peer(peer: Peer) -> Value {
    match peer.address.is_empty() {
        true => Value::Null,
        false => json!({ "address": peer.address, "version": peer.version }),
    }
}
