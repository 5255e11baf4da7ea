//! Bits that flip and files that are cut short in nats-server's store while the server is down.
//!
//! An event that was not confirmed to Postgres must never be missing while the relay goes on without a word: it is there, it is
//! published again, or the relay halts, or waits. What was confirmed, and what a server then loses of it, is beyond the relay;
//! what is noticed of that, by whom, is printed, and the table of the manual's chapter Guarantees has it.

use crate::rig::number;
use crate::support::command;
use crate::support::nats::{Nats, NatsCluster};
use crate::support::natsclient::NatsClient;
use crate::support::postgres::Postgres;
use crate::support::relay::Relay;
use crate::support::wait::{eventually, pause, poll, secs};
use fastrand::Rng;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

const NAME: &str = "jetstream_outbox";
const BUCKET: &str = "KV_jetstream_outbox";

/// Nothing is confirmed before this.
const HOLD_BACK: Duration = secs(4);
const DEADLINE: Duration = secs(60);

/// How long a damaged server may take to start; some never do.
const STARTS: Duration = secs(15);

/// How long a relay may take to say that it cannot go on.
const DECIDES: Duration = secs(15);

/// Events that are confirmed before the damage, stored and not confirmed, and committed after it: two blocks of 8 MB.
const OLD: u32 = 2_000;
const YOUNG: u32 = 500;
const NEW: u32 = 100;

/// What is damaged; files are in the order of their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    FirstBlock,
    LastBlock,
    Index,
    IndexAndLastBlock,
    Meta,
    MetaSum,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Damage {
    BitFlipped,
    Halved,
    TailCut,
    Removed,
}

#[derive(Clone, Copy, Debug)]
struct Case {
    stream: &'static str,
    target: Target,
    damage: Damage,
    /// The server was killed before, and has not written its state.
    killed: bool,
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for killed in [false, true] {
        for target in [
            Target::FirstBlock,
            Target::LastBlock,
            Target::Index,
            Target::IndexAndLastBlock,
            Target::Meta,
            Target::MetaSum,
        ] {
            for damage in [
                Damage::BitFlipped,
                Damage::Halved,
                Damage::TailCut,
                Damage::Removed,
            ] {
                for stream in [NAME, BUCKET] {
                    cases.push(Case {
                        stream,
                        target,
                        damage,
                        killed,
                    });
                }
            }
        }
    }
    // what hits the bucket is the same for its blocks
    cases.retain(|case| case.stream == NAME || case.target != Target::FirstBlock);
    cases
}

/// The files of a store that a case is about, as far as they are there.
fn files(store: &Path, case: Case) -> Vec<PathBuf> {
    let folder = store.join("jetstream/$G/streams").join(case.stream);
    let messages = folder.join("msgs");
    let mut blocks: Vec<(u64, PathBuf)> = fs::read_dir(&messages)
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let number = path.file_name()?.to_str()?.strip_suffix(".blk")?;
            Some((number.parse().ok()?, path))
        })
        .collect();
    blocks.sort();
    let first = blocks.first().map(|(_, path)| path.clone());
    let last = blocks.last().map(|(_, path)| path.clone());
    let index = Some(messages.join("index.db"));
    let chosen = match case.target {
        Target::FirstBlock => vec![first],
        Target::LastBlock => vec![last],
        Target::Index => vec![index],
        Target::IndexAndLastBlock => vec![index, last],
        Target::Meta => vec![Some(folder.join("meta.inf"))],
        Target::MetaSum => vec![Some(folder.join("meta.sum"))],
    };
    let chosen = chosen.into_iter().flatten();
    chosen.filter(|path| path.exists()).collect()
}

/// Damages a file of a server that is down, at a place that a seed says.
fn hurt(path: &Path, damage: Damage, random: &mut Rng) {
    let mut bytes = fs::read(path).expect("read a file of the store");
    let size = bytes.len();
    match damage {
        Damage::BitFlipped if size > 0 => bytes[random.usize(0..size)] ^= 1 << random.u32(0..8),
        Damage::BitFlipped => {}
        Damage::Halved => bytes.truncate(size / 2),
        Damage::TailCut => bytes.truncate(size.saturating_sub(random.usize(1..200))),
        Damage::Removed => return fs::remove_file(path).expect("remove a file of the store"),
    }
    fs::write(path, bytes).expect("write a file of the store");
}

fn id(number: u32) -> String {
    format!("00000000-0000-0000-0000-{number:012}")
}

/// Commits these events, ten a transaction.
fn commit(pg: &Postgres, numbers: std::ops::Range<u32>) {
    let mut client = pg.client();
    for from in numbers.clone().step_by(10) {
        let to = numbers.end.min(from + 10) - 1;
        let sql = format!(
            "INSERT INTO outbox SELECT ('00000000-0000-0000-0000-' || lpad(n::text, 12, '0'))::uuid, 'order', n, \
             jsonb_build_object('pad', repeat('x', 6000)) FROM generate_series({from}, {to}) n"
        );
        client.batch_execute(&sql).expect("Postgres is up");
    }
}

