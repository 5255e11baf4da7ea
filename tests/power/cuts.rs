//! Power cuts at random moments.

use crate::disk::Rules;
use crate::fleet::Settings;
use crate::mount::Drive;
use crate::rig::{Plan, Rig, can_mount, catch_up, number, run};
use crate::service::Side;
use crate::support::files::temp_dir;
use crate::support::postgres::Postgres;
use crate::support::wait::{pause, secs};
use fastrand::Rng;
use std::time::{Duration, Instant};

/// So long in the ordinary tests, which run side by side.
const DEFAULT_SECONDS: u64 = 10;

/// nats-server syncs each second, and what it has not by then is within the hold-back.
const LAZY: (&str, Duration) = ("1s", secs(5));

/// It syncs before it acknowledges, and nothing is held back.
const ALWAYS: (&str, Duration) = ("always", Duration::ZERO);

fn cut(replicas: usize, (sync, hold_back): (&'static str, Duration)) {
    if !can_mount() {
        return;
    }
    let seed = number("POWER_SEED").unwrap_or_else(|| fastrand::u64(..1_000_000));
    let short = number("POWER_HOLD_BACK").map(|hold_back| ("1m", secs(hold_back)));
    let (sync, hold_back) = short.unwrap_or((sync, hold_back));
    let rules = [Rules::EXT4, Rules::XFS][(seed % 2) as usize];
    let plan = Plan {
        replicas,
        sync,
        hold_back,
        rules,
    };
    let length = secs(number("POWER_SECONDS").unwrap_or(DEFAULT_SECONDS));
    run(&plan, seed, |rig, side, random| {
        cut_for(length, rig, side, random)
    });
}

/// Cuts until the time is over.
fn cut_for(length: Duration, rig: &Rig, side: &Side, random: &mut Rng) -> String {
    let start = Instant::now();
    let nodes: Vec<usize> = (1..rig.drives.len()).collect();
    let mut counts = [0; 4];
    catch_up(side);
    while start.elapsed() < length && !rig.world.is_broken() {
        pause(Duration::from_millis(random.u64(50..2_500)));
        let kind = random.usize(0..4);
        counts[kind] += 1;
        match kind {
            0 => rig.cut(&[0], random),
            1 => rig.cut(&[nodes[random.usize(0..nodes.len())]], random),
            2 => rig.cut(&nodes, random),
            _ => {
                // one machine has them all
                if let Some(relay) = side.fleet.oldest() {
                    side.fleet.kill(relay);
                }
                rig.cut(&[&[0], &nodes[..]].concat(), random);
                side.fleet.start(Settings::any(random));
            }
        }
        side.fleet.check();
        match random.u32(0..3) {
            // long enough for something to be confirmed
            0 => pause(side.hold_back * 2),
            1 => {}
            _ => catch_up(side),
        }
    }
    let [postgres, one, all, machine] = counts;
    format!(
        "cuts: {postgres} of Postgres, {one} of one nats-server, {all} of all of them, {machine} of everything with the relay"
    )
}

#[test]
fn a_single_server_that_syncs_now_and_then_loses_power() {
    cut(1, LAZY);
}

#[test]
fn a_cluster_that_syncs_now_and_then_loses_power() {
    cut(3, LAZY);
}

#[test]
fn a_single_server_that_always_syncs_loses_power_and_nothing_is_held_back() {
    cut(1, ALWAYS);
}

#[test]
fn a_cluster_that_always_syncs_loses_power_and_nothing_is_held_back() {
    cut(3, ALWAYS);
}

/// What was answered, by how many cuts; the file system forgets nothing that Postgres has synced.
fn rows_lost(fsync: &str, rules: Rules, seed: u64, cuts: u32) -> i64 {
    let folder = temp_dir("power-");
    let drive = Drive::mount(&folder.path().join("postgres"), rules).expect("mount a disk");
    let pg = Postgres::builder()
        .on_disk(drive.path())
        .setting("fsync", fsync);
    let pg = pg.build();
    pg.execute("CREATE TABLE t (number int PRIMARY KEY, pad text)");
    drive.sync();
    let mut random = Rng::with_seed(seed);
    let mut answered = 0;
    for _ in 0..cuts {
        let mut client = pg.client();
        let until = Instant::now() + Duration::from_millis(random.u64(50..500));
        while Instant::now() < until {
            let next = answered + 1;
            let row = format!("INSERT INTO t VALUES ({next}, repeat('x', {next} % 500))");
            client.batch_execute(&row).expect("Postgres is up");
            answered = next;
            if random.u32(0..100) == 0 {
                client.batch_execute("CHECKPOINT").expect("Postgres is up");
            }
        }
        drop(client);
        pg.kill();
        drive.cut(&mut random);
        // one that cannot start any more has lost them too
        if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| pg.start_again())).is_err() {
            return i64::from(answered);
        }
        let count: Option<i64> = pg.scalar(&format!("SELECT {answered} - count(*) FROM t"));
        let lost = count.expect("one row");
        if lost != 0 {
            return lost;
        }
    }
    pg.stop_fast();
    pg.check_pages();
    0
}

#[test]
fn postgres_keeps_what_it_has_committed_on_every_file_system() {
    if can_mount() {
        let seed = number("POWER_SEED").unwrap_or_else(|| fastrand::u64(..1_000_000));
        for rules in [Rules::EXT4, Rules::XFS, Rules::POSIX] {
            assert_eq!(rows_lost("on", rules, seed, 3), 0, "seed {seed}, {rules:?}");
        }
    }
}

/// Were it not so, the disk would forget nothing.
#[test]
fn postgres_without_fsync_loses_what_it_has_committed() {
    if can_mount() {
        assert_ne!(rows_lost("off", Rules::EXT4, 1, 20), 0);
    }
}
