//! The operator's commands and their own flags, as they are typed. `config/operation.rs` validates them.
//!
//! A command takes the relay's flags as well, whether they matter to it or not: so it can be put behind the
//! command line of a relay that runs. A flag's name means the same kind of flag in all commands.

use argh::{ArgsInfo, CommandInfoWithArgs, EarlyExit, FromArgs};

/// The word that names a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// Create what the relay needs.
    Setup,
    /// Remove what would fill a disk.
    Teardown,
    /// Find what is wrong.
    Check,
    /// Tell where things stand.
    Status,
    /// Print events.
    Tail,
    /// Find what is missing.
    Compare,
    /// Publish what was parked.
    Unpark,
}

/// A command with its flags.
pub enum Command {
    /// Create what the relay needs.
    Setup(Setup),
    /// Remove what would fill a disk.
    Teardown(Teardown),
    /// Find what is wrong.
    Check(Check),
    /// Tell where things stand.
    Status(Status),
    /// Print events.
    Tail(Tail),
    /// Find what is missing.
    Compare(Compare),
    /// Publish what was parked.
    Unpark(Unpark),
}

impl Word {
    /// All of them, in the order a new installation needs them.
    pub const ALL: [Word; 7] = [
        Word::Setup,
        Word::Teardown,
        Word::Check,
        Word::Status,
        Word::Tail,
        Word::Compare,
        Word::Unpark,
    ];

    /// As it is typed.
    pub fn name(self) -> &'static str {
        match self {
            Word::Setup => "setup",
            Word::Teardown => "teardown",
            Word::Check => "check",
            Word::Status => "status",
            Word::Tail => "tail",
            Word::Compare => "compare",
            Word::Unpark => "unpark",
        }
    }

    /// The command with this name.
    pub fn find(name: &str) -> Option<Word> {
        Word::ALL.into_iter().find(|word| word.name() == name)
    }

    /// Its own flags, for a person.
    pub fn info(self) -> CommandInfoWithArgs {
        match self {
            Word::Setup => Setup::get_args_info(),
            Word::Teardown => Teardown::get_args_info(),
            Word::Check => Check::get_args_info(),
            Word::Status => Status::get_args_info(),
            Word::Tail => Tail::get_args_info(),
            Word::Compare => Compare::get_args_info(),
            Word::Unpark => Unpark::get_args_info(),
        }
    }

    /// Reads its own flags.
    pub(super) fn read(self, command_name: &[&str], args: &[&str]) -> Result<Command, EarlyExit> {
        Ok(match self {
            Word::Setup => Command::Setup(Setup::from_args(command_name, args)?),
            Word::Teardown => Command::Teardown(Teardown::from_args(command_name, args)?),
            Word::Check => Command::Check(Check::from_args(command_name, args)?),
            Word::Status => Command::Status(Status::from_args(command_name, args)?),
            Word::Tail => Command::Tail(Tail::from_args(command_name, args)?),
            Word::Compare => Command::Compare(Compare::from_args(command_name, args)?),
            Word::Unpark => Command::Unpark(Unpark::from_args(command_name, args)?),
        })
    }
}

/// Creates what the relay needs and says what it created or found: table, publication, slot, stream, checkpoint
/// bucket. What is there is neither altered nor dropped; only an aggregate that setup made gets another source.
#[derive(FromArgs, ArgsInfo, Default)]
#[argh(
    help_triggers("--help", "-h"),
    usage = "[flags]",
    note = "With several tables, name each by --table; without one it is outbox.",
    example = "{command_name} --db postgres://postgres@db.example.com/shop --nats nats://nats.example.com\n{command_name} --print-sql",
    error_code(0, "everything is there"),
    error_code(78, "something differs, or may not be created")
)]
pub struct Setup {
    /// create the slot so that standbys take it over; Postgres 17 or later (default off)
    #[argh(switch)]
    pub failover: bool,
    /// name of a stream that has to be created (default: the slot's name)
    #[argh(option)]
    pub stream: Option<String>,
    /// copies of a stream that has to be created, 1 to 5 (default 1)
    #[argh(option)]
    pub replicas: Option<String>,
    /// messages of a stream that has to be created are dropped at this age (default never)
    #[argh(option)]
    pub max_age: Option<String>,
    /// most bytes that a stream that has to be created may hold, such as 10GB; its oldest messages are dropped (default no limit)
    #[argh(option)]
    pub max_bytes: Option<String>,
    /// how long a stream that has to be created remembers message ids, from 100ms on (default 2m)
    #[argh(option)]
    pub duplicate_window: Option<String>,
    /// name of a stream that copies from the relay's, and from those of other relays; created or extended (default none)
    #[argh(option)]
    pub aggregate: Option<String>,
    /// prefix that the relay's events have in the aggregate in place of their own (default their own)
    #[argh(option)]
    pub aggregate_prefix: Option<String>,
    /// the relay's role in Postgres, for --print-sql (default relay)
    #[argh(option)]
    pub role: Option<String>,
    /// only print what a database administrator has to run; nothing is connected to, no --db is needed (default off)
    #[argh(switch)]
    pub print_sql: bool,
    /// only print what a NATS administrator has to allow and create; nothing is connected to, no --db is needed (default off)
    #[argh(switch)]
    pub print_nats: bool,
}

/// Removes the slot and the publication, so that no orphaned slot fills the disk. Table, streams and checkpoint stay.
#[derive(FromArgs, ArgsInfo, Default)]
#[argh(
    help_triggers("--help", "-h"),
    usage = "[flags]",
    error_code(0, "neither exists any more"),
    error_code(64, "--yes was not given; nothing was removed"),
    error_code(75, "a relay uses the slot; nothing was removed")
)]
pub struct Teardown {
    /// do it; what the slot has not sent by then is never published (default off)
    #[argh(switch)]
    pub yes: bool,
}

