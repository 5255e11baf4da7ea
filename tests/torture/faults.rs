//! The faults, and which come when: by seed. What operators do is dealt with them, see [`operators`](crate::operators).
//!
//! A round has one to three faults side by side, of different parts of the system. Each begins, lasts a while, and
//! heals itself. They are dealt like cards, so that each kind comes before one comes more often than its share.

use crate::fleet::{Fleet, Settings};
use crate::ledger::Ledger;
use crate::operators::{ACTS, Act};
use crate::support::nats::Nats;
use crate::support::process::{Signal, lock};
use crate::support::proxy::{Direction, Mode, Proxy};
use crate::support::wait::{poll, secs};
use crate::world::{Copy, DUPLICATE_WINDOW, JetStream, NAME, Setup, World};
use crate::writers::{Bursts, Written};
use fastrand::Rng;
use jetstream_outbox::postgres::replication::start_replication;
use jetstream_outbox::postgres::{ConnInfo, Connection, Lsn};
use serde_json::Value;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// What a fault breaks; faults of one round break different parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Relay,
    JetStream,
    Postgres,
    ToPostgres,
    ToJetStream,
    /// What the streams capture, and whether they take it.
    Streams,
    /// The service beside.
    Beside,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    RelayKilled,
    RelayTerminated,
    RelayFrozen,
    RelayFrozenAndReplaced,
    SlotStolen,
    NatsKilled,
    NatsFrozen,
    NatsRestarted,
    StoreRolledBack,
    StreamLeaderStepsDown,
    MetaLeaderStepsDown,
    PostgresCrashed,
    PostgresRestarted,
    WalsenderTerminated,
    Checkpoint,
    Network(Side, Trouble),
    Operator(Act),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Postgres,
    Nats,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    Cut,
    Reset,
    Refused,
    Frozen,
    HalfOpen,
    Delayed,
    Trickling,
}

use Fault::*;

const TROUBLES: [Trouble; 7] = [
    Trouble::Cut,
    Trouble::Reset,
    Trouble::Refused,
    Trouble::Frozen,
    Trouble::HalfOpen,
    Trouble::Delayed,
    Trouble::Trickling,
];

/// Each as often as it is in a deck.
fn deck(setup: Setup) -> Vec<Fault> {
    let mut deck = vec![
        RelayKilled,
        RelayKilled,
        RelayTerminated,
        RelayFrozen,
        RelayFrozenAndReplaced,
        RelayFrozenAndReplaced,
        RelayFrozenAndReplaced,
        SlotStolen,
        NatsKilled,
        NatsKilled,
        NatsFrozen,
        NatsRestarted,
        PostgresCrashed,
        PostgresRestarted,
        WalsenderTerminated,
        WalsenderTerminated,
        Checkpoint,
    ];
    deck.extend(match setup.cluster {
        true => [
            StreamLeaderStepsDown,
            StreamLeaderStepsDown,
            MetaLeaderStepsDown,
            NatsKilled,
        ],
        false => [StoreRolledBack; 4],
    });
    for trouble in TROUBLES {
        deck.extend([
            Network(Side::Postgres, trouble),
            Network(Side::Nats, trouble),
        ]);
    }
    if setup.operators {
        // what was configured since would go back too
        deck.retain(|fault| *fault != StoreRolledBack);
        deck.extend(ACTS.map(Operator));
    }
    deck
}

/// Deals faults by seed.
pub struct Dealer {
    random: Rng,
    /// All there are, each as often as it comes in a deck.
    all: Vec<Fault>,
    rounds: u64,
    /// What is left to be dealt: of all faults, and of those that spare the session.
    decks: [Vec<Fault>; 2],
}

/// Of so many rounds the last few leave the relay and its session to Postgres alone, so that what is held back
/// grows old enough to be confirmed.
const SPARING_PERIOD: u64 = 24;
const SPARING_ROUNDS: u64 = 8;

impl Dealer {
    /// Of all faults, or of those whose name contains `only`.
    pub fn new(seed: u64, setup: Setup, only: &str) -> Dealer {
        let mut all = deck(setup);
        all.retain(|fault| fault.name().contains(only));
        assert!(!all.is_empty(), "no fault is named {only:?}");
        Dealer {
            random: Rng::with_seed(seed),
            all,
            rounds: 0,
            decks: Default::default(),
        }
    }

