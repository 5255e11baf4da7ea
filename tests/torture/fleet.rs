//! The relays that run: one as a rule, two around a takeover. They may end by our signals only, and by the halt that an
//! operator's act makes due.

use crate::support::process::{Signal, lock};
use crate::support::relay::Relay;
use crate::support::wait::{poll, secs};
use crate::world::World;
use std::fs;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// What SIGTERM may take: the relay's own limit is 10 s.
const STOP_LIMIT: Duration = secs(30);

/// How much of its log a relay that ended by itself is told with.
const TAIL_LINES: usize = 12;

/// What a relay is started with.
#[derive(Clone, Copy)]
pub struct Settings {
    inflight: &'static str,
    ack_timeout: &'static str,
    /// They make the same events of the same rows, and are others.
    mapping: &'static [&'static str],
}

impl Settings {
    /// Much is left to be sent, and a freeze is outlived.
    pub const SLOW: Settings = Settings {
        inflight: "64",
        ack_timeout: "10s",
        mapping: &[],
    };

    /// A small window leaves much to be sent, a large one has much on its way; a short patience makes late copies, a
    /// long one outlives a freeze.
    pub fn any(random: &mut fastrand::Rng) -> Settings {
        Settings {
            inflight: ["4", "64", "1024", "4096"][random.usize(0..4)],
            ack_timeout: ["500ms", "2s", "5s"][random.usize(0..3)],
            mapping: [&[][..], &["-table=outbox"], &["-table=public.outbox"]][random.usize(0..3)],
        }
    }
}

pub struct Fleet<'a> {
    world: &'a World,
    shares_its_names: bool,
    hold_back: String,
    relays: Mutex<Vec<(u32, Relay)>>,
    started: AtomicU32,
}

impl<'a> Fleet<'a> {
    /// `shares_its_names`: another system has the same prefix and the same names.
    pub fn new(world: &'a World, hold_back: Duration, shares_its_names: bool) -> Fleet<'a> {
        Fleet {
            world,
            shares_its_names,
            hold_back: format!("{}ms", hold_back.as_millis()),
            relays: Mutex::default(),
            started: AtomicU32::new(0),
        }
    }

    pub fn world(&self) -> &'a World {
        self.world
    }

    pub fn started(&self) -> u32 {
        self.started.load(Ordering::Relaxed)
    }

    /// Starts one and returns its number.
    pub fn start(&self, settings: Settings) -> u32 {
        self.start_with(settings, &[])
    }

    /// The same with more flags.
    pub fn start_with(&self, settings: Settings, flags: &[&str]) -> u32 {
        let number = self.started.fetch_add(1, Ordering::Relaxed) + 1;
        let db = format!(
            "postgres://postgres@127.0.0.1:{}/postgres",
            self.world.to_pg.port()
        );
        let servers: Vec<String> = self
            .world
            .to_nats
            .iter()
            .map(|proxy| format!("127.0.0.1:{}", proxy.port()))
            .collect();
        let servers = servers.join(",");
        let Settings {
            inflight,
            ack_timeout,
            mapping,
        } = settings;
        let args = ["-db", &db, "-nats", &servers, "-hold-back", &self.hold_back];
        let more = ["-ack-timeout", ack_timeout, "-inflight", inflight];
        let prefix = ["-prefix", self.world.prefix];
        // without a record, events of another system under its prefix and its slot's name halt a relay
        let shared: &[&str] = match self.shares_its_names {
            true => &["-accept-new-system"],
            false => &[],
        };
        let args = [&args[..], &more, &prefix, shared, mapping, flags].concat();
        let relay = Relay::run(&args, &[]);
        let id = relay.id();
        self.world.note(&format!(
            "relay {number} started as process {id} with -inflight {inflight} -ack-timeout {ack_timeout} {}",
            [mapping, flags].concat().join(" ")
        ));
        lock(&self.relays).push((number, relay));
        number
    }

    /// The relay that has run longest.
    pub fn oldest(&self) -> Option<u32> {
        lock(&self.relays).first().map(|(number, _)| *number)
    }