/// One service, before the damage.
struct Before {
    pg: Postgres,
    /// Which events Postgres was told of.
    told: u32,
}

fn hold_back() -> [String; 2] {
    ["-hold-back".into(), format!("{}ms", HOLD_BACK.as_millis())]
}

fn relay(pg: &Postgres, ports: &[u16]) -> Relay {
    let db = format!("postgres://postgres@127.0.0.1:{}/postgres", pg.port());
    let servers: Vec<String> = ports
        .iter()
        .map(|port| format!("127.0.0.1:{port}"))
        .collect();
    let servers = servers.join(",");
    let [flag, value] = hold_back();
    Relay::run(&["-db", &db, "-nats", &servers, &flag, &value], &[])
}

/// Old events are stored and confirmed, young ones are stored, and no relay runs.
fn prepare(ports: &[u16], client: &mut NatsClient, replicas: u32) -> Before {
    let pg = Postgres::start();
    pg.seed_setup();
    client.add_stream_with(json!({
        "name": NAME, "subjects": ["events.>"], "num_replicas": replicas,
    }));
    let relay = relay(&pg, ports);
    commit(&pg, 0..OLD);
    let end = pg.current_wal_lsn();
    eventually("the old events to be confirmed", DEADLINE, || {
        pg.confirmed_flush_lsn(NAME) >= end
    });
    commit(&pg, OLD..OLD + YOUNG);
    eventually("the young events to be stored", DEADLINE, || {
        client.message_count(NAME) >= u64::from(OLD + YOUNG)
    });
    relay.kill();
    let told = if pg.confirmed_flush_lsn(NAME) < pg.current_wal_lsn() {
        OLD
    } else {
        OLD + YOUNG
    };
    Before { pg, told }
}

/// What became of it.
#[derive(Debug, Default)]
struct Outcome {
    /// Confirmed events that are missing, and others.
    old_missing: u32,
    young_missing: u32,
    twice: u32,
    /// The relay ended by itself; its code.
    halted: Option<i32>,
    /// What its last line says, or a warning about the stream.
    said: String,
    check: i32,
    check_said: String,
    /// What a consumer gets, and what a message that cannot be read is answered with.
    consumed: String,
    unreadable: String,
    /// What the stream says of itself: `lost` and the number of deleted messages.
    info: String,
}

/// Runs the relay after the damage, and looks.
fn observe(before: &Before, ports: &[u16], client: &mut dyn FnMut() -> NatsClient) -> Outcome {
    let Before { pg, told, .. } = before;
    let mut outcome = Outcome::default();
    let mut relay = relay(pg, ports);
    let all = OLD + YOUNG + NEW;
    commit(pg, OLD + YOUNG..all);
    let done = poll(DECIDES, || {
        let ended = !relay.is_running();
        let last = client().try_api(
            &format!("STREAM.MSG.GET.{NAME}"),
            &json!({ "last_by_subj": format!("events.order.{}", all - 1) }),
        );
        ended || last.is_ok()
    });
    if !relay.is_running() {
        outcome.halted = Some(relay.wait_exit(secs(1)));
    }
    let log = relay.log();
    let loud = |line: &&String| line.contains("level=warn") || line.contains("level=error");
    let standing = |line: &&String| line.contains("at its limit");
    let said = log.iter().filter(loud).filter(|line| !standing(line));
    let said = said.filter_map(|line| Some(line.split_once("msg=")?.1.to_string()));
    outcome.said = said.collect::<Vec<_>>().join(" | ");
    if done.is_err() {
        outcome.said = format!("(waits) {}", outcome.said);
    }
    // what is published again has come by then
    if outcome.halted.is_none() {
        pause(secs(1));
    }
    relay.term();
    let _ = relay.ends_within(secs(30));
    let db = format!("postgres://postgres@127.0.0.1:{}/postgres", pg.port());
    let nats = format!("nats://127.0.0.1:{}", ports[0]);
    let check = command::run(&["check", "-db", &db, "-nats", &nats], &[]);
    outcome.check = check.code;
    let loud = |line: &&str| !line.starts_with("ok") && line.contains("lost");
    outcome.check_said = check.stdout.lines().find(loud).unwrap_or("").to_string();
    let mut client = client();
    let consumed = poll(secs(10), || client.try_read_from(NAME, 1));
    outcome.consumed = match consumed {
        Ok(messages) => format!("{} messages", messages.len()),
        Err(reason) => reason,
    };
    let state = client.try_api(&format!("STREAM.INFO.{NAME}"), &Value::Null);
    let state = state.map_or(Value::Null, |info| info["state"].clone());
    outcome.info = format!(
        "{} messages, first {}, last {}, {} deleted, lost {}",
        state["messages"],
        state["first_seq"],
        state["last_seq"],
        state["num_deleted"],
        state["lost"]
    );
    let mut seen: HashMap<String, u32> = HashMap::new();
    let mut latest = String::new();
    for seq in 1..=state["last_seq"].as_u64().unwrap_or(0) {
        match client.try_message(NAME, seq) {
            Ok(message) => {
                let id = message.id().to_string();
                assert!(
                    id >= latest || seen.contains_key(&id),
                    "{id} is behind {latest}"
                );
                *seen.entry(id.clone()).or_default() += 1;
                latest = id;
            }
            Err(error) => outcome.unreadable = error.to_string(),
        }
    }
    for number in 0..all {
        match seen.get(&id(number)) {
            None if number < *told => outcome.old_missing += 1,
            None => outcome.young_missing += 1,
            Some(1) => {}
            Some(_) => outcome.twice += 1,
        }
    }
    outcome
}

