//! Parse, start the logger, run, exit code; nothing else.

use jetstream_outbox::cli::{self, Invocation, PROGRAM};
use jetstream_outbox::config::{Config, ConfigError, unknown_variables};
use jetstream_outbox::exit::Exit;
use jetstream_outbox::relay::{self, vitals::Vitals};
#[cfg(feature = "admin")]
use jetstream_outbox::{admin, config::operation::Operation};
use jetstream_outbox::{logging, observe};
use std::io::{self, Write};
use std::panic::{self, AssertUnwindSafe};
use std::process::ExitCode;
use std::sync::Arc;

fn main() -> ExitCode {
    match cli::parse(std::env::args_os().skip(1)) {
        Ok(Invocation::Relay(cli)) => run(*cli),
        #[cfg(feature = "admin")]
        Ok(Invocation::Command(cli, command)) => operate(*cli, command),
        Ok(Invocation::Print(text)) => {
            // a reader that went away (`--help | head -1`) is no failure
            let _ = io::stdout().write_all(text.as_bytes());
            Exit::Done
        }
        Err(error) => refuse(
            &error,
            &format!("{PROGRAM} --help lists every flag"),
            Exit::Usage,
        ),
    }
    .into()
}

/// From flags and environment.
fn load(cli: &cli::Cli) -> Result<Config, ConfigError> {
    let env = |name: &str| Some(std::env::var_os(name)?.to_string_lossy().into_owned());
    let mut config = Config::load(cli, &env)?;
    let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    config.warnings.extend(unknown_variables(names));
    Ok(config)
}

fn run(cli: cli::Cli) -> Exit {
    let loaded = load(&cli).and_then(|config| {
        config.require_database()?;
        Ok(config)
    });
    let config = match loaded {
        Ok(config) => config,
        Err(error) => return refuse(&error, &error.remedy(), error.exit()),
    };
    if let Err(error) = logging::init(&config.log) {
        return refuse(&error, "the log could not be started", Exit::Internal);
    }
    config.announce();
    let vitals = Arc::new(Vitals::default());
    if let Err(error) = observe::start(&config, &vitals) {
        log::error!(code = Exit::Configuration as u8; "{error}");
        logging::flush();
        return Exit::Configuration;
    }
    // the panic hook has logged it
    let relay = AssertUnwindSafe(|| relay::run(config, &vitals));
    let exit = panic::catch_unwind(relay).unwrap_or(Exit::Internal);
    observe::stopping();
    logging::flush();
    exit
}

/// An operator's command: what it finds goes to standard output, the log to standard error.
#[cfg(feature = "admin")]
fn operate(cli: cli::Cli, command: cli::commands::Command) -> Exit {
    let loaded = load(&cli).and_then(|config| {
        let operation = Operation::load(command, &config)?;
        if operation.needs_database() {
            config.require_database()?;
        }
        Ok((operation, config))
    });
    let (operation, config) = match loaded {
        Ok(loaded) => loaded,
        Err(error) => return refuse(&error, &error.remedy(), error.exit()),
    };
    if let Err(error) = logging::init(&config.log) {
        return refuse(&error, "the log could not be started", Exit::Internal);
    }
    for warning in &config.warnings {
        log::warn!("{warning}");
    }
    let exit = panic::catch_unwind(|| admin::run(&config, operation));
    logging::flush();
    match exit {
        Ok(Ok(exit)) => exit,
        // the reader of our output has seen enough
        Ok(Err(error)) if error.is_closed_output() => Exit::Done,
        Ok(Err(error)) => refuse(&error, &error.remedy(), error.exit()),
        // the panic hook has logged it
        Err(_) => Exit::Internal,
    }
}

/// Without the log: what is wrong, and on the last line what to do.
fn refuse(error: &dyn std::error::Error, remedy: &str, exit: Exit) -> Exit {
    // a closed standard error leaves the exit code
    let _ = writeln!(io::stderr(), "{PROGRAM}: {error}\n{remedy}");
    exit
}
