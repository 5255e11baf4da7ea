//! Nothing that stands in a row can be taken for anything but an event: subjects and ids cannot inject.
//!
//! The rule that the expected subjects follow is documented in src/outbox/subject.rs and src/outbox/message_id.rs.

use crate::rig::{Rig, STREAM};

/// An outbox that lets everything in, unlike the seed's, which has uuids and varchar(255).
const LENIENT_TABLE: &str =
    "CREATE TABLE outbox (id text, aggregatetype text, aggregateid text, payload text)";

struct Row {
    id: String,
    aggregatetype: String,
    aggregateid: String,
}

/// Relays the rows under the eyes of a subscriber to everything, and returns subject and id of what arrived.
///
/// Sees to it that each row is published once and nothing else is, and that no header is added.
#[track_caller]
fn relay(rows: &[Row]) -> Vec<(String, String)> {
    let rig = Rig::start_with_tables(LENIENT_TABLE);
    let mut everything = rig.nats.client();
    everything.try_subscribe(">", 2).expect("subscribe to all");

    let mut client = rig.pg.client();
    for row in rows {
        client
            .execute(
                "INSERT INTO outbox VALUES ($1, $2, $3, 'body')",
                &[&row.id, &row.aggregatetype, &row.aggregateid],
            )
            .expect("insert");
    }
    // the checkpoint has subjects of its own
    rig.drain(&[]);

    let stored = rig.messages();
    assert_eq!(stored.len(), rows.len(), "one message a row");
    let mut id_before = None;
    for message in &stored {
        let mut headers = message.headers.clone();
        // on a stream without replicas each names the one before it too
        headers.retain(|(name, id)| {
            name != "Nats-Expected-Last-Msg-Id" || Some(id.as_str()) != id_before
        });
        // the first one of a connection names its stream
        headers.retain(|(name, _)| name != "Nats-Expected-Stream" || id_before.is_some());
        let names: Vec<&str> = headers.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(
            names,
            [
                "Nats-Expected-Last-Sequence",
                "Nats-Msg-Id",
                "Outbox-Position"
            ],
            "{message:?}"
        );
        assert_eq!(message.text(), "body");
        id_before = Some(message.id());
    }

    // what passed the server, up to a message of ours
    let mut other = rig.nats.client();
    other.try_send("test.end", "", &[], b"").expect("publish");
    let mut seen = Vec::new();
    loop {
        let message = everything.try_next().expect("a message");
        if message.subject == "test.end" {
            break;
        }
        let from_server = ["$JS.EVENT.", "_INBOX.", "$JS.ACK."];
        // the API calls of the relay and of this test's own client: those that look, and consumers
        let looks = [
            "$JS.API.INFO",
            "$JS.API.STREAM.NAMES",
            "$JS.API.STREAM.LIST",
            "$JS.API.STREAM.INFO.",
            "$JS.API.STREAM.MSG.GET.",
            "$JS.API.CONSUMER.",
            // the checkpoint
            "$JS.API.STREAM.CREATE.KV_",
            "$KV.",
        ];
        if from_server
            .iter()
            .chain(&looks)
            .all(|own| !message.subject.starts_with(own))
        {
            assert_eq!(message.body, b"body", "{message:?}");
            seen.push(message.subject);
        }
    }
    let subjects: Vec<_> = stored.iter().map(|m| m.subject.clone()).collect();
    // a consumer's delivery also comes under the event's own subject, to the inbox alone
    assert_eq!(
        seen[..subjects.len().min(seen.len())],
        subjects,
        "nothing else on the wire"
    );
    assert_eq!(
        rig.nats.client().stream_info(STREAM)["state"]["messages"],
        rows.len()
    );
    stored
        .iter()
        .map(|m| (m.subject.clone(), m.id().to_string()))
        .collect()
}

