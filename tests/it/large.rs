//! What others write, however large, takes no memory and no time of the relay's; and an event that is too large is poison.

use crate::rig::{DEADLINE, Rig, SLOT, counted};
use crate::support::natsclient::StreamMessage;
use crate::support::proxy::{Direction, Mode, Proxy};
use crate::support::relay::Relay;
use crate::support::wait::{eventually, secs};
use std::time::{Duration, Instant};

const PARKED: &str = "PARKED";
const PARK: [&str; 2] = ["--on-poison", "park"];
/// The resident set may grow by so much: buffers are touched, and an allocator keeps some.
const GROWTH_KB: u64 = 3 << 10;

fn outbox(rig: &Rig, id: &str, payload: &str) {
    rig.pg.execute(&format!(
        "INSERT INTO outbox (id, aggregatetype, aggregateid, payload) VALUES ('{id}', 't', 'a', {payload})"
    ));
}

fn rig(columns: &str) -> Rig {
    let rig = Rig::start_with_tables(&format!(
        "CREATE TABLE outbox (id text, aggregatetype text, aggregateid text, {columns});
         CREATE TABLE other (id int PRIMARY KEY, a text, b text);
         ALTER TABLE other REPLICA IDENTITY FULL;
         ALTER TABLE other ALTER a SET STORAGE EXTERNAL;"
    ));
    rig.nats
        .client()
        .add_stream(PARKED, &["jetstream_outbox.parked"]);
    rig
}

fn parked(rig: &Rig) -> Vec<StreamMessage> {
    rig.nats.client().read_all(PARKED)
}

/// What is no event of ours is passed over as it comes in: rows of other tables in whatever way they change, messages of
/// whatever prefix, also of transactions that roll back, and the columns of an outbox that take no part.
#[test]
fn what_is_not_for_the_relay_takes_no_memory() {
    let rig = rig("payload text, unused text");
    let relay = rig.relay(&["-hold-back", "0"]);
    outbox(&rig, "first", "'x'");
    rig.wait_for_messages(1);
    let before = relay.rss_peak_kb().expect("it runs");
    let large = "repeat('large', 8000000)";
    for sql in [
        format!("BEGIN; SELECT pg_logical_emit_message(false, 'x', {large}); ROLLBACK"),
        format!("SELECT pg_logical_emit_message(false, '{SLOT}', {large})"),
        format!("SELECT pg_logical_emit_message(true, 'x', {large})"),
        "SELECT pg_logical_emit_message(true, repeat('prefix', 5000000), 'x')".to_string(),
        format!("INSERT INTO other VALUES (1, {large}, 'b')"),
        "UPDATE other SET b = 'c'".to_string(),
        "UPDATE other SET a = a || 'c', id = 2".to_string(),
        "DELETE FROM other".to_string(),
        format!("INSERT INTO other VALUES (1, {large}, {large}); TRUNCATE other, outbox"),
        format!("INSERT INTO outbox VALUES ('second', 't', 'a', 'payload', {large})"),
    ] {
        rig.pg.execute(&sql);
    }
    outbox(&rig, "last", "'x'");
    rig.wait_for_messages(3);
    let found: Vec<_> = rig
        .messages()
        .iter()
        .map(|message| (message.id().to_string(), message.body.len()))
        .collect();
    let expected = [("first", 1), ("second", 7), ("last", 1)];
    assert!(
        found
            .iter()
            .map(|(id, len)| (id.as_str(), *len))
            .eq(expected)
    );
    let after = relay.rss_peak_kb().expect("it runs");
    assert!(after < before + GROWTH_KB, "{before} kB before, {after} kB");
}

