//! Where a setting comes from: its flag, else its environment variable, else its default. An empty variable
//! counts as none.

use super::ConfigError;
use crate::outbox::template;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// What a flag is when neither it nor its variable is given; a flag that is not here is then off or absent.
pub(super) const DEFAULTS: [(&str, &str); 21] = [
    ("nats", "localhost"),
    ("nats-connect-timeout", "5s"),
    ("nats-api-prefix", "$JS.API"),
    ("prefix", "events"),
    ("slot", "jetstream_outbox"),
    ("id-column", "id"),
    ("aggregatetype-column", "aggregatetype"),
    ("aggregateid-column", "aggregateid"),
    ("payload-column", "payload"),
    ("subject", template::DEFAULT),
    ("on-bad-subject", "encode"),
    ("on-bad-header", "encode"),
    ("on-poison", "stop"),
    ("inflight", "3072"),
    ("ack-timeout", "5s"),
    ("max-outage", "never"),
    ("delivery", "exactly-once"),
    ("hold-back", "150s"),
    ("checkpoint", "jetstream_outbox"),
    ("logging", "info"),
    ("log-format", "text"),
];

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    Flag,
    Environment,
    File,
    Default,
}

/// A value with the name to blame for it.
pub(super) struct Setting {
    pub(super) flag: &'static str,
    pub(super) origin: Origin,
    pub(super) value: String,
}

pub(super) struct Sources<'a> {
    pub(super) env: &'a dyn Fn(&str) -> Option<String>,
}

/// The environment variable of a flag.
pub(super) fn variable(flag: &str) -> String {
    format!(
        "JETSTREAM_OUTBOX_{}",
        flag.to_ascii_uppercase().replace('-', "_")
    )
}

impl Sources<'_> {
    pub(super) fn environment(&self, flag: &'static str) -> Option<Setting> {
        let value = (self.env)(&variable(flag)).filter(|value| !value.is_empty())?;
        Some(Setting {
            flag,
            origin: Origin::Environment,
            value,
        })
    }

    pub(super) fn text(&self, flag: &'static str, given: Option<String>) -> Setting {
        let given = given.map(|value| Setting {
            flag,
            origin: Origin::Flag,
            value,
        });
        given.or_else(|| self.environment(flag)).unwrap_or_else(|| {
            let default = DEFAULTS.iter().find(|(name, _)| *name == flag);
            Setting {
                flag,
                origin: Origin::Default,
                value: default.map_or("", |(_, value)| value).to_string(),
            }
        })
    }

    pub(super) fn switch(&self, flag: &'static str, given: bool) -> Result<bool, ConfigError> {
        match self.environment(flag) {
            Some(setting) if !given => {
                setting.parse(|text| match text.to_ascii_lowercase().as_str() {
                    "1" | "true" | "yes" | "on" => Ok(true),
                    "0" | "false" | "no" | "off" => Ok(false),
                    _ => Err("is neither true nor false".to_string()),
                })
            }
            _ => Ok(given),
        }
    }

    pub(super) fn file(
        &self,
        flag: &'static str,
        given: Option<String>,
    ) -> Result<Option<PathBuf>, ConfigError> {
        let setting = self.text(flag, given);
        if setting.value.is_empty() {
            return Ok(None);
        }
        let path = PathBuf::from(&setting.value);
        match check_readable(&path) {
            Ok(()) => Ok(Some(path)),
            Err(source) => Err(ConfigError::File {
                setting: setting.name(),
                path,
                source,
            }),
        }
    }
}

impl Sources<'_> {
    /// As [`Sources::file`], and without one the file of that name that systemd's `LoadCredential=` has put
    /// where `$CREDENTIALS_DIRECTORY` says.
    pub(super) fn credential(
        &self,
        flag: &'static str,
        given: Option<String>,
        name: &str,
    ) -> Result<Option<PathBuf>, ConfigError> {
        let file = self.file(flag, given)?;
        let loaded = || {
            let folder = (self.env)("CREDENTIALS_DIRECTORY")?;
            Some(Path::new(&folder).join(name)).filter(|path| path.exists())
        };
        Ok(file.or_else(loaded))
    }
}

impl Setting {
    /// As the operator spelled it.
    pub(super) fn name(&self) -> String {
        match self.origin {
            Origin::Environment => variable(self.flag),
            Origin::Flag | Origin::File | Origin::Default => format!("-{}", self.flag),
        }
    }

    /// Turns the text into what it means. The error completes a sentence that begins with the value.
    pub(super) fn parse<T>(
        self,
        read: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<T, ConfigError> {
        read(&self.value).map_err(|reason| ConfigError::Value {
            setting: self.name(),
            value: Some(self.value),
            reason,
        })
    }

    /// As [`Setting::parse`], for a value that the error must not show.
    pub(super) fn secret<T>(
        self,
        read: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<T, ConfigError> {
        read(&self.value).map_err(|reason| ConfigError::Value {
            setting: self.name(),
            value: None,
            reason,
        })
    }

    /// Keeps the text as it is when `check` has nothing against it.
    pub(super) fn check(
        self,
        check: fn(&str) -> Result<(), String>,
    ) -> Result<String, ConfigError> {
        self.parse(|text| check(text).map(|()| text.to_string()))
    }

    /// As [`Setting::check`], of a setting that may be absent: `None` when it is neither given nor has a default.
    pub(super) fn optional(
        self,
        check: fn(&str) -> Result<(), String>,
    ) -> Result<Option<String>, ConfigError> {
        match self.value.as_str() {
            "" => Ok(None),
            _ => self.check(check).map(Some),
        }
    }

    /// Picks the choice that is displayed as the text, in lower case.
    pub(super) fn one_of<T: Copy + ToString>(self, choices: &[T]) -> Result<T, ConfigError> {
        let name = |choice: &T| choice.to_string().to_ascii_lowercase();
        self.parse(
            |text| match choices.iter().find(|choice| name(choice) == text) {
                Some(choice) => Ok(*choice),
                None => {
                    let names: Vec<String> = choices.iter().map(name).collect();
                    Err(format!("is not one of {}", names.join(", ")))
                }
            },
        )
    }
}

/// What a file with a secret holds, without white space around it, and a warning if others can read it.
pub(super) fn read_secret(path: &Path) -> io::Result<(String, Option<String>)> {
    let text = fs::read_to_string(path)?.trim().to_string();
    let mode = fs::metadata(path)?.permissions().mode();
    let open = (mode & 0o077 != 0).then(|| {
        let path = path.display();
        format!("{path} holds a secret, and others than its owner may read it: chmod 0600 {path}")
    });
    Ok((text, open))
}

fn check_readable(path: &Path) -> io::Result<()> {
    match fs::metadata(path)? {
        about if about.is_dir() => Err(io::ErrorKind::IsADirectory.into()),
        // a pipe is not opened: that may wait for its writer, and takes the bytes away from the one who reads it
        about if about.is_file() => File::open(path).map(drop),
        _ => Ok(()),
    }
}
