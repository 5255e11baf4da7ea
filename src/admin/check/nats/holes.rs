//! What a stream has lost from its middle, where nothing goes by itself. The relay reads the ends of the streams alone: of what is
//! missing before that it knows nothing.

use super::Facts;
use crate::admin::check::finding::{Finding, warn};
use crate::config::Config;
use crate::jetstream::streams::StreamConfig;

/// Messages go oldest first, or not at all.
fn keeps_its_middle(config: &StreamConfig) -> bool {
    config.retention == "limits" && !config.allow_msg_ttl && config.max_msgs_per_subject <= 0
}

pub(super) fn judge(facts: &Facts, _: &Config) -> Vec<Finding> {
    let streams = facts.streams.as_deref().unwrap_or_default();
    let infos = streams.iter().map(|stream| &stream.info);
    let holed = infos.filter(|info| keeps_its_middle(&info.config) && info.state.num_deleted > 0);
    let findings = holed.map(|info| {
        let (name, count) = (&info.config.name, info.state.num_deleted);
        warn(
            "nats.holes",
            format!("stream {name} has lost {count} messages from its middle"),
            "somebody deleted them, or nats-server lost them (a damaged file, a power cut): what Postgres still had then was published \
             again, what it was told of before is missing",
            format!(
                "look for lost blocks in the log of nats-server; where the stream has replicas, compare them: nats stream cluster \
                 step-down {name}; what is on none, restore from a backup or write again"
            ),
        )
    });
    findings.collect()
}
