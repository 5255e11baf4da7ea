//! From keywords and environment to a [`ConnInfo`]: defaults, numbers, words, and what contradicts what.

use super::{
    Address, AuthMethod, ChannelBindingMode, ConnInfo, ConnInfoError, DEFAULT_SOCKET_DIRECTORY,
    Host, Keepalives, OptionalFile, Roots, SslMode, TargetSessionAttrs, TlsInfo, TlsVersion,
};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

const DEFAULT_PORT: u16 = 5432;

/// The parameters that are understood, each with the environment variable that stands in for it.
const PARAMETERS: &[(&str, &str)] = &[
    ("host", "PGHOST"),
    ("hostaddr", "PGHOSTADDR"),
    ("port", "PGPORT"),
    ("user", "PGUSER"),
    ("password", "PGPASSWORD"),
    ("passfile", "PGPASSFILE"),
    ("dbname", "PGDATABASE"),
    ("connect_timeout", "PGCONNECT_TIMEOUT"),
    ("target_session_attrs", "PGTARGETSESSIONATTRS"),
    ("load_balance_hosts", "PGLOADBALANCEHOSTS"),
    ("keepalives", ""),
    ("keepalives_idle", ""),
    ("keepalives_interval", ""),
    ("keepalives_count", ""),
    ("tcp_user_timeout", ""),
    ("application_name", "PGAPPNAME"),
    ("fallback_application_name", ""),
    ("options", "PGOPTIONS"),
    ("sslmode", "PGSSLMODE"),
    ("sslrootcert", "PGSSLROOTCERT"),
    ("sslcert", "PGSSLCERT"),
    ("sslkey", "PGSSLKEY"),
    ("sslsni", "PGSSLSNI"),
    ("ssl_min_protocol_version", "PGSSLMINPROTOCOLVERSION"),
    ("ssl_max_protocol_version", "PGSSLMAXPROTOCOLVERSION"),
    ("channel_binding", "PGCHANNELBINDING"),
    ("require_auth", "PGREQUIREAUTH"),
    ("client_encoding", ""),
    ("gssencmode", "PGGSSENCMODE"),
    ("replication", ""),
];

/// Parameters of libpq that say something we cannot do; to ignore them could weaken what was asked for.
const UNSUPPORTED: &[&str] = &[
    "gssdelegation",
    "gsslib",
    "krbsrvname",
    "max_protocol_version",
    "min_protocol_version",
    "requirepeer",
    "scram_client_key",
    "scram_server_key",
    "service",
    "servicefile",
    "sslcertmode",
    "sslcompression",
    "sslcrl",
    "sslcrldir",
    "sslkeylogfile",
    "sslnegotiation",
    "sslpassword",
];

/// The environment variables that libpq takes for such parameters, each with the value that is libpq's default.
const UNSUPPORTED_VARIABLES: &[(&str, &str)] = &[
    ("PGREQUIREPEER", ""),
    ("PGREQUIRESSL", "0"),
    ("PGSERVICE", ""),
    ("PGSSLCERTMODE", "allow"),
    ("PGSSLCRL", ""),
    ("PGSSLCRLDIR", ""),
    ("PGSSLNEGOTIATION", "postgres"),
];

/// The parameter of that name.
pub(super) fn keyword(name: &str) -> Result<&'static str, ConnInfoError> {
    if let Some((keyword, _)) = PARAMETERS.iter().find(|(keyword, _)| *keyword == name) {
        return Ok(keyword);
    }
    let is_word = name.len() <= 40 && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    Err(match UNSUPPORTED.iter().find(|other| **other == name) {
        Some(other) => ConnInfoError::UnsupportedParameter(other),
        None if is_word => ConnInfoError::UnknownParameter(name.to_string()),
        // a URL with another scheme, say, with the password in it
        None => ConnInfoError::NotAParameter,
    })
}

/// The values that were given, over those of the environment. An empty one is as good as none.
struct Values<'a> {
    given: BTreeMap<&'static str, String>,
    env: &'a dyn Fn(&str) -> Option<String>,
}

