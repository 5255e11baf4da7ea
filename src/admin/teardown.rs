//! `teardown`: removes the slot, which would keep log for ever, and the publication.

use super::database::{Access, Database};
use super::{Error, say};
use crate::config::Config;
use crate::exit::Exit;
use crate::postgres::identifier::identifier;
use crate::relay::preflight::slot::{self, Slot, drop_slot};

/// Removes them, if `yes`; says what would be removed otherwise.
pub fn run(config: &Config, yes: bool) -> Result<Exit, Error> {
    let access = if yes { Access::Write } else { Access::Read };
    let mut database = Database::connect(&config.db, access)?;
    let slot = slot::read(&mut database, &config.slot)?;
    let publication = database.row(
        "find the publication",
        "SELECT pg_catalog.pg_get_userbyid(pubowner)::text, pg_catalog.pg_has_role(pubowner, 'USAGE') \
         FROM pg_catalog.pg_publication WHERE pubname = $1",
        &[&config.publication],
    )?;
    let what = [
        slot.as_ref().map(|_| format!("slot {}", config.slot)),
        publication
            .as_ref()
            .map(|_| format!("publication {}", identifier(&config.publication))),
    ];
    if let Some(slot) = &slot {
        refuse_foreign(config, slot)?;
    }
    if let Some(row) = publication.as_ref().filter(|row| !row.get::<_, bool>(1)) {
        let owner: String = row.get(0);
        return Err(Error::Wrong {
            what: format!(
                "drop the publication: {} belongs to {owner}",
                identifier(&config.publication)
            ),
            remedy: format!("run it as {owner}, who may also replicate; nothing was removed"),
            exit: Exit::Configuration,
        });
    }
    if what.iter().all(Option::is_none) {
        say("nothing to remove\n")?;
        return Ok(Exit::Done);
    }
    if !yes {
        for what in what.iter().flatten() {
            say(&format!("would remove  {what}\n"))?;
        }
        return Err(Error::Wrong {
            what: "remove slot and publication: this cannot be undone, and what the slot has not sent is never published".into(),
            remedy: "pass -yes to do it; nothing was removed".into(),
            exit: Exit::Usage,
        });
    }
    let [slot, publication] = what;
    if let Some(what) = slot {
        database.run("drop the slot", &drop_slot(&config.slot))?;
        say(&format!("removed  {what}\n"))?;
    }
    if let Some(what) = publication {
        let sql = format!("DROP PUBLICATION {}", identifier(&config.publication));
        database.run("drop the publication", &sql)?;
        say(&format!("removed  {what}\n"))?;
    }
    Ok(Exit::Done)
}

/// A slot that somebody uses, or that another database or program needs, is not ours to drop.
fn refuse_foreign(config: &Config, slot: &Slot) -> Result<(), Error> {
    if !slot.could_be_ours() {
        let whose = match (slot.slot_type.as_str(), slot.here) {
            ("logical", false) => format!(
                "belongs to database {}",
                slot.database.as_deref().unwrap_or("(none)")
            ),
            ("logical", true) => format!(
                "is another program's, of plugin {}",
                slot.plugin.as_deref().unwrap_or("(none)")
            ),
            (kind, _) => format!("is {kind}, and not a relay's"),
        };
        return Err(Error::Wrong {
            what: format!("drop the slot: {} {whose}", config.slot),
            remedy: "name its database in -db, or another slot with -slot; nothing was removed"
                .into(),
            exit: Exit::Configuration,
        });
    }
    match slot.active_pid {
        None => Ok(()),
        Some(pid) => Err(Error::Wrong {
            what: format!(
                "drop the slot: {} is in use by the server process {pid}",
                config.slot
            ),
            remedy:
                "stop the relay first (pg_stat_activity tells whose it is); nothing was removed"
                    .into(),
            exit: Exit::SlotInUse,
        }),
    }
}
