//! Where a setting comes from: its flag, else its environment variable, else its default. An empty variable
//! counts as none.
//!
//! What is read here is remembered for the start-up line, so that a flag's name, variable and default stand in one place:
//! the line of [`super::Config::load`] that reads it. [`Sources::secret`] is for what no log may show.

use super::ConfigError;
use std::cell::RefCell;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

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
    env: &'a dyn Fn(&str) -> Option<String>,
    shown: RefCell<Vec<(&'static str, String)>>,
}

/// The environment variable of a flag.
pub(super) fn variable(flag: &str) -> String {
    format!(
        "JETSTREAM_OUTBOX_{}",
        flag.to_ascii_uppercase().replace('-', "_")
    )
}

impl<'a> Sources<'a> {
    pub(super) fn new(env: &'a dyn Fn(&str) -> Option<String>) -> Sources<'a> {
        Sources {
            env,
            shown: RefCell::default(),
        }
    }

    /// What was read, as the start-up line shows it.
    pub(super) fn into_shown(self) -> Vec<(&'static str, String)> {
        self.shown.into_inner()
    }

    /// Shows this for the flag; what is empty is left out.
    pub(super) fn show(&self, flag: &'static str, value: &str) {
        if !value.is_empty() {
            self.shown.borrow_mut().push((flag, value.to_string()));
        }
    }

    /// A variable of the environment by its whole name.
    pub(super) fn variable(&self, name: &str) -> Option<String> {
        (self.env)(name)
    }

    /// What the flag's own variable says.
    pub(super) fn environment(&self, flag: &'static str) -> Option<Setting> {
        let value = (self.env)(&variable(flag)).filter(|value| !value.is_empty())?;
        Some(Setting {
            flag,
            origin: Origin::Environment,
            value,
        })
    }

    /// A setting that the start-up line does not show as it was given.
    pub(super) fn secret(
        &self,
        flag: &'static str,
        given: Option<&String>,
        default: &str,
    ) -> Setting {
        let given = given.map(|value| Setting {
            flag,
            origin: Origin::Flag,
            value: value.clone(),
        });
        let default = || Setting {
            flag,
            origin: Origin::Default,
            value: default.to_string(),
        };
        given
            .or_else(|| self.environment(flag))
            .unwrap_or_else(default)
    }

    /// A setting; an empty `default`: it may be absent.
    pub(super) fn text(
        &self,
        flag: &'static str,
        given: &Option<String>,
        default: &str,
    ) -> Setting {
        let setting = self.secret(flag, given.as_ref(), default);
        self.show(flag, &setting.value);
        setting
    }

    /// A setting of several values.
    pub(super) fn list(&self, flag: &'static str, given: &[String]) -> Setting {
        let given = Some(given.join(",")).filter(|list| !list.is_empty());
        self.text(flag, &given, "")
    }

    pub(super) fn switch(&self, flag: &'static str, given: bool) -> Result<bool, ConfigError> {
        let is_on = match self.environment(flag) {
            Some(setting) if !given => {
                setting.parse(|text| match text.to_ascii_lowercase().as_str() {
                    "1" | "true" | "yes" | "on" => Ok(true),
                    "0" | "false" | "no" | "off" => Ok(false),
                    _ => Err("is neither true nor false".to_string()),
                })?
            }
            _ => given,
        };
        self.show(flag, if is_on { "true" } else { "" });
        Ok(is_on)
    }

    pub(super) fn file(
        &self,
        flag: &'static str,
        given: &Option<String>,
    ) -> Result<Option<PathBuf>, ConfigError> {
        let setting = self.text(flag, given, "");
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

    /// As [`Sources::file`], and without one the file of that name that systemd's `LoadCredential=` has put
    /// where `$CREDENTIALS_DIRECTORY` says.
    pub(super) fn credential(
        &self,
        flag: &'static str,
        given: &Option<String>,
        name: &str,
    ) -> Result<Option<PathBuf>, ConfigError> {
        let file = self.file(flag, given)?;
        let loaded = || {
            let folder = (self.env)("CREDENTIALS_DIRECTORY")?;
            let path = Path::new(&folder).join(name);
            path.exists().then(|| {
                self.show(flag, &path.display().to_string());
                path
            })
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
