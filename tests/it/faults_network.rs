//! Faults of the network between the relay and its servers.

use crate::faults_scenario::{NAME, Scenario};
use crate::support::nats::Nats;
use crate::support::postgres::Postgres;
use crate::support::proxy::{Direction, Mode, Proxy};
use crate::support::relay::Relay;
use crate::support::wait::{eventually, secs};
use std::time::{Duration, Instant};

/// Longer than the relay's patience with a silent Postgres (60 s) and its longest pause.
const NOTICE_LIMIT: Duration = secs(90);

struct Rig {
    nats: Nats,
    run: Scenario,
    to_pg: Proxy,
    to_nats: Proxy,
    relay: Relay,
}

impl Rig {
    /// The walsender's timeout is short, so that it gives up a dead connection before the relay is back.
    fn start() -> Rig {
        let pg = Postgres::builder()
            .setting("wal_sender_timeout", "5s")
            .build();
        let nats = Nats::start();
        nats.client().add_seed_stream();
        let run = Scenario::start_on(pg, &[nats.port()], &[(NAME, "events.")]);
        let to_pg = Proxy::start(run.pg.port());
        let to_nats = Proxy::start(nats.port());
        let args = ["--hold-back", "0", "--ack-timeout", "1s"];
        let relay = Relay::start_at(to_pg.port(), to_nats.port(), &args);
        run.wait_for_relay("the start");
        Rig {
            nats,
            run,
            to_pg,
            to_nats,
            relay,
        }
    }

    #[track_caller]
    fn finish(self) {
        self.run.finish_confirmed(self.relay);
        drop(self.nats);
    }
}

#[test]
fn connections_cut_or_reset_at_any_moment_lose_repeat_and_reorder_nothing() {
    let rig = Rig::start();
    for (name, end) in [("cut", Proxy::cut as fn(&Proxy)), ("reset", Proxy::reset)] {
        for (side, proxies) in [
            ("NATS", &[&rig.to_nats][..]),
            ("Postgres", &[&rig.to_pg]),
            ("both", &[&rig.to_pg, &rig.to_nats]),
        ] {
            for _ in 0..3 {
                rig.run.wait_for_commits(fastrand::u64(1..100));
                proxies.iter().for_each(|proxy| end(proxy));
            }
            rig.run.wait_for_relay(&format!("{name} from {side}"));
        }
    }
    rig.finish();
}

#[test]
fn a_slow_network_loses_repeats_and_reorders_nothing() {
    let rig = Rig::start();
    for proxy in [&rig.to_nats, &rig.to_pg] {
        for mode in [
            Mode::Delay(Duration::from_millis(50)),
            Mode::Trickle(20_000),
            Mode::Freeze,
        ] {
            proxy.set(mode);
            rig.run.wait_for_commits(1_500);
            proxy.set(Mode::Pass);
            rig.run.wait_for_relay(&format!("{mode:?}"));
        }
    }
    rig.finish();
}

/// At 50 ms each way the window alone makes the throughput: 1,536 events in 100 ms. A tenth of that is asked for.
#[test]
fn a_distant_jetstream_keeps_up() {
    const EACH_WAY: Duration = Duration::from_millis(50);
    let rig = Rig::start();
    rig.to_nats.set(Mode::Delay(EACH_WAY));
    let (begun, before) = (Instant::now(), rig.run.committed());
    rig.run.commit_a_backlog();
    rig.run.wait_for_relay("a backlog over a delayed network");
    let windows = (rig.run.committed() - before) / 1_536;
    let limit = 2 * EACH_WAY * u32::try_from(windows).expect("a few") * 10;
    assert!(
        begun.elapsed() < limit,
        "{:?} of {limit:?}",
        begun.elapsed()
    );
    rig.finish();
}

#[test]
fn a_half_open_connection_to_nats_loses_repeats_and_reorders_nothing() {
    half_open(&|rig| &rig.to_nats);
}

/// A Postgres whose bytes no longer arrive is noticed after a minute of silence.
#[test]
fn a_half_open_connection_to_postgres_loses_repeats_and_reorders_nothing() {
    half_open(&|rig| &rig.to_pg);
}

fn half_open(side: &dyn Fn(&Rig) -> &Proxy) {
    let rig = Rig::start();
    let proxy = side(&rig);
    for direction in [Direction::ToServer, Direction::ToClient] {
        let before = proxy.accepted();
        proxy.set(Mode::Swallow(direction));
        eventually("the relay to notice and try anew", NOTICE_LIMIT, || {
            proxy.accepted() > before
        });
        // what is open by now has lost bytes in the middle, which no network does
        proxy.set(Mode::Refuse);
        proxy.set(Mode::Pass);
        rig.run.wait_for_relay(&format!("half open {direction:?}"));
    }
    rig.finish();
}
