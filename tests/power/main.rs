//! Power cuts, damage, and disks that fill, under the servers, while writers write and the relay runs; then the judgement of the
//! torture (see [`service`]).
//!
//! The servers' data is on a file system of our own, which forgets at a cut what was not synced: see [`disk`] and [`mount`]. It
//! needs FUSE, and to be root; elsewhere these tests say that nothing was tested, and pass.
//!
//! `POWER_SECONDS` (by default as long as the tests can bear), `POWER_SEED` and `POWER_REQUIRED` (fail where there is no FUSE);
//! scripts/power sets them. `POWER_HOLD_BACK`: so many seconds are held back, and servers sync each minute; then they lose what was
//! confirmed, and the tests fail. `POWER_DAMAGE`: parts of the names of the damages that are wanted, between commas.

mod cuts;
mod damage;
mod disk;
mod full;
mod mount;
mod rig;

#[path = "../torture/events.rs"]
mod events;
#[path = "../torture/fleet.rs"]
#[allow(dead_code, reason = "the torture uses the rest")]
mod fleet;
#[path = "../torture/ledger.rs"]
#[allow(dead_code, reason = "the torture uses the rest")]
mod ledger;
#[path = "../torture/service.rs"]
#[allow(dead_code, reason = "the torture uses the rest")]
mod service;
#[path = "../torture/streams.rs"]
#[allow(dead_code, reason = "the torture uses the rest")]
mod streams;
#[path = "../support/mod.rs"]
mod support;
#[path = "../torture/world.rs"]
#[allow(dead_code, reason = "the torture uses the rest")]
mod world;
#[path = "../torture/writers.rs"]
#[allow(dead_code, reason = "the torture uses the rest")]
mod writers;