/// An event that is too large for the relay itself is parked with the beginning of its body; one that is too large for NATS alone
/// as before. Whatever follows goes on.
#[test]
fn an_event_that_is_too_large_is_parked_with_the_beginning_of_its_body() {
    let rig = rig("payload bytea, headers jsonb");
    let relay = rig.relay(&[&PARK[..], &["-hold-back", "0"]].concat());
    outbox(&rig, "first", "'x'");
    rig.wait_for_messages(1);
    let before = relay.rss_peak_kb().expect("it runs");
    let large = "convert_to(repeat('0123456789', 4000000), 'UTF8')";
    outbox(&rig, "payload", large);
    outbox(&rig, "two", "convert_to(repeat('x', 2000000), 'UTF8')");
    rig.pg.execute(&format!(
        "INSERT INTO outbox VALUES (repeat('i', 20000000), 't', 'a', 'body', NULL);
         INSERT INTO outbox VALUES ('headers', 't', 'a', 'body', jsonb_build_object('h', repeat('h', 20000000)));
         SELECT pg_logical_emit_message(true, '{SLOT}', '{{\"id\": \"' || repeat('m', 20000000));"
    ));
    outbox(&rig, "last", "'x'");
    rig.wait_for_messages(2);
    let parked = parked(&rig);
    let row = |what: &str| {
        format!(
            "row of \"public\".\"outbox\": column {what} makes the event larger than the relay takes: 4 times the max_payload of \
             the NATS server"
        )
    };
    let two = "2000178 bytes are more than the 1048576 that NATS accepts".to_string();
    let content = row("x").replace(
        "row of \"public\".\"outbox\": column x",
        "message \"jetstream_outbox\": its content",
    );
    let expected = [
        ("payload", row("payload"), Some("80000002")),
        ("two", two, Some("2000000")),
        ("parked-", row("id"), None),
        ("headers", row("headers"), None),
        ("parked-", content, Some("20000008")),
    ];
    assert_eq!(parked.len(), expected.len());
    for (message, (id, cause, cut)) in parked.iter().zip(expected) {
        assert!(message.id().starts_with(id), "{}", message.id());
        let found = message.header("Outbox-Parked").unwrap_or_default();
        match id {
            // how long the position is depends on the server
            "two" => assert!(found.ends_with(&cause[7..]), "{found}"),
            _ => assert_eq!(found, cause),
        }
        assert_eq!(message.header("Outbox-Body-Cut"), cut, "{id}");
        let size = 1 << 20;
        match cut {
            Some("80000002") => {
                assert!(
                    message.body.len() > size / 2 - 100,
                    "{}",
                    message.body.len()
                );
                assert!(message.body.starts_with(b"01234567890123"));
            }
            Some(_) => assert!(
                message.body.len() > size - 3_000 && message.body.len() < size,
                "{id} {}",
                message.body.len()
            ),
            None => assert_eq!(message.body, b"body"),
        }
    }
    let after = relay.rss_peak_kb().expect("it runs");
    // as much as a few events of the largest size that NATS takes
    assert!(
        after < before + 4 * GROWTH_KB,
        "{before} kB before, {after} kB"
    );
}

#[test]
fn an_event_that_is_too_large_stops_the_relay_by_name_and_the_way_past_it_is_one() {
    let rig = rig("payload text");
    outbox(&rig, "first", "'x'");
    outbox(&rig, "large", "repeat('x', 20000000)");
    outbox(&rig, "last", "'x'");
    let (code, log) = rig.run(&["--drain"]);
    assert_eq!(code, 65, "{log:#?}");
    let last = log.last().expect("it says why");
    assert!(
        last.contains("column payload makes the event larger"),
        "{last}"
    );
    let start = last.find("SELECT").expect("it says how to go on");
    let statement = last[start..].split_inclusive(')').next();
    rig.pg.execute(statement.expect("it is one"));
    rig.drain(&["--resume-anyway"]);
    let messages = rig.messages();
    let ids: Vec<_> = messages.iter().map(StreamMessage::id).collect();
    assert_eq!(ids, ["first", "last"]);
}

