//! What of the outboxes reached the relay when it last looked, and what has been lost of it since.
//!
//! Postgres leaves the rows of a table that is not published out of the replication stream without a word, and decodes WAL
//! with the catalog of the time it was written: what was left out once never comes. So whatever reached the relay and
//! no longer does, or may not have for a while, halts it, before more is lost. Growing is fine.
//!
//! The state is kept in the checkpoint, so it is bounded: above `MOST_NAMED` outboxes a digest stands for them.

use super::outboxes::{self, Index, Outboxes, Publication, Table};
use super::{Facts, Finding, fail, publication};
use crate::config::Config;
use crate::outbox::mapping::TableName;
use crate::postgres::identifier::identifier;
use serde::{Deserialize, Serialize};

/// The finding.
pub const NAME: &str = "postgres.publication_change";
/// The checkpoint is written each second: 500 outboxes take about 30 KB of it.
const MOST_NAMED: usize = 500;
/// Why most of it halts.
const MISSING: &str = "rows that were committed since may be missing, and the slot cannot send them: Postgres decodes WAL with the \
    publication of the time it was written";
/// Members of a tree that did not reach, or have a filter, which are remembered one by one. Of more filters one hash stands for all,
/// under the oid that nothing has.
const MOST_HOLES: usize = 100;

/// What was seen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublicationState {
    /// `-publication`. Empty: not known.
    #[serde(default)]
    name: String,
    /// `pg_publication.oid`: another one under the same name is another publication.
    oid: u32,
    /// By which names partitions come.
    via_root: bool,
    outboxes: Vec<Outbox>,
    /// Stands for the outboxes where they are too many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    digest: Option<Digest>,
    /// What was seen to be lost, until that is accepted: to undo the change brings nothing back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lost: Option<String>,
}

/// A tree that is relayed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Outbox {
    /// Of its root.
    oid: u32,
    schema: String,
    name: String,
    /// Its members that have a row filter, and the hash of what that lets through.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    filters: Vec<(u32, i64)>,
    /// What an earlier version kept of their text: it had some, and they cannot be compared.
    #[serde(default, skip_serializing)]
    filter: Option<u64>,
    /// The member that was created last: oids are counted up.
    #[serde(default)]
    youngest: u32,
    /// Columns that take part in an event and are not sent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    unsent: Vec<String>,
    /// Members that do not reach.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    holes: Vec<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Digest {
    /// Outboxes that were created later are not in the sum: oids are counted up.
    up_to: u32,
    count: usize,
    sum: u64,
}

impl PublicationState {
    /// What is there now; `None` without a publication.
    pub fn of(outboxes: &Outboxes, config: &Config) -> Option<PublicationState> {
        let publication = outboxes.publication.as_ref()?;
        let seen = |tree| Outbox::of(tree, config);
        Some(PublicationState {
            name: config.publication.clone(),
            oid: publication.oid,
            via_root: publication.via_root,
            outboxes: outboxes.trees().filter_map(seen).collect(),
            digest: None,
            lost: None,
        })
    }

    /// This was found, and halts the relay; if it means that rows are missing, that is remembered.
    pub fn loses(&mut self, found: &Finding) {
        if found.advice.as_ref().is_some_and(|it| it.why == MISSING) {
            self.lost = Some(found.found.clone());
        }
    }

    /// For the checkpoint.
    pub fn to_text(&self) -> String {
        let short = match self.outboxes.len() > MOST_NAMED {
            true => {
                let up_to = self.outboxes.iter().map(|outbox| outbox.oid).max();
                let digest = Digest::of(&self.outboxes, up_to.unwrap_or_default());
                PublicationState {
                    outboxes: Vec::new(),
                    digest: Some(digest),
                    ..self.clone()
                }
            }
            false => self.clone(),
        };
        serde_json::to_string(&short).expect("numbers and strings have a JSON form")
    }

