use super::super::batch::Change;
use super::super::header;
use super::super::mapping::{HeaderColumn, NamedTable};
use super::super::plan::{BYTEA_OID, JSONB_OID};
use super::*;

const TABLE: u32 = 16_385;
const UUID_OID: u32 = 2950;
const TEXT_OID: u32 = 25;
const AT: Position = Position {
    commit_lsn: Lsn(0x16B3748),
    ordinal: 1,
};
const PLACE: Place = Place {
    position: AT,
    commit_time_us: 848_836_800_000_001,
    xid: 7,
    is_resolved: false,
};
const SEED: [&str; 4] = ["id", "aggregatetype", "aggregateid", "payload"];

/// The seed's table, its payload of type `payload_type`.
fn seed(payload_type: u32) -> [(&'static str, u32); 4] {
    [
        ("id", UUID_OID),
        ("aggregatetype", TEXT_OID),
        ("aggregateid", TEXT_OID),
        ("payload", payload_type),
    ]
}

fn describe(mapper: &mut Mapper, name: &str, columns: &[(&str, u32)]) -> Result<bool, MapError> {
    let columns = columns
        .iter()
        .map(|&(name, type_id)| ColumnInfo { name, type_id });
    mapper.relation(TABLE, "public", name, columns, AT.commit_lsn)?;
    Ok(mapper.plan(TABLE)?.is_some())
}

/// Subject, id and body of the event that a row of the table `outbox` with `columns` becomes.
fn map(columns: &[(&str, u32)], row: &[Value<'_>]) -> Result<(String, String, Vec<u8>), MapError> {
    let mut mapper = Mapper::new(&Mapping::new("events"));
    describe(&mut mapper, "outbox", columns)?;
    let mut batch = Batch::default();
    let pushed = mapper.insert(TABLE, row.iter().copied(), PLACE, &mut batch);
    if let Err(error) = pushed {
        assert_eq!((batch.len_bytes(), batch.is_empty()), (0, true));
        return Err(error);
    }
    assert_eq!(pushed, Ok(true));
    let [Change::Event(spans)] = batch.changes() else {
        panic!("not one event")
    };
    let event = batch.event(spans);
    assert_eq!((event.position, event.table), (AT, "public.outbox"));
    Ok((
        event.subject.to_string(),
        event.id.to_string(),
        event.body.to_vec(),
    ))
}

fn t(text: &str) -> Value<'_> {
    Value::Text(text.as_bytes())
}

fn name(schema: Option<&str>, name: &str) -> TableName {
    TableName {
        schema: schema.map(str::to_string),
        name: name.to_string(),
        and_longer: false,
    }
}

fn only(tables: &[TableName]) -> Mapping {
    let named = |table: &TableName| NamedTable {
        table: table.clone(),
        mapping: TableMapping::default(),
    };
    Mapping {
        tables: tables.iter().map(named).collect(),
        ..Mapping::new("events")
    }
}

#[test]
fn columns_are_found_by_name() {
    let expected = Ok((
        "events.account.a1".to_string(),
        "7".to_string(),
        b"{\"a\":1}".to_vec(),
    ));
    let [id, aggregatetype, aggregateid, payload] =
        [t("7"), t("account"), t("a1"), t("{\"a\": 1}")];
    assert_eq!(
        map(&seed(JSONB_OID), &[id, aggregatetype, aggregateid, payload]),
        expected
    );
    let other_order = [
        ("created", 1184),
        ("payload", JSON_OID),
        ("aggregateid", TEXT_OID),
        ("Id", 23),
        ("id", 20),
        ("aggregatetype", TEXT_OID),
        ("big", TEXT_OID),
    ];
    let row = [
        Value::Null,
        payload,
        aggregateid,
        t("1"),
        id,
        aggregatetype,
        Value::UnchangedToast,
    ];
    assert_eq!(map(&other_order, &row), expected);
}

#[test]
fn bodies() {
    for (payload_type, payload, expected) in [
        (
            JSONB_OID,
            t("{\"n\": 12345678901234567890.10}"),
            &b"{\"n\":12345678901234567890.10}"[..],
        ),
        (
            JSON_OID,
            t(" {\"b\":1, \"a\":2, \"b\":3} "),
            b"{\"b\":1,\"a\":2,\"b\":3}",
        ),
        (JSON_OID, Value::Null, b"null"),
        (JSONB_OID, Value::Null, b"null"),
        (JSONB_OID, t("null"), b"null"),
        (TEXT_OID, t(" { \"a\": 1 } "), b" { \"a\": 1 } "),
        (TEXT_OID, Value::Text(b"\xff"), b"\xff"),
        (TEXT_OID, t(""), b""),
        (TEXT_OID, Value::Null, b""),
        (BYTEA_OID, Value::Null, b""),
        (BYTEA_OID, t(r"\x"), b""),
        (BYTEA_OID, t(r"\x00ff5C0a"), b"\0\xff\\\n"),
        (BYTEA_OID, t(""), b""),
        (BYTEA_OID, t(r"a\\x\000\377 b"), b"a\\x\0\xff b"),
        (16_999, t(r"\x00"), br"\x00"),
    ] {
        let row = [t("1"), t("a"), t("b"), payload];
        assert_eq!(
            map(&seed(payload_type), &row).unwrap().2,
            expected,
            "{payload_type} {expected:?}"
        );
    }
}

#[test]
fn what_a_header_or_a_subject_cannot_carry_is_encoded() {
    let row = [t(" 1\r\n"), t("a b"), t(""), Value::Null];
    assert_eq!(
        map(&seed(TEXT_OID), &row),
        Ok(("events.a%20b.%".into(), "%201%0D%0A".into(), vec![]))
    );
}

#[test]
fn a_value_that_cannot_be_published_is_named() {
    use ValueProblem::*;
    let good = [t("1"), t("a"), t("b"), t("c")];
    let invalid = Value::Text(b"\xff");
    let toast = Value::UnchangedToast;
    let binary = Value::Binary(b"0123456789abcdef");
    for (index, value, payload_type, problem) in [
        (0, Value::Null, TEXT_OID, Null),
        (1, Value::Null, TEXT_OID, Null),
        (2, Value::Null, TEXT_OID, Null),
        (0, t(""), TEXT_OID, Empty),
        (0, toast, TEXT_OID, UnchangedToast),
        (2, toast, TEXT_OID, UnchangedToast),
        (3, toast, JSONB_OID, UnchangedToast),
        (0, binary, TEXT_OID, Binary),
        (3, binary, BYTEA_OID, Binary),
        (0, invalid, TEXT_OID, NotUtf8),
        (1, invalid, TEXT_OID, NotUtf8),
        (2, invalid, TEXT_OID, NotUtf8),
        (3, t(r"\x0"), BYTEA_OID, NotBytea),
        (3, t(r"\x0g"), BYTEA_OID, NotBytea),
        (3, t(r"\"), BYTEA_OID, NotBytea),
        (3, t(r"\400"), BYTEA_OID, NotBytea),
        (3, t(r"\08"), BYTEA_OID, NotBytea),
        (3, t(r"\080"), BYTEA_OID, NotBytea),
    ] {
        let mut row = good;
        row[index] = value;
        assert_eq!(
            map(&seed(payload_type), &row),
            Err(MapError::Value {
                source: EventSource::Row(name(Some("public"), "outbox")),
                id: (index != 0).then(|| "1".to_string()),
                part: format!("column {}", SEED[index]),
                problem,
                at: AT.commit_lsn
            }),
            "{index} {problem:?}"
        );
    }
}

#[test]
fn a_row_has_a_value_for_each_column() {
    let row = [t("1"), t("a"), t("b"), t("c"), t("d")];
    for len in [0, 3, 5] {
        assert_eq!(
            map(&seed(TEXT_OID), &row[..len]),
            Err(MapError::ValueCount {
                table: name(Some("public"), "outbox"),
                columns: 4,
                values: len,
                at: AT.commit_lsn
            })
        );
    }
}

#[test]
fn which_tables_are_outboxes() {
    let all = seed(JSONB_OID);
    let owned = |names: &[&str]| names.iter().map(ToString::to_string).collect();
    let missing = |columns: &[&str]| {
        Err(MapError::MissingColumns {
            table: name(Some("public"), "outbox"),
            columns: owned(columns),
            needed: owned(&SEED),
            at: AT.commit_lsn,
        })
    };
    let here = |schema| vec![name(None, "x"), name(schema, "outbox")];
    for (tables, columns, expected) in [
        (vec![], &all[..], Ok(true)),
        (vec![], &[("id", 23), ("payload", 25)], Ok(false)),
        (vec![], &[], Ok(false)),
        (vec![], &all[..3], missing(&["payload"])),
        (
            vec![],
            &all[1..2],
            missing(&["id", "aggregateid", "payload"]),
        ),
        (vec![], &all[2..], missing(&["id", "aggregatetype"])),
        (here(None), &all, Ok(true)),
        (here(Some("public")), &all, Ok(true)),
        (here(Some("Public")), &all, Ok(false)),
        (vec![name(None, "Outbox")], &all, Ok(false)),
        (vec![name(None, "other")], &all[..3], Ok(false)),
        (here(None), &[("id", 23)], missing(&SEED[1..])),
    ] {
        let mut mapper = Mapper::new(&only(&tables));
        assert_eq!(
            describe(&mut mapper, "outbox", columns),
            expected,
            "{tables:?} {columns:?}"
        );
        if expected == Ok(false) {
            let mut batch = Batch::default();
            let row = [Value::Null].into_iter();
            assert_eq!(mapper.insert(TABLE, row, PLACE, &mut batch), Ok(false));
            assert!(batch.is_empty());
        }
    }
}

#[test]
fn a_relation_described_again_is_looked_up_again() {
    let mut mapper = Mapper::new(&Mapping::new("events"));
    let mut batch = Batch::default();
    describe(&mut mapper, "outbox", &seed(JSONB_OID)).unwrap();
    let mut columns = seed(TEXT_OID);
    columns.reverse();
    describe(&mut mapper, "outbox", &columns).unwrap();
    let row = [t("{ }"), t("b"), t("a"), t("1")];
    assert_eq!(
        mapper.insert(TABLE, row.into_iter(), PLACE, &mut batch),
        Ok(true)
    );
    let [Change::Event(spans)] = batch.changes() else {
        panic!("not one event")
    };
    assert_eq!(batch.event(spans).subject, "events.a.b");
    assert_eq!(batch.event(spans).body, b"{ }");

    // an outbox that is none any more would lose events
    let renamed = describe(&mut mapper, "outbox", &[("id", 23)]);
    assert!(matches!(renamed, Err(MapError::MissingColumns { .. })));
}

#[test]
fn outboxes_of_one_shape_share_it() {
    let mut mapper = Mapper::new(&Mapping::new("events"));
    let columns = seed(JSONB_OID).map(|(name, type_id)| ColumnInfo { name, type_id });
    let mut other = columns;
    other.reverse();
    for (id, columns) in [(1, columns), (2, columns), (3, other), (4, columns)] {
        let name = format!("outbox_{id}");
        mapper
            .relation(id, "public", &name, columns.into_iter(), AT.commit_lsn)
            .unwrap();
    }
    let shape = |id| std::ptr::from_ref::<Shape>(mapper.plan(id).unwrap().unwrap());
    assert_eq!(shape(1), shape(2));
    assert!(shape(1) != shape(3) && shape(3) != shape(4));
    assert_eq!(mapper.plan(2).unwrap().unwrap().label, "public.outbox_2");
}

#[test]
fn an_outbox_that_is_renamed_out_of_the_named_ones_is_an_error() {
    let all = seed(TEXT_OID);
    for (tables, now, lost) in [
        (vec![], "letters", false),
        (vec![name(None, "outbox")], "outbox", false),
        (vec![name(None, "outbox")], "letters", true),
        (vec![name(Some("public"), "outbox")], "letters", true),
        (
            vec![name(None, "letters"), name(None, "outbox")],
            "letters",
            false,
        ),
    ] {
        let mut mapper = Mapper::new(&only(&tables));
        assert_eq!(describe(&mut mapper, "outbox", &all), Ok(true));
        let expected = match lost {
            false => Ok(true),
            true => Err(MapError::Renamed {
                was: Box::new(name(Some("public"), "outbox")),
                now: name(Some("public"), now),
                at: AT.commit_lsn,
            }),
        };
        assert_eq!(describe(&mut mapper, now, &all), expected, "{tables:?}");
        // what is no outbox at all may be called anything
        let mut mapper = Mapper::new(&only(&[name(None, "outbox")]));
        assert_eq!(describe(&mut mapper, "users", &all), Ok(false));
        assert_eq!(describe(&mut mapper, now, &all), Ok(now == "outbox"));
    }
    // another schema is another name
    let mut mapper = Mapper::new(&only(&[name(Some("public"), "outbox")]));
    describe(&mut mapper, "outbox", &all).unwrap();
    let columns = all.map(|(name, type_id)| ColumnInfo { name, type_id });
    let moved = mapper.relation(TABLE, "shop", "outbox", columns.into_iter(), AT.commit_lsn);
    let said = moved.unwrap_err().to_string();
    let begin = r#"map table "shop"."outbox" at 0/16B3748: it was "public"."outbox" before"#;
    assert!(
        said.starts_with(begin) && said.contains("name both"),
        "{said}"
    );
}

#[test]
fn a_relation_that_was_not_described_is_an_error() {
    let mapper = Mapper::new(&Mapping::new("events"));
    let unknown = MapError::UnknownRelation { relation_id: 9 };
    assert_eq!(mapper.plan(9).err(), Some(unknown.clone()));
    let row = std::iter::empty();
    assert_eq!(
        mapper.insert(9, row, PLACE, &mut Batch::default()),
        Err(unknown)
    );
}

#[test]
fn errors_name_table_column_and_place() {
    let row = [t("1"), t("a"), Value::Null, t("secret")];
    let error = map(&seed(TEXT_OID), &row).unwrap_err();
    assert!(
        error.to_string().starts_with(
            "map row of \"public\".\"outbox\" at 0/16B3748, id 1: column aggregateid is NULL; "
        ),
        "{error}"
    );
    let error = map(&seed(TEXT_OID)[..2], &row).unwrap_err();
    assert!(
        error.to_string().starts_with(
            "map table \"public\".\"outbox\" at 0/16B3748: it lacks aggregateid, payload; "
        ),
        "{error}"
    );
    assert_eq!(
        format!("{:?}", [t("secret"), Value::Null]),
        "[Text(6 bytes), Null]"
    );
}

/// What a row becomes, or a message for a `TABLE` of no columns: subject, id, headers and body as text; or why not.
fn event(
    mapping: &Mapping,
    columns: &[(&str, u32)],
    row: &[Value<'_>],
) -> Result<[String; 4], String> {
    event_at(mapping, columns, row, PLACE)
}

fn event_at(
    mapping: &Mapping,
    columns: &[(&str, u32)],
    row: &[Value<'_>],
    place: Place,
) -> Result<[String; 4], String> {
    let mut mapper = Mapper::new(mapping);
    describe(&mut mapper, "outbox", columns).map_err(|error| error.to_string())?;
    let mut batch = Batch::default();
    mapper
        .insert(TABLE, row.iter().copied(), place, &mut batch)
        .map_err(|error| format!("{error}, to be left behind at {:?}", error.behind()))?;
    Ok(written(&batch))
}

fn message(mapping: &Mapping, content: &[u8]) -> Result<[String; 4], String> {
    let mut batch = Batch::default();
    let mapper = Mapper::new(mapping);
    assert!(mapper.is_event_prefix(b"slot"));
    let taken = mapper.message(Value::Text(content), PLACE, &mut batch);
    taken.map_err(|error| error.to_string())?;
    Ok(written(&batch))
}

fn written(batch: &Batch) -> [String; 4] {
    let [Change::Event(spans)] = batch.changes() else {
        panic!("not one event")
    };
    let event = batch.event(spans);
    assert_eq!(event.position, AT);
    let body = String::from_utf8_lossy(event.body);
    [event.subject, event.id, event.headers, &body].map(str::to_string)
}

type Edit<'a> = &'a dyn Fn(&mut Mapping);

fn with(change: impl FnOnce(&mut Mapping)) -> Mapping {
    let mut mapping = Mapping::new("events");
    mapping.message_prefix = Some("slot".to_string());
    mapping.policy.park_subject = "slot.parked".to_string();
    change(&mut mapping);
    mapping
}

fn parts(subject: &str, id: &str, headers: &str, body: &str) -> Result<[String; 4], String> {
    Ok([subject, id, headers, body].map(str::to_string))
}

#[test]
fn columns_may_be_called_otherwise() {
    let mapping = with(|mapping| {
        let columns = &mut mapping.default;
        columns.id = "event_id".to_string();
        columns.aggregatetype = "Topic".to_string();
        columns.aggregateid = "key".to_string();
        columns.payload = "body".to_string();
        columns.subject = "{prefix}.{tenant:lower}.{aggregatetype}.{id}"
            .parse()
            .unwrap();
    });
    let columns = [
        ("body", TEXT_OID),
        ("tenant", TEXT_OID),
        ("event_id", 20),
        ("id", 20),
        ("Topic", TEXT_OID),
    ];
    let row = [t("b"), t("ACME"), t("7"), t("8"), t("order")];
    assert_eq!(
        event(&mapping, &columns, &row),
        parts("events.acme.order.7", "7", "", "b")
    );
    // the aggregate's id is not part of this subject, so it is not needed
    let error = event(&mapping, &columns[..3], &row[..3]).unwrap_err();
    assert!(error.contains("it lacks Topic; "), "{error}");
    assert!(
        error.contains("the columns event_id, tenant, Topic, body,"),
        "{error}"
    );
    // what only an outbox has tells one that is not whole
    assert_eq!(
        describe(
            &mut Mapper::new(&mapping),
            "other",
            &[("event_id", 20), ("body", 20)]
        ),
        Ok(false)
    );
    assert!(describe(&mut Mapper::new(&mapping), "other", &[("key", 20)]).is_err());
}

#[test]
fn tables_have_mappings_of_their_own() {
    let mut mapping = only(&[name(None, "x"), name(None, "out")]);
    mapping.tables[1].table.and_longer = true;
    mapping.tables[1].mapping.payload = "aggregateid".to_string();
    let row = [t("1"), t("a"), t("b"), t("c")];
    assert_eq!(
        event(&mapping, &seed(TEXT_OID), &row),
        parts("events.a.b", "1", "", "b")
    );
}

#[test]
fn headers_come_from_columns() {
    let columns = [
        ("id", 20),
        ("aggregatetype", TEXT_OID),
        ("aggregateid", TEXT_OID),
        ("payload", JSONB_OID),
        ("traceparent", TEXT_OID),
        ("headers", JSONB_OID),
        ("tenant", TEXT_OID),
        ("type", TEXT_OID),
    ];
    let row = |trace, headers, tenant, kind| {
        [
            t("1"),
            t("a"),
            t("b"),
            t("{ }"),
            trace,
            headers,
            tenant,
            kind,
        ]
    };
    let null = Value::Null;
    let tenant = |mapping: &mut Mapping| {
        mapping.default.headers = vec![HeaderColumn::parse("tenant=X-Tenant").unwrap()];
    };
    let cloud = |mapping: &mut Mapping| mapping.cloudevents = Some("/shop".to_string());
    let other = |mapping: &mut Mapping| mapping.default.headers_column = Some("tenant".into());
    let place = |mapping: &mut Mapping| mapping.position_headers = true;
    let ce = "\r\nce-specversion: 1.0\r\nce-id: 1\r\nce-source: /shop\r\nce-type: {}\r\n\
              ce-time: 2026-11-24T12:00:00.000001Z\r\nce-datacontenttype: application/json";
    let cases: [(Edit<'_>, _, &str); 9] = [
        (&|_| {}, row(null, null, null, null), ""),
        (
            &|_| {},
            row(
                t("00-1-2-01"),
                t(r#"{"a": 1, "TraceParent": 2}"#),
                t("x"),
                null,
            ),
            "\r\ntraceparent: 00-1-2-01\r\na: 1",
        ),
        (
            &tenant,
            row(null, null, t("é\n"), null),
            "\r\nX-Tenant: é%0A\r\nOutbox-Encoded: X-Tenant",
        ),
        (&tenant, row(null, null, null, null), ""),
        (
            &other,
            row(null, t(r#"{"a": 1}"#), t(r#"{"b": 2}"#), null),
            "\r\nb: 2",
        ),
        (
            &place,
            row(null, null, null, null),
            "\r\nOutbox-Commit-Time: 2026-11-24T12:00:00.000001Z\r\nOutbox-Transaction: 7",
        ),
        (
            &cloud,
            row(null, null, null, t("order placed")),
            &ce.replace("{}", "order%20placed"),
        ),
        (&cloud, row(null, null, null, null), &ce.replace("{}", "a")),
        (
            &cloud,
            row(null, t(r#"{"CE-ID": 1, "ce-x": "a b"}"#), null, null),
            &(ce.replace("{}", "a") + "\r\nce-x: a%20b"),
        ),
    ];
    for (change, row, headers) in cases {
        assert_eq!(
            event(&with(change), &columns, &row),
            parts("events.a.b", "1", headers, "{}")
        );
    }
    // a headers column of another type is just a column, unless it is named
    let mut columns = columns;
    columns[5].1 = TEXT_OID;
    let row = row(null, t("x"), null, null);
    assert_eq!(
        event(&with(|_| {}), &columns, &row),
        parts("events.a.b", "1", "", "{}")
    );
    let error = event(&with(tenant), &columns[..6], &row[..6]).unwrap_err();
    assert!(error.contains("it lacks tenant;"), "{error}");
    let error = event(&with(other), &columns[..6], &row[..6]).unwrap_err();
    assert!(error.contains("it lacks tenant;"), "{error}");
}

#[test]
fn what_cannot_be_published_is_stopped_at_parked_or_given_up() {
    let columns = [
        ("id", 20),
        ("aggregatetype", TEXT_OID),
        ("aggregateid", TEXT_OID),
        ("payload", JSONB_OID),
        ("headers", JSONB_OID),
    ];
    let poison = |mapping: &mut Mapping| mapping.policy.on_poison = OnPoison::Park;
    let subject = |mapping: &mut Mapping| mapping.policy.on_bad_subject = OnBad::Park;
    let header = |mapping: &mut Mapping| mapping.policy.on_bad_header = OnBad::Park;
    let good = [t("1"), t("a"), t("b"), t("{ }"), t("{}")];
    let changed = |index: usize, value| {
        let mut row = good;
        row[index] = value;
        row
    };
    let many = format!(r#"{{"x":"{}"}}"#, "x".repeat(header::MAX_LEN));
    let cases: [(Edit<'_>, _, [&str; 4]); 9] = [
        (
            &poison,
            changed(0, Value::Null),
            [
                "parked-0/16B3748-1",
                "column id is NULL",
                "events.a.b",
                "{}",
            ],
        ),
        (
            &poison,
            changed(0, t("")),
            [
                "parked-0/16B3748-1",
                "column id is empty, which JetStream takes for no id",
                "events.a.b",
                "{}",
            ],
        ),
        (
            &poison,
            changed(1, Value::Null),
            ["1", "column aggregatetype is NULL", "", "{}"],
        ),
        (
            &poison,
            changed(2, Value::Text(b"\xff")),
            ["1", "column aggregateid is not UTF-8", "", "{}"],
        ),
        (
            &poison,
            changed(4, t("[]")),
            ["1", "column headers is no JSON object", "events.a.b", "{}"],
        ),
        (
            &poison,
            changed(4, t(&many)),
            [
                "1",
                "its headers are more than the 60000 bytes of headers that an event may have",
                "events.a.b",
                "{}",
            ],
        ),
        (
            &subject,
            changed(2, t("b c")),
            [
                "1",
                "its subject cannot stand in a subject as it is",
                "events.a.b%20c",
                "{}",
            ],
        ),
        (
            &header,
            changed(4, t(r#"{"k": "\n"}"#)),
            [
                "1",
                "header \"k\" cannot stand in a header as it is",
                "events.a.b",
                "{}",
            ],
        ),
        (
            &header,
            changed(4, t(r#"{"nats-x": "y"}"#)),
            [
                "1",
                "header \"nats-x\" cannot stand in a header as it is",
                "events.a.b",
                "{}",
            ],
        ),
    ];
    for (index, (change, row, [id, cause, home, body])) in cases.into_iter().enumerate() {
        let [subject, parked_id, headers, parked_body] =
            event(&with(change), &columns, &row).unwrap();
        assert_eq!((subject.as_str(), parked_id.as_str()), ("slot.parked", id));
        let told = format!("\r\nOutbox-Parked: row of \"public\".\"outbox\": {cause}");
        let home = match home {
            "" => String::new(),
            home => format!("\r\nOutbox-Original-Subject: {home}"),
        };
        assert!(headers.ends_with(&(told + &home)), "{headers}");
        assert_eq!(parked_body, body);
        // as it came, it stops the relay, and nothing of the payload is told
        let stop = with(|mapping| {
            change(mapping);
            let policy = &mut mapping.policy;
            policy.on_poison = OnPoison::Stop;
            for bad in [&mut policy.on_bad_subject, &mut policy.on_bad_header] {
                *bad = if *bad == OnBad::Park {
                    OnBad::Stop
                } else {
                    OnBad::Encode
                };
            }
        });
        let error = event(&stop, &columns, &row).unwrap_err();
        assert!(
            error.contains(cause) && error.ends_with("at Some(0/16B3749)"),
            "{error}"
        );
        let lost = with(|mapping| mapping.policy.on_poison = OnPoison::Skip);
        if index < 6 {
            // its id is the one that it would be parked under
            assert_eq!(event(&lost, &columns, &row), parts("", id, "", ""));
            // and one that was resolved stops nothing, whatever the policy
            let resolved = Place {
                is_resolved: true,
                ..PLACE
            };
            assert_eq!(
                event_at(&stop, &columns, &row, resolved),
                parts("", id, "", "")
            );
        }
    }
    // what is not the writer's doing always stops the relay
    for policy in [OnPoison::Park, OnPoison::Skip] {
        let mapping = with(|mapping| mapping.policy.on_poison = policy);
        for (index, value) in [(0, Value::Binary(b"x")), (3, Value::Binary(b"x"))] {
            let error = event(&mapping, &columns, &changed(index, value)).unwrap_err();
            assert!(error.ends_with("at None"), "{error}");
        }
    }
}

#[test]
fn messages_are_events_without_a_table() {
    let id = r#""id":"7","aggregatetype":"a","aggregateid":"b""#;
    let tenant = with(|mapping| {
        mapping.default.id = "event_id".to_string();
        mapping.default.subject = "{prefix}.{tenant}.{aggregateid}".parse().unwrap();
        mapping.default.headers = vec![HeaderColumn::parse("tenant=X").unwrap()];
    });
    for (mapping, content, expected) in [
        (
            with(|_| {}),
            format!(r#"{{{id},"payload":{{"z": 1.0, "a": 12345678901234567890}} }}"#),
            parts(
                "events.a.b",
                "7",
                "",
                r#"{"z":1.0,"a":12345678901234567890}"#,
            ),
        ),
        (
            with(|_| {}),
            format!("{{{id}}}"),
            parts("events.a.b", "7", "", "null"),
        ),
        (
            with(|_| {}),
            format!(r#"{{{id},"headers":{{"k": [1, "x"]}},"payload":"text","traceparent":"00"}}"#),
            parts(
                "events.a.b",
                "7",
                "\r\ntraceparent: 00\r\nk: 1\r\nk: x",
                "\"text\"",
            ),
        ),
        (
            tenant,
            format!(r#"{{{id},"tenant":"\u00e9","event_id":"9"}}"#),
            parts("events.é.b", "7", "\r\nX: é", "null"),
        ),
    ] {
        assert_eq!(message(&mapping, content.as_bytes()), expected, "{content}");
    }
    let mapper = Mapper::new(&with(|mapping| mapping.message_prefix = None));
    assert!(!mapper.is_event_prefix(b"slot"));
    let mapper = Mapper::new(&with(|_| {}));
    assert!(!mapper.is_event_prefix(b"other") && !mapper.is_event_prefix(b"slo\x81"));
}

#[test]
fn what_is_cut_is_parked_with_its_beginning_and_its_length() {
    let park = with(|mapping| mapping.policy.on_poison = OnPoison::Park);
    let stop = with(|_| {});
    let cut = |kept: &'static str| Value::Cut {
        kept: kept.as_bytes(),
        len: 9_999_999,
    };
    let too_large =
        "makes the event larger than the relay takes: 4 times the max_payload of the NATS server";
    let row = "\r\nOutbox-Parked: row of \"public\".\"outbox\": column";
    let original = "\r\nOutbox-Original-Subject: events.a.b";
    let length = "\r\nOutbox-Body-Cut: 9999999";
    for (payload_type, row_values, parked) in [
        (
            JSONB_OID,
            [t("7"), t("a"), t("b"), cut("{\"x\": 1")],
            [
                "slot.parked",
                "7",
                &format!("{row} payload {too_large}{original}{length}"),
                "{\"x\":1",
            ],
        ),
        (
            BYTEA_OID,
            [t("7"), t("a"), t("b"), cut(r"\x4142")],
            [
                "slot.parked",
                "7",
                &format!("{row} payload {too_large}{original}{length}"),
                "AB",
            ],
        ),
        (
            TEXT_OID,
            [cut("7"), t("a"), t("b"), t("whole")],
            [
                "slot.parked",
                "parked-0/16B3748-1",
                &format!("{row} id {too_large}{original}"),
                "whole",
            ],
        ),
    ] {
        let columns = seed(payload_type);
        let found = event(&park, &columns, &row_values);
        assert_eq!(found, Ok(parked.map(str::to_string)));
        let stopped = event(&stop, &columns, &row_values).unwrap_err();
        assert!(
            stopped.contains(too_large) && stopped.contains("0/16B3749"),
            "{stopped}"
        );
    }
    let mut batch = Batch::default();
    let content = cut("{\"id\":");
    Mapper::new(&park)
        .message(content, PLACE, &mut batch)
        .unwrap();
    let [subject, _, headers, body] = written(&batch);
    assert_eq!(
        (subject.as_str(), body.as_str()),
        ("slot.parked", "{\"id\":")
    );
    assert!(
        headers.contains(too_large) && headers.ends_with(length),
        "{headers}"
    );
}

/// The event of a row in a database of this encoding.
fn encoded(encoding: &str, payload_type: u32, row: [&'static [u8]; 4]) -> [String; 4] {
    let park = with(|mapping| mapping.policy.on_poison = OnPoison::Park);
    let mut mapper = Mapper::new(&park);
    mapper.set_encoding(Encoding::of_database(encoding).unwrap());
    describe(&mut mapper, "outbox", &seed(payload_type)).unwrap();
    let mut batch = Batch::default();
    let values = row.map(Value::Text);
    mapper
        .insert(TABLE, values.into_iter(), PLACE, &mut batch)
        .unwrap();
    written(&batch)
}

#[test]
fn a_row_is_read_in_the_encoding_of_its_database() {
    let body = |encoding, payload_type, payload| {
        let [subject, _, headers, body] =
            encoded(encoding, payload_type, [b"1", b"a", b"b", payload]);
        (subject == "slot.parked", headers, body)
    };
    let good = |text: &str| (false, String::new(), text.to_string());
    assert_eq!(body("WIN1252", JSON_OID, b"\"\x80\""), good("\"€\""));
    assert_eq!(body("WIN1251", TEXT_OID, b"\xcf\xf0"), good("Пр"));
    assert_eq!(
        body("SQL_ASCII", JSON_OID, "\"€\"".as_bytes()),
        good("\"€\"")
    );
    // whose bytes nobody explains, and which need not be text
    assert_eq!(body("SQL_ASCII", TEXT_OID, b"\x80"), good("\u{fffd}"));
    let (parked, headers, text) = body("SQL_ASCII", JSON_OID, b"\"\x80\"");
    assert!(parked && headers.contains("column payload has a byte without an equivalent"));
    assert_eq!(text, "\"\u{fffd}\"");
    assert!(body("WIN1252", TEXT_OID, b"\x81").0);
    let [subject, id, headers, body] =
        encoded("WIN1252", JSON_OID, [b"1", b"a", b"caf\x81", b"{}"]);
    assert_eq!([subject, id, body], ["slot.parked", "1", "{}"]);
    assert!(
        headers.contains("column aggregateid has a byte"),
        "{headers}"
    );
    let [subject, ..] = encoded("WIN1252", JSON_OID, [b"1", b"a", b"caf\xe9", b"{}"]);
    assert_eq!(subject, "events.a.café");
}

#[test]
fn a_message_that_is_no_event_is_poison() {
    let park = with(|mapping| mapping.policy.on_poison = OnPoison::Park);
    for (content, cause) in [
        (&b"{"[..], "its content is no JSON object in UTF-8"),
        (b"\xff", "its content is no JSON object in UTF-8"),
        (b"[1]", "its content is no JSON object in UTF-8"),
        (
            br#"{"aggregatetype":"a","aggregateid":"b"}"#,
            "member id is NULL",
        ),
        (
            br#"{"id":1,"aggregatetype":null,"aggregateid":"b"}"#,
            "member aggregatetype is NULL",
        ),
        (
            br#"{"id":1,"aggregatetype":"a","aggregateid":"b","headers":[]}"#,
            "member headers is no JSON object",
        ),
    ] {
        let error = message(&with(|_| {}), content).unwrap_err();
        let begin = "map message \"slot\" at 0/16B3748";
        assert!(error.starts_with(begin), "{error}");
        assert!(error.contains(&format!(": {cause}; ")), "{error}");
        let [subject, _, headers, body] = message(&park, content).unwrap();
        assert_eq!(subject, "slot.parked");
        assert!(headers.contains(cause), "{headers}");
        let whole = String::from_utf8_lossy(content);
        assert!(body == whole || body == "null", "{body}");
    }
}