    /// Or not within a few seconds, if one of the servers is down.
    pub fn wait_until_connected(&self, number: u32) {
        let is_connected = |(n, relay): &(u32, Relay)| {
            let log = relay.log();
            *n == number && log.iter().any(|line| line.contains("msg=\"connected\""))
        };
        let _ = poll(secs(5), || lock(&self.relays).iter().any(is_connected));
    }

    pub fn signal(&self, number: u32, signal: Signal) {
        for (_, relay) in lock(&self.relays).iter().filter(|(n, _)| *n == number) {
            relay.signal(signal);
        }
    }

    pub fn kill(&self, number: u32) {
        if let Some(relay) = self.take(number) {
            relay.kill();
            self.save_log(number, relay, "killed");
        }
    }

    /// SIGTERM, and sees that it ends with 0.
    pub fn term(&self, number: u32) {
        let Some(mut relay) = self.take(number) else {
            return;
        };
        relay.term();
        if !relay.ends_within(STOP_LIMIT) {
            let tail = tail(&relay);
            self.world.violation(
                "did not end on SIGTERM",
                format!("relay {number} in {STOP_LIMIT:?}\n{tail}"),
            );
        } else {
            let code = relay.wait_exit(secs(1));
            if code != 0 {
                let example = format!("relay {number} with {code}\n{}", tail(&relay));
                self.world
                    .violation("ended on SIGTERM otherwise than with 0", example);
            }
        }
        self.save_log(number, relay, "terminated");
    }

    /// Reports every relay that has ended by itself; the torture is over then.
    pub fn check(&self) {
        let ended: Vec<u32> = lock(&self.relays)
            .iter()
            .filter(|(_, relay)| !relay.is_running())
            .map(|(number, _)| *number)
            .collect();
        for number in ended {
            let Some(mut relay) = self.take(number) else {
                continue;
            };
            let code = relay.wait_exit(secs(10));
            let example = format!("relay {number} with {code}\n{}", tail(&relay));
            self.world.violation("ended by itself", example);
            self.world.give_up();
            self.save_log(number, relay, "ended by itself");
        }
    }

    /// Waits until a relay halts by itself with this code, and with this in its last line.
    pub fn wait_for_halt(&self, number: u32, code: i32, text: &str, limit: Duration) -> bool {
        let has_ended = |(n, relay): &(u32, Relay)| *n == number && !relay.is_running();
        let ended = poll(limit, || lock(&self.relays).iter().any(has_ended));
        let Some(mut relay) = self.take(number) else {
            return false;
        };
        if ended.is_err() {
            let example = format!("relay {number} in {limit:?}\n{}", tail(&relay));
            self.world.violation("did not halt", example);
        } else {
            let found = relay.wait_exit(secs(10));
            let last = relay.log().last().cloned().unwrap_or_default();
            if found != code || !last.contains(text) {
                let example = format!("relay {number} with {found}\n{}", tail(&relay));
                self.world.violation("ended by itself", example);
            }
        }
        self.save_log(number, relay, "waited for to halt");
        !self.world.is_broken()
    }

    /// SIGTERM to all, at the end.
    pub fn term_all(&self) {
        while let Some(number) = self.oldest() {
            self.term(number);
        }
    }

    fn take(&self, number: u32) -> Option<Relay> {
        let mut relays = lock(&self.relays);
        let index = relays.iter().position(|(n, _)| *n == number)?;
        Some(relays.remove(index).1)
    }

    fn save_log(&self, number: u32, relay: Relay, how: &str) {
        self.world.note(&format!("relay {number} {how}"));
        let path = self.world.folder.join(format!("relay-{number}.log"));
        fs::write(path, relay.log().join("\n")).expect("write the log of a relay");
    }
}

fn tail(relay: &Relay) -> String {
    let log = relay.log();
    log[log.len().saturating_sub(TAIL_LINES)..].join("\n")
}

impl Drop for Fleet<'_> {
    fn drop(&mut self) {
        while let Some(number) = self.oldest() {
            self.kill(number);
        }
    }
}