    /// The faults of the next round, each with a source of its own for its details.
    pub fn round(&mut self) -> Vec<(Fault, Rng)> {
        let count = match self.random.u32(0..100) {
            0..55 => 1,
            55..85 => 2,
            _ => 3,
        };
        let spared = self.rounds % SPARING_PERIOD >= SPARING_PERIOD - SPARING_ROUNDS;
        self.rounds += 1;
        let deck_left = &mut self.decks[usize::from(spared)];
        let mut round: Vec<(Fault, Rng)> = Vec::new();
        for _ in 0..count {
            if deck_left.is_empty() {
                *deck_left = self.all.clone();
                deck_left.retain(|fault| !spared || fault.spares_the_session());
                self.random.shuffle(deck_left);
            }
            let broken: Vec<Part> = round
                .iter()
                .flat_map(|(fault, _)| fault.parts().to_vec())
                .collect();
            let goes = |fault: &Fault| !fault.parts().iter().any(|part| broken.contains(part));
            // from the top of the deck, the first that goes with the others
            let index = deck_left.iter().rposition(goes);
            if let Some(index) = index {
                round.push((deck_left.remove(index), self.random.fork()));
            }
        }
        round
    }

    /// How many rows are committed just when a round begins, if any.
    pub fn burst(&mut self) -> Option<u16> {
        (self.random.u32(0..4) == 0).then(|| self.random.u16(BURST))
    }

    /// What follows a round: `None`, wait until the relay has caught up; or only so long a pause.
    pub fn pause(&mut self) -> Option<Duration> {
        match self.random.u32(0..100) {
            0..60 => None,
            60..80 => Some(Duration::ZERO),
            _ => Some(Duration::from_millis(self.random.u64(0..2_000))),
        }
    }

    pub fn settings(&mut self) -> Settings {
        Settings::any(&mut self.random)
    }
}

/// How many rows a burst has.
const BURST: std::ops::Range<u16> = 1_000..4_000;

impl Fault {
    fn parts(self) -> &'static [Part] {
        match self {
            RelayKilled | RelayTerminated | RelayFrozen | SlotStolen => &[Part::Relay],
            RelayFrozenAndReplaced => &[Part::Relay, Part::ToJetStream],
            NatsKilled
            | NatsFrozen
            | NatsRestarted
            | StoreRolledBack
            | StreamLeaderStepsDown
            | MetaLeaderStepsDown => &[Part::JetStream],
            PostgresCrashed | PostgresRestarted | WalsenderTerminated | Checkpoint => {
                &[Part::Postgres]
            }
            Network(Side::Postgres, _) => &[Part::ToPostgres],
            Network(Side::Nats, _) => &[Part::ToJetStream],
            Operator(act) => act.parts(),
        }
    }

    /// The session between the relay and Postgres outlives it.
    fn spares_the_session(self) -> bool {
        let spared = |part: &Part| !matches!(part, Part::Relay | Part::Postgres | Part::ToPostgres);
        self == Checkpoint || self.parts().iter().all(spared) && self != StoreRolledBack
    }

    pub fn name(self) -> String {
        match self {
            RelayKilled => "relay killed and started again".into(),
            RelayTerminated => "relay terminated and started again".into(),
            RelayFrozen => "relay frozen".into(),
            RelayFrozenAndReplaced => "relay frozen, replaced, and back".into(),
            SlotStolen => "slot stolen while the relay is away".into(),
            NatsKilled => "nats-server killed".into(),
            NatsFrozen => "nats-server frozen".into(),
            NatsRestarted => "nats-server restarted".into(),
            StoreRolledBack => "store rolled back to a copy".into(),
            StreamLeaderStepsDown => "leader of the stream stepped down".into(),
            MetaLeaderStepsDown => "leader of the cluster stepped down".into(),
            PostgresCrashed => "Postgres stopped at once".into(),
            PostgresRestarted => "Postgres restarted".into(),
            WalsenderTerminated => "walsender terminated".into(),
            Checkpoint => "CHECKPOINT".into(),
            Network(side, trouble) => format!("network to {side:?} {trouble:?}").to_lowercase(),
            Operator(act) => act.name().into(),
        }
    }

    /// From its beginning to its healing.
    pub fn inject(self, on: &On, random: &mut Rng) {
        let world = on.world;
        // not all at the same moment
        on.pause(random, 0..300);
        world.note(&format!("{}: begins", self.name()));
        match self {
            RelayKilled => on.relay_away(random, |fleet, relay| fleet.kill(relay)),
            RelayTerminated => on.relay_away(random, |fleet, relay| fleet.term(relay)),
            RelayFrozen => on.relay_frozen(random),
            RelayFrozenAndReplaced => on.relay_replaced(random),
            SlotStolen => on.slot_stolen(random),
            NatsKilled => on.nats_away(random, Nats::kill),
            NatsRestarted => on.nats_away(random, Nats::stop),
            NatsFrozen => on.nats_frozen(random),
            StoreRolledBack => on.store_rolled_back(random),
            StreamLeaderStepsDown => {
                on.burst(random);
                for _ in 0..random.u32(1..4) {
                    on.pause(random, 0..200);
                    let stream = on.stream(random);
                    on.step_down(&format!("STREAM.LEADER.STEPDOWN.{stream}"));
                }
            }
            MetaLeaderStepsDown => on.step_down("META.LEADER.STEPDOWN"),
            PostgresCrashed => {
                world.pg.stop_immediate();
                on.pause(random, 0..2_000);
                world.pg.start_again();
            }
            PostgresRestarted => world.pg.restart(),
            WalsenderTerminated => {
                for _ in 0..random.u32(1..5) {
                    world.pg.terminate_walsender();
                    on.pause(random, 0..500);
                }
            }
            Checkpoint => world.pg.execute("CHECKPOINT"),
            Network(side, trouble) => on.network(side, trouble, random),
            Operator(act) => on.operate(act, random),
        }
        world.note(&format!("{}: healed", self.name()));
    }
}

