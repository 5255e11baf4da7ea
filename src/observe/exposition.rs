//! The list of [`metrics`](super::metrics) as text, in the two formats that scrapers read:
//! [Prometheus' own, version 0.0.4](https://prometheus.io/docs/instrumenting/exposition_formats/), and
//! [OpenMetrics 1.0](https://github.com/prometheus/OpenMetrics/blob/main/specification/OpenMetrics.md).
//!
//! They differ in little: where the name of a counter's family ends, how whole numbers of seconds look, and the end.

use super::metrics::{METRICS, Metric, PREFIX, Read};
use crate::relay::vitals::Vitals;
use std::fmt::{self, Write};

/// How the metrics are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `text/plain; version=0.0.4`: what every scraper reads, and a person in a browser.
    Text,
    /// `application/openmetrics-text`: what Prometheus prefers.
    OpenMetrics,
}

impl Format {
    /// The one that an `Accept` header prefers: the greater weight, and OpenMetrics only where it is named in a
    /// version that this is. Without a header, and with nothing that is known in it, it is [`Format::Text`].
    ///
    /// Source: RFC 9110, section 12.5.1.
    pub fn negotiate(accept: &str) -> Format {
        let (mut text, mut open_metrics) = (0.0, 0.0);
        for range in accept.split(',') {
            let mut parts = range.split(';').map(str::trim);
            let media = parts.next().unwrap_or_default().to_ascii_lowercase();
            let (mut weight, mut version) = (1.0, None);
            for parameter in parts {
                let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
                let value = value.trim().trim_matches('"');
                match name.trim().to_ascii_lowercase().as_str() {
                    "q" => weight = value.parse::<f32>().unwrap_or(0.0),
                    "version" => version = Some(value),
                    _ => {}
                }
            }
            let best = match media.as_str() {
                "application/openmetrics-text" if version.is_none_or(|v| v == "1.0.0") => {
                    &mut open_metrics
                }
                "text/plain" | "text/*" | "*/*" => &mut text,
                _ => continue,
            };
            if weight > *best {
                *best = weight;
            }
        }
        match open_metrics > 0.0 && open_metrics >= text {
            true => Format::OpenMetrics,
            false => Format::Text,
        }
    }

    /// What is said of the text.
    pub fn content_type(self) -> &'static str {
        match self {
            Format::Text => "text/plain; version=0.0.4; charset=utf-8",
            Format::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }

    /// All metrics as they are now.
    pub fn text(self, vitals: &Vitals) -> String {
        let mut text = String::new();
        for metric in METRICS {
            // writing to a String cannot fail
            let _ = self.write(&mut text, metric, vitals);
        }
        if self == Format::OpenMetrics {
            text.push_str("# EOF\n");
        }
        text
    }

    fn write(self, out: &mut String, metric: &Metric, vitals: &Vitals) -> fmt::Result {
        let name = metric.name;
        match &metric.read {
            Read::Counter(read) => {
                self.head(out, metric, "counter")?;
                writeln!(out, "{PREFIX}{name} {}", read(vitals))
            }
            Read::Counters(label, read) => {
                self.head(out, metric, "counter")?;
                for (value, count) in read(vitals) {
                    writeln!(out, "{PREFIX}{name}{{{label}=\"{value}\"}} {count}")?;
                }
                Ok(())
            }
            Read::Gauge(read) => {
                let Some(value) = read(vitals) else {
                    return Ok(());
                };
                self.head(out, metric, "gauge")?;
                writeln!(out, "{PREFIX}{name} {value}")
            }
            Read::Lsn(read) => {
                self.head(out, metric, "gauge")?;
                writeln!(out, "{PREFIX}{name} {}", read(vitals))
            }
            Read::Seconds(read) => {
                self.head(out, metric, "gauge")?;
                writeln!(out, "{PREFIX}{name} {:?}", read(vitals))
            }
            Read::Info(label, value) => {
                let kind = match self {
                    Format::Text => "gauge",
                    Format::OpenMetrics => "info",
                };
                self.head(out, metric, kind)?;
                writeln!(out, "{PREFIX}{name}{{{label}=\"{value}\"}} 1")
            }
            Read::Histogram(read) => {
                self.head(out, metric, "histogram")?;
                // first the buckets, which are read one by one: the count must be that of the last
                let buckets = read(vitals).cumulative();
                let count = buckets.last().map_or(0, |(_, count)| *count);
                for (bound, count) in buckets {
                    let bound = match bound.is_infinite() {
                        true => "+Inf".to_string(),
                        false => format!("{bound:?}"),
                    };
                    writeln!(out, "{PREFIX}{name}_bucket{{le=\"{bound}\"}} {count}")?;
                }
                let (_, sum) = read(vitals).totals();
                writeln!(out, "{PREFIX}{name}_sum {sum:?}")?;
                writeln!(out, "{PREFIX}{name}_count {count}")
            }
        }
    }

