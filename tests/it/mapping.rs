//! What the operator says of the outbox is what comes out: columns, subjects, headers, tables, messages.

use crate::rig::{DEADLINE, Rig, SLOT, UUID_SQL, uuid};
use crate::support::natsclient::StreamMessage;
use jetstream_outbox::outbox::message::publish_function;

/// A message: subject, id, headers beside the relay's own, body.
type Expected<'a> = (&'a str, &'a str, &'a [(&'a str, &'a str)], &'a str);

const TABLE: &str = "CREATE TABLE outbox (
    id text, aggregatetype text, aggregateid text, payload jsonb,
    type text, tenant text, traceparent text, tracestate text, headers jsonb, ttl text)";

/// The headers that no writer has put there.
const OWN: [&str; 5] = [
    "Nats-Msg-Id",
    "Nats-Expected-Last-Sequence",
    "Nats-Expected-Last-Msg-Id",
    "Nats-Expected-Stream",
    "Outbox-Position",
];

fn extra_headers(message: &StreamMessage) -> Vec<(&str, &str)> {
    let headers = message.headers.iter();
    headers
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .filter(|(name, _)| !OWN.contains(name))
        .collect()
}

/// Drains what the statements wrote, and compares what the stream has got. `$N` stands for a number of this call's.
#[track_caller]
fn check(rig: &Rig, args: &[&str], sql: &str, expected: &[Expected<'_>]) {
    let before = rig.messages().len();
    let number = |text: &str| text.replace("$N", &(before + 1).to_string());
    rig.pg.execute(&number(sql));
    rig.drain(args);
    let messages = rig.messages().split_off(before);
    let found: Vec<_> = messages
        .iter()
        .map(|m| {
            let headers = extra_headers(m).into_iter();
            let headers: Vec<_> = headers
                .map(|(k, v)| (k.to_string(), v.to_string()))
                .collect();
            (
                m.subject.clone(),
                m.id().to_string(),
                headers,
                m.text().to_string(),
            )
        })
        .collect();
    let expected: Vec<_> = expected
        .iter()
        .map(|(subject, id, headers, body)| {
            let headers = headers.iter();
            let headers: Vec<_> = headers.map(|(k, v)| (k.to_string(), number(v))).collect();
            (number(subject), number(id), headers, number(body))
        })
        .collect();
    assert_eq!(found, expected, "{args:?} {sql}");
}

/// Runs until the relay stops by itself, which it must with this code and such a last line; the stream and the slot stay
/// as they are.
#[track_caller]
fn check_halts(rig: &Rig, args: &[&str], code: i32, said: &[&str]) {
    let before = rig.messages().len();
    let confirmed = rig.pg.confirmed_flush_lsn(SLOT);
    let (found, log) = rig.run(&[args, &["--hold-back", "0"]].concat());
    let last = log.last().cloned().unwrap_or_default();
    assert_eq!(found, code, "{last}");
    for part in said {
        assert!(last.contains(part), "{last}");
    }
    assert_eq!(rig.messages().len(), before);
    assert_eq!(rig.pg.confirmed_flush_lsn(SLOT), confirmed);
}

#[test]
fn columns_may_have_any_name() {
    let rig = Rig::start_with_tables(
        "CREATE TABLE outbox (body text, \"Topic\" text, k int, \"event id\" bigint)",
    );
    check(
        &rig,
        &[
            "--id-column=event id",
            "--aggregatetype-column=Topic",
            "--aggregateid-column=k",
            "--payload-column=body",
        ],
        "INSERT INTO outbox VALUES ('a b', 'order', 7, 12)",
        &[("events.order.7", "12", &[], "a b")],
    );
}

#[test]
fn the_conventional_table_of_debezium_works_as_it_is() {
    let rig = Rig::start_with_tables(
        "CREATE TABLE outbox (id uuid, aggregatetype varchar(255), aggregateid varchar(255), type varchar(255), payload jsonb)",
    );
    check(
        &rig,
        &[],
        &format!(
            "INSERT INTO outbox SELECT {UUID_SQL}, 'order', 'o-1', 'OrderPlaced', '{{\"n\": 1}}' FROM generate_series(1, 1) n"
        ),
        &[("events.order.o-1", &uuid(1), &[], "{\"n\":1}")],
    );
}

#[test]
fn a_template_makes_the_subject() {
    let rig = Rig::start_with_tables(TABLE);
    let insert = "INSERT INTO outbox (id, aggregatetype, aggregateid, payload, type, tenant)
                  VALUES ('$N', 'Order', 'o 1', '{}', 'Placed', 'Äcme')";
    for (template, subject) in [
        (
            "{prefix}.{aggregatetype}.{aggregateid}",
            "events.Order.o%201",
        ),
        (
            "{prefix}.{tenant:lower}.{aggregatetype}-{type}",
            "events.äcme.Order-Placed",
        ),
        ("{prefix}.v1.{id}", "events.v1.$N"),
    ] {
        let args = ["--subject", template];
        check(&rig, &args, insert, &[(subject, "$N", &[], "{}")]);
    }
    for (template, code, said) in [
        ("events.{aggregateid}", 64, "must begin with {prefix}."),
        ("{prefix}.{aggregateid", 64, "brace"),
    ] {
        let (found, log) = rig.run(&["--subject", template]);
        assert_eq!(found, code);
        assert!(log.iter().any(|line| line.contains(said)), "{log:?}");
    }
    // the columns are known when the first row comes
    rig.pg.execute(insert);
    check_halts(
        &rig,
        &["--subject={prefix}.{region}.{aggregateid}"],
        65,
        &[
            "map table",
            "it lacks region;",
            "id, region, aggregateid, payload",
        ],
    );
}

#[test]
fn headers_come_from_columns_and_json() {
    let rig = Rig::start_with_tables(TABLE);
    let row = |tenant: &str, trace: &str, headers: &str| {
        format!(
            "INSERT INTO outbox (id, aggregatetype, aggregateid, payload, tenant, traceparent, tracestate, headers)
             VALUES ('$N', 'a', 'b', '{{}}', {tenant}, {trace}, {trace}, {headers})"
        )
    };
    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    for (args, sql, headers) in [
        (&[][..], row("'t'", "NULL", "NULL"), &[][..]),
        (
            &[],
            row("NULL", &format!("'{trace}'"), "'{}'"),
            &[("traceparent", trace), ("tracestate", trace)],
        ),
        (
            &["--header=tenant"],
            row("'50% é'", "NULL", "NULL"),
            &[("tenant", "50% é")],
        ),
        (
            &[
                "--header=tenant=X-Tenant",
                "--header=id=X-Id,aggregatetype=X-Type",
            ],
            row("E'a\\r\\nNats-Rollup: all'", "NULL", "NULL"),
            &[
                ("X-Tenant", "a%0D%0ANats-Rollup: all"),
                ("X-Id", "$N"),
                ("X-Type", "a"),
                ("Outbox-Encoded", "X-Tenant"),
            ],
        ),
        (
            &[],
            row(
                "NULL",
                "NULL",
                r#"'{"s": "x y", "n": 12345678901234567890.10, "b": true, "z": null, "l": ["p", {"q": [1, 2]}], "o": {"k": "v"}}'"#,
            ),
            // jsonb sorts its keys
            &[
                ("b", "true"),
                ("l", "p"),
                ("l", "{\"q\":[1,2]}"),
                ("n", "12345678901234567890.10"),
                ("o", "{\"k\":\"v\"}"),
                ("s", "x y"),
            ],
        ),
        (
            &[],
            row(
                "NULL",
                "NULL",
                r#"'{"Nats-Msg-Id": "x", "Outbox-Position": "y", "a b": "\n"}'"#,
            ),
            &[
                ("a%20b", "%0A"),
                ("%4Eats-Msg-Id", "x"),
                ("%4Futbox-Position", "y"),
                ("Outbox-Encoded", "a%20b"),
            ],
        ),
    ] {
        check(&rig, args, &sql, &[("events.a.b", "$N", headers, "{}")]);
    }
}

#[test]
fn a_json_column_keeps_the_order_of_its_headers_and_a_header_may_set_the_lifetime() {
    let rig = Rig::start_with_tables(
        "CREATE TABLE outbox (id int, aggregatetype text, aggregateid text, payload text, meta json, ttl text)",
    );
    rig.set_stream(&serde_json::json!({ "allow_msg_ttl": true }));
    check(
        &rig,
        &["--headers-column=meta", "--header=ttl=Nats-TTL"],
        r#"INSERT INTO outbox VALUES ($N, 'a', 'b', 'x', '{"z": 1.0, "a": "y"}', '1h')"#,
        &[(
            "events.a.b",
            "$N",
            &[("Nats-TTL", "1h"), ("z", "1.0"), ("a", "y")],
            "x",
        )],
    );
}

#[test]
fn events_may_be_cloud_events_and_tell_their_transaction() {
    let rig = Rig::start_with_tables(TABLE);
    let sql = "INSERT INTO outbox (id, aggregatetype, aggregateid, payload, type, headers)
               VALUES ('$N', 'order', 'o1', '{}', 'Order Placed', '{\"ce-tenant\": \"a b\"}')";
    rig.pg.execute(&sql.replace("$N", "1"));
    let xid: String = rig
        .pg
        .scalar("SELECT xmin::text FROM outbox")
        .expect("the row");
    rig.drain(&["--cloudevents=/shop", "--position-headers"]);
    let messages = rig.messages();
    let [message] = &messages[..] else {
        panic!("{messages:?}")
    };
    let found = extra_headers(message);
    let time = message.header("ce-time").expect("a time").to_string();
    let expected = [
        ("ce-specversion", "1.0"),
        ("ce-id", "1"),
        ("ce-source", "/shop"),
        ("ce-type", "Order%20Placed"),
        ("ce-time", &time),
        ("ce-datacontenttype", "application/json"),
        ("Outbox-Commit-Time", &time),
        ("Outbox-Transaction", &xid),
        ("ce-tenant", "a%20b"),
    ];
    assert_eq!(found, expected);
    let age: i64 = rig
        .pg
        .scalar(&format!(
            "SELECT abs(extract(epoch FROM now() - '{time}'::timestamptz) * 1000)::bigint"
        ))
        .expect("a time");
    assert!(age < 600_000 && time.ends_with('Z'), "{time}");
}

#[test]
fn messages_without_a_table_are_events_in_their_place() {
    let rig = Rig::start_with_tables(TABLE);
    rig.pg.execute(&publish_function(SLOT));
    rig.pg
        .execute("CREATE ROLE app LOGIN; GRANT INSERT ON outbox TO app");
    let emit = |transactional: bool, prefix: &str, json: &str| {
        format!("SELECT pg_logical_emit_message({transactional}, '{prefix}', '{json}');")
    };
    let event = |id: &str, more: &str| {
        format!(r#"{{"id":"{id}","aggregatetype":"m","aggregateid":"{id}"{more}}}"#)
    };
    let insert = |id: &str| {
        format!(
            "INSERT INTO outbox (id, aggregatetype, aggregateid, payload) VALUES ('{id}', 't', '{id}', '{{}}');"
        )
    };
    let sql = [
        // of other programs, of transactions that roll back, and not of any transaction
        &emit(true, "other", "{}"),
        &emit(false, SLOT, &event("x1", "")),
        "BEGIN;",
        &emit(true, SLOT, &event("x2", "")),
        &emit(false, SLOT, &event("x3", "")),
        "ROLLBACK; BEGIN;",
        &insert("$Na"),
        &emit(
            true,
            SLOT,
            &event(
                "$Nb",
                r#", "payload": {"z": 1.0, "a": 12345678901234567890}, "headers": {"k": "v"}"#,
            ),
        ),
        &insert("$Nc"),
        &emit(true, SLOT, &event("$Nd", r#","payload":"\u00e9<>&""#)),
        "COMMIT;",
    ]
    .join("\n");
    check(
        &rig,
        &[],
        &sql,
        &[
            ("events.t.$Na", "$Na", &[], "{}"),
            (
                "events.m.$Nb",
                "$Nb",
                &[("k", "v")],
                r#"{"z":1.0,"a":12345678901234567890}"#,
            ),
            ("events.t.$Nc", "$Nc", &[], "{}"),
            ("events.m.$Nd", "$Nd", &[], "\"\\u00e9<>&\""),
        ],
    );
    // another prefix, and none at all
    let both = [
        emit(true, "mine", &event("$Na", "")),
        emit(true, SLOT, &event("$Nb", "")),
    ]
    .join("");
    let mine = &[("events.m.$Na", "$Na", &[][..], "null")];
    check(
        &rig,
        &["--message-prefix=mine", "--hold-back=0"],
        &both,
        mine,
    );
    check(&rig, &["--no-messages", "--hold-back=0"], &both, &[]);

    // the function, as a role that may write events
    let call = |arguments: &str| format!("SET ROLE app; SELECT outbox_publish({arguments})");
    let id = uuid(7);
    check(
        &rig,
        &[],
        &call(&format!(
            r#"'ord"er', 'ö', '{{"b": 1.0, "a": 2}}', '{{"h": [1]}}', '{id}'"#
        )),
        &[("events.ord\"er.ö", &id, &[("h", "1")], r#"{"b":1.0,"a":2}"#)],
    );
    let before = rig.messages().len();
    rig.pg.execute(&call("'order', 'o1', NULL"));
    for (arguments, error) in [
        ("NULL, 'a', '1'", "must not be NULL"),
        ("'a', NULL, '1'", "must not be NULL"),
        ("'a', 'b', '1', NULL, NULL", "must not be NULL"),
        ("repeat('x', 256), 'b', '1'", "at most 255"),
        ("'a', 'b', '1', '[]'", "headers must be an object"),
        ("'a', 'b', '{'", "invalid input syntax"),
    ] {
        let refused = rig.pg.client().batch_execute(&call(arguments));
        let text = format!("{:?}", refused.expect_err(arguments));
        assert!(text.contains(error), "{text}");
    }
    rig.drain(&[]);
    let messages = rig.messages();
    assert_eq!(messages.len(), before + 1);
    let last = messages.last().expect("one");
    assert_eq!(
        (last.subject.as_str(), last.text()),
        ("events.order.o1", "null")
    );
    assert_eq!(last.id().len(), 36, "an id of its own: {}", last.id());
}

#[test]
fn a_message_that_is_no_event_halts_the_relay() {
    for (content, cause) in [
        ("{", "its content is no JSON object"),
        (
            r#"{"aggregatetype":"a","aggregateid":"b"}"#,
            "member id is NULL",
        ),
    ] {
        let rig = Rig::start_with_tables(TABLE);
        rig.pg.execute(&format!(
            "SELECT pg_logical_emit_message(true, '{SLOT}', '{content}')"
        ));
        check_halts(&rig, &[], 65, &["map message", SLOT, cause]);
    }
}

#[test]
fn several_tables_have_each_their_own_mapping() {
    let rig = Rig::start_with_tables(
        "CREATE TABLE orders (id text, aggregatetype text, aggregateid text, payload text);
         CREATE SCHEMA shop;
         CREATE TABLE shop.\"Mail\" (nr int, kind text, \"to\" text, body bytea);
         CREATE TABLE other (id text, aggregatetype text, aggregateid text, payload text);",
    );
    let args = [
        "--table=orders:header=aggregatetype=X-Type",
        "--table",
        "shop.\"Mail\":id=nr,aggregatetype=kind,payload=body,subject={prefix}.mail.{aggregatetype}.{to}",
    ];
    rig.pg.execute(
        "BEGIN;
         INSERT INTO orders VALUES ('1', 'o', 'x', 'first');
         INSERT INTO shop.\"Mail\" VALUES (2, 'welcome', 'a@b', 'second');
         INSERT INTO other VALUES ('3', 'o', 'x', 'not named');
         INSERT INTO orders VALUES ('4', 'o', 'x', 'third');
         COMMIT",
    );
    let log = rig.drain(&args);
    let said = "msg=\"has the columns of an outbox and is not named by -table, ignored\" table=public.other";
    assert!(
        log.iter().any(|line| line.contains(said)),
        "{}",
        log.join("\n")
    );
    check(
        &rig,
        &args,
        "INSERT INTO other VALUES ('5', 'o', 'x', 'not named')",
        &[],
    );
    let messages = rig.messages();
    let found: Vec<_> = messages
        .iter()
        .map(|m| (m.subject.as_str(), m.id(), m.text(), extra_headers(m).len()))
        .collect();
    let expected = [
        ("events.o.x", "1", "first", 1),
        ("events.mail.welcome.a@b", "2", "second", 0),
        ("events.o.x", "4", "third", 1),
    ];
    assert_eq!(found, expected);
}

#[test]
fn partitions_are_relayed_under_their_own_names_or_their_table_s() {
    for via_root in [false, true] {
        let rig = Rig::start_with_tables(
            "CREATE TABLE outbox (id int, aggregatetype text, aggregateid text, payload text) PARTITION BY RANGE (id);
             CREATE TABLE outbox_1 PARTITION OF outbox FOR VALUES FROM (1) TO (10);
             CREATE TABLE outbox_2 PARTITION OF outbox FOR VALUES FROM (10) TO (20)",
        );
        rig.pg.execute(&format!(
            "ALTER PUBLICATION {SLOT} SET (publish_via_partition_root = {via_root})"
        ));
        let insert = |id: u32| format!("INSERT INTO outbox VALUES ({id}, 'a', 'b', '{id}');");
        let expected: [Expected<'_>; 2] = [
            ("events.a.b", "1", &[], "1"),
            ("events.a.b", "11", &[], "11"),
        ];
        check(&rig, &[], &(insert(1) + &insert(11)), &expected);
        let args: &[&str] = if via_root {
            &["--table=outbox"]
        } else {
            &["--table=outbox*"]
        };
        let expected: [Expected<'_>; 2] = [
            ("events.a.b", "2", &[], "2"),
            ("events.a.b", "12", &[], "12"),
        ];
        check(&rig, args, &(insert(2) + &insert(12)), &expected);
        if !via_root {
            let said = "holds the partitions of table public.outbox under their own names";
            check_halts(&rig, &["--table=outbox"], 78, &[said]);
        }
    }
}

#[test]
fn a_table_that_changes_while_it_is_relayed_is_followed_or_halts_the_relay() {
    let rig = Rig::start_with_tables(TABLE);
    let mut relay = rig.relay(&["--hold-back=0"]);
    let insert = |id: u32, columns: &str, values: &str| {
        format!(
            "INSERT INTO outbox (id, aggregatetype, aggregateid{columns}) VALUES ('{id}', 't', '{id}'{values});"
        )
    };
    rig.pg.execute(&insert(1, ", payload", r#", '{"a": 1}'"#));
    rig.wait_for_messages(1);
    // within one transaction: a column more, a column less, another type, another order
    rig.pg.execute(&format!(
        "BEGIN; {} ALTER TABLE outbox ADD note text; {} ALTER TABLE outbox DROP tenant; {}
         ALTER TABLE outbox ALTER payload TYPE text; {}
         ALTER TABLE outbox RENAME payload TO old; ALTER TABLE outbox ADD payload jsonb; {} COMMIT",
        insert(2, ", payload", r#", '{"a": 2}'"#),
        insert(3, ", payload, note", r#", '{"a": 3}', 'n'"#),
        insert(4, ", payload", r#", '{"a": 4}'"#),
        insert(5, ", payload", r#", '{"a": 5}'"#),
        insert(6, ", payload, old", r#", '{"a": 6}', 'o'"#),
    ));
    rig.wait_for_messages(6);
    let bodies: Vec<_> = rig
        .messages()
        .iter()
        .map(|m| m.text().to_string())
        .collect();
    let expected = [
        r#"{"a":1}"#,
        r#"{"a":2}"#,
        r#"{"a":3}"#,
        r#"{"a":4}"#,
        r#"{"a": 5}"#,
        r#"{"a":6}"#,
    ];
    assert_eq!(bodies, expected);
    // a column that is needed is gone
    rig.pg
        .execute("ALTER TABLE outbox RENAME aggregateid TO aggregate");
    rig.pg
        .execute("INSERT INTO outbox (id, aggregatetype, aggregate) VALUES ('7', 't', '7')");
    let after = rig.pg.current_wal_lsn();
    assert_eq!(relay.wait_exit(DEADLINE), 65);
    let last = relay.log().last().cloned().unwrap_or_default();
    assert!(last.contains("it lacks aggregateid;"), "{last}");
    assert_eq!(rig.messages().len(), 6);
    assert!(rig.pg.confirmed_flush_lsn(SLOT) < after);
    // and is found again under its new name
    let found: &[(&str, &str)] = &[];
    check(
        &rig,
        &["--aggregateid-column=aggregate"],
        "INSERT INTO outbox (id, aggregatetype, aggregate) VALUES ('8', 't', '8')",
        &[
            ("events.t.7", "7", found, "null"),
            ("events.t.8", "8", found, "null"),
        ],
    );
}
