//! Writers: sessions that commit and roll back transactions of all sizes side by side.

use crate::events::EventId;
use crate::support::postgres::Postgres;
use crate::support::process::lock;
use crate::world::Stop;
use std::fmt::Write;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

/// Writers of the service that is tortured, and of the one beside it; [`Bursts`] are one more.
pub const WRITERS: u8 = 6;
pub const WRITERS_BESIDE: std::ops::Range<u8> = 100..102;

/// Rows of one INSERT.
const ROWS_A_STATEMENT: usize = 500;

/// What the writers know.
#[derive(Default)]
pub struct Written {
    /// Rows of transactions whose COMMIT was answered.
    pub committed: AtomicU64,
    /// Transactions that were rolled back, and rows that were: with their transaction, or to a savepoint.
    pub rolled_back_transactions: AtomicU64,
    pub rolled_back_rows: AtomicU64,
    /// Transactions whose end nobody knows: the session was lost.
    pub uncertain: AtomicU64,
    /// Held by each transaction for reading; by an operator who needs a moment without one, for writing.
    gate: RwLock<()>,
}

impl Written {
    fn enter(&self) -> RwLockReadGuard<'_, ()> {
        self.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// No transaction is open while this is held.
    pub fn close_gate(&self) -> RwLockWriteGuard<'_, ()> {
        self.gate.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A writer's number, and the numbers of its transactions with events whose COMMIT was answered.
pub type Answered = (u8, Vec<u32>);

/// Writes until stopped, through a new session whenever the old one is lost.
pub fn write_until(
    stop: &Stop,
    pg: &Postgres,
    writer: u8,
    seed: u64,
    events_per_second: u64,
    written: &Written,
) -> Answered {
    let mut random = fastrand::Rng::with_seed(seed ^ u64::from(writer) << 56);
    let mut answered = Vec::new();
    let mut number = 0;
    // of an earlier transaction, that left its rows in the table
    let mut left_behind = String::new();
    let mut session = None;
    while !stop.is_set() {
        let Some(client) = &mut session else {
            stop.pause(Duration::from_millis(random.u64(5..100)));
            session = pg.try_client().ok();
            continue;
        };
        let entered = written.enter();
        number += 1;
        let transaction = Transaction::new(writer, number, &mut random);
        let begun = client
            .batch_execute(&(transaction.sql.clone() + &left_behind))
            // the transactions of the writers overlap
            .map(|()| stop.pause(Duration::from_millis(random.u64(0..20) * random.u64(0..2))));
        let committing = begun.is_ok() && transaction.commits;
        let end = if transaction.commits {
            "COMMIT"
        } else {
            "ROLLBACK"
        };
        let ended = begun.and_then(|()| client.batch_execute(end));
        let count = |counter: &AtomicU64, rows| counter.fetch_add(rows, Ordering::Relaxed);
        match ended {
            Ok(()) if committing => {
                if transaction.rows > 0 {
                    answered.push(number);
                }
                count(&written.committed, transaction.rows);
                count(&written.rolled_back_rows, transaction.doomed_rows);
                left_behind = transaction.left_behind;
            }
            Ok(()) => {
                count(&written.rolled_back_transactions, 1);
                count(&written.rolled_back_rows, transaction.doomed_rows);
            }
            Err(error) => {
                // a statement of ours that Postgres refuses would make this a test of nothing
                let ours = |code: &str| code.starts_with("42") || code.starts_with("22");
                if let Some(error) = error.as_db_error().filter(|e| ours(e.code().code())) {
                    panic!("write into the outbox: {error}");
                }
                count(&written.uncertain, u64::from(committing));
                session = None;
            }
        }
        drop(entered);
        let rows = transaction.rows + transaction.doomed_rows;
        let pause_us = rows * u64::from(WRITERS) * 1_000_000 / events_per_second;
        stop.pause(Duration::from_micros(random.u64(0..=2 * pause_us)));
    }
    (writer, answered)
}

/// A writer that commits many rows at the very moment when something breaks, so that it meets a relay with its window
/// full, and not one that waits for the next row.
pub struct Bursts<'a> {
    pg: &'a Postgres,
    written: &'a Written,
    next: AtomicU32,
    answered: Mutex<Vec<u32>>,
}

impl<'a> Bursts<'a> {
    /// Its number among the writers.
    const WRITER: u8 = WRITERS;