/// What faults are injected into.
pub struct On<'a> {
    pub world: &'a World,
    pub fleet: &'a Fleet<'a>,
    pub bursts: &'a Bursts<'a>,
    pub written: &'a Written,
    pub ledger: &'a Mutex<Ledger>,
    /// The relays of the service beside, where there is one.
    pub beside: Option<&'a Fleet<'a>>,
    pub hold_back: Duration,
}

impl On<'_> {
    /// A copy of the store this old may be put back: what came later is all within the hold-back, also when the
    /// relay does not see it at once.
    fn oldest_copy(&self) -> Duration {
        self.hold_back / 3
    }

    pub fn pause(&self, random: &mut Rng, ms: std::ops::Range<u64>) {
        crate::support::wait::pause(Duration::from_millis(random.u64(ms)));
    }

    /// Right before what it is to meet.
    pub fn burst(&self, random: &mut Rng) {
        self.bursts.commit(random.u16(BURST));
    }

    fn relay_away(&self, random: &mut Rng, end: fn(&Fleet, u32)) {
        self.away(self.fleet, random, end);
    }

    pub fn away(&self, fleet: &Fleet, random: &mut Rng, end: fn(&Fleet, u32)) {
        if let Some(relay) = fleet.oldest() {
            end(fleet, relay);
            let longest = if random.bool() { 100 } else { 3_000 };
            self.pause(random, 0..longest);
            fleet.start(Settings::any(random));
        }
    }

    fn relay_frozen(&self, random: &mut Rng) {
        if let Some(relay) = self.fleet.oldest() {
            self.fleet.signal(relay, Signal::STOP);
            self.pause(random, 100..4_000);
            self.fleet.signal(relay, Signal::CONT);
        }
    }

    /// The second takes over once Postgres has given the first up. The first, thawed after the deduplication window,
    /// may still send what it had. Then both live for a while, and one of them goes.
    fn relay_replaced(&self, random: &mut Rng) {
        let Some(first) = self.fleet.oldest() else {
            return;
        };
        // it has much to do, a small window to do it with, over a slow network, and patience: thawed, it goes on
        self.fleet.kill(first);
        let first = self.fleet.start(Settings::SLOW);
        self.fleet.wait_until_connected(first);
        let delay = Duration::from_millis(random.u64(10..100));
        self.to_nats(Mode::Delay(delay));
        self.burst(random);
        self.pause(random, 0..400);
        self.fleet.signal(first, Signal::STOP);
        self.to_nats(Mode::Pass);
        self.terminate_walsender();
        let second = self.fleet.start(Settings::any(random));
        let window = DUPLICATE_WINDOW.as_millis() as u64;
        self.pause(random, 5 * window..5 * window + 3_000);
        self.fleet.signal(first, Signal::CONT);
        self.pause(random, 0..3_000);
        let goes = if random.bool() { first } else { second };
        if random.bool() {
            self.fleet.kill(goes);
        } else {
            self.fleet.term(goes);
        }
    }

    /// Of a Postgres that may be down for the moment.
    fn terminate_walsender(&self) {
        let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_replication";
        let _ = poll(secs(5), || self.world.pg.try_client()?.batch_execute(sql));
    }

    /// Somebody reads the slot while the relay is away, and confirms nothing; the relay waits for it.
    fn slot_stolen(&self, random: &mut Rng) {
        let Some(relay) = self.fleet.oldest() else {
            return;
        };
        self.fleet.kill(relay);
        let no_environment = |name: &str| (name == "HOME").then(|| "/nonexistent".to_string());
        let info = ConnInfo::parse(&self.world.pg.url("postgres", "postgres"), &no_environment)
            .expect("a URL of ours");
        let options = [("proto_version", "1"), ("publication_names", NAME)];
        let thief = poll(secs(10), || {
            let connection = Connection::connect(&info)?;
            start_replication(connection, NAME, Lsn::INVALID, &options)
        });
        self.fleet.start(Settings::any(random));
        if let Ok((mut reader, _writer)) = thief {
            let until = Instant::now() + Duration::from_millis(random.u64(0..4_000));
            while Instant::now() < until && reader.read().is_ok() {}
        }
    }

    /// One that events go to.
    fn stream(&self, random: &mut Rng) -> &'static str {
        let Some(streams) = &self.world.streams else {
            return NAME;
        };
        let mut all = streams.all();
        // while a subject moves there may be none
        if all.iter().any(|(_, kinds)| !kinds.is_empty()) {
            all.retain(|(_, kinds)| !kinds.is_empty());
        }
        all[random.usize(0..all.len())].0
    }

    fn node(&self, random: &mut Rng) -> &Nats {
        let nodes = self.world.jetstream.nodes();
        let index = match &*self.world.jetstream {
            // more often than not the one that matters
            JetStream::Cluster(cluster) if random.u32(0..3) > 0 => {
                cluster.leader(self.stream(random))
            }
            _ => None,
        };
        &nodes[index.unwrap_or_else(|| random.usize(0..nodes.len()))]
    }

    fn nats_away(&self, random: &mut Rng, end: fn(&Nats)) {
        let node = self.node(random);
        end(node);
        self.maybe_copy(random, || node.snapshot_store());
        let longest = if random.bool() { 100 } else { 3_000 };
        self.pause(random, 0..longest);
        node.start_again();
    }

    fn nats_frozen(&self, random: &mut Rng) {
        let node = self.node(random);
        self.burst(random);
        self.pause(random, 0..100);
        node.freeze();
        self.pause(random, 100..7_000);
        node.thaw();
    }

    /// Of a single server, for later.
    fn maybe_copy(&self, random: &mut Rng, copy: impl FnOnce() -> tempfile::TempDir) {
        if matches!(*self.world.jetstream, JetStream::Single(_)) && random.bool() {
            let taken = Instant::now();
            let store = copy();
            *lock(&self.world.copy) = Some(Copy { store, taken });
        }
    }

    /// To the latest copy, which may be of a round before this one.
    fn store_rolled_back(&self, random: &mut Rng) {
        let node = self.node(random);
        let recent = lock(&self.world.copy).take();
        let recent = recent.filter(|copy| copy.taken.elapsed() < self.oldest_copy());
        let copy = recent.unwrap_or_else(|| {
            let taken = Instant::now();
            let store = node.snapshot_store_frozen();
            self.world.note("the store is copied");
            self.pause(random, 500..self.oldest_copy().as_millis() as u64 / 2);
            Copy { store, taken }
        });
        if random.bool() {
            node.kill();
        } else {
            node.stop();
        }
        node.restore_store(&copy.store);
        let age = copy.taken.elapsed();
        self.world.note(&format!("the store goes back by {age:?}"));
        node.start_again();
    }

    fn step_down(&self, call: &str) {
        // a cluster that has no leader at the moment answers nothing
        let answer = poll(secs(5), || {
            self.world.jetstream.client()?.try_api(call, &Value::Null)
        });
        if let Err(error) = answer {
            self.world.note(&format!("{call}: {error}"));
        }
    }

    fn to_nats(&self, mode: Mode) {
        self.world.to_nats.iter().for_each(|proxy| proxy.set(mode));
    }

    fn network(&self, side: Side, trouble: Trouble, random: &mut Rng) {
        let proxies: Vec<&Proxy> = match side {
            Side::Postgres => vec![&self.world.to_pg],
            Side::Nats => self.world.to_nats.iter().collect(),
        };
        let set = |mode| proxies.iter().for_each(|proxy| proxy.set(mode));
        match trouble {
            Trouble::Cut | Trouble::Reset => {
                for _ in 0..random.u32(1..5) {
                    for proxy in &proxies {
                        match trouble {
                            Trouble::Cut => proxy.cut(),
                            _ => proxy.reset(),
                        }
                    }
                    self.pause(random, 0..300);
                }
            }
            Trouble::Refused => {
                set(Mode::Refuse);
                self.pause(random, 0..4_000);
            }
            Trouble::Frozen => {
                self.burst(random);
                self.pause(random, 0..100);
                set(Mode::Freeze);
                self.pause(random, 100..8_000);
            }
            Trouble::HalfOpen => {
                set(Mode::Swallow(match random.bool() {
                    true => Direction::ToServer,
                    false => Direction::ToClient,
                }));
                self.pause(random, 100..8_000);
                // what is open by now has lost bytes in the middle, which no network does
                set(Mode::Refuse);
            }
            Trouble::Delayed => {
                set(Mode::Delay(Duration::from_millis(random.u64(5..150))));
                self.pause(random, 1_000..5_000);
            }
            Trouble::Trickling => {
                set(Mode::Trickle(random.u64(2_000..100_000)));
                self.burst(random);
                // beyond the ack timeout
                self.pause(random, 1_000..6_000);
            }
        }
        set(Mode::Pass);
    }
}