#[test]
fn values_become_subjects_by_the_documented_rule() {
    let nbsp = "\u{a0}";
    let cases: &[(&str, &str, &str)] = &[
        ("account", "account_id_1", "events.account.account_id_1"),
        ("shop.order", "a.b", "events.shop.order.a.b"),
        ("Größe", "日本語😀", "events.Größe.日本語😀"),
        // white space
        ("a b", " ", "events.a%20b.%20"),
        ("\t", "\x0b\x0c", "events.%09.%0B%0C"),
        (
            nbsp,
            "\u{1680}\u{2003}\u{2028}\u{2029}\u{205f}\u{3000}\u{feff}\u{85}",
            "events.%C2%A0.%E1%9A%80%E2%80%83%E2%80%A8%E2%80%A9%E2%81%9F%E3%80%80%EF%BB%BF%C2%85",
        ),
        // the protocol
        (
            "x\r\nPUB $JS.API.STREAM.DELETE.jetstream_outbox 0\r\n\r\n",
            "1",
            "events.x%0D%0APUB%20$JS.API.STREAM.DELETE.jetstream_outbox%200%0D%0A%0D%0A.1",
        ),
        (
            "x",
            "1 reply.subject 4\r\nbody\r\nPUB events.evil 4",
            "events.x.1%20reply.subject%204%0D%0Abody%0D%0APUB%20events.evil%204",
        ),
        ("\n", "\r", "events.%0A.%0D"),
        ("x", "1 100 200\r\nHPUB", "events.x.1%20100%20200%0D%0AHPUB"),
        // wildcards
        ("*", ">", "events.%2A.%3E"),
        ("a*b", "c>d.>", "events.a%2Ab.c%3Ed.%3E"),
        // tokens
        ("", "", "events.%.%"),
        ("a", "", "events.a.%"),
        ("", "b", "events.%.b"),
        (".", "..", "events.%2E.%2E%2E"),
        (".a", "a.", "events.%2Ea.a%2E"),
        ("a..b", "...c...", "events.a.%2Eb.%2E%2E%2Ec.%2E%2E"),
        // control characters
        ("\x01\x02", "\x1b[31m\x7f", "events.%01%02.%1B[31m%7F"),
        // what would be an escape itself
        ("100%", "%2E", "events.100%25.%252E"),
        ("%", "%~", "events.%25.%25~"),
        // others' subjects stay behind the prefix
        (
            "$JS",
            "API.STREAM.PURGE.jetstream_outbox",
            "events.$JS.API.STREAM.PURGE.jetstream_outbox",
        ),
        ("_INBOX", "x", "events._INBOX.x"),
        ("$SYS", "REQ", "events.$SYS.REQ"),
    ];
    let rows: Vec<Row> = (0..)
        .zip(cases)
        .map(|(n, (aggregatetype, aggregateid, _))| Row {
            id: format!("id{n}"),
            aggregatetype: aggregatetype.to_string(),
            aggregateid: aggregateid.to_string(),
        })
        .collect();
    let expected: Vec<_> = (0..)
        .zip(cases)
        .map(|(n, (_, _, subject))| (subject.to_string(), format!("id{n}")))
        .collect();
    assert_eq!(relay(&rows), expected);
}

#[test]
fn long_values_keep_their_beginning_and_a_hash() {
    // each value, and what it is as a token; `None`: shortened
    let cases: &[(String, Option<String>)] = &[
        ("x".repeat(255), Some("x".repeat(255))),
        ("日".repeat(255), Some("日".repeat(255))),
        (" ".repeat(255), Some("%20".repeat(255))),
        ("\u{3000}".repeat(255), None),
        ("x".repeat(1_400), Some("x".repeat(1_400))),
        ("x".repeat(1_401), None),
        (">".repeat(100_000), None),
        ("a.b ".repeat(1_000_000), None),
    ];
    let rows: Vec<Row> = cases
        .iter()
        .enumerate()
        .flat_map(|(n, (value, _))| {
            [
                ("t".to_string(), value.clone()),
                (value.clone(), "t".to_string()),
            ]
            .map(|(aggregatetype, aggregateid)| Row {
                id: format!("{n} {}", aggregateid.len()),
                aggregatetype,
                aggregateid,
            })
        })
        .collect();
    let pg = crate::support::postgres::Postgres::start();
    let sha256 = |value: &str| -> String {
        let sql = "SELECT upper(encode(sha256(convert_to($1, 'UTF8')), 'hex'))";
        pg.client().query_one(sql, &[&value]).expect("hash").get(0)
    };
    let arrived = relay(&rows);
    for (pair, (value, token)) in arrived.chunks(2).zip(cases) {
        let [(last, _), (first, _)] = pair else {
            panic!("two rows a case")
        };
        let last = last.strip_prefix("events.t.").expect("type, then id");
        let first = first
            .strip_prefix("events.")
            .and_then(|s| s.strip_suffix(".t"));
        assert_eq!(first, Some(last), "the same in either place");
        match token {
            Some(token) => assert_eq!(last, token),
            None => {
                let (kept, hash) = last
                    .rsplit_once("%~")
                    .expect("the mark of a shortened value");
                assert_eq!(hash, sha256(value));
                assert!((1_300..=1_400).contains(&last.len()), "{}", last.len());
                let begin = kept
                    .replace("%20", " ")
                    .replace("%3E", ">")
                    .replace("%E3%80%80", "\u{3000}");
                assert!(value.starts_with(&begin), "{begin}");
            }
        }
    }
}

#[test]
fn ids_become_one_header_whatever_is_in_them() {
    let cases: &[(&str, &str)] = &[
        ("plain", "plain"),
        ("1\r\nNats-Rollup: all", "1%0D%0ANats-Rollup: all"),
        (
            "1\r\n\r\nbody\r\nPUB events.x 0\r\n",
            "1%0D%0A%0D%0Abody%0D%0APUB events.x 0%0D%0A",
        ),
        ("1\nOutbox-Position: x", "1%0AOutbox-Position: x"),
        (" a: b ", "%20a: b%20"),
        ("\t", "%09"),
        ("50%", "50%25"),
        ("größe \u{2028}", "größe %E2%80%A8"),
        ("a.*>", "a.*>"),
    ];
    let rows: Vec<Row> = cases
        .iter()
        .map(|(id, _)| Row {
            id: id.to_string(),
            aggregatetype: "t".into(),
            aggregateid: "a".into(),
        })
        .collect();
    let ids: Vec<_> = relay(&rows).into_iter().map(|(_, id)| id).collect();
    let expected: Vec<_> = cases.iter().map(|(_, id)| id.to_string()).collect();
    assert_eq!(ids, expected);
}
