//! The CONNECT line of a connection of our own: who we are, and the proof of it.
//!
//! Follows <https://docs.nats.io/reference/reference-protocols/nats-protocol#connect>. A server that wants an nkey's
//! signature has put a nonce into its INFO; the credentials file is what `nsc generate creds` writes.

use super::error::Error;
use super::options::{Options, ServerUrl, UrlAuth};
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use ring::rand::{SecureRandom, SystemRandom};
use serde::Serialize;
use std::io;
use std::path::Path;
use std::sync::Arc;

#[derive(Default, Serialize)]
struct Connect<'a> {
    verbose: bool,
    pedantic: bool,
    tls_required: bool,
    lang: &'a str,
    version: &'a str,
    name: &'a str,
    /// 0: no later INFO is wanted.
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
        key: Arc<nkeys::KeyPair>,
    },
    /// A bare key.
    Nkey(Arc<nkeys::KeyPair>),
    /// Nothing.
    None,
}

impl Identity {
    /// Reads the files anew, so that renewed credentials are found.
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
                let key = nkeys::KeyPair::from_seed(text.trim())
                    .map_err(|_| malformed(what, path, "expected a seed that begins with SU"))?;
                Identity::Nkey(Arc::new(key))
            }
            (None, None, None) => Identity::None,
        })
    }

    /// The line, with its end.
    pub fn connect_line(&self, options: &Options, tls: bool, nonce: Option<&str>) -> Vec<u8> {
        let mut connect = Connect {
            tls_required: tls,
            lang: "rust",
            version: env!("CARGO_PKG_VERSION"),
            name: &options.name,
            headers: true,
            no_responders: true,
            ..Connect::default()
        };
        let nonce = nonce.unwrap_or_default().as_bytes();
        let sign = |key| Some(BASE64_URL_SAFE_NO_PAD.encode(sign(key, nonce)));
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

/// Letters and digits that nobody else has, and nobody can guess.
pub fn unique() -> io::Result<String> {
    let mut random = [0; 16];
    SystemRandom::new()
        .fill(&mut random)
        .map_err(|_| io::Error::other("no random numbers"))?;
    Ok(format!("{:032x}", u128::from_ne_bytes(random)))
}

/// The key comes from a seed, so it can sign; an empty signature would merely be refused.
pub fn sign(key: &nkeys::KeyPair, nonce: &[u8]) -> Vec<u8> {
    key.sign(nonce).unwrap_or_default()
}

/// What stands between two lines of dashes, twice: the JWT, then the seed.
fn credentials(text: &str) -> Option<Identity> {
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let is_border = |line: &&str| line.starts_with("---");
    let mut section = || {
        lines.find(is_border)?;
        let text = lines.next()?;
        lines.next().filter(is_border).map(|_| text)
    };
    let (jwt, seed) = (section()?, section()?);
    Some(Identity::Credentials {
        jwt: jwt.into(),
        key: Arc::new(nkeys::KeyPair::from_seed(seed).ok()?),
    })
}

fn read(what: &'static str, path: &Path) -> Result<String, Error> {
    std::fs::read_to_string(path).map_err(|source| Error::File {
        what,
        path: path.into(),
        source,
    })
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
        let last_border = text.find("------END USER").unwrap();
        for end in 0..last_border + 3 {
            assert!(credentials(&text[..end]).is_none(), "{end} bytes");
        }
        assert!(credentials(&file("SUAB")).is_none());
        assert!(credentials("").is_none());
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
        let key = Arc::new(nkeys::KeyPair::new_user());
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
        key.verify(b"nonce", &signature.unwrap()).unwrap();
    }
}