    pub fn new(pg: &'a Postgres, written: &'a Written) -> Bursts<'a> {
        Bursts {
            pg,
            written,
            next: AtomicU32::new(1),
            answered: Mutex::default(),
        }
    }

    /// Commits so many rows, if Postgres is up.
    pub fn commit(&self, rows: u16) {
        let _entered = self.written.enter();
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let ids: Vec<EventId> = (0..rows)
            .map(|row| EventId::new(Bursts::WRITER, number, row, false))
            .collect();
        let mut sql = String::from("BEGIN;");
        ids.chunks(ROWS_A_STATEMENT)
            .for_each(|ids| insert(&mut sql, ids));
        sql += &delete(Bursts::WRITER, number, rows);
        let Ok(mut session) = self.pg.try_client() else {
            return;
        };
        if session.batch_execute(&sql).is_err() {
            return;
        }
        if session.batch_execute("COMMIT").is_ok() {
            lock(&self.answered).push(number);
            let committed = &self.written.committed;
            committed.fetch_add(u64::from(rows), Ordering::Relaxed);
        } else {
            self.written.uncertain.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub fn answered(&self) -> Answered {
        (Bursts::WRITER, lock(&self.answered).clone())
    }
}

/// The rows of a transaction.
fn delete(writer: u8, number: u32, rows: u16) -> String {
    format!(
        "DELETE FROM outbox WHERE id BETWEEN '{}' AND '{}';",
        EventId::new(writer, number, 0, false).uuid(),
        EventId::new(writer, number, rows, true).uuid()
    )
}

/// What is sent before COMMIT or ROLLBACK.
struct Transaction {
    sql: String,
    commits: bool,
    rows: u64,
    doomed_rows: u64,
    /// A statement for the writer's next transaction.
    left_behind: String,
}

impl Transaction {
    fn new(writer: u8, number: u32, random: &mut fastrand::Rng) -> Transaction {
        let size = match random.u32(0..1000) {
            0..600 => random.u16(1..4),
            600..900 => random.u16(4..31),
            900..980 => random.u16(31..301),
            980..995 => random.u16(301..1501),
            _ => random.u16(1501..=5000),
        };
        let commits = random.u32(0..10) > 0;
        // rows behind a savepoint that is rolled back to
        let savepoint = (random.u32(0..8) == 0).then(|| {
            let from = random.u16(0..size);
            from..random.u16(from + 1..=size)
        });
        let doomed = |row| !commits || savepoint.as_ref().is_some_and(|rows| rows.contains(&row));
        let id = |row| EventId::new(writer, number, row, doomed(row));
        let ids: Vec<EventId> = (0..size).map(id).collect();
        let mut sql = String::from("BEGIN;");
        let insert = |sql: &mut String, ids: &[EventId]| {
            ids.chunks(ROWS_A_STATEMENT)
                .for_each(|ids| insert(sql, ids));
        };
        match &savepoint {
            None => insert(&mut sql, &ids),
            Some(rows) => {
                let (from, to) = (usize::from(rows.start), usize::from(rows.end));
                insert(&mut sql, &ids[..from]);
                sql += "SAVEPOINT doomed;";
                insert(&mut sql, &ids[from..to]);
                sql += "ROLLBACK TO doomed;";
                insert(&mut sql, &ids[to..]);
            }
        }
        let delete = delete(writer, number, size);
        let mut left_behind = String::new();
        if random.u32(0..10) < 7 {
            sql += &delete; // as the seed's application does
        } else {
            left_behind = delete;
        }
        let doomed_rows = ids.iter().filter(|id| id.is_doomed()).count() as u64;
        Transaction {
            sql,
            commits,
            rows: u64::from(size) - doomed_rows,
            doomed_rows,
            left_behind,
        }
    }
}

fn insert(sql: &mut String, ids: &[EventId]) {
    // rows of a table that is no outbox, which count in the positions
    if ids.len() % 3 == 1 {
        sql.push_str("INSERT INTO noise VALUES (1);");
    }
    let mut separator = "INSERT INTO outbox VALUES ";
    for id in ids {
        let _ = write!(
            sql,
            "{separator}('{}','{}','{}','{}')",
            id.uuid(),
            id.aggregate_type(),
            id.aggregate_id(),
            id.payload()
        );
        separator = ",";
    }
    sql.push(';');
}
