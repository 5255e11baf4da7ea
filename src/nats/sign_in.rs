//! The CONNECT line: who we are, and the proof of it.
//!
//! Follows <https://docs.nats.io/reference/reference-protocols/nats-protocol#connect>. A server that wants an nkey's
//! signature has put a nonce into its INFO; the credentials file is what `nsc generate creds` writes.

use super::error::Error;
use super::nkey::Nkey;
use super::options::{Options, ServerUrl, UrlAuth};
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use serde::Serialize;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;

/// A credentials file has some kilobytes.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

#[derive(Default, Serialize)]
struct Connect<'a> {
    verbose: bool,
    pedantic: bool,
    tls_required: bool,
    lang: &'a str,
    version: &'a str,
    name: &'a str,
    /// 1: a later INFO is wanted.
    protocol: u8,
    headers: bool,
    /// Whether a publish that nobody listens to is answered (status 503).
    no_responders: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    user: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pass: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    auth_token: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    jwt: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    nkey: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sig: Option<String>,
}

/// What to sign in with.
pub enum Identity {
    /// Of the URL.
    Url(UrlAuth),
    /// A user JWT and its key, of a credentials file.
    Credentials {
        /// The JWT.
        jwt: String,
        /// The key it names.
        key: Arc<Nkey>,
    },
    /// A bare key.
    Nkey(Arc<Nkey>),
    /// Nothing.
    None,
}

impl Identity {
    /// Reads the files again, so that renewed credentials are found.
    pub fn load(options: &Options, server: &ServerUrl) -> Result<Identity, Error> {
        Ok(match (&server.auth, &options.creds, &options.nkey) {
            (Some(auth), ..) => Identity::Url(auth.clone()),
            (None, Some(path), _) => {
                let what = "credentials file";
                let text = read(what, path)?;
                credentials(&text).ok_or_else(|| {
                    malformed(what, path, "expected a user JWT and an nkey seed between lines of dashes, as `nsc generate creds` writes them")
                })?
            }
            (None, None, Some(path)) => {
                let what = "nkey seed file";
                let text = read(what, path)?;
                let key = seed(&text)
                    .ok_or_else(|| malformed(what, path, "expected a seed that begins with SU"))?;
                Identity::Nkey(Arc::new(key))
            }
            (None, None, None) => Identity::None,
        })
    }

    /// There is something to hide.
    pub fn is_secret(&self) -> bool {
        !matches!(self, Identity::None)
    }

    /// The line, with its end.
    pub fn connect_line(&self, options: &Options, tls: bool, nonce: Option<&str>) -> Vec<u8> {
        let mut connect = Connect {
            tls_required: tls,
            protocol: 1,
            lang: "rust",
            version: env!("CARGO_PKG_VERSION"),
            name: &options.name,
            headers: true,
            no_responders: true,
            ..Connect::default()
        };
        let nonce = nonce.unwrap_or_default().as_bytes();
        let sign = |key: &Nkey| Some(BASE64_URL_SAFE_NO_PAD.encode(key.sign(nonce)));
        match self {
            Identity::Url(UrlAuth::UserPassword(user, password)) => {
                connect.user = Some(user);
                connect.pass = Some(password);
            }
            Identity::Url(UrlAuth::Token(token)) => connect.auth_token = Some(token),
            Identity::Credentials { jwt, key } => {
                connect.jwt = Some(jwt.clone());
                connect.sig = sign(key);
            }
            Identity::Nkey(key) => {
                connect.nkey = Some(key.public_key());
                connect.sig = sign(key);
            }
            Identity::None => {}
        }
        let mut line = b"CONNECT ".to_vec();
        // a struct of strings cannot fail
        let _ = serde_json::to_writer(&mut line, &connect);
        line.extend_from_slice(b"\r\n");
        line
    }
}

/// The JWT is what a line of dashes precedes and another one follows; the seed may come before or after it, and comments
/// anywhere.
fn credentials(text: &str) -> Option<Identity> {
    let lines: Vec<&str> = lines(text).collect();
    let is_border = |line: &str| line.starts_with("---");
    let jwt = lines.windows(3).find_map(|lines| match lines {
        [before, jwt, after]
            if is_border(before) && is_border(after) && jwt.split('.').count() == 3 =>
        {
            Some(*jwt)
        }
        _ => None,
    })?;
    Some(Identity::Credentials {
        jwt: jwt.into(),
        key: Arc::new(seed(text)?),
    })
}

/// The first line that is a user's seed, whose checksum says so.
fn seed(text: &str) -> Option<Nkey> {
    lines(text).find_map(Nkey::from_seed)
}

fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(str::trim).filter(|line| !line.is_empty())
}

/// Reads as other clients do: a byte order mark, and comments in whatever encoding, are no error.
fn read(what: &'static str, path: &Path) -> Result<String, Error> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(MAX_FILE_BYTES).read_to_end(&mut bytes))
        .map_err(|source| Error::File {
            what,
            path: path.into(),
            source,
        })?;
    let text = String::from_utf8_lossy(&bytes);
    Ok(text.strip_prefix('\u{feff}').unwrap_or(&text).into())
}

