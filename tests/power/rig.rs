//! Servers on disks that can lose power, and a service between them.

use crate::disk::{Lost, Rules};
use crate::fleet::Settings;
use crate::mount::Drive;
use crate::service::{Running, SETTLE, Side, StopAll, conclude, judge};
use crate::support::files::temp_dir;
use crate::support::nats::{Builder, Nats, NatsCluster};
use crate::support::postgres::Postgres;
use crate::support::process::{keep_folder, lock};
use crate::support::wait::{pause, poll, secs};
use crate::world::{JetStream, NAME, WAL_SENDER_TIMEOUT, World};
use crate::writers::WRITERS;
use fastrand::Rng;
use serde_json::Value;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::sync::LazyLock;
use std::thread;
use std::time::Duration;
use tempfile::TempDir;

/// What the relay may take to catch up once all is healed.
const CATCH_UP_LIMIT: Duration = secs(150);

const EVENTS_PER_SECOND: u64 = 400;

pub fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Whether file systems can be mounted here; where not, that is said.
pub fn can_mount() -> bool {
    static WHY_NOT: LazyLock<Option<String>> = LazyLock::new(|| {
        let folder = temp_dir("power-");
        let probe = Drive::mount(&folder.path().join("probe"), Rules::EXT4);
        probe.err().map(|error| error.to_string())
    });
    let Some(why) = &*WHY_NOT else {
        return true;
    };
    let text = format!(
        "NO POWER CUT WAS TESTED: a file system cannot be mounted here: {why} (it needs root and /dev/fuse)"
    );
    assert!(number("POWER_REQUIRED").is_none(), "{text}");
    // past what libtest keeps to itself
    let _ = writeln!(std::io::stderr(), "{text}");
    false
}

/// What is under test.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub replicas: usize,
    /// nats-server's `sync_interval`.
    pub sync: &'static str,
    pub hold_back: Duration,
    pub rules: Rules,
}

/// The servers and their disks; the first disk is Postgres'.
pub struct Rig {
    pub world: World,
    pub drives: Vec<Drive>,
    _folder: TempDir,
}

impl Rig {
    pub fn start(plan: &Plan) -> Rig {
        let folder = temp_dir("power-");
        let drive = |name: &str, rules| {
            Drive::mount(&folder.path().join(name), rules).expect("mount a disk")
        };
        let mut drives = vec![drive("postgres", plan.rules)];
        for node in 0..plan.replicas {
            drives.push(drive(&format!("nats{node}"), plan.rules));
        }
        let pg = Postgres::builder()
            .on_disk(drives[0].path())
            .setting("wal_sender_timeout", WAL_SENDER_TIMEOUT)
            // its own part of the cuts
            .setting("checkpoint_timeout", "30s")
            .build();
        let jetstream = match plan.replicas {
            1 => JetStream::Single(Box::new(
                stored_on(Nats::builder(), drives[1].path(), plan.sync).build(),
            )),
            _ => JetStream::Cluster(Box::new(NatsCluster::start_with(|node, builder| {
                stored_on(builder, drives[node + 1].path(), plan.sync)
            }))),
        };
        let world = World::on(pg, jetstream, temp_dir("power-logs-").keep());
        if let JetStream::Cluster(cluster) = &*world.jetstream {
            let _ = poll(secs(30), || cluster.leader(NAME));
        }
        drives.iter().for_each(Drive::sync);
        Rig {
            world,
            drives,
            _folder: folder,
        }
    }