    /// From the checkpoint; `None` if another release wrote it in another form.
    pub fn from_text(text: &str) -> Option<PublicationState> {
        serde_json::from_str(text).ok()
    }

    /// What of it is lost by now. Reads the catalog again into `facts`, if they lack tables that were seen: those of these oids.
    pub fn look<E>(
        &self,
        facts: &mut Facts,
        config: &Config,
        read: impl FnOnce(&[u32]) -> Result<Outboxes, E>,
    ) -> Result<Option<Finding>, E> {
        let index = facts.outboxes.index();
        let oids = self.oids();
        if !oids.iter().all(|oid| index.trees.contains_key(oid)) {
            facts.outboxes = read(&oids)?;
        }
        Ok(self.lost(facts, config))
    }

    /// The tables whose fate counts.
    pub fn oids(&self) -> Vec<u32> {
        self.outboxes.iter().map(|outbox| outbox.oid).collect()
    }

    /// What of it is lost in what is there now, the first thing that is found; or what was seen to be lost before.
    pub fn lost(&self, facts: &Facts, config: &Config) -> Option<Finding> {
        let before = || Some(halts(self.lost.clone()?, ""));
        self.lost_now(facts, config).or_else(before)
    }

    fn lost_now(&self, facts: &Facts, config: &Config) -> Option<Finding> {
        let outboxes = &facts.outboxes;
        let name = identifier(&config.publication);
        let is_given_another = !self.name.is_empty() && self.name != config.publication;
        let Some(now) = &outboxes.publication else {
            // that there is none of this name is said by another rule
            if is_given_another {
                return None;
            }
            return Some(halts(
                format!("publication {name} was dropped"),
                "create it again, and the slot with it",
            ));
        };
        if now.oid != self.oid && !is_given_another {
            return Some(halts(
                format!("publication {name} was dropped and created again"),
                "",
            ));
        }
        if !now.inserts {
            return Some(halts(
                format!("publication {name} does not publish inserts any more"),
                &format!("ALTER PUBLICATION {name} SET (publish = 'insert');"),
            ));
        }
        if let Some(digest) = self.digest {
            let now = PublicationState::of(outboxes, config).unwrap_or_default();
            return (digest != Digest::of(&now.outboxes, digest.up_to)).then(|| {
                halts(
                    format!(
                        "publication {name} is not what it was: of {} outboxes some are gone, renamed, filtered or sent in \
                         part; they are too many to tell which",
                        digest.count
                    ),
                    "",
                )
            });
        }
        let index = outboxes.index();
        let seen = Seen {
            before: self,
            publication: now,
            outboxes,
            index,
            config,
        };
        (self.outboxes.iter()).find_map(|outbox| outbox.lost(&seen))
    }
}

impl Digest {
    fn of(outboxes: &[Outbox], up_to: u32) -> Digest {
        let mut digest = Digest {
            up_to,
            count: 0,
            sum: 0,
        };
        for outbox in outboxes.iter().filter(|outbox| outbox.oid <= up_to) {
            digest.count += 1;
            // a sum, as the order is no part of it
            digest.sum = digest.sum.wrapping_add(hash(&outbox.summary()));
        }
        digest
    }
}

/// FNV-1a, which is the same in each release.
fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

impl Outbox {
    fn of(tree: &[Table], config: &Config) -> Option<Outbox> {
        let root = tree.first()?;
        let mut relayed = publication::relayed(tree, config).peekable();
        relayed.peek()?;
        let (mut filters, mut unsent) = (Vec::new(), Vec::new());
        for (table, mapping) in relayed {
            filters.extend(table.filter_hash.map(|hash| (table.oid, hash)));
            let used = mapping.used_columns().into_iter();
            let is_unsent = |name: &&str| table.column(name).is_some_and(|column| !column.sent);
            unsent.extend(used.filter(is_unsent).map(str::to_string));
        }
        unsent.sort_unstable();
        unsent.dedup();
        if filters.len() > MOST_HOLES {
            filters = vec![(0, hash(&format!("{filters:?}")).cast_signed())];
        }
        let holes = outboxes::holes(tree);
        Some(Outbox {
            oid: root.oid,
            schema: root.schema.clone(),
            name: root.name.clone(),
            filters,
            filter: None,
            youngest: tree.iter().map(|table| table.oid).max().unwrap_or_default(),
            unsent,
            holes: holes.map(|table| table.oid).take(MOST_HOLES).collect(),
        })
    }

