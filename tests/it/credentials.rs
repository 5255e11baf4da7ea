//! What signs in to NATS is read anew at each connect: it can be replaced while the relay runs.

use crate::rig::{DEADLINE, Rig};
use crate::support::nats::Nats;
use crate::support::operator::Operator;
use crate::support::postgres::Postgres;
use nkeys::KeyPair;
use serde_json::json;
use std::fs;

/// The user that the server lets in beside the test's own.
fn users(key: &KeyPair) -> String {
    format!(
        "authorization {{ users: [ {{ user: test, password: test }}, {{ nkey: {} }} ] }}\n",
        key.public_key()
    )
}

#[test]
fn a_key_that_is_replaced_signs_in_at_the_next_connect() {
    let (old, new) = (KeyPair::new_user(), KeyPair::new_user());
    let seed = |key: &KeyPair| key.seed().expect("a pair that was made has its seed");
    let rig = Rig {
        pg: Postgres::start(),
        nats: Nats::builder()
            .config("include users")
            .file("users", users(&old))
            .file("seed", seed(&old))
            .client_options(json!({ "user": "test", "pass": "test" }))
            .build(),
    };
    rig.pg.seed_setup();
    rig.nats.client().add_seed_stream();
    let file = rig.nats.dir().join("seed");
    let mut relay = rig.relay(&["-nats-nkey", file.to_str().expect("a path of ours")]);
    rig.commit_event(1, "a");
    rig.wait_for_messages(1);

    rig.nats.stop();
    fs::write(rig.nats.dir().join("users"), users(&new)).expect("write the users");
    rig.nats.start_again();
    // the one that it has is good no more
    relay.wait_for_log("sign in to NATS", DEADLINE);
    fs::write(file, seed(&new)).expect("write the seed");
    rig.commit_event(2, "a");
    rig.wait_for_messages(2);
    relay.term();
    assert_eq!(relay.wait_exit(DEADLINE), 0);
}

/// The server ends the connection of a user that is revoked; the file is read again at each connect.
#[test]
fn revoked_credentials_are_named_and_renewed_ones_are_found() {
    let mut operator =
        Operator::new(r#","mem_storage":-1,"disk_storage":-1,"streams":-1,"consumer":-1"#);
    let rig = Rig {
        pg: Postgres::start(),
        nats: Nats::builder()
            .config("include operator")
            .file("operator", operator.config())
            .file("creds", operator.credentials(""))
            .client_options(json!({ "jwt": operator.bearer() }))
            .build(),
    };
    rig.pg.seed_setup();
    rig.nats.client().add_seed_stream();
    let file = rig.nats.dir().join("creds");
    let mut relay = rig.relay(&["-creds", file.to_str().expect("a path of ours")]);
    rig.commit_event(1, "a");
    rig.wait_for_messages(1);

    operator.revoke_before(1_650_000_000);
    fs::write(rig.nats.dir().join("operator"), operator.config()).expect("write the tokens");
    rig.nats.reload();
    relay.wait_for_log("sign in to NATS", DEADLINE);
    rig.commit_event(2, "a");
    let renewed = operator.credentials(r#""iat":1700000000,"#);
    fs::write(file, renewed).expect("write the credentials");
    relay.wait_for_log("connected to NATS again", DEADLINE);
    relay.term();
    assert_eq!(relay.wait_exit(DEADLINE), 0);
}
