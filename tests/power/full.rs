//! Disks that fill, and have room again: everything waits, goes on, and nothing is lost or doubled.

use crate::disk::Rules;
use crate::rig::{Plan, Rig, can_mount, catch_up, caught_up, number, run};
use crate::service::Side;
use crate::support::wait::{pause, poll, secs};
use fastrand::Rng;
use std::time::{Duration, Instant};

const DEFAULT_SECONDS: u64 = 10;

/// A disk with so little room is full soon.
const ROOM: std::ops::Range<u64> = 0..300_000;

/// How long it takes to fill at most; Postgres writes into files that it has already.
const FILLS: Duration = secs(10);

/// What nats-server says that needs a start again.
const GIVES_UP: [&str; 2] = ["Critical write error", "will be DISABLED"];

/// So long a server may take to serve again by itself.
const RECOVERS: Duration = secs(20);

fn fill(replicas: usize) {
    if !can_mount() {
        return;
    }
    let seed = number("POWER_SEED").unwrap_or_else(|| fastrand::u64(..1_000_000));
    let plan = Plan {
        replicas,
        sync: "1s",
        hold_back: secs(5),
        rules: Rules::EXT4,
    };
    let length = secs(number("POWER_SECONDS").unwrap_or(DEFAULT_SECONDS));
    run(&plan, seed, |rig, side, random| {
        fill_for(length, rig, side, random)
    });
}

/// Fills one disk after the other until the time is over.
fn fill_for(length: Duration, rig: &Rig, side: &Side, random: &mut Rng) -> String {
    let start = Instant::now();
    let (mut filled, mut refused, mut restarted) = ([0, 0], 0, [0, 0]);
    catch_up(side);
    while start.elapsed() < length && !rig.world.is_broken() {
        let at = match random.bool() {
            true => 0,
            false => random.usize(1..rig.drives.len()),
        };
        let drive = &rig.drives[at];
        let before = drive.refused();
        let log_before = log_of_nats(rig, at).len();
        drive.leave_room(Some(random.u64(ROOM)));
        rig.world.note(&format!("disk {at} fills"));
        let is_full = poll(FILLS, || drive.refused() > before);
        // long enough for more than the first refusal
        pause(Duration::from_millis(random.u64(0..4_000)));
        drive.leave_room(None);
        rig.world.note(&format!(
            "disk {at} has room again, it refused {}",
            drive.refused() - before
        ));
        if is_full.is_ok() {
            filled[at.min(1)] += 1;
        }
        refused += drive.refused() - before;
        // nats-server writes no more to a stream, or disables JetStream, until it is started again
        let has_given_up = GIVES_UP
            .iter()
            .any(|said| log_of_nats(rig, at)[log_before..].contains(said));
        if has_given_up || !serves(rig, side, at) {
            restarted[at.min(1)] += 1;
            rig.world
                .note(&format!("the server on disk {at} is started again"));
            match at {
                0 => {
                    rig.world.pg.kill();
                    rig.world.pg.start_again();
                }
                node => {
                    let node = &rig.world.jetstream.nodes()[node - 1];
                    node.kill();
                    node.start_again();
                }
            }
        }
        side.fleet.check();
        catch_up(side);
    }
    format!(
        "disks filled: {} times Postgres', {} times nats-server's, {refused} operations refused; servers that had to be started again: {} times Postgres, {} times nats-server",
        filled[0], filled[1], restarted[0], restarted[1]
    )
}

fn log_of_nats(rig: &Rig, at: usize) -> String {
    let node = at.checked_sub(1).map(|at| &rig.world.jetstream.nodes()[at]);
    node.map_or_else(String::new, |node| node.log())
}

/// Whether the server on this disk serves again by itself.
fn serves(rig: &Rig, side: &Side, at: usize) -> bool {
    let world = &rig.world;
    let served = poll(RECOVERS, || match at {
        0 => {
            let mut client = world.pg.try_client().map_err(|error| error.to_string())?;
            let written = client.batch_execute("SELECT pg_switch_wal()");
            written.map_err(|error| error.to_string())
        }
        // it takes what is on its way
        _ => caught_up(side, Duration::ZERO),
    });
    if let Err(reason) = &served {
        world.note(&format!("disk {at}: {reason}"));
    }
    served.is_ok()
}

#[test]
fn disks_that_fill_are_waited_for() {
    fill(1);
}

#[test]
fn disks_of_a_cluster_that_fill_are_waited_for() {
    fill(3);
}