/// What a server has said last.
fn last_lines(nats: &Nats) -> String {
    let log = nats.log();
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(5)..].join("\n")
}

fn tell(case: Case, at: &str, outcome: &Outcome) {
    println!("{at} {case:?}\n    {outcome:?}");
}

/// What must not be: an event that was not confirmed is missing and nobody says so; or one is there twice. A stream whose last block is
/// gone with all before it is what a purge leaves: that is no loss to the relay.
fn judge(case: Case, outcome: &Outcome) -> Option<String> {
    let goes_on = outcome.halted.is_none() && !outcome.said.starts_with("(waits)");
    let silent = outcome.young_missing > 0 && goes_on;
    (silent || outcome.twice > 0).then(|| format!("{case:?}: {outcome:?}"))
}

/// All cases where there is time for them, or some.
fn chosen(random: &mut Rng) -> Vec<Case> {
    let mut cases = cases();
    if let Some(only) = std::env::var_os("POWER_DAMAGE") {
        let only = only.to_string_lossy().into_owned();
        let is_meant = |case: &Case| {
            let case = format!("{case:?}");
            only.split(',').all(|part| case.contains(part))
        };
        cases.retain(is_meant);
        return cases;
    }
    if number("POWER_SECONDS").is_none() {
        random.shuffle(&mut cases);
        cases.truncate(1);
    }
    cases
}

#[test]
fn damage_of_a_single_server_is_repaired_or_halts_the_relay() {
    let seed = number("POWER_SEED").unwrap_or_else(|| fastrand::u64(..1_000_000));
    let mut random = Rng::with_seed(seed);
    let mut broken: Vec<String> = Vec::new();
    for case in chosen(&mut random) {
        let nats = Nats::start();
        let before = prepare(&[nats.port()], &mut nats.client(), 1);
        match case.killed {
            true => nats.kill(),
            false => nats.stop(),
        }
        for path in files(&nats.dir().join("store"), case) {
            hurt(&path, case.damage, &mut random);
        }
        if !nats.starts_again_within(STARTS) {
            println!(
                "single server, {case:?}\n    the server does not start\n{}",
                last_lines(&nats)
            );
            continue;
        }
        let outcome = observe(&before, &[nats.port()], &mut || nats.client());
        tell(case, "single server, ", &outcome);
        broken.extend(judge(case, &outcome));
    }
    assert!(broken.is_empty(), "seed {seed}:\n{}", broken.join("\n"));
}

#[test]
fn damage_of_one_node_of_three_is_repaired_or_halts_the_relay() {
    let seed = number("POWER_SEED").unwrap_or_else(|| fastrand::u64(..1_000_000));
    let mut random = Rng::with_seed(seed);
    let mut broken: Vec<String> = Vec::new();
    for case in chosen(&mut random) {
        let cluster = NatsCluster::start();
        let ports = [0, 1, 2].map(|node: usize| cluster.nodes[node].port());
        let before = prepare(&ports, &mut cluster.nodes[0].client(), 3);
        let hit = random.usize(0..3);
        let node = &cluster.nodes[hit];
        match case.killed {
            true => node.kill(),
            false => node.stop(),
        }
        for path in files(&node.dir().join("store"), case) {
            hurt(&path, case.damage, &mut random);
        }
        let mut answering = node;
        if node.starts_again_within(STARTS) {
            lead(&cluster, hit);
        } else {
            println!("the node does not start\n{}", last_lines(node));
            answering = &cluster.nodes[(hit + 1) % 3];
        }
        let ports = [answering.port(), ports[0], ports[1], ports[2]];
        let outcome = observe(&before, &ports, &mut || {
            eventually("a node to answer", DEADLINE, || answering.try_client())
        });
        tell(case, "one node of three, ", &outcome);
        broken.extend(judge(case, &outcome));
    }
    assert!(broken.is_empty(), "seed {seed}:\n{}", broken.join("\n"));
}

/// The damaged node becomes the leader, if it can: then nothing hides what it has lost.
fn lead(cluster: &NatsCluster, hit: usize) {
    let _ = poll(secs(20), || {
        if cluster.leader(NAME) == Some(hit) {
            return true;
        }
        if let Ok(mut client) = cluster.nodes[hit].try_client() {
            let _ = client.try_api(&format!("STREAM.LEADER.STEPDOWN.{NAME}"), &Value::Null);
        }
        pause(Duration::from_millis(500));
        false
    });
}