    /// The same in each version, or all would seem to have changed.
    fn summary(&self) -> String {
        let Outbox {
            oid,
            schema,
            name,
            filters,
            unsent,
            holes,
            filter: _,
            youngest: _,
        } = self;
        let filter = (!filters.is_empty()).then(|| hash(&format!("{filters:?}")));
        format!(
            "Outbox {{ oid: {oid}, schema: {schema:?}, name: {name:?}, filter: {filter:?}, unsent: {unsent:?}, holes: {holes:?} }}"
        )
    }

    /// A member that was there has a filter that it had not. One that has come since is growth, with whatever filter.
    fn has_other_filters(&self, now: &Outbox) -> bool {
        let is_comparable = self.filter.is_none();
        let was_there = |oid: u32| self.youngest == 0 || oid <= self.youngest;
        let mut filters = now.filters.iter();
        is_comparable && filters.any(|it| was_there(it.0) && !self.filters.contains(it))
    }

    fn label(&self) -> TableName {
        TableName {
            schema: Some(self.schema.clone()),
            name: self.name.clone(),
            and_longer: false,
        }
    }

    fn is_called(&self, table: &Table) -> bool {
        (&table.schema, &table.name) == (&self.schema, &self.name)
    }

    fn lost(&self, seen: &Seen<'_>) -> Option<Finding> {
        let config = seen.config;
        let name = identifier(&config.publication);
        let was = self.label().sql();
        let tree = seen.index.trees.get(&self.oid).copied();
        let table = tree.and_then(|tree| tree.iter().find(|table| table.oid == self.oid));
        if let Some(lost) = self.lost_to_successor(seen, table) {
            return Some(lost);
        }
        // a table that was dropped has nothing more to send
        let (tree, table) = tree.zip(table)?;
        let is_wanted = |schema: &str, name: &str| config.mapping.of_table(schema, name).is_some();
        let was_wanted = is_wanted(&self.schema, &self.name);
        if !self.is_called(table) && was_wanted != is_wanted(&table.schema, &table.name) {
            return Some(renamed(&was, &table.sql()));
        }
        if !(tree.iter()).any(|table| is_wanted(&table.schema, &table.name)) {
            // the operator's own wish
            return None;
        }
        // nor is a parent that it was given part of it
        let is_above = |hole: &Table| hole.oid == hole.root && hole.oid != self.oid;
        let is_new = |hole: &&Table| !self.holes.contains(&hole.oid) && !is_above(hole);
        if let Some(hole) = outboxes::holes(tree).find(is_new)
            && self.holes.len() < MOST_HOLES
        {
            return Some(halts(
                format!(
                    "what is inserted into {was} does not reach the relay any more: {}",
                    why(hole)
                ),
                &publication::publish(seen.outboxes, config, tree, &[hole]),
            ));
        }
        if seen.before.via_root != seen.publication.via_root
            && tree.iter().any(|table| table.partition)
            && !(tree.iter()).all(|table| is_wanted(&table.schema, &table.name))
        {
            return Some(halts(
                format!(
                    "publication {name} sends the rows of {was} by other names than before (publish_via_partition_root)"
                ),
                "name the table and its partitions with -table",
            ));
        }
        let Some(now) = Outbox::of(tree, config) else {
            return self.lost_whole(tree, table, config);
        };
        if self.has_other_filters(&now) {
            return Some(halts(
                format!("publication {name} has a row filter for {was} that it had not before"),
                "",
            ));
        }
        let left_out = now
            .unsent
            .iter()
            .find(|column| !self.unsent.contains(column))?;
        Some(halts(
            format!(
                "publication {name} leaves out column {} of {was}",
                identifier(left_out)
            ),
            "",
        ))
    }

