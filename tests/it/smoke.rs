//! Proves the fixtures themselves: what they start answers, and what they break comes back.

use crate::support::nats::{Nats, NatsCluster};
use crate::support::natsclient::{NatsClient, StreamMessage};
use crate::support::oracle::{Event, Expected};
use crate::support::postgres::Postgres;
use crate::support::proxy::{Direction, Mode, Proxy};
use crate::support::relay::Relay;
use crate::support::wait::{eventually, secs};
use serde_json::json;
use std::io::ErrorKind;
use std::time::{Duration, Instant};

#[test]
fn committed_rows_come_out_of_the_slot_and_rolled_back_ones_do_not() {
    let pg = Postgres::start();
    pg.seed_setup();
    let insert = |id: u32| {
        format!(
            "INSERT INTO outbox VALUES ('00000000-0000-0000-0000-{id:012}', 'account', 'a', '{{}}');"
        )
    };
    pg.execute(&format!("BEGIN; {} ROLLBACK", insert(1)));
    pg.execute(&format!("BEGIN; {} DELETE FROM outbox; COMMIT", insert(2)));
    let changes = "SELECT count(*) FROM pg_logical_slot_peek_binary_changes('jetstream_outbox', NULL, NULL, \
                   'proto_version', '1', 'publication_names', 'jetstream_outbox') WHERE get_byte(data, 0) = ascii('I')";
    assert_eq!(pg.scalar::<i64>(changes), Some(1));
    assert!(!pg.slot_active("jetstream_outbox"));
    assert!(pg.confirmed_flush_lsn("jetstream_outbox") <= pg.current_wal_lsn());
}

#[test]
fn postgres_comes_back_after_each_way_of_ending() {
    let pg = Postgres::builder().setting("work_mem", "5MB").build();
    pg.execute("CREATE TABLE t (n int)");
    let ways = [
        ("fast", Postgres::stop_fast as fn(&Postgres)),
        ("immediate", Postgres::stop_immediate),
        ("killed", Postgres::kill),
    ];
    for (name, end) in ways {
        pg.execute("INSERT INTO t VALUES (1)");
        end(&pg);
        assert!(pg.try_client().is_err(), "{name}");
        pg.start_again();
    }
    assert_eq!(pg.scalar::<i64>("SELECT count(*) FROM t"), Some(3));
    assert_eq!(pg.scalar::<String>("SHOW work_mem").as_deref(), Some("5MB"));
}

#[test]
fn a_stream_reads_back_as_it_was_published() {
    let nats = Nats::start();
    let mut client = nats.client();
    client.add_seed_stream();
    assert!(client.read_all("jetstream_outbox").is_empty());
    let ack = client.publish("events.a.b", &[("Nats-Msg-Id", "1")], b"{}");
    assert_eq!(ack["seq"], 1);
    client.publish("events.a.c", &[], b"\r\nMSG \0");
    let messages = client.read_all("jetstream_outbox");
    let seen: Vec<_> = messages
        .iter()
        .map(|m| (m.seq, m.subject.as_str(), m.id(), m.body.as_slice()))
        .collect();
    assert_eq!(
        seen,
        [
            (1, "events.a.b", "1", b"{}".as_slice()),
            (2, "events.a.c", "", b"\r\nMSG \0")
        ]
    );
    assert_eq!(client.read_from("jetstream_outbox", 2), messages[1..]);
}

#[test]
fn a_cluster_replicates_and_survives_its_leader() {
    let cluster = NatsCluster::start();
    cluster.add_stream("s", &["e.>"]);
    let mut client = cluster.nodes[0].client();
    assert_eq!(client.publish("e.1", &[], b"1")["seq"], 1);
    let first = eventually("a leader", secs(20), || cluster.leader("s"));
    cluster.nodes[first].kill();
    let second = eventually("another leader", secs(30), || {
        cluster.leader("s").filter(|&leader| leader != first)
    });
    let mut client = cluster.nodes[second].client();
    let ack = eventually("the new leader to be reached", secs(20), || {
        client.try_publish("e.2", &[], b"2")
    });
    assert_eq!(ack["seq"], 2);
    cluster.nodes[first].start_again();
    // the API may be without a leader for a moment while the first one comes back, and a consumer on a node that lags
    eventually("both messages to be read", secs(30), || {
        let read = cluster.nodes[second].try_client()?.try_read_from("s", 1)?;
        match read.len() {
            2 => Ok(()),
            count => Err(std::io::Error::other(format!("{count} of 2 are read"))),
        }
    });
}

#[test]
fn an_earlier_store_can_be_put_back() {
    let nats = Nats::start();
    nats.client().add_seed_stream();
    nats.client().publish("events.1", &[], b"kept");
    nats.stop();
    let backup = nats.snapshot_store();
    nats.start_again();
    nats.client().publish("events.2", &[], b"lost");
    assert_eq!(nats.client().last_seq("jetstream_outbox"), 2);
    nats.kill();
    nats.restore_store(&backup);
    nats.start_again();
    assert_eq!(nats.client().last_seq("jetstream_outbox"), 1);
}

#[test]
fn a_frozen_server_is_silent_until_it_is_thawed() {
    let nats = Nats::builder()
        .config("authorization { user: u, password: p }")
        .client_options(json!({ "user": "u", "pass": "p" }))
        .build();
    let options = json!({ "user": "u", "pass": "p" });
    let mut client = NatsClient::try_connect_within(nats.port(), &options, secs(1));
    let client = client.as_mut().expect("it lets the user in");
    nats.freeze();
    // the signal may be on its way still
    let silence = || client.try_api("INFO", &json!(null)).err();
    let error = eventually("silence", secs(20), silence);
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    nats.thaw();
    eventually("an answer", secs(20), || {
        client.try_api("INFO", &json!(null))
    });
}