impl Values<'_> {
    fn get(&self, keyword: &'static str) -> Option<String> {
        let from_env = || {
            let (_, variable) = PARAMETERS.iter().find(|(name, _)| *name == keyword)?;
            (self.env)(variable).filter(|_| !variable.is_empty())
        };
        let value = match self.given.get(keyword) {
            Some(value) => Some(value.clone()),
            None => from_env(),
        };
        value.filter(|value| !value.is_empty())
    }

    /// One of some words; `default` if it is not given.
    fn word<T: Copy>(
        &self,
        keyword: &'static str,
        words: &[(&str, T)],
        expected: &'static str,
        default: T,
    ) -> Result<T, ConnInfoError> {
        let Some(value) = self.get(keyword) else {
            return Ok(default);
        };
        match words.iter().find(|(word, _)| *word == value) {
            Some((_, meaning)) => Ok(*meaning),
            None => Err(bad_value(keyword, value, expected)),
        }
    }

    /// A whole number; `None` if it is not given or means "leave it to the default": zero or less.
    fn number(&self, keyword: &'static str) -> Result<Option<u32>, ConnInfoError> {
        let Some(value) = self.get(keyword) else {
            return Ok(None);
        };
        match value.trim().parse::<i32>() {
            Ok(number) => Ok(u32::try_from(number).ok().filter(|number| *number > 0)),
            Err(_) => Err(bad_value(keyword, value, "a whole number")),
        }
    }

    fn seconds(&self, keyword: &'static str) -> Result<Option<Duration>, ConnInfoError> {
        Ok(self.number(keyword)?.map(|s| Duration::from_secs(s.into())))
    }

    fn list(&self, keyword: &'static str) -> Vec<String> {
        let value = self.get(keyword).unwrap_or_default();
        match value.as_str() {
            "" => Vec::new(),
            list => list.split(',').map(|one| one.trim().to_string()).collect(),
        }
    }

    /// The named file, or `name` in the home directory's `.postgresql`.
    fn file(&self, keyword: &'static str, name: &str) -> OptionalFile {
        match self.get(keyword) {
            Some(path) => OptionalFile::Named(path.into()),
            None => {
                OptionalFile::Default(self.home().map(|home| home.join(".postgresql").join(name)))
            }
        }
    }

    fn home(&self) -> Option<PathBuf> {
        let from_env = (self.env)("HOME").filter(|home| !home.is_empty());
        from_env.or_else(|| os_account()?.home).map(PathBuf::from)
    }
}

fn bad_value(parameter: &'static str, value: String, expected: &'static str) -> ConnInfoError {
    ConnInfoError::BadValue {
        parameter,
        value,
        expected,
    }
}

pub(super) fn resolve(
    given: BTreeMap<&'static str, String>,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<ConnInfo, ConnInfoError> {
    let password_inline = given.get("password").is_some_and(|value| !value.is_empty());
    let values = Values { given, env };

    let has_nul = |(_, value): (_, &String)| value.contains('\0');
    if values.given.iter().any(has_nul) {
        return Err(ConnInfoError::Conflict("a value contains a zero byte"));
    }
    let is_set = |(variable, default): &&(&'static str, &str)| {
        env(variable).is_some_and(|value| !value.is_empty() && value != *default)
    };
    if let Some((variable, _)) = UNSUPPORTED_VARIABLES.iter().find(is_set) {
        return Err(ConnInfoError::UnsupportedParameter(variable));
    }
    values.word(
        "gssencmode",
        &[("disable", ()), ("prefer", ())],
        "disable or prefer, because this program has no GSS",
        (),
    )?;
    values.word(
        "client_encoding",
        &["auto", "UTF8", "utf8", "UTF-8", "utf-8"].map(|name| (name, ())),
        "UTF8 or auto",
        (),
    )?;

    let user = match values.get("user") {
        Some(user) => user,
        None => os_user(env).ok_or(ConnInfoError::NoUser)?,
    };
    let keepalives = Keepalives {
        idle: values.seconds("keepalives_idle")?,
        interval: values.seconds("keepalives_interval")?,
        count: values.number("keepalives_count")?,
    };
    let switch = |keyword| values.word(keyword, &[("0", false), ("1", true)], "0 or 1", true);
    Ok(ConnInfo {
        hosts: hosts(&values)?,
        dbname: values.get("dbname").unwrap_or_else(|| user.clone()),
        user,
        password: values.get("password"),
        password_inline,
        file: None,
        passfile: match values.get("passfile") {
            Some(path) => Some(path.into()),
            None => values.home().map(|home| home.join(".pgpass")),
        },
        application_name: values
            .get("application_name")
            .or_else(|| values.get("fallback_application_name"))
            // with the version, so that whoever looks at pg_stat_activity knows which relay runs
            .unwrap_or_else(|| concat!("jetstream-outbox ", env!("CARGO_PKG_VERSION")).into()),
        options: values.get("options"),
        connect_timeout: values.seconds("connect_timeout")?,
        target_session_attrs: values.word(
            "target_session_attrs",
            &[
                TargetSessionAttrs::Any,
                TargetSessionAttrs::ReadWrite,
                TargetSessionAttrs::ReadOnly,
                TargetSessionAttrs::Primary,
                TargetSessionAttrs::Standby,
                TargetSessionAttrs::PreferStandby,
            ]
            .map(|attrs| (attrs.to_string(), attrs))
            .each_ref()
            .map(|(name, attrs)| (name.as_str(), *attrs)),
            "any, read-write, read-only, primary, standby or prefer-standby",
            TargetSessionAttrs::Any,
        )?,
        load_balance: values.word(
            "load_balance_hosts",
            &[("disable", false), ("random", true)],
            "disable or random",
            false,
        )?,
        keepalives: switch("keepalives")?.then_some(keepalives),
        tcp_user_timeout: values
            .number("tcp_user_timeout")?
            .map(|ms| Duration::from_millis(ms.into())),
        tls: tls(&values)?,
        channel_binding: values.word(
            "channel_binding",
            &[
                ("disable", ChannelBindingMode::Disable),
                ("prefer", ChannelBindingMode::Prefer),
                ("require", ChannelBindingMode::Require),
            ],
            "disable, prefer or require",
            ChannelBindingMode::Prefer,
        )?,
        require_auth: require_auth(&values)?,
        replication: true,
    })
}

