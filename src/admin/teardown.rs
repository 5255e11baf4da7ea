//! `teardown`: removes the slot, which would keep log for ever, and the publication.

use super::database::{Access, Database};
use super::statements::drop_slot;
use super::{Error, say};
use crate::config::Config;
use crate::exit::Exit;
use crate::postgres::identifier::identifier;

/// Removes them, if `yes`; says what would be removed otherwise.
pub fn run(config: &Config, yes: bool) -> Result<Exit, Error> {
    let access = if yes { Access::Write } else { Access::Read };
    let mut database = Database::connect(&config.db, access)?;
    let slot = database.row(
        "find the slot",
        "SELECT active_pid, database IS NOT DISTINCT FROM current_database(), database::text \
         FROM pg_catalog.pg_replication_slots WHERE slot_name = $1",
        &[&config.slot],
    )?;
    let publication = database.row(
        "find the publication",
        "SELECT true FROM pg_catalog.pg_publication WHERE pubname = $1",
        &[&config.publication],
    )?;
    let what = [
        slot.as_ref().map(|_| format!("slot {}", config.slot)),
        publication
            .as_ref()
            .map(|_| format!("publication {}", identifier(&config.publication))),
    ];
    if let Some(row) = &slot {
        refuse_foreign(config, row.get(0), row.get(1), row.get(2))?;
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

/// A slot that somebody uses, or that another database needs, is not ours to drop.
fn refuse_foreign(
    config: &Config,
    active_pid: Option<i32>,
    here: bool,
    database: Option<String>,
) -> Result<(), Error> {
    if !here {
        return Err(Error::Wrong {
            what: format!(
                "drop the slot: {} belongs to database {}",
                config.slot,
                database.unwrap_or_else(|| "(none)".into())
            ),
            remedy: "name that database in -db, or another slot with -slot; nothing was removed"
                .into(),
            exit: Exit::Configuration,
        });
    }
    match active_pid {
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