    /// All these lose power at once: nats-server's nodes by their number from 1 on, Postgres as 0.
    pub fn cut(&self, which: &[usize], random: &mut Rng) {
        let nodes = self.world.jetstream.nodes();
        for at in which {
            match at {
                0 => self.world.pg.kill(),
                node => nodes[node - 1].kill(),
            }
        }
        let mut lost = String::new();
        for at in which {
            let Lost {
                unsynced_pages,
                pages_kept,
                changes,
                changes_kept,
            } = self.drives[*at].cut(random);
            let _ = write!(
                lost,
                "; of {at} {pages_kept} of {unsynced_pages} pages and {changes_kept} of {changes} names and sizes were kept"
            );
        }
        self.world.note(&format!("power cut of {which:?}{lost}"));
        thread::scope(|scope| {
            for at in which {
                scope.spawn(move || match at {
                    0 => self.world.pg.start_again(),
                    node => nodes[node - 1].start_again(),
                });
            }
        });
        self.world.note("they are up again");
    }
}

fn stored_on(builder: Builder, disk: &Path, sync: &str) -> Builder {
    builder.without_jetstream().config(&format!(
        "jetstream {{ store_dir: \"{}\", sync_interval: {sync}, max_memory_store: 1GB, max_file_store: 8GB }}",
        disk.display()
    ))
}

/// Waits until all that was committed by now is in the stream; nothing else may keep the relay.
pub fn catch_up(side: &Side) {
    if let Err(reason) = caught_up(side, CATCH_UP_LIMIT) {
        let example = format!("after {CATCH_UP_LIMIT:?}: {reason}");
        side.world.violation("stands still", example);
        side.world.give_up();
    }
}

/// Whether it is by then.
pub fn caught_up(side: &Side, limit: Duration) -> Result<(), String> {
    let world = side.world;
    lock(&side.ledger).read_all(&world.pg);
    let target = lock(&side.ledger).events() as u64;
    poll(limit, || {
        side.fleet.check();
        if world.is_broken() {
            return Ok(());
        }
        let looked = world
            .jetstream
            .client()
            .and_then(|mut client| client.try_api(&format!("STREAM.INFO.{NAME}"), &Value::Null));
        let info = looked.map_err(|error| error.to_string())?;
        match info["state"]["messages"].as_u64() {
            Some(stored) if stored >= target => Ok(()),
            stored => Err(format!("{stored:?} of {target} events are stored")),
        }
    })
}

/// Writers write and a relay runs while `faults` does what it does; then everything catches up, and is judged. It says how much
/// of it there was.
pub fn run(plan: &Plan, seed: u64, faults: impl FnOnce(&Rig, &Side, &mut Rng) -> String) {
    println!("{plan:?}, seed {seed}");
    let rig = Rig::start(plan);
    let world = &rig.world;
    println!("logs in {}", world.folder.display());
    let mut text = String::new();
    {
        let side = Side::new(world, plan.hold_back, false);
        let mut random = Rng::with_seed(seed);
        let sides = [&side];
        let seen = thread::scope(|scope| {
            let stop_all = StopAll(&sides);
            let mut running = Running::start(scope, &side, 0..WRITERS, seed, EVENTS_PER_SECOND);
            side.fleet.start(Settings::any(&mut random));
            let what = faults(&rig, &side, &mut random);
            let _ = writeln!(text, "{what}");
            let answered = running.finish_writing(&side);
            catch_up(&side);
            pause(SETTLE);
            let seen = (answered, running.finish(&side));
            drop(stop_all);
            seen
        });
        judge(&side, &seen, &mut text);
        world.pg.stop_fast();
        world.pg.check_pages();
    }
    let report = conclude(text, &[world]);
    world.note(&report.text);
    print!("{}", report.text);
    if !report.clean {
        keep_folder(&world.folder);
        for (at, node) in world.jetstream.nodes().iter().enumerate() {
            let log = world.folder.join(format!("nats{}.log", at + 1));
            std::fs::write(log, node.log()).expect("write the log of nats-server");
        }
        std::fs::write(world.folder.join("postgres.log"), world.pg.log())
            .expect("write the log of Postgres");
        panic!(
            "seed {seed} broke a promise; the logs are in {}",
            world.folder.display()
        );
    }
    std::fs::remove_dir_all(&world.folder).expect("remove the logs");
}