/// Pairs hosts, addresses and ports by their place in the lists.
fn hosts(values: &Values<'_>) -> Result<Vec<Host>, ConnInfoError> {
    let names = values.list("host");
    let addrs = values.list("hostaddr");
    let ports = values.list("port");
    if !names.is_empty() && !addrs.is_empty() && names.len() != addrs.len() {
        return Err(ConnInfoError::Conflict(
            "host and hostaddr list different numbers of servers",
        ));
    }
    let count = names.len().max(addrs.len()).max(1);
    if ports.len() > 1 && ports.len() != count {
        return Err(ConnInfoError::Conflict(
            "port lists neither one port nor one for each host",
        ));
    }
    let port = |i: usize| {
        let text = ports.get(i).or(ports.first().filter(|_| ports.len() == 1));
        match text.map(String::as_str) {
            None | Some("") => Ok(DEFAULT_PORT),
            Some(text) => match text.parse() {
                Ok(port) if port > 0 => Ok(port),
                _ => Err(ConnInfoError::BadPort),
            },
        }
    };
    let address = |i: usize| {
        let given = |list: &[String]| list.get(i).filter(|one| !one.is_empty()).cloned();
        let addr = match given(&addrs) {
            None => None,
            Some(text) => match text.parse::<IpAddr>() {
                Ok(addr) => Some(addr),
                Err(_) => return Err(bad_value("hostaddr", text, "an IP address")),
            },
        };
        Ok(match (given(&names), addr) {
            (Some(name), addr) if addr.is_some() || !name.starts_with(['/', '@']) => {
                Address::Tcp { name, addr }
            }
            (None, Some(addr)) => Address::Tcp {
                name: addr.to_string(),
                addr: Some(addr),
            },
            (directory, _) => Address::Unix {
                directory: directory.unwrap_or_else(|| DEFAULT_SOCKET_DIRECTORY.into()),
            },
        })
    };
    (0..count)
        .map(|i| {
            Ok(Host {
                address: address(i)?,
                port: port(i)?,
            })
        })
        .collect()
}

