//! Passwords and tokens never reach the log, whatever happens to the connection.

use crate::observe::{address, get, wait_for_readiness};
use crate::rig::{DEADLINE, SLOT, STREAM, uuid};
use crate::support::nats::Nats;
use crate::support::postgres::Postgres;
use crate::support::relay::Relay;
use crate::support::wait::eventually;
use serde_json::json;

const PG_SECRET: &str = "pg-Gehe1mnis";
const NATS_SECRET: &str = "nats-Gehe1mnis";

/// Runs the relay until it ends; the log must hold neither secret.
#[track_caller]
fn check(args: &[&str], env: &[(&str, &str)], code: i32, last_says: &str) -> Vec<String> {
    let mut relay = Relay::run(&[&["--drain", "--logging", "debug"], args].concat(), env);
    let found = relay.wait_exit(DEADLINE);
    let log = relay.log();
    let all = log.join("\n");
    assert_eq!(found, code, "{all}");
    assert!(!all.contains("Gehe1mnis"), "{all}");
    let last = log.last().expect("a line");
    assert!(last.contains(last_says), "{last_says:?} is not in {last}");
    log
}

#[test]
fn no_secret_is_logged_whether_it_is_right_or_wrong() {
    let pg = Postgres::builder()
        .hba("host all,replication relay 127.0.0.1/32 scram-sha-256")
        .build();
    pg.seed_setup();
    pg.execute(&format!(
        "CREATE ROLE relay LOGIN REPLICATION PASSWORD '{PG_SECRET}'"
    ));
    let nats = Nats::builder()
        .config(&format!("authorization {{ token: \"{NATS_SECRET}\" }}"))
        .client_options(json!({ "auth_token": NATS_SECRET }))
        .build();
    nats.client().add_seed_stream();
    pg.execute(&format!(
        "INSERT INTO outbox VALUES ('{}', 'account', 'a', '{{\"secret\": \"{PG_SECRET}\"}}')",
        uuid(1)
    ));

    let (pg_at, nats_at) = (
        format!("127.0.0.1:{}", pg.port()),
        format!("127.0.0.1:{}", nats.port()),
    );
    let db = |password: &str| format!("postgres://relay:{password}@{pg_at}/postgres");
    let pairs = format!(
        "host=127.0.0.1 port={} user=relay password={PG_SECRET} dbname=postgres",
        pg.port()
    );
    let servers = |token: &str| format!("nats://{token}@{nats_at}");
    let (good_db, good_nats) = (db(PG_SECRET), servers(NATS_SECRET));
    let wrong_db = db("another-Gehe1mnis");
    let wrong_nats = servers("another-Gehe1mnis");
    let dead_db = format!("postgres://relay:{PG_SECRET}@127.0.0.1:1/postgres");
    let dead_nats = format!("nats://user:{NATS_SECRET}@127.0.0.1:1");
    let unknown = format!("{good_db}?paswort={PG_SECRET}");
    let bare = format!("postgres://relay@{pg_at}/postgres");
    let give_up = ["--max-outage", "1s"];

    let log = check(&["-db", &good_db, "-nats", &good_nats], &[], 0, "stopped");
    let warned = log
        .iter()
        .filter(|line| line.contains("can be read by every user"))
        .count();
    assert_eq!(warned, 2, "{log:?}");
    check(&["-db", &pairs, "-nats", &good_nats], &[], 0, "stopped");
    let env = [
        ("JETSTREAM_OUTBOX_DB", bare.as_str()),
        ("PGPASSWORD", PG_SECRET),
        ("JETSTREAM_OUTBOX_NATS", good_nats.as_str()),
    ];
    let log = check(&[], &env, 0, "stopped");
    assert!(
        !log.iter()
            .any(|line| line.contains("level=warn") && line.contains("secret")),
        "{log:?}"
    );

    check(
        &["-db", &wrong_db, "-nats", &good_nats],
        &[],
        78,
        "password",
    );
    let args = [&["-db", &dead_db, "-nats", &good_nats], &give_up[..]].concat();
    check(&args, &[], 69, "127.0.0.1:1");
    let args = [&["-db", &good_db, "-nats", &wrong_nats], &give_up[..]].concat();
    check(&args, &[], 69, "sign in to NATS");
    let args = [&["-db", &good_db, "-nats", &dead_nats], &give_up[..]].concat();
    check(&args, &[], 69, "127.0.0.1:1");
    check(&["-db", &unknown, "-nats", &good_nats], &[], 64, "-db");

    // nor does the status page show one
    let relay = Relay::run(&["-db", &good_db, "-nats", &good_nats, "-listen", "0"], &[]);
    let at = address(&relay);
    wait_for_readiness(&at, 200, "relaying");
    for path in ["/", "/status", "/metrics", "/readyz"] {
        let (_, text) = get(&at, path);
        assert!(!text.contains("Gehe1mnis"), "{path}: {text}");
    }
    relay.kill();

    assert_eq!(nats.client().message_count(STREAM), 1);
    eventually("the slot to be free", DEADLINE, || !pg.slot_active(SLOT));
}