/// The bound follows from what NATS takes: with more, more.
#[test]
fn a_row_within_the_bound_is_taken_whole() {
    let rig = rig("payload json, headers jsonb");
    // white space between tokens goes: it is no part of the event
    outbox(
        &rig,
        "spaces",
        "('[' || repeat(' ', 4000000) || '1]')::json",
    );
    outbox(&rig, "more", "('[' || repeat(' ', 4300000) || '1]')::json");
    rig.drain(&PARK);
    let messages = rig.messages();
    assert_eq!(messages.len(), 1);
    assert_eq!(
        (messages[0].id(), &messages[0].body[..]),
        ("spaces", &b"[1]"[..])
    );
    assert_eq!(parked(&rig).len(), 1);
}

/// The time that headers take grows with their number, and ends where they are more than an event may have.
#[test]
fn any_number_of_headers_takes_little_time() {
    let rig = rig("payload text, headers jsonb");
    let members = |count: u32, value: &str| {
        format!("(SELECT jsonb_object_agg('k' || g, {value}) FROM generate_series(1, {count}) g)")
    };
    let array =
        "jsonb_build_object('k', (SELECT jsonb_agg(E'\\n'::text) FROM generate_series(1, 300000)))";
    let nulls =
        "jsonb_build_object('k', (SELECT jsonb_agg(NULL::text) FROM generate_series(1, 300000)))";
    let all = [
        members(100_000, "E'\\n'"),
        members(4_000, "E'\\n'"),
        members(200_000, "NULL::text"),
        array.to_string(),
        nulls.to_string(),
        members(1_500, "E'\\n'"),
    ];
    for (index, headers) in all.iter().enumerate() {
        rig.pg.execute(&format!(
            "INSERT INTO outbox VALUES ('{index}', 't', 'a', 'x', {headers})"
        ));
    }
    let begun = Instant::now();
    rig.drain(&PARK);
    let took = begun.elapsed();
    // before it was linear, the first alone took 22 s in a release build
    assert!(took < secs(20), "{took:?}");
    let ids = |messages: Vec<StreamMessage>| -> String {
        messages.iter().map(StreamMessage::id).collect()
    };
    assert_eq!(
        (ids(parked(&rig)), ids(rig.messages())),
        ("013".into(), "245".into())
    );
    let last = rig.messages().pop().expect("it is there");
    let names = last.headers.iter().map(|(name, _)| name);
    assert_eq!(names.filter(|name| name.starts_with('k')).count(), 1_500);
    let encoded = last.header("Outbox-Encoded").unwrap_or_default();
    assert_eq!(encoded.split(", ").count(), 1_500);
}

/// A message that takes minutes to arrive does not keep the relay from ending when it is asked to.
#[test]
fn a_relay_is_stopped_in_the_middle_of_a_large_message() {
    for sql in [
        "INSERT INTO other VALUES (1, repeat('x', 20000000), 'b')",
        "INSERT INTO outbox VALUES ('large', 't', 'a', repeat('x', 3000000))",
    ] {
        let rig = rig("payload text");
        let proxy = Proxy::start(rig.pg.port());
        let mut relay = Relay::start_at(proxy.port(), rig.nats.port(), &["-hold-back", "0"]);
        outbox(&rig, "1", "'x'");
        rig.wait_for_messages(1);
        let passed = proxy.passed(Direction::ToClient);
        proxy.set(Mode::Trickle(200_000));
        rig.pg.execute(sql);
        eventually("some of it to pass", DEADLINE, || {
            proxy.passed(Direction::ToClient) > passed + 300_000
        });
        let begun = Instant::now();
        relay.term();
        assert_eq!(relay.wait_exit(DEADLINE), 0);
        let took = begun.elapsed();
        // half a second's grace for the transaction, and the farewell
        assert!(took < Duration::from_secs(5), "{took:?}");
        assert_eq!(counted(&relay.log(), "published"), 1);
    }
}