    /// Type, unit and meaning. The help texts hold nothing that would have to be escaped, which a test sees to.
    fn head(self, out: &mut String, metric: &Metric, kind: &str) -> fmt::Result {
        let family = match self {
            Format::Text => metric.name,
            Format::OpenMetrics => {
                let name = metric.name;
                let name = name.strip_suffix("_total").unwrap_or(name);
                name.strip_suffix("_info").unwrap_or(name)
            }
        };
        writeln!(out, "# HELP {PREFIX}{family} {}", metric.help)?;
        writeln!(out, "# TYPE {PREFIX}{family} {kind}")?;
        let unit = ["bytes", "seconds"].into_iter().find(|unit| {
            let name = family.strip_suffix(unit);
            name.is_some_and(|name| name.ends_with('_'))
        });
        match unit {
            Some(unit) if self == Format::OpenMetrics => {
                writeln!(out, "# UNIT {PREFIX}{family} {unit}")
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postgres::Lsn;
    use crate::relay::core::Tally;
    use crate::relay::vitals::ReconnectCause;
    use std::time::Duration;

    fn vitals() -> Vitals {
        let vitals = Vitals::default();
        let tally = Tally {
            published: 3,
            published_bytes: 1000,
            ..Tally::default()
        };
        vitals.tell(Tally::default(), tally);
        vitals.reconnects(ReconnectCause::AckTimeout);
        vitals.server_is_at(Lsn(0x1_0000_0010));
        vitals.stored_lsn.set(0x1_0000_0000);
        vitals.ack_seconds.observe(Duration::from_micros(200));
        vitals.ack_seconds.observe(Duration::from_secs(2));
        vitals
    }

    #[track_caller]
    fn check(text: &str, lines: &[&str]) {
        for line in lines {
            assert!(text.lines().any(|it| it == *line), "{line}\n{text}");
        }
    }

    const BOTH: [&str; 11] = [
        "jetstream_outbox_events_published_total 3",
        "jetstream_outbox_published_bytes_total 1000",
        "jetstream_outbox_reconnects_total{cause=\"ack_timeout\"} 1",
        "jetstream_outbox_reconnects_total{cause=\"connection\"} 0",
        "jetstream_outbox_wal_end_bytes 4294967312",
        "jetstream_outbox_lag_bytes 16",
        "jetstream_outbox_lag_seconds 0.0",
        "jetstream_outbox_ready 0",
        "jetstream_outbox_ack_seconds_bucket{le=\"0.00025\"} 1",
        "jetstream_outbox_ack_seconds_bucket{le=\"+Inf\"} 2",
        "jetstream_outbox_ack_seconds_sum 2.0002",
    ];

    #[test]
    fn what_was_counted_is_served_under_its_name_in_prometheus_text() {
        let text = Format::Text.text(&vitals());
        check(&text, &BOTH);
        check(
            &text,
            &[
                "# TYPE jetstream_outbox_events_published_total counter",
                "# TYPE jetstream_outbox_build_info gauge",
                "# TYPE jetstream_outbox_ack_seconds histogram",
            ],
        );
        assert!(
            !text.contains("# EOF") && !text.contains("# UNIT"),
            "{text}"
        );
    }

    #[test]
    fn what_was_counted_is_served_under_its_name_in_open_metrics() {
        let text = Format::OpenMetrics.text(&vitals());
        check(&text, &BOTH);
        check(
            &text,
            &[
                "# TYPE jetstream_outbox_events_published counter",
                "# TYPE jetstream_outbox_published_bytes counter",
                "# UNIT jetstream_outbox_published_bytes bytes",
                "# TYPE jetstream_outbox_build info",
                "# UNIT jetstream_outbox_ack_seconds seconds",
            ],
        );
        assert!(text.ends_with("\n# EOF\n"), "{text}");
    }

    #[test]
    fn what_is_not_known_is_not_served() {
        for format in [Format::Text, Format::OpenMetrics] {
            assert!(!format.text(&vitals()).contains("slot_wal_bytes"));
        }
    }

    #[test]
    fn names_and_help_are_what_the_formats_allow_without_escapes() {
        for metric in METRICS {
            let name = metric.name;
            let legal = |c: char| c.is_ascii_lowercase() || c == '_';
            assert!(name.chars().all(legal), "{name}");
            assert!(!metric.help.contains(['\\', '\n', '"']), "{name}");
            let counts = matches!(metric.read, Read::Counter(_) | Read::Counters(..));
            assert_eq!(name.ends_with("_total"), counts, "{name}");
        }
    }

    #[test]
    fn a_scraper_gets_the_format_that_it_prefers() {
        for (accept, expected) in [
            ("", Format::Text),
            ("*/*", Format::Text),
            ("text/html,application/xhtml+xml,*/*;q=0.8", Format::Text),
            // Prometheus 2.42
            (
                "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,\
                 text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
                Format::OpenMetrics,
            ),
            // Prometheus 3
            (
                "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,\
                 application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,\
                 text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
                Format::OpenMetrics,
            ),
            // Prometheus that prefers protobuf, which is not served
            (
                "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited,\
                 application/openmetrics-text;version=1.0.0;q=0.8,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
                Format::OpenMetrics,
            ),
            // Telegraf
            (
                "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited;q=0.7,\
                 text/plain;version=0.0.4;q=0.3,*/*;q=0.1",
                Format::Text,
            ),
            // VictoriaMetrics
            ("text/plain;version=0.0.4;q=1,*/*;q=0.1", Format::Text),
            (
                "text/plain, application/openmetrics-text;q=0.9",
                Format::Text,
            ),
            (
                "Application/OpenMetrics-Text ; Version=\"1.0.0\"",
                Format::OpenMetrics,
            ),
            ("application/openmetrics-text", Format::OpenMetrics),
            ("application/openmetrics-text;q=0", Format::Text),
            ("application/openmetrics-text;q=x", Format::Text),
            ("application/openmetrics-text;version=0.0.1", Format::Text),
            ("application/openmetrics-text;version=2.0.0", Format::Text),
        ] {
            assert_eq!(Format::negotiate(accept), expected, "{accept}");
        }
    }
}