    /// No row of the tree becomes an event any more; `table` is what was seen.
    fn lost_whole(&self, tree: &[Table], table: &Table, config: &Config) -> Option<Finding> {
        // what did reach has left it
        let mut holding = tree.iter().filter(|table| table.holds_rows());
        if !outboxes::is_empty(tree) && holding.all(|table| self.holes.contains(&table.oid)) {
            return None;
        }
        let is_missed = |it: &&Table| {
            it.is_sent_by_name() && config.mapping.of_table(&it.schema, &it.name).is_none()
        };
        if let Some(other) = tree.iter().find(is_missed) {
            return Some(halts(
                format!(
                    "the rows of {} come under the name of {} now, which -table does not name",
                    self.label().sql(),
                    other.sql()
                ),
                "name both in -table",
            ));
        }
        Some(fail(
            NAME,
            format!(
                "table {} has not the columns of an outbox any more",
                table.sql()
            ),
            "its rows would be passed over",
            "name the columns that it has, by -table, -subject or the flags of columns; what was written before they were renamed comes \
             under the earlier names. If it is no outbox any more, start the relay once with -resume-anyway",
        ))
    }

    /// Another table has its name now: `table` is what it is called itself, if it was not dropped.
    fn lost_to_successor(&self, seen: &Seen<'_>, table: Option<&Table>) -> Option<Finding> {
        // without one the operator does not want it any more
        (seen.config.mapping).of_table(&self.schema, &self.name)?;
        let name = (self.schema.as_str(), self.name.as_str());
        let successor = seen.index.names.get(&name)?;
        if successor.oid == self.oid || !matches!(successor.kind, 'r' | 'p' | 'f') {
            return None;
        }
        let (name, was) = (identifier(&seen.config.publication), self.label().sql());
        let how = match table {
            Some(table) => format!("was renamed to {} and created again", table.sql()),
            None => "was dropped and created again".to_string(),
        };
        let tree = seen.index.trees.get(&successor.oid)?;
        let holes: Vec<&Table> = outboxes::holes(tree).collect();
        if !holes.is_empty() {
            return Some(halts(
                format!("table {was} {how}, and publication {name} does not hold it"),
                &publication::publish(seen.outboxes, seen.config, tree, &holes),
            ));
        }
        (!successor.automatic).then(|| {
            halts(
                format!("table {was} {how}, and was not in publication {name} from the beginning"),
                "",
            )
        })
    }
}

/// What the state is compared with.
struct Seen<'a> {
    before: &'a PublicationState,
    publication: &'a Publication,
    outboxes: &'a Outboxes,
    index: Index<'a>,
    config: &'a Config,
}

fn why(table: &Table) -> String {
    let sql = table.sql();
    match table.kind {
        'f' => format!("{sql} is a foreign table"),
        _ if table.unlogged => format!("{sql} is unlogged"),
        _ => format!("{sql} is not in the publication"),
    }
}

/// Rows that were committed meanwhile may be missing.
fn halts(found: String, first: &str) -> Finding {
    let separator = if first.is_empty() { "" } else { " -- then " };
    fail(
        NAME,
        found,
        MISSING,
        format!(
            "{first}{separator}compare the table with the stream, publish what is missing, and start the relay once with \
             -resume-anyway"
        ),
    )
}

fn renamed(was: &str, now: &str) -> Finding {
    fail(
        NAME,
        format!("table {was} is called {now} now, and not both are named by -table"),
        "rows that were written before the change come under the old name",
        "name both in -table, and compare the table with the stream; if nothing under the name that is missing there matters, start \
         the relay once with -resume-anyway",
    )
}

#[cfg(test)]
mod tests;
