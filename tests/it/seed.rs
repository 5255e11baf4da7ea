//! The example of the README of the program that is replaced, to the letter.

use crate::rig::{DEADLINE, Rig, STREAM};

#[test]
fn the_seeds_example_arrives_as_its_readme_prints_it() {
    let rig = Rig::start();
    let db = format!(
        "postgres://postgres@localhost:{}/postgres?replication=database",
        rig.pg.port()
    );
    let nats = format!("localhost:{}", rig.nats.port());
    let ids = [
        "b3a6cb58-8a0f-4f19-8a0d-c9a1f7a1d3c1",
        "b3a6cb58-8a0f-4f19-8a0d-c9a1f7a1d3c2",
        "b3a6cb58-8a0f-4f19-8a0d-c9a1f7a1d3c3",
    ];
    let spellings: [Vec<String>; 3] = [
        vec!["-db".into(), db.clone(), "-nats".into(), nats.clone()],
        vec!["--db".into(), db.clone(), "--nats".into(), nats.clone()],
        vec![format!("-db={db}"), format!("-nats={nats}")],
    ];
    for (index, (id, args)) in ids.into_iter().zip(spellings).enumerate() {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let mut relay = crate::support::relay::Relay::run(&args, &[]);
        rig.pg.execute(&format!(
            "BEGIN;
             INSERT INTO outbox (id, aggregatetype, aggregateid, payload)
             VALUES ('{id}', 'account', 'account_id_1', '{{\"msg\": \"A test account creation event\"}}');
             DELETE FROM outbox WHERE id = '{id}';
             COMMIT;"
        ));
        rig.wait_for_messages(index as u64 + 1);
        relay.term();
        assert_eq!(relay.wait_exit(DEADLINE), 0, "{args:?}");
    }
    let seen: Vec<_> = rig.messages();
    assert_eq!(seen.len(), ids.len());
    for (message, id) in seen.iter().zip(ids) {
        assert_eq!(message.subject, "events.account.account_id_1");
        assert_eq!(message.id(), id);
        assert_eq!(message.text(), r#"{"msg":"A test account creation event"}"#);
    }
    assert_eq!(
        rig.pg.scalar::<i64>("SELECT count(*) FROM outbox"),
        Some(0),
        "the table stays empty"
    );
    assert_eq!(rig.nats.client().last_seq(STREAM), 3);
}