fn tls(values: &Values<'_>) -> Result<TlsInfo, ConnInfoError> {
    let system = values.get("sslrootcert").as_deref() == Some("system");
    let mode = values.word(
        "sslmode",
        &[
            SslMode::Disable,
            SslMode::Allow,
            SslMode::Prefer,
            SslMode::Require,
            SslMode::VerifyCa,
            SslMode::VerifyFull,
        ]
        .map(|mode| (mode.name(), mode)),
        "disable, allow, prefer, require, verify-ca or verify-full",
        if system {
            SslMode::VerifyFull
        } else {
            SslMode::Prefer
        },
    )?;
    if system && mode != SslMode::VerifyFull {
        // anybody can get a certificate that the system trusts; only the name tells whose it is
        return Err(ConnInfoError::Conflict(
            "sslrootcert=system needs sslmode=verify-full",
        ));
    }
    // rustls speaks nothing older than 1.2, so lower minimums are met
    let version = |keyword, oldest: &[(&str, TlsVersion)], default| {
        let known = [
            ("TLSv1.2", TlsVersion::Tls12),
            ("TLSv1.3", TlsVersion::Tls13),
        ];
        values.word(
            keyword,
            &[oldest, &known].concat(),
            "TLSv1.2 or TLSv1.3",
            default,
        )
    };
    let older = [("TLSv1", TlsVersion::Tls12), ("TLSv1.1", TlsVersion::Tls12)];
    let min_version = version("ssl_min_protocol_version", &older, TlsVersion::Tls12)?;
    let max_version = version("ssl_max_protocol_version", &[], TlsVersion::Tls13)?;
    if min_version > max_version {
        return Err(ConnInfoError::Conflict(
            "ssl_min_protocol_version is above ssl_max_protocol_version",
        ));
    }
    Ok(TlsInfo {
        mode,
        roots: match system {
            true => Roots::System,
            false => Roots::File(values.file("sslrootcert", "root.crt")),
        },
        certificate: values.file("sslcert", "postgresql.crt"),
        key: values.file("sslkey", "postgresql.key"),
        sni: values.word("sslsni", &[("0", false), ("1", true)], "0 or 1", true)?,
        min_version,
        max_version,
    })
}

/// A list of methods, or of methods with `!` before each, which allows the others.
fn require_auth(values: &Values<'_>) -> Result<Option<Vec<AuthMethod>>, ConnInfoError> {
    const ALL: [AuthMethod; 4] = [
        AuthMethod::Password,
        AuthMethod::Md5,
        AuthMethod::Scram,
        AuthMethod::None,
    ];
    let list = values.list("require_auth");
    if list.is_empty() {
        return Ok(None);
    }
    let negated = list.iter().all(|one| one.starts_with('!'));
    let mut named = Vec::new();
    for one in &list {
        let name = if negated {
            one.get(1..).unwrap_or_default()
        } else {
            one
        };
        match ALL.iter().find(|method| method.name() == name) {
            Some(method) => named.push(*method),
            None if matches!(name, "gss" | "sspi") => {}
            None => {
                return Err(bad_value(
                    "require_auth",
                    list.join(","),
                    "a list of password, md5, scram-sha-256 and none, with `!` before all of them or before none",
                ));
            }
        }
    }
    let allowed = |method: &AuthMethod| named.contains(method) != negated;
    Ok(Some(ALL.into_iter().filter(allowed).collect()))
}

/// libpq asks the system who runs the program; the environment may still tell of the one who started it.
fn os_user(env: &dyn Fn(&str) -> Option<String>) -> Option<String> {
    let from_env = |name: &str| env(name).filter(|user| !user.is_empty());
    let account = os_account().map(|account| account.user);
    account
        .or_else(|| from_env("USER"))
        .or_else(|| from_env("LOGNAME"))
}

#[derive(Debug, PartialEq, Eq)]
struct Account {
    user: String,
    home: Option<String>,
}

/// The account that this process runs as.
fn os_account() -> Option<Account> {
    let uid = Path::new("/proc/self").metadata().ok()?.uid();
    find_account(&std::fs::read_to_string("/etc/passwd").ok()?, uid)
}

/// `user:x:uid:gid:name:home:shell`
fn find_account(passwd: &str, uid: u32) -> Option<Account> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let user = fields.next().filter(|user| !user.is_empty())?;
        (fields.nth(1)?.parse() == Ok(uid)).then_some(())?;
        Some(Account {
            user: user.to_string(),
            home: fields.nth(2).map(str::to_string),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_account_is_found_by_its_number() {
        let passwd =
            "root:x:0:0:root:/root:/bin/bash\n\nrelay:x:10:10::/var/lib/relay:/bin/false\n";
        let found = find_account(passwd, 10).unwrap();
        assert_eq!(found.user, "relay");
        assert_eq!(found.home.as_deref(), Some("/var/lib/relay"));
        assert_eq!(find_account(passwd, 11), None);
    }
}
