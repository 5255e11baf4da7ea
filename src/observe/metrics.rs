//! The one list of figures, with their names, units and meanings: `/metrics` serves it, and the status page shows it.
//!
//! Names follow [Prometheus' conventions](https://prometheus.io/docs/practices/naming/). How the list becomes text is
//! in `exposition`.

use crate::postgres::Lsn;
use crate::relay::figure::Histogram;
use crate::relay::vitals::Vitals;
use serde_json::{Value, json};

/// What each name begins with.
pub const PREFIX: &str = "jetstream_outbox_";

/// One entry of the list.
pub struct Metric {
    /// Behind [`PREFIX`]. Its end says the unit, and `_total` a counter, as the conventions have it.
    pub name: &'static str,
    /// One line for a person.
    pub help: &'static str,
    /// How it is read.
    pub read: Read,
}

/// How a figure is read.
pub enum Read {
    /// It only grows.
    Counter(fn(&Vitals) -> u64),
    /// Counters, told apart by a label of this name.
    Counters(&'static str, fn(&Vitals) -> Vec<(&'static str, u64)>),
    /// A gauge; `None`: not known.
    Gauge(fn(&Vitals) -> Option<u64>),
    /// A gauge of seconds.
    Seconds(fn(&Vitals) -> f64),
    /// A position in the WAL; a gauge of bytes.
    Lsn(fn(&Vitals) -> u64),
    /// A histogram of seconds.
    Histogram(fn(&Vitals) -> &Histogram),
    /// Always 1; what counts is the label of this name and value.
    Info(&'static str, &'static str),
}

const fn metric(name: &'static str, help: &'static str, read: Read) -> Metric {
    Metric { name, help, read }
}

/// All there are, in the order in which they are shown.
pub const METRICS: &[Metric] = &[
    metric(
        "build_info",
        "The program's version",
        Read::Info("version", env!("CARGO_PKG_VERSION")),
    ),
    metric(
        "ready",
        "1 while both servers are connected and the slot is held",
        Read::Gauge(|v| Some(v.readiness().is_ok().into())),
    ),
    metric(
        "events_published_total",
        "Events stored by this process",
        Read::Counter(|v| v.tally().published),
    ),
    metric(
        "published_bytes_total",
        "Bodies of the published events",
        Read::Counter(|v| v.tally().published_bytes),
    ),
    metric(
        "events_already_stored_total",
        "Events that were found in their stream and not published again",
        Read::Counter(|v| v.tally().already_stored),
    ),
    metric(
        "events_dropped_total",
        "Events dropped because an earlier one had used their id",
        Read::Counter(|v| v.tally().dropped),
    ),
    metric(
        "events_parked_total",
        "Published events that went to the park subject",
        Read::Counter(|v| v.tally().parked),
    ),
    metric(
        "events_given_up_total",
        "Events given up by -on-poison skip",
        Read::Counter(|v| v.tally().given_up),
    ),
    metric(
        "events_late_total",
        "Events published after later ones",
        Read::Counter(|v| v.tally().late),
    ),
    metric(
        "events_in_flight",
        "Publishes without an acknowledgement yet",
        Read::Gauge(|v| Some(v.in_flight.get())),
    ),
    metric(
        "channel_batches",
        "Batches read from Postgres that wait for the publisher, 4 at most",
        Read::Gauge(|v| Some(v.channel_batches.get())),
    ),
    metric(
        "lag_bytes",
        "WAL that is not known to be stored in the streams",
        Read::Gauge(|v| Some(v.lag_bytes())),
    ),
    metric(
        "lag_seconds",
        "Age of the oldest event that has arrived and is not stored",
        Read::Seconds(|v| v.lag().as_secs_f64()),
    ),
    metric(
        "wal_end_bytes",
        "End of the WAL of Postgres",
        Read::Lsn(|v| v.wal_end().0),
    ),
    metric(
        "received_lsn_bytes",
        "Everything up to here has arrived",
        Read::Lsn(|v| v.received_lsn.get()),
    ),
    metric(
        "stored_lsn_bytes",
        "Every event up to here is resolved, most by being stored in a stream",
        Read::Lsn(|v| v.stored_lsn.get()),
    ),
    metric(
        "checkpointed_lsn_bytes",
        "The stored_lsn that the checkpoint holds",
        Read::Lsn(|v| v.checkpointed_lsn.get()),
    ),
    metric(
        "flush_lsn_bytes",
        "What Postgres is told: it may remove WAL up to here",
        Read::Lsn(|v| v.flush_lsn.get()),
    ),
    metric(
        "slot_wal_bytes",
        "WAL that Postgres keeps for the slot, read every 10 seconds",
        Read::Gauge(|v| Some(v.slot_wal.get()?.bytes)),
    ),
    metric(
        "slot_safe_wal_bytes",
        "WAL that can still be written before Postgres may give the slot up; absent without max_slot_wal_keep_size",
        Read::Gauge(|v| v.slot_wal.get()?.safe_bytes),
    ),
    metric(
        "sessions_total",
        "Copy streams from Postgres that were started",
        Read::Counter(|v| v.sessions.get()),
    ),
    metric(
        "reconnects_total",
        "Connections to NATS that were replaced",
        Read::Counters("cause", |v| v.reconnect_counts().collect()),
    ),
    metric(
        "ack_seconds",
        "From a publish to its acknowledgement, a sample",
        Read::Histogram(|v| &v.ack_seconds),
    ),
    metric(
        "commit_to_ack_seconds",
        "From a commit to the acknowledgement of its last event, a sample",
        Read::Histogram(|v| &v.commit_to_ack_seconds),
    ),
];

impl Metric {
    /// For the status page: name, meaning and value, which is text for a position, an object for labels, and missing
    /// where it is not known.
    pub fn to_json(&self, vitals: &Vitals) -> Value {
        let value = match &self.read {
            Read::Counter(read) => json!(read(vitals)),
            Read::Gauge(read) => json!(read(vitals)),
            Read::Seconds(read) => json!(read(vitals)),
            Read::Lsn(read) => json!(Lsn(read(vitals)).to_string()),
            Read::Counters(_, read) => {
                let counts = read(vitals).into_iter();
                counts
                    .map(|(label, count)| (label.to_string(), json!(count)))
                    .collect()
            }
            Read::Histogram(read) => {
                let (count, sum) = read(vitals).totals();
                json!({ "count": count, "sum": sum })
            }
            Read::Info(label, value) => json!({ *label: value }),
        };
        json!({ "name": self.name, "help": self.help, "value": value })
    }
}