/// Looks for what keeps the relay from working or its promises from holding, on both sides. Changes nothing.
#[derive(FromArgs, ArgsInfo, Default)]
#[argh(
    help_triggers("--help", "-h"),
    usage = "[flags]",
    note = "To try the permission to publish, an empty message that every stream must refuse is sent under the prefix.",
    error_code(0, "nothing is wrong"),
    error_code(1, "there are warnings (with --strict)"),
    error_code(2, "something is wrong")
)]
pub struct Check {
    /// print JSON (default off)
    #[argh(switch)]
    pub json: bool,
    /// exit 1 when there are warnings (default off)
    #[argh(switch)]
    pub strict: bool,
    /// look at this stream, too, which copies from the relay's (default none)
    #[argh(option)]
    pub aggregate: Option<String>,
}

/// Tells where the slot and the streams stand, whether a relay runs or not. Changes nothing.
#[derive(FromArgs, ArgsInfo, Default)]
#[argh(
    help_triggers("--help", "-h"),
    usage = "[flags]",
    example = "{command_name} --max-lag-bytes 100000000 --max-lag-seconds 300",
    error_code(0, "below the limits, or none was given"),
    error_code(1, "a lag is above its limit, or unknown"),
    error_code(69, "a server could not be reached"),
    error_code(78, "there is no slot, or something may not be read")
)]
pub struct Status {
    /// print JSON (default off)
    #[argh(switch)]
    pub json: bool,
    /// print anew each second, until interrupted (default off)
    #[argh(switch)]
    pub watch: bool,
    /// exit 1 when more bytes of log than this wait to be published (default: no limit)
    #[argh(option)]
    pub max_lag_bytes: Option<String>,
    /// exit 1 when the oldest event that waits to be published was committed more seconds ago than this (default: no limit)
    #[argh(option)]
    pub max_lag_seconds: Option<String>,
}

/// Prints events as they stand in the stream, without a consumer: nobody else is disturbed.
#[derive(FromArgs, ArgsInfo, Default)]
#[argh(
    help_triggers("--help", "-h"),
    usage = "[flags]",
    note = "Postgres is not needed, nor --db. With several streams under the subject, events are merged by their time.",
    example = "{command_name} --from end --follow\n{command_name} --from 2026-11-23T11:00:00Z --count 10 --json",
    error_code(0, "printed"),
    error_code(69, "NATS could not be reached"),
    error_code(78, "no stream captures the subject, or it may not be read")
)]
pub struct Tail {
    /// where to begin: start, end, a sequence, a time like 2026-11-23T11:00:00Z, or an age like 10m (default start)
    #[argh(option)]
    pub from: Option<String>,
    /// only events of this subject; * and > are wildcards (default: all under the prefix)
    #[argh(option)]
    pub subject: Option<String>,
    /// go on with what comes, until interrupted (default off)
    #[argh(switch)]
    pub follow: bool,
    /// end after so many events (default: no limit)
    #[argh(option)]
    pub count: Option<String>,
    /// print one JSON object a line (default off)
    #[argh(switch)]
    pub json: bool,
}

/// Answers whether anything is missing: compares the rows of the outboxes, and what the WAL of the slot still has, with the
/// streams. Changes nothing, unless it is told to publish what is missing.
#[derive(FromArgs, ArgsInfo, Default)]
#[argh(
    help_triggers("--help", "-h"),
    usage = "[flags]",
    note = "Every message of the streams under the prefix is read once.",
    example = "{command_name}\n{command_name} --where \"created_at > now() - interval '1 day'\" --json",
    error_code(0, "nothing is missing, there twice, out of order or of another body"),
    error_code(1, "something is, or it cannot be told"),
    error_code(69, "a server could not be reached, or the backlog is too long"),
    error_code(78, "something may not be read, or cannot be published")
)]
pub struct Compare {
    /// print one JSON object a line (default off)
    #[argh(switch)]
    pub json: bool,
    /// only rows for which this SQL condition holds, all of which the streams must still have (default: all rows)
    #[argh(option, long = "where")]
    pub rows: Option<String>,
    /// publish what is missing, by way of Postgres and the relay; needs messages, Postgres 14 and later (default off)
    #[argh(switch)]
    pub publish: bool,
}

/// Publishes parked events, by way of Postgres and the relay, once what stopped them is mended.
#[derive(FromArgs, ArgsInfo, Default)]
#[argh(
    help_triggers("--help", "-h"),
    usage = "[flags]",
    note = "One of --id, --cause and --all is needed. What is in a stream, or on its way there, is not published again.",
    example = "{command_name} --cause 'larger than' --print-sql\n{command_name} --all",
    error_code(0, "all that were chosen are published, or were before"),
    error_code(1, "some were left; each line says why"),
    error_code(64, "none of --id, --cause and --all was given"),
    error_code(69, "a server could not be reached"),
    error_code(78, "something may not be read, or cannot be published")
)]
pub struct Unpark {
    /// the parked event with this id (default none)
    #[argh(option)]
    pub id: Option<String>,
    /// parked events whose cause, Outbox-Parked, has this text in it (default none)
    #[argh(option)]
    pub cause: Option<String>,
    /// all parked events (default off)
    #[argh(switch)]
    pub all: bool,
    /// only print the statements that would publish them (default off)
    #[argh(switch)]
    pub print_sql: bool,
}