fn malformed(what: &'static str, path: &Path, reason: &str) -> Error {
    Error::File {
        what,
        path: path.into(),
        source: io::Error::new(io::ErrorKind::InvalidData, reason),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file as `nsc generate creds` writes it.
    fn file(seed: &str) -> String {
        format!(
            "-----BEGIN NATS USER JWT-----\r\neyJ0eXAi.eyJ.c2ln\r\n------END NATS USER JWT------\r\n\r\n\
             ************************* IMPORTANT *************************\n\n\
             -----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
        )
    }

    #[test]
    fn credentials_are_read() {
        let user = nkeys::KeyPair::new_user();
        let text = file(&user.seed().unwrap());
        match credentials(&text) {
            Some(Identity::Credentials { jwt, key }) => {
                assert_eq!(jwt, "eyJ0eXAi.eyJ.c2ln");
                assert_eq!(key.public_key(), user.public_key());
            }
            _ => panic!("not read"),
        }
        let end_of_seed = text.find("\n------END USER").unwrap();
        for end in 0..end_of_seed {
            assert!(credentials(&text[..end]).is_none(), "{end} bytes");
        }
        assert!(credentials(&file("SUAB")).is_none());
        assert!(credentials("").is_none());
    }

    #[test]
    fn credentials_are_read_in_every_form_that_other_clients_read() {
        let user = nkeys::KeyPair::new_user();
        let seed = user.seed().unwrap();
        let jwt =
            "-----BEGIN NATS USER JWT-----\neyJ0eXAi.eyJ.c2ln\n------END NATS USER JWT------\n";
        let key =
            format!("-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n");
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("creds");
        let latin1 = b"# f\xfcr den Betrieb\n";
        for content in [
            [jwt, &key].concat().into_bytes(),
            [&key, jwt].concat().into_bytes(),
            [jwt, &key].concat().replace('\n', "\r\n").into_bytes(),
            format!("\u{feff}{jwt}{key}").into_bytes(),
            [latin1, jwt.as_bytes(), latin1, key.as_bytes(), latin1].concat(),
        ] {
            std::fs::write(&path, &content).unwrap();
            let shown = String::from_utf8_lossy(&content).into_owned();
            let found = credentials(&read("credentials file", &path).unwrap());
            let Some(Identity::Credentials { jwt, key }) = found else {
                panic!("{shown}");
            };
            assert_eq!(jwt, "eyJ0eXAi.eyJ.c2ln");
            assert_eq!(key.public_key(), user.public_key());
        }
        // an nkey file is as forgiving
        for content in [
            format!("\u{feff}{seed}\r\n"),
            format!("# mine\n{seed}\n"),
            key,
        ] {
            std::fs::write(&path, content).unwrap();
            let options = Options {
                nkey: Some(path.clone()),
                ..Options::default()
            };
            let found = Identity::load(&options, &options.servers[0]).unwrap();
            assert!(matches!(found, Identity::Nkey(key) if key.public_key() == user.public_key()));
        }
    }

    fn said(identity: &Identity, nonce: Option<&str>) -> serde_json::Value {
        let options = Options {
            name: "a \"relay\"".into(),
            ..Options::default()
        };
        let line = String::from_utf8(identity.connect_line(&options, true, nonce)).unwrap();
        let json = line.strip_prefix("CONNECT ").unwrap().strip_suffix("\r\n");
        serde_json::from_str(json.unwrap()).unwrap()
    }

    #[test]
    fn who_signs_in_is_said_as_the_protocol_has_it() {
        let said_by_none = said(&Identity::None, None);
        assert_eq!(said_by_none["name"], "a \"relay\"");
        for (field, expected) in [
            ("verbose", false),
            ("headers", true),
            ("no_responders", true),
            ("tls_required", true),
        ] {
            assert_eq!(said_by_none[field], expected, "{field}");
        }
        for field in ["user", "pass", "auth_token", "jwt", "nkey", "sig"] {
            assert!(said_by_none.get(field).is_none(), "{field}");
        }
        let user = UrlAuth::UserPassword("u".into(), "p\"".into());
        let by_user = said(&Identity::Url(user), None);
        assert_eq!(
            (&by_user["user"], &by_user["pass"]),
            (&"u".into(), &"p\"".into())
        );
        let by_token = said(&Identity::Url(UrlAuth::Token("t".into())), None);
        assert_eq!(by_token["auth_token"], "t");
        let theirs = nkeys::KeyPair::new_user();
        let key = Arc::new(Nkey::from_seed(&theirs.seed().unwrap()).unwrap());
        let by_jwt = Identity::Credentials {
            jwt: "a.b.c".into(),
            key: key.clone(),
        };
        let by_jwt = said(&by_jwt, Some("nonce"));
        assert_eq!(by_jwt["jwt"], "a.b.c");
        assert!(by_jwt["sig"].is_string() && by_jwt.get("nkey").is_none());
        let by_key = said(&Identity::Nkey(key.clone()), Some("nonce"));
        assert_eq!(by_key["nkey"], key.public_key());
        let signature = BASE64_URL_SAFE_NO_PAD.decode(by_key["sig"].as_str().unwrap());
        theirs.verify(b"nonce", &signature.unwrap()).unwrap();
    }
}