#[test]
fn a_large_stream_is_read_whole() {
    const COUNT: u64 = 200_000;
    let nats = Nats::start();
    let mut client = nats.client();
    client.add_seed_stream();
    client.fill("events.a", (1..=COUNT).map(|n| n.to_string().into()));
    let messages = client.read_all("jetstream_outbox");
    assert!(messages.iter().map(|m| m.seq).eq(1..=COUNT));
    assert!(messages.iter().all(|m| m.text() == m.seq.to_string()));
}

#[test]
fn the_proxy_does_each_fault() {
    let nats = Nats::start();
    let proxy = Proxy::start(nats.port());
    let connect = || NatsClient::try_connect_within(proxy.port(), &json!({}), secs(2));
    let ping = |client: &mut NatsClient| client.try_request("$JS.API.INFO", &[], b"");

    let mut client = connect().expect("it passes");
    ping(&mut client).expect("it passes");
    assert!(proxy.passed(Direction::ToClient) > 0);

    proxy.set(Mode::Delay(Duration::from_millis(100)));
    let start = Instant::now();
    ping(&mut client).expect("it is late");
    assert!(start.elapsed() >= Duration::from_millis(200), "both ways");

    proxy.set(Mode::Trickle(200));
    let start = Instant::now();
    ping(&mut client).expect("it is slow");
    assert!(
        start.elapsed() >= Duration::from_millis(500),
        "over 100 bytes"
    );

    for (silent, is_asked) in [
        (Mode::Freeze, false),
        (Mode::Swallow(Direction::ToServer), false),
        (Mode::Swallow(Direction::ToClient), true),
    ] {
        // a gap is for good: each has a connection that has none yet
        proxy.set(Mode::Pass);
        let mut client = connect().expect("a new one passes");
        proxy.set(silent);
        let before = proxy.passed(Direction::ToServer);
        let error = ping(&mut client).expect_err("no answer");
        assert_eq!(error.kind(), ErrorKind::WouldBlock, "{silent:?}");
        let passed = proxy.passed(Direction::ToServer) > before;
        assert_eq!(passed, is_asked, "{silent:?}");
        proxy.set(Mode::Pass);
        let after = ping(&mut client);
        if silent == Mode::Freeze {
            after.expect("nothing is lost");
        } else {
            let error = after.expect_err("what follows a gap does not pass");
            assert_eq!(error.kind(), ErrorKind::WouldBlock, "{silent:?}");
        }
    }

    let mut client = connect().expect("a new one passes");
    proxy.cut();
    let error = ping(&mut client).expect_err("it is cut");
    assert!(
        matches!(
            error.kind(),
            ErrorKind::UnexpectedEof | ErrorKind::BrokenPipe
        ),
        "{error:?}"
    );

    let mut client = connect().expect("a new one passes");
    proxy.set(Mode::Refuse);
    let error = client.try_next().expect_err("it is reset");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    connect().err().expect("refused");

    proxy.set(Mode::Pass);
    connect().expect("a new one passes");
}

#[test]
fn the_oracle_finds_what_is_wrong() {
    let event = |id: &str| Event::new(id, format!("events.{id}"), id.as_bytes());
    let mut expected = Expected::new();
    expected.commit(0, [event("a"), event("b")]);
    expected.uncertain(0, [event("c"), event("d")]);
    expected.commit(1, [event("e")]);
    assert_eq!(expected.committed(), 3);

    let check = |ids: &[&str]| {
        let messages: Vec<_> = ids
            .iter()
            .zip(1..)
            .map(|(id, seq)| StreamMessage {
                seq,
                time_ns: 0,
                // capitals stand for a wrong subject, a trailing ! for a wrong body
                subject: format!("events.{}", id.trim_end_matches('!')),
                headers: vec![(
                    "Nats-Msg-Id".into(),
                    id.to_lowercase().trim_end_matches('!').into(),
                )],
                body: id.to_lowercase().into(),
            })
            .collect();
        let report = expected.check(&messages);
        [
            report.missing.len(),
            report.unknown.len(),
            report.duplicates.len(),
            report.order_violations.len(),
            report.payload_mismatch.len(),
            report.subject_mismatch.len(),
        ]
    };
    for clean in [["a", "b", "e"].as_slice(), &["a", "e", "b", "c", "d"]] {
        assert_eq!(check(clean), [0; 6], "{clean:?}");
    }
    assert_eq!(check(&["a", "e"]), [1, 0, 0, 0, 0, 0]);
    assert_eq!(check(&["a", "b", "c", "e"]), [1, 0, 0, 0, 0, 0], "torn");
    assert_eq!(check(&["a", "b", "e", "x"]), [0, 1, 0, 0, 0, 0]);
    assert_eq!(check(&["a", "b", "a", "e"]), [0, 0, 1, 0, 0, 0]);
    assert_eq!(check(&["b", "a", "e"]), [0, 0, 0, 1, 0, 0]);
    assert_eq!(check(&["a!", "b", "e"]), [0, 0, 0, 0, 1, 0]);
    assert_eq!(check(&["A", "b", "e"]), [0, 0, 0, 0, 0, 1]);
}

#[test]
fn the_relay_says_its_version() {
    let mut relay = Relay::run(&["--version"], &[]);
    assert_eq!(relay.wait_exit(secs(10)), 0);
}
