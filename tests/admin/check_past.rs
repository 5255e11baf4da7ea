//! `check` beside a relay that runs: what it finds is not to depend on what that one does meanwhile.

use crate::command::run;
use crate::rig::{DEADLINE, Rig};
use crate::support::proxy::{Mode, Proxy};
use crate::support::wait::eventually;
use std::thread;

/// `check` decodes a copy of the slot to find the last resolved event. When a relay tells Postgres of that event in between, the
/// copy begins behind it.
#[test]
fn a_relay_that_confirms_while_check_looks_is_no_other_history() {
    let rig = Rig::start();
    let mut relay = rig.relay(&["-hold-back", "1h"]);
    for number in 1..=5 {
        rig.commit_event(number, "a");
    }
    rig.wait_for_messages(5);
    relay.term();
    assert_eq!(relay.wait_exit(DEADLINE), 0);
    let proxy = Proxy::start(rig.pg.port());
    proxy.set(Mode::FreezeAt("'outbox_check_"));
    let db = format!("postgres://postgres@127.0.0.1:{}/postgres", proxy.port());
    let nats = rig.nats.url();
    let args = ["check", "-json", "-db", &db, "-nats", &nats];
    let found = thread::scope(|scope| {
        let checking = scope.spawn(|| run(&args, &[]));
        eventually("a copy of the slot", DEADLINE, || match proxy.mode() {
            Mode::Freeze => Ok(()),
            mode => Err(mode),
        });
        rig.drain(&["-hold-back", "0"]);
        proxy.set(Mode::Pass);
        checking.join().expect("check ends")
    });
    assert!(found.stdout.contains("both.wal"), "{}", found.stdout);
    assert!(!found.stdout.contains("\"fail\""), "{}", found.stdout);
}

/// Neither are other flags, which may make no event of the last one.
#[test]
fn flags_that_were_changed_are_no_other_history() {
    let rig = Rig::start();
    let event = r#"{"id":"1","aggregatetype":"t","aggregateid":"a"}"#;
    let emit = format!("SELECT pg_logical_emit_message(true, 'jetstream_outbox', '{event}')");
    rig.pg.execute(&emit);
    rig.drain(&[]);
    let (db, nats) = (rig.pg.url("postgres", "postgres"), rig.nats.url());
    for flags in [
        &["-no-messages"][..],
        &["-message-prefix=x"],
        &["-id-column=aggregateid"],
    ] {
        let found = run(
            &[&["check", "-json", "-db", &db, "-nats", &nats], flags].concat(),
            &[],
        );
        assert!(found.stdout.contains("both.wal"), "{}", found.stdout);
        assert!(
            !found.stdout.contains("\"fail\""),
            "{flags:?}: {}",
            found.stdout
        );
    }
}
