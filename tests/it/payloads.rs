//! What the writer wrote is what arrives, byte by byte.

use crate::rig::Rig;

/// A payload as an SQL expression, and the body it is to arrive as.
type Case<'a> = (&'a str, &'a [u8]);

/// Inserts the cases into `table`, one transaction each, drains, and compares what the stream got.
#[track_caller]
fn check(rig: &Rig, table: &str, cases: &[Case<'_>]) {
    let before = rig.messages().len();
    let mut client = rig.pg.client();
    for (index, (expression, _)) in cases.iter().enumerate() {
        let id = before + index;
        client
            .batch_execute(&format!(
                "INSERT INTO {table} (id, aggregatetype, aggregateid, payload) VALUES ('{id}', 't', 'a', {expression})"
            ))
            .unwrap_or_else(|error| panic!("{expression}: {error:?}"));
    }
    rig.drain(&[]);
    let messages = rig.messages().split_off(before);
    assert_eq!(messages.len(), cases.len(), "{table}");
    for (index, (message, (expression, body))) in messages.iter().zip(cases).enumerate() {
        assert_eq!(message.id(), (before + index).to_string());
        let expression = expression.chars().take(100).collect::<String>();
        assert!(
            message.body == *body,
            "{table}: {expression} arrived as {}",
            String::from_utf8_lossy(&message.body[..message.body.len().min(200)])
        );
    }
}

fn rig(payload_type: &str) -> Rig {
    Rig::start_with_tables(&format!(
        "CREATE TABLE outbox (id text, aggregatetype text NOT NULL, aggregateid text NOT NULL, payload {payload_type})"
    ))
}

#[test]
fn jsonb_arrives_compact_with_every_digit_and_character() {
    let large = format!(r#"{{"text":"{}"}}"#, "xyz €".repeat(132 * 1024));
    assert!(large.len() > 900 * 1024);
    let large_sql = format!("'{large}'");
    check(
        &rig("jsonb"),
        "outbox",
        &[
            (
                r#"'{"msg": "A test account creation event"}'"#,
                br#"{"msg":"A test account creation event"}"#,
            ),
            ("'12345678901234567890'", b"12345678901234567890"),
            (
                r#"'{"n": -98765432109876543210}'"#,
                br#"{"n":-98765432109876543210}"#,
            ),
            // jsonb stores numeric: it writes exponents out, and keeps trailing zeros
            ("'1e20'", b"100000000000000000000"),
            ("'0.10'", b"0.10"),
            ("'-0'", b"0"),
            (
                "'3.141592653589793238462643383279502884197'",
                b"3.141592653589793238462643383279502884197",
            ),
            (
                r#"'{"a": {"b": [{"c": [[], {}]}]}}'"#,
                br#"{"a":{"b":[{"c":[[],{}]}]}}"#,
            ),
            (r#"'"<b>&amp;</b>"'"#, br#""<b>&amp;</b>""#),
            // jsonb decodes escapes of characters and writes them plainly
            (r#"'"\u00e9\u20ac\ud83d\ude00"'"#, "\"é€😀\"".as_bytes()),
            (
                r#"'"😀 日本語 e\u0301"'"#,
                "\"😀 日本語 e\u{301}\"".as_bytes(),
            ),
            (
                r#"'"a\nb\r\n\tc\\d\"e\u0001\/"'"#,
                br#""a\nb\r\n\tc\\d\"e\u0001/""#,
            ),
            (
                r#"'{"k ey": "v : , al", "": " "}'"#,
                br#"{"":" ","k ey":"v : , al"}"#,
            ),
            (r#"'{"zz": 1, "a": 2, "b": 3}'"#, br#"{"a":2,"b":3,"zz":1}"#),
            ("'null'", b"null"),
            ("NULL", b"null"),
            ("'true'", b"true"),
            ("'\"\"'", b"\"\""),
            ("'[1, 2,3 ,  4]'", b"[1,2,3,4]"),
            (&large_sql, large.as_bytes()),
        ],
    );
}

#[test]
fn json_loses_white_space_between_tokens_and_nothing_else() {
    check(
        &rig("json"),
        "outbox",
        &[
            ("'12345678901234567890.10'", b"12345678901234567890.10"),
            ("'1e400'", b"1e400"),
            ("'-0'", b"-0"),
            ("'-0.0E+05'", b"-0.0E+05"),
            (r#"'{"b": 1, "a": 2, "b": 3}'"#, br#"{"b":1,"a":2,"b":3}"#),
            (r#"'"\u0000"'"#, br#""\u0000""#),
            (
                r#"'"\u00e9 \ud83d\ude00 \/ <>&"'"#,
                br#""\u00e9 \ud83d\ude00 \/ <>&""#,
            ),
            (r#"'"\ud83d"'"#, br#""\ud83d""#),
            (
                r#"'{"a" : "x  y\" : ,", "q\\" : [ 1 , 2 ]}'"#,
                br#"{"a":"x  y\" : ,","q\\":[1,2]}"#,
            ),
            (r#"E' \t\r\n{ "a" :\n1 }\r\n '"#, br#"{"a":1}"#),
            ("'null'", b"null"),
            ("NULL", b"null"),
            (
                "'\"\u{a0}\u{2028}\u{feff}\"'",
                "\"\u{a0}\u{2028}\u{feff}\"".as_bytes(),
            ),
        ],
    );
}

#[test]
fn text_arrives_as_it_is() {
    let cases: &[Case<'_>] = &[
        ("'plain'", b"plain"),
        ("''", b""),
        ("NULL", b""),
        ("E'a\\r\\nb\\tc'", b"a\r\nb\tc"),
        (
            "E'\\r\\nPUB $JS.API.STREAM.DELETE.jetstream_outbox 0\\r\\n\\r\\n'",
            b"\r\nPUB $JS.API.STREAM.DELETE.jetstream_outbox 0\r\n\r\n",
        ),
        (
            r#"'  { "not" : "compacted" } '"#,
            br#"  { "not" : "compacted" } "#,
        ),
        (r"'\x414243'", br"\x414243"),
        ("'😀 é\u{2028}'", "😀 é\u{2028}".as_bytes()),
        ("'null'", b"null"),
    ];
    check(&rig("text"), "outbox", cases);
    check(&rig("varchar(500)"), "outbox", cases);
}

#[test]
fn other_types_arrive_as_postgres_prints_them() {
    check(
        &rig("numeric"),
        "outbox",
        &[
            (
                "1e40 + 0.10",
                b"10000000000000000000000000000000000000000.10",
            ),
            ("'NaN'", b"NaN"),
        ],
    );
    check(
        &rig("xml"),
        "outbox",
        &[("'<a b=\"c\"> &lt; </a>'", b"<a b=\"c\"> &lt; </a>")],
    );
}

#[test]
fn bytea_arrives_raw_in_both_output_forms() {
    let rig = rig("bytea");
    let every_byte: Vec<u8> = (0..=255).collect();
    let hex: String = every_byte
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let every_byte_sql = format!("'\\x{hex}'");
    let cases: &[Case<'_>] = &[
        (&every_byte_sql, &every_byte),
        ("''", b""),
        ("NULL", b""),
        (r"'\x0d0a00'", b"\r\n\0"),
        (r"'\x5c5c78'", br"\\x"),
        ("convert_to('é 😀', 'UTF8')", "é 😀".as_bytes()),
    ];
    check(&rig, "outbox", cases);
    for form in ["escape", "hex"] {
        rig.pg.execute(&format!(
            "ALTER DATABASE postgres SET bytea_output = '{form}'"
        ));
        check(&rig, "outbox", cases);
    }
}

#[test]
fn columns_stand_in_any_order_among_others_and_ids_are_of_any_type() {
    let rig = Rig::start_with_tables(
        "CREATE TYPE kind AS ENUM ('Account', 'order line');
         CREATE TABLE outbox (dropped int, note text, payload jsonb, aggregateid bigint, at timestamptz DEFAULT now(), id bigint,
             double int GENERATED ALWAYS AS (1 + 1) STORED, aggregatetype kind, \"Payload\" text DEFAULT 'not this one');
         ALTER TABLE outbox DROP COLUMN dropped;
         CREATE TABLE uuids (LIKE outbox); ALTER TABLE uuids ALTER id TYPE uuid USING NULL;
         CREATE TABLE texts (LIKE outbox); ALTER TABLE texts ALTER id TYPE text;
         CREATE TABLE numbers (LIKE outbox); ALTER TABLE numbers ALTER id TYPE numeric;
         CREATE TABLE times (LIKE outbox); ALTER TABLE times ALTER id TYPE date USING NULL;",
    );
    let uuid = "cbe5a5b0-2e9a-4a0b-8f5e-6a3f1e3c9b11";
    let cases = [
        ("outbox", "9223372036854775807", "9223372036854775807"),
        ("outbox", "-1", "-1"),
        ("uuids", uuid, uuid),
        ("texts", "Order 17 / ä", "Order 17 / ä"),
        ("texts", "CBE5A5B0", "CBE5A5B0"),
        (
            "numbers",
            "12345678901234567890.50",
            "12345678901234567890.50",
        ),
        ("times", "2024-02-29", "2024-02-29"),
    ];
    for (number, (table, id, _)) in cases.iter().enumerate() {
        rig.pg.execute(&format!(
            "INSERT INTO {table} (note, payload, id, aggregatetype, aggregateid) VALUES ('x', '{{\"n\": {number}}}', '{id}', 'order line', {number})"
        ));
    }
    rig.drain(&[]);
    let seen: Vec<_> = rig
        .messages()
        .iter()
        .map(|m| (m.id().to_string(), m.subject.clone(), m.text().to_string()))
        .collect();
    let expected: Vec<_> = (0..)
        .zip(cases)
        .map(|(n, (_, _, id))| {
            (
                id.to_string(),
                format!("events.order%20line.{n}"),
                format!("{{\"n\":{n}}}"),
            )
        })
        .collect();
    assert_eq!(seen, expected);
}

#[test]
fn columns_may_be_added_dropped_and_moved_while_the_relay_runs() {
    let rig = Rig::start();
    let _relay = rig.relay(&[]);
    let change = |sql: &str, n: u32| {
        rig.pg.execute(&format!(
            "BEGIN; {sql}; INSERT INTO outbox (id, aggregatetype, aggregateid, payload) \
             VALUES ('00000000-0000-0000-0000-{n:012}', 'account', '{n}', '{{\"n\": {n}}}'); COMMIT"
        ));
    };
    change("SELECT 1", 1);
    change("ALTER TABLE outbox ADD COLUMN extra text DEFAULT 'x'", 2);
    change(
        "ALTER TABLE outbox DROP COLUMN payload; ALTER TABLE outbox ADD COLUMN payload json",
        3,
    );
    change("ALTER TABLE outbox DROP COLUMN extra", 4);
    change(
        "ALTER TABLE outbox RENAME TO renamed; ALTER TABLE renamed RENAME TO outbox",
        5,
    );
    rig.wait_for_messages(5);
    let bodies: Vec<_> = rig
        .messages()
        .iter()
        .map(|m| m.text().to_string())
        .collect();
    let expected: Vec<_> = (1..=5).map(|n| format!("{{\"n\":{n}}}")).collect();
    assert_eq!(bodies, expected);
}

/// A type, and a value of it that no other has. What Postgres prints of that is the id, a token of the subject and the body.
const TYPES: [(&str, &str); 35] = [
    ("mood", "'so so'"),
    ("letters", "'abc'"),
    ("key", "'cbe5a5b0-2e9a-4a0b-8f5e-6a3f1e3c9b11'"),
    ("nested", "'abcd'"),
    ("bytes", "'\\x0102'"),
    ("pair", "ROW(1, 'a b')"),
    ("pairs", "ARRAY[ROW(1, 'a')::pair]"),
    ("int[]", "'{1,NULL,3}'"),
    ("text[][]", "'{{a,\"b c\"},{\"\",d}}'"),
    ("mood[]", "'{sad,\"so so\"}'"),
    ("int4range", "'[1,5)'"),
    ("tstzrange", "'[2026-01-01 00:00:00+00,)'"),
    ("floats", "'[1.5,2.5]'"),
    ("smallint", "7"),
    ("real", "0.1"),
    ("numeric(10,2)", "12.5"),
    ("money", "12.5"),
    ("boolean", "true"),
    ("char(5)", "'ab'"),
    ("name", "'A b'"),
    ("\"char\"", "'x'"),
    ("bit varying", "B'0101'"),
    ("inet", "'10.0.0.1/8'"),
    ("macaddr", "'08:00:2b:01:02:03'"),
    ("timestamp", "'2026-01-02 03:04:05.678'"),
    ("time", "'03:04:05'"),
    ("interval", "'1 year 2 days'"),
    ("point", "'(1.5,2)'"),
    ("tsvector", "to_tsvector('simple', 'b a a')"),
    ("jsonpath", "'$.a[*]'"),
    ("pg_lsn", "'16/B374D848'"),
    ("regclass", "'pg_class'"),
    ("xml", "'<a b=\"c\">x</a>'"),
    ("citext", "'AbC'"),
    ("hstore", "'a=>1, b=>NULL'"),
];

/// Also where it is computed by the table, or Postgres knows the type by a number of its own.
#[test]
fn a_value_of_any_type_arrives_as_postgres_prints_it() {
    let rig = Rig::start_with_tables(
        "CREATE TYPE mood AS ENUM ('sad', 'so so'); CREATE DOMAIN letters AS text CHECK (VALUE ~ '^[a-z]+$');
         CREATE DOMAIN nested AS letters; CREATE DOMAIN key AS uuid; CREATE DOMAIN bytes AS bytea; CREATE TYPE pair AS (n int, t text);
         CREATE DOMAIN pairs AS pair[]; CREATE TYPE floats AS RANGE (subtype = float8)",
    );
    let mut client = rig.pg.client();
    let mut expected = Vec::new();
    for (number, (kind, value)) in TYPES.iter().enumerate() {
        let extension = ["citext", "hstore"].contains(kind);
        if extension && let Err(error) = client.batch_execute(&format!("CREATE EXTENSION {kind}")) {
            println!("skipped: {kind}: {error}");
            continue;
        }
        let table = format!("outbox_{number}");
        let statements = format!(
            "CREATE TABLE {table} (gone int, id {kind}, aggregatetype text, aggregateid {kind}, payload {kind}, \
             number int GENERATED ALWAYS AS IDENTITY); ALTER TABLE {table} DROP COLUMN gone; \
             INSERT INTO {table} SELECT v, '{number}', v, v FROM (SELECT ({value})::{kind} AS v) it"
        );
        if let Err(error) = client.batch_execute(&statements) {
            assert_eq!(
                error.code().map(|it| it.code()),
                Some("0A000"),
                "{kind}: {error:?}"
            );
            println!("skipped: {kind}: {error}");
            continue;
        }
        // by the output function, as a cast may say something else
        let sql = format!("SELECT format('%s', id) FROM {table}");
        let text: String = client.query_one(&sql, &[]).expect("its text").get(0);
        let mut token = text.replace('%', "%25");
        for (character, written) in [(' ', "%20"), ('*', "%2A"), ('>', "%3E")] {
            token = token.replace(character, written);
        }
        let subject = format!("events.{number}.{token}");
        // which a server trims
        let id = match text.strip_suffix(' ') {
            Some(begin) => begin.to_string() + "%20",
            None => text.clone(),
        };
        expected.push((id, subject, text));
    }
    rig.drain(&[]);
    let found = rig.messages().into_iter().map(|message| {
        let text = message.text().to_string();
        (message.id().to_string(), message.subject.clone(), text)
    });
    let found: Vec<_> = found.collect();
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.into_iter().zip(expected) {
        assert_eq!(found, expected);
    }
}
