//! The names, units and meanings of the metrics, and their text.
//!
//! Names follow [Prometheus' conventions](https://prometheus.io/docs/practices/naming/); the text is
//! [OpenMetrics](https://prometheus.io/docs/specs/om/open_metrics_spec/), which Prometheus reads.

use crate::relay::vitals::{Bytes, Vitals};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// What [`Metrics::text`] is.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The metrics of a relay.
pub struct Metrics {
    vitals: Arc<Vitals>,
    registry: Registry,
    /// What is found out when it is asked for.
    lag_bytes: Bytes,
    lag_seconds: Gauge<f64, AtomicU64>,
    ready: Gauge,
}

impl Metrics {
    /// Names what is in `vitals`.
    pub fn new(vitals: Arc<Vitals>) -> Metrics {
        let mut registry = Registry::with_prefix("jetstream_outbox");
        let v = &vitals;
        registry.register(
            "build",
            "The program's version",
            Info::new([("version", env!("CARGO_PKG_VERSION"))]),
        );
        for (name, help, counter) in [
            (
                "events_published",
                "Events stored by this process",
                &v.published,
            ),
            (
                "events_skipped",
                "Events found in the stream already",
                &v.skipped,
            ),
            (
                "events_dropped",
                "Events whose id an earlier one had used",
                &v.dropped,
            ),
            (
                "events_parked",
                "Published events that were parked",
                &v.parked,
            ),
            ("events_lost", "Events given up by -on-poison skip", &v.lost),
            ("events_late", "Events published behind later ones", &v.late),
            ("sessions", "Copy streams that were started", &v.sessions),
        ] {
            registry.register(name, help, counter.clone());
        }
        registry.register_with_unit(
            "published",
            "Bodies of the published events",
            Unit::Bytes,
            v.published_bytes.clone(),
        );
        registry.register(
            "reconnects",
            "Connections to NATS that were replaced, by cause",
            v.reconnects.clone(),
        );
        registry.register(
            "events_in_flight",
            "Publishes that wait for their acknowledgement",
            v.in_flight.clone(),
        );
        registry.register(
            "channel_batches",
            "Batches read from Postgres that wait for the publisher, 4 at most",
            v.channel_batches.clone(),
        );
        let (lag_bytes, lag_seconds, ready) = Default::default();
        for (name, help, gauge) in [
            ("server_lsn", "The end of Postgres' log", &v.wal_end),
            (
                "received_lsn",
                "Up to here the log has arrived",
                &v.received,
            ),
            (
                "acked_lsn",
                "Up to here everything is stored in the streams",
                &v.settled,
            ),
            (
                "confirmed_lsn",
                "Up to here Postgres may let go of its log",
                &v.confirmed,
            ),
            (
                "lag",
                "Log that is not known to be stored in the streams",
                &lag_bytes,
            ),
        ] {
            registry.register_with_unit(name, help, Unit::Bytes, gauge.clone());
        }
        registry.register_with_unit(
            "lag",
            "Age of the oldest event that has arrived and is not stored",
            Unit::Seconds,
            Gauge::<f64, AtomicU64>::clone(&lag_seconds),
        );
        registry.register(
            "ready",
            "1 while both servers are connected and the slot is held",
            Gauge::clone(&ready),
        );
        registry.register_with_unit(
            "ack",
            "From a publish to its acknowledgement, a sample",
            Unit::Seconds,
            v.ack_seconds.clone(),
        );
        registry.register_with_unit(
            "commit_to_ack",
            "From a commit to the acknowledgement of its last event, a sample",
            Unit::Seconds,
            v.commit_to_ack_seconds.clone(),
        );
        Metrics {
            vitals,
            registry,
            lag_bytes,
            lag_seconds,
            ready,
        }
    }

    /// All of them, as they are now.
    pub fn text(&self) -> String {
        self.lag_bytes.set(self.vitals.lag_bytes());
        self.lag_seconds.set(self.vitals.lag().as_secs_f64());
        self.ready.set(self.vitals.readiness().is_ok().into());
        let mut text = String::new();
        // writing to a String cannot fail
        let _ = encode(&mut text, &self.registry);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::relay::core::Tally;
    use crate::relay::vitals::ReconnectCause;

    #[test]
    fn what_was_counted_is_served_under_its_name_with_its_unit() {
        let vitals = Arc::new(Vitals::default());
        let metrics = Metrics::new(vitals.clone());
        let tally = Tally {
            published: 3,
            published_bytes: 1000,
            ..Tally::default()
        };
        vitals.tell(Tally::default(), tally);
        vitals.reconnects(ReconnectCause::AckTimeout);
        vitals.wal_end.set(0x1_0000_0010);
        vitals.settled.set(0x1_0000_0000);
        vitals.ack_seconds.observe(0.000_2);
        let text = metrics.text();
        for line in [
            "jetstream_outbox_events_published_total 3",
            "jetstream_outbox_published_bytes_total 1000",
            "jetstream_outbox_reconnects_total{cause=\"ack_timeout\"} 1",
            "jetstream_outbox_server_lsn_bytes 4294967312",
            "jetstream_outbox_lag_bytes 16",
            "jetstream_outbox_lag_seconds 0.0",
            "jetstream_outbox_ready 0",
            "jetstream_outbox_ack_seconds_count 1",
            "jetstream_outbox_ack_seconds_bucket{le=\"0.00025\"} 1",
            concat!(
                "jetstream_outbox_build_info{version=\"",
                env!("CARGO_PKG_VERSION"),
                "\"} 1"
            ),
            "# EOF",
        ] {
            assert!(text.lines().any(|it| it == line), "{line}\n{text}");
        }
    }
}
